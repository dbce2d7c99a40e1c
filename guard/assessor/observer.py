"""What the assessor reports as it works; the service turns it into metrics."""

from collections.abc import Sequence

from guard.records import Verdict


class Observer:
    """Does nothing; subclass it."""

    def verdict(self, verdict: Verdict, method: str) -> None:
        """A verdict is ready; `method` is `check`, `watch` or `observe`."""

    def hits(self, counts: Sequence[int]) -> None:
        """Hits since the last call, by row, in the order of `pack.latents`."""

    def batch(self, sequences: int, tokens: int, seconds: dict[str, float]) -> None:
        """A batch was read; seconds by stage (read, encode)."""

    def tap_step(self, engine: str, rows: int, tokens: int, dropped: int) -> None:
        """A step of a tap: runs of rows, tokens that were new, and steps dropped since the last one."""

    def taps(self, engine: str, connected: int, requests: int) -> None:
        """Taps connected, and their open requests."""

    def ended(self, verdict: Verdict) -> None:
        """An observed request has ended with this verdict, each action the severest that it had."""
