"""How colours look to a deuteranope, and figures caught before they are files."""

from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.figure import Figure


def _simulated(color: str) -> np.ndarray:
    """What a deuteranope sees of sRGB (Machado, Oliveira and Fernandes 2009, severity 1)."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    )
    return np.clip(seen @ linear, 0, 1) ** (1 / 2.2)


@pytest.fixture
def simulated() -> Callable[[str], np.ndarray]:
    """What a deuteranope sees of a colour "#RRGGBB"."""
    return _simulated


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Gets every figure that is saved; no file is written."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    return figures
