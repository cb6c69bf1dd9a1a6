#!/usr/bin/env python3
"""Proofs that take minutes, or a machine of their own, with the harness of the tests.

    .ci/proofs.py bench [memory start acks download syncs rows]    speed and memory, as a table
    .ci/proofs.py kill | soak | power | memory | faults | fuzz | rss | upload | files | times

The exit code is 1 where a proof fails. Each `cmd_NAME` says which options it takes.
"""
import collections
import contextlib
import http.client
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import (  # noqa: E402
    ANY_PLACE,
    ANY_SITE,
    ANYWHERE,
    HERE,
    IN_THE_CLEAR,
    LISTED,
    RUN,
    SAME_AS_YTDLP,
    SHARED,
    TINY_MP4,
    TRAPS,
    Client,
    Daemon,
    DownloadTest,
    KillTally,
    Standin,
    Strace,
    browser_host,
    finished,
    parsed,
    path_without_ffmpeg,
    publish_config,
    reserved,
    resident,
    starts,
    tiktok_link,
    wait_until,
    ytdlp_folder,
)

import test_videoserverd  # noqa: E402
import videoserverd as v  # noqa: E402

COMMANDS: Dict[str, Callable[[List[str]], Any]] = {}  # NAME: what `proofs.py NAME …` calls with the rest


def command(function: Callable[[List[str]], Any]) -> Callable[[List[str]], Any]:
    """Registers `cmd_NAME(args)` as a subcommand of this file; what it returns is the exit code."""
    COMMANDS[function.__name__[len('cmd_'):]] = function
    return function


def option(args: List[str], name: str, default: float) -> float:
    """The number behind --name."""
    return float(args[args.index(f'--{name}') + 1]) if f'--{name}' in args else default


def free_port() -> int:
    """A port for a figure that needs to know it beforehand."""
    with reserved() as probe:
        return probe.getsockname()[1]


# ---------- fuzz ------------------------------------------------------------------------
# What strangers send, made by hypothesis (pip install hypothesis h11). What it ever found is a plain
# test of the suite.

WORDS = ['https://', 'http://', 'HTTPS:', '//', '/', '\\', '@', ':', '.', '..', '?', '#', '%', '%2e', '%00', '&', '=',
         '-', '_', '[', ']', '(', ')',
         'tiktok.com', 'vm.tiktok.com', 'www.instagram.com', 'evil.com', 'localhost', '127.0.0.1', '0x7f', '::1',
         '::ffff:', 'xn--', 'xn--bcher-kva',
         'com', 'tiktok', '443', ':80', ':8443', '65536', '0', '1', ' ', '\n', '\r\n', '\t', '\0', '\x7f', '\xa0',
         '\xad', '\u200b', '\u200d', '\u3002',
         '\uff0e', '\uff0f', '\uff20', '\ufe0f', '\ud800', '\udfff', '\u202e', 'ß', 'ς', 'İ', 'ı', 'ſ', 'K', '\u212a',
         'é', 'e\u0301',
         'Ω', '漢', '😀', '١', 'ｔ', '，', '。',
         '/@user/video/7123', '/reel/C1_-x/?igsh=a==', '/ZM1/', '"', "'", '<', '>', '…', ',', '!', 'Look: ', '看', ';']
HOSTS = ['tiktok.com', 'instagram.com', 'tiktok', '.com', '.', 'evil', '-', '_', 'x', '1', '0x', '127.0.0.1', '.1', '@',
         ':', '%', '%2e',
         '[', ']', '::1', 'xn--', 'bcher-kva', '\ufe0f', '\u200d', '\xad', '\u3002', 'ß', 'ü', 'ſ', '\u212a', 'İ', '例',
         '\u0301', '\t', '\\']
VALUES = ['b', 'bv*+ba/b', '[height<=720]', '~=', '-', 'all', ',', 'res:720', '+size', 'mp4', 'mkv', '/', '1M', '0',
          '5', '99999999999', 'inf', 'nan', '1:3',
          '::0', '-1', 'en', 'en.*', '(a+)+$', 'http://a/', 'Mozilla/5.0', '\r\n', '\0', '"', "'", '\\', ' ', '=',
          'x' * 300, '٣', 'é', '\ud800', '%(id)s',
          'best', 'm4a', '$(rm)', '`']
LINES = [b'GET / HTTP/1.1', b'POST /api/v1/download HTTP/1.1', b'GET', b' ', b'/', b'HTTP/1.1', b'HTTP/1.0',
         b'HTTP/0.9', b'Host: pi.local', b'Host:',
         b'Content-Length: 5', b'Content-Length: +5', b'Content-Length: 5, 5', b'Transfer-Encoding: chunked',
         b'Expect: 100-continue', b'X', b': ', b':',
         b'\r\n', b'\r', b'\n', b'\t', b'\0', b'\xff', b'..', b'%2e%2e', b'%2f', b'%00', b'?a=b&c', b'http://evil/',
         b'*', b'[::1]:80', b'a' * 300]
FUZZ: Dict[str, Callable[..., None]] = {}  # NAME: one case, on what `fuzz_inputs` makes for it


def fuzz_case(function: Callable[..., None]) -> Callable[..., None]:
    """Registers `fuzz_NAME(...)`."""
    FUZZ[function.__name__[len('fuzz_'):]] = function
    return function


def storable(value: Any) -> None:
    """It goes into SQLite and the log, as JSON, and comes out the same; no control character in it."""
    text = json.dumps(value, ensure_ascii=False)
    text.encode('utf-8')
    assert v.UNSAFE.sub('', text) == text, value


def judge_host(url: str, settings: Any) -> None:
    """A browser, urllib and the list agree on the host of a canonical URL."""
    host, split = browser_host(url), urlsplit(url).hostname
    assert host and (host.startswith('[') or split == host), url
    if settings.allowed_domains != ('*',):
        assert any(host == domain or host.endswith('.' + domain) for domain in settings.allowed_domains), url


@fuzz_case
def fuzz_submission(fields: Dict[str, Any], settings: Any) -> None:
    """Refused, or a canonical URL on the list that a browser reads alike."""
    try:
        item = parsed(fields, settings)
    except v.Refused as error:
        storable([error.code, str(error)])
        return
    storable(item)
    assert v.check_url(item.url, settings) == item.url
    judge_host(item.url, settings)


@fuzz_case
def fuzz_link(text: str, settings: Any) -> None:
    """A link is refused, or leads a browser where its canonical form leads it."""
    try:
        url = v.check_url(text, settings)
    except v.Refused:
        return
    assert v.check_url(url, settings) == url
    judge_host(url, settings)
    assert browser_host(text) in (browser_host(url), None), (text, url)


@fuzz_case
def fuzz_batch(fields: Dict[str, Any], settings: Any) -> None:
    """Every link answered for, each canonical URL once."""
    try:
        rows = v.parse_batch(fields, settings, 'url')[0]
    except v.Refused as error:
        storable([error.code, str(error)])
        return
    urls = [item.url for _, item in rows if isinstance(item, v.Submission)]
    assert rows and len(set(urls)) == len(urls)
    storable([str(item) if isinstance(item, v.Refused) else item for _, item in rows])


@fuzz_case
def fuzz_options(value: Any) -> None:
    """Refused, or options that are in the table."""
    try:
        options = v.parse_options(value)
    except v.Refused as error:
        storable([error.code, str(error)])
        return
    storable(options)
    words = dict(options)
    assert set(words) <= {name for name, _ in v.OPTIONS.values()}, words
    assert '~=' not in words.get('--format', '') and words.get('--concurrent-fragments', '1') in '1234'


@fuzz_case
def fuzz_name(title: str, media_id: str, ext: str, part: str) -> None:
    """One component of a path, at most 255 bytes, that tells other ids apart."""
    name = v.file_name(title, media_id, ext, part)
    storable(name)
    assert len(name.encode('utf-8')) <= 255 and '/' not in name and not name.startswith(('.', '-')), name
    assert v.file_name(title, media_id + 'x', ext, part) != name
    assert re.search(r'[^.]\.[A-Za-z0-9]{1,10}$', name), name


