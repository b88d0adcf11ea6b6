"""gs:// without Google: an object store on a local folder, as the two clients see it that a run goes through.

``Server`` answers the HTTP requests of tensorstore, which writes and reads the arrays of a checkpoint; ``Buckets``
takes the place of gcsfs, through which etils.epath does the rest. Both keep what object stores refuse: an object is
written whole, never appended to or locked, and a folder is there only while an object is under it.
"""

import base64
import hashlib
import json
import os
import shutil
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

ROOT = "JAXRLHF_TEST_BUCKETS"  # the environment variable that names the folder of the buckets


# ---- what epath goes through ----------------------------------------------------------------------------------------


class Buckets(AbstractFileSystem):
    """gcsfs.GCSFileSystem, as far as a run uses it."""

    protocol = ("gcs", "gs")
    cachable = False

    def __init__(self, finalize_on_close: bool = False, **more: Any):
        super().__init__(**more)
        self.root = Path(os.environ[ROOT])

    def local(self, path: str) -> Path:
        return self.root / str(self._strip_protocol(path))

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode == "rb":
            if not self.local(path).is_file():
                raise FileNotFoundError(path)
            return open(self.local(path), "rb")
        if mode != "wb":
            raise NotImplementedError(f"{path}: mode {mode}: an object can only be written whole")
        return Upload(self, path, mode, block_size=2**30)  # type: ignore[arg-type]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        local, name = self.local(path), self._strip_protocol(path)
        if local.is_file():
            state = local.stat()
            md5 = base64.b64encode(hashlib.md5(local.read_bytes()).digest()).decode()
            kept = {"md5Hash": md5, "generation": str(state.st_mtime_ns)}
            return {"name": name, "size": state.st_size, "type": "file", "mtime": state.st_mtime, **kept}
        if local.is_dir() and any(inner.is_file() for inner in local.rglob("*")):
            return {"name": name, "size": 0, "type": "directory", "mtime": 0}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list:
        found = self.info(path)
        if found["type"] == "directory":
            inner = [f"{found['name']}/{one.name}" for one in sorted(self.local(path).iterdir())]
            rows = [self.info(name) for name in inner if self.exists(name)]
        else:
            rows = [found]
        return rows if detail else [row["name"] for row in rows]

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        """Object stores have no folders to make."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Object stores have no folders to make."""

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        put(self.local(path2), self.local(path1).read_bytes())

    def rm_file(self, path: str) -> None:
        if self.local(path).is_dir():
            shutil.rmtree(self.local(path), ignore_errors=True)
        else:
            self.local(path).unlink()

    _rm = rm_file


class Upload(AbstractBufferedFile):
    """An object under way: it is there when the file is closed, and not before."""

    def _initiate_upload(self) -> None:
        self.pieces: list[bytes] = []

    def _upload_chunk(self, final: bool = False) -> bool:
        self.pieces.append(self.buffer.getvalue())
        if final:
            put(self.fs.local(self.path), b"".join(self.pieces))
        return True


def put(local: Path, data: bytes) -> None:
    local.parent.mkdir(parents=True, exist_ok=True)
    beside = local.with_name(f".{local.name}.{os.getpid()}.{threading.get_ident()}")
    beside.write_bytes(data)
    beside.replace(local)


def install() -> None:
    """From now on epath finds gs:// in the folder that the environment names, and orbax a bucket without folders."""
    from orbax.checkpoint._src.path import gcs_utils

    for name in Buckets.protocol:
        fsspec.register_implementation(name, Buckets, clobber=True)
    gcs_utils.get_bucket = lambda name: SimpleNamespace(hierarchical_namespace_enabled=False)


# ---- what tensorstore goes through ----------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """The JSON API of Cloud Storage: read, write, delete and list, with the conditions that tensorstore makes."""

    protocol_version = "HTTP/1.1"
    root: Path

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def parts(self) -> tuple[str, str, dict[str, str]]:
        """(bucket, object, query) of the request."""
        url = urllib.parse.urlsplit(self.path)
        _, _, rest = url.path.partition("/storage/v1/b/")
        bucket, _, name = rest.partition("/o")
        query = {key: values[-1] for key, values in urllib.parse.parse_qs(url.query).items()}
        return bucket, urllib.parse.unquote(name.removeprefix("/")), query

    def answer(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def describe(self, bucket: str, name: str) -> dict[str, str]:
        state = (self.root / bucket / name).stat()
        number = str(state.st_mtime_ns)
        return {"name": name, "bucket": bucket, "size": str(state.st_size), "generation": number, "metageneration": "1"}

    def condition_fails(self, local: Path, query: dict[str, str]) -> bool:
        there = str(local.stat().st_mtime_ns) if local.is_file() else "0"
        return query.get("ifGenerationMatch", there) != there or query.get("ifGenerationNotMatch", "-") == there

    def do_GET(self) -> None:
        bucket, name, query = self.parts()
        if not name:
            self.list(bucket, query)
            return
        local = self.root / bucket / name
        if not local.is_file():
            self.answer(404)
        elif self.condition_fails(local, query):
            self.answer(304 if "ifGenerationNotMatch" in query else 412)
        elif query.get("alt") == "media":
            self.read(local)
        else:
            self.answer(200, json.dumps(self.describe(bucket, name)).encode())

    def read(self, local: Path) -> None:
        data, headers = local.read_bytes(), {"x-goog-generation": str(local.stat().st_mtime_ns)}
        wanted = self.headers.get("Range")
        if wanted is None:
            self.answer(200, data, headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else len(data) - int(last)
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            self.answer(416, b"", headers)
            return
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self.answer(206, data[start:stop], headers)

    def list(self, bucket: str, query: dict[str, str]) -> None:
        top = self.root / bucket
        files = (path for path in top.rglob("*") if path.is_file() and not path.name.startswith("."))
        names = sorted(path.relative_to(top).as_posix() for path in files)
        items = [self.describe(bucket, name) for name in names if name.startswith(query.get("prefix", ""))]
        self.answer(200, json.dumps({"kind": "storage#objects", "items": items}).encode())

    def do_POST(self) -> None:
        bucket, _, query = self.parts()
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        local = self.root / bucket / query["name"]
        if self.condition_fails(local, query):
            self.answer(412)
            return
        put(local, data)
        self.answer(200, json.dumps(self.describe(bucket, query["name"])).encode())

    def do_DELETE(self) -> None:
        bucket, name, query = self.parts()
        local = self.root / bucket / name
        if not local.is_file():
            self.answer(404)
        elif self.condition_fails(local, query):
            self.answer(412)
        else:
            local.unlink()
            self.answer(204)


class Server:
    """Buckets under ``root`` while it is open; ``environment``: what processes need to see them as gs://."""

    def __init__(self, root: Path):
        root.mkdir(parents=True, exist_ok=True)
        self.http = ThreadingHTTPServer(("localhost", 0), type("Bound", (Handler,), {"root": root}))
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.environment = {
            ROOT: str(root),
            "TENSORSTORE_GCS_HTTP_URL": f"http://localhost:{self.http.server_port}",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        }

    def __enter__(self) -> "Server":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()
