"""The data benchmark: costs are what they are said to be, every loader delivers, the bar is judged right."""

import numpy as np
import pytest

from nanochat_jax.bench import data


@pytest.mark.parametrize("kind", data.COSTS)
def test_costs_have_the_load_and_the_cap(kind):
    made = data.costs(kind, 1, 4000)
    assert made.mean() * data.BATCH / (data.WORKERS * data.STEP) == pytest.approx(data.LOAD, rel=0.02)
    assert made.min() > 0 and made.max() <= data.CAP
    np.testing.assert_array_equal(made, data.costs(kind, 1, 4000))
    assert kind == "equal" or (made != data.costs(kind, 2, 4000)).any()


def test_two_point_costs_are_a_fifth_of_eleven_to_one():
    made = data.costs("two_point", 0, 10_000)
    low, high = np.unique(made)
    assert high / low == pytest.approx(11) and (made == high).mean() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("loader", data.LOADERS)
def test_every_loader_delivers_every_sample_once(loader):
    """Free samples, as the measurement runs them. In completion order one may come early by less than the
    window, and late by max_late: how late is the scheduler's choice."""
    stream = data.LOADERS[loader](data._Sleep(np.zeros(400)))
    found = np.concatenate([np.asarray(next(stream)) for _ in range(40)])
    stream.close()
    early, late = np.max(found - np.arange(320)), np.max(np.arange(320) - found)
    assert len(set(found.tolist())) == 320
    assert early <= (data.WINDOW if "completion" in loader else 0)
    assert late <= (data.MAX_LATE if "completion" in loader else 0)
    # What is known to be slow comes later.
    if loader == "declared":
        stream = data.LOADERS[loader](data._Sleep(np.where(np.arange(400) == 3, 1e-3, 1e-6)))
        first = [k for _ in range(5) for k in next(stream)]
        stream.close()
        assert first.index(3) == 3 + data.DELAY - 1  # before sample 35: all others moved up by one


def test_a_run_has_its_shares(monkeypatch):
    monkeypatch.setattr(data, "STEP", 1e-4)
    record = data.data(seeds=(0,), kinds=("equal",), steps=4)
    assert {row["loader"] for row in record["rows"]} == set(data.LOADERS) == set(data.NAMES)
    assert all(0 <= run["all"] <= 1 and 0 <= run["warm"] <= 1 for run in record["runs"])
    text = data.table(record)
    assert all(name in text for name in data.NAMES.values())


def row(kind, loader, value):
    return {"costs": kind, "loader": loader, "all": {"median": value}, "warm": {"median": value / 2}}


def test_the_bar():
    """Only where plain prefetch idles a quarter, and by the best order."""
    table = [
        row("two_point", "in_order", 0.27), row("two_point", "declared", 0.019), row("two_point", "completion", 0.03),
        row("lognormal", "in_order", 0.5), row("lognormal", "declared", 0.2), row("lognormal", "completion", 0.02),
        row("equal", "in_order", 0.01), row("equal", "declared", 0.01), row("equal", "completion", 0.01),
    ]  # fmt: skip
    assert data.passed(table) == {"all": {"two_point": True, "lognormal": False}, "warm": {"lognormal": True}}


def test_medians_and_ranges():
    runs = [
        {"costs": "equal", "loader": "strict", "seed": s, "all": a, "warm": a / 2, "moved": s}
        for s, a in enumerate((0.3, 0.1, 0.2))
    ]
    (only,) = data.rows(runs)
    assert only["all"] == {"median": 0.2, "min": 0.1, "max": 0.3} and only["moved"] == 2
