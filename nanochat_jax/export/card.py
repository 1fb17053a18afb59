"""The model card, from the run's own records only: what was not recorded is "not measured"."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from nanochat_jax.config import Config
from nanochat_jax.export import variants
from nanochat_jax.export.records import Records, shortened
from nanochat_jax.model import loop, transformer

UNKNOWN = "not measured"
PICTURES = (
    ("loss.png", "training loss (nats per token)", "loss/next_token"),
    ("throughput.png", "tokens per second", "perf/tokens_per_second"),
)


def write(
    target: Path, cfg: Config, records: Records, name: str, license_id: str, architecture: str, form: str,
    ggufs: list[str], checks: list[str],
) -> None:  # fmt: skip
    """Write README.md, and pictures of loss and throughput where matplotlib (extra 'plot') is installed.

    Args: name: of the model, or `owner/name` on the hub. checks: what `check` found, sentences.
    """
    pictures = draw(target, records)
    parts = [
        _header(cfg, records, name, license_id, architecture),
        f"# {name.rpartition('/')[2]}\n\n{_summary(cfg, architecture, form)}",
        _section("Use", _usage(name, architecture, form, ggufs)),
        _section("Architecture", _table(_architecture(cfg))),
        _section("Training", _table(_training(cfg, records))),
        _section("Evaluation", _evaluation(records)),
        *(
            [_section("Pictures", "\n\n".join(f"![{text}]({file})" for file, text in pictures))]
            if pictures
            else []
        ),
        _section("Checked", "\n".join(f"- {line}" for line in checks) if checks else UNKNOWN),
        _section("Limits", _limits(cfg, architecture, form)),
        _section("Provenance", _provenance(records)),
    ]
    (target / "README.md").write_text("\n".join(parts), encoding="utf-8")


def draw(target: Path, records: Records) -> list[tuple[str, str]]:
    """Write PICTURES of what was recorded; returns (file, text) of those written."""
    if not importlib.util.find_spec("matplotlib"):
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for file, text, metric in PICTURES:
        points = records.series(metric)
        if len(points) < 2:
            continue
        figure, axis = plt.subplots(figsize=(6, 3.2), constrained_layout=True)
        axis.plot([step for step, _ in points], [value for _, value in points])
        axis.set(xlabel="step", ylabel=text)
        axis.grid(alpha=0.3)
        figure.savefig(target / file, dpi=120, metadata={"Software": None})
        plt.close(figure)
        written.append((file, text))
    return written


def _header(cfg: Config, records: Records, name: str, license_id: str, architecture: str) -> str:
    """The YAML that the hub reads. JSON strings are YAML strings."""
    tags = ["jax", "nanochat_jax", architecture]
    tags += ["ternary", "bitnet", "1.58-bit"] if cfg.model.quant.startswith("ternary") else []
    tags = list(dict.fromkeys(tags + ["custom_code"] * (architecture == variants.OWN)))
    lines = [
        "---",
        f"license: {json.dumps(license_id)}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
    ]
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    scores = records.evaluation()
    if "eval/bpb" in scores:
        source = json.dumps(f"held-out part of {shortened(cfg.data.source)}")
        lines += [
            "model-index:", f"- name: {json.dumps(name.rpartition('/')[2])}", "  results:",
            "  - task:", "      type: text-generation", "    dataset:", f"      name: {source}",
            "      type: held-out", "    metrics:", "    - type: bits_per_byte", "      name: bits per byte",
            f"      value: {scores['eval/bpb']:.4f}",
        ]  # fmt: skip
    return "\n".join([*lines, "---", ""])


def _summary(cfg: Config, architecture: str, form: str) -> str:
    m = cfg.model
    sentences = [
        f"A language model of {transformer.counts(m)['unique'] / 1e6:.2f} million parameters, trained with nanochat_jax."
    ]
    if m.quant.startswith("ternary"):
        sentences.append(
            "The matrices of its layers are ternary (-1, 0, +1 times a scale), activations have 8 bits."
        )
    if architecture == variants.OWN:
        sentences.append(
            "**It runs code of its own**, `modeling_nanochat_jax.py` in this folder: read it, then load with "
            "`trust_remote_code=True`."
        )
    else:
        sentences.append(f"It loads as `{architecture}` without any code of its own.")
    forms = {
        "packed": "The files hold four ternary weights a byte; transformers needs `accelerate` to load them.",
        "dequantized": "The files hold the ternary weights as ordinary numbers.",
        "latent": "The files hold the float weights behind the ternary ones, for further training.",
    }
    return " ".join([*sentences, *([forms[form]] if form in forms else [])]) + "\n"


def _usage(name: str, architecture: str, form: str, ggufs: list[str]) -> str:
    trust = ", trust_remote_code=True" if architecture == variants.OWN else ""
    where = json.dumps(name if "/" in name else ".")
    text = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({where}{trust})
model = AutoModelForCausalLM.from_pretrained({where}{trust})
inputs = tokenizer("def ", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```"""
    if ggufs:
        text += f'\n\n```sh\nllama-cli -m {ggufs[0]} -p "def " -n 40\n```'
    return text


