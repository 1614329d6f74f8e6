"""`fedqc init`: writes a commented `site.toml` or `federation.toml`, from options and by asking."""

import os
import shlex
import tomllib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import tomli_w

from fedqc.cases.layouts import find_cases, load_layouts, read_ids
from fedqc.certificates import make_server_files, make_site_key
from fedqc.config import (
    FederationConfig,
    FrozenModel,
    SiteConfig,
    SitesConfig,
    expand,
    field_of,
    load_site,
    parse,
    parse_value,
)
from fedqc.credentials import credential_problems
from fedqc.dialogue import Dialogue
from fedqc.errors import ConfigError, DataError
from fedqc.ratings import read_ratings
from fedqc.task import Task, built_in_tasks, load_task

SITE_OPTIONS = {
    "--name": "name",
    "--task": "task",
    "--data": "data.path",
    "--layout": "data.layout",
    "--reference": "data.reference",
    "--ratings": "data.ratings",
    "--results": "results",
    "--device": "compute.device",
    "--precision": "compute.precision",
    "--workers": "compute.workers",
    "--cache": "compute.cache",
    "--min-count": "policy.min_count",
    "--segmentation": "policy.segmentation",
    "--address": "coordinator.address",
    "--ca": "coordinator.ca",
    "--key": "coordinator.key",
}
"""Options of `fedqc init site` and the keys they are for."""

FEDERATION_OPTIONS = {
    "--name": "name",
    "--task": "task",
    "--sites": "sites.expected",
    "--minimum": "sites.minimum",
    "--rounds": "qc.rounds",
    "--local-steps": "qc.local_steps",
    "--threshold": "curation.threshold",
    "--segmentation-rounds": "segmentation.rounds",
    "--min-count": "privacy.min_count",
    "--address": "server.address",
}
"""Options of `fedqc init federation` and the keys they are for."""

CERTIFICATES = "certificates"
"""Folder of the coordinator's certificates, beside federation.toml."""
PUBLIC_ADDRESS = "0.0.0.0:8443"
"""Where a federation with hosts listens unless told otherwise."""

_GREETING = """\
Makes {file}. Enter takes the value in brackets, or leaves out what need not be there.
Nothing is written before the last answer; Ctrl-C stops."""

_LAYOUT_QUESTION = "Layout to read it with, such as csv or bids:expert (Enter: none of them)"


def init_site(target: Path, options: Mapping[str, object], *, asking: bool) -> None:
    """Write a `site.toml`.

    Args:
        target: the new file.
        options: values by option, as in `SITE_OPTIONS`; None where not given.
        asking: whether what is not given is asked for.

    Raises:
        ConfigError: the file is there already, or a value is wrong or missing.
        DataError: the data cannot be listed.
    """
    _check_target(target)
    talk = Dialogue(options, SITE_OPTIONS, SiteConfig, asking=asking)
    if asking:
        talk.say(_GREETING.format(file=target))
    values = _site_values(talk, target)
    new_key = _new_key(target, values)
    _write(target, "site.toml.jinja", SiteConfig, values)
    if new_key is not None:
        public = make_site_key(new_key, str(values["name"]))
        talk.say(f"{new_key} is this site's private key, for nobody else; send {public} to the coordinator:")
        talk.say(public.read_text(encoding="utf-8").strip())
    for problem in credential_problems(load_site(target).coordinator):
        talk.say(f"note: {problem}")
    talk.say(f"{target} is written. Next: fedqc check {shlex.quote(str(target))}")


