"""Run karpathy/nanochat's own GPT and MuonAdamW from a checkout, as the other side of a comparison.

Nothing of nanochat is copied: the model, its initialization, the optimizer and its parameter groups
are imported. Only what its training script does around them (schedules, learning-rate scaling,
order of the step) is written anew here, for commit 92d63d4e of that repository. No jax.

    peer.py --nanochat=DIR throughput     blocks of steps on request; protocol in README.md
    peer.py --nanochat=DIR train ...      trains on given rows, reports bits per byte

The answers are JSON lines on stdout; everything that nanochat or torch prints goes to stderr.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

REFERENCE_BATCH_TOKENS = 2**19  # nanochat tunes its rates at 12 layers and scales them from there


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("throughput", "train"))
    parser.add_argument("--nanochat", type=Path, required=True, help="directory with nanochat/gpt.py")
    shape = parser.add_argument_group("model")
    shape.add_argument("--layers", type=int, default=4)
    shape.add_argument("--dim", type=int, default=256)
    shape.add_argument("--heads", type=int, default=4)
    shape.add_argument("--kv-heads", type=int, default=0, help="0 = as many as heads")
    shape.add_argument("--seq-len", type=int, default=256)
    shape.add_argument("--vocab-size", type=int, default=4096)
    shape.add_argument("--window-pattern", default="L", help="L = full attention, S = short window; tiled")
    shape.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    run = parser.add_argument_group("run")
    run.add_argument("--batch", type=int, default=8, help="rows per forward and backward pass")
    run.add_argument("--accumulate", type=int, default=1, help="passes per optimizer step")
    run.add_argument("--steps", type=int, default=0, help="length of the run; schedules span it")
    run.add_argument("--seconds", type=float, default=0.0, help="train: training time, excluding evaluation")
    run.add_argument(
        "--warmup", type=int, default=3, help="steps before the clock starts (train: then undone)"
    )
    run.add_argument("--threads", type=int, default=os.cpu_count())
    run.add_argument("--seed", type=int, default=42)
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    run.add_argument("--compile-mode", default="default", help="torch.compile mode of the model")
    run.add_argument("--profile", type=int, default=0, help="throughput: profile so many steps to stderr")
    data = parser.add_argument_group("data", "rows are L + 1 tokens: .npy, or any other suffix = raw uint16")
    data.add_argument("--train-rows", type=Path, help="read in order, from the start again when they run out")
    data.add_argument("--train-weights", type=Path, help=".npy [rows, L]; targets of weight 0 are ignored")
    data.add_argument("--val-rows", type=Path)
    data.add_argument("--val-weights", type=Path, help=".npy [rows, L]; targets of weight 0 are not scored")
    data.add_argument("--token-bytes", type=Path, help=".npy [V]: bytes per token, 0 = special, not scored")
    data.add_argument("--eval-every", type=int, default=0, help="steps between evaluations; 0 = at the end")
    data.add_argument("--eval-times", default="", help="also evaluate after so many training seconds: 30,60")
    recipe = parser.add_argument_group("recipe", "defaults of scripts/base_train.py")
    recipe.add_argument("--embedding-lr", type=float, default=0.3)
    recipe.add_argument("--unembedding-lr", type=float, default=0.008)
    recipe.add_argument("--matrix-lr", type=float, default=0.02)
    recipe.add_argument("--scalar-lr", type=float, default=0.5)
    recipe.add_argument("--weight-decay", type=float, default=0.28)
    recipe.add_argument("--warmup-steps", type=int, default=40)
    recipe.add_argument("--warmdown-ratio", type=float, default=0.65)
    recipe.add_argument("--final-lr-frac", type=float, default=0.05)
    recipe.add_argument("--param-data-ratio", type=float, default=12.0)
    recipe.add_argument(
        "--lr-scale", type=float, default=0.0, help="factor on all rates; 0 = its rule sqrt(batch / 2^19)"
    )
    args = parser.parse_args(argv)
    if args.mode == "train":
        missing = [k for k in ("train_rows", "val_rows", "token_bytes") if getattr(args, k) is None]
        if missing or not (args.steps or args.seconds):
            parser.error("train needs --train-rows, --val-rows, --token-bytes, and --steps or --seconds")
    args.kv_heads = args.kv_heads or args.heads
    args.step_tokens = args.batch * args.accumulate * args.seq_len
    return args


def prepare(args: argparse.Namespace):
    """Keep stdout for JSON, set the threads before torch starts, import nanochat. Returns the channel."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ["NANOCHAT_DTYPE"] = args.dtype
    if not (args.nanochat / "nanochat" / "gpt.py").is_file():
        raise SystemExit(f"--nanochat={args.nanochat}: expected a directory that contains nanochat/gpt.py")
    sys.path.insert(0, str(args.nanochat.resolve()))
    import torch

    torch.set_num_threads(args.threads)
    from nanochat import optim

    if not args.compile:  # its optimizer compiles its two step functions whatever the model does
        for name in ("adamw_step_fused", "muon_step_fused"):
            setattr(optim, name, getattr(optim, name)._torchdynamo_orig_callable)
    return channel


