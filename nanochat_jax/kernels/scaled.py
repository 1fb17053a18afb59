"""Products of FP4 blocks on hardware that has them: `jax.nn.scaled_matmul`, behind a probe.

NVFP4 only (E2M1 codes, blocks of 16, E4M3 scales): MXFP4 is not among the forms that cuDNN takes. Blackwell
GPUs have such units; elsewhere `quant.fp4_products` emulates. Not verified on hardware: written from JAX's
documentation, tested on CPU for shapes, dtypes, scales and the CUDA program that it lowers to.
"""

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.kernels import dispatch

BLOCK = 16
BLACKWELL = 10.0  # compute capability


def native(name: str) -> bool:
    """Whether products of two operands in this format run in FP4 units here; asked once per process."""
    if name != "nvfp4" or dispatch.backend() != "gpu" or _capability() < BLACKWELL:
        return False
    return not dispatch.verdict("nanochat_jax.kernels.scaled:check_on_device")


def _capability() -> float:
    """Of the default device; 0 where it has none (AMD)."""
    try:
        return float(getattr(dispatch.devices()[0], "compute_capability", 0))
    except ValueError:
        return 0.0


def scaled_dot(
    levels_MK: jax.Array, scales: jax.Array, others_NK: jax.Array, other_scales: jax.Array
) -> jax.Array:
    """(levels * scales) @ (others * other_scales)^T, float32 [M, N].

    Args: levels, others: exact FP4 levels of any float dtype. scales: float8_e4m3fn [M, K / 16] and
    [N, K / 16], one per block of 16 neighbours along K.
    """
    codes, other_codes = (a.astype(jnp.float4_e2m1fn)[None] for a in (levels_MK, others_NK))
    return jax.nn.scaled_matmul(codes, other_codes, scales[None], other_scales[None], jnp.float32)[0]


def check_on_device() -> None:
    """Compile a product on the default device, look for cuDNN in the program, and check what it gives.

    Raises: whatever the compiler says, or ValueError if the units are not used or the result is wrong.
    """
    operands = _operands()
    compiled = jax.jit(scaled_dot).lower(*operands).compile()
    if "__cudnn$" not in str(
        compiled.as_text()
    ):  # XLA's names of cuDNN calls; file names hold the word as well
        raise ValueError("the compiler multiplies dequantized values instead of calling cuDNN")
    check(compiled(*operands))


def _operands() -> tuple[jax.Array, ...]:
    """Levels and scales of a product of 128 x 512 with 256 x 512."""
    rng, levels = np.random.default_rng(0), np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    made = []
    for rows in (128, 256):
        made.append(jnp.asarray(rng.choice([*levels, *-levels], (rows, 512)), jnp.float32))
        made.append(jnp.asarray(rng.choice([0.5, 1.0, 1.75, 448.0], (rows, 32)), jnp.float8_e4m3fn))
    return tuple(made)


def check(result: jax.Array) -> None:
    """Compare a product of `_operands` with NumPy in float64. Raises: ValueError."""
    a, a_scales, b, b_scales = (np.asarray(v, np.float64) for v in _operands())
    a, b = (v * np.repeat(scales, BLOCK, 1) for v, scales in ((a, a_scales), (b, b_scales)))
    if np.any(np.abs(np.asarray(result, np.float64) - a @ b.T) > 1e-5 * (np.abs(a) @ np.abs(b).T)):
        raise ValueError("wrong product of FP4 blocks")
