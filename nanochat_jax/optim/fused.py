"""Directions whose moments can be updated in one pass over memory: their elementwise formulas.

Muon, Lion and AdamW read a gradient and their moments, element by element, and only Muon, with what may stand
behind it (NorMuon), does more with the result. Written as a `Rule`, `kernels.int8` can decode, update and encode
in a single kernel. The formulas are those of `muon.scale_by_muon`, `optax.scale_by_lion` and `optax.scale_by_adam`, operation
by operation; those transforms remain the specification, and define the state's layout.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanochat_jax.kernels import int8
from nanochat_jax.params import path_name


class Form(NamedTuple):
    """An optimizer's direction in elementwise form.

    fields: names of the moments in the state. rule: see `int8.Rule`. numbers: from the count of updates
    with this one (int32 []) to the rule's scalars. finish: (gradient, direction) -> update of a leaf.
    behind: a transform that stands behind this one in an `optax.chain` of the two, whose state is not quantized.
    """

    fields: tuple[str, ...]
    rule: int8.Rule
    numbers: Callable[[jax.Array], tuple[jax.Array, ...]] = lambda count: ()
    finish: Callable[[jax.Array, jax.Array], jax.Array] = lambda grad, direction: direction
    behind: optax.GradientTransformation | None = None


def muon(momentum: float, finish: Callable[[jax.Array, jax.Array], jax.Array], nesterov: bool = True) -> Form:
    """The momentum of `muon.scale_by_muon`; finish orthogonalizes, see `muon.orthogonalizer`."""

    def rule(grad, moments, numbers):
        mu = momentum * moments[0] + (1 - momentum) * grad
        return (momentum * mu + (1 - momentum) * grad if nesterov else mu), (mu,)

    return Form(("mu",), rule, finish=finish)


def lion(beta1: float, beta2: float) -> Form:
    """`optax.scale_by_lion`."""

    def rule(grad, moments, numbers):
        direction = jnp.sign((1.0 - beta1) * grad + beta1 * moments[0])
        return direction, ((1 - beta2) * grad + beta2 * moments[0],)

    return Form(("mu",), rule)


def adam(beta1: float, beta2: float, eps: float) -> Form:
    """`optax.scale_by_adam`."""

    def rule(grad, moments, numbers):
        mu = (1 - beta1) * grad + beta1 * moments[0]
        nu = (1 - beta2) * (grad * grad) + beta2 * moments[1]
        return (mu / numbers[0]) / (jnp.sqrt(nu / numbers[1]) + eps), (mu, nu)

    def numbers(count):
        return tuple((1 - beta**count).astype(jnp.float32) for beta in (beta1, beta2))

    return Form(("mu", "nu"), rule, numbers)


def update(
    form: Form,
    updates: Any,
    inner: Any,
    scales: Any,
    codes: tuple[str, ...],
    block: int,
    key_of: Callable[[str], Any],
    impl: str,
) -> tuple[Any, Any, Any]:
    """One update of a transform whose moments are stored by `quantized.quantize_state`.

    Args:
        updates: gradients, float32.
        inner, scales: of `quantized.QuantizedState`.
        codes: of each of the form's fields, a name in `int8.CODES`.
        block: elements per scale.
        key_of: path of a moment in `inner` -> key of its stochastic rounding, or None.
        impl: see `int8.update`.

    Returns: (new updates, inner, scales), as the wrapped transform and `quantize` would make them.
    """
    if form.behind is not None:
        (inner, rest), (scales, none) = inner, scales
        first, inner, scales = update(
            form._replace(behind=None),
            updates,
            inner,
            scales,
            codes,
            block,
            lambda path: key_of(f"0/{path}"),
            impl,
        )
        new, rest = form.behind.update(first, rest)
        return new, (inner, rest), (scales, none)
    count = jnp.asarray(optax.safe_increment(inner.count))
    numbers = form.numbers(count)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
    columns = [treedef.flatten_up_to(getattr(tree, f)) for f in form.fields for tree in (inner, scales)]

    made = []
    for (path, grad), *parts in zip(leaves, *columns, strict=True):
        moments, own = tuple(parts[0::2]), tuple(parts[1::2])
        if isinstance(own[0], optax.MaskedNode):  # a small leaf: float32 moments
            direction, kept = form.rule(grad, moments, numbers)
            kept = tuple(zip(kept, own, strict=True))
        else:
            keys = tuple(key_of(f"{field}/{path_name(path)}") for field in form.fields)
            stored = tuple(zip(moments, own, strict=True))
            direction, kept = int8.update(form.rule, grad, stored, codes, numbers, block, keys, impl)
        made.append((form.finish(grad, direction).astype(grad.dtype), kept))

    def tree(i: int, part: int) -> Any:
        return treedef.unflatten([kept[i][part] for _, kept in made])

    named = dict(enumerate(form.fields))
    inner = inner._replace(count=count, **{field: tree(i, 0) for i, field in named.items()})
    scales = scales._replace(**{field: tree(i, 1) for i, field in named.items()})
    return treedef.unflatten([u for u, _ in made]), inner, scales
