"""Parses the text of a compiled program (HLO): which collectives it runs, how often, and how many bytes they move.

XLA's text is no stable format. This file reads what jax 0.10 and 0.12 print for CPU and TPU.
"""

import collections
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
ARRAY_TYPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
TRIP_COUNT = re.compile(r'known_trip_count\D*"?n"?\D*(\d+)')


class ArrayType(NamedTuple):
    """An array in the type of an instruction."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(self.shape) * bits // 8


class Collective(NamedTuple):
    """An instruction that exchanges arrays between devices, as one device runs it."""

    kind: str
    name: str
    results: tuple[ArrayType, ...]  # on this device
    group_size: int | None  # devices that take part; None: the text does not say
    trip_counts: tuple[int | None, ...]  # of the loops around it, outermost first; None: known only at run time

    @property
    def bytes(self) -> int:
        """Bytes of the whole arrays in one run: the operands of a reduce-scatter, the results of any other kind."""
        parts = (self.group_size or 1) if self.kind == "reduce-scatter" else 1
        return parts * sum(array.bytes for array in self.results)

    @property
    def runs(self) -> int:
        """The number of times that the program runs it. A loop of unknown length counts as one run."""
        return math.prod(count or 1 for count in self.trip_counts)

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends in one run if arrays are passed on in rings; an unknown group counts as one."""
        n = self.group_size or 1
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return share * self.bytes


class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    rest: str  # operands and attributes


def parse_computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of each computation, and the entry's name. Raises ValueError if there is no entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", None
    for line in text.splitlines():
        if header := HEADER.match(line):
            body = computations.setdefault(header["name"], [])
            entry = header["name"] if header["entry"] else entry
        elif body is not None and (match := INSTRUCTION.match(line)):
            body.append(Instruction(match["name"], match["type"], match["op"], match["rest"]))
    if not entry:
        raise ValueError("found no ENTRY in the text of a compiled program, needs XLA's; compile with another jax.")
    return computations, entry


def collectives(text: str) -> list[Collective]:
    """Returns every collective of a compiled program (`jax.stages.Compiled.as_text()`), in the order of the text.

    The TPU compiler may put one collective into several fusions; it is returned once. A collective of a single device
    is left out, because it moves nothing. Raises ValueError if the text has no entry computation.
    """
    computations, entry = parse_computations(text)
    in_fusions: set[tuple[str, ...]] = set()

    def walk(name: str, trip_counts: tuple[int | None, ...]) -> Iterator[Collective]:
        for instruction in computations.get(name, []):
            if instruction.op.endswith(("-done", "-update")):
                continue  # the second half of one that is counted as -start
            kind, rest = instruction.op.removesuffix("-start"), instruction.rest
            if kind in KINDS:
                group_size = parse_group_size(rest)
                if group_size == 1:
                    continue
                channel = re.search(r"channel_id=(\d+)", rest)
                if "async_collective" in name and channel:
                    if (key := (kind, instruction.type, channel[1])) in in_fusions:
                        continue
                    in_fusions.add(key)
                yield Collective(kind, instruction.name, parse_results(instruction, kind), group_size, trip_counts)
            elif instruction.op == "while":
                if body := re.search(r"\bbody=%?([\w.-]+)", rest):
                    yield from walk(body[1], (*trip_counts, parse_trip_count(instruction, computations)))
            else:
                branches = re.findall(r"[\w.-]+", ",".join(BRANCHES.findall(rest)))
                for callee in [*CALLED.findall(rest), *branches]:
                    yield from walk(callee, trip_counts)

    return list(walk(entry, ()))


def parse_results(instruction: Instruction, kind: str) -> tuple[ArrayType, ...]:
    """Returns the results of a collective, without the operands that the type of an asynchronous start lists first."""
    arrays = tuple(
        ArrayType(dtype, tuple(map(int, filter(None, sides.split(",")))))
        for dtype, sides in ARRAY_TYPE.findall(instruction.type)
    )
    if instruction.op.endswith("-start") and kind != "all-reduce":
        arrays = tuple(array for array in arrays if array != ArrayType("u32", ()))  # its state, no data
        return arrays[len(arrays) // 2 :]
    return arrays


def parse_group_size(rest: str) -> int | None:
    """Returns how many devices exchange arrays with one another (in the first group), None if the text does not say."""
    # The forms are {{0,1},{2,3}}, [2,2]<=[4], mesh['a'=2,'b'=2] {'b'}, and pairs of source and target.
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


def parse_trip_count(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """Returns how often a loop runs: the compiler's figure, or the limit of `counter < constant`; None if neither."""
    if known := TRIP_COUNT.search(loop.rest):
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.-]+)", loop.rest)
    inside = computations.get(condition[1], []) if condition else []
    numbers = {i.name: int(i.rest.split(")")[0]) for i in inside if i.op == "constant" and re.match(r"\d+\)", i.rest)}
    if not inside or inside[-1].op != "compare" or "direction=LT" not in inside[-1].rest:
        return None
    return numbers.get(inside[-1].rest.split(")")[0].split(",")[-1].split()[-1].lstrip("%"))


def bytes_by_kind(collectives: Iterable[Collective]) -> dict[str, int]:
    """Returns {kind: bytes that it moves in one run of the program}, the largest first."""
    total: collections.Counter[str] = collections.Counter()
    for one in collectives:
        total[one.kind] += one.bytes * one.runs
    return dict(total.most_common())
