"""A pack's features as records, from its files alone: browsing them needs no model."""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from guard.errors import NotFound
from guard.pack.loader import Pack
from guard.pack.manifest import LatentLine
from guard.records import Feature, LatentId, TokenExample


def name(line: LatentLine) -> str:
    """What a latent is called: its explanation; where there is none yet, the tokens that it fires on."""
    return line.explanation or (f"fires on: {', '.join(line.top_tokens[:5])}" if line.top_tokens else "")


def features(pack: Pack, *, domain: str = "", subdomain: str = "", hook_point: str = "") -> list[Feature]:
    """In the order of the pack's rows. Raises NotFound for a filter that no latent of the pack could meet."""
    known = {
        "domain": {d for line in pack.latents for d in line.domains} | set(pack.domains),
        "subdomain": {d for line in pack.latents for d in line.subdomains},
        "hook point": {p.name for p in pack.hook_points},
    }
    for key, value in (("domain", domain), ("subdomain", subdomain), ("hook point", hook_point)):
        if value and value not in known[key]:
            raise NotFound(f"unknown {key} {value!r}, expected one of: {', '.join(sorted(known[key])) or '(none)'}")
    return [
        found
        for found in _all(pack).values()
        if (not domain or domain in found.domains)
        and (not subdomain or subdomain in found.subdomains)
        and (not hook_point or hook_point == found.latent.hook_point)
    ]


def feature(pack: Pack, latent: LatentId) -> Feature:
    """Raises NotFound for a latent that the pack does not hold."""
    if latent not in _all(pack):
        raise NotFound(f"unknown latent {latent}: pack {pack.manifest.id} holds no such row")
    return _all(pack)[latent]


def search(found: Iterable[Feature], words: str) -> list[Feature]:
    """Those whose name, explanation, domains, top tokens or id hold `words`, upper and lower case alike."""
    wanted = words.casefold()
    return [
        f
        for f in found
        if any(
            wanted in part.casefold()
            for part in (f.name, f.explanation, str(f.latent), *f.domains, *f.subdomains, *f.top_tokens)
        )
    ]


@lru_cache(maxsize=1)  # a process serves one pack, page by page
def _all(pack: Pack) -> dict[LatentId, Feature]:
    """In the order of the pack's rows."""
    return {found.latent: found for found in (_feature(pack, row) for row in range(len(pack.latents)))}


def _feature(pack: Pack, row: int) -> Feature:
    line = pack.latents[row]
    rows = next(p for p in pack.hook_points if p.name == line.hook_point)
    local = int(np.flatnonzero(rows.latents == line.latent)[0])
    return Feature(
        latent=LatentId(line.hook_point, line.latent),
        name=name(line),
        explanation=line.explanation,
        domains=line.domains,
        subdomains=line.subdomains,
        firing_rate=line.firing_rate,
        threshold=float(rows.threshold[local]),
        scale=float(rows.scale[local]),
        scores=dict(line.scores),
        top_tokens=line.top_tokens,
        examples=tuple(TokenExample(e.text, e.start, e.end, e.activation) for e in line.examples),
        head_weights={
            head.name: float(weight)
            for head, weight in zip(pack.manifest.heads, pack.head_weights[:, row], strict=True)
            if weight
        },
        surface_form=line.surface_form,
        explanation_score=line.explanation_score,
    )
