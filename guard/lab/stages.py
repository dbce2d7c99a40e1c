"""The lab's stages as commands run them: each reads and writes files, so that any can be rerun alone.

    harvest -> train -> contrast -> fit -> evaluate -> build

A texts folder holds `rows.jsonl` beside its shards; `fit` leaves `logits.npz` and `fit.json`; `evaluate`
leaves `evaluation.json`; `build` writes the pack. `runs/` is not committed, the pack is. What searches the
suite, contrast among it, is in guard.lab.search.stages.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from guard.errors import InvalidInput
from guard.lab import annotated, labelled, shards
from guard.lab import harvest as harvesting
from guard.lab.heads import build as building
from guard.lab.heads.evaluate import Figure, OutOfFold, cross_fit, figures
from guard.lab.heads.explained import Explained, keep, kept, mask
from guard.lab.heads.features import (
    STATISTICS_SHARDS,
    Floats,
    Ints,
    LatentStats,
    PooledTexts,
    latent_stats,
    means,
    pool,
    text_count,
)
from guard.lab.heads.fit import HEADS, Design, FitConfig, choose_latents
from guard.lab.heads.passages import Passages, pool_passages
from guard.lab.suite.config import ACTIVATIONS, read_config
from guard.lab.suite.measure import read_reports
from guard.lab.suite.sae import FullSae, load_suite

Progress = Callable[[int, int], None]
_ROWS = "rows.jsonl"
_EXPLAINED, _LATENTS = "explained.jsonl", "latents.jsonl"
_TEXTS = "texts.json"  # digests of what heads were fitted to, folder by folder


def harvest_labelled(
    *,
    model: str,
    rows: Sequence[labelled.Row],
    hook_points: Sequence[str],
    out: Path,
    seed: int,
    in_chats: bool = False,
    context: int = 256,
    dtype: str = "auto",
    progress: Progress = lambda _done, _all: None,
) -> shards.ShardSet:
    """Harvests labelled texts, cut at `context` tokens, and writes `out/rows.jsonl` with them.

    Bare ones, or, `in_chats`, as messages and answers in the model's chat template (`labelled.in_chats`).
    """
    if in_chats:
        rows = labelled.in_chats(rows, seed)
    made = harvesting.harvest_texts(
        model=model,
        texts=[row.text for row in rows],
        before=[labelled.said_before(row) for row in rows] if in_chats else (),
        sources=(labelled.digest(rows),),
        hook_points=hook_points,
        out=out,
        context=context,
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


def read_all_rows(texts: Sequence[Path]) -> list[labelled.Row]:
    """The rows of several harvests of one model, the first of bare texts. Raises InvalidInput where they are not."""
    first = shards.described(texts[0])
    for folder in texts[1:]:
        other = shards.described(folder)
        if (other.fingerprint, other.hook_points) != (first.fingerprint, first.hook_points):
            raise InvalidInput(
                f"{folder}: found a harvest of {other.model} at {', '.join(other.hook_points)}, expected the same "
                f"weights and hook points as {texts[0]} ({first.model} at {', '.join(first.hook_points)})"
            )
    rows = [row for folder in texts for row in read_rows(folder)]
    if rows[0].in_chat:
        raise InvalidInput(f"{texts[0]}: found texts in chats, expected bare ones first (harvested without --in-chats)")
    return rows


def statistics(sae: FullSae, saes: Path, activations: Path | None = None) -> LatentStats:
    """Firing rates and scales of one SAE, computed once and kept with it."""
    file = _statistics_file(sae, saes)
    if not file.exists():
        if activations is None:
            raise InvalidInput(f"{file}: absent; run `guard lab contrast` or `guard lab fit` with --activations first")
        stats = latent_stats(sae, activations)
        _save(file, {"firing_rate": stats.firing_rate, "scale": stats.scale, **stats.quantiles})
    found = np.load(file)
    quantiles = {name: found[name] for name in found.files if name not in ("firing_rate", "scale")}
    return LatentStats(found["firing_rate"], found["scale"], quantiles)


def _statistics_file(sae: FullSae, saes: Path) -> Path:
    return saes / sae.name / "stats.npz"


def strengths(
    suite: Sequence[FullSae],
    saes: Path,
    texts: Path,
    activations: Path | None = None,
    progress: Progress = lambda _done, _all: None,
    only: NDArray[np.bool_] | None = None,
) -> list[NDArray[np.float16]]:
    """Mean strengths `[N, d_sae]` of every SAE over the texts: computed once, kept with the SAE, mapped, not loaded.

    Where there is a mask `only [K]` over the suite, of its latents alone.
    The SAEs of a hook point are pooled together, and kept before those of the next: a killed run loses one hook point.
    Progress counts the shards that an SAE has encoded.
    """
    harvest = shards.described(texts).model_dump_json()  # its dtype and context too, beside the texts' digest
    key = hashlib.sha256(harvest.encode() + (b"" if only is None else only.tobytes()))
    everything = np.ones(sum(sae.width for sae in suite), dtype=bool)
    wanted = _by_sae(suite, everything if only is None else only)
    rows = {sae.name: np.flatnonzero(mine) for sae, mine in zip(suite, wanted, strict=True)}
    files = {
        sae.name: saes / sae.name / f"strength-{_keyed(key, sae, rows[sae.name]).hexdigest()[:12]}.npy" for sae in suite
    }
    absent: dict[str, list[FullSae]] = {}
    for sae in suite:
        if not files[sae.name].exists():
            absent.setdefault(sae.hook_point, []).append(sae)
    unknown = [sae.name for there in absent.values() for sae in there if not _statistics_file(sae, saes).exists()]
    total = len(unknown) * STATISTICS_SHARDS + sum(map(len, absent.values())) * shards.described(texts).shard_count
    done = 0

    def encoded(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    for there in absent.values():
        scales = []
        for sae in there:
            scales.append(statistics(sae, saes, activations).scale[rows[sae.name]])
            encoded(STATISTICS_SHARDS if sae.name in unknown else 0)
        scratch = [files[sae.name].with_suffix(".tmp") for sae in there]
        arrays = [
            np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=(text_count(texts), len(rows[sae.name])))
            for file, sae in zip(scratch, there, strict=True)
        ]
        pool(
            [sae.rows(torch.from_numpy(rows[sae.name])) for sae in there],
            scales,
            texts,
            arrays,
            partial(encoded, len(there)),
        )
        for sae, file, array in zip(there, scratch, arrays, strict=True):
            array.flush()
            file.replace(files[sae.name])
    return [np.load(files[sae.name], mmap_mode="r") for sae in suite]


def _keyed(key: "hashlib._Hash", sae: FullSae, rows: NDArray[np.int64]) -> "hashlib._Hash":
    """What these rows say, added to a copy of `key`: a folder may come to hold other SAEs of the same names."""
    found = key.copy()
    found.update(f"{sae.name} {sae.hook_point}".encode())
    for part in (sae.enc_rows, sae.bias, sae.threshold):
        found.update(np.ascontiguousarray(part.numpy()[rows]).tobytes())
    return found


def pooled_texts(
    suite: Sequence[FullSae],
    saes: Path,
    texts: Path,
    activations: Path | None = None,
    progress: Progress = lambda _done, _all: None,
    only: NDArray[np.bool_] | None = None,
) -> PooledTexts:
    """The texts as heads over these SAEs see them; of the latents `only`, where a mask `[K]` names them, no others."""
    tokens, mean = text_means(texts, list(dict.fromkeys(sae.hook_point for sae in suite)))
    strength = strengths(suite, saes, texts, activations, progress, only)
    return PooledTexts(tokens, np.concatenate(list(mean.values()), axis=1), np.concatenate(strength, axis=1))


def text_means(texts: Path, hook_points: Sequence[str]) -> tuple[Ints, dict[str, Floats]]:
    """Tokens `[N]` and mean activations `[N, d_model]` of the texts, computed once and kept beside them."""
    file = texts / "means.npz"
    if not file.exists():
        tokens, mean = means(texts, shards.described(texts).hook_points)
        _save(file, {"tokens": tokens, **mean})
    found = np.load(file)
    return found["tokens"], {point: found[point] for point in hook_points}


def fit(
    *,
    saes: Path,
    activations: Path | None = None,
    texts: Sequence[Path],
    out: Path,
    config: FitConfig,
    explained: Sequence[Explained] = (),
    only_choose: bool = False,
    progress: Progress = lambda _done, _all: None,
) -> int:
    """Fits probe, latents and combined heads without each group of sources in turn; over `explained` latents alone.

    Keeps the logits of what was left out: what evaluation judges and calibration uses. `out/latents.jsonl` names the
    latents that the heads keep, a line each: what `guard lab explain` may be given; with `only_choose`, nothing else is
    done. Returns how many there are.
    """
    suite, rows = load_suite(saes), read_all_rows(texts)
    if config.passage_tokens and (inexact := [sae.name for sae in suite if not sae.subset_exact]):
        raise InvalidInput(f"{inexact[0]}: found topk, expected batch_topk or jumprelu where texts have passages")
    if strangers := set(config.sources) - {row.source for row in rows}:
        raise InvalidInput(
            f"{', '.join(map(str, texts))}: found no texts of {', '.join(sorted(strangers))}, which heads shall be "
            f"fitted on"
        )
    read = replace(config, passage_tokens=0) if only_choose else config
    design = _designed(suite, rows, saes, texts, read, explained, activations)
    out.mkdir(parents=True, exist_ok=True)
    chosen = _chosen(suite, design)
    (out / _LATENTS).write_text("".join(json.dumps(line) + "\n" for line in chosen))
    if only_choose:
        return len(chosen)
    (out / "evaluation.json").unlink(missing_ok=True)  # of an earlier fit
    logits = _columns(design, ("probe", "latents"), texts, progress)
    (out / "fit.json").write_text(json.dumps(asdict(config), indent=1))
    (out / _TEXTS).write_text(json.dumps(_sources(texts)))
    keep(out / _EXPLAINED, explained)
    _save(out / "logits.npz", _flat(logits))
    return len(chosen)


def _columns(design: Design, columns: Sequence[str], texts: Sequence[Path], progress: Progress) -> OutOfFold:
    """Cross-fitted columns; the baselines do not change with the latents, so they are kept beside the first texts."""
    config, dense = design.config, design.dense
    probe = (config.sources, config.dense_c, config.iterations, config.passage_tokens, dense.shape, dense[:1].tobytes())
    says = {"tfidf": (config.sources,), "probe": probe}
    fitted = [design.taught_by(head, design.fitted_on) for head in HEADS]
    told = hashlib.sha256(b"".join(x.tobytes() for x in (*design.targets.values(), *fitted, design.weak))).hexdigest()
    read = [tuple(sources) for sources in _sources(texts)]
    groups = np.unique(design.group).tolist()
    result = OutOfFold()
    for column in columns:
        key = hashlib.sha256(repr((column, says.get(column), groups, read, told)).encode()).hexdigest()[:12]
        file = texts[0] / f"{column}-{key}.npz"
        if column in says and file.exists():
            result.update(_unflat(file, (column,)))
            continue
        found = cross_fit(design, (column,), progress)
        result.update(found)
        if column in says:
            _save(file, _flat(found))
    return result


def _chosen(suite: Sequence[FullSae], design: Design) -> list[dict[str, Any]]:
    """The latents that the heads keep which see every row that may be fitted on, and for which domains."""
    domains: dict[int, list[str]] = {}
    for domain, latents in choose_latents(design, design.fitted_on).items():
        for latent in latents.tolist():
            domains.setdefault(latent, []).append(domain)
    result, offset = [], 0
    for sae in suite:
        mine = sorted(latent for latent in domains if offset <= latent < offset + sae.width)
        result += [
            {"hook_point": sae.hook_point, "latent": n - offset, "sae": sae.name, "domains": domains[n]} for n in mine
        ]
        offset += sae.width
    return result


def evaluate(
    *, saes: Path, texts: Sequence[Path], fitted: Path, progress: Progress = lambda _done, _all: None
) -> list[Figure]:
    """Adds the TF-IDF column and writes `fitted/evaluation.json`."""
    design = _design(saes, texts, fitted)
    logits = _unflat(fitted / "logits.npz")
    logits.update(_columns(design, ("tfidf",), texts, progress))
    result = figures(design, logits)
    (fitted / "evaluation.json").write_text(json.dumps([f.model_dump(mode="json") for f in result], indent=1))
    return result


def build(
    *,
    saes: Path,
    texts: Sequence[Path],
    fitted: Path,
    manifests: Path | None,
    version: str,
    out: Path,
    progress: Progress = lambda _done, _all: None,
) -> str:
    """Fits the heads that ship on every source that they may be fitted on, and writes the pack. Returns its hash."""
    suite = load_suite(saes)
    figures = fitted / "evaluation.json"
    if not figures.exists():
        raise InvalidInput(f"{figures}: absent; run `guard lab evaluate` first")
    design = _design(saes, texts, fitted)
    return building.build_pack(
        suite=suite,
        reports=read_reports(saes) or [],
        training=read_config(str(saes / "suite.toml")),
        stats=LatentStats.joined([statistics(sae, saes) for sae in suite]),
        design=design,
        kept=_unflat(fitted / "logits.npz"),
        figures=json.loads(figures.read_text()),
        texts=texts[0],
        licences=licences(manifests),
        explained=kept(fitted / _EXPLAINED),
        version=version,
        out=out,
        progress=progress,
    )


def _sources(texts: Sequence[Path]) -> list[list[str]]:
    return [list(shards.described(folder).sources) for folder in texts]


def _design(saes: Path, texts: Sequence[Path], fitted: Path) -> Design:
    """Raises InvalidInput for other texts than the heads were fitted to, or in another order."""
    file = fitted / _TEXTS
    if file.exists() and json.loads(file.read_text()) != _sources(texts):
        raise InvalidInput(f"{', '.join(map(str, texts))}: not the texts of the fit {fitted}, or in another order")
    config = TypeAdapter(FitConfig).validate_json((fitted / "fit.json").read_text())
    return _designed(load_suite(saes), read_all_rows(texts), saes, texts, config, kept(fitted / _EXPLAINED))


def _check_model(saes: Path, texts: Path) -> None:
    """Raises InvalidInput for SAEs that were trained on another model's activations, where that is known of them."""
    file, harvested = saes / ACTIVATIONS, shards.described(texts)
    if file.exists():
        trained = shards.ShardSet.model_validate_json(file.read_text())
        if trained.fingerprint != harvested.fingerprint:
            raise InvalidInput(
                f"{texts}: found a harvest of {harvested.model}, expected one of {trained.model}, with the weights "
                f"that the SAEs of {saes} were trained on"
            )