class Recipe:
    """The hyperparameters of nanochat's base_train.py at this size, and their schedules."""

    def __init__(self, args: argparse.Namespace, model, reference_model):
        def scaling_params(m) -> int:
            counts = m.num_scaling_params()
            return counts["transformer_matrices"] + counts["lm_head"]

        self.args = args
        batch_ratio = args.step_tokens / REFERENCE_BATCH_TOKENS
        self.lr_scale = args.lr_scale or math.sqrt(batch_ratio)
        horizon_ratio = scaling_params(reference_model) / scaling_params(model)
        self.weight_decay = args.weight_decay * math.sqrt(batch_ratio) * horizon_ratio
        self.horizon_tokens = int(args.param_data_ratio * scaling_params(model))
        self.rates = {
            name: getattr(args, name) * self.lr_scale
            for name in ("unembedding_lr", "embedding_lr", "matrix_lr", "scalar_lr")
        }

    def set(self, optimizer, step: int, total: float) -> float:
        """Write the step's values into the optimizer's groups; returns the learning-rate factor."""
        args = self.args
        down = round(args.warmdown_ratio * total)
        if step < args.warmup_steps:
            factor = (step + 1) / args.warmup_steps
        elif step <= total - down:
            factor = 1.0
        else:
            left = (total - step) / down
            factor = left + (1 - left) * args.final_lr_frac
        if step < 400:  # nanochat: this warm-up wins over the warm-down in short runs
            momentum = 0.85 + (0.97 - 0.85) * step / 400
        elif step >= total - down:
            momentum = 0.97 + (0.90 - 0.97) * (step - (total - down)) / down
        else:
            momentum = 0.97
        decay = self.weight_decay * 0.5 * (1 + math.cos(math.pi * step / total))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = momentum, decay
        return factor


class Peer:
    """nanochat's model and optimizer, and its training step."""

    def __init__(self, args: argparse.Namespace):
        import torch
        from nanochat.gpt import GPT, GPTConfig

        def meta(layers: int, dim: int, heads: int, kv_heads: int):
            config = GPTConfig(
                sequence_len=args.seq_len, vocab_size=args.vocab_size, n_layer=layers, n_head=heads,
                n_kv_head=kv_heads, n_embd=dim, window_pattern=args.window_pattern,
            )  # fmt: skip
            with torch.device("meta"):
                return GPT(config)

        torch.manual_seed(args.seed)
        self.args = args
        self.plain = meta(args.layers, args.dim, args.heads, args.kv_heads)
        self.plain.to_empty(device="cpu")
        self.plain.init_weights()
        mode = None if args.compile_mode == "default" else args.compile_mode
        self.model = torch.compile(self.plain, dynamic=False, mode=mode) if args.compile else self.plain
        # Its reference is depth 12 at 64 channels per layer, here with the same vocabulary.
        self.recipe = Recipe(args, self.plain, meta(12, 768, 6, 6))
        self.optimizer = self.plain.setup_optimizer(
            **self.recipe.rates, weight_decay=self.recipe.weight_decay
        )
        self.initial = {k: v.clone() for k, v in self.plain.state_dict().items()}

    def step(self, passes, number: int, total: float) -> float:
        """One optimizer step over `passes`, pairs of inputs and targets; returns the last loss in nats."""
        for x, y in passes:
            loss = self.model(x, y)
            (loss / len(passes)).backward()
        self.recipe.set(self.optimizer, number, total)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return loss.item()

    def reset(self) -> None:
        """Undo all training: initial weights, empty optimizer state."""
        self.plain.load_state_dict(self.initial)
        self.optimizer.state.clear()

    def bits_per_byte(self, rows: "Rows", token_bytes) -> tuple[float, float]:
        """(bits per byte, nats per scored token) over all rows; a short last batch is filled up."""
        import torch

        nats = tokens = size = 0.0
        self.model.eval()
        with torch.no_grad():
            for first in range(0, len(rows), self.args.batch):
                x, y = rows.batch(first, self.args.batch, wrap=False)
                nll = self.model(x, y, loss_reduction="none").view(-1).double()
                sizes = torch.where(y >= 0, token_bytes[y.clamp_min(0)], 0).view(-1)
                nats += float((nll * (sizes > 0)).sum())
                tokens += float((sizes > 0).sum())
                size += float(sizes.sum())
        self.model.train()
        return nats / math.log(2) / size, nats / tokens


