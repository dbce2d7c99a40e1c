"""`guard check --file`: many rows through one assessor, in order, with many in flight so that they are batched."""

import json
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from guard.cli import inputs
from guard.cli.backend import Backend
from guard.cli.terminal import visible
from guard.errors import Exhausted, InvalidInput
from guard.records import Action, CheckInput, CheckOptions, NotAssessed, NotAssessedReason, Verdict

WINDOW = 4096  # rows in flight at most, however large the queue is


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the file. `problem` is empty where it can be checked; `id` is what the line said, or None."""

    id: str | int | float | None
    text: str = ""
    problem: str = ""

    @property
    def request_id(self) -> str:
        return "" if self.id is None else self.id if isinstance(self.id, str) else json.dumps(self.id)


def read(stream: BinaryIO) -> Iterator[Row]:
    """The rows of a JSONL file. Lines end at a line feed only; lines of white space are not rows."""
    for number, line in enumerate(stream):
        raw = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
        if raw.strip():
            yield parse(raw)


def count(file: Path) -> int:
    with file.open("rb") as stream:
        return sum(1 for line in stream if line.strip())


def parse(raw: bytes) -> Row:
    try:
        values = json.loads(inputs.decode(raw.strip(), "line"))
    except InvalidInput as error:
        return Row(None, problem=str(error))
    except (ValueError, RecursionError) as error:
        return Row(None, problem=f"line is not valid JSON: {error}")
    if not isinstance(values, dict):
        return Row(None, problem=f"line: found {inputs.kind(values)}, expected an object with id and text")
    found = values.get("id")
    if problem := _id_problem(found):
        return Row(found if isinstance(found, str) else None, problem=problem)
    problem = _text_problem(values)
    return Row(found, text="" if problem else values["text"], problem=problem)


def _id_problem(found: Any) -> str:
    if isinstance(found, str):
        return "" if _is_unicode(found) else "id is not valid Unicode: it holds a lone surrogate"
    if found is None or (type(found) is int) or (type(found) is float and math.isfinite(found)):
        return ""
    return f"id: found {inputs.kind(found)}, expected a string or a finite number"


def _text_problem(values: dict[str, Any]) -> str:
    if "text" not in values:
        return "text: found nothing, expected a string"
    found = values["text"]
    return "" if isinstance(found, str) else f"text: found {inputs.kind(found)}, expected a string"


def assess(rows: Iterable[Row], backend: Backend, options: CheckOptions) -> Iterator[tuple[Row, Verdict]]:
    """A verdict for each row, in order. A row that cannot be checked gets a not_assessed verdict, and the run goes on.

    Raises NotFound (a domain) and errors that are not of one row, such as a sidecar that went away.
    """
    window = max(1, min(backend.window, WINDOW))
    flight: deque[tuple[Row, Verdict | Future[Verdict]]] = deque()
    try:
        for row in rows:
            while flight and (len(flight) >= window or _is_done(flight[0][1])):
                yield _settle(*flight.popleft(), backend)
            flight.append((row, _start(row, backend, options, flight)))
        while flight:
            yield _settle(*flight.popleft(), backend)
    finally:
        for _, waiting in flight:
            if isinstance(waiting, Future):
                waiting.cancel()


def _start(
    row: Row, backend: Backend, options: CheckOptions, flight: deque[tuple[Row, Verdict | Future[Verdict]]]
) -> "Verdict | Future[Verdict]":
    if row.problem:
        return refused(row, row.problem, backend)
    asked = CheckOptions(options.domains, options.max_attributions, options.token_detail, row.request_id)
    while True:
        try:
            return backend.submit(CheckInput(prompt=row.text), asked)
        except InvalidInput as error:
            if error.reason == "INVALID_OPTION":  # the same for every row
                raise
            return refused(row, str(error), backend)
        except Exhausted as error:
            own = [waiting for _, waiting in flight if isinstance(waiting, Future) and not waiting.done()]
            if own:
                wait(own[:1], timeout=error.retry_after_s or None)
            else:
                time.sleep(error.retry_after_s)


def _is_done(waiting: "Verdict | Future[Verdict]") -> bool:
    return isinstance(waiting, Verdict) or waiting.done()


def _settle(row: Row, waiting: "Verdict | Future[Verdict]", backend: Backend) -> tuple[Row, Verdict]:
    if isinstance(waiting, Verdict):
        return row, waiting
    try:
        return row, waiting.result()
    except InvalidInput as error:
        if error.reason == "INVALID_OPTION":
            raise
        return row, refused(row, str(error), backend)


def refused(row: Row, problem: str, backend: Backend) -> Verdict:
    """The verdict of a row that could not be checked."""
    pack, policy, model = backend.identity()
    return Verdict(
        request_id=row.request_id if _is_unicode(row.request_id) else "",
        action=Action.NOT_ASSESSED,
        not_assessed=(NotAssessed(NotAssessedReason.BAD_INPUT, visible(problem)),),
        phases=(),
        pack=pack,
        policy=policy,
        model=model,
    )


def as_json(row: Row, verdict: Verdict) -> dict[str, Any]:
    from guard.service.convert import verdict_to_json

    return {"id": row.id, **verdict_to_json(verdict)}


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)
