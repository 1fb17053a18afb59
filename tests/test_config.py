"""Every mistake in a setting gets its sentence, and every setting changes something."""

import dataclasses
import json

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from nanochat_jax import cli, config
from nanochat_jax.config import BLOCKS, ConfigError, defaults, resolve


def with_(**changes):
    """Default settings as nested dicts, with changes written model__dim=3."""
    settings = defaults().to_dict()
    for key, value in changes.items():
        group = settings
        *path, last = key.split("__")
        for part in path:
            group = group[part]
        group[last] = value
    return settings


def test_defaults_resolve_and_round_trip():
    cfg = resolve(defaults())
    assert resolve(config.to_dict(cfg)) == cfg
    assert resolve(json.loads(json.dumps(config.to_dict(cfg)))) == cfg  # lists become tuples again


# The greatest value that is too small, for every number with a lower bound of its own.
TOO_SMALL = {
    "model.vocab_size": 1, "model.layers": 0, "model.heads": 0, "model.kv_heads": 0, "model.head_dim": 0,
    "model.mlp_dim": 0, "model.softcap": -0.1, "model.value_embed_every": -1, "model.quant_group": -1,
    "model.unroll": -1, "model.loop.count": 0, "model.loop.before": -1, "model.loop.after": -1,
    "model.mhc.streams": 0, "model.mhc.iterations": 0, "model.mtp.depth": -1, "model.mtp.decay": 0.0,
    "model.filter.keep": 0.0, "model.filter.trim": -0.1, "model.filter.warmup": -1, "model.filter.decay": -0.1, "model.fp4.hadamard": -1,
    "model.fp4.outliers": -1.0, "model.fp4.estimator": 0.5, "model.window": (-1,), "model.qk_gain": 0.0,
    "model.rope_theta": 0.0, "model.embed_std": 0.0, "data.seq_len": 1, "data.batch": 0, "data.workers": -1,
    "data.prefetch": 0, "data.max_bytes": -1, "data.tokenize_workers": -1, "data.verify_every_n_examples": -1,
    "data.min_compile_rate": -0.1, "data.mix": (("a", "b", 0.0),), "opt.matrix.steps": 0, "opt.matrix.weight_decay": -0.1,
    "opt.embed.eps": 0.0, "opt.scalar.beta2": -0.1, "opt.schedule.warmup_steps": -1,
    "opt.schedule.rewarm_steps": -1, "opt.schedule.decay_fraction": -0.1, "opt.clip": -0.1,
    "opt.skip_nonfinite": -1, "opt.spike_sigmas": -0.1, "opt.schedule.cycles": 0, "opt.codes.block": 0,
    "opt.galore.rank": -1, "opt.galore.update_gap": 0, "opt.galore.scale": -0.1, "opt.galore.min_dim": 0,
    "opt.galore.oversampling": -1, "opt.galore.power_iterations": -1, "opt.foam.level": -1, "opt.fire.steps": (-1,), "train.steps": 0, "train.microbatches": 0, "train.loss_chunk": 0,
    "ckpt.every_steps": -1, "ckpt.every_minutes": -0.1, "ckpt.keep_last": 0, "ckpt.keep_every_steps": -1,
    "ckpt.min_free_gb": -0.1, "eval.every_steps": -1, "eval.batches": -1, "eval.sample_tokens": -1,
    "log.every_steps": 0, "log.min_entropy": -0.1, "log.max_grad_norm": -0.1, "log.prometheus_port": -1,
    "infer.max_tokens": 0, "infer.temperature": -0.1, "infer.top_k": -1, "infer.capacity": 1,
    "train.check_replicas_steps": -1, "train.stall_seconds": -0.1,
    "infer.exit_quantile": -0.1, "infer.draft_tokens": -1, "infer.draft_loops": -1, "mesh.data": 0, "mesh.fsdp": 0, "mesh.tensor": 0,
}  # fmt: skip


@pytest.mark.parametrize("key", TOO_SMALL)
def test_lower_bounds_name_their_key(key):
    with pytest.raises(ConfigError) as caught:
        resolve(with_(**{key.replace(".", "__"): TOO_SMALL[key]}))
    message = str(caught.value)
    assert key in message and any(word in message for word in ("at least", "positive", "must be")), message


def test_derived_sizes():
    assert [config.padded_vocab(config.ModelConfig(vocab_size=n)) for n in (2, 128, 129)] == [128, 128, 256]
    assert config.value_layers(config.ModelConfig(layers=5, value_embed_every=2)) == (0, 2, 4)
    assert config.value_layers(config.ModelConfig(layers=4, value_embed_every=3)) == (0, 3)
    assert config.value_layers(config.ModelConfig()) == ()


def test_defaults_admit_no_unknown_key():
    settings = defaults()
    for act in (lambda: settings.model.update(dimm=3), lambda: setattr(settings, "modle", 3)):
        with pytest.raises((KeyError, AttributeError)):
            act()


def test_keys_and_their_types():
    keys = config.all_keys()
    assert keys["model.loop.count"] is int and keys["model.window"] == tuple[int, ...]
    assert all(key.count(".") <= 2 for key in keys)
    assert set(keys) == {
        line.split("=")[0].removeprefix("--config.") for line in config.describe().splitlines()
    }


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("model.dimm", "model.dim"), ("opt.matrix.learning_rate", ""), ("trian.steps", "train.steps"),
        ("matrix.lr", "opt.matrix.lr"), ("every_step", "every_steps"), ("qqq", ""),
    ],
)  # fmt: skip
def test_the_nearest_key(typed, meant):
    suggestion = config.nearest_key(typed)
    assert (meant in suggestion) if meant else True
    assert suggestion == "" or suggestion.split("'")[1] in config.all_keys()


