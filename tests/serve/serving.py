"""A server over a tiny random model with the byte tokenizer, for the tests of this folder."""

import contextlib
import http.client
import json
import threading
import time

import jax

from nanochat_jax import params as params_lib
from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import BLOCKS, ModelConfig
from nanochat_jax.inference import schedule
from nanochat_jax.model import transformer
from nanochat_jax.serve import run, service

TOKENIZER = tokenizers.byte_tokenizer()
CFG = ModelConfig(
    vocab_size=266, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=64, **BLOCKS["modern"]
)
ONLY_TEXT = {str(i): -100 for i in range(10)}  # a bias against special tokens, so that answers go on


def make_engine(slots=4, capacity=256, params=None):
    if params is None:
        params = params_lib.init_params(transformer.param_specs(CFG), jax.random.key(0))
        params |= {"head": 0.05 * jax.random.normal(jax.random.key(1), params["head"].shape)}
    params = jax.device_put(params, jax.devices()[0])
    return schedule.Engine(CFG, params, known=266, slots=slots, capacity=capacity, chunk=32)


@contextlib.contextmanager
def served(made_engine, work=service.work, **limits):
    """Yield (service, port) of a running server."""
    made = service.Service(made_engine, TOKENIZER, "tiny", "f", 1, service.Limits(**limits))
    listening = run.listen("127.0.0.1", 0)
    model = threading.Thread(target=work, args=(made,), daemon=True)
    model.start()
    server, web = run.web(made, listening)
    assert made.ready.wait(300)
    while not server.started:
        time.sleep(0.01)
    try:
        yield made, listening.getsockname()[1]
    finally:
        made.closing.set()
        server.should_exit = True
        web.join(10)
        model.join(10)
        listening.close()


def ask(port, path, body=None, method=None, **headers):
    """(status, headers, body) of one request; a dict is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.request(method or ("POST" if data is not None else "GET"), path, data, headers)
    answer = connection.getresponse()
    raw = answer.read()
    connection.close()
    kind = answer.headers.get("content-type", "")
    return answer.status, answer.headers, json.loads(raw) if kind == "application/json" else raw


def events(raw):
    """Data of a stream's events."""
    blocks = [block for block in raw.decode().split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") for block in blocks)
    return [block[6:] if block[6:] == "[DONE]" else json.loads(block[6:]) for block in blocks]


def until(true, seconds=20):
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
