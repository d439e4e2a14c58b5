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
    agreement,
    bradley_terry,
    by_prompt,
    comparisons_needed,
    effective_counts,
    half_width,
    interval,
    kappa,
    length_bias,
    length_controlled,
    position_bias,
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
