"""Sampling answers: prompts of like length together, each with random numbers of its own.

A prompt's answer depends on the weights, the seed and the prompt's number alone: not on the batch that it shares, nor
on which answer of it is finished first.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LIKELIEST = 1024  # tokens that are looked at first for the nucleus; the whole vocabulary only where they are too few


@torch.no_grad()
def sample(policy: Policy, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Sequence[int]], *, max_length: int,
           top_p: float, seed: int, stop: str, batch_size: int,
           advance: Callable[[int], object] = lambda finished: None) -> list[str]:
    """An answer to each prompt, at temperature 1, from the smallest set of tokens whose probability reaches `top_p`.

    An answer ends at EOS (which is not part of it), before `stop` (if that is not empty), or where prompt and answer
    have `max_length` ids together. advance: called with the number of answers finished since the last call.
    """
    answers: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        numbers = order[start:start + batch_size]
        batch = _Batch(policy, tokenizer, {i: list(prompts[i]) for i in numbers}, max_length, seed)
        while batch.numbers:
            finished = batch.step(top_p, stop)
            answers.update(finished)
            advance(len(finished))
    return [answers[i] for i in range(len(prompts))]


class _Batch:
    """Rows that are still being written, with the keys and values of what stands in them."""

    def __init__(self, policy: Policy, tokenizer: "PreTrainedTokenizerBase", prompts: dict[int, list[int]],
                 max_length: int, seed: int) -> None:
        from transformers import DynamicCache

        self.policy, self.tokenizer = policy, tokenizer
        self.numbers = list(prompts)  # of the prompts whose rows are in the batch, in order
        self.room = {i: max_length - len(ids) for i, ids in prompts.items()}
        assert min(self.room.values()) > 0, "a prompt leaves no room for an answer"
        self.written: dict[int, list[int]] = {i: [] for i in prompts}
        self.chance = {i: np.random.default_rng([seed, i]) for i in prompts}
        self.done: set[int] = set()
        longest = max(map(len, prompts.values()))
        # Padding stands on the left, so that all rows write at the same place.
        self.input_ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts.values()],
                                      device=policy.device)
        self.mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts.values()],
                                 device=policy.device)
        self.cache = DynamicCache(config=policy.lm.config)

    def step(self, top_p: float, stop: str) -> dict[int, str]:
        """Write a token in every row; the answers that this finishes, by number."""
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -self.input_ids.shape[1]:]
        with self.policy.computing():
            hidden = self.policy.lm.base_model(input_ids=self.input_ids, attention_mask=self.mask, use_cache=True,
                                               position_ids=positions, past_key_values=self.cache).last_hidden_state
            logits = self.policy.head(hidden[:, -1]).float()
        draws = torch.tensor([self.chance[i].random() for i in self.numbers], dtype=torch.float32)
        tokens = nucleus_draw(logits, top_p, draws.to(logits.device)).tolist()
        finished = {}
        for number, token in zip(self.numbers, tokens, strict=True):
            if number not in self.done and (text := self._write(number, token, stop)) is not None:
                finished[number] = text
                self.done.add(number)
        self.input_ids = torch.tensor(tokens, device=self.input_ids.device)[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        if len(self.done) * 4 >= len(self.numbers):
            self._drop_finished()
        return finished

    def _write(self, number: int, token: int, stop: str) -> str | None:
        """Add the token to the answer; the answer's text if it ends here."""
        ids = self.written[number]
        if token == self.tokenizer.eos_token_id:
            return self._decode(ids)
        ids.append(token)
        if stop and stop in self._decode(ids[-(len(stop.encode()) + 1):]):
            return self._decode(ids).partition(stop)[0]
        return self._decode(ids) if len(ids) == self.room[number] else None

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _drop_finished(self) -> None:
        keep = [row for row, number in enumerate(self.numbers) if number not in self.done]
        self.numbers = [self.numbers[row] for row in keep]
        self.done.clear()
        if keep:
            rows = torch.tensor(keep, device=self.mask.device)
            self.input_ids, self.mask = self.input_ids[rows], self.mask[rows]
            self.cache.batch_select_indices(rows)


def nucleus_draw(logits: Tensor, top_p: float, draws: Tensor) -> Tensor:
    """One token a row: the inverse of the nucleus's cumulative distribution at each draw, a number in [0, 1).

    logits: (R, V), draws: (R,); returns (R,). The nucleus is the smallest set of likeliest tokens whose probability
    reaches `top_p`, and at least the likeliest one.
    """
    probabilities = logits.softmax(-1)
    values, tokens = probabilities.topk(min(LIKELIEST, logits.shape[1]))
    drawn = _draw(values, tokens, top_p, draws)
    short = (values.sum(1) < top_p).nonzero()[:, 0]
    if len(short) and values.shape[1] < logits.shape[1]:
        drawn[short] = _draw(*probabilities[short].sort(descending=True), top_p, draws[short])
    return drawn


def _draw(values: Tensor, tokens: Tensor, top_p: float, draws: Tensor) -> Tensor:
    cumulative = values.cumsum(1)
    size = ((cumulative - values) < top_p).sum(1, keepdim=True)  # a token is in while those before it fall short
    mass = cumulative.gather(1, size - 1)
    index = torch.searchsorted(cumulative, draws[:, None] * mass, right=True).minimum(size - 1)
    return tokens.gather(1, index)[:, 0]
