"""What the documentation says is what the program does."""

import ast
import dataclasses
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import click
import pytest
import typer
from fedqc_server.phases import PHASES
from fedqc_simulations.arms import ARMS, ArmScore, arm_figures

from fedqc import cli
from fedqc.cases import problems
from fedqc.cases.layouts import Layout, find_cases, load_layouts, read_ids
from fedqc.cases.layouts.table import TableLayout
from fedqc.config import FederationConfig, FrozenModel, QCConfig, SiteConfig, load_federation, parse
from fedqc.curation.diagnosis import Kind
from fedqc.curation.guards import EMPTY, SIZES
from fedqc.curation.rules import Outcome
from fedqc.degradation.annotator import ANNOTATOR_KINDS
from fedqc.errors import ConfigError
from fedqc.methods.base import get_method
from fedqc.metrics.agreement import Agreement
from fedqc.metrics.filtering import Filtering
from fedqc.protocol import REPLIES, ErrorCode, HandshakeReply, ModelRequest, Request
from fedqc.ratings import read_ratings
from fedqc.reports.words import reason_in_words
from fedqc.segmentation import Segmentation
from fedqc.statistics.allowed import statistic_keys
from fedqc.statistics.datasheet import AXES
from fedqc.task import Task, built_in_tasks, load_task

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PROTOCOL = DOCS / "reference" / "protocol.md"
LAYOUTS = DOCS / "reference" / "layouts.md"
RUN_FOLDER = DOCS / "reference" / "run-folder.md"
SERVER = ROOT / "server" / "fedqc_server"
SIMULATIONS = ROOT / "simulations" / "fedqc_simulations"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = typer.main.get_command(cli.app)
BY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def snippets(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(text_of(page)) if name == language]


def section(page: Path, title: str) -> str:
    """The text below a heading, up to the next heading of the same level or a higher one."""
    match = re.search(rf"^(#+) {re.escape(title)}\n", text_of(page), re.MULTILINE)
    assert match, f"{page} has no heading {title!r}"
    next_heading = rf"^#{{2,{len(match[1])}}} "  # one # may be a comment in a snippet
    return re.split(next_heading, text_of(page)[match.end() :], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all tables, without their headers."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rules = [index for index, line in enumerate(lines) if set(line) <= set("|-")]
    body = [line for index, line in enumerate(lines) if index not in rules and index + 1 not in rules]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body]


def names(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


def first_names(text: str) -> list[str]:
    """What stands in backticks in the first cells of all tables."""
    return [name for row in rows(text) for name in names(row[0])]


# -------------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    prose = FENCE.sub("", text_of(page))
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@BY_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page))):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{page}: {target}"
        assert linked.resolve().is_relative_to(ROOT), f"{page}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page}: {target}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    found, pending = set(), [ROOT / "README.md"]
    while pending:
        page = pending.pop().resolve()
        if page in found:
            continue
        found.add(page)
        targets = re.findall(r"\]\(([^)#\s]+)", text_of(page))
        linked = [page.parent / target for target in targets if ":" not in target]
        pending += [path for path in linked if path.suffix == ".md"]
        pending += [path for folder in linked if folder.is_dir() for path in folder.glob("*.md")]
    assert {page.resolve() for page in PAGES} == found


@pytest.mark.parametrize("picture", sorted(DOCS.rglob("*.svg")), ids=lambda path: path.name)
def test_pictures_are_whole(picture: Path) -> None:
    assert ElementTree.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"


# ----------------------------------------------------------------------------------------------- snippets


def toml_snippets() -> list[str]:
    return [body for page in PAGES for body in snippets(page, "toml")]


def read_snippet(body: str) -> FrozenModel:
    """A TOML snippet as what the name in its first line says it is."""
    name = body.partition("\n")[0].removeprefix("# ")
    assert name.endswith(".toml"), "a TOML snippet starts with '# ' and the name of the file"
    models: dict[str, type[FrozenModel]] = {"site.toml": SiteConfig, "federation.toml": FederationConfig}
    model = models.get(name, Task)
    return parse(tomllib.loads(body), model, source=name)


