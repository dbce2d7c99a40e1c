"""What the report counts, against values worked out by hand; and that the sentences it reads are what they claim."""

import re

import numpy as np
import pytest

from guard.lab.report import stimuli
from guard.lab.report.analysis import (
    Place,
    chance_latents,
    cosine,
    depth_gap,
    item_latents,
    jaccard,
    knowing,
    language_of,
    mean_depth,
    overlap,
    place,
)
from guard.lab.report.landscape import flat_map, like_neighbours


@pytest.mark.parametrize(
    ("hook_point", "expected", "short"),
    [
        ("model.layers.14", Place("residual", 14), "residual 14"),
        ("model.layers.9.mlp", Place("MLP output", 9), "MLP 9"),
        ("model.layers.9.mlp.down_proj", Place("MLP output", 9), "MLP 9"),
        ("model.layers.3.self_attn", Place("self_attn", 3), "self_attn 3"),
    ],
)
def test_a_hook_point_has_a_site_and_a_depth(hook_point, expected, short):
    assert place(hook_point) == expected
    assert place(hook_point).short == short


def test_a_latent_is_an_items_own_if_it_fires_on_nearly_all_of_its_sentences_and_hardly_elsewhere():
    item = [i for i in range(20) for _ in range(6)]  # 120 sentences; 2% of the 114 others are 2.28
    fired = np.zeros((120, 5), dtype=bool)
    fired[0:6, 0] = True  # all six of item 0
    fired[6:11, 1] = True  # five of item 1
    fired[[20, 30], 1] = True  # and two others: still its own
    fired[6:12, 2] = True
    fired[[20, 30, 40], 2] = True  # three others: no longer
    fired[12:16, 3] = True  # four of item 2: too few
    found = item_latents(fired, item)
    assert found.shape == (20, 5)
    assert np.argwhere(found).tolist() == [[0, 0], [1, 1]]


def test_sentences_dealt_at_random_hold_no_item():
    item = [i for i in range(20) for _ in range(6)]
    fired = np.eye(20, dtype=bool).repeat(6, axis=0)  # latent i fires on all of item i, and only there
    assert item_latents(fired, item).sum() == 20
    assert chance_latents(fired, item).tolist() == [0.0] * 20


def test_mean_depth_weighs_layers_by_what_is_found_there():
    covered = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.5]])
    assert mean_depth(covered, [2, 9, 20]) == pytest.approx((2 * 2 + 0.5 * 20) / 2.5)
    assert np.isnan(mean_depth(np.zeros((2, 3)), [2, 9, 20]))


def test_the_gap_between_kinds_has_an_interval_over_items():
    early = np.tile([1.0, 0.0], (8, 1))
    late = np.tile([0.0, 1.0], (8, 1))
    assert depth_gap(early, late, [2, 20]) == (18.0, 18.0, 18.0)
    mixed = np.array([[1.0, 0.0], [0.0, 1.0]] * 4)
    gap, low, high = depth_gap(early, mixed, [2, 20])
    assert gap == 9.0
    assert 0 <= low < 9 < high <= 18


