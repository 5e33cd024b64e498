"""What training programs save beside the tensors: settings, counters, paths, numbers of NumPy, keys of any kind."""

import argparse
import collections
import datetime
import pickle
import random
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rice_jax.weights import archives
from tests import torch_files
from tests.torch_files import text

MODEL = {"x": np.arange(3, dtype=np.float32)}
BESIDE: dict[str, Any] = {
    "Namespace": argparse.Namespace(lr=1, path=Path("x"), betas=(0.9, 0.99)),
    "SimpleNamespace": types.SimpleNamespace(a=[1]),
    "Counter": collections.Counter([3, 4, 4]),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "defaultdict of dicts": collections.defaultdict(collections.OrderedDict),
    "deque": collections.deque([1, 2], 5),
    "sets": [{1, 2}, frozenset("ab"), {"a", (1, 2.5)}],
    "paths": [Path("x"), Path("/a/b")],
    "bytes": [b"", b"abc\xff", bytearray(b"abc")],
    "numbers": [1 + 2j, 10**30, slice(1, 2), range(3), float],
    "NumPy's numbers": [np.float64(0.4), np.int32(3), np.bool_(True), np.float32],
    "NumPy's arrays": [np.arange(3), np.zeros((2, 3), np.float16, "F"), np.dtype("f4"), np.array(["a"], object)],
    "generators": [random.getstate(), np.random.RandomState(0).get_state()],
    "times": [datetime.datetime(2026, 1, 2), datetime.timedelta(3), datetime.date(2026, 1, 2)],
    "keys": {
        None: 1,
        0.5: 1,
        b"a": 1,
        ("a", 1): 1,
        (1, (2, 3)): 1,
        10**12: 1,
        -(2**40): 1,
        np.int64(3): 1,
        Path("x"): 1,
    },
}


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("what", BESIDE)
def test_what_programs_save_beside_a_model_is_passed_over(what: str, protocol: int, tmp_path: Path) -> None:
    storages: list[np.ndarray] = []
    beside = pickle.dumps(BESIDE[what], protocol)[2:-1]
    content = b"}(" + text("beside") + beside + text("model") + torch_files.pickled(MODEL, storages) + b"u."
    torch_files.write_archive(tmp_path / "file", bytes([0x80, protocol]) + content, storages)
    tensors = archives.read(tmp_path / "file").tensors
    assert list(tensors) == ["model.x"] and tensors["model.x"].read().tolist() == [0, 1, 2]


NAMED = [  # module, name, and the opcodes that make an object of it
    ("torch", "device", text("cuda") + b"K\x00\x86R"),
    ("torch", "bfloat16", b""),
    ("pathlib._local", "PosixPath", text("a") + b"\x85R"),
    ("numpy.core.multiarray", "scalar", text("f8") + text("a") + b"\x86R"),
    ("omegaconf.dictconfig", "DictConfig", b")\x81}" + text("_content") + b"}sb"),
    ("ml_collections.config_dict.config_dict", "ConfigDict", b")\x81}" + text("_fields") + b"}sb"),
    ("easydict", "EasyDict", b")\x81}" + text("lr") + b"K\x01sb"),
]


@pytest.mark.parametrize(("module", "name", "made"), NAMED)
def test_classes_of_programs_that_are_not_installed_are_passed_over(
    module: str, name: str, made: bytes, tmp_path: Path
) -> None:
    torch_files.write_state_dict(tmp_path / "file", MODEL | {"beside": f"c{module}\n{name}\n".encode() + made})
    assert list(archives.read(tmp_path / "file").tensors) == ["x"]


def test_tensors_in_a_dict_of_a_class_of_its_own_are_found(tmp_path: Path) -> None:
    storages: list[np.ndarray] = []
    items = torch_files.pickled(MODEL, storages)[1:]
    for made in (b"cyacs.config\nCfgNode\n)\x81", b"ccollections\ndefaultdict\nc__builtin__\ndict\n\x85R"):
        torch_files.write_archive(tmp_path / "file", b"\x80\x02" + made + items + b".", storages)
        assert list(archives.read(tmp_path / "file").tensors) == ["x"]


