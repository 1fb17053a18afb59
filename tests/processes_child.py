"""Child of the tests of several processes.

`meet`: join as the environment says and print [launcher, count, indices of all]. `agree DIRECTORY` with
flags: exercise rows and agreements on several meshes; prints what this process saw.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nanochat_jax import cluster, flags, processes

GIVEN = {name: flag.default for name, flag in flags.PROCESS_FLAGS.items()} | {"join_timeout": 120}
MESHES = [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 1, 4)]


def meet() -> None:
    place = cluster.detect(os.environ, GIVEN)
    assert place is not None and str(place)
    cluster.join(place)
    import jax

    print(json.dumps([place.source, processes.count(), processes.gather(jax.process_index())]))


def message(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def agree(directory: Path, words: list[str]) -> None:
    call = flags.parse(words, flags.PROCESS_FLAGS)
    place = cluster.detect({}, call.flags)
    assert place is not None
    cluster.join(place)
    import jax
    import numpy as np

    from nanochat_jax import parallel
    from nanochat_jax.config import MeshConfig

    me, shards, rows = jax.process_index(), {}, {}
    every = np.arange(8 * 3, dtype=np.int32).reshape(8, 3)
    for sizes in MESHES:
        mesh = parallel.mesh(MeshConfig(*sizes))
        index, count = parallel.data_shard(mesh)
        own = range(index * 8 // count, (index + 1) * 8 // count)
        made = {name: every[own.start : own.stop] + i for i, name in enumerate(FIELDS)}
        batch = parallel.shard_batch(made, mesh)
        for i, name in enumerate(FIELDS):
            field = getattr(batch, name)
            assert field.shape == (8, 3), field.shape
            for shard in field.addressable_shards:
                np.testing.assert_array_equal(shard.data, every[shard.index] + i)
        np.testing.assert_array_equal(processes.whole(batch.tokens), every)
        wanted = parallel.batch_sharding(mesh).addressable_devices_indices_map((8,)).values()
        assert set(own) == {row for (part,) in wanted for row in range(8)[part]}
        shards[str(sizes)], rows[str(sizes)] = [index, count], list(own)
    elsewhere = directory / ("elsewhere" if me == 3 else "shared")
    elsewhere.mkdir(exist_ok=True)
    fault = ValueError(f"fault of {me}") if me == 1 else None
    problems = [
        message(lambda: processes.alike("a test", "abc" if me == 2 else "abd")),
        message(lambda: processes.alike("a test", "abc")),
        message(lambda: processes.require_shared(elsewhere)),
        message(lambda: processes.require_shared(directory / "shared")),
        message(lambda: processes.together(fault, KeyError("others"))),
        message(lambda: processes.together(None, KeyError("others"))),
    ]
    agreed = [processes.agreed(10 + me), *processes.gather(10 + me)]
    print(json.dumps({"shards": shards, "rows": rows, "agreed": agreed, "problems": problems}))


FIELDS = ("tokens", "targets", "weights", "segments", "positions")

if __name__ == "__main__":
    if sys.argv[1] == "meet":
        meet()
    else:
        agree(Path(sys.argv[2]), sys.argv[3:])
