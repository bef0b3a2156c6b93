"""Uploads a model folder to the Hugging Face Hub."""

from pathlib import Path

PATTERNS = ["*.json", "*.txt", "*.safetensors", "README.md", "preview.png", "NOTICE", "LICENSE*"]
"""What of a folder is a model's: no logs, no pickles."""


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload a model's folder in one commit, to a repository that is made if need be; its address.

    `token` is by default that of `hf auth login` or the variable HF_TOKEN; `endpoint` is another
    server than huggingface.co. Raises ValueError for a folder without a model, for a name that is
    no OWNER/NAME, without a token, offline, and with the hub's reason where it refuses.
    """
    from huggingface_hub import HfApi, get_token, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not any(folder.rglob("*.safetensors")):
        raise ValueError(f"{folder} holds no model: no .safetensors file is in it")
    token = get_token() if token is None else token
    if token is None:
        raise ValueError(
            "the hub asks who you are: `hf auth login`, or a token with the right to write in the "
            "variable HF_TOKEN"
        )
    if is_offline_mode():
        raise ValueError("nothing can be uploaded offline; unset the variable HF_HUB_OFFLINE")
    api = HfApi(endpoint=endpoint, token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            allow_patterns=PATTERNS,
            commit_message="Upload a model of latentdiff",
        )
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} must be OWNER/NAME: {error}") from error
    except HfHubHTTPError as error:
        why = str(error.server_message or error).splitlines()[0]
        raise ValueError(f"the hub refuses {repo_id}: {why}") from error
    except (OSError, RuntimeError) as error:  # no network, by the kinds of httpx
        raise ValueError(f"{repo_id} could not be uploaded: {error}") from error
    return str(url)
