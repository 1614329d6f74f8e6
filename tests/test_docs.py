"""What the documentation says is what the program does."""

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
from fedqc_client.guard import statistic_keys

from fedqc import cli
from fedqc.cases.layouts import CsvLayout, MsdLayout
from fedqc.cases.validation import Code
from fedqc.config import FederationConfig, FrozenModel, QCConfig, SiteConfig, parse
from fedqc.curation.rules import Outcome
from fedqc.degradation.annotator import ANNOTATOR_KINDS
from fedqc.errors import ConfigError
from fedqc.methods.base import get_method
from fedqc.metrics.agreement import Agreement
from fedqc.metrics.filtering import Filtering
from fedqc.protocol import REPLIES, ErrorCode, HandshakeReply, ModelRequest, Request
from fedqc.task import Task, load_task

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PROTOCOL = DOCS / "reference" / "protocol.md"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = typer.main.get_command(cli.app)
BY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def snippets(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(text_of(page)) if name == language]


def section(page: Path, title: str) -> str:
    """The text below a heading, up to the next heading of the same level."""
    match = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |\Z)", text_of(page), re.MULTILINE | re.DOTALL)
    assert match, f"{page} has no heading {title!r}"
    return match[2]


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
    assert [words[1] for words in commands(ROOT / "README.md") if "--out" in words] == ["simulate"]


def test_a_wrong_snippet_would_be_found() -> None:
    with pytest.raises(tomllib.TOMLDecodeError):
        read_snippet("# site.toml\nname = \n")
    with pytest.raises(ConfigError, match="unknown key 'colour'"):
        read_snippet('# federation.toml\ntask = "t"\ncolour = 1\n')


def test_data_layouts_of_the_guide_are_read(tmp_path: Path) -> None:
    page = DOCS / "how-to" / "simulate.md"
    task = read_snippet(snippets(page, "toml")[0])
    assert isinstance(task, Task)
    (table,), (listing,) = snippets(page, "csv"), snippets(page, "json")
    (tmp_path / "cases.csv").write_text(table)
    (tmp_path / "dataset.json").write_text(listing)
    from_table = CsvLayout().find(tmp_path, task)
    assert [(case.id, case.patient) for case in from_table] == [
        ("p01-baseline", "p01"),
        ("p01-followup", "p01"),
        ("p02-baseline", "p02"),
    ]
    assert all(len(case.images) == 2 for case in from_table)
    assert [case.id for case in MsdLayout().find(tmp_path, task)] == ["case_001", "case_002"]


# ----------------------------------------------------------------------------------------------- commands


