"""What a model is said to be made of, against figures worked out by hand."""

import math

import pytest
from detectron2.modeling import build_model
from PIL import Image

from fpn_plugin import UserError
from fpn_plugin.cli.inspect import inspect_main
from fpn_plugin.inspection.anatomy import anatomy
from fpn_plugin.inspection.anatomy_text import anatomy_text

FASTER = "mini/faster_rcnn_R_18_FPN.yaml"


def test_the_size_table_is_the_one_of_the_paper(make_model):
    model = make_model(FASTER, "MODEL.FPN.CANONICAL_BOX_SIZE", 224)
    table = anatomy(model, (256, 320))
    # Section 4.2: 224 px at P4; half of that, one level finer.
    assert [(s.level, s.stride, s.low, s.high) for s in table.sizes] == [
        ("p2", 4, 0, 112),
        ("p3", 8, 112, 224),
        ("p4", 16, 224, 448),
        ("p5", 32, 448, math.inf),
    ]
    moved = anatomy(make_model(FASTER, "MODEL.FPN.CANONICAL_LEVEL", 5), (256, 320))
    assert [s.low for s in moved.sizes] == [0, 28, 56, 112]
    assert moved.canonical == (5, 112)
    assert "| p3      | 8        | 28 to below 56  | 3.5, 7          |" in anatomy_text(moved)


def test_levels_and_anchors_of_an_input(make_model):
    levels = anatomy(make_model(FASTER), (250, 300)).levels
    # Padded to 256 x 320.
    assert [(v.name, v.stride, v.height, v.width) for v in levels] == [
        ("p2", 4, 64, 80),
        ("p3", 8, 32, 40),
        ("p4", 16, 16, 20),
        ("p5", 32, 8, 10),
        ("p6", 64, 4, 5),
    ]
    assert [v.anchors for v in levels] == [15360, 3840, 960, 240, 60]
    assert [v.anchor_sizes for v in levels] == [(16,), (32,), (64,), (128,), (256,)]
    assert all(v.anchor_ratios == (0.5, 1, 2) for v in levels)
    assert [v.pooled for v in levels] == [True] * 4 + [False]


def test_multiply_adds_and_parameters_by_hand(make_model):
    model = make_model(FASTER)  # 16 channels, 16 hidden units
    parts = {part.name: part for part in anatomy(model, (256, 320), rois=50).parts}
    cells = [64 * 80, 32 * 40, 16 * 20, 8 * 10]
    channels = [64, 128, 256, 512]
    laterals = sum(n * c * 16 for n, c in zip(cells, channels, strict=True))
    outputs = sum(n * 16 * 16 * 9 for n in cells[:3])  # P5 is the 1x1 itself
    assert parts["neck"].multiply_adds == laterals + outputs
    weights = sum(c * 16 + 16 for c in channels) + 3 * (16 * 16 * 9 + 16)
    assert parts["neck"].parameters == weights

    every = sum(cells) + 4 * 5
    assert parts["RPN"].multiply_adds == every * 16 * (16 * 9 + 3 + 12)
    assert parts["RPN"].parameters == 16 * 16 * 9 + 16 + 16 * 3 + 3 + 16 * 12 + 12

    box = 16 * 49 * 16 + 16 * 16 + 16 * 15 + 16 * 14 * 4
    assert parts["box head"].multiply_adds == 50 * box
    assert parts["box head"].parameters == box + 16 + 16 + 15 + 14 * 4


@pytest.mark.parametrize(
    "name",
    [
        "mini/table1_a_C4.yaml",
        "mini/table1_d_bottom_up_unshared.yaml",
        "mini/table2_c_FPN.yaml",
        "mini/table3_a_C4.yaml",
        "mini/table6_28x28.yaml",
        "mini/mask_rcnn_R_18_FPN.yaml",
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    ],
)
def test_parts_are_the_whole_model(name, make_config):
    model = build_model(make_config(name))
    parts = anatomy(model, (128, 160), rois=5, detections=3)
    assert sum(p.parameters for p in parts.parts) == sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(p.trained for p in parts.parts) == trained
    assert all(part.multiply_adds > 0 for part in parts.parts), parts.parts
    assert "rest" not in {part.name for part in parts.parts}
    assert anatomy_text(parts)


def test_an_image_pyramids_network_counts_once_for_each_scale(make_config):
    one, several = (
        anatomy(
            build_model(
                make_config(
                    FASTER, "MODEL.BACKBONE.NAME", "build_image_pyramid_backbone",
                    "MODEL.FPN.IN_FEATURES", ["res4"], "MODEL.FPN.IMAGE_SCALES", scales,
                    "MODEL.RPN.IN_FEATURES", ["p4", "p5"], "MODEL.ROI_HEADS.IN_FEATURES", ["p4"],
                    "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64]],
                )
            ),
            (64, 64),
        ).parts
        for scales in ([1.0], [2.0, 1.0, 0.5])
    )  # fmt: skip
    for before, after in zip(one[:2], several[:2], strict=True):  # the network, and its 1x1
        assert after.parameters == before.parameters > 0
        assert after.multiply_adds == (4 + 1 + 1 / 4) * before.multiply_adds


def test_the_tool_prints_and_draws(tmp_path, capsys):
    picture = tmp_path / "folder" / "model.png"
    size = ["--size", "256", "320", "--output", str(picture)]
    unbounded = ["INPUT.MAX_SIZE_TEST", "0", "MODEL.DEVICE", "cpu"]
    inspect_main(["--config-file", FASTER, *size, "MODEL.DEVICE", "cpu"])
    said = capsys.readouterr().out
    assert "| p4      | 16       | 112 to below 224 | 7, 14           |" in said
    assert "Input 320 x 256 px" in said
    with Image.open(picture) as image:
        assert image.width > 1000
    with pytest.raises(UserError, match="make 15000 x 20000 px; expected sides of 1 to"):
        inspect_main(["--config-file", FASTER, "INPUT.MIN_SIZE_TEST", "15000", *unbounded])
