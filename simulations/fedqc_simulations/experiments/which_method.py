"""Put the table of `fedqc reproduce methods` into the page on which method to choose.

    python -m fedqc_simulations.experiments.which_method TABLE.json docs/how-to/choose.md

TABLE.json is what the reproduction wrote. What lies between the two marks in the page is replaced: one line a
method, the figures of both consortia side by side, the one that finds most failures first.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedqc.errors import ConfigError
from fedqc.files import replacing
from fedqc_simulations.experiments.base import Table
from fedqc_simulations.experiments.methods import NOISES

BEGIN, END = "<!-- begin of the table -->", "<!-- end of the table -->"
COLUMNS = (
    "Method",
    "Learns from",
    "AUROC, scattered errors",
    "AUROC, habits",
    "MAE, scattered",
    "MAE, habits",
    "MB a site",
    "Seconds a case",
)

Line = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the table and rewrite the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="table.json of fedqc reproduce methods")
    parser.add_argument("page", type=Path, help="a Markdown file with both marks")
    options = parser.parse_args(arguments)
    try:
        page = options.page.read_text(encoding="utf-8")
        text = joined([Table(**table) for table in json.loads(options.table.read_bytes())["tables"]])
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        parser.error(f"{error}; name the table.json of fedqc reproduce methods, and a page")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        parser.error(f"{options.page}: expected one {BEGIN} and one {END}; write them where the table goes")
    begin, _, rest = page.partition(BEGIN)
    end = rest.partition(END)[2]
    with replacing(options.page) as aside:
        aside.write_text(f"{begin}{BEGIN}\n{text}\n{END}{end}", encoding="utf-8")


def joined(tables: Sequence[Table]) -> str:
    """The tables of both consortia as one, with what they have in common below.

    Raises:
        ConfigError: these are not the tables of `fedqc_simulations.experiments.methods`.
    """
    if len(tables) != len(NOISES) or any("AUROC (95 %)" not in table.columns for table in tables):
        raise ConfigError("these are not the tables of all methods")
    scattered, habits = (
        {str(row[0]): dict(zip(table.columns, row, strict=True)) for row in table.rows} for table in tables
    )
    order = sorted(scattered, key=lambda name: -min(_first(habits[name]), _first(scattered[name])))
    lines = [_line(name, scattered[name], habits[name]) for name in order]
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    counts = [table.notes[0].split(". ")[0] for table in tables]
    return f"{head}{body}\nScattered errors: {counts[0]}. Habits: {counts[1]}."


def _line(name: str, scattered: Line, habits: Line) -> tuple[str, ...]:
    moved = scattered["MB a round"]
    return (
        name,
        str(scattered["learns from"]),
        str(scattered["AUROC (95 %)"]),
        str(habits["AUROC (95 %)"]),
        str(scattered["MAE (95 %)"]),
        str(habits["MAE (95 %)"]),
        "0" if moved is None else f"{float(moved) * scattered['rounds']:.0f}",
        str(scattered["s a case"]),
    )


def _first(line: Line) -> float:
    """The AUROC without its interval; what has none comes last."""
    found = re.match(r"[\d.]+", str(line["AUROC (95 %)"]))
    return float(found[0]) if found else 0.0


if __name__ == "__main__":
    main()
