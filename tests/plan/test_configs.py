"""The three machines' configs have the published settings, and fit their machines."""

import pytest

from nanochat_jax import cli
from nanochat_jax.config import ConfigError, FilterConfig, MtpConfig, validate
from nanochat_jax.model import transformer
from nanochat_jax.plan import fit, memory, report
from nanochat_jax.plan.devices import DEVICES, USABLE

CARDS = {"config_a": "rtxpro6000", "config_b": "rtx4090", "config_c": "rtx4090"}
# dim, layers, heads, context, streams, GaLore rank, sequences per update, steps, warm-up, decay steps, Muon's
# rate, Lion's rate, clip, workers, prefetch, checkpoint every, kept, evaluated every
PUBLISHED = {
    "config_a": (2048, 24, 16, 8192, 4, 512, 32 * 4, 100_000, 2000, 18_000, 0.02, 1e-4, 5.0, 64, 10, 1000, 5, 5000),
    "config_b": (1536, 20, 12, 4096, 2, 256, 4 * 8, 150_000, 1000, 29_000, 0.025, 1.2e-4, 4.0, 8, 4, 2000, 3, 10_000),
    "config_c": (1792, 22, 14, 6144, 4, 384, 24 * 2, 120_000, 1500, 22_500, 0.022, 1.1e-4, 4.5, 112, 8, 1000, 5, 5000),
}  # fmt: skip
# Argument -> (unrolled, unique) billions of weights, with the streams' own beyond the names' 6.65, 3.17, 4.70
COUNTS = {"config_a": (6.65, 1.82), "config_b": (3.17, 0.91), "config_c": (4.70, 1.31)}
DENSE = {"config_a": 7.19, "config_b": 2.97, "config_c": 5.11}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    cfg = cli.get_config(f"{name}:loop")
    m, o = cfg.model, cfg.opt
    assert PUBLISHED[name] == (
        m.dim, m.layers, m.heads, cfg.data.seq_len, m.mhc.streams, o.galore.rank, cfg.data.batch, cfg.train.steps,
        o.schedule.warmup_steps, round(o.schedule.decay_fraction * cfg.train.steps), o.matrix.lr, o.embed.lr, o.clip,
        cfg.data.workers, cfg.data.prefetch, cfg.ckpt.every_steps, cfg.ckpt.keep_last, cfg.eval.every_steps,
    )  # fmt: skip
    assert o.matrix.beta1 == 0.95 and o.schedule.floor == 0.1 and m.loop.count == 4 and m.vocab_size == 50257
    for group in (o.embed, o.head, o.scalar):
        assert (group.name, group.beta1, group.beta2) == ("lion", 0.9, 0.99)
    assert {o.matrix.weight_decay, o.embed.weight_decay, o.head.weight_decay} == {0.01} and m.remat == "block"


EXIT_ENTROPY = {"config_a": 0.05, "config_b": 0.08, "config_c": 0.06}


@pytest.mark.parametrize("name", EXIT_ENTROPY)
def test_loops_learn_when_to_leave(name):
    """With the published weight of the exits' entropy; a model of one loop has no exits."""
    for argument in ("", ":loop"):
        cfg = cli.get_config(name + argument)
        assert cfg.model.loop.gate == "shared"
        assert cfg.train.loss == (("exit", 1.0), ("exit_entropy", EXIT_ENTROPY[name]))
    dense = cli.get_config(f"{name}:dense")
    assert dense.model.loop.gate == "none" and dense.train.loss == (("next_token", 1.0),)


MIX = {"config_a": (40, 30, 20, 10), "config_b": (50, 30, 15, 5), "config_c": (45, 35, 15, 5)}


@pytest.mark.parametrize("name", MIX)
def test_published_mixtures(name):
    mix = cli.get_config(name).data.mix
    assert [part for part, *_ in mix] == ["quality", "verified", "synthetic", "docs"]
    assert tuple(round(100 * weight) for *_, weight in mix) == MIX[name]
    other = cli.get_config(name, **{"data.mix": (), "data.source": "rust"})
    assert other.data.source == "rust" and not other.data.mix


