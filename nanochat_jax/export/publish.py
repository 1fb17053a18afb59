"""Put an export together: everything is written and checked beside the target, which then appears whole."""

import dataclasses
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nanochat_jax.config import Config
from nanochat_jax.export import card, check, folder, gguf, hf, push, records, tokenization, variants
from nanochat_jax.export.variants import ExportError
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Options:
    """What to write. The defaults write a Hugging Face folder in float32 and check it."""

    gguf: tuple[str, ...] = ()  # of gguf.TYPES
    dtype: str = "float32"  # of the folder's tensors
    ternary: str = ""  # of hf.FORMS; "" = the best that the model allows
    name: str = ""  # of the model; "" = the run's
    license: str = "mit"  # SPDX id, for the card
    context: int = 0  # positions; 0 = the rows of training
    check: bool = True  # load what was written
    overwrite: bool = False


def options(flags: Mapping[str, Any]) -> Options:
    """Of a command's flags: those of the same names; gguf with commas, and the name of the hub's repository if there
    is no other."""
    kinds = tuple(dict.fromkeys(filter(None, flags["gguf"].lower().split(","))))
    same = {name: flags[name] for name in ("dtype", "ternary", "license", "context", "check", "overwrite")}
    return Options(kinds, name=flags["name"] or flags["push"], **same)


def problems(cfg: Config, options: Options) -> list[str]:
    """Why this model cannot be exported so, before anything is read or written; [] if it can."""
    found = variants.unsupported(cfg.model)
    if not found:
        try:
            hf.form_of(cfg.model, variants.architecture(cfg.model), options.ternary)
        except ExportError as error:
            found = [str(error)]
    if options.dtype not in hf.DTYPES:
        found.append(f"--dtype must be one of {', '.join(hf.DTYPES)}, got '{options.dtype}'")
    if options.context < 0:
        found.append(f"--context must be positive, or 0 for training's, got {options.context}")
    if options.gguf and importlib.util.find_spec("gguf") is None:
        found.append("--gguf needs the export extra: pip install 'nanochat_jax[export]'")
    for kind in options.gguf:
        if kind not in gguf.TYPES:
            found.append(f"--gguf: '{kind}' is none of {', '.join(gguf.TYPES)}")
        elif reasons := gguf.obstacles(cfg.model, kind):
            found.append(f"GGUF {kind.upper()} cannot hold this model: {'; '.join(reasons)}")
    return found


def build(
    cfg: Config, params: Params, tokenizer: Tokenizer, workdir: Path, out: Path, options: Options,
    report: Callable[[str], None] = lambda line: None,
) -> list[str]:  # fmt: skip
    """Write the folder `out`. Args: params: as trained. workdir: the run, for its records.

    Returns: what the checks found, sentences.
    Raises: ExportError for what cannot be exported; CheckError if a loader disagrees with our forward
    pass. After any error `out` is what it was before.
    """
    if found := problems(cfg, options):
        raise ExportError("; ".join(found))
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise ExportError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {cfg.model.vocab_size}")
    kept, name = records.read(workdir), options.name or cfg.name
    context, special = options.context or cfg.data.seq_len, tokenization.ids(tokenizer)
    with folder.whole(out, options.overwrite) as target:
        architecture, form = hf.write_model(
            target, cfg.model, params, cfg.infer, special, context, options.dtype, options.ternary
        )
        report(f"{architecture}, {form} weights, {options.dtype}")
        tokenization.write(target, tokenizer, context)
        checks = []
        if options.check:
            checks.append(check.tensors(target, cfg.model, params, form, options.dtype))
            checks.append(
                check.transformers(target, cfg.model, params, form, options.dtype, min(48, context))
            )
        files = []
        for kind in options.gguf:
            files.append(f"{name.rpartition('/')[2]}-{kind}.gguf")
            facts = {"general.name": name, "general.license": options.license}
            facts |= _facts(kept)
            gguf.write(target / files[-1], cfg.model, params, tokenizer, kind, context, facts)
            report(f"{files[-1]}: {(target / files[-1]).stat().st_size:,} bytes")
            if options.check:
                checks.append(check.gguf_file(target / files[-1], cfg.model, params, kind))
                checks.append(check.llama_cpp(target / files[-1], cfg.model, params, kind, tokenizer))
        _write_records(target, cfg, kept, options.license)
        card.write(target, cfg, kept, name, options.license, architecture, form, files, checks)
        if found := folder.secrets(target):
            raise ExportError(f"the export would hold what must not be published: {'; '.join(found[:5])}")
        folder.write_sums(target)
    return checks


def upload(out: Path, repository: str, private: bool, dry_run: bool, report: Callable[[str], None]) -> None:
    """`push.push` with a last line that says where it went; nothing for repository = ""."""
    if repository and (address := push.push(out, repository, private, dry_run, report)):
        report(f"uploaded: {address}")


def _facts(kept: records.Records) -> dict[str, object]:
    found = {
        "nanochat_jax.tokens": kept.result.get("tokens"),
        "nanochat_jax.state_sha256": kept.result.get("state_sha256"),
    }
    return {key: value for key, value in found.items() if value is not None}


def _write_records(target: Path, cfg: Config, kept: records.Records, license_id: str) -> None:
    """Settings and log of training, scores, provenance, and the licence of the code where it is the model's."""
    folder.write_json(
        target / "training_config.json", records.public_config(kept.config or dataclasses.asdict(cfg))
    )
    folder.write_json(target / "provenance.json", records.provenance(kept))
    lines = "".join(json.dumps(row) + "\n" for row in kept.metrics)
    (target / "training_log.jsonl").write_text(lines, encoding="utf-8")
    if scores := kept.evaluation():
        (target / "eval").mkdir()
        folder.write_json(target / "eval" / "held_out.json", scores)
    if license_id == "mit" and (text := _license()):
        (target / "LICENSE").write_text(text, encoding="utf-8")


def _license() -> str | None:
    """The text of this package's licence: in a checkout beside it, else in its metadata."""
    beside = Path(__file__).parents[2] / "LICENSE"
    if beside.exists():
        return beside.read_text(encoding="utf-8")
    try:
        return importlib.metadata.distribution(variants.OWN).read_text("licenses/LICENSE")
    except importlib.metadata.PackageNotFoundError:
        return None
