"""The pre-explanation metric, against values worked out by hand."""

import numpy as np
import pytest

from guard.lab.contrast import concept_contrasts, firing_difference
from guard.lab.labelled import Pair

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


def test_the_metric_over_all_pairs_and_by_sub_domain():
    whole, insult, weapons = concept_contrasts(PAIRS, FIRES_WITH, FIRES_WITHOUT, "model.layers.9")
    assert [(c.domain, c.subdomain, c.pairs) for c in (whole, insult, weapons)] == [
        ("*", "*", 4),
        ("violence", "insult", 2),
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
    assert weapons.l0_at == {"0.05": 1, "0.1": 1, "0.2": 1, "0.3": 1, "0.5": 0}
    assert (weapons.best_latents[0], weapons.best_p[0]) == (1, 0.5)
    assert {c.hook_point for c in (whole, insult, weapons)} == {"model.layers.9"}


def test_at_most_ten_latents_are_named():
    fires = np.ones((2, 30), dtype=bool)
    (whole, _) = concept_contrasts(PAIRS[:2], fires, ~fires, "h")
    assert len(whole.best_latents) == len(whole.best_p) == 10
    assert whole.i_cdf == 1.0
    assert whole.l0_at["0.5"] == 30
