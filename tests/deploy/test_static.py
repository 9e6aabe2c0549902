"""The pipeline of fixed shapes gives the model's detections, on the CPU and in graphs on a GPU."""

import copy
import io
import threading

import pytest
import torch
from detectron2.structures import Instances

from fpn_plugin import UserError, optimize_for_inference
from fpn_plugin.deploy import graphs, static, steps_of
from fpn_plugin.deploy.comparison import Agreement
from fpn_plugin.deploy.fast_training import use_batched_parts
from fpn_plugin.deploy.graphs import GraphLimits, HostInstances

FIELDS = {"scores": 1e-4, "objectness_logits": 1e-3, "pred_keypoints": 0.05}


def fixed(model, inputs):
    """Detections by the pipeline, as a graph would give them; what is padded is no zero."""
    images = [each["image"] for each in inputs]
    canvas = torch.full((len(images), 3, *graphs.padded_size(model, images)), 77.0)
    for room, image in zip(canvas, images, strict=True):
        room[:, : image.shape[1], : image.shape[2]] = image
    rows = graphs.geometry(inputs)
    found = static.static_detector(model)(canvas, static.Geometry.of(torch.tensor(rows)))
    assert found.exact.all()
    row = graphs.packed(found)
    return graphs.instances_of(model, found, row, row, rows)


def assert_same(ours: Instances, theirs: Instances, least: int) -> None:
    assert len(ours) == len(theirs) >= least
    assert ours.image_size == theirs.image_size
    assert set(ours.get_fields()) == set(theirs.get_fields())
    boxes = "pred_boxes" if theirs.has("pred_boxes") else "proposal_boxes"
    # Detections of scores that are equal but for rounding may stand in another order.
    order = [each.get(boxes).tensor.sum(dim=1).argsort() for each in (ours, theirs)]
    for name, expected in theirs.get_fields().items():
        mine = ours.get(name)
        if name == boxes:
            mine, expected = mine.tensor, expected.tensor
        mine, expected = mine[order[0]], expected[order[1]]
        if name == "pred_masks":
            assert (mine != expected).float().mean() < 1e-4
        elif name != "pred_keypoint_heatmaps":
            tolerance = FIELDS.get(name, 0.01)
            torch.testing.assert_close(mine, expected, rtol=0, atol=tolerance)


@pytest.fixture
def inputs(images):
    """Two images of different sizes, one of whose detections are scaled."""
    small = images[3]["image"]
    return [images[1], {"image": small, "height": 2 * small.shape[1], "width": 300}]


KINDS = ["faster", "mask", "retinanet", "cascade", "keypoint", "rpn"]


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_the_models(kind, detector, inputs):
    model = detector(kind)
    with torch.no_grad():
        expected = model(inputs)
    fast = optimize_for_inference(model)
    for ours, theirs in zip(fixed(fast, inputs), expected, strict=True):
        assert_same(ours, next(iter(theirs.values())), least=3)


def test_no_detections(detector, inputs):
    model = detector("mask")
    model.roi_heads.box_predictor.test_score_thresh = 1.1
    assert [len(each) for each in fixed(optimize_for_inference(model), inputs)] == [0, 0]


def test_more_candidates_than_there_is_room_for_are_not_exact_unless_enough_are_kept(monkeypatch):
    monkeypatch.setattr(static, "_CANDIDATES", 4)
    corner = torch.arange(6.0)[None, :, None] * 100
    apart = torch.cat([corner, corner, corner + 10, corner + 10], dim=2)
    scores = torch.linspace(0.9, 0.4, 6)[None]
    none, source = torch.zeros(1, 6, dtype=torch.int64), torch.arange(6)[None]
    same = apart[:, :1].expand(-1, 6, -1)
    for boxes, most, exact in ((apart, 4, True), (apart, 5, False), (same, 4, False)):
        found = static._suppressed(boxes, scores, none, source, 0.5, most)
        assert found.exact.tolist() == [exact]


def test_parts_that_the_pipeline_does_not_know_are_named(detector):
    model = detector("faster")
    trained = copy.deepcopy(model)
    use_batched_parts(trained)  # as a training on a GPU leaves it
    for each in (model, trained):
        static.static_detector(optimize_for_inference(each))

    class OwnRPN(type(model.proposal_generator)):
        pass

    for change, name in (
        (lambda m: setattr(m.proposal_generator, "__class__", OwnRPN), "OwnRPN"),
        (lambda m: setattr(m, "proposal_generator", None), "Fast R-CNN"),
        (lambda m: setattr(m.roi_heads.box_predictor, "test_topk_per_image", -1), "-1"),
        (lambda m: setattr(m.roi_heads, "box_pooler", torch.nn.Identity()), "Identity"),
    ):
        changed = copy.deepcopy(model)
        change(changed)
        with pytest.raises(UserError, match=name):
            static.static_detector(changed)


