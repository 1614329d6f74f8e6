"""What is shipped, and what may know of what."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "fedqc": ROOT / "fedqc",
    "fedqc_server": ROOT / "server" / "fedqc_server",
    "fedqc_client": ROOT / "client" / "fedqc_client",
    "fedqc_simulations": ROOT / "simulations" / "fedqc_simulations",
}
ROLES = set(PACKAGES) - {"fedqc"}
MAY_IMPORT = {
    "fedqc": {"fedqc"},
    "fedqc_server": {"fedqc", "fedqc_server"},
    "fedqc_client": {"fedqc", "fedqc_client"},
    "fedqc_simulations": {"fedqc", "fedqc_server", "fedqc_client", "fedqc_simulations"},
}
CLI = PACKAGES["fedqc"] / "cli.py"


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources(package: str) -> list[Path]:
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files
    return files


# ------------------------------------------------------------------------------------------------ shipping


def test_wheel_holds_exactly_the_four_packages(tmp_path: Path) -> None:
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT))
    run(*build, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    about = {name for name in shipped if name.split("/")[0].endswith(".dist-info")}
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped - about == expected
    assert {"fedqc/tasks/msd-hippocampus.toml", "fedqc/py.typed", "fedqc/review/static/page.js"} <= shipped
    if shutil.which("npm"):
        assert "fedqc/review/static/niivue.js" in shipped
    assert any(name.endswith("licenses/LICENSE") for name in about)


def test_bundle_for_the_sites_holds_no_code(tmp_path: Path) -> None:
    app = tmp_path / "fedqc"  # Flower names bundles after folders, and a clone may be called anything
    no_caches = shutil.ignore_patterns("__pycache__")
    for name in ("fedqc", "server", "client", "simulations", "tests", "docs"):
        shutil.copytree(ROOT / name, app / name, ignore=no_caches)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, app / name)
    flwr = Path(sysconfig.get_path("scripts")) / "flwr"
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    run(str(flwr), "build", "--app", str(app), cwd=tmp_path, FLWR_HOME=str(tmp_path / "flwr"), **quiet)
    (bundle,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(bundle) as archive:
        assert sorted(archive.namelist()) == [".info/CONTENT", "README.md", "pyproject.toml"]


def test_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    pinned = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}
    # A local version ("+cpu") would demand one kind of wheel.
    assert pinned[canonicalize_name("torch")] == "==2.13.0"
    pending, needed = [("fedqc", frozenset({"dev"}))], set()
    while pending:
        name, extras = pending.pop()
        if (name, extras) in needed:
            continue
        needed.add((name, extras))
        for text in distribution(name).requires or []:
            one = Requirement(text)
            if not one.marker or any(one.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                pending.append((canonicalize_name(one.name), frozenset(one.extras)))
    # More pins than needed are fine: other systems need other packages.
    assert {name for name, _ in needed} - {"fedqc"} - set(pinned) == set()


# ----------------------------------------------------------------------------------------------- layering


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Each imported module's full name, and whether the import runs when the file is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    deferred = {node for f in ast.walk(tree) if isinstance(f, functions) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno}: write imports with their full names"
            yield str(node.module), node not in deferred


def top(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_lies_below_them(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources(package)
        for module, at_once in imports(path)
        if top(module) in PACKAGES.keys() - MAY_IMPORT[package]
        # A command starts its role: the one door, opened only when the command runs.
        and not (path == CLI and not at_once)
    ]
    assert wrong == []


def test_only_the_protocol_knows_flower() -> None:
    users = {path for path in sources("fedqc") if any(top(module) == "flwr" for module, _ in imports(path))}
    assert users == {PACKAGES["fedqc"] / "protocol.py"}


def test_the_roots_are_no_packages() -> None:
    roots = (ROOT / name for name in ("server", "client", "simulations"))
    assert [root.name for root in roots if (root / "__init__.py").exists()] == []


def test_the_import_reader_sees_every_form(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    lines = (
        "import a.b as c, d",
        "from e.f import g",
        "class K:",
        "    import h",
        "def f():",
        "    import i",
        "    from j import k",
    )
    path.write_text("\n".join(lines))
    assert set(imports(path)) == {
        ("a.b", True),
        ("d", True),
        ("e.f", True),
        ("h", True),
        ("i", False),
        ("j", False),
    }


@pytest.mark.parametrize(
    "arguments", [["--help"], ["simulate", "--help"], ["init", "site", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = ["torch", "flwr", "monai", "scipy", "sklearn", "nibabel", "matplotlib", "grpc"]
    code = (
        "import sys\n"
        "from fedqc.cli import main\n"
        f"sys.argv = ['fedqc', *{arguments!r}]\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        f"    print('imported:', [name for name in {[*heavy, *sorted(ROLES)]!r} if name in sys.modules])\n"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).splitlines()[-1] == "imported: []"


@pytest.mark.parametrize(
    ("app", "drawing"), [("fedqc_client.app", "matplotlib"), ("fedqc_server.app", "matplotlib.pyplot")]
)
def test_what_flower_starts_for_each_message_imports_nothing_slow_that_few_messages_need(
    app: str, drawing: str
) -> None:
    slow = ["monai", "sklearn", "scipy.stats", drawing]
    code = f"import sys, {app}; print('imported:', [name for name in {slow!r} if name in sys.modules])"
    assert run(sys.executable, "-c", code, cwd=ROOT).splitlines()[-1] == "imported: []"


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    script = Path(sysconfig.get_path("scripts")) / "fedqc"
    assert run(str(script), "--version", cwd=ROOT) == f"fedqc {project['version']}\n"
