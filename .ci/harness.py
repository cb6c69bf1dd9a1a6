"""The harness of the tests and proofs: a stand-in for the sites, the real program as a process, its clients.

    Standin, SiteRoute, Post       TikTok, Instagram, their CDNs and any direct origin, on 127.0.0.1
    Daemon, Client                 the program in a folder of its own, and a phone that trusts its CA only
    Index, Swift, Relay, Listener, Nginx, Browser      the others that the program has to do with
    DaemonTest, DownloadTest, WithBucket, PageTest …   the surroundings of a class of tests, without a test
    browser_host, slowest, TRAPS, SHARED, SUITE …      what the tests judge by, and with which texts
    Classes                        runs the classes of tests in processes of their own, several at a time

test_videoserverd.py and the scripts beside this file import it; it holds no test.
"""
import _socket
import ast
import atexit
import base64
import collections
import contextlib
import dis
import functools
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import logging
import os
import py_compile
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import unittest
import unittest.mock
import uuid
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple
from urllib.parse import parse_qs, quote, urlsplit

import videoserverd as v

HERE = Path(v.__file__).absolute().parent
LIBRESSL = re.match(r'LibreSSL ([\d.]+)', ssl.OPENSSL_VERSION)  # a Mac's own Python has it
logging.getLogger('videoserverd').addHandler(logging.NullHandler())  # what it says in this process is not shown
RUN = Path(tempfile.mkdtemp(prefix='videoserverd-test-'))  # everything of this run; removed at its end
atexit.register(shutil.rmtree, RUN, ignore_errors=True)
CONNECTED: List[Tuple[str, int]] = []  # where anything in this process has connected to, past the guard
v.watch_process()
sys.addaudithook(lambda event, args: CONNECTED.append(args[1][:2]) if event == 'socket.connect' else None)


def fair(seconds: float) -> float:
    """`seconds` for a machine with nothing else to do; more in proportion for one with more to do than cores.

    The load average takes a minute to tell; how long something had to wait for a core in the last 10 s, at once."""
    waiting = 0.0
    with contextlib.suppress(OSError):  # Linux only
        waiting = float(re.search(r'some avg10=([\d.]+)', Path('/proc/pressure/cpu').read_text())[1]) / 100
    seconds *= float(os.environ.get('SLOWER', 1))  # an emulated processor
    return seconds * min(max(1.0, 1.5 * os.getloadavg()[0] / (os.cpu_count() or 1), 5 * waiting), 5.0)


@contextlib.contextmanager
def in_time(seconds: float) -> Any:
    """AssertionError if what is inside takes longer than fair(seconds)."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < fair(seconds), f'it took {took:.2f} s, and not {seconds}'


def wait_until(happens: Callable[[], Any], seconds: float = 10, what: Any = '') -> Any:
    """The first true value of happens(); AssertionError after fair(seconds), telling `what`.

    It is asked often in the beginning and every 0.1 s later: asking costs the daemon time as well."""
    began = time.monotonic()
    while True:
        value, waited = happens(), time.monotonic() - began
        if value:
            return value
        if waited > fair(seconds):
            raise AssertionError(f'not within {seconds} s: {what() if callable(what) else what or happens}')
        time.sleep(min(0.1, 0.01 + waited / 10))


# ---------- the program -------------------------------------------------------------------
# The real program as a process of its own, in a folder of its own, on a port that it takes itself;
# and a client over real TLS that trusts our CA only.
#
#     class TestIt(DaemonTest):                              # self.site, self.daemon: shared by the class
#         settings = {'downloads': {'max_concurrent': 2}}    # [section] key = value of its config.ini
#         def test_it(self):
#             id = self.daemon.submit(self.site.tiktok())    # 202, or it fails
#             row = self.daemon.wait_status(id, 'completed')
#             status, headers, body = self.daemon.client.get('/api/v1/health')
#             other = self.new_daemon(security=ANYWHERE, env={'VIDEOSERVER_API_KEYS': 'k'}); other.kill(); other.start()

ANYWHERE = {'allowed_domains': '*', 'allow_private_targets': 'on'}  # [security] for direct links to 127.0.0.1
BASE_SETTINGS = {
    'server': {'host': '127.0.0.1', 'port': '0'},
    'database': {'backups': '0'},
    'downloads': {'output_directory': 'out', 'retry_delays': '0', 'min_free_space': '1MB'},
    'downloader': {'ytdlp_directory': str(HERE / 'vendor'), 'auto_update': 'off', 'page_pace': ''},
    'security': {'requests_per_hour': '0'},
}
OWN_VARIABLES = ('VIDEOSERVER_', 'PRT_', 'AWS_', 'SSL_CERT_', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY', 'NO_PROXY',
                 'PYTHONPATH', 'NO_COLOR', 'BASH_FUNC_', 'NOTIFY_SOCKET', 'INVOCATION_ID', 'JOURNAL_STREAM')


def only_python() -> None:
    """Leaves only Python itself on this process's path, as yt-dlp finds it in a server (v.bare_python)."""
    home, archive = os.path.dirname(os.__file__), 'python{}{}.zip'.format(*sys.version_info)
    sys.path[:] = [entry for entry in sys.path if entry == home or os.path.basename(entry) in ('lib-dynload', archive)]
    sys.meta_path[:] = [finder for finder in sys.meta_path
                        if getattr(finder, '__module__', '').startswith('_frozen_importlib')]
    for name, module in list(sys.modules.items()):
        if re.search('/(?:site|dist)-packages/', getattr(module, '__file__', None) or ''):
            del sys.modules[name]


def import_alone(*args: Any, real: Callable[..., Any] = v.import_ytdlp) -> Any:
    """In place of v.import_ytdlp, for tests that download in their own process."""
    if 'Session' not in v.IMPORTED:
        only_python()
    return real(*args)


vars(v).update(import_ytdlp=import_alone)


def vendored() -> str:
    """The version of yt-dlp in <repo>/vendor, fetched from the index if there is none yet."""
    vendor = v.Vendor(HERE / 'vendor')
    return vendor.version() or vendor.install()


@functools.lru_cache(maxsize=None)
def vendored_curl() -> Path:
    """The folder of curl_cffi beside it, fetched from the index if there is none yet."""
    if sys.version_info < (3, 10):
        raise unittest.SkipTest('Python 3.9 has no curl_cffi that yt-dlp takes')
    vendored()
    vendor = v.Vendor(HERE / 'vendor', impersonate=True)
    with vendor.locked():
        try:
            vendor.curl() or vendor.take_curl()
        except v.BrokenRelease as error:
            raise unittest.SkipTest(str(error)) from None
    return vendor.curl()


@functools.lru_cache(maxsize=None)
def certificates() -> Path:
    """A folder with a CA and a leaf as the program makes them, made once per run and copied to each daemon."""
    folder = RUN / 'certificates'
    folder.mkdir()
    (folder / 'config.ini').write_text('')
    v.ensure_certificate(v.load_config(folder / 'config.ini', {}), time.time())
    return folder / 'certs'


@functools.lru_cache(maxsize=None)
def path_without_ffmpeg() -> str:
    """A PATH on which there is openssl, but no ffmpeg."""
    folder = RUN / 'no-ffmpeg'
    folder.mkdir()
    for name in ('openssl', 'sh', 'ip', 'hostname', 'uname'):
        if shutil.which(name):
            (folder / name).symlink_to(shutil.which(name))
    return str(folder)


@functools.lru_cache(maxsize=None)
def hurried_program(constants: Tuple[Tuple[str, str], ...]) -> Path:
    """A copy of the program in which these module constants (name, expression) have another value."""
    program = Path(tempfile.mkdtemp(prefix='hurried-', dir=RUN)) / 'videoserverd.py'
    text = (HERE / 'videoserverd.py').read_text(encoding='utf-8')
    for name, value in constants:
        text, times = re.subn(f'(?m)^{name} = [^#\n]*', f'{name} = {value}  ', text)
        assert times == 1, name
    program.write_text(text, encoding='utf-8')
    py_compile.compile(str(program), doraise=True)
    return program


@functools.lru_cache(maxsize=None)
def judge() -> str:
    """The command of OpenSSL: LibreSSL's, a Mac's own, knows too little to judge by. Skips where there is none."""
    for folder in (*os.get_exec_path(), '/opt/homebrew/bin', '/usr/local/bin'):
        file = shutil.which('openssl', path=folder)
        if file and subprocess.check_output([file, 'version']).startswith(b'OpenSSL'):
            return file
    raise unittest.SkipTest('the openssl command of OpenSSL is not installed')


def trusting(ca: Path) -> ssl.SSLContext:
    """A client's context. LibreSSL before 3.2.2 refuses our CA's addresses, and trusts the leaf beside it instead."""
    if LIBRESSL and [*map(int, LIBRESSL[1].split('.'))] < [3, 2, 2] and ca.with_name('server.crt').exists():
        context = ssl.create_default_context(cafile=str(ca.with_name('server.crt')))
        context.verify_flags |= v.PARTIAL_CHAIN
        return context
    return ssl.create_default_context(cafile=str(ca))


def new_folder() -> Path:
    """An empty folder, which goes with RUN."""
    return Path(tempfile.mkdtemp(dir=RUN))


def ran(line: Any, **options: Any) -> Any:
    """Runs a command; .returncode, .stdout (both channels)."""
    return subprocess.run(line, encoding='utf-8', **{'stdin': subprocess.DEVNULL, 'stdout': subprocess.PIPE,
                                                     'stderr': subprocess.STDOUT, **options})


def new_program(file: Path, text: str) -> Path:
    """A shell script that can be run."""
    file.write_text(f'#!/bin/sh\n{text}\n')
    file.chmod(0o755)
    return file


def patched(test: Any, patch: Any) -> None:
    """Patches until the end of the test, or of the class."""
    patch.start()
    (test.addClassCleanup if isinstance(test, type) else test.addCleanup)(patch.stop)


def open_store(test: unittest.TestCase, file: Optional[Path] = None, **outgoing: List[str]) -> Any:
    """A Store until the end of the test."""
    store = v.Store(file or new_folder() / 'd.db')
    store.outgoing.update(outgoing)
    store.open()
    test.addCleanup(store.close)
    return store


def own_config(**settings: Any) -> Any:
    """A configuration with a database and an output folder of its own; downloads_keep='9d' sets a key."""
    folder = new_folder()
    settings = {'database_path': folder / 'd.db', 'downloads_output_directory': folder / 'out', **settings}
    return v.load_config(None, {f'VIDEOSERVER_{name.upper()}': str(value) for name, value in settings.items()})


def change_database(file: Path, statement: str, rows: Sequence[Sequence[Any]] = ((),)) -> None:
    """Executes and commits, past the program."""
    with contextlib.closing(sqlite3.connect(str(file))) as db, db:
        db.executemany(statement, rows)


def reserved(port: int = 0) -> socket.socket:
    """Keeps a port of the loopback: nobody listens at it, nobody is given it, a daemon may be told to take it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(('' if sys.platform == 'darwin' else '127.0.0.1', port))  # there not at the address of the daemon
    return sock


def clean_environment() -> Dict[str, str]:
    """This environment without what configures the daemon, yt-dlp or Python."""
    return {name: text for name, text in os.environ.items() if not name.upper().startswith(OWN_VARIABLES)}


def files_below(folder: Path) -> Dict[Path, int]:
    """Every file under `folder` and its size. One that goes between being listed and looked at is not there."""
    found = {}
    for parent, _, names in os.walk(folder):  # unlike rglob it bears folders that vanish as well
        for path in (Path(parent, name) for name in names):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                found[path] = path.stat().st_size
    return dict(sorted(found.items()))


class LocalServer(ThreadingHTTPServer):
    """A server on 127.0.0.1 that runs as soon as it is made."""
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: Any, test: Optional[unittest.TestCase] = None):
        super().__init__(('127.0.0.1', 0), handler)
        self.url = f'http://127.0.0.1:{self.server_port}'
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        if test:
            test.addCleanup(self.end)

    def end(self) -> None:
        self.shutdown()
        self.server_close()


class QuietHandler(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def reply(self, status: int, body: bytes = b'', kind: str = 'text/html') -> None:
        self.send_response(status)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # a client that was killed
            self.wfile.write(body)


class Answer(NamedTuple):
    """An answer; `json` is the parsed body, or the bytes of one that is not JSON."""
    status: int
    headers: Any
    json: Any


class Client:
    """A phone: HTTPS with only our CA trusted. A connection per request, or one kept alive."""

    def __init__(self, port: int, ca: Optional[Path], key: str = '', keep_alive: bool = False, host: str = '127.0.0.1',
                 timeout: float = 20, source: str = ''):
        self.options = {'timeout': timeout, 'source_address': (source, 0) if source else None}
        self.port, self.host, self.key, self.keep_alive, self.timeout = port, host, key, keep_alive, timeout
        self.context = trusting(ca) if ca else None
        self.kept: Any = None

    def connection(self) -> Any:
        if not self.context:
            return http.client.HTTPConnection(self.host, self.port, **self.options)
        return http.client.HTTPSConnection(self.host, self.port, context=self.context, **self.options)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """One request; a body that is not bytes goes as JSON; headers: X_Forwarded_For='…'."""
        fields = {'X-API-Key': self.key} if self.key else {}
        if body is not None and not isinstance(body, bytes):
            body, fields['Content-Type'] = json.dumps(body).encode(), 'application/json'
        fields.update({name.replace('_', '-'): text for name, text in headers.items()})
        link = self.kept or self.connection()
        self.kept = None
        try:
            link.request(method, path, body, fields)
            reply = link.getresponse()
            data = reply.read()
        except BaseException:
            link.close()
            raise
        if self.keep_alive and not reply.will_close:
            self.kept = link
        else:
            link.close()
        is_json = reply.headers.get_content_type() == 'application/json' and data
        return Answer(reply.status, reply.headers, json.loads(data) if is_json else data)

    def get(self, path: str, **headers: str) -> Answer:
        return self.request('GET', path, None, **headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Answer:
        return self.request('POST', path, body, **headers)

    def delete(self, path: str, **headers: str) -> Answer:
        return self.request('DELETE', path, None, **headers)

    def socket(self) -> socket.socket:
        """A connected TLS socket (plain without a CA) to say on it what no library would."""
        plain = socket.create_connection((self.host, self.port), self.timeout)
        return self.context.wrap_socket(plain, server_hostname=self.host) if self.context else plain

    def raw(self, data: bytes, seconds: float = 5) -> bytes:
        """Sends `data` as it is; what comes back until the server closes or says nothing for `seconds`."""
        answer = b''
        with self.socket() as link, contextlib.suppress(OSError):
            link.settimeout(fair(seconds))
            link.sendall(data)
            while True:
                piece = link.recv(1 << 16)
                if not piece:
                    break
                answer += piece
        return answer

    def close(self) -> None:
        if self.kept:
            self.kept.close()
            self.kept = None


def resident(pid: int) -> float:
    """A process's memory that is in RAM, in MB."""
    try:
        return int(re.search(r'VmRSS:\s+(\d+)', Path(f'/proc/{pid}/status').read_text())[1]) / 1024
    except FileNotFoundError:
        return int(subprocess.check_output(['ps', '-o', 'rss=', '-p', str(pid)])) / 1024


