from typing import get_args

import pytest

from fedqc.cases.problems import CODES, MEANINGS, Code


def test_every_code_has_a_severity_and_a_meaning() -> None:
    assert list(CODES) == list(get_args(Code))
    assert set(MEANINGS) == set(CODES)


@pytest.mark.parametrize("code", CODES)
def test_a_meaning_is_part_of_a_sentence_and_its_own(code: Code) -> None:
    meaning = MEANINGS[code]
    assert meaning[0].islower()
    assert meaning[-1] not in ".;,"
    assert list(MEANINGS.values()).count(meaning) == 1
