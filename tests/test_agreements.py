"""Kappa, accuracy and biases of judges, against numbers derived by hand and a smaller run of benchmarks/coverage.py."""

import math
from typing import Any

import pytest
from test_winrates import benchmark

from agreements import agreement, kappa, length_bias, position_bias
from utils import UserError

__all__ = ["benchmark"]


def test_kappa_by_hand() -> None:
    """20 and 15 of 50 agree, p_o = 0.7; p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5. Its standard error (Fleiss, Cohen and
    Everitt, 1969), near sqrt(p_o (1 - p_o) / 50) / (1 - p_e) = 0.13, makes the interval near 0.4 +- 0.25.
    """
    got = kappa(["yes"] * 25 + ["no"] * 25, ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15)
    assert got.value == pytest.approx(0.4) and got.n == 50
    assert (got.low, got.high) == pytest.approx((0.15, 0.65), abs=0.03)


def test_kappa_of_judges_that_never_differ_has_a_width() -> None:
    got = kappa([1, 0] * 20, [1, 0] * 20)
    assert got.value == got.high == 1 and 0.8 < got.low < 0.95


def test_kappa_of_one_verdict_is_not_a_number() -> None:
    assert math.isnan(kappa([1, 1], [1, 1]).value)
    with pytest.raises(UserError, match="got 2 and 1"):
        kappa([1, 1], [1])


def test_kappa_of_prompts_asked_twice_is_no_narrower() -> None:
    """Both comparisons of a prompt come out alike: the design effect is 2, a hundred pairs are worth fifty."""
    first, second = ["yes"] * 25 + ["no"] * 25, ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    once, twice = kappa(first, second), kappa(first * 2, second * 2, [*range(50)] * 2)
    assert twice.value == pytest.approx(once.value) and twice.n == 100
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high), abs=0.01)
    assert kappa(first, second, [*range(50)]) == once


def test_kappa_holds_the_truth(benchmark: Any) -> None:
    assert 0.93 <= benchmark.kappas(200, 0.8, 1000) <= 0.97


def test_kappa_of_prompts_holds_the_truth_where_comparisons_taken_one_by_one_do_not(benchmark: Any) -> None:
    of_prompts, of_comparisons = benchmark.kappas_of_prompts(100, 0.8, 1.0, 300)
    assert 0.92 <= of_prompts <= 0.98 and of_comparisons < 0.85


def test_agreement_counts_a_judges_tie_as_a_half_and_leaves_peoples_out() -> None:
    """1, 1, 0 and 1/2 of four. Of 8 right in 10 the interval is Wilson's."""
    got = agreement([1, 0, 0, 0.5, 1], [1, 0, 1, 1, 0.5])
    assert (got.value, got.n) == (0.625, 4)
    right = agreement([1, 0] * 5, [1, 0] * 4 + [0, 1])
    assert (right.low, right.high) == pytest.approx((0.490163, 0.943316), abs=2e-6)
    assert math.isnan(agreement([1], [0.5]).value)
    with pytest.raises(UserError, match="got 2 of the judge, 1 of people"):
        agreement([1, 0], [1])


def test_position_bias_by_hand() -> None:
    """Three comparisons in both orders: the candidate wins both times, from each place once; the first place wins both
    times; the second wins, then a tie: (1 + 0 + 1 + 1 + 0 + 1/2) / 6.
    """
    assert position_bias([1, 1, 0], [1, 0, 0.5]).value == pytest.approx(3.5 / 6)
    blind = position_bias([1] * 40, [0] * 40)
    assert blind.value == 1 and blind.low == pytest.approx(40 / (40 + 2.022691**2), abs=1e-5), "40 prompts, not 80"
    alike = position_bias([1] * 40, [0] * 40, [*range(20)] * 2)
    assert alike.low == pytest.approx(20 / (20 + 2.093024**2), abs=1e-5), "20 prompts, not 40"
    with pytest.raises(UserError, match="got 1 with the candidate first, 2"):
        position_bias([1], [1, 0])


def test_length_bias_by_hand() -> None:
    """The longer one wins, loses, ties; equal lengths are left out."""
    got = length_bias([1, 1, 0.5, 0], [5, 2, 4, 3], [3, 4, 2, 3])
    assert (got.value, got.n) == (0.5, 3)
    assert length_bias([0, 0], [1, 1], [2, 2]).value == 1
