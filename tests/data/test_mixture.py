"""Mixtures: exact proportions, each part in its own order, one tokenizer, held-out rows that stay."""

import dataclasses
import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.config import ConfigError, DataConfig
from nanochat_jax.data import mixture, pipeline, shards, sources
from nanochat_jax.data.sources import DataError
from nanochat_jax.evals import loss

FIELDS = {"tokens", "targets", "weights", "segments", "positions"}
WEIGHTS = {"quality": 0.4, "verified": 0.3, "docs": 0.1}
BASE = DataConfig(tokenizer="bytes", seq_len=16, batch=8, val_percent=20, workers=2)


def document(part, i):
    return f"{part} {i}: " + " ".join(f"{part[0]}{i * j}" for j in range(12 + i % 5)) + "\n"


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    for part, count in zip(WEIGHTS, (24, 18, 9), strict=True):
        (root / part).mkdir()
        for i in range(count):
            (root / part / f"{i:03}.rs").write_text(document(part, i))
    return root


def config(trees, names=tuple(WEIGHTS), **changes):
    mix = tuple((name, str(trees / name), WEIGHTS[name]) for name in names)
    return dataclasses.replace(BASE, **({"mix": mix} | changes))


@pytest.fixture(scope="module")
def made(trees, tmp_path_factory):
    return mixture.prepare(config(trees), 300, tmp_path_factory.mktemp("cache"))


def letters(made, batch):
    """The part of each row, by the letter that its words begin with."""
    texts = [made.tokenizer.decode(row) for row in batch["tokens"]]
    return [max("qvd", key=text.count) for text in texts]


def test_rows_come_in_the_proportions_of_the_weights(trees, made):
    cfg = config(trees)
    counts = Counter()
    for step in range(40):
        found = letters(made, pipeline.batch_at(cfg, made, 3, step))
        # Eight rows are a period of 4 + 3 + 1: the interleaving is even, not drawn.
        assert Counter(found) == {"q": 4, "v": 3, "d": 1}
        counts.update(found)
    assert sum(counts.values()) == 320


@settings(max_examples=20)
@given(st.lists(st.floats(0.01, 10.0), min_size=2, max_size=5), st.integers(200, 2000))
def test_shares_are_as_close_as_counting_allows(weights, count):
    """Grain's interleaving against the definition: after n rows each part has n * weight, give or take."""
    import grain

    parts = tuple(mixture.Part(f"p{i}", w / sum(weights), None) for i, w in enumerate(weights))
    ranges = [grain.MapDataset.range(1).map(lambda _, i=i: i).repeat() for i in range(len(weights))]
    mixed = grain.MapDataset.mix(ranges, weights=pipeline._whole(parts))
    found = Counter(mixed[i] for i in range(count))
    for i, part in enumerate(parts):
        # Whole weights, the least of which is 100, are off by half a percent of it at most.
        assert abs(found[i] - count * part.weight) <= len(weights) + 0.01 * count * part.weight


def test_each_part_is_seen_whole_before_it_is_repeated(trees, made):
    cfg = config(trees)
    seen = {letter: [] for letter in "qvd"}
    for step in range(60):
        batch = pipeline.batch_at(cfg, made, 0, step)
        for letter, row in zip(letters(made, batch), batch["tokens"], strict=True):
            seen[letter].append(row.tobytes())
    for letter, part in zip("qvd", made.parts, strict=True):
        rows = (part.corpus.train.count - 1) // 16
        assert len(seen[letter]) > rows, "the run is too short to show a repetition"
        first = seen[letter][:rows]
        ids = part.corpus.train.ids[:].astype(np.int32)
        assert sorted(first) == sorted(ids[i * 16 : i * 16 + 16].tobytes() for i in range(rows))


def test_a_parts_order_does_not_depend_on_the_others(trees, made):
    one = mixture.Mixture(tuple(p for p in made.parts if p.name != "docs"))
    order = {}
    for which, corpus in (("three", made), ("two", one)):
        rows = []
        for step in range(12):
            batch = pipeline.batch_at(config(trees), corpus, 7, step)
            rows += [
                r.tobytes() for x, r in zip(letters(made, batch), batch["tokens"], strict=True) if x == "q"
            ]
        order[which] = rows[:40]
    assert order["three"] == order["two"]


