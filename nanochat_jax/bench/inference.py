"""Speed of a trained run's answers: first token, tokens per second, server, and transformers beside it.

Protocol: greedy answers to prompts of the run's own tokenizer (this package's source as text), after
warm-up; every number is the median of `repeats`, with the fastest and slowest. All requests go through the
engine that the server and the chat use (inference/schedule.py). Decoding is timed while all rows are at it:
from the moment when all have their first token until the first has its last (with drafts they differ). The
server is a real one on this machine's loopback, its clients a process of their own. transformers runs in
another interpreter while this one sleeps, on a folder that `export` wrote.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from nanochat_jax import chat
from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import Config
from nanochat_jax.export import hf, publish, tokenization
from nanochat_jax.inference import load, schedule, slots, speculative
from nanochat_jax.inference.schedule import Engine, Job, Request
from nanochat_jax.quant import project as projections
from nanochat_jax.types import Params

FIRST, PROMPT, ROWS = 64, 24, 8  # tokens of the prompt to the first token; of others; rows of a full batch
HERE = Path(__file__).resolve().parent
BARS = {"first_token_ms": 50.0, "server_ms_per_token": 0.3, "peer_rows_1": 1.3, "peer_rows_8": 3.0}


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def prompts(tokenizer: tokenizers.Tokenizer, length: int, count: int) -> list[tuple[int, ...]]:
    """`count` pieces of text that begin differently, each `length` tokens. Raises: ValueError."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.py")))
    ids = tokenizer.encode(text)
    if len(ids) < count * length:
        raise ValueError(f"needs a text of {count * length} tokens, this one has {len(ids)}")
    return [tuple(ids[i * length : (i + 1) * length]) for i in range(count)]


def drafts_of(cfg: Config) -> tuple[int, int]:
    """(draft_tokens, draft_loops) to measure: the run's own, else what its model can do; (0, 0) = nothing."""
    if cfg.infer.draft_tokens:
        return cfg.infer.draft_tokens, cfg.infer.draft_loops
    if cfg.model.mtp.depth:
        return cfg.model.mtp.depth, 0
    return (4, 1) if cfg.model.loop.count > 1 else (0, 0)


def programs() -> int:
    """Programs of the engine that are compiled by now."""
    made = (slots.admit, slots.fill, slots.step, speculative.fill, speculative.step)
    return sum(program._cache_size() for program in made)  # type: ignore[attr-defined]


def answered(
    engine: Engine,
    rounds: list[list[Request]],
    observe: Callable[[str, float], None] = lambda name, value: None,
) -> tuple[list[list[list[float]]], int]:
    """Answer rounds of requests, each when the one before is over.

    Returns: for every round and request the time of its submission and of every token, in seconds; and how
    many programs were compiled after the warm-up.
    """
    times: list[list[list[float]]] = []
    waiting: list[Job] = []
    left = list(rounds)

    def take(idle: bool) -> Job | None:
        if idle and not waiting and left:
            requests = left.pop(0)
            times.append([[time.perf_counter()] for _ in requests])
            waiting.extend(_timed(request, own) for request, own in zip(requests, times[-1], strict=True))
        return waiting.pop(0) if waiting else None

    ready = schedule.warm_up(engine)
    before = programs()
    schedule.run(engine, take, observe, ready)
    return times, programs() - before


def _timed(request: Request, times: list[float]) -> Job:
    def emit(token: schedule.Token) -> bool:
        times.append(time.perf_counter())
        return True

    def finish(reason: str, message: str) -> None:
        if reason != "length":
            raise RuntimeError(f"a measured answer ended with {reason}: {message}")

    return Job(request, emit, finish)


def _greedy(prompt: tuple[int, ...], tokens: int) -> Request:
    return Request(prompt, tokens, temperature=0.0)


def first_token(engine: Engine, given: list[tuple[int, ...]]) -> dict[str, float]:
    """Milliseconds from a request to its first token."""
    rounds = [[_greedy(prompt, 1)] for prompt in given]
    times, _ = answered(engine, rounds)
    return spread([1e3 * (own[0][1] - own[0][0]) for own in times[1:]])


def decode(engine: Engine, given: list[tuple[int, ...]], tokens: int) -> dict[str, Any]:
    """Tokens per second of all rows together, and programs compiled after the warm-up."""
    told: dict[str, float] = {}
    n = engine.slots
    rounds = [[_greedy(p, tokens) for p in given[i : i + n]] for i in range(0, len(given) - n + 1, n)]
    answers, compiles = answered(engine, rounds, told.__setitem__)
    rates = []
    for own in answers[1:]:
        began, ended = max(times[1] for times in own), min(times[-1] for times in own)
        if ended <= began:
            raise RuntimeError(
                f"one answer of {tokens} tokens ended before the last one began: ask for more --tokens"
            )
        rates.append(sum(began < t <= ended for times in own for t in times[1:]) / (ended - began))
    accepted = [value for name, value in sorted(told.items()) if name.startswith("accepted_")]
    return {
        "rows": n, "tokens_per_second": spread(rates), "compiles": compiles,
        "draft_tokens": engine.draft_tokens, "draft_loops": engine.draft_loops,
        "accepted": accepted, "drafts_at_the_end": told.get("drafts", 0.0),
    }  # fmt: skip


