"""Reading tensors out of files: what comes back, and that nothing of a file is ever run."""

import collections
import contextlib
import io
import pickle
import subprocess
import sys
import tracemalloc
import types
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
def test_a_training_checkpoint_gives_all_its_tensors_by_dotted_names(key: str, tmp_path: Path) -> None:
    checkpoint = {"epoch": 3, "optimizer": {"moment": random(3)}, key: {"a": random(2)}, "best": None}
    torch_files.write_state_dict(tmp_path / "file", checkpoint)
    assert archives.read(tmp_path / "file").tensors.keys() == {"optimizer.moment", f"{key}.a"}


class _Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> object:
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_is_refused_and_nothing_of_it_runs(protocol: int, tmp_path: Path) -> None:
    evil = pickle.dumps({"x": _Evil(tmp_path / "ran")}, protocol)
    torch_files.write_archive(tmp_path / "file", evil, [])
    with pytest.raises(ValueError, match=r"data.pkl (needs \w*builtin\w*\.exec, .*refused|has opcode [A-Z_]+, which)"):
        archives.read(tmp_path / "file")
    assert not (tmp_path / "ran").exists()
    pickle.loads(evil)
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("script", [False, True])
def test_no_module_that_a_pickle_names_is_imported(script: bool, tmp_path: Path) -> None:
    sys.modules.pop("antigravity", None)
    torch_files.write_archive(tmp_path / "file", b"\x80\x02cantigravity\nfly\n)R.", [], script=script)
    with pytest.raises(ValueError, match=r"needs antigravity\.fly"):
        archives.read(tmp_path / "file")
    assert "antigravity" not in sys.modules


def test_a_pickled_module_is_refused_with_advice(tmp_path: Path) -> None:
    torch_files.write_archive(tmp_path / "file", b"\x80\x02c__torch__.model\nClip\n)\x81.", [])
    with pytest.raises(ValueError, match=r"needs __torch__.model.Clip.*save model.state_dict\(\)"):
        archives.read(tmp_path / "file")  # no TorchScript archive, so no class of one


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View(np.zeros(4, np.float32), 1, (2, 2), (2, 1)), "beyond its storage"),
        (View(np.zeros(4, np.float32), 0, (5,), (1,)), "beyond its storage"),
        (View(np.zeros(1, np.float32), 0, (1_000_000, 1_000_000), (0, 0)), "beyond its storage"),
        (View(np.zeros(4, np.float32), -1, (2,), (1,)), "impossible shape"),
        (View(np.zeros(4, np.float32), 3, (2,), (-1,)), "impossible shape"),
        (View(np.zeros(4, np.float32), 0, (2, 2), (1,)), "impossible shape"),
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
    with pytest.raises(ValueError, match=r"states 8 numbers of float32 in archive/data/0, which has 16 bytes"):
        archives.read(tmp_path / "short")
    torch_files.write_archive(tmp_path / "none", b"\x80\x02" + pickled + b".", [])
    with pytest.raises(ValueError, match=r"names a storage archive/data/0 that is missing"):
        archives.read(tmp_path / "none")


def test_a_dict_within_itself_is_refused(tmp_path: Path) -> None:
    torch_files.write_archive(tmp_path / "file", b"\x80\x02}q\x00" + text("a") + b"h\x00s.", [])
    with pytest.raises(ValueError, match="a within itself"):
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
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "torch before 1.6.*save it again"),
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


def nested(depth: int, key: str = "a") -> bytes:
    """{key: {key: ...}} with nothing inside."""
    return (b"}" + text(key)) * depth + b"}" + b"s" * depth


def doubled(depth: int) -> bytes:
    """A tuple that holds itself twice, again and again: 2 ** depth steps to hash or to print."""
    return b")q\x00" + b"".join(b"h%c\x86q%c" % (k, k + 1) for k in range(depth))


def storage(key: bytes, size: bytes) -> bytes:
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + key + text("cpu") + size + b"tQ"


def tensor(shape: bytes, strides: bytes) -> bytes:
    whole = storage(text("0"), b"K\x04") + b"K\x00" + shape + strides
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + whole + b"\x89" + ORDERED_DICT + b"tR"


def integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


