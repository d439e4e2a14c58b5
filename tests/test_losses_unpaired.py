"""The losses of single completions against numbers derived by hand from their papers' equations.

Rewards are c of a chosen and d of a rejected completion, z the reference point, s the sigmoid: s(ln 3) = 3/4.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from toy_losses import assert_slopes, close, computed, drawn, loss_trainer, make_trainer, numbers

from arguments import Losses

LN3 = math.log(3)
WON, LOST = math.log(4 / 3), math.log(4)  # -log s(ln 3), -log s(-ln 3)


def of_ratios(name: str, chosen: Sequence[float], rejected: Sequence[float], losses: Sequence[float],
              slopes: tuple[list[float], list[float]] | None = None, **hyper: Any) -> None:
    """Losses of completions with these log-ratios, for losses without mismatched pairs; beta is 1.

    slopes: with respect to the policy's chosen and rejected log-probs.
    """
    policy = [numbers(*(-20 + r for r in chosen)), numbers(*(-30 + r for r in rejected))]
    reference = numbers(*[-20] * len(chosen)), numbers(*[-30] * len(rejected))
    found, *rewards = computed(name, *policy, *reference, beta=1.0, **hyper)
    close(found, *losses)
    close(rewards[0], *chosen)
    close(rewards[1], *rejected)
    if slopes:
        assert_slopes(found, *zip(policy, slopes, strict=True))


# KTO ------------------------------------------------------------------------------------------------------------------

def test_kto_measures_both_classes_against_the_reference_point() -> None:
    """beta 0.1; mismatched log-ratios 4 and 0: z = 2, in rewards 0.2. Weights: desirable 2, undesirable 4.

    Chosen with log-ratio 2: gain 0.2 - 0.2 = 0, L = 2 (1 - 1/2) = 1. Its slope: -2 * 0.1 * 1/2 * 1/2 = -0.05.
    Rejected with log-ratio 2 + 10 ln 3: gain -ln 3, s = 1/4, L = 4 * 3/4 = 3. Its slope: 4 * 0.1 * 1/4 * 3/4 = 0.075.
    """
    chosen, rejected, KL = numbers(-10), numbers(-10 + 10 * LN3), numbers(-1, -5)
    losses, *rewards = computed("kto", chosen, rejected, KL, numbers(-12), numbers(-12), numbers(-5, -5), beta=0.1,
                                desirable_weight=2.0, undesirable_weight=4.0)
    close(losses, 1, 3)
    close(rewards[0], 0.2)
    close(rewards[1], 0.2 + LN3)
    by_chosen, by_rejected, by_KL = torch.autograd.grad(losses.sum(), [chosen, rejected, KL], allow_unused=True)
    close(by_chosen, -0.05)
    close(by_rejected, 0.075)
    assert by_KL is None


@pytest.mark.parametrize(("name", "expected"), [("kto", [0.5, 0.5]), ("kto-logsigmoid", [math.log(2)] * 2)])
def test_a_negative_kl_estimate_is_taken_as_zero(name: str, expected: list[float]) -> None:
    """Mismatched log-ratios -4 and 0: z = max(0, -2) = 0; log-ratio 0 is then a gain of 0, on both sides."""
    losses, *_ = computed(name, numbers(-7), numbers(-9), numbers(-9, -5), numbers(-7), numbers(-9), numbers(-5, -5))
    close(losses, *expected)


def test_the_mean_kl_is_clamped_not_each_pairs() -> None:
    """beta 1, mismatched log-ratios -2 and 2 + 2 ln 3: z = ln 3, where clamped one by one it would be 1 + ln 3."""
    losses, *_ = computed("kto", numbers(-7), numbers(-9), numbers(-9, -3 + 2 * LN3), numbers(-7), numbers(-9),
                          numbers(-7, -5), beta=1.0)
    close(losses, 3 / 4, 1 / 4)


def test_kto_desirable_loss_falls_and_undesirable_loss_grows_with_the_log_ratio() -> None:
    grid = torch.linspace(-30, 30, 13, dtype=torch.float64)
    zero, KL = torch.zeros(13, dtype=torch.float64), torch.full((13,), 1.0, dtype=torch.float64)
    losses, *_ = computed("kto", grid, grid, KL, zero, zero, zero)
    assert losses[:13].diff().lt(0).all()
    assert losses[13:].diff().gt(0).all()


@pytest.mark.parametrize(("absent", "expected"), [("chosen", [0.25]), ("rejected", [0.75])])
def test_kto_of_one_class_is_that_class_alone(absent: str, expected: list[float]) -> None:
    """z = 0 and beta 1, log-ratio -ln 3: 1 - s(-ln 3) = 3/4 where it is chosen, 1 - s(ln 3) = 1/4 where rejected."""
    here, nobody, KL = numbers(-5 - LN3), numbers(), numbers(-6)
    policy, reference = (here, nobody), (numbers(-5), nobody)
    if absent == "chosen":
        policy, reference = policy[::-1], reference[::-1]
    losses, *rewards = computed("kto", *policy, KL, *reference, numbers(-5), beta=1.0)
    close(losses, *expected)
    assert [0 if side is None else len(side) for side in rewards] == ([0, 1] if absent == "chosen" else [1, 0])


def test_kto_logsigmoid_is_the_log_of_what_kto_takes_from_one() -> None:
    """beta 1, mismatched log-ratio ln 3 = z. Chosen 2 ln 3: gain ln 3, log 4/3, slope -1/4. Rejected: log 4, 3/4."""
    chosen, rejected = numbers(-5 + 2 * LN3), numbers(-6 + 2 * LN3)
    losses, *_ = computed("kto-logsigmoid", chosen, rejected, numbers(-7 + LN3), numbers(-5), numbers(-6), numbers(-7),
                          beta=1.0)
    close(losses, WON, LOST)
    assert_slopes(losses, (chosen, [-1 / 4]), (rejected, [3 / 4]))


@pytest.mark.parametrize("name", ["kto-zero", "apo-zero-unpaired"])
def test_kto_zero_has_its_reference_point_at_zero(name: str) -> None:
    """Log-ratio ln 3: 1 - s(ln 3) = 1/4 chosen, 1 - s(-ln 3) = s(ln 3) = 3/4 rejected; slopes -3/16 and 3/16.

    The same is unpaired APO-zero: 1 - s(c) of a chosen one, s(d) of a rejected one.
    """
    of_ratios(name, [LN3], [LN3, 0], [1 / 4, 3 / 4, 1 / 2], ([-3 / 16], [3 / 16, 1 / 4]))


def test_kto_surprisal_needs_no_reference_and_does_not_clamp() -> None:
    """beta 0.5, mean log-probs of mismatched pairs -1 and -3: z = 0.5 * -2 = -1, below 0.

    Chosen -2 + 2 ln 3: reward -1 + ln 3, gain ln 3, L = 1/4; slope -0.5 * 3/16. Rejected the same: 3/4.
    """
    chosen, rejected = numbers(-2 + 2 * LN3), numbers(-2 + 2 * LN3)
    losses, *rewards = computed("kto-surprisal", chosen, rejected, numbers(-1, -3), beta=0.5)
    close(losses, 1 / 4, 3 / 4)
    assert_slopes(losses, (chosen, [-3 / 32]), (rejected, [3 / 32]))
    close(rewards[0], -1 + LN3)
    close(rewards[1], -1 + LN3)


def test_humanline_kto_clips_the_log_ratio_of_every_token_in_all_three_roles() -> None:
    """Bounds -1 and 2, beta 1. KL: token log-ratios 5 and 1, and -7: sums 2 + 1 = 3 and -1, z = 1; unclipped -1/2.

    Chosen: 5 and 1 clipped to 2 + 1 = 3, gain 2: L = 1 / (1 + e^2). Rejected: -7 and -0.5 clipped to -1.5, gain 2.5.
    """
    chosen, rejected = numbers(-1, -3), numbers(-9, -2)
    losses, *rewards = computed(
        "kto-humanline", chosen[None], rejected[None], torch.stack([numbers(-1, -3), numbers(-9, 0)]),
        numbers(-6, -4)[None], numbers(-2, -1.5)[None], torch.stack([numbers(-6, -4), numbers(-2, 0)]), beta=1.0,
        log_epsilon_P=-1.0, log_epsilon_R=2.0)
    gains = [2, 2.5]
    close(losses, *(1 / (1 + math.exp(gain)) for gain in gains))
    close(rewards[0], 3)
    close(rewards[1], -1.5)
    slopes = [1 / (1 + math.exp(gain)) / (1 + math.exp(-gain)) for gain in gains]
    by_chosen, by_rejected = torch.autograd.grad(losses.sum(), [chosen, rejected])
    close(by_chosen, 0, -slopes[0])
    close(by_rejected, 0, slopes[1])


# Losses that couple the examples of a batch ---------------------------------------------------------------------------

def test_simple_kto_measures_each_class_against_the_other_and_gradients_flow_through_both() -> None:
    """c = 2 ln 3, 0: mean ln 3. d = -ln 3, -3 ln 3: mean -2 ln 3, taken as 0. s(2 ln 3) = 9/10, s(4 ln 3) = 81/82.

    Chosen against 0: 1/10, 1/2. Rejected against ln 3: gains 2 ln 3 and 4 ln 3, 1/10 and 1/82.
    Slopes of rejected: their own, 9/100 and 81/82^2. Of chosen: own, -9/100 and -1/4, and half of what raising the
    point ln 3 takes from the rejected losses, -(9/100 + 81/82^2) / 2. Nothing flows where the mean is clamped.
    """
    own, far = 9 / 100, 81 / 82 ** 2
    of_ratios("kto-simple", [2 * LN3, 0], [-LN3, -3 * LN3], [1 / 10, 1 / 2, 1 / 10, 1 / 82],
              ([-own - (own + far) / 2, -1 / 4 - (own + far) / 2], [own, far]))


def test_simple_kto_lets_gradients_flow_through_the_rejected_mean() -> None:
    """c = 2 ln 3, d = ln 3, above 0: chosen gain ln 3, 1/4; rejected gain 2 ln 3 - ln 3, 1/4.

    Slopes of chosen: -3/16 of its own loss, -3/16 of the other's; of rejected 3/16 twice.
    """
    of_ratios("kto-simple", [2 * LN3], [LN3], [1 / 4, 1 / 4], ([-3 / 8], [3 / 8]))


@pytest.mark.parametrize(("chosen", "rejected", "losses"), [([LN3, -LN3], [], [1 / 4, 3 / 4]),
                                                            ([], [LN3, -LN3], [3 / 4, 1 / 4])])
def test_simple_kto_of_one_class_has_its_reference_point_at_zero(chosen: list[float], rejected: list[float],
                                                                 losses: list[float]) -> None:
    """Log-ratios ln 3 and -ln 3 against 0: 1/4 and 3/4 chosen, 3/4 and 1/4 rejected; slopes 3/16."""
    of_ratios("kto-simple", chosen, rejected, losses, ([-3 / 16] * len(chosen), [3 / 16] * len(rejected)))


def test_bco_measures_both_classes_against_the_mean_of_their_means() -> None:
    """c = 2 ln 3, 4 ln 3: mean 3 ln 3. d = -ln 3. delta = ln 3 (the mean of all three would be 5/3 ln 3), a constant.

    Gains ln 3, 3 ln 3, 2 ln 3: log 4/3, 28/27, 10/9. Slopes: 1/4, 1/28, 1/10.
    """
    of_ratios("bco", [2 * LN3, 4 * LN3], [-LN3], [WON, math.log(28 / 27), math.log(10 / 9)],
              ([-1 / 4, -1 / 28], [1 / 10]))


@pytest.mark.parametrize(("chosen", "rejected", "losses"), [([2 * LN3, 0], [], [WON, LOST]),
                                                            ([], [2 * LN3, 0], [LOST, WON])])
def test_bco_of_one_class_is_measured_against_its_own_mean(chosen: list[float], rejected: list[float],
                                                           losses: list[float]) -> None:
    """2 ln 3 and 0: delta = ln 3, so ln 3 on either side of it."""
    of_ratios("bco", chosen, rejected, losses)


def logistic(margin: float) -> float:
    return math.log(1 + math.exp(-margin))


def test_unpaired_aot_compares_the_classes_rank_by_rank() -> None:
    """c = 2, 0 and d = -3, 1, sorted 0, 2 and -3, 1: margins 3 at the lower rank and 1 at the upper.

    A rank's loss stands at both of its completions, so that either has twice the slope of one: 2 s(-margin).
    """
    upper, lower = 2 / (1 + math.e), 2 / (1 + math.exp(3))
    of_ratios("aot-unpaired", [2, 0], [-3, 1], [logistic(1), logistic(3), logistic(3), logistic(1)],
              ([-upper, -lower], [lower, upper]))


def test_unpaired_aot_of_unequal_counts_is_the_quantile_coupling() -> None:
    """c = 4, 1 and d = 0, -2, -1. Of [0, 1], the lower c holds the first half, the d's -2, -1, 0 a third each.

    c = 1 meets -2 over 1/3 and -1 over 1/6 of [0, 1]: 2/3 l(3) + 1/3 l(2). c = 4 meets -1 over 1/6, 0 over 1/3:
    1/3 l(5) + 2/3 l(4). d = -2 meets 1, and 0 meets 4; -1 meets both, half and half: l(2)/2 + l(5)/2.
    """
    of_ratios("aot-unpaired", [4, 1], [0, -2, -1],
              [logistic(5) / 3 + 2 * logistic(4) / 3, 2 * logistic(3) / 3 + logistic(2) / 3, logistic(4), logistic(3),
               (logistic(2) + logistic(5)) / 2])


def test_unpaired_aot_compares_all_of_a_class_with_a_single_completion_of_the_other() -> None:
    """c = 2, 0 and d = -1: margins 3 and 1, and their mean at the rejected one."""
    of_ratios("aot-unpaired", [2, 0], [-1], [logistic(3), logistic(1), (logistic(3) + logistic(1)) / 2])


@pytest.mark.parametrize(("chosen", "rejected"), [([3, -1], []), ([], [3, -1])])
def test_unpaired_aot_of_one_class_has_nothing_to_compare(chosen: list[float], rejected: list[float]) -> None:
    of_ratios("aot-unpaired", chosen, rejected, [0, 0], ([0] * len(chosen), [0] * len(rejected)))


@pytest.mark.parametrize("name", ["kto-simple", "bco", "aot-unpaired"])
def test_a_coupled_loss_follows_its_completions_when_they_change_places(name: str) -> None:
    trainer = make_trainer(name)
    values = drawn(trainer, 5, 3)
    order = {"chosen": torch.tensor([3, 0, 4, 2, 1]), "rejected": torch.tensor([2, 0, 1])}
    moved = {argument.name: values[argument.name][order[argument.role]] for argument in trainer.asked}
    (losses, *_), (other, *_) = trainer.compute(values), trainer.compute(moved)
    torch.testing.assert_close(other, losses[torch.cat([order["chosen"], 5 + order["rejected"]])], rtol=1e-12,
                               atol=1e-12)


def test_apo_zero_of_pairs_is_the_sum_of_its_unpaired_losses() -> None:
    """1 - s(c) + s(d), whichever way the completions come."""
    values = drawn(loss_trainer("apo-zero"))
    pairs, *_ = loss_trainer("apo-zero").compute(values)
    singles: Losses = loss_trainer("apo-zero-unpaired").compute(values)
    torch.testing.assert_close(pairs, singles[0][:4] + singles[0][4:], rtol=1e-12, atol=1e-12)
