"""Saving, restoring and everything that can go wrong between the two."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import errno
import gc
import json
import logging
import math
import random
import subprocess
import sys
import time
from pathlib import Path

import checkpoint_child
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax import checkpoint, optim
from nanochat_jax.checkpoint import Checkpointer, CheckpointError, fingerprint, state_sha256
from nanochat_jax.config import CkptConfig, OptConfig
from nanochat_jax.types import TrainState

# When a read fails, Orbax abandons the other reads; their coroutines complain when they are collected.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. (None|<coroutine object):pytest.PytestUnraisableExceptionWarning"
)
CFG = CkptConfig(keep_last=5)


@pytest.fixture(scope="module", autouse=True)
def collect_abandoned_reads():
    """Let them complain here, not in another file's tests."""
    yield
    gc.collect()


def target_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def small_state(step=1, width=8):
    """A few hundred values; 'w' depends on the step."""
    w = jax.random.normal(jax.random.key(step), (4, width))
    return TrainState(jnp.int32(step), {"blocks": {"w": w, "norm": jnp.ones(4)}}, {"m": 3 * w})


def large_state(step=1):
    """Data files above the size up to which the manifest's SHA-256 is always compared."""
    w = jax.random.normal(jax.random.key(step), (1024, 1024))
    return TrainState(jnp.int32(step), {"w": w}, {"m": jnp.sqrt(jnp.abs(w))})


def never(params):
    raise AssertionError("the optimizer state must not be made anew")


def save_all(directory, states, cfg=CFG):
    with Checkpointer(cfg, directory) as checkpoints:
        for state in states:
            assert checkpoints.save(int(state.step), state, {"mark": f"m{int(state.step)}"})


def data_files(directory, step, item="params"):
    """Data files of an item, largest first."""
    files = (directory / str(step) / item).rglob("d/*")
    return sorted((f for f in files if f.is_file()), key=lambda f: -f.stat().st_size)


def flip_byte(path, offset=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if offset is None else offset] ^= 0x10
    path.write_bytes(content)


# --- round trips -----------------------------------------------------------------------------------


def chained():
    labels = {"embed": "adam", "blocks": {"attn": {"q": "sgd", "norm": "none"}}}
    groups = {"adam": optax.adamw(1e-2), "sgd": optax.sgd(0.1, momentum=0.9), "none": optax.set_to_zero()}
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(groups, labels))


def default():
    return optim.build(OptConfig(), 100)[0]  # Muon, Adam, clipping, skipping, by groups


@pytest.mark.parametrize("make", [chained, default])
def test_an_optimizer_state_returns_bit_for_bit(tmp_path, make, key):
    tx = make()
    blocks = {"attn": {"q": jax.random.normal(key, (2, 8, 8)), "norm": jnp.ones((2, 8))}}
    params = {"embed": jnp.ones((16, 8)), "blocks": blocks}
    opt_state = tx.init(params)
    for i in range(3):
        grads = jax.tree.map(lambda p, i=i: p * 0.3 + i, params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    state = TrainState(jnp.int32(3), params, opt_state)
    save_all(tmp_path, [state])
    with Checkpointer(CFG, tmp_path) as checkpoints:
        restored, misc = checkpoints.restore(target_of(state), never)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert state_sha256(restored) == state_sha256(state)
    assert misc["mark"] == "m3" and misc["step"] == 3


def test_all_kinds_of_leaves_return(tmp_path):
    odd = {
        "bf16": jnp.linspace(-3, 3, 7, dtype=jnp.bfloat16),
        "fp8": jnp.linspace(-3, 3, 7).astype(jnp.float8_e4m3fn),
        "int8": jnp.arange(-4, 4, dtype=jnp.int8),
        "int4": jnp.arange(-8, 8).astype(jnp.int4),
        "bool": jnp.array([True, False]),
        "nan": jnp.array([jnp.nan, -jnp.inf, -0.0]),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(8), 3),
        "none": None,
        "pair": (jnp.int32(3), [jnp.ones(1)], optax.MaskedNode(), optax.EmptyState()),
    }
    state = TrainState(jnp.int32(9), {"w": odd["bf16"], "key": odd["key"]}, odd)
    save_all(tmp_path, [state])
    with Checkpointer(CFG, tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(target_of(state), never)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for got, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert got.dtype == expected.dtype
    assert state_sha256(restored) == state_sha256(state)


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state, digests = large_state(0), {}
    with Checkpointer(CkptConfig(keep_last=20), tmp_path) as checkpoints:
        for step in range(1, 7):
            state = advance(state)
            digests[step] = state_sha256(state)
            checkpoints.save(step, state, {})
            state = advance(advance(state))  # overwrites the buffers while they are being written
            state = jax.tree.map(lambda x: x - 2, state)
            state = TrainState(jnp.int32(step), state.params, state.opt_state)
        for step, expected in digests.items():
            restored, _ = checkpoints.restore(target_of(state), never, step)
            assert state_sha256(restored) == expected


LAYOUTS = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "all": (2, 2, 2), "one": (1, 1, 1)}