@pytest.mark.parametrize("body", toml_snippets())
def test_toml_snippets_are_valid(body: str) -> None:
    content = read_snippet(body)
    if isinstance(content, Task):
        get_method("qcresunet")(content, QCConfig())  # refuses a size that does not fit the network


def test_snippets_are_found_at_all() -> None:
    assert len(toml_snippets()) == "".join(map(text_of, PAGES)).count("```toml") > 0
    assert [words[1] for words in commands(ROOT / "README.md")] == ["demo", ".venv/bin/activate", "simulate"]


def test_the_demo_is_valid() -> None:
    path = ROOT / "examples" / "demo.toml"
    config = load_federation(path)
    get_method(config.qc.method)(load_task(config.task), config.qc)
    Segmentation(load_task(config.task), config.segmentation)
    assert path.relative_to(ROOT).as_posix() in text_of(ROOT / "Makefile")


def test_a_wrong_snippet_would_be_found() -> None:
    with pytest.raises(tomllib.TOMLDecodeError):
        read_snippet("# site.toml\nname = \n")
    with pytest.raises(ConfigError, match="unknown key 'colour'"):
        read_snippet('# federation.toml\ntask = "t"\ncolour = 1\n')


def test_data_layouts_of_the_guide_are_read(tmp_path: Path) -> None:
    page = DOCS / "how-to" / "simulate.md"
    task = read_snippet(snippets(page, "toml")[0])
    assert isinstance(task, Task)
    (table,) = snippets(page, "csv")
    (tmp_path / "cases.csv").write_text(table)
    from_table = TableLayout().find(tmp_path, task).cases
    assert [(case.id, case.patient) for case in from_table] == [
        ("p01-baseline", "p01"),
        ("p01-followup", "p01"),
        ("p02-baseline", "p02"),
    ]
    assert all(len(case.files) == 3 for case in from_table)


def make_tree(root: Path, drawing: str) -> None:
    """Empty files as drawn below the first line, which is the folder itself."""
    folders = [root]
    for line in drawing.splitlines()[1:]:
        match = re.fullmatch(r"((?:│   |    )*)[├└]── (\S+)(?:  .*)?", line)
        assert match, line
        depth, name = len(match[1]) // 4, match[2]
        path = folders[depth] / name.removesuffix("/")
        if name.endswith("/"):
            path.mkdir(parents=True)
            folders[depth + 1 :] = [path]
        else:
            path.touch()


@pytest.mark.parametrize(
    ("title", "task", "expected"),
    [
        (
            "csv: a table of paths",
            "wmh",
            [("p01-base", "p01", "Prisma"), ("p01-follow", "p01", "Skyra"), ("p02-base", "p02", "Prisma")],
        ),
        (
            "brats",
            "brats-glioma",
            [
                ("BraTS-GLI-00001-000", "BraTS-GLI-00001", None),
                ("BraTS19_2013_10_1", "BraTS19_2013_10_1", None),
            ],
        ),
        (
            "bids",
            "wmh",
            [
                ("sub-01_ses-01", "sub-01", "Siemens Prisma"),
                ("sub-01_ses-02", "sub-01", None),
                ("sub-02", "sub-02", None),
            ],
        ),
        ("nnunet", "wmh", [("case_001", "case_001", None), ("case_002", "case_002", None)]),
        ("msd", "wmh", [("lesions_001", "lesions_001", None), ("lesions_002", "lesions_002", None)]),
    ],
)
def test_every_layout_is_shown_with_a_tree_that_is_read_so(
    title: str, task: str, expected: list[tuple[str, str, str | None]], tmp_path: Path
) -> None:
    drawing, *written = (body for _, body in FENCE.findall(section(LAYOUTS, title)))
    make_tree(tmp_path, drawing)
    lists = [tmp_path / name for name in ("cases.csv", "dataset.json") if (tmp_path / name).exists()]
    for path, text in zip(lists, written, strict=True):
        path.write_text(text)
    for participants in tmp_path.glob("participants.tsv"):
        participants.write_text("participant_id\tage\n")
    for sidecar in tmp_path.rglob("sub-*.json"):
        sidecar.write_text('{"Manufacturer": "Siemens", "ManufacturersModelName": "Prisma"}')
    listing = find_cases(tmp_path, load_task(task))
    assert listing.layout == title.partition(":")[0]
    assert [*listing.problems, *(problem for case in listing.cases for problem in case.problems)] == []
    found = [(case.id, case.patient, case.groups.get("scanner")) for case in listing.cases]
    assert found == expected
    assert all(path.is_file() for case in listing.cases for path in case.files)
    assert {len(case.images) for case in listing.cases} <= {1, len(load_task(task).modalities)}


