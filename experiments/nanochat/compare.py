"""Tokens per second of our train step and of nanochat's, in blocks that take turns in one run.

Ours runs in this process, nanochat's in a child with its own interpreter (peer.py, protocol in
README.md): the two sets of dependencies never meet, and while one works the other sleeps.

    python experiments/nanochat/compare.py --nanochat=DIR --peer-python=VENV/bin/python
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the checkout that this file belongs to, installed or not

Runner = Callable[[int], dict[str, float]]  # steps -> {"seconds", "tokens", "loss"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanochat", type=Path, required=True, help="directory with nanochat/gpt.py")
    parser.add_argument("--peer-python", type=Path, required=True, help="interpreter that has torch")
    parser.add_argument("--preset", default="modern", help="block preset of config.BLOCKS")
    parser.add_argument("--quant", default="full", help="model.quant: full or ternary")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="model.unroll=2")
    parser.add_argument("--peer-args", default="", help="more arguments for peer.py, separated by spaces")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--blocks", type=int, default=12, help="blocks of each side that count")
    parser.add_argument("--steps", type=int, default=4, help="steps per block")
    parser.add_argument("--warmup", type=int, default=6, help="steps of each side before the clock starts")
    parser.add_argument(
        "--pause", type=float, default=0.3, help="seconds between blocks: threads go to sleep"
    )
    parser.add_argument(
        "--max-foreign", type=float, default=0.05, help="repeat a pair if others used more of the CPUs"
    )
    parser.add_argument("--wait", type=float, default=120, help="seconds in all to wait for quiet moments")
    parser.add_argument("--tries", type=int, default=4, help="at most so many times --blocks pairs")
    parser.add_argument("--out", type=Path, help="JSON file; default results/throughput-<quant>.json")
    return parser.parse_args()


def our_config(args: argparse.Namespace):
    """The model of the comparison: 4 layers, width 256, 4 heads, sequence 256, batch 8, relu^2."""
    from nanochat_jax import config

    settings = config.defaults()
    settings.model.update(config.BLOCKS[args.preset])
    settings.model.update(vocab_size=4096, dim=256, layers=4, heads=4, kv_heads=4, head_dim=64)
    settings.model.mlp_dim = 1024 if settings.model.mlp == "relu2" else 768
    settings.model.quant = args.quant
    settings.data.update(seq_len=256, batch=8)
    settings.train.steps = 1000
    for item in args.set:
        key, _, value = item.partition("=")
        group, _, last = key.rpartition(".")
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
        node = settings
        for part in filter(None, group.split(".")):
            node = node[part]
        node[last] = tuple(value) if isinstance(value, list) else value
    return config.resolve(settings)


def jax_block_runner(cfg, warmup: int) -> tuple[Runner, dict]:
    """Our side: the jitted train step of a run, fed and read as the training loop does.

    Returns: (runner, facts). The runner puts each batch on the device inside the clock, fetches the
    metrics of a step after the next is dispatched, and stops the clock when the last step is done.
    """
    import jax
    import numpy as np

    from nanochat_jax import cli, parallel

    cli.setup_runtime(cfg)
    from nanochat_jax.train import program

    # The same tokens as peer.py makes: default_rng(0), rows of L + 1.
    length = cfg.data.seq_len
    rows = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (16 * cfg.data.batch, length + 1))
    rows = rows.astype(np.int32).reshape(16, cfg.data.batch, length + 1)
    ones = np.ones((cfg.data.batch, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (cfg.data.batch, 1))
    parts = program.Parts(cfg)
    begin = time.perf_counter()
    state = parts.fresh(cfg.seed)
    done = 0

    def run(steps: int) -> dict[str, float]:
        nonlocal state, done
        start, before = time.perf_counter(), None
        for _ in range(steps):
            tokens = rows[done % len(rows)]
            arrays = {
                "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": ones.astype(np.float32),
                "segments": ones, "positions": positions,
            }  # fmt: skip
            state, metrics = parts.step(state, parallel.shard_batch(arrays, parts.mesh))
            if before is not None:
                jax.device_get(before)
            before, done = metrics, done + 1
        loss = float(jax.device_get(before)["loss/next_token"])
        jax.block_until_ready(state)
        return {
            "steps": steps, "seconds": time.perf_counter() - start,
            "tokens": steps * cfg.data.batch * length, "loss": loss,
        }  # fmt: skip

    run(warmup)
    facts = {"jax": jax.__version__, "numpy": np.__version__, "warmup_seconds": time.perf_counter() - begin}
    return run, facts


class Child:
    """peer.py in throughput mode."""

    def __init__(self, args: argparse.Namespace):
        command = [str(args.peer_python), str(HERE / "peer.py"), f"--nanochat={args.nanochat}", "throughput"]
        command += [f"--threads={args.threads}", f"--warmup={args.warmup}", *args.peer_args.split()]
        # Kept on disk only while it runs; its end is shown if it dies.
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, bufsize=1
        )
        self.facts = self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"peer.py ended with status {self.process.wait()}; its messages: {self.log.name}"
            )
        return json.loads(line)

    def run(self, steps: int) -> dict[str, float]:
        self.process.stdin.write(f"run {steps}\n")
        return self._read()

    def close(self) -> None:
        self.process.stdin.write("quit\n")
        self.process.wait()
        self.log.close()


def busy_seconds() -> float:
    """CPU time that the whole machine has spent working, or nan where Linux does not say."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return float("nan")
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def idle_share(seconds: float) -> float:
    """Share of all CPUs that nobody used during so many seconds of sleep."""
    before, start = busy_seconds(), time.perf_counter()
    time.sleep(seconds)
    used = (busy_seconds() - before) / ((time.perf_counter() - start) * (os.cpu_count() or 1))
    return 1.0 if math.isnan(used) else 1.0 - used


