"""Cross-entropy recovered, with the real model on a few hundred tokens and SAEs made by hand."""

import json

import pytest
import sae_lens
import torch

from guard.errors import InvalidInput
from guard.lab import shards
from guard.lab.harvest import harvest
from guard.lab.suite.measure import SaeReport, write_reports
from guard.lab.suite.recovered import Judge, add_recovered, held_out_pieces
from guard.reader.tokens import TextTokenizer
from tests.lab.given import synthetic_shards

POINTS = ("model.layers.1", "model.layers.2.mlp.down_proj")
TEXT = (
    "The river rose after three days of rain, and the people of the village carried their belongings up the hill. "
    "Nobody was hurt. On Monday the mayor thanked the volunteers, who had worked through the night, for their help. "
)


@pytest.fixture(scope="module")
def activations(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("harvest")
    (folder / "a.txt").write_text("\n\n\n".join(f"{i}. {TEXT}" for i in range(8)))
    harvest(
        model=str(model_folder), corpus=[folder / "a.txt"], hook_points=POINTS, out=folder, tokens=300, context=64,
        shard_tokens=100,
    )  # fmt: skip
    return folder


def save_sae(folder, hook_point, weights):
    """An SAE that fires wherever it can, and its report."""
    width, d_model = weights["W_dec"].shape
    sae = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(d_in=d_model, d_sae=width, apply_b_dec_to_input=False))
    sae.load_state_dict({"b_enc": torch.zeros(width), "threshold": torch.zeros(width), **weights})
    name = f"{hook_point}.jumprelu.w{width}.l1"
    sae.save_model(folder / name)
    return SaeReport(
        name=name, hook_point=hook_point, architecture="jumprelu", width=width, l0_target=1, tokens_trained=0, fvu=0,
        fvu_typical=0, outlier_share=0, l0=1, dead_share=0, threshold=0,
    )  # fmt: skip


def perfect():
    """Two latents a coordinate, one for each sign: what it decodes is its input."""
    both = torch.cat([torch.eye(576), -torch.eye(576)])
    return {"W_enc": both.T.contiguous(), "W_dec": both, "b_dec": torch.zeros(576)}


def silent(mean):
    return {"W_enc": torch.zeros(576, 1), "W_dec": torch.zeros(1, 576), "b_dec": mean}


def test_a_perfect_sae_recovers_all_and_one_that_says_the_mean_nothing(activations, tmp_path):
    first_held_out = shards.described(activations).shard_count - 2
    reports = []
    for point in POINTS:
        mean = shards.load(activations, first_held_out)[point].float().mean(0)
        reports += [save_sae(tmp_path, point, perfect()), save_sae(tmp_path, point, silent(mean))]
    write_reports(tmp_path, reports)
    told = []
    add_recovered(activations, tmp_path, 2, lambda done, total: told.append((done, total)))
    found = [entry["ce"] for entry in json.loads((tmp_path / "report.json").read_text())]
    assert len({ce["model"] for ce in found}) == 1
    for whole, nothing in (found[:2], found[2:]):
        assert whole["sae"] == pytest.approx(whole["model"], abs=0.01)
        assert whole["recovered"] == pytest.approx(1.0, abs=0.02)
        assert nothing["sae"] == nothing["ablated"] == whole["ablated"] > whole["model"]
        assert nothing["recovered"] == 0
    assert found[0]["ablated"] > found[2]["ablated"]  # a whole layer's output is more than that of one MLP
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    # What is known is not judged again.
    add_recovered(activations, tmp_path, 2, lambda *_: pytest.fail("judged again"))


def test_the_model_s_own_loss_is_that_of_transformers(activations, model_folder):
    pieces = held_out_pieces(activations, 2, tokens=20)
    assert [len(piece) for piece in pieces] == [len(pieces[0])]
    judge = Judge(model_folder, pieces)
    ids = torch.tensor([[TextTokenizer(model_folder).sink_id, *pieces[0]]])
    with torch.no_grad():
        expected = judge._model(input_ids=ids, labels=ids).loss
    assert judge.whole == pytest.approx(float(expected), rel=1e-3)


def test_the_sink_s_own_activation_is_left_as_it_is(activations, model_folder):
    judge = Judge(model_folder, held_out_pieces(activations, 2, tokens=20))
    seen = []
    judge._model.get_submodule("model.layers.2").register_forward_hook(lambda _m, given, _out: seen.append(given[0]))
    judge.loss("model.layers.1", torch.zeros_like)
    assert seen[0][:, 0].abs().sum() > 0
    assert seen[0][:, 1:].abs().sum() == 0


def test_pieces_are_those_of_the_held_out_shards(activations):
    count = shards.described(activations).shard_count
    kept = [shards.load(activations, index) for index in (count - 2, count - 1)]
    pieces = held_out_pieces(activations, 2, tokens=10_000)
    assert [t for piece in pieces for t in piece] == torch.cat([shard["token"] for shard in kept]).tolist()
    assert len(pieces) == len(torch.cat([shard["piece"] for shard in kept]).unique())


def test_without_token_ids_there_is_no_cross_entropy(tmp_path):
    activations = synthetic_shards(tmp_path / "activations")
    report = save_sae(tmp_path, POINTS[0], perfect())
    write_reports(tmp_path, [report])
    add_recovered(activations, tmp_path, 1)
    assert json.loads((tmp_path / "report.json").read_text())[0]["ce"] is None


def test_the_model_is_judged_in_the_type_it_was_harvested_in(activations, tmp_path, model_folder):
    pieces = held_out_pieces(activations, 1, tokens=20)
    losses = {dtype: Judge(model_folder, pieces, dtype).whole for dtype in ("float32", "bfloat16")}
    assert losses["float32"] != losses["bfloat16"]
    for dtype, loss in losses.items():
        folder = tmp_path / dtype
        shards.describe(folder, shards.described(activations).model_copy(update={"dtype": dtype}))
        for file in activations.glob("shard-*"):
            (folder / file.name).symlink_to(file)
        write_reports(folder, [save_sae(folder, POINTS[0], silent(torch.zeros(576)))])
        add_recovered(folder, folder, 1, tokens=20)
        assert json.loads((folder / "report.json").read_text())[0]["ce"]["model"] == loss


def test_another_model_than_the_one_harvested_is_refused(activations, tmp_path, model_folder):
    described = shards.described(activations).model_copy(update={"fingerprint": {"weights": "0", "tokenizer": "0"}})
    for file in activations.glob("shard-*"):
        (tmp_path / file.name).symlink_to(file)
    shards.describe(tmp_path, described)
    write_reports(tmp_path, [save_sae(tmp_path, POINTS[0], perfect())])
    with pytest.raises(InvalidInput) as caught:
        add_recovered(tmp_path, tmp_path, 1)
    assert str(caught.value) == f"{tmp_path}: harvested from another model than {model_folder}: fingerprints differ"
