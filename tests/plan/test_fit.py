"""Changes that fit, refusals, speeds, and the report."""

import dataclasses
import json
import subprocess
import sys

import pytest

from nanochat_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    FilterConfig,
    GaloreConfig,
    LoopConfig,
    MeshConfig,
    ModelConfig,
    MtpConfig,
    TrainConfig,
    resolve,
    to_dict,
)
from nanochat_jax.model import flops
from nanochat_jax.plan import devices, fit, memory, report, speed
from nanochat_jax.plan.devices import DEVICES, GIB

MODEL = ModelConfig(vocab_size=4096, dim=256, layers=8, unroll=1)
CFG = Config(model=MODEL, data=DataConfig(seq_len=1024, batch=32), mesh=MeshConfig(data=2))
CARD = DEVICES["h100"]


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("80 GB", 80e9), ("1.5gib", 1.5 * GIB), ("1024", 1024)]
)
def test_sizes(text, size):
    assert fit.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "24 TiB", "-1GiB"])
def test_wrong_sizes(text):
    with pytest.raises(ConfigError, match="--fit must be a size such as 24GiB"):
        fit.parse_bytes(text)


def test_candidates_are_valid_and_distinct():
    found = list(fit.candidates(CFG))
    assert found[0] == {} and len({tuple(sorted(c.items())) for c in found}) == len(found)
    assert {key for c in found for key in c} == {
        "train.microbatches", "model.remat", "opt.matrix.state_bits", "opt.embed.state_bits",
        "opt.head.state_bits", "opt.galore.rank", "mesh.data", "mesh.fsdp",
    }  # fmt: skip
    for change in found[::7]:
        resolve(to_dict(fit.changed(CFG, change)))


