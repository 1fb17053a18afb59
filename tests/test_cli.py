"""The command line: every mistake gets its sentence and status, and jax is not started for it."""

import copy
import errno
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from nanochat_jax import cli, config
from nanochat_jax.cli import Flag
from nanochat_jax.config import Config, ConfigError

FLAGS = {
    "resume": Flag("auto", "continue or not", ("auto", "never", "must")),
    "dry_run": Flag(False, "touch no data"),
    "count": Flag(3, "of things"),
    "heat": Flag(0.5, "of draws"),
    "prompt": Flag("", "text"),
}


def call(monkeypatch, *words, main=lambda cfg, invocation: 0, **kwargs):
    """Exit status of a room that is called with these words."""
    monkeypatch.setattr(sys, "argv", ["room", *words])
    with pytest.raises(SystemExit) as caught:
        cli.run("train", main, FLAGS, **kwargs)
    return caught.value.code or 0


def write(path: Path, body: str) -> str:
    path.write_text(f"from nanochat_jax.config import defaults\n{body}")
    return str(path)


def make(path: Path, *lines: str) -> str:
    """A config file whose get_config has these lines."""
    body = "".join(f"    {line}\n" for line in lines)
    return write(path, f"def get_config(arg=''):\n    c = defaults()\n{body}    return c\n")


# --- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--config=tiny", "--config.model.dimm=3"],
            "config error: no key 'model.dimm'. Did you mean 'model.dim'? (tiny)",
        ),
        (["--config=tiny", "--config.model=3"], "config error: 'model' is a group of settings"),
        (["--config=tiny", "--config.model.dim=x"], "config error: 'model.dim' must be int, got 'x'"),
        (["--config=tiny", "--config.model.dim=1.5"], "'model.dim' must be int, got 1.5 (float)"),
        (["--config=tiny", "--config.train.steps=1e3"], "'train.steps' must be int, got 1000.0 (float)"),
        (["--config=tiny", "--config.opt.clip=inf"], "'opt.clip' must be float, got 'inf'"),
        (["--config=tiny", "--config.data.shuffle=maybe"], "'data.shuffle' must be true or false"),
        (["--config=tiny", "--noconfig.model.dim"], "'model.dim' must be int, got 'false'"),
        (["--config=tiny", "--config.model.window=('a',)"], "'model.window' must be int, got 'a'"),
        (["--config=tiny", "--config.train.loss={[]:1}"], "'train.loss' must be tuple"),
        (["--config=tiny", "--config.model.layers=0"], "'model.layers' must be at least 1, got 0 (tiny)"),
        (["--config=tinny"], "config error: no config 'tinny' (looked for tinny.py, configs/tinny.py, "),
        (["--config=tinny"], "smoke, tiny, tiny_rust. Did you mean 'tiny'?"),
        (["--config=elsewhere/tiny.py"], "no config 'elsewhere/tiny.py'"),
        (["--config=:x"], "no config ''"),
        (["--config=tiny:presat=x"], "config argument 'presat=x': expected key=value. Did you mean 'preset'"),
        ([], "usage error: --config is missing, e.g. --config=configs/tiny.py; known: auto, config_a"),
        (["--config"], "usage error: --config needs a value"),
        (["--config=tiny", "--workdir="], "usage error: --workdir needs a value"),
        (["--config=tiny", "--config.train.steps"], "--config.train.steps needs a value"),
        (["--config=tiny", "--resme=never"], "usage error: no flag --resme. Did you mean --resume?"),
        (["--config=tiny", "--model.dim=3"], "no flag --model.dim. Did you mean --config.model.dim?"),
        (["--config=tiny", "--zzz"], "no flag --zzz; see --help"),
        (["--config=tiny", "--resume=maybe"], "--resume must be one of auto, never, must, got 'maybe'"),
        (["--config=tiny", "--resume"], "--resume needs a value: continue or not"),
        (["--config=tiny", "--dry_run=perhaps"], "--dry_run must be true or false"),
        (["--config=tiny", "--count=x"], "--count must be int, got 'x'"),
        (["--config=tiny", "--heat=nan"], "--heat must be finite"),
        (["--config=tiny", "leftover"], "usage error: unexpected 'leftover'"),
    ],
)
def test_mistakes_are_one_line_with_status_two(monkeypatch, capsys, words, message):
    assert call(monkeypatch, *words) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


