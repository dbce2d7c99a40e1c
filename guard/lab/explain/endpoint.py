"""The annotator that asks an endpoint: within a budget, writing each answer down at once, going on where it was."""

import json
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import openai
from pydantic import BaseModel, ConfigDict

from guard.errors import InvalidInput, Unavailable
from guard.lab.explain.annotator import CHUNK, Check, Progress, collect, hand_out
from guard.lab.explain.chat import Chat, Cost, EndpointConfig, Messages
from guard.lab.explain.records import Answer, Task, read

_ATTEMPTS = 3  # of one task, where the answer does not fit


class Failure(BaseModel):
    """A line of `failed.jsonl`: a task that got no answer that fits, and what was paid for it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    prompt: str
    annotator: str
    why: str
    said: str
    tokens_sent: int
    tokens_received: int


@dataclass(frozen=True)
class _Request:
    """A task on its way, with what its earlier attempts said and cost."""

    task: Task
    messages: Messages
    attempt: int = 1
    cost: Cost = field(default_factory=Cost)
    said: str = ""
    why: str = ""

    @classmethod
    def first(cls, task: Task) -> "_Request":
        return cls(task, ({"role": "system", "content": task.system}, {"role": "user", "content": task.user}))

    def again(self) -> "_Request":
        complaint = f"That does not fit: {self.why}. Answer again, with one JSON object as asked for and nothing else."
        said = ({"role": "assistant", "content": self.said}, {"role": "user", "content": complaint})
        messages = (*_Request.first(self.task).messages, *said)
        return replace(self, messages=messages, attempt=self.attempt + 1)


@dataclass
class _Run:
    waiting: deque[_Request]
    found: dict[str, Answer]
    failures: list[Failure] = field(default_factory=list)
    broken: openai.OpenAIError | None = None  # nothing more is asked


class Endpoint:
    """Asks for what `folder/answers` does not hold yet; see guard.lab.explain.annotator for the folder's form."""

    def __init__(self, folder: Path, config: EndpointConfig) -> None:
        """Raises InvalidInput where the environment does not hold the endpoint's key."""
        self.name = config.model
        self._folder, self._config, self._chat = folder, config, Chat(config)
        self._answers, self._failed = folder / "answers" / "endpoint.jsonl", folder / "failed.jsonl"
        self._spent = Cost()
        self._standing = ""

    def answer(self, tasks: Sequence[Task], check: Check, progress: Progress) -> list[Answer]:
        """Asks nothing that could pass the budget. Raises Unavailable where the endpoint refuses all, or is away.

        Either way what has been answered is kept, and a later call asks only for the rest.
        """
        for file in (self._answers, self._failed):
            _drop_torn_line(file)
        found = collect(self._folder, tasks, check)
        hand_out(self._folder, tasks, found, CHUNK)
        self._spent = sum((Cost(line.tokens_sent, line.tokens_received) for line in self._paid_for()), Cost())
        run = _Run(deque(_Request.first(task) for task in tasks if task.id not in found), found)
        progress(len(found), len(tasks))
        self._work(run, check, lambda: progress(len(found), len(tasks)))
        if run.broken is not None:
            raise Unavailable(
                f"{self._config.url}: {run.broken}; {len(found)} of {len(tasks)} tasks are answered in "
                f"{self._answers}: run this again to go on"
            )
        self._standing = self._told(run, len(tasks))
        return [found[task.id] for task in tasks if task.id in found]

    def standing(self) -> str:
        return self._standing

    def _work(self, run: _Run, check: Check, progress: Callable[[], None]) -> None:
        running: dict[Future[tuple[str, Cost]], _Request] = {}
        with ThreadPoolExecutor(self._config.parallel) as pool:
            while True:
                while run.waiting and run.broken is None and self._has_room(run.waiting[0], running.values()):
                    request = run.waiting.popleft()
                    running[pool.submit(self._chat.ask, request.messages)] = request
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._settle(running.pop(future), future, run, check)
                    progress()
        for request in run.waiting:
            if request.attempt > 1:  # paid for, and no answer yet
                self._fail(request, run)

    def _has_room(self, request: _Request, running: Collection[_Request]) -> bool:
        if len(running) >= self._config.parallel:
            return False
        most = sum((self._chat.bound(r.messages) for r in (request, *running)), self._spent)
        return most.within_budget(self._config)

    def _settle(self, request: _Request, future: Future[tuple[str, Cost]], run: _Run, check: Check) -> None:
        """One attempt has ended: with an answer, with another attempt, or with a failure."""
        try:
            said, cost = future.result()
            self._spent += cost
            request = replace(request, said=said, cost=request.cost + cost)
            answer = self._answer(request)
            check(request.task, answer.answer)
            _append(self._answers, answer)
            run.found[request.task.id] = answer
        except InvalidInput as error:
            request = replace(request, why=str(error))
            if request.attempt < _ATTEMPTS:
                run.waiting.appendleft(request.again())
            else:
                self._fail(request, run)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:  # this task, not the endpoint
            self._fail(replace(request, why=str(error)), run)
        except openai.OpenAIError as error:
            run.broken = error
            run.waiting.append(request)

    def _answer(self, request: _Request) -> Answer:
        return Answer(
            id=request.task.id,
            prompt=request.task.prompt,
            annotator=self.name,
            answer=_json_object(request.said),
            tokens_sent=request.cost.sent,
            tokens_received=request.cost.received,
        )

    def _fail(self, request: _Request, run: _Run) -> None:
        failure = Failure(
            id=request.task.id,
            prompt=request.task.prompt,
            annotator=self.name,
            why=request.why,
            said=request.said,
            tokens_sent=request.cost.sent,
            tokens_received=request.cost.received,
        )
        _append(self._failed, failure)
        run.failures.append(failure)

    def _paid_for(self) -> list[Answer | Failure]:
        answers = read(self._answers, Answer) if self._answers.exists() else []
        return [*answers, *(read(self._failed, Failure) if self._failed.exists() else [])]

    def _told(self, run: _Run, asked: int) -> str:
        told = f"{len(run.found)} of {asked} tasks are answered"
        told += f"; {self._spent.sent:,} tokens sent and {self._spent.received:,} received in all"
        if money := self._spent.money(self._config):
            told += f", {money:.2f} in money"
        if run.failures:
            told += f"; {len(run.failures)} failed ({run.failures[0].why}; more in {self._failed}), run again to retry"
        if left := asked - len(run.found) - len(run.failures):
            told += f"; stopped at the budget with {left} open, raise it to go on"
        return told


def _json_object(said: str) -> dict[str, Any]:
    """The first JSON object of a reply, whatever stands around it; a reasoning model's thoughts are passed over."""
    text = said.rpartition("</think>")[2]
    try:
        found = json.JSONDecoder().raw_decode(text[text.index("{") :])[0]
    except ValueError as error:
        raise InvalidInput(f"found no JSON object ({error})") from None
    return dict(found)


def _append(file: Path, record: BaseModel) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(record.model_dump_json() + "\n")


def _drop_torn_line(file: Path) -> None:
    """A run that was killed while it wrote leaves a line without its end."""
    if file.exists() and not (content := file.read_bytes()).endswith(b"\n"):
        file.write_bytes(content[: content.rfind(b"\n") + 1])
