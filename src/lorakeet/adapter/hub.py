"""Upload an adapter's folder to the hub: its own files only, checked first; the token is never shown.

The token is that of the login (``hf auth login``) or of ``HF_TOKEN``, unless given.
"""

from __future__ import annotations

import glob
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lorakeet._version import __version__
from lorakeet.adapter.adapter_folders import saved_adapters
from lorakeet.adapter.model_card import CARD_NAME, public_name
from lorakeet.adapter.serialization import OWN_NAME, WEIGHTS_NAME, read_tensors
from lorakeet.adapter.tensor_checks import is_untrained, nonfinite_error
from lorakeet.errors import AdapterError
from lorakeet.log import info, warn
from lorakeet.lora.config import CONFIG_NAME, PeftConfig
from lorakeet.security.paths import file_problem, is_dir, is_file
from lorakeet.security.shown import HIDDEN, redact

#: Names of the files that are uploaded, if they exist. Other files of the folder (checkpoints, optimizer, .env) are not.
FILES = (
    *(CONFIG_NAME, WEIGHTS_NAME, OWN_NAME, CARD_NAME),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
)
#: Class of all failures of the connection, in the HTTP library that huggingface_hub is built on.
HTTPError = HfHubHTTPError.__bases__[0]
#: Characters of the hub's own message that an error shows.
_MESSAGE_LENGTH = 300
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write (huggingface.co/settings/tokens)"


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    message: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_untrained: bool = False,
) -> str:
    """Upload the adapter in ``folder``, and the further adapters that ``save_pretrained`` wrote into its subfolders.

    Args:
        folder: The folder that ``save_pretrained`` wrote.
        repo_id: ``user/name`` on the hub; made if it does not exist.
        private: Whether a new repository is private; left out: the owner's default.
        message: Message of the commit.
        revision: Branch to push to, made if it does not exist; left out: ``main``.
        token: Token for the hub; False: none.
        allow_untrained: Accept an adapter whose every B is zero.

    Returns:
        The address of the repository's page.

    Raises:
        AdapterError: no valid, finite, trained adapter; no hub id; no token; or the hub refuses or cannot be reached.
            The token is redacted from the hub's message.
    """
    files = _checked_files(Path(folder), repo_id, allow_untrained)
    secret = _secret(token)
    info(f"uploading to {repo_id}: {', '.join(files)}")
    api = HfApi(token=secret, library_name="lorakeet", library_version=__version__)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision and not revision.startswith("refs/"):  # a pull request's branch exists
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in files],
            commit_message=message or "Upload LoRA adapter",
            revision=revision,
        )
        return f"{url}/tree/{revision}" if revision else str(url)
    except Exception as error:  # of any class: its text may contain the token
        failure = _push_error(error, repo_id, secret)
    raise failure  # outside of the except block, so that it has no context


def _checked_files(folder: Path, repo_id: str, allow_untrained: bool) -> list[str]:
    """Return the paths of the files to upload, relative to ``folder``; the cheap checks come first."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise AdapterError(f"{repo_id!r} cannot be a name on the hub: {error}", "write it as user/name") from None
    if not is_dir(folder):
        raise AdapterError(f"{folder} is not a folder", "give the folder that save_pretrained wrote")
    adapters = list(saved_adapters(folder).values())
    if is_file(folder / "run.yaml") and adapters == [folder / "adapter"]:
        raise AdapterError(f"{folder} is the folder of a run, not of an adapter", f"push {folder / 'adapter'}")
    for adapter in adapters or [folder]:
        _check_adapter(adapter, allow_untrained)
    paths = [(adapter / name).relative_to(folder) for adapter in adapters for name in FILES]
    found = [path.as_posix() for path in paths if is_file(folder / path)]
    if problems := [problem for path in found if (problem := file_problem(folder, path))]:
        raise AdapterError(
            f"{folder} is not pushed: {'; '.join(problems)}", "copy the files themselves into the folder"
        )
    return found


def _check_adapter(folder: Path, allow_untrained: bool) -> None:
    """Raise an :class:`AdapterError` if the adapter is not valid, finite and trained."""
    config = PeftConfig.from_pretrained(folder)
    tensors = read_tensors(folder)
    if error := nonfinite_error(tensors):
        raise AdapterError(f"{folder} is not pushed: {error}", "lower the learning rate and train again")
    if is_untrained(tensors) and not allow_untrained:
        raise AdapterError(
            f"{folder} is not pushed: every B is zero, so it changes nothing",
            "train it first; --allow-untrained (allow_untrained=True) pushes it all the same",
        )
    base = config.base_model_name_or_path
    if base and not public_name(base):
        warn(f"{folder / CONFIG_NAME} names the base model {base!r}, which is not on the hub")


def _secret(token: str | bool | None) -> str:
    """Return the token to use; it must never be shown."""
    secret = token.strip() if isinstance(token, str) else None if token is False else get_token()
    if not secret:
        raise AdapterError("no token for the hub", LOG_IN)
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        raise AdapterError("the token for the hub contains characters that no token has", LOG_IN)
    return secret


def _push_error(error: BaseException, repo_id: str, secret: str) -> AdapterError:
    """Return a one-sentence error with a hint; the token is redacted."""
    while isinstance(error, RuntimeError) and error.__cause__:  # "Error while uploading", without a reason
        error = error.__cause__
    hub = constants.ENDPOINT
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    message = " ".join(redact(text.replace(secret, HIDDEN)).split())[:_MESSAGE_LENGTH]
    if isinstance(error, OfflineModeIsEnabled):
        return AdapterError(f"cannot push {repo_id!r}: HF_HUB_OFFLINE forbids it", "unset HF_HUB_OFFLINE")
    if status is None and isinstance(error, HTTPError):
        return AdapterError(f"cannot reach the hub at {hub}: {message}", "check the network, a proxy, and HF_ENDPOINT")
    if status == 401:
        return AdapterError(f"the hub at {hub} does not accept the token: {message}", LOG_IN)
    if status == 403:
        return AdapterError(
            f"the token may not write to {repo_id!r}: {message}",
            "check that it is your user's or organization's name; otherwise " + LOG_IN,
        )
    if status == 404:
        return AdapterError(f"the hub has no {repo_id!r}: {message}", "check the name, the branch, and HF_ENDPOINT")
    if status and (status == 429 or status >= 500):
        return AdapterError(f"the hub at {hub} answers {status}: {message}", "wait a little, then push again")
    return AdapterError(f"pushing to {repo_id!r} failed: {message}", "check the connection and try again")
