"""Annotators: files that people fill in, and an endpoint, a real HTTP server."""

import json
from itertools import pairwise

import pytest

from guard.errors import InvalidInput, Unavailable
from guard.lab.explain.annotator import Files
from guard.lab.explain.chat import EndpointConfig, read_config
from guard.lab.explain.endpoint import Endpoint
from guard.lab.explain.records import Task
from tests.lab.answering import completion, server


def tasks(count):
    return [Task(id=f"explain/{i}", prompt="explain-1", system="Say it.", user=f"number {i}") for i in range(count)]


def check(task, answer):
    if answer.get("said") != task.user:
        raise InvalidInput(f"said: found {answer.get('said')!r}, expected {task.user!r}")


def nothing(_done, _all):
    pass


def words(text):
    return len(text.split())


def line(number, **other):
    given = {"id": f"explain/{number}", "prompt": "explain-1", "answer": {"said": f"number {number}"}} | other
    return json.dumps(given) + "\n"


# Files


def test_files_hand_out_chunks_and_take_answers_back(tmp_path):
    files = Files(tmp_path, words, name="Ada", chunk=2)
    assert files.answer(tasks(5), check, nothing) == []
    assert files.standing() == (
        f"5 of 5 tasks are open in {tmp_path}/tasks: 0001.jsonl (2), 0002.jsonl (2), 0003.jsonl (1); put answers into "
        f'{tmp_path}/answers, as *.jsonl with a line {{"id": …, "prompt": …, "answer": {{…}}}} each, and run this again'
    )
    assert [json.loads(x)["user"] for x in (tmp_path / "tasks/0002.jsonl").open()] == ["number 2", "number 3"]

    (tmp_path / "answers/any name.jsonl").write_text(line(3) + "\n" + line(0, annotator="Grace"))
    seen = []
    first, second = files.answer(tasks(5), check, lambda *given: seen.append(given))
    assert (first.id, first.annotator, first.answer) == ("explain/0", "Grace", {"said": "number 0"})
    assert (second.id, second.annotator) == ("explain/3", "Ada")
    assert (first.tokens_sent, first.tokens_received) == (2 + 2, 3)  # `{"said": "number 0"}` is three words
    assert seen == [(2, 5)]
    assert "3 of 5 tasks are open" in files.standing()
    assert "0001.jsonl (1), 0002.jsonl (1), 0003.jsonl (1)" in files.standing()

    (tmp_path / "answers/rest.jsonl").write_text(line(1) + line(2, tokens_sent=70, tokens_received=9) + line(4))
    found = files.answer(tasks(5), check, nothing)
    assert (found[2].tokens_sent, found[2].tokens_received) == (70, 9)
    assert files.standing() == "all 5 tasks are answered"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (line(7), "b.jsonl:2: id: found 'explain/7', expected that of a task in {folder}/tasks"),
        (line(1, prompt="explain-0"), "b.jsonl:2: prompt: found 'explain-0', expected 'explain-1', which is asked"),
        (line(0), "b.jsonl:2: explain/0: found a second answer, the first is {folder}/answers/a.jsonl:1"),
        (line(1, answer={"said": "no"}), "b.jsonl:2: explain/1: said: found 'no', expected 'number 1'"),
        (line(1, answer="number 1"), "b.jsonl:2: answer: Input should be an object"),
        (line(1, mood="good"), "b.jsonl:2: mood: Extra inputs are not permitted"),
        ('{"id": "explain/1"\n', "b.jsonl:2: Invalid JSON: EOF while parsing an object at line 2 column 0"),
    ],
)
def test_an_answer_that_does_not_fit_is_named_and_nothing_is_lost(tmp_path, written, message):
    files = Files(tmp_path, words)
    files.answer(tasks(2), check, nothing)
    (tmp_path / "answers/a.jsonl").write_text(line(0))
    (tmp_path / "answers/b.jsonl").write_text("\n" + written)
    with pytest.raises(InvalidInput) as caught:
        files.answer(tasks(2), check, nothing)
    assert str(caught.value) == f"{tmp_path}/answers/" + message.format(folder=tmp_path)
    assert (tmp_path / "answers/a.jsonl").read_text() == line(0)
    assert (tmp_path / "answers/b.jsonl").read_text() == "\n" + written
    (tmp_path / "answers/b.jsonl").unlink()
    assert len(files.answer(tasks(2), check, nothing)) == 1


