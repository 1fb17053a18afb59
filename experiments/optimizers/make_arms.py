"""Write arms.json: every chain with the same grid of learning rates. python experiments/optimizers/make_arms.py"""

import json
from pathlib import Path

# A small model, so that 2,000 steps take a minute: real text, ternary, 2 layers of width 128.
BASE = [
    "--config=configs/tiny.py", "--config.model.vocab_size=1024", "--config.model.dim=128",
    "--config.model.layers=2", "--config.model.heads=2", "--config.model.kv_heads=2",
    "--config.model.mlp_dim=512", "--config.data.seq_len=128", "--config.train.steps=2000",
    "--config.eval.every_steps=500", "--config.eval.batches=64", "--config.eval.sample_tokens=0",
    "--config.log.every_steps=100", "--config.log.tensorboard=False",
    "--config.opt.embed.lr=0.03", "--config.opt.head.lr=0.004",
]  # fmt: skip
ADAMW = ["--config.opt.matrix.name=adamw", "--config.opt.matrix.beta1=0.9"]
EIGHT = ["--config.opt.matrix.state_bits=8"]
GALORE = [
    "--config.opt.galore.rank=32",
    "--config.opt.galore.min_dim=128",
    "--config.opt.galore.update_gap=100",
]
CHAINS = {
    "muon": [],
    "muon 8-bit": EIGHT,
    "normuon": ["--config.opt.matrix.name=normuon"],
    "galore(muon)": GALORE,
    "galore(muon 8-bit)": [*GALORE, *EIGHT],
    "galore 64 (muon 8-bit)": ["--config.opt.galore.rank=64", *GALORE[1:], *EIGHT],
    "foam 1 (muon)": ["--config.opt.foam.level=1"],
    "adamw": ADAMW,
    "adamw 8-bit": [*ADAMW, *EIGHT],
    "galore(adamw)": [*ADAMW, *GALORE],
    "foam 1 (adamw)": [*ADAMW, "--config.opt.foam.level=1"],
}
# Every chain begins with the middle two of its grid; a grid grows by factors of two, on the side where its best
# point lies, until that point is inside.
RATES = {False: (0.01, 0.02), True: (0.0025, 0.005)}  # of Muon's and of AdamW's chains
GROWN = {
    "muon": (0.005,), "normuon": (0.005,), "muon 8-bit": (0.04,), "galore(muon)": (0.04,),
    "galore(muon 8-bit)": (0.005, 0.0025), "galore 64 (muon 8-bit)": (0.005,), "foam 1 (muon)": (0.04,),
    "adamw": (0.00125, 0.000625), "adamw 8-bit": (0.00125, 0.000625), "galore(adamw)": (0.00125, 0.000625),
    "foam 1 (adamw)": (0.00125, 0.000625),
}  # fmt: skip

arms = {
    f"{name}, {rate}": [*extra, f"--config.opt.matrix.lr={rate}"]
    for name, extra in CHAINS.items()
    for rate in sorted((*RATES["adamw" in name], *GROWN.get(name, ())))
}
plan = {"base": BASE, "seeds": [0, 1, 2], "tune_on_first_seed": True, "arms": arms}
Path(__file__).with_name("arms.json").write_text(json.dumps(plan, indent=1) + "\n")