@hypothesis.given(
    st.builds(
        config.ModelConfig,
        layers=st.integers(1, 9), window=st.lists(st.integers(0, 64), max_size=3).map(tuple),
        softcap=st.floats(0, 100), tied=st.booleans(), dtype=st.sampled_from(("auto", "float32")),
    )
)  # fmt: skip
def test_any_valid_config_survives_json(model):
    cfg = dataclasses.replace(config.Config(), model=model)
    assert resolve(json.loads(json.dumps(config.to_dict(cfg)))) == cfg
    assert resolve(config.from_json(json.loads(json.dumps(config.to_dict(cfg))))) == cfg


def test_json_may_be_partial_and_unknown_keys_are_named():
    assert resolve(config.from_json({})) == config.Config()
    part = resolve(config.from_json({"opt": {"clip": 2}, "model": {"window": [4, 0]}}))
    assert (part.opt.clip, part.model.window, part.seed) == (2.0, (4, 0), 0)
    with pytest.raises(ConfigError, match=r"no key 'opt.clipp'. Did you mean 'opt.clip'\?"):
        resolve(config.from_json({"opt": {"clipp": 2}}))


@pytest.mark.parametrize(
    ("arg", "got"),
    [("", (1, "a", 0.5)), ("n=3", (3, "a", 0.5)), ("n=3,s=x=y,f=2", (3, "x=y", 2.0)), (",", (1, "a", 0.5))],
)
def test_config_arguments(arg, got):
    assert config.parse_arg("on=false", on=True).on is False  # bool("false") is True
    made = config.parse_arg(arg, n=1, s="a", f=0.5)
    assert (made.n, made.s, made.f) == got


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("m=3", "config argument 'm=3': expected key=value"),
        ("n", "config argument 'n': expected key=value"),
        ("n=x", "config argument 'n': expected int, got 'x'"),
    ],
)
def test_wrong_config_arguments(arg, message):
    with pytest.raises(ConfigError) as caught:
        config.parse_arg(arg, n=1)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_resolve(name):
    settings = defaults()
    settings.model.update(BLOCKS[name])
    settings.model.quant = "ternary"
    assert resolve(settings).model.mlp == BLOCKS[name]["mlp"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__dimm": 3}, "no key 'model.dimm'. Did you mean 'model.dim'?"),
        ({"model__dim": "3"}, "'model.dim' must be int, got '3' (str)"),
        ({"model__dim": True}, "'model.dim' must be int, got True (bool)"),
        ({"opt__clip": float("nan")}, "'opt.clip' must be finite"),
        ({"model__dim": 0}, "'model.dim' must be at least 1, got 0"),
        ({"model__heads": 6}, "'model.heads' = 6 must be a multiple of 'model.kv_heads' = 4"),
        ({"model__head_dim": 15}, "must be even"),
        ({"model__mlp": "swigl"}, "'model.mlp' = 'swigl' is unknown. Did you mean 'swiglu'?"),
        ({"model__window": 8}, "'model.window' must be a tuple, got 8"),
        ({"model__window": (8, "a")}, "'model.window' must be int, got 'a'"),
        ({"model__qk_gain": 1.2}, "'model.qk_gain' has no effect because model.qk_norm is 'none'"),
        ({"model__quant_group": 8}, "'model.quant_group' has no effect because model.quant is 'full'"),
        ({"model__quant": "nvfp4", "model__quant_group": 8}, "has no effect because model.quant is 'nvfp4'"),
        ({"model__quant": "nvfp"}, "'model.quant' = 'nvfp' is unknown. Did you mean 'nvfp4'?"),
        ({"model__fp4__hadamard": 32}, "'model.fp4.hadamard' has no effect because model.quant is 'full'"),
        (
            {"model__quant": "fp4_rows", "model__fp4__signs": "none"},
            "'model.fp4.signs' has no effect because model.quant is 'fp4_rows'",
        ),
        (
            {"model__quant": "nvfp4", "model__fp4__outliers": 0.1},
            "'model.fp4.outliers' has no effect because model.quant is 'nvfp4'",
        ),
        (
            {"model__quant": "nvfp4", "model__fp4__outside": "same"},
            "'model.fp4.outside' has no effect because model.loop.before and model.loop.after are 0",
        ),
        ({"model__quant": "fp4_rows", "model__fp4__outliers": 1.0}, "must be in [0, 1), got 1.0"),
        (
            {"model__quant": "ternary", "model__fp4__stochastic": "none"},
            "'model.fp4.stochastic' has no effect because model.quant is 'ternary'",
        ),
        (
            {"model__quant": "nvfp4", "model__dim": 24},
            "'model.dim' = 24 must be a multiple of 'the block of nvfp4' = 16",
        ),
        (
            {"model__quant": "mxfp4_grad", "model__head_dim": 4},
            "= 16 must be a multiple of 'the block of mxfp4' = 32",
        ),
        (
            {"model__quant": "mxfp4_grad", "model__kv_heads": 1, "model__head_dim": 16},
            "'model.kv_heads * head_dim' = 16 must be a multiple of 'the block of mxfp4' = 32",
        ),
        (
            {
                "model__quant": "nvfp4_grad",
                "model__mlp_dim": 32,
                "model__fp4": {"hadamard": 64, "rotated": "both"},
            },
            "'model.mlp_dim' = 32 must be a multiple of 'model.fp4.hadamard' = 64",
        ),
        (
            {"model__quant": "nvfp4", "model__fp4__hadamard": 24},
            "must be 0 or a power of 2 up to 256, got 24",
        ),
        (
            {"model__quant": "nvfp4", "model__fp4__hadamard": 512},
            "must be 0 or a power of 2 up to 256, got 512",
        ),
        (
            {"model__quant": "nvfp4", "model__fp4__stochastic": "grad"},
            "'model.fp4.stochastic' = 'grad' is unknown",
        ),
        (
            {"model__quant": "nvfp4", "model__fp4__rotated": "dgrad"},
            "'model.fp4.rotated' = 'dgrad' is unknown",
        ),
        ({"model__quant": "nvfp4", "model__fp4__signs": "all"}, "'model.fp4.signs' = 'all' is unknown"),
        ({"model__quant": "nvfp4", "model__fp4__operands": "all"}, "'model.fp4.operands' = 'all' is unknown"),
        ({"model__quant": "nvfp4", "model__fp4__products": "all"}, "'model.fp4.products' = 'all' is unknown"),
        ({"model__quant": "nvfp4", "model__fp4__impl": "palas"}, "Did you mean 'pallas'?"),
        ({"model__fp4__impl": "reference"}, "'model.fp4.impl' has no effect because model.quant is 'full'"),
        (
            {"model__quant": "nvfp4", "model__fp4__rotated": "both"},
            "would undo the codes of model.quant = 'nvfp4'",
        ),
        (
            {"model__quant": "ternary_mxfp4", "model__fp4__rotated": "both"},
            "would undo the codes of model.quant = 'ternary_mxfp4'",
        ),
        (
            {"model__quant": "ternary_mxfp4", "model__quant_group": 8},
            "'model.quant_group' must be 0 with model.quant = 'ternary_mxfp4', got 8",
        ),
        (
            {"model__quant": "nvfp4", "model__fp4": {"stochastic": "both", "operands": "gradient"}},
            "'model.fp4.stochastic' = 'both' needs model.fp4.operands = 'both'",
        ),
        (
            {"model__quant": "nvfp4", "model__fp4": {"hadamard": 0, "signs": "none"}},
            "'model.fp4.signs' has no effect because model.fp4.hadamard is 0",
        ),
        (
            {"model__quant": "nvfp4", "model__fp4": {"products": "dgrad", "hadamard": 32}},
            "'model.fp4.hadamard' has no effect because model.fp4.products is 'dgrad'",
        ),
        (
            {"model__quant": "nvfp4", "model__fp4": {"products": "dgrad", "operands": "gradient"}},
            "'model.fp4.operands' has no effect because model.quant = 'nvfp4' has weights in codes",
        ),
        ({"model__loop": {"count": 1, "norm": True}}, "has no effect because model.loop.count is 1"),
        ({"model__loop__inject": "add"}, "'model.loop.inject' has no effect because model.loop.count is 1"),
        ({"model__loop__gate": "shared"}, "'model.loop.gate' has no effect because model.loop.count is 1"),
        ({"model__loop__gate": "share"}, "Did you mean 'shared'?"),
        ({"model__loop__inject": "ad"}, "Did you mean 'add'?"),
        (
            {"model__loop": {"count": 2, "gate": "shared"}},
            "'model.loop.gate' = 'shared' needs the term 'exit' or 'gate' in train.loss",
        ),
        ({"train__loss": (("exit", 1.0),)}, "the term 'exit', which needs an exit gate in model.loop.gate"),
        (
            {"train__loss": (("gate", 1.0), ("z", 0.1)), "model__loop": {"count": 2, "gate": "shared"}},
            "which freezes all other weights, and so leaves nothing to learn for 'z'",
        ),
        (
            {"train__loss": (("gate", 1.0),), "model__loop": {"count": 2, "gate": "per_loop"}},
            "never trains the first loop's bias of model.loop.gate = 'per_loop'",
        ),
        (
            {"model__loop__readout": "sampled"},
            "'model.loop.readout' has no effect because model.loop.gate is",
        ),
        (
            {
                "train__loss": (("gate", 1.0),),
                "model__loop": {"count": 2, "gate": "shared", "readout": "sampled"},
            },
            "'model.loop.readout' has no effect because the term 'gate' in train.loss reads all loops",
        ),
        ({"infer__loop_cache": "last"}, "'infer.loop_cache' has no effect because model.loop.count is 1"),
        ({"infer__loop_cache": "lst"}, "'infer.loop_cache' = 'lst' is unknown. Did you mean 'last'?"),
        ({"model__filter__warmup": 3}, "'model.filter.warmup' has no effect because model.filter.keep is 1"),
        (
            {"model__filter": {"keep": 0.5, "score": "random", "decay": 0.5}},
            "'model.filter.decay' has no effect because model.filter.score is 'random'",
        ),
        (
            {"model__filter": {"keep": 0.5, "score": "random", "warmup": 300}},
            "'model.filter.warmup' = 300 must be less than 'train.steps' = 300",
        ),
        ({"model__filter": {"keep": 0.5, "score": "emaa"}}, "'model.filter.score' = 'emaa' is unknown"),
        ({"infer__exit_quantile": 0.5}, "'infer.exit_quantile' has no effect because model.loop.gate is"),
        ({"infer__exit_quantile": 1.5}, "'infer.exit_quantile' must be in [0, 1], got 1.5"),
        (
            {"model__mhc__iterations": 5},
            "'model.mhc.iterations' has no effect because model.mhc.streams is 1",
        ),
        ({"model__mhc__dynamic": False}, "'model.mhc.dynamic' has no effect because model.mhc.streams is 1"),
        (
            {"model__mhc__form": "permutation"},
            "'model.mhc.form' has no effect because model.mhc.streams is 1",
        ),
        ({"model__mhc__form": "permutations"}, "Did you mean 'permutation'?"),
        (
            {"model__mhc": {"streams": 2, "form": "permutation", "iterations": 5}},
            "'model.mhc.iterations' has no effect because model.mhc.form is 'permutation'",
        ),
        ({"model__mhc": {"streams": 5, "form": "permutation"}}, "'model.mhc.streams' must be at most 4"),
        ({"model__unroll": 3}, "'model.layers' = 4 must be a multiple of 'model.unroll' = 3"),
        ({"model__unroll": 1, "model__window": (4, 0)}, "must be a multiple of 2, the period"),
        ({"model__norm_eps": 0.0}, "'model.norm_eps' must be positive"),
        ({"data__source": ""}, "'data.source' is empty"),
        ({"data__val_percent": 0}, "must be in 1..50"),
        ({"opt__embed__name": "muon"}, "works on matrices only"),
        ({"opt__head__beta1": 1.0}, "must be in [0, 1)"),
        ({"opt__matrix__coefficients": "jordam"}, "Did you mean 'jordan'?"),
        ({"opt__schedule__kind": "wds"}, "Did you mean 'wsd'?"),
        ({"opt__schedule__cycles": 2}, "no effect because opt.schedule.kind is 'wsd'"),
        ({"opt__head__name": "normuon"}, "works on matrices only"),
        ({"opt__matrix__ns_dtype": "float16"}, "Did you mean 'bfloat16'?"),
        ({"opt__matrix__state_bits": 4}, "must be 8 or 32, got 4"),
        ({"opt__codes__block": 64}, "no effect because no group has state_bits = 8"),
        ({"opt__codes__impl": "reference"}, "no effect because no group has state_bits = 8"),
        ({"opt__codes__impl": "palas"}, "Did you mean 'pallas'?"),
        ({"opt__matrix__ns_impl": "triton"}, "'opt.matrix.ns_impl' = 'triton' is unknown"),
        (
            {"opt__matrix__name": "adamw", "opt__matrix__ns_impl": "reference"},
            "'opt.matrix.ns_impl' has no effect because opt.matrix.name is 'adamw'",
        ),
        ({"opt__galore__update_gap": 50}, "no effect because opt.galore.rank is 0"),
        ({"opt__galore__rank": 300}, "projects nothing: the matrices' shorter sides are 256, 256, 256"),
        ({"opt__galore__rank": 64, "opt__galore__projector_bits": 4}, "must be 8, 16 or 32, got 4"),
        ({"opt__galore__rank": 64, "opt__galore__momentum": "rotat"}, "Did you mean 'rotate'?"),
        (
            {"opt__galore__rank": 64, "opt__galore__momentum": "rotate", "opt__matrix__state_bits": 8},
            "needs plain float32 moments",
        ),
        (
            {"opt__galore__rank": 64, "opt__galore__method": "exact", "opt__galore__oversampling": 2},
            "no effect because opt.galore.method is 'exact'",
        ),
        ({"opt__foam__second_moment": "mean_square"}, "no effect because opt.foam.level is 0"),
        (
            {"opt__foam__level": 1, "opt__foam__second_moment": "mean_square"},
            "no effect because opt.matrix.name is 'muon'",
        ),
        ({"opt__foam__level": 1, "opt__matrix__name": "normuon"}, "cannot fold NorMuon's state"),
        ({"opt__fire__scale": "unit"}, "no effect because opt.fire.steps is ()"),
        ({"opt__schedule__warmup_steps": 1000}, "must be less than 'train.steps'"),
        ({"opt__schedule__decay_fraction": 0.99}, "exceed the run; lower one"),
        ({"train__microbatches": 3}, "'data.batch' = 8 must be a multiple of 'train.microbatches' = 3"),
        ({"train__loss": (("next_tokn", 1.0),)}, "Did you mean 'next_token'?"),
        ({"train__loss": (("z", 0.0),)}, "needs a term with a weight"),
        ({"train__loss": (("z", ((0, 0.0), (9, 0.0))),)}, "needs a term with a weight"),
        ({"train__loss": (("z", ((0, 0.1),)),)}, "a number, or at least two points (step, weight)"),
        ({"train__loss": (("z", ((9, 0.1), (9, 0.2))),)}, "with growing steps from 0 on, got ((9, 0.1), (9"),
        ({"train__loss": (("z", ((-1, 0.1), (9, 0.2))),)}, "with growing steps from 0 on"),
        ({"train__loss": (("z", ((300, 0.1), (900, 0.2))),)}, "which train.steps = 300 never reaches"),
        ({"train__loss": (("z", ((0.5, 0.1), (9, 0.2))),)}, "'train.loss' must be int, got 0.5 (float)"),
        ({"train__loss": (("z", "0.1"),)}, "'train.loss' must be float, got '0.1'"),
        ({"train__loss": (("mtp", 0.2),)}, "has the term 'mtp', which needs model.mtp.depth"),
        ({"model__mtp__depth": 2}, "'model.mtp.depth' = 2 needs the term 'mtp' in train.loss"),
        (
            {"model__mtp__depth": 2, "train__loss": (("next_token", 1.0), ("mtp", 0.0))},
            "needs the term 'mtp' in train.loss with a positive weight",
        ),
        (
            {"model__mtp__depth": 8, "data__seq_len": 8, "train__loss": (("mtp", 1.0),)},
            "'model.mtp.depth' = 8 must be less than 'data.seq_len' = 8",
        ),
        ({"model__mtp__kind": "parallel"}, "'model.mtp.kind' has no effect because model.mtp.depth is 0"),
        ({"model__mtp__kind": "paralel"}, "Did you mean 'parallel'?"),
        ({"model__mtp__depth": 1, "model__mtp__decay": 0.9}, "no effect because model.mtp.depth is 1"),
        ({"model__mtp__depth": 2, "model__mtp__decay": 1.5}, "'model.mtp.decay' must be in (0, 1], got 1.5"),
        ({"model__filter__keep": 1.5}, "'model.filter.keep' must be in (0, 1], got 1.5"),
        ({"model__filter__score": "los"}, "Did you mean 'loss'?"),
        (
            {"model__filter__score": "loss"},
            "'model.filter.score' has no effect because model.filter.keep is 1",
        ),
        ({"model__filter__keep": 0.5}, "'model.filter.score' = 'excess' with model.filter.keep = 0.5 needs"),
        ({"data__reference": "a"}, "'data.reference' has no effect because model.filter.keep is 1"),
        (
            {"data__reference": "a", "model__filter": {"keep": 0.5, "score": "random"}},
            "'data.reference' has no effect because model.filter.score is 'random'",
        ),
        (
            {"model__filter": {"keep": 0.5, "score": "middle", "trim": 0.1}},
            "'model.filter.trim' has no effect because model.filter.score is 'middle'",
        ),
        ({"model__filter": {"keep": 0.9, "trim": 0.2}}, "must leave the share that is kept"),
        (
            {"model__filter": {"keep": 0.5, "score": "random"}, "model__remat": "block"},
            "'model.remat' must be 'none' with model.filter.keep below 1",
        ),
        (
            {"model__filter": {"keep": 0.5, "score": "random"}, "model__quant": "nvfp4"},
            "'model.filter.keep' must be 1 with model.quant = 'nvfp4'",
        ),
        (
            {
                "model__loop": {"count": 2, "gate": "shared"},
                "train__loss": (("gate", 1.0),),
                "opt__matrix__weight_decay": 0.1,
            },
            "but 'opt.matrix.weight_decay' would change them",
        ),
        (
            {
                "model__filter": {"keep": 0.5, "score": "random"},
                "model__loop": {"count": 2, "gate": "shared"},
                "train__loss": (("exit", 1.0),),
            },
            "'model.filter.keep' must be 1 with the term 'exit' in train.loss",
        ),
        ({"train__loss": (("z",),)}, "must have 2 entries"),
        ({"data__mix": (("a", "x", 1.0), ("a", "y", 1.0))}, "'data.mix' has two parts named 'a'"),
        ({"data__mix": (("A b", "x", 1.0),)}, "'data.mix' has a part named 'A b'"),
        ({"data__mix": (("a", "", 1.0),)}, "'data.mix' has no source for 'a'"),
        ({"data__mix": (("a", "x", -1.0),)}, "'data.mix' needs a positive weight for 'a', got -1.0"),
        ({"data__mix": (("a", "x", 1.0), ("b", "y", 1e-5))}, "less than one row in 10000"),
        (
            {"data__mix": (("a", "x", 1.0),), "data__source": "rust"},
            "'data.source' has no effect because data.mix names the sources",
        ),
        (
            {
                "data__mix": (("a", "x", 1.0),),
                "data__reference": "r",
                "model__filter": {"keep": 0.5, "score": "excess"},
            },
            "'data.reference' must be empty with data.mix",
        ),
        ({"data__min_compile_rate": 0.5}, "has no effect because data.verify_every_n_examples is 0"),
        ({"data__row_language": "rust"}, "has no effect because data.verify_every_n_examples is 0"),
        ({"data__row_language": "c"}, "'data.row_language' = 'c' is unknown"),
        ({"data__min_compile_rate": 1.5}, "'data.min_compile_rate' must be in [0, 1], got 1.5"),
        (
            {"data__source": "tokens:a.u16", "data__verify_every_n_examples": 1},
            "token file, which has no text",
        ),
        ({"data__kind": "chats"}, "'data.kind' = 'chats' is unknown. Did you mean 'chat'?"),
        (
            {"data__kind": "chat", "data__verify_every_n_examples": 2},
            "'data.verify_every_n_examples' must be 0 with data.kind = 'chat'",
        ),
        (
            {"data__kind": "chat", "data__reference": "r", "model__filter": {"keep": 0.5, "score": "excess"}},
            "'data.reference' must be empty with data.kind = 'chat', whose rows are conversations, got 'r'",
        ),
        (
            {"data__kind": "chat", "data__source": "tokens:a.u16"},
            "'tokens:a.u16' is a token file, and has no conversations",
        ),
        (
            {"data__kind": "chat", "data__mix": (("a", "x", 1.0), ("b", "tokens:b.u16", 1.0))},
            "'tokens:b.u16' is a token file, and has no conversations",
        ),
        ({"data__pool__order": "declare"}, "Did you mean 'declared'?"),
        ({"data__pool__window": 8}, "'data.pool.window' has no effect because data.pool.order is 'strict'"),
        ({"data__pool__replay": "a"}, "'data.pool.replay' has no effect because data.pool.order is 'strict'"),
        (
            {"data__pool": {"order": "declared", "max_late": 9}},
            "'data.pool.max_late' has no effect because data.pool.order is 'declared'",
        ),
        (
            {"data__pool": {"order": "completion", "delay": 9}},
            "'data.pool.delay' has no effect because data.pool.order is 'completion'",
        ),
        (
            {"data__pool": {"order": "completion", "replay": "a", "max_late": 9}},
            "'data.pool.max_late' has no effect because data.pool.replay has the order",
        ),
        ({"data__pool": {"order": "declared", "delay": 33}}, "'data.pool.delay' must be in 1..32"),
        ({"data__pool": {"order": "completion", "max_late": 40000}}, "must be in 1..32767"),
        ({"data__pool": {"order": "declared", "window": 1}}, "'data.pool.window' must be at least 2, got 1"),
        (
            {"data__pool": {"order": "completion"}, "mesh__tensor": 2},
            "'data.pool.order' must not be 'completion' with mesh.tensor = 2",
        ),
        ({"data__pool": {"order": "declared"}, "data__workers": 0}, "'data.workers' must be at least 1"),
        ({"mesh__data": 16}, "must be a multiple of 'mesh.data * mesh.fsdp' = 16"),
        ({"mesh__reduce_dtype": "bfloat16"}, "no effect because mesh.data and mesh.fsdp are 1"),
        ({"mesh": {"data": 2, "reduce_dtype": "float16"}}, "Did you mean 'bfloat16'?"),
        (
            {"mesh": {"data": 2, "tensor": 2, "reduce_dtype": "bfloat16"}},
            "mesh.tensor leaves the exchange to",
        ),
        ({"mesh__tensor": 7}, "must be a multiple of 'mesh.tensor' = 7"),
        ({"opt__matrix__eps": 1e-3}, "'opt.matrix.eps' has no effect because opt.matrix.name is 'muon'"),
        ({"opt__embed__cautious": True}, "has no effect because opt.embed.weight_decay is 0"),
        ({"opt__schedule__kind": "cosine", "opt__schedule__decay_shape": "sqrt"}, "kind is 'cosine'"),
        ({"name": "a b"}, "'name' must be a word"),
        ({"seed": -1}, "'seed' must be in"),
        ({"log__format": "jsn"}, "'log.format' = 'jsn' is unknown. Did you mean 'json'?"),
        ({"log__profile_steps": (3,)}, "'log.profile_steps' must be (first, last) in 2..train.steps = 300"),
        ({"log__profile_steps": (1, 3)}, "(step 1 compiles), got (1, 3)"),
        ({"log__profile_steps": (5, 4)}, "got (5, 4)"),
        ({"log__profile_steps": (299, 301)}, "got (299, 301)"),
        ({"log__prometheus_port": 65536}, "'log.prometheus_port' must be in 0..65535, got 65536"),
        ({"log__otlp": "localhost:4318"}, "'log.otlp' must be an address such as http://127.0.0.1:4318"),
        ({"ckpt__verify": "md5"}, "'ckpt.verify' = 'md5' is unknown"),
        ({"infer__top_p": 0.0}, "'infer.top_p' must be in (0, 1]"),
        ({"infer__weights": "pakced"}, "'infer.weights' = 'pakced' is unknown"),
        (
            {"infer__weights": "packed"},
            "needs ternary, NVFP4 or MXFP4 weights in the forward pass, but model.quant is 'full'",
        ),
        (
            {"infer__weights": "codes"},
            "'infer.weights' = 'codes' needs weights in low bits in the forward pass",
        ),
        ({"infer__weights": "packed", "model__quant": "mxfp4_grad"}, "but model.quant is 'mxfp4_grad'"),
        ({"infer__weights": "packed", "model__quant": "fp8"}, "but model.quant is 'fp8'"),
        (
            {"infer__impl": "reference"},
            "'infer.impl' has no effect because infer.weights is 'auto', not 'packed'",
        ),
        ({"infer__draft_loops": 1}, "'infer.draft_loops' has no effect because infer.draft_tokens is 0"),
        ({"infer__draft_tokens": 2}, "'infer.draft_tokens' must be at most model.mtp.depth = 0, got 2"),
        ({"infer__draft_tokens": 2, "infer__draft_loops": 1}, "'infer.draft_loops' must be below"),
        ({"infer__draft_tokens": 17, "infer__draft_loops": 1, "model__loop__count": 2}, "at most 16, got 17"),
        (
            {
                "infer__draft_tokens": 2,
                "infer__draft_loops": 1,
                "model__loop__count": 2,
                "infer__loop_cache": "last",
            },
            "'infer.loop_cache' must be 'all' with infer.draft_tokens",
        ),
        (
            {
                "infer__draft_tokens": 2,
                "infer__draft_loops": 1,
                "model__loop__count": 2,
                "model__loop__gate": "shared",
                "infer__exit_quantile": 0.5,
                "train__loss": (("exit", 1.0),),
            },
            "'infer.exit_quantile' must be 1 with infer.draft_tokens",
        ),
        ({"train__check_replicas_steps": 5}, "has no effect because the mesh is one device"),
        (
            {"train": {"stall_exit": True, "stall_seconds": 0.0}},
            "'train.stall_exit' has no effect because train.stall_seconds is 0",
        ),
        ({"opt__head__lr": 0.0}, "'opt.head.lr' must be positive, got 0.0"),
        ({"opt__schedule__floor": 1.5}, "'opt.schedule.floor' must be in [0, 1], got 1.5"),
        ({"model": 3}, "'model' must be a group of settings, got 3"),
    ],
)
def test_every_mistake_has_its_sentence(changes, message):
    with pytest.raises(ConfigError) as caught:
        resolve(with_(**changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_selecting_by_the_own_loss_warns():
    with pytest.warns(UserWarning, match="'loss' keeps noise"):
        resolve(with_(model__filter={"keep": 0.5, "score": "loss"}))


LARGE = ("auto", "config_a", "config_b", "config_c", "nano_125m")  # traced in the slow job


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in LARGE else ()) for n in sorted(cli._configs())]
)
def test_every_config_file_resolves_and_traces(name):
    from nanochat_jax.train import program

    assert "parameters:" in program.dry_run(cli.get_config(name))