@pytest.mark.parametrize("words", [["--verbosity=1"], ["-v"], ["--verbosity", "1"]])
def test_verbosity_adds_the_traceback(monkeypatch, capsys, words):
    assert call(monkeypatch, "--config=tiny", "--config.x=1", *words) == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed and printed.splitlines()[-1].startswith("config error: no key 'x'")


@pytest.mark.parametrize("words", [["--prompt=a --verbosity=1"], ["--verbosity=0"], ["--verbosity"], []])
def test_other_words_do_not(words):
    assert not cli._verbose(words)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def get_config(arg=''):\n    raise RuntimeError('oops')\n", "c.py, line 3: RuntimeError: oops"),
        ("def (\n", "c.py, line 2: invalid syntax"),
        ("import nowhere\n", "c.py, line 2: ModuleNotFoundError: No module named 'nowhere'"),
        ("x = 1\n", "c.py has no function get_config(arg)"),
        ("def get_config(arg=''):\n    pass\n", "c.py: get_config returned NoneType, expected a ConfigDict"),
        ("def get_config(arg=''):\n    return {}['model']\n", "c.py, line 3: KeyError: 'model'"),
        ("def get_config(arg=''):\n    return [].model\n", "c.py, line 3: AttributeError: 'list' object"),
    ],
)
def test_broken_config_files(monkeypatch, capsys, tmp_path, source, message):
    path = write(tmp_path / "c.py", source)
    assert call(monkeypatch, f"--config={path}", "--config.train.steps=10") == 2
    printed = capsys.readouterr().err
    assert f"config error: {message}" in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c.model.dimm = 3", "c.py, line 4: no key 'dimm'. Did you mean 'model.dim'?"),
        ("c.model.update(dimm=3)", "c.py, line 4: no key 'dimm'. Did you mean 'model.dim'?"),
        ("print(c.opt.matrix.lrr)", "c.py, line 4: no key 'lrr'. Did you mean"),
        ("c.model.dim = 'a'", "c.py, line 4: TypeError: Could not override field 'dim'"),
    ],
)
def test_wrong_settings_in_config_files(tmp_path, line, message):
    with pytest.raises(ConfigError) as caught:
        cli.get_config(make(tmp_path / "c.py", line))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must hold an object of settings, got list"),
        ("{", "is not JSON"),
        ('{"model": 3}', "'model' must be a group of settings, got 3"),
        ('{"model": {"dimm": 3}}', "no key 'model.dimm'. Did you mean 'model.dim'? (c.json)"),
        ('{"model": {"dim": "3"}}', "'model.dim' must be int, got '3' (str)"),
    ],
)
def test_broken_json_configs(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        cli.get_config(str(tmp_path / "c.json"))
    assert message in str(caught.value)


def test_a_config_that_lacks_groups_is_told_where_to_start(tmp_path):
    path = write(
        tmp_path / "c.py",
        "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict()\n",
    )
    assert cli.get_config(path) == Config()
    with pytest.raises(ConfigError, match=r"c.py has no setting 'train.steps' of the usual type; start from"):
        cli.get_config(path, **{"train.steps": 3})


def test_json_configs_take_no_argument(tmp_path):
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(ConfigError, match="takes no argument, got 'preset=seed'"):
        cli.get_config(f"{tmp_path / 'c.json'}:preset=seed")


class OwnError(ValueError):
    exit_code = 3


OwnError.__module__ = "nanochat_jax.somewhere"


def _no_package():
    import nowhere_to_be_found  # noqa: F401 # pyright: ignore[reportMissingImports]


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("action", "status", "message"),
    [
        (lambda: 4, 4, ""),
        (lambda: None, 0, ""),
        (lambda: _raise(OwnError("the disk")), 3, "error: the disk\n"),
        (lambda: _raise(OSError("gone")), 1, "error: gone (--verbosity=1 shows where)\n"),
        (_no_package, 3, "error: No module named 'nowhere_to_be_found' (--verbosity=1 shows where)\n"),
        (lambda: config.parse_arg("x"), 2, "config error: config argument"),
        (lambda: _raise(KeyboardInterrupt), 130, "interrupted: stopped at once; the last checkpoint"),
    ],
)
def test_exit_statuses(monkeypatch, capsys, action, status, message):
    assert call(monkeypatch, "--config=tiny", main=lambda cfg, invocation: action()) == status
    assert capsys.readouterr().err.startswith(message)


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["room", "--config=tiny"])
    for bug in (ValueError("raised outside of the package"), RuntimeError("x"), AssertionError()):
        with pytest.raises(type(bug)):
            cli.run("train", lambda cfg, invocation, bug=bug: _raise(bug), FLAGS)


