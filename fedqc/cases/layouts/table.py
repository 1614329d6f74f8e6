"""Layout `csv`: a table of paths. Also the reader of every table that a site writes."""

import csv
import itertools
from pathlib import Path

from fedqc.cases.layouts.base import CaseBuilder, CaseFiles, Layout, Listing, check_length, is_file, is_folder
from fedqc.errors import DataError
from fedqc.task import Task

MAX_ROWS = 100_000
_LONGEST_HEADER = 2**16  # characters
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_ENDINGS = (".csv", ".tsv")


class TableLayout(Layout):
    """A table with the columns `id`, one for each modality of the task, `label`, and optionally `patient`.

    The folder holds it as `cases.csv` or `cases.tsv`, or the data path is the table itself. Paths are
    relative to it. A case without a patient is a patient of its own. Any further column, such as `scanner`,
    is a group of cases.
    """

    name = "csv"
    needs = "a cases.csv or cases.tsv"

    @staticmethod
    def detect(root: Path) -> bool:
        """Whether `root` is a .csv or .tsv file or holds `cases.csv` or `cases.tsv`."""
        return is_file(_table(root))

    def find(self, root: Path, task: Task) -> Listing:
        """List the cases of the table; an empty cell is a file that is not there."""
        path = _table(root)
        if path.parent == root and is_file(root / "cases.csv") and is_file(root / "cases.tsv"):
            raise DataError(f"{root}: holds cases.csv and cases.tsv; remove one, or name the one to use")
        columns = ("id", *task.modalities, "label")
        rows = read_table(path, columns, optional=("patient",))
        if not rows:
            raise DataError(f"{path}: the table has no row; give each case a row")
        return Listing(cases=[self._case(path, line, row, task) for line, row in rows])

    @staticmethod
    def _case(path: Path, line: int, row: dict[str, str], task: Task) -> CaseFiles:
        case = CaseBuilder(row["id"], path.parent, f"{path}: line {line}")
        paths = {"id", "patient", "label", *task.modalities}
        return case.build(
            [case.path(row[name]) if row[name] else None for name in task.modalities],
            case.path(row["label"]) if row["label"] else None,
            patient=row.get("patient"),
            groups={name: cell for name, cell in row.items() if name and cell and name not in paths},
        )


def read_ids(path: Path) -> frozenset[str]:
    """The case ids in column `id` of a table, such as the reference cases of a site.

    Raises:
        DataError: there is no such file or no such column.
    """
    return frozenset(row["id"] for _, row in read_table(path, ("id",)) if row["id"])


def read_table(
    path: Path, columns: tuple[str, ...], optional: tuple[str, ...] = ()
) -> list[tuple[int, dict[str, str]]]:
    """Line number and cells, stripped, of each row that is not blank.

    Cells are separated by commas, semicolons (as Excel writes a CSV where the comma is the decimal sign) or
    tabs, whichever makes most of the columns out of the first line.

    Raises:
        DataError: there is no such file, a column is missing, or a row has another number of cells.
    """
    if not is_file(path):
        raise DataError(f"{path}: there is no such file; make a table with the columns {', '.join(columns)}")
    check_length(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            separator = _separator(path, file.readline(_LONGEST_HEADER), (*columns, *optional))
            file.seek(0)
            reader = csv.reader(file, delimiter=separator, strict=True)
            header = [name.strip() for name in next(reader, [])]
            lines = ((reader.line_num, [cell.strip() for cell in row]) for row in reader)
            rows = list(itertools.islice((line for line in lines if any(line[1])), MAX_ROWS + 1))
    except UnicodeDecodeError:
        raise DataError(
            f"{path}: is no text in UTF-8, so its letters cannot be told; save it again, in Excel as "
            "'CSV UTF-8'"
        ) from None
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table ({error}); save it as CSV in UTF-8") from None
    _check_header(path, header, columns, optional, separator)
    if len(rows) > MAX_ROWS:
        raise DataError(f"{path}: has more than {MAX_ROWS} rows; split the data into several folders")
    for line, cells in rows:
        if len(cells) != len(header):
            raise DataError(
                f"{path}: line {line} has {len(cells)} cells, the header {len(header)}; "
                "give each row one cell a column"
            )
    return [(line, dict(zip(header, cells, strict=True))) for line, cells in rows]


def _table(root: Path) -> Path:
    if root.suffix.lower() in _ENDINGS and not is_folder(root):
        return root
    csv_file, tsv_file = root / "cases.csv", root / "cases.tsv"
    return tsv_file if is_file(tsv_file) and not is_file(csv_file) else csv_file


def _separator(path: Path, first_line: str, columns: tuple[str, ...]) -> str:
    """What makes most of the columns out of the first line; if nothing does, what the ending says."""
    known = {name.casefold() for name in columns}
    of_ending = "\t" if path.suffix.lower() == ".tsv" else ","

    def n_known(separator: str) -> int:
        names = next(csv.reader([first_line], delimiter=separator), [])
        return sum(name.strip().casefold() in known for name in names)

    return max((of_ending, *_SEPARATORS), key=n_known)


def _check_header(
    path: Path, header: list[str], columns: tuple[str, ...], optional: tuple[str, ...], separator: str
) -> None:
    """All columns must be there; other ones may be, but none that was meant to be one of them."""
    known = {name.casefold(): name for name in (*columns, *optional)}
    for name in header:
        meant = known.get(name.casefold())
        if meant is not None and name not in (*columns, *optional):
            raise DataError(f"{path}: found a column {name!r}, expected {meant!r}; rename or remove it")
        if name and header.count(name) > 1:
            raise DataError(f"{path}: column {name!r} occurs {header.count(name)} times; leave one of them")
    missing = [name for name in columns if name not in header]
    if missing:
        raise DataError(
            f"{path}: column {', '.join(missing)} is missing; found {', '.join(header) or 'no header'}, "
            f"expected {', '.join(columns)}, separated by {_SEPARATORS[separator]}"
        )
