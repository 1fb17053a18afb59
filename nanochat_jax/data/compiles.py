"""Does a file of code compile? A filter on documents; the code is never run.

Python is compiled by this interpreter's own `compile`, Rust by `rustc` in a child process of
bounded time, memory and output, to metadata only: no linking, no build script, no macro of another
crate. A Rust file that names modules or crates which are not in the same file does not compile: the
filter is for code made to stand alone (verified or synthetic examples), and says nothing good about
a file of a larger crate that it drops.

Checks run in threads a little ahead of the reader, and come out in order.
"""

import os
import platform
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import PurePath
from typing import Any

from nanochat_jax.config import ConfigError, DataConfig

SECONDS = 10  # of a compiler, wall and CPU
MEMORY_KIB = 4 << 20  # address space of a compiler
FILE_BLOCKS = 1 << 17  # of 512 bytes, that a compiler may write to one file
SUFFIXES = {".rs": "rust", ".py": "python"}

# Outcomes of one document; "" = no code.
SEEN, COMPILED, FAILED = "not sampled", "compiled", "does not compile"


def _python(code: bytes) -> bool:
    """Whether this interpreter's compiler accepts a module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(code, "<document>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
            return False
    return True


def _rust(code: bytes) -> bool:
    """Whether rustc accepts a library of one file, edition 2021, without other crates than its own."""
    with tempfile.TemporaryDirectory(prefix="compiles.") as folder:
        command = [
            "/bin/sh", "-c", f'ulimit -t {SECONDS} -v {MEMORY_KIB} -f {FILE_BLOCKS}; exec "$@"', "sh",
            _rustc(), "--edition=2021", "--crate-type=lib", "--crate-name=document", "--emit=metadata",
            "--cap-lints=allow", "--error-format=short", "-o", os.path.join(folder, "out"), "-",
        ]  # fmt: skip
        child = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            child.communicate(code, SECONDS)
        except subprocess.TimeoutExpired:
            pass
        except OSError:  # it did not want the rest of the text
            pass
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        return child.returncode == 0


COMPILERS: dict[str, Callable[[bytes], bool]] = {"rust": _rust, "python": _python}


@cache
def _rustc() -> str:
    return shutil.which("rustc") or ""


@cache
def available(language: str) -> str:
    """Name and version of a language's compiler. Raises: ConfigError if there is none."""
    if language == "python":
        return f"python {platform.python_version()}"
    if not _rustc():
        raise ConfigError(
            "data.verify_every_n_examples needs rustc for files of Rust: install it (https://rustup.rs), "
            "or set data.verify_every_n_examples to 0"
        )
    told = subprocess.run([_rustc(), "--version"], capture_output=True, text=True, timeout=60)
    if told.returncode:
        raise ConfigError(f"{_rustc()} does not run: {told.stderr.strip().partition(chr(10))[0]}")
    return told.stdout.strip()


def request(cfg: DataConfig) -> list[Any]:
    """What the outcome depends on besides the texts."""
    rust = shutil.which("rustc")
    compilers = [available("python"), available("rust") if rust else ""]
    return [cfg.verify_every_n_examples, cfg.min_compile_rate, cfg.row_language, *compilers]


def language_of(name: str, row_language: str) -> str:
    """Language of a document by its name: of a file by its suffix, of a table's row as configured."""
    head, colon, index = name.rpartition(":")
    if colon and index.isdigit():
        return "" if head.endswith((".txt", ".md", ".rst")) else row_language
    return SUFFIXES.get(PurePath(name).suffix, "")


def outcomes(cfg: DataConfig, items: Iterator[tuple[Any, str, bytes | str]], seen: int) -> Iterator[tuple]:
    """(place, name, text or reason, outcome) of every item, in order; each n-th text of code is checked.

    Args: items: (place, name, bytes or the reason why there are none). seen: texts of code before
    these, which decides which ones are checked.
    Raises: ConfigError if a compiler is needed and missing.
    """
    every = cfg.verify_every_n_examples
    if not every:
        yield from ((*item, "") for item in items)
        return
    waiting: deque[tuple[tuple, Future | str]] = deque()
    ahead = 4 * (os.cpu_count() or 1)
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        try:
            for item in items:
                language = language_of(item[1], cfg.row_language) if isinstance(item[2], bytes) else ""
                outcome: Future | str = ""
                if language:
                    outcome = SEEN
                    if seen % every == 0:
                        available(language)
                        outcome = threads.submit(COMPILERS[language], item[2])
                    seen += 1
                waiting.append((item, outcome))
                if len(waiting) > ahead:
                    yield _done(*waiting.popleft())
            while waiting:
                yield _done(*waiting.popleft())
        finally:
            threads.shutdown(cancel_futures=True)


def _done(item: tuple, outcome: Future | str) -> tuple:
    if isinstance(outcome, Future):
        outcome = COMPILED if outcome.result() else FAILED
    return (*item, outcome)


def count(outcome: str, checks: Counter) -> None:
    """Add an outcome to the counts "seen", "checked" and "compiled"."""
    if outcome:
        checks["seen"] += 1
        checks["checked"] += outcome != SEEN
        checks["compiled"] += outcome == COMPILED


def too_few(cfg: DataConfig, checks: Counter) -> str:
    """What is wrong with a source of these counts, or ""."""
    checked, compiled = checks["checked"], checks["compiled"]
    if compiled >= cfg.min_compile_rate * checked:
        return ""
    return (
        f"'{cfg.source}': {compiled} of {checked} checked files compile, a share of {compiled / checked:.3f}, "
        f"expected at least data.min_compile_rate = {cfg.min_compile_rate}"
    )
