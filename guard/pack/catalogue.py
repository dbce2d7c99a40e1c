"""A pack's features as records, from its files alone: browsing them needs no model."""

from collections.abc import Iterable

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
        _feature(pack, row)
        for row, line in enumerate(pack.latents)
        if (not domain or domain in line.domains)
        and (not subdomain or subdomain in line.subdomains)
        and (not hook_point or hook_point == line.hook_point)
    ]


def feature(pack: Pack, latent: LatentId) -> Feature:
    """Raises NotFound for a latent that the pack does not hold."""
    for row, line in enumerate(pack.latents):
        if (line.hook_point, line.latent) == (latent.hook_point, latent.index):
            return _feature(pack, row)
    raise NotFound(f"unknown latent {latent}: pack {pack.manifest.id} holds no such row")


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
    )
