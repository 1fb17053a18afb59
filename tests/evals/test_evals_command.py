"""The room `evals` on a run's directory: its held-out score, and losses that another run can filter by."""

import json

import jax
import numpy as np
import pytest

from nanochat_jax import checkpoint, cli, config, losses
from nanochat_jax.config import CkptConfig
from nanochat_jax.data import packing, reference, shards
from nanochat_jax.evals import __main__ as room
from nanochat_jax.inference import load
from nanochat_jax.train import program
from nanochat_jax.types import Batch


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run's directory as training leaves it, of a model with its first weights."""
    at = tmp_path_factory.mktemp("run")
    (at / "text").mkdir()
    for i in range(12):
        (at / "text" / f"{i:03}.rs").write_text(f"fn f{i}() {{ {i * 77} }} // number {i}, long enough\n" * 3)
    cfg = cli.get_config("smoke", **{
        "model.vocab_size": 300, "model.dim": 32, "model.layers": 1, "model.head_dim": 16, "model.mlp_dim": 32,
        "model.quant": "full", "data.source": at / "text", "data.tokenizer": "bytes", "data.seq_len": 32,
        "data.val_percent": 20,
    })  # fmt: skip
    parts = program.Parts(cfg)
    with checkpoint.Checkpointer(CkptConfig(), at / "ckpt") as checkpoints:
        checkpoints.save(0, parts.fresh(0), {}, wait=True)
    (at / "config.json").write_text(json.dumps(config.to_dict(cfg)))
    corpus = shards.prepare(cfg.data, cfg.model.vocab_size, at / "cache" / "tokens")
    corpus.tokenizer.save(at / "tokenizer.json")
    return at, cfg, corpus


@pytest.fixture
def call(home, monkeypatch):
    """What the command line does with its words."""
    at, _, _ = home
    monkeypatch.setenv("NANOCHAT_JAX_HOME", str(at / "cache"))
    monkeypatch.setattr(cli, "setup_runtime", lambda cfg: None)  # of the whole process

    def run(*words):
        made = cli.parse(list(words), room.FLAGS)
        return room.main(cli.load(made) if made.config_path else config.Config(), made)

    return run


def test_a_run_gets_the_score_that_training_gives(home, call, capsys):
    at, cfg, corpus = home
    assert call(f"--workdir={at}") == 0
    said = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("eval/"))
    parts = program.Parts(cfg)
    trained = program._scorer(cfg, parts, corpus)(parts.fresh(0))  # what training would have logged
    assert {name: float(value) for name, value in said.items()} == pytest.approx(trained, rel=1e-5)
    assert float(said["eval/loss"]) == pytest.approx(np.log(cfg.model.vocab_size), rel=0.05)
    assert float(said["eval/bpb"]) == pytest.approx(
        float(said["eval/loss"]) / np.log(2) * float(said["eval/tokens"]) / float(said["eval/bytes"]),
        rel=1e-4,
    )


def test_the_losses_of_a_run_are_a_reference_for_another(home, call, tmp_path):
    """Written for the rows of another config on the same corpus, and what training then reads."""
    at, cfg, corpus = home
    path, other = tmp_path / "losses", at / "other.json"
    settings = config.to_dict(cfg)
    settings["data"] |= {"seq_len": 16}
    other.write_text(json.dumps(settings))
    assert call(f"--workdir={at}", f"--config={other}", f"--reference={path}") == 0
    data = config.resolve(settings | {"data": settings["data"]}).data
    made = reference.load(type(data)(**{**vars(data), "reference": str(path)}), corpus)
    row = packing.window(corpus.train.ids, corpus.train.offsets, 1, 16, data.isolate)
    batch = Batch(**{name: jax.numpy.asarray(a)[None] for name, a in row.items()})
    nll = losses.make_token_nll(cfg.model)(load.load_params(cfg, at), batch)
    np.testing.assert_allclose(made[17:33], nll[0], atol=4e-3)  # stored in 16 bits


def test_what_is_no_run_or_has_another_tokenizer(home, call, tmp_path):
    at, cfg, _ = home
    with pytest.raises(cli.UsageError, match="is not a run"):
        call(f"--workdir={tmp_path}")
    settings = config.to_dict(cfg)
    settings["data"] |= {"tokenizer": "bpe"}
    (tmp_path / "other.json").write_text(json.dumps(settings))
    with pytest.raises(cli.UsageError, match="another tokenizer than the corpus"):
        call(f"--workdir={at}", f"--config={tmp_path / 'other.json'}")
