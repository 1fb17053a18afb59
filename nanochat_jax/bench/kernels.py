"""The packed ternary product against the bfloat16 product of the same sizes: right first, then how fast.
The other kernels are in `operations`.

Protocol: every implementation must give the exact integers of fresh random inputs before anything is
timed. A timed call multiplies with `copies` different weights, which together exceed four times the
largest cache, in one program; calls of all implementations take turns after a warm-up, and the median
counts, divided by `copies`. Weights are random, for zeros run faster. Bandwidth is that of a copy
measured in the same session; the data sheet's is not used.

On a CPU the kernel itself only runs in interpret mode, which says nothing about speed: there it is
checked for correctness, the plain XLA form is timed, and the record says "not measured on GPU".
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.bench import operations
from nanochat_jax.config import ConfigError
from nanochat_jax.kernels import dispatch, ternary, ternary_pallas, tuning
from nanochat_jax.quant import pack


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured: (outputs, inputs) x rows; megabytes: of all copies of a bfloat16 weight."""

    sizes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    megabytes: int
    repeats: int


GPU = Plan(((4096, 4096), (14336, 4096), (4096, 14336)), (1, 4, 16, 64, 128, 512), 512, 20)
CPU = Plan(((512, 512), (1024, 1024)), (1, 16, 128), 8, 10)
CHECKED = ((1, 64, 512), (3, 48, 300), (16, 64, 1024), (70, 128, 768))  # rows, outputs, inputs


def inputs_of(rows: int, outputs: int, inputs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random (q int8 [rows, inputs], t int8 [outputs, inputs])."""
    rng = np.random.default_rng(seed)
    q = rng.integers(-127, 128, (rows, inputs)).astype(np.int8)
    return q, rng.integers(-1, 2, (outputs, inputs)).astype(np.int8)


def check(impl: str, seed: int) -> int:
    """Compare with NumPy's integers. Returns the number of cases. Raises: ValueError naming a wrong one."""
    cases = 0
    for rows, outputs, inputs in CHECKED:
        q, t = inputs_of(rows, outputs, inputs, seed)
        exact = q.astype(np.int64) @ t.T.astype(np.int64)
        codes = ternary.pack(jnp.asarray(t))
        for dtype in (jnp.int8, jnp.bfloat16):  # integers up to 127 are exact in bfloat16
            y = jax.jit(lambda x, c: ternary.ternary_dot(x, c, impl=impl))(jnp.asarray(q, dtype), codes)
            if not np.array_equal(np.asarray(y, np.float64), exact):
                raise ValueError(
                    f"{impl}: wrong product of {rows} x {inputs} with {outputs} outputs, {dtype}"
                )
            cases += 1
    return cases


def median_ms(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each program; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        for _ in range(2):
            jax.block_until_ready(program())
    for _ in range(repeats):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program())
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(each) for name, each in times.items()}


def bandwidth(megabytes: int, repeats: int) -> float:
    """GB/s of a copy that reads and writes `megabytes` each."""
    x = jnp.ones((megabytes * 250_000,), jnp.float32)
    run = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / 1e6 / median_ms({"copy": lambda: run(x)}, repeats)["copy"]


def _many(product: Callable, x: jax.Array, weights: list) -> Callable[[], Any]:
    """One program that multiplies x with every weight."""
    run = jax.jit(lambda x, ws: [product(x, w) for w in ws])
    return lambda: run(x, weights)


def measure(outputs: int, inputs: int, rows: int, plan: Plan, gbps: float) -> dict[str, Any]:
    """Microseconds of one product by each implementation, ratios, and the share of the bandwidth."""
    copies = max(1, min(64, plan.megabytes * 10**6 // (2 * outputs * inputs)))
    rng = np.random.default_rng(outputs + rows)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), jnp.bfloat16)
    trits = [jnp.asarray(rng.integers(-1, 2, (inputs, outputs)), jnp.int8) for _ in range(copies)]
    packed = [pack.pack(t, jnp.ones((1, 1))) for t in trits]
    dense = [t.astype(jnp.bfloat16) for t in trits]
    impls = ("reference", "pallas") if dispatch.backend() == "gpu" else ("reference",)
    programs = {"bfloat16": _many(lambda x, w: jnp.dot(x, w), x, dense)}
    for impl in impls:
        leaves = [w.replace(impl=impl) for w in packed]
        programs[f"w2a8 {impl}"] = _many(lambda x, w: pack.matmul(x, w, "int8"), x, leaves)
        programs[f"w2a16 {impl}"] = _many(lambda x, w: pack.matmul(x, w, "full"), x, leaves)
    us = {name: 1e3 * ms / copies for name, ms in median_ms(programs, plan.repeats).items()}
    moved = packed[0].codes.nbytes + x.nbytes + 2 * rows * outputs
    return {
        "outputs": outputs, "inputs": inputs, "rows": rows, "copies": copies, "us": us,
        "ratio_to_bfloat16": {name: us["bfloat16"] / t for name, t in us.items()},
        "percent_of_bandwidth": {
            name: 100 * moved / 1e3 / t / gbps for name, t in us.items() if name != "bfloat16"
        },
    }  # fmt: skip


