"""A Hugging Face Hub for tests: the real `huggingface_hub` client creates, pushes, lists and downloads over HTTP.

Model repositories only, kept in memory; large files go through Git LFS, since the Xet protocol needs a second service.
"""

import base64
import json
import re
import threading
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import constants


WRITE_TOKEN, READ_TOKEN = "hf_write", "hf_read"
USER = "user"


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool = False

    @property
    def git_oid(self) -> str:
        content = self.content
        if self.lfs:
            content = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {len(content)}\n".encode()
            )
        return sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def oid(self) -> str:
        """What the client compares its own file with."""
        return sha256(self.content).hexdigest() if self.lfs else self.git_oid


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)
    head: str = ""

    def commit(self, files: dict[str, File], title: str) -> None:
        listing = "".join(f"{path} {file.git_oid}\n" for path, file in sorted(files.items()))
        self.head = sha1(f"{self.head}\n{title}\n{listing}".encode()).hexdigest()
        self.commits[self.head] = files
        self.titles.append(title)

    @property
    def files(self) -> dict[str, File]:
        return self.commits[self.head]


class HubServer:
    """Use as a context manager; `url` is what HF_ENDPOINT is set to.

    Attributes:
        repositories: by name, `user/name`.
        requests: "METHOD /path" of every request, in order.
        broken: requests whose path holds this text are answered with an error 500.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken: str | None = None
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        # Large files have a host of their own, as on the Hub: the client does not treat it as part of the API.
        self.storage_url = f"http://localhost:{self.http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.http.shutdown()
        self.http.server_close()

    def connect(self, monkeypatch, home: Path, token: str | None = None) -> None:
        """As `environment`, for the client of this process."""
        for name, value in self.environment(home, token).items():
            monkeypatch.setenv(name, value)
        # What the client has read from its environment already.
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(home / "hub"),
            # Without HF_TOKEN, the token of whoever runs the tests must not be found.
            "HF_TOKEN_PATH": str(home / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)

    def create(self, name: str, private: bool = False) -> Repository:
        repository = self.repositories[name] = Repository(private)
        repository.commit({".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}, "initial")
        return repository

    def add_folder(self, name: str, folder: Path, private: bool = False) -> Repository:
        """A repository that somebody pushed the files of `folder` to."""
        repository, files = self.create(name, private), {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            file = File(path.read_bytes(), lfs=path.suffix == ".safetensors")
            files[path.relative_to(folder).as_posix()] = file
            if file.lfs:
                self.objects[file.oid] = file.content
        repository.commit(repository.files | files, "upload")
        return repository

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Environment variables of a process that talks to this Hub and keeps its cache below `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }


class Refusal(Exception):
    """An error of the Hub: status, and the code and message it puts into headers."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    """Answers one request a connection, so that a Hub that has been stopped answers none."""

    hub: HubServer

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args):
        """Keeps the test's output clean."""

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.body = self.read_body()
        self.hub.requests.append(f"{self.command} {path}")
        try:
            if self.hub.broken is not None and self.hub.broken in path:
                raise Refusal(500, message="the server is on fire")
            for methods, pattern, reply in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods.split():
                    reply(self, **match.groupdict())
                    return
            raise Refusal(404, message=f"no such route: {self.command} {path}")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            content = json.dumps({"error": refusal.message}).encode()
            self.send(content, refusal.status, **{name: value for name, value in headers.items() if value})

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, content: bytes = b"", status: int = 200, **headers: str):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value, status: int = 200):
        self.send(json.dumps(value).encode(), status, Content_Type="application/json")

    # Who asks, and what for

    def token(self, needed: str | None = None) -> str | None:
        """The token sent, if any; refuses an unknown one and, where one is `needed`, another."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token not in (None, WRITE_TOKEN, READ_TOKEN):
            raise Refusal(401, message="Invalid credentials in Authorization header")
        if needed is not None and token != needed:
            raise Refusal(403 if token else 401, message=f"this needs the rights of {needed}")
        return token

    def repository(self, name: str, write: bool = False) -> Repository:
        token, repository = self.token(), self.hub.repositories.get(name)
        mine = name.startswith(f"{USER}/") and token is not None
        if repository is None or repository.private and not mine:
            raise Refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        if write and not (mine and token == WRITE_TOKEN):
            raise Refusal(403, message="you may not write to this repository")
        return repository

    def commit(self, name: str, revision: str) -> tuple[str, dict[str, File]]:
        repository = self.repository(name)
        commit = repository.head if revision == "main" else revision
        if commit not in repository.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    # Routes

    def whoami(self):
        if self.token() is None:
            raise Refusal(401, message="Invalid username or password.")
        self.send_json({"type": "user", "name": USER, "orgs": []})

    def create_repository(self):
        asked = json.loads(self.body)
        self.token(WRITE_TOKEN)
        owner, name = asked.get("organization") or USER, asked["name"]
        if owner != USER:
            raise Refusal(403, message=f"you may not create a model repository under {owner}")
        url = f"{self.hub.url}/{owner}/{name}"
        if f"{owner}/{name}" in self.hub.repositories:
            self.send_json({"error": "You already created this model repo", "url": url}, 409)
            return
        self.hub.create(f"{owner}/{name}", asked.get("visibility") == "private")
        self.send_json({"url": url})

    def auth_check(self, name: str, write: str | None):
        self.repository(name, write is not None)
        self.send_json({})

    def info(self, name: str, revision: str | None):
        commit, files = self.commit(name, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(files)]
        private = self.repository(name).private
        self.send_json({"id": name, "modelId": name, "sha": commit, "private": private, "siblings": siblings})

    def tree(self, name: str, revision: str):
        entries = []
        for path, file in sorted(self.commit(name, revision)[1].items()):
            entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.git_oid}
            if file.lfs:
                entry["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 130}
            entries.append(entry)
        self.send_json(entries)

    def validate_yaml(self):
        lines = json.loads(self.body)["content"].split("---\n")
        errors = []
        try:
            metadata = yaml.safe_load(lines[1]) if len(lines) > 2 else None
        except yaml.YAMLError as error:
            metadata, errors = {}, [{"message": str(error)}]
        for base in [(metadata or {}).get("base_model")]:
            if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
                errors.append({"message": f'"base_model" with value "{base}" is not valid. Use a model id.'})
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        self.send_json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def preupload(self, name: str, revision: str):
        self.repository(name, write=True)
        files, answers = self.commit(name, revision)[1], []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            oid = files[path].oid if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send_json({"files": answers})

    def lfs_batch(self, name: str):
        self.repository(name, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.storage_url}/lfs/{asked['oid']}"},
                    "verify": {"href": f"{self.hub.url}/{name}.git/info/lfs/verify"},
                }
            objects.append(answer)
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str):
        if sha256(self.body).hexdigest() != oid:
            raise Refusal(422, message="the content is not that of the object")
        self.hub.objects[oid] = self.body
        self.send()

    def lfs_verify(self, name: str):
        asked = json.loads(self.body)
        self.repository(name, write=True)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, message="no such object")
        self.send_json({})

    def receive_commit(self, name: str, revision: str):
        repository = self.repository(name, write=True)
        parent, files = self.commit(name, revision)
        if parent != repository.head:
            raise Refusal(412, message="commits go to the head of a branch")
        files, title = dict(files), None
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, message=f"{value['path']} points to an object that was not uploaded")
                files[value["path"]] = File(self.hub.objects[value["oid"]], lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, message=f"unknown operation {key}")
        repository.commit(files, title)
        url = f"{self.hub.url}/{name}/commit/{repository.head}"
        self.send_json({"success": True, "commitUrl": url, "commitOid": repository.head})

    def resolve(self, name: str, revision: str, path: str):
        commit, files = self.commit(name, revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        file = files[path]
        if not file.lfs:
            self.send_content(file.content, ETag=f'"{file.oid}"', X_Repo_Commit=commit)
            return
        linked = {"X_Linked_Etag": f'"{file.oid}"', "X_Linked_Size": str(len(file.content))}
        self.send(status=302, Location=f"{self.hub.storage_url}/lfs/{file.oid}", X_Repo_Commit=commit, **linked)

    def lfs_download(self, oid: str):
        self.send_content(self.hub.objects[oid], ETag=f'"{oid}"')

    def send_content(self, content: bytes, **headers: str):
        """All of `content`, or the rest of it that an interrupted download asks for."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            self.send(content, Accept_Ranges="bytes", **headers)
            return
        start, end = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
        if start >= len(content):
            self.send(b"", 416, Content_Range=f"bytes */{len(content)}")
            return
        self.send(content[start : end + 1], 206, Content_Range=f"bytes {start}-{end}/{len(content)}", **headers)


NAME = r"(?P<name>[^/]+/[^/]+?)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create_repository),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"/api/models/{NAME}(/revision/(?P<revision>.+))?", Handler.info),
    ("GET", rf"/api/models/{NAME}/auth-check(?P<write>/write)?", Handler.auth_check),
    ("GET", rf"/api/models/{NAME}/tree/(?P<revision>[^/]+)", Handler.tree),
    ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", rf"/api/models/{NAME}/commit/(?P<revision>.+)", Handler.receive_commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", rf"/{NAME}\.git/info/lfs/verify", Handler.lfs_verify),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_upload),
    ("GET HEAD", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_download),
    ("GET HEAD", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
