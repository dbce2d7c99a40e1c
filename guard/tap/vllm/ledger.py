"""Which rows of a request have been told, which wait for a draft to be accepted, and which must come from the store.

The engine computes a request's tokens in any pieces it likes: chunks of a prompt, tokens again after a preemption,
drafts that are rejected, nothing at all for a cached prefix. The ledger makes of them what the sidecar reads: each
token once, in order, or the request is missed and stays so. What a missed request computes is kept for the next one all
the same: the engine will not compute it again.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from guard.tap.protocol import Ended, Missed, Rows, Step
from guard.tap.vllm.blocks import ROOT, Block, BlockStore, chain
from guard.tap.vllm.fired import Fired, joined


@dataclass(slots=True)
class _Request:
    caller: str
    prompt: NDArray[np.int32]  # [prompt tokens]
    kept: bool  # whether its blocks go to the store: they are those of every request with the same tokens
    told: int = 0  # tokens whose rows have gone out, from the first on
    passed: int = 0  # those and, of a missed request, the ones after them that the engine has
    last_token: int = -1
    held: Fired | None = None  # rows of drafts, from `held_at` on: not yet accepted
    held_at: int = 0
    missed: bool = False
    open: list[Fired] = field(default_factory=list)  # accepted rows of the block that is not full yet
    open_tokens: int = 0
    key: bytes = ROOT  # of the blocks before that one,
    full: int = 0  # how many they are,
    blocks: list[Block] = field(default_factory=list)  # and those of them whose rows are known


class Ledger:
    """Requests by the engine's ids. A step is gathered by the calls below and handed out by `take`."""

    def __init__(self, store: BlockStore | None) -> None:
        """Without a store (no prefix caching) a cached prefix is missed."""
        self._store = store
        self._requests: dict[str, _Request] = {}
        self._callers: dict[str, list[str]] = {}  # caller's id -> engine ids that are running
        self._rows: list[Rows] = []
        self._missed: list[Missed] = []
        self._ended: list[Ended] = []
        self.replayed = 0  # tokens whose rows came from the store

    def __contains__(self, engine_id: str) -> bool:
        return engine_id in self._requests

    def caller(self, engine_id: str) -> str:
        return self._requests[engine_id].caller

    def begin(
        self, engine_id: str, caller: str, prompt: Sequence[int] | None, *, shared: bool = True, refuse: str = ""
    ) -> None:
        """A request has come. `refuse` says why its rows cannot be read at all.

        Two running requests with one caller's id are both missed: the sidecar could not tell their tokens apart.
        """
        ids = np.asarray(() if prompt is None else prompt, dtype=np.int32)
        kept = shared and self._store is not None and prompt is not None and not refuse
        self._requests[engine_id] = _Request(caller, ids, kept)
        same = self._callers.setdefault(caller, [])
        same.append(engine_id)
        if refuse:
            self.miss(engine_id, refuse)
        elif prompt is None:
            self.miss(engine_id, "a prompt of embeddings, which has no token ids")
        elif len(same) > 1:
            for other in same:
                self.miss(other, "several running requests of the engine carry this id (n > 1, a list of prompts?)")

    def running(self, callers: Collection[str]) -> list[str]:
        """The engine's ids of the running requests of these callers' ids."""
        return [engine_id for caller in callers for engine_id in self._callers.get(caller, ())]

    def last_token(self, engine_id: str) -> int:
        """The last token whose row was told; -1 where there is none."""
        return self._requests[engine_id].last_token

    def lose_all(self, detail: str) -> None:
        for engine_id in self._requests:
            self.lose(engine_id, detail)

    def lose(self, engine_id: str, detail: str) -> None:
        """Misses a request of which nothing more can be known: which row is which token's, for one."""
        request = self._requests[engine_id]
        request.kept, request.held, request.open = False, None, []
        self.miss(engine_id, detail)

    def miss(self, engine_id: str, detail: str) -> None:
        request = self._requests[engine_id]
        if not request.missed:
            request.missed = True
            self._missed.append(Missed(request.caller, detail))

    def add(self, engine_id: str, begin: int, fired: Fired, drafts: int = 0) -> None:
        """Rows computed in this step, from position `begin` on; the last `drafts` of them are only proposed.

        `settle` says how many of these were accepted; else the request's next step does, by where it begins.
        """
        request = self._requests[engine_id]
        if request.missed and not request.kept:
            return
        self._accept(request, begin)
        if begin > request.passed and not self._replay(engine_id, request, begin):
            return
        sure = len(fired) - drafts
        self._tell(request, begin, fired.cut(0, sure))
        if drafts:
            # A copy, as what is held outlives the step.
            request.held, request.held_at = fired.cut(sure, len(fired)).compact(), begin + sure

    def settle(self, engine_id: str, accepted: int) -> None:
        """How many of the drafts just added were accepted; the others are forgotten."""
        request = self._requests[engine_id]
        if request.held is not None:
            self._accept(request, request.held_at + accepted)

    def end(self, engine_id: str, reason: str) -> None:
        """The request has left the engine; drafts that nobody accepted leave with it."""
        request = self._requests.pop(engine_id)
        same = self._callers[request.caller]
        same.remove(engine_id)
        if not same:
            del self._callers[request.caller]
            self._ended.append(Ended(request.caller, reason, request.told))
        if self._store is not None:
            self._store.release(request.blocks)

    def take(self) -> Step | None:
        """What has been gathered since the last call; None where there is nothing to tell."""
        if not (self._rows or self._missed or self._ended):
            return None
        step = Step(tuple(self._rows), tuple(self._missed), tuple(self._ended))
        self._rows, self._missed, self._ended = [], [], []
        return step

    def _accept(self, request: _Request, end: int) -> None:
        """Held rows below position `end` were accepted."""
        held, request.held = request.held, None
        if held is not None and end > request.held_at:
            self._tell(request, request.held_at, held.cut(0, min(len(held), end - request.held_at)))

    def _tell(self, request: _Request, begin: int, fired: Fired) -> None:
        fired = self._emit(request, begin, fired)
        if len(fired) and self._store is not None and request.kept:
            self._fill(self._store, request, fired)

    def _emit(self, request: _Request, begin: int, fired: Fired) -> Fired:
        """Gathers the rows that are new, unless they are missed; and returns them."""
        if begin < request.passed:  # computed again after a preemption
            fired = fired.cut(min(len(fired), request.passed - begin), len(fired))
            begin = request.passed
        if not len(fired):
            return fired
        if not request.missed:
            self._rows.append(
                Rows(
                    request_id=request.caller,
                    begin=begin,
                    prompt_tokens=len(request.prompt),
                    token_ids=fired.ids,
                    token=fired.token,
                    row=fired.row,
                    value=fired.value,
                    probe=fired.probe,
                    finite=fired.finite,
                )
            )
            request.told = begin + len(fired)
        request.passed = begin + len(fired)
        request.last_token = int(fired.ids[-1])
        return fired

    def _fill(self, store: BlockStore, request: _Request, fired: Fired) -> None:
        size, done = store.block_tokens, 0
        while request.open_tokens + len(fired) - done >= size:
            end = done + size - request.open_tokens
            part = fired.cut(done, end)
            whole = joined([*request.open, part]) if request.open else part.compact()
            request.key = chain(request.key, whole.ids)
            request.full += 1
            request.blocks.append(store.put(request.key, whole))
            request.open, request.open_tokens, done = [], 0, end
        if done < len(fired):
            request.open.append(fired.cut(done, len(fired)).compact())
            request.open_tokens += len(fired) - done

    def _replay(self, engine_id: str, request: _Request, end: int) -> bool:
        """Tells the rows of a cached prefix, up to position `end`; False where nothing can be known of what follows.

        Where rows of it are gone, the request is missed, and its own blocks are known all the same: they are named by
        their tokens.
        """
        begin = request.passed
        what = f"a cached prefix of {end - begin} tokens (from position {begin})"
        if self._store is None or not request.kept:
            self.lose(engine_id, f"{what}, whose rows are not kept")
            return False
        size = self._store.block_tokens
        if end > len(request.prompt) or end % size:
            self.lose(engine_id, f"{what} that ends within a block of {size} tokens or beyond the prompt")
            return False
        first = request.full * size
        found: list[Block] = []
        for start in range(first, end, size):
            request.key = chain(request.key, request.prompt[start : start + size])
            block = self._store.get(request.key)
            if block is None:
                self.miss(engine_id, f"{what}, whose rows are gone from position {start} on")
            else:
                found.append(block)
        request.full, request.open, request.open_tokens = end // size, [], 0
        request.blocks += found
        if request.missed:
            request.passed = end
            return True
        self._emit(request, begin, joined([block.fired for block in found]).cut(begin - first, end - first))
        self.replayed += end - begin
        return True
