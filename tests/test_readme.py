"""The Python in README.md and docs/, run as it stands there."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) == 3


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_runs_and_gives_what_its_comments_say(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_faster_rcnn.yaml").write_text("MODEL:\n  MASK_ON: True\n")
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    if "cfg" in names:
        assert names["cfg"].MODEL.MASK_ON
    elif "fast" in names:
        steps = names["steps_of"](names["faster"])
        assert [step.taken for step in steps if step.name == "bfloat16"] == [True]
        assert not names["steps_of"](names["model"])
    else:
        assert tuple(names["pyramid"]["p5"].shape) == (1, 256, 10, 15)
        last = [line for line in snippet.splitlines() if line.startswith(("assign", "pooler("))]
        levels, pooled = (eval(line.partition("  #")[0], names) for line in last)
        assert f"tensor({levels.tolist()})" in last[0]
        assert str(tuple(pooled.shape)) in last[1]


def test_the_snippets_of_the_drop_in_page_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "drop_in.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 9
    names: dict[str, object] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"drop_in.md[{number}]", "exec"), names)
    assert names["instances"].has("pred_boxes")
    assert tuple(names["regions"].shape) == (1, 16, 7, 7)
    heads = names["model"].roi_heads
    assert heads.box_pooler.canonical_level == 3
    assert heads.box_predictor.cls_score.out_features == 4
    assert heads.box_head.fc1.in_features == 128 * 49
    names["model"].eval()([{"image": torch.zeros(3, 64, 64)}])
    assert names["retinanet"].head.cls_score.out_channels == 9 * 3
    Path("own.yaml").write_text("MODEL:\n  FPN:\n    CANONICAL_LEVEL: 5\n")
    args = names["default_argument_parser"]().parse_args(
        ["--config-file", "own.yaml", "OUTPUT_DIR", str(tmp_path / "run")]
    )
    assert names["setup"](args).MODEL.FPN.CANONICAL_LEVEL == 5
