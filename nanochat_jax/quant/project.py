"""Which number format each projection of the model runs in.

The model calls `project("attn/q", x, w)` for every weight matmul and knows no formats. `Project`
holds ordered rules (regex on the role, Precision); the first match wins.
"""

import functools
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import struct

from nanochat_jax.config import Fp4Config, ModelConfig
from nanochat_jax.kernels import dispatch, fp4, scaled
from nanochat_jax.params import path_name
from nanochat_jax.quant import coded, fp4_packed, pack, rounded, ternary
from nanochat_jax.quant.matmul import ACTIVATIONS, GRADIENTS, WEIGHTS, matmul
from nanochat_jax.types import Key, Params

TABLES = ("embed", "head", "value/embed")  # which the forward pass casts before it reads them
# Weight matrices of a block, by role; everything else multiplies in full precision.
BLOCK_ROLES = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")


@dataclass(frozen=True)
class Precision:
    """Independent slots, each a name in a dict of functions in `quant.matmul`."""

    weight: str = "full"
    act: str = "full"
    grad: str = "full"

    def __post_init__(self):
        for slot, name, known in (
            ("weight", self.weight, WEIGHTS), ("act", self.act, ACTIVATIONS), ("grad", self.grad, GRADIENTS)
        ):  # fmt: skip
            if name not in known:
                raise ValueError(
                    f"precision slot '{slot}': unknown format '{name}'; known: {', '.join(known)}"
                )
        if self.grad == "int8" and self.weight != "ternary":
            raise ValueError(f"gradients in int8 need ternary weights, got '{self.weight}'")


Rules = tuple[tuple[str, Precision], ...]
LOW = (*fp4.FORMATS, "fp4_rows", "fp8")  # formats that `spared` takes back
Weight = jax.Array | pack.PackedTernary | coded.CodedTernary | fp4_packed.PackedFp4 | rounded.Rounded
# product of a leaf that inference holds in place of a latent matrix, by the leaf's type
SERVED = {
    pack.PackedTernary: pack.matmul,
    coded.CodedTernary: coded.matmul,
    fp4_packed.PackedFp4: fp4_packed.matmul,
    rounded.Rounded: rounded.matmul,
}
# Form in which inference holds matrices -> their format -> (stack of matrices, Project, format, dtype, impl) ->
# such a leaf. Formats that a form does not name stay latent, and are rounded in every step.
_ROUNDED = {name: lambda w, p, name, dtype, impl: rounded.round_stack(w, name, p.how, dtype) for name in LOW}
HELD: dict[str, dict[str, Callable[..., Weight]]] = {
    "full": {},
    "codes": _ROUNDED | {"ternary": lambda w, p, name, dtype, impl: coded.code(w, p.group, dtype)},
    "packed": _ROUNDED
    | {"ternary": lambda w, p, name, dtype, impl: pack.pack_stack(w, p.group, impl)}
    | {name: lambda w, p, name, dtype, impl: fp4_packed.pack_stack(w, name, impl) for name in fp4.FORMATS},
}


def _blocks(*slots: str) -> Rules:
    """The precision of a block's matrices; everything else in full."""
    return ((r"(attn|mlp)/.*", Precision(*slots)), (r".*", Precision()))


PRESETS: dict[str, Rules] = {
    "full": ((r".*", Precision()),),
    "ternary": _blocks("ternary", "int8"),
    "ternary_int8": _blocks("ternary", "int8", "int8"),  # arXiv:2304.13013
    "nvfp4": _blocks("nvfp4", "nvfp4", "nvfp4"),  # arXiv:2509.25149
    "mxfp4": _blocks("mxfp4", "mxfp4", "mxfp4"),  # arXiv:2605.09825
    "nvfp4_grad": _blocks("full", "full", "nvfp4"),  # forward as without
    "mxfp4_grad": _blocks("full", "full", "mxfp4"),  # arXiv:2502.20586
    "ternary_nvfp4": _blocks("ternary", "int8", "nvfp4"),
    "ternary_mxfp4": _blocks("ternary", "int8", "mxfp4"),
    "fp8": _blocks("fp8", "fp8", "fp8"),  # arXiv:2209.05433
    "fp4_rows": _blocks("fp4_rows", "fp4_rows", "full"),  # arXiv:2501.17116
    # By module: attention in 8 bits, MLP in 4; tables and norms as always (compute dtype, float32).
    "fp8_nvfp4": (
        (r"attn/.*", Precision("fp8", "fp8", "fp8")),
        (r"mlp/.*", Precision("nvfp4", "nvfp4", "nvfp4")),
        (r".*", Precision()),
    ),
}


