"""What a finished run's model costs: parameters, multiply-adds and peak memory of detection."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from fpn_plugin.engine import FPNTrainer, StrictCheckpointer, load_config
from fpn_plugin.errors import UserError, one_line
from fpn_plugin.inspection.anatomy import anatomy
from fpn_plugin.modeling import without_network_weights

__all__ = ["COSTS", "costs", "print_costs"]

# The columns of a report, and what they are divided by.
COSTS = {"parameters (M)": 1e6, "multiply-adds (G)": 1e9, "peak memory (MiB)": 2**20}
_UNIT = 1024 if sys.platform.startswith("linux") else 1  # bytes, of ru_maxrss


def costs(run: Path) -> dict[str, float]:
    """The costs of a run's model for the first image of its evaluation, in a process of its own.

    Args:
        run: folder with ``config.yaml`` and ``model_final.pth``.

    Returns:
        By ``COSTS``. Memory is the process's, and on a GPU what torch allocates there; the model
        itself is part of it.

    Raises:
        UserError: the process failed; has its last line.
    """
    code = "import sys; from fpn_plugin.paper.costs import print_costs; print_costs(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    if done.returncode:
        last = one_line(Exception(done.stderr.strip().rpartition("\n")[2]))
        raise UserError(f"the costs of {run} cannot be measured: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def print_costs(run: str) -> None:
    """Prints the costs of a run's model as JSON; it is called in a new process."""
    cfg = load_config(str(Path(run, "config.yaml")), ["DATALOADER.NUM_WORKERS", "0"])
    model = FPNTrainer.build_model(without_network_weights(cfg)).eval()
    StrictCheckpointer(model, complete=True).load(str(Path(run, "model_final.pth")))
    batch = next(iter(FPNTrainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])))
    with torch.no_grad():
        model(batch)
    memory = _peak(cfg.MODEL.DEVICE)
    parts = anatomy(model, tuple(batch[0]["image"].shape[-2:])).parts
    figures = (sum(p.parameters for p in parts), sum(p.multiply_adds for p in parts), memory)
    scaled = [value / unit for value, unit in zip(figures, COSTS.values(), strict=True)]
    print(json.dumps(dict(zip(COSTS, scaled, strict=True))))


def _peak(device: str) -> int:
    """The most bytes so far, on a device."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