def server(engine: Engine, tokenizer: tokenizers.Tokenizer, given: list, tokens: int) -> dict[str, Any]:
    """Milliseconds that the server adds to each token of ROWS streams: whole answers by HTTP against the same
    by the engine alone. {"skipped": reason} without the server's packages."""
    try:
        from nanochat_jax.serve import run, service
    except ModuleNotFoundError as error:
        return {"skipped": str(error)}
    bias = dict.fromkeys(chat.stop_ids(tokenizer), -100.0)  # an answer that ends early would look fast
    rounds = [
        [Request(p, tokens, temperature=0.0, bias=bias) for p in given[i : i + ROWS]]
        for i in range(0, len(given) - ROWS + 1, ROWS)
    ]
    direct = [max(t[-1] for t in own) - min(t[0] for t in own) for own in answered(engine, rounds)[0]]
    made = service.Service(engine, tokenizer, "bench")
    model = threading.Thread(target=service.work, args=(made,), daemon=True)
    model.start()
    made.ready.wait()
    listening = run.listen("127.0.0.1", 0)
    web, thread = run.web(made, listening)
    try:
        bodies = [
            [
                {"prompt": list(r.prompt), "max_tokens": tokens, "temperature": 0, "stream": True,
                 "logit_bias": {str(i): v for i, v in bias.items()}}
                for r in own
            ]
            for own in rounds
        ]  # fmt: skip
        port = listening.getsockname()[1]
        served = _child(sys.executable, "inference_client.py", {"port": port, "rounds": bodies})
    finally:
        made.closing.set()
        web.should_exit = True
        thread.join(5)
        model.join(5)
        listening.close()
    count = ROWS * tokens
    extra = [1e3 * (a - b) / count for a, b in zip(served["seconds"][1:], direct[1:], strict=True)]
    return {"ms_per_token": spread(extra), "streams": ROWS}


def _child(interpreter: str, script: str, given: dict) -> dict[str, Any]:
    """What a script of this folder answers, both as JSON. Raises: RuntimeError with its last line."""
    command = [interpreter, str(HERE / script)]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RuntimeError(f"{script} in {interpreter}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peer(
    cfg: Config, params: Params, tokenizer: tokenizers.Tokenizer, interpreter: str, first: list, given: list,
    tokens: int, threads: int,
) -> dict[str, Any]:  # fmt: skip
    """transformers' `generate` on the exported folder: the same numbers; the reason if it cannot export."""
    if found := publish.problems(cfg, publish.Options()):
        return {"skipped": "; ".join(found)}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        target.mkdir()
        context = max(cfg.data.seq_len, FIRST + 2, PROMPT + tokens + 1)
        form = hf.write_model(
            target, cfg.model, params, cfg.infer, tokenization.ids(tokenizer), context, "float32",
            "dequantized" if cfg.model.quant.startswith("ternary") else "",
        )  # fmt: skip
        words = {
            "folder": str(target),
            "first": first,
            "prompts": given,
            "rows": [1, ROWS],
            "threads": threads,
        }
        record = _child(interpreter, "inference_peer.py", words | {"tokens": tokens})
    record["first_token_ms"] = spread(record["first_token_ms"])
    for row in record["decode"]:
        row["tokens_per_second"] = spread(row["tokens_per_second"])
    return record | {"architecture": form[0], "weights": form[1]}


