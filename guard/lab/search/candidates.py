"""Candidates: the latents of a suite that hold safety concepts, by contrast pairs and by labelled texts.

Every latent is asked the same questions (does it fire more where domain d, or its sub-domain s, is?), each answered by
an effect and a p (guard.lab.search.significance); q-values are taken within a domain and a depth, over all of its SAEs,
latents and questions. A latent carries a tag for every question with `q <= fdr`.

All of it is done three times: on everything, for what is kept, and on either half of the pairs and of the groups of
sources, so that what one half chooses is judged on the other. Besides, what pairs chose is judged on sources, and the
other way round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from guard.errors import InvalidInput
from guard.lab.heads.fit import HEADS
from guard.lab.labelled import Pair, Row
from guard.lab.search.contrast import ALL, concepts
from guard.lab.search.rank import depth
from guard.lab.search.significance import LEVEL, Array, Control, Stratum, pooled, q_values, rank_stratum, sign_test
from guard.lab.search.splits import PAIRS, first_half, split_groups, strata
from guard.lab.search.surface import TokenUse, mark
from guard.lab.suite.measure import SaeReport

CONTRAST = "contrast"
Part = Literal["all", "first", "second"]
PARTS: tuple[Part, ...] = ("all", "first", "second")


class Tag(BaseModel):
    """`effect`: p_f less p_f reversed (contrast), or AUROC - 0.5, mean over sources (labelled)."""

    domain: str
    subdomain: str  # `*`: the domain as a whole
    evidence: str  # contrast, labelled.harm or labelled.presence
    effect: float
    p: float
    q: float


class Candidate(BaseModel):
    """One line of the candidates' file. `surface` is None where the shards do not say which token was read."""

    hook_point: str
    sae: str
    latent: int
    tags: list[Tag]
    surface: bool | None
    why: str
    token: int | None  # the id of the token that it fires on most often,
    token_share: float | None  # its share of the latent's firings,
    token_coverage: float | None  # and the share of its occurrences in which the latent fires
    firing_rate: float


@dataclass(frozen=True)
class Question:
    domain: str
    subdomain: str
    evidence: str


@dataclass(frozen=True)
class Answers:
    """Of every question by every latent of one SAE, `[Q, K]`; p is NaN where too little fired to ask."""

    effect: NDArray[np.float32]
    p: Array
    chance: NDArray[np.float32]  # of p <= LEVEL under the null


