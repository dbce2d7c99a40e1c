"""One sequence that grows: keys and values of what was read, written in place, and attention that does not copy them.

transformers' own cache copies all keys and values whenever a token is added, and its attention copies them once more
for every group of query heads; near 1,000 tokens that is a quarter of a step's time.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "guard_sdpa"
_STEP = 128  # tokens by which the room grows


class Stream:
    """The keys and values of the tokens read so far."""

    def __init__(self) -> None:
        self.cache = DynamicCache()
        self.cache.layer_class_to_replicate = _Layer

    @property
    def length(self) -> int:
        return int(self.cache.get_seq_length())


class _Layer(DynamicLayer):
    """One layer's keys and values `[1, heads, T, head_dim]`: the front of a buffer with room for more."""

    _buffers: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = (_room(key_states, end), _room(value_states, end))
        elif end > self._buffers[0].shape[-2]:
            grown = (_room(key_states, end), _room(value_states, end))
            for buffer, known in zip(grown, self._buffers, strict=True):
                buffer[..., :begin, :] = known[..., :begin, :]
            self._buffers = grown
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., begin:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values


def _room(like: Tensor, tokens: int) -> Tensor:
    return like.new_empty(*like.shape[:-2], -(-tokens // _STEP) * _STEP, like.shape[-1])


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, but query heads share keys and values in place where there is a mask too."""
    plain = given.get("softcap") is None and given.get("position_bias") is None and given.get("cache") is None
    if attention_mask is None or not plain or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=given.get("scaling"), enable_gqa=True
    )  # [B, heads, T, head_dim]
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
