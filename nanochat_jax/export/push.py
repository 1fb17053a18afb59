"""Upload a finished export to the Hugging Face hub (extra 'export': huggingface_hub).

Nothing is uploaded that was changed after it was written, or that holds a token, a key or a home
directory. The access token is the hub's own (HF_TOKEN, or `hf auth login`); it is neither read nor shown here.
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat_jax.export import folder
from nanochat_jax.export.variants import ExportError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def listing(source: Path) -> list[str]:
    """One line per file: hash, size, name."""
    paths = [*folder.files(source), source / folder.SUMS]
    return [
        f"{folder.sha256(path)[:12]}  {path.stat().st_size:>14,}  {path.relative_to(source).as_posix()}"
        for path in paths
    ]


def push(
    source: Path, repository: str, private: bool = True, dry_run: bool = False,
    report: Callable[[str], None] = lambda line: None, hub: Any = None,
) -> str:  # fmt: skip
    """Check the folder, say what would be uploaded and, unless dry_run, upload it in one commit.

    Args: repository: owner/name. private: if the repository is made by this call. hub: an HfApi; the
    library's own by default.
    Returns: address of the commit, or "" for a dry run.
    Raises: ExportError for a bad name, a changed file or a secret; ModuleNotFoundError without the package.
    """
    if not NAME.fullmatch(repository):
        raise ExportError(f"--push needs owner/name, got '{repository}'")
    if found := folder.changed(source):
        raise ExportError(f"{source} was changed after it was written: {', '.join(found[:5])}; export anew")
    if found := folder.secrets(source):
        raise ExportError(f"{source} must not be published: {'; '.join(found[:5])}")
    for line in listing(source):
        report(line)
    if dry_run:
        report(f"dry run: nothing was uploaded to {repository} ({'private' if private else 'public'})")
        return ""
    hub = hub or importlib.import_module("huggingface_hub").HfApi()
    hub.create_repo(repo_id=repository, private=private, exist_ok=True)
    done = hub.upload_folder(
        folder_path=str(source), repo_id=repository, commit_message="Upload from nanochat_jax.export"
    )
    return str(getattr(done, "commit_url", done))
