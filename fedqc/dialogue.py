"""Values from a person at a terminal: asked for, checked, and asked for again until they are right."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import click
import typer

from fedqc.config import FrozenModel, field_of, parse_value
from fedqc.errors import ConfigError, FedQCError

T = TypeVar("T")


class Dialogue:
    """Where values come from: an option, else an answer, else nobody says and the default holds."""

    def __init__(
        self,
        options: Mapping[str, object],
        keys: Mapping[str, str],
        model: type[FrozenModel],
        *,
        asking: bool,
    ) -> None:
        """Talk about `model`, whose `keys` the options are for."""
        self._options = {option: value for option, value in options.items() if value is not None}
        self._keys = keys
        self._model = model
        self.asking = asking
        if asking:
            _edit_lines()

    def say(self, text: str) -> None:
        """Print a line."""
        typer.echo(text)

    def is_given(self, option: str) -> bool:
        """Whether the command line has this option."""
        return option in self._options

    def default(self, option: str) -> Any:
        """What the model says of a key that is left out."""
        return field_of(self._model, self._keys[option]).default

    def check(self, option: str, value: object) -> Any:
        """Check a value by the model alone.

        Raises:
            ConfigError: with the value and what is allowed.
        """
        return parse_value(value, self._model, self._keys[option])

    def needed(self, option: str, question: str, check: Callable[[Any], T] | None = None) -> T:
        """A value that must be there: `question` is asked until `check` lets the answer pass.

        Raises:
            ConfigError: the option is wrong, or it is missing and nobody can be asked.
        """
        chosen: Callable[[Any], T] = check or partial(self.check, option)
        found = self._find(option, question, chosen, needed=True)
        if found is None:
            raise ConfigError(f"{option} is missing: {question[0].lower()}{question[1:]}")
        return found

    def optional(
        self,
        option: str,
        question: str = "",
        check: Callable[[Any], T] | None = None,
        *,
        default: object = "",
    ) -> T | None:
        """A value that may be left out; without a question nobody is asked.

        Raises:
            ConfigError: the option is wrong.
        """
        chosen: Callable[[Any], T] = check or partial(self.check, option)
        return self._find(option, question, chosen, default=default)

    def confirm(self, question: str) -> bool:
        """A yes or, by default, no."""
        with _stopping():
            return typer.confirm(question)

    def _find(
        self,
        option: str,
        question: str,
        check: Callable[[Any], T],
        *,
        default: object = "",
        needed: bool = False,
    ) -> T | None:
        if option in self._options:
            try:
                return check(self._options[option])
            except FedQCError as error:
                raise ConfigError(f"{option}: {error}") from None
        return self.ask(question, check, default=default, needed=needed) if question else None

    def ask(
        self, question: str, check: Callable[[str], T], *, default: object = "", needed: bool = False
    ) -> T | None:
        """The answer to a question, asked until `check` lets it pass; None where there is none."""
        if not self.asking:
            return None
        self.say(f"\n{question}{'' if default == '' else f' [{default}]'}")
        while True:
            with _stopping():
                # On a line of its own: typed text that wraps behind a question confuses the line editor.
                answer = typer.prompt(
                    ">", prompt_suffix=" ", default=str(default), show_default=False
                ).strip()
            if not answer and not needed:
                return None
            try:
                if answer:
                    return check(answer)
                self.say("  this is needed")
            except FedQCError as error:
                self.say(f"  {error}")


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Ctrl-C and the end of input, which end the questions."""
    try:
        yield
    except click.Abort:
        typer.echo("\nstopped; nothing is written", err=True)
        raise typer.Exit(130) from None


def _edit_lines() -> None:
    """Cursor keys, and Tab for the names of files, where Python has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: PLC0415 - it talks to the terminal as soon as it is imported

        readline.set_completer_delims("\n")
        readline.parse_and_bind("tab: complete")
