"""What level statistics cost: timed in pairs, and the table of it."""

import torch
from torch import nn

from evidence.level_statistics_cost import cost_table, paired_seconds


class Tiny(nn.Module):
    """A backbone, and a loss of its map."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.observed: list[int] = []

    def forward(self, batch):
        self.observed.append(len(self.backbone._forward_hooks))
        return {"loss": self.backbone(batch[0])["p2"].mean()}


class Backbone(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(1, 1, 1)

    def forward(self, image):
        return {"p2": super().forward(image)}


def test_the_cost_is_timed_in_pairs():
    model = Tiny()
    batches = iter([[torch.ones(1, 1, 2, 2)]] * 4)
    plain, observed = paired_seconds(model, batches, pairs=3, warm_up=1)
    assert len(plain) == len(observed) == 3
    assert all(seconds > 0 for seconds in plain + observed)
    assert model.observed == [1, 0, 0, 1, 1, 0, 0, 1]  # which of each pair is observed, in turns


def test_the_cost_in_words():
    told = cost_table([0.1, 0.2, 0.3, 0.2], [0.12, 0.25, 0.33, 0.24], period=20)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines()[2:5]]
    assert rows[0] == ["plain iteration", "200.0", "175.0", "225.0"]
    assert rows[1] == ["observed iteration", "245.0", "210.0", "270.0"]
    assert rows[2] == ["difference in a pair", "35.0", "27.5", "42.5"]
    # Ratios 1.1, 1.2, 1.2, 1.25; 35 ms of 200 ms, one iteration in 20.
    assert "observed / plain: 1.200 in the median of pairs (1.175 to 1.212" in told
    assert "every 20 iterations: +0.88% of the time of training" in told
