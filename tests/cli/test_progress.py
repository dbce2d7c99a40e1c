"""Progress where stderr is no terminal: plain lines, now and then."""

import pytest

from guard.cli import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_and_one_at_the_end(capsys, clock):
    with progress.Progress("harvest", "tokens", 10_000) as shown:
        for second in range(0, 31, 2):
            clock[0] = float(second)
            shown.update(second * 200, note="FVU 0.3")
    assert capsys.readouterr().err.splitlines() == [
        "harvest: 2,000 of 10,000 tokens (20%), 200/s, 0:00:40 left, FVU 0.3",
        "harvest: 4,000 of 10,000 tokens (40%), 200/s, 0:00:30 left, FVU 0.3",
        "harvest: 6,000 of 10,000 tokens (60%), 200/s, 0:00:20 left, FVU 0.3",
        "harvest: 6,000 of 10,000 tokens (60%) in 0:00:30, FVU 0.3",
    ]


def test_without_a_total_there_is_no_time_left(capsys, clock):
    with progress.Progress("check", "rows") as shown:
        clock[0] = 10.0
        shown.update(50)
    assert capsys.readouterr().err.splitlines() == ["check: 50 rows, 5/s", "check: 50 rows in 0:00:10"]


def test_an_error_is_the_last_word(capsys):
    with pytest.raises(ValueError, match="x"), progress.Progress("check", "rows"):
        raise ValueError("x")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    with progress.Progress("train", "tokens", 100) as shown:
        shown.update(100, note="FVU 0.3")
    found = capsys.readouterr()
    assert found.out == ""
    assert "100 tokens" in found.err
    assert "FVU 0.3" in found.err


@pytest.mark.parametrize(("seconds", "expected"), [(0, "0:00:00"), (61.9, "0:01:01"), (36_000, "10:00:00")])
def test_durations(seconds, expected):
    assert progress.duration(seconds) == expected
