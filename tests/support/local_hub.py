"""A hub of our own on loopback: as much of huggingface.co's HTTP interface as loading models and data sets asks for."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"the only commit").hexdigest()


@contextmanager
def serve(repositories: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Address of a hub that holds `repositories`, and the list of what it was asked, which grows.

    Args:
        repositories: folder of each; keys are "models/owner/name" and "datasets/owner/name".
    """
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
            self._answer(body=True, sent=sent)

        def log_message(self, *args: object) -> None:
            pass

        def _answer(self, *, body: bool, sent: Mapping | None = None) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(f"{self.command} {path}")
            for key, folder in repositories.items():
                for place in (f"/api/{key}", f"/{key.removeprefix('models/')}/resolve"):
                    if path == place or path.startswith(place + "/"):
                        rest = path.removeprefix(place).strip("/")
                        return self._files(folder, rest, body) if "resolve" in place else self._api(key, rest, sent)
            self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, body)

        def _files(self, folder: Path, rest: str, body: bool) -> None:
            file = folder / rest.partition("/")[2]
            if not file.is_file():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
            content = file.read_bytes()
            first, last = 0, len(content) - 1
            if wanted := self.headers.get("Range"):
                start, _, end = wanted.removeprefix("bytes=").partition("-")
                first, last = int(start), min(int(end or last), last)
            headers = {
                "X-Repo-Commit": COMMIT,
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "Accept-Ranges": "bytes",
                "Content-Range": f"bytes {first}-{last}/{len(content)}",
            }
            self._send(206 if wanted else 200, content[first : last + 1], headers, body)

        def _api(self, key: str, rest: str, sent: Mapping | None) -> None:
            folder = repositories[key]
            files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
            entries = [
                {
                    "type": "file",
                    "path": f,
                    "size": (folder / f).stat().st_size,
                    "oid": hashlib.sha1(f.encode()).hexdigest(),
                }
                for f in files
            ]
            answer: object = {
                "id": key.partition("/")[2],
                "sha": COMMIT,
                "private": False,
                "gated": False,
                "tags": [],
                "siblings": [{"rfilename": f} for f in files],
            }
            if rest.startswith("tree/"):
                answer = entries
            elif rest.startswith("paths-info/"):
                wanted = sent["paths"] if sent else []
                answer = [e for e in entries if e["path"] in wanted]
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, True)

        def _send(self, status: int, content: bytes, headers: Mapping[str, str], body: bool) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
