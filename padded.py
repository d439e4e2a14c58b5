"""Writing many rows with any model: `PaddedDecoder`, for those that `decoding.Decoder` does not fit, and which do."""

from collections.abc import Mapping, Sequence
from typing import Any, Generic

import torch
from torch import Tensor

from decoding import Decoder, DoesNotFit, Row, decoding
from policy import Policy


def fits(policy: Policy) -> bool:
    """Whether `Decoder` computes what the model computes; found out on a few tokens of this very model."""
    lm = policy.lm
    kinds = set(getattr(lm.config, "layer_types", None) or ["full_attention"])
    if not getattr(lm, "_supports_attention_backend", False) or kinds - {"full_attention", "sliding_attention"}:
        return False
    prompts = [[i % lm.config.vocab_size for i in ids] for ids in ((5, 17, 2, 11, 3), (7,), (19, 4, 13))]
    dtype, policy.dtype = policy.dtype, next(lm.parameters()).dtype
    try:
        expected = [lm(input_ids=torch.tensor([ids], device=policy.device), use_cache=False).logits[0, -1].float()
                    for ids in prompts]
        with decoding(policy, pack=False):
            decoder = Decoder[int](policy)
            decoder.add(dict(enumerate(ids[:-1] or ids for ids in prompts)))
            decoder.logits()
            decoder.feed({row: prompts[row][-1] for row in decoder.rows if len(prompts[row]) > 1})
            found = dict(zip(decoder.rows, decoder.logits().float(), strict=True))
    except (DoesNotFit, AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # as models not known do
        return False
    finally:
        policy.dtype = dtype
    return decoder.windows == windows(lm.config) and all(
        (logits.log_softmax(-1) - expected[row].log_softmax(-1)).abs().max() <= 1e-2 for row, logits in found.items())


def windows(config: Any) -> dict[int, int | None]:
    """How far each layer is to see, None where it is to see all."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    return {layer: window if kind == "sliding_attention" else None for layer, kind in enumerate(kinds)}


class PaddedDecoder(Generic[Row]):
    """`Decoder` for any model: rows begin together, padded on the left, and the cache is that of `transformers`."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.rows: list[Row] = []

    def add(self, prompts: Mapping[Row, Sequence[int]]) -> None:
        from transformers import DynamicCache

        assert not self.rows, "rows begin together"
        self.rows = list(prompts)
        longest = max(map(len, prompts.values()))
        # Padding stands on the left, so that all rows write at the same place.
        self.input_ids = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompts.values()],
                                      device=self.policy.device)
        self.mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts.values()],
                                 device=self.policy.device)
        self.cache = DynamicCache(config=self.policy.lm.config)

    def logits(self) -> Tensor:
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -self.input_ids.shape[1]:]
        with self.policy.computing():
            hidden = self.policy.lm.base_model(input_ids=self.input_ids, attention_mask=self.mask, use_cache=True,
                                               position_ids=positions, past_key_values=self.cache).last_hidden_state
            return self.policy.head(hidden[:, -1])

    def feed(self, tokens: Mapping[Row, int]) -> None:
        stay = [place for place, row in enumerate(self.rows) if row in tokens]
        if stay and len(stay) < len(self.rows):
            self.mask = self.mask[stay]
            self.cache.batch_select_indices(torch.tensor(stay, device=self.mask.device))
        self.rows = [self.rows[place] for place in stay]
        self.input_ids = torch.tensor([[tokens[row]] for row in self.rows], device=self.mask.device)
        self.mask = torch.cat([self.mask[:len(stay)], self.mask.new_ones(len(stay), 1)], dim=1)
