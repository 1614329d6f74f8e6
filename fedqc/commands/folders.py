"""What `fedqc train` and `fedqc score` do with folders: read the cases of one, write to another."""

from pathlib import Path
from typing import TYPE_CHECKING

from fedqc.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fedqc.config import SiteConfig
    from fedqc.display import Display
    from fedqc.site_check import SiteCheck
    from fedqc.task import Task

PROBLEMS_SHOWN = 10
"""So many a command says one by one."""


def new_folder(out: Path, data: Path) -> Path:
    """The absolute path of a folder for results.

    Raises:
        ConfigError: it lies among the data, or holds something already.
    """
    refuse_inside(out, data)
    refuse_full(out)
    return out.resolve()


def refuse_full(out: Path) -> None:
    """Refuse a folder for results that holds something already.

    Raises:
        ConfigError: it does, or it is no folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out}: is not an empty folder; nothing is written over, name a new one")


def refuse_inside(path: Path, data: Path) -> None:
    """Refuse a place inside the data folder.

    Raises:
        ConfigError: it lies there.
    """
    if path.resolve().is_relative_to(data.resolve()):
        raise ConfigError(
            f"{path}: lies inside the data folder {data}, which is only read; name another folder"
        )


def checked_cases(
    site: "SiteConfig", task: "Task", *, memory: Path | None, display: "Display"
) -> "SiteCheck":
    """Check cases as `fedqc check` does, and say which are left out and why.

    Args:
        site: names the data, and the table of references where there is one.
        task: what the data show.
        memory: folder that remembers checked cases until a file changes; None remembers nothing.
        display: told how it goes.

    Raises:
        DataError: the data or the table cannot be read, or no case can be used.
    """
    from fedqc.site_check import check_site

    found = check_site(
        site,
        task,
        memory=memory,
        progress=lambda done, total: display.progress("checking the cases", done, total),
    )
    usable = {case.id for case in found.checked.usable}
    shown = [one for one in found.problems if one.is_error or one.code == "unknown-reference"]
    for problem in shown[:PROBLEMS_SHOWN]:
        display.say(f"left out: {problem}")
    if len(shown) > PROBLEMS_SHOWN:
        display.say(f"left out: {len(shown) - PROBLEMS_SHOWN} more, which `fedqc check` shows")
    warned = {one.case for one in found.problems if not one.is_error} & usable
    if warned:
        display.say(f"cases with warnings, which `fedqc check` shows: {len(warned)}")
    if not usable:
        first = next(problem for problem in found.problems if problem.is_error)
        raise DataError(
            f"{site.data.path}: none of {len(found.checked.cases)} cases can be used for task {task.name!r}; "
            f"the first problem: {first}"
        )
    return found


def user_name() -> str:
    """Who runs this.

    Raises:
        ConfigError: the system does not know.
    """
    from getpass import getuser

    try:
        return getuser()
    except (KeyError, OSError):
        raise ConfigError("--by is missing, and this system does not know the user's name; give it") from None
