"""Both ends of an observed request: the tap that brings its rows, and whoever follows it."""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from guard.config import TapsConfig
from guard.errors import ConfigError
from guard.pack.loader import Pack
from guard.records import ModelInfo
from guard.tap.protocol import Step, TapInfo

if TYPE_CHECKING:
    from guard.assessor.observed import Observed
    from guard.assessor.observing import Request

TESTED = {"transformers": ("5.",), "vllm": ("0.32.",)}  # how the versions begin that tests ran with


class Link:
    """One tap that was accepted."""

    def __init__(self, observed: "Observed", info: TapInfo, model: ModelInfo) -> None:
        self._observed, self.info, self.model = observed, info, model
        self.connected_at = time.monotonic()
        self.open: set[str] = set()
        self.stops: set[str] = set()  # open requests whose generation is to end
        self.read_at = -math.inf  # when rows came last
        self._sent: set[str] = set()
        self._dropped = 0

    def take(self, step: Step, *, dropped: int = 0) -> None:
        """Reads a step; `dropped` counts the steps that the tap could not hand over so far."""
        more, self._dropped = dropped - self._dropped, dropped
        self._observed.take(self, step, max(0, more))

    def stops_to_send(self) -> list[str]:
        """Those of `stops` that no call before this one gave."""
        with self._observed.lock:
            new = self.stops - self._sent
            self._sent |= new
        return sorted(new)

    def need_not_stop(self, request_id: str) -> None:
        self.stops.discard(request_id)
        self._sent.discard(request_id)

    def close(self) -> None:
        """The tap has gone; requests that it leaves open are not assessed."""
        self._observed.lose(self)


class Follower:
    """Who follows a request, announced before its first row or while it runs: from then on it is that one request's."""

    def __init__(self, request_id: str, wake: Callable[[], None], *, upcoming: bool = False) -> None:
        self.request_id = request_id
        self.upcoming = upcoming  # it has not begun: one of that id that has ended is another
        self.wake = wake  # called on any thread whenever the request has advanced
        self.request: Request | None = None  # once a row of it has come
        self.announced_at = time.monotonic()
        self.passed_over = False  # rows of it have, and there was no room
        self.left = False


def check_tap(info: TapInfo, pack: Pack, config: TapsConfig, *, allow_unverified: bool) -> None:
    """Raises ConfigError, with what to do, for a tap whose pack, hook points, model or engine do not fit."""
    here = f"{pack.manifest.id} {pack.manifest.version}"
    if info.pack_hash != pack.hash:
        raise _refused(
            f"pack: found hash {info.pack_hash[:12] or 'none'}, expected {pack.hash[:12]} ({here}): "
            f"give the engine's tap and this sidecar the same pack"
        )
    expected = tuple(rows.name for rows in pack.hook_points)
    if info.hook_points != expected:
        raise _refused(
            f"hook points: found {', '.join(info.hook_points) or 'none'}, expected {', '.join(expected)} "
            f"({here}): tap the pack's own"
        )
    wanted = pack.manifest.model
    if info.model != wanted.weights and not allow_unverified:
        raise _refused(
            f"model: found weights {info.model[:12] or 'unknown'}, expected {wanted.weights[:12]} "
            f"({wanted.name}): serve that model, or set reader.allow_unverified = true to run unverified"
        )
    if config.allow_untested:
        return
    if info.engine not in TESTED:
        raise _refused(f"engine: found {info.engine!r}, expected one of {', '.join(TESTED)}")
    versions = TESTED[info.engine]
    if not info.engine_version.startswith(versions):
        raise _refused(
            f"{info.engine}: found version {info.engine_version or 'unknown'}, expected "
            f"{' or '.join(v + 'x' for v in versions)}: install that, or set taps.allow_untested = true"
        )


def _refused(message: str) -> ConfigError:
    return ConfigError(message, reason="TAP_REFUSED")
