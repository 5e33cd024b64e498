"""Reading tensors out of files: what comes back, and that nothing of a file is ever run."""

import contextlib
import pickle
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from rice_jax.weights import archives
from tests import torch_files
from tests.torch_files import ORDERED_DICT, View, text


def random(*shape: int, dtype: object = np.float32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("container", ["torch", "safetensors"])
def test_every_floating_type_is_read_as_float32(container: str, dtype: object, tmp_path: Path) -> None:
    array = random(3, 4, dtype=dtype)
    path = tmp_path / "file"
    if container == "torch":
        torch_files.write_state_dict(path, {"x": array, "scalar": array[:1, :1].reshape(())})
    else:
        save_file({"x": array, "scalar": array[:1, :1].reshape(())}, path)
    tensors = archives.read(path).tensors
    assert tensors["x"].dtype == np.dtype(dtype).name and tensors["x"].shape == (3, 4)
    assert tensors["x"].read().dtype == np.float32
    np.testing.assert_array_equal(tensors["x"].read(), array.astype(np.float32))
    assert tensors["scalar"].shape == () and float(tensors["scalar"].read()) == np.float32(array[0, 0])


def test_integers_stay_integers(tmp_path: Path) -> None:
    torch_files.write_state_dict(tmp_path / "file", {"ids": np.arange(5)})
    tensor = archives.read(tmp_path / "file").tensors["ids"]
    assert tensor.dtype == "int64" and tensor.read().tolist() == [0, 1, 2, 3, 4]


def test_views_of_one_storage_are_read_by_their_strides(tmp_path: Path) -> None:
    storage = np.arange(12, dtype=np.float32)
    views = {"transposed": View(storage, 0, (4, 3), (1, 4)), "part": View(storage, 5, (2, 2), (4, 2))}
    torch_files.write_state_dict(tmp_path / "file", views)
    tensors = archives.read(tmp_path / "file").tensors
    np.testing.assert_array_equal(tensors["transposed"].read(), storage.reshape(3, 4).T)
    assert tensors["part"].read().tolist() == [[5, 7], [9, 11]]


def test_big_endian_archives_are_read(tmp_path: Path) -> None:
    torch_files.write_state_dict(tmp_path / "file", {"x": np.array([1.5, -2], np.float32)})
    with zipfile.ZipFile(tmp_path / "file") as old, zipfile.ZipFile(tmp_path / "big", "w") as new:
        for name in old.namelist():
            data = np.frombuffer(old.read(name), "<f4").astype(">f4").tobytes() if "/data/" in name else old.read(name)
            new.writestr(name, data)
        new.writestr("archive/byteorder", "big")
    assert archives.read(tmp_path / "big").tensors["x"].read().tolist() == [1.5, -2]


def test_a_torchscript_archive_is_a_tree_of_attributes(tmp_path: Path) -> None:
    tensors = {"visual.conv1.weight": random(2, 3), "visual.proj": random(4), "scale": random(1).reshape(())}
    torch_files.write_torchscript(tmp_path / "file", tensors)
    found = archives.read(tmp_path / "file")
    assert found.container == "TorchScript" and found.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found.tensors[name].read(), array)


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_training_checkpoint_gives_its_model(key: str, tmp_path: Path) -> None:
    checkpoint = {"epoch": 3, "optimizer": {"moment": random(3)}, key: {"a": random(2)}, "best": None}
    torch_files.write_state_dict(tmp_path / "file", checkpoint)
    assert archives.read(tmp_path / "file").tensors.keys() == {"a"}


