"""Candidates: the latents of a suite that hold safety concepts, by contrast pairs and by labelled texts.

Every latent is asked the same questions (does it fire more where domain d, or its sub-domain s, is?), each answered by
an effect and a p (guard.lab.search.significance). A domain's questions make one p a latent, and what is found is
decided among the latents of a domain and a depth, over all of its SAEs: of those found in a domain, a share of `fdr` is
false. A latent that is found carries a tag for every question of the domain with `q <= fdr`, taken over questions and
latents alike; or, where there is none, for the question with the smallest p.

All of it is done three times: on everything, for what is kept, and on either half of the pairs and of the groups of
sources, so that what one half chooses is judged on the other. Besides, what pairs chose is judged on sources, and the
other way round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from guard.lab.heads.fit import HEADS
from guard.lab.labelled import Pair, Row
from guard.lab.search.contrast import ALL, concepts, pair_rows
from guard.lab.search.rank import depth
from guard.lab.search.significance import (
    LEVEL,
    Array,
    Control,
    Stratum,
    pooled,
    q_values,
    rank_stratum,
    sign_test,
    simes,
    together,
)
from guard.lab.search.splits import first_half, split_groups, strata
from guard.lab.search.surface import TokenUse, mark
from guard.lab.suite.measure import SaeReport

LabelledStratum = tuple[str, str, NDArray[np.int64], NDArray[np.bool_]]  # name, group, rows, which are positives
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
    q: float  # of this question, among all of the domain's by all latents of the depth
    latent_q: float  # of the latent, among all latents of the depth: at which it would just be found in the domain


class Candidate(BaseModel):
    """One line of the candidates' file. `surface` is None where it is not known which tokens the latent fires on."""

    hook_point: str
    sae: str
    latent: int = Field(ge=0)
    tags: list[Tag] = Field(min_length=1)
    surface: bool | None
    why: str
    token: int | None  # the id of the token that it fires on most often,
    token_share: float | None  # its share of the latent's firings,
    token_coverage: float | None  # and the share of its occurrences in which the latent fires
    firing_rate: float

    @property
    def domains(self) -> list[str]:
        """The surest first."""
        by_surety = sorted(self.tags, key=lambda tag: (tag.latent_q, tag.p, -abs(tag.effect)))
        return list(dict.fromkeys(tag.domain for tag in by_surety))

    @property
    def subdomains(self) -> list[tuple[str, str]]:
        return sorted({(tag.domain, tag.subdomain) for tag in self.tags if tag.subdomain != ALL})


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
        ranked = {head: _by_group(strength, there) for head, there in self.strata.items()}
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

    def _by_labels(self, found: Mapping[str, Stratum], part: Part, width: int) -> tuple[Array, Array, Array]:
        used = [stratum for group, stratum in found.items() if part == "all" or PARTS[1 + self.half_of[group]] == part]
        if not used:
            return np.zeros(width), np.full(width, np.nan), np.zeros(width)
        effect, p = pooled(used)
        return effect, p, np.where(np.isnan(p), 0.0, LEVEL)


def _by_group(strength: NDArray[np.float16], there: Sequence[LabelledStratum]) -> dict[str, Stratum]:
    found: dict[str, list[Stratum]] = {}
    for _, group, rows, positive in there:
        found.setdefault(group, []).append(rank_stratum(strength[rows], positive))
    return {group: together(of_group) for group, of_group in found.items()}


@dataclass(frozen=True)
class Found:
    """What is found of one SAE; NaN where nothing could be asked."""

    q: Array  # [Q, K] of each question
    latent_q: Array  # [Q, K] of the latent in the question's domain
    tagged: NDArray[np.bool_]  # [Q, K]


def find(
    reports: Sequence[SaeReport], questions: Sequence[Question], p: Sequence[Array], *, fdr: float, control: Control
) -> list[Found]:
    """Of each SAE by its `p [Q, K]`: false discoveries are held down within every domain and depth."""
    result = [Found(np.full(a.shape, np.nan), np.full(a.shape, np.nan), np.zeros(a.shape, dtype=bool)) for a in p]
    levels = [depth(report.hook_point) for report in reports]
    for domain in dict.fromkeys(q.domain for q in questions):
        asked = [i for i, q in enumerate(questions) if q.domain == domain]
        for level in dict.fromkeys(levels):
            there = [i for i, found_at in enumerate(levels) if found_at == level]
            family = np.concatenate([p[i][asked] for i in there], axis=1)  # [questions, latents of the depth]
            q, latent_q = q_values(family, control), q_values(simes(family, control), control)
            tagged = (latent_q <= fdr) & ((q <= fdr) | _smallest_alone(family, q, fdr))
            ends = np.cumsum([p[i].shape[1] for i in there])
            for i, end in zip(there, ends.tolist(), strict=True):
                part = slice(end - p[i].shape[1], end)
                result[i].q[asked] = q[:, part]
                result[i].latent_q[asked] = latent_q[part]
                result[i].tagged[asked] = tagged[:, part]
    return result


def _smallest_alone(p: Array, q: Array, fdr: float) -> NDArray[np.bool_]:
    """The question of the smallest p of each latent none of whose questions has `q <= fdr`."""
    alone = np.zeros(p.shape, dtype=bool)
    none = np.flatnonzero(~(q <= fdr).any(axis=0))
    alone[np.where(np.isnan(p), np.inf, p).argmin(axis=0)[none], none] = True
    return alone


def lines(
    report: SaeReport,
    questions: Sequence[Question],
    answers: Answers,
    found: Found,
    *,
    langs: Sequence[str],
    uses: Sequence[TokenUse | None] | None,
    firing_rate: NDArray[np.float32],
) -> list[Candidate]:
    """The candidates of one SAE, one for every latent with a tag, in whose order `uses` and `langs` are."""
    result = []
    for place, latent in enumerate(np.flatnonzero(found.tagged.any(axis=0)).tolist()):
        tags = [
            Tag(
                **vars(questions[i]),
                effect=round(float(answers.effect[i, latent]), 4),
                p=float(answers.p[i, latent]),
                q=float(found.q[i, latent]),
                latent_q=float(found.latent_q[i, latent]),
            )
            for i in np.flatnonzero(found.tagged[:, latent]).tolist()
        ]
        use = uses[place] if uses is not None else None
        surface = mark(
            use,
            langs[place],
            by_contrast=any(tag.evidence == CONTRAST for tag in tags),
            unknown="tokens not known" if uses is None else "fired too rarely to say",
        )
        result.append(
            Candidate(
                hook_point=report.hook_point,
                sae=report.name,
                latent=latent,
                tags=sorted(tags, key=lambda tag: tag.p),
                surface=surface.surface,
                why=surface.why,
                token=None if use is None else use.token,
                token_share=None if use is None else round(use.share, 4),
                token_coverage=None if use is None else round(use.coverage, 4),
                firing_rate=float(firing_rate[latent]),
            )
        )
    return result
