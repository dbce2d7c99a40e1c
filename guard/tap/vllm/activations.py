"""Where the pack's activations come from: the model's auxiliary outputs, else buffers that a custom op fills."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from guard.tap.vllm import buffers

log = logging.getLogger("vllm.guard")


class Activations:
    """The outputs of `hook_points` of the model that `runner` is about to load.

    `layers` are vLLM's auxiliary numbers of them, None where they are not all whole layers. Everything is asked for
    within load_model: that is before anything is compiled or captured, so it belongs to the graphs. load_model raises
    ConfigError for a hook point that the model has not.
    """

    def __init__(self, runner: Any, hook_points: Sequence[str], layers: tuple[int, ...] | None) -> None:
        self._runner = runner
        self._hook_points = tuple(hook_points)
        self._layers = layers
        self._buffers: list[Tensor] | None = None
        self.way = ""  # how they are read; empty until the model is loaded
        self._setup = runner._setup_eagle3_aux_hidden_state_outputs  # noqa: SLF001 - looked for at start, see checks
        runner._setup_eagle3_aux_hidden_state_outputs = self._prepare  # noqa: SLF001 - as above

    @property
    def auxiliary(self) -> bool:
        """Whether the runner's auxiliary outputs are ours; its drafter then has none."""
        return self._buffers is None

    def of(self, state: Any, tokens: int) -> list[Tensor]:
        """`[tokens, d_model]` of each hook point, from a step's ExecuteModelState."""
        found: Sequence[Tensor] | None = state.aux_hidden_states if self.auxiliary else self._buffers
        if found is None or len(found) != len(self._hook_points):
            count = None if found is None else len(found)
            raise RuntimeError(f"activations: found {count} hook points, expected {len(self._hook_points)}")
        return [x[:tokens] for x in found]

    def _prepare(self) -> None:
        from vllm.model_executor.models.interfaces import supports_eagle3

        runner = self._runner
        model = runner.get_model()
        wanted = runner.use_aux_hidden_state_outputs  # by a drafter
        if self._layers is not None and supports_eagle3(model) and not wanted:
            runner.use_aux_hidden_state_outputs = True
            model.set_aux_hidden_state_layers(self._layers)
            self.way = "auxiliary outputs"
            return
        self._setup()
        config = runner.model_config
        captured = runner.compilation_config.max_cudagraph_capture_size or 0  # a graph pads its tokens
        self._buffers = buffers.attach(
            model,
            self._hook_points,
            tokens=max(runner.max_num_tokens, captured),
            d_model=config.get_hidden_size(),
            dtype=config.dtype,
        )
        self.way = "a custom op"