def process_seconds(pid: int) -> float:
    """CPU time of one process with all its threads."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def observed(run: Runner, steps: int, pid: int) -> dict[str, float]:
    """One block, with the share of all CPUs that neither of the two sides used meanwhile."""

    def others() -> float:
        return busy_seconds() - process_seconds(os.getpid()) - process_seconds(pid)

    before, start = others(), time.perf_counter()
    result = run(steps)
    share = (others() - before) / ((time.perf_counter() - start) * (os.cpu_count() or 1))
    return {
        "seconds": round(result["seconds"], 5),
        "tokens_per_second": round(result["tokens"] / result["seconds"], 1),
        "loss": round(result["loss"], 4),
        "foreign": round(share, 3),
    }


def summary(blocks: list[dict[str, float]]) -> dict[str, float]:
    rates = [block["tokens_per_second"] for block in blocks]
    return {"median": statistics.median(rates), "best": max(rates), "worst": min(rates)}


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this checkout, with '+' if files differ from it."""
    here = {"cwd": HERE, "capture_output": True, "text": True, "check": True}
    try:
        name = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **here).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **here).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changed else "")


def main() -> None:
    args = parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if hasattr(os, "sched_setaffinity") and args.threads < (os.cpu_count() or 1):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: args.threads]))  # the child inherits it
    (HERE / "results").mkdir(exist_ok=True)
    cfg = our_config(args)
    load_before = os.getloadavg()
    child = Child(args)
    ours, facts = jax_block_runner(cfg, args.warmup)

    kept: list[tuple[dict, dict]] = []
    seen: list[tuple[dict, dict]] = []
    patience = args.wait
    while len(kept) < args.blocks and len(seen) < args.tries * args.blocks:
        while patience > 0 and idle_share(0.5) < 1 - args.max_foreign:
            patience -= 0.5
        if patience <= 0 and len(seen) >= args.blocks:
            break
        order = (("ours", ours), ("nanochat", child.run))
        pair = {}
        for name, run in order if len(seen) % 2 == 0 else reversed(order):
            time.sleep(args.pause)
            pair[name] = observed(run, args.steps, child.process.pid)
        seen.append((pair["ours"], pair["nanochat"]))
        quiet = all(not block["foreign"] > args.max_foreign for block in seen[-1])
        if quiet:
            kept.append(seen[-1])
        print(
            f"ours {pair['ours']['tokens_per_second']:8.0f} tok/s   "
            f"nanochat {pair['nanochat']['tokens_per_second']:8.0f} tok/s   "
            f"others' CPU {max(b['foreign'] for b in seen[-1]):4.0%}{'' if quiet else '   not counted'}",
            file=sys.stderr,
        )
    child.close()

    enough = len(kept) >= min(3, args.blocks)
    used = kept if enough else seen
    result = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "ours": summary([a for a, _ in used]),
        "nanochat": summary([b for _, b in used]),
        "ratio_of_medians": 0.0,
        "median_of_ratios": statistics.median(
            a["tokens_per_second"] / b["tokens_per_second"] for a, b in used
        ),
        "quiet": enough,
        "pairs": {"used": len(used), "run": len(seen), "steps_per_block": args.steps},
        "machine": {
            "cpu": cpu_model(), "cpus": os.cpu_count(), "threads": args.threads, "system": platform.system(),
            "python": platform.python_version(), "load_before": load_before, "load_after": os.getloadavg(),
        },
        "our_commit": commit(),
        "our_facts": facts,
        "our_model": dataclasses.asdict(cfg.model),
        "our_train": {"batch": cfg.data.batch, "seq_len": cfg.data.seq_len, "loss": cfg.train.loss},
        "nanochat_facts": child.facts,
        "blocks": [{"ours": a, "nanochat": b} for a, b in seen],
    }  # fmt: skip
    result["ratio_of_medians"] = result["ours"]["median"] / result["nanochat"]["median"]
    out = args.out or HERE / "results" / f"throughput-{args.quant}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"ours {result['ours']['median']:.0f} tok/s, nanochat {result['nanochat']['median']:.0f} tok/s, "
        f"ratio {result['ratio_of_medians']:.2f} ({len(used)} pairs{'' if enough else ', machine not quiet'})"
    )


if __name__ == "__main__":
    main()
