"""Optimizer arm e3: the tiny run with GaLore 2 over 8-bit Muon, rank 64 of 256.

State of the matrices: 0.8 bytes per parameter instead of 4, the projectors included.
Run: python -m nanochat_jax.train --config=configs/e3_galore2_muon_8bit.py
"""

from nanochat_jax.cli import read_config


def get_config(arg: str = ""):
    config = read_config(f"e3_galore2:{arg}")
    config.name = "e3_galore2_muon_8bit"
    config.opt.matrix.state_bits = 8
    return config
