"""A Hugging Face Hub on loopback: what huggingface_hub's client asks for when models are pushed and loaded.

Commits, branches, pull requests, private repositories, and large files by LFS (Xet must be off). One user, one token.
Large files come from the Hub itself, where the real one redirects elsewhere. A route that is not here gets 501.
"""

import base64
import json
import re
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import yaml

USER, TOKEN = "user", "hf_loopback"
_LARGE = (".safetensors", ".bin")
_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LARGE).encode()


class Refusal(Exception):  # noqa: N818
    """An answer other than 2xx. `code`: what the client tells a missing repository, revision and file apart by."""

    def __init__(self, status: int, message: str, code: str = "", **fields: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, **fields}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


@dataclass(frozen=True)
class Commit:
    """A revision: what the committer said, and all files."""

    oid: str
    parent: "Commit | None"
    title: str
    description: str
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class Repository:
    """Commits by hash, and by branch or `refs/pr/N`."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, Commit] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        """The commit of a branch, pull request or hash."""
        commit = self.refs.get(revision) or self.commits.get(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def commit(self, ref: str, parent: Commit | None, title: str, description: str, files: Mapping[str, bytes]) -> str:
        """Let `ref` be a new commit. Its hash."""
        oid = sha1(f"{title} {len(self.commits)}".encode()).hexdigest()
        self.refs[ref] = self.commits[oid] = Commit(oid, parent, title, description, files)
        return oid


@dataclass(frozen=True)
class Hub:
    """The repositories by id, and what was asked: "POST /api/…", and with which bearer tokens (None: with none)."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision, without the `.gitattributes` that every repository begins with."""
        files = self.repositories[repo_id].at(revision).files
        return {path: content for path, content in files.items() if path != ".gitattributes"}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits up to a revision, the newest first, without the one that every repository begins with."""
        found = [self.repositories[repo_id].at(revision)]
        while (parent := found[-1].parent) is not None:
            found.append(parent)
        return found[:-1]

    @contextmanager
    def failing(self, pattern: str, status: int = 500) -> Generator[None]:
        """A context in which requests that `pattern` is found in ("POST /api/…") do nothing and get `status`."""
        self.faults[pattern] = status
        try:
            yield
        finally:
            del self.faults[pattern]


Route = Callable[..., Any]
_ROUTES: list[tuple[re.Pattern[str], Route]] = []
_MODEL, _SEGMENT = r"([^/]+/[^/]+?)", r"([^/]+)"


def _route(pattern: str) -> Callable[[Route], Route]:
    def add(function: Route) -> Route:
        _ROUTES.append((re.compile(pattern), function))
        return function

    return add


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"

    def do_GET(self) -> None:
        url, length = urlsplit(self.path), int(self.headers.get("Content-Length", 0))
        self.query, self.body = parse_qs(url.query), self.rfile.read(length)
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        headers: dict[str, str] = {}
        try:
            with self.server.lock:
                status, answer = 200, self._answer(f"{self.command} {url.path}", headers)
        except Refusal as refusal:
            status, answer, headers = refusal.status, refusal.body, refusal.headers
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _answer(self, what: str, headers: dict[str, str]) -> Any:
        self.hub = self.server.hub
        self.hub.requests.append(what)
        self.hub.tokens.append(self.token)
        for pattern, status in self.hub.faults.items():
            if re.search(pattern, what):
                raise Refusal(status, "Out of order")
        if self.token not in (None, TOKEN):
            raise Refusal(401, "Invalid credentials in Authorization header")
        for pattern, route in _ROUTES:
            if match := pattern.fullmatch(what):
                return route(self, headers, *(group and unquote(group) for group in match.groups()))
        raise Refusal(501, f"No such route: {what}")

    def _repository(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.token is None):
            raise Refusal(401 if self.token is None else 404, "Repository not found", "RepoNotFound")
        if self.command == "POST":
            self._require_user()
        return repository

    def _require_user(self) -> None:
        if self.token is None:
            raise Refusal(401, "Invalid username or password.")

    @_route("GET /api/whoami-v2")
    def _whoami(self, _: Any) -> Any:
        self._require_user()
        return {"type": "user", "name": USER, "orgs": []}

    @_route("POST /api/validate-yaml")
    def _validate(self, _: Any) -> Any:
        front = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        try:
            fields = front and yaml.safe_load(front[1])
        except yaml.YAMLError as error:
            raise Refusal(400, "Invalid metadata", errors=[{"message": str(error)}]) from None
        warnings = [] if fields else [{"message": "empty or missing yaml metadata in repo card"}]
        return {"errors": [], "warnings": warnings}

    @_route("POST /api/repos/create")
    def _create(self, _: Any) -> Any:
        asked = json.loads(self.body)
        owner = asked["organization"] or USER
        repo_id = f"{owner}/{asked['name']}"
        self._require_user()
        if owner != USER:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        if repo_id in self.hub.repositories:
            raise Refusal(409, "You already created this model repo", url=f"{self.hub.url}/{repo_id}")
        repository = self.hub.repositories[repo_id] = Repository(
            asked.get("visibility") == "private" or bool(asked.get("private"))
        )
        repository.commit("main", None, "initial commit", "", {".gitattributes": _ATTRIBUTES})
        return {"url": f"{self.hub.url}/{repo_id}"}

    @_route(f"POST /api/models/{_MODEL}/branch/{_SEGMENT}")
    def _branch(self, _: Any, repo_id: str, branch: str) -> Any:
        repository = self._repository(repo_id)
        if branch in repository.refs:
            raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
        repository.refs[branch] = repository.at(json.loads(self.body).get("startingPoint", "main"))
        return {}

    @_route(f"GET /api/models/{_MODEL}(?:/revision/{_SEGMENT})?")
    def _info(self, _: Any, repo_id: str, revision: str | None) -> Any:
        repository = self._repository(repo_id)
        commit = repository.at(revision or "main")
        siblings = [{"rfilename": path} for path in commit.files]
        return {"id": repo_id, "sha": commit.oid, "private": repository.private, "tags": [], "siblings": siblings}

    @_route(f"GET /api/models/{_MODEL}/tree/{_SEGMENT}")
    def _tree(self, _: Any, repo_id: str, revision: str) -> Any:
        if self.query.get("recursive") != ["true"]:
            raise Refusal(501, "Trees are listed whole, and their files only")
        return [_entry(*file) for file in self._repository(repo_id).at(revision).files.items()]

    @_route(f"(?:HEAD|GET) /{_MODEL}/resolve/{_SEGMENT}/(.+)")
    def _resolve(self, headers: dict[str, str], repo_id: str, revision: str, path: str) -> bytes:
        commit = self._repository(repo_id).at(revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        entry = _entry(path, commit.files[path])
        headers |= {"X-Repo-Commit": commit.oid, "ETag": f'"{entry["oid"]}"'}
        if "lfs" in entry:
            headers |= {"X-Linked-ETag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(entry["size"])}
        return commit.files[path]

    @_route(f"POST /api/models/{_MODEL}/preupload/{_SEGMENT}")
    def _preupload(self, _: Any, repo_id: str, revision: str) -> Any:
        there, files = self._repository(repo_id).at(revision).files, []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            entry = _entry(path, there.get(path, b""))
            oid = entry.get("lfs", entry)["oid"] if path in there else None
            mode = "lfs" if "lfs" in entry else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    @_route(rf"POST /{_MODEL}\.git/info/lfs/objects/batch")
    def _batch(self, _: Any, repo_id: str) -> Any:
        self._repository(repo_id)
        objects = json.loads(self.body)["objects"]
        for each in objects:
            if each["oid"] not in self.hub.uploads:
                each["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    @_route(f"PUT /lfs/{_SEGMENT}")
    def _upload(self, _: Any, oid: str) -> Any:
        if sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content's checksum is another")
        self.hub.uploads[oid] = self.body
        return {}

    @_route(f"POST /api/models/{_MODEL}/commit/{_SEGMENT}")
    def _commit(self, _: Any, repo_id: str, revision: str) -> Any:
        repository = self._repository(repo_id)
        head, files = repository.at(revision), dict(repository.at(revision).files)
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        for key, value in ((operation["key"], operation["value"]) for operation in operations):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.hub.uploads:
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise Refusal(400, f"Can't do {key} of {value['path']}")
        pull = self.query.get("create_pr") == ["1"]
        if not pull and revision not in repository.refs:
            raise Refusal(400, "Can only commit to a branch")
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        said = (header["value"]["summary"], header["value"]["description"])
        oid = repository.commit(f"refs/pr/{number}" if pull else revision, head, *said, files)
        url = f"{self.hub.url}/{repo_id}"
        request = {"pullRequestUrl": f"{url}/discussions/{number}"} if pull else {}
        return {"commitOid": oid, "commitUrl": f"{url}/commit/{oid}", **request}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as trees list it, with git's hash; that of a large one is its LFS pointer's."""
    oid, entry = sha256(content).hexdigest(), {"type": "file", "path": path, "size": len(content)}
    if path.endswith(_LARGE):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()
        entry["lfs"], content = {"oid": oid, "size": len(content), "pointerSize": len(pointer)}, pointer
    return {**entry, "oid": sha1(f"blob {len(content)}\0".encode() + content).hexdigest()}


class _Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.lock = Hub(f"http://127.0.0.1:{self.server_port}"), threading.Lock()


@contextmanager
def hub() -> Generator[Hub]:
    """A Hub without repositories, until the context is left."""
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.hub
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def connected(patches: pytest.MonkeyPatch, folder: Path) -> Generator[Hub]:
    """A Hub that huggingface_hub, imported already, talks to; nothing is cached, nobody is logged in."""
    with hub() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(folder / "hub"),
            "HF_TOKEN_PATH": str(folder / "token"),
        }.items():
            patches.setattr(huggingface_hub.constants, name, value)
        # Functions such as huggingface_hub.file_exists are methods of an object that is older than this test.
        patches.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patches.delenv(name, raising=False)
        patches.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()
        yield server
    huggingface_hub.close_session()
