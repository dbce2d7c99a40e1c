"""Sheets: which latents and which of their test windows stand together in one prompt, and what an answer to it says.

A sheet lists its latents' explanations once and every text once. Where latents share a text (the same tokens), each has
its own truth there; where it is not known of a latent how it fires on another's text, what the annotator says of it is
passed over. An answer is read in units: tokens, segments or whole windows; the truth of one is the latent's greatest
strength in it.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal

from guard.errors import InvalidInput
from guard.lab.explain.annotator import Annotator
from guard.lab.explain.records import EXPLANATIONS, Answer, Evidence, Explanation, Task, Window, read
from guard.lab.explain.segments import Span, cut, peaks
from guard.lab.explain.simulate_prompts import DETECT, SEGMENT, SYSTEM, TOKEN, fired, listed, spelt, strengths

Tokens = tuple[str, ...]
Unit = Literal["token", "segment", "window"]
PROMPTS: dict[Unit, str] = {"token": TOKEN, "segment": SEGMENT, "window": DETECT}


@dataclass(frozen=True)
class Subject:
    """A latent to be tested: its explanation, and windows, each another text, that its explainer has not seen."""

    explanation: Explanation
    windows: tuple[Window, ...]
    shown: tuple[Window, ...] = ()  # and those that it has

    @property
    def key(self) -> str:
        return f"{self.explanation.sae} {self.explanation.latent}"


@dataclass(frozen=True)
class Sheet:
    subjects: tuple[Subject, ...]
    texts: tuple[Tokens, ...]
    unit: Unit
    segment_tokens: int = 8

    @property
    def name(self) -> str:
        others = f"+{len(self.subjects) - 1}" if len(self.subjects) > 1 else ""
        return f"{self.subjects[0].explanation.latent}{others}"

    @cached_property
    def units(self) -> list[list[Span]]:
        """Of each text."""
        if self.unit == "segment":
            return [cut(text, self.segment_tokens) for text in self.texts]
        if self.unit == "window":
            return [[(0, len(text))] for text in self.texts]
        return [[(i, i + 1) for i in range(len(text))] for text in self.texts]

    @property
    def parts(self) -> list[list[str]]:
        """The units as text."""
        return [
            ["".join(text[start:end]) for start, end in units]
            for text, units in zip(self.texts, self.units, strict=True)
        ]

    def task(self, kind: str, name: str = "") -> Task:
        """The id ends in a hash of what is asked: with another explanation or other texts it is another question."""
        prompt, explanations = PROMPTS[self.unit], [s.explanation.explanation for s in self.subjects]
        if self.unit == "token":
            user = spelt(explanations, self.parts)
        else:
            user = listed(
                explanations, self.parts if self.unit == "segment" else [list(chain.from_iterable(self.parts))]
            )
        asked = hashlib.sha256(f"{prompt}\n{user}".encode()).hexdigest()[:12]
        return Task(id="/".join(filter(None, (kind, name, asked))), prompt=prompt, system=SYSTEM[prompt], user=user)

    def predicted(self, answer: dict[str, Any]) -> list[list[list[int]]]:
        """By latent and text, what the answer says of each unit. Raises InvalidInput for one that was not asked for."""
        count, sizes = len(self.subjects), [len(units) for units in self.units]
        if self.unit == "token":
            return strengths(answer, count, sizes)
        return [
            [
                [int(number in said) for number in range(end - size, end)]
                for size, end in zip(sizes, accumulate(sizes), strict=True)
            ]
            for said in fired(answer, count, sum(sizes))
        ]

    def outcomes(self, answer: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
        """By latent, prediction and truth of every unit of the texts on which the latent's strength is known."""
        result = []
        for subject, said in zip(self.subjects, self.predicted(answer), strict=True):
            truth = {window.tokens: window.values for window in subject.windows}
            predicted: list[int] = []
            true: list[float] = []
            for text, units, of_text in zip(self.texts, self.units, said, strict=True):
                if text in truth:
                    predicted += of_text
                    true += peaks(truth[text], units)
            result.append((predicted, true))
        return result


def read_subjects(folder: Path) -> tuple[list[Subject], int]:
    """Of what `guard lab explain` left: the latents that are explained, and how many more cannot be tested.

    These have no test window that fires, or none that is silent. Raises InvalidInput for a latent that is explained
    twice or has no evidence.
    """
    explanations, evidence = folder / EXPLANATIONS, folder / "evidence.jsonl"
    explained: dict[tuple[str, str], Explanation] = {}
    for line in read(explanations, Explanation):
        if (line.sae, line.latent) in explained:
            raise InvalidInput(f"{explanations}: found {line.latent} of {line.sae} twice, expected one explanation")
        explained[line.sae, line.latent] = line
    found = {}
    for known in read(evidence, Evidence):
        key = (known.sae, known.latent)
        if key in explained:
            distinct = {window.tokens: window for window in reversed(known.part("test"))}
            found[key] = Subject(explained[key], tuple(distinct.values()), known.part("show"))
    if absent := [key for key in explained if key not in found]:
        sae, latent = absent[0]
        raise InvalidInput(f"{evidence}: found nothing on {latent} of {sae}, which {explanations} explains")
    fit = [found[key] for key in explained if len({window.peak > 0 for window in found[key].windows}) == 2]
    return fit, len(explained) - len(fit)


def batches(subjects: Sequence[Subject], together: int) -> list[tuple[Subject, ...]]:
    return [tuple(subjects[first : first + together]) for first in range(0, len(subjects), together)]


def make_sheet(batch: Sequence[Subject], unit: Unit, seed: int, segment_tokens: int = 8) -> Sheet:
    """The texts of all of them, in random order."""
    texts = list(dict.fromkeys(window.tokens for subject in batch for window in subject.windows))
    random.Random(f"{seed} {batch[0].key}").shuffle(texts)
    return Sheet(tuple(batch), tuple(texts), unit, segment_tokens)


def picked(subject: Subject, per_side: int | None, seed: int, *, hardest: bool = False) -> Subject:
    """With at most `per_side` windows in which the latent fires, and as many in which it is silent, in random order.

    `hardest`: near misses go before other silent windows, and both sides are of one size.
    """
    rng = random.Random(f"{seed} {subject.key}")
    windows = rng.sample(subject.windows, len(subject.windows))
    firing = [w for w in windows if w.peak > 0]
    silent = [w for w in windows if w.peak == 0]
    if hardest:
        silent.sort(key=lambda w: w.kind != "near_miss")
        per_side = min(len(firing), len(silent), per_side or len(windows))
    kept = [*firing[:per_side], *silent[:per_side]]
    return replace(subject, windows=tuple(rng.sample(kept, len(kept))))


def answered(
    tasks: dict[str, tuple[Task, Sheet]], annotator: Annotator, progress: Callable[[int, int], None]
) -> dict[str, Answer]:
    """The answers that there are, by the id of their task."""

    def check(task: Task, answer: dict[str, Any]) -> None:
        tasks[task.id][1].predicted(answer)

    return {a.id: a for a in annotator.answer([task for task, _ in tasks.values()], check, progress)}
