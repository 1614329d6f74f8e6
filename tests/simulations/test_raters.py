import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from fedqc_simulations.raters import (
    VIEWS,
    Panel,
    Rater,
    draw_raters,
    rate,
    stars_of,
    view_qualities,
    write_ratings,
)

from fedqc.metrics.agreement import limits_of_agreement
from fedqc.metrics.raters import rater_agreement
from fedqc.ratings import Rating, View, read_ratings
from fedqc.seeding import generator

FAR_FROM_THE_ENDS = (0.45, 0.8)
"""Qualities of 2.25 to 4.4 stars: errors of these tests are not cut off at 1 or 6 stars."""


def qualities(n: int, seed: int = 0, views: tuple[View, ...] = VIEWS) -> dict[str, dict[View, float]]:
    rng = generator(seed, "qualities")
    return {
        f"case-{number:04d}": {view: float(rng.uniform(*FAR_FROM_THE_ENDS)) for view in views}
        for number in range(n)
    }


def of(ratings: list[Rating], rater: Rater) -> list[Rating]:
    return [rating for rating in ratings if rating.rater == rater.name]


def fair(name: str, sigma: float, bias: float = 0, **view_bias: float) -> Rater:
    return Rater(name, bias, {view: view_bias.get(view, 0.0) for view in VIEWS}, sigma)


def test_stars_rise_with_quality() -> None:
    stars = [stars_of(quality) for quality in np.linspace(0, 1, 101)]
    assert stars[0] == 1
    assert stars[-1] == 6
    assert (np.diff(stars) > 0).all()
    assert stars_of(0.5) == pytest.approx(2.5)


@pytest.mark.parametrize("sigma", [0.2, 0.5])
def test_the_spread_of_one_rater_is_found_again(sigma: float) -> None:
    rater = fair("anna", sigma, bias=0.3, axial=-0.2)
    ratings = rate(generator(1), qualities(500), [rater], again=1, step=0)
    intra = rater_agreement(ratings).intra
    assert (intra.n_pairs, intra.n_cases) == (2000, 500)
    # Bias does not count; two errors differ by sqrt(2) of one.
    assert intra.sd == pytest.approx(sigma * math.sqrt(2), rel=0.04)
    assert intra.mean_absolute == pytest.approx(2 * sigma / math.sqrt(math.pi), rel=0.04)
    assert intra.repeatability == pytest.approx(1.96 * math.sqrt(2) * sigma, rel=0.04)
    (deserved,) = {np.var([stars_of(q) for views in qualities(500).values() for q in views.values()])}
    assert intra.icc_1 == pytest.approx(deserved / (deserved + sigma**2), abs=0.03)


@pytest.mark.parametrize("step", [0.5, 1.0])
def test_rounding_adds_the_error_that_it_must(step: float) -> None:
    ratings = rate(generator(1), qualities(800), [fair("anna", 0.5)], again=1, step=step)
    assert {rating.stars % step for rating in ratings} == {0}
    assert rater_agreement(ratings).intra.sd == pytest.approx(
        math.sqrt(2 * (0.5**2 + step**2 / 12)), rel=0.04
    )


def test_disagreement_of_raters_follows_from_bias_and_spread() -> None:
    anna = fair("anna", 0.2, bias=0.3, axial=0.3)
    ben = fair("ben", 0.4, bias=-0.2, axial=-0.1)
    ratings = rate(generator(2), qualities(800), [anna, ben], again=0.3, step=0)
    disagreement: dict[View, float] = {"axial": 0.9, "coronal": 0.5}
    for view, apart in disagreement.items():
        seen = [rating for rating in ratings if rating.view == view]
        found = rater_agreement(seen)
        assert found.inter.n_pairs == 800
        assert found.inter.sd == pytest.approx(math.sqrt(apart**2 + 0.2**2 + 0.4**2), rel=0.04)
        # Bland and Altman tell bias from spread.
        limits = limits_of_agreement(
            *([rating.stars for rating in of(seen, rater)][:800] for rater in (anna, ben))
        )
        assert limits is not None
        assert limits.bias == pytest.approx(apart, abs=0.05)
        assert limits.sd == pytest.approx(math.hypot(0.2, 0.4), rel=0.07)
        # What lies between cases, of all that there is: the raters' difference is theirs, half of it each.
        deserved = np.var([stars_of(views[view]) for views in qualities(800).values()])
        noise = (0.2**2 + 0.4**2) / 2 + apart**2 / 2
        assert found.icc_2 == pytest.approx(deserved / (deserved + noise), abs=0.04)


