"""Losses of another model beside the corpus: each row gets those of its own targets, or an error."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.config import DataConfig
from nanochat_jax.data import packing, pipeline, reference, shards
from nanochat_jax.data.sources import DataError
from nanochat_jax.evals import reference as scoring

CFG = DataConfig(tokenizer="bytes", seq_len=16, batch=4, val_percent=20)


@pytest.fixture
def corpus(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:03}.rs").write_text(f"fn f{i}() {{ {i * 77} }} // number {i}, long enough\n" * 2)
    return shards.prepare(dataclasses.replace(CFG, source=str(tmp_path)), 300, tmp_path / "cache")


def test_a_row_carries_the_losses_of_its_targets(corpus, tmp_path):
    """The model of this test finds a target's loss in its id, so that a shift by one would show."""
    made = scoring.token_losses(lambda params, batch: batch.targets / params, 4.0, CFG, corpus.train)  # type: ignore[arg-type]
    end = packing.rows(corpus.train.count, CFG.seq_len) * CFG.seq_len + 1
    np.testing.assert_array_equal(made[1:end], corpus.train.ids[1:end] / 4.0)
    assert made[0] == 0 and not made[end:].any()
    cfg = dataclasses.replace(CFG, reference=str(tmp_path / "losses"))
    reference.write(tmp_path / "losses", made, CFG, corpus)
    for step in range(5):
        batch = pipeline.batch_at(cfg, corpus, 3, step)
        np.testing.assert_array_equal(batch["reference"], batch["targets"] / 4.0)
        plain = pipeline.batch_at(CFG, corpus, 3, step)
        assert batch.keys() - plain.keys() == {"reference"}
        np.testing.assert_array_equal(batch["tokens"], plain["tokens"])
    assert "reference" not in pipeline.val_batches(cfg, corpus)[0]


def test_losses_that_do_not_belong_are_refused(corpus, tmp_path):
    path = tmp_path / "losses"
    cfg = dataclasses.replace(CFG, reference=str(path))
    with pytest.raises(DataError, match="cannot read"):
        reference.load(cfg, corpus)
    for wrong in (np.zeros(3), np.full(corpus.train.count, np.nan)):
        with pytest.raises(DataError, match="finite losses"):
            reference.write(path, wrong, CFG, corpus)
    reference.write(path, jnp.ones(corpus.train.count), CFG, corpus)
    assert reference.load(cfg, corpus)[:].dtype == np.float16
    with pytest.raises(DataError, match="has seq_len 16, expected 8"):
        reference.load(dataclasses.replace(cfg, seq_len=8), corpus)
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="has sha256"):
        reference.load(cfg, corpus)
