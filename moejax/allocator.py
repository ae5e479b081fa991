"""How the C library hands memory to XLA:CPU, which asks for all its temporary buffers anew in every step.

glibc returns large blocks to the kernel when they are freed, so each step pays for hundreds of megabytes of page faults.
Here a process starts itself again, once, with memory laid out in huge pages, of which there are fewer by 500 times. Blocks
of XLA's threads still go back after each step: glibc keeps freed ones of that size for the main thread alone, and a single
arena for all threads (`glibc.malloc.arena_max=1`) keeps them in pieces that the next step's blocks do not fit, until the
memory is full.
"""

import os
import sys

VARIABLE = "GLIBC_TUNABLES"
SETTINGS = ("glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184:"
            "glibc.malloc.top_pad=268435456")
"""Huge pages where the kernel grants them on request; of the main thread, blocks below 4 GiB from the heap, and 16 GiB of
what it frees kept."""


def environment() -> dict[str, str]:
    """The variables that a new process needs; none where the C library is not glibc, or the user has set them."""
    if not sys.platform.startswith("linux") or VARIABLE in os.environ:
        return {}
    try:
        return {VARIABLE: SETTINGS} if os.confstr("CS_GNU_LIBC_VERSION") else {}
    except (ValueError, OSError):
        return {}


def keep_memory() -> None:
    """Starts this process again with the settings, in its place, unless it has them or they are of no use.

    Call it first in a program, before anything is imported that takes time. It keeps the process id, the arguments and the
    open files. `GLIBC_TUNABLES=` in the environment turns it off.
    """
    wanted = environment()
    if wanted:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})
