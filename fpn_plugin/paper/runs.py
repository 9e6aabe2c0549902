"""The folder of one run: what made it, how far it is, and its results."""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import json
import statistics
from contextlib import redirect_stdout
from dataclasses import dataclass, field
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
from fpn_plugin.utils.metrics import loss_rows
from fpn_plugin.utils.pickles import load_arrays

from .tables import Run

__all__ = ["PARTS", "Outcome", "RunFolder", "code_files", "code_version", "losses_by_part"]

_MADE_BY = "made_by.json"
_GROUPS = "groups.json"
PARTS = 8  # of a training; their mean losses show whether it had converged
_PROGRAMS = ("cli/train.py", "cli/dump_proposals.py")  # the processes that make a run


def code_files() -> list[Path]:
    """The package's source files that a training or a dump of proposals imports, sorted.

    Imports are followed from file to file, also those inside functions. Pictures are left out:
    they change no result.
    """
    package = Path(fpn_plugin.__file__).parent
    found: set[Path] = set()
    waiting = [package / name for name in _PROGRAMS]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            base, names = package.parent, []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = path.parents[node.level - 1] if node.level else base
                names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
            for name in names:  # each part may be a module, a package or a name inside one
                target = base.joinpath(*filter(None, name.split(".")))
                for each in (target, *target.parents):
                    if each == package or package in each.parents:
                        waiting += [each.with_suffix(".py"), each / "__init__.py"]
    pictures = package / "visualization"
    return sorted(path for path in found if pictures not in path.parents)


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
    """

    metrics: dict[str, float]
    groups: dict[str, float]
    seconds_per_iteration: float
    seconds_per_image: float
    made_by: dict[str, Any]
    losses: list[float] = field(default_factory=list)


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
        return f"{self.scale}/{self.run.name}.yaml"

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
        """What makes a run: every key of its config except the folder, the code, the versions."""
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
        if not note.is_file():
            if any(self.path.glob("*")):
                raise UserError(
                    f"{self.path} holds files but no {_MADE_BY}: it is not a run of this command; "
                    "remove it, or give another --output"
                )
            return
        differs = self.differs(json.loads(note.read_text()))
        if differs:
            raise UserError(
                f"{self.path} was made by {differs}: remove it, or give another --output; runs are "
                "never mixed"
            )

    def differs(self, had: dict[str, Any]) -> str:
        """How another identity differs from this one in config and code; "" if it does not."""
        wanted = self.identity()
        differences = []
        if had["config"] != wanted["config"]:
            keys = sorted(set(had["config"]) | set(wanted["config"]))
            differing = [k for k in keys if had["config"].get(k) != wanted["config"].get(k)]
            shown = ", ".join(
                f"{key} {had['config'].get(key)!r} there, {wanted['config'].get(key)!r} now"
                for key in differing[:3]
            )
            differences.append(f"another config ({len(differing)} keys: {shown})")
        if had["code"] != wanted["code"]:
            differences.append(f"other code ({had['code']} there, {wanted['code']} now)")
        return " and ".join(differences)

    def claim(self) -> None:
        """Makes the folder and notes what makes it."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / _MADE_BY).is_file():
            (self.path / _MADE_BY).write_text(json.dumps(self.identity(), indent=1))

    @property
    def finished(self) -> bool:
        """Whether it was trained and evaluated to the end."""
        return (self.path / "results.json").is_file()

    def tidy(self) -> None:
        """Removes the checkpoints that a finished run would have been resumed from."""
        for checkpoint in self.path.glob("model_[0-9]*.pth"):
            checkpoint.unlink()

    def iteration(self) -> int:
        """How many iterations of its training are done, by its log."""
        rows = loss_rows(self.path / "metrics.json")
        return int(rows[-1]["iteration"]) + 1 if rows else 0

    def outcome(self, task: str) -> Outcome:
        """The results of a finished run.

        Args:
            task: "box_proposals" or "bbox".
        """
        results = json.loads((self.path / "results.json").read_text())
        speed = json.loads((self.path / "inference" / "speed.json").read_text())
        rows = loss_rows(self.path / "metrics.json")
        times = [row["time"] for row in rows if "time" in row]
        groups = self.path / _GROUPS
        if not groups.is_file():
            groups.write_text(json.dumps(_by_group(self, results, task)))
        return Outcome(
            metrics=results[task],
            groups=json.loads(groups.read_text()),
            seconds_per_iteration=statistics.median(times) if times else float("nan"),
            seconds_per_image=speed["median_seconds_per_call"],
            made_by=json.loads((self.path / _MADE_BY).read_text()),
            losses=losses_by_part(rows, self.config().SOLVER.MAX_ITER),
        )


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
        part = int(row["iteration"]) * PARTS // iterations
        parts[part].append(row["total_loss"])
    return [statistics.mean(part) for part in parts] if all(parts) else []


def _by_group(folder: RunFolder, results: dict[str, Any], task: str) -> dict[str, float]:
    """AP or AR@1000 of each supercategory of the mini dataset; empty for other data.

    AP of a group is the mean of its categories' AP, as COCO's is of all. Proposals have
    no categories: the recall of a group is Detectron2's over only the group's labels.
    """
    if folder.scale != "mini":
        return {}
    [name] = folder.config().DATASETS.TEST
    with redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = COCO(MetadataCatalog.get(name).json_file)
    groups: dict[str, list[dict[str, Any]]] = {}
    for category in coco.loadCats(coco.getCatIds()):
        groups.setdefault(category["supercategory"], []).append(category)
    if task == "bbox":
        per_category = results[task]
        return {
            # A category without detections has no AP.
            group: statistics.mean(
                per_category.get(f"AP-{category['name']}", float("nan")) for category in categories
            )
            for group, categories in groups.items()
        }
    with (folder.path / "inference" / "box_proposals.pkl").open("rb") as file:
        saved = load_arrays(file)
    predictions = []
    for image_id, boxes, logits in zip(
        saved["ids"], saved["boxes"], saved["objectness_logits"], strict=True
    ):
        proposals = Instances((0, 0))
        proposals.proposal_boxes = Boxes(torch.as_tensor(boxes))
        proposals.objectness_logits = torch.as_tensor(logits)
        predictions.append({"image_id": image_id, "proposals": proposals})
    recalls = {}
    for group, categories in groups.items():
        only = COCO()
        ids = {category["id"] for category in categories}
        only.dataset = {
            **coco.dataset,
            "annotations": [a for a in coco.dataset["annotations"] if a["category_id"] in ids],
        }
        with redirect_stdout(io.StringIO()):
            only.createIndex()
        recalls[group] = 100 * float(_evaluate_box_proposals(predictions, only, limit=1000)["ar"])
    return recalls
