"""Progress on stderr: a bar with the time left on a terminal, a plain line every 10 seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

PLAIN_SECONDS = 10.0


class Progress:
    """`with Progress("harvest", "tokens") as progress: ... progress.update(done, total)`; total None: not known."""

    def __init__(self, label: str, unit: str, total: int | None = None) -> None:
        self._label, self._unit = label, unit
        self._done, self._total, self._note = 0, total, ""
        self._bar: RichProgress | None = None
        self._started = self._said = 0.0
        self._said_done = 0  # speed is told over the time since the last line: a resumed run starts with a jump

    def __enter__(self) -> Self:
        self._started = self._said = time.monotonic()
        if sys.stderr.isatty():
            self._bar = self._make_bar()
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._say(last=True)

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        self._done, self._total, self._note = done, total or self._total, note
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self._total, note=note)
        elif time.monotonic() - self._said >= PLAIN_SECONDS:
            self._say()

    def _make_bar(self) -> "RichProgress":
        from rich import progress

        from guard.cli.terminal import err

        return progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.TaskProgressColumn(show_speed=True),
            progress.TextColumn("{task.completed:,.0f} " + self._unit, markup=False),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}", markup=False),
            console=err(),
            # Rich would send stdout through the bar's console; only right where both are the same terminal.
            redirect_stdout=sys.stdout.isatty(),
        )

    def _say(self, *, last: bool = False) -> None:
        now = time.monotonic()
        line = f"{self._label}: {self._done:,}"
        line += (
            f" of {self._total:,} {self._unit} ({self._done / self._total:.0%})" if self._total else f" {self._unit}"
        )
        speed = (self._done - self._said_done) / max(now - self._said, 1e-9)
        if last:
            line += f" in {duration(now - self._started)}"
        elif speed > 0:
            line += f", {speed:,.0f}/s"
            line += f", {duration((self._total - self._done) / speed)} left" if self._total else ""
        print(line + (f", {self._note}" if self._note else ""), file=sys.stderr, flush=True)
        self._said, self._said_done = now, self._done


def duration(seconds: float) -> str:
    """`1:02:03`, hours first."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
