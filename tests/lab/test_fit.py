"""Which latents a head keeps, and what its configuration may say."""

import numpy as np
import pytest

from guard.errors import InvalidInput
from guard.lab.heads.features import PooledTexts
from guard.lab.heads.fit import Choice, Design, FitConfig, choose_latents
from guard.lab.labelled import Row


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
