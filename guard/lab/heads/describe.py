"""What is known of each latent that a pack keeps: tags, rates, and examples from the project's own texts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from guard.lab.heads.calibrate import CalibratedHead, weight_matrices
from guard.lab.heads.explained import Explained
from guard.lab.heads.features import LatentStats
from guard.lab.heads.fit import Design, contrast_scores
from guard.lab.heads.shown import shown
from guard.lab.labelled import Pair
from guard.lab.search.contrast import firing_difference, pair_rows
from guard.lab.suite.sae import FullSae
from guard.pack.manifest import LatentLine
from guard.reader.tokens import TextTokenizer

# A latent is tagged where it fires on this share more of the texts with a concept than of those without.
DOMAIN_CONTRAST = 0.1
SUBDOMAIN_CONTRAST = 0.25


def latent_lines(
    suite: Sequence[FullSae],
    rows: NDArray[np.int64],
    stats: LatentStats,
    design: Design,
    heads: Sequence[CalibratedHead],
    pairs: Sequence[Pair],
    texts: Path,
    tokenizer: TextTokenizer,
    explained: Mapping[int, Explained],
) -> list[LatentLine]:
    """What is known of each kept latent: tags, rates, and examples from the project's own texts.

    An explanation (`explained`, by the latent's number through the suite) brings its own tags; a latent without one is
    tagged by its contrast.
    """
    by_domain = contrast_scores(design, design.usable)
    by_subdomain = _subdomain_scores(design, pairs)
    favoured = _favoured_domain(rows, heads)
    bare = [row for row in design.rows if not row.in_chat]
    top_tokens, examples = shown(suite, rows, stats.scale, bare, texts, tokenizer)
    owner = np.searchsorted(np.cumsum([0, *(sae.width for sae in suite)]), rows, side="right") - 1
    starts = np.cumsum([0, *(sae.width for sae in suite)])
    allowed = design.places(rows)
    lines = []
    for place, (row, number, at) in enumerate(zip(rows, owner, allowed, strict=True)):
        said = explained.get(int(row))
        lines.append(
            LatentLine(
                hook_point=suite[number].hook_point,
                latent=int(row - starts[number]),
                domains=said.domains if said else _domains(by_domain, int(at), favoured.get(int(row))),
                subdomains=said.subdomains
                if said
                else tuple(name for name, scores in by_subdomain.items() if scores[at] >= SUBDOMAIN_CONTRAST),
                explanation=said.explanation if said else "",
                surface_form=bool(said and said.surface_form),
                scores={f"contrast.{d}": round(float(scores[at]), 4) for d, scores in by_domain.items()}
                | (said.scores if said else {}),
                firing_rate=round(float(stats.firing_rate[row]), 6),
                quantiles={name: round(float(values[row]), 4) for name, values in stats.quantiles.items()},
                top_tokens=top_tokens[place],
                examples=examples[place],
            )
        )
    return lines


def _favoured_domain(rows: NDArray[np.int64], heads: Sequence[CalibratedHead]) -> dict[int, str]:
    """By latent, the domain whose head it speaks for most strongly; absent where it only speaks against."""
    head_weights, _ = weight_matrices(rows, heads, 1)
    best = head_weights.argmax(axis=0)
    return {
        int(row): heads[head].section.domain
        for row, head, column in zip(rows, best, head_weights.T, strict=True)
        if column[head] > 0
    }


def _domains(by_domain: dict[str, NDArray[np.float32]], at: int, favoured: str | None) -> tuple[str, ...]:
    """The domains whose concept it tells from its absence; where there is none, the one that its weight favours."""
    told = tuple(domain for domain, scores in by_domain.items() if scores[at] >= DOMAIN_CONTRAST)
    return told or ((favoured,) if favoured else ())


def _subdomain_scores(design: Design, pairs: Sequence[Pair]) -> dict[str, NDArray[np.float32]]:
    result = {}
    for name in dict.fromkeys(pair.subdomain for pair in pairs):
        with_, without = pair_rows(design.rows, [pair for pair in pairs if pair.subdomain == name])
        forward, backward = firing_difference(design.fires[with_], design.fires[without])
        result[name] = forward - backward
    return result
