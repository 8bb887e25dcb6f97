"""A run's progress as a page for this machine alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from align_ti.errors import ConfigError
from align_ti.report.folder_progress import progress
from align_ti.report.progress_page import progress_page

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
"""What a browser on this machine may call the server."""


def serve_progress(folder: Path, port: int, said: Callable[[str], None]) -> None:
    """Serves the page until it is interrupted, to this machine alone.

    Args:
        folder: of a run, a demo or a study.
        port: 0 for any that is free.
        said: is told the address.

    Raises:
        ConfigError: the port is taken, or may not be used.
        RunError: the folder is a file.
    """
    progress(folder, time.time())
    try:
        server = make_server(folder, port)
    except OSError as error:
        raise ConfigError(
            f"--port {port} cannot be served on ({error.strerror}); a free port from 1024 on is accepted; take another, or "
            "--port 0 for any free one."
        ) from error
    with server:
        said(f"http://{HOST}:{server.server_port}/ shows {folder}; Ctrl-C ends it.")
        server.serve_forever()


def make_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """The server of the page, at its address but not serving yet."""

    class Page(BaseHTTPRequestHandler):
        """Answers / with the page and everything else with 404; no file is ever chosen by a request."""

        server_version, sys_version = "align-ti", ""

        def do_GET(self) -> None:
            # Another name is another site's, which a browser was made to look for here.
            if self.path != "/" or self.headers.get("Host", "").rpartition(":")[0] not in NAMES:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            body = progress_page(progress(folder, time.time())).encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; img-src data:")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Says nothing: the page asks every few seconds."""

    return ThreadingHTTPServer((HOST, port), Page)
