"""The pre-explanation metric of Safe-SAIL (arXiv 2509.18127): which latents tell a concept's presence from its absence.

The paper's exact formulas were not at hand; this is our reading. Over pairs of a text with a concept (q+) and the same
text without it (q-): `p_f` = share of pairs in which latent f fires on q+ and not on q-; `L_{0,t}` = number of latents
with `p_f > t`; `I_CDF` = mean of `p_f` over the latents.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from guard.lab.features import Floats
from guard.lab.labelled import Pair

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5)


class ConceptContrast(BaseModel):
    """One SAE against the pairs of one sub-domain, or of all (`*`)."""

    hook_point: str
    domain: str
    subdomain: str
    pairs: int
    i_cdf: float
    l0_at: dict[str, int]
    best_latents: list[int]
    best_p: list[float]


def firing_difference(fires_with: NDArray[np.bool_], fires_without: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """`p_f [K]` from `[pairs, K]`, and the same with the roles of q+ and q- exchanged."""
    forward = (fires_with & ~fires_without).mean(axis=0).astype(np.float32)
    backward = (fires_without & ~fires_with).mean(axis=0).astype(np.float32)
    return forward, backward


def concept_contrasts(
    pairs: Sequence[Pair], fires_with: NDArray[np.bool_], fires_without: NDArray[np.bool_], hook_point: str
) -> list[ConceptContrast]:
    """The metric for each sub-domain and over all pairs; arrays are `[pairs, d_sae]` of one SAE."""
    concepts = [("*", "*"), *dict.fromkeys((pair.domain, pair.subdomain) for pair in pairs)]
    result = []
    for domain, subdomain in concepts:
        chosen = np.array([domain == "*" or (p.domain, p.subdomain) == (domain, subdomain) for p in pairs])
        p, _ = firing_difference(fires_with[chosen], fires_without[chosen])
        best = np.argsort(-p)[:10]
        result.append(
            ConceptContrast(
                hook_point=hook_point,
                domain=domain,
                subdomain=subdomain,
                pairs=int(chosen.sum()),
                i_cdf=float(p.mean()),
                l0_at={str(t): int((p > t).sum()) for t in THRESHOLDS},
                best_latents=[int(i) for i in best],
                best_p=[round(float(v), 4) for v in p[best]],
            )
        )
    return result
