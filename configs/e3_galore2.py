"""Optimizer arm e3: the tiny run with GaLore 2 over Muon (arXiv:2504.20437), rank 64 of 256.

State of the matrices: 1.5 bytes per parameter instead of 4, the projectors included.
Run: python -m nanochat_jax.train --config=configs/e3_galore2.py
"""

from nanochat_jax.cli import read_config


def get_config(arg: str = ""):
    config = read_config(f"tiny:{arg}")
    config.name = "e3_galore2"
    config.opt.galore.rank = 64
    return config
