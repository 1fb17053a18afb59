"""Learning-rate factors: functions of the update count, in [0, 1], that multiply every peak rate.

`kind` names the form: "wsd" (warm-up, stable, decay: a trapezoid), "cosine" and "linear" (which
decay from the end of the warm-up on; the cosine in `cycles` equal descents with warm restarts,
arXiv:1608.03983). The first update already moves, by 1 / warmup of the peak;
the floor is reached at step `steps`, one past the last update, and kept after it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nanochat_jax.config import ScheduleConfig

Factor = Callable[[jax.typing.ArrayLike], jax.Array]

# Share of the way down that is left when a fraction x of the decay has passed: 1 at 0, 0 at 1.
SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + jnp.cos(jnp.pi * x)),
    "sqrt": lambda x: 1.0 - jnp.sqrt(x),
}


def schedule(cfg: ScheduleConfig, steps: int) -> Factor:
    """The factor over a run of `steps` updates.

    With w warm-up steps, d decay steps and s = steps - w - d, step t gives (t + 1) / w below w,
    then 1, then floor + (1 - floor) * shape((t - w - s) / d), and the floor from `steps` on.

    Args:
        cfg: kind, warm-up, decay and floor.
        steps: updates of the whole run, >= 1.

    Returns: traceable function of an integer step (scalar or array) -> float32 in [0, 1].
    Raises: ValueError if warm-up and decay together exceed the run, or for an unknown name.

    >>> factor = schedule(ScheduleConfig(warmup_steps=4, decay_fraction=0.5, floor=0.1), 20)
    >>> [round(float(factor(t)), 2) for t in (0, 3, 9, 15, 20)]
    [0.25, 1.0, 1.0, 0.55, 0.1]
    """
    warmup = cfg.warmup_steps
    decays = {
        "wsd": (round(cfg.decay_fraction * steps), cfg.decay_shape),
        "cosine": (steps - warmup, "cosine"),
        "linear": (steps - warmup, "linear"),
    }
    if cfg.kind not in decays or cfg.decay_shape not in SHAPES:
        raise ValueError(
            f"no schedule '{cfg.kind}' with shape '{cfg.decay_shape}'; known kinds: {', '.join(decays)}, "
            f"shapes: {', '.join(SHAPES)}"
        )
    decay, shape = decays[cfg.kind]
    start = steps - decay
    if warmup > start:
        raise ValueError(f"{warmup} warm-up and {decay} decay steps exceed the run of {steps} steps")

    def factor(step: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(step, jnp.int32)
        rise = (t + 1).astype(jnp.float32) / max(warmup, 1)
        passed = jnp.clip((t - start).astype(jnp.float32) / max(decay, 1), 0.0, 1.0)
        if cfg.cycles > 1:
            passed = jnp.where(t >= steps, 1.0, passed * cfg.cycles % 1.0)
        fall = cfg.floor + (1.0 - cfg.floor) * SHAPES[shape](passed)
        inside = jnp.where(t < warmup, rise, fall)
        return jnp.where(t >= steps, jnp.float32(cfg.floor), inside)

    return factor


def decay_to_zero(steps: int) -> Factor:
    """Cosine from 1 at step 0 to 0 at step `steps` and after: the factor of a vanishing weight decay."""

    def factor(step: jax.typing.ArrayLike) -> jax.Array:
        passed = jnp.asarray(step, jnp.int32).astype(jnp.float32) / steps
        return SHAPES["cosine"](jnp.clip(passed, 0.0, 1.0))

    return factor


def rewarmed(factor: Factor, last: float, at_step: int, rewarm_steps: int) -> Factor:
    """The factor of an extended run: a straight climb from the last factor used back to the schedule.

    Args:
        factor: schedule of the extended run.
        last: factor of update at_step - 1, see `check_extension`.
        at_step: first update of the extension.
        rewarm_steps: length of the climb; its last step is on the schedule. 0 = no climb.

    Returns: function equal to `factor` outside the climb.
    """
    if rewarm_steps == 0:
        return factor

    def climbing(step: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(step, jnp.int32)
        target = factor(t)
        climbed = jnp.clip((t - at_step + 1).astype(jnp.float32) / rewarm_steps, 0.0, 1.0)
        mixed = (1.0 - climbed) * last + climbed * target
        return jnp.where((t >= at_step) & (t < at_step + rewarm_steps - 1), mixed, target)

    return climbing


def check_extension(cfg: ScheduleConfig, old_steps: int, new_steps: int, at_step: int) -> float:
    """Refuse to continue a decayed run at a learning rate that jumps up.

    Measured elsewhere: extending a finished run under the same schedule, without a climb, raised
    the rate tenfold and destroyed the model.

    Args:
        cfg: schedule of both runs.
        old_steps, new_steps: `train.steps` of the run so far and of the extension.
        at_step: updates done so far: the first update of the extension.

    Returns: the last factor used, `start_factor` of `build`.
    Raises: ValueError if the factor would jump and cfg.rewarm_steps is 0.
    """
    old, new = schedule(cfg, old_steps), schedule(cfg, new_steps)
    last = float(old(max(at_step - 1, 0)))
    planned = max(last, float(old(at_step)))  # a warm-up still under way may go on
    wanted = float(new(at_step))
    if at_step > 0 and wanted > planned * (1 + 1e-5) and cfg.rewarm_steps == 0:
        raise ValueError(
            f"extending the run from {old_steps} to {new_steps} steps would make the learning rate jump "
            f"from {last:.4g} to {wanted:.4g} of its peak at step {at_step}; set "
            "opt.schedule.rewarm_steps to the number of steps for the climb"
        )
    return last
