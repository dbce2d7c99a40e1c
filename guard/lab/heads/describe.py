"""What is known of each latent that a pack keeps: tags, rates, and examples from the project's own texts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from guard.lab import shards
from guard.lab.heads.calibrate import CalibratedHead, weight_matrices
from guard.lab.heads.explained import Explained
from guard.lab.heads.features import LatentStats
from guard.lab.heads.fit import Design, contrast_scores
from guard.lab.labelled import Pair, Row
from guard.lab.suite.sae import FullSae
from guard.pack.manifest import ExampleLine, LatentLine
from guard.reader.tokens import TextTokenizer

_EXAMPLES = 6
_TOP_TOKENS = 8

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
    examples = _examples(suite, rows, stats, design.rows, texts, tokenizer)
    frequency = Counter(
        _plain(row.text[start:end]) for row in design.rows if row.own for start, end in tokenizer.text(row.text).spans
    )
    owner = np.searchsorted(np.cumsum([0, *(sae.width for sae in suite)]), rows, side="right") - 1
    starts = np.cumsum([0, *(sae.width for sae in suite)])
    lines = []
    for row, number in zip(rows, owner, strict=True):
        found = sorted(examples.get(int(row), []), key=lambda e: -e[1].activation)
        said = explained.get(int(row))
        lines.append(
            LatentLine(
                hook_point=suite[number].hook_point,
                latent=int(row - starts[number]),
                domains=said.domains if said else _domains(int(row), by_domain, favoured),
                subdomains=said.subdomains
                if said
                else tuple(name for name, scores in by_subdomain.items() if scores[row] >= SUBDOMAIN_CONTRAST),
                explanation=said.explanation if said else "",
                surface_form=bool(said and said.surface_form),
                scores={f"contrast.{d}": round(float(scores[row]), 4) for d, scores in by_domain.items()}
                | (said.scores if said else {}),
                firing_rate=round(float(stats.firing_rate[row]), 6),
                quantiles={name: round(float(values[row]), 4) for name, values in stats.quantiles.items()},
                top_tokens=_top_tokens(found, frequency),
                examples=tuple(e for _, e in _spread(found)),
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


def _domains(row: int, by_domain: dict[str, NDArray[np.float32]], favoured: dict[int, str]) -> tuple[str, ...]:
    """The domains whose concept it tells from its absence; where there is none, the one that its weight favours."""
    told = tuple(domain for domain, scores in by_domain.items() if scores[row] >= DOMAIN_CONTRAST)
    return told or ((favoured[row],) if row in favoured else ())


def _subdomain_scores(design: Design, pairs: Sequence[Pair]) -> dict[str, NDArray[np.float32]]:
    place = {row.id: i for i, row in enumerate(design.rows) if row.source == "own_pairs"}
    result = {}
    for name in dict.fromkeys(pair.subdomain for pair in pairs):
        ids = [pair.id for pair in pairs if pair.subdomain == name]
        with_ = design.fires[[place[f"{i}/with"] for i in ids]]
        without = design.fires[[place[f"{i}/without"] for i in ids]]
        result[name] = ((with_ & ~without).mean(axis=0) - (without & ~with_).mean(axis=0)).astype(np.float32)
    return result


def _examples(
    suite: Sequence[FullSae],
    rows: NDArray[np.int64],
    stats: LatentStats,
    texts: Sequence[Row],
    folder: Path,
    tokenizer: TextTokenizer,
) -> dict[int, list[tuple[str, ExampleLine]]]:
    """Tokens of the project's own texts on which each kept latent fires, `(token, example)`."""
    own = {i for i, row in enumerate(texts) if row.own}
    spans = {i: tokenizer.text(texts[i].text).spans for i in own}
    result: dict[int, list[tuple[str, ExampleLine]]] = {}
    for index in range(shards.described(folder).shard_count):
        shard = shards.load(folder, index)
        piece = shard["piece"].numpy()
        ours = np.flatnonzero(np.isin(piece, list(own)))
        if not len(ours):
            continue
        position = ours - np.searchsorted(piece, piece[ours])  # token number within its text; pieces are sorted
        offset = 0
        for sae in suite:
            local = rows[(rows >= offset) & (rows < offset + sae.width)]
            acts = sae.encode(shard[sae.hook_point][torch.from_numpy(ours)])[:, torch.from_numpy(local - offset)]
            for token, column in acts.nonzero().tolist():
                row, number = int(local[column]), int(piece[ours[token]])
                text = texts[number].text
                start, end = spans[number][int(position[token])]
                strength = round(float(acts[token, column]) / float(stats.scale[row]), 3)
                result.setdefault(row, []).append(
                    (text[start:end], ExampleLine(text=text, start=start, end=end, activation=strength))
                )
            offset += sae.width
    return result


def _top_tokens(found: Sequence[tuple[str, ExampleLine]], frequency: Counter[str]) -> tuple[str, ...]:
    """The tokens that hold most of the activation for how often they occur at all."""
    mass: dict[str, float] = {}
    for token, example in found:
        if token.strip():
            mass[_plain(token)] = mass.get(_plain(token), 0.0) + example.activation
    ranked = sorted(mass, key=lambda token: (-mass[token] / np.sqrt(frequency[token] + 1.0), token))
    return tuple(ranked[:_TOP_TOKENS])


def _plain(token: str) -> str:
    return token.strip().lower()


def _spread(found: Sequence[tuple[str, ExampleLine]]) -> list[tuple[str, ExampleLine]]:
    """The strongest examples, one of each text."""
    kept: dict[str, tuple[str, ExampleLine]] = {}
    for token, example in found:
        kept.setdefault(example.text, (token, example))
    return list(kept.values())[:_EXAMPLES]
