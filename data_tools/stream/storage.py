"""What a range read is, and how often and how long it is tried: no input or output here."""

import random
import time
from dataclasses import dataclass

from data_tools.errors import StorageError

FIRST_PAUSE_S = 0.2
_jitter = random.SystemRandom()  # content never depends on it, and no seeded stream is disturbed


@dataclass(frozen=True)
class StorageSettings:
    """How storage is read.

    Attributes:
        tries: requests for one range at most.
        deadline_s: seconds for one range, all tries and pauses together.
        request_timeout_s: seconds for one request.
        hedge_after_s: a request without an answer after so many seconds gets a second one beside
            it, and the first answer counts; None: never.
        cache_dir: local folder for copies of remote shards; None: shards are read by range.
        cache_bytes: size that the folder may grow to. It should hold 128 shards a source, since
            an epoch works in windows of 64 shards.
    """

    tries: int = 6
    deadline_s: float = 120.0
    request_timeout_s: float = 30.0
    hedge_after_s: float | None = None
    cache_dir: str | None = None
    cache_bytes: int = 100 * 2**30


@dataclass(frozen=True)
class ByteRange:
    """A part of a shard.

    Attributes:
        url: path or URL of the shard.
        version: `shard_version` of the shard that was indexed, which the one that is read must be;
            "" takes whatever is there.
        offset: first byte.
        size: in bytes.
    """

    url: str
    version: str
    offset: int
    size: int

    def __str__(self) -> str:
        """Return the range for messages."""
        return f"{self.url}, bytes {self.offset} to {self.offset + self.size - 1}"


def shard_identity(size: int, sha256_of_ends: str) -> str:
    """Return what tells one version of a shard from another, wherever it is stored."""
    return f"{size}-{sha256_of_ends}"


def shard_version(identity: str, etag: str) -> str:
    """Return the version of a shard in one place of storage.

    Args:
        identity: `shard_identity`.
        etag: what an object store calls this version of the object; "" if it says nothing.
    """
    return f"{identity}-{etag}" if etag else identity


def split_version(version: str) -> tuple[int | None, str]:
    """Return (size in bytes, etag) of a `shard_version`; None and "" where it does not say."""
    size, _, rest = version.partition("-")
    return (int(size) if size.isdecimal() else None), rest.partition("-")[2]


class Attempts:
    """The tries of one request: how long the next may take, and the pause before it."""

    def __init__(self, settings: StorageSettings) -> None:
        self._settings = settings
        self._started = time.monotonic()
        self._made = 0

    @property
    def timeout_s(self) -> float:
        """Seconds that the next try may take."""
        return max(0.0, min(self._settings.request_timeout_s, self._remaining_s))

    @property
    def _remaining_s(self) -> float:
        return self._started + self._settings.deadline_s - time.monotonic()

    def pause_s(self, what: str, error: BaseException) -> float:
        """Return how long to wait after a failed try.

        Args:
            what: is read.
            error: of the try.

        Raises:
            StorageError: if no try is left, or no time.
        """
        self._made += 1
        pause = FIRST_PAUSE_S * 2 ** (self._made - 1) * _jitter.uniform(0.5, 1.5)
        if self._made < self._settings.tries and pause < self._remaining_s:
            return pause
        taken_s = time.monotonic() - self._started
        raise StorageError(
            f"{what}: no correct answer in {self._made} tries and {taken_s:.0f} s; the last one: "
            f"{describe(error)}. Look at the network and the storage, then start the command "
            "again: it goes on where it stopped"
        ) from error


def describe(error: BaseException) -> str:
    """Return an error in words, also if it has none of its own."""
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    name = type(error).__name__
    if name.startswith("_"):
        return str(error)
    return f"{name}: {error}" if str(error) else name
