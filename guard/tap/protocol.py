"""What a tap tells the sidecar, and how: plain data and numpy, no torch, no grpc.

A tap sits in the engine's process, encodes where the activations are, and sends what fired. Tokens of a request are
numbered through, prompt first (`position`). The sidecar reads them in that order: rows that it has are passed over
(preemption computes them again), and a gap makes the request not_assessed.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TapInfo:
    """What a tap announces before anything else; the sidecar refuses one that does not fit its pack."""

    engine: str  # "transformers", "vllm"
    engine_version: str
    pack_hash: str
    model: str  # fingerprint of the weights that are served
    hook_points: tuple[str, ...]
    dtype: str  # of the activations that are read, "bfloat16"


@dataclass(frozen=True, slots=True)
class Rows:
    """What fired on a run of tokens of one request: `T` tokens, `N` hits, `P` probe rows of the whole pack."""

    request_id: str  # the caller's own: what X-Request-Id said, not what the engine made of it
    begin: int  # position of the first token
    prompt_tokens: int  # positions below this are the prompt, the rest the completion
    token_ids: NDArray[np.int32]  # [T]
    token: NDArray[np.int32]  # [N] index into the run
    row: NDArray[np.int32]  # [N] rows numbered through the pack's hook points, in the order of `latents.jsonl`
    value: NDArray[np.float32]  # [N] pre-activation
    probe: NDArray[np.float32]  # [T, P]
    finite: bool = True  # False where an activation is NaN or infinite: then no hit here may be used


@dataclass(frozen=True, slots=True)
class Ended:
    """A request has left the engine."""

    request_id: str
    reason: str  # "stop", "length", "abort"; "guard" where the tap ended it on a block
    tokens: int  # whose activations were computed and accepted


@dataclass(frozen=True, slots=True)
class Missed:
    """Rows of a request that will never come: it is not_assessed from here on."""

    request_id: str
    detail: str  # "a cached prefix of 64 tokens whose rows are gone"


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of the engine brought; its parts are told in this order."""

    rows: tuple[Rows, ...] = ()
    missed: tuple[Missed, ...] = ()
    ended: tuple[Ended, ...] = field(default=())


class Sink(Protocol):
    """Where a tap's steps go. No method ever blocks the engine or raises into it."""

    def send(self, step: Step) -> None:
        """Hands a step over. One that cannot be taken is counted as dropped, and its requests become not_assessed."""

    def stops(self) -> frozenset[str]:
        """Requests whose verdict has turned to block and that have not ended: their generation is to stop."""

    @property
    def dropped(self) -> int:
        """Steps that were not taken so far."""

    def close(self) -> None: ...
