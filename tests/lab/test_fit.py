"""Which latents a head keeps, how two heads become one, and what the configuration may say."""

import numpy as np
import pytest

from guard.errors import InvalidInput
from guard.lab.heads.features import PooledTexts
from guard.lab.heads.fit import Choice, Design, FitConfig, Linear, calibrate, choose_latents, mix
from guard.lab.heads.passages import Passages
from guard.lab.labelled import Row
from tests.lab.given import design_of, labelled_row


def rows(count):
    return [
        Row(
            id=str(i),
            text=str(i),
            lang="en",
            source="left" if i % 4 < 2 else "right",
            label_domains=("terror",) if i % 2 else (),
            scope=("terror",),
            kind="harmful_text" if i % 2 else "benign",
        )
        for i in range(count)
    ]


def test_a_latent_that_says_nothing_alone_is_kept_for_what_it_adds_to_another():
    given = rows(800)
    rng = np.random.default_rng(0)
    noise = rng.uniform(0.1, 0.5, size=800)
    harmful = np.array([bool(row.label_domains) for row in given])
    strength = rng.uniform(0.1, 0.2, size=(800, 30)) + 0.05 * rng.random((800, 30)) * harmful[:, None]
    strength[:, 0] = noise + 0.15 * harmful  # says most, drowned in noise
    strength[:, 1] = noise  # the noise itself: as frequent in either class
    pooled = PooledTexts(
        np.ones(800, dtype=np.int64), np.zeros((800, 1), dtype=np.float32), strength.astype(np.float16)
    )

    def chosen(for_terror):
        config = FitConfig(
            latents_per_head=0, latents_by_weight=0, latents_by_contrast=0, per_domain=(f"terror={for_terror},1.0",)
        )
        design = Design(given, pooled, config)
        return choose_latents(design, np.ones(800, dtype=bool))["terror"].tolist()

    assert 1 not in chosen("5,0")
    assert {0, 1} <= set(chosen("0,5"))


def test_by_purity_those_are_chosen_that_fire_in_a_domains_texts_and_in_few_others():
    given = rows(800)
    rng = np.random.default_rng(0)
    harmful = np.array([bool(row.label_domains) for row in given])
    fires = np.zeros((800, 5), dtype=bool)
    fires[:, 0] = harmful & (rng.random(800) < 0.2)  # seldom, and nowhere else
    fires[:, 1] = rng.random(800) < np.where(harmful, 0.9, 0.3)  # parts the texts best
    fires[:, 2] = rng.random(800) < 0.5
    fires[np.flatnonzero(harmful)[:5], 3] = True  # too seldom to tell
    fires[:, 4] = ~harmful
    design = design_of(given, fires, latents_per_head=0, latents_by_weight=0, latents_by_purity=1, per_domain=())
    assert choose_latents(design, np.ones(800, dtype=bool))["terror"].tolist() == [0]


def test_a_domain_may_choose_for_itself():
    config = FitConfig(per_domain=("terror=100,600,1e-3", "violence=9,0,0.5"))
    assert config.of_domain("terror") == Choice(100, 600, 1e-3)
    assert config.of_domain("violence") == Choice(9, 0, 0.5)
    assert config.of_domain("politics") == Choice(config.latents_per_head, config.latents_by_weight, config.latent_c)


@pytest.mark.parametrize("override", ["terror=700,1e-3", "terrorism=1,2,3", "terror"])
def test_an_override_that_is_none_is_refused(override):
    with pytest.raises(InvalidInput) as caught:
        FitConfig(per_domain=(override,)).of_domain("terror")
    assert str(caught.value) == (
        f"per_domain: found {override!r}, expected DOMAIN=PER_HEAD,BY_WEIGHT,C such as terror=300,400,1e-3"
    )


def test_a_mixed_heads_logits_are_the_mixture_of_its_parts_on_texts_and_passages():
    rng = np.random.default_rng(0)
    allowed = np.array([False, True, True, False, True])
    inside = rng.random((3, 3)).astype(np.float32)  # of the latents allowed
    passages = Passages(
        np.array([0, 0, 4]), np.array([4, 4, 4]), rng.normal(size=(3, 3)).astype(np.float32), inside.copy()
    )
    given = [labelled_row("left", i) for i in range(6)]
    design = design_of(given, rng.random((6, 5)), rng.normal(size=(6, 3)), allowed=allowed, passages=passages)
    latents = Linear(np.array([1, 4]), np.array([2.0, -1.0]), np.zeros(3), bias=0.5)
    probe = Linear(np.zeros(0, dtype=np.int64), np.zeros(0), np.array([1.0, -3.0, 0.2]), bias=-2.0)
    # Of four tokens, with exponent and power 1/2: the root of twice their mean strength.
    assert latents.passage_logits(design, np.array([4])) == pytest.approx(
        [np.nan, np.nan, 0.5 + 2 * (2 * inside[2, 0]) ** 0.5 - (2 * inside[2, 2]) ** 0.5], nan_ok=True
    )
    for logits in (Linear.logits, Linear.passage_logits):
        parts = [logits(head, design, np.array([0, 2, 4, 5])) for head in (latents, probe)]
        assert min(np.ptp(parts[0]), np.ptp(parts[1])) > 0.1
        mixed = logits(mix(latents, probe, 0.3), design, np.array([0, 2, 4, 5]))
        assert mixed == pytest.approx(0.7 * parts[0] + 0.3 * parts[1])


def test_calibration_finds_the_temperature_and_shift_that_the_truth_was_drawn_with():
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=4, size=40_000)
    y = (rng.random(len(logits)) < 1 / (1 + np.exp(-(logits - 1.5) / 2.5))).astype(np.int8)
    assert calibrate(logits, y, np.ones(len(y))) == pytest.approx((2.5, -1.5), abs=0.1)
    # Half of the positives are missing, and the others count for two: nothing changes.
    kept = (y == 0) | (rng.random(len(y)) < 0.5)
    assert calibrate(logits[kept], y[kept], np.where(y[kept] == 1, 2.0, 1.0)) == pytest.approx((2.5, -1.5), abs=0.15)
    assert calibrate(logits[kept], y[kept], np.ones(kept.sum()))[1] < -2.5
