"""A plugin of vLLM that writes the tap's steps to a file, and stops the requests that it is told to stop.

GUARD_RECORD: the file. GUARD_STOP: JSON, caller's id -> tokens of completion after which it is to stop.
"""

import json
import os
import pickle
from pathlib import Path

from guard.tap.protocol import Step, TapInfo
from guard.tap.vllm.settings import TapSettings


class RecordingSink:
    def __init__(self, info: TapInfo, file: Path, stop_after: dict[str, int]) -> None:
        self._file = file.open("ab")
        self._stop_after = stop_after
        self._stops: set[str] = set()
        self._write(info)

    def _write(self, what: object) -> None:
        pickle.dump(what, self._file)
        self._file.flush()

    def send(self, step: Step) -> None:
        self._write(step)
        for rows in step.rows:
            after = self._stop_after.get(rows.request_id)
            if after is not None and rows.begin + len(rows.token_ids) - rows.prompt_tokens >= after:
                self._stops.add(rows.request_id)
        self._stops.difference_update(ended.request_id for ended in step.ended)

    def stops(self) -> frozenset[str]:
        return frozenset(self._stops)

    @property
    def dropped(self) -> int:
        return 0

    def close(self) -> None:
        self._file.close()


def register() -> None:
    from guard.tap.vllm.plugin import install

    def sink(info: TapInfo, _settings: TapSettings) -> RecordingSink:
        return RecordingSink(info, Path(os.environ["GUARD_RECORD"]), json.loads(os.environ.get("GUARD_STOP", "{}")))

    install(sink)
