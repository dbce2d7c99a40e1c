"""The pre-explanation metric, against values worked out by hand."""

import numpy as np
import pytest

from guard.lab.labelled import Pair, pairs
from guard.lab.search.contrast import concept_contrasts, concepts, firing_difference, partners

# Four pairs, three latents.  pair:      0          1          2          3
FIRES_WITH = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=bool)
FIRES_WITHOUT = np.array([[0, 1, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]], dtype=bool)


def pair(number, domain, subdomain):
    return Pair(
        id=f"{domain}/{subdomain}/en-{number}", domain=domain, subdomain=subdomain, lang="en", with_="a", without="b"
    )


PAIRS = [pair(0, "violence", "insult"), pair(1, "violence", "insult"), pair(2, "terror", "weapons"), pair(3, "terror", "weapons")]  # fmt: skip


def test_p_is_the_share_of_pairs_that_fire_with_the_concept_and_not_without():
    forward, backward = firing_difference(FIRES_WITH, FIRES_WITHOUT)
    # Latent 0: pairs 0 and 1 of 4 (in pair 2 it fires on both). Latent 1: pair 2 alone. Latent 2: never forward.
    assert forward.tolist() == [0.5, 0.25, 0.0]
    assert backward.tolist() == [0.0, 0.0, 0.5]


def test_the_metric_over_all_pairs_by_domain_and_by_sub_domain():
    found = concept_contrasts(PAIRS, FIRES_WITH, FIRES_WITHOUT, "model.layers.9", "an.sae")
    whole, violence, insult, terror, weapons = found
    assert [(c.domain, c.subdomain, c.pairs) for c in found] == [
        ("*", "*", 4),
        ("violence", "*", 2),
        ("violence", "insult", 2),
        ("terror", "*", 2),
        ("terror", "weapons", 2),
    ]
    # p = [0.5, 0.25, 0]: their mean is 0.25; above 0.2 lie two, above 0.3 one, and 0.5 is not above 0.5.
    assert whole.i_cdf == pytest.approx(0.25)
    assert whole.l0_at == {"0.05": 2, "0.1": 2, "0.2": 2, "0.3": 1, "0.5": 0}
    assert (whole.best_latents[0], whole.best_p) == (0, [0.5, 0.25, 0.0])
    # Pairs 0 and 1: latent 0 in both, latent 1 in none (pair 0 fires on both texts).
    assert insult.i_cdf == pytest.approx(1 / 3)
    assert insult.l0_at == {"0.05": 1, "0.1": 1, "0.2": 1, "0.3": 1, "0.5": 1}
    assert (insult.best_latents[0], insult.best_p[0]) == (0, 1.0)
    # Pairs 2 and 3: latent 1 in one of two.
    assert weapons.i_cdf == pytest.approx(0.5 / 3)
    assert (weapons.best_latents[0], weapons.best_p[0]) == (1, 0.5)
    # A domain with one sub-domain is that sub-domain.
    assert violence.model_copy(update={"subdomain": "insult"}) == insult
    assert terror.i_cdf == weapons.i_cdf
    assert {(c.sae, c.hook_point) for c in found} == {("an.sae", "model.layers.9")}


def test_the_controls():
    whole, _, insult, _, weapons = concept_contrasts(PAIRS, FIRES_WITH, FIRES_WITHOUT, "h")
    # Exchanged: p = [0, 0, 0.5]. The excess cuts latent 2 at 0 and leaves [0.5, 0.25, 0].
    assert whole.i_cdf_reversed == pytest.approx(0.5 / 3)
    assert whole.l0_at_reversed == {"0.05": 1, "0.1": 1, "0.2": 1, "0.3": 1, "0.5": 0}
    assert whole.i_cdf_excess == pytest.approx(0.25)
    # With two pairs to a sub-domain each is held against the other's text without: pair 0 now parts latents 0 and 1,
    # pair 1 latent 0; pair 2 latents 0 and 1, pair 3 none.
    assert insult.i_cdf_shuffled == pytest.approx((1 + 0.5 + 0) / 3)
    assert weapons.i_cdf_shuffled == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert whole.l0_at_shuffled["0.5"] == 1  # latent 0: three pairs of four


def test_chance_firing_raises_i_cdf_but_not_its_excess_over_the_null():
    rng = np.random.default_rng(0)
    known = pairs()
    found = {}
    for rate in (0.02, 0.2):
        with_, without = (rng.random((len(known), 400)) < rate for _ in range(2))
        found[rate] = concept_contrasts(known, with_, without, "h")[0]
        assert found[rate].i_cdf == pytest.approx(rate * (1 - rate), rel=0.05)
        assert found[rate].i_cdf_excess == pytest.approx(found[rate].i_cdf_excess_null, rel=0.15)
    assert found[0.2].i_cdf > 7 * found[0.02].i_cdf
    with_[:, :40] |= rng.random((len(known), 40)) < 0.5
    real = concept_contrasts(known, with_, without, "h")[0]
    assert real.i_cdf_excess > 3 * real.i_cdf_excess_null


def test_partners_share_sub_domain_and_language_but_not_the_text():
    known = pairs()
    other = partners(known)
    assert sorted(other) == list(range(len(known)))
    for a, b in zip(known, (known[i] for i in other), strict=True):
        assert (a.domain, a.subdomain, a.lang) == (b.domain, b.subdomain, b.lang)
        assert a.id != b.id
    assert partners(PAIRS[:1]).tolist() == [0]  # alone of its kind


def test_the_project_s_concepts():
    found = concepts(pairs())
    assert len(found) == 1 + 4 + 17
    assert found["violence", "*"].sum() == sum(found[d, s].sum() for d, s in found if d == "violence" and s != "*")


def test_at_most_ten_latents_are_named():
    fires = np.ones((2, 30), dtype=bool)
    whole = concept_contrasts(PAIRS[:2], fires, ~fires, "h")[0]
    assert len(whole.best_latents) == len(whole.best_p) == 10
    assert whole.i_cdf == 1.0
    assert whole.l0_at["0.5"] == 30
