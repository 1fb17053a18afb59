"""FP4 for training: Hadamard rotations, and the two products of the backward pass on quantized operands.
The numbers are in `kernels.fp4`, the forward's slots in `matmul`.

Blocks run along the axis that a product contracts, so x, w and dy are each cut one way for one product
and another way for the next. Weights that run in FP4 in the forward pass are cut into square tiles
instead: w and its transpose then have the same values, and the function that is differentiated is the
one that was computed (arXiv:2509.25149).

A Hadamard rotation of both operands along the contracted axis leaves their product as it is and
spreads an outlier over its tile, which then has a smaller maximum for the same norm.

On GPUs with FP4 units NVFP4 products run in them, where both operands have just been quantized (`in_units`,
kernels/scaled.py; not verified on hardware). Everything else is emulated: level * block scale has at most 6
significant bits, exact in bfloat16, so one ordinary product of these and one multiplication by the tensors'
scales give what FP4 units would, up to the order of summation. It is slower than no FP4 at all; it shows
what FP4 does to training. A tensor's scale sees all tokens of the batch: NVFP4 activations of a token
depend, in their last bits, on tokens after it.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.config import Fp4Config
from nanochat_jax.kernels import fp4, scaled
from nanochat_jax.kernels.fp4 import Blocks
from nanochat_jax.types import Key

# --- rotation


def hadamard(width: int) -> np.ndarray:
    """Orthogonal symmetric matrix of entries +-1/sqrt(width), float32; width: a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / math.sqrt(width)).astype(np.float32)


def signs(kind: str, width: int, key: Key | None = None) -> jax.Array:
    """float32 [width] of +-1: all 1 ("none"), always the same draw ("fixed"), or the key's ("random")."""
    if kind == "none":
        return jnp.ones((width,), jnp.float32)
    key = jax.random.key(0) if kind == "fixed" else key
    if key is None:
        raise ValueError("random signs need a key")
    return jnp.where(fp4.uniform(key, (width,)) < 0.5, -1.0, 1.0)


def rotate(v: jax.Array, sign: jax.Array) -> jax.Array:
    """Multiply every tile of the last axis by diag(sign) and the Hadamard matrix; float32.

    Args: v: [..., n]. sign: [width], width dividing n.
    """
    tiles = v.astype(jnp.float32).reshape(*v.shape[:-1], -1, sign.shape[0])
    factor = sign[:, None] * jnp.asarray(hadamard(sign.shape[0]))
    return jnp.matmul(tiles, factor, precision=jax.lax.Precision.HIGHEST).reshape(v.shape)


def unrotate(v: jax.Array, sign: jax.Array) -> jax.Array:
    """The inverse of `rotate`."""
    tiles = v.astype(jnp.float32).reshape(*v.shape[:-1], -1, sign.shape[0])
    factor = jnp.asarray(hadamard(sign.shape[0])) * sign[None, :]
    return jnp.matmul(tiles, factor, precision=jax.lax.Precision.HIGHEST).reshape(v.shape)


# --- products


def in_units(a: Blocks, b: Blocks) -> jax.Array:
    """a @ b^T in FP4 units, float32 [p, q]; blocks [p, c] and [q, c] along c. Only where `scaled.native`."""
    made = scaled.scaled_dot(fp4.decode(a.codes), a.scales, fp4.decode(b.codes), b.scales)
    return made * (a.tensor * b.tensor)


def along_inputs(tiles: Blocks) -> Blocks:
    """A weight's tiles [m, n] as blocks along m of its transpose [n, m]: each tile's scale for its columns."""
    block = tiles.codes.shape[0] // tiles.scales.shape[0]
    return Blocks(tiles.codes.T, jnp.repeat(tiles.scales.T, block, 0), tiles.tensor)


def _product(
    dy_pc: jax.Array, other_qc: jax.Array, name: str, how: Fp4Config, key: Key, rotated: bool, exact: bool
) -> jax.Array:
    """dy @ other^T [p, q], float32, quantized along c. exact: `other` is multiplied as it is."""
    dtype = other_qc.dtype
    dy_key, other_key, sign_key = jax.random.split(key, 3)
    if rotated:
        sign = signs(how.signs, how.hadamard, sign_key)
        dy_pc, other_qc = rotate(dy_pc, sign), rotate(other_qc, sign)
    drawn = None if how.stochastic == "none" else dy_key, other_key if how.stochastic == "both" else None
    both = not exact and how.operands == "both"
    if both and scaled.native(name):
        pairs = zip((dy_pc, other_qc), drawn, strict=True)
        return in_units(*(fp4.quantize(v, name, draw, impl=how.impl) for v, draw in pairs))
    dy, scale = fp4.scaled_levels(dy_pc, name, drawn[0], impl=how.impl)
    other = other_qc
    if both:
        other, other_scale = fp4.scaled_levels(other_qc, name, drawn[1], impl=how.impl)
        scale = scale * other_scale
    contract_last = (((1,), (1,)), ((), ()))
    product = jax.lax.dot_general(
        dy.astype(dtype), other.astype(dtype), contract_last, preferred_element_type=jnp.float32
    )
    return product * scale


def dgrad(dy_Tn: jax.Array, w_mn: jax.Array, name: str, how: Fp4Config, key: Key, exact: bool) -> jax.Array:
    """dx = Q(dy) @ Q(w)^T, float32 [T, m], with blocks along n.

    Args: name: in fp4.FORMATS. key: consumed. exact: w holds codes already (ternary, FP4 tiles): it is
    neither rounded nor rotated. Blocks, and Hadamard tiles if how.rotated is "both", must divide n.
    """
    rotated = how.hadamard > 0 and how.rotated == "both" and not exact
    return _product(dy_Tn, w_mn, name, how, key, rotated, exact)


def wgrad(x_Tm: jax.Array, dy_Tn: jax.Array, name: str, how: Fp4Config, key: Key) -> jax.Array:
    """dw = Q(x)^T @ Q(dy), float32 [m, n], with blocks along the tokens T.

    Args as for `dgrad`. Tokens are filled up with zeros to a whole number of blocks and tiles, which
    changes no value.
    """
    spare = -x_Tm.shape[0] % max(fp4.FORMATS[name], how.hadamard)
    x_mT, dy_nT = (jnp.pad(v, ((0, spare), (0, 0))).T for v in (x_Tm, dy_Tn))
    return _product(dy_nT, x_mT, name, how, key, how.hadamard > 0, exact=False).T