def test_lists_of_the_guide_are_read(tmp_path: Path) -> None:
    references, ratings = snippets(DOCS / "how-to" / "join.md", "csv")
    for name, text in (("verified.csv", references), ("ratings.csv", ratings)):
        (tmp_path / name).write_text(text)
    ids = read_ids(tmp_path / "verified.csv")
    rated = read_ratings(tmp_path / "ratings.csv")
    assert ids == {"BraTS-GLI-00001-000", "BraTS-GLI-00002-000"}
    assert [(rating.rater, rating.stars) for rating in rated] == [("anna", 5), ("ben", 4.5), ("ben", 2)]


def test_every_layout_is_documented() -> None:
    table = rows(text_of(LAYOUTS).partition("For all of them")[0])
    assert sorted(names(row[0])[0] for row in table) == sorted(load_layouts())


def test_layout_of_the_guide_can_be_used(tmp_path: Path) -> None:
    (code,) = snippets(LAYOUTS, "python")
    content: dict[str, Any] = {}
    exec(code, content)  # noqa: S102 - it is ours
    own = content["VisitsLayout"]
    assert issubclass(own, Layout)
    folder = tmp_path / "data" / "p01" / "2024-05-01"
    folder.mkdir(parents=True)
    assert not own.detect(tmp_path / "data")
    for name in ("t1", "flair", "lesion"):
        (folder / f"{name}.nii.gz").touch()
    assert own.detect(tmp_path / "data")
    (case,) = own().find(tmp_path / "data", load_task("wmh")).cases
    assert (case.id, case.patient, case.problems) == ("p01_2024-05-01", "p01", ())
    assert case.files == tuple(folder / f"{name}.nii.gz" for name in ("t1", "flair", "lesion"))


def test_every_built_in_task_is_documented() -> None:
    table = rows(section(DOCS / "reference" / "configuration.md", "Built-in tasks"))
    assert [names(row[0])[0] for row in table] == built_in_tasks()
    for name, modalities, classes, spacing, size in table:
        task = load_task(names(name)[0])
        assert tuple(names(modalities)) == task.modalities
        assert names(classes) == list(task.classes)
        for label, values in task.classes.items():
            assert f"`{label}` {' or '.join(map(str, values))}" in classes
        assert tuple(map(float, spacing.split(" x "))) == task.spacing
        assert tuple(map(int, size.split(" x "))) == task.size


