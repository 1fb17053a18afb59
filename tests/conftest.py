"""Test setting: eight fake CPU devices, quick compilation, strict rank promotion, no network."""
# ruff: noqa: E402 (XLA's flags must be set before jax is imported)

import os

os.environ["JAX_PLATFORMS"] = "cpu"
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Most of a test's time goes into compiling programs that run once: LLVM need not optimize them. The
    # programs are the same; child processes compile as a user's do.
    "--xla_backend_optimization_level=0",
)
for flag in FLAGS:
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

import itertools
import socket

import hypothesis
import jax
import pytest

from nanochat_jax.config import ModelConfig

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
# A program compiled by an earlier version of the code must not hide what this one does.
jax.config.update("jax_enable_compilation_cache", "JAX_COMPILATION_CACHE_DIR" in os.environ)


def _loopback_only(connect):
    def checked(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests must not use the network: {address}")
        return connect(self, address)

    return checked


socket.socket.connect = _loopback_only(socket.socket.connect)  # type: ignore[method-assign]
socket.socket.connect_ex = _loopback_only(socket.socket.connect_ex)  # type: ignore[method-assign]


MAPS = 40_000  # of the 65,530 memory maps that Linux gives a process; every compiled program takes some
_finished = itertools.count(1)


def pytest_runtest_teardown():
    """Drop compiled programs before maps run out, for then LLVM crashes; counting them takes a while."""
    if next(_finished) % 8 == 0 and os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps", "rb") as maps:
            many = sum(1 for _ in maps) > MAPS
        if many:
            jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def tiny():
    """A model that compiles in a second."""
    return ModelConfig(vocab_size=64, dim=32, layers=2, heads=2, kv_heads=2, head_dim=16, mlp_dim=64)


@pytest.fixture
def child_env(tmp_path):
    """Environment of child processes: one device, caches of their own."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS",)}
    return kept | {"JAX_PLATFORMS": "cpu", "NANOCHAT_JAX_HOME": str(tmp_path / "home")}
