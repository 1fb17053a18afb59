"""Every setting: its default, its type, its meaning, and what makes it invalid.

Defaults live in these frozen dataclasses and nowhere else. A config file starts from
`defaults()` (a locked ConfigDict holding all of them), changes values, and returns it;
`resolve()` turns it into a `Config` and checks everything before a device or file is touched.
This module never imports jax, so that `--help` and config errors come at once.

A technique is off at its neutral value (loop.count=1, window=(), softcap=0.0, quant="full"):
there are no `use_x` switches.
"""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nanochat_jax.blocks import BLOCKS as BLOCKS
from nanochat_jax.validation import GROUPS as GROUPS
from nanochat_jax.validation import ConfigError as ConfigError
from nanochat_jax.validation import layer_period as layer_period
from nanochat_jax.validation import nearest as nearest
from nanochat_jax.validation import validate as validate
from nanochat_jax.validation.typed import typed as typed

Weight = float | tuple[tuple[int, float], ...]  # or points (step, weight), straight lines between them


@dataclass(frozen=True)
class LoopConfig:
    """LoopLM (arXiv:2510.25741): the stack of `model.layers` layers is applied `count` times."""

    count: int = 1  # 1 = an ordinary transformer
    norm: bool = False  # RMS-normalize the stream after every loop but the last
    before: int = 0  # further layers, with weights of their own, before the loops
    after: int = 0  # and after them
    inject: str = "none"  # what entered the first loop joins the stream before every other: add | linear
    gate: str = "none"  # learned exit: none | shared (one bias, halving) | per_loop (a bias each, uniform)
    readout: str = "all"  # loops whose predictions the loss term "exit" reads: all | sampled (one of them)


@dataclass(frozen=True)
class MhcConfig:
    """mHC (arXiv:2512.24880): the residual is several streams, mixed without amplification."""

    streams: int = 1  # 1 = an ordinary residual
    form: str = "sinkhorn"  # sinkhorn | permutation (exact, up to 4 streams) | unconstrained
    iterations: int = 20  # of Sinkhorn-Knopp: columns, then rows
    dynamic: bool = True  # coefficients depend on the token; False = constants of each sublayer


@dataclass(frozen=True)
class Fp4Config:
    """How a `model.quant` with FP4 runs: backward products (quant.fp4_products), corrections of fp4_rows."""

    stochastic: str = "gradient"  # operands rounded stochastically: none | gradient | both
    hadamard: int = 16  # width of the Hadamard tiles along the contracted axis; 0 = no rotation
    rotated: str = "wgrad"  # products whose operands are rotated: wgrad | both
    signs: str = "fixed"  # random signs before the rotation: none | fixed | random (anew in every step)
    operands: str = "both"  # gradient = x and w stay in full precision | both
    products: str = "both"  # which products are in FP4: dgrad (dx) | wgrad (dw) | both
    impl: str = "auto"  # of rounding: auto | pallas (GPU, one pass) | reference (plain XLA)
    outside: str = "full"  # layers before and after the loops (the first and last ones): full | same
    outliers: float = 0.01  # fp4_rows: share of each token's inputs that keep full precision; 0 = none
    estimator: float = 5.0  # fp4_rows: root of the weights' gradient estimator; 1 = straight-through


@dataclass(frozen=True)
class MtpConfig:
    """Multi-token prediction (model/mtp.py): further layers predict tokens beyond the next one.

    It serves drafting (speculative decoding); below 1B parameters no gain in quality is known.
    """

    depth: int = 0  # further tokens predicted; 0 = the next one only; the loss needs the term "mtp"
    kind: str = "chained"  # chained (arXiv:2412.19437) | parallel (arXiv:2404.19737)
    decay: float = 0.5  # weight of each further token relative to the one before it; the first has 1


@dataclass(frozen=True)
class FilterConfig:
    """Token filtering in the backward pass (model/collider.py, arXiv:2502.00340).

    "random", "loss" and "ema" are controls: they save time, and only "excess" is known to help learning.
    """

    keep: float = 1.0  # share of each row's tokens that the backward pass sees; 1 = all
    score: str = "excess"  # excess (of data.reference) | ema | loss | middle (of the losses) | random
    trim: float = 0.0  # share of a row's highest scores that are dropped first
    decay: float = 0.99  # ema: of the running averages of each token id's loss, which are the reference
    warmup: int = 0  # first steps, which learn from all tokens: early losses rank nothing


