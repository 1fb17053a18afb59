"""FP4 and FP8 matrices rounded once, at load, and held as numbers of the compute dtype.

Codes and the products of levels with their blocks' scales have at most 6 significant bits, exact in bfloat16; the
scale of a matrix or of its columns stays apart. The product is the training forward's, on the same numbers: the
same bits (but on a device with FP4 units, where training multiplies in these). It takes the bytes of a matrix in
the compute dtype, where `fp4_packed` takes a quarter of bfloat16's, and spares rounding the latent weights in
every step.

Rounded leaves have no gradient and are made at load; checkpoints keep the latent weights.
"""

import functools

import jax
from flax import struct

from nanochat_jax.config import Fp4Config
from nanochat_jax.quant import matmul as products


@struct.dataclass
class Rounded:
    """A matrix [m, n] in one of the formats of `matmul.WEIGHTS`, or a stack of them with leading axes.

    codes: floating [..., m, n]. scale: float32 [..., 1, 1] or [..., 1, n]. weight: the format. how: as trained.
    """

    codes: jax.Array
    scale: jax.Array
    weight: str = struct.field(pytree_node=False)
    how: Fp4Config = struct.field(pytree_node=False, default=Fp4Config())

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices it stands for: (..., m, n)."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Axes of the matrices it stands for."""
        return self.codes.ndim


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def round_stack(w: jax.Array, name: str, how: Fp4Config, dtype: str) -> Rounded:
    """A stack of matrices [N, m, n] rounded to the format `name`, one at a time, codes in `dtype` (floating)."""

    def one(w: jax.Array) -> Rounded:
        codes, scale = products.WEIGHTS[name](w, 0)
        return Rounded(codes.astype(dtype), scale, name, how)

    return jax.lax.map(one, w)


def matmul(x: jax.Array, w: Rounded, act: str) -> jax.Array:
    """x @ w for a single matrix (no leading axes), as the training forward multiplies.

    Args: x: [..., m]. act: in `matmul.ACTIVATIONS`. Returns: [..., n] in x's dtype.
    """
    x_codes, x_scale = products.ACTIVATIONS[act](x, w.how)
    y = products.product(x_codes, x_scale, w.codes, w.scale, x.dtype)
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)
