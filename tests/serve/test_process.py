"""The process around the server: how it starts, stops on signals, and dies with its model."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import threading

import jax.numpy as jnp
import pytest

pytest.importorskip("uvicorn")

from serving import CFG, ONLY_TEXT, TOKENIZER, ask, events, make_engine, until

from nanochat_jax import checkpoint
from nanochat_jax.config import Config, InferConfig, to_dict
from nanochat_jax.serve import run, service
from nanochat_jax.types import TrainState

TEXT = "/v1/completions"


def started(monkeypatch, made, during):
    """(exit status of `serve`, result of during(port) in another thread, lines told)."""
    listened, told = [], []
    real = run.listen
    monkeypatch.setattr(run, "listen", lambda *where: listened.append(real(*where)) or listened[0])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:

        def when_told(line):
            told.append(line)
            results.append(pool.submit(during, listened[0].getsockname()[1]))

        results = []
        status = run.serve(made, "127.0.0.1", 0, when_told)
        return status, [result.result() for result in results], told


def test_sigterm_lets_answers_finish(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    made = service.Service(make_engine(slots=1), TOKENIZER, "tiny")
    body = {"prompt": "a", "max_tokens": 200, "logit_bias": ONLY_TEXT, "stream": True}

    def during(port):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, port, TEXT, body)
            until(lambda: made.metrics.get("tokens_generated_total") > 5)
            os.kill(os.getpid(), signal.SIGTERM)
            until(made.draining.is_set)
            late = ask(port, TEXT, body)
            return answer.result(), late

    status, [((_, _, raw), (refused, headers, _))], told = started(monkeypatch, made, during)
    assert status == 0 and told[0].startswith("serving tiny: chat page http://127.0.0.1:")
    assert refused == 503 and headers["retry-after"]
    assert events(raw)[-1] == "[DONE]" and len(events(raw)) > 20
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_dead_model_ends_the_process(monkeypatch, caplog):
    made = service.Service(make_engine(), TOKENIZER, "tiny")
    monkeypatch.setattr(service.schedule, "warm_up", lambda engine: None)
    monkeypatch.setattr(service.schedule, "run", lambda *_: threading.Event().wait(1.0) or 1 / 0)

    def during(port):
        return ask(port, TEXT, {"prompt": "a", "max_tokens": 3})

    status, [(code, _, answer)], _ = started(monkeypatch, made, during)
    assert status == 1 and code == 500 and answer["error"]["message"] == "the server is stopping"


def test_a_taken_port(monkeypatch):
    with run.listen("127.0.0.1", 0) as taken, pytest.raises(OSError, match=r"in use: 127\.0\.0\.1 port \d+"):
        run.listen("127.0.0.1", taken.getsockname()[1])


@pytest.fixture
def workdir(tmp_path):
    """What training leaves behind, without training."""
    home = tmp_path / "run"
    home.mkdir()
    config = Config(name="small", model=CFG, infer=InferConfig(capacity=64))
    (home / "config.json").write_text(json.dumps(to_dict(config)))
    TOKENIZER.save(home / "tokenizer.json")
    with checkpoint.Checkpointer(config.ckpt, home / "ckpt") as saver:
        saver.save(1, TrainState(jnp.int32(1), make_engine().params, {"count": jnp.int32(1)}), {}, wait=True)
    return home


@pytest.mark.multiprocess
@pytest.mark.slow
def test_commands(workdir, child_env):
    def command(room, *words):
        return [sys.executable, "-m", f"nanochat_jax.{room}", *words]

    serve = command("serve", f"--workdir={workdir}", "--port=0", "--slots=2")
    with subprocess.Popen(
        serve, env=child_env | {"NANOCHAT_JAX_API_KEY": "k"}, stdout=subprocess.PIPE, text=True
    ) as server:
        port = int(server.stdout.readline().split("http://127.0.0.1:")[1].split("/")[0])
        assert ask(port, TEXT, {"prompt": "a"})[0] == 401
        status, _, answer = ask(port, TEXT, {"prompt": "a", "max_tokens": 3}, Authorization="Bearer k")
        assert status == 200 and answer["model"] == "small"
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    for words, message in (
        ([f"--workdir={workdir}/no"], "is not a run: it has no config.json"),
        ([f"--workdir={workdir}", "--host=0.0.0.0"], "without an API key"),
        ([f"--workdir={workdir}", "--slots=0"], "--slots must be positive"),
        ([f"--workdir={workdir}", "--port=99999"], "--port must be 0 to 65535, got 99999"),
        ([f"--workdir={workdir}", "--drain=-5"], "--drain must not be negative, got -5"),
    ):
        done = subprocess.run(command("serve", *words), env=child_env, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr
    talk = command("inference", f"--workdir={workdir}", "--chat", "--max_tokens=5")
    done = subprocess.run(talk, env=child_env, input="hello\nyou\n", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("> ") == 3, done.stderr