def _designed(
    suite: Sequence[FullSae],
    rows: Sequence[labelled.Row],
    saes: Path,
    texts: Sequence[Path],
    config: FitConfig,
    explained: Sequence[Explained],
    activations: Path | None = None,
) -> Design:
    _check_model(saes, texts[0])
    allowed = mask(suite, explained) if explained else None
    pooled = PooledTexts.joined([pooled_texts(suite, saes, folder, activations, only=allowed) for folder in texts])
    return Design(rows, pooled, config, allowed, _passages(suite, saes, texts, allowed, config.passage_tokens))


def _passages(
    suite: Sequence[FullSae], saes: Path, texts: Sequence[Path], allowed: NDArray[np.bool_] | None, size: int
) -> Passages | None:
    """Of the texts of all folders, in their order; None for `size` 0. Computed once and kept beside the texts."""
    if not size:
        return None
    mine = _by_sae(suite, np.ones(sum(sae.width for sae in suite), dtype=bool) if allowed is None else allowed)
    rows = [np.flatnonzero(part) for part in mine]
    scales = [statistics(sae, saes).scale for sae in suite]
    key = hashlib.sha256()
    for sae, some, scale in zip(suite, rows, scales, strict=True):
        key = _keyed(key, sae, some)
        key.update(np.ascontiguousarray(scale[some]).tobytes())
    parts, before = [], 0
    for folder in texts:
        file = folder / f"passages-{size}-{key.hexdigest()[:12]}.npz"
        if not file.exists():
            _save(file, vars(pool_passages(suite, scales, rows, folder, size)))
        found = Passages(**np.load(file))
        parts.append(replace(found, text=found.text + before))
        before += text_count(folder)
    return Passages.joined(parts)


