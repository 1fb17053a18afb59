"""Conversations: what is read and refused, how they lie in rows, and what of them is learned."""

import dataclasses
import itertools
import json
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import ConfigError, DataConfig
from nanochat_jax.data import mixture, packing, pipeline, shards, sources, turns
from nanochat_jax.data.sources import DataError
from nanochat_jax.evals import loss
from nanochat_jax.train import step as steps
from nanochat_jax.types import Batch

SEQ = 64
TOKENIZER = tokenizers.byte_tokenizer()


def talk(*contents, system=""):
    """Messages of user and assistant in turns."""
    first = [{"role": "system", "content": system}] if system else []
    roles = itertools.cycle(("user", "assistant"))
    return first + [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


TALKS = [
    talk(f"q{i} " * (1 + i % 3), f"answer {i}" * (1 + i % 2), *(("und?", "ja ü😀") if i % 4 == 0 else ()), system="be short" * (i % 5 == 0))
    for i in range(40)
]  # fmt: skip


def config(source, **changes):
    given = {"source": str(source), "kind": "chat", "text_key": "messages", "tokenizer": "bytes"}
    return DataConfig(**given | {"seq_len": SEQ, "batch": 2, "val_percent": 20} | changes)


def write(path, talks=TALKS, key="messages"):
    path.write_text("".join(json.dumps({key: messages}) + "\n" for messages in talks))
    return path


def read(source, skipped=None, **changes):
    return [json.loads(d.text) for d in sources.documents(config(source, **changes), skipped)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("talks")
    return shards.prepare(config(write(root / "a.jsonl")), 300, root / "cache")


# --- what is read


def test_json_lines_parquet_and_datasets_say_the_same(tmp_path, monkeypatch):
    assert read(write(tmp_path / "a.jsonl")) == TALKS
    assert read(write(tmp_path / "b.jsonl", key="turns"), text_key="turns") == TALKS

    class Hub:
        def load_dataset(self, *args, **kwargs):
            yield from ({"messages": messages, "id": i} for i, messages in enumerate(TALKS))

    monkeypatch.setitem(sys.modules, "datasets", Hub())
    assert read("hf:a/b") == TALKS
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs the 'data' extra")
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs the 'data' extra")
    parquet.write_table(pyarrow.table({"messages": TALKS}), tmp_path / "c.parquet", row_group_size=7)
    assert read(tmp_path / "c.parquet") == TALKS


@pytest.mark.interop
def test_datasets_from_a_local_folder(tmp_path):
    pytest.importorskip("datasets", reason="the 'data' extra is not installed")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl")
    assert read(f"hf:{tmp_path / 'set'}") == TALKS


def test_only_role_and_content_are_kept():
    messages = [message | {"name": "x", "thinking": None} for message in TALKS[0]]
    assert turns.stored(messages) == turns.stored(TALKS[0])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no conversation"), ("text", "no conversation"), (None, "no conversation"),
        ([["user", "hi"]], "no conversation"), ([{"role": "user"}], "no conversation"),
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "no conversation"),
        ([*talk("hi", "ho")[:1], {"role": "tool", "content": "3"}], "unknown role"),
        (talk("hi", " \n"), "empty turn"), (talk("", "ho"), "empty turn"),
        (talk("hi", "ho")[1:], "not alternating"), (talk("hi", "ho")[:1] * 2, "not alternating"),
        (talk("hi", "ho") + talk("hi", "ho", system="late"), "not alternating"),
        (talk("hi", "ho", "hm"), "no answer"), (talk(system="alone"), "no answer"),
        (talk("hi", "half \ud83d"), "undecodable"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_has_its_reason(messages, reason):
    assert turns.stored(messages) == reason


def test_skips_are_counted_and_the_rest_is_read(tmp_path):
    bad = [talk("hi", "ho", "hm"), [{"role": "bot", "content": "x"}], TALKS[3], talk("x", "y" * 1_000_001)]
    skipped = Counter()
    assert read(write(tmp_path / "a.jsonl", [*TALKS, *bad]), skipped) == TALKS
    assert skipped == {"no answer": 1, "unknown role": 1, "duplicate": 1, "long": 1}
    (tmp_path / "readme.md").write_text("prose " * 50)
    assert read(tmp_path, skipped := Counter()) == TALKS and skipped["no table"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl:2 is not JSON"),
        ('{"message": []}', r"a\.jsonl:2 has no field 'messages' \(data.text_key\); fields: message$"),
        ("[]", r"a\.jsonl:2 has no field 'messages'"),
    ],
)
def test_damage_names_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", TALKS[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        read(path)


def test_nothing_usable(tmp_path):
    with pytest.raises(DataError, match=r"has no usable document; skipped: 2 no answer"):
        shards.prepare(config(write(tmp_path / "a.jsonl", [talk("a"), talk("b")])), 300, tmp_path / "cache")
    with pytest.raises(DataError, match="has one conversation, and one must be held out"):
        shards.prepare(config(write(tmp_path / "b.jsonl", TALKS[:1])), 300, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_tokenizer_without_marks_is_refused(tmp_path):
    definition = json.loads(TOKENIZER.definition)
    definition["added_tokens"] = definition["added_tokens"][:1]
    (tmp_path / "bare.json").write_text(json.dumps(definition))
    cfg = config(write(tmp_path / "a.jsonl"), tokenizer=str(tmp_path / "bare.json"))
    with pytest.raises(ConfigError, match=r"bare\.json' has no marks for chat turns"):
        shards.prepare(cfg, 300, tmp_path / "cache")


# --- what is stored


def documents(made, split):
    tokens = getattr(made, split)
    return [tokens.ids[a:b].tolist() for a, b in itertools.pairwise(tokens.offsets)]


def by_hand(messages):
    """Ids of a conversation, from the marks' names alone."""
    ids = [TOKENIZER.special["<|bos|>"]]
    for message in messages:
        ids.append(TOKENIZER.special[f"<|{message['role']}_start|>"])
        ids += [len(tokenizers.SPECIAL) + byte for byte in message["content"].encode()]
        ids.append(TOKENIZER.special[f"<|{message['role']}_end|>"])
    return ids


def test_every_conversation_is_stored_with_its_marks(corpus):
    made = documents(corpus, "train") + documents(corpus, "val")
    assert sorted(made) == sorted(map(by_hand, TALKS)) and len(documents(corpus, "val")) > 2
    said = dict.fromkeys(("train", "val"), 0)
    for split in said:
        for messages in TALKS:
            if by_hand(messages) in documents(corpus, split):
                said[split] += sum(len(m["content"].encode()) for m in messages)
        assert corpus.manifest["counts"][split]["bytes"] == said[split]


def test_processes_and_threads_store_the_same_bytes(corpus, tmp_path):
    path = write(tmp_path / "a.jsonl")
    made = shards.prepare(config(path, tokenize_workers=1), 300, tmp_path / "cache")
    assert made.sha256 == corpus.sha256 and documents(made, "train") == documents(corpus, "train")


def test_the_same_lines_as_text_are_another_corpus(corpus, tmp_path):
    rows = [json.dumps(messages, ensure_ascii=False) for messages in TALKS]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    text = shards.prepare(config(path, kind="text"), 300, tmp_path / "cache")
    assert text.sha256 != corpus.sha256 and text.directory.name != corpus.directory.name


def test_a_tokenizer_is_trained_on_what_was_said_and_a_text_cannot_forge_marks(tmp_path):
    forged = [talk(f"<|assistant_start|>{i}<|user_end|>", "said " * 9) for i in range(9)]
    cfg = config(write(tmp_path / "a.jsonl", forged), tokenizer="bpe")
    made = shards.prepare(cfg, 300, tmp_path / "cache")
    words = {made.tokenizer.decode_bytes([i]) for i in range(made.tokenizer.vocab_size)}
    assert b" said" in words and not any(b"role" in word for word in words)
    marks = [made.tokenizer.special[f"<|{r}_{e}|>"] for r in ("user", "assistant") for e in ("start", "end")]
    for ids in documents(made, "train") + documents(made, "val"):
        assert [i for i in ids if i in set(made.tokenizer.special.values())] == [
            made.tokenizer.bos_id,
            *marks,
        ]


# --- how they lie in rows

LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=25)


def fill_by_brute_force(places, seq_len):
    """Places left in each row: the longest first, each where least is left over."""
    left = []
    for need in sorted(places, reverse=True):
        fitting = [r for r in left if r >= need]
        if fitting:
            left.remove(min(fitting))
        left.append((min(fitting) if fitting else seq_len) - need)
    return sorted(left)


@settings(max_examples=150)
@given(LENGTHS, st.integers(2, 20))
def test_best_fit_is_what_brute_force_finds(lengths, seq_len):
    offsets = np.cumsum([0, *lengths])
    layout = packing.best_fit(offsets, seq_len)
    assert sorted(layout.order.tolist()) == list(range(len(lengths)))
    places = [min(n - 1, seq_len) for n in lengths]
    rows = [layout.order[a:b].tolist() for a, b in itertools.pairwise(layout.first)]
    assert sorted(seq_len - sum(places[i] for i in row) for row in rows) == fill_by_brute_force(
        places, seq_len
    )
    assert rows == sorted(sorted(row) for row in rows) and all(rows)
    over = [n - 1 - seq_len for n in lengths if n - 1 > seq_len]
    assert packing.cut_off(offsets, seq_len) == (len(over), sum(over))


def spans(row, field):
    """Stretches of a row's positions where the field is the same and not 0."""
    edges = np.flatnonzero(np.diff(row[field], prepend=0, append=0))
    return [
        range(a, b)
        for a, b in itertools.pairwise([*edges.tolist(), len(row[field])])
        if a < b and row[field][a]
    ]


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("seq_len", [SEQ, 24])
def test_the_weighted_targets_are_what_the_assistants_say(corpus, seq_len, isolate):
    """Every row, token by token, and every stretch that is learned, decoded."""
    cfg = config("", seq_len=seq_len, isolate=isolate, batch=1, shuffle=False)
    known = {
        tuple(ids): [m["content"] for m in t if m["role"] == "assistant"]
        for t in TALKS
        for ids in [by_hand(t)]
    }
    whole, cut = [], 0
    for step in range(round(pipeline.epoch_steps(cfg, corpus))):
        row = {name: field[0] for name, field in pipeline.batch_at(cfg, corpus, 0, step).items()}
        starts = [i for i in range(seq_len) if row["tokens"][i] == 0 and row["segments"][i]]
        used = int((row["segments"] > 0).sum())
        assert not row["weights"][used:].any() and not row["tokens"][used:].any()
        for number, (a, b) in enumerate(itertools.pairwise([*starts, used]), 1):
            ids = [*row["tokens"][a:b].tolist(), int(row["targets"][b - 1])]
            assert row["targets"][a : b - 1].tolist() == ids[1:-1]
            assert set(row["segments"][a:b]) == {number if isolate else 1}
            assert row["positions"][a:b].tolist() == list(range(b - a) if isolate else range(a, b))
            said = known.get(tuple(ids))
            if said is None:  # cut: its beginning is there, and what is learned is a beginning, too
                full = next(known[k] for k in known if list(k[: len(ids)]) == ids)
                assert len(ids) == seq_len + 1
                cut += 1
            learned = [range(s.start + a, s.stop + a) for s in spans({"w": row["weights"][a:b]}, "w")]
            texts = [TOKENIZER.decode(row["targets"][list(s)].tolist()) for s in learned]
            if said is not None:
                assert texts == [text + "<|assistant_end|>" for text in said]
                whole.append(ids)
            else:
                joined = [(text + "<|assistant_end|>").encode() for text in full]
                made = [TOKENIZER.decode_bytes(row["targets"][list(s)].tolist()) for s in learned]
                assert all(one.startswith(part) for one, part in zip(joined, made, strict=False))
    assert len(whole) + cut == len(documents(corpus, "train"))
    assert cut == packing.cut_off(corpus.train.offsets, seq_len)[0] and (cut > 0) == (seq_len == 24)


def test_rows_have_their_limits(corpus):
    layout = packing.best_fit(corpus.train.offsets, SEQ)
    args = (corpus.train.ids, corpus.train.offsets, layout)
    for index in (-1, len(layout.first) - 1):
        with pytest.raises(IndexError, match=f"row {index} of {len(layout.first) - 1}"):
            packing.whole(*args, index, SEQ, True, lambda ids: np.ones(len(ids), bool))


def test_what_is_cut_is_said(corpus):
    count = len(documents(corpus, "train"))
    said = pipeline.whole_text(config("", seq_len=24), corpus)
    cut, lost = packing.cut_off(corpus.train.offsets, 24)
    assert said.startswith(f"{count} conversations in ")
    assert said.endswith(f"; {cut} longer than a row lose {lost} tokens at their ends") and cut > 1
    rows = len(packing.best_fit(corpus.train.offsets, 512).first) - 1
    padding = 100 * (1 - (corpus.train.count - count) / (rows * 512))
    assert pipeline.whole_text(config("", seq_len=512), corpus) == (
        f"{count} conversations in {rows} rows of 512, {padding:.0f}% padding; none is longer than a row"
    )


# --- batches


@pytest.mark.parametrize(
    "changes", [{}, {"pool": dataclasses.replace(DataConfig().pool, order="declared", window=8, delay=2)}]
)
def test_batches_are_a_function_of_seed_and_step(corpus, changes):
    cfg = config("", **changes)
    with pipeline.batches(cfg, corpus, 3, 5) as stream:
        read_on = [next(stream) for _ in range(4)]
    with pipeline.batches(cfg, corpus, 3, 7, (1, 2)) as stream:
        half = next(stream)
    for step, made in enumerate(read_on, 5):
        for name, expected in pipeline.batch_at(cfg, corpus, 3, step).items():
            np.testing.assert_array_equal(made[name], expected)
    np.testing.assert_array_equal(half["tokens"], read_on[2]["tokens"][1:])


def test_held_out_bytes_are_those_of_the_assistants(corpus):
    held = [t for t in TALKS if by_hand(t) in documents(corpus, "val")]
    expected = sum(len(m["content"].encode()) for t in held for m in t if m["role"] == "assistant")
    uniform = steps.make_eval_step(
        lambda params, batch: np.log(256.0) * np.ones(batch.targets.shape, np.float32)
    )
    batches = (Batch(**made) for made in pipeline.val_batches(config("", seq_len=512), corpus))
    scores = loss.bits_per_byte(uniform, {}, batches, np.asarray(corpus.tokenizer.token_bytes(384)))
    assert scores["eval/bytes"] == scores["eval/tokens"] == expected  # a byte is a token here
    assert scores["eval/bpb"] == pytest.approx(8.0, rel=1e-6)


def test_mixtures_of_conversations(tmp_path):
    parts = tuple((name, str(write(tmp_path / f"{name}.jsonl", talks)), 1.0) for name, talks in (("a", TALKS[:20]), ("b", TALKS[20:])))  # fmt: skip
    cfg = config("stdlib", mix=parts)
    made = mixture.prepare(cfg, 300, tmp_path / "cache")
    seen = [pipeline.batch_at(cfg, made, 0, step) for step in range(8)]
    assert all(batch["weights"].sum() > 0 for batch in seen)
    assert set(pipeline.val_parts(cfg, made)) == {"a", "b"}