def init_federation(target: Path, options: Mapping[str, object], *, asking: bool) -> None:
    """Write a `federation.toml`.

    Args:
        target: the new file.
        options: values by option, as in `FEDERATION_OPTIONS`; None where not given.
        asking: whether what is not given is asked for.

    Raises:
        ConfigError: the file is there already, or a value is wrong or missing.
    """
    _check_target(target)
    talk = Dialogue(options, FEDERATION_OPTIONS, FederationConfig, asking=asking)
    if asking:
        talk.say(_GREETING.format(file=target))
    values = _federation_values(talk, target)
    values["server.address"] = talk.optional("--address")
    hosts = talk.optional("--host", check=lambda text: [host.strip() for host in str(text).split(",")])
    if hosts is not None:
        folder = _absolute(target).parent / CERTIFICATES
        values |= {
            "server.certificate": f"{CERTIFICATES}/server.crt",
            "server.key": f"{CERTIFICATES}/server.key",
            "server.address": values["server.address"] or PUBLIC_ADDRESS,
        }
        files = make_server_files(folder, hosts, name=str(values["name"] or "federation"))
        talk.say(f"{files.authority} is for the sites; all else in {folder} stays here")
    _write(target, "federation.toml.jinja", FederationConfig, values)
    if hosts is not None:
        talk.say(f"{_keys(target)} is for the sites' public keys, NAME.pub each; then: fedqc server {target}")
    trial = f"fedqc simulate {shlex.quote(str(target))}"
    data = "" if values["task"] in {"phantom", "phantom-lesions"} else " --data DATA"
    talk.say(f"{target} is written. Next: try it on one machine with {trial}{data} --out runs/trial")


# ---------------------------------------------------------------------------------------------- questions


def _site_values(talk: Dialogue, target: Path) -> dict[str, object]:
    """Values by key."""
    values: dict[str, object] = {}
    written = partial(_written, target)
    for option in ("--device", "--precision", "--workers"):
        values[SITE_OPTIONS[option]] = talk.optional(option)
    values["name"] = talk.needed("--name", "Name of this site, such as hospital-a")
    task = _ask_task(talk, target, values)
    data, ids = _ask_data(talk, target, task, values)
    values["data.reference"] = talk.optional(
        "--reference",
        "Table (column id) of the cases whose label you vouch for (Enter: none yet)",
        partial(_read_list, talk, target, ids, read_ids),
    )
    values["data.ratings"] = talk.optional(
        "--ratings",
        "Table (columns id, rater, view, stars) of ratings by people (Enter: none)",
        partial(_read_list, talk, target, ids, lambda path: [one.case for one in read_ratings(path)]),
    )
    for option in ("--results", "--cache"):
        values[SITE_OPTIONS[option]] = talk.optional(option, check=partial(_folder, target, data))
    values["policy.min_count"] = talk.optional(
        "--min-count",
        "Fewest patients behind any number that leaves this site",
        default=talk.default("--min-count"),
    )
    values["policy.segmentation"] = talk.optional(
        "--segmentation", "Take part in the training of a segmentation model?", _yes_or_no, default="yes"
    )
    values["coordinator.address"] = talk.optional(
        "--address", "Address of the coordinator, such as fl.example.org:8443 (Enter: not known yet)"
    )
    known = values["coordinator.address"] is not None
    values["coordinator.ca"] = talk.optional(
        "--ca", "Certificate that the coordinator sent (Enter: none yet)" if known else "", written
    )
    values["coordinator.key"] = talk.optional("--key", check=written)
    return values


def _new_key(target: Path, values: dict[str, object]) -> Path | None:
    """Where the site's private key will be made; None where there is one. Its place goes to `values`."""
    if values["coordinator.key"] is None:
        values["coordinator.key"] = f"{values['name']}.key"
    path = _absolute(target).parent / str(values["coordinator.key"])
    return None if path.exists() else path


