"""The train step as a system: devices agree, microbatches add up, one compilation, loss falls."""

import dataclasses
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import config as config_lib
from nanochat_jax import parallel
from nanochat_jax.config import BLOCKS, Config, ConfigError, LoopConfig, MeshConfig, ModelConfig, TrainConfig
from nanochat_jax.train import loop, program
from nanochat_jax.train import step as steps
from nanochat_jax.types import Batch

MODEL = ModelConfig(
    vocab_size=256, dim=32, layers=2, heads=4, kv_heads=4, head_dim=8, mlp_dim=64, unroll=2,
    **dict(BLOCKS["modern"].items()),
)  # fmt: skip
BASE = Config(
    model=dataclasses.replace(MODEL, quant="ternary"),
    data=dataclasses.replace(config_lib.DataConfig(), seq_len=32, batch=8),
    train=TrainConfig(steps=20, loss_chunk=64),
    opt=dataclasses.replace(
        config_lib.OptConfig(), schedule=dataclasses.replace(config_lib.ScheduleConfig(), warmup_steps=1)
    ),
)


def arrays(step, ragged=True):
    """A learnable sequence: each token follows from the one before."""
    rng = np.random.default_rng(step)
    tokens = np.zeros((8, 33), np.int64)
    tokens[:, 0] = rng.integers(0, 256, 8)
    for t in range(32):
        tokens[:, t + 1] = (5 * tokens[:, t] + rng.integers(0, 2, 8)) % 256
    weights = np.ones((8, 32), np.float32)
    if ragged:
        weights[:3, 10:] = 0
    index = np.broadcast_to(np.arange(32, dtype=np.int32), (8, 32)).copy()
    return {
        "tokens": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32),
        "weights": weights, "segments": np.ones((8, 32), np.int32), "positions": index,
    }  # fmt: skip


def run(cfg, count=20):
    parts = program.Parts(cfg)
    state = parts.fresh(cfg.seed)
    out = []
    for i in range(count):
        state, metrics = parts.step(state, parallel.shard_batch(arrays(i), parts.mesh))
        out.append(float(metrics["loss/total"]))
    return np.array(out), state, parts


@pytest.fixture(scope="module")
def full_precision():
    cfg = dataclasses.replace(BASE, model=MODEL)
    return cfg, run(cfg)


def test_twenty_steps_lower_the_loss_with_one_trace():
    losses, state, parts = run(BASE)
    assert losses[0] == pytest.approx(np.log(256), rel=0.1)
    assert losses[-1] < losses[0] - 0.5
    assert parts.step._cache_size() == 1 and int(state.step) == 20


FEW = [pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((1, 2, 1), (1, 1, 2), (2, 2, 1))]


@pytest.mark.parametrize("sizes", [(2, 1, 1), (8, 1, 1), (2, 2, 2), *FEW])
def test_meshes_agree_with_one_device(full_precision, sizes):
    cfg, (alone, _, _) = full_precision
    sharded, state, parts = run(dataclasses.replace(cfg, mesh=MeshConfig(*sizes)))
    np.testing.assert_allclose(sharded, alone, atol=1e-5 * np.abs(alone).max())
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(parts.layout), strict=True):
        assert leaf.sharding == place


def test_ternary_codes_do_not_depend_on_the_mesh():
    """int8 activations round at .5, so sums in another order may flip a code: loose, but close."""
    alone, _, _ = run(BASE)
    sharded, _, _ = run(dataclasses.replace(BASE, mesh=MeshConfig(2, 2, 2)))
    np.testing.assert_allclose(sharded, alone, rtol=2e-2)
    np.testing.assert_allclose(sharded[:2], alone[:2], rtol=1e-5)


def test_momenta_lie_where_their_weights_lie():
    parts = program.Parts(dataclasses.replace(BASE, mesh=MeshConfig(1, 4, 2)))
    flat = dict(program.params_lib.flatten(parts.layout).items())
    spec = flat["params/blocks/mlp/up"].spec
    momenta = [s.spec for p, s in flat.items() if "mu" in p and p.endswith("blocks/mlp/up")]
    assert tuple(spec) == (None, "fsdp", "tensor") and momenta == [spec]


def test_microbatches_equal_the_large_batch(full_precision):
    cfg, (whole, _, _) = full_precision
    for count in (2, 4):
        split = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, microbatches=count))
        np.testing.assert_allclose(run(split)[0], whole, rtol=1e-5)


def test_step_donates_its_state():
    parts = program.Parts(BASE)
    state = parts.fresh(0)
    batch = parallel.shard_batch(arrays(0), parts.mesh)
    memory = parts.step.lower(state, batch).compile().memory_analysis()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= size
    parts.step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.slow
