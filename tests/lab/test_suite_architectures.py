"""One step of each architecture: what is kept, and that the lean pass says what sae-lens's own says."""

import pytest
import sae_lens
import torch
from sae_lens.saes.sae import TrainStepInput

from guard.lab.suite.architectures import make
from guard.lab.suite.config import SaeSpec

THEIRS = {"batch_topk": sae_lens.BatchTopKTrainingSAE, "topk": sae_lens.TopKTrainingSAE}


def step(sae, x, dead=None):
    return sae.training_forward_pass(
        TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False)
    )


def make_sae(architecture="batch_topk", k=8, width=256, d_model=32):
    torch.manual_seed(0)
    return make(SaeSpec("h", architecture, width, k), d_model)


def normal(seed, tokens=64):
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", THEIRS)
def test_loss_and_gradients_are_those_of_sae_lens_within_bfloat16(architecture):
    ours = make_sae(architecture)
    ours.b_dec.data = normal(3, 1)[0]
    ours.b_enc.data += 0.01
    theirs = THEIRS[architecture](ours.cfg)
    theirs.load_state_dict(ours.state_dict())
    dead = torch.zeros(256, dtype=torch.bool)
    dead[:30] = True
    for mask in (None, dead):
        losses = [step(sae, normal(4), mask).loss for sae in (ours, theirs)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=2e-3)
        for sae, loss in zip((ours, theirs), losses, strict=True):
            sae.zero_grad()
            loss.backward()
        for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            alike = torch.nn.functional.cosine_similarity(mine.grad.flatten(), other.grad.flatten(), dim=0)
            assert alike > 0.998, name
            assert mine.grad.norm().item() == pytest.approx(other.grad.norm().item(), rel=0.02), name


def test_batch_topk_keeps_about_k_latents_a_token_and_they_are_the_largest():
    sae = make_sae()
    for number in range(20):
        out = step(sae, normal(number) * (1 + number % 3))
        kept = (out.feature_acts > 0).sum() / 64
        assert 0.93 * 8 <= kept <= 8  # bfloat16 has ties at the cut, and they are all left out
        assert out.feature_acts[out.feature_acts > 0].min() > out.hidden_pre[out.feature_acts == 0].max()


def test_the_threshold_of_batch_topk_follows_the_cut():
    sae = make_sae()
    for _ in range(600):
        step(sae, normal(1))
    assert float(sae.topk_threshold) == pytest.approx(sae.cut, rel=0.01)


def test_topk_keeps_each_token_s_k_largest():
    out = step(make_sae("topk"), normal(1))
    assert ((out.feature_acts > 0).sum(1) == 8).all()
    assert torch.equal(out.feature_acts.amax(1), out.hidden_pre.amax(1))


@pytest.mark.parametrize("architecture", THEIRS)
@pytest.mark.parametrize("dead", [1, 5, 200, 256])
def test_dead_latents_get_a_finite_loss_and_a_gradient(architecture, dead):
    sae = make_sae(architecture)
    mask = torch.zeros(256, dtype=torch.bool)
    mask[:dead] = True
    out = step(sae, normal(2), mask)
    assert set(out.losses) == {"mse_loss", "auxiliary_reconstruction_loss"}
    assert torch.isfinite(out.loss)
    assert out.loss.item() == pytest.approx(sum(x.item() for x in out.losses.values()))
    out.losses["auxiliary_reconstruction_loss"].backward()
    assert torch.isfinite(sae.W_enc.grad).all()
    assert sae.W_enc.grad[:, :dead].abs().sum() > 0
    assert sae.W_enc.grad[:, dead:].abs().sum() == 0


@pytest.mark.parametrize("architecture", THEIRS)
def test_without_dead_latents_there_is_no_auxiliary_loss(architecture):
    out = step(make_sae(architecture), normal(1), torch.zeros(256, dtype=torch.bool))
    assert set(out.losses) == {"mse_loss"}


def test_jumprelu_pays_for_latents_over_its_target_and_is_paid_for_those_it_lacks():
    for target, sign in ((2.0, 1), (250.0, -1)):
        sae = make_sae("jumprelu", k=target)
        sae.W_dec.data *= 10  # of length one
        out = step(sae, normal(1))
        assert 2 < float((out.feature_acts > 0).sum(1).float().mean()) < 250
        assert out.losses["l0_loss"].item() * sign > 0
        out.losses["l0_loss"].backward()
        # A descent of the loss raises the thresholds where too many fire, and lowers them where too few do.
        assert sae.threshold.grad.sum() * sign < 0
        assert sae.log_coefficient * sign > 0
