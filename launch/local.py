"""Runs moejax in several processes on the CPU of this machine, as on several hosts.

    python launch/local.py --processes=2 --devices=4 -- --config=experiments/tiny.py --workdir=runs/two

What follows `--` goes to `python -m moejax.main` in every process. Shown are the stdout of process 0, and the stderr of all
with the number of the process before each line. SIGINT and SIGTERM go to all processes. If one of them fails, the others
are ended, and its exit status is that of this command; unless --restarts=N lets all begin again up to N times, which go on
from the last checkpoint. Wrong input and interrupts are not tried again.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO, Sequence

FINAL = (0, 2, 130)
"""Done, wrong input, interrupted."""
GRACE_SECONDS = 5
"""What the others have, when one has failed, to end by themselves."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or the first other one of a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="how many")
    parser.add_argument("--devices", type=int, default=4, help="simulated devices of each process")
    parser.add_argument("--restarts", type=int, default=0, help="times to begin again when a process has failed")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENT", help="for moejax.main")
    options = parser.parse_args(argv)
    if min(options.processes, options.devices) < 1:
        parser.error("--processes and --devices must be at least 1")
    arguments = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments

    started, asked = [], []

    def forward(number: int, frame: object) -> None:
        asked.append(number)
        for process in started:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    left = options.restarts
    while True:
        started.clear()
        status = run(started, options.processes, options.devices, arguments)
        if status in FINAL or asked or left <= 0:
            return status
        left -= 1
        print(f"launch: beginning again ({left} more times at most)", file=sys.stderr, flush=True)


def run(started: list[subprocess.Popen], processes: int, devices: int, arguments: Sequence[str]) -> int:
    """Starts all processes, shows what they say, and waits for them. Returns the exit status."""
    coordinator = f"localhost:{free_port()}"
    for index in range(processes):
        started.append(start(index, devices, [
            *arguments, f"--coordinator={coordinator}", f"--num_processes={processes}", f"--process_id={index}"]))
    readers = [threading.Thread(target=show, args=(process.stderr, sys.stderr, f"[{index}] "))
               for index, process in enumerate(started)]
    readers.append(threading.Thread(target=show, args=(started[0].stdout, sys.stdout)))
    for reader in readers:
        reader.start()
    status = wait(started)
    for reader in readers:
        reader.join()
    return status


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(index: int, devices: int, arguments: Sequence[str]) -> subprocess.Popen:
    """One process of moejax, in a session of its own, so that Ctrl-C reaches it once: from us."""
    xla_flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "moejax.main", *arguments], start_new_session=True, text=True, errors="replace",
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags},
        stdout=subprocess.PIPE if index == 0 else subprocess.DEVNULL, stderr=subprocess.PIPE)


def show(lines: IO[str], where: IO[str], prefix: str = "") -> None:
    """Copies lines as they come, but for those in which the gloo library tells of its connections."""
    for line in lines:
        if not line.startswith("[Gloo] "):
            print(prefix + line, end="", file=where, flush=True)


def wait(started: Sequence[subprocess.Popen]) -> int:
    """Waits for all; when one has failed, kills those that do not end soon. Returns the first status that is not 0."""
    status, deadline = 0, float("inf")
    while None in (ended := [process.poll() for process in started]):
        if not status and any(ended):
            index, status = next((index, status) for index, status in enumerate(ended) if status)
            deadline = time.monotonic() + GRACE_SECONDS
            how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with exit status {status}"
            if status not in FINAL:  # of these the process has said enough
                print(f"launch: process {index} {how}; ending the others", file=sys.stderr, flush=True)
        if time.monotonic() > deadline:
            for process in started:
                process.kill()
        time.sleep(0.05)
    status = status or next(filter(None, ended), 0)
    return status if status >= 0 else 128 - status  # as shells report a signal


if __name__ == "__main__":
    sys.exit(main())
