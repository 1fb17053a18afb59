"""How many steps at a time: as many as fit into a moment. How many tokens to draft ahead: from what a step with
so many drafts costs and how many of them come true.

With c(d) the seconds of a step with d drafts and a_k the share of k-th drafts that were right where all
before them were, a step yields 1 + sum_{k <= d} a_1 .. a_k tokens; taken is the d with the most tokens per
second, and none at all (d = 0, plain decoding) if that is less than GAIN times what plain steps yield. Times
decide about time only: a text does not depend on them, see inference/speculative.py.

A step costs what lies between its tokens and those of the step before: with one under way while the other is
read, that is less than a step that is waited for. So lengths are tried in turns of a few steps, where a busy
moment of the machine meets all of them, dispatched together where that is how they will be; what follows a step of
another length is not counted if it is a single one. The decision hopes: a_k counts one draft more than was seen
as right. Who drafts too much soon sees it, but who has stopped sees nothing more.
"""

import statistics
from typing import NamedTuple

TURN = 4  # steps of one length after another while lengths are tried; most in a turn of the schedule
RUNS = 6  # measured steps of each length; their median counts, so that a compilation among them does not
GAIN = 1.1  # drafts must promise so many times the tokens of plain steps: less is within the spread of their times
RENEW = 4096  # steps after which they are measured anew
FORGET = 1 / 64  # weight of the newest step in the shares
MOMENT = 0.01  # seconds; nobody sees that what comes within it comes at once
NEWEST = 1 / 4  # weight of the newest in the time of a step


class Pace(NamedTuple):
    """What was seen so far."""

    lengths: tuple[int, ...]  # numbers of drafts that may be wanted, from 0 on
    seconds: tuple[tuple[float, ...], ...]  # measured steps, for each of the lengths
    right: tuple[float, ...]  # weight of right drafts, by place
    tried: tuple[float, ...]  # weight of those whose predecessors all were right
    steps: int = 0  # since the measurement began


def burst(seconds: float) -> int:
    """Steps that fit into a moment, if each takes so many seconds; 0 = that is not known yet."""
    return max(1, int(MOMENT / seconds)) if seconds else 1


def smooth(seconds: float, newest: float | None) -> float:
    """Seconds of a step, known from earlier ones (0: not known) and the newest (None: not measured)."""
    if newest is None:
        return seconds
    return seconds + (newest - seconds) * NEWEST if seconds else newest


def start(most: int) -> Pace:
    """Nothing seen; at most `most` drafts (>= 1): 0, the powers of two below, and all of them."""
    powers = [1 << i for i in range(most.bit_length()) if 1 << i < most]
    lengths = (0, *powers, most)
    return Pace(lengths, ((),) * len(lengths), (0.0,) * most, (0.0,) * most)


def wanted(pace: Pace, timed: bool = True) -> int:
    """Drafts of the next step. timed: its time will be known; what will not is no step to try something with."""
    if timed and trying(pace):
        return pace.lengths[pace.steps // TURN % len(pace.lengths)]
    known = [length for length, seconds in zip(pace.lengths, pace.seconds, strict=True) if seconds]
    return max(known, key=lambda length: (rate(pace, length) * (1 if length else GAIN), -length), default=0)


def trying(pace: Pace) -> bool:
    """Whether something is not measured yet."""
    return min(map(len, pace.seconds)) < RUNS


def rate(pace: Pace, length: int) -> float:
    """Tokens per second and row with so many drafts, as far as is known and hoped."""
    cost = statistics.median(pace.seconds[pace.lengths.index(length)])
    hoped = tuple((r + 1.0) / (t + 1.0) for r, t in zip(pace.right, pace.tried, strict=True))
    return expected(hoped[:length]) / max(cost, 1e-9)


def expected(shares: tuple[float, ...]) -> float:
    """Tokens per step and row when the k-th draft is right in a_k of the cases where all before it are."""
    tokens = every = 1.0
    for share in shares:
        every *= share
        tokens += every
    return tokens


def shares(pace: Pace) -> tuple[float, ...]:
    """a_k by place k = 1.. as seen; 0 where nothing was."""
    return tuple(r / t if t else 0.0 for r, t in zip(pace.right, pace.tried, strict=True))


def seen(pace: Pace, length: int, counts: list[int], seconds: float | None = None) -> Pace:
    """After a step with `length` drafts.

    Args: counts: tokens that each row got, 1..length + 1. seconds: from the tokens of the step before to
    these, if that had the same length and nothing else lies between; None if not.
    """
    times = pace.seconds
    if pace.steps >= RENEW:
        times, pace = ((),) * len(times), pace._replace(steps=0)
    if seconds is not None:
        place = pace.lengths.index(length)
        times = (*times[:place], (*times[place], seconds)[:RUNS], *times[place + 1 :])
    right, tried = list(pace.right), list(pace.tried)
    for k in range(length):
        reached = sum(count > k for count in counts)
        if reached:
            right[k] += sum(count > k + 1 for count in counts) - FORGET * right[k]
            tried[k] += reached - FORGET * tried[k]
    return pace._replace(seconds=times, right=tuple(right), tried=tuple(tried), steps=pace.steps + 1)


def line(pace: Pace) -> str:
    """The acceptance for people; "" if nothing was drafted."""
    if not any(pace.tried):
        return ""
    found = [f"{100 * share:.0f}%" for share, tried in zip(shares(pace), pace.tried, strict=True) if tried]
    length, measuring = wanted(pace), trying(pace)
    now = "" if measuring or length else "; none are drafted any more: plain steps are faster here"
    most = max(length, 1) if not measuring else len(found)
    return (
        f"{', '.join(found)} of the drafts came true (first place first), "
        f"{expected(shares(pace)[:most]):.2f} tokens per step with {most}{now}"
    )
