# `make test` on a fresh clone needs Python 3.11 or newer, make, and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

DEMO := runs/demo

.PHONY: install demo lint test test-browser test-deploy test-deploy-long wheelhouse fuzz clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"{sys.executable} is Python {sys.version.split()[0]}, fedqc needs 3.11 or newer; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	touch $@

# A finished demo is shown again, one that was cut off goes on.
demo: install
	@if [ -e $(DEMO)/simulation.json ]; then $(BIN)/fedqc simulate --resume $(DEMO); \
	else $(BIN)/fedqc simulate examples/demo.toml --out $(DEMO); fi

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -q -m "not deploy and not deploy_long and not browser"

# The pages in a real browser; Debian: apt install chromium.
test-browser: install
	$(BIN)/pytest -q -m browser

# Real servers and nginx on loopback; Debian: apt install nginx-light.
test-deploy: install
	$(BIN)/pytest -q -m deploy

test-deploy-long: install
	$(BIN)/pytest -q -m "deploy or deploy_long"

# Everything that a machine without internet needs to install fedqc: make wheelhouse PYTHON=python3.12
wheelhouse: install
	$(BIN)/python -m pip wheel --disable-pip-version-check --quiet -c constraints.txt -w wheelhouse .
	@$(BIN)/python -m zipfile -l wheelhouse/fedqc-*.whl | grep -q review/static/niivue.js \
		|| echo "note: npm could not fetch the viewer, so that fedqc review will not work there"
	@echo "copy the folder wheelhouse, then: pip install --no-index --find-links wheelhouse fedqc"

# `fedqc check` on made-up folders, with a fuzzer that is guided by coverage: make fuzz SECONDS=3600
SECONDS := 300

fuzz: $(VENV)/fuzz
	$(BIN)/python -m tests.fuzz.run --seconds $(SECONDS)

$(VENV)/fuzz: $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev,fuzz]'
	touch $@

# Everything that the targets above made, the environment too; runs and data are left alone.
clean:
	rm -rf $(VENV) build dist *.egg-info *.fab .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find fedqc server client simulations tests -name __pycache__ -type d -prune -exec rm -rf {} +
