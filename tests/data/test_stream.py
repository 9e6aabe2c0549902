"""The training stream: Detectron2's order, entered anywhere, the same with any workers."""

import itertools

import pytest
import torch
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler

from evidence.tiny import tiny_options
from fpn_plugin.data import TrainStream, register_datasets, train_stream
from fpn_plugin.engine.settings import load_config


def stock_loader(squares, tmp_path, *opts, sampler=None):
    register_datasets([squares])
    options = tiny_options(squares, tmp_path)
    more = ["DATALOADER.NUM_WORKERS", "0", *map(str, opts)]
    cfg = load_config(options[1], [*options[5:], *more])
    sampler = TrainingSampler(8, seed=3) if sampler is None else sampler
    return build_detection_train_loader(
        cfg, mapper=DatasetMapper(cfg, is_train=True), sampler=sampler
    )


def batches(loader, count):
    return list(itertools.islice(iter(loader), count))


def names(found):
    return [[record["file_name"] for record in batch] for batch in found]


def same(one, other):
    assert names(one) == names(other)
    for mine, theirs in zip(itertools.chain(*one), itertools.chain(*other), strict=True):
        assert torch.equal(mine["image"], theirs["image"])
        boxes = (each["instances"].gt_boxes.tensor for each in (mine, theirs))
        assert torch.equal(*boxes)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("kind", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_images_come_in_detectron2s_order(squares, tmp_path, grouped, kind):
    def loader():
        samplers = {
            "TrainingSampler": TrainingSampler(8, seed=3),
            "RepeatFactorTrainingSampler": RepeatFactorTrainingSampler(
                torch.linspace(1, 2, 8), seed=3
            ),
        }
        opts = ["DATALOADER.ASPECT_RATIO_GROUPING", grouped, "SOLVER.IMS_PER_BATCH", 3]
        return stock_loader(squares, tmp_path, *opts, sampler=samplers[kind])

    stream = train_stream(loader())
    assert isinstance(stream, TrainStream)
    theirs = names(batches(loader(), 12))
    assert names(batches(stream, 12)) == theirs
    assert len({name for batch in theirs for name in batch}) == 8


@pytest.mark.parametrize("grouped", [True, False])
def test_it_can_be_entered_at_any_batch_and_has_the_same_images(squares, tmp_path, grouped):
    opts = ["DATALOADER.ASPECT_RATIO_GROUPING", grouped, "SOLVER.IMS_PER_BATCH", 3]
    stream = train_stream(stock_loader(squares, tmp_path, *opts))
    stream.seed = 5
    uncut = batches(stream, 10)
    for start in range(8):
        torch.rand(start)  # what is drawn elsewhere does not matter
        stream.start = start
        same(batches(stream, 2), uncut[start : start + 2])


@pytest.mark.parametrize("grouped", [True, False])
def test_workers_do_not_change_it(squares, tmp_path, grouped):
    opts = ["DATALOADER.ASPECT_RATIO_GROUPING", grouped]
    alone = train_stream(stock_loader(squares, tmp_path, *opts))
    three = train_stream(stock_loader(squares, tmp_path, *opts, "DATALOADER.NUM_WORKERS", 3))
    alone.start = three.start = 3
    same(batches(alone, 8), batches(three, 8))


def test_augmentation_differs_between_visits_and_seeds(squares, tmp_path):
    stream = train_stream(stock_loader(squares, tmp_path))
    visits: dict[str, set] = {}
    for record in itertools.chain(*batches(stream, 40)):
        shape_and_corner = (*record["image"].shape, int(record["image"][0, 0, 0]))
        visits.setdefault(record["file_name"], set()).add(shape_and_corner)
    # Three scales, mirrored or not.
    assert all(len(seen) >= 4 for seen in visits.values())
    sizes = [[r["image"].shape for b in batches(stream, 8) for r in b]]
    stream.seed = 1
    sizes.append([r["image"].shape for b in batches(stream, 8) for r in b])
    assert sizes[0] != sizes[1]


def test_reading_it_draws_nothing_from_the_generators(squares, tmp_path):
    stream = train_stream(stock_loader(squares, tmp_path))
    before = torch.get_rng_state()
    batches(stream, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_a_loader_of_another_make_is_left_as_it_is_and_told(caplog):
    loader = [[1], [2]]
    assert train_stream(loader) is loader
    assert "is a list, not one of build_detection_train_loader" in caplog.text
