"""Reading a compiled program: what crosses devices, how many bytes, how often, in which loop.

XLA's text is no stable format; what is read here is what jax 0.10 and 0.12 print for CPU and TPU.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.*?) (?P<op>[a-z][a-z0-9-]*)\((?P<rest>.*)$")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
TRIPS = re.compile(r'known_trip_count\D*"?n"?\D*(\d+)')


class Piece(NamedTuple):
    """One array of an instruction."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(self.shape) * bits // 8


class Loop(NamedTuple):
    name: str
    trips: int | None  # None: known only when it runs


class Collective(NamedTuple):
    """An exchange between devices, as one of them sees it."""

    kind: str
    name: str
    pieces: tuple[Piece, ...]  # what it leaves on a device
    group: int | None  # devices that take part; None: not said
    loops: tuple[Loop, ...]  # that it stands in, outermost first

    @property
    def bytes(self) -> int:
        """Of the whole arrays, once: before a reduce-scatter, after anything else."""
        whole = (self.group or 1) if self.kind == "reduce-scatter" else 1
        return whole * sum(piece.bytes for piece in self.pieces)

    @property
    def times(self) -> int:
        """How often a program runs it; a loop of unknown length counts once."""
        return math.prod(loop.trips or 1 for loop in self.loops)

    @property
    def sent(self) -> float:
        """Bytes that a device sends, once, if the devices pass the arrays on in rings."""
        n = self.group or 1
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return share * self.bytes


class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    rest: str  # operands and attributes


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of every computation, and the name of the one that the program starts with."""
    found: dict[str, list[Instruction]] = {}
    entry, body = "", None
    for line in text.splitlines():
        if header := HEADER.match(line):
            body = found.setdefault(header["name"], [])
            entry = header["name"] if header["entry"] else entry
        elif body is not None and (match := INSTRUCTION.match(line)):
            body.append(Instruction(match["name"], match["type"], match["op"], match["rest"]))
    if not entry:
        raise ValueError("found no ENTRY in the text of a compiled program, needs XLA's; compile with another jax.")
    return found, entry


def collectives(text: str) -> list[Collective]:
    """Every exchange of a compiled program (`jax.stages.Compiled.as_text()`), in the order of the text.

    An exchange that the TPU compiler spreads over several fusions, to hide it behind them, is one.
    """
    known, entry = computations(text)
    spread: set[tuple[str, ...]] = set()

    def walk(name: str, loops: tuple[Loop, ...]) -> Iterator[Collective]:
        for at in known.get(name, []):
            if at.op.endswith(("-done", "-update")):
                continue  # the second half of what was met as -start
            kind = at.op.removesuffix("-start")
            if kind in KINDS:
                group = group_size(at.rest)
                if group == 1:
                    continue  # with itself: nothing moves
                channel = re.search(r"channel_id=(\d+)", at.rest)
                if "async_collective" in name and channel:
                    if (key := (kind, at.type, channel[1])) in spread:
                        continue
                    spread.add(key)
                yield Collective(kind, at.name, left_by(at, kind), group, loops)
            elif at.op == "while":
                body = re.search(r"\bbody=%?([\w.-]+)", at.rest)
                if body:
                    yield from walk(body[1], (*loops, Loop(at.name, trip_count(at, known))))
            else:
                for callee in [*CALLED.findall(at.rest), *branches(at.rest)]:
                    yield from walk(callee, loops)

    return list(walk(entry, ()))


def branches(rest: str) -> list[str]:
    return [name.strip().lstrip("%") for names in BRANCHES.findall(rest) for name in names.split(",")]


def left_by(at: Instruction, kind: str) -> tuple[Piece, ...]:
    """The arrays that a collective leaves. What starts one that ends elsewhere also lists its operands, first."""
    found = tuple(
        Piece(dtype, tuple(map(int, filter(None, sides.split(","))))) for dtype, sides in ARRAY.findall(at.type)
    )
    if at.op.endswith("-start") and kind != "all-reduce":
        found = tuple(piece for piece in found if piece != Piece("u32", ()))  # its state, no data
        return found[len(found) // 2 :]
    return found


def group_size(rest: str) -> int | None:
    """Devices that exchange with one another: of {{0,1},{2,3}}, of [2,2]<=[4], or of mesh['a'=2,'b'=2] {'b'}."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(counted[1])
    if named := re.search(r"replica_groups=(?:@\w+|mesh)\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'?([\w.]+)'?=(\d+)", named[1])}
        return math.prod(sizes.get(axis, 1) for axis in re.findall(r"[\w.]+", named[2]))
    if pairs := re.search(r"source_target_pairs=\{\{(.*?)\}\}", rest):
        return len({number for pair in pairs[1].split("},{") for number in pair.split(",")})
    return None


def trip_count(at: Instruction, known: dict[str, list[Instruction]]) -> int | None:
    """How often a loop runs: said by the compiler, or read off `counter < constant`, counting from 0 by 1."""
    if said := TRIPS.search(at.rest):
        return int(said[1])
    condition = re.search(r"\bcondition=%?([\w.-]+)", at.rest)
    inside = known.get(condition[1], []) if condition else []
    numbers = {i.name: int(i.rest.split(")")[0]) for i in inside if i.op == "constant" and re.match(r"\d+\)", i.rest)}
    if inside and inside[-1].op == "compare" and "direction=LT" in inside[-1].rest:
        limit = inside[-1].rest.split(")")[0].split(",")[-1].split()[-1].lstrip("%")
        return numbers.get(limit)
    return None


def bytes_by_kind(exchanges: Iterable[Collective]) -> dict[str, int]:
    """Bytes a device and run of the program, largest kind first."""
    total: dict[str, int] = {}
    for one in exchanges:
        total[one.kind] = total.get(one.kind, 0) + one.bytes * one.times
    return dict(sorted(total.items(), key=lambda item: -item[1]))
