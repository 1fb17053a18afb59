"""The plan of a run as a record, and as text for people."""

import contextlib
import dataclasses
import time
from typing import Any

from nanochat_jax.config import Config, layer_period
from nanochat_jax.model import loop, transformer
from nanochat_jax.plan import collectives, fit, memory, speed, traffic
from nanochat_jax.plan.devices import DEVICES, GIB, USABLE
from nanochat_jax.telemetry.console import si

# Speeds once published for the three machines, tokens/s (the kind of the config's name -> figure).
PUBLISHED = {"config_a": 20_000, "config_b": 24_000, "config_c": 18_000}
CARDS = {"config_a": "rtxpro6000", "config_b": "rtx4090", "config_c": "rtx4090"}


def plan(cfg: Config, device: str, fit_text: str = "", compiled: bool = False) -> dict[str, Any]:
    """Everything that can be said before a run. JSON-able.

    Args: device: a name in DEVICES. fit_text: memory of each device to fit, such as 24GiB; "" = the device's.
    compiled: also compile the step, for XLA's own figures.
    Raises: ConfigError for a bad size; ValueError if a weight does not divide over the mesh.
    """
    card = DEVICES[device]
    platform = "cpu" if device == "cpu" else "gpu"
    limit = fit.parse_bytes(fit_text) if fit_text else round(USABLE * card.memory)
    predicted = memory.predict(cfg, platform)
    change = fit.smallest_change(cfg, limit, card, platform)
    record: dict[str, Any] = {
        "config": cfg.name, "device": device, "devices": cfg.mesh.data * cfg.mesh.fsdp * cfg.mesh.tensor,
        "parameters": transformer.counts(cfg.model), "loops": cfg.model.loop.count,
        "layers": loop.layers_text(cfg.model),
        "memory": dataclasses.asdict(predicted) | {"peak": predicted.peak, "temporary": predicted.temporary},
        "speed": dataclasses.asdict(speed.predict(cfg, card)),
        "traffic": traffic.predict(cfg, platform), "link": card.link,
        "limit": limit, "fits": predicted.peak <= limit, "change": change,
        "sentence": fit.sentence(change) + ("" if change is not None else fit.more_devices(cfg, limit, platform)),
    }  # fmt: skip
    published = next((name for name in PUBLISHED if cfg.name.startswith(name)), None)
    if published and device == CARDS[published]:
        record["published_tokens_per_second"] = PUBLISHED[published]
    if compiled:
        record["xla"] = compile_step(cfg, device)
    return record


def compile_step(cfg: Config, device: str = "cpu") -> dict[str, Any]:
    """XLA's memory analysis of the compiled step, and its collectives, with abstract arrays: nothing is allocated.

    Compiled for the named card, if it is not here but its compiler is (`kernels.card`), else for this platform.
    Layers run in a scan, as on a GPU, also where a CPU would run them all at once.
    Returns: "for", the card's name or the platform, and "instead", why it is not the card; "seconds" of compiling;
    bytes of arguments, temporaries and both, and the predicted peak there; "traffic", what each device sends in a
    step by kind, "sometimes" beyond it, and what is "expected" in this dtype.
    Raises: ValueError if the platform's compiler has no memory analysis.
    """
    from nanochat_jax.kernels import card, dispatch
    from nanochat_jax.train import program

    if not cfg.model.unroll:
        cfg = fit.changed(cfg, {"model.unroll": layer_period(cfg.model)})
    wanted = device in card.CARDS and dispatch.backend() == "cpu"
    instead = card.missing() if wanted else "" if device == dispatch.backend() else "a GPU is here"
    away = wanted and not instead
    count, began = cfg.mesh.data * cfg.mesh.fsdp * cfg.mesh.tensor, time.perf_counter()
    with card.aimed(device, count) if away else contextlib.nullcontext() as devices:
        parts, backend = program.Parts(cfg, devices=devices), dispatch.backend()
        if away:
            compiled = card.compiled(
                parts.step, parts.target, program.batch_shapes(cfg, parts.mesh), mesh=parts.mesh, spills=True
            )
        else:
            compiled = parts.step.lower(parts.target, program.batch_shapes(cfg)).compile()
    analysis, seconds = compiled.memory_analysis(), time.perf_counter() - began
    if analysis is None:
        raise ValueError(f"no memory analysis on platform {backend}")
    arguments, temporary = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    every, sometimes = collectives.exchanged(compiled.as_text(), parts.mesh.size)
    return {
        "for": device if away else backend, "instead": instead, "seconds": round(seconds, 1),
        "arguments": arguments, "temporary": temporary, "peak": arguments + temporary,
        "predicted": memory.predict(cfg, backend).peak,
        "traffic": every, "sometimes": sometimes, "expected": traffic.predict(cfg, backend),
    }  # fmt: skip


