"""Compile for a GPU that is not here.

XLA's CUDA compiler, Triton's and the assembler behind them need a description of the card and no card, so a
machine without one can find out whether a program compiles for it, how much memory it takes, whether its
kernels fit into registers and shared memory, and what machine code it becomes. Nothing runs: it says nothing
about results, and about speed only what the machine code says.

    with card.aimed("h200") as devices:
        compiled = card.compiled(jax.jit(f), x_shape, mesh=card.alone(devices))

Within the context `dispatch` answers as on that card, and probes pass: which implementation is taken is what a
card on which they pass would take. Library choices that are made by timing (XLA's autotuning) are not made.
Needs the extra `card`: jax's CUDA plugin, 0.11 or newer, and none of the CUDA libraries.
"""

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np

from nanochat_jax.kernels import dispatch

# What is taken for granted of the machine that the card is in.
CUDNN, CUDA = (9, 12), (13, 0)


class Card(NamedTuple):
    """A card as its compiler sees it. capability: (major, minor). shared: bytes of shared memory that a program
    may have, and that a multiprocessor has. threads, lanes: of a multiprocessor at once. l2, memory: bytes.
    bandwidth: bytes/s. clock: GHz."""

    kind: str
    capability: tuple[int, int]
    multiprocessors: int
    shared: tuple[int, int]
    threads: int
    lanes: int
    l2: int
    memory: int
    bandwidth: float
    clock: float


KIB, MIB, GIB = 2**10, 2**20, 2**30
_DATACENTER = {"shared": (227 * KIB, 228 * KIB), "threads": 2048, "lanes": 128}
_CONSUMER = {"shared": (99 * KIB, 100 * KIB), "threads": 1536, "lanes": 128}
# Sources: CUDA C++ programming guide, table of compute capabilities; the data sheets of `plan.devices`.
CARDS: dict[str, Card] = {
    "rtx4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 128, **_CONSUMER, l2=72 * MIB, memory=24 * GIB,
                    bandwidth=1.008e12, clock=2.52),
    "rtx5090": Card("NVIDIA GeForce RTX 5090", (12, 0), 170, **_CONSUMER, l2=96 * MIB, memory=32 * GIB,
                    bandwidth=1.792e12, clock=2.41),
    "rtxpro6000": Card("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", (12, 0), 188, **_CONSUMER,
                       l2=128 * MIB, memory=96 * GIB, bandwidth=1.792e12, clock=2.6),
    "a100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, shared=(163 * KIB, 164 * KIB), threads=2048, lanes=64,
                 l2=40 * MIB, memory=80 * GIB, bandwidth=2.039e12, clock=1.41),
    "h100": Card("NVIDIA H100 80GB HBM3", (9, 0), 132, **_DATACENTER, l2=50 * MIB, memory=80 * GIB,
                 bandwidth=3.35e12, clock=1.98),
    "h200": Card("NVIDIA H200", (9, 0), 132, **_DATACENTER, l2=60 * MIB, memory=141 * 10**9, bandwidth=4.8e12,
                 clock=1.98),
    "b200": Card("NVIDIA B200", (10, 0), 148, **_DATACENTER, l2=126 * MIB, memory=180 * 10**9, bandwidth=8.0e12,
                 clock=1.965),
}  # fmt: skip


def missing() -> str:
    """Why no card can be aimed at here, in one sentence; "" if one can."""
    if jax.__version_info__ < (0, 11):
        return f"compiling for a card that is not here needs jax 0.11 or newer, this is {jax.__version__}"
    # The namespace is there with the first plugin.
    installed = importlib.util.find_spec("jax_plugins") and any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13)
    )
    if not installed:
        return "compiling for a card that is not here needs jax's CUDA compiler: pip install 'nanochat_jax[card]'"
    if jax.config.jax_platforms != "cpu" and jax.default_backend() == "cpu":
        # jax has looked for the CUDA libraries, and put the plugin away with them.
        return "compiling for a card that is not here needs JAX_PLATFORMS=cpu in the environment"
    return ""