class Rows:
    """Rows of L + 1 tokens with optional weights; order fixed by the file."""

    def __init__(self, rows, weights=None):
        self.rows, self.weights = rows, weights

    @classmethod
    def load(cls, path: Path, seq_len: int, weights: Path | None) -> "Rows":
        import numpy as np

        if path.suffix == ".npy":
            rows = np.load(path, mmap_mode="r")
        else:
            rows = np.memmap(path, np.uint16, "r").reshape(-1, seq_len + 1)
        if rows.ndim != 2 or rows.shape[1] != seq_len + 1:
            raise SystemExit(f"{path}: expected [rows, {seq_len + 1}], got {rows.shape}")
        mask = None if weights is None else np.load(weights, mmap_mode="r")
        if mask is not None and mask.shape != (len(rows), seq_len):
            raise SystemExit(f"{weights}: expected {(len(rows), seq_len)}, got {mask.shape}")
        return cls(rows, mask)

    @classmethod
    def random(cls, count: int, seq_len: int, vocab_size: int) -> "Rows":
        """Uniform tokens from numpy's default_rng(0), which any parent can make too."""
        import numpy as np

        return cls(np.random.default_rng(0).integers(0, vocab_size, (count, seq_len + 1)))

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, first: int, count: int, wrap: bool = True):
        """(inputs, targets) as int64 tensors; targets that do not count are -1, as nanochat expects."""
        import numpy as np
        import torch

        index = (first + np.arange(count)) % len(self)
        rows = np.asarray(self.rows[index], np.int64)
        targets = rows[:, 1:].copy()
        if self.weights is not None:
            targets[np.asarray(self.weights[index]) == 0] = -1
        if not wrap:
            targets[first + np.arange(count) >= len(self)] = -1
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets)

    def passes(self, step: int, args: argparse.Namespace) -> list:
        first = step * args.batch * args.accumulate
        return [self.batch(first + i * args.batch, args.batch) for i in range(args.accumulate)]


def describe(args: argparse.Namespace, peer: Peer, warmup_seconds: float) -> dict:
    """What ran, for the record."""
    import torch

    return {
        "event": "ready",
        "sources": {
            name: hashlib.sha256((args.nanochat / "nanochat" / name).read_bytes()).hexdigest()[:16]
            for name in ("gpt.py", "optim.py", "common.py", "flash_attention.py")
        },
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "threads": torch.get_num_threads(),
        "compile": args.compile_mode if args.compile else None,
        "warmup_seconds": round(warmup_seconds, 3),
        "step_tokens": args.step_tokens,
        "model": vars(peer.plain.config),
        "dtype": args.dtype,
        "params": {k: int(v) for k, v in peer.plain.num_scaling_params().items()},
        "flops_per_token": int(peer.plain.estimate_flops()),
        "recipe": {
            "lr_scale": peer.recipe.lr_scale,
            "weight_decay": peer.recipe.weight_decay,
            "horizon_tokens": peer.recipe.horizon_tokens,
            "warmup_steps": args.warmup_steps,
            "warmdown_ratio": args.warmdown_ratio,
            "final_lr_frac": args.final_lr_frac,
            "groups": [
                {k: v for k, v in g.items() if k not in ("params", "initial_lr")}
                | {"lr": g["initial_lr"], "shapes": [list(p.shape) for p in g["params"]]}
                for g in peer.optimizer.param_groups
            ],
        },
    }


def quiet_collector() -> None:
    """As nanochat does after its first step: no garbage collection between steps."""
    gc.collect()
    gc.freeze()
    gc.disable()


