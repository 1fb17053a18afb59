"""Held-out loss and bits per byte: the headline number of every run.

    bits per byte = sum of nats / (ln 2 * sum of raw bytes of the scored targets)

It does not depend on the tokenizer. Only the plain cross-entropy of the main head counts; special
tokens and masked targets are left out, in the numerator and in the denominator.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from nanochat_jax.types import Batch, Params


def bits_per_byte(
    eval_step: Callable[[Params, Batch, jax.Array], dict[str, Any]],
    params: Params,
    batches: Iterable[Batch],
    token_bytes: np.ndarray,
) -> dict[str, float]:
    """Evaluate on all of `batches`.

    Args: eval_step: jitted `train.step.make_eval_step(...)`. token_bytes: int32 [V].
    Returns: "eval/bpb" (bits), "eval/loss" (nats per token), "eval/tokens", "eval/bytes"; with several
    loops also "eval/bpb_loop_<r>", what leaving every token after loop r would give (R: "eval/bpb"); where
    the eval step knows after which loop each token leaves, "eval/bpb_exit" and "eval/mean_exit" (loops).
    Raises: ValueError if there is nothing to score.
    """
    sizes = jax.numpy.asarray(token_bytes, jax.numpy.int32)
    sums = jax.device_get([eval_step(params, batch, sizes) for batch in batches])  # fetched at the end
    nats, count, size = (
        float(np.sum([np.float64(s[name]) for s in sums])) for name in ("nats", "tokens", "bytes")
    )
    if size == 0:
        raise ValueError("no held-out token to score: raise data.val_percent or eval.batches")
    loops = np.sum([s["loop_nats"] for s in sums if "loop_nats" in s], axis=0, dtype=np.float64)
    each = {
        f"eval/bpb_loop_{r}": float(n) / math.log(2) / size for r, n in enumerate(np.atleast_1d(loops), 1)
    }
    if sums and "exit_nats" in sums[0]:
        left, ran = (
            float(np.sum([np.float64(s[name]) for s in sums])) for name in ("exit_nats", "exit_loops")
        )
        each |= {"eval/bpb_exit": left / math.log(2) / size, "eval/mean_exit": ran / count}
    return (each if np.ndim(loops) else {}) | {
        "eval/bpb": nats / math.log(2) / size,
        "eval/loss": nats / count,
        "eval/tokens": count,
        "eval/bytes": size,
    }


def of_parts(
    eval_step: Callable[[Params, Batch, jax.Array], dict[str, Any]],
    params: Params,
    parts: dict[str, Iterable[Any]],
    place: Callable[[Any], Batch],
    token_bytes: np.ndarray,
) -> dict[str, float]:
    """Evaluate on the held-out batches of each part of a corpus (`data.pipeline.val_parts`).

    Args: place: makes of a part's arrays the batch that eval_step takes, where it takes it.
    Returns: the scores of `bits_per_byte`, as if all were scored at once, and "eval/bpb_<part>" if there is
    more than one part.
    """
    scores = {
        name: bits_per_byte(eval_step, params, map(place, batches), token_bytes)
        for name, batches in parts.items()
    }
    return joined(scores)


def joined(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Scores of a mixture from those of its parts, by name: as if scored at once, and each part's bits."""
    if len(scores) == 1:
        return next(iter(scores.values()))
    found: dict[str, float] = {}
    for name in next(iter(scores.values())):
        by = {"eval/tokens": "", "eval/bytes": "", "eval/loss": "eval/tokens"}.get(name, "eval/bytes")
        sizes = {part: own[by] if by else 1.0 for part, own in scores.items()}
        total = sum(own[name] * sizes[part] for part, own in scores.items())
        found[name] = total / (sum(sizes.values()) if by else 1.0)
    return found | {f"eval/bpb_{part}": own["eval/bpb"] for part, own in scores.items()}
