"""Tokenizers: any bytes round-trip, bytes are counted exactly, text cannot forge special tokens."""

import itertools
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from nanochat_jax import tokenizer as tokenizers

CORPUS = [f"def f{i}(x):\n    return x + {i * 37}  # número {i} 日本 😀\r\n" for i in range(300)]
HARD = [
    b"",
    "😀👩‍👩‍👧 emoji".encode(),
    "日本語のテキスト，漢字".encode(),
    b"NUL \x00 in \x00\x00 between",
    b"line\r\nends\rof\n\n\nall \t kinds \r\n\r\n",
    "é e\u0301 \u00a0 \u200b \ufeff \u2028 \U0010ffff".encode(),
    b"\xff\xfe\x00 not \xe2\x82 UTF-8 \xc0\x80 \xed\xa0\x80",  # BOM, cut, overlong, surrogate
    bytes(range(256)),
    b"0123456789 12 345 x1y22z333",
    b"<|bos|><|pad|> <|user_start|>",
]


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.train(CORPUS, 380)


@pytest.fixture(scope="module", params=["bpe", "bytes"])
def each(request, bpe):
    return bpe if request.param == "bpe" else tokenizers.byte_tokenizer()


@pytest.mark.parametrize("data", HARD)
def test_hard_bytes_round_trip_and_are_counted(each, data):
    ids = each.encode_bytes(data)
    assert each.decode_bytes(ids) == data
    assert each.token_bytes()[ids].sum() == len(data)
    assert not set(ids) & set(each.special.values())


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_round_trip(each, data):
    ids = each.encode_bytes(data)
    assert each.decode_bytes(ids) == data
    assert each.token_bytes()[ids].sum() == len(data)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=100))
def test_any_text_round_trips(each, text):
    ids = each.encode(text)
    assert each.decode(ids) == text and each.encode_bytes(text.encode()) == ids
    assert each.token_bytes()[ids].sum() == len(text.encode())
    assert each.encode_batch([text, text]) == [ids, ids]


def test_bytes_per_token_follow_from_the_merges(bpe):
    """Oracle: 1 per byte, and each merge as long as its two parts, whatever decoding would say."""
    model = json.loads(bpe.definition)["model"]
    lengths = {text: 1 for text in model["vocab"] if len(text) == 1}
    for left, right in model["merges"]:
        lengths[left + right] = lengths[left] + lengths[right]
    expected = np.zeros(bpe.vocab_size, np.int32)
    for text, size in lengths.items():
        expected[model["vocab"][text]] = size
    made = bpe.token_bytes()
    assert made.dtype == np.int32
    np.testing.assert_array_equal(made, expected)
    assert (made == 0).sum() == len(tokenizers.SPECIAL)


def test_encoding_agrees_with_a_plain_implementation_of_merging(bpe):
    """Oracle: within each piece, apply the earliest learned merge until none applies."""
    model = json.loads(bpe.definition)["model"]
    rank = {tuple(pair): i for i, pair in enumerate(model["merges"])}
    text = "".join(CORPUS[:20]) + "unseen wörds: 1234567, <|bos|>\n\n\t\tx=  y"
    ids = []
    for piece, _ in bpe.core.pre_tokenizer.pre_tokenize_str(text):
        parts = list(piece)
        while pairs := [p for p in itertools.pairwise(parts) if p in rank]:
            best = min(pairs, key=rank.__getitem__)
            at = next(i for i in range(len(parts) - 1) if (parts[i], parts[i + 1]) == best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [model["vocab"][part] for part in parts]
    assert bpe.encode(text) == ids


def test_pieces_are_what_a_token_may_span(bpe):
    def pieces(text):
        return [text[a:b] for _, (a, b) in bpe.core.pre_tokenizer.pre_tokenize_str(text)]

    assert pieces("it's 12345 (x)\n\n    y") == [
        "it", "'s", " ", "12", "34", "5", " (", "x", ")\n\n", "   ", " y",
    ]  # fmt: skip
    assert pieces("a  b\r\n\tc") == ["a", " ", " b", "\r\n", "\tc"]


def test_special_tokens_exist_by_name_only(each):
    text = "hello <|bos|> <|user_start|> 😀 " + "".join(tokenizers.SPECIAL)
    ids = each.encode(text)
    assert min(ids) >= len(tokenizers.SPECIAL) and each.decode(ids) == text
    assert [each.special_id(name) for name in tokenizers.SPECIAL] == list(range(len(tokenizers.SPECIAL)))
    assert each.bos_id == each.special_id("<|bos|>") == 0
    assert each.decode([each.special_id("<|user_start|>"), *each.encode("x")]) == "<|user_start|>x"
    assert len(set(tokenizers.SPECIAL)) == len(tokenizers.SPECIAL)


def test_a_corpus_full_of_special_names_cannot_make_them_reachable():
    made = tokenizers.train(["<|bos|>" * 50, "<|user_start|> x"] * 50, 600)
    assert not set(made.encode("<|bos|><|bos|> <|user_start|>")) & set(made.special.values())


def test_vocabulary_sizes(bpe):
    least = len(tokenizers.SPECIAL) + 256
    assert tokenizers.byte_tokenizer().vocab_size == least
    assert tokenizers.byte_tokenizer().encode("A") == [len(tokenizers.SPECIAL) + 65]
    assert bpe.vocab_size == 380
    assert tokenizers.train(["nothing twice"], 5000).vocab_size < 300  # a merge needs two occurrences
    assert max(i for text in CORPUS for i in bpe.encode(text)) < bpe.vocab_size


@pytest.mark.multiprocess
def test_training_is_deterministic(bpe):
    """In this process, and in another with another hash seed."""
    assert tokenizers.train(iter(CORPUS), 380).definition == bpe.definition
    code = (
        "import sys, json; from nanochat_jax import tokenizer as t; "
        "print(t.train(json.load(sys.stdin), 380).sha256)"
    )
    for seed in ("1", "2"):
        child = subprocess.run(
            [sys.executable, "-c", code], input=json.dumps(CORPUS), capture_output=True, text=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(p for p in sys.path if p)}, check=True,
        )  # fmt: skip
        assert child.stdout.strip() == bpe.sha256


