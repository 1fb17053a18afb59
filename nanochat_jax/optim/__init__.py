"""Optimizers as optax transforms; each usable alone under chain, masked and partition.

The files name their subject: muon, normuon, lion (directions); quantized, galore, foam (wrappers of a
direction); fire, skip (wrappers of a complete transform); schedules; memory; build (settings to one chain).
"""

from nanochat_jax.optim.build import OPTIMIZERS as OPTIMIZERS
from nanochat_jax.optim.build import OUTER as OUTER
from nanochat_jax.optim.build import WRAPPERS as WRAPPERS
from nanochat_jax.optim.build import build as build
from nanochat_jax.optim.build import labels as labels
from nanochat_jax.optim.build import learning_rates as learning_rates
from nanochat_jax.optim.memory import state_bytes as state_bytes
from nanochat_jax.optim.muon import scale_by_muon as scale_by_muon
from nanochat_jax.optim.schedules import check_extension as check_extension
from nanochat_jax.optim.skip import metrics as metrics
