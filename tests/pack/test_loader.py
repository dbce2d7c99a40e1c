"""What a sound pack gives, and what each defect says. One defect each; the whole message is asserted."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import PackError
from guard.pack.loader import check_model, load_pack
from guard.records import ModelInfo, PackInfo


def refusal(folder):
    """The message with which the pack is refused, without the folder's path."""
    with pytest.raises(PackError) as caught:
        load_pack(folder)
    return str(caught.value).replace(f"{folder}/", "")


def replace_line(folder, name, number, old, new):
    lines = (folder / name).read_text(encoding="utf-8").split("\n")
    assert lines[number - 1].count(old) == 1
    lines[number - 1] = lines[number - 1].replace(old, new)
    return "\n".join(lines).encode()


def change_tensor(folder, name, change):
    """rows.safetensors with one tensor changed (a function of it), left out (None) or added."""
    tensors = safetensors.numpy.load((folder / "rows.safetensors").read_bytes())
    tensors[name] = change(tensors.get(name))
    return safetensors.numpy.save({key: value for key, value in tensors.items() if value is not None})


def with_value(index, value):
    def change(array):
        array[index] = value
        return array

    return change


def test_a_pack_comes_back_as_it_was_written(folder, tiny):
    pack = load_pack(folder)
    assert [rows.name for rows in pack.hook_points] == ["model.layers.3", "model.layers.7"]
    for found, given_rows in zip(pack.hook_points, tiny["rows"], strict=True):
        for field in ("latents", "enc_rows", "bias", "threshold", "scale", "probe_rows", "probe_bias"):
            expected = getattr(given_rows, field)
            np.testing.assert_array_equal(getattr(found, field), expected, strict=True)
    np.testing.assert_array_equal(pack.head_weights, tiny["head_weights"], strict=True)
    np.testing.assert_array_equal(pack.probe_weights, tiny["probe_weights"], strict=True)
    assert pack.latents == tuple(tiny["latents"])
    assert pack.cases == tuple(tiny["cases"])
    assert pack.evaluation == tiny["evaluation"]
    assert pack.manifest.model_copy(update={"files": {}}) == tiny["manifest_without_files"]
    assert pack.domains == ("violence", "terror")
    assert pack.hash == hashlib.sha256((folder / "manifest.toml").read_bytes()).hexdigest()
    assert pack.info == PackInfo("tiny/test", "1.0.0", pack.hash)


