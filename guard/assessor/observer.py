"""What the assessor reports as it works; the service turns it into metrics."""

from guard.records import Verdict
from guard.scoring.pooling import Ints


class Observer:
    """Does nothing; subclass it."""

    def verdict(self, verdict: Verdict, method: str) -> None:
        """A verdict is ready; `method` is `check` or `watch`."""

    def hits(self, counts: Ints) -> None:
        """`counts [K]`: hits since the last call, by row, in the order of `pack.latents`."""

    def prefix(self, tokens: int) -> None:
        """A chat was looked up among those kept; `tokens` of it need not be read again."""

    def batch(self, sequences: int, tokens: int, seconds: dict[str, float]) -> None:
        """A batch was read; seconds by stage (read, encode)."""
