"""The tap on one model runner (V1).

Methods are wrapped on the instance, so that a worker without the setting runs vLLM's own code, untouched.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guard.tap.protocol import Sink
from guard.tap.vllm import stopping
from guard.tap.vllm.activations import Activations
from guard.tap.vllm.blocks import BlockStore
from guard.tap.vllm.encode import BatchEncoder
from guard.tap.vllm.gathering import Computed, Gathering
from guard.tap.vllm.ids import caller_id
from guard.tap.vllm.ledger import Ledger
from guard.tap.vllm.settings import TapSettings

log = logging.getLogger("vllm.guard")  # below vLLM's own logger, so that it shows
_REPORT_SECONDS = 30.0


@dataclass(slots=True)
class Spent:
    """The tap's own time beside that of the engine's steps."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    engine_seconds: float = 0.0


class RunnerTap:
    """Reads every step of a runner that has loaded its model."""

    def __init__(
        self, runner: Any, activations: Activations, encoder: BatchEncoder, sink: Sink, settings: TapSettings
    ) -> None:
        self._runner = runner
        self._activations = activations
        self._encoder = encoder
        self._sink = sink
        self._may_stop = settings.stop
        self._store_bytes = settings.store_mib << 20
        self._gathering = Gathering(settings.gather)
        # Its CUDA graphs use the memory again that holds auxiliary outputs, before these are read.
        self._drafting_model = runner.speculative_config is not None and runner.speculative_config.method != "ngram"
        self._ledger: Ledger | None = None
        self._ending: set[str] = set()  # requests that the scheduler was asked to finish
        self.spent = Spent()
        self._reported = time.monotonic()
        self._began = 0.0
        self._execute, self._sample = runner.execute_model, runner.sample_tokens
        self._shutdown = runner.shutdown
        runner.execute_model, runner.sample_tokens = self._on_execute, self._on_sample
        runner.shutdown = self._on_shutdown

    def _on_execute(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._began = time.perf_counter()
        self._guarded(self._come_and_go, scheduler_output)
        self.spent.seconds += time.perf_counter() - self._began
        return self._execute(scheduler_output, *args, **kwargs)

    def _on_sample(self, grammar_output: Any) -> Any:
        runner = self._runner
        state = runner.execute_model_state
        if state is None:
            return self._sample(grammar_output)
        started = time.perf_counter()
        # The batch's order is taken now: sampling may change it.
        batch = list(runner.input_batch.req_ids[: runner.input_batch.num_reqs])
        ours = self._activations.auxiliary
        if ours:  # a drafter must see what it would see without us
            if self._drafting_model and state.aux_hidden_states is not None:
                state = state._replace(aux_hidden_states=[x.clone() for x in state.aux_hidden_states])
            runner.execute_model_state = state._replace(aux_hidden_states=None)
            runner.use_aux_hidden_state_outputs = False
        own = time.perf_counter() - started
        try:
            output = self._sample(grammar_output)
        finally:
            if ours:
                runner.use_aux_hidden_state_outputs = True
        started = time.perf_counter()
        self._guarded(self._read, batch, state, output)
        if self._may_stop:
            self._guarded(self._stop, output)
        ended = time.perf_counter()
        self.spent.seconds += own + ended - started
        self.spent.engine_seconds += ended - self._began
        self.spent.steps += 1
        self.spent.tokens += state.scheduler_output.total_num_scheduled_tokens
        if time.monotonic() - self._reported > _REPORT_SECONDS:
            self.report()
        return output

    def _on_shutdown(self, *args: Any, **kwargs: Any) -> Any:
        self.report()
        self._sink.close()
        return self._shutdown(*args, **kwargs)

    def report(self) -> None:
        spent = self.spent
        self._reported = time.monotonic()
        log.info(
            "guard: %d steps, %d tokens; own time %.1f us a token, %.2f%% of the steps'; "
            "%d tokens of cached prefixes told from the store; %d steps dropped",
            spent.steps,
            spent.tokens,
            1e6 * spent.seconds / max(1, spent.tokens),
            100 * spent.seconds / max(1e-9, spent.engine_seconds),
            self._ledger.replayed if self._ledger is not None else 0,
            self._sink.dropped,
        )

    @property
    def ledger(self) -> Ledger:
        """Made with the first request: only then is the size of the engine's cache known."""
        if self._ledger is None:
            self._ledger = Ledger(self._new_store())
        return self._ledger

    def _new_store(self) -> BlockStore | None:
        cache = self._runner.cache_config
        if not cache.enable_prefix_caching or not self._store_bytes:
            return None
        tokens = cache.hash_block_size or cache.block_size
        blocks = -(-self._runner.kv_cache_config.num_blocks * cache.block_size // tokens)
        return BlockStore(tokens, max_blocks=blocks, max_bytes=self._store_bytes)

    def _guarded(self, part: Callable[..., None], *args: Any) -> None:
        """A fault of ours never ends the engine's step: every running request is missed instead."""
        try:
            part(*args)
        except Exception:
            log.exception("guard: the tap failed; all running requests are not assessed")
            self._gathering.drop()
            if self._ledger is not None:
                self._ledger.lose_all("the tap failed; the engine's log says how")
                if (step := self._ledger.take()) is not None:
                    self._sink.send(step)

    def _come_and_go(self, scheduler_output: Any) -> None:
        ledger = self.ledger
        if scheduler_output.finished_req_ids:
            self._guarded(self._flush)  # by itself: who comes and goes is said only once
        for engine_id in scheduler_output.finished_req_ids:
            if engine_id in ledger:
                self._guarded(self._end, engine_id)
        if (step := ledger.take()) is not None:
            self._sink.send(step)
        for new in scheduler_output.scheduled_new_reqs:
            self._guarded(self._begin, new)

    def _begin(self, new: Any) -> None:
        if new.req_id in self.ledger:
            self.ledger.lose(new.req_id, "a prompt that grows while it is answered")
            return
        params = new.sampling_params
        self.ledger.begin(
            new.req_id,
            caller_id(new.req_id, params.extra_args if params else None),
            None if new.prompt_embeds is not None else new.prompt_token_ids,
            # Images stand in the prompt as tokens that say nothing of what they show.
            shared=not new.mm_features,
            refuse=f"adapter {new.lora_request.lora_name}, which the pack was not made for" if new.lora_request else "",
        )

    def _end(self, engine_id: str) -> None:
        self.ledger.end(engine_id, self._reason(engine_id))
        self._ending.discard(engine_id)

    def _flush(self) -> None:
        self._tell(self._gathering.take())

    def _reason(self, engine_id: str) -> str:
        """Why a request ended, which the scheduler does not tell the worker: from its last tokens."""
        if engine_id in self._ending:
            return stopping.REASON
        request = self._runner.requests.get(engine_id)
        params = request.sampling_params if request is not None else None
        if params is None:
            return "abort"
        tail = {*request.output_token_ids[-1 - self._runner.num_spec_tokens :], self.ledger.last_token(engine_id)}
        if tail & _ends(params):
            return "stop"
        outputs = len(request.output_token_ids)
        full = request.num_prompt_tokens + outputs >= self._runner.max_model_len
        return "length" if full or (params.max_tokens is not None and outputs >= params.max_tokens) else "abort"

    def _stop(self, output: Any) -> None:
        """Names those of the running requests whose verdict has turned to block."""
        stops = self._sink.stops()
        if stops and (named := self.ledger.running(stops)):
            self._ending.update(named)
            stopping.name_stops(output, named)

    def _read(self, batch: Sequence[str], state: Any, output: Any) -> None:
        runner = self._runner
        scheduled = state.scheduler_output.num_scheduled_tokens
        lengths = [scheduled[engine_id] for engine_id in batch]
        total = sum(lengths)
        # Plain positions, which vLLM has for multi-modal models too: their rotary ones jump at an image.
        step = Computed(
            batch, lengths, runner.input_ids.gpu[:total], runner.positions[:total], self._activations.of(state, total)
        )
        drafts = state.scheduler_output.scheduled_spec_decode_tokens
        if total == len(batch) and not drafts:
            self._tell(self._gathering.add(step))
        else:
            self._flush()
            self._tell([step], drafts, getattr(output, "sampled_token_ids", None))

    def _tell(
        self,
        computed: Sequence[Computed],
        drafts: Mapping[str, Sequence[int]] | None = None,
        sampled: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Encodes and hands over; `drafts` are tokens at the end of a request's that were only proposed."""
        ledger = self.ledger
        for step in computed:
            begins, fired = step.begins(), self._encoder(step.activations, step.token_ids(), step.lengths)
            for index, engine_id in enumerate(step.batch):
                proposed = len(drafts.get(engine_id, ())) if drafts else 0
                ledger.add(engine_id, begins[index], fired[index], proposed)
                if proposed and sampled is not None:
                    ledger.settle(engine_id, self._accepted(engine_id, sampled[index]))
        if (told := ledger.take()) is not None:
            self._sink.send(told)

    def _accepted(self, engine_id: str, sampled: Sequence[int]) -> int:
        """Drafts accepted in a step that sampled these tokens, the last of which is new.

        Those behind the request's end do not count.
        """
        request = self._runner.requests[engine_id]
        params, before = request.sampling_params, len(request.output_token_ids) - len(sampled)
        room: int = self._runner.max_model_len - request.num_prompt_tokens - before
        if params.max_tokens is not None:
            room = min(room, params.max_tokens - before)
        ends = _ends(params)
        kept = next((n for n, token in enumerate(sampled, start=1) if token in ends), len(sampled))
        return max(0, min(len(sampled) - 1, kept, room))


def _ends(params: Any) -> set[int]:
    return {token for token in (params.eos_token_id, *(params.stop_token_ids or ())) if token is not None}