def test_raters_are_as_different_as_the_panel_says() -> None:
    panel = Panel(bias=0.5, view_bias=0.1, sigma=(0.2, 0.3))
    raters = draw_raters(generator(0), 2000, panel)
    assert len({rater.name for rater in raters}) == 2000
    assert np.std([rater.bias for rater in raters]) == pytest.approx(0.5, rel=0.06)
    assert np.std([rater.view_bias["coronal"] for rater in raters]) == pytest.approx(0.1, rel=0.06)
    sigmas = [rater.sigma for rater in raters]
    assert 0.2 <= min(sigmas) < 0.21
    assert 0.29 < max(sigmas) <= 0.3
    assert raters[:3] == draw_raters(generator(0), 3, panel)


def test_who_rates_what_and_how_often() -> None:
    raters = draw_raters(generator(0), 3)
    labels = qualities(200, views=("axial", "all"))
    ratings = rate(generator(1), labels, raters)
    first, again = ratings[:1200], ratings[1200:]
    assert len({(one.case, one.rater, one.view) for one in first}) == 1200
    assert {one.view for one in first} == {"axial", "all"}
    assert len({(one.case, one.rater, one.view) for one in again}) == len(again)
    assert len(again) / 1200 == pytest.approx(0.2, abs=0.04)
    assert all(1 <= one.stars <= 6 and one.stars * 2 == int(one.stars * 2) for one in ratings)
    assert ratings == rate(generator(1), labels, raters)
    assert ratings != rate(generator(2), labels, raters)
    assert rate(generator(1), labels, raters, again=0) == first


def test_stars_stay_on_the_scale() -> None:
    ends: dict[str, dict[View, float]] = {"bad": {"all": 0.0}, "good": {"all": 1.0}}
    ratings = rate(generator(0), ends, [fair("anna", 0, bias=-0.8), fair("ben", 0, bias=0.8)], again=0)
    assert [(one.case, one.stars) for one in ratings] == [("bad", 1), ("bad", 2), ("good", 5), ("good", 6)]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    for step in (0.5, 1):
        ratings = rate(generator(0), qualities(5), draw_raters(generator(0), 2), step=step)
        write_ratings(tmp_path / "ratings.csv", ratings)
        assert read_ratings(tmp_path / "ratings.csv") == ratings
    assert (tmp_path / "ratings.csv").read_text().splitlines()[0] == "id,rater,view,stars"
    unrounded = rate(generator(0), qualities(5), [fair("anna", 0.3)], step=0)
    write_ratings(tmp_path / "ratings.csv", unrounded)
    again = read_ratings(tmp_path / "ratings.csv")
    assert [one.stars for one in again] == pytest.approx([one.stars for one in unrounded], rel=1e-5)
    assert dataclasses.replace(again[0], stars=0) == dataclasses.replace(unrounded[0], stars=0)


def test_quality_of_a_view_is_that_of_its_slice() -> None:
    reference = np.zeros((8, 10, 12), dtype=np.uint8)
    reference[2:6, 2:8, 3:9] = 1
    reference[3:5, 3:7, 5] = 2  # the largest slices are 2, 2 and 3: the first of equals
    label = reference.copy()
    label[2, 2:8, 3:9] = 0  # the whole sagittal slice is missing
    regions = ((1, 2),)
    found = view_qualities(label, reference, regions)
    assert found["sagittal"] == 0
    assert found["axial"] == pytest.approx(2 * 18 / (18 + 24))
    assert found["coronal"] == pytest.approx(2 * 18 / (18 + 24))
    assert found["all"] == pytest.approx(2 * 108 / (108 + 144))
    assert view_qualities(reference, reference, ((1, 2), (2,))) == dict.fromkeys(VIEWS, 1.0)
