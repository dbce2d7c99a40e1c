"""Exported readers against the torch reader, on the real model: float32 is the same, int8 is near, streams are whole."""

import json
import shutil

import numpy as np
import pytest

from guard.cli.export import source
from guard.config import DEFAULT_PACK
from guard.errors import ConfigError, WeightsError
from guard.pack.loader import load_pack
from guard.reader import exported, graph, llama, onnx, rounding, weights
from guard.reader.export import Source, export
from guard.reader.model import TorchReader

POINTS = ("model.layers.0", "model.layers.2.mlp", "model.layers.3")
TEXTS = ("The committee will vote on the tax reform.", "Bake the bread at 220 degrees for half an hour, then rest it.")
SHORT, LONG = [0, 504, 2016, 314], [0, *range(500, 640)]


@pytest.fixture(scope="module", params=["float32", "int8"])
def folder(request, model_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("exported") / request.param
    export(model_folder, Source("random 1", POINTS, TEXTS), target, request.param)
    return target


@pytest.fixture(scope="module")
def reader(folder):
    try:
        return onnx.OnnxReader(folder, POINTS, threads=1)
    except ConfigError as error:
        if "a processor without VNNI" not in str(error):
            raise
        pytest.skip("this processor has no VNNI, and int8 readers refuse it by name")


@pytest.fixture(scope="module")
def torch_reader(model_folder):
    return TorchReader(model_folder, POINTS)


def cosine(a, b):
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_it_sees_what_the_torch_reader_sees(reader, torch_reader):
    (found,), (expected,) = reader.read([LONG]), torch_reader.read([LONG])
    for point in POINTS:
        if reader.dtype == "float32":
            np.testing.assert_allclose(found[point], expected[point], atol=1e-3, rtol=1e-3)
        else:
            assert cosine(found[point], expected[point].numpy()).mean() > 0.99
        assert found[point].shape == (len(LONG), 576)
    assert reader.flops_per_token() == torch_reader.flops_per_token()


def test_a_text_reads_the_same_alone_in_a_batch_and_as_a_stream(reader):
    alone = [reader.read([SHORT])[0], reader.read([LONG])[0]]
    together = reader.read([SHORT, LONG])
    stream = reader.new_stream()
    steps = [reader.extend([(stream, part)])[0] for part in (LONG[:1], LONG[1:30], LONG[30:31], LONG[31:])]
    assert stream.length == len(LONG)  # and its room has grown once: 141 tokens do not fit the first 128
    for point in POINTS:
        np.testing.assert_allclose(together[0][point], alone[0][point], atol=2e-3, rtol=1e-3)
        np.testing.assert_allclose(together[1][point], alone[1][point], atol=2e-3, rtol=1e-3)
        streamed = np.concatenate([step[point] for step in steps])
        np.testing.assert_allclose(streamed, alone[1][point], atol=2e-3, rtol=1e-3)


def test_its_fingerprint_is_that_of_the_model_and_changed_files_are_refused(folder, model_folder, tmp_path):
    assert weights.fingerprint(folder) == weights.fingerprint(model_folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"tokenizer\.json: sha256: found [0-9a-f]{64}, expected [0-9a-f]{64}"):
        weights.fingerprint(copy)
    (copy / "reader.onnx.data").unlink()
    with pytest.raises(WeightsError, match=r"missing reader\.onnx\.data"):
        weights.fingerprint(copy)


def test_a_hook_point_that_was_not_exported_is_named(folder):
    with pytest.raises(ConfigError, match=r"found hook points model\.layers\.0, .*, expected model\.layers\.7 among"):
        onnx.OnnxReader(folder, ["model.layers.7"])


def test_a_manifest_with_a_wrong_value_names_the_key(folder, tmp_path):
    told = json.loads((folder / exported.MANIFEST).read_text()) | {"dtype": "int4"}
    (tmp_path / exported.MANIFEST).write_text(json.dumps(told))
    with pytest.raises(WeightsError, match=r"guard-export\.json: dtype: found 'int4': Input should be"):
        exported.read_export(tmp_path)


def test_int8_is_refused_where_the_processor_would_saturate(folder):
    onnx._check_processor(folder, {"avx2", "avx_vnni"})
    onnx._check_processor(folder, set())  # not known: no x86-64
    with pytest.raises(ConfigError, match=r"found a processor without VNNI .* guard export --dtype float32"):
        onnx._check_processor(folder, {"avx2", "fma"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "qwen3", r"config\.json: model_type: found 'qwen3', expected 'llama' to export"),
        ("attention_bias", True, r"attention_bias: found True, expected False"),
        ("rope_parameters", {"rope_type": "yarn"}, r"rope_type: found 'yarn', expected 'default'"),
        ("rms_norm_eps", None, r"rms_norm_eps: found nothing, expected a number"),
    ],
)
def test_another_architecture_is_refused(model_folder, key, value, message):
    told = json.loads((model_folder / "config.json").read_text()) | {key: value}
    if value is None:
        del told[key]
    with pytest.raises(WeightsError, match=message):
        llama.read_shape(told, model_folder)


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("model.layers.99", "hook point layer 99: the model has 30 layers"),
        ("model.layers.1.mlp.gate_proj", r"expected model\.layers\.N, or its \.mlp or \.self_attn"),
    ],
)
def test_a_hook_point_that_the_graph_cannot_hand_out_is_named(model_folder, tmp_path, point, message):
    with pytest.raises(ConfigError, match=message):
        export(model_folder, Source("random 1", [point], TEXTS), tmp_path / "new", "float32")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_not_written_over(model_folder, folder, tmp_path):
    with pytest.raises(ConfigError, match="found it there already, expected a new folder"):
        export(model_folder, Source("random 1", POINTS, TEXTS), tmp_path, "float32")
    with pytest.raises(WeightsError, match="found an exported reader, expected the model folder"):
        export(folder, Source("random 1", POINTS, TEXTS), tmp_path / "new", "float32")


