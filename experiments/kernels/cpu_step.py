"""CPU time of a whole train step in several precisions, which take turns in one process.

The model is the one of experiments/nanochat (4 layers of 256, 2,048 tokens). CPU time, not wall time: a
shared machine may stop the process, but seldom makes it work more.

    python experiments/kernels/cpu_step.py full ternary ternary_int8
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments" / "nanochat")]

import compare  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("quant", nargs="+", help="values of model.quant")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each that count")
    parser.add_argument("--steps", type=int, default=3, help="steps per block")
    args = parser.parse_args()

    def runner(quant: str):
        cfg = compare.our_config(argparse.Namespace(preset="modern", quant=quant, set=[]))
        return compare.jax_block_runner(cfg, 2)[0]

    runners = {quant: runner(quant) for quant in args.quant}
    spent: dict[str, list[float]] = {quant: [] for quant in args.quant}
    for _ in range(args.blocks):
        for quant, run in runners.items():
            before = time.process_time()
            run(args.steps)
            spent[quant].append(1e3 * (time.process_time() - before) / args.steps)

    import jax

    from nanochat_jax.kernels import integer

    print(f"jax {jax.__version__}, integers carried by {integer.preferred()}")
    for quant, each in spent.items():
        print(f"{quant}: CPU ms per step: median {statistics.median(each):.0f}, least {min(each):.0f}")


if __name__ == "__main__":
    main()
