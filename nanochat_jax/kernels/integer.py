"""Exact integer matmul of small integers: int8 operands, exact accumulators.

Three carriers give the same bits (|q| <= 127, |t| <= 1 are exact in bfloat16, and products and
sums are exact in float32 while 127 * depth < 2**24), so the fastest on this device is chosen by a
probe, once per process: int8 dot products are the quickest on CPUs with AVX-512-VNNI and on GPUs
with integer tensor cores, floats elsewhere. On a GPU int8 takes part if a child process found its
integers right there, and in products whose sizes its libraries take without copies.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from nanochat_jax.kernels import dispatch

MAX_DEPTH = 2**24 // 127  # contraction length up to which float32 accumulation is exact
MULTIPLE = 16  # of all sizes of an int8 product on a GPU


def _int8(q: jax.Array, t: jax.Array, transposed: bool = False) -> jax.Array:
    if dispatch.backend() == "gpu" and q.shape[-1] <= MAX_DEPTH:  # deeper ones have no other carrier
        sizes = (math.prod(q.shape[:-1]), *t.shape[-2:])
        if any(size % MULTIPLE for size in sizes):
            raise NotImplementedError(f"sizes {sizes} are no multiples of {MULTIPLE}")
        if reason := dispatch.verdict("nanochat_jax.kernels.integer:check_on_device"):
            raise NotImplementedError(reason)
    if not transposed:
        return _int8_product(q, t)
    t = t.mT
    if dispatch.backend() == "cpu":
        # XLA's CPU backend (jax 0.10.2 and 0.12) would make the transposition a matter of layout, for which it
        # has no int8 product, and widen both operands to int32: 6 to 20 times slower than writing it out.
        if not dispatch.whole() and q.shape[-1] <= MAX_DEPTH:
            raise NotImplementedError("a layout cannot be asked of an array that may be split over devices")
        t = with_layout_constraint(t, Layout(tuple(range(t.ndim))))
    return _int8_product(q, t)


def _int8_product(q: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.matmul(q, t, preferred_element_type=jnp.int32).astype(jnp.float32)


def _float(q: jax.Array, t: jax.Array, transposed: bool = False, *, dtype: jnp.dtype) -> jax.Array:
    if q.shape[-1] > MAX_DEPTH:
        raise NotImplementedError(f"depth {q.shape[-1]} exceeds {MAX_DEPTH}: float32 sums are not exact")
    # HIGHEST: on GPU, float32 products would otherwise pass through TF32 (exact too, but slower
    # to reason about); for bfloat16 operands the setting changes nothing.
    return jnp.matmul(
        q.astype(dtype),
        (t.mT if transposed else t).astype(dtype),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
    )


IMPLS = {
    "int8": _int8,
    "bfloat16": functools.partial(_float, dtype=jnp.bfloat16),
    "float32": functools.partial(_float, dtype=jnp.float32),
}


def preferred() -> str:
    """The carrier that is fastest on the default device (probed once per process); of one that is not here, the
    first, which a card with 8-bit units wants."""
    return next(iter(IMPLS)) if dispatch.away() else _timed()


@functools.cache
def _timed() -> str:
    rng = np.random.default_rng(0)
    # On a GPU a small product times the launch; on a CPU a square one is not what tokens make of it.
    rows, inputs, outputs = (2048, 256, 1024) if dispatch.backend() == "cpu" else (4096, 4096, 4096)

    def arguments() -> tuple[np.ndarray, np.ndarray]:
        q = rng.integers(-127, 128, (rows, inputs)).astype(np.int8)
        t = rng.integers(-1, 2, (inputs, outputs)).astype(np.int8)
        return q, t

    return dispatch.fastest(IMPLS, arguments)


def integer_matmul(
    q: jax.Array, t: jax.Array, *, impl: str = "auto", transposed: bool = False, prefer: str = ""
) -> jax.Array:
    """q @ t with exact accumulation, or q @ t^T.

    Args: q: int8 [..., m]. t: int8 [m, n], or [n, m] if transposed. impl: "auto" (the probed carrier) or a
    name in IMPLS. prefer: the carrier that "auto" tries first; "" = the probed one.
    Returns: float32 [..., n] holding exact integers (for m <= 132104).
    """
    order = [prefer or preferred(), *IMPLS] if impl == "auto" else [impl]
    return dispatch.first({name: IMPLS[name] for name in order}, "auto", q, t, transposed)


def check_on_device() -> None:
    """Compile int8 products on the default device and compare their integers with NumPy's.

    Raises: whatever the compiler says, or ValueError naming the sizes that came out wrong.
    """
    rng = np.random.default_rng(0)
    for rows, inputs, outputs in ((16, 256, 64), (256, 2048, 128)):
        q = rng.integers(-127, 128, (rows, inputs)).astype(np.int8)
        q[0] = 127  # the largest sums
        t = rng.integers(-1, 2, (inputs, outputs)).astype(np.int8)
        t[:, 0] = 1
        exact = q.astype(np.float64) @ t.astype(np.float64)  # whole numbers: exact, and faster than int64
        if not np.array_equal(np.asarray(jax.jit(_int8_product)(q, t)), exact):
            raise ValueError(f"wrong integers of {rows} x {inputs} with {outputs} outputs")
