"""The losses of pairs against numbers derived by hand from their papers' equations.

Rewards are c of the chosen and d of the rejected completion, h = c - d, s the sigmoid: s(ln 3) = 3/4, s'(ln 3) = 3/16.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from toy_losses import assert_slopes, close, computed, drawn, loss_trainer, numbers

LN2, LN3 = math.log(2), math.log(3)
WON, LOST = math.log(4 / 3), math.log(4)  # -log s(ln 3), -log s(-ln 3)
Pairs = Sequence[tuple[float, float]]  # a number for chosen and one for rejected, of every pair


def assert_pairs(name: str, logratios: Pairs, losses: Sequence[float], slopes: Pairs | None = None,
                 rewards: Pairs | None = None, **hyper: Any) -> None:
    """Losses of pairs with these log-ratios; slopes are with respect to the policy's two log-probs.

    rewards: beta times the log-ratios where they are not given.
    """
    chosen, rejected = (list(side) for side in zip(*logratios, strict=True))
    n, beta = len(chosen), hyper.get("beta", 0.1)
    policy = [numbers(*(-20 + r for r in chosen)), numbers(*(-30 + r for r in rejected))]
    found, *its_rewards = computed(name, *policy, numbers(*[-20] * n), numbers(*[-30] * n), **hyper)
    close(found, *losses)
    expected = rewards or [(beta * c, beta * d) for c, d in logratios]
    for reward, numbers_of_side in zip(its_rewards, zip(*expected, strict=True), strict=True):
        close(reward, *numbers_of_side)
    if slopes:
        by_chosen, by_rejected = zip(*slopes, strict=True)
        assert_slopes(found, (policy[0], list(by_chosen)), (policy[1], list(by_rejected)))


# With a reference, of each pair ---------------------------------------------------------------------------------------

def test_dpo_is_the_log_odds_of_the_margin() -> None:
    """beta 0.1, log-ratios 10 and 0, then 0 and 10, then 4 and 4: margins 1, -1, 0.

    L = log(1 + e^-h): log(1 + 1/e) = 0.3132617, log(1 + e) = 1.3132617, log 2. dL/dlogp_c = -0.1 / (1 + e^h).
    """
    slopes = 0.1 / (1 + math.e), 0.1 / (1 + 1 / math.e), 0.05
    assert_pairs("dpo", [(10, 0), (0, 10), (4, 4)], [0.3132616875182228, 1.3132616875182228, LN2],
                 [(-slope, slope) for slope in slopes])


def test_dpo_grows_linearly_where_the_wrong_side_wins_by_far() -> None:
    """h = -1e4: L = log(1 + e^10000) = 10000 with a slope of -1, though e^10000 overflows. h = 1e4: 0, flat."""
    assert_pairs("dpo", [(-5000, 5000), (5000, -5000)], [1e4, 0], [(-1, 1), (0, 0)], beta=1.0)


def test_dpo_sigmoid_is_minus_the_probability_of_the_label() -> None:
    """beta 0.5, log-ratios 2 ln 3 and 0: h = ln 3, -s(h) = -3/4. Slope: -0.5 * 3/16 = -3/32."""
    assert_pairs("dpo-sigmoid", [(2 * LN3, 0)], [-3 / 4], [(-3 / 32, 3 / 32)], beta=0.5)


def test_cdpo_mixes_the_loss_with_that_of_the_other_label() -> None:
    """epsilon 0.2, h = ln 3: 0.8 log 4/3 + 0.2 log 4. Slope: -0.8 * 1/4 + 0.2 * 3/4 = -0.05.

    h = ln 4 is P = 0.8 = 1 - epsilon, its minimum: 0.8 log 5/4 + 0.2 log 5, slope -0.8 * 0.2 + 0.2 * 0.8 = 0.
    """
    assert_pairs("cdpo", [(LN3, 0), (0, -2 * LN2)],
                 [0.8 * WON + 0.2 * LOST, 0.8 * math.log(5 / 4) + 0.2 * math.log(5)], [(-0.05, 0.05), (0, 0)],
                 beta=1.0, epsilon=0.2)


def test_robust_dpo_takes_wrong_labels_out_again() -> None:
    """epsilon 0.1, h = ln 3: (0.9 log 4/3 - 0.1 log 4) / 0.8. Slope: -(0.9 * 1/4 + 0.1 * 3/4) / 0.8 = -0.375."""
    assert_pairs("robust", [(LN3, 0)], [(0.9 * WON - 0.1 * LOST) / 0.8], [(-0.375, 0.375)], beta=1.0, epsilon=0.1)


def test_robust_dpo_is_in_expectation_dpo_on_the_right_labels() -> None:
    """Labels wrong with probability epsilon: (1 - e) L(h) + e L(-h) = -log s(h) (Chowdhury et al., lemma 3.1)."""
    margins = torch.linspace(-9, 9, 7, dtype=torch.float64)
    zero = torch.zeros_like(margins)
    right, *_ = computed("robust", margins, zero, zero, zero, beta=1.0, epsilon=0.3)
    wrong, *_ = computed("robust", zero, margins, zero, zero, beta=1.0, epsilon=0.3)
    clean, *_ = computed("dpo", margins, zero, zero, zero, beta=1.0)
    torch.testing.assert_close(0.7 * right + 0.3 * wrong, clean, rtol=1e-12, atol=1e-12)


def test_ipo_regresses_the_difference_of_log_ratios_to_half_of_one_over_beta() -> None:
    """beta 0.1, target 1 / 0.2 = 5. Log-ratios 8 and 1: (7 - 5)^2 = 4, slope 2 * 2. 3 and 1: (2 - 5)^2, slope -6."""
    assert_pairs("ipo", [(8, 1), (3, 1)], [4, 9], [(4, -4), (-6, 6)], beta=0.1)


def test_hinge_is_flat_beyond_a_margin_of_one() -> None:
    """beta 0.5, log-ratios 1 and 0.5, then 4 and 0: h = 0.25 and 2, L = 0.75 and 0; slopes -0.5 and 0."""
    assert_pairs("hinge", [(1, 0.5), (4, 0)], [0.75, 0], [(-0.5, 0.5), (0, 0)], beta=0.5)


def test_exo_is_the_divergence_of_the_policy_from_the_smoothed_label() -> None:
    """epsilon 1/4: KL((s(h), s(-h)) || (3/4, 1/4)), which is 0, and flat, at h = ln 3.

    h = 0: 1/2 log(1/2 / (3/4)) + 1/2 log(1/2 / (1/4)) = 1/2 (log 2/3 + log 2) = 1/2 log 4/3.
    Slope: s'(0) (log 2/3 - log 2) = -1/4 ln 3.
    """
    assert_pairs("exo", [(LN3, 0), (5, 5)], [0, WON / 2], [(0, 0), (-LN3 / 4, LN3 / 4)], beta=1.0, epsilon=0.25)


def test_nca_holds_up_both_rewards() -> None:
    """c = ln 3, d = -ln 3: log 4/3 + 1/2 log 4 + 1/2 log 4/3. Slopes: -1/4 + 1/2 * 3/4 = 1/8; 1/2 s(-ln 3) = 1/8."""
    assert_pairs("nca", [(LN3, -LN3)], [1.5 * WON + 0.5 * LOST], [(1 / 8, 1 / 8)], beta=1.0)


def test_sppo_regresses_each_log_ratio_to_its_own_target() -> None:
    """beta 0.1, eta/2 = 5: log-ratios 8 and -1: (8 - 5)^2 + (-1 + 5)^2 = 25; slopes 2 * 3 and 2 * 4."""
    assert_pairs("sppo", [(8, -1)], [25], [(6, 8)], beta=0.1)


def test_apo_zero_pushes_chosen_up_and_rejected_down_from_zero() -> None:
    """c = ln 3, d = -ln 3: 1 - 3/4 + 1/4. c = 0, d = ln 3: 1/2 + 3/4. Slopes -s'(c) and s'(d)."""
    assert_pairs("apo-zero", [(LN3, -LN3), (0, LN3)], [1 / 2, 5 / 4], [(-3 / 16, 3 / 16), (-1 / 4, 3 / 16)], beta=1.0)


def test_apo_down_pushes_chosen_down_and_rejected_further() -> None:
    """c = 0, d = -ln 3: s(0) + 1 - s(ln 3) = 3/4. Slopes: s'(0) - s'(ln 3) = 1/16; s'(ln 3) = 3/16."""
    assert_pairs("apo-down", [(0, -LN3)], [3 / 4], [(1 / 16, 3 / 16)], beta=1.0)