def search(outputs: int, inputs: int, rows: int, plan: Plan, dtype: Any) -> dict[str, Any]:
    """The fastest tile sizes for one product, as an entry of the table; GPU only."""
    copies = max(1, min(64, plan.megabytes * 10**6 // (2 * outputs * inputs)))
    x = jnp.asarray(inputs_of(rows, 1, inputs, 0)[0], dtype)
    trits = [inputs_of(1, outputs, inputs, seed)[1] for seed in range(copies)]
    codes = [ternary.pack(jnp.asarray(t)) for t in trits]
    reference = _many(lambda x, c: ternary.ternary_dot(x, c, impl="reference"), x, codes)
    want = np.asarray(reference()[0])
    programs, refused = {"reference": reference}, {}
    for blocks in tuning.candidates(dtype, rows):
        program = _many(lambda x, c, b=blocks: ternary_pallas.dot(x, c, None, b), x, codes)
        try:
            right = np.array_equal(np.asarray(program()[0]), want)
        except Exception as error:  # a tile that the compiler or the card cannot take is no candidate
            refused[str(blocks)] = type(error).__name__
            continue
        if right:
            programs[str(blocks)] = program
        else:
            refused[str(blocks)] = "wrong result"
    ms = median_ms(programs, plan.repeats)
    best = min(ms, key=lambda name: ms[name])
    entry: dict[str, Any] = {
        "us": 1e3 * ms[best] / copies, "ratio_to_reference": ms["reference"] / ms[best],
        "refused": refused, "jax": jax.__version__,
    }  # fmt: skip
    if best == "reference":
        return entry | {"impl": "reference"}
    chosen = next(b for b in tuning.candidates(dtype, rows) if str(b) == best)
    return entry | {"impl": "pallas", "blocks": chosen._asdict()}


def kernels(write: bool = False) -> dict[str, Any]:
    """Check, then measure; JSON-able. write: search tile sizes first and store them in the table.

    Raises: ConfigError for write without a GPU; ValueError if an implementation is wrong.
    """
    device, on_gpu = jax.devices()[0], dispatch.backend() == "gpu"
    if write and not on_gpu:
        raise ConfigError(f"--write needs a GPU to measure, this is {device.device_kind}")
    plan = GPU if on_gpu else CPU
    seed = time.time_ns() % 2**32  # fresh inputs each time; the seed is in the record
    impls = ("reference", "pallas") if on_gpu else ("reference", "interpret")
    record: dict[str, Any] = {
        "device": device.device_kind, "jax": jax.__version__, "seed": seed,
        "note": "" if on_gpu else "not measured on GPU",
        "checked_cases": {impl: check(impl, seed) for impl in impls},
    }  # fmt: skip
    if write:
        record["written"] = {
            tuning.key(device.device_kind, dtype, rows, *size): search(*size, rows, plan, dtype)
            for size in plan.sizes for rows in plan.rows for dtype in (jnp.int8, jnp.bfloat16)
        }  # fmt: skip
        tuning.write(record["written"])
    gbps = bandwidth(plan.megabytes, plan.repeats)
    record["copy_gb_per_second"] = gbps
    record["products"] = [measure(*size, rows, plan, gbps) for size in plan.sizes for rows in plan.rows]
    record["operations"] = operations.operations(seed, gbps, plan.repeats, median_ms)
    return record


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    checked = ", ".join(f"{name} ({count})" for name, count in record["checked_cases"].items())
    lines = [
        f"{record['device']}: exact in all cases of {checked}; a copy runs at "
        f"{record['copy_gb_per_second']:.0f} GB/s",
        *([record["note"]] if record["note"] else []),
        f"{'outputs x inputs':<18}{'rows':>5}  {'product':<18}{'us':>10}{'vs bf16':>9}{'bandwidth':>11}",
    ]
    for product in record["products"]:
        for name, us in product["us"].items():
            share = product["percent_of_bandwidth"].get(name)
            lines.append(
                f"{product['outputs']} x {product['inputs']:<10}{product['rows']:>6}  {name:<18}{us:>10.1f}"
                f"{product['ratio_to_bfloat16'][name]:>8.2f}x{'' if share is None else f'{share:.1f}%':>11}"
            )
    return "\n".join(lines + operations.lines(record["operations"]))
