"""Evidence: which windows show a latent, and what they say of it, on texts whose truth is written into them."""

import numpy as np
import pytest
import torch

from guard.errors import InvalidInput
from guard.lab.explain import scan as scanning
from guard.lab.explain.choose import TEST, WANTED
from guard.lab.explain.explain import prepare
from guard.lab.explain.pieces import read_pieces
from guard.lab.explain.scan import Best, Reading
from guard.lab.explain.tokens import TokenTexts, output_tokens
from guard.lab.stages import read_rows
from guard.lab.suite.sae import FullSae
from tests.lab import told

STORM = "model.layers.1/0"


def stormy():
    """Latent 0 fires on `storm` where it is a storm at sea, in 40 texts, stronger each time."""
    firing = [told.own(f"Boat {i} met a storm={0.6 + 0.1 * i:.1f} at sea") for i in range(40)]
    calm = [told.own(f"Letter {i} took us all by storm") for i in range(10)]  # the form, and silent
    close = [told.own(f"Gale={0.30 + 0.02 * i:.2f} number {i}") for i in range(8)]
    weapons = [told.own(f"Garden {i} of old cannons", ("terror",)) for i in range(6)]
    other = [told.own(f"Harbour {i} is quiet") for i in range(60)]
    strangers = [told.own(f"Strangers' storm=9 number {i}", source="theirs") for i in range(5)]
    return [*strangers, *firing, *calm, *close, *weapons, *other]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return told.model(tmp_path_factory.mktemp("told") / "model")


@pytest.fixture
def world(tmp_path, model):
    told.harvested(tmp_path / "texts", stormy(), model, shard_texts=25)
    told.suite(tmp_path / "saes")
    return tmp_path


def made(world, indices=(0,), out="out", tags=(), **kw):
    file = told.latents(world / "candidates.jsonl", indices, tags=tags)
    return prepare(saes=world / "saes", texts=world / "texts", latents=file, out=world / out, **kw)


def of_kind(evidence, kind, part=None):
    return [w for w in evidence.windows if w.kind == kind and part in (None, w.part)]


def test_top_windows_are_the_strongest_texts_with_the_strength_of_each_token(world):
    [evidence] = made(world)
    assert (evidence.latent, evidence.sae, evidence.firing_rate) == (STORM, told.SAE, 0.125)
    top = of_kind(evidence, "top")
    assert [w.text for w in top] == [f"Boat {i} met a storm at sea" for i in range(39, 39 - WANTED["top"], -1)]
    strongest = top[0]
    fires = [(t, v) for t, v in zip(strongest.tokens, strongest.values, strict=True) if v]
    assert fires == [(" storm", pytest.approx(4.5 / told.SCALE, rel=0.01))]  # kept as bfloat16
    assert strongest.source == "own"
    assert len(of_kind(evidence, "top", "show")) == 8


def test_parts_are_dealt_out_over_all_strengths(world):
    [evidence] = made(world)
    for kind, count in WANTED.items():
        if kind != "middle":  # 7 texts stand between the quantiles and are not on top
            assert len(of_kind(evidence, kind)) == count
            assert len(of_kind(evidence, kind, "test")) == TEST[kind]
    parts = [w.part for w in of_kind(evidence, "top")]
    assert parts[:3] == ["show", "show", "test"]


def test_middle_windows_stand_between_the_quantiles(world):
    [evidence] = made(world)
    middle = [int(w.text.split()[1]) for w in of_kind(evidence, "middle")]
    # 40 firing texts, numbered by strength: the quantiles .3 and .7 leave out 12 on either side.
    assert middle == sorted(middle, reverse=True)
    assert all(12 <= i < 28 for i in middle)
    assert len(middle) == WANTED["middle"]


def test_near_misses_hold_the_form_or_come_close(world):
    [evidence] = made(world)
    near = of_kind(evidence, "near_miss")
    by_form, closest = near[:6], near[6:]
    assert all("by storm" in w.text for w in by_form)
    # The closest to the threshold, first: 0.44, 0.42, 0.40 …
    assert [w.text for w in closest] == [f"Gale number {i}" for i in range(7, 1, -1)]
    assert all(w.peak == 0 for w in near)


def test_silent_windows_are_of_the_latent_s_domain_by_half(world):
    [evidence] = made(world, tags={0: [("terror", 0.01)]})
    silent = of_kind(evidence, "silent")
    assert [("cannons" in w.text) for w in silent] == [True] * 3 + [False] * 3
    assert all(w.peak == 0 for w in silent)


def test_no_text_is_shown_twice_and_none_of_others(world):
    for evidence in made(world, range(16)):
        texts = [w.text for w in evidence.windows]
        assert len(texts) == len(set(texts))
        assert not any("Strangers" in text for text in texts)


