"""Names that people give to models and files, and what errors say for people."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

BUNDLED = "bundled"

# What PyTorch, the system and oneDNN say on processors.
_WANTED = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")
_SHORT = re.compile(
    r"allocate memory|could not (create|execute) a (primitive|memory|stream)|std::bad_alloc"
    r"|Storage size calculation overflowed|can't start new thread"
)
_ACCESS = "log in with an account that may read it (`hf auth login`, or HF_TOKEN)"
# What PyTorch raises in the processes that are left where one of several ends.
_PEERS = {"DistBackendError", "DistNetworkError", "DistStoreError"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def bundled_model_path() -> Path:
    """The folder of the small checkpoint that comes with the package."""
    return Path(__file__).parent / "models" / "vcvae-tiny"


def check_model_name(option: str, name: str) -> None:
    """Refuse what is neither here nor could be on the hub, before anyone is asked for it.

    Raises:
        ValueError: naming the option.
    """
    if not Path(name).exists() and not _HUB_ID.fullmatch(name):
        raise ValueError(f"{option}: {name} is neither a folder here nor a hub id (owner/name); check the path.")


def is_bundled(name: str | None) -> bool:
    """Whether a name means the small checkpoint that comes with the package; a folder of that name comes first."""
    return name == BUNDLED and not Path(name).exists()


def model_place(option: str, name: str) -> str:
    """The folder or hub id that a name of a VC-VAE means; "bundled" is the small one in the package everywhere.

    Raises:
        ValueError: naming the option.
    """
    if is_bundled(name):
        return str(bundled_model_path())
    check_model_name(option, name)
    return name


def told(error: Exception) -> str:
    """What an error says, for people: the system's own come with a number and quotes."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        wrong_path = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        return f"{error.filename}: {error.strerror}{'; check the path' * wrong_path}."
    return str(error)


def hub_problem(name: str, error: BaseException, file: str = "", access: str = _ACCESS) -> str | None:
    """What an answer of the hub means, for people, where diffusers or huggingface_hub raised an error for it.

    Args:
        name: of the repository.
        error: with its causes; diffusers says of most of them that a file is missing.
        file: that was asked for, if it is known.
        access: how someone who may read the repository says so.

    Returns:
        A sentence without its full stop, or None if the error is of another kind.
    """
    from huggingface_hub import errors

    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno):  # a full disk is not the hub's
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, errors.GatedRepoError):
            return f"{name} is gated: accept its licence on its hub page with your account, then {access}"
        if isinstance(cause, errors.RepositoryNotFoundError):
            return f"{name} is not a local path, and not a hub repository that you can see: check the spelling, or {access}"
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"{name} has no such revision: check its branch, tag or commit"
        if isinstance(cause, errors.RemoteEntryNotFoundError):
            return f"{name} lacks {file or 'a file of a model'}: check what it holds, and the subfolder"
        if status is not None:
            remedy = access if status in (401, 403) else "try again later"
            return f"{name}: the hub answered {status} for {file or 'it'}: {remedy}"
        if isinstance(cause, errors.LocalEntryNotFoundError) and not isinstance(cause.__cause__, errors.HfHubHTTPError):
            lack = f"the hub cannot be reached, and its cache lacks {file or 'it'}"
            return f"{name}: {lack}: check the connection, or download it first"
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


@contextlib.contextmanager
def asked_of_hub(option: str, name: str) -> Iterator[None]:
    """Say, where a model cannot be had from the hub, what the hub answered.

    Raises:
        OSError: naming the option; as it is where the model is a folder here.
    """
    try:
        yield
    except OSError as error:
        if Path(name).exists():
            raise
        first = str(error).partition("\n")[0]
        why = hub_problem(name, error) or f"{name} could not be had from the hub ({first}): download it first"
        raise OSError(f"{option}: {why}.") from error


def some(names: Sequence[str]) -> str:
    """The first of many names, for an error."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def memory_short(error: BaseException) -> str | None:
    """What to say of memory that ran out, of the machine or of a GPU; None for every other error."""
    text = str(error).partition("\n")[0].rstrip(". ")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return text or "out of memory"
    if wanted := _WANTED.search(text):
        return f"out of memory: there is no room for {int(wanted[1]) / 1e6:,.0f} MB more"
    return f"out of memory, as it seems: {text}" if _SHORT.search(text) else None


def peer_gone(error: BaseException) -> str | None:
    """What to say where another process of a run ended and this one waited for it; None for every other error."""
    if type(error).__name__ in _PEERS or (isinstance(error, RuntimeError) and "gloo/transport" in str(error)):
        return "another process of this run has ended, and its own lines say why; then start the same command again"
    return None
