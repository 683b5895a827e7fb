"""A Hugging Face Hub small enough for a test: create a repository, preupload, LFS, commit; files are kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

TOKEN = "hf_secret_for_the_fake_hub"


class FakeHub:
    """Serves on a free port of 127.0.0.1 while entered.

    Attributes:
        files: (repository, path) -> content, what was committed.
        visibility: repository -> "private", "public" or None, as asked for.
        requests: "METHOD path" of every request.
        forbid: answer 403 to writers, as for a token without write permission.
    """

    def __init__(self, forbid: bool = False) -> None:
        self.files: dict[tuple[str, str], bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.visibility: dict[str, str | None] = {}
        self.requests: list[str] = []
        self.forbid = forbid
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        name = f"{body['organization']}/{body['name']}"
        self.visibility.setdefault(name, body.get("visibility"))
        return {"url": f"{self.endpoint}/{name}", "name": name, "id": name}

    def preupload(self, body: dict[str, Any]) -> dict[str, Any]:
        def mode(path: str) -> str:
            return "lfs" if path.endswith(".safetensors") else "regular"

        return {"files": [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in body["files"]]}

    def batch(self, body: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for item in body["objects"]:
            upload = {"href": f"{self.endpoint}/blob/{item['oid']}"}
            objects.append({"oid": item["oid"], "size": item["size"], "actions": {"upload": upload}})
        return {"transfer": "basic", "objects": objects}

    def commit(self, repository: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[repository, value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[repository, value["path"]] = self.blobs[value["oid"]]
        return {"commitUrl": f"{self.endpoint}/{repository}/commit/1", "commitOid": "1" * 40, "success": True}


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return

        def _answer(self, status: int, value: Any = None) -> None:
            content = json.dumps(value or {}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                content = b""
                while size := int(self.rfile.readline(), 16):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return content
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_GET(self) -> None:
            hub.requests.append(f"GET {self.path}")
            self._answer(404, {"error": "Entry not found"})

        do_HEAD = do_GET

        def do_PUT(self) -> None:
            hub.requests.append(f"PUT {self.path}")
            content = self._body()
            hub.blobs[hashlib.sha256(content).hexdigest()] = content
            self._answer(200)

        def do_POST(self) -> None:
            hub.requests.append(f"POST {self.path}")
            content, path = self._body(), self.path.partition("?")[0]
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._answer(401, {"error": "Invalid username or password."})
            if hub.forbid:
                return self._answer(403, {"error": "You don't have the rights to write here."})
            if path == "/api/validate-yaml":  # huggingface_hub shows a model card to the Hub before it uploads it
                return self._answer(200, {"errors": [], "warnings": []})
            if path == "/api/repos/create":
                return self._answer(200, hub.create(json.loads(content)))
            if "/preupload/" in path:
                return self._answer(200, hub.preupload(json.loads(content)))
            if path.endswith("/info/lfs/objects/batch"):
                return self._answer(200, hub.batch(json.loads(content)))
            if "/commit/" in path:
                repository = path.removeprefix("/api/models/").partition("/commit/")[0]
                return self._answer(200, hub.commit(repository, [json.loads(line) for line in content.splitlines() if line]))
            return self._answer(404, {"error": f"not in the fake hub: {path}"})

    return Handler
