"""Child of the kill tests: saves a state that is a function of the step, as fast as it can.

Run as `python checkpoint_child.py DIRECTORY`; prints each step whose commit it has waited for.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax.numpy as jnp
import numpy as np

from nanochat_jax.checkpoint import Checkpointer
from nanochat_jax.config import CkptConfig
from nanochat_jax.types import TrainState

CFG = CkptConfig(keep_last=3, keep_every_steps=10)


def state_of(step: int) -> TrainState:
    """4 MiB whose every value depends on the step."""
    rng = np.random.default_rng(step)
    values = jnp.asarray(rng.standard_normal((512, 1024), np.float32))
    return TrainState(jnp.int32(step), {"w": values}, {"m": values.astype(jnp.bfloat16), "v": 2 * values})


def main(directory: Path) -> None:
    with Checkpointer(CFG, directory) as checkpoints:
        first = (checkpoints.latest() or 0) + 1
        for step in range(first, first + 10_000):
            wait = step == first or step % 3 == 0
            checkpoints.save(step, state_of(step), {"step": step}, wait=wait)
            if wait:
                print(step, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
