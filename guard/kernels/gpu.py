"""The fused kernel as the rest of Guard uses it: an encoder like the others, and pooling for captured graphs."""

import weakref

import torch
from torch import Tensor

from guard.errors import ConfigError
from guard.kernels import fused
from guard.kernels.columns import Columns
from guard.kernels.contract import Encoded, EncodeRows, check_shape, not_finite
from guard.kernels.launch import HitBuffer, Pool, Status, launch, new_status

ROWS = {
    torch.float32: "triton",
    torch.bfloat16: "triton-bf16",
    torch.int8: "triton-int8",
    torch.float8_e4m3fn: "triton-fp8",
}
_SHARE = 32  # room for one hit in so many pre-activations at first; a text of more is encoded a second time
_LEAST = 1024


def device_or_raise() -> torch.device:
    """Where the kernel runs: the CUDA device, or the CPU under Triton's interpreter. Raises ConfigError."""
    if fused.INTERPRETED:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    raise ConfigError(
        f"encode.backend: found no CUDA device for triton (torch {torch.__version__}), expected one, "
        f"or TRITON_INTERPRET=1 in the environment for Triton's interpreter, which is slow"
    )


class FusedEncoder:
    """The encoder contract on a CUDA device. What it returns lies on the CPU, in order of token and then row.

    Rows move to the device on first sight and stay for as long as the caller keeps them. The buffer of hits is sized
    by guess; where more fired, the launch says how many, and a second one with that much room has them all.
    """

    def __init__(self, rows: torch.dtype = torch.float32) -> None:
        """`rows`: the dtype that they are kept in, one of ROWS. All but float32 round them, and so move hits."""
        self.name = ROWS[rows]
        self._rows = rows
        self._device = device_or_raise()
        self._held: dict[int, Columns] = {}
        self.path = ""  # which one ran last: prefill or decode
        self.launches = 0

    def __call__(self, x: Tensor, rows: EncodeRows) -> Encoded:
        check_shape(x, rows)
        columns = self._columns(rows)
        x = x.to(self._device)
        if x.dtype not in {torch.float32, torch.float16, torch.bfloat16}:
            x = x.float()
        if x.stride(1) != 1:
            x = x.contiguous()
        buffer, told = self._encode(x, columns, max(_LEAST, len(x) * columns.latents // _SHARE))
        if told.finite and told.hits > buffer.capacity:
            buffer, told = self._encode(x, columns, told.hits)
        if not told.finite:
            return not_finite(x, rows)
        cell, order = buffer.cell[: told.hits].long().sort()
        return Encoded(
            token=(cell // max(1, columns.latents)).cpu(),
            row=(cell % max(1, columns.latents)).cpu(),
            value=buffer.value[order].cpu(),
            probe=buffer.probe.cpu(),
            finite=True,
        )

    def _encode(self, x: Tensor, columns: Columns, capacity: int) -> tuple[HitBuffer, Status]:
        buffer, status = HitBuffer.on(columns, len(x), capacity), new_status(columns)
        self.path = launch(x, columns, status, hits=buffer)
        self.launches += 1
        return buffer, Status.read(status)

    def _columns(self, rows: EncodeRows) -> Columns:
        key = id(rows)
        if key not in self._held:
            self._held[key] = Columns.on(self._device, [rows], dtype=self._rows)
            weakref.finalize(rows, self._held.pop, key, None)
        return self._held[key]


class FusedPool:
    """Pooled sums of many streams, updated in place by calls that a CUDA graph may hold.

    Call it once before the capture, with tensors of the same shapes and dtypes: that compiles and tunes, on copies.
    With `capacity` above 0 each call leaves its hits in `hits` too; sums do not go through that buffer, and stay exact
    when it overflows.
    """

    def __init__(self, columns: Columns, slots: int, *, tokens: int = 0, capacity: int = 0) -> None:
        self.columns = columns
        self.pool = Pool.on(columns, slots)
        self.status = new_status(columns)
        self.hits = HitBuffer.on(columns, tokens, capacity) if capacity else None
        self.path = ""

    def __call__(self, x: Tensor, slots: Tensor) -> None:
        """`x [T, D]` or `[hook points, T, D]` and `slots [T]` int32 on the device; nothing here waits for it."""
        self.path = launch(x, self.columns, self.status, hits=self.hits, pool=self.pool, slots=slots)