@dataclass(frozen=True)
class ModelConfig:
    """Shape and block options of the transformer."""

    vocab_size: int = 4096  # token ids; the table is padded to a multiple of 128 and masked
    dim: int = 256  # width of the residual stream
    layers: int = 4
    heads: int = 4  # query heads
    kv_heads: int = 4  # key/value heads; heads must be a multiple
    head_dim: int = 64
    mlp: str = "swiglu"  # one of MLP_KINDS
    mlp_dim: int = 768
    norm: str = "weighted"  # RMSNorm with a learned gain, or "weightless"
    norm_eps: float = 1e-6
    sub_norm: bool = False  # SubLN: RMSNorm before the output projections of attention and MLP
    embed_norm: bool = False  # RMSNorm after the token embedding
    qk_norm: str = "none"  # one of QK_NORMS: RMSNorm of queries and keys around the rotary step
    qk_gain: float = 1.0  # constant factor on queries and on keys after the norm
    rope_theta: float = 10000.0
    softcap: float = 0.0  # logits become cap * tanh(logits / cap); 0 = no cap
    tied: bool = False  # the head is the transposed embedding
    embed_std: float = 0.02  # standard deviation of the initial embedding
    window: tuple[int, ...] = ()  # attention window per layer, tiled; 0 = full; () = all full
    value_embed_every: int = 0  # every k-th layer counted from the last has value embeddings
    residual_scalars: bool = False  # learned scale of the stream before each layer
    x0_scalars: bool = False  # learned share of the embedding added before each layer
    loop: LoopConfig = field(default_factory=LoopConfig)
    mhc: MhcConfig = field(default_factory=MhcConfig)
    mtp: MtpConfig = field(default_factory=MtpConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    quant: str = "full"  # one of QUANT_PRESETS: formats of the blocks' matrices, see quant.project
    quant_group: int = 0  # inputs that share one ternary scale; 0 = one scale per matrix
    fp4: Fp4Config = field(default_factory=Fp4Config)
    dtype: str = "auto"  # compute dtype: auto = bfloat16 on GPU and TPU, float32 on CPU
    remat: str = "none"  # one of REMAT: what the backward pass recomputes
    unroll: int = 0  # layers per step of training's layer scan; 0 = all of them on CPU, else 1


@dataclass(frozen=True)
class PoolConfig:
    """What slow rows do to the order of rows (data/pool.py, after MinatoLoader, arXiv:2509.10712)."""

    order: str = "strict"  # strict | declared (slow rows come later, known beforehand) | completion
    window: int = 64  # rows in work or waiting for their turn
    delay: int = 24  # declared: places by which slow rows come later
    max_late: int = 256  # completion: places by which a row may come later, then all wait for it
    replay: str = ""  # completion: journal of an earlier run (<workdir>/data_order.bin) to repeat


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows of tokens."""

    source: str = "stdlib"  # stdlib | rust | conversations | hf:<dataset>[:[config:]split] | tokens:<file> | path | glob | URL
    mix: tuple[
        tuple[str, str, float], ...
    ] = ()  # (name, source, weight) of each part; () = data.source alone
    kind: str = "text"  # text | chat: rows of tables are conversations; what the assistant says is learned
    tokenizer: str = "bpe"  # bpe, bpe3 (trained; digits in threes, for GGUF) | bytes | a tokenizer.json
    seq_len: int = 256  # tokens per row
    batch: int = 8  # rows per optimizer step, over all devices
    isolate: bool = True  # documents in one row do not attend to one another
    shuffle: bool = True
    val_percent: int = 1  # share of documents held out, chosen by a hash of their content
    max_bytes: int = 0  # stop reading the corpus after so many bytes of text; 0 = read all
    text_key: str = "text"  # field of JSONL and Parquet rows, column of a dataset
    tokenize_workers: int = 0  # processes that tokenize when data is prepared; 0 = threads of this one
    verify_every_n_examples: int = 0  # compile every n-th file of code, drop it if that fails; 0 = none
    min_compile_rate: float = 0.0  # share of the compiled files that must pass, or the source is refused
    row_language: str = ""  # what rows of tables are, to be compiled: rust | python; "" = no code
    reference: str = ""  # file of another model's losses per token, see data.reference; for model.filter
    workers: int = 2  # threads that prepare batches
    prefetch: int = 4  # batches prepared ahead
    pool: PoolConfig = field(default_factory=PoolConfig)


@dataclass(frozen=True)
class GroupConfig:
    """Optimizer of one parameter group."""

    name: str = "adamw"  # one of the names in optim.build.OPTIMIZERS
    lr: float = 3e-3  # peak learning rate
    weight_decay: float = 0.0  # decoupled
    beta1: float = 0.9  # first-moment decay (Muon: momentum)
    beta2: float = 0.95  # second-moment decay (NorMuon: of each output)
    eps: float = 1e-10
    steps: int = 5  # Newton-Schulz iterations (Muon)
    coefficients: str = "polar_express"  # one of the names in optim.muon.COEFFICIENTS
    scale: str = "original"  # one of the names in optim.muon.SCALES
    ns_dtype: str = "auto"  # Newton-Schulz products: auto = bfloat16 on GPU and TPU, float32 on CPU
    ns_impl: str = "auto"  # of its symmetric products: auto | pallas (GPU) | reference (plain XLA)
    cautious: bool = False  # decay only where the update agrees in sign with the weight
    state_bits: int = 32  # 32 = float32 moments | 8 = codes, see opt.codes


@dataclass(frozen=True)
class CodesConfig:
    """How groups with state_bits = 8 store their moments (arXiv:2110.02861)."""

    block: int = 128  # neighbours along the last axis that share a scale
    momentum: str = "linear"  # linear | dynamic; a second moment is always dynamic and unsigned
    rounding: str = "nearest"  # nearest | stochastic
    scales: str = "float32"  # float32 | bfloat16
    impl: str = "auto"  # of the update: auto | pallas (GPU, one kernel) | reference (plain XLA)


@dataclass(frozen=True)
class GaloreConfig:
    """GaLore 2 (arXiv:2504.20437): the matrix group's direction works in low-rank subspaces."""

    rank: int = 0  # columns of the projectors; 0 = no GaLore
    update_gap: int = 200  # steps between two refreshes of a matrix's subspace
    scale: float = 0.0  # factor on projected directions; 0 = sqrt(min(m, n) / rank): the RMS as without
    min_dim: int = 256  # smallest side of a matrix that is projected
    method: str = "randomized"  # randomized | exact
    oversampling: int = 8  # further columns of the random sketch
    power_iterations: int = 1
    projector_bits: int = 32  # 32 | 16 (bfloat16) | 8
    momentum: str = "transport"  # keep | reset | rotate | transport, see optim.galore


@dataclass(frozen=True)
class FoamConfig:
    """FOAM (arXiv:2512.07112): the matrix group's moments are kept as means of blocks."""

    level: int = 0  # blocks of 2^level neighbours; 0 = no folding
    second_moment: str = "squared_mean"  # AdamW: squared_mean | mean_square


@dataclass(frozen=True)
class FireConfig:
    """FIRE (arXiv:2602.08040): reinitialize the matrix group to isometries."""

    steps: tuple[int, ...] = ()  # after so many updates; () = never
    scale: str = "norm"  # fan | norm | unit: gain of the isometry


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning-rate factor over the run; multiplies every group's peak."""

    kind: str = "wsd"  # wsd | cosine | linear
    warmup_steps: int = 20
    decay_fraction: float = 0.4  # share of the run spent decaying (wsd)
    decay_shape: str = "linear"  # linear | cosine | sqrt (wsd)
    floor: float = 0.1  # factor at the end
    cycles: int = 1  # warm restarts: descents of the cosine, each from the peak to the floor
    rewarm_steps: int = 0  # steps to climb again when a finished run is extended; 0 = refuse


@dataclass(frozen=True)
class OptConfig:
    """The optimizer chain: outer(clip -> partition{group: wrapped direction -> decay -> lr})."""

    matrix: GroupConfig = GroupConfig(name="muon", lr=0.02, beta1=0.95)
    embed: GroupConfig = GroupConfig(lr=0.03, beta1=0.8, beta2=0.95)
    head: GroupConfig = GroupConfig(lr=0.004, beta1=0.8, beta2=0.95)
    scalar: GroupConfig = GroupConfig(lr=0.01, beta1=0.8, beta2=0.95)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    codes: CodesConfig = field(default_factory=CodesConfig)
    galore: GaloreConfig = field(default_factory=GaloreConfig)
    foam: FoamConfig = field(default_factory=FoamConfig)
    fire: FireConfig = field(default_factory=FireConfig)
    decay_to_zero: bool = False  # weight decay follows a cosine to 0 at the last step
    clip: float = 1.0  # global gradient norm; 0 = no clipping
    skip_nonfinite: int = 5  # non-finite steps in a row that are skipped before the run stops
    spike_sigmas: float = 0.0  # skip steps whose gradient norm is so many sigmas above the median; 0 = never


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 300
    microbatches: int = 1  # gradient accumulation: the batch is cut into so many pieces
    loss: tuple[tuple[str, Weight], ...] = (("next_token", 1.0),)  # (term, weight or (step, weight) points)
    loss_chunk: int = 512  # tokens whose logits exist at once
    check_replicas_steps: int = (
        0  # compare the bits of all copies of the state every so many steps; 0 = never
    )
    stall_seconds: float = 300.0  # report when no step ends for so long (or for ten usual steps); 0 = never
    stall_exit: bool = False  # and end the process then, for a launcher to start it again


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; the product is the number of devices used."""

    data: int = 1  # replicas
    fsdp: int = 1  # batch and parameters split
    tensor: int = 1  # single matrices split
    reduce_dtype: str = (
        "float32"  # of exchanged gradients, and of weights gathered over fsdp: float32 | bfloat16
    )


@dataclass(frozen=True)
class CkptConfig:
    """What is saved, when, and what is kept."""

    every_steps: int = 0  # 0 = by time only, and at the end
    every_minutes: float = 10.0  # 0 = by steps only, and at the end
    keep_last: int = 3
    keep_every_steps: int = 0  # additionally keep every checkpoint whose step is a multiple
    init_from: str = ""  # another run's workdir: start from its parameters
    verify: str = "size"  # size (and hashes of files up to 1 MiB) | sha256: how restored files are checked
    min_free_gb: float = 1.0  # refuse to start a save that would leave less free disk


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation and samples during training."""

    every_steps: int = 200  # 0 = only at the end
    batches: int = 16  # held-out batches (of data.batch rows); always the same ones; 0 = all
    prompt: str = "def "  # text that the samples continue; with data.kind = "chat" the question they answer
    sample_tokens: int = 120  # 0 = no samples


@dataclass(frozen=True)
class LogConfig:
    """Metrics out."""

    every_steps: int = 20
    tensorboard: bool = True
    format: str = "text"  # of progress on stderr: text, or json (an object per line, with trace and span ids)
    profile_steps: tuple[int, ...] = ()  # first and last step of a jax.profiler trace in <workdir>/profile
    prometheus_port: int = 0  # serve http://127.0.0.1:<port>/metrics while the run lasts; 0 = do not
    otlp: str = ""  # collector that spans are posted to, e.g. http://127.0.0.1:4318/v1/traces; "" = none
    min_entropy: float = 0.0  # nats; report predictions below it (a healthy model has its loss); 0 = do not
    max_grad_norm: float = 0.0  # report gradients above it; 0 = compare with earlier ones only


@dataclass(frozen=True)
class InferConfig:
    """Defaults of `python -m nanochat_jax.inference`."""

    max_tokens: int = 200
    temperature: float = 0.8  # 0 = greedy
    top_k: int = 50  # 0 = all
    top_p: float = 1.0
    exit_quantile: float = 1.0  # a token leaves the loops at this share of its exit distribution; 1 = never
    loop_cache: str = "all"  # keys and values that later tokens find: of all loops | of the last one only
    capacity: int = 1024  # slots of the key/value cache: prompt and answer together
    weights: str = "auto"  # matrices in low bits: full | codes, rounded once | packed, 2 or 4 bits per weight
    impl: str = "auto"  # of the packed product: auto | pallas (GPU) | reference (plain XLA)
    draft_tokens: int = 0  # speculative decoding: tokens drafted ahead at most; 0 = none
    draft_loops: int = 0  # drafts come from the model with so many loops; 0 = from the layers of model.mtp


@dataclass(frozen=True)
class Config:
    """One run. `name` also names the default workdir, runs/<name>."""

    name: str = "run"
    seed: int = 0
    workdir: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    opt: OptConfig = field(default_factory=OptConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    ckpt: CkptConfig = field(default_factory=CkptConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    infer: InferConfig = field(default_factory=InferConfig)


def defaults() -> ConfigDict:
    """All settings with their default values, as a locked ConfigDict for a config file."""
    return _to_dict(Config()).lock()


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict of a resolved config (JSON-able; tuples stay tuples)."""
    return dataclasses.asdict(config)


def from_json(given: dict[str, Any]) -> ConfigDict:
    """Settings of a config.json, in which a setting that is absent has its default.

    Unknown keys stay, for `resolve` to name. The result is not type-safe, because a JSON 1 may stand
    for a float that an override then makes 0.5; `resolve` checks the types.
    """

    def merged(base: Any, over: Any) -> Any:
        if isinstance(over, dict):
            base = base if isinstance(base, dict) else {}
            return base | {key: merged(base.get(key), value) for key, value in over.items()}
        return tuple(merged(None, item) for item in over) if isinstance(over, list) else over

    return ConfigDict(merged(to_dict(Config()), given), type_safe=False)


def resolve(settings: ConfigDict | dict[str, Any]) -> Config:
    """Build and check a Config.

    Raises: ConfigError with one sentence: unknown key (with the nearest known one), wrong type,
    impossible shape, contradiction.
    """
    plain = settings.to_dict() if isinstance(settings, ConfigDict) else settings
    config = _build(Config, plain, "")
    validate(config)
    return config


def all_keys(prefix: str = "", of: type = Config) -> dict[str, type]:
    """Every setting's dotted key and its type, e.g. 'model.loop.count': int."""
    keys: dict[str, type] = {}
    for name, kind in typing.get_type_hints(of).items():
        if dataclasses.is_dataclass(kind):
            keys |= all_keys(f"{prefix}{name}.", typing.cast(type, kind))
        else:
            keys[prefix + name] = kind
    return keys


def describe() -> str:
    """One line for every key: how to set it, its type, default and comment in this file."""
    comments: dict[tuple[str, str], str] = {}
    owner = ""
    for line in Path(__file__).read_text(encoding="utf-8").splitlines():
        if line.startswith("class "):
            owner = line[6:].split("(")[0].rstrip(":")
        elif owner and ":" in line and "#" in line:
            comments[owner, line.split(":")[0].strip()] = line.split("#", 1)[1].strip()
    lines, kinds = [], all_keys()

    def walk(node: Any, prefix: str) -> None:
        for item in dataclasses.fields(node):
            value, key = getattr(node, item.name), prefix + item.name
            if dataclasses.is_dataclass(value):
                walk(value, f"{key}.")
            else:
                kind = str(kinds[key]) if typing.get_args(kinds[key]) else kinds[key].__name__
                comment = comments.get((type(node).__name__, item.name), "")
                lines.append(f"--config.{key}={value!r}  ({kind}) {comment}".rstrip())

    walk(Config(), "")
    return "\n".join(lines)


def nearest_key(key: str) -> str:
    """Suggest a full dotted key for a mistyped one, comparing whole keys and last parts."""
    keys = list(all_keys())
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not close:
        last = {k.rsplit(".", 1)[-1]: k for k in keys}
        close = [last[m] for m in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, 1, 0.5)]
    return f". Did you mean '{close[0]}'?" if close else ""


def parse_arg(arg: str, **allowed: Any) -> types.SimpleNamespace:
    """Parse the text after the colon of --config=file.py:key=value,key=value.

    Args: allowed: known keys and their defaults; values are converted to the default's type.
    Raises: ConfigError for an unknown key or a value of the wrong type.
    """
    values = dict(allowed)
    for part in filter(None, arg.split(",")):
        key, equals, text = part.partition("=")
        if not equals or key not in allowed:
            raise ConfigError(f"config argument '{part}': expected key=value{nearest(key, allowed)}")
        kind = type(allowed[key])
        try:
            values[key] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise ConfigError(f"config argument '{key}': expected {kind.__name__}, got '{text}'") from None
    return types.SimpleNamespace(**values)


def padded_vocab(cfg: ModelConfig) -> int:
    """Rows of the embedding table: vocab_size rounded up to a multiple of 128."""
    return -(-cfg.vocab_size // 128) * 128


def value_layers(cfg: ModelConfig) -> tuple[int, ...]:
    """Layers that have a value embedding: every k-th, counted from the last."""
    every = cfg.value_embed_every
    return tuple(i for i in range(cfg.layers) if every and (cfg.layers - 1 - i) % every == 0)


def _to_dict(node: Any) -> ConfigDict:
    values = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    return ConfigDict({k: _to_dict(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()})


def _build(cls: type, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"'{path[:-1]}' must be a group of settings, got {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(f"no key '{path}{key}'{nearest_key(path + str(key))}")
    built = {}
    for key, value in values.items():
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            built[key] = _build(typing.cast(type, kind), value, f"{path}{key}.")
        else:
            built[key] = typed(kind, value, path + key)
    return dataclasses.replace(cls(), **built)