# --- what is understood


def test_words_become_an_invocation():
    words = (
        "--config", "tiny:preset=seed", "--config.train.steps", "7", "--config.model.tied", "--noconfig.data.shuffle",
        "--config.opt.clip=-1", "--workdir=w", "--dry_run", "--count", "-5", "--prompt=--x=y", "--resume=must",
    )  # fmt: skip
    got = cli.parse(list(words), FLAGS)
    assert (got.config_path, got.workdir, got.argv) == ("tiny:preset=seed", "w", words)
    assert got.overrides == {
        "train.steps": "7", "model.tied": "true", "data.shuffle": "false", "opt.clip": "-1",
    }  # fmt: skip
    assert (got.dry_run, got.count, got.heat, got.prompt, got.resume) == (True, -5, 0.5, "--x=y", "must")
    assert copy.deepcopy(got) == got
    with pytest.raises(AttributeError):
        _ = got.absent


def test_overrides_of_every_type():
    cfg = cli.get_config(
        "tiny:preset=portable",
        **{
            "name": "x", "train.steps": 1_000, "opt.clip": 3, "data.shuffle": False, "model.window": (8, 0),
            "train.loss": (("next_token", 1), ("z", 0.1)),
        },
    )  # fmt: skip
    assert (cfg.name, cfg.train.steps, cfg.data.shuffle, cfg.model.window) == ("x", 1000, False, (8, 0))
    assert type(cfg.opt.clip) is float and cfg.train.loss == (("next_token", 1.0), ("z", 0.1))
    assert cfg.model.mlp == "swiglu"  # from the argument
    words = ["--config=tiny", "--config.model.window=16", "--config.log.tensorboard=False"]
    cfg = cli.load(cli.parse(words, {}))
    assert cfg.model.window == (16,) and cfg.log.tensorboard is False


def test_the_room_gets_the_resolved_config(monkeypatch):
    seen = []
    status = call(
        monkeypatch, "--config=smoke", "--config.seed=9", main=lambda cfg, invocation: seen.append(cfg)
    )
    assert status == 0 and seen[0].seed == 9 and seen[0].name == "smoke"
    call(monkeypatch, main=lambda cfg, invocation: seen.append(cfg), needs_config=False)
    assert seen[1] == Config()


@pytest.mark.parametrize("reference", ["tiny", "tiny.py", "configs/tiny", "configs/tiny.py"])
def test_configs_of_the_package_are_found_from_anywhere(monkeypatch, tmp_path, reference):
    monkeypatch.chdir(tmp_path)
    assert cli.get_config(reference).name == "tiny"


