"""How every command ends: 0 done, 1 a run that failed, 2 wrong input, 130 interrupted."""

import sys
from collections.abc import Callable

from moejax.bounded import one_line
from moejax.config import UserError

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130  # the latter as shells have it


class RunFailed(Exception):
    """A run that cannot go on, in one line."""


def exit_status(work: Callable[[], None], interrupted: str) -> int:
    """Does the work of a command and returns its exit status; our own mistakes raise.

    Args:
      work: raises `UserError` if the user's input is wrong, which becomes one line on stderr.
      interrupted: what to say on stderr if Ctrl-C ends it.
    """
    try:
        work()
    except UserError as error:
        if message := one_line(str(error)):  # else another process says it
            print("moejax:", message, file=sys.stderr)
        return WRONG_INPUT
    except RunFailed as error:
        if str(error):  # else another process says it
            print("moejax:", one_line(str(error)), file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("moejax: interrupted;", interrupted, file=sys.stderr)
        return INTERRUPTED
    return 0
