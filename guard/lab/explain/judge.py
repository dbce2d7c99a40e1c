"""Judge: whether an explanation tells texts in which a latent fires from texts in which it nearly does.

    detection           balanced accuracy over test windows, half of them firing, half hard negatives: near misses
                        first, then other silent windows
    detection_shuffled  the control: the same windows beside another latent's explanation. What is left above 0.5 is not
                        owed to the explanation

Whoever answers cannot tell the two apart: they are mixed at random, one of each latent's in either half of the tasks,
and their ids say nothing.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from guard.lab.explain.annotator import Annotator
from guard.lab.explain.records import Answer, Task, write
from guard.lab.explain.scores import SCORES, SUMMARY, Cost, Interval, LatentScores, cost, interval95, medians
from guard.lab.explain.sheets import PROMPTS, Sheet, Subject, answered, make_sheet, picked, read_subjects
from guard.lab.explain.simulate import keep_settings

DETECTION, SHUFFLED = "detection", "detection_shuffled"
_BOOTSTRAPS = 2000

Asked = dict[str, tuple[Task, Sheet]]


class JudgeConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    windows: int | None = Field(10, ge=1)  # of each latent, firing and silent each, at most; None: all
    shuffled: bool = True
    seed: int = 0


class Judgement(BaseModel):
    """`summary.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: JudgeConfig
    prompt: str
    annotators: tuple[str, ...]
    latents: int  # judged by their own explanation
    open: int  # tasks that are not answered
    not_testable: int  # without a test window that fires, or without one that is silent
    median: dict[str, float]
    mean: dict[str, float]
    lead: float | None  # mean of detection less shuffled, over the latents that have both
    lead_interval: Interval | None  # 95%, bootstrap over latents
    cost: Cost


def judge(
    *,
    explained: Path,
    out: Path,
    config: JudgeConfig,
    annotator: Annotator,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Judgement:
    """Writes `out/scores.jsonl` and `out/summary.json` of what is answered by now.

    Raises InvalidInput for explanations without evidence, and where `out` holds a run with other settings.
    """
    subjects, not_testable = read_subjects(explained)
    keep_settings(out, config)
    subjects = [picked(s, config.windows, config.seed, hardest=True) for s in subjects]
    asked = {DETECTION: _tasks(subjects, config.seed)}
    if config.shuffled:
        asked[SHUFFLED] = _tasks(exchanged(subjects, config.seed), config.seed)
    mixed = _mixed(list(asked.values()), config.seed)
    answers = answered(mixed, annotator, progress)
    lines = merged({name: scored(name, tasks, answers) for name, tasks in asked.items()})
    summary = _summary(lines, config, len(answers), len(mixed) - len(answers), not_testable)
    write(out / SCORES, lines)
    (out / SUMMARY).write_text(summary.model_dump_json(indent=1))
    return summary


def _tasks(subjects: Sequence[Subject], seed: int) -> Asked:
    sheets = [make_sheet([subject], "window", seed) for subject in subjects]
    return {task.id: (task, sheet) for sheet in sheets for task in [sheet.task("detect")]}


def _mixed(kinds: Sequence[Asked], seed: int) -> Asked:
    """In random order, but so that the tasks of one latent, which show the same windows, stand in different parts."""
    rng = random.Random(seed)
    of_latent: dict[str, list[str]] = {}
    for tasks in kinds:
        for key, (_, sheet) in tasks.items():
            of_latent.setdefault(sheet.subjects[0].key, []).append(key)
    parts: list[list[str]] = [[] for _ in kinds]
    for keys in of_latent.values():
        for part, key in zip(rng.sample(parts, len(keys)), keys, strict=True):
            part.append(key)
    every = {key: asked for tasks in kinds for key, asked in tasks.items()}
    return {key: every[key] for part in parts for key in rng.sample(part, len(part))}


def exchanged(subjects: Sequence[Subject], seed: int) -> list[Subject]:
    """Each latent's windows with another's explanation: the next one with other words, round a random circle.

    A latent for which there is none is left out.
    """
    circle = random.Random(seed).sample(range(len(subjects)), len(subjects))
    result = {}
    for place, i in enumerate(circle):
        own = subjects[i].explanation
        others = (subjects[j].explanation.explanation for j in [*circle[place + 1 :], *circle[:place]])
        if (other := next((text for text in others if text != own.explanation), None)) is not None:
            result[i] = replace(subjects[i], explanation=own.model_copy(update={"explanation": other}))
    return [result[i] for i in sorted(result)]


def balanced_accuracy(said: Sequence[bool], true: Sequence[bool]) -> float:
    """Mean of the shares that are right where it fires and where it does not. Both must be there."""
    hit = [s for s, t in zip(said, true, strict=True) if t]
    spared = [not s for s, t in zip(said, true, strict=True) if not t]
    return (sum(hit) / len(hit) + sum(spared) / len(spared)) / 2


def scored(name: str, asked: Asked, answers: Mapping[str, Answer]) -> list[LatentScores]:
    result = []
    for key, (_, sheet) in asked.items():
        if (answer := answers.get(key)) is None:
            continue
        ((said, strength),) = sheet.outcomes(answer.answer)
        true = [s > 0 for s in strength]
        result.append(
            LatentScores(
                latent=sheet.subjects[0].explanation.latent,
                sae=sheet.subjects[0].explanation.sae,
                scores={name: round(balanced_accuracy([s > 0 for s in said], true), 6)},
                items=len(true),
                firing=sum(true),
                tokens_sent=answer.tokens_sent,
                tokens_received=answer.tokens_received,
                annotator=answer.annotator,
                prompt=answer.prompt,
            )
        )
    return result


def merged(found: Mapping[str, Sequence[LatentScores]]) -> list[LatentScores]:
    """One line a latent; its costs add up."""
    result: dict[tuple[str, str], LatentScores] = {}
    for line in (line for lines in found.values() for line in lines):
        first = result.setdefault((line.sae, line.latent), line)
        if first is not line:
            result[line.sae, line.latent] = first.model_copy(
                update={
                    "scores": first.scores | line.scores,
                    "tokens_sent": first.tokens_sent + line.tokens_sent,
                    "tokens_received": first.tokens_received + line.tokens_received,
                }
            )
    return list(result.values())


def _summary(
    lines: Sequence[LatentScores], config: JudgeConfig, answers: int, open_: int, not_testable: int
) -> Judgement:
    both = np.array([s.scores[DETECTION] - s.scores[SHUFFLED] for s in lines if {DETECTION, SHUFFLED} <= set(s.scores)])
    drawn = np.random.default_rng(0).choice(both, size=(_BOOTSTRAPS, len(both))).mean(axis=1) if len(both) else None
    values = {name: [s.scores[name] for s in lines if name in s.scores] for name in medians(lines)}
    return Judgement(
        settings=config,
        prompt=PROMPTS["window"],
        annotators=tuple(sorted({line.annotator for line in lines})),
        latents=sum(DETECTION in line.scores for line in lines),
        open=open_,
        not_testable=not_testable,
        median=medians(lines),
        mean={name: round(float(np.mean(found)), 4) for name, found in values.items()},
        lead=round(float(both.mean()), 4) if len(both) else None,
        lead_interval=None if drawn is None else interval95(drawn),
        cost=cost(lines, answers),
    )
