"""The tap of a transformers model: forward hooks at the pack's hook points, encoded on the model's own device.

    info = guard.tap.describe(model, pack)
    with guard.tap.attach(model, pack, sink, request_ids=["a", "b"]):
        model.generate(**inputs)

A request begins with a forward whose cache is not as the one before left it, and lasts until the next such forward, the
end of `generate`, or the end of the `with` block. Only tokens whose activations were computed and accepted count: the
last sampled one never is, nor is what a batch feeds a sample that has ended. Every request id serves once.
"""

import inspect
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from guard.errors import ConfigError, InvalidInput
from guard.kernels import choice
from guard.kernels.contract import Encoded, EncodeRows
from guard.pack.loader import Pack
from guard.reader import weights
from guard.tap.generating import settings_of, steered
from guard.tap.protocol import Ended, Missed, Rows, Sink, Step, TapInfo

RequestIds = Sequence[str] | Callable[[int], Sequence[str]] | None


def describe(model: Any, pack: Pack, *, folder: Path | None = None) -> TapInfo:
    """What a tap of `model` announces. `folder` holds the weights; by default the one that the model was loaded from.

    Raises ConfigError where that is no folder on this machine.
    """
    place = folder or Path(getattr(model, "name_or_path", "") or "")
    if not any(place.glob("*.safetensors")):
        raise ConfigError(
            f"model folder {str(place)!r}: found no *.safetensors there, expected the folder that the model was "
            f"loaded from: name it with folder="
        )
    return TapInfo(
        engine="transformers",
        engine_version=transformers.__version__,
        pack_hash=pack.hash,
        model=weights.fingerprint(place)["weights"],
        hook_points=tuple(rows.name for rows in pack.hook_points),
        dtype=str(model.dtype).removeprefix("torch."),
    )


@contextmanager
def attach(
    model: Any,
    pack: Pack,
    sink: Sink,
    *,
    request_ids: RequestIds = None,
    backend: str = "auto",
    folder: Path | None = None,
    allow_unverified: bool = False,
) -> "Iterator[TorchTap]":
    """Taps a causal language model for as long as the block lasts, and leaves it as it was. The sink stays open.

    `request_ids`: those of the next batch, or what makes them for a batch of a given size; made up where it is None.
    `backend` as the setting `encode.backend`; `auto` is triton on a CUDA device and cpu elsewhere.

    Raises ConfigError for a model that the pack does not fit: its weights (unless `allow_unverified`), a hook point,
    d_model; and for one that torch.compile has been at, where hooks would run once, while it is traced.
    """
    _check(model, pack)
    found, wanted = describe(model, pack, folder=folder), pack.manifest.model
    if found.model != wanted.weights and not allow_unverified:
        raise ConfigError(
            f"model: found weights {found.model[:12]}, expected {wanted.weights[:12]} ({wanted.name}): tap that "
            f"model, or pass allow_unverified=True"
        )
    tap = TorchTap(model, pack, sink, request_ids, backend)
    try:
        tap.hook()
        yield tap
    finally:
        tap.unhook()


@dataclass(slots=True)
class _Sample:
    """One request of a batch."""

    request_id: str
    prompt_tokens: int
    cursor: int = 0  # position of the next token
    done: bool = False
    guard: bool = False  # ended on a block


@dataclass(slots=True)
class _Forward:
    """A forward on its way."""

    ids: Tensor  # [B, T]
    position: Tensor  # [B, T]; -1 for padding
    seen: dict[str, Tensor] = field(default_factory=dict)  # hook point -> [B, T, d_model]