def _by_sae(suite: Sequence[FullSae], mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """`[K]` over the suite -> `[d_sae]` of each SAE."""
    return np.split(mask, np.cumsum([sae.width for sae in suite])[:-1])


def licences(folder: Path | None) -> dict[str, str]:
    """Licence by source, from the `manifest_*.json` files of a data folder."""
    found: dict[str, str] = {}
    for file in sorted(folder.glob("manifest_*.json")) if folder else []:
        found |= {name: entry["license"] for name, entry in json.loads(file.read_text()).items()}
    return found | annotated.licences(found)


def _save(file: Path, arrays: dict[str, Any]) -> None:
    """Whole or not at all: a stage that was killed must not leave half a file for the next one to find."""
    scratch = file.with_name(f".{file.stem}.tmp.npz")
    np.savez(scratch, **arrays)
    scratch.replace(file)


def _flat(kept: OutOfFold) -> dict[str, np.ndarray]:
    result = {f"{domain}.{kind.value}.{column}": x for ((domain, kind), column), x in kept.logits.items()}
    return result | {
        f"{domain}.{kind.value}.{column}.passages": x for ((domain, kind), column), x in kept.passages.items()
    }


def _unflat(file: Path, columns: Sequence[str] = ("probe", "latents")) -> OutOfFold:
    found = np.load(file)
    kept = OutOfFold()
    for head in HEADS:
        for column in columns:
            name = f"{head[0]}.{head[1].value}.{column}"
            kept.logits[head, column] = found[name]
            kept.passages[head, column] = found.get(f"{name}.passages", np.zeros(0))
    return kept
