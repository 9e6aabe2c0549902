"""Colours and norms of features, against features made to have known ones."""

import numpy as np
import pytest

from fpn_plugin.visualization import level_color, level_title
from fpn_plugin.visualization.features import feature_colors, feature_norms


def luminance(image):
    return image.astype(float) @ [0.2126, 0.7152, 0.0722]


def test_norms_are_those_of_each_cell():
    values = np.zeros((2, 1, 3))
    values[:, 0, 0], values[:, 0, 1] = (3, 4), (-5, 12)
    assert feature_norms({"p2": values})["p2"].tolist() == [[5, 13, 0]]


def test_directions_are_the_same_for_all_levels_and_lightness_follows_the_norm():
    rng = np.random.default_rng(1)
    first, second, _ = np.linalg.qr(rng.normal(size=(8, 3)))[0].T
    features, places = {}, {}
    for name, side, gain in (("p2", 32, 1.0), ("p3", 16, 40.0)):
        along, across = rng.uniform(0, 1, (2, side, side))
        places[name] = along, across
        strong = 10 + 3 * along  # the norm grows along the first direction
        values = strong[..., None] * first + across[..., None] * second
        features[name] = gain * values.transpose(2, 0, 1)
    colors = feature_colors(features)
    assert colors.variance == pytest.approx(1, abs=1e-9)
    for name, image in colors.images.items():
        along, across = places[name]
        assert image.shape == (*along.shape, 3)
        assert np.corrcoef(luminance(image).ravel(), along.ravel())[0, 1] > 0.9
        blue = image[..., 2].astype(float) - image[..., 0]
        assert abs(np.corrcoef(blue.ravel(), across.ravel())[0, 1]) > 0.9
    signs = {
        name: np.corrcoef(
            (image[..., 2].astype(float) - image[..., 0]).ravel(), places[name][1].ravel()
        )[0, 1] > 0
        for name, image in colors.images.items()
    }  # fmt: skip
    assert signs["p2"] == signs["p3"]  # one direction, one colour


def test_features_without_any_variance_have_a_colour():
    colors = feature_colors({"p2": np.ones((4, 2, 2)), "p3": np.zeros((4, 1, 1))})
    assert colors.variance == 0
    assert len(np.unique(colors.images["p2"].reshape(-1, 3), axis=0)) == 1


def test_a_single_channel_is_drawn():
    colors = feature_colors({"p2": np.arange(4.0).reshape(1, 2, 2)})
    shades = luminance(colors.images["p2"]).ravel()
    assert (np.diff(shades) > 0).all()
    assert colors.variance == pytest.approx(1)


def test_levels_have_colours_that_a_deuteranope_tells_apart(simulated):
    shades = [simulated(level_color(f"p{k}")) for k in range(2, 8)]
    apart = [np.linalg.norm(a - b) for i, a in enumerate(shades) for b in shades[i + 1 :]]
    assert min(apart) > 0.15
    assert level_color("res4") == level_color("p4") == level_color(4)
    assert (level_title("p4"), level_title("res4"), level_title("map")) == ("P4", "C4", "map")
