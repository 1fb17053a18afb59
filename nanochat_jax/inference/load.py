"""Parameters and tokenizer of a finished or running run, and text from text."""

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from nanochat_jax import checkpoint, parallel
from nanochat_jax import params as params_lib
from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import Config, ConfigError, InferConfig, MeshConfig, ModelConfig
from nanochat_jax.inference import engine, pace, schedule, speculative
from nanochat_jax.kernels import dispatch
from nanochat_jax.model import loop, transformer
from nanochat_jax.quant import coded
from nanochat_jax.quant import project as projections
from nanochat_jax.types import Params

WRITTEN_OUT = 128  # layers, in all loops: a program of more, each on its own, takes too long to compile


def load_params(cfg: Config, workdir: Path) -> Params:
    """The newest parameters in <workdir>/ckpt, on one device. Raises: CheckpointError."""
    specs = transformer.param_specs(cfg.model)
    shapes = jax.eval_shape(lambda key: params_lib.init_params(specs, key), jax.random.key(0))
    layout = parallel.param_shardings(specs, parallel.mesh(MeshConfig()))
    target = jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, layout
    )
    return checkpoint.restore_params(workdir / "ckpt", target, cfg.ckpt.verify)[0]


def form(cfg: ModelConfig, settings: InferConfig) -> str:
    """How matrices in low bits are held: "full", "codes" or "packed"; what `infer.weights` = "auto" stands for."""
    if settings.weights != "auto":
        return settings.weights
    *known, last = projections.forms(cfg)
    return "codes" if dispatch.backend() == "cpu" and "codes" in known else last


def served(cfg: ModelConfig, params: Params, settings: InferConfig, rows: int = 1) -> Params:
    """The parameters as answers to `rows` requests at a time are computed from them: matrices in low bits in the
    form that `infer.weights` names, others and tables in the computing dtype, and the layers' arrays apart."""
    held, dtype = form(cfg, settings), transformer.compute_dtype(cfg).name
    if held == "codes" and projections.from_config(cfg).ternary_roles() and not cfg.quant_group:
        dtype = coded.carrier(rows, cfg.dim, cfg.mlp_dim)
    params = projections.at_rest(cfg, params, transformer.compute_dtype(cfg))
    params = projections.hold(cfg, params, held, dtype, settings.impl)
    return transformer.apart(params) if loop.effective_layers(cfg) <= WRITTEN_OUT else params


def placed(cfg: ModelConfig, params: Params, settings: InferConfig, rows: int) -> Params:
    """`served`, on the first device, beside which an engine puts its slots."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.device_put(served(cfg, params, settings, rows), first)


def load_engine(
    cfg: Config, workdir: Path, settings: InferConfig, slots: int
) -> tuple[schedule.Engine, tokenizers.Tokenizer]:
    """A run's model for continuous batching, and its tokenizer. Raises: CheckpointError, ValueError."""
    if settings.loop_cache != "all":
        raise ConfigError(
            "'infer.loop_cache' must be 'all' for the server and the chat: they read a prompt in pieces, and a "
            "piece needs what every loop left of the ones before"
        )
    tokenizer = tokenizers.load(workdir / "tokenizer.json")
    params = placed(cfg.model, load_params(cfg, workdir), settings, slots)
    known = min(tokenizer.vocab_size, cfg.model.vocab_size)
    chunk = min(256, 1 << settings.capacity.bit_length() - 1)
    return schedule.Engine(
        cfg.model, params, known, slots, settings.capacity, chunk, settings.exit_quantile,
        settings.draft_tokens, settings.draft_loops,
    ), tokenizer  # fmt: skip


def pieces(tokenizer: tokenizers.Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Text of ids as they come; bytes of an unfinished character wait for the next id."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in ids:
        yield decoder.decode(tokenizer.decode_bytes([token]) if token < tokenizer.vocab_size else b"")
    yield decoder.decode(b"", final=True)


def sampler(
    cfg: Config, workdir: Path, settings: InferConfig, ran: list[jax.Array] | None = None,
    tell: list[pace.Pace] | None = None,
) -> Callable[[str, int], Iterator[str]]:  # fmt: skip
    """Build text(prompt, seed) -> pieces of the continuation, from a run's directory. ran: see
    `engine.generate`. tell: see `speculative.generate`."""
    tokenizer = tokenizers.load(workdir / "tokenizer.json")
    params = served(cfg.model, load_params(cfg, workdir), settings)

    def text(prompt: str, seed: int) -> Iterator[str]:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        key = jax.random.key(seed)
        if settings.draft_tokens:
            return pieces(tokenizer, speculative.generate(cfg.model, params, ids, settings, key, tell))
        return pieces(tokenizer, engine.generate(cfg.model, params, ids, settings, key, ran))

    return text


def summary(cfg: ModelConfig, ran: list[jax.Array], tell: list[pace.Pace]) -> str:
    """What a sample showed of early exit and of drafts; "" if there was neither."""
    if ran:
        return f"{sum(int(loops[0]) for loops in ran) / len(ran):.2f} of {cfg.loop.count} loops per token"
    return pace.line(tell[0]) if tell else ""
