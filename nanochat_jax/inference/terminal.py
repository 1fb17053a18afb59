"""A chat in the terminal: lines in, answers as they are drawn."""

import signal
import sys
from collections.abc import Callable

from nanochat_jax import chat
from nanochat_jax.config import InferConfig
from nanochat_jax.inference import schedule
from nanochat_jax.inference.text import reader
from nanochat_jax.tokenizer import Tokenizer


def talk(
    engine: schedule.Engine,
    tokenizer: Tokenizer,
    ask: Callable[[], str | None],
    write: Callable[[str], None],
    request: schedule.Request,
    interrupted: Callable[[], bool] = lambda: False,
    system: str = "",
) -> None:
    """Chat until `ask` returns None. /clear forgets the conversation, but not `system`.

    A conversation that no longer fits loses its oldest turns, and `write` says so. What was said before is
    in the engine's cache already, so that only the new line is read.
    Args: ask: gives the next line. write: takes text to show at once. request: controls of the draw, its
    seed counted up with every answer; max_tokens bounds each answer. interrupted: ends the answer, which
    stays in the conversation as far as it went.
    Raises: ValueError if the tokenizer has no marks for turns.
    """
    first = [{"role": "system", "content": system}] if system else []
    history: list[dict[str, str]] = []
    chat.render(tokenizer, first)
    answers = 0

    def fitting() -> tuple[list[int], int]:
        """The prompt of the conversation, and tokens that the answer may have."""
        ids = chat.prompt(tokenizer, first + history)
        while len(history) > 1 and len(ids) + min(request.max_tokens, engine.capacity // 2) > engine.capacity:
            del history[:2]
            write("(the oldest turn is forgotten)\n")
            ids = chat.prompt(tokenizer, first + history)
        return ids, min(request.max_tokens, engine.capacity - len(ids))

    def take(idle: bool) -> schedule.Job | None:
        nonlocal answers
        while idle:
            line = ask()
            if line is None:
                return None
            if line.strip() == "/clear":
                history.clear()
            elif line.strip():
                history.append({"role": "user", "content": line})
                ids, room = fitting()
                if room > 0:
                    answers += 1
                    return _job(ids, room, answers)
                history.pop()
                write(f"(this line is too long: {len(ids)} tokens, the context has {engine.capacity})\n")
        return None

    def _job(ids: list[int], room: int, number: int) -> schedule.Job:
        feed, said = reader(), []

        def show(text: str) -> None:
            said.append(text)
            write(text)

        def emit(token: schedule.Token) -> bool:
            show(feed(tokenizer.decode_bytes([token.id]), False)[0])
            return True

        def finish(reason: str, message: str) -> None:
            show(feed(b"", True)[0])
            history.append({"role": "assistant", "content": "".join(said)})
            write(f"({message})\n" if message else "\n")

        changed = request.__dict__ | {
            "prompt": tuple(ids), "max_tokens": room, "seed": request.seed + number - 1,
            "stop_ids": chat.stop_ids(tokenizer),
        }  # fmt: skip
        return schedule.Job(schedule.Request(**changed), emit, finish, interrupted)

    schedule.run(engine, take)


def main(
    engine: schedule.Engine, tokenizer: Tokenizer, settings: InferConfig, seed: int, system: str = ""
) -> int:
    """`talk` with standard input and output. Ctrl-C ends the answer, or the chat where it waits for a line."""
    pressed: list[int] = []

    def ask() -> str | None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            return None
        finally:
            pressed.clear()
            signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
        return line

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    request = schedule.Request(
        (), settings.max_tokens, settings.temperature, settings.top_k, settings.top_p, seed=seed
    )
    before = signal.getsignal(signal.SIGINT)
    try:
        talk(engine, tokenizer, ask, write, request, lambda: bool(pressed), system)
    finally:
        signal.signal(signal.SIGINT, before)
    write("\n")
    return 0
