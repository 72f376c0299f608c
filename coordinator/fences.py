"""The fences on disk: the state directory's lock, the coordinator's term, each replica's epoch, and moved ranks.

Runs in the coordinator. A number is on disk, fsynced, before anybody can see it, so none is ever used twice. The
lock lets one coordinator alone write here; it goes with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from coordinator.devices import Devices
from echelon.errors import ConfigError

LOCK_FILE = "lock"
TERM_FILE = "term"
FRESH = "term.new-"  # and the term of the coordinator that writes it
RESERVED_BYTES = 4096  # a block: the next number finds room on a disk that has become full
LOCK_PATIENCE_S = 5.0  # a predecessor that was killed may still be ending


class SupersededError(OSError):
    """Another coordinator has a later term, so nothing of ours counts: the lock was lost, or its file removed."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """Content of the term file. cluster tells this cluster's processes from another's; epochs by replica.

    devices: `Devices` as JSON.
    """

    cluster: str
    term: int = 0
    epochs: Mapping[str, int] = field(default_factory=dict)
    devices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class Fences:
    """Opened once by a coordinator; a second one of the same directory is refused."""

    def __init__(self, directory: Path, lock: int, numbers: Numbers) -> None:
        self._directory = directory
        self._lock = lock
        self._numbers = numbers
        self._checked: int | None = None  # the term file whose content was checked last, open
        self._checking = threading.Lock()  # the journal asks from two threads

    @classmethod
    def open(cls, directory: Path, patience_s: float = LOCK_PATIENCE_S) -> Fences:
        """Lock the directory and raise the term. Raises ConfigError when it cannot be used."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"state-dir {directory} cannot be used: {error}", field="state_dir") from None
        try:
            _acquire(lock, directory, patience_s)
            numbers = _read(directory)
            fences = cls(directory, lock, numbers)
            fences._write(replace(numbers, term=numbers.term + 1))
        except OSError as error:
            os.close(lock)
            raise ConfigError(f"state-dir {directory} cannot be written: {error}", field="state_dir") from None
        except BaseException:
            os.close(lock)
            raise
        return fences

    @property
    def cluster(self) -> str:
        """Eight hexadecimal digits, drawn when the directory was first used."""
        return self._numbers.cluster

    @property
    def term(self) -> int:
        return self._numbers.term

    def epoch(self, replica: int) -> int:
        """The last persisted epoch of a replica; 0 before its first."""
        return self._numbers.epochs.get(str(replica), 0)

    def persist_epoch(self, replica: int, epoch: int) -> None:
        """On disk when this returns."""
        assert epoch > self.epoch(replica), f"epoch {epoch} of replica {replica} after {self.epoch(replica)}"
        self._write(replace(self._numbers, epochs={**self._numbers.epochs, str(replica): epoch}))

    @property
    def devices(self) -> Devices:
        """Which ranks have moved, and which slots are out, as last persisted."""
        return Devices.from_json(self._numbers.devices)

    def persist_devices(self, devices: Devices) -> None:
        """On disk when this returns. Raises OSError, SupersededError."""
        self._write(replace(self._numbers, devices=devices.to_json()))

    def check(self) -> None:
        """Raises SupersededError. Quick while the file is the same: the journal asks with every step."""
        with self._checking:
            if self._checked is not None and _has_a_name(self._checked):  # nobody has put another in its place
                return
            self._let_go()
            # Opened before it is read: what is put in its place in between is read the next time.
            with contextlib.suppress(FileNotFoundError):
                self._checked = os.open(self._directory / TERM_FILE, os.O_RDONLY | os.O_CLOEXEC)
            try:
                refuse_older(self.term, _read(self._directory))
            except BaseException:
                self._let_go()
                raise

    def close(self) -> None:
        """Release the lock."""
        os.close(self._lock)
        self._let_go()

    def _let_go(self) -> None:
        if self._checked is not None:
            os.close(self._checked)
            self._checked = None

    def _write(self, numbers: Numbers) -> None:
        """Replace the file as a whole: a crash leaves the old or the new one."""
        self.check()
        fresh = self._directory / f"{FRESH}{numbers.term}"  # nobody else's: one that wakes late must not write in ours
        content = json.dumps(asdict(numbers)).encode()
        try:
            _overwrite(fresh, content)
        except OSError:
            if not (left := self._left(numbers.term)):
                raise
            left[0].replace(fresh)  # a full disk has this block for us
            _overwrite(fresh, content)
        for path in self._left(numbers.term):
            path.unlink(missing_ok=True)
        self.check()  # syncing takes as long as the disk does
        fresh.replace(self._directory / TERM_FILE)
        with contextlib.suppress(OSError):
            _overwrite(fresh, b"")
        folder = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._numbers = numbers

    def _left(self, term: int) -> list[Path]:
        """What coordinators of earlier terms have reserved."""
        found = {path: path.name.removeprefix(FRESH) for path in self._directory.glob(f"{FRESH}*")}
        return [path for path, number in found.items() if number.isdecimal() and int(number) < term]


def refuse_older(term: int, found: Numbers) -> None:
    """found: what is on disk now. Raises SupersededError where that is a later coordinator's."""
    if found.term > term:
        message = f"another coordinator has taken term {found.term}; this one, of term {term}, may do nothing more"
        raise SupersededError(errno.ESTALE, message)


def _has_a_name(descriptor: int) -> bool:
    """Whether an open file is still in a folder."""
    try:
        return os.fstat(descriptor).st_nlink > 0
    except OSError:  # so the file system of a network tells of a file that another machine has replaced
        return False


def _overwrite(path: Path, content: bytes) -> None:
    """In place, so that where the file is as large already no block is asked for; JSON may end with empty lines."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        padded = content.ljust(RESERVED_BYTES, b"\n")
        written = os.pwrite(descriptor, padded, 0)
        if written < len(padded):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        os.ftruncate(descriptor, len(padded))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _acquire(lock: int, directory: Path, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
                raise ConfigError(
                    f"state-dir {directory} is in use by another coordinator (pid {holder}); "
                    "stop it or choose another directory",
                    field="state_dir",
                ) from None
            time.sleep(0.05)
            continue
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        return


def _read(directory: Path) -> Numbers:
    path = directory / TERM_FILE
    try:
        numbers = Numbers(**json.loads(path.read_text()))
        Devices.from_json(numbers.devices)
        return numbers
    except FileNotFoundError:
        return Numbers(cluster=secrets.token_hex(4))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); restore it, or remove the state directory") from None
