"""Losses of pairs that hold the policy to a reference: DPO and its relatives.

`RewardsTrainer` computes what they share, the rewards c and d of the chosen and the rejected completion; a loss says in
`of_rewards` what it makes of them. Below, h = c - d is the margin and s the sigmoid.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from arguments import Losses
from scoring import PairedPreferenceTrainer


class RewardsTrainer(PairedPreferenceTrainer):
    """Losses of a pair's rewards, beta * (policy - reference log-prob)."""

    def loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
             reference_rejected_logps: Tensor) -> Losses:
        beta = self.config.loss.beta
        chosen_rewards = beta * self.link(policy_chosen_logps - reference_chosen_logps)
        rejected_rewards = beta * self.link(policy_rejected_logps - reference_rejected_logps)
        return self.of_rewards(chosen_rewards, rejected_rewards), chosen_rewards, rejected_rewards

    def link(self, logratios: Tensor) -> Tensor:
        return logratios

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """(B,) losses of (B,) rewards."""
        raise NotImplementedError


class DPOTrainer(RewardsTrainer):
    """Direct Preference Optimization (Rafailov et al., 2023, eq. 7).

        L = -log s(h)

    With `mean_logps` it is length-normalised DPO (`dpo-norm`; Lambert et al., 2024, Tulu 3).
    """

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -F.logsigmoid(chosen - rejected)


class DPOSigmoidTrainer(RewardsTrainer):
    """DPO without the log (Ethayarajh et al., 2023): L = -s(h)."""

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -F.sigmoid(chosen - rejected)


class CDPOTrainer(RewardsTrainer):
    """Conservative DPO: labels are wrong with probability epsilon (Mitchell, 2023, eq. 3).

        L = -(1 - epsilon) log s(h) - epsilon log s(-h)
    """

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        epsilon, margins = self.config.loss.epsilon, chosen - rejected
        return -(1 - epsilon) * F.logsigmoid(margins) - epsilon * F.logsigmoid(-margins)


class RobustDPOTrainer(RewardsTrainer):
    """DPO whose expectation under labels that are wrong with probability epsilon is clean (Chowdhury et al., 2024).

        L = (-(1 - epsilon) log s(h) + epsilon log s(-h)) / (1 - 2 epsilon)
    """

    limits: ClassVar = {"epsilon": (0, 0.5)}

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        epsilon, margins = self.config.loss.epsilon, chosen - rejected
        return (epsilon * F.logsigmoid(-margins) - (1 - epsilon) * F.logsigmoid(margins)) / (1 - 2 * epsilon)


class IPOTrainer(RewardsTrainer):
    """Identity Preference Optimization (Azar et al., 2023, eq. 17), on mean log-probs where the paper has sums.

        L = (h / beta - 1 / (2 beta))^2
    """

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return ((chosen - rejected - 0.5) / self.config.loss.beta).square()


class HingeTrainer(RewardsTrainer):
    """A hinge on the margin, SLiC with log-ratios (Liu et al., 2023, Statistical Rejection Sampling).

        L = max(0, 1 - h)
    """

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return F.relu(1 - (chosen - rejected))


class EXOTrainer(RewardsTrainer):
    """Efficient Exact Optimization of preferences: a reverse KL to the smoothed labels (Ji et al., 2024).

        L = s(h) (log s(h) - log(1 - epsilon)) + s(-h) (log s(-h) - log epsilon)
    """

    limits: ClassVar = {"epsilon": (0, 1)}

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        epsilon, margins = self.config.loss.epsilon, chosen - rejected
        return (F.sigmoid(margins) * (F.logsigmoid(margins) - math.log1p(-epsilon))
                + F.sigmoid(-margins) * (F.logsigmoid(-margins) - math.log(epsilon)))


class NCATrainer(RewardsTrainer):
    """Noise Contrastive Alignment of pairs: rewards are held up, not margins alone (Chen et al., 2024).

        L = -log s(c) - 1/2 log s(-c) - 1/2 log s(-d)
    """

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


class SPPOTrainer(RewardsTrainer):
    """Self-Play Preference Optimization with hard labels, eta = 1 / beta (Wu et al., 2024).

        L = (c / beta - 1 / (2 beta))^2 + (d / beta + 1 / (2 beta))^2
    """

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        beta = self.config.loss.beta
        return ((chosen - 0.5) / beta).square() + ((rejected + 0.5) / beta).square()


class APOZeroTrainer(RewardsTrainer):
    """Anchored Preference Optimization, up with the chosen and down with the rejected (D'Oosterlinck et al., 2024).

        L = 1 - s(c) + s(d)
    """

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return F.sigmoid(-chosen) + F.sigmoid(rejected)


class APODownTrainer(RewardsTrainer):
    """Anchored Preference Optimization for chosen answers that are worse than the policy's own (ibid.).

        L = s(c) + 1 - s(h)                                                         (D'Oosterlinck et al., 2024)
    """

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return F.sigmoid(chosen) + F.sigmoid(rejected - chosen)


class DiscoPOPTrainer(RewardsTrainer):
    """A loss that a language model discovered, logistic and exponential in turn (Lu et al., 2024).

        L = (1 - m) (-log s(h)) + m e^-h,    m = s(h / tau)

    m e^-h is computed as e^(log s(h / tau) - h), which is finite for every h where tau < 1.
    """

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        margins = chosen - rejected
        scaled = margins / self.config.loss.tau
        return -F.sigmoid(-scaled) * F.logsigmoid(margins) + (F.logsigmoid(scaled) - margins).exp()


