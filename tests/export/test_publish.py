"""The whole export of a run: what is in the folder, that it is whole or absent, the card, the upload."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from export_models import CASES, OWN, build

from nanochat_jax import checkpoint, cli
from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import Config, DataConfig, EvalConfig, resolve, to_dict
from nanochat_jax.export import __main__ as command
from nanochat_jax.export import card, check, folder, gguf, importer, publish, push, records, variants
from nanochat_jax.export.variants import ExportError
from nanochat_jax.inference import load
from nanochat_jax.types import TrainState

BYTES = tokenizers.byte_tokenizer()
FILES = {
    "LICENSE", "README.md", "SHA256SUMS", "chat_template.jinja", "config.json", "eval/held_out.json",
    "generation_config.json", "model.safetensors", "provenance.json", "tokenizer.json", "tokenizer_config.json",
    "training_config.json", "training_log.jsonl",
}  # fmt: skip
QUICK = publish.Options(check=False)


def a_run(home, settings, scored=True):
    """A finished run's records, as training writes them."""
    home.mkdir(exist_ok=True)
    model, params = build({**settings, "vocab_size": 280})
    cfg = Config(
        name="small",
        workdir=str(home),
        model=model,
        data=DataConfig(source=str(home / "book.txt"), seq_len=16),
    )
    cfg = dataclasses.replace(cfg, eval=EvalConfig(every_steps=7))
    (home / "config.json").write_text(json.dumps(to_dict(cfg)))
    BYTES.save(home / "tokenizer.json")
    data = {
        "source": cfg.data.source,
        "sha256": "d" * 64,
        "counts": {"train": {"documents": 3, "tokens": 4321}},
    }
    manifest = {
        "command": ["python", f"--workdir={home}"], "environment": {"A": "/home/me"}, "data": data, "python": "3.11.0",
        "devices": {"platform": "gpu", "kind": "H1", "count": 2}, "git": {"commit": "c" * 40, "dirty": True},
        "starts": [{"time": "2026-01-02T03:04:05+00:00", "command": [str(home)]}],
    }  # fmt: skip
    (home / "manifest.json").write_text(json.dumps(manifest))
    if scored:
        scores = {"eval/loss": 2.34567, "eval/bpb": 1.98764, "eval/tokens": 999.0, "step": 40}
        result = {"step": 40, "tokens": 5120, "state_sha256": "e" * 64, "eval": scores}
        (home / "result.json").write_text(json.dumps(result))
        lines = [
            {"step": 0, "config": str(home), "time": 1.0},
            *(
                {
                    "step": s,
                    "loss/next_token": 5 - s / 10,
                    "perf/tokens_per_second": 700.0 + s,
                    "trace_id": "x",
                }
                for s in (10, 20, 30)
            ),
            {"step": 40, "goodput/wall_seconds": 7200.0},
        ]
        (home / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4')
    return cfg, params


@pytest.fixture
def run(tmp_path):
    home = tmp_path / "run"
    cfg, params = a_run(home, CASES["qwen3"][1])
    return cfg, params, home, tmp_path / "out"


def test_the_folder(run):
    cfg, params, home, out = run
    checks = publish.build(cfg, params, BYTES, home, out, dataclasses.replace(QUICK, name="me/small"))
    pictures = {"loss.png", "throughput.png"} & {p.name for p in folder.files(out)}
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert found == FILES | pictures and checks == []
    assert folder.changed(out) == [] and folder.secrets(out) == []
    everything = b"".join(p.read_bytes() for p in folder.files(out))
    assert str(home).encode() not in everything and b"/home/me" not in everything
    again = json.loads((out / "training_config.json").read_text())
    assert (
        again["model"] == json.loads(json.dumps(to_dict(cfg)))["model"]
        and again["data"]["source"] == "book.txt"
    )
    assert len((out / "training_log.jsonl").read_text().splitlines()) == 5  # the line cut short is left out
    assert json.loads((out / "provenance.json").read_text())["git"]["commit"] == "c" * 40
    _, back = importer.load(out)
    assert (back["blocks"]["attn"]["q"] == params["blocks"]["attn"]["q"]).all()
    assert not list(out.parent.glob(".out.*"))


def test_card_says_what_was_recorded(run):
    cfg, params, home, out = run
    publish.build(
        cfg, params, BYTES, home, out, dataclasses.replace(QUICK, name="me/small", license="apache-2.0")
    )
    text = (out / "README.md").read_text()
    for part in (
        'license: "apache-2.0"', "value: 1.9876", "2.3457", "999", "3 documents, 4,321 tokens", "5,120", "2 x H1", "2.00 h",
        "| 720 |", "c" * 40 + "` (with local changes)", 'from_pretrained("me/small")', "`book.txt`",
    ):  # fmt: skip
        assert part in text, part
    assert not (out / "LICENSE").exists()  # the code's licence is not the model's
    assert "trust_remote_code" not in text


def test_card_of_a_run_without_records_has_no_numbers(tmp_path):
    cfg, params = a_run(tmp_path / "run", OWN["modern"], scored=False)
    (tmp_path / "run" / "manifest.json").unlink()
    publish.build(cfg, params, BYTES, tmp_path / "run", tmp_path / "out", QUICK)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## Evaluation\n\nnot measured\n" in text and "model-index" not in text
    for row in ("tokens seen", "device", "time", "tokens per second (median of the log)", "source commit"):
        assert f"| {row} | not measured |" in text, row
    assert 'AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)' in text
    assert not list((tmp_path / "out").glob("*.png"))


def test_numbers_of_the_card_are_in_the_records(run):
    """Every number with a decimal point in the tables of training and evaluation stands in a record."""
    cfg, params, home, out = run
    publish.build(cfg, params, BYTES, home, out, QUICK)
    text = (out / "README.md").read_text()
    tables = text[text.index("## Evaluation") : text.index("## Checked")]
    known = [2.34567, 1.98764]
    numbers = [float(n) for n in re.findall(r"\d+\.\d+", tables)]
    assert numbers and all(any(abs(n - k) < 1e-4 for k in known) for n in numbers)


def test_pictures(run):
    pytest.importorskip("matplotlib", reason="extra 'plot'")
    cfg, params, home, out = run
    publish.build(cfg, params, BYTES, home, out, QUICK)
    for name in ("loss.png", "throughput.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert f"]({name})" in (out / "README.md").read_text()


@pytest.mark.parametrize("old", [False, True])
def test_a_failure_leaves_nothing_and_keeps_the_old(run, monkeypatch, old):
    cfg, params, home, out = run
    if old:
        out.mkdir()
        (out / "mine.txt").write_text("old")

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(card, "write", full)
    with pytest.raises(OSError, match="No space"):
        publish.build(cfg, params, BYTES, home, out, dataclasses.replace(QUICK, overwrite=True))
    assert not list(out.parent.glob(".out.*"))
    assert [p.name for p in out.iterdir()] == ["mine.txt"] if old else not out.exists()


def test_a_full_folder_needs_overwrite(run):
    cfg, params, home, out = run
    out.mkdir()
    (out / "mine.txt").write_text("old")
    with pytest.raises(ExportError, match="is not empty; choose another --out, or --overwrite"):
        publish.build(cfg, params, BYTES, home, out, QUICK)
    assert (out / "mine.txt").exists()
    publish.build(cfg, params, BYTES, home, out, dataclasses.replace(QUICK, overwrite=True))
    assert not (out / "mine.txt").exists() and (out / "README.md").exists()
    (home.parent / "file").write_text("")
    with pytest.raises(ExportError, match="is a file"):
        publish.build(cfg, params, BYTES, home, home.parent / "file", QUICK)


def test_a_failed_check_publishes_nothing(run, monkeypatch):
    cfg, params, home, out = run

    def other(*args):
        raise check.CheckError("logits differ")

    monkeypatch.setattr(check, "tensors", other)
    with pytest.raises(check.CheckError):
        publish.build(cfg, params, BYTES, home, out, publish.Options())
    assert not out.exists() and check.CheckError.exit_code == 4


def test_secrets_are_found(run):
    cfg, params, home, out = run
    result = json.loads((home / "result.json").read_text())
    result["eval"]["note"] = "hf_" + "a" * 34
    (home / "result.json").write_text(json.dumps(result))
    with pytest.raises(ExportError, match=r"must not be published: eval/held_out.json: 'hf_aaaaa\.\.\.'"):
        publish.build(cfg, params, BYTES, home, out, QUICK)
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        (
            OWN["modern"],
            {"gguf": ("f16",)},
            "GGUF F16 cannot hold this model: the nearest is bitnet, but model.mlp",
        ),
        ({"quant": "fp8"}, {}, "model.quant = 'fp8' computes in a format"),
        ({}, {"gguf": ("q4_k",)}, "--gguf: 'q4_k' is none of f32"),
        ({}, {"ternary": "packed"}, "has no effect because model.quant is 'full'"),
        ({}, {"dtype": "float8"}, "--dtype must be one of float32"),
    ],
)
def test_refusals_come_before_anything_is_written(tmp_path, settings, options, said):
    cfg, params = a_run(tmp_path / "run", settings)
    with pytest.raises(ExportError, match=re.escape(said)):
        publish.build(cfg, params, BYTES, tmp_path / "run", tmp_path / "out", publish.Options(**options))
    assert not (tmp_path / "out").exists()


