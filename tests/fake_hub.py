"""A Hugging Face Hub and a web server in one process: what huggingface_hub and datasets ask for."""

import hashlib
import json
import re
import threading
import time
from base64 import b64decode
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS = (".safetensors", ".png")
TOKEN = "hf_secretofthetests"


class FakeHub:
    """Its repos, and what it was asked; `faults` are statuses that the next requests get instead.

    Datasets are repos by the name datasets/user/name; `web` has other files, by their path.
    """

    def __init__(self):
        self.repos = {}  # id -> namespace with private and branches: {name: [commits]}
        self.objects = {}  # of LFS, by sha256
        self.namespaces = {"user"}
        self.role = "write"
        self.token = TOKEN
        self.asked = []  # "METHOD path"
        self.faults = []  # (part of the path, status) of requests to come
        # Part of the path -> what is wrong with it: a status, "timeout", "changed" or "moved".
        self.broken = {}
        self.web = {}  # path -> content
        self.dies_after = None  # commits after which nothing is answered any more

    def files(self, repo_id, branch="main"):
        """Contents by path, as at the tip of a branch."""
        return self.repos[repo_id].branches[branch][-1].files

    def commits(self, repo_id, branch="main"):
        """Messages of the commits that were pushed, oldest first."""
        return [commit.message for commit in self.repos[repo_id].branches[branch][1:]]

    @property
    def is_dead(self):
        made = sum(len(b) - 1 for repo in self.repos.values() for b in repo.branches.values())
        return self.dies_after is not None and made >= self.dies_after

    def commit(self, repo_id, branch, files, message):
        """Put a commit on a branch."""
        parents = self.repos[repo_id].branches[branch]
        text = f"{parents[-1].sha if parents else ''}{message}{len(parents)}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        parents.append(SimpleNamespace(sha=sha, files=files, message=message))
        return sha

    def create(self, repo_id, private=False, files=None):
        self.repos[repo_id] = SimpleNamespace(private=private, branches={"main": []})
        self.commit(repo_id, "main", {".gitattributes": b""} | (files or {}), "initial commit")

    def tip(self, repo_id, revision):
        """The commit that a branch or sha names."""
        branches = self.repos[repo_id].branches
        if revision in branches:
            return branches[revision][-1]
        return next(c for commits in branches.values() for c in commits if c.sha == revision)


