"""A few instructions of PTX on NumPy arrays of words, to test inline assembly where no GPU is.

The meaning of each is that of NVIDIA's PTX ISA 8.7: `prmt` picks bytes of two words by four selectors, `dp4a`
adds the products of four unsigned and four signed bytes, `fma` rounds once. Sums are made with 64 bits of
mantissa, so that a float32 could be rounded twice where its digits end in forty zeros or ones.
"""

import re

import ml_dtypes
import numpy as np


def _prmt(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
    pool = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    made = np.zeros_like(pool)
    for place in range(4):
        which = (int(selectors) >> (4 * place)) & 15
        assert which < 8, "selectors that repeat a sign are not modelled"
        made |= ((pool >> np.uint64(8 * which)) & np.uint64(255)) << np.uint64(8 * place)
    return made.astype(np.uint32)


def _dp4a(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    bytes_of = lambda words, dtype: words[..., None].view(dtype).astype(np.int64)  # noqa: E731
    sums = total.view(np.int32) + np.sum(bytes_of(a, np.uint8) * bytes_of(b, np.int8), -1)
    return sums.astype(np.int32).view(np.uint32)


def _floats(function):
    """An instruction on float32, rounded to nearest."""
    wide = np.longdouble
    return lambda *words: (
        function(*(w.view(np.float32).astype(wide) for w in words)).astype(np.float32).view(np.uint32)
    )


def _fma_pairs(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    a, b, c = (
        np.broadcast_to(w, a.shape)[..., None].copy().view(ml_dtypes.bfloat16).astype(np.float64)
        for w in (a, b, c)
    )
    return (a * b + c).astype(ml_dtypes.bfloat16).view(np.uint32)[..., 0]


def _add_down(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    exact = a.view(np.float32).astype(np.float64) + b.view(
        np.float32
    )  # of numbers between 2^-20 and 2^30: exact
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near).view(np.uint32)


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "or.b32": np.bitwise_or,
    "shr.u32": np.right_shift,
    "mul.rn.f32": _floats(lambda a, b: a * b),
    "neg.f32": _floats(lambda a: -a),
    "fma.rn.f32": _floats(lambda a, b, c: a * b + c),
    "div.rn.f32": _floats(lambda a, b: a / b),
    "fma.rn.bf16x2": _fma_pairs,
    "add.rm.f32": _add_down,
    "and.b32": np.bitwise_and,
    "shr.b32": np.right_shift,
    "shl.b32": np.left_shift,
    "prmt.b32": _prmt,
    "dp4a.u32.s32": _dp4a,
}


def run(text: str, registers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The registers after straight-line code. Raises: KeyError for an instruction that is not known here."""
    registers = dict(registers)
    for line in filter(None, (line.strip(" {}") for line in text.split(";"))):
        name, rest = line.split(None, 1)
        if name == ".reg":
            continue
        target, *sources = re.split(r",\s*", rest)
        values = [registers[s] if s in registers else np.uint32(int(s, 0)) for s in sources]
        registers[target] = np.asarray(INSTRUCTIONS[name](*values)).astype(np.uint32)
    return registers


class Primitives:
    """Stands for the module of Triton's primitives, on NumPy arrays: `pack` elements are a word or more."""

    def elementwise_inline_asm(self, asm, *, args, constraints, pack, result_shape_dtypes):
        outputs = sum(part.startswith("=") for part in constraints.split(","))
        words = {f"${outputs + i}": np.asarray(a).view(np.uint32) for i, a in enumerate(args)}
        results = run(asm, words)
        (shape,) = result_shape_dtypes
        # The registers of a word's results, in order.
        made = np.stack([results[f"${i}"] for i in range(outputs)], -1)
        return [made.reshape(-1).view(shape.dtype).reshape(shape.shape)]
