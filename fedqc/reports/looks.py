"""How classes look over a scan, in the review page and in pictures; without anything that draws."""

from typing import Literal

Line = Literal["solid", "dashed", "dotted"]
CONTOURS: tuple[tuple[str, Line], ...] = (
    ("#56B4E9", "solid"),
    ("#F0E442", "dashed"),
    ("#009E73", "dotted"),
    ("#CC79A7", "solid"),
    ("#0072B2", "dashed"),
    ("#FFFFFF", "dotted"),
)
"""Of the classes in turn: colours of Okabe and Ito, who made them for all eyes, light ones first, since scans
are dark; the line tells them apart without colour."""
