"""Bytes that devices exchange in one run of a compiled program, read off its HLO text.

Each device of a group of n sends, for a result of so many bytes on each device, by the ring algorithms that
are optimal in bytes:

    all-reduce 2 (n-1)/n result      all-gather (n-1)/n result      reduce-scatter (n-1) result
    all-to-all (n-1)/n result        collective-permute result

A loop counts as often as the compiler knows it to turn. What stands in a loop of unknown length (GaLore's
refresh of a subspace) or in a branch is not part of every step, and is counted apart, once.
"""

import collections
import math
import re
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
Bytes = dict[str, float]  # kind -> bytes that one device sends
BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b(pred|token|opaque|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")


def exchanged(hlo: str, devices: int) -> tuple[Bytes, Bytes]:
    """Bytes sent by each device, by kind: (in every step, beyond it where a refresh or branch runs).

    Args: hlo: text of an optimized module. devices: that it runs on, the size of a group that is not stated.
    Raises: ValueError for a module without an entry.
    """
    bodies, entry = _computations(hlo)
    if entry not in bodies:
        raise ValueError("no ENTRY computation in the HLO text")
    always: Bytes = collections.defaultdict(float)
    sometimes: Bytes = collections.defaultdict(float)

    def walk(name: str, times: float, sure: bool) -> None:
        for shape, op, rest in bodies[name]:
            kind = op.removesuffix("-start")
            if kind in KINDS:
                into = always if sure else sometimes
                into[kind] += times * sent(kind, _result(shape, op), group_size(rest, devices))
            turns = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
            for inner in _called(op, rest):
                if inner in bodies:
                    known = sure and op != "conditional" and (op != "while" or turns is not None)
                    walk(inner, times * (int(turns[1]) if op == "while" and turns else 1), known)

    walk(entry, 1, True)
    return dict(always), dict(sometimes)


def sent(kind: str, result: float, n: int) -> float:
    """Bytes that each of n devices sends in one collective with a result of so many bytes."""
    if kind == "reduce-scatter":
        return (n - 1) * result
    return result * {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)


def shape_bytes(shape: str) -> int:
    """Bytes of the HLO type `f32[4,8]{1,0}`, or of all elements of a tuple of them."""
    total = 0
    for name, dims in _SHAPE.findall(shape):
        found = re.search(r"\d+", name)
        bits = BITS[name] if name in BITS else int(found[0]) if found else 0
        total += math.ceil(bits * math.prod(int(d) for d in dims.split(",") if d) / 8)
    return total


def group_size(rest: str, devices: int) -> int:
    """Devices that take part together, from replica_groups in one of its three notations."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    return devices


def _result(shape: str, op: str) -> int:
    """Bytes of the result; the tuple of an asynchronous start holds the operand as well."""
    total = shape_bytes(shape)
    if op == "all-gather-start" or op == "collective-permute-start":
        halves = re.match(r"\(\s*(\([^()]*\)|[^(),]*\[[^\]]*\][^,]*),", shape)
        return total - shape_bytes(halves[1]) if halves and op == "all-gather-start" else total // 2
    return total


def _called(op: str, rest: str) -> Iterator[str]:
    """Computations that an instruction runs; the adders of collectives are none."""
    if op == "while":
        yield from re.findall(r"body=%?([\w.\-]+)", rest)
    elif op == "conditional":
        for listed in re.findall(r"branch_computations=\{([^}]*)\}", rest):
            yield from re.findall(r"%?([\w.\-]+)", listed)
        yield from re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)
    elif op in ("call", "fusion", "async-start"):
        yield from re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", rest)


def _computations(hlo: str) -> tuple[dict[str, list[tuple[str, str, str]]], str]:
    """Instructions (type, opcode, what follows) of every computation, and the entry's name."""
    bodies: dict[str, list[tuple[str, str, str]]] = {}
    name, entry = "", ""
    for line in hlo.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            name = head[2]
            bodies[name], entry = [], name if head[1] else entry
        elif name and (found := _LINE.match(re.sub(r"/\*.*?\*/", "", line))):
            bodies[name].append((found[2], found[3], found[4]))
    return bodies, entry
