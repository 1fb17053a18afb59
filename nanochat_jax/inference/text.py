"""From bytes as they come to text that may be shown: whole characters, and nothing of a stop string."""

import codecs
from collections.abc import Callable, Iterable


def reader(stops: Iterable[str] = ()) -> Callable[[bytes, bool], tuple[str, bool]]:
    """Build feed(data, end) -> (text, stopped) for the bytes of one answer.

    Bytes of an unfinished character wait for the others (at most 3). Text that may be the beginning of a
    stop string waits until it is known. At the first stop string the answer ends before it: stopped is
    True and all later text is dropped. With `end`, what waits comes out, half a character as U+FFFD.
    The work per call does not grow with the length of the answer.
    """
    wanted = tuple(stops)
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    held, stopped = "", False

    def feed(data: bytes, end: bool = False) -> tuple[str, bool]:
        nonlocal held, stopped
        text = held + decode(data, end)
        if stopped:
            return "", True
        found = [place for stop in wanted if (place := text.find(stop)) >= 0]
        if found:
            held, stopped = "", True
            return text[: min(found)], True
        keep = 0 if end else max((_overlap(text, stop) for stop in wanted), default=0)
        held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    return feed


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, shorter than `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
