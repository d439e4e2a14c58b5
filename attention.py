"""Attention of rows that share a prompt, on a GPU: only the parts of the mask that let anything through are computed.

Transformers' own attention takes a mask as a matrix, (T, T) numbers a row, and computes what it hides, too. Where no
mask is needed, it stays as it is.
"""

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from utils import first_line

NAME = "sdpa_or_flex"  # by which transformers knows `attend`


def block_mask(segments: Tensor) -> BlockMask:
    """Of rows with these (R, T) segments, as `Rows` has them.

    A token sees its prompt and its own completion, backwards. Padding sees the prompt and padding, not
    nothing.
    """
    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        theirs = segments[row, key]
        return (key <= query) & ((theirs == 0) | (theirs == segments[row, query]))

    R, T = segments.shape
    return create_block_mask(seen, R, None, T, T, device=segments.device.type)


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
           **options: Any) -> tuple[Tensor, None]:
    """(R, heads, T, d) to (R, T, heads, d), as transformers wants it of an attention."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # which knows nothing of this operation
        query, key, value = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (query, key, value))
    found = flex(kind)(query, key, value, block_mask=attention_mask, scale=scaling,
                       enable_gqa=query.shape[1] != key.shape[1])
    return found.transpose(1, 2).contiguous(), None


@cache
def flex(kind: str) -> Any:
    """Compiled on a GPU: uncompiled it forms the whole matrix."""
    return torch.compile(flex_attention, dynamic=True) if kind == "cuda" else flex_attention


def use_flex_attention(lm: Any) -> bool:
    """Let the model attend by `attend`, if it may: it does so by `scaled_dot_product_attention` now, without a cap."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = lm.config
    if config._attn_implementation != "sdpa" or getattr(config, "attn_logit_softcapping", None):
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    lm.set_attn_implementation(NAME)
    return True


def note_failure(error: Exception) -> None:
    print(f"note: flex attention does not work with this model here ({type(error).__name__}: {first_line(error)}); "
          "masks are matrices", file=sys.stderr)
