"""A pack's features are made once and found by their latent."""

import pytest

from guard.errors import NotFound
from guard.pack import catalogue
from guard.pack.loader import load_pack
from guard.records import LatentId


def test_features_stand_in_the_order_of_the_rows_and_are_made_once(folder):
    pack = load_pack(folder)
    found = catalogue.features(pack)
    assert [(f.latent.hook_point, f.latent.index) for f in found] == [(x.hook_point, x.latent) for x in pack.latents]
    assert all(again is feature for again, feature in zip(catalogue.features(pack), found, strict=True))
    assert all(catalogue.feature(pack, feature.latent) is feature for feature in found)


def test_filters_keep_what_they_name(folder):
    pack = load_pack(folder)
    assert {f.latent.hook_point for f in catalogue.features(pack, hook_point="model.layers.7")} == {"model.layers.7"}
    with pytest.raises(NotFound, match=r"^unknown hook point 'model\.layers\.1', expected one of: model\.layers\.3, "):
        catalogue.features(pack, hook_point="model.layers.1")


def test_each_pack_has_its_own_features(folder):
    first, second = load_pack(folder), load_pack(folder)
    latent = catalogue.features(first)[0].latent
    assert catalogue.feature(second, latent) is not catalogue.feature(first, latent)
    with pytest.raises(NotFound, match=r"^unknown latent model\.layers\.3/9999: pack .* holds no such row$"):
        catalogue.feature(first, LatentId("model.layers.3", 9999))
