"""How far candidates can be trusted: counts by domain and depth, and what of them holds on data they did not see."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from guard.lab.labelled import DOMAINS
from guard.lab.search.candidates import CONTRAST, Answers, Candidate, Found, Ground, Part, Question, Tag, find
from guard.lab.search.contrast import ALL
from guard.lab.search.rank import depth
from guard.lab.search.significance import LEVEL, Array, Control
from guard.lab.suite.measure import SaeReport
from guard.records import HeadKind

Kind = Literal["contrast", "labelled"]
KINDS: tuple[Kind, ...] = ("contrast", "labelled")
Judge = Literal["other pairs", "other sources", "sources", "pairs"]
_PRESENCE = f"labelled.{HeadKind.PRESENCE.value}"


class Count(BaseModel):
    """Latents by domain and depth; or by sub-domain: those found in the domain that carry its tag. Each counts once."""

    domain: str
    subdomain: str
    depth: int
    latents: int  # of the SAEs at this depth
    found: int  # of a domain's, a share of `fdr` is false; of a sub-domain's, perhaps more
    by_contrast: int
    by_labels: int
    by_both: int
    surface: int  # marked as surface forms


class Precision(BaseModel):
    """What was chosen on one part and holds on another: tags (latent and question), by domain and depth.

    `confirmed`: effect of the same sign and p <= 0.05; what was not tested, having fired too rarely there, is not.
    `expected`: what chance alone would confirm of as many.
    """

    domain: str
    depth: int | None  # None: all
    chosen_by: Kind
    judged_on: Judge
    chosen: int
    untested: float | None
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
    untested: int = 0
    confirmed: int = 0
    expected: float = 0.0

    def add(self, effect: NDArray[np.float32], p: Array, chance: NDArray[np.float32]) -> None:
        self.chosen += len(p)
        self.untested += int(np.isnan(p).sum())
        self.confirmed += int(((effect > 0) & (p <= LEVEL)).sum())
        self.expected += float(chance.sum())


def precision(
    reports: Sequence[SaeReport],
    ground: Ground,
    answers: Sequence[dict[Part, Answers]],
    found: Mapping[Part, Sequence[Found]],
    *,
    fdr: float,
    control: Control,
) -> list[Precision]:
    """Half against half, both ways, and each kind of evidence, chosen by alone, against the other."""
    by_kind = {
        kind: find(reports, ground.questions, _only(kind, ground.questions, answers), fdr=fdr, control=control)
        for kind in KINDS
    }
    trials: dict[tuple[str, int | None, Kind, Judge], Trial] = {}
    for number, report in enumerate(reports):
        for domain, kind, judged_on, effect, p, chance in _judgements(
            ground.questions,
            answers[number],
            {part: found[part][number] for part in found},
            {kind: by_kind[kind][number] for kind in KINDS},
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
            untested=round(t.untested / t.chosen, 4) if t.chosen else None,
            confirmed=round(t.confirmed / t.chosen, 4) if t.chosen else None,
            expected=round(t.expected / t.chosen, 4) if t.chosen else None,
        )
        for (domain, depth, kind, judged_on), t in sorted(
            trials.items(), key=lambda item: (order[item[0][0]], item[0][1] or 0, item[0][2], item[0][3])
        )
    ]


Judgement = tuple[str, Kind, Judge, NDArray[np.float32], Array, NDArray[np.float32]]


def _judgements(
    questions: Sequence[Question],
    answers: Mapping[Part, Answers],
    found: Mapping[Part, Found],
    by_kind: Mapping[Kind, Found],
) -> Iterator[Judgement]:
    """Of one SAE: domain, what chose, what judges, and the judge's effect, p and chance of what was chosen."""
    halves: tuple[tuple[Part, Part], ...] = (("first", "second"), ("second", "first"))
    for i, question in enumerate(questions):
        kind = _kind(question)
        for choosing, judging in halves:
            a = answers[judging]
            if kind == "labelled" and np.isnan(a.p[i]).all():
                continue  # no source of this head in that half
            chosen = found[choosing].tagged[i]
            name: Judge = "other pairs" if kind == "contrast" else "other sources"
            yield question.domain, kind, name, a.effect[i, chosen], a.p[i, chosen], a.chance[i, chosen]
    whole = answers["all"]
    for domain in dict.fromkeys(question.domain for question in questions):
        asked = [question.domain == domain for question in questions]
        judges: tuple[tuple[Kind, Judge, Question], ...] = (
            ("contrast", "sources", Question(domain, ALL, _PRESENCE)),
            ("labelled", "pairs", Question(domain, ALL, CONTRAST)),
        )
        for by, judged_on, judge in judges:
            if judge in questions:
                i = questions.index(judge)
                chosen = by_kind[by].tagged[asked].any(axis=0)
                yield domain, by, judged_on, whole.effect[i, chosen], whole.p[i, chosen], whole.chance[i, chosen]


def _only(kind: Kind, questions: Sequence[Question], answers: Sequence[dict[Part, Answers]]) -> list[Array]:
    """p `[Q, K]` of each SAE, the questions of the other kind not asked."""
    asked = np.array([_kind(question) == kind for question in questions])[:, None]
    return [np.where(asked, a["all"].p, np.nan) for a in answers]


def _kind(question: Question) -> Kind:
    return "contrast" if question.evidence == CONTRAST else "labelled"
