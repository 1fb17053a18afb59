"""Ternary matrices quantized once and kept as codes, one number per weight: what serves fastest on CPUs.

Where the training forward rounds the latent weights anew in each step, a leaf of this kind is rounded at
load. Its numbers are 8-bit integers or floats, in which -1, 0, 1 and 8-bit activations are as exact: XLA's CPU
backend multiplies a single row of floats at the speed of memory, and of integers many times slower (256 x
4096: 0.11 ms against 1.5), while eight rows of integers are faster (0.15 against 0.27). `carrier` tries. The
product is the training forward's, `acc * (gamma * inverse)` on the same integers, bit for bit.

Coded leaves have no gradient and are made at load; checkpoints keep the latent weights.
Source: arXiv:2504.12285 (inference from codes).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from nanochat_jax.kernels import dispatch, integer
from nanochat_jax.quant import ternary

MATRICES = 8  # that `carrier` multiplies with: a single one would stay in the first cache


@struct.dataclass
class CodedTernary:
    """A ternary matrix [m, n], or a stack of them with leading axes.

    codes: [..., m, n], int8 or floating: -1, 0, 1 with one scale per matrix, or floating the products of codes
    and scales with one scale per group of inputs. scale: float32 [...], or None with groups.
    """

    codes: jax.Array
    scale: jax.Array | None

    @property
    def weight(self) -> str:
        """The format, a name in `matmul.WEIGHTS`."""
        return "ternary"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices it stands for: (..., m, n)."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Axes of the matrices it stands for."""
        return self.codes.ndim


def carrier(rows: int, inputs: int, outputs: int) -> str:
    """The dtype in which products of so many rows run fastest here: the name of an implementation in
    `kernels.integer`, whose results are all the same. Tried once per process and sizes; not on devices that are
    not here."""
    return integer.preferred() if dispatch.away() else _tried(rows, inputs, outputs)


@functools.cache
def _tried(rows: int, inputs: int, outputs: int) -> str:
    def product(name: str):
        return lambda q, ts: [integer.integer_matmul(q, t, impl=name) for t in ts[name]]

    def arguments():
        rng = np.random.default_rng(0)
        q = rng.integers(-127, 128, (rows, inputs)).astype(np.int8)
        t = rng.integers(-1, 2, (MATRICES, inputs, outputs)).astype(np.int8)
        return q, {name: [one.astype(jnp.dtype(name)) for one in t] for name in integer.IMPLS}

    return dispatch.fastest({name: product(name) for name in integer.IMPLS}, arguments, runs=20)


@functools.partial(jax.jit, static_argnums=(1, 2))
def code(w: jax.Array, group: int, dtype: str) -> CodedTernary:
    """Matrices [..., m, n] quantized, their codes in `dtype`.

    Args: group: inputs per scale, 0 = one scale per matrix. dtype: from `carrier`, or with groups a floating one.
    """
    t, gamma = ternary.quantize_ternary(w, group)
    if group:
        return CodedTernary(ternary.dequantize(t, gamma).astype(dtype), None)
    return CodedTernary(t.astype(dtype), gamma[..., 0, 0])


def matmul(x: jax.Array, w: CodedTernary, act: str = "int8") -> jax.Array:
    """x @ w for a single coded matrix (no leading axes), as the training forward multiplies.

    Args: x: [..., m]. act: "int8", each row rounded to 8 bits, or "full", x as it is.
    Returns: [..., n] in x's dtype.
    Raises: ValueError for another act.
    """
    if act not in ("int8", "full"):
        raise ValueError(f"coded ternary weights multiply int8 or full activations, not '{act}'")
    rows, inverse = ternary.int8_rows(x) if act == "int8" else (x, None)
    if w.scale is None or inverse is None:
        y = jnp.matmul(rows.astype(x.dtype), w.codes.astype(x.dtype))
    else:
        y = integer.integer_matmul(rows, w.codes, prefer=w.codes.dtype.name)
    return ternary.rescaled(y, w.scale, inverse, x.dtype)
