"""Compiling for a card that is not here. The compilers themselves are behind the marker interop."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import pytest

from nanochat_jax import cli
from nanochat_jax.bench import away
from nanochat_jax.config import ConfigError
from nanochat_jax.kernels import card, dispatch, integer, ternary, ternary_pallas, tuning
from nanochat_jax.plan import report
from nanochat_jax.plan.devices import DEVICES
from nanochat_jax.quant import coded

needs_compiler = pytest.mark.skipif(bool(card.missing()), reason=card.missing() or "-")
triton_is_deprecated = pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")


@dataclasses.dataclass
class Device:
    platform: str = "gpu"
    device_kind: str = "NVIDIA of the test"


def test_a_card_is_the_same_to_its_compiler_and_to_the_plan():
    assert set(card.CARDS) == set(DEVICES) - {"cpu"}
    for name, known in card.CARDS.items():
        assert (known.memory, known.bandwidth) == (DEVICES[name].memory, DEVICES[name].bandwidth), name


def test_aiming_answers_as_the_devices_would_and_ends(monkeypatch):
    monkeypatch.setattr(dispatch, "probe", lambda check: pytest.fail("asked a device that is not here"))
    assert dispatch.backend() == "cpu" and dispatch.devices() == jax.devices()
    with pytest.raises(KeyError), dispatch.aimed_at([Device()]):
        assert dispatch.backend() == "gpu" and dispatch.whole()
        dispatch.refuse("a:check")
        assert tuning.entry(jnp.int8, 1, 16, 256) is None  # looked up by the card's kind
        raise KeyError
    assert dispatch.backend() == "cpu"
    with dispatch.aimed_at([Device()] * 2):
        assert not dispatch.whole()


def test_nothing_is_timed_for_devices_that_are_not_here():
    """Nor does an answer found here, or there, hold for the other."""
    here = integer.preferred()
    q, t = jnp.ones((32, 64), jnp.int8), jnp.ones((64, 32), jnp.int8)
    with dispatch.aimed_at([Device()]):
        assert integer.preferred() == coded.carrier(3, 64, 32) == "int8"
        program = str(jax.make_jaxpr(lambda q, t: integer.integer_matmul(q, t))(q, t))
        with pytest.raises(RuntimeError, match="nothing can be timed"):
            dispatch.fastest(integer.IMPLS, lambda: (q, t))
    assert "preferred_element_type=int32" in program
    assert integer.preferred() == here


def test_what_cannot_be_aimed_at_is_said(monkeypatch):
    with pytest.raises(ValueError, match="unknown card 'h2000'; known: rtx4090, "), card.aimed("h2000"):
        pass
    monkeypatch.setattr(card, "missing", lambda: "no compiler")
    with pytest.raises(RuntimeError, match="no compiler"), card.aimed("h200"):
        pass
    with pytest.raises(ConfigError, match="no compiler"):
        away.away("h200")
    with pytest.raises(ConfigError, match=r"--card must be one of rtx4090, .*, got 'gtx'"):
        away.away("gtx")
    figures = report.compile_step(cli.get_config("smoke"), "h200")
    assert (figures["for"], figures["instead"]) == ("cpu", "no compiler")


def test_what_is_missing(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "needs jax 0.11 or newer" in card.missing()
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    real = card.importlib.util.find_spec

    def find(name):  # as where no plugin is installed
        return None if name == "jax_plugins" else real(name)

    monkeypatch.setattr(card.importlib.util, "find_spec", find)
    assert "pip install 'nanochat_jax[card]'" in card.missing()
    monkeypatch.setattr(card.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(card.jax, "config", types.SimpleNamespace(jax_platforms=None))
    assert "needs JAX_PLATFORMS=cpu" in card.missing()


def test_the_table_names_what_does_not_compile():
    row = {"operation": "a product", "size": [1, 2], "seconds": 0.1}
    good = row | {"problem": "", "spills": False, "arguments": 2**20, "outputs": 2**19, "temporary": 0}
    rows = [good, good | {"spills": True}, row | {"problem": "Error: too large"}]
    text = away.table({"card": "X", "jax": "1", "rows": rows})
    assert "2 of 3 kernels compile, 1 of them spill" in text and "Error: too large" in text
    assert text.count("  0.50") == 2 and text.count("  spills") == 1


# --- with the compilers


@pytest.mark.interop
@needs_compiler
@triton_is_deprecated
@pytest.mark.parametrize("name", ["h200", "rtx4090", "rtx5090"])
def test_every_kernel_compiles_and_fits(name):
    record = away.away(name, small=True)
    assert [row for row in record["rows"] if row["problem"]] == [] and record["status"] == 0
    assert len({row["operation"] for row in record["rows"]}) >= 13


@pytest.mark.interop
@needs_compiler
@triton_is_deprecated
@pytest.mark.parametrize("rows", [1, 2, 16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
def test_packed_weights_are_not_unpacked(rows, dtype):
    """By the account of the card's compiler: room for sums over parts of the inputs and for padded activations,
    and not for the matrix with a byte a weight."""
    n = m = 4096
    if rows > ternary.MAX_ROWS[jnp.dtype(dtype).name]:
        pytest.skip("unpacked first, by choice")
    x = jax.ShapeDtypeStruct((rows, m), dtype)
    codes = jax.ShapeDtypeStruct((n, m // 4), jnp.uint8)
    with card.aimed("h200") as devices:
        run = jax.jit(lambda x, codes: ternary.ternary_dot(x, codes))
        compiled = card.compiled(run, x, codes, mesh=card.alone(devices))
    room = compiled.memory_analysis().temp_size_in_bytes
    blocks = tuning.constants(dtype, rows, n, m)
    sums = 0 if blocks.split_k == 1 else 4 * blocks.split_k * rows * n
    assert room <= sums + 2 * m * max(16, rows) + 4 * rows * n + 4096
    assert "__gpu$xla.gpu.triton" in compiled.as_text()


@pytest.mark.interop
@needs_compiler
@triton_is_deprecated
@pytest.mark.parametrize("name", ["h200", "rtx4090"])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
@pytest.mark.parametrize("grouped", [False, True])
def test_all_tiles_of_the_search_fit(name, dtype, grouped):
    """And with scales of groups those that are taken without a table. A tile too large does not."""
    n, m = 2048, 1024
    codes = jax.ShapeDtypeStruct((n, m // 4), jnp.uint8)
    scale = jax.ShapeDtypeStruct((m // 128, n), jnp.float32) if grouped else None
    with card.aimed(name) as devices:

        def compiles(rows, blocks, spills):
            run = jax.jit(lambda x, c, s: ternary_pallas.dot(x, c, s, blocks))
            x = jax.ShapeDtypeStruct((rows, m), dtype)
            card.compiled(run, x, codes, scale, mesh=card.alone(devices), spills=spills)

        for rows in (1, 16, 64, 128):
            compiles(rows, tuning.constants(dtype, rows, n, m, grouped), spills=False)
            for blocks in () if grouped or rows == 64 else tuning.candidates(dtype, rows):
                compiles(rows, blocks, spills=True)  # the search finds out what it costs
        with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory size limit exceeded"):
            compiles(256, tuning.Blocks("gemm", 256, 128, 1, 4, 4), spills=True)


@pytest.mark.interop
@needs_compiler
@triton_is_deprecated
def test_integer_products_of_training_are_integer_products_there():
    """Not widened first: the operands of the product have 8 bits. Widened by hand, they have not."""
    q, t = (jax.ShapeDtypeStruct((1024, 1024), jnp.int8) for _ in range(2))
    with card.aimed("h200") as devices:
        mesh = card.alone(devices)
        taken = card.compiled(
            jax.jit(lambda q, t: integer.integer_matmul(q, t)), q, t, mesh=mesh, spills=True
        )
        wide = jax.jit(lambda q, t: jnp.matmul(q.astype(jnp.float32) + 1, t.astype(jnp.float32) + 1))
        widened = card.compiled(wide, q, t, mesh=mesh, spills=True)
    assert operands(taken) == {"s8"} and operands(widened) == {"f32"}


def operands(compiled):
    """Types of what is multiplied in a compiled program."""
    text = compiled.as_text()
    products = re.findall(r"(?:dot|custom-call)\(([^)]*)\).*?(?:contracting_dims|cublas|gemm)", text)
    names = {name.strip().lstrip("%").split("%")[-1] for each in products for name in each.split(",")[:2]}
    return {kind for name in names for kind in re.findall(rf"%?{re.escape(name)} = (\w+)\[", text)}


@pytest.mark.interop
@needs_compiler
@triton_is_deprecated
def test_a_plan_is_compiled_for_its_card():
    cfg = cli.get_config("smoke", **{"mesh.fsdp": 2, "model.dtype": "bfloat16"})
    figures = report.compile_step(cfg, "rtx4090")
    assert figures["for"] == "rtx4090" and figures["arguments"] > 0
    assert figures["traffic"]["all-reduce"] > 0 or figures["traffic"]["reduce-scatter"] > 0
