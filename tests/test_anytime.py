"""Intervals that may be looked at after every verdict, against numbers derived by hand, and when to stop."""

import math
from typing import Any

import pytest
from test_winrates import benchmark

from anytime import AnytimeInterval, Stopping
from utils import UserError

__all__ = ["benchmark"]


def test_before_any_score_the_anytime_interval_is_everything() -> None:
    anytime = AnytimeInterval()
    assert (anytime.n, anytime.interval, anytime.excludes_half) == (0, (0.0, 1.0), False)
    assert not anytime.narrower_than(1.0)


def test_wealth_by_hand() -> None:
    """Bets come in pairs b and -b. Against 1/2, a win makes 1 + b/2 of them: together 1. Two wins make (1 + b/2)^2, 1 +
    mean b^2 / 4; b^2 runs from 0.01 in equal ratios r = (99.8001)^(1/7) to 0.998001.
    """
    anytime = AnytimeInterval()
    anytime.add(1)
    assert anytime.log_wealth(0.5) == pytest.approx(0)
    anytime.add(1)
    r = 99.8001 ** (1 / 7)
    mean = 0.01 * (r**8 - 1) / (r - 1) / 8
    assert anytime.log_wealth(0.5) == pytest.approx(math.log(1 + mean / 4))


def test_anytime_bounds_are_where_wealth_is_20() -> None:
    anytime = AnytimeInterval()
    for value in [1, 1, 0.5, 0, 1, 0.25] * 40:
        anytime.add(value)
    low, high = anytime.interval
    assert low < anytime.win_rate < high and anytime.win_rate == pytest.approx(0.625)
    assert [anytime.log_wealth(bound) for bound in (low, high)] == pytest.approx([math.log(20)] * 2, abs=1e-4)
    assert anytime.excludes_half == (low > 0.5)
    assert anytime.narrower_than(high - low + 0.01) and not anytime.narrower_than(high - low - 0.01)


def test_anytime_interval_does_not_depend_on_the_order() -> None:
    forwards, backwards = AnytimeInterval(), AnytimeInterval()
    values = [1, 0, 0, 0.5, 1, 1, 1]
    for ours, theirs in zip(values, reversed(values), strict=True):
        forwards.add(ours)
        backwards.add(theirs)
    assert forwards.interval == pytest.approx(backwards.interval)


def test_anytime_interval_tells_wins_from_chance() -> None:
    """n wins make at most (3/2)^n: 7 do not make 20. The largest bet alone, a sixteenth of the stake, makes 20 with
    1.4995^15 / 16 = 27.3.
    """
    anytime = AnytimeInterval()
    while not anytime.excludes_half:
        anytime.add(1)
    assert 8 <= anytime.n <= 15 and anytime.interval[0] > 0.5


def test_looking_all_the_time_holds_the_truth(benchmark: Any) -> None:
    for rate, ties in ((0.5, 0.0), (0.6, 0.5), (0.95, 0.0)):
        held, _, _ = benchmark.sequential(rate, ties, 1000, steps=300)
        assert held >= 0.95
    _, told, median = benchmark.sequential(0.8, 0.0, 500, steps=200)
    assert told > 0.99 and median < 40


def test_a_prompt_is_one_score_and_ends_with_its_last_comparison() -> None:
    """a: (1 + 0) / 2; b: not read, no score; c: 1, of the one that was read."""
    stopping = Stopping(["a", "a", "b", "c", "c"], 0.05)
    for place, score in enumerate([1.0, 0.0, None, None, 1.0]):
        stopping.add(place, score)
    assert stopping.anytime.counts == {0.5: 1, 1.0: 1} and stopping.facts()["stopped"] == "all were judged"
    assert stopping.facts()["win_rate"] == 0.75


def test_it_stops_where_half_is_excluded_or_the_interval_is_narrow() -> None:
    """Ties do not scatter: with them alone the interval closes in on 50%, and never excludes it."""
    won, tied = Stopping(range(1000), 0.05), Stopping(range(1000), 0.2)
    for stopping, score in ((won, 1.0), (tied, 0.5)):
        place = 0
        while not stopping.why:
            stopping.add(place, score)
            place += 1
        assert place < 200
    assert won.why == "the interval excludes 50%" and won.p_value <= 0.05
    assert tied.why == "the interval is narrower than 0.2" and tied.p_value == 1.0
    low, high = tied.anytime.interval
    assert high - low < 0.2


def test_the_p_value_is_the_least_inverse_wealth() -> None:
    stopping, wealth = Stopping(range(40), 0.0), []
    for place, score in enumerate([1, 1, 1, 1, 1, 0, 0, 0, 0, 0] * 4):
        stopping.add(place, score)
        wealth.append(math.exp(stopping.anytime.log_wealth(0.5)))
    assert stopping.p_value == pytest.approx(1 / max(wealth)) and max(wealth) > wealth[-1]


def test_of_very_many_even_verdicts_the_p_value_is_1() -> None:
    """Each pair of a win and a loss costs the smallest bets 0.0025 of their log-wealth: a million makes e^-2500."""
    stopping = Stopping("a", 0.0)
    stopping.anytime.counts.update({0.0: 10**6, 1.0: 10**6})
    stopping.add(0, 1.0)
    assert stopping.p_value == 1.0


@pytest.mark.parametrize("width", [-0.1, 1.0, 5.0, math.nan])
def test_a_width_that_cannot_be_is_refused(width: float) -> None:
    with pytest.raises(UserError, match="--until_width: got"):
        Stopping("ab", width)
