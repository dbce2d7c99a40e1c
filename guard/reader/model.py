"""The torch reader: runs a Hugging Face model as deep as the deepest hook point and hands out what it saw there."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from guard import onednn
from guard.errors import ConfigError, WeightsError
from guard.reader.stream import ATTENTION, STEPS, Stream, steps_of

Activations = dict[str, Tensor]  # hook point -> [T, d_model], in the reader's dtype

_LAYER = re.compile(r"\blayers\.(\d+)\b")


def pick_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16`, or `auto`: bfloat16 where the processor multiplies it natively, else float32."""
    if name == "auto":
        fast = (
            torch.cpu._is_amx_tile_supported()  # noqa: SLF001 - torch has no public probe
            or torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - as above
        )
        return torch.bfloat16 if fast else torch.float32
    try:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    except KeyError:
        raise ConfigError(f"reader dtype: found {name!r}, expected 'float32', 'bfloat16' or 'auto'") from None


class TorchReader:
    """Reads token ids and returns the outputs of `hook_points`.

    A hook point is the dotted path of a module in the causal-LM model (`model.layers.13`, `model.layers.13.mlp`).
    Layers above the deepest one named are never loaded. Not thread-safe: one worker owns it.

    Raises WeightsError when the folder lacks tensors that the kept layers need, and ConfigError for a hook point that
    the model does not have.
    """

    def __init__(
        self,
        folder: Path,
        hook_points: Sequence[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder)
        layers = [int(match.group(1)) for point in hook_points if (match := _LAYER.search(point))]
        if layers and max(layers) >= config.num_hidden_layers:
            raise ConfigError(f"hook point layer {max(layers)}: the model has {config.num_hidden_layers} layers")
        depth = max(layers) + 1 if len(layers) == len(hook_points) else config.num_hidden_layers
        with _quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                num_hidden_layers=depth,
                dtype=dtype,
                attn_implementation=ATTENTION,
                output_loading_info=True,
            )
        model, loading = loaded
        if loading["missing_keys"]:
            raise WeightsError(f"{folder}: missing tensors: {', '.join(sorted(loading['missing_keys']))}")
        self.hook_points = tuple(hook_points)
        self.depth = depth
        self.d_model = int(config.hidden_size)
        self.positions: int | None = getattr(config, "max_position_embeddings", None)  # tokens read at once, at most
        self.dtype = dtype
        self.device = torch.device(device)
        self._seen: Activations = {}
        self._model = model.eval().to(self.device)
        self._body: Any = model.base_model  # without the unembedding, which no hook point needs
        parameters = self._body.named_parameters()
        self._multiplied: int = sum(p.numel() for name, p in parameters if "layers." in name and p.dim() == 2)
        self._laid_out = self.device.type == "cpu" and onednn.can_lay_out(dtype)
        if self._laid_out:
            _lay_out(self._body)
        for point in hook_points:
            try:
                module = model.get_submodule(point)
            except AttributeError:
                raise ConfigError(f"hook point {point!r}: the model has no such module") from None
            module.register_forward_hook(self._catch(point))

    def flops_per_token(self) -> int:
        """Multiply-adds of the kept layers' weight matrices, times two; attention scores not counted."""
        return 2 * self._multiplied

    @torch.inference_mode()
    def read(self, sequences: Sequence[Sequence[int]]) -> list[Activations]:
        """Reads whole sequences in one batch. Each result holds `[len(sequence), d_model]` a hook point."""
        lengths = [len(ids) for ids in sequences]
        width = max(lengths)
        if len(sequences) == 1 and self._laid_out and onednn.padded(width) <= (self.positions or math.inf):
            width = onednn.padded(width)  # else every layer would pad its own input
        ids = torch.zeros(len(sequences), width, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.as_tensor(sequence)
        # Padding stands to the right, and attention is causal: no real token sees it, so no mask is needed.
        seen = self._run(ids)
        return [
            {point: batch[row, :length] for point, batch in seen.items()}  # [T, d_model]
            for row, length in enumerate(lengths)
        ]

    @staticmethod
    def new_stream() -> Stream:
        return Stream()

    @torch.inference_mode()
    def extend(self, steps: Sequence[tuple[Stream, Sequence[int]]]) -> list[Activations]:
        """Reads the next tokens of several streams at once; earlier tokens are not read again."""
        row = [token for _, ids in steps for token in ids]
        places = [stream.length + offset for stream, ids in steps for offset in range(len(ids))]
        taken = steps_of(steps, self.device)
        # A mask of four axes is handed on as it is; this one holds nothing, so that no attention but ours can use it.
        seen = self._run(
            torch.tensor([row]),
            position_ids=torch.tensor([places], device=self.device),
            attention_mask=torch.empty(1, 1, 0, 0, dtype=torch.bool, device=self.device),
            **{STEPS: taken},
        )
        for step in taken:
            step.stream.length += step.end - step.begin
        return [{point: batch[0, s.begin : s.end] for point, batch in seen.items()} for s in taken]  # [T, d_model]

    def _run(self, ids: Tensor, **given: Any) -> Activations:
        self._body(input_ids=ids.to(self.device), use_cache=False, **given)
        seen, self._seen = self._seen, {}
        return seen

    def _catch(self, point: str) -> Any:
        def hook(_module: object, _inputs: object, output: Any) -> None:
            self._seen[point] = output[0] if isinstance(output, tuple) else output  # [B, T, d_model]

        return hook


class LaidOut(torch.nn.Module):
    """A linear layer whose weight is laid out once (`guard.onednn`), `[..., in]` -> `[..., out]`; for reading only."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.laid_out = onednn.lay_out(linear.weight.detach())
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """`[out, in]`, made anew each time: some models look at it."""
        return self.laid_out.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        return onednn.product(rows, self.laid_out, self.bias).view(*x.shape[:-1], self.out_features)


def _lay_out(body: torch.nn.Module) -> None:
    """Layer by layer, so that no more than one weight is held twice."""
    parents = [module for module in body.modules() if not isinstance(module, torch.nn.Linear)]
    for parent in parents:
        for name, module in list(parent.named_children()):
            if _is_plain(module):
                setattr(parent, name, LaidOut(module))


def _is_plain(module: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Whether it multiplies as `Linear` does: quantised weights, and what somebody put around one, are left alone."""
    return (
        type(module) is torch.nn.Linear
        and type(module.weight) is torch.nn.Parameter
        and onednn.can_lay_out(module.weight.dtype)
        and "forward" not in vars(module)
        and not module._forward_pre_hooks  # noqa: SLF001 - torch tells of them nowhere else
        and not module._forward_hooks  # noqa: SLF001
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences the report on the layers that are left out on purpose."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