def test_a_task_that_is_answered_is_not_asked_otherwise(tmp_path):
    files = Files(tmp_path, words)
    files.answer(tasks(3), check, nothing)
    (tmp_path / "answers/a.jsonl").write_text(line(0) + line(1))
    other = [task.model_copy(update={"system": "Say it again."}) for task in tasks(3)]
    with pytest.raises(InvalidInput) as caught:
        files.answer(other, check, nothing)
    assert str(caught.value) == (
        f"{tmp_path}: explain/0 and 1 more have been answered, and are asked otherwise now; "
        "choose another --out, or move the answers away"
    )
    assert len(files.answer([*tasks(2), other[2]], check, nothing)) == 2  # one that is open may change
    assert "Say it again." in (tmp_path / "tasks/0001.jsonl").read_text()


# Endpoint


def echo(_number, body):
    """The right answer, wrapped as chatty models do."""
    asked = body["messages"][1]["content"]
    return 200, {}, completion(f'<think>{{"said": 1}}</think>Sure!\n```json\n{json.dumps({"said": asked})}\n```')


def endpoint(folder, url, **given):
    return Endpoint(folder, EndpointConfig(**{"url": url, "model": "m", "budget_tokens": 10**6, "parallel": 1} | given))


def test_an_endpoint_answers_each_task_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    with server(echo) as (url, requests):
        one = endpoint(tmp_path, url, key_env="MY_KEY", parallel=3, answer_tokens=77, parameters={"top_k": 1})
        found = one.answer(tasks(5), check, nothing)
        assert [a.answer for a in found] == [{"said": f"number {i}"} for i in range(5)]
        assert {(a.annotator, a.tokens_sent, a.tokens_received) for a in found} == {("m", 10, 5)}
        assert one.standing() == "5 of 5 tasks are answered; 50 tokens sent and 25 received in all"
        sent = next(r for r in requests if r["messages"][1]["content"] == "number 2")
        assert sent["messages"] == [{"role": "system", "content": "Say it."}, {"role": "user", "content": "number 2"}]
        assert (sent["model"], sent["max_completion_tokens"], sent["top_k"]) == ("m", 77, 1)
        assert sent["key"] == "Bearer s3cret"

        assert endpoint(tmp_path, url).answer(tasks(6), check, nothing)[:5] == found
        assert len(requests) == 6  # the sixth task, and nothing twice


def test_refusals_and_faults_are_tried_again(tmp_path):
    faults = [(429, {"retry-after-ms": "20"}), (503, {"retry-after": "0.02"}), (500, {"retry-after-ms": "20"})]

    def reply(number, body):
        return (*faults[number], {"error": {"message": "later"}}) if number < 3 else echo(number, body)

    with server(reply) as (url, requests):
        assert len(endpoint(tmp_path, url).answer(tasks(1), check, nothing)) == 1
        assert len(requests) == 4


def test_retry_after_is_waited_for(tmp_path):
    def reply(number, body):
        return (429, {"retry-after": "1"}, {}) if number == 0 else echo(number, body)

    with server(reply) as (url, requests):
        endpoint(tmp_path, url).answer(tasks(1), check, nothing)
        assert requests[1]["at"] - requests[0]["at"] >= 1.0


def test_requests_keep_their_pace_retries_among_them(tmp_path):
    def reply(number, body):
        return (500, {"retry-after-ms": "1"}, {}) if number == 0 else echo(number, body)

    with server(reply) as (url, requests):
        endpoint(tmp_path, url, per_minute=120).answer(tasks(2), check, nothing)
        gaps = [
            b["at"] - a["at"] for a, b in pairwise(requests)
        ]  # half a second each, less what sending the first took
        assert len(gaps) == 2
        assert min(gaps) >= 0.25


