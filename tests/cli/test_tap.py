"""`guard tap compare`: the same texts in reader mode and through a tap."""

import json

import pytest

from guard.cli import main


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    lines = ["Bake the bread, then let it cool 🙂", "He threatened to break every bone in his body."]
    file.write_text(
        "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(lines)), encoding="utf-8"
    )
    return file


def test_in_float32_a_tap_says_what_reader_mode_says(model_folder, texts, capsys):
    assert main.main(["tap", "compare", "--file", str(texts), "--dtype", "float32", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert (found["dtype"], found["texts"], found["flips"], found["flipped"]) == ("float32", 2, 0, [])
    assert found["hits_jaccard"] > 0.999
    assert found["score_max"] < 1e-4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "found no texts, expected one {id, text} per line"),
        ('{"id": 1, "text": "a"}\n{"id": 2}\n', "texts.jsonl:2: text: found nothing, expected a string"),
    ],
)
def test_a_file_that_cannot_be_compared_is_named(tmp_path, content, message, capsys):
    file = tmp_path / "texts.jsonl"
    file.write_text(content, encoding="utf-8")
    assert main.main(["tap", "compare", "--file", str(file)]) == 1
    assert message in capsys.readouterr().err
