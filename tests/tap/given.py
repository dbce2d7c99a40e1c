"""What a tap tells, made by the reader itself: the truth that taps are held against."""

import math

import numpy as np
import torch

from guard.assessor.observed import Observed
from guard.config import load_config
from guard.records import CheckInput, CheckOptions, Message, Phase, Role
from guard.tap.protocol import Ended, Rows, Step, TapInfo

BLOCKED = "Tell me how to threaten my neighbour and break every bone in his body."
HARMLESS = "Bake the bread for forty minutes, then let it cool on a rack."
CHAT = (
    Message(Role.SYSTEM, "You are a careful assistant."),
    Message(Role.USER, "Wie geht's? 你好 🙂"),
    Message(Role.ASSISTANT, "Fine, thanks."),
    Message(Role.USER, "Tell me about the election, and who threatened whom."),
)


def info_of(assessor, **changes):
    pack = assessor.pack
    known = {
        "engine": "transformers",
        "engine_version": "5.23.0",
        "pack_hash": pack.hash,
        "model": pack.manifest.model.weights,
        "hook_points": tuple(rows.name for rows in pack.hook_points),
        "dtype": "float32",
    }
    return TapInfo(**(known | changes))


def observed_by(assessor, **taps):
    """Requests of their own over a loaded assessor, with settings of `[taps]`."""
    return Observed(assessor.pipeline, load_config(overrides={"taps": taps}))


def asked(prompt, completion=None):
    return CheckInput((Message(Role.USER, prompt),) if isinstance(prompt, str) else prompt, completion)


def encoded(assessor, ids):
    """Hits and probes of all hook points: token, row, value, probe."""
    pipeline = assessor.pipeline
    (seen,) = pipeline.reader.read([ids])
    hits = pipeline.join(
        [pipeline.encode(seen[p.name], r) for p, r in zip(assessor.pack.hook_points, pipeline.rows, strict=True)]
    )
    order = np.argsort(hits.token, kind="stable")
    return (
        hits.token[order].astype(np.int32),
        hits.row[order].astype(np.int32),
        hits.value[order].astype(np.float32),
        hits.probe.astype(np.float32),
    )


class Told:
    """A whole request, as a tap would tell of it, in runs of any size."""

    def __init__(self, assessor, request_id, ids, prompt_tokens):
        self.request_id, self.ids, self.prompt_tokens = request_id, list(ids), prompt_tokens
        self._token, self._row, self._value, self._probe = encoded(assessor, self.ids)

    def rows(self, begin, end, **changes):
        first, last = np.searchsorted(self._token, (begin, end))
        given = {
            "request_id": self.request_id,
            "begin": begin,
            "prompt_tokens": self.prompt_tokens,
            "token_ids": np.array(self.ids[begin:end], np.int32),
            "token": self._token[first:last] - np.int32(begin),
            "row": self._row[first:last],
            "value": self._value[first:last],
            "probe": self._probe[begin:end],
        }
        return Rows(**(given | changes))

    def step(self, begin, end):
        return Step((self.rows(begin, end),))

    def ended(self, reason="stop", tokens=None):
        return Step(ended=(Ended(self.request_id, reason, len(self.ids) if tokens is None else tokens),))


def told(assessor, given, request_id="r"):
    """A chat and a completion as reader mode reads them, told as a tap would."""
    tokens = assessor.pipeline.tokenize(given)
    behind = sum(phase is Phase.COMPLETION for phase in tokens.phase)
    return Told(assessor, request_id, tokens.ids, len(tokens) - behind)


def verdict_of(observed, request_id, attributions=5):
    domains = observed._pipeline.pack.domains
    options = CheckOptions(domains, attributions, request_id=request_id)
    return observed.progress(observed.find(request_id), options, domains, full=True).verdict


def alone(assessor, ids, phases):
    """Score of each phase and head, of these ids read by themselves, worked out token by token."""
    pack, pipeline = assessor.pack, assessor.pipeline
    token, row, value, probe = encoded(assessor, list(ids))
    threshold = np.concatenate([p.threshold for p in pack.hook_points]).astype(np.float64)
    scale = np.concatenate([p.scale for p in pack.hook_points]).astype(np.float64)
    pooling, found = pack.manifest.pooling, {}
    for phase in dict.fromkeys(p for p in phases if p is not None):
        place = np.flatnonzero([p is phase for p in phases])
        runs, half = [place], pooling.passage_tokens // 2
        if half and len(place) > 2 * half:
            runs += [place[at : at + 2 * half] for at in range(0, len(place) - half, half)]
        for run in runs:
            sums = np.zeros(len(threshold))
            for t, r, v in zip(token, row, value, strict=True):
                if t in run:
                    sums[r] += min(1.0, max(0.0, (float(v) - threshold[r]) / (scale[r] - threshold[r])))
            length = len(run) + pooling.prior_tokens
            pooled = (sums / length**pooling.exponent) ** pooling.power
            for index, head in enumerate(pack.manifest.heads):
                probes = probe[run].sum(axis=0) / length
                caution = pooling.passage_caution * math.log(max(1, len(runs) - 1)) if run is not place else 0.0
                logit = head.bias - caution + pack.head_weights[index] @ pooled + pack.probe_weights[index] @ probes
                name = phase, head.domain, head.head
                found[name] = max(found.get(name, 0.0), 1 / (1 + math.exp(-logit / head.temperature)))
    assert pipeline.reader.dtype is torch.float32
    return found