def inference(
    cfg: Config, home: Path, peer_python: str = "", repeats: int = 5, tokens: int = 64, threads: int = 0
) -> dict[str, Any]:
    """Measure the run in `home`; returns a JSON-able record.

    Args: peer_python: interpreter with torch and transformers; "" = without. tokens: of each answer.
    threads: of torch; 0 = as many as torch takes. Raises: CheckpointError, ValueError, RuntimeError.
    """
    tokenizer, params = tokenizers.load(home / "tokenizer.json"), load.load_params(cfg, home)
    known = min(tokenizer.vocab_size, cfg.model.vocab_size)
    capacity = max(cfg.infer.capacity, FIRST + 1, PROMPT + tokens)
    firsts = prompts(tokenizer, FIRST, repeats + 1)
    given = prompts(tokenizer, PROMPT, (repeats + 1) * ROWS)
    kinds = projections.forms(cfg.model)
    usual = load.form(cfg.model, cfg.infer)
    count, loops = drafts_of(cfg)

    def engine(weights: str, rows: int, drafts: tuple[int, int] = (0, 0)) -> Engine:
        infer = dataclasses.replace(cfg.infer, weights=weights, impl="auto")
        return Engine(
            cfg.model, load.placed(cfg.model, params, infer, rows), known, rows, capacity, 64,
            draft_tokens=drafts[0], draft_loops=drafts[1],
        )  # fmt: skip

    rows = []
    for weights in kinds:
        for n in (1, ROWS):
            for drafts in ((0, 0), *(((count, loops),) if count else ())):
                found = decode(engine(weights, n, drafts), given[: (repeats + 1) * n], tokens)
                rows.append({"weights": weights} | found)
    device = jax.devices()[0]
    record: dict[str, Any] = {
        "prompt_tokens": FIRST, "answer_tokens": tokens, "repeats": repeats, "capacity": capacity,
        "weights": usual, "first_token_ms": first_token(engine(usual, 1), firsts),
        "decode": rows,
        "server": server(engine(usual, ROWS), tokenizer, given, tokens),
        "peer": peer(cfg, params, tokenizer, peer_python, firsts, given, tokens, threads)
        if peer_python else {"skipped": "no --peer_python"},
        "speculation": "measured" if count else "this model has neither layers of model.mtp nor loops",
        "device": device.device_kind, "jax": jax.__version__, "model": dataclasses.asdict(cfg.model),
    }  # fmt: skip
    return record | {"bars": bars(record)}


def plain_rate(record: dict[str, Any], rows: int) -> float:
    """Median tokens per second without drafts, of the weights that serve if nothing is said."""
    found = (
        r for r in record["decode"]
        if r["rows"] == rows and r["weights"] == record["weights"] and not r["draft_tokens"]
    )  # fmt: skip
    return next(found)["tokens_per_second"]["median"]


def bars(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What was promised, what was measured, and whether it holds; only of what was measured."""
    found = [
        ("first token of 64, ms", record["first_token_ms"]["median"], "<=", BARS["first_token_ms"]),
        ("compiles after warm-up", sum(row["compiles"] for row in record["decode"]), "<=", 0),
    ]
    if "ms_per_token" in record["server"]:
        value = record["server"]["ms_per_token"]["median"]
        found.append(("server, ms per token", value, "<=", BARS["server_ms_per_token"]))
    for row in record["peer"].get("decode", []):
        ratio = plain_rate(record, row["rows"]) / row["tokens_per_second"]["median"]
        found.append(
            (f"times transformers, {row['rows']} rows", ratio, ">=", BARS[f"peer_rows_{row['rows']}"])
        )
    for row in record["decode"]:
        if row["draft_tokens"]:
            same = ("rows", "weights")
            plain = next(
                r for r in record["decode"] if not r["draft_tokens"] and all(r[k] == row[k] for k in same)
            )
            ratio = row["tokens_per_second"]["median"] / plain["tokens_per_second"]["median"]
            found.append((f"drafts against none, {row['rows']} rows, {row['weights']}", ratio, ">=", 0.95))
    return [
        {"what": what, "value": value, "bar": f"{sign} {bar}", "met": value <= bar if sign == "<=" else value >= bar}
        for what, value, sign, bar in found
    ]  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    lines = [f"first token of a {FIRST}-token prompt: {_range(record['first_token_ms'])} ms"]
    for row in record["decode"]:
        drafted = f", {row['draft_tokens']} drafts" if row["draft_tokens"] else ""
        if row["accepted"]:
            shares = ", ".join(f"{100 * share:.0f}%" for share in row["accepted"])
            drafted += f" ({shares} accepted, {row['drafts_at_the_end']:.0f} in use at the end)"
        lines.append(
            f"decode, {row['rows']} rows, {row['weights']} weights{drafted}: "
            f"{_range(row['tokens_per_second'])} tokens/s, {row['compiles']} compiles after warm-up"
        )
    if record["speculation"] != "measured":
        lines.append(f"drafts: {record['speculation']}")
    served, other = record["server"], record["peer"]
    lines.append(
        f"server at {ROWS} streams: "
        + (f"{_range(served['ms_per_token'])} ms a token" if "ms_per_token" in served else served["skipped"])
    )
    if "decode" in other:
        lines.append(
            f"transformers {other['transformers']}, torch {other['torch']}, {other['threads']} threads:"
        )
        lines.append(f"  first token: {_range(other['first_token_ms'])} ms")
        lines += [
            f"  decode, {row['rows']} rows: {_range(row['tokens_per_second'])} tokens/s"
            for row in other["decode"]
        ]
    else:
        lines.append(f"transformers: {other['skipped']}")
    lines += [
        f"{'met   ' if bar['met'] else 'missed'} {bar['what']}: {bar['value']:.2f} ({bar['bar']})"
        for bar in record["bars"]
    ]
    return "\n".join(lines)


def _range(found: dict[str, float]) -> str:
    return f"{found['median']:.3g} ({found['min']:.3g} to {found['max']:.3g})"
