"""Report: one HTML page on a suite, with the data of each of its plots beside it.

The sentences of `guard.lab.report.stimuli` are read on the spot, with the model that the texts were harvested from;
then one SAE after the other looks at what was read. Memory: the activations of those sentences (about 15,000 tokens),
and one SAE. Nothing in the page or its data says when or where it was made, so that the same files give the same page.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from markupsafe import Markup
from pydantic import BaseModel

from guard.errors import InvalidInput
from guard.lab import shards, stages
from guard.lab.report import stimuli
from guard.lab.report.blocks import Block, comparable
from guard.lab.report.candidates import candidate_blocks, landscape_block, most_candidates
from guard.lab.report.data import read_candidates, read_contrast
from guard.lab.report.found import found_blocks
from guard.lab.report.items import item_block
from guard.lab.report.known import clearest, known_blocks, name_rows
from guard.lab.report.languages import language_block, language_candidate_block
from guard.lab.report.live import Found, Stimuli
from guard.lab.report.plots import SERIES
from guard.lab.report.suite import curve_block, prediction_block, suite_block
from guard.lab.search.candidates import Candidate
from guard.lab.search.detect import Prediction
from guard.lab.search.precision import Summary
from guard.lab.search.rank import CurvePoint
from guard.lab.suite.measure import SaeReport, read_reports
from guard.lab.suite.sae import load_suite
from guard.reader import weights

Progress = Callable[[int, int, str], None]  # steps done, steps in all, what is under way
_TEMPLATE = "report.html.j2"


class Provenance(BaseModel):
    """`data/provenance.json`: what the page was made from."""

    suite: str
    suite_digest: str
    saes: int
    tokens_trained: tuple[int, int]  # least and most of an SAE
    model: str
    model_fingerprint: dict[str, str]
    dtype: str
    texts: int
    texts_tokens: int
    texts_digest: str
    candidates: int
    fdr: float
    candidates_digest: str
    sentences_digest: str  # of the project's own, that were read for the page


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


def make_report(
    *,
    saes: Path,
    texts: Path,
    candidates: Path,
    out: Path,
    contrast: Path | None = None,
    model: str | None = None,
    progress: Progress = lambda _done, _all, _what: None,
) -> Path:
    """Writes `out/index.html` and `out/data/*.json`; returns the page. `model` None: the one that read the texts.

    Raises InvalidInput for files that are absent, do not read as what they should be, or do not go together.
    """
    found, summary = read_candidates(candidates)
    reports = read_reports(saes)
    if reports is None:
        raise InvalidInput(f"{saes}: holds no report.json; train with `guard lab train` to its end")
    _check(found, summary, reports, candidates, saes)
    contrasted = None if contrast is None else read_contrast(contrast)
    described, rows = shards.described(texts), stages.read_rows(texts)
    folder = weights.resolve(model or described.model)
    fingerprint = weights.fingerprint(folder)
    if described.fingerprint != fingerprint:
        raise InvalidInput(f"{folder}: not the model that {texts} was harvested from; name that one with --model")

    steps = len(reports) + 2
    progress(0, steps, "reading")
    live = Stimuli(folder, list(dict.fromkeys(r.hook_point for r in reports)), described.dtype)
    progress(1, steps, "SAEs")
    seen = _look(live, reports, saes, found, lambda done: progress(1 + done, steps, "SAEs"))
    sections = _sections(live, seen, reports, found, summary, contrasted, saes)
    provenance = Provenance(
        suite=saes.resolve().name,
        suite_digest=_digest(saes / "report.json"),
        saes=len(reports),
        tokens_trained=(min(r.tokens_trained for r in reports), max(r.tokens_trained for r in reports)),
        model=Path(described.model).name,
        model_fingerprint=fingerprint,
        dtype=described.dtype,
        texts=len(rows),
        texts_tokens=described.tokens,
        texts_digest=described.sources[0],
        candidates=len(found),
        fdr=summary.fdr,
        candidates_digest=_digest(candidates),
        sentences_digest=stimuli.digest(),
    )
    page = _write(out, provenance, sections)
    progress(steps, steps, "written")
    return page


def _check(
    candidates: Sequence[Candidate], summary: Summary, reports: Sequence[SaeReport], file: Path, saes: Path
) -> None:
    if not candidates:
        raise InvalidInput(f"{file}: holds no candidate")
    suite = {report.name: report for report in reports}
    if missing := [name for name in summary.saes if name not in suite]:
        raise InvalidInput(f"{file}: made from SAE {missing[0]}, expected one of {saes / 'report.json'}")
    for c in candidates:
        if c.sae not in suite:
            raise InvalidInput(f"{file}: sae: found {c.sae!r}, expected one of {saes / 'report.json'}")
        if c.latent >= suite[c.sae].width:
            raise InvalidInput(f"{file}: latent: found {c.latent} of {c.sae}, which has {suite[c.sae].width}")


@torch.no_grad()
def _look(
    live: Stimuli,
    reports: Sequence[SaeReport],
    saes: Path,
    candidates: Sequence[Candidate],
    progress: Callable[[int], None],
) -> Found:
    seen = Found()
    mapped = most_candidates(candidates)
    for done, report in enumerate(reports, 1):
        (sae,) = load_suite(saes, [report.name])
        live.look(sae, [c for c in candidates if c.sae == sae.name], seen)
        if sae.name in mapped:
            rows = sae.dec_rows[[c.latent for c in mapped[sae.name]]].float().numpy()
            seen.maps.append((sae.name, mapped[sae.name], rows))
        progress(done)
    return seen


def _sections(
    live: Stimuli,
    seen: Found,
    reports: Sequence[SaeReport],
    candidates: Sequence[Candidate],
    summary: Summary,
    contrasted: tuple[Sequence[CurvePoint], Prediction | None] | None,
    saes: Path,
) -> list[Section]:
    suite = [suite_block(reports)]
    if contrasted is not None:
        points, prediction = contrasted
        suite += [curve_block(points), *([prediction_block(points, prediction)] if prediction else [])]
    best = clearest(seen.known)
    fires = None
    if best is not None:
        (sae,) = load_suite(saes, [best[0].sae])
        fires = live.fires(sae, best[1].latent)
    named = name_rows(live.names, live.guessed, fires)
    compared, searched = comparable(reports), [report for report in reports if report.name in summary.saes]
    tokens = {lang: live.tokens(lang) for lang in ("en", "zh")}
    return [
        Section("The suite", suite),
        Section("Features", [*found_blocks(summary), *candidate_blocks(candidates, searched)]),
        Section("Entities and concepts", [item_block(seen.items, live.items, compared)]),
        Section(
            "English and Chinese",
            [
                language_block(seen.languages, tokens, len(live.queries), compared),
                language_candidate_block(seen.by_language),
            ],
        ),
        Section("Landscape", [landscape_block(seen.maps)]),
        Section("What the model does not know", known_blocks(seen.known, named, compared)),
    ]


def _write(out: Path, provenance: Provenance, sections: Sequence[Section]) -> Path:
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    for block in (block for section in sections for block in section.blocks):
        (data / f"{block.data.id}.json").write_text(block.data.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (data / "provenance.json").write_text(provenance.model_dump_json(indent=1) + "\n", encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("guard.lab", "data"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = out / "index.html"
    text = environment.get_template(_TEMPLATE).render(
        provenance=provenance, sections=sections, series=list(enumerate(SERIES)), svg=Markup
    )
    page.write_text(text, encoding="utf-8")
    return page


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
