from pathlib import Path

import pytest

from fedqc.errors import DataError
from fedqc.ratings import Rating, rating_problems, read_ratings

HEADER = "id,rater,view,stars\n"


def table(folder: Path, text: str, name: str = "ratings.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_ratings_keep_their_order_and_fractions(tmp_path: Path) -> None:
    path = table(tmp_path, HEADER + "b,anna,all,4.5\na, ben ,axial,1\nb,anna,all,6\n")
    assert read_ratings(path) == [
        Rating("b", "anna", "all", 4.5),
        Rating("a", "ben", "axial", 1.0),
        Rating("b", "anna", "all", 6.0),
    ]


def test_tabs_and_further_columns(tmp_path: Path) -> None:
    text = "rater\tid\tstars\tview\tremark\nanna\ta\t3\tcoronal\tblurred\n"
    assert read_ratings(table(tmp_path, text, "ratings.tsv")) == [Rating("a", "anna", "coronal", 3.0)]


def test_a_comma_as_decimal_sign(tmp_path: Path) -> None:
    text = "id;rater;view;stars\na;anna;all;4,5\n"
    assert read_ratings(table(tmp_path, text)) == [Rating("a", "anna", "all", 4.5)]


@pytest.mark.parametrize("stars", ["0.99", "6.01", "-1", "nan", "inf", "good", "4,5,", "1e3"])
def test_what_is_no_rating(tmp_path: Path, stars: str) -> None:
    path = table(tmp_path, HEADER + f'a,anna,all,5\n\na,anna,all,"{stars}"\n')
    with pytest.raises(DataError) as caught:
        read_ratings(path)
    assert str(caught.value) == (
        f"{path}: line 4: stars is {stars!r}, expected a number from 1 to 6, such as 4 or 4.5; correct it"
    )


def test_unknown_view(tmp_path: Path) -> None:
    path = table(tmp_path, HEADER + "a,anna,Axial,5\n")
    with pytest.raises(DataError) as caught:
        read_ratings(path)
    assert str(caught.value) == (
        f"{path}: line 2: view is 'Axial', expected axial, coronal, sagittal or all; correct it"
    )


@pytest.mark.parametrize("column", ["id", "rater", "view", "stars"])
def test_empty_cell(tmp_path: Path, column: str) -> None:
    cells = {"id": "a", "rater": "anna", "view": "all", "stars": "5"} | {column: " "}
    path = table(tmp_path, HEADER + ",".join(cells.values()) + "\n")
    with pytest.raises(
        DataError, match=f"line 2: {column} is empty; give each rating id, rater, view, stars"
    ):
        read_ratings(path)


def test_missing_column_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column view is missing"):
        read_ratings(table(tmp_path, "id,rater,stars\na,anna,5\n"))
    with pytest.raises(DataError, match=r"nowhere\.csv: there is no such file"):
        read_ratings(tmp_path / "nowhere.csv")


def test_one_problem_for_each_unknown_id() -> None:
    ratings = [Rating(case, "anna", "all", 3.0) for case in ("a", "x", "x", "y")]
    path = Path("ratings.csv")
    problems = rating_problems(ratings, {"a", "b"}, path)
    assert [(one.code, one.severity, one.case, one.file) for one in problems] == [
        ("unknown-rating", "warning", None, path)
    ] * 2
    assert str(problems[0]) == (
        "ratings.csv: found 2 ratings of 'x', which is no case, expected the id of a case; "
        "correct the id, or remove its rows"
    )
    assert problems[1].found == "1 rating of 'y', which is no case"
    assert rating_problems(ratings[:1], ["a"], path) == []
