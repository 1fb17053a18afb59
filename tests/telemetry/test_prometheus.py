"""The page: read back with Prometheus' own parser; on loopback only; the dashboard asks for what exists."""

import json
import math
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from nanochat_jax.config import LogConfig
from nanochat_jax.telemetry import prometheus, writers
from nanochat_jax.validation import GROUPS

GRAFANA = Path(__file__).parents[2] / "docs/grafana"


def parsed(text):
    """{name: {labels: value}} by prometheus_client, the reference reader."""
    parser = pytest.importorskip("prometheus_client.parser")
    found = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def get(port, path="/metrics"):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
        assert response.headers["Content-Type"] == prometheus.CONTENT_TYPE
        return response.read().decode()


@pytest.fixture
def page():
    sink = prometheus.Prometheus("a run", 0)
    yield sink
    sink.close()


def test_a_scrape_shows_the_last_values(page):
    assert parsed(get(page.port)) == {}
    page.write(5, {"loss/next_token": 3.0, "opt/grad_norm": math.nan})
    page.write(10, {"loss/next_token": 2.5})
    page.text(10, "anomaly", "loss spike: 9 (usually 2, limit 3); look")
    page.text(11, "anomaly", "loss spike: 8 (usually 2, limit 3); look")
    page.text(11, "anomaly", "not finite: nan; look")
    page.text(11, "eval/sample", "loss spike: a text")
    found, run = parsed(get(page.port)), (("run", "a run"),)
    assert found["nanochat_loss_next_token"] == {run: 2.5} and found["nanochat_step"] == {run: 10.0}
    assert math.isnan(found["nanochat_opt_grad_norm"][run])
    assert found["nanochat_last_step_timestamp_seconds"][run] > 1.7e9
    assert found["nanochat_anomalies_total"] == {
        (("kind", "loss spike"), *run): 2.0, (("kind", "not finite"), *run): 1.0
    }  # fmt: skip


@hypothesis.example("a\\nb\\\\", {"a/b": float("-inf")}, {'x"y\nz\\': 3})
@hypothesis.given(
    st.text(),
    st.dictionaries(st.text(max_size=8), st.floats()),
    st.dictionaries(st.text(), st.integers(0, 9)),
)
def test_any_name_and_value_can_be_read_back(run, metrics, anomalies):
    parse = pytest.importorskip("prometheus_client.parser").text_string_to_metric_families
    text = prometheus.exposition(run, metrics, anomalies)
    samples = [sample for family in parse(text) for sample in family.samples]
    assert all(sample.labels["run"] == run for sample in samples)
    values = {s.name: s.value for s in samples if s.name != "nanochat_anomalies_total"}
    last = {prometheus.metric_name(name): value for name, value in metrics.items()}
    for name in set(last) - {"nanochat_anomalies_total"}:
        assert values[name] == last[name] or (math.isnan(values[name]) and math.isnan(last[name]))
    counts = {
        s.labels["kind"]: s.value
        for s in samples
        if s.name == "nanochat_anomalies_total" and "kind" in s.labels
    }
    assert counts == anomalies


def test_other_paths_are_not_found(page):
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        get(page.port, "/")
    caught.value.close()


def test_only_loopback_is_served(page):
    assert page._server.server_address[0] == "127.0.0.1"


def test_closing_ends_the_service():
    sink = prometheus.Prometheus("r", 0)
    sink.close()
    sink.close()
    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", sink.port)) != 0


def test_a_port_that_is_taken_costs_the_page_and_not_the_run(page, tmp_path, caplog):
    multi = writers.open_writers(LogConfig(prometheus_port=page.port, tensorboard=False), tmp_path, run="r")
    multi.write(1, {"a": 1.0})
    multi.close()
    assert "in use" in caplog.text and '"a": 1.0' in (tmp_path / "metrics.jsonl").read_text()


def test_the_setting_opens_the_page(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multi = writers.open_writers(LogConfig(prometheus_port=port, tensorboard=False), tmp_path, run="r")
    multi.write(1, {"a": 1.0})
    assert 'nanochat_a{run="r"} 1.0' in get(port)
    multi.close()


def asked():
    """Metric names in the expressions of the dashboard and the alerts."""
    board = json.loads((GRAFANA / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    expressions += re.findall(r"expr: (.*)", (GRAFANA / "alerts.yml").read_text())
    return {name for text in expressions for name in re.findall(r"nanochat_\w+", text)}


def test_the_dashboard_asks_for_metrics_that_the_code_names():
    """Each name is that of a metric which stands in a source file of ours as "group/name"."""
    package = Path(prometheus.__file__).parents[1]
    source = "\n".join(path.read_text() for path in package.rglob("*.py"))
    known = {
        prometheus.metric_name(name)
        for name in re.findall(r"\b(?:loss|opt|quant|mhc|data|perf|eval)/\w+", source)
    }
    known |= {prometheus.PREFIX + name for name in ("step", "last_step_timestamp_seconds", "anomalies_total")}
    known |= {
        f"nanochat_mhc_{name}" for name in re.findall(r'"(\w+)":', (package / "model/mhc.py").read_text())
    }
    known |= {f"nanochat_opt_lr_{group}" for group in GROUPS}
    assert len(asked()) > 15 and sorted(asked() - known) == []


def test_the_dashboard_is_one_that_grafana_takes():
    board = json.loads((GRAFANA / "dashboard.json").read_text())
    assert board["uid"] and board["title"] and board["schemaVersion"] >= 36
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    cells = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        mine = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not mine & cells, panel["title"]  # panels do not lie on one another
        cells |= mine
        assert all("$run" in target["expr"] for target in panel["targets"])
