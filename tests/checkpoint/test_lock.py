"""One writer a workdir: the second is refused, and a dead one stands in nobody's way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moejax.checkpoint import lock
from moejax.checkpoint.lock import NAME, one_writer
from moejax.config import UserError

HOLD = """\
import sys, time
from pathlib import Path
from moejax.checkpoint.lock import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def take(workdir: Path, **options) -> list[str]:
    """Takes the lock and gives it back; returns what was said."""
    lines = []
    with one_writer(workdir, lines.append, **options):
        assert json.loads((workdir / NAME).read_text())["process"] == os.getpid()
    assert not (workdir / NAME).exists()
    return lines


def leave(workdir: Path, **changes) -> Path:
    """The file of a writer that was killed, here or elsewhere."""
    path = workdir / NAME
    mine = {"host": lock._host(), "process": os.getpid(), "started": lock._started(os.getpid()), "since": "yesterday"}
    path.write_text(json.dumps(mine | changes))
    return path


def test_a_second_run_is_refused_by_name_and_a_killed_one_leaves_no_lock_that_blocks(tmp_path):
    root = str(Path(lock.__file__).parent.parent.parent)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": os.pathsep.join((root, os.environ.get("PYTHONPATH", "")))})
    try:
        assert process.stdout.readline() == "held\n"
        for stopped in (False, True):
            if stopped:
                process.send_signal(signal.SIGSTOP)
            with pytest.raises(UserError, match=rf"in use by process {process.pid} on \S+ \(since \d{{4}}-"):
                take(tmp_path)
            assert json.loads((tmp_path / NAME).read_text())["process"] == process.pid
        content = (tmp_path / NAME).read_text()
        (tmp_path / NAME).write_text("{}")  # the lock holds whatever the file says
        with pytest.raises(UserError, match="in use by process . on . "):
            take(tmp_path)
        (tmp_path / NAME).write_text(content)
        process.kill()
        process.wait()
        line, = take(tmp_path)
        assert f"taking over from process {process.pid} on " in line
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert take(tmp_path) == []


def test_a_run_that_ends_leaves_nothing(tmp_path):
    assert take(tmp_path / "a" / "b") == [] and not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), one_writer(tmp_path / "c"):
        (tmp_path / "c" / "mine").write_text("")
        raise ZeroDivisionError
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["mine"]


def test_a_process_that_holds_it_already_is_refused_too(tmp_path):
    with one_writer(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()} "), one_writer(tmp_path):
        pass
    assert take(tmp_path) == []


@pytest.mark.parametrize("content", ("", "{", "[]", "3", '{"process": "x\\n\\u001b[2J"}', "\xff" * 5000))
def test_a_damaged_file_is_no_obstacle(tmp_path, content):
    (tmp_path / NAME).write_text(content, encoding="latin-1")
    assert all("\n" not in line and "\x1b" not in line for line in take(tmp_path, stale=0.2))


def test_the_number_of_a_dead_process_may_be_used_again(tmp_path):
    leave(tmp_path, started=1)
    assert "taking over" in take(tmp_path)[0]


def test_without_locks_in_the_file_system_the_named_process_counts(tmp_path, monkeypatch):
    def none(*arguments):
        raise OSError(lock.NO_LOCKS[0], "no locks")
    monkeypatch.setattr(lock.fcntl, "lockf", none)
    assert take(tmp_path) == []
    leave(tmp_path, process=1, started=None)  # which always runs
    with pytest.raises(UserError, match="in use by process 1 on"):
        take(tmp_path)
    leave(tmp_path, process=2**22 + 1)  # more than there can be
    assert "taking over" in take(tmp_path)[0]


def test_a_writer_on_another_host_is_waited_for_and_refused_only_if_it_lives(tmp_path):
    leave(tmp_path, host="elsewhere")
    begin = time.monotonic()
    waiting, taken = take(tmp_path, stale=0.5)
    assert time.monotonic() - begin >= 0.5 and "on elsewhere" in waiting and "waiting" in waiting and "taking over" in taken

    path = leave(tmp_path, host="elsewhere")
    os.utime(path, (time.time() - 3600,) * 2)
    assert "taking over" in take(tmp_path, stale=0.5)[0]

    path = leave(tmp_path, host="elsewhere")

    def alive(line):
        os.utime(path, (time.time() + 5,) * 2)
    with pytest.raises(UserError, match="in use by process .* on elsewhere"), one_writer(tmp_path, alive, stale=5.0):
        pass
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_a_writer_gives_signs_of_life(tmp_path):
    with one_writer(tmp_path, alive=0.05):
        os.utime(tmp_path / NAME, (0, 0))
        deadline = time.monotonic() + 20
        while (tmp_path / NAME).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize("where, what", (("file", "is a file"), ("file/run", "cannot be written"),
                                         ("/proc/run", "cannot be written"), ("a" * 300, "cannot be written")))
def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path, where, what):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=what):
        take(tmp_path / where)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
