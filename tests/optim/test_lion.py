"""Lion against optax."""

import jax.numpy as jnp
import numpy as np
import optax

from nanochat_jax.optim import lion


def test_equals_optax():
    ours, theirs = lion.lion(0.01, 0.9, 0.98, 0.1), optax.lion(0.01, 0.9, 0.98, weight_decay=0.1)
    rng = np.random.default_rng(0)
    a = b = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    state_a, state_b = ours.init(a), theirs.init(b)
    for _ in range(20):
        g = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
        updates, state_a = ours.update(g, state_a, a, loss=0.0)
        a = optax.apply_updates(a, updates)
        updates, state_b = theirs.update(g, state_b, b)
        b = optax.apply_updates(b, updates)
        np.testing.assert_array_equal(a, b)


def test_direction_is_the_sign_of_the_formula():
    tx = lion.scale_by_lion(0.9, 0.5)
    state = tx.init(jnp.zeros(3))
    updates, state = tx.update(jnp.array([2.0, -1.0, 0.0]), state)
    np.testing.assert_array_equal(updates, [1, -1, 0])
    # mu = (1, -0.5, 0); 0.9 mu + 0.1 g flips only where the new gradient is large enough
    updates, state = tx.update(jnp.array([-8.0, 5.0, -1.0]), state)
    np.testing.assert_array_equal(updates, [1, 1, -1])
