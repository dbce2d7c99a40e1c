"""How far candidates can be trusted: counts by domain and depth, and what of them holds on data they did not see."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from guard.lab.labelled import DOMAINS
from guard.lab.search.candidates import CONTRAST, Answers, Candidate, Ground, Part, Question, Tag
from guard.lab.search.contrast import ALL
from guard.lab.search.rank import depth
from guard.lab.search.significance import LEVEL, Array, Control
from guard.lab.suite.measure import SaeReport
from guard.records import HeadKind

Kind = Literal["contrast", "labelled"]
Judge = Literal["other pairs", "other sources", "sources", "pairs"]
_PRESENCE = f"labelled.{HeadKind.PRESENCE.value}"


class Count(BaseModel):
    """Latents found at the false-discovery rate, by domain (or sub-domain) and depth. A latent counts once."""

    domain: str
    subdomain: str
    depth: int
    latents: int  # of the SAEs at this depth
    found: int
    by_contrast: int
    by_labels: int
    by_both: int
    surface: int  # marked as surface forms


class Precision(BaseModel):
    """What was chosen on one part and holds on another: tags (latent and question), by domain and depth.

    `confirmed`: effect of the same sign and p <= 0.05. `expected`: what chance alone would confirm of as many.
    """

    domain: str
    depth: int | None  # None: all
    chosen_by: Kind
    judged_on: Judge
    chosen: int
    same_sign: float | None
    confirmed: float | None
    expected: float | None


class Summary(BaseModel):
    """`FILE.summary.json`."""

    fdr: float
    control: Control
    saes: list[str]
    pairs: int
    strata: dict[str, list[str]]  # by head: the sources, with their languages
    halves: dict[str, list[str]]  # groups of sources
    tokens_known: bool
    counts: list[Count]
    precision: list[Precision]


def counts(reports: Sequence[SaeReport], candidates: Sequence[Candidate], questions: Sequence[Question]) -> list[Count]:
    """For every domain as a whole (any of its tags), and for its sub-domains by their own tags."""
    levels = {report.name: depth(report.hook_point) for report in reports}
    width = {d: sum(r.width for r in reports if levels[r.name] == d) for d in sorted(set(levels.values()))}
    concepts = dict.fromkeys((q.domain, q.subdomain) for q in questions)
    result = []
    for domain, subdomain in concepts:
        for level, latents in width.items():
            kinds = [
                (c, {tag.evidence == CONTRAST for tag in c.tags if _about(tag, domain, subdomain)})
                for c in candidates
                if levels[c.sae] == level
            ]
            found = [(c, k) for c, k in kinds if k]
            result.append(
                Count(
                    domain=domain,
                    subdomain=subdomain,
                    depth=level,
                    latents=latents,
                    found=len(found),
                    by_contrast=sum(True in k for _, k in found),
                    by_labels=sum(False in k for _, k in found),
                    by_both=sum(len(k) == 2 for _, k in found),
                    surface=sum(c.surface is True for c, _ in found),
                )
            )
    return result


def _about(tag: Tag, domain: str, subdomain: str) -> bool:
    return tag.domain == domain and subdomain in {ALL, tag.subdomain}


class Trial(BaseModel):
    """Sums over tags behind one line of precision."""

    chosen: int = 0
    same: int = 0
    confirmed: int = 0
    expected: float = 0.0

    def add(self, effect: NDArray[np.float32], p: Array, chance: NDArray[np.float32]) -> None:
        self.chosen += len(p)
        self.same += int((effect > 0).sum())
        self.confirmed += int(((effect > 0) & (p <= LEVEL)).sum())
        self.expected += float(chance.sum())


def precision(
    reports: Sequence[SaeReport],
    ground: Ground,
    answers: Sequence[dict[Part, Answers]],
    q: Mapping[Part, Sequence[Array]],
    fdr: float,
) -> list[Precision]:
    """Half against half, both ways, and each kind of evidence against the other."""
    trials: dict[tuple[str, int | None, Kind, Judge], Trial] = {}
    for number, report in enumerate(reports):
        for domain, kind, judged_on, effect, p, chance in _judgements(
            ground, answers[number], {part: q[part][number] for part in q}, fdr
        ):
            for key in ((domain, depth(report.hook_point), kind, judged_on), (ALL, None, kind, judged_on)):
                trials.setdefault(key, Trial()).add(effect, p, chance)
    order = {d: i for i, d in enumerate((*DOMAINS, ALL))}
    return [
        Precision(
            domain=domain,
            depth=depth,
            chosen_by=kind,
            judged_on=judged_on,
            chosen=t.chosen,
            same_sign=round(t.same / t.chosen, 4) if t.chosen else None,
            confirmed=round(t.confirmed / t.chosen, 4) if t.chosen else None,
            expected=round(t.expected / t.chosen, 4) if t.chosen else None,
        )
        for (domain, depth, kind, judged_on), t in sorted(
            trials.items(), key=lambda item: (order[item[0][0]], item[0][1] or 0, item[0][2], item[0][3])
        )
    ]


Judgement = tuple[str, Kind, Judge, NDArray[np.float32], Array, NDArray[np.float32]]


def _judgements(ground: Ground, answers: dict[Part, Answers], q: dict[Part, Array], fdr: float) -> Iterator[Judgement]:
    """Of one SAE: domain, what chose, what judges, and the judge's effect, p and chance of what was chosen."""
    halves: tuple[tuple[Part, Part], ...] = (("first", "second"), ("second", "first"))
    for i, question in enumerate(ground.questions):
        kind: Kind = "contrast" if question.evidence == CONTRAST else "labelled"
        for choosing, judging in halves:
            a = answers[judging]
            if kind == "labelled" and np.isnan(a.p[i]).all():
                continue  # no source of this head in that half
            chosen = q[choosing][i] <= fdr
            name: Judge = "other pairs" if kind == "contrast" else "other sources"
            yield question.domain, kind, name, a.effect[i, chosen], a.p[i, chosen], a.chance[i, chosen]
    whole = answers["all"]
    for domain in dict.fromkeys(question.domain for question in ground.questions):
        asked = {by: _places(ground.questions, domain, by) for by in ("contrast", "labelled")}
        judges: tuple[tuple[Kind, Judge, Question], ...] = (
            ("contrast", "sources", Question(domain, ALL, _PRESENCE)),
            ("labelled", "pairs", Question(domain, ALL, CONTRAST)),
        )
        for by, judged_on, judge in judges:
            if asked[by] and judge in ground.questions:
                i = ground.questions.index(judge)
                chosen = (q["all"][asked[by]] <= fdr).any(axis=0)
                yield domain, by, judged_on, whole.effect[i, chosen], whole.p[i, chosen], whole.chance[i, chosen]


def _places(questions: Sequence[Question], domain: str, kind: str) -> list[int]:
    return [
        i for i, q in enumerate(questions) if q.domain == domain and (q.evidence == CONTRAST) == (kind == "contrast")
    ]
