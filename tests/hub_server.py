"""A local stand-in for the Hugging Face Hub: the endpoints that huggingface_hub's client uses for models, over HTTP.

Create, validate-yaml, preupload, Git LFS batch with upload and verification, commit (ndjson), model info, tree, resolve with
ETag and, for LFS files, a redirect to another host. Errors carry the codes and headers of the Hub. Xet storage is not spoken:
the client's setting HF_HUB_DISABLE_XET makes it upload by Git LFS.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".png", ".bin", ".pt")
LICENSES = ("mit", "apache-2.0", "unknown", "other", "cc-by-nc-4.0")


@dataclass
class Repo:
    """A model repository: its commits, newest last, each with all files."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], summary: str) -> str:
        """Add a commit; its id."""
        seed = f"{len(self.commits)}{summary}{sorted(files)}"
        self.commits.append((hashlib.sha1(seed.encode()).hexdigest(), files))
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit id and files of a branch, tag or commit."""
        wanted = self.commits[-1][0] if revision == "main" else self.tags.get(revision, revision)
        return next((one for one in self.commits if one[0] == wanted), None)


@dataclass
class Hub:
    """The state of the server."""

    endpoint: str = ""
    tokens: dict[str, str] = field(default_factory=lambda: {"hf_writer": "ada", "hf_reader": ""})  # token -> who may write
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # of Git LFS, by SHA-256
    cut: set[str] = field(default_factory=set)  # names of files whose transfer breaks off half-way
    requests: list[str] = field(default_factory=list)

    def put(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """A repository with these files, as somebody else made it."""
        repo = self.repos.setdefault(repo_id, Repo(private))
        repo.commit(files, "by hand")
        return repo


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > 10 * 2**20)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub  # of the subclass that `hub_server` makes

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""

    # --- answers ----------------------------------------------------------------------------------------------------------

    def answer(self, status: int, body: Any = b"", headers: dict[str, str] | None = None, cut: bool = False) -> None:
        """Send JSON or bytes; `cut`: promise all of them, send half, and hang up."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        """An error as the Hub sends it."""
        headers = {"X-Error-Code": code} if code else {}
        self.answer(status, {"error": message}, headers | ({"X-Error-Message": message} if message else {}))

    @property
    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def token(self) -> str | None:
        given = self.headers.get("Authorization", "")
        return given.removeprefix("Bearer ") if given else None

    def may(self, owner: str, write: bool) -> bool:
        """Whether the token is valid and, to write, belongs to the owner; else the refusal is sent."""
        if self.token is None and write:
            self.refuse(401, message="Invalid username or password.")
        elif self.token is not None and self.token not in self.hub.tokens:
            self.refuse(401, message="Invalid credentials in Authorization header")
        elif write and self.hub.tokens[str(self.token)] != owner:
            self.refuse(403, message=f"Forbidden: you don't have the rights to write to {owner}.")
        else:
            return True
        return False

    def readable(self, repo_id: str) -> Repo | None:
        """The repository; a missing one and a private one without a token are the same 401 or 404, as on the Hub."""
        repo = self.hub.repos.get(repo_id)
        if not self.may(repo_id.split("/", maxsplit=1)[0], write=False):
            return None
        if repo is None or (repo.private and self.token is None):
            self.refuse(404 if self.token else 401, "RepoNotFound" if self.token else "", "Repository not found")
            return None
        return repo

    # --- requests ---------------------------------------------------------------------------------------------------------

    def do_HEAD(self) -> None:
        self.route()

    def do_GET(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def do_PUT(self) -> None:
        self.route()

    def route(self) -> None:
        """Find the endpoint of a request."""
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        name = r"(?P<repo>[\w.-]+/[\w.-]+)"
        routes: list[tuple[str, Any]] = [
            (r"POST /api/repos/create", self.create),
            (r"POST /api/validate-yaml", self.validate_yaml),
            (rf"POST /api/models/{name}/preupload/(?P<revision>.+)", self.preupload),
            (rf"POST /{name}\.git/info/lfs/objects/batch", self.lfs_batch),
            (r"PUT /lfs/(?P<oid>\w{64})", self.lfs_put),
            (r"POST /lfs/(?P<oid>\w{64})/verify", self.lfs_verify),
            (rf"POST /api/models/{name}/commit/(?P<revision>.+)", self.commit),
            (rf"GET /api/models/{name}/tree/(?P<revision>[^/]+)", self.tree),
            (rf"GET /api/models/{name}(/revision/(?P<revision>.+))?", self.info),
            (rf"(HEAD|GET) /{name}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self.resolve),
            (r"(HEAD|GET) /cdn/(?P<oid>\w{64})/(?P<path>.+)", self.cdn),
        ]
        for pattern, call in routes:
            found = re.fullmatch(pattern, f"{self.command} {path}")
            if found:
                call(**{key: value for key, value in found.groupdict().items() if value is not None})
                return
        self.answer(200 if path == "/" else 404)

    def create(self) -> None:
        given = json.loads(self.body)
        owner = given.get("organization") or self.hub.tokens.get(str(self.token), "")
        if not self.may(owner, write=True):
            return
        repo_id = f"{owner}/{given['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}"}
        if repo_id in self.hub.repos:
            self.answer(409, url | {"error": "You already created this model repo"})
            return
        repo = self.hub.repos[repo_id] = Repo(given.get("visibility") == "private")
        repo.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit")
        self.answer(200, url)

    def validate_yaml(self) -> None:
        text = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        metadata = yaml.safe_load(match[1]) if match else None
        errors = [] if metadata else ["empty metadata"]
        if metadata and metadata.get("license") not in LICENSES:
            errors.append(f'"license" must be one of {LICENSES}')
        for model in (metadata or {}).get("model-index", []):
            for result in model["results"]:
                keys = {"task", "dataset", "metrics"}
                errors += [] if keys <= result.keys() and result["task"]["type"] else ["malformed model-index"]
                errors += [f"{m} has no number" for m in result["metrics"] if not isinstance(m["value"], int | float)]
        self.answer(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        files = json.loads(self.body)["files"]
        if not self.may(repo.split("/", maxsplit=1)[0], write=True):
            return
        known = self.hub.repos[repo].commits[-1][1]
        answers = []
        for one in files:
            old = known.get(one["path"])
            lfs = _is_lfs(one["path"], one["size"])
            oid = None if old is None else hashlib.sha256(old).hexdigest() if lfs else _git_oid(old)
            mode = "lfs" if lfs else "regular"
            answers.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": answers})

    def lfs_batch(self, repo: str) -> None:
        given = json.loads(self.body)
        if not self.may(repo.split("/", maxsplit=1)[0], write=True):
            return
        objects = []
        for one in given["objects"]:
            href = f"{self.hub.endpoint}/lfs/{one['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(one if one["oid"] in self.hub.objects else one | {"actions": actions})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        content = self.body
        right = hashlib.sha256(content).hexdigest() == oid
        if right:
            self.hub.objects[oid] = content
        self.answer(200 if right else 400)

    def lfs_verify(self, oid: str) -> None:
        given = json.loads(self.body)
        self.answer(200 if len(self.hub.objects.get(oid, b"")) == given["size"] else 404)

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        if not self.may(repo.split("/", maxsplit=1)[0], write=True):
            return
        files = dict(self.hub.repos[repo].commits[-1][1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = self.hub.repos[repo].commit(files, lines[0]["value"]["summary"])
        self.answer(200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def found(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit id and files of a revision; else the refusal is sent."""
        known = self.readable(repo)
        if known is None:
            return None
        commit = known.at(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def info(self, repo: str, revision: str = "main") -> None:
        found = self.found(repo, revision)
        if found is not None:
            private = self.hub.repos[repo].private
            siblings = [{"rfilename": name} for name in found[1]]
            self.answer(200, {"id": repo, "modelId": repo, "sha": found[0], "private": private, "siblings": siblings})

    def tree(self, repo: str, revision: str) -> None:
        found = self.found(repo, revision)
        if found is None:
            return
        entries: list[dict[str, Any]] = []
        for path, content in found[1].items():
            entries.append({"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)})
            if _is_lfs(path, len(content)):
                lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
                entries[-1]["lfs"] = lfs
        self.answer(200, entries)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self.found(repo, revision)
        if found is None:
            return
        oid, files = found
        headers = {"X-Repo-Commit": oid}
        if path not in files:
            self.answer(404, headers=headers | {"X-Error-Code": "EntryNotFound"})
            return
        content = files[path]
        if not _is_lfs(path, len(content)):
            self.answer(200, content, headers | {"ETag": f'"{_git_oid(content)}"'}, cut=path in self.hub.cut)
            return
        sha = hashlib.sha256(content).hexdigest()
        self.hub.objects[sha] = content
        headers |= {"X-Linked-ETag": f'"{sha}"', "X-Linked-Size": str(len(content))}
        # another host, as the Hub's storage is: the client must not send the token there
        storage = self.hub.endpoint.replace("127.0.0.1", "localhost")
        self.answer(302, headers=headers | {"Location": f"{storage}/cdn/{sha}/{path}"})

    def cdn(self, oid: str, path: str) -> None:
        if self.token is not None:
            self.answer(400)
            return
        self.answer(200, self.hub.objects[oid], cut=path in self.hub.cut)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A server on this machine, ended afterwards."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
