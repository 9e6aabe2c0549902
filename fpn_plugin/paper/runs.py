"""The folder of one run: what made it, how far it is, and its results."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import statistics
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation.coco_evaluation import _evaluate_box_proposals
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO

import fpn_plugin
from fpn_plugin.config import flat_keys, value_at
from fpn_plugin.engine import load_config
from fpn_plugin.errors import UserError
from fpn_plugin.utils.atomic import written_whole
from fpn_plugin.utils.metrics import loss_rows
from fpn_plugin.utils.pickles import load_arrays

from .costs import costs
from .tables import Run

__all__ = ["PARTS", "Outcome", "RunFolder", "code_files", "code_version", "losses_by_part"]

_MADE_BY = "made_by.json"
PARTS = 8  # of a training; their mean losses show whether it had converged
# The processes that make a run.
_PROGRAMS = ("fpn_plugin.cli.train", "fpn_plugin.cli.dump_proposals")


class _OwnModules(ModuleFinder):
    """Follows imports of this package and skips those of other packages."""

    def find_module(self, name: str, path: Any, parent: Any = None) -> Any:
        if path is None and name != "fpn_plugin":
            raise ImportError(name)
        return super().find_module(name, path, parent)


def code_files() -> list[Path]:
    """The package's source files that a training or a dump of proposals imports, sorted.

    Imports inside functions count too. Pictures are left out: they change no result.
    """
    package = Path(fpn_plugin.__file__).parent
    finder = _OwnModules([str(package.parent)])
    for program in _PROGRAMS:
        finder.import_hook(program)
    found = {Path(module.__file__) for module in finder.modules.values()}
    return sorted(path for path in found if package / "visualization" not in path.parents)


@functools.cache
def code_version() -> str:
    """Twelve hex digits that change when the code that trains and evaluates does."""
    package = Path(fpn_plugin.__file__).parent
    digest = hashlib.sha256()
    for path in code_files():
        digest.update(path.relative_to(package).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Outcome:
    """The results of a finished run.

    Attributes:
        metrics: Detectron2's results of the task, by their keys there.
        groups: AR@1000 or AP of each group of categories, if the dataset has groups.
        seconds_per_iteration: median over the training.
        seconds_per_image: median over the evaluation, one image per call.
        made_by: config, code and versions that made it.
        losses: mean total loss over each eighth of the training; empty if an eighth logged no loss.
        costs: what the model costs, see :func:`fpn_plugin.paper.costs.costs`; may be empty.
    """

    metrics: dict[str, float]
    groups: dict[str, float]
    seconds_per_iteration: float
    seconds_per_image: float
    made_by: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    costs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """A run at a scale with a seed, in ``<output>/<scale>/<run>/seed<seed>``.

    Attributes:
        run: what is trained.
        scale: "mini" or "paper".
        seed: of the run.
        output: folder of all scales and runs.
        opts: config options for every run, ``("KEY", "value", ...)``.
    """

    run: Run
    scale: str
    seed: int
    output: Path
    opts: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.output / self.scale / self.run.name / f"seed{self.seed}"

    @property
    def config_name(self) -> str:
        """Name of its config in the package."""
        return self.run.config_name(self.scale)

    def _other(self, name: str) -> RunFolder:
        return RunFolder(Run(name), self.scale, self.seed, self.output, self.opts)

    def config(self) -> CfgNode:
        """Its config, frozen, before paths are set.

        Raises:
            UserError: an option that does not fit.
        """
        return _config(self.config_name, self.opts, self.seed)

    def all_opts(self) -> list[str]:
        """Options of its training: the user's, the seed, and the paths."""
        opts = [*self.opts, "SEED", str(self.seed), "OUTPUT_DIR", str(self.path)]
        if self.run.weights_from:
            start = self._other(self.run.weights_from).path / "model_final.pth"
            opts += ["MODEL.WEIGHTS", str(start)]
        if self.run.proposals_from:
            cfg, source = self.config(), self._other(self.run.proposals_from)
            for split in ("TRAIN", "TEST"):
                files = tuple(str(source.proposals(name)) for name in cfg.DATASETS[split])
                opts += [f"DATASETS.PROPOSAL_FILES_{split}", str(files)]
        return opts

    def proposals(self, dataset: str) -> Path:
        """The file of its proposals for a dataset."""
        return self.path / "proposals" / f"{dataset}.pkl"

    def identity(self) -> dict[str, Any]:
        """What a run is made by: all keys of its config except OUTPUT_DIR, code and versions."""
        cfg = self.config()
        values = {key: value_at(cfg, key) for key in flat_keys(cfg) if key != "OUTPUT_DIR"}
        values = {key: v for key, v in values.items() if not isinstance(v, CfgNode)}
        return {
            "config": json.loads(json.dumps(values, default=str)),
            "code": code_version(),
            "plugin": fpn_plugin.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        }

    def check(self) -> None:
        """Refuses a folder that another config or other code made.

        Raises:
            UserError: names the folder and what differs.
        """
        note = self.path / _MADE_BY
        if note.is_file():
            if differs := self.differs(json.loads(note.read_text())):
                raise UserError(
                    f"{self.path} was made by {differs}: remove it, or give another --output; runs "
                    "are never mixed"
                )
        elif any(self.path.glob("*")):
            raise UserError(
                f"{self.path} holds files but no {_MADE_BY}: it is not a run of this command; "
                "remove it, or give another --output"
            )

    def differs(self, had: dict[str, Any]) -> str:
        """How another identity differs from this one in config and code; "" if it does not."""
        there, now = had["config"], self.identity()["config"]
        keys = [key for key in sorted({*there, *now}) if there.get(key) != now.get(key)]
        differences = []
        if keys:
            shown = (f"{key} {there.get(key)!r} there, {now.get(key)!r} now" for key in keys[:3])
            differences.append(f"another config ({len(keys)} keys: {', '.join(shown)})")
        if had["code"] != code_version():
            differences.append(f"other code ({had['code']} there, {code_version()} now)")
        return " and ".join(differences)

    def claim(self) -> None:
        """Makes the folder, and writes down the config, code and versions of its run."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / _MADE_BY).is_file():
            (self.path / _MADE_BY).write_text(json.dumps(self.identity(), indent=1))

    @property
    def finished(self) -> bool:
        """Whether the training and its evaluation are done."""
        return (self.path / "results.json").is_file()

    def tidy(self) -> None:
        """Removes the checkpoints for resuming, which a finished run does not need."""
        for checkpoint in self.path.glob("model_[0-9]*.pth"):
            checkpoint.unlink()

    def iteration(self) -> int:
        """How many iterations of its training are done, as its metrics file says."""
        rows = loss_rows(self.path / "metrics.json")
        return int(rows[-1]["iteration"]) + 1 if rows else 0

    def outcome(self, task: str, with_costs: bool = False) -> Outcome:
        """The results of a finished run.

        Args:
            task: "box_proposals", "bbox" or "segment_proposals".
            with_costs: whether to measure what its model costs, once.
        """
        results = json.loads((self.path / "results.json").read_text())
        speed = json.loads((self.path / "inference" / "speed.json").read_text())
        rows = loss_rows(self.path / "metrics.json")
        times = [row["time"] for row in rows if "time" in row]
        groups = self.kept("groups.json", lambda: _by_group(self, results, task))
        return Outcome(
            metrics=results[task],
            groups=groups,
            seconds_per_iteration=statistics.median(times) if times else float("nan"),
            seconds_per_image=speed["median_seconds_per_call"],
            made_by=json.loads((self.path / _MADE_BY).read_text()),
            losses=losses_by_part(rows, self.config().SOLVER.MAX_ITER),
            costs=self.kept("costs.json", lambda: costs(self.path)) if with_costs else {},
        )

    def kept(self, name: str, figures: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Figures that are computed once, and then read from a file of the folder.

        Args:
            name: of the file.
            figures: computes them.
        """
        file = self.path / name
        if not file.is_file():
            with written_whole(str(file), "w") as written:
                json.dump(figures(), written)
        return json.loads(file.read_text())


