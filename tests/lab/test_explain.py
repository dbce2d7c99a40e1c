"""The explain prompt, what it takes for an answer, and the command from latents to explanations."""

import json

import pytest

from guard.cli import lab_explain
from guard.cli.main import main
from guard.errors import InvalidInput
from guard.lab.explain import prompts
from guard.lab.explain.annotator import CHUNK, UNNAMED
from guard.lab.explain.explain import prepare
from guard.lab.explain.records import Evidence, Explanation, Window, read
from tests.cli.test_lab import defaults
from tests.lab import told
from tests.lab.answering import completion, server

GOOD = {
    "explanation": "A storm at sea.",
    "domains": ["violence"],
    "subdomains": ["conflict_incident"],
    "surface_form": False,
    "confidence": 0.8,
}


def window(kind, part, tokens, values):
    return Window(kind=kind, part=part, source="own", tokens=tuple(tokens), values=tuple(values))


def test_what_is_asked():
    windows = (
        window("top", "show", ["A", " big", " storm", "\n", "came"], [0, 0.2, 2.0, 0, 0.02]),
        window("top", "test", [" hidden"], [1.0]),
        window("middle", "show", [" storm"], [1.1]),
        window("near_miss", "show", [" a", " storm", " of", " laughter"], [0, 0, 0, 0]),
        window("near_miss", "test", [" hidden"], [0]),
    )
    evidence = Evidence(
        latent="model.layers.1/7", sae="tiny", firing_rate=0.00123, output_tokens=(" sea", "\n"), windows=windows
    )
    task = prompts.task(evidence)
    assert (task.id, task.prompt) == ("explain/model.layers.1/7", "explain-1")
    assert task.user == (
        "Fires, strongest first:\n"
        "1. A ⟦big storm|10⟧⏎⟦came|1⟧\n"
        "\n"
        "Fires at middling strength:\n"
        "1. ⟦storm|6⟧\n"
        "\n"
        "Almost fires, but does not:\n"
        "1. a storm of laughter\n"
        "\n"
        "It fires at 0.123% of the tokens of ordinary text.\n"
        'Tokens that it makes likelier to come next: " sea", "⏎"'
    )
    assert "violence: insult, physical_violence, criminal_offence, cybersecurity, conflict_incident\n" in task.system


def test_the_taxonomy_is_that_of_the_pairs():
    known = prompts.taxonomy()
    assert list(known) == ["pornography", "politics", "violence", "terror"]
    assert sum(map(len, known.values())) == 17


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"explanation": "  "}, "explanation: String should have at least 1 character"),
        ({"confidence": 1.2}, "confidence: Input should be less than or equal to 1"),
        ({"mood": "good"}, "mood: Extra inputs are not permitted"),
        ({"domains": "violence"}, "domains: Input should be a valid tuple"),
        (
            {"domains": ["weather"]},
            "domains: found 'weather', expected some of pornography, politics, violence, terror",
        ),
        (
            {"domains": ["terror"]},
            "subdomains: found 'conflict_incident', expected some of terrorism, religious_oppression, extremist_activities, weapons",
        ),
        ({"domains": []}, "subdomains: found 'conflict_incident', expected none, since there is no domain"),
    ],
)
def test_answers_that_were_not_asked_for(change, message):
    with pytest.raises(InvalidInput) as caught:
        prompts.said(GOOD | change)
    assert str(caught.value) == message


def test_an_answer_without_a_key_is_refused():
    with pytest.raises(InvalidInput, match="surface_form: Field required"):
        prompts.said({key: value for key, value in GOOD.items() if key != "surface_form"})


@pytest.fixture
def world(tmp_path):
    folder = told.model(tmp_path / "model")
    texts = [told.own(f"Boat {i} met a storm={1 + i / 10}/{1 + i / 20} at sea") for i in range(4)]
    told.harvested(tmp_path / "texts", [*texts, told.own("All is calm"), told.own("Nobody sailed")], folder)
    told.suite(tmp_path / "saes")
    told.latents(tmp_path / "candidates.jsonl", [0, 1, 2])
    return tmp_path


def command(world, *more):
    given = {
        "--saes": world / "saes",
        "--texts": world / "texts",
        "--latents": world / "candidates.jsonl",
        "--out": world / "out",
    }
    return main(["lab", "explain", *(str(x) for pair in given.items() for x in pair), *more])


def answer(latent, **change):
    line = {"id": f"explain/model.layers.1/{latent}", "prompt": "explain-1", "answer": GOOD | change}
    return json.dumps(line) + "\n"


def test_the_command_from_latents_to_explanations(world, capsys):
    assert command(world) == 0
    out = capsys.readouterr().out
    assert f"2 of 2 tasks are open in {world}/out/tasks: 0001.jsonl (2); put answers into" in out
    assert f"{world}/out/explanations.jsonl: 0 of 3 latents explained (1 fire in no text), 0 tokens" in out

    answers = world / "out/answers"
    (answers / "mine.jsonl").write_text(answer(0) + answer(1, domains=["weather"]))
    assert command(world) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"guard: error: {answers}/mine.jsonl:2: explain/model.layers.1/1: domains: found 'weather', "
        "expected some of pornography, politics, violence, terror"
    )

    (answers / "mine.jsonl").write_text(answer(0) + answer(1, domains=[], subdomains=[], surface_form=True))
    assert command(world, "--by", "Ada") == 0
    assert "2 of 3 latents explained (1 fire in no text)" in capsys.readouterr().out
    first, second = read(world / "out/explanations.jsonl", Explanation)
    assert first == Explanation(latent="model.layers.1/0", sae=told.SAE, annotator="Ada", prompt="explain-1", **GOOD)
    assert (second.latent, second.domains, second.surface_form) == ("model.layers.1/1", (), True)


def test_the_command_asks_an_endpoint(world, capsys, tmp_path):
    settings = 'model = "m"\nbudget_tokens = 100000\nprice_sent = 1.0\nparallel = 1\n'
    with server(lambda *_: (200, {}, completion(json.dumps(GOOD), (20000, 30)))) as (url, requests):
        (tmp_path / "endpoint.toml").write_text(f'url = "{url}"\n' + settings)
        assert command(world, "--annotator", str(tmp_path / "endpoint.toml")) == 0
    out = capsys.readouterr().out
    assert "2 of 2 tasks are answered; 40,000 tokens sent and 60 received in all, 0.04 in money\n" in out
    assert "2 of 3 latents explained (1 fire in no text), 40,060 tokens" in out
    assert "⟦storm|10⟧" in requests[0]["messages"][1]["content"]


def test_settings_of_an_endpoint_that_are_not_there(world, capsys):
    assert command(world, "--annotator", "none.toml") == 1
    assert "none.toml: found no such file, expected an endpoint's TOML file" in capsys.readouterr().err


def test_defaults_of_the_command_are_those_of_the_stage():
    known = {k: v for k, v in defaults(prepare).items() if k not in {"progress", "names"}}
    shown = defaults(lab_explain.explain)
    assert {k: shown[k] for k in known} == known
    assert (shown["by"], shown["chunk"]) == (UNNAMED, CHUNK)