def _architecture(cfg: Config) -> list[tuple[str, str]]:
    m, counts = cfg.model, transformer.counts(cfg.model)
    rows = [
        ("parameters", f"{counts['unique']:,} (of these {counts['tables']:,} in tables of the vocabulary)"),
        ("layers", loop.layers_text(m) if loop.effective_layers(m) != m.layers else str(m.layers)),
        ("width", str(m.dim)),
        ("heads", f"{m.heads} of {m.head_dim}, {m.kv_heads} for keys and values"),
        ("MLP", f"{m.mlp}, {m.mlp_dim}"),
        ("vocabulary", f"{m.vocab_size:,}"),
        ("tied head", "yes" if m.tied else "no"),
        ("weights", m.quant + (f", groups of {m.quant_group}" if m.quant_group else "")),
    ]
    if m.mhc.streams > 1:
        rows.append(("residual streams", f"{m.mhc.streams} (mHC, {m.mhc.form})"))
    if m.mtp.depth:
        rows.append(("heads for later tokens", f"{m.mtp.depth} ({m.mtp.kind})"))
    return rows


def _training(cfg: Config, records: Records) -> list[tuple[str, str]]:
    data, devices = records.manifest.get("data", {}), records.manifest.get("devices", {})
    counts = (data.get("counts") or {}).get("train", {})
    speed = sorted(value for _, value in records.series("perf/tokens_per_second"))
    wall = [row["goodput/wall_seconds"] for row in records.metrics if "goodput/wall_seconds" in row]
    device = f"{devices['count']} x {devices['kind']}" if devices else UNKNOWN
    if devices.get("platform") == "cpu" and records.manifest.get("cpu"):
        device = f"CPU, {records.manifest['cpu']}"

    def of(record: dict[str, Any], key: str, form: str = "{:,}") -> str:
        return form.format(record[key]) if record.get(key) is not None else UNKNOWN

    return [
        ("text", f"`{shortened(cfg.data.source)}`, {of(counts, 'documents')} documents, {of(counts, 'tokens')} tokens"),
        ("tokens seen", of(records.result, "tokens")),
        ("steps", f"{of(records.result, 'step')} of {cfg.train.steps:,} planned"),
        ("tokens per step", f"{cfg.data.batch * cfg.data.seq_len:,} (rows of {cfg.data.seq_len:,})"),
        ("optimizer", f"{cfg.opt.matrix.name} (lr {cfg.opt.matrix.lr:g}) for matrices, {cfg.opt.embed.name} (lr {cfg.opt.embed.lr:g}) for the embedding"),
        ("schedule", f"{cfg.opt.schedule.kind}, {cfg.opt.schedule.warmup_steps} steps of warm-up"),
        ("device", device),
        ("time", f"{sum(wall) / 3600:.2f} h" if wall else UNKNOWN),
        ("tokens per second (median of the log)", f"{speed[len(speed) // 2]:,.0f}" if speed else UNKNOWN),
    ]  # fmt: skip


def _evaluation(records: Records) -> str:
    scores = records.evaluation()
    if not scores:
        return UNKNOWN
    rows = [("loss (nats per token)", f"{scores['eval/loss']:.4f}")]
    if "eval/bpb" in scores:
        rows.insert(0, ("bits per byte", f"{scores['eval/bpb']:.4f}"))
    if "eval/tokens" in scores:
        rows.append(("tokens scored", f"{int(scores['eval/tokens']):,}"))
    step = scores.get("step", records.result.get("step", UNKNOWN))
    return f"On text held out from training, at step {step}, with the model as trained:\n\n{_table(rows)}"


def _limits(cfg: Config, architecture: str, form: str) -> str:
    lines = variants.left_out(cfg.model, architecture)
    if form == "dequantized" and architecture != variants.OWN:
        lines.append(
            "Activations keep full precision here, 8 bits in training: logits differ a little from those scored above."
        )
    lines += [
        f"It was trained on rows of {cfg.data.seq_len} tokens; longer contexts are untested.",
        "What it writes may be wrong, biased or unsafe. Run generated code only in a sandbox.",
        "It was not tested for any use beyond research on language models.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _provenance(records: Records) -> str:
    git, result = records.manifest.get("git") or {}, records.result
    rows = [
        (
            "source commit",
            f"`{git['commit']}`{' (with local changes)' if git.get('dirty') else ''}" if git else UNKNOWN,
        ),
        (
            "SHA-256 of the training state",
            f"`{result['state_sha256']}`" if "state_sha256" in result else UNKNOWN,
        ),
        ("SHA-256 of the data", f"`{result['data_sha256']}`" if result.get("data_sha256") else UNKNOWN),
    ]
    again = (
        "To train it again: `python -m nanochat_jax.train --config=training_config.json --workdir=again`; "
        "versions, devices and data hashes are in `provenance.json`, every logged metric in `training_log.jsonl`, "
        "hashes of all files in `SHA256SUMS`."
    )
    return f"{_table(rows)}\n\n{again}"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}\n"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
