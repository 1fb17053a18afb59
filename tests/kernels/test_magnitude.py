"""Maxima of rows against NumPy, whose maxima keep NaN."""

from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.kernels import dispatch, magnitude

WIDTHS = (1, 31, 32, 33, 40, 66, 96, 256, 300, 768)  # odd ones are not folded, or not to the end


@settings(max_examples=25)
@given(st.sampled_from(WIDTHS), st.integers(0, 2**31 - 1))
def test_largest_of_a_row(width, seed):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(2, 3, width)) * 10.0 ** rng.integers(-40, 37)).astype(np.float32)
    for special in (np.inf, -np.inf, np.nan, -np.nan, -0.0):
        x[rng.integers(2), rng.integers(3), rng.integers(width)] = special
    want = np.abs(x).max(-1, keepdims=True)
    for whole in (True, False):
        with mock.patch.object(dispatch, "whole", lambda whole=whole: whole):
            np.testing.assert_array_equal(jax.jit(lambda x: magnitude.row_largest(x))(x), want)
    np.testing.assert_array_equal(magnitude.largest(x, -1, keepdims=True), want)


@pytest.mark.parametrize(("device", "whole"), [("cpu", True), ("cpu", False), ("gpu", True)])
def test_whole_rows_are_folded_on_cpu_only(monkeypatch, device, whole):
    monkeypatch.setattr(dispatch, "backend", lambda: device)
    monkeypatch.setattr(dispatch, "whole", lambda: whole)
    x = np.arange(-300.0, 300.0, dtype=np.float32).reshape(2, 300)
    np.testing.assert_array_equal(magnitude.row_largest(x), [[300.0], [299.0]])
    folded = "max" in [str(e.primitive) for e in jax.make_jaxpr(lambda x: magnitude.row_largest(x))(x).eqns]
    assert folded == (device == "cpu" and whole)
