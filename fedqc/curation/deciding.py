"""What becomes of a site's candidates: the federation's rule, as far as it may be applied there."""

from collections.abc import Mapping

from fedqc.config import CurationConfig
from fedqc.curation.calibration import Calibration
from fedqc.curation.guards import limited
from fedqc.curation.manifest import UsedRule
from fedqc.curation.rules import Decision, Outcome, make_rule, needs_calibration
from fedqc.curation.self_test import SelfTest
from fedqc.errors import DataError


def decide(
    quality: Mapping[str, float],
    config: CurationConfig,
    test: SelfTest | None = None,
    pooled: Calibration | None = None,
) -> tuple[UsedRule, dict[str, Decision]]:
    """Decide about the candidates of a site; all are kept where nothing there may be decided.

    That is where the model failed its self-test, and where a rule rests on labels of known quality of which
    neither the federation nor the site has enough. A site without any to test the model on takes the rule as
    it is.

    Args:
        quality: predicted quality of each candidate, by its id.
        config: of the federation.
        test: what the model said of the site's own labels of known quality, if there are any.
        pooled: what all sites counted, where a rule needs it.

    Returns:
        The rule as it was used, and the decisions by the candidate's id.

    Raises:
        DataError: a quality is not a number in [0, 1].
    """
    suspended = test.failed(config) if test else None
    if suspended is None:
        own = test.calibration(config.threshold) if test else None
        grounds: list[Calibration | None] = [None]
        if needs_calibration(config):
            grounds = [one for one in ((pooled, own) if config.pooled else (own,)) if one]
            suspended = f"rule {config.rule}: there are no labels of known quality"
        for calibration in grounds:
            try:
                rule = make_rule(config, calibration)
            except DataError as error:
                suspended = str(error)
            else:
                decisions = limited(rule.decide(quality), quality, config.most_dropped)
                return UsedRule(config=config, calibration=calibration), decisions
    kept = Decision(Outcome.KEEP, f"not curated: {suspended}")
    return UsedRule(config=config, suspended=suspended), dict.fromkeys(quality, kept)