def laid_out(shape):
    """The same values on a mesh (data, fsdp, tensor) of the given shape."""
    devices = jax.devices()[: math.prod(shape)]
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), devices=devices, axis_types=(AxisType.Auto,) * 3)
    place = {
        2: NamedSharding(mesh, P("fsdp", "tensor")),
        1: NamedSharding(mesh, P("fsdp")),
        0: NamedSharding(mesh, P()),
    }
    params = {"w": np.arange(512, dtype=np.float32).reshape(16, 32), "norm": np.ones(16, np.float32)}
    tx = optax.adam(1e-3)
    state = TrainState(np.int32(2), params, tx.init(jax.tree.map(jnp.asarray, params)))
    return jax.tree.map(lambda x: jax.device_put(jnp.asarray(x) + 5, place[np.ndim(x)]), state)


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight (fake) devices")
def test_any_mesh_restores_what_any_other_saved(tmp_path):
    expected = state_sha256(laid_out((1, 1, 1)))
    prints = {fingerprint(laid_out(shape)) for shape in LAYOUTS.values()}
    assert len(prints) == 1  # the fingerprint does not depend on the layout
    for name, shape in LAYOUTS.items():
        save_all(tmp_path / name, [laid_out(shape)])
        with Checkpointer(CFG, tmp_path / name) as checkpoints:
            for other in LAYOUTS.values():
                target = target_of(laid_out(other))
                restored, _ = checkpoints.restore(target, never)
                assert state_sha256(restored) == expected
                for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
                    assert got.sharding == want.sharding


def test_parameters_alone(tmp_path):
    state = small_state(4)
    save_all(tmp_path, [small_state(2), state])
    params, misc = checkpoint.restore_params(tmp_path, target_of(state.params))
    assert fingerprint(params) == fingerprint(state.params) and misc["mark"] == "m4"
    assert checkpoint.read_misc(tmp_path, 2)["mark"] == "m2"
    assert checkpoint.latest_step(tmp_path) == 4 and checkpoint.latest_step(tmp_path / "none") is None
    for ask in (lambda d: checkpoint.restore_params(d, {}), checkpoint.read_misc):
        with pytest.raises(CheckpointError, match=r"no .*checkpoint in .*empty"):
            ask(tmp_path / "empty")


# --- what, when, how many --------------------------------------------------------------------------


def test_misc_is_plain_json(tmp_path):
    misc = {
        "loss": math.nan, "list": [1.5, math.inf, (2, -math.inf)], "np": np.float32(0.5), "jax": jnp.int32(3),
        "npnan": np.float64("nan"), "array": np.arange(3), "text": "ü", "none": None, 5: {"x": np.nan},
    }  # fmt: skip
    with Checkpointer(CFG, tmp_path) as checkpoints:
        checkpoints.save(1, small_state(), misc, wait=True)
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpoints.save(2, small_state(2), {"bad": object()})
        assert checkpoints.save(2, small_state(2), {})
    read = checkpoint.read_misc(tmp_path, 1)
    assert {k: read[k] for k in map(str, misc)} == {
        "loss": None, "list": [1.5, None, [2, None]], "np": 0.5, "jax": 3,
        "npnan": None, "array": [0, 1, 2], "text": "ü", "none": None, "5": {"x": None},
    }  # fmt: skip
    text = (tmp_path / "1" / "misc" / "metadata").read_text()
    assert "NaN" not in text and "Infinity" not in text


