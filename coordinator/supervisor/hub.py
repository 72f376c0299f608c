"""Models of the Hugging Face Hub: `org/name` or `org/name@revision` becomes a directory of the local cache.

Called once, in the supervisor, before anything is started; coordinator and ranks are given the directory. The download
runs in a process of its own, this module's `main`, so that Ctrl-C ends it at once and its threads and connections
never exist in the supervisor. The cache, its place, the endpoint and the token are huggingface_hub's own settings.
"""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from coordinator.supervisor.ray_head import end_with_parent
from echelon.config import HUB_ID
from echelon.errors import ConfigError, EchelonError, UnavailableError

WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]
UNWANTED = ["*/*", "consolidated*"]  # other formats of the same weights


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the Hub; revision is a branch, a tag or a commit."""

    name: str
    revision: str = "main"


def hub_model(model: str | Path) -> HubModel | None:
    """What the Hub is to be asked for; None for a path, or where a directory has that name."""
    found = None if isinstance(model, Path) or Path(model).exists() else HUB_ID.fullmatch(model)
    return found and HubModel(found["name"], found["revision"] or "main")


def served_name(model: str | Path, directory: Path) -> str:
    """What clients ask for when nobody says otherwise: the Hub's name without the revision, or the directory's."""
    wanted = hub_model(model)
    return directory.name if wanted is None else wanted.name


def model_directory(model: str | Path) -> Path:
    """The directory to serve: the one that is named, or that of the Hub's model, downloaded if it is not in the cache.

    Raises ConfigError for a model that cannot be had, UnavailableError where the network or the disk is in the way.
    """
    wanted = hub_model(model)
    if wanted is None:
        return Path(model)
    # Its progress goes to our stderr, its answer is one line. It ends with us, and Ctrl-C is ours to hear.
    command = [sys.executable, "-P", "-m", "coordinator.supervisor.hub", wanted.name, wanted.revision]
    ended = subprocess.run(command, stdout=subprocess.PIPE, preexec_fn=_deaf_child, check=False)
    match _answer(ended.stdout):
        case {"directory": str(directory)}:
            return Path(directory)
        case {"refused": str(message)}:
            raise ConfigError(message, field="model")
        case {"unavailable": str(message)}:
            raise UnavailableError(message, field="model")
    raise UnavailableError(f"the download of {wanted.name} ended with exit code {ended.returncode}", field="model")


def _deaf_child() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # run() kills it; its own KeyboardInterrupt would wait for threads
    end_with_parent()


def _answer(output: bytes) -> object:
    lines = output.splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:
        return None


def download(wanted: HubModel) -> Path:
    """The model's snapshot in the cache, whole. Errors as `model_directory`."""
    from huggingface_hub import constants, snapshot_download  # what makes connections, and only where they are needed
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    name, hub, cache = wanted.name, constants.ENDPOINT, constants.HF_HUB_CACHE
    if not sys.stderr.isatty():  # a line for the log, in place of bars
        disable_progress_bars()
        sys.stderr.write(f"echelon: {name}@{wanted.revision} is fetched from {hub}, but for what {cache} has\n")
    elsewhere = f"or run `hf download {name} --local-dir DIR` where there is a network, and pass --model DIR"
    try:
        return Path(snapshot_download(name, revision=wanted.revision, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except GatedRepoError:
        remedy = f"accept its terms at {hub}/{name}, then set HF_TOKEN or run `hf auth login`"
        raise ConfigError(f"{name} is gated, and this machine may not read it: {remedy}") from None
    except RepositoryNotFoundError:
        remedy = "correct the name; for a private model set HF_TOKEN or run `hf auth login`"
        raise ConfigError(f"{name} is neither a directory here nor a model on {hub}; {remedy}") from None
    except RevisionNotFoundError:
        raise ConfigError(
            f"{name} on {hub} has no revision {wanted.revision!r}; leave @revision out for main"
        ) from None
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE or isinstance(error.__cause__, OfflineModeIsEnabled):
            what = f"{name}@{wanted.revision} is not whole in the cache {cache}, and HF_HUB_OFFLINE forbids to download"
            raise ConfigError(f"{what}; unset it, {elsewhere}") from None
        raise UnavailableError(f"{hub} cannot be reached for {name}, which the cache lacks; {elsewhere}") from error
    except Exception as error:  # of the HTTP library's own kinds, which change with it
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some, or set HF_HOME to a folder on a larger one"
            raise UnavailableError(f"the disk of {cache} is full while {name} is downloaded; {remedy}") from error
        reason = str(error).strip().splitlines()[:1] or [""]
        raise UnavailableError(
            f"{name} cannot be downloaded from {hub}: {type(error).__name__}: {reason[0]}"
        ) from error


def main(name: str, revision: str) -> None:
    """The process of the download: its answer is the last line of stdout."""
    try:
        answer = {"directory": str(download(HubModel(name, revision)))}
    except ConfigError as error:
        answer = {"refused": error.message}
    except EchelonError as error:
        answer = {"unavailable": error.message}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
