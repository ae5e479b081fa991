"""The process that starts itself again does so once, with its arguments, and only where it is of use."""

import os
import subprocess
import sys

import pytest

from moejax import allocator

PROGRAM = "import os, sys; from moejax import allocator; before = os.getpid(); allocator.keep_memory(); " \
          "print(os.getpid(), sys.argv[1:], os.environ.get('GLIBC_TUNABLES'))"
on_glibc = pytest.mark.skipif(not (sys.platform.startswith("linux") and os.confstr("CS_GNU_LIBC_VERSION")),
                              reason="needs glibc")


def run(**variables):
    environment = {name: value for name, value in os.environ.items() if name != allocator.VARIABLE} | variables
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, "a b", "--c"], stdout=subprocess.PIPE, text=True,
                               env=environment)
    return process, process.communicate(timeout=60)[0].strip()


@on_glibc
def test_a_process_starts_again_in_its_place_with_its_arguments():
    process, printed = run()
    assert process.returncode == 0
    assert printed == f"{process.pid} ['a b', '--c'] {allocator.SETTINGS}"


def test_what_the_user_has_set_stays():
    process, printed = run(GLIBC_TUNABLES="")
    assert (process.returncode, printed) == (0, f"{process.pid} ['a b', '--c']")


def test_other_systems_need_nothing(monkeypatch):
    monkeypatch.delenv(allocator.VARIABLE, raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert allocator.environment() == {}
