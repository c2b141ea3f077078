"""The Hugging Face Hub: an adapter's folder from there, and to there."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict, Unpack

from peftc.checkpoint.files import BIN_NAME, ENCODER_NAME, WEIGHTS_NAME
from peftc.errors import CheckpointError
from peftc.specs.io import CONFIG_NAME

_NAMES = (CONFIG_NAME, WEIGHTS_NAME, BIN_NAME, ENCODER_NAME)


class Download(TypedDict, total=False):
    """Where on the Hub: huggingface_hub's own options. `revision`: a branch, tag or commit; `token`: True: the stored."""

    revision: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    force_download: bool
    proxies: dict[str, str] | None


def locate(source: str | os.PathLike[str], subfolder: str | None = None, **download: Unpack[Download]) -> Path:
    """The folder of an adapter: `source` if it is one, else downloaded from the Hugging Face Hub.

    Raises CheckpointError if it is neither a folder nor a repository that can be reached, or the subfolder is not in it.
    """
    parts = Path(subfolder or "").parts
    if ".." in parts or Path(subfolder or "").is_absolute():
        raise CheckpointError(f"subfolder={subfolder!r} is not inside of {source}")
    folder = Path(source)
    if not folder.is_dir():
        folder = _downloaded(str(source), "/".join(parts), download)
    found = folder.joinpath(*parts)
    if not found.is_dir():
        raise CheckpointError(f"{source}: has no subfolder {subfolder!r} with an adapter")
    return found


def _downloaded(source: str, subfolder: str, download: Download) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [f"{subfolder}/{name}" if subfolder else name for name in _NAMES]
    options: Any = download
    try:
        return Path(snapshot_download(source, allow_patterns=patterns, **options))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source}: neither a folder here nor a Hub repository that can be reached ({error})"
        ) from None


def push(
    repo_id: str,
    write: Callable[[Path], None],
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str | None,
    commit_description: str | None,
) -> Any:
    """Upload the folder that `write` fills as one commit; the CommitInfo of it. Raises CheckpointError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                api.create_branch(repo, branch=revision, exist_ok=True)
            return api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or "Upload adapter",
                commit_description=commit_description,
            )
        except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
            raise CheckpointError(f"{repo_id}: the adapter was not uploaded: {error}") from None