def test_files_and_pickles_keep_everything(each, tmp_path):
    each.save(tmp_path / "t.json")
    for again in (tokenizers.load(tmp_path / "t.json"), pickle.loads(pickle.dumps(each))):
        assert again.sha256 == each.sha256 and again.special == each.special
        assert again.encode(CORPUS[0]) == each.encode(CORPUS[0])
    again = tokenizers.load(tmp_path / "t.json")
    again.save(tmp_path / "u.json")
    assert (tmp_path / "u.json").read_bytes() == (tmp_path / "t.json").read_bytes()


def test_other_libraries_read_the_file(each, tmp_path):
    """Hugging Face's own loader decodes alike, and there the names do give special tokens."""
    each.save(tmp_path / "t.json")
    theirs = hf.Tokenizer.from_file(str(tmp_path / "t.json"))
    ids = each.encode(CORPUS[0])
    assert theirs.encode(CORPUS[0]).ids == ids and theirs.decode(ids) == CORPUS[0]
    assert theirs.encode("<|user_start|>x").ids == [each.special_id("<|user_start|>"), *each.encode("x")]


def test_surrogates_that_stand_for_bytes(each):
    """What sys.argv holds for bytes that are not UTF-8."""
    assert each.decode_bytes(each.encode("a\udcff😀")) == b"a\xff" + "😀".encode()
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        each.encode("\ud800")


def test_a_cut_character_decodes_to_a_mark_and_keeps_its_bytes(each):
    cut = tokenizers.byte_tokenizer().encode("😀")[:2]
    assert tokenizers.byte_tokenizer().decode(cut) == "\ufffd"
    assert tokenizers.byte_tokenizer().decode_bytes(cut) == "😀".encode()[:2]


def test_errors(bpe):
    with pytest.raises(ValueError, match="vocabulary of 100 is too small: 266 ids are bytes"):
        tokenizers.train(["x"], 100)
    with pytest.raises(KeyError, match=r"no special token '<\|eos\|>'; known: <\|bos\|>"):
        bpe.special_id("<|eos|>")
    for wrong in (-1, 380, 10**6):
        with pytest.raises(ValueError, match=rf"token id {wrong} is out of range: expected 0..379"):
            bpe.decode([wrong])


# --- tokenizer files of other projects


def foreign(path, special=("<|endoftext|>",), prefix=False, normalizer=None, alphabet=True, extra=()):
    """Train something like GPT-2's tokenizer with the library itself, and save it."""
    made = hf.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = hf.decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
    )  # fmt: skip
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens(list(extra))
    made.enable_truncation(5)
    made.save(str(path))
    return path, made


def test_other_byte_level_tokenizers_load(tmp_path):
    path, theirs = foreign(tmp_path / "gpt2.json", extra=["<|more|>"])
    made = tokenizers.load(path)
    assert made.bos_id == theirs.token_to_id("<|endoftext|>")
    assert made.special_id("<|more|>") == made.vocab_size - 1  # beyond the model's own vocabulary
    theirs.no_truncation()
    assert made.encode(CORPUS[0]) == theirs.encode(CORPUS[0]).ids
    for data in HARD:
        ids = made.encode_bytes(data)
        assert made.decode_bytes(ids) == data and made.token_bytes()[ids].sum() == len(data)
    assert made.bos_id not in made.encode("<|endoftext|>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix": True}, "alters text"),
        ({"normalizer": normalizers.Lowercase()}, "alters text"),
        ({"normalizer": normalizers.NFC()}, "alters text"),
        ({"alphabet": False}, r"is not a byte-level tokenizer: it lacks \d+ of the 256 bytes"),
        ({"special": ()}, "has no token to start documents with: expected one of .* got no special token"),
        ({"special": ("<other>",)}, "expected one of .*<s>, got <other>"),
    ],
)
def test_files_that_would_alter_text_are_refused(tmp_path, change, message):
    path, _ = foreign(tmp_path / "t.json", **change)
    with pytest.raises(ValueError, match=message):
        tokenizers.load(path)


@pytest.mark.parametrize("content", [b"{}", b"[1]", b"oops", b"\xff\xfe", b""])
def test_files_that_are_no_tokenizer(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json is not (a tokenizer\.json|readable)"):
        tokenizers.load(path)
    with pytest.raises(ValueError, match=r"none\.json is not readable"):
        tokenizers.load(tmp_path / "none.json")
