"""Which number format each projection of the model runs in.

The model calls `project("attn/q", x, w)` for every weight matmul and knows no formats. `Project`
holds ordered rules (regex on the role, Precision); the first match wins.
"""

import re
from dataclasses import dataclass

import jax

from nanochat_jax.config import ModelConfig
from nanochat_jax.kernels import dispatch
from nanochat_jax.quant.matmul import ACTIVATIONS, WEIGHTS, matmul

# Weight matrices of a block, by role; everything else multiplies in full precision.
BLOCK_ROLES = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")


@dataclass(frozen=True)
class Precision:
    """Independent slots, each a name in a dict of functions in `quant.matmul`."""

    weight: str = "full"
    act: str = "full"

    def __post_init__(self):
        for slot, name, known in (("weight", self.weight, WEIGHTS), ("act", self.act, ACTIVATIONS)):
            if name not in known:
                raise ValueError(
                    f"precision slot '{slot}': unknown format '{name}'; known: {', '.join(known)}"
                )


Rules = tuple[tuple[str, Precision], ...]

PRESETS: dict[str, Rules] = {
    "full": ((r".*", Precision()),),
    "ternary": ((r"(attn|mlp)/.*", Precision("ternary", "int8")), (r".*", Precision())),
}


@dataclass(frozen=True)
class Project:
    """Callable (role, x, w) -> x @ w in the role's precision. Static and hashable.

    group: inputs that share one ternary scale; 0 = one scale per matrix.
    """

    rules: Rules
    group: int = 0

    def precision(self, role: str) -> Precision:
        """Raises: ValueError if no rule matches the role."""
        for pattern, precision in self.rules:
            if re.fullmatch(pattern, role):
                return precision
        raise ValueError(f"no precision rule matches role '{role}'; rules: {[p for p, _ in self.rules]}")

    def __call__(self, role: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """Multiply activations x [..., m] with the weight w [m, n]; returns [..., n], x's dtype."""
        return self.several((role,), x, (w,))[0]

    def several(
        self, roles: tuple[str, ...], x: jax.Array, ws: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        """Multiply the same activations x [..., m] with several weights [m, n_i].

        Roles of equal precision run as one wide product where that pays: on CPU. Elsewhere the
        products are separate, so that weights split over devices are not joined across them.
        """
        precisions = [self.precision(role) for role in roles]
        first = precisions[0]
        if dispatch.backend() == "cpu" and all(p == first for p in precisions):
            return tuple(matmul(x, ws, first.weight, first.act, self.group))  # type: ignore[arg-type]
        return tuple(self._one(x, w, p) for p, w in zip(precisions, ws, strict=True))

    def _one(self, x: jax.Array, w: jax.Array, precision: Precision) -> jax.Array:
        (y,) = tuple(matmul(x, (w,), precision.weight, precision.act, self.group))  # type: ignore[arg-type]
        return y

    def ternary_roles(self) -> tuple[str, ...]:
        """Roles of block matrices whose weights are ternary."""
        return tuple(role for role in BLOCK_ROLES if self.precision(role).weight == "ternary")


def from_config(cfg: ModelConfig) -> Project:
    """The Project that `model.quant` and `model.quant_group` name."""
    return Project(PRESETS[cfg.quant], cfg.quant_group)
