"""A stand-in for huggingface.co on the loopback: the four answers that huggingface_hub asks for,
over local folders.
"""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub_server(repos: dict[str, Path], gated: set[str], members: tuple[str, ...] = ()):
    """Serves `repos` (id -> folder, each with one commit on `main`); the files of `gated` ones go
    only to the tokens of `members`.

    Yields (address, requests).
    """
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            requests.append(self.path)
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            self.answer(
                *route(repos, set() if token in members else gated, urlparse(self.path).path)
            )

        do_HEAD = do_GET

        def answer(self, status: int, body: bytes, headers: dict):
            self.send_response(status)
            for key, value in (
                headers | {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}
            ).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def route(repos, gated, path: str) -> tuple[int, bytes, dict]:
    parts = path.strip("/").split("/")
    is_api = parts[:2] == ["api", "models"]
    repo, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
    if repo not in repos:
        # the hub does not tell strangers whether a repo exists
        return 401, b"{}", {"X-Error-Code": "RepoNotFound"}
    if rest[1:2] and rest[1] not in ("main", COMMIT):
        return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
    files = {
        file.relative_to(repos[repo]).as_posix(): file.read_bytes()
        for file in repos[repo].rglob("*")
        if file.is_file()
    }
    if is_api and rest[:1] in ([], ["revision"]):
        return (
            200,
            json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode(),
            {"Content-Type": "application/json"},
        )
    if is_api:
        tree = [
            {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            for name, body in files.items()
        ]
        return 200, json.dumps(tree).encode(), {"Content-Type": "application/json"}
    if repo in gated:
        return 401, b"{}", {"X-Error-Code": "GatedRepo"}
    body = files["/".join(rest[2:])]
    return 200, body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