class Ground:
    """Pairs and labelled texts that questions are answered on; the rows are those of the strengths `[N, K]`."""

    def __init__(self, rows: Sequence[Row], pairs: Sequence[Pair]) -> None:
        self.pairs = list(pairs)
        self.with_, self.without = pair_rows(rows, pairs)
        self.concepts = {key: chosen for key, chosen in concepts(pairs).items() if key != (ALL, ALL)}
        self.strata = strata(rows)
        found = [(group, HEADS.index(head)) for head, parts in self.strata.items() for _, group, _, _ in parts]
        self.half_of = split_groups(found, 2)
        self.first_pairs = first_half(pairs)
        self.questions = [Question(*key, CONTRAST) for key in self.concepts]
        self.questions += [Question(d, ALL, f"labelled.{kind.value}") for d, kind in HEADS if self.strata[d, kind]]

    def fires(self, strength: NDArray[np.float16]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which latents fire on the pairs' sides, `[pairs, K]` each."""
        return strength[self.with_] > 0, strength[self.without] > 0

    def answers(self, strength: NDArray[np.float16]) -> dict[Part, Answers]:
        """Of one SAE, on everything and on either half."""
        with_, without = self.fires(strength)
        forward, backward = with_ & ~without, without & ~with_
        ranked = {
            head: [(group, rank_stratum(strength[rows], positive)) for _, group, rows, positive in there]
            for head, there in self.strata.items()
        }
        result: dict[Part, Answers] = {}
        for part in PARTS:
            pairs = self.first_pairs if part == "first" else ~self.first_pairs | (part == "all")
            found = [self._by_contrast(forward, backward, pairs & chosen) for chosen in self.concepts.values()]
            found += [self._by_labels(tests, part, strength.shape[1]) for tests in ranked.values() if tests]
            effect, p, chance = (np.stack(column) for column in zip(*found, strict=True))
            result[part] = Answers(effect.astype(np.float32), p, chance.astype(np.float32))
        return result

    @staticmethod
    def _by_contrast(
        forward: NDArray[np.bool_], backward: NDArray[np.bool_], chosen: NDArray[np.bool_]
    ) -> tuple[Array, Array, Array]:
        ahead, behind = forward[chosen].sum(axis=0), backward[chosen].sum(axis=0)
        p, chance = sign_test(ahead, behind)
        return (ahead - behind) / max(chosen.sum(), 1), p, chance

    def _by_labels(self, found: list[tuple[str, Stratum]], part: Part, width: int) -> tuple[Array, Array, Array]:
        used = [stratum for group, stratum in found if part == "all" or PARTS[1 + self.half_of[group]] == part]
        if not used:
            return np.zeros(width), np.full(width, np.nan), np.zeros(width)
        effect, p = pooled(used)
        return effect, p, np.where(np.isnan(p), 0.0, LEVEL)


def pair_rows(rows: Sequence[Row], pairs: Sequence[Pair]) -> tuple[list[int], list[int]]:
    """Where the pairs' texts stand among the rows: with the concept, and without.

    Raises InvalidInput for a pair that the rows do not hold.
    """
    place = {row.id: i for i, row in enumerate(rows) if row.source == PAIRS}
    wanted = [[f"{pair.id}/{side}" for pair in pairs] for side in ("with", "without")]
    if missing := [name for side in wanted for name in side if name not in place]:
        raise InvalidInput(f"the texts lack {len(missing)} of the contrast pairs, such as {missing[0]}; harvest again")
    return [place[name] for name in wanted[0]], [place[name] for name in wanted[1]]


def family_q(
    reports: Sequence[SaeReport], questions: Sequence[Question], answers: Sequence[Answers], control: Control
) -> list[Array]:
    """q-values `[Q, K]` of each SAE, within every domain and depth."""
    result = [np.full(a.p.shape, np.nan) for a in answers]
    for domain in dict.fromkeys(q.domain for q in questions):
        asked = [i for i, q in enumerate(questions) if q.domain == domain]
        levels = [depth(report.hook_point) for report in reports]
        for level in dict.fromkeys(levels):
            there = [i for i, found_at in enumerate(levels) if found_at == level]
            found = q_values(np.concatenate([answers[i].p[asked].ravel() for i in there]), control)
            sizes = np.cumsum([answers[i].p[asked].size for i in there])[:-1]
            for i, part in zip(there, np.split(found, sizes), strict=True):
                result[i][asked] = part.reshape(len(asked), -1)
    return result


def lines(
    report: SaeReport,
    questions: Sequence[Question],
    answers: Answers,
    q: Array,
    chosen: NDArray[np.int64],
    *,
    fdr: float,
    langs: Sequence[str],
    use: TokenUse | None,
    firing_rate: NDArray[np.float32],
) -> list[Candidate]:
    """The candidates of one SAE: `chosen` of its latents, with `use` and `langs` in the order of `chosen`."""
    result = []
    for place, latent in enumerate(chosen):
        tags = [
            Tag(
                **vars(questions[i]),
                effect=round(float(answers.effect[i, latent]), 4),
                p=float(answers.p[i, latent]),
                q=float(q[i, latent]),
            )
            for i in np.flatnonzero(q[:, latent] <= fdr).tolist()
        ]
        known = use is not None and use.token[place] >= 0
        token, share, coverage = (
            (int(use.token[place]), float(use.share[place]), float(use.coverage[place]))
            if use is not None and known
            else (None, None, None)
        )
        by_contrast = any(tag.evidence == CONTRAST for tag in tags)
        found = mark(share, token or 0, langs[place], by_contrast=by_contrast)
        result.append(
            Candidate(
                hook_point=report.hook_point,
                sae=report.name,
                latent=int(latent),
                tags=sorted(tags, key=lambda tag: tag.p),
                surface=found.surface,
                why=found.why,
                token=token,
                token_share=None if share is None else round(share, 4),
                token_coverage=None if coverage is None else round(coverage, 4),
                firing_rate=float(firing_rate[latent]),
            )
        )
    return result