@pytest.mark.parametrize("name", EXIT_ENTROPY)
def test_exits_go_with_every_other_technique(name):
    """Further tokens, streams and FP4 beside the exits; filtering, which has its own loss, in their place."""
    cfg = cli.get_config(name)
    more = {"model.mtp": MtpConfig(depth=2), "train.loss": (*cfg.train.loss, ("mtp", 0.2))}
    more |= {"model.quant": "ternary_nvfp4", "model.quant_group": 0}
    assert validate(fit.changed(cfg, more)) is None and cfg.model.mhc.streams > 1
    more |= {"model.filter": FilterConfig(0.5, "random"), "model.remat": "none"}
    with pytest.raises(ConfigError, match="learns from all"):
        validate(fit.changed(cfg, more))
    more |= {"model.loop.gate": "none", "train.loss": (("next_token", 1.0), ("mtp", 0.2))}
    assert validate(fit.changed(cfg, more)) is None


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_of_the_names(name):
    counts = transformer.counts(cli.get_config(f"{name}:loop").model)
    unrolled, unique = COUNTS[name]
    assert counts["unrolled"] == pytest.approx(unrolled * 1e9, rel=0.01)
    assert counts["unique"] == pytest.approx(unique * 1e9, rel=0.01)
    dense = transformer.counts(cli.get_config(f"{name}:dense").model)
    # config_b's table is untied in the loop and tied here, as in the counts the names come from
    assert (
        dense["unique"] == pytest.approx(DENSE[name] * 1e9, rel=0.01) and dense["unrolled"] == dense["unique"]
    )


@pytest.mark.parametrize("name", CARDS)
def test_each_fits_its_machine(name):
    cfg, card = cli.get_config(name), DEVICES[CARDS[name]]
    assert memory.predict(cfg).peak <= 0.95 * USABLE * card.memory
    record = report.plan(cfg, CARDS[name])
    assert record["fits"] and "impossible" in report.text(record)


def test_what_does_not_fit_is_said():
    record = report.plan(cli.get_config("config_c:loop"), "rtx4090")
    assert not record["fits"] and record["change"] is None and "no change" in report.text(record)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("config_a:denes", "expected loop or dense"), ("config_b:x", "expected loop or dense"),
        ("config_c:x", "expected fit, loop or dense"), ("config_c:fitloop", "expected fit, loop or dense"),
        ("nano_125m:x", "nano_125m.py takes none"), ("auto:12", "expected d<layers>"),
        ("auto:d1", "expected d<layers>"), ("auto:d12,rato=3", "expected key=value"),
    ],
)  # fmt: skip
def test_wrong_arguments(reference, message):
    with pytest.raises(ConfigError, match=f"config argument '.*': {message}"):
        cli.read_config(reference)


@pytest.mark.parametrize("depth", [2, 8, 11, 12, 13, 14, 26])
def test_the_dial(depth, capsys):
    cfg = cli.get_config(f"auto:d{depth},ratio=10")
    shown = capsys.readouterr().err
    assert cfg.model.layers == depth and cfg.model.heads * 128 == cfg.model.dim >= 64 * depth
    multiple = 128 if cfg.model.dim < 768 else 256
    assert cfg.model.dim % multiple == 0 and cfg.model.dim - 64 * depth < multiple
    assert f"up to a multiple of {multiple}" in shown
    tokens = cfg.train.steps * cfg.data.batch * cfg.data.seq_len
    matrices = depth * 12 * cfg.model.dim**2
    assert cfg.train.steps == 100 or tokens == pytest.approx(10 * matrices, rel=0.01)
    for word in ("dim", "heads", "mlp_dim", "tokens", "batch", "steps", "matrix lr", "embed lr"):
        assert word in shown