def test_the_current_directory_comes_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "sweep").mkdir(parents=True)
    make(tmp_path / "configs" / "tiny.py", "c.name = 'mine'")
    make(tmp_path / "configs" / "sweep" / "a.py", "c.name = 'inner'")
    assert cli.get_config("tiny").name == "mine" and cli.get_config("configs/tiny.py").name == "mine"
    assert cli.get_config("sweep/a").name == cli.get_config("configs/sweep/a.py").name == "inner"
    make(tmp_path / "tiny.py", "c.name = 'nearer'")
    assert cli.get_config("tiny").name == "nearer"


def test_a_config_file_may_start_from_another_one(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "from nanochat_jax import cli\ndef get_config():\n"
        "    c = cli.read_config('tiny:preset=seed')\n    c.name = 'child'\n    return c\n"
    )
    cfg = cli.get_config(str(path))
    assert cfg.name == "child" and cfg.model.quant_group == 128


def test_a_config_file_that_changed_at_once_is_read_anew(tmp_path):
    for seed in range(5):  # equal size, equal second: a bytecode cache would not notice
        assert cli.get_config(make(tmp_path / "c.py", f"c.seed = {seed}")).seed == seed
    assert os.listdir(tmp_path) == ["c.py"]


def test_json_configs_feed_back_and_take_overrides(tmp_path):
    cfg = cli.get_config("tiny", **{"train.steps": 33, "model.window": (64, 0)})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict(cfg)))
    assert cli.get_config(str(path)) == cfg
    again = cli.get_config(str(path), **{"model.window": (32,), "opt.clip": 0.5, "train.steps": 40})
    assert (again.model.window, again.opt.clip, again.train.steps) == ((32,), 0.5, 40)
    path.write_text('{"model": {"dim": 128}, "opt": {"clip": 1}}')  # by hand: the rest is default
    part = cli.get_config(str(path), **{"opt.clip": 0.25, "train.steps": 100})
    assert (part.model.dim, part.opt.clip, part.train.steps) == (128, 0.25, 100)


# --- help


def test_help_names_flags_and_configs(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "broken.py").write_text("def (")
    assert call(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m nanochat_jax.train --config=<config>")
    for line in (
        "--resume         continue or not (auto, never, must) (default auto)",
        "--help_config", "tiny             A ternary model of 7 M weights", "broken           (cannot be read",
    ):  # fmt: skip
        assert line in text


@pytest.mark.parametrize("flag", ["--help_config", "--help=config"])
def test_help_config_lists_every_key(monkeypatch, capsys, flag):
    assert call(monkeypatch, flag) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line[len("--config.") :].split("=")[0] for line in lines} == set(config.all_keys())
    assert "--config.opt.matrix.lr=0.02  (float) peak learning rate" in lines
    assert any(line.startswith("--config.model.window=()  (tuple[int, ...]) attention") for line in lines)