@contextlib.contextmanager
def aimed(name: str, count: int = 1) -> Iterator[list[Any]]:
    """Programs traced within are for `count` cards of that name in one machine; yields their devices.

    Raises: ValueError for an unknown name; RuntimeError if the compiler is not installed.
    """
    if name not in CARDS:
        raise ValueError(f"unknown card '{name}'; known: {', '.join(CARDS)}")
    if reason := missing():
        raise RuntimeError(reason)
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        "", "cuda", target_config=_description(CARDS[name]), topology=f"1x1x{count}"
    )
    devices = list(topology.devices)
    with dispatch.aimed_at(devices), _answers(CARDS[name]):
        yield devices


def alone(devices: Sequence[Any]) -> jax.sharding.Mesh:
    """A mesh of the first of them."""
    return jax.make_mesh((1,), ("card",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices[:1])


def compiled(
    jitted: Any, *arguments: Any, mesh: jax.sharding.Mesh, spills: bool = False
) -> jax.stages.Compiled:
    """A jitted function, compiled for the devices of a mesh.

    Args: arguments: arrays or shapes; what has no sharding lies whole on each device. spills: whether kernels
    may keep values that do not fit into registers in memory.
    Raises: what the compiler raises, such as RESOURCE_EXHAUSTED for a kernel that needs too much shared memory.
    """
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def placed(leaf: Any) -> Any:
        sharding = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding or whole)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jitted.trace(*jax.tree.map(placed, arguments)).lower(lowering_platforms=("cuda",))
    options: dict[str, Any] = {"xla_gpu_autotune_level": 0}
    if not spills:
        options["xla_gpu_fail_ptx_compilation_on_register_spilling"] = True
    return lowered.compile(compiler_options=options)


def _description(card: Card) -> str:
    """The card in XLA's own words: a text of its message GpuTargetConfigProto."""
    numbers = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 48 * KIB,
        "shared_memory_per_core": card.shared[1], "threads_per_core_limit": card.threads,
        "core_count": card.multiprocessors, "fpus_per_core": card.lanes, "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1, "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": round(card.bandwidth), "l2_cache_size": card.l2, "clock_rate_ghz": card.clock,
        "device_memory_size": card.memory, "shared_memory_per_block_optin": card.shared[0],
        "registers_per_core_limit": 2**16, "registers_per_block_limit": 2**16,
    }  # fmt: skip
    lines = " ".join(f"{key}: {value}" for key, value in numbers.items())
    major, minor = card.capability
    # From Hopper on, with the instructions that only this generation has.
    own = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return (
        f"gpu_device_info {{ {lines} cuda_compute_capability {{ major: {major} minor: {minor} {own} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }} '
        f'runtime_version {{ major: {CUDA[0]} minor: {CUDA[1]} }} device_description_str: "{card.kind}"'
    )


@contextlib.contextmanager
def _answers(card: Card) -> Iterator[None]:
    """Answers for jax, which in three places asks the card that it runs on, not the one it compiles for."""
    version = ".".join(map(str, card.capability))
    ours = {
        ("jax._src.cudnn.fused_attention_stablehlo", "check_cudnn_version"): lambda: (
            CUDNN[0] * 10_000 + CUDNN[1] * 100
        ),
        ("jax._src.cudnn.fused_attention_stablehlo", "check_compute_capability"): (
            lambda least: card.capability >= tuple(map(int, least.split(".")))
        ),
        ("jax._src.cudnn.fused_attention_stablehlo", "is_cuda_compute_capability_equal"): lambda which: (
            which == version
        ),
        ("jax._src.pallas.triton.gpu_info", "_get_device_arch_name"): lambda kind: version,
    }
    with contextlib.ExitStack() as stack:
        for (module, name), function in ours.items():
            stack.enter_context(mock.patch(f"{module}.{name}", function))
        yield
