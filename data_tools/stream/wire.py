"""Messages between the trainer and its loader processes: pickles whose tensors go beside them.

A message is a header, a pickle, and one blob with the bytes of all tensors. The receiver reads the
blob straight into one buffer, pinned where asked, and its tensors are views on that. Everything
goes through a socket: shared memory is 64 MB in a container, and outlives a killed process.
Nothing else pickles: what is read here was written by our own process a moment ago.
"""

import io
import os
import pickle
import struct
from collections.abc import Generator, Sequence
from typing import Any

import torch

_HEADER = struct.Struct("<QQ")  # bytes of the pickle, bytes of the blob
_ALIGNMENT = 64
_MAX_PARTS = 512  # of one system call; the limit is 1024

Receiving = Generator[None, None, tuple[Any, int]]


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and lists their bytes as the parts of a blob."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.parts: list[memoryview] = []
        self.size_bytes = 0

    def persistent_id(self, obj: Any) -> tuple[int, torch.dtype, tuple[int, ...]] | None:
        if not isinstance(obj, torch.Tensor):
            return None
        place = self.size_bytes
        data = obj.contiguous().view(-1).view(torch.uint8).numpy().data
        padding = -len(data) % _ALIGNMENT
        self.parts += [data, memoryview(bytes(padding))]
        self.size_bytes += len(data) + padding
        return place, obj.dtype, tuple(obj.shape)


class _Unpickler(pickle.Unpickler):
    """Puts tensors in their places as views on the blob."""

    def __init__(self, file: io.BytesIO, blob: torch.Tensor) -> None:
        super().__init__(file)
        self._blob = blob

    def persistent_load(self, pid: Any) -> torch.Tensor:
        place, dtype, shape = pid
        size = torch.Size(shape).numel() * dtype.itemsize
        # Not through numpy: a view that shares the storage lets the allocator of pinned memory
        # know when a copy to the device is done with it.
        return self._blob[place : place + size].view(dtype).view(shape)


def encode(message: Any) -> list[memoryview]:
    """Return the parts of a message; tensors are not copied and must not change until it is sent.

    Tensors lie on the CPU.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(message)
    body = file.getbuffer()
    header = _HEADER.pack(len(body), pickler.size_bytes)
    return [memoryview(header), body, *pickler.parts]


def can_travel(message: Any) -> bool:
    """Tell whether a message can be pickled and made again of what was pickled."""
    try:
        pickle.loads(pickle.dumps(message))
    except Exception:  # whatever its own methods raise
        return False
    return True


def send(descriptor: int, message: Any) -> None:
    """Send a message through a blocking descriptor."""
    parts = encode(message)
    while parts:
        parts = left_over(parts, os.writev(descriptor, parts[:_MAX_PARTS]))


def left_over(parts: Sequence[memoryview], sent: int) -> list[memoryview]:
    """Return what is still to be sent of the parts of a message.

    Args:
        parts: of one or several messages.
        sent: how many of their bytes are gone.
    """
    for number, part in enumerate(parts):
        if sent < len(part):
            return [part[sent:], *parts[number + 1 :]]
        sent -= len(part)
    return []


def receive(descriptor: int, pin: bool = False) -> Receiving:
    """Receive one message, bit by bit: yields whenever a non-blocking descriptor has no more.

    Args:
        descriptor: to read from.
        pin: whether to put the tensors into pinned memory.

    Returns:
        The message and its size in bytes.

    Raises:
        EOFError: if the other side is gone.
        OSError: likewise.
    """
    header = bytearray(_HEADER.size)
    yield from _fill(descriptor, memoryview(header))
    body_bytes, blob_bytes = _HEADER.unpack(header)
    body = bytearray(body_bytes)
    yield from _fill(descriptor, memoryview(body))
    blob = torch.empty(blob_bytes, dtype=torch.uint8, pin_memory=pin and blob_bytes > 0)
    yield from _fill(descriptor, blob.numpy().data)
    return _Unpickler(io.BytesIO(body), blob).load(), body_bytes + blob_bytes


def receive_now(descriptor: int) -> Any:
    """Receive one message through a blocking descriptor (`receive`)."""
    receiving = receive(descriptor)
    while True:
        try:
            next(receiving)
        except StopIteration as stop:
            return stop.value[0]


def _fill(descriptor: int, view: memoryview) -> Generator[None, None, None]:
    while len(view):
        try:
            count = os.readv(descriptor, [view])
        except BlockingIOError:
            yield
            continue
        if not count:
            raise EOFError("the other side is gone")
        view = view[count:]
