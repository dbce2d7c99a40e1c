"""The stage as the command runs it: evidence -> tasks -> annotator -> explanations.

A folder holds `evidence.json` (what the evidence was made from) and `evidence.jsonl`, the annotator's `tasks/` and
`answers/`, and `explanations.jsonl`. What is there already is not made again.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from guard.errors import InvalidInput
from guard.lab import shards
from guard.lab.explain import prompts
from guard.lab.explain.annotator import Annotator
from guard.lab.explain.evidence import VERSION, Wanted, gather
from guard.lab.explain.pieces import read_pieces
from guard.lab.explain.records import EXPLANATIONS, Answer, Evidence, Explanation, read, write
from guard.lab.stages import read_rows, statistics
from guard.lab.suite.measure import read_reports
from guard.lab.suite.sae import load_suite
from guard.reader import weights

Progress = Callable[[int, int], None]


class _Tag(BaseModel):
    domain: str
    q: float


class LatentLine(BaseModel):
    """What this stage takes from a line of `guard lab candidates`, or of a pack's latents.jsonl."""

    hook_point: str
    latent: int
    sae: str = ""  # a pack does not say: the suite's one SAE at that hook point
    tags: tuple[_Tag, ...] = ()
    domains: tuple[str, ...] = ()

    @property
    def tagged(self) -> tuple[str, ...]:
        return self.domains or tuple(dict.fromkeys(tag.domain for tag in self.tags))

    @property
    def q(self) -> float:
        return min((tag.q for tag in self.tags), default=1.0)


