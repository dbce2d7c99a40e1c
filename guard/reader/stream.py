"""Sequences that grow: keys and values of what was read, written in place, and attention over several of them at once.

A step reads the next tokens of some streams as one row: every product is shared, and only attention is taken stream by
stream, each over its own keys and values. So nothing is padded, and streams of any lengths go together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "guard_sdpa"
STEPS = "guard_steps"  # the argument under which a model hands the steps on to its attention
_ROOM = 64  # tokens by which the room grows


class Stream:
    """The keys and values of the tokens read so far: for each layer the front of a buffer with room for more."""

    def __init__(self) -> None:
        self.length = 0
        self.buffers: list[tuple[Tensor, Tensor]] = []  # a layer's keys and values, [1, kv_heads, room, head_dim]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for pair in self.buffers for buffer in pair)

    def take(self, other: "Stream", length: int) -> None:
        """Begins a stream that has read nothing with the first `length` tokens of another one."""
        self.buffers = [(_grown(k, length, length), _grown(v, length, length)) for k, v in other.buffers]
        self.length = length

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values `[1, kv_heads, T, head_dim]` of one layer, with those of a step behind them.

        `length` stays as it was: a step counts once every layer has taken it.
        """
        end = self.length + keys.shape[2]
        if layer == len(self.buffers):
            self.buffers.append((_grown(keys, 0, end), _grown(values, 0, end)))
        elif end > self.buffers[layer][0].shape[2]:
            known = self.buffers[layer]
            self.buffers[layer] = (_grown(known[0], self.length, end), _grown(known[1], self.length, end))
        for buffer, new in zip(self.buffers[layer], (keys, values), strict=True):
            buffer[:, :, self.length : end] = new
        own_keys, own_values = self.buffers[layer]
        return own_keys[:, :, :end], own_values[:, :, :end]


@dataclass(frozen=True, slots=True)
class Step:
    """The tokens `begin` to `end` of the row are the next ones of `stream`."""

    stream: Stream
    begin: int
    end: int
    mask: Tensor | None  # [1, 1, T, length + T] bool; None where attention is that of a whole sequence, or of one token


def steps_of(given: Sequence[tuple[Stream, Sequence[int]]], device: torch.device) -> list[Step]:
    steps, begin = [], 0
    for stream, ids in given:
        count, mask = len(ids), None
        if count > 1 and stream.length:
            seen = torch.arange(stream.length + count, device=device)
            mask = (seen <= seen[stream.length :, None])[None, None]
        steps.append(Step(stream, begin, begin + count, mask))
        begin += count
    return steps


def _grown(like: Tensor, known: int, tokens: int) -> Tensor:
    """A buffer with room for `tokens`, its first `known` ones those of `like`."""
    buffer = like.new_empty(*like.shape[:2], -(-tokens // _ROOM) * _ROOM, like.shape[3])
    buffer[:, :, :known] = like[:, :, :known]
    return buffer


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, over the streams' own keys and values where there are steps."""
    steps: list[Step] | None = given.pop(STEPS, None)
    if steps is None:
        return _attend_once(module, query, key, value, attention_mask, **given)
    attended = []
    for step in steps:
        own = slice(step.begin, step.end)
        layer: Any = module.layer_idx
        keys, values = step.stream.append(layer, key[:, :, own], value[:, :, own])
        mask = _within(step, keys.shape[2], given.get("sliding_window"))
        attended.append(_attend_once(module, query[:, :, own], keys, values, mask, **given)[0])
    return torch.cat(attended, dim=1), None


def _within(step: Step, length: int, window: int | None) -> Tensor | None:
    """The step's mask in a layer whose tokens see the `window` latest ones only."""
    if window is None or length <= window:
        return step.mask
    seen = torch.arange(length, device=step.mask.device if step.mask is not None else None)
    rows = seen[length - (step.end - step.begin) :, None]
    return ((seen <= rows) & (seen > rows - window))[None, None]


def _attend_once(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    # transformers copies keys and values for every group of query heads where there is a mask.
    plain = given.get("softcap") is None and given.get("position_bias") is None and given.get("cache") is None
    if attention_mask is None or not plain or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=given.get("scaling"), enable_gqa=True
    )  # [B, heads, T, head_dim]
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
