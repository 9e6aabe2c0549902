"""Files from elsewhere: none runs code, or leads out of its folder, because a tool was given it."""

import argparse
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from fpn_plugin import UserError
from fpn_plugin.cli.common import given_images
from fpn_plugin.cli.train import train_main
from fpn_plugin.data import check_coco, check_dataset
from fpn_plugin.engine import load_config
from fpn_plugin.lazy import load_lazy_config
from fpn_plugin.utils import pickles as unpickling
from fpn_plugin.utils.pickles import load_arrays
from tests.helpers.runs import Malicious

MINI = "mini/faster_rcnn_R_18_FPN.yaml"


@pytest.fixture
def ran(tmp_path) -> Path:
    """Written where code of a file was run; never, when the test is over."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists()


def test_the_malicious_pickle_would_run(tmp_path):
    pickle.loads(pickle.dumps(Malicious(tmp_path / "ran")))
    assert (tmp_path / "ran").read_text() == "ran"


def test_arrays_of_any_dtype_and_order_are_read():
    given = {
        "a": np.arange(6, dtype=np.float16).reshape(2, 3),
        "b": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "c": [np.float32(2.5), np.bool_(True), 7, "text"],
        "d": np.array([], np.int64),
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        read = load_arrays(io.BytesIO(pickle.dumps(given, protocol)))
        assert read.keys() == given.keys() and read["c"] == given["c"]
        for key in "abd":
            assert read[key].dtype == given[key].dtype
            np.testing.assert_array_equal(read[key], given[key])


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "numpy.load", "torch.load"])
def test_a_pickle_may_name_nothing_but_arrays(name):
    module, _, function = name.rpartition(".")
    text = f"c{module}\n{function}\n(Vtrue\ntR.".encode()
    with pytest.raises(UserError, match=f"would call {name}; only arrays"):
        load_arrays(io.BytesIO(text))


class Reduced:
    """Pickled as a call of something and the state that it is given then."""

    def __init__(self, *reduced) -> None:
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


RECONSTRUCT = np.zeros(1).__reduce__()[0]
DTYPE_STATE = np.dtype("f8").__reduce__()[2]


def array_pickle(dtype, content, shape=(4,), protocol=2) -> bytes:
    state = (1, shape, dtype, False, content)
    array = Reduced(RECONSTRUCT, (np.ndarray, (0,), b"b"), state)
    return pickle.dumps({"a": array}, protocol)


def dtype(code: str, *state) -> Reduced:
    return Reduced(np.dtype, (code, False, True), state or DTYPE_STATE)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("version", [(3, "|"), (4, "|")])
def test_bytes_are_not_taken_for_pointers_to_objects(version, protocol):
    # Its flags, which are the last number, say that it holds no objects.
    state = (*version, None, None, None, -1, -1, 0, *([None] if version[0] == 4 else []))
    told = "array of objects that is not given by a list"
    for code in ("O8", "O"):
        content = array_pickle(dtype(code, *state), b"A" * 32, protocol=protocol)
        with pytest.raises(pickle.UnpicklingError, match=told):
            load_arrays(io.BytesIO(content))


F4 = dtype("f4")
HOSTILE_ARRAYS = {
    "fewer bytes than the shape says": array_pickle(F4, b"A" * 12),
    "more bytes": array_pickle(F4, b"A" * 20),
    "a shape for all of memory": array_pickle(F4, b"A" * 16, (10**6, 10**6)),
    "negative sides": array_pickle(F4, b"A" * 16, (-2, -2)),
    "sides that are no numbers": array_pickle(F4, b"A" * 16, ("4",)),
    "a list for numbers": array_pickle(F4, [1.0] * 4),
    "objects, too few": array_pickle(dtype("O8"), [1]),
    "objects that are text": array_pickle(dtype("O8"), "text"),
    "fields": array_pickle(dtype("V8"), b"A" * 32),
    "times": array_pickle(dtype("M8[s]"), b"A" * 32),
    "text of no size": array_pickle(dtype("S0"), b"", (10**12,)),
    "text that is no text": array_pickle(dtype("U1"), b"\xff" * 16),
    "a byte order that is none": array_pickle(dtype("f4", 3, "x"), b"A" * 16),
    "no state": pickle.dumps([Reduced(RECONSTRUCT, (np.ndarray, (9,), b"b"))]),
    "an array that is called for": pickle.dumps([Reduced(np.ndarray, (10**6, 10**6))]),
    "within itself": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
    b"U\x01b\x87Rq\x01(K\x01K\x01\x85cnumpy\ndtype\nU\x02O8\x85R\x89]h\x01atb.",
    "a codec": b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
    "a function": b"c_codecs\nencode\n.",
    "a function that is changed": b"c_codecs\nencode\n}X\x05\x00\x00\x00_callNsb.",
    "a class that is changed": b"ccollections\nOrderedDict\nN}X\x05\x00\x00\x00itemsNs\x86b.",
    "bytes for all of memory": b"\x80\x04\x8e" + (2**60 - 1).to_bytes(8, "little") + b".",
    "lists in lists": b"]" * 100_000 + b"a" * 99_999 + b".",
}


@pytest.mark.parametrize("content", HOSTILE_ARRAYS.values(), ids=HOSTILE_ARRAYS)
def test_arrays_that_are_not_what_they_say_are_refused(content):
    with pytest.raises(pickle.UnpicklingError) as raised:
        load_arrays(io.BytesIO(content))
    assert "\n" not in str(raised.value)


def test_nothing_of_numpy_is_handed_to_a_pickle():
    assert all(
        type(given).__module__ == "fpn_plugin.utils.pickles"
        for (module, _), given in unpickling._STANDINS.items()
        if module != "collections"
    )


def test_pickles_of_python_2_are_read():
    values = np.array([[1.5, -2.0], [3.0, 1e-3]], "<f4")
    content = (
        b"\x80\x02}U\x09conv1_w_0cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02"
        b"K\x00\x85U\x01bq\x03\x87R(K\x01K\x02K\x02\x86cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U"
        b"\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x10" + values.tobytes() + b"tbs."
    )
    assert pickle.loads(content, encoding="latin1").keys() == {"conv1_w_0"}  # as it ought to be
    read = load_arrays(io.BytesIO(content))
    np.testing.assert_array_equal(read["conv1_w_0"], values)
    assert read["conv1_w_0"].dtype == np.float32


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_either_numpy_and_of_objects_are_read(protocol):
    given = {
        "swapped": np.arange(3, dtype=">f4"),
        "text": np.array(["a", "bcd"]),
        "empty": np.zeros((0, 4), np.float32),
        "single": np.array(2.5),
        "view": np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2),
    }
    objects = np.array([np.zeros((2, 4)), [1, "b"], None], dtype=object)
    shared = np.arange(2)
    content = pickle.dumps({**given, "objects": objects, "two": [shared, shared]}, protocol)
    numpy_2, numpy_1 = b"numpy._core.", b"numpy.core."
    if protocol < 4:  # names have their length beside them since
        versions = [
            content.replace(numpy_2, numpy_1),
            content.replace(numpy_2, numpy_1).replace(numpy_1, numpy_2),
        ]
    else:
        versions = [content]
    for version in versions:
        read = load_arrays(io.BytesIO(version))
        for key, value in given.items():
            np.testing.assert_array_equal(read[key], value)
            assert read[key].dtype == value.dtype.newbyteorder("=")
        assert read["objects"].dtype == object
        np.testing.assert_array_equal(read["objects"][0], np.zeros((2, 4)))
        assert read["objects"][1:].tolist() == [[1, "b"], None]
        assert read["two"][0] is read["two"][1]


def test_object_arrays_hide_nothing(ran):
    hidden = np.array([Malicious(ran)], dtype=object)
    with pytest.raises(UserError, match="would call builtins.exec"):
        load_arrays(io.BytesIO(pickle.dumps(hidden)))


HOSTILE = "OUTPUT_DIR: !!python/object/apply:builtins.open ['{ran}', 'w']\n"


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_hostile_yaml_runs_nothing_even_as_a_base(ran, tmp_path, depth):
    (tmp_path / "0.yaml").write_text(HOSTILE.format(ran=ran))
    for i in range(1, depth + 1):
        (tmp_path / f"{i}.yaml").write_text(f"_BASE_: {i - 1}.yaml\nSEED: 1\n")
    with pytest.raises(UserError, match="/0.yaml cannot be read as plain YAML.*python"):
        load_config(str(tmp_path / f"{depth}.yaml"))


def test_options_are_values_and_no_expressions(ran):
    expression = f"open({str(ran)!r}, 'w')"
    output = load_config(MINI, ["OUTPUT_DIR", expression]).OUTPUT_DIR
    assert output == expression


def test_lazy_configs_are_python_that_was_asked_for_by_name(ran, tmp_path):
    (tmp_path / "lazy.yaml").write_text(HOSTILE.format(ran=ran))
    with pytest.raises(UserError, match="lazy.yaml cannot be read as plain YAML.*python"):
        load_lazy_config(str(tmp_path / "lazy.yaml"))
    (tmp_path / "lazy.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(UserError, match="lazy.py is Python, which is not run here"):
        load_config(str(tmp_path / "lazy.py"))  # by the tools that take YAML


@pytest.fixture
def own(tmp_path):
    """A dataset of one image, as --dataset takes it; its JSON; its image folder."""
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    for path in (images / "a.png", tmp_path / "data" / "secret.png"):
        Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(path)
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 50, "height": 40}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 10, 12], "area": 120,
             "iscrowd": 0},
        ],
        "categories": [{"id": 3, "name": "cell"}],
    }  # fmt: skip
    json_file = tmp_path / "data" / "own.json"
    json_file.write_text(json.dumps(content))
    yield f"untrusted={json_file}:{images}", json_file, images
    if "untrusted" in DatasetCatalog.list():
        DatasetCatalog.remove("untrusted")
        MetadataCatalog.remove("untrusted")


@pytest.mark.parametrize("hostile", [True, False])
def test_a_malicious_file_of_proposals_is_not_run(ran, own, tmp_path, hostile):
    path = tmp_path / "proposals.pkl"
    path.write_bytes(pickle.dumps(Malicious(ran)) if hostile else b"no pickle")
    told = r"proposals.pkl' is not loaded: .*builtins.exec.*dump-proposals" if hostile else (
        r"proposals.pkl' is no file of proposals"
    )  # fmt: skip
    with pytest.raises(UserError, match=told):
        train_main(
            ["--config-file", "mini/table2_c_FPN.yaml", "--dataset", own[0],
             "DATASETS.TRAIN", "('untrusted',)", "DATASETS.TEST", "('untrusted',)",
             "DATASETS.PROPOSAL_FILES_TRAIN", f"('{path}',)",
             "DATASETS.PROPOSAL_FILES_TEST", f"('{path}',)",
             "MODEL.ROI_HEADS.NUM_CLASSES", "1", "MODEL.WEIGHTS", "",
             "DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(tmp_path / "out")]
        )  # fmt: skip


TRAVERSALS = [
    "../secret.png",
    "a/../../secret.png",
    "..\\secret.png",
    "/etc/passwd",
    "C:\\secret.png",
    "\\\\host\\share.png",
    "..",
    "a.png/../../secret.png",
    "",
    ".",
    "a\0.png",
    "\ud800.png",
]


@pytest.mark.parametrize("name", TRAVERSALS)
def test_file_names_that_lead_out_of_the_folder_are_refused_and_not_opened(own, name, monkeypatch):
    _, json_file, images = own
    content = json.loads(json_file.read_text())
    content["images"][0]["file_name"] = name
    json_file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"images\[0\] \(id 7\): file_name is") as raised:
        check_coco(str(json_file), str(images))
    assert "\n" not in str(raised.value)
    opened = []
    monkeypatch.setattr(Image, "open", lambda path, *_: opened.append(path))
    report = check_dataset(str(json_file), str(images))
    assert report.counts == {"file_name": 1}
    assert not opened


@pytest.mark.parametrize("name", ["sub/../a.png", "./a.png", "..a.png", "a..png", "b c/ü.png"])
def test_file_names_that_stay_in_the_folder_are_not_refused(own, name):
    _, json_file, _ = own
    content = json.loads(json_file.read_text())
    content["images"][0]["file_name"] = name
    json_file.write_text(json.dumps(content))
    assert check_coco(str(json_file)) == ["cell"]


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd"])
def test_images_to_look_at_stay_in_the_folder_of_a_registered_dataset(own, name):
    _, json_file, images = own
    register_coco_instances("untrusted", {}, str(json_file), str(images))
    args = argparse.Namespace(ground_truth="untrusted", input=None, max_images=None)
    assert [image.path for image in given_images(args)] == [images / "a.png"]
    content = json.loads(json_file.read_text())
    content["images"][0]["file_name"] = name
    json_file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"images\[0\] \(id 7\): file_name is .*leads out"):
        given_images(args)
