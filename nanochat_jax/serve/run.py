"""The server's process: the model's thread, the web's thread, and a main thread that waits for signals."""

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

try:
    import uvicorn  # type: ignore[import-not-found]
except ModuleNotFoundError:
    needed = "this needs the 'serve' extra: pip install \"nanochat_jax[serve]\""
    raise ModuleNotFoundError(needed, name="uvicorn") from None

from nanochat_jax import __version__
from nanochat_jax.config import Config, ConfigError, InferConfig
from nanochat_jax.inference import load
from nanochat_jax.serve.app import MAX_HEADERS, make_app
from nanochat_jax.serve.service import Limits, Service, work

log = logging.getLogger("nanochat_jax")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
POLL = 0.05  # seconds between looks at what has happened


def read_key(path: str) -> str:
    """The API key in a file that only its owner can read; "" without a file. Raises: ConfigError."""
    if path and Path(path).stat().st_mode & 0o077:
        raise ConfigError(f"{path} can be read by others; chmod 600 {path}")
    return Path(path).read_text(encoding="utf-8").strip() if path else ""


def load_service(
    cfg: Config, home: Path, infer: InferConfig, slots: int, limits: Limits, name: str
) -> Service:
    """A run's model as a service, not yet started. Raises: CheckpointError, ValueError."""
    started = time.monotonic()
    engine, tokenizer = load.load_engine(cfg, home, infer, slots)
    created = int((home / "config.json").stat().st_mtime)
    service = Service(engine, tokenizer, name, f"tokenizer-{tokenizer.sha256[:12]}", created, limits)
    service.metrics.set("build_info", 1, model=name, version=__version__)
    service.metrics.set("model_load_seconds", time.monotonic() - started)
    return service


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises: OSError if the address is taken."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise OSError(error.errno, f"{error.strerror}: {host} port {port}") from None
    made.listen(512)
    return made


def web(service: Service, listening: socket.socket) -> tuple[uvicorn.Server, threading.Thread]:
    """Start the web's thread; `should_exit` of the server ends it."""
    config = uvicorn.Config(
        make_app(service), log_config=None, access_log=False, lifespan="off", ws="none", http="h11",
        loop="asyncio", server_header=False, h11_max_incomplete_event_size=MAX_HEADERS, timeout_keep_alive=30,
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), name="web", daemon=True)
    thread.start()
    return server, thread


def serve(service: Service, host: str, port: int, tell: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT: then running answers get `limits.drain` seconds; a second signal ends
    them at once.

    tell: takes the line with the address, as soon as requests are answered.
    Returns: the exit status: 0, or 1 if a thread died (after everybody was answered).
    Raises: OSError if the address is taken.
    """
    listening = listen(host, port)
    signals: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: signals.append(number)) for number in numbers]
    model = threading.Thread(target=work, args=(service,), name="model", daemon=True)
    model.start()
    server, thread = web(service, listening)
    at = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    log.info("compiling; %s/ready says when that is done", at)

    def over() -> bool:
        return bool(signals) or service.failed.is_set() or not thread.is_alive()

    try:
        _wait(lambda: service.ready.is_set() or over(), float("inf"))
        if not over():
            tell(f"serving {service.name}: chat page {at}/ and OpenAI API {at}/v1")
        _wait(over, float("inf"))
        service.draining.set()
        died, left = not signals, service.open_requests
        if left[0] and not died:
            log.info(
                "finishing %d answers, at most %g s; again to stop at once", left[0], service.limits.drain
            )
        _wait(lambda: not left[0] or len(signals) > 1, 5 if died else service.limits.drain)
        died = died or service.failed.is_set()
        service.closing.set()
        server.should_exit = True
        thread.join(5)
        model.join(5)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        listening.close()
    return 1 if died else 0


def _wait(done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(POLL)