@pytest.mark.parametrize(
    ("changes", "never"),
    [
        ({"model.filter": FilterConfig(0.5, "random")}, "model.remat"),
        ({"opt.galore": GaloreConfig(rank=64, min_dim=128, momentum="rotate")}, "opt.matrix.state_bits"),
    ],
)
def test_only_what_a_run_takes_is_advised(changes, never):
    cfg = fit.changed(CFG, changes)
    found = list(fit.candidates(cfg))
    assert len(found) > 1 and not any(never in change for change in found)
    for change in found[::7]:
        resolve(to_dict(fit.changed(cfg, change)))
    change = fit.smallest_change(cfg, memory.predict(cfg).peak // 2, CARD)
    assert change and never not in change


def test_the_smallest_change_fits_and_nothing_smaller_does():
    peak = memory.predict(CFG).peak
    assert fit.smallest_change(CFG, peak, CARD) == {}
    for share in (0.9, 0.6, 0.3, 0.15):
        limit = round(share * peak)
        change = fit.smallest_change(CFG, limit, CARD)
        assert change and memory.predict(fit.changed(CFG, change)).peak <= limit
        for other in fit.candidates(CFG):
            if len(other) < len(change):
                assert memory.predict(fit.changed(CFG, other)).peak > limit
            elif len(other) == len(change) and memory.predict(fit.changed(CFG, other)).peak <= limit:
                seconds = [speed.predict(fit.changed(CFG, c), CARD).seconds_per_step for c in (change, other)]
                assert seconds[0] <= seconds[1]
    assert fit.smallest_change(CFG, 1000, CARD) is None


def test_refusal_names_the_change():
    peak = memory.predict(CFG).peak
    fit.refuse(CFG, None)
    fit.refuse(CFG, peak)
    fit.refuse(CFG, round(0.95 * peak))  # within the accuracy: tried
    with pytest.raises(ConfigError) as caught:
        fit.refuse(CFG, peak // 2)
    message = str(caught.value)
    change = fit.smallest_change(CFG, peak // 2, CARD)
    assert change and all(f"--config.{key}={value}" in message for key, value in change.items())
    assert f"needs about {peak / GIB:.1f} GiB" in message and "\n" not in message
    with pytest.raises(ConfigError, match="no change of microbatches"):
        fit.refuse(CFG, 1000)


def test_more_devices():
    alone = dataclasses.replace(CFG, mesh=MeshConfig(), train=TrainConfig(microbatches=4))
    peak = memory.predict(alone).peak
    assert fit.more_devices(alone, round(0.7 * peak)) == "; 2 devices with --config.mesh.fsdp=2 are"
    assert fit.more_devices(alone, 1000) == ""


def test_no_limit_is_known_on_cpu():
    assert devices.limit() is None


def test_limit_is_the_allocators(monkeypatch):
    class Fake:
        def memory_stats(self):
            return {"bytes_limit": 5}

    monkeypatch.setattr(devices.jax, "local_devices", lambda: [Fake()])
    assert devices.limit() == 5


@pytest.mark.multiprocess
def test_train_refuses_before_compiling(child_env, tmp_path):
    """The whole command, on a device that claims 64 MiB."""
    code = (
        "import sys, runpy; from nanochat_jax.plan import devices; devices.limit = lambda: 2**26; "
        "sys.argv = ['train', '--config=tiny', '--workdir=run']; "
        "runpy.run_module('nanochat_jax.train', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and "this run needs about" in done.stderr, done.stderr
    assert not (tmp_path / "run").exists() and "compiling" not in done.stderr


def test_peaks_agree_with_the_table_of_mfu():
    for kind, name in (
        ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA GeForce RTX 5090", "rtx5090"), ("NVIDIA A100", "a100"),
        ("NVIDIA H100", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200"),
    ):  # fmt: skip
        assert flops.PEAK_FLOPS[kind] == DEVICES[name].flops


def test_the_flag_knows_all_devices():
    from nanochat_jax.plan import __main__ as command

    assert tuple(DEVICES) == command.NAMES


def test_newton_schulz_work():
    """By counting: X X^T, its square, the product with X; 2 FLOPs per multiply-add."""
    one = dataclasses.replace(CFG, model=dataclasses.replace(MODEL, layers=1))
    square, wide = 4 * 256 * 256 * 256 + 2 * 256**3, 4 * 256 * 256 * 768 + 2 * 256**3
    assert speed.optimizer_flops(one) == 5 * (4 * square + 3 * wide)
    adamw = fit.changed(one, {"opt.matrix.name": "adamw"})
    assert speed.optimizer_flops(adamw) == 0
    assert speed.optimizer_flops(fit.changed(one, {"opt.galore.rank": 64})) < speed.optimizer_flops(one) / 4


def test_speed_stays_below_the_ceiling():
    for card in DEVICES.values():
        s = speed.predict(CFG, card)
        assert 0 < s.tokens_per_second < speed.EFFICIENCY * s.ceiling and 0 < s.mfu < speed.EFFICIENCY
        assert s.tokens_per_second == pytest.approx(s.tokens_per_step / s.seconds_per_step)
        assert s.hours == pytest.approx(CFG.train.steps * s.seconds_per_step / 3600)
        assert s.kilowatt_hours == pytest.approx(s.hours * 2 * card.watts / 1000)
    again = speed.predict(fit.changed(CFG, {"model.remat": "block"}), CARD)
    assert again.seconds_per_step > speed.predict(CFG, CARD).seconds_per_step


def test_kept_rows_run_forward_twice():
    """1 + 3r of a forward pass instead of 3, further tokens as always; MFU counts 1 + 2r."""
    plain = fit.changed(CFG, {"train.microbatches": 1})
    kept = fit.changed(plain, {"model.filter": FilterConfig(0.25, "random")})
    whole = flops.train_flops_per_token(MODEL, 1024)
    assert speed.products_per_token(plain) == whole
    assert speed.products_per_token(kept) == pytest.approx(whole * 1.75 / 3)
    assert speed.predict(kept, CARD).flops_per_token == pytest.approx(whole * 1.5 / 3)
    more = {"model.mtp": MtpConfig(depth=2)}
    further = flops.train_flops_per_token(fit.changed(plain, more).model, 1024) - whole
    assert speed.products_per_token(fit.changed(kept, more)) == pytest.approx(whole * 1.75 / 3 + further)
    # In bytes: all rows written once, kept ones once more and read twice.
    assert speed.passes(plain) == 3 and speed.passes(kept) == 1.75


def test_the_report_names_every_stack():
    shown = report.text(report.plan(CFG, "h100"))
    assert "8 layers x 1 loops: compute" in shown
    outside = fit.changed(CFG, {"model.loop": LoopConfig(count=2, before=1, after=2)})
    assert "1 layer before, 8 layers x 2 loops, 2 layers after: " in report.text(report.plan(outside, "h100"))


@pytest.mark.multiprocess
def test_the_command(child_env):
    command = [sys.executable, "-m", "nanochat_jax.plan", "--config=smoke"]
    shown = subprocess.run(command, env=child_env, capture_output=True, text=True)
    assert shown.returncode == 0 and "it fits as it is" in shown.stdout, shown.stderr
    made = subprocess.run(
        [*command, "--json", "--fit=1MiB", "--device=rtx4090"], env=child_env, capture_output=True, text=True
    )
    record = json.loads(made.stdout)
    assert record["limit"] == 2**20 and not record["fits"] and record["device"] == "rtx4090"


def test_report_has_every_part():
    record = report.plan(CFG, "rtx4090", "1GiB")
    shown = report.text(record)
    for word in (
        "unique",
        "unrolled",
        "optimizer",
        "logits",
        "temporary",
        "tokens/s",
        "MFU",
        "kWh",
        "ceiling",
    ):
        assert word in shown
    assert "published" not in shown and json.loads(json.dumps(record))["limit"] == GIB
