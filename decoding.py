"""Writing many rows at once, a token a step, with no padding: `Decoder`.

What a model computes for each token by itself, it computes for the tokens of all rows in one line; attention, the one
place where rows are more than their last token, is ours: `transformers` calls `attend` in every layer. Keys and values
stand in blocks that are written in place, and are read by rows of like length together.
"""

import contextlib
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from packing import packed_linears
from policy import Policy

BLOCK = 64  # ids: rows of a cohort are no further apart, and it grows by as many
PREFILL = 4096  # ids of prompts in one forward pass
QUERIES = 256  # ids of a prompt whose attention is computed at once
NAME = "halos-decoder"  # of `attend`, among the attentions of transformers
Row = TypeVar("Row", bound=Hashable)  # what the rows are to who writes them


class DoesNotFit(Exception):
    """The model attends in a way that `attend` does not know."""


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *,
           decoder: "Decoder | None" = None, scaling: float | None = None, sliding_window: int | None = None,
           softcap: float | None = None, dropout: float = 0.0, **others: Any) -> tuple[Tensor, None]:
    """The attention of one layer, as `transformers` asks for it: (1, N, H, d) of (1, heads, N, d) each.

    sliding_window: how many ids, itself included, an id sees. softcap: what scores are bent to, as in Gemma 2.
    """
    unknown = [name for name, what in others.items() if what is not None and name not in ("position_ids", "use_cache")]
    if decoder is None or unknown:
        raise DoesNotFit(f"no decoder, or arguments that are not known: {unknown}")
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (N, heads, d)
    how = scaling if scaling is not None else query.shape[-1] ** -0.5, sliding_window, softcap
    decoder.windows[module.layer_idx] = sliding_window
    return decoder.attend(module.layer_idx, query, key, value, how)[None], None


How = tuple[float, int | None, float | None]  # scaling, window, softcap


def weigh(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, how: How) -> Tensor:
    """(…, Q, d) queries over (…, d, T) keys to (…, Q, d) means of the (…, T, d) values. mask: 0, or -inf if unseen."""
    scaling, _, softcap = how
    scores = (query * scaling) @ keys
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    exact = torch.promote_types(scores.dtype, torch.float32)
    return (scores.to(exact) + mask).softmax(-1).to(values.dtype) @ values


