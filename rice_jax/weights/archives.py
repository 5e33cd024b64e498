"""Reads the tensors of a file by name, without torch and without running anything that the file says.

safetensors files are read by the package of that name. A zip archive of `torch.save` or `torch.jit.save` holds the
bytes of each storage as an uncompressed entry, and a pickle that describes the tensors. `_checked` goes through the
opcodes of the pickle; `_Unpickler` then builds its objects, and knows only the functions and classes listed here.
It imports and makes none of them: each has a stand-in. A name that is not listed is refused, with the whole file.
"""

import functools
import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes  # noqa: F401 (NumPy knows "bfloat16" by it)
import numpy as np
from safetensors import SafetensorError, safe_open

FLOATS = ("float16", "bfloat16", "float32", "float64")
SAFETENSORS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"} | {
    f"{sign}{bits}": f"{'u' if sign == 'U' else ''}int{bits}" for sign in "IU" for bits in (8, 16, 32, 64)
}
STORAGES = {
    "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "FloatStorage": "float32", "DoubleStorage": "float64",
    "CharStorage": "int8", "ByteStorage": "uint8", "ShortStorage": "int16", "IntStorage": "int32",
    "LongStorage": "int64", "BoolStorage": "bool",
}  # fmt: skip
OPCODES = {  # all that torch.save and torch.jit.save write for tensors, numbers, texts, bytes and containers
    "PROTO", "FRAME", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "MARK", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST",
    "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET",
    "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "BINPERSID", "REDUCE", "NEWOBJ", "BUILD", "SHORT_BINBYTES", "BINBYTES",
    "BYTEARRAY8", "EMPTY_SET", "ADDITEMS", "FROZENSET",
}  # fmt: skip
# The cost of hashing what may be a key; a tuple costs as much as its parts. Those that cost something are rare as keys.
# Larger integers (LONG1), say, could all have the same hash, and building their dict take quadratic time.
COSTS = dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "NEWTRUE", "NEWFALSE"), 0)
COSTS |= dict.fromkeys(("NONE", "BINFLOAT", "LONG1", "SHORT_BINBYTES", "BINBYTES", "GLOBAL", "STACK_GLOBAL"), 1)
MAX_COST, MAX_COSTLY_KEYS = 20, 1000
# Opcodes that hash, and which of the objects that they take.
HASHED = {
    "SETITEM": slice(1, None, 2), "SETITEMS": slice(1, None, 2), "ADDITEMS": slice(1, None), "FROZENSET": slice(None)
}  # fmt: skip
MAX_NESTING = 50  # modules within modules are a tenth of that
MAX_NAME = 1000  # characters; a pickle can use one long key in many names, which would fill the memory
MAX_AXES = 8


class StoredTensor(NamedTuple):
    """A tensor that is still in its file. It is a tuple because BUILD cannot change a tuple."""

    shape: tuple[int, ...]
    dtype: str  # NumPy's name, or the file's own name for a type that NumPy lacks
    stored: Callable[[], np.ndarray]  # returns the numbers in the type of the file

    def read(self) -> np.ndarray:
        """Returns the numbers: FLOATS as float32, others as stored. Raises ValueError if a torch entry is damaged."""
        array = self.stored()
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite; the caller checks for that
            return np.asarray(array, np.float32) if self.dtype in FLOATS else array


class Archive(NamedTuple):
    tensors: dict[str, StoredTensor]
    container: str  # "safetensors", "torch.save" or "TorchScript"


