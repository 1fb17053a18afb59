"""A few instructions of PTX on NumPy arrays of words, to test inline assembly where no GPU is.

The meaning of each is that of NVIDIA's PTX ISA 8.7: `prmt` picks bytes of two words by four selectors, `dp4a`
adds the products of four unsigned and four signed bytes.
"""

import re

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


INSTRUCTIONS = {
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
        registers[target] = INSTRUCTIONS[name](*values).astype(np.uint32)
    return registers
