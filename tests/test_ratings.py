"""Win rates at equal lengths and ratings: numbers derived by hand, and a smaller run of benchmarks/coverage.py."""

import math
from typing import Any

import numpy as np
import pytest
from test_winrates import Z, benchmark

from ratings import bradley_terry, length_controlled
from utils import UserError

__all__ = ["benchmark"]


def test_length_controlled_without_lengths_is_the_win_rate_with_half_a_win_more() -> None:
    """10 wins at no difference: 10.5 / 11 = 21/22, theta = log 21. A = 11 (21/22) (1/22) = 0.477273, M = (10 / 22^2)
    (10/9) + (21^2 + 1) / (2 * 22^2) = 0.479569, and the standard error is sqrt(M) / A = 1.450976.
    """
    got = length_controlled([1] * 10, [7] * 10, [7] * 10)
    assert got.win_rate == pytest.approx(21 / 22) and got.length_effect == pytest.approx(0, abs=1e-9)
    bounds = [1 / (1 + math.exp(-math.log(21) - sign * Z * 1.450976)) for sign in (-1, 1)]
    assert (got.low, got.high) == pytest.approx(bounds, abs=1e-5)


def test_a_judge_that_goes_by_length_is_seen_through() -> None:
    """3,000 longer responses of which 3/4 win, 1,000 shorter ones of which 1/4 do, all by one token: 62.5% in all, but
    even at equal lengths. s = sqrt(3)/2 and log 3 = effect * tanh(1 / s).
    """
    scores = [1.0] * 2250 + [0.0] * 750 + [1.0] * 250 + [0.0] * 750
    got = length_controlled(scores, [2] * 3000 + [1] * 1000, [1] * 3000 + [2] * 1000)
    assert got.win_rate == pytest.approx(0.5, abs=1e-3)
    assert got.length_effect == pytest.approx(math.log(3) / math.tanh(2 / math.sqrt(3)), rel=1e-2)
    assert got.low < 0.5 < got.high


def test_ties_are_half_labels_of_the_length_controlled_win_rate() -> None:
    """A win and a loss at one difference, and two ties there, are the same to the fit, but ties vary less."""
    lengths = [3, 3, 5, 9] * 50, [4] * 200
    decided, tied = (length_controlled(four * 50, *lengths) for four in ([1, 0, 1, 0], [0.5, 0.5, 1, 0]))
    assert decided.win_rate == pytest.approx(tied.win_rate)
    assert decided.length_effect == pytest.approx(tied.length_effect)
    assert tied.high - tied.low < 0.9 * (decided.high - decided.low)


def test_separated_scores_stay_finite() -> None:
    """Who is longer wins always: at equal lengths anything may be, and the middle is likely."""
    got = length_controlled([1] * 50 + [0] * 50, [9] * 50 + [1] * 50, [5] * 100)
    assert got.win_rate == pytest.approx(0.5) and 0 < got.low < 0.3 and got.length_effect > 3
    alone = length_controlled([1] * 50, [9] * 50, [5] * 50)
    assert alone.low < 0.1 and alone.high > 0.99, "quality and length cannot be told apart"


def test_prompts_asked_twice_do_not_narrow_the_length_controlled_interval() -> None:
    rng = np.random.default_rng(0)
    scores, ours, theirs = rng.integers(0, 2, 200), rng.integers(50, 150, 200), np.full(200, 100)
    once = length_controlled(scores, ours, theirs)
    twice = length_controlled(np.tile(scores, 2), np.tile(ours, 2), np.tile(theirs, 2), [*range(200)] * 2)
    assert twice.high - twice.low == pytest.approx(once.high - once.low, rel=0.02)


def test_length_controlled_win_rate_recovers_the_truth(benchmark: Any) -> None:
    held, controlled, plain = benchmark.length_controlled(200, 0.4, 1.0, 0.2, 500)
    assert 0.93 <= held <= 0.975
    assert controlled == pytest.approx(0.4, abs=0.01) and plain > 0.52


def test_lengths_of_other_comparisons_are_refused() -> None:
    with pytest.raises(UserError, match="got 2 of them and 1 lengths"):
        length_controlled([1, 0], [3], [4])


def test_two_systems_ratings_by_hand() -> None:
    """30 of 40, and a tie of each with rating 0: 30 - 40 P(r) + 1/2 - P(r / 2) = 0 for the difference r, near log 3.
    Its variance is near 1/30 + 1/10, and each is half of it away from the mean.
    """
    first, second = bradley_terry([("a", "b", 1.0)] * 30 + [("a", "b", 0.0)] * 10)
    assert (first.name, second.name, first.n) == ("a", "b", 40) and first.value == pytest.approx(-second.value)
    r = 2 * first.value
    assert 30.5 - 40 / (1 + math.exp(-r)) - 1 / (1 + math.exp(-r / 2)) == pytest.approx(0, abs=1e-8)
    assert r == pytest.approx(math.log(3), abs=0.05)
    assert first.high - first.value == pytest.approx(Z * math.sqrt(1 / 30 + 1 / 10) / 2, rel=0.03)


def test_ties_are_half_wins_and_order_does_not_matter_to_ratings() -> None:
    ties = bradley_terry([("a", "b", 0.5)] * 20 + [("b", "c", 0.5)] * 20)
    assert [rating.value for rating in ties] == pytest.approx([0, 0, 0], abs=1e-9)
    rows = [("a", "b", 1.0), ("b", "c", 1.0), ("c", "a", 0.5), ("a", "c", 1.0)]
    turned = [(j, i, 1 - value) for i, j, value in reversed(rows)]
    assert [(r.name, round(r.value, 9)) for r in bradley_terry(rows)] == [
        (r.name, round(r.value, 9)) for r in bradley_terry(turned)]


def test_a_system_with_wins_alone_stays_finite() -> None:
    first, *others = bradley_terry([("a", "b", 1.0)] * 1000 + [("b", "c", 0.5)] * 30)
    assert first.name == "a" and math.isfinite(first.high) and first.low > max(other.high for other in others)


def test_400_points_are_odds_of_ten_to_one() -> None:
    first, second = bradley_terry([("a", "b", 1.0)] * 10_000 + [("a", "b", 0.0)] * 1000)
    assert first.elo[0] - second.elo[0] == pytest.approx(400, abs=1)
    assert first.elo[1] == pytest.approx(first.low * 400 / math.log(10))


def test_prompts_asked_twice_do_not_narrow_ratings() -> None:
    rng = np.random.default_rng(0)
    rows = [(*pair, float(rng.random() < 0.6)) for pair in (("a", "b"), ("b", "c"), ("a", "c")) for _ in range(100)]
    once, twice = bradley_terry(rows), bradley_terry(rows * 2, [*range(300)] * 2)
    assert twice[0].high - twice[0].low == pytest.approx(once[0].high - once[0].low, rel=0.02)


def test_ratings_hold_the_truth(benchmark: Any) -> None:
    assert 0.93 <= benchmark.ratings(50, 0.5, 300) <= 0.97


def test_ratings_of_nothing_and_of_a_system_against_itself() -> None:
    assert bradley_terry([]) == []
    with pytest.raises(UserError, match="'a' is compared with itself"):
        bradley_terry([("a", "a", 1.0)])
