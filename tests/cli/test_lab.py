"""`guard lab`: the flags' defaults are those of the functions, and the flags reach them."""

import gzip
import inspect

import pytest

from guard.cli import lab
from guard.cli.options import UsageError


def defaults(command):
    return {
        k: p.default
        for k, p in inspect.signature(command).parameters.items()
        if p.default is not inspect.Parameter.empty
    }


def test_defaults_of_harvest():
    from guard.lab.harvest import harvest
    from guard.reader.weights import DEFAULT_MODEL

    known = defaults(harvest)
    assert {k: v for k, v in defaults(lab.harvest).items() if k in known} == {
        k: v for k, v in known.items() if k != "progress"
    }
    assert defaults(lab.harvest)["model"] == DEFAULT_MODEL


def test_defaults_of_train():
    from guard.lab.train import TrainConfig

    fields = {name: field.default for name, field in TrainConfig.model_fields.items() if name != "hook_points"}
    given = {k: v for k, v in defaults(lab.train).items() if k != "hook_point"}
    assert given == {k: fields[k] for k in given}


def test_a_corpus_is_files_and_folders_of_them(tmp_path):
    for name in ("b.txt", "a.txt.gz", "notes.md"):
        (tmp_path / name).write_bytes(gzip.compress(b"x"))
    assert lab.corpus_files([tmp_path]) == [tmp_path / "a.txt.gz", tmp_path / "b.txt"]
    assert lab.corpus_files([tmp_path / "notes.md"]) == [tmp_path / "notes.md"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty: found no \.txt or \.txt\.gz file in this folder"):
        lab.corpus_files([tmp_path / "empty"])