# --- the command


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["export", *words])
    with pytest.raises(SystemExit) as caught:
        cli.run("export", command.main, command.FLAGS, needs_config=False)
    return caught.value.code or 0, *capsys.readouterr()


def test_the_command(run, monkeypatch, capsys):
    cfg, params, home, out = run
    (home / "ckpt").mkdir()
    with checkpoint.Checkpointer(cfg.ckpt, home / "ckpt") as saved:
        state = TrainState(jax.numpy.int32(40), jax.tree.map(jax.numpy.asarray, params), {})
        saved.save(40, state, {"config": to_dict(cfg)}, wait=True)
    words = [f"--workdir={home}", f"--out={out}", "--push=me/small", "--dry_run"]
    monkeypatch.setattr(check, "transformers", lambda *a: "not loaded here")
    status, data, said = call(monkeypatch, capsys, *words)
    assert (status, data.strip()) == (0, str(out)), said
    assert "13 weights read back unchanged" in said
    assert "dry run: nothing was uploaded to me/small (private)" in said and "model.safetensors" in said
    new = home.parent / "adopted"
    status, data, said = call(monkeypatch, capsys, f"--workdir={new}", f"--adopt={out}")
    assert (status, data.strip()) == (0, str(new)), said
    back_cfg = resolve(cli.read_config(str(new / "config.json")))
    assert back_cfg.model == dataclasses.replace(cfg.model, dtype="auto")
    back = load.load_params(back_cfg, new)
    assert (np.asarray(back["blocks"]["attn"]["q"]) == params["blocks"]["attn"]["q"]).all()
    assert tokenizers.load(new / "tokenizer.json").encode("text") == BYTES.encode("text")
    status, _, said = call(monkeypatch, capsys, f"--workdir={new}", f"--adopt={out}")
    assert status == 1 and "is not empty; choose another --workdir\n" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out=x"], "--workdir (a run) and either --out (a new directory) or --adopt are needed"),
        (["--workdir=x", "--out=y", "--adopt=z"], "either --out (a new directory) or --adopt"),
        (["--workdir=nowhere", "--out=x"], "nowhere is not a run"),
        (["--workdir=nowhere", "--out=x", "--dry_run"], "--dry_run has no effect without --push"),
        (["--workdir=nowhere", "--out=x", "--dtype=int8"], "--dtype must be one of"),
    ],
)
def test_mistakes_on_the_command_line(monkeypatch, capsys, words, said):
    status, _, text = call(monkeypatch, capsys, *words)
    assert status == 2 and said in text