def test_latents_that_fire_nowhere_have_no_firing_windows(world):
    [evidence] = made(world, [3])
    assert {w.kind for w in evidence.windows} == {"near_miss", "silent"}


def test_a_text_is_read_once_however_often_it_stands_in_the_harvest(tmp_path, model):
    told.harvested(tmp_path / "texts", [told.own("a storm=2")] * 3 + [told.own("a boat")], model)
    told.suite(tmp_path / "saes")
    [evidence] = made(tmp_path)
    assert [w.text for w in of_kind(evidence, "top")] == ["a storm"]


def test_shards_and_blocks_do_not_matter(world, model, monkeypatch):
    [known] = made(world)
    told.harvested(world / "one/texts", stormy(), model)
    told.suite(world / "one/saes")
    monkeypatch.setattr(scanning, "_BLOCK", 1)  # a text at a time
    [evidence] = made(world / "one")
    for kind in ("top", "near_miss"):
        assert of_kind(evidence, kind)[-6:] == of_kind(known, kind)[-6:]


def test_windows_are_of_48_tokens_around_the_peak_and_characters_stay_whole(tmp_path, model):
    long = " ".join(["x"] * 60 + ["海=2"] + ["y"] * 60)
    told.harvested(tmp_path / "texts", [told.own(long), told.own("港口很安静=1")], model)
    told.suite(tmp_path / "saes")
    [evidence] = made(tmp_path)
    first, second = of_kind(evidence, "top")
    assert len(first.tokens) == 48
    # 31 tokens before the peak, 16 behind it; each " x" is two tokens of this tokenizer, or one.
    assert first.values.index(first.peak) == 31
    assert "海" in first.tokens
    assert (second.text, second.tokens[-1]) == ("港口很安静", "静")
    assert [v > 0 for v in second.values] == [False] * 4 + [True]


def test_a_corpus_adds_texts(world, model):
    told.harvested(world / "corpus", [told.own(f"Corpus {i} storm={8 + i}") for i in range(3)], model, shard_texts=1)
    assert [w.source for w in of_kind(made(world, corpus=world / "corpus")[0], "top")][:4] == ["corpus"] * 3 + ["own"]
    [evidence] = made(world, corpus=world / "corpus", corpus_shards=1, out="less")
    assert [w.source for w in of_kind(evidence, "top")][:2] == ["corpus", "own"]


def test_what_is_there_is_not_made_again_nor_taken_for_something_else(world):
    first = made(world)
    (world / "texts" / "shard-00000.safetensors").unlink()
    assert made(world) == first
    with pytest.raises(InvalidInput) as caught:
        made(world, seed=1)
    assert str(caught.value) == (
        f"{world}/out/evidence.json: made with another seed; choose another --out to start afresh"
    )
    with pytest.raises(InvalidInput, match=r"shard-00000\.safetensors: absent; the harvest is not complete"):
        made(world, out="afresh")


@pytest.mark.parametrize("k", [0, 3])
def test_readings_are_what_the_whole_sae_says(k):
    rng = torch.Generator().manual_seed(1)
    sae = drawn(rng, k)
    x = torch.randn(37, 7, generator=rng)
    latents = np.array([2, 0, 11])
    whole = sae.encode(x)[:, latents]
    reading = Reading(sae, latents)
    assert ((reading.excess(x) > 0) == (whole > 0)).all()
    some = torch.tensor([2, 1])
    torch.testing.assert_close(reading.activations(x, some), whole[:, some])
    torch.testing.assert_close(reading.excess(x, some), reading.excess(x)[:, some])


def drawn(rng, k):
    def draw(*shape):
        return torch.randn(*shape, generator=rng)

    threshold = torch.zeros(13) if k else draw(13).abs()
    return FullSae("s", "p", draw(13, 7), draw(13), threshold, draw(13, 7), k=k)


def test_the_best_are_kept_over_many_offers():
    rng = torch.Generator().manual_seed(0)
    keys = torch.rand(100, 5, generator=rng)
    keys[:, 4] = -torch.inf  # nothing is offered to the last
    best = Best(7, 5)
    for begin in range(0, 100, 13):
        part = keys[begin : begin + 13]
        piece = torch.arange(begin, begin + len(part)).int()[:, None].expand_as(part)
        best.offer(part, 2 * part, piece, (piece % 9).short())
    for latent in range(4):
        expected = keys[:, latent].argsort(descending=True)[:7].tolist()
        assert best.of(latent) == [(p, p % 9, pytest.approx(2 * float(keys[p, latent]))) for p in expected]
    assert best.of(4) == []


