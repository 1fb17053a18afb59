"""Save and restore training, on Orbax, with checks that Orbax does not make.

A checkpoint is four items under <directory>/<step>/: params, opt, step and misc (JSON). They are
separate so that parameters can be read without an optimizer. Orbax commits by renaming a temporary
directory, so a killed save leaves the previous checkpoint; but it restores a flipped byte without
complaint. Therefore a manifest of file sizes and SHA-256 sums is written beside every commit
(manifests/<step>.json) and a fingerprint of the values is stored in misc; restore compares both and
falls back to the next older checkpoint, saying why.
"""

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from nanochat_jax.config import CkptConfig
from nanochat_jax.params import flatten
from nanochat_jax.types import Params, TrainState

log = logging.getLogger(__name__)
ITEMS = ("params", "opt", "step", "misc")
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read. The message says why and what is intact."""


class Checkpointer:
    """The checkpoints of one run. A context manager; closing it waits for the last save.

    Args: cfg: what to keep and how to verify. directory: made if absent. clock: seconds, monotonic.
    disk_free: bytes available at a path.
    """

    def __init__(
        self,
        cfg: CkptConfig,
        directory: Path,
        clock: Callable[[], float] = time.monotonic,
        disk_free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    ):
        self.cfg, self.directory = cfg, Path(directory).absolute()
        self._clock, self._disk_free = clock, disk_free
        self._saved_at, self._unmanifested = clock(), None
        keep: list[Any] = [preservation_policy.LatestN(cfg.keep_last)]
        if cfg.keep_every_steps:
            keep.append(preservation_policy.EveryNSteps(cfg.keep_every_steps))
        self.directory.mkdir(parents=True, exist_ok=True)
        for partial in self.directory.glob("*.orbax-checkpoint-tmp*"):
            log.warning("removing the unfinished save %s", partial.name)
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs 20 lines per save
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,
            ),
            item_names=ITEMS,
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of all committed checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return max(self.steps(), default=None)

    def due(self, step: int) -> bool:
        """Is it time to save, by steps or by minutes since the last save?"""
        by_step = self.cfg.every_steps and step % self.cfg.every_steps == 0
        by_time = self.cfg.every_minutes and self._clock() - self._saved_at >= 60 * self.cfg.every_minutes
        return bool(by_step or by_time)

    def save(self, step: int, state: TrainState, misc: dict[str, Any], wait: bool = False) -> bool:
        """Start saving the state after `step` steps; the write itself happens in the background.

        Args: misc: JSON-able facts; NaN and infinity become null. wait: return after the commit.
        Returns: False if this step is already saved.
        Raises: CheckpointError if the disk is too full (nothing was written), or if this or the
        previous save failed.
        """
        self._finish()
        self._saved_at = self._clock()
        if step in self._manager.all_steps():
            return False
        needed = sum(x.nbytes for x in jax.tree.leaves(state)) + int(self.cfg.min_free_gb * 2**30)
        if (free := self._disk_free(self.directory)) < needed:
            raise CheckpointError(
                f"no checkpoint at step {step}: it needs {needed / 2**30:.2f} GiB free (with "
                f"ckpt.min_free_gb = {self.cfg.min_free_gb}), {self.directory} has {free / 2**30:.2f}; "
                f"the checkpoint of step {self.latest()} is intact"
            )
        record = _finite({**misc, "format": FORMAT, **_fingerprints(state)})
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                opt=ocp.args.StandardSave({"opt": state.opt_state}),
                step=ocp.args.StandardSave({"step": state.step}),
                misc=ocp.args.JsonSave(record),
            ),
        )
        if not saved:
            raise CheckpointError(f"step {step} was not saved: it is older than step {self.latest()}")
        self._unmanifested = step
        if wait:
            self._finish()
        return True

    def wait(self) -> None:
        """Wait for the save under way. Raises: CheckpointError if it failed."""
        self._finish()

    def close(self) -> None:
        """Wait, and release Orbax's threads. Closing twice is harmless."""
        if self._manager is not None:
            try:
                self._finish()
            finally:
                self._manager.close()
                self._manager = None

    def _finish(self) -> None:
        """Wait for the commit of the save under way, then write its manifest."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            self._unmanifested = None
            raise CheckpointError(f"the save in the background failed: {error}") from error
        if self._unmanifested is not None:
            step, self._unmanifested = self._unmanifested, None
            _write_manifest(self.directory, step)
        for old in self.directory.glob("manifests/*.json"):
            if int(old.stem) not in self._manager.all_steps():
                old.unlink()

    def restore(
        self,
        target: TrainState,
        init_opt: Callable[[Params], optax.OptState],
        step: int | None = None,
    ) -> tuple[TrainState, dict[str, Any]]:
        """Restore the newest intact checkpoint, or exactly `step`.

        Args: target: TrainState of ShapeDtypeStructs with shardings of the current mesh (from
        eval_shape; the mesh may differ from the one that saved). init_opt: makes a fresh optimizer
        state, used with a warning if the saved one has another structure (another optimizer).
        Returns: (state, misc).
        Raises: CheckpointError if there is none, if none is intact (with each reason), or if the
        parameters have other names or shapes.
        """
        candidates = [step] if step is not None else self.steps()[::-1]
        reasons = []
        for candidate in candidates:
            try:
                return self._restore(candidate, target, init_opt)
            except _Damaged as damage:
                reasons.append(f"step {candidate}: {damage}")
                log.warning("checkpoint of step %d is damaged (%s); trying the one before", candidate, damage)
        raise CheckpointError(f"no intact checkpoint in {self.directory}: {'; '.join(reasons) or 'it has none'}")

    def _restore(self, step, target, init_opt):
        directory = self.directory / str(step)
        _verify(self.directory, step, self.cfg.verify)
        misc = read_misc(self.directory, step)
        params = _read_params(directory, target.params)
        if (expected := misc.get("fingerprint")) != (got := fingerprint(params)):
            raise _Damaged(f"parameters have fingerprint {got}, expected {expected}")
        count = _read(directory / "step", {"step": target.step})["step"]
        try:
            opt = _read(directory / "opt", {"opt": target.opt_state})["opt"]
        except ValueError as error:
            changed = _difference(_structure(directory / "opt"), {"opt": target.opt_state})
            if not changed:
                raise _Damaged(f"optimizer state: {_first_line(error)}") from None
            log.warning(
                "checkpoint of step %d was written by another optimizer (%s): keeping the parameters "
                "and starting its state anew", step, changed,
            )  # fmt: skip
            opt = init_opt(params)
        else:
            if misc.get("fingerprint_opt") != (got := fingerprint(opt)):
                raise _Damaged(f"optimizer state has fingerprint {got}, expected {misc.get('fingerprint_opt')}")
        return TrainState(count, params, opt), misc


def _fingerprints(state: TrainState) -> dict[str, int]:
    return {"fingerprint": fingerprint(state.params), "fingerprint_opt": fingerprint(state.opt_state)}


class _Damaged(Exception):
    """A checkpoint's content is not what was saved."""


