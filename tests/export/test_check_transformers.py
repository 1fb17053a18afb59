"""What `check.transformers` allows, with its answer put in; tests/export/test_export_transformers.py asks for real."""

import importlib.util

import numpy as np
import pytest
from export_models import CASES, WIDE, build

from nanochat_jax.export import check


def answer(monkeypatch, change):
    """Let transformers be installed and answer with our logits after `change`."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(check, "_their_logits", lambda *_: ("Model", change))


@pytest.mark.parametrize(("times", "passes"), [(0.0, True), (1.5, True), (4.0, False)])
def test_a_wide_ternary_model_may_differ_as_much_as_its_own_rounding(monkeypatch, tmp_path, times, passes):
    cfg, params = build({**CASES["qwen3"][1], **WIDE})
    ours = check.reference(cfg, params, "packed", check.rows(cfg, 16))
    moved = check.sensitivity(cfg, params, "packed", check.rows(cfg, 16), ours)
    assert moved > 2 * check.TOLERANCE * np.abs(ours).max()
    answer(monkeypatch, ours + times * moved)
    if passes:
        assert "half of the rows" in check.transformers(tmp_path, cfg, params, "packed", "float32", 16)
    else:
        with pytest.raises(check.CheckError, match="for half of them"):
            check.transformers(tmp_path, cfg, params, "packed", "float32", 16)


@pytest.mark.parametrize(
    ("form", "off", "passes"), [("full", 5e-5, True), ("full", 2e-4, False), ("packed", 2e-4, False)]
)
def test_a_small_model_must_keep_the_tolerance(monkeypatch, tmp_path, form, off, passes):
    quant = "full" if form == "full" else "ternary"
    cfg, params = build({**CASES["qwen3"][1], "quant": quant})
    ours = check.reference(cfg, params, form, check.rows(cfg, 16))
    answer(monkeypatch, ours + off * max(1.0, np.abs(ours).max()))
    if passes:
        assert "differ by at most" in check.transformers(tmp_path, cfg, params, form, "float32", 16)
    else:
        with pytest.raises(check.CheckError, match="logits of size"):
            check.transformers(tmp_path, cfg, params, form, "float32", 16)