def test_discopop_blends_a_logistic_and_an_exponential_loss() -> None:
    """tau 1/2, h = ln 3 / 2: m = s(ln 3) = 3/4, e^-h = 1 / sqrt 3. L = 1/4 log(1 + e^-h) + 3/4 e^-h.

    Slope: m' (e^-h - log(1 + e^-h)) - (1 - m) s(-h) - m e^-h, with m' = 2 * 3/16 and s(-h) = 1 / (1 + sqrt 3).
    """
    odds = 1 / math.sqrt(3)
    slope = 3 / 8 * (odds - math.log(1 + odds)) - 1 / 4 / (1 + math.sqrt(3)) - 3 / 4 * odds
    assert_pairs("discopop", [(LN3 / 2, 0)], [math.log(1 + odds) / 4 + 3 / 4 * odds], [(slope, -slope)], beta=1.0,
                 tau=0.5)


def test_discopop_blends_at_a_scale_of_the_rewards_own() -> None:
    """beta = tau = 0.05, log-ratios ln 3 and 0: h = 0.05 ln 3, m = s(ln 3) = 3/4, e^-h = 3^-0.05."""
    odds = 3 ** -0.05
    assert_pairs("discopop", [(LN3, 0)], [math.log(1 + odds) / 4 + 3 / 4 * odds], beta=0.05, tau=0.05)