def restore_params(directory: Path, target: Params, verify: str = "size") -> tuple[Params, dict[str, Any]]:
    """Parameters of a directory's newest checkpoint, and its misc; nothing else is read.

    Args: target: tree of ShapeDtypeStructs with shardings. verify: as ckpt.verify.
    Raises: CheckpointError if there is none, it is damaged, or names or shapes differ.
    """
    step = latest_step(directory)
    if step is None:
        raise CheckpointError(f"no checkpoint in {directory}")
    try:
        _verify(directory, step, verify)
        misc = read_misc(directory, step)
        params = _read_params(directory / str(step), target)
        if misc.get("fingerprint") != fingerprint(params):
            raise _Damaged("parameters do not match their fingerprint")
    except _Damaged as damage:
        raise CheckpointError(f"checkpoint {directory / str(step)} is damaged: {damage}") from None
    return params, misc


def latest_step(directory: Path) -> int | None:
    """Newest committed step in a checkpoint directory, without opening it."""
    names = (p.name for p in Path(directory).glob("*") if p.is_dir())
    return max((int(name) for name in names if name.isdigit()), default=None)


def read_misc(directory: Path, step: int | None = None) -> dict[str, Any]:
    """The JSON record of a checkpoint (the newest by default). Raises: CheckpointError."""
    step = latest_step(directory) if step is None else step
    path = Path(directory) / str(step) / "misc" / "metadata"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _Damaged(f"{path}: {error}") from None


