"""Residual streams: hyper-connections whose mixing cannot amplify (mHC, arXiv:2512.24880).

The residual is S streams x_BLSD. Each sublayer F (attention or MLP, its norm inside) reads one
vector, and writes back to all streams:

    h    = sum_s pre_s x_s
    x'_i = sum_j R_ij x_j + post_i F(h)

pre, post and R are computed per token from all its streams, by one projection `phi` of the
RMS-normalized S*D numbers, scaled by three learned `alpha` and shifted by `bias`. What R may be
is the form:

- sinkhorn: alternately normalized columns and rows of exp(logits) (log space, float32). Rows sum
  to 1 exactly, since they come last; columns only nearly, the worse the more the logits spread.
- permutation (mHC-lite, arXiv:2601.05732): a softmax mixture of all S! permutation matrices,
  doubly stochastic to rounding. Equals every doubly stochastic matrix for some weights (Birkhoff).
- unconstrained (hyper-connections, arXiv:2409.19606): any R, pre and post. For comparison: here
  nothing bounds a product over the layers. Unlike the paper's, its projection sees all streams, so
  that the constraint is all that differs from the other forms.

A product of doubly stochastic matrices is one again: it keeps the mean of the streams and
amplifies none. `Watch` carries the product over all sublayers, for the metric mhc/gain.

Streams start as copies of the embedding. If all were read and written alike they would stay
copies, so the initial biases let sublayer l mainly read and write stream l mod S.

Nothing of a sublayer is kept for the backward pass but its streams, the projection (2S + S^2
numbers a token) and the sublayer's output; the iterations in particular are computed again.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.config import MhcConfig, ModelConfig
from nanochat_jax.kernels import dispatch
from nanochat_jax.model import layers
from nanochat_jax.params import Init, ParamSpec, constant, zeros
from nanochat_jax.types import Key, Metrics, Params

INITIAL_ALPHA = 0.01  # share of the token-dependent part, as in the paper
INITIAL_LOGIT = -8.0  # of all that is not the identity: R starts at 0.99 or more on the diagonal


class Mix(NamedTuple):
    """Coefficients of one sublayer, float32. B = L = 1 if they do not depend on the token."""

    pre: jax.Array  # [B, L, S]
    post: jax.Array  # [B, L, S]
    res: jax.Array  # [B, L, S, S]: x'_i = sum_j res[i, j] x_j


class Watch(NamedTuple):
    """What the mixing of all sublayers so far does to a token, float32, without gradient."""

    product: jax.Array  # [B, L, S, S]: R_l ... R_1
    error: jax.Array  # [B, L]: largest |row sum - 1| or |column sum - 1| of any R


def coefficient_count(cfg: MhcConfig) -> int:
    """Numbers per token and sublayer from which pre, post and R are made."""
    S = cfg.streams
    return 2 * S + (math.factorial(S) if cfg.form == "permutation" else S * S)


def param_specs(cfg: ModelConfig, part: int, first: int = 0) -> dict[str, ParamSpec]:
    """Parameters of every layer's attention (part 0) or MLP (part 1) connection.

    Args: first: number of the stack's first layer, see the header on streams.
    Returns: bias [N, Q]; if dynamic also phi [N, S * D, Q] and alpha [N, 3] (of pre, post, R), with
    Q = `coefficient_count`; {} for one stream.
    """
    c, N, Q = cfg.mhc, cfg.layers, coefficient_count(cfg.mhc)
    if c.streams == 1:
        return {}
    specs = {"bias": ParamSpec((N, Q), ("layer", None), _initial_bias(c, part, first))}
    if c.dynamic:
        shape = (N, c.streams * cfg.dim, Q)
        specs["phi"] = ParamSpec(shape, ("layer", "embed", None), zeros, matmul=True)
        specs["alpha"] = ParamSpec((N, 3), ("layer", None), constant(INITIAL_ALPHA))
    return specs


def _initial_bias(cfg: MhcConfig, part: int, first: int) -> Init:
    """R near the identity; sublayer l = 2 * layer + part favors stream l mod S."""
    S = cfg.streams

    def init(key: Key, shape: tuple[int, ...]) -> jax.Array:
        N = shape[0]
        favored = np.eye(S)[(2 * (first + np.arange(N)) + part) % S]
        if cfg.form == "unconstrained":  # the hyper-connections' own start: values, not logits
            pre, post, res = favored, np.ones((N, S)), np.eye(S).reshape(-1)
        elif cfg.form == "permutation":
            pre = post = 2 * favored - 1
            res = np.where(np.arange(math.factorial(S)) == 0, 0.0, INITIAL_LOGIT)
        else:
            pre = post = 2 * favored - 1
            res = np.where(np.eye(S) == 1, 0.0, INITIAL_LOGIT).reshape(-1)
        return jnp.asarray(np.concatenate([pre, post, np.tile(res, (N, 1))], 1), jnp.float32)

    return init


def expand(cfg: MhcConfig, x_BLD: jax.Array) -> jax.Array:
    """Copies of x in all streams [B, L, S, D]; x itself for one stream."""
    if cfg.streams == 1:
        return x_BLD
    B, L, D = x_BLD.shape
    return jnp.broadcast_to(x_BLD[:, :, None], (B, L, cfg.streams, D))


def collapse(cfg: MhcConfig, x: jax.Array) -> jax.Array:
    """Mean of the streams [B, L, D]; x itself for one stream."""
    return x if cfg.streams == 1 else jnp.mean(x, 2, dtype=jnp.float32).astype(x.dtype)


def rms_norm(cfg: MhcConfig, x: jax.Array, gain_D: jax.Array | None, eps: float) -> jax.Array:
    """RMS norm of each token over all its streams together, which keeps their relative sizes."""
    if cfg.streams == 1:
        return layers.rms_norm(x, gain_D, eps)
    gain = None if gain_D is None else jnp.tile(gain_D, cfg.streams)
    return layers.rms_norm(x.reshape(*x.shape[:2], -1), gain, eps).reshape(x.shape)


def coefficients(cfg: MhcConfig, p: Params, x: jax.Array, eps: float = 1e-6) -> Mix | None:
    """Coefficients of one sublayer, to be passed to `read` and `write`.

    Args: p: one layer of `param_specs`. x: [B, L, S, D]. eps: of the norm.
    Returns: Mix in float32, whatever the dtype of x; None for one stream.
    """
    if cfg.streams == 1:
        return None
    return _coefficients(cfg, p, x, eps)


@functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keeps x @ phi, not the iterations
    static_argnums=(0, 3),
)
def _coefficients(cfg: MhcConfig, p: Params, x_BLSD: jax.Array, eps: float) -> Mix:
    B, L, S, D = x_BLSD.shape
    raw = p["bias"].reshape(1, 1, -1)
    if cfg.dynamic:
        v = x_BLSD.reshape(B, L, S * D).astype(jnp.float32)
        # Normalized after the product, so that one pass over the streams serves both.
        a = jnp.matmul(v, p["phi"]) * jax.lax.rsqrt(jnp.mean(v * v, -1, keepdims=True) + eps)
        if cfg.form == "unconstrained":
            a = jnp.tanh(a)
        columns = np.repeat(np.arange(3), (S, S, coefficient_count(cfg) - 2 * S))
        raw = raw + p["alpha"][columns].reshape(1, 1, -1) * a
    pre, post, res = jnp.split(raw, (S, 2 * S), -1)
    if cfg.form == "permutation":
        return Mix(jax.nn.sigmoid(pre), 2 * jax.nn.sigmoid(post), permutation_mixture(res))
    res = res.reshape(*res.shape[:2], S, S)
    if cfg.form == "unconstrained":
        return Mix(pre, post, res)
    return Mix(jax.nn.sigmoid(pre), 2 * jax.nn.sigmoid(post), sinkhorn(res, cfg.iterations))


def sinkhorn(logits: jax.Array, iterations: int) -> jax.Array:
    """Divide the columns, then the rows, of exp(logits) by their sums, `iterations` times.

    In log space, so that no logit overflows. Differentiable through the iterations.
    Args: logits: float32 [..., S, S]. iterations: >= 1.
    Returns: [..., S, S] whose rows sum to 1, and whose columns approach it.
    Source: arXiv:2512.24880, section 4.2 (which starts from the same matrix).
    """

    def step(a, _):
        a = a - jax.nn.logsumexp(a, axis=0, keepdims=True)
        return a - jax.nn.logsumexp(a, axis=1, keepdims=True), None

    # Matrix axes first: sums over them are then sums of long vectors. Unrolled, accelerators fuse all
    # iterations into one kernel; on CPU the unrolled program takes far longer to compile.
    a = jnp.moveaxis(logits, (-2, -1), (0, 1))
    a, _ = jax.lax.scan(step, a, None, iterations, unroll=1 if dispatch.backend() == "cpu" else iterations)
    return jnp.exp(jnp.moveaxis(a, (0, 1), (-2, -1)))


def permutations(streams: int) -> np.ndarray:
    """All permutation matrices, float32 [S!, S, S], the identity first."""
    orders = np.array(list(itertools.permutations(range(streams))))
    return np.eye(streams, dtype=np.float32)[orders]


def permutation_mixture(logits: jax.Array) -> jax.Array:
    """sum_k softmax(logits)_k P_k over all permutation matrices P_k: exactly doubly stochastic.

    Args: logits: float32 [..., S!].
    Returns: [..., S, S].
    Raises: ValueError if the last size is no factorial of 2 to 6.
    Source: arXiv:2601.05732.
    """
    sizes = {math.factorial(s): s for s in range(2, 7)}
    if logits.shape[-1] not in sizes:
        raise ValueError(f"expected S! logits for S in 2..6, got {logits.shape[-1]}")
    S = sizes[logits.shape[-1]]
    table = jnp.asarray(permutations(S).reshape(-1, S * S))
    # Stated, because the default on GPU rounds the weights to 11 bits, and the sums would show it.
    mixed = jnp.matmul(jax.nn.softmax(logits, -1), table, precision=jax.lax.Precision.HIGHEST)
    return mixed.reshape(*logits.shape[:-1], S, S)


def read(mix: Mix | None, x: jax.Array) -> jax.Array:
    """The sublayer's input [B, L, D] from streams [B, L, S, D]; x itself for one stream."""
    return x if mix is None else _read(mix.pre, x)


