"""The benchmark commands, as typed."""

import dataclasses
import json
import subprocess
import sys

import pytest

from nanochat_jax.bench import operations


def run(child_env, *arguments):
    command = [sys.executable, "-m", "nanochat_jax.bench", *arguments]
    return subprocess.run(command, env=child_env, capture_output=True, text=True)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimizer"], "Did you mean 'optimizers'?"),
        ([], "known: ablate, data, inference, kernels, optimizers, telemetry, throughput"),
        (["throughput"], "--config is missing"),
        (["optimizers", "--trees=tinny"], "no tree 'tinny'. Did you mean 'tiny'?"),
        (["inference"], "--workdir is missing"),
        (["kernels", "--write"], "--write needs a GPU to measure, this is cpu"),
    ],
)
def test_mistakes(child_env, arguments, message):
    result = run(child_env, *arguments)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.multiprocess
def test_throughput_of_the_smoke_model(child_env):
    result = run(child_env, "throughput", "--config=smoke", "--json", "--blocks=2", "--steps=1")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["tokens_per_second"] > 0 and record["step_ms"]["min"] <= record["step_ms"]["median"]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_optimizers_on_the_tiny_tree(child_env):
    result = run(child_env, "optimizers", "--trees=tiny", "--blocks=1", "--steps=1")
    assert result.returncode == 0, result.stderr
    assert "tiny: 5." in result.stdout and "galore(muon 8-bit)" in result.stdout


@pytest.mark.multiprocess
def test_telemetry_of_the_smoke_model(child_env):
    result = run(child_env, "telemetry", "--config=smoke", "--json", "--blocks=1", "--steps=1")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["share"] == record["telemetry_ms"]["median"] / record["step_ms"]
    assert record["bytes_per_step"] > 0 and record["every_steps"] == 5


@pytest.mark.slow
def test_kernels_off_gpu(child_env):
    """Correctness is checked, plain XLA is timed, and the record says what was not measured."""
    result = run(child_env, "kernels", "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["note"] == "not measured on GPU" and record["copy_gb_per_second"] > 0
    assert record["checked_cases"] == {"reference": 8, "interpret": 8}
    assert {name for p in record["products"] for name in p["us"]} == {
        "bfloat16", "w2a8 reference", "w2a16 reference"
    }  # fmt: skip
    listed = {row["operation"]: row for row in record["operations"]}
    assert len(listed) == len(record["operations"]) == 13
    for row in listed.values():
        assert set(row["checked"].values()) == {"right"} and not row["refused"]
        assert ("percent_of_bandwidth" in row) != ("ratio_to_bfloat16" in row)
        assert "interpret" not in row["us"] and min(row["us"].values()) > 0


@pytest.mark.parametrize("name", ["nvfp4 quantize, nearest", "8-bit moments, lion"])
def test_a_wrong_kernel_is_named(name, monkeypatch):
    operation = next(o for o in operations.OPERATIONS if o.name == name)
    broken = lambda impl, v, *rest: operation.run("reference", v.at[3].multiply(1.5), *rest)  # noqa: E731
    with pytest.raises(ValueError, match=f"{name}, reference: wrong"):
        operations.checked(dataclasses.replace(operation, run=broken), 0)
