"""Runs on the Hugging Face Hub: files come and go, and what goes wrong is one line with its remedy."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rrepa_lab.align.hub import TIMEOUT, hub
from rrepa_lab.errors import LabError

LOGIN = "hf auth login, or set HF_TOKEN"


def fetch(repo_id: str, files: Sequence[str], revision: str | None = None) -> Path:
    """The folder of this machine's Hub cache that holds those of these files that a model repository has.

    Args:
        files: names, with patterns such as "space/*".
        revision: a branch, a tag or a commit; the newest by default. A commit that is cached needs no network.

    Raises: LabError for a name, revision or login that the Hub refuses, and for no network where the files are not cached.
    """
    from huggingface_hub import constants, snapshot_download

    given = constants.HF_HUB_OFFLINE  # `hub` sets it where there is no answer
    with hub() as online, _one_line(repo_id, "read", revision, "" if online else _unreachable(given)):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(files)))


def push(repo_id: str, files: Mapping[str, Path | bytes], replaces: Sequence[str], private: bool, message: str) -> str:
    """Make these files the contents of a model repository in one commit; returns its address.

    Args:
        files: name in the repository -> the file or its contents.
        replaces: names, or folders ending with "/": such files of an earlier push are removed if they are not among `files`.
        private: of a repository that is made by this; one that exists keeps what it is.

    Raises: LabError for no token, a name or a login that the Hub refuses, and no network.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise LabError(f"{repo_id!r} is no name for the Hub: give OWNER/NAME ({_first_line(error)})") from None
    if get_token() is None:
        raise LabError(f"cannot push to {repo_id}: there is no token of the Hub on this machine: {LOGIN}")
    api, given = HfApi(library_name="rrepa_lab"), constants.HF_HUB_OFFLINE
    with hub() as online:
        if not online:
            raise LabError(f"cannot push to {repo_id}: {_unreachable(given)}")
        with _one_line(repo_id, "written to", None):
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            stale = [name for name in _files_of(api, repo_id) if name not in files and _covers(replaces, name)]
            operations: list[Any] = [CommitOperationDelete(name) for name in stale]
            operations += [CommitOperationAdd(name, content) for name, content in files.items()]
            api.create_commit(repo_id, operations, commit_message=message)
    return str(address)


def _files_of(api: Any, repo_id: str) -> list[str]:
    """The files of a repository; none where it is new, or its listing is refused: then the commit will say why."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return [str(name) for name in api.list_repo_files(repo_id)]
    except HfHubHTTPError:
        return []


def _covers(names: Sequence[str], name: str) -> bool:
    return any(name == one or (one.endswith("/") and name.startswith(one)) for one in names)


@contextmanager
def _one_line(repo_id: str, action: str, revision: str | None, offline: str = "") -> Iterator[None]:
    """Within it what the Hub's library raises becomes a LabError; `offline` is why there is no connection, if there is none."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )  # fmt: skip

    try:
        yield
    except LabError:
        raise
    except LocalEntryNotFoundError as error:  # also an EntryNotFoundError
        why = offline or _first_line(error.__cause__ or error)
        raise LabError(f"{repo_id} cannot be {action}, and it is not in the cache of this machine: {why}") from error
    except RevisionNotFoundError as error:
        raise LabError(f"{repo_id} on the Hub has no revision {revision!r}: give a branch, a tag or a commit") from error
    except GatedRepoError as error:
        raise LabError(
            f"{repo_id} on the Hub is gated ({_status(error)}): accept its terms on its page, then {LOGIN}"
        ) from error
    except RepositoryNotFoundError as error:
        raise LabError(_not_found(repo_id, error)) from error
    except EntryNotFoundError as error:
        raise LabError(f"{repo_id} on the Hub lacks a file: {_first_line(error)}") from error
    except HfHubHTTPError as error:
        if _status(error) == 401 and action == "read" and not _bad_token(error):  # a private one is not told from a missing one
            raise LabError(_not_found(repo_id, error)) from error
        raise LabError(f"{repo_id} cannot be {action}: {_refusal(_status(error), error)}") from error
    except Exception as error:  # of the HTTP library, the disk, and the transfer, whose classes are not public
        first = _first_cause(error)
        why = _unreachable(False) if _is_network(error) else f"{type(first).__name__}: {_first_line(first)}"
        raise LabError(f"{repo_id} cannot be {action}: {why}") from error


def _not_found(repo_id: str, error: Exception) -> str:
    status = _status(error)
    return f"the Hub has no model {repo_id!r} for this login ({status}): check the name; if it is private, {LOGIN}"


def _bad_token(error: Any) -> bool:
    return "Invalid credentials" in error.response.headers.get("X-Error-Message", "")


def _refusal(status: int, error: Exception) -> str:
    if status == 401:
        return f"the Hub refuses the token (401), which may have expired: {LOGIN}"
    if status == 403:
        return "the login may not do that (403): it needs a token that can write to this owner"
    if status == 429:
        return "too many requests (429): try again in some minutes"
    return f"the Hub answers {status}: {_first_line(error)}"


def _status(error: Any) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _is_network(error: BaseException) -> bool:
    """Whether a failed connection is behind an exception."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionError | TimeoutError) or type(seen).__name__ in ("ConnectError", "ConnectTimeout"):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _unreachable(by_choice: bool) -> str:
    from huggingface_hub import constants

    if by_choice:
        return "HF_HUB_OFFLINE is set"
    return f"{constants.ENDPOINT} does not answer within {TIMEOUT:g} s (is there a network?)"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