@pytest.mark.parametrize(
    "keep_last, keep_every, saved, kept",
    [
        (1, 0, [1, 2, 3], [3]),
        (3, 0, [1, 2, 3, 4, 5], [3, 4, 5]),
        (2, 4, [1, 2, 3, 4, 5, 6, 7, 8, 9], [4, 8, 9]),
        (1, 5, [0, 5, 7, 10, 11], [0, 5, 10, 11]),
        (2, 100, [3, 6, 9], [6, 9]),
    ],
)
def test_retention(tmp_path, keep_last, keep_every, saved, kept):
    save_all(
        tmp_path,
        [small_state(s) for s in saved],
        CkptConfig(keep_last=keep_last, keep_every_steps=keep_every),
    )
    with Checkpointer(CFG, tmp_path) as checkpoints:
        assert checkpoints.steps() == kept and checkpoints.latest() == kept[-1]
    assert sorted(int(p.stem) for p in (tmp_path / "manifests").iterdir()) == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*map(str, kept), "manifests"])


def test_due(tmp_path):
    now = 1000.0
    by_both = CkptConfig(every_steps=4, every_minutes=2.0)
    with Checkpointer(by_both, tmp_path / "both", clock=lambda: now) as checkpoints:
        assert [s for s in range(1, 13) if checkpoints.due(s)] == [4, 8, 12]
        now += 119.9
        assert not checkpoints.due(5)
        now += 0.1
        assert checkpoints.due(5)
        checkpoints.save(5, small_state(5), {})
        assert not checkpoints.due(6) and checkpoints.due(8)
    with Checkpointer(CkptConfig(every_steps=0, every_minutes=0), tmp_path / "none") as checkpoints:
        assert not any(checkpoints.due(s) for s in range(20))


def test_saving_twice_and_saving_the_past(tmp_path):
    with Checkpointer(CFG, tmp_path) as checkpoints:
        assert checkpoints.save(5, small_state(5), {"mark": "first"}) is True
        assert checkpoints.save(5, small_state(6), {"mark": "second"}, wait=True) is False
        assert checkpoint.read_misc(tmp_path)["mark"] == "first"
        with pytest.raises(CheckpointError, match="step 3 was not saved: it is older than step 5"):
            checkpoints.save(3, small_state(3), {})
        assert checkpoints.save(6, small_state(6), {}, wait=True) and checkpoints.steps() == [5, 6]


def test_closing(tmp_path):
    checkpoints = Checkpointer(CFG, tmp_path)
    checkpoints.save(1, small_state(), {})
    checkpoints.close()
    checkpoints.close()
    checkpoints.check()
    assert checkpoints.latest() == 1 and (tmp_path / "manifests" / "1.json").exists()
    with pytest.raises(CheckpointError, match="is closed"):
        checkpoints.save(2, small_state(2), {})


def test_the_manifest_is_there_as_soon_as_the_checkpoint_is(tmp_path):
    with Checkpointer(CFG, tmp_path) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(step, small_state(step), {})
            while checkpoints.latest() != step:
                time.sleep(0.001)
            files = json.loads((tmp_path / "manifests" / f"{step}.json").read_text())
            assert {name.split("/")[0] for name in files} == {"params", "opt", "step", "misc"}
            for name, facts in files.items():
                content = (tmp_path / str(step) / name).read_bytes()
                assert facts["size"] == len(content)
                assert facts["sha256"] == checkpoint.hashlib.sha256(content).hexdigest()