class _Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> object:
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_is_refused_and_nothing_of_it_runs(protocol: int, tmp_path: Path) -> None:
    evil = pickle.dumps({"x": _Evil(tmp_path / "ran")}, protocol)
    torch_files.write_archive(tmp_path / "file", evil, [])
    with pytest.raises(ValueError, match=r"data.pkl (calls for \w*builtin\w*\.exec, .*refused|holds [A-Z_]+, which)"):
        archives.read(tmp_path / "file")
    assert not (tmp_path / "ran").exists()
    pickle.loads(evil)
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("script", [False, True])
def test_no_module_that_a_pickle_names_is_imported(script: bool, tmp_path: Path) -> None:
    sys.modules.pop("antigravity", None)
    torch_files.write_archive(tmp_path / "file", b"\x80\x02cantigravity\nfly\n)R.", [], script=script)
    with pytest.raises(ValueError, match=r"calls for antigravity\.fly"):
        archives.read(tmp_path / "file")
    assert "antigravity" not in sys.modules


def test_a_pickled_module_is_refused_with_advice(tmp_path: Path) -> None:
    torch_files.write_archive(tmp_path / "file", b"\x80\x02c__torch__.model\nClip\n)\x81.", [])
    with pytest.raises(ValueError, match=r"calls for __torch__.model.Clip.*save model.state_dict\(\)"):
        archives.read(tmp_path / "file")  # no TorchScript archive, so no class of one


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View(np.zeros(4, np.float32), 1, (2, 2), (2, 1)), "beyond its storage"),
        (View(np.zeros(4, np.float32), 0, (5,), (1,)), "beyond its storage"),
        (View(np.zeros(1, np.float32), 0, (1_000_000, 1_000_000), (0, 0)), "beyond its storage"),
        (View(np.zeros(4, np.float32), -1, (2,), (1,)), "no possible shape"),
        (View(np.zeros(4, np.float32), 3, (2,), (-1,)), "no possible shape"),
        (View(np.zeros(4, np.float32), 0, (2, 2), (1,)), "no possible shape"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(view: View, message: str, tmp_path: Path) -> None:
    torch_files.write_state_dict(tmp_path / "file", {"x": view})
    with pytest.raises(ValueError, match=message):
        archives.read(tmp_path / "file")


def test_a_storage_larger_than_its_entry_is_refused(tmp_path: Path) -> None:
    storages: list[np.ndarray] = []
    pickled = torch_files.pickled({"x": np.zeros(8, np.float32)}, storages)
    torch_files.write_archive(tmp_path / "short", b"\x80\x02" + pickled + b".", [storages[0][:4]])
    with pytest.raises(ValueError, match=r"says 8 numbers of float32 for archive/data/0, which has 16 bytes"):
        archives.read(tmp_path / "short")
    torch_files.write_archive(tmp_path / "none", b"\x80\x02" + pickled + b".", [])
    with pytest.raises(ValueError, match=r"names a storage archive/data/0 that is missing"):
        archives.read(tmp_path / "none")


def test_a_dict_within_itself_is_refused(tmp_path: Path) -> None:
    torch_files.write_archive(tmp_path / "file", b"\x80\x02}q\x00" + text("a") + b"h\x00s.", [])
    with pytest.raises(ValueError, match="twice or within itself"):
        archives.read(tmp_path / "file")


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (b"](K\x01e.", "holds a list, needs a dict"),
        (b"h\x07.", "is damaged"),
        (b"u.", "is damaged"),
        (b"", "is damaged"),
    ],
)
def test_a_pickle_of_something_else_is_refused(opcodes: bytes, message: str, tmp_path: Path) -> None:
    torch_files.write_archive(tmp_path / "file", b"\x80\x02" + opcodes, [])
    with pytest.raises(ValueError, match=message):
        archives.read(tmp_path / "file")


