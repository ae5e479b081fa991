"""One writer a workdir: a lock that ends with its process, and a file that says whose it is."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moejax.bounded import parse_json
from moejax.checkpoint.store import warn
from moejax.config import UserError, check

NAME = ".writer.json"
ALIVE = 10.0
"""Seconds between signs of life of a writer: it touches its file."""
STALE = 60.0
"""Seconds without one after which a writer on another host is taken for dead."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What file systems answer that have no locks."""


@contextlib.contextmanager
def one_writer(workdir: Path, say: Callable[[str], None] = warn, alive: float = ALIVE,
               stale: float = STALE) -> Iterator[None]:
    """Inside, no other process may write to a workdir; makes the folder if it is not there.

    The operating system gives the lock up when the process ends, however it ends, and its children do not inherit it. (But
    it also does if the process closes the file once more, so nothing else here opens it.) A file names the process, for
    people, and for hosts whose file system does not tell them of each other's locks: there a writer counts as gone when its
    file has not been touched for a while, which is waited for.

    Args:
      workdir: of the run.
      say: takes a line if the lock of a process that is gone is taken over, or if that must be waited for.
      alive, stale: seconds, as `ALIVE` and `STALE`.

    Raises:
      UserError: another process writes to it, or the folder cannot be made.
    """
    path = workdir.absolute() / NAME
    missing = [folder for folder in path.parents if not os.path.lexists(folder)]
    check(os.path.isdir(workdir) or not os.path.lexists(workdir),
          f"--workdir={workdir} is a file; choose a folder, or a name that is free")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle, alone = _locked(path)
    except OSError as error:
        _remove_empty(missing)
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror}); choose another folder") from None
    ended = threading.Event()
    try:
        owner = _owner(handle)
        check(alone is not False, _in_use(workdir, owner))
        if owner:
            if owner.get("host") != _host():
                _await(path, owner, workdir, stale, say)
            else:  # also if the lock was got: a process gets again what it has
                check(not _runs(owner), _in_use(workdir, owner))
            say(f"{workdir}: taking over from {_named(owner)}, which ended without giving the folder back")
        mine = json.dumps({"host": _host(), "process": os.getpid(), "started": _started(os.getpid()),
                           "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}).encode()
        os.ftruncate(handle, 0)
        os.pwrite(handle, mine, 0)
        threading.Thread(target=_stay_alive, args=(path, ended, alive), daemon=True, name="sign of life").start()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        ended.set()
        os.close(handle)
        _remove_empty(missing)


def _locked(path: Path) -> tuple[int, bool | None]:
    """The opened file, and whether its lock was got; None if the file system has none."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return handle, False
        except OSError as error:
            if error.errno in NO_LOCKS:
                return handle, None
            os.close(handle)
            raise
        with contextlib.suppress(FileNotFoundError):  # else one that ended just now took the file away
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle, True
        os.close(handle)


def _owner(handle: int) -> dict[str, Any]:
    """Whom the file names; empty if nobody."""
    try:
        owner = parse_json(os.pread(handle, 4096, 0))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _in_use(workdir: Path, owner: dict[str, Any]) -> str:
    return f"--workdir={workdir} is in use by {_named(owner)}; wait until that has ended, or take another --workdir"


def _named(owner: dict[str, Any]) -> str:
    def shown(key: str) -> str:
        return "".join(letter for letter in str(owner.get(key, "?"))[:80] if letter.isprintable())
    return f"process {shown('process')} on {shown('host')} (since {shown('since')})"


def _await(path: Path, owner: dict[str, Any], workdir: Path, stale: float, say: Callable[[str], None]) -> None:
    """Waits until a writer on another host shows itself dead. Raises `UserError` if it shows itself alive.

    Its clock need not agree with ours: what counts is whether its file changes while we look.
    """
    seen, begin = os.stat(path).st_mtime_ns, time.monotonic()
    if time.time() - seen / 1e9 > 10 * stale:
        return
    say(f"{workdir}: last used by {_named(owner)}, which did not give it back; waiting {stale:.0f} s for a sign of life")
    while time.monotonic() - begin < stale:
        time.sleep(min(1.0, stale / 10))
        check(os.path.exists(path) and os.stat(path).st_mtime_ns == seen, _in_use(workdir, owner))


def _runs(owner: dict[str, Any]) -> bool:
    """Whether the process that a file names runs on this host."""
    process = owner.get("process")
    if not isinstance(process, int) or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return owner.get("started") in (None, _started(process))


def _started(process: int) -> int | None:
    """When a process began, in a unit of the system's (Linux): numbers of processes are used again."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    return None


def _host() -> str:
    return socket.gethostname()


def _stay_alive(path: Path, ended: threading.Event, every: float) -> None:
    while not ended.wait(every):
        with contextlib.suppress(OSError):
            os.utime(path)


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # there is something in it now
        for folder in folders:
            folder.rmdir()
