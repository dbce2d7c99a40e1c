"""Ending a blocked request in the engine: the worker names it beside its step's output, the scheduler finishes it.

The output travels from the worker to the engine's core, in whatever process that is. There the request is finished as
an abort by its client would finish it, before the tokens of that step are looked at, so none of them goes out. That
holds under `ignore_eos`, grammars, `min_tokens` and speculation alike, where a token that ends the request would not.
"""

import functools
from collections.abc import Sequence
from typing import Any

REASON = "guard"  # what the caller finds as stop_reason, beside finish_reason "stop"
_ATTRIBUTE = "guard_stops"


def name_stops(output: Any, engine_ids: Sequence[str]) -> None:
    """Marks what a runner's `sample_tokens` returned: these requests are to end."""
    # With asynchronous scheduling it is wrapped in one that waits for the device.
    setattr(getattr(output, "_model_runner_output", output), _ATTRIBUTE, list(engine_ids))


def heed_stops(scheduler: Any) -> None:
    """Makes vLLM's class of schedulers finish what the worker names. May be called again."""
    original = scheduler.update_from_output
    if getattr(original, "guarded", False):
        return

    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.request import RequestStatus

    @functools.wraps(original)
    def update_from_output(self: Any, scheduler_output: Any, output: Any) -> Any:
        named = getattr(output, _ATTRIBUTE, None)
        ended = self.finish_requests(named, RequestStatus.FINISHED_STOPPED) if named else []
        told = original(self, scheduler_output, output)
        for request in ended:
            last = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                stop_reason=REASON,
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            told.setdefault(request.client_index, EngineCoreOutputs(outputs=[])).outputs.append(last)
        return told

    update_from_output.guarded = True  # type: ignore[attr-defined]  # a function, which may carry marks
    scheduler.update_from_output = update_from_output
