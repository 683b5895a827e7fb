"""Upload of an export to the Hugging Face Hub, or to the server that `HF_ENDPOINT` names."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from unified_lm.core.errors import CheckpointError
from unified_lm.export.manifest import FILE_NAME, Manifest
from unified_lm.models.weights_hash import check_weights

_log = logging.getLogger(__name__)


def push_to_hub(
    directory: Path, repo_id: str, private: bool = True, token: str | None = None, commit_message: str = "Upload model"
) -> str:
    """Create the repository if necessary, and upload an export folder in one commit.

    Args:
        directory: an export (it has a manifest).
        repo_id: "organization/name".
        private: whether a new repository is private; an existing one keeps its visibility.
        token: access token with write permission; None takes `HF_TOKEN` or the stored login.
        commit_message: message of the commit.

    Returns:
        The address of the repository.

    Raises:
        CheckpointError: the directory is not an export, the name is malformed, the token is missing or lacks permission, there
            is no network, or the server failed. The text never contains the token.
        ModelError: the weights are not those that were exported, or some are missing; nothing was uploaded.
    """
    manifest = Manifest.load(directory)
    check_weights(directory, manifest.weights_hash)
    api = HfApi(token=token)
    try:
        address = str(api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model"))
        api.upload_folder(
            folder_path=directory,
            repo_id=repo_id,
            repo_type="model",
            commit_message=commit_message,
            commit_description=f"recipe {manifest.recipe}, weights {manifest.weights_hash} ({FILE_NAME} has the rest)",
        )
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        # "from None": the chained error could print the token in a request's headers
        raise CheckpointError(_explain(error, repo_id, api.endpoint, directory, token)) from None
    _log.info("pushed %s to %s", directory, address)
    return address


def _explain(error: Exception, repo_id: str, endpoint: str, directory: Path, token: str | None) -> str:
    """What went wrong and how to fix it, without the token."""
    again = f"The export in {directory} is complete; push it again with push_to_hub once this is fixed."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, HFValidationError):
        return f"'{repo_id}' is not a repository name: {error}. Expected organization/name."
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return (
            f"{endpoint} requires an access token with write permission to push to '{repo_id}'; got none, or an invalid one. "
            f"Set HF_TOKEN or run `hf auth login`. {again}"
        )
    if status == 403:
        return f"the access token may not write to '{repo_id}' at {endpoint}. Use a token with write permission there. {again}"
    if isinstance(error, OfflineModeIsEnabled) or constants.is_offline_mode():
        return f"cannot push to '{repo_id}': offline mode is on. Unset HF_HUB_OFFLINE. {again}"
    detail = f"{type(error).__name__}: {error}"
    if token:
        detail = detail.replace(token, "***")
    return f"could not push to '{repo_id}' at {endpoint} ({detail}). Check the network and HF_ENDPOINT. {again}"