def test_orbax_is_quiet(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save_all(tmp_path, [small_state()])
    with Checkpointer(CFG, tmp_path) as checkpoints:
        checkpoints.restore(target_of(small_state()), never)
    assert caplog.messages == []
    assert logging.getLogger().level == logging.INFO


# --- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["size", "sha256"])
@pytest.mark.parametrize("item", ["params", "opt"])
def test_a_flipped_byte_is_found_and_the_older_checkpoint_taken(tmp_path, caplog, verify, item):
    save_all(tmp_path, [large_state(1), large_state(2)])
    for file in data_files(tmp_path, 2, item)[:1]:
        assert file.stat().st_size > checkpoint.SMALL
        flip_byte(file)
    with Checkpointer(CkptConfig(verify=verify), tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=r"no intact checkpoint in .*: step 2: "):
            checkpoints.restore(target_of(large_state(2)), never, 2)
        assert checkpoints.steps() == [1, 2]  # asking for one step moves nothing
        restored, misc = checkpoints.restore(target_of(large_state(2)), never)
        assert state_sha256(restored) == state_sha256(large_state(1)) and misc["mark"] == "m1"
        why = {"size": f"{item}: ", "sha256": "its SHA-256 differs from the manifest"}[verify]
        assert "step 2 is DAMAGED" in caplog.text and why in caplog.text
        # The run goes on from step 1 and reaches step 2 again: both must be savable.
        assert checkpoints.steps() == [1] and (tmp_path / "damaged" / "2" / "params").is_dir()
        assert checkpoints.save(2, large_state(2), {}) and checkpoints.save(3, large_state(3), {}, wait=True)
        restored, _ = checkpoints.restore(target_of(large_state(2)), never, 2)
        assert state_sha256(restored) == state_sha256(large_state(2))
        assert checkpoints.steps() == [1, 2, 3]


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("harm", [truncate, Path.unlink])
@pytest.mark.parametrize("item", ["params", "opt", "step", "misc"])
def test_truncated_and_missing_files(tmp_path, caplog, manifest, harm, item):
    save_all(tmp_path, [small_state(1), small_state(2)])
    harm((data_files(tmp_path, 2, item) or [tmp_path / "2" / "misc" / "metadata"])[0])
    if not manifest:
        (tmp_path / "manifests" / "2.json").unlink()
    with Checkpointer(CFG, tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(target_of(small_state()), never)
    assert state_sha256(restored) == state_sha256(small_state(1))
    assert "step 2 is DAMAGED" in caplog.text and f"{item}" in caplog.text
    assert ("no readable manifest" in caplog.text) != manifest


def test_parameters_alone_fall_back_too(tmp_path, caplog):
    save_all(tmp_path, [small_state(1), small_state(2)])
    flip_byte(data_files(tmp_path, 2)[0])
    params, misc = checkpoint.restore_params(tmp_path, target_of(small_state().params))
    assert fingerprint(params) == fingerprint(small_state(1).params) and misc["step"] == 1
    assert "step 2 is DAMAGED" in caplog.text and checkpoint.latest_step(tmp_path) == 2


def test_nothing_intact_lists_every_reason(tmp_path):
    save_all(tmp_path, [small_state(1), small_state(2), small_state(3)])
    flip_byte(data_files(tmp_path, 3)[0])
    truncate(data_files(tmp_path, 2)[0])
    (tmp_path / "1" / "misc" / "metadata").unlink()
    with Checkpointer(CFG, tmp_path) as checkpoints:
        reasons = r"step 3: params/.* was altered.*; step 2: params/.* has \d+ bytes.*; step 1: misc/"
        with pytest.raises(CheckpointError, match=reasons):
            checkpoints.restore(target_of(small_state()), never)
        assert checkpoints.steps() == [1, 2, 3]
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 8 in .*; it has \[1, 2, 3\]"):
            checkpoints.restore(target_of(small_state()), never, 8)
    none = pytest.raises(CheckpointError, match=r"no intact checkpoint in .*empty: it has none")
    with Checkpointer(CFG, tmp_path / "empty") as checkpoints, none:
        checkpoints.restore(target_of(small_state()), never)


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '"text"'])
def test_without_a_readable_manifest_the_fingerprints_decide(tmp_path, caplog, content):
    save_all(tmp_path, [large_state(1), large_state(2)])
    manifest = tmp_path / "manifests" / "2.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    with Checkpointer(CkptConfig(verify="sha256"), tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(target_of(large_state()), never)
        assert (
            state_sha256(restored) == state_sha256(large_state(2)) and "no readable manifest" in caplog.text
        )
        flip_byte(data_files(tmp_path, 2)[0])
        restored, _ = checkpoints.restore(target_of(large_state()), never)
        assert state_sha256(restored) == state_sha256(large_state(1)) and "have fingerprint" in caplog.text