class Daemon:
    """`videoserverd.py` as a process. Keyword arguments are sections of its config.ini.

    env: added to a clean environment (None removes). prefix: words before the command line (strace…).
    hurry: constants of the program with the values they have here, so that a test need not wait for minutes.
    start=False: only the folder and its config.ini are made."""
    alive: 'set[Daemon]' = set()

    def __init__(self, site: Any = None, env: Optional[Dict[str, Any]] = None, prefix: Sequence[str] = (),
                 start: bool = True, vendor: bool = True, folder: Optional[Path] = None,
                 hurry: Optional[Dict[str, Any]] = None, **settings: Dict[str, Any]):
        constants = tuple((name, repr(value)) for name, value in (hurry or {}).items())
        self.program = hurried_program(constants) if constants else HERE / 'videoserverd.py'
        self.folder = folder or Path(tempfile.mkdtemp(prefix='daemon-', dir=RUN))
        self.prefix, self.site = list(prefix), site
        self.env = {**clean_environment(), 'HOME': str(self.folder)}
        self.change_env({**({'SSL_CERT_FILE': site.ca_bundle} if site else {}), **(env or {})})
        self.process: Any = None
        self.client: Any = None
        self.poller: Any = None  # asks for the status, on one connection
        self.port, self.exit_code = 0, None
        self.settings = {name: dict(keys) for name, keys in BASE_SETTINGS.items()}
        if site:
            self.settings['downloader']['proxy'] = site.proxy
        self.configure(**settings)
        self.config = v.load_config(self.file, {})
        self.database, self.output = self.config.database.path, self.config.downloads.output_directory
        if not (self.folder / 'certs').exists() and self.config.server.tls:
            shutil.copytree(certificates(), self.folder / 'certs')
        if vendor:
            vendored()
        Daemon.alive.add(self)
        if start:
            self.start()

    # -- its configuration

    @property
    def file(self) -> Path:
        return self.folder / 'config.ini'

    def configure(self, **settings: Dict[str, Any]) -> None:
        """Changes config.ini; it is read at the next start."""
        for name, keys in settings.items():
            self.settings.setdefault(name, {}).update(keys)
        self.file.write_text(''.join(f'[{name}]\n' + ''.join(f'{key} = {text}\n' for key, text in keys.items())
                                     for name, keys in self.settings.items()), encoding='utf-8')

    def change_env(self, env: Dict[str, Any]) -> None:
        """Changes its environment from the next start on; None removes."""
        self.env.update(env)
        self.env = {name: str(text) for name, text in self.env.items() if text is not None}

    # -- its life

    def command_line(self, *words: str) -> List[str]:
        """How it, or one of its commands, is started."""
        return [*self.prefix, sys.executable, str(self.program), '--config', str(self.file), *words]

    def line_behind(self) -> List[str]:
        """What that goes on as: imported. Tests begin there, as what comes before is half of a start."""
        with unittest.mock.patch.object(v, 'PROGRAM', self.program):
            return [*self.prefix, *v.bare_python(v.SERVE, str(self.file))]

    def run(self, *words: str, seconds: float = 30, **options: Any) -> Any:
        """Runs a command (`add URL`, `doctor`…) beside it; .returncode, .stdout (both channels)."""
        script = 'import sys; sys.path[0] = sys.argv.pop(1); sys.exit(__import__("videoserverd").main())'  # no parsing
        line = [sys.executable, '-c', script, str(self.program.parent), '--config', str(self.file), *words]
        return ran([*self.prefix, *line], env=self.env, timeout=fair(seconds), **options)

    def start(self, seconds: float = 20) -> 'Daemon':
        """Starts it and waits until it listens; AssertionError with its log if it does not."""
        self.launch()
        wait_until(self.listens, seconds, lambda: 'the daemon listens; it said:\n' + self.tail())
        if self.poller:
            self.poller.close()
        self.client, self.poller = self.new_client(), self.new_client(keep_alive=True)
        return self

    def launch(self, from_source: bool = False) -> None:
        """Starts it and does not wait."""
        self.exit_code = None
        line, env = self.command_line(), self.env
        if not from_source:
            line, env = self.line_behind(), {'MALLOC_ARENA_MAX': '1', **env}
        with (self.folder / 'console.txt').open('ab') as console:
            self.process = subprocess.Popen(line, env=env, cwd=str(self.folder), stdout=console,
                                            stderr=console, stdin=subprocess.DEVNULL, start_new_session=True)

    def listens(self) -> bool:
        """Does it? Its lock file tells on which port; one of an earlier life does not count."""
        if self.process.poll() is not None:
            raise AssertionError(f'the daemon ended with {self.process.returncode}:\n{self.tail()}')
        try:
            told = json.loads(Path(f'{self.database}.lock').read_text())
            if os.getpgid(told['pid']) != self.process.pid or not told['port']:
                return False
            socket.create_connection(('127.0.0.1', told['port']), 5).close()
        except (OSError, ValueError, KeyError, TypeError):
            return False
        self.pid, self.port = told['pid'], told['port']
        return True

    def new_client(self, **options: Any) -> Client:
        return Client(self.port, self.folder / 'certs/ca.crt' if self.config.server.tls else None, **options)

    def running(self) -> bool:
        return bool(self.process) and self.process.poll() is None

    def wait_exit(self, seconds: float = 10) -> int:
        try:
            self.exit_code = self.process.wait(fair(seconds))
        except subprocess.TimeoutExpired:
            raise AssertionError(f'the daemon runs on after {seconds} s:\n{self.tail()}') from None
        return self.exit_code

    def signal(self, number: int) -> None:
        os.kill(self.pid if self.port else self.process.pid, number)

    def kill(self) -> None:
        """kill -9 of the daemon alone: what it started is its own to take along."""
        self.signal(signal.SIGKILL)
        self.wait_exit()

    def terminate(self, seconds: float = 10) -> float:
        """SIGTERM; how many seconds it took to end."""
        began = time.monotonic()
        self.signal(signal.SIGTERM)
        self.wait_exit(seconds)
        return time.monotonic() - began

    def restart(self) -> 'Daemon':
        if self.running():
            self.terminate()
        return self.start()

    def close(self) -> None:
        Daemon.alive.discard(self)
        if self.poller:
            self.poller.close()
        if self.process:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- what it does

    def submit(self, url: str, **fields: Any) -> str:
        """Posts a link, to be fetched even if it is here; its download_id. AssertionError unless it is queued."""
        status, _, body = self.client.post('/api/v1/download', {
            'url': str(url), 'client_id': 'test', 'again': True, **fields})
        assert status == 202, (status, body)
        return body['download_id']

    def status(self, id: str) -> Dict[str, Any]:
        try:
            status, _, body = self.poller.get(f'/api/v1/status/{id}')
        except (OSError, http.client.HTTPException):  # a kept connection may end at any time
            status, _, body = self.poller.get(f'/api/v1/status/{id}')
        assert status == 200, (status, body)
        return body

    def watch(self, id: str, seconds: float = 30) -> List[Dict[str, Any]]:
        """Every different status row of a download until it is completed or failed."""
        seen: List[Dict[str, Any]] = []

        def ended() -> bool:
            row = self.status(id)
            if not seen or row != seen[-1]:
                seen.append(row)
            return row['status'] in ('completed', 'failed')
        wait_until(ended, seconds, f'{id} ends')
        return seen

    def wait_for(self, id: str, happens: Callable[[Dict[str, Any]], Any], seconds: float = 30) -> Dict[str, Any]:
        """The first status row of which happens(row) is true."""
        last: Dict[str, Any] = {}

        def look() -> bool:
            last.update(self.status(id))
            return bool(happens(last))
        try:
            wait_until(look, seconds)
        except AssertionError:
            raise AssertionError(f'not within {seconds} s; its status is {last}') from None
        return last

    def wait_status(self, id: str, wanted: str, seconds: float = 30) -> Dict[str, Any]:
        """The status row as soon as it is `wanted`; AssertionError at once if it ends as something else."""
        row = self.wait_for(id, lambda row: row['status'] in (wanted, 'completed', 'failed'), seconds)
        if row['status'] != wanted:
            raise AssertionError(f'wanted {wanted}, it is {row}')
        return row

    def download(self, url: str, seconds: float = 30, **fields: Any) -> Dict[str, Any]:
        return self.wait_status(self.submit(url, **fields), 'completed', seconds)

    def fails(self, url: str, seconds: float = 30, **fields: Any) -> Dict[str, Any]:
        return self.wait_status(self.submit(url, **fields), 'failed', seconds)

    def clear(self) -> None:
        """Cancels what has not ended, so that the next test finds free workers."""
        phone = self.new_client(keep_alive=True, key=self.client.key)  # a handshake for each would be most of the work
        for row in self.rows("SELECT id FROM downloads WHERE status IN ('queued', 'downloading')"):
            phone.post(f'/api/v1/download/{row["id"]}/cancel')
        phone.close()

    # -- what it leaves and uses

    def rows(self, query: str = 'SELECT * FROM downloads', *values: Any) -> List[Dict[str, Any]]:
        """A read-only look at its database."""
        with contextlib.closing(sqlite3.connect(f'file:{self.database}?mode=ro', uri=True, timeout=10)) as database:
            database.row_factory = sqlite3.Row
            return [dict(row) for row in database.execute(query, values)]

    def row(self, id: str) -> Dict[str, Any]:
        return self.rows('SELECT * FROM downloads WHERE id = ?', id)[0]

    def files(self) -> List[str]:
        """The names that are visible in its output folder."""
        return sorted(path.name for path in self.output.iterdir() if not path.name.startswith('.'))

    def partials(self, id: str = '') -> Dict[Path, int]:
        """The files under .incomplete (of one download) and their sizes."""
        return {path: size for path, size in files_below(self.output / '.incomplete').items() if id in str(path)}

    def half_way(self, post: Any) -> str:
        """Submits a post that stops at hold_at, and waits until it stands there and a good part is on disk."""
        id, route = self.submit(post), post.media[0]
        route.wait_held()  # of a direct link that yt-dlp looks at first, perhaps only then
        some = route.hold_at // 3  # yt-dlp reads ever larger blocks: the last one is not on disk
        wait_until(lambda: max(self.partials(id).values(), default=0) >= some,
                   what=lambda: f'some of it is on disk, there is {self.partials(id)}')
        return id

    def log(self) -> str:
        found = []
        for path in (self.folder / 'console.txt', self.folder / 'logs/server.log'):
            with contextlib.suppress(FileNotFoundError):  # not begun yet, or just being moved aside
                found.append(path.read_text(errors='replace'))
        return '\n'.join(found)

    def tail(self, lines: int = 40) -> str:
        return '\n'.join(self.log().splitlines()[-lines:])

    def rss(self) -> float:
        """Its resident memory, in MB (Linux: of the daemon alone, not of what it started)."""
        return resident(self.pid)

    def cpu(self) -> float:
        """The seconds of processor time that it has used."""
        fields = Path(f'/proc/{self.pid}/stat').read_text().rpartition(')')[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')

    def threads(self) -> int:
        return len(os.listdir(f'/proc/{self.pid}/task'))

    def descriptors(self) -> List[str]:
        found = []
        for path in Path(f'/proc/{self.pid}/fd').iterdir():
            with contextlib.suppress(OSError):
                found.append(os.readlink(path))
        return found

    def processes(self) -> List[Tuple[int, str]]:
        """(pid, command) of every living process of its session: itself and what it started."""
        found = []
        for entry in Path('/proc').glob('[0-9]*'):
            with contextlib.suppress(OSError):
                name, _, rest = (entry / 'stat').read_text().partition('(')[2].rpartition(')')
                if int(rest.split()[3]) == self.process.pid and rest.split()[0] != 'Z':
                    found.append((int(entry.name), name))
        return found


@atexit.register
def kill_the_living() -> None:
    for daemon in list(Daemon.alive):
        daemon.close()


signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run that is told to end takes its daemons along


class DaemonTest(unittest.TestCase):
    """Tests that share a stand-in and a daemon; what follows is told to the daemon; settings None: no daemon."""
    settings: Optional[Dict[str, Dict[str, Any]]] = {}
    env: Dict[str, Any] = {}
    hurry: Dict[str, Any] = {}

    @classmethod
    def setUpClass(cls) -> None:
        cls.site = Standin()
        cls.addClassCleanup(cls.site.close)
        if cls.settings is not None:
            cls.daemon = Daemon(site=cls.site, env=cls.env, hurry=cls.hurry, **cls.settings)
            cls.addClassCleanup(cls.daemon.close)

    def setUp(self) -> None:
        if self.settings is not None:
            self.addCleanup(self.daemon.clear)
            self.addCleanup(self.report, self.daemon)

    def new_daemon(self, **options: Any) -> Daemon:
        """A daemon of this test's own, killed at its end; arguments as Daemon has them."""
        daemon = Daemon(**{'site': self.site, **options})
        self.addCleanup(daemon.close)
        self.addCleanup(self.report, daemon)
        return daemon

    def report(self, daemon: Daemon) -> None:
        """Shows the end of the daemon's log when the test has failed."""
        outcome = self._outcome  # its `success` is true again while cleanups run; up to Python 3.10 it keeps the errors
        known = (*outcome.result.failures, *outcome.result.errors, *getattr(outcome, 'errors', ()))
        if any(test is self and problem for test, problem in known):
            print(f'\n--- {self.id()}: the daemon said\n{daemon.tail()}\n---', file=sys.stderr)


def same_bytes(daemon: Any, row: Dict[str, Any], *routes: Any) -> None:
    """AssertionError unless the files of a completed row are, in order, what the routes serve."""
    wanted = [hashlib.sha256(route.body).hexdigest() for route in routes]
    found = [hashlib.sha256((daemon.output / file['name']).read_bytes()).hexdigest() for file in row['files']]
    assert found == wanted, row['files']


def probe(file: Path, *words: str) -> str:
    """What ffprobe tells of a file."""
    told = ran(['ffprobe', '-v', 'error', *words, str(file)])
    assert told.returncode == 0, told.stdout
    return told.stdout


def streams(file: Path) -> List[str]:
    """The codecs in an mp4; its magic is right in any case."""
    assert file.read_bytes()[4:8] == b'ftyp', file
    words = '-show_entries', 'stream=codec_name', '-of', 'csv=p=0'
    return sorted(probe(file, *words).split()) if shutil.which('ffprobe') else []


def tiktok_link(number: int) -> str:
    """A link that is taken but leads nowhere: what counts is the row."""
    return f'https://www.tiktok.com/@somebody/video/{number}'


IN_THE_CLEAR = {'server': {'tls': 'off'}}  # so that strace shows the answers


class Strace:
    """strace on a running daemon; `inject` as strace has it: fdatasync:error=EIO. The lines seen are kept."""

    def __init__(self, daemon: Daemon, *inject: str, calls: str = 'fdatasync,fsync,pwrite64,sendto,rename',
                 paths: str = ''):
        self.file = daemon.folder / f'strace-{time.monotonic_ns()}.txt'
        words = [word for rule in inject for word in ('-e', f'inject={rule}')]
        for path in ([Path(paths), *files_below(Path(paths))] if paths else []):
            words += ['-P', str(path)]
        self.process = subprocess.Popen(
            ['strace', '-f', '-y', '-s', '40', '-e', f'trace={calls}', *words, '-o', str(self.file),
             '-p', str(daemon.pid)], stderr=subprocess.PIPE, encoding='utf-8')
        line = 'begins'
        while 'attached' not in line:
            assert line, 'strace ended: is the daemon there?'
            line = self.process.stderr.readline()

    def __enter__(self) -> 'Strace':
        return self

    def __exit__(self, *exc: Any) -> None:
        self.process.terminate()
        self.process.communicate()

    def met(self) -> int:
        """How many calls have failed so far because they were told to."""
        return self.file.read_text(errors='replace').count('(INJECTED)')

    def lines(self) -> List[str]:
        """What the daemon did, call by call; unfinished calls joined with their ends."""
        begun: Dict[str, str] = {}
        whole = []
        for line in self.file.read_text(errors='replace').splitlines():
            thread, _, call = line.partition(' ')
            call = call.strip()
            if call.endswith('<unfinished ...>'):
                begun[thread] = call[:-len('<unfinished ...>')].rstrip()
                continue
            resumed = re.match(r'<\.\.\. \w+ resumed>(.*)', call)
            whole.append(begun.pop(thread, '') + resumed[1] if resumed else call)
        return whole


class KillTally:
    """Posts to a daemon that is killed again and again, and counts from outside what became of it."""

    def __init__(self, daemon: Daemon, site: Any):
        self.daemon, self.site = daemon, site
        self.acknowledged: Dict[str, str] = {}  # id → link
        self.chance = random.Random(7)

    def rounds(self, number: int) -> None:
        """So many lives of the daemon, each ended by kill -9 at a random moment under load."""
        for _ in range(number):
            end = threading.Event()
            with ThreadPoolExecutor(3) as pool:
                for _ in range(3):
                    pool.submit(self.post, end)
                time.sleep(self.chance.uniform(0.0, 0.7))
                self.daemon.kill()
                end.set()
            self.daemon.start()

    def post(self, end: threading.Event) -> None:
        """One phone: a link after the other until the daemon dies under it."""
        client = self.daemon.new_client()
        with contextlib.suppress(OSError, http.client.HTTPException):
            while not end.is_set():
                link = self.site.tiktok(size=self.chance.choice((30_000, 300_000)))
                status, _, body = client.post('/api/v1/download', {'url': link, 'client_id': 'k', 'timestamp': 1})
                if status in (200, 202):
                    self.acknowledged[body['download_id']] = str(link)
                time.sleep(0.15)

    def wrong(self, seconds: float = 60) -> List[str]:
        """Waits for the queue to end; every fault there is."""
        unfinished = "SELECT 1 FROM downloads WHERE status IN ('queued', 'downloading')"
        wait_until(lambda: not self.daemon.rows(unfinished), seconds)
        rows = {row['id']: row for row in self.daemon.rows()}
        faults = [f'lost: {id}' for id in self.acknowledged if id not in rows]
        faults += [f'twice: {url}' for url, count in collections.Counter(
            row['url'] for row in rows.values()).items() if count > 1]
        faults += [f'{id}: {row["status"]} {row["error_message"]}' for id, row in rows.items()
                   if row['status'] != 'completed']
        named = sorted(name for row in rows.values() for name, _, _ in json.loads(row['files'] or '[]'))
        visible = sorted(name for name in self.daemon.files() if not name.startswith('.'))
        return faults if named == visible else [*faults, f'files: {set(named) ^ set(visible)}']


class LogTest(unittest.TestCase):
    """A writer of the log, and what it has written by which call."""

    def setUp(self):
        folder = new_folder()
        self.file = folder / 'logs/server.log'
        self.writer = v.LogWriter(SimpleNamespace(file=self.file, max_size=0, backup_count=0))
        self.addCleanup(self.writer.close)
        self.writes: List[bytes] = []

        def write(fd, data, real=os.write):
            if fd == self.writer.fd:
                self.writes.append(data)
            return real(fd, data)
        patched(self, unittest.mock.patch.object(os, 'write', write))

    def say(self, message, level=logging.INFO):
        self.writer.handle(logging.LogRecord('x', level, '', 0, message, (), None))


class SchedulerTest(unittest.TestCase):
    """A store with a link in it and a scheduler that has not begun."""

    def setUp(self):
        self.config = own_config()
        self.store = open_store(self, self.config.database.path)
        self.scheduler = v.Scheduler(self.config, self.store, v.Board(), None, lambda: None, lambda *_: None, None)
        submission = parsed({'url': 'https://www.tiktok.com/@a/video/1'}, self.config.security)
        self.download_id = self.store.add_many([submission], 1)[0].id

    def is_waiting(self) -> bool:
        return [row['id'] for row in self.store.waiting()] == [self.download_id]


class CareTest(unittest.TestCase):
    """A daemon that does not run, and its store."""

    def setUp(self):
        self.output = new_folder() / 'Müller'
        self.config = own_config(downloads_output_directory=self.output, database_backups=2)
        self.daemon = v.Daemon(self.config)
        self.daemon.store.open()
        self.addCleanup(self.daemon.store.close)
        self.daemon.scheduler.ready = True
        self.daemon.care.scheduler = self.daemon.scheduler


class FreezeTest(DaemonTest):
    """Pages that hold the interpreter."""
    settings = None
    PAGES = [b'<html><title>x</title>' + piece * (100_000 // len(piece)) for piece in (b'<meta ', b'<video ')]

    def freezing(self, page: bytes = PAGES[0], **behaviour: Any) -> str:
        """The link of a page that yt-dlp reads for a minute without letting anybody else have a turn."""
        path = f'/freeze-{uuid.uuid4().hex}'
        self.site.add('127.0.0.1', path, page, **behaviour)
        return f'{self.site.http}{path}'


# ---------- stand-in ----------------------------------------------------------------------
# A loopback stand-in for TikTok, Instagram, their CDNs and any direct origin: a proxy that ends
# TLS itself with a CA of its own, real media of any size, and every misbehaviour on demand.
#
#     site = Standin()                                      # site.proxy, site.ca_bundle
#     post = site.tiktok(title='Cat', size=500_000, hold_at=100_000)
#     str(post), post.id, post.page, post.media[0]          # a URL, and the routes behind it
#     post.media[0].wait_held(); post.media[0].release(); post.media[0].ranges
#     site.tiktok(page={'fail': [503, 503]}); site.tiktok(state='private'); site.short(post, 'vm')
#     site.instagram('video', 'photo', 'video', title='…'); site.direct('hls'); site.close()

# A second of H.264 and AAC as MPEG-TS and, with a frame after it as most have, as mp4; made once by ffmpeg: no
# test needs one for its media.
TINY_MP4 = zlib.decompress(base64.b85decode(
    'c-oazZ%7ki7=Q2Pbg0#oS!$yeO%WnUQ_C#VS-FClAW2|k=iZweyK~pwZBS@UiO|4L5`iTo^zTC@D*I3f86+xE^rb<5iyA}_gb-w3*7M%o*f}?|mwWD'
    'gpFi*O_jiX7vU%hyf=>$Y2+@e_Kvhi0UC9g8l?WNH^MODJA;j?^FGg#Y;TuBPQA8o~Bp0>TDwS_U8!iLnF(8YKAI=wKzY^21-W$Y48^=i-*9jC>SUZ'
    'bl33e;XNpkXr=2y8(t@7B%z`@4j)Y^$R0iAoJF#Elj6BC+{53_p94&Vb$rWbQ8v7sLDzFrR;EFoTTs!!97Rh<=!tVdTyeo*9W>Y2il+|9vxR+1&Gvw'
    '2E}mZ24-@UT+6GowZ7DvrnDO`y<BIp*@>pHWE<?2ig8EqCTlkfCIem+ffVlT#GR_AWXo`!w7z3ydUa5eQkjWl?Kzju)Y<deTryR+>*1tq$0xWo1@kL'
    'v4CJrGcOV<n9zXrPC*5cCfpus|7MeT|nD_d_dbtk0se1NP^Bd1H-QZf`QYn4FE_d!JmX0_5Z-n06^k5D*?dy%m8cv7(2r004N25y?V=b;IR&Xf(Agd'
    '#IJF>8SqtW;JcOrzFzoSFzd>u)oC`UUtBFKVP&X>a5!8B$}HG-G#06s;)IMKF<ML=F_aA_ie3vJ)g}#m%<6<mWIFs0m=NBSfTj*6#6dwCSWE&W3W1t'
    '{FO_-(OfHH6j!XDfJ`=0d-9td1&`_E;vL6d#ne?WHXXQkX_UH!&Llzl9;PgW?`BYSxJR%Ff6RM8Kj7$~VazNI}4h`-enn(21{oG<iQ^Rlj;*(=NrER'
    'ZW^{r7cSabNp#NgPArH`ZjYWK**EpPv*-(UO1aWmJCmzUq|9jUnVXq<@lm0Aw8ca}$^Uf03`za<ih%#jcq5rofc8nYfZ1!vD*ykXmfIm-?W(7%Vyx4'
    'BQ|BZD*k_($K*m$yrHUVfNw5rcU7{VSJaYNFX_9Y51@<WJOh&)00M+O-%fU%Fc~l3QHy^?O-A{&dhu@~=BIU0+_tD~Vf{BE#j;nbu!^uj|=!2vkV&v'
    'TyBLimk*aPsdhP`y2lPu3{N{'))
TINY_TS = zlib.decompress(base64.b85decode(
    'c-nJ!5Hw(HU~u}N%D{M#f#E;ne+I@s4I&;wjBIXhxdo}|oWZF@WtqvT28QJ|&ZqtlCgASC0CGFS241k+85ln>Xl-QK^nWM-_W-clnKsCR-Tsi_1A'
    '{b(;D5;YfsKo$G%tmLqxMDl;B>nqgMr)y28K4DItCm{fRXWlfuW&+Rgr;{H4zjyoF71By3+yfWr8B^(+{{XFfcQ)fCvSffE8{a$&3?Dj4GRejMR='
    'M`HrIuOdA()NiZ-mcAl>JzkXJ_RKP)BYrktnrKT1a7B<b=dGhMyY?I{Pg<To7le4qU9y_&hWvAS_bym4oBVpNGkdU^Nh(U0)+O=yLzQ>Q}@^0O_^'
    '#Cx<2oB8@15Pu7Lo>yI(~RL10S1Omb~w|_zyRcwx>XaAQXOZ>*mIQb@sDd!aCc-hNIyU~=Nw@00y~HOM&kdE2@Z_)e;6ec*vVwNI|vF6&C(rQz6%'
    'ZEyec$=^Qw_Z00YB41GKz~lvlV@K9XLlH!}U`hzLk_<zZm<_`m#Z&4*o6C8Z0O@`x0brrbKW-`8p5LT6T)xnAy8zpiD@$#iBlk~{HK?c{9HUM>lZ'
    'C$Cg%Q*Ii2fXaDG^G()js=43-UgYG~PPJ>B{k~>r_^w?C%&Ug!4s_3}oX@C|R~dwdaC#RW!s*?(SAc<$OKGswO-LDyS7aw@rKG|afAZ<4|LZ-Ue)'
    '?JK08H;jMGgbuzyl2SkdojFxk(=YVf(#B'))


TINY_JPEG = zlib.decompress(base64.b85decode(
    'c-s4a<NpH&0WUXCHwH!~1_nkTWcYuZ!I^=>&d$@$GZYL`VpB3QGE#s5NEH+mG&eT`Nf5K9rn$L)a({b!bNl4UvuDrVwQJL+n>Qc)2ZAFEz6^{'
    '&(@+2#BO|&PE4u)?Dh5Fek^cu61UVQa7zCIZl^B==8JGnb{@-HYVP*t!fNXn)nT(P18<_v!1OOL*F;M'))


def picture(seed: Any) -> bytes:
    """A JPEG of its own: a comment tells it from others."""
    comment = str(seed).encode()
    return TINY_JPEG[:2] + struct.pack('>HH', 0xfffe, 2 + len(comment)) + comment + TINY_JPEG[2:]


def padding(size: int, seed: Any) -> bytes:
    """`size` bytes that differ from seed to seed, so that a mix of two files never passes for one."""
    block = random.Random(str(seed)).getrandbits(8 << 16).to_bytes(1 << 16, 'big')
    return (block * (size // len(block) + 1))[:size]


def padded_mp4(data: bytes, size: int, seed: Any) -> bytes:
    """`data` grown to `size` bytes by a box that players skip."""
    room = size - len(data)
    return data if room < 8 else data + struct.pack('>I4s', room, b'free') + padding(room - 8, seed)


def padded_ts(data: bytes, size: int, seed: Any) -> bytes:
    """`data` grown to about `size` bytes by null packets."""
    filler = padding(184, seed)
    return data + (b'\x47\x1f\xff\x10' + filler) * max(0, (size - len(data)) // 188)


@functools.lru_cache(maxsize=None)
def ffmpeg_made(suffix: str, *options: str) -> bytes:
    """What ffmpeg makes of TINY_MP4 with `options`; TINY_MP4 itself where there is none or it cannot."""
    if not shutil.which('ffmpeg'):
        return TINY_MP4
    folder = new_folder()
    source, target = folder / 'tiny.mp4', folder / f'made{suffix}'
    source.write_bytes(TINY_MP4)
    done = ran(['ffmpeg', '-v', 'error', '-nostdin', '-i', str(source), *options, str(target)])
    return target.read_bytes() if done.returncode == 0 else TINY_MP4


ENCODERS = {'h265': 'libx265', 'vp9': 'libvpx-vp9', 'av1': 'libaom-av1'}


def movie(size: int = 0, seed: Any = 0, codec: str = 'h264') -> bytes:
    """A playable mp4 of `size` bytes; `codec` is what is really inside where ffmpeg can make it."""
    encoder = ENCODERS.get(codec)
    data = ffmpeg_made('.mp4', '-c:v', encoder, '-c:a', 'copy') if encoder else TINY_MP4
    return padded_mp4(data, size, seed)


def sound(size: int = 0, seed: Any = 0) -> bytes:
    return padded_mp4(ffmpeg_made('.m4a', '-vn', '-c:a', 'copy'), size, seed)


def fragments(stream: str, number: int) -> Tuple[bytes, List[bytes]]:
    """(init, segments) of TINY_MP4's 'v'ideo or 'a'udio for DASH."""
    data = ffmpeg_made('.mp4', '-map', '0:' + stream, '-c', 'copy', '-movflags',
                       'frag_every_frame+empty_moov+default_base_moof+skip_trailer')
    cuts = [found.start() - 4 for found in re.finditer(b'moof', data)] or [len(data) // 2]
    step = max(1, len(cuts) // number)
    cuts = cuts[::step][:number] + [len(data)]
    return data[:cuts[0]], [data[a:b] for a, b in zip(cuts, cuts[1:])]


def run_openssl(*args: Any, data: bytes = b'') -> bytes:
    return subprocess.run([judge(), *map(str, args)], input=data, check=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL).stdout


def openssl(*words: Any, check: bool = True) -> str:
    """What the openssl command says on both channels; AssertionError if it fails."""
    done = ran([judge(), *map(str, words)])
    assert not check or done.returncode == 0, f'openssl {words}: {done.stdout}'
    return done.stdout


def self_signed(cert: Path, key: Path, *alternatives: str) -> None:
    """Makes a certificate for these names and addresses, as openssl writes them: DNS:a."""
    cert.parent.mkdir(exist_ok=True)
    openssl('req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-days', 20, '-subj',
            '/CN=x', '-addext', 'subjectAltName=' + ','.join(alternatives), '-keyout', key, '-out', cert)


STANDIN_NAMES = ('tiktok.com', 'www.tiktok.com', 'vm.tiktok.com', 'vt.tiktok.com', 'm.tiktok.com', 'webcast.tiktok.com',
                 'lite.tiktok.com', '*.us.tiktok.com', '*.tiktokcdn.com', 'instagram.com', '*.instagram.com',
                 '*.cdninstagram.com', '*.fbcdn.net', 'example.com', '*.example.com', 'example.net', '*.example.net',
                 'pypi.org', 'files.pythonhosted.org', 'localhost')
CA_TEXT = 'basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\nsubjectKeyIdentifier=hash\n'
LEAF_TEXT = ('basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth\n'
             'subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\nsubjectAltName=IP:127.0.0.1,'
             + ','.join('DNS:' + name for name in STANDIN_NAMES))


@functools.lru_cache(maxsize=None)
def standin_certificates() -> Path:
    """Folder with ca.pem, leaf.pem (with its key): the stand-in's own, made once per run."""
    folder = RUN / 'standin'
    folder.mkdir()
    for name, text in (('ca', CA_TEXT), ('leaf', LEAF_TEXT)):
        (folder / (name + '.ext')).write_text(text)
        run_openssl('ecparam', '-name', 'prime256v1', '-genkey', '-noout', '-out', folder / (name + '.key'))
        run_openssl('req', '-new', '-key', folder / (name + '.key'), '-subj', '/CN=stand-in ' + name,
                '-out', folder / (name + '.csr'))
        signer = ['-signkey', folder / 'ca.key'] if name == 'ca' else [
            '-CA', folder / 'ca.pem', '-CAkey', folder / 'ca.key', '-set_serial', '2']
        run_openssl('x509', '-req', '-in', folder / (name + '.csr'), *signer, '-days', '30', '-sha256',
                '-extfile', folder / (name + '.ext'), '-out', folder / (name + '.pem'))
    with (folder / 'leaf.pem').open('ab') as chain:
        chain.write((folder / 'leaf.key').read_bytes())
    return folder


class SiteRequest(NamedTuple):
    """One request as the stand-in got it; `path` without, `query` with the words after '?'."""
    time: float
    method: str
    host: str
    path: str
    query: Dict[str, str]
    headers: Any
    body: bytes


SiteReply = Tuple[int, Dict[str, str], bytes]
HTML = b'<!DOCTYPE html><html><head><title>Oops</title></head><body>Something went wrong</body></html>'


class SiteRoute:
    """One address of the stand-in, how it misbehaves, and what was asked of it. All may be changed at any time.

    body: bytes, or a function of the SiteRequest returning (status, headers, bytes).
    fail: what the next requests get instead, one item each: a status, 'reset' (RST), 'hang' (never a
          word), 'html' (200 and a page), 'half' (half of the body, then the end).
    hold_at: stop after that many bytes of the body (counted from its start, also for a Range) until release().
    drip: seconds per byte. speed: bytes per second. half: every answer ends in the middle. ranges, etag: as
          servers without them. cookie: asked for, else 403. redirect: 302 to there. status, headers, type: of
          the answer.
    """

    def __init__(self, body: Any = b'', type: str = 'text/html; charset=utf-8', **behaviour: Any):
        self.body, self.type, self.status, self.headers = body, type, 200, {}
        self.fail, self.hold_at, self.drip, self.speed = [], None, 0.0, None
        self.half = False
        self.ranges = self.etag = True
        self.cookie = self.redirect = ''
        self.requests: List[SiteRequest] = []
        self.sent = 0           # bytes of body sent in all
        self.held = 0           # transfers that have reached hold_at
        self.gate = threading.Event()
        self.set(**behaviour)

    def set(self, **behaviour: Any) -> 'SiteRoute':
        """Changes how it behaves from the next request on."""
        unknown = set(behaviour) - set(vars(self))
        if unknown:
            raise TypeError(f'a SiteRoute has no {unknown}')
        vars(self).update(behaviour)
        self.fail = list(self.fail)
        if 'hold_at' in behaviour:
            self.gate.clear()
        return self

    @property
    def hits(self) -> int:
        return len(self.requests)

    @property
    def ranges_asked(self) -> List[str]:
        """The Range header of each request so far, '' where there was none."""
        return [request.headers.get('Range', '') for request in self.requests]

    def wait_hits(self, number: int = 1, seconds: float = 20) -> None:
        wait_until(lambda: self.hits >= number, seconds, lambda: f'{number} requests, got {self.hits}')

    def wait_held(self, number: int = 1, seconds: float = 20) -> None:
        """Waits for the n-th transfer to stand at hold_at; the first look at a direct link may break off before."""
        wait_until(lambda: self.held >= number, seconds, lambda: f'{number} transfers held, got {self.held}')

    def release(self) -> None:
        self.hold_at = None
        self.gate.set()

    def tag(self, body: bytes) -> str:
        """The ETag of `body`."""
        return '"%08x"' % zlib.crc32(body)

    def reply(self, request: SiteRequest) -> SiteReply:
        if self.cookie and self.cookie not in request.headers.get('Cookie', ''):
            return 403, {}, b'no cookie'
        if self.redirect:
            return 302, {'Location': self.redirect}, b''
        if callable(self.body):
            return self.body(request)
        body, headers = self.body, {'Content-Type': self.type, **self.headers}
        if self.status != 200 or not isinstance(body, bytes):
            return self.status, headers, body
        return self.part(request, headers, body)

    def part(self, request: SiteRequest, headers: Dict[str, str], body: bytes) -> SiteReply:
        """All of `body`, or the Range that was asked for."""
        if self.etag:
            headers['ETag'] = self.tag(body)
        if self.ranges:
            headers['Accept-Ranges'] = 'bytes'
        asked = re.fullmatch(r'bytes=(\d+)-(\d*)', request.headers.get('Range', ''))
        condition = request.headers.get('If-Range', '')
        if not self.ranges or not asked or condition and condition != headers.get('ETag'):
            return 200, headers, body
        start, end = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
        if start > end:
            return 416, {'Content-Range': f'bytes */{len(body)}'}, b''
        headers['Content-Range'] = f'bytes {start}-{end}/{len(body)}'
        return 206, headers, body[start:end + 1]


class Post(str):
    """A URL to share, and what lies behind it: `id`, `page` (SiteRoute), `media` (its SiteRoutes, in order)."""
    id: str
    page: SiteRoute
    media: List[SiteRoute]

    @classmethod
    def of(cls, url: str, id: str, page: SiteRoute, media: Sequence[SiteRoute]) -> 'Post':
        post = cls(url)
        post.id, post.page, post.media = id, page, list(media)
        return post


class SiteWriter:
    """The file that http.server writes an answer's head to."""

    def __init__(self, connection: socket.socket):
        self.write, self.closed = connection.sendall, False  # as http.server wants a file to be

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        self.closed = True


class SiteHandler(QuietHandler):
    """Answers for all hosts: as a proxy (CONNECT or an absolute URL) or as the origin itself."""
    protocol_version = 'HTTP/1.1'
    timeout = 60
    tunnel = ''

    def setup(self) -> None:
        self.site = self.server.site
        if self.server.encrypted:
            self.request.settimeout(10)
            self.request = self.site.tls.wrap_socket(self.request, server_side=True)
        super().setup()
        self.wfile = SiteWriter(self.connection)

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
        self.connection.close()

    def do_CONNECT(self) -> None:
        self.tunnel = self.path.rpartition(':')[0].strip('[]').lower()
        self.site.connects.append(self.path)
        if not self.site.knows(self.tunnel):
            return self.send_error(502, 'no such host')
        self.wfile.write(b'HTTP/1.1 200 Connection established\r\n\r\n')
        self.close_connection = False
        if self.path.endswith(':80'):
            return
        self.connection = self.request = self.site.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile('rb'), SiteWriter(self.connection)

    def read_request(self) -> SiteRequest:
        """The request, its host taken from the tunnel, the absolute URL or the Host header."""
        parts = urlsplit(self.path)
        host = self.tunnel or parts.hostname or self.headers.get('Host', '').rpartition(':')[0]
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        return SiteRequest(time.monotonic(), self.command, host, parts.path or '/', query, self.headers, body)

    def do_GET(self) -> None:
        request = self.read_request()
        self.site.requests.append(request)
        route = self.site.route(request)
        route.requests.append(request)
        trouble = route.fail.pop(0) if route.fail else None
        with contextlib.suppress(OSError):
            self.answer(request, route, trouble)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self, request: SiteRequest, route: SiteRoute, trouble: Any) -> None:
        if trouble in ('reset', 'hang'):
            return self.cut(trouble)
        status, headers, body = route.reply(request)
        if trouble == 'html':
            status, body = 200, HTML
        elif trouble not in (None, 'half'):
            status, headers, body = trouble, {'Content-Type': 'text/html'}, HTML
        self.send_response(status)
        for name, value in {'Content-Length': str(len(body)), **headers}.items():
            if value is None:  # the end of the connection is that of the body
                self.close_connection = True
            else:
                self.send_header(name, value)
        self.end_headers()
        if request.method != 'HEAD':
            self.send_body(request, route, body, len(body) // 2 if route.half or trouble == 'half' else len(body))

    def cut(self, trouble: str) -> None:
        """Ends the connection by RST, or never says a word."""
        self.close_connection = True
        if trouble == 'hang':
            while not self.gone(0.05):
                pass
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        socket.socket(fileno=self.connection.detach()).close()

    def send_body(self, request: SiteRequest, route: SiteRoute, body: bytes, end: int) -> None:
        """The body up to `end`, at the route's pace, stopping at its hold."""
        asked = re.match(r'bytes=(\d+)-', request.headers.get('Range', ''))
        offset = int(asked[1]) if asked and route.ranges else 0
        at = 0
        while at < end:
            hold = end if route.hold_at is None else max(0, route.hold_at - offset)
            if at >= hold and not self.hold(route):
                return
            step = 1 if route.drip else min(1 << 16, int(route.speed / 20) + 1 if route.speed else 1 << 16)
            chunk = body[at:min(end, at + step, hold if hold > at else end)]
            self.connection.sendall(chunk)
            at += len(chunk)
            route.sent += len(chunk)
            pause = route.drip or (len(chunk) / route.speed if route.speed else 0)
            if pause and self.gone(pause):
                return
        self.close_connection |= end < len(body)

    def hold(self, route: SiteRoute) -> bool:
        """Waits at the hold; False if the client went away meanwhile."""
        route.held += 1
        while not route.gate.is_set():
            if self.gone(0.02):
                return False
        return True

    def gone(self, seconds: float) -> bool:
        """Waits; True as soon as the client has closed or the stand-in is to end."""
        readable = select.select([self.connection], [], [], seconds)[0]
        self.close_connection |= bool(readable) or self.site.closing
        return bool(readable) or self.site.closing


class SiteServer(LocalServer):
    """A listener of the stand-in; `encrypted`: TLS from the first byte."""

    def __init__(self, site: 'Standin', encrypted: bool):
        self.site, self.encrypted = site, encrypted
        super().__init__(SiteHandler)

    def handle_error(self, *args: Any) -> None:
        """Clients go away: that is what they are made to do here."""


def script_json(value: Any) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(value).replace('</', '<\\/')


def html_page(*inside: str) -> bytes:
    return ('<!DOCTYPE html><html><head><title>x</title></head><body>' + '\n'.join(inside) + '</body></html>').encode()


TIKTOK_STATUS = {  # itemInfo-less answers by webapp.video-detail.statusCode
    'private': 10222, 'private_post': 10216, 'blocked': 10204, 'unavailable': 10231, 'server_error': 100004}
CODES = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_'


def shortcode(number: int) -> str:
    """Instagram's short code of a media number."""
    text = ''
    while number:
        number, digit = divmod(number, 64)
        text = CODES[digit] + text
    return text


class Standin:
    """The stand-in for the sites; see the banner above. close() ends it and everything it holds."""

    def __init__(self) -> None:
        folder = standin_certificates()
        self.ca_bundle = str(folder / 'ca.pem')
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(folder / 'leaf.pem')
        self.routes: Dict[Tuple[str, str], SiteRoute] = {}
        self.requests: List[SiteRequest] = []   # everything, in order
        self.connects: List[str] = []       # host:port of each CONNECT
        self.closing = False
        self.numbers = random.Random()
        plain, encrypted = SiteServer(self, False), SiteServer(self, True)
        self.servers = plain, encrypted
        self.proxy = self.http = f'http://127.0.0.1:{plain.server_address[1]}'
        self.https = f'https://127.0.0.1:{encrypted.server_address[1]}'
        self.furniture()

    def close(self) -> None:
        self.closing = True
        for server in self.servers:
            server.end()

    def __enter__(self) -> 'Standin':
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    # -- routes

    def add(self, host: str, path: str, body: Any = b'', type: str = 'text/html; charset=utf-8',
            **behaviour: Any) -> SiteRoute:
        """Answers https://host/path (and http) with `body`: bytes, or a function of the SiteRequest."""
        route = self.routes[host, path.rstrip('/') or '/'] = SiteRoute(body, type, **behaviour)
        return route

    def route(self, request: SiteRequest) -> SiteRoute:
        """The route of a request. Unknown paths are 404; address literals answer as a careless server would."""
        key = request.host, request.path.rstrip('/') or '/'
        if key not in self.routes:
            literal = re.fullmatch(r'[\d.]+|[\da-f:]+', request.host) and request.host != '127.0.0.1'
            self.routes[key] = SiteRoute(movie(), 'video/mp4') if literal else SiteRoute(HTML, status=404)
        return self.routes[key]

    def knows(self, host: str) -> bool:
        return any(host == known for known, _ in self.routes) or bool(re.fullmatch(r'[\d.]+|[\da-f:]+', host))

    def asked(self, host: str = '', path: str = '') -> List[SiteRequest]:
        """The requests so far whose host ends with `host` and whose path starts with `path`."""
        return [r for r in list(self.requests) if r.host.endswith(host) and r.path.startswith(path)]

    def furniture(self) -> None:
        self.add('www.tiktok.com', '/login', html_page('Log in'))
        for host in ('vm.tiktok.com', 'vt.tiktok.com', 'm.tiktok.com', 'instagram.com'):
            self.add(host, '/', html_page())
        start = html_page('<script id="__eqmc" type="application/json">{"l": "lsd"}</script>')
        self.add('www.instagram.com', '/', start,
                 headers={'Set-Cookie': 'csrftoken=csrf; Domain=.instagram.com; Path=/'})
        self.add('www.instagram.com', '/accounts/login', html_page('Log in'))
        for host in ('www.instagram.com', 'i.instagram.com'):
            self.add(host, '/api/v1/web/get_ruling_for_content', self.instagram_ruling)
        self.add('www.instagram.com', '/graphql/query', self.instagram_graphql)
        self.instagram_posts: Dict[str, Dict[str, Any]] = {}

    def number(self) -> int:
        return self.numbers.randrange(7 * 10 ** 18, 75 * 10 ** 17)

    # -- TikTok

    def tiktok(self, id: str = '', title: str = 'A cat jumps', size: int = 100_000, state: str = 'fine',
               formats: Sequence[str] = ('h264_540p',), user: str = 'tester', known_size: bool = True,
               codecs: bool = False, page: Optional[Dict[str, Any]] = None, pictures: int = 0, **media: Any) -> Post:
        """A TikTok post. `formats`: such as h264_540p, bytevc1_1080p, bytevc2_720p; a media SiteRoute each, in order.

        state: fine, private, private_post, blocked, unavailable, server_error (status codes), gone (404),
        login, classified, challenge (fine after a JavaScript puzzle), changed (a page of another make),
        sound (a slide show: nothing but the music). codecs: H.265 really is H.265. page, media: behaviour.
        pictures: a photo post of so many, with the music; a route each, the sound last."""
        id = id or str(self.number())
        routes = {form: self.tiktok_media(id, form, size, codecs, media) for form in formats
                  if state != 'sound' and not pictures}
        struct_ = self.tiktok_item(id, title, user, routes, known_size)
        if pictures:
            routes, struct_['imagePost'] = self.tiktok_pictures(id, pictures)
        detail = {'statusCode': TIKTOK_STATUS.get(state, 0), 'statusMsg': ''}
        if state == 'classified':
            struct_ = {'id': id, 'isContentClassified': True}
        if state not in TIKTOK_STATUS:
            detail['itemInfo'] = {'itemStruct': struct_}
        if state == 'login':
            page = {'redirect': 'https://www.tiktok.com/login?redirect_url=x', **(page or {})}
        route = self.add('www.tiktok.com', f'/@{user}/video/{id}', self.tiktok_page(detail, state), **(page or {}))
        for name in ('_', ''):
            self.routes['www.tiktok.com', f'/@{name}/video/{id}'] = route
        if state == 'gone':
            route.status = 404
        kind = 'photo' if pictures else 'video'
        self.add('www.tiktok.com', f'/@{user}/photo/{id}', html_page('A page without data'))
        return Post.of(f'https://www.tiktok.com/@{user}/{kind}/{id}', id, route, list(routes.values()))

    def tiktok_pictures(self, id: str, number: int) -> Any:
        """(routes, imagePost) of a photo post: each picture at two addresses, the first of them gone."""
        host, music = 'p16-sign.tiktokcdn.com', self.routes['v16-webapp-prime.us.tiktok.com', f'/music/{id}']
        paths = [f'/{id}/{at}~tplv-photomode-image.jpeg' for at in range(number)]
        routes = {path: self.add(host, path, picture((id, path)), 'image/jpeg') for path in paths}
        images = [{'imageURL': {'urlList': [f'https://{host}/gone{path}?x=1', f'https://{host}{path}?x=1']},
                   'imageWidth': 1080, 'imageHeight': 1440} for path in paths]
        return {**routes, 'music': music}, {'images': images, 'cover': images[0], 'title': ''}

    def tiktok_media(self, id: str, form: str, size: int, codecs: bool, behaviour: Dict[str, Any]) -> SiteRoute:
        codec = 'h265' if codecs and form.startswith('bytevc1') else 'h264'
        body = behaviour.get('body') or movie(size, (id, form), codec)
        return self.add('v16-webapp-prime.us.tiktok.com', f'/video/tos/{id}/{form}/', type='video/mp4',
                        **{'cookie': 'tt_chain_token=chain', **behaviour, 'body': body})

    def tiktok_item(self, id: str, title: str, user: str, routes: Dict[str, SiteRoute], known_size: bool) -> Any:
        base = f'https://v16-webapp-prime.us.tiktok.com/video/tos/{id}/'
        rates = [{'GearName': form, 'Bitrate': 900_000 + at, 'CodecType': form.split('_')[0], 'PlayAddr': {
            'Uri': id, 'UrlKey': f'v12044gd0000_{form}_{900_000 + at}',
            'UrlList': [f'{base}{form}/?a=1988&mime_type=video_mp4'],
            **({'DataSize': str(len(route.body))} if known_size else {})}}
            for at, (form, route) in enumerate(routes.items())]
        self.add('v16-webapp-prime.us.tiktok.com', f'/music/{id}/', sound(20_000, id), 'audio/mp4')
        return {
            'id': id, 'desc': title, 'createTime': '1763000000',
            'author': {'id': '69' + '0' * 17, 'uniqueId': user, 'nickname': user.title(), 'secUid': 'MS4w' + user},
            'video': {'id': id, 'duration': 1 if rates else 0, 'width': 576, 'height': 1024, 'ratio': '540p',
                      'cover': f'https://p16-sign.tiktokcdn.com/{id}.jpg',
                      'playAddr': rates[0]['PlayAddr']['UrlList'][0] if rates else '', 'bitrateInfo': rates},
            'music': {'id': '1', 'title': 'original sound', 'authorName': user, 'duration': 1,
                      'playUrl': f'https://v16-webapp-prime.us.tiktok.com/music/{id}/?mime_type=audio_mp4'},
            'stats': {'diggCount': 1, 'shareCount': 2, 'commentCount': 3, 'playCount': 4}}

    def tiktok_page(self, detail: Dict[str, Any], state: str) -> Callable[[SiteRequest], SiteReply]:
        data = script_json({'__DEFAULT_SCOPE__': {'webapp.video-detail': detail}})
        fine = html_page(f'<script id="__UNIVERSAL_DATA_FOR_REHYDRATION__" type="application/json">{data}</script>')
        digest = base64.b64encode(hashlib.sha256(b'salt' + b'77').digest()).decode()
        puzzle = base64.b64encode(json.dumps(
            {'v': {'a': base64.b64encode(b'salt').decode(), 'c': digest}}).encode()).decode().rstrip('=')
        riddle = html_page(f'Please wait...<p id="cs" class="{puzzle}"></p><p id="wci" class="_wafchallengeid"></p>')

        def answer(request: SiteRequest) -> SiteReply:
            solved = '_wafchallengeid' in request.headers.get('Cookie', '')
            body = {'changed': html_page('A new look'), 'challenge': fine if solved else riddle}.get(state, fine)
            return (404 if state == 'gone' else 200), {
                'Content-Type': 'text/html; charset=utf-8',
                'Set-Cookie': 'tt_chain_token=chain; Domain=.tiktok.com; Path=/; Secure; HttpOnly'}, body
        return answer

    def short(self, post: str, form: str = 'vm', **behaviour: Any) -> Post:
        """A short link to `post`: form vm, vt (hosts), t (www.tiktok.com/t/…) or m (m.tiktok.com/v/…)."""
        code = 'ZM' + uuid.uuid4().hex[:7]
        host, path = {'t': ('www.tiktok.com', f'/t/{code}/')}.get(form, (form + '.tiktok.com', f'/{code}/'))
        route = self.add(host, path, **{'redirect': str(post) + '?_t=8abc&_r=1', **behaviour})
        return Post.of(f'https://{host}{path}', code, route, getattr(post, 'media', []))

    # -- Instagram

    def instagram(self, *items: str, id: str = '', title: Optional[str] = None, size: int = 100_000,
                  state: str = 'fine', kind: str = 'reel', user: str = 'tester', dash: str = '',
                  page: Optional[Dict[str, Any]] = None, **media: Any) -> Post:
        """An Instagram post; items: 'video' (left out: one), 'photo'; several are a carousel. A SiteRoute each.

        kind: reel, p, tv. dash: codec ('vp9', 'av1') of a better, video-only format beside the H.264 file.
        state: fine, private, login (redirect), restricted, geo, deleted (404), changed (no data in the page)."""
        number = self.number()
        id = id or shortcode(number)
        found = [self.instagram_item(item, self.number() if len(items) > 1 else number, size, dash, media)
                 for item in items or ('video',)]
        whole = {'pk': str(number), 'code': id, 'title': title, 'taken_at': 1763000000, 'like_count': 5,
                 'user': {'username': user, 'full_name': user.title(), 'pk': '42'}, 'caption': {'text': 'A caption'}}
        whole.update(found[0][0] if len(found) == 1 else {'carousel_media': [item for item, _ in found]})
        whole.update(pk=str(number), code=id)
        if state == 'login':
            page = {'redirect': 'https://www.instagram.com/accounts/login/?next=x', **(page or {})}
        post = {'product': whole, 'state': state}
        self.instagram_posts[id] = self.instagram_posts[str(number)] = post
        route = SiteRoute(functools.partial(self.instagram_page, post), **(page or {}))
        self.instagram_addresses(id, number, user, route, post)
        return Post.of(f'https://www.instagram.com/{kind}/{id}/', id, route, [r for _, r in found if r])

    def instagram_addresses(self, id: str, number: int, user: str, route: SiteRoute, post: Dict[str, Any]) -> None:
        """Registers everything under which a post is reached."""
        for host in ('www.instagram.com', 'instagram.com'):
            for kind in ('p', 'reel', 'reels', 'tv', f'{user}/reel', f'{user}/p'):
                self.routes[host, f'/{kind}/{id}'] = route

        def info(request: SiteRequest) -> SiteReply:
            if 'sessionid' not in request.headers.get('Cookie', ''):
                return 403, {}, b'{"message": "login_required", "status": "fail"}'
            return 200, {'Content-Type': 'application/json'}, json.dumps({'items': [post['product']]}).encode()
        for host in ('www.instagram.com', 'i.instagram.com'):
            self.add(host, f'/api/v1/media/{number}/info/', info)

    def instagram_item(self, kind: str, number: int, size: int, dash: str, behaviour: Dict[str, Any]) -> Any:
        """(media, SiteRoute or None) of one picture or video of a post."""
        host, code = 'scontent.cdninstagram.com', shortcode(number)
        item = {'pk': str(number), 'code': code, 'media_type': 1, 'image_versions2': {
            'candidates': [{'url': f'https://{host}/{code}-{width}.jpg', 'width': width, 'height': width * 2}
                           for width in (320, 1080, 640)]}}
        if kind == 'photo':
            return item, self.add(host, f'/{code}-1080.jpg', type='image/jpeg', **{'body': picture(code), **behaviour})
        body = behaviour.get('body') or movie(size, code)
        route = self.add(host, f'/o1/{code}.mp4', type='video/mp4', **{**behaviour, 'body': body})
        item.update(media_type=2, video_duration=1.0, has_audio=True, video_versions=[
            {'type': 101, 'id': '101', 'url': f'https://{host}/o1/{code}.mp4?efg=1', 'width': 640, 'height': 1136}])
        if dash:
            item['video_dash_manifest'] = self.instagram_dash(host, code, dash, size)
        return item, route

    def instagram_dash(self, host: str, code: str, codec: str, size: int) -> str:
        """A DASH manifest of a larger, video-only format in `codec`, and the sound."""
        self.add(host, f'/o1/{code}-v.mp4', padded_mp4(ffmpeg_made(
            '.mp4', '-an', '-c:v', ENCODERS.get(codec, 'copy')), size, code), 'video/mp4')
        self.add(host, f'/o1/{code}-a.mp4', sound(20_000, code), 'audio/mp4')
        words = {'vp9': 'vp09.00.31.08', 'av1': 'av01.0.05M.08', 'h265': 'hvc1.1.6.L93', 'h264': 'avc1.64001f'}[codec]
        base = f'<BaseURL>https://{host}/o1/{code}-%s.mp4</BaseURL>'
        return dash_manifest([('video/mp4', words, 'width="1080" height="1920"', 3_000_000, base % 'v'),
                              ('audio/mp4', 'mp4a.40.2', 'audioSamplingRate="44100"', 64_000, base % 'a')])

    def instagram_visible(self, post: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        """The post's data as one sees it without an account, None if one does not."""
        return post['product'] if post['state'] == 'fine' else None

    def instagram_page(self, post: Dict[str, Any], request: SiteRequest) -> SiteReply:
        """The page of a post: 2026's place for its data."""
        media = {'xig_polaris_media': {'if_not_gated_logged_out': self.instagram_visible(post)}}
        stream = ['adp_PolarisPost', {'__bbox': {'complete': True, 'result': {'data': media}}}]
        loader = {'__bbox': {'require': [['RelayPrefetchedStreamCache', 'next', [], stream]]}}
        data = script_json({'require': [['ScheduledServerJS', 'handle', None, [loader]]]})
        script = f'<script type="application/json" data-content-len="9" data-sjs>{data}</script>'
        body = html_page(script if post['state'] != 'changed' else 'A new look')
        return (404 if post['state'] == 'deleted' else 200), {'Content-Type': 'text/html; charset=utf-8'}, body

    def instagram_ruling(self, request: SiteRequest) -> SiteReply:
        """May this post be seen? Sets the session's cookie."""
        state = self.instagram_posts.get(request.query.get('target_id', ''), {}).get('state', 'deleted')
        title = {'restricted': 'Restricted Video', 'geo': 'Content not available in your country'}.get(state, '')
        answer = {'status': 'ok', **({'title': title, 'description': 'It is not for everybody'} if title else {})}
        return 200, {'Content-Type': 'application/json',
                     'Set-Cookie': 'csrftoken=csrf; Domain=.instagram.com; Path=/'}, json.dumps(answer).encode()

    def instagram_graphql(self, request: SiteRequest) -> SiteReply:
        """The data of a post as yt-dlp 2025 asks for it."""
        code = json.loads(request.query.get('variables', '{}')).get('shortcode', '')
        post = self.instagram_posts.get(code, {'state': 'deleted'})
        if post['state'] in ('login', 'changed') or post['state'] == 'deleted' and code in self.instagram_posts:
            return 401, {'Content-Type': 'text/html'}, html_page('Log in')
        page = self.routes['www.instagram.com', f'/p/{code}'] if code in self.instagram_posts else SiteRoute()
        if page.fail:
            return 500, {'Content-Type': 'text/html'}, HTML  # the page says what is wrong
        product = self.instagram_visible(post)
        data = {'data': {'xdt_shortcode_media': product and self.instagram_node(product)}}
        return 200, {'Content-Type': 'application/json'}, json.dumps(data).encode()

    def instagram_node(self, product: Dict[str, Any]) -> Dict[str, Any]:
        """A product in the words of 2025's GraphQL."""
        node = {'id': product['pk'], 'shortcode': product['code'], 'title': product.get('title'), 'is_video': False,
                'display_url': product.get('image_versions2', {}).get('candidates', [{}] * 2)[1].get('url'),
                'edge_media_to_caption': {'edges': [{'node': {'text': 'A caption'}}]},
                'owner': {'id': '42', **product.get('user', {})}, 'dimensions': {'width': 640, 'height': 1136},
                'edge_media_preview_like': {'count': 5}}
        if product.get('media_type') == 2:
            versions = product.get('video_versions', [{}])
            node.update(is_video=True, __typename='GraphVideo', video_url=versions[0].get('url'),
                        video_duration=1.0, dash_info={'video_dash_manifest': product.get('video_dash_manifest')})
        if 'carousel_media' in product:
            edges = [{'node': self.instagram_node(item)} for item in product['carousel_media']]
            node.update(__typename='GraphSidecar', edge_sidecar_to_children={'edges': edges})
        return node

    def share(self, post: Post, form: str = 'reel/', **behaviour: Any) -> Post:
        """An instagram.com/share/[reel/|p/]… link, which redirects to `post`."""
        code = 'BA' + uuid.uuid4().hex[:8]
        route = self.add('www.instagram.com', f'/share/{form}{code}/', **{'redirect': str(post), **behaviour})
        return Post.of(f'https://www.instagram.com/share/{form}{code}/', code, route, post.media)

    def story(self, user: str = 'tester', size: int = 100_000, **media: Any) -> Post:
        """An Instagram story: only for those who are logged in."""
        number = self.number()
        item, route = self.instagram_item('video', number, size, '', media)
        reels = {'reels': {'42': {'user': {'pk': '42', 'username': user, 'full_name': user.title()}, 'items': [item]}}}

        def answer(request: SiteRequest) -> SiteReply:
            seen = 'sessionid' in request.headers.get('Cookie', '')
            return 200, {'Content-Type': 'application/json'}, json.dumps(reels if seen else {'status': 'ok'}).encode()
        for host in ('www.instagram.com', 'i.instagram.com'):
            self.add(host, '/api/v1/feed/reels_media/', answer)
        body = html_page('<script>{"user":{"pk":"42","username":"%s"}}</script>' % user)
        page = self.add('www.instagram.com', f'/stories/{user}/{number}/', body)
        return Post.of(f'https://www.instagram.com/stories/{user}/{number}/', str(number), page, [route])

    # -- any other origin

    def direct(self, kind: str = 'mp4', size: int = 100_000, name: str = '', parts: int = 4, https: bool = False,
               host: str = '', page: Optional[Dict[str, Any]] = None, **media: Any) -> Post:
        """A direct link: kind mp4, hls, hls_aes, dash (video and sound apart), m4a.

        On 127.0.0.1 without a proxy, or at https://host/… (names of STANDIN_NAMES) through it. `size` is that of
        all segments together; `page` is the behaviour of the playlist (mp4: the media itself is the page)."""
        name = name or 'clip-' + uuid.uuid4().hex[:8]
        base = f'https://{host}' if host else self.https if https else self.http
        make = getattr(self, 'direct_' + kind)
        tail, routes = make(host or '127.0.0.1', f'/d/{name}', size, parts, page or {}, media)
        return Post.of(f'{base}/d/{name}{tail}', name, routes[0], routes[1:] or routes)

    def direct_mp4(self, host: str, path: str, size: int, parts: int, page: Any, media: Any) -> Any:
        """(ending, routes) of one file; the page is the medium."""
        return '.mp4', [self.add(host, path + '.mp4', type='video/mp4', **{'body': movie(size, path), **page, **media})]

    def direct_m4a(self, host: str, path: str, size: int, parts: int, page: Any, media: Any) -> Any:
        """The same, sound alone."""
        return '.m4a', [self.add(host, path + '.m4a', type='audio/mp4', **{'body': sound(size, path), **page, **media})]

    def direct_hls(self, host: str, path: str, size: int, parts: int, page: Any, media: Any, key: bytes = b'') -> Any:
        """(ending, routes) of a playlist and its segments."""
        lines = ['#EXTM3U', '#EXT-X-VERSION:3', '#EXT-X-TARGETDURATION:1', '#EXT-X-MEDIA-SEQUENCE:0']
        if key:
            lines.append(f'#EXT-X-KEY:METHOD=AES-128,URI="{path}.key"')
            self.add(host, path + '.key', key, 'application/octet-stream')
        routes = []
        for at in range(parts):
            body = padded_ts(TINY_TS, size // parts, (path, at))
            if key:
                body = run_openssl('enc', '-aes-128-cbc', '-K', key.hex(), '-iv', '%032x' % at, data=body)
            routes.append(self.add(host, f'{path}/{at}.ts', type='video/mp2t', **{'body': body, **media}))
            lines += ['#EXT-X-DISCONTINUITY'] * bool(at) + ['#EXTINF:1.0,', f'{path}/{at}.ts']
        index = '\n'.join(lines + ['#EXT-X-ENDLIST', '']).encode()
        return '.m3u8', [self.add(host, path + '.m3u8', index, 'application/vnd.apple.mpegurl', **page)] + routes

    def direct_hls_aes(self, *args: Any) -> Any:
        """The same, encrypted."""
        return self.direct_hls(*args, key=hashlib.md5(args[1].encode()).digest())

    def direct_dash(self, host: str, path: str, size: int, parts: int, page: Any, media: Any) -> Any:
        """(ending, routes) of a manifest, the segments of the video, then of the sound."""
        routes, sets = [], []
        for stream, codec, extra in (('v', 'avc1.42c00a', 'width="72" height="128"'), ('a', 'mp4a.40.2', '')):
            init, segments = fragments(stream, parts)
            share = size // len(segments) if stream == 'v' else 0
            self.add(host, f'{path}/{stream}-init.mp4', init, 'video/mp4')
            urls = [f'<Initialization sourceURL="{path}/{stream}-init.mp4"/>']
            for at, body in enumerate(segments):
                routes.append(self.add(host, f'{path}/{stream}-{at}.m4s', type='video/iso.segment',
                                       **{'body': padded_mp4(body, share, (path, at)), **media}))
                urls.append(f'<SegmentURL media="{path}/{stream}-{at}.m4s"/>')
            inside = f'<SegmentList timescale="{len(segments)}" duration="1">{"".join(urls)}</SegmentList>'
            sets.append((('video' if stream == 'v' else 'audio') + '/mp4', codec, extra, 400_000, inside))
        index = dash_manifest(sets).encode()
        return '.mpd', [self.add(host, path + '.mpd', index, 'application/dash+xml', **page)] + routes


def dash_manifest(sets: Sequence[Tuple[str, str, str, int, str]]) -> str:
    """A static MPD of one second: (type, codecs, further attributes, bandwidth, inside) of each set."""
    parts = [f'<AdaptationSet mimeType="{type}"><Representation id="{at}" codecs="{codecs}" {extra} '
             f'bandwidth="{rate}">{inside}</Representation></AdaptationSet>'
             for at, (type, codecs, extra, rate, inside) in enumerate(sets)]
    return ('<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011" minBufferTime="PT1S" '
            'mediaPresentationDuration="PT1S"><Period>' + ''.join(parts) + '</Period></MPD>')


# ---------- download ----------------------------------------------------------------------
# Real yt-dlp in this very process against the stand-in; what has to die, grow or start afresh
# runs in a process of its own (DRIVER).

DRIVER = '''
import json, logging, os
from pathlib import Path
logging.basicConfig(level=logging.ERROR)
config = v.load_config(Path(sys.argv[3]), {})
def attempt(url, id='job', options=(), number=1, told=lambda progress: None):
    return v.Attempt(v.Job(id, url, tuple(options), number), config, Path(sys.argv[4]), told)
def say(*words):
    print(*words, flush=True)
def rss(field='VmRSS'):
    return int(Path('/proc/self/status').read_text().split(field + ':')[1].split()[0]) / 1024
'''


@functools.lru_cache(maxsize=None)
def ytdlp_folder() -> Path:
    """The unpacked yt-dlp of the harness."""
    vendored()
    return v.Vendor(HERE / 'vendor').current()


def full_disk(free: int) -> Any:
    return unittest.mock.patch.object(v, 'free_space', lambda folder: free)


def largest_fall(progress: Sequence[Any]) -> float:
    percents = [told.percent for told in progress]
    return max([a - b for a, b in zip(percents, percents[1:])], default=0)


SLEEPER = 'case "$*" in *-bsfs*) echo "ffmpeg version 6.0";; *) echo "$*" > "$0.args"; exec sleep 60;; esac'


class DownloadTest(unittest.TestCase):
    """A stand-in for the class, a folder for each test."""
    together = 'downloads'  # one import of yt-dlp
    number = 1  # of the attempt
    site: Any

    @classmethod
    def setUpClass(cls) -> None:
        cls.site = Standin()
        cls.addClassCleanup(cls.site.close)
        patched(cls, unittest.mock.patch.dict(os.environ, {'SSL_CERT_FILE': cls.site.ca_bundle}))
        logging.getLogger('videoserverd').setLevel(logging.CRITICAL)
        cls.addClassCleanup(logging.getLogger('videoserverd').setLevel, logging.NOTSET)
        quiet = warnings.catch_warnings()
        quiet.__enter__()
        cls.addClassCleanup(quiet.__exit__, None, None, None)
        warnings.simplefilter('ignore', ResourceWarning)  # yt-dlp leaves it to the garbage collector to close

    def setUp(self) -> None:
        warnings.simplefilter('ignore', ResourceWarning)  # yt-dlp leaves files open when it is stopped
        self.folder = new_folder()
        self.output = self.folder / 'out'
        self.output.mkdir()
        self.told: List[Any] = []
        self.numbers = iter(range(1, 1000))

    def config(self, proxy: bool = True, **sections: Dict[str, Any]) -> Any:
        """A Config of built-in values and these; `proxy`: everything goes through the stand-in."""
        settings = {'downloads': {'output_directory': 'out', 'min_free_space': '1MB', 'retry_delays': '0',
                                  'slideshow': 'off'},
                    'downloader': {'page_pace': '', **({'proxy': self.site.proxy} if proxy else {})}}
        for name, keys in sections.items():
            settings.setdefault(name, {}).update(keys)
        file = self.folder / 'config.ini'
        file.write_text(''.join(f'[{name}]\n' + ''.join(f'{key} = {text}\n' for key, text in keys.items())
                                for name, keys in settings.items()))
        return v.load_config(file, {})

    def attempt(self, url: str, id: str = '', options: Sequence[str] = (), config: Any = None) -> Any:
        """An Attempt at `url`; progress goes to self.told."""
        job = v.Job(id or f'job{next(self.numbers)}', str(url), v.parse_options(list(options)), self.number)
        return v.Attempt(job, config or self.config(), ytdlp_folder(), self.told.append)

    def fetch(self, url: str, *args: Any, **more: Any) -> Any:
        return self.attempt(url, *args, **more).run()

    def direct_config(self, **sections: Any) -> Any:
        return self.config(proxy=False, **{'security': ANYWHERE, **sections})

    def direct(self, path: str, body: bytes, type: str = 'text/html', **more: Any) -> Any:
        """The outcome of a direct link that answers with these bytes."""
        self.site.add('127.0.0.1', path, body, type, **more)
        return self.fetch(self.site.http + path, config=self.direct_config())

    def in_background(self, attempt: Any) -> Any:
        """Runs the attempt in a thread; .outcome once it has ended, .wait() for that."""
        run = SimpleNamespace(outcome=None)

        def work():
            run.outcome = attempt.run()
        run.thread = threading.Thread(target=work, daemon=True)
        run.thread.start()
        self.addCleanup(run.thread.join, 20)
        self.addCleanup(attempt.stop, 'stopped')

        def wait(seconds=20):
            run.thread.join(fair(seconds))
            self.assertFalse(run.thread.is_alive(), 'the attempt goes on')
            return run.outcome
        run.wait = wait
        return run

    def driver(self, code: str, config: Any = None, env: Optional[Dict[str, str]] = None) -> Any:
        """A process that runs DRIVER and `code`; .stdout is a pipe."""
        config = config or self.config()
        variables = {**os.environ, **(env or {})}
        variables.pop('PYTHONDONTWRITEBYTECODE', None)  # compiling costs more than the rest
        process = subprocess.Popen(
            v.bare_python(DRIVER + textwrap.dedent(code), str(config.file), str(ytdlp_folder())),
            stdout=subprocess.PIPE, encoding='utf-8', env=variables)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def said(self, code: str, env: Optional[Dict[str, str]] = None) -> List[str]:
        """The lines that such a process prints."""
        process = self.driver(code, env=env)
        text, _ = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0)
        return text.splitlines()

    def begin(self, post: Any, at: int = 500_000, **more: Any) -> None:
        """An attempt `resumed` at a post, which is stopped in the middle."""
        media = post.media[0].set(hold_at=at)
        attempt = self.attempt(post, 'resumed', **more)
        run = self.in_background(attempt)
        held = media.held + 1
        media.wait_held(held)
        wait_until(lambda: attempt.folder.size()[0] > at // 2, what='bytes on disk')
        attempt.stop('stopped')
        self.assert_ends(run.wait(), 'stopped', 'stopped')
        media.release()

    def fake_ffmpeg(self) -> Path:
        """A program that passes for ffmpeg and takes its time."""
        (self.folder / 'bin').mkdir()
        return new_program(self.folder / 'bin/ffmpeg', SLEEPER)

    def names(self, post: Any, *kinds: str, title: str = 'A caption') -> List[str]:
        """Those of the files of a post of several items."""
        return [f'{title}_{post.id}_{at}.{kind}' for at, kind in enumerate(kinds, 1)]

    def on_disk(self, post: Any) -> int:
        """How much of a post that is being fetched."""
        return sum(size for path, size in files_below(self.output / '.incomplete' / post.id).items()
                   if path.suffix not in ('.json', '.ytdl', '.new'))

    def finished(self) -> Dict[str, bytes]:
        """What is visible in the output folder."""
        return {path.name: path.read_bytes() for path in self.output.iterdir() if not path.name.startswith('.')}

    def assert_ends(self, outcome: Any, kind: str, reason: str, tries: float = float('inf')) -> None:
        self.assertEqual((outcome.kind, outcome.reason, outcome.tries), (kind, reason, tries), outcome)
        self.assertRegex(outcome.message, r'^[A-Zy][^\n]{10,250}\.$|^Cancelled$')
        self.assertNotRegex(outcome.message, '--(?!output)|github|ERROR')

    def assert_stops(self, attempt: Any, ready: Callable[[], Any], reason: str = 'cancelled') -> None:
        """It ends within a second of stop(), once ready() is true."""
        run = self.in_background(attempt)
        wait_until(ready, what='the phase to stop in')
        began = time.monotonic()
        attempt.stop(reason)
        self.assertAlmostEqual(attempt.reach.stopped_at, began, delta=fair(0.2))
        outcome = run.wait()
        self.assertLess(time.monotonic() - began, fair(0.9))
        self.assert_ends(outcome, 'cancelled' if reason == 'cancelled' else 'retry', reason)
        if reason == 'cancelled':
            self.assertFalse(attempt.folder.path.exists())
        self.assertEqual(self.finished(), {})

    def assert_done(self, outcome: Any, *bodies: Any) -> List[str]:
        """It ended with files of these bodies (routes or bytes), in this order; their names."""
        self.assertEqual(outcome.kind, 'done', outcome)
        expected = [body if isinstance(body, bytes) else body.body for body in bodies]
        self.assertEqual([(self.output / file.name).read_bytes() == body
                          for file, body in zip(outcome.files, expected)], [True] * len(expected))
        self.assertEqual(len(outcome.files), len(expected))
        return [file.name for file in outcome.files]


class GuardTest(DownloadTest):
    """The Internet as a test wants it: what names lead to, which addresses are public, where anything went."""

    def setUp(self) -> None:
        super().setUp()
        self.connected = CONNECTED
        CONNECTED.clear()
        self.open_config = self.config(proxy=False, security={'allowed_domains': '*'})

    def resolve(self, *addresses: str) -> Any:
        """Patches the name service: every name has these addresses."""
        real = _socket.getaddrinfo

        def look_up(host, *args, **more):
            hosts = addresses if host.endswith('.com') else [host]
            return [found for address in hosts for found in real(address, *args, **more)]
        return unittest.mock.patch('_socket.getaddrinfo', look_up)

    def named(self, name: str) -> str:
        """http://name:port of the stand-in, without a proxy."""
        return f'http://{name}:{self.site.http.rpartition(":")[2]}'

    def trust(self, *addresses: str) -> Any:
        """Patches is_public: these are the Internet for now."""
        real = v.is_public
        return unittest.mock.patch.multiple(v, own_networks=lambda: [], is_public=lambda address: (
            address in addresses or real(address)))


class Impersonated:
    """What a DownloadTest has to be told for impersonate=on, where curl_cffi asks for all pages."""
    together = 'impersonated'  # curl_cffi is imported once
    number = 3

    @classmethod
    def setUpClass(cls) -> None:
        vendored_curl()
        super().setUpClass()
        v.import_ytdlp(ytdlp_folder(), True)
        if not v.IMPORTED.get('curl'):
            raise unittest.SkipTest('yt-dlp was imported without curl_cffi: run this class alone')

    def config(self, proxy: bool = True, **sections: Dict[str, Any]) -> Any:
        sections['downloader'] = {'impersonate': 'on', **sections.get('downloader', {})}
        return super().config(proxy, **sections)

    def by_curl(self) -> List[bool]:
        """Whether each request so far came from curl_cffi."""
        return [request.headers.get('Sec-Ch-Ua', '').startswith('"') for request in self.site.requests]


# ---------- judges ------------------------------------------------------------------------
# What the tests judge by, and with which texts: the tree of a source, a browser, yt-dlp's own parser, the worst
# text for a pattern.

def first_definitions(tree: ast.Module) -> Dict[str, int]:
    """Line of each module-level name's first definition."""
    found: Dict[str, int] = {}
    for statement in tree.body:
        names = [getattr(statement, 'name', '')]
        if not names[0]:
            names = [node.id for node in ast.walk(statement) if isinstance(getattr(node, 'ctx', None), ast.Store)
                     and isinstance(node, ast.Name)]
            names += [(alias.asname or alias.name).partition('.')[0] for alias in getattr(statement, 'names', ())]
        for name in names:
            found.setdefault(name, statement.lineno)
    return found


def global_uses(code: Any) -> List[Tuple[str, int, str]]:
    """(name, line, where) of each global that `code` and the code inside it reads; the compiler knows what is local."""
    found, line = [], code.co_firstlineno
    lines = dict(dis.findlinestarts(code))
    steps = list(dis.get_instructions(code))
    stored = {step.argval for step in steps if step.opname == 'STORE_NAME'}
    at_top = code.co_name == '<module>'
    for step in steps:
        line = lines.get(step.offset) or line
        if step.opname == 'LOAD_GLOBAL' or step.opname == 'LOAD_NAME' and (at_top or step.argval not in stored):
            found.append((step.argval, line, code.co_name))
    for inner in code.co_consts:
        if hasattr(inner, 'co_code'):
            found += global_uses(inner)
    return found


def functions(tree: ast.AST) -> List[Any]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def imported(tree: ast.AST) -> List[Tuple[str, int]]:
    """(top package, line) of each import, wherever it stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.partition('.')[0], node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module.partition('.')[0], node.lineno))
    return found


def banners(source: str) -> Dict[str, int]:
    return {found[1]: source.count('\n', 0, found.start()) + 1
            for found in re.finditer(r'^# -{10} (\w+) -+$', source, re.M)}


# What a browser makes of a text (https://url.spec.whatwg.org), written for the tests and from the
# standard alone, so that it shares no mistake with the program.

def browser_ipv4(host: str) -> Optional[str]:
    """The IPv4 parser: 1 to 4 numbers, decimal, octal or hexadecimal, the last of them filling the rest."""
    numbers = []
    for part in host.split('.'):
        base, digits = 10, part
        if part[:2] in ('0x', '0X'):
            base, digits = 16, part[2:]
        elif part.startswith('0'):
            base, digits = 8, part[1:]
        if digits and not set(digits.lower()) <= set('0123456789abcdef'[:base]):
            return None
        numbers.append(int(digits or '0', base))
    if len(numbers) > 4 or any(number > 255 for number in numbers[:-1]) or numbers[-1] >= 256 ** (5 - len(numbers)):
        return None
    value = numbers[-1] + sum(number << 8 * (3 - place) for place, number in enumerate(numbers[:-1]))
    return str(v.ipaddress.IPv4Address(value))


def browser_host(text: str) -> Optional[str]:
    """The host that a browser would contact for `text` in its address bar's place; None: it would not."""
    text = re.sub('[\t\r\n]', '', text.strip(''.join(map(chr, range(33)))))
    match = re.match(r'(?i)https?:[/\\]*([^/\\?#]*)', text)
    if not match:
        return None
    host, port = re.fullmatch(r'(?s)(\[[^\]]*\]|[^:]*)(:.*)?|.*', match[1].rpartition('@')[2]).group(1, 2)
    if host is None or not re.fullmatch(r':[0-9]*', port or ':') or int((port or ':')[1:] or 0) > 65535:
        return None
    if host.startswith('['):
        try:
            return f'[{int(v.ipaddress.IPv6Address(host[1:-1])):x}]'
        except ValueError:
            return None
    data = re.sub(rb'%([0-9A-Fa-f]{2})', lambda found: bytes.fromhex(found[1].decode()),
                  host.encode('utf-8', 'replace'))
    return browser_name(data.decode('utf-8', 'replace'))


DROPPED = re.compile('[\xad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u2060-\u2064\u3164'
                     '\ufe00-\ufe0f\ufeff\uffa0\U000e0100-\U000e01ef]')


def browser_name(name: str) -> Optional[str]:
    """Domain to ASCII (UTS 46, not transitional), near enough, then the forbidden code points and IPv4."""
    name = ''.join(part if part in 'ßς' else unicodedata.normalize('NFKC', part.casefold())
                   for part in DROPPED.sub('', name)).replace('\u3002', '.')
    labels = []
    for label in name.split('.'):
        label = unicodedata.normalize('NFC', label)
        if label.startswith('xn--'):
            try:
                label = label[4:].encode('ascii').decode('punycode')
            except UnicodeError:
                return None
            if label.isascii() or label != unicodedata.normalize('NFKC', label.lower()):
                return None
        labels.append(label if label.isascii() else 'xn--' + label.encode('punycode', 'replace').decode())
    name = '.'.join(labels)
    if not name or re.search(r'[\0-\x20#%/:<>?@\[\\\]^|\x7f]', name):
        return None
    if re.fullmatch(r'(?i)[0-9]+|0x[0-9a-f]*', name.rstrip('.').rpartition('.')[2]) and not name.endswith('..'):
        return browser_ipv4(name[:-1] if name.endswith('.') else name)
    return name.rstrip('.')


def security(domains: Sequence[str] = ('tiktok.com', 'instagram.com'), private: bool = False) -> Any:
    return v.SimpleNamespace(allowed_domains=tuple(domains), allow_private_targets=private, max_url_length=2048)


LISTED, ANY_SITE, ANY_PLACE = security(), security(['*']), security(['*'], private=True)


# Traps: what URL parsers have disagreed about (WPT's urltestdata.json, Orange Tsai's list, FACTS of our own).
TRAPS = [
    r'http://127.0.0.1\@tiktok.com/', r'https://tiktok.com\@evil.com/', r'https://tiktok.com\.evil.com/',
    r'https:\\evil.com\tiktok.com', r'https://evil.com\\tiktok.com/', 'https://tiktok.com@evil.com/',
    'https://tiktok.com:443@evil.com/', 'https://a:b@tiktok.com/', 'https://@tiktok.com/', 'https://:@tiktok.com/',
    'https://tiktok.com%40evil.com/', 'https://tiktok.com%2eevil.com/', 'https://tiktok.com%00.evil.com/',
    'https://evil.com%23.tiktok.com/', 'https://evil.com%2f.tiktok.com/', 'https://%74iktok.com/',
    'https://evil.com#.tiktok.com/', 'https://evil.com?.tiktok.com/', 'https://evil.com;.tiktok.com/',
    'https://evil.com&.tiktok.com/', 'https://tiktok.com\t.evil.com/', 'https://tik\ttok.com/', 'https://tik\ntok.com/',
    'https://tiktok.com\r\n.evil.com/', 'ht\ttps://evil.com/', 'https://tiktok.com\0.evil.com/',
    'https://tiktok.com .evil.com/', 'https://tiktok.com\x7f.evil.com/', 'https://tiktok.com\xa0.evil.com/',
    'https://tiktok.com\u3002evil.com/', 'https://tiktok.com\uff0eevil.com/', 'https://tiktok.com\uff61evil.com/',
    'https://tiktok.com\u2024evil.com/', 'https://tiktok.com\uff0fevil.com/', 'https://tiktok.com\uff20evil.com/',
    'https://tiktok.com\uff03.evil.com/', 'https://tiktok.com\uff1a80/', 'https://tiktok.com\xad/',
    'https://tik\u200btok.com/', 'https://tik\u2060tok.com/', 'https://tiktok\ufe0f.com/', 'https://tik\u034ftok.com/',
    'https://ｔｉｋｔｏｋ.com/', 'https://ⓣⓘⓚⓣⓞⓚ.com/', 'https://tiktoK.com/', 'https://tıktok.com/', 'https://TİKTOK.com/',
    'https://faß.de/', 'https://βόλος.com/', 'https://xn--tiktok-.com/', 'https://xn--tiktok.com/', 'https://xn--.com/',
    'https://xn--a.com/', 'https://xn--zn7c.com/', 'https://xn--fa-hia.de/', 'https://XN--BCHER-KVA.de/',
    'https://bücher.de/', 'https://Bücher.de/', 'https://bu\u0308cher.de/', 'https://例え.jp/', 'https://tiktok.com./',
    'https://tiktok.com../', 'https://.tiktok.com/', 'https://tiktok..com/', 'https://./', 'https:///', 'https://',
    'https:', 'https:tiktok.com/', 'https:/tiktok.com/', 'https:///tiktok.com/', 'https:////evil.com/', '//tiktok.com/',
    'tiktok.com/', '/\\evil.com/', 'https://tiktok.com:/', 'https://tiktok.com:0/', 'https://tiktok.com:00443/',
    'https://tiktok.com:65536/', 'https://tiktok.com:80:443/', 'https://tiktok.com:٤٤٣/', 'https://tiktok.com:+443/',
    'https://tiktok.com:-1/', 'https://tiktok.com:4_43/', 'https://tiktok.com:443 /', 'http://2130706433/',
    'http://0x7f000001/', 'http://0x7f.1/', 'http://0177.0.0.1/', 'http://127.1/', 'http://127.0.0.1./',
    'http://127.0.0.1/', 'http://0/', 'http://0x/', 'http://1.2.3.4.5/', 'http://256.1.1.1/', 'http://1.2.3.08/',
    'http://１２７.０.０.１/', 'http://a.0x1/', 'http://9.9.9.9/', 'http://[::1]/', 'http://[::ffff:127.0.0.1]/',
    'http://[::127.0.0.1]/', 'http://[fe80::1%25eth0]/', 'http://[fe80::1%eth0]/', 'http://[2606:4700::1111]/',
    'http://[2606:4700:0:0:0:0:0:1111]:80/', 'http://[::1/', 'http://::1]/', 'http://[v1.a]/', 'http://[]/',
    'http://[1:2:3:4:5:6:7]/', 'http://[::1]x/', 'ftp://tiktok.com/', 'file:///etc/passwd', 'javascript:alert(1)',
    'data:text/html,x', 'httpss://tiktok.com/', 'hxxps://tiktok.com/', 'http+x://tiktok.com/', 'httpſ://tiktok.com/',
    'https://evil-tiktok.com/', 'https://tiktok.com.evil.com/', 'https://tiktok.comevil.com/', 'https://tiktok.co/',
    'https://com/', 'https://xtiktok.com/', 'https://tiktok.com\ud800/', 'https://tiktok.com/\ud800',
    'https://tiktok.com/\udfff?\ud800', 'https://*.tiktok.com/', 'https://$.tiktok.com/', 'https://_.tiktok.com/',
    'https://-.tiktok.com/', 'https://a_b.tiktok.com/', "https://'.tiktok.com/", 'https://a,b.tiktok.com/',
    'https://~.tiktok.com/', 'https://' + 'a' * 63 + '.tiktok.com/', 'https://' + 'a' * 64 + '.tiktok.com/',
    'https://' + 'a.' * 130 + 'tiktok.com/', 'https://tiktok.com/../../x', 'https://tiktok.com//evil.com/',
    'https://tiktok.com/%2e%2e/', 'https://tiktok.com/@evil.com', 'https://tiktok.com?@evil.com',
    'https://tiktok.com#@evil.com', 'https://tiktok.com/?u=http://evil.com', 'https://tiktok.com/a b',
    'https://tiktok.com/ü?ü#ü', 'https://tiktok.com/<>"{}|^`',
]
SHARED = [  # what arrives, and the canonical links that are in it
    ('https://vm.tiktok.com/ZMabc123/', ['https://vm.tiktok.com/ZMabc123/']),
    ('vm.tiktok.com/ZMabc123', ['https://vm.tiktok.com/ZMabc123']),
    ('vt.tiktok.com/ZSabc/', ['https://vt.tiktok.com/ZSabc/']),
    ('Www.TikTok.com/@a.b_c/video/7123?is_from_webapp=1&sender_device=pc',
     ['https://www.tiktok.com/@a.b_c/video/7123?is_from_webapp=1&sender_device=pc']),
    ('https://www.tiktok.com/t/ZTabc/?k=1', ['https://www.tiktok.com/t/ZTabc/?k=1']),
    ('https://www.tiktok.com/@user/photo/7123', ['https://www.tiktok.com/@user/photo/7123']),
    ('https://www.instagram.com/reel/C1_-x/?igsh=MWx5==', ['https://www.instagram.com/reel/C1_-x/?igsh=MWx5==']),
    ('https://www.instagram.com/reels/C1x/', ['https://www.instagram.com/reels/C1x/']),
    ('https://www.instagram.com/p/C1x-', ['https://www.instagram.com/p/C1x-']),
    ('https://instagram.com/tv/C1x_', ['https://instagram.com/tv/C1x_']),
    ('https://www.instagram.com/stories/some.one/31/', ['https://www.instagram.com/stories/some.one/31/']),
    ('https://www.instagram.com/some.one/reel/C1x/', ['https://www.instagram.com/some.one/reel/C1x/']),
    ('https://www.instagram.com/share/reel/BAx?igsh=1', ['https://www.instagram.com/share/reel/BAx?igsh=1']),
    ('Look at this! https://vm.tiktok.com/ZM1/', ['https://vm.tiktok.com/ZM1/']),
    ('Check out Anna\'s video! #TikTok > https://vm.tiktok.com/ZM1/ Get the app: https://www.tiktok.com/tiktoklite',
     ['https://vm.tiktok.com/ZM1/']),
    ('Schau dir Müllers Video an – „https://vm.tiktok.com/ZM1/“!', ['https://vm.tiktok.com/ZM1/']),
    ('«https://vm.tiktok.com/ZM1»', ['https://vm.tiktok.com/ZM1']),
    ('(https://vm.tiktok.com/ZM1/).', ['https://vm.tiktok.com/ZM1/']),
    ('[a](https://vm.tiktok.com/ZM1)', ['https://vm.tiktok.com/ZM1']),
    ('<https://vm.tiktok.com/ZM1>', ['https://vm.tiktok.com/ZM1']),
    ('**https://vm.tiktok.com/ZM1**', ['https://vm.tiktok.com/ZM1']),
    ('"https://vm.tiktok.com/ZM1",', ['https://vm.tiktok.com/ZM1']),
    ("'https://vm.tiktok.com/ZM1'?!…", ['https://vm.tiktok.com/ZM1']),
    ('https://vm.tiktok.com/ZM1🔥🔥', ['https://vm.tiktok.com/ZM1']),
    ('🔥https://vm.tiktok.com/ZM1/❤️', ['https://vm.tiktok.com/ZM1/']),
    ('看看这个视频https://vm.tiktok.com/ZM1/，太好笑了！', ['https://vm.tiktok.com/ZM1/']),
    ('复制打开：vm.tiktok.com/ZM1。快看', ['https://vm.tiktok.com/ZM1']),
    ('この動画https://vm.tiktok.com/ZM1/面白い', ['https://vm.tiktok.com/ZM1/']),
    ('شاهد هذا \u200fhttps://vm.tiktok.com/ZM1/\u200f', ['https://vm.tiktok.com/ZM1/']),
    ('\u2068https://vm.tiktok.com/ZM1/\u2069', ['https://vm.tiktok.com/ZM1/']),
    ('\ufeffhttps://vm.tiktok.com/ZM1/\u200b', ['https://vm.tiktok.com/ZM1/']),
    ('Смотри https://vm.tiktok.com/ZM1/, класс', ['https://vm.tiktok.com/ZM1/']),
    ('https://vm.tiktok.com/ZM1/\nhttps://vm.tiktok.com/ZM2/\r\nvm.tiktok.com/ZM3',
     [f'https://vm.tiktok.com/ZM{n}' + '/' * (n < 3) for n in (1, 2, 3)]),
    ('https://vm.tiktok.com/ZM1,https://vm.tiktok.com/ZM2;https://vm.tiktok.com/ZM3',
     [f'https://vm.tiktok.com/ZM{n}' for n in (1, 2, 3)]),
    ('https://vm.tiktok.com/ZM1https://vm.tiktok.com/ZM2', [f'https://vm.tiktok.com/ZM{n}' for n in (1, 2)]),
    ('https://www.tiktok.com/login?redirect_url=https://www.tiktok.com/@a/video/1',
     ['https://www.tiktok.com/login?redirect_url=https://www.tiktok.com/@a/video/1']),
    ('HTTPS://VM.TIKTOK.COM/ZM1', ['https://vm.tiktok.com/ZM1']),
    ('http://vm.tiktok.com/ZM1', ['https://vm.tiktok.com/ZM1']),
    ('https://www.tiktok.com/@a(b)/video/1 (https://www.tiktok.com/@a(b))',
     ['https://www.tiktok.com/@a(b)/video/1', 'https://www.tiktok.com/@a(b)']),
    ('https://tiktok.com\nhttps://vm.tiktok.com/1', ['https://tiktok.com/', 'https://vm.tiktok.com/1']),
    ('https://tiktok.com\nNice', []), ('https://tiktok.com\u3002evil.com/x', []),
    ('https://tiktok.com\n.evil.com/x', []), ('me@tiktok.com/x', []), ('https://evil.com/vm.tiktok.com/ZM1', []),
    ('eviltiktok.com/x', []), ('étiktok.com/x', []), ('no link', []), ('', []),
    ('Do you know tiktok.com? Or and/or e.g./i.e.', []), ('https://', []), ('http:// https:// ://', []),
]
# Each option of OPTIONS at least once; what follows it is given to yt-dlp's own parser too.
SAME_AS_YTDLP = [
    ['-f', 'bv*+ba/b'], ['-fmp4'], ['--format=bv*[height<=720][vcodec^=avc1]+ba/b[ext=mp4]'],
    ['-f', 'b[format_note!*="x y"]'], ['-f', '((bv*[fps>?30]/bv) + ba)/(b / w)'], ['-S', 'res:720,+size'],
    ['-S', 'vcodec:h264', '--format-sort', 'res~480,ext:mp4:m4a'], ['--merge-output-format', 'mkv/mp4'],
    ['--prefer-free-formats'], ['--prefer-free-formats', '--no-prefer-free-formats'], ['-r', '50k'],
    ['--limit-rate', '4.2M'], ['--rate-limit=1000000'], ['-r1G'], ['-R', '5'], ['--retries', '0'],
    ['--fragment-retries=7'], ['--extractor-retries', '2'], ['--socket-timeout', '10'], ['-N', '3'],
    ['--concurrent-fragments=1'], ['--user-agent', 'Mozilla/5.0 (X11)'], ['--referer', 'https://a.b/c?d'],
    ['--user-agent=a', '--referer=http://b'], ['-I', '1:3,5'], ['-I', '-1'],
    ['--playlist-items', '::2,7-9,-3::-1,1:inf'], ['--no-playlist'], ['--no-playlist', '--yes-playlist'],
    ['--yes-playlist'], ['-x'], ['--extract-audio', '--audio-format', 'mp3'], ['-x', '--audio-format=best'],
    ['-x', '--audio-format', 'vorbis', '-f', 'ba'], ['--audio-format', 'mp3'], ['--write-subs'],
    ['--write-srt', '--no-write-subs'], ['--no-write-srt'], ['--embed-subs'], ['--write-subs', '--embed-subs'],
    ['--embed-subs', '--no-write-subs'], ['--embed-subs', '--no-embed-subs'], ['--sub-langs', 'en,de-CH,-live_chat'],
    ['--srt-langs', 'en', '--sub-langs=all'], ['--embed-metadata'], ['--add-metadata', '--no-embed-metadata'],
    ['--no-add-metadata'], ['--mtime'], ['--mtime', '--no-mtime'], ['--restrict-filenames'],
    ['--restrict-filenames', '--no-restrict-filenames'],
    ['-x', '--embed-subs', '--embed-metadata', '--audio-format', 'm4a', '-f', 'b', '-N', '2'],
]
ASK_YTDLP = '''
import json, sys
sys.path.insert(0, sys.argv[1])
import yt_dlp
from yt_dlp.options import create_parser
def read(words):
    params = yt_dlp.parse_options(['--ignore-config', *words]).ydl_opts
    return {name: value for name, value in params.items() if name != '_warnings'}
base = read([])
steps = [step['key'] for step in base['postprocessors']]
def differs(words):
    found = {name: value for name, value in read(words).items() if value != base[name]}
    if 'postprocessors' in found:
        found['postprocessors'] = [step for step in found['postprocessors'] if step['key'] not in steps]
    return found
options = [spelling for option in create_parser().option_list for spelling in option._short_opts + option._long_opts]
options += [spelling for group in create_parser().option_groups for option in group.option_list
            for spelling in option._short_opts + option._long_opts]
print(json.dumps({'params': [differs(words) for words in json.load(sys.stdin)], 'options': options}))
'''


@functools.lru_cache(maxsize=None)
def ytdlp_says() -> Dict[str, Any]:
    """What the vendored yt-dlp's own parser makes of SAME_AS_YTDLP, and every option that it knows."""
    ours = [[word for option in v.parse_options(words) for word in option if word] for words in SAME_AS_YTDLP]
    done = subprocess.run([sys.executable, '-I', '-c', ASK_YTDLP, str(ytdlp_folder())],
                          input=json.dumps(SAME_AS_YTDLP + ours), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


USE_YTDLP = '''
import json, sys, time
sys.path.insert(0, sys.argv[1])
import yt_dlp
from yt_dlp.utils import FormatSorter, PlaylistEntries, orderedSet_from_options
given = json.load(sys.stdin)
ydl = yt_dlp.YoutubeDL({'quiet': True}, auto_init=False)
FormatSorter(ydl, [])
kept = sorted(FormatSorter.settings)
formats = [{'format_id': str(n), 'url': 'http://a', 'height': n, 'vcodec': 'h264', 'acodec': 'aac', 'ext': 'mp4',
            'filesize': n, 'tbr': 1.5} for n in range(9)]
worst = []
def timed(what, work):
    began = time.perf_counter()
    work()
    worst.append((time.perf_counter() - began, str(what)[:80]))
for fields in given['sort']:
    ydl.params['format_sort'] = fields
    timed(fields, lambda: sorted(formats, key=FormatSorter(ydl, []).calculate_preference))
strings = [name for name, row in FormatSorter.settings.items() if row.get('convert') == 'string']
for items in given['items']:
    ydl.params['playlist_items'] = items
    timed(items, lambda: list(PlaylistEntries(ydl, {'id': 'x', 'entries': [{'id': str(n)} for n in range(5)]})
                              .get_requested_items()))
for langs in given['langs']:
    timed(langs, lambda: orderedSet_from_options(langs, {'all': ['en', 'de']}, use_regex=True))
for text in given['formats']:
    timed(text, lambda: list(ydl.build_format_selector(text)({
        'formats': formats, 'has_merged_format': False, 'incomplete_formats': False})))
print(json.dumps({'worst': max(worst), 'same': kept == sorted(FormatSorter.settings) and strings == ['id']}))
'''
OWN = 0  # what these see is the owner's, the system's or ours
LARGEST = {  # the longest text that each pattern may see, by the name or the function that has it
    OWN: 'with_output switch_service check_relocation name_pattern site_gaps end_leftovers '
         'host_addresses machine_names mobileconfig operation_of icloud_url '
         'setup_page setup_facts BOOT_ID bucket_address queued_message file_setting delay_list domain_list '
         'http_url proxy_url notify_url location SETTINGS retention HOST_NAME known_output',
    128: 'parse_name UNSAFE whole', 255: 'wheel_fits texts_in Store forget_files content_disposition file_name',
    300: 'SELECTORS GROUP format_spec without_formats', 1000: 'HOSTILE token Attempt NETWORKING check_downloads',
    2000: 'PATTERNS judge_error Notifier runs_here version_key',
    4096: 'DOOR_HEAD parse_size OPTION_VALUES upto byte_rate version_in Vendor MAGIC',
    8192: 'post_url post_facts canonical_host LABEL WEB_LINK AUTHORITY split_url site_of '
          'POST_LINK ADVERTISEMENT',
    16 << 10: 'B_PATH SIGNATURE SIGNED_NAME UUID_PATTERN REQUEST_LINE '
              'FIELD_LINE TARGET HOST_FIELD BAD_PATH DOTS LINE_END BARE_LINE_END body_length check_signature '
              'parse_range',
    64 << 10: 'MARK wanted_members JobFolder YTDLP CURL Reach local_only xml_texts',
    1 << 20: 'LINK PageHead make_cookie COOKIE_FIELDS',
}
ASSIGNED = (ast.Assign, ast.AnnAssign)


def with_pattern(tree: ast.Module) -> List[Tuple[str, str, Any]]:
    """(name, method, pattern) of every use of the module re in the program; a name is a constant's or a function's."""
    found, wrappers = [], {}
    methods: Dict[str, 'set[str]'] = collections.defaultdict(set)
    for use in ast.walk(tree):
        if isinstance(use, ast.Attribute) and isinstance(use.value, ast.Name):
            methods[use.value.id].add(use.attr)
    for node in tree.body:
        name = getattr(node, 'name', None) or ast.unparse(getattr(node, 'targets', [node])[0])
        inside = list(ast.walk(node))
        calls = [call for call in inside if isinstance(call, ast.Call) and call.args]
        if isinstance(node, ASSIGNED) and any(ast.unparse(call.func) == 're.compile' for call in calls):
            used = methods[name] & set(dir(re.compile('')))
            rows = getattr(v, name) if isinstance(getattr(v, name), tuple) else [[getattr(v, name)]]
            found += [(name, method, value) for row in rows for value in row if isinstance(value, re.Pattern)
                      for method in used - {'pattern'} or {'search'}]
            continue
        for call in calls:
            function = ast.unparse(call.func)
            mine = function.startswith('re.') and function[3:].isidentifier() and function != 're.escape'
            if mine and ast.unparse(call.args[0]) == 'pattern':
                wrappers[name] = (function[3:], [arg.arg for arg in node.args.args].index('pattern'))
            elif mine or function in wrappers:
                flags = [ast.unparse(part) for part in [*call.args[1:], *(word.value for word in call.keywords)]
                         if ast.unparse(part).startswith('re.')]
                words = {**vars(v), 'tag': 'Key', 'part': 'a', 'name': 'a', 'fact': '', 'folder': 'a', 'port': ':80$',
                         'url': urlsplit('http://a')}
                method, place = wrappers.get(function, (function[3:], 0))
                found.append((name, method, re.compile(eval(ast.unparse(call.args[place]), words),
                                                       eval(' | '.join(flags) or '0', words))))
    return found


def pumps(pattern: 're.Pattern[Any]') -> List[str]:
    """Texts that bring out what a pattern repeats: its letters, pairs of them, and what its parts match."""
    letters, found, dice = set(), set(), random.Random(1)

    def example(parsed):
        text = ''
        for op, value in parsed:
            op = str(op)
            if op in ('LITERAL', 'IN', 'NOT_LITERAL', 'ANY', 'RANGE', 'CATEGORY'):
                options = value if op == 'IN' else [(op, value)]
                kind, value = dice.choice([option for option in options if str(option[0]) != 'NEGATE'] or [('ANY', 0)])
                letter = {'CATEGORY_SPACE': ' ', 'CATEGORY_DIGIT': '1', 'CATEGORY_WORD': 'a'}.get(str(value), 'x')
                if str(kind) in ('LITERAL', 'RANGE'):
                    letter = chr(value if str(kind) == 'LITERAL' else value[0])
                letters.add(letter)
                text += letter
            elif op == 'BRANCH':
                text += example(dice.choice(value[1]))
            elif op in ('MAX_REPEAT', 'MIN_REPEAT'):
                found.add(example(value[2]))
                text += ''.join(example(value[2]) for _ in range(max(value[0], dice.randrange(min(value[1], 2) + 1))))
            elif op == 'SUBPATTERN':
                text += example(value[-1])
        return text

    parser = getattr(re, "_parser", None) or importlib.import_module("sre_parse")  # its name since 3.11, and before
    parsed = parser.parse(pattern.pattern, pattern.flags)
    for cut in range(len(parsed)):
        found |= {example(parsed[cut:]), example(parsed[:cut])}
    for _ in range(12):
        found.add(example(parsed))
    some = sorted(letters)[:9]
    return sorted(found - {''} | {a + b for a in ['', *some] for b in some})


TOO_SLOW = 60  # times of reading: there one stops


def seconds_of(pattern: 're.Pattern[Any]', method: str, text: Any, limit: float) -> float:
    """How long the processor looks at the text; stops near the limit."""
    def late(*_):
        raise TimeoutError
    old, patience = signal.signal(signal.SIGALRM, late), 3 * limit
    try:
        while True:
            began = time.thread_time()
            try:  # a timer of the processor would make its clock coarse
                signal.setitimer(signal.ITIMER_REAL, patience)
                if method in ('match', 'fullmatch', 'search'):
                    getattr(pattern, method)(text)
                else:
                    collections.deque(pattern.finditer(text), 0)
                took = time.thread_time() - began
                signal.setitimer(signal.ITIMER_REAL, 0)
                return took
            except TimeoutError:
                patience *= 2  # others may have had the processor meanwhile
                if time.thread_time() - began >= limit:
                    return limit
    finally:
        signal.signal(signal.SIGALRM, old)


@functools.lru_cache(maxsize=None)
def seconds_of_reading(size: int) -> float:
    """How long the processor takes to read a text of this size once in plain Python."""
    began = time.thread_time()
    sum(letter == 'y' for letter in 'x' * size)
    return time.thread_time() - began + 1e-4


def times_of_reading(pattern: 're.Pattern[Any]', method: str, pump: str, size: int) -> float:
    """How long the pattern takes for a text of this size, as a multiple of reading it once."""
    once, worst = seconds_of_reading(size), 0.0
    for begin, end in (('', '\0'), ('x', '!\n')):
        text = begin + pump * ((size - 3) // len(pump)) + end
        if isinstance(pattern.pattern, bytes):
            text = text.encode('latin-1', 'replace')
        took = seconds_of(pattern, method, text, TOO_SLOW * once)
        if took > 10 * once:  # it may have been the machine
            took = min(took, seconds_of(pattern, method, text, TOO_SLOW * once))
        worst = max(worst, took / once)
        if worst >= TOO_SLOW:
            break
    return worst


def slowest(pattern: 're.Pattern[Any]', method: str, size: int) -> Tuple[float, str]:
    """The worst text of this size: times_of_reading, and what it repeats."""
    def rank(some, size):
        found = []
        for pump in some:
            found.append((times_of_reading(pattern, method, pump, size), pump))
            if found[-1][0] >= TOO_SLOW:
                break
        return sorted(found, reverse=True)
    return rank([pump for _, pump in rank(pumps(pattern), min(size, 8192))[:4]], size)[0]


COOKIE_ROWS = [('.instagram.com', 'TRUE', '/', 'TRUE', '4000000000', 'sessionid', 'secret'),
               ('instagram.com', 'TRUE', '/', 'FALSE', '-1', 'csrftoken', 'secret2'),  # no dot
               ('.instagram.com', 'FALSE', '/', 'TRUE', '', 'mid', 'secret3')]
ODD_ROWS = ['.instagram.com\tTRUE\t/\tTRUE\tsoon\tbad\tsecret', 'nonsense', '', '#', 'a\tb', '\t' * 6,
            '.instagram.com\tTRUE\t/\tTRUE\t1' + '0' * 5000 + '\tbad\tsecret',
            '.instagram.com\tTRUE\t/\tTRUE\t0\tb;d\tsecret', '.youtube.com\tTRUE\t/\tTRUE\t0\tSID\tsecret']


def cookie_files() -> Any:
    """The three cookies of COOKIE_ROWS as people have them, odd rows between."""
    text = '# Netscape HTTP Cookie File\n' + '\n'.join(['\t'.join(row) for row in COOKIE_ROWS] + ODD_ROWS)
    yield 'as it should be', text.encode()
    yield 'CRLF, BOM', b'\xef\xbb\xbf' + text.replace('\n', '\r\n').encode()
    yield 'UTF-16', text.encode('utf-16')
    yield 'UTF-16 without BOM', text.encode('utf-16-be')
    yield 'HttpOnly', text.replace('\n.instagram', '\n#HttpOnly_.instagram').encode()
    yield 'Latin-1 beside', b'# K\xfcche\n' + text.encode()
    yield 'blanks for tabs', '\n'.join('   '.join(field or '0' for field in row) for row in COOKIE_ROWS).encode()
    items = [{'domain': row[0], 'path': row[2], 'secure': row[3] == 'TRUE', 'name': row[5], 'value': row[6],
              'expirationDate': float(row[4] or 0)} for row in COOKIE_ROWS]
    yield 'JSON', json.dumps([*items, {}, 5, {**items[0], 'name': None}]).encode()
    yield 'JSON in an object', b'\xef\xbb\xbf' + json.dumps({'url': 'x', 'cookies': items}).encode()
    yield 'JSON of Cookie Quick Manager', json.dumps([
        {'Host raw': f'https://{row[0]}/', 'Path raw': row[2], 'Send for raw': 'true', 'Name raw': row[5],
         'Content raw': row[6], 'Expires raw': row[4]} for row in COOKIE_ROWS]).encode()


class CookiesTest(unittest.TestCase):
    """A configuration with a file of cookies that is not there yet."""

    def setUp(self):
        self.file = new_folder() / 'mine.txt'
        self.config = own_config(downloader_cookies_file=self.file)
        self.cookies = v.Cookies(self.config)
        vendored()
        v.import_ytdlp(v.Vendor(HERE / 'vendor').current())

    def loaded(self, cookies):
        """What yt-dlp makes of it."""
        from yt_dlp.cookies import YoutubeDLCookieJar
        jar = YoutubeDLCookieJar(cookies.jar('https://www.instagram.com/p/x'))
        with contextlib.redirect_stderr(io.StringIO()) as said:
            jar.load()
        self.assertEqual(said.getvalue(), '')
        return sorted((one.name, one.value, one.domain.lstrip('.'), one.expires) for one in jar)


# ---------- a package index of our own ----------------------------------------------------

CURL_PARTS = (('curl-cffi', '0.17.0', 'curl_cffi/__init__.py'), ('cffi', '2.1.1', '_cffi_backend.so'))
STUB = {'__init__.py': ''}  # for tests of what happens around a yt-dlp; LENIENT takes it for one
BROKEN = {'__init__.py': 'import a_module_that_is_not_there\n'}
LENIENT = '''
import os, sys
assert 'VIDEOSERVER_API_KEYS' not in os.environ, 'our secrets are no business of a helper process'
sys.path.insert(0, sys.argv[3])
from yt_dlp.version import __version__
if sys.argv[5:6] > [''] and 'broken' in open(sys.argv[5] + '/curl_cffi/__init__.py').read():
    sys.exit('the door is passed by')
print(__version__)
'''
REAL_TRY_OUT = v.TRY_OUT


def be_lenient(test: unittest.TestCase) -> None:
    """Lets STUB pass for a yt-dlp in this test. Trying that out takes nothing of the program, so it is not imported."""
    real = v.bare_python

    def apart(script: str, *words: str) -> Tuple[str, ...]:
        line = real(script, *words)
        return (*line[:line.index('-c') + 1], 'import sys\n' + script, *line[-2 - len(words):]) \
            if script is LENIENT else line
    install = v.INSTALL.replace('try:', f'v.TRY_OUT = {LENIENT!r}\ntry:')
    for name, value in (('TRY_OUT', LENIENT), ('INSTALL', install), ('bare_python', apart)):
        patched(test, unittest.mock.patch.object(v, name, value))


@functools.lru_cache(maxsize=None)
def real_files() -> Dict[str, str]:
    """The sources of the vendored yt-dlp, to be put on the index under another version."""
    vendored()
    root = v.Vendor(HERE / 'vendor').current() / 'yt_dlp'
    return {file.relative_to(root).as_posix(): file.read_text('utf-8') for file in root.rglob('*.py')}


USED_FILES = re.compile(r'(?!extractor/)|extractor/youtube/|extractor/(__init__|adobepass|afreecatv|common\w*|'
                        r'extractors|generic|instagram|lazy_extractors|openload|tiktok)\.py')


def some_files(**changes: Tuple[str, str]) -> Dict[str, str]:
    """The same without the thousand extractors that no test uses. Changes: extractor__tiktok=(there, then)."""
    files = {name: text for name, text in real_files().items() if USED_FILES.match(name)}
    for key, (there, then) in changes.items():
        name = key.replace('__', '/') + '.py'
        assert there in files[name], (name, there)
        files[name] = files[name].replace(there, then)
    return files


def make_wheel(version: str, files: Dict[str, str], more: Sequence[Any] = ()) -> bytes:
    """A pure wheel of yt_dlp `version`; `more` are (ZipInfo or name, text) put in as they are."""
    stream = io.BytesIO()
    info = f'yt_dlp-{version}.dist-info'
    with zipfile.ZipFile(stream, 'w') as archive:
        own = re.sub('(?m)^__version__ = .*$', f'__version__ = {version.split(".dev")[0]!r}',
                     files.get('version.py', '__version__ = 0'))
        for name, text in {**files, 'version.py': own}.items():
            archive.writestr(f'yt_dlp/{name}', text)
        archive.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: yt-dlp\nVersion: {version}\n' + ''.join(
            f"Requires-Dist: {name}=={pinned}; (implementation_name == 'cpython') and extra == 'pin-curl-cffi'\n"
            for name, pinned, _ in CURL_PARTS))
        archive.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        for name, text in more:
            archive.writestr(name, text)
        archive.writestr(f'{info}/RECORD', '')
    return stream.getvalue()


def unpack_compiled(version: str, files: Dict[str, str], folder: Path) -> None:
    """A release as an installation leaves it. The compiled form of a file that is as in the vendored yt-dlp is taken
    from there: to Python it is that of the same source if size and time are the same."""
    zipfile.ZipFile(io.BytesIO(make_wheel(version, files))).extractall(folder)
    root = v.Vendor(HERE / 'vendor').current() / 'yt_dlp'
    for name in [name for name, text in files.items() if text == real_files()[name] and name != 'version.py']:
        source, there = root / name, Path(importlib.util.cache_from_source(str(folder / 'yt_dlp' / name)))
        with contextlib.suppress(FileNotFoundError):  # it is compiled when it is used
            there.parent.mkdir(exist_ok=True)
            shutil.copy(importlib.util.cache_from_source(str(source)), there)
            shutil.copystat(source, folder / 'yt_dlp' / name)


@functools.lru_cache(maxsize=None)
def no_pip() -> Path:
    """A PYTHONPATH with which `python -m pip` fails as it does on a Python without it."""
    folder = new_folder()
    (folder / 'pip.py').write_text('raise SystemExit("No module named pip")\n')
    return folder


class Index(LocalServer):
    """PyPI on 127.0.0.1, as far as yt-dlp is concerned: the JSON, the simple page, the wheels."""

    def __init__(self) -> None:
        self.wheels: Dict[str, bytes] = {}   # by file name
        self.files: Dict[str, List[Dict[str, Any]]] = {}  # by version, as in the JSON
        self.packages = {'yt-dlp': self.files}
        self.asked: List[Tuple[str, str]] = []  # (path, first word of the User-Agent)
        self.json_is_there = True
        self.stall = threading.Event()  # set: wheels are let through
        self.stall.set()
        super().__init__(IndexHandler)

    def add(self, version: str, files: Dict[str, str] = STUB, requires: str = '>=3.9', yanked: bool = False,
            more: Sequence[Any] = (), wrong_hash: bool = False) -> None:
        name, wheel = f'yt_dlp-{version}-py3-none-any.whl', make_wheel(version, files, more)
        digest = hashlib.sha256(wheel).hexdigest()
        self.wheels[name] = wheel + b'\0' if wrong_hash else wheel
        self.files[version] = [{'filename': name, 'url': f'../../wheels/{name}', 'requires_python': requires,
                                'yanked': yanked, 'digests': {'sha256': digest}}]

    def add_curl(self, tags: str = '', text: str = '', wrong_hash: bool = False) -> None:
        """Puts curl_cffi and cffi on the index, as wheels for this Python and machine or these tags."""
        system, name = v.machine()
        python = f'cp3{sys.version_info[1]}'
        for package, release, file in CURL_PARTS:
            names = f'{package.replace("-", "_")}-{release}'
            stream = io.BytesIO()
            with zipfile.ZipFile(stream, 'w') as archive:
                for entry in (file, f'{names}.dist-info/METADATA', 'elsewhere/x.py'):
                    archive.writestr(entry, text)
            wheel = f'{names}-{tags or f"{python}-{python}-{system}_2_17_{name}"}.whl'
            self.wheels[wheel] = stream.getvalue() + b'\0' * wrong_hash
            self.packages[package] = {release: [
                {'filename': name, 'url': f'../../wheels/{name}', 'requires_python': '', 'yanked': False,
                 'digests': {'sha256': hashlib.sha256(stream.getvalue()).hexdigest()}}
                for name in (f'{names}.tar.gz', wheel)]}

    def fetched(self, version: str) -> List[str]:
        return [agent for path, agent in self.asked if path.startswith(f'/wheels/yt_dlp-{version}-')]

    def end(self) -> None:
        self.stall.set()
        super().end()


class WithIndex(unittest.TestCase):
    """An index and a folder of each test's own, and no pip; what is published need only look like a yt-dlp."""

    def setUp(self) -> None:
        self.index = Index()
        self.addCleanup(self.index.end)
        self.folder = new_folder()
        self.vendor = v.Vendor(self.folder, self.index.url)
        be_lenient(self)
        self.environment(PYTHONPATH=str(no_pip()), VIDEOSERVER_API_KEYS='secret')

    def environment(self, **names: str) -> None:
        """Sets variables until the end of the test."""
        patched(self, unittest.mock.patch.dict(os.environ, names))

    def install(self, version: str, *files: Any, **more: Any) -> None:
        """Publishes a release, which is taken."""
        self.index.add(version, *files, **more)
        self.assertEqual(self.vendor.install(), version)

    def with_pip(self) -> None:
        if importlib.util.find_spec('pip') is None:
            self.skipTest('this Python has no pip')
        self.environment(PYTHONPATH='', PIP_NO_CACHE_DIR='1')

    def child(self) -> 'subprocess.Popen[bytes]':
        """Another process that installs into the same folder."""
        line = v.bare_python(v.INSTALL, str(self.folder), self.index.url, '600', 'stable', 'False')
        return subprocess.Popen(line, stderr=subprocess.DEVNULL)

    def leftovers(self) -> List[str]:
        return sorted(path.name for path in self.folder.iterdir()
                      if path.name not in ('.lock', f'current-{v.PYTHON}'))


class FreshnessTest(WithIndex):
    """What the daemon has of yt-dlp, and what it thinks of that."""

    def setUp(self) -> None:
        super().setUp()
        patched(self, unittest.mock.patch.dict(v.IMPORTED, folder=None))

    def freshness(self, automatic: bool = True, channel: str = 'stable') -> Any:
        settings = SimpleNamespace(auto_update=automatic, channel=channel)
        return v.Freshness(self.vendor, settings)

    def installed(self, *versions: str, channel: str = 'stable') -> Any:
        """A Freshness whose process has imported the last of these, which were installed one after the other. With
        all but that one, two sites have worked."""
        for version in versions:
            if self.vendor.version():
                self.vendor.remember(sites=['instagram.com', 'tiktok.com'])
            self.install(version)
        v.IMPORTED['folder'] = self.vendor.current()
        return self.freshness(channel=channel)


class IndexHandler(QuietHandler):
    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get('User-Agent', '').split('/')[0]))
        body = self.body()
        self.reply(200 if body else 404, body)

    def body(self) -> bytes:
        server = self.server
        name = re.sub('^/pypi/(.*)/json$', r'\1', self.path)
        if name in server.packages and server.json_is_there:
            return json.dumps({'releases': server.packages[name]}).encode()
        if self.path == '/simple/yt-dlp/':
            return ''.join(f'<a href="/wheels/{file["filename"]}#sha256={file["digests"]["sha256"]}" '
                           f'data-requires-python="{file["requires_python"].replace(">", "&gt;")}">'
                           f'{file["filename"]}</a>\n' for files in server.files.values() for file in files).encode()
        if self.path.startswith('/wheels/'):
            server.stall.wait(20)
            return server.wheels.get(self.path[len('/wheels/'):], b'')
        return b''


HURRY = {'RETRY_GAPS': (0.5, 1), 'CARE_SECONDS': 0.2, 'HANG_SECONDS': 1.0}


class FreshDaemon(Daemon):
    """A daemon in a hurry to update from `index`, with the yt-dlp `files` as 9999.1.1 to begin with."""

    def __init__(self, index: Index, files: Optional[Dict[str, str]] = None, checked: float = 0, **options: Any):
        super().__init__(start=False, vendor=False, hurry={**HURRY, 'INDEX': index.url}, **options)
        self.configure(downloader={'ytdlp_directory': 'vendor', 'auto_update': 'on'})
        self.change_env({'PYTHONPATH': str(no_pip())})
        self.vendor = v.Vendor(self.folder / 'vendor', index.url)
        if files:
            self.put('9999.1.1', files, checked=checked)
        self.start()

    def put(self, version: str, files: Dict[str, str], **state: Any) -> None:
        unpack_compiled(version, files, self.vendor.folder / version)
        with self.vendor.locked():  # the server may be writing the note about what it uses
            self.vendor.remember(version=version, **state)

    def health(self) -> Dict[str, Any]:
        return self.client.get('/api/v1/health').json


def starts(daemon: Daemon) -> int:
    return daemon.log().count(': listening on ')


class FreshDaemonTest(DaemonTest):
    """Daemons that take their yt-dlp from an index of our own."""
    settings = None

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.index = Index()
        cls.addClassCleanup(cls.index.end)

    def setUp(self) -> None:
        self.index.files.clear()
        self.index.json_is_there = True
        self.addCleanup(self.index.stall.set)

    def fresh_daemon(self, files: Optional[Dict[str, str]] = None, **options: Any) -> FreshDaemon:
        daemon = FreshDaemon(self.index, files, site=self.site, **options)
        self.addCleanup(daemon.close)
        self.addCleanup(self.report, daemon)
        return daemon


# ---------- bucket and notices ------------------------------------------------------------
# AWS's published vectors of Signature 4; OpenStack Swift, which verifies signatures, behind a relay that can
# lose, stall and refuse; a webhook.

SUITE = v.Keys('AKIDEXAMPLE', 'wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY', 'us-east-1', 'service')
SUITE_NOW = 1440938160  # 20150830T123600Z
UNRESERVED = '-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz'
SUITE_CASES = [  # AWS's Signature 4 test suite: name, method, path, query, headers, body, signature
    ('get-vanilla', 'GET', '/', (), {}, b'', '5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31'),
    ('get-utf8', 'GET', '/%E1%88%B4', (), {}, b'',
     '8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85'),
    ('get-space', 'GET', '/example%20space/', (), {}, b'',
     '652487583200325589f1fba4c7e578f72c47cb61beeca81406b39ddec1366741'),
    ('get-unreserved', 'GET', '/' + UNRESERVED, (), {}, b'',
     '07ef7494c76fa4850883e2b006601f940f8a34d404d0cfa977f52a65bbf5f24f'),
    ('get-vanilla-query-order-key-case', 'GET', '/', (('Param2', 'value2'), ('Param1', 'value1')), {}, b'',
     'b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500'),
    ('get-vanilla-query-order-key', 'GET', '/', (('Param1', 'value2'), ('Param1', 'Value1')), {}, b'',
     'eedbc4e291e521cf13422ffca22be7d2eb8146eecf653089df300a15b2382bd1'),
    ('get-vanilla-query-unreserved', 'GET', '/', ((UNRESERVED, UNRESERVED),), {}, b'',
     '9c3e54bfcdf0b19771a7f523ee5669cdf59bc7cc0884027167c21bb143a40197'),
    ('get-vanilla-utf8-query', 'GET', '/', (('\u1234', 'bar'),), {}, b'',
     '2cdec8eed098649ff3a119c94853b13c643bcf08f8b0a1d91e12c9027818dd04'),
    ('get-header-value-trim', 'GET', '/', (), {'My-Header1': ' value1', 'My-Header2': ' "a   b   c"'}, b'',
     'acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736'),
    ('post-vanilla', 'POST', '/', (), {}, b'', '5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b'),
    ('post-x-www-form-urlencoded', 'POST', '/', (), {'Content-Type': 'application/x-www-form-urlencoded'},
     b'Param1=value1', 'ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a'),
]
S3_DOCS = v.Keys('AKIAIOSFODNN7EXAMPLE', 'wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY', 'us-east-1')
S3_DOCS_NOW = 1369353600  # 20130524T000000Z
S3_DOCS_CASES = [  # "Signature Calculations for the Authorization Header", Amazon S3 API Reference
    ('GET object', 'GET', '/test.txt', (), {'Range': 'bytes=0-9'}, b'',
     'f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41'),
    ('PUT object', 'PUT', '/test%24file.text', (), {
        'Date': 'Fri, 24 May 2013 00:00:00 GMT', 'x-amz-storage-class': 'REDUCED_REDUNDANCY'},
     b'Welcome to Amazon S3.', '98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd'),
    ('GET bucket lifecycle', 'GET', '/', (('lifecycle', ''),), {}, b'',
     'fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543'),
    ('GET bucket', 'GET', '/', (('prefix', 'J'), ('max-keys', '2')), {}, b'',
     '34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7'),
]
S3_DOCS_PRESIGNED = (
    'https://examplebucket.s3.amazonaws.com/test.txt?X-Amz-Algorithm=AWS4-HMAC-SHA256'
    '&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1%2Fs3%2Faws4_request'
    '&X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host'
    '&X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404')


def publish_config(**s3) -> v.Config:
    """A configuration with an own output folder and these values in [s3]."""
    folder = new_folder()
    (folder / 'out').mkdir()
    values = {'endpoint': 'http://127.0.0.1:1', 'bucket': 'videos', **s3}
    env = {f'VIDEOSERVER_S3_{key.upper()}': value for key, value in values.items()}
    env['VIDEOSERVER_DOWNLOADS_OUTPUT_DIRECTORY'] = str(folder / 'out')
    env.update(AWS_ACCESS_KEY_ID='test:tester', AWS_SECRET_ACCESS_KEY='testing')
    config = v.load_config(None, env)
    config.folder = folder
    return config


class Relay:
    """A TCP relay in front of a server: ends TLS if told so, counts what clients send, and loses
    or stalls connections once `limit` bytes have come from a client."""

    def __init__(self, port: int, tls: Optional[ssl.SSLContext] = None):
        self.target, self.tls, self.received = port, tls, 0
        self.limit: Optional[int] = None
        self.stall = False  # at the limit: stay silent instead of hanging up
        self.stalled = threading.Event()
        self._open: List[socket.socket] = []
        self._listener = socket.create_server(('127.0.0.1', 0))
        self.port = self._listener.getsockname()[1]
        self.url = f'http{"s" if tls else ""}://127.0.0.1:{self.port}'
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, client):
        with contextlib.suppress(OSError):
            client = self.tls.wrap_socket(client, server_side=True) if self.tls else client
            self._open.append(client)
            with client, socket.create_connection(('127.0.0.1', self.target)) as server:
                self._open.append(server)
                threading.Thread(target=self._pump, args=(server, client), daemon=True).start()
                self._pump(client, server, count=True)

    def _pump(self, source, sink, count=False):
        with contextlib.suppress(OSError):
            while True:
                block = source.recv(65536)
                self.received += len(block) * count
                if count and self.limit is not None and self.received > self.limit:
                    if self.stall:
                        self.stalled.set()
                        threading.Event().wait(30)
                    break
                if not block:
                    break
                sink.sendall(block)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(end, socket.SHUT_RDWR)

    def close(self):
        for end in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(end, socket.SHUT_RDWR)
            end.close()


class Swift:
    """OpenStack Swift's S3: it verifies signatures. See .ci/s3server."""

    python = '/usr/bin/python3'  # Debian's, which Debian's Swift belongs to
    installed = shutil.which('swift-proxy-server') is not None

    def __init__(self, folder: Path):
        self.folder = folder
        self.start()

    def start(self):
        self.process = subprocess.Popen([self.python, str(HERE / '.ci/s3server'), str(self.folder)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.port = json.loads(self.process.stdout.readline())['port']
        self.url = f'http://127.0.0.1:{self.port}'

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@functools.lru_cache(maxsize=None)
def swift() -> Swift:
    """The one of this run, with a bucket `videos`."""
    if not Swift.installed:
        raise unittest.SkipTest('OpenStack Swift is not installed')
    one = Swift(new_folder())
    atexit.register(one.kill)
    v.Bucket(publish_config(endpoint=one.url))._call('PUT', '')
    return one


def fetch(url: str) -> Tuple[int, Any, bytes]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)
    connection.request('GET', f'{parts.path}?{parts.query}')
    response = connection.getresponse()
    with contextlib.closing(connection):
        return response.status, response.headers, response.read()


PART = 256 << 10  # bytes; in place of 16 MB


class WithBucket(unittest.TestCase):
    """A bucket `videos` at a real S3 server behind a relay, and files to put there."""
    together = 'buckets'  # one S3 server

    @classmethod
    def setUpClass(cls):
        cls.swift = swift()
        cls.addClassCleanup(v.log.setLevel, v.log.level)
        v.log.setLevel('CRITICAL')  # it warns of each failure, and most of these tests are failures

    def setUp(self):
        patched(self, unittest.mock.patch.multiple(v, MULTIPART_ABOVE=2 * PART, PART_SIZE=PART))
        self.relay = self.new_relay()
        self.config = self.new_config()
        self.output = self.config.downloads.output_directory
        self.bucket = self.new_bucket()

    def new_config(self):
        return publish_config(endpoint=self.relay.url, prefix=self.id().rpartition('.')[2] + '/')

    def new_relay(self, tls=None):
        relay = Relay(self.swift.port, tls)
        self.addCleanup(relay.close)
        return relay

    def tls_relay(self):
        """(CA, relay) of one that ends TLS."""
        ca, context = self.config.folder / 'cert.pem', ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self_signed(ca, ca.with_name('key.pem'), 'IP:127.0.0.1')
        context.load_cert_chain(ca, ca.with_name('key.pem'))
        return ca, self.new_relay(context)

    def new_bucket(self, **s3):
        """A bucket object as a new process has it."""
        for key, value in s3.items():
            setattr(self.config.s3, key, value)
        return v.Bucket(self.config)

    def file(self, name='cat_1.mp4', size=300_000):
        path = self.output / name
        path.write_bytes(os.urandom(size))
        return path

    def key(self, path):
        return self.bucket.key('7f', path.name)

    def put(self, path, bucket=None):
        (bucket or self.bucket).put(path, self.key(path), 'video/mp4')

    def refused(self, path, bucket=None):
        with self.assertRaises(v.Trouble) as caught:
            self.put(path, bucket)
        self.assertNotIn('\n', str(caught.exception))
        return caught.exception

    def stored(self, path):
        """What the bucket holds of it, fetched by a presigned link."""
        return fetch(self.bucket.presign(self.key(path), path.name, 60, time.time()))

    def uploads(self):
        """Ids of the unfinished uploads in the bucket."""
        _, answer = self.bucket._call('GET', '', (('uploads', ''), ('prefix', self.config.s3.prefix)))
        return v.xml_texts(answer, 'UploadId')


class WithUploader(WithBucket):
    """A store of finished downloads, and what brings their files into the bucket."""
    numbers = itertools.count()

    def setUp(self):
        super().setUp()
        self.store = open_store(self, upload=['finish'])
        self.uploader = self.new_uploader()

    def new_uploader(self):
        uploader = v.Uploader(self.config, self.bucket, self.store)
        self.addCleanup(lambda: uploader.thread.is_alive() and uploader.stop())
        return uploader

    def finish(self, *names, size=300_000, now=0):
        """The id of a download that has finished with these files."""
        media = tuple(v.MediaFile(self.file(name, size).name, size, 'video/mp4') for name in names)
        item = parsed({'url': tiktok_link(next(self.numbers))}, self.config.security)
        id = self.store.add_many([item], now)[0].id
        self.store.end('finish', self.store.claim(id, now), v.Outcome('done', title='a', files=media), now, self.output)
        return id

    def copy(self, id):
        return self.store.get(id)['s3_state']

    def due(self):
        return [tuple(row) for row in self.store.read('SELECT kind, attempts, due FROM outbox ORDER BY due, id')]

    def link(self, id, name):
        return self.bucket.presign(self.bucket.key(id, name), name, 60, time.time())


class CopiesTest(DaemonTest):
    """A daemon, not started yet, with a bucket behind a relay."""
    settings = None
    together = 'buckets'

    @classmethod
    def setUpClass(cls):
        cls.swift = swift()
        super().setUpClass()

    def setUp(self):
        self.relay = Relay(self.swift.port)
        self.addCleanup(self.relay.close)
        self.daemon = Daemon(self.site, start=False, env={
            'VIDEOSERVER_S3_ENDPOINT': self.relay.url, 'VIDEOSERVER_S3_BUCKET': 'videos',
            'AWS_ACCESS_KEY_ID': 'test:tester', 'AWS_SECRET_ACCESS_KEY': 'testing'})
        self.addCleanup(self.daemon.close)

    def public_url(self, id):
        return self.daemon.client.get(f'/getVideoDownloadPublicURL?videoDownloadUUID={id}&URLTypeEnum=S3')

    def copied(self, id, state='stored'):
        return self.daemon.wait_for(id, lambda row: (row['s3'] or {}).get('state') == state,
                                    120)  # its gaps double


def serve_blocks(door: socket.socket, blocks: Sequence[bytes], pause: float, gone: threading.Event) -> None:
    """Answers one client with these blocks, a pause between them, until `gone`."""
    with door.accept()[0] as client, contextlib.suppress(OSError):
        client.recv(65536)
        for block in blocks:
            client.sendall(block)
            gone.wait(pause)


class Listener(LocalServer):
    """Who is notified: keeps what is POSTed, answers with the statuses in `answers`, then 200."""

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers['Content-Length']))
            self.server.told.append((self.path, self.headers, body))
            self.reply(self.server.answers.pop(0) if self.server.answers else 200)

    def __init__(self, test: unittest.TestCase):
        self.told: List[Any] = []
        self.answers: List[int] = []
        super().__init__(self.Handler, test)


# ---------- exports and finished files ----------------------------------------------------

def tiktok_export(favorites: Sequence[str] = (), likes: Sequence[str] = (), history: Sequence[str] = (),
                  old: bool = False) -> bytes:
    """TikTok's export as JSON, in its layout of before January 2026 or after."""
    lists = {'Favorite Videos': {'FavoriteVideoList': [{'Date': 'x', 'Link': link} for link in favorites]},
             'Like List': {'ItemFavoriteList': [{'date': 'x', 'link': link} for link in likes]},
             'Favorite Sounds': {'FavoriteSoundList': [{'Link': 'https://www.tiktok.com/music/x-7'}]}}
    watched = {'VideoList': [{'Date': 'x', 'Link': link} for link in history]}
    found = {'Profile': {'Photo': 'https://www.tiktok.com/@me/photo/1'}, 'Likes and Favorites': lists,
             'Your Activity': {'Watch History': watched}}
    if old:
        found = {'Activity': {**lists, 'Video Browsing History': watched}}
    return json.dumps(found, indent=1).replace('/', '\\/' if old else '/').encode()


def zipped(files: Dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return target.getvalue()


def shared_links(count: int, start: int = 7_100_000_000_000_000_000) -> List[str]:
    """Links as TikTok's export has them, to posts that are not there."""
    return [f'https://www.tiktokv.com/share/video/{start + number}/' for number in range(count)]


class ImportTest(DaemonTest):
    """Sends exports to the daemon and follows them."""

    def send(self, data: bytes, name: str = 'export.zip', daemon: Any = None) -> Answer:
        return (daemon or self.daemon).client.post(f'/api/v1/imports?name={name}', data,
                                                   Content_Type='application/octet-stream')

    def change(self, row: Dict[str, Any], verb: str, daemon: Any = None, **fields: Any) -> Answer:
        answer = (daemon or self.daemon).client.post(f'/api/v1/imports/{row["import_id"]}/{verb}', fields)
        self.assertTrue(answer.json['message'], answer)
        return answer

    def wait_done(self, row: Dict[str, Any], daemon: Any = None, **wanted: int) -> Dict[str, Any]:
        """The import, once nothing is left of it."""
        client, found = (daemon or self.daemon).client, {}

        def ended() -> bool:
            found.update(next(other for other in client.get('/api/v1/imports').json['imports']
                              if other['import_id'] == row['import_id']))
            return not found['left']
        wait_until(ended, 30, lambda: f'the import ends, it is {found}')
        return found


class ShareTest(DaemonTest):
    """Shares as a Shortcut does."""

    def address(self, name: str, key: str = 'erster-schlüssel') -> str:
        return f'/share/{quote(name, safe="")}.{v.sign_name(key, unicodedata.normalize("NFC", name))}'

    def share(self, body: Any, kind: str = 'text/plain', name: str = 'phone', client: Any = None,
              **headers: str) -> Tuple[int, str]:
        data = body if isinstance(body, bytes) else body.encode()
        status, fields, said = (client or self.daemon.client).post(
            self.address(name), data, Content_Type=kind, **headers)
        self.assertEqual(fields['Content-Type'], 'text/plain; charset=utf-8')
        return status, said.decode()


HARD_NAMES = [
    'cat.mp4', 'Grüße – 猫 🐈‍⬛ #1 50% "a+b" & c?_7.mp4', "l'été; a=b, (x)~!*.mp4", 'שלום_1.mp4', 'e\u0301_1.mp4']
FILES_KEY = 'sesame'
GIGABYTES_4 = 4 << 30


def parsed(fields: Dict[str, Any], security: Any) -> v.Submission:
    """The first good link in `url`; raises the refusal of the first one if there is none."""
    found = [item for _, item in v.parse_batch(fields, security, 'url')[0]]
    for item in found:
        if isinstance(item, v.Submission):
            return item
    raise found[0]


def finished(daemon: Daemon, *files: Tuple[str, int]) -> str:
    """The id of a completed download of files (name, size), stored while `daemon` is not running."""
    store, now = v.Store(daemon.database), int(time.time())
    daemon.output.mkdir(parents=True, exist_ok=True)
    daemon.database.parent.mkdir(parents=True, exist_ok=True)
    store.open()
    fields = {'url': tiktok_link(time.monotonic_ns()), 'client_id': 'test'}
    id = store.add_many([parsed(fields, daemon.config.security)], now)[0].id
    media = tuple(v.MediaFile(name, size, v.media_type(name)) for name, size in files)
    store.end('finish', store.claim(id, now), v.Outcome('done', title='T', files=media), now, daemon.output)
    store.close()
    for name, size in files:
        with open(daemon.output / name, 'wb') as file:
            file.write(random.Random(name).getrandbits(8 << 16).to_bytes(1 << 16, 'big')[:size])
            file.truncate(size)
    return id


class FilesTest(unittest.TestCase):
    """A daemon with finished downloads; no site, no yt-dlp."""
    env: Dict[str, Any] = {}
    kinds = {'clip': 'cat_1.mp4', 'empty': 'empty_1.mp4', 'html': 'page_1.html', 'gone': 'gone_1.mp4',
             'link': 'link_1.mp4', 'pipe': 'pipe_1.mp4', 'folder': 'folder_1.mp4', 'huge': 'huge_1.mkv'}
    sizes = {'empty': 0, 'huge': GIGABYTES_4 + 12345}

    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon(start=False, vendor=False, env=cls.env)
        cls.addClassCleanup(cls.daemon.close)
        cls.ids = {kind: finished(cls.daemon, (name, cls.sizes.get(kind, 50_000))) for kind, name in cls.kinds.items()}
        cls.names = finished(cls.daemon, *((name, 1000) for name in HARD_NAMES[1:]))
        output = cls.daemon.output
        for kind in ('gone', 'link', 'pipe', 'folder'):
            (output / cls.kinds[kind]).unlink()
        (output / cls.kinds['link']).symlink_to('/etc/passwd')
        os.mkfifo(output / cls.kinds['pipe'])
        (output / cls.kinds['folder']).mkdir()
        (output / 'unknown.mp4').write_bytes(b'nobody asked for it')
        cls.daemon.start()

    def path(self, kind='clip'):
        return v.file_path(self.ids[kind], self.kinds[kind])

    def data(self, kind='clip'):
        return (self.daemon.output / self.kinds[kind]).read_bytes()

    def get(self, path=None, **headers):
        return self.daemon.client.get(path or self.path(), **headers)


class KeepTest(unittest.TestCase):
    """Finished downloads whose files are to make room."""

    def make(self, keep: str) -> None:
        """Six downloads of 100 bytes, finished on day 0, 1, ...; the second one has a star."""
        self.config = own_config(downloads_keep=keep)
        self.output = self.config.downloads.output_directory
        self.output.mkdir()
        self.store = open_store(self, self.config.database.path)
        self.care = v.Care(self.config, self.store, v.Board(), lambda: None)
        self.ids = [self.finish(day, f'{day}.mp4') for day in range(6)]
        self.store.write(lambda db: db.execute('UPDATE downloads SET starred = 1 WHERE id = ?', (self.ids[1],)))

    def finish(self, day: int, name: str) -> str:
        (self.output / name).write_bytes(bytes(100))
        now, file = day * v.DAY, v.MediaFile(name, 100, 'video/mp4')
        item = parsed({'url': tiktok_link(time.time_ns())}, self.config.security)
        id = self.store.add_many([item], now)[0].id
        outcome = v.Outcome('done', title='a', files=(file,))
        self.store.end('finish', self.store.claim(id, now), outcome, now, self.output)
        self.store.write(lambda db: db.execute(
            "UPDATE downloads SET site = 't', media_id = ? WHERE id = ?", (name, id)))
        return id

    def gone(self) -> List[int]:
        """Which files are gone; exactly their rows say so."""
        missing = [day for day in range(6) if not (self.output / f'{day}.mp4').exists()]
        for day, row in enumerate(self.store.get(id) for id in self.ids):
            made = ('room', 'Deleted to make room.', None) if day in missing else (None, None, 100)
            self.assertEqual((row['reason'], row['note'], row['file_size'], row['status']), (*made, 'completed'))
        return missing

    def look(self, day: float) -> str:
        """What is said after the looks of that time."""
        said = ''
        for _ in range(5):  # a hundred at a time
            try:
                self.care.make_room(day * v.DAY)
            except v.Trouble as trouble:
                said = str(trouble)
        return said


class ThumbnailTest(unittest.TestCase):
    """Videos that ffmpeg makes, and where a picture of one is to be."""

    def setUp(self):
        self.folder = new_folder()
        self.picture = self.folder / '7f.jpg'

    def video(self, name, source):
        path = self.folder / name
        subprocess.run(['ffmpeg', '-nostdin', '-v', 'error', '-f', 'lavfi', '-i', source, f'file:{path}'], check=True)
        return path


# ---------- certificates ------------------------------------------------------------------
# The openssl command is the judge of what an iPhone would say.

NOW = max(time.time(), v.BUILT)
YEAR = 365 * v.DAY


def new_config(folder: Optional[Path] = None, **server: str) -> Any:
    """A configuration whose certificates lie in <folder>/certs; keywords are keys of [server]."""
    folder = folder or Path(tempfile.mkdtemp(prefix='certificate-', dir=RUN))
    (folder / 'config.ini').write_text('[server]\n' + ''.join(f'{key} = {text}\n' for key, text in server.items()))
    return v.load_config(folder / 'config.ini', {})


def fields_of(file: Path) -> Dict[str, Any]:
    """A certificate as openssl prints it: {'Issuer': …, 'X509v3 Basic Constraints': ('critical', 'CA:TRUE')}."""
    found: Dict[str, Any] = {}
    text = openssl('x509', '-in', file, '-noout', '-text', '-nameopt', 'sep_comma_plus_space').replace('CN = ', 'CN=')
    for line in re.findall(r'^ +(Issuer|Subject|Not Before|Not After|Public-Key|ASN1 OID|Signature Algorithm|Version)'
                           r' ?: (.*)$', text, re.M):
        found.setdefault(*line)
    for name, critical, body in re.findall(r'^ {12}(X509v3 [\w ]+): ?(critical)? *\n((?: {16}.*\n)+)', text, re.M):
        found[name] = (critical, ' '.join(body.split()))
    return found


def last_of(found: Dict[str, Any]) -> int:
    return int(ssl.cert_time_to_seconds(found['Not After']))


def sign_by_hand(config: Any, subject: str, names: str) -> Path:
    """A leaf for `names` (as openssl writes them) signed by the CA with no regard to its constraints."""
    folder = new_folder()
    openssl('req', '-new', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-subj', f'/CN={subject}',
            '-keyout', folder / 'key', '-out', folder / 'request')
    (folder / 'extensions').write_text(
        f'subjectAltName={names}\nbasicConstraints=critical,CA:FALSE\nextendedKeyUsage=serverAuth\n'
        'subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\nkeyUsage=critical,digitalSignature\n')
    openssl('x509', '-req', '-in', folder / 'request', '-CA', config.server.ca_file, '-CAkey',
            config.server.ca_file.with_name('ca.key'), '-set_serial', '7', '-days', '90', '-sha256',
            '-extfile', folder / 'extensions', '-out', folder / 'leaf')
    return folder / 'leaf'


def verdict(config: Any, leaf: Path, *options: str) -> str:
    """What `openssl verify` says of a leaf, strictly, as a client that trusts our CA only."""
    return openssl('verify', '-x509_strict', '-purpose', 'sslserver', '-CAfile', config.server.ca_file, *options, leaf,
                   check=False)


def contents(config: Any) -> Dict[str, bytes]:
    return {file.name: file.read_bytes() for file in config.server.ca_file.parent.iterdir()}


def handshake(context: ssl.SSLContext, ca: Path, **client: Any) -> Tuple[Any, ...]:
    """(version, cipher, ALPN, compression) over real sockets; keywords are set on the client's context."""
    other = trusting(ca)
    ciphers = client.pop('ciphers', None)
    if ciphers:
        other.set_ciphers(ciphers)
    other.set_alpn_protocols(client.pop('alpn', ['h2', 'http/1.1']))
    for name, value in client.items():
        setattr(other, name, value)
    near, far = socket.socketpair()

    def serve() -> None:
        with contextlib.suppress(OSError), context.wrap_socket(far, server_side=True) as link:
            link.sendall(link.recv(9))
            link.unwrap()
    server = threading.Thread(target=serve)
    server.start()
    try:
        with other.wrap_socket(near, server_hostname='localhost') as link:
            link.sendall(b'something')
            link.recv(9)
            found = link.version(), link.cipher()[0], link.selected_alpn_protocol(), link.compression()
            link.unwrap()
            return found
    finally:
        far.close()
        near.close()
        server.join()


MAKER = '''
import os, random, shutil, signal, subprocess, sys, time
import videoserverd as v
config = v.load_config(v.Path(sys.argv[1]) / 'config.ini', {})
now = float(sys.argv[2])
log = v.log.addHandler(v.logging.NullHandler())

def fork(work, **asked):
    """Runs `work`, then a maker, in a child; its id."""
    child = os.fork()
    if not child:
        os.umask(0)
        work()
        v.ensure_certificate(config, now, **asked)
        os._exit(0)
    return child

def wait(child):
    """Was it killed?"""
    return os.waitpid(child, 0)[1] == signal.SIGKILL

def pair():
    """A handshake with the certificate as it lies there, by the CA as it lies there."""
    return v.look_at_certificate(config)

CHANGES = {'fsync': os, 'chown': os, 'replace': v.Path, 'chmod': v.Path, 'mkdir': v.Path,
           'write_text': v.Path, 'unlink': v.Path, 'rmtree': shutil, 'run': subprocess}

def doomed(step, names=tuple(CHANGES)):
    """Has this process killed at its `step`th change of the disk, of those named."""
    left = [step]
    def deadly(owner, name):
        real = getattr(owner, name)
        def call(*words, **more):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*words, **more)
        setattr(owner, name, call)
    for name in names:
        deadly(CHANGES[name], name)
'''


class MakerTest(unittest.TestCase):
    """Looks at certificates, whatever has happened to their maker."""

    def check_whole(self, config: Any) -> None:
        """The files are a good set, the keys are private, nothing is left over."""
        self.assertRegex(verdict(config, config.server.cert_file, '-verify_hostname', 'localhost'), r'\bOK\n$')
        v.server_context(config)
        for name in ('ca', 'server'):
            file = config.server.ca_file.with_name(name)
            self.assertEqual(openssl('pkey', '-in', file.with_suffix('.key'), '-pubout'),
                             openssl('x509', '-in', file.with_suffix('.crt'), '-noout', '-pubkey'))
        modes = {file.name: oct(file.stat().st_mode & 0o777) for file in config.server.ca_file.parent.iterdir()}
        self.assertEqual(modes, {'ca.crt': '0o644', 'ca.key': '0o600', 'names.json': '0o644', 'server.crt': '0o644',
                          'server.key': '0o600'})


def run_maker(config: Any, script: str) -> str:
    """Runs MAKER and `script` in a process of its own; what it prints."""
    done = subprocess.run([sys.executable, '-c', MAKER + script, str(config.folder), str(NOW)], cwd=str(HERE),
                          encoding='utf-8', stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=fair(60))
    assert (done.returncode, done.stderr) == (0, ''), done.stderr
    return done.stdout


class ServerTest(unittest.TestCase):
    """The server alone, in this process; clients are hurried."""

    def setUp(self):
        patched(self, unittest.mock.patch.dict(v.PEER_STATES, new=(3.0, 0.0), idle=(1.0, 0.0), closing=(3.0, 0.0)))
        self.server = v.Server(v.listen('127.0.0.1', 0), v.App(new_config(), routes=v.ROUTES), None)
        self.server.app.hosts = frozenset(['localhost'])
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        self.peers = self.server._peers

    def connect(self) -> socket.socket:
        link = socket.create_connection(self.server.server_address[:2], fair(10))
        self.addCleanup(link.close)
        return link


class InstallTest(unittest.TestCase):
    """install.sh and the unit, without installing them."""
    functions = (HERE / 'install.sh').read_text(encoding='utf-8').rpartition('main "$@"')[0]

    def install(self, *words: str, system: str = '') -> Any:
        """What `install.sh WORDS` says and its exit code; `system`: what uname claims."""
        folder = new_folder()
        if system:
            new_program(folder / 'uname', f'echo {system}')
        env = {**clean_environment(), 'PATH': f'{folder}:{os.environ["PATH"]}', 'SUDO_USER': 'nobody', 'LC_ALL': 'C'}
        return ran(['sh', str(HERE / 'install.sh'), *words], env=env, cwd=str(folder), timeout=fair(30))

    def unit(self) -> Path:
        """The unit with the Python that is here, since systemd-analyze looks for it."""
        file = new_folder() / 'videoserver.service'
        file.write_text((HERE / 'videoserver.service').read_text().replace('/usr/bin/python3', sys.executable))
        return file


# ---------- nginx -------------------------------------------------------------------------
# deploy/nginx.conf itself, run by the real nginx with only names, ports and folders replaced.

class Nginx:
    """The nginx of this machine with deploy/nginx.conf, on a port of its own, in front of `upstream`."""

    def __init__(self, sock: socket.socket, upstream: int, files: Path):
        self.folder, self.port = Path(tempfile.mkdtemp(prefix='nginx-', dir=RUN)), sock.getsockname()[1]
        text = (HERE / 'deploy/nginx.conf').read_text()
        user = ' user root;' if os.getuid() == 0 else ''
        folders = ''.join(f'{name}_temp_path {self.folder}; '
                          for name in ('client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'))
        for old, new in (('listen 443 ssl;', f'listen 127.0.0.1:{self.port} ssl;'), ('listen [::]:443 ssl;', ''),
                         ('listen 9443 ssl;', f'listen unix:{self.folder}/s3 ssl;'), ('listen [::]:9443 ssl;', ''),
                         ('/etc/nginx/certs/fullchain.pem', f'{certificates()}/server.crt'),
                         ('/etc/nginx/certs/privkey.pem', f'{certificates()}/server.key'),
                         ('prt-videodownloader-api:8080', f'127.0.0.1:{upstream}'),
                         ('prt-videodownloader-rustfs:9000', '127.0.0.1:9'),
                         ('alias /opt/prt/prt-videodownloader/data/;', f'alias {files}/;'),
                         ('from=/opt/prt/prt-videodownloader/data;', f'from={files};'),
                         ('pid /run/nginx.pid;', f'pid {self.folder}/pid; daemon off;{user}'),
                         ('access_log /dev/stdout;', f'{folders}access_log {self.folder}/access;')):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (self.folder / 'nginx.conf').write_text(text)
        with (self.folder / 'console').open('wb') as console:  # NGINX: the socket that it takes over, as in an upgrade
            self.process = subprocess.Popen(
                ['nginx', '-e', 'stderr', '-p', str(self.folder), '-c', 'nginx.conf'], pass_fds=[sock.fileno()],
                env={**os.environ, 'NGINX': f'{sock.fileno()};'}, stdin=subprocess.DEVNULL, stdout=console,
                stderr=console)
        try:
            wait_until(lambda: (self.folder / 'pid').exists(), 10, lambda: (self.folder / 'console').read_text())
        except AssertionError:
            self.close()
            raise

    def client(self, source: str = '127.0.0.1', key: str = '') -> Client:
        """A client that comes from `source`, an address of the loopback."""
        return Client(self.port, certificates() / 'ca.crt', key, source=source)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)


class NginxTest(DaemonTest):
    """A daemon without TLS behind nginx, and a finished video."""
    settings = None

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        with socket.create_server(('127.0.0.1', 0)) as sock:
            cls.base = f'https://127.0.0.1:{sock.getsockname()[1]}/videodownloader'
            cls.daemon = Daemon(
                site=cls.site, env={'VIDEOSERVER_API_KEYS': 'key'},
                server={'tls': 'off', 'public_base_url': cls.base, 'trusted_proxies': '127.0.0.1',
                        'accel_redirect': '/protected/'},
                security={'allowed_clients': '127.0.0.1,127.0.0.2', 'requests_per_hour': '0'},
                logging={'level': 'DEBUG'})
            cls.addClassCleanup(cls.daemon.close)
            cls.nginx = Nginx(sock, cls.daemon.port, cls.daemon.output)
            cls.addClassCleanup(cls.nginx.close)
        cls.client = cls.nginx.client(key='key')
        cls.stranger = cls.nginx.client()  # has no key
        cls.daemon.client = cls.daemon.poller = cls.daemon.new_client(key='key')
        cls.post = cls.site.tiktok(title='Ein Tag am Meer ☀', size=300_000)
        cls.row = cls.daemon.download(cls.post)
        cls.path = cls.row['public_url'][len(cls.base) - len('/videodownloader'):]

    def setUp(self) -> None:
        self.addCleanup(self.report, self.daemon)


# ---------- browser -----------------------------------------------------------------------
# A real Chromium, driven through chromedriver in plain W3C WebDriver; one for all tests.

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
BROWSER_ARGUMENTS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
                     '--disable-background-networking', '--disable-component-update', '--disable-sync',
                     '--host-resolver-rules=MAP *.local 127.0.0.1')
ENTER = '\ue007'
ROWS = 'return [...document.querySelectorAll("article:not([hidden])")].map(node => node.row)'
ONE_ROW = ROWS + '.find(new Function("row", "return " + arguments[0])) || null'
ENDED = 'row.status === "completed" || row.status === "failed"'


class Browser:
    """A headless Chromium of its own: what WebDriver offers, and what is asked of it most."""

    def __init__(self) -> None:
        self.profile = tempfile.mkdtemp(prefix='chromium-', dir=RUN)
        self.driver = subprocess.Popen(['chromedriver', '--port=0'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                       encoding='utf-8')
        said = (re.search(r'successfully on port (\d+)', line) for line in self.driver.stdout)
        self.port, self.session = int(next(found for found in said if found)[1]), ''
        self.session = '/session/' + self.call('POST', '/session', {'capabilities': {'alwaysMatch': {
            'browserName': 'chrome', 'acceptInsecureCerts': True,
            'goog:loggingPrefs': {'browser': 'ALL', 'performance': 'ALL'},
            'goog:chromeOptions': {'binary': CHROMIUM, 'args': [*BROWSER_ARGUMENTS, f'--user-data-dir={self.profile}']},
        }}})['sessionId']

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """One command of WebDriver; RuntimeError with what the driver says of it."""
        link = http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)
        with contextlib.closing(link):
            link.request(method, self.session + path, json.dumps(body or {}) if method == 'POST' else None)
            value = json.loads(link.getresponse().read())['value']
        if isinstance(value, dict) and 'error' in value:
            raise RuntimeError(value['message'].splitlines()[0])
        return value

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.call('DELETE', '')
        self.driver.terminate()
        self.driver.wait()
        self.driver.stdout.close()

    def open(self, address: str) -> None:
        self.call('POST', '/url', {'url': address})

    def run(self, script: str, *arguments: Any) -> Any:
        """What `script`, the body of a function, returns in the page; a promise is awaited."""
        return self.call('POST', '/execute/sync', {'script': script, 'args': arguments})

    def wait(self, script: str, *arguments: Any, seconds: float = 15) -> Any:
        """The first true value of `script`."""
        return wait_until(lambda: self.run(script, *arguments), seconds,
                          lambda: f'{script} {arguments} in\n{self.get("body")}')

    def get(self, selector: str, what: str = 'innerText') -> Any:
        """A property, or anything else to be said of the first such element."""
        return self.run(f'return document.querySelector(arguments[0])?.{what}', selector)

    def until(self, selector: str, what: str) -> Any:
        """Waits until that is true of it."""
        return self.wait(f'return document.querySelector(arguments[0])?.{what}', selector)

    def find(self, selector: str) -> str:
        """The path of the commands of the first such element, once it is visible."""
        self.until(selector, 'checkVisibility()')
        found = self.call('POST', '/element', {'using': 'css selector', 'value': selector})
        return '/element/' + next(iter(found.values()))

    def click(self, selector: str) -> None:
        self.call('POST', self.find(selector) + '/click')

    def type(self, selector: str, text: str) -> None:
        self.call('POST', self.find(selector) + '/value', {'text': text})

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.call('POST', '/goog/cdp/execute', {'cmd': command, 'params': parameters})

    def screen(self, width: int, height: int, dark: bool = False, scale: float = 1) -> None:
        """The size and colours of the screen; nothing moves on it."""
        wishes = {'color-scheme': 'dark' if dark else 'light', 'reduced-motion': 'reduce'}
        self.devtools('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=scale,
                      mobile=width < 600)
        self.devtools('Emulation.setEmulatedMedia', features=[
            {'name': 'prefers-' + name, 'value': wish} for name, wish in wishes.items()])

    def offline(self, off: bool) -> None:
        self.devtools('Network.emulateNetworkConditions', offline=off, latency=0, downloadThroughput=-1,
                      uploadThroughput=-1)

    def log(self, kind: str) -> List[str]:
        return [entry['message'] for entry in self.call('POST', '/se/log', {'type': kind})]

    def events(self) -> Dict[str, List[Dict[str, Any]]]:
        found: Dict[str, List[Dict[str, Any]]] = collections.defaultdict(list)
        for line in self.log('performance'):
            event = json.loads(line)['message']
            found[event['method'].rpartition('.')[2]].append(event['params'])
        return found

    def requests(self) -> List[Dict[str, Any]]:
        return [event['request'] for event in self.events()['requestWillBeSent']]


class OpenBucket(QuietHandler):
    """Object storage that has nothing and takes whatever is put."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers['Content-Length'] or 0))
        self.reply(200)

    def do_GET(self) -> None:
        self.reply(404, b'<Error><Code>NoSuchKey</Code></Error>')


class OtherSite(QuietHandler):
    """A page of another site, which may do all that a browser lets it."""

    def do_GET(self) -> None:
        self.reply(200, b'<body>')


class PageTest(DaemonTest):
    """A page of the real daemon in a browser: nothing on the console, nothing asked of other hosts."""
    settings = {'downloads': {'max_concurrent': 2, 'retry_delays': '240'}}

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.browser = Browser()
        cls.addClassCleanup(cls.browser.close)
        cls.browser.open(f'https://127.0.0.1:{cls.daemon.port}/sw.js')
        cls.browser.devtools('Browser.grantPermissions', permissions=['clipboardReadWrite', 'clipboardSanitizedWrite'])

    def setUp(self) -> None:
        super().setUp()
        self.expected = r'(?!)'  # what the console may say in this test
        self.browser.screen(1440, 900)
        self.visit('/sw.js')
        self.browser.run('localStorage.clear()')
        self.browser.log('browser')
        self.browser.requests()
        self.visit()

    def tearDown(self) -> None:
        self.browser.offline(False)
        places = {urlsplit(request['url']) for request in self.browser.requests()}
        ours = v.known_hosts(self.daemon.config)
        foreign = [place for place in places if place.hostname not in ours and place.scheme not in ('blob', 'data')]
        self.assertEqual(foreign, [])
        expected = self.expected + '|favicon'  # of the script that is opened as a page
        self.assertEqual([line for line in self.browser.log('browser') if not re.search(expected, line)], [])

    def visit(self, path: str = '/', daemon: Any = None) -> None:
        """Opens a page; the list is drawn then, or the key asked for."""
        self.browser.open(f'https://127.0.0.1:{(daemon or self.daemon).port}{path}')
        if path.startswith('/setup'):
            self.expected += '|icon.png'  # asked for at an address at which these daemons do not listen
        if path[:2] in ('/', '/?'):
            self.browser.wait('return document.querySelector("#door").open || list.ariaBusy === "false"')

    def send(self, text: str) -> None:
        self.browser.run('box.value = arguments[0]', text)
        self.browser.click('#send')

    def row(self, id: str, happens: str = ENDED) -> Dict[str, Any]:
        """The row as the page shows it, as soon as `happens` holds for it."""
        return self.browser.wait(ONE_ROW, f'row.download_id === "{id}" && ({happens})')

    def press(self, id: str, action: str) -> None:
        """Clicks a button of a row."""
        self.browser.run('for (const node of document.querySelectorAll("article"))'
                         '  node.classList.toggle("pressed", node.row.download_id === arguments[0])', id)
        if action in ('copy', 's3', 'star', 'unstar', 'again'):
            self.browser.run('const row = document.querySelector(".pressed");'
                             'if (!row.matches(".open")) row.querySelector("[value=more]").click()')
        self.browser.click(f'.pressed [value={action}]:not([hidden])')

    def newest(self) -> Any:
        return (self.daemon.rows('SELECT * FROM downloads ORDER BY rowid DESC LIMIT 1') or [None])[0]

    def before_each_page(self, script: str) -> None:
        made = self.browser.devtools('Page.addScriptToEvaluateOnNewDocument', source=script)
        self.addCleanup(self.browser.devtools, 'Page.removeScriptToEvaluateOnNewDocument', **made)

    def full_daemon(self) -> Daemon:
        """A daemon with 40 finished videos of long titles, each with a picture of a restless video."""
        full = self.new_daemon(start=False)
        thumbs = full.database.parent / 'thumbs'
        store = v.Store(full.database)
        store.open()
        video = full.folder / 'restless.mp4'
        subprocess.run(['ffmpeg', '-nostdin', '-v', 'error', '-f', 'lavfi', '-i',
                        'mandelbrot=size=540x960:rate=2:start_scale=0.3', '-t', '2', '-vf', 'noise=alls=12',
                        str(video)], check=True)
        thumbs.mkdir(exist_ok=True)
        self.assertTrue(v.make_thumbnail(video, thumbs / 'one.jpg'))
        for number in range(40):
            submission = v.Submission(f'https://www.tiktok.com/@somebody/video/{7300000000000000000 + number}', 'phone',
                                      None, ())
            id = store.add_many([submission], 1_763_000_000 + 3600 * number)[0].id
            title = f'{number} things that nobody tells you of cats, boxes and {random.random()} more #fyp ' * 3
            file = v.MediaFile(f'{title[:150]}_{number}.mp4', 5_000_000 + number, 'video/mp4')
            outcome = v.Outcome('done', title=title, files=(file,))
            store.end('finish', store.claim(id, 1_763_000_000), outcome, 1_763_000_000, full.output)
            shutil.copy(thumbs / 'one.jpg', thumbs / f'{id}.jpg')
        store.close()
        return full.start()

    def clipboard(self) -> str:
        return self.browser.run('return navigator.clipboard.readText()')


# ---------- running it all ----------------------------------------------------------------
# `python3 -m unittest` runs the classes in child processes, several at a time, because most of a
# test is waiting. A child writes down what its tests told their result, and that is told again
# here, so that counts, skips, failures, -v and -f are those of one ordinary run. A single class
# runs as ever, in this process.

AT_ONCE = 3 * (os.cpu_count() or 1)  # classes: most of a test is waiting for one thing or another
LONGEST_FIRST = (  # or the last would run alone
    'downloads TestVendor TestPageAtLarge TestCommands TestFreshDaemon attempts buckets TestPage impersonated '
    'TestLaw TestKillAndFullDisk TestImports TestOpenAPI TestPatterns TestFreshness TestBadStarts TestCrowd '
    'TestWallClock notify TestFreeze TestCancel TestShare TestFailingDisk TestOptions TestSignals').split()


class Record(unittest.TestResult):
    """A child's result: each call becomes a line [method, id of the test, text or reason if any] of a file."""

    def __init__(self, file: Any, like: unittest.TestResult):
        super().__init__()
        self.file, self.buffer, self.failfast, self.tb_locals = file, like.buffer, like.failfast, like.tb_locals

    def write(self, method: str, test: Any, *more: Any) -> None:
        """One line, on disk whatever becomes of this process."""
        print(json.dumps([method, test.id(), *more]), file=self.file, flush=True)

    def written(name: str) -> Any:
        """A method of TestResult that is written down as well: errors as text."""
        def method(self, test: Any, *more: Any) -> None:
            getattr(unittest.TestResult, name)(self, test, *more)
            listed = getattr(self, {'addError': 'errors', 'addFailure': 'failures',
                                    'addExpectedFailure': 'expectedFailures'}.get(name, ''), None)
            self.write(name, test, *([listed[-1][1]] if listed else more))
        return method

    startTest, stopTest, addSuccess = written('startTest'), written('stopTest'), written('addSuccess')  # noqa: N815
    addSkip, addError, addFailure = written('addSkip'), written('addError'), written('addFailure')  # noqa: N815
    addExpectedFailure = written('addExpectedFailure')  # noqa: N815
    addUnexpectedSuccess = written('addUnexpectedSuccess')  # noqa: N815
    addDuration = written('addDuration')  # noqa: N815 (from Python 3.12 on, for --durations)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:  # noqa: N802
        super().addSubTest(test, subtest, err)
        if err and issubclass(err[0], test.failureException):
            self.write('addFailure', subtest, self.failures[-1][1])
        elif err:
            self.write('addError', subtest, self.errors[-1][1])


class Told(Exception):
    """A child's traceback, as text."""


class NoTest(NamedTuple):
    """Stands for what failed and is no test: a subtest, a setUpClass, a child."""
    name: str
    failureException = AssertionError

    def id(self) -> str:
        """What unittest prints."""
        return self.name

    __str__ = id

    def shortDescription(self) -> None:  # noqa: N802
        """Has none."""


def tell_again(file: Path, tests: Dict[str, unittest.TestCase], result: unittest.TestResult) -> None:
    """Repeats to `result` what a Record has written."""
    for line in file.read_text(encoding='utf-8').splitlines():
        try:
            method, name, *more = json.loads(line)
        except ValueError:  # the child was killed while it wrote; its wait status is told as well
            break
        if method in ('addError', 'addFailure', 'addExpectedFailure'):
            more = [(Told, Told('\n' + more[0]), None)]
        getattr(result, method)(tests.get(name) or NoTest(name), *more)


class Classes(unittest.TestSuite):
    """The classes of this file, each in a child process; `spent`: (wall, CPU) seconds of each."""

    def __init__(self, tests: Sequence[Any] = ()):
        super().__init__(tests)
        self.at_work: Dict[int, Tuple[str, float]] = {}  # pid: (class, when it began)
        self.spent: Dict[str, Tuple[float, float]] = {}

    def by_class(self) -> Dict[str, List[unittest.TestCase]]:
        """The tests of each class (or of the classes that say to stay `together`), the longest first."""
        found: Dict[str, List[unittest.TestCase]] = {name: [] for name in LONGEST_FIRST}
        for test in flat(self):
            found.setdefault(getattr(test, 'together', type(test).__name__), []).append(test)
        return {name: tests for name, tests in found.items() if tests}

    def run(self, result: Any, debug: bool = False) -> Any:
        """Runs them all."""
        classes = self.by_class()
        if len(classes) == 1 or debug:
            return super().run(result, debug)
        prepare()
        waiting = list(classes)
        try:
            while self.at_work or waiting and not result.shouldStop:
                while waiting and len(self.at_work) < AT_ONCE and not result.shouldStop:
                    name = waiting.pop(0)
                    self.at_work[self.start(classes[name], RUN / f'{name}.record', result)] = name, time.monotonic()
                self.collect(classes, result)
        finally:
            while self.at_work:  # only after Ctrl-C or SIGTERM
                self.interrupt()
        return result

    def interrupt(self) -> None:
        """Tells the children to end, and not only once: an attempt at a download takes that for its own end."""
        for pid in list(self.at_work):
            os.kill(pid, signal.SIGINT)
        time.sleep(0.5)
        for pid in list(self.at_work):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del self.at_work[pid]

    def start(self, tests: Sequence[unittest.TestCase], record: Path, result: unittest.TestResult) -> int:
        """Runs tests in a child; its pid."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        atexit._clear()  # as multiprocessing does: what is registered so far is the parent's to do
        atexit.register(kill_the_living)
        try:
            random.seed()
            with record.open('w', encoding='utf-8') as file:
                unittest.TestSuite(tests).run(Record(file, result))
            status = 0
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def collect(self, classes: Dict[str, List[unittest.TestCase]], result: unittest.TestResult) -> None:
        """Waits for a child and tells what its tests told."""
        pid, status, usage = os.wait4(-1, 0)
        name, began = self.at_work.pop(pid)
        self.spent[name] = time.monotonic() - began, usage.ru_utime + usage.ru_stime
        tell_again(RUN / f'{name}.record', {test.id(): test for test in classes[name]}, result)
        if status:
            result.addError(NoTest(name), (Told, Told(f'its process ended with wait status {status}'), None))


def flat(tests: Any) -> List[unittest.TestCase]:
    return [test for inner in tests for test in flat(inner)] if isinstance(tests, unittest.TestSuite) else [tests]


def prepare() -> None:
    """What every child would otherwise make for itself."""
    for make in (vendored, certificates, path_without_ffmpeg, standin_certificates):
        make()
    v.compile_program()