@struct.dataclass
class Project:
    """Callable (role, x, w) -> x @ w in the role's precision. Static but for its key.

    group: inputs that share one ternary scale; 0 = one scale per matrix. how: see `config.Fp4Config`.
    key: what stochastic rounding and random signs draw from, each role its own; see `keyed`. None draws
    the same numbers every time: enough to look at one step, not to train.
    """

    rules: Rules = struct.field(pytree_node=False)
    group: int = struct.field(pytree_node=False, default=0)
    how: Fp4Config = struct.field(pytree_node=False, default=Fp4Config())
    key: Key | None = None

    def keyed(self, key: Key) -> "Project":
        """With the key of this step, where some precision draws random numbers; else unchanged."""
        drawing = any(precision.grad in fp4.FORMATS for _, precision in self.rules)
        return self.replace(key=key) if drawing else self  # type: ignore[attr-defined]

    def at(self, layer: jax.typing.ArrayLike) -> "Project":
        """With the key of one layer (an integer, counted through all loops); unchanged without a key."""
        return self if self.key is None else self.replace(key=jax.random.fold_in(self.key, layer))  # type: ignore[attr-defined]

    def spared(self) -> "Project":
        """For layers too sensitive for FP4 and FP8: those slots in full, ternary stays ternary."""

        def spare(p: Precision) -> Precision:
            return Precision(*("full" if name in LOW else name for name in (p.weight, p.act, p.grad)))

        return self.replace(rules=tuple((pattern, spare(p)) for pattern, p in self.rules))  # type: ignore[attr-defined]

    def precision(self, role: str) -> Precision:
        """Raises: ValueError if no rule matches the role."""
        for pattern, precision in self.rules:
            if re.fullmatch(pattern, role):
                return precision
        raise ValueError(f"no precision rule matches role '{role}'; rules: {[p for p, _ in self.rules]}")

    def __call__(self, role: str, x: jax.Array, w: Weight) -> jax.Array:
        """Multiply activations x [..., m] with the weight w [m, n]; returns [..., n], x's dtype."""
        return self.several((role,), x, (w,))[0]

    def several(self, roles: tuple[str, ...], x: jax.Array, ws: tuple[Weight, ...]) -> tuple[jax.Array, ...]:
        """Multiply the same activations x [..., m] with several weights [m, n_i].

        Roles of equal precision run as one wide product where that pays: on CPU. Elsewhere, and where weights
        may be divided over devices, the products are separate: side by side such weights would be exchanged.
        """
        precisions = [self.precision(role) for role in roles]
        first = precisions[0]
        served = any(type(w) in SERVED for w in ws)
        apart = served or dispatch.divided() or any(p != first for p in precisions)
        # FP4 blocks and scales of dy must not mix the roles.
        if dispatch.backend() == "cpu" and not apart and first.grad in ("full", "int8"):
            for role, w in zip(roles, ws, strict=True):
                self._check(role, first, w)
            return tuple(matmul(x, ws, first.weight, first.act, self.group, first.grad, self.how))  # type: ignore[arg-type]
        return tuple(self._one(role, x, w, p) for role, w, p in zip(roles, ws, precisions, strict=True))

    def _one(self, role: str, x: jax.Array, w: Weight, p: Precision) -> jax.Array:
        if type(w) in SERVED:
            if p.weight != w.weight:  # type: ignore[union-attr]
                raise ValueError(f"'{role}' has {w.weight} codes, but its rule says '{p.weight}'")  # type: ignore[union-attr]
            return SERVED[type(w)](x, w, p.act)
        self._check(role, p, w)
        key = None
        if p.grad in fp4.FORMATS:
            key = jax.random.fold_in(
                jax.random.key(0) if self.key is None else self.key, zlib.crc32(role.encode())
            )
        (y,) = tuple(matmul(x, (w,), p.weight, p.act, self.group, p.grad, self.how, key))  # type: ignore[arg-type]
        return y

    def _check(self, role: str, p: Precision, w: jax.Array) -> None:
        """Raises: ValueError naming the role if FP4 blocks do not divide its sizes."""
        inputs, outputs = w.shape
        for name, sizes in ((p.weight, (inputs, outputs)), (p.act, (inputs,)), (p.grad, (outputs,))):
            for size in sizes:
                if size % fp4.FORMATS.get(name, 1):
                    raise ValueError(
                        f"'{role}' has a weight of {inputs} x {outputs}, and {name} needs multiples of "
                        f"{fp4.FORMATS[name]}"
                    )

    def low_formats(self) -> list[str]:
        """FP4 and FP8 formats in use."""
        used = {name for _, p in self.rules for name in (p.weight, p.act, p.grad)}
        return [name for name in LOW if name in used]

    def low_text(self) -> str:
        """How the formats of `low_formats` run on this device, for people; "" if there are none."""
        low = self.low_formats()
        native = [name for name in low if scaled.native(name)]
        emulated = [name for name in low if name not in native]
        parts = [f"{', '.join(native)} in FP4 units through jax.nn.scaled_matmul, not verified on hardware"]
        parts.append(f"{', '.join(emulated)} emulated: right numbers, no gain in speed")
        return "; ".join(part for part, names in zip(parts, (native, emulated), strict=True) if names)

    def ternary_roles(self) -> tuple[str, ...]:
        """Roles of block matrices whose weights are ternary."""
        return tuple(role for role in BLOCK_ROLES if self.precision(role).weight == "ternary")