WIDE = b"(" + b"K\x01" * 100_000 + b"tq\x00"
VECTOR = tensor(b"K\x04\x85", b"K\x01\x85") + b"q\x00"
COUNT = 20_000
ONE_HASH = b"".join(integer((2**61 - 1) * k) + b"N" for k in range(1, COUNT))
HOSTILE = {
    "key": (b"}" + doubled(40) + b"Ns", "neither a string nor a small integer"),
    "keys": (b"}(" + doubled(40) + b"Nu", "neither a string nor a small integer"),
    "wide key": (b"}" + WIDE + b"(" + b"h\x00" * 100_000 + b"tNs", "neither a string nor a small integer"),
    "returned key": (b"}ctorch\nSize\n" + doubled(40) + b"\x85RNs", "neither a string nor a small integer"),
    "keys of one hash": (b"}(" + ONE_HASH + b"u", "neither a string nor a small integer"),
    "storage's name": (b"}" + text("x") + storage(doubled(40), b"K\x04") + b"s", "is not a storage"),
    "storage's size": (b"}" + text("x") + storage(text("0"), doubled(40)) + b"s", "is not a storage"),
    "tuples": (b"}" + text("x") + b")" + b"\x85" * 1_000_000 + b"s", "nests objects more than 50 deep"),
    "calls": (b"}" + text("x") + b"ctorch\nSize\nq\x00" + b"h\x00" * 60 + b")" + b"\x85R" * 60 + b"s", "nests objects"),
    "dicts": (nested(3000), "nests dicts more than 50 deep"),
    "dicts without names": (nested(3000, ""), "nests dicts more than 50 deep"),
    "long names": (
        b"}" + text("x" * 300_000) + b"}(" + text("t") + VECTOR
        + b"".join(text(str(k)) + b"h\x00" for k in range(COUNT)) + b"us", "name of 300002 characters, more than 1000",
    ),
    "equal names": (
        b"}(" + text("t") + VECTOR + text("a") + b"}(" + b"".join(text(f"{k}.x") + b"h\x00" for k in range(COUNT))
        + b"u" + b"".join(text(f"a.{k}.x") + b"h\x00" for k in range(COUNT)) + b"u", "two tensors named a.0.x",
    ),
    "axes": (b"}" + text("x") + tensor(WIDE, b"h\x00") + b"s", "impossible shape"),
    "axes of no numbers": (
        b"}" + text("x") + tensor(b"K\x00" + integer(10**30) + b"\x86", b"K\x01K\x01\x86") + b"s", "impossible shape",
    ),
    "memo": (b"}r\xff\xff\xff\x0f", "has memo index 268435455 in place of 0"),
    "memo twice": (b"}q\x00)q\x00", "has memo index 0 in place of 1"),
    "memo ahead": (b"}" + text("x") + b"h\x00s", "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_at_once(name: str, tmp_path: Path) -> None:
    content, message = HOSTILE[name]
    torch_files.write_archive(tmp_path / "bomb.pt", b"\x80\x02" + content + b".", [np.zeros(4, np.float32)])
    with pytest.raises(ValueError, match=f"data.pkl .*{message}"):
        read_all(tmp_path / "bomb.pt")


def test_a_key_of_a_million_nested_tuples_does_not_crash_the_interpreter(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    torch_files.write_archive(path, b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.", [])
    script = f"from pathlib import Path; from rice_jax.weights import archives; archives.read(Path({str(path)!r}))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "nests objects more than 50 deep" in ended.stderr


STATE = b"".join(text(str(k)) + b"N" for k in range(300))
SAME_LIST = b"".join(text(str(k)) + b"ctorch.jit._pickle\nbuild_intlist\nh\x00\x85R" for k in range(1000))
SAME_STATE = b"".join(text(str(k)) + b"c__torch__\nX\n)\x81h\x00b" for k in range(1000))

LARGE = {
    "memo index": b"r\xff\xff\xff\x0f",
    "one list in many calls": text("x") + b"(" + b"N" * 5000 + b"tq\x00" + SAME_LIST,
    "one state of many objects": text("x") + b"}q\x00(" + STATE + b"u" + SAME_STATE,
    "many marks": text("x") + b"(" + b"N" * 5000 + b"(t" * 5000 + b"t",
    "nested lists": text("x") + b"](" * 5000 + b"e" * 5000,
}


@pytest.mark.parametrize("name", LARGE)
def test_a_pickle_takes_memory_of_its_own_size(name: str, tmp_path: Path) -> None:
    content = LARGE[name]
    torch_files.write_archive(tmp_path / "bomb.pt", b"\x80\x02}(" + content + b"u.", [], script=True)
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError):
            assert archives.read(tmp_path / "bomb.pt").tensors == {}
        assert tracemalloc.get_traced_memory()[1] < 1e6 + 100 * len(content)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"(ios\nsystem\n", b"(cos\nsystem\no", b"\x82\x01", b"\x83\x01\x01", b"\x84\x01\x01\x01\x01", b")})\x92",
        b"\x8b\x01\x00\x00\x00\x01", b"I1\n", b"L1L\n", b"F1\n", b"S'a'\n", b"Va\n", b"U\x01a", b"Pa\n", b"Np0\n",
        b"\x8d\x01\0\0\0\0\0\0\0a", b"\x8e\x01\0\0\0\0\0\0\0a", b"\x97", b"N2", b"N0", b"(1", b"(l", b"(d", b"g0\n",
    ],
)  # fmt: skip
def test_opcodes_that_torch_never_writes_are_refused(opcodes: bytes, tmp_path: Path) -> None:
    torch_files.write_archive(tmp_path / "file", b"\x80\x02}" + text("x") + opcodes + b"s.", [])
    with pytest.raises(ValueError, match=r"has opcode [A-Z0-9_]+, which no tensor needs"):
        archives.read(tmp_path / "file")


TARGETS = {
    "a function": b"ctorch\nSize\n",
    "the tensors' function": b"ctorch._utils\n_rebuild_tensor_v2\n",
    "a class": b"ccollections\nOrderedDict\n",
    "a class of TorchScript": b"c__torch__\nX\n",
    "an ordered dict": ORDERED_DICT,
    "settings": b"cargparse\nNamespace\n)\x81",
    "a class of settings": b"cargparse\nNamespace\n",
    "a tensor": VECTOR,
    "a storage": storage(text("0"), b"K\x04"),
}


@pytest.mark.parametrize("target", TARGETS)
def test_build_changes_nothing_that_outlives_the_pickle(target: str, tmp_path: Path) -> None:
    for attribute in ("__defaults__", "__setstate__", "shape", "stored", "items", "attributes"):
        state = b"}" + text(attribute) + b"K\x07\x85s"
        for change in (state, b"N" + state + b"\x86"):  # by __dict__ and by setattr
            content = b"\x80\x02}" + text("x") + TARGETS[target] + change + b"bs."
            torch_files.write_archive(tmp_path / "bad.pt", content, [np.zeros(4, np.float32)], script=True)
            with contextlib.suppress(ValueError):
                assert archives.read(tmp_path / "bad.pt").tensors == {}
    state_dict = {"y": np.arange(3, dtype=np.float32)}
    torch_files.write_state_dict(tmp_path / "good.pt", state_dict)
    torch_files.write_torchscript(tmp_path / "script.pt", state_dict)
    for name in ("good.pt", "script.pt"):
        assert archives.read(tmp_path / name).tensors["y"].read().tolist() == [0, 1, 2]
    unpickler = archives._Unpickler(b"", archives._TorchArchive(tmp_path / "good.pt"), script=True)
    for module, name in (("torch", "Size"), ("torch._utils", "_rebuild_tensor_v2")):
        function = unpickler.find_class(module, name)
        assert not vars(function) and function.__defaults__ is None


@pytest.mark.parametrize("protocol", range(2, 6))
def test_archives_of_every_protocol_since_2_are_read(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by torch.save(..., pickle_protocol=...): Python's own pickler, with stand-ins for torch's functions."""
    rebuild = lambda *arguments: arguments
    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    kind = type("FloatStorage", (), {"__module__": "torch"})
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(FloatStorage=kind))
    monkeypatch.setitem(sys.modules, "torch._utils", types.SimpleNamespace(_rebuild_tensor_v2=rebuild))
    storages: list[np.ndarray] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            if not isinstance(obj, np.ndarray):
                return None
            storages.append(obj)
            return "storage", kind, str(len(storages) - 1), "cpu", obj.size

        def reducer_override(self, obj: object) -> object:
            if not isinstance(obj, View):
                return NotImplemented
            return rebuild, (*obj, False, collections.OrderedDict())

    arrays = {f"block.{k}": random(k % 7 + 1) for k in range(300)}
    views = [View(array, 0, array.shape, (1,)) for array in arrays.values()]
    model = collections.OrderedDict(zip(arrays, views, strict=True))
    model._metadata = {"version": 1}
    file = io.BytesIO()
    Pickler(file, protocol).dump({"model": model, "epoch": 7, "lr": 1e-3, "seen": [2**40, None, (True, "x")]})
    torch_files.write_archive(tmp_path / "file", file.getvalue(), storages)
    tensors = archives.read(tmp_path / "file").tensors
    assert list(tensors) == [f"model.{name}" for name in arrays]
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[f"model.{name}"].read(), array)


def test_a_frame_that_ends_within_a_string_hides_no_opcodes(tmp_path: Path) -> None:
    """pickle.Unpickler alone drops the 5 bytes before the frame's end, and reads the next string's head for them."""
    hidden = (tensor(b"(K\x04t", b"(K\x01t").replace(b"\x89", b"N") + b"s.").ljust(257)
    framed = b"}X\x10\x00\x00\x00" + b"a" * 5
    content = framed + b"b" * 11 + b"X\x01\x01\x00\x00" + hidden + b"s."
    frame = b"\x80\x04\x95" + len(framed).to_bytes(8, "little")
    torch_files.write_archive(tmp_path / "file", frame + content, [np.zeros(4, np.float32)])
    assert archives.read(tmp_path / "file").tensors == {}


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