@jax.jit
def _bit_sums(tree: Any) -> list[jax.Array]:
    def total(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if leaf.dtype == jnp.bool_:
            leaf = leaf.astype(jnp.uint8)
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        words = jax.lax.bitcast_convert_type(leaf, unsigned)
        # Position enters, so that swapped values are noticed, too.
        flat = words.reshape(-1).astype(jnp.uint32)
        return jnp.sum(flat * (2 * jnp.arange(flat.size, dtype=jnp.uint32) + 1))

    return [total(leaf) for leaf in jax.tree.leaves(tree)]


def fingerprint(tree: Any) -> int:
    """A 32-bit checksum of the values of a tree, computed where they live."""
    sums = jax.device_get(_bit_sums(tree))
    return int(sum(int(s) * (2 * i + 1) for i, s in enumerate(sums)) % 2**32)


def state_sha256(state: TrainState) -> str:
    """SHA-256 over the path, dtype, shape and bytes of every leaf: equal means bit-identical."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(state).items()):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(jax.device_get(leaf))
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _read(path: Path, target: Any) -> Any:
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(path, target)


def _read_params(directory: Path, target: Params) -> Params:
    try:
        return _read(directory / "params", target)
    except Exception as error:
        if changed := _difference(_structure(directory / "params"), target):
            raise CheckpointError(f"{directory} holds another model: {changed}") from None
        raise _Damaged(f"parameters: {_first_line(error)}") from None


def _structure(path: Path) -> Any:
    """Tree of shapes as saved. Raises: _Damaged if even that is unreadable."""
    try:
        with ocp.StandardCheckpointer() as reader:
            return reader.metadata(path).item_metadata.tree
    except Exception as error:
        raise _Damaged(f"{path.name}: {_first_line(error)}") from None


def _difference(saved: Any, wanted: Any) -> str:
    """The first paths that are missing, unexpected or of another shape or dtype; "" if none."""

    def shapes(tree):
        return {p: (tuple(x.shape), str(x.dtype)) for p, x in flatten(tree).items() if hasattr(x, "shape")}

    have, want = shapes(saved), shapes(wanted)
    notes = [f"{p} is missing" for p in want if p not in have]
    notes += [f"{p} is not in this configuration" for p in have if p not in want]
    notes += [f"{p} is {have[p]}, expected {want[p]}" for p in want if p in have and have[p] != want[p]]
    return ", ".join(notes[:3]) + (f" and {len(notes) - 3} more" if len(notes) > 3 else "")


def _write_manifest(directory: Path, step: int) -> None:
    files = {}
    for path in sorted((directory / str(step)).rglob("*")):
        if path.is_file():
            with open(path, "rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            files[str(path.relative_to(directory))] = {"size": path.stat().st_size, "sha256": digest}
    target = directory / "manifests" / f"{step}.json"
    target.parent.mkdir(exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(files, indent=1))
    partial.replace(target)


def _verify(directory: Path, step: int, how: str) -> None:
    """Compare files with the manifest. Raises: _Damaged."""
    path = Path(directory) / "manifests" / f"{step}.json"
    if not path.exists():  # killed between the commit and the manifest: the fingerprint must do
        log.warning("checkpoint of step %d has no manifest; only its fingerprint can be checked", step)
        return
    for name, expected in json.loads(path.read_text()).items():
        file = Path(directory) / name
        size = file.stat().st_size if file.exists() else None
        if size != expected["size"]:
            raise _Damaged(f"{name} has {size} bytes, expected {expected['size']}")
        if how == "sha256":
            with open(file, "rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != expected["sha256"]:
                    raise _Damaged(f"{name} was altered: its SHA-256 differs from the manifest")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _finite(value: Any) -> Any:
    """JSON without NaN and infinity: they become null."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
