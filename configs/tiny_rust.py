"""The tiny model on Rust sources found on this machine.

Data: toolchain sources, the cargo registry, Debian's rust-src and librust-*-dev trees; a message
says what to install when there are none.
Run: python -m nanochat_jax.train --config=configs/tiny_rust.py
"""

from nanochat_jax.config import BLOCKS, defaults, parse_arg


def get_config(arg: str = ""):
    preset = parse_arg(arg, preset="modern").preset
    config = defaults()
    config.name = "tiny_rust"
    config.model.update(BLOCKS[preset])
    config.model.mlp_dim = 1024 if config.model.mlp == "relu2" else 768
    config.model.quant = "ternary"
    config.data.source = "rust"
    config.eval.prompt = "fn "
    config.train.steps = 300
    return config
