"""Servers on loopback that tests and their processes download from: an S3, and an HTTP server with faults on demand."""

import http.client
import logging
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote, urlsplit

_CODES = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}  # as S3 names them
_SOMEBODY = "AWS4-HMAC-SHA256 Credential=test/20200101/us-east-1/s3/aws4_request"
_NOT_PASSED_ON = {"connection", "transfer-encoding", "content-length", "date", "server"}


_RUNNING = []


@dataclass
class S3:
    """An S3 at ``url`` (http://127.0.0.1:port) with one bucket."""

    url: str
    bucket: str = "shards"

    def put(self, key, data):
        """Store bytes, or a file, as ``key``; -> its s3:// url."""
        status, text = _ask(self.url, "PUT", f"/{self.bucket}/{quote(key)}", _bytes_of(data))
        assert status == 200, (status, text)
        return f"s3://{self.bucket}/{key}"

    def put_folder(self, folder, prefix):
        """Store the files of ``folder`` as prefix/name; -> s3:// url of the folder."""
        for file in sorted(file for file in Path(folder).rglob("*") if file.is_file()):
            self.put(f"{prefix}/{file.relative_to(folder)}", file)
        return f"s3://{self.bucket}/{prefix}"

    def delete(self, key):
        _ask(self.url, "DELETE", f"/{self.bucket}/{quote(key)}")


def s3_environment(url):
    """What fsspec's s3fs (AWS_ENDPOINT_URL) and streaming (S3_ENDPOINT_URL) need to use the S3 at ``url``."""
    return {
        "AWS_ENDPOINT_URL": url,
        "S3_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_CONFIG_FILE": "/dev/null",
    }


def use_s3(monkeypatch, url):
    """Have this process, and those that it starts, use the S3 at ``url``."""
    from s3fs import S3FileSystem

    for name, value in s3_environment(url).items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # which know the one before