def write(mix: Mix | None, x: jax.Array, y_BLD: jax.Array) -> jax.Array:
    """Mixed streams plus the sublayer's output [B, L, S, D], in x's dtype; x + y for one stream."""
    return x + y_BLD if mix is None else _write(mix.post, mix.res, x, y_BLD)


@jax.checkpoint
def _read(pre_BLS, x_BLSD):
    return _apply(pre_BLS[:, :, None], x_BLSD)[:, :, 0].astype(x_BLSD.dtype)


@jax.checkpoint
def _write(post_BLS, res_BLSS, x_BLSD, y_BLD):
    added = post_BLS[..., None] * y_BLD[:, :, None].astype(jnp.float32)
    return (_apply(res_BLSS, x_BLSD) + added).astype(x_BLSD.dtype)


def _apply(m_BLIS, x_BLSD):
    """m @ x in float32, as a sum of S scaled streams: products this thin cost more as matmuls."""
    x = x_BLSD.astype(jnp.float32)
    terms = [m_BLIS[..., j, None] * x[:, :, j, None] for j in range(x.shape[2])]
    return sum(terms[1:], terms[0])


def watch(cfg: MhcConfig, shape_BL: tuple[int, int]) -> Watch | None:
    """The watch before the first sublayer; None for one stream."""
    if cfg.streams == 1:
        return None
    B, L = shape_BL if cfg.dynamic else (1, 1)
    eye = jnp.eye(cfg.streams, dtype=jnp.float32)
    return Watch(jnp.broadcast_to(eye, (B, L, *eye.shape)), jnp.zeros((B, L), jnp.float32))


