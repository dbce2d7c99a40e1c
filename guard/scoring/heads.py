"""Heads: from pooled hits to scores, and from scores back to what made them, exactly.

    logit = (bias + sum_i w_i * pooled_i + sum_p v_p * pooled_probe_p) / temperature,  score = sigmoid(logit)

Both sums run over tokens as well (see guard.scoring.pooling), so each latent and each token has an exact part. The
tokens are those of a phase, or of its severest passage (see guard.scoring.phase).
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
    Passage,
    SpanContribution,
    TokenDetail,
)
from guard.scoring.phase import PhaseState
from guard.scoring.pooling import Floats, Gate, Hits, Ints, Pool, Spans

Thresholds = tuple[float | None, float | None]  # flag at, block at


class _Line(NamedTuple):
    """What every attribution to one latent says."""

    latent: LatentId
    name: str
    tags: tuple[str, ...]
    explanation_score: float | None


class Run(NamedTuple):
    """Tokens of a phase that stand in a row; `begin` counts tokens of the phase."""

    begin: int
    hits: Hits
    where: Ints  # [T, 3]


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
        self._thresholds = [thresholds[head.name] for head in self._heads]
        self._decide = decide
        self._lines = [
            _Line(
                LatentId(line.hook_point, line.latent), name, (*line.domains, *line.subdomains), line.explanation_score
            )
            for line, name in zip(pack.latents, names, strict=True)
        ]
        self._named: Floats = np.array([bool(name) for name in names], dtype=np.float64)  # [K] 1 or 0
        self._gate = Gate(
            np.concatenate([p.threshold for p in pack.hook_points]).astype(np.float64),
            np.concatenate([p.scale for p in pack.hook_points]).astype(np.float64),
        )
        temperature = np.array([head.temperature for head in self._heads])[:, None]
        self._weights: Floats = pack.head_weights.astype(np.float64) / temperature  # [H, K]
        self._probes: list[bool] = np.any(pack.probe_weights, axis=1).tolist()  # whether a head reads any
        self._probe_weights: Floats = pack.probe_weights.astype(np.float64) / temperature  # [H, P]
        self._bias: Floats = np.array([head.bias for head in self._heads]) / temperature[:, 0]  # [H]
        self._caution: Floats = pack.manifest.pooling.passage_caution / temperature[:, 0]  # [H]
        lowest = [min((t for t in thresholds[head.name] if t is not None), default=np.inf) for head in self._heads]
        self._least: Floats = np.array(lowest)  # [H] scores below it call for nothing
        self._of_domain = {
            domain: [i for i, head in enumerate(self._heads) if head.domain == domain] for domain in pack.domains
        }

    def new_state(self) -> PhaseState:
        pooling, probes = self._pack.manifest.pooling, self._probe_weights.shape[1]
        return PhaseState(
            lambda begin: Pool.empty(self._gate, probes, pooling, begin),
            pooling.passage_tokens,
            self._caution,
            self.logits,
        )

    def verdicts(self, state: PhaseState, domains: Sequence[str], attributions: int) -> tuple[DomainVerdict, ...]:
        """One verdict a domain, in the order given; nothing is scored before the first token."""
        severest = state.severest()
        heads: list[HeadScore | None] = [None] * len(self._heads)
        for pool in dict.fromkeys(severest):
            mine = [i for i, h in enumerate(self._heads) if severest[i] is pool and h.domain in domains]
            if mine:
                bias, passage = self._bias, None
                if pool is not state.whole:
                    bias, passage = self._bias - state.held_back(), _passage(pool)
                for i, score in zip(mine, self._scores(pool, mine, bias, attributions, passage), strict=True):
                    heads[i] = score
        return tuple(self._domain(domain, heads) for domain in domains)

    def _scores(
        self, pool: Pool, heads: list[int], biases: Floats, attributions: int, passage: Passage | None
    ) -> list[HeadScore]:
        fired = np.flatnonzero(pool.sums)  # [F]
        latent_parts = self._weights[heads].take(fired, axis=1) * pool.pooled()[fired]  # [H, F]
        probe_parts = self._probe_weights[heads] @ pool.pooled_probes()  # [H]
        size = np.abs(latent_parts)
        mass = size.sum(axis=1) + np.abs(probe_parts)
        logits = (biases[heads] + latent_parts.sum(axis=1) + probe_parts).tolist()
        named = np.minimum(np.vecdot(size, self._named[fired]) / np.where(mass > 0, mass, 1.0), 1.0).tolist()
        shown = self._shown(pool, fired, latent_parts, mass, attributions)
        result = []
        for row, i in enumerate(heads):
            own = shown[row]
            if self._probes[i] and attributions:
                part = float(probe_parts[row])
                share = abs(part) / float(mass[row]) if mass[row] else 0.0
                own.append(Attribution(None, "dense probe", (), part, share, 0.0, ()))
            flag_at, block_at = self._thresholds[i]
            bias = float(biases[i])
            result.append(
                HeadScore(
                    head=self._heads[i].head,
                    score=sigmoid(logits[row]),
                    logit=logits[row],
                    bias=bias,
                    rest=logits[row] - bias - sum(a.contribution for a in own),
                    flag_at=flag_at,
                    block_at=block_at,
                    explained_share=named[row],
                    attributions=tuple(own),
                    passage=passage,
                )
            )
        return result

    def _domain(self, domain: str, heads: Sequence[HeadScore | None]) -> DomainVerdict:
        scores = tuple(s for head, s in zip(self._heads, heads, strict=True) if s is not None and head.domain == domain)
        return DomainVerdict(domain, self._decide([(s.score, (s.flag_at, s.block_at)) for s in scores]), scores)

    def logits(self, pools: Sequence[Pool]) -> Floats:
        """`[V, H]`."""
        pooled = np.stack([pool.sums for pool in pools])  # [V, K]
        pooled /= np.array([pool.divisor for pool in pools])[:, None]
        pooled **= self._pack.manifest.pooling.power
        probes = np.stack([pool.pooled_probes() for pool in pools])  # [V, P]
        # Not `@`: for a product this small BLAS would wake its threads, and wait for them where cores are busy.
        logits: Floats = np.vecdot(pooled[:, None], self._weights) + self._bias
        logits += np.vecdot(probes[:, None], self._probe_weights)
        return logits

    def actions(self, states: Sequence[PhaseState]) -> list[dict[str, Action]]:
        """For each state, the domains whose action is more than allow: `verdicts` without the reasons, for many."""
        unsettled = [state.unsettled() for state in states]
        of_each = np.split(
            self.logits([pool for pools in unsettled for pool in pools]), np.cumsum([len(p) for p in unsettled[:-1]])
        )
        logits = np.stack([state.most(of_one) for state, of_one in zip(states, of_each, strict=True)])  # [S, H]
        scores = 1.0 / (1.0 + np.exp(-np.clip(logits, -60.0, 60.0)))
        result: list[dict[str, Action]] = [{} for _ in states]
        for index in np.flatnonzero((scores >= self._least).any(axis=1)):
            for domain, heads in self._of_domain.items():
                said = [(float(scores[index, i]), self._thresholds[i]) for i in heads]
                action = self._decide(said)
                if action is not Action.ALLOW:
                    result[index][domain] = action
        return result

    def token_details(self, state: PhaseState, runs: Sequence[Run], domains: Sequence[str]) -> list[TokenDetail]:
        """What each token of these runs adds to each head's logit, with the phase as it is now.

        Where a head speaks of a passage, tokens outside it add nothing.
        """
        severest = state.severest()
        chosen = [i for i, head in enumerate(self._heads) if head.domain in domains]
        names = [self._heads[i].name for i in chosen]
        per_unit = {pool: pool.pooled_per_unit() for pool in dict.fromkeys(severest[i] for i in chosen)}
        result = []
        for run in runs:
            hits, number = run.hits, run.begin + np.arange(run.hits.tokens)
            strengths = self._gate(hits.row, hits.value)
            parts = np.zeros((hits.tokens, len(chosen)))
            for column, i in enumerate(chosen):
                pool = severest[i]
                weighted = self._weights[i, hits.row] * strengths * per_unit[pool][hits.row]
                parts[:, column] = np.bincount(hits.token, weights=weighted, minlength=hits.tokens)
                parts[:, column] += hits.probe @ self._probe_weights[i] / pool.length
                parts[(number < pool.begin) | (number >= pool.begin + pool.tokens), column] = 0.0
            result += [
                TokenDetail(int(start), int(end), int(message), dict(zip(names, map(float, row), strict=True)))
                for (start, end, message), row in zip(run.where, parts, strict=True)
            ]
        return result

    def _shown(self, pool: Pool, fired: Ints, parts: Floats, mass: Floats, wanted: int) -> list[list[Attribution]]:
        """The latents with the largest `parts [H, F]` of each head's logit, at most `wanted` of them."""
        if not wanted:
            return [[] for _ in parts]
        order = np.argsort(-np.abs(parts), axis=1, kind="stable")[:, :wanted]  # [H, W]
        rows = fired[order]  # [H, W]
        contributions = np.take_along_axis(parts, order, axis=1)  # [H, W]
        shares = np.abs(contributions) / np.where(mass > 0, mass, 1.0)[:, None]
        spans = pool.spans(rows)
        begin, end = np.searchsorted(spans.row, rows), np.searchsorted(spans.row, rows, side="right")
        columns = (rows, contributions, shares, pool.peak[rows], contributions / pool.sums[rows], begin, end)
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


def _passage(pool: Pool) -> Passage:
    start, _, message = pool.first.tolist()
    _, end, end_message = pool.last.tolist()
    return Passage(start, end, message, end_message, pool.tokens)
