"""The way that papers' scripts train, in plain torch: padded batches, full logits, a second model as the reference.

It is what the benchmarks call naive. Chosen and rejected stand in one padded batch, a sequence each, and log-probs are
gathered from the log-softmax of all its logits. Rows are those of the product's loaders, as dictionaries.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.ppo import advantages, discounted, last_token_reward

Row = dict[str, Any]  # prompt: ids, completions: role -> ids
IGNORED = -100


@dataclass(frozen=True)
class Ways:
    """What a ladder changes, a rung at a time."""

    scored_only: bool = False  # logits where a completion's id is next, and nowhere else
    kl_graph: bool = False  # KL pairs in the same pass as what is trained on, though no gradient comes from them


class Naive:
    """Steps of sft, dpo, kto or ppo."""

    def __init__(self, loss: str, config: Any, lm: Any, reference: Any, ways: Ways, *,
                 value_head: nn.Module | None = None) -> None:
        """reference: a second model, or None where the loss wants none. value_head: PPO's."""
        self.loss: Callable[[Sequence[Row]], Tensor] = getattr(self, loss)
        self.settings, self.lm, self.reference, self.ways = config.loss, lm, reference, ways
        self.value_head = value_head
        self.clipped: list[tuple[nn.Module, float]] = [(lm, config.model.max_grad_norm)]
        if value_head is not None:
            self.clipped.append((value_head, config.model.v_head_max_grad_norm))
        self.optimizer = getattr(torch.optim, config.optimizer)(
            [p for module, _ in self.clipped for p in module.parameters()], lr=config.lr)
        self.facts: dict[str, float] = {}

    def step(self, batch: Sequence[Row]) -> dict[str, float]:
        self.facts = {}
        loss = self.loss(batch)
        loss.backward()
        norms = [float(nn.utils.clip_grad_norm_(module.parameters(), limit)) for module, limit in self.clipped]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item(), **self.facts, "grad_norm": sum(norms)}

    def sft(self, batch: Sequence[Row]) -> Tensor:
        logps, scored = self.forward(self.lm, sequences(batch, "chosen"))
        self.facts["tokens"] = int(scored.sum())
        return -self.note("chosen", logps.sum(1)).mean()

    def dpo(self, batch: Sequence[Row]) -> Tensor:
        both = [*sequences(batch, "chosen"), *sequences(batch, "rejected")]
        chosen, rejected = self.logps(self.lm, both).chunk(2)
        with torch.no_grad():
            reference_chosen, reference_rejected = self.logps(self.reference, both).chunk(2)
        margins = self.note("chosen", chosen) - reference_chosen - self.note("rejected", rejected) + reference_rejected
        return -F.logsigmoid(self.settings.beta * margins).mean()

    def kto(self, batch: Sequence[Row]) -> Tensor:
        chosen, rejected, mismatched = (sequences(batch, role) for role in ("chosen", "rejected", "KL"))
        own, n = [*chosen, *rejected], len(chosen)
        if self.ways.kl_graph:
            policy, kl = self.logps(self.lm, [*own, *mismatched]).split([len(own), len(mismatched)])
        else:
            policy = self.logps(self.lm, own)
            with torch.no_grad():
                kl = self.logps(self.lm, mismatched)
        with torch.no_grad():
            reference, reference_kl = self.logps(self.reference, own), self.logps(self.reference, mismatched)
        z = self.settings.beta * (kl - reference_kl).mean().clamp(min=0).detach()
        rewards = self.settings.beta * (policy - reference)
        self.note("chosen", policy[:n])
        self.note("rejected", policy[n:])
        return torch.cat([self.settings.desirable_weight * F.sigmoid(z - rewards[:n]),
                          self.settings.undesirable_weight * F.sigmoid(rewards[n:] - z)]).mean()

    def ppo(self, batch: Sequence[Row]) -> Tensor:
        """Chosen first; a pass of the policy for the values of before, one of the reference, and one with a graph."""
        cfg, chosen = self.settings, sequences(batch, "chosen")
        parts = [*chosen, *sequences(batch, "rejected")]
        with torch.no_grad():
            before, scored = self.values(parts)
            reference, _ = self.forward(self.reference, parts)
        rewards = [last_token_reward(values[mine], 1.0 if i < len(chosen) else -1.0)
                   for i, (values, mine) in enumerate(zip(before, scored, strict=True))]
        A = torch.cat([advantages(reward, values[mine], cfg.gamma, cfg.lam)
                       for reward, values, mine in zip(rewards, before, scored, strict=True)])
        A = (A - A.mean()) / (A.var(correction=0) + 1e-8).sqrt()
        returns = torch.cat([discounted(reward, cfg.gamma) for reward in rewards])
        logps, _, hidden = self.forward_with_hidden(self.lm, parts)
        assert self.value_head is not None
        values = self.value_head(hidden.detach().float())[..., 0]
        logratios, values = (logps - reference)[scored], values[scored]
        rho = logratios.exp()
        policy = torch.maximum(-A * rho, -A * rho.clamp(cfg.cliprange, 1 / cfg.cliprange))
        self.facts["tokens"] = int(scored.sum())
        return (policy + cfg.critic_coef * 0.5 * (values - returns).square() - cfg.KL_coef * logratios).mean()

    def note(self, role: str, logps: Tensor) -> Tensor:
        if len(logps):
            self.facts[role] = logps.detach().mean().item()
        return logps

    def logps(self, lm: Any, parts: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """(n,)"""
        return self.forward(lm, parts)[0].sum(1) if parts else torch.zeros(0)

    def values(self, parts: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """(n, T - 1) values of what predicts each id, and where that is scored."""
        _, scored, hidden = self.forward_with_hidden(self.lm, parts)
        assert self.value_head is not None
        return self.value_head(hidden.float())[..., 0], scored

    def forward(self, lm: Any, parts: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """(n, T - 1) log-probs of each id, 0 where it is not scored, and whether it is."""
        ids, mask, labels = padded(parts, lm.device)
        scored = labels[:, 1:] != IGNORED
        with computing(lm.device):
            if self.ways.scored_only:
                hidden = lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                logits = lm.get_output_embeddings()(hidden[:, :-1][scored]).float()
                found = logits.log_softmax(-1).gather(1, labels[:, 1:][scored][:, None])[:, 0]
                return found.new_zeros(scored.shape).masked_scatter(scored, found), scored
            logits = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        return gathered(logits, labels, scored), scored

    def forward_with_hidden(self, lm: Any, parts: Sequence[tuple[list[int], list[int]]]
                            ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and the hidden states that predict, (n, T - 1, h)."""
        ids, mask, labels = padded(parts, lm.device)
        scored = labels[:, 1:] != IGNORED
        with computing(lm.device):
            outputs = lm(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        return gathered(outputs.logits[:, :-1].float(), labels, scored), scored, outputs.hidden_states[-1][:, :-1]


def gathered(logits: Tensor, labels: Tensor, scored: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))[..., 0] * scored


def sequences(batch: Sequence[Row], role: str) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of the rows that have the role."""
    return [(row["prompt"], row["completions"][role]) for row in batch if role in row["completions"]]


def padded(parts: Sequence[tuple[list[int], list[int]]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels, (n, T) each, padded on the right; the prompt has no labels."""
    T = max(len(prompt) + len(completion) for prompt, completion in parts)
    ids, mask = torch.zeros(len(parts), T, dtype=torch.long), torch.zeros(len(parts), T, dtype=torch.long)
    labels = torch.full((len(parts), T), IGNORED)
    for row, (prompt, completion) in enumerate(parts):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor([*prompt, *completion])
        mask[row, :end] = 1
        labels[row, len(prompt):end] = torch.tensor(completion)
    return ids.to(device), mask.to(device), labels.to(device)


def computing(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 on a GPU, with float32 weights; on a CPU float32."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