# With a reference, over a batch ---------------------------------------------------------------------------------------

def test_bco_pair_measures_both_sides_against_the_mean_reward_of_the_batch() -> None:
    """c = 2 ln 3, 4 ln 3 and d = -ln 3 twice: means 3 ln 3 and -ln 3, delta = ln 3, a constant.

    c - delta = ln 3, 3 ln 3 and delta - d = 2 ln 3. s(2 ln 3) = 9/10, s(3 ln 3) = 27/28. Slopes -s(-x), and none
    through delta, with which the losses would change by 1/4 + 1/28 - 2/10.
    """
    assert_pairs("bco-pair", [(2 * LN3, -LN3), (4 * LN3, -LN3)],
                 [WON + math.log(10 / 9), math.log(28 / 27) + math.log(10 / 9)],
                 [(-1 / 4, 1 / 10), (-1 / 28, 1 / 10)], beta=1.0)


def test_aot_compares_the_policys_margins_with_the_references_rank_by_rank() -> None:
    """beta 1. Policy chosen - rejected: u = 5, 1, 3; the reference's: v = 4, 0, 5. Sorted: 1, 3, 5 and 0, 4, 5.

    Rank 0 is pair 1: u - v = 1. Rank 1 is pair 2: -1. Rank 2 is pair 0: 0. L = log(1 + e^-(u - v)).
    Rewards: policy - reference of each completion: 0 - 0, 0 - -1, 0 - -2 and -5 - -4, -1 - -1, -3 - -7.
    """
    chosen, rejected = numbers(0, 0, 0), numbers(-5, -1, -3)
    losses, *rewards = computed("aot", chosen, rejected, numbers(0, -1, -2), numbers(-4, -1, -7), beta=1.0)
    close(losses, LN2, math.log(1 + 1 / math.e), math.log(1 + math.e))
    slopes = [1 / 2, 1 / (1 + math.e), 1 / (1 + 1 / math.e)]
    assert_slopes(losses, (chosen, [-slope for slope in slopes]), (rejected, slopes))
    close(rewards[0], 0, 1, 2)
    close(rewards[1], -1, 0, 4)


# Of token log-probs ---------------------------------------------------------------------------------------------------

