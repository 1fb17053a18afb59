"""The smallest change of a config that fits a device: microbatch x rematerialization x optimizer x mesh."""

import dataclasses
import functools
import itertools
import re
import warnings
from collections.abc import Iterator
from typing import Any

from nanochat_jax.config import Config, ConfigError, padded_vocab, validate
from nanochat_jax.plan import memory, speed
from nanochat_jax.plan.devices import DEVICES, GIB, Device

UNITS = {"": 1, "b": 1, "gb": 10**9, "gib": GIB, "mb": 10**6, "mib": 2**20}
REMAT = ("none", "dots", "block")
RANKS = (512, 256, 128)
ACCURACY = 0.1  # of predicted peaks, see experiments/plan
Change = dict[str, Any]  # dotted key -> value


def parse_bytes(text: str) -> int:
    """ "24GiB" -> bytes. Raises: ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in UNITS:
        raise ConfigError(f"--fit must be a size such as 24GiB or 80GB, got '{text}'")
    return round(float(match[1]) * UNITS[match[2].lower()])


def changed(cfg: Config, change: Change) -> Config:
    """The config with other values, dotted keys."""
    for key, value in change.items():
        cfg = _replace(cfg, key.split("."), value)
    return cfg


def _replace(node: Any, path: list[str], value: Any) -> Any:
    inner = value if len(path) == 1 else _replace(getattr(node, path[0]), path[1:], value)
    return dataclasses.replace(node, **{path[0]: inner})


def smallest_change(cfg: Config, limit: int, device: Device, platform: str = "gpu") -> Change | None:
    """The change that fits `limit` bytes on each device, {} if none is needed, None if none is enough.

    Fewest settings first, then the fewest predicted seconds per step. Batch, model and the number of
    devices stay as they are.
    """
    best: tuple[int, float, Change] | None = None
    for change in candidates(cfg):
        if best is not None and len(change) > best[0]:
            continue
        other = changed(cfg, change)
        if memory.predict(other, platform).peak > limit:
            continue
        rank = (len(change), speed.predict(other, device).seconds_per_step)
        if best is None or rank < best[:2]:
            best = (*rank, change)
    return None if best is None else best[2]


def candidates(cfg: Config) -> Iterator[Change]:
    """Every combination of the four kinds of change, the unchanged config among them, fewest first."""
    pieces = [{}, *({"train.microbatches": n} for n in _microbatches(cfg))]
    remats = [{}, *({"model.remat": r} for r in REMAT[REMAT.index(cfg.model.remat) + 1 :])]
    found = [
        functools.reduce(lambda a, b: a | b, parts)
        for parts in itertools.product(pieces, remats, _optimizers(cfg), _meshes(cfg))
    ]
    yield from sorted((c for c in found if _allowed(changed(cfg, c))), key=len)


def _microbatches(cfg: Config) -> list[int]:
    return [n for n in range(cfg.train.microbatches + 1, cfg.data.batch + 1) if cfg.data.batch % n == 0]


def _optimizers(cfg: Config) -> list[Change]:
    """8-bit moments of the matrices, of the tables; a lower rank; their combinations."""
    matrix = [{}] if cfg.opt.matrix.state_bits == 8 else [{}, {"opt.matrix.state_bits": 8}]
    tables = [
        {},
        {f"opt.{g}.state_bits": 8 for g in ("embed", "head") if getattr(cfg.opt, g).state_bits == 32},
    ]
    side = min(cfg.model.dim, cfg.model.mlp_dim)
    now = cfg.opt.galore.rank or side
    ranks = [{}, *({"opt.galore.rank": r} for r in RANKS if r < now)]
    return [a | b | c for a, b, c in itertools.product(matrix, tables, ranks)]


def _meshes(cfg: Config) -> list[Change]:
    replicas = cfg.mesh.data
    return [{}] if replicas == 1 else [{}, {"mesh.data": 1, "mesh.fsdp": replicas * cfg.mesh.fsdp}]


def _allowed(cfg: Config) -> bool:
    """Whether a run takes the config: it is valid, and the tables divide over the mesh."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a setting that the user chose, once per candidate
            validate(cfg)
    except ConfigError:
        return False
    return padded_vocab(cfg.model) % cfg.mesh.tensor == 0


def sentence(change: Change | None) -> str:
    """The change as flags."""
    if change is None:
        return "no change of microbatches, rematerialization, optimizer state or mesh is enough"
    if not change:
        return "it fits as it is"
    return "it fits with " + " ".join(f"--config.{key}={value}" for key, value in change.items())


def refuse(cfg: Config, limit: int | None) -> None:
    """Stop a run that cannot fit, before anything is compiled.

    Args: limit: bytes of a device, None if unknown: nothing is refused. What exceeds it by less than the
    prediction's accuracy is tried.
    Raises: ConfigError with the smallest change that fits.
    """
    if limit is None:
        return
    peak = memory.predict(cfg).peak
    if peak * (1 - ACCURACY) <= limit:
        return
    change = smallest_change(cfg, limit, DEVICES["h100"])
    raise ConfigError(
        f"this run needs about {peak / GIB:.1f} GiB on each device, of which jax may use {limit / GIB:.1f} GiB "
        f"(XLA_PYTHON_CLIENT_MEM_FRACTION sets the share); "
        f"{sentence(change)}{'' if change else more_devices(cfg, limit)} "
        "(python -m nanochat_jax.plan shows the parts)"
    )


def more_devices(cfg: Config, limit: int, platform: str = "gpu") -> str:
    """What would be enough where no change is: the number of devices that share the weights."""
    for n in (2, 4, 8):
        split = changed(cfg, {"mesh.fsdp": n * cfg.mesh.data * cfg.mesh.fsdp, "mesh.data": 1})
        if _allowed(split) and memory.predict(split, platform).peak <= limit:
            return f"; {split.mesh.fsdp * split.mesh.tensor} devices with --config.mesh.fsdp={split.mesh.fsdp} are"
    return ""