def test_parts_of_one_size_have_orders_of_their_own(trees, made):
    corpus = made.parts[0].corpus
    twins = mixture.Mixture((mixture.Part("one", 0.5, corpus), mixture.Part("two", 0.5, corpus)))
    rows = [pipeline.batch_at(config(trees), twins, 0, step)["tokens"] for step in range(4)]
    flat = [row.tobytes() for row in np.concatenate(rows)]
    assert flat[::2] != flat[1::2]


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("count", [1, 2])
def test_batches_are_a_function_of_seed_and_step(trees, made, workers, count):
    cfg = config(trees, workers=workers)
    for start in (0, 10**7):
        parts = []
        for index in range(count):
            with pipeline.batches(cfg, made, 5, start, (index, count)) as stream:
                parts.append([next(stream) for _ in range(3)])
        for step in range(3):
            expected = pipeline.batch_at(cfg, made, 5, start + step)
            for name in FIELDS:
                whole = np.concatenate([part[step][name] for part in parts])
                np.testing.assert_array_equal(whole, expected[name])


def test_held_out_rows_stay_and_take_their_shares(trees, made):
    cfg = config(trees, batch=4)
    everything = pipeline.val_batches(cfg, made)
    counts = [(part.corpus.val.count - 1) // 16 for part in made.parts]
    assert len(everything) == -(-sum(counts) // 4)
    rows = np.concatenate([b["tokens"] for b in everything])[: sum(counts)]
    first = 0
    for part, count in zip(made.parts, counts, strict=True):
        ids = part.corpus.val.ids[:].astype(np.int32)
        for i in range(count):
            np.testing.assert_array_equal(rows[first + i], ids[i * 16 : i * 16 + 16])
        first += count
    limited = pipeline.val_batches(cfg, made, 2)
    found = Counter(x for b in limited for x in letters(made, b))
    assert found == {"q": 4, "v": 3, "d": 1}
    # Nothing held out is trained on, in any part.
    trained = {t for p in made.parts for t in texts(p.corpus, p.corpus.train)}
    assert not trained & {t for p in made.parts for t in texts(p.corpus, p.corpus.val)}


def test_scores_of_parts_are_those_of_the_whole(trees, made):
    """Part by part and put together, against all rows at once."""
    cfg = config(trees, batch=4)

    def fake(params, batch, sizes):
        # Nats and bytes that differ from row to row, as a model's do.
        scored = batch["weights"] > 0
        values = (batch["targets"] % 7) / 3 * scored
        return {
            "nats": values.sum(), "tokens": scored.sum(), "bytes": sizes[batch["targets"]][scored].sum(),
            "loop_nats": np.array([values.sum() * 2, values.sum()]),
        }  # fmt: skip

    sizes = np.asarray(made.tokenizer.token_bytes())
    parts = pipeline.val_parts(cfg, made, 5)
    docs = loss.bits_per_byte(fake, None, parts["docs"], sizes)
    whole = loss.bits_per_byte(fake, None, pipeline.val_batches(cfg, made, 5), sizes)
    together = loss.of_parts(fake, None, parts, lambda rows: rows, sizes)
    assert {name: together[name] for name in whole} == pytest.approx(whole)
    assert set(together) - set(whole) == {f"eval/bpb_{name}" for name in WEIGHTS}
    assert together["eval/bpb_docs"] == docs["eval/bpb"]
    assert loss.joined({"": whole}) == whole


def texts(corpus, tokens):
    ends = tokens.offsets.tolist()
    return [corpus.tokenizer.decode(tokens.ids[a + 1 : b]) for a, b in itertools.pairwise(ends)]


def test_the_parts_of_a_mixture_are_the_corpora_of_their_sources(trees, made, tmp_path):
    alone = dataclasses.replace(BASE, source=str(trees / "docs"))
    corpus = mixture.prepare(alone, 300, tmp_path)
    assert isinstance(corpus, shards.Corpus) and corpus.sha256 == made.parts[2].corpus.sha256
    np.testing.assert_allclose([p.weight for p in made.parts], [0.5, 0.375, 0.125])
    assert made.facts["mix"][2]["sha256"] == corpus.sha256 and made.facts["sha256"] == made.sha256
    assert pipeline.epoch_steps(config(trees), made) == min(
        ((p.corpus.train.count - 1) // 16) / (8 * p.weight) for p in made.parts
    )


@pytest.mark.parametrize("kind", ["bpe", "bpe3"])
def test_one_tokenizer_learns_from_all_parts_and_text_is_read_once(trees, tmp_path, monkeypatch, kind):
    read = []
    documents = sources.documents
    monkeypatch.setattr(sources, "documents", lambda cfg, **k: read.append(cfg.source) or documents(cfg, **k))
    cfg = config(trees, tokenizer=kind)
    lines = []
    first = mixture.prepare(cfg, 300, tmp_path, lines.append)
    assert len({part.corpus.tokenizer.sha256 for part in first.parts}) == 1
    assert first.tokenizer.vocab_size == 300 and read == [str(trees / name) for name in WEIGHTS]
    assert any(line.startswith("docs: ") for line in lines)
    other = dataclasses.replace(cfg, tokenizer="bpe3" if kind == "bpe" else "bpe")
    assert mixture.prepare(other, 300, tmp_path / "other").tokenizer.definition != first.tokenizer.definition
    read.clear()
    assert not list(tmp_path.glob("*.partial"))
    monkeypatch.setattr(sources, "documents", lambda *a, **k: pytest.fail("read again"))
    assert mixture.prepare(cfg, 300, tmp_path).sha256 == first.sha256
    # Other weights: another sample to learn from, another identity.
    monkeypatch.setattr(sources, "documents", documents)
    turned = dataclasses.replace(cfg, mix=tuple((n, s, 1.0) for n, s, _ in cfg.mix))
    assert mixture.prepare(turned, 300, tmp_path).sha256 != first.sha256


def test_an_interrupted_mixture_goes_on(trees, tmp_path, monkeypatch):
    cfg = config(trees, tokenizer="bpe")
    whole = mixture.prepare(cfg, 300, tmp_path / "a")
    prepare = shards.prepare

    def dying(part, *args):
        if part.source.endswith("verified"):
            raise KeyboardInterrupt
        return prepare(part, *args)

    monkeypatch.setattr(shards, "prepare", dying)
    with pytest.raises(KeyboardInterrupt):
        mixture.prepare(cfg, 300, tmp_path / "b")
    monkeypatch.setattr(shards, "prepare", prepare)
    monkeypatch.setattr(sources, "documents", lambda *a, **k: pytest.fail("read again"))
    assert mixture.prepare(cfg, 300, tmp_path / "b").sha256 == whole.sha256


def test_a_part_that_fails_is_named(trees, tmp_path):
    cfg = config(trees, mix=(("quality", str(trees / "quality"), 1.0), ("docs", str(trees / "nothing"), 1.0)))
    with pytest.raises(DataError, match=r"data.mix part 'docs': data.source '.*nothing' matches no file"):
        mixture.prepare(cfg, 300, tmp_path)
    tokens = config(trees, tokenizer="bpe", mix=(("quality", "tokens:/x.u16", 1.0), ("docs", "y", 1.0)))
    with pytest.raises(ConfigError, match=r"data.mix part 'quality': a token file needs its tokenizer"):
        mixture.prepare(tokens, 300, tmp_path)


def test_parts_that_are_too_small_are_named(trees, made):
    with pytest.raises(DataError, match=r"data.mix part 'docs' has \d+ training tokens, less than one row"):
        pipeline.batch_at(config(trees, seq_len=600, batch=1), made, 0, 0)
    with pytest.raises(DataError, match=r"held-out split of data.mix part '\w+' has \d+ tokens"):
        pipeline.val_batches(config(trees, seq_len=300), made)


def test_a_single_source_has_the_rows_it_always_had(tmp_path):
    """Names, hashes and order as they were before there were mixtures."""
    root = tmp_path / "gold"
    root.mkdir()
    for i in range(30):
        line = f"fn f{i}() {{ {i * 77} }} // number {i}, long enough to count here\n"
        (root / f"{i:03}.rs").write_text(line * (1 + i % 5))
    cfg = DataConfig(source=str(root), tokenizer="bytes", seq_len=16, batch=4, val_percent=20)
    corpus = mixture.prepare(cfg, 300, tmp_path / "cache")
    digest = hashlib.sha256()
    for step in [*range(20), 10**6]:
        for _, value in sorted(pipeline.batch_at(cfg, corpus, 5, step).items()):
            digest.update(value.tobytes())
    assert corpus.directory.name == "55427379004c5376d6b1"
    assert digest.hexdigest() == "3718d2f4913fba4e9d9d5ebe7f922fcf96f0cbe299fdd58e9eb408c6e893b8f1"
