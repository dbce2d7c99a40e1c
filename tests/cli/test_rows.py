"""`guard check --file`: what is a row, and that order, ids and the run survive whatever stands in the file."""

import io
import json
import os
import threading
from concurrent.futures import Future

import pytest

from guard.cli import rows
from guard.cli.backend import Local
from guard.errors import Exhausted, InvalidInput, NotFound
from guard.records import Action, CheckOptions, NotAssessed, NotAssessedReason
from tests.service.running import make_config
from tests.service.standin import StandIn


@pytest.mark.parametrize(
    ("line", "found", "problem"),
    [
        (b'{"id": "a", "text": "x", "label": 1}', "a", ""),
        (b'{"id": 7, "text": "x"}', 7, ""),
        (b'{"text": "x"}', None, ""),
        (b'{"id": null, "text": "\xe6\x9c\x8b\xe5\x8f\x8b\xe2\x80\xa8"}', None, ""),
        (b"{", None, "not valid JSON: Expecting property name enclosed in double quotes at column 2"),
        (b"[" * 100_000, None, "not valid JSON: maximum recursion depth exceeded"),
        (b'"text"', None, "found a string, expected an object with id and text"),
        (b'{"id": "a\xff"}', None, "it is not valid UTF-8: byte 0xff at offset 9"),
        (b'{"id": "a"}', "a", "text: found nothing, expected a string"),
        (b'{"id": "a", "text": null}', "a", "text: found null, expected a string"),
        (b'{"id": "a", "text": ["x"]}', "a", "text: found a list, expected a string"),
        (b'{"id": ["a"], "text": "x"}', None, "id: found a list, expected a string or a finite number"),
        (b'{"id": true, "text": "x"}', None, "id: found a boolean, expected a string or a finite number"),
        (b'{"id": NaN, "text": "x"}', None, "id: found a number, expected a string or a finite number"),
        (b'{"id": "\\ud800", "text": "x"}', "\ud800", "id is not valid Unicode: it holds a lone surrogate"),
    ],
)  # fmt: skip
def test_a_line(line, found, problem):
    row = rows.parse(line)
    assert (row.id, row.problem) == (found, problem) or row.problem.startswith(problem)
    assert row.id == found
    assert bool(row.problem) == bool(problem)


def test_lines_end_at_line_feeds_only_and_blank_ones_are_no_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes('\ufeff{"id": 1, "text": "a\u2028b"}\r\n\n  \n{"id": 2, "text": "c"}'.encode())
    with file.open("rb") as stream:
        assert [(row.id, row.text) for row in rows.read(stream)] == [(1, "a\u2028b"), (2, "c")]
    assert rows.count(file) == 2


def test_the_verdict_of_a_pipes_row_does_not_wait_for_the_next_row(backend):
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream, os.fdopen(writing, "wb", buffering=0) as program:
        verdicts = rows.assess(rows.arriving(stream), backend, CheckOptions())
        for number in range(3):  # a program that waits for each verdict before it writes another row
            line = json.dumps({"id": number, "text": "block" if number else "hello"}).encode()
            program.write(line[:7])
            program.write(line[7:] + b"\n")
            row, verdict = next(verdicts)
            assert (row.id, row.line, verdict.action) == (number, number + 1, "block" if number else "allow")
        program.write(b'\n{"id": "last", "text": "x"}')
        program.close()
        assert [row.id for row, _ in verdicts] == ["last"]


@pytest.fixture
def backend():
    return Local(StandIn(make_config(reader={"queue_size": 4}, limits={"text_bytes": 50})))


def run(lines, backend, **options):
    stream = io.BytesIO(
        b"\n".join(json.dumps(line).encode() if not isinstance(line, bytes) else line for line in lines)
    )
    return list(rows.assess(rows.read(stream), backend, CheckOptions(**options)))


