"""One follower of a tapped request: the newest state whenever it is ready for one."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace

from guard.assessor import Assessor
from guard.assessor.limits import chosen_domains
from guard.assessor.observed import Progress
from guard.records import CheckOptions

_VERDICT_SECONDS = 0.25  # between verdicts where nothing but the counts has changed


async def following(assessor: Assessor, options: CheckOptions) -> AsyncIterator[Progress]:
    """Ends with the request, or with not_assessed where no row of it comes in time.

    Raises NotFound for a domain that the pack does not have, and InvalidInput for options that make no sense.
    """
    observed, wait = assessor.observed, assessor.config.taps.wait_seconds
    domains = chosen_domains(options, assessor.pack.domains)
    loop, advanced = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:  # on the thread that reads the taps
        if not advanced.is_set():
            loop.call_soon_threadsafe(advanced.set)

    observed.announce(options.request_id, wake)
    try:
        latest: Progress | None = None
        told, ends = 0.0, loop.time() + wait
        while True:
            advanced.clear()
            full = time.monotonic() - told >= _VERDICT_SECONDS
            progress = await asyncio.to_thread(observed.progress, options, domains, latest, full=full)
            if progress is None and loop.time() >= ends:
                missing = await asyncio.to_thread(observed.no_rows, options)
                yield Progress(0, 0, 0, 0, "no_rows", missing)
                return
            if progress is not None and (latest is None or progress.version != latest.version):
                if progress.verdict is not None:
                    told = time.monotonic()
                yield progress
                latest = replace(progress, verdict=None)
                if progress.finish_reason:
                    return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(advanced.wait(), None if latest else max(0.0, ends - loop.time()))
    finally:
        observed.leave(options.request_id, wake)
