"""The suite's file: what it declares, and what is said of a faulty one."""

import re

import pytest

from guard.cli.lab import _TRAIN_EPILOG
from guard.errors import InvalidInput
from guard.lab.suite.config import Grid, SaeSpec, SuiteConfig, read_config, shipped, write_config
from guard.lab.suite.ranks import deal

GRID = """
[[grid]]
hook_points = ["h"]
widths = [64]
l0 = [4, 8.5]
"""


def test_a_suite_is_the_union_of_its_grids(tmp_path):
    file = tmp_path / "suite.toml"
    file.write_text(
        "tokens = 1_000\n"
        + GRID
        + '[[grid]]\nhook_points = ["a", "b"]\narchitectures = ["topk"]\nwidths = [9]\nl0 = [2]'
    )
    config = read_config(str(file))
    assert config.tokens == 1000
    assert [spec.name for spec in config.specs] == [
        "h.batch_topk.w64.l4", "h.batch_topk.w64.l8.5", "a.topk.w9.l2", "b.topk.w9.l2"
    ]  # fmt: skip
    assert config.hook_points == ("h", "a", "b")
    write_config(tmp_path / "copy.toml", config)
    assert read_config(str(tmp_path / "copy.toml")) == config


def test_the_shipped_suites():
    assert shipped() == ["domain", "reference", "search"]
    assert [spec.name for spec in read_config("reference").specs] == [
        f"model.layers.{layer}.batch_topk.w4608.l16" for layer in (0, 7, 14, 22)
    ]
    search = read_config("search")
    names = [spec.name for spec in search.specs]
    assert len(names) == 44
    assert search.tokens >= 2_000_000
    grid = r"model\.layers\.(0|7|14|22|29)(\.mlp\.down_proj)?\.batch_topk\.w1152\.l(16|32|64|128)"
    assert sum(bool(re.fullmatch(grid, n)) for n in names) == 40
    assert {n for n in names if not re.fullmatch(grid, n)} == {
        f"model.layers.14.{rest}.l32"
        for rest in ("jumprelu.w1152", "topk.w1152", "batch_topk.w2304", "batch_topk.w4608")
    }
    for name in shipped():
        assert f" {name} (" in _TRAIN_EPILOG


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "grid: found nothing, expected a value"),
        ("[[grid]]\nhook_points = ['h']\nl0 = [4]", "grid.0.widths: found nothing, expected a value"),
        ("tokns = 5" + GRID, "tokns: found an unknown key, expected one of: tokens, batch, learning_rate, warmup_steps, decay_share, dead_after_tokens, aux_every, shards_mixed, held_out_shards, seed, start_from, grid"),
        (GRID + "width = [3]", "grid.0.width: found an unknown key, expected one of: hook_points, architectures, widths, l0"),
        ("batch = 0" + GRID, "batch: found 0, expected greater than or equal to 1"),
        ("tokens = 'all'" + GRID, "tokens: found 'all', expected integer, unable to parse string as an integer"),
        (GRID.replace("[64]", "[]"), "grid.0.widths: found [], expected at least one"),
        (GRID.replace("8.5", "-1"), "grid.0.l0.1: found -1, expected greater than 0"),
        (GRID + 'architectures = ["gated"]', "grid.0.architectures.0: found 'gated', expected 'batch_topk', 'jumprelu' or 'topk'"),
        (GRID + GRID, "grid: found h.batch_topk.w64.l4 twice, expected each SAE once"),
        (GRID + 'architectures = ["topk"]', "grid: found l0 8.5 with topk, expected a whole number of latents"),
        (GRID.replace("[64]", "[8]"), "grid: found l0 8.5 with width 8, expected an l0 below the width"),
        ("tokens = ", "Invalid value (at end of document)"),
    ],
)  # fmt: skip
def test_a_faulty_file_is_told_what_is_wrong_and_where(tmp_path, text, message):
    file = tmp_path / "suite.toml"
    file.write_text(text)
    with pytest.raises(InvalidInput) as caught:
        read_config(str(file))
    assert str(caught.value) == f"{file}: {message}"


def test_a_file_that_is_absent_is_named_beside_the_shipped_ones():
    with pytest.raises(InvalidInput) as caught:
        read_config("serch")
    assert (
        str(caught.value)
        == "serch: found no such file, expected a suite's TOML file or one of: domain, reference, search"
    )


def test_every_sae_has_a_seed_of_its_own():
    specs = [SaeSpec("h", "batch_topk", 64, 4), SaeSpec("h", "batch_topk", 64, 8), SaeSpec("g", "batch_topk", 64, 4)]
    assert len({spec.seed(seed) for spec in specs for seed in (0, 1)}) == 6


@pytest.mark.parametrize("size", [1, 2, 3, 8, 40])
def test_processes_are_dealt_like_shares_of_the_suite(size):
    specs = read_config("search").specs
    dealt = deal(specs, size)
    assert len(dealt) == size
    assert sorted((s for mine in dealt for s in mine), key=specs.index) == list(specs)
    widths = [sum(spec.width for spec in mine) for mine in dealt]
    assert max(widths) - min(widths) <= 4608
    assert all(mine == sorted(mine, key=specs.index) for mine in dealt)


def test_a_configuration_cannot_be_changed():
    config = SuiteConfig(grid=(Grid(hook_points=("h",), widths=(4,), l0=(2,)),))
    with pytest.raises(ValueError, match="frozen"):
        config.tokens = 1
