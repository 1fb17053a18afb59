"""Tile sizes of the ternary kernels: constants, overridden by a table that `bench kernels` writes.

The table (tuned.json) has one entry per device kind, dtype of activations, size of the matrix and
bucket of rows; it is read once per process. No entry is shipped before it was measured.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanochat_jax import files

TABLE = Path(__file__).with_name("tuned.json")
BUCKETS = (1, 4, 16, 64, 256)  # greatest number of rows of each bucket but the last
PROGRAMS = 264  # programs that keep the largest card of today (132 multiprocessors) busy


class Blocks(NamedTuple):
    """How a product is cut. form: "gemv" (at most 16 rows) or "gemm"; bm, bn: rows and outputs of a
    tile, powers of two, at least 16 (bm is unused by a gemv); split_k: parts of the inputs."""

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
    kind = jax.devices()[0].device_kind
    return table().get(key(kind, dtype, rows, outputs, inputs))


def blocks(dtype: Any, rows: int, outputs: int, inputs: int) -> Blocks:
    """Tile sizes from the table, else constants."""
    found = entry(dtype, rows, outputs, inputs)
    if found is None or "blocks" not in found:
        return constants(dtype, rows, outputs, inputs)
    return Blocks(**found["blocks"])


def constants(dtype: Any, rows: int, outputs: int, inputs: int) -> Blocks:
    """Tile sizes from arithmetic: enough programs to fill a device, tiles that fit its registers.

    Not yet measured on a GPU.
    """
    if rows <= 4 or (rows <= 16 and dtype == jnp.float32):
        form, bm, bn, warps = "gemv", 16, 16, 4
    else:
        bm = next((m for m in (16, 32, 64) if rows <= m), 128)
        form, bn, warps = "gemm", 32 if bm <= 32 else 64, 4
    tiles = max(1, -(-rows // bm) * (outputs // bn))
    split = 1
    while split < 8 and tiles * split < PROGRAMS and split * 2 <= inputs // 256:
        split *= 2
    return Blocks(form, bm, bn, split, warps, 4)


def candidates(dtype: Any, rows: int) -> list[Blocks]:
    """The tile sizes that a search tries: at most 40."""
    gemv = [
        Blocks("gemv", 16, bn, s, w, 4)
        for bn in (16, 32) for s in (1, 4, 8) for w in (2, 4)
        if rows <= 16
    ]  # fmt: skip
    gemm = [
        Blocks("gemm", bm, bn, s, w, stages)
        for bm in ((16,) if rows <= 16 else (64, 128)) for bn in (32, 64) for s in (1, 4)
        for w in (4, 8) for stages in (3, 4)
        if dtype != jnp.float32
    ]  # fmt: skip
    return gemv + gemm


def write(entries: dict[str, dict[str, Any]], path: Path = TABLE) -> None:
    """Add entries to the table on disk, replacing those of the same key."""
    merged = {**table.__wrapped__(path), **entries}
    files.write_json(path, dict(sorted(merged.items())))
    table.cache_clear()
