"""The same costs and steps through torch.utils.data.DataLoader: is the benchmark's stand-in for it fair?

Run with a Python that has torch, from the repository: python experiments/data/torch_loader.py
"""

import json
import statistics
import sys
import time
import warnings

import torch
from torch.utils.data import DataLoader, Dataset

from nanochat_jax.bench import data

warnings.filterwarnings("ignore", message=".*fork.*")


class Sleep(Dataset):
    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return len(self.seconds)

    def __getitem__(self, k):
        time.sleep(self.seconds[k])
        return k


def idle(kind, seed, steps=data.STEPS):
    """Idle shares (all, warm), as `nanochat_jax.bench.data.idle` counts them."""
    samples = Sleep(data.costs(kind, seed, steps * data.BATCH))
    loader = DataLoader(
        samples, data.BATCH, num_workers=data.WORKERS, prefetch_factor=2, multiprocessing_context="fork"
    )
    stream, waits, ends = iter(loader), [], []
    begun = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        next(stream)
        waits.append(time.perf_counter() - asked)
        time.sleep(data.STEP)
        ends.append(time.perf_counter())
    del stream
    warm = data.WARM_UP
    return sum(waits) / (ends[-1] - begun), sum(waits[warm:]) / (ends[-1] - ends[warm - 1])


def main():
    torch.set_num_threads(1)
    found = {}
    for kind in data.COSTS:
        runs = [idle(kind, seed) for seed in (0, 1, 2)]
        found[kind] = {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in zip(("all", "warm"), zip(*runs, strict=True), strict=True)
        }
        print(
            kind,
            {name: f"{100 * share['median']:.1f}%" for name, share in found[kind].items()},
            file=sys.stderr,
        )
    print(json.dumps({"torch": torch.__version__, "idle": found}, indent=1))


if __name__ == "__main__":
    main()
