"""moto's S3 on 127.0.0.1, with faults at the wire: bursts of 503, answers that come late, byte by byte or cut.

The emulator is the real client's other side: requests travel through s3fs, botocore and aiohttp.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

BUCKET = "bucket"
_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)


@dataclass
class Faults:
    """What goes wrong at the next requests; every thread of the server looks here."""

    refuse: int = 0
    """So many requests get a 503."""
    refuse_every: int = 0
    """Every n-th request gets a 503, for ever."""
    late_s: float = 0.0
    """Every answer comes so much later."""
    stall: int = 0
    """So many GETs of objects give their first bytes and then nothing for `stall_s`."""
    stall_s: float = 20.0
    lose_answer: int = 0
    """So many PUTs are done, and answered with a 500 nonetheless."""
    deny: str = ""
    """GETs of objects with this in their path, and with `deny_lists` those of listings too, get a 403."""
    deny_lists: bool = False
    overwrite: bool = False
    """As stores that do not know If-None-Match: every PUT overwrites."""
    match: Callable[[str, str], bool] = lambda method, path: True
    """Which requests (method, path) `refuse`, `stall` and `lose_answer` mean."""
    seen: Counter[str] = field(default_factory=Counter)
    """Requests by method, and `503`s given."""
    paths: list[tuple[str, str]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, name: str, method: str, path: str) -> bool:
        """Whether this request meets a fault of which only so many happen."""
        with self._lock:
            left = getattr(self, name)
            if left <= 0 or not self.match(method, path):
                return False
            setattr(self, name, left - 1)
            return True

    def due(self) -> bool:
        """Whether it is the turn of a 503."""
        with self._lock:
            return self.refuse_every > 0 and self.seen.total() % self.refuse_every == 0

    def heal(self) -> None:
        self.refuse = self.refuse_every = self.stall = self.lose_answer = 0
        self.late_s = 0.0
        self.match = lambda method, path: True
        self.overwrite = self.deny_lists = False
        self.deny = ""


class _Faulty:
    """The emulator's WSGI application with faults before and behind it."""

    def __init__(self, app: Any, faults: Faults) -> None:
        self._app, self._faults = app, faults

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        faults, method, path = self._faults, environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with faults._lock:
            faults.seen[method] += 1
            faults.paths.append((method, path))
        if faults.late_s:
            time.sleep(faults.late_s)
        if faults.take("refuse", method, path) or faults.due():
            faults.seen["503"] += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [_SLOW_DOWN]
        if method == "GET" and faults.deny and (faults.deny in path or (faults.deny_lists and path.count("/") < 3)):
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [_SLOW_DOWN.replace(b"SlowDown", b"AccessDenied")]
        if faults.overwrite:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if method == "PUT" and faults.take("lose_answer", method, path):
            list(self._app(environ, lambda *_: None))
            start_response("500 Internal Server Error", [("Content-Type", "application/xml")])
            return [_SLOW_DOWN.replace(b"SlowDown", b"InternalError")]
        answer: Iterable[bytes] = self._app(environ, start_response)
        if method == "GET" and path.count("/") > 1 and faults.take("stall", method, path):
            return _stalled(answer, faults.stall_s)
        return answer


def _stalled(answer: Iterable[bytes], stall_s: float) -> Iterator[bytes]:
    data = b"".join(answer)
    yield data[: len(data) // 2]
    time.sleep(stall_s)
    yield data[len(data) // 2 :]


@dataclass(frozen=True)
class Server:
    """A running emulator."""

    url: str
    """Of the endpoint."""
    faults: Faults
    env: dict[str, str]
    """What a client needs; this process has it too while the server runs."""


@contextmanager
def s3_server() -> Iterator[Server]:
    """An emulator with one empty bucket; clients of this process find it."""
    import boto3  # type: ignore[import-untyped]
    from moto.s3.models import s3_backends
    from moto.server import (  # type: ignore[attr-defined]
        DomainDispatcherApplication,
        create_backend_app,
    )
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, type: str, message: str, *args: Any) -> None:
            pass

    faults = Faults()
    app = _Faulty(DomainDispatcherApplication(create_backend_app), faults)
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    env = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    _forget_clients()
    try:
        # The emulator's state is its process's, not its server's.
        for backend in [one for regions in s3_backends.values() for one in regions.values()]:
            backend.reset()
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield Server(url=endpoint, faults=faults, env=env)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _forget_clients()
        server.shutdown()
        thread.join()
        server.server_close()


def _forget_clients() -> None:
    """fsspec keeps clients by their arguments, and the endpoint is none of them."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def objects(prefix: str = "") -> dict[str, int]:
    """Name -> size of what is in the bucket, as boto3 sees it."""
    import boto3

    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", [])}