@pytest.mark.parametrize("name", ["rows.safetensors", "latents.jsonl", "cases.jsonl", "evaluation.json", "README.md"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    assert refusal(folder) == f"{name}: file: found nothing, expected a file, as manifest.toml lists it"


def test_missing_manifest(folder):
    (folder / "manifest.toml").unlink()
    assert refusal(folder) == "manifest.toml: found no such file, expected a pack's manifest.toml"


def test_file_that_is_not_listed(folder):
    (folder / "notes.txt").write_text("hello")
    assert refusal(folder) == (
        "notes.txt: file: found a file that manifest.toml does not list, expected listed files only"
    )


def test_listing_without_a_needed_file(folder, edit_manifest):
    digest = hashlib.sha256((folder / "cases.jsonl").read_bytes()).hexdigest()
    edit_manifest(folder, f'"cases.jsonl" = "{digest}"\n', "")
    assert refusal(folder) == (
        "manifest.toml: files: found no entry for cases.jsonl, expected one for each of "
        "rows.safetensors, latents.jsonl, cases.jsonl, evaluation.json, README.md"
    )


def test_a_further_file_is_fine_where_it_is_listed(folder, rewrite):
    rewrite(folder, "NOTICE", b"made of made-up data\n")
    assert load_pack(folder).info.id == "tiny/test"
    (folder / "NOTICE").write_bytes(b"something else\n")
    assert refusal(folder).startswith("NOTICE: sha256: found ")


@pytest.mark.parametrize("name", ["../outside.txt", "sub/inside.txt", "/etc/hostname", "..", "a\\b", "manifest.toml"])
def test_path_in_files(folder, edit_manifest, name):
    (folder.parent / "outside.txt").write_text("hello")
    toml_name = name.replace("\\", "\\\\")
    edit_manifest(folder, "[files]\n", f'[files]\n"{toml_name}" = "{"0" * 64}"\n')
    assert refusal(folder) == (f"manifest.toml: files: found {name!r}, expected another file's name, without a path")


def test_wrong_hash(folder):
    listed = hashlib.sha256((folder / "README.md").read_bytes()).hexdigest()
    (folder / "README.md").write_text("# other\n")
    found = hashlib.sha256(b"# other\n").hexdigest()
    assert refusal(folder) == f"README.md: sha256: found {found}, expected {listed}"


def test_manifest_changed_by_hand(folder):
    file = folder / "manifest.toml"
    sound = file.read_bytes()
    changed = sound.replace(b"flag_at = 0.5", b"flag_at = 0.6")
    file.write_bytes(changed)
    listed = sound.decode().split()[-1]
    computed = hashlib.sha256(changed[: changed.rindex(b"# sha256")]).hexdigest()
    assert refusal(folder) == (
        f"manifest.toml: sha256 of all lines above: found {listed}, "
        f"expected {computed}; the manifest was changed after the pack was built"
    )
    file.write_bytes(sound[: sound.rindex(b"# sha256")])
    assert refusal(folder).startswith("manifest.toml: sha256 of all lines above: found no such line, expected ")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format = 1", "format = 2", "format: found 2, expected 1"),
        (
            "calibrated = true",
            "calibrated = true\ncolour = 'red'",
            ("colour: found an unknown key, expected one of format, id, version, description, calibrated, model, "
            "pooling, hook_points, heads, sources, explanations, files"),
        ),
        (
            "[pooling]",
            "[pooling]\nactivation = 'clip'",
            "pooling.activation: found an unknown key, expected one of exponent, power, prior_tokens, passage_tokens, passage_caution",
        ),
        ("bias = 0.1", "bias = nan", "heads.1.bias: found nan, expected a finite number"),
        ("fvu = 0.25\nl0 = 3.5\ndead_share = 1e-05\n\n[[heads]]", "fvu = inf\nl0 = 3.5\ndead_share = 1e-05\n\n[[heads]]",
         "hook_points.1.fvu: found inf, expected a finite number"),
        ("flag_at = 0.5", "flag_at = 0.95", "heads.0.flag_at: found 0.95, expected at most block_at (0.9)"),
        ("block_at = 0.9", "block_at = 1.5", "heads.0.block_at: found 1.5, expected a score between 0 and 1"),
        (
            'domain = "terror"',
            'domain = "Terror!"',
            "heads.1.domain: found 'Terror!', expected a lower-case identifier (a to z, 0 to 9, _)",
        ),
        (
            'domain = "terror"\nhead = "presence"',
            'domain = "violence"\nhead = "harm"',
            "heads.1: found violence.harm again, expected each name once",
        ),
        (
            'name = "model.layers.7"',
            'name = "model.layers.3"',
            "hook_points.1: found model.layers.3 again, expected each name once",
        ),
        (
            'name = "model.layers.7"',
            'name = "model/../7"',
            "hook_points.1.name: found 'model/../7', expected a module's dotted path",
        ),
        (
            "latents = 2",
            "latents = 2000000000000",
            "hook_points: found 120000000000224 bytes of tensors, expected at most 2147483648",
        ),
    ],
)  # fmt: skip
def test_manifest(folder, edit_manifest, old, new, message):
    edit_manifest(folder, old, new)
    assert refusal(folder) == f"manifest.toml: {message}"