@contextmanager
def serve():
    """A FakeHub on a port of 127.0.0.1, its address in `.url`."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def oid(path, content):
    """What the Hub compares: sha256 of an LFS file, git's hash of another."""
    if path.endswith(LFS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def described(path, content):
    """One file of a repo's tree."""
    return {"type": "file", "path": path, "size": len(content), "oid": oid(path, content)}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_any(self):
        self.cut = False
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/agent-harnesses":  # asked by the client's start, in some environments
            return self.answer({}, 404)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.is_dead:
            self.close_connection = True
            return
        for i, (part, status) in enumerate(self.hub.faults):
            if part in path:
                del self.hub.faults[i]
                return self.answer({"error": "as the test wants it"}, status)
        for part, fault in self.hub.broken.items():
            if part in path:
                return self.break_off(part, fault, path)
        return self.dispatch(path)

    def break_off(self, part, fault, path):
        """Answers a request for something that is broken."""
        if fault == "timeout":
            time.sleep(2)
            self.close_connection = True
            return None
        if fault == "moved":
            if part in self.hub.repos or f"datasets/{part}" in self.hub.repos:
                kind = "datasets/" if f"datasets/{part}" in self.hub.repos else ""
                self.hub.repos[f"{kind}moved/repo"] = self.hub.repos[kind + part]
            if path in self.hub.web:
                self.hub.web[path.replace(part, "moved/repo")] = self.hub.web[path]
            return self.answer({}, 307, Location=self.path.replace(part, "moved/repo"))
        if fault == "changed":
            self.cut = self.command == "GET"  # what is answered lacks its last bytes
            return self.dispatch(path)
        code = {404: "RepoNotFound", 403: "GatedRepo"}.get(fault, "")
        return self.answer({"error": "as the test wants it"}, fault, X_Error_Code=code)

    def dispatch(self, path):
        if path in self.hub.web:
            return self.answer(self.hub.web[path])
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in (self.command, "ANY"):
                return action(self, *match.groups())
        return self.answer({"error": "Not found"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def answer(self, content, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        data = data[:-7] if self.cut and isinstance(content, bytes) else data
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def may_write(self):
        """Whether the request's token may write; otherwise the refusal is sent."""
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.hub.role == "read":
            self.answer({"error": "You need a token with write access."}, 403)
        else:
            return True
        return False

    def missing(self, kind="Repo"):
        self.answer({"error": f"{kind} not found"}, 404, X_Error_Code=f"{kind}NotFound")

    def whoami(self):
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        return self.answer({"name": "user", "auth": {"accessToken": {"role": self.hub.role}}})

    def create_repo(self):
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        if not self.may_write():
            return None
        if wanted["organization"] not in self.hub.namespaces:
            return self.answer({"error": "Not found"}, 404)
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            return self.answer({"error": "You already created this repo", "url": url}, 409)
        self.hub.create(repo_id, wanted.get("visibility") == "private")
        return self.answer({"url": url})

    def create_branch(self, repo_id, branch):
        branches = self.hub.repos[repo_id].branches
        if branch in branches:
            return self.answer({"error": "Reference already exists"}, 409)
        branches[branch] = branches["main"][-1:]
        return self.answer({})

    def model_info(self, repo_id, revision):
        if repo_id not in self.hub.repos:
            return self.missing()
        commit = self.hub.tip(repo_id, revision or "main")
        siblings = [{"rfilename": name, "size": len(data)} for name, data in commit.files.items()]
        private = self.hub.repos[repo_id].private
        name = repo_id.removeprefix("datasets/")
        info = {"id": name, "sha": commit.sha, "private": private, "siblings": siblings}
        return self.answer(info)

    def tree(self, repo_id, revision, folder):
        """All files below a folder; the client asks for them level by level, too."""
        if repo_id not in self.hub.repos:
            return self.missing()
        query = parse_qs(urlsplit(self.path).query)
        deep = query.get("recursive", ["false"])[0].lower() == "true"
        entries, prefix = {}, f"{folder}/" if folder else ""
        for path, data in self.hub.tip(repo_id, revision).files.items():
            if not path.startswith(prefix):
                continue
            here, slash, _ = path.removeprefix(prefix).partition("/")
            if slash and not deep:
                entries[here] = {"type": "directory", "path": prefix + here, "oid": "0" * 40}
            else:
                entries[path] = described(path, data)
        if not entries:
            return self.missing("Entry")
        return self.answer(list(entries.values()))

    def paths_info(self, repo_id, revision):
        if repo_id not in self.hub.repos:
            return self.missing()
        files = self.hub.tip(repo_id, revision).files
        wanted = parse_qs(self.body.decode()).get("paths", [])
        found = [described(path, files[path]) for path in wanted if path in files]
        folders = {w for w in wanted for path in files if path.startswith(f"{w}/")}
        found += [{"type": "directory", "path": w, "oid": "0" * 40} for w in folders]
        return self.answer(found)

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        metadata = yaml.safe_load(content.split("---")[1])
        known = isinstance(metadata.get("tags", []), list)
        return self.answer({"errors": [], "warnings": []}, 200 if known else 400)

    def preupload(self, repo_id, revision):
        if not self.may_write():
            return None
        files = self.hub.tip(repo_id, revision).files
        described = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS) else "regular"
            known = oid(path, files[path]) if path in files else None
            described.append(
                {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known}
            )
        return self.answer({"files": described})

    def lfs_batch(self, _):
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            if wanted["oid"] not in self.hub.objects:
                verify = {"href": f"{self.hub.url}/lfs-verify"}
                upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}
                wanted["actions"] = {"upload": upload, "verify": verify}
            objects.append(wanted)
        return self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, name):
        if hashlib.sha256(self.body).hexdigest() != name:
            return self.answer({"error": "wrong hash"}, 400)
        self.hub.objects[name] = self.body
        return self.answer({})

    def lfs_verify(self):
        wanted = json.loads(self.body)
        return self.answer({}, 200 if wanted["oid"] in self.hub.objects else 404)

    def commit(self, repo_id, branch):
        if not self.may_write():
            return None
        header, *changes = [json.loads(line) for line in self.body.splitlines()]
        tip = self.hub.tip(repo_id, branch)
        if header["value"].get("parentCommit", tip.sha) != tip.sha:
            return self.answer({"error": "A commit has happened since."}, 412)
        files = dict(tip.files)
        for change in changes:
            value = change["value"]
            is_lfs = change["key"] == "lfsFile"
            content = self.hub.objects[value["oid"]] if is_lfs else b64decode(value["content"])
            files[value["path"]] = content
        sha = self.hub.commit(repo_id, branch, files, header["value"]["summary"])
        url = f"{self.hub.url}/{repo_id}/commit/{sha}"
        return self.answer({"commitUrl": url, "commitOid": sha})

    def resolve(self, repo_id, revision, path):
        if repo_id not in self.hub.repos:
            return self.missing()
        commit = self.hub.tip(repo_id, revision)
        if path not in commit.files:
            return self.missing("Entry")
        content = commit.files[path]
        tag = f'"{oid(path, content)}"'
        return self.answer(content, ETag=tag, X_Repo_Commit=commit.sha)


_REPO = r"(\w[\w.-]*/\w[\w.-]*?)"
_ANY = r"((?:datasets/)?\w[\w.-]*/\w[\w.-]*?)"
_ROUTES = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", f"/api/(?:models/)?{_ANY}(?:/revision/(.+))?", _Handler.model_info),
    ("GET", f"/api/(?:models/)?{_ANY}/tree/([^/]+)/?(.*)", _Handler.tree),
    ("POST", f"/api/(?:models/)?{_ANY}/paths-info/(.+)", _Handler.paths_info),
    ("POST", f"/api/models/{_REPO}/branch/(.+)", _Handler.create_branch),
    ("POST", f"/api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    ("POST", f"/api/models/{_REPO}/commit/(.+)", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(.+)", _Handler.lfs_upload),
    ("POST", "/lfs-verify", _Handler.lfs_verify),
    ("ANY", f"/{_ANY}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
