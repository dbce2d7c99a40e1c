"""Detections as they are made, a line for each SAE, so that a killed run goes on behind the last one."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from guard.lab import shards
from guard.lab.search.detect import DetectConfig, Detection
from guard.lab.suite.measure import SaeReport


class KeptDetections:
    """`detections.jsonl`: what it was made from, then one Detection a line. Of anything else, it is begun afresh."""

    def __init__(self, file: Path, reports: Sequence[SaeReport], texts: Path, config: DetectConfig) -> None:
        suite = [report.model_dump(exclude={"ce"}) for report in reports]
        made_from = json.dumps([suite, shards.described(texts).sources, asdict(config)])
        head = json.dumps({"made_from": hashlib.sha256(made_from.encode()).hexdigest()}) + "\n"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        # A killed run may leave half a line.
        kept = [line for line in lines[1:] if line.endswith("\n")] if lines[:1] == [head] else []
        file.write_text(head + "".join(kept), encoding="utf-8")
        self._file = file
        self.found = {d.sae: d for d in map(Detection.model_validate_json, kept)}

    def add(self, detection: Detection) -> None:
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(detection.model_dump_json() + "\n")
        self.found[detection.sae] = detection
