"""How far a tapped model's verdicts lie from reader mode's: the same tokens, read by both."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from guard.assessor.links import Link
from guard.assessor.observed import Observed
from guard.assessor.pipeline import Pipeline, Reading
from guard.config import GuardConfig
from guard.reader import weights
from guard.reader.sequence import TokenSequence
from guard.records import CheckInput, CheckOptions, Message, Phase, Role, Verdict
from guard.tap.protocol import Rows, Step

_Cells = set[tuple[int, int]]  # token, row


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Tap mode at one dtype against reader mode, over all texts together."""

    dtype: str
    texts: int
    tokens: int  # scored
    hits_jaccard: float  # of (token, row)
    score_mean: float  # absolute difference of a head's score
    score_max: float
    score_max_head: str
    flips: int  # texts whose action differs
    flipped: tuple[str, ...]  # "text 3: flag in reader mode, allow through the tap"


def compare(
    pipeline: Pipeline,
    config: GuardConfig,
    texts: Sequence[str],
    dtypes: Sequence[str],
    *,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> list[Fidelity]:
    """Each text as a user's message: read by the reader as configured, and by the whole model through a tap.

    `dtypes`: those of the tapped model, such as float32 and bfloat16. Raises InvalidInput for a text that a chat
    template cannot take, WeightsError and ConfigError as the reader and the tap do.
    """
    total = len(texts) * (1 + len(dtypes))
    read = []
    for number, text in enumerate(texts):
        read.append(_by_reader(pipeline, text))
        progress(number + 1, total)
    found = []
    for place, dtype in enumerate(dtypes, 1):
        tapped = _Tapped(pipeline, config, dtype)
        pairs = []
        for number, (tokens, *wanted) in enumerate(read):
            pairs.append((wanted, tapped(tokens)))
            progress(place * len(texts) + number + 1, total)
        found.append(_summary(dtype, pairs, sum(p is not None for tokens, *_ in read for p in tokens.phase)))
    return found


def _by_reader(pipeline: Pipeline, text: str) -> tuple[TokenSequence, Verdict, _Cells]:
    tokens = pipeline.tokenize(CheckInput((Message(Role.USER, text),)))
    reading = Reading(tokens, {Phase.PROMPT: pipeline.heads.new_state()})
    plan = pipeline.plan_of(tokens, chat=False)
    cells: _Cells = set()
    for unit, fresh in plan.reads:
        pipeline.run([unit])
        hits = pipeline.join(unit.encoded)
        if hits is not None:
            cells |= set(zip((hits.token + fresh).tolist(), hits.row.tolist(), strict=True))
    pipeline.absorb(reading, plan.reads, keep_details=False)
    options = CheckOptions(max_attributions=0)
    verdict = pipeline.verdict(reading, options, pipeline.pack.domains, "check", time.perf_counter())
    return tokens, verdict, _scored(tokens, cells)


class _Recorder:
    """A sink that keeps what passes."""

    dropped = 0

    def __init__(self, link: Link) -> None:
        self._link = link
        self.rows: list[Rows] = []

    def send(self, step: Step) -> None:
        self.rows += step.rows
        self._link.take(step)

    def stops(self) -> frozenset[str]:
        return frozenset()

    def close(self) -> None:
        self._link.close()


class _Tapped:
    """The whole model, loaded anew in a dtype and tapped."""

    def __init__(self, pipeline: Pipeline, config: GuardConfig, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self._pipeline, self._config = pipeline, config
        self._folder = weights.resolve(config.reader.model)
        self._model: Any = AutoModelForCausalLM.from_pretrained(self._folder, dtype=getattr(torch, dtype)).eval()

    def __call__(self, tokens: TokenSequence) -> tuple[Verdict, _Cells]:
        from guard.tap.torch_hooks import attach, describe

        observed = Observed(self._pipeline, self._config)
        sink = _Recorder(observed.connect(describe(self._model, self._pipeline.pack, folder=self._folder)))
        tap = attach(
            self._model,
            self._pipeline.pack,
            sink,
            request_ids=["text"],
            folder=self._folder,
            allow_unverified=self._config.reader.allow_unverified,
        )
        with tap, torch.inference_mode():
            self._model(input_ids=torch.tensor([tokens.ids]), logits_to_keep=1, use_cache=False)
        options, domains = CheckOptions(max_attributions=0, request_id="text"), self._pipeline.pack.domains
        request = observed.find("text")
        assert request is not None  # noqa: S101 - its rows went in just now
        progress = observed.progress(request, options, domains, full=True)
        assert progress.verdict is not None  # noqa: S101 - it was asked for
        cells: _Cells = set()
        for rows in sink.rows:
            cells |= set(zip((rows.token + rows.begin).tolist(), rows.row.tolist(), strict=True))
        sink.close()
        return progress.verdict, _scored(tokens, cells)


def _scored(tokens: TokenSequence, cells: _Cells) -> _Cells:
    return {(token, row) for token, row in cells if tokens.phase[token] is not None}


def _scores(verdict: Verdict) -> dict[str, float]:
    return {
        f"{domain.domain}.{head.head.value}": head.score
        for phase in verdict.phases
        for domain in phase.domains
        for head in domain.heads
    }


def _summary(dtype: str, pairs: Sequence[tuple[Any, tuple[Verdict, _Cells]]], tokens: int) -> Fidelity:
    both = either = 0
    apart: list[tuple[float, str]] = []
    flipped = []
    for number, ((wanted, cells), (verdict, tapped)) in enumerate(pairs):
        both += len(cells & tapped)
        either += len(cells | tapped)
        ours, theirs = _scores(wanted), _scores(verdict)
        apart += [(abs(ours[name] - theirs.get(name, float("nan"))), name) for name in ours]
        if wanted.action is not verdict.action:
            flipped.append(
                f"text {number + 1}: {wanted.action.value} in reader mode, {verdict.action.value} through the tap"
            )
    largest = max(apart, default=(0.0, ""))
    return Fidelity(
        dtype=dtype,
        texts=len(pairs),
        tokens=tokens,
        hits_jaccard=both / either if either else 1.0,
        score_mean=float(np.mean([difference for difference, _ in apart])) if apart else 0.0,
        score_max=largest[0],
        score_max_head=largest[1],
        flips=len(flipped),
        flipped=tuple(flipped),
    )
