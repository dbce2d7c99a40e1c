"""Taps: what is attached to a served model, and where its steps go. An engine needs `guard.tap.protocol` alone."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guard.tap.torch_hooks import TorchTap, attach, describe

__all__ = ["TorchTap", "attach", "describe"]


def __getattr__(name: str) -> Any:
    """The transformers tap loads torch, which the protocol and the sinks do without."""
    if name in __all__:
        from guard.tap import torch_hooks

        return getattr(torch_hooks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