def test_manifest_that_is_no_toml(folder):
    (folder / "manifest.toml").write_text("format = ")
    assert refusal(folder) == "manifest.toml: Invalid value (at end of document)"
    (folder / "manifest.toml").write_text(f"format = {'9' * 5000}")
    assert refusal(folder).startswith("manifest.toml: Exceeds the limit")
    (folder / "manifest.toml").write_text("format = " + "[" * 100_000)
    assert refusal(folder).startswith("manifest.toml: maximum recursion depth exceeded")
    (folder / "manifest.toml").write_text("#" * (1 << 21))
    assert refusal(folder) == "manifest.toml: size: found more than 1048576 bytes, expected at most 1048576"


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        (
            "model.layers.3.enc_rows",
            lambda a: np.ascontiguousarray(a[:, :7]),
            "model.layers.3.enc_rows: found F32 [3, 7], expected F32 [3, 8]",
        ),
        ("head_weights", lambda a: np.vstack([a, a]), "head_weights: found F32 [4, 5], expected F32 [2, 5]"),
        (
            "model.layers.7.bias",
            lambda a: a.astype(np.float64),
            "model.layers.7.bias: found F64 [2], expected F32 [2]",
        ),
        (
            "model.layers.3.latents",
            lambda a: a.astype(np.int32),
            "model.layers.3.latents: found I32 [3], expected I64 [3]",
        ),
        ("model.layers.7.scale", lambda a: None, "model.layers.7.scale: found no such tensor, expected F32 [2]"),
        (
            "model.layers.3.enc_rows",
            with_value((1, 4), np.nan),
            "model.layers.3.enc_rows: found NaN or infinity in row 1 (latent 0), expected finite numbers",
        ),
        (
            "model.layers.7.threshold",
            with_value(1, np.inf),
            "model.layers.7.threshold: found NaN or infinity in row 1 (latent 9), expected finite numbers",
        ),
        (
            "model.layers.3.probe_rows",
            with_value((0, 7), -np.inf),
            "model.layers.3.probe_rows: found NaN or infinity in row 0, expected finite numbers",
        ),
        (
            "head_weights",
            with_value((1, 3), np.nan),
            (
                "head_weights: found NaN or infinity in row 1 (terror.presence, latent model.layers.7/2), "
                "expected finite numbers"
            ),
        ),
        (
            "probe_weights",
            with_value((0, 0), np.nan),
            (
                "probe_weights: found NaN or infinity in row 0 (violence.harm, probe model.layers.3/0), "
                "expected finite numbers"
            ),
        ),
        (
            "model.layers.3.scale",
            with_value(2, 0),
            "model.layers.3.scale: found 0.0 in row 2 (latent 15), expected a number above its threshold 0.1875",
        ),
        (
            "model.layers.3.latents",
            with_value(2, 5),
            "model.layers.3.latents: found 5 again in row 2, expected each latent once",
        ),
        ("model.layers.7.latents", with_value(0, 16), "model.layers.7.latents: found 16 in row 0, expected 0 to 15"),
        ("model.layers.7.latents", with_value(0, -1), "model.layers.7.latents: found -1 in row 0, expected 0 to 15"),
    ],
)
def test_tensors(folder, rewrite, tensor, change, message):
    rewrite(folder, "rows.safetensors", change_tensor(folder, tensor, change))
    assert refusal(folder) == f"rows.safetensors: {message}"


def test_unknown_tensor(folder, rewrite):
    rewrite(folder, "rows.safetensors", change_tensor(folder, "extra", lambda _: np.zeros(1, np.float32)))
    message = refusal(folder)
    assert message.startswith(
        "rows.safetensors: extra: found an unknown tensor, expected one of model.layers.3.latents, "
    )
    assert message.endswith(", head_weights, probe_weights")


def test_truncated_safetensors(folder, rewrite):
    data = (folder / "rows.safetensors").read_bytes()
    full = len(data) - 8 - int.from_bytes(data[:8], "little")
    rewrite(folder, "rows.safetensors", data[:-4])
    assert refusal(folder) == f"rows.safetensors: size: found {full - 4} bytes of tensors, expected {full}"
    rewrite(folder, "rows.safetensors", data[:100])
    header = int.from_bytes(data[:8], "little")
    assert refusal(folder) == (
        f"rows.safetensors: header: found {header} bytes in a file of 100, expected a whole safetensors header"
    )
    rewrite(folder, "rows.safetensors", b"")
    assert refusal(folder) == (
        "rows.safetensors: header: found 0 bytes in a file of 0, expected a whole safetensors header"
    )


