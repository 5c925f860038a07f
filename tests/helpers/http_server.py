"""An HTTP server on 127.0.0.1 that answers as it is told, and counts."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CUT = -1
"""In the place of a status: the answer breaks off in its middle."""


@dataclass
class Web:
    """What is there, and what goes wrong."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """Path -> content; all others are 404."""
    faults: dict[str, list[int]] = field(default_factory=dict)
    """Path -> statuses of the next answers, the last of them for ever; 200 gives the file."""
    seen: Counter[str] = field(default_factory=Counter)
    """Requests by path."""

    def status(self, path: str) -> int:
        self.seen[path] += 1
        left = self.faults.get(path, [])
        if not left:
            return 200 if path in self.files else 404
        return left.pop(0) if len(left) > 1 else left[0]


@contextmanager
def web_server() -> Iterator[Web]:
    web = Web()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, content = web.status(self.path), web.files.get(self.path, b"x" * 1000)
            self.send_response(200 if status == CUT else status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if status == CUT else content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
