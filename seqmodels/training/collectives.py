"""What the devices of a mesh send each other in a compiled program, read from its HLO: kind, axes, bytes, times.

Bytes are those that one device must receive, of an array of b bytes over n devices: b (n - 1) / n of an all-gather, a
reduce-scatter and an all-to-all, twice that of an all-reduce, and b of a permutation. A collective in a loop counts as
often as the loop runs.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

_INSTRUCTION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SCATTER = "all-reduce-scatter"  # name of a fusion, which is how TPU writes a reduce-scatter
_FUSED = re.compile(rf"= (.*?) fusion\(.*calls=%?({_SCATTER}[\w.\-]*)")
_CHAIN = re.compile(r"channel_id=(\d+).*chain_id=")  # TPU: one that starts, goes on and ends in several fusions
_ARRAY = re.compile(r"\b([a-z]+)(\d*)(?:e\dm\d\w*)?\[([\d,]*)\]")
_OTHERS = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


class Collective(NamedTuple):
    """One instruction.

    Attributes:
        kind: of KINDS. axes: of the mesh that it goes over, with "+" between them.
        arrays: what it returns, such as "bf16[8,128]". op: the operation of the program that it comes from.
        bytes: received by a device, each time. times: that a step executes it.
        devices: of the first group that exchanges something.
    """

    kind: str
    axes: str
    arrays: str
    op: str
    bytes: float
    times: int
    devices: tuple[int, ...] = ()

    @property
    def moved(self) -> float:
        """Bytes that a device receives in a step."""
        return self.bytes * self.times


def collectives(hlo: str, mesh: Mesh | AbstractMesh) -> list[Collective]:
    """All collectives of a program over devices of `mesh`; `hlo` is the text of the compiled module."""
    bodies, entry = _computations(hlo)
    times = _times(bodies, entry)
    found, begun = [], set[str]()
    for name, lines in bodies.items():
        for line in lines if times[name] and not name.startswith(_SCATTER) else ():
            if (chain := _CHAIN.search(line)) and chain[1] in begun:
                continue
            if parsed := _parse(line, bodies, mesh):
                begun |= {chain[1]} if chain else set()
                kind, arrays, received, groups = parsed
                op = re.search(r'op_name="([^"]*)"', line)
                axes = _axes(groups, mesh)
                found.append(
                    Collective(kind, axes, arrays, op[1] if op else "", received, times[name], tuple(groups[0]))
                )
    return [each for each in found if each.axes]  # of a single device each: nothing is sent


def by_axis(found: Iterable[Collective]) -> dict[str, dict[str, tuple[int, int]]]:
    """For the axes and kind of each collective: how often a step executes such, and what a device receives."""
    count, moved = defaultdict[str, Counter[str]](Counter), defaultdict[str, Counter[str]](Counter)
    for each in found:
        count[each.axes][each.kind] += each.times
        moved[each.axes][each.kind] += round(each.moved)
    return {axes: {kind: (n, moved[axes][kind]) for kind, n in kinds.items()} for axes, kinds in count.items()}


def _parse(line: str, bodies: dict[str, list[str]], mesh: Mesh | AbstractMesh):
    """Kind, arrays, bytes and groups of devices of a line of HLO; None if it is no collective."""
    if match := _INSTRUCTION.search(line):
        arrays, kind, start = match.groups()
    elif match := _FUSED.search(line):
        arrays, kind, start = match[1], "reduce-scatter", None
        line = next((inner for inner in bodies.get(match[2], []) if " all-reduce(" in inner), line)
    else:
        return None
    groups = _groups(line, mesh.size)
    n, total = len(groups[0]), float(_bytes(arrays))
    if kind == "collective-permute":
        return kind, arrays, total / 2 if start else total, groups  # a start returns its input, too
    if kind == "reduce-scatter":
        total *= n / (n + 1) if start else n  # what goes in
    elif kind == "all-gather" and start:
        total *= n / (n + 1)
    elif start and arrays.startswith("(("):  # a start returns its inputs, too
        total /= 2
    factor = 2 if kind == "all-reduce" else 1
    return kind, arrays, factor * total * (n - 1) / n, groups


def _bytes(arrays: str) -> int:
    """Bytes of all arrays in the text of an HLO type."""
    total = 0
    for kind, bits, shape in _ARRAY.findall(arrays):
        size = math.prod(int(axis) for axis in shape.split(",") if axis)
        total += size * (1 if kind == "pred" else max(int(bits or 0) // 8, 1))
    return total


def _groups(line: str, devices: int) -> list[list[int]]:
    """Groups of devices that exchange something, or pairs that send; all of the three ways in which HLO writes them."""
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return _iota(match[2], match[3]).reshape(_numbers(match[1])).tolist()
    if match := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", line):
        return [_numbers(pair) for pair in re.findall(r"\{(\d+,\d+)\}", match[1])]
    named = r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
    if match := re.search(named, line):
        return _named(*match.groups())
    return [list(range(devices))]


def _named(mesh: str, order: str | None, turn: str | None, used: str) -> list[list[int]]:
    """Groups along named axes of a mesh, of which a part may be used: `'a':(2)4` is 4 devices behind the first 2."""
    sizes = [(axis, int(size)) for axis, size in re.findall(r"'([^']+)'=(\d+)", mesh)]
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used)
    ids = _iota(order, turn) if order else np.arange(math.prod(size for _, size in sizes))
    shape, inside = [], []
    for axis, size in sizes:
        before = 1
        for start, count in sorted((int(p or 1), int(c or size)) for name, p, c in parts if name == axis):
            shape += [start // before, count]
            inside += [False, True]
            before = start * count
        shape.append(size // before)
        inside.append(False)
    places = sorted(range(len(shape)), key=lambda i: inside[i])  # stable: the axes outside of a group come first
    count = math.prod(size for size, within in zip(shape, inside, strict=True) if within)
    return ids.reshape(shape).transpose(places).reshape(-1, count).tolist()


def _iota(shape: str, turn: str | None) -> np.ndarray:
    """Devices in the order `[shape]T(turn)`."""
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(turn)) if turn else ids


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _axes(groups: list[list[int]], mesh: Mesh | AbstractMesh) -> str:
    """Axes along which the devices of a group differ; "" where each group is one device."""
    places = np.stack(np.unravel_index(np.arange(mesh.size), tuple(mesh.shape.values())), 1)
    differ = np.zeros(places.shape[1], bool)
    for group in groups:
        differ |= (places[group] != places[group[0]]).any(0)
    return "+".join(axis for axis, there in zip(mesh.shape, differ, strict=True) if there)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation of a module, and the name of the first to run."""
    bodies, name, entry = dict[str, list[str]](), None, ""
    for line in hlo.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            name = match[2]
            bodies[name] = []
            entry = name if match[1] else entry
        elif line.startswith("}"):
            name = None
        elif name is not None:
            bodies[name].append(line)
    return bodies, entry


def _times(bodies: dict[str, list[str]], entry: str) -> Counter[str]:
    """How often each computation runs. Of a condition each branch counts, as if all were taken."""
    times = Counter[str]()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in bodies.get(name, []):
            for callee, trips in _calls(line, bodies):
                visit(callee, count * trips)

    visit(entry, 1)
    return times


def _calls(line: str, bodies: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """Computations that a line runs, and how often."""
    if " while(" in line:
        body = re.search(r"body=%?([\w.\-]+)", line)
        if body:
            yield body[1], _trips(line, bodies)
        return
    callees = _OTHERS.findall(line)
    if branches := re.search(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
        callees += re.findall(r"[\w.\-]+", branches[1])
    for callee in callees:
        if callee in bodies:
            yield callee, 1


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop runs: what the compiler knows, or else the bound in its condition."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    body = bodies.get(condition[1], []) if condition else []
    return max((int(n) for inner in body for n in re.findall(r" constant\((\d+)\)", inner)), default=1)
