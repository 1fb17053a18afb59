"""Tile sizes of the ternary kernels: constants, overridden by a table that `bench kernels` writes.

The table (tuned.json) has one entry per device kind, dtype of activations, size of the matrix and
bucket of rows; it is read once per process. No entry is shipped before it was measured.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from nanochat_jax import files
from nanochat_jax.kernels import dispatch

TABLE = Path(__file__).with_name("tuned.json")
BUCKETS = (1, 4, 16, 64, 256)  # greatest number of rows of each bucket but the last
SHARED = 99 * 1024  # bytes of memory that a program may share, on the smallest card of today
PROGRAMS = 256  # programs that keep a large card busy, about two for each multiprocessor


class Blocks(NamedTuple):
    """How a product is cut. form: "gemv" (at most 2 rows of int8, one scale) or "gemm"; bm, bn: rows and
    outputs of a tile, powers of two, at least 16; of a gemv, bm: words of 16 codes of an output in a step;
    split_k: parts of the inputs."""

    form: str
    bm: int
    bn: int
    split_k: int
    num_warps: int
    num_stages: int


def bucket(rows: int) -> str:
    """Name of the bucket of a number of rows: "1", "2-4", "5-16", "17-64", "65-256" or ">256"."""
    low = 1
    for high in BUCKETS:
        if rows <= high:
            return str(high) if low == high else f"{low}-{high}"
        low = high + 1
    return f">{BUCKETS[-1]}"


def key(device_kind: str, dtype: Any, rows: int, outputs: int, inputs: int) -> str:
    """Key of the table."""
    return f"ternary|{device_kind}|{jnp.dtype(dtype).name}|{outputs}|{inputs}|{bucket(rows)}"


@functools.cache
def table(path: Path = TABLE) -> dict[str, dict[str, Any]]:
    """The whole table; empty if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def entry(dtype: Any, rows: int, outputs: int, inputs: int) -> dict[str, Any] | None:
    """What was measured for this product on the default device, or None."""
    kind = dispatch.devices()[0].device_kind
    return table().get(key(kind, dtype, rows, outputs, inputs))


def blocks(dtype: Any, rows: int, outputs: int, inputs: int, grouped: bool = False) -> Blocks:
    """Tile sizes from the table, else constants. grouped: weights have scales of groups, which were not measured."""
    found = None if grouped else entry(dtype, rows, outputs, inputs)
    if found is None or "blocks" not in found:
        return constants(dtype, rows, outputs, inputs, grouped)
    return Blocks(**found["blocks"])


def constants(dtype: Any, rows: int, outputs: int, inputs: int, grouped: bool = False) -> Blocks:
    """Tile sizes from arithmetic: enough programs to fill a device, tiles that fit its registers and memory.

    Not yet measured on a GPU.
    """
    if rows <= 2 and dtype == jnp.int8 and not grouped:
        form, bm, bn, tiles, warps = "gemv", 64, 16, outputs // 16, 4
    else:
        bm = 16 if rows <= 16 else 32 if rows <= 32 else 64
        form, bn = "gemm", 128 if rows > 64 or outputs >= 8192 else 64
        tiles = -(-rows // bm) * (outputs // bn)
        warps = 8 if bm == 64 and grouped else 4  # with four, sums and scales do not fit into registers
    split = 1
    while split < 8 and tiles * split < PROGRAMS and split * 2 <= inputs // 256:
        split *= 2
    return Blocks(form, bm, bn, split, warps, _stages(dtype, bm, bn))


def _stages(dtype: Any, bm: int, bn: int) -> int:
    """Steps whose operands are on their way at once, as many as SHARED holds, 2 to 4."""
    step = 256 * bm * jnp.dtype(dtype).itemsize + 64 * bn
    return max(2, min(4, SHARED // step))


def candidates(dtype: Any, rows: int) -> list[Blocks]:
    """The tile sizes that a search tries: at most 40."""
    gemv = [
        Blocks("gemv", bm, bn, s, w, 1)
        for bm in (32, 64) for bn in (16, 32) for s in (1, 4) for w in (2, 4)
        if rows <= 2 and dtype == jnp.int8
    ]  # fmt: skip
    gemm = [
        Blocks("gemm", bm, bn, s, w, stages)
        for bm, warps in (((16, (4,)),) if rows <= 16 else ((64, (4, 8)),)) for w in warps
        for bn in (32, 64, 128) for s in (1, 2, 4)
        for stages in sorted({2, _stages(dtype, bm, bn)})
    ]  # fmt: skip
    return gemv + gemm


def write(entries: dict[str, dict[str, Any]], path: Path = TABLE) -> None:
    """Add entries to the table on disk, replacing those of the same key."""
    merged = {**table.__wrapped__(path), **entries}
    files.write_json(path, dict(sorted(merged.items())))
    table.cache_clear()
