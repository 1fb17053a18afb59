"""The record of a run: complete, whole after a crash, and good for making the run again."""

import datetime
import json
import os
import subprocess

import pytest

from nanochat_jax import files
from nanochat_jax.config import Config, all_keys, defaults, resolve, to_dict
from nanochat_jax.telemetry import manifest


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_manifest_records_and_keeps_earlier_starts(tmp_path):
    cfg = Config()
    for _ in range(2):
        manifest.write(tmp_path, cfg, {"command": ["x"]})
    record = strict((tmp_path / "manifest.json").read_text())
    assert len(record["starts"]) == 2 and record["packages"]["jax"] and record["command"] == ["x"]
    assert strict((tmp_path / "config.json").read_text())["model"]["dim"] == cfg.model.dim


def test_changed_keys_names_what_makes_another_run():
    old, new = to_dict(Config()), to_dict(Config())
    new["train"]["steps"], new["log"]["every_steps"], new["mesh"]["data"] = 999, 1, 2
    assert manifest.changed_keys(old, new) == []
    new["model"]["dim"], new["seed"] = 512, 4
    assert manifest.changed_keys(old, new) == ["seed: 0 -> 4", "model.dim: 256 -> 512"]
    assert manifest.changed_keys(json.loads(json.dumps(old)), old) == []


def test_starts_say_when_and_how(tmp_path):
    for seed in ("1", "2"):
        facts = {"command": ["x", seed], "overrides": {"seed": seed}, "devices": {"count": 1}, "data": {}}
        manifest.write(tmp_path, Config(), facts)
    first, second = strict((tmp_path / "manifest.json").read_text())["starts"]
    assert (first["overrides"], second["command"]) == ({"seed": "1"}, ["x", "2"])
    assert datetime.datetime.fromisoformat(first["time"]).utcoffset() == datetime.timedelta()
    assert "data" not in first and "git" in first


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"starts": 3}', "null"])
def test_a_damaged_manifest_is_replaced(tmp_path, damage):
    (tmp_path / "manifest.json").write_text(damage)
    manifest.write(tmp_path, Config(), {})
    assert len(strict((tmp_path / "manifest.json").read_text())["starts"]) == 1
    assert sorted(os.listdir(tmp_path)) == ["config.json", "manifest.json"]


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    manifest.write(tmp_path, Config(), {})
    before = (tmp_path / "manifest.json").read_text()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        manifest.write(tmp_path, Config(seed=3), {})
    assert (tmp_path / "manifest.json").read_text() == before


def test_config_json_gives_the_same_config_back(tmp_path):
    settings = defaults()
    settings.model.window, settings.train.loss = (64, 0), (("next_token", 1.0), ("z", 1e-4))
    cfg = resolve(settings)
    manifest.write(tmp_path, cfg, {})
    assert resolve(strict((tmp_path / "config.json").read_text())) == cfg


def test_settings_that_may_change_in_a_continued_run():
    keys = all_keys()
    for key in (
        "train.steps",
        "log.every_steps",
        "eval.prompt",
        "infer.top_k",
        "ckpt.keep_last",
        "data.workers",
    ):
        assert key in keys and manifest.may_change(key)
    for key in ("seed", "model.dim", "data.source", "opt.matrix.lr", "train.microbatches", "ckpt.init_from"):
        assert key in keys and not manifest.may_change(key)
    for free in (*manifest.FREE, *manifest.FIXED):
        assert any(key == free or key.startswith(free + ".") for key in keys), f"{free} names no setting"


def test_settings_of_another_version_count_as_their_defaults():
    new, old = to_dict(Config()), to_dict(Config())
    del old["model"]["softcap"]  # written before there was such a setting
    assert manifest.changed_keys(old, new) == manifest.changed_keys(new, old) == []
    new["model"]["softcap"] = 15.0
    assert manifest.changed_keys(old, new) == ["model.softcap: 0.0 -> 15.0"]
    old["model"]["gone"] = 3  # of a version that had it: this one cannot continue that
    assert "model.gone: 3 -> None" in manifest.changed_keys(old, new)


def test_the_commit_is_recorded_if_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "__file__", str(tmp_path / "a" / "b" / "manifest.py"))
    assert manifest._git() is None

    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    git("init", "-q")
    assert manifest._git() is None  # no commit yet
    git("commit", "-q", "--allow-empty", "-m", "x")
    found = manifest._git()
    assert found and len(found["commit"]) == 40 and not found["dirty"]
    (tmp_path / "new").touch()
    found = manifest._git()
    assert found and found["dirty"]


@pytest.mark.parametrize(
    ("key", "value"), [("kind", "cosine"), ("decay_fraction", 0.1), ("warmup_steps", 7), ("floor", 0.5)]
)
def test_a_continued_run_keeps_its_schedule(key, value):
    changed = to_dict(Config())
    changed["opt"]["schedule"][key] = value
    assert manifest.changed_keys(to_dict(Config()), changed)


def test_a_continued_run_may_be_warmed_up_again():
    changed = to_dict(Config())
    changed["opt"]["schedule"]["rewarm_steps"] = 5
    assert manifest.changed_keys(to_dict(Config()), changed) == []
