"""What stands in pictures: lines told apart, legends, rows and columns that are there."""

import json

import numpy as np
from matplotlib.colors import to_hex

from fpn_plugin.inspection.anatomy import Anatomy, Level, Part, SizeRange
from fpn_plugin.inspection.errors import FALSE_ALARM_KINDS, MISS_KINDS, Errors, Mistake
from fpn_plugin.visualization import plot_losses
from fpn_plugin.visualization.anatomy import draw_anatomy
from fpn_plugin.visualization.errors import draw_confusion, draw_mistakes, plot_errors
from fpn_plugin.visualization.palette import category_colors, text_color
from fpn_plugin.visualization.precision import plot_precision

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


def test_crops_of_mistakes_have_the_names_of_their_files(tmp_path, drawn):
    mistakes = [mistake("not seen")] * 2
    files = {1: "some/folder/$a$_$b$.png"}
    draw_mistakes(mistakes, lambda _: np.zeros((40, 40, 3), np.uint8), files, tmp_path / "a.png")
    files = {1: "a_name_that_is_too_long_for_a_crop_0001.jpg"}
    draw_mistakes(mistakes, lambda _: np.zeros((40, 40, 3), np.uint8), files, tmp_path / "a.png")
    short, long = drawn
    assert [axes.texts[0].get_text() for axes in short.axes[:2]] == ["$a$_$b$.png"] * 2
    assert long.axes[0].texts[0].get_text() == "a_name_that…rop_0001.jpg"


def test_a_confusion_matrix_has_the_counts_in_their_places(tmp_path, drawn):
    counts = np.array([[5, 1, 3], [0, 7, 2], [4, 6, 0]])
    draw_confusion(counts, ["cat", "dog"], tmp_path / "a.png")
    [axes] = drawn[0].axes
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    places = [(x, y) for y in range(3) for x in range(3)][:-1]  # x is the detected class
    assert [texts[place] for place in places] == ["5", "1", "3", "0", "7", "2", "4", "6"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "dog", "missed"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "no object"]
    shares = axes.images[0].get_array()
    assert np.allclose(shares, [[5 / 9, 1 / 9, 3 / 9], [0, 7 / 9, 2 / 9], [0.4, 0.6, 0]])


def test_precision_is_drawn_as_coco_has_it(tmp_path, drawn):
    falling = np.linspace(1, 0, 101)
    precision = np.zeros((10, 101, 3))
    precision[0, :, 0], precision[0, :, 1] = falling, 0.25
    precision[5, :, 0], precision[:, :, 2] = 0.5, -1  # the third class has no objects
    colors = ["#112233", "#445566", "#778899"]
    plot_precision(precision, ["much", "little", "none"], colors, tmp_path / "a.png")
    by_class, by_iou = drawn[0].axes
    lines = {line.get_color(): line for line in by_class.get_lines()}
    assert list(lines) == ["#445566", "#112233"]  # the lowest first
    assert np.array_equal(lines["#112233"].get_ydata(), falling)
    assert np.allclose(lines["#112233"].get_xdata(), np.arange(101) / 100)
    labels = [text.get_text() for text in by_class.get_legend().get_texts()]
    assert labels == ["little: 25.0", "much: 50.0"]
    half, three_quarters, high = by_iou.get_lines()
    assert np.allclose(half.get_ydata(), (falling + 0.25) / 2)
    assert np.allclose(three_quarters.get_ydata(), 0.25)
    assert not high.get_ydata().any()
    assert by_iou.get_legend().get_texts()[0].get_text() == "IoU 0.5: 37.5"

    many = [f"class {index}" for index in range(28)]
    precision = np.random.default_rng(0).random((10, 101, 28))
    plot_precision(precision, many, category_colors(many, {}), tmp_path / "b.png")
    by_class = drawn[1].axes[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in by_class.get_lines()}) == 28
    assert len(by_class.get_legend().get_texts()) == 20


def test_classes_have_their_own_colours_or_the_palettes():
    names = ["a", "b", "c"]
    assert category_colors(names, {"b": "#123456", "z": "#000000"}) == [
        "#0072B2", "#123456", "#009E73"
    ]  # fmt: skip
    assert len(category_colors(list("abcdefghij"), {})) == 10
    assert [text_color(ground) for ground in ("#0072B2", "#F0E442", "#000000", "#FFFFFF")] == [
        "white", "black", "white", "black"
    ]  # fmt: skip


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