@pytest.mark.parametrize(("channels", "size"), [(576, 64), (1536, 64), (80, 16), (7, 1)])
def test_turned_channels_and_weights_multiply_to_the_same(channels, size):
    rng = np.random.default_rng(channels)
    x, weight = rng.standard_normal((3, channels)), rng.standard_normal((channels, 5)).astype(np.float32)
    x[0, 3] = 1000.0  # an outlier: turned, it is shared out
    turn = graph.hadamard(channels)
    turned = (x.reshape(3, -1, size) @ turn).reshape(3, channels)
    np.testing.assert_allclose(turned @ graph.turn_inputs(weight, turn), x @ weight, rtol=1e-4, atol=1e-3)
    assert turn.shape == (size, size)
    assert abs(turned[0]).max() < 1.02 * 1000 / np.sqrt(size) + 5


def test_weights_are_rounded_so_that_outputs_change_least():
    rng = np.random.default_rng(0)
    few = rng.standard_normal((12, 48))  # channels that go together, as a model's do
    x, held_out = (rng.standard_normal((n, 12)) @ few + 0.1 * rng.standard_normal((n, 48)) for n in (2000, 500))
    weight = rng.standard_normal((48, 20)).astype(np.float32)
    scale = rounding.scales(weight)
    plain = np.rint(weight / scale).astype(np.int8)
    made = rounding.rounded(weight, (x.T @ x / len(x)).astype(np.float32))
    assert abs(made.astype(int)).max() <= rounding.INT8_MAX

    def error(whole):
        return np.linalg.norm(held_out @ (whole * scale - weight))

    assert error(made) < 0.5 * error(plain)
    np.testing.assert_array_equal(rounding.rounded(weight, np.eye(48, dtype=np.float32)), plain)
    assert np.isfinite(rounding.scales(np.zeros((48, 20), np.float32))).all()
    assert not rounding.rounded(np.zeros((48, 20), np.float32), np.zeros((48, 48), np.float32)).any()


def test_moments_follow_what_is_done_to_inputs():
    rng = np.random.default_rng(0)
    x, turn = rng.standard_normal((50, 128)).astype(np.float32), graph.hadamard(128)
    turned = (x.reshape(50, -1, 64) @ turn).reshape(50, 128)
    np.testing.assert_allclose(graph.turn_moments(x.T @ x, turn), turned.T @ turned, rtol=1e-3, atol=1e-3)


def test_a_pack_calibrates_with_its_cases_then_its_examples():
    pack = load_pack(DEFAULT_PACK)
    given, again = source(pack), source(pack)
    cases = [case.text for case in pack.cases]
    examples = {example.text for latent in pack.latents for example in latent.examples}
    assert given == again
    assert given.texts[: len(cases)] == cases
    assert set(given.texts[len(cases) :]) == examples - set(cases)
    assert len(set(given.texts)) == len(given.texts)


def test_int8_without_a_text_is_refused(model_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"found no text in pack random 1, expected texts to calibrate on"):
        export(model_folder, Source("random 1", POINTS, ()), tmp_path / "new", "int8")
    assert not list(tmp_path.iterdir())
