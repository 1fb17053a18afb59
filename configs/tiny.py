"""A ternary model of 7 M weights that trains on a laptop CPU in a few minutes.

Data: the Python standard library's own sources (about 31 MB, always there).
Run: python -m nanochat_jax.train --config=configs/tiny.py
Argument: preset=modern|portable|seed, e.g. --config=configs/tiny.py:preset=portable
"""

from nanochat_jax.config import BLOCKS, defaults, parse_arg


def get_config(arg: str = ""):
    preset = parse_arg(arg, preset="modern").preset
    config = defaults()
    config.name = "tiny"
    config.model.update(BLOCKS[preset])
    config.model.mlp_dim = 1024 if config.model.mlp == "relu2" else 768
    config.model.quant = "ternary"
    if preset == "modern":  # tuned, see experiments/rates; other presets have tables of another size
        config.opt.embed.lr, config.opt.head.lr = 0.2, 0.008
    config.train.steps = 300
    return config
