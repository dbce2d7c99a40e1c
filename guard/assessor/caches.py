"""What the caches of all streams take: over the bound, those idle longest lose theirs."""

import threading
from typing import Protocol


class Holder(Protocol):
    def drop_cache(self) -> bool:
        """False where the cache is in use."""
        ...


class Caches:
    """Bytes by holder, the one used longest ago first. For use from any thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: dict[Holder, int] = {}
        self._lock = threading.Lock()
        self.nbytes = 0

    def count(self, holder: Holder, nbytes: int) -> None:
        """`holder` has just been used, and holds `nbytes` now. Others than it make room."""
        with self._lock:
            self.nbytes += nbytes - self._held.pop(holder, 0)
            self._held[holder] = nbytes
            over = self.nbytes - self._limit
            idle = []
            for other, held in self._held.items():
                if over <= 0 or other is holder:
                    break
                if held:
                    idle.append(other)
                    over -= held
        for other in idle:  # without the lock: a holder has one of its own
            if other.drop_cache():
                self.forget(other)

    def forget(self, holder: Holder) -> None:
        with self._lock:
            self.nbytes -= self._held.pop(holder, 0)
