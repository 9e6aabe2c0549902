"""Starting scripts of this folder in several processes, by either launcher."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

LAUNCHERS = {
    "alone": lambda n: ((), ("--num-gpus", "1")),
    "launch": lambda n: ((), ("--num-gpus", str(n), "--dist-url", "auto")),
    "torchrun": lambda n: (
        ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"),
        (),
    ),
}
ROOT = Path(__file__).parents[2]
# Far below torch's own 30 minutes: what hangs does not pass.
PATIENCE = 600


@pytest.fixture(scope="session")
def start() -> Callable[..., tuple[int, str, str]]:
    """Runs ``script`` in ``processes`` processes: exit status, output and errors."""

    def start(
        script: str, *args: str, how: str, processes: int = 2, env: dict[str, str] | None = None
    ) -> tuple[int, str, str]:
        launcher, more = LAUNCHERS[how](processes)
        done = subprocess.run(
            [sys.executable, *launcher, str(Path(__file__).parent / script), *more, *args],
            capture_output=True,
            text=True,
            # A script finds only its own folder; evidence/ is at the top of the checkout.
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})},
            timeout=PATIENCE,
        )
        return done.returncode, done.stdout, done.stderr

    return start