class TorchTap:
    """An attached tap; made by `attach`. The model must run in one thread at a time."""

    def __init__(self, model: Any, pack: Pack, sink: Sink, request_ids: RequestIds, backend: str) -> None:
        self._model, self._sink, self._request_ids = model, sink, request_ids
        self._points = tuple(rows.name for rows in pack.hook_points)
        on_cpu = model.device.type == "cpu"
        self._encode = choice.choose("cpu" if backend == "auto" and on_cpu else backend)
        self._rows = [EncodeRows.of(rows, torch.from_numpy) for rows in pack.hook_points]
        self._offsets = np.cumsum([0, *(len(rows.latents) for rows in pack.hook_points)])
        self._handles: list[Any] = []
        self._batch: list[_Sample] = []
        self._parameters = tuple(inspect.signature(model.forward).parameters)
        self._cache: Any = None
        self._reach = 0  # columns that its cache holds once the forward in hand is done
        self._forward: _Forward | None = None
        self._generate: Any = None
        self._own_generate: Any = None  # what the instance itself had by that name
        self._names: tuple[str, ...] = ()
        self._prompt: tuple[int, Tensor | None] | None = None  # of a generate call: its width and its mask

    @property
    def encode_backend(self) -> str:
        return self._encode.name

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Of the batch in hand, or the last one."""
        return self._names

    # -- on and off

    def hook(self) -> None:
        model = self._model
        self._handles.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
        for point in self._points:
            self._handles.append(model.get_submodule(point).register_forward_hook(self._catch(point)))
        self._handles.append(model.register_forward_hook(self._after))
        if hasattr(model, "generate"):
            self._generate, self._own_generate = model.generate, vars(model).get("generate")
            model.generate = self._generating

    def unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._generate is not None:
            del self._model.generate  # the instance's, which covered the class's
            if self._own_generate is not None:  # another tap's, or the caller's own
                self._model.generate = self._own_generate
            self._generate = self._own_generate = None
        self._end("stop")

    # -- a forward

    def _before(self, _model: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        ids = given.get("input_ids")
        if ids is None:
            raise InvalidInput("input_ids: found none, expected token ids: a tap cannot tell what embeddings say")
        cache = _cache(given.get)
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise InvalidInput(
                "attention_mask: found one that is not [B, T], expected a mask of the padding alone (a static cache "
                "makes others: use the default, dynamic one)"
            )
        width = ids.shape[1]
        if mask is None:
            mask = ids.new_ones(ids.shape[0], past + width)
        real = mask.bool()
        position = torch.where(real, real.long().cumsum(dim=1) - 1, -1)  # [B, past + T]
        if not self._goes_on(cache, past, ids):
            if self._prompt is not None and self._batch:
                return  # within `generate` a logits processor may ask the model about other text
            self._begin(position, past)
        self._reach = past + width
        self._forward = _Forward(ids, position[:, -width:])

    def _goes_on(self, cache: Any, past: int, ids: Tensor) -> bool:
        """Whether this forward is of the batch in hand: behind what it has cached, or in `generate` over all of it."""
        if cache is not self._cache or len(ids) != len(self._batch):
            return False
        if cache is None:  # `use_cache=False`: the whole text each time
            return self._prompt is not None and ids.shape[1] > self._reach
        # A cache that was cropped holds another text from here on.
        return 0 < past == self._reach

    def _begin(self, position: Tensor, past: int) -> None:
        """`position [B, past + T]`: what is in the batch, and what its cache holds."""
        self._end("stop")
        size = len(position)
        given = self._request_ids
        if callable(given):
            names = list(given(size))
        elif given is not None:
            names, self._request_ids = list(given), ()  # each serves once
        else:
            names = [uuid.uuid4().hex for _ in range(size)]
        if len(names) != size or len(set(names)) != size:
            raise InvalidInput(
                f"request_ids: found {len(set(names))}, expected {size}, one for each sample of the batch; a list "
                f"serves one batch, a function any number"
            )
        prompt = (position >= 0).sum(dim=1).tolist()
        if self._prompt is not None:
            width, mask = self._prompt
            if position.shape[1] != width:  # a part of the prompt
                prompt = mask.sum(dim=1).tolist() if mask is not None else [width] * size
        self._names = tuple(names)
        self._batch = [_Sample(name, int(count)) for name, count in zip(names, prompt, strict=True)]
        # What a cache brought along never went through these hooks: rows begin behind it, and the sidecar sees the gap.
        for sample, known in zip(self._batch, (position[:, :past] >= 0).sum(dim=1).tolist(), strict=True):
            sample.cursor = int(known)

    def _catch(self, point: str) -> Any:
        def hook(_module: object, _inputs: object, output: Any) -> None:
            if self._forward is not None:
                self._forward.seen[point] = output[0] if isinstance(output, tuple) else output

        return hook

    def _after(self, _model: object, _args: object, output: Any) -> None:
        forward, self._forward = self._forward, None
        if forward is None:
            return
        self._cache = _cache(lambda name: getattr(output, name, None))  # the first forward makes one
        if len(forward.seen) != len(self._points):
            return
        with torch.no_grad():
            self._send(forward)

    def _send(self, forward: _Forward) -> None:
        cursors = torch.tensor([s.cursor if not s.done else 1 << 62 for s in self._batch], device=forward.ids.device)
        new = forward.position >= cursors[:, None]  # [B, T]
        counts = new.sum(dim=1).tolist()
        if not any(counts):
            return
        ids = forward.ids[new].to(torch.int32).cpu().numpy()  # [N], sample by sample
        taken = [forward.seen[point][new.to(forward.seen[point].device)] for point in self._points]  # [N, d_model]
        rows: list[Rows] = []
        encoded = self._encoded(taken)
        begin = 0
        for sample, count in zip(self._batch, counts, strict=True):
            if not count:
                continue
            part = slice(begin, begin + count)
            # One sample's NaN is not the others': where the batch is not finite, each is encoded alone.
            own = _cut(encoded, part) if encoded else self._encoded([x[part] for x in taken])
            token, row, value, probe = own or self._nothing(count)
            run = (sample.request_id, sample.cursor, sample.prompt_tokens, ids[part])
            rows.append(Rows(*run, token, row, value, probe, finite=own is not None))
            sample.cursor += count
            begin += count
        self._sink.send(Step(tuple(rows)))

    def _nothing(self, count: int) -> "_Columns":
        probes = sum(len(rows.probe_rows) for rows in self._rows)
        empty = np.empty(0, np.int32)
        return empty, empty, empty.astype(np.float32), np.zeros((count, probes), np.float32)

    def _encoded(self, taken: Sequence[Tensor]) -> "_Columns | None":
        """Hits of all hook points in the order of their tokens; None where an activation is not finite."""
        parts: list[Encoded] = []
        for x, rows in zip(taken, self._rows, strict=True):
            parts.append(self._encode(x if self._encode.name.startswith("triton") else x.cpu(), rows))
            if not parts[-1].finite:
                return None
        token = np.concatenate([np.asarray(part.token) for part in parts])
        row = np.concatenate([np.asarray(p.row) + o for p, o in zip(parts, self._offsets, strict=False)])
        value = np.concatenate([np.asarray(part.value) for part in parts])
        order = np.argsort(token, kind="stable")
        return (
            token[order].astype(np.int32),
            row[order].astype(np.int32),
            value[order].astype(np.float32),
            np.concatenate([np.asarray(part.probe) for part in parts], axis=1).astype(np.float32),
        )

    def _end(self, reason: str) -> None:
        """The batch in hand has left the model; `reason` for those that did not end by themselves."""
        if not self._batch:
            return
        ended = [
            Ended(s.request_id, "guard" if s.guard else "stop" if s.done else reason, s.cursor) for s in self._batch
        ]
        self._sink.send(Step(ended=tuple(ended)))
        self._batch, self._cache = [], None

    # -- generate

    def _generating(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, with what ends a sample on a block. Raises InvalidInput for what is refused."""
        settings = settings_of(self._model, args, kwargs)
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if ids is None:
            raise InvalidInput("generate: found no input_ids, expected the prompt's token ids")
        if not settings.ending and len(ids) > 1:
            raise InvalidInput(
                f"generate: found neither an end-of-text nor a pad token for a batch of {len(ids)}, expected one: what "
                f"ends before the others has to be fed something (pass pad_token_id)"
            )
        mask = kwargs.get("attention_mask")
        self._end("stop")
        self._prompt = (ids.shape[1], mask)
        reason = "abort"
        try:
            result = self._generate(inputs, **steered(self, settings))
            reason = "length"
            self._account(result if isinstance(result, Tensor) else result.sequences)
        finally:
            self._prompt = None
            self._end(reason)
        return result

    def _account(self, sequences: Tensor) -> None:
        """`sequences [B, T]`: where the forwards that were told do not reach as far, the rest is not assessed."""
        fed = sequences.shape[1] - 1  # the last token never was
        if self._reach < fed:
            detail = f"its forwards could not be told from others': {fed - self._reach} tokens were passed over"
            missed = tuple(Missed(sample.request_id, detail) for sample in self._batch)
            self._sink.send(Step(missed=missed))

    def stopped(self) -> list[bool]:
        """For each sample of the batch, whether its verdict has turned to block."""
        stops = self._sink.stops()
        for sample in self._batch:
            sample.guard = sample.guard or (not sample.done and sample.request_id in stops)
        return [sample.guard for sample in self._batch]

    def over(self) -> list[bool]:
        """For each sample of the batch, whether nothing that comes is of its text."""
        return [stopped or sample.done for stopped, sample in zip(self.stopped(), self._batch, strict=True)]

    def finished(self, done: Sequence[bool]) -> None:
        """For each sample of the batch, whether its generation has ended: what the batch feeds it is no token of it."""
        for sample, ended in zip(self._batch, done, strict=True):
            sample.done = sample.done or ended


