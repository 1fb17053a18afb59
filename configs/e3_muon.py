"""Optimizer arm e3: the tiny run with plain Muon: float32 momentum of every matrix.

It is configs/tiny.py under another name: the arm that the others are compared with.
Run: python -m nanochat_jax.train --config=configs/e3_muon.py
"""

from nanochat_jax.cli import read_config


def get_config(arg: str = ""):
    config = read_config(f"tiny:{arg}")
    config.name = "e3_muon"
    return config