def observe(seen: Watch | None, mix: Mix | None) -> Watch | None:
    """The watch after one more sublayer; None stays None."""
    if seen is None or mix is None:
        return None
    res = jax.lax.stop_gradient(mix.res)
    error = jnp.maximum(jnp.abs(res.sum(-1) - 1).max(-1), jnp.abs(res.sum(-2) - 1).max(-1))
    return Watch(_apply(res, seen.product), jnp.maximum(seen.error, error))


def gains(product: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest amplification of a signal, and of a gradient, by a mixing matrix [..., S, S].

    Returns: (largest absolute row sum, largest absolute column sum), each [...].
    Source: arXiv:2512.24880, the Amax gain magnitude of its figures.
    """
    size = jnp.abs(product)
    return size.sum(-1).max(-1), size.sum(-2).max(-1)


def metrics(seen: Watch | None, x: jax.Array, weights_BL: jax.Array) -> Metrics:
    """Means over tokens, weighted like the loss (sums, if the weights do not sum to 1).

    Per token, never of the mean matrix, which would hide outliers. Scalar residual factors are not
    part of the product.
    Returns: mhc/gain (the larger of the next two), mhc/gain_forward, mhc/gain_backward,
    mhc/sum_error (see Watch), mhc/stream_rms (at the end); {} for one stream.
    """
    if seen is None:
        return {}
    forward, backward = gains(seen.product)
    last = jax.lax.stop_gradient(x).astype(jnp.float32)
    values = {
        "gain": jnp.maximum(forward, backward), "gain_forward": forward, "gain_backward": backward,
        "sum_error": seen.error, "stream_rms": jnp.sqrt(jnp.mean(last * last, (-2, -1))),
    }  # fmt: skip
    weights = jax.lax.stop_gradient(weights_BL)
    return {f"mhc/{name}": jnp.sum(weights * value) for name, value in values.items()}
