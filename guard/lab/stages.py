"""The lab's stages as commands run them: each reads and writes files, so that any can be rerun alone.

    harvest -> train -> contrast -> fit -> evaluate -> build

A texts folder holds `rows.jsonl` beside its shards; `fit` leaves `pooled.npz`, `heads.npz` and `fit.json`; `evaluate`
leaves `evaluation.json`; `build` writes the pack. `runs/` is not committed, the pack is.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from guard.errors import InvalidInput
from guard.lab import build as building
from guard.lab import harvest as harvesting
from guard.lab import labelled, shards
from guard.lab.contrast import ConceptContrast, concept_contrasts
from guard.lab.evaluate import Figure, OutOfFold, cross_fit, figures
from guard.lab.features import LatentStats, PooledTexts, latent_stats, pool
from guard.lab.fit import HEADS, Design, FitConfig
from guard.lab.sae import FullSae, load_suite

Progress = Callable[[int, int], None]
_ROWS = "rows.jsonl"


def harvest_labelled(
    *,
    model: str,
    folder: Path,
    hook_points: Sequence[str],
    out: Path,
    cap: int,
    seed: int,
    dtype: str = "auto",
    progress: Progress = lambda _done, _all: None,
) -> shards.ShardSet:
    """Harvests the labelled texts of `folder` and the project's own sentences; writes `out/rows.jsonl` with them."""
    rows = [
        *labelled.external_rows(folder, cap=cap, seed=seed),
        *labelled.own_rows(),
        *labelled.lookalike_rows(),
    ]
    made = harvesting.harvest_texts(
        model=model,
        texts=[row.text for row in rows],
        sources=(labelled.digest(rows),),
        hook_points=hook_points,
        out=out,
        dtype=dtype,
        progress=progress,
    )
    # Last, so that a harvest refused for another configuration leaves the rows that belong to the shards.
    (out / _ROWS).write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
    return made


def read_rows(texts: Path) -> list[labelled.Row]:
    """Raises InvalidInput where the rows are not those that the shards were made from."""
    file = texts / _ROWS
    if not file.exists():
        raise InvalidInput(f"{texts}: holds no {_ROWS}; make one with `guard lab harvest --labelled`")
    rows = [labelled.Row.model_validate_json(line) for line in file.open(encoding="utf-8")]
    if shards.described(texts).sources != (labelled.digest(rows),):
        raise InvalidInput(f"{file}: not the rows that the shards beside it were made from")
    return rows


def contrast(
    *,
    saes: Path,
    texts: Path,
    out: Path,
    activations: Path | None = None,
    progress: Progress = lambda _done, _all: None,
) -> list[ConceptContrast]:
    """The pre-explanation metric of every SAE over the project's contrast pairs; writes `out` (JSON).

    `activations`, a corpus's, is needed on the first run over these SAEs, for their scales.
    """
    suite, rows = load_suite(saes), read_rows(texts)
    pooled = pooled_texts(suite, saes, texts, activations, progress)
    place = {row.id: i for i, row in enumerate(rows) if row.source == "own_pairs"}
    pairs = labelled.pairs()
    result, column = [], 0
    for sae in suite:
        fires = pooled.fire[:, column : column + sae.width] > 0
        result += concept_contrasts(
            pairs,
            fires[[place[f"{p.id}/with"] for p in pairs]],
            fires[[place[f"{p.id}/without"] for p in pairs]],
            sae.hook_point,
        )
        column += sae.width
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([c.model_dump() for c in result], indent=1))
    return result


def statistics(suite: list[FullSae], saes: Path, activations: Path | None = None) -> LatentStats:
    """Firing rates and scales, computed once and kept beside the SAEs."""
    file = saes / "latent_stats.npz"
    if not file.exists():
        if activations is None:
            raise InvalidInput(f"{file}: absent; run `guard lab contrast` or `guard lab fit` with --activations first")
        stats = latent_stats(suite, activations)
        _save(file, {"firing_rate": stats.firing_rate, "scale": stats.scale, **stats.quantiles})
    found = np.load(file)
    quantiles = {name: found[name] for name in found.files if name not in ("firing_rate", "scale")}
    return LatentStats(found["firing_rate"], found["scale"], quantiles)