# --- every key changes something

SMALL = {
    "model__vocab_size": 128, "model__dim": 32, "model__layers": 2, "model__heads": 2, "model__kv_heads": 2,
    "model__head_dim": 16, "model__mlp_dim": 32, "data__seq_len": 16, "data__batch": 4, "train__steps": 10,
    "opt__schedule__warmup_steps": 2,
}  # fmt: skip
# Another value for each key that the traced step depends on (with what it needs to be allowed).
STEP = {
    "model.vocab_size": 100, "model.dim": 64, "model.layers": 3, "model.heads": 4, "model.kv_heads": 1,
    "model.head_dim": 8, "model.mlp": "relu2", "model.mlp_dim": 64, "model.norm": "weightless",
    "model.norm_eps": 1e-5, "model.sub_norm": True, "model.embed_norm": True, "model.qk_norm": "before_rope",
    "model.qk_gain": (1.5, {"model.qk_norm": "after_rope"}), "model.rope_theta": 500.0, "model.softcap": 9.0,
    "model.tied": True, "model.window": (4,), "model.value_embed_every": 1, "model.residual_scalars": True,
    "model.x0_scalars": True, "model.mhc.streams": 2, "model.mhc.form": ("permutation", {"model.mhc.streams": 2}),
    "model.mhc.iterations": (3, {"model.mhc.streams": 2}), "model.mhc.dynamic": (False, {"model.mhc.streams": 2}),
    "model.loop.count": 2, "model.loop.norm": (True, {"model.loop.count": 2}),
    "model.loop.before": 1, "model.loop.after": 1, "model.loop.inject": ("add", {"model.loop.count": 2}),
    "model.loop.gate": ("per_loop", {"model.loop.count": 3, "model.loop.gate": "shared", "train.loss": (("exit", 1.0),)}),
    "model.quant": "ternary", "model.quant_group": (8, {"model.quant": "ternary"}), "model.dtype": "bfloat16",
    "model.remat": "block", "model.unroll": 1, "data.seq_len": 8, "data.batch": 8, "opt.clip": 0.0,
    "opt.skip_nonfinite": 0, "train.microbatches": 2, "train.loss": (("next_token", 1.0), ("z", 0.1)),
    "train.loss_chunk": 4, "train.steps": 20, "opt.schedule.kind": "cosine", "opt.schedule.warmup_steps": 3,
    "opt.schedule.decay_fraction": 0.2, "opt.schedule.decay_shape": "cosine", "opt.schedule.floor": 0.3,
    "opt.decay_to_zero": (True, {"opt.matrix.weight_decay": 0.1}), "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2,
    "mesh.reduce_dtype": ("bfloat16", {"mesh.data": 2}),
    "opt.matrix.name": "adamw", "opt.matrix.lr": 0.5, "opt.matrix.weight_decay": 0.1, "opt.matrix.beta1": 0.5,
    "opt.matrix.steps": 3, "opt.matrix.coefficients": "jordan", "opt.matrix.scale": "rms", "opt.matrix.ns_dtype": "bfloat16",
    "opt.spike_sigmas": 6.0, "opt.schedule.cycles": (2, {"opt.schedule.kind": "cosine"}),
    "opt.matrix.cautious": (True, {"opt.matrix.weight_decay": 0.1}),
    "opt.matrix.beta2": (0.5, {"opt.matrix.name": "adamw"}), "opt.matrix.eps": (1e-3, {"opt.matrix.name": "adamw"}),
    "opt.matrix.state_bits": (8, {"model.dim": 64, "model.mlp_dim": 64}), "opt.embed.state_bits": 8,
    "opt.head.state_bits": 8, "opt.foam.level": 1,
    "opt.foam.second_moment": ("mean_square", {"opt.foam.level": 1, "opt.matrix.name": "adamw"}),
    "opt.fire.steps": (3,), "opt.fire.scale": ("fan", {"opt.fire.steps": (3,)}),
    "opt.galore.min_dim": (32, {"opt.galore.rank": 4, "opt.galore.min_dim": 16, "model.mlp_dim": 16}),
}  # fmt: skip
STEP["model.loop.readout"] = (
    "sampled", {"model.loop.count": 3, "model.loop.gate": "shared", "train.loss": (("exit", 1.0),)},
)  # fmt: skip
for _key, _value in {"depth": 3, "kind": "parallel", "decay": 0.9}.items():
    _loss = (("next_token", 1.0), ("mtp", 0.2))
    STEP[f"model.mtp.{_key}"] = (_value, {"model.mtp.depth": 2, "train.loss": _loss})
