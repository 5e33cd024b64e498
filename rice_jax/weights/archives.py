"""Tensors of a file by their names, without torch and without running anything that the file says.

    tensors = read("rice_final.pth")
    tensors["transformer.logit_scale"].read()

Two kinds of file: safetensors, by its package; and torch's zip archives, of which `torch.save` and `torch.jit.save`
both write the tensors' bytes as stored entries and their names as a pickle. That pickle is read here by an interpreter
of its opcodes that knows numbers, texts, tuples, lists, dicts and tensors, and nothing else.
"""

import dataclasses
import functools
import mmap
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

FLOATS = ("float16", "bfloat16", "float32", "float64")
SAFETENSORS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"} | {
    f"{sign}{bits}": f"{'u' if sign == 'U' else ''}int{bits}" for sign in "IU" for bits in (8, 16, 32, 64)
}
STORAGES = {
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is still in its file.

    Attributes:
      shape: its axes.
      dtype: NumPy's name of what is stored, or the file's where NumPy has none.
      stored: reads the numbers as they are stored.
    """

    shape: tuple[int, ...]
    dtype: str
    stored: Callable[[], np.ndarray]

    def read(self) -> np.ndarray:
        """The numbers; those of any floating type as float32."""
        array = self.stored()
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which whoever reads must check
            return np.asarray(array, np.float32) if self.dtype in FLOATS else array


class Archive(NamedTuple):
    tensors: dict[str, Tensor]
    container: str  # "safetensors", "torch.save" or "TorchScript"


def read(path: Path) -> Archive:
    """The tensors of a file, none of them loaded yet.

    Raises:
      ValueError: a damaged file, another kind of file, or a pickle that asks for more than tensors.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK"):
        return _TorchArchive(path).archive()
    if head[8:9] == b"{":
        return Archive(_safetensors(path), "safetensors")
    if head.startswith(b"\x80"):
        found, do = "a pickle of torch before 1.6, or of another program", "save it anew with a newer torch"
    elif head.startswith(b"version https://git-lfs"):
        found, do = "a pointer of git-lfs in place of the file", "fetch it with `git lfs pull`"
    else:
        found, do = "neither safetensors nor a torch archive (or only a part of one)", "give one of these, whole"
    raise ValueError(f"{path}: found {found}, needs a file of weights; {do}.")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        file = safe_open(path, framework="np")  # closed with the last tensor that refers to it
        tensors = {}
        for name in file.keys():  # noqa: SIM118 (no mapping)
            part = file.get_slice(name)
            dtype = part.get_dtype()
            tensors[name] = Tensor(
                tuple(part.get_shape()), SAFETENSORS.get(dtype, dtype), functools.partial(file.get_tensor, name)
            )
        return tensors
    except SafetensorError as error:
        raise ValueError(f"{path}: is damaged or cut short ({error}); fetch it again.") from error


class _Object(dict[str, Any]):
    """An object of a TorchScript archive: its attributes."""


class _Class(NamedTuple):
    """A class of a TorchScript archive."""

    name: str


class _Storage(NamedTuple):
    """The bytes of an entry as numbers."""

    entry: str
    dtype: str
    size: int  # numbers


DEEPEST = 50  # dots in a tensor's name; modules within modules are a tenth of that


class _PickleError(ValueError):
    """What is wrong with a pickle, without the file's name."""


class _TorchArchive:
    """A zip file of torch: `ROOT/data.pkl` names the tensors, `ROOT/data/N` are their storages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as file:
                self.entries = {info.filename: info for info in file.infolist()}
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
            raise self.fault(f"is damaged or cut short ({error})", "fetch it again") from error
        with path.open("rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        roots = [name.removesuffix("data.pkl") for name in self.entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise self.fault("is a zip file without torch's data.pkl", "give what torch.save or torch.jit.save wrote")
        self.root = roots[0]
        self.checked: set[str] = set()
        order = self.entries.get(f"{self.root}byteorder")
        self.order = ">" if order and self.entry(order.filename)[:3] == b"big" else "<"

    def fault(self, found: str, do: str) -> ValueError:
        return ValueError(f"{self.path}: {found}; {do}.")

    def archive(self) -> Archive:
        script = f"{self.root}constants.pkl" in self.entries
        pickle = f"{self.root}data.pkl"
        content = bytes(self.entry(pickle))
        try:
            found = _Pickle(self, script=script).run(content)
            # What a training loop saves holds the weights beside the optimiser's state.
            for key in ("model", "state_dict"):
                if not script and isinstance(found.get(key), dict):
                    found = found[key]
            named = list(_tensors(found, "", set()))
            tensors = dict(named)
            if len(tensors) < len(named):
                twice = sorted({name for name, _ in named if [other for other, _ in named].count(name) > 1})
                raise _PickleError(f"holds tensors of one name twice: {', '.join(twice)}; save model.state_dict().")
        except _PickleError as error:
            raise ValueError(f"{self.path}: {pickle} {error}") from error
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, struct.error) as error:
            raise self.fault(f"{pickle} is damaged ({type(error).__name__}: {error})", "fetch it again") from error
        return Archive(tensors, "TorchScript" if script else "torch.save")

    def entry(self, name: str) -> memoryview:
        """The bytes of a stored entry."""
        info = self.entries[name]
        header = self.bytes[info.header_offset : info.header_offset + 30]
        if info.compress_type != zipfile.ZIP_STORED or len(header) < 30 or header[:4] != b"PK\3\4":
            raise self.fault(f"entry {name} is compressed or damaged, which torch never writes", "fetch it again")
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if begin + info.file_size > len(self.bytes):
            raise self.fault(f"entry {name} ends beyond the file", "fetch it again")
        return memoryview(self.bytes)[begin : begin + info.file_size]

    def storage(self, entry: str, dtype: str, size: Any) -> _Storage:
        if entry not in self.entries:
            raise _PickleError(f"names a storage {entry} that is missing; fetch the file again.")
        found = self.entries[entry].file_size
        if not isinstance(size, int) or not 0 <= size * _dtype(dtype).itemsize <= found:
            raise _PickleError(f"says {size} numbers of {dtype} for {entry}, which has {found} bytes; fetch it again.")
        return _Storage(entry, dtype, size)

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
        """torch._utils._rebuild_tensor_v2, with its bounds checked; strides count numbers."""
        whole = isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
        numbers = (offset, *shape, *strides) if whole else ()
        if not whole or len(shape) != len(strides) or any(not isinstance(x, int) or x < 0 for x in numbers):
            raise _PickleError("describes a tensor of no possible shape; fetch the file again.")
        size = int(np.prod(shape, dtype=object)) if shape else 1
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        # More numbers than are stored: an expanded tensor, which no model has and which could ask for any memory.
        # A stride of an axis of length 1 moves nowhere, but is still a number that NumPy must hold.
        beyond = last >= storage.size or size > storage.size or max(strides, default=0) > storage.size
        if size and (beyond or len(shape) > 8):
            raise _PickleError(f"describes a tensor {shape} beyond its storage {storage.entry}; fetch the file again.")
        return Tensor(shape, storage.dtype, lambda: self.view(storage, offset, shape, strides))

    def view(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
        content = self.entry(storage.entry)
        if storage.entry not in self.checked:
            if zlib.crc32(content) != self.entries[storage.entry].CRC:
                raise self.fault(f"entry {storage.entry} has another checksum than the archive says", "fetch it again")
            self.checked.add(storage.entry)
        dtype = _dtype(storage.dtype)
        if self.order == ">":
            dtype = dtype.newbyteorder(">")
        numbers = np.frombuffer(content, dtype, storage.size)[offset:]
        if not int(np.prod(shape)):
            return np.zeros(shape, dtype)
        return np.lib.stride_tricks.as_strided(
            numbers, shape, tuple(s * dtype.itemsize for s in strides), writeable=False
        )


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _tensors(node: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors below a dict, by their dotted names; what is neither is passed over, as a state dict does."""
    if id(node) in seen:
        raise _PickleError(f"holds {name or 'its root'} twice or within itself; fetch the file again.")
    if name.count(".") > DEEPEST:
        raise _PickleError(f"holds dicts within dicts, more than {DEEPEST} deep; save model.state_dict().")
    seen.add(id(node))
    for key, value in node.items():
        path = f"{name}.{key}" if name else str(key)
        if isinstance(value, Tensor):
            yield path, value
        elif isinstance(value, dict) and value:
            yield from _tensors(value, path, seen)


def _keys(pairs: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """The pairs, whose keys are names or numbers: to hash tuples of tuples can take for ever."""
    if not all(isinstance(key, (str, int)) for key, _ in pairs):
        raise _PickleError("has a key that is neither a name nor a number; save model.state_dict().")
    return pairs


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    return dict(_keys(list(pairs)))


def _first(value: Any, *_: Any) -> Any:
    return value


FUNCTIONS: dict[str, Callable[..., Any]] = {  # by the names that a pickle may call; none of theirs is imported
    "collections OrderedDict": _ordered_dict,
    "torch Size": tuple,
    "torch._utils _rebuild_parameter": _first,
    "torch.jit._pickle restore_type_tag": _first,
    **{f"torch.jit._pickle build_{kind}list": list for kind in ("int", "double", "bool", "tensor")},
}
_MARK = object()


class _Pickle:
    """The opcodes that torch writes; pickletools takes them apart and checks that none is cut short."""

    def __init__(self, archive: _TorchArchive, *, script: bool) -> None:
        self.archive = archive
        self.script = script
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, pickle: bytes) -> Any:
        """The dict that the pickle describes. ValueError says what it has instead."""
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name == "STOP":
                break
            self.step(opcode.name, argument)
        found = self.stack.pop()
        if not isinstance(found, dict):
            raise _PickleError(f"holds a {type(found).__name__}, needs a dict of tensors; save model.state_dict().")
        return found

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "MARK":
                stack.append(_MARK)
            case "TUPLE":
                stack.append(tuple(self.since_mark()))
            case "APPEND":
                value = stack.pop()
                self.top(list).append(value)
            case "APPENDS":
                values = self.since_mark()
                self.top(list).extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.top(dict).update(_keys([(key, value)]))
            case "SETITEMS":
                pairs = self.since_mark()
                self.top(dict).update(_keys(list(zip(pairs[::2], pairs[1::2], strict=True))))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(self.known(argument))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self.known(f"{module} {name}"))
            case "BINPERSID":
                kind, storage, key, _, size = stack.pop()
                names = isinstance(kind, str) and isinstance(storage, str) and isinstance(key, str)
                if not names or kind != "storage" or storage not in STORAGES.values():
                    raise _PickleError("refers to something else than a storage; save model.state_dict().")
                stack.append(self.archive.storage(f"{self.archive.root}data/{key}", storage, size))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(function(*arguments))
            case "NEWOBJ":
                arguments, kind = stack.pop(), stack.pop()
                if not isinstance(kind, _Class) or arguments:
                    raise _PickleError("makes an object of no TorchScript class; save model.state_dict().")
                stack.append(_Object())
            case "BUILD":
                state, target = stack.pop(), self.top(dict)
                if isinstance(target, _Object):  # else an OrderedDict's own attributes, torch's _metadata
                    target.update(state)
            case _:
                raise _PickleError(f"holds {opcode}, which no tensor needs; save model.state_dict() with torch.save.")

    def since_mark(self) -> list[Any]:
        place = len(self.stack) - 1 - self.stack[::-1].index(_MARK)
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise TypeError
        return self.stack[-1]

    def known(self, name: str) -> Any:
        """What a global's name stands for here. ValueError names any other; nothing is ever imported."""
        if name == "torch._utils _rebuild_tensor_v2":
            return self.archive.tensor
        if name in FUNCTIONS:
            return FUNCTIONS[name]
        module, _, rest = name.partition(" ")
        if module in ("torch", "torch.storage") and rest in STORAGES:
            return STORAGES[rest]
        if self.script and module.split(".")[0] == "__torch__":
            return _Class(name)
        raise _PickleError(
            f"calls for {name.replace(' ', '.')}, which is no tensor: refused, and nothing of it was run. Have whoever "
            "made the file save model.state_dict()."
        )
