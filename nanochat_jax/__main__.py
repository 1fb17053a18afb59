"""The console script as a module: python -m nanochat_jax <room> [flags]"""

from nanochat_jax import cli

if __name__ == "__main__":
    cli.main()
