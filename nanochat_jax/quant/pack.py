"""Ternary matrices as packed leaves: what inference holds in place of float weights.

A packed leaf takes a quarter of a byte per weight and stands where the matrix stood; `Project` sees
its type and calls the packed product, the model is unchanged. The product of int8 activations with a
per-matrix scale is the training forward's, `acc * (gamma * inverse)` on the same integers, so equal
inputs give equal bits. With scales of groups the training forward multiplies dequantized floats
instead; then the two agree to rounding only. That holds for each product: XLA compiles the norms and
sums around it anew, so logits of a whole model agree to float rounding, not always to the bit.

Packed leaves have no gradient and are made at load; checkpoints keep the latent weights.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from nanochat_jax.kernels import ternary as kernels
from nanochat_jax.quant import ternary


@struct.dataclass
class PackedTernary:
    """A ternary matrix [m, n], or a stack of them with leading axes.

    codes: uint8 [..., n, 64 * ceil(m / 256)], laid out as in `kernels.ternary`. scale: float32 [...], or
    [..., m / group, n] with one scale per group of inputs. inputs: m. impl: see `kernels.ternary_dot`.
    """

    codes: jax.Array
    scale: jax.Array
    inputs: int = struct.field(pytree_node=False)
    impl: str = struct.field(pytree_node=False, default="auto")

    @property
    def weight(self) -> str:
        """The format, a name in `matmul.WEIGHTS`."""
        return "ternary"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices it stands for: (..., m, n)."""
        return (*self.codes.shape[:-2], self.inputs, self.codes.shape[-2])

    @property
    def ndim(self) -> int:
        """Axes of the matrices it stands for."""
        return self.codes.ndim

    @property
    def grouped(self) -> bool:
        """One scale per group of inputs and output, not one per matrix."""
        return self.scale.ndim == self.codes.ndim


def pack(t: jax.Array, gamma: jax.Array, impl: str = "auto") -> PackedTernary:
    """Pack what `ternary.quantize_ternary` returns.

    Args: t: int8 [..., m, n] in {-1, 0, 1}. gamma: float32 [..., 1, 1] or [..., m/group, 1, n].
    """
    scale = gamma[..., 0, :] if gamma.ndim > t.ndim else gamma[..., 0, 0]
    return PackedTernary(kernels.pack(jnp.swapaxes(t, -1, -2)), scale, t.shape[-2], impl)


def unpack(packed: PackedTernary) -> tuple[jax.Array, jax.Array]:
    """(t, gamma), the inverse of `pack`."""
    t = jnp.swapaxes(kernels.unpack(packed.codes, packed.inputs), -1, -2)
    return t, packed.scale[..., None, :] if packed.grouped else packed.scale[..., None, None]


@functools.partial(jax.jit, static_argnums=(1, 2))
def pack_stack(w: jax.Array, group: int = 0, impl: str = "auto") -> PackedTernary:
    """A stack of matrices [N, m, n] quantized and packed, one at a time: the temporaries are those of one.

    Args: group: inputs per scale, 0 = one scale per matrix.
    """
    return jax.lax.map(lambda one: pack(*ternary.quantize_ternary(one, group), impl), w)


def matmul(x: jax.Array, w: PackedTernary, act: str = "int8", axis: str | None = None) -> jax.Array:
    """x @ w for a single packed matrix (no leading axes).

    Args: x: [..., m]. act: "int8", each row rounded to 8 bits, or "full", x as it is. axis: inside
    shard_map, the mesh axis over which m is split (in multiples of 256, and of the group): rows are
    then scaled by their maximum over all parts, and the integers are summed before scaling, so that
    the result equals the unsplit one bit for bit (with a scale per matrix).
    Returns: [..., n] in x's dtype.
    Raises: ValueError for another act.
    """
    if act not in ("int8", "full"):
        raise ValueError(f"packed ternary weights multiply int8 or full activations, not '{act}'")
    codes, inverse = ternary.int8_rows(x, axis) if act == "int8" else (x, None)
    y = kernels.ternary_dot(codes, w.codes, w.scale if w.grouped else None, impl=w.impl)
    y = y if axis is None else jax.lax.psum(y, axis)
    return ternary.rescaled(y, None if w.grouped else w.scale, inverse, x.dtype)