def read(path: Path) -> Archive:
    """Returns the tensors of a file by name, none of them loaded yet, and the kind of container.

    Raises OSError (FileNotFoundError, for a folder IsADirectoryError) if the file cannot be opened, and ValueError if
    it is damaged or of another kind, or its pickle needs more than tensors and containers.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK"):
        return _TorchArchive(path).archive()
    if head[8:9] == b"{":
        return Archive(_safetensors(path), "safetensors")
    if head.startswith(b"\x80"):
        found, do = "a pickle of torch before 1.6, or of another program", "save it again with a newer torch"
    elif head.startswith(b"version https://git-lfs"):
        found, do = "a pointer of git-lfs in place of the file", "fetch it with `git lfs pull`"
    else:
        found, do = "neither safetensors nor a torch archive (or only a part of one)", "give a whole file of these"
    raise ValueError(f"{path}: found {found}, needs a file of weights; {do}.")


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        file = safe_open(path, framework="np")  # stays open as long as one of the tensors
        tensors = {}
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            part = file.get_slice(name)
            shape, dtype = tuple(part.get_shape()), SAFETENSORS.get(part.get_dtype(), part.get_dtype())
            tensors[name] = StoredTensor(shape, dtype, functools.partial(file.get_tensor, name))
        return tensors
    except SafetensorError as error:
        raise ValueError(f"{path}: is damaged or cut short ({error}); fetch it again.") from error


class _PickleError(ValueError):
    """Says what is wrong with a pickle; the file's name is added later."""


class _Storage(NamedTuple):
    entry: str
    dtype: str
    size: int  # numbers


