"""Serve a trained run to OpenAI clients and browsers: python -m nanochat_jax.serve --workdir=runs/tiny"""

import dataclasses

from nanochat_jax import cli
from nanochat_jax.config import Config, resolve, to_dict

FLAGS = {
    "host": cli.Flag("127.0.0.1", "address to listen on"),
    "port": cli.Flag(8000, "0 takes a free one"),
    "hosts": cli.Flag("", "further names that clients may call the server by, with commas; * = any"),
    "i_know": cli.Flag(False, "listen beyond this machine without an API key"),
    "api_key_file": cli.Flag(
        "", "file (mode 600) with the API key; else NANOCHAT_JAX_API_KEY; none = no key"
    ),
    "name": cli.Flag("", "model id; default the run's name"),
    "slots": cli.Flag(8, "requests answered at the same time"),
    "capacity": cli.Flag(0, "tokens of prompt and answer together; default infer.capacity"),
    "weights": cli.Flag("", "auto, full, codes or packed; default infer.weights"),
    "draft_tokens": cli.Flag(-1, "tokens drafted ahead, 0 = none; default infer.draft_tokens"),
    "draft_loops": cli.Flag(-1, "loops of the drafts, 0 = layers of model.mtp; default infer.draft_loops"),
    "max_queue": cli.Flag(64, "requests that may wait; more get 429"),
    "deadline": cli.Flag(120.0, "seconds for a whole request"),
    "drain": cli.Flag(30.0, "seconds that running answers get after SIGTERM"),
    "strict": cli.Flag(False, "refuse unknown fields"),
    "log_prompts": cli.Flag(False, "write requests to the log"),
}


def main(cfg: Config, call: cli.Invocation) -> int:
    """Load the run in --workdir (its own config, unless --config is given) and serve it."""
    home, cfg = cli.trained(call)
    if wrong := next((name for name in ("slots", "max_queue", "deadline") if call.flags[name] <= 0), ""):
        raise cli.UsageError(f"--{wrong} must be positive, got {call.flags[wrong]}")
    if call.drain < 0:
        raise cli.UsageError(f"--drain must not be negative, got {call.drain:g}")
    if not 0 <= call.port < 2**16:
        raise cli.UsageError(f"--port must be 0 to 65535, got {call.port}")
    given = {"capacity": 0, "weights": "", "draft_tokens": -1, "draft_loops": -1}
    changes = {name: call.flags[name] for name, absent in given.items() if call.flags[name] != absent}
    infer = resolve({**to_dict(cfg), "infer": {**dataclasses.asdict(cfg.infer), **changes}}).infer
    cli.setup_runtime(cfg, keep_freed=False)
    from nanochat_jax.serve import run

    key = run.read_key(call.api_key_file) or cli.api_key()
    if call.host not in run.LOOPBACK and not key and not call.i_know:
        raise cli.UsageError(
            f"--host={call.host} without an API key lets anyone use this machine; see --i_know"
        )
    limits = run.Limits(
        call.max_queue, call.deadline, drain=call.drain, api_key=key, strict=call.strict,
        hosts=(*run.LOOPBACK, "[::1]", call.host, *call.hosts.split(",")), log_prompts=call.log_prompts,
    )  # fmt: skip
    service = run.load_service(cfg, home, infer, call.slots, limits, call.name or cfg.name)
    return run.serve(service, call.host, call.port, lambda line: print(line, flush=True))


if __name__ == "__main__":
    cli.run("serve", main, FLAGS, needs_config=False)