def test_the_copy_on_the_host_is_given_and_fields_set_later_are_moved():
    instances = HostInstances((4, 5), scores=torch.rand(2))
    host = torch.rand(2)
    instances.keep(scores=host)
    assert instances.to("cpu").scores is host and instances.to(torch.device("cpu")).scores is host
    assert copy.deepcopy(instances).to("cpu").scores.equal(host)
    instances.scores = torch.zeros(2)
    assert instances.to("cpu").scores.equal(torch.zeros(2))


@pytest.fixture
def exact_digits(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def detect(model, inputs):
    with torch.no_grad():
        return [next(iter(each.values())).to("cpu") for each in model(inputs)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
class TestOnGPU:
    @pytest.mark.parametrize("kind", KINDS)
    def test_graphs_give_the_models_detections(self, kind, detector, inputs, images, exact_digits):
        model = detector(kind).cuda()
        fast = optimize_for_inference(model)
        assert all(step.taken for step in steps_of(fast)), steps_of(fast)
        calls = [inputs, [images[0]], [images[2]], [images[0]], inputs[::-1]]
        for call in calls:
            for ours, theirs in zip(detect(fast, call), detect(model, call), strict=True):
                assert_same(ours, theirs, least=0)
        assert dict(fast.graphs.counts) == {"replayed": 5} and len(fast.graphs) == 3

    def test_large_fields_come_to_the_host_in_pinned_memory(self, detector, images, monkeypatch):
        monkeypatch.setattr(graphs, "_LARGE", 1)
        model = optimize_for_inference(detector("mask").cuda())
        with torch.no_grad():
            found = model(images[:1])[0]["instances"]
        masks = found.to("cpu").pred_masks
        assert masks.is_pinned() and masks.equal(found.pred_masks.cpu()) and masks.any()

    def test_half_precision_finds_the_same_objects(self, detector, images):
        model = detector("faster").cuda()
        for dtype in (torch.float16, torch.bfloat16):
            fast = optimize_for_inference(model, dtype=dtype)
            for image in images[:2]:
                ours, theirs = detect(fast, [image])[0], detect(model, [image])[0]
                agreement = Agreement()
                agreement.add(theirs[theirs.scores > 0.5], ours)
                # Random weights spread rounding: a few boxes are suppressed by others.
                assert agreement.missing <= 0.1 * agreement.matched > 0
            assert set(fast.graphs.counts) == {"replayed"}

    def test_limits_the_plain_path_and_threads(self, detector, images, exact_digits):
        model = detector("faster").cuda()
        fast = optimize_for_inference(model, graphs=GraphLimits(graphs=1, images=2))
        expected = [detect(model, [image])[0] for image in images]
        for image, theirs in zip(images, expected, strict=True):
            assert_same(detect(fast, [image])[0], theirs, least=0)
        assert fast.graphs.counts["more sizes than graphs"] == 3
        detect(fast, images[:1] * 3)
        assert fast.graphs.counts["more than 2 images at once"] == 1
        with torch.autocast("cuda"):
            detect(fast, images[:1])
        assert fast.graphs.counts["under autocast"] == 1
        for _ in range(10):  # the new size takes its place
            detect(fast, [images[2]])
        assert len(fast.graphs) == 1
        found = {}

        def run(number):
            found[number] = [detect(fast, [images[number % 2]])[0] for _ in range(5)]

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, several in found.items():
            for ours in several:
                assert_same(ours, expected[number % 2], least=0)

    def test_copies_have_no_graphs_and_weights_may_change(self, detector, images, exact_digits):
        model = detector("faster").cuda()
        fast = optimize_for_inference(model, example=images[0]["image"])
        assert len(fast.graphs) == 1
        first = detect(fast, [images[0]])[0]
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        for other_one in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
            assert len(other_one.graphs) == 0
            assert_same(detect(other_one, [images[0]])[0], first, least=1)
            assert len(other_one.graphs) == 1
        with torch.no_grad():
            fast.roi_heads.box_predictor.cls_score.bias[-1] += 100  # background, in place
        assert len(detect(fast, [images[0]])[0]) == 0

    def test_a_capture_that_fails_is_said_once_and_the_model_runs(
        self, detector, images, monkeypatch, caplog, exact_digits
    ):
        model = detector("faster").cuda()
        fast = optimize_for_inference(model)

        def full(*_, **__):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(graphs, "_Graph", full)
        for _ in range(2):
            assert_same(detect(fast, [images[0]])[0], detect(model, [images[0]])[0], least=1)
        lines = [each for each in caplog.messages if "out of memory" in each]
        assert len(lines) == 1 and "the model runs without" in lines[0]

    def test_one_wait_an_image(self, detector, images):
        fast = optimize_for_inference(detector("faster").cuda())
        detect(fast, [images[0]])
        with torch.profiler.profile() as profile:
            detect(fast, [images[0]])
        waits = {
            event.key: event.count
            for event in profile.key_averages()
            if "Synchronize" in event.key or event.key == "cudaMemcpy"
        }
        waits.pop("cudaDeviceSynchronize", None)  # the profiler's own
        assert sum(waits.values()) == 1, waits