@fuzz_case
def fuzz_head(data: bytes) -> None:
    """Refused, or one request that h11 (where it is installed) reads alike; no smuggled length, no climbing path."""
    try:
        head = v.parse_head(data)
    except v.HTTPError:
        return
    lines = [f'{head.method} {head.target} {head.version}']
    lines += [f'{name}: {value}' for name, values in head.fields.items() for value in values]
    assert v.parse_head('\r\n'.join(lines).encode('latin-1')) == head
    for read, shape in ((v.body_length, r'None|\d+'), (v.request_host, r'[a-z0-9.:_-]*')):
        with contextlib.suppress(v.HTTPError):
            assert re.fullmatch(shape, str(read(head.fields)))
    with contextlib.suppress(v.HTTPError):
        path = v.decode_path(head.target.partition('?')[0])
        assert not re.search(r'[\0-\x1f\\]|(^|/)\.\.?(/|$)', path), path
    read_like_h11(data, head)


def read_like_h11(data: bytes, head: Any) -> None:
    """h11 reads the same method, target and fields, or refuses."""
    try:
        import h11
    except ImportError:
        return
    peer = h11.Connection(h11.SERVER)
    peer.receive_data(data + b'\r\n\r\n')
    try:
        event = peer.next_event()
    except h11.RemoteProtocolError:
        return
    assert isinstance(event, h11.Request), (data, event)
    assert (event.method.decode(), event.target.decode()) == (head.method, head.target), (data, event)
    fields: Dict[str, List[str]] = {}
    for name, value in event.headers:
        fields.setdefault(name.decode(), []).append(value.decode('latin-1'))
    if 'content-length' not in fields:  # h11 folds equal ones; body_length refuses two
        assert fields == head.fields, (data, event)


def fuzz_inputs(make: Any) -> Dict[str, Tuple[Any, ...]]:
    """Strategies of hypothesis for each case of FUZZ."""
    text = make.text(make.characters(exclude_categories=()), max_size=30)
    pieces = make.lists(make.one_of(make.sampled_from(WORDS), make.sampled_from(WORDS), text), max_size=12).map(''.join)
    hosts = make.lists(make.sampled_from(HOSTS), min_size=1, max_size=6).map(''.join)
    to_hosts = make.tuples(make.sampled_from(['https://', 'http://']), hosts,
                           make.sampled_from(['', '/', '/x', '?', '#', '\\', ':80', '.'])).map(''.join)
    links = make.one_of(pieces, to_hosts, to_hosts,
                        make.tuples(make.sampled_from(TRAPS), pieces).map(''.join),
                        make.tuples(make.sampled_from([text for text, _ in SHARED]), pieces).map(''.join))
    settings = make.sampled_from([LISTED, LISTED, ANY_SITE, ANY_PLACE])
    odd = make.one_of(make.none(), make.booleans(), make.integers(), make.floats(), text, make.lists(text, max_size=3),
                      make.dictionaries(text, text, max_size=2))
    word = make.one_of(make.sampled_from(sorted(v.OPTIONS)), make.sampled_from(VALUES), text,
                       make.tuples(make.sampled_from(sorted(v.OPTIONS)), make.sampled_from(['', '=', ' ']),
                                   make.sampled_from(VALUES)).map(''.join))
    pairs = make.lists(make.tuples(make.sampled_from(sorted(v.OPTIONS)),
                                   make.lists(make.sampled_from(VALUES), max_size=3).map(''.join)),
                       max_size=4).map(lambda found: [word for pair in found for word in pair])
    whole = make.lists(make.sampled_from(SAME_AS_YTDLP), max_size=4).map(lambda found: sum(found, []))
    options = make.one_of(make.lists(word, max_size=6), pairs, whole,
                          make.tuples(whole, pairs).map(lambda two: two[0] + two[1]),
                          make.lists(word, max_size=6).map(' '.join), odd)
    fields = make.fixed_dictionaries({'url': make.one_of(links, links, links, odd)}, optional={
        'client_id': make.one_of(text, odd), 'timestamp': make.one_of(make.integers(min_value=0), odd),
        'ytdlp_cli_parameters': options})
    titles = make.one_of(text, pieces, make.tuples(text, make.integers(1, 60)).map(lambda pair: pair[0] * pair[1]))
    head = make.lists(make.one_of(make.sampled_from(LINES), make.sampled_from(LINES), make.binary(max_size=20)),
                      max_size=14).map(b''.join)
    heads = make.one_of(head, head.map(b'GET / HTTP/1.1\r\n'.__add__),
                        make.lists(make.sampled_from(LINES), max_size=8).map(
        lambda lines: b'\r\n'.join([b'GET /api/v1/health HTTP/1.1', *lines])))
    return {'submission': (fields, settings), 'link': (links, settings), 'batch': (fields, settings),
            'options': (options,),
            'name': (titles, titles, text, text), 'head': (heads,)}


def fuzz_one(name: str, drawn: Any, cases: int) -> Tuple[int, str]:
    """Cases run of FUZZ[name], and the traceback of one that failed, shrunk: it shows the seed to keep as a test."""
    import traceback

    import hypothesis
    run = []

    def case(given: Tuple[Any, ...]) -> None:
        run.append(None)
        FUZZ[name](*given)

    while len(run) < cases:
        check = hypothesis.given(drawn)(case)
        check = hypothesis.settings(max_examples=min(5000, cases - len(run)),  # it remembers each case of a batch
                                    database=None, deadline=None,
                                    suppress_health_check=list(hypothesis.HealthCheck))(check)
        try:
            hypothesis.seed(random.getrandbits(64))(check)()
        except Exception:
            return len(run), traceback.format_exc()
    return len(run), ''


