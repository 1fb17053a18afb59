"""One dial, depth: --config=configs/auto.py:d12 derives every other size, rate and length from it.

Argument: d<layers>, then any of ratio (tokens per weight), seq_len, e.g. :d12,ratio=20. The derivations are
printed on stderr. Rates and batch follow published rules of thumb from a reference of 12 layers; they are
starting points, not measurements.
"""

import sys

from nanochat_jax.config import BLOCKS, ConfigError, defaults, parse_arg

WIDE = 768  # widths from here on are multiples of 256, others of 128
REFERENCE_DIM = 768  # width at which the rates of the AdamW groups are the defaults


def get_config(arg: str = "d12"):
    depth, _, rest = (arg or "d12").partition(",")
    if not (depth.startswith("d") and depth[1:].isdigit() and 2 <= int(depth[1:]) <= 64):
        raise ConfigError(f"config argument '{depth}': expected d<layers> with 2 to 64 layers, such as d12")
    given = parse_arg(rest, ratio=20.0, seq_len=1024)
    layers = int(depth[1:])
    multiple = 128 if 64 * layers <= WIDE - 128 else 256
    dim = -(-64 * layers // multiple) * multiple
    heads, mlp_dim = dim // 128, 4 * dim
    matrices = layers * (4 * dim**2 + 2 * dim * mlp_dim)
    tokens = given.ratio * matrices
    # The critical batch grows about as the square root of the training tokens (arXiv:2410.21676).
    rows = max(1, round(2**19 / given.seq_len * (tokens / 1.7e9) ** 0.5))
    batch = 2 ** (rows.bit_length() - 1)
    steps = max(100, round(tokens / (batch * given.seq_len)))
    scale = (dim / REFERENCE_DIM) ** -0.5
    rate = (batch * given.seq_len / 2**19) ** 0.5
    warmup = max(10, steps // 50)

    config = defaults()
    config.name = f"auto_{depth}"
    m, o = config.model, config.opt
    m.update(BLOCKS["modern"])
    m.update(vocab_size=32768, dim=dim, layers=layers, heads=heads, kv_heads=heads, head_dim=128)
    m.update(mlp_dim=mlp_dim, quant="ternary", remat="block")
    config.data.update(source="rust", seq_len=given.seq_len, batch=batch, workers=8, prefetch=8)
    config.train.update(steps=steps, microbatches=max(1, batch // 16))
    o.matrix.lr = 0.02 * rate
    for group in (o.embed, o.head, o.scalar):
        group.lr = group.lr * scale * rate
    o.schedule.warmup_steps = warmup
    for line in (
        f"dim {dim} = 64 x {layers} layers, up to a multiple of {multiple} (256 from {WIDE} on); {heads} heads of 128",
        f"mlp_dim {mlp_dim} = 4 x dim; {matrices:,} weights in matrices",
        f"tokens {tokens:,.0f} = {given.ratio:g} per matrix weight",
        f"batch {batch} rows of {given.seq_len}: 2^19 tokens x sqrt(tokens / 1.7e9), down to a power of 2",
        f"steps {steps} = tokens / (batch x seq_len); warm-up {warmup} = 2 %",
        f"matrix lr {o.matrix.lr:.3g} = 0.02 x sqrt(batch tokens / 2^19)",
        f"embed lr {o.embed.lr:.3g}, head {o.head.lr:.3g}, scalar {o.scalar.lr:.3g}: the defaults x the same"
        f" x sqrt({REFERENCE_DIM} / dim)",
    ):
        sys.stderr.write(f"auto:{depth}: {line}\n")
    return config