def _federation_values(talk: Dialogue, target: Path) -> dict[str, object]:
    """Values by key."""
    values: dict[str, object] = {}
    values["name"] = talk.optional(
        "--name", "Name of the federation, such as glioma-2026", default=talk.default("--name")
    )
    _ask_task(talk, target, values)
    sites = talk.optional(
        "--sites", "Names of the sites, separated by commas (Enter: any may come)", _read_sites
    )
    values["sites.expected"] = sites

    def enough(minimum: object) -> int:
        number: int = talk.check("--minimum", minimum)
        if sites and number > len(sites):
            raise ConfigError(f"found {number}, but only {_plural(len(sites), 'site')}; ask for fewer")
        return number

    least = talk.default("--minimum")
    values["sites.minimum"] = talk.optional(
        "--minimum",
        "Fewest sites that have to answer",
        enough,
        default=min(least, len(sites)) if sites else least,
    )
    if values["sites.minimum"] is None and sites and len(sites) < least:
        raise ConfigError(
            f"--minimum is missing: by default {least} sites have to answer, --sites names {len(sites)}"
        )
    for option, question in (
        ("--rounds", "Rounds of training of the quality-control model"),
        ("--local-steps", ""),
        ("--threshold", "Predicted quality (0 to 1) under which a label is dropped"),
        ("--segmentation-rounds", "Rounds of training of the segmentation model"),
        ("--min-count", "Fewest patients behind any number that leaves a site"),
    ):
        values[FEDERATION_OPTIONS[option]] = talk.optional(option, question, default=talk.default(option))
    return values


def _ask_task(talk: Dialogue, target: Path, values: dict[str, object]) -> Task:
    if talk.asking and not talk.is_given("--task"):
        talk.say("\nBuilt-in tasks:")
        for name in built_in_tasks():
            talk.say(f"  {name:16} {load_task(name).description}")

    def read(text: str) -> tuple[str, Task]:
        if not text.endswith(".toml"):
            return text, load_task(text)
        return _written(target, text), load_task(str(_absolute(text)))

    question = "What the data show, a built-in task or the path of a task's own .toml file"
    values["task"], task = talk.needed("--task", question, read)
    return task


def _ask_data(
    talk: Dialogue, target: Path, task: Task, values: dict[str, object]
) -> tuple[Path, frozenset[str]]:
    """The folder of the data, and the ids of the cases; no id where the folder is to be mended later."""
    while True:
        question = "Folder of the scans and labels, or a table that lists them"
        root = talk.needed("--data", question, partial(_data, target))
        folder = root if root.is_dir() else root.parent
        values["data.path"] = _written(target, root)
        values["data.layout"] = layout = talk.optional("--layout")
        try:
            listing = find_cases(root, task, layout)
        except DataError as error:
            if not talk.asking:
                raise
            talk.say(f"  {error}")
            chosen = talk.ask(_LAYOUT_QUESTION, partial(_layout, root, task))
            if chosen is None:
                if talk.confirm("Take this folder all the same, and mend it later?"):
                    return folder, frozenset()
                if talk.is_given("--data"):
                    raise
                continue
            values["data.layout"] = layout = chosen
            listing = find_cases(root, task, layout)
        patients = len({case.patient for case in listing.cases})
        found = f"{_plural(len(listing.cases), 'case')} of {_plural(patients, 'patient')}"
        talk.say(f"  found {found}, layout {listing.layout}{'' if layout else ' (detected)'}")
        return folder, frozenset(case.id for case in listing.cases)


# ------------------------------------------------------------------------------------------------- checks


def _data(target: Path, text: str | Path) -> Path:
    """The data's path, absolute. What belongs to a site may not lie among them: they are only read."""
    path = _absolute(text)
    try:
        is_there, is_folder = path.exists(), path.is_dir()
    except OSError as error:  # a folder above it is closed to this user
        raise DataError(f"{path}: cannot be reached ({error.strerror}); give this user access") from None
    if not is_there:
        raise DataError(f"{path}: there is no such folder or table")
    folder = path if is_folder else path.parent
    if _is_inside(target, folder):
        raise DataError(
            f"{target.name} would lie inside the data folder {folder}, which is only read; start again and "
            "name a file elsewhere"
        )
    return path


def _layout(root: Path, task: Task, name: str) -> str:
    find_cases(root, task, name)
    return name


