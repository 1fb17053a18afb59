"""Learning from conversations: what the loss sees, what a run starts from, and that it can be resumed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import chat, cli, losses, params
from nanochat_jax import config as config_lib
from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.checkpoint import CheckpointError
from nanochat_jax.config import ConfigError
from nanochat_jax.data import packing
from nanochat_jax.model import transformer
from nanochat_jax.train import program
from nanochat_jax.types import Batch

TOKENIZER = tokenizers.byte_tokenizer()
MODEL = {
    "vocab_size": 300, "dim": 32, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 16, "mlp_dim": 32,
    "value_embed_every": 0,
}  # fmt: skip


def talks(count=40):
    return [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"here is {i % 7}"}]
        for i in range(count)
    ]


def settings(tmp_path, name="base", **changes):
    """A run of a very small model on conversations or text."""
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in talks()))
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"a line of text about {i}, and a few more words.\n" * 30)
    given = {
        **{f"model.{key}": value for key, value in MODEL.items()}, "data.tokenizer": "bytes", "data.seq_len": 64,
        "opt.matrix.name": "adamw", "model.quant": "full",
        "data.source": tmp_path / "*.txt", "data.val_percent": 20, "eval.batches": 0, "eval.sample_tokens": 8,
        "train.steps": 8, "opt.schedule.warmup_steps": 2, "ckpt.every_steps": 2, "eval.every_steps": 4,
    } | changes  # fmt: skip
    return cli.get_config("smoke", **given), tmp_path / name


def of_chat(tmp_path, name="sft", **changes):
    chats = {"data.kind": "chat", "data.source": tmp_path / "talks.jsonl", "data.text_key": "messages"}
    return settings(tmp_path, name, **chats | {"ckpt.init_from": tmp_path / "base"} | changes)


def row_of(messages, seq_len=96, **given):
    """A batch of one row that holds these conversations whole."""
    documents = [np.array(chat.render(TOKENIZER, m).ids, np.uint16) for m in messages]
    offsets = np.cumsum([0, *map(len, documents)])
    layout = packing.Layout(np.arange(len(documents)), np.array([0, len(documents)]))
    made = packing.whole(
        np.concatenate(documents), offsets, layout, 0, seq_len, True, chat.learner(TOKENIZER)
    )
    return Batch(**{name: jnp.asarray(field)[None] for name, field in made.items()} | given)


def small_model(**changes):
    cfg = config_lib.ModelConfig(**MODEL | changes)
    return cfg, params.init_params(transformer.param_specs(cfg), jax.random.key(0))


TWO = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello you"}],
    [{"role": "system", "content": "be"}, {"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"},
     {"role": "user", "content": "so"}, {"role": "assistant", "content": "yes"}],
]  # fmt: skip


def test_only_what_the_assistant_says_is_learned():
    """By gradient: of the hidden states that predict, those of the assistant's tokens and their ends alone."""
    cfg, weights = small_model()
    batch = row_of(TWO)
    hidden = jax.random.normal(jax.random.key(1), (1, 96, 32))
    fixed = (("nll", 1.0), ("z", 0.1), ("entropy", 0.1))

    @jax.jit
    @jax.grad
    def gradient(h):
        head = transformer.head(cfg, weights)
        return losses.token_loss(cfg, 32, fixed, h, head, batch.targets, batch.weights)[0]

    grad = gradient(hidden)
    learning = np.flatnonzero(np.abs(np.asarray(grad[0])).max(-1) > 0)
    said = np.asarray(batch.targets[0])[learning]
    assert TOKENIZER.decode(said.tolist()) == "".join(
        f"{text}<|assistant_end|>" for text in ("hello you", "that", "yes")
    )


def test_a_conversation_does_not_see_its_neighbour():
    """The losses of the second are the same bits beside another first; and the first does matter to itself."""
    cfg, weights = small_model(quant="ternary")
    nll = jax.jit(losses.make_token_nll(cfg, 32))
    other = [[TWO[0][0] | {"content": "no"}, TWO[0][1] | {"content": "yelloh ou"}], TWO[1]]
    one, two = (np.asarray(nll(weights, row_of(talk))[0]) for talk in (TWO, other))
    first = np.asarray(row_of(TWO).segments[0]) == 1
    second = np.asarray(row_of(TWO).segments[0]) == 2
    np.testing.assert_array_equal(one[second], two[second])
    assert not np.array_equal(one[first], two[first])
    joined = row_of(TWO)
    joined = joined.replace(segments=jnp.minimum(joined.segments, 1))
    assert not np.array_equal(np.asarray(nll(weights, joined)[0])[second], one[second])


