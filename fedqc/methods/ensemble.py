"""Agreement of a label with the federation's segmenters: their last snapshots, each with MC-dropout passes.

The mean pairwise DSC between a label and the predictions of an ensemble found failures better than any
regression of quality in the benchmark of Zenk et al. (2024), on all of its sets. In a federation the ensemble
costs little more than one segmenter. But segmenters learn from the labels that are to be judged. Errors that
are rare and scattered they do not learn, and no segmenter judges a patient that it learned from. An error
that is made everywhere, such as one site's habit or a protocol that all misread, they learn and agree with:
the quality of such labels comes out too high.
"""

from fedqc.methods.expected_dice import ExpectedDiceMethod

SNAPSHOTS = 3
"""Segmenters of each fold where the configuration does not say."""


class EnsembleMethod(ExpectedDiceMethod):
    """As `expected-dice`, with several segmenters of each fold, among which the passes are divided."""

    name = "ensemble"

    @property
    def snapshots(self) -> int:
        """Segmenters of each fold."""
        chosen = self.config.segmenter.snapshots
        return SNAPSHOTS if chosen is None else chosen
