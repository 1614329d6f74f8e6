"""What must hold of `fedqc check` whatever a data folder holds."""

import functools
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import tomli_w

from fedqc.cases.layouts import load_layouts
from fedqc.cases.problems import CODES
from fedqc.cli import main
from fedqc.config import ComputeConfig, DataConfig, SiteConfig
from fedqc.errors import FedQCError
from fedqc.site_check import SiteCheck, check_site
from fedqc.task import Task

SECONDS = 10.0
"""Longest that a case may take, in seconds of computing: on a busy machine a clock would say more."""
MEMORY = 2 * 2**30
"""Most memory in bytes that checking may take."""


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True)
class Special:
    """A folder without content, or a pipe that nobody writes to."""

    kind: str


_IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - thousands of folders, each once
_layouts = functools.cache(load_layouts)  # they do not change, and asking each time takes longer than a check

FORMS = ("plain", "json", "html")
"""Of `fedqc check`."""

Entry = bytes | Link | Special
Tree = Mapping[str, Entry]
"""By path below the folder."""
FOLDER, PIPE = Special("folder"), Special("pipe")


def holds(tree: Tree, task: Task, layout: str | None = None) -> SiteCheck | None:
    """Write a folder down, check it, and see that every promise is kept.

    Args:
        tree: the folder; what the file system refuses is left out of it.
        task: what its data show.
        layout: of the folder; None lets it be detected.

    Returns:
        What was found, or None where nothing could be checked and one sentence says so.
    """
    with planted(tree) as data:
        return holds_of(data, task, layout, data.parent / "memory")


@contextmanager
def planted(tree: Tree) -> Iterator[Path]:
    """The folder while it is there, `data` in one that holds other files, too."""
    place = Path(tempfile.mkdtemp(prefix="fedqc-fuzz-", dir=_IN_MEMORY)).resolve()
    data = place / "data"
    try:
        data.mkdir()
        (place / "outside.nii").write_bytes(b"no volume")
        (place / "elsewhere" / "sub-09" / "anat").mkdir(parents=True)
        for name in ("X_t1.nii", "X_seg.nii.gz", "sub-09/anat/sub-09_T1w.nii"):
            (place / "elsewhere" / name).symlink_to("/dev/null")
        for path, entry in tree.items():
            _write(data, data / path, entry)
        with mock.patch("fedqc.cases.layouts.load_layouts", _layouts):
            yield data
    finally:
        shutil.rmtree(place)


def command_holds(tree: Tree, task: Task, *, form: str) -> None:
    """Write a folder down and run `fedqc check` on it, plain or with `--json` or `--html`."""
    with planted(tree) as data:
        place, before = data.parent, fingerprint(data)
        settings = {
            "name": "site",
            "task": "task.toml",
            "data": {"path": "data", **{name: str(path) for name, path in _lists(data).items()}},
            "compute": {"workers": 1},
        }
        (place / "site.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
        described = task.model_dump(mode="json", exclude_defaults=True)
        (place / "task.toml").write_text(tomli_w.dumps(described), encoding="utf-8")
        arguments = {"plain": [], "json": ["--json"], "html": ["--html", str(place / "check.html")]}[form]
        printed, said = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
        command = ["fedqc", "check", str(place / "site.toml"), *arguments]
        with mock.patch("sys.argv", command), redirect_stdout(printed), redirect_stderr(said):
            try:
                main()
            except SystemExit as ended:
                code = ended.code or 0
        assert fingerprint(data) == before
        answers = [_written(stream) for stream in (printed, said)]
        assert code in {0, 1, 2}, answers
        assert not any("Traceback" in answer for answer in answers), answers
        assert all(is_sentence(line) for answer in answers for line in answer.splitlines() if line.strip())
        if form == "json" and answers[0]:
            assert json.loads(answers[0])["cases"] >= 0
        if form == "html" and (place / "check.html").exists():
            assert "</html>" in (place / "check.html").read_text(encoding="utf-8")


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode()


def holds_of(
    data: Path, task: Task, layout: str | None, memory: Path, *, once: bool = False
) -> SiteCheck | None:
    """As `holds`, for a folder that is there already; `memory` must be outside it.

    It is checked twice, the second time from memory, unless `once`.
    """
    before = fingerprint(data)
    site = SiteConfig(
        name="site",
        task=task.name,
        data=DataConfig(path=data, layout=layout, **_lists(data)),
        compute=ComputeConfig(workers=1),
    )
    check = functools.partial(check_site, site, task, memory=memory)
    reset_peak()
    used = _memory("VmRSS")
    begin = time.process_time()
    found, refusal = None, "not refused"
    try:
        found = check()
    except FedQCError as error:
        refusal = str(error)
    seconds = time.process_time() - begin
    assert seconds < SECONDS * max(1, len(found.checked.cases) if found else 1), f"{seconds:.1f} s"
    assert _memory("VmHWM") - used < MEMORY
    assert fingerprint(data) == before
    assert is_sentence(refusal), repr(refusal)
    if found is not None:
        _is_well_formed(found)
        assert once or check().as_json() == found.as_json()
    return found


def _lists(data: Path) -> dict[str, Path]:
    """The tables of references and ratings, where the folder holds them."""
    paths = {name: data / f"{name}.csv" for name in ("reference", "ratings")}
    return {name: path for name, path in paths.items() if os.path.lexists(path)}


def _is_well_formed(found: SiteCheck) -> None:
    for problem in found.problems:
        assert problem.code in CODES
        for sentence in (problem.found, problem.expected, problem.fix, str(problem)):
            assert is_sentence(sentence), repr(sentence)
    usable = {case.id for case in found.checked.usable}
    assert not any(problem.is_error and problem.case in usable for problem in found.problems)
    json.dumps(found.as_json(), allow_nan=False).encode()


def is_sentence(text: str) -> bool:
    """Whether a text is a line that any terminal, page or log can show as it is."""
    return bool(text.strip()) and text.isprintable() and len(text) < 10_000


def fingerprint(folder: Path) -> dict[bytes, tuple[int, int, int, bytes]]:
    """Of everything below a folder: type and rights, time of last change, size, and what it holds."""
    content = {}
    for parent, folders, files in os.walk(os.fsencode(folder)):
        for name in (b".", *folders, *files):
            path = os.path.join(parent, name)  # noqa: PTH118 - bytes, as any name can be
            status = os.lstat(path)
            held = b""
            if stat.S_ISLNK(status.st_mode):
                held = os.readlink(path)  # noqa: PTH115
            elif stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:  # noqa: PTH123
                    held = hashlib.file_digest(file, "sha256").digest()
            content[path] = (status.st_mode, status.st_mtime_ns, status.st_size, held)
    return content


def peak_memory() -> int:
    """Most memory in bytes that this process has taken (Linux; 0 elsewhere)."""
    return _memory("VmHWM")


def _write(data: Path, path: Path, entry: Entry) -> None:
    with suppress(OSError, ValueError):  # a name that this file system does not take, or one that is taken
        if not Path(os.path.realpath(path.parent)).is_relative_to(data):
            return  # through a link out of the folder
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(entry, Link):
            path.symlink_to(entry.target)
        elif entry == FOLDER:
            path.mkdir()
        elif entry == PIPE:
            os.mkfifo(path)
        elif isinstance(entry, bytes) and not os.path.lexists(path):
            path.write_bytes(entry)


def _memory(key: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0


def reset_peak() -> None:
    """Let `peak_memory` start again from what the process holds now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