STEP["model.filter.keep"] = (0.5, {"model.filter.keep": 0.75, "model.filter.score": "random"})
STEP["model.filter.score"] = ("middle", {"model.filter.keep": 0.5, "model.filter.score": "random"})
STEP["model.filter.warmup"] = (3, {"model.filter.keep": 0.5, "model.filter.score": "random"})
STEP["model.filter.decay"] = (0.9, {"model.filter.keep": 0.5, "model.filter.score": "ema"})
STEP["model.filter.trim"] = (0.2, {"model.filter.keep": 0.5, "data.reference": "losses"})
for _key, _value in {
    "rank": 8, "update_gap": 100, "scale": 2.0, "method": "exact", "oversampling": 2, "power_iterations": 0,
    "projector_bits": 16, "momentum": "keep",
}.items():  # fmt: skip
    STEP[f"opt.galore.{_key}"] = (_value, {"opt.galore.rank": 4, "opt.galore.min_dim": 16})
for _key, _value in {
    "stochastic": "none", "hadamard": 32, "rotated": "both", "signs": "random", "operands": "gradient",
    "products": "wgrad",
}.items():  # fmt: skip
    STEP[f"model.fp4.{_key}"] = (_value, {"model.quant": "nvfp4_grad"})
STEP |= {
    f"model.fp4.{_key}": (_value, {"model.quant": "fp4_rows"})
    for _key, _value in {"outliers": 0.1, "estimator": 3.0}.items()
}
STEP["model.fp4.outside"] = ("same", {"model.quant": "fp8", "model.loop.before": 1})
for _key, _value in {
    "block": 16, "momentum": "dynamic", "rounding": "stochastic", "scales": "bfloat16"
}.items():  # fmt: skip
    STEP[f"opt.codes.{_key}"] = (_value, {"opt.embed.state_bits": 8})
