"""Compile the three machines' steps for fake devices and count what these would send one another.

    XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0" \
        python experiments/plan/exchange.py [case ...]

A case is `config_b:loop on data 2`, the whole step, or `gradients of config_b:loop on data 2`, without the
optimizer, which takes most of the time to compile. Nothing is allocated: weights and rows are abstract. Writes traffic.json beside this file, and prints the table.
"""

import functools
import json
import sys
import time
from pathlib import Path

import jax

from nanochat_jax import cli, parallel
from nanochat_jax.config import Config
from nanochat_jax.plan import collectives, fit, report, traffic
from nanochat_jax.train import program
from nanochat_jax.train import step as steps

GRADIENTS = "gradients of "
RESULTS = Path(__file__).with_name("traffic.json")
MESHES = {
    "1": {}, "data 2": {"data": 2}, "fsdp 2": {"fsdp": 2}, "tensor 2": {"tensor": 2}, "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8}, "data 2, fsdp 4": {"data": 2, "fsdp": 4}, "2 x 2 x 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "data 2, bfloat16": {"data": 2, "reduce_dtype": "bfloat16"},
    "fsdp 2, bfloat16": {"fsdp": 2, "reduce_dtype": "bfloat16"},
}  # fmt: skip


def case(name: str) -> Config:
    """`config_b:loop on data 2`: the config on a mesh, with as few microbatches more rows as the mesh needs."""
    reference, mesh = name.removeprefix(GRADIENTS).split(" on ")
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "reduce_dtype": "float32"} | MESHES[mesh]
    cfg = fit.changed(cli.get_config(reference), {f"mesh.{key}": value for key, value in sizes.items()})
    shards = cfg.mesh.data * cfg.mesh.fsdp
    while (cfg.data.batch // cfg.train.microbatches) % shards:
        cfg = fit.changed(cfg, {"train.microbatches": cfg.train.microbatches // 2})
    return cfg


def compile_gradients(cfg: Config) -> dict:
    """What `report.compile_step` gives, of the gradients of all microbatches alone."""
    parts = program.Parts(fit.changed(cfg, {"model.unroll": 1}))
    accumulate = functools.partial(
        steps._accumulate, jax.value_and_grad(parts.loss_fn, has_aux=True), cfg.train.microbatches
    )
    run = parallel.over_rows(parts.mesh, parts.specs, cfg.mesh.reduce_dtype)(accumulate)
    layout = parallel.batch_sharding(parts.mesh)
    step = jax.jit(
        run, in_shardings=(parts.layout.params, layout, None), out_shardings=(None, parts.layout.params)
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = step.lower(parts.target.params, program.batch_shapes(cfg), key).compile()
    analysis = compiled.memory_analysis()
    every, sometimes = collectives.exchanged(compiled.as_text(), parts.mesh.size)
    return {
        "arguments": analysis.argument_size_in_bytes, "temporary": analysis.temp_size_in_bytes,
        "traffic": every, "sometimes": sometimes,
        "expected": traffic.added(traffic.gradients(cfg), traffic.activations(cfg, "cpu")),
    }  # fmt: skip


def main(names: list[str]) -> None:
    """Compile the named cases and print the table of all."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names:
        cfg, start = case(name), time.perf_counter()
        made = compile_gradients(cfg) if name.startswith(GRADIENTS) else report.compile_step(cfg)
        keep = ("arguments", "temporary", "traffic", "sometimes", "expected")
        known[name] = {"microbatches": cfg.train.microbatches} | {key: made[key] for key in keep}
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(table(known))


def table(known: dict) -> str:
    """Markdown: GB that each device sends per step, by kind, and the closed form's."""
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    lines = [
        f"| config on mesh | microbatches | {' | '.join(kinds)} | all | closed form | refresh |",
        "|---|---|" + "---|" * (len(kinds) + 3),
    ]
    for name, found in known.items():
        cells = [f"{found['traffic'].get(kind, 0) / 1e9:.2f}" for kind in kinds]
        total, expected = (sum(found[key].values()) for key in ("traffic", "expected"))
        off = (
            ""
            if not total
            else " (exact)"
            if abs(expected / total - 1) < 1e-5
            else f" ({expected / total - 1:+.1%})"
        )
        rest = f"{sum(found['sometimes'].values()) / 1e9:.2f}"
        lines.append(
            f"| {name} | {found['microbatches']} | {' | '.join(cells)} | {total / 1e9:.2f} | "
            f"{expected / 1e9:.2f}{off} | {rest} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
