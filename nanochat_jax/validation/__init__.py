"""What makes a setting invalid: values, and their combinations. Called by `config.resolve`.

Each check raises ConfigError with one sentence: what was expected, what was got, and where.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanochat_jax.validation.checks import ConfigError as ConfigError
from nanochat_jax.validation.checks import nearest as nearest
from nanochat_jax.validation.data import validate_data
from nanochat_jax.validation.model import FP4_BLOCK as FP4_BLOCK
from nanochat_jax.validation.model import QUANT_PRESETS as QUANT_PRESETS
from nanochat_jax.validation.model import layer_period as layer_period
from nanochat_jax.validation.model import validate_model
from nanochat_jax.validation.optimizer import GROUPS as GROUPS
from nanochat_jax.validation.optimizer import validate_opt
from nanochat_jax.validation.run import validate_mesh, validate_run

if TYPE_CHECKING:
    from nanochat_jax.config import Config


def validate(config: Config) -> None:
    """Check values and their combinations. Raises: ConfigError."""
    validate_model(config.model)
    validate_data(config.data)
    validate_opt(config.opt, config.train)
    validate_run(config)
    validate_mesh(config)