def test_same_seed_same_bits_other_seed_other_values():
    first, second = run(BASE, 3)[0], run(BASE, 3)[0]
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, run(dataclasses.replace(BASE, seed=1), 3)[0])


def test_hooks_get_metrics_one_step_late_and_the_last_ones_too():
    parts = program.Parts(BASE)
    calls = []
    batches = (parallel.shard_batch(arrays(i), parts.mesh) for i in range(3))
    loop.run(parts.step, parts.fresh(0), batches, [lambda d, s, m: calls.append((d, m.get("step")))], 3)
    assert calls == [(1, None), (2, 1.0), (3, 2.0), (0, 3.0)]


def test_a_stop_delivers_the_last_metrics_too():
    state, calls = type("State", (), {"step": 0})(), []

    def stop(done, state, metrics):
        calls.append((done, metrics.get("step")))
        if done in (0, 2):  # also when asked once more
            raise loop.StopTraining("enough")

    state, reason = loop.run(lambda s, b: (s, {}), state, iter(range(9)), [stop, stop], 9)
    assert reason == "enough" and calls == [*[(1, None)] * 2, (2, 1.0), *[(0, 2.0)] * 2]


def test_data_that_fails_at_once_stops_before_the_first_step():
    failures: list[Exception] = []
    batches = loop.until_failure(iter(lambda: 1 // 0, 1), failures)
    state = type("State", (), {"step": 0})()
    assert loop.run(None, state, batches, [], 9) == (state, "the data failed: ZeroDivisionError")
    assert [type(error) for error in failures] == [ZeroDivisionError]


def test_mesh_larger_than_the_machine():
    with pytest.raises(ValueError, match="needs 16 devices, but there are 8"):
        parallel.mesh(MeshConfig(16, 1, 1))


def test_a_size_that_does_not_divide_is_named():
    specs = {"w": parallel.ParamSpec((3, 4), ("embed", None), program.params_lib.zeros)}
    with pytest.raises(ValueError, match=r"w: axis 'embed' = 3 is not divisible by mesh axis 'fsdp' = 2"):
        parallel.param_shardings(specs, parallel.mesh(MeshConfig(1, 2, 1)))
    specs = {"w": parallel.ParamSpec((4, 4), ("vocab", "heads"), program.params_lib.zeros)}
    with pytest.raises(ValueError, match="w: mesh axis 'tensor' is used for two dimensions"):
        parallel.param_shardings(specs, parallel.mesh(MeshConfig(1, 1, 2)))


def test_eval_step_counts_bytes_of_real_targets_only():
    cfg = BASE
    parts = program.Parts(cfg)
    state = parts.fresh(0)
    made = arrays(0)
    sizes = np.arange(256, dtype=np.int32) % 4
    got = parts.eval_step(state.params, parallel.shard_batch(made, parts.mesh), jnp.asarray(sizes))
    counted = (made["weights"] > 0) & (sizes[made["targets"]] > 0)
    assert int(got["tokens"]) == counted.sum()
    assert int(got["bytes"]) == sizes[made["targets"]][counted].sum()


def test_uniform_model_has_the_bits_of_its_vocabulary():
    from nanochat_jax.evals import loss

    def uniform(params, batch, sizes):
        nll = jnp.full(batch.targets.shape, jnp.log(256.0))
        return steps.make_eval_step(lambda p, b: nll)(params, batch, sizes)

    made = Batch(**arrays(0, ragged=False))
    result = loss.bits_per_byte(uniform, {}, [made, made], np.full(256, 4, np.int32))
    assert result["eval/bpb"] == pytest.approx(8 / 4, rel=1e-5) and result["eval/tokens"] == 2 * 8 * 32
    with pytest.raises(ValueError, match="no held-out token to score"):
        loss.bits_per_byte(uniform, {}, [made], np.zeros(256, np.int32))


def small(tmp_path, name="run", **changes):
    text = tmp_path / "text"
    if not text.exists():
        text.mkdir()
        for i in range(60):
            (text / f"{i}.txt").write_text("".join(f"def f{i}_{j}(x): return x + {j}\n" for j in range(40)))
    model = dataclasses.replace(MODEL, vocab_size=300, quant="ternary")
    cfg = dataclasses.replace(
        BASE, model=model, data=dataclasses.replace(BASE.data, source=str(text), tokenizer="bytes", val_percent=10),
        train=TrainConfig(steps=changes.pop("steps", 12)),
        eval=dataclasses.replace(BASE.eval, every_steps=5, batches=2, sample_tokens=5),
        log=dataclasses.replace(BASE.log, every_steps=2),
        ckpt=dataclasses.replace(BASE.ckpt, every_steps=4), **changes,
    )  # fmt: skip
    return config_lib.resolve(config_lib.to_dict(cfg)), tmp_path / name


def train(cfg, home, tmp_path, stop_at=None, resume="auto"):
    count = iter(range(10**6))
    asked = (lambda: next(count) + 1 >= stop_at) if stop_at else (lambda: False)
    return program.train(cfg, home, tmp_path / "cache", {}, resume, asked)


@pytest.mark.slow
def test_interrupted_and_continued_equals_straight(tmp_path):
    cfg, straight = small(tmp_path, "straight")
    assert train(cfg, straight, tmp_path) == 0
    broken = tmp_path / "broken"
    assert train(cfg, broken, tmp_path, stop_at=7) == 130
    assert train(cfg, broken, tmp_path, resume="must") == 0
    one, two = (program.json.loads((home / "result.json").read_text()) for home in (straight, broken))
    assert one["state_sha256"] == two["state_sha256"] and one["data_position"] == 12
    assert one["eval"]["eval/bpb"] == two["eval"]["eval/bpb"]
    rows = [line for line in (broken / "metrics.jsonl").read_text().splitlines() if "loss/total" in line]
    assert [program.json.loads(r)["step"] for r in rows] == sorted(
        {program.json.loads(r)["step"] for r in rows}
    )


def test_another_config_in_the_same_workdir_is_refused(tmp_path):
    cfg, home = small(tmp_path, steps=4)
    train(cfg, home, tmp_path)
    other = dataclasses.replace(cfg, seed=3)
    with pytest.raises(ConfigError, match=r"holds a run with other settings \(seed: 0 -> 3\)"):
        train(other, home, tmp_path)
    with pytest.raises(ConfigError, match=r"--resume=never, but .* has a checkpoint of step 4"):
        train(cfg, home, tmp_path, resume="never")
    with pytest.raises(ConfigError, match=r"--resume=must, but .* has no checkpoint"):
        train(cfg, tmp_path / "empty", tmp_path, resume="must")


@pytest.mark.slow
def test_extending_a_finished_run_needs_a_rewarm(tmp_path):
    cfg, home = small(tmp_path, steps=6)
    train(cfg, home, tmp_path)
    longer = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=12))
    with pytest.raises(ValueError, match="learning rate jump"):
        train(longer, home, tmp_path)
    schedule = dataclasses.replace(cfg.opt.schedule, rewarm_steps=3)
    climbing = dataclasses.replace(longer, opt=dataclasses.replace(cfg.opt, schedule=schedule))
    assert train(climbing, home, tmp_path) == 0
    rates = {
        row["step"]: row["opt/lr_matrix"]
        for row in map(program.json.loads, (home / "metrics.jsonl").read_text().splitlines())
        if "opt/lr_matrix" in row
    }
    assert rates[8] < cfg.opt.matrix.lr and rates[6] < rates[8]  # it climbs; it does not jump


