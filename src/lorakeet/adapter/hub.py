"""An adapter's folder onto the hub: its own files only, checked first, and the token never shown.

The token is the one of the usual login (``hf auth login``) or of ``HF_TOKEN`` unless given.
"""

from __future__ import annotations

import glob
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lorakeet._version import __version__
from lorakeet.adapter.model_card import CARD_NAME, public_name
from lorakeet.adapter.serialization import OWN_NAME, WEIGHTS_NAME, broken, never_learned, read_tensors
from lorakeet.errors import AdapterError
from lorakeet.log import info, warn
from lorakeet.lora.config import CONFIG_NAME, PeftConfig

#: What is uploaded of a folder, if it is there. Whatever else lies beside it (checkpoints, optimizer, .env) is not.
FILES = (
    *(CONFIG_NAME, WEIGHTS_NAME, OWN_NAME, CARD_NAME),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
)
#: The class of every failure of the connection itself, whichever HTTP library huggingface_hub is built on.
HTTPError = HfHubHTTPError.__bases__[0]
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write (huggingface.co/settings/tokens)"


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    message: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload the adapter in ``folder``, and those in its subfolders that ``save_pretrained`` names after adapters.

    Args:
        folder: What ``save_pretrained`` wrote.
        repo_id: ``user/name`` on the hub; made if it is not there.
        private: Whether a repository that is made is private; left out: the owner's default.
        message: The commit's message.
        revision: Branch to push to, made if it is not there; left out: ``main``.
        token: A token of the hub.

    Returns:
        The address of the repository's page.

    Raises:
        AdapterError: no valid, finite, trained adapter; no hub id; no token; or the hub refuses or cannot be reached.
            Whatever the hub said, the token is not in it.
    """
    files = _checked_files(Path(folder), repo_id)
    secret = _secret(token)
    info(f"uploading to {repo_id}: {', '.join(files)}")
    api = HfApi(token=secret, library_name="lorakeet", library_version=__version__)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision and not revision.startswith("refs/"):  # a pull request's branch is there
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in files],
            commit_message=message or "Upload LoRA adapter",
            revision=revision,
        )
        return f"{url}/tree/{revision}" if revision else str(url)
    except Exception as error:  # whatever it is: its text may hold the token
        failure = _failure(error, repo_id, secret)
    raise failure  # out here it carries no context


def _checked_files(folder: Path, repo_id: str) -> list[str]:
    """Paths of the files to upload, relative to ``folder``; the cheap checks come first."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise AdapterError(f"{repo_id!r} cannot be a name on the hub: {error}", "write it as user/name") from None
    if not folder.is_dir():
        raise AdapterError(f"{folder} is no folder here", "give the folder that save_pretrained wrote")
    adapters = _adapters(folder)
    if (folder / "run.yaml").is_file() and adapters == [folder / "adapter"]:
        raise AdapterError(f"{folder} is the folder of a run, not of an adapter", f"push {folder / 'adapter'}")
    for adapter in adapters or [folder]:
        _check(adapter)
    paths = [adapter / name for adapter in adapters for name in FILES]
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file()]


def _adapters(folder: Path) -> list[Path]:
    """The folder itself, if it holds an adapter, and its subfolders that do; checkpoints do not count."""
    inner = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    named = [path for path in inner if not path.name.startswith((".", "checkpoint"))]
    return ([folder] if (folder / CONFIG_NAME).is_file() else []) + named


def _check(folder: Path) -> None:
    """Refuse what nobody could use."""
    config = PeftConfig.from_pretrained(folder)
    tensors = read_tensors(folder)
    if problems := broken(tensors):
        raise AdapterError(f"{folder} is not pushed: {problems}", "lower the learning rate and train again")
    if never_learned(tensors):
        raise AdapterError(f"{folder} is not pushed: every B is zero, so it changes nothing", "train it first")
    base = config.base_model_name_or_path
    if base and not public_name(base):
        warn(f"{folder / CONFIG_NAME} names the base model by {base!r}, which others do not have")


def _secret(token: str | bool | None) -> str:
    """The token to use; never to be shown."""
    secret = token.strip() if isinstance(token, str) else None if token is False else get_token()
    if not secret:
        raise AdapterError("there is no token to push to the hub with", LOG_IN)
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        raise AdapterError("the token for the hub holds characters that no token has", LOG_IN)
    return secret


def _failure(error: BaseException, repo_id: str, secret: str) -> AdapterError:
    """What went wrong in one sentence, with a hint, without the token."""
    while isinstance(error, RuntimeError) and error.__cause__:  # "Error while uploading", which says nothing
        error = error.__cause__
    hub = constants.ENDPOINT
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    said = " ".join(text.replace(secret, "***").split())[:300]
    if isinstance(error, OfflineModeIsEnabled):
        return AdapterError(f"cannot push {repo_id!r}: HF_HUB_OFFLINE forbids it", "unset HF_HUB_OFFLINE")
    if status is None and isinstance(error, HTTPError):
        return AdapterError(f"cannot reach the hub at {hub}: {said}", "check the network, a proxy, and HF_ENDPOINT")
    if status == 401:
        return AdapterError(f"the hub at {hub} does not accept the token: {said}", LOG_IN)
    if status == 403:
        return AdapterError(
            f"the token may not write to {repo_id!r}: {said}",
            "is it your own user's or organisation's name? otherwise " + LOG_IN,
        )
    if status == 404:
        return AdapterError(f"the hub has no {repo_id!r}: {said}", "check the name, the branch, and HF_ENDPOINT")
    if status and (status == 429 or status >= 500):
        return AdapterError(f"the hub at {hub} answers {status}: {said}", "wait a little and push again")
    return AdapterError(f"pushing to {repo_id!r} failed: {said}")
