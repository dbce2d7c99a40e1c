"""The reader without torch: an exported graph on onnxruntime, keys and values of streams in numpy's memory."""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.errors import ConfigError
from guard.reader.exported import GRAPH, Export, read_export

Floats = NDArray[np.float32]

_STEP = 128  # tokens by which a stream's room grows


class OnnxStream:
    """The keys and values of the tokens read so far, each the front of a buffer with room for more."""

    def __init__(self, export: Export) -> None:
        self._export = export
        self.length = 0
        self.buffers: list[Floats] = []  # 2 * depth of [1, kv_heads, room, head_dim]

    @property
    def room(self) -> int:
        return int(self.buffers[0].shape[2]) if self.buffers else 0

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def take(self, other: "OnnxStream", length: int) -> None:
        """Begins a stream that has read nothing with the first `length` tokens of another one."""
        self.grow(length)
        for mine, theirs in zip(self.buffers, other.buffers, strict=True):
            mine[:, :, :length] = theirs[:, :, :length]
        self.length = length

    def grow(self, tokens: int) -> None:
        """Makes room for `tokens` in all."""
        if tokens <= self.room:
            return
        room = -(-tokens // _STEP) * _STEP
        known, self.buffers = self.buffers, []
        for number in range(2 * self._export.depth):
            buffer = np.zeros((1, self._export.kv_heads, room, self._export.head_dim), dtype=np.float32)
            if known:
                buffer[:, :, : self.length] = known[number][:, :, : self.length]
            self.buffers.append(buffer)


class OnnxReader:
    """Reads token ids with a folder that `guard export` made; activations are numpy float32 `[T, d_model]`.

    `threads` 0 takes every core of this process. Not thread-safe: one worker owns it. Raises WeightsError for a folder
    that is no exported one, and ConfigError for a hook point that it was not exported with, where onnxruntime is not
    installed, and where the processor cannot take int8 products exactly.
    """

    def __init__(self, folder: Path, hook_points: Sequence[str], *, threads: int = 0) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise ConfigError(
                f"reader.model {folder}: an exported reader needs the package onnxruntime: "
                f"pip install 'sae-guard[onnx]'"
            ) from None
        self._export = read_export(folder)
        missing = [point for point in hook_points if point not in self._export.hook_points]
        if missing:
            raise ConfigError(
                f"reader.model {folder}: found hook points {', '.join(self._export.hook_points)}, expected "
                f"{', '.join(missing)} among them; guard export makes a folder for another pack"
            )
        if self._export.dtype == "int8":
            _check_processor(folder, _processor_flags())
        self.hook_points = tuple(hook_points)
        self.d_model, self.depth = self._export.d_model, self._export.depth
        self.positions: int | None = self._export.positions
        self.dtype = self._export.dtype
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Helpers that spin between products would take the cores from the encoder and from other callers' threads.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
        names = [f"{number}.{part}" for number in range(self.depth) for part in ("key", "value")]
        self._past, self._present = [f"past.{n}" for n in names], [f"present.{n}" for n in names]
        self._nothing: dict[int, Floats] = {}

    def flops_per_token(self) -> int:
        return self._export.flops_per_token

    def read(self, sequences: Sequence[Sequence[int]]) -> list[dict[str, Floats]]:
        """Reads whole sequences in one batch. Each result holds `[len(sequence), d_model]` a hook point."""
        lengths = [len(ids) for ids in sequences]
        ids = np.zeros((len(sequences), max(lengths)), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
        # Padding stands to the right, and attention is causal: no real token sees it, and it is read like any other.
        past = dict.fromkeys(self._past, self._empty(len(sequences)))
        seen = self._session.run(list(self.hook_points), {**_inputs(ids, 0), **past})
        return [
            {point: batch[row, :length] for point, batch in zip(self.hook_points, seen, strict=True)}
            for row, length in enumerate(lengths)
        ]

    def new_stream(self) -> OnnxStream:
        return OnnxStream(self._export)

    def extend(self, steps: Sequence[tuple[OnnxStream, Sequence[int]]]) -> list[dict[str, Floats]]:
        """Reads the next tokens of each stream, one after the other; earlier tokens are not read again."""
        return [self._extend(stream, ids) for stream, ids in steps]

    def _extend(self, stream: OnnxStream, ids: Sequence[int]) -> dict[str, Floats]:
        stream.grow(stream.length + len(ids))
        given = _inputs(np.array([list(ids)], dtype=np.int64), stream.length)
        binding = self._session.io_binding()
        for name, values in given.items():
            binding.bind_cpu_input(name, values)
        for point in self.hook_points:
            binding.bind_output(point)
        # One buffer is both the past and the present: attention writes what is new behind what is there.
        for buffer, past, present in zip(stream.buffers, self._past, self._present, strict=True):
            where = ("cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
            binding.bind_input(past, *where)
            binding.bind_output(present, *where)
        self._session.run_with_iobinding(binding)
        stream.length += len(ids)
        seen = binding.get_outputs()[: len(self.hook_points)]
        return {point: output.numpy()[0] for point, output in zip(self.hook_points, seen, strict=True)}

    def _empty(self, count: int) -> Floats:
        if count not in self._nothing:
            self._nothing[count] = np.zeros((count, self._export.kv_heads, 0, self._export.head_dim), np.float32)
        return self._nothing[count]


def _inputs(ids: NDArray[np.int64], before: int) -> dict[str, NDArray[Any]]:
    """`ids [B, T]` behind `before` tokens."""
    total = before + ids.shape[1]
    return {
        "ids": ids,
        "last": np.full(len(ids), total - 1, dtype=np.int32),
        "total": np.array(total, dtype=np.int32),
    }


def _processor_flags() -> set[str]:
    """Flags of this x86-64 processor; empty where they are not known, or it is another kind."""
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.exists():
        return set()
    lines = info.read_text(encoding="utf-8").splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return set(flags.partition(":")[2].split())


def _check_processor(folder: Path, flags: set[str]) -> None:
    # Without VNNI onnxruntime adds pairs of int8 products in 16 bits, which saturate: wrong scores, and no error.
    if flags and not {"avx512_vnni", "avx_vnni"} & flags:
        raise ConfigError(
            f"reader.model {folder}: found a processor without VNNI (avx512_vnni or avx_vnni), expected one for int8; "
            f"guard export --dtype float32 makes a folder that it can read"
        )
