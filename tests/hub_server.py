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


class Hub:
    """The repositories of a server and what it is asked."""

    def __init__(self) -> None:
        self.url = ''  # its address, for HF_ENDPOINT
        self.repositories: Dict[str, List[Any]] = {}  # commits by name, each a (sha, files) pair, oldest first
        self.requests: List[str] = []  # method and path of each
        self.failures: Dict[str, List[int]] = {}  # status codes to answer the next GETs of files with, by NAME/PATH
        self.cut: Dict[str, int] = {}  # bytes of a file after which to cut the connection, once, by NAME/PATH

    def commit(self, repo: str, files: Dict[str, Optional[bytes]]) -> str:
        """Add a commit that changes these files, None deletes one; returns its sha."""
        commits = self.repositories.setdefault(repo, [('0' * 40, {})])
        content = {k: v for k, v in {**commits[-1][1], **files}.items() if v is not None}
        commits.append((f'{len(commits):040x}', content))
        return commits[-1][0]

    def find(self, repo: str, revision: str) -> Optional[Any]:
        commits = self.repositories[repo]
        return commits[-1] if revision == 'main' else next((c for c in commits if c[0] == revision), None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def start(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {'Content_Length': str(length), **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()

    def answer(self, status: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = 'binary/octet-stream' if isinstance(body, bytes) else 'application/json'
        self.start(status, len(data), Content_Type=kind, **headers)
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
        return self.rfile.read(int(self.headers.get('Content-Length', 0)))

    def handle_any(self) -> None:
        path = unquote(self.path.partition('?')[0])
        self.hub.requests.append(f'{self.command} {path}')
        for pattern, method in _ROUTES.items():
            if match := re.fullmatch(pattern, f'{self.command} {path}'):
                return method(self, *match.groups())
        self.refuse(404, 'NotFound', f'no route {self.command} {path}')

    do_GET = do_HEAD = do_POST = handle_any

    def resolve(self, repo: str, revision: str, path: str) -> None:
        name = f'{repo.partition("/")[2]}/{path}'
        if self.command == 'GET' and self.hub.failures.get(name):
            return self.refuse(self.hub.failures[name].pop(0), 'ServerError', 'out of order')
        sha, files = self.find(repo, revision)
        if sha is None:
            return
        if path not in files:
            return self.answer(404, {'error': 'Entry not found'}, X_Error_Code='EntryNotFound', X_Repo_Commit=sha)
        data = files[path]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = dict(ETag=etag, X_Repo_Commit=sha, Accept_Ranges='bytes', X_Linked_Size=str(len(data)))
        if start := re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', '')):
            first, last = int(start[1]), min(int(start[2] or len(data)), len(data) - 1)
            headers['Content_Range'] = f'bytes {first}-{last}/{len(data)}'
            return self.answer(206, data[first : last + 1], **headers)
        if self.command == 'GET' and name in self.hub.cut:
            self.start(200, len(data), **headers)
            self.wfile.write(data[: self.hub.cut.pop(name)])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(2)
        self.answer(200, data, **headers)

    def model_info(self, repo: str, revision: Optional[str]) -> None:
        sha, files = self.find(repo, revision or 'main')
        if sha is not None:
            siblings = [{'rfilename': name, 'size': len(data)} for name, data in files.items()]
            self.answer(200, {'_id': '0', 'id': repo, 'sha': sha, 'siblings': siblings, 'tags': [], 'private': False})

    def tree(self, repo: str, revision: str) -> None:
        sha, files = self.find(repo, revision)
        if sha is not None:
            entries = [{'type': 'file', 'path': name, 'size': len(files[name]), 'oid': '0'} for name in files]
            self.answer(200, entries, X_Repo_Commit=sha)

    def create_repo(self) -> None:
        content = json.loads(self.body())
        name = f'{content.get("organization") or "user"}/{content["name"]}'
        status = 409 if name in self.hub.repositories else 200
        self.hub.repositories.setdefault(name, [('0' * 40, {})])
        self.answer(status, {'url': f'{self.hub.url}/{name}', 'name': name, 'id': '0'})

    def validate_yaml(self) -> None:
        self.body()
        self.answer(200, {'errors': [], 'warnings': []})

    def preupload(self, *_: str) -> None:
        """No file is large here: all of them come with the commit."""
        paths = [file['path'] for file in json.loads(self.body())['files']]
        files = [{'path': path, 'uploadMode': 'regular', 'shouldIgnore': False} for path in paths]
        self.answer(200, {'files': files})

    def commit(self, repo: str, _: str) -> None:
        files: Dict[str, Optional[bytes]] = {}
        for item in map(json.loads, self.body().splitlines()):
            if item['key'] in ('file', 'deletedFile'):
                content = item['value'].get('content')
                files[item['value']['path']] = base64.b64decode(content) if item['key'] == 'file' else None
        sha = self.hub.commit(repo, files)
        self.answer(200, {'success': True, 'commitOid': sha, 'commitUrl': f'{self.hub.url}/{repo}/commit/{sha}'})


_REPO = r'([\w.-]+/[\w.-]+)'
_ROUTES = {
    rf'(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)': _Handler.resolve,
    rf'GET /api/models/{_REPO}(?:/revision/([^/]+))?': _Handler.model_info,
    rf'GET /api/models/{_REPO}/tree/([^/]+)': _Handler.tree,
    r'POST /api/repos/create': _Handler.create_repo,
    r'POST /api/validate-yaml': _Handler.validate_yaml,
    rf'POST /api/models/{_REPO}/preupload/([^/]+)': _Handler.preupload,
    rf'POST /api/models/{_REPO}/commit/([^/]+)': _Handler.commit,
}


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