@command
def cmd_fuzz(args: List[str]) -> int:
    """`fuzz [--cases 1000000] [NAME…]`: so many cases in all, shared by the NAMEs of FUZZ; exit code 1 if one fails."""
    try:
        import hypothesis.strategies as make
    except ImportError:
        print('fuzz needs hypothesis: python3 -m pip install hypothesis h11')
        return 2
    cases = int(option(args, 'cases', 1_000_000))
    inputs, names, failed = fuzz_inputs(make), [name for name in args if name in FUZZ] or list(FUZZ), 0
    for name in names:
        started = time.monotonic()
        count, trouble = fuzz_one(name, make.tuples(*inputs[name]), -(-cases // len(names)))
        print(f'{name:12} {count:9,} cases {time.monotonic() - started:7.0f} s   {trouble or "ok"}', flush=True)
        failed += bool(trouble)
    return 1 if failed else 0


@command
def cmd_kill(args: List[str]) -> int:
    """`kill [--times 300]`: kills the daemon so often, under load and mid-download; exit code 1 if a link is lost."""
    times = int(option(args, 'times', 300))
    site = Standin()
    daemon = Daemon(site=site, downloads={'max_concurrent': 2})
    tally = KillTally(daemon, site)
    began = time.monotonic()
    tally.rounds(times)
    faults = tally.wrong(600)
    print(f'{times} times kill -9 in {time.monotonic() - began:.0f} s: {len(tally.acknowledged)} links acknowledged, '
          f'{len(daemon.rows())} rows, {len(daemon.files())} files, {len(faults)} faults')
    print('\n'.join(faults[:20]))
    daemon.close()
    site.close()
    return 1 if faults else 0


# ---------- soak ------------------------------------------------------------------------
# An hour of mixed load on one daemon, counted from outside.

SOAK_POST_SECONDS = 0.7     # between posts
SOAK_RESTART_SECONDS = 240  # between re-executions


class Soak:
    """Posts, failures, cancels, deletions and re-executions; figures every few seconds."""

    def __init__(self, seconds: float):
        self.seconds, self.chance = seconds, random.Random(3)
        self.site = Standin()
        self.daemon = Daemon(site=self.site, downloads={'max_concurrent': 2, 'retry_delays': '1', 'max_retries': 1},
                             logging={'max_size': '1MB', 'backup_count': '1'}, database={'backups': '1'})
        self.links = {'completed': [self.site.tiktok(size=60_000) for _ in range(20)]
                                   + [self.site.instagram() for _ in range(5)],
                      'failed': [self.site.tiktok(state=state) for state in ('gone', 'private', 'unavailable')]}
        self.wanted: Dict[str, str] = {}  # id → how it must end; 'any' after a cancel, 'gone' after a deletion
        self.rows: List[Dict[str, float]] = []
        self.restarts = 0

    def run(self) -> List[str]:
        """The faults, none if all is well."""
        began = time.monotonic()
        next_restart, next_look = began + SOAK_RESTART_SECONDS / 2, began
        while time.monotonic() - began < self.seconds:
            self.post()
            if time.monotonic() > next_restart:
                next_restart += SOAK_RESTART_SECONDS
                self.restarts += 1
                self.daemon.signal(signal.SIGHUP)
            if time.monotonic() > next_look:
                next_look += max(2.0, self.seconds / 200)
                self.look(time.monotonic() - began)
            time.sleep(SOAK_POST_SECONDS)
        return self.lost() + self.drift()

    def post(self) -> None:
        """One link; now and then one is cancelled or deleted. An answer that does not come is asked for again."""
        wish = 'failed' if self.chance.random() < 0.15 else 'completed'
        stamp = time.monotonic_ns()
        body = self.call('POST', '/api/v1/download', {
            'url': str(self.chance.choice(self.links[wish])), 'client_id': 'soak', 'timestamp': stamp})
        id = body['download_id']
        self.wanted[id] = wish
        if self.chance.random() < 0.1:
            self.call('POST', f'/api/v1/download/{id}/cancel')
            self.wanted[id] = 'any'
        if self.chance.random() < 0.1:
            victim = self.chance.choice(list(self.wanted))
            if self.wanted[victim] != 'gone':
                if self.call('DELETE', f'/api/v1/download/{victim}')['status'] == 'deleted':
                    self.wanted[victim] = 'gone'

    def call(self, method: str, path: str, body: Any = None) -> Dict[str, Any]:
        """An answer; a connection that breaks is tried again, as a phone does."""
        for _ in range(20):
            try:
                return self.daemon.client.request(method, path, body).json
            except (OSError, http.client.HTTPException) as error:
                print(f'  {time.strftime("%H:%M:%S")} {method} again after {error!r}', flush=True)
                time.sleep(0.5)
        raise AssertionError(f'{method} {path}: no answer')

    def look(self, at: float) -> None:
        """One row of figures."""
        row = {'at': at, 'rss': self.daemon.rss(), 'threads': self.daemon.threads(),
               'descriptors': len(self.daemon.descriptors()), 'links': len(self.wanted)}
        self.rows.append(row)
        if len(self.rows) % 10 == 1:
            print('  '.join(f'{name} {value:.0f}' for name, value in row.items()), flush=True)

    def lost(self) -> List[str]:
        """What the outside tally and the database do not agree on."""
        wait_until(lambda: self.call('GET', '/api/v1/health')['queue_size'] == 0, 300, 'the queue ends')
        found = {row['id']: row['status'] for row in self.daemon.rows()}
        return [f'{id}: {found.get(id, "gone")}, wanted {wish}' for id, wish in self.wanted.items()
                if found.get(id, 'gone') != wish and wish != 'any']

    def drift(self) -> List[str]:
        """Figures of the last quarter that are more than 5 % above those of the first."""
        quarter = max(1, len(self.rows) // 4)
        faults = []
        for name in ('rss', 'threads', 'descriptors'):
            first, last = (sorted(row[name] for row in rows)[len(rows) // 2] for rows in (
                self.rows[:quarter], self.rows[-quarter:]))
            print(f'{name}: median of the first quarter {first:.1f}, of the last {last:.1f}')
            if last > first * 1.05 + (name != 'rss'):
                faults.append(f'{name} grew from {first:.1f} to {last:.1f}')
        return faults


@command
def cmd_soak(args: List[str]) -> int:
    """`soak [--minutes 60]`: exit code 1 if a link is lost or memory, threads or descriptors grow."""
    minutes = option(args, 'minutes', 60)
    soak = Soak(minutes * 60)
    faults = soak.run()
    print(f'{minutes:g} minutes: {len(soak.wanted)} links, {soak.restarts} re-executions, {len(faults)} faults')
    print('\n'.join(faults[:20]))
    soak.daemon.close()
    soak.site.close()
    return 1 if faults else 0


# ---------- files and uploads -----------------------------------------------------------

@command
def cmd_rss(args: List[str]) -> int:
    """Memory of one process over fifty TikTok downloads."""
    DownloadTest.setUpClass()
    case = DownloadTest()
    case.setUp()
    posts = [str(case.site.tiktok(size=5_000_000)) for _ in range(int(args[0]) if args else 50)]
    for line in case.said(f'''
            say('before', rss())
            for number, url in enumerate({posts!r}):
                assert attempt(url, f'job{{number}}').run().kind == 'done'
                if number in (0, 1, 9, 24, 49):
                    say(number + 1, 'downloads: now', rss(), 'peak', rss('VmHWM'))
            '''):
        print(line)
    return 0


@command
def cmd_upload(args: List[str]) -> int:
    """Memory and speed of uploads: `upload [MB]`, a file of 2 GB to a server that takes all and keeps nothing."""
    size = int(args[0] if args else 2048) << 20
    sink = socket.create_server(('127.0.0.1', 0))

    def swallow(client):
        with client, client.makefile('rb') as stream:
            length, line = 0, stream.readline()
            put = line.startswith(b'PUT')
            while line.strip():
                length = int(line[15:]) if line.lower().startswith(b'content-length:') else length
                line = stream.readline()
            while length > 0:
                length -= len(stream.read(min(length, 1 << 20)))
            answer = b'<UploadId>1</UploadId>' if put is False else b''
            client.sendall(b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: %d\r\n\r\n%s' % (len(answer), answer))

    def serve():
        while True:
            swallow(sink.accept()[0])
    threading.Thread(target=serve, daemon=True).start()
    config = publish_config(endpoint=f'http://127.0.0.1:{sink.getsockname()[1]}')
    path = config.downloads.output_directory / 'large.mp4'
    with open(path, 'wb') as file:
        file.truncate(size)
    for what, above in (('in one piece', size), ('in parts', v.MULTIPART_ABOVE)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.monotonic()
        v.Bucket(config, above).put(path, 'large.mp4', 'video/mp4')
        seconds = time.monotonic() - begun
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(f'{size >> 20} MB {what}: {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s, RSS grew by {grown} KB')
    return 0


NGINX = '''
worker_processes 1;
pid %(folder)s/nginx.pid;
error_log %(folder)s/nginx.log;
events { worker_connections 64; }
http {
    access_log off;
    sendfile on;
    server {
        listen 127.0.0.1:%(port)d ssl;
        ssl_certificate %(folder)s/certs/server.crt;
        ssl_certificate_key %(folder)s/certs/server.key;
        root %(output)s;
    }
}
'''


def curl_seconds(url: str, ca: Path) -> float:
    """How long curl takes for all of `url`."""
    done = subprocess.run(['curl', '-sSf', '--cacert', str(ca), '-o', '/dev/null', '-w', '%{time_total}', url],
                          stdout=subprocess.PIPE, check=True)
    return float(done.stdout)


@command
def cmd_files(args: List[str]) -> int:
    """Throughput of one file over TLS, ours and nginx's in turns, and memory meanwhile: `files [MB]`."""
    size = int(args[0] if args else 1024) << 20
    daemon = Daemon(start=False, vendor=False)
    id = finished(daemon, ('large_1.mp4', size))
    daemon.start()
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]  # nginx cannot tell which port it took
    conf = daemon.folder / 'nginx.conf'
    conf.write_text(NGINX % {'folder': daemon.folder, 'output': daemon.output, 'port': port})
    nginx = subprocess.Popen(['nginx', '-e', 'stderr', '-c', str(conf), '-g', 'daemon off; user root;'])
    try:
        wait_until(lambda: not socket.socket().connect_ex(('127.0.0.1', port)))
        before, ca, ours, theirs = daemon.rss(), daemon.folder / 'certs/ca.crt', [], []
        for _ in range(5):
            ours.append(curl_seconds(f'https://127.0.0.1:{daemon.port}{v.file_path(id, "large_1.mp4")}', ca))
            theirs.append(curl_seconds(f'https://127.0.0.1:{port}/large_1.mp4', ca))
        speed, reference = size / min(ours) / 1e6, size / min(theirs) / 1e6
        print(f'{size >> 20} MB over TLS: {speed:.0f} MB/s, nginx {reference:.0f} MB/s: {speed / reference:.2f} '
              f'of nginx (aim: 0.8); RSS {before:.1f} MB before, {daemon.rss():.1f} MB after')
        return speed < 0.8 * reference
    finally:
        nginx.terminate()
        nginx.wait()
        daemon.close()


# ---------- power -----------------------------------------------------------------------
# A whole machine loses its power.

GUEST = Path(tempfile.gettempdir()) / 'videoserverd-guest'  # Debian's kernel and busybox, fetched once, kept
GUEST_MODULES = ('virtio_ring', 'virtio', 'virtio_pci_legacy_dev', 'virtio_pci_modern_dev', 'virtio_pci', 'virtio_blk',
                 'failover', 'net_failover', 'virtio_net')
GUEST_INIT = '''#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /disk /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for module in %(modules)s; do [ -f /modules/$module.ko ] && /bin/busybox insmod /modules/$module.ko; done
while ! /bin/busybox mount -t ext4 /dev/vda /disk; do /bin/busybox sleep 0.1; done
/bin/busybox ip link set lo up
/bin/busybox ip address add 10.0.2.15/24 dev eth0
/bin/busybox ip link set eth0 up
/bin/busybox ip route add default via 10.0.2.2
export HOME=/disk PATH=/bin
exec %(python)s /program/videoserverd.py --config /program/config.ini
'''
GUEST_CONFIG = '''[server]
tls = off
port = 8443
[database]
path = /disk/downloads.db
backups = 0
[downloads]
output_directory = /disk/out
min_free_space = 9000GB
[downloader]
ytdlp_directory = /disk/vendor
auto_update = off
[security]
requests_per_hour = 0
[logging]
file =
'''


def fetch_guest() -> Path:
    """The folder with Debian's cloud kernel and a static busybox, unpacked; nothing is installed."""
    if not list(GUEST.glob('boot/vmlinuz-*')):
        GUEST.mkdir(exist_ok=True)
        needs = subprocess.check_output(['apt-cache', 'depends', 'linux-image-cloud-amd64'], encoding='utf-8')
        kernel = re.search(r'Depends: (linux-image-\S+)', needs)[1]
        subprocess.run(['apt-get', 'download', '-q', kernel, 'busybox-static'], cwd=GUEST, check=True,
                       stdout=subprocess.DEVNULL)
        for package in GUEST.glob('*.deb'):
            subprocess.run(['dpkg-deb', '-x', str(package), str(GUEST)], check=True)
    return GUEST


def libraries(files: Sequence[str]) -> List[str]:
    """The shared libraries that programs and modules need, the loader among them."""
    found = subprocess.run(['ldd', *files], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding='utf-8').stdout
    return sorted(set(re.findall(r'(?:=> |^\t)(/\S+) \(', found, re.M)))


def guest_tree(root: Path, program: str) -> None:
    """What the guest runs: busybox, this Python with its library, and `program`, the daemon's source."""
    kernel, stdlib = fetch_guest(), Path(os.__file__).parent
    ignore = shutil.ignore_patterns('test', 'tests', 'site-packages', 'dist-packages', 'config-*', 'idlelib',
                                    'lib2to3', 'ensurepip',
                                    'tkinter', '*.a', 'pydoc_data')
    shutil.copytree(stdlib, root / str(stdlib).lstrip('/'), ignore=ignore, symlinks=True)
    modules = [str(path) for path in stdlib.glob('lib-dynload/*.so')]
    python = os.path.realpath(sys.executable)
    for file in (python, *libraries([python, *modules])):
        target = root / file.lstrip('/')
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    (root / 'modules').mkdir()
    for name in GUEST_MODULES:
        for file in kernel.glob(f'lib/modules/*/kernel/**/{name}.ko'):
            shutil.copy(file, root / 'modules')
    (root / 'bin').mkdir(exist_ok=True)
    shutil.copy(kernel / 'bin/busybox', root / 'bin')
    (root / 'program').mkdir()
    (root / 'program/videoserverd.py').write_text(program, encoding='utf-8')
    (root / 'program/config.ini').write_text(GUEST_CONFIG)
    (root / 'init').write_text(GUEST_INIT % {'modules': ' '.join(GUEST_MODULES), 'python': python})
    (root / 'init').chmod(0o755)


def pack_guest(folder: Path, program: str) -> Path:
    """The guest as an initramfs: all of it in memory but the disk with the database."""
    guest_tree(folder / 'root', program)
    archive = folder / 'initramfs'
    with archive.open('wb') as out:
        names = subprocess.run(['find', '.'], cwd=folder / 'root', stdout=subprocess.PIPE, check=True).stdout
        subprocess.run([str(GUEST / 'bin/busybox'), 'cpio', '-o', '-H', 'newc'], cwd=folder / 'root', input=names,
                       stdout=out,
                       stderr=subprocess.DEVNULL, check=True)
    shutil.rmtree(folder / 'root')
    return archive


class Guest:
    """A virtual machine whose disk outlives it. `acknowledged`: the ids that its daemon has answered 202 with."""

    def __init__(self, program: str):
        self.folder = Path(tempfile.mkdtemp(prefix='guest-', dir=RUN))
        self.initramfs, self.disk = pack_guest(self.folder, program), self.folder / 'disk'
        subprocess.run(['mke2fs', '-q', '-t', 'ext4', str(self.disk), '256M'], check=True, stdout=subprocess.DEVNULL)
        self.process: Any = None
        self.acknowledged: List[str] = []

    def boot(self) -> None:
        """Power on; returns once the daemon answers."""
        self.port = free_port()
        self.console = self.folder / 'console.txt'
        self.process = subprocess.Popen([
            'qemu-system-x86_64', '-accel', 'tcg', '-cpu', 'max', '-m', '1024', '-nographic', '-no-reboot',
            '-kernel', str(next(GUEST.glob('boot/vmlinuz-*'))), '-initrd', str(self.initramfs),
            '-append', 'console=ttyS0 quiet panic=-1', '-monitor', 'none', '-serial', f'file:{self.console}',
            '-drive', f'file={self.disk},format=raw,if=virtio,cache=writeback', '-device', 'virtio-net-pci,netdev=net',
            '-netdev', f'user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-10.0.2.15:8443'],
            stdin=subprocess.DEVNULL)
        wait_until(self.answers, 120, lambda: self.console.read_text(errors='replace')[-3000:])

    def answers(self) -> bool:
        """Does its daemon?"""
        if self.process.poll() is not None:
            raise AssertionError(f'the guest ended:\n{self.console.read_text(errors="replace")[-3000:]}')
        with contextlib.suppress(OSError, http.client.HTTPException):
            return Client(self.port, None, timeout=2).get('/api/v1/health').status == 200
        return False

    def cut_power(self) -> None:
        """The machine is gone from one instruction to the next; what it had told its disk stays."""
        if self.process:
            self.process.kill()
            self.process.wait()

    def post(self, end: threading.Event) -> None:
        """A phone: a link after the other until there is no answer any more."""
        client = Client(self.port, None, keep_alive=True, timeout=5)
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            while not end.is_set():
                link = tiktok_link(random.getrandbits(60))
                answer = client.post('/api/v1/download', {'url': link, 'client_id': 'power'})
                if answer.status == 202:
                    self.acknowledged.append(answer.json['download_id'])

    def life(self, seconds: float) -> None:
        """Posts from four phones for so long, then no power."""
        end = threading.Event()
        phones = [threading.Thread(target=self.post, args=(end,)) for _ in range(4)]
        for phone in phones:
            phone.start()
        time.sleep(seconds)
        self.cut_power()
        end.set()
        for phone in phones:
            phone.join()

    def lost(self) -> List[str]:
        """The acknowledged ids that its daemon does not know."""
        client, known, offset = Client(self.port, None, keep_alive=True), set(), 0
        while True:
            rows = client.get(f'/api/v1/history?limit=200&offset={offset}').json['downloads']
            known.update(row['download_id'] for row in rows)
            offset += 200
            if not rows:
                client.close()
                return [id for id in self.acknowledged if id not in known]


def power_cuts(program: str, rounds: int) -> Tuple[int, int]:
    """(acknowledged, lost): the same disk through so many lives of a machine."""
    guest, lost = Guest(program), set()
    try:
        for _ in range(rounds):
            guest.boot()
            lost.update(guest.lost())
            guest.life(random.uniform(2, 8))
        guest.boot()
        return len(guest.acknowledged), len(lost | set(guest.lost()))
    finally:
        guest.cut_power()


@command
def cmd_power(args: List[str]) -> int:
    """`power [--rounds 5]`: the power is cut under a whole machine; exit code 1 if an acknowledged link is lost, or
    if the control run, which does not sync its commits, loses none."""
    rounds = int(option(args, 'rounds', 5))
    source = (HERE / 'videoserverd.py').read_text(encoding='utf-8')
    assert source.count("'synchronous=FULL'") == 1
    results = []
    weaker = source.replace("'synchronous=FULL'", "'synchronous=NORMAL'")
    for what, program in (('as it is', source), ('synchronous=NORMAL', weaker)):
        acknowledged, lost = power_cuts(program, rounds)
        print(f'{rounds} power cuts, {what}: {acknowledged} links acknowledged, {lost} lost', flush=True)
        results.append(lost)
    return 0 if results[0] == 0 < results[1] else 1


# ---------- memory ----------------------------------------------------------------------
# 2 GB downloaded and 4 GB served within 150 MB.

MEMORY_LIMIT = 150 << 20


MEDIA_SIZE, SERVED_SIZE = 2 << 30, 4 << 30
CONTROL_GROUPS = (  # (parent, a file that is there, the limit, what happened): version 2, then 1
    (Path('/sys/fs/cgroup'), 'cgroup.subtree_control', 'memory.max', 'memory.events'),
    (Path('/sys/fs/cgroup/memory'), 'memory.limit_in_bytes', 'memory.limit_in_bytes', 'memory.failcnt'))


class Origin(BaseHTTPRequestHandler):
    """A film of 2 GB, made while it is sent."""
    protocol_version = 'HTTP/1.1'

    def do_HEAD(self) -> None:
        self.head(0, MEDIA_SIZE)

    def head(self, start: int, end: int) -> None:
        """Status and fields for the bytes from start to end."""
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{end - 1}/{MEDIA_SIZE}')
        for field in (('Content-Type', 'video/mp4'), ('Content-Length', str(end - start)), ('Accept-Ranges', 'bytes')):
            self.send_header(*field)
        self.end_headers()

    def do_GET(self) -> None:
        found = re.match(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        at, end = (int(found[1]), min(int(found[2] or MEDIA_SIZE) + 1, MEDIA_SIZE)) if found else (0, MEDIA_SIZE)
        self.head(at, end)
        # a second to see, then 2 GB of nothing
        first = TINY_MP4 + struct.pack('>I4sQ', 1, b'free', MEDIA_SIZE - len(TINY_MP4))
        block = bytes(1 << 18)
        with contextlib.suppress(OSError):
            while at < end:
                piece = (first + block)[at:at + min(len(block), end - at)] if at < len(first) else block[:end - at]
                self.wfile.write(piece)
                at += len(piece)

    def log_message(self, *words: Any) -> None:
        """Quiet."""


@contextlib.contextmanager
def memory_limit(size: int) -> Any:
    """Words before a command line that keep it, and all that it starts, within `size` bytes, page cache included; and a
    function that tells how often the limit was met. A control group of its own, or else a limit of the data segment."""
    parent, limit, events = next(((folder, limit, events) for folder, mark, limit, events in CONTROL_GROUPS
                                  if (folder / mark).exists()), (None, '', ''))
    if not parent or not os.access(parent, os.W_OK):
        print('no control group may be made: the limit is one of the data segment')
        yield ['prlimit', f'--data={size}'], lambda: 'not counted'
        return
    group = parent / f'videoserverd-test-{os.getpid()}'
    group.mkdir()
    try:
        (group / limit).write_text(str(size))
        yield (['sh', '-c', f'echo $$ > {group}/cgroup.procs; exec "$@"', 'sh'],
               lambda: ' '.join((group / events).read_text().split()))
    finally:
        wait_until(lambda: not (group / 'cgroup.procs').read_text(), 10)
        group.rmdir()


def peak_rss(daemon: Daemon) -> float:
    """The most that has been resident since the last `forget_peak`, in MB."""
    return int(re.search(r'VmHWM:\s+(\d+)', Path(f'/proc/{daemon.pid}/status').read_text())[1]) / 1024


def forget_peak(daemon: Daemon) -> None:
    """proc(5): 5 resets the peak."""
    Path(f'/proc/{daemon.pid}/clear_refs').write_text('5')


def download_within(daemon: Daemon) -> List[str]:
    """Downloads the 2 GB; the faults."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), Origin)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    began = time.monotonic()
    id = daemon.submit(f'http://127.0.0.1:{server.server_address[1]}/film.mp4')
    row = daemon.wait_for(id, lambda row: row['status'] in ('completed', 'failed'), 900)
    server.shutdown()
    server.server_close()
    print(f'2 GB downloaded in {time.monotonic() - began:.0f} s: {row["status"]} {row["error_message"] or ""}, '
          f'{row["file_size"]} bytes, '
          f'peak RSS {peak_rss(daemon):.1f} MB', flush=True)
    return [] if row['status'] == 'completed' and row['file_size'] == MEDIA_SIZE else [str(row)]


def serve_within(daemon: Daemon) -> List[str]:
    """Serves a sparse file of 4 GB over HTTPS, whole and from its end; the faults."""
    id, name = daemon.submit(tiktok_link(1)), 'sparse_1.mp4'
    daemon.wait_for(id, lambda row: row['status'] == 'failed', 60)
    daemon.terminate()
    with (daemon.output / name).open('wb') as file:
        file.truncate(SERVED_SIZE)
    with contextlib.closing(sqlite3.connect(str(daemon.database))) as db:
        db.execute("UPDATE downloads SET status = 'completed', filename = ?, files = ?, file_size = ? WHERE id = ?",
                   (name, json.dumps([[name, SERVED_SIZE, 'video/mp4']]), SERVED_SIZE, id))
        db.commit()
    daemon.start()
    forget_peak(daemon)
    before, began, sizes = daemon.rss(), time.monotonic(), []
    for wanted in ('bytes=0-', f'bytes={SERVED_SIZE - 1000}-'):
        link = daemon.client.connection()
        link.request('GET', f'/files/{id}/{name}', headers={'Range': wanted})
        reply, size = link.getresponse(), 0
        buffer = bytearray(1 << 18)
        while True:
            got = reply.readinto(buffer)
            if not got:
                break
            size += got
        sizes.append(size)
        link.close()
    print(f'{sum(sizes)} bytes served in {time.monotonic() - began:.0f} s: RSS {before:.1f} MB before, '
          f'peak {peak_rss(daemon):.1f} MB', flush=True)
    faults = [] if sizes == [SERVED_SIZE, 1000] else [f'served {sizes}']
    return faults + ([f'RSS grew to {peak_rss(daemon):.1f} MB'] if peak_rss(daemon) > before + 5 else [])


@command
def cmd_memory(args: List[str]) -> int:
    """`memory`: 2 GB downloaded and 4 GB served within 150 MB; exit code 1 if that fails. Needs 2 GB of disk."""
    with Standin() as site, memory_limit(MEMORY_LIMIT) as (prefix, told):
        daemon = Daemon(security=ANYWHERE, prefix=prefix, downloads={'max_retries': '0'})
        try:
            faults = download_within(daemon)
            shutil.rmtree(daemon.output)
            daemon.output.mkdir()
            (daemon.output / '.videoserverd').touch()
            daemon.configure(downloader={'proxy': site.proxy})
            daemon.change_env({'SSL_CERT_FILE': site.ca_bundle})
            faults += serve_within(daemon.restart())
            print(f'the group: {told()}')
        finally:
            daemon.close()
    print('\n'.join(faults) or 'no faults')
    return 1 if faults else 0


# ---------- faults ----------------------------------------------------------------------
# A disk that fails at each call in turn.

FAULT_CALLS = ('write', 'pwrite64', 'fsync', 'fdatasync', 'rename,renameat,renameat2', 'openat', 'mkdir,mkdirat',
               'unlink,unlinkat,rmdir')
FAULT_PLACES = (('log', '/logs/'), ('database', '/data/'), ('partial', '/.incomplete'), ('finished', '/out/'))
# as strace counts, in each thread; +: and all after
FAULT_MOMENTS = (*map(str, range(1, 9)), '12', '20', '40', '1+', '2+', '3+', '5+')
REHEARSAL_SECONDS = 12.0  # in which the thread that commits makes more than 40 calls of each kind
IDLE_THREADS = 6  # main, commit, schedule, accept, care, faulthandler's


class FaultSweep(KillTally):
    """Posts and downloads go on while one call of the daemon after the other fails. After each case all that was
    acknowledged has to become a file, and every thread to live: by itself, or by a re-execution of its own."""

    def __init__(self, daemon: Daemon, site: Any):
        super().__init__(daemon, site)
        self.cases, self.left_out, self.faults, self.starts = 0, 0, [], starts(daemon)
        self.places: collections.Counter = collections.Counter()  # (call, kind of file) of each fault that was met
        self.links = [site.direct(kind, size=size) for kind in ('mp4', 'mp4', 'hls') for size in (30_000, 300_000)
                      for _ in range(4)]  # without TLS: OpenSSL's `write` is none to a disk
        self.answers: collections.Counter = collections.Counter()

    def run(self, seconds: float) -> None:
        """The cases in an order that is the same each time, as many as fit."""
        most = self.rehearse()
        cases = [(call, error, when) for call in FAULT_CALLS for error in ('EIO', 'ENOSPC') for when in FAULT_MOMENTS]
        self.chance.shuffle(cases)
        end = time.monotonic() + seconds
        for call, error, when in cases:
            if time.monotonic() > end or not self.daemon.running():
                break
            if int(when.rstrip('+')) > most[call]:
                self.left_out += 1
                print(f'left out: {call} {error} {when}: no thread makes more than {most[call]} of them', flush=True)
                continue
            self.case(call, error, when)

    def rehearse(self) -> Dict[str, int]:
        """The most calls of each kind that one thread of the daemon makes under this load: strace counts by thread,
        and one that serves a request or a download does not live long."""
        with Strace(self.daemon, calls=','.join(FAULT_CALLS)) as trace, self.load():
            time.sleep(REHEARSAL_SECONDS)
        made = collections.Counter(re.findall(r'(?m)^(\d+) +(\w+)\(', trace.file.read_text(errors='replace')))
        self.ended('the rehearsal')
        most = {call: max((times for (_, name), times in made.items() if name in call.split(',')), default=0)
                for call in FAULT_CALLS}
        print(f'one thread makes at most {most}', flush=True)
        return most

    @contextlib.contextmanager
    def load(self) -> Any:
        """Links are posted as long as this lasts."""
        end = threading.Event()
        poster = threading.Thread(target=self.post, args=(end,))
        poster.start()
        try:
            yield
        finally:
            end.set()
            poster.join()

    def post(self, end: threading.Event) -> None:
        """A phone that is told 503 sends its next link all the same."""
        client = self.daemon.new_client()
        while not end.is_set():
            link = self.chance.choice(self.links)
            try:
                status, _, body = client.post('/api/v1/download', {'url': link, 'client_id': 'k'})
            except (OSError, http.client.HTTPException) as error:
                status = repr(error)
            if status == 202:
                self.acknowledged[body['download_id']] = str(link)
            self.answers[status] += 1
            end.wait(0.15)

    def case(self, calls: str, error: str, when: str) -> None:
        """Waits for the fault to be met, looks on for a second, ends it, and waits until all is well."""
        rule, began = f'{calls}:error={error}:when={when}', time.monotonic()
        self.answers.clear()
        with Strace(self.daemon, rule, calls=calls) as trace, self.load():
            try:
                wait_until(trace.met, 3 * REHEARSAL_SECONDS)
            except AssertionError:
                self.faults.append(f'{rule}: the fault was not met')
            time.sleep(1.0)
        met, answers = time.monotonic() - began, dict(self.answers)
        if set(answers) - {202, 503}:
            self.faults.append(f'{rule}: answers {answers}')
        if when == '1+' and calls in ('pwrite64', 'fdatasync') and self.acknowledged:
            self.faults.append(f'{rule}: {len(self.acknowledged)} links acknowledged that cannot have been stored')
        self.ended(rule)
        self.cases += 1
        places = collections.Counter(map(self.place, filter(re.compile('INJECTED').search, trace.lines())))
        self.places.update({(calls, place): times for place, times in places.items()})
        print(f'{self.cases:3} {rule}: met {dict(places)} in {met:.1f} s, answers {answers}, '
              f'well after {time.monotonic() - began - met:.1f} s', flush=True)

    @staticmethod
    def place(line: str) -> str:
        """What kind of file a call was about (the last one it names)."""
        path = re.findall(r'[<"](/[^>"]*)', line)[-1:] or ['']
        return next((place for place, mark in FAULT_PLACES if mark in path[0]), 'other')

    def ended(self, rule: str) -> None:
        """A further link is taken, the queue ends, nothing is lost, no thread is dead."""
        self.answers.clear()
        try:
            with self.load():
                wait_until(lambda: self.answers[202], 15, 'a link is taken')
            wait_until(lambda: self.daemon.client.get('/api/v1/health').json['queue_size'] == 0, 90, 'the queue ends')
            wait_until(lambda: self.daemon.threads() <= IDLE_THREADS, 30, 'the threads of requests end')
        except (AssertionError, OSError, http.client.HTTPException) as error:
            self.faults.append(f'{rule}: {error!r}')
        if self.daemon.threads() < IDLE_THREADS:
            self.faults.append(f'{rule}: {IDLE_THREADS - self.daemon.threads()} threads are dead')
        self.faults += [f'{rule}: {fault}' for fault in self.lost()]
        self.acknowledged.clear()

    def lost(self) -> List[str]:
        """Acknowledged links that are not there, or not completed."""
        rows = {row['id']: row for row in self.daemon.rows()}
        return [f'lost: {id}' if id not in rows else f'{id}: {rows[id]["status"]} {rows[id]["error_message"]}'
                for id in self.acknowledged if id not in rows or rows[id]['status'] != 'completed']

    def misfiled(self) -> List[str]:
        """Files that no row knows, and rows without their files."""
        named = {name: size for row in self.daemon.rows() for name, size, _ in json.loads(row['files'] or '[]')}
        found = {name: (self.daemon.output / name).stat().st_size for name in self.daemon.files()}
        return [f'file: {pair}' for pair in set(named.items()) ^ set(found.items())]


@command
def cmd_faults(args: List[str]) -> int:
    """`faults [--seconds 3600]`: each write, sync, rename, open fails in turn under load; exit code 1 if a link is lost
    or acknowledged in vain, a thread is dead or a download ends badly."""
    seconds = option(args, 'seconds', 3600)
    began = time.monotonic()
    with Standin() as site:
        daemon = Daemon(downloads={'max_concurrent': 2, 'max_retries': 99, 'retry_delays': '1'}, security=ANYWHERE,
                        env={'PATH': path_without_ffmpeg()}, hurry={'PAUSE_SECONDS': 2}, **IN_THE_CLEAR)
        sweep = FaultSweep(daemon, site)
        try:
            daemon.download(sweep.links[0])
            sweep.run(seconds)
            faults = sweep.faults + sweep.misfiled()
            log = daemon.log()
        finally:
            daemon.close()
    for (call, place), times in sorted(sweep.places.items()):
        print(f'{call:28} {place:10} {times:5} times')
    print(f'{sweep.cases} cases in {time.monotonic() - began:.0f} s, {sweep.left_out} left out, {len(faults)} faults, '
          f'{log.count(": listening on ") - sweep.starts} re-executions, {log.count(" internal ")} attempts that ended '
          'by a mistake of the server')
    print('\n'.join(faults[:20]))
    return 1 if faults else 0


# ---------- bench -----------------------------------------------------------------------
# Speed and memory as a table. Machines are noisy: each figure stands beside a reference that was
# measured in the same run.

BENCH_SECONDS = 4.0
LOADER = '''
import http.client, json, ssl, sys, threading, time
port, ca, path, threads, seconds, keep = sys.argv[1:]
threads, seconds, keep = int(threads), float(seconds), keep == 'keep'
context = ssl.create_default_context(cafile=ca)
end, took = time.monotonic() + seconds, []
def phone(number):
    link, count = None, 0
    while time.monotonic() < end:
        client = f'{number}-{seconds}-{time.time()}'
        body = json.dumps({'url': 'https://www.tiktok.com/@bench/video/1', 'client_id': client, 'timestamp': count})
        began, count = time.perf_counter(), count + 1
        link = link or http.client.HTTPSConnection('127.0.0.1', int(port), context=context, timeout=30)
        link.request('POST', path, body, {'Content-Type': 'application/json'})
        answer = link.getresponse()
        answer.read()
        took.append(time.perf_counter() - began)
        assert answer.status in (200, 202), answer.status
        if not keep:
            link.close()
            link = None
all = [threading.Thread(target=phone, args=(number,)) for number in range(threads)]
for one in all: one.start()
for one in all: one.join()
took.sort()
print(json.dumps([len(took) / seconds, took[len(took) // 2] * 1000, took[len(took) * 99 // 100] * 1000]))
'''
NO_OP = '''
import http.server, json, ssl, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    wbufsize = -1
    def do_POST(self):
        fields = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        body = json.dumps({'status': 'queued', 'download_id': 'x' * 36, 'message': 'm', 'timestamp': 1}).encode()
        self.send_response(202)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
    def setup(self):
        self.request = self.server.context.wrap_socket(self.request, server_side=True)
        super().setup()
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True
server = Server(('127.0.0.1', 0), Handler)
server.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
server.context.load_cert_chain(sys.argv[1], sys.argv[2])
print(server.server_address[1], flush=True)
server.serve_forever()
'''
# With NO_OP: the modules that the design names, TLS, a database and six threads; not a line of ours.
EMPTY = '''
import logging, sqlite3, threading
database = sqlite3.connect(':memory:')
database.execute('CREATE TABLE one (number)')
for _ in range(6):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
'''


def load(port: int, ca: Path, threads: int, keep: bool, seconds: float = BENCH_SECONDS) -> List[float]:
    """[answers per second, p50 ms, p99 ms] of so many phones, each a thread of another process."""
    words = str(port), str(ca), '/api/v1/download', str(threads), str(seconds), 'keep' if keep else 'new'
    done = subprocess.run([sys.executable, '-c', LOADER, *words], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def bench_row(what: str, value: str, reference: str = '', aim: str = '') -> None:
    """One row of the table."""
    print(f'{what:<52} {value:>18}  {reference:<44} {aim}', flush=True)


@contextlib.contextmanager
def no_op_server(folder: Path, flags: Sequence[str] = (), more: str = '') -> Any:
    """http.server over TLS that parses JSON, stores nothing and answers: its port and process id."""
    pair = (str(folder / 'certs' / name) for name in ('server.crt', 'server.key'))
    line = sys.executable, *flags, '-c', more + NO_OP, *pair
    process = subprocess.Popen(line, stdout=subprocess.PIPE, encoding='utf-8',
                               env={**os.environ, 'MALLOC_ARENA_MAX': '1'})
    try:
        yield int(process.stdout.readline()), process.pid
    finally:
        process.kill()
        process.wait()


def bench_memory(site: Standin) -> None:
    """RSS at each stage."""
    daemon = Daemon(site=site)
    daemon.client.get('/api/v1/health')
    with no_op_server(daemon.folder, v.ALONE, EMPTY) as (port, pid):
        load(port, daemon.folder / 'certs/ca.crt', 1, keep=True, seconds=0.1)
        empty = f'an empty server of the same modules: {resident(pid):.1f} MB'
    bench_row('RSS idle before the first download', f'{daemon.rss():.1f} MB', empty, 'aim < 25')
    post = site.tiktok(size=50_000_000, speed=30_000_000)
    id = daemon.submit(post)
    peak = 0.0
    while daemon.status(id)['status'] in ('queued', 'downloading'):
        peak = max(peak, daemon.rss())
        time.sleep(0.05)
    bench_row('RSS while downloading', f'{peak:.1f} MB', '', 'aim < 60')
    for _ in range(50):
        daemon.download(site.tiktok(size=200_000))
    bench_row('RSS idle after fifty TikTok downloads', f'{daemon.rss():.1f} MB', '', 'aim < 45')
    daemon.close()


def bench_start(site: Standin) -> None:
    """Cold start to the first answer."""
    daemon = Daemon(site=site, server={'port': str(free_port())})
    daemon.terminate()
    times = []
    for _ in range(5):
        began = time.monotonic()
        daemon.launch(from_source=True)
        while True:
            with contextlib.suppress(OSError):
                if daemon.client.get('/api/v1/health').status == 200:
                    break
        times.append(time.monotonic() - began)
        wait_until(daemon.listens)
        daemon.terminate()
    began = time.monotonic()
    imports = 'import http.server, ssl, sqlite3, logging.handlers, configparser'
    subprocess.run([sys.executable, '-I', '-S', '-c', imports], check=True)
    bench_row('cold start to the first answer', f'{min(times):.2f} s',
              f'{time.monotonic() - began:.2f} s importing the stdlib set')
    daemon.close()


def bench_acks(site: Standin) -> None:
    """Latency and rate of acknowledgements beside a server that stores nothing, and a bare commit loop."""
    daemon = Daemon(site=site, downloads={'min_free_space': '9000GB'})
    ca = daemon.folder / 'certs/ca.crt'
    with no_op_server(daemon.folder) as (port, _):
        for threads, keep, what in ((1, False, 'ack, a new TLS connection each'), (1, True, 'ack, kept alive')):
            ours, bare = load(daemon.port, ca, threads, keep), load(port, ca, threads, keep)
            bench_row(what, f'{ours[1]:.1f} / {ours[2]:.1f} ms',
                      f'no-op server {bare[1]:.1f} / {bare[2]:.1f} ms (p50 / p99)')
        for threads, keep, what in ((8, False, 'acks/s, 8 new connections'), (64, True, 'acks/s, 64 kept alive')):
            pairs = [(load(daemon.port, ca, threads, keep), load(port, ca, threads, keep)) for _ in range(2)]
            ours, bare = max(a for a, _ in pairs), max(b for _, b in pairs)
            bench_row(what, f"{ours[0]:.0f}, p99 {ours[2]:.0f} ms",
                      f"no-op server {bare[0]:.0f}, p99 {bare[2]:.0f} ms: "
                      f'{ours[0] / bare[0]:.2f} of it', 'aim 0.7')
    db = sqlite3.connect(str(daemon.folder / 'bare.db'), isolation_level=None)
    db.execute('PRAGMA journal_mode=WAL')
    db.execute('PRAGMA synchronous=FULL')
    db.execute('CREATE TABLE t (a TEXT)')
    began, count = time.monotonic(), 0
    while time.monotonic() - began < 1:
        db.execute('INSERT INTO t VALUES (?)', (str(count),))
        count += 1
    bench_row('a bare SQLite commit loop', f'{count}/s', 'one row a commit, one thread')
    db.close()
    daemon.close()


YTDLP_API = '''
import sys, time
sys.path.insert(0, sys.argv[1])
import yt_dlp
for line in sys.stdin:
    url, file = line.split()
    began = time.perf_counter()
    with yt_dlp.YoutubeDL({'quiet': True, 'noprogress': True, 'outtmpl': file, 'cachedir': False}) as ydl:
        ydl.download([url])
    print(time.perf_counter() - began, flush=True)
'''
BENCH_ROUNDS = 7  # of all in turn, the best of each: what else runs here hits them alike


def completed(daemon: Daemon, url: str) -> None:
    """Submits, and waits as the page does: the answer comes with the news, nothing is asked in between."""
    id, version = daemon.submit(url), 0
    while daemon.status(id)['status'] != 'completed':
        told = daemon.poller.get(f'/api/v1/history?limit=1&since={version}&wait=20').json
        assert told['downloads'][0]['status'] != 'failed', told
        version = told['version']


def bench_download() -> None:
    """200 MB over loopback HTTP to one disk: ours, yt-dlp's API in a process that has it imported, curl."""
    site = Standin()
    url = site.direct(size=200_000_000, etag=False)  # a checksum of it all would be the origin's time
    daemon = Daemon(site=None, security=ANYWHERE, env={'SSL_CERT_FILE': site.ca_bundle})
    api = subprocess.Popen([sys.executable, '-I', '-S', '-c', YTDLP_API, str(ytdlp_folder())], stdin=subprocess.PIPE,
                           stdout=subprocess.PIPE, encoding='utf-8', bufsize=1, env=daemon.env)
    file = daemon.output / 'alone.mp4'

    def ytdlp(link: str = url) -> float:
        api.stdin.write(f'{link} {file}\n')
        return float(api.stdout.readline())

    def timed(run: Callable[[], Any]) -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    curl = ['curl', '-s', '-o', str(file), url]
    runs = {'ours': lambda: timed(lambda: completed(daemon, url)), 'yt-dlp': ytdlp}
    if shutil.which('curl'):
        runs['curl'] = lambda: timed(lambda: subprocess.run(curl, check=True))
        runs['curl, sync'] = lambda: timed(lambda: (subprocess.run(curl, check=True), v.sync(file)))
    completed(daemon, site.direct())  # so that both have seen a download
    ytdlp(site.direct())
    took: Dict[str, List[float]] = {name: [] for name in runs}
    for _ in range(BENCH_ROUNDS):
        for name, run in runs.items():
            for left in daemon.output.glob('*.mp4'):
                left.unlink()
            os.sync()  # nobody writes what another one has left
            took[name].append(run())
    best = {name: min(times) for name, times in took.items()}
    bench_row('200 MB, POST to completed: checked and fsynced', f'{best["ours"]:.2f} s',
              f'yt-dlp\'s API, warm {best["yt-dlp"]:.2f} s: {best["yt-dlp"] / best["ours"]:.2f} of its speed',
              'aim 0.95')
    for name, what in (('curl', 'curl as a program'), ('curl, sync', 'curl, then fsync')):
        if name in best:
            bench_row('', '', f'{what} {best[name]:.2f} s: {best["ours"] / best[name]:.2f} times its time', 'aim 1.5')
    api.stdin.close()
    api.wait()
    daemon.close()
    site.close()


def bench_syncs(site: Standin) -> None:
    """Database and file syncs of a download after its acknowledgement."""
    if not shutil.which('strace'):
        return
    daemon = Daemon(site=site)
    daemon.download(site.tiktok())
    counts = []
    for _ in range(5):
        with Strace(daemon, calls='fdatasync,fsync,sync,syncfs') as trace:
            daemon.download(site.tiktok(size=300_000))
            time.sleep(0.3)
        counts.append(sum(bool(re.match(r'(fdata|f|)sync', line)) for line in trace.lines()) - 1)  # one is the ack's
    bench_row('syncs per download after the ack', f'{min(counts)} to {max(counts)}', '', 'aim <= 4')
    daemon.close()


def bench_rows(site: Standin) -> None:
    """History, status, health and start-up with 100 and with 100,000 rows."""
    for count in (100, 100_000):
        daemon = Daemon(site=site, downloads={'min_free_space': '9000GB'})
        daemon.terminate()
        with contextlib.closing(sqlite3.connect(str(daemon.database))) as db:
            db.executemany('INSERT INTO downloads (id, url, client_id, status, created_at, last_updated, title) '
                           "VALUES (?, ?, 'bench', ?, ?, 1, 'A title of ordinary length')",
                           ((str(uuid.UUID(int=n)), tiktok_link(n), 'completed' if n % 10 else 'queued',
                             1_700_000_000 + n // 3) for n in range(count)))
            db.commit()
        began = time.monotonic()
        daemon.start()
        started = time.monotonic() - began
        client = daemon.new_client(keep_alive=True)
        parts = [f'start {started:.2f} s']
        for name, path in (('history', '/api/v1/history'), ('status', f'/api/v1/status/{uuid.UUID(int=7)}'),
                           ('health', '/api/v1/health'), ('deep history', f'/api/v1/history?offset={count - 50}'),
                           ('search', '/api/v1/history?q=ordinary')):
            times = []
            for _ in range(30):
                began = time.perf_counter()
                client.get(path)
                times.append(time.perf_counter() - began)
            parts.append(f'{name} {sorted(times)[15] * 1000:.1f} ms')
        print(f'{count:>7,} rows: ' + ', '.join(parts), flush=True)
        daemon.close()


@command
def cmd_bench(args: List[str]) -> int:
    """`bench [memory start acks download syncs rows]`: prints a table."""
    bench_row('what', 'figure', 'beside', 'aim')
    with Standin() as site:
        for name, run in (('memory', lambda: bench_memory(site)), ('start', lambda: bench_start(site)),
                          ('acks', lambda: bench_acks(site)), ('download', bench_download),
                          ('syncs', lambda: bench_syncs(site)), ('rows', lambda: bench_rows(site))):
            if not args or name in args:
                run()
    return 0


@command
def cmd_times(words: List[str]) -> int:
    """times [CLASS…]: wall and CPU seconds of each class, with all its processes; the longest first."""
    loader = unittest.TestLoader()
    loader.testNamePatterns = [f'*.{name}.*' for name in words] or None
    suite = loader.loadTestsFromModule(test_videoserverd)
    began = time.monotonic()
    result = unittest.TextTestRunner().run(suite)
    for name, (wall, cpu) in sorted(suite.spent.items(), key=lambda item: -item[1][0]):
        print(f'{wall:7.1f} s  {cpu:6.1f} s of CPU  {name}')
    print(f'{time.monotonic() - began:7.1f} s  {sum(cpu for _, cpu in suite.spent.values()):6.1f} s of CPU  all')
    return not result.wasSuccessful()


if __name__ == '__main__':
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    sys.exit(COMMANDS[sys.argv[1]](sys.argv[2:]))
