"""Poolings compared: `python -m benchmarks.poolings SAES TEXTS FITTED [--folds N]`.

SAES, TEXTS and FITTED are what `guard lab train`, `harvest --labelled` and `fit` wrote. Every pooling sees the same
latents (those that FITTED names), and heads over them are fitted alike, without each of N groups of sources in turn.

    whole     AUROC on sources that the fit had not seen, mean over sources
    diluted   the same, each text behind a harmless one of another source: hits add up, whatever the order
    caught    positives over the score that 2% of negatives exceed, whole texts; and at the same score once diluted

Writes benchmarks/results/poolings.json.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from benchmarks.machine import describe
from guard.lab import shards, stages
from guard.lab.heads.evaluate import judging_sources
from guard.lab.heads.features import PooledTexts
from guard.lab.heads.fit import HEADS, Design, FitConfig, fit_head
from guard.lab.suite.sae import FullSae, load_suite

Floats = NDArray[np.float32]

KEPT = 8  # strongest hits of a latent in a text
RESULT = Path(__file__).parent / "results" / "poolings.json"


@dataclass(frozen=True)
class Texts:
    """What the latents do in each text, or in two texts one behind the other."""

    tokens: Floats  # [N]
    sums: Floats  # [N, K] of strengths
    counts: Floats  # [N, K] tokens on which a latent fires
    top: NDArray[np.float16]  # [N, K, KEPT] strongest hits, falling

    def behind(self, before: NDArray[np.int64]) -> "Texts":
        """Each text with the text `before[i]` in front of it."""
        both = np.concatenate([self.top, self.top[before]], axis=2)
        both.sort(axis=2)
        return Texts(
            self.tokens + self.tokens[before],
            self.sums + self.sums[before],
            self.counts + self.counts[before],
            both[:, :, : -KEPT - 1 : -1],
        )


def rooted(exponent: float, power: float) -> Callable[[Texts], Floats]:
    def pooled(t: Texts) -> Floats:
        return np.asarray((t.sums / t.tokens[:, None] ** exponent) ** power, dtype=np.float32)

    return pooled


POOLINGS: dict[str, Callable[[Texts], Floats]] = {
    "root of the mean": rooted(1.0, 0.5),
    "mean": rooted(1.0, 1.0),
    "fourth root of the mean": rooted(1.0, 0.25),
    "root of sum / tokens^0.75": rooted(0.75, 0.5),
    "root of sum / tokens^0.5": rooted(0.5, 0.5),
    "root of the sum": rooted(0.0, 0.5),
    "saturated sum": lambda t: t.sums / (t.sums + 1.0),
    "share of tokens": lambda t: np.asarray(t.counts / t.tokens[:, None], dtype=np.float32),
    "root of the share": lambda t: np.asarray(np.sqrt(t.counts / t.tokens[:, None]), dtype=np.float32),
    "maximum": lambda t: t.top[:, :, 0].astype(np.float32),
    "mean of the 4 strongest": lambda t: t.top[:, :, :4].astype(np.float32).mean(axis=2),
    "mean of the 8 strongest": lambda t: t.top.astype(np.float32).mean(axis=2),
}


@torch.no_grad()
def read_texts(suite: list[FullSae], saes: Path, texts: Path, latents: list[dict[str, object]], count: int) -> Texts:
    """Hits of the chosen latents, token by token, from harvested activations."""
    chosen = [(s, torch.tensor([int(str(x["latent"])) for x in latents if x["sae"] == s.name])) for s in suite]
    size = sum(len(rows) for _, rows in chosen)
    tokens, sums = np.zeros(count, np.float32), np.zeros((count, size), np.float32)
    counts, top = np.zeros((count, size), np.float32), np.zeros((count, size, KEPT), np.float16)
    scales = {s.name: torch.from_numpy(stages.statistics(s, saes).scale) for s, _ in chosen}
    for index in range(shards.described(texts).shard_count):
        shard = shards.load(texts, index)
        piece = shard["piece"].numpy()
        first = np.flatnonzero(np.r_[True, piece[1:] != piece[:-1]])
        for begin, end in zip(first, np.r_[first[1:], len(piece)], strict=True):
            tokens[piece[begin]] = end - begin
        at = 0
        for sae, rows in chosen:
            pre = shard[sae.hook_point].float() @ sae.enc_rows[rows].T + sae.bias[rows]
            threshold = sae.threshold[rows]
            strength = ((pre - threshold) / (scales[sae.name][rows] - threshold)).clamp(0.0, 1.0).numpy()  # [T, k]
            fires = (pre > threshold).numpy()
            place = slice(at, at + len(rows))
            for begin, end in zip(first, np.r_[first[1:], len(piece)], strict=True):
                here, text = strength[begin:end], piece[begin]
                sums[text, place] = here.sum(axis=0)
                counts[text, place] = fires[begin:end].sum(axis=0)
                strongest = -np.sort(-here, axis=0)[:KEPT]
                top[text, place, : len(strongest)] = strongest.T
            at += len(rows)
    return Texts(np.maximum(tokens, 1.0), sums, counts, top)


def judge(design: Design, whole: Floats, diluted: Floats, folds: NDArray[np.int64]) -> Iterator[dict[str, object]]:
    """A line for each head."""
    every = np.arange(whole.shape[1])
    for head in HEADS:
        y = design.targets[head]
        logits = {name: np.full(len(y), np.nan) for name in ("whole", "diluted")}
        for fold in np.unique(folds):
            design.latents = whole
            model = fit_head(design, head, design.fitted_on & (folds != fold), every, "latents")
            test = np.flatnonzero((folds == fold) & (y >= 0))
            logits["whole"][test] = model.logits(design, test)
            design.latents = diluted
            logits["diluted"][test] = model.logits(design, test)
        design.latents = whole
        found: dict[str, list[float]] = {"whole": [], "diluted": [], "caught": [], "caught_diluted": []}
        for _, rows, _ in judging_sources(design, head):
            positive, negative = rows & (y == 1), rows & (y == 0)
            cut = np.quantile(logits["whole"][negative], 0.98)
            for name in ("whole", "diluted"):
                found[name].append(float(roc_auc_score(y[rows], logits[name][rows])))
            found["caught"].append(float((logits["whole"][positive] > cut).mean()))
            found["caught_diluted"].append(float((logits["diluted"][positive] > cut).mean()))
        yield {"head": f"{head[0]}.{head[1].value}"} | {k: round(float(np.mean(v)), 4) for k, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("saes", "texts", "fitted"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--c", type=float, default=1e-3, help="of the fit")
    given = parser.parse_args()
    suite, rows = load_suite(given.saes), stages.read_rows(given.texts)
    latents = [json.loads(line) for line in (given.fitted / "latents.jsonl").open(encoding="utf-8")]
    seen = read_texts(suite, given.saes, given.texts, latents, len(rows))
    config = FitConfig(latent_c=given.c, per_domain=())
    nothing = np.zeros((len(rows), 0), np.float32)
    design = Design(rows, PooledTexts(seen.tokens.astype(np.int64), nothing, seen.sums.astype(np.float16)), config)
    groups = {group: place for place, group in enumerate(sorted(set(design.group)))}
    folds = np.array([groups[group] % given.folds for group in design.group])
    rng = np.random.default_rng(0)
    harmless = np.flatnonzero([row.kind == "benign" and not row.own and not row.weak for row in rows])
    diluted = seen.behind(rng.choice(harmless, len(rows)))
    console, result = Console(width=140), {}
    for name, pool in POOLINGS.items():
        result[name] = list(judge(design, pool(seen), pool(diluted), folds))
        figures = [key for key in result[name][0] if key != "head"]
        means = (f"{key} {np.mean([line[key] for line in result[name]]):.3f}" for key in figures)
        console.print(f"{name}: {', '.join(means)}")
    console.print(_table(result))
    told = {"machine": describe(), "latents": len(latents), "folds": given.folds, "c": given.c, "poolings": result}
    RESULT.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _table(result: dict[str, list[dict[str, object]]]) -> Table:
    shown = Table(title="AUROC on unseen sources, whole / diluted", title_justify="left", title_style="bold")
    shown.add_column("pooling")
    for line in next(iter(result.values())):
        shown.add_column(str(line["head"]), justify="right")
    for name, lines in result.items():
        shown.add_row(name, *(f"{line['whole']:.3f} / {line['diluted']:.3f}" for line in lines))
    return shown


if __name__ == "__main__":
    main()
