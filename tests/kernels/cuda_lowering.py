"""Lowering for CUDA on a machine without a GPU: everything but Triton's own compiler."""

import contextlib

import jax


def cuda_text(function, *shapes) -> str:
    """The program for a GPU. What interpret mode allows and a GPU does not raises here."""
    with some_gpu():
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def some_gpu():
    """The device that newer versions of jax ask for when they lower without one."""
    if not hasattr(jax.sharding, "AbstractDevice") or jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    auto = (jax.sharding.AxisType.Auto,)
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("x",), auto, abstract_device=device)
    )
