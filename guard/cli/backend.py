"""Who answers: a model loaded here, or a running sidecar. The commands do not know which."""

import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

from guard.errors import Exhausted, Unavailable
from guard.records import CheckInput, CheckOptions, ModelInfo, PackInfo, Phase, PolicyInfo, Verdict

if TYPE_CHECKING:
    from guard.assessor import Assessor, Session
    from guard.cli.options import Sidecar
    from guard.config import GuardConfig
    from guard.service.client import Chunk, GuardClient

Identity = tuple[PackInfo, PolicyInfo, ModelInfo]
REMOTE_WINDOW = 64  # calls in flight to one sidecar, each on a thread


class StreamOfOne(Protocol):
    def feed(self, phase: Phase, text: str, *, last: bool = False) -> Verdict: ...

    def close(self) -> None: ...


class Backend(Protocol):
    window: int  # how many checks may be in flight

    def check(self, given: CheckInput, options: CheckOptions) -> Verdict: ...

    def submit(self, given: CheckInput, options: CheckOptions) -> "Future[Verdict]":
        """Errors come at once or from the future. Raises Exhausted where the caller must wait and try again."""
        ...

    def open_stream(self, options: CheckOptions) -> StreamOfOne: ...

    def identity(self) -> Identity: ...


@contextmanager
def opened(settings: "GuardConfig", sidecar: "Sidecar | None") -> Iterator[Backend]:
    """Loads the model, or connects to the sidecar. Raises ConfigError, PackError and WeightsError."""
    if sidecar:
        with sidecar.connect() as client:
            remote = Remote(client, settings)
            try:
                yield remote
            finally:
                remote.close()
        return
    assessor = load(settings)
    try:
        yield Local(assessor)
    finally:
        assessor.close()


def load(settings: "GuardConfig") -> "Assessor":
    """The assessor, with a spinner on a terminal while it loads."""
    from guard.cli import terminal

    console = terminal.err()
    with console.status("loading the model") as spinner:
        from guard.assessor import Assessor

        def report(line: str) -> None:
            console.print(f"guard: {line}", soft_wrap=True)
            spinner.update(line)

        return Assessor.load(settings, report=report)


class Local:
    def __init__(self, assessor: "Assessor") -> None:
        self._assessor = assessor
        self.window = assessor.config.reader.queue_size

    def check(self, given: CheckInput, options: CheckOptions) -> Verdict:
        return self._assessor.check(given, options)

    def submit(self, given: CheckInput, options: CheckOptions) -> "Future[Verdict]":
        return self._assessor.submit(given, options)

    def open_stream(self, options: CheckOptions) -> StreamOfOne:
        return _LocalStream(self._assessor.open_session(options))

    def identity(self) -> Identity:
        return self._assessor.pack.info, self._assessor.policy, self._assessor.model


class _LocalStream:
    def __init__(self, session: "Session") -> None:
        self._session = session
        self.close = session.close

    def feed(self, phase: Phase, text: str, *, last: bool = False) -> Verdict:
        return self._session.feed(phase, text, last=last).result()


class Remote:
    def __init__(self, client: "GuardClient", settings: "GuardConfig") -> None:
        self._client = client
        self.window = min(REMOTE_WINDOW, settings.reader.queue_size)
        self._pool = ThreadPoolExecutor(self.window, "guard-call")
        self._closing = False
        self._identity: Identity | None = None

    def check(self, given: CheckInput, options: CheckOptions) -> Verdict:
        return self._client.check(given.prompt, completion=given.completion, options=options)

    def submit(self, given: CheckInput, options: CheckOptions) -> "Future[Verdict]":
        return self._pool.submit(self._patiently, given, options)

    def _patiently(self, given: CheckInput, options: CheckOptions) -> Verdict:
        """Tries again where other callers fill the sidecar's queue, all within one deadline."""
        left, ends = self._client.timeout_s, time.monotonic() + (self._client.timeout_s or math.inf)
        while True:
            try:
                return self._client.check(given.prompt, completion=given.completion, options=options, timeout_s=left)
            except Exhausted as error:
                if self._closing:
                    raise
                wait = max(error.retry_after_s, 0.02)
                if left is not None and (left := ends - time.monotonic() - wait) <= 0:
                    raise Unavailable(
                        f"no answer within {self._client.timeout_s:g} s: {error}", reason="DEADLINE_EXCEEDED"
                    ) from None
                time.sleep(wait)

    def open_stream(self, options: CheckOptions) -> StreamOfOne:
        return _RemoteStream(self._client, options)

    def identity(self) -> Identity:
        if self._identity is None:
            said = self._client.pack()
            model = ModelInfo(said["model"]["fingerprint"], said["model"]["verified"])
            self._identity = (PackInfo(**said["pack"]), PolicyInfo(**said["policy"]), model)
        return self._identity

    def close(self) -> None:
        self._closing = True
        self._client.close()  # ends calls under way, which may have no deadline
        self._pool.shutdown(wait=True, cancel_futures=True)


class _RemoteStream:
    """One chunk out, one verdict back. The client reads the chunks on a thread of its own."""

    def __init__(self, client: "GuardClient", options: CheckOptions) -> None:
        self._chunks: SimpleQueue[Chunk | None] = SimpleQueue()
        self._verdicts = client.watch(iter(self._chunks.get, None), options=options)

    def feed(self, phase: Phase, text: str, *, last: bool = False) -> Verdict:
        from guard.service.client import Chunk

        self._chunks.put(Chunk(phase, text, last))
        try:
            return next(self._verdicts)
        except StopIteration:
            raise Unavailable("the sidecar ended the stream") from None

    def close(self) -> None:
        self._chunks.put(None)
        for _ in self._verdicts:
            pass  # lets the call end, so that the sidecar sees a stream that was finished
