"""What is probably wrong with a label, and what would mend it; `fedqc.curation.diagnosing` finds it."""

from enum import StrEnum

from pydantic import Field

from fedqc.config import FrozenModel, Share


class Kind(StrEnum):
    """What can be wrong with a label."""

    MISSED = "missed-component"
    FLIP = "flip"
    SWAPPED = "swapped-classes"
    UNDER = "under-contouring"
    OVER = "over-contouring"
    SLICES = "slices-left-out"
    SHIFT = "shift"
    INVENTED = "invented-component"
    ANOTHER = "another-patient"
    """Or an earlier scan's: all that no other kind explains."""
    UNCLEAR = "unclear"
    """The label hardly differs from the corrected one, or the method does not tell."""


class Repair(FrozenModel):
    """What would undo an error; nobody has done it."""

    how: str = Field(min_length=1)
    """In words, such as "flip it left to right"."""
    quality: Share
    """Predicted for the label after that."""


class Diagnosis(FrozenModel):
    """What is probably wrong with a label."""

    kind: Kind
    found: str = Field(min_length=1)
    """In words."""
    explains: Share
    """Share of the difference from the corrected label that the error explains, as a DSC."""
    repair: Repair | None = None

    @property
    def sentence(self) -> str:
        """What a person is told."""
        if self.repair is None:
            return f"Probably: {self.found}"
        mended = f"to mend it, {self.repair.how}; the predicted DSC would then be {self.repair.quality:.2f}"
        return f"Probably: {self.found}; {mended}"
