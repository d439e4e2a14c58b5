"""Offline PPO: one step, the rewards given by the data, the reference as the policy that is said to have acted."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arguments import TRAINED
from distributed import my_turns, ranks
from loop import BasicTrainer, Batch
from metrics import Metrics
from policy import Found, by_item, score
from scoring import scored
from sequences import Rows, cut_into_microbatches
from settings import LOSS, OPTIONS
from utils import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

Item = tuple[int, str]  # number of the group, role
KINDS = ("token_logps", "values", "entropies")


class PPOTrainer(BasicTrainer):
    """Proximal Policy Optimization (Schulman et al., 2017, eq. 7), offline (Ethayarajh et al., 2023).

        L = mean max(-A rho, -A clamp(rho, c, 1/c)) + critic_coef / 2 mean (V - G)^2
            + KL_coef mean(reference - policy log-prob)

    Means over the scored tokens of a batch; rho = policy / reference probability of a token, c = cliprange. The reward
    is +1 (chosen) or -1 (rejected), at the last token. Advantages A, whitened over the batch, and returns G are those
    of before the first of `ppo_epochs` optimizer steps on the same batches.
    """

    @classmethod
    def reference_roles(cls) -> list[str]:
        return list(TRAINED)

    @classmethod
    def check(cls, config: "DictConfig") -> None:
        cfg = config.loss
        for key in ("use_reference_model", "value_head"):
            if not cfg[key]:
                raise UserError(f"loss.{key}: PPO needs it; set it to true in config/loss/{cfg.name}.yaml")
        for key in OPTIONS:
            if cfg[key] != LOSS[key]:
                raise UserError(f"loss.{key}: got {cfg[key]}, allowed is {LOSS[key]} for {cfg.name}: PPO has no such "
                                "option")
        if not 0 < cfg.cliprange <= 1:
            raise UserError(f"loss.cliprange: got {cfg.cliprange}, allowed is a number above 0, at most 1; ratios are "
                            "clipped to [cliprange, 1 / cliprange]")
        for key in ("gamma", "lam"):
            if not 0 <= cfg[key] <= 1:
                raise UserError(f"loss.{key}: got {cfg[key]}, allowed is a number from 0 to 1")
        if cfg.ppo_epochs < 1:
            raise UserError(f"loss.ppo_epochs: got {cfg.ppo_epochs}, allowed is a whole number of at least 1")

    def steps(self, window: list[Batch]) -> Iterator[Metrics]:
        """`ppo_epochs` optimizer steps on the window's batches."""
        self.rollouts = {id(batch): self.rollout(batch) for batch in window}
        for epoch in range(self.config.loss.ppo_epochs):
            yield self.step(window, again=epoch > 0)

    def accumulate(self, batch: Batch, total: int) -> Metrics:
        rollout, metrics = self.rollouts[id(batch)], Metrics()
        for rows, counts in my_turns(self.microbatches(batch)):
            loss, measured = self.measure(rows, rollout, self.policy(rows, KINDS))
            (loss * (counts * ranks() * len(batch) / total)).backward()  # the ranks' gradients will be averaged
            if counts:
                metrics.merge(measured)
        return self.named(batch, metrics.of_all_ranks(), "train")

    def get_batch_metrics(self, batch: Batch, mode: str) -> tuple[Tensor, Metrics]:
        found, metrics, losses = score(self.policy, batch, TRAINED, KINDS, self.budget, self.share), Metrics(), []
        rollout = self.rollout(batch, found["values"])
        for rows in self.microbatches(batch):
            loss, measured = self.measure(rows, rollout, {kind: torch.cat([found[kind][item] for item in rows.items])
                                                          for kind in KINDS})
            losses.append(loss)
            metrics.merge(measured)
        return torch.stack(losses).sum(), self.named(batch, metrics, mode)

    def microbatches(self, batch: Batch) -> list[Rows]:
        return cut_into_microbatches(batch, TRAINED, self.budget, share=self.share, window=self.policy.window,
                                     ranks=ranks())

    def rollout(self, batch: Batch, values: Mapping[Item, Tensor] | None = None) -> Found:
        """What is computed once a batch: reference log-probs, advantages, returns and values, (T,) a completion.

        values: the value head's, where they are known.
        """
        assert self.reference is not None
        cfg = self.config.loss
        reference = scored(self.reference, batch, TRAINED, ["token_logps"], self.budget, self.share)["token_logps"]
        values = dict(values or score(self.policy, batch, TRAINED, ["values"], self.budget, self.share)["values"])
        rewards = {item: last_token_reward(value, 1.0 if item[1] == "chosen" else -1.0)
                   for item, value in values.items()}
        raw = {item: advantages(rewards[item], value, cfg.gamma, cfg.lam) for item, value in values.items()}
        every = torch.cat(list(raw.values()))
        spread = (every.var(correction=0) + 1e-8).sqrt()
        return {"reference": reference, "values": values, "raw": raw,
                "weights": {item: torch.full_like(value, batch[item[0]].weight) for item, value in values.items()},
                "advantages": {item: (value - every.mean()) / spread for item, value in raw.items()},
                "returns": {item: discounted(reward, cfg.gamma) for item, reward in rewards.items()}}

    def measure(self, rows: Rows, rollout: Found, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """These rows' part of the batch's loss, and their sums; outputs: (S,) of each kind."""
        cfg, n_tokens = self.config.loss, sum(map(len, rollout["values"].values()))

        def here(kind: str) -> Tensor:
            return torch.cat([rollout[kind][item] for item in rows.items])

        A, logratios = here("advantages"), outputs["token_logps"] - here("reference")
        rho = logratios.exp()
        free, clipped = -A * rho, -A * rho.clamp(cfg.cliprange, 1 / cfg.cliprange)
        policy, critic = torch.maximum(free, clipped), 0.5 * (outputs["values"] - here("returns")).square()
        total = here("weights") * (policy + cfg.critic_coef * critic - cfg.KL_coef * logratios)
        metrics = Metrics()
        for name, values in (("loss/total", total), ("loss/policy", policy), ("loss/critic", critic),
                             ("loss/entropy", outputs["entropies"]), ("loss/policykl", -logratios),
                             ("clipfrac/policy", clipped > free), ("returns", here("raw") + here("values")),
                             ("val", here("values")),
                             ("loss/seqratio", torch.stack([part.sum().exp() for part in by_item(
                                 rows, "token_logps", logratios.detach()).values()]))):
            metrics.add(name, values)
        return total.sum() / n_tokens, metrics

    def named(self, batch: Batch, metrics: Metrics, mode: str) -> Metrics:
        """Under the names that users know, with one loss a batch, weighted by its examples."""
        suffix, named = "" if mode == "train" else "_eval", Metrics()
        named.add(f"loss/{mode}", torch.full((len(batch),), metrics.means()["loss/total"], dtype=torch.float64))
        for name, (n, total, squares) in metrics.sums.items():
            if name in ("returns", "val"):
                named.add(f"{name}/mean{suffix}", total / n)
                named.add(f"{name}/var{suffix}", squares / n - (total / n) ** 2)
            else:
                named.sums[name + suffix] = (n, total, squares)
        return named


def last_token_reward(like: Tensor, reward: float) -> Tensor:
    """(T,): the reward at the last token, 0 before it."""
    rewards = torch.zeros_like(like)
    rewards[-1] = reward
    return rewards


def advantages(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantages, (T,) (Schulman et al., 2016, eq. 16): A_t = delta_t + gamma lam A_(t+1).

    delta_t = reward_t + gamma V_(t+1) - V_t; after the last token V and A are 0.
    """
    following = torch.cat([values[1:], values.new_zeros(1)])
    return discounted(rewards + gamma * following - values, gamma * lam)


def discounted(rewards: Tensor, gamma: float) -> Tensor:
    """(T,): G_t = sum over k >= 0 of gamma^k reward_(t+k)."""
    sums: Sequence[Any] = list(accumulate(reversed(rewards.tolist()), lambda later, now: now + gamma * later))
    return rewards.new_tensor(sums[::-1])