def test_ld_dpo_counts_what_is_beyond_the_shorter_answer_alpha_times() -> None:
    """alpha 1/2. Chosen has 3 tokens and rejected 1, so one token a side is shared.

    Policy: -1 + 1/2 (-2 - 4) = -4, and -3. Reference: -2 + 1/2 (-4 - 4) = -6, and -1. beta 1: c = 2, d = -2, h = 4.
    dL/dlogp = -s(-4) for the shared chosen token, half of that beyond it.
    """
    chosen, rejected = numbers(-1, -2, -4), numbers(-3, 0, 0)
    losses, *rewards = computed(
        "ld-dpo", chosen[None], rejected[None], numbers(-2, -4, -4)[None], numbers(-1, 0, 0)[None], numbers(3),
        numbers(1), beta=1.0, alpha=0.5)
    close(losses, math.log(1 + math.exp(-4)))
    close(rewards[0], 2)
    close(rewards[1], -2)
    slope = 1 / (1 + math.exp(4))
    by_chosen, by_rejected = torch.autograd.grad(losses.sum(), [chosen, rejected])
    close(by_chosen, -slope, -slope / 2, -slope / 2)
    close(by_rejected[:1], slope)


def test_ld_dpo_with_the_rejected_answer_longer() -> None:
    """alpha 1/4, chosen one token of log-ratio 1, rejected two of 1 and 4: c = 1, d = 1 + 1/4 * 4 = 2, h = -1."""
    losses, *_ = computed("ld-dpo", numbers(-1, 0)[None], numbers(-1, -1)[None], numbers(-2, 0)[None],
                          numbers(-2, -5)[None], numbers(1), numbers(2), beta=1.0, alpha=0.25)
    close(losses, math.log(1 + math.e))


