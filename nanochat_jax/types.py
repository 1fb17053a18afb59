"""The few records that every room speaks, and three aliases.

If you want another one, ask whether a function argument would do.
"""

from typing import Any

import jax
import optax
from flax import struct

Params = dict[str, Any]  # nested dicts; leaves are arrays (or packed leaves when serving)
Metrics = dict[str, jax.Array]  # scalar float32 each, named "group/name"
Key = jax.Array  # a typed PRNG key


@struct.dataclass
class Batch:
    """One batch of packed rows, every field of the data [B, L].

    `targets[t]` is the token after `tokens[t]` (shifted once, in `data.packing`); `weights` is 0
    where that target must not be learned (padding, first token of another document).
    Tokens attend to one another only within equal `segments`; `positions` restart per segment.
    """

    tokens: jax.Array  # int32
    targets: jax.Array  # int32
    weights: jax.Array  # float32, usually 0 or 1
    segments: jax.Array  # int32, >= 1; 0 is padding
    positions: jax.Array  # int32
    # [B, M, L], weights of the targets i = 1..M later, see `model.mtp.future_weights`; made in the step
    future: jax.Array | None = None
    # float [B, L], loss of each target under another model, for `model.filter.score` = "excess"
    reference: jax.Array | None = None


@struct.dataclass
class TrainState:
    """All that training changes. No functions and no keys: the step's key is (seed, step)."""

    step: jax.Array  # int32 []
    params: Params
    opt_state: optax.OptState


@struct.dataclass
class KVCache:
    """Keys and values of earlier tokens. R loops, N layers, B rows, T slots, G heads, K width.

    Every loop has its own: the same layer sees other inputs in another loop. With one entry for all loops
    later tokens find the last loop's (infer.loop_cache = "last").
    """

    k: jax.Array  # [R or 1, N, B, G, T, K]
    v: jax.Array  # the same
    length: jax.Array  # int32 [B]: slots in use per row
    # of the layers outside the loops: "before" and "after", where there are any, (k, v) [n, B, G, T, K]
    outside: dict[str, tuple[jax.Array, jax.Array]] = struct.field(default_factory=dict)


@struct.dataclass
class Output:
    """What `model.transformer.forward` returns."""

    hidden: jax.Array  # [B, L, D], after the last norm, before the head
    cache: KVCache | None
    aux: Metrics
    # [R, B, L, D], hidden as it would be after r = 1..R loops, or [1, B, L, D] of one; only if asked for
    loops: jax.Array | None = None
    # float32 [R, B, L], logits of the exit gate after each loop (model.loop); with `loops`, if there is a gate
    exits: jax.Array | None = None
    # int32 [B], loops that each row's token ran through; only where tokens may exit
    depth: jax.Array | None = None
    ridden: jax.Array | None = None  # the passenger after the last layer, see model/collider.py
