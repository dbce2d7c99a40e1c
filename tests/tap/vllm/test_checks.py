"""What is refused at start, and what the message says to do. The real engine is refused in test_engine."""

from types import SimpleNamespace

import pytest

from guard.errors import ConfigError
from guard.pack.loader import load_pack
from guard.tap.vllm import checks
from guard.tap.vllm.settings import TapSettings, read
from tests.conftest import PACK, REPOSITORY

GIVEN = {"pack": str(PACK), "taps": "unix:/run/guard.sock"}


def engine(**changed):
    """The parts of vLLM's configuration that are looked at, as vLLM 0.32.0 fills them for the default model."""
    config = SimpleNamespace(
        use_v2_model_runner=False,
        model_config=SimpleNamespace(runner_type="generate", quantization=None),
        kv_transfer_config=None,
        load_config=SimpleNamespace(load_format="auto"),
        speculative_config=None,
        scheduler_config=SimpleNamespace(async_scheduling=False),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1),
        additional_config={"guard": GIVEN},
    )
    for path, value in changed.items():
        *sections, name = path.split("__")
        target = config
        for section in sections:
            target = getattr(target, section)
        setattr(target, name, value)
    return config


def runner(without=()):
    return SimpleNamespace(**{name: None for name in checks._RUNNER if name not in without})


def check(config, version="0.32.0", without=(), **settings):
    checks.check_engine(config, runner(without), version, read({"guard": GIVEN | settings}))


def test_the_tested_engine_passes():
    check(engine())
    check(engine(), version="0.32.0+cpu")


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        ({"use_v2_model_runner": True}, {}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({}, {"without": ("input_ids", "requests")}, "without input_ids, requests, expected that of vLLM 0.32.0"),
        ({"model_config__runner_type": "pooling"}, {}, "runs as 'pooling', expected one that generates"),
        ({"kv_transfer_config": object()}, {}, "a KV connector"),
        ({"load_config__load_format": "dummy"}, {}, "load_format 'dummy', expected the model's own weights"),
        (
            {"speculative_config": SimpleNamespace(method="eagle3")},
            {},
            "speculation by 'eagle3', expected ngram or draft",
        ),
        (
            {},
            {"version": "0.33.1"},
            r"found vLLM 0.33.1, expected a tested version \(0.32.0\); .*allow_untested = true",
        ),
        ({"parallel_config__tensor_parallel_size": 2}, {}, "found tensor_parallel_size 2, expected 1"),
        ({"parallel_config__pipeline_parallel_size": 4}, {}, "found pipeline_parallel_size 4, expected 1"),
        ({"model_config__quantization": "fp8"}, {}, "quantization 'fp8'"),
    ],
)
def test_refused(config, given, message):
    with pytest.raises(ConfigError, match=message):
        check(engine(**config), **given)


def test_untested_runs_where_it_is_asked_for():
    check(engine(parallel_config__tensor_parallel_size=2), version="0.40.0", allow_untested=True)
    with pytest.raises(ConfigError, match="KV connector"):  # not a matter of testing
        check(engine(kv_transfer_config=object()), allow_untested=True)


def test_layers_of_the_shipped_pack():
    names = [point.name for point in load_pack(PACK).hook_points]
    assert checks.aux_layers(names, 30) == (1, 8, 15, 23)
    with pytest.raises(ConfigError, match=r"'model.layers.22' in a model of 22 layers, expected layers 0 to 21"):
        checks.aux_layers(names, 22)


@pytest.mark.parametrize("names", [["model.layers.3.mlp"], ["model.layers.7", "model.layers.3"], ["model.norm"]])
def test_what_has_no_auxiliary_number_is_read_otherwise(names):
    assert checks.aux_layers(names, 30) is None


def test_hook_points_and_pack_enter_the_key_of_compiled_graphs():
    config = engine()
    checks.note_hook_points(config, ("model.layers.7",), "abc")
    assert config.additional_config["guard"] == {**GIVEN, "hook_points": ["model.layers.7", "abc"]}
    assert GIVEN.keys() == {"pack", "taps"}  # the caller's own is left alone
    assert read(config.additional_config) == read({"guard": GIVEN})  # a worker that starts later reads the same


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guard": True}, "additional_config.guard: found True, expected an object"),
        ({"guard": {"pack": "p"}}, "additional_config.guard.taps: found nothing"),
        (
            {"guard": GIVEN | {"tapss": 1}},
            "additional_config.guard.tapss: found an unknown key, expected one of pack, ",
        ),
        ({"guard": GIVEN | {"store_mib": -1}}, "additional_config.guard.store_mib: found -1"),
        ({"guard": GIVEN | {"gather": True}}, "additional_config.guard.gather: found True"),
    ],
)
def test_settings_name_the_key(given, message):
    with pytest.raises(ConfigError, match=message):
        read(given)


def test_without_the_setting_there_is_no_tap():
    assert read({}) is None
    assert read({"other": 1}) is None


def test_every_setting_is_documented():
    page = (REPOSITORY / "docs" / "vllm.md").read_text(encoding="utf-8")
    for name in TapSettings.model_fields:
        assert f"| `{name}` |" in page
    assert all(version in page for version in checks.TESTED)
