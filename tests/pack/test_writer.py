"""Packs are written alike from alike, whole or not at all."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import PackError
from guard.pack.loader import load_pack
from guard.pack.manifest import FILES, read_manifest
from guard.pack.writer import manifest_toml, write_pack


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_input_gives_the_same_bytes(tmp_path, tiny):
    first = write_pack(tmp_path / "first", **tiny)
    tiny["evaluation"] = dict(reversed(tiny["evaluation"].items()))
    tiny["latents"] = [
        line.model_copy(update={"quantiles": dict(reversed(line.quantiles.items()))}) for line in tiny["latents"]
    ]
    tiny["rows"] = [dataclasses.replace(rows, enc_rows=np.asfortranarray(rows.enc_rows)) for rows in tiny["rows"]]
    second = write_pack(tmp_path / "second", **tiny)
    assert first == second == load_pack(tmp_path / "first").hash
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert set(contents(tmp_path / "first")) == {*FILES, "manifest.toml"}


def test_another_process_gives_the_same_bytes(folder, tmp_path):
    program = (
        "import sys, pathlib\n"
        "from guard.pack.loader import load_pack\n"
        "from guard.pack.writer import write_pack\n"
        "p = load_pack(pathlib.Path(sys.argv[1]))\n"
        "print(write_pack(pathlib.Path(sys.argv[2]), p.manifest, p.hook_points, p.head_weights, p.probe_weights,"
        " p.latents, p.cases, p.evaluation, '# tiny/test\\n'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(tmp_path / "again")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == load_pack(folder).hash
    assert contents(tmp_path / "again") == contents(folder)


def test_any_other_input_gives_another_hash(folder, tmp_path, tiny):
    tiny["head_weights"][0, 0] += 1 / 1024
    assert write_pack(tmp_path / "other", **tiny) != load_pack(folder).hash


def test_hook_points_without_latents_or_probes(tmp_path, tiny):
    for key, field in (("latents", "latents"), ("probes", "probe_rows")):
        points = tiny["manifest_without_files"].hook_points
        none = tuple(point.model_copy(update={key: 0}) for point in points)
        names = (
            ["latents", "enc_rows", "bias", "threshold", "scale"] if key == "latents" else ["probe_rows", "probe_bias"]
        )
        rows = [dataclasses.replace(rows, **{name: getattr(rows, name)[:0] for name in names}) for rows in tiny["rows"]]
        given_args = {
            **tiny,
            "manifest_without_files": tiny["manifest_without_files"].model_copy(update={"hook_points": none}),
            "rows": rows,
        }
        if key == "latents":
            given_args.update(latents=[], head_weights=np.zeros((2, 0), np.float32))
        else:
            given_args.update(probe_weights=np.zeros((2, 0), np.float32))
        write_pack(tmp_path / key, **given_args)
        assert [len(getattr(p, field)) for p in load_pack(tmp_path / key).hook_points] == [0, 0]


def test_a_pack_is_replaced_whole(folder, tiny):
    tiny["readme"] = "# second\n"
    assert write_pack(folder, **tiny) == load_pack(folder).hash
    assert (folder / "README.md").read_text() == "# second\n"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_bad_pack_changes_nothing_and_names_the_place_it_was_meant_for(folder, tiny):
    before = contents(folder)
    tiny["rows"][1].bias[0] = np.nan
    with pytest.raises(PackError) as caught:
        write_pack(folder, **tiny)
    assert str(caught.value) == (
        f"{folder}/rows.safetensors: model.layers.7.bias: found NaN or infinity in row 0 (latent 2), "
        "expected finite numbers"
    )
    assert caught.value.metadata["file"] == f"{folder}/rows.safetensors"
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_folder_that_is_no_pack_is_not_replaced(tmp_path, tiny):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(PackError) as caught:
        write_pack(home, **tiny)
    assert str(caught.value) == (
        f"{home}: folder: found something without manifest.toml, expected a pack to replace, or an empty folder"
    )
    assert contents(home) == {"thesis.txt": b"years of work"}


def test_rows_in_another_order_than_the_manifest(tmp_path, tiny):
    tiny["rows"].reverse()
    with pytest.raises(PackError) as caught:
        write_pack(tmp_path / "pack", **tiny)
    assert str(caught.value) == (
        f"{tmp_path}/pack/rows.safetensors: hook points: found model.layers.7, model.layers.3, "
        "expected model.layers.3, model.layers.7"
    )


def test_values_that_json_cannot_hold(tmp_path, tiny):
    tiny["evaluation"]["auroc"]["terror.harm"] = float("nan")
    with pytest.raises(PackError) as caught:
        write_pack(tmp_path / "pack", **tiny)
    start = f"{tmp_path}/pack/evaluation.json: JSON: found an error (Out of range float values are not JSON compliant"
    assert str(caught.value).startswith(start)
    assert not list(tmp_path.iterdir())


def test_files_are_readable_by_people(folder):
    first = json.loads((folder / "latents.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert list(first) == sorted(first)
    assert "刀" in (folder / "latents.jsonl").read_text(encoding="utf-8")
    assert "暴力, 🙂" in (folder / "manifest.toml").read_text(encoding="utf-8")


def test_a_written_folder_can_be_read_by_others(folder):
    plain = folder.parent / "plain"
    plain.mkdir()
    assert folder.stat().st_mode == plain.stat().st_mode


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(),
    number=st.floats(allow_nan=False, allow_infinity=False),
    files=st.dictionaries(st.text(), st.text(), max_size=3),
    flag_at=st.none() | st.floats(0, 1),
    count=st.integers(0, 2**70),
)
def test_any_manifest_reads_back_equal(lasting_folder, tmp_path_factory, text, number, files, flag_at, count):
    sound = read_manifest((lasting_folder / "manifest.toml").read_bytes(), lasting_folder)
    manifest = sound.model_copy(
        update={
            "description": text,
            "calibrated": False,
            "heads": (sound.heads[0].model_copy(update={"bias": number, "flag_at": flag_at}), *sound.heads[1:]),
            "hook_points": (sound.hook_points[0].model_copy(update={"latents": count}),),
            "sources": (),
            "files": files,
        }
    )
    file = tmp_path_factory.getbasetemp() / "manifest.toml"
    file.write_bytes(manifest_toml(manifest).encode())
    assert read_manifest(file.read_bytes(), file) == manifest
