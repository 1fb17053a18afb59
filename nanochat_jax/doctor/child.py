"""What may hang or crash, in a process of its own: python -m nanochat_jax.doctor.child <question>.

The answer is one JSON object, the last line of standard output. Starting a broken driver, a kernel
that the card does not know, and a collective between cards without peer access are all known never
to return; `ask` gives the child a time limit and outlives it.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

ALL_REDUCE_FLOATS = 2**22  # 16 MiB, beyond NCCL's low-latency protocols


def ask(command: list[str], limit: float) -> dict[str, Any]:
    """Run a child and read its answer.

    Args: limit: seconds. Returns: the answer, or {"failure": "timeout" | "crash", "text": why}.
    """
    # Files and not pipes: a child stuck in the driver keeps its end of a pipe open, even when killed.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
        try:
            status = child.wait(limit)
        except subprocess.TimeoutExpired:
            _kill(child)
            return {"failure": "timeout", "text": f"no answer within {limit:g} s"}
        except BaseException:
            _kill(child)
            raise
        out.seek(0)
        err.seek(0)
        answer, complaint = out.read().strip().splitlines(), err.read().strip().splitlines()
    try:
        found = json.loads(answer[-1])
        if status == 0 and isinstance(found, dict):
            return found
    except (IndexError, ValueError):
        pass
    end = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    return {"failure": "crash", "text": f"ended with {end}: {(complaint or ['no message'])[-1]}"}


def _kill(child: subprocess.Popen) -> None:
    """Kill the child's process group; do not wait for one that the kernel cannot end."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait(5)
    except (OSError, subprocess.TimeoutExpired):
        pass


def devices() -> dict[str, Any]:
    """Platform, and kind and memory of each device."""
    import jax

    found = []
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        sizes = {name: stats[name] / 2**30 for name in ("bytes_limit", "bytes_in_use") if name in stats}
        row: dict[str, Any] = {"id": device.id, "kind": device.device_kind}
        found.append(row | {name.replace("bytes_", "") + "_gib": size for name, size in sizes.items()})
    client = jax.local_devices()[0].client
    return {"platform": jax.default_backend(), "runtime": client.platform_version, "devices": found}


def kernels() -> dict[str, Any]:
    """Each implementation of each kernel: the error of its result, or why it does not run here."""
    import jax
    import jax.numpy as jnp

    from nanochat_jax.kernels import attention, integer

    rng = np.random.default_rng(0)
    length = attention.QUERY_BLOCK
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, 4, 64)), dtype) for _ in range(3))
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (2, length))
    segments = jnp.ones((2, length), jnp.int32)
    rest = (index, index, segments, segments, 0, True)
    with jax.default_matmul_precision("highest"):
        right = attention.IMPLS["reference"](
            q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32), *rest
        )

    codes = rng.integers(-127, 128, (64, 256)).astype(np.int8)
    trits = rng.integers(-1, 2, (256, 64)).astype(np.int8)
    product = codes.astype(np.int64) @ trits.astype(np.int64)

    found: dict[str, Any] = {}
    for name, run in attention.IMPLS.items():
        # bfloat16 has 8 bits: 2^-8 of outputs of size 1, and as much in the shares.
        limit = 1e-4 if dtype == jnp.float32 else 0.05
        attend = jax.jit(lambda *a, run=run: run(*a, 0, True))
        found[f"attention.{name}"] = _try(attend, (q, k, v, index, index, segments, segments), right, limit)
    for name, run in integer.IMPLS.items():
        found[f"integer.{name}"] = _try(jax.jit(run), (codes, trits), product, 0.0)
    return {"kernels": found, "integer": integer.preferred()}


def _try(run: Any, arguments: tuple, right: Any, limit: float) -> dict[str, Any]:
    """Compile, run twice, compare. The second call is timed."""
    try:
        got = np.asarray(run(*arguments), np.float32)
        began = time.perf_counter()
        run(*arguments).block_until_ready()
        took = time.perf_counter() - began
    except NotImplementedError as refusal:
        return {"refused": str(refusal)}
    except Exception as error:
        return {"broken": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    worst = float(np.max(np.abs(got - np.asarray(right, np.float32))))
    good = worst <= limit  # also False for NaN
    return {"ms": 1e3 * took, "error": worst} if good else {"broken": f"differs by {worst:.3g}"}


def all_reduce() -> dict[str, Any]:
    """Sum 16 MiB over all devices and check every element."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    count = len(jax.devices())
    mesh = jax.make_mesh((count,), ("all",), axis_types=(AxisType.Auto,))
    rows, same = NamedSharding(mesh, PartitionSpec("all")), PartitionSpec()
    x = jax.jit(
        lambda: jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32)[:, None], (count, ALL_REDUCE_FLOATS)),
        out_shardings=rows,
    )()
    total = jax.jit(
        jax.shard_map(lambda a: jax.lax.psum(a[0], "all"), mesh=mesh, in_specs=rows.spec, out_specs=same)
    )
    total(x).block_until_ready()
    began = time.perf_counter()
    y = total(x).block_until_ready()
    took = time.perf_counter() - began
    copies = [np.asarray(shard.data) for shard in y.addressable_shards]  # each device's own result
    right = len(copies) == count and all((copy == count * (count - 1) // 2).all() for copy in copies)
    return {"devices": count, "right": bool(right), "ms": 1e3 * took, "mib": 4 * ALL_REDUCE_FLOATS / 2**20}


QUESTIONS = {"devices": devices, "kernels": kernels, "all_reduce": all_reduce}

if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(QUESTIONS[sys.argv[1]]()) + "\n")
