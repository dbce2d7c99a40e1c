"""The way to what vLLM has no auxiliary outputs for: a custom op that copies a module's output into a buffer.

The op stands in a forward hook that is registered before compilation, so it becomes a part of the graph, where a hook's
own Python would run once, while the graph is traced. Buffers never move: what is captured writes to the same place.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from guard.errors import ConfigError

_OP = "guard::keep"


def _register() -> Any:
    """The op, registered once in this process."""
    if not hasattr(torch.ops.guard, "keep"):

        @torch.library.custom_op(_OP, mutates_args=("buffer",))
        def keep(output: Tensor, buffer: Tensor) -> None:
            buffer[: output.shape[0]].copy_(output)

        @keep.register_fake
        def _(output: Tensor, buffer: Tensor) -> None: ...

    return torch.ops.guard.keep


def attach(
    model: torch.nn.Module, names: Sequence[str], *, tokens: int, d_model: int, dtype: torch.dtype
) -> list[Tensor]:
    """Buffers `[tokens, d_model]` of the named modules, which every forward of the model fills from the front.

    A module that hands out two tensors (vLLM's layers: the output and the residual it is to be added to) has their sum
    kept. Raises ConfigError for a name that the model has not.
    """
    keep = _register()
    buffers = []
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ConfigError(
                f"guard's vLLM tap: hook point {name!r}: found no such module in the served model"
            ) from None
        device = next(model.parameters()).device
        buffer = torch.zeros(tokens, d_model, dtype=dtype, device=device)
        module.register_buffer("guard_kept", buffer, persistent=False)

        def hook(module: Any, _inputs: object, output: Any) -> None:
            if isinstance(output, tuple):
                output = output[0] if output[1] is None else output[0] + output[1]
            keep(output, module.guard_kept)

        module.register_forward_hook(hook)
        buffers.append(buffer)
    return buffers