def test_questions_change_answers_but_are_no_targets():
    cfg, weights = small_model()
    loss_fn = jax.jit(losses.make_loss(cfg, (("next_token", 1.0),), 32))
    batch = row_of(TWO)
    plain = loss_fn(weights, batch, jax.random.key(0))[0]
    scrambled = jnp.where(batch.weights > 0, batch.targets, 50)
    np.testing.assert_array_equal(
        loss_fn(weights, batch.replace(targets=scrambled), jax.random.key(0))[0], plain
    )
    other = row_of([[TWO[0][0] | {"content": "ho"}, TWO[0][1]], TWO[1]])
    assert loss_fn(weights, other, jax.random.key(0))[0] != plain


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(directory, state) of a run, as far as another one starts from it."""
    root = tmp_path_factory.mktemp("runs")
    cfg, home = settings(root, "base")
    state = program.Parts(cfg).fresh(5)
    state = state.replace(step=jnp.int32(70), opt_state=jax.tree.map(lambda a: a + 1, state.opt_state))
    with program.checkpoint.Checkpointer(cfg.ckpt, home / "ckpt") as checkpoints:
        checkpoints.save(70, state, {"config": program.manifest.to_dict(cfg)}, wait=True)
    TOKENIZER.save(home / "tokenizer.json")
    return root, state


def start(cfg, home):
    with program.checkpoint.Checkpointer(cfg.ckpt, home / "ckpt") as checkpoints:
        return program.start_state(cfg, home, checkpoints, "auto")


def test_a_run_starts_from_parameters_with_a_fresh_optimizer_and_step(base):
    root, saved = base
    cfg, home = of_chat(root)
    assert cfg.seed != 5
    _, state, _, origin = start(cfg, home)
    for one, two in zip(jax.tree.leaves(state.params), jax.tree.leaves(saved.params), strict=True):
        np.testing.assert_array_equal(one, two)
    for one, two in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(saved.opt_state), strict=True):
        np.testing.assert_array_equal(one, np.asarray(two) - 1)
    assert int(state.step) == 0 and origin.endswith(f"the parameters of {root / 'base'}")


def test_a_base_of_another_shape_is_refused(base):
    cfg, _ = of_chat(base[0], "wider", **{"model.mlp_dim": 48})
    with pytest.raises(CheckpointError, match=r"holds the parameters of another model: .*48") as caught:
        program._initial_params(cfg, program.Parts(cfg), None)
    assert "\n" not in str(caught.value)


def test_a_base_with_another_tokenizer_is_refused(base):
    root, _ = base
    cfg, home = of_chat(root, "words", **{"data.tokenizer": "bpe"})
    with pytest.raises(ConfigError) as caught:
        train(cfg, home, root)
    assert str(caught.value) == (
        f"'ckpt.init_from' = '{root / 'base'}' was trained with another tokenizer than this run's; set "
        f"data.tokenizer = {root / 'base' / 'tokenizer.json'}"
    )


def test_without_a_base_the_command_that_makes_it_is_named(tmp_path):
    cfg, home = of_chat(tmp_path, **{"ckpt.init_from": "runs/tiny_rust"})
    with pytest.raises(ConfigError) as caught:
        cli.check_base(cfg, home)
    assert str(caught.value) == (
        "'ckpt.init_from' = 'runs/tiny_rust' is no run with a checkpoint; make it with: "
        "python -m nanochat_jax.train --config=tiny_rust --workdir=runs/tiny_rust"
    )
    cfg, home = of_chat(tmp_path)
    with pytest.raises(ConfigError, match="--config=<its config> --workdir"):
        cli.check_base(cfg, home)
    (tmp_path / "base" / "ckpt" / "8").mkdir(parents=True)
    cli.check_base(cfg, home)
    (home / "ckpt" / "2").mkdir(parents=True)
    cli.check_base(dataclasses.replace(cfg, ckpt=dataclasses.replace(cfg.ckpt, init_from="gone")), home)
    cli.check_base(settings(tmp_path)[0], tmp_path)


def test_the_config_takes_its_base_as_it_is(tmp_path):
    default = cli.get_config("sft_tiny")
    tiny = cli.get_config("tiny")
    assert default.ckpt.init_from == "runs/tiny" and default.data.tokenizer == "runs/tiny/tokenizer.json"
    loss = (("next_token", 1.0), ("mtp", 0.3))
    other = dataclasses.replace(
        tiny, model=dataclasses.replace(tiny.model, dim=128, window=(8, 0), mtp=config_lib.MtpConfig(depth=1), filter=config_lib.FilterConfig(keep=0.5)),
        train=dataclasses.replace(tiny.train, loss=loss),
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config_lib.to_dict(other)))
    made = cli.get_config(f"sft_tiny:base={tmp_path}")
    assert (
        made.model == dataclasses.replace(other.model, filter=tiny.model.filter)
        and made.train.loss == loss
        and made.ckpt.init_from == str(tmp_path)
    )
    assert all(
        getattr(made.opt, g).lr < getattr(tiny.opt, g).lr for g in ("matrix", "embed", "head", "scalar")
    )


def train(cfg, home, tmp_path, stop_at=None):
    count = iter(range(10**6))
    asked = (lambda: next(count) + 1 >= stop_at) if stop_at else (lambda: False)
    return program.train(cfg, home, tmp_path / "cache", {}, "auto", asked)


@pytest.mark.slow
def test_from_text_to_answers(tmp_path, capsys):
    """The whole way; interrupted and resumed it gives the same bits; and the model learns what is said."""
    cfg, home = settings(tmp_path)
    assert train(cfg, home, tmp_path) == 0
    said = capsys.readouterr().err
    assert f"--config=sft_tiny:base={home}" in said and f"--workdir={home} --chat" in said
    cfg, home = of_chat(tmp_path, "straight", **{"train.steps": 40})
    assert train(cfg, home, tmp_path) == 0
    said = capsys.readouterr().err
    assert "starting from the parameters of" in said and "none is longer than a row" in said
    assert f"--workdir={home} --chat" in said and "--prompt" not in said
    broken = tmp_path / "broken"
    assert train(cfg, broken, tmp_path, stop_at=21) == 130
    assert train(cfg, broken, tmp_path) == 0
    one, two = (json.loads((at / "result.json").read_text()) for at in (home, broken))
    assert one["state_sha256"] == two["state_sha256"] and one["data_position"] == 40
    rows = [json.loads(row) for row in (home / "metrics.jsonl").read_text().splitlines()]
    bits = [row["eval/bpb"] for row in rows if "eval/bpb" in row]
    assert bits[-1] < 0.8 * bits[0]