for _group in ("embed", "head", "scalar"):
    STEP |= {
        f"opt.{_group}.name": "lion", f"opt.{_group}.lr": 0.5, f"opt.{_group}.weight_decay": 0.1,
        f"opt.{_group}.beta1": 0.5, f"opt.{_group}.beta2": 0.5, f"opt.{_group}.eps": 1e-3,
        f"opt.{_group}.cautious": (True, {f"opt.{_group}.weight_decay": 0.1}),
    }  # fmt: skip
# Keys whose effect is outside the step, and the test that shows it.
ELSEWHERE = {
    "seed": "test_system (same seed)",
    "name": "test_system (workdir)", "workdir": "cli.workdir", "model.embed_std": "initial values, below",
    "data.kind": "test_turns", "data.source": "test_sources", "data.tokenizer": "test_shards", "data.isolate": "test_packing",
    "data.shuffle": "test_pipeline", "data.val_percent": "test_shards", "data.max_bytes": "test_sources",
    "data.mix": "test_mixture", "data.tokenize_workers": "test_encode",
    "data.verify_every_n_examples": "test_compiles", "data.min_compile_rate": "test_compiles",
    "data.row_language": "test_compiles", "data.pool.order": "test_pool", "data.pool.window": "test_pool",
    "data.pool.delay": "test_pool", "data.pool.max_late": "test_pool", "data.pool.replay": "test_pool",
    "data.text_key": "test_sources", "data.reference": "test_reference", "data.workers": "test_pipeline", "data.prefetch": "test_pipeline",
    "opt.schedule.rewarm_steps": "test_system (extension)", "ckpt.every_steps": "test_checkpoint",
    "ckpt.every_minutes": "test_checkpoint", "ckpt.keep_last": "test_checkpoint",
    "ckpt.keep_every_steps": "test_checkpoint", "ckpt.init_from": "test_system", "ckpt.verify": "test_checkpoint",
    "ckpt.min_free_gb": "test_checkpoint", "eval.every_steps": "test_system", "eval.batches": "test_pipeline (limit)",
    "eval.prompt": "test_inference (command)", "eval.sample_tokens": "test_system", "log.every_steps": "test_system",
    "log.tensorboard": "test_writers", "log.format": "test_console", "log.profile_steps": "test_profile",
    "log.prometheus_port": "test_prometheus", "log.otlp": "test_trace", "log.min_entropy": "test_anomaly",
    "log.max_grad_norm": "test_anomaly",
    "infer.max_tokens": "test_inference", "infer.temperature": "test_inference",
    "infer.top_k": "test_inference", "infer.top_p": "test_inference", "infer.capacity": "test_inference",
    "infer.exit_quantile": "test_loop", "infer.loop_cache": "test_loop",
    "train.check_replicas_steps": "test_replicas", "train.stall_seconds": "test_watchdog", "train.stall_exit": "test_watchdog",
    "infer.weights": "test_pack", "infer.impl": "test_pack",
    "model.fp4.impl": "test_fp4_kernel", "opt.codes.impl": "test_int8_kernel",
    "opt.matrix.ns_impl": "test_symmetric_kernel",
    "infer.draft_tokens": "test_speculative", "infer.draft_loops": "test_speculative",
}  # fmt: skip
# Newton-Schulz settings of groups that cannot be Muon are refused (test_unread_settings_are_refused).
REFUSED = {
    f"opt.{g}.{k}"
    for g in ("embed", "head", "scalar")
    for k in ("steps", "coefficients", "scale", "ns_dtype", "ns_impl")
}
REFUSED.add("opt.scalar.state_bits")  # vectors keep float32 moments


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_unread_settings_are_refused(key):
    value = {
        "steps": 3, "coefficients": "jordan", "scale": "rms", "ns_dtype": "float32", "ns_impl": "reference",
        "state_bits": 8,
    }[key.rsplit(".", 1)[1]]  # fmt: skip
    with pytest.raises(ConfigError, match=f"'{key}' has no effect because"):
        resolve(with_(**{key.replace(".", "__"): value}))