def parse_command(words: list[str]) -> None:
    """Parse a command line with the real parser; nothing is run."""
    assert isinstance(COMMANDS, click.Group)
    command: click.Command = COMMANDS
    if words and not words[0].startswith("-"):
        assert words[0] in COMMANDS.commands, f"there is no command {words[0]!r}"
        command, words = COMMANDS.commands[words[0]], words[1:]
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
    targets = re.findall(r"^([a-z]+):", text_of(ROOT / "Makefile"), re.MULTILINE)
    for words in commands(page):
        if words[0] == "make":
            assert set(words[1:]) <= set(targets)
        elif words[0] == "fedqc" and "[OPTIONS]" not in words:
            parse_command(words[1:])
    for inline in names(FENCE.sub("", text_of(page))):
        words = shlex.split(inline) if inline.startswith(("fedqc ", "make ")) else []
        if words[:1] == ["make"]:
            assert words[1] in targets
        elif words[:2] != ["fedqc", "simulate"]:
            if words:
                parse_command(words[1:])
        else:
            options = {option for parameter in simulate_options() for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options
    capsys.readouterr()


def test_a_wrong_command_would_be_found() -> None:
    with pytest.raises(click.UsageError, match="--nois"):
        parse_command(["simulate", "--data", "d", "--out", "o", "--nois", "mixed"])
    with pytest.raises(click.UsageError, match="parameter: out"):
        parse_command(["simulate", "--data", "d"])
    with pytest.raises(AssertionError, match="no command"):
        parse_command(["simulation"])


def simulate_options() -> list[click.Option]:
    assert isinstance(COMMANDS, click.Group)
    options = [one for one in COMMANDS.commands["simulate"].params if isinstance(one, click.Option)]
    return [one for one in options if one.name != "help"]


def test_every_option_is_documented_with_its_default() -> None:
    table = rows(section(DOCS / "reference" / "command-line.md", "fedqc simulate"))
    documented = {names(option)[0]: default for option, default, _ in table}
    assert set(documented) == {option.opts[0] for option in simulate_options()}
    for option in simulate_options():
        default = documented[option.opts[0]]
        if option.required:
            assert default == "required"
        elif option.default is not None:
            assert default == f"`{option.default}`"
    assert cli.DEFAULT_UNSEEN in names(documented["--unseen"])


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
        role, _, action = request.kind.partition(".")
        phase = role if role == "train" else action
        here = {names(field)[0] for field, where, _ in table if phase in where.split(", ")}
        expected = {name for name, field in request.model_fields.items() if not field.exclude}
        assert everywhere | here == expected


def concrete_requests() -> list[type[Request]]:
    children = [*Request.__subclasses__(), *ModelRequest.__subclasses__()]
    return [kind for kind in children if kind is not ModelRequest]


def test_every_statistic_is_documented() -> None:
    task = load_task("msd-hippocampus")
    spelled = {
        "<code>": get_args(Code),
        "<class>": task.classes,
        "<region>": task.regions,
        "<outcome>": tuple(Outcome),
    }
    documented: dict[str, set[str]] = {}
    for key, phase, _, _ in rows(section(PROTOCOL, "Statistics")):
        variants = [names(key)[0]]
        for placeholder, values in spelled.items():
            variants = [v.replace(placeholder, str(value)) for v in variants for value in values]
        documented.setdefault(phase, set()).update(variants)
    for phase in ("summarise", "calibrate", "score"):
        assert documented[phase] == statistic_keys(f"query.{phase}", task)


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("handshake", list(HandshakeReply.model_fields)),
        ("Errors", [str(code) for code in ErrorCode]),
        ("Problems of cases", list(get_args(Code))),
    ],
)
def test_every_word_of_the_protocol_is_documented(title: str, expected: list[str]) -> None:
    assert sorted(first_names(section(PROTOCOL, title))) == sorted(expected)


def test_every_event_is_documented() -> None:
    code = "".join(text_of(path) for path in (ROOT / "server" / "fedqc_server").glob("*.py"))
    events = set(re.findall(r"\.event\(\s*\"([a-z-]+)\"", code))
    listed = section(DOCS / "reference" / "run-folder.md", "events.jsonl").partition("A reason is")[0]
    assert set(first_names(listed)) == events


def test_every_figure_of_an_evaluation_is_documented() -> None:
    text = section(DOCS / "reference" / "run-folder.md", "evaluation.json")
    code = text_of(ROOT / "simulations" / "fedqc_simulations" / "evaluation.py")
    literal = code.partition("by_kind[kind] = {")[2].partition("}\n")[0]
    by_kind = re.findall(r'^ +"(\w+)": ', literal, re.MULTILINE)
    agreement = [field.name for field in dataclasses.fields(Agreement)]
    filtering = [field.name for field in dataclasses.fields(Filtering)]
    assert len(by_kind) == 6
    assert sorted(first_names(text)) == sorted(
        [*agreement, "dsc_err_median", *by_kind, *filtering, "n_spoiled"]
    )


def test_kinds_of_error_are_documented() -> None:
    text = section(DOCS / "how-to" / "simulate.md", "4. Change what is wrong with the labels")
    listed = names(text.rpartition("The kinds are")[2])
    assert listed == list(ANNOTATOR_KINDS)
    table = rows(text_of(DOCS / "decisions" / "0007-ranges-of-annotator-errors.md"))
    assert sorted(row[0] for row in table) == sorted(ANNOTATOR_KINDS)


@BY_PAGE
def test_pages_name_nothing_of_the_authors_machines(page: Path) -> None:
    assert not re.search(r"/(work|root|home|opt)/|127\.0\.0\.1|localhost", text_of(page))
