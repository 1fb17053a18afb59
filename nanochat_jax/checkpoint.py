"""Save and restore training, on Orbax, with checks that Orbax does not make.

A checkpoint is four items under <directory>/<step>/: params, opt, step and misc (JSON). They are
separate so that parameters can be read without an optimizer. Orbax commits by renaming a temporary
directory, so a killed save leaves the previous checkpoint; but it restores a flipped byte without
complaint. Therefore a manifest of file sizes and SHA-256 sums (manifests/<step>.json) is written
before every commit, and a fingerprint of the values is kept in misc. Restore compares both and falls
back to the next older checkpoint, saying why.

With several processes each writes its shards, to a directory that all share; process 0 alone looks at
files, removes and renames them, and its findings hold for all. All must call the same functions.
"""

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from nanochat_jax import files, processes
from nanochat_jax.config import CkptConfig
from nanochat_jax.params import flatten, path_name
from nanochat_jax.types import Params, TrainState

T = TypeVar("T")
Misc = dict[str, Any]  # JSON

log = logging.getLogger(__name__)
# Of Orbax's log nothing is shown: 20 lines per save, warnings when an item is read alone, and for a full disk a
# dozen stacks of its threads. What fails there reaches us as an exception, and is told in a sentence.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())

FORMAT = 1
FINGERPRINTS = {"params": "fingerprint", "opt": "fingerprint_opt", "step": "fingerprint_step"}  # keys of misc
AGREE_STEPS = 10  # with several processes the clock is looked at after so many steps, which costs a message
SMALL = 2**20  # bytes; files up to this size are always hashed: structure and misc have no fingerprint


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read. The message says why and what is intact."""


class SaveFailedError(Exception):
    """One of several processes could not write its part. Others wait for it: the run must end. Earlier
    checkpoints are intact."""


class _DamagedError(CheckpointError):
    """A checkpoint's content is not what was saved."""


