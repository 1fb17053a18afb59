"""GaLore with Adam inside against galore-torch, over several refreshes.

Matrices of ours are [d_in, d_out], PyTorch's [d_out, d_in]: with each gradient transposed both
project the same side, also of square matrices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax.optim.galore import galore

torch = pytest.importorskip("torch", reason="extra 'interop'")
galore_torch = pytest.importorskip("galore_torch", reason="extra 'interop'")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

STEPS, GAP, RANK, SCALE, RATE = 20, 6, 5, 0.25, 0.01


def gradients(m, n):
    """Float32 gradients with separated singular values, which a refresh must tell apart."""
    rng = np.random.default_rng(0)
    values, r = 0.7 ** np.arange(min(m, n)), min(m, n)
    for _ in range(STEPS):
        u, _ = np.linalg.qr(rng.normal(size=(m, r)))
        v, _ = np.linalg.qr(rng.normal(size=(n, r)))
        yield np.asarray((u * values) @ v.T, np.float32)


def follow_signs(monkeypatch):
    """LAPACK's signs are arbitrary, and the reference keeps its moments across a refresh: give its
    new vectors ours, each along the old one it overlaps most, the first by their largest entry."""
    projector = galore_torch.galore_projector.GaLoreProjector
    plain = projector.get_orthogonal_matrix

    def signed(self, weights, rank, type):
        new = plain(self, weights, rank, type)
        rows = (new if type == "right" else new.T).double().numpy()
        old = self.ortho_matrix
        against = rows if old is None else rows @ (old if type == "right" else old.T).double().numpy().T
        largest = against[np.arange(rank), np.abs(against).argmax(axis=1)]
        signs = torch.tensor(np.where(largest < 0, -1.0, 1.0), dtype=new.dtype)
        return signs[:, None] * new if type == "right" else new * signs

    monkeypatch.setattr(projector, "get_orthogonal_matrix", signed)


@pytest.mark.parametrize(("m", "n"), [(12, 20), (20, 12), (12, 12)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_trajectory_of_galore_adamw(monkeypatch, m, n, decay):
    follow_signs(monkeypatch)
    start = np.random.default_rng(1).normal(size=(m, n)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start.T.copy()))
    group = {
        "params": [theirs], "rank": RANK, "update_proj_gap": GAP, "scale": SCALE, "proj_type": "std",
    }  # fmt: skip
    reference = galore_torch.GaLoreAdamW([group], lr=RATE, eps=1e-8, weight_decay=decay)

    ours = optax.chain(
        galore(optax.scale_by_adam(), RANK, GAP, SCALE, min_dim=8, method="exact", momentum="keep"),
        optax.scale_by_learning_rate(RATE),
    )
    update = jax.jit(ours.update)
    p = jnp.asarray(start)
    state = ours.init(p)
    for g in gradients(m, n):
        theirs.grad = torch.tensor(g.T.copy())
        reference.step()
        updates, state = update(jnp.asarray(g), state)
        p = (p + updates) * (1 - RATE * decay)  # the reference decays after the step
        np.testing.assert_allclose(p, theirs.detach().numpy().T, atol=1e-4)
    moved = np.linalg.norm(np.asarray(p) - start) / np.linalg.norm(start)
    assert moved > 0.005  # 50 times the tolerance
