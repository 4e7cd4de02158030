"""A hub on this machine: the few routes that an upload uses, and what was sent to them."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_secretsecretsecretsecret"


class Hub:
    """``files`` by repository, branch and path; ``fail`` makes the routes that a pattern matches
    answer with a status instead."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.repos: dict[str, bool] = {}
        self.branches: set[tuple[str, str]] = set()
        self.stored: dict[str, bytes] = {}
        self.cards: list[str] = []
        self.tokens: set[str] = set()
        self.fail: tuple[str, int, str] | None = None
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        path = path.split("?")[0]
        if self.fail and re.search(self.fail[0], path):
            return self.fail[1], {"error": self.fail[2]}
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if repo in self.repos:
                return 409, {"error": "exists", "url": f"{self.url}/{repo}"}
            self.repos[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
            return 200, {"url": f"{self.url}/{repo}"}
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return 200, {"warnings": [], "errors": []}
        if match := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            self.branches.add((match[1], match[2]))
            return 200, {}
        if match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            files = json.loads(body)["files"]
            return 200, {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for f in files
                ]
            }
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return 200, {
                "transfer": "basic",
                "objects": [
                    {**o, "actions": {"upload": {"href": f"{self.url}/store/{o['oid']}"}}}
                    for o in objects
                ],
            }
        if method == "PUT" and path.startswith("/store/"):
            self.stored[path.removeprefix("/store/")] = body
            return 200, {}
        if match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    content = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    content = self.stored[value["oid"]]
                else:
                    continue
                self.files[match[1], match[2], value["path"]] = content
            return 200, {"commitUrl": f"{self.url}/{match[1]}/commit/abc", "commitOid": "abc123"}
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            if match[1] not in self.repos:
                return 404, {"error": "Repository not found"}
            return 200, {"id": match[1], "private": self.repos[match[1]], "sha": "abc123"}
        return 404, {"error": "no such route"}


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            sent = self.headers.get("Authorization", "")
            if re.search(r"/api/(repos|models|validate)|\.git/", self.path):
                hub.tokens.add(sent.removeprefix("Bearer "))
            status, value = hub.answer(self.command, self.path, body)
            raw = json.dumps(value).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = do_PUT = _do

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
