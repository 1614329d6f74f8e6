"""Every error a user can meet.

    FedQCError
    ├── ConfigError      a TOML file, a task or a command-line option is wrong
    ├── DataError        a folder, a file or a case is wrong
    ├── ModelError       a stored model cannot be read or does not fit the task
    ├── TrainingError    training cannot go on (a loss that is not finite, no sample to draw)
    ├── DeviceError      the GPU has too little memory, even for the smallest share of the work
    └── RunError         a federated run failed
        ├── QuorumError      fewer sites than the federation needs
        └── ProtocolError    a message is not what the protocol says

The command line prints the message and nothing else, so a message names the file or the case, says what was
found and what was expected, and how to mend it.
"""

import difflib
from collections.abc import Iterable

_LONGEST = 2000
"""Characters of a text that names what was found in a file: whatever lies there may end up in a message."""


class FedQCError(Exception):
    """Base of all errors that fedqc raises on purpose; its message is one printable line."""

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


def printable(text: str) -> str:
    """A text as one line that every terminal, page and log can show, whatever names of files it holds.

    Control characters, line breaks, invisible ones and bytes that are no text become escapes;
    the middle of a very long text is left out.
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the one of `known` that was probably meant; empty where none is near."""
    near = difflib.get_close_matches(name.casefold(), known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


class ConfigError(FedQCError):
    """A TOML file, a task or a command-line option is wrong."""


class DataError(FedQCError):
    """A folder, a file or a case is wrong."""


class ModelError(FedQCError):
    """A stored model cannot be read or does not fit the task."""


class TrainingError(FedQCError):
    """Training cannot go on."""

    exit_code = 3


class DeviceError(FedQCError):
    """The GPU has too little memory, even for the smallest share of the work."""

    exit_code = 3


class RunError(FedQCError):
    """A federated run failed."""

    exit_code = 3


class QuorumError(RunError):
    """Fewer sites than the federation needs."""


class ProtocolError(RunError):
    """A message is not what the protocol says."""
