"""Held-out bits per byte of nanochat's recipe on exactly the tokens that our tiny run sees.

    python experiments/nanochat/quality.py --nanochat=DIR --peer-python=VENV/bin/python

Writes the rows of configs/tiny.py (same order, same held-out rows, same targets left out) to a
temporary directory, lets peer.py train on them once per learning-rate scale and seed, and appends one line
per run to results/quality.jsonl. Our side is `experiments/blocks` with the same seeds. Runs that have
a line are skipped.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the checkout that this file belongs to, installed or not

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from nanochat_jax import cli  # noqa: E402
from nanochat_jax.config import padded_vocab, resolve  # noqa: E402
from nanochat_jax.data import pipeline, shards  # noqa: E402

EVAL_BATCHES = 64  # as experiments/blocks/arms.json


def write_rows(steps: int, seed: int, directory: Path) -> None:
    """train.npy, train_weights.npy, val.npy, val_weights.npy, token_bytes.npy of configs/tiny.py."""
    settings = cli.read_config(str(HERE.parents[1] / "configs" / "tiny.py"))
    settings.seed = seed
    cfg = resolve(settings)
    corpus = shards.prepare(cfg.data, cfg.model.vocab_size, cli.cache_home() / "tokens", print)
    batches = [pipeline.batch_at(cfg.data, corpus, seed, step) for step in range(steps)]
    for name, parts in (("train", batches), ("val", pipeline.val_batches(cfg.data, corpus, EVAL_BATCHES))):
        tokens, targets, weights = (
            np.concatenate([part[field] for part in parts]) for field in ("tokens", "targets", "weights")
        )
        np.save(directory / f"{name}.npy", np.concatenate([tokens, targets[:, -1:]], 1).astype(np.uint16))
        np.save(directory / f"{name}_weights.npy", weights)
    sizes = corpus.tokenizer.token_bytes(padded_vocab(cfg.model))
    np.save(directory / "token_bytes.npy", sizes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanochat", type=Path, required=True, help="directory with nanochat/gpt.py")
    parser.add_argument("--peer-python", type=Path, required=True, help="interpreter that has torch")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--lr-scales", type=float, nargs="+", default=[0.0625, 0.125, 0.25, 0.5], help="0.0625 is its rule"
    )
    args = parser.parse_args()
    record = HERE / "results" / "quality.jsonl"
    record.parent.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    done = {(line["seed"], line["lr_scale"], line["step"]) for line in lines}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as temporary:
            rows = Path(temporary)
            write_rows(args.steps, seed, rows)
            for scale in args.lr_scales:
                if (seed, scale, args.steps) in done:
                    continue
                command = [
                    str(args.peer_python), str(HERE / "peer.py"), f"--nanochat={args.nanochat}", "train",
                    f"--train-rows={rows / 'train.npy'}", f"--train-weights={rows / 'train_weights.npy'}",
                    f"--val-rows={rows / 'val.npy'}", f"--val-weights={rows / 'val_weights.npy'}",
                    f"--token-bytes={rows / 'token_bytes.npy'}", f"--steps={args.steps}",
                    f"--lr-scale={scale}", f"--seed={seed}",
                ]  # fmt: skip
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                end = next(e for e in map(json.loads, output.splitlines()) if e["event"] == "end")
                with record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"seed": seed, "lr_scale": scale, **end}) + "\n")
                print(f"seed {seed}, scale {scale}: {end['val_bpb']:.4f} bits per byte", file=sys.stderr)


if __name__ == "__main__":
    main()
