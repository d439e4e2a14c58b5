"""Floating-point operations of a training step: by a formula, and as torch counts them.

A multiplication and its addition are two. Matrix products are counted and nothing else: those of the layers, of
attention (all pairs of a row's positions, seen or not, as the kernels are given them), and of the output head.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FORWARD, BACKWARD = 1, 2  # products of a layer, in those of its forward
ATTENTION_BACKWARD = 2.5  # the scores are formed once more


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like model."""

    hidden: int
    layers: int
    queries: int  # heads x head size
    keys: int  # the same of keys and values
    feed_forward: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> "Shape":
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.hidden_size, config.num_hidden_layers, size * config.num_attention_heads,
                   size * config.num_key_value_heads, config.intermediate_size, config.vocab_size)

    @property
    def body(self) -> int:
        """Of the layers, a token."""
        h = self.hidden
        return 2 * self.layers * (2 * h * self.queries + 2 * h * self.keys + 3 * h * self.feed_forward)

    @property
    def pair(self) -> int:
        """Of attention, a query and a key."""
        return 4 * self.layers * self.queries

    @property
    def head(self) -> int:
        """Of the output head, a position."""
        return 2 * self.hidden * self.vocabulary

    def products(self, rows: int, scored: float) -> list[tuple[int, int, int, float]]:
        """(rows, inputs, outputs, weight) of each kind of product, for `measuring.matmul_rate`.

        scored: positions whose logits are formed, of all positions.
        """
        kinds = [(self.hidden, self.queries, 2 * self.layers), (self.hidden, self.keys, 2 * self.layers),
                 (self.hidden, self.feed_forward, 3 * self.layers), (self.hidden, self.vocabulary, scored)]
        return [(rows, inputs, outputs, inputs * outputs * times) for inputs, outputs, times in kinds]


@dataclass(frozen=True)
class Pass:
    """One way through the model."""

    tokens: int  # padding included
    pairs: int  # of positions that attention takes
    head: int  # positions whose logits are formed
    graph: bool = True  # whether a backward pass follows
    body_again: bool = False  # whether that forms the layers' activations once more
    head_again: bool = False  # and the logits

    def flops(self, shape: Shape) -> float:
        back = self.graph * BACKWARD
        body = self.tokens * shape.body * (FORWARD + back + (self.graph and self.body_again))
        attention = self.pairs * shape.pair * (
            FORWARD + self.graph * ATTENTION_BACKWARD + (self.graph and self.body_again))
        return body + attention + self.head * shape.head * (FORWARD + back + (self.graph and self.head_again))


Lengths = tuple[int, Mapping[str, int]]  # of a row's prompt, and of its completions by role


def padded(batch: Sequence[Lengths], roles: Iterable[str], *, all_positions: bool = True, **options: bool) -> Pass:
    """A sequence a completion, all padded to the longest; logits everywhere, or where a completion's id is next."""
    parts = [(prompt, n) for role in roles for prompt, completions in batch
             if (n := completions.get(role)) is not None]
    T = max((prompt + n for prompt, n in parts), default=0)
    head = len(parts) * T if all_positions else sum(n for _, n in parts)
    return Pass(len(parts) * T, len(parts) * T * T, head, **options)


def necessary(batch: Sequence[Lengths], roles: Sequence[str], **options: bool) -> Pass:
    """A prompt once a row, no padding, only pairs of positions that see each other, only scored positions' logits."""
    tokens = pairs = head = 0
    for prompt, completions in batch:
        mine = [completions[role] for role in roles if role in completions]
        if mine:
            tokens += prompt + sum(mine)
            pairs += prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in mine)
            head += sum(mine)
    return Pass(tokens, pairs, head, **options)


def step_flops(shape: Shape, passes: Iterable[Pass]) -> float:
    return sum(one.flops(shape) for one in passes)


def useful_flops(shape: Shape, batch: Sequence[Lengths], reference: bool = False) -> float:
    """What a step cannot do without, the logits' second forming included; with a reference that is scored in it."""
    roles = ("chosen", "rejected")
    passes = [necessary(batch, roles, head_again=True), necessary(batch, ("KL",), graph=False)]
    if reference:
        passes.append(necessary(batch, (*roles, "KL"), graph=False))
    return step_flops(shape, passes)


def padded_flops(shape: Shape, batch: Sequence[Lengths], *, reference: bool = True, **options: bool) -> float:
    """Of a padded step: a policy's pass with a graph, and KL pairs without; the same of the reference without."""
    roles = ("chosen", "rejected")
    everywhere = options.get("all_positions", True)
    passes = [padded(batch, roles, **options), padded(batch, ("KL",), all_positions=everywhere, graph=False)]
    if reference:
        passes += [padded(batch, asked, all_positions=everywhere, graph=False) for asked in (roles, ("KL",))]
    return step_flops(shape, passes)


def counter() -> Any:
    """torch's own counter, which is taught what it does not know: attention on a CPU, products in place.

    A context; `get_total_flops()` afterwards.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    def product(accumulated: Any, a: Any, b: Any, *args: Any, **options: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    aten = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        aten.addmm_: product})
