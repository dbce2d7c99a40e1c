"""A real vLLM, run on a job in its own environment, and what its tap told held against reading each request alone."""

import json
import os
import pickle
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from deploy.vllm import engine
from guard.kernels.reference import ReferenceEncoder
from guard.pack.loader import load_pack
from guard.reader.model import TorchReader
from guard.tap.protocol import Ended, Step, TapInfo
from guard.tap.vllm.encode import BatchEncoder
from guard.tap.vllm.fired import Fired, joined
from tests.conftest import PACK, REPOSITORY

HERE = Path(__file__).parent


@dataclass
class Told:
    """Everything that one run brought."""

    info: TapInfo
    waves: list[list[dict]]
    counters: dict[str, float]
    log: str
    runs: dict[str, list[Fired]] = field(default_factory=dict)
    reached: dict[str, int] = field(default_factory=dict)
    prompt: dict[str, int] = field(default_factory=dict)
    missed: dict[str, str] = field(default_factory=dict)
    ended: dict[str, Ended] = field(default_factory=dict)

    @property
    def answers(self) -> dict[str, dict]:
        return {answer["id"]: answer for wave in self.waves for answer in wave}

    def take(self, step: Step) -> None:
        for rows in step.rows:
            assert rows.begin == self.reached.get(rows.request_id, 0), "a gap, or rows told twice"
            self.reached[rows.request_id] = rows.begin + len(rows.token_ids)
            self.prompt[rows.request_id] = rows.prompt_tokens
            run = Fired(rows.token_ids, rows.token, rows.row, rows.value, rows.probe, rows.finite)
            self.runs.setdefault(rows.request_id, []).append(run)
        self.missed.update((missed.request_id, missed.detail) for missed in step.missed)
        self.ended.update((ended.request_id, ended) for ended in step.ended)


class EngineEndedError(RuntimeError):
    pass


def run(folder: Path, model: Path, waves, *, stop=None, guard=None, **arguments) -> Told:
    """`waves` of requests {"prompt": ids, "params": {...}}. Raises EngineEndedError with the log where vLLM fails."""
    site = folder / "site" / "recording-1.0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: recording\nVersion: 1.0\n")
    (site / "entry_points.txt").write_text("[vllm.general_plugins]\nrecording = recording:register\n")
    settings = {"model": str(model), "dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "seed": 0}
    settings |= {"kv_cache_memory_bytes": 2 << 30, "block_size": 32}
    settings |= {"additional_config": {"guard": {"pack": str(PACK), "taps": "unix:/none"} | (guard or {})}}
    (folder / "job.json").write_text(json.dumps({"engine": settings | arguments, "waves": waves}))
    own = {
        "PYTHONPATH": f"{REPOSITORY}:{HERE}:{folder / 'site'}",
        "VLLM_PLUGINS": "recording",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "GUARD_RECORD": str(folder / "record"),
        "GUARD_STOP": json.dumps(stop or {}),
    }
    command = [engine.environment() / "bin" / "python", HERE / "drive.py", folder / "job.json", folder / "out.json"]
    with (folder / "log").open("w") as output:
        ended = subprocess.run(
            command, env=os.environ | own, stdout=output, stderr=subprocess.STDOUT, timeout=1200, check=False
        )
    log = (folder / "log").read_text(errors="replace")
    if ended.returncode:
        raise EngineEndedError(log)
    return read(folder, log)


def read(folder: Path, log: str) -> Told:
    """What a run left in its folder."""
    out = json.loads((folder / "out.json").read_text())
    with (folder / "record").open("rb") as file:
        told = Told(pickle.load(file), out["waves"], out["counters"], log)  # noqa: S301 - a file of our own
        while file.peek(1):
            told.take(pickle.load(file))  # noqa: S301 - as above
    return told


@dataclass(frozen=True)
class Likeness:
    requests: int
    tokens: int
    hits: int
    jaccard: float  # of (token, row) over all requests
    value: float  # largest difference of a hit's value that both have
    probe: float
    flips: int = 0  # hits that only one of the two has
    margin: float = 0.0  # how far above its threshold the furthest of them is, as a share of it


def against_alone(told: Told, model: Path, waves, dtype: torch.dtype, folder: Path = PACK) -> Likeness:
    """Reads every request alone with transformers, on the ids that it turned out to have, and compares.

    Asserts that every token of prompt and answer was told, but the last one that nothing was computed for.
    """
    pack = load_pack(folder)
    thresholds = np.concatenate([point.threshold for point in pack.hook_points])
    reader = TorchReader(model, [point.name for point in pack.hook_points], dtype=dtype)
    encode = BatchEncoder(ReferenceEncoder(), pack.hook_points)
    requests = [request for wave in waves for request in wave]
    both = either = tokens = 0
    value = probe = margin = 0.0
    for answer, request in zip(told.answers.values(), requests, strict=True):
        whole = [*request["prompt"], *answer["ids"]]
        found = joined(told.runs[answer["id"]])
        assert told.prompt[answer["id"]] == len(request["prompt"])
        assert told.ended[answer["id"]].tokens == len(found)
        assert len(found) in {len(whole) - 1, len(whole)}  # an accepted draft may have been the end
        assert found.ids.tolist() == whole[: len(found)]
        seen = reader.read([found.ids.tolist()])[0]
        (own,) = encode([seen[point.name] for point in pack.hook_points], found.ids, [len(found)])
        one, other = (part.token.astype(np.int64) * len(pack.latents) + part.row for part in (found, own))
        _, here, there = np.intersect1d(one, other, assume_unique=True, return_indices=True)
        both, either = both + len(here), either + len(one) + len(other) - len(here)
        tokens += len(found)
        for part, same in ((found, here), (own, there)):
            alone = np.setdiff1d(np.arange(len(part.row)), same)
            limit = thresholds[part.row[alone]]
            margin = max([margin, *((part.value[alone] - limit) / np.maximum(1.0, np.abs(limit))).tolist()])
        if len(here):
            value = max(value, float(np.abs(found.value[here] - own.value[there]).max()))
        probe = max(probe, float(np.abs(found.probe - own.probe).max()))
    return Likeness(len(requests), tokens, either, both / either, value, probe, either - both, margin)
