"""The cheap scorer, which asks no language model: how near explanation and segment lie to each other.

    embedding  cosine of the reader's mean activations at one hook point. Each token is divided by its root mean square,
               since a few of outsized norm would rule a mean; explanations and segments are centred apart, since what
               all texts share, and all explanations, would make every cosine large
    tfidf      cosine of their words, and of their characters in runs of 2 to 4 (Chinese leaves no blanks)

Both are scored as the annotator's predictions are: r with the segments' true strengths.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from guard.kernels.contract import rms_normalised
from guard.lab.explain.scores import LatentScores, pearson
from guard.lab.explain.sheets import Subject, make_sheet, picked, read_subjects
from guard.lab.explain.simulate import SimulateConfig, Summary, conclude, keep_settings
from guard.lab.harvest import by_length
from guard.reader import weights
from guard.reader.model import TorchReader, pick_dtype
from guard.reader.tokens import TextTokenizer

Vectors = NDArray[np.float16]  # [N, d_model]

_BATCH_TOKENS = 4096


def simulate_cheaply(
    *,
    explained: Path,
    out: Path,
    config: SimulateConfig,
    against: Path | None = None,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Summary:
    """As `guard.lab.explain.simulate.simulate` at the segment level, over the same windows and segments."""
    subjects, not_testable = read_subjects(explained)
    keep_settings(out, config)
    lines = scored([picked(s, config.windows, config.seed) for s in subjects], config, progress)
    return conclude(out, config, lines, not_testable=not_testable, against=against)


def scored(
    subjects: Sequence[Subject], config: SimulateConfig, progress: Callable[[int, int], None]
) -> list[LatentScores]:
    told = [subject.explanation.explanation for subject in subjects]
    parts = [_segments(subject, config) for subject in subjects]
    place: dict[str, int] = {}
    for segments, _ in parts:
        for text in segments:
            place.setdefault(text, len(place))
    both = [*told, *place]
    vectors, words = embed(both, config.model, config.hook_point, progress), tfidf(both)
    mean = [side.mean(axis=0, dtype=np.float64) for side in (vectors[: len(told)], vectors[len(told) :])]
    result = []
    for i, (subject, (segments, true)) in enumerate(zip(subjects, parts, strict=True)):
        rows = [len(told) + place[text] for text in segments]
        near = {
            "simulation_embedding": cosines(vectors[i] - mean[0], vectors[rows] - mean[1]),
            "simulation_tfidf": (words[rows] @ words[i].T).toarray()[:, 0],
        }
        r = {name: pearson(predicted, true) for name, predicted in near.items()}
        result.append(
            LatentScores(
                latent=subject.explanation.latent,
                sae=subject.explanation.sae,
                scores={name: round(value, 6) for name, value in r.items() if value is not None},
                items=len(true),
                firing=sum(strength > 0 for strength in true),
            )
        )
    return result


def _segments(subject: Subject, config: SimulateConfig) -> tuple[list[str], list[float]]:
    """Of the latent's windows, with the true strengths."""
    sheet = make_sheet([subject], "segment", config.seed, config.segment_tokens)
    ((_, true),) = sheet.outcomes({"F1": []})
    return [part for parts in sheet.parts for part in parts], true


def cosines(one: NDArray[Any], many: NDArray[Any]) -> NDArray[np.float64]:
    """Of `one [d]` with each of `many [N, d]`; 0 where either is all zeros."""
    length = np.linalg.norm(one) * np.linalg.norm(many, axis=1)
    return np.asarray(many @ one / np.where(length > 0, length, 1.0), dtype=np.float64)


def embed(
    texts: Sequence[str], model: str, hook_point: str, progress: Callable[[int, int], None] = lambda _done, _all: None
) -> Vectors:
    """The mean of each text's activations, every token divided by its root mean square; each is read alone."""
    folder = weights.resolve(model)
    tokenizer = TextTokenizer(folder)
    reader = TorchReader(folder, [hook_point], dtype=pick_dtype("auto"))
    ids = [tokenizer.text(text).ids for text in texts]
    result = np.zeros((len(texts), reader.d_model), dtype=np.float16)
    done = 0
    for batch in by_length([len(i) + 1 for i in ids], _BATCH_TOKENS):
        seen = reader.read([[tokenizer.sink_id, *ids[row]] for row in batch])
        for row, found in zip(batch, seen, strict=True):
            x: torch.Tensor = rms_normalised(found[hook_point][1:].float())  # [T, d_model], without the sink
            if len(x):
                result[row] = x.mean(dim=0).numpy()
        done += len(batch)
        progress(done, len(texts))
    return result


def tfidf(texts: Sequence[str]) -> Any:
    """A sparse matrix `[N, words]` of rows of length 1 (0 where a text has no word)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_union
    from sklearn.preprocessing import normalize

    words = TfidfVectorizer(sublinear_tf=True)
    characters = TfidfVectorizer(sublinear_tf=True, analyzer="char_wb", ngram_range=(2, 4))
    return normalize(make_union(words, characters).fit_transform(texts)).tocsr()
