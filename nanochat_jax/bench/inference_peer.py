"""transformers' `generate` on an exported folder, for bench/inference.py; runs in another interpreter.

Reads {"folder", "first", "prompts", "rows", "tokens", "threads"} as JSON; writes times as JSON. Greedy, in
float32, with its own key/value cache. Imports nothing of this package.
"""

import json
import sys
import time


def main() -> None:
    """Measure; the first run of each kind warms up and does not count."""
    given = json.loads(sys.stdin.read())
    sys.path.pop(0)  # this folder, whose files are named like packages that transformers looks for
    import torch  # type: ignore[import-not-found]
    import transformers  # type: ignore[import-not-found]

    if given["threads"]:
        torch.set_num_threads(given["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        given["folder"], dtype=torch.float32, trust_remote_code=True
    ).eval()

    def seconds(prompts: list[list[int]], tokens: int) -> float:
        ids = torch.tensor(prompts)
        began = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
                min_new_tokens=tokens, pad_token_id=0,
            )  # fmt: skip
        spent = time.perf_counter() - began
        if made.shape[1] != ids.shape[1] + tokens:
            raise RuntimeError(f"{made.shape[1] - ids.shape[1]} new tokens, not {tokens}")
        return spent

    first = [1e3 * seconds([prompt], 1) for prompt in given["first"]][1:]
    found = []
    for rows in given["rows"]:
        prompts, rates = given["prompts"], []
        for i in range(0, len(given["first"]) * rows, rows):
            part = prompts[i : i + rows]
            alone = seconds(part, 1)  # the prompt, and the first token
            rates.append(rows * (given["tokens"] - 1) / (seconds(part, given["tokens"]) - alone))
        found.append({"rows": rows, "tokens_per_second": rates[1:]})
    record = {
        "first_token_ms": first, "decode": found, "torch": torch.__version__,
        "transformers": transformers.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip
    sys.stdout.write("\n" + json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