# --- the upload


class Hub:
    """What `HfApi` is asked for."""

    def __init__(self):
        self.asked = []

    def create_repo(self, **given):
        self.asked.append(("create_repo", given))

    def upload_folder(self, **given):
        self.asked.append(
            ("upload_folder", given, sorted(p.name for p in Path(given["folder_path"]).iterdir()))
        )
        return "https://hub/commit"


@pytest.fixture
def exported(run):
    cfg, params, home, out = run
    publish.build(cfg, params, BYTES, home, out, QUICK)
    return out


def test_push(exported):
    hub, lines = Hub(), []
    assert push.push(exported, "me/small", report=lines.append, hub=hub) == "https://hub/commit"
    assert hub.asked[0] == ("create_repo", {"repo_id": "me/small", "private": True, "exist_ok": True})
    assert hub.asked[1][0] == "upload_folder" and "README.md" in hub.asked[1][2]
    assert any("model.safetensors" in line for line in lines)
    hub = Hub()
    assert (
        push.push(exported, "me/small", dry_run=True, report=lines.append, hub=hub) == "" and hub.asked == []
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "README.md").write_text("better"), "was changed after it was written: README.md"),
        (lambda f: (f / "notes.txt").write_text("x"), "notes.txt"),
        (lambda f: (f / "LICENSE").unlink(), "LICENSE"),
        (lambda f: (f / "SHA256SUMS").unlink(), "no finished export"),
        (
            lambda f: ((f / "notes.md").write_text("in /home/me/x"), folder.write_sums(f)),
            "must not be published: notes.md",
        ),
    ],
)
def test_what_was_changed_is_not_uploaded(exported, change, said):
    change(exported)
    hub = Hub()
    with pytest.raises(ExportError, match=said):
        push.push(exported, "me/small", hub=hub)
    assert hub.asked == []


