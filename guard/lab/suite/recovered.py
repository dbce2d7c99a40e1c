"""Cross-entropy recovered: what the model still predicts when it must go by an SAE's reconstruction.

A separate step after training, since it runs the whole model, unembedding included, once for each SAE.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from guard.errors import InvalidInput
from guard.lab import shards
from guard.lab.harvest import by_length
from guard.lab.suite.measure import Recovered, read_reports, write_reports
from guard.lab.suite.ranks import Ranks, device
from guard.lab.suite.sae import load_sae
from guard.reader import weights
from guard.reader.model import pick_dtype
from guard.reader.tokens import TextTokenizer

Progress = Callable[[int, int], None]  # SAEs done, SAEs in all (of this process)
Rebuild = Callable[[Tensor], Tensor]  # [T, d_model] -> [T, d_model]

_TOKENS = 8192
_BATCH_TOKENS = 1024  # the logits of a batch are 4 bytes x vocabulary x this


def add_recovered(
    activations: Path,
    out: Path,
    held_out_shards: int,
    progress: Progress = lambda _done, _all: None,
    *,
    ranks: Ranks | None = None,
    tokens: int = _TOKENS,
) -> None:
    """Fills in `ce` in `out/report.json` where it is None, on about `tokens` tokens of the held-out shards.

    Changes nothing where the harvest kept no token ids. Raises InvalidInput where the model that is found is not the
    one that was harvested.
    """
    ranks = ranks or Ranks()
    reports = read_reports(out) or []
    missing = [report for report in reports if report.ce is None]
    mine = missing[ranks.rank :: ranks.size]
    pieces = held_out_pieces(activations, held_out_shards, tokens) if missing else []
    found: dict[str, Recovered] = {}
    if mine and pieces:
        source = shards.described(activations)
        folder = weights.resolve(source.model)
        if weights.fingerprint(folder) != source.fingerprint:
            raise InvalidInput(f"{activations}: harvested from another model than {folder}: fingerprints differ")
        judge = Judge(folder, pieces, source.dtype)
        first = source.shard_count - held_out_shards
        ablated: dict[str, float] = {}
        for done, report in enumerate(mine):
            progress(done, len(mine))
            point = report.hook_point
            if point not in ablated:
                with safe_open(shards.path(activations, first), "pt") as shard:
                    mean = shard.get_tensor(point).float().mean(0).to(judge.device)
                ablated[point] = judge.loss(point, mean.expand_as)
            sae = load_sae(out / report.name, point).to(judge.device)
            loss = judge.loss(point, lambda x, sae=sae: sae.decode(sae.encode(x)))  # type: ignore[misc]
            found[report.name] = _recovered(judge.whole, loss, ablated[point])
        progress(len(mine), len(mine))
    found = {name: ce for part in ranks.gather(found) for name, ce in part.items()}
    if ranks.first and found:
        write_reports(out, [r.model_copy(update={"ce": found.get(r.name, r.ce)}) for r in reports])
    ranks.barrier()


def held_out_pieces(activations: Path, held_out_shards: int, tokens: int) -> list[list[int]]:
    """Token ids of held-out pieces of text, `tokens` in all or a piece more; none where the harvest kept no ids."""
    count = shards.described(activations).shard_count
    pieces: list[list[int]] = []
    for index in range(count - held_out_shards, count):
        with safe_open(shards.path(activations, index), "pt") as shard:
            if "token" not in shard.keys():  # noqa: SIM118 - not a mapping, keys() is all it has
                return []
            ids, piece = shard.get_tensor("token"), shard.get_tensor("piece")
        lengths = piece.unique_consecutive(return_counts=True)[1].tolist()
        for part in ids.split(lengths):
            if sum(map(len, pieces)) >= tokens:
                return pieces
            pieces.append(part.tolist())
    return pieces


class Judge:
    """The whole model over a few pieces of text, each behind the sink token; `whole` is its own loss on them.

    `dtype`: the harvest's, so that SAEs are judged on activations like those that they were trained on.
    """

    def __init__(self, folder: Path, pieces: Sequence[Sequence[int]], dtype: str = "auto") -> None:
        from transformers import AutoModelForCausalLM

        self.device = device()
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=pick_dtype(dtype))
        self._model = model.eval().to(self.device)
        sink = TextTokenizer(folder).sink_id
        self._pieces = [[sink, *piece] for piece in pieces]
        self.whole = self._loss()

    def loss(self, hook_point: str, rebuild: Rebuild) -> float:
        """Nats a token, with the hook point's output rebuilt everywhere but at the sink."""
        with _rebuilt(self._model.get_submodule(hook_point), rebuild):
            return self._loss()

    @torch.inference_mode()
    def _loss(self) -> float:
        total, count = 0.0, 0
        for batch in by_length([len(piece) for piece in self._pieces], _BATCH_TOKENS):
            longest = max(len(self._pieces[row]) for row in batch)
            ids = torch.full((len(batch), longest), -100)  # -100: no loss there
            for at, row in enumerate(batch):
                ids[at, : len(self._pieces[row])] = torch.tensor(self._pieces[row])
            ids = ids.to(self.device)
            # Padding stands to the right, and attention is causal: no real token sees it.
            logits = self._model(input_ids=ids.clamp(min=0), use_cache=False).logits[:, :-1]  # [B, L - 1, V]
            wanted = ids[:, 1:]
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum")
            )
            count += int((wanted >= 0).sum())
        return total / count


@contextmanager
def _rebuilt(module: torch.nn.Module, rebuild: Rebuild) -> Iterator[None]:
    def hook(_module: object, _inputs: object, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output  # [B, L, d_model]
        new = rebuild(x.flatten(0, 1).float()).to(x.dtype).view_as(x)
        new = torch.cat([x[:, :1], new[:, 1:]], dim=1)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _recovered(model: float, sae: float, ablated: float) -> Recovered:
    gap = ablated - model
    return Recovered(model=model, sae=sae, ablated=ablated, recovered=(ablated - sae) / gap if gap else 0.0)
