import pytest

from fedqc.errors import DataError, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("scans/Müller 01.nii.gz: 日本", "scans/Müller 01.nii.gz: 日本"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("right\u202eto left\u2028line", r"right\u202eto left\u2028line"),
        ("no text \udcff", r"no text \udcff"),
        (r"C:\scans", r"C:\scans"),
    ],
)
def test_text_is_shown_on_one_line(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown
    assert str(DataError(text)) == shown


def test_the_middle_of_a_very_long_text_is_left_out() -> None:
    shown = printable("a" * 5000 + "b" * 5000)
    assert len(shown) < 2100
    assert shown.startswith("aaa")
    assert " ... " in shown
    assert shown.endswith("bbb")