@pytest.mark.parametrize("name", ["small", "me/", "/small", "me/small/x", "me/sm all"])
def test_names_of_repositories(exported, name):
    with pytest.raises(ExportError, match="needs owner/name"):
        push.push(exported, name, hub=Hub())


@pytest.mark.interop
def test_the_hub_has_what_is_asked_of_it():
    """The fake above must not promise what huggingface_hub does not have."""
    import inspect

    hub = pytest.importorskip("huggingface_hub", reason="extra 'export'").HfApi
    assert {"repo_id", "private", "exist_ok"} <= set(inspect.signature(hub.create_repo).parameters)
    assert {"folder_path", "repo_id", "commit_message"} <= set(
        inspect.signature(hub.upload_folder).parameters
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ternary": "foo"}, "--ternary must be one of packed, dequantized, latent, got 'foo'"),
        ({"context": -3}, "--context must be positive, or 0 for training's, got -3"),
        ({"dtype": "int8"}, "--dtype must be one of"),
    ],
)
def test_mistakes_are_found_before_anything_is_read(run, changes, said):
    cfg, params, home, out = run
    found = publish.problems(cfg, dataclasses.replace(QUICK, **changes))
    assert len(found) == 1 and said in found[0]
    with pytest.raises(ExportError, match=re.escape(said)):
        publish.build(cfg, params, BYTES, home, out, dataclasses.replace(QUICK, **changes))
    assert not out.exists()


def test_a_missing_gguf_package_is_said_first(run, monkeypatch):
    monkeypatch.setattr(publish.importlib.util, "find_spec", lambda name: None)
    found = publish.problems(run[0], dataclasses.replace(QUICK, gguf=("f32",)))
    assert "pip install 'nanochat_jax[export]'" in found[0]


def test_the_cards_own_lines_ask_nothing():
    """Models with their own code: the tokenizer is loaded with the same consent as the model."""
    text = card._usage("me/small", variants.OWN, "dequantized", [])
    assert text.count("trust_remote_code=True") == 2
    assert "trust_remote_code" not in card._usage("me/small", "qwen3", "packed", [])


def test_records_that_are_damaged(tmp_path):
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ExportError, match=r"result\.json is damaged"):
        records.read(tmp_path)
    assert gguf.TYPES  # the module loads without the gguf package