def text(record: dict[str, Any]) -> str:
    """The plan for people."""
    p, m, s = record["parameters"], record["memory"], record["speed"]
    lines = [
        f"{record['config']} on {record['devices']} x {record['device']}",
        f"parameters   {si(p['unique'])} unique, {si(p['unrolled'])} unrolled ({record['layers']}: compute "
        f"like that many, stored once), of which {si(p['tables'])} in tables",
        "memory of each device, GiB:",
    ]
    notes = {
        "parameters": "float32, exact", "optimizer": "exact", "batch": "exact", "gradients": "float32, exact",
        "accumulated": "gradients of microbatches and further loops", "activations": "saved for the backward pass",
        "layer": "one layer's backward", "logits": "of one chunk", "edges": "embedding, hidden states, head, masks",
    }  # fmt: skip
    lines += [f"  {name:<12} {m[name] / GIB:8.2f}  {note}" for name, note in notes.items()]
    phase = max(m["phases"], key=m["phases"].get)
    lines += [
        f"  {'temporary':<12} {m['temporary'] / GIB:8.2f}  at the fullest moment: {phase}",
        f"  {'peak':<12} {m['peak'] / GIB:8.2f}  of {record['limit'] / GIB:.2f}: {record['sentence']}",
    ]
    if xla := record.get("xla"):
        off = xla["predicted"] / xla["peak"] - 1
        lines.append(
            f"  {'compiled':<12} {xla['peak'] / GIB:8.2f}  by XLA for {xla['for']}: arguments "
            f"{xla['arguments'] / GIB:.2f}, temporary {xla['temporary'] / GIB:.2f}; predicted for it "
            f"{xla['predicted'] / GIB:.2f} ({off:+.1%})" + f"; {xla['instead']}" * bool(xla["instead"])
        )
    lines += _exchange(record)
    lines += [
        f"work         {si(s['flops_per_token'])} FLOPs per token, {si(s['tokens_per_step'])} tokens per step",
        f"speed        {si(s['tokens_per_second'])} tokens/s expected, {s['mfu']:.0%} MFU, "
        f"{s['seconds_per_step']:.2f} s per step (roofline at {speed.EFFICIENCY:.0%} of the peak, unmeasured)",
        f"ceiling      {si(s['ceiling'])} tokens/s at 100 % of the peak",
        f"run          {s['hours']:,.0f} hours, {s['kilowatt_hours']:,.0f} kWh of the accelerators",
    ]
    if goal := record.get("published_tokens_per_second"):
        share = goal / s["ceiling"]
        weights = share * 6 * p["unrolled"] / s["flops_per_token"]
        verdict = "impossible" if share > 1 else "possible"
        lines.append(
            f"published    {si(goal)} tokens/s = {weights:.0%} of this peak by 6N (unrolled), {share:.0%} with "
            f"attention: {verdict}"
        )
    return "\n".join(lines)


def _exchange(record: dict[str, Any]) -> list[str]:
    """What devices send one another in a step; nothing on one device."""

    def kinds(sizes: dict[str, float]) -> str:
        return ", ".join(f"{kind} {size / 1e9:.3g}" for kind, size in sorted(sizes.items())) or "nothing"

    if record["devices"] == 1:
        return []
    expected = record["traffic"]
    lines = [
        f"exchange     {sum(expected.values()) / 1e9:.3g} GB sent by each device per step, "
        f"{sum(expected.values()) / record['link']:.2g} s at {record['link'] / 1e9:.0f} GB/s ({kinds(expected)})"
    ]
    if xla := record.get("xla"):
        lines.append(
            f"  compiled   {sum(xla['traffic'].values()) / 1e9:.3g} GB by XLA for {xla['for']} "
            f"({kinds(xla['traffic'])}); expected for it {sum(xla['expected'].values()) / 1e9:.3g}"
        )
        if xla["sometimes"]:
            lines.append(f"             and in steps that refresh a subspace {kinds(xla['sometimes'])}")
    return lines
