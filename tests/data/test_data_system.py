"""A run on a mixture, in completion order, as typed: killed, continued, repeated from its journal."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from nanochat_jax.data import pool

STEPS = 8


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_mixture_in_completion_order(tmp_path, child_env):
    for name in ("code", "docs"):
        (tmp_path / name).mkdir()
        for i in range(60):
            words = " ".join(f"{name}{i * j}" for j in range(60))
            (tmp_path / name / f"{i}.md").write_text(f"# {name} {i}\n{words}\n")
    mix = tuple((name, str(tmp_path / name), weight) for name, weight in (("code", 0.75), ("docs", 0.25)))
    common = [
        sys.executable, "-m", "nanochat_jax.train", "--config=smoke", f"--config.data.mix={mix!r}",
        "--config.data.seq_len=32", "--config.data.tokenizer=bytes", "--config.data.val_percent=20",
        "--config.data.pool.order=completion", f"--config.train.steps={STEPS}", "--config.model.layers=1",
        "--config.ckpt.every_steps=1", "--config.eval.sample_tokens=0", "--config.eval.every_steps=0",
        "--config.model.dim=32",
        "--config.model.quant=full",
        "--config.opt.matrix.name=adamw",
    ]  # fmt: skip
    broken = tmp_path / "broken"
    child = subprocess.Popen([*common, f"--workdir={broken}"], env=child_env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while child.poll() is None and not list(broken.glob("ckpt/[1-9]*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.kill()
    child.wait()
    done = subprocess.run([*common, f"--workdir={broken}"], env=child_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = STEPS * 4
    order = pool.read_journal(broken / "data_order.bin", 0, rows)
    assert len(set(order.tolist())) == rows, "a row came twice"
    scores = json.loads((broken / "result.json").read_text())["eval"]
    assert np.isfinite([scores["eval/bpb"], scores["eval/bpb_code"], scores["eval/bpb_docs"]]).all()
    data = json.loads((broken / "manifest.json").read_text())["data"]
    assert [part["name"] for part in data["mix"]] == ["code", "docs"]
    # The same order again gives the same weights.
    again = [
        *common,
        f"--workdir={tmp_path / 'again'}",
        f"--config.data.pool.replay={broken / 'data_order.bin'}",
    ]
    done = subprocess.run(again, env=child_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hashes = {
        json.loads((h / "result.json").read_text())["state_sha256"] for h in (broken, tmp_path / "again")
    }
    assert len(hashes) == 1