@pytest.mark.parametrize(
    "name", ["builtins.getattr", "os.system", "argparse.ArgumentParser", "pathlib.os", "numpy.load"]
)
@pytest.mark.parametrize(
    "around", [b"%b", b"cargparse\nNamespace\n(%bt\x81", b"cargparse\nNamespace\n)\x81}X\x01\0\0\0a%bsb"]
)
def test_other_names_are_refused_also_within_settings(name: str, around: bytes, tmp_path: Path) -> None:
    function = "c{}\n{}\n".format(*name.rsplit(".", 1)).encode() + text("touch x") + b"\x85R"
    torch_files.write_state_dict(tmp_path / "file", MODEL | {"args": around % function})
    with pytest.raises(ValueError, match=f"needs {name}, .*refused, and nothing was run"):
        archives.read(tmp_path / "file")


def test_a_dict_under_two_keys_is_read_once(tmp_path: Path) -> None:
    storages: list[np.ndarray] = []
    model = torch_files.pickled(MODEL, storages) + b"q\x00"
    content = b"\x80\x02}(" + text("model") + model + text("best_model") + b"h\x00u."
    torch_files.write_archive(tmp_path / "file", content, storages)
    assert list(archives.read(tmp_path / "file").tensors) == ["model.x"]


@pytest.mark.parametrize("value", [[MODEL], [1, [MODEL]]])
def test_lists_are_walked(value: list[Any], tmp_path: Path) -> None:
    storages: list[np.ndarray] = []
    torch_files.write_archive(tmp_path / "file", b"\x80\x02" + torch_files.pickled(value, storages) + b".", storages)
    assert list(archives.read(tmp_path / "file").tensors) == ["0.x" if len(value) == 1 else "1.0.x"]


def test_a_tensor_alone_is_refused(tmp_path: Path) -> None:
    storages: list[np.ndarray] = []
    content = b"\x80\x02" + torch_files.pickled(MODEL["x"], storages) + b"."
    torch_files.write_archive(tmp_path / "file", content, storages)
    with pytest.raises(ValueError, match="needs a dict of tensors"):
        archives.read(tmp_path / "file")


def doubled(count: int, container: bytes) -> bytes:
    """A container that holds the one before twice, again and again: 2 ** count paths through them."""
    return container % b"" + b"q\x00" + b"".join(container % (b"h%c" % k * 2) + b"q%c" % (k + 1) for k in range(count))


@pytest.mark.parametrize("container", [b"](%be", b"(%bt"])
def test_a_container_of_many_paths_is_walked_once(container: bytes, tmp_path: Path) -> None:
    torch_files.write_state_dict(tmp_path / "file", MODEL | {"beside": b"](" + doubled(40, container) + b"e"})
    assert list(archives.read(tmp_path / "file").tensors) == ["x"]


@pytest.mark.parametrize("made", [b"(%bt", b"(%b\x91", b"c__builtin__\nset\n(%bt\x85R"])
def test_keys_that_take_long_to_hash_are_refused(made: bytes, tmp_path: Path) -> None:
    keys = {"tuples": doubled(40, b"(%bt"), "wide": b"(" + b"N" * 100 + b"t"}
    for key in keys.values():
        torch_files.write_state_dict(tmp_path / "file", {"x": b"}" + made % key + b"Ns"})
        with pytest.raises(ValueError, match="has a key that is neither a string nor a small integer"):
            archives.read(tmp_path / "file")


@pytest.mark.parametrize("how", [b"}(%bu", b"\x8f(%b\x90", b"(%b\x91"])
def test_many_keys_that_could_have_one_hash_are_refused(how: bytes, tmp_path: Path) -> None:
    value = lambda k: b"\x8a\x0a" + ((2**61 - 1) * k).to_bytes(10, "little")
    keys = b"".join(value(k) + (b"N" if how.startswith(b"}") else b"") for k in range(1, 5000))
    torch_files.write_state_dict(tmp_path / "file", {"x": how % keys})
    with pytest.raises(ValueError, match="more than 1000 keys that are neither a string nor a small integer"):
        archives.read(tmp_path / "file")
