"""Optimizer arm e3: the tiny run with Muon whose momentum is stored in 8 bits (arXiv:2509.23106).

State of the matrices: 1.03 bytes per parameter instead of 4.
Run: python -m nanochat_jax.train --config=configs/e3_muon_8bit.py
"""

from nanochat_jax.cli import read_config


def get_config(arg: str = ""):
    config = read_config(f"tiny:{arg}")
    config.name = "e3_muon_8bit"
    config.opt.matrix.state_bits = 8
    return config