def test_an_endpoint_that_gives_up_leaves_what_was_answered(tmp_path):
    def reply(number, body):
        return echo(number, body) if number < 2 else (401, {}, {"error": {"message": "wrong key"}})

    with server(reply) as (url, _):
        with pytest.raises(Unavailable) as caught:
            endpoint(tmp_path, url).answer(tasks(4), check, nothing)
        assert str(caught.value) == (
            f"{url}: Error code: 401 - wrong key; 2 of 4 tasks are answered in "
            f"{tmp_path}/answers/endpoint.jsonl: run this again to go on"
        )
    with server(echo) as (url, requests):
        assert len(endpoint(tmp_path, url).answer(tasks(4), check, nothing)) == 4
        assert len(requests) == 2


def test_nothing_listens_there(tmp_path):
    with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:9/v1: Connection error\.; 0 of 1 tasks are answered"):
        endpoint(tmp_path, "http://127.0.0.1:9/v1", retries=0).answer(tasks(1), check, nothing)


def test_a_server_that_is_none(tmp_path):
    with (
        server(lambda *_: (200, {"content-type": "text/html"}, b"<h1>Hello</h1>")) as (url, _),
        pytest.raises(Unavailable, match="found no chat completion but '<h1>Hello</h1>'; 0 of 1"),
    ):
        endpoint(tmp_path, url).answer(tasks(1), check, nothing)


def test_an_answer_that_does_not_fit_is_asked_for_again_twice(tmp_path):
    def reply(number, body):
        if body["messages"][1]["content"] == "number 0":  # never right
            return 200, {}, completion(["no JSON", '{"said": 1', '{"said": "x"}'][min(number, 2)])
        return echo(number, body)

    with server(reply) as (url, requests):
        one = endpoint(tmp_path, url)
        [found] = one.answer(tasks(2), check, nothing)
        assert found.id == "explain/1"
        assert len(requests) == 4
        assert requests[1]["messages"][2:] == [
            {"role": "assistant", "content": "no JSON"},
            {"role": "user", "content": "That does not fit: found no JSON object (substring not found). Answer again, with one JSON object as asked for and nothing else."},
        ]  # fmt: skip
        assert len(requests[2]["messages"]) == 4
        assert one.standing() == (
            "1 of 2 tasks are answered; 40 tokens sent and 20 received in all; 1 failed (said: found 'x', expected "
            f"'number 0'; more in {tmp_path}/failed.jsonl), run again to retry"
        )
    [failure] = [json.loads(x) for x in (tmp_path / "failed.jsonl").open()]
    assert failure == {
        "id": "explain/0",
        "prompt": "explain-1",
        "annotator": "m",
        "why": "said: found 'x', expected 'number 0'",
        "said": '{"said": "x"}',
        "tokens_sent": 30,
        "tokens_received": 15,
    }
    with server(echo) as (url, requests):
        one = endpoint(tmp_path, url)
        assert len(one.answer(tasks(2), check, nothing)) == 2
        assert one.standing() == "2 of 2 tasks are answered; 50 tokens sent and 25 received in all"


def test_what_the_second_try_brings_is_counted_with_the_first(tmp_path):
    def reply(number, body):
        return (200, {}, completion("{}")) if number == 0 else echo(number, body)

    with server(reply) as (url, _):
        [found] = endpoint(tmp_path, url).answer(tasks(1), check, nothing)
    assert (found.tokens_sent, found.tokens_received) == (20, 10)


def test_a_task_that_the_endpoint_refuses_does_not_stop_the_others(tmp_path):
    def reply(number, body):
        return (400, {}, {"error": {"message": "too long"}}) if number == 0 else echo(number, body)

    with server(reply) as (url, _):
        one = endpoint(tmp_path, url)
        assert [a.id for a in one.answer(tasks(3), check, nothing)] == ["explain/1", "explain/2"]
        assert "1 failed (Error code: 400 - too long; more in" in one.standing()


