"""Pick an implementation of an operation: try them in order, collect refusals, probe speed.

An operation is one function with a dict of implementations. An implementation that cannot serve a
shape, dtype or device raises `NotImplementedError(reason)`; `first` takes the next one. Where
several implementations give the same bits, `fastest` times them once per process on this device.
`probe` asks once per process whether something works here at all, in a child that may crash or hang.
"""

import contextlib
import contextvars
import functools
import importlib
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def first(impls: Mapping[str, Callable[..., Any]], impl: str, *args: Any, **kwargs: Any) -> Any:
    """Call the implementation named `impl`, or for "auto" the first that accepts.

    Raises: ValueError for an unknown name; ExceptionGroup with every reason if none accepts.
    """
    if impl != "auto" and impl not in impls:
        raise ValueError(f"unknown implementation '{impl}'; known: auto, {', '.join(impls)}")
    names = impls if impl == "auto" else (impl,)
    refusals: list[Exception] = []
    for name in names:
        try:
            return impls[name](*args, **kwargs)
        except NotImplementedError as refusal:
            refusals.append(NotImplementedError(f"{name}: {refusal}"))
    raise ExceptionGroup("no implementation accepts these arguments", refusals)


def fastest(impls: Mapping[str, Callable[..., Any]], arguments: Callable[[], tuple], runs: int = 5) -> str:
    """Name of the implementation with the lowest best-of-`runs` time on the default device.

    For implementations with identical results only: the choice may differ between processes.
    Args: arguments: makes the arguments that every implementation is timed with. Call this outside
    of a jit trace, or inside one: the probe compiles and runs on concrete arrays either way.
    Raises: RuntimeError while programs are traced for devices that are not here.
    """
    if away():
        raise RuntimeError("nothing can be timed on a device that is not here")
    with jax.ensure_compile_time_eval():
        # On the device, or each call would bring them there.
        concrete = jax.block_until_ready(jax.device_put(jax.tree.map(np.asarray, arguments())))
    times = {}
    for name, function in impls.items():
        try:
            times[name] = _best_time(function, concrete, runs)
        except NotImplementedError:
            continue
    return min(times, key=lambda name: times[name])


def _best_time(function: Callable[..., Any], concrete: tuple, runs: int) -> float:
    compiled = jax.jit(function).lower(*concrete).compile()
    best = float("inf")
    for _ in range(runs + 1):  # the first run warms up
        start = time.perf_counter()
        jax.block_until_ready(compiled(*concrete))
        best = min(best, time.perf_counter() - start)
    return best


_AIM: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("aim", default=())


@contextlib.contextmanager
def aimed_at(devices: Sequence[Any]) -> Iterator[None]:
    """Programs traced within are for these devices, which are not here (see `kernels.card`)."""
    token = _AIM.set(tuple(devices))
    try:
        yield
    finally:
        _AIM.reset(token)


def devices() -> list[Any]:
    """The devices that programs are traced for: all of them, the default one first."""
    return list(_AIM.get() or jax.devices())


def away() -> bool:
    """Whether those devices are not here, so that nothing can be tried on them."""
    return bool(_AIM.get())


def backend() -> str:
    """Platform of the default device: cpu, gpu or tpu."""
    return _AIM.get()[0].platform if _AIM.get() else jax.default_backend()


def _mesh_kinds() -> set[jax.sharding.AxisType]:
    """Kinds of the axes of the mesh in whose context the program is traced; empty without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return set() if mesh.empty else set(mesh.axis_types)


def whole() -> bool:
    """Whether the arrays of the program being traced cannot be split over devices.

    True on one device, and inside a `jax.shard_map` over all axes of its mesh. Elsewhere a kernel is an
    opaque call to the compiler, which would gather its operands.
    """
    return len(devices()) == 1 or _mesh_kinds() == {jax.sharding.AxisType.Manual}


def divided() -> bool:
    """Whether the compiler may divide single matrices of the program being traced over devices.

    True in the context of a mesh that has an axis left to the compiler, with several devices (`parallel.within`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = () if mesh.empty else zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return any(kind == jax.sharding.AxisType.Auto and size > 1 for kind, size in axes)


def need_gpu(interpret: bool = False) -> None:
    """Raises: NotImplementedError off GPUs, unless the kernel's own code is interpreted."""
    if not interpret and backend() != "gpu":
        raise NotImplementedError(f"made for GPUs, this is {backend()}")


def pallas(name: str, interpret: bool) -> Any:
    """The module nanochat_jax.kernels.<name>, imported where it can be used only.

    Raises: NotImplementedError off GPUs (see `need_gpu`), or where jax has no Pallas for Triton, which is
    deprecated since jax 0.11.
    """
    need_gpu(interpret)
    try:
        return importlib.import_module(f"nanochat_jax.kernels.{name}")
    except ImportError as missing:
        raise NotImplementedError(f"this version of jax has no Pallas for Triton: {missing}") from missing


def refuse(check: str, placed: bool = False) -> None:
    """Say why a GPU kernel should not run in the program being traced.

    Args: check: of `probe`, which is asked last. placed: the operands lie on one device by all that is known,
    however many there are, unless the program is traced in the context of a mesh.
    Raises: NotImplementedError with the reason, if there is one.
    """
    need_gpu()
    if not (whole() or (placed and not _mesh_kinds())):
        raise NotImplementedError(f"arrays may be split over {len(devices())} devices")
    if reason := verdict(check):
        raise NotImplementedError(reason)


def verdict(check: str) -> str:
    """The answer of `probe`; "" for devices that are not here."""
    return "" if away() else probe(check)


_CHILD = """
import sys
try:
    from {module} import {name}
    {name}()
except Exception as error:
    sys.exit(" ".join(f"{{type(error).__name__}}: {{error}}".split())[:500])
"""


@functools.cache
def probe(check: str, seconds: float = 180) -> str:
    """Run the function "module:name" in a process of its own; remember the verdict, log a failure once.

    A kernel that a driver or compiler cannot take may end the process or never return: the child may,
    this process goes on. The child takes device memory only as it needs it, beside this process.
    Returns: "" if it passed within `seconds`, else the reason in one line.
    """
    module, name = check.split(":")
    command = ["env", "XLA_PYTHON_CLIENT_PREALLOCATE=false", sys.executable, "-c"]
    command.append(_CHILD.format(module=module, name=name))
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        reason = f"no answer within {seconds:g} s"
    except OSError as error:
        reason = f"no child process: {error}"
    else:
        lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        reason = "" if child.returncode == 0 else lines[-1]
    if reason:
        logging.getLogger(__name__).warning("%s fails here, falling back to plain XLA: %s", module, reason)
    return reason
