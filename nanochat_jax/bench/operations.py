"""FP4 rounding, 8-bit moments, symmetric and integer products: right first, then how fast.

Every implementation is held against NumPy in float64, or the formats' own casts in ml_dtypes, on fresh
random inputs before anything is timed. What only moves memory is reported as a share of a copy's
bandwidth, by the bytes that one pass must read and write; products as a ratio to the bfloat16 product of
the same sizes. Off GPUs the kernels' own code is checked in interpret mode and plain XLA is timed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from nanochat_jax.kernels import dispatch, fp4, int8, integer, symmetric
from nanochat_jax.optim import fused
from nanochat_jax.quant import ternary

BLOCK = 128  # of 8-bit moments
BETA1, BETA2, EPS = 0.9, 0.99, 1e-8
E2M1, LEVELS = (
    ml_dtypes.float4_e2m1fn,
    np.unique(np.concatenate([fp4.LEVELS, -fp4.LEVELS])).astype(np.float64),
)


@dataclasses.dataclass(frozen=True)
class Operation:
    """make: (generator, size) -> arguments. run: (implementation, *arguments) -> result. check: (arguments,
    result) raises ValueError. sizes: (checked, timed on a CPU, timed on GPUs). impls: that off and on GPUs
    are checked. moved: size -> bytes of one pass; None for products, whose plain form is `baseline`.
    in_place: the second result takes the place of the second argument, as in a train step."""

    name: str
    make: Callable[..., tuple]
    run: Callable[..., Any]
    check: Callable[[tuple, Any], None]
    sizes: tuple[tuple, tuple, tuple[tuple, ...]]
    impls: tuple[tuple[str, ...], tuple[str, ...]] = (("reference", "interpret"), ("reference", "pallas"))
    moved: Callable[[tuple], float] | None = None
    baseline: Callable[..., Any] | None = None
    in_place: bool = False


def wrong(what: str) -> None:
    raise ValueError(f"wrong {what}")


# --- FP4


def _spread(rng: np.random.Generator, size: tuple, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Entries over a few powers of ten, the first block all zeros."""
    v = rng.normal(size=size) * 10.0 ** rng.uniform(-2, 1, (*size[:-1], 1))
    v[0, :32] = 0
    return jnp.asarray(v, dtype)


