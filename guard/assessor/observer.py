"""What the assessor reports as it works; the service turns it into metrics."""

from guard.records import Verdict
from guard.scoring.pooling import Ints


class Observer:
    """Does nothing; subclass it."""

    def verdict(self, verdict: Verdict, method: str) -> None:
        """A verdict is ready; `method` is `check`, `watch` or `observe`."""

    def hits(self, counts: Ints) -> None:
        """`counts [K]`: hits since the last call, by row, in the order of `pack.latents`."""

    def prefix(self, tokens: int) -> None:
        """A chat was looked up among those kept; `tokens` of it need not be read again."""

    def batch(self, sequences: int, tokens: int, seconds: dict[str, float]) -> None:
        """A batch was read; seconds by stage (read, encode)."""

    def tap_step(self, engine: str, rows: int, tokens: int, dropped: int) -> None:
        """A step of a tap: runs of rows, tokens that were new, and steps dropped since the last one."""

    def taps(self, engine: str, connected: int, requests: int) -> None:
        """Taps connected, and their open requests."""

    def ended(self, verdict: Verdict) -> None:
        """An observed request has ended with this verdict, each action the severest that it had."""
