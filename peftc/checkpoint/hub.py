"""The Hugging Face Hub: an adapter's folder from there, and to there."""

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from peftc.checkpoint.files import BIN_NAME, ENCODER_NAME, WEIGHTS_NAME
from peftc.errors import CheckpointError, PeftcError
from peftc.specs.io import CONFIG_NAME

_NAMES = (CONFIG_NAME, WEIGHTS_NAME, BIN_NAME, ENCODER_NAME)
_MODEL_CONFIG = "config.json"


class Download(TypedDict, total=False):
    """Where on the Hub: huggingface_hub's own options. `revision`: a branch, tag or commit; `token`: True: the stored."""

    revision: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    force_download: bool


def locate(source: str | os.PathLike[str], subfolder: str | None = None, **download: Unpack[Download]) -> Path:
    """The folder of an adapter: `source` if it is one, else downloaded from the Hugging Face Hub.

    Raises CheckpointError if it is neither a folder nor a repository that can be reached, or the subfolder is not in it.
    """
    unknown = [name for name in download if name not in Download.__annotations__]
    if unknown:
        options = ", ".join(Download.__annotations__)
        raise CheckpointError(f"no such argument: {unknown[0]!r}; those of the Hub are {options}")
    parts = Path(subfolder or "").parts
    if ".." in parts or Path(subfolder or "").is_absolute():
        raise CheckpointError(f"subfolder={subfolder!r} is not inside of {source}")
    folder = Path(source)
    if folder.is_file():
        raise CheckpointError(f"{source}: is a file; give the folder of the adapter that it is in")
    if not folder.is_dir():
        folder = _downloaded(str(source), _NAMES, "/".join(parts), **download)
    found = folder.joinpath(*parts)
    if not found.is_dir() or (folder != Path(source) and not (found / CONFIG_NAME).exists()):
        place = f"no subfolder {subfolder!r} with an" if subfolder else "no"
        raise CheckpointError(f"{source}: has {place} adapter ({CONFIG_NAME})")
    if folder != Path(source) and not any((found / name).exists() for name in (WEIGHTS_NAME, BIN_NAME)):
        raise CheckpointError(f"{source}: has a config, but no {WEIGHTS_NAME}")
    _require_one(found)
    return found


def model_config(source: str | os.PathLike[str]) -> Path:
    """The `config.json` of a model: a file, that of a folder, or of a repository of the Hub, whose weights are not fetched.

    Raises CheckpointError if there is none.
    """
    path = Path(source)
    found = path if path.exists() else _downloaded(str(source), (_MODEL_CONFIG,), "")
    file = found / _MODEL_CONFIG if found.is_dir() else found
    if not file.is_file():
        raise CheckpointError(
            f"{source}: has no {_MODEL_CONFIG}. Give a model's folder, its config, or a repository of the Hub"
        )
    return file


def _require_one(folder: Path) -> None:
    """Raise CheckpointError if a folder has no adapter, but folders with adapters in it."""
    inside = (
        () if (folder / CONFIG_NAME).exists() else sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_NAME}"))
    )
    if inside:
        raise CheckpointError(
            f"{folder}: has no {CONFIG_NAME}, but adapters in folders of their own: {', '.join(inside[:8])}. Give one of"
            f" them, or subfolder={inside[0]!r}"
        )


def _downloaded(source: str, names: Sequence[str], subfolder: str, **download: Unpack[Download]) -> Path:
    """Files of these names out of a repository of the Hub. Raises CheckpointError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [f"{subfolder}/{name}" if subfolder else name for name in names]
    options: Any = {**download, "revision": download.get("revision") or None}
    try:
        return Path(snapshot_download(source, allow_patterns=patterns, **options))
    except RevisionNotFoundError:
        raise CheckpointError(f"{source}: the Hub repository has no revision {options['revision']!r}") from None
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source}: neither a folder here nor a Hub repository that can be reached ({error})"
        ) from None


def push(
    repo_id: str,
    adapters: Sequence[str],
    write: Callable[[Path], None],
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str | None,
    commit_description: str | None,
) -> Any:
    """Upload what `write` puts into a folder as one commit; the CommitInfo of it. Cards on the Hub are kept.

    Raises CheckpointError; the repository may have been created then, its files are as they were.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision and not create_pr and not re.fullmatch(r"refs/.*|[0-9a-f]{40}", revision):
                api.create_branch(repo, branch=revision, exist_ok=True)
            there = set(api.list_repo_files(repo, revision=revision))
            paths = ["" if adapter == "default" else f"{adapter}/" for adapter in adapters]
            for card in {f"{path}README.md" for path in paths} & there:
                api.hf_hub_download(repo, card, revision=revision, local_dir=folder)
            write(folder)
            return api.create_commit(
                repo_id=repo,
                operations=_operations(folder, {path + ENCODER_NAME for path in paths} & there),
                commit_message=commit_message or "Upload adapter",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
        except PeftcError:
            raise
        except Exception as error:  # The client's transport raises errors of its own.
            reason = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
            raise CheckpointError(
                f"{repo_id}: the adapter was not uploaded: {reason}. Files on the Hub are as they were."
            ) from None


def _operations(folder: Path, stale: set[str]) -> list[Any]:
    """Add every file of `folder`; delete prompt encoders that made other rows."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    own = {name: file for name, file in files.items() if not name.startswith(".cache/")}
    return [
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in own.items()),
        *(CommitOperationDelete(path_in_repo=name) for name in sorted(stale - set(own))),
    ]
