"""Pieces of a block: norms, rotary positions, multilayer perceptrons."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nanochat_jax.quant.project import Project
from nanochat_jax.types import Params


def rms_norm(x: jax.Array, gain: jax.Array | None = None, eps: float = 1e-6) -> jax.Array:
    """x / rms(x) over the last axis, computed in float32; times `gain` [D] if given."""
    wide = x.astype(jnp.float32)
    y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (y if gain is None else y * gain.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rotary_table(positions_BL: jax.Array, width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """(cos, signed sin), float32 [B, L, 1, width], of the angles position * theta ** (-2i / width).

    Both halves of `width` hold the same angles; the sine is negative in the first half.
    """
    frequencies = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions_BL[..., None, None].astype(jnp.float32) * frequencies[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


def rotate(x_BLHK: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding, half-split pairs (i, i + K/2) as in LLaMA checkpoints of transformers."""
    cos, sin = (t.astype(x_BLHK.dtype) for t in table)
    halves = x_BLHK.reshape(*x_BLHK.shape[:-1], 2, -1)
    # A flip and not a concatenation: XLA's CPU backend emits concatenations inside a fusion slowly.
    return x_BLHK * cos + jnp.flip(halves, -2).reshape(x_BLHK.shape) * sin


def _swiglu(project: Project, p: Params, x_BLD: jax.Array) -> jax.Array:
    gate, up = project.several(("mlp/gate", "mlp/up"), x_BLD, (p["gate"], p["up"]))
    return jax.nn.silu(gate) * up


def _relu2(project: Project, p: Params, x_BLD: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(project("mlp/up", x_BLD, p["up"])))


def _reglu2(project: Project, p: Params, x_BLD: jax.Array) -> jax.Array:
    gate, up = project.several(("mlp/gate", "mlp/up"), x_BLD, (p["gate"], p["up"]))
    return jnp.square(jax.nn.relu(gate)) * up


# (function to the inner activations [B, L, F], does it have a gate matrix)
MLPS: dict[str, tuple[Callable[[Project, Params, jax.Array], jax.Array], bool]] = {
    "swiglu": (_swiglu, True),
    "relu2": (_relu2, False),
    "reglu2": (_reglu2, True),  # the gated form of BitNet 2B4T
}