def _read_list(
    talk: Dialogue,
    target: Path,
    cases: frozenset[str],
    read: Callable[[Path], Collection[str]],
    text: str | Path,
) -> str:
    """The path of a table about cases, as it is written down, after a look at what it names."""
    path = _absolute(text)
    listed = set(read(path))
    known = listed & cases
    if not listed:
        raise DataError(f"{path}: names no case; give each its row")
    if cases and not known:
        raise DataError(
            f"{path}: none of its ids, such as {min(listed)!r}, is a case; these are called such as "
            f"{min(cases)!r}"
        )
    if cases:
        strange = f", and {_plural(len(listed - cases), 'id')} of no case" if listed - cases else ""
        talk.say(f"  names {len(known)} of {_plural(len(cases), 'case')}{strange}")
    return _written(target, path)


def _yes_or_no(value: object) -> bool:
    try:
        return bool(parse_value(value, SiteConfig, "policy.segmentation"))
    except ConfigError:
        raise ConfigError(f"answer yes or no (found {value!r})") from None


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _read_sites(text: str) -> list[str]:
    names: list[str] = list(
        parse_value([name for part in text.split(",") if (name := part.strip())], SitesConfig, "expected")
    )
    return list(parse({"expected": names}, SitesConfig, source=repr(text)).expected)


# ------------------------------------------------------------------------------------------------ writing


def _check_target(target: Path) -> None:
    if os.path.lexists(target):
        raise ConfigError(_taken(target))
    folder = target.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{target}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{target}: this user may not write to {folder}; name a file elsewhere")


def _taken(target: Path) -> str:
    return f"{target}: is there already, and nothing is written over; name another file or move it away"


def _write(target: Path, template: str, model: type[FrozenModel], values: Mapping[str, object]) -> None:
    text = render(template, model, {key: value for key, value in values.items() if value is not None})
    parse(tomllib.loads(text), model, source=str(target))
    try:
        with target.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(_taken(target)) from None


def render(template: str, model: type[FrozenModel], values: Mapping[str, object]) -> str:
    """The text of a commented file.

    Args:
        template: name of the template.
        model: what the file is read as; it has the defaults of what is not among the values.
        values: by key, such as `qc.rounds`.
    """

    def key(name: str, example: object = None, show: Callable[[Any], object] | None = None) -> str:
        """One key with its value; behind a # with its default, or the example, where nobody gave a value."""
        value = values.get(name)
        if value is None:
            value = field_of(model, name).default
        if value is None:
            value = example
        line = f"{name.rpartition('.')[2]} = {to_toml(show(value) if show else value)}"
        return line if name in values else f"#{line}"

    environment = jinja2.Environment(  # noqa: S701 - TOML, not HTML
        loader=jinja2.PackageLoader("fedqc"), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template(template).render(
        key=key, duration=to_duration, tasks=built_in_tasks(), layouts=list(load_layouts())
    )


def to_toml(value: object) -> str:
    """A value as TOML on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(to_toml, value))}]"
    plain = str(value) if isinstance(value, Path) else value
    return tomli_w.dumps({"value": plain}).removeprefix("value = ").removesuffix("\n")


def to_duration(seconds: float) -> str:
    """Seconds in the largest unit that gives a whole number."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"


def _keys(target: Path) -> Path:
    """The folder for the sites' public keys, which is made."""
    folder = _absolute(target).parent / SitesConfig().keys
    folder.mkdir(exist_ok=True)
    return folder


def _absolute(text: str | Path) -> Path:
    """A path as the person at the terminal sees it; links stay, for what they point to may move."""
    path = expand(Path(text)).absolute()
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{str(path)!r}: TOML holds only names in UTF-8; rename or link it") from None
    return path.resolve() if ".." in path.parts else path


def _folder(target: Path, data: Path, text: str | Path) -> str:
    """A folder that fedqc will make, as it is written down."""
    path = _absolute(text)
    if _is_inside(path, data):
        raise ConfigError(
            f"{path}: lies inside the data folder {data}, which is only read; name a folder elsewhere"
        )
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: is a file; name a folder")
    return _written(target, path)


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _written(target: Path, text: str | Path) -> str:
    """A path as the file has it: relative inside the file's folder, absolute elsewhere."""
    path, folder = _absolute(text), _absolute(target).parent
    inside = path.relative_to(folder) if path.is_relative_to(folder) else path
    return str(path if str(inside).startswith("~") else inside)