class BCOPairTrainer(RewardsTrainer):
    """Binary Classifier Optimization on pairs (Jung et al., 2024).

        L = -log s(c - delta) - log s(delta - d)

    delta is the mean reward of the batch, a constant. The paper keeps a running mean; here a loss has no memory, so
    that an evaluation repeats it.
    """

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        delta = (chosen + rejected).mean().detach() / 2
        return -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)


# Other log-probs than sums --------------------------------------------------------------------------------------------

class AOTTrainer(PairedPreferenceTrainer):
    """Alignment via Optimal Transport, paired: one distribution dominates the other (Melnyk et al., 2024).

        L = -log s(beta (u_(i) - v_(i)))

    u and v: the policy's and the reference's chosen - rejected log-probs, each sorted over the batch. The loss of rank
    i is that of the pair whose u has rank i.
    """

    def loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
             reference_rejected_logps: Tensor) -> Losses:
        beta = self.config.loss.beta
        u, v = policy_chosen_logps - policy_rejected_logps, reference_chosen_logps - reference_rejected_logps
        ranks = u.argsort().argsort()
        return (-F.logsigmoid(beta * (u - v.sort().values[ranks])),
                beta * (policy_chosen_logps - reference_chosen_logps),
                beta * (policy_rejected_logps - reference_rejected_logps))


class LengthDesensitisedDPOTrainer(DPOTrainer):
    """DPO in which tokens beyond the shorter answer's length count alpha times (LD-DPO; Liu et al., 2024)."""

    def loss(self, policy_chosen_token_logps: Tensor, policy_rejected_token_logps: Tensor,
             reference_chosen_token_logps: Tensor, reference_rejected_token_logps: Tensor, chosen_lengths: Tensor,
             rejected_lengths: Tensor) -> Losses:
        shared = torch.minimum(chosen_lengths, rejected_lengths)
        return super().loss(*(self.desensitised(token_logps, shared) for token_logps in (
            policy_chosen_token_logps, policy_rejected_token_logps, reference_chosen_token_logps,
            reference_rejected_token_logps)))

    def desensitised(self, token_logps: Tensor, shared: Tensor) -> Tensor:
        """(B,) from (B, T): the first `shared` tokens' log-probs, and alpha times the others'."""
        beyond = torch.arange(token_logps.shape[1], device=shared.device) >= shared[:, None]
        return torch.where(beyond, self.config.loss.alpha * token_logps, token_logps).sum(1)


class HumanlineDPOTrainer(DPOTrainer):
    """DPO of perceived log-ratios, clipped at every token (Humanline; Liu et al., 2025)."""

    limits: ClassVar = {"log_epsilon_P": (-math.inf, 0), "log_epsilon_R": (0, math.inf)}

    def loss(self, policy_chosen_token_logps: Tensor, policy_rejected_token_logps: Tensor,
             reference_chosen_token_logps: Tensor, reference_rejected_token_logps: Tensor) -> Losses:
        return super().loss(perceived(policy_chosen_token_logps, reference_chosen_token_logps, self.config.loss),
                            perceived(policy_rejected_token_logps, reference_rejected_token_logps, self.config.loss),
                            reference_chosen_token_logps.sum(1), reference_rejected_token_logps.sum(1))


def perceived(policy: Tensor, reference: Tensor, cfg: Any) -> Tensor:
    """(B,) from (B, T): the policy's log-prob with every token's log-ratio within log_epsilon_P and log_epsilon_R."""
    return (reference + (policy - reference).clamp(cfg.log_epsilon_P, cfg.log_epsilon_R)).sum(1)


# f-divergences other than the reverse KL ------------------------------------------------------------------------------

LARGEST_EXPONENT = 30.0  # e^30 is far beyond any ratio that training meets, and its square is finite in float32


class ForwardKLDPOTrainer(DPOTrainer):
    """f-DPO with the forward KL divergence (Wang et al., 2023, table 1): f'(u) - f'(1) = 1 - 1 / u, u = e^r.

    1 / u is taken as e^30 at most.
    """

    def link(self, logratios: Tensor) -> Tensor:
        return -torch.expm1((-logratios).clamp(max=LARGEST_EXPONENT))


class JSDPOTrainer(DPOTrainer):
    """f-DPO with the Jensen-Shannon divergence (Wang et al., 2023, table 1): f'(u) = log(2 u / (1 + u)), u = e^r."""

    def link(self, logratios: Tensor) -> Tensor:
        return math.log(2) + F.logsigmoid(logratios)


class AlphaDPOTrainer(DPOTrainer):
    """f-DPO with an alpha divergence (Wang et al., 2023, table 1): f'(u) = (1 - u^-alpha) / alpha, u = e^r.

    u^-alpha is taken as e^30 at most.
    """

    limits: ClassVar = {"alpha": (0, math.inf)}

    def link(self, logratios: Tensor) -> Tensor:
        alpha = self.config.loss.alpha
        return -torch.expm1((-alpha * logratios).clamp(max=LARGEST_EXPONENT)) / alpha
