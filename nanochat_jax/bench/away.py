"""Every kernel compiled for a card that is not here (see `kernels.card`): does it compile, does it fit?

At the sizes that `bench kernels` times on a GPU, by the tiles that `kernels.tuning` takes there. A kernel that
the compilers refuse, or that needs more shared memory than there is, is a problem; one that keeps values in
memory because registers ran out is marked. Nothing is run or timed.
"""

import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.bench import kernels, operations
from nanochat_jax.config import ConfigError
from nanochat_jax.kernels import card, ternary

Program = tuple[str, tuple[int, ...], Callable[[], tuple[Callable[..., Any], tuple]]]


def programs(small: bool = False) -> Iterator[Program]:
    """(operation, size, what makes the function and the shapes of its arguments).

    small: the sizes that the bench times on a CPU.
    """
    plan = kernels.CPU if small else kernels.GPU
    for outputs, inputs in plan.sizes:
        for rows in plan.rows:
            for dtype in (jnp.int8, jnp.bfloat16):
                if rows <= ternary.MAX_ROWS[jnp.dtype(dtype).name]:
                    name = f"ternary product, packed, {jnp.dtype(dtype).name}"
                    yield name, (rows, outputs, inputs), _ternary(rows, outputs, inputs, dtype)
    for operation in operations.OPERATIONS:
        if "pallas" in operation.impls[1]:
            for size in operation.sizes[1:2] if small else operation.sizes[2]:
                yield operation.name, size, _other(operation, size)


def _ternary(rows: int, outputs: int, inputs: int, dtype: Any) -> Callable[[], tuple]:
    def make() -> tuple:
        x = jax.ShapeDtypeStruct((rows, inputs), dtype)
        codes = jax.ShapeDtypeStruct((outputs, ternary.padded(inputs) // 4), jnp.uint8)
        return lambda x, codes: ternary.ternary_dot(x, codes, impl="pallas"), (x, codes)

    return make


def _other(operation: operations.Operation, size: tuple) -> Callable[[], tuple]:
    def make() -> tuple:
        with jax.ensure_compile_time_eval():
            arguments = operation.make(np.random.default_rng(0), size)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
        return lambda *given: operation.run("pallas", *given), shapes

    return make


def away(name: str, small: bool = False) -> dict[str, Any]:
    """Compile all `programs` for one card. JSON-able.

    Returns: rows of operation, size, "seconds", whether it "spills" registers to memory, bytes of "arguments",
    "outputs" and "temporary", and "problem", "" where there is none; "status" 1 if there is one.
    Raises: ConfigError for an unknown card, or where its compiler is not installed.
    """
    if name not in card.CARDS:
        raise ConfigError(f"--card must be one of {', '.join(card.CARDS)}, got '{name}'")
    if reason := card.missing():
        raise ConfigError(reason)
    made = [(operation, size, make()) for operation, size, make in programs(small)]
    rows = []
    with card.aimed(name) as devices:
        mesh = card.alone(devices)
        for operation, size, (function, shapes) in made:
            row: dict[str, Any] = {"operation": operation, "size": list(size), "problem": ""}
            began = time.perf_counter()
            try:
                compiled, row["spills"] = _compiled(function, shapes, mesh)
                analysis = compiled.memory_analysis()
                row |= {
                    "arguments": analysis.argument_size_in_bytes, "outputs": analysis.output_size_in_bytes,
                    "temporary": analysis.temp_size_in_bytes,
                }  # fmt: skip
            except Exception as error:  # whatever the compilers say is the answer
                refused = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
                row["problem"] = f"{type(refused).__name__}: {' '.join(str(refused).split())[:300]}"
            rows.append(row | {"seconds": round(time.perf_counter() - began, 2)})
    return {
        "card": card.CARDS[name].kind, "jax": jax.__version__, "jaxlib": metadata.version("jaxlib"),
        "note": "compiled, not run", "rows": rows, "status": int(any(row["problem"] for row in rows)),
    }  # fmt: skip


def _compiled(function: Callable[..., Any], shapes: tuple, mesh: Any) -> tuple[Any, bool]:
    """The program, and whether it spills registers."""
    try:
        return card.compiled(jax.jit(function), *shapes, mesh=mesh), False
    except jax.errors.JaxRuntimeError as error:
        if "spill" not in str(error):
            raise
    return card.compiled(jax.jit(function), *shapes, mesh=mesh, spills=True), True


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    rows = record["rows"]
    problems, spills = (sum(bool(row.get(key)) for row in rows) for key in ("problem", "spills"))
    lines = [
        f"{record['card']} (not here): {len(rows) - problems} of {len(rows)} kernels compile, {spills} of them spill "
        f"registers; none was run. jax {record['jax']}",
        f"{'operation':<36}{'size':<22}{'in':>9}{'out':>9}{'temporary':>11}  MiB",
    ]
    for row in rows:
        head = f"{row['operation']:<36}{' x '.join(map(str, row['size'])):<22}"
        if row["problem"]:
            lines.append(f"{head}  {row['problem']}")
        else:
            sizes = (row[key] / 2**20 for key in ("arguments", "outputs", "temporary"))
            lines.append(head + "{:>9.2f}{:>9.2f}{:>11.2f}".format(*sizes) + "  spills" * row["spills"])
    return "\n".join(lines)
