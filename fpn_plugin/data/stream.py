"""Training data as a function of a seed and an iteration, so that a resumed run sees the same."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.data import MapDataset
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import AspectRatioGroupedDataset, ToIterableDataset
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from fpn_plugin.utils.seeding import seeded

__all__ = ["TrainStream", "train_stream"]

# What Detectron2's samplers draw when they are made.
_DRAWN = ("_seed", "_seed_subset", "_indexes_subset")


class TrainStream:
    """Detectron2's training loader, which can begin at any batch.

    Datasets, mapper, sampler, grouping by aspect ratio and worker processes are the same. The
    images of a batch and their augmentation depend only on seed and position, not on the number of
    workers or on what was drawn before.

    Args:
        loader: of :func:`detectron2.data.build_detection_train_loader`.

    Attributes:
        seed: of the augmentation.
        start: this process's first batch; read when iteration begins.
    """

    def __init__(self, loader: DataLoader | AspectRatioGroupedDataset) -> None:
        self._grouped = isinstance(loader, AspectRatioGroupedDataset)
        inner = loader.dataset if self._grouped else loader
        self.batch_size: int = loader.batch_size
        self.dataset: Dataset = inner.dataset.dataset
        self.sampler: Sampler = inner.dataset.sampler
        self._options = {
            name: getattr(inner, name)
            for name in (
                "num_workers", "worker_init_fn", "pin_memory", "timeout", "prefetch_factor",
                "persistent_workers", "multiprocessing_context",
            )
        }  # fmt: skip
        self._collate = trivial_batch_collator if self._grouped else inner.collate_fn
        self.seed = 0
        self.start = 0

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Batches from ``start`` on, without end."""
        loader = DataLoader(
            _Seeded(self.dataset, self.seed),
            batch_size=None if self._grouped else self.batch_size,
            sampler=self.positions(),
            collate_fn=self._collate,
            # Its own, because the default is the generator that training draws from.
            generator=torch.Generator().manual_seed(0),
            **self._options,
        )
        yield from AspectRatioGroupedDataset(loader, self.batch_size) if self._grouped else loader

    def state_dict(self) -> dict[str, Any]:
        """What the sampler drew when it was made; the position follows from the iteration."""
        return {name: value for name, value in vars(self.sampler).items() if name in _DRAWN}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what another sampler of the same kind drew."""
        vars(self.sampler).update({k: v for k, v in state.items() if k in _DRAWN})

    def positions(self) -> Iterator[tuple[int, int]]:
        """Position over all processes, and index in the dataset, of each image from ``start`` on.

        Images that are grouped come as they arrive, after those that earlier batches left over.
        """
        rank, processes = comm.get_rank(), comm.get_world_size()
        stream = ((at * processes + rank, index) for at, index in enumerate(self.sampler))
        if not self._grouped:
            return itertools.islice(stream, self.start * self.batch_size, None)
        return itertools.chain(self._left_over(stream), stream)

    def _left_over(self, stream: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
        """Reads what the batches before ``start`` read; returns what they did not use."""
        records = self.dataset._dataset
        wide: dict[int, bool] = {}
        waiting: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        batches = 0
        while batches < self.start:
            position, index = next(stream)
            if index not in wide:
                wide[index] = records[index]["width"] > records[index]["height"]
            group = waiting[wide[index]]
            group.append((position, index))
            if len(group) == self.batch_size:
                group.clear()
                batches += 1
        return sorted(waiting[False] + waiting[True])


class _Seeded(Dataset):
    """A dataset whose items are made with generators seeded by their position."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, item: tuple[int, int]) -> Any:
        position, index = item
        with seeded(self._seed, position):
            return self._dataset[index]


def train_stream(loader: Any) -> Any:
    """A :class:`TrainStream` of a loader, or the loader itself if it is not Detectron2's.

    Args:
        loader: the training loader. Another kind is logged, because a resumed run reads it from
            its beginning.
    """
    inner = loader.dataset if isinstance(loader, AspectRatioGroupedDataset) else loader
    mapped = isinstance(inner, DataLoader) and isinstance(inner.dataset, ToIterableDataset)
    if mapped and isinstance(inner.dataset.dataset, MapDataset):
        return TrainStream(loader)
    logging.getLogger(__name__).warning(
        "the training loader is a %s, not one of build_detection_train_loader: a resumed run will "
        "see its data from the beginning",
        type(loader).__name__,
    )
    return loader