class Made(BaseModel):
    """`evidence.json`: what the evidence of a folder was made from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    windows: str
    latents: str  # SHA-256
    saes: tuple[str, ...]
    model: str
    texts: str  # SHA-256 of the rows
    corpus: tuple[str, ...]
    corpus_shards: int
    seed: int
    rows: str = ""  # SHA-256 of the latents' own; of older evidence nothing is known


class Explained(BaseModel):
    """What the command tells."""

    latents: int
    silent: int  # fire in no text that was read: nobody is asked
    explanations: tuple[Explanation, ...]
    tokens_sent: int
    tokens_received: int


def prepare(
    *,
    saes: Path,
    texts: Path,
    latents: Path,
    out: Path,
    corpus: Path | None = None,
    corpus_shards: int = 32,
    names: Collection[str] = (),
    limit: int | None = None,
    seed: int = 0,
    progress: Progress = lambda _done, _all: None,
) -> list[Evidence]:
    """The evidence in `out`, made where it is not there yet.

    `latents`: the file of `guard lab candidates`, or a pack; of its lines those of the SAEs `names`, and of these the
    `limit` that are tagged most surely. Raises InvalidInput for latents of several SAEs of one hook point, for a
    harvest by another model, and where `out` holds evidence of something else.
    """
    lines = _chosen(read_lines(latents, saes), latents, names, limit)
    wanted = _wanted(saes, lines)
    harvested = shards.described(texts)
    made = Made(
        windows=VERSION,
        latents=hashlib.sha256("\n".join(line.model_dump_json() for line in lines).encode()).hexdigest(),
        saes=tuple(dict.fromkeys(line.sae for line in lines)),
        model=harvested.model,
        texts=harvested.sources[0],
        corpus=shards.described(corpus).sources if corpus else (),
        corpus_shards=corpus_shards if corpus else 0,
        seed=seed,
        rows=_digest(wanted),
    )
    _describe(out, made)
    file = out / "evidence.jsonl"
    if not file.exists():
        folder = weights.resolve(harvested.model)
        for source in (texts, corpus) if corpus else (texts,):
            if shards.described(source).fingerprint != weights.fingerprint(folder):
                raise InvalidInput(f"{source}: harvested from another model than {folder}: fingerprints differ")
            if absent := {line.hook_point for line in lines} - set(shards.described(source).hook_points):
                raise InvalidInput(f"{source}: holds no activations at {', '.join(sorted(absent))}; harvest again")
        pieces = read_pieces(texts, read_rows(texts), corpus, corpus_shards)
        write(file, gather(wanted, pieces, folder, seed=seed, progress=progress))
    return read(file, Evidence)


def explain(
    evidence: Sequence[Evidence], annotator: Annotator, out: Path, progress: Progress = lambda _done, _all: None
) -> Explained:
    """Asks for an explanation of each latent and writes `out/explanations.jsonl` with those that there are."""
    firing = {f"explain/{e.latent}": e for e in evidence if any(window.peak for window in e.windows)}
    answers = annotator.answer([prompts.task(e) for e in firing.values()], prompts.check, progress)
    found = [_explanation(firing[answer.id], answer) for answer in answers]
    write(out / EXPLANATIONS, found)
    return Explained(
        latents=len(evidence),
        silent=len(evidence) - len(firing),
        explanations=tuple(found),
        tokens_sent=sum(answer.tokens_sent for answer in answers),
        tokens_received=sum(answer.tokens_received for answer in answers),
    )


def made_from(out: Path) -> Made:
    """What the evidence in `out` was made from. Raises InvalidInput where there is none."""
    file = out / "evidence.json"
    if not file.exists():
        raise InvalidInput(f"{out}: holds no evidence.json; make it with `guard lab explain`")
    return Made.model_validate_json(file.read_text())


def read_lines(latents: Path, saes: Path) -> list[LatentLine]:
    """Every line with its SAE. Raises InvalidInput where the suite has no one SAE for a line that names none."""
    file = latents / "latents.jsonl" if latents.is_dir() else latents
    at = defaultdict(list)
    for report in read_reports(saes) or []:
        at[report.hook_point].append(report.name)
    result = []
    for line in read(file, LatentLine):
        there = [line.sae] if line.sae else at[line.hook_point]
        if len(there) != 1:
            told = f"{', '.join(there)} in {saes}" if there else f"none in {saes}"
            raise InvalidInput(f"{file}: SAE of {line.hook_point}: found {told}, expected one")
        result.append(line.model_copy(update={"sae": there[0]}))
    return result


def _chosen(lines: Sequence[LatentLine], file: Path, names: Collection[str], limit: int | None) -> list[LatentLine]:
    known = dict.fromkeys(line.sae for line in lines)
    if missing := [name for name in names if name not in known]:
        raise InvalidInput(f"{file}: holds no latents of {', '.join(missing)}")
    kept = [line for line in lines if not names or line.sae in names]
    kept = sorted(kept, key=lambda line: line.q)[:limit]
    if not kept:
        raise InvalidInput(f"{file}: found no latents")
    for point in dict.fromkeys(line.hook_point for line in kept):
        if len(there := sorted({line.sae for line in kept if line.hook_point == point})) > 1:
            raise InvalidInput(
                f"{file}: {point}: found latents of {', '.join(there)}, expected one SAE; choose with --name"
            )
    return kept


def _wanted(saes: Path, lines: Sequence[LatentLine]) -> list[Wanted]:
    result = []
    for sae in load_suite(saes, {line.sae for line in lines}):
        mine = {line.latent: line.tagged for line in lines if line.sae == sae.name}
        ordered = sorted(mine)
        if ordered[-1] >= sae.width:
            raise InvalidInput(f"{sae.name}: found latent {ordered[-1]}, expected one below {sae.width}")
        domains = tuple(mine[latent] for latent in ordered)
        result.append(Wanted(sae, statistics(sae, saes), np.array(ordered), domains))
    return result


def _digest(wanted: Sequence[Wanted]) -> str:
    found = hashlib.sha256()
    for w in wanted:
        for part in (w.sae.enc_rows, w.sae.bias, w.sae.threshold):
            found.update(np.ascontiguousarray(part.numpy()[w.latents]).tobytes())
    return found.hexdigest()


def _describe(out: Path, made: Made) -> None:
    file = out / "evidence.json"
    if file.exists():
        known = made_from(out)
        said = set(Made.model_fields) - (set() if known.rows else {"rows"})
        if changed := [
            name for name in Made.model_fields if name in said and getattr(known, name) != getattr(made, name)
        ]:
            raise InvalidInput(f"{file}: made with another {', '.join(changed)}; choose another --out to start afresh")
        return
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(made.model_dump(), indent=1))


def _explanation(evidence: Evidence, answer: Answer) -> Explanation:
    return Explanation(
        latent=evidence.latent,
        sae=evidence.sae,
        annotator=answer.annotator,
        prompt=answer.prompt,
        **prompts.said(answer.answer).model_dump(),
    )
