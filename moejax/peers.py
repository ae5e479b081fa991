"""What the processes of a run tell each other beside their computation: that they are alike, and that they live.

A process that is gone or stands still would let the others wait for ever in a computation that they share, and one with
another config would compute something else with them.
"""

import contextlib
import hashlib
import json
import os
import platform
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

import jax

from moejax.config import UserError, check
from moejax.exit_status import RunFailed

SILENT_SECONDS = 30
"""After so long without a sign of life a process counts as gone."""
BEAT_SECONDS = 3
MEET_SECONDS = 25
"""How long a process waits for what the others say of themselves."""


def client() -> Any:
    """The key-value store that process 0 keeps for all; None for a single process."""
    from jax._src import distributed  # there is no public name for it
    return distributed.global_state.client


def place() -> tuple[Any, int, int]:
    """The store, the number of this process, and how many there are: what the functions below take."""
    return client(), jax.process_index(), jax.process_count()


def described(settings: Mapping[str, Any]) -> dict[str, str]:
    """What must be the same in all processes, by name.

    Args:
      settings: of the command line and the config.
    """
    here = Path(__file__).parent
    code = hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        code.update(str(path.relative_to(here)).encode() + b"\0" + path.read_bytes() + b"\0")
    own = {"version of jax": jax.__version__, "version of Python": platform.python_version(),
           "moejax's code": code.hexdigest()[:16], "kind of devices": jax.local_devices()[0].device_kind}
    return own | {name: repr(value) for name, value in settings.items()}


def check_alike(settings: Mapping[str, Any], store: Any = None, index: int = 0, count: int = 1) -> None:
    """Compares what the processes run with, before they compute anything together.

    Args:
      settings: see `described`.
      store: the key-value store; None for a single process, which has nothing to compare.
      index: of this process.
      count: of all processes.

    Raises:
      UserError: on all processes, with the name of the first thing that differs; or a process that says nothing.
    """
    if store is None or count == 1:
        return
    store.key_value_set(f"moejax/alike/{index}", json.dumps(described(settings)))
    said = []
    for other in range(count):
        try:
            said.append(json.loads(store.blocking_key_value_get(f"moejax/alike/{other}", MEET_SECONDS * 1000)))
        except jax.errors.JaxRuntimeError:
            check(False, f"process {other} did not say within {MEET_SECONDS} s what it runs with; look at its output")
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        store.wait_at_barrier("moejax/alike", MEET_SECONDS * 1000)  # if process 0 ended now, others could not read any more
    for other, theirs in enumerate(said):
        for name in sorted(said[0].keys() | theirs.keys()):
            first, second = said[0].get(name, "nothing"), theirs.get(name, "nothing")
            check(first == second, f"process {other} has another {name} than process 0 ({second}, not {first}); start all "
                  "processes with the same command, code and environment")


def gather(name: str, text: str, seconds: int = 600) -> list[str]:
    """The texts of all processes under a name that is used once, on process 0; there it waits for them. Others get none."""
    store, own, count = place()
    store.key_value_set(f"moejax/gather/{name}/{own}", text)
    if own:
        return []
    keys = [f"moejax/gather/{name}/{index}" for index in range(count)]
    said = [store.blocking_key_value_get(key, 1000 * seconds) for key in keys]
    for key in keys:
        store.key_value_delete(key)
    return said


class Silence:
    """Finds the process that has been silent for too long, from what was heard of all.

    Args:
      seconds: that count as too long.
      now: the time at the beginning.
    """

    def __init__(self, seconds: float, now: float):
        self._seconds, self._beats = seconds, {}
        self._reached = now

    def heard(self, beats: Mapping[str, str], now: float) -> None:
        """Takes the latest beat of each process that has begun and not ended. To hear at all means that process 0 lives."""
        self._reached = now
        known = self._beats
        self._beats = {name: known[name] if name in known and known[name][0] == beat else (beat, now)
                       for name, beat in beats.items()}

    def silent(self, now: float) -> str | None:
        """Who is silent, with host and process number as it gave them; None if all are heard."""
        if now - self._reached > self._seconds:
            return "process 0, which keeps the connection of all,"
        for name, (beat, since) in sorted(self._beats.items()):
            if now - since > self._seconds:
                return f"process {name} ({beat.partition(' ')[2]})"
        return None


def end_process(name: str) -> None:
    """Says who is silent, and ends this process with status 1."""
    print(f"moejax: {name} has not been heard of for {SILENT_SECONDS} s, so this one ends; the same command goes on from "
          "the last checkpoint", file=sys.stderr, flush=True)
    os._exit(1)


@contextlib.contextmanager
def watched(store: Any, index: int, count: int, end: Callable[[str], None] = end_process,
            seconds: float = SILENT_SECONDS) -> Iterator[None]:
    """Inside, this process tells the others that it lives, and ends when one of them has been silent for too long.

    Args:
      store: the key-value store; None for a single process.
      index: of this process.
      count: of all processes.
      end: takes the name of the silent one.
      seconds: that count as too long.
    """
    done, silence, who = threading.Event(), Silence(seconds, time.monotonic()), f"{socket.gethostname()}, pid {os.getpid()}"
    pause = min(BEAT_SECONDS, seconds / 5)

    def beat() -> None:
        number = 0
        while number == 0 or not done.wait(pause):
            number += 1
            try:
                store.key_value_set(f"moejax/alive/{index}", f"{number} {who}", allow_overwrite=True)
                found = store.key_value_dir_get("moejax/alive/")
                silence.heard({key.rpartition("/")[2]: value for key, value in found}, time.monotonic())
            except jax.errors.JaxRuntimeError:
                continue  # if it stays so, process 0 is silent

    def look() -> None:
        while not done.wait(min(1, seconds / 10)):
            name = silence.silent(time.monotonic())
            if name is not None:
                done.set()
                if index == 0:  # with it goes the connection of all, and jax would end them before they know who is silent
                    time.sleep(2 * pause)
                end(name)

    if store is None or count == 1:
        yield
        return
    ended = False
    threads = [threading.Thread(target=work, daemon=True) for work in (beat, look)]
    for thread in threads:
        thread.start()
    try:
        yield
        ended = True
    except (UserError, RunFailed):
        ended = True  # all processes come to the same
        raise
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # the second if the computation was only being begun
        why = str(error).partition("\n")[0][:200]
        print(f"moejax: a computation failed ({why}); looking whether another process is gone ...", file=sys.stderr,
              flush=True)
        time.sleep(seconds + 2 * BEAT_SECONDS)  # in which the watch ends this one if there is such
        raise
    finally:
        done.set()
        threads[0].join(BEAT_SECONDS)
        if ended:  # else the others are to miss it
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                store.key_value_delete(f"moejax/alive/{index}")
