"""Storage servers of a test's own, on the loopback address, that misbehave on demand.

    with serve_folder(tmp_path, faults=every(3, "503", "stall")) as server:
        ... f"{server.url}/train-000000.tar" ...

    with serve_s3(tmp_path) as server:          # moto; skips the test where it is not installed
        ... f"{server.url}/train-000000.tar" ...

`serve_s3` sets the AWS variables of the environment while it runs, so that processes that are
spawned meanwhile find it too.
"""

import hashlib
import http.client
import logging
import os
import socket
import struct
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

# (method, path, number of the request from 0) -> kind of fault, or "" for a correct answer
Faults = Callable[[str, str, int], str]
KINDS = ("500", "503", "429", "stall", "reset", "truncated", "slow", "empty", "long")
STALL_S = 60.0
LATE_S = 0.6
SLOW_DOWN = (
    b'<?xml version="1.0"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)


def never(method: str, path: str, number: int) -> str:
    return ""


def always(kind: str, method: str = "GET") -> Faults:
    """Every request of a method fails in one way."""
    return lambda asked, path, number: kind if asked == method else ""


def every(n: int, *kinds: str) -> Faults:
    """One of n requests fails, in the given ways by turns."""
    return lambda method, path, number: kinds[number // n % len(kinds)] if number % n == 0 else ""


def first(times: int, kind: str) -> Faults:
    """The first GET requests of each path fail."""
    seen: Counter[str] = Counter()

    def fault(method: str, path: str, number: int) -> str:
        seen[path] += method == "GET"
        return kind if method == "GET" and seen[path] <= times else ""

    return fault


class Server:
    """A running server: `url` of its folder, `faults` (may be replaced), what was asked and done.

    Attributes:
        url: of the folder that is served.
        faults: which request fails how.
        requests: (method, path, Range header) in order.
        faulted: how often each kind of fault was given.
        etags: path -> ETag to state instead of the digest of the content.
    """

    def __init__(self, faults: Faults) -> None:
        self.url = ""
        self.faults = faults
        self.requests: list[tuple[str, str, str]] = []
        self.faulted: Counter[str] = Counter()
        self.etags: dict[str, str] = {}
        self.closing = threading.Event()
        self._lock = threading.Lock()

    def take(self, method: str, path: str, byte_range: str) -> str:
        """Note a request; return the fault that it gets."""
        with self._lock:
            kind = self.faults(method, path, len(self.requests))
            self.requests.append((method, path, byte_range))
            self.faulted[kind] += 1
            return kind


@contextmanager
def serve_folder(folder: Path, faults: Faults = never) -> Iterator[Server]:
    """Serve the files of a folder over HTTP, ranges and ETags included."""
    server = Server(faults)

    class Handler(_Handler):
        state = server

        def answer(self, method: str) -> tuple[int, dict[str, str], bytes]:
            return _file_answer(folder, server, self.path, self.headers.get("Range", ""))

    with _running(Handler, server) as address:
        server.url = address
        yield server


@contextmanager
def serve_s3(folder: Path, faults: Faults | None = None) -> Iterator[Server]:
    """Serve a copy of the files of a folder from a bucket of moto's S3; with faults if wanted."""
    moto_server = pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    moto = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    server = Server(faults or never)
    bucket = f"bucket-{uuid.uuid4().hex}"  # moto's buckets outlive its servers

    class Handler(_Handler):
        state = server

        def answer(self, method: str) -> tuple[int, dict[str, str], bytes]:
            return _forward(self, host, port)

    try:
        with _running(Handler, server) as address, _aws_environment(address):
            server.url = f"s3://{bucket}"
            _upload(folder, bucket, f"http://{host}:{port}")
            yield server
    finally:
        moto.stop()


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that gave up
            super().handle_error(request, client_address)


@contextmanager
def _running(handler: type[BaseHTTPRequestHandler], server: Server) -> Iterator[str]:
    httpd = _HttpServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
    finally:
        server.closing.set()
        httpd.shutdown()
        httpd.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server

    def answer(self, method: str) -> tuple[int, dict[str, str], bytes]:
        raise NotImplementedError

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the tests look at `Server.requests`."""

    def do_GET(self) -> None:
        self._respond("GET")

    def do_HEAD(self) -> None:
        self._respond("HEAD")

    def do_PUT(self) -> None:
        self._respond("PUT")

    def do_DELETE(self) -> None:
        self._respond("DELETE")

    def do_POST(self) -> None:
        self._respond("POST")

    def _respond(self, method: str) -> None:
        kind = self.state.take(method, self.path, self.headers.get("Range", ""))
        try:
            self._give(method, kind)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has given up

    def _give(self, method: str, kind: str) -> None:
        if kind == "stall":
            self.state.closing.wait(STALL_S)
            self.close_connection = True
            return
        if kind == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True
            return
        if kind == "late":
            self.state.closing.wait(LATE_S)
        if kind == "whole":
            del self.headers["Range"]
        if kind.isdecimal():
            status, headers, body = int(kind), {}, SLOW_DOWN if kind == "503" else b"injected"
        else:
            status, headers, body = self.answer(method)
        if kind == "empty":
            body = b""
        elif kind == "long":
            body += b"more"
        self._send(method, kind, status, headers, body)

    def _send(
        self, method: str, kind: str, status: int, headers: dict[str, str], body: bytes
    ) -> None:
        self.send_response(status)
        if method != "HEAD":
            headers = {k: v for k, v in headers.items() if k.lower() != "content-length"}
            headers["Content-Length"] = str(len(body))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if method == "HEAD":
            return
        if kind == "truncated":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif kind == "slow":
            for start in range(0, len(body), len(body) // 4 + 1):
                self.wfile.write(body[start : start + len(body) // 4 + 1])
                time.sleep(0.01)
        else:
            self.wfile.write(body)


def _file_answer(
    folder: Path, server: Server, url_path: str, byte_range: str
) -> tuple[int, dict[str, str], bytes]:
    path = folder / unquote(urlsplit(url_path).path).lstrip("/")
    if not path.is_file():
        return 404, {}, b"not found"
    data = path.read_bytes()
    etag = server.etags.get(url_path, hashlib.md5(data).hexdigest())
    headers = {"ETag": f'"{etag}"', "Content-Length": str(len(data)), "Accept-Ranges": "bytes"}
    if not byte_range:
        return 200, headers, data
    begin, _, end = byte_range.removeprefix("bytes=").partition("-")
    start, stop = int(begin), min(int(end or len(data)) + 1, len(data))
    if start >= len(data):
        return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    return 206, headers, data[start:stop]


def _forward(handler: _Handler, host: str, port: int) -> tuple[int, dict[str, str], bytes]:
    """Pass a request on to another server."""
    body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    connection = http.client.HTTPConnection(host, port, timeout=30)
    try:
        connection.request(handler.command, handler.path, body, dict(handler.headers))
        answer = connection.getresponse()
        own = {"transfer-encoding", "connection", "server", "date"}
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in own}
        return answer.status, headers, answer.read()
    finally:
        connection.close()


@contextmanager
def _aws_environment(endpoint: str) -> Iterator[None]:
    wanted = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _upload(folder: Path, bucket: str, endpoint: str) -> None:
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=bucket)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.put_object(
                Bucket=bucket, Key=path.relative_to(folder).as_posix(), Body=path.read_bytes()
            )
