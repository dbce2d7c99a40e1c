"""A tap's sink over gRPC, for the engine's process: grpcio, protobuf and numpy, no torch and no pack.

A thread of its own sends what a bounded queue holds. Where the sidecar is slow, absent or refuses the tap, the queue
fills, further steps are dropped, and the engine goes on; requests that lost a step, or that were open when a connection
broke, are reported as missed once the sidecar is back.
"""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc

from guard.service import connection, wire
from guard.tap.protocol import Ended, Missed, Rows, Step, TapInfo

_METHOD = f"/{wire.SERVICE.full_name}/{wire.METHOD}"
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0  # seconds between attempts to connect
_REFUSED_WAIT = 10.0  # a sidecar that refused this tap may be started anew with what fits
_REMEMBERED = 100_000  # requests whose loss is remembered until it can be told

_log = logging.getLogger("guard.tap")


@dataclass(slots=True)
class _Lost:
    """Steps that are not sent, between those that are: whose they were."""

    requests: dict[str, str] = field(default_factory=dict)  # id -> why
    ended: dict[str, Ended] = field(default_factory=dict)

    def step(self) -> Step:
        missed = tuple(Missed(request_id, why) for request_id, why in self.requests.items())
        return Step(missed=missed, ended=tuple(self.ended.values()))


class GrpcSink:
    """Sends a tap's steps to a sidecar's `server.taps`. No method blocks (but `close`) or raises.

    `queue_steps` and `queue_bytes` bound what waits to be sent.
    """

    def __init__(self, address: str, info: TapInfo, *, queue_steps: int = 4096, queue_bytes: int = 256 << 20) -> None:
        self._address, self._info = address, info
        self._queue_steps, self._queue_bytes = queue_steps, queue_bytes
        self._queue: deque[Step | _Lost] = deque()
        self._steps = self._bytes = 0  # that wait
        self._dropped = self._told_dropped = 0
        self._sent: set[str] = set()  # open requests of which this connection has brought something
        self._stops: frozenset[str] = frozenset()
        self._changed = threading.Condition()
        self._closing = False
        self._connected = False
        self.refused = ""  # why the sidecar refused this tap; empty where it did not
        self._thread = threading.Thread(target=self._work, name="guard-tap", daemon=True)
        self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether the sidecar has accepted this tap, on the connection that stands."""
        return self._connected

    @property
    def dropped(self) -> int:
        return self._dropped

    def stops(self) -> frozenset[str]:
        return self._stops

    def send(self, step: Step) -> None:
        size = _size(step)
        with self._changed:
            if self._stops and step.ended:
                self._stops -= {ended.request_id for ended in step.ended}
            full = self._steps >= self._queue_steps or self._bytes + size > self._queue_bytes
            if full or self._closing:
                self._dropped += 1
                self._lose(step, "a step was dropped: the sidecar did not take it in time")
                return
            self._queue.append(step)
            self._steps, self._bytes = self._steps + 1, self._bytes + size
            self._changed.notify()

    def close(self, timeout_s: float = 5.0) -> None:
        """Sends what waits, for as long as `timeout_s`, and ends the connection."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    # -- what is lost

    def _lose(self, step: Step, why: str) -> None:
        """Remembers the requests of a step that will not be sent, in its place in the queue."""
        if not self._queue or not isinstance(self._queue[-1], _Lost):
            self._queue.append(_Lost())
        lost = self._queue[-1]
        if isinstance(lost, _Lost) and len(lost.requests) < _REMEMBERED:
            parts: tuple[Rows | Missed | Ended, ...] = (*step.rows, *step.missed, *step.ended)
            lost.requests.update((part.request_id, why) for part in parts)
            lost.ended.update((ended.request_id, ended) for ended in step.ended)

    # -- the thread that sends

    def _work(self) -> None:
        wait = _FIRST_WAIT
        while not self._closing or self._queue:
            began = time.monotonic()
            try:
                self._connect()
            except grpc.RpcError as error:
                _log.warning("the sidecar at %s cannot be reached: %s", self._address, error.details())
            except Exception:  # noqa: BLE001 - this thread must go on
                _log.exception("the connection to the sidecar at %s failed", self._address)
            self._disconnected()
            if self._closing:
                return
            wait = _FIRST_WAIT if time.monotonic() - began > _LONGEST_WAIT else min(2 * wait, _LONGEST_WAIT)
            pause = _REFUSED_WAIT if self.refused else wait * random.uniform(0.5, 1.0)
            with self._changed:
                self._changed.wait_for(lambda: self._closing, pause)

    def _connect(self) -> None:
        """One connection, from its hello until it breaks."""
        options = [*connection.OF_CHANNEL, ("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(self._address, options=options) as channel:
            observe = channel.stream_stream(_METHOD, lambda message: message, wire.read_response)
            accepted = threading.Event()
            over = threading.Event()
            call = observe(self._requests(accepted, over))
            try:
                for response in call:
                    if isinstance(response, str):
                        with self._changed:
                            if response in self._sent:
                                self._stops |= {response}
                        continue
                    self._connected, self.refused = response[0], "" if response[0] else response[1]
                    if not self._connected:
                        _log.error("the sidecar at %s refuses this tap: %s", self._address, self.refused)
                        return
                    accepted.set()
            finally:
                over.set()
                with self._changed:
                    self._changed.notify_all()
                call.cancel()

    def _requests(self, accepted: threading.Event, over: threading.Event) -> Iterator[bytes]:
        """The hello, and once it is accepted what the queue holds; grpc reads this on a thread of its own."""
        told_before = self._told_dropped  # on earlier connections
        yield wire.request_bytes(self._info)
        while not accepted.wait(0.05):
            if over.is_set():
                return
        while True:
            with self._changed:
                self._changed.wait_for(lambda: over.is_set() or self._queue or self._closing)
                if over.is_set():
                    return
                if not self._queue:
                    return  # closing, and all is sent
                step = self._queue.popleft()
                if isinstance(step, _Lost):
                    step = step.step()
                else:
                    self._steps, self._bytes = self._steps - 1, self._bytes - _size(step)
                self._sent.update(rows.request_id for rows in step.rows)
                ended = {ended.request_id for ended in step.ended}
                self._sent -= ended
                self._stops -= ended  # a stop may have come back since `send`: it must not meet the next of that id
                self._told_dropped = self._dropped
                dropped = self._dropped - told_before
            yield wire.request_bytes(step, dropped)

    def _disconnected(self) -> None:
        with self._changed:
            self._connected = False
            self._stops = frozenset()
            if self._sent:
                self._queue.appendleft(_Lost(dict.fromkeys(self._sent, "the connection to the sidecar broke")))
                self._sent = set()


def _size(step: Step) -> int:
    """Bytes of a step's arrays, about."""
    return sum(
        rows.token_ids.nbytes + rows.token.nbytes + rows.row.nbytes + rows.value.nbytes + rows.probe.nbytes + 64
        for rows in step.rows
    )
