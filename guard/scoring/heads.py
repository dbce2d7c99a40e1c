"""Heads: from pooled hits to scores, and from scores back to what made them, exactly.

    logit = (bias + sum_i w_i * pooled_i + sum_p v_p * pooled_probe_p) / temperature,  score = sigmoid(logit)

Both sums run over tokens as well (see guard.scoring.pooling), so each latent and each token has an exact part.
"""

from collections.abc import Callable, Sequence

import numpy as np

from guard.pack.loader import Pack
from guard.pack.manifest import HeadSection
from guard.records import (
    Action,
    Attribution,
    DomainVerdict,
    HeadScore,
    LatentId,
    SpanContribution,
    TokenDetail,
)
from guard.scoring.pooling import Floats, Gate, Hits, Ints, PhaseState

Thresholds = tuple[float | None, float | None]  # flag at, block at


def sigmoid(logit: float) -> float:
    return float(1.0 / (1.0 + np.exp(-np.clip(logit, -60.0, 60.0))))


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
        self._names = names
        self._named = np.array([bool(name) for name in names], dtype=bool)  # [K]
        self._gate = Gate(
            np.concatenate([p.threshold for p in pack.hook_points]).astype(np.float64),
            np.concatenate([p.scale for p in pack.hook_points]).astype(np.float64),
        )
        temperature = np.array([head.temperature for head in self._heads])[:, None]
        self._weights: Floats = pack.head_weights.astype(np.float64) / temperature  # [H, K]
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
        latent_parts = self._weights * state.pooled()  # [H, K]
        probe_parts = self._probe_weights @ state.pooled_probes()  # [H]
        result = []
        for domain in domains:
            scores = tuple(
                self._score(state, self._heads[i], i, latent_parts[i], float(probe_parts[i]), attributions)
                for i in self._of_domain[domain]
            )
            action = self._decide([(s.score, (s.flag_at, s.block_at)) for s in scores])
            result.append(DomainVerdict(domain=domain, action=action, heads=scores))
        return tuple(result)

    def actions(self, states: Sequence[PhaseState]) -> list[dict[str, Action]]:
        """For each state, the domains whose action is more than allow: `verdicts` without the reasons, for many."""
        pooled = np.stack([state.sums for state in states])  # [S, K]
        pooled /= np.array([state.divisor for state in states])[:, None]
        pooled **= self._pack.manifest.pooling.power
        logits = pooled @ self._weights.T + self._bias  # [S, H]
        logits += np.stack([state.pooled_probes() for state in states]) @ self._probe_weights.T
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
            parts[:, column] += hits.probe @ self._probe_weights[i] / max(state.tokens, 1)
        names = [self._heads[i].name for i in chosen]
        return [
            TokenDetail(int(start), int(end), int(message), dict(zip(names, map(float, row), strict=True)))
            for (start, end, message), row in zip(where, parts, strict=True)
        ]

    def _score(
        self, state: PhaseState, head: HeadSection, index: int, latent_parts: Floats, probe_part: float, wanted: int
    ) -> HeadScore:
        logit = float(self._bias[index] + latent_parts.sum() + probe_part)
        mass = float(np.abs(latent_parts).sum() + abs(probe_part))
        order = np.argsort(-np.abs(latent_parts), kind="stable")[:wanted]
        shown = [self._latent(state, int(row), float(latent_parts[row]), mass) for row in order if latent_parts[row]]
        if self._probe_weights[index].any() and wanted:
            shown.append(
                Attribution(
                    latent=None,
                    name="dense probe",
                    tags=(),
                    contribution=probe_part,
                    share=abs(probe_part) / mass if mass else 0.0,
                    peak_activation=0.0,
                    spans=(),
                )
            )
        flag_at, block_at = self._thresholds[head.name]
        return HeadScore(
            head=head.head,
            score=sigmoid(logit),
            logit=logit,
            bias=float(self._bias[index]),
            rest=logit - float(self._bias[index]) - sum(a.contribution for a in shown),
            flag_at=flag_at,
            block_at=block_at,
            explained_share=float(np.abs(latent_parts[self._named]).sum()) / mass if mass else 0.0,
            attributions=tuple(shown),
        )

    def _latent(self, state: PhaseState, row: int, contribution: float, mass: float) -> Attribution:
        line = self._pack.latents[row]
        strengths, places = state.hits_of(row)
        parts = strengths * (contribution / state.sums[row])
        return Attribution(
            latent=LatentId(line.hook_point, line.latent),
            name=self._names[row],
            tags=(*line.domains, *line.subdomains),
            contribution=contribution,
            share=abs(contribution) / mass if mass else 0.0,
            peak_activation=float(state.peak[row]),
            spans=tuple(
                SpanContribution(int(start), int(end), float(part), int(message))
                for part, (start, end, message) in sorted(
                    zip(parts, places, strict=True), key=lambda pair: (pair[1][2], pair[1][0])
                )
            ),
            explanation_score=line.explanation_score,
        )
