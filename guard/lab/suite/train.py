"""Train: the SAEs of a suite side by side, over one stream of harvested activations.

A suite reads the stream once, and a killed run goes on from its last checkpoint. Under `torchrun` the SAEs are dealt
out over the processes. Whoever trains an SAE, it starts from the same weights and sees the same batches.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from guard.errors import InvalidInput
from guard.lab import shards
from guard.lab.suite import checkpoint
from guard.lab.suite.config import ACTIVATIONS, SuiteConfig, read_config, write_config
from guard.lab.suite.measure import SaeReport, held_out, measure, read_reports, write_reports
from guard.lab.suite.ranks import Ranks, deal, device
from guard.lab.suite.sae import load_sae
from guard.lab.suite.trainee import Trainee

Progress = Callable[[int, int, dict[str, float]], None]  # tokens done, tokens in all, FVU of each SAE (of this process)

SAVE_SECONDS = 300.0
_LOSS_STEPS = 20


def train(
    config: SuiteConfig,
    activations: Path,
    out: Path,
    progress: Progress = lambda _done, _all, _fvu: None,
    *,
    ranks: Ranks | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> list[SaeReport]:
    """Writes `out/<name>/` (sae-lens format) for each SAE, `out/suite.toml`, `out/losses.jsonl`, `out/report.json`.

    Reads the activations in groups of `shards_mixed` shards, shuffled within the group. A checkpoint is saved after a
    group once `save_seconds` have passed since the last, so a killed run loses that much time and one group at
    most. A suite that was trained to its end is not trained again. `guard.lab.suite.recovered` adds to the report.

    Memory of a process, in bytes, over what torch itself takes: with P hook points and SAEs of widths w_i,

        2 P d_model tokens_of_a_group  +  16 sum_i(2 w_i d_model)  +  12 batch max_i(w_i)

    the group in bfloat16, four float32 copies of the weights (gradient and Adam's two moments among them), and the
    activations of one SAE at a time, forward and backward (26 in place of 12 for jumprelu). An allocator that is
    told to give nothing back may take several times that (docs/search.md).

    Raises InvalidInput where `out` holds a run of another configuration, the activations lack a hook point or are too
    few, or `start_from` lacks an SAE.
    """
    ranks = ranks or Ranks()
    _check(config, activations, out)
    ranks.barrier()
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        write_config(out / "suite.toml", config)
        (out / ACTIVATIONS).write_text(shards.described(activations).model_dump_json(indent=1))
    ranks.barrier()
    if (found := read_reports(out)) is not None:
        return found
    mine = _trainees(config, activations, ranks)
    tokens = _run(config, activations, out, mine, ranks, progress, save_seconds)
    gathered = ranks.gather(_finish(config, activations, out, mine, tokens))
    if ranks.first:
        by_name = {report.name: report for part in gathered for report in part}
        write_reports(out, [by_name[spec.name] for spec in config.specs])
        checkpoint.discard(out)
    ranks.barrier()
    return read_reports(out) or []


def _check(config: SuiteConfig, activations: Path, out: Path) -> None:
    source = shards.described(activations)
    if missing := set(config.hook_points) - set(source.hook_points):
        raise InvalidInput(f"{activations}: holds {', '.join(source.hook_points)}; not {', '.join(sorted(missing))}")
    of_one = source.tokens // source.shard_count
    left = source.shard_count - config.held_out_shards
    if left < 1 or min(of_one * min(config.shards_mixed, left), config.tokens) < config.batch:
        raise InvalidInput(
            f"{activations}: {source.shard_count} shards of {of_one} tokens are too few "
            f"for batches of {config.batch} with {config.held_out_shards} shards held out"
        )
    file = out / "suite.toml"
    known = read_config(str(file)) if file.exists() else config
    if changed := [key for key in SuiteConfig.model_fields if getattr(known, key) != getattr(config, key)]:
        raise InvalidInput(
            f"{file}: made with another {', '.join(changed)}; give the same again, or another --out to start afresh"
        )
    read = out / ACTIVATIONS
    if read.exists() and shards.ShardSet.model_validate_json(read.read_text()) != source:
        raise InvalidInput(
            f"{activations}: found another harvest than {out} was begun with; give the same again, or another --out"
        )
    if config.start_from:
        folder = Path(config.start_from)
        trained = {report.name for report in read_reports(folder) or []}
        if lacking := [spec.name for spec in config.specs if spec.name not in trained]:
            raise InvalidInput(f"{folder}: holds no trained SAE {', '.join(lacking)}")


def _trainees(config: SuiteConfig, activations: Path, ranks: Ranks) -> list[Trainee]:
    specs = deal(config.specs, ranks.size)[ranks.rank]
    points = list(dict.fromkeys(spec.hook_point for spec in specs))
    scales = {point: shards.normaliser(activations, point) for point in points}
    first = _read(activations, [0], points)
    means = {point: x.float().mean(0) * scales[point] for point, x in first.items()}
    mine = [Trainee(s, config, scales[s.hook_point], means[s.hook_point], device()) for s in specs]
    if config.start_from:
        folder = Path(config.start_from)
        before = {report.name: report.tokens_trained for report in read_reports(folder) or []}
        for trainee in mine:
            trainee.start_from(folder / trainee.spec.name, before[trainee.spec.name])
    return mine


def _run(
    config: SuiteConfig,
    activations: Path,
    out: Path,
    mine: Sequence[Trainee],
    ranks: Ranks,
    progress: Progress,
    save_seconds: float,
) -> int:
    """Trains to the end of the stream, or of what is left of it. Returns the tokens of the whole run."""
    order = list(range(shards.described(activations).shard_count - config.held_out_shards))
    groups = [order[i : i + config.shards_mixed] for i in range(0, len(order), config.shards_mixed)]
    steps = config.tokens // config.batch
    step, group = checkpoint.restore(out, mine)
    ranks.barrier()
    if ranks.first:
        _cut_losses(out, step)
    saved = time.monotonic()
    while step < steps:
        losses: dict[int, dict[str, float]] = {}
        for batch in _batches(config, activations, groups[group % len(groups)], group, mine):
            rate = _learning_rate(config, step, steps)
            for trainee in mine:
                trainee.step(batch[trainee.spec.hook_point], step, rate)
            step += 1
            fvu = {trainee.spec.name: trainee.fvu for trainee in mine}
            if step % _LOSS_STEPS == 0 or step == steps:
                losses[step] = fvu
            if step % 10 == 0 or step == steps:
                progress(step * config.batch, steps * config.batch, fvu)
            if step == steps:
                break
        group += 1
        gathered = ranks.gather(losses)
        if ranks.first:
            _add_losses(out, config, gathered)
        if ranks.agree(said=step == steps or time.monotonic() - saved >= save_seconds):
            checkpoint.save(out, mine, ranks, step=step, group=group)
            saved = time.monotonic()
    return steps * config.batch


def _batches(
    config: SuiteConfig, activations: Path, group: Sequence[int], index: int, mine: Sequence[Trainee]
) -> Iterator[dict[str, Tensor]]:
    """Scaled activations `[batch, d_model]`, float32, of each hook point, from the group's shards shuffled together."""
    scales = {trainee.spec.hook_point: trainee.scale for trainee in mine}
    mixed = _read(activations, group, [*scales, "piece"])
    generator = torch.Generator().manual_seed(config.seed * 100_003 + index)
    rows = torch.randperm(len(mixed.pop("piece")), generator=generator)
    for start in range(0, len(rows) - config.batch + 1, config.batch):
        chosen = rows[start : start + config.batch]
        yield {point: x[chosen].to(device()).float() * scales[point] for point, x in mixed.items()}


def _read(activations: Path, indices: Sequence[int], points: Sequence[str]) -> dict[str, Tensor]:
    """Like `shards.load_many`, but holds no more than what it returns: a group may be as large as memory allows."""
    files = [shards.path(activations, index) for index in indices]
    if absent := [file for file in files if not file.exists()]:
        raise InvalidInput(f"{absent[0]}: absent; the harvest is not complete, run `guard lab harvest` again")
    result: dict[str, Tensor] = {}
    for point in points:
        parts = []
        for file in files:
            with shards.readable(file), safe_open(file, "pt") as shard:
                parts.append(shard.get_tensor(point))
        result[point] = torch.cat(parts)
    return result


def _learning_rate(config: SuiteConfig, step: int, steps: int) -> float:
    """Linear warm-up, flat, then linear to zero over the last `decay_share` of the run."""
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    fall = min(1.0, (steps - step) / max(1.0, config.decay_share * steps))
    return config.learning_rate * rise * fall


def _add_losses(out: Path, config: SuiteConfig, gathered: Sequence[dict[int, dict[str, float]]]) -> None:
    steps = sorted({step for part in gathered for step in part})
    with (out / "losses.jsonl").open("a", encoding="utf-8") as stream:
        for step in steps:
            fvu = {name: round(value, 6) for part in gathered for name, value in part.get(step, {}).items()}
            in_order = {spec.name: fvu[spec.name] for spec in config.specs}
            stream.write(json.dumps({"step": step, "tokens": step * config.batch, "fvu": in_order}) + "\n")


def _cut_losses(out: Path, step: int) -> None:
    """Drops what was written after the checkpoint that the run goes on from, half a line of a killed run included."""
    file = out / "losses.jsonl"
    if not file.exists():
        return
    kept = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in kept if json.loads(line)["step"] <= step]
    scratch = out / ".losses.tmp"
    scratch.write_text("".join(kept))
    scratch.replace(file)


def _finish(config: SuiteConfig, activations: Path, out: Path, mine: Sequence[Trainee], tokens: int) -> list[SaeReport]:
    """Saves the SAEs and measures them on the held-out shards, hook point by hook point."""
    reports = []
    for point in dict.fromkeys(trainee.spec.hook_point for trainee in mine):
        x = held_out(activations, point, config.held_out_shards).to(device())
        for trainee in mine:
            if trainee.spec.hook_point == point:
                folder = out / trainee.spec.name
                trainee.save(folder)
                sae = load_sae(folder, point).to(device())
                reports.append(measure(sae, trainee.spec, x, tokens_trained=trainee.tokens_before + tokens))
    return reports
