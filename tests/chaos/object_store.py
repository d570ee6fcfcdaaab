"""An S3 server that keeps objects as files, each written whole or not at all, so that it can be killed and started again.

It speaks as much of S3 as MLflow's artifact store does: buckets, objects, listings. Signatures are not checked.
"""

from __future__ import annotations

import shutil
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.sax.saxutils import escape

from obowlab.files.replacing import write_atomic


def serve(root: Path, *, port: int) -> int:
    """Serve the buckets of a folder until the process ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            path = self._path()
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if path.parent == root:
                path.mkdir(exist_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, body)
            self._answer(200)

        def do_GET(self) -> None:
            path, query = self._path(), urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            if path.parent == root:
                self._answer(200, _listing(path, query).encode())
            elif path.is_file():
                self._answer(200, path.read_bytes())
            else:
                self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

        def do_HEAD(self) -> None:
            path = self._path()
            self._answer(200 if path.exists() else 404, path.read_bytes() if path.is_file() else b"", head=True)

        def do_DELETE(self) -> None:
            path = self._path()
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            self._answer(204)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _path(self) -> Path:
            path = (root / urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")).resolve()
            assert path.is_relative_to(root.resolve())
            return path

        def _answer(self, status: int, body: bytes = b"", *, head: bool = False) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"0"')
            self.send_header("Last-Modified", "Tue, 24 Nov 2026 00:00:00 GMT")
            self.end_headers()
            if not head:
                self.wfile.write(body)

    root.mkdir(parents=True, exist_ok=True)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
    return 0


def _listing(bucket: Path, query: dict[str, list[str]]) -> str:
    prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
    names = sorted(path.relative_to(bucket).as_posix() for path in bucket.rglob("*") if path.is_file() and path.name[0] != ".")
    names = [name for name in names if name.startswith(prefix)]
    common = set()
    if delimiter:
        common = {
            prefix + name[len(prefix) :].split(delimiter)[0] + delimiter for name in names if delimiter in name[len(prefix) :]
        }
        names = [name for name in names if delimiter not in name[len(prefix) :]]
    contents = "".join(
        f"<Contents><Key>{escape(name)}</Key><Size>{(bucket / name).stat().st_size}</Size></Contents>" for name in names
    )
    prefixes = "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(common))
    return (
        f'<?xml version="1.0"?><ListBucketResult><Name>{bucket.name}</Name><Prefix>{escape(prefix)}</Prefix>'
        f"<IsTruncated>false</IsTruncated>{contents}{prefixes}</ListBucketResult>"
    )
