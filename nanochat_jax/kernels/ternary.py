"""Product of activations with ternary weights packed four to a byte, for inference.

Layout, bit by bit. Inputs come in groups of 256, each four planes of 64. The weight of output n and
input k = 256 g + 64 j + r (j < 4, r < 64) is bits 2j and 2j + 1 of byte [n, 64 g + r], stored as
code = t + 1, so 0, 1, 2 stand for -1, 0, +1 and 3 never occurs. Inputs beyond the matrix, up to the
next multiple of 256, have code 1 (weight zero); a zero byte would mean -1. So plane j of 64
neighboring bytes is `(bytes >> 2j) & 3`, one shift and one mask per register, and meets 64
neighboring activations: nothing is shuffled. Inputs are contiguous, as 8-bit tensor cores want both
operands, and either axis can be split over devices in multiples of a group.

`reference` states the meaning and is plain XLA: unpack, then the library's product, which is also
what "auto" takes for many rows. `pallas` reads the packed bytes. On int8 activations both give
the same integers. Gradients are not defined here: training uses `quant.matmul`.
Source: arXiv:2402.17764 (the weights), arXiv:2504.12285 (packed inference).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.kernels import dispatch, integer, tuning

GROUP, PLANE = 256, 64  # inputs per group of bytes, and per plane (two bits) of a group
# Rows above which unpacking costs less than 5% of a library product; float32 rows are multiplied three times.
MAX_ROWS = {"int8": 256, "bfloat16": 128, "float32": 42}


def padded(inputs: int) -> int:
    """The next multiple of GROUP."""
    return -(-inputs // GROUP) * GROUP


def pack(t: jax.Array) -> jax.Array:
    """Pack ternary codes.

    Args: t: int8 [..., n, m] in {-1, 0, 1}, one row per output.
    Returns: uint8 [..., n, 64 * ceil(m / 256)].
    """
    m = t.shape[-1]
    rows = jnp.pad(t, [(0, 0)] * (t.ndim - 1) + [(0, padded(m) - m)])
    planes = (rows + 1).astype(jnp.uint8).reshape(*t.shape[:-1], -1, 4, PLANE)
    bits = [planes[..., j, :] << (2 * j) for j in range(4)]
    return functools.reduce(jnp.bitwise_or, bits).reshape(*t.shape[:-1], -1)


def unpack(codes: jax.Array, inputs: int) -> jax.Array:
    """Inverse of `pack`: int8 [..., n, inputs]. Raises: ValueError if the bytes do not hold so many."""
    if codes.shape[-1] * 4 != padded(inputs):
        raise ValueError(
            f"{inputs} inputs take {padded(inputs) // 4} bytes per output, got codes of shape {codes.shape}"
        )
    grouped = codes.reshape(*codes.shape[:-1], -1, 1, PLANE)
    planes = [(grouped >> (2 * j)) & 3 for j in range(4)]
    t = jnp.concatenate(planes, -2).astype(jnp.int8) - 1
    return t.reshape(*codes.shape[:-1], -1)[..., :inputs]


def _reference(x_MK: jax.Array, codes: jax.Array, scale: jax.Array | None) -> jax.Array:
    t_KN = _columns(codes, x_MK.shape[-1], x_MK.dtype)
    product = integer.integer_matmul if x_MK.dtype == jnp.int8 else _float_product
    if scale is None:
        return product(x_MK, t_KN)
    groups = scale.shape[0]
    x_GMK = jnp.moveaxis(x_MK.reshape(x_MK.shape[0], groups, -1), 1, 0)
    t_GKN = t_KN.reshape(groups, -1, t_KN.shape[1])
    return jnp.sum(product(x_GMK, t_GKN) * scale[:, None], axis=0)


def _columns(codes: jax.Array, inputs: int, dtype) -> jax.Array:
    """The transpose of `unpack`: int8 [inputs, n]."""
    if dtype != jnp.int8 or dispatch.backend() != "cpu":
        return unpack(codes, inputs).T
    # XLA's CPU backend (jax 0.10.2) runs an int8 product with a transposed right operand 5-12 times slower.
    # `integer_matmul(transposed=True)` would write out the transpose of what the bytes unpack to, four times as
    # many, and needs arrays that lie on one device; here the bytes are transposed, wherever they lie.
    grouped = codes.T.reshape(-1, 1, PLANE, codes.shape[0])
    planes = [(grouped >> (2 * j)) & 3 for j in range(4)]
    return (jnp.concatenate(planes, 1).astype(jnp.int8) - 1).reshape(-1, codes.shape[0])[:inputs]


def _float_product(x: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.matmul(
        x, t.astype(x.dtype), preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST
    )


def _pallas(x_MK, codes, scale, interpret=False) -> jax.Array:
    return dispatch.pallas("ternary_pallas", interpret).dot(x_MK, codes, scale, interpret=interpret)


def _probed(x_MK, codes, scale) -> jax.Array:
    """The Pallas kernel if it works on this device (probed once per process) and pays for this shape.

    Packed leaves are what inference holds, on one device; one of several GPUs should not lose the kernel.
    Whoever splits them multiplies inside a shard_map, or under a mesh in context, where plain XLA multiplies.
    """
    dispatch.need_gpu()
    if x_MK.shape[0] > (most := MAX_ROWS[x_MK.dtype.name]):
        raise NotImplementedError(f"{x_MK.shape[0]} rows: unpacking first is faster above {most}")
    entry = tuning.entry(x_MK.dtype, x_MK.shape[0], codes.shape[0], x_MK.shape[1])
    if entry is not None and entry.get("impl") == "reference":
        raise NotImplementedError("measured slower than the reference for this shape")
    dispatch.refuse("nanochat_jax.kernels.ternary:check_on_device", placed=True)
    return _pallas(x_MK, codes, scale)


# "interpret" runs the Pallas kernel's own code on any device, slowly: for tests.
IMPLS = {
    "pallas": _pallas,
    "reference": _reference,
    "interpret": functools.partial(_pallas, interpret=True),
}


def ternary_dot(
    x: jax.Array, codes: jax.Array, scale: jax.Array | None = None, *, impl: str = "auto"
) -> jax.Array:
    """x @ t for packed ternary t, with the scales of groups of inputs if there are any.

    Args: x: [..., m], int8 in [-127, 127] (W2A8), or bfloat16 or float32 (W2A16). codes: uint8
    [n, 64 * ceil(m / 256)], see the head of this file. scale: None, or float32 [m / group, n].
    impl: "auto" (the Pallas kernel on a GPU on which a probe found it right, else plain XLA), or a
    name in IMPLS.
    Returns: float32 [..., n]. Of int8 x without scales these are exact integers, the same from every
    implementation (for m <= 132104); sums over groups are exact within a group and rounded between. Of
    floating x `pallas` sums x times t + 1 and takes x off again: its error is a few 2^-24 of the sum of |x|,
    not of |t x|, and |x| must be below 2^63.
    Raises: ValueError for sizes that do not fit; ExceptionGroup with the reason if the named
    implementation refuses.
    """
    m, (n, width) = x.shape[-1], codes.shape
    if width * 4 != padded(m):
        raise ValueError(f"x has {m} inputs, packed in {padded(m) // 4} bytes, but codes have {width}")
    if scale is not None and (scale.shape[1] != n or m % scale.shape[0]):
        raise ValueError(f"scale of shape {scale.shape} fits neither {n} outputs nor groups of {m} inputs")
    if x.dtype not in (jnp.int8, jnp.bfloat16, jnp.float32):
        raise ValueError(f"x must be int8, bfloat16 or float32, got {x.dtype}")
    impls = {**IMPLS, "pallas": _probed} if impl == "auto" else IMPLS
    y = dispatch.first(impls, impl, x.reshape(-1, m), codes, scale)
    return y.reshape(*x.shape[:-1], n)


def check_on_device() -> None:
    """Compile the Pallas kernel on the default device and compare with NumPy.

    Raises: whatever the compiler says, or ValueError naming the case that came out wrong.
    """
    rng = np.random.default_rng(0)
    n, m = 128, 512
    t = rng.integers(-1, 2, (n, m)).astype(np.int8)
    codes = pack(jnp.asarray(t))
    for rows in (1, 2, 4, 16, 64, 100):
        q = rng.integers(-127, 128, (rows, m)).astype(np.int8)
        exact = q.astype(np.int64) @ t.T.astype(np.int64)
        # Integers up to 127 are exact in bfloat16, so all kinds of activations must give them.
        for dtype in (jnp.int8, jnp.bfloat16, *([jnp.float32] if rows == 4 else [])):
            y = jax.jit(_pallas)(jnp.asarray(q).astype(dtype), codes, None)
            if not np.array_equal(np.asarray(y, np.float64), exact):
                raise ValueError(f"wrong product of {rows} rows of {jnp.dtype(dtype).name}")
            scale = rng.uniform(0.5, 2, (m // 128, n)).astype(np.float32)
            weights = t.T * np.repeat(scale, 128, 0).astype(np.float64)
            y = jax.jit(_pallas)(jnp.asarray(q).astype(dtype), codes, jnp.asarray(scale))
            if np.any(np.abs(y - q @ weights) > 1e-5 * (np.abs(q.astype(np.int32)) @ np.abs(weights))):
                raise ValueError(f"wrong sum over groups of {rows} rows of {jnp.dtype(dtype).name}")