def test_no_flipped_byte_gives_wrong_values(tmp_path):
    """Without a manifest: whatever byte is flipped, restore gives the saved values or an error."""
    state, rng = small_state(3), random.Random(0)
    save_all(tmp_path, [state])
    (tmp_path / "manifests" / "3.json").unlink()
    files = [f for f in sorted((tmp_path / "3").rglob("*")) if f.is_file() and f.parent.name != "misc"]
    outcomes = set()
    with Checkpointer(CFG, tmp_path) as checkpoints:
        for file in files:
            offset = rng.randrange(file.stat().st_size)
            flip_byte(file, offset)
            try:
                restored, _ = checkpoints.restore(target_of(state), lambda params: {"m": jnp.zeros((4, 8))})
            except CheckpointError:
                outcomes.add("error")
            else:
                assert fingerprint(restored.params) == fingerprint(state.params), file
                assert int(restored.step) == 3, file
                fresh = not np.any(restored.opt_state["m"])
                assert fresh or fingerprint(restored.opt_state) == fingerprint(state.opt_state), file
                outcomes.add("intact")
            flip_byte(file, offset)
        restored, _ = checkpoints.restore(target_of(state), never)
    assert state_sha256(restored) == state_sha256(state) and outcomes == {"error", "intact"}


def test_an_unfinished_save_is_ignored_and_removed(tmp_path, caplog):
    save_all(tmp_path, [small_state(1)])
    partial = tmp_path / "2.orbax-checkpoint-tmp"
    partial.mkdir()
    (partial / "junk").write_text("half")
    (tmp_path / "manifests" / "2.json").write_text("{}")  # killed between the manifest and the commit
    (tmp_path / "deleted" / "0" / "params").mkdir(parents=True)  # killed while retention deleted step 0
    with Checkpointer(CFG, tmp_path) as checkpoints:
        assert not partial.exists() and "removing the unfinished save" in caplog.text
        assert checkpoints.steps() == [1]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "manifests"]
        assert checkpoints.save(2, small_state(2), {}, wait=True) and checkpoints.steps() == [1, 2]


# --- another optimizer, another model --------------------------------------------------------------


