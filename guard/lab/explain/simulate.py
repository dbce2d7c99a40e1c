"""Simulate: who knows a latent by its explanation alone says where it fires; the score is the correlation with truth.

    token      an integer from 0 to 10 for every token; r over all tokens of the test windows
    segment    fires or not, for every segment (guard.lab.explain.segments); r (point-biserial) with its true strength
    embedding  no annotator: how near a small model's reading, and the words, of explanation and segment lie to each
               other (guard.lab.explain.cheap); r over the same segments

Text in which the latent is silent is part of it at each level. A run leaves `settings.json`, `scores.jsonl` and
`summary.json` in its folder; `against` another run, the summary says how the scores agree and what was saved.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from guard.errors import InvalidInput
from guard.lab.explain.annotator import Annotator
from guard.lab.explain.records import Answer, write
from guard.lab.explain.scores import (
    SCORES,
    SUMMARY,
    Agreement,
    Cost,
    LatentScores,
    agreements,
    cost,
    medians,
    pearson,
)
from guard.lab.explain.segments import RULE
from guard.lab.explain.shared import Source, share
from guard.lab.explain.sheets import Sheet, answered, batches, make_sheet, picked, read_subjects
from guard.reader.weights import DEFAULT_MODEL

Level = Literal["token", "segment", "embedding"]
Progress = Callable[[int, int], None]
_SETTINGS = "settings.json"


class SimulateConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    level: Level
    segment_tokens: int = Field(8, ge=2)  # of a segment, about
    windows: int | None = Field(None, ge=1)  # of each latent, firing and silent each, at most; None: all
    together: int = Field(1, ge=1)  # latents in one prompt
    shared: bool = False  # each is tested on all texts of the prompt, not on its own alone
    seed: int = 0
    model: str = DEFAULT_MODEL  # this and the next: what reads at the embedding level
    hook_point: str = "model.layers.14"


class Summary(BaseModel):
    """`summary.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: SimulateConfig
    rule: str  # by which segments were cut
    prompt: str  # its version
    annotators: tuple[str, ...]
    latents: int  # scored
    open: int  # not yet: their prompt is unanswered
    not_testable: int  # without a test window that fires, or without one that is silent
    median: dict[str, float]
    cost: Cost
    agreement: tuple[Agreement, ...] = ()


def simulate(
    *,
    explained: Path,
    out: Path,
    config: SimulateConfig,
    annotator: Annotator,
    source: Source | None = None,
    against: Path | None = None,
    progress: Progress = lambda _done, _all: None,
) -> Summary:
    """One run at the token or the segment level; what is answered by now is scored.

    Raises InvalidInput for explanations without evidence, and where `out` holds a run with other settings.
    """
    if config.level == "embedding":
        raise ValueError("the embedding level asks nobody: see guard.lab.explain.cheap")
    subjects, not_testable = read_subjects(explained)
    keep_settings(out, config)
    together = batches([picked(s, config.windows, config.seed) for s in subjects], config.together)
    if config.shared:
        if source is None:
            raise ValueError("shared texts are read in the harvest that evidence was cut from: give `source`")
        together = share(together, source, progress)
    sheets = [make_sheet(batch, config.level, config.seed, config.segment_tokens) for batch in together]
    tasks = {task.id: (task, sheet) for sheet in sheets for task in [sheet.task(config.level, sheet.name)]}
    answers = answered(tasks, annotator, progress)
    lines = [line for key, answer in answers.items() for line in scored(tasks[key][1], answer)]
    return conclude(
        out,
        config,
        lines,
        not_testable=not_testable,
        open_=sum(len(sheet.subjects) for key, (_, sheet) in tasks.items() if key not in answers),
        prompts=len(answers),
        against=against,
    )


def scored(sheet: Sheet, answer: Answer) -> list[LatentScores]:
    """The latents of a sheet; each bears an equal share of what it cost."""
    share = len(sheet.subjects)
    result = []
    for subject, (predicted, true) in zip(sheet.subjects, sheet.outcomes(answer.answer), strict=True):
        r = pearson(predicted, true)
        if r is not None:
            result.append(
                LatentScores(
                    latent=subject.explanation.latent,
                    sae=subject.explanation.sae,
                    scores={f"simulation_{sheet.unit}": round(r, 6)},
                    items=len(true),
                    firing=sum(strength > 0 for strength in true),
                    tokens_sent=answer.tokens_sent / share,
                    tokens_received=answer.tokens_received / share,
                    annotator=answer.annotator,
                    prompt=answer.prompt,
                )
            )
    return result


def keep_settings(out: Path, config: BaseModel) -> None:
    """Raises InvalidInput where the folder holds a run with other settings: its answers are to other questions."""
    file = out / _SETTINGS
    out.mkdir(parents=True, exist_ok=True)
    now = config.model_dump_json(indent=1)
    if file.exists() and file.read_text() != now:
        raise InvalidInput(f"{file}: found a run with other settings; choose another --out, or move this one away")
    file.write_text(now)


def conclude(
    out: Path,
    config: SimulateConfig,
    lines: Sequence[LatentScores],
    *,
    not_testable: int,
    open_: int = 0,
    prompts: int = 0,
    against: Path | None = None,
) -> Summary:
    """Writes scores and summary; `prompts`: how many were answered, by whoever the lines name."""
    summary = Summary(
        settings=config,
        rule=RULE,
        prompt=next((line.prompt for line in lines), ""),
        annotators=tuple(sorted({line.annotator for line in lines} - {""})),
        latents=len(lines),
        open=open_,
        not_testable=not_testable,
        median=medians(lines),
        cost=cost(lines, prompts),
        agreement=agreements(lines, against) if against else (),
    )
    write(out / SCORES, lines)
    (out / SUMMARY).write_text(summary.model_dump_json(indent=1))
    return summary
