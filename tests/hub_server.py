"""A small HTTP server of the Hugging Face Hub's protocol, which can be told to fail."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, Iterator, List, Optional
from urllib.parse import unquote

import yaml
from huggingface_hub import ModelCard


class Hub:
    """The repositories of a server and what it is asked.

    Attributes:
        url: Its address, for HF_ENDPOINT.
        repositories: Commits by name, each a (sha, files) pair, oldest first.
        requests: Method and path of every request.
        failures: Status codes to answer the next requests for files (GET) with, by path ending.
        cut: Bytes of a file after which to cut the connection, once, by path ending.
    """

    def __init__(self) -> None:
        self.repositories: Dict[str, List[Any]] = {}
        self.blobs: Dict[str, bytes] = {}
        self.requests: List[str] = []
        self.failures: Dict[str, List[int]] = {}
        self.cut: Dict[str, int] = {}
        self.url = ''

    def commit(self, repo: str, files: Dict[str, Optional[bytes]]) -> str:
        """Add a commit that changes these files, None deletes one; returns its sha."""
        commits = self.repositories.setdefault(repo, [('0' * 40, {})])
        content = {k: v for k, v in {**commits[-1][1], **files}.items() if v is not None}
        parts = [commits[-1][0], *(f'{k}{hashlib.sha1(v).hexdigest()}' for k, v in sorted(content.items()))]
        commits.append((hashlib.sha1(''.join(parts).encode()).hexdigest(), content))
        return commits[-1][0]

    def find(self, repo: str, revision: str) -> Optional[Any]:
        commits = self.repositories[repo]
        return commits[-1] if revision == 'main' else next((c for c in commits if c[0] == revision), None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        headers.setdefault('Content_Length', str(len(data)))
        headers.setdefault('Content_Type', 'application/json' if not isinstance(body, bytes) else 'binary/octet-stream')
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {'error': message}, X_Error_Code=code, X_Error_Message=message)

    def find(self, repo: str, revision: str) -> Any:
        """A commit; (None, None) after the answer that there is none."""
        if repo not in self.hub.repositories:
            self.refuse(401, 'RepoNotFound', 'Repository not found')
        elif commit := self.hub.find(repo, revision):
            return commit
        else:
            self.refuse(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return None, None

    def body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') == 'chunked':
            data = b''
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get('Content-Length', 0)))

    def handle_any(self) -> None:
        path = unquote(self.path.partition('?')[0])
        self.hub.requests.append(f'{self.command} {path}')
        for pattern, method in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.methods:
                method(self, *match.groups())
                return
        self.refuse(404, 'NotFound', f'no route {self.command} {path}')

    do_GET = do_HEAD = do_POST = do_PUT = handle_any


_ROUTES: List[Any] = []


def route(pattern: str, *methods: str) -> Any:
    def register(method: Any) -> Any:
        method.methods = methods
        _ROUTES.append((pattern, method))
        return method

    return register


_REPO = r'([\w.-]+/[\w.-]+)'


@route(rf'/{_REPO}/resolve/([^/]+)/(.+)', 'GET', 'HEAD')
def resolve(self: _Handler, repo: str, revision: str, path: str) -> None:
    hub = self.hub
    for ending, codes in hub.failures.items():
        if self.command == 'GET' and path.endswith(ending) and codes:
            self.refuse(codes.pop(0), 'ServerError', 'out of order')
            return
    sha, files = self.find(repo, revision)
    if sha is None:
        return
    if path not in files:
        self.answer(404, {'error': 'Entry not found'}, X_Error_Code='EntryNotFound', X_Repo_Commit=sha)
        return
    data = files[path]
    etag = f'"{hashlib.sha256(data).hexdigest()}"'
    headers = dict(ETag=etag, X_Repo_Commit=sha, Accept_Ranges='bytes', X_Linked_Size=str(len(data)))
    start = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
    if start:
        first, last = int(start[1]), min(int(start[2] or len(data)), len(data) - 1)
        headers['Content_Range'] = f'bytes {first}-{last}/{len(data)}'
        self.answer(206, data[first : last + 1], **headers)
        return
    for ending in [ending for ending in hub.cut if self.command == 'GET' and path.endswith(ending)]:
        size = hub.cut.pop(ending)
        self.send_response(200)
        for name, value in {**headers, 'Content_Length': str(len(data))}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        self.wfile.write(data[:size])
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)
        return
    self.answer(200, data, **headers)


@route(rf'/api/models/{_REPO}(?:/revision/([^/]+))?', 'GET')
def model_info(self: _Handler, repo: str, revision: Optional[str]) -> None:
    sha, files = self.find(repo, revision or 'main')
    if sha is not None:
        siblings = [{'rfilename': name, 'size': len(data)} for name, data in files.items()]
        self.answer(200, {'_id': '0', 'id': repo, 'sha': sha, 'siblings': siblings, 'tags': [], 'private': False})


@route(rf'/api/models/{_REPO}/tree/([^/]+)', 'GET')
def tree(self: _Handler, repo: str, revision: str) -> None:
    sha, files = self.find(repo, revision)
    if sha is not None:
        entries = [
            {'type': 'file', 'path': name, 'size': len(data), 'oid': hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        self.answer(200, entries, X_Repo_Commit=sha)


@route('/api/repos/create', 'POST')
def create_repo(self: _Handler) -> None:
    content = json.loads(self.body())
    name = f'{content.get("organization") or "user"}/{content["name"]}'
    status = 409 if name in self.hub.repositories else 200
    self.hub.repositories.setdefault(name, [('0' * 40, {})])
    self.answer(status, {'url': f'{self.hub.url}/{name}', 'name': name, 'id': '0'})


@route('/api/whoami-v2', 'GET')
def whoami(self: _Handler) -> None:
    self.answer(200, {'type': 'user', 'name': 'user', 'orgs': [], 'auth': {'accessToken': {'role': 'write'}}})


@route('/api/validate-yaml', 'POST')
def validate_yaml(self: _Handler) -> None:
    """As far as huggingface_hub itself can tell: the metadata must be read as a card."""
    try:
        ModelCard(json.loads(self.body())['content'])
    except (TypeError, ValueError, KeyError, yaml.YAMLError) as error:
        self.answer(400, {'errors': [{'message': str(error)}], 'warnings': []})
        return
    self.answer(200, {'errors': [], 'warnings': []})


@route(rf'/api/models/{_REPO}/preupload/([^/]+)', 'POST')
def preupload(self: _Handler, _: str, __: str) -> None:
    paths = [file['path'] for file in json.loads(self.body())['files']]
    modes = {path: 'lfs' if path.endswith('.safetensors') else 'regular' for path in paths}
    files = [{'path': path, 'uploadMode': mode, 'shouldIgnore': False} for path, mode in modes.items()]
    self.answer(200, {'files': files})


@route(rf'/{_REPO}\.git/info/lfs/objects/batch', 'POST')
def lfs_batch(self: _Handler, _: str) -> None:
    objects = [
        {**item, 'actions': {'upload': {'href': f'{self.hub.url}/upload/{item["oid"]}', 'header': {}}}}
        for item in json.loads(self.body())['objects']
    ]
    self.answer(200, {'transfer': 'basic', 'objects': objects})


@route(r'/upload/(\w+)', 'PUT')
def upload(self: _Handler, oid: str) -> None:
    data = self.body()
    if hashlib.sha256(data).hexdigest() != oid:
        self.refuse(400, 'BadUpload', 'not the bytes that were announced')
        return
    self.hub.blobs[oid] = data
    self.answer(200)


@route(rf'/api/models/{_REPO}/commit/([^/]+)', 'POST')
def commit(self: _Handler, repo: str, _: str) -> None:
    files: Dict[str, Optional[bytes]] = {}
    for line in self.body().splitlines():
        item = json.loads(line)
        value = item['value']
        if item['key'] == 'file':
            files[value['path']] = base64.b64decode(value['content'])
        elif item['key'] == 'lfsFile':
            files[value['path']] = self.hub.blobs[value['oid']]
        elif item['key'] == 'deletedFile':
            files[value['path']] = None
    sha = self.hub.commit(repo, files)
    self.answer(200, {'success': True, 'commitOid': sha, 'commitUrl': f'{self.hub.url}/{repo}/commit/{sha}'})


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Run a server on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': hub}))
    server.daemon_threads = True
    hub.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
