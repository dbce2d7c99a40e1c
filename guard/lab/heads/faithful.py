"""Faithful: whether what a verdict names is what made it.

Texts that are rightly flagged are checked again without the tokens that the strongest attributions name, and without as
many tokens drawn at random. What the attributions name should be what the flag rests on.
"""

import random
from collections.abc import Callable, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from guard.assessor import Assessor
from guard.lab.heads.fit import HEADS, Head
from guard.lab.labelled import Row, target
from guard.records import Action, Attribution, CheckInput, CheckOptions, HeadScore, PhaseVerdict, TokenDetail

DEPTHS = (1, 3, 5)  # attributions whose tokens are deleted together
_ACTED = {Action.FLAG, Action.BLOCK}

Spans = frozenset[tuple[int, int]]


class Faithfulness(BaseModel):
    """`flips`: share of the flags that are gone once the tokens are, by how many attributions named them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    texts: int  # positives that were read
    flagged: int  # of them rightly
    explained_share: float  # of the flagging head's logit, by named latents: the median
    tokens: dict[str, float]  # named, as a share of those that the head speaks of: the median
    flips: dict[str, float]
    flips_random: dict[str, float]


def faithfulness(
    assessor: Assessor,
    rows: Sequence[Row],
    *,
    of_each: int = 60,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Faithfulness:
    """Over at most `of_each` positives of every flagging head, other people's before the project's own."""
    flagging = {f"{h.domain}.{h.head.value}" for h in assessor.pack.manifest.heads if h.flag_at is not None}
    chosen = [
        (row, head)
        for head in HEADS
        if f"{head[0]}.{head[1].value}" in flagging
        for row in _positives(rows, head, of_each, seed)
    ]
    shares: list[float] = []
    named: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    flips: dict[int, list[bool]] = {depth: [] for depth in DEPTHS}
    by_chance: dict[int, list[bool]] = {depth: [] for depth in DEPTHS}
    rng = random.Random(seed)
    for done, (row, head) in enumerate(chosen, 1):
        phase = _check(assessor, row.text, head[0])
        acting = _acting(phase)
        progress(done, len(chosen))
        if acting is None:
            continue
        shares.append(acting.explained_share)
        tokens = [(t.start, t.end) for t in phase.tokens if _inside(t, acting)]
        for depth in DEPTHS:
            spans = named_by(acting.attributions, depth)
            named[depth].append(len(spans) / max(len(tokens), 1))
            flips[depth].append(not _acts(assessor, without(row.text, spans), head[0]))
            drawn = frozenset(rng.sample(tokens, min(len(spans), len(tokens))))
            by_chance[depth].append(not _acts(assessor, without(row.text, drawn), head[0]))
    return Faithfulness(
        texts=len(chosen),
        flagged=len(shares),
        explained_share=round(float(np.median(shares)), 4) if shares else 0.0,
        tokens={str(d): round(float(np.median(x)), 4) for d, x in named.items() if x},
        flips={str(d): round(float(np.mean(x)), 4) for d, x in flips.items() if x},
        flips_random={str(d): round(float(np.mean(x)), 4) for d, x in by_chance.items() if x},
    )


def named_by(attributions: Sequence[Attribution], depth: int) -> Spans:
    """The tokens of the `depth` latents that add most to the score."""
    adding = sorted((a for a in attributions if a.latent and a.contribution > 0), key=lambda a: -a.contribution)
    return frozenset((span.start, span.end) for a in adding[:depth] for span in a.spans)


def without(text: str, spans: Spans) -> str:
    """The text with these stretches cut out."""
    parts, at = [], 0
    for start, end in sorted(spans):
        parts.append(text[at:start])
        at = max(at, end)
    return "".join([*parts, text[at:]])


def _positives(rows: Sequence[Row], head: Head, most: int, seed: int) -> list[Row]:
    bare = [r for r in rows if not (r.weak or r.in_chat or r.source.startswith("lookalike"))]
    found = [r for r in bare if target(r, *head)]
    random.Random(f"{seed} {head[0]} {head[1].value}").shuffle(found)
    return sorted(found, key=lambda row: row.own)[:most]


def _check(assessor: Assessor, text: str, domain: str) -> PhaseVerdict:
    options = CheckOptions(domains=(domain,), max_attributions=20, token_detail=True)
    return assessor.check(CheckInput(prompt=text), options).phases[0]


def _acting(phase: PhaseVerdict) -> HeadScore | None:
    """The head that flags, furthest above its threshold."""
    over = [h for d in phase.domains for h in d.heads if h.flag_at is not None and h.score >= h.flag_at]
    return max(over, key=lambda h: h.score - (h.flag_at or 0.0), default=None)


def _inside(token: TokenDetail, head: HeadScore) -> bool:
    """Whether the head speaks of this token."""
    return head.passage is None or head.passage.start <= token.start < head.passage.end


def _acts(assessor: Assessor, text: str, domain: str) -> bool:
    """A text of which nothing is left is not flagged."""
    if not text.strip():
        return False
    return any(d.action in _ACTED for d in _check(assessor, text, domain).domains)
