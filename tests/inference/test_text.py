"""Bytes to text while they come: whole characters, stop strings across any borders."""

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from nanochat_jax.inference.text import reader


def read(data, cuts, stops):
    """Feed the bytes cut at `cuts`: (texts, stopped)."""
    feed, texts, stopped = reader(stops), [], False
    borders = [0, *sorted(cuts), len(data)]
    for start, end in itertools.pairwise(borders):
        text, stopped = feed(data[start:end], False)
        texts.append(text)
        if stopped:
            return texts, True
    text, stopped = feed(b"", True)
    return [*texts, text], stopped


ALPHABET = st.text(st.sampled_from("ab\u00e9\U0001f600"), max_size=12)


@given(
    ALPHABET, st.lists(st.text(st.sampled_from("ab\u00e9"), min_size=1, max_size=4), max_size=3), st.data()
)
@example("aab", ["ab"], None)
def test_equals_the_search_in_the_whole_text(text, stops, data):
    raw = text.encode()
    cuts = (
        list(range(len(raw))) if data is None else data.draw(st.lists(st.integers(0, len(raw)), max_size=9))
    )
    places = [text.find(stop) for stop in stops if stop in text]
    texts, stopped = read(raw, cuts, stops)
    assert stopped == bool(places)
    # A shorter stop that is complete first ends the answer where it stands, even if another one that is
    # still being written begins earlier: text that was found is not read again.
    expected = text[: min(places)] if places else text
    joined = "".join(texts)
    assert joined == expected or (places and any(text.startswith(joined + stop) for stop in stops))


@given(st.binary(max_size=30), st.data())
def test_any_bytes_give_the_text_that_decoding_at_once_gives(raw, data):
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=9))
    assert "".join(read(raw, cuts, [])[0]) == raw.decode(errors="replace")


def test_only_what_may_begin_a_stop_waits():
    feed = reader(["</end>"])
    assert feed(b"one <", False) == ("one ", False)
    assert feed(b"b>", False) == ("<b>", False)
    assert feed("\u00e9".encode()[:1], False) == ("", False)
    assert feed(b"", True) == ("\ufffd", False)
    feed = reader(["</end>"])
    assert feed(b"x</end", False) == ("x", False) and feed(b">y", False) == ("", True)
    assert feed(b"z", True) == ("", True)