@pytest.mark.slow
def test_init_from_takes_parameters_only(tmp_path):
    cfg, home = small(tmp_path, steps=4)
    train(cfg, home, tmp_path)
    ckpt = dataclasses.replace(cfg.ckpt, init_from=str(home))
    again = dataclasses.replace(cfg, ckpt=ckpt)
    with program.checkpoint.Checkpointer(again.ckpt, tmp_path / "second" / "ckpt") as checkpoints:
        _, state, _, origin = program.start_state(again, tmp_path / "second", checkpoints, "auto")
    saved = program.checkpoint.read_misc(home / "ckpt")["fingerprint"]
    assert program.checkpoint.fingerprint(state.params) == saved and int(state.step) == 0
    assert "parameters of" in origin


@pytest.mark.slow
@pytest.mark.parametrize("norm", [True, False])
def test_a_gate_joins_a_trained_model(tmp_path, norm):
    """init_from of a looped run without an exit gate: its parameters, and the gate as in a fresh run."""
    cfg, _ = small(tmp_path)
    looped = dataclasses.replace(cfg.model, norm="weighted", loop=LoopConfig(count=2, norm=norm))
    cfg = dataclasses.replace(cfg, model=looped)
    state = program.Parts(cfg).fresh(1)
    with program.checkpoint.Checkpointer(cfg.ckpt, tmp_path / "first" / "ckpt") as checkpoints:
        checkpoints.save(1, state, {"config": program.manifest.to_dict(cfg)}, wait=True)
    gated = dataclasses.replace(
        cfg, model=dataclasses.replace(looped, loop=dataclasses.replace(looped.loop, gate="shared")),
        train=dataclasses.replace(cfg.train, loss=(("gate", 1.0),)),
        ckpt=dataclasses.replace(cfg.ckpt, init_from=str(tmp_path / "first")),
    )  # fmt: skip
    with program.checkpoint.Checkpointer(gated.ckpt, tmp_path / "second" / "ckpt") as checkpoints:
        _, joined, _, _ = program.start_state(gated, tmp_path / "second", checkpoints, "auto")
    gate = joined.params["loop"].pop("gate")
    assert not gate["w"].any() and not gate["b"].any()
    rest = {name: part for name, part in joined.params.items() if name != "loop" or part}
    assert program.checkpoint.fingerprint(rest) == program.checkpoint.fingerprint(state.params)


