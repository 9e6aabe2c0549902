"""A run stores its datasets, and the commands that read it need no --dataset."""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from fpn_plugin import UserError
from fpn_plugin.cli.detect import detect_main
from fpn_plugin.cli.dump_proposals import dump_proposals_main
from fpn_plugin.cli.evaluate import evaluate_main
from fpn_plugin.cli.report import report_main
from fpn_plugin.cli.train import train_main
from fpn_plugin.cli.visualize import visualize_main
from fpn_plugin.engine.run_datasets import (
    describe_datasets,
    register_with_runs,
    run_datasets,
    run_folders,
    save_run_datasets,
)
from tests.helpers.datasets import forgotten, write_dataset

CLASSES = ["cell", "bubble"]
COLORS = ["#0072B2", "#D55E00"]  # the first of the palette
TINY = [
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "MODEL.FPN.OUT_CHANNELS", "16",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0",
    "SOLVER.MAX_ITER", "2", "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
]  # fmt: skip
LAZY = "lazy/mini/faster_rcnn_R_18_FPN.py"


def content(images: int, order: list[str]) -> dict:
    """COCO data whose annotations have no area, so that a repaired copy is read."""
    ids = {name: number for number, name in enumerate(order, start=3)}
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 80, "height": 64} for i in range(images)
        ],
        "categories": [{"id": ids[name], "name": name} for name in order],
        "annotations": [
            {"id": 2 * i + place + 1, "image_id": i, "category_id": ids[name],
             "bbox": [30 * place, 10, 25, 30 + i], "iscrowd": 0}
            for i in range(images) for place, name in enumerate(CLASSES)
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder with two datasets, and --dataset for each; the second has another class order."""
    folder = tmp_path_factory.mktemp("data")
    train = write_dataset(folder, "own_train", content(4, CLASSES))
    val = write_dataset(folder, "own_val", content(3, CLASSES[::-1]))
    return folder, ["--dataset", train, "--dataset", val]


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    with forgotten():
        yield


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """The folder of a training of two iterations."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    opts = ["DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_val',)"]
    opts += ["MODEL.ROI_HEADS.NUM_CLASSES", "2", "OUTPUT_DIR", str(folder), *TINY]
    with forgotten():
        train_main(["--config-file", "mini/faster_rcnn_R_18_FPN.yaml", *data[1], *opts])
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the training's folder."""
    return shutil.copytree(trained, tmp_path / "run")


def of_run(run: Path) -> list[str]:
    return ["--config-file", str(run / "config.yaml")]


def weights_of(run: Path) -> list[str]:
    return ["MODEL.WEIGHTS", str(run / "model_final.pth")]


def stored(data: Path) -> dict:
    return {
        name: {
            "json": str(data / f"{name}.json"),
            "images": str(data / "images"),
            "classes": CLASSES,
            "colors": COLORS,
        }
        for name in ("own_train", "own_val")
    }


def moved(run: Path, name: str, **paths: Path) -> None:
    """Writes other paths of a dataset to a run's datasets.json."""
    datasets = run_datasets(run)
    datasets[name].update({key: str(path) for key, path in paths.items()})
    save_run_datasets(str(run), datasets)


def results_in(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_training_stores_names_files_classes_and_colours(trained, data):
    assert json.loads((trained / "datasets.json").read_text()) == stored(data[0])
    assert run_datasets(trained) == stored(data[0])
    assert run_datasets(data[0]) == {}


# By the folder of the config, of the weights, and of the checkpoint to take up.
@pytest.mark.parametrize("by", ["config", "weights", "resume"])
def test_a_run_is_evaluated_without_dataset(by, run, trained, tmp_path):
    config, output = of_run(run), ["OUTPUT_DIR", str(tmp_path / "out")]
    if by != "config":
        config[1] = str(shutil.copy(run / "config.yaml", tmp_path / "other.yaml"))
    if by == "resume":
        evaluate_main([*config, "--resume", "OUTPUT_DIR", str(run)])
        output[1] = str(run)
    else:
        evaluate_main([*config, *weights_of(run), *output])
    assert results_in(Path(output[1])) == results_in(trained)
    assert run_datasets(output[1]) == run_datasets(trained)


def test_a_config_of_another_name_is_of_no_run(run, tmp_path):
    assert run_folders(str(run / "config.yaml"), "a/b.pth") == [run, Path("a")]
    assert run_folders(str(run / "my.yaml"), "") == []
    other = shutil.copy(run / "config.yaml", run / "other.yaml")
    shutil.copy(run / "model_final.pth", tmp_path / "weights.pth")
    args = ["--config-file", str(other), "MODEL.WEIGHTS", str(tmp_path / "weights.pth")]
    with pytest.raises(UserError, match=r"not registered\. .* --dataset own_val=JSON:IMAGES"):
        evaluate_main(args)


def test_a_lazy_run_stores_and_reads_its_data(data, tmp_path):
    folder, output = tmp_path / "lazy", tmp_path / "out"
    args = ["--config-file", LAZY]
    opts = ["dataloader.train.dataset.names=own_train", "dataloader.test.dataset.names=own_val"]
    opts += ["model.roi_heads.num_classes=2", "train.device=cpu", "train.max_iter=1"]
    opts += ["dataloader.train.num_workers=0", "dataloader.train.total_batch_size=1"]
    with forgotten():
        train_main([*args, *data[1], *opts, f"train.output_dir={folder}"])
    assert run_datasets(folder) == stored(data[0])
    weights = f"train.init_checkpoint={folder / 'model_final.pth'}"
    evaluate_main([*args, *opts, f"train.output_dir={output}", weights])
    assert results_in(output) == results_in(folder)


def test_the_other_commands_need_no_dataset(run, data, tmp_path):
    truth = ["--ground-truth", "own_val", "--output", str(tmp_path / "drawn")]
    with forgotten():
        detect_main([*of_run(run), *truth, *weights_of(run)])
    records = json.loads((tmp_path / "drawn" / "detections.json").read_text())
    assert [r["file"] for r in records] == [str(data[0] / "images" / f"{i}.png") for i in range(3)]
    assert {d["category"] for r in records for d in r["detections"]} <= set(CLASSES)
    with forgotten():
        report_main([str(run)])
    assert "On own_val: " in (run / "report.html").read_text()
    assert " of 6 objects missed" in (run / "report.html").read_text()
    with forgotten():
        visualize_main(["--run", str(run), *truth, "--max-images", "1"])
    assert (tmp_path / "drawn" / "contributions.json").is_file()
    rpn = [*weights_of(run), "MODEL.META_ARCHITECTURE", "ProposalNetwork"]
    dump_proposals_main([*of_run(run), "--splits", "own_val", "--output", str(tmp_path), *rpn])
    assert pickle.loads((tmp_path / "own_val.pkl").read_bytes())["ids"] == [0, 1, 2]


@pytest.mark.parametrize("what", ["json", "images"])
@pytest.mark.parametrize("command", ["evaluate", "detect", "report"])
def test_data_that_has_moved_is_reported(command, what, run, tmp_path):
    gone = tmp_path / "gone"
    moved(run, "own_val", **{what: gone})
    message = f"'own_val' of the run, but {gone} is not there.*--dataset own_val=JSON:IMAGES"
    with pytest.raises(UserError, match=message):
        if command == "report":
            report_main([str(run)])
        elif command == "detect":
            detect_main([*of_run(run), "--ground-truth", "own_val", *weights_of(run)])
        else:
            evaluate_main([*of_run(run), *weights_of(run)])


def test_data_that_is_not_needed_may_have_moved(run, data, trained, tmp_path):
    """Weights without class names are named by the run, and evaluated without the training set."""
    moved(run, "own_train", json=tmp_path / "gone.json")
    weights = tmp_path / "weights.pth"
    torch.save({"model": torch.load(run / "model_final.pth")["model"]}, weights)
    output = ["OUTPUT_DIR", str(tmp_path / "out")]
    with forgotten():
        evaluate_main([*of_run(run), "MODEL.WEIGHTS", str(weights), *output])
    assert results_in(tmp_path / "out") == results_in(trained)
    moved(run, "own_val", json=tmp_path / "gone.json")
    images = ["--input", str(data[0] / "images"), "--output", str(tmp_path / "drawn")]
    detect_main([*of_run(run), *images, "MODEL.WEIGHTS", str(weights)])
    records = json.loads((tmp_path / "drawn" / "detections.json").read_text())
    found = [detection for record in records for detection in record["detections"]]
    assert found
    assert all(d["category"] == CLASSES[d["class"]] for d in found)


def test_dataset_wins_over_the_runs(run, data, tmp_path):
    """The given JSON is evaluated, and the run's folder has it from then on."""
    folder = tmp_path / "new place"
    folder.mkdir()
    spec = write_dataset(folder, "own_val", content(1, CLASSES))
    moved(run, "own_val", json=tmp_path / "gone.json")
    evaluate_main([*of_run(run), "--dataset", spec, *weights_of(run), "OUTPUT_DIR", str(run)])
    found = json.loads((run / "inference" / "coco_instances_results.json").read_text())
    assert {detection["image_id"] for detection in found} == {0}
    expected = stored(data[0])
    expected["own_val"].update(json=str(folder / "own_val.json"), images=str(folder / "images"))
    assert run_datasets(run) == expected


def test_the_last_run_and_the_users_own_registration_win(run, data, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    spec = write_dataset(tmp_path, "own_val", content(2, CLASSES))
    moved(other, "own_val", json=tmp_path / "own_val.json", images=tmp_path / "images")

    def images() -> int:
        return len(DatasetCatalog.get("own_val"))

    names = ("own_train", "own_val")
    of_first = [f"{name}={data[0] / name}.json:{data[0] / 'images'}" for name in names]
    assert sorted(register_with_runs([], run, other)) == of_first
    assert MetadataCatalog.get("own_val").thing_colors == [(0, 114, 178), (213, 94, 0)]
    assert MetadataCatalog.get("own_val").json_file == str(data[0] / "own_val.json")
    register_with_runs([], other)
    assert MetadataCatalog.get("own_val").json_file == str(tmp_path / "own_val.json")
    register_with_runs([], run)
    assert register_with_runs([spec], run)[0] == spec
    assert images() == 2
    register_with_runs([], other)  # the same files
    assert images() == 2
    DatasetCatalog.remove("own_val")
    MetadataCatalog.remove("own_val")
    register_coco_instances("own_val", {}, str(tmp_path / "own_val.json"), str(tmp_path / "images"))
    names = [spec.partition("=")[0] for spec in register_with_runs([], run)]
    assert names == ["own_train"]
    assert images() == 2


def test_colours_of_the_metadata_are_stored_and_others_are_not_json(data, tmp_path):
    register_with_runs(data[1][1::2])
    MetadataCatalog.get("own_val").thing_colors = [(255, 0, 10), (0, 128, 0)]
    DatasetCatalog.register("read_by_a_function", list)
    described = describe_datasets(["own_val", "read_by_a_function", "unknown"])
    assert list(described) == ["own_val"]
    assert described["own_val"]["colors"] == ["#FF000A", "#008000"]


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", '{"a": 1}', '{"a": {"json": "x"}}',
        '{"a": {"json": "x", "images": "y", "classes": ["z"], "colors": []}}',
        '{"a": {"json": "x", "images": 3, "classes": ["z"], "colors": ["#FFFFFF"]}}',
        '{"a": {"json": "x", "images": "y", "classes": ["z"], "colors": ["#GG0000"]}}',
    ],
)  # fmt: skip
def test_another_file_of_that_name_is_reported(text, tmp_path):
    (tmp_path / "datasets.json").write_text(text)
    with pytest.raises(UserError, match=r"datasets\.json does not describe.*--dataset NAME=JSON"):
        register_with_runs([], tmp_path)
