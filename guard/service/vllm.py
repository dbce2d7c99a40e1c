"""vLLM's plugin `guard` (entry point group `vllm.general_plugins`): joins the tap and the sidecar's gRPC.

Nothing is imported before it is needed: vLLM logs an import error of a plugin and goes on without it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guard.tap.protocol import Sink, TapInfo
    from guard.tap.vllm.settings import TapSettings


def register() -> None:
    """vLLM calls this in each of its processes."""
    from guard.tap.vllm.plugin import install

    install(_sink)


def _sink(info: "TapInfo", settings: "TapSettings") -> "Sink":
    from guard.service.sink import GrpcSink

    return GrpcSink(settings.taps, info)