def test_the_budget_is_never_passed_and_a_later_run_goes_on(tmp_path):
    # A request may cost its bytes (7 + 8), 64 for the template and 100 received: 179. It does cost 110.
    def reply(number, body):
        return 200, {}, completion(echo(number, body)[2]["choices"][0]["message"]["content"], (60, 50))

    with server(reply) as (url, requests):
        one = endpoint(tmp_path, url, answer_tokens=100, budget_tokens=400, parallel=2)
        assert len(one.answer(tasks(5), check, nothing)) == 3  # two at once, and 220 + 179 < 400
        assert len(requests) == 3
        assert one.standing() == (
            "3 of 5 tasks are answered; 180 tokens sent and 150 received in all; "
            "stopped at the budget with 2 open, raise it to go on"
        )
        assert endpoint(tmp_path, url, answer_tokens=100, budget_tokens=400).answer(tasks(5), check, nothing)[3:] == []
        assert len(requests) == 3
        assert len(endpoint(tmp_path, url, answer_tokens=100, budget_tokens=700).answer(tasks(5), check, nothing)) == 5


def test_the_budget_may_be_money(tmp_path):
    with server(lambda n, b: (200, {}, completion(echo(n, b)[2]["choices"][0]["message"]["content"], (10**6, 10**6)))) as (url, requests):  # fmt: skip
        one = endpoint(tmp_path, url, budget_tokens=10**9, budget_money=5.0, price_sent=0.5, price_received=2)
        one.answer(tasks(5), check, nothing)
        assert len(requests) == 2  # 2.50 each
        assert "2,000,000 tokens sent and 2,000,000 received in all, 5.00 in money; stopped" in one.standing()


def test_an_endpoint_that_does_not_tell_its_cost_is_charged_the_most_it_may_be(tmp_path):
    def reply(_number, body):
        return 200, {}, completion(json.dumps({"said": body["messages"][1]["content"]}), None)

    with server(reply) as (url, _):
        [found] = endpoint(tmp_path, url, answer_tokens=100).answer(tasks(1), check, nothing)
    assert (found.tokens_sent, found.tokens_received) == (7 + 8 + 64, 100)


def test_a_line_torn_by_a_kill_is_asked_again(tmp_path):
    with server(echo) as (url, requests):
        endpoint(tmp_path, url).answer(tasks(2), check, nothing)
        file = tmp_path / "answers/endpoint.jsonl"
        file.write_text(file.read_text()[:-30])
        assert len(endpoint(tmp_path, url).answer(tasks(2), check, nothing)) == 2
        assert len(requests) == 3


def test_people_may_answer_what_an_endpoint_left_open(tmp_path):
    with server(echo) as (url, requests):
        endpoint(tmp_path, url).answer(tasks(1), check, nothing)
        (tmp_path / "answers/people.jsonl").write_text(line(1, annotator="Ada"))
        found = endpoint(tmp_path, url).answer(tasks(2), check, nothing)
        assert [a.annotator for a in found] == ["m", "Ada"]
        assert len(requests) == 1


SETTINGS = 'url = "http://127.0.0.1:1/v1"\nmodel = "m"\n'


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "budget_tokens: found nothing, expected a value"),
        ("budget_tokens = -1", "budget_tokens: found -1, expected greater than or equal to 0"),
        ("budget_tokens = 1\nbudget_money = 1.0", "budget_money: found neither price_sent nor price_received, expected a price to count by"),
        ("budget_tokens =", "Invalid value (at end of document)"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(tmp_path, written, message):
    (tmp_path / "e.toml").write_text(SETTINGS + written)
    with pytest.raises(InvalidInput) as caught:
        read_config(tmp_path / "e.toml")
    assert str(caught.value) == f"{tmp_path}/e.toml: {message}"


def test_an_unknown_setting_is_named(tmp_path):
    (tmp_path / "e.toml").write_text(SETTINGS + "budget_tokens = 1\nbugdet = 2")
    with pytest.raises(InvalidInput, match=r"bugdet: found an unknown key, expected one of: url, model, key_env"):
        read_config(tmp_path / "e.toml")


def test_a_key_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(InvalidInput) as caught:
        endpoint(tmp_path, "http://127.0.0.1:9/v1", key_env="NO_KEY")
    assert str(caught.value) == "key_env: found no environment variable NO_KEY, expected the endpoint's key in it"
