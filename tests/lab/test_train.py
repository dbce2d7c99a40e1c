"""Training: what is saved is what was trained, sae-lens reads it alike, and a killed run ends where a whole one does."""

import json

import pytest
import sae_lens
import torch
from sae_lens import BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import load_file

from guard.errors import InvalidInput
from guard.lab import shards
from guard.lab.sae import load_sae, load_suite
from guard.lab.train import SuiteSAE, TrainConfig, train
from tests.lab.given import POINTS, synthetic_shards

SMALL = TrainConfig(
    hook_points=POINTS,
    width=64,
    k=4,
    tokens=32 * 100,  # 100 steps; a group of two shards gives 16
    batch=32,
    learning_rate=3e-3,
    warmup_steps=10,
    dead_after_tokens=500,
    shards_mixed=2,
    held_out_shards=1,
)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    return synthetic_shards(tmp_path_factory.mktemp("activations"))


@pytest.fixture(scope="module")
def trained(activations, tmp_path_factory):
    out = tmp_path_factory.mktemp("saes")
    return out, train(SMALL, activations, out)


def test_an_sae_holds_most_of_what_it_has_not_seen_in_k_latents_a_token(activations, tmp_path):
    # The threshold is a moving average over some 100 steps: fewer leave it too low, and more than k latents fire.
    config = SMALL.model_copy(update={"hook_points": POINTS[:1], "tokens": 32 * 400})
    (report,) = train(config, activations, tmp_path)
    assert report.fvu < 0.3
    assert report.l0 == pytest.approx(config.k, rel=0.3)
    assert (report.width, report.tokens_trained) == (64, 32 * 400)


def test_a_report_stands_beside_the_saes(trained):
    out, reports = trained
    assert [(r.hook_point, r.tokens_trained) for r in reports] == [(p, SMALL.tokens) for p in POINTS]
    assert json.loads((out / "report.json").read_text()) == [r.model_dump() for r in reports]


def test_sae_lens_loads_what_was_saved_and_encodes_the_same(activations, trained):
    out, reports = trained
    suite = load_suite(out)
    assert [sae.hook_point for sae in suite] == list(POINTS)
    for sae, report in zip(suite, reports, strict=True):
        theirs = sae_lens.SAE.load_from_disk(out / sae.hook_point)
        x = shards.load(activations, 5)[sae.hook_point].float()  # the shard that was held out
        ours = sae.encode(x)
        with torch.no_grad():
            expected = theirs.encode(x)
            rebuilt = theirs.decode(expected)
        assert torch.equal(ours > 0, expected > 0)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
        fvu = (rebuilt - x).square().sum() / (x - x.mean(0)).square().sum()
        assert report.fvu == pytest.approx(float(fvu), rel=1e-4)
        assert report.l0 == pytest.approx(float((expected > 0).sum(1).float().mean()))
        assert report.dead_share == pytest.approx(float((expected > 0).any(0).logical_not().float().mean()))


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


def test_a_killed_run_that_goes_on_ends_where_a_whole_one_does(activations, trained, tmp_path):
    whole, reports = trained
    told = []

    def kill_in_the_second_group(done, total, _fvu):
        told.append((done, total))
        if (tmp_path / "checkpoint.pt").exists():
            raise Killed

    with pytest.raises(Killed):
        train(SMALL, activations, tmp_path, kill_in_the_second_group)
    assert told[-1] == (20 * 32, 100 * 32)
    assert not (tmp_path / "report.json").exists()
    resumed = []
    found = train(SMALL, activations, tmp_path, lambda done, _total, _fvu: resumed.append(done))
    assert resumed[0] == 20 * 32  # from step 16, where the first group ended
    assert found == reports
    for point in POINTS:
        ours, theirs = (load_file(folder / point / "sae_weights.safetensors") for folder in (tmp_path, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), point


def test_a_run_of_another_configuration_is_refused(activations, trained):
    out, _ = trained
    with pytest.raises(InvalidInput) as caught:
        train(SMALL.model_copy(update={"k": 5}), activations, out)
    assert (
        str(caught.value) == f"{out}/train.json: a run of another configuration; choose another --out to start afresh"
    )


def test_a_hook_point_that_was_not_harvested_is_named(activations, tmp_path):
    with pytest.raises(InvalidInput) as caught:
        train(SMALL.model_copy(update={"hook_points": ("model.layers.1", "lm_head")}), activations, tmp_path)
    assert str(caught.value) == f"{activations}: holds model.layers.1, model.layers.3; not lm_head"


def test_a_suite_that_was_not_trained_to_its_end_is_named(tmp_path):
    with pytest.raises(InvalidInput) as caught:
        load_suite(tmp_path)
    assert str(caught.value) == f"{tmp_path}: holds no report.json; train with `guard lab train` to its end"


def test_a_gate_that_looks_at_other_latents_is_refused(tmp_path):
    (tmp_path / "cfg.json").write_text('{"architecture": "topk"}')
    with pytest.raises(InvalidInput) as caught:
        load_sae(tmp_path, "h")
    assert str(caught.value) == f"{tmp_path}: architecture: found 'topk', expected 'jumprelu'"


# -- one step


def step(sae, x, dead=None):
    return sae.training_forward_pass(
        TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False)
    )


def make_sae(k=8, width=256, d_model=32):
    torch.manual_seed(0)
    return SuiteSAE(
        BatchTopKTrainingSAEConfig(
            d_in=d_model, d_sae=width, k=k, dtype="float32", device="cpu", apply_b_dec_to_input=True
        )
    )


def test_about_k_latents_a_token_are_kept_and_they_are_the_largest():
    sae = make_sae()
    for number in range(20):
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(number)) * (1 + number % 3)
        out = step(sae, x)
        kept = (out.feature_acts > 0).sum() / 64
        assert 0.93 * 8 <= kept <= 8  # bfloat16 has ties at the cut, and they are all left out
        assert out.feature_acts[out.feature_acts > 0].min() > out.hidden_pre[out.feature_acts == 0].max()


def test_the_threshold_follows_the_cut():
    sae = make_sae()
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    for _ in range(600):
        step(sae, x)
    assert float(sae.topk_threshold) == pytest.approx(sae.cut, rel=0.01)


@pytest.mark.parametrize("dead", [1, 5, 200, 256])
def test_dead_latents_get_a_finite_loss_and_a_gradient(dead):
    sae = make_sae()
    mask = torch.zeros(256, dtype=torch.bool)
    mask[:dead] = True
    out = step(sae, torch.randn(64, 32, generator=torch.Generator().manual_seed(2)), mask)
    assert set(out.losses) == {"mse_loss", "auxiliary_reconstruction_loss"}
    assert torch.isfinite(out.loss)
    assert out.loss.item() == pytest.approx(sum(x.item() for x in out.losses.values()))
    out.losses["auxiliary_reconstruction_loss"].backward()
    assert torch.isfinite(sae.W_enc.grad).all()
    assert sae.W_enc.grad[:, :dead].abs().sum() > 0
    assert sae.W_enc.grad[:, dead:].abs().sum() == 0


def test_without_dead_latents_there_is_no_auxiliary_loss():
    out = step(make_sae(), torch.randn(64, 32), torch.zeros(256, dtype=torch.bool))
    assert set(out.losses) == {"mse_loss"}