def test_overlapping_tensors(folder, rewrite):
    data = (folder / "rows.safetensors").read_bytes()
    # Two tensors of one size that claim the same place: names, dtypes, shapes and the size are all as expected.
    header_size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_size])
    header["model.layers.3.bias"]["data_offsets"] = header["model.layers.3.scale"]["data_offsets"]
    text = json.dumps(header).encode()
    rewrite(folder, "rows.safetensors", len(text).to_bytes(8, "little") + text + data[8 + header_size :])
    assert refusal(folder).startswith("rows.safetensors: header: found Error while deserializing: invalid offset")


@pytest.mark.parametrize(
    ("name", "number", "old", "new", "message"),
    [
        (
            "latents.jsonl", 2, '"latent": 0', '"latent": 0, "colour": 1',
            ("colour: found an unknown key, expected one of hook_point, latent, domains, subdomains, explanation, surface_form, scores, "
            "firing_rate, quantiles, top_tokens, examples"),
        ),
        ("latents.jsonl", 3, '"latent": 15', '"latent": 5', "latent: found model.layers.3/5, expected model.layers.3/15, as in rows.safetensors"),
        ("latents.jsonl", 4, '"latent": 2,', '"latent": 2', "JSON: found an error (Expecting ',' delimiter: line 1 column 142 (char 141)), expected one JSON object"),
        ("latents.jsonl", 4, '"latent": 2', '"latent": 2, "latent": 2', "JSON: found an error (key 'latent' stands twice), expected one JSON object"),
        ("latents.jsonl", 5, '"firing_rate": 0.01', '"firing_rate": NaN', "JSON: found NaN, infinity or a number too large, expected finite numbers"),
        ("latents.jsonl", 5, '"firing_rate": 0.01', '"firing_rate": 1e999', "JSON: found NaN, infinity or a number too large, expected finite numbers"),
        ("cases.jsonl", 1, '"expect": "act"', '"expect": "deny"', "expect: found 'deny', expected Input should be 'act' or 'allow'"),
        ("cases.jsonl", 2, '"lang": "en", ', "", "lang: found nothing, expected a value"),
        ("cases.jsonl", 3, "case/3", "case/1", "id: found 'case/1' again, expected each id once"),
        ("cases.jsonl", 3, '"terror"', '"weather"', "domain: found 'weather', expected one of violence, terror"),
        ("cases.jsonl", 3, "The attack", "\\ud800", "JSON: found a lone surrogate, expected Unicode text"),
    ],
)  # fmt: skip
def test_lines(folder, rewrite, name, number, old, new, message):
    rewrite(folder, name, replace_line(folder, name, number, old, new))
    assert refusal(folder) == f"{name}:{number}: {message}"


def test_lines_that_are_too_few_empty_or_no_objects(folder, rewrite):
    lines = (folder / "latents.jsonl").read_bytes().splitlines(keepends=True)
    rewrite(folder, "latents.jsonl", b"".join(lines[:-1]))
    assert refusal(folder) == "latents.jsonl: lines: found 4, expected 5, one for each row of rows.safetensors"
    rewrite(folder, "latents.jsonl", b"".join([*lines[:2], b"\n", *lines[2:]]))
    assert refusal(folder) == (
        "latents.jsonl:3: JSON: found an error (Expecting value: line 1 column 1 (char 0)), expected one JSON object"
    )
    rewrite(folder, "latents.jsonl", b"".join([*lines[:2], b"[1]\n", *lines[3:]]))
    assert refusal(folder) == "latents.jsonl:3: JSON: found list, expected one JSON object"
    rewrite(folder, "latents.jsonl", b"\xff" + b"".join(lines))
    assert refusal(folder) == "latents.jsonl: encoding: found invalid start byte at byte 0, expected UTF-8"
    rewrite(folder, "latents.jsonl", b"[" * 100_000)
    assert refusal(folder).startswith("latents.jsonl:1: JSON: found an error (maximum recursion depth exceeded")


