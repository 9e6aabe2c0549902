"""What stands in pictures: lines told apart, legends, rows and columns that are there."""

import json

import numpy as np
from matplotlib.colors import to_hex

from fpn_plugin.inspection.anatomy import Anatomy, Level, Part, SizeRange
from fpn_plugin.inspection.errors import FALSE_ALARM_KINDS, MISS_KINDS, Errors, Mistake
from fpn_plugin.visualization import plot_losses
from fpn_plugin.visualization.anatomy import draw_anatomy
from fpn_plugin.visualization.errors import plot_errors

LOSSES = ("loss_box_reg", "loss_cls", "loss_keypoint", "loss_mask", "loss_rpn_cls", "loss_rpn_loc",
          "loss_sem_seg")  # fmt: skip


def test_losses_are_told_apart_by_a_deuteranope(tmp_path, drawn, simulated):
    row = {"iteration": 19, "total_loss": 2.0, "lr": 0.01, **dict.fromkeys(LOSSES, 0.3)}
    (tmp_path / "metrics.json").write_text(json.dumps(row) + "\n")
    plot_losses(tmp_path / "metrics.json", tmp_path / "losses.png")
    [figure] = drawn
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == sorted((*LOSSES, "total_loss"))
    shades = [simulated(to_hex(line.get_color())) for line in lines]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(shades) for b in shades[:i]) > 0.15
    styles = {line.get_linestyle() for line in lines}
    assert len(styles) == 3  # for those who see no colour, and for more losses than colours
    [legend] = figure.legends
    assert min(text.get_fontsize() for text in legend.get_texts()) >= 11


def mistake(kind):
    return Mistake(1, (0, 0, 10, 10), "cat", "small", "", kind)


def test_errors_of_a_model_without_levels_are_drawn_by_size_alone(tmp_path, drawn):
    missed = (mistake(MISS_KINDS[0]),)
    errors = Errors(missed, (), {("small", ""): 2}, {("small", ""): 1}, 0.5)
    plot_errors(errors, [], tmp_path / "errors.png")
    plot_errors(errors, ["p2", "p3"], tmp_path / "errors.png")
    without, with_levels = drawn
    assert [axes.get_title() for axes in without.axes] == [
        "objects missed, by size",
        "detections that are false, by size",
    ]
    assert len(with_levels.axes) == 4
    for figure in drawn:
        legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
        told = [[text.get_text() for text in legend.get_texts()] for legend in legends]
        assert told == [list(MISS_KINDS), list(FALSE_ALARM_KINDS)]


def drawn_anatomy(numbers, sizes, canonical, path):
    """Draws levels without anchors."""
    levels = tuple(
        Level(f"p{k}", 2**k, 16, 256 >> k, 256 >> k, 0, (), (), bool(sizes)) for k in numbers
    )
    side, parts = (256, 256), (Part("bottom-up", 10, 10, 20),)
    draw_anatomy(Anatomy(side, side, 0, 0, levels, parts, sizes, canonical), path)


def test_every_level_has_its_row_where_no_box_is_pooled(tmp_path, drawn):
    drawn_anatomy((3, 4, 5), (), None, tmp_path / "a.png")
    axes = drawn[0].axes[0]
    assert axes.get_ylim() == (2.5, -0.5)


def test_a_bar_of_an_octave_has_its_label_before_it(tmp_path, drawn):
    """At half size the label would reach beyond the bar; the open-ended ones are wide enough."""
    sizes = (SizeRange("p2", 4, 0, 112), SizeRange("p3", 8, 112, 224),
             SizeRange("p4", 16, 224, np.inf))  # fmt: skip
    drawn_anatomy((2, 3, 4), sizes, (4, 224.0), tmp_path / "a.png")
    texts = {text.get_text(): text for text in drawn[0].axes[0].texts}
    assert texts["112 to 224"].get_ha() == "right"
    assert texts["112 to 224"].get_position()[0] < 112
    assert [texts[name].get_ha() for name in ("below 112", "224 and up")] == ["center"] * 2
