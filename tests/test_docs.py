"""README.md and docs/: their Python runs as it stands there, page by page, their lines are short,
and the links of files next to docs/ lead somewhere. ``make docs`` checks the links within docs/.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpn_plugin import model_zoo
from fpn_plugin.engine import StrictCheckpointer
from tests.helpers.datasets import forgotten

ROOT = Path(__file__).parents[1]
BESIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*BESIDE, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/api").glob("*.md"))]
SNIPPET = re.compile(r"^```python[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SNIPPETS = {page.name: found for page in PAGES if (found := SNIPPET.findall(page.read_text()))}


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The names that a page's snippets leave, run one after the other in an empty folder."""
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    for number, snippet in enumerate(SNIPPETS[page]):
        exec(compile(snippet, f"{page}[{number}]", "exec"), names)
    return names


def test_the_readmes_five_lines_choose_the_plugin(tmp_path, monkeypatch):
    cfg = run("README.md", tmp_path, monkeypatch)["cfg"]
    numbered = re.findall(r"# ([1-5]): ", SNIPPETS["README.md"][0])
    assert numbered == list("12345")
    assert cfg.MODEL.BACKBONE.NAME == "build_fpn_backbone"
    assert cfg.MODEL.ROI_HEADS.NAME == "FPNROIHeads"
    assert cfg.MODEL.FPN.COARSEST_OUTPUT_CONV is True


def test_the_snippets_of_the_drop_in_page_give_what_they_say(tmp_path, monkeypatch):
    names = run("drop_in.md", tmp_path, monkeypatch)
    assert names["instances"].has("pred_boxes")
    assert tuple(names["pyramid"]["p5"].shape) == (1, 256, 10, 15)
    assert names["levels"].tolist() == [2, 4]
    assert tuple(names["regions"].shape) == (2, 256, 7, 7)
    [text] = [snippet for snippet in SNIPPETS["drop_in.md"] if "assign_levels(" in snippet]
    assert f"tensor({names['levels'].tolist()})" in text
    assert f"# {tuple(names['regions'].shape)}" in text
    names["model"].eval()([{"image": torch.zeros(3, 64, 64)}])
    Path("own.yaml").write_text("MODEL:\n  FPN:\n    CANONICAL_LEVEL: 5\n")
    args = names["default_argument_parser"]().parse_args(
        ["--config-file", "own.yaml", "OUTPUT_DIR", str(tmp_path / "run")]
    )
    assert names["setup"](args).MODEL.FPN.CANONICAL_LEVEL == 5


def test_the_snippets_of_the_lazy_page_change_the_model(tmp_path, monkeypatch):
    names = run("lazy.md", tmp_path, monkeypatch)
    assert names["retinanet"].head.cls_score.out_channels == 9 * 3
    heads = names["instantiate"](names["lazy"].model).roi_heads
    assert heads.box_pooler.canonical_level == 3
    assert heads.box_predictor.cls_score.out_features == 4
    assert heads.box_head.fc1.in_features == 128 * 49
    assert names["train"].max_iter == 720


def test_the_snippets_of_the_inference_page_detect_and_take_their_steps(tmp_path, monkeypatch):
    name = "mini/faster_rcnn_R_18_FPN.yaml"
    folder = tmp_path / "output" / "demo"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(model_zoo.get_config(name).dump())
    StrictCheckpointer(model_zoo.get(name, device="cpu"), str(folder)).save("model_final")
    Image.new("RGB", (90, 60)).save(tmp_path / "photo.jpg")
    names = run("inference.md", tmp_path, monkeypatch)
    assert names["found"].image.shape == (60, 90, 3)
    steps = names["steps_of"](names["faster"])
    assert [step.taken for step in steps if step.name == "bfloat16"] == [True]
    assert not names["steps_of"](names["model"])


def test_the_snippet_of_the_configs_page_finds_every_config(tmp_path, monkeypatch):
    names = run("configs.md", tmp_path, monkeypatch)
    assert names["cfg"].MODEL.FPN.COARSEST_OUTPUT_CONV is True
    ours = ("figure1/", "mini/", "own_data/", "paper/", "rows/")
    twins = [name for name in names["names"] if not name.startswith(ours)]
    assert f"{len(twins)} configs have the file names" in (ROOT / "docs/configs.md").read_text()


def test_every_page_with_python_has_a_test_here():
    tested = {"README.md", "drop_in.md", "lazy.md", "inference.md", "configs.md"}
    assert set(SNIPPETS) == tested


def test_the_notebook_goes_from_data_to_detections(tmp_path, monkeypatch):
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not [cell for cell in codes if cell["outputs"] or cell["execution_count"]]
    text = "\n".join("".join(cell["source"]) for cell in codes)
    assert text.count("images, epochs = 300, 12") == 1
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with forgotten():
        exec(text.replace("images, epochs = 300, 12", "images, epochs = 8, 1"), names)
    assert names["report"]["refused"] == 0
    assert names["run"] == Path("output/run")
    assert "AP50" in json.loads(Path("output/run/results.json").read_text())["bbox"]
    found = names["found"]
    pixels = np.asarray(Image.open(names["photo"]).convert("RGB"))
    assert np.array_equal(found.image, pixels)
    again = names["detect"](pixels[:, :, ::-1])
    assert len(found) == len(names["results"]) > 0
    assert np.array_equal(again.boxes, found.boxes)
    categories = json.loads(Path("data/val.json").read_text())["categories"]
    ids = {category["name"]: category["id"] for category in categories}
    assert [r["category_id"] for r in names["results"]] == [ids[n] for n in found.class_names]
    assert Image.open("output/photo.png").format == "PNG"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_have_at_most_100_columns(page):
    # Tables and images cannot be wrapped; those of the README are short all the same.
    whole = ("|", "![") if page.parent != ROOT else ()
    long = [line for line in page.read_text().splitlines() if len(line) > 100]
    assert not [line for line in long if not line.startswith(whole)]


@pytest.mark.parametrize("page", BESIDE, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        linked = ROOT / path if path else page
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles]
            assert heading in anchors, target


def test_the_files_that_contributing_names_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    names = set(re.findall(r"`([\w./]+\.(?:py|md|sh|toml))`", text)) - {"fpn_plugin/cli/NAME.py"}
    inits = [*ROOT.glob("fpn_plugin/**/__init__.py"), *ROOT.glob("evidence/**/__init__.py")]
    rooms = [ROOT, *(path.parent for path in inits)]
    assert len(names) > 60
    assert not [name for name in names if not any((room / name).is_file() for room in rooms)]
