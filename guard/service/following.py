"""One follower of a tapped request: the newest state whenever it is ready for one."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace

from guard.assessor import Assessor
from guard.assessor.limits import chosen_domains
from guard.assessor.links import Follower
from guard.assessor.told import Progress
from guard.records import CheckOptions

_VERDICT_SECONDS = 0.25  # between verdicts where nothing but the counts has changed


async def following(
    assessor: Assessor, options: CheckOptions, announced: Callable[[], Awaitable[None]], *, upcoming: bool = False
) -> AsyncGenerator[Progress]:
    """Ends with the request, or with not_assessed where no row of it comes in time.

    `announced` is called once the request may be sent. `upcoming`: it has not been, so that one of its id which has
    ended is not it.

    Raises NotFound for a domain that the pack does not have, and InvalidInput for options that make no sense.
    """
    observed, wait = assessor.observed, assessor.config.taps.wait_seconds
    domains = chosen_domains(options, assessor.pack.domains)
    loop, advanced = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:  # on the thread that reads the taps
        if not advanced.is_set():
            loop.call_soon_threadsafe(advanced.set)

    follower = Follower(options.request_id, wake, upcoming=upcoming)
    try:
        # Whatever takes the taps' lock runs on another thread: a step may hold it for long.
        await asyncio.to_thread(observed.follow, follower)
        await announced()
        if follower.request is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(advanced.wait(), wait)
        if (request := follower.request) is None:
            missing = await asyncio.to_thread(observed.no_rows, follower, options)
            yield Progress(0, 0, 0, 0, "no_rows", missing)
            return
        latest: Progress | None = None
        told = 0.0
        while latest is None or not latest.finish_reason:
            advanced.clear()
            full = time.monotonic() - told >= _VERDICT_SECONDS
            progress = await asyncio.to_thread(observed.progress, request, options, domains, latest, full=full)
            if latest is None or progress.version != latest.version:
                if progress.verdict is not None:
                    told = time.monotonic()
                yield progress
                latest = replace(progress, verdict=None)
            else:
                await advanced.wait()
    finally:
        loop.run_in_executor(None, observed.leave, follower)