@pytest.mark.multiprocess
def test_help_and_mistakes_come_before_jax(child_env):
    script = (
        "import sys\nfrom nanochat_jax import cli\nfrom nanochat_jax.train.__main__ import FLAGS, main\n"
        "for words in (['--help'], ['--help_config'], [], ['--config=tiny', '--config.x=1'], ['--confg=tiny']):\n"
        "    sys.argv = ['train', *words]\n"
        "    try: cli.run('train', main, FLAGS)\n"
        "    except SystemExit as e: print('status', e.code, 'jax' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=child_env)
    got = [line for line in result.stdout.splitlines() if line.startswith("status")]
    assert got == ["status 0 False"] * 2 + ["status 2 False"] * 3, result.stderr


@pytest.mark.multiprocess
@pytest.mark.parametrize("room", cli.ROOMS)
def test_every_room_prints_help(room, child_env):
    command = [sys.executable, "-m", "nanochat_jax", room, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=child_env)
    assert result.returncode == 0 and "usage: python -m nanochat_jax." in result.stdout, result.stderr


@pytest.mark.multiprocess
def test_a_closed_pipe_is_no_traceback(child_env):
    command = [sys.executable, "-m", "nanochat_jax.train", "--help_config"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=child_env)
    assert child.stdout and child.stderr
    child.stdout.close()
    printed = child.stderr.read()
    child.stderr.close()
    assert child.wait() == 1 and printed == b""


@pytest.mark.multiprocess
def test_a_platform_without_a_device_is_an_environment_error(child_env, tmp_path):
    command = [sys.executable, "-m", "nanochat_jax.train", "--config=smoke", "--dry_run"]
    result = subprocess.run(command, capture_output=True, text=True, env=child_env | {"JAX_PLATFORMS": "no"})
    assert result.returncode == 3 and "Traceback" not in result.stderr and "'no'" in result.stderr


def test_the_console_script(monkeypatch, capsys):
    assert {"train", "inference"} <= set(cli.ROOMS)
    for words, status, message in (
        (["--version"], None, "."), (["--help"], None, "train        Train:"), ([], 2, "usage: nanochat-jax <room>"),
        (["trian"], 2, "usage error: no room 'trian'. Did you mean 'train'?"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["nanochat-jax", *words])
        if status is None:
            cli.main()
        else:
            with pytest.raises(SystemExit) as caught:
                cli.main()
            assert caught.value.code == status
        printed = capsys.readouterr()
        assert message in (printed.err if status else printed.out)


# --- the process


def test_directories(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_JAX_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cli.cache_home() == tmp_path / ".cache" / "nanochat_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cli.cache_home() == Path("/x/nanochat_jax")
    monkeypatch.setenv("NANOCHAT_JAX_HOME", "/n")
    assert cli.cache_home() == Path("/n")
    plain = cli.parse([], {})
    assert cli.workdir(Config(name="a"), plain) == Path("runs/a")
    assert cli.workdir(Config(name="a", workdir="b"), plain) == Path("b")
    assert cli.workdir(Config(workdir="b"), cli.parse(["--workdir=~/c"], {})) == tmp_path / "c"


def test_the_record_says_what_was_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "--a")
    path = make(tmp_path / "c.py")
    made = cli.record("train", cli.parse([f"--config={path}", "--config.seed=4"], {}))
    assert json.loads(json.dumps(made)) == made
    assert made["command"][:3] == ["python", "-m", "nanochat_jax.train"] and made["overrides"] == {
        "seed": "4"
    }
    assert made["environment"]["XLA_FLAGS"] == "--a" and made["config_file"] == path
    before = made["config_file_sha256"]
    make(tmp_path / "c.py", "c.seed = 3")
    assert cli.record("train", cli.parse([f"--config={path}"], {}))["config_file_sha256"] != before
    assert cli.record("inference", cli.parse([], {}))["config_file_sha256"] is None


@pytest.fixture
def quiet_setup(monkeypatch):
    """setup_runtime without lasting effects on this process."""
    monkeypatch.setattr(cli, "_keep_freed_memory", lambda: None)
    import jax

    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, "kept"))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    levels = {name: logging.getLogger(name).level for name in ("absl", "jax", "orbax", "grain")}
    yield updates
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_what_threads_of_a_failed_save_say_of_their_ended_loop_is_not_shown(monkeypatch, quiet_setup):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: shown.append(str(unraisable.exc_value)))
    cli.setup_runtime(Config())
    for error in (
        RuntimeError("Event loop is closed"),
        RuntimeError("other"),
        OSError("Event loop is closed"),
    ):
        sys.unraisablehook(types.SimpleNamespace(exc_type=type(error), exc_value=error))
    assert shown == ["other", "Event loop is closed"]