def test_every_key_is_accounted_for():
    assert set(STEP) | set(ELSEWHERE) | REFUSED == set(config.all_keys())


def trace(changes):
    """The lowered step: constants, shapes, shardings and operations, as text."""
    from nanochat_jax.train import program

    cfg = resolve(with_(**(SMALL | {k.replace(".", "__"): v for k, v in changes.items()})))
    parts = program.Parts(cfg)
    return parts.step.lower(parts.shapes, program.batch_shapes(cfg)).as_text()


@pytest.mark.slow
def test_every_step_key_changes_the_traced_step():
    plain: dict = {}
    unread = []
    for key, value in STEP.items():
        changed, needs = value if isinstance(value, tuple) and isinstance(value[-1], dict) else (value, {})
        name = tuple(needs.items())
        if name not in plain:
            plain[name] = trace(needs)
        if trace({**needs, key: changed}) == plain[name]:
            unread.append(key)
    assert unread == []


def test_initial_embedding_follows_its_setting():
    from nanochat_jax import params
    from nanochat_jax.model import transformer

    stds = []
    for std in (0.02, 0.8):
        specs = transformer.param_specs(dataclasses.replace(config.ModelConfig(), embed_std=std))
        stds.append(float(params.init_params({"embed": specs["embed"]}, jax.random.key(0))["embed"].std()))
    np.testing.assert_allclose(stds, [0.02, 0.8], rtol=0.01)