def from_config(cfg: ModelConfig) -> Project:
    """The Project that `model.quant`, `model.quant_group` and `model.fp4` name."""
    return Project(PRESETS[cfg.quant], cfg.quant_group, cfg.fp4)


def by_stack(cfg: ModelConfig) -> dict[str, Project]:
    """What multiplies the matrices of each stack: layers outside the loops are spared unless `model.fp4` says
    otherwise, those of further tokens always are."""
    project = from_config(cfg)
    inside = ("blocks", "before", "after") if cfg.fp4.outside == "same" else ("blocks",)
    return {stack: project if stack in inside else project.spared() for stack in ternary.STACKS}


def forms(cfg: ModelConfig) -> tuple[str, ...]:
    """The names in HELD that differ for this model's matrices: "packed" only if some are held in fewer bits."""
    used = {from_config(cfg).precision(role).weight for role in BLOCK_ROLES}
    coded_, packed = used & HELD["codes"].keys(), used & {"ternary", *fp4.FORMATS}
    return ("full", *(["codes"] if coded_ else []), *(["packed"] if packed else []))


def at_rest(cfg: ModelConfig, params: Params, dtype: Any) -> Params:
    """`params` with what the forward pass casts to the computing dtype before anything else in that dtype already:
    tables, and the blocks' matrices in full precision. The same numbers, and nothing to cast in every step.

    Returns: a new tree; every other leaf is shared with the old one.
    """
    cast = {
        f"{stack}/{role}"
        for stack, project in by_stack(cfg).items()
        for role in BLOCK_ROLES
        if project.precision(role).weight == "full"
    }.union(TABLES)
    return jax.tree_util.tree_map_with_path(
        lambda path, w: w.astype(dtype) if path_name(path) in cast else w, params
    )


def hold(cfg: ModelConfig, params: Params, form: str, dtype: str, impl: str = "auto") -> Params:
    """`params` with the blocks' matrices as inference holds them.

    Args: form: in HELD. dtype: of codes that are held one number each; for ternary ones see `coded.carrier`.
    impl: of the product of packed matrices.
    Returns: a new tree; every other leaf is shared with the old one.
    """
    makers = {}
    for stack, project in by_stack(cfg).items():
        for role in BLOCK_ROLES:
            name = project.precision(role).weight
            if name in HELD[form]:
                makers[f"{stack}/{role}"] = functools.partial(
                    HELD[form][name], p=project, name=name, dtype=dtype, impl=impl
                )

    def leaf(path: tuple, w: jax.Array) -> Weight:
        name = path_name(path)
        return makers[name](w) if name in makers else w

    return jax.tree_util.tree_map_with_path(leaf, params)
