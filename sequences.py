"""Groups to rows of token ids, and which hidden state predicts which scored token: the hot path's bookkeeping.

A row is `P, c1, c2, …`: a prompt once, and completions that each continue its positions and see it and themselves
alone. Rows of about equal length share a microbatch under a budget of tokens, so that little padding is computed.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groups import Group, Ids


@dataclass
class Rows:
    """R padded rows of T ids, which hold C completions with S scored ids in all.

    A completion's first id is predicted at the prompt's last position, each other one at the id before it.
    """

    input_ids: Tensor  # (R, T); what pads a row is never seen by what is scored
    position_ids: Tensor | None  # (R, T); None where every row holds one completion: plain causal attention
    segments: Tensor | None  # (R, T): 0 the prompt, k its k-th completion, -1 padding; None likewise
    predictors: Tensor  # (S,): where in R * T the hidden state stands that predicts a scored id
    targets: Tensor  # (S,): the scored ids
    ends: Tensor  # (C,): where in R * T a completion's last id stands
    lengths: list[int]  # (C): scored ids of each completion
    items: list[tuple[int, str]]  # (C): which completion it is: number of the group, role
    texts: list[tuple[Ids, Ids]]  # (C): its prompt's ids and its own

    def keys(self) -> list[bytes]:
        """(C): what a completion is and what it follows, and so what any output for it depends on."""
        return [array("i", prompt).tobytes() + b"|" + array("i", ids).tobytes() for prompt, ids in self.texts]

    def to(self, device: torch.device) -> "Rows":
        """From the machine's memory to a GPU's without waiting for it."""
        def move(tensor: Tensor) -> Tensor:
            pinned = device.type == "cuda" and tensor.device.type == "cpu"
            return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)

        moved = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Rows(**{**vars(self), **moved})

    def attention_mask(self, dtype: torch.dtype) -> Tensor | None:
        """(R, 1, T, T) to be added to attention scores: a token sees its prompt and its own completion, backwards."""
        if self.segments is None:
            return None
        T = self.segments.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=self.segments.device).tril()
        keys, queries = self.segments[:, None, :], self.segments[:, :, None]
        seen = causal & ((keys == 0) | (keys == queries))
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


@dataclass(frozen=True)
class _Line:
    """One row before padding."""

    prompt: Ids
    completions: list[Ids]
    items: list[tuple[int, str]]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions))


def cut_into_microbatches(groups: Sequence[Group], roles: Sequence[str], budget: int, *, share: bool = True,
                          window: int | None = None, ranks: int = 1) -> list[Rows]:
    """Rows that score the completions of `roles` that the groups have, cut so that each fits `budget` padded ids.

    share: whether completions of a prompt may stand in one row. They do not where that is longer than `window`, the
    model's smallest sliding window: a mask would switch it off. A group is never divided; the longest come first.
    ranks: that take them in turns, and so have about the same to do.
    """
    shared, single = [], []
    for number, group in enumerate(groups):
        items = [(number, role) for role in roles if role in group.completions]
        completions = [group.completions[role] for _, role in items]
        longest = len(group.prompt) + max(map(len, completions), default=0)
        if share and len(items) > 1 and (window is None or longest <= window):
            shared.append([_Line(group.prompt, completions, items)])
        elif items:
            single.append([_Line(group.prompt, [ids], [item]) for ids, item in zip(completions, items, strict=True)])
    # Apart, since rows of one completion need no mask: plain causal attention is cheaper, and knows sliding windows.
    return [pack(lines) for kind in (shared, single) for lines in _fill(kind, _even(kind, budget, ranks))]


def _even(units: list[list[_Line]], budget: int, ranks: int) -> int:
    """The smallest budget under which there are as few rounds of microbatches as under `budget`.

    They cost about the same then. A round is one for each rank.
    """
    fewest = -(-len(list(_fill(units, budget))) // ranks) * ranks
    low, high = 0, budget  # too small, and large enough
    while high - low > max(budget // 64, 1):
        middle = (low + high) // 2
        low, high = (low, middle) if len(list(_fill(units, middle))) <= fewest else (middle, high)
    return high


def _fill(units: list[list[_Line]], budget: int) -> Iterator[list[_Line]]:
    """Units of lines, longest first, as many together as fit the budget when padded; at least one."""
    lines: list[_Line] = []
    for unit in sorted(units, key=lambda unit: max(map(len, unit)), reverse=True):
        longest = max(map(len, lines or unit))
        if lines and (len(lines) + len(unit)) * longest > budget:
            yield lines
            lines = []
        lines = lines + unit
    if lines:
        yield lines


def pack(lines: Sequence[_Line]) -> Rows:
    """Pad the lines to the longest of them."""
    T, shared = max(map(len, lines)), len(lines[0].completions) > 1
    input_ids = torch.zeros(len(lines), T, dtype=torch.long)
    positions = torch.zeros(len(lines), T, dtype=torch.long)
    segments = torch.full((len(lines), T), -1)
    predictors, ends = [], []
    for r, line in enumerate(lines):
        P = len(line.prompt)
        ids = torch.tensor([*line.prompt, *(i for completion in line.completions for i in completion)])
        input_ids[r, :len(ids)] = ids
        positions[r, :P] = torch.arange(P)
        segments[r, :P] = 0
        start = P
        for k, completion in enumerate(line.completions, 1):
            end = start + len(completion)
            positions[r, start:end] = torch.arange(P, P + len(completion))
            segments[r, start:end] = k
            predictors += [r * T + P - 1, *range(r * T + start, r * T + end - 1)]
            ends.append(r * T + end - 1)
            start = end
    return Rows(input_ids, positions if shared else None, segments if shared else None, torch.tensor(predictors),
                torch.tensor([i for line in lines for completion in line.completions for i in completion]),
                torch.tensor(ends), [len(ids) for line in lines for ids in line.completions],
                [item for line in lines for item in line.items],
                [(line.prompt, ids) for line in lines for ids in line.completions])