class _TorchArchive:
    """A zip file of torch: `ROOT/data.pkl` names the tensors, the entries `ROOT/data/N` are their storages."""

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
            raise self.fault("is a zip file without torch's data.pkl", "give a file of torch.save or torch.jit.save")
        self.root = roots[0]
        self.checked: set[str] = set()
        order = self.entries.get(f"{self.root}byteorder")
        self.order: Literal["<", ">"] = ">" if order and self.entry(order.filename)[:3] == b"big" else "<"

    def fault(self, found: str, do: str) -> ValueError:
        return ValueError(f"{self.path}: {found}; {do}.")

    def archive(self) -> Archive:
        script, name = f"{self.root}constants.pkl" in self.entries, f"{self.root}data.pkl"
        content = bytes(self.entry(name))
        try:
            tensors = _named(_Unpickler(_checked(content), self, script=script).load())
        except _PickleError as error:
            raise ValueError(f"{self.path}: {name} {error}") from error
        except (pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise self.fault(f"{name} is damaged ({type(error).__name__}: {error})", "fetch it again") from error
        return Archive(tensors, "TorchScript" if script else "torch.save")

    def entry(self, name: str) -> memoryview:
        """Returns the bytes of an entry. Raises ValueError if it is compressed or damaged, or ends beyond the file."""
        info = self.entries[name]
        header = self.bytes[info.header_offset : info.header_offset + 30]
        if info.compress_type != zipfile.ZIP_STORED or len(header) < 30 or header[:4] != b"PK\3\4":
            raise self.fault(f"entry {name} is compressed or damaged, which torch never writes", "fetch it again")
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if begin + info.file_size > len(self.bytes):
            raise self.fault(f"entry {name} ends beyond the file", "fetch it again")
        return memoryview(self.bytes)[begin : begin + info.file_size]

    def storage(self, entry: str, dtype: str, size: int) -> _Storage:
        if entry not in self.entries:
            raise _PickleError(f"names a storage {entry} that is missing; fetch the file again.")
        found = self.entries[entry].file_size
        if not 0 <= size * np.dtype(dtype).itemsize <= found:
            raise _PickleError(f"states {size} numbers of {dtype} in {entry}, which has {found} bytes; fetch it again.")
        return _Storage(entry, dtype, size)

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
        """Returns an unread tensor. Strides count numbers. Raises _PickleError if impossible or beyond its storage."""
        whole = isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
        whole = whole and len(shape) == len(strides) <= MAX_AXES
        if not whole or not all(isinstance(x, int) and 0 <= x < 2**63 for x in (offset, *shape, *strides)):
            raise _PickleError("describes a tensor of an impossible shape; fetch the file again.")
        size = int(np.prod(shape, dtype=object)) if shape else 1
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        # More numbers than the storage has: strides of 0 repeat them. No checkpoint needs that, and it could fill the
        # memory. The stride of an axis of length 1 is not used, but NumPy must be able to hold it.
        beyond = last >= storage.size or size > storage.size or max(strides, default=0) > storage.size
        if size and beyond:
            raise _PickleError(f"describes a tensor {shape} beyond its storage {storage.entry}; fetch the file again.")
        return StoredTensor(shape, storage.dtype, lambda: self.view(storage, offset, shape, strides))

    def view(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
        content = self.entry(storage.entry)
        if storage.entry not in self.checked:
            if zlib.crc32(content) != self.entries[storage.entry].CRC:
                raise self.fault(f"entry {storage.entry} has another checksum than the archive says", "fetch it again")
            self.checked.add(storage.entry)
        dtype = np.dtype(storage.dtype).newbyteorder(self.order)
        numbers = np.frombuffer(content, dtype, storage.size)[offset:]
        if not int(np.prod(shape)):
            return np.zeros(shape, dtype)
        bytes_apart = tuple(stride * dtype.itemsize for stride in strides)
        return np.lib.stride_tricks.as_strided(numbers, shape, bytes_apart, writeable=False)


class _Part(NamedTuple):
    """What `_checked` knows of an object."""

    nesting: int  # 1 more than the largest of its parts; 0 for numbers and texts
    cost: float  # of hashing it; infinite: not a key


SIMPLE = {name: _Part(0, cost) for name, cost in COSTS.items()}


def _checked(content: bytes) -> bytes:
    """Returns a pickle that is safe for pickle.Unpickler: the same one, with the lengths of its frames set to 0.

    pickle.Unpickler alone allocates a memo up to the largest index, and hashing nested tuples can overflow the stack of
    the interpreter or take for ever. This function keeps a stack like pickle.Unpickler's, with a _Part for each object.
    Raises _PickleError for opcodes, memo indexes, dict keys or nesting that no checkpoint needs, and ValueError or
    IndexError for bytes that are no pickle.
    """
    unframed = bytearray(content)
    stack, marks, memo, costly = list[_Part](), list[int](), list[_Part](), 0
    argument: Any
    position: Any  # an int, as the pickle is bytes
    for opcode, argument, position in pickletools.genops(content):
        name, taken = opcode.name, opcode.stack_before
        if name not in OPCODES:
            raise _PickleError(f"has opcode {name}, which no tensor needs; save model.state_dict() with torch.save.")
        if name == "FRAME":
            # pickle.Unpickler loses bytes where an argument crosses the end of a frame, and so sees other opcodes.
            unframed[position + 1 : position + 9] = bytes(8)
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            if argument not in (None, len(memo)):
                raise _PickleError(f"has memo index {argument} in place of {len(memo)}; fetch the file again.")
            memo.append(stack[-1])
        else:
            marked = pickletools.markobject in taken
            start = marks.pop() - taken.index(pickletools.markobject) if marked else len(stack) - len(taken)
            parts = stack[start:]
            del stack[start:]
            hashed = [part.cost for part in parts[HASHED[name]] if part.cost] if name in HASHED else []
            costly += len(hashed)
            if max(hashed, default=0) > MAX_COST or costly > MAX_COSTLY_KEYS:
                many = f"more than {MAX_COSTLY_KEYS} keys that are" if costly > MAX_COSTLY_KEYS else "a key that is"
                raise _PickleError(f"has {many} neither a string nor a small integer; save model.state_dict().")
            nesting = 1 + max((part.nesting for part in parts), default=0)
            if nesting > MAX_NESTING:
                raise _PickleError(f"nests objects more than {MAX_NESTING} deep; save model.state_dict().")
            if name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):
                stack.append(parts[0])  # the container or object that these were added to
            elif "TUPLE" in name:
                stack.append(_Part(nesting, 1 + sum(1 + part.cost for part in parts)))
            elif name == "REDUCE":  # a stand-in, or one of the arguments
                stack.append(_Part(nesting, parts[1].cost))
            else:
                stack += [SIMPLE.get(name) or _Part(nesting, math.inf)] * len(opcode.stack_after)
    return bytes(unframed)


class _Inert:
    """Takes the place of an object without tensors: it takes whatever the pickle gives it, and keeps nothing."""

    __slots__ = ()

    def __init__(self, *_: object) -> None:
        """Drops the arguments."""

    def __setstate__(self, state: object) -> None:
        """Drops what BUILD gives."""

    def __setitem__(self, key: object, value: object) -> None:
        """Drops what SETITEMS gives."""

    def append(self, item: object) -> None:
        """Drops what APPEND gives."""

    def extend(self, items: object) -> None:
        """Drops what APPENDS gives."""


class _Dict(dict[Any, Any]):
    """Takes the place of a dict of a class of its own."""

    def __init__(self, *_: object) -> None:
        """Makes an empty dict, without pairs: SETITEMS adds them, and the keys of its pairs have been looked at."""

    def __setstate__(self, state: object) -> None:
        """Drops attributes, such as torch's _metadata."""


def _names(module: str, names: str) -> set[str]:
    return {f"{module}.{name}" for name in names.split()}


_BUILTINS = "set frozenset list tuple int float str bool bytes bytearray slice range complex object type"
_NUMPY_TYPES = "bool bool_ " + " ".join(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_NUMPY_TYPES += " float16 float32 float64 longdouble complex64 complex128 str_ bytes_ dtype ndarray"
_TORCH_TYPES = "float16 half bfloat16 float32 float float64 double uint8 int8 int16 short int32 int int64 long bool"
_TORCH_TYPES += " uint16 uint32 uint64 complex32 complex64 complex128 float8_e4m3fn float8_e5m2 device"
_PATHS = "Path PurePath PosixPath PurePosixPath WindowsPath PureWindowsPath"
_OMEGACONF_NODES = "AnyNode StringNode IntegerNode FloatNode BooleanNode BytesNode PathNode EnumNode"

INERT = {  # settings, counters, paths and numbers, which training programs save beside the tensors
    *_names("builtins", _BUILTINS), *_names("__builtin__", f"{_BUILTINS} unicode long xrange"),
    *_names("argparse", "Namespace"), *_names("types", "SimpleNamespace"), *_names("typing", "Any"),
    *_names("collections", "Counter deque"), *_names("pathlib", _PATHS), *_names("pathlib._local", _PATHS),
    *_names("datetime", "datetime date time timedelta timezone"), *_names("decimal", "Decimal"),
    *_names("fractions", "Fraction"), *_names("uuid", "UUID SafeUUID"),
    *_names("numpy", _NUMPY_TYPES), *_names("torch", _TORCH_TYPES),
    *_names("numpy.core.multiarray", "scalar _reconstruct"), *_names("numpy._core.multiarray", "scalar _reconstruct"),
    *_names("numpy.core.numeric", "_frombuffer"), *_names("numpy._core.numeric", "_frombuffer"),
    *_names("omegaconf.dictconfig", "DictConfig"), *_names("omegaconf.listconfig", "ListConfig"),
    *_names("omegaconf.base", "Metadata ContainerMetadata"), *_names("omegaconf.nodes", _OMEGACONF_NODES),
    *_names("ml_collections.config_dict.config_dict", "ConfigDict FrozenConfigDict FieldReference"),
}  # fmt: skip
DICTS = {  # classes that are dicts: their items may be tensors
    *_names("collections", "OrderedDict defaultdict"), *_names("builtins", "dict"), *_names("__builtin__", "dict"),
    *_names("easydict", "EasyDict"), *_names("addict.addict", "Dict"), *_names("yacs.config", "CfgNode"),
    *_names("munch", "Munch"), *_names("pytorch_lightning.utilities.parsing", "AttributeDict"),
    *_names("lightning_fabric.utilities.data", "AttributeDict"),
    *_names("lightning.fabric.utilities.data", "AttributeDict"),
}  # fmt: skip
STAND_INS: dict[str, type] = dict.fromkeys(INERT, _Inert) | dict.fromkeys(DICTS, _Dict)
FIRST_ARGUMENT = {  # functions that only give their first argument a type; of the last one it is a text with the bytes
    "torch.Size", "torch._utils._rebuild_parameter", "torch.jit._pickle.restore_type_tag",
    *_names("torch.jit._pickle", "build_intlist build_doublelist build_boollist build_tensorlist"),
    "_codecs.encode",
}  # fmt: skip


class _Object:
    attributes: object = None

    def __setstate__(self, state: object) -> None:
        self.attributes = state  # no copy: a pickle can give one large dict to many objects


class _Unpickler(pickle.Unpickler):
    """Builds the objects of a pickle that `_checked` has passed. Imports nothing."""

    def __init__(self, content: bytes, archive: _TorchArchive, *, script: bool) -> None:
        super().__init__(io.BytesIO(content))
        self.archive, self.script = archive, script

    def find_class(self, module: str, name: str) -> Any:
        """Returns a dtype's name or a stand-in (new, as BUILD can change it). Raises _PickleError for other names."""
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if self.script and module.split(".")[0] == "__torch__":
            return _Object
        found = f"{module}.{name}"
        if found in STAND_INS:
            return STAND_INS[found]
        if found == "torch._utils._rebuild_tensor_v2":
            return lambda *arguments: self.archive.tensor(*arguments)
        if found in FIRST_ARGUMENT:
            return lambda value, *_: value
        raise _PickleError(
            f"needs {found}, which is no part of a tensor: refused, and nothing was run. Ask the author of the file to "
            "save model.state_dict()."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid
        if kind != "storage" or dtype not in STORAGES.values() or not isinstance(key, str) or not isinstance(size, int):
            raise _PickleError("refers to an object that is not a storage; save model.state_dict().")
        return self.archive.storage(f"{self.archive.root}data/{key}", dtype, size)


def _named(root: Any) -> dict[str, StoredTensor]:
    """Returns the tensors in nested dicts and lists by dotted name.

    What occurs again is passed over: it is the same model under a second name. Raises _PickleError for a root that is
    neither a dict nor has tensors, cycles, and double or too long names.
    """
    tensors, seen, around = dict[str, StoredTensor](), set[int](), set[int]()

    def visit(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, StoredTensor):
            name = ".".join(path)
            if len(name) > MAX_NAME:
                raise _PickleError(f"has a name of {len(name)} characters, more than {MAX_NAME}; fetch the file again.")
            if name in tensors:
                raise _PickleError(f"has two tensors named {name}; save model.state_dict().")
            tensors[name] = value
            return
        inside = value.attributes if isinstance(value, _Object) else value
        if not isinstance(inside, dict | list | tuple) or not inside:
            return
        if id(inside) in around:
            raise _PickleError(f"has {'.'.join(path) or 'its root'} within itself; fetch the file again.")
        if id(inside) in seen:
            return
        if len(path) > MAX_NESTING:
            raise _PickleError(f"nests dicts more than {MAX_NESTING} deep; save model.state_dict().")
        seen.add(id(inside))
        around.add(id(inside))
        for place, key in enumerate(inside):
            below = inside[key] if isinstance(inside, dict) else key
            has_name = isinstance(inside, dict) and isinstance(key, str | int | float | None)
            visit(below, (*path, str(key if has_name else place)))
        around.remove(id(inside))

    visit(root, ())
    if tensors.keys() <= {""} and not isinstance(root, dict | _Object):
        raise _PickleError(f"holds a {type(root).__name__}, needs a dict of tensors; save model.state_dict().")
    return tensors
