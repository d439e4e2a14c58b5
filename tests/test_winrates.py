"""Win rates against numbers derived by hand, published ones, and a smaller run of benchmarks/coverage.py."""

import importlib.util
import math
import random
import sys
from typing import Any

import numpy as np
import pytest

import winrates
from utils import REPOSITORY, UserError
from winrates import (
    by_prompt,
    comparisons_needed,
    effective_counts,
    half_width,
    interval,
    score_interval,
    sign_test,
)

Z = 1.959964  # of 95%


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """benchmarks/coverage.py under a name that no package has."""
    sys.path.append(str(REPOSITORY / "benchmarks"))  # last: some of its names are modules here, too
    spec = importlib.util.spec_from_file_location("coverage_benchmark", REPOSITORY / "benchmarks/coverage.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_ties_the_interval_is_wilsons() -> None:
    """8 of 10, z^2 = 3.84146: centre (0.8 + 0.192073) / 1.384146 = 0.716740; half-width 1.959964 / 1.384146 *
    sqrt(0.016 + 0.00960365) = 0.226576.
    """
    assert interval([1.0] * 8 + [0.0] * 2) == pytest.approx((0.490163, 0.943316), abs=2e-6)


def test_all_wins_all_losses_and_all_ties_have_a_width() -> None:
    """All wins: p >= n / (n + z^2) = 10 / 13.84146. All ties: p (1 - p) is what is left of the variance, so that
    |2 p - 1| <= z^2 / (n + z^2) = 0.277533.
    """
    assert interval([1.0] * 10) == pytest.approx((0.722467, 1), abs=1e-6)
    assert interval([0.0] * 10) == pytest.approx((0, 0.277533), abs=1e-6)
    assert interval([0.5] * 10) == pytest.approx((0.5 - 0.277533 / 2, 0.5 + 0.277533 / 2), abs=1e-6)
    assert interval([1.0]) == pytest.approx((1 / 4.84146, 1), abs=1e-6)
    assert interval([]) == (0.0, 1.0)


def test_with_ties_the_interval_is_tangos() -> None:
    """Airway hyper-responsiveness of 21 children before and after a transplantation, 1 and 7 of them with a change: the
    difference's score interval is -0.517 to -0.026 (Fagerland, Lydersen and Laake, 2014, table 5), of a rate half that.
    """
    low, high = interval([1.0] + [0.0] * 7 + [0.5] * 13)
    assert (2 * low - 1, 2 * high - 1) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize("b, c, n", [(3, 5, 20), (40, 30, 100), (1, 0, 9), (0, 12, 15), (60, 40, 100)])
def test_bounds_are_roots_of_the_closed_form(b: int, c: int, n: int) -> None:
    """The quartic in the difference of Yang, Sun and Hardin (2013), with g = z^2."""
    g = Z**2
    quartic = [n**2 * (n / g + 1)**2, -n * (b - c) * (n / g + 1) * (4 * n / g + 1),
               2 * n * (b - c)**2 * (3 * n / g + 2) / g - n**2 * ((b + c) / g + 1),
               n * (b - c) * (2 * (b + c) / g + 1) - (b - c)**3 * (4 * n / g + 1) / g,
               (b - c)**2 * ((b - c)**2 / g - (b + c)) / g]
    low, high = score_interval(b, n - b - c, c, Z)
    for bound in (low, high):
        if 0 < bound < 1:
            assert min(abs(np.roots(quartic) - (2 * bound - 1))) < 1e-5
    assert low < (1 + (b - c) / n) / 2 < high


def test_ties_narrow_the_interval() -> None:
    """Their scores are in the middle: the standard error of 25, 50 and 25 is that of 50 and 50 times sqrt(1/2)."""
    with_ties, without = interval([1.0, 0.5, 0.5, 0.0] * 250), interval([1.0, 0.0] * 500)
    assert (with_ties[1] - with_ties[0]) / (without[1] - without[0]) == pytest.approx(math.sqrt(0.5), rel=3e-3)


def test_asking_twice_with_the_same_answer_tells_nothing_new() -> None:
    """100 prompts of two equal scores: sum_g (s_g - 2 m)^2 = 100, deff = (100 * 100 / 99 + 1/2) / (200 / 4 + 1/4) =
    2.02, cut to 2. So the interval is that of 100 comparisons, with Student's 1.984217 of 99 degrees of freedom.
    """
    scores, prompts = [1.0] * 100 + [0.0] * 100, [index // 2 for index in range(200)]
    assert effective_counts(0.5, *by_prompt(scores, prompts)) == pytest.approx((50, 0, 50, 1.984217), rel=1e-6)
    assert interval(scores, prompts) == pytest.approx(np.stack(score_interval(50, 0, 50, 1.984217)), abs=1e-6)


def test_answers_that_repel_each_other_narrow_the_interval() -> None:
    """100 prompts, 60 of two wins and 40 of one each, m = 0.8: sum_g (s_g - 1.6)^2 = 60 * 0.16 + 40 * 0.36 = 24, v =
    0.16: deff = (24 * 100 / 99 + 1/2) / (200 * 0.16 + 1/4) = 0.76721, and 160 wins count as 208.548.
    """
    scores, prompts = [1.0, 1.0] * 60 + [1.0, 0.0] * 40, [index // 2 for index in range(200)]
    wins, ties, losses, _ = effective_counts(0.8, *by_prompt(scores, prompts))
    assert (wins, ties, losses) == pytest.approx((208.548, 0, 52.137), abs=2e-3)


def test_clustered_wins_alone_have_a_width() -> None:
    """20 comparisons of 5 prompts count as 5: 5 / (5 + 2.776445^2), Student's quantile of 4 degrees of freedom."""
    assert interval([1.0] * 20, [0, 1, 2, 3, 4] * 4) == pytest.approx((5 / 12.708647, 1), abs=1e-6)
    assert interval([1.0] * 1000, [index // 2 for index in range(1000)])[0] < 0.995


def test_many_clusters_are_resampled() -> None:
    """400 prompts of two equal scores, half of them won: a standard error of 0.5 / 20 = 0.025."""
    scores, prompts = [1.0] * 400 + [0.0] * 400, [index // 2 for index in range(800)]
    low, high = interval(scores, prompts)
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.004)
    assert (low, high) == interval(scores, prompts, seed=0)
    bounds = {winrates.bootstrap_interval(np.arange(300) % 7 / 2, np.full(300, 3.0), seed) for seed in range(3)}
    assert len(bounds) == 3


def test_the_order_of_comparisons_and_the_names_of_prompts_do_not_matter() -> None:
    rows = [(score, f"prompt {index % 60}") for index, score in enumerate([1.0, 0.5, 0.0, 1.0, 1.0] * 30)]
    shuffled = random.Random(0).sample(rows, len(rows))
    one, other = (interval([score for score, _ in two], [prompt for _, prompt in two]) for two in (rows, shuffled))
    assert one == pytest.approx(other, abs=1e-12)


@pytest.mark.parametrize("scores", [[0.5, 1.5], [math.nan], [-1.0]])
def test_scores_that_are_none_are_refused(scores: list[float]) -> None:
    with pytest.raises(UserError, match="give numbers from 0 to 1"):
        interval(scores)


def test_each_comparison_needs_its_prompt() -> None:
    with pytest.raises(UserError, match="got 1 prompts for 2 comparisons"):
        interval([1.0, 0.0], ["a"])


def test_sign_test_leaves_ties_out() -> None:
    """9 of 10: twice P(at least 9 heads) = 2 (10 + 1) / 1024."""
    assert sign_test([1.0] * 9 + [0.0] + [0.5] * 30) == pytest.approx(22 / 1024)
    assert sign_test([0.5, 0.5]) == sign_test([]) == 1.0


def test_sign_test_takes_a_prompt_as_one() -> None:
    """Prompts a (2 of 3), b (a win and a tie), c and d (wins) are won, e (one each) is even: 2 / 2^4."""
    scores, prompts = [1, 1, 0, 1, 0.5, 1, 1, 1, 0], [*"aaabbcdee"]
    assert sign_test(scores, prompts) == pytest.approx(1 / 8)


def test_comparisons_needed_by_hand() -> None:
    """60%: (1.959964 * 0.5 + 0.841621 * sqrt(0.24))^2 / 0.01 = 1.392294^2 / 0.01 = 193.8; with half of them ties
    (1.959964 * 0.353553 + 0.841621 * sqrt(0.115))^2 / 0.01 = 95.7.
    """
    assert comparisons_needed(0.1) == comparisons_needed(-0.1) == 194
    assert comparisons_needed(0.1, tie_share=0.5) == 96
    assert comparisons_needed(0.1, power=0.9) > 194 < comparisons_needed(0.1, level=0.99)


@pytest.mark.parametrize("effect, ties", [(0.0, 0.0), (0.6, 0.0), (0.3, 0.5), (0.1, 1.0)])
def test_effects_that_cannot_be_are_refused(effect: float, ties: float) -> None:
    with pytest.raises(UserError, match="effect: got"):
        comparisons_needed(effect, tie_share=ties)


def test_shares_are_not_given_in_percent() -> None:
    with pytest.raises(UserError, match="power: got 80"):
        comparisons_needed(0.1, power=80)


def test_half_width_by_hand() -> None:
    """Wilson's at 1/2 is z / (2 sqrt(n + z^2)) = 1.959964 / (2 sqrt(503.84146))."""
    assert half_width(500) == pytest.approx(0.0436587, abs=1e-6)


def test_planned_comparisons_have_the_planned_power(benchmark: Any) -> None:
    for effect, ties in ((0.05, 0.0), (0.1, 0.5)):
        n, by_interval, by_signs = benchmark.power(effect, ties, 4000)
        assert by_interval == pytest.approx(0.8, abs=0.03) and by_signs == pytest.approx(0.8, abs=0.04), n


@pytest.mark.parametrize("n, rate, ties", [(200, 0.5, 0.0), (200, 0.99, 0.2), (500, 0.6, 0.5), (1000, 0.8, 0.2)])
def test_many_comparisons_hold_the_truth_in_95_of_100(benchmark: Any, n: int, rate: float, ties: float) -> None:
    assert 0.94 <= benchmark.win_rate(n, rate, ties, 10_000) <= 0.96


@pytest.mark.parametrize("n", [10, 20, 50, 100])
def test_few_comparisons_and_extreme_rates_hold_the_truth_nearly_as_often(benchmark: Any, n: int) -> None:
    """A bootstrap of 20 comparisons at a rate of 95% held it in 64 of 100: all are wins in the rest."""
    for rate in (0.5, 0.8, 0.95):
        for ties in (0.0, 0.2, 0.5):
            assert 0.91 <= benchmark.win_rate(n, rate, ties, 4000) <= 0.985
    assert benchmark.bootstrap(20, 0.95, 0.0, 2000) < 0.7


@pytest.mark.parametrize("both_orders", [False, True])
def test_prompts_with_several_comparisons_hold_the_truth(benchmark: Any, both_orders: bool) -> None:
    for prompts, rate in ((50, 0.8), (200, 0.95)):
        by_score, by_bootstrap = benchmark.clusters(prompts, rate, 0.0, both_orders, 1000, 300)
        assert 0.93 <= by_score <= 0.975 and by_bootstrap > 0.91
