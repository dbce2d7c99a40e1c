"""Training: what is saved is what was trained, sae-lens reads it alike, and a killed run ends where a whole one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sae_lens
import torch
from safetensors.torch import load_file

from guard.cli.main import main
from guard.errors import InvalidInput
from guard.lab import shards
from guard.lab.suite.config import Grid, SaeSpec, SuiteConfig, read_config, write_config
from guard.lab.suite.sae import load_sae, load_suite
from guard.lab.suite.train import train
from guard.lab.suite.trainee import Trainee
from tests.lab.given import POINTS, synthetic_shards

ALL = ("batch_topk", "jumprelu", "topk")
SMALL = SuiteConfig(
    tokens=32 * 100,  # 100 steps; a group of two shards gives 16, the last group 8
    batch=32,
    learning_rate=3e-3,
    warmup_steps=10,
    dead_after_tokens=500,
    shards_mixed=2,
    held_out_shards=1,
    grid=(
        Grid(hook_points=POINTS, widths=(64,), l0=(4,)),
        Grid(hook_points=POINTS[:1], architectures=("jumprelu", "topk"), widths=(64,), l0=(4,)),
        Grid(hook_points=POINTS[1:], widths=(128,), l0=(4,)),
    ),
)
NAMES = [spec.name for spec in SMALL.specs]


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    return synthetic_shards(tmp_path_factory.mktemp("activations"))


@pytest.fixture(scope="module")
def trained(activations, tmp_path_factory):
    out = tmp_path_factory.mktemp("saes")
    return out, train(SMALL, activations, out)


def only(*grids, **changes):
    return SMALL.model_copy(update={"grid": grids, **changes})


def kill(activations, out, *, after_step, config=SMALL):
    """Trains until a checkpoint stands and `after_step` is reached."""

    def progress(done, _total, _fvu):
        if done >= after_step * config.batch:
            raise Killed

    with pytest.raises(Killed):
        train(config, activations, out, progress, save_seconds=0)


def assert_same_suite(ours, theirs):
    for name in NAMES:
        mine, other = (load_file(folder / name / "sae_weights.safetensors") for folder in (ours, theirs))
        assert all(torch.equal(mine[key], other[key]) for key in other), name
    for file in ("report.json", "losses.jsonl", "suite.toml"):
        assert (ours / file).read_text() == (theirs / file).read_text(), file


def test_saes_hold_most_of_what_they_have_not_seen_in_as_many_latents_as_they_were_told(activations, tmp_path):
    # Thresholds follow over some 100 steps: fewer leave them too low, and more latents fire.
    config = only(Grid(hook_points=POINTS[:1], architectures=ALL, widths=(64,), l0=(4,)), tokens=32 * 400)
    for report in train(config, activations, tmp_path):
        assert report.fvu < 0.3, report
        assert report.l0 == pytest.approx(4, rel=0.3), report
        assert report.dead_share < 0.6, report  # 64 latents for 32 features
        assert (report.width, report.tokens_trained) == (64, 32 * 400)


def test_a_report_stands_beside_the_saes(trained):
    out, reports = trained
    assert [(r.name, r.tokens_trained) for r in reports] == [(name, SMALL.tokens) for name in NAMES]
    assert json.loads((out / "report.json").read_text()) == [r.model_dump(mode="json") for r in reports]
    assert read_config(str(out / "suite.toml")) == SMALL
    assert sorted(f.name for f in out.iterdir()) == sorted(
        [*NAMES, "activations.json", "losses.jsonl", "report.json", "suite.toml"]
    )


def test_losses_are_told_every_twenty_steps(trained):
    lines = [json.loads(line) for line in (trained[0] / "losses.jsonl").read_text().splitlines()]
    assert [(line["step"], line["tokens"]) for line in lines] == [(s, 32 * s) for s in range(20, 101, 20)]
    assert all(list(line["fvu"]) == NAMES for line in lines)
    assert all(lines[-1]["fvu"][name] < lines[0]["fvu"][name] for name in NAMES)


def test_sae_lens_loads_what_was_saved_and_encodes_the_same(activations, trained):
    out, reports = trained
    suite = load_suite(out)
    assert [sae.name for sae in suite] == NAMES
    assert [sae.subset_exact for sae in suite] == ["topk.w" not in name or "batch" in name for name in NAMES]
    for sae, report in zip(suite, reports, strict=True):
        theirs = sae_lens.SAE.load_from_disk(out / sae.name)
        x = shards.load(activations, 5)[sae.hook_point].float()  # the shard that was held out
        ours = sae.encode(x)
        with torch.no_grad():
            expected = theirs.encode(x)
            rebuilt = theirs.decode(expected)
        assert torch.equal(ours > 0, expected > 0)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(sae.decode(ours), rebuilt, rtol=0, atol=1e-3)
        torch.testing.assert_close(sae.dec_rows.norm(dim=1), torch.ones(sae.width))
        fvu = (rebuilt - x).square().sum() / (x - x.mean(0)).square().sum()
        assert report.fvu == pytest.approx(float(fvu), rel=1e-4)
        assert report.l0 == pytest.approx(float((expected > 0).sum(1).float().mean()))
        assert report.dead_share == pytest.approx(float((expected > 0).any(0).logical_not().float().mean()))


def test_some_of_a_suite_may_be_loaded(trained):
    out, _ = trained
    assert [sae.name for sae in load_suite(out, [NAMES[3], NAMES[0]])] == [NAMES[0], NAMES[3]]
    with pytest.raises(InvalidInput) as caught:
        load_suite(out, [NAMES[0], "h.topk.w1.l1"])
    assert str(caught.value) == f"{out}/report.json: holds no SAE h.topk.w1.l1"


def test_a_latent_at_its_threshold_does_not_fire_here_nor_in_sae_lens(tmp_path):
    sae = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(d_in=2, d_sae=2, apply_b_dec_to_input=True))
    sae.W_enc.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    sae.W_dec.data = torch.eye(2)
    sae.b_enc.data = torch.tensor([0.25, -0.5])
    sae.b_dec.data = torch.tensor([1.0, 2.0])
    sae.threshold.data = torch.tensor([0.5, 0.5])
    sae.save_model(tmp_path)
    above = float(torch.nextafter(torch.tensor(1.25), torch.tensor(2.0)))
    # Latent 0 sees x0 - 1 + 0.25, so that x0 = 1.25 is its threshold; latent 1 sees x1 - 2 - 0.5, which 3 brings there.
    x = torch.tensor([[1.25, 3.0], [above, 3.0], [1.25, 3.5]])
    ours = load_sae(tmp_path, "h").encode(x)
    assert (ours > 0).tolist() == [[False, False], [True, False], [False, True]]
    with torch.no_grad():
        assert torch.equal(ours, sae_lens.SAE.load_from_disk(tmp_path).encode(x))


@pytest.mark.parametrize("rescaled", [False, True])
def test_a_topk_sae_of_sae_lens_is_read_as_it_reads_it(tmp_path, rescaled):
    torch.manual_seed(0)
    sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=16, d_sae=32, k=3, rescale_acts_by_decoder_norm=rescaled))
    sae.W_dec.data *= torch.rand(32, 1) * 3
    sae.b_dec.data.normal_()
    sae.save_model(tmp_path)
    x = torch.randn(20, 16)
    ours = load_sae(tmp_path, "h")
    with torch.no_grad():
        expected = sae.encode(x)
        torch.testing.assert_close(ours.encode(x), expected)
        torch.testing.assert_close(ours.decode(ours.encode(x)), sae.decode(expected))
    assert ((ours.encode(x) > 0).sum(1) <= 3).all()


# -- stopping and going on


def test_a_killed_run_that_goes_on_ends_where_a_whole_one_does(activations, trained, tmp_path):
    whole, reports = trained
    kill(activations, tmp_path, after_step=50)
    assert not (tmp_path / "report.json").exists()
    # Groups are of 16, 16 and 8 steps: step 40 was the last to be saved, and those before it are gone.
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert sorted(f.name for f in kept.iterdir()) == sorted([*(f"{name}.pt" for name in NAMES), "complete.json"])
    # Killed while it saved, and while it wrote a line: neither counts.
    (tmp_path / "checkpoints" / "step-00000056").mkdir()
    with (tmp_path / "losses.jsonl").open("a") as stream:
        stream.write('{"step": 60, "tokens": 1920, "fvu": {}}\n{"step": 8')
    resumed = []
    found = train(SMALL, activations, tmp_path, lambda done, _total, _fvu: resumed.append(done))
    assert resumed[0] == 50 * 32
    assert found == reports
    assert_same_suite(tmp_path, whole)


def test_nothing_is_saved_before_its_time(activations, tmp_path):
    seen = []

    def progress(_done, _total, _fvu):
        seen.append((tmp_path / "checkpoints").exists())

    train(SMALL.model_copy(update={"tokens": 32 * 40}), activations, tmp_path, progress, save_seconds=600)
    assert not any(seen)


def test_a_suite_that_was_trained_is_not_trained_again(activations, trained):
    out, reports = trained
    assert train(SMALL, activations, out, lambda *_: pytest.fail("trained again")) == reports


def test_two_processes_train_what_one_does_and_go_on_where_one_was_killed(activations, trained, tmp_path):
    whole, _ = trained
    kill(activations, tmp_path / "killed", after_step=30)
    write_config(tmp_path / "suite.toml", SMALL)
    folder = Path(__file__).parent
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            folder / "two_processes.py", tmp_path / "suite.toml", activations, tmp_path / "fresh", tmp_path / "killed",
        ],
        env=os.environ | {"PYTHONPATH": str(folder.parent.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same_suite(tmp_path / "fresh", whole)
    assert_same_suite(tmp_path / "killed", whole)


def test_an_sae_is_the_same_whatever_is_trained_beside_it(activations, trained, tmp_path):
    _, reports = trained
    alone = only(Grid(hook_points=POINTS[:1], architectures=("topk",), widths=(64,), l0=(4,)))
    (report,) = train(alone, activations, tmp_path)
    assert report == reports[NAMES.index(report.name)]


# -- training on


def test_chosen_saes_are_trained_on_from_where_they_were(activations, trained, tmp_path):
    whole, reports = trained
    before = {report.name: report for report in reports}
    chosen = only(Grid(hook_points=POINTS[:1], architectures=ALL, widths=(64,), l0=(4,)), start_from=str(whole))
    for report in train(chosen, activations, tmp_path):
        assert report.tokens_trained == 2 * SMALL.tokens
        assert report.fvu < before[report.name].fvu


@pytest.mark.parametrize("architecture", ALL)
def test_starting_weights_say_what_the_saved_sae_says(activations, trained, tmp_path, architecture):
    spec = SaeSpec(POINTS[0], architecture, 64, 4)
    saved = load_sae(trained[0] / spec.name, spec.hook_point)
    trainee = Trainee(spec, SMALL, 0.7, torch.zeros(16))  # another corpus may have another scale
    trainee.start_from(trained[0] / spec.name, 0)
    trainee.save(tmp_path)
    again = load_sae(tmp_path, spec.hook_point)
    x = shards.load(activations, 5)[spec.hook_point].float()
    torch.testing.assert_close(again.encode(x), saved.encode(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again.decode(again.encode(x)), saved.decode(saved.encode(x)), rtol=1e-3, atol=1e-3)


def test_an_sae_that_the_other_suite_lacks_is_named(activations, trained, tmp_path):
    other = only(Grid(hook_points=POINTS[:1], widths=(64,), l0=(4, 5)), start_from=str(trained[0]))
    with pytest.raises(InvalidInput) as caught:
        train(other, activations, tmp_path / "out")
    assert str(caught.value) == f"{trained[0]}: holds no trained SAE model.layers.1.batch_topk.w64.l5"
    assert not (tmp_path / "out").exists()


# -- refusals


def test_a_run_of_another_configuration_is_refused(activations, trained):
    out, _ = trained
    with pytest.raises(InvalidInput) as caught:
        train(SMALL.model_copy(update={"seed": 5}), activations, out)
    assert (
        str(caught.value)
        == f"{out}/suite.toml: made with another seed; give the same again, or another --out to start afresh"
    )


def test_a_run_goes_on_with_the_activations_that_it_was_begun_with(activations, tmp_path):
    kill(activations, tmp_path / "out", after_step=40)
    others = synthetic_shards(tmp_path / "others", seed=3)
    with pytest.raises(InvalidInput) as caught:
        train(SMALL, others, tmp_path / "out")
    assert str(caught.value) == (
        f"{others}: found another harvest than {tmp_path / 'out'} was begun with; give the same again, or another --out"
    )
    train(SMALL, activations, tmp_path / "out")
    with pytest.raises(InvalidInput, match="found another harvest"):  # nor is its report theirs
        train(SMALL, others, tmp_path / "out")


def test_a_hook_point_that_was_not_harvested_is_named(activations, tmp_path):
    with pytest.raises(InvalidInput) as caught:
        train(only(Grid(hook_points=("model.layers.1", "lm_head"), widths=(64,), l0=(4,))), activations, tmp_path)
    assert str(caught.value) == f"{activations}: holds model.layers.1, model.layers.3; not lm_head"


def test_too_few_shards_are_told(activations, tmp_path):
    with pytest.raises(InvalidInput) as caught:
        train(SMALL.model_copy(update={"held_out_shards": 6}), activations, tmp_path)
    assert str(caught.value) == (
        f"{activations}: 6 shards of 256 tokens are too few for batches of 32 with 6 shards held out"
    )


def test_a_suite_that_was_not_trained_to_its_end_is_named(tmp_path):
    with pytest.raises(InvalidInput) as caught:
        load_suite(tmp_path)
    assert str(caught.value) == f"{tmp_path}: holds no report.json; train with `guard lab train` to its end"


def test_an_architecture_that_is_not_known_is_refused(tmp_path):
    (tmp_path / "cfg.json").write_text('{"architecture": "gated"}')
    with pytest.raises(InvalidInput) as caught:
        load_sae(tmp_path, "h")
    assert str(caught.value) == f"{tmp_path}: architecture: found 'gated', expected 'jumprelu' or 'topk'"


# -- the command


def test_the_command_trains_what_the_file_says(activations, trained, tmp_path, capsys):
    file, out = tmp_path / "small.toml", tmp_path / "out"
    write_config(file, only(Grid(hook_points=POINTS[:1], widths=(64,), l0=(4,))))
    command = ["lab", "train", "--config", file, "--activations", activations, "--out", out, "--tokens", 640]
    assert main([str(a) for a in command]) == 0
    found = capsys.readouterr()
    (report,) = json.loads((out / "report.json").read_text())
    assert report["tokens_trained"] == 640
    assert found.out == (
        f"{out}/model.layers.1.batch_topk.w64.l4: FVU {report['fvu']:.4f}, L0 {report['l0']:.1f}, "
        f"dead {report['dead_share']:.1%}, 640 tokens\n"
    )
    assert "train: 640 of 640 tokens (100%)" in found.err
    assert "mean FVU" in found.err
    command = ["lab", "train", "--config", file, "--activations", activations, "--out", tmp_path / "on", "--from", out]
    assert main([str(a) for a in command]) == 0
    assert capsys.readouterr().out.endswith(", 3,840 tokens\n")
