"""The errors a user can cause, and the exit code that each of them ends a command with.

Every message names the thing (file, key, shard, rank), what was expected and what to do next.
Commands catch `LecternError` at the top, print it without a traceback and exit with its code.
"""

import os
import sys
from collections.abc import Callable

EXIT_DONE = 0
EXIT_USER = 2  # the user must change something
EXIT_DATA = 65  # the data is bad beyond the configured share
EXIT_DEFECT = 70  # a defect of ours, or hardware
EXIT_AGAIN = 75  # interrupted with everything saved: start me again


class LecternError(Exception):
    """Base of all errors that are reported as one message; `exit_code` ends the command."""

    exit_code = EXIT_USER


class ConfigError(LecternError):
    """A setting is unknown, missing, of the wrong kind, or contradicts another one."""


class DataError(LecternError):
    """A document, shard or index is not what it has to be."""


class ChecksumError(DataError):
    """Bytes are not those that were indexed: damaged on a disk or on their way."""


class ShardChangedError(DataError):
    """A shard is no longer what its index describes: replaced or cut off."""


class BadDataShareError(DataError):
    """More of the data is unusable than the configuration allows."""

    exit_code = EXIT_DATA


class StorageError(LecternError):
    """Storage gave no correct answer, after retries. It stops a rank and never makes a hole."""

    exit_code = EXIT_DEFECT


class CheckpointError(LecternError):
    """A checkpoint or export is missing, incomplete, damaged or of another model."""


class LaunchError(LecternError):
    """Ranks, nodes or jobs are not what the run needs."""


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command line's `main`; print a `LecternError` as one message and exit with its code."""
    try:
        code = main()
    except LecternError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("Interrupted: type the command again to go on.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    sys.exit(code or EXIT_DONE)