class Cohort(Generic[Row]):
    """Rows of like length, with their keys and values of each layer."""

    def __init__(self, rows: list[Row], lengths: Sequence[int], device: torch.device) -> None:
        """lengths: of what will be in each row before its first token is written."""
        self.rows = rows
        self.lengths = torch.tensor(lengths, device=device)
        self.shortest, self.longest = min(lengths), max(lengths)
        self.every = torch.arange(len(rows), device=device)
        self.keys: dict[int, Tensor] = {}  # (R, K, d, T): so laid out, a token's queries read them fastest
        self.values: dict[int, Tensor] = {}  # (R, K, T, d)
        self.masks: dict[int | None, tuple[int, Tensor]] = {}

    def fill(self, layer: int, rows: list[int], key: Tensor, value: Tensor) -> None:
        """Begin the rows with what a prompt has there, (T, K, d) each."""
        self._fit(layer, key, value)
        self.keys[layer][rows, :, :, :len(key)] = key.permute(1, 2, 0)
        self.values[layer][rows, :, :len(key)] = value.transpose(0, 1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        """(R, H, d): attention of each row's next token, after its key and value are written."""
        self._fit(layer, key, value)
        (R, H, d), K = query.shape, key.shape[1]
        keys, values = self.keys[layer], self.values[layer]
        keys[self.every, :, :, self.lengths] = key
        values[self.every, :, self.lengths] = value
        first, mask = self._seen(how[1])
        last = first + mask.shape[-1]
        return weigh(query.reshape(R, K, H // K, d), keys[:R, :, :, first:last], values[:R, :, first:last], mask, how
                     ).reshape(R, H, d)

    def _fit(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Room for a token more in each row of a layer; what is there is moved if there was none."""
        old = self.keys.get(layer)
        if old is not None and old.shape[-1] > self.longest:
            return
        # An odd multiple of 16: with strides of powers of two, what is read together falls on the same cache lines.
        room = self.longest // BLOCK * BLOCK + BLOCK + 16
        R, (_, K, d) = len(self.rows), key.shape
        # Zeros, as a weight of 0 does not hide what is no number.
        keys, values = key.new_zeros(R, K, d, room), value.new_zeros(R, K, room, d)
        if old is not None:
            keys[..., :old.shape[-1]] = old[:R]
            values[:, :, :old.shape[-1]] = self.values[layer][:R]
        self.keys[layer], self.values[layer] = keys, values

    def _seen(self, window: int | None) -> tuple[int, Tensor]:
        """The first id that any row sees, and from it on a mask (R, 1, 1, T) of what each sees of its own."""
        if window not in self.masks:
            first = 0 if window is None else max(0, self.shortest + 1 - window) // 16 * 16
            last = -(-(self.longest + 1) // 16) * 16
            places, lengths = torch.arange(first, last, device=self.lengths.device), self.lengths[:, None]
            unseen = places > lengths
            if window is not None:
                unseen |= places <= lengths - window
            mask = torch.zeros(unseen.shape, device=unseen.device).masked_fill_(unseen, -torch.inf)
            self.masks[window] = first, mask[:, None, None]
        return self.masks[window]

    def grow(self) -> None:
        """A token was written in every row."""
        self.lengths += 1
        self.shortest += 1
        self.longest += 1
        self.masks.clear()

    def drop(self, gone: Set[Row]) -> None:
        """Put the last rows that stay into the places of those that go."""
        stay = [place for place, row in enumerate(self.rows) if row not in gone]
        if len(stay) == len(self.rows):
            return
        holes = sorted(set(range(len(stay))) - set(stay))
        moved = stay[len(stay) - len(holes):]
        for tensors in (self.keys, self.values) if holes else ():
            for tensor in tensors.values():
                for hole, place in zip(holes, moved, strict=True):
                    tensor[hole].copy_(tensor[place])
        order = stay[:len(stay) - len(holes)]
        for hole, place in zip(holes, moved, strict=True):
            order.insert(hole, place)
        self.rows = [self.rows[place] for place in order]
        self.lengths = self.lengths[order]
        self.every = self.every[:len(order)]
        if order:
            lengths = self.lengths.tolist()
            self.shortest, self.longest = min(lengths), max(lengths)
        self.masks.clear()


class Prompt:
    """What rows that begin alike begin with: all of a prompt but its last id, which is their first token to write."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids = ids
        self.places: list[tuple[Cohort, list[int]]] = []  # rows that begin so
        self.kept = False
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, if they are kept

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        """(T, H, d): attention of each id to itself and to those before it, after the rows got keys and values."""
        self._fill(layer, key, value)
        if self.kept:
            self.layers[layer] = key.clone(), value.clone()
        (T, H, d), K, window = query.shape, key.shape[1], how[1]
        keys, values = key.permute(1, 2, 0), value.transpose(0, 1)  # (K, d, T), (K, T, d)
        parts = []
        for start in range(0, T, QUERIES):
            stop = min(start + QUERIES, T)
            first = 0 if window is None else max(0, start + 1 - window)
            ids, places = torch.arange(start, stop, device=key.device)[:, None], torch.arange(first, stop,
                                                                                              device=key.device)
            unseen = places > ids if window is None else (places > ids) | (places <= ids - window)
            mask = torch.zeros(unseen.shape, device=key.device).masked_fill_(unseen, -torch.inf).repeat(H // K, 1)
            part = query[start:stop].reshape(stop - start, K, H // K, d).permute(1, 2, 0, 3).flatten(1, 2)
            found = weigh(part, keys[..., first:stop], values[:, first:stop], mask, how)  # (K, H / K * Q, d)
            parts.append(found.view(H, stop - start, d).transpose(0, 1))
        return torch.cat(parts)

    def hand_out(self) -> None:
        """Begin the rows with what was kept."""
        for layer, (key, value) in self.layers.items():
            self._fill(layer, key, value)

    def _fill(self, layer: int, key: Tensor, value: Tensor) -> None:
        for cohort, rows in self.places:
            cohort.fill(layer, rows, key, value)


class Decoder(Generic[Row]):
    """Rows of unlike lengths that are written a token at a time. They come and go; `rows` says which are there."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.cohorts: list[Cohort[Row]] = []
        self.tokens: dict[Row, int] = {}  # each row's next
        self.last: Prompt | None = None  # kept, as rows to come may begin with it as well
        self.parts: list[Cohort | Prompt] = []  # of the line that is being computed, with where each begins and ends
        self.bounds: list[int] = []
        self.windows: dict[int, int | None] = {}  # of the layers that attended

    @property
    def rows(self) -> list[Row]:
        return [row for cohort in self.cohorts for row in cohort.rows]

    def add(self, prompts: Mapping[Row, Sequence[int]]) -> None:
        """Rows that begin with these ids; the prompts that are alike are computed once, also if `add` had the last."""
        waiting = sorted(prompts, key=lambda row: (len(prompts[row]), tuple(prompts[row])))
        known = self.last
        found = {known.ids: known} if known else {}
        while waiting:
            least = len(prompts[waiting[0]])
            rows = [row for row in waiting if len(prompts[row]) < least + BLOCK]
            waiting = waiting[len(rows):]
            cohort = Cohort(rows, [len(prompts[row]) - 1 for row in rows], self.policy.device)
            self.cohorts.append(cohort)
            for place, row in enumerate(rows):
                ids = tuple(prompts[row])
                self.last = found.setdefault(ids, Prompt(ids))
                self.last.places.append((cohort, [place]))
                self.tokens[row] = ids[-1]
        if known:
            known.hand_out()
            del found[known.ids]
        if self.last:
            self.last.kept = True
        batch: list[Prompt] = []
        for prompt in found.values():
            if batch and sum(len(p.ids) for p in batch) + len(prompt.ids) > PREFILL:
                self._prefill(batch)
                batch = []
            batch.append(prompt)
        self._prefill(batch)
        if self.last:
            self.last.places.clear()

    def _prefill(self, prompts: list[Prompt]) -> None:
        prompts = [prompt for prompt in prompts if len(prompt.ids) > 1]
        if prompts:
            self._forward(prompts, [len(prompt.ids) - 1 for prompt in prompts],
                          [i for prompt in prompts for i in prompt.ids[:-1]],
                          torch.cat([torch.arange(len(prompt.ids) - 1) for prompt in prompts]))

    def logits(self) -> Tensor:
        """(R, V): of the id after each row's next token, which is written. `feed` says what they were taken for."""
        hidden = self._forward(self.cohorts, [len(cohort.rows) for cohort in self.cohorts],
                               [self.tokens[row] for row in self.rows],
                               torch.cat([cohort.lengths for cohort in self.cohorts]))
        for cohort in self.cohorts:
            cohort.grow()
        with self.policy.computing():  # the head as a layer, which may be packed
            logits = self.policy.lm.get_output_embeddings()(hidden)
            cap = self.policy.head.cap
            return logits if cap is None else cap * torch.tanh(logits / cap)

    def feed(self, tokens: Mapping[Row, int]) -> None:
        """The next token of each row that stays."""
        gone = self.tokens.keys() - tokens.keys()
        for cohort in self.cohorts if gone else ():
            cohort.drop(gone)
        self.cohorts = [cohort for cohort in self.cohorts if cohort.rows]
        self.tokens = dict(tokens)

    def _forward(self, parts: "Sequence[Cohort | Prompt]", sizes: list[int], ids: list[int], positions: Tensor
                 ) -> Tensor:
        """(N, h): the last hidden state of the ids, which are those of the parts, one part after the other."""
        self.parts, device = list(parts), self.policy.device
        self.bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        with self.policy.computing():
            return self.policy.lm.base_model(
                input_ids=torch.tensor([ids], device=device), position_ids=positions.to(device)[None],
                use_cache=False, decoder=self).last_hidden_state[0]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        found = [part.attend(layer, query[a:b], key[a:b], value[a:b], how)
                 for part, (a, b) in zip(self.parts, pairwise(self.bounds), strict=True)]
        return torch.cat(found) if len(found) > 1 else found[0]


@contextlib.contextmanager
def decoding(policy: Policy, pack: bool = True) -> Iterator[None]:
    """Context in which the policy's layers attend by `attend`; pack: and its linear layers are `packed_linears`."""
    import transformers

    transformers.AttentionInterface.register(NAME, attend)
    lm = policy.lm
    usual = lm.config._attn_implementation
    lm.set_attn_implementation(NAME)
    try:
        with packed_linears(policy) if pack else contextlib.nullcontext():
            yield
    finally:
        lm.set_attn_implementation(usual)
