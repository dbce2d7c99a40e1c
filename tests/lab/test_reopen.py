"""A pack laid out again as the stages left it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from guard.cli.main import main
from guard.lab import stages
from guard.lab.explain.gather import gather
from guard.lab.suite.sae import load_suite
from guard.pack.loader import load_pack
from tests.random_pack import write_random_pack

SHIPPED = Path("detectors/smollm2-135m-instruct/safety-residual")


@pytest.fixture(scope="module")
def reopened(tmp_path_factory):
    out = tmp_path_factory.mktemp("reopened") / "saes"
    assert main(["lab", "reopen", str(SHIPPED), "--out", str(out)]) == 0
    return out


def test_its_latents_say_what_they_said_and_keep_their_numbers(reopened):
    suite, pack = load_suite(reopened), load_pack(SHIPPED)
    assert [sae.hook_point for sae in suite] == [point.name for point in pack.hook_points]
    x = torch.randn(64, 576, generator=torch.Generator().manual_seed(3)) * 3
    for sae, point in zip(suite, pack.hook_points, strict=True):
        acts = sae.encode(x)
        pre = x @ torch.from_numpy(point.enc_rows).T + torch.from_numpy(point.bias)
        expected = torch.where(pre > torch.from_numpy(point.threshold), pre, 0.0)
        torch.testing.assert_close(acts[:, point.latents], expected)
        silent = np.setdiff1d(np.arange(sae.width), point.latents)
        assert sae.width == next(p.sae_width for p in pack.manifest.hook_points if p.name == point.name)
        assert not acts[:, silent].any()
        np.testing.assert_array_equal(stages.statistics(sae, reopened).scale[point.latents], point.scale)


def test_its_explanations_come_with_their_scores(reopened):
    found, dropped = gather(reopened, [reopened], 0.2)
    lines = load_pack(SHIPPED).latents
    assert (len(found), dropped) == (len(lines), 0)
    for one, line in zip(found, lines, strict=True):
        assert (one.latent, one.explanation, one.domains) == (line.latent, line.explanation, line.domains)
        assert one.scores.items() <= line.scores.items()


def test_a_pack_that_tells_of_no_saes_is_refused(tmp_path, capsys):
    pack = write_random_pack(tmp_path / "pack", {"weights": "0" * 64, "tokenizer": "0" * 64})
    assert main(["lab", "reopen", str(pack), "--out", str(tmp_path / "saes")]) == 1
    assert "found no SAEs in its evaluation, expected a pack of `guard lab build`" in capsys.readouterr().err
