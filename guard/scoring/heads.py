"""Heads: from pooled hits to scores, and from scores back to what made them, exactly.

    logit = (bias + sum_i w_i * pooled_i + sum_p v_p * pooled_probe_p) / temperature,  score = sigmoid(logit)

Both sums run over tokens as well (see guard.scoring.pooling), so each latent and each token has an exact part.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from guard.pack.loader import Pack
from guard.records import (
    Action,
    Attribution,
    DomainVerdict,
    HeadScore,
    LatentId,
    SpanContribution,
    TokenDetail,
)
from guard.scoring.pooling import Floats, Gate, Hits, Ints, PhaseState, Spans

Thresholds = tuple[float | None, float | None]  # flag at, block at


class _Line(NamedTuple):
    """What every attribution to one latent says."""

    latent: LatentId
    name: str
    tags: tuple[str, ...]
    explanation_score: float | None


def sigmoid(logit: float) -> float:
    return 1.0 / (1.0 + math.exp(-min(max(logit, -60.0), 60.0)))


class HeadSet:
    """The heads of a pack. `thresholds` are the policy's, by head name; `names` say what each latent stands for."""

    def __init__(
        self,
        pack: Pack,
        thresholds: dict[str, Thresholds],
        decide: Callable[[Sequence[tuple[float, Thresholds]]], Action],
        names: Sequence[str],
    ) -> None:
        self._pack = pack
        self._heads = pack.manifest.heads
        self._thresholds = thresholds
        self._decide = decide
        self._lines = [
            _Line(
                LatentId(line.hook_point, line.latent), name, (*line.domains, *line.subdomains), line.explanation_score
            )
            for line, name in zip(pack.latents, names, strict=True)
        ]
        self._named = np.array([bool(name) for name in names], dtype=bool)  # [K]
        self._gate = Gate(
            np.concatenate([p.threshold for p in pack.hook_points]).astype(np.float64),
            np.concatenate([p.scale for p in pack.hook_points]).astype(np.float64),
        )
        temperature = np.array([head.temperature for head in self._heads])[:, None]
        self._weights: Floats = pack.head_weights.astype(np.float64) / temperature  # [H, K]
        self._probes: list[bool] = np.any(pack.probe_weights, axis=1).tolist()  # whether a head reads any
        self._probe_weights: Floats = pack.probe_weights.astype(np.float64) / temperature  # [H, P]
        self._bias: Floats = np.array([head.bias for head in self._heads]) / temperature[:, 0]  # [H]
        lowest = [min((t for t in thresholds[head.name] if t is not None), default=np.inf) for head in self._heads]
        self._least: Floats = np.array(lowest)  # [H] scores below it call for nothing
        self._of_domain = {
            domain: [i for i, head in enumerate(self._heads) if head.domain == domain] for domain in pack.domains
        }

    def new_state(self) -> PhaseState:
        return PhaseState(self._gate, self._probe_weights.shape[1], self._pack.manifest.pooling)

    def verdicts(self, state: PhaseState, domains: Sequence[str], attributions: int) -> tuple[DomainVerdict, ...]:
        """One verdict a domain, in the order given; nothing is scored before the first token."""
        fired = np.flatnonzero(state.sums)  # [F]
        latent_parts = self._weights[:, fired] * state.pooled()[fired]  # [H, F]
        probe_parts = self._probe_weights @ state.pooled_probes()  # [H]
        size = np.abs(latent_parts)
        mass = size.sum(axis=1) + np.abs(probe_parts)
        logits = (self._bias + latent_parts.sum(axis=1) + probe_parts).tolist()
        named = (size[:, self._named[fired]].sum(axis=1) / np.where(mass > 0, mass, 1.0)).tolist()
        shown = self._shown(state, fired, latent_parts, mass, attributions)
        heads: list[HeadScore | None] = []
        for i, head in enumerate(self._heads):
            if head.domain not in domains:
                heads.append(None)
                continue
            own = shown[i]
            if self._probes[i] and attributions:
                part = float(probe_parts[i])
                share = abs(part) / float(mass[i]) if mass[i] else 0.0
                own.append(Attribution(None, "dense probe", (), part, share, 0.0, ()))
            flag_at, block_at = self._thresholds[head.name]
            bias = float(self._bias[i])
            heads.append(
                HeadScore(
                    head=head.head,
                    score=sigmoid(logits[i]),
                    logit=logits[i],
                    bias=bias,
                    rest=logits[i] - bias - sum(a.contribution for a in own),
                    flag_at=flag_at,
                    block_at=block_at,
                    explained_share=named[i],
                    attributions=tuple(own),
                )
            )
        return tuple(self._domain(domain, heads) for domain in domains)

    def _domain(self, domain: str, heads: Sequence[HeadScore | None]) -> DomainVerdict:
        scores = tuple(s for head, s in zip(self._heads, heads, strict=True) if s is not None and head.domain == domain)
        return DomainVerdict(domain, self._decide([(s.score, (s.flag_at, s.block_at)) for s in scores]), scores)

    def actions(self, states: Sequence[PhaseState]) -> list[dict[str, Action]]:
        """For each state, the domains whose action is more than allow: `verdicts` without the reasons, for many."""
        pooled = np.stack([state.sums for state in states])  # [S, K]
        pooled /= np.array([state.divisor for state in states])[:, None]
        pooled **= self._pack.manifest.pooling.power
        probes = np.stack([state.pooled_probes() for state in states])  # [S, P]
        # Not `@`: for a product this small BLAS would wake its threads, and wait for them where cores are busy.
        logits = np.vecdot(pooled[:, None], self._weights) + self._bias  # [S, H]
        logits += np.vecdot(probes[:, None], self._probe_weights)
        scores = 1.0 / (1.0 + np.exp(-np.clip(logits, -60.0, 60.0)))
        result: list[dict[str, Action]] = [{} for _ in states]
        for index in np.flatnonzero((scores >= self._least).any(axis=1)):
            for domain, heads in self._of_domain.items():
                said = [(float(scores[index, i]), self._thresholds[self._heads[i].name]) for i in heads]
                action = self._decide(said)
                if action is not Action.ALLOW:
                    result[index][domain] = action
        return result

    def token_details(self, state: PhaseState, hits: Hits, where: Ints, domains: Sequence[str]) -> list[TokenDetail]:
        """What each token of a run adds to each head's logit, at the phase's present length."""
        strengths = self._gate(hits.row, hits.value)
        chosen = [i for i, head in enumerate(self._heads) if head.domain in domains]
        per_unit = state.pooled_per_unit()
        parts = np.zeros((hits.tokens, len(chosen)))
        for column, i in enumerate(chosen):
            weighted = self._weights[i, hits.row] * strengths * per_unit[hits.row]
            parts[:, column] = np.bincount(hits.token, weights=weighted, minlength=hits.tokens)
            parts[:, column] += hits.probe @ self._probe_weights[i] / state.length
        names = [self._heads[i].name for i in chosen]
        return [
            TokenDetail(int(start), int(end), int(message), dict(zip(names, map(float, row), strict=True)))
            for (start, end, message), row in zip(where, parts, strict=True)
        ]

    def _shown(
        self, state: PhaseState, fired: Ints, parts: Floats, mass: Floats, wanted: int
    ) -> list[list[Attribution]]:
        """The latents with the largest `parts [H, F]` of each head's logit, at most `wanted` of them."""
        if not wanted:
            return [[] for _ in parts]
        order = np.argsort(-np.abs(parts), axis=1, kind="stable")[:, :wanted]  # [H, W]
        rows = fired[order]  # [H, W]
        contributions = np.take_along_axis(parts, order, axis=1)  # [H, W]
        shares = np.abs(contributions) / np.where(mass > 0, mass, 1.0)[:, None]
        spans = state.spans()
        begin, end = np.searchsorted(spans.row, rows), np.searchsorted(spans.row, rows, side="right")
        columns = (rows, contributions, shares, state.peak[rows], contributions / state.sums[rows], begin, end)
        return [
            [
                self._latent(spans, row, part, share, peak, unit, slice(first, last))
                for row, part, share, peak, unit, first, last in zip(*told, strict=True)
                if part
            ]
            for told in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def _latent(
        self, spans: Spans, row: int, part: float, share: float, peak: float, unit: float, kept: slice
    ) -> Attribution:
        """`unit`: what a strength of 1 adds to the logit."""
        line = self._lines[row]
        parts = [strength * unit for strength in spans.strength[kept]]
        found = tuple(map(SpanContribution, spans.start[kept], spans.end[kept], parts, spans.message[kept]))
        return Attribution(line.latent, line.name, line.tags, part, share, peak, found, line.explanation_score)