def test_ld_dpo_at_alpha_one_is_dpo() -> None:
    trainer = loss_trainer("ld-dpo", alpha=1.0)
    values = drawn(trainer)
    sums = {name.replace("token_logps", "logps"): value.sum(1) for name, value in values.items() if "logps" in name}
    for value, expected in zip(trainer.compute(values), loss_trainer("dpo").compute(sums), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_humanline_dpo_clips_the_log_ratio_of_every_token() -> None:
    """Bounds -1 and 2, beta 1. Chosen: log-ratios 3 and -3, clipped to 2 and -1: c = 1, where the sum would be 0.

    Rejected: 0.5, within the bounds, and padding: d = 0.5. h = 0.5. No gradient flows to a clipped token.
    """
    chosen, rejected = numbers(-1, -5), numbers(-1, 0)
    losses, *rewards = computed("dpo-humanline", chosen[None], rejected[None], numbers(-4, -2)[None],
                                numbers(-1.5, 0)[None], beta=1.0, log_epsilon_P=-1.0, log_epsilon_R=2.0)
    close(losses, math.log(1 + math.exp(-0.5)))
    close(rewards[0], 1)
    close(rewards[1], 0.5)
    by_chosen, by_rejected = torch.autograd.grad(losses.sum(), [chosen, rejected])
    close(by_chosen, 0, 0)
    close(by_rejected[:1], 1 / (1 + math.exp(0.5)))


# f-divergences --------------------------------------------------------------------------------------------------------

def test_forward_kl_dpo_has_rewards_of_one_minus_the_inverse_ratio() -> None:
    """f(u) = -log u, f'(u) - f'(1) = 1 - 1/u. Log-ratios ln 2, -ln 2: u = 2, 1/2; c = 1/2, d = -1; h = 3/2.

    Slopes: dc/dr = 1/u = 1/2, dd/dr = 2, times s(-3/2).
    """
    slope = 1 / (1 + math.exp(1.5))
    assert_pairs("dpo-forward-kl", [(LN2, -LN2)], [math.log(1 + math.exp(-1.5))], [(-slope / 2, 2 * slope)],
                 rewards=[(1 / 2, -1)], beta=1.0)


def test_js_dpo_has_rewards_of_at_most_log_two() -> None:
    """f'(u) = log(2u / (1 + u)). Log-ratios ln 3 and 0: c = log 6/4, d = 0; s(h) = 3/5, L = log 5/3.

    Slopes: dr -> s(-r) = 1/4 and 1/2, times s(-h) = 2/5.
    """
    assert_pairs("dpo-js", [(LN3, 0)], [math.log(5 / 3)], [(-1 / 10, 1 / 5)], rewards=[(math.log(1.5), 0)], beta=1.0)


def test_alpha_dpo_has_rewards_between_those_of_the_reverse_and_the_forward_kl() -> None:
    """alpha 1/2: f'(u) = 2 (1 - u^-1/2). Log-ratios 2 ln 2 and 0: u = 4, c = 2 (1 - 1/2) = 1, d = 0, h = 1.

    Slopes: u^-1/2 = 1/2 and 1, times s(-1).
    """
    slope = 1 / (1 + math.e)
    assert_pairs("dpo-alpha", [(2 * LN2, 0)], [math.log(1 + 1 / math.e)], [(-slope / 2, slope)], rewards=[(1, 0)],
                 beta=1.0, alpha=0.5)


@pytest.mark.parametrize(("alpha", "name", "tolerance"), [(1.0, "dpo-forward-kl", 1e-12), (1e-7, "dpo", 1e-5)])
def test_alpha_dpo_ends_in_the_forward_and_the_reverse_kl(alpha: float, name: str, tolerance: float) -> None:
    """(1 - u^-alpha) / alpha: 1 - 1/u at 1, and r + O(alpha r^2) towards 0."""
    values = drawn(loss_trainer("dpo"))
    results = loss_trainer("dpo-alpha", alpha=alpha).compute(values)
    for value, expected in zip(results, loss_trainer(name).compute(values), strict=True):
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


# Without a reference --------------------------------------------------------------------------------------------------

def test_sft_is_minus_the_log_prob() -> None:
    """log p = -3.5 and -0.25: losses 3.5 and 0.25, and each a slope of -1."""
    logps = numbers(-3.5, -0.25)
    losses, *rewards = computed("sft", logps)
    close(losses, 3.5, 0.25)
    assert_slopes(losses, (logps, [-1, -1]))
    assert rewards == [None, None]


def test_slic_is_a_hinge_on_log_probs_and_a_share_of_sft() -> None:
    """beta 1, lambda 0.1. Chosen -10, -10, -9 against rejected -10, -11, -11: hinges max(0, 1), max(0, 0), max(0, -1).

    With 0.1 times 10, 10, 9: 2, 1, 0.9. At the kink, the second, the gradient is the active side's.
    """
    chosen, rejected = numbers(-10, -10, -9), numbers(-10, -11, -11)
    losses, *rewards = computed("slic", chosen, rejected, beta=1.0, lambda_coef=0.1)
    close(losses, 2, 1, 0.9)
    assert_slopes(losses, (chosen, [-1.1, -1.1, -0.1]), (rejected, [1, 1, 0]))
    close(rewards[0], -10, -10, -9)
    close(rewards[1], -10, -11, -11)


def test_orpo_adds_the_log_odds_ratio_to_sft() -> None:
    """p = 3/4 against 1/2: odds 3 and 1, odds ratio 3. L = log 4/3 + 1/4 log 4/3; rewards ln 3 and 0.

    dlog odds/dlog p = 1 / (1 - p): 4 and 2. Slopes: -1 - 1/4 * 1/4 * 4 = -1.25; 1/4 * 1/4 * 2 = 1/8.
    """
    chosen, rejected = numbers(math.log(3 / 4)), numbers(math.log(1 / 2))
    losses, *rewards = computed("orpo", chosen, rejected, OR_scale=0.25)
    close(losses, 1.25 * WON)
    assert_slopes(losses, (chosen, [-1.25]), (rejected, [1 / 8]))
    close(rewards[0], LN3)
    close(rewards[1], 0)


def test_orpo_is_finite_at_a_probability_of_one_and_exact_beside_it() -> None:
    """log p = 0: the odds are infinite, taken as those of p = 1 - 1e-8; against odds e^-1 / (1 - e^-1) = 1 / (e - 1).

    log p = -1e-4 in float32, where 1 - p loses 3 digits: log odds = -1e-4 - log(1 - e^-1e-4) = 9.2102904 to 1e-6; on
    both sides L = 1e-4 + 1/4 log 2. log p = -100: log odds -100, L = 100 + 1/4 log 2.
    """
    chosen = torch.tensor([0, -1e-9, -1e-4, -100], requires_grad=True)
    rejected = torch.tensor([-1, -1, -1e-4, -100], requires_grad=True)
    losses, chosen_rewards, rejected_rewards = computed("orpo", chosen, rejected, OR_scale=0.25)
    assert chosen_rewards is not None and rejected_rewards is not None
    assert losses.tolist() == pytest.approx([0, 0, 1e-4 + LN2 / 4, 100 + LN2 / 4], rel=1e-6, abs=1e-8)
    assert chosen_rewards[:2].tolist() == pytest.approx([-math.log(1e-8)] * 2, rel=1e-6)
    log_odds = -1e-4 - math.log(-math.expm1(-1e-4))
    assert [chosen_rewards[2].item(), rejected_rewards[2].item()] == pytest.approx([log_odds] * 2, rel=1e-6)
    assert chosen_rewards[3].item() == -100
    assert rejected_rewards[0].item() == pytest.approx(-math.log(math.e - 1), rel=1e-6)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(losses.sum(), [chosen, rejected]))


