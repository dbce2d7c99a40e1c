"""Ending a blocked request from within the worker: its logits are overwritten so that only its end can be sampled.

An accelerator, never the only stop: the scheduler decides what ends a request, and where the caller asked for
`ignore_eos` without a stop token, or for a grammar, there is no token that would.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor


def end_token(params: Any, outputs: int) -> int | None:
    """The token that ends the request now, after `outputs` tokens; None where none would.

    `params` are vLLM's SamplingParams.
    """
    if params is None or outputs < params.min_tokens:
        return None
    candidates = [params.eos_token_id, *(params.stop_token_ids or ())]
    allowed = params.allowed_token_ids
    return next((t for t in candidates if t is not None and (not allowed or t in allowed)), None)


def rows_of(index: int, drafts: Sequence[int] | None) -> slice:
    """Rows of the logits that belong to the request at `index` of the batch; `drafts` counts those of each request."""
    if drafts is None:
        return slice(index, index + 1)
    begin = sum(drafts[:index]) + index
    return slice(begin, begin + drafts[index] + 1)


def force(logits: Tensor, rows: slice, token: int) -> None:
    logits[rows] = -np.inf
    logits[rows, token] = 0.0
