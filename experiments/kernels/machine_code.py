"""Instructions that a kernel spends on an element, read off the machine code made for a card that is not here.

    python experiments/kernels/machine_code.py --card=h200 --nvdisasm=<path> > machine_code_h200.json

Needs the extra `card`, `pip install cramjam`, and nvdisasm and cuobjdump, which CUDA's toolkit and the wheel of
Triton have. Nothing runs: the counts are those of the loop's body, or of the whole kernel where it has no loop,
over the elements (of a product of packed weights: weights) that a thread treats in it, so branches count as
taken once. A card's ALU pipe takes half of the instructions that it can issue: integer and logical ones, shifts,
comparisons, conversions; multiplications and additions of floats, and integer multiplications, go to others.

How the machine code is found: XLA's serialized executable is a file of records (Riegeli, compressed with Snappy)
within such a file; the programs in it are ELF files. That is no stable format (jaxlib 0.11.2).
"""

import argparse
import collections
import datetime
import json
import math
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cramjam
import jax
import ml_dtypes  # noqa: F401 - the name bfloat16
import numpy as np

from nanochat_jax.bench import away
from nanochat_jax.kernels import card, tuning

BLOCK, BLOCK_HEADER = 1 << 16, 24
SIGNATURE = b"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f"  # how a file of records begins
ALU = ("LOP3", "SHF", "SHL", "SHR", "IADD3", "VIADD", "PRMT", "IDP", "ISETP", "SEL", "FSETP", "FSEL", "FMNMX",
       "FMNMX3", "IMNMX", "VIMNMX", "VIMNMX3", "LEA", "I2F", "I2FP", "F2I", "FRND", "POPC", "BFE", "ICMP", "F2F",
       "F2FP", "MUFU")  # fmt: skip


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def records(data: bytes) -> Iterator[bytes]:
    """Records of the first file of records in `data`."""
    file = data[data.index(SIGNATURE) :]
    file = b"".join(file[i + BLOCK_HEADER : i + BLOCK] for i in range(0, len(file), BLOCK))
    at = 0
    while at + 40 <= len(file):
        size, _, kind = struct.unpack_from("<QQQ", file, at + 8)
        chunk, at = file[at + 40 : at + 40 + size], at + 40 + size
        if kind & 255 != ord("r"):
            continue
        compression, (length, start) = chunk[0], _varint(chunk, 1)

        def plain(part: bytes, compression: int = compression) -> bytes:
            if not compression:
                return part
            if compression != ord("s"):
                raise ValueError(f"records compressed by {chr(compression)!r} instead of Snappy")
            return bytes(cramjam.snappy.decompress_raw(part[_varint(part, 0)[1] :]))

        sizes, values = plain(chunk[start : start + length]), plain(chunk[start + length :])
        i = j = 0
        while i < len(sizes):
            size, i = _varint(sizes, i)
            yield values[j : j + size]
            j += size


def programs(compiled: jax.stages.Compiled) -> Iterator[bytes]:
    """The ELF files of a compiled program."""
    left = [compiled.runtime_executable().serialize()]
    while left:
        data = left.pop()
        if SIGNATURE in data:
            left += records(data)
            continue
        at = -1
        while (at := data.find(b"\x7fELF", at + 1)) >= 0:
            tables = [struct.unpack_from("<Q", data, at + o)[0] for o in (0x20, 0x28)]
            counts = [struct.unpack_from("<HH", data, at + o) for o in (0x36, 0x3A)]
            yield data[at : at + max(t + size * n for t, (size, n) in zip(tables, counts, strict=True))]


def read(program: bytes, nvdisasm: Path) -> dict | None:
    """None of a program that is constants only; else name, registers, spilled bytes, number of instructions, and each
    loop's, by kind."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program)
        file.flush()
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage = run(str(nvdisasm.with_name("cuobjdump")), "-res-usage", file.name)
        code = run(str(nvdisasm), "-c", file.name)
    found = re.search(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        return None
    lines, labels = [], {}
    for line in map(str.strip, code.splitlines()):
        if line.startswith(".L_x"):
            labels[line.split(":")[0]] = len(lines)
        elif re.match(r"/\*[0-9a-f]{4,}\*/", line) and "NOP" not in line:
            lines.append(re.sub(r"^/\*\w+\*/\s+(@!?U?P\w+\s+)?", "", line))
    loops = []
    for i, line in enumerate(lines):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if target and labels.get(target[1], i) < i:
            loops.append(_kinds(lines[labels[target[1]] : i + 1]))
    return {
        "name": found[1], "registers": int(found[2]), "stack": int(found[3]), "instructions": len(lines),
        "kinds": _kinds(lines), "loops": loops,
    }  # fmt: skip


def _kinds(lines: list[str]) -> dict[str, int]:
    return dict(collections.Counter(re.split(r"[.\s;]", line)[0] for line in lines).most_common())


def elements(operation: str, size: tuple[int, ...], text: str) -> float:
    """Of the tensor (weights, of a product of packed weights) that a thread treats in a loop's body, or in all.

    text: of the compiled program, in which the call of the kernel names its grid and its warps.
    """
    grid = [int(re.search(rf"grid_{axis} = (\d+)", text)[1]) for axis in "xyz"]
    threads = 32 * int(re.search(r"num_warps = (\d+)", text)[1])
    if not operation.startswith("ternary"):
        return math.prod(size) / (math.prod(grid) * threads)
    rows, outputs, inputs = size
    dtype = np.dtype(operation.rpartition(" ")[2])
    blocks = tuning.constants(dtype, rows, outputs, inputs)
    assert grid[1] == outputs // blocks.bn, "other tiles than expected"
    return blocks.bn * (blocks.bm * 16 if blocks.form == "gemv" else 256) / threads


def counted(kinds: dict[str, int], of: float) -> dict[str, float]:
    """Instructions an element, in all and on the ALU pipe."""
    alu = sum(count for kind, count in kinds.items() if kind in ALU)
    return {"each": round(sum(kinds.values()) / of, 2), "alu": round(alu / of, 2)}


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("--card", default="h200")
    flags.add_argument("--nvdisasm", type=Path, default=Path("nvdisasm"))
    flags = flags.parse_args()
    made = [(operation, size, make()) for operation, size, make in away.programs()]
    rows = []
    with card.aimed(flags.card) as devices:
        for operation, size, (function, shapes) in made:
            compiled = card.compiled(jax.jit(function), *shapes, mesh=card.alone(devices), spills=True)
            for kernel in (read(program, flags.nvdisasm) for program in programs(compiled)):
                if kernel is None or not kernel["name"].startswith("_"):  # or XLA's own
                    continue
                body = max(kernel["loops"], key=lambda kinds: sum(kinds.values()), default=kernel["kinds"])
                row = {
                    "operation": operation, "size": list(size), "registers": kernel["registers"],
                    "spilled_bytes": kernel["stack"], "body": body,
                }  # fmt: skip
                if "product" not in operation or operation.startswith("ternary"):
                    row |= counted(body, elements(operation, size, compiled.as_text()))
                rows.append(row)
    record = {
        "date": datetime.date.today().isoformat(),
        "card": flags.card,
        "jax": jax.__version__,
        "rows": rows,
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