def test_a_pack_runs_on_its_own_model(folder):
    info = check_model(load_pack(folder), {"weights": "a" * 64, "tokenizer": "b" * 64}, allow_unverified=False)
    assert info == ModelInfo(fingerprint="a" * 64, verified=True)


@pytest.mark.parametrize(
    ("fingerprint", "message"),
    [
        (
            {"weights": "c0ffee" + "0" * 58, "tokenizer": "b" * 64},
            (
                "model.weights: found weights c0ffee000000, expected aaaaaaaaaaaa (tiny-model); "
                "set reader.allow_unverified = true to run unverified"
            ),
        ),
        (
            {"weights": "a" * 64, "tokenizer": "c0ffee" + "0" * 58},
            (
                "model.tokenizer: found tokenizer c0ffee000000, expected bbbbbbbbbbbb (tiny-model); "
                "set reader.allow_unverified = true to run unverified"
            ),
        ),
    ],
)
def test_wrong_model(folder, fingerprint, message):
    pack = load_pack(folder)
    with pytest.raises(PackError) as caught:
        check_model(pack, fingerprint, allow_unverified=False)
    assert str(caught.value) == f"{folder}/manifest.toml: {message}"
    info = check_model(pack, fingerprint, allow_unverified=True)
    assert info == ModelInfo(fingerprint=fingerprint["weights"], verified=False)


def test_loading_imports_neither_torch_nor_grpc(folder):
    program = (
        "import sys, pathlib, guard.pack.writer, guard.pack.cases\n"
        "from guard.pack.loader import load_pack\n"
        "print(load_pack(pathlib.Path(sys.argv[1])).info.id, *sorted({'torch', 'transformers', 'grpc'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["tiny/test"]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_damaged_file_ever_loads(lasting_folder, data):
    """One byte changed or added, or the rest cut off, anywhere, the manifest included: PackError, no other error."""
    file = lasting_folder / data.draw(st.sampled_from(sorted(path.name for path in lasting_folder.iterdir())))
    sound = file.read_bytes()
    place, flip = data.draw(st.integers(0, len(sound) - 1)), data.draw(st.integers(1, 255))
    changed = sound[:place] + bytes([sound[place] ^ flip]) + sound[place + 1 :]
    added = sound[:place] + bytes([flip]) + sound[place:]
    file.write_bytes(data.draw(st.sampled_from([changed, added, sound[:place]])))
    try:
        with pytest.raises(PackError):
            load_pack(lasting_folder)
    finally:
        file.write_bytes(sound)
    load_pack(lasting_folder)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damage_behind_a_sound_hash_raises_pack_errors_only(lasting_folder, rewrite, data):
    """Somebody who writes the hashes anew can give other numbers, but cannot make the loader fail in another way."""
    name = data.draw(st.sampled_from(["rows.safetensors", "latents.jsonl", "cases.jsonl", "evaluation.json"]))
    sound = (lasting_folder / name).read_bytes()
    damaged = bytearray(sound)
    # Half of the places in the first bytes, where the header of the tensors stands.
    places = st.one_of(st.integers(0, min(len(sound) - 1, 1500)), st.integers(0, len(sound) - 1))
    for place in data.draw(st.lists(places, min_size=1, max_size=3)):
        damaged[place] = data.draw(st.integers(0, 255))
    rewrite(lasting_folder, name, bytes(damaged))
    try:
        pack = load_pack(lasting_folder)
        assert all(np.isfinite(rows.enc_rows).all() for rows in pack.hook_points)
    except PackError:
        pass
    finally:
        rewrite(lasting_folder, name, sound)