def throughput(args: argparse.Namespace, peer: Peer, channel) -> None:
    """Warm up, say ready, then run a block of steps for every line 'run K' on stdin; 'quit' or EOF ends."""
    if args.train_rows:
        rows = Rows.load(args.train_rows, args.seq_len, args.train_weights)
    else:
        rows = Rows.random(16 * args.batch * args.accumulate, args.seq_len, args.vocab_size)
    total = args.steps or 1000
    start = time.perf_counter()
    for done in range(args.warmup):
        peer.step(rows.passes(done, args), done, total)
    done = args.warmup
    quiet_collector()
    print(json.dumps(describe(args, peer, time.perf_counter() - start)), file=channel)
    if args.profile:
        profile(peer, rows, args)
    for line in sys.stdin:
        word, _, number = line.strip().partition(" ")
        if word == "quit":
            break
        if word != "run" or not number.isdigit():
            print(json.dumps({"error": f"expected 'run K' or 'quit', got {line.strip()!r}"}), file=channel)
            continue
        steps, begin = int(number), time.perf_counter()
        loss = float("nan")
        for _ in range(steps):
            loss = peer.step(rows.passes(done, args), done % total, total)
            done += 1
        seconds = time.perf_counter() - begin
        answer = {"steps": steps, "seconds": seconds, "tokens": steps * args.step_tokens, "loss": loss}
        print(json.dumps(answer), file=channel)


def profile(peer: Peer, rows: Rows, args: argparse.Namespace) -> None:
    """Print where the time of `args.profile` steps goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU]) as prof:
        for i in range(args.profile):
            peer.step(rows.passes(i, args), i, args.profile)
    print(prof.key_averages().table(sort_by="self_cpu_time_total", row_limit=40), file=sys.stderr)


def train(args: argparse.Namespace, peer: Peer, channel) -> None:
    """Train for --steps, or for --seconds of steps; evaluation and compilation are not counted.

    With --seconds the length of the run, which nanochat's schedules need, is estimated anew before
    each step from the time left and the mean step so far, so that they end where the time does.
    """
    import numpy as np
    import torch

    rows = Rows.load(args.train_rows, args.seq_len, args.train_weights)
    held_out = Rows.load(args.val_rows, args.seq_len, args.val_weights)
    token_bytes = torch.from_numpy(np.load(args.token_bytes).astype(np.int64))
    begin = time.perf_counter()
    times = []
    for i in range(max(args.warmup, 3)):
        first = time.perf_counter()
        peer.step(rows.passes(i, args), i, 1000)
        times.append(time.perf_counter() - first)
    peer.reset()  # training starts from the initial weights; this evaluation compiles the scoring
    initial, _ = peer.bits_per_byte(held_out, token_bytes)
    quiet_collector()
    ready = describe(args, peer, time.perf_counter() - begin)
    print(json.dumps(ready | {"initial_val_bpb": initial, "train_rows": len(rows)}), file=channel)

    marks = sorted(float(t) for t in args.eval_times.split(",") if t)
    seconds, step, guess, losses = 0.0, 0, min(times), []
    while True:
        mean = seconds / step if step >= 10 else guess
        total = step + max(args.seconds - seconds, 0.0) / mean if args.seconds else args.steps
        if args.seconds and args.steps:
            total = min(total, args.steps)
        finished = seconds + 0.5 * mean >= args.seconds if args.seconds else False
        finished = finished or bool(args.steps and step >= args.steps)
        due = bool(args.eval_every and step and step % args.eval_every == 0)
        while marks and seconds >= marks[0]:
            marks.pop(0)
            due = True
        if due or finished:
            bpb, nats = peer.bits_per_byte(held_out, token_bytes)
            report = {
                "event": "end" if finished else "eval", "step": step, "seconds": seconds,
                "tokens": step * args.step_tokens, "epochs": step * args.batch * args.accumulate / len(rows),
                "train_loss": sum(losses) / max(len(losses), 1), "val_bpb": bpb, "val_loss": nats,
            }  # fmt: skip
            print(json.dumps(report), file=channel)
            losses = []
        if finished:
            return
        # Gathering the rows is inside the clock on both sides: here nothing is prepared ahead.
        begin = time.perf_counter()
        losses.append(peer.step(rows.passes(step, args), step, max(total, 1.0)))
        seconds += time.perf_counter() - begin
        step += 1


def main() -> None:
    args = parse_args()
    channel = prepare(args)
    peer = Peer(args)
    with contextlib.suppress(BrokenPipeError):
        {"throughput": throughput, "train": train}[args.mode](args, peer, channel)


if __name__ == "__main__":
    main()