def test_a_mesh_on_the_cpu_pretends_devices(monkeypatch, quiet_setup):
    mesh = cli.get_config("smoke", **{"mesh.data": 2, "mesh.tensor": 2})
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    cli.setup_runtime(Config())
    assert "XLA_FLAGS" not in os.environ
    cli.setup_runtime(mesh)
    assert os.environ["XLA_FLAGS"] == "--xla_force_host_platform_device_count=4"
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # the user's
    cli.setup_runtime(mesh)
    assert os.environ["XLA_FLAGS"] == "--xla_force_host_platform_device_count=8"
    monkeypatch.setenv("XLA_FLAGS", "--other")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    cli.setup_runtime(mesh)
    assert os.environ["XLA_FLAGS"] == "--other"
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)  # no accelerator's plugin
    cli.setup_runtime(mesh)
    assert os.environ["XLA_FLAGS"] == "--other --xla_force_host_platform_device_count=4"


def test_several_gpus_exchange_beside_their_products(monkeypatch, quiet_setup):
    overlap = "--xla_gpu_enable_latency_hiding_scheduler"
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    cli.setup_runtime(Config())  # one device has nothing to exchange
    assert "XLA_FLAGS" not in os.environ
    monkeypatch.setenv("XLA_FLAGS", f"{overlap}=false")  # the user's
    cli.setup_runtime(cli.get_config("config_b"))
    assert os.environ["XLA_FLAGS"] == f"{overlap}=false"
    monkeypatch.delenv("XLA_FLAGS")
    cli.setup_runtime(cli.get_config("config_b"), processes=2)
    assert os.environ["XLA_FLAGS"] == f"{overlap}=true"
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name == "jax_cuda13_plugin")
    cli.setup_runtime(cli.get_config("config_b"))
    assert os.environ["XLA_FLAGS"] == f"{overlap}=true"


def test_the_compilation_cache_is_the_users_if_set(monkeypatch, quiet_setup):
    monkeypatch.setenv("NANOCHAT_JAX_HOME", "/n")
    cli.setup_runtime(Config())
    assert quiet_setup["jax_compilation_cache_dir"] == "/n/xla"
    quiet_setup.clear()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3")
    cli.setup_runtime(Config())
    assert quiet_setup == {}
    assert logging.getLogger("orbax").level == logging.WARNING


def test_the_allocator_is_the_users_if_set(monkeypatch):
    asked = []
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: asked.append(name) or _raise(OSError(name)))
    for name in [n for n in os.environ if n.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    cli._keep_freed_memory()  # no glibc: nothing happens
    assert asked == ["libc.so.6"]
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    cli._keep_freed_memory()
    assert asked == ["libc.so.6"]


@pytest.mark.parametrize(
    ("room", "kind", "kept"),
    [
        ("inference", "", False),
        ("serve", "", False),
        ("bench", "inference", False),
        ("bench", "throughput", True),
    ],
)
def test_answers_do_not_share_one_arena(monkeypatch, room, kind, kept):
    main = importlib.import_module(f"nanochat_jax.{room}.__main__")
    asked = []

    def setup(cfg, processes=1, keep_freed=True):
        asked.append(keep_freed)
        raise SystemExit

    monkeypatch.setattr(cli, "setup_runtime", setup)
    monkeypatch.setattr(cli, "trained", lambda call: (Path("run"), Config()))
    call = cli.parse([], main.FLAGS)
    with pytest.raises(SystemExit):
        main.main(*(kind,) if kind else (), Config(), call)
    assert asked == [kept]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(capfd, number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), cli.Interrupt() as interrupt:
        assert not interrupt.requested
        signal.raise_signal(number)
        assert interrupt.requested and "finishing the step, then saving" in capfd.readouterr().err
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_signal_with_nowhere_to_write_still_counts(monkeypatch):
    monkeypatch.setattr(cli.os, "write", lambda *_: _raise(OSError(errno.EPIPE, "gone")))
    with cli.Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
    assert interrupt.requested


def test_interrupts_outside_of_the_main_thread_are_left_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with cli.Interrupt() as interrupt:
            seen.append((interrupt.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
