"""`guard check --file`: many rows through one assessor, in order, with many in flight so that they are batched."""

import codecs
import json
import math
import os
import select
import stat
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from guard.cli import inputs
from guard.cli.backend import Backend
from guard.cli.terminal import visible
from guard.errors import Exhausted, GuardError, InvalidInput
from guard.records import Action, CheckInput, CheckOptions, NotAssessed, NotAssessedReason, Verdict

WINDOW = 4096  # rows in flight at most, however large the queue is
_PAUSE_SECONDS, _PIPE_BYTES = 0.01, 1 << 16
_OF_ONE_ROW = ("INTERNAL", "DEADLINE_EXCEEDED")  # reasons of a sidecar that failed at this row and answers the next


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the file, from 1. `problem` is empty where it can be checked; `id` is what the line said, or None."""

    id: str | int | float | None
    text: str = ""
    problem: str = ""
    line: int = 0

    @property
    def request_id(self) -> str:
        return "" if self.id is None else self.id if isinstance(self.id, str) else json.dumps(self.id)


def read(stream: BinaryIO) -> Iterator[Row]:
    """The rows of a JSONL file. Lines end at a line feed only; lines of white space are not rows."""
    return (row for row in arriving(stream) if row is not None)


def arriving(stream: BinaryIO) -> Iterator[Row | None]:
    """The rows of a JSONL file or pipe, and None now and then while a pipe is open and nothing comes."""
    number = 0
    for line in _lines(stream):
        if line is None:
            yield None
            continue
        number += 1
        raw = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if raw.strip():
            yield replace(parse(raw), line=number)


def _lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """As `arriving`. Reads a pipe past the stream's own buffer, of which none must have been read before."""
    try:
        pipe = None if stat.S_ISREG(os.fstat(stream.fileno()).st_mode) else stream.fileno()
    except OSError:  # in memory
        pipe = None
    if pipe is None:
        yield from stream
        return
    begun: list[bytes] = []  # of a line, in pieces
    while True:
        if not select.select([pipe], [], [], _PAUSE_SECONDS)[0]:
            yield None
            continue
        if not (part := os.read(pipe, _PIPE_BYTES)):
            break
        first, *others = part.split(b"\n")
        begun.append(first)
        for piece in others:
            yield b"".join(begun)
            begun = [piece]
    if last := b"".join(begun):
        yield last


def count(file: Path) -> int:
    with file.open("rb") as stream:
        return sum(1 for line in stream if line.strip())


def parse(raw: bytes) -> Row:
    try:
        values = json.loads(inputs.decode(raw.strip(), "it"))
    except InvalidInput as error:
        return Row(None, problem=str(error))
    except json.JSONDecodeError as error:
        return Row(None, problem=f"not valid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Row(None, problem=f"not valid JSON: {error}")
    if not isinstance(values, dict):
        return Row(None, problem=f"found {inputs.kind(values)}, expected an object with id and text")
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


def assess(rows: Iterable[Row | None], backend: Backend, options: CheckOptions) -> Iterator[tuple[Row, Verdict]]:
    """A verdict for each row, in order. A row that cannot be checked gets a not_assessed verdict, and the run goes on.

    So does a row at which the reader fails or is slower than the deadline. None in place of a row says that the next
    one takes a while: verdicts that are ready are not held back for it.
    Raises NotFound (a domain) and errors that are not of one row, such as a sidecar that went away.
    """
    window = max(1, min(backend.window, WINDOW))
    flight: deque[tuple[Row, Verdict | Future[Verdict]]] = deque()
    try:
        for row in rows:
            while flight and (len(flight) >= window or _is_done(flight[0][1])):
                yield _settle(*flight.popleft(), backend)
            if row is None:
                continue
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
        return refused(row, row.problem, NotAssessedReason.BAD_INPUT, backend)
    asked = CheckOptions(options.domains, options.max_attributions, options.token_detail, row.request_id)
    while True:
        try:
            return backend.submit(CheckInput(prompt=row.text), asked)
        except InvalidInput as error:
            return _failed(row, error, backend)
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
    except Exception as error:  # noqa: BLE001 - one row's failure is not the run's
        return row, _failed(row, error, backend)


def _failed(row: Row, error: Exception, backend: Backend) -> Verdict:
    """The verdict of a row whose check raised `error`, which is raised again where every row would meet it."""
    if isinstance(error, InvalidInput) and error.reason != "INVALID_OPTION":
        return refused(row, str(error), NotAssessedReason.BAD_INPUT, backend)
    if isinstance(error, GuardError):
        if error.reason not in _OF_ONE_ROW:
            raise error
        return refused(row, str(error), NotAssessedReason.READER_FAILED, backend)
    return refused(row, f"{type(error).__name__}: {error}", NotAssessedReason.READER_FAILED, backend)


def refused(row: Row, problem: str, reason: NotAssessedReason, backend: Backend) -> Verdict:
    """The verdict of a row that could not be checked; it says which line of the file that was."""
    pack, policy, model = backend.identity()
    return Verdict(
        request_id=row.request_id if _is_unicode(row.request_id) else "",
        action=Action.NOT_ASSESSED,
        not_assessed=(NotAssessed(reason, visible(f"line {row.line}: {problem}")),),
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
