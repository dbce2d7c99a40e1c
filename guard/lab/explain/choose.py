"""Which windows show a latent, of the texts that a scan kept for it.

A text is one or the other for a latent, and gives one window at most: no two windows of a latent come from one text, so
that what tests an explanation was not seen by whoever wrote it. Strongest or closest first:

    top        the texts in which the latent fires most
    middle     of a random sample of the texts in which it fires, those between the quantiles .3 and .7 of the peak
    near_miss  silent texts: half hold a form of the tokens that it peaks on most often, half come closest to firing
    silent     silent texts at random: half are labelled with a domain that the latent is tagged with, if there are any
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from guard.lab.explain.pieces import Bools, Pieces
from guard.lab.explain.records import Kind, Part
from guard.lab.explain.scan import Scan
from guard.lab.explain.tokens import TokenTexts
from guard.lab.labelled import DOMAINS

SHOW: dict[Kind, int] = {"top": 8, "middle": 6, "near_miss": 6, "silent": 2}
TEST: dict[Kind, int] = {"top": 5, "middle": 5, "near_miss": 6, "silent": 4}
WANTED = {kind: SHOW[kind] + TEST[kind] for kind in SHOW}
SAMPLE = 64  # firing texts that stand for all of a latent's
_MIDDLE = (0.3, 0.7)
_FORMS = 3  # of tokens, that near misses are looked for by


class Place(NamedTuple):
    piece: int
    token: int  # that the window is laid around


class Chosen(NamedTuple):
    kind: Kind
    part: Part
    place: Place


def choose(
    latent: int, domains: Sequence[str], found: Scan, pieces: Pieces, words: TokenTexts, rng: np.random.Generator
) -> list[Chosen]:
    """The windows of the scan's latent of this number, which is tagged with `domains`."""
    top = [Place(piece, token) for piece, token, _ in found.top.of(latent)]
    sample = [Place(p, t) for p, t, _ in sorted(found.sample.of(latent), key=lambda seen: -seen[2])]
    silent = ~found.fires(latent)
    forms = Counter(words.form(int(pieces.tokens(place.piece)[place.token])) for place in {*top, *sample})
    by_form = _by_form([form for form, _ in forms.most_common(_FORMS)], silent, pieces, words, rng)
    closest = [Place(piece, token) for piece, token, _ in found.near.of(latent)]
    closest = _without(closest, by_form)[: WANTED["near_miss"] - len(by_form)]
    groups: list[tuple[Kind, list[Place]]] = [
        ("top", top),
        ("middle", _middle(_without(sample, top), sample, rng)),
        ("near_miss", by_form),
        ("near_miss", closest),
        ("silent", _silent(silent, [*by_form, *closest], domains, pieces, rng)),
    ]
    return [
        Chosen(kind, _part(kind, rank), place) for kind, places in groups for rank, place in enumerate(places)
    ]  # fmt: skip


def _middle(free: Sequence[Place], sample: Sequence[Place], rng: np.random.Generator) -> list[Place]:
    """Of the sample, strongest first, those in the middle that are free."""
    low, high = (round((1 - q) * len(sample)) for q in _MIDDLE)
    inner = [place for place in sample[high:low] if place in free]
    return [inner[i] for i in sorted(rng.permutation(len(inner))[: WANTED["middle"]])]


def _by_form(
    forms: Sequence[str], silent: Bools, pieces: Pieces, words: TokenTexts, rng: np.random.Generator
) -> list[Place]:
    """Silent texts that hold one of these forms."""
    holding, first = pieces.holding(words.alike(forms))
    drawn = rng.permutation(np.flatnonzero(silent[holding]))[: WANTED["near_miss"] // 2]
    return [Place(int(holding[i]), int(first[i])) for i in drawn]


def _silent(
    silent: Bools, taken: Sequence[Place], domains: Sequence[str], pieces: Pieces, rng: np.random.Generator
) -> list[Place]:
    count = WANTED["silent"]
    free = silent.copy()
    free[[place.piece for place in taken]] = False
    drawn = rng.permutation(np.flatnonzero(free))
    columns = [DOMAINS.index(domain) for domain in domains if domain in DOMAINS]
    at_home = pieces.domains[drawn][:, columns].any(axis=1)
    first = np.concatenate([drawn[at_home][: count // 2], drawn[~at_home], drawn[at_home][count // 2 :]])[:count]
    return [Place(int(piece), int(rng.integers(len(pieces.tokens(piece))))) for piece in first]


def _without(places: Sequence[Place], others: Sequence[Place]) -> list[Place]:
    taken = {place.piece for place in others}
    return [place for place in places if place.piece not in taken]


def _part(kind: Kind, rank: int) -> Part:
    """Deals ranks out in proportion, so that neither part is the stronger one."""
    test, both = TEST[kind], WANTED[kind]
    return "test" if (rank + 1) * test // both > rank * test // both else "show"
