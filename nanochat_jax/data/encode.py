"""Text to token files in blocks: by this process, or by several, with a record of what is whole.

The blocks are a function of the text alone, and every block's tokens of the text and the tokenizer,
so the files are the same bytes for any number of processes and after any interruption. With
processes (see `workers`), each writes the blocks it is given to files of their own, and a ledger
names the whole ones with their hash; the first process appends them in order.
"""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.data import turns, workers
from nanochat_jax.data.text import Text
from nanochat_jax.files import write_json

BLOCK_BYTES = 4_000_000  # text encoded between two records of progress

Report = Callable[[str], None]


def blocks(offsets: np.ndarray) -> list[range]:
    """Documents of each block: as many as BLOCK_BYTES hold, and at least one."""
    found, done, total = [], 0, len(offsets) - 1
    while done < total:
        after = int(np.searchsorted(offsets, offsets[done] + BLOCK_BYTES, "right")) - 1
        found.append(range(done, max(done + 1, after)))
        done = found[-1].stop
    return found


def encode(
    tokenizer: tokenizers.Tokenizer,
    text: Text,
    dtype: str,
    out: Path,
    work: Path,
    records: Path,
    report: Report,
    processes: int = 0,
) -> dict[str, int]:
    """Write BOS + tokens of every document, and offsets. Returns tokens per split.

    Goes on after the last block that records/progress.json calls whole.
    Args: work: where the text is. records: directory for progress and for blocks of processes.
    processes: 0 = threads of this one.
    """
    ends, plan = {"train": 0, "val": 0}, blocks(text.offsets)
    names = [f"{split}.{kind}" for split in ends for kind in ("bin", "offsets")]
    done, sizes = 0, dict.fromkeys(names, 0)
    record = records / "progress.json"
    if record.exists():
        done, ends, sizes = (json.loads(record.read_text())[key] for key in ("done", "ends", "sizes"))
        report(f"continuing after {done} of {len(text.held_out)} documents")
    with ExitStack() as stack:
        outs = {name: stack.enter_context(open(out / name, "ab")) for name in names}
        for name, handle in outs.items():
            handle.truncate(sizes[name])  # what came after the last record may be half a block
            if not sizes[name] and name.endswith("offsets"):
                handle.write(np.zeros(1, "<i8").tobytes())
        due = [(index, block) for index, block in enumerate(plan) if block.stop > done]
        if processes:
            made = workers.encoded(due, dtype, work, records, out / "tokenizer.json", processes, text.kind)
        else:
            made = (_encoded(tokenizer, text, block, dtype) for _, block in due)
        stack.enter_context(closing(made))
        for (_, block), (tokens, lengths) in zip(due, made, strict=True):
            for split, wanted in (("train", False), ("val", True)):
                chosen = text.held_out[block.start : block.stop] == wanted
                outs[f"{split}.bin"].write(tokens[np.repeat(chosen, lengths)].tobytes())
                own = ends[split] + np.cumsum(lengths[chosen])
                outs[f"{split}.offsets"].write(own.astype("<i8").tobytes())
                ends[split] = int(own[-1]) if len(own) else ends[split]
            for handle in outs.values():
                handle.flush()
                os.fsync(handle.fileno())
            sizes = {name: os.fstat(handle.fileno()).st_size for name, handle in outs.items()}
            write_json(record, {"done": block.stop, "ends": ends, "sizes": sizes})
    return ends


def _encoded(tokenizer: tokenizers.Tokenizer, text: Text, block: range, dtype: str) -> workers.Block:
    documents = [text[i] for i in block]
    if text.kind == "text":  # in threads
        return workers.packed(tokenizer.encode_batch(documents), tokenizer.bos_id, dtype)
    encode = turns.encoder(tokenizer, text.kind)
    return workers.packed([encode(document) for document in documents], tokenizer.bos_id, dtype)