@functools.cache
def _config(name: str, opts: tuple[str, ...], seed: int) -> CfgNode:
    cfg = load_config(name, [*opts, "SEED", str(seed)])
    cfg.freeze()
    return cfg


def losses_by_part(rows: list[dict[str, float]], iterations: int) -> list[float]:
    """Mean total loss over each eighth of a training; empty if an eighth has no row.

    Args:
        rows: of the training's metrics file, with ``iteration`` and ``total_loss``.
        iterations: of the whole training.
    """
    parts: list[list[float]] = [[] for _ in range(PARTS)]
    for row in rows:
        parts[int(row["iteration"]) * PARTS // iterations].append(row["total_loss"])
    return [statistics.mean(part) for part in parts] if all(parts) else []


def _by_group(folder: RunFolder, results: dict[str, Any], task: str) -> dict[str, float]:
    """AP or AR@1000 of each supercategory of the mini dataset; empty for other data and segments.

    AP of a group is the mean of its categories' AP, as COCO's AP is the mean of all categories.
    Proposals have no categories: the recall of a group is Detectron2's on the group's labels only.
    """
    if folder.scale != "mini" or task == "segment_proposals":
        return {}
    [name] = folder.config().DATASETS.TEST
    with redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = COCO(MetadataCatalog.get(name).json_file)
    groups: dict[str, dict[int, str]] = {}  # names of categories by their ids
    for category in coco.dataset["categories"]:
        groups.setdefault(category["supercategory"], {})[category["id"]] = category["name"]
    if task == "bbox":
        ap = results[task]  # a category without detections has none
        return {
            group: statistics.mean(ap.get(f"AP-{name}", float("nan")) for name in names.values())
            for group, names in groups.items()
        }
    with (folder.path / "inference" / "box_proposals.pkl").open("rb") as file:
        saved = load_arrays(file)
    predictions = []
    columns = (saved[key] for key in ("ids", "boxes", "objectness_logits"))
    for image_id, boxes, logits in zip(*columns, strict=True):
        proposals = Instances((0, 0), proposal_boxes=Boxes(torch.as_tensor(boxes)))
        proposals.objectness_logits = torch.as_tensor(logits)
        predictions.append({"image_id": image_id, "proposals": proposals})
    recalls = {}
    for group, names in groups.items():
        labels = [a for a in coco.dataset["annotations"] if a["category_id"] in names]
        only = COCO()
        only.dataset = {**coco.dataset, "annotations": labels}
        with redirect_stdout(io.StringIO()):
            only.createIndex()
        recalls[group] = 100 * float(_evaluate_box_proposals(predictions, only, limit=1000)["ar"])
    return recalls