def test_jaccard_counts_shared_latents_over_all_that_fire():
    left = np.array([[1, 1, 0, 0], [0, 0, 0, 0]], dtype=bool)
    right = np.array([[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=bool)
    assert jaccard(left, right) == pytest.approx(np.array([[1 / 3, 1, 0], [0, 0, 0]]))


def test_overlap_compares_a_query_with_its_translation_and_with_others():
    found = overlap(np.array([[0.5, 0.1, 0.3], [0.2, 0.4, 0.0], [0.3, 0.6, 0.3]]))
    assert found.same == pytest.approx(0.4)
    assert found.different == pytest.approx((0.4 + 0.2 + 0.9) / 6)
    assert found.found == pytest.approx(2 / 3)  # the third finds another's
    differences = [0.5 - 0.2, 0.4 - 0.1, 0.3 - 0.45]
    assert found.error == pytest.approx(np.std(differences, ddof=1) / 3**0.5)


def test_a_tie_does_not_count_as_found():
    assert overlap(np.full((3, 3), 0.5)).found == 0


def test_cosine_takes_off_what_a_language_is_by_itself():
    meaning = np.array([[1.0, 0, 0], [-1.0, 0, 0]], dtype=np.float32)
    language = np.array([0, 5, 0], dtype=np.float32)
    english, chinese = meaning + language, meaning - language
    assert cosine(english, chinese, apart=True) == pytest.approx(np.array([[1, -1], [-1, 1]]))
    together = cosine(english, chinese, apart=False)
    assert together.diagonal() == pytest.approx((1 - 25) / 26)
    assert together[0, 1] == pytest.approx((-1 - 25) / 26)


def test_a_candidate_is_of_one_language_only_where_it_is_silent_in_the_other():
    en, zh = np.array([3, 0, 5, 2, 4]), np.array([0, 3, 1, 0, 6])
    assert language_of(en, zh, least=3) == ["en", "zh", "both", "few", "both"]


def test_latents_that_know_fire_on_known_names_in_half_of_the_frames():
    frame = [f for f in range(4) for _ in range(12)]
    kind = (["known"] * 4 + ["rare"] * 4 + ["invented"] * 4) * 4
    fired = np.zeros((48, 4), dtype=bool)
    known = np.equal(kind, "known")
    invented = np.equal(kind, "invented")
    half = np.asarray(frame) < 2
    fired[known & half, 0] = True  # in two of four frames
    fired[known & (np.asarray(frame) < 1), 1] = True  # in one
    fired[invented, 2] = True  # the other way round
    fired[known, 3] = True
    fired[np.equal(kind, "rare") & half, 3] = True
    found = knowing(fired, frame, kind)
    assert found.latents == [3, 0]  # the clearest first
    assert found.swapped == 1
    assert found.rare[:, 3].tolist() == [1, 1, 0, 0]
    assert 0 <= found.shuffled < len(found.latents)


def test_a_map_puts_like_directions_together():
    rng = np.random.default_rng(0)
    centres = 5 * np.eye(3, 16)
    labels = ["a", "b", "c"] * 10
    rows = np.array([centres["abc".index(label)] for label in labels]) + 0.2 * rng.standard_normal((30, 16))
    points = flat_map(rows.astype(np.float32))
    assert points.shape == (30, 2)
    spread = {label: points[np.equal(labels, label)] for label in "abc"}
    inside = max(np.linalg.norm(p - p.mean(axis=0), axis=1).mean() for p in spread.values())
    between = min(np.linalg.norm(spread[x].mean(axis=0) - spread[y].mean(axis=0)) for x, y in ("ab", "ac", "bc"))
    assert inside < between
    found, chance = like_neighbours(rows.astype(np.float32), labels)
    assert found == 1.0
    assert chance == pytest.approx(3 * 10 * 9 / (30 * 29))


def test_entities_are_named_in_their_sentences_and_concepts_are_not():
    items = stimuli.items()
    entities = [item for item in items if item.kind == "entity"]
    assert (len(entities), len(items) - len(entities), sum(bool(i.zh) for i in items)) == (40, 30, 30)
    for item in items:
        assert (len(item.en), len(item.zh)) in {(6, 6), (6, 0)}
        for text in item.en if item.kind == "concept" else ():
            assert not any(re.search(rf"\b{stem}", text.lower()) for stem in item.avoid), text
        for text in (*item.en, *item.zh):
            named = [e.name for e in entities if e.name in text or (e.name_zh and e.name_zh in text)]
            assert named == ([item.name] if item.kind == "entity" else []), text
    texts = [text for item in items for text in (*item.en, *item.zh)]
    assert len(texts) == len(set(texts)) == 600


def test_queries_are_half_on_the_domains_and_half_everyday():
    queries = stimuli.translated()
    assert len(queries) == len({q.en for q in queries}) == len({q.zh for q in queries}) == 60
    domains = [q.domain for q in queries]
    assert {d: domains.count(d) for d in set(domains)} == {
        "": 30, "politics": 8, "violence": 7, "terror": 7, "pornography": 8
    }  # fmt: skip


def test_every_frame_holds_four_names_of_each_kind_and_answers_for_the_real_ones():
    names = stimuli.named()
    kinds = {(one.frame, one.kind) for one in names}
    assert len(kinds) == 30
    for frame, kind in kinds:
        there = [one for one in names if (one.frame, one.kind) == (frame, kind)]
        assert len(there) == 4
        assert all(bool(one.answer) == (kind != "invented") for one in there)
        assert all(one.prompt[one.start :].startswith(one.name) for one in there)
