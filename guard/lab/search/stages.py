"""The search's stages as commands run them: contrast -> predict, and candidates; each reads and writes files."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from guard.lab import labelled
from guard.lab.search import candidates as searching
from guard.lab.search import precision
from guard.lab.search import rank as ranking
from guard.lab.search.contrast import ALL, ConceptContrast, concept_contrasts, pair_rows
from guard.lab.search.detect import DetectConfig, Prediction, correlations, detect, judged_rows, make_folds
from guard.lab.search.draw import draw_curve, draw_prediction
from guard.lab.search.resume import KeptDetections
from guard.lab.search.significance import Control
from guard.lab.search.surface import bound_to_language, token_use
from guard.lab.search.words import shares as word_shares
from guard.lab.search.words import telling_tokens
from guard.lab.stages import Progress, read_rows, statistics, strengths
from guard.lab.suite.config import Grid, SuiteConfig, read_config, write_config
from guard.lab.suite.measure import read_reports
from guard.lab.suite.sae import load_suite


def contrast(
    *,
    saes: Path,
    texts: Path,
    out: Path,
    activations: Path | None = None,
    by: str = ranking.BEST,
    progress: Progress = lambda _done, _all: None,
) -> tuple[list[ConceptContrast], list[ranking.CurvePoint], ranking.Ranking]:
    """The pre-explanation metric of every SAE over the project's contrast pairs.

    Writes `out/contrast.json` (every SAE and concept), `out/ranking.json` (the pick), `out/picked.toml` (a suite of the
    picked SAEs alone, to be trained on), and the curve against sparsity, `out/curve.json` and `out/curve.png`.
    `activations`, a corpus's, is needed on the first run, for the SAEs' scales. Raises InvalidInput for a metric that
    there is not.
    """
    ranking.check_metric(by)
    suite, rows, reports = load_suite(saes), read_rows(texts), read_reports(saes) or []
    trained = read_config(str(saes / "suite.toml"))
    pairs = labelled.pairs()
    with_, without = pair_rows(rows, pairs)
    pooled = strengths(suite, saes, texts, activations, progress)
    result: list[ConceptContrast] = []
    for sae, strength in zip(suite, pooled, strict=True):
        result += concept_contrasts(pairs, strength[with_] > 0, strength[without] > 0, sae.hook_point, sae.name)
    points = ranking.curve(reports, result)
    ranked = ranking.ranked(points, by)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "contrast.json", result)
    _write(out / "curve.json", points)
    (out / "ranking.json").write_text(ranked.model_dump_json(indent=1))
    if ranked.picked:
        write_config(out / "picked.toml", _suite_of(ranked.picked, points, trained))
    draw_curve(points, out / "curve.png")
    return result, points, ranked


def _suite_of(picked: ranking.Configuration, points: Sequence[ranking.CurvePoint], suite: SuiteConfig) -> SuiteConfig:
    """The picked SAEs alone, trained as they were; where they start from is for the command line to say."""
    there = [next(p for p in points if p.sae == name) for name in picked.saes]
    grid = Grid.model_validate(
        {
            "hook_points": [p.hook_point for p in there],
            "architectures": [picked.architecture],
            "widths": [picked.width],
            "l0": [picked.l0_target],
        }
    )
    return suite.model_copy(update={"grid": (grid,), "start_from": ""})


def predict(
    *,
    saes: Path,
    texts: Path,
    contrasted: Path,
    config: DetectConfig,
    progress: Progress = lambda _done, _all: None,
) -> Prediction:
    """Whether the metric that `contrast` left in `contrasted` goes with detection by each SAE's latents alone.

    Writes `prediction.json` and `prediction.png` there, and `detections.jsonl` as it goes: a killed run goes on from
    it. Memory holds the strengths of one SAE, seven times over (in float16).
    """
    suite, rows, reports = load_suite(saes), read_rows(texts), read_reports(saes) or []
    found = [ConceptContrast.model_validate(c) for c in json.loads((contrasted / "contrast.json").read_text())]
    kept = judged_rows(rows)
    judged = [rows[i] for i in kept]
    folds = make_folds(judged, config.folds)
    known = KeptDetections(contrasted / "detections.jsonl", reports, texts, config)
    for done, (sae, strength) in enumerate(zip(suite, strengths(suite, saes, texts), strict=True), 1):
        if sae.name not in known.found:
            known.add(detect(sae.name, judged, strength[kept], folds, config))
        progress(done, len(suite))
    detections = [known.found[sae.name] for sae in suite]
    targets = [ALL, *detections[0].by_domain]
    points = {target: ranking.curve(reports, found, target) for target in targets}
    prediction = Prediction(
        latents=config.latents,
        c=config.c,
        iterations=config.iterations,
        folds=[sorted(g for g, fold in folds.items() if fold == i) for i in range(config.folds)],
        rows=len(judged),
        detections=detections,
        correlations=correlations(points, detections),
    )
    (contrasted / "prediction.json").write_text(prediction.model_dump_json(indent=1))
    draw_prediction(points[ALL], prediction, contrasted / "prediction.png")
    return prediction


def candidates(
    *,
    saes: Path,
    texts: Path,
    out: Path,
    names: Sequence[str] = (),
    activations: Path | None = None,
    fdr: float = 0.05,
    control: Control = "bh",
    progress: Progress = lambda _done, _all: None,
) -> precision.Summary:
    """Safety latents of the named SAEs, or of all: writes `out` (JSON lines) and its neighbour `*.summary.json`.

    Strengths are read one SAE at a time, the texts' shards once. Raises InvalidInput for a name that the suite does not
    hold.
    """
    suite, rows = load_suite(saes, names or None), read_rows(texts)
    known = {report.name: report for report in read_reports(saes) or []}
    reports = [known[sae.name] for sae in suite]
    ground = searching.Ground(rows, labelled.pairs())
    steps = len(suite)  # of each of three parts: strengths, tests, tokens
    pooled = strengths(suite, saes, texts, activations, lambda done, of: progress(steps * done // of, 3 * steps))
    answers = []
    for strength in pooled:
        answers.append(ground.answers(strength))
        progress(steps + len(answers), 3 * steps)
    found = {
        part: searching.find(reports, ground.questions, [a[part].p for a in answers], fdr=fdr, control=control)
        for part in searching.PARTS
    }
    chosen = [np.flatnonzero(f.tagged.any(axis=0)) for f in found["all"]]
    uses = token_use(suite, chosen, texts, lambda done, of: progress(2 * steps + steps * done // of, 3 * steps))
    result: list[searching.Candidate] = []
    for i, sae in enumerate(suite):
        with_, without = ground.fires(pooled[i])
        result += searching.lines(
            reports[i],
            ground.questions,
            answers[i]["all"],
            found["all"][i],
            langs=bound_to_language(ground.pairs, with_[:, chosen[i]], without[:, chosen[i]]),
            uses=uses[i] if uses else None,
            firing_rate=statistics(sae, saes, activations).firing_rate,
        )
    progress(3 * steps, 3 * steps)
    summary = precision.Summary(
        fdr=fdr,
        control=control,
        saes=[sae.name for sae in suite],
        pairs=len(ground.pairs),
        strata={f"{d}.{kind.value}": [name for name, *_ in found] for (d, kind), found in ground.strata.items()},
        halves={
            part: sorted(g for g, half in ground.half_of.items() if half == i)
            for i, part in enumerate(("first", "second"))
        },
        tokens_known=uses is not None,
        counts=precision.counts(reports, result, ground.questions),
        precision=precision.precision(reports, ground, answers, found, fdr=fdr, control=control),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(candidate.model_dump_json() + "\n" for candidate in result), encoding="utf-8")
    out.with_suffix(".summary.json").write_text(summary.model_dump_json(indent=1))
    return summary


def words(
    *,
    saes: Path,
    texts: Path,
    out: Path,
    per_domain: int,
    besides: Collection[tuple[str, int]] = (),
    progress: Progress = lambda _done, _all: None,
) -> int:
    """The `per_domain` latents that rank first by a domain's words, but for those (SAE, latent) in `besides`.

    Writes `out`, JSON lines as `guard lab fit` writes them, and returns how many. Raises InvalidInput as
    `guard.lab.search.words` does.
    """
    suite = load_suite(saes)
    found = word_shares(suite, texts, telling_tokens(read_rows(texts), texts), progress)
    share = np.concatenate(found)  # [latents, domains]
    place = np.argsort(np.argsort(-share, axis=0, kind="stable"), axis=0)
    wanted = np.split((place < per_domain) & (share > 0), np.cumsum([sae.width for sae in suite])[:-1])
    lines = [
        {
            "hook_point": sae.hook_point,
            "latent": latent,
            "sae": sae.name,
            "domains": np.array(labelled.DOMAINS)[mine[latent]].tolist(),
        }
        for sae, mine in zip(suite, wanted, strict=True)
        for latent in np.flatnonzero(mine.any(axis=1)).tolist()
        if (sae.name, latent) not in besides
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def _write(file: Path, lines: Sequence[BaseModel]) -> None:
    file.write_text(json.dumps([line.model_dump() for line in lines], indent=1))