@contextmanager
def s3_server(bucket="shards"):
    """An `S3` in this process, which others reach by its url; signatures are not checked."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    _RUNNING.append(server)
    try:
        host, port = server.get_host_and_port()
        s3 = S3(f"http://{host}:{port}", bucket)
        assert _ask(s3.url, "PUT", f"/{bucket}")[0] == 200
        yield s3
    finally:
        _RUNNING.remove(server)
        if not _RUNNING:  # all servers of a process have the same buckets, and the next test wants empty ones
            assert _ask(s3.url, "POST", "/moto-api/reset")[0] == 200
        server.stop()


def _bytes_of(data):
    return data if isinstance(data, bytes) else Path(data).read_bytes()


def _ask(url, method, path, body=None):
    with _closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)) as connection:
        connection.request(method, path, body, {"Authorization": _SOMEBODY})  # nobody may not replace a file
        answer = connection.getresponse()
        return answer.status, answer.read()


@contextmanager
def _closing(connection):
    try:
        yield connection
    finally:
        connection.close()


@dataclass
class Fault:
    """What goes wrong with GETs (and HEADs, before a body) of paths in which ``match`` (an expression) is found.

    status: answer this. after: send so many bytes of the body, and then ``then``: "cut" the connection, "hang", or
    "flip" the bits of the next byte and go on. Without both: never answer. times: so often, then never again.
    """

    match: str
    status: int | None = None
    after: int | None = None
    then: str = "cut"
    times: float = float("inf")
    methods: tuple[str, ...] = ("GET", "HEAD")


@dataclass
class FaultyServer:
    """Serves ``source``: the files of a folder, or what the server with that url (an S3) answers. A context manager.

    All may be changed at any time, from any thread. rate: bytes per second, of all connections together. gets,
    sent: GETs, and bytes of bodies, by path without query. page: the answer, with 200, for files that do not exist.
    ranges: whether it sends parts of the files of a folder.
    """

    source: str | Path
    rate: float | None = None
    gets: Counter = field(default_factory=Counter)
    sent: Counter = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    port: int = 0
    page: bytes | None = None
    ranges: bool = True
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _free: float = 0  # monotonic time from which the line is free
    _closing: threading.Event = field(default_factory=threading.Event)

    def fail(self, match="", **fault):
        """Have a `Fault`, besides those there are; -> it, to be given to `mend`."""
        fault = Fault(match, **fault)
        with self._lock:
            self.faults.append(fault)
        return fault

    def mend(self, *faults):
        """Drop these faults; all, if none is given."""
        with self._lock:
            self.faults = [fault for fault in self.faults if faults and fault not in faults]

    def take(self, method, path):
        """The fault of this request, if it has one; counts it."""
        with self._lock:
            for fault in self.faults:
                body = fault.after is None or method == "GET"
                if fault.times > 0 and body and method in fault.methods and re.search(fault.match, path):
                    fault.times -= 1
                    return fault
        return None

    def count(self, path, sent=0):
        with self._lock:
            if sent:
                self.sent[path] += sent
            else:
                self.gets[path] += 1

    def wait_for_line(self, size):
        """Return when ``size`` bytes more may go out."""
        with self._lock:
            if not self.rate:
                return
            begin = max(self._free, time.monotonic())
            self._free = begin + size / self.rate
        self._closing.wait(max(0, begin - time.monotonic()))

    def hang(self):
        """For as long as the server lives, or 60 seconds."""
        self._closing.wait(60)

    def __enter__(self) -> Self:
        handler = type("_Handler", (_Handler,), {"control": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.handle_error = lambda *_: None  # clients come and go
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    control: FaultyServer

    def _answer(self):
        control, path = self.control, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "GET":
            control.count(path)
        fault = control.take(self.command, path)
        with suppress(ConnectionError):
            if fault is not None and fault.after is None and fault.status is None:
                control.hang()
                self.close_connection = True
            elif fault is not None and fault.status is not None:
                text = f"<Error><Code>{_CODES.get(fault.status, 'Error')}</Code><Message>told to</Message></Error>"
                self._send(path, fault.status, {"Content-Type": "application/xml"}, text.encode(), None)
            elif str(control.source).startswith("http"):
                self._send(path, *self._forward(body), fault)
            else:
                self._send(path, *self._file(Path(f"{control.source}{path}")), fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815 - named by http.server

    def _forward(self, body):
        with _closing(http.client.HTTPConnection(urlsplit(self.control.source).netloc, timeout=30)) as connection:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _NOT_PASSED_ON}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in _NOT_PASSED_ON}
            headers["Content-Length"] = answer.getheader("Content-Length") or str(len(data))
            return answer.status, headers, data

    def _file(self, file):
        if not file.is_file():
            if self.control.page is not None:
                return 200, {"Content-Type": "text/html"}, self.control.page
            return 404, {}, b"not found"
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not wanted or not self.control.ranges:
            return 200, headers, file.read_bytes()
        size, (first, last) = file.stat().st_size, wanted.groups()
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        if start >= stop:
            return 416, {"Content-Range": f"bytes */{size}"}, b""
        with file.open("rb") as opened:  # the rest is not read: many parts of large files are asked for at once
            opened.seek(start)
            return 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}, opened.read(stop - start)

    def _send(self, path, status, headers, data, fault):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(data)
        if fault is not None and fault.then == "flip":
            data = data[: fault.after] + bytes([data[fault.after] ^ 255]) + data[fault.after + 1 :]
        elif fault is not None:
            end = min(end, fault.after)
        block = max(1, min(2**16, int((self.control.rate or 2**30) / 20)))
        for start in range(0, end, block):
            part = data[start : min(end, start + block)]
            self.control.wait_for_line(len(part))
            self.wfile.write(part)
            self.control.count(path, len(part))
        if end < len(data):
            if fault.then == "hang":
                self.control.hang()
            self.close_connection = True

    def log_message(self, *_):
        pass
