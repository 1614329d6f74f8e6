"""Two folds of patients, so that networks that learn from candidates never judge what they learned.

A network that learned from a label agrees with it. Whatever is trained on candidates is therefore trained
twice, each time without one fold of the patients, and a case is judged by what never saw its patient. A
patient's fold follows from the id alone: every site, every run and every later scoring deals alike.
"""

from fedqc.seeding import derive_seed

FOLDS = (0, 1)


def fold_of(patient: str) -> int:
    """The fold of a patient, whose cases networks of stages with this `fold` have not learned from."""
    return derive_seed(0, "cross-fitting", patient) % len(FOLDS)


def is_for_fitting(patient: str) -> bool:
    """Whether a patient's references are kept to fit something to networks' scores on: one in four."""
    return derive_seed(0, "fitting", patient) % 4 == 0


def folds_that_may_judge(patient: str) -> tuple[int, ...]:
    """The folds whose networks may judge a patient's cases: all where nobody says whose case it is."""
    return (fold_of(patient),) if patient else FOLDS