@pytest.mark.multiprocess
def test_sigterm_saves_and_the_same_command_continues(tmp_path, child_env):
    command = [
        sys.executable, "-m", "nanochat_jax.train", "--config=configs/smoke.py",
        f"--workdir={tmp_path / 'run'}", "--config.train.steps=2000", "--config.data.max_bytes=600000",
        "--config.log.every_steps=1", "--config.eval.every_steps=0",
    ]  # fmt: skip
    with subprocess.Popen(command, env=child_env, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("step 5/"):
                child.send_signal(signal.SIGTERM)
                break
        rest = child.stderr.read()
    assert child.returncode == 130 and "the same command continues this run" in rest
    stopped = program.checkpoint.latest_step(tmp_path / "run" / "ckpt")
    short = [w for w in command if "train.steps" not in w] + [f"--config.train.steps={stopped + 2}"]
    again = subprocess.run(
        [*short, "--config.opt.schedule.rewarm_steps=1"], env=child_env, capture_output=True, text=True
    )
    assert again.returncode == 0 and f"continuing at step {stopped}" in again.stderr


CHAINS = {
    "plain": [],
    "galore over 8-bit muon": [
        "--config.opt.galore.rank=16", "--config.opt.galore.min_dim=32", "--config.opt.galore.update_gap=3",
        "--config.opt.matrix.state_bits=8", "--config.opt.codes.rounding=stochastic", "--config.opt.spike_sigmas=6",
    ],
    "8-bit foam(adamw), 8-bit lion, fire": [
        "--config.opt.matrix.name=adamw", "--config.opt.foam.level=1", "--config.opt.matrix.state_bits=8",
        "--config.opt.head.name=lion", "--config.opt.head.state_bits=8", "--config.opt.fire.steps=(3,7)",
    ],
    "normuon": ["--config.opt.matrix.name=normuon"],
}  # fmt: skip


@pytest.mark.multiprocess
@pytest.mark.parametrize("chain", CHAINS)
def test_verify_resume_command(child_env, chain):
    command = [
        sys.executable, "-m", "nanochat_jax.train", "--config=configs/smoke.py", "--verify_resume",
        "--config.train.steps=10", "--config.data.max_bytes=600000", *CHAINS[chain],
    ]  # fmt: skip
    result = subprocess.run(command, env=child_env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("identical") == 3


@pytest.mark.slow
def test_a_run_tells_where_its_time_went(tmp_path, capsys):
    """Goodput adds up to the wall time; spans form one tree for each start; log lines name them."""
    log = dataclasses.replace(BASE.log, every_steps=2, format="json")
    cfg, home = small(tmp_path)
    cfg = dataclasses.replace(cfg, log=log)
    began = time.perf_counter()
    assert train(cfg, home, tmp_path, stop_at=7) == 130
    assert train(cfg, home, tmp_path) == 0
    took = time.perf_counter() - began
    spans = [program.json.loads(line) for line in (home / "spans.jsonl").read_text().splitlines()]
    runs = [span for span in spans if span["name"] == "run"]
    assert len(runs) == 2 and runs[0]["status"]["message"] == "interrupted" and "status" not in runs[1]
    known = {span["spanId"]: span for span in spans}
    for span in spans:
        assert span["name"] == "run" or span["traceId"] == known[span["parentSpanId"]]["traceId"]
    outer = {(s["name"], known[s["parentSpanId"]]["name"]) for s in spans if s["name"] != "run"}
    assert outer == {("interval", "run"), ("checkpoint", "interval"), ("eval", "interval")}
    rows = [program.json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    assert all(row["trace_id"] == known[row["span_id"]]["traceId"] for row in rows)
    last = {name: value for name, value in rows[-1].items() if name.startswith("goodput/")}
    wall = last.pop("goodput/wall_seconds")
    assert wall < took and sum(last.values()) == pytest.approx(1.0)
    assert min(last[f"goodput/{kind}"] for kind in ("step", "compile", "checkpoint", "eval", "data")) > 0
    seconds = program.json.loads((home / "result.json").read_text())["seconds"]
    assert seconds["compile"] / wall == pytest.approx(last["goodput/compile"])
    printed = [program.json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {"step", "eval", "checkpoint", "goodput"} <= {line["event"] for line in printed}
    assert all(line["trace_id"] in {run["traceId"] for run in runs} for line in printed)
