"""Short texts read on the spot: what each SAE's latents do on them, and what the model would say next."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.kernels.contract import rms_normalised
from guard.lab.harvest import by_length
from guard.lab.heads.features import Floats, Ints
from guard.lab.report.stimuli import Named
from guard.lab.suite.sae import FullSae
from guard.reader.model import TorchReader, pick_dtype
from guard.reader.tokens import TextTokenizer

Bools = NDArray[np.bool_]
_BATCH_TOKENS = 4096
_BLOCK = 4096
_GUESS_TOKENS = 512  # their logits over the whole vocabulary stand in memory together


@dataclass(frozen=True)
class Passage:
    text: str
    start: int = 0  # tokens that end at this character or before are read, and not counted


@dataclass(frozen=True)
class Seen:
    """The counted tokens of N passages, one after the other."""

    passage: Tensor  # [T] int64, which passage a token is of
    tokens: Ints  # [N]
    x: dict[str, Tensor]  # hook point -> [T, d_model] bfloat16, as a harvest keeps them

    @torch.no_grad()
    def fired(self, sae: FullSae) -> Bools:
        """`[N, d_sae]`: whether a latent fires on any counted token of a passage."""
        result = torch.zeros(len(self.tokens), sae.width, dtype=torch.bool)
        for x, passage in zip(self.x[sae.hook_point].split(_BLOCK), self.passage.split(_BLOCK), strict=True):
            token, latent = sae.encode(x).nonzero(as_tuple=True)
            result[passage[token], latent] = True
        return result.numpy()

    def means(self, hook_point: str) -> Floats:
        """`[N, d_model]`: mean of the RMS-normalised activations, so that no token of outsized norm rules it."""
        x = rms_normalised(self.x[hook_point].float())
        sums = torch.zeros(len(self.tokens), x.shape[1]).index_add_(0, self.passage, x)
        result: Floats = (sums / torch.from_numpy(self.tokens).clamp(min=1)[:, None]).numpy()
        return result


def read(passages: Sequence[Passage], folder: Path, hook_points: Sequence[str], *, dtype: str) -> Seen:
    """Reads every passage behind the sink token, as a harvest does; memory: all counted tokens at all hook points."""
    tokenizer = TextTokenizer(folder)
    reader = TorchReader(folder, hook_points, dtype=pick_dtype(dtype))
    pieces = [tokenizer.text(passage.text) for passage in passages]
    counted = [
        torch.tensor([end > passage.start for _, end in piece.spans], dtype=torch.bool)
        for passage, piece in zip(passages, pieces, strict=True)
    ]
    kept: dict[int, dict[str, Tensor]] = {}
    for batch in by_length([len(piece.ids) + 1 for piece in pieces], _BATCH_TOKENS):
        rows = reader.read([[tokenizer.sink_id, *pieces[index].ids] for index in batch])
        for index, seen in zip(batch, rows, strict=True):
            kept[index] = {point: x[1:][counted[index]].to(torch.bfloat16) for point, x in seen.items()}
    tokens = torch.stack([mask.sum() for mask in counted])
    return Seen(
        passage=torch.arange(len(passages)).repeat_interleave(tokens),
        tokens=tokens.numpy(),
        x={point: torch.cat([kept[i][point] for i in range(len(passages))]) for point in hook_points},
    )


@dataclass(frozen=True)
class Guess:
    """What the model would say next."""

    top: str
    top_probability: float
    answer_probability: float | None  # of the true answer's first token
    answer_first: bool  # whether that is the likeliest
    name_tokens: int


@torch.inference_mode()
def guesses(folder: Path, asked: Sequence[Named], *, dtype: str) -> list[Guess]:
    """Loads the whole model, its unembedding too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = TextTokenizer(folder)
    words: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=pick_dtype(dtype)).eval()
    pieces = [tokenizer.text(one.prompt) for one in asked]
    result: dict[int, Guess] = {}
    for batch in by_length([len(piece.ids) + 1 for piece in pieces], _GUESS_TOKENS):
        # Padding stands to the right, and attention is causal: no real token sees it.
        ids = torch.zeros(len(batch), len(pieces[batch[0]].ids) + 1, dtype=torch.long)
        for row, index in enumerate(batch):
            ids[row, : len(pieces[index].ids) + 1] = torch.tensor([tokenizer.sink_id, *pieces[index].ids])
        logits = model(input_ids=ids, use_cache=False).logits
        for row, index in enumerate(batch):
            one, piece = asked[index], pieces[index]
            probability = logits[row, len(piece.ids)].float().softmax(dim=-1)
            top = int(probability.argmax())
            expected = tokenizer.text(f"{one.prompt} {one.answer}").ids[len(piece.ids)] if one.answer else None
            name = range(one.start, one.start + len(one.name))
            result[index] = Guess(
                top=words.decode([top]).strip(),
                top_probability=float(probability[top]),
                answer_probability=None if expected is None else float(probability[expected]),
                answer_first=expected == top,
                name_tokens=sum(end > name.start and begin < name.stop for begin, end in piece.spans),
            )
    return [result[index] for index in range(len(asked))]