def test_simpo_asks_for_a_margin_of_gamma() -> None:
    """beta 2, gamma 1, mean log-probs -2 + (1 + ln 3) / 2 and -2: 2 (p_c - p_r) - 1 = ln 3. Slopes -2/4, 2/4."""
    chosen, rejected = numbers(-2 + (1 + LN3) / 2), numbers(-2)
    losses, *rewards = computed("simpo", chosen, rejected, beta=2.0, gamma=1.0)
    close(losses, WON)
    assert_slopes(losses, (chosen, [-0.5]), (rejected, [0.5]))
    close(rewards[0], -3 + LN3)
    close(rewards[1], -4)


def test_cpo_is_dpo_against_a_uniform_reference_and_a_share_of_sft() -> None:
    """beta 0.1, log-probs -20 + 10 ln 3 and -20: log 4/3; 1.0 times a mean log-prob of -2 more. Slopes 0.1 / 4, -1."""
    chosen, rejected, mean = numbers(-20 + 10 * LN3), numbers(-20), numbers(-2)
    losses, *rewards = computed("cpo", chosen, rejected, mean)
    close(losses, WON + 2)
    assert_slopes(losses, (chosen, [-0.025]), (rejected, [0.025]), (mean, [-1]))
    close(rewards[0], -2 + LN3)
    close(rewards[1], -2)


def test_cpo_simpo_is_simpo_and_sft() -> None:
    """As SimPO above, log 4/3, and 1.0 times the mean log-prob of the chosen, here -3, more."""
    losses, *_ = computed("cpo-simpo", numbers(-2 + (1 + LN3) / 2), numbers(-2), numbers(-3))
    close(losses, WON + 3)


def test_bradley_terry_is_the_log_odds_of_the_better_score() -> None:
    """Scores ln 3 and 0: P = 3/4, L = log 4/3, slope -1/4. Scores 0 and ln 3: L = log 4, slope -3/4."""
    chosen, rejected = numbers(LN3, 0), numbers(0, LN3)
    losses, *rewards = computed("bradley-terry", chosen, rejected)
    close(losses, WON, LOST)
    close(rewards[0], LN3, 0)
    close(rewards[1], 0, LN3)
    assert_slopes(losses, (chosen, [-0.25, -0.75]), (rejected, [0.25, 0.75]))


def test_bradley_terry_asks_for_its_margin() -> None:
    """Margin 2, scores 2 + ln 3 and 0: L = log 4/3; the rewards are the scores."""
    losses, chosen_rewards, _ = computed("bradley-terry", numbers(2 + LN3), numbers(0), margin=2.0)
    close(losses, WON)
    close(chosen_rewards, 2 + LN3)
