"""The pre-explanation metric of Safe-SAIL (arXiv 2509.18127): which latents tell a concept's presence from its absence.

The paper's exact formulas were not at hand; this is our reading. Over pairs of a text with a concept (q+) and the same
text without it (q-): `p_f` = share of pairs in which latent f fires on q+ and not on q-; `L_{0,t}` = number of latents
with `p_f > t`; `I_CDF` = mean of `p_f` over the latents. Three controls stand beside it:

    reversed  q+ and q- exchanged: latents that tell a concept's absence, or fire by chance
    shuffled  q+ against the q- of another pair of the same sub-domain and language: any two texts differ in something
    excess    mean over latents of max(p_f - p_f reversed, 0). The more latents fire, the more of them part two texts by
              chance, and they do so in both directions alike: the difference takes that out. Below 0 a latent marks
              absence, which is no concept. Cutting there leaves a little noise above 0: `excess_null` is what remains
              when each pair's sides are exchanged at random.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from guard.errors import InvalidInput
from guard.lab.heads.features import Floats
from guard.lab.labelled import PAIRS, Pair, Row

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5)
ALL = "*"
_FLIPS = 16  # random exchanges of sides that `excess_null` is a mean over


class ConceptContrast(BaseModel):
    """One SAE against the pairs of one sub-domain, of a domain (sub-domain `*`), or of all (both `*`)."""

    sae: str = ""
    hook_point: str
    domain: str
    subdomain: str
    pairs: int
    i_cdf: float
    i_cdf_reversed: float = 0.0
    i_cdf_shuffled: float = 0.0
    i_cdf_excess: float = 0.0
    i_cdf_excess_null: float = 0.0
    l0_at: dict[str, int]
    l0_at_reversed: dict[str, int] = {}
    l0_at_shuffled: dict[str, int] = {}
    best_latents: list[int]
    best_p: list[float]


def pair_rows(rows: Sequence[Row], pairs: Sequence[Pair]) -> tuple[list[int], list[int]]:
    """Where the pairs' texts stand among the rows: with the concept, and without.

    Raises InvalidInput for a pair that the rows do not hold.
    """
    place = {row.id: i for i, row in enumerate(rows) if row.source == PAIRS}
    wanted = [[f"{pair.id}/{side}" for pair in pairs] for side in ("with", "without")]
    if missing := [name for side in wanted for name in side if name not in place]:
        raise InvalidInput(f"the texts lack {len(missing)} of the contrast pairs, such as {missing[0]}; harvest again")
    return [place[name] for name in wanted[0]], [place[name] for name in wanted[1]]


def firing_difference(fires_with: NDArray[np.bool_], fires_without: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """`p_f [K]` from `[pairs, K]`, and the same with the roles of q+ and q- exchanged."""
    forward = (fires_with & ~fires_without).mean(axis=0).astype(np.float32)
    backward = (fires_without & ~fires_with).mean(axis=0).astype(np.float32)
    return forward, backward


def concepts(pairs: Sequence[Pair]) -> dict[tuple[str, str], NDArray[np.bool_]]:
    """All pairs, every domain and every sub-domain, as (domain, sub-domain), with the pairs of each."""
    names = [(ALL, ALL)]
    for domain in dict.fromkeys(pair.domain for pair in pairs):
        names += [(domain, ALL), *dict.fromkeys((p.domain, p.subdomain) for p in pairs if p.domain == domain)]
    return {
        (domain, sub): np.array([domain in {ALL, p.domain} and sub in {ALL, p.subdomain} for p in pairs])
        for domain, sub in names
    }


def partners(pairs: Sequence[Pair], seed: int = 0) -> NDArray[np.int64]:
    """For each pair another one of its sub-domain and language, or itself where it is the only one."""
    rng = np.random.default_rng(seed)
    result = np.arange(len(pairs))
    kinds = [(p.domain, p.subdomain, p.lang) for p in pairs]
    for kind in dict.fromkeys(kinds):
        members = rng.permutation([i for i, k in enumerate(kinds) if k == kind])
        result[members] = np.roll(members, 1)
    return result


def concept_contrasts(
    pairs: Sequence[Pair],
    fires_with: NDArray[np.bool_],
    fires_without: NDArray[np.bool_],
    hook_point: str,
    sae: str = "",
) -> list[ConceptContrast]:
    """The metric over all pairs, by domain and by sub-domain; arrays are `[pairs, d_sae]` of one SAE."""
    flips = np.random.default_rng(0).choice(np.array([-1.0, 1.0], dtype=np.float32), size=(_FLIPS, len(pairs)))
    net = fires_with.astype(np.float32) - fires_without
    shuffled = fires_without[partners(pairs)]
    result = []
    for (domain, subdomain), chosen in concepts(pairs).items():
        forward, backward = firing_difference(fires_with[chosen], fires_without[chosen])
        other, _ = firing_difference(fires_with[chosen], shuffled[chosen])
        null = flips[:, chosen] @ net[chosen] / chosen.sum()  # [flips, K]
        best = np.argsort(-forward, kind="stable")[:10]
        result.append(
            ConceptContrast(
                sae=sae,
                hook_point=hook_point,
                domain=domain,
                subdomain=subdomain,
                pairs=int(chosen.sum()),
                i_cdf=float(forward.mean()),
                i_cdf_reversed=float(backward.mean()),
                i_cdf_shuffled=float(other.mean()),
                i_cdf_excess=float(np.maximum(forward - backward, 0).mean()),
                i_cdf_excess_null=float(np.maximum(null, 0).mean()),
                l0_at=_above(forward),
                l0_at_reversed=_above(backward),
                l0_at_shuffled=_above(other),
                best_latents=[int(i) for i in best],
                best_p=[round(float(v), 4) for v in forward[best]],
            )
        )
    return result


def _above(p: Floats) -> dict[str, int]:
    return {str(t): int((p > t).sum()) for t in THRESHOLDS}
