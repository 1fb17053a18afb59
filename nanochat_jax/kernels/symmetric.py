"""Products that are known to be symmetric, for Newton-Schulz: X X^T, and of two of its polynomials.

Half of such a product repeats the other half. `reference` is the library's product, which does not know;
`pallas` computes the tiles on and above the diagonal and writes each off it twice (symmetric_pallas.py),
one program per tile and matrix of a stack. Of Newton-Schulz's 4 m^2 k + 2 m^3 operations on a matrix
m x k it saves m^2 k + m^3: a third for square ones. Not yet measured on GPU.

"auto" takes the kernel for bfloat16 (float32 products would leave the tensor cores) of at least LEAST rows.
Source: the idea is in arXiv:2504.05295's implementation and flash-muon; the code is ours.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.kernels import dispatch

LEAST = 1024  # rows below which a product is too short to gain


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Batched product; float32 means float32 (GPUs would otherwise round it to TF32)."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)


def _reference(x: jax.Array, y: jax.Array | None) -> jax.Array:
    return product(x, x.mT if y is None else y)


def _pallas(x: jax.Array, y: jax.Array | None, interpret: bool = False) -> jax.Array:
    kernel = dispatch.pallas("symmetric_pallas", interpret)
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"tensor cores need bfloat16 or float32, got {x.dtype}")
    stack = lambda a: a.reshape(-1, *a.shape[-2:])  # noqa: E731
    made = kernel.dot(stack(x), stack(x if y is None else y), interpret)
    return made.reshape(*x.shape[:-1], x.shape[-2])


def _probed(x: jax.Array, y: jax.Array | None) -> jax.Array:
    dispatch.need_gpu()
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"only bfloat16 gains, got {x.dtype}")
    if x.shape[-2] < LEAST:
        raise NotImplementedError(f"{x.shape[-2]} rows are too few to gain, at least {LEAST}")
    dispatch.refuse("nanochat_jax.kernels.symmetric:check_on_device")
    return _pallas(x, y)


# "interpret" runs the kernel's own code on any device, slowly: for tests.
IMPLS: dict[str, Callable[..., Any]] = {
    "pallas": _pallas,
    "reference": _reference,
    "interpret": functools.partial(_pallas, interpret=True),
}


def _run(impl: str, x: jax.Array, y: jax.Array | None) -> jax.Array:
    return dispatch.first({**IMPLS, "pallas": _probed} if impl == "auto" else IMPLS, impl, x, y)


def gram(x: jax.Array, impl: str = "auto") -> jax.Array:
    """x x^T of each matrix.

    Args: x: [..., m, k], bfloat16 or float32. impl: "auto" (the Pallas kernel on a GPU on which a probe
    found it right, for the sizes that gain; else plain XLA), or a name in IMPLS.
    Returns: [..., m, m] in x's dtype, accumulated in float32; of the kernel exactly symmetric.
    Raises: ExceptionGroup with the reason if the named implementation refuses.
    """
    return _run(impl, x, None)


def commuting(x: jax.Array, y: jax.Array, impl: str = "auto") -> jax.Array:
    """x y of symmetric matrices [..., m, m] that commute, which makes the product symmetric; else as `gram`."""
    return _run(impl, x, y)


def check_on_device() -> None:
    """Compile the kernel on the default device and compare with NumPy in float64.

    Raises: whatever the compiler says, or ValueError naming the case that came out wrong.
    """
    for m, k in ((256, 512), (200, 130)):
        x = jnp.asarray(np.random.default_rng(m).normal(size=(2, m, k)), jnp.bfloat16)
        wide = np.asarray(x, np.float64)
        exact, size = (a @ np.swapaxes(a, 1, 2) for a in (wide, np.abs(wide)))
        got = np.asarray(jax.jit(_pallas, static_argnums=1)(x, None), np.float64)
        # One rounding of the result, and the order of float32 sums.
        if np.any(np.abs(got - exact) > 2.0**-8 * np.abs(exact) + 1e-5 * size):
            raise ValueError(f"wrong product of {m} x {k}")
        if not np.array_equal(got, np.swapaxes(got, 1, 2)):
            raise ValueError(f"the product of {m} x {k} is not symmetric")