def _definition(v: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(codes, bits of the scales) of rounding to nearest, by ml_dtypes' casts; v: float32."""
    blocks = v.reshape(*v.shape[:-1], -1, fp4.FORMATS[name])
    top = np.abs(blocks).max(-1, keepdims=True)
    unit, kind = np.float32(1), ml_dtypes.float8_e8m0fnu
    wanted = np.exp2(np.frexp(np.maximum(top, 1e-30))[1] - 3.0).astype(np.float32)
    if name == "nvfp4":
        enlarge, kind = np.float32(6 * 448) / top.max(), ml_dtypes.float8_e4m3fn
        wanted, unit = np.clip(top / np.float32(6) * enlarge, 2.0**-9, 448), np.float32(1) / enlarge
    scales = np.where(top == 0, 1, wanted).astype(np.float32).astype(kind)
    codes = (blocks / (scales.astype(np.float32) * unit)).astype(E2M1).view(np.uint8)
    return codes.reshape(v.shape), scales.view(np.uint8)[..., 0]


def _codes(packed: fp4.Blocks) -> np.ndarray:
    low_high = np.stack([packed.codes & 15, packed.codes >> 4], -1)
    return low_high.reshape(*packed.codes.shape[:-1], -1).astype(np.uint8)


def _units(packed: fp4.Blocks, name: str) -> np.ndarray:
    """Scale of each element, float64."""
    scales = np.asarray(packed.scales).astype(np.float64) * np.float64(packed.tensor)
    return np.repeat(scales, fp4.FORMATS[name], -1)


def _nearest(name: str) -> Callable[[tuple, Any], None]:
    def check(arguments: tuple, packed: fp4.Blocks) -> None:
        codes, scales = _definition(np.asarray(arguments[0], np.float32), name)
        apart = np.mean(_codes(packed) != codes), np.mean(np.asarray(packed.scales).view(np.uint8) != scales)
        # XLA on GPUs divides with an error of up to two units in the last place, see kernels.fp4.
        if max(apart) > (2e-3 if dispatch.backend() == "gpu" else 0):
            wrong(f"codes in {name}")

    return check


def _random(name: str) -> Callable[[tuple, Any], None]:
    def check(arguments: tuple, packed: fp4.Blocks) -> None:
        z = np.asarray(arguments[0], np.float64) / _units(packed, name)
        got = _codes(packed).view(E2M1).astype(np.float64)
        below = LEVELS[np.searchsorted(LEVELS, z + 1e-6, side="right") - 1]
        above = LEVELS[np.minimum(np.searchsorted(LEVELS, z - 1e-6), len(LEVELS) - 1)]
        spread = np.sqrt(np.sum(np.maximum((above - z) * (z - below), 0)))
        if not np.all((got == below) | (got == above)) or abs(np.sum(got - z)) > 6 * spread + 1e-3:
            wrong(f"random rounding in {name}")

    return check


def _quantize(name: str, noisy: bool) -> Operation:
    return Operation(
        f"{name} quantize, {'random' if noisy else 'nearest'}",
        lambda rng, size: (_spread(rng, size), jax.random.key(int(rng.integers(2**31)))),
        lambda impl, v, key: fp4.quantize_packed(v, name, key if noisy else None, impl),
        _random(name) if noisy else _nearest(name),
        ((24, 192), (512, 512), ((8192, 8192), (2048, 8192))),
        moved=lambda size: size[0] * size[1] * (2 + 0.5 + 1 / fp4.FORMATS[name]),
    )


def _packed(name: str) -> Callable[..., tuple]:
    def make(rng: np.random.Generator, size: tuple) -> tuple:
        return (jax.jit(lambda v: fp4.quantize_packed(v, name, None, "reference"))(_spread(rng, size)),)

    return make


def _dequantize(name: str) -> Operation:
    def check(arguments: tuple, values: jax.Array) -> None:
        exact = _codes(arguments[0]).view(E2M1).astype(np.float64) * _units(arguments[0], name)
        if np.any(np.abs(np.asarray(values, np.float64) - exact) > 2.0**-8 * np.abs(exact)):
            wrong(f"values of {name}")

    return Operation(
        f"{name} dequantize", _packed(name),
        lambda impl, packed: fp4.dequantize_packed(packed, name, jnp.bfloat16, impl), check,
        ((24, 192), (512, 512), ((8192, 8192), (2048, 8192))),
        moved=lambda size: size[0] * size[1] * (2 + 0.5 + 1 / fp4.FORMATS[name]),
    )  # fmt: skip


def _dot(name: str) -> Operation:
    def make(rng: np.random.Generator, size: tuple) -> tuple:
        M, N, K = size
        (a,), (b,) = _packed(name)(rng, (M, K)), _packed(name)(rng, (N, K))
        return a, b

    def check(arguments: tuple, y: jax.Array) -> None:
        a, b = (_codes(p).view(E2M1).astype(np.float64) * _units(p, name) for p in arguments)
        if np.any(np.abs(np.asarray(y, np.float64) - a @ b.T) > 1e-5 * (np.abs(a) @ np.abs(b).T)):
            wrong(f"product in {name}")

    return Operation(
        f"{name} product, packed", make, lambda impl, a, b: fp4.packed_dot(a, b, name, impl), check,
        ((20, 40, 192), (64, 256, 256), ((16, 4096, 4096), (4096, 4096, 4096))),
        baseline=lambda a, b: _bfloat16_of(a, b),
    )  # fmt: skip


def _bfloat16_of(a: fp4.Blocks, b: fp4.Blocks) -> tuple[Callable[..., Any], tuple]:
    shapes = [(*p.codes.shape[:-1], 2 * p.codes.shape[-1]) for p in (a, b)]
    return _bfloat16(*shapes)


def _bfloat16(left: tuple, right: tuple) -> tuple[Callable[..., Any], tuple]:
    """x y^T in bfloat16, and its arguments; random, for zeros run faster."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in (left, right))
    return lambda x, y: jnp.matmul(x, y.mT), (x, y)


# --- 8-bit moments

FORMS = {
    "muon": fused.muon(BETA1, lambda grad, direction: direction),
    "lion": fused.lion(BETA1, BETA2),
    "adamw": fused.adam(BETA1, BETA2, EPS),
}


def _exact(name: str, g: np.ndarray, m: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The third update in float64."""
    if name == "muon":
        mu = BETA1 * m[0] + (1 - BETA1) * g
        return BETA1 * mu + (1 - BETA1) * g, [mu]
    if name == "lion":
        return np.sign(BETA1 * m[0] + (1 - BETA1) * g), [BETA2 * m[0] + (1 - BETA2) * g]
    mu, nu = BETA1 * m[0] + (1 - BETA1) * g, BETA2 * m[1] + (1 - BETA2) * g * g
    return mu / (1 - BETA1**3) / (np.sqrt(nu / (1 - BETA2**3)) + EPS), [mu, nu]


def _decoded(codes: Any, scales: Any, code: str) -> np.ndarray:
    values = (
        np.asarray(codes, np.float64) if code == "linear" else int8.LEVELS[code].astype(np.float64)[codes]
    )
    return values * np.repeat(np.asarray(scales, np.float64), BLOCK, -1)


def _moments(name: str) -> Operation:
    form = FORMS[name]
    codes = ("linear", "dynamic_unsigned")[: len(form.fields)]

    def make(rng: np.random.Generator, size: tuple) -> tuple:
        old = jnp.asarray(rng.normal(size=size), jnp.float32)
        olds = (old, old * old)[: len(codes)]
        stored = tuple(int8.quantize(x, BLOCK, code) for x, code in zip(olds, codes, strict=True))
        return jnp.asarray(rng.normal(size=size), jnp.float32), stored

    def run(impl: str, grad: jax.Array, stored: tuple) -> tuple:
        return int8.update(form.rule, grad, stored, codes, form.numbers(jnp.int32(3)), BLOCK, None, impl)

    def check(arguments: tuple, result: tuple) -> None:
        grad, stored = arguments
        moments = [_decoded(c, s, code) for (c, s), code in zip(stored, codes, strict=True)]
        direction, after = _exact(name, np.asarray(grad, np.float64), moments)
        got, made = result
        near = np.abs(np.asarray(got, np.float64) - direction) <= 1e-4 * (1 + np.abs(direction))
        if np.mean(near) < (1 if name != "lion" else 0.999):  # a sign of almost zero may turn
            wrong(f"direction of {name}")
        for (c, s), code, want in zip(made, codes, after, strict=True):
            levels = np.arange(-127, 128) if code == "linear" else int8.LEVELS[code].astype(np.float64)
            units = np.repeat(np.asarray(s, np.float64), BLOCK, -1)
            z = want / units
            right = np.clip(np.searchsorted(levels, z), 1, len(levels) - 1)
            nearest = np.minimum(np.abs(levels[right] - z), np.abs(levels[right - 1] - z)) * units
            if np.any(np.abs(_decoded(c, s, code) - want) > nearest + 1e-4 * units * (levels[-1] / 127 + 1)):
                wrong(f"moments of {name}")

    return Operation(
        f"8-bit moments, {name}",
        make,
        run,
        check,
        ((8, 256), (512, 512), ((8192, 8192), (32, 1024, 4096))),
        moved=lambda size: float(np.prod(size)) * (4 + 4 + 2 * len(codes) * (1 + 4 / BLOCK)),
        in_place=True,
    )


# --- products


def _gram() -> Operation:
    def check(arguments: tuple, y: jax.Array) -> None:
        x, y64 = np.asarray(arguments[0], np.float64), np.asarray(y, np.float64)
        exact, size = (a @ np.swapaxes(a, -1, -2) for a in (x, np.abs(x)))
        if np.any(np.abs(y64 - exact) > 2.0**-8 * np.abs(exact) + 1e-5 * size):
            wrong("symmetric product")

    return Operation(
        "symmetric product X X^T",
        lambda rng, size: (jnp.asarray(rng.normal(size=size), jnp.bfloat16),),
        lambda impl, x: symmetric.gram(x, impl), check,
        ((2, 40, 72), (2, 128, 256), ((1, 4096, 4096), (4, 2048, 8192), (32, 1024, 4096))),
        baseline=lambda x: _bfloat16(x.shape, x.shape),
    )  # fmt: skip


def _training() -> Operation:
    """The ternary forward product as training runs it: rows are rounded to 8 bits first."""

    def make(rng: np.random.Generator, size: tuple) -> tuple:
        M, N, K = size
        x = jnp.asarray(rng.normal(size=(M, K)), jnp.bfloat16)
        return x, jnp.asarray(rng.integers(-1, 2, (K, N)), jnp.int8)

    def run(impl: str, x: jax.Array, t: jax.Array) -> jax.Array:
        q, scale = ternary.int8_rows(x)
        return integer.integer_matmul(q, t, impl=impl) * scale

    def check(arguments: tuple, y: jax.Array) -> None:
        x, t = np.asarray(arguments[0], np.float64), np.asarray(arguments[1], np.float64)
        scale = np.abs(x).max(-1, keepdims=True) / 127
        bound = scale * (0.5001 * np.abs(t).sum(0)) + 1e-5 * (np.abs(x) @ np.abs(t))
        whole = np.asarray(y, np.float64) / scale
        if np.any(np.abs(np.asarray(y, np.float64) - x @ t) > bound) or np.any(
            np.abs(whole - np.round(whole)) > 1e-2
        ):
            wrong("integer product")

    return Operation(
        "int8 forward product, training", make, run, check,
        ((16, 32, 64), (128, 256, 256), ((4096, 4096, 4096), (4096, 14336, 4096), (4096, 4096, 14336))),
        impls=(("int8", "bfloat16", "float32"), ("int8", "bfloat16")),
        baseline=lambda x, t: _bfloat16(x.shape, t.shape[::-1]),
    )  # fmt: skip


OPERATIONS: tuple[Operation, ...] = (
    *(_quantize(name, noisy) for name in fp4.FORMATS for noisy in (False, True)),
    *(_dequantize(name) for name in fp4.FORMATS),
    *(_dot(name) for name in fp4.FORMATS),
    *(_moments(name) for name in FORMS),
    _gram(),
    _training(),
)

Timer = Callable[[dict[str, Callable[[], Any]], int], dict[str, float]]


def checked(operation: Operation, seed: int) -> dict[str, str]:
    """Each implementation on fresh inputs: "right", or why it does not run here. Raises: ValueError if wrong."""
    arguments = operation.make(np.random.default_rng(seed), operation.sizes[0])
    found = {}
    for impl in operation.impls[dispatch.backend() == "gpu"]:
        try:
            result = jax.jit(lambda *given, impl=impl: operation.run(impl, *given))(*arguments)
        except ExceptionGroup as refused:
            found[impl] = str(refused.exceptions[0])
            continue
        try:
            operation.check(arguments, result)
        except ValueError as error:
            raise ValueError(f"{operation.name}, {impl}: {error}") from None
        found[impl] = "right"
    return found


def _program(operation: Operation, impl: str, arguments: tuple) -> Callable[[], Any]:
    """One call after another; in place, each works on what the one before left."""
    donated = (1,) if operation.in_place else ()
    run = jax.jit(lambda *given: operation.run(impl, *given), donate_argnums=donated)
    given = list(jax.tree.map(jnp.copy, arguments) if operation.in_place else arguments)

    def program() -> Any:
        result = run(*given)
        if operation.in_place:
            given[1] = result[1]
        return result

    return program


def measured(operation: Operation, size: tuple, gbps: float, repeats: int, timer: Timer) -> dict[str, Any]:
    """Microseconds by implementation, with the share of the bandwidth or the ratio to bfloat16."""
    arguments = operation.make(np.random.default_rng(0), size)
    on_gpu = dispatch.backend() == "gpu"
    programs, refused = {}, {}
    for impl in operation.impls[on_gpu]:
        if impl == "interpret":
            continue
        program = _program(operation, impl, arguments)
        try:
            jax.block_until_ready(program())
        except Exception as error:  # a kernel that the compiler or the card cannot take is no candidate
            reason = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
            refused[impl] = f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"
            continue
        programs[impl] = program
    if operation.baseline is not None:
        plain, given = operation.baseline(*arguments)
        plain = jax.jit(plain)
        programs["bfloat16 product"] = lambda: plain(*given)
    us = {name: 1e3 * ms for name, ms in timer(programs, repeats).items()}
    row: dict[str, Any] = {"operation": operation.name, "size": list(size), "us": us, "refused": refused}
    if operation.moved is not None:
        moved = operation.moved(size)
        return row | {
            "bytes": moved,
            "percent_of_bandwidth": {name: 100 * moved / 1e3 / t / gbps for name, t in us.items()},
        }
    return row | {"ratio_to_bfloat16": {name: us["bfloat16 product"] / t for name, t in us.items()}}


def operations(seed: int, gbps: float, repeats: int, timer: Timer) -> list[dict[str, Any]]:
    """Check every operation, then time it.

    Args: gbps: of a copy, measured in this session. timer: programs, repeats -> milliseconds.
    Raises: ValueError if an implementation is wrong.
    """
    rows = []
    for operation in OPERATIONS:
        found = checked(operation, seed)
        sizes = operation.sizes[2] if dispatch.backend() == "gpu" else operation.sizes[1:2]
        rows += [measured(operation, size, gbps, repeats, timer) | {"checked": found} for size in sizes]
    return rows


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The rows for people."""
    text = [f"{'operation':<34}{'size':<20}{'':<18}{'us':>10}{'vs bf16':>9}{'bandwidth':>11}  checked"]
    for row in rows:
        size = " x ".join(map(str, row["size"]))
        names = [*row["us"], *(name for name in row["checked"] if name not in row["us"])]
        for name in names:
            took = f"{row['us'][name]:.1f}" if name in row["us"] else "not timed"
            ratio, share = (
                row.get(key, {}).get(name) for key in ("ratio_to_bfloat16", "percent_of_bandwidth")
            )
            text.append(
                f"{row['operation']:<34}{size:<20}{name:<18}{took:>10}"
                f"{'' if ratio is None else f'{ratio:.2f}x':>9}{'' if share is None else f'{share:.1f}%':>11}"
                f"  {row['checked'].get(name, '')}".rstrip()
            )
    return text
