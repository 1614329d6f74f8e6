"""Where the files of each case are: how a data folder is laid out, one layout a file."""

import inspect
import itertools
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

from fedqc.cases.layouts.base import FILE_ENDINGS, CaseBuilder, CaseFiles, Layout, Listing, is_folder
from fedqc.cases.layouts.table import read_ids
from fedqc.errors import ConfigError, DataError, did_you_mean
from fedqc.task import Task

__all__ = ["CaseBuilder", "CaseFiles", "Layout", "Listing", "find_cases", "load_layouts", "read_ids"]

_MOST_BELOW = 50  # files and folders that are looked at in search of a layout


def load_layouts() -> dict[str, type[Layout]]:
    """All installed layouts by name, those of plug-ins included.

    Raises:
        ConfigError: a plug-in cannot be imported or is no layout.
    """
    layouts: dict[str, type[Layout]] = {}
    for entry in sorted(entry_points(group="fedqc.layouts"), key=lambda entry: entry.name):
        try:
            layout = entry.load()
        except Exception as error:  # a plug-in is foreign code: whatever it raises, it cannot be used
            raise ConfigError(
                f"layout {entry.name!r} ({entry.value}) cannot be loaded: {error}; "
                "repair or uninstall its package"
            ) from error
        if not (isinstance(layout, type) and issubclass(layout, Layout)):
            raise ConfigError(f"layout {entry.name!r} ({entry.value}) is no subclass of fedqc's Layout")
        if inspect.isabstract(layout):
            raise ConfigError(
                f"layout {entry.name!r} ({entry.value}) lacks "
                f"{' and '.join(sorted(layout.__abstractmethods__))}; complete its class"
            )
        layouts[entry.name] = layout
    return layouts


def find_cases(root: Path, task: Task, layout: str | None = None) -> Listing:
    """The cases under `root`, sorted by id, and what is wrong with the folder as a whole.

    Args:
        root: data folder, or a file that a layout knows (a .csv table).
        task: what the data show.
        layout: name of the layout, with an option behind a colon where it takes one (`bids:expert`); None
            finds out which one fits.

    Raises:
        DataError: the folder is missing or empty, the layout is unknown or does not fit, its list is broken.
    """
    try:
        is_empty = root.is_dir() and not any(root.iterdir())
        is_there = root.exists()
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error.strerror}); give this user access to it") from None
    if not is_there:
        what = "file" if root.suffix else "folder"
        raise DataError(f"{root}: there is no such {what}; correct the path of the data")
    if is_empty:
        raise DataError(f"{root}: the folder is empty; put the data there or correct the path")
    layouts = load_layouts()
    if layout is None:
        layout = _detect(root, layouts)
    name, colon, option = layout.partition(":")
    if name not in layouts:
        raise DataError(
            f"layout {name!r} is not known; {did_you_mean(name, layouts)}known layouts: {', '.join(layouts)}"
        )
    listing = layouts[name](option if colon else None).find(root, task)
    return replace(listing, cases=sorted(listing.cases, key=lambda case: case.id), layout=layout)


def _folders_in(root: Path) -> list[Path]:
    """The first folders in a folder, if it is one."""
    try:
        return sorted(path for path in itertools.islice(root.iterdir(), _MOST_BELOW) if is_folder(path))
    except OSError:
        return []


def _detect(root: Path, layouts: dict[str, type[Layout]]) -> str:
    fitting = [name for name, layout in layouts.items() if layout.detect(root)]
    if not fitting and root.name.endswith(FILE_ENDINGS):
        raise DataError(
            f"{root}: is a single volume; name the folder of the cases, or a table that lists them"
        )
    below = [
        f"{folder} (layout {name!r})"
        for folder in (_folders_in(root) if not fitting else [])
        for name, layout in layouts.items()
        if layout.detect(folder)
    ]
    if below:
        raise DataError(f"{root}: no layout fits, but one does a folder below; name {' or '.join(below[:3])}")
    if not fitting:
        needs = "; ".join(f"'{name}' needs {layout.needs}" for name, layout in layouts.items())
        raise DataError(f"{root}: no layout fits; {needs}")
    if len(fitting) > 1:
        raise DataError(f"{root}: the layouts {' and '.join(fitting)} both fit; name the one to use")
    return fitting[0]
