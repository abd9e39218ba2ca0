"""Servers that tests and benchmarks start: nginx, an S3 API, one that misbehaves on request, and added latency."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

HOST = "127.0.0.1"

NGINX = """
{user}
worker_processes 1; daemon off; pid {own}/nginx.pid; error_log {own}/error.log;
events {{ worker_connections 2048; }}
http {{
  access_log off; tcp_nodelay on; keepalive_requests 1000000;
  client_body_temp_path {own}/1; proxy_temp_path {own}/2; fastcgi_temp_path {own}/3;
  uwsgi_temp_path {own}/4; scgi_temp_path {own}/5;
  server {{
    listen {host}:{port}; root {folder};
    location /forbidden/ {{ return 403; }}
    location /whole/ {{ alias {folder}/; max_ranges 0; }}
    location /untagged/ {{ alias {folder}/; etag off; }}
  }}
}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def needed(program: str) -> str:
    """Where a program lies; the test is skipped where it is missing, and fails there under CI=true."""
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin:/opt/homebrew/bin")
    if not found:
        reason = f"{program} is not installed; on Debian: apt-get install {program}-light"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@contextlib.contextmanager
def nginx(folder: Path, own: Path) -> Iterator[str]:
    """The address of an nginx that serves `folder`; its own files go to `own`.

    /forbidden/... is refused, /whole/... ignores ranges and /untagged/... has no ETag.
    """
    program, port = needed("nginx"), free_port()
    own.mkdir(parents=True, exist_ok=True)
    user = "user root;" if os.geteuid() == 0 else ""  # else its workers may not read a test's folder
    (own / "nginx.conf").write_text(NGINX.format(user=user, own=own, host=HOST, port=port, folder=folder))
    process = subprocess.Popen([program, "-p", own, "-c", own / "nginx.conf", "-e", own / "error.log"])
    try:
        answering(port, process)
        yield f"http://{HOST}:{port}"
    finally:
        process.terminate()
        process.wait(10)


def answering(port: int, process: subprocess.Popen) -> None:
    """Wait until something listens."""
    for _ in range(500):
        if process.poll() is not None:
            raise RuntimeError(f"{process.args[0]} ended at once with status {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        time.sleep(0.02)
    raise RuntimeError(f"nothing listens on port {port}")


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The address of an S3 API, empty."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(HOST, port=0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


class Faulty(ThreadingHTTPServer):
    """A web server of `objects` (path -> bytes) that answers the next requests with `faults`, in order.

    A fault is a status ("503"), or: "stall" (no answer), "halt" (none after the first bytes), "reset", "cut" (the
    connection ends early), "short" (fewer bytes than asked for, and a Content-Length that agrees), "etag" (another
    version, other bytes), "etag-ignored" (the same, whatever If-Match says), "size" (of another size), "range" (of
    another place), "whole" (no range), "bare" (a range without Content-Range); None is no fault.
    """

    daemon_threads, request_queue_size = True, 1024
    stall_s = 1.0

    def __init__(self, objects: dict[str, bytes]):
        super().__init__((HOST, 0), _Handler)
        self.objects, self.faults = objects, deque()
        self.log: list[tuple[str, str | None, str | None]] = []  # path with query, Range, If-Match
        self.authorisations: list[str | None] = []
        self.gate: threading.Barrier | None = None  # passed by that many requests together
        self.inside, self.most, self.lock = 0, 0, threading.Lock()
        self.address = f"http://{HOST}:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up on a fault is no error."""

    def __enter__(self) -> Faulty:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", -1

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            fault = server.faults.popleft() if server.faults else None
            server.log.append((self.path, self.headers.get("Range"), self.headers.get("If-Match")))
            server.authorisations.append(self.headers.get("Authorization"))
            server.inside += 1
            server.most = max(server.most, server.inside)
        try:
            if server.gate:
                server.gate.wait(30)
        finally:
            with server.lock:  # before it is answered, for the client may ask again at once
                server.inside -= 1
        self.respond(fault)

    def respond(self, fault: str | None) -> None:
        data = self.server.objects.get(unquote(urlsplit(self.path).path))
        if data is None or (fault or "").isdigit():
            return self.reply(int(fault or 404), b"<Error><Message>out of order</Message></Error>", {})
        if fault == "stall":
            return time.sleep(self.server.stall_s)
        tag = f'"{len(data)}"'
        if fault in ("etag", "etag-ignored"):
            tag, data = '"another"', data.translate(bytes(range(255, -1, -1)))
        wanted = self.headers.get("If-Match")
        if wanted and wanted != tag and fault != "etag-ignored":
            return self.reply(412, b"", {})
        if fault == "whole" or not self.headers.get("Range"):
            return self.reply(200, data, {"ETag": tag})
        start, stop = (int(n or len(data) - 1) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
        start, stop = start + (fault == "range"), min(stop + 1, len(data)) + (fault == "range")
        body, total = data[start:stop], len(data) + (fault == "size")
        more = {"ETag": tag, "Content-Range": f"bytes {start}-{stop - 1}/{total}"}
        if fault == "bare":
            del more["Content-Range"]
        self.reply(206, body[:-1] if fault == "short" else body, more, fault)

    def reply(self, status: int, body: bytes, more: dict, fault: str | None = None) -> None:
        self.send_response(status)
        always = {"Content-Length": len(body), "Last-Modified": "Sat, 01 Jan 2000 00:00:00 GMT"}
        for name, value in (always | more).items():
            self.send_header(name, str(value))
        self.end_headers()
        if fault not in ("halt", "cut", "reset"):
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if fault == "halt":
            time.sleep(self.server.stall_s)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


@contextlib.contextmanager
def delayed(address: str, latency_s: float) -> Iterator[str]:
    """The address of a server, through a relay that holds every request back by latency_s; answers pass at once."""
    port = free_port()
    process = subprocess.Popen([sys.executable, __file__, str(port), str(urlsplit(address).port), str(latency_s)])
    try:
        answering(port, process)
        yield f"http://{HOST}:{port}"
    finally:
        process.terminate()
        process.wait(10)


async def relay(port: int, onto: int, latency_s: float) -> None:
    """Pass bytes on between `port` and `onto`, those towards the server late."""

    async def copy(reader, writer, wait_s: float) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(2**18):
                if wait_s:
                    await asyncio.sleep(wait_s)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(reader, writer) -> None:
        with contextlib.suppress(ConnectionError):
            server_reader, server_writer = await asyncio.open_connection(HOST, onto)
            await asyncio.gather(copy(reader, server_writer, latency_s), copy(server_reader, writer, 0))

    server = await asyncio.start_server(connected, HOST, port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(relay(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
