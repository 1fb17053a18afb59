"""FP4 matrices as packed leaves: 4-bit codes, and a scale per square tile, for inference.

A leaf takes 1/2 + 1/block^2 bytes per weight (and 4 per matrix) and stands where the matrix stood; `Project` sees
its type and calls the packed product (`kernels.fp4.packed_dot`), the model is unchanged. Codes and scales are those
that the training forward makes of the latent weights in each step, activations are rounded as there, and scales
of tensors are multiplied in its order, so the two products differ in the order of a sum alone. Where no partial
sum rounds that changes nothing: of MXFP4, whose terms are whole multiples of a power of two, every sum is exact as
long as block scales differ by a few powers of two, and the bits are equal. NVFP4's scales have a mantissa of their
own; its products agree to float32 rounding.

Off GPUs plain XLA multiplies, which writes an unpacked copy of each matrix, in bfloat16; the kernel makes none. A device
with FP4 units (not verified on one) takes codes of one byte each, so that every step unpacks them.

Packed leaves have no gradient and are made at load; checkpoints keep the latent weights.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from nanochat_jax.kernels import fp4, scaled
from nanochat_jax.quant import fp4_products


@struct.dataclass
class PackedFp4:
    """An FP4 matrix [m, n], or a stack of them with leading axes.

    codes: uint8 [..., n, m / 2], two a byte as in `fp4.pack`. scales: float8 [..., n / block, m / block], one per
    square tile. tensor: float32 [...]. weight: in `fp4.FORMATS`. impl: see `fp4.packed_dot`.
    """

    codes: jax.Array
    scales: jax.Array
    tensor: jax.Array
    weight: str = struct.field(pytree_node=False)
    impl: str = struct.field(pytree_node=False, default="auto")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices it stands for: (..., m, n)."""
        return (*self.codes.shape[:-2], 2 * self.codes.shape[-1], self.codes.shape[-2])

    @property
    def ndim(self) -> int:
        """Axes of the matrices it stands for."""
        return self.codes.ndim


def pack(w: jax.Array, name: str, impl: str = "auto") -> PackedFp4:
    """Round and pack one matrix [m, n]. Raises: ValueError if tiles do not divide it."""
    blocks = fp4.quantize(w.T, name, tiles=True)
    return PackedFp4(fp4.pack(blocks.codes), blocks.scales, blocks.tensor, name, impl)


@functools.partial(jax.jit, static_argnums=(1, 2))
def pack_stack(w: jax.Array, name: str, impl: str = "auto") -> PackedFp4:
    """A stack of matrices [N, m, n], packed one at a time: the temporaries are those of one."""
    return jax.lax.map(lambda one: pack(one, name, impl), w)


def unpack(w: PackedFp4) -> jax.Array:
    """The values of one matrix, float32 [m, n]."""
    blocks = fp4.Blocks(fp4.unpack(w.codes), w.scales, w.tensor)
    return fp4.dequantize(blocks, w.weight, tiles=True).T


def matmul(x: jax.Array, w: PackedFp4, act: str) -> jax.Array:
    """x @ w for a single packed matrix (no leading axes).

    Args: x: [..., m], rounded to nearest with one scale for all of it, as in training. act: the weight's format.
    Returns: [..., n] in x's dtype.
    Raises: ValueError for another act.
    """
    if act != w.weight:
        raise ValueError(f"packed {w.weight} weights multiply activations in {w.weight}, not '{act}'")
    rows = x.reshape(-1, x.shape[-1])
    if w.impl == "auto" and scaled.native(act):  # on FP4 units, as the training forward
        columns = jnp.repeat(w.scales, fp4.FORMATS[act], 0)
        blocks = fp4.Blocks(fp4.unpack(w.codes), columns, w.tensor)
        y = fp4_products.in_units(fp4.quantize(rows, act, impl=w.impl), blocks)
    else:
        one = jnp.ones((), jnp.float32)
        packed = fp4.quantize_packed(rows, act, impl=w.impl)
        operands = packed._replace(tensor=one), fp4.Blocks(w.codes, w.scales, one)
        # As the training forward, which sums in x's dtype, multiplies by scales in float32, and rounds again.
        y = fp4.packed_dot(*operands, act, w.impl).astype(x.dtype) * w.tensor * packed.tensor
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)