def pooled_texts(
    suite: list[FullSae],
    saes: Path,
    texts: Path,
    activations: Path | None = None,
    progress: Progress = lambda _done, _all: None,
) -> PooledTexts:
    """The texts as heads see them, computed once and kept beside the SAEs."""
    digest = shards.described(texts).sources[0][:12]
    file = saes / f"pooled-{digest}.npz"
    if not file.exists():
        stats = statistics(suite, saes, activations)
        pooled = pool(suite, texts, stats.scale, progress)
        _save(file, asdict(pooled))
    found = np.load(file)
    return PooledTexts(**{name: found[name] for name in found.files})


def fit(
    *,
    saes: Path,
    activations: Path,
    texts: Path,
    out: Path,
    config: FitConfig,
    progress: Progress = lambda _done, _all: None,
) -> None:
    """Fits probe, latents and combined heads without each group of sources in turn.

    Keeps the logits of what was left out: what evaluation judges and calibration uses.
    """
    suite, rows = load_suite(saes), read_rows(texts)
    design = Design(rows, pooled_texts(suite, saes, texts, activations), config)
    kept = cross_fit(design, ("probe", "latents"), progress)
    out.mkdir(parents=True, exist_ok=True)
    (out / "fit.json").write_text(json.dumps(asdict(config), indent=1))
    _save(out / "logits.npz", _flat(kept))


def evaluate(*, saes: Path, texts: Path, fitted: Path, progress: Progress = lambda _done, _all: None) -> list[Figure]:
    """Adds the TF-IDF column and writes `fitted/evaluation.json`."""
    design = _design(saes, texts, fitted)
    kept = _unflat(fitted / "logits.npz")
    words = cross_fit(design, ("tfidf",), progress)
    kept.logits.update(words.logits)
    result = figures(design, kept)
    (fitted / "evaluation.json").write_text(json.dumps([f.model_dump(mode="json") for f in result], indent=1))
    return result


def build(*, saes: Path, texts: Path, fitted: Path, manifests: Path | None, out: Path) -> str:
    """Fits the heads that ship on every source, and writes the pack. Returns its hash."""
    suite = load_suite(saes)
    design = _design(saes, texts, fitted)
    return building.build_pack(
        suite=suite,
        reports=json.loads((saes / "report.json").read_text()),
        training=json.loads((saes / "train.json").read_text()) if (saes / "train.json").exists() else {},
        stats=statistics(suite, saes),
        design=design,
        kept=_unflat(fitted / "logits.npz"),
        figures=json.loads((fitted / "evaluation.json").read_text()),
        texts=texts,
        licences=_licences(manifests),
        out=out,
    )


def _design(saes: Path, texts: Path, fitted: Path) -> Design:
    config = FitConfig(**json.loads((fitted / "fit.json").read_text()))
    return Design(read_rows(texts), pooled_texts(load_suite(saes), saes, texts), config)


def _licences(folder: Path | None) -> dict[str, str]:
    """Licence by source, from the `manifest_*.json` files of a data folder."""
    found: dict[str, str] = {}
    for file in sorted(folder.glob("manifest_*.json")) if folder else []:
        found |= {name: entry["license"] for name, entry in json.loads(file.read_text()).items()}
    return found


def _save(file: Path, arrays: dict[str, Any]) -> None:
    """Whole or not at all: a stage that was killed must not leave half a file for the next one to find."""
    scratch = file.with_name(f".{file.stem}.tmp.npz")
    np.savez(scratch, **arrays)
    scratch.replace(file)


def _flat(kept: OutOfFold) -> dict[str, np.ndarray]:
    return {f"{domain}.{kind.value}.{column}": x for ((domain, kind), column), x in kept.logits.items()}


def _unflat(file: Path) -> OutOfFold:
    found = np.load(file)
    kept = OutOfFold()
    for head in HEADS:
        for column in ("probe", "latents"):
            kept.logits[head, column] = found[f"{head[0]}.{head[1].value}.{column}"]
    return kept
