"""How the tap gets into vLLM's workers. No vLLM is imported before `install` is called."""

import functools
import logging
from collections.abc import Callable
from typing import Any

from guard.tap.protocol import Sink, TapInfo
from guard.tap.vllm.settings import TapSettings, read

log = logging.getLogger("vllm.guard")

MakeSink = Callable[[TapInfo, TapSettings], Sink]


def install(make_sink: MakeSink) -> None:
    """Called in every process of vLLM, more than once in some.

    A worker whose engine was started with the setting gets the tap when its runner is there; any other is left alone.

    vLLM swallows an import error of a plugin, so nothing that can fail stands at a module's top; what is refused is
    raised while the worker starts, and ends the engine.
    """
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from guard.tap.vllm import stopping

    stopping.heed_stops(Scheduler)

    original = WorkerWrapperBase.init_device
    if getattr(original, "guarded", False):
        return

    @functools.wraps(original)
    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        settings = read(self.vllm_config.additional_config)
        if settings is not None:
            attach(self.worker.model_runner, self.vllm_config, settings, make_sink)
        return result

    init_device.guarded = True  # type: ignore[attr-defined]  # a function, which may carry marks
    WorkerWrapperBase.init_device = init_device


def attach(runner: Any, config: Any, settings: TapSettings, make_sink: MakeSink) -> None:
    """Prepares a runner that has loaded nothing yet. Raises ConfigError and PackError; load_model raises them too."""
    import vllm

    from guard.kernels import choice
    from guard.pack.loader import load_pack
    from guard.tap.vllm import checks
    from guard.tap.vllm.activations import Activations
    from guard.tap.vllm.encode import BatchEncoder
    from guard.tap.vllm.runner import RunnerTap

    checks.check_engine(config, runner, vllm.__version__, settings)
    pack = load_pack(settings.pack)
    names = tuple(point.name for point in pack.hook_points)
    layers = checks.aux_layers(names, config.model_config.hf_text_config.num_hidden_layers)
    checks.note_hook_points(config, names, pack.hash)
    activations = Activations(runner, names, layers)
    original = runner.load_model

    @functools.wraps(original)
    def load_model(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        served = checks.check_served(pack, config, settings)
        if not activations.way:
            raise RuntimeError("guard's vLLM tap: load_model did not ask for the hook points")
        if not _emits():
            return result
        encoder = choice.choose(settings.backend)
        info = TapInfo(
            engine="vllm",
            engine_version=vllm.__version__,
            pack_hash=pack.hash,
            model=served.fingerprint,
            hook_points=names,
            dtype=str(config.model_config.dtype).removeprefix("torch."),
        )
        runner.guard_tap = RunnerTap(
            runner, activations, BatchEncoder(encoder, pack.hook_points), make_sink(info, settings), settings
        )
        log.info(
            "guard: on, pack %s %s, %s by %s, encoder %s, taps %s",
            pack.info.id,
            pack.info.version,
            ", ".join(names),
            activations.way,
            encoder.name,
            settings.taps,
        )
        return result

    runner.load_model = load_model


def _emits() -> bool:
    """One worker tells for all: the first of tensor parallelism, the last of pipeline parallelism."""
    from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

    return bool(get_tensor_model_parallel_rank() == 0 and get_pp_group().is_last_rank)
