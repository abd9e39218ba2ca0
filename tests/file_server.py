"""A web server on this machine for tests: ranges, ETags, and every fault that one meets."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer:
    """Serves `files`, path -> bytes. `url` is its address; `requests` what was asked: (method, path, headers).

    faults   path -> list of what the next GETs of it meet, in turn: a status, "drop" (the connection ends half way),
             "redirect" (to `elsewhere`); then it is served
    ignores_range, no_etag, slow_s   apply to everything; slow_s is the pause between halves
    locked   path -> token that X-Auth-Token must be
    """

    def __init__(self):
        self.files, self.faults, self.locked, self.requests = {}, {}, {}, []
        self.ignores_range = self.no_etag = False
        self.slow_s, self.elsewhere = 0.0, ""
        handler = type("Handler", (_Handler,), {"files": self, "timeout": 20})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def ranges(self, path: str) -> list[str | None]:
        """The Range header of each GET of a path."""
        return [headers.get("Range") for method, asked, headers in self.requests if (method, asked) == ("GET", path)]


class _Handler(BaseHTTPRequestHandler):
    files: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server = self.files
        server.requests.append((self.command, self.path, dict(self.headers)))
        fault = server.faults[self.path].pop(0) if body and server.faults.get(self.path) else None
        if self.path in server.locked and self.headers.get("X-Auth-Token") != server.locked[self.path]:
            fault = 403
        elif self.path not in server.files:
            fault = fault or 404
        if fault == "redirect":
            return self._empty(302, Location=server.elsewhere)
        if isinstance(fault, int):
            return self._empty(fault)
        self._serve(server.files[self.path], body, drop=fault == "drop")

    def _empty(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _serve(self, content: bytes, body: bool, drop: bool) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and not self.files.ignores_range else 0
        if start >= len(content) > 0:
            return self._empty(416, Content_Range=f"bytes */{len(content)}")
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if not self.files.no_etag:
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not body:
            return
        half = start + (len(content) - start) // 2
        try:
            self.wfile.write(content[start:half])
            self.wfile.flush()
            time.sleep(self.files.slow_s)
            if drop:
                self.close_connection = True
                return
            self.wfile.write(content[half:])
        except OSError:
            self.close_connection = True
