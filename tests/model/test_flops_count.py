"""The closed formula of what a step costs against XLA's own count of the unrolled program, to 5%: the whole,
and for techniques of the model what they add to it. Traced and lowered, not compiled: nothing runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from nanochat_jax import losses
from nanochat_jax import params as params_lib
from nanochat_jax.config import FilterConfig, Fp4Config, LoopConfig, MhcConfig, ModelConfig, MtpConfig
from nanochat_jax.model import flops, transformer
from nanochat_jax.types import Batch

B, L = 1, 128
BASE = ModelConfig(
    vocab_size=1024, dim=512, layers=2, heads=4, kv_heads=4, head_dim=128, mlp_dim=1024, dtype="float32"
)
NEXT = (("next_token", 1.0),)
GATED = LoopConfig(3, after=1, gate="shared")
EXIT = (("exit", 1.0), ("exit_entropy", 0.1))
# technique -> (settings, terms of the loss)
ADDED = {
    "loops": ({"loop": LoopConfig(2, True, 1, 1, "linear")}, NEXT),
    "exits": ({"loop": GATED}, EXIT),
    "sampled exits": ({"loop": dataclasses.replace(GATED, readout="sampled")}, EXIT),
    "chained": ({"mtp": MtpConfig(2)}, (*NEXT, ("mtp", 0.2))),
    "parallel": ({"mtp": MtpConfig(2, "parallel")}, (*NEXT, ("mtp", 0.2))),
    "2 streams": ({"mhc": MhcConfig(2, "permutation")}, NEXT),
    "3 streams, narrower": ({"mhc": MhcConfig(3, iterations=3), "dim": 256}, NEXT),
    "4 streams": ({"mhc": MhcConfig(4, iterations=3)}, NEXT),
    "recomputed": ({"remat": "block"}, NEXT),
    "filter": ({"filter": FilterConfig(0.5, "random")}, NEXT),
}
WHOLE = {
    "plain": ({}, NEXT),
    "ternary": ({"quant": "ternary"}, NEXT),
    "fp8": ({"quant": "fp8"}, NEXT),
    "fp4 gradients": ({"quant": "nvfp4_grad"}, NEXT),
    "fp4 gradients, rotated both": (
        {"quant": "mxfp4_grad", "fp4": Fp4Config(rotated="both", hadamard=32, stochastic="both")}, NEXT,
    ),
    "fp4": ({"quant": "nvfp4"}, NEXT),
    "ternary and fp4": ({"quant": "ternary_mxfp4"}, NEXT),
    "by module": ({"quant": "fp8_nvfp4"}, NEXT),
}  # fmt: skip
FAST = ("loops", "4 streams", "fp4 gradients")


@functools.cache
def counted(cfg, terms):
    """FLOPs per token of loss and gradient, by XLA. Scans are written out, because it counts a body once."""
    shapes = jax.eval_shape(lambda: params_lib.init_params(transformer.param_specs(cfg), jax.random.key(0)))
    ints = jax.ShapeDtypeStruct((B, L), jnp.int32)
    batch = Batch(ints, ints, jax.ShapeDtypeStruct((B, L), jnp.float32), ints, ints)  # type: ignore[arg-type]
    gradient = jax.jit(jax.grad(losses.make_loss(cfg, terms, B * L), has_aux=True))
    scan = jax.lax.scan

    def unrolled(f, init, xs=None, length=None, reverse=False, unroll=1):
        return scan(f, init, xs, length, reverse, unroll=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "scan", unrolled)
        return gradient.lower(shapes, batch, jax.random.key(0)).cost_analysis()["flops"] / (B * L)  # type: ignore[index]


def marked(table):
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in table]


@pytest.mark.parametrize("name", marked(WHOLE))
def test_the_whole_step(name):
    changes, terms = WHOLE[name]
    cfg = dataclasses.replace(BASE, **changes)
    assert flops.executed_per_token(cfg, L, B * L) == pytest.approx(counted(cfg, terms), rel=0.05)


@pytest.mark.parametrize("name", marked(ADDED))
def test_what_a_technique_adds(name):
    changes, terms = ADDED[name]
    cfg = dataclasses.replace(BASE, **changes)
    plain = dataclasses.replace(BASE, dim=cfg.dim)
    ours = flops.executed_per_token(cfg, L, B * L) - flops.executed_per_token(plain, L, B * L)
    assert ours == pytest.approx(counted(cfg, terms) - counted(plain, NEXT), rel=0.05)


def test_without_a_technique_the_step_runs_what_counts_for_speed():
    assert flops.executed_per_token(BASE, L, B * L) == flops.train_flops_per_token(BASE, L)