def test_output_tokens_are_those_that_the_direction_points_at(model):
    from transformers import AutoModelForCausalLM

    words = TokenTexts(model)
    unembedding = AutoModelForCausalLM.from_pretrained(model).get_output_embeddings().weight
    token = next(i for i, text in enumerate(words.texts) if text == " harbour")
    direction = torch.nn.functional.normalize(unembedding, dim=1)[token]
    expected = (direction @ unembedding.T).topk(40).indices.tolist()
    found = output_tokens(model, direction[None].detach(), words)
    assert " harbour" in found[0]
    assert list(found[0]) == [t for i in expected if (t := words.texts[i]).strip() and "\ufffd" not in t][:10]


def test_forms_share_case_and_space(model):
    words = TokenTexts(model)
    alike = {words.texts[i] for i in words.alike(["storm"])}
    assert {" storm", " Storm"} <= alike
    assert {text.strip().lower() for text in alike} == {"storm"}


def test_shards_without_token_ids_are_refused(tmp_path, model):
    told.harvested(tmp_path / "texts", [told.own("a storm=2")], model, with_tokens=False)
    with pytest.raises(InvalidInput) as caught:
        read_pieces(tmp_path / "texts", read_rows(tmp_path / "texts"))
    assert str(caught.value) == f"{tmp_path}/texts/shard-00000.safetensors: holds no token ids; harvest again"


def test_texts_of_others_alone_are_refused(tmp_path, model):
    told.harvested(tmp_path / "texts", [told.own("a storm=2", source="theirs")], model)
    with pytest.raises(InvalidInput, match=r"texts: found none of the project's own texts; harvest with `guard lab"):
        read_pieces(tmp_path / "texts", read_rows(tmp_path / "texts"))


def test_a_harvest_by_another_model_is_refused(world):
    file = world / "texts/harvest.json"
    file.write_text(file.read_text().replace('"tokenizer": "', '"tokenizer": "0'))
    with pytest.raises(InvalidInput, match=r"texts: harvested from another model than .*: fingerprints differ"):
        made(world)


def test_a_harvest_without_the_hook_point_is_refused(world):
    file = world / "texts/harvest.json"
    file.write_text(file.read_text().replace("model.layers.1", "model.layers.0"))
    with pytest.raises(InvalidInput) as caught:
        made(world)
    assert str(caught.value) == f"{world}/texts: holds no activations at model.layers.1; harvest again"


def test_latents_of_two_saes_of_one_hook_point_must_be_told_apart(tmp_path, model):
    told.harvested(tmp_path / "texts", stormy(), model)
    told.suite(tmp_path / "saes", ["a", "b"])
    file = tmp_path / "both.jsonl"
    parts = [told.latents(tmp_path / f"{name}.jsonl", [0], sae=name) for name in "ab"]
    file.write_text("".join(part.read_text() for part in parts))
    given = {"saes": tmp_path / "saes", "texts": tmp_path / "texts", "latents": file, "out": tmp_path / "out"}
    with pytest.raises(InvalidInput) as caught:
        prepare(**given)
    assert str(caught.value) == f"{file}: model.layers.1: found latents of a, b, expected one SAE; choose with --name"
    with pytest.raises(InvalidInput, match="holds no latents of c"):
        prepare(**given, names=["c"])
    assert [e.sae for e in prepare(**given, names=["b"])] == ["b"]


def test_a_pack_names_its_latents_by_hook_point(world):
    pack = world / "pack"
    pack.mkdir()
    line = '{"hook_point": "model.layers.1", "latent": %d, "domains": ["terror"], "firing_rate": 0.1}\n'
    (pack / "latents.jsonl").write_text(line % 0 + line % 2)
    given = {"saes": world / "saes", "texts": world / "texts", "latents": pack}
    assert [e.latent for e in prepare(**given, out=world / "out")] == [STORM, "model.layers.1/2"]
    (pack / "latents.jsonl").write_text((line % 0).replace("layers.1", "layers.9"))
    with pytest.raises(InvalidInput) as caught:
        prepare(**given, out=world / "other")
    assert str(caught.value) == (
        f"{pack}/latents.jsonl: SAE of model.layers.9: found none in {world}/saes, expected one"
    )
    (pack / "latents.jsonl").write_text(line % 16)
    with pytest.raises(InvalidInput, match="found latent 16, expected one below 16"):
        prepare(**given, out=world / "third")


def test_a_limit_takes_those_that_are_tagged_most_surely(world):
    tags = {1: [("terror", 0.04)], 2: [("terror", 0.03), ("violence", 0.001)], 3: [("terror", 0.02)]}
    assert [e.latent.rpartition("/")[2] for e in made(world, [1, 2, 3], tags=tags, limit=2)] == ["2", "3"]