# ----------------------------------------------------------------------------------------------- commands


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that a line names, such as `init site`, and the words behind it."""
    command = COMMANDS
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"there is no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def parse_command(words: list[str]) -> None:
    """Parse a command line with the real parser; nothing is run."""
    command, words = command_of(words)
    try:
        command.make_context(command.name, list(words))
    except (click.exceptions.Exit, typer.Exit):  # --help and --version
        return


def commands(page: Path) -> Iterator[list[str]]:
    for body in snippets(page, "sh"):
        for line in body.replace("\\\n", " ").splitlines():
            yield shlex.split(line)


@BY_PAGE
def test_commands_are_understood(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE)
    for words in commands(page):
        if words[0] == "make":
            assert set(words[1:]) <= set(targets)
        elif words[0] == "fedqc" and "[OPTIONS]" not in words:
            parse_command(words[1:])
    for inline in names(FENCE.sub("", text_of(page))):
        words = shlex.split(inline) if inline.startswith(("fedqc ", "make ")) else []
        if words[:1] == ["make"]:
            assert words[1] in targets
        elif len(words) > 1 and not words[1].startswith("-"):  # in a sentence, options may be left out
            options = {option for parameter in options_of(words[1:]) for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options
        elif words:
            parse_command(words[1:])
    capsys.readouterr()


def test_a_wrong_command_would_be_found() -> None:
    with pytest.raises(click.UsageError, match="--nois"):
        parse_command(["simulate", "--data", "d", "--out", "o", "--nois", "mixed"])
    with pytest.raises(click.UsageError, match="parameter: out"):
        parse_command(["segment", "--model", "m", "--data", "d"])
    with pytest.raises(AssertionError, match="no command"):
        parse_command(["simulation"])
    with pytest.raises(AssertionError, match="no command"):
        parse_command(["init", "hospital"])


def options_of(words: list[str]) -> list[click.Option]:
    options = [one for one in command_of(words)[0].params if isinstance(one, click.Option)]
    return [one for one in options if one.name != "help"]


@pytest.mark.parametrize(
    "command",
    [
        "check",
        "server",
        "client",
        "simulate",
        "segment",
        "train",
        "score",
        "reproduce",
        "init site",
        "init federation",
        "ledger",
        "review",
    ],
)
def test_every_option_is_documented_with_its_default(command: str) -> None:
    text = section(DOCS / "reference" / "command-line.md", f"fedqc {command}")
    documented = {names(row[0])[0]: row[1] for row in rows(text) if names(row[0])[0].startswith("-")}
    options = options_of(command.split())
    assert set(documented) == {option.opts[0] for option in options}
    for option in options:
        default = documented[option.opts[0]]
        if option.required:
            assert default == "required"
        elif option.default is not None and not option.is_flag:
            assert default == f"`{option.default}`"
    assert command != "simulate" or cli.DEFAULT_UNSEEN in names(documented["--unseen"])


def test_words_that_options_take_are_documented() -> None:
    table = rows(section(DOCS / "reference" / "command-line.md", "fedqc simulate"))
    meanings = {names(option)[0]: set(names(meaning)) for option, _, meaning in table}
    assert set(cli.Noise) <= meanings["--noise"]
    assert set(cli.Engine) <= meanings["--engine"]
    guide = section(DOCS / "how-to" / "simulate.md", "4. Change what is wrong with the labels")
    assert first_names(guide) == list(cli.Noise)


def test_every_command_is_documented() -> None:
    assert isinstance(COMMANDS, click.Group)
    titles = re.findall(r"^## fedqc (\w+)$", text_of(DOCS / "reference" / "command-line.md"), re.MULTILINE)
    assert titles == list(COMMANDS.commands)


# ---------------------------------------------------------------------------------------------- reference


def keys(model: type[FrozenModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a model with their annotation's defaults."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, FrozenModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


@pytest.mark.parametrize(
    ("title", "model", "required"),
    [
        ("site.toml", SiteConfig, {"name": "a", "task": "t", "data": {"path": "d"}}),
        ("federation.toml", FederationConfig, {"task": "t"}),
        ("A task", Task, load_task("msd-hippocampus").model_dump(exclude={"description"})),
    ],
)
def test_every_key_is_documented_with_its_default(
    title: str, model: type[FrozenModel], required: dict[str, Any]
) -> None:
    table = rows(section(DOCS / "reference" / "configuration.md", title))
    documented = {names(key)[0]: default for key, default, _ in table}
    fields = dict(keys(model))
    assert list(documented) == list(fields), "the table lists every key in the order of the model"
    assert [key for key, default in documented.items() if default == "required"] == [
        key for key, field in fields.items() if field.is_required()
    ]
    lines = []
    for key, default in documented.items():
        if default == "`-`":
            assert fields[key].default is None, key
        elif default != "required":
            lines.append(f"{key} = {names(default)[0]}")
    filled = tomllib.loads("\n".join(lines))
    for key, value in required.items():
        filled[key] = {**filled.get(key, {}), **value} if isinstance(value, dict) else value
    assert parse(filled, model, source=title) == parse(required, model, source=title)


def test_every_message_is_documented() -> None:
    table = rows(text_of(PROTOCOL).partition("## ")[0])
    documented = {names(kind)[0]: set(names(reply)) for kind, _, reply in table}
    assert documented == {kind: set(records) for kind, records in REPLIES.items()}
    with_weights = {names(kind)[0] for kind, request, _ in table if "weights" in names(request)}
    assert with_weights == {kind.kind for kind in concrete_requests() if issubclass(kind, ModelRequest)}


def test_every_field_of_a_request_is_documented() -> None:
    table = rows(section(PROTOCOL, "Requests"))
    everywhere = {names(field)[0] for field, where, _ in table if where == "all"}
    for request in concrete_requests():
        here = {names(field)[0] for field, where, _ in table if request.kind in names(where)}
        expected = {name for name, field in request.model_fields.items() if not field.exclude}
        assert everywhere | here == expected, request.kind


def concrete_requests() -> list[type[Request]]:
    found, pending = [], [Request]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        found += [kind] if "kind" in vars(kind) else []
    assert sorted(kind.kind for kind in found) == sorted(REPLIES)
    return found


def test_every_statistic_is_documented() -> None:
    task = load_task("msd-hippocampus")
    spelled = {
        "<code>": get_args(problems.ErrorCode),
        "<axis>": AXES,
        "<modality>": task.modalities,
        "<class>": task.classes,
        "<region>": task.regions,
        "<outcome>": tuple(Outcome),
        "<kind>": tuple(Kind),
        "<size>": (EMPTY, *SIZES),
    }
    documented: dict[str, set[str]] = {}
    for key, phase, _, _ in rows(section(PROTOCOL, "Statistics")):
        variants = [names(key)[0]]
        for placeholder, values in spelled.items():
            variants = [v.replace(placeholder, str(value)) for v in variants for value in values]
        documented.setdefault(phase, set()).update(variants)
    kinds = {phase: phase if "." in phase else f"query.{phase.replace('-', '_')}" for phase in documented}
    told = {kind for kind, records in REPLIES.items() if "statistics" in records}
    assert set(kinds.values()) == told
    for phase, kind in kinds.items():
        assert documented[phase] == statistic_keys(kind, task)


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("handshake", list(HandshakeReply.model_fields)),
        ("Errors", [str(code) for code in ErrorCode]),
    ],
)
def test_every_word_of_the_protocol_is_documented(title: str, expected: list[str]) -> None:
    assert sorted(first_names(section(PROTOCOL, title))) == sorted(expected)


def test_every_problem_is_documented() -> None:
    documented = rows(text_of(DOCS / "reference" / "problems.md"))
    assert {names(code)[0]: (severity, meaning) for code, severity, meaning, _ in documented} == {
        code: (severity, problems.MEANINGS[code]) for code, severity in problems.CODES.items()
    }
    assert len(documented) == len(problems.CODES)
    assert all(fix for *_, fix in documented)


def test_every_phase_is_documented() -> None:
    text = section(DOCS / "concepts.md", "A run, phase by phase")
    assert re.findall(r"^\d+\. \*\*([^*]+)\*\*", text, re.MULTILINE) == ["handshake", *PHASES]


def calls(method: str) -> Iterator[tuple[ast.FunctionDef, ast.Call]]:
    """Every call of a method of this name in the server role, with the function that it stands in."""
    for path in sorted(SERVER.glob("*.py")):
        for function in functions(path):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == method:
                    yield function, node


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(text_of(path))) if isinstance(node, ast.FunctionDef)]


def words_of(node: ast.expr, function: ast.FunctionDef) -> set[str]:
    """The texts that an expression stands for: a literal, either of two, or a variable set to these."""
    match node:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.IfExp(body=body, orelse=orelse):
            return words_of(body, function) | words_of(orelse, function)
        case ast.Name(id=name):
            values = [
                one.value
                for one in ast.walk(function)
                if isinstance(one, ast.Assign) and name in map(ast.unparse, one.targets)
            ]
            return {word for value in values for word in words_of(value, function)}
    raise AssertionError(f"{function.name}: no text can be read off {ast.unparse(node)}")


def keywords(call: ast.Call) -> set[str]:
    return {keyword.arg for keyword in call.keywords if keyword.arg is not None}


def keys_in(node: ast.AST) -> list[str]:
    """Keys that dictionaries are written down with."""
    found = [key for one in ast.walk(node) if isinstance(one, ast.Dict) for key in one.keys]
    return [key.value for key in found if isinstance(key, ast.Constant) and isinstance(key.value, str)]


def test_every_event_is_documented() -> None:
    table = rows(section(RUN_FOLDER, "events.jsonl").partition("A reason is")[0])
    documented = {event: set(names(further)) for cell, further in table for event in names(cell)}
    found: dict[str, set[str]] = {}
    for function, call in calls("event"):
        for event in words_of(call.args[0], function):
            found.setdefault(event, set()).update(
                keywords(call) - {"round", "site"}
            )  # any line may have these
    assert set(documented) == set(found)
    assert {"run-started", "run-resumed", "site-failed", "site-excused"} < set(found)
    for event, keys in found.items():
        if event != "site-excused":  # "the same" as the line above
            assert keys <= documented[event], event


def test_every_reason_is_one_that_the_coordinator_gives_and_has_words() -> None:
    text = section(RUN_FOLDER, "events.jsonl").partition("A reason is")[2]
    code = "".join(text_of(path) for path in SERVER.glob("*.py"))
    reasons = set(first_names(text)) - {"flower-error-N", "unreadable-reply-X"}
    assert {reason for reason in reasons if f'"{reason}"' not in code} == set()
    assert {reason for reason in reasons if reason_in_words(reason) == reason} == set()


def test_every_key_of_the_coordinators_files_is_documented() -> None:
    learned = {key for function, call in calls("learned") for key in words_of(call.args[0], function)}
    assert set(first_names(section(RUN_FOLDER, "statistics.json"))) == learned
    record = {key for method in ("start", "note") for _, call in calls(method) for key in keywords(call)}
    (start,) = (one for one in functions(SERVER / "run_folder.py") if one.name == "start")
    assert set(first_names(section(RUN_FOLDER, "run.json"))) == record | set(keys_in(start))


def test_every_figure_of_an_evaluation_is_documented() -> None:
    by_name = {one.name: one for one in functions(SIMULATIONS / "simulate.py")}
    table = rows(section(RUN_FOLDER, "evaluation.json").partition("### ")[0])
    documented = {names(key)[0]: names(meaning) for key, meaning in table}
    assert set(documented) == set(keys_in(by_name["_figures"]))
    assert (
        set(keys_in(by_name["_pooled"])) - set(documented) - {"all"} == {"seeds"} <= set(documented["seed"])
    )
    assert set(keys_in(by_name["_suspected"])) <= set(documented["suspected"])


def test_every_figure_of_the_qc_model_is_documented() -> None:
    (function,) = (one for one in functions(SIMULATIONS / "evaluation.py") if one.name == "qc_figures")
    groups = {"all", "trained", "unseen", "by_kind"}
    assert groups < set(keys_in(function))
    agreement = [field.name for field in dataclasses.fields(Agreement)]
    by_kind = set(keys_in(function)) - groups
    assert sorted(first_names(section(RUN_FOLDER, "qc"))) == sorted([*agreement, "dsc_err_median", *by_kind])


def test_every_figure_of_the_curation_is_documented() -> None:
    filtering = [field.name for field in dataclasses.fields(Filtering)]
    assert sorted(first_names(section(RUN_FOLDER, "curation"))) == sorted([*filtering, "n_spoiled"])


def test_every_figure_of_the_segmentation_is_documented() -> None:
    scores = [ArmScore(arm, "p01", "c01", {"front": 0.5}, 0.5) for arm in ARMS]
    figures = arm_figures([scores], dict.fromkeys(ARMS, 1), seed=0)
    text = section(RUN_FOLDER, "segmentation")
    arms, _, gap = text.partition("`gap_closed` is")
    assert set(figures) == {*ARMS, "gap_closed"} <= set(names(text))
    assert {tuple(figures[arm]) for arm in ARMS} == {tuple(first_names(arms))}
    assert list(figures["gap_closed"]) == first_names(gap)


def test_kinds_of_error_are_documented() -> None:
    text = section(DOCS / "how-to" / "simulate.md", "4. Change what is wrong with the labels")
    listed = names(text.rpartition("The kinds are")[2])
    assert listed == list(ANNOTATOR_KINDS)
    table = rows(text_of(DOCS / "decisions" / "0007-ranges-of-annotator-errors.md"))
    assert sorted(row[0] for row in table) == sorted(ANNOTATOR_KINDS)


@BY_PAGE
def test_pages_name_nothing_of_the_authors_machines(page: Path) -> None:
    assert not re.search(r"/(work|root|home|opt)/", text_of(page))