def test_order_and_ids_hold_when_later_rows_are_ready_first(backend):
    lines = [{"id": i, "text": "sleep 0.2" if i in (0, 5) else "x"} for i in range(12)]
    done = run(lines, backend)
    assert [row.id for row, _ in done] == list(range(12))
    assert [verdict.request_id for _, verdict in done] == [str(i) for i in range(12)]


def test_a_bad_row_keeps_its_place_and_the_run_goes_on(backend):
    done = run(
        [
            {"id": "a", "text": "block me"},
            b"{",
            {"id": "e", "text": ""},
            {"id": "l", "text": "x" * 51},
            {"id": "z", "text": "x"},
        ],
        backend,
    )
    assert [v.action for _, v in done] == [Action.BLOCK, *[Action.NOT_ASSESSED] * 3, Action.ALLOW]
    reasons = [(n.reason, n.detail) for _, v in done for n in v.not_assessed]
    assert [reason for reason, _ in reasons] == [NotAssessedReason.BAD_INPUT] * 3
    assert [detail for _, detail in reasons] == [
        "line 2: not valid JSON: Expecting property name enclosed in double quotes at column 2",
        "line 3: prompt: found an empty text, expected text",
        "line 4: the limit is 50 (limits.text_bytes)",
    ]
    line = rows.as_json(*done[2])
    assert (line["id"], line["request_id"], line["action"]) == ("e", "e", "ACTION_NOT_ASSESSED")
    assert line["pack"]["id"] == "stand-in"


def test_no_more_rows_are_in_flight_than_the_queue_takes(backend):
    most = 0
    submit = backend.submit

    def counting(given, options):
        nonlocal most
        future = submit(given, options)
        most = max(most, backend._assessor.queue_depth)
        return future

    backend.submit = counting
    run([{"id": i, "text": "sleep 0.02"} for i in range(20)], backend)
    assert most == 4


def test_a_full_queue_is_waited_for(backend):
    submit, refusals = backend.submit, iter([True, True, False] * 20)

    def sometimes(given, options):
        if next(refusals):
            raise Exhausted("the queue is full", retry_after_s=0.01)
        return submit(given, options)

    backend.submit = sometimes
    done = run([{"id": i, "text": "x"} for i in range(10)], backend)
    assert [v.action for _, v in done] == [Action.ALLOW] * 10


def test_what_is_wrong_with_every_row_ends_the_run(backend):
    backend._assessor.error = NotFound("unknown domain 'x'")
    with pytest.raises(NotFound, match="unknown domain"):
        run([{"id": 1, "text": "x"}], backend)
    backend._assessor.error = InvalidInput("max_attributions: found 1000", reason="INVALID_OPTION")
    with pytest.raises(InvalidInput, match="max_attributions"):
        run([{"id": 1, "text": "x"}], backend)


def test_a_row_whose_trouble_shows_late_keeps_its_place_too(backend):
    def late(given, _options):
        future = Future()
        error = InvalidInput(f"no: {given.prompt}")
        threading.Timer(0.05, lambda: future.set_exception(error)).start()
        return future

    backend.submit = late
    done = run([{"id": 1, "text": "x"}], backend)
    assert [n.detail for n in done[0][1].not_assessed] == ["line 1: no: x"]


def test_a_row_at_which_the_reader_fails_is_not_assessed_and_the_run_goes_on(backend):
    submit = backend.submit

    def failing(given, options):
        if given.prompt != "fail":
            return submit(given, options)
        future = Future()
        future.set_exception(RuntimeError("out of memory"))
        return future

    backend.submit = failing
    done = run([{"id": 1, "text": "x"}, b"", {"id": 2, "text": "fail"}, {"id": 3, "text": "block"}], backend)
    assert [v.action for _, v in done] == [Action.ALLOW, Action.NOT_ASSESSED, Action.BLOCK]
    assert done[1][1].not_assessed == (
        NotAssessed(NotAssessedReason.READER_FAILED, "line 3: RuntimeError: out of memory"),
    )
