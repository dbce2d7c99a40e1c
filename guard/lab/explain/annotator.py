"""Annotators: whoever answers tasks. People, or a model elsewhere, by files; or an endpoint (see its own module).

Each works in a folder of the same form, so that what one leaves open another can answer:

    tasks/0001.jsonl …   what is asked, in chunks that a person or a model takes one at a time
    answers/*.jsonl      what came back, under any file name; a line needs `id`, `prompt` and `answer`
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from guard.errors import InvalidInput
from guard.lab.explain.records import Answer, Task, numbered, read, write

Check = Callable[[Task, dict[str, Any]], None]  # raises InvalidInput for an answer that the prompt did not ask for
Progress = Callable[[int, int], None]  # tasks answered, tasks in all
Count = Callable[[str], int]  # tokens of a text

CHUNK = 20
UNNAMED = "not named"
_NAMED = 5  # chunks that a message names


class Annotator(Protocol):
    name: str

    def answer(self, tasks: Sequence[Task], check: Check, progress: Progress) -> list[Answer]:
        """What has been answered, now or before, in the order of the tasks; what is still open is absent.

        Raises InvalidInput for an answer that does not fit, naming its file and line.
        """
        ...

    def standing(self) -> str:
        """What the last call left open, where, and what to do about it; what it cost where that is known."""
        ...


class Files:
    """Hands tasks out as files and takes answers back as files. Tokens are counted where a line does not state them."""

    def __init__(self, folder: Path, count: Count, *, name: str = UNNAMED, chunk: int = CHUNK) -> None:
        self.name = name
        self._folder, self._count, self._chunk = folder, count, chunk
        self._standing = ""

    def answer(self, tasks: Sequence[Task], check: Check, progress: Progress) -> list[Answer]:
        found = collect(self._folder, tasks, check, self.name)
        hand_out(self._folder, tasks, found, self._chunk)
        self._standing = self._what_is_open(tasks, found)
        progress(len(found), len(tasks))
        return [self._counted(task, found[task.id]) for task in tasks if task.id in found]

    def standing(self) -> str:
        return self._standing

    def _counted(self, task: Task, answer: Answer) -> Answer:
        if answer.tokens_sent or answer.tokens_received:
            return answer
        sent = self._count(task.system) + self._count(task.user)
        received = self._count(json.dumps(answer.answer, ensure_ascii=False))
        return answer.model_copy(update={"tokens_sent": sent, "tokens_received": received})

    def _what_is_open(self, tasks: Sequence[Task], found: dict[str, Answer]) -> str:
        open_ = {name: sum(task.id not in found for task in part) for name, part in _chunks(tasks, self._chunk).items()}
        waiting = [f"{name} ({count})" for name, count in open_.items() if count]
        if not waiting:
            return f"all {len(tasks)} tasks are answered"
        more = f" and {len(waiting) - _NAMED} more" if len(waiting) > _NAMED else ""
        return (
            f"{len(tasks) - len(found)} of {len(tasks)} tasks are open in {self._folder / 'tasks'}: "
            f"{', '.join(waiting[:_NAMED])}{more}; put answers into {self._folder / 'answers'}, as *.jsonl with a line "
            '{"id": …, "prompt": …, "answer": {…}} each, and run this again'
        )


class _Line(Answer):
    """An answer as a person may write it: who gave it need not stand in each line."""

    annotator: str = ""


def collect(folder: Path, tasks: Sequence[Task], check: Check, name: str = UNNAMED) -> dict[str, Answer]:
    """The answers in `folder/answers` by task; those that name no annotator are given `name`.

    Raises InvalidInput naming the file and line of an answer to no task, to another version of the prompt, to a task
    that has one already, or that `check` refuses. Files are only read.
    """
    asked = {task.id: task for task in tasks}
    found: dict[str, Answer] = {}
    places: dict[str, str] = {}
    for file in sorted((folder / "answers").glob("*.jsonl")):
        for number, line in numbered(file, _Line):
            place = f"{file}:{number}"
            task = asked.get(line.id)
            if task is None:
                raise InvalidInput(f"{place}: id: found {line.id!r}, expected that of a task in {folder / 'tasks'}")
            if line.prompt != task.prompt:
                raise InvalidInput(f"{place}: prompt: found {line.prompt!r}, expected {task.prompt!r}, which is asked")
            if line.id in places:
                raise InvalidInput(f"{place}: {line.id}: found a second answer, the first is {places[line.id]}")
            try:
                check(task, line.answer)
            except InvalidInput as error:
                raise InvalidInput(f"{place}: {line.id}: {error}") from None
            places[line.id] = place
            found[line.id] = Answer(**line.model_dump() | {"annotator": line.annotator or name})
    return found


def hand_out(folder: Path, tasks: Sequence[Task], answered: dict[str, Answer], chunk: int = CHUNK) -> None:
    """Writes `folder/tasks`. Raises InvalidInput where a task has been answered and is asked otherwise now."""
    for name in ("tasks", "answers"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    before = sorted((folder / "tasks").glob("*.jsonl"))
    known = {task.id: task for file in before for task in read(file, Task)}
    if changed := [task.id for task in tasks if task.id in answered and known.get(task.id, task) != task]:
        raise InvalidInput(
            f"{folder}: {changed[0]} and {len(changed) - 1} more have been answered, and are asked otherwise now; "
            f"choose another --out, or move the answers away"
        )
    chunks = _chunks(tasks, chunk)
    for name, part in chunks.items():
        write(folder / "tasks" / name, part)
    for file in before:
        if file.name not in chunks:
            file.unlink()


def _chunks(tasks: Sequence[Task], size: int) -> dict[str, Sequence[Task]]:
    """Tasks by the name of the file that they stand in."""
    return {f"{1 + at // size:04d}.jsonl": tasks[at : at + size] for at in range(0, len(tasks), size)}