_Columns = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


def _cut(columns: _Columns, part: slice) -> _Columns:
    """The hits of some tokens, numbered from their beginning."""
    token, row, value, probe = columns
    first, last = np.searchsorted(token, (part.start, part.stop))
    return token[first:last] - np.int32(part.start), row[first:last], value[first:last], probe[part]


def _cache(get: Callable[[str], Any]) -> Any:
    """transformers called it `past_key_values` before 5.24."""
    return found if (found := get("cache")) is not None else get("past_key_values")


def _check(model: Any, pack: Pack) -> None:
    kind = type(model).__name__
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
        raise ConfigError(f"{kind}: found a model compiled by torch.compile, whose hooks run only once: tap it before")
    if model.config.is_encoder_decoder:
        raise ConfigError(f"{kind}: found an encoder-decoder model, expected a causal language model")
    made_for = f"pack {pack.manifest.id} was made for {pack.manifest.model.name}"
    for rows in pack.hook_points:
        try:
            model.get_submodule(rows.name)
        except AttributeError:
            raise ConfigError(f"hook point {rows.name!r}: {kind} has no such module; {made_for}") from None
    found, expected = model.config.get_text_config().hidden_size, pack.manifest.model.d_model
    if found != expected:
        raise ConfigError(f"d_model: found {found} ({kind}), expected {expected}; {made_for}")