def test_damaged_numbers_are_noticed(tmp_path: Path) -> None:
    torch_files.write_state_dict(tmp_path / "file", {"x": np.full(100, 1.25, np.float32)})
    content = bytearray((tmp_path / "file").read_bytes())
    content[content.index(np.float32(1.25).tobytes() * 3)] ^= 1
    (tmp_path / "file").write_bytes(content)
    tensor = archives.read(tmp_path / "file").tensors["x"]
    with pytest.raises(ValueError, match="another checksum"):
        tensor.read()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither safetensors nor a torch archive"),
        (b"PK\3\4" + bytes(100), "damaged or cut short"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "torch before 1.6.*save it anew"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
        (b"<html>Not found</html>", "neither safetensors nor a torch archive"),
    ],
)
def test_other_files_are_refused_with_advice(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        archives.read(tmp_path / "file")


def test_other_zip_files_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "file", "w") as file:
        file.writestr("a.txt", "a")
    with pytest.raises(ValueError, match=r"without torch's data\.pkl"):
        archives.read(tmp_path / "file")
    torch_files.write_state_dict(tmp_path / "deflated", {"x": np.zeros(1000)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed or damaged"):
        archives.read(tmp_path / "deflated")


def read_all(path: Path) -> None:
    for tensor in archives.read(path).tensors.values():
        tensor.read()


@pytest.mark.parametrize("container", ["torch", "safetensors"])
def test_a_file_cut_short_anywhere_is_refused(container: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    tensors = {"x": random(3, 4), "y": random(2)}
    if container == "torch":
        torch_files.write_state_dict(path, tensors)
    else:
        save_file(tensors, path)
    whole = path.read_bytes()
    read_all(path)
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=str(path)):
            read_all(path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")  # pickletools, of damaged texts
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_pickle_raises_nothing_but_the_users_error(data: st.DataObject, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    storages: list[np.ndarray] = []
    tensors = {"x": random(3, 4), "y": {"z": random(2)}}
    content = bytearray(b"\x80\x02" + ORDERED_DICT + torch_files.pickled(tensors, storages)[1:] + b".")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    torch_files.write_archive(path, bytes(content), storages, script=data.draw(st.booleans()))
    with contextlib.suppress(ValueError):  # nothing else may leave it
        read_all(path)
    assert "antigravity" not in sys.modules


def nested(depth: int) -> bytes:
    """{"a": {"a": ...}} with nothing inside."""
    return (b"}" + text("a")) * depth + b"}" + b"s" * depth


def doubled(depth: int) -> bytes:
    """A tuple that holds itself twice, again and again: 2 ** depth steps to hash."""
    return b")q\x01" + b"h\x01\x86q\x01" * depth


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"}" + doubled(60) + b"Ns.", "neither a name nor a number"),
        (b"}(" + doubled(60) + b"Nu.", "neither a name nor a number"),
        (b"}" + text("x") + b"(" + text("storage") + b"ctorch\nFloatStorage\n" + doubled(60)
         + text("cpu") + b"K\x01tQs.", "refers to something else than a storage"),
        (nested(3000) + b".", "more than 50 deep"),
    ],
    ids=["key", "keys", "storage", "depth"],
)  # fmt: skip
def test_a_pickle_that_would_never_end_is_refused_at_once(content: bytes, message: str, tmp_path: Path) -> None:
    torch_files.write_archive(tmp_path / "bomb.pt", b"\x80\x02" + content, [])
    with pytest.raises(ValueError, match=message):
        read_all(tmp_path / "bomb.pt")


def test_one_name_for_two_tensors_is_refused(tmp_path: Path) -> None:
    torch_files.write_state_dict(tmp_path / "twice.pt", {"a.b": random(2), "a": {"b": random(2)}})
    with pytest.raises(ValueError, match=r"of one name twice: a\.b"):
        read_all(tmp_path / "twice.pt")


def test_a_zip_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "later.pt"
    torch_files.write_state_dict(path, {"x": random(2)})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 6] = 200  # the version that is needed to extract
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or cut short"):
        read_all(path)


def test_a_stride_that_no_machine_can_hold_is_refused(tmp_path: Path) -> None:
    torch_files.write_state_dict(tmp_path / "far.pt", {"x": View(random(3), 0, (1,), (2**31 - 1,))})
    with pytest.raises(ValueError, match="beyond its storage"):
        read_all(tmp_path / "far.pt")
