"""Losses of single completions that are desirable or not: KTO and its relatives.

Rewards are beta * (policy - reference log-prob): c of a desirable completion, d of an undesirable one. w_D and w_U are
`desirable_weight` and `undesirable_weight`, which every loss here applies by `weigh`; s is the sigmoid.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from arguments import Losses
from losses.paired import HumanlineDPOTrainer, perceived
from scoring import UnpairedPreferenceTrainer


class KTOTrainer(UnpairedPreferenceTrainer):
    """Kahneman-Tversky Optimization (Ethayarajh et al., 2024, eq. 7).

        L = w_D (1 - s(c - z))  for a desirable completion
            w_U (1 - s(z - d))  for an undesirable one
        z = beta max(0, mean log-ratio of the batch's mismatched pairs), a constant
    """

    def loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, policy_KL_logps: Tensor,
             reference_chosen_logps: Tensor, reference_rejected_logps: Tensor,
             reference_KL_logps: Tensor) -> Losses:
        beta = self.config.loss.beta
        z = beta * (policy_KL_logps - reference_KL_logps).mean().clamp(min=0).detach()
        return self.against(z, z, beta * (policy_chosen_logps - reference_chosen_logps),
                            beta * (policy_rejected_logps - reference_rejected_logps))

    def against(self, chosen_point: Tensor, rejected_point: Tensor, chosen: Tensor, rejected: Tensor) -> Losses:
        """The losses of (n,) and (m,) rewards, each class measured against its reference point."""
        return (self.weigh(self.shortfall(chosen - chosen_point), self.shortfall(rejected_point - rejected)), chosen,
                rejected)

    def shortfall(self, gain: Tensor) -> Tensor:
        return F.sigmoid(-gain)  # 1 - s(gain), without the cancellation


class KTOLogSigmoidTrainer(KTOTrainer):
    """KTO with a log outside (Ethayarajh et al., 2023): -log s instead of 1 - s."""

    def shortfall(self, gain: Tensor) -> Tensor:
        return -F.logsigmoid(gain)


class KTOZeroTrainer(KTOTrainer):
    """KTO with the reference point 0 (Ethayarajh et al., 2023): unpaired APO-zero (D'Oosterlinck et al., 2024)."""

    def loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
             reference_rejected_logps: Tensor) -> Losses:
        beta = self.config.loss.beta
        return self.of_rewards(beta * (policy_chosen_logps - reference_chosen_logps),
                               beta * (policy_rejected_logps - reference_rejected_logps))

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Losses:
        zero = chosen.new_zeros(())
        return self.against(zero, zero, chosen, rejected)


class SimpleKTOTrainer(KTOZeroTrainer):
    """KTO against the other class (Ethayarajh et al., 2023): z = max(0, its mean reward in the batch), no constant.

    It is 0 where the other class is absent.
    """

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Losses:
        return self.against(self.point(rejected), self.point(chosen), chosen, rejected)

    def point(self, rewards: Tensor) -> Tensor:
        return rewards.sum().clamp(min=0) / max(len(rewards), 1)


class BCOTrainer(KTOZeroTrainer):
    """Binary Classifier Optimization of single completions (Jung et al., 2024).

        L = -w_D log s(c - delta),  -w_U log s(delta - d)

    delta is the mean over the classes in the batch of their mean rewards, a constant; the paper keeps a running mean,
    and may weight prompts that one class lacks, which is left out here.
    """

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Losses:
        delta = torch.stack([rewards.mean().detach() for rewards in (chosen, rejected) if len(rewards)]).mean()
        return self.against(delta, delta, chosen, rejected)

    def shortfall(self, gain: Tensor) -> Tensor:
        return -F.logsigmoid(gain)


class AOTUnpairedTrainer(KTOZeroTrainer):
    """Alignment via Optimal Transport, unpaired (Melnyk et al., 2024).

        L = -log s(c_(q) - d_(q))

    of the q-quantiles of the batch's desirable and undesirable rewards; a completion's loss is the mean over the q that
    it stands for. With as many of each, the i-th in order meets the i-th. Where a class is absent, L is 0.
    """

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Losses:
        n, m = len(chosen), len(rejected)
        share = overlap(n, m, chosen)
        gaps = F.logsigmoid(chosen.sort().values[:, None] - rejected.sort().values)  # (n, m)
        by_chosen, by_rejected = -n * (share * gaps).sum(1), -m * (share * gaps).sum(0)
        return (self.weigh(by_chosen[chosen.argsort().argsort()], by_rejected[rejected.argsort().argsort()]), chosen,
                rejected)


def overlap(n: int, m: int, like: Tensor) -> Tensor:
    """(n, m): how much of [0, 1] is in the i-th of n and in the j-th of m equal parts of it."""
    first, second = torch.arange(n, device=like.device)[:, None], torch.arange(m, device=like.device)
    shared = torch.minimum((first + 1) * m, (second + 1) * n) - torch.maximum(first * m, second * n)
    return shared.clamp(min=0).to(like.dtype) / max(n * m, 1)


class KTOSurprisalTrainer(KTOTrainer):
    """KTO without a reference model (Ethayarajh et al., 2023), on mean log-probs.

    Rewards are beta * mean log-prob; z is the mean of that over the batch's mismatched pairs, a constant, not clamped.
    """

    def loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor,
             policy_KL_logps: Tensor) -> Losses:
        beta = self.config.loss.beta
        z = beta * policy_KL_logps.mean().detach()
        return self.against(z, z, beta * policy_chosen_logps, beta * policy_rejected_logps)


class HumanlineKTOTrainer(KTOTrainer):
    """KTO of perceived log-ratios, clipped at every token (Humanline; Liu et al., 2025)."""

    limits: ClassVar = HumanlineDPOTrainer.limits

    def loss(self, policy_chosen_token_logps: Tensor, policy_rejected_token_logps: Tensor,
             policy_KL_token_logps: Tensor, reference_chosen_token_logps: Tensor,
             reference_rejected_token_logps: Tensor, reference_KL_token_logps: Tensor) -> Losses:
        cfg = self.config.loss
        return super().loss(perceived(policy_chosen_token_logps, reference_chosen_token_logps, cfg),
                            perceived(policy_rejected_token_logps, reference_rejected_token_logps, cfg),
                            perceived(policy_KL_token_logps, reference_KL_token_logps, cfg),
                            *(logps.sum(1) for logps in (reference_chosen_token_logps, reference_rejected_token_logps,
                                                         reference_KL_token_logps)))