def test_another_optimizer_keeps_parameters_and_step(tmp_path, caplog):
    params = small_state(6).params
    adam, sgd = optax.adam(1e-3), optax.sgd(0.1, momentum=0.9)
    state = TrainState(jnp.int32(6), params, adam.init(params))
    save_all(tmp_path, [state])
    wanted = TrainState(state.step, params, sgd.init(params))
    with Checkpointer(CFG, tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(target_of(wanted), jax.jit(sgd.init))
        assert state_sha256(restored) == state_sha256(wanted)
        assert checkpoints.steps() == [6]
    assert "another optimizer" in caplog.text and "opt/0/trace/blocks/norm is missing" in caplog.text


@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_an_optimizer_state_of_other_shape_or_dtype_is_made_anew(tmp_path, caplog, change):
    state = small_state(2)
    save_all(tmp_path, [state])
    other = {"shape": {"m": jnp.zeros((4, 2))}, "dtype": {"m": jnp.zeros((4, 8), jnp.bfloat16)}}[change]
    with Checkpointer(CFG, tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(target_of(state.replace(opt_state=other)), lambda params: other)
    assert state_sha256(restored) == state_sha256(state.replace(opt_state=other))
    assert "opt/m is float32[4, 8], expected " in caplog.text


def test_stateless_parts_of_an_optimizer_may_change(tmp_path):
    params = small_state(2).params
    short = optax.chain(optax.scale_by_adam(), optax.scale(-1.0))
    long = optax.chain(optax.scale_by_adam(), optax.scale(-1.0), optax.clip(1.0), optax.identity())
    state = TrainState(jnp.int32(2), params, short.init(params))
    save_all(tmp_path, [state])
    wanted = state.replace(opt_state=long.init(params))
    with Checkpointer(CFG, tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(target_of(wanted), never)
    assert jax.tree.structure(restored) == jax.tree.structure(wanted)


@pytest.mark.parametrize(
    "params, message",
    [
        (
            {"blocks": {"w": jnp.ones((4, 9)), "norm": jnp.ones(4)}},
            r"blocks/w is float32\[4, 8\], expected float32\[4, 9\]",
        ),
        (
            {"blocks": {"w": jnp.ones((4, 8), jnp.bfloat16), "norm": jnp.ones(4)}},
            r"blocks/w is float32.*expected bfloat16",
        ),
        ({"blocks": {"w": jnp.ones((4, 8))}}, "blocks/norm is not in this configuration"),
        ({"blocks": {"w": jnp.ones((4, 8)), "norm": jnp.ones(4)}, "head": jnp.ones(3)}, "head is missing"),
    ],
)
def test_another_model_is_an_error_that_names_the_paths(tmp_path, params, message):
    save_all(tmp_path, [small_state(1), small_state(2)])
    target = target_of(small_state().replace(params=params))
    with Checkpointer(CFG, tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=f"2 holds the parameters of another model: .*{message}"):
            checkpoints.restore(target, never)
        assert checkpoints.steps() == [1, 2]
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore_params(tmp_path, target.params)


# --- the disk --------------------------------------------------------------------------------------


def test_too_little_space_is_refused_before_writing(tmp_path):
    free = 10 * 2**30
    cfg = CkptConfig(min_free_gb=2.0)
    with Checkpointer(cfg, tmp_path, disk_free=lambda path: free) as checkpoints:
        checkpoints.save(1, small_state(1), {}, wait=True)
        free = 2 * 2**30 + 100  # the state has more than 100 bytes
        message = r"no checkpoint at step 2: it needs 2\.00 GiB free .*has 2\.00; .*step 1 is intact"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.save(2, small_state(2), {})
        assert checkpoints.steps() == [1] and not (tmp_path / "2").exists()
        free = 2 * 2**30 + 1000
        assert checkpoints.save(2, small_state(2), {}, wait=True)


@pytest.fixture
def full_disk():
    """Call it to make writes beyond 1 MiB per file fail, as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(full=True):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20 if full else soft, hard))

    yield fill
    fill(False)


def by_check(checkpoints):
    for _ in range(400):
        checkpoints.check()
        time.sleep(0.02)


@pytest.mark.parametrize(
    "notice",
    [by_check, Checkpointer.wait, Checkpointer.close, lambda c: c.save(3, large_state(3), {})],
    ids=["check", "wait", "close", "save"],
)
def test_a_failure_in_the_background_surfaces(tmp_path, full_disk, notice):
    checkpoints = Checkpointer(CFG, tmp_path)
    checkpoints.save(1, large_state(1), {}, wait=True)
    full_disk()
    checkpoints.save(2, large_state(2), {})
    with pytest.raises(CheckpointError, match=r"saving step 2 in .* failed: .*step 1 is intact"):
        notice(checkpoints)
    full_disk(False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "manifests"]  # the space is given back
    if notice is not Checkpointer.close:
        assert checkpoints.save(2, large_state(2), {}, wait=True)
        assert checkpoints.steps() == [1, 2]
    checkpoints.close()
    with Checkpointer(CFG, tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(target_of(large_state()), never)
    assert state_sha256(restored) == state_sha256(large_state(checkpoints.latest()))


def test_a_failing_manifest_fails_the_save(tmp_path, monkeypatch):
    def broken(path, *_, **__):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with Checkpointer(CFG, tmp_path) as checkpoints:
        checkpoints.save(1, small_state(1), {}, wait=True)
        monkeypatch.setattr(checkpoint.files, "write_json", broken)
        checkpoints.save(2, small_state(2), {})
        with pytest.raises(CheckpointError, match=r"saving step 2 in .* failed: .*2\.json"):
            checkpoints.wait()
        assert checkpoints.steps() == [1]


def test_stacks_that_asyncio_logs_of_orbax_are_not_shown(caplog):
    told = logging.getLogger("asyncio")
    told.error("Task exception was never retrieved\nfuture: ckpt/8.orbax-checkpoint-tmp/params")
    told.error("Task exception was never retrieved\nfuture: of the server")
    assert [record.message.split()[-1] for record in caplog.records] == ["server"]


def test_an_error_of_orbax_is_told_once(tmp_path, full_disk, caplog, monkeypatch):
    with Checkpointer(CFG, tmp_path) as checkpoints:
        full_disk()
        checkpoints.save(2, large_state(2), {})
        with pytest.raises(CheckpointError) as caught:
            checkpoints.wait()
        full_disk(False)
        again = [caught.value.__cause__]

        def repeat():
            assert again[-1] is not None
            raise again[-1]

        monkeypatch.setattr(checkpoints._manager, "check_for_errors", repeat)
        checkpoints.wait()
        assert "Orbax" not in caplog.text
        again.append(RuntimeError("something else"))
        checkpoints.wait()
        checkpoints.wait()
        assert caplog.text.count("something else") == 1


def test_of_absls_log_orbax_alone_is_dropped(caplog):
    import orbax.checkpoint as ocp
    from absl import logging as absl

    absl.error("of somebody else")
    exec(compile("absl.error('of Orbax')", ocp.__file__, "exec"), {"absl": absl})
    assert "of somebody else" in caplog.text and "of Orbax" not in caplog.text


# --- fingerprints ----------------------------------------------------------------------------------


def test_state_sha256_sees_everything():
    base = small_state(1)
    others = [
        base,
        base.replace(step=jnp.int32(2)),
        base.replace(params={"blocks": {"v": base.params["blocks"]["w"], "norm": jnp.ones(4)}}),
        base.replace(opt_state={"m": base.opt_state["m"].reshape(8, 4)}),
        base.replace(opt_state={"m": base.opt_state["m"].view(jnp.int32)}),
        base.replace(opt_state={"m": base.opt_state["m"].at[2, 3].multiply(1 + 1e-6)}),
    ]
    assert len({state_sha256(s) for s in others}) == len(others)
    assert state_sha256(base) == state_sha256(small_state(1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4", "float8_e4m3fn", "uint32", "bool"])
def test_fingerprint_sees_every_flipped_bit_and_swaps(dtype):
    bits = {"bool": 1, "int4": 4}.get(dtype, 8 * jnp.dtype(dtype).itemsize)
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 2**bits, (3, 5), dtype=np.uint64)

    def values(words):
        if dtype == "bool":
            return jnp.asarray(words.astype(bool))
        return jax.lax.bitcast_convert_type(jnp.asarray(words.astype(np.uint32)).astype(f"uint{bits}"), dtype)

    original = fingerprint(values(raw))
    for i, j, bit in np.ndindex(3, 5, bits):
        changed = raw.copy()
        changed[i, j] ^= np.uint64(1 << bit)
        assert fingerprint(values(changed)) != original
    assert fingerprint(values(raw[::-1])) != original


def test_fingerprint_by_hand():
    """Oracle: sum over leaves l and positions i of bits * (2i+1) * (2l+1), modulo 2^32."""
    a, b = np.float32([[1.5, -2.0], [0.25, 3e38]]), np.int8([-1, 7])
    expected = 0
    for leaf, words in enumerate([a.view(np.uint32).ravel(), b.view(np.uint8)]):
        expected += (2 * leaf + 1) * sum(int(w) * (2 * i + 1) for i, w in enumerate(words)) % 2**32
    assert fingerprint({"a": jnp.asarray(a), "b": jnp.asarray(b), "none": None}) == expected % 2**32


# --- killed ----------------------------------------------------------------------------------------


def kill_and_look(directory, child_env, delay):
    """Run the child, kill it `delay` seconds after its first commit, check what it left."""
    command = [sys.executable, checkpoint_child.__file__, str(directory)]
    with subprocess.Popen(command, env=child_env, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        printed = [child.stdout.readline()]
        time.sleep(delay)
        child.kill()
        printed += child.stdout.read().splitlines(keepends=True)
    promised = max(int(line) for line in printed if line.endswith("\n"))
    with Checkpointer(checkpoint_child.CFG, directory) as checkpoints:
        latest = checkpoints.latest()
        assert latest is not None and latest >= promised
        for step in checkpoints.steps():
            expected = checkpoint_child.state_of(step)
            restored, misc = checkpoints.restore(target_of(expected), never, step)
            assert state_sha256(restored) == state_sha256(expected) and misc["step"] == step
    assert not list(directory.glob("*tmp*"))
    return latest


@pytest.mark.multiprocess
def test_killed_at_any_moment(tmp_path, child_env):
    rng = random.Random(1)
    latest = [kill_and_look(tmp_path, child_env, rng.uniform(0, 0.3)) for _ in range(3)]
    assert latest == sorted(set(latest))  # each child continued where the one before was killed


@pytest.mark.multiprocess
@pytest.mark.slow
def test_killed_twenty_times(tmp_path, child_env):
    rng = random.Random(2)
    latest = [kill_and_look(tmp_path, child_env, rng.uniform(0, 0.3)) for _ in range(20)]
    assert latest == sorted(set(latest))