class _MismatchError(Exception):
    """A checkpoint holds a tree with other leaves than wanted. The message names the first."""


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
        self._saved_at, self._saving, self._told = clock(), None, ""
        keep: list[Any] = [preservation_policy.LatestN(cfg.keep_last)]
        if cfg.keep_every_steps:
            keep.append(preservation_policy.EveryNSteps(cfg.keep_every_steps))
        self.directory.mkdir(parents=True, exist_ok=True)
        for partial in self.directory.glob("*.orbax-checkpoint-tmp*"):
            log.warning("removing the unfinished save %s", partial)
        processes.barrier()
        self._sweep()  # Orbax's own clean-up would run in the background, into the first save
        self._manager: Any = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(keep),
                todelete_subdir="deleted",  # by renaming: a kill leaves no half-deleted checkpoint
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
            item_names=(*FINGERPRINTS, "misc"),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or processes.count() == 1:  # else a save under way may wait for a lost process
            self.close()

    def steps(self) -> list[int]:
        """Steps of all committed checkpoints, oldest first."""
        return _steps(self.directory)

    def latest(self) -> int | None:
        """Step of the newest committed checkpoint."""
        return latest_step(self.directory)

    def due(self, step: int) -> bool:
        """Is it time to save, by steps or by minutes since the last save was tried (by process 0's clock)?"""
        by_step = self.cfg.every_steps and step % self.cfg.every_steps == 0
        if by_step or not self.cfg.every_minutes or (processes.count() > 1 and step % AGREE_STEPS):
            return bool(by_step)
        return bool(processes.agreed(int(self._clock() - self._saved_at >= 60 * self.cfg.every_minutes)))

    def save(self, step: int, state: TrainState, misc: Misc, wait: bool = False) -> bool:
        """Start saving the state after `step` steps; the write itself happens in the background.

        When this returns, the state has been copied and may be donated. If a save is still under
        way, it is waited for first.

        Args: misc: JSON-able facts; NaN and infinity become null. wait: return after the commit.
        Returns: False if this step is already saved (nothing is done), else True.
        Raises: CheckpointError if the disk is too full, or if this or the previous save failed.
        Earlier checkpoints are intact then, and later saves may succeed. With several processes a
        failure is a SaveFailedError.
        """
        self.wait()
        self._saved_at = self._clock()  # a full disk is tried again after the interval, not at every step
        if processes.agreed(int(step in self.steps())):
            return False
        size = sum(getattr(leaf, "nbytes", 8) for leaf in jax.tree.leaves(state))
        needed, free = size + int(self.cfg.min_free_gb * 2**30), self._disk_free(self.directory)
        if processes.agreed(int(free < needed)):
            unit, name = (2**30, "GiB") if needed >= 2**30 else (2**20, "MiB")
            raise CheckpointError(
                f"no checkpoint at step {step}: it needs {needed / unit:.2f} {name} free ("
                f"ckpt.min_free_gb = {self.cfg.min_free_gb} included), {self.directory} has {free / unit:.2f}; "
                f"free some space; {self._intact()}"
            )
        items = {"params": state.params, "opt": {"opt": state.opt_state}, "step": {"step": state.step}}
        prints = {FINGERPRINTS[name]: fingerprint(tree) for name, tree in items.items()}
        record = _jsonable({"step": step, **misc, "format": FORMAT, **prints})
        json.dumps(record)  # a value that is no JSON must fail here, not in the background
        self._saving = step
        saves = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        try:
            saved = self._manager.save(step, args=ocp.args.Composite(**saves, misc=ocp.args.JsonSave(record)))
        except Exception as error:
            raise self._failed(error) from error
        if not saved:
            raise CheckpointError(f"step {step} was not saved: it is older than step {self.latest()}")
        if wait:
            self.wait()
        return True

    def check(self) -> None:
        """Report a failure in the background without waiting. Raises: CheckpointError."""
        if self._manager is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def close(self) -> None:
        """Wait, and release Orbax's threads. Closing twice is harmless. Raises: as `wait`."""
        if self._manager is not None:
            try:
                self.wait()
            finally:
                self._manager.close()
                self._manager = None

    def wait(self) -> None:
        """Wait for the commit of the save under way, and clean up. Raises: CheckpointError if it failed."""
        if self._manager is None:
            raise CheckpointError(f"the Checkpointer of {self.directory} is closed")
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            if self._saving is not None:
                raise self._failed(error) from error
            if str(error) != self._told:  # Orbax repeats what has been told
                self._told = str(error)
                log.warning("Orbax, while nothing is saved in %s: %s", self.directory, _first_line(error))
        self._saving = None
        self._sweep()

    def _failed(self, error: Exception) -> Exception:
        """Give back the disk space of the failed save, and forget it."""
        step, self._saving, self._told = self._saving, None, str(error)
        what = f"saving step {step} in {self.directory} failed: {_first_line(error)}"
        if processes.count() > 1:
            return SaveFailedError(what)
        self._sweep()
        self._manager.reload()
        return CheckpointError(f"{what}; {self._intact()}")

    def _intact(self) -> str:
        latest = self.latest()
        return "there is no other one" if latest is None else f"the checkpoint of step {latest} is intact"

    def _sweep(self) -> None:
        """Remove what belongs to no checkpoint. Must not run while a save is under way."""
        if not processes.first():
            return
        for _ in range(40):  # after a failure, writers of other items may still run and make files anew
            if not (partials := list(self.directory.glob("*.orbax-checkpoint-tmp*"))):
                break
            for partial in partials:
                shutil.rmtree(partial, ignore_errors=True)
            time.sleep(0.05)
        shutil.rmtree(self.directory / "deleted", ignore_errors=True)  # what retention put there
        files.sweep(self.directory / "manifests")
        kept = self.steps()
        for old in self.directory.glob("manifests/*.json"):
            if int(old.stem) not in kept:
                old.unlink()

    def _write_manifest(self) -> None:
        """Record the files of the save under way; Orbax calls this, in process 0, just before the commit."""
        final = self.directory / str(self._saving)
        partial = next(self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"), final)
        found = {}
        for path in sorted(partial.rglob("*")):
            # Orbax adds the time of the commit to files at the top level; restore does not read them.
            if path.is_file() and path.parent != partial:
                name = str(path.relative_to(partial))
                found[name] = {"size": path.stat().st_size, "sha256": _file_sha256(path)}
        target = self.directory / "manifests" / f"{self._saving}.json"
        target.parent.mkdir(exist_ok=True)
        files.write_json(target, found, sync=True)

    def restore(
        self,
        target: TrainState,
        init_opt: Callable[[Params], optax.OptState],
        step: int | None = None,
    ) -> tuple[TrainState, Misc]:
        """Restore the newest intact checkpoint, or exactly `step`.

        Newer checkpoints found damaged are moved to <directory>/damaged, so that their steps can be
        saved again; if none is intact, nothing is moved.

        Args: target: TrainState of ShapeDtypeStructs with shardings of the current mesh (from
        eval_shape; the mesh may differ from the one that saved). init_opt: makes a fresh optimizer
        state, used with a warning if the saved one has other leaves (another optimizer).
        Returns: (state, misc).
        Raises: CheckpointError if there is none, if none is intact (with each reason), or if the
        parameters have other names, shapes or dtypes.
        """
        self.wait()
        if step is not None and step not in self.steps():
            raise CheckpointError(f"no checkpoint of step {step} in {self.directory}; it has {self.steps()}")
        candidates = self.steps()[::-1] if step is None else [step]
        restored, damaged = _first_intact(
            self.directory, candidates, lambda step: self._restore(step, target, init_opt)
        )
        for bad in damaged:
            self._set_aside(bad)
        return restored

    def _restore(self, step: int, target: TrainState, init_opt: Callable) -> tuple[TrainState, Misc]:
        misc = _verify(self.directory, step, self.cfg.verify)
        params = _read_params(self.directory, step, target.params, misc)
        try:
            count = _read(self.directory, step, "step", {"step": target.step}, misc)["step"]
        except _MismatchError as other:
            raise _DamagedError(f"step: {other}") from None
        try:
            opt_state = _read(self.directory, step, "opt", {"opt": target.opt_state}, misc)["opt"]
        except _MismatchError as other:
            log.warning(
                "checkpoint of step %d has the state of another optimizer (%s): keeping the parameters and "
                "the step, starting the optimizer's state, its own step counts included, anew",
                step, other,
            )  # fmt: skip
            opt_state = init_opt(params)
        return TrainState(count, params, opt_state), misc

    def _set_aside(self, step: int) -> None:
        aside = self.directory / "damaged" / str(step)
        processes.barrier()  # nobody reads it any more
        if processes.first():
            while aside.exists():
                aside = aside.with_name(aside.name + "_")
            aside.parent.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(aside)
            log.warning("the damaged checkpoint of step %d is now %s; delete it when you like", step, aside)
        processes.barrier()
        self._manager.reload()


def restore_params(directory: Path, target: Params, verify: str = "size") -> tuple[Params, Misc]:
    """Parameters of a directory's newest intact checkpoint, and its misc; nothing else is read.

    Args: target: tree of ShapeDtypeStructs with shardings. verify: as ckpt.verify.
    Raises: CheckpointError if there is none, none is intact, or names, shapes or dtypes differ.
    """

    def load(step: int) -> tuple[Params, Misc]:
        misc = _verify(directory, step, verify)
        return _read_params(directory, step, target, misc), misc

    directory = Path(directory).absolute()
    return _first_intact(directory, _steps(directory)[::-1], load)[0]


def latest_step(directory: Path) -> int | None:
    """Newest committed step in a checkpoint directory, without opening it."""
    return max(_steps(directory), default=None)


def read_misc(directory: Path, step: int | None = None) -> Misc:
    """The JSON record of a checkpoint (the newest by default). Raises: CheckpointError."""
    if step is None and (step := latest_step(directory)) is None:
        raise CheckpointError(f"no checkpoint in {directory}")
    path = Path(directory) / str(step) / "misc" / "metadata"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _DamagedError(f"misc: {_first_line(error)}") from None


def fingerprint(tree: Any) -> int:
    """A 32-bit checksum of the values of a tree of arrays, computed where they live.

    Any changed bit changes it, and so do swapped values. None leaves count for nothing.
    """
    sums = jax.device_get([bit_sum(leaf) for leaf in jax.tree.leaves(tree)])
    return sum(int(s) * (2 * i + 1) for i, s in enumerate(sums)) % 2**32


@jax.jit
def bit_sum(leaf: jax.Array) -> jax.Array:
    """Sum of the bit patterns times odd weights by position, modulo 2^32."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    info = jnp.iinfo if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.finfo
    words = jax.lax.bitcast_convert_type(leaf, f"uint{min(info(leaf.dtype).bits, 32)}").astype(jnp.uint32)
    weights, stride = jnp.ones(words.shape, jnp.uint32), 2
    for axis in reversed(range(words.ndim)):  # never flattened, which would gather a sharded leaf
        weights += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(words * weights, dtype=jnp.uint32)


def state_sha256(state: TrainState) -> str:
    """SHA-256 over the path, dtype, shape and bytes of every leaf: equal means bit-identical."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(state).items()):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = processes.whole(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _steps(directory: Path) -> list[int]:
    names = (path.name for path in Path(directory).glob("*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())


def _first_intact(
    directory: Path, candidates: Iterable[int], load: Callable[[int], T]
) -> tuple[T, list[int]]:
    """(load(step), the damaged steps before it) of the first intact step. Raises: CheckpointError."""
    reasons: dict[int, str] = {}
    for step in candidates:
        try:
            return load(step), list(reasons)
        except _DamagedError as damage:
            reasons[step] = str(damage)
            log.warning("checkpoint of step %d is DAMAGED (%s); trying an older one", step, damage)
    found = "; ".join(f"step {step}: {reason}" for step, reason in reasons.items())
    raise CheckpointError(f"no intact checkpoint in {directory}: {found or 'it has none'}")


def _verify(directory: Path, step: int, how: str) -> Misc:
    """Compare files with the manifest, in process 0; returns misc. Raises: _DamagedError, in all."""
    problem, misc = None, {}
    try:
        if processes.first():
            _compare(directory, step, how)
        misc = read_misc(directory, step)
    except _DamagedError as damage:
        problem = damage
    processes.together(problem, _DamagedError("as another process has found"))
    return misc


def _compare(directory: Path, step: int, how: str) -> None:
    try:
        manifest = dict(json.loads((directory / "manifests" / f"{step}.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        log.warning(
            "checkpoint of step %d has no readable manifest (%s); its values can be checked by their "
            "fingerprints only", step, _first_line(error),
        )  # fmt: skip
        manifest = {}
    for name, expected in manifest.items():
        file = directory / str(step) / name
        size = file.stat().st_size if file.exists() else -1
        if size != expected.get("size"):
            got = f"has {size} bytes" if size >= 0 else "is missing"
            raise _DamagedError(f"{name} {got}, expected {expected.get('size')} bytes")
        if (how == "sha256" or size <= SMALL) and _file_sha256(file) != expected.get("sha256"):
            raise _DamagedError(f"{name} was altered: its SHA-256 differs from the manifest")


def _read_params(directory: Path, step: int, target: Params, misc: Misc) -> Params:
    try:
        return _read(directory, step, "params", target, misc)
    except _MismatchError as other:
        raise CheckpointError(
            f"{directory / str(step)} holds the parameters of another model: {other}"
        ) from None


def _read(directory: Path, step: int, item: str, target: Any, misc: Misc) -> Any:
    """One item in the structure of `target`. Raises: _MismatchError, or _DamagedError for whatever goes wrong
    in Orbax (if memory is short, no older checkpoint can be read either, and nothing is set aside)."""
    path, want, problem, got = directory / str(step) / item, flatten(target), None, {}
    me = jax.process_index()
    # Each process reads its shards alone: one that fails must not leave the others at a barrier of Orbax.
    alone = ocp.options.MultiprocessingOptions(me, {me}, str(me)) if processes.count() > 1 else None
    try:
        with ocp.StandardCheckpointer(**({"multiprocessing_options": alone} if alone else {})) as reader:
            if (metadata := reader.metadata(path).item_metadata) is None:
                raise OSError("its structure cannot be read")
            saved = metadata.tree
            if changed := _difference(flatten(saved), want):
                raise _MismatchError(changed)
            # Leaves are matched by path, so that stateless parts of an optimizer may come and go.
            template = jax.tree_util.tree_map_with_path(lambda path, _: want[path_name(path)], saved)
            got = flatten(reader.restore(path, template))
    except _MismatchError as other:
        problem = other
    except Exception as error:
        problem = _DamagedError(f"{item}: {_first_line(error)}")
        problem.__cause__ = error
    processes.together(problem, _DamagedError(f"{item}: another process could not read its part"))
    tree = jax.tree.unflatten(jax.tree.structure(target), [got[name] for name in want])
    expected = misc.get(FINGERPRINTS[item])
    if expected is not None and (found := fingerprint(tree)) != expected:
        raise _DamagedError(f"{item}: the values have fingerprint {found}, expected {expected}")
    return tree


def _difference(have: dict[str, Any], want: dict[str, Any]) -> str:
    """The first paths that are missing, unexpected or of another shape or dtype; "" if none."""

    def describe(leaf: Any) -> str:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # saved as its data
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return f"{leaf.dtype}{list(leaf.shape)}"

    notes = [f"{p} is missing" for p in want if p not in have]
    notes += [f"{p} is not in this configuration" for p in have if p not in want]
    both = [(p, describe(have[p]), describe(want[p])) for p in want if p in have]
    notes += [f"{p} is {got}, expected {expected}" for p, got, expected in both if got != expected]
    return ", ".join(notes[:3]) + (f" and {len(notes) - 3} more" if len(notes) > 3 else "")


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 300 else f"{line[:140]} … {line[-140:]}"  # system errors put the cause last


def _jsonable(value: Any) -> Any:
    """Plain JSON values: arrays become numbers or lists, NaN and infinity null."""
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return _jsonable(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
