#!/usr/bin/env python3
"""videoserverd: the video inbox people trust.

An iPhone shares a TikTok or Instagram link; this daemon stores it safely before the phone says
"Saved", and then does whatever it takes to turn it into a file. One file, the standard library
and a vendored yt-dlp.

The map. One law: a name is used only below the line that defines it; calls point up the file.

    tools        what every section uses: sizes, small files, stable storage
    settings     one row per key, for config.ini, environment, --help and error texts
    jobs         what a download is: states, submissions, options, outcomes. Pure
    store        the only user of SQLite; the group commit
    board        volatile state: progress, a version number, a Condition
    guard        how an attempt ends, what it may reach, run and write, how it is stopped
    download     the only importer of yt_dlp; one Attempt at one job
    vendor       fetching, checking and switching the vendored yt-dlp
    publish      links to finished files, SigV4, the bucket, thumbnails
    scheduler    the heap of what is due, the workers, pause and resume
    imports      the exports of people's years, read and queued
    certificate  CA and leaf through the openssl command, the iPhone's profile
    http         the TLS server, its limits, one table of routes for two dialects
    page         the web page and the set-up page, as raw strings
    daemon       wiring, start and stop, signals, re-execution
    commands     what the command line offers

Threads: main waits for signals and re-arms the watchdog; `accept` takes connections and ends slow
ones; `request` threads (at most 128) do their own TLS handshake and never wait for yt-dlp;
`commit` alone writes the database; `schedule` alone pops the heap; each download has a `worker-…`;
`upload` and `notify` empty the outbox; `care` does daily and minutely chores; `log` writes the
log; unnamed helpers wait for slow disks and name servers on behalf of an attempt, or end a late
answer. faulthandler's thread ends the process when no other thread has run for a minute.

Locks, never two at once: Store._tickets, Board._changed, Scheduler._changed, Stopper._changed
(sockets of an attempt), Meter._lock, IMPORT_LOCK (yt_dlp is imported once), NAMES_LOCK (a free name
is taken), Pace._lock, App.guard, Server._guard, LogWriter.writing; between processes flock on
<database>.lock and <ytdlp_directory>/.lock.
"""
from __future__ import annotations

import os
import sys

if sys.version_info < (3, 9):
    sys.exit('videoserverd needs Python 3.9 or newer, and this is %d.%d. Fix: sudo apt-get install '
             'python3 (a Mac: brew install python)' % sys.version_info[:2])
if __name__ == '__main__':  # an email.py or http.py beside this file is not Python's own
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != os.path.dirname(
        os.path.abspath(__file__))]
try:
    import json
    import shlex
    import sqlite3
    import ssl
    from http.server import ThreadingHTTPServer
except ImportError as no_module:
    sys.exit('videoserverd needs all of Python, and this one has no %s (%s). Fix: sudo apt-get '
             'install python3 (a Mac: brew install python)' % (no_module.name, sys.executable))
import binascii
import errno
import faulthandler
import fcntl
import functools
import gc
import heapq
import html
import http.client
import io
import ipaddress
import itertools
import logging
import math
import re
import select
import signal
import socket
import stat
import struct
import threading
import time
import weakref
from collections import deque, namedtuple
from contextlib import closing, contextmanager, suppress
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl, quote, unquote, urlencode, urljoin, urlsplit

# ---------- tools -------------------------------------------------------------------------
# Owns what every section uses: the log, the kinds of trouble, sizes, atomic small files, stable
# storage. No lock. Called by all.

VERSION = '1.0.0'
BUILT = 1795219200  # 2026-11-21, epoch seconds: a clock that shows less is wrong
PROGRAM = Path(__file__).absolute()
log = logging.getLogger('videoserverd')


class Trouble(Exception):
    """A fault that the reader can fix; str() is one line that says how."""
    exit_code = 1


def parse_size(text):
    """Bytes of '10MB', '1.5M', '500k' or '4096'; powers of 1024. Raises ValueError."""
    match = re.fullmatch(r'(\d{1,12}(?:\.\d{1,6})?)\s*([KMGT]?)(?:i?B)?', text.strip(), re.I | re.A)
    if not match:
        raise ValueError('a size such as 500MB, 1.5G or 4096')
    return int(float(match[1]) * 1024 ** ('', 'K', 'M', 'G', 'T').index(match[2].upper()))


def format_size(size):
    """'1.4 GB' for 1503238553, for people; powers of 1024 as in parse_size."""
    units = ['TB', 'GB', 'MB', 'KB', 'bytes']
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop()
    decimals = int(size < 100 and units[-1] != 'bytes')
    return f'{size:.{decimals}f} {units[-1]}'


def sync_handle(fd):
    """Put an open file's bytes on stable storage. Raises OSError."""
    if hasattr(fcntl, 'F_FULLFSYNC'):  # macOS leaves the drive's own cache out of fsync
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    os.fsync(fd)


def sync(path):
    """Put a file's bytes, or a folder's names, on stable storage. Raises OSError."""
    folder = path.is_dir()
    for mode in (os.O_RDONLY, os.O_RDWR):
        fd = os.open(path, mode)
        try:
            return sync_handle(fd)
        except OSError as error:
            refused = error.errno in (errno.EACCES, errno.EBADF)  # CIFS: not on a read-only handle
            if folder and (refused or error.errno in (errno.EINVAL, errno.ENOTSUP)):
                return log.debug('%s: this share cannot sync a folder: %s', path, error)
            if not refused or mode == os.O_RDWR:
                raise
        finally:
            os.close(fd)


def write_whole(file, text, durable=True):
    """Replace a small private file atomically: a kill leaves the old one or the new one; if
    `durable`, a power cut does too. Raises OSError."""
    fresh = file.with_name(f'.{file.name}.new')
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(fd, 'w', encoding='utf-8') as stream:
        stream.write(text)
        stream.flush()
        if durable:
            sync_handle(fd)
    os.replace(fresh, file)


def read_note(file):
    """The JSON object in a small file; {} where there is none."""
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads(file.read_text(encoding='utf-8')))
    return {}


def find_line(file, pattern):
    """The first group of the first line in `file` that matches; '' when there is none."""
    try:
        with open(file, encoding='utf-8', errors='replace') as stream:
            start = stream.read(4096)  # METADATA goes on with the whole README
    except OSError:
        return ''
    match = re.search(pattern, start, re.M | re.A)
    return match[1] if match else ''


def remove_folder(folder):
    """Remove a folder and its contents, as far as possible."""
    import shutil
    shutil.rmtree(folder, ignore_errors=True)


def which(name):
    """Where a program is, None if it is not installed."""
    import shutil  # it imports three compressors: 0.5 MB that an idle server does not need
    return shutil.which(name)


def output_of(command, seconds, data=b'', preexec_fn=None):
    """What a program makes of `data`; b'' where it is missing, fails or takes too long."""
    import subprocess
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, input=data, stdout=subprocess.PIPE, timeout=seconds,
                              stderr=subprocess.DEVNULL, check=True, preexec_fn=preexec_fn).stdout
    return b''


def spawn(target, *args, name=None):
    """A thread that runs it and does not keep the process from ending."""
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    thread.start()
    return thread


def free_space(folder):
    """Bytes free for us on its disk. Raises OSError."""
    disk = os.statvfs(folder)
    if not disk.f_blocks:  # the mount does not report it: assume it is not full
        return 1 << 50
    return disk.f_bavail * disk.f_frsize


CONNECT_SECONDS = 10.0  # for connecting, and again for the TLS handshake
BLOCK_SECONDS = 60.0  # for a block of what is sent


def http_call(method, url, headers=(), body=None, answer_seconds=60.0, limit=1 << 20,
              context=None):
    """The program's own requests: (status, headers, body) of the answer, of at most `limit` bytes,
    within `answer_seconds` in all. `body` is bytes or an iterator of blocks. No redirects, no
    proxy. Raises OSError."""
    parts, late = urlsplit(url), threading.Event()
    kind = functools.partial(http.client.HTTPSConnection, context=context)
    if parts.scheme == 'http':
        kind = http.client.HTTPConnection

    def hang_up():
        late.set()
        with suppress(OSError):  # below TLS, whose goodbye could stall
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
    deadline = threading.Timer(answer_seconds, hang_up)
    deadline.daemon = True
    try:
        with closing(kind(parts.hostname, parts.port, timeout=CONNECT_SECONDS)) as line:
            line.connect()
            sock = line.sock
            sock.settimeout(BLOCK_SECONDS)
            target = parts._replace(scheme='', netloc='').geturl() or '/'
            with suppress(ConnectionError):  # a refusing server may hang up before reading all
                line.request(method, target, body, dict(headers))
            sock.settimeout(answer_seconds)
            deadline.start()  # the answer may come in drops
            with line.getresponse() as answer:
                received = answer.read(limit + 1)
                if answer.length or len(received) > limit:
                    raise ConnectionError('the answer was cut short, or is too long')
                return answer.status, answer.headers, received
    except http.client.HTTPException as error:
        raise ConnectionError(f'no HTTP: {error}') from None
    finally:
        deadline.cancel()
        if late.is_set():
            raise TimeoutError('timed out') from None


# ---------- settings ----------------------------------------------------------------------
# Owns every key of config.ini: its row feeds checks, environment, --help and the README's table.
# No lock: a Config is built once and never changed. Called by commands and tests.

class ConfigError(Trouble):
    """A configuration that cannot be used: names file, section, key and what is accepted."""
    exit_code = 2


def one_of(choices):
    """A parser that accepts the words of `choices` and returns what they stand for."""
    def parse(text):
        if text.lower() not in choices:
            raise ValueError(' or '.join(choices))
        return choices[text.lower()]
    return parse


@contextmanager
def accepts(what):
    """Makes the ValueError of a parser say what is accepted: a decorator."""
    try:
        yield
    except ValueError:
        raise ValueError(what) from None


def whole(low, high):
    """A parser of whole numbers."""
    def parse(text):
        if not re.fullmatch(r'\d{1,9}', text, re.A) or not low <= int(text) <= high:
            raise ValueError(f'a whole number from {low} to {high}')
        return int(text)
    return parse


def matching(pattern, accepted):
    """A parser that accepts texts matching the pattern."""
    def parse(text):
        if not re.fullmatch(pattern, text, re.A):
            raise ValueError(accepted)
        return text
    return parse


def optional(parse):
    """A parser that takes empty as None and anything else by `parse`."""
    return lambda text: parse(text) if text else None


def word_list(text):
    return tuple(word.strip() for word in text.split(',') if word.strip())


def listing(pattern, accepted, convert=str):
    """A parser of 1 to 30 comma-separated words matching the pattern."""
    def parse(text):
        found = word_list(text)
        if not 0 < len(found) <= 30 or not all(re.fullmatch(pattern, word, re.A) for word in found):
            raise ValueError(accepted)
        return tuple(map(convert, found))
    return parse


def file_setting(text):
    """A file or folder, with quotes around it or without."""
    return Path(re.sub(r'^(["\'])(.*)\1$', r'\2', text))


@accepts('forever, days such as 90d, or a size such as 200GB')
def retention(text):
    """What is kept: None for everything, else ('days', n) or ('bytes', n)."""
    if text.lower() == 'forever':
        return None
    days = re.fullmatch(r'(\d{1,5}) ?d', text, re.I | re.A)
    return ('days', int(days[1])) if days else ('bytes', parse_size(text))


@accepts('an IP address of this machine, such as 127.0.0.1, or 0.0.0.0 or ::')
def listen_host(text):
    address = ipaddress.ip_address(text)
    if address.is_multicast:
        raise ValueError
    return str(address)


@accepts('networks such as 192.168.1.0/24, separated by commas')
def networks(text):
    """CIDR networks; a bare address is a network of one."""
    return tuple(map(ipaddress.ip_network, word_list(text)))


CLIENTS = {  # RFC 1918, 6598 (Tailscale), 3927, 4193, loopback
    'private': '127.0.0.0/8,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,100.64.0.0/10,169.254.0.0/16,'
               '::1,fc00::/7,fe80::/10',
    'any': '0.0.0.0/0,::/0'}
PRIVATE_NETWORKS = networks(CLIENTS['private'])


def is_within(address, wanted):
    ip = ipaddress.ip_address(address)
    return any(ip in network for network in wanted)


def clients(text):
    if not word_list(text):
        raise ValueError('private, any, or networks such as 192.168.1.0/24')
    return networks(CLIENTS.get(text.lower(), text))


@accepts('a whole web address such as https://pi.local:8443, without ? or #')
def http_url(text):
    """An http or https address without query, fragment or final slash."""
    parts = urlsplit(text)
    fine = parts.scheme in ('http', 'https') and parts.hostname and (parts.port or 1)
    if not fine or parts.username is not None or re.search(r'[\s"<>\\?#]', text):
        raise ValueError
    return text.rstrip('/')


def domain_list(text):
    """Domain names in lower case, or only '*'."""
    found = listing(r'\*|[a-z0-9-]+(?:\.[a-z0-9-]+)+\.?', 'domain names such as tiktok.com, '
                          'separated by commas, or *', lambda word: word.rstrip('.'))(text.lower())
    return ('*',) if '*' in found else found


def site_gaps(text):
    found = [re.fullmatch(r'([a-z0-9.-]+) +(\d{1,4}(?:\.\d)?)', word) for word in word_list(text)]
    if not all(found):
        raise ValueError('sites and seconds such as tiktok.com 2, instagram.com 6')
    return {match[1]: float(match[2]) for match in found}


on_off = one_of({'on': True, 'off': False})
log_level = one_of({name.lower(): name for name in ('DEBUG', 'INFO', 'WARNING', 'ERROR')})
delay_list = listing(r'\d{1,7}', 'seconds, separated by commas, such as 60,300,900', int)
icloud_url = matching(r'https://www\.icloud\.com/shortcuts/\w{1,100}/?',
                      'an address such as https://www.icloud.com/shortcuts/0123abcd')
notify_url = matching(r'(?:ntfy\+)?https?://[^\s"<>\\#@/]+(?:/[^\s"<>\\#]*)?',
                      'a whole web address such as https://ntfy.sh/my-topic, without #')
FIELD = r'%\((?:title|id|uploader|site|date)\)s'
NAME_PART = rf'(?:{FIELD}|[^\s\0-\x1f/.%\\:*?"<>|~-])(?:{FIELD}|[^\0-\x1f/%\\:*?"<>|]){{0,100}}'
name_pattern = matching(
    rf'(?=.*%\((?:title|id)\)s[^/]*$){NAME_PART}(?:/{NAME_PART}){{0,5}}',
    'a pattern such as %(title)s_%(id)s or %(uploader)s/%(date)s_%(title)s of title, id, uploader, '
    'site and date, with title or id in the name')
proxy_url = matching(
    r'(http|socks4a?|socks5h?)://[^\s/]+/?',
    'an address such as http://192.168.1.2:3128 or socks5h://127.0.0.1:1080')
location = matching(r'|/(?:[\w.-]+/)*', 'a path such as /protected/')
EVENTS = 'completed,failed,attention'
SETTINGS = {  # section: {key: (default, parser, help)}; a parser's ValueError says what is accepted
    'server': {
        'host': ('0.0.0.0', listen_host, 'address to listen on; :: is IPv6 and IPv4'),
        'port': ('8443', whole(0, 65535), 'TCP port to listen on; 0 picks a free one'),
        'tls': ('on', on_off, 'off: plain HTTP, behind a proxy that does TLS'),
        'cert_file': ('certs/server.crt', file_setting, 'certificate; created if missing'),
        'key_file': ('certs/server.key', file_setting, 'its private key'),
        'ca_file': ('certs/ca.crt', file_setting, 'the CA; its key is ca.key beside it'),
        'names': ('', word_list, 'other names and addresses of this server'),
        'public_base_url': ('', optional(http_url),
                            'how others reach it; empty: https://<host>.local:<port>'),
        'trusted_proxies': ('', networks, 'proxies whose X-Forwarded-For is trusted'),
        'accel_redirect': ('', location, 'internal nginx location of the videos'),
    },
    'database': {
        'path': ('data/downloads.db', file_setting, 'the SQLite file, on a local disk'),
        'backups': ('7', whole(0, 365), 'daily copies kept beside it; 0 = none'),
    },
    'downloads': {
        'output_directory': ('~/Downloads/VideoServer', file_setting, 'where videos go'),
        'max_concurrent': ('1', whole(1, 16), 'downloads at the same time'),
        'max_retries': ('3', whole(0, 100), 'retries after a temporary failure'),
        'retry_delays': ('60,300,900', delay_list, 'seconds before each retry; the last repeats'),
        'min_free_space': ('500MB', parse_size, 'with less free space the queue pauses'),
        'keep': ('forever', retention,
                 'or 90d, or 200GB: the oldest videos are deleted, except those with a star'),
        'filename': ('%(title)s_%(id)s', name_pattern,
                     'names of files: title, id, uploader, site, date; / makes folders'),
        'slideshow': ('on', on_off, 'turn a photo post with sound into a video, by ffmpeg'),
        'metadata': ('off', on_off, 'title, author, caption and link inside the videos'),
        'mtime': ('on', on_off, 'give each file the date of its post'),
        'import_pace': ('30', whole(0, 86400), 'seconds between two posts of an import'),
    },
    'downloader': {
        'ytdlp_directory': ('vendor', file_setting, 'where the vendored yt-dlp lives'),
        'auto_update': ('on', on_off, 'update yt-dlp weekly, and when a site has changed'),
        'channel': ('auto', one_of({name: name for name in ('stable', 'nightly', 'auto')}),
                    'auto: a pre-release when a site has changed'),
        'format': ('', str, 'yt-dlp format; empty: the best that an iPhone plays, as mp4'),
        'rate_limit': ('', optional(parse_size), 'bytes per second; empty: no limit'),
        'user_agent_rotation': ('on', on_off, 'a different browser name for each attempt'),
        'page_pace': ('tiktok.com 2, instagram.com 6', site_gaps,
                      'seconds between requests for pages of a site'),
        'timeout': ('300', whole(5, 86400), 'seconds in which 64 KB must arrive'),
        'cookies_file': ('', optional(file_setting), 'cookies for posts that need a login'),
        'proxy': ('', optional(proxy_url), 'proxy for all downloads'),
        'impersonate': ('off', on_off, 'ask for pages as a real browser does, by curl_cffi'),
    },
    'security': {
        'allowed_domains': ('tiktok.com,instagram.com', domain_list, '* = any public site'),
        'allowed_clients': ('private', clients, 'who may connect: private, any, or networks'),
        'requests_per_hour': ('100', whole(0, 1000000), 'links per client; 0 = no limit'),
        'max_url_length': ('2048', whole(64, 8192), 'longest link accepted, in characters'),
        'max_request_size': ('16KB', parse_size, 'longest request body'),
        'allow_private_targets': ('off', on_off, 'allow videos from private addresses'),
    },
    'phone': {
        'shortcut_url': ('', optional(icloud_url), 'your Shortcut, offered on /setup'),
    },
    'notify': {
        'url': ('', optional(notify_url), 'ntfy topic or webhook to notify'),
        'events': (EVENTS, listing(EVENTS.replace(',', '|'), f'some of {EVENTS}'),
                   'which events are sent'),
    },
    's3': {
        'endpoint': ('', optional(http_url), 'object storage for a copy of each file'),
        'public_endpoint': ('', optional(http_url), 'its address as phones reach it'),
        'bucket': ('', str, 'its name; {bucket} in the endpoint: virtual-host addresses'),
        'region': ('us-east-1', matching('.+', 'a name such as us-east-1'), 'region to sign for'),
        'prefix': ('', str, 'put before each object name'),
        'url_expiry': ('86400', whole(60, 604800), 'seconds that a signed link is valid'),
    },
    'logging': {
        'level': ('INFO', log_level, 'DEBUG, INFO, WARNING or ERROR'),
        'file': ('logs/server.log', optional(file_setting), 'log file; empty: none'),
        'max_size': ('10MB', parse_size, 'size at which it rotates'),
        'backup_count': ('5', whole(0, 1000), 'rotated files kept'),
    },
}

# Document B's names for three of them.
OTHER_NAMES = {
    'PRT_VIDEODOWNLOADER_SQLITEFILEPATH': ('database', 'path'),
    'PRT_VIDEODOWNLOADER_VIDEODATAPATH': ('downloads', 'output_directory'),
    'PRT_VIDEODOWNLOADER_HTTPSBASEURL': ('server', 'public_base_url'),
}
SECRET_NAMES = ('VIDEOSERVER_API_KEYS', 'VIDEOSERVER_NOTIFY_SECRET', 'AWS_ACCESS_KEY_ID',
                'AWS_SECRET_ACCESS_KEY')


class Config(SimpleNamespace):
    """All settings, a namespace per section, and `file`, `folder`, the secrets."""


def found_settings(file, env):
    """(where, section, key, text): built-in, in `file`, in `env`. Raises ConfigError."""
    for section, rows in SETTINGS.items():
        yield from (('built-in', section, key, default) for key, (default, *_) in rows.items())
    import configparser
    parser = configparser.ConfigParser(interpolation=None, default_section='\0',
                                       inline_comment_prefixes=('#', ';'))
    try:
        parser.read_string(file.read_text(encoding='utf-8') if file else '', str(file))
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise ConfigError(f'{file}: {" ".join(str(error).split())}') from None
    for section in parser.sections():
        rows = [*parser[section].items(), *[('', '')] * (section not in SETTINGS)]
        yield from ((str(file), section, key, text) for key, text in rows)
    for name, text in sorted(env.items(), reverse=True):  # PRT_… first: VIDEOSERVER_… wins
        section, key = OTHER_NAMES.get(name, ('', ''))
        if name.startswith('VIDEOSERVER_') and name not in SECRET_NAMES:
            section, _, key = name.lower().partition('_')[2].partition('_')
        if section:
            yield f'environment {name}', section, key, text


def parse_setting(where, section, key, text, folder):
    """The value of one key; relative paths are taken from `folder`. Raises ConfigError."""
    rows = SETTINGS.get(section)
    if not rows:
        raise ConfigError(f'{where}: [{section}] is unknown; accepted: {", ".join(SETTINGS)}')
    if key not in rows:
        raise ConfigError(f'{where}: [{section}] {key} is unknown; accepted: {", ".join(rows)}')
    try:
        if '\0' in text or '\n' in text:
            raise ValueError('one line')
        value = rows[key][1](text.strip())
    except ValueError as error:
        raise ConfigError(f'{where}: [{section}] {key} = {text!r} cannot be used. Set it to '
                          f'{error}.') from None
    if isinstance(value, Path):
        with suppress(RuntimeError):  # a service user may have no home
            value = value.expanduser()
        value = folder / value
    return value


def load_config(file, env):
    """Built-in values, then `file` (None: none), then the environment. Raises ConfigError."""
    folder = (file or PROGRAM).absolute().parent
    config = Config(file=file and file.absolute(), folder=folder,
                    **{section: SimpleNamespace() for section in SETTINGS})
    for where, section, key, text in found_settings(file, env):
        value = parse_setting(where, section, key, text, folder)
        setattr(getattr(config, section), key, value)
    keys, *secrets = (env.get(name, '') for name in SECRET_NAMES)
    config.api_keys = word_list(keys)
    config.notify_secret, config.aws_access_key_id, config.aws_secret_access_key = secrets
    if config.s3.endpoint and not (config.s3.bucket and all(secrets[1:])):
        raise ConfigError(f'{file or "environment"}: [s3] endpoint needs bucket, and '
                          f'{" and ".join(SECRET_NAMES[2:])} in the environment')
    return config


# ---------- jobs --------------------------------------------------------------------------
# Defines a download: its states, the parsing of a submission (text → URL → checked URL),
# the allowlist of yt-dlp options, names of files, back-off, outcomes. No clock, no I/O, no
# lock: pure functions of their arguments. Called by all sections below.

STATES = ('queued', 'downloading', 'completed', 'failed')
FRESH = {'error_message': None, 'reason': None, 'crashes': 0, 'next_attempt_at': None}
TRANSITIONS = {  # verb of the store: statuses before, status after, and columns that it sets
    'claim': (('queued',), 'downloading', {'next_attempt_at': None}),
    'finish': (('downloading',), 'completed', FRESH),
    'retry_later': (('downloading',), 'queued', {'crashes': 0}),
    'give_up': (('downloading',), 'failed', {'crashes': 0}),
    # stopped, paused or crashed: no attempt counted
    'requeue': (('downloading',), 'queued', {'crashes': 0, 'next_attempt_at': None}),
    # a running one is stopped first, then given up
    'cancel': (('queued',), 'failed', {'error_message': 'Cancelled', 'reason': 'cancelled',
                                       'next_attempt_at': None}),
    # of a queued one: now instead of later
    'retry': (('failed', 'queued'), 'queued', {**FRESH, 'retry_count': 0}),
    'forget': (('queued', 'completed', 'failed'), '', {}),  # the row is deleted
}


MediaFile = namedtuple('MediaFile', 'name size type')  # name in the output folder, bytes, MIME


# How far a running download is. `phase`: page, media, merge or file; bytes; seconds.
Progress = namedtuple('Progress', 'percent phase downloaded total speed eta title',
                      defaults=('', 0, None, None, None, ''))


# One try at one download: attempt 1 is the first; earlier ones delivered `files`. `imported`: the
# import it comes from.
Job = namedtuple('Job', 'id url options attempt files imported', defaults=((), None))


# How a try ended: done, retry, give_up, cancelled, stopped or pause. `reason` is a stable word,
# `message` a sentence for a person, `tries` a limit on attempts for this reason, below the
# configured one; `files` with a retry are those that arrived. `note` says what is missing or
# unusual, `post` is what the site says about it. `shared` is the download that owns the files, if
# the post had already been downloaded.
Outcome = namedtuple('Outcome', 'kind reason message title files tries note post shared',
                     defaults=('', '', '', (), math.inf, '', {}, None))


def backoff(attempt, delays):
    """Seconds to wait after failed attempt `attempt` (1 = first); the last delay repeats."""
    return delays[min(attempt, len(delays)) - 1]


STEPS = {'done': 'finish', 'give_up': 'give_up', 'cancelled': 'give_up',
         'stopped': 'requeue', 'pause': 'requeue'}


def next_step(outcome, attempt, max_retries, delays):
    """The store's verb for how an attempt ended, and seconds to wait before the next. A post is
    finished with the files that came when the rest cannot be had."""
    if outcome.kind != 'retry':
        return STEPS[outcome.kind], 0
    if attempt >= min(outcome.tries, max_retries + 1):
        return 'finish' if outcome.files else 'give_up', 0
    return 'retry_later', backoff(attempt, delays)


# -- what a phone sends

class Refused(Exception):
    """A submission that is refused. `code` is a stable word: bad_field, no_url, bad_url,
    url_too_long, domain_not_allowed, private_address, option_not_allowed, bad_option,
    rate_limited: the next is accepted in `wait` seconds."""

    def __init__(self, code, message, wait=0):
        super().__init__(message)
        self.code, self.wait = code, wait


# A link to store. `timestamp` is the sender's, of any size, or None; it is only compared. The
# option `again` asks to download a post again that is already here.
Submission = namedtuple('Submission', 'url client_id timestamp options')


UNSAFE = re.compile(  # control characters, line ends, direction marks, lone surrogates
    '[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]')
TIKTOKV = 'tiktokv.com'  # TikTok's own, in its data export; allowed where tiktok.com is
SITES = ('tiktok.com', 'instagram.com', TIKTOKV)  # links to them are known without https://


def excerpt(text, length=60):
    """`text` as one short line for a message."""
    start = UNSAFE.sub('\ufffd', text[:length])
    if len(text) > length:
        return start[:-1] + '…'
    return start


# A link in running text ends at a space, quote or bracket, or before Chinese text or an emoji.
# A host does not end there, nor at a line's end: all that a browser might read must be checked.
LINK_CHARACTER = r'[!#-;=?-~\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u052f]'
NEXT_LINK = r'(?<![=/])https?://'  # after / or = it belongs to the link before
REST = rf'(?:[/?#](?:(?!{NEXT_LINK}){LINK_CHARACTER})*)'
LINK = re.compile(rf'https?://(?:(?!{NEXT_LINK})'
                  rf'(?:[^\s/?#<>"]|[\t\r\n]+(?!https?://)(?=[^\s/?#<>"])))+{REST}?'
                  r'|(?<![a-z0-9@._/%=:&?#\\\u00c0-\u052f-])'
                  rf'((?:[a-z0-9-]{{1,63}}\.)+[a-z]{{2,63}})(?=/){REST}',
                  re.I | re.A)  # A: to re.I alone, ſ is an s
TRAILING = '.,:;!?\'"*|`'


def is_under(host, domains):
    """Is `host` one of the domains or a subdomain of one?"""
    return any(host == domain or host.endswith('.' + domain) for domain in domains)


def trim_link(link):
    """`link` without the punctuation of the sentence around it; balanced brackets stay."""
    for last in link[:-65:-1]:
        opening = {')': '(', ']': '[', '}': '{'}.get(last)
        if last not in TRAILING and not (opening and link.count(last) > link.count(opening)):
            break
        link = link[:-1]
    return link


def find_urls(text, domains=SITES):
    """The links in a text, in order, as written; those without https:// only to `domains`."""
    return ['https://' * bool(match[1]) + trim_link(match[0]) for match in LINK.finditer(text)
            if not match[1] or is_under(match[1].lower(), domains)]


# -- which link is fetched

# RFC 6761, 6762 and 8375; .internal is reserved by ICANN.
PRIVATE_NAMES = ('localhost', 'local', 'lan', 'internal', 'home.arpa')
WRAPPED_IPV4 = networks('::ffff:0:0/96,::/96,64:ff9b::/96')  # IPv4 in the last 32 bits
NEVER_PUBLIC = networks(  # some versions call these global
    '192.0.0.0/24,192.88.99.0/24,240.0.0.0/4,64:ff9b:1::/48,100::/64,2001::/23,fec0::/10')


def unwrap_address(address):
    """The IP address; the IPv4 address inside an IPv6 one. Raises ValueError."""
    ip = ipaddress.ip_address(address.partition('%')[0])
    if is_within(ip, WRAPPED_IPV4):
        return ipaddress.IPv4Address(int(ip) & 0xffffffff)
    return getattr(ip, 'sixtofour', None) or ip


def is_public(address):
    """Is the address on the Internet? Raises ValueError."""
    ip = unwrap_address(address)
    return ip.is_global and not ip.is_multicast and not is_within(ip, NEVER_PUBLIC)


@functools.lru_cache(maxsize=32)  # nearly all links lead to the same few hosts
def is_private_host(host):
    """Is the canonical host, by its spelling, something that is not on the Internet?"""
    try:
        return not is_public(host.strip('[]'))
    except ValueError:
        return '.' not in host or is_under(host, PRIVATE_NAMES)


# Non-ASCII names are refused, also as xn--: programs do not all read them alike.
LABEL = re.compile(r'(?!xn--)[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?')


@functools.lru_cache(maxsize=32)
def canonical_host(host):
    """The one spelling of a host in ASCII, or an address. Raises ValueError."""
    if host.startswith('['):
        return f'[{ipaddress.IPv6Address(host[1:-1])}]'
    if not host.isascii():
        raise ValueError('not ASCII')
    host = re.sub(r'\.$', '', host.lower())
    if len(host) > 253 or not all(map(LABEL.fullmatch, host.split('.'))):
        raise ValueError('not a host name')
    number = re.fullmatch(r'[0-9]+|0x[0-9a-f]*', host.rpartition('.')[2])
    if number and str(ipaddress.IPv4Address(host)) != host:
        raise ValueError('an address in disguise')  # 127.1, 0177.0.0.1, 0x7f000001 and the like
    return host


def check_host(host, security):
    """Raise Refused unless links to `host` are accepted."""
    domains = security.allowed_domains
    if 'tiktok.com' in domains:
        domains = (*domains, TIKTOKV)
    if domains != ('*',) and not is_under(host, domains):
        raise Refused('domain_not_allowed', f'Links to {excerpt(host)} are not accepted, '
                                            f'only to {", ".join(security.allowed_domains)}.')
    if not security.allow_private_targets and is_private_host(host):
        raise Refused('private_address', f'{excerpt(host)} is in a private network; '
                                         'such links are not allowed.')


WEB_LINK = re.compile(r'(https?)://([^/?#]*)([^?#]*)(\?[^#]*)?(?:#.*)?', re.I | re.A)
AUTHORITY = re.compile(r'(\[[0-9a-f:.]+\]|[^][:]+)(?::([0-9]{0,5}))?', re.I | re.A)
URL_SAFE = "%/;:@&=+$,!~*'()?[]"  # what yt-dlp itself leaves as it is
DEFAULT_PORTS = {'http': 80, 'https': 443}


def split_url(text):
    """Scheme, canonical host, port, and path with query of a web link. Raises ValueError."""
    parts = WEB_LINK.fullmatch(text)
    if not parts or re.search(r'[\s\\]', text) or UNSAFE.search(text):
        raise ValueError('not a web link')
    authority = AUTHORITY.fullmatch(parts[2])
    if not authority:
        raise ValueError('not a host and port')
    scheme, host = parts[1].lower(), canonical_host(authority[1])
    port = int(authority[2] or DEFAULT_PORTS[scheme])
    if not 1 <= port <= 65535:
        raise ValueError('not a port')
    return scheme, host, port, quote((parts[3] or '/') + (parts[4] or ''), safe=URL_SAFE)


def check_url(text, security):
    """The canonical URL of a link: exactly this is checked, stored and fetched. Raises Refused.

    Rebuilt from its parts; to a listed domain always https on port 443."""
    try:
        scheme, host, port, rest = split_url(text[:security.max_url_length + 1])
    except ValueError:
        raise Refused('bad_url', f'This is not a valid web link: {excerpt(text)}') from None
    check_host(host, security)
    if security.allowed_domains != ('*',):
        if port != DEFAULT_PORTS[scheme]:
            raise Refused('bad_url', f'Links to port {port} are not accepted.')
        scheme, port = 'https', 443
    if port != DEFAULT_PORTS[scheme]:
        host = f'{host}:{port}'
    url = f'{scheme}://{host}{rest}'
    if max(len(text), len(url)) > security.max_url_length:
        raise Refused('url_too_long',
                      f'The link is longer than {security.max_url_length} characters.')
    return url


def site_of(url):
    """The site of a canonical URL as people know it: 'tiktok.com'."""
    host = re.sub(r'^\w+://(www\.)?|(:\d+)?([/?#].*)?$', '', url, flags=re.S)
    if is_under(host, (TIKTOKV,)):
        return SITES[0]
    return next((site for site in SITES if is_under(host, (site,))), host)


POST_LINK = re.compile(  # where a link names its post
    r'https://(?:[\w.-]+\.)?(?:tiktokv?\.com/'
    r'(?:@[^/]*/(?:video|photo)|share/video|embed(?:/v\d)?|v)/(\d{1,25})(?:\.html)?'
    r'|instagram\.com/(?:[\w.]{1,64}/)?(?:p|reels?|tv)/([\w-]{8,64}))/?(?:\?|$)', re.A)


def post_of(url):
    """Site and media id of the post that a canonical URL names; of a short link (None, None)."""
    named = POST_LINK.match(url)
    if not named:
        return None, None
    return SITES[bool(named[2])], named[1] or named[2]


HOW = ('--limit-rate', '--retries', '--fragment-retries', '--extractor-retries', '--socket-timeout',
       '--concurrent-fragments', '--user-agent', '--referer', 'again')


def asked_of(options):
    """What the options ask for, without those on how to fetch it; None: the default."""
    wanted = sorted((pair for pair in options if pair[0] not in HOW), key=lambda pair: pair[0])
    return json.dumps(wanted) if wanted else None


# -- options of the caller

def upto(high, low=0):
    """A parser of whole numbers from `low`; more than `high` becomes `high`."""
    def parse(text):
        if not re.fullmatch(r'[0-9]{1,9}', text) or int(text) < low:
            raise ValueError(f'a whole number from {low} to {high}')
        return str(min(int(text), high))
    return parse


def up_to_30(item):
    """The pattern of a list of items, separated by commas."""
    return f'{item}(?:,{item}){{0,29}}'


def byte_rate(text):
    """Bytes per second, at least 10 KB: slower would block the queue for hours."""
    known = re.fullmatch(r'[0-9]{1,9}(\.[0-9]{1,3})?[KMG]?', text, re.I | re.A)
    if not known or parse_size(text) < 10 << 10:
        raise ValueError('bytes per second such as 500K or 4.2M, at least 10K')
    return text


NUMBER = r'\d+(?:\.\d+)?(?:[kKmMgG]i?[Bb]?)?'
FILTER = (rf'\[ ?[\w.-]+ ?(?:[<>]=? ?(?:\? ?)?{NUMBER}'  # a space must match in one way only
          r"""|(?:!?=|!?[*^$]=) ?(?:\? ?)?(?:[\w.-]+|"[^"\\\n]+"|'[^'\\\n]+')) ?\]""")
SELECTOR = rf'(?:(?:~|[\w.*-]+)(?:{FILTER})*|(?:{FILTER})+)'  # ~ stands for a group
SELECTORS = re.compile(rf' ?{SELECTOR}(?: ?[+/] ?{SELECTOR})* ?', re.A)
GROUP = re.compile(rf'\({SELECTORS.pattern}\)', re.A)


def format_spec(text):
    """A yt-dlp format without ~= (its pattern may run forever), - (prompts on the terminal), all
    and comma (each video of a post gives one file)."""
    rest = text
    if len(text) > 300 or re.search(r'~|^ ?- ?$|\b(merge)?all\b', text):
        rest = ''
    for _ in range(5):  # the innermost first
        rest = GROUP.sub('~', rest)
    if not SELECTORS.fullmatch(rest):
        raise ValueError('a format such as bv*+ba/b, without ~=, all and comma')
    return text


# Fields of yt-dlp's FormatSorter, which would keep others and odd limits for later downloads.
SORT_FIELD = (r'(?a:\+?(?:(?:hasvid|hasaud|lang|quality|source|proto|hdr|id)'
              r'|(?:res|height|width|fps|channels|br|tbr|vbr|abr|asr)(?:[~:]\d{1,9})?'
              r'|(?:size|filesize|fs_approx)(?:[~:]\d{1,9}[KMGkmg]?)?'
              r'|(?:codec|vcodec|acodec|ext|vext|aext)(?:[~:][\w.-]{1,30}){0,2}))')
CONTAINERS = '(?:avi|flv|mkv|mov|mp4|webm)(?:/(?:avi|flv|mkv|mov|mp4|webm)){0,5}'
LANGUAGE = '-?[A-Za-z0-9]{1,12}(?:[_-][A-Za-z0-9]{1,12}){0,4}'  # yt-dlp takes it for a regex
AUDIO = 'best|aac|alac|flac|m4a|mp3|opus|vorbis|wav'
ITEM = (r'(?a:(?=[^,])(?:[+-]?\d{1,4})?'
        r'(?:[:-](?:[+-]?\d{1,4}|inf(?:inite)?)?(?::[+-]?[1-9]\d{0,3})?)?)')
OPTION_VALUES = {  # spellings, and the parser of the value
    '-f --format': format_spec,
    '-S --format-sort': matching(up_to_30(f' ?{SORT_FIELD} ?'), 'known fields such as res:720,ext'),
    '--merge-output-format': matching(CONTAINERS, 'mp4, mkv or webm'),
    '-r --limit-rate --rate-limit': byte_rate,
    '-R --retries': upto(20),
    '--fragment-retries': upto(20),
    '--extractor-retries': upto(10),
    '--socket-timeout': upto(120, low=5),
    '-N --concurrent-fragments': upto(4, low=1),
    '--user-agent': matching('[!-~][ -~]{0,255}', 'up to 256 plain characters'),
    '--referer': matching('https?://[!-~]{1,2000}', 'a web address'),
    '-I --playlist-items': matching(up_to_30(ITEM), 'items such as 1,3:5'),
    '--audio-format': matching(AUDIO, AUDIO.replace('|', ', ')),
    '--sub-langs --srt-langs': matching(up_to_30(f' ?{LANGUAGE} ?'), 'languages such as en,de'),
}
FLAGS = ('--prefer-free-formats', '--no-prefer-free-formats', '--no-playlist', '--yes-playlist',
         '-x --extract-audio', '--write-subs --write-srt', '--no-write-subs --no-write-srt',
         '--embed-subs', '--no-embed-subs', '--embed-metadata --add-metadata',
         '--no-embed-metadata --no-add-metadata', '--mtime', '--no-mtime', '--restrict-filenames',
         '--no-restrict-filenames')
OPTIONS = {  # by spelling: the long name, and the parser of the value or None
    spelling: (next(word for word in spellings.split() if word.startswith('--')), parse)
    for spellings, parse in {**OPTION_VALUES, **dict.fromkeys(FLAGS)}.items()
    for spelling in spellings.split()}


def option_words(value):
    """The words of a list of strings or of one shell-like string. Raises Refused."""
    if value is None:
        return []
    if isinstance(value, str) and len(value) <= 4096:
        try:
            value = shlex.split(value)
        except ValueError as error:
            raise Refused('bad_field', f'ytdlp_cli_parameters: {error}.') from None
    texts = isinstance(value, (list, tuple, str)) and all(isinstance(word, str) for word in value)
    if not texts:
        raise Refused('bad_field', 'ytdlp_cli_parameters must be a list of strings, or one string.')
    if len(value) > 64 or sum(map(len, value)) > 4096:
        raise Refused('bad_field', 'ytdlp_cli_parameters is too long.')
    return list(value)


def split_option(word):
    """'--name=value' and '-fvalue' in two."""
    if word.startswith('--'):
        name, *value = word.split('=', 1)
        return name, value[0] if value else None
    if word.startswith('-'):
        return word[:2], word[2:] or None
    return word, None


def parse_options(value):
    """The caller's yt-dlp options as (long name, value or None). Raises Refused.

    Only what is in OPTIONS reaches yt-dlp's own parser, which reads files, prompts and exits."""
    found = []
    rest = deque(option_words(value))
    while rest:
        spelling, argument = split_option(rest.popleft())
        if spelling not in OPTIONS:
            raise Refused('option_not_allowed',
                          f'The option {excerpt(spelling, 40)!r} is not allowed.')
        name, parse = OPTIONS[spelling]
        if parse and argument is None and rest:
            argument = rest.popleft()
        if (argument is None) == bool(parse):
            need = 'needs a' if parse else 'takes no'
            raise Refused('bad_option', f'The option {spelling} {need} value.')
        try:
            found.append((name, parse and parse(argument)))
        except ValueError as error:
            raise Refused('bad_option', f'The option {spelling} takes {error}.') from None
    return tuple(found)


# -- a submission; a bad one raises Refused

def known_fields(fields):
    """The fields by lower-case name: an iPhone capitalises the first letter."""
    return {**{name.lower(): value for name, value in fields.items()}, **fields}


def text_field(fields, name):
    """A string among the fields; null is the same as none."""
    value = fields.get(name)
    if value is None:
        return ''
    if not isinstance(value, str):
        raise Refused('bad_field', f'{name} must be a string.')
    return value.strip()


def parse_client_id(fields):
    """The sender, 'unknown' by default."""
    client_id = text_field(fields, 'client_id') or 'unknown'
    if len(client_id) > 128 or UNSAFE.search(client_id):
        raise Refused('bad_field', 'client_id must be at most 128 printable characters.')
    return client_id


def parse_timestamp(fields):
    """The sender's time, any non-negative integer."""
    value = fields.get('timestamp')
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON has one kind of number: 1.7e9 is an integer
    too_long = 1 << 13000  # Python prints 4,300 digits at most
    if value is not None and (type(value) is not int or not 0 <= value < too_long):
        raise Refused('bad_field', 'timestamp must be a whole number, not negative.')
    return value


MOST_LINKS = 500  # in one text
ADVERTISEMENT = re.compile(r'https://(?:www\.)?tiktok\.com/tiktoklite\b')  # comes with shared links


def parse_links(fields, name, security):
    """The links of a text in order, each once: {canonical: (as written, canonical or Refused)};
    and those beyond MOST_LINKS, as written."""
    text, known = text_field(fields, name), security.allowed_domains
    if not text:
        raise Refused('no_url', f'The field "{name}" is missing.')
    if 'tiktok.com' in known or known == ('*',):
        known = (*known, *SITES)
    found = {}
    links = find_urls(text, known)
    for number, link in enumerate(links):
        if len(found) == MOST_LINKS:
            seen = {written for written, _ in found.values()}
            return found, [link for link in dict.fromkeys(links[number:]) if link not in seen]
        try:
            url = check_url(link, security)
            found.setdefault(url, (link, url))
        except Refused as refusal:
            found.setdefault(link, (link, refusal))
    if len(found) > 1:
        found = {url: row for url, row in found.items() if not ADVERTISEMENT.match(url)} or found
    if not found:
        raise Refused('no_url', 'There is no web link in this text.')
    return found, []


def parse_again(fields):
    """The option `again` if it is wanted."""
    if fields.get('again') not in (None, False, True):
        raise Refused('bad_field', 'again must be true or false.')
    return (('again', None),) * bool(fields.get('again'))


def parse_batch(fields, security, name='text'):
    """The links in a field as from parse_links, with a Submission for each good one."""
    fields = known_fields(fields)
    found, rest = parse_links(fields, name, security)
    options = parse_options(fields.get('ytdlp_cli_parameters')) + parse_again(fields)
    asked = parse_client_id(fields), parse_timestamp(fields), options
    return [(written, Submission(url, *asked) if isinstance(url, str) else url)
            for written, url in found.values()], rest


# -- names of files

MEDIA_TYPES = {  # what a download may consist of, and how it is served
    'mp4': 'video/mp4', 'm4v': 'video/x-m4v', 'mov': 'video/quicktime', 'webm': 'video/webm',
    'mkv': 'video/x-matroska', 'avi': 'video/x-msvideo', 'flv': 'video/x-flv', '3gp': 'video/3gpp',
    'ts': 'video/mp2t', 'mpg': 'video/mpeg', 'jpg': 'image/jpeg', 'png': 'image/png',
    'webp': 'image/webp', 'gif': 'image/gif', 'heic': 'image/heic', 'avif': 'image/avif',
    'm4a': 'audio/mp4', 'mp3': 'audio/mpeg',
    'aac': 'audio/aac', 'opus': 'audio/ogg', 'ogg': 'audio/ogg', 'flac': 'audio/flac',
    'wav': 'audio/wav', 'weba': 'audio/webm', 'mka': 'audio/x-matroska', 'vtt': 'text/vtt',
    'srt': 'application/x-subrip', 'ass': 'text/x-ssa', 'ttml': 'application/ttml+xml'}


def media_type(name):
    return MEDIA_TYPES.get(os.path.splitext(name)[1].lower()[1:], 'application/octet-stream')


HOSTILE = re.compile(r'[\\/:*?"<>|]+')  # to Windows and SMB shares; slash and colon to all
NAME_BYTES = 255  # of UTF-8: the limit of ext4, APFS and others
LONGEST_TITLE = 1000  # characters: normalising 100,000 marks blocks all threads for a minute
SUFFIX_BYTES = 28  # reserved for '.part.ext', so that subtitles have the name of their video


def readable(text):
    """The start of `text` for a file name: one line, no invisible or unsafe characters."""
    import unicodedata
    one_line = ' '.join(text[:LONGEST_TITLE].split())
    shown = (character for character in one_line
             if character in '\u200c\u200d' or unicodedata.category(character)[0] != 'C')
    return ' '.join(HOSTILE.sub('_', unicodedata.normalize('NFC', ''.join(shown))).split())


def cut_text(text, size):
    """The start of `text` in `size` bytes of UTF-8: no cut character, no dangling joiner."""
    return text.encode()[:max(size, 0)].decode('utf-8', 'ignore').rstrip(' \u200c\u200d')


def token(text, size):
    """`text` as a part of a file name; different texts stay different."""
    import hashlib
    plain_text = re.sub(r'[^\w.-]', '_', readable(text)).strip('.')
    if text and plain_text == text and len(text.encode()) <= size:
        return text
    digest = hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()
    return f'{cut_text(plain_text, size - 9)}-{digest[:8]}'


def file_name(title, media_id, ext, part='', number='', pattern='%(title)s_%(id)s',
              limit=NAME_BYTES, **fields):
    """'title_id_number.part.ext' by the owner's `pattern`, each folder and name within `limit`
    bytes of UTF-8: the title is cut. `part` is, for example, a subtitle's language; `fields`:
    uploader, site, date. An empty field is dropped with the separator after it."""
    values = {name: cut_text(readable(text), 60) for name, text in fields.items()}
    values['id'] = token(media_id, min(100, limit // 2))
    ext = re.sub('[^A-Za-z0-9]', '', ext[:99])[:10] or 'bin'

    def fill(pattern, size):
        values['title'] = cut_text(readable(title).lstrip('.-_~ '), max(size, 0))
        return re.sub(r'%\((\w+)\)s([ _.-]*)', lambda found: values.get(found[1]) and
                      values[found[1]] + found[2] or '', pattern)
    *folders, last = pattern.split('/')
    folders = [cut_text(fill(folder, 60), 100).strip(' .-~') or 'unknown' for folder in folders]
    if number:
        last += '_' + number
    stem = fill(last, limit - SUFFIX_BYTES - len(fill(last, 1).encode()))
    if re.match('[ .~-]|$', stem):
        stem = '_' + stem
    if part:
        stem += '.' + token(part, 16)
    return '/'.join([*folders, f'{stem}.{ext}'])


# ---------- store -------------------------------------------------------------------------
# Owns the SQLite database: schema, migrations, the domain's verbs, the group commit. One
# connection writes and checkpoints, all others only read (sqlite.org/wal.html, "WAL-reset bug").
# Lock: `_tickets` guards the queue to the commit thread. Called by scheduler, http, publish, daemon
# and commands, from any thread.

DOCUMENT_A_SCHEMA = '''
CREATE TABLE IF NOT EXISTS downloads (
    id TEXT PRIMARY KEY,
    url TEXT NOT NULL,                -- the checked URL
    client_id TEXT NOT NULL,
    status TEXT NOT NULL,             -- one of STATES
    filename TEXT,                    -- first file, NULL until completed
    file_path TEXT,
    file_size INTEGER,                -- bytes, all files
    error_message TEXT,
    retry_count INTEGER DEFAULT 0,    -- failed attempts since it was last queued by a person
    created_at INTEGER NOT NULL,      -- all times: epoch seconds
    started_at INTEGER,               -- of the last attempt
    completed_at INTEGER,             -- NULL unless completed
    last_updated INTEGER NOT NULL     -- also when it failed
);
CREATE INDEX IF NOT EXISTS idx_status ON downloads(status);
CREATE INDEX IF NOT EXISTS idx_created_at ON downloads(created_at DESC);
CREATE INDEX IF NOT EXISTS idx_client_id ON downloads(client_id);
'''
OUR_SCHEMA = '''
ADD timestamp TEXT;       -- the client's, any size, only compared
ADD options TEXT;         -- JSON pairs
ADD title TEXT;
ADD files TEXT;           -- JSON [[name, size, type], ...]
ADD reason TEXT;          -- stable word of the last failure
ADD next_attempt_at INTEGER;
ADD crashes INTEGER NOT NULL DEFAULT 0;  -- unclean ends in a row
ADD s3_state TEXT;        -- waiting|failing|stored|gone, or NULL
ADD s3_attempts INTEGER NOT NULL DEFAULT 0;
ADD s3_due INTEGER;
ADD s3_error TEXT;
CREATE UNIQUE INDEX idx_repeat ON downloads(client_id, url, timestamp) WHERE timestamp IS NOT NULL;
DROP INDEX idx_status;    -- replaced by wider ones: every index costs a page with each link
DROP INDEX idx_client_id;
CREATE INDEX idx_status ON downloads(status, created_at DESC);
CREATE INDEX idx_client_id ON downloads(client_id, created_at);
CREATE INDEX idx_s3_due ON downloads(s3_due) WHERE s3_due IS NOT NULL;
'''
POST_SCHEMA = '''
ADD note TEXT;            -- what a completed one lacks, a sentence
ADD site TEXT;            -- of the post: 'tiktok.com'
ADD media_id TEXT;        -- the site's id of the post, once known
ADD asked TEXT;           -- what the options ask of the post
ADD uploader TEXT;
ADD duration REAL;        -- of the video, seconds
ADD description TEXT;     -- the whole caption
ADD upload_date TEXT;     -- YYYYMMDD
ADD starred INTEGER NOT NULL DEFAULT 0;
CREATE INDEX idx_post ON downloads(site, media_id) WHERE media_id IS NOT NULL;
CREATE INDEX idx_file ON downloads(filename) WHERE filename IS NOT NULL;
-- What other servers must be told: written along with its cause, deleted once done.
CREATE TABLE outbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,   -- upload|delete|notify, or known: a problem that was announced
    download_id TEXT,
    payload TEXT NOT NULL,  -- the store's verb, a sentence, or JSON names of objects
    attempts INTEGER NOT NULL DEFAULT 0,
    due INTEGER NOT NULL
);
CREATE INDEX idx_outbox ON outbox(kind, due);
INSERT INTO outbox (kind, download_id, payload, attempts, due)
    SELECT 'upload', id, '', s3_attempts, s3_due FROM downloads WHERE s3_due IS NOT NULL;
DROP INDEX idx_s3_due;    -- s3_due and s3_attempts are no longer used
'''
IMPORT_SCHEMA = '''
ADD import_id TEXT;       -- the import that a post comes from; until it starts, created_at is 0
CREATE INDEX idx_import ON downloads(import_id, status) WHERE import_id IS NOT NULL;
CREATE TABLE imports (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,       -- of the file
    client_id TEXT NOT NULL,
    state TEXT NOT NULL,      -- ready|filling|running|paused|done
    groups TEXT NOT NULL,     -- JSON [[group, posts, how many were here], ...]
    chosen TEXT,              -- groups, with commas
    created_at INTEGER NOT NULL
);
'''
MIGRATIONS = (DOCUMENT_A_SCHEMA, OUR_SCHEMA, POST_SCHEMA, IMPORT_SCHEMA)  # by user_version
IMPORT_STEPS = {  # verb: (state before, state after)
    'start': ('ready', 'filling'), 'filled': ('filling', 'running'),
    'pause': ('running', 'paused'), 'resume': ('paused', 'running')}
SEARCHED = ('url', 'title', 'filename', 'uploader', 'description')
SEARCHED_TEXT = ' || char(10) || '.join(f"ifnull(@{name}, '')" for name in SEARCHED)
# An index of every three characters (sqlite.org/fts5.html, "trigram"). A link enters it when it has
# ended, so that storing it costs no page; what has not ended is searched as it is.
ENDED = "status IN ('completed', 'failed')"
UNFINISHED = "status IN ('queued', 'downloading')"
ENTERS_INDEX = f'''ON downloads WHEN new.{ENDED} BEGIN
    INSERT INTO search (rowid, text)
    VALUES (new.rowid, {SEARCHED_TEXT.replace('@', 'new.')}); END;'''
LEAVES_INDEX = f'''ON downloads WHEN old.{ENDED} BEGIN
    INSERT INTO search (search, rowid, text)
    VALUES ('delete', old.rowid, {SEARCHED_TEXT.replace('@', 'old.')}); END;'''
SEARCH_SCHEMA = f'''
CREATE TRIGGER search_new AFTER INSERT {ENTERS_INDEX}
CREATE TRIGGER search_in AFTER UPDATE OF status, {', '.join(SEARCHED)} {ENTERS_INDEX}
CREATE TRIGGER search_out BEFORE UPDATE OF status, {', '.join(SEARCHED)} {LEAVES_INDEX}
CREATE TRIGGER search_end BEFORE DELETE {LEAVES_INDEX}
INSERT INTO search (rowid, text)
    SELECT rowid, {SEARCHED_TEXT.replace('@', '')} FROM downloads WHERE {ENDED};
'''
HAS_FILES = "status = 'completed' AND reason IS NULL"  # else they were deleted to make room
REPEAT_SECONDS = 600  # within which the same link from the same phone is a repeat
LAST_ROOM = 20 << 20  # with fewer bytes free on the database's disk, links are refused
CRASHED = 'The server crashed 3 times while downloading this.'
CRASH_LIMIT = 3  # unclean ends in a row that count as one failed attempt
FROZE = 'This page froze the whole server for a minute; it will not be tried again.'
SUSPECT = 'The server froze while downloading this and others; each is tried again alone.'
CHECK_SECONDS = 0.25  # of quick_check at the start; each daily copy is checked in full
LONGEST_DELAY = 6 * 3600  # seconds between tries of what is in the outbox

# The link that must be an hour old before the client may send another; future ones do not count.
HOUR_FULL = ('SELECT created_at FROM downloads WHERE client_id = ? AND created_at > ? '
             'AND created_at <= ? AND import_id IS NULL ORDER BY created_at DESC LIMIT 1 OFFSET ?')
KNOWN = 'SELECT id, status, files FROM downloads WHERE '
SAME_POST = (KNOWN + "site = ? AND media_id = ? AND asked IS ? AND status <> 'failed' "
             "AND reason IS NOT 'room' ORDER BY status, created_at DESC LIMIT 1")
INSERT_LINK = (  # one statement, since each one releases the GIL twice
    'INSERT INTO downloads (id, url, client_id, status, created_at, last_updated, timestamp, '
    'options, site, media_id, asked, import_id) '
    "SELECT ?, ?, ?, 'queued', ?, ?, ?, ?, ?, ?, ?, ? "
    f'WHERE NOT (? AND EXISTS ({HOUR_FULL})) AND NOT EXISTS ({SAME_POST}) '
    'ON CONFLICT (client_id, url, timestamp) WHERE timestamp IS NOT NULL DO NOTHING')


# Where a link is stored. `fresh`: as a new download; `same_post`: with another link to it.
Stored = namedtuple('Stored', 'id fresh status files same_post', defaults=('queued', (), False))


class StoreDown(Exception):
    """The database cannot be written or read now; nothing was stored. `sentence` is for a phone."""
    sentence = 'The server cannot store links at the moment; keep this one and send it again.'


class DiskLow(StoreDown):
    """The database's disk has only LAST_ROOM left."""
    sentence = ('The disk of the database is almost full, so links are not accepted; '
                'keep this one and send it again later.')


def record_of(row):
    """A row of `downloads`, by column; `files` decoded."""
    return {**row, 'files': tuple(MediaFile(*file) for file in json.loads(row['files'] or '[]'))}


def job_of(row):
    """The next try at this download."""
    options = tuple(map(tuple, json.loads(row['options'] or '[]')))
    return Job(row['id'], row['url'], options, (row['retry_count'] or 0) + 1,
               record_of(row)['files'], row['import_id'])


def full_sync(file):
    """On a Mac flush the drive's cache for `file`: there, SQLite only uses a barrier."""
    if hasattr(fcntl, 'F_FULLFSYNC') and os.path.exists(file):
        with open(file, 'rb') as handle:
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)


def quick_check(db, seconds=math.inf):
    """Raise DatabaseError if SQLite finds something wrong within `seconds`."""
    end = time.monotonic() + seconds
    db.set_progress_handler(lambda: time.monotonic() > end, 10000)
    try:
        found = db.execute('PRAGMA quick_check(1)').fetchone()[0]
    except sqlite3.OperationalError as error:
        if str(error) == 'interrupted':
            return
        raise
    finally:
        db.set_progress_handler(None, 0)
    if found != 'ok':
        raise sqlite3.DatabaseError(found)


def migrate(db, path):
    """Bring the schema up to date, a transaction a step. Raises Trouble for a newer database."""
    version = db.execute('PRAGMA user_version').fetchone()[0]
    if version > len(MIGRATIONS):
        raise Trouble(f'{path}: made by a newer videoserverd (schema {version}); '
                      'install that version again.')
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        script = script.replace('\nADD ', '\nALTER TABLE downloads ADD COLUMN ')
        db.executescript(f'BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;')


def prepare_search(db):
    """Make the index for searching, or stop using it where SQLite lacks FTS5 or trigrams (before
    3.34); whether it has them."""
    names = [row[0] for row in db.execute(
        "SELECT name FROM sqlite_master WHERE type = 'trigger' AND name LIKE 'search%'")]
    try:
        if 'search_new' not in names:
            for name in names:
                db.execute(f'DROP TRIGGER {name}')
            db.execute('DROP TABLE IF EXISTS search')  # it may lack something
            db.execute("CREATE VIRTUAL TABLE search USING fts5(text, content='', "
                       "tokenize='trigram')")
            db.executescript(f'BEGIN; {SEARCH_SCHEMA} COMMIT;')
        db.execute('SELECT rowid FROM search LIMIT 1')
        return True
    except sqlite3.OperationalError as error:
        if 'no such' not in str(error):
            raise
        for name in names:  # else nothing could be stored
            db.execute(f'DROP TRIGGER IF EXISTS {name}')
        return False


def new_id():
    """A random UUID (RFC 9562 section 5.4)."""
    import uuid
    return str(uuid.uuid4())


def committed(verb):
    """A decorator: the verb, with a connection, is part of the next transaction."""
    def call(self, *args, **more):
        return self.write(lambda db: verb(self, db, *args, **more))
    return call


class Store:
    """The queue on stable storage. Each verb returns after the commit; raises StoreDown."""

    def __init__(self, path, links_per_hour=0):
        self.path, self.links_per_hour = path, links_per_hour
        self.error = None  # why the last commit failed, None when it did not
        self.searches = False  # whether there is an index
        self.outgoing = {}  # kind of an item for the outbox: the verbs that cause one
        self.couriers = []  # woken after a commit that put something into it
        self._sent = False
        self._repeats = {}  # by client: start of its hour, how many
        self._commits, self._counted = 0, (-1, {})  # commits so far; `counts` as of which commit
        self._queue = deque()
        self._tickets = threading.Condition()  # guards _queue and _closed
        self._closed = False
        self._pool = deque()  # idle readers
        self._writer = None
        self.thread = threading.Thread(target=self._commit_loop, name='commit', daemon=True)

    # -- opening and closing

    def open(self):
        """Create or migrate the database and start the commit thread. Raises Trouble."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # links are private
            self._connect_writer()
            quick_check(self._writer, CHECK_SECONDS)
            migrate(self._writer, self.path)
            self.searches = prepare_search(self._writer)
        except (OSError, sqlite3.Error) as error:
            why = f'{self.path}: the database cannot be opened ({error}); '
            # No lock or no sync is no damage.
            if isinstance(error, (OSError, sqlite3.OperationalError)) and (
                    'malformed' not in str(error)):
                raise Trouble(why + 'check its folder; it must be on a local disk.') from None
            raise Trouble(
                f'{self.path}: the database is damaged ({" ".join(str(error).split())}). Nothing '
                'was changed. Stop the server, move this file and its -wal and -shm away, and copy '
                f'the newest of {self.path.parent / "backups"} here.') from None
        self.thread.start()

    def close(self):
        """Commit what waits, then close."""
        with self._tickets:
            self._closed = True
            self._tickets.notify()
        if self.thread.is_alive():
            self.thread.join(10)
        for reader in self._pool:
            reader.close()
        self._pool.clear()

    def _connect(self, mode, *pragmas):
        db = sqlite3.connect(f'{self.path.as_uri()}?mode={mode}', uri=True, timeout=5,
                             isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        for pragma in pragmas:
            db.execute(f'PRAGMA {pragma}').fetchall()
        return db

    def _connect_writer(self):
        self._writer = self._connect(
            'rwc', 'journal_mode=WAL', 'synchronous=FULL', 'fullfsync=1', 'checkpoint_fullfsync=1',
            'journal_size_limit=4194304', 'cache_size=-1024')

    # -- the group commit

    def _commit_loop(self):
        while True:
            with self._tickets:
                self._tickets.wait_for(lambda: self._queue or self._closed)
                batch = list(self._queue)
                self._queue.clear()
            if not batch:
                break
            self._commit(batch)
        self._shut_writer('PRAGMA wal_checkpoint(TRUNCATE)')

    def _commit(self, batch):
        """One transaction, one sync, for all of `batch`; each is answered in any case."""
        try:
            if self._writer is None:
                self._connect_writer()
            self._writer.execute('BEGIN IMMEDIATE')
            changes, self._sent = self._writer.total_changes, False
            for ticket in batch:
                try:  # a verb refuses before it writes, so the others' work is not affected
                    ticket.result = ticket.work(self._writer)
                except (Refused, LookupError, ValueError, TypeError, OverflowError) as error:
                    ticket.error = error
            self._writer.execute('COMMIT')
            full_sync(f'{self.path}-wal')
            self._commits += 1
            if self._writer.total_changes > changes:  # a commit of nothing needs no disk
                self.error = None
            for courier in self.couriers * self._sent:
                courier.wake()
        except Exception as error:  # this thread must live on, and nobody may be told 'stored'
            self._fail(batch, error)
        for ticket in batch:
            ticket.done.release()

    def _fail(self, batch, error):
        """What a failed sync left is unknown: fail all, reopen with the next batch."""
        ours = not isinstance(error, (sqlite3.Error, OSError))
        if self.error is None or ours:
            log.error('database: commit failed, links are refused until it works: %s', error,
                      exc_info=ours)
        self.error = str(error) or type(error).__name__
        for ticket in batch:
            ticket.error = StoreDown(self.error)
        self._shut_writer('ROLLBACK')

    def _shut_writer(self, statement):
        writer, self._writer = self._writer, None
        if writer:
            # It may have rolled back; the next start checkpoints.
            with suppress(sqlite3.Error), closing(writer):
                writer.execute(statement).fetchall()

    def write(self, work):
        """The result of `work` in the next transaction, once it is on stable storage."""
        ticket = SimpleNamespace(work=work, result=None, error=None, done=threading.Lock())
        ticket.done.acquire()  # until it is answered: a third of an Event's cost
        with self._tickets:
            if self._closed:
                raise StoreDown('the server is stopping')
            self._queue.append(ticket)
            self._tickets.notify()
        ticket.done.acquire()
        if ticket.error is not None:
            raise ticket.error
        return ticket.result

    # -- reading

    def read(self, sql, args=()):
        """The rows of a query, on a connection that cannot write."""
        reader = None
        with suppress(IndexError):
            reader = self._pool.pop()
        try:
            reader = reader or self._connect('ro', 'cache_size=-512')
            rows = reader.execute(sql, args).fetchall()
        except sqlite3.Error as error:
            if reader:
                reader.close()
            raise StoreDown(str(error)) from None
        if len(self._pool) < 4 and not self._closed:
            self._pool.append(reader)
        else:
            reader.close()
        return rows

    def records(self, where, *args):
        return [record_of(row) for row in self.read(f'SELECT * FROM downloads WHERE {where}', args)]

    def get(self, download_id):
        """One download. Raises LookupError."""
        for record in self.records('id = ?', download_id):
            return record
        raise LookupError(download_id)

    def counts(self):
        commits = self._commits
        if self._counted[0] != commits:  # it takes 10 ms for 100,000 rows
            found = dict(map(tuple, self.read(
                'SELECT status, count(*) FROM downloads GROUP BY status')))
            self._counted = commits, {status: found.get(status, 0) for status in STATES}
        return self._counted[1]

    def page(self, limit, offset=0, status='', q=''):
        """How many there are, and `limit` of them from `offset` on, newest first."""
        where, args = '1', []
        if status:
            where, args = 'status = ?', [status]
        if q:
            found = rf"{SEARCHED_TEXT.replace('@', '')} LIKE ? ESCAPE '\'"
            args.append('%' + re.sub(r'([%_\\])', r'\\\1', q) + '%')
            if self.searches and len(q) > 2:
                args.append('"' + q.replace('"', '""') + '"')
                found = (f'rowid IN (SELECT rowid FROM downloads WHERE {UNFINISHED} AND {found} '
                         'UNION SELECT rowid FROM search WHERE search MATCH ?)')
            where += f' AND {found}'
            total = self.read(f'SELECT count(*) FROM downloads WHERE {where}', args)[0][0]
        else:
            total = sum(n for name, n in self.counts().items() if status in ('', name))
        newest = 'ORDER BY created_at DESC, rowid DESC'
        # The inner query walks an index only: a deep offset costs little.
        return total, self.records(f'rowid IN (SELECT rowid FROM downloads WHERE {where} {newest} '
                                   f'LIMIT ? OFFSET ?) {newest}', *args, limit, offset)

    def ids(self, begin):
        """The first few ids with this prefix."""
        return [row['id'] for row in self.read(
            'SELECT id FROM downloads WHERE id BETWEEN ? AND ? LIMIT 9', (begin, begin + '~'))]

    def since(self, created_at, ongoing):
        """Downloads created since then, or only the unfinished: newest first, 10,000 at most."""
        return self.read('SELECT id, status, file_size FROM downloads WHERE created_at >= ? '
                         f'AND (NOT ? OR {UNFINISHED}) '
                         'ORDER BY created_at DESC, rowid DESC LIMIT 10000', (created_at, ongoing))

    def waiting(self):
        """(due, id, alone, paced) of the first that may start, more than there are workers; those
        of imports come from `next_of_imports`. `alone`: it was running when yt-dlp froze. One
        whose claim was reported as failed may be 'downloading'."""
        return self.read(
            "SELECT coalesce(next_attempt_at, 0) AS due, id, reason IS 'freeze' AS alone, "
            f'0 AS paced FROM downloads WHERE {UNFINISHED} AND created_at > 0 '
            "AND (import_id IS NULL OR alone OR status = 'downloading') "
            'ORDER BY due, created_at, rowid LIMIT 100')

    @committed
    def pull_in(self, db, now, longest):
        """The clock was ahead: no attempt is due in more than `longest` seconds."""
        db.execute(f'UPDATE downloads SET next_attempt_at = :due WHERE {UNFINISHED} '
                   'AND next_attempt_at > :due', {'due': now + longest})
        db.execute('UPDATE outbox SET due = ? WHERE due > ?', (now, now + LONGEST_DELAY))

    # -- submissions

    def add_many(self, submissions, now, window=0):
        """Store links in one commit: for each a Stored or Refused. A repeat is where the first
        is (same client, URL and timestamp; without one, within `window` seconds), a link to a post
        that is here where that is."""
        self.check_room()

        def insert(db, submission):
            try:
                return self._insert(db, submission, now, window)
            except Refused as refusal:
                return refusal
        return self.write(lambda db: [insert(db, submission) for submission in submissions])

    def _insert(self, db, item, now, window):
        client, url, timestamp, options = item.client_id, item.url, None, None
        if item.timestamp is not None:
            timestamp = str(item.timestamp)
        if item.options:
            options = json.dumps(item.options)
        post = same = (*post_of(url), asked_of(item.options))
        if ('again', None) in item.options:
            same = (None,) * 3
        hour = (client, now - 3600, now, self.links_per_hour - 1)

        def first(sql, *args):
            return db.execute(sql, args).fetchone()
        known, same_post = window and first(
            KNOWN + 'client_id = ? AND created_at > ? AND created_at <= ? AND url = ? '
            'ORDER BY created_at DESC LIMIT 1', client, now - window, now, url), False
        download_id = new_id()
        if not known and db.execute(INSERT_LINK, (
                download_id, url, client, now, now, timestamp, options, *post, None,
                self.links_per_hour, *hour, *same)).rowcount == 1:
            return Stored(download_id, True)
        known = known or first(KNOWN + 'client_id = ? AND url = ? AND timestamp = ?',
                               client, url, timestamp)
        if not known:
            known, same_post = first(SAME_POST, *same), True
        if not known:
            raise self._too_many(first(HOUR_FULL, *hour)['created_at'] + 3600 - now)
        self._count_repeat(client, now)
        files = tuple(file[0] for file in json.loads(known['files'] or '[]'))
        return Stored(known['id'], False, known['status'], files, same_post)

    def _count_repeat(self, client_id, now):
        """A client may send as many repeats as new links in an hour. Raises Refused."""
        began, repeats = self._repeats.get(client_id, (now, 0))
        if not began <= now < began + 3600:  # the hour is over, or the clock was set back
            began, repeats = now, 0
        if self.links_per_hour and repeats >= self.links_per_hour:
            raise self._too_many(began + 3600 - now)
        if len(self._repeats) > 1000:
            self._repeats.clear()
        self._repeats[client_id] = began, repeats + 1

    def _too_many(self, wait):
        return Refused('rate_limited', f'This device has sent {self.links_per_hour} links within '
                       'an hour; try again later.', max(1, wait))

    @committed
    def star(self, db, download_id, starred):
        db.execute('UPDATE downloads SET starred = ? WHERE id = ?', (starred, download_id))

    def first_of(self, client_id, since):
        """The first link from a phone since then, or None."""
        found = self.records('client_id = ? AND created_at >= ? ORDER BY created_at LIMIT 1',
                             client_id, since)
        return found[0] if found else None

    # -- the life of a download

    def _change(self, db, verb, download_id, now, due=None, **columns):
        """Change the status by TRANSITIONS; whether it did. `due`: only if due by then."""
        before, after, usual = TRANSITIONS[verb]
        where = f'WHERE id = ? AND status IN ({", ".join("?" * len(before))})'
        if due is not None:
            where += f' AND coalesce(next_attempt_at, 0) <= {due:d}'
        sql, args = 'DELETE FROM downloads ', ()
        if after:
            columns = {**usual, **columns, 'status': after, 'last_updated': now}
            sql = f'UPDATE downloads SET {", ".join(f"{name} = ?" for name in columns)} '
            args = columns.values()
        changed = db.execute(sql + where, (*args, download_id, *before)).rowcount == 1
        if changed:
            self._announce(db, verb, download_id, now)
        return changed

    @committed
    def move(self, db, verb, download_id, now, **columns):
        """Requeue, cancel or retry it; whether its status allowed that."""
        return self._change(db, verb, download_id, now, **columns)

    @committed
    def claim(self, db, download_id, now):
        """Take a queued download to work on; None if it is not queued, or not due yet."""
        row = db.execute('SELECT * FROM downloads WHERE id = ?', (download_id,)).fetchone()
        job = row and job_of(row)  # what cannot be read stays queued
        if not self._change(db, 'claim', download_id, now, due=now, started_at=now):
            return None
        db.execute('UPDATE downloads SET created_at = ? WHERE id = ? AND created_at = 0',
                   (now, download_id))
        return job

    @committed
    def end(self, db, verb, job, outcome, now, folder, due=None):
        """An attempt ended: finish (its files are synced), retry_later at `due`, give_up, or
        requeue, also if the files were those of a download deleted meanwhile. Whether it is over:
        completed or failed."""
        columns = self._delivered(outcome, folder) if outcome.files else {}
        if outcome.shared and not db.execute(
                f'SELECT 1 FROM downloads WHERE id = ? AND files = ? AND {HAS_FILES}',
                (outcome.shared, columns['files'])).fetchone():
            verb = 'requeue'
        if verb == 'requeue':
            columns = {}
        elif verb == 'finish':
            columns['completed_at'] = now
            if 'upload' in self.outgoing:
                columns['s3_state'] = 'waiting'
        else:
            columns.update(retry_count=job.attempt - (verb == 'give_up'), next_attempt_at=due,
                           reason=outcome.reason, error_message=excerpt(outcome.message, 500))
        ended = self._change(db, verb, job.id, now, **columns)
        return ended and verb in ('finish', 'give_up')

    def same_post(self, site, media_id, asked):
        """Completed downloads of this post, newest first."""
        return self.records('site = ? AND media_id = ? AND asked IS ? '
                            f'AND {HAS_FILES} ORDER BY created_at DESC', site, media_id, asked)

    def _delivered(self, outcome, folder):
        """The columns for delivered files; a lone surrogate cannot be stored."""
        post, files, columns = outcome.post, outcome.files, {}
        if post.get('media_id'):
            columns.update(site=post['site'], media_id=post['media_id'])
        for name, length in (('uploader', 200), ('description', 5000), ('upload_date', 8)):
            text = str(post.get(name) or '')[:length]
            columns[name] = text.encode('utf-8', 'replace').decode() or None
        return {**columns, 'title': excerpt(' '.join(outcome.title.split()), 300) or None,
                'filename': files[0].name, 'file_path': str(folder / files[0].name),
                'file_size': sum(file.size for file in files), 'files': json.dumps(files),
                'note': excerpt(outcome.note, 500) or None, 'duration': post.get('duration')}

    @committed
    def forget(self, db, download_id, copies=()):
        """Delete the row, and later its `copies` in the bucket: the files that no other download
        has. None if it is downloading."""
        row = db.execute('SELECT * FROM downloads WHERE id = ?', (download_id,)).fetchone()
        if not row or not self._change(db, 'forget', download_id, 0):
            return None
        db.execute('DELETE FROM outbox WHERE download_id = ?', (download_id,))
        if copies:
            self._send(db, 'delete', json.dumps(copies), 0)
        return self._unshared(db, row)

    def _unshared(self, db, row):
        """The files of a download that no other one has; a name may have been free again."""
        others = db.execute(
            'SELECT files FROM downloads WHERE (site = :site AND media_id = :media_id OR '
            "filename = :filename) AND id <> :id AND reason IS NOT 'room'", dict(row)).fetchall()
        kept = {file[0] for other in others for file in json.loads(other['files'] or '[]')}
        return tuple(file for file in record_of(row)['files'] if file.name not in kept)

    # -- room on the disk

    def beyond_keep(self, kind, amount, now):
        """Ids of the first 100 finished before so many days, or beyond so many bytes; they have
        files, no star and no upload to come."""
        before, excess = now - amount * 86400, math.inf
        if kind == 'bytes':  # shared files count once
            before, excess = now, -amount + self.read(
                'SELECT coalesce(sum(size), 0) FROM (SELECT max(file_size) AS size '
                f'FROM downloads WHERE {HAS_FILES} GROUP BY file_path)')[0][0]
        ids = []
        for row in self.read(
                f'SELECT id, file_size FROM downloads WHERE {HAS_FILES} AND starred = 0 '
                "AND coalesce(s3_state, '') NOT IN ('waiting', 'failing') "
                'AND completed_at < ? ORDER BY completed_at LIMIT 100', (before,)):
            if excess > 0:
                ids.append(row['id'])
                excess -= row['file_size'] or 0
        return ids

    @committed
    def make_room(self, db, ids, now):
        """Give up the files of these downloads, unless starred by now: (id, files to delete) of
        all whose files may still exist, including those left by a kill."""
        db.executemany(
            "UPDATE downloads SET reason = 'room', note = 'Deleted to make room.', "
            f'last_updated = ? WHERE id = ? AND {HAS_FILES} AND starred = 0',
            [(now, download_id) for download_id in ids])
        rows = db.execute("SELECT * FROM downloads WHERE status = 'completed' AND "
                          "reason = 'room' AND file_size IS NOT NULL").fetchall()
        return [(row['id'], self._unshared(db, row)) for row in rows]

    @committed
    def room_made(self, db, ids):
        db.executemany('UPDATE downloads SET file_size = NULL WHERE id = ?',
                       [(download_id,) for download_id in ids])

    @committed
    def recover(self, db, now, frozen):
        """After a start: queue again what was being downloaded, except those returned with their
        outcome: CRASH_LIMIT unclean ends in a row, or the only one when yt-dlp froze (`frozen`)."""
        over = []
        rows = db.execute("SELECT * FROM downloads WHERE status = 'downloading'").fetchall()
        for row in rows:
            if frozen and len(rows) == 1:
                over.append((job_of(row), Outcome('give_up', 'freeze', FROZE)))
            elif frozen:
                self._change(db, 'requeue', row['id'], now, reason='freeze', error_message=SUSPECT)
            elif row['crashes'] + 1 < CRASH_LIMIT:
                self._change(db, 'requeue', row['id'], now, crashes=row['crashes'] + 1)
            else:
                over.append((job_of(row), Outcome('retry', 'crash', CRASHED)))
        return over

    @committed
    def move_files(self, db, folder):
        db.execute("UPDATE downloads SET file_path = ? || '/' || filename WHERE filename <> ''",
                   (str(folder),))

    # -- imports

    def known_posts(self):
        """The media ids of all posts that are here, or on their way."""
        return {row['media_id'] for row in self.read(
            "SELECT media_id FROM downloads WHERE media_id IS NOT NULL AND status <> 'failed' "
            "AND reason IS NOT 'room'")}

    def imports(self):
        """All imports with the numbers of their downloads, newest first."""
        counts = ', '.join(f'coalesce(sum(status {test}), 0) AS {name}' for name, test in (
            ('waiting', "IN ('queued', 'downloading')"), ('completed', "= 'completed'"),
            ('failed', "= 'failed'")))
        return self.read(f'SELECT imports.*, {counts} FROM imports LEFT JOIN downloads '
                         'ON import_id = imports.id GROUP BY imports.id '
                         'ORDER BY imports.created_at DESC, imports.rowid DESC')

    @committed
    def add_import(self, db, import_id, name, client_id, groups, now):
        """An export was read and may be started."""
        db.execute("INSERT INTO imports VALUES (?, ?, ?, 'ready', ?, NULL, ?)",
                   (import_id, name, client_id, json.dumps(groups), now))

    @committed
    def move_import(self, db, verb, import_id, chosen=None):
        """Change the state of an import by IMPORT_STEPS; whether it allowed that."""
        before, after = IMPORT_STEPS[verb]
        return db.execute('UPDATE imports SET state = ?, chosen = coalesce(?, chosen) '
                          'WHERE id = ? AND state = ?',
                          (after, chosen, import_id, before)).rowcount == 1

    def fill_import(self, row, urls, now):
        """Queue posts of an import in one commit, without those that are here."""
        self.check_room()

        def work(db):
            there = db.execute("SELECT 1 FROM imports WHERE id = ? AND state = 'filling'",
                               (row['id'],)).fetchone()
            for url in urls if there else ():  # else it was cancelled
                post = (*post_of(url), None)
                db.execute(INSERT_LINK, (new_id(), url, row['client_id'], 0, now, row['id'], None,
                                         *post, row['id'], 0, *(None,) * 4, *post))
        self.write(work)

    def next_of_imports(self, now):
        """As `waiting`: the next post of a running import, if one is due; due now."""
        return self.read(
            'SELECT ? AS due, id, 0 AS alone, 1 AS paced FROM downloads WHERE import_id IN '
            "(SELECT id FROM imports WHERE state = 'running') AND status = 'queued' AND "
            'coalesce(next_attempt_at, 0) <= ? ORDER BY next_attempt_at IS NULL, rowid LIMIT 1',
            (now, now))

    @committed
    def end_import(self, db, import_id, now, sentence):
        """All its posts are done: announce it."""
        db.execute("UPDATE imports SET state = 'done' WHERE id = ?", (import_id,))
        if 'import' in self.outgoing.get('notify', ()):
            self._send(db, 'notify', sentence, now)

    @committed
    def cancel_import(self, db, import_id, now):
        """Forget it and its posts that have not arrived; whether it was there."""
        rows = db.execute("SELECT id, files FROM downloads WHERE import_id = ? AND status = "
                          "'queued'", (import_id,)).fetchall()
        for row in rows:
            self._change(db, 'cancel' if row['files'] else 'forget', row['id'], now)
        return db.execute('DELETE FROM imports WHERE id = ?', (import_id,)).rowcount == 1

    # -- the outbox

    def _send(self, db, *item):
        self._sent = True
        db.execute('INSERT INTO outbox (kind, payload, due) VALUES (?, ?, ?)', item)

    def _announce(self, db, verb, download_id, now):
        for kind, verbs in self.outgoing.items():
            if verb in verbs:  # 'notify' not for each post of an import
                self._sent = True
                db.execute(
                    'INSERT INTO outbox (kind, download_id, payload, due) SELECT ?, id, ?, ? '
                    "FROM downloads WHERE id = ? AND (import_id IS NULL OR ? <> 'notify')",
                    (kind, verb, now, download_id, kind))

    def note_problems(self, there, new, now):
        """Announce the problems `new`, by name, once, until they are no longer `there`."""
        known = {row['payload'] for row in self.read(
            "SELECT payload FROM outbox WHERE kind = 'known'")}
        over, begun = known - set(there), new.keys() - known

        def work(db):
            for name in over:
                db.execute("DELETE FROM outbox WHERE kind = 'known' AND payload = ?", (name,))
            for name in begun:
                self._send(db, 'known', name, now)
                self._send(db, 'notify', new[name], now)
        if over or begun:
            self.write(work)

    def next_outgoing(self, kinds):
        """The first item due of these kinds, or None."""
        marks = ', '.join('?' * len(kinds))
        rows = self.read(f'SELECT * FROM outbox WHERE kind IN ({marks}) ORDER BY due, id LIMIT 1',
                         kinds)
        return rows[0] if rows else None

    @committed
    def settle(self, db, item, now, due, state='', error=None):
        """It was sent (`due` None), or will be tried again then; an upload's row records `state`
        and `error`. Whether it was still wanted."""
        found = db.execute('UPDATE outbox SET attempts = attempts + 1, due = ? WHERE id = ?',
                           (due or 0, item['id'])).rowcount
        if due is None:
            db.execute('DELETE FROM outbox WHERE id = ?', (item['id'],))
        if found and item['kind'] == 'upload':
            db.execute('UPDATE downloads SET s3_state = ?, s3_error = ?, last_updated = ? '
                       'WHERE id = ?', (state, error, now, item['download_id']))
        return found == 1

    # -- copies of the database

    def check_room(self):
        """Raise DiskLow if links must be refused."""
        with suppress(OSError):
            if free_space(self.path) < LAST_ROOM:
                self.error = 'the disk is almost full'
                raise DiskLow(self.error)

    def probe(self):
        """Write as much as a long link takes, to see if one can be stored. Raises StoreDown."""
        self.check_room()

        def work(db):
            now = int(time.time())
            db.execute(
                'INSERT INTO downloads (id, url, client_id, status, created_at, last_updated, '
                "timestamp) VALUES ('probe', ?, '', 'queued', ?, ?, '')", ('x' * 2048, now, now))
            db.execute("DELETE FROM downloads WHERE id = 'probe'")
        self.write(work)

    def backup(self, target):
        """A verified copy at `target` (sqlite.org/backup.html). Raises Trouble."""
        part = target.with_name(target.name + '.part')
        try:
            os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600))
            with closing(self._connect('ro', 'cache_size=-256')) as source, \
                    closing(sqlite3.connect(str(part))) as copy:
                copy.execute('PRAGMA cache_size=-256')
                source.backup(copy, pages=64, sleep=0.01)
                copy.execute('PRAGMA journal_mode=DELETE')
                quick_check(copy)
            sync(part)
            os.replace(part, target)
        except (sqlite3.Error, OSError) as error:
            raise Trouble(f'{target}: the copy failed ({error}); '
                          'the database itself is unchanged.') from None
        finally:
            part.unlink(missing_ok=True)


class Lock:
    """One server per database: flock on `<database>.lock`, which says who and where it is. The
    descriptor is kept across a re-execution."""

    def __init__(self, database, fd=None):
        self.path, self.fd = Path(f'{database}.lock'), fd

    def take(self):
        """Raises Trouble that names the holder."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Trouble(f'{self.path}: cannot be opened ({error.strerror}); check its folder, '
                          "run this as the server's user, or set [database] path.") from None
        if self.fd is not None and os.path.samestat(os.fstat(self.fd), os.fstat(fresh)):
            os.close(fresh)
        else:  # a lock kept across a re-execution may be of the previous database
            self.release()
            self.fd = fresh
        for _ in range(10):
            with suppress(OSError):
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.02)  # running() of another process has it for a moment
        else:
            holder = read_note(self.path)
            self.release()
            raise Trouble(f'{self.path}: another videoserverd (process {holder.get("pid", "?")}, '
                          f'port {holder.get("port", "?")}) uses this database; stop it first.')
        self.tell({'pid': os.getpid()})

    def tell(self, facts):
        """Record in the file who holds it."""
        with suppress(OSError):  # a full disk: it is locked all the same
            os.ftruncate(self.fd, os.pwrite(self.fd, json.dumps(facts).encode(), 0))

    def running(self):
        """The facts of the server running on this database, {} if there is none."""
        try:
            fd = os.open(self.path, os.O_RDWR)
        except OSError:
            return {}
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return {}
        except OSError:
            return read_note(self.path) or {'pid': 'unknown'}
        finally:
            os.close(fd)

    def release(self):
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


# ---------- board -------------------------------------------------------------------------
# Owns volatile state: progress of running downloads and a version number that grows with every
# visible change. Lock: `_changed` guards all of it, and watchers wait on it. Called by scheduler
# (writes) and http (reads, waits, limits how many wait).

ACK_BUCKETS = {f'ack_seconds_bucket{{le="{limit}"}}': float(limit) for limit in (
    '0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1.0 +Inf').split()}


class Board:
    """Progress by download id, in memory only: an SD card wears out by fsyncs."""

    def __init__(self, first_version=0):
        self.version = first_version  # differs from run to run: a page notices a new run
        self._changed = threading.Condition()
        self._progress = {}
        self._released = False  # the server is stopping: nobody waits
        self._counters = dict.fromkeys(  # of /metrics, since the start
            (*ACK_BUCKETS, 'ack_seconds_count', 'ack_seconds_sum'), 0)

    def post(self, download_id, progress=None):
        """Something about this download changed; `progress` None: it no longer runs."""
        with self._changed:
            self._progress[download_id] = progress
            if progress is None:
                del self._progress[download_id]
            self.version += 1
            self._changed.notify_all()

    def count(self, name, amount=1):
        """Add to a counter of /metrics; `name` with its labels."""
        with self._changed:
            self._counters[name] = self._counters.get(name, 0) + amount

    def observe(self, seconds):
        """Add the time of an acknowledgement to the histogram."""
        with self._changed:
            for name, limit in ACK_BUCKETS.items():
                self._counters[name] += seconds <= limit
            self.count('ack_seconds_count')
            self.count('ack_seconds_sum', seconds)

    def counters(self):
        """(name, value) of all, each family in one piece."""
        with self._changed:
            return sorted(self._counters.items(), key=lambda item: item[0].partition('{')[0])

    def progress(self, download_id):
        """Its progress, None if it is not running."""
        with self._changed:
            return self._progress.get(download_id)

    def wait(self, version, seconds):
        """Wait until there is news since `version`; False when the server is stopping."""
        with self._changed:
            self._changed.wait_for(lambda: self.version != version or self._released, seconds)
            return not self._released

    def release(self):
        """Release all who wait: the server is stopping."""
        with self._changed:
            self.version += 1
            self._released = True
            self._changed.notify_all()


# ---------- guard -------------------------------------------------------------------------
# Owns how an attempt ends (ENDINGS), how it is stopped, and what its threads may connect to, run
# and write: one audit hook (PEP 578) sees it all, whatever yt-dlp's functions are called. Threads
# started by our own threads are free; those started by an attempt belong to it; all others may do
# nothing. Lock: Stopper._changed guards what stop() has to end. Called by download, vendor.

ENDINGS = {reason: (kind, text) for kind, texts in {  # what a person reads
    'done': {'done': 'It is here'},  # the post was here already
    'cancelled': {'cancelled': 'Cancelled'},
    'stopped': {'stopped': 'The server was stopped'},
    'pause': {
        'disk': 'The disk is nearly full: delete videos, and downloads resume',
        'output': 'The output folder is missing or its disk fails: mount or check it',
        'read_only': 'The output folder is read-only: mount it for writing, or '
                     'give the service access with `sudo ./install.sh --output DIR`',
        'ytdlp': 'yt-dlp is missing or damaged: run the command "update"',
        'ca_store': 'No site can be verified: install ca-certificates '
                    '(on a Mac: run Install Certificates.command)'},
    'retry': {
        'timeout': 'The site stopped sending data',
        'network': 'The connection to the site failed',
        'http': 'The site answered with an error',
        'site_changed': 'The site has changed: yt-dlp needs an update',
        'bad_media': 'The site sent something that is not a video',
        'crash': 'A helper program (ffmpeg) failed',
        'internal': 'The server hit an internal error; see its log',
        'login': 'The site asks for a login: add cookies of an account, or try again later',
        'session': 'The site refuses the login in your cookies: export them again',
        'blocked': "The site blocks this server's address: wait a few hours, or set a proxy",
        'filtered': 'A DNS filter, the router or a VPN hides the site: allow it there'},
    'give_up': {
        'gone': 'This post is gone or was deleted',
        'private': 'This post is private: add cookies of an account that can see it',
        'geo': 'This post is blocked in your country: only a proxy elsewhere helps',
        'unsupported': 'This link has no video that can be downloaded',
        'no_post': 'Share the video or photo itself',
        'refused_address': 'The link leads to an address that is not public',
        'ffmpeg': 'Picture and sound are separate files: install ffmpeg, then retry'},
}.items() for reason, text in texts.items()}
FEW_TRIES = ('login', 'blocked', 'session')  # a site asked again and again blocks us for good
NEED_COOKIES = ('login', 'private')  # tried again at once with cookies, if there are any


class Ending(BaseException):
    """Ends an attempt with this outcome. Not an Exception: extractors catch those."""

    def __init__(self, reason, detail='', **changes):
        kind, text = ENDINGS[reason]
        message = ': '.join(filter(None, (text, detail)))
        message += '.' * (reason != 'cancelled')  # document A's word
        tries = 2 if reason in FEW_TRIES else math.inf
        self.reason_and_detail = reason, detail
        self.outcome = Outcome(kind, reason, message, tries=tries)._replace(**changes)
        super().__init__(message)


# -- how it is stopped

class Stopper:
    """Ends one attempt in well under a second: blocking calls (name servers, connecting, fsync) are
    abandoned, sockets shut down, child processes killed."""

    def __init__(self):
        self.ended = ()  # reason and detail of the first stop
        self.stopped_at = None  # monotonic
        self.children = []
        self._sockets = weakref.WeakSet()
        self._changed = threading.Condition()

    def stop(self, reason, detail=''):
        """End everything; the first reason stays. From any thread."""
        with self._changed:
            if self.ended:
                return
            self.ended, self.stopped_at = (reason, detail), time.monotonic()
            self.hang_up()
            for child in self.children:
                child.kill()
            self._changed.notify_all()

    def hang_up(self):
        """End its connections."""
        with self._changed:
            for sock in list(self._sockets):
                with suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)  # TLS's drops its state first

    def go_on(self):
        """Raise Ending if it was stopped."""
        if self.ended:
            raise Ending(*self.ended)

    def nap(self, seconds):
        """Sleep, but not beyond a stop. Raises Ending."""
        with self._changed:
            self._changed.wait_for(lambda: self.ended, seconds)
        self.go_on()

    def unless_stopped(self, function, *args, **more):
        """function(…), abandoned at a stop. Raises what it raises, or Ending."""
        from concurrent.futures import Future
        answer = Future()

        def work():
            try:
                answer.set_result(function(*args, **more))
            except BaseException as error:
                answer.set_exception(error)
            with self._changed:
                self._changed.notify_all()
        spawn(work)
        with self._changed:
            self._changed.wait_for(lambda: answer.done() or self.ended)
        self.go_on()
        return answer.result()

    def adopt(self, child):
        """A child process that a stop must end."""
        with self._changed:
            self.children = [other for other in self.children if other.returncode is None] + [child]
            if self.ended:
                child.kill()

    def hold(self, sock):
        """A new socket that a stop must end. Raises Ending."""
        with self._changed:
            self.go_on()
            self._sockets.add(sock)


# -- what it may reach

LARGEST_PAGE = 8 << 20  # bytes, unpacked; pages, manifests and keys are held in memory
LARGEST_FRAGMENT = 128 << 20  # bytes; also of HLS and DASH
FAKE = networks('0.0.0.0/32,198.18.0.0/15')  # what filters answer with
PROGRAMS = ('ffmpeg', 'ffprobe', 'openssl', 'deno')  # deno gets no permission from yt-dlp
LOCAL_FILES = (  # demuxers by name: a playlist posing as a video is not followed
    '-protocol_whitelist', 'file,crypto,data', '-format_whitelist',
    'mov,matroska,mpegts,mpeg,aac,mp3,ogg,flac,wav,avi,flv,gif,webvtt,srt,ass,ffmetadata,'
    'jpeg_pipe,png_pipe,webp_pipe')  # of a photo post
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def own_networks():
    """The networks in which this machine has an address, by getifaddrs(3)."""
    import ctypes
    libc, first, found = ctypes.CDLL(None), ctypes.c_void_p(), []
    libc.getifaddrs(ctypes.byref(first))
    at = first.value
    while at:
        # struct ifaddrs: the next one, name, flags, address, mask
        at, _, _, address, mask = (ctypes.c_void_p * 5).from_address(at)
        family = ctypes.string_at(address, 2) if address and mask else b''  # BSD: length, family
        for kind, start, size in ((socket.AF_INET, 4, 4), (socket.AF_INET6, 8, 16)):
            if kind in family:
                bits = int.from_bytes(ctypes.string_at(mask + start, size), 'big')
                packed = ctypes.string_at(address + start, size)
                found.append(ipaddress.ip_network((packed, f'{bits:b}'.count('1')), strict=False))
    libc.freeifaddrs(first)
    return found


def is_on_link(address):
    """Is it in one of this machine's IPv6 networks, which are global even at home?"""
    ip = ipaddress.ip_address(address)
    return any(ip in net for net in own_networks() if net.version == 6 and net.prefixlen >= 64)


def host_of(url):
    """The canonical host of `url`; 'localhost' if it is ambiguous."""
    try:
        return split_url(url)[1]
    except ValueError:
        return 'localhost'


def die_with_us():
    """For preexec_fn: Linux kills the child when its thread ends, elsewhere end_leftovers does."""
    if not sys.platform.startswith('linux'):
        return None
    import ctypes
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def arrange():
        prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died meanwhile
            os._exit(1)
    return arrange


def local_only(args):
    """A command line that reads only files, even if one names an address. Raises OSError for a URL
    or another program."""
    name = os.path.basename(args[0])
    if name not in PROGRAMS or any(re.match(r'(?!file:)[a-z]+:', arg) for arg in args):
        raise FileNotFoundError(errno.ENOENT, 'not to be run', args[0])
    line = [args[0], *LOCAL_FILES] if name == 'ffprobe' else [args[0]]
    for arg in args[1:]:
        line += (*LOCAL_FILES, arg) if name == 'ffmpeg' and arg == '-i' else (arg,)
    return line


class Here(threading.local):
    """`reach`: of the attempt that this thread works for, None in the program's own threads.
    `line`: the command line that it may run."""
    unknown = None  # reach of threads of unknown origin

    def __init__(self):
        super().__init__()
        self.reach = getattr(threading.current_thread(), 'reach', self.unknown)
        self.line = []


here = Here()


REACHES = weakref.WeakValueDictionary()  # by secret


class Reach(Stopper):
    """And what its threads may connect to, run and write: the hook calls may_…, which raise Ending
    or OSError."""

    def __init__(self, config, folder):
        super().__init__()
        self.security = config.security
        self.folder = os.path.abspath(folder)  # nothing is written outside of it
        self.largest = LARGEST_FRAGMENT  # bytes of one answer
        self.overrun = False  # whether curl_cffi was cut off in a large page
        self.proxy_parts = proxy = urlsplit(config.downloader.proxy or '')
        self.proxy = proxy.hostname  # everything goes through it
        self._ports = (proxy.port,) if proxy.port else (80, 443, 1080)
        self._names_are_ours = not self.proxy or proxy.scheme == 'socks4'  # to resolve
        self._doors = set()  # addresses of the proxy
        self.secret = os.urandom(16).hex()  # opens the door to C code
        REACHES[self.secret] = self

    def allows(self, address, port):
        """May we connect to it? Only to what is on the Internet; with a proxy, only to that."""
        if self.proxy:
            return (address, port) in self._doors
        if self.security.allow_private_targets:
            return True
        try:
            ip = unwrap_address(address)
        except ValueError:  # a name, not resolved yet
            return False
        return is_public(address) and not is_within(ip, own_networks())

    def look_up(self, real, host, port, *args, **more):
        """socket.getaddrinfo, up to a stop: addresses that we may connect to. Raises Ending if
        there are none: a DNS filter answers with an address that no site can have."""
        found = self.unless_stopped(real, host, port, *args, **more)
        if self.proxy == host.lower() and port in self._ports:
            self._doors.update(entry[4][:2] for entry in found)
        allowed = [entry for entry in found if self.allows(*entry[4][:2])]
        if allowed or not found or self.proxy and self._names_are_ours:
            return allowed or found
        address, reason = found[0][4][0], 'refused_address'
        if address != host and (is_under(host, (*SITES, *self.security.allowed_domains))
                                or is_within(unwrap_address(address), FAKE)):
            reason = 'filtered'
        raise Ending(reason, f'{host} is {address}')

    def allow_link(self, url):
        """Raise Ending unless the page, also after redirects, is on an allowed domain."""
        domains = self.security.allowed_domains
        if domains != ('*',) and not is_under(host_of(url), domains):
            raise Ending('unsupported', f'it leads to {excerpt(url)}')

    def may_connect(self, sock, address):
        """Checks each socket, with the actual address."""
        self.go_on()
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or not self.allows(*address[:2]):
            self.refuse(address)

    def may_look_up(self, host, *_):
        """With a proxy, it resolves the names."""
        self.go_on()
        if not self._names_are_ours and str(host).lower() != self.proxy:
            raise Ending('refused_address', excerpt(str(host)))

    def may_request(self, url, *_):
        """Checks each hop of a request; with a proxy, hosts by their spelling."""
        scheme, host = url.partition(':')[0].lower(), host_of(url)
        if scheme not in ('http', 'https', 'data'):
            raise Ending('unsupported', f'it leads to {excerpt(url)}')
        literal = is_private_host(host) or re.fullmatch(r'[\d.]+|\[.*', host)
        if self.proxy and not self.security.allow_private_targets and literal and scheme != 'data':
            raise Ending('refused_address', excerpt(urlsplit(url).netloc))

    def may_run(self, executable, args, *_):
        """Only a command line made by `start_process`."""
        self.go_on()
        if args != here.line or executable != args[0] or self._inside(executable):
            raise FileNotFoundError(errno.ENOENT, 'not to be run', executable)

    def may_write(self, *paths):
        """Create, change or remove these: only in the download's folder."""
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)) and not self._inside(path):
                raise PermissionError(errno.EACCES, 'outside the download', os.fsdecode(path))

    def _inside(self, path):
        path = os.path.abspath(os.fsdecode(path))
        return path in (self.folder, os.devnull) or path.startswith(self.folder + '/')

    def refuse(self, *what):
        """Refuse what no download needs."""
        raise PermissionError(errno.EPERM, f'not for a download: {excerpt(str(what))}')


@contextmanager
def within(reach):
    """This thread works for an attempt."""
    before, here.reach = here.reach, reach
    try:
        yield
    finally:
        here.reach = before


CHECKS = {event: check for check, events in (
    (lambda reach, sock, *_: reach.hold(sock), 'socket.__new__'),
    (Reach.may_connect, 'socket.connect'),
    (Reach.may_look_up, 'socket.getaddrinfo socket.gethostbyname'),
    (Reach.may_request, 'urllib.Request'),
    (Reach.may_run, 'subprocess.Popen'),
    (lambda reach, name: name is None or reach.refuse(name), 'ctypes.dlopen'),
    (lambda reach, path, _, flags: reach.may_write(*[path] * bool(flags & WRITING)), 'open'),
    (lambda reach, source, target, *_: reach.may_write(source, target), 'os.rename'),
    (lambda reach, path, *_: reach.may_write(path),
     'os.remove os.rmdir os.mkdir os.truncate os.chmod os.chown os.chflags os.utime os.setxattr '
     'os.removexattr sqlite3.connect'),
    (Reach.refuse,
     'os.link os.symlink os.chdir os.system os.exec os.posix_spawn os.spawn os.fork os.forkpty '
     'pty.spawn socket.bind socket.sendto socket.sendmsg'),
) for event in events.split()}


def audit(event, args):
    """The hook: whatever Python code opens, in any thread, passes here first."""
    check = CHECKS.get(event)
    if check is not None and here.reach is not None:
        check(here.reach, *args)


# -- what a stop ends, and how much memory it may use

def replace(owner, name, make):
    """owner.name becomes make(its old value). Raises AttributeError if there is no such name."""
    setattr(owner, name, make(getattr(owner, name)))


def for_attempts(owner, name, guarded):
    """For an attempt's threads, owner.name becomes guarded(reach, the old one, …)."""
    def make(real):
        @functools.wraps(real)
        def choose(*args, **more):
            reach = here.reach
            return real(*args, **more) if reach is None else guarded(reach, real, *args, **more)
        return choose
    replace(owner, name, make)


LARGE_PAGE = 'unsupported', f'a page has more than {format_size(LARGEST_PAGE)}'


def small_page(page):
    """The page, if it is not too large. Raises Ending."""
    if len(page) > LARGEST_PAGE:
        raise Ending(*LARGE_PAGE)
    return page


def decompress(_, __, data, wbits=15):
    """zlib.decompress with a limit. Raises Ending."""
    import zlib
    return small_page(zlib.decompressobj(wbits).decompress(data, LARGEST_PAGE + 1))


def read_answer(reach, real, answer, size=None):
    """HTTPResponse.read with limits. Raises Ending."""
    if size is None and (answer.length is None or answer.length > LARGEST_PAGE):
        return small_page(real(answer, LARGEST_PAGE + 1))
    data = real(answer, size)
    answer.brought = getattr(answer, 'brought', 0) + len(data)
    if answer.brought > reach.largest:
        raise Ending('unsupported', f'a fragment has more than {format_size(reach.largest)}')
    return data


def start_process(reach, real, process, args, *rest, **more):
    """Popen.__init__ for a child of the lowest priority that only reads files, and ends with us or
    at a stop."""
    here.line = local_only(args)
    real(process, here.line, *rest, **{**more, 'preexec_fn': die_with_us()})
    with suppress(OSError):  # it has ended
        os.setpriority(os.PRIO_PROCESS, process.pid, 19)
    reach.adopt(process)


def watch_process():
    """Install the hook, once. All threads that exist by then are the program's own."""
    if Here.unknown:
        return
    import subprocess
    import zlib

    def inherit(start):
        def start_thread(thread):
            thread.reach = here.reach
            start(thread)
        return start_thread

    def trust(context, *_):  # LibreSSL ignores the variable
        context.set_default_verify_paths()
        with suppress(KeyError, OSError):
            context.load_verify_locations(os.environ['SSL_CERT_FILE'])
    replace(threading.Thread, 'start', inherit)
    ssl.SSLContext.load_default_certs = trust
    for thread in threading.enumerate():
        vars(thread).setdefault('reach', None)
    nothing = SimpleNamespace(security=None, downloader=SimpleNamespace(proxy='nobody'))
    Here.unknown = Reach(nothing, Path(os.devnull, 'nowhere'))
    Here.unknown.stop('stopped')
    for_attempts(time, 'sleep', lambda reach, _, seconds: reach.nap(seconds))
    for_attempts(socket, 'getaddrinfo', Reach.look_up)
    for_attempts(socket.socket, 'connect', lambda reach, *call: reach.unless_stopped(*call))
    for_attempts(subprocess.Popen, '__init__', start_process)
    for_attempts(http.client.HTTPResponse, 'read', read_answer)
    for_attempts(zlib, 'decompress', decompress)
    sys.addaudithook(audit)


# ---------- download ----------------------------------------------------------------------
# Owns the vendored yt-dlp (as its only importer) and the folder <output>/.incomplete/<id>, in which
# one Attempt at a time downloads. Locks: Meter._lock guards the figures, NAMES_LOCK a free name
# until its file exists. Called by scheduler (Attempt), daemon and http (forget_files).

# yt-dlp's words for a reason; the first that matches wins.
PATTERNS = tuple((reason, re.compile(pattern, re.I)) for reason, pattern in (
    ('disk', 'No space left on device|Disk quota exceeded'),
    ('ffmpeg', 'ffmpeg (?:is )?not (?:installed|found)|Requested format is not available'),
    ('unsupported', r'No suitable extractor|no video in this|No video formats|\bDRM\b|live event'
                    r'|not currently live|curl: \(1\)'),
    ('geo', r'not available (?:in|from) your (?:country|region|location)|geo.?restrict'),
    ('private', r'\bprivate\b|permission to view|who follow this account'),
    ('login', r'\blog(?:ged)?.?in|\bsign in|cookies|not be comfortable'
              r'|only available for registered'),
    ('blocked', r'IP address is blocked|rate.?limit|too many requests|captcha'),
    ('http', 'status code 1000'),  # TikTok: its own server failed
    ('gone', r'not available|unavailable|no longer|not exist|removed|deleted|terminated'
             r'|(?:page|post|video) not found'),
))
CLASSES = {
    **dict.fromkeys(('TransportError', 'ContentTooShortError', 'ConnectionError', 'timeout',
                     'SSLError', 'HTTPException'), 'network'),
    'GeoRestrictedError': 'geo', 'UnsupportedError': 'unsupported', 'FileNotFoundError': 'crash'}
STATUSES = {401: 'login', 403: 'blocked', 404: 'gone', 410: 'gone', 451: 'geo'}  # of a page
DISK_ERRORS = {
    errno.ENOSPC: 'disk', errno.EDQUOT: 'disk', errno.EROFS: 'read_only',
    **dict.fromkeys((errno.EIO, errno.ENODEV, errno.ENXIO, errno.ESTALE), 'output')}
NETWORKING = re.compile(r'(?:/http/|/urllib/|/networking/|(?:^|/)(?:socket|ssl|socks)\.py)')


# -- what went wrong

def chain(error):
    """The error and its causes."""
    links = [error]
    for link in links:  # it grows
        context = None if hasattr(link, 'orig_msg') else link.__context__
        for cause in (getattr(link, 'cause', None), link.__cause__, context):
            if isinstance(cause, BaseException) and cause not in links:
                links.append(cause)
    return links


def class_names(*errors):
    return {kind.__name__ for error in errors for kind in type(error).__mro__}


def has_ca_store():
    paths = ssl.get_default_verify_paths()
    return bool(paths.cafile or paths.capath and os.listdir(paths.capath))


def where_raised(error):
    """The source files in an error's traceback, innermost last."""
    import traceback
    return [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]


def system_reason(error, output):
    """'disk', 'read_only' or 'output' if this error is about our own files: by its path, else by
    where it was raised. TLS has its own error numbers (5 is not EIO)."""
    number, path, files = error.errno, error.filename, where_raised(error)
    ours = files and not any(map(NETWORKING.search, files))
    if path is not None:
        ours = str(path).startswith(str(output))
    if not output.is_dir() or ours and path and number in (errno.EACCES, errno.EPERM):
        return 'output'
    return DISK_ERRORS.get(number) if ours else None


def judge_words(links, classes, text, output):
    """The reason that the kinds of errors and yt-dlp's words give, else where it failed."""
    helper = 'PostProcessingError' in classes
    full = helper and free_space(output) < 64 << 20  # its words alone may be a site's
    for name, reason in CLASSES.items():
        if name in classes and 'curl: (1)' not in text:  # a redirect to ftp
            return reason
    for reason, pattern in PATTERNS:
        if pattern.search(text) and (reason != 'disk' or full):
            return reason
    for link in links:
        if hasattr(link, 'orig_msg'):  # from an extractor
            return 'unsupported' if link.expected else 'site_changed'
    if helper:
        return 'crash'
    if 'DownloadError' in classes:
        return 'network'
    # In yt-dlp: it tripped over what the site sent.
    return 'site_changed' if '/yt_dlp/' in ''.join(where_raised(links[0])[-1:]) else 'internal'


def judge_error(error, output, in_page):
    """What an exception from yt-dlp means, in our words. `in_page`: it came before any media."""
    links = chain(error)
    classes = class_names(*links)
    for link in links:
        reason = isinstance(link, OSError) and system_reason(link, output)
        if reason:
            return Ending(reason)
    said = [str(getattr(link, 'orig_msg', link)) for link in links
            if 'YoutubeDLError' in class_names(link)]
    text = (' '.join(said) or str(error))[:2000]  # a site's words may be of any length
    told = re.search(r'HTTP Error (\d{3})', text)
    status = next((link.status for link in links if hasattr(link, 'status')),
                  told and int(told[1]))
    if in_page and status in STATUSES:
        return Ending(STATUSES[status])
    if status:  # the address of a medium expires: the next try asks for a new one
        passing = status >= 500 or status in (408, 425, 429)
        return Ending('http', f'HTTP {status}', tries=math.inf if passing else 2)
    if 'SSLCertVerificationError' in classes and not has_ca_store():
        return Ending('ca_store')
    if 'Requested format is not available' in text and which('ffmpeg'):
        return Ending('unsupported', 'not in the format asked for')
    return Ending(judge_words(links, classes, text, output))


# -- posts

def post_url(url):
    """A link in the form that every yt-dlp accepts."""
    if urlsplit(url).hostname == 'l.instagram.com':  # its wrapper for links in messages
        url = dict(parse_qsl(urlsplit(url).query)).get('u', url)
    site, media_id = post_of(url)
    if site == 'tiktok.com':
        user = re.match(r'https://[^/]+/(@[\w.-]+)/', url)
        return f'https://www.tiktok.com/{user[1] if user else "@_"}/video/{media_id}'
    return url


class Pictures:
    """Gives Instagram's extractors `pictures`: the addresses of each, best first."""

    def _extract_product_media(self, media, *args, **more):
        info = super()._extract_product_media(media, *args, **more)
        if media.get('media_type') == 2 or any(
                media.get(key) for key in ('video_versions', 'video_dash_manifest')):
            return info
        sizes = (media.get('image_versions2') or {}).get('candidates') or ()
        sizes = sorted(sizes, key=lambda size: -(size.get('width') or 0))
        return self._picture(info, [size.get('url') for size in sizes], media.get('code'))

    def _picture(self, info, urls, code):
        urls = list(filter(None, urls))
        return {**info, 'id': code or info.get('id'), 'pictures': [urls],
                'formats': [  # without one, yt-dlp reports a failure
                    {'url': url, 'format_id': 'picture', 'ext': 'jpg'} for url in urls]}

    def _extract_nodes(self, nodes, is_direct=False):  # what 2025's yt-dlp finds logged out
        for node in nodes:
            if node.get('is_video') or node.get('__typename') == 'GraphVideo':
                yield from super()._extract_nodes([node], is_direct)
            else:
                urls = node.get('display_url'), node.get('display_src')
                yield self._picture({}, urls, node.get('shortcode'))

    def _download_json(self, *args, **more):
        found = super()._download_json(*args, **more)
        data = isinstance(found, dict) and found.get('data')
        post = isinstance(data, dict) and data.get('xdt_shortcode_media')
        if post and post.get('display_url') and not post.get('video_url'):  # a single picture
            post.setdefault('edge_sidecar_to_children', {'edges': [{'node': dict(post)}]})
        return found


def post_extractors():
    """yt-dlp's extractors with `pictures`; instances, as a class would be looked up."""
    from yt_dlp.extractor import instagram, tiktok

    class TikTokIE(tiktok.TikTokIE):
        def _parse_aweme_video_web(self, aweme_detail, *args, **more):
            info = super()._parse_aweme_video_web(aweme_detail, *args, **more)
            images = (aweme_detail.get('imagePost') or {}).get('images') or ()
            info['pictures'] = [(image.get('imageURL') or {}).get('urlList') or ()
                                for image in images]
            return info

    return [TikTokIE(), tiktok.TikTokVMIE()] + [
        type(site.__name__, (Pictures, site), {})()
        for site in (instagram.InstagramIE, instagram.InstagramStoryIE)]


def is_post(url):
    """Is it the link of a post on one of SITES, not of a profile, sound or tag?"""
    return any(site.suitable(url) for site in post_extractors())


def seconds_of(value):
    """A site's number of seconds; None if it cannot be true."""
    return value if isinstance(value, (int, float)) and 0 <= value < 1 << 32 else None


def post_facts(info, url):
    """What the site says about a post. The title is the caption's first line where the site's own
    is cut off or made up."""
    site, title = site_of(url), str(info.get('title') or '')
    caption = str(info.get('description') or '').strip()
    made_up = re.fullmatch(r'(?:Post|Video|Story) by (.+)', title)
    if site in SITES and caption:
        title = caption.splitlines()[0][:200]
    uploader = info.get('uploader') or made_up and made_up[1]
    if site == 'instagram.com':  # there `uploader` is the full name
        uploader = info.get('channel') or uploader
    date, moment = info.get('upload_date') or '', seconds_of(info.get('timestamp'))
    if moment and not date:
        date = time.strftime('%Y%m%d', time.gmtime(moment))
    return {'id': excerpt(str(info.get('id') or ''), 200), 'site': site,
            'title': title[:LONGEST_TITLE], 'uploader': str(uploader or ''),
            'duration': seconds_of(info.get('duration')), 'description': caption,
            'upload_date': date, 'timestamp': moment}


def announced(info):
    """Which of 'video' and 'audio' yt-dlp says a format has, or those merged."""
    kinds = set()
    for part in info.get('requested_formats') or [info]:
        if part.get('vcodec') != 'none':
            kinds.add('video')
        if part.get('acodec') not in (None, 'none'):
            kinds.add('audio')
    return kinds


def without_formats(formats, got, lacking):
    """The formats without those in `got` that lacked it; none if no other announces it."""
    struck = {str(part.get(key)) for part in got.get('requested_formats') or [got]
              if lacking in announced(part) for key in ('url', 'format_id')}
    struck |= {re.sub(r'-\d+$', '', name) for name in struck}  # as the site had it
    rest = [part for part in formats if not struck & {part.get('url'), part.get('format_id')}]
    fewer = len(rest) < len(formats)  # else yt-dlp has changed the name and address
    return rest if fewer and any(lacking in announced(part) for part in rest) else []


# -- yt-dlp, imported and held

IMPORT_LOCK = threading.Lock()
# 'Session': the class made below, once yt-dlp is imported from 'folder'; 'curl': if that works
IMPORTED = {}
PYTHON = '%d.%d' % sys.version_info[:2]
CURL_FOLDER = f'curl-{PYTHON}'  # beside yt_dlp: it is for one Python


def openssl_decrypt(reach, decrypt, data, key, iv):
    """AES-128 by openssl: yt-dlp's own takes 10 s per MB and ignores a stop."""
    if len(key) != 16 or len(iv) != 16:  # openssl would refuse it
        raise Ending('bad_media')
    line = f'openssl enc -d -aes-128-cbc -nopad -K {key.hex()} -iv {iv.hex()}'.split()
    # No timeout: waiting with one sleeps, which the try-out listens for.
    plain = output_of(line, None, data[:len(data) & -16])  # whole blocks
    reach.go_on()
    return plain or decrypt(data, key, iv)


def no_ffmpeg(base):
    """yt-dlp's own downloader for HLS can be stopped and resumed."""
    class NoFFmpeg(base):
        available = classmethod(lambda cls, path=None: False)

        def real_download(self, filename, info_dict):
            raise Ending('unsupported', 'it is live or protected')
    return NoFFmpeg


def write_index(_, __, downloader, ctx):
    """yt-dlp's _write_ytdl_file, but atomic and with the size of the partial file."""
    index, part = downloader.ytdl_filename(ctx['filename']), ctx['tmpfilename']
    size = os.path.getsize(part) if os.path.exists(part) else 0
    note = {'current_fragment': {'index': ctx['fragment_index']},
            'extra_state': {**ctx.get('extra_state', {}), 'size': size}}
    write_whole(Path(index), json.dumps({'downloader': note}), durable=False)


def own_order(_, begin, sorter, *args):
    """A FormatSorter's start, with its own copy of the settings, which its class shares."""
    sorter.settings = {name: {**rule} for name, rule in sorter.settings.items()}
    begin(sorter, *args)


def cache_context(make):
    """Read all CAs once, and again after they have been installed."""
    cached = functools.lru_cache(2)(lambda _, *args, **more: make(*args, **more))
    return lambda *args, **more: cached(has_ca_store(), *args, **more)


def adapt_ytdlp():
    """Replace five names in yt-dlp; the guard does the rest. Raises AttributeError, ImportError."""
    from yt_dlp.downloader import fragment, hls
    from yt_dlp.networking import common
    from yt_dlp.utils import FormatSorter
    replace(hls, 'FFmpegFD', no_ffmpeg)
    replace(common, 'make_ssl_context', cache_context)
    for_attempts(FormatSorter, '__init__', own_order)
    for_attempts(fragment.FragmentFD, '_write_ytdl_file', write_index)
    for_attempts(fragment, 'aes_cbc_decrypt_bytes', openssl_decrypt)


# -- curl_cffi, which no hook sees

DOOR_HEAD = re.compile(rb'CONNECT ([\w.:\[\]-]+):(\d{1,5}) HTTP/1\.[01](?s:.*)'
                       rb'\r\nProxy-Authorization: Basic ([\w+/=]{1,99})\r\n')


def tunnel(reach, host, port):
    """A connection to it, by the proxy if there is one. Raises OSError, Ending."""
    reach.may_request(f'https://{host}:{port}/')
    proxy = reach.proxy_parts
    if not reach.proxy:
        return socket.create_connection((host, port), CONNECT_SECONDS)
    if proxy.scheme == 'http':
        link = http.client.HTTPConnection(reach.proxy, proxy.port, timeout=CONNECT_SECONDS)
        login = unquote(proxy.netloc.rpartition('@')[0]).encode()
        coded = binascii.b2a_base64(login, newline=False).decode()
        link.set_tunnel(host, port, {'Proxy-Authorization': f'Basic {coded}'} if login else {})
        link.connect()
        return link.sock
    from yt_dlp.networking import _helper
    options = _helper.make_socks_proxy_opts(proxy.geturl())
    found = socket.getaddrinfo(options['addr'], options['port'], 0, socket.SOCK_STREAM)
    return _helper.create_socks_proxy_socket(
        (host, port), options, found[0], CONNECT_SECONDS, None)


def relay(one, other):
    """Pass on what either side sends, until one ends."""
    poll, ways = select.poll(), {one.fileno(): (one, other), other.fileno(): (other, one)}
    for sock in (one, other):
        sock.settimeout(None)  # the attempt's own limits end it
        poll.register(sock, select.POLLIN)
    while True:
        for number, _ in poll.poll():
            source, target = ways[number]
            data = source.recv(65536)
            if not data:
                return
            target.sendall(data)


STRANGERS = threading.Semaphore(64)  # who has not said yet who it is


def read_visitor(sock):
    """Whose it is, and where it wants to go: curl sends that in one piece. Raises OSError,
    ValueError, KeyError."""
    try:
        sock.settimeout(2)
        found = DOOR_HEAD.match(sock.recv(4096))
    finally:
        STRANGERS.release()
    if not found:
        raise ValueError
    secret = binascii.a2b_base64(found[3])[2:].decode()
    return REACHES[secret], found[1].decode().strip('[]'), int(found[2])


def serve_visitor(sock):
    with sock, suppress(OSError, ValueError, KeyError, http.client.HTTPException):
        reach, host, port = read_visitor(sock)
        with within(reach):
            try:
                reach.hold(sock)
                with tunnel(reach, host, port) as other:
                    sock.sendall(b'HTTP/1.1 200 OK\r\n\r\n')
                    relay(sock, other)
            except Ending as ending:
                reach.stop(*ending.reason_and_detail)


def open_door():
    """The port of a proxy on loopback for CONNECT (RFC 9110 section 9.3.6), so that C code is held
    by the same rules and stops. TLS stays end to end."""
    listener = socket.create_server(('127.0.0.1', 0))

    def keep():
        while True:
            STRANGERS.acquire()
            try:
                sock, _ = listener.accept()
                spawn(serve_visitor, sock)
            except (OSError, RuntimeError):  # no descriptor or thread is free
                STRANGERS.release()
                time.sleep(1)
    spawn(keep)
    return listener.getsockname()[1]


def ca_file():
    """The system's CAs in one file, instead of the package certifi."""
    bundles = ssl.get_default_verify_paths().cafile or '', '/etc/ssl/certs/ca-certificates.crt'
    return next(filter(os.path.exists, bundles), '/etc/ssl/cert.pem')


CUT_OFF = 0xFFFFFFFF  # CURL_WRITEFUNC_ERROR; an exception cannot pass through C


class Page:
    """The body of an answer to curl_cffi: not too large, and in few pieces, since yt-dlp copies all
    that came before for each."""

    def __init__(self, reach, pass_on):
        self.reach, self.pass_on = reach, pass_on
        self.size, self.kept = 0, bytearray()

    def write(self, data):
        self.size += len(data)
        self.kept += data
        if self.size > LARGEST_PAGE:
            self.reach.overrun = True
        if self.size > LARGEST_PAGE or self.reach.ended:
            return CUT_OFF
        if self.size == len(data) or len(self.kept) > 65536:  # the first piece says that it begins
            return CUT_OFF if self.flush() == CUT_OFF else len(data)
        return len(data)

    def flush(self):
        data, self.kept = bytes(self.kept), bytearray()
        return self.pass_on(data) if data else 0


class PageHead:
    """Its header lines, none folded. Several codings, or zstd, could take any memory or time inside
    libcurl."""

    def __init__(self, lines):
        self.lines, self.codings = lines, []

    def write(self, line):
        name, _, text = line.lower().partition(b':')
        if name.startswith(b'http/'):
            self.codings = []
        elif name in (b'content-encoding', b'transfer-encoding'):
            self.codings += re.findall(rb'(?!chunked|identity)\b[\w-]+', text)
        if len(self.codings) > 1 or b'zstd' in self.codings or line[:1] in (b' ', b'\t'):
            return CUT_OFF
        return self.lines.write(line)


def adapt_curl():
    """Send curl_cffi through the door, limit its pages. Raises AttributeError, ImportError."""
    from curl_cffi.curl import Curl, CurlOpt
    port = open_door()

    def perform(reach, real, curl, *args):
        for name, value in (
                ('PROXY', f'http://x:{reach.secret}@127.0.0.1:{port}'), ('NOPROXY', ''),
                ('HTTPPROXYTUNNEL', 1), ('PROTOCOLS_STR', 'http,https'),
                ('REDIR_PROTOCOLS_STR', 'http,https'), ('CAINFO', ca_file())):
            curl.setopt(CurlOpt[name], value)
        try:
            real(curl, *args)
        finally:
            curl.page.flush()

    def setopt(reach, real, curl, name, value):
        if name == CurlOpt.WRITEFUNCTION:
            curl.page = Page(reach, value)
            value = curl.page.write
        elif name == CurlOpt.HEADERDATA:
            name, value = CurlOpt.HEADERFUNCTION, PageHead(value).write
        return real(curl, name, value)
    for_attempts(Curl, 'perform', perform)
    for_attempts(Curl, 'setopt', setopt)


# -- the session

def session_class(base):
    """A YoutubeDL that asks its attempt first."""
    from yt_dlp.networking import Request

    class Session(base):
        attempt = None  # set by whoever makes it

        def urlopen(self, req):
            if isinstance(req, str):
                req = Request(req)
            return self.attempt.fetch(super().urlopen, req)

        def _impersonate_target_available(self, target):
            return self.attempt.impersonates and super()._impersonate_target_available(target)

        def extract_info(self, url, *args, **more):
            url = post_url(url)
            self.attempt.reach.allow_link(url)
            if is_under(host_of(url), SITES) and not is_post(url):
                raise Ending('no_post')
            return super().extract_info(url, *args, **more)

        def process_ie_result(self, ie_result, download=True, extra_info=None):
            process = super().process_ie_result
            return self.attempt.take(lambda info: process(info, download, extra_info), ie_result,
                                     extra_info or {})

        def dl(self, name, info, subtitle=False, test=False):
            attempt = self.attempt
            if not test:
                attempt.begin_file(name, info)
            if attempt.folder.current:
                attempt.reach.largest = math.inf
            try:
                return super().dl(name, info, subtitle, test)
            finally:
                attempt.folder.current, attempt.reach.largest = '', LARGEST_FRAGMENT
    return Session


def forget_package(package):
    for name in [name for name in sys.modules if name.partition('.')[0] == package]:
        del sys.modules[name]


def import_curl(folder):
    """Guard curl_cffi before yt-dlp finds it, once. Raises whatever a damaged copy raises."""
    if 'curl' in IMPORTED:
        return
    IMPORTED['curl'] = False
    sys.path.append(str(folder))
    sys.modules['certifi'] = SimpleNamespace(where=ca_file)
    try:
        adapt_curl()
    except BaseException:
        sys.path.remove(str(folder))
        forget_package('curl_cffi')
        raise
    IMPORTED['curl'] = True


def import_ytdlp(folder, impersonate=False):
    """The class Session over the yt-dlp in `folder`, imported and guarded once per process. Raises
    whatever a damaged copy raises, and leaves nothing of it."""
    with IMPORT_LOCK, within(None):  # so that compiled files can be written
        if 'Session' not in IMPORTED:
            os.environ['YTDLP_NO_PLUGINS'] = '1'
            sys.path.insert(0, str(folder))
            if impersonate and (folder / CURL_FOLDER).is_dir():
                try:
                    import_curl(folder / CURL_FOLDER)
                except Exception:  # yt-dlp works without it
                    log.exception('impersonate=on has no effect')
            try:
                import yt_dlp.extractor.instagram
                import yt_dlp.extractor.tiktok
                adapt_ytdlp()
                IMPORTED.update(Session=session_class(yt_dlp.YoutubeDL), folder=folder)
                gc.freeze()  # all this stays; a collection then takes a millisecond
            except BaseException:
                forget_package('yt_dlp')
                raise
        return IMPORTED['Session']


# -- how a site is asked

WAYS = {  # by attempt: a retry poses as another browser
    'chrome': '',  # by yt-dlp
    'firefox': 'Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:145.0) Gecko/20100101 Firefox/145.0',
    'safari': 'Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 '
              '(KHTML, like Gecko) Version/18.6 Safari/605.1.15'}
NO_PAGES = ('/', '/api/v1/web/get_ruling_for_content/')  # requested before an Instagram post's page


def way_of(job, config):
    """Which browser it poses as; 'impersonated': curl_cffi asks for all pages."""
    if not config.downloader.user_agent_rotation or '--user-agent' in dict(job.options):
        return 'own'
    ways = list(WAYS)
    if config.downloader.impersonate:
        ways.insert(2, 'impersonated')
    return ways[(job.attempt - 1) % len(ways)]


class Pace:
    """Spaces out all workers' page requests to a site."""

    def __init__(self):
        self._lock, self._next = threading.Lock(), {}  # when each site's next request may go

    def turn(self, site, gap, now):
        """Take the next turn: seconds to wait before asking. `now`: time.monotonic()."""
        with self._lock:
            due = max(now, self._next.get(site, 0.0))
            self._next[site] = due + gap
            return due - now


PACE = Pace()


# -- how far it is

class Meter:
    """Progress: never falls, told at most twice a second. yt-dlp calls it from several threads."""
    MEDIA = 97  # percent; the rest is checking and moving
    PAUSE = 0.5  # seconds

    def __init__(self, tell):
        self.tell, self._lock = tell, threading.Lock()
        self.phase, self.steps = '', 0  # steps: phases and files begun, a sign of life
        self._progress, self._told = Progress(0.0), 0.0
        self._items, self._item, self._parts, self._part = 1, 0, 1, 0
        self._bytes_before, self._bytes = 0, 0

    def enter(self, phase):
        if phase != self.phase:
            self.phase, self.steps = phase, self.steps + 1
            self._report(True, phase=phase, speed=None, eta=None)

    def plan(self, info, parts):
        """An item of so many parts begins: two if the sound is separate."""
        title = excerpt(str(info.get('playlist_title') or info.get('title') or ''), 200)
        self._progress = self._progress._replace(title=title)
        self._items = max(int(info.get('n_entries') or 1), 1)
        self._item = min(int(info.get('playlist_autonumber') or 1), self._items) - 1
        self._parts, self._part = parts, -1

    def begin(self):
        self._part = min(self._part + 1, self._parts - 1)
        self._bytes_before, self._bytes = self._bytes_before + self._bytes, 0
        self.steps += 1
        self.enter('media')

    def hear(self, told):
        """yt-dlp's progress hook; whether it was passed on."""
        self._bytes = told.get('downloaded_bytes') or told.get('total_bytes') or 0
        total = told.get('total_bytes') or told.get('total_bytes_estimate')
        done, goal = told.get('fragment_index') or 0, told.get('fragment_count') or 1
        if told['status'] == 'finished':
            done = goal
        elif total:
            done, goal = self._bytes, total
        share = (self._part + min(done / goal, 1)) / self._parts
        return self._report(
            False, self.MEDIA * (self._item + share) / self._items,
            downloaded=self._bytes_before + self._bytes,
            total=total and int(self._bytes_before + total),
            speed=told.get('speed'), eta=told.get('eta'))

    def _report(self, now, percent=0.0, **changes):
        with self._lock:
            percent = max(percent, self._progress.percent)
            self._progress = self._progress._replace(percent=percent, **changes)
            if not now and time.monotonic() - self._told < self.PAUSE:
                return False
            self._told = time.monotonic()
            self.tell(self._progress)
            return True


# -- the folder of a download

# What must be equal to continue a partial file.
SAME = ('format_id', 'filesize', 'vcodec', 'width', 'height', 'tbr', 'duration', 'protocol')
NAMES_LOCK = threading.Lock()
SHORT_NAME = 143  # bytes: the limit of eCryptfs
BAD_NAME = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EEXIST, errno.ENOTDIR)
BOOT_ID = find_line(Path('/proc/sys/kernel/random/boot_id'), '(.+)')  # '' where there is none


def end_leftovers(folder):
    """Kill an ffmpeg that an earlier run of this program left writing into `folder`."""
    listed = output_of(['ps', '-axww', '-o', 'pid=,args='], 60).decode('utf-8', 'replace')
    for pid in re.findall(rf'(?m)^ *(\d+) \S*ffmpeg .*{re.escape(str(folder))}/', listed):
        with suppress(OSError):
            os.kill(int(pid), signal.SIGKILL)


def plain_ascii(text):
    """`text` for a folder that accepts only ASCII."""
    import unicodedata
    return unicodedata.normalize('NFKD', text).encode('ascii', 'ignore').decode()


def free_names(output, result):
    """Unused names in `output`: the best first, then for encrypted folders and old shares."""
    names = result['names']
    plain_names = {key: plain_ascii(text) for key, text in names.items()}
    for limit, fields in ((NAME_BYTES, names), (SHORT_NAME, names), (SHORT_NAME, plain_names),
                          (SHORT_NAME, {**names, 'title': '', 'pattern': '%(id)s'})):
        for number in itertools.count(1):
            part = '-'.join(filter(None, (result['part'], number > 1 and str(number))))
            name = file_name(ext=result['ext'], part=part, limit=limit, **fields)
            if not os.path.lexists(output / name):
                break
        yield name


class JobFolder:
    """<output>/.incomplete/<id>: partial files; job.json says what they are and where results go.
    It is not synced, so after a reboot (seen on Linux only) it is not trusted."""

    def __init__(self, path):
        self.path, self.file = path, path / 'job.json'
        self.parts = {}  # by file name: format, total and size if known
        # finished files: source, item (of the post), part, ext, size, names, note; name once moved
        self.results = []
        self.post = {}  # post_facts() of what is behind the link
        self.missing = {}  # the items that failed, and what they are
        self.total = 1  # items of the post
        self.fetched = False  # whether each was tried
        self.current = ''  # the part that a request is for, '' for other requests

    def open(self):
        """Create it, never the output folder, or keep what can be continued. Raises OSError."""
        self.path.parent.mkdir(exist_ok=True)
        if not self.path.is_dir():
            self.path.mkdir()
            return
        end_leftovers(self.path)
        note = read_note(self.file)
        with suppress(ValueError, TypeError, KeyError):
            self.missing = {int(at): kind for at, kind in note['missing'].items()}
            self.post, self.total, self.results = note['post'], note['total'], note['results']
            if note['boot'] == BOOT_ID:
                self.parts, self.fetched = note['parts'], note['fetched']
            else:  # only what was moved was synced
                self.results = [result for result in self.results if 'name' in result]
        self.clear({result['source'] for result in self.results} | {self.file.name} | {
            name + end for name in self.parts for end in ('', '.part', '.ytdl')})

    def clear(self, keep=()):
        """Remove all other files. Raises OSError."""
        for name in set(os.listdir(self.path)) - set(keep):
            remove_folder(self.path / name)  # of a NAS
            (self.path / name).unlink(missing_ok=True)

    def drop(self, prefix):
        """Remove the files with this prefix. Raises OSError."""
        self.clear(name for name in os.listdir(self.path) if not name.startswith(prefix))

    def save(self):
        """Write job.json. Raises OSError."""
        note = {**vars(self), 'boot': BOOT_ID, 'path': '', 'file': ''}
        write_whole(self.file, json.dumps(note), durable=bool(self.missing))

    def begin(self, name, info):
        """yt-dlp is about to fetch this file: keep only what it can continue."""
        same = json.dumps([info.get(field) for field in SAME], default=str)
        plain_file = info.get('protocol') in ('http', 'https')
        if self.parts.get(name, {}).get('same') != same or not self._sound(name, plain_file):
            self.drop(name)
            self.parts[name] = {'same': same}
            self.save()
        self.current = name if plain_file else ''

    def _sound(self, name, plain_file):
        file, partial = self.path / name, self.path / (name + '.part')
        if file.exists() or not partial.exists():
            return file.exists() and file.stat().st_size == self.parts[name].get('size')
        if plain_file:
            return partial.stat().st_size < (self.parts[name].get('total') or 0)
        try:  # cut it to the size in its index, so that no fragment is in it twice
            index = read_note(self.path / (name + '.ytdl'))
            size = index['downloader']['extra_state']['size']
        except (KeyError, TypeError):
            return False
        if partial.stat().st_size < size:
            return False
        os.truncate(partial, size)
        self.drop(name + '.part-')  # fragments begun
        return True

    def continues(self, response):
        """Does this answer belong to the current file? Records its size."""
        part, headers = self.parts.get(self.current), response.headers
        if part is None:
            return True
        told = re.fullmatch(r'bytes \d+-\d+/(\d+)', headers.get('Content-Range') or '')
        length = headers.get('Content-Length') or ''
        if response.status == 206 and told:
            length = told[1]
        total = int(length) if length.isdigit() else None
        if response.status == 416 or response.status == 206 and total != part.get('total', total):
            return False
        if total != part.get('total', -1):
            (self.path / (self.current + '.part')).unlink(missing_ok=True)
            part['total'] = total
            self.save()
        return True

    def finished(self, name, info):
        """Raises Ending if a file is shorter than the site stated."""
        part, size = self.parts.get(name), (self.path / name).stat().st_size
        if part:
            stated = max(part.get('total') or 0, info.get('filesize') or 0)
            if info.get('protocol') in ('http', 'https') and size < stated:
                raise Ending('bad_media', 'it is incomplete')
            part['size'] = size
            self.save()

    def size(self):
        """Bytes in it, and the time of the last write."""
        found = []
        with suppress(OSError):
            found = [file.stat() for file in os.scandir(self.path)]
        return sum(one.st_size for one in found), max((one.st_mtime for one in found), default=0.0)

    def items(self):
        return {result['item'] for result in self.results}

    def wanted(self, output):
        """The items still to fetch, [] for all; None if every file is here or in place."""
        def there(result):
            final = output / result.get('name', '.')
            moved = final.is_file() and final.stat().st_size == result['size']
            return moved or (self.path / result['source']).exists()
        lost = {result['item'] for result in self.results if not there(result)}
        self.missing = {**dict.fromkeys(lost, 'video'), **self.missing}
        self.results = [result for result in self.results if result['item'] not in lost]
        items = sorted(self.missing.keys() - self.items())
        if not (items or self.fetched):
            self.results = [result for result in self.results
                            if 'name' in result or self.post['site'] in SITES]
            return []
        return (items or None) if self.results else []

    def move(self, output):
        """Rename the results to free names in `output`. Raises OSError."""
        for result in self.results:
            with NAMES_LOCK:
                self._move(self.path / result['source'], output, result)
        for folder in {(output / result['name']).parent for result in self.results} | {output}:
            sync(folder)
        return tuple(MediaFile(result['name'], result['size'], media_type(result['name']))
                     for result in self.results)

    def _move(self, source, output, result):
        names = list(free_names(output, result)) if source.exists() else []
        for name in names:
            result['name'] = name
            try:
                (output / name).parent.mkdir(parents=True, exist_ok=True)
                self.save()  # so that after a kill this file is found and not made again
                return os.rename(source, output / name)
            except OSError as error:
                if error.errno not in BAD_NAME or name == names[-1]:
                    raise


def inside(output, name):
    """A finished file by its name in the database: in `output`, or in folders there."""
    return output.joinpath(*(part for part in name.split('/') if part not in ('', '.', '..')))


def forget_files(config, job_id, files, row=None):
    """Remove finished files by name, with emptied folders, and the folder of a download. `row`:
    the files of its row; what else it had moved when a kill came goes too."""
    output, names = config.downloads.output_directory, set(files)
    folder = output / '.incomplete' / job_id
    if row is not None:
        names |= {result['name'] for result in read_note(folder / 'job.json').get('results', ())
                  if 'name' in result and not (folder / result['source']).exists()
                  and result['name'] not in {file.name for file in row}}
    for name in names:
        file = inside(output, name)
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            log.warning('download %s: cannot delete %s: %s', job_id, name, error)
        with suppress(OSError), NAMES_LOCK:  # others are in it
            for parent in list(file.parents)[:name.count('/')]:
                parent.rmdir()
    if re.fullmatch(r'[\w-]+', job_id):  # else it could point elsewhere
        remove_folder(folder)


# -- is it media?

# First bytes of a file, and the extensions that fit them.
MAGIC = tuple((re.compile(pattern, re.S), kinds.split()) for pattern, kinds in (
    (rb'\xff\xd8\xff', 'jpg'),
    (rb'\x89PNG\r\n', 'png'),
    (rb'GIF8[79]a', 'gif'),
    (rb'RIFF.{4}WEBP', 'webp'),
    (rb'.{4}ftypavi[fs]', 'avif'),
    (rb'.{4}ftyp(?:hei[cfx]|mif1|msf1)', 'heic'),
    (rb'.{4}ftyp', 'mp4 m4a m4v mov 3gp'),
    (rb'.{4}(?:moov|mdat|wide|free|skip)', 'mov mp4'),
    (rb'\x1a\x45\xdf\xa3', 'mkv webm mka weba'),
    (rb'OggS', 'ogg opus'),
    (rb'ID3|\xff[\xfb\xf3\xf2]', 'mp3 aac'),
    (rb'\xff[\xf1\xf9]', 'aac'),
    (rb'fLaC', 'flac'),
    (rb'RIFF.{4}WAVE', 'wav'),
    (rb'RIFF.{4}AVI ', 'avi'),
    (rb'FLV\x01', 'flv'),
    (rb'\x47.{187}\x47', 'ts'),
    (rb'\x00\x00\x01\xba', 'mpg'),
))
STILLS = {'.jpg': 'jpeg_pipe', '.png': 'png_pipe', '.webp': 'webp_pipe', '.gif': 'gif'}
PICTURE_ENDS = {'jpg': b'\xff\xd9', 'png': b'IEND\xaeB`\x82', 'gif': b';'}
MOST_BOXES = 100_000  # looked at in an mp4; one of fragments has thousands
MP4_PARENTS = (b'moov', b'trak', b'mdia', b'minf', b'stbl')
MP4_TRACKS = {b'vide': 'video', b'soun': 'audio'}
MP4_KINDS = ('mp4', 'm4a', 'm4v', 'mov', '3gp')


def still_format(path):
    """ffmpeg's options for a picture. Without them, a % in the name would mean a series."""
    return ['-f', STILLS[path.suffix]] if path.suffix in STILLS else []


def media_extension(path):
    """The extension that fits the first bytes; '' if it is not media."""
    with path.open('rb') as file:
        start = file.read(256)
    kinds = next((kinds for pattern, kinds in MAGIC if pattern.match(start)), [''])
    own = path.suffix[1:].lower()
    return own if own in kinds else kinds[0]


def mp4_tracks(path):
    """'video' and 'audio' for the non-empty tracks of an mp4 (ISO 14496-12, 4.2 and 8). Raises
    ValueError if its boxes do not fill the file."""
    size, at, kind, samples = path.stat().st_size, 0, '', {}
    with path.open('rb') as file:
        for _ in range(MOST_BOXES):
            if at >= size:
                break
            file.seek(at)
            length, name, long = struct.unpack('>I4sQ', file.read(16).ljust(16, b'\0'))
            start = at + 16 if length == 1 else at + 8
            at += {0: size - at, 1: long}.get(length, length)
            if not start <= at <= size:
                raise ValueError(f'a box {name!r} goes beyond the end')
            file.seek(start)
            told = file.read(12)[8:]  # where hdlr has its type, stsz the number of samples
            if name in MP4_PARENTS:
                at, kind = start, '' if name == b'trak' else kind
            elif name == b'hdlr':
                kind = MP4_TRACKS.get(told, kind)
            elif name in (b'stsz', b'stz2'):
                samples[kind] = samples.get(kind) or any(told)
            elif name == b'moof':  # the samples follow
                samples = dict.fromkeys(samples, True)
    if at != size:
        raise ValueError('too many boxes')
    return {kind for kind, some in samples.items() if kind and some}


def is_picture(path):
    """Is it a complete picture?"""
    kind, size = media_extension(path), path.stat().st_size
    with path.open('rb') as file:
        start = file.read(8)
        file.seek(max(size - 1024, 0))
        end = file.read()
    if kind == 'webp':
        return size >= int.from_bytes(start[4:], 'little') + 8
    if kind in ('avif', 'heic'):
        with suppress(ValueError):
            return not mp4_tracks(path)
    return kind in PICTURE_ENDS and PICTURE_ENDS[kind] in end


def tracks(path):
    """Which of 'video' and 'audio' are in a file, by an mp4's boxes or ffprobe; both if there is no
    ffprobe. Raises Ending for an incomplete file."""
    if media_extension(path) in MP4_KINDS:
        try:
            return mp4_tracks(path)
        except ValueError:
            raise Ending('bad_media', 'it is incomplete') from None
    if not which('ffprobe'):
        return {'video', 'audio'}
    line = 'ffprobe -v error -show_entries stream=codec_type -of csv=p=0'.split()
    listed = output_of([*line, f'file:{path}'], 60)
    return {'video', 'audio'}.intersection(listed.decode().split())


# -- a video of pictures

SLIDE_SECONDS = 2.5  # at least, for each picture
SLIDE_RATE = 4  # frames a second: few, as nothing moves
SLIDE = ('scale=1080:1920:force_original_aspect_ratio=decrease:force_divisible_by=2:'
         'out_range=tv,pad=1080:1920:-1:-1,setsar=1,format=yuv420p,loop={}:1:0,setpts=N/{}/TB')


def make_slideshow(pictures, sound, video):
    """A video of the pictures, each for its share of the sound. Raises CalledProcessError, OSError.

    Piecewise, so that only one picture is in memory; MPEG-TS pieces can simply be joined."""
    import subprocess

    def run(name, options, *more):
        command = [name, '-v', 'quiet', *options.split(), *more]
        return subprocess.check_output(command, stdin=subprocess.DEVNULL)
    told = run('ffprobe', '-show_entries format=duration -of csv=p=0', f'file:{sound}')
    frames = math.ceil(max(float(told) / len(pictures), SLIDE_SECONDS) * SLIDE_RATE)
    with open(video.with_suffix('.ts'), 'wb') as joined:
        for at, path in enumerate(pictures):
            joined.write(run('ffmpeg', '-threads 1', *still_format(path), '-i', f'file:{path}', *(
                f'-frames:v {frames} -r {SLIDE_RATE} -c:v libx264 -threads 1 -preset ultrafast '
                f'-tune stillimage -output_ts_offset {at * frames / SLIDE_RATE} -f mpegts').split(),
                '-vf', SLIDE.format(frames - 1, SLIDE_RATE), '-'))
    codec = 'copy' if sound.suffix == '.m4a' else 'aac'
    run('ffmpeg', '-y -stream_loop -1', '-i', f'file:{sound}', '-i', f'file:{joined.name}',
        *f'-map 1:v -map 0:a -c:v copy -c:a {codec} -movflags +faststart'.split(),
        '-t', str(len(pictures) * frames / SLIDE_RATE), f'file:{video}')


# -- what yt-dlp is told

# What an iPhone does not play; `?`: an unknown codec passes.
PLAYABLE = '[vcodec!^=?vp][vcodec!^=?av0][vcodec!^=?av1]'
BEST = {  # the best that an iPhone plays, else any; by whether ffmpeg can merge
    True: f'bv*{PLAYABLE}+ba[acodec^=?mp4a]/bv*{PLAYABLE}+ba/b{PLAYABLE}/bv*+ba/b',
    False: f'b{PLAYABLE}/b'}
PROTOCOLS = ('http', 'https', 'm3u8', 'm3u8_native', 'http_dash_segments',
             'http_dash_segments_generator', 'ism')
PLAIN = {'picture': '.jpg', 'sound': '.m4a'}  # fetched as one file, with its usual extension
LACKING = {'audio': 'sound', 'video': 'picture'}
FEWEST_BYTES = 64 << 10  # that must arrive within [downloader] timeout
DEFAULTS = {  # options that the caller may change
    'retries': 3, 'fragment_retries': 3, 'socket_timeout': 20, 'merge_output_format': 'mp4'}
FORCED = {
    'quiet': True, 'noprogress': True, 'color': 'never', 'progress_delta': 1, 'cachedir': False,
    'skip_unavailable_fragments': False, 'hls_prefer_native': True, 'overwrites': False,
    'nopart': False, 'compat_opts': {'no-certifi'},
    'buffersize': 1 << 16, 'noresizebuffer': True,  # yt-dlp's 4 MB are no faster and cost memory
    'outtmpl': {'default': '%(playlist_index|0)s-%(id).60B.%(ext)s'}}


def caller_params(options):
    """What yt-dlp's own parser makes of the caller's options, beyond DEFAULTS."""
    words = [word for option in options if option[0].startswith('--') for word in option if word]
    if not words:
        return {}
    import yt_dlp
    base = ['--ignore-config', '--no-playlist']
    base += [f'--{name.replace("_", "-")}={value}' for name, value in DEFAULTS.items()]

    def read(more):
        return yt_dlp.parse_options([*base, *more]).ydl_opts
    usual, found = read([]), read(words)
    params = {name: value for name, value in found.items() if value != usual[name]}
    params.pop('_warnings', None)
    if 'postprocessors' in params:
        params['postprocessors'] = [step for step in params['postprocessors']
                                    if step not in usual['postprocessors']]
    return params


# -- the owner's cookies

COOKIE_LIMIT = 1 << 20  # bytes read of a cookies file; a whole browser's are fewer
REST_SECONDS = 3600  # before a refused login is tried again: it may not be to blame
LOGIN_COOKIE = 'sessionid'  # the login cookie of TikTok and Instagram
EXPORT = 'Fix: log in with a browser and export its cookies again.'


Cookie = namedtuple('Cookie', 'domain deep path secure expires name value')  # as in cookies.txt
# Domain, path, expiry, name and value as yt-dlp and the sites accept them.
COOKIE_FIELDS = re.compile(
    r'(\.?[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63}){1,9})\t(/[!-~]{0,1024})\t'
    r'(-?\d{1,16})(?:\.\d{1,9})?\t([!-:<-~]{1,256})\t([ -:<-~]{0,8192})', re.A)


def make_cookie(domain, path, secure, expires, name, value):
    """A cookie from the fields in a file; None if they are nonsense."""
    domain = re.sub('^https?://|/$', '', str(domain).lower())
    told = COOKIE_FIELDS.fullmatch('\t'.join(map(str, (domain, path, expires or 0, name, value))))
    if not told:
        return None
    domain, path, expires, name, value = told.groups()
    expires = max(0, int(expires))
    if expires > 10 ** 11:
        expires //= 1000  # milliseconds
    deep, secure = domain[0] == '.', str(secure).lower() in ('true', '1')
    return Cookie(domain, str(deep).upper(), path, str(secure).upper(), str(expires), name, value)


def parse_cookies(data):
    """The cookies in a file: Netscape's cookies.txt (with tabs or spaces, BOM, CRLF, UTF-16,
    #HttpOnly_) or a browser extension's JSON. Nonsense is left out."""
    # Without its NULs, UTF-16 of plain characters is plain text.
    text = data.decode('utf-8-sig', 'replace').replace('\0', '').lstrip('\ufffd')
    found, rows = None, []
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
    if isinstance(found, dict):
        found = found.get('cookies')
    if isinstance(found, list):
        for item in found:
            item = isinstance(item, dict) and item or {}
            item = {name.lower().partition(' raw')[0]: told for name, told in item.items()}
            rows.append((item.get('domain') or item.get('host'), item.get('path'),
                         item.get('secure'), item.get('expirationdate', item.get('expires')),
                         item.get('name') or '', item.get('value', item.get('content', ''))))
        text = ''
    for line in text.splitlines():
        line = line.strip(' ').removeprefix('#HttpOnly_')
        fields = line.split('\t') if '\t' in line else line.split(None, 6)
        if len(fields) in (6, 7) and line[0] != '#':  # an empty value may have lost its tab
            domain, deep, path, secure, expires, name, value = (*fields, '')[:7]
            dot = '.' * (deep.upper() == 'TRUE')  # the flag and the dot say the same
            rows.append((dot + domain.lstrip('.'), path, secure, expires, name, value))
    return list(filter(None, itertools.starmap(make_cookie, rows)))


def cookies_txt(cookies):
    return '\n'.join(['# Netscape HTTP Cookie File', *map('\t'.join, cookies), ''])


def last_labels(host):
    """'instagram.com' of 'www.instagram.com'."""
    return '.'.join(host.split('.')[-2:])


class Cookies:
    """The owner's cookies: cookies_file or, if that is empty, what the page stored beside the
    database. No value ever gets into a log or a message."""

    def __init__(self, config):
        folder = config.database.path.parent
        self.configured = bool(config.downloader.cookies_file)
        self.file = config.downloader.cookies_file or folder / 'cookies.txt'
        self.domains = config.security.allowed_domains
        self._refused = folder / 'cookies.refused'  # JSON: site → when it refused the login

    def read(self, data=None):
        """The allowed cookies by site, from `data` or the file. Raises OSError."""
        if data is None:
            with open(self.file, 'rb') as file:
                data = file.read(COOKIE_LIMIT)
        found = {}
        for one in parse_cookies(data):
            if self.domains == ('*',) or is_under(one.domain.lstrip('.'), self.domains):
                found.setdefault(last_labels(one.domain), []).append(one)
        return found

    def jar(self, url):
        """The cookies for a URL, as yt-dlp takes them; None if there are none, or they rest."""
        site = last_labels(host_of(url))
        try:
            cookies = self.read().get(site)
        except OSError as error:
            if self.configured:
                log.warning('cookies_file cannot be read: %s', error.strerror)
            return None
        rests = time.time() - self.refused().get(site, 0) < REST_SECONDS
        return io.StringIO(cookies_txt(cookies)) if cookies and not rests else None

    def refused(self):
        """The sites that refused this file's login, and when."""
        with suppress(OSError, TypeError):
            changed = os.stat(self.file).st_ctime
            return {site: at for site, at in read_note(self._refused).items() if at >= changed}
        return {}

    def judge(self, url, fine):
        """Record whether the site accepted this login. A refused one rests for an hour, and is
        reported until the file changes or it works."""
        site, told = last_labels(host_of(url)), self.refused()
        if fine and not told.pop(site, 0):
            return
        if not fine:
            told[site] = time.time()
        with suppress(OSError):
            write_whole(self._refused, json.dumps(told))

    def report(self, now):
        """(whether it is fine, a sentence) for each site; none if there is no file."""
        try:
            found = self.read()
        except OSError as error:
            told = (f'{self.file} cannot be read ({error.strerror}). Fix: put it where the server '
                    'can read it; a service sees no home folders')
            return [(False, told)] * self.configured
        if not found:
            return [(False, f'{self.file} has no cookies for {", ".join(self.domains)}. {EXPORT}')]
        return [self._judge(site, cookies, now) for site, cookies in sorted(found.items())]

    def _judge(self, site, cookies, now):
        login = [one for one in cookies if one.name == LOGIN_COOKIE]
        end = max(int(one.expires) for one in login or cookies)
        what, date = f'{len(cookies)} cookies for {site}', time.localtime(end)
        day = f'{date.tm_mday} {time.strftime("%B %Y", date)}'
        if site in self.refused():
            return False, f'{site} no longer accepts the login in {self.file}. {EXPORT}'
        if 0 < end < now:
            return False, f'{what}, expired on {day}. {EXPORT}'
        if site in SITES and not login:
            return False, f'{what}, but no login ({LOGIN_COOKIE}). {EXPORT}'
        return True, what + f', valid until {day}' * bool(end)

    def save(self, data):
        """Store cookies from the page, for allowed sites only. Raises Refused, OSError."""
        if self.configured:
            raise Refused('cookies_file', f'The cookies come from {self.file}, set in config.ini.')
        found = self.read(data)
        if not found:
            raise Refused('bad_cookies', f'No cookies for {", ".join(self.domains)} in this file.')
        write_whole(self.file, cookies_txt(itertools.chain(*found.values())))

    def remove(self):
        """Remove the cookies from the page. Raises OSError."""
        if not self.configured:
            self.file.unlink(missing_ok=True)


class Attempt:
    """One try at one job: run() in a worker's thread; stop() and check() from any other."""

    def __init__(self, job, config, ytdlp, on_progress, on_identity=lambda site, media_id: None):
        self.job, self.config, self.ytdlp, self.on_identity = job, config, ytdlp, on_identity
        self.options = dict(job.options)
        self.output = config.downloads.output_directory
        self.folder = JobFolder(self.output / '.incomplete' / job.id)
        self.meter = Meter(on_progress)
        self.session = None  # yt-dlp at work
        self.way = way_of(job, config)
        self.agent = ''  # one browser name for the whole attempt: a CDN's cookie is tied to it
        self.jar = None  # cookies, once the site has asked for a login
        self.failures = {}  # by item: what it is, how it ended
        self.reach = Reach(config, self.folder.path)
        self.stop = self.reach.stop
        self._identified = False  # whether on_identity has been asked
        self._mark = (0.0, 0, 0.0, -1)  # when there was last progress; bytes, last write, steps

    @property
    def impersonates(self):
        return IMPORTED.get('curl') and not WAYS.get(self.way)

    def check(self, now):
        """Stop if the disk is full or nothing came for too long. `now`: time.monotonic()."""
        with suppress(OSError):  # the folder is gone: the next write says so
            if free_space(self.output) < self.config.downloads.min_free_space:
                self.stop('disk')
        since, size, changed, steps = self._mark
        new_size, new_changed = self.folder.size()
        alive = self.meter.phase == 'file' or self.meter.phase == 'merge' and new_changed != changed
        if alive or steps != self.meter.steps or new_size >= size + FEWEST_BYTES:
            self._mark = now, new_size, new_changed, self.meter.steps
        elif now - since > self.config.downloader.timeout:
            self.stop('timeout')
        elif new_size < size:
            self._mark = since, new_size, changed, steps

    def fetch(self, urlopen, request):
        """The answer to `request`; the whole file if a range would be of another file."""
        self.reach.go_on()
        if self.folder.current:  # curl_cffi holds all in memory that comes faster than it is read
            request.extensions.pop('impersonate', None)
        elif self.way == 'impersonated' and self.impersonates:
            from yt_dlp.networking.impersonate import ImpersonateTarget
            request.extensions['impersonate'] = ImpersonateTarget()
        if request.extensions.get('impersonate'):
            request.headers.setdefault('Accept-Encoding', 'gzip, deflate, br')  # see PageHead
        site, gap = self._pace_of(request.url, request.method)
        wait = gap and PACE.turn(site, gap, time.monotonic())
        if wait:  # the try-out listens for naps
            self.reach.nap(wait)
        try:
            response = urlopen(request)
        except Exception as error:
            if getattr(error, 'status', 0) != 416 or not self.folder.current:
                raise
            response = error.response  # yt-dlp would send the same range again
        for name in ('Content-Length', 'Content-Range'):
            if re.search(r'\d{16}', response.headers.get(name) or ''):
                raise Ending('http', 'it states an impossible size')
        if not self.folder.continues(response):
            response.close()
            request.headers.pop('Range', None)
            response = urlopen(request)
            self.folder.continues(response)
        return response

    def _pace_of(self, url, method):
        parts = urlsplit(url)
        site = re.sub(r'^(www|m|i)\.', '', parts.hostname or '')
        if method == 'HEAD' or parts.path in NO_PAGES or self.folder.current:
            return site, 0.0
        return site, self.config.downloader.page_pace.get(site, 0.0)

    # -- what yt-dlp tells

    def choose(self, info, incomplete=False):
        """yt-dlp's match_filter; complete info comes just before the download. Raises Ending."""
        if incomplete:
            return
        formats = info.get('requested_formats') or [info]
        if info.get('is_live') or any(part.get('protocol') not in PROTOCOLS for part in formats):
            raise Ending('unsupported', 'it is live or streamed in a way that cannot be fetched')
        size = sum(part.get('filesize') or part.get('filesize_approx') or 0 for part in formats)
        needed = size * min(len(formats), 2) - self.folder.size()[0]
        free, least = free_space(self.folder.path), self.config.downloads.min_free_space
        if free < least:
            raise Ending('disk')
        if free - needed < least:  # other downloads may fit
            raise Ending('disk', f'this needs {format_size(needed)}, {format_size(free)} is free',
                         kind='retry')
        self.meter.plan(info, len(formats))

    def begin_file(self, name, info):
        self.reach.go_on()
        self.folder.begin(os.path.basename(name), info)
        self.meter.begin()
        self.reach.overrun = False  # the page was good enough

    def _on_media(self, told):
        self.reach.go_on()  # before a file cut off by a stop is taken as complete
        if told['status'] == 'finished':
            file = Path(told['filename'])
            if media_extension(file) in MP4_KINDS:  # else ffmpeg would hide what is missing
                tracks(file)
            self.folder.finished(file.name, told.get('info_dict') or {})
        if self.meter.hear(told):
            self.check(time.monotonic())

    def _on_step(self, told):
        self.reach.go_on()
        if told['status'] == 'started' and told['postprocessor'] != 'MoveFiles':
            self.meter.enter('merge')

    # -- the post, item by item

    def take(self, process, info, extra):
        """Process what an extractor found; None for a failed item of a post."""
        try:
            if info.get('_type', 'video') != 'video' and 'entries' not in info:
                return process(info)  # a link that leads on
            self._describe(info)
            pictures = info.pop('pictures', None)
            if pictures and not self._wants_sound():
                info = self._album(info, pictures)
            if 'entries' in info:
                return process(info)
            return self._take(process, info, extra)
        except (Exception, Ending) as error:
            at, outcome = extra.get('playlist_index'), self._failed(error)
            if not at or self.reach.ended or outcome.kind not in ('retry', 'give_up'):
                raise
            self.failures[at] = info.get('kind', 'video'), outcome
            return None

    def _take(self, process, info, extra):
        self.folder.total = max(self.folder.total, extra.get('n_entries') or 1)
        at = extra.get('playlist_index') or 1
        flat = self.folder.post['site'] in SITES  # elsewhere playlists nest
        if any(result['item'] == at for result in self.folder.results
               if flat or 'name' in result):
            return info
        plain = 'addresses' in info
        got = self._fetch_plain(info, extra) if plain else self._fetch_video(process, info)
        self._keep(got, at)
        return got

    def _describe(self, info):
        """Record what is known of the post. Raises Ending if its files are already here."""
        post = self.folder.post = self.folder.post or post_facts(info, self.job.url)
        if post['site'] in SITES:  # without the music, which yt-dlp would write into the file
            info.update(title=post['title'], uploader=post['uploader'], track=None, album=None,
                        artists=None)
        first, self._identified = not self._identified, True
        if not first or not post['id'] or info.get('extractor_key') == 'Generic' \
                or 'entries' in info and post['site'] not in SITES:
            return  # ids that are not unique, channels that grow
        post['media_id'] = post['id']
        with within(None):  # the database
            found = self.on_identity(post['site'], post['media_id'])
        if found:
            ending = Ending('done')
            ending.outcome = found
            raise ending

    def _wants_sound(self):
        wanted = self.options.get('--format') or self.config.downloader.format
        return '--extract-audio' in self.options or bool(
            re.match(r'\(*(?:b|w|best|worst)a', wanted))

    def _album(self, info, pictures):
        formats = info.pop('formats', None) or []
        sounds = [part['url'] for part in formats if part.get('vcodec') == 'none']
        items = [{**info, 'kind': 'picture', 'addresses': urls} for urls in pictures]
        if sounds:
            items.append({**info, 'kind': 'sound', 'addresses': sounds})
        return {**info, '_type': 'playlist', 'entries': items} if items[1:] else items[0]

    def _fetch_plain(self, info, extra):
        """A picture or a sound, from the first of its addresses that has it."""
        kind, failure = info['kind'], Ending('bad_media')
        headers = {**self.session.params['http_headers'], **(info.get('http_headers') or {})}
        for number, url in enumerate(info['addresses']):
            path = self.folder.path / f'{extra.get("playlist_index", 0)}-{number}{PLAIN[kind]}'
            try:
                part = {**extra, 'url': url, 'format_id': kind, 'protocol': urlsplit(url).scheme,
                        'http_headers': headers}
                self.choose(part)
                self.session.dl(str(path), part)
                if is_picture(path) if kind == 'picture' else 'audio' in tracks(path):
                    return {**info, 'requested_downloads': [{'filepath': str(path)}]}
                self.folder.drop(path.name)
                raise Ending('bad_media')
            except (Exception, Ending) as error:
                self.reach.go_on()
                failure = error
        raise failure

    def _fetch_video(self, process, info):
        """The first format that brings the picture and sound it announces, else the best."""
        formats, best = self._formats(info), None
        while not best or formats:
            if formats:
                info['formats'] = [dict(part) for part in formats]
            try:
                got = process(dict(info))
            except Exception as error:
                if best and self._failed(error).reason in ('unsupported', 'ffmpeg'):
                    break
                raise
            lacking = self._lacking(got)
            if not lacking:
                return got
            log.warning('download %s: format %s came without %s', self.job.id,
                        got.get('format_id'), lacking)
            if not best:
                best = {**got, 'note': f'The site sent it without {LACKING[lacking]}.'}
                file = Path(got['requested_downloads'][0]['filepath'])
                spare = file.rename(file.with_name('spare-' + file.name))
            formats = without_formats(formats, got, lacking)
        self.folder.drop(file.name)
        spare.rename(file)
        return best

    def _formats(self, info):
        """The formats that show the post, not just its music. Raises Ending."""
        formats = [part for part in info.get('formats') or () if part.get('format_id') != 'picture']
        if self.folder.post['site'] not in SITES or self._wants_sound():
            return formats
        if formats and not any('video' in announced(part) for part in formats):
            raise Ending('unsupported', 'it is a photo post, and yt-dlp finds only its music')
        return [part for part in formats if part.get('format_id') != 'audio']  # TikTok's music

    def _lacking(self, got):
        """'video' or 'audio' if it was announced and did not come. Raises Ending."""
        files = (got or {}).get('requested_downloads')
        if not files:
            raise Ending('bad_media')
        file = Path(files[0]['filepath'])
        found = tracks(file)
        if not found:
            self.folder.drop(file.name)
            raise Ending('bad_media')
        wanted = {'audio'} if '--extract-audio' in self.options else announced(got)
        return min(wanted - found, default='')

    def _keep(self, info, at, number=None):
        """Record the files of item `at` as results, then its subtitles. Raises Ending."""
        post = self.folder.post
        if post['site'] not in SITES:
            post, number = post_facts(info, self.job.url), ''
        elif number is None:
            number = str(at) if self.folder.total > 1 else ''
        date = post['upload_date']
        names = {'title': post['title'], 'media_id': post['id'] or self.job.id, 'number': number,
                 'pattern': self.config.downloads.filename, 'uploader': post['uploader'],
                 'site': post['site'], 'date': date and f'{date[:4]}-{date[4:6]}-{date[6:]}'}
        if '--restrict-filenames' in self.options:
            names['title'] = plain_ascii(names['title']).replace(' ', '_')
        files = [(got['filepath'], '') for got in info.get('requested_downloads') or ()]
        files += [(text.get('filepath', ''), language) for language, text
                  in (info.get('requested_subtitles') or {}).items()]
        moment = self.config.downloads.mtime and post['timestamp']
        for file, part in files:
            path = Path(file)
            if not path.is_file():  # a subtitle that was embedded
                continue
            if moment and '--no-mtime' not in self.options:
                os.utime(path, (moment, moment))
            extension = path.suffix[1:] if part else media_extension(path)
            if not extension:
                self.folder.drop(path.name)
                raise Ending('bad_media')
            self.folder.results.append({
                'source': path.name, 'item': at, 'part': part, 'ext': extension, 'names': names,
                'size': path.stat().st_size, 'note': info.get('note', '')})

    # -- from the link to the files

    def run(self):
        """Download it. In the worker's thread; never raises."""
        gc.collect()  # what the last attempt left; Python 3.14 would let it pile up
        outcome = self._try()
        cookies = Cookies(self.config)
        if outcome.reason in NEED_COOKIES:
            self.jar = cookies.jar(self.job.url)
        if self.jar:  # only now: an account that fetches little is not flagged
            log.info('download %s: the site asks for a login: retrying with cookies', self.job.id)
            self.failures.clear()
            outcome = self._try()
            cookies.judge(self.job.url, outcome.reason != 'login')
            if outcome.reason == 'login':
                outcome = Ending('session').outcome
        if outcome.reason in ('blocked', 'login'):
            if not self.config.downloader.impersonate:
                outcome = outcome._replace(message=f'{outcome.message} Or set impersonate=on.')
            elif IMPORTED.get('curl') and self.way != 'own':
                outcome = outcome._replace(tries=3)  # the third is impersonated
        endless = self.folder.size()[0] > FEWEST_BYTES and not all(
            part.get('size') or part.get('total') for part in self.folder.parts.values())
        fills_disk = outcome[:2] == ('pause', 'disk') and endless
        if fills_disk or outcome.kind in ('cancelled', 'give_up'):
            forget_files(self.config, self.job.id, (), self.job.files)
        return outcome._replace(kind='retry') if fills_disk else outcome

    def _try(self):
        try:
            return self._run()
        except BaseException as error:
            return self._failed(error)

    def _failed(self, error):
        if isinstance(error, Ending):
            return error.outcome
        if self.reach.ended:
            return Ending(*self.reach.ended).outcome
        if isinstance(error, OSError) and self.meter.phase in ('', 'file'):  # only the disk works
            outcome = Ending(system_reason(error, self.output) or 'output').outcome
        else:
            outcome = judge_error(error, self.output, self.meter.phase == 'page').outcome
            if outcome.reason == 'network' and self.reach.overrun:
                outcome = Ending(*LARGE_PAGE).outcome
        error.__suppress_context__ = True  # yt-dlp's last error is enough for the log
        level = logging.ERROR if outcome.reason == 'internal' else logging.WARNING
        log.log(level, 'download %s: %s', self.job.id, outcome.message, exc_info=error)
        return outcome

    def _run(self):
        self.reach.go_on()
        folder = self.folder
        folder.open()
        self.meter.enter('page')
        wanted = folder.wanted(self.output)
        if wanted is not None:
            watch_process()
            with within(self.reach):
                self._fetch_missing(wanted)
                self._add_slideshow()
            folder.missing = {at: kind for at, (kind, _) in self.failures.items()}
            if not folder.results:
                return self._outcome(()) if self.failures else Ending('bad_media').outcome
            folder.fetched = True
            folder.save()
        self.meter.enter('file')
        for result in folder.results:
            if (folder.path / result['source']).exists():
                self.reach.unless_stopped(sync, folder.path / result['source'])
        files = folder.move(self.output)
        folder.clear({folder.file.name})  # job.json tells a second run that all is done
        forget_files(self.config, '', {old.name for old in self.job.files}
                     - {file.name for file in files})
        return self._outcome(files)

    def _fetch_missing(self, items):
        """Fetch these items, or all for []; a failure does not lose what came before."""
        outcome = Ending('gone').outcome
        try:
            self._download(items)
        except (Exception, Ending) as error:
            outcome = self._failed(error)
            if not self.folder.results or outcome.kind not in ('retry', 'give_up'):
                raise
            items = items or list(range(1, self.folder.total + 1))
        for at in set(items) - self.folder.items():
            kind = self.folder.missing.get(at, 'video')
            self.failures.setdefault(at, (kind, outcome))

    def _add_slideshow(self):
        """Make a video of a TikTok photo post, once all of it is here; optional."""
        results = self.folder.results
        results.sort(key=lambda result: result['item'])
        kinds = [media_type('x.' + result['ext']).partition('/')[0] for result in results]
        if self.failures or kinds[:1] != ['image'] or kinds[-1] != 'audio' \
                or not self.config.downloads.slideshow or not which('ffmpeg'):
            return
        self.meter.enter('merge')
        *pictures, sound = (self.folder.path / result['source'] for result in results)
        video = sound.with_name('slideshow.mp4')
        try:
            make_slideshow(pictures, sound, video)
            self._keep({'requested_downloads': [{'filepath': str(video)}]}, len(results) + 1, '')
        except (Exception, Ending) as error:
            self.reach.go_on()
            log.warning('download %s: no slideshow: %s', self.job.id, error)

    def _outcome(self, files):
        """How it ended: done, or a retry for missing items."""
        outcome, notes = Outcome('done'), [result['note'] for result in self.folder.results]
        if self.failures:
            worst = max((ended for _, ended in self.failures.values()),
                        key=lambda ended: ended.kind == 'retry')
            if not files:
                return worst
            names = [f'{kind} {at}' for at, (kind, _) in sorted(self.failures.items())]
            verb, total = 'is' if len(names) == 1 else 'are', self.folder.total
            notes.insert(0, f'{total - len(names)} of {total}: {" and ".join(names)} {verb} '
                            f'missing. {worst.message}')
            if worst.kind == 'retry':
                outcome = worst._replace(message=notes[0])
        return outcome._replace(title=self.folder.post['title'], files=files, post=self.folder.post,
                                note=' '.join(dict.fromkeys(filter(None, notes))))

    def _download(self, items):
        try:
            Session = import_ytdlp(self.ytdlp, self.config.downloader.impersonate)
        except Exception:
            log.exception('yt-dlp in %s cannot be used', self.ytdlp)
            raise Ending('ytdlp') from None
        params = self._params()
        if items:
            params['playlist_items'] = ','.join(map(str, items))
        try:
            session = self.session = Session(params, auto_init=False)
        except (SyntaxError, ValueError) as error:  # from yt-dlp's option syntax
            log.warning('download %s: yt-dlp rejects its options: %s', self.job.id, error)
            raise Ending('unsupported', 'not in the format asked for') from None
        session.attempt = self
        for site in self._sites():
            session.add_info_extractor(site)
        code = 1
        with closing(session):
            try:
                session.extract_info(self._resolve(session))
                code = session._download_retcode
            finally:
                self.session = None
                self.reach.hang_up()  # an answer that nobody reads may never end
                log.info('download %s: yt-dlp return code %d', self.job.id, code)

    def _sites(self):
        if is_under(host_of(self.job.url), SITES):
            return post_extractors()
        from yt_dlp.extractor import gen_extractor_classes
        anywhere = self.config.security.allowed_domains == ('*',)
        return [site for site in gen_extractor_classes()
                if site._ENABLED and (anywhere or site.IE_NAME != 'generic')]

    def _resolve(self, session):
        """The job's URL, or its target if no extractor knows its form (share/, m., no www)."""
        url = post_url(self.job.url)
        if not is_under(host_of(url), SITES) or is_post(url):
            return url
        response = session.urlopen(url)
        response.close()
        parts = urlsplit(response.url)
        following = dict(parse_qsl(parts.query)).get('next', '')
        if '/login' not in parts.path:
            return response.url
        if not following.startswith('/'):
            raise Ending('login')
        return urljoin(response.url, following)

    def _params(self):
        """Our options over the caller's over the defaults; yt-dlp changes the dict."""
        own, ffmpeg = self.config.downloader, which('ffmpeg')
        options = self.job.options
        if self.config.downloads.metadata and ffmpeg:
            options = (*options, ('--embed-metadata', None))
        params = {**DEFAULTS, 'noplaylist': True, 'format': own.format or BEST[bool(ffmpeg)],
                  'playlistend': 100,  # a carousel has 20 at most; a channel has thousands
                  **caller_params(options)}
        rates = filter(None, (params.get('ratelimit'), own.rate_limit))
        log.info('download %s: asks as %s', self.job.id, self.way)
        if self.way in WAYS and not self.impersonates:  # else the name must be that of its TLS
            from yt_dlp.utils.networking import random_user_agent
            self.agent = self.agent or WAYS[self.way] or random_user_agent()
            params['http_headers'] = {
                **params.get('http_headers', {}), 'User-Agent': self.agent}

        def chat(message):  # errors are logged again when the attempt ends
            log.debug('download %s: %s', self.job.id, excerpt(message, 400))
        pause = dict.fromkeys(('http', 'fragment', 'extractor'), lambda n: min(0.5 * 2 ** n, 5))
        return {**params, **FORCED,
                'paths': {'home': str(self.folder.path)}, 'ffmpeg_location': ffmpeg,
                'ratelimit': min(rates, default=None), 'retry_sleep_functions': pause,
                'proxy': own.proxy or '',  # and none of the environment's
                'cookiefile': self.jar,
                'logger': SimpleNamespace(debug=chat, info=chat, warning=chat, error=chat),
                'match_filter': self.choose, 'progress_hooks': [self._on_media],
                'postprocessor_hooks': [self._on_step]}


# ---------- vendor ------------------------------------------------------------------------
# Owns <ytdlp_directory>: releases of yt-dlp side by side, each whole in <version>/yt_dlp, and a
# pointer per Python, current-3.11: the one in use, the last good one, those known as broken. A
# release is checked, compiled and tried in a process of its own before the pointer names it.
# Lock: flock on .lock for whoever writes, as the daemon's child and `update` are two processes.
# Called by daemon (its thread `care`, through Freshness) and commands.

INDEX = 'https://pypi.org'
NEEDS = '>=3.11'  # yt-dlp since 2026.10.26; before any index tells
OLDEST_SAFE = '2026.07.04'  # older ones have published holes; only Python 3.9 takes no newer one
HELPER_TIMEOUT = 900  # seconds for pip, compiling, trying: a Pi Zero is slow, but not that slow
DOWNLOAD_LIMIT = 64 << 20  # bytes; the wheel has 3 MB, the index's JSON 1.2 MB


Release = namedtuple('Release', 'version requires sha256 url name')  # one wheel of it


class BrokenRelease(Trouble):
    """A release that arrived as published but does not work here."""


def version_key(version):
    """Orders versions; '2026.8.29' equals '2026.08.29'. () if it is not a yt-dlp version."""
    match = re.fullmatch(r'(\d{1,9}(?:\.\d{1,9}){0,9})(?:\.dev\d{1,9})?', version[:99], re.A)
    return tuple(map(int, match[1].split('.'))) if match else ()


def runs_here(requires, python=sys.version_info[:3]):
    """Is this Python within '>=3.9,<4'?"""
    bounds = re.findall(r'(>=|<)\s*(\d{1,9}(?:\.\d{1,9}){0,9})', requires, re.A)
    return all((python >= version_key(version)) == (sign == '>=') for sign, version in bounds)


def fetch_url(url):
    """The body at `url`. Raises Trouble."""
    host = urlsplit(url).hostname
    try:
        status, _, body = http_call('GET', url, {'User-Agent': f'videoserverd/{VERSION}'},
                                    answer_seconds=HELPER_TIMEOUT, limit=DOWNLOAD_LIMIT)
    except OSError as error:
        raise Trouble(f'no answer from {host} ({error})') from None
    if status != 200:
        raise Trouble(f'{host} answers with HTTP {status}')
    return body


def run_helper(*command):
    """Run a process without our secrets and yt-dlp's plugins, in the root folder: a pip.py in the
    current one must not run. Raises Trouble when it hangs or is killed."""
    import subprocess
    env = {name: value for name, value in os.environ.items() if name not in SECRET_NAMES}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, encoding='utf-8',
            errors='replace', env=env, cwd='/', timeout=HELPER_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise Trouble(f'the update of yt-dlp hung for {HELPER_TIMEOUT} seconds') from None
    if done.returncode < 0:
        raise Trouble(f'the update of yt-dlp was killed by signal {-done.returncode}; is there '
                      'enough memory?')
    return done


def machine():
    """The system and the machine that a wheel must be for."""
    name = os.uname().machine
    if sys.maxsize < 1 << 32:  # a Python of 32 bits on a kernel of 64
        name = {'aarch64': 'armv7l', 'x86_64': 'i686'}.get(name, name)
    return 'macosx' if sys.platform == 'darwin' else 'manylinux', name


def wheel_fits(filename):
    """Is the wheel for this Python and machine? By its tags
    (packaging.python.org/specifications/platform-compatibility-tags); an older libc or macOS than
    it needs shows when it is tried out."""
    match = re.fullmatch(r'.*-cp3(\d{1,3})-(\w+)-([\w.]+)\.whl', filename[-200:], re.A)
    ours = sys.version_info[1]
    if not match or match[2] != f'cp3{ours}' and (match[2] != 'abi3' or int(match[1]) > ours):
        return False
    system, name = machine()
    return any(tag.startswith(system) and tag.endswith((f'_{name}', '_universal2'))
               for tag in match[3].split('.'))


YTDLP = re.compile(r'yt_dlp(-[\w.]+\.dist-info)?(/[\w+-][\w.+-]*)+', re.A)
CURL = re.compile(r'(curl_cffi|_cffi_backend)[\w.+-]*(/[\w+-][\w.+-]*)*', re.A)  # of two wheels


def unpack(wheel, folder, wanted):
    """Put the files that match into `folder`, nothing else. Raises BrokenRelease."""
    import zipfile
    import zlib
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                if wanted.fullmatch(entry.filename):
                    archive.extract(entry, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise BrokenRelease(f'{wheel.name} cannot be unpacked ({error})') from None


def version_in(folder):
    """The version of the yt-dlp in `folder`; '' if there is none."""
    return find_line(folder / 'yt_dlp/version.py', r"^__version__ = '(\d[\d.]*)'")


# Uses a release as the daemon does, without a network: it must find the sites' extractors and use
# the proxy that it is given (nobody listens there). A site on 127.0.0.1, here counted as the
# Internet, then sets a trap for each guard; forbidden addresses are on 127.0.0.2. With curl_cffi,
# whose connections no hook sees, all that come to the site must have passed the door.
TRY_OUT = '''
import gzip, http.server
folder, output, curl = pathlib.Path(sys.argv[3]), sys.argv[4], sys.argv[5]
public, tunnel = v.is_public, v.tunnel
reached, heard, came, passed = set(), set(), set(), set()
v.own_networks, v.is_public = list, lambda ip: ip == '127.0.0.1' or public(ip)
v.LARGEST_PAGE = 100_000
v.DEFAULTS.update(retries=1, fragment_retries=1)
v.watch_process()
sys.addaudithook(lambda event, args: event == 'socket.connect' and reached.add(args[1][0]))
ours = {'nap': v.Stopper, 'openssl_decrypt': v, 'write_index': v}
if v.which('openssl'):
    ours['adopt'] = v.Stopper
for name, owner in ours.items():
    v.replace(owner, name, lambda real, name=name: lambda *args: (heard.add(name), real(*args))[1])

def pass_on(*args):
    sock = tunnel(*args)
    passed.add(sock.getsockname()[1])
    return sock

v.tunnel = pass_on

class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        came.add(self.client_address[1])
        name, here = self.path[1:].partition('.')[0], f'http://{self.headers["Host"]}'
        self.send_response({'http': 302, 'ftp': 302, 'busy': 503}.get(name, 200))
        self.send_header('Location', f'{name}://127.0.0.2/x.mp4')
        self.send_header('Content-Encoding', 'gzip' if name == 'packed' else 'identity')
        self.end_headers()
        away = 'http://127.0.0.2' if name in ('segment', 'key') else here
        key = f'#EXT-X-KEY:METHOD=AES-128,URI="{away}/secret.key"' if name != 'segment' else ''
        text = (f'#EXTM3U\\n#EXT-X-TARGETDURATION:1\\n{key}\\n#EXTINF:1,\\n{away}/part.ts\\n'
                f'#EXTINF:1,\\n{here}/busy.ts\\n#EXT-X-ENDLIST\\n').encode()
        page = b'<html>' * 20_000
        body = {'page': page, 'packed': gzip.compress(page), 'secret': b'k' * 16, 'part': b'e' * 64}
        if self.command == 'GET':
            self.wfile.write(body.get(name, text))
    do_HEAD = do_GET
    log_message = lambda *args: None

def ends(url, reason, proxy=''):
    config = v.load_config(None, {
        'VIDEOSERVER_DOWNLOADS_OUTPUT_DIRECTORY': str(output),
        'VIDEOSERVER_DOWNLOADS_MIN_FREE_SPACE': '0', 'VIDEOSERVER_DOWNLOADER_PROXY': proxy,
        'VIDEOSERVER_SECURITY_ALLOWED_DOMAINS': '*',
        'VIDEOSERVER_DOWNLOADER_IMPERSONATE': 'on' if curl else 'off'})
    job = v.Job('try', url, (), 3 if curl else 1)  # the third is impersonated
    attempt = v.Attempt(job, config, folder, lambda progress: None)
    outcome = attempt.run()
    if outcome.reason in ('disk', 'output', 'read_only'):
        sys.exit(v.os.EX_IOERR)
    if reason not in f'{outcome.reason} {outcome.message}':
        sys.exit(f'{url} ends with {outcome.reason}: {outcome.message}')
    return attempt

if curl:
    v.import_curl(pathlib.Path(curl))
for site in 'tiktok.com/@a/video/1', 'instagram.com/p/a/':
    ends(f'https://www.{site}', 'network', 'http://127.0.0.1:1')
server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Site)
v.spawn(server.serve_forever)
for path, reason in (('http.mp4', 'refused_address'), ('segment.m3u8', 'refused_address'),
                     ('key.m3u8', 'refused_address'), ('ftp.mp4', 'unsupported'),
                     ('aes.m3u8', 'http'), ('page', 'a page has'), ('packed', 'a page has')):
    came.clear()
    attempt = ends(f'http://127.0.0.1:{server.server_port}/{path}', reason)
from yt_dlp.utils import Popen
from yt_dlp.version import __version__
with v.within(attempt.reach), v.suppress(FileNotFoundError):
    Popen(['sh', '-c', 'true'])
    sys.exit('it runs any program')
if curl and not came <= passed:
    sys.exit('curl_cffi passes the door by, or is not used')
if reached != {'127.0.0.1'} or heard != set(ours):
    sys.exit(f'a guard does not hold: {reached} {set(ours) - heard}')
print(__version__)
'''


ALONE = ('-I', '-S', '-X', 'no_debug_ranges', '-X', 'utf8')  # no packages, no columns: 4 MB less


def bare_python(script, *words):
    """The command line of `script` in a bare Python with this program as `v`; its words start at
    argv[3]. Python's own modules come before files beside the program, and a `requests` that lies
    there or in site-packages, out of the guards' reach, is not found."""
    begin = ('import pathlib, sys\nsys.path.append(sys.argv[1])\nv = __import__(sys.argv[2])\n'
             'sys.path.pop()\n')
    place = str(PROGRAM.parent), PROGRAM.stem
    return (sys.executable, *ALONE, '-c', begin + script, *place, *words)


def try_out(folder, version, curl=''):
    """Compile and try a yt-dlp, maybe with curl_cffi: why it does not work, '' if it does."""
    import tempfile
    run_helper(sys.executable, '-m', 'compileall', '-q', str(curl or folder / 'yt_dlp'))
    with tempfile.TemporaryDirectory() as output:
        done = run_helper(*bare_python(TRY_OUT, str(folder), output, str(curl)))
    if done.returncode == os.EX_IOERR:
        raise Trouble(f'yt-dlp cannot be tried: make room in {tempfile.gettempdir()}')
    said = done.stdout.strip()
    if done.returncode == 0 and version_key(said) == version_key(version):
        return ''
    return (done.stderr.strip() or f'it says that it is {said}').splitlines()[-1]


class Vendor:
    """The yt-dlp beside the program."""

    def __init__(self, folder, index=INDEX, impersonate=False):
        self.folder, self.index, self.impersonate = folder, index, impersonate
        self.pointer = folder / f'current-{PYTHON}'

    def state(self):
        """What a pointer says: version, previous, bad, newest; the sites that worked with version
        (sites) and previous (before); when the index was asked (checked; searched: for a
        pre-release)."""
        return read_note(self.pointer)

    @contextmanager
    def locked(self):
        """Wait until no other process writes here. Raises Trouble if this one cannot."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.folder / '.lock', os.O_WRONLY | os.O_CREAT, 0o600)
            with open(fd, 'w') as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise Trouble(f'yt-dlp cannot be stored in {self.folder} ({error.strerror or error}): '
                          'free some space, or let this user write there') from None

    def remember(self, **changes):
        """Write the pointer with these changes."""
        write_whole(self.pointer, json.dumps({**self.state(), **changes}))

    def mark_bad(self, release, **changes):
        """Mark a release as broken, until there is a newer one."""
        self.remember(bad=[*self.state().get('bad', ()), release][-5:], **changes)

    def fits(self, name, version, requires):
        """May this Python use it? Not if it is unsafe or known as broken."""
        safe = PYTHON == '3.9' or version_key(version) >= version_key(OLDEST_SAFE)
        return safe and runs_here(requires) and name not in self.state().get('bad', ())

    def usable(self, folder):
        version = version_in(folder)
        about = next(folder.glob('yt_dlp-*.dist-info/METADATA'), folder)
        requires = find_line(about, r'^Requires-Python: (.+)$')
        return bool(version) and self.fits(folder.name, version, requires)

    def unpacked(self):
        """The folders of releases, newest first."""
        found = [path for path in self.folder.glob('[0-9]*.*') if version_key(path.name)]
        return sorted(found, key=lambda path: version_key(path.name), reverse=True)

    def current(self):
        """The folder for sys.path: the release in use, else the last good one, one by `pip install
        --target`, or any that this Python can use."""
        state = self.state()
        named = [self.folder / state[key] for key in ('version', 'previous') if state.get(key)]
        found = [*named, self.folder, *self.unpacked()]
        return next((path for path in found if self.usable(path)), None)

    def version(self):
        current = self.current()
        return current and version_in(current)

    def curl(self):
        """The folder of curl_cffi beside `current`; None if there is none."""
        folder = (self.current() or Path(os.devnull)) / CURL_FOLDER
        return folder if folder.is_dir() else None

    def lacks_curl(self):
        """Should curl_cffi be fetched? Not again for a release that has none for this machine."""
        release, _ = self.state().get('no_curl') or ('', '')
        return self.impersonate and not self.curl() and self.version() not in (None, release)

    def last_checked(self, channel='stable'):
        """When the index last answered, in epoch seconds; 0: never."""
        return float(self.state().get('searched' if channel == 'auto' else 'checked', 0))

    def held_back(self):
        """A sentence if newer releases do not run on this Python."""
        newest, requires = self.state().get('newest') or ('now', NEEDS)
        _, why = self.state().get('no_curl') or ('', None)
        if runs_here(requires):
            return why if self.impersonate and not self.curl() else None
        return (f'yt-dlp {newest} needs Python {requires}, and this is Python {PYTHON}: downloads '
                'will break as the sites change. Fix: start the server with a newer Python')

    def files(self, name):
        """(file name, its release) for all that the index has of a package. Raises Trouble."""
        base = f'{self.index}/pypi/{name}/json'
        try:
            return [(file['filename'], Release(version, file['requires_python'] or '',
                                               file['digests']['sha256'],
                                               urljoin(base, file['url']), name))
                    for version, files in json.loads(fetch_url(base))['releases'].items()
                    for file in files if version_key(version) and not file['yanked']]
        except (Trouble, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Trouble(f'{name} cannot be fetched: {error}; connect this machine to the '
                          'internet, then run: python3 videoserverd.py update') from None

    def catalogue(self):
        """The releases with a pure wheel on the index, newest first. Raises Trouble."""
        found = [release for file, release in self.files('yt-dlp')
                 if file.endswith('-py3-none-any.whl')]
        return sorted(found, key=lambda release: version_key(release.version), reverse=True)

    def fetch(self, release, folder):
        """The wheel of `release`, by pip where there is one. Raises Trouble."""
        import hashlib
        pinned, wheel = folder / 'requirements.txt', folder / f'{release.name}.whl'
        pinned.write_text(f'{release.name}=={release.version} --hash=sha256:{release.sha256}\n')
        pip = run_helper(
            sys.executable, *'-m pip download --quiet --no-input --retries 1 --no-deps '
            '--disable-pip-version-check --only-binary :all: --dest'.split(), str(folder),
            '--requirement', str(pinned),
            *['--index-url', f'{self.index}/simple'] * (self.index != INDEX))
        if pip.returncode == 0:
            os.replace(next(folder.glob('*-*-*-*.whl')), wheel)
        else:
            wheel.write_bytes(fetch_url(release.url))
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != release.sha256:
            raise Trouble(f'{release.name} {release.version} does not have the SHA-256 that the '
                          'index names and was discarded: try later, or check the proxy or mirror')
        return wheel

    def fill(self, place, releases, wanted, test):
        """Put what is wanted of the wheels into `place`, once it is tried. Raises BrokenRelease,
        Trouble, OSError."""
        fresh = self.folder / '.new'
        tree, first = fresh / 'tree', releases[0]
        remove_folder(fresh)
        fresh.mkdir()
        for release in releases:
            unpack(self.fetch(release, fresh), tree, wanted)
        why = test(tree)
        if why:
            raise BrokenRelease(f'{first.name} {first.version} does not work here ({why})')
        os.sync()  # once for a thousand files: an fsync for each takes a minute on an SD card
        if place.exists():
            os.replace(place, fresh / 'damaged')
        os.replace(tree, place)

    def take_curl(self):
        """Put the curl_cffi that yt-dlp names beside it. Raises BrokenRelease if none works here,
        Trouble, OSError."""
        current, pins, wheels = self.current(), {}, []
        for about in current.glob('yt_dlp-*.dist-info/METADATA'):
            pins.update(re.findall(r'^Requires-Dist: (curl-cffi|cffi)==([\w.]+);.*pin-curl',
                                   about.read_text(encoding='utf-8'), re.M))
        for name in ('curl-cffi', 'cffi'):
            pin = pins.get(name, 'wheel')
            found = [release for file, release in self.files(name)
                     if release.version == pin and wheel_fits(file)]
            if not found:
                raise BrokenRelease(
                    f'there is no {name} {pin} for Python {PYTHON} on this machine')
            wheels += found[:1]
        self.fill(current / CURL_FOLDER, wheels, CURL,
                  lambda tree: try_out(current, self.version(), tree))

    def take(self, release):
        """Make `release` the current one, fetched and tried if need be. Raises Trouble, OSError."""
        version, place = release.version, self.folder / release.version
        current, state = self.current(), self.state()
        if not self.usable(place) or try_out(place, version):
            self.fill(place, [release], YTDLP, lambda tree: try_out(tree, version))
        if state.get('version') != version:
            good = current not in (None, place) and os.path.relpath(current, self.folder)
            self.remember(version=version, previous=good or None,
                          before=state.get('sites', []), sites=[], searched=0)

    def clean(self):
        """Remove what an interrupted installation left, and releases that no pointer names."""
        states = [read_note(file) for file in self.folder.glob('current-*')]
        named = {state.get(key) for state in states for key in ('version', 'previous')}
        for path in [self.folder / '.new', *self.unpacked()]:
            if path.name not in named and path != self.current():
                remove_folder(path)

    def candidates(self, channel):
        """The usable releases, best first. A newer release clears the marks of broken ones."""
        releases = [release for release in self.catalogue()
                    if channel != 'stable' or 'dev' not in release.version]
        least = version_key(self.version() or '')
        if releases:
            newest = version_key(releases[0].version)
            self.remember(newest=releases[0][:2], bad=[
                name for name in self.state().get('bad', ()) if version_key(name) >= newest])
        fitting = [release for release in releases if version_key(release.version) >= least
                   and self.fits(release.version, release.version, release.requires)]
        final = [release for release in fitting if 'dev' not in release.version]
        if channel == 'auto' and final and version_key(final[0].version) > least:
            return final
        return fitting

    def install(self, channel='stable'):
        """Take the newest release that works here and return its version; auto: a pre-release if
        there is no newer final one. Raises Trouble, and changes nothing then."""
        with self.locked():
            now = int(time.time())
            if channel == 'auto':
                self.remember(searched=now)
            for release in self.candidates(channel)[:3]:  # after three, the fault must be here
                try:
                    self.take(release)
                    break
                except BrokenRelease as error:
                    log.warning('%s; it is not used', error)
                    self.mark_bad(release.version)
            try:
                if self.lacks_curl():
                    self.take_curl()
            except BrokenRelease as error:
                why = f'impersonate=on has no effect: {error}'
                self.remember(no_curl=[self.version(), why])
            finally:
                self.clean()
                self.remember(checked=now)
        version = self.version()
        if not version:
            raise Trouble(f'{self.index} has no yt-dlp that works with Python {PYTHON}: install a '
                          'newer Python')
        return version

    def roll_back(self, version):
        """From `version`, if it is still in use, back to the last good release; returns which."""
        with self.locked():
            state = self.state()
            previous = state.get('previous') or ''
            if state.get('version') != version or not self.usable(self.folder / previous):
                return None
            self.mark_bad(version, version=previous, previous=None, sites=state.get('before', []))
        return self.version()


def own_vendor(config):
    own = config.downloader
    return Vendor(own.ytdlp_directory, impersonate=own.impersonate)


# -- the daemon's side

HOUR, DAY = 3600, 86400  # seconds
RETRY_GAPS = (60, 300, 900, 3600)  # seconds after a failed check; the last repeats
INSTALL = '''
v.signal.alarm(int(sys.argv[5]))  # whatever it waits for, an index that drips or a lock
try:
    v.Vendor(pathlib.Path(sys.argv[3]), sys.argv[4], sys.argv[7] == 'True').install(sys.argv[6])
except v.Trouble as error:
    sys.exit(str(error))
'''


def update_due(now, last_checked, site_changed, failures=0, last_tried=0):
    """Is it time to check for a newer yt-dlp? Hourly when a site has changed, else weekly; later
    after failures; also when the clock was set back by over a day."""
    if failures and 0 <= now - last_tried < backoff(failures, RETRY_GAPS):
        return False
    age = now - last_checked
    return age >= (HOUR if site_changed else 7 * DAY) or age < -DAY


class Freshness:
    """Keeps the daemon's yt-dlp up to date, and drops a release that proves broken. Any thread may
    call `heard` and `stop`, only `care` calls `step`."""

    def __init__(self, vendor, downloader):
        self.vendor, self.settings = vendor, downloader
        self.site_changed = self.unusable = self.stopped = False
        self.worked = set()  # sites
        self.failed = set()  # sites, in a way that may be yt-dlp's
        self.failures, self.last_tried = 0, 0.0
        self.wanted = False  # somebody has asked for it
        self.trouble = ''  # why the last check failed, a sentence
        self.child = None

    def heard(self, site, outcome):
        """Note what the end of a download says about yt-dlp."""
        if outcome.kind == 'done':
            self.worked.add(site)
        elif outcome.reason in ('site_changed', 'bad_media', 'crash'):
            self.failed.add(site)
        self.unusable |= outcome.reason == 'ytdlp'
        self.site_changed |= outcome.reason == 'site_changed'

    def step(self, now):
        """Do what is due at `now`, epoch seconds. True: the daemon has imported another yt-dlp than
        the current one, and should re-execute itself when idle. Raises Trouble."""
        loaded, current, checked = IMPORTED.get('folder'), self.vendor.current(), 0.0
        if loaded in (None, current):
            self.judge()
        channel = self.settings.channel
        if channel == 'auto' and not self.site_changed:
            channel = 'stable'
        lacking = not current or self.vendor.lacks_curl()
        if not lacking and not self.unusable:
            checked = self.vendor.last_checked(channel)
        if self.wanted or (self.settings.auto_update or lacking) and update_due(
                now, checked, self.site_changed, self.failures, self.last_tried):
            self.wanted = False
            self.look(now, channel)
        current = self.vendor.current()
        new_curl = self.vendor.impersonate and self.vendor.curl() and 'curl' not in IMPORTED
        return None not in (loaded, current) and (loaded != current or bool(new_curl))

    def judge(self):
        """A release is trusted once a download worked. Until then it is rolled back if two sites
        fail that worked with the previous one: a single site proves nothing. Where they fail with
        that one too, the release may come again: whichever works first stays."""
        state, worked, failed = self.vendor.state(), self.worked, self.failed
        version, sites = state.get('version'), set(state.get('sites', ()))
        if version and not worked <= sites and len(sites) < 50:
            with self.vendor.locked():
                self.vendor.remember(sites=sorted(sites | worked))
        elif state.get('bad') and not worked and len(failed & sites) > 1:
            with self.vendor.locked():
                self.vendor.remember(bad=[])
        elif not sites and len(failed & set(state.get('before', ()))) > 1 \
                and self.vendor.roll_back(version):
            log.error('yt-dlp %s fails where %s worked: rolled back', version,
                      self.vendor.version())
            self.failed.clear()

    def look(self, now, channel):
        """Install the newest release, in a process of its own: it can be stopped, and its memory
        goes."""
        import subprocess
        self.failures, self.last_tried = self.failures + 1, now
        line = bare_python(INSTALL, str(self.vendor.folder), self.vendor.index,
                           str(4 * HELPER_TIMEOUT), channel, str(self.vendor.impersonate))
        with subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, encoding='utf-8', errors='replace',
                              start_new_session=True) as self.child:
            if self.stopped:
                self.stop()
            lines = self.child.communicate()[1].strip().splitlines()
        for line in lines:
            log.warning('%s', line)
        if self.child.returncode:
            self.trouble = (lines or ['the update of yt-dlp was stopped']).pop()
        else:
            log.info('the newest yt-dlp for this Python is %s', self.vendor.version())
            self.trouble, self.failures = '', 0
            self.site_changed = self.unusable = False

    def stop(self):
        """End a running installation with all its processes; start no more."""
        self.stopped = True
        if self.child and self.child.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)


# ---------- publish -----------------------------------------------------------------------
# Owns access to finished files: links and their signatures, the bucket (AWS Signature 4, parts),
# the threads that empty the store's outbox (`upload`, `notify`), thumbnails. No lock. Called by
# http (links) and daemon.

MARKER = '.videoserverd'  # in the output folder: the empty folder of an unplugged disk lacks it
BLOCK = 256 << 10  # bytes read and sent at a time: large enough that TLS is the limit
MULTIPART_ABOVE = 100 << 20  # where AWS advises parts
PART_SIZE = 16 << 20  # what a lost connection costs at most; S3 takes 10,000
JOIN_SECONDS = 300.0  # for an answer: joining many parts takes a server long
COURIER_NAP = 60.0  # seconds between looks when nothing is due, and after a failure
THUMBNAIL_SECONDS = 20.0  # a Pi needs two for a frame of a 4K video
THUMBNAIL_FILTER = ("crop='min(iw,ih*3/4)':'min(ih,iw*4/3)',"
                    "scale='min(120,iw)':-2")  # twice what the page shows


# -- names and links

HOST_NAME = re.compile(r'(?=.{1,253}$)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.(?!$)|$))+')


def machine_names():
    """`<host>.local`, the host name, the name with its domain if it has one, and localhost."""
    full = re.sub(r'[^a-z0-9_.-]+', '-', socket.gethostname().lower()).strip('-.') or 'localhost'
    host = full.partition('.')[0][:63].strip('-')
    names = dict.fromkeys((f'{host}.local', host, full, 'localhost'))
    return tuple(filter(HOST_NAME.fullmatch, names))


def public_base(config, port):
    """How others reach this server: scheme, host, port, perhaps a path; no final slash."""
    scheme = 'https' if config.server.tls else 'http'
    return config.server.public_base_url or f'{scheme}://{machine_names()[0]}:{port}'


def file_path(download_id, name):
    """The path of a finished file below the base: without its folders, so that no link has any."""
    return f'/files/{download_id}/{quote(os.path.basename(name), safe="")}'


def thumbnail_path(download_id):
    return f'/api/v1/thumbnail/{download_id}'


def link_secret(file):
    """The key that signs links; created if missing (or emptied by a power cut). Raises OSError."""
    if not file.exists() or not file.stat().st_size:
        write_whole(file, os.urandom(32).hex())
    return file.read_bytes()


def sign_path(secret, path, expires):
    """The query that opens `path` until `expires`, epoch seconds. The decoded path is signed, as
    players percent-encode it in their own way."""
    import hmac
    signed = f'{expires}\n{unquote(path)}'.encode('utf-8', 'replace')
    return f'?expires={expires}&signature={hmac.new(secret, signed, "sha256").hexdigest()}'


def check_signature(secret, path, query, now):
    """Whether `query` opens `path` at `now`: not forged, not of another path, not expired."""
    import hmac
    expires = query.get('expires', '')
    if not re.fullmatch(r'\d{1,12}', expires, re.A) or int(expires) < now:
        return False
    sent = f'?expires={expires}&signature={query.get("signature", "")}'.encode('utf-8', 'replace')
    return hmac.compare_digest(sign_path(secret, path, expires).encode(), sent)


def content_disposition(name):
    """The header by RFC 6266: the real name by RFC 8187, and ASCII for old clients."""
    ascii_name = re.sub(r'[^ !#-$&-\[\]-~]', '_', name)  # clients differ on quotes, \ and %
    value = f'inline; filename="{ascii_name}"'
    if ascii_name != name:
        value += f"; filename*=UTF-8''{quote(name, safe='', errors='replace')}"
    return value


# -- AWS Signature 4 (docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-authenticating-requests.html)

class Keys(namedtuple('Keys', 'access secret region service', defaults=('s3',))):
    def scope(self, stamp):
        return f'{stamp[:8]}/{self.region}/{self.service}/aws4_request'


def amz_date(now):
    return time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now))


def canonical_query(query):
    """`query` encoded and sorted, as it is signed and sent."""
    return urlencode(sorted(query), quote_via=quote)


def signature_v4(keys, stamp, method, path, query, headers, payload):
    """`path` is encoded as it is sent, `headers` are in lower case and sorted, `payload` is the
    body's SHA-256 in hex or UNSIGNED-PAYLOAD."""
    import hashlib
    import hmac
    lines = [f'{name}:{value}' for name, value in headers]
    request = '\n'.join([method, path, canonical_query(query), *lines, '', ';'.join(dict(headers)),
                         payload])
    hashed = hashlib.sha256(request.encode()).hexdigest()
    to_sign = '\n'.join(['AWS4-HMAC-SHA256', stamp, keys.scope(stamp), hashed])
    digest = f'AWS4{keys.secret}'.encode()
    for step in (*keys.scope(stamp).split('/'), to_sign):
        digest = hmac.new(digest, step.encode(), 'sha256').digest()
    return digest.hex()


def sign_v4(keys, now, method, host, path, query, headers, payload):
    """`headers` plus those that authenticate the request."""
    stamp = amz_date(now)
    headers = {**headers, 'Host': host, 'X-Amz-Date': stamp}
    signed = sorted((name.lower(), ' '.join(value.split())) for name, value in headers.items())
    signature = signature_v4(keys, stamp, method, path, query, signed, payload)
    headers['Authorization'] = (
        f'AWS4-HMAC-SHA256 Credential={keys.access}/{keys.scope(stamp)}, '
        f'SignedHeaders={";".join(dict(signed))}, Signature={signature}')
    return headers


def presign_v4(keys, now, base, path, query, seconds):
    """A URL by which anybody may GET `base` + `path` for so many seconds (a week at most)."""
    stamp = amz_date(now)
    query = [*query, ('X-Amz-Algorithm', 'AWS4-HMAC-SHA256'), ('X-Amz-Date', stamp),
             ('X-Amz-Expires', str(seconds)), ('X-Amz-SignedHeaders', 'host'),
             ('X-Amz-Credential', f'{keys.access}/{keys.scope(stamp)}')]
    headers = [('host', base.partition('://')[2])]
    signature = signature_v4(keys, stamp, 'GET', path, query, headers, 'UNSIGNED-PAYLOAD')
    return f'{base}{path}?{canonical_query(query)}&X-Amz-Signature={signature}'


def bucket_address(endpoint, bucket, key):
    """('https://host', '/path') of an object: path-style, or virtual-host style where the
    endpoint says {bucket}."""
    url = urlsplit(endpoint.replace('{bucket}', bucket))
    port = {'http': ':80$', 'https': ':443$'}[url.scheme]  # left out, as browsers do
    folder = url.path if '{bucket}' in endpoint else f'{url.path}/{quote(bucket)}'
    return f'{url.scheme}://{re.sub(port, "", url.netloc.lower())}', f'{folder}/{quote(key)}'


# -- the bucket

REFUSALS = {  # S3's error codes that the owner can do something about
    'InvalidAccessKeyId': 'does not know the access key: check AWS_ACCESS_KEY_ID',
    'SignatureDoesNotMatch': 'refuses the secret key: check AWS_SECRET_ACCESS_KEY',
    'AccessDenied': 'denies access to this key: allow it to get, put and delete objects',
    'NoSuchBucket': 'has no such bucket: create it, or check [s3] bucket',
}
NOT_LISTED = ('AccessDenied', 'NotImplemented', 'MethodNotAllowed')  # a key may put, but not list


class Body(namedtuple('Body', 'file start size')):
    """A range of an open file. Reading it raises OSError."""

    def blocks(self):
        self.file.seek(self.start)
        left = self.size
        while left:
            block = self.file.read(min(left, BLOCK))
            if not block:
                raise OSError('the file got shorter')
            left -= len(block)
            yield block

    def digest(self, kind):
        import hashlib
        digest = hashlib.new(kind, usedforsecurity=False)
        for block in self.blocks():
            digest.update(block)
        return digest.hexdigest()


NOTHING = Body(io.BytesIO(), 0, 0)


def xml_texts(answer, tag):
    """The texts of all <tag> in S3's XML."""
    found = re.findall(f'<{tag}>([^<]*)</{tag}>', answer.decode('utf-8', 'replace'))
    return [html.unescape(text) for text in found]


class Bucket:
    """The bucket of [s3]; what asks it may raise Trouble."""

    def __init__(self, config):
        self.s3 = config.s3
        self.keys = Keys(config.aws_access_key_id, config.aws_secret_access_key, config.s3.region)

    def key(self, download_id, name):
        """The object's name, with the id, so that downloads of the same name never collide."""
        return f'{self.s3.prefix}{download_id}/{name}'

    def presign(self, key, name, seconds, now):
        """A link to an object, saved as `name`; at the public endpoint where there is one."""
        endpoint = self.s3.public_endpoint or self.s3.endpoint
        base, path = bucket_address(endpoint, self.s3.bucket, key)
        query = [('response-content-disposition', content_disposition(name))]
        return presign_v4(self.keys, now, base, path, query, seconds)

    def put(self, path, key, kind):
        """Store the file as `key`. A large one goes in parts; those that an earlier try has sent
        are not sent again."""
        try:
            with open(path, 'rb') as file:
                body = Body(file, 0, os.fstat(file.fileno()).st_size)
                if body.size > MULTIPART_ABOVE:
                    self._put_parts(body, key, kind)
                else:
                    self._call('PUT', key, (), body, kind)
        except OSError as error:
            raise Trouble(f'{path}: {error.strerror or error}') from None

    def delete(self, key):
        """Remove an object and its unfinished uploads."""
        self.abort(key)
        self._call('DELETE', key, fine=('NoSuchKey',))

    def abort(self, key):
        """Remove an object's unfinished uploads: their parts cost money."""
        for upload in self._unfinished(key):
            self._call('DELETE', key, [('uploadId', upload)], fine=('NoSuchUpload',))

    def _unfinished(self, key):
        query = [('uploads', ''), ('prefix', key)]
        _, answer = self._call('GET', '', query, fine=NOT_LISTED)
        pairs = zip(xml_texts(answer, 'Key'), xml_texts(answer, 'UploadId'))
        return [upload for found, upload in pairs if found == key]

    def _put_parts(self, everything, key, kind):
        """Existing parts are trusted by their MD5 only: they may be of an older file."""
        stored, listed = {}, ''
        upload = next(iter(self._unfinished(key)), '')
        if upload:
            _, answer = self._call('GET', key, [('uploadId', upload)])
            stored = dict(zip(xml_texts(answer, 'PartNumber'), xml_texts(answer, 'ETag')))
        else:
            _, answer = self._call('POST', key, [('uploads', '')], kind=kind)
            upload = ''.join(xml_texts(answer, 'UploadId'))
        for number, start in enumerate(range(0, everything.size, PART_SIZE), 1):
            part = everything._replace(start=start, size=min(PART_SIZE, everything.size - start))
            etag = stored.get(str(number), '')
            if not etag or etag.strip('"') != part.digest('md5'):
                query = [('partNumber', str(number)), ('uploadId', upload)]
                found, _ = self._call('PUT', key, query, part)
                etag = found['ETag']
            listed += f'<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>'
        manifest = f'<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>'.encode()
        self._call('POST', key, [('uploadId', upload)],
                   Body(io.BytesIO(manifest), 0, len(manifest)))

    def _call(self, method, key, query=(), body=NOTHING, kind='', fine=()):
        """(headers, body) of S3's answer to one signed request; nothing where its error code is
        `fine`."""
        base, path = bucket_address(self.s3.endpoint, self.s3.bucket, key)
        host = base.partition('://')[2]
        payload = 'UNSIGNED-PAYLOAD' if base.startswith('https:') else body.digest('sha256')
        headers = {'X-Amz-Content-Sha256': payload}
        if kind:
            headers['Content-Type'] = kind
        signed = sign_v4(self.keys, time.time(), method, host, path, query, headers, payload)
        signed['Content-Length'] = str(body.size)  # not signed: some proxies drop a zero
        url = f'{base}{path}?{canonical_query(query)}'
        try:
            status, found, answer = http_call(method, url, signed, body.blocks(),
                                              answer_seconds=JOIN_SECONDS)
        except OSError as error:
            text = excerpt(' '.join(str(error).split()), 200)
            if isinstance(error, ssl.SSLCertVerificationError):
                text += ': set SSL_CERT_FILE to its CA'
            raise Trouble(f'The connection to the S3 server {host} failed: {text}') from None
        if status < 300 and b'<Error' not in answer:  # joining parts may fail after its 200
            return found, answer
        code, text = (excerpt(''.join(xml_texts(answer, tag)), 200) for tag in ('Code', 'Message'))
        if code in fine:
            return {}, b''
        meaning = REFUSALS.get(code) or f'answers: {text or http.client.responses.get(status)}'
        raise Trouble(f'The S3 server {host} (bucket {self.s3.bucket}) {meaning} '
                      f'({f"{status} {code}".strip()})')


# -- the outbox

class Courier:
    """A thread that sends the outbox's items of some `kinds`, one at a time. `send(item, now)`
    returns what Store.settle records, or raises Trouble; `fails` begins the sentence about its
    error in health."""

    def __init__(self, store, delays):
        self.error = None  # why it fails at present, a sentence
        self.store, self.delays = store, delays
        self._stopping, self._woken = False, threading.Event()
        self._pause_until = 0.0
        self.thread = threading.Thread(target=self._run, name=self.kinds[0], daemon=True)

    def wake(self):
        """There may be something to do."""
        self._woken.set()

    def stop(self):
        """End; what takes longer than a moment ends with the process, and is done again."""
        self._stopping = True
        self.wake()
        self.thread.join(0.8)

    def _run(self):
        while not self._stopping:
            nap = COURIER_NAP
            try:
                nap = self.step(time.time())
            except Exception as error:
                log.warning('%s: waits after this: %s', self.thread.name, error,
                            exc_info=not isinstance(error, StoreDown))
            self._woken.wait(nap)
            self._woken.clear()

    def step(self, now):
        """Send one item due at `now`; seconds until there may be another. After a failure comes a
        pause, so that a server that is down is not asked for each of many items."""
        if 0 < self._pause_until - now <= COURIER_NAP:  # more: the clock was set back
            return self._pause_until - now
        item = self.store.next_outgoing(self.kinds)
        if not item:
            return COURIER_NAP
        if item['due'] > now:
            return min(item['due'] - now, COURIER_NAP)
        try:
            noted = self.send(item, int(now))
        except StoreDown:
            raise
        except Exception as error:  # whatever it is, it must not hold up the others
            if not isinstance(error, Trouble):
                log.exception('%s: failed unexpectedly', self.thread.name)
            return self._postpone(item, str(error), int(now))
        self.store.settle(item, int(now), None, *noted)
        self.error = None
        return 0

    def _postpone(self, item, error, now):
        """Seconds to pause; 0 if it is no longer wanted. After the last delay each is twice as
        long."""
        tries = item['attempts'] + 1
        delay = max(1, int(backoff(tries, self.delays))) << max(0, tries - len(self.delays))
        delay = min(delay, LONGEST_DELAY)
        if not self.store.settle(item, now, now + delay, 'failing', error):
            self.error = None
            return 0
        log.warning('%s %s: next try in %d s: %s', item['kind'], item['download_id'], delay, error)
        pause, self.error = min(delay, COURIER_NAP), error
        self._pause_until = now + pause
        return pause


class Uploader(Courier):
    """Puts finished files into the bucket until each is stored, lost or forgotten."""
    kinds = ('upload', 'delete')
    fails = 'Copies to the bucket fail'

    def __init__(self, config, bucket, store):
        super().__init__(store, config.downloads.retry_delays)
        self.bucket, self.output = bucket, config.downloads.output_directory

    def send(self, item, now):
        """Its copy is stored, or deleted."""
        if item['kind'] == 'delete':
            for key in json.loads(item['payload']):
                self.bucket.delete(key)
            return ()
        row, lost = self.store.get(item['download_id']), []
        for file in row['files']:
            path, key = self.output / file.name, self.bucket.key(row['id'], file.name)
            if path.exists() or not (self.output / MARKER).exists():
                self.bucket.put(path, key, file.type)  # says so if the disk is unplugged
                continue
            lost.append(file.name)  # removed by hand
            self.bucket.abort(key)
        if not lost:
            log.info('download %s: stored in bucket %s', row['id'], self.bucket.s3.bucket)
            return 'stored', None
        error = 'No longer in the output folder, so not in the bucket either: ' + ', '.join(lost)
        log.warning('download %s: %s', row['id'], error)
        return 'gone', error


MOST_NOTICES = 10  # tries of a notification: the last one comes after more than a day
NTFY = {  # what an event's title begins with, its priority and its tag
    'completed': ('Video saved', 'default', 'white_check_mark'),
    'failed': ('Not saved', 'high', 'x'),
    'attention': ('Needs attention', 'high', 'warning'),
}


class Notifier(Courier):
    """Tells [notify] url what has happened: an ntfy topic in words (docs.ntfy.sh/publish), any
    other address the download as JSON."""
    kinds = ('notify',)
    fails = 'Notifications fail'

    def __init__(self, config, store, describe, page, problems):
        super().__init__(store, config.downloads.retry_delays)
        self.describe, self.page, self.problems = describe, page, problems
        self.events, self.secret = config.notify.events, config.notify_secret.encode()
        self.url = config.notify.url.replace('ntfy+', '', 1)
        self.host = urlsplit(self.url).hostname or ''
        self.ntfy = self.url != config.notify.url or 'ntfy' in self.host.split('.')
        self._looked, self._seen = -math.inf, set()

    def step(self, now):
        """As in any courier; once a minute after a check for problems."""
        if 'attention' in self.events and not 0 <= now - self._looked < COURIER_NAP:
            found = {re.match(r'\D*', text)[0]: text for text in self.problems()
                     if not text.startswith(self.fails)}
            lasting = {name: found[name] for name in found if name in self._seen}
            self.store.note_problems(found, lasting, int(now))
            self._looked, self._seen = now, set(found)
        return super().step(now)

    def send(self, item, now):
        """Send a notification, unless its download was deleted."""
        if item['attempts'] >= MOST_NOTICES:
            log.warning('notify %s: given up', item['download_id'])
            return ()
        event, told = 'attention', {'message': item['payload']}
        if item['download_id']:
            event = {'finish': 'completed'}.get(item['payload'], 'failed')
            try:
                told = self.describe(self.store.get(item['download_id']))
            except LookupError:
                return ()
        headers, body = self._compose(event, told, now)
        try:
            status, _, _ = http_call('POST', self.url, headers, body)
        except OSError as error:
            raise Trouble(f'{self.host} cannot be reached: {excerpt(str(error), 200)}') from None
        if not 200 <= status < 300:
            raise Trouble(f'{self.host} answers with HTTP {status}')
        return ()

    def _compose(self, event, told, now):
        if self.ntfy:
            title, priority, tag = NTFY[event]
            title = f'{title}: {told.get("title") or told.get("url") or ""}'.rstrip(': ')
            coded = binascii.b2a_base64(excerpt(' '.join(title.split()), 200).encode())
            return {'Title': f'=?UTF-8?B?{coded.decode().strip()}?=',  # RFC 2047
                    'Priority': priority, 'Tags': tag,
                    'Click': told.get('public_url') or self.page}, told['message'].encode()
        body = json.dumps({'event': event, 'sent_at': now, **told}).encode()
        headers = {'Content-Type': 'application/json'}
        if self.secret:
            import hmac
            headers['X-Signature'] = 'sha256=' + hmac.new(self.secret, body, 'sha256').hexdigest()
        return headers, body


# -- thumbnails

def make_thumbnail(video, picture):
    """Make a small JPEG of `video`; whether it worked. Slow: takes a Pi seconds."""
    fresh = picture.with_name(f'.{picture.name}.new')
    for second in ('1', '0'):  # a clip may be shorter than a second
        command = ['nice', 'ffmpeg', '-nostdin', '-v', 'quiet', '-threads', '1', *LOCAL_FILES,
                   *still_format(video), '-ss', second, '-i', f'file:{video}', '-frames:v', '1',
                   '-vf', THUMBNAIL_FILTER, '-q:v', '5', '-f', 'mjpeg', '-']
        data = output_of(command, THUMBNAIL_SECONDS, preexec_fn=die_with_us())
        with suppress(OSError):
            if data and fresh.write_bytes(data):
                os.replace(fresh, picture)
                return True
    fresh.unlink(missing_ok=True)
    return False


# ---------- scheduler ---------------------------------------------------------------------
# Owns the workers and the heap of what they may start, read from the store at each look; claim
# decides.
# Lock: `_changed` guards `_running` and what is said of it; never held across the store, a
# download or a socket. Called by http (push, cancel), daemon (start, stop) and its own threads.

MAX_NAP = 5.0  # seconds: a wall clock that jumps (a Pi has no RTC) is noticed after this
SET_BACK = 5.0  # seconds that the wall clock loses on the monotonic one if it was set back
WATCH_NAP = 1.0  # seconds between looks at running attempts and at what pauses the queue
PAUSE_SECONDS = 30  # how long the queue pauses after an attempt reports a full disk
HANG_SECONDS = 20.0  # an attempt that ignores stop() for this long will never end
HUNG = Outcome('retry', 'timeout', 'The download hung and had to be stopped.')
CANCELLED, INTERNAL = Ending('cancelled').outcome, Ending('internal').outcome
STORE_NAP = 2.0  # seconds before storing an outcome is tried again


class Run:
    """A download that a worker has; `attempt` and `job` are None until it is claimed."""

    attempt = job = stop_reason = None
    post = None  # site, media id and what is asked of it, once yt-dlp knows
    hung = alone = False  # `alone`: nothing else may run


class Scheduler:
    """Starts what is due, watches what runs, stores how it ended.

    `new_attempt(job, on_progress, on_identity)` makes an Attempt, `preflight()` tells why nothing
    may start (None: it may), `on_outcome(job, outcome, over)` and `on_hang()` are the daemon's."""

    def __init__(self, config, store, board, new_attempt, preflight, on_outcome, on_hang):
        self.config, self.store, self.board = config, store, board
        self.new_attempt, self.preflight = new_attempt, preflight
        self.on_outcome, self.on_hang = on_outcome, on_hang
        self.ready = False  # whether what an earlier life left has been queued again
        self.frozen = False  # whether that life ended because yt-dlp froze
        self.paused = None  # why nothing starts, a sentence
        self.beat = time.monotonic()  # when the loop last came round: for the watchdog
        self._pause_until, self._pause_message = -math.inf, ''  # monotonic
        self._clock = math.inf  # epoch less monotonic seconds: falls when the clock is set back
        self._changed = threading.Condition()
        self._news = False  # whether something changed since the loop last looked
        self._heap = []  # (due, place, row of Store.waiting)
        self._running = {}
        self._import_due = -math.inf  # monotonic, when the next post of an import may start
        self._stopping = threading.Event()
        self._threads = []

    # -- what others call

    def start(self):
        self._spawn('schedule', self._loop)

    def _wake(self):
        with self._changed:
            self._news = True
            self._changed.notify_all()

    def push(self, download_id):
        """It is queued now; claim verifies that."""
        if not self.paused and not self._must_wait():  # else the loop comes by itself
            self._wake()
        self.board.post(download_id)

    def cancel(self, download_id):
        """Stop it wherever it is; whether there was something to stop."""
        if self._cancel_queued(download_id):
            return True
        runs = self._halt([download_id], 'cancelled')
        with self._changed:
            gone = self._changed.wait_for(
                lambda: self._running.get(download_id) not in runs, 5)
        # Its attempt may have ended just then, with another one to follow.
        return gone and (self._cancel_queued(download_id) or bool(runs))

    def _cancel_queued(self, download_id):
        done = self.store.move('cancel', download_id, int(time.time()))
        if done:
            self.board.post(download_id)
        return done

    def _halt(self, ids, reason):
        """Tell what runs to end; the first reason stays."""
        with self._changed:
            runs = [self._running[key] for key in ids if key in self._running]
            for run in runs:
                run.stop_reason = run.stop_reason or reason
            self._wake()
        for run in runs:
            if run.attempt:
                run.attempt.stop(reason)
        return runs

    def wake_imports(self):
        self._import_due = -math.inf
        self._wake()

    def running(self):
        """How many downloads workers have."""
        with self._changed:
            return len(self._running)

    def stop(self):
        """Stop all, leaving them queued, as far as they end in four seconds."""
        with self._changed:  # a worker that comes later sees it
            self._stopping.set()
        self._halt(list(self._running), 'stopped')
        end = time.monotonic() + 4
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    # -- the thread that schedules

    def _spawn(self, name, target):
        thread = spawn(target, name=name)
        self._threads = [old for old in self._threads if old.is_alive()] + [thread]

    def _loop(self):
        while not self._stopping.is_set():
            try:
                self.step(time.time(), time.monotonic())
            except Exception as error:
                if isinstance(error, StoreDown):
                    log.error('scheduler: waiting for the database: %s', error)
                else:
                    log.exception('scheduler: continuing after this')
                self._stopping.wait(STORE_NAP)
            with self._changed:
                self._changed.wait_for(lambda: self._news, self._nap(time.time()))
                self._news = False

    def step(self, now, monotonic):
        """One look at everything: pause, what runs, what is due. `now` is epoch seconds."""
        self.beat = monotonic
        self._watch(monotonic)
        self._refresh_pause(monotonic)
        if now - monotonic < self._clock - SET_BACK:
            self.store.pull_in(int(now), max(self.config.downloads.retry_delays))
        self._clock = now - monotonic
        if not self.ready:
            for job, outcome in self.store.recover(int(now), self.frozen):
                self._settle(job, outcome)
            self.ready = True
        if not self.paused:
            self._start_due(now, monotonic)

    def _employ(self, download_id, alone):
        """Give it to a new worker (idle threads cost memory). Raises what Thread.start does."""
        with self._changed:
            if download_id in self._running or self._stopping.is_set():
                return
            self._running[download_id] = run = Run()
            run.alone = alone
        try:
            self._spawn(f'worker-{download_id[:8]}', lambda: self._work(download_id, run))
        except Exception:
            with self._changed:
                self._running.pop(download_id, None)
            raise

    def _nap(self, now):
        """Seconds until there is something to do; under the lock."""
        if self._running or self.paused:
            return WATCH_NAP
        next_due = self._heap[0][0] if self._heap else math.inf
        return max(min(MAX_NAP, next_due - now,
                       max(self._import_due - time.monotonic(), WATCH_NAP)), 0.0)

    def _refresh_pause(self, monotonic):
        message = self.preflight()
        if not message and monotonic < self._pause_until:
            message = self._pause_message
        before, self.paused = self.paused, message
        if (message or '').partition(':')[0] == (before or '').partition(':')[0]:
            return  # the figures of a full disk change all the time
        if message:
            log.warning('queue: paused: %s', message)
        else:
            log.info('queue: resumed')
        self.board.post('')

    def _must_wait(self, alone=False):
        """Whether no worker may take one more, or one that must run alone."""
        with self._changed:
            runs = list(self._running.values())
        return (len(runs) >= self.config.downloads.max_concurrent
                or any(alone or run.alone for run in runs))

    def _start_due(self, now, monotonic):
        """While workers are free, start what is due, and behind it, at the pace of imports, one of
        their posts."""
        if self._must_wait():
            return
        rows = self.store.waiting()
        if monotonic >= self._import_due:
            self._import_due = monotonic + MAX_NAP
            rows += self.store.next_of_imports(int(now))
        self._heap = [(row['due'], place, row) for place, row in enumerate(rows)]
        heapq.heapify(self._heap)
        while self._heap and self._heap[0][0] <= now:
            row = self._heap[0][2]
            if self._must_wait(row['alone']):
                return
            heapq.heappop(self._heap)
            if row['paced']:
                pace = self.config.downloads.import_pace
                self._import_due = monotonic + pace * (0.75 + os.urandom(1)[0] / 510)
            self._employ(row['id'], row['alone'])

    def _watch(self, monotonic):
        """Let each attempt check its limits; one that ignores a stop makes us restart in place."""
        with self._changed:
            runs = [run for run in self._running.values() if run.attempt]
        for run in runs:
            run.attempt.check(monotonic)
            stopped_at = run.attempt.reach.stopped_at
            if stopped_at is None or monotonic - stopped_at <= HANG_SECONDS or run.hung:
                continue
            run.hung = True
            log.error('download %s: does not stop; the server restarts in place', run.job.id)
            self._settle(run.job, CANCELLED if run.stop_reason == 'cancelled' else HUNG)
            self.on_hang()

    # -- the threads that download, one each

    def _work(self, download_id, run):
        try:
            self._attempt(download_id, run)
        except StoreDown as error:
            log.warning('download %s: waiting for the database: %s', download_id, error)
            self._stopping.wait(STORE_NAP)
        except Exception:
            log.exception('download %s: failed unexpectedly', download_id)
            if run.job:
                self._settle(run.job, INTERNAL)
            else:  # its row cannot be read
                self.store.move('cancel', download_id, int(time.time()), reason='internal',
                                error_message=INTERNAL.message)
        finally:
            with self._changed:
                self._running.pop(download_id, None)
                self._wake()
            self.board.post(download_id)

    def _attempt(self, download_id, run):
        run.job = job = self.store.claim(download_id, int(time.time()))
        if job is None:  # gone, not due yet, or claimed by a commit that was reported as failed
            self.store.move('requeue', download_id, int(time.time()))
            return
        log.info('download %s: attempt %d starts: %s', job.id, job.attempt, job.url)
        self.board.post(job.id, Progress(0.0, 'page'))
        attempt = self.new_attempt(job, lambda progress: self.board.post(job.id, progress),
                                   lambda *post: self._identify(run, *post))
        with self._changed:
            run.attempt, reason = attempt, run.stop_reason
        if reason:
            attempt.stop(reason)
        self._settle(job, attempt.run())

    def _identify(self, run, *post):
        """The outcome if the files of this post are here, or are being fetched by another worker:
        then wait for it. None: fetch it."""
        if ('again', None) in run.job.options:
            return None
        mine = (*post, asked_of(run.job.options))
        with self._changed:
            while any(other.post == mine for other in self._running.values() if other is not run):
                if run.stop_reason or run.attempt.reach.ended:
                    return None
                run.attempt.meter.steps += 1  # a sign of life, or its time would be up
                self._changed.wait(WATCH_NAP)
            run.post = mine
        if run.job.files:  # what of it was delivered stays
            return None
        folder = self.config.downloads.output_directory
        with suppress(StoreDown):
            for record in self.store.same_post(*mine):
                if all((folder / file.name).is_file() for file in record['files']):
                    return Outcome('done', title=record['title'] or '', files=record['files'],
                                   note=record['note'] or '', post=record, shared=record['id'])
        return None

    def _settle(self, job, outcome):
        """Store how it ended, however long the database takes; then tell the daemon."""
        while True:
            try:
                over = self._store_outcome(job, outcome, time.time())
                break
            except StoreDown as error:
                log.error('download %s: its end cannot be stored yet: %s', job.id, error)
                if self._stopping.wait(STORE_NAP):
                    return  # the next start finds it 'downloading', with its files
        self.on_outcome(job, outcome, over)

    def _store_outcome(self, job, outcome, now):
        """Whether it is over. Raises StoreDown."""
        downloads = self.config.downloads
        step, delay = next_step(outcome, job.attempt, downloads.max_retries, downloads.retry_delays)
        level = logging.INFO if step in ('finish', 'requeue') else logging.WARNING
        log.log(level, 'download %s: attempt %d ends: %s %s %s', job.id, job.attempt, step,
                outcome.reason, outcome.message or ', '.join(file.name for file in outcome.files))
        if outcome.kind == 'pause':
            self._pause_until = time.monotonic() + PAUSE_SECONDS
            self._pause_message = outcome.message
        due = int(now + delay) if step == 'retry_later' else None
        if step == 'give_up' and outcome.kind == 'retry' and job.attempt > 1:
            outcome = outcome._replace(message=f'{outcome.message} Tried {job.attempt} times.')
        over = self.store.end(step, job, outcome, int(now), downloads.output_directory, due)
        if due and job.imported and outcome.reason in FEW_TRIES:
            self._import_due = time.monotonic() + delay  # a site that blocks us is left alone
        return over


# ---------- imports -----------------------------------------------------------------------
# Owns the exports of TikTok and Instagram that people bring: reading them in little memory, the
# look into one before anything is queued, and queueing its posts. No lock. Called by http, daemon
# and commands.

LARGEST_EXPORT = 200 << 20  # bytes of an upload
LARGEST_UNPACKED = 300 << 20  # bytes of the texts in a zip
LARGEST_DIRECTORY = 3 << 20  # bytes of a zip's table of contents: its 30,000 files take 20 MB
MOST_POSTS = 600_000  # of one export; each takes 80 bytes while it is read
IMPORT_DAYS = 7  # that one is kept which nobody starts, or which is done
LONGEST_MARK = 2200  # characters of a link or a list's name, with what is around it
# Names of lists and files in exports. TikTok moved its lists in January 2026 and kept their names.
GROUPS = {
    'FavoriteVideoList': 'favorites', 'Favorite Videos': 'favorites',
    'ItemFavoriteList': 'likes', 'Like List': 'likes',
    'VideoList': 'history', 'Watch History': 'history', 'Video Browsing History': 'history',
    'saved_posts': 'saved', 'saved_saved_media': 'saved',
    'saved_collections': 'collections', 'saved_saved_collections': 'collections',
    'liked_posts': 'likes', 'likes_media_likes': 'likes',
}
GROUP_NAMES = {'favorites': 'Favorites', 'likes': 'Likes', 'saved': 'Saved',
               'collections': 'Collections', 'links': 'Links', 'history': 'Watch history'}
MARK = re.compile(r'"(\w{0,40}List|saved_saved_\w{1,20}|likes_media_likes)"\s{0,9}:'
                  r'|(https?://[!#-;=?-\[\]-~]{1,2100})', re.A)


def marks_in(stream, group):
    """(group, link) of each link in a text, block by block; `group` until it names a list."""
    rest, block = '', b'.'
    while block:
        block = stream.read(1 << 16)
        text = (rest + block.decode('latin-1')).replace('\\/', '/').replace('\\u0026', '&')
        edge, done = len(text) - LONGEST_MARK * bool(block), 0
        for match in MARK.finditer(text):
            if match.start() >= edge:  # it may go on in the next block
                break
            done = match.end()
            if match[1]:
                group = GROUPS.get(match[1], '')
            elif group:
                yield group, trim_link(match[2].replace('&amp;', '&'))
        rest = text[max(done, edge, 0):]


class ZipSource(io.FileIO):
    """A file of which zipfile cannot read much at once: its table of contents is in memory."""

    def read(self, size=-1):
        if size > LARGEST_DIRECTORY:
            raise Refused('bad_export', 'This zip file has too many files in it.')
        return super().read(size)


def wanted_members(members):
    """The texts among the files of a zip. Raises Refused for one that could do harm."""
    wanted, unpacked = [], 0
    for info in members:
        if info.filename.startswith(('/', '\\')) or '..' in re.split(r'[/\\]', info.filename):
            raise Refused('bad_export', 'This zip file has paths that lead out of it.')
        if not info.filename.lower().endswith(('.json', '.html', '.txt')):
            continue
        if info.compress_type not in (0, 8):  # stored, deflated; others may want any memory
            raise Refused('bad_export', 'This zip file is packed in an unusual way.')
        unpacked += info.file_size
        if unpacked > LARGEST_UNPACKED or info.file_size > (1 << 20) + 200 * info.compress_size:
            raise Refused('bad_export', 'This zip file would unpack to far too much.')
        wanted.append(info)
    return wanted


def texts_in(file):
    """(group, stream) of each text in an export: a zip file, or one file. Raises Refused."""
    import zipfile
    import zlib
    with ZipSource(file) as source:
        start = source.read(4)
        if start != b'PK\3\4':
            source.seek(0)
            yield 'links' * (not start.startswith(b'{')), source  # else its lists have names
            return
        try:
            with zipfile.ZipFile(source) as archive:
                for info in wanted_members(archive.infolist()):
                    # a/saved_posts_1.html: saved_posts
                    name = re.sub(r'.*/|(_\d{1,3})?\.\w{1,9}$', '', info.filename[-200:])
                    with archive.open(info) as stream:
                        yield GROUPS.get(name, ''), stream
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError):
            raise Refused('bad_export', 'This zip file is damaged or has a password.') from None


def posts_in(file, security):
    """(group, URL) of each post in an export, once in its group. Raises Refused."""
    seen = set()
    for start, stream in texts_in(file):
        for group, link in marks_in(stream, start):
            with suppress(Refused):
                url = check_url(link, security)
                post = post_of(url)[1]
                key = hash((group, post or url))
                if key not in seen and (post or group == 'links'):
                    seen.add(key)
                    yield group, url
            if len(seen) > MOST_POSTS:
                raise Refused('bad_export', f'More than {MOST_POSTS:,} posts are in this file.')


def rough_time(seconds):
    """A minute or more in words: 'about 2 days'."""
    for name, length in ('day', DAY), ('hour', 3600), ('minute', 60):
        if seconds >= length:
            number = round(seconds / length)
            return f'about {number} {name}{"s" * (number > 1)}'


class Imports:
    """The exports that people bring; `on_change` is called when there is something to start."""

    def __init__(self, config, store, on_change=lambda: None):
        self.config, self.store, self.on_change = config, store, on_change
        self.folder = config.database.path.parent / 'imports'
        self._found = list(self.folder.glob('*'))  # what a kill left is among these
        self._reading = threading.Semaphore()  # one is read at a time, for the memory

    def receive(self, name, client_id, blocks):
        """Store an export and look into it; nothing is queued yet. Its id. Raises Refused,
        StoreDown, OSError, and what `blocks` raises."""
        import_id = new_id()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / import_id
            with open(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), 'wb') as target:
                for block in blocks:
                    if free_space(self.folder) < self.config.downloads.min_free_space:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    target.write(block)
                target.flush()
                sync_handle(target.fileno())
            self.store.add_import(import_id, name, client_id, self._look(file), int(time.time()))
            return import_id
        except BaseException:
            self._remove(import_id)
            raise

    def _remove(self, import_id):
        (self.folder / import_id).unlink(missing_ok=True)

    def _look(self, file):
        """[group, posts, how many of them are here] of each group, in their usual order."""
        counts, known = {group: [group, 0, 0] for group in GROUP_NAMES}, self.store.known_posts()
        with self._reading:
            for group, url in posts_in(file, self.config.security):
                counts[group][1] += 1
                counts[group][2] += post_of(url)[1] in known
        found = [count for count in counts.values() if count[1]]
        if not found:
            raise Refused('bad_export', 'There are no videos of the allowed sites in this file.')
        return found

    def describe(self, row):
        """An import as the API shows it. What was only watched is not chosen by itself."""
        groups = [{'group': group, 'name': GROUP_NAMES[group], 'posts': posts, 'here': known}
                  for group, posts, known in json.loads(row['groups'])]
        left, done, failed = row['waiting'], row['completed'], row['failed']
        if row['state'] == 'ready':
            message = ' · '.join(f'{group["name"]} {group["posts"]:,}' for group in groups)
            left = sum(group['posts'] - group['here'] for group in groups
                       if group['group'] != 'history')
        else:
            message = f'{done:,} of {left + done + failed:,}' + f', {failed:,} gone' * bool(failed)
        pace = self.config.downloads.import_pace
        if left * pace >= 60:
            message += f', {rough_time(left * pace)}'
        return {'import_id': row['id'], 'name': row['name'], 'state': row['state'], 'left': left,
                'completed': done, 'failed': failed, 'groups': groups, 'message': message,
                'created_at': row['created_at'], 'pace': pace}

    def all(self):
        """All imports, newest first, as the API shows them."""
        return [self.describe(row) for row in self.store.imports()]

    def get(self, import_id):
        """One of them. Raises LookupError."""
        for row in self.all():
            if row['import_id'] == import_id:
                return row
        raise LookupError(import_id)

    def change(self, import_id, verb, only=()):
        """start (these groups, or all but the history), pause, resume or cancel; whether its
        state allowed that."""
        if verb == 'cancel':
            done = self.store.cancel_import(import_id, int(time.time()))
            self._remove(import_id)
            return done
        chosen = None
        if verb == 'start':
            chosen = ','.join(only or [name for name in GROUP_NAMES if name != 'history'])
        if not self.store.move_import(verb, import_id, chosen):
            return False
        if verb == 'start':
            self._fill(import_id)
        self.on_change()
        return True

    def _fill(self, import_id):
        """Queue the chosen posts in commits of a thousand, without those that are here. May be
        done again after a kill."""
        with self._reading:
            row = next((row for row in self.store.imports()
                        if row['id'] == import_id and row['state'] == 'filling'), None)
            if not row:  # done meanwhile, or cancelled
                return
            chosen = row['chosen'].split(',')
            urls = (url for group, url in posts_in(self.folder / import_id, self.config.security)
                    if group in chosen)
            for some in iter(lambda: list(itertools.islice(urls, 1000)), []):
                self.store.fill_import(row, some, int(time.time()))
            self.store.move_import('filled', import_id)
        self._remove(import_id)

    def tidy(self, now):
        """Go on with what a kill interrupted, end what is done, and drop what nobody started."""
        rows = self.store.imports()
        for row in rows:
            if row['state'] == 'filling':
                self._fill(row['id'])
                self.on_change()
            elif row['state'] == 'running' and not row['waiting']:
                self.store.end_import(row['id'], now, 'The import is done: '
                                      + self.describe(row)['message'])
            elif row['state'] in ('ready', 'done') and now - row['created_at'] > IMPORT_DAYS * DAY:
                self.change(row['id'], 'cancel')
        known = {row['id'] for row in rows}
        for file in self._found:
            if file.name not in known:
                file.unlink(missing_ok=True)


# ---------- certificate -------------------------------------------------------------------
# Owns ca.crt, ca.key, names.json, and the server's certificate and key: a name-constrained CA
# that a phone trusts once, and a leaf renewed from it with no phone touched. The openssl command
# makes them; a handshake with ourselves checks them, so a start with a good certificate runs no
# other program. Lock: flock on the CA's folder, across processes. All of it may raise Trouble, and
# what makes files OSError. Called by daemon, http, commands.

LEAF_DAYS = 397  # iOS takes up to 825 from a private CA; 397 passes everywhere
CA_DAYS = 3652  # a new CA must be installed on each phone
RENEW_DAYS = 30  # a machine that was off for a holiday still has a valid certificate
CA_NAME = 'videoserverd on '  # iOS lists a root under Certificate Trust Settings by its CommonName
PERMITTED_NAMES = ('local', 'lan', 'home.arpa', 'localhost')  # and all PRIVATE_NETWORKS
# A CA that permits `tv` permits all of .tv: a host called tv is reached as tv.local only.
TOP_LEVEL_NAMES = ('ai app biz box cloud co com de dev eu fm fr home info io it link live me media '
                   'movie net network online org page site tv uk us video web zip').split()
PARTIAL_CHAIN, NO_CHECK_TIME = 0x80000, 0x200000  # X509_V_FLAG_*; Python names one, from 3.10
UNKNOWN_CONSTRAINT = 51  # X509_V_ERR_UNSUPPORTED_CONSTRAINT_TYPE
WORKING = '.making-*'  # the folder beside the CA in which files are made
OPENSSL_CONFIG = '''
[req]
distinguished_name = req
[ca]
default_ca = ca
database = index
serial = serial
new_certs_dir = .
default_md = sha256
policy = subject_policy
[subject_policy]
commonName = supplied
[ca.crt]
subjectKeyIdentifier = hash
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
nameConstraints = critical, @listed
[server.crt]
subjectKeyIdentifier = hash
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
authorityKeyIdentifier = keyid:always
subjectAltName = @listed
[listed]
%s
'''


class ClockWrong(Trouble):
    """The clock is older than this release: no certificate can be made."""


# The server's certificate. `own`: the owner's, not our CA's; `not_after`: epoch seconds; `names`:
# and addresses.
Certificate = namedtuple('Certificate', 'own not_after names')


def as_address(word):
    """The IP address that `word` is; None for a host name."""
    try:
        return ipaddress.ip_address(word)
    except ValueError:
        return None


def host_words(given):
    """Host names and IP addresses in their usual form, each once."""
    found = {}
    for word in given:
        text = word.strip('[] ').lower().partition('%')[0].rstrip('.')
        address = as_address(text)
        if not (address or HOST_NAME.fullmatch(text)):
            raise Trouble(f'{word!r} is neither a host name (such as pi.lan) nor an IP address')
        found[str(address or text)] = True
    return tuple(found)


def host_addresses():
    """All addresses of this machine, loopback first."""
    found = ['127.0.0.1', '::1']
    for family, target in ((socket.AF_INET, '192.0.2.1'), (socket.AF_INET6, '2001:db8::1')):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))  # sends nothing: it picks the address to send from
            found.append(probe.getsockname()[0])
    with suppress(OSError):  # Linux only
        table = Path('/proc/net/fib_trie').read_text()
        found += re.findall(r'\|-- (\S+)\n\s+/32 host LOCAL', table)
        for line in Path('/proc/net/if_inet6').read_text().splitlines():
            address, _, _, _, flags, name = line.split()
            # Leave out the short-lived: temporary (1), failed (8), deprecated (0x20), containers.
            if not int(flags, 16) & 0x29 and not name.startswith('veth'):
                found.append(str(ipaddress.ip_address(bytes.fromhex(address))))
    return host_words(found)


def known_hosts(config):
    """The names and addresses this machine answers to, `<host>.local` first."""
    words = [*machine_names(), *config.server.names, *host_addresses()]
    with suppress(Trouble):  # not set, or not as a Host can be
        words += host_words([urlsplit(config.server.public_base_url or '').hostname or ''])
    return host_words(words)


def may_sign(word, permitted):
    """May our CA, made to permit `permitted` too, sign for this name or address?"""
    address = as_address(word)
    if address:
        return word in permitted or is_within(address, PRIVATE_NETWORKS)
    return any(f'.{word}'.endswith(f'.{name}') for name in (*PERMITTED_NAMES, *permitted))


def certificate_files(config):
    """Where each generated file belongs, in the order in which they are put there."""
    server = config.server
    return {'ca.key': server.ca_file.with_name('ca.key'), 'server.key': server.key_file,
            'names.json': server.ca_file.with_name('names.json'), 'ca.crt': server.ca_file,
            'server.crt': server.cert_file}


def remembered_names(config):
    """All that `cert` ever got as --host and --ip, and what the CA permits."""
    file, notes = certificate_files(config)['names.json'], {}
    try:
        with suppress(FileNotFoundError):
            notes = json.loads(file.read_text())
        return host_words(notes.get('given', ())), host_words(notes.get('permitted', ()))
    except Exception as error:  # whatever was edited into it
        log.warning('%s cannot be used, give `cert --host` its names again: %s', file, error)
        return (), ()


def tls_context(*pair):
    """TLS 1.2 (forward secrecy and AEAD only) and 1.3 with a certificate and its key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers('ECDHE+AESGCM:ECDHE+CHACHA20')
    context.set_alpn_protocols(['http/1.1'])
    # LibreSSL has neither. Without the second, a client that hangs up could not be answered.
    for name in ('OP_NO_RENEGOTIATION', 'OP_IGNORE_UNEXPECTED_EOF'):
        context.options |= getattr(ssl, name, 0)
    # Phones come back too late to use the tickets of TLS 1.3, a sixth of a handshake. Those of
    # 1.2 stay (no OP_NO_TICKET): OpenSSL would keep 20,000 sessions of 1 KB instead.
    context.num_tickets = 0
    try:
        for file in pair:
            file.open().close()  # unlike load_cert_chain's, its error names the file
        context.load_cert_chain(*pair, password=lambda: '')
    except (OSError, ValueError) as error:
        raise Trouble(f'{" with ".join(map(str, pair))}: {error}; put a matching PEM pair '
                      'there, or move both away to have new ones made') from None
    return context


def server_context(config):
    return tls_context(config.server.cert_file, config.server.key_file)


def client_context(trusted):
    """A client that trusts a file, even a leaf, whatever the name and the clock. Raises OSError."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= PARTIAL_CHAIN | NO_CHECK_TIME
    client.load_verify_locations(trusted)
    return client


def seen_by_client(context, trusted, leaf):
    """The fields of `leaf` as seen by a client that trusts a file, in a handshake with ourselves in
    memory. Raises ssl.SSLError if the client would."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client_context(trusted).wrap_bio(down, up), context.wrap_bio(up, down, server_side=True)
    try:
        for end in ends * 3:  # in turns, as often as TLS 1.2 needs
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        # LibreSSL before 3.2.2 cannot judge addresses. It has found that `trusted` issued the
        # leaf; what that says is then read with itself as anchor.
        if error.verify_code != UNKNOWN_CONSTRAINT or trusted == leaf:
            raise
        return seen_by_client(context, leaf, leaf)
    return ends[0].getpeercert()


def look_at_certificate(config):
    """The server's certificate: ours if it comes from the CA, else the owner's."""
    context, leaf = server_context(config), config.server.cert_file
    for own, trusted in ((False, config.server.ca_file), (True, leaf)):
        try:
            found = seen_by_client(context, trusted, leaf)
        except OSError as error:  # includes ssl.SSLError and a missing CA
            reason = getattr(error, 'verify_message', error)
            continue
        words = [word.strip().lower() for kind, word in found.get('subjectAltName', ())
                 if kind in ('DNS', 'IP Address')]
        return Certificate(own, int(ssl.cert_time_to_seconds(found['notAfter'])),
                           tuple(str(as_address(word) or word) for word in words))
    raise Trouble(f'{leaf}: clients would reject it: {reason}')


def read_ca(file):
    """The CA that a phone has to trust, in DER and as fields."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(file)
        return context.get_ca_certs(binary_form=True)[0], context.get_ca_certs()[0]
    except (OSError, IndexError):
        raise Trouble(f'{file} is missing or contains no CA') from None


def run_openssl(folder, *arguments):
    """Runs openssl in `folder`, without a terminal for prompts."""
    import subprocess
    try:
        done = subprocess.run(
            ('openssl', *arguments), cwd=folder, stdin=subprocess.DEVNULL, umask=0o077, timeout=120,
            capture_output=True, start_new_session=True)
    except FileNotFoundError:
        raise Trouble('the openssl command is missing: install it (Debian, Raspberry Pi: '
                      'sudo apt-get install openssl; Mac: brew install openssl)') from None
    except subprocess.TimeoutExpired:
        raise Trouble(f'openssl {arguments[0]} did not finish within two minutes') from None
    if done.returncode:
        said = done.stderr.decode('utf-8', 'replace').replace('Using configuration from config', '')
        raise Trouble(f'openssl {arguments[0]} failed: ' + said.strip().partition('\n')[0])


def make_key(new, old, fresh):
    """The old P-256 key if there is one, unless `fresh`; else a new one. A renewal keeps the key,
    so that it only changes one file, atomically."""
    if old.exists() and not fresh:
        return old
    run_openssl(new.parent, *'ecparam -name prime256v1 -genkey -noout -out'.split(), new.name)
    return new


def sign_certificate(out, key, subject, words, start, end, *signer):
    """Makes a certificate, of OPENSSL_CONFIG's section of its name. Of openssl's commands only
    `ca` can back-date in every release."""
    folder, listed = out.parent, '\n'.join(word % at for at, word in enumerate(words))
    (folder / 'config').write_text(OPENSSL_CONFIG % listed)
    (folder / 'index').write_text('')
    dates = [time.strftime('%Y%m%d%H%M%SZ', time.gmtime(moment)) for moment in (start, end)]
    run_openssl(folder, 'req', '-new', '-config', 'config', '-subj', f'/CN={subject[:64]}',
                '-key', key, '-out', 'request')
    run_openssl(folder, 'ca', '-batch', '-notext', '-create_serial', '-config', 'config',
                '-in', 'request', '-out', out.name, '-startdate', dates[0], '-enddate', dates[1],
                '-extfile', 'config', '-extensions', out.name, *signer)


def put_in_place(config, folder):
    """Moves the new files into place. A kill leaves a good pair, or none and what the next start
    needs to make one: keys come first, certificates last, a new CA only after the old certificates
    are gone."""
    files = {folder / name: target for name, target in certificate_files(config).items()
             if (folder / name).exists()}
    for file, target in files.items():
        target.parent.mkdir(0o755, parents=True, exist_ok=True)
        owner = target.parent.stat()
        if os.geteuid() == 0:  # `sudo videoserverd.py cert` must not lock out the service's user
            os.chown(file, owner.st_uid, owner.st_gid)
        file.chmod(0o600 if file.suffix == '.key' else 0o644)
        sync(file)
    if folder / 'ca.crt' in files:
        for target in (config.server.cert_file, config.server.ca_file):
            target.unlink(missing_ok=True)
            sync(target.parent)
    for file, target in files.items():
        file.replace(target)
        sync(target.parent)


def leaf_words(config, asked, given, permitted):
    """The names and addresses for the leaf; `asked` for now, `given` ever."""
    wanted = host_words((*asked, *config.server.names))
    refused = [word for word in wanted if not may_sign(word, permitted)]
    advice = ', '.join(refused) + (
        ': the CA may not sign for this; `videoserverd.py cert --new-ca` with the same names makes '
        'one that may, to install on each phone')
    if {*refused} & {*asked}:
        raise Trouble(advice)
    if refused:
        log.warning('[server] names: %s', advice)
    words = host_words((*known_hosts(config), *given))
    return [word for word in words if may_sign(word, permitted)]


def make_ca(out, key, permitted, start):
    """Makes a CA that may sign for `permitted`, too."""
    words = []
    for word in (*PRIVATE_NETWORKS, *PERMITTED_NAMES, *permitted):
        try:
            words.append(f'permitted;IP.%d = {ipaddress.ip_network(word).with_netmask}')
        except ValueError:
            words.append(f'permitted;DNS.%d = {word}')
    sign_certificate(out, key, CA_NAME + machine_names()[0][:-len('.local')], words, start,
                     start + CA_DAYS * DAY, '-selfsign', '-keyfile', key)


def make_certificate(config, now, words, notes, new_ca, fresh):
    """Makes a leaf, before it a CA if `new_ca`; new keys if `fresh`."""
    import tempfile
    if now < BUILT:
        today = time.strftime('%Y-%m-%d', time.gmtime(now))
        raise ClockWrong(f'the clock shows {today}, too early for a certificate: connect the '
                         'network, or run: sudo timedatectl set-ntp true')
    files = certificate_files(config)
    start = now - DAY  # a Pi has no clock, and may have booted with yesterday's time
    ca, ca_key, leaf = files['ca.crt'], files['ca.key'], files['server.crt']
    if ca.exists():
        try:
            tls_context(ca, ca_key)
        except Trouble:
            raise Trouble(f'{ca} is left alone, for {ca_key} is missing or of another CA: put its '
                          f'key there, or move {ca} and {leaf} away, run `videoserverd.py cert` '
                          'and install the new CA on each phone') from None
    folder = Path(tempfile.mkdtemp(prefix=WORKING[:-1], dir=ca.parent))
    if new_ca:
        ca, ca_key = folder / 'ca.crt', make_key(folder / 'ca.key', ca_key, fresh)
        make_ca(ca, ca_key, notes['permitted'], start)
    last = ssl.cert_time_to_seconds(read_ca(ca)[1]['notAfter'])
    if now > last - RENEW_DAYS * DAY:
        log.warning('the CA ends within %d days: `videoserverd.py cert --new-ca` makes one for '
                    'each phone to install', RENEW_DAYS)
    key, leaf = make_key(folder / 'server.key', files['server.key'], fresh), folder / 'server.crt'
    words = (f'{"IP" if as_address(word) else "DNS"}.%d = {word}' for word in words)
    sign_certificate(leaf, key, machine_names()[0], words, start,
                     min(start + LEAF_DAYS * DAY, last), '-cert', ca, '-keyfile', ca_key)
    (folder / 'names.json').write_text(json.dumps(notes), encoding='utf-8')
    # On a full disk openssl may leave half a file and report success.
    seen_by_client(tls_context(leaf, key), ca, leaf)
    put_in_place(config, folder)


def ensure_locked(config, now, asked, force, fresh):
    """What ensure_certificate does under its lock; `fresh` is its new_ca."""
    server, old, must = config.server, None, force or fresh or asked
    if server.cert_file.exists():
        old = look_at_certificate(config)
        if old.own and must:
            raise Trouble(f'{server.cert_file} is your own certificate, not from {server.ca_file}, '
                          'and is left alone: move it and its key away to have one made')
        if old.own:
            return old, False
    must = must or not old or now >= max(old.not_after, BUILT)
    new_ca = fresh or not server.ca_file.exists()
    known, permitted = remembered_names(config)
    given = host_words((*known, *asked))
    if new_ca:
        own = (name for name in machine_names() if name not in TOP_LEVEL_NAMES)
        permitted = host_words((*own, *server.names, *given))
    words = leaf_words(config, asked, given, permitted)
    if not must:  # a name that went away can stay: containers come and go
        if {*words} <= {*old.names} and RENEW_DAYS <= (old.not_after - now) / DAY <= LEAF_DAYS:
            return old, False
    try:
        notes = {'given': given, 'permitted': permitted}
        make_certificate(config, now, words, notes, new_ca, fresh)
    except (Trouble, OSError) as error:
        if must:
            raise
        log.warning('the certificate stays as it is until it can be renewed: %s', error)
        return old, False
    return look_at_certificate(config), True


def ensure_certificate(config, now, names=(), force=False, new_ca=False):
    """The server's certificate, made or renewed if due; and whether it was changed. `names` (and
    addresses) are remembered. The owner's own certificate is left alone. Raises ClockWrong, too."""
    asked, folder = host_words(names), config.server.ca_file.parent
    try:
        if not config.server.cert_file.exists():
            folder.mkdir(0o711, parents=True, exist_ok=True)  # who may read it could lock it
        if not folder.exists():  # the owner's certificate is elsewhere, and none is made
            return ensure_locked(config, now, asked, force, new_ca)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            return ensure_locked(config, now, asked, force, new_ca)
        finally:
            for left in folder.glob(WORKING):  # also those of a killed run
                remove_folder(left)
            os.close(handle)
    except OSError as error:
        raise Trouble(f'the certificate cannot be made: {error.filename or "disk"}: '
                      f'{error.strerror}') from None


def ca_fingerprint(config):
    """SHA-256 of the CA as phones and browsers show it: 'AB:CD:…'."""
    import hashlib
    return hashlib.sha256(read_ca(config.server.ca_file)[0]).digest().hex(':').upper()


def mobileconfig(config):
    """The CA as an iPhone's profile; it replaces one of the same identifier."""
    import plistlib
    import uuid
    der, fields = read_ca(config.server.ca_file)
    subject = dict(pair for group in fields['subject'] for pair in group)
    title = subject.get('commonName', 'videoserverd')
    name = re.sub(r'[^A-Za-z0-9-]+', '-', title.replace(CA_NAME, ''))

    def payload(kind, suffix, **more):
        identity = uuid.uuid5(uuid.NAMESPACE_OID, der.hex() + suffix)
        return {'PayloadType': kind, 'PayloadVersion': 1, 'PayloadDisplayName': title,
                'PayloadIdentifier': f'com.videoserver.ca.{name}{suffix}',
                'PayloadUUID': str(identity).upper(), **more}
    root = payload('com.apple.security.root', '.root', PayloadContent=der,
                   PayloadCertificateFileName='ca.cer')
    return plistlib.dumps(payload(
        'Configuration', '', PayloadContent=[root], TargetDeviceType=1,
        PayloadDescription='Lets this device trust the video server. The CA can vouch for names '
                           'and addresses of your home network only.'))


# ---------- http --------------------------------------------------------------------------
# Owns the TLS server and its limits, the strict reading of requests, ROUTES (for dispatch and
# OpenAPI), both dialects, /share and files. Locks: `Server._guard`, `App.guard`. Handlers
# validate, call one verb and reply. All of it may raise HTTPError, Refused, StoreDown,
# and what reads from a client ConnectionError when that has left; `respond` alone turns errors into
# replies. Called by daemon and `phone`.

# What a connection is doing: seconds until it is cut off, and until it may be, to make room.
PEER_STATES = {
    'new': (10.0, 0.0),          # handshake and first head
    'idle': (20.0, 0.0),         # between two requests
    'asking': (10.0, 1.0),       # a head, or a body of 16 KB over the worst of Wi-Fi
    'working': (math.inf, 1.0),  # some long-poll
    'sending': (60.0, 0.1),      # a block of the answer
    'closing': (1.0, 0.0),       # see Peer.part
}
WRONG_KEY_DELAY = 0.1  # seconds; doubled by each wrong key from one address, up to 2
SLOWEST_BODY = 32 << 10  # bytes a second at which a large body may be sent
HEAD_LIMIT = 16 << 10  # bytes of a request head
LINE_LIMIT = 8 << 10  # bytes of a request line
LARGE_BODY = 1 << 20  # bytes of a list of links, or of a cookies file
CONNECTIONS = 128  # a thread each
PER_ADDRESS = 16  # a browser opens 6
WATCHERS = 8  # pages that wait for news, and phones that wait for a video
VIDEO_SECONDS = 50.0  # for a video; a phone gives up after 60
SIGNED_NAME = re.compile(r'(.*?)(?:\.([A-Za-z0-9_-]{43}))?', re.S)
SIGNATURE = re.compile(r'(?:\.|%2e)[\w%-]{40,}', re.I | re.A)  # of a share address, as it is sent
B_PATH = re.compile(r'/(initiateDownload|listDownloads|getVideoDownloadPublicURL)(/|$)')
UUID_PATTERN = re.compile(r'[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}')
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 section 5.6.2
TARGET = r'/[\x21\x24-\x3b\x3d\x3f-\x5b\x5d\x5f\x61-\x7a\x7e]*'
REQUEST_LINE = re.compile(rf'({TOKEN}) ({TARGET}) (HTTP/1\.[01])')
FIELD_LINE = re.compile(rf'({TOKEN}):([\t\x20-\x7e\x80-\xff]*)')
HOST_FIELD = re.compile(r'(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?')
BAD_PATH = re.compile(r'%(?![0-9A-Fa-f]{2})|%2f|%5c|%0|%1|%7f|//', re.I)
LINE_END = re.compile(r'[\x00-\x08\x0a-\x1f\x7f]')
CSP = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:{images}; "
       "media-src 'self'; connect-src 'self'; manifest-src 'self'; "
       "form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
SAME_HEADERS = {  # unless a reply has its own
    'Server': 'videoserverd', 'X-Content-Type-Options': 'nosniff', 'X-Frame-Options': 'DENY',
    'Referrer-Policy': 'no-referrer', 'Cross-Origin-Resource-Policy': 'same-origin',
    'Cache-Control': 'no-store',
    'Content-Security-Policy': "default-src 'none'; media-src 'self'; img-src 'self'; "
                               "style-src 'unsafe-inline'; sandbox"}
JSON = 'application/json'
LOOPBACK = networks('127.0.0.0/8,::1')
CODES = {401: 'key_wanted', 404: 'not_found', 411: 'length_required', 413: 'too_large',
         414: 'uri_too_long', 415: 'not_json', 431: 'headers_too_large'}  # else bad_request


class HTTPError(Exception):
    """A refusal: status, one sentence a phone can show, stable code, further headers."""

    def __init__(self, status, message, code='', *headers):
        super().__init__(message)
        self.status, self.headers = status, headers or (('Retry-After', '30'),) * (status == 503)
        self.code = code or CODES.get(status, 'bad_request')


# What goes back: `body`, or what is in `file`.
Reply = namedtuple('Reply', 'status body type headers file', defaults=(b'', JSON, (), None))


# -- reading a request


def decode_path(raw):
    """A percent-decoded path that cannot climb and is not ambiguous."""
    try:
        path = unquote(raw, errors='strict')
    except UnicodeDecodeError:
        path = '..'
    if BAD_PATH.search(raw) or {'.', '..'} & {*path.split('/')}:
        raise HTTPError(400, 'This path is not allowed.')
    return path


def body_length(fields):
    """Content-Length, 0 if there is none (RFC 9112 section 6)."""
    lengths, codings = fields.get('content-length', ['0']), fields.get('transfer-encoding')
    if codings and 'content-length' not in fields:
        if ','.join(codings).strip().lower() != 'chunked':
            raise HTTPError(501, 'The transfer coding is not supported.')
        raise HTTPError(411, 'Send the body with a Content-Length.')
    if codings or len(lengths) > 1 or not re.fullmatch(r'\d{1,15}', lengths[0], re.A):
        raise HTTPError(400, 'Content-Length is not one number.')
    return int(lengths[0])


# NaN and Infinity are not JSON: ValueError. Python up to 3.10 slowly converts numbers of any
# length; those this long are refused later.
STRICT_JSON = json.JSONDecoder(parse_int=lambda digits: int(digits[:4300]), parse_constant=int)


class Request:
    """One request: what was asked, by whom, with the body not read yet.

    Stricter than RFC 9112: whatever two readers could understand differently is refused."""

    def __init__(self, head, peer):
        first, *lines = head.decode('latin-1').split('\r\n')
        match = REQUEST_LINE.fullmatch(first)
        if not match:
            raise HTTPError(400, 'The first line is not valid HTTP/1.1.')
        self.method, target, self.version = match.groups()
        self.fields = {}  # by name in lower case (RFC 9112 section 5)
        if len(lines) > 100:
            raise HTTPError(431, 'There are too many headers.')
        for line in lines:
            match = FIELD_LINE.fullmatch(line)
            if not match:
                raise HTTPError(400, 'A header is malformed.')
            self.fields.setdefault(match[1].lower(), []).append(match[2].strip('\t '))
        self.peer, self.client = peer, peer.address
        self.raw_path, _, self.raw_query = target.partition('?')
        self.query, self.params = {}, {}
        self.shown_path = excerpt(SIGNATURE.sub('.…', self.raw_path), 200)  # for the log
        self.unread = None  # bytes of the body; None: the connection must be closed
        self.note = ''  # client_id and URL, for the log

    def field(self, name):
        """A header field, '' if it is absent; several are joined as in RFC 9110."""
        return ', '.join(self.fields.get(name, ()))

    def content_type(self):
        """In lower case, without parameters."""
        return self.field('content-type').partition(';')[0].strip().lower()

    def blocks(self):
        size, self.unread = self.unread or 0, None
        if size and 'expect' in self.fields and self.version == 'HTTP/1.1':
            self.peer.send(b'HTTP/1.1 100 Continue\r\n\r\n')
        while size:
            piece = min(size, LARGE_BODY)
            self.peer.enter('asking', piece / SLOWEST_BODY)
            yield self.peer.read(piece)
            size -= piece
        self.peer.enter('working')
        self.unread = 0

    def body(self):
        return b''.join(self.blocks())

    def json(self):
        if self.content_type() != JSON:
            raise HTTPError(415, 'Send JSON, with the header Content-Type: application/json.')
        fields = None
        with suppress(ValueError, RecursionError):
            fields = STRICT_JSON.decode(self.body().decode('utf-8'))
        if not isinstance(fields, dict):
            raise HTTPError(400, 'The request must be a JSON object.', 'bad_json')
        return fields


# -- routes and replies


# Of a query: `parse` raises ValueError(what is accepted).
Param = namedtuple('Param', 'name parse default kind', defaults=('', ''))


# `handler` returns a Reply, or a dict to be sent as JSON with `status`; its docstring is the
# summary. `access`: key (where keys are on), link or share (or a signature), open. `limit`: bytes
# of a body, if more than elsewhere.
Route = namedtuple('Route', 'method path handler answer body query errors status limit access',
                   defaults=('Object', '', (), (), 200, 0, 'key'))


def json_reply(body, status):
    text = json.dumps(body, ensure_ascii=False, separators=(',', ':'))
    return Reply(status, text.encode('utf-8', 'replace'))


def brief(status, message, **more):
    return {'status': status, **more, 'message': message, 'timestamp': int(time.time())}


def text_reply(status, sentence):
    return Reply(status, sentence.encode('utf-8', 'replace'), 'text/plain; charset=utf-8')


def parse_name(given):
    """The name of a phone, composed (NFC)."""
    import unicodedata
    name = ''
    if isinstance(given, str) and len(given) <= 256:
        name = unicodedata.normalize('NFC', given).strip()
    if not re.fullmatch(r'[^./\\][^/\\]{0,63}', name) or UNSAFE.search(name):
        raise Refused('bad_name', 'A phone name has 1 to 64 characters, no slash, and does not '
                      'start with a dot.')
    return name


def sign_name(key, name):
    """The right to share under this name: HMAC-SHA256 in base64url."""
    import base64
    import hmac
    digest = hmac.new(key.encode(), name.encode(), 'sha256').digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip('=')


def plain_address(text):
    """IPv4 inside IPv6 (::ffff:1.2.3.4) as IPv4. Raises ValueError."""
    address = ipaddress.ip_address(text.split('%')[0])
    return str(getattr(address, 'ipv4_mapped', None) or address)


def is_at_home(request):
    """On a private network: others do not get our addresses."""
    return is_within(request.client, PRIVATE_NETWORKS)


def match_path(pattern, path):
    """Its parameters, None if it does not match. {id} must look like one of ours."""
    parts = zip(pattern.split('/'), path.split('/'))
    params = {part.strip('{}'): word for part, word in parts if part.startswith('{')}
    if pattern.count('/') != path.count('/') or pattern.format(**params) != path:
        return None
    if 'id' in params and not UUID_PATTERN.fullmatch(params['id']):
        return None
    return params


def shown_percent(record, progress):
    if record['status'] == 'completed':
        return 100
    return min(99, int(getattr(progress, 'percent', 0)))


def status_message(record, percent):
    if record['status'] == 'downloading':
        return f'Downloading: {percent}%.'
    if record['status'] == 'completed':
        return record['note'] or 'The video is ready.'
    wait = (record['next_attempt_at'] or 0) - time.time()
    if record['status'] == 'queued' and wait > 0:
        return f'{record["error_message"]} Trying again in {math.ceil(wait / 60)} min.'
    return record['error_message'] or 'Waiting for its turn.'


def pack_reply(reply, accepted):
    """By gzip, if the client takes it and it fills more than a packet."""
    if len(reply.body) < 1400 or not reply.type.startswith(('text/', JSON)):
        return reply
    headers, body = (*reply.headers, ('Vary', 'Accept-Encoding')), reply.body
    if 'gzip' in accepted.lower().replace(' ', '').split(','):
        import zlib
        packer = zlib.compressobj(wbits=31)
        body = packer.compress(body) + packer.flush()
        headers += (('Content-Encoding', 'gzip'),)
    return reply._replace(headers=headers, body=body)


# -- what is in a body

B_STATUS = {**{state: state.upper() for state in STATES}, 'queued': 'PENDING'}
KINDS = {'': 'string', 'int': 'integer', 'float': 'number', 'bool': 'boolean', 'object': 'object'}
SCHEMAS = {  # objects as words 'name' (a string) or 'name:kind'; ! is required; see schema_of
    'Object': '',
    'Status': {'type': 'string', 'enum': list(STATES)},
    'StatusB': {'type': 'string', 'enum': list(B_STATUS.values())},
    'Timestamp': {'type': ['integer', 'null'], 'minimum': 0,
                  'description': 'only compared: a repeat with the same one is the same link'},
    'Options': {'type': ['array', 'string', 'null'], 'items': {'type': 'string'},
                'description': 'options of yt-dlp, as on its command line; an allowlist'},
    'Counts': {'type': 'object', 'additionalProperties': {'type': 'integer'}},
    'Error': 'status:=error! error! message! code! timestamp:int!',
    'ErrorB': 'errorCode! errorMessage!',
    'Submission': 'url! client_id:? timestamp:Timestamp ytdlp_cli_parameters:Options again:bool?',
    'Name': 'name!',
    'Address': 'address! message! signs:bool!',
    'Shared': 'text url',
    'Batch': 'text! client_id:? timestamp:Timestamp again:bool?',
    'Queued': 'status:Status! download_id! message! timestamp:int!',
    'BatchRow': 'url! download_id error',
    'BatchAnswer': 'status:=queued! message! downloads:[BatchRow! keep! timestamp:int!',
    'Done': 'status! message! timestamp:int! download_id',
    'File': 'name! size:int! type! url! path!',
    'Download': 'download_id! status:Status! url! progress:int! message! error_message:?! '
                'completed_at:int?! title:? site note:? filename:? files:[File file_size:int? '
                'phase:? downloaded:int? speed:float? eta:int? retry_count:int '
                'next_attempt_at:int? client_id created_at:int started_at:int? uploader:? '
                'duration:float? description:? upload_date:? starred:bool public_url:? '
                'thumbnail:? s3:object?',
    'History': 'total:int! message! downloads:[Download! version:int! counts:Counts! '
               'poll_after:int!',
    'Health': 'status! version! uptime:int! queue_size:int! message! problems:[ paused:? '
              'free_disk:int? ytdlp_version:? certificate_days:int? s3:bool keys:bool '
              'preparing:bool cookies:[',
    'Group': 'group! name! posts:int! here:int!',
    'Import': 'import_id! name! state! message! left:int! completed:int! failed:int! '
              'groups:[Group! created_at:int! pace:int!',
    'Imports': 'imports:[Import! message!',
    'ImportStart': {'type': 'object', 'properties': {'only': {
        'type': ['array', 'null'], 'items': {'enum': list(GROUP_NAMES)}}}},
    'Initiate': 'videoURL! ytdlpCLIParameters:Options again:bool?',
    'Initiated': 'downloadUUID!',
    'Listed': 'downloadUUID! downloadStatus:StatusB! downloadSizeInBytes:int progress:int',
    'Listing': 'downloads:[Listed!',
    'PublicURL': 'publicURL!',
}


def schema_of(kind):
    """A JSON schema of int, int? (or null), Name, [Name (a list), =constant; see KINDS."""
    if kind.startswith('='):
        return {'const': kind[1:]}
    if kind.startswith('['):
        return {'type': 'array', 'items': schema_of(kind[1:])}
    if kind[:1].isupper():
        return {'$ref': f'#/components/schemas/{kind}'}
    if kind.endswith('?'):
        return {'type': [KINDS[kind[:-1]], 'null']}
    return {'type': KINDS[kind]}


def object_schema(words):
    if not isinstance(words, str):
        return words
    properties, required = {}, []
    for word in words.split():
        name, _, kind = word.rstrip('!').partition(':')
        properties[name] = schema_of(kind)
        if word.endswith('!'):
            required.append(name)
    return {'type': 'object', 'properties': properties, 'required': required}


DOWNLOAD_FIELDS = tuple(object_schema(SCHEMAS['Download'])['properties'])


# -- from a request to a reply


class App:
    """All that handlers need; `more` is the daemon's: routes, assets, health, forget, thumbs..."""

    def __init__(self, config, **more):
        self.config = config
        self.port, self.hosts = 0, ()  # names and addresses that are ours
        vars(self).update(more)
        self.public = urlsplit(config.server.public_base_url or '')
        self.watchers = threading.Semaphore(WATCHERS)
        self.video_waiters = threading.Semaphore(WATCHERS)
        self.wrong_keys = {}  # by address: how many, and when
        self.guard = threading.Lock()  # guards wrong_keys

    def base(self):
        return public_base(self.config, self.port)

    def link(self, path):
        """A path below our base, signed if keys are set."""
        if self.config.api_keys:
            expires = int(time.time()) + self.config.s3.url_expiry
            path += sign_path(self.link_secret, path, expires)
        return path

    def describe(self, record):
        """A download as document A lists it."""
        progress, files = self.board.progress(record['id']), []
        for file in record['files'] * (record['reason'] != 'room'):
            path = self.link(file_path(record['id'], file.name))
            files.append({**file._asdict(), 'url': self.base() + path, 'path': path.lstrip('/')})
        percent = shown_percent(record, progress)
        row = {name: record.get(name, getattr(progress, name, None)) for name in DOWNLOAD_FIELDS}
        row.update(
            download_id=record['id'], files=files, site=site_of(record['url']), progress=percent,
            title=record['title'] or getattr(progress, 'title', None) or None,
            message=status_message(record, percent), retry_count=record['retry_count'] or 0,
            starred=bool(record['starred']))
        if files:
            row['public_url'] = files[0]['url']
            if (self.thumbs / f'{record["id"]}.jpg').exists():
                row['thumbnail'] = self.link(thumbnail_path(record['id'])).lstrip('/')
        if record['s3_state']:
            row['s3'] = {'state': record['s3_state'], 'error': record['s3_error']}
        return row

    def record(self, request):
        try:
            return self.store.get(request.params['id'])
        except LookupError:
            raise HTTPError(404, 'There is no such download.') from None


def check_client(app, request):
    forwarded, server = request.field('x-forwarded-for'), app.config.server
    peer = client = request.peer.address
    if request.peer.admitted and not forwarded:
        return
    for hop in reversed(forwarded.split(',')):
        if not is_within(client, server.trusted_proxies) or not hop.strip():
            break
        try:
            client = plain_address(hop.strip())
        except ValueError:
            raise HTTPError(400, 'X-Forwarded-For has no valid address.') from None
    request.client = client
    allowed = app.config.security.allowed_clients
    by_link = server.host == '::' and allowed == PRIVATE_NETWORKS
    if not is_within(client, allowed) and not (by_link and is_on_link(client)):
        raise HTTPError(403, 'This server does not answer your network.', 'client_not_allowed')
    if not server.tls and not is_within(peer, PRIVATE_NETWORKS):
        raise HTTPError(403, 'Without TLS this server answers private networks only.',
                        'client_not_allowed')
    request.peer.admitted = not forwarded


def check_host_field(app, request):
    """A Host that is not ours is an attack (DNS rebinding) or a mistake."""
    match = HOST_FIELD.fullmatch(request.field('host'))
    if not match:
        raise HTTPError(400, 'The request must name one host.')
    host = match[1].strip('[]').lower().rstrip('.')
    if host not in app.hosts and host != plain_address(request.peer.sock.getsockname()[0]):
        raise HTTPError(421, f'This server is not {host}; if that is its name, add it to '
                        '[server] names.', 'wrong_host')


def check_origin(app, request):
    """Pages of other sites may not change anything: no CORS, and Fetch Metadata if sent."""
    if request.method in ('GET', 'HEAD'):
        return
    origin = request.field('origin').lower()
    scheme, _, host = origin.partition('://')
    hosts = request.field('host').lower(), app.public.netloc.lower()
    ours = scheme in ('https', 'http') and host in hosts
    site = request.field('sec-fetch-site').lower()
    if (origin and not ours) or site not in ('', 'same-origin', 'none'):
        raise HTTPError(403, 'Pages of other sites may not use this server. If this is its own '
                        'page behind a proxy, set [server] public_base_url.', 'foreign_origin')


def is_signed(app, name, signature):
    import hmac
    sent = signature.encode('utf-8', 'replace')
    return any([hmac.compare_digest(sign_name(key, name).encode(), sent)
                for key in app.config.api_keys])


def slow_down(app, client):
    """Who guesses keys waits longer each time; a right key never waits."""
    if ':' in client:  # a home has 2^64 addresses
        client = str(ipaddress.ip_network(f'{client}/64', strict=False))
    now = time.monotonic()
    with app.guard:
        times, last = app.wrong_keys.pop(client, (0, now))
        times *= now - last < 600  # seconds
        app.wrong_keys[client] = (times + 1, now)
        if len(app.wrong_keys) > 1000:
            del app.wrong_keys[next(iter(app.wrong_keys))]
    time.sleep(min(WRONG_KEY_DELAY * 2 ** min(times, 10), 2.0))


def has_key(app, request):
    """Whether the request has one of the keys; true if none are set."""
    if not app.config.api_keys:
        return True
    import hmac  # it loads every digest of OpenSSL: 0.6 MB
    sent = request.field('x-api-key').encode('latin-1', 'replace')
    right = any([hmac.compare_digest(sent, key.encode()) for key in app.config.api_keys])
    if sent and not right:
        slow_down(app, request.client)
    return right


def require_key(app, request):
    if not has_key(app, request):
        raise HTTPError(401, 'Send a valid key in the header X-API-Key.')


def require_link(app, request, path):
    """Ask for the key, unless the request has a signature of `path`."""
    signed = check_signature(app.link_secret, path, request.query, time.time())
    if not signed and 'signature' not in request.query:
        require_key(app, request)
    elif not signed and not has_key(app, request):
        raise HTTPError(403, 'This link has expired or is incomplete; copy it again.', 'bad_link')


def check_share(app, request):
    name, signature = SIGNED_NAME.fullmatch(request.params['who']).groups()
    name = request.params['who'] = parse_name(name)
    if not (signature and is_signed(app, name, signature)) and not has_key(app, request):
        raise HTTPError(401, 'This address is no longer valid. Make a new one on the set-up '
                        'page.')


def below_base(app, path):
    """Without the path of public_base_url, which a proxy may have removed."""
    prefix = app.public.path
    if path.startswith(prefix + '/'):
        return path[len(prefix):]
    return path


def find_route(app, request):
    request.path = below_base(app, decode_path(request.raw_path))
    method, allowed = request.method.replace('HEAD', 'GET'), []
    for route in app.routes:
        request.params = match_path(route.path, request.path)
        if request.params is None:
            continue
        if route.method == method:
            return route
        allowed += [route.method, *['HEAD'] * (route.method == 'GET')]
    if allowed:
        raise HTTPError(405, f'Use {" or ".join(allowed)} here.', 'method_not_allowed',
                        ('Allow', ', '.join(allowed)))
    raise HTTPError(404, 'There is nothing here.')


def parse_query(request, route):
    """The known parameters as they are parsed, others as they are."""
    try:
        given = dict(parse_qsl(
            request.raw_query, keep_blank_values=True, errors='strict', max_num_fields=50))
    except ValueError:
        raise HTTPError(400, 'The query cannot be read.', 'bad_query') from None
    for name, parse, default, _ in route.query:
        try:
            given[name] = parse(given.get(name, default))
        except ValueError as error:
            raise HTTPError(400, f'{name} must be {error}.', 'bad_query') from None
    return given


def pass_gates(app, request):
    check_client(app, request)
    check_host_field(app, request)
    request.unread = size = body_length(request.fields)
    route = find_route(app, request)
    limit = max(app.config.security.max_request_size, route.limit)
    if size > limit:
        raise HTTPError(413, f'The request is over {format_size(limit)}.')
    if request.field('expect').lower() not in ('', '100-continue'):
        raise HTTPError(417, 'The header Expect is not supported.')
    check_origin(app, request)
    if route.access == 'share':
        check_share(app, request)
    if route.access == 'key':
        require_key(app, request)
    request.query = parse_query(request, route)
    if not route.body:
        request.body()  # read and dropped, so that the connection can stay open
    reply = route.handler(app, request)
    return json_reply(reply, route.status) if isinstance(reply, dict) else reply


def as_http_error(request, error):
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, Refused):
        status = {'domain_not_allowed': 403, 'rate_limited': 429}.get(error.code, 400)
        headers = [('Retry-After', str(error.wait))] * bool(error.wait)
        return HTTPError(status, str(error), error.code, *headers)
    if isinstance(error, StoreDown):
        return HTTPError(503, error.sentence, 'cannot_store')
    if isinstance(error, OSError):
        return HTTPError(503, f'The disk reported an error: {error.strerror}.', 'disk_error')
    log.exception('request: %s %s: failed', request.method, request.shown_path)
    return HTTPError(500, 'Something went wrong in the server; see its log.', 'internal')


def refuse(app, raw_path, error):
    """An error in the dialect of the path; below /share it is one sentence."""
    path, message = below_base(app, unquote(raw_path)), str(error)
    reply = json_reply(brief('error', message, error=message, code=error.code), error.status)
    if (path + '/').startswith('/share/'):
        reply = text_reply(error.status, message)
    if B_PATH.match(path):
        reply = json_reply({'errorCode': error.code, 'errorMessage': message}, 418)
    return reply._replace(headers=error.headers)


def respond(app, request):
    started = time.monotonic()
    try:
        reply = pass_gates(app, request)
    except ConnectionError:  # nobody to answer
        raise
    except Exception as error:
        reply = refuse(app, request.raw_path, as_http_error(request, error))
    tell = log.info  # for what somebody did, not for a page that polls
    if reply.status < 400 and request.method in ('GET', 'HEAD'):
        tell = log.debug
    tell('%s "%s %s" %d %.1fms%s', request.client, request.method, request.shown_path,
         reply.status, (time.monotonic() - started) * 1000, request.note)
    if app.config.api_keys and reply.type == JSON:
        return reply  # signed links beside the titles of strangers: no BREACH
    return pack_reply(reply, request.field('accept-encoding'))


# -- what OpenAPI says

COMMON_ERRORS = {400, 403, 408, 411, 413, 414, 417, 421, 431, 500, 501, 503}


def content_of(answer):
    """Of a media type, or of JSON by a row of SCHEMAS."""
    if '/' in answer:
        return {answer: {'schema': {'type': 'string'} if 'json' not in answer else {}}}
    return {JSON: {'schema': schema_of(answer)}}


def responses_of(route, keys):
    """By every status that the route can answer with."""
    statuses = {route.status, *COMMON_ERRORS, *route.errors, *[415] * bool(route.body),
                *[401] * (keys and route.access != 'open'), *[404] * ('{' in route.path)}
    bad = 'Error'
    if B_PATH.match(route.path):
        statuses, bad = {200, 418}, 'ErrorB'
    if route.access == 'share':
        bad = 'text/plain'
    found = {}
    for status in sorted(statuses):
        answer = bad
        if status == route.status or status < 400 and bad == 'Error':
            answer = route.answer
        told = found[str(status)] = {'description': http.client.responses[status]}
        if status != 304:
            told['content'] = content_of(answer)
    return found


def operation_of(route, keys):
    parameters = [{'name': name, 'in': 'path', 'required': True, 'schema': schema_of('')}
                  for name in re.findall(r'{(\w+)}', route.path)]
    parameters += [{'name': param.name, 'in': 'query', 'schema': schema_of(param.kind)}
                   for param in route.query]
    found = {
        'summary': ' '.join(route.handler.__doc__.split()),
        'operationId': re.sub(r'\W+', '_', f'{route.method.lower()}{route.path}').strip('_'),
        'parameters': parameters, 'responses': responses_of(route, keys)}
    if route.body:
        content = content_of(route.body)
        if route.access == 'share':
            content.update(content_of('text/plain'))
        found['requestBody'] = {'required': True, 'content': content}
    if keys and route.access == 'key':
        found['security'] = [{'key': []}]
    return found


def describe_api(routes, keys, base):
    """OpenAPI 3.1 of all routes; `security` only if keys are set."""
    paths = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = operation_of(route, keys)
    components = {'schemas': {name: object_schema(words) for name, words in SCHEMAS.items()}}
    if keys:
        components['securitySchemes'] = {
            'key': {'type': 'apiKey', 'in': 'header', 'name': 'X-API-Key'}}
    return {'openapi': '3.1.0', 'info': {'title': 'videoserverd', 'version': VERSION},
            'servers': [{'url': base}], 'paths': paths, 'components': components}


# -- handlers, document A


def store_links(app, links, window=0):
    """Store in one commit and queue: for each a Stored or Refused. A post whose files are gone is
    fetched again."""
    now, started = int(time.time()), time.monotonic()
    folder = app.config.downloads.output_directory
    results = app.store.add_many(links, now, window)
    for number, (link, stored) in enumerate(zip(links, results)):
        done = (isinstance(stored, Stored) and stored.same_post and stored.status == 'completed'
                and not app.scheduler.paused)
        if done and not all((folder / name).is_file() for name in stored.files):
            again = link._replace(options=(*link.options, ('again', None)))
            stored = results[number] = app.store.add_many([again], now)[0]
        if isinstance(stored, Stored) and stored.status == 'queued':
            # A repeat too: the commit of the first one may have been reported as failed.
            app.scheduler.push(stored.id)
    app.board.observe(time.monotonic() - started)
    return results


def queued_message(app, sentence):
    why = (app.scheduler.paused or '').partition(' Fix:')[0]
    return sentence + f'. The queue is paused: {why}' * bool(why)


SAID_BEFORE = {'queued': 'It is on its way', 'downloading': 'It is on its way',
               'completed': 'You already have this video', 'failed': 'This link was sent before'}


def store_every_link(app, request, fields, name='text', window=0):
    """Store every link in the field `name`: each as written, with its Stored or its refusal; and
    the links beyond MOST_LINKS. Raises a refusal if none is stored."""
    fields = {'again': request.query['again'], **fields}
    items, rest = parse_batch(fields, app.config.security, name)
    links = [item for _, item in items if isinstance(item, Submission)]
    results = iter(())
    if links:
        last = links[-1]
        request.note = f' client_id={last.client_id} url={last.url} links={len(items)}'
        results = iter(store_links(app, links, window))
    rows = [(written, next(results) if isinstance(item, Submission) else item)
            for written, item in items]
    refused = [item for _, item in rows if not isinstance(item, Stored)]
    if len(refused) == len(rows):
        raise max(refused, key=lambda error: error.code == 'rate_limited')  # that one passes
    return rows, rest


def store_first(app, request, fields):
    """The first Stored of the links in the field `url`."""
    rows, _ = store_every_link(app, request, fields, 'url')
    return next(item for _, item in rows if isinstance(item, Stored))


def post_download(app, request):
    """Queue a link."""
    stored = store_first(app, request, request.json())
    code, message = 202, queued_message(app, 'Video queued for download')
    if not stored.fresh:
        code, message = 200, SAID_BEFORE[stored.status]
    return json_reply(brief(stored.status, message, download_id=stored.id), code)


def post_downloads(app, request):
    """Queue every link in a text, in one commit; `keep` has those to send again."""
    found, keep = store_every_link(app, request, request.json())
    rows, limited = [], []
    for written, item in found:
        if isinstance(item, Stored):
            rows.append({'url': written, 'download_id': item.id})
            continue
        rows.append({'url': written, 'error': str(item)})
        limited += [written] * bool(item.wait)
    queued = sum('download_id' in row for row in rows)
    message = queued_message(app, f'{queued} queued, {len(rows) - queued} refused')
    return brief('queued', message, downloads=rows, keep='\n'.join(limited + keep))


def get_status(app, request):
    """One download."""
    return app.describe(app.record(request))


@contextmanager
def place_in(places):
    """Whether a place was free; the block holds it."""
    free = places.acquire(blocking=False)
    try:
        yield free
    finally:
        if free:
            places.release()


def get_history(app, request):
    """Downloads, newest first; with `since`, a version, it waits for news."""
    query, poll_after = request.query, 0
    if query['since'] == app.board.version:
        with place_in(app.watchers) as free:
            app.board.wait(query['since'], query['wait'] * free)
        poll_after = 3 * (not free)
    version = app.board.version
    total, records = app.store.page(
        query['limit'], query['offset'], query['status'] or '', query['q'])
    return {'total': total, 'message': f'{total} downloads', 'version': version,
            'downloads': list(map(app.describe, records)), 'counts': app.store.counts(),
            'poll_after': poll_after}


def get_health(app, request):
    """Server health; without a key, where keys are set, only four fields."""
    facts = app.health()
    storing = facts.pop('storing')
    facts['message'] = ' '.join(facts['problems']) or 'All is well.'
    if not has_key(app, request):
        facts = {name: facts[name] for name in ('status', 'version', 'uptime', 'queue_size')}
        facts['message'] = f'The server is {facts["status"]}.'
    if storing:
        return facts
    error = HTTPError(503, 'The server cannot store links at the moment.', 'cannot_store')
    facts.update(brief('error', str(error), error=str(error), code=error.code))
    return json_reply(facts, 503)._replace(headers=error.headers)


def post_cancel(app, request):
    """Stop it."""
    if not app.scheduler.cancel(app.record(request)['id']):
        status = app.record(request)['status']
        raise HTTPError(409, f'It is now {status}, so it cannot be cancelled.', 'not_running')
    return get_status(app, request)


def post_retry(app, request):
    """Queue it again."""
    record = app.record(request)
    if not app.store.move('retry', record['id'], int(time.time())):
        raise HTTPError(409, f'Only a failed or waiting download can be retried; this one is '
                        f'{record["status"]}.', 'not_failed')
    app.scheduler.push(record['id'])
    return get_status(app, request)


def post_star(app, request):
    """Add or remove a star; starred downloads are never deleted to make room."""
    app.store.star(app.record(request)['id'], request.path.endswith('/star'))
    app.board.post(request.params['id'])
    return get_status(app, request)


def delete_download(app, request):
    """Forget it and, unless files=keep, delete its files."""
    record = app.record(request)
    if record['status'] == 'downloading':
        app.scheduler.cancel(record['id'])
        record = app.record(request)
    if not app.forget(record, request.query['files']):
        raise HTTPError(409, 'It cannot be stopped at the moment; try again.', 'still_running')
    return brief('deleted', 'Deleted', download_id=record['id'])


def get_thumbnail(app, request):
    """A thumbnail."""
    download_id = request.params['id']
    require_link(app, request, thumbnail_path(download_id))
    try:
        data = (app.thumbs / f'{download_id}.jpg').read_bytes()
    except OSError:
        raise HTTPError(404, 'It has no thumbnail.') from None
    return Reply(200, data, 'image/jpeg', (('Cache-Control', 'private, max-age=86400'),))


def put_cookies(app, request):
    """Store a browser's cookies for the allowed sites; used if cookies_file is empty."""
    cookies = Cookies(app.config)
    cookies.save(request.body())
    return brief('stored', '\n'.join(told for _, told in cookies.report(time.time())))


def delete_cookies(app, request):
    """Remove the stored cookies."""
    Cookies(app.config).remove()
    return brief('deleted', 'The cookies are removed.')


def post_update(app, request):
    """Look for a newer yt-dlp now."""
    app.update()
    return brief('updating', 'The newest yt-dlp is being fetched.')


def import_reply(app, import_id):
    try:
        return app.imports.get(import_id)
    except LookupError:
        raise HTTPError(404, 'There is no such import.') from None


def post_import(app, request):
    """Send an export of TikTok or Instagram, or a text with links, and see what is in it."""
    name, client_id = excerpt(request.query['name'], 80), parse_name(request.query['client_id'])
    return import_reply(app, app.imports.receive(name, client_id, request.blocks()))


def get_imports(app, request):
    """All imports."""
    found = app.imports.all()
    return {'imports': found, 'message': f'{len(found)} imports'}


def change_import(app, request):
    """Start it, with the groups in `only` or all but the history; pause, resume or cancel it."""
    import_reply(app, request.params['id'])
    *_, verb = request.path.split('/')
    only = request.json().get('only') if verb == 'start' else ()
    if only and not (isinstance(only, list) and set(map(str, only)) <= GROUP_NAMES.keys()):
        raise HTTPError(400, f'`only` lists some of {", ".join(GROUP_NAMES)}.', 'bad_field')
    if not app.imports.change(request.params['id'], verb, only):
        raise HTTPError(409, f'This import cannot {verb} now.', 'wrong_state')
    if verb == 'cancel':
        return brief('cancelled', 'The import is removed; what has arrived stays.')
    return import_reply(app, request.params['id'])


def share_address(app, name):
    """Where a phone of that name sends its links, with the right to where keys are on."""
    address = f'{app.base()}/share/{quote(name, safe="")}'
    for key in app.config.api_keys[:1]:
        address += '.' + sign_name(key, name)
    return address


def post_share_address(app, request):
    """The share address for a phone of that name."""
    name = parse_name(request.json().get('name'))
    return {'address': share_address(app, name), 'signs': bool(which('shortcuts')),
            'message': f'The address for {name}'}


def get_shortcut(app, request):
    """A signed Shortcut with this address in it, where the server is a Mac."""
    data = app.shortcut(share_address(app, request.params['who']))
    if not data:
        raise HTTPError(404, 'Only a Mac can sign a Shortcut; make it by hand.')
    return Reply(200, data, 'application/octet-stream', (
        ('Content-Disposition', content_disposition('Save video.shortcut')),))


def get_metrics(app, request):
    """Metrics for Prometheus."""
    lines = []
    for name, figure in app.gauges():
        family, kind = name.partition('{')[0], 'gauge'
        if family.endswith('_total'):
            kind = 'counter'
        if name.startswith('videoserverd_ack_seconds'):
            family, kind = 'videoserverd_ack_seconds', 'histogram'
        line = f'# TYPE {family} {kind}\n'
        lines += [line] * (line not in lines)
        lines.append(f'{name} {figure!r}\n')
    return Reply(200, ''.join(lines).encode(), 'text/plain; version=0.0.4; charset=utf-8')


def fill_xml(template, **texts):
    escaped = {name: html.escape(UNSAFE.sub(' ', str(text))) for name, text in texts.items()}
    return template.format(**escaped)


ENCLOSURE = '<link rel="enclosure" href="{url}" type="{type}" length="{size}"/>'


def feed_head(own_id, title, seconds, rel, url):
    return fill_xml('<id>{id}</id><title>{title}</title><updated>{updated}</updated>'
                    '<link rel="{rel}" href="{url}"/>', id=own_id, title=title, rel=rel, url=url,
                    updated=time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(seconds)))


def get_feed(app, request):
    """The newest finished downloads as an Atom feed (RFC 4287). Where keys are set, its self link
    is signed, for programs that cannot send a key."""
    if not is_signed(app, '/feed.xml', request.query['signature']):
        require_key(app, request)
    address = own = app.base() + '/feed.xml'
    for key in app.config.api_keys[:1]:
        own += '?signature=' + sign_name(key, '/feed.xml')
    feed = ['<?xml version="1.0" encoding="utf-8"?><feed xmlns="http://www.w3.org/2005/Atom">',
            feed_head(address, 'Videos', time.time(), 'self', own),
            '<author><name>videoserverd</name></author>']
    for row in map(app.describe, app.store.page(50, 0, 'completed')[1]):
        if row['files']:
            title = row['title'] or row['filename']
            feed += ['<entry>', feed_head(f'urn:uuid:{row["download_id"]}', title,
                                          row['completed_at'], 'alternate', row['url'])]
            feed += [fill_xml(ENCLOSURE, **file) for file in row['files']] + ['</entry>']
    return Reply(200, '\n'.join([*feed, '</feed>']).encode(), 'application/atom+xml; charset=utf-8')


def get_openapi(app, request):
    """This description."""
    return describe_api(app.routes, bool(app.config.api_keys), app.base())


def get_asset(app, request):
    """Part of the page."""
    media, content = app.assets[request.path]
    if callable(content):
        content = content(request)
    if isinstance(content, str):
        content = content.encode()
    csp = CSP.format(images=app.image_origin * is_at_home(request))
    headers = ('Content-Security-Policy', csp), ('Cache-Control', 'no-cache')
    if media == 'image/png':  # the plain page of `phone` asks for it, too
        headers += ('Cross-Origin-Resource-Policy', 'cross-origin'),
    return Reply(200, content, media, headers)


# -- handlers, document B


def initiate_download(app, request):
    """Queue a link."""
    fields = known_fields(request.json())
    if 'videourl' not in fields:
        raise HTTPError(400, 'videoURL is missing.', 'bad_field')
    fields.update(url=fields['videourl'], client_id=None, timestamp=None,
                  ytdlp_cli_parameters=fields.get('ytdlpcliparameters'))
    return {'downloadUUID': store_first(app, request, fields).id}


def list_downloads(app, request):
    """Downloads of the last minutes."""
    since, rows = int(time.time()) - 60 * request.query['overLastPeriodDurationInMinutes'], []
    for record in app.store.since(since, request.query['onlyShowOngoingDownloads']):
        progress = app.board.progress(record['id'])
        row = {'downloadUUID': record['id'], 'downloadStatus': B_STATUS[record['status']]}
        size = record['file_size'] or getattr(progress, 'total', None)
        if size:
            row['downloadSizeInBytes'] = size
        if progress or record['status'] == 'completed':
            row['progress'] = shown_percent(record, progress)
        rows.append(row)
    return {'downloads': rows}


def get_public_url(app, request):
    """A link to the finished file."""
    request.params['id'] = request.query['videoDownloadUUID']
    record = app.record(request)
    state, why = record['status'], record['error_message']
    in_bucket = request.query['URLTypeEnum'] == 'S3' and state == 'completed'
    if in_bucket and app.bucket is None:
        raise HTTPError(409, 'No object storage is set up; see [s3] endpoint.', 's3NotConfigured')
    if in_bucket:
        state, why = record['s3_state'], record['s3_error']
    elif record['reason'] == 'room':
        state, why = 'failed', record['note']
    if state == 'failed':
        raise HTTPError(409, why or 'The download failed.', 'downloadFailed')
    if state not in ('completed', 'stored'):
        raise HTTPError(409, why or 'It is not finished yet.', 'downloadNotReady')
    url, name = app.describe(record)['public_url'], record['filename']
    if in_bucket:
        key = app.bucket.key(record['id'], name)
        url = app.bucket.presign(key, name, app.config.s3.url_expiry, time.time())
    return {'publicURL': url}


# -- finished files


def open_regular(path):
    """A regular file, never through a link, and its os.stat_result."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    with suppress(OSError):  # gone, a link or a folder: all the same to the client
        handle = open(os.open(path, flags), 'rb', buffering=0)
        facts = os.fstat(handle.fileno())
        if stat.S_ISREG(facts.st_mode):
            return handle, facts
        handle.close()
    raise HTTPError(404, 'The file is no longer in the output folder.', 'file_gone')


def parse_range(header, size):
    """(first, last) byte; None: the whole file, as no single range is asked for."""
    match = re.fullmatch(r'bytes\s*=\s*(\d{0,18})-(\d{0,18})', header, re.A | re.I)
    if not match or not any(match.groups()):
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size - 1
    if last and int(last) < int(first):
        return None
    return int(first), min(int(last or size), size - 1)


def is_unchanged(request, etag, modified):
    """The client has this version of the file (RFC 9110 section 13.1)."""
    known = request.field('if-none-match')
    if not known:
        return request.field('if-modified-since') == modified
    return known == '*' or etag in [tag.strip().replace('W/', '', 1) for tag in known.split(',')]


def send_file(request, path, media, headers):
    """All of it, a part, or 304 Not Modified."""
    handle, facts = open_regular(path)
    size, etag = facts.st_size, f'"{facts.st_size:x}-{facts.st_mtime_ns:x}-{facts.st_ino:x}"'
    modified = formatdate(facts.st_mtime, usegmt=True)
    headers = (*headers, ('Accept-Ranges', 'bytes'), ('ETag', etag), ('Last-Modified', modified))
    if is_unchanged(request, etag, modified):
        handle.close()
        return Reply(304, b'', '', headers)
    span = None
    if request.method == 'GET' and request.field('if-range') in ('', etag, modified):
        span = parse_range(request.field('range'), size)
    if not span:
        return Reply(200, b'', media, headers, Body(handle, 0, size))
    start, end = span
    if start >= size:
        handle.close()
        raise HTTPError(416, 'The file is shorter than that.', 'bad_range',
                        ('Content-Range', f'bytes */{size}'))
    headers += (('Content-Range', f'bytes {start}-{end}/{size}'),)
    return Reply(206, b'', media, headers, Body(handle, start, end - start + 1))


def reply_with_file(app, request, file):
    """Sent by the proxy if it can read the folder, else by us."""
    headers = (('Content-Disposition', content_disposition(os.path.basename(file.name))),
               ('Cache-Control', 'private, no-cache'))
    server = app.config.server
    if server.accel_redirect and is_within(request.peer.address, server.trusted_proxies):
        inner = server.accel_redirect + quote(file.name)
        return Reply(200, b'', file.type, (*headers, ('X-Accel-Redirect', inner)))
    folder = app.config.downloads.output_directory
    return send_file(request, folder / file.name, file.type, headers)


def get_file(app, request):
    """A finished file: Range, If-Range, If-None-Match (RFC 9110 sections 13 and 14)."""
    require_link(app, request, file_path(request.params['id'], request.params['name']))
    for file in app.record(request)['files']:
        if os.path.basename(file.name) == request.params['name']:  # no link has folders
            return reply_with_file(app, request, file)
    raise HTTPError(404, 'There is no such file.')


# -- the Shortcut of two actions


def read_shared_text(request):
    """What a phone sends: JSON with the field text or url, else any text; of a form too, as its
    links are all that counts."""
    media = request.content_type()
    if media != JSON:
        text = request.body().decode('utf-8', 'replace')
        if media == 'application/x-www-form-urlencoded':
            text = '\n'.join(value for _, value in parse_qsl(text))
        return text
    fields = known_fields(request.json())
    found = fields.get('text', fields.get('url'))
    if not isinstance(found, str):
        raise Refused('bad_field', 'The field "text" is missing.')
    return found


def store_shared(app, request):
    """Store what was shared: the first link's id, and what the phone is told; 202 for a new one."""
    fields = {'text': read_shared_text(request), 'client_id': request.params['who']}
    rows, _ = store_every_link(app, request, fields, window=REPEAT_SECONDS)
    saved = [item for _, item in rows if isinstance(item, Stored)]
    for stored in saved:
        if stored.status == 'failed':
            app.store.move('retry', stored.id, int(time.time()))
            app.scheduler.push(stored.id)
    code, sentence = 200, 'Saved'
    if len(saved) > 1:
        sentence = f'{len(saved)} videos saved'
    if len(rows) > len(saved):
        sentence += f', {len(rows) - len(saved)} refused'
    if any(stored.fresh for stored in saved):
        code, sentence = 202, queued_message(app, sentence)
    elif len(rows) == 1 and saved[0].status != 'failed':
        sentence = SAID_BEFORE[saved[0].status]
    return saved[0].id, text_reply(code, sentence + '.')


def post_share(app, request):
    """Share a link from a phone."""
    return store_shared(app, request)[1]


def wait_for_end(app, request, seconds):
    """The download once completed or failed, or as it is after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        version, record = app.board.version, app.record(request)
        left = end - time.monotonic()
        over = record['status'] in ('completed', 'failed') or left <= 0
        if over or not app.board.wait(version, left):
            return record


def post_share_video(app, request):
    """Share a link, and get the finished file itself if that does not take too long."""
    request.params['id'], told = store_shared(app, request)
    with place_in(app.video_waiters) as free:
        record = wait_for_end(app, request, VIDEO_SECONDS * free)
    if record['status'] == 'completed' and record['files']:
        return reply_with_file(app, request, record['files'][0])
    if record['status'] == 'failed':
        return text_reply(502, record['error_message'])
    return text_reply(202, told.body.decode() + ' It is not ready yet; check the page later.')


def get_share(app, request):
    """Whether a link came from this phone in the last `within` seconds."""
    name = request.params['who']
    record = app.store.first_of(name, int(time.time()) - request.query['within'])
    if record is None:
        return text_reply(202, f'Nothing has arrived from {name} yet.')
    return text_reply(200, f'It works: a link to {site_of(record["url"])} arrived from {name}.')


# -- the table of routes

AGAIN = (Param('again', one_of({'1': True, '0': False}), '0'),)
ID = '/api/v1/download/{id}'
IMPORT = '/api/v1/imports/{id}'
ROUTES = (
    Route('POST', '/api/v1/download', post_download, 'Queued', 'Submission', AGAIN,
          (200, 429), 202),
    Route('POST', '/api/v1/downloads', post_downloads, 'BatchAnswer', 'Batch', AGAIN,
          (429,), 202, LARGE_BODY),
    Route('GET', '/api/v1/status/{id}', get_status, 'Download'),
    Route('GET', '/api/v1/history', get_history, 'History', query=(
        Param('limit', whole(1, 200), '50', 'int'),
        Param('offset', whole(0, 999999999), '0', 'int'), Param('q', lambda q: q[:200]),
        Param('status', optional(one_of(dict(zip(STATES, STATES))))),
        Param('since', optional(whole(0, 999999999)), '', 'int'),
        Param('wait', whole(0, 25), '25', 'int'))),
    Route('GET', '/api/v1/health', get_health, 'Health', access='open'),
    Route('GET', '/api/v1/thumbnail/{id}', get_thumbnail, 'image/jpeg', access='link'),
    Route('POST', ID + '/cancel', post_cancel, 'Download', errors=(409,)),
    Route('POST', ID + '/retry', post_retry, 'Download', errors=(409,)),
    *(Route('POST', f'{ID}/{verb}', post_star, 'Download') for verb in ('star', 'unstar')),
    Route('DELETE', ID, delete_download, 'Done', errors=(409,), query=(
        Param('files', one_of({'keep': True, 'delete': False}), 'delete'),)),
    Route('PUT', '/api/v1/cookies', put_cookies, 'Done', 'text/plain', limit=LARGE_BODY),
    Route('DELETE', '/api/v1/cookies', delete_cookies, 'Done'),
    Route('POST', '/api/v1/update', post_update, 'Done', status=202),
    Route('GET', '/api/v1/imports', get_imports, 'Imports'),
    Route('POST', '/api/v1/imports', post_import, 'Import', 'application/octet-stream',
          (Param('name', str, 'export'), Param('client_id', str, 'import')),
          limit=LARGEST_EXPORT),
    Route('POST', IMPORT + '/start', change_import, 'Import', 'ImportStart', errors=(409,)),
    *(Route('POST', f'{IMPORT}/{verb}', change_import, 'Import', errors=(409,))
      for verb in ('pause', 'resume')),
    Route('POST', IMPORT + '/cancel', change_import, 'Done', errors=(409,)),
    Route('POST', '/api/v1/share-address', post_share_address, 'Address', 'Name'),
    Route('POST', '/share/{who}', post_share, 'text/plain', 'Shared', AGAIN, (200, 429), 202,
          access='share'),
    Route('POST', '/share/{who}/video', post_share_video, '*/*', 'Shared', AGAIN,
          (202, 429, 502), access='share'),
    Route('GET', '/share/{who}/shortcut', get_shortcut, '*/*', access='share'),
    Route('GET', '/share/{who}', get_share, 'text/plain', '', (
        Param('within', whole(1, 999999999), '999999999', 'int'),), (202,), access='share'),
    Route('GET', '/files/{id}/{name}', get_file, '*/*', errors=(206, 304, 416), access='link'),
    Route('GET', '/feed.xml', get_feed, 'application/atom+xml', '', (Param('signature', str),),
          access='link'),
    Route('GET', '/metrics', get_metrics, 'text/plain'),
    Route('GET', '/openapi.json', get_openapi),
    Route('POST', '/initiateDownload', initiate_download, 'Initiated', 'Initiate', AGAIN),
    Route('GET', '/listDownloads', list_downloads, 'Listing', query=(
        Param('overLastPeriodDurationInMinutes', whole(0, 99999999), '60', 'int'),
        Param('onlyShowOngoingDownloads', one_of({'true': True, 'false': False}), 'false'))),
    Route('GET', '/getVideoDownloadPublicURL', get_public_url, 'PublicURL', query=(
        Param('videoDownloadUUID', str),
        Param('URLTypeEnum', one_of({'https': 'HTTPS', 's3': 'S3'})))),
)


# -- connections


@functools.lru_cache(maxsize=64)  # most answers within a second start alike
def fixed_head(status, media, headers, keep, now):
    """Status line and header fields without the length; no value can end its line."""
    fields = {'Date': formatdate(now, usegmt=True), **SAME_HEADERS, **dict(headers),
              'Connection': 'keep-alive' if keep else 'close', 'Content-Type': media}
    lines = [f'{name}: {LINE_END.sub("", text)}\r\n' for name, text in fields.items() if text]
    first = f'HTTP/1.1 {status} {http.client.responses[status]}\r\n'
    return (first + ''.join(lines)).encode('latin-1', 'replace')


def format_head(reply, keep):
    head = fixed_head(reply.status, reply.type, reply.headers, keep, int(time.time()))
    size = reply.file.size if reply.file else len(reply.body)
    if reply.status != 304:
        head += b'Content-Length: %d\r\n' % size
    return head + b'\r\n'


class Peer:
    """A connection: its socket, its client, what it is doing, and since when. Its thread runs
    `serve`; the reading is ours, as http.server is lenient where a proxy may read otherwise."""

    def __init__(self, sock, address):
        self.sock, self.address = sock, address
        self.buffer = bytearray()  # what has come and was not yet read
        self.admitted = False  # its address was found to be an allowed client's
        self.enter('new')

    def enter(self, state, further=0.0):
        """Do this for at most what PEER_STATES allow plus `further` seconds; then the accepting
        thread cuts it off: a socket timeout would cost two system calls."""
        self.state, self.since = state, time.monotonic()  # as is `deadline`
        self.deadline = self.since + PEER_STATES[state][0] + further

    def serve(self, _, server):
        """Called as if it were a handler's class."""
        if server.context is not None:
            self.sock = server.context.wrap_socket(
                self.sock, server_side=True, do_handshake_on_connect=False)
            self.sock.do_handshake()
        while self._answer_next(server):
            pass

    def _answer_next(self, server):
        """Whether that was not the last one."""
        request, head = None, b''
        if not self.buffer:
            self.read_more()
        try:
            if b'\r\n\r\n' not in self.buffer:
                self.enter('asking')
            head = self.read_head()
            request = Request(head, self)
            self.enter('working')
            reply = respond(server.app, request)
        except HTTPError as error:
            words = (head or self.buffer)[:LINE_LIMIT].decode('latin-1').split(' ')
            reply = refuse(server.app, ''.join(words[1:2]), error)
            log.info('%s malformed request: %d %s', self.address, error.status, error)
        was_read = request is not None and request.unread == 0  # to its end
        keep = (was_read and request.version == 'HTTP/1.1' and not server.draining
                and 'close' not in request.field('connection').lower()
                and (reply.status < 400 or reply.status in (401, 404, 409, 418, 429))
                and request.method in ('GET', 'HEAD', 'POST', 'PUT', 'DELETE'))
        self._send_reply(reply, keep, request is None or request.method != 'HEAD')
        self.enter('idle' if was_read else 'closing')
        return keep

    def read_more(self):
        try:
            data = self.sock.recv(HEAD_LIMIT)
        except OSError as error:
            raise ConnectionError(str(error)) from None
        if not data and self.state == 'asking' and self.deadline < time.monotonic():
            raise HTTPError(408, 'The request came too slowly.', 'timeout')
        if not data:
            raise ConnectionError('the client left')
        self.buffer += data

    def read(self, size):
        while len(self.buffer) < size:
            self.read_more()
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    def read_head(self):
        while True:
            while self.buffer.startswith(b'\r\n'):  # RFC 9112 section 2.2: skipped
                del self.buffer[:2]
            first, line_end, _ = self.buffer.partition(b'\n')
            if len(first) > LINE_LIMIT:
                raise HTTPError(414, 'The address is too long.')
            end = self.buffer.find(b'\r\n\r\n')
            if 0 <= end <= HEAD_LIMIT:
                return self.read(end + 4)[:-4]
            if len(self.buffer) > HEAD_LIMIT:
                raise HTTPError(431, 'The headers are over 16 KB.')
            if line_end and not first.endswith((b' HTTP/1.1\r', b' HTTP/1.0\r')):
                raise HTTPError(400, 'The first line is not valid HTTP/1.1.')
            if self.buffer.count(b'\n') > self.buffer.count(b'\r\n'):
                raise HTTPError(400, 'The request has a bare line break.')
            self.read_more()

    def send(self, data):
        """All of `data`, a BLOCK at most. Raises OSError, also if the client stops reading."""
        view = memoryview(data)
        while view:
            self.enter('sending')
            view = view[self.sock.send(view):]

    def _send_reply(self, reply, keep, whole_reply):
        try:
            self.send(format_head(reply, keep) + reply.body * whole_reply)
            if reply.file and whole_reply:
                for block in reply.file.blocks():
                    self.send(block)
        finally:
            if reply.file:
                reply.file.file.close()

    def break_off(self, how=socket.SHUT_RDWR):
        """From any thread: its own then finds it closed. Leaves TLS alone."""
        with suppress(OSError):  # closed already
            socket.socket.shutdown(self.sock, how)

    def part(self):
        """Close with close_notify, for clients that expect it, but never wait for theirs."""
        with suppress(OSError, ValueError):  # it was sent as far as the client let us
            self.sock.settimeout(0)
            if isinstance(self.sock, ssl.SSLSocket):
                self.sock.unwrap()
        self.break_off(socket.SHUT_WR)
        if self.state == 'closing':
            with suppress(OSError):
                self.sock.settimeout(None)
                while socket.socket.recv(self.sock, HEAD_LIMIT):
                    pass  # unread bytes would make the kernel reset it, and our answer with it


class Server(ThreadingHTTPServer):
    """Accepts and counts connections; when full, closes the one idle for longest. `sock` is
    listening. `context`, None for plain HTTP, may be replaced at any time."""
    block_on_close = False
    draining = False

    def __init__(self, sock, app, context):
        super().__init__(sock.getsockname(), Peer.serve, bind_and_activate=False)
        self.socket.close()
        self.socket, self.app, self.context = sock, app, context
        self.beat = time.monotonic()  # when accepting last came round: for the watchdog
        self._guard = threading.Lock()  # guards _peers, whose descriptors it keeps open as well
        self._peers = set()

    def service_actions(self):
        """At least twice a second: cut off what takes too long. Reading ends first, so that a slow
        client can be told; a second later writing too, as TLS may have to write to read."""
        self.beat = now = time.monotonic()
        with self._guard:
            for peer in self._peers:
                if peer.deadline < now - (peer.state != 'sending'):
                    peer.break_off()
                elif peer.deadline < now:
                    peer.break_off(socket.SHUT_RD)

    def get_request(self):
        """Out of descriptors: make room and wait a moment instead of spinning."""
        try:
            sock, address = self.socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._evict('')
                time.sleep(0.1)
            raise
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Peer(sock, plain_address(address[0])), address[0]

    def verify_request(self, request, client_address):
        """Whether there is room for it, made by closing an idle one."""
        address, proxies = request.address, self.app.config.server.trusted_proxies
        with self._guard:
            addresses = [peer.address for peer in self._peers]
        if len(addresses) >= CONNECTIONS and not self._evict(''):
            return False
        full = addresses.count(address) >= PER_ADDRESS
        if full and not is_within(address, (*LOOPBACK, *proxies)) and not self._evict(address):
            return False
        with self._guard:
            self._peers.add(request)
        return True

    def _evict(self, address):
        """Cut off the one (from this address, unless '') idle for longest."""
        now = time.monotonic()
        with self._guard:
            idle = [peer for peer in self._peers if address in ('', peer.address)
                    and peer.since <= now - PEER_STATES[peer.state][1]]
            if idle:
                oldest = min(idle, key=lambda peer: peer.since)
                self._peers.remove(oldest)
                oldest.break_off()
        return bool(idle)

    def shutdown_request(self, request):
        request.part()
        with self._guard:
            self._peers.discard(request)
            request.sock.close()

    def handle_error(self, request, client_address):
        """A broken connection is nobody's fault, anything else is ours."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            log.debug('%s: connection ended: %s', client_address, error)
        else:
            log.exception('%s: connection failed', client_address)

    def drain(self, seconds):
        """Let requests under way end; the socket stays open."""
        self.draining = True
        self.shutdown()
        end = time.monotonic() + seconds
        while self._peers and time.monotonic() < end:
            with self._guard:
                for peer in self._peers:
                    if peer.state == 'idle':
                        peer.break_off(socket.SHUT_RD)
            time.sleep(0.02)


# ---------- page --------------------------------------------------------------------------
# Owns the web page and the set-up page: raw strings, sent as they are, so that the browser's
# Content-Security-Policy can forbid everything inline. No lock, no state. `daemon` hands ASSETS
# and `setup_page` to http; the `phone` command serves the set-up page over plain HTTP.

# iPhones take no SVG for the Home Screen. 180 pixels, four colours, and room for a launcher's mask.
ICON_PNG = binascii.a2b_base64(
    'iVBORw0KGgoAAAANSUhEUgAAALQAAAC0AgMAAABAo+6hAAAADFBMVEULbl9cnpSuz8r////qMJIJAAABlklEQVR42u3XAY'
    'bDUBDG8UmDIAgAu8gR3hGSc+xl0sPsQi/xeoQ9QtADLIpi21kF/WPaD4qy8wO8TOPl6zOZWCyllFJK6W1382nCxmkrqnun'
    'VVQXp5Oonpx+RfXidBbV1enypHuL6ic85eh0fOq/0zrtRXWjzwk5mbLoAKHIQ0WDDJB6GSC1MkBqdIBUZYC0yACpyABpkA'
    'FSJwOkVgcYRjibZlUGSIsMkIoOMIjwx4iokwHSRgZIjQ6QquyYNCFArTBAaVABBhF+m4AIEaDQMECtMkBpYoDSyAClgQFK'
    'nesAm92MCLdYjfS+IsIZq5Fyez3WW4ATnxdYEv7QCD1h9CNXA9zsxrdcjavZ3hHPLO6N1X9RndWvc07UTuButUXCvtqymm'
    'rUcjr2T6pROxtYTUs0v4zstjRFFxaO7FSiB7rbm0eEgkiwPep5BXdYLdIFb5sadHK8+A5G7w/mU7/akV/JmZTOcialkxzU'
    'aZVTJu3V3EgXIypi23rjq5zWaFbfi3SUU4/+rsPBoIM99OH0ZSmllFJ6JX8avrCIxc37mQAAAABJRU5ErkJggg==')

MANIFEST = r'''{
  "name": "Video inbox", "short_name": "Videos", "start_url": "./",
  "display": "standalone", "background_color": "#f5f5f1", "theme_color": "#0b6e5f",
  "icons": [{"src": "icon.png", "sizes": "180x180", "purpose": "any maskable"}],
  "share_target": {"action": "./", "enctype": "application/x-www-form-urlencoded", "method": "GET",
                   "params": {"title": "title", "text": "text", "url": "url"}}
}
'''

HEAD = r'''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1, viewport-fit=cover">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="icon.png">
<link rel="apple-touch-icon" href="icon.png">
<link rel="stylesheet" href="page.css">
'''

PAGE_HTML = HEAD + r'''<title>Video inbox</title>
<link rel="manifest" href="manifest.webmanifest">
<script type="module" src="page.js"></script>
</head>
<body>
<header>
  <img class="mark" src="icon.png" alt="" width="36" height="36">
  <h1>Video inbox</h1><a class="button quiet" href="setup">Set up</a>
</header>
<main>
  <p id="old">This page needs JavaScript, and iOS 16 or a browser from 2022 or later.</p>
  <section id="health" aria-label="Health" hidden
    ><h2></h2><ul id="problems"></ul>
    <progress aria-label="Getting ready" hidden></progress>
    <button id="update" class="button quiet" hidden>Update yt-dlp</button></section>
  <form id="add">
    <textarea id="box" rows="1" aria-label="Links" placeholder="Paste links" autocomplete="off"
      autocapitalize="off" spellcheck="false" enterkeyhint="send" aria-describedby="refusal"
    ></textarea>
    <button id="paste" class="button quiet" type="button" hidden>Paste</button>
    <button id="send" class="button">Add</button>
    <p id="refusal" role="alert"></p>
  </form>
  <ul id="outbox" aria-label="Not sent yet" hidden></ul>
  <div id="imports"></div>
  <div id="filters" role="search" hidden>
    <div id="states" role="group" aria-label="Show"></div>
    <div class="field"><input id="search" type="search" aria-label="Search" placeholder="Search"
      enterkeyhint="search" autocomplete="off"><button id="pick" aria-pressed="false"
      >Select</button></div></div>
  <div id="bulk" hidden><b></b> <button value="retry" class="button quiet">Try again</button>
    <button value="clear" class="button quiet">Clear</button>
    <button value="delete" class="button quiet">Delete</button></div>
  <section id="empty" hidden>
    <h2>Nothing here yet</h2>
    <ol><li>Set up your iPhone. It takes about five minutes.</li>
      <li>In TikTok or Instagram tap Share, then Save video.</li>
      <li>Or paste a link into the box above.</li></ol>
    <a class="button" href="setup">Set up a phone</a>
  </section>
  <section id="nothing" hidden><p>No video matches this search and filter.</p>
    <button id="show-all" class="button">Show all videos</button></section>
  <div id="list" role="feed" aria-label="Videos" aria-busy="true"></div>
</main>
<footer>
  <details><summary>Cookies and keys</summary>
    <p>Some posts can be seen only after a login. Export cookies.txt from a browser that is logged
      in and choose the file here.</p>
    <p id="cookies"></p>
    <p class="go"><label class="button quiet">Choose cookies.txt<input id="cookie-file" type="file"
      ></label> <button id="forget-cookies" class="button quiet">Remove the cookies</button>
      <button id="forget" class="button quiet" hidden>Forget the key</button></p></details>
  <details><summary>Bring what you saved in years</summary>
    <p>Ask TikTok or Instagram for your data, as JSON, and choose the zip file here, or drop it on
      this page. You see what is in it before anything is downloaded.</p>
    <p class="go"><label class="button quiet">Choose a file<input id="import-file" type="file"
      ></label></p></details></footer>
<section id="notes" aria-label="News"><p id="pulse"></p><p id="note" role="status"></p>
  <button id="offer" hidden></button><button id="hush" aria-label="Close">✕</button></section>
<dialog id="player" aria-labelledby="player-title"><div class="inside">
  <div class="top"><h2 id="player-title" dir="auto"></h2><p id="place"></p>
    <button value="close">Close</button></div>
  <div id="screen"></div>
  <div class="acts"><button id="prev" value="prev">Previous</button>
    <button id="next" value="next">Next</button>
    <button id="share" value="share" class="quiet">Share</button>
    <button value="save" class="quiet">Save</button>
    <button value="copy">Copy link</button></div></div></dialog>
<dialog id="door" aria-labelledby="door-title"><form id="key-form" method="dialog" class="inside">
  <h2 id="door-title">This server asks for a key</h2><p id="key-text"></p>
  <input id="key" type="password" required aria-label="Key" autocomplete="off"
    aria-describedby="key-text"><button class="button">Use this key</button></form></dialog>
<template id="row"><article tabindex="-1">
  <label class="pick"><input type="checkbox" aria-label="Select"></label>
  <div class="thumb"></div>
  <div class="what"><h2 class="title" dir="auto"></h2><p class="meta"></p></div>
  <div class="state"><p class="word"></p><progress max="100"></progress
    ><p class="reason" dir="auto"></p></div>
  <div class="acts"><button value="play" class="quiet">Play</button>
    <button value="share" class="quiet">Share</button>
    <button value="save" class="quiet">Save</button>
    <button value="retry" class="quiet">Try again</button>
    <button value="more" aria-expanded="false">More</button>
    <button value="cancel">Cancel</button>
    <button value="delete">Delete</button></div>
  <div class="acts"><button value="copy">Copy link</button>
    <button value="s3">Copy bucket link</button>
    <button value="star">Star</button> <button value="unstar">Unstar</button>
    <button value="again">Download again</button></div>
</article></template>
<template id="import"><section><h2></h2><p class="meta"></p>
  <div class="acts"><button value="start" class="quiet ready">Start</button>
    <button value="pause" class="running">Pause</button>
    <button value="resume" class="quiet paused">Go on</button>
    <button value="cancel" class="done">Clear</button>
    <button value="cancel" class="ready running paused">Cancel</button></div></section></template>
</body>
</html>
'''

PAGE_CSS = r'''
/* Sizes in rem follow the reader's own. */
:root {
  color-scheme: light dark; accent-color: var(--accent); --gap: 1rem; --paper: #f5f5f1;
  --card: #fff; --ink: #1a1d1a; --soft: #5a605a; --line: #8883; --edge: #808780;
  --accent: #0b6e5f; --tint: #e2f0ec; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #111412; --card: #1b1f1c; --ink: #edf0ec; --soft: #a5aca5; --accent: #62cdb5;
    --tint: #17362f; --bad: #ff9389;
  }
}
*, ::before, ::after { box-sizing: border-box; }
[hidden] { display: none !important; }
html { background: var(--paper); scroll-padding: 1rem 0 5rem; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 78rem; min-height: 100dvh; display: flex;
  flex-direction: column; padding: env(safe-area-inset-top)
    max(var(--gap), env(safe-area-inset-right)) env(safe-area-inset-bottom)
    max(var(--gap), env(safe-area-inset-left));
  font: 1rem/1.45 system-ui, -apple-system, 'Segoe UI', sans-serif; color: var(--ink);
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums;
}
h1, h2, p, ul, ol, dl, dd { margin: 0; padding: 0; }
h1, h2 { line-height: 1.25; font-size: 1rem; }
ul { list-style: none; }
ol, section, form.step, .lead, .shot, .inside { display: grid; gap: .8rem; }
header, #add, #filters, #states, #bulk, #way, .acts, .go { display: flex; flex-wrap: wrap;
  gap: .4rem; }
#outbox li, #imports label, #notes, .top, .shot p { display: flex; align-items: center;
  gap: .6rem; }
ol { padding-left: 1.4rem; text-align: left; }
li::marker { color: var(--accent); font-weight: 700; }
a { color: var(--accent); }
button, input, textarea, .button, .pick { min-height: 2.75rem; font: inherit; color: inherit; }
button, .button { display: inline-flex; align-items: center; justify-content: center;
  min-width: 2.75rem; padding: .4rem .55rem; border: 0; border-radius: .8rem; background: none;
  color: var(--soft); font-weight: 600; font-size: .9375rem; text-decoration: none;
  overflow-wrap: normal; cursor: pointer; }
:disabled { opacity: .4; }
.button { padding: .5rem 1.1rem; background: var(--accent); color: var(--card);
  font-size: 1rem; }
.quiet { background: var(--tint); color: var(--accent); }
input, textarea { min-width: 0; padding: .6rem .9rem; border-radius: .8rem;
  border: 1px solid var(--edge); background: var(--card); }
::placeholder { color: var(--soft); opacity: 1; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
article:focus-visible { outline-offset: -3px; }
code { padding: .1em .35em; border-radius: .35em; background: #8882;
  font: .875em ui-monospace, Menlo, monospace; }
small { display: block; }
small, .hint, .meta, .word, .reason, #place, #pulse { color: var(--soft); font-size: .875rem; }

header { align-items: center; padding: .5rem 0; overflow-wrap: normal; }
.mark { border-radius: 22%; }
h1 { flex: 1; font-size: 1.2rem; }
#pulse::before { content: ''; display: inline-block; width: .5rem; height: .5rem;
  margin-right: .4rem; border-radius: 50%; background: var(--accent); }
.lost #pulse::before { background: var(--bad); }
main { flex: 1; display: flex; flex-direction: column; gap: .6rem; }
#old { animation: arrive 1s 3s backwards; }
#health, #imports section { padding: .9rem 1.1rem; border-radius: 1.1rem; }
#health { border: 1px solid #c906; background: #fc02; }
#states { gap: 0 .1rem; margin-left: -.45rem; }
#box { flex: 1 1 7rem; max-height: 40vh; resize: none; field-sizing: content; }
#refusal { flex: 1 0 100%; color: var(--bad); font-weight: 500; white-space: pre-line; }
:is(#refusal, .reason, #note):empty, #note:empty ~ button, #outbox:not([hidden]) ~ #empty {
  display: none; }
#imports section { margin-bottom: .6rem; background: var(--card); }
#imports label { min-height: 2.75rem; }
#imports :not([data-state=ready]) > label { display: none; }
#outbox li { padding: .4rem .4rem .4rem 1rem; margin-bottom: .4rem; border: 1px dashed var(--edge);
  border-radius: 1rem; }
#outbox span { flex: 1; white-space: pre-line; }
#filters button { padding: .3rem .45rem; gap: .3rem; font-weight: 400; font-size: .875rem; }
#filters [aria-pressed=true] { background: var(--card); color: var(--ink);
  box-shadow: inset 0 0 0 1px var(--line); }
#states b { font-weight: 500; }
#states [value=failed] b { color: var(--bad); }
#empty, #nothing { justify-items: center; margin: 1rem auto 3rem; }

.chunk { content-visibility: auto; contain-intrinsic-size: auto 2800px; }
.chunk:empty { min-height: 2800px; }
article { display: grid; gap: .4rem .9rem; align-content: start;
  grid-template-columns: 3.75rem minmax(0, 1fr) auto;
  margin-bottom: .75rem; padding: .9rem; border-radius: 1.1rem; background: var(--card); }
.pick, .picking .acts { display: none; }
.picking .pick { grid-column: 1 / -1; display: grid; align-items: center; width: 2.75rem; }
[type=checkbox] { width: 1.4rem; height: 1.4rem; min-height: 0; }
.thumb { grid-row: span 2; width: 3.75rem; height: 5rem; border-radius: .65rem; overflow: hidden;
  background: var(--tint); }
.thumb img { width: 100%; height: 100%; object-fit: cover; }
.what, .state { grid-column: 2 / -1; }
.what { align-self: center; }
.title { display: -webkit-box; -webkit-box-orient: vertical;
  -webkit-line-clamp: 2; overflow: hidden; }
.meta a { padding: .3rem 0; color: inherit; text-decoration-color: var(--edge); }
[data-status=completed] :is(.word, .state:has(.reason:empty)) { display: none; }
[data-status=downloading] .word { color: var(--accent); }
[data-status=failed] .word { color: var(--bad); font-weight: 600; }
progress { width: 100%; }
.acts { grid-column: 1 / -1; gap: .1rem .15rem; }
[value=cancel]:not([hidden]), [value=delete] { margin-left: auto; }
[value=cancel]:not([hidden]) ~ [value=delete], #bulk button { margin-left: 0; }
[data-status=downloading] .state { grid-column: 2; }
[data-status=downloading] .acts { grid-column: 3; align-self: end; }
article:not(.open) .acts + .acts { display: none; }

footer { padding: 1.5rem 0 5rem; }
#cookies { white-space: pre-line; }
[type=file] { position: absolute; width: 1px; min-height: 0; opacity: 0; }
#notes { position: fixed; z-index: 3; inset: auto 0 0; min-height: 3.5rem;
  padding: 0 var(--gap) env(safe-area-inset-bottom); border-top: 1px solid var(--line);
  background: var(--card); }
#note { flex: 1; max-height: 2.9em; overflow: auto; }
#notes:has(#note:not(:empty)) #pulse { display: none; }
#offer { color: var(--accent); font-weight: 700; }
dialog { width: min(56rem, calc(100% - 1rem)); max-width: none; max-height: calc(100% - 7.5rem);
  padding: 0; border: 0; border-radius: 1.25rem; background: var(--card); color: var(--ink); }
dialog::backdrop { background: #000b; }
.inside { padding: 1rem; }
.top h2 { flex: 1; max-height: 2.5em; overflow: hidden; }
#screen > * { display: block; width: 100%; max-height: calc(100vh - 17rem); border-radius: .75rem;
  object-fit: contain; }
#door { max-width: 26rem; }

.setup main { gap: 1rem; max-width: 34rem; width: 100%; margin: 0 auto; padding: 1.5rem 0 3rem; }
.setup :is(h1, h2), #empty h2 { font-size: 1.5rem; }
.setup h2:focus { outline: 0; }
#way { padding: 0; list-style: none; counter-reset: step; font-size: .875rem; }
#way li { flex: 1 0 auto; border-top: 4px solid var(--line); counter-increment: step; }
#way li::before { content: counter(step) '\a0'; color: var(--soft); }
#way .done::before { content: '✓\a0'; color: var(--accent); }
#way :is(.done, [aria-current]) { border-color: var(--accent); }
#way a { display: inline-block; padding: .7rem 0; color: inherit; text-decoration: none; }
#way [aria-current] { font-weight: 700; }
.shot { width: 100%; max-width: 21rem; justify-self: center; font-size: .9375rem;
  text-align: center; }
.shot div, .tap { border: 1px solid var(--line); border-radius: .9rem; background: var(--card); }
.shot p { justify-content: space-between; min-height: 2.75rem; padding: .35rem .9rem; }
.shot p + p { border-top: 1px solid var(--line); }
.shot b { color: var(--accent); }
.shot .tap { border-color: var(--accent); background: var(--tint); }
p .tap { padding: .25rem .6rem; }
.on { padding: .2rem .2rem .2rem 1.4rem; border-radius: 1rem; background: var(--accent); }
.on::after { content: ''; display: block; width: 1.4rem; height: 1.4rem; border-radius: 50%;
  background: #fff; }
dt { font-weight: 600; margin-top: .9rem; }
dd { color: var(--soft); }
.go { column-gap: 1.25rem; align-items: center; }
.go a:not(.button), .step li a { padding: .7rem 0; }
.qr svg { width: 12rem; height: 12rem; padding: .5rem; border-radius: .8rem; background: #fff; }
.print { display: block; margin-top: .4rem; padding: .6rem .8rem; }
.field { flex: 1 1 14rem; display: flex; gap: .5rem; min-width: 0; }
.field input { flex: 1; }
.step label { display: grid; gap: .3rem; font-weight: 600; }
details { border-top: 1px solid var(--line); }
summary { min-height: 2.75rem; padding: .65rem 0; cursor: pointer; color: var(--accent); }
.good { padding: .8rem 1rem; border-radius: .8rem; background: var(--tint); font-weight: 600; }
@media (max-width: 49.99rem) {
  [data-at]:not([data-at=profile]) .lead, .desk { display: none; }
  .go .button { flex: 1 0 100%; }
}
@media (min-width: 50rem) {
  :root { --gap: 2rem; }
  .chunk { display: grid; gap: .75rem; margin-bottom: .75rem;
    grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); }
  article { margin: 0; }
}
@keyframes arrive { from { visibility: hidden; } }
'''

BASE_JS = r'''
const $ = id => document.getElementById(id);
const recall = (name, other) => JSON.parse(localStorage.getItem('videoserverd.' + name)) ?? other;
function remember(name, value) {
  localStorage.setItem('videoserverd.' + name, JSON.stringify(value));
  return value;
}
// As UTF-8 bytes: fetch() rejects other characters, and a key may have an invisible one.
const octets = text => String.fromCharCode(...new TextEncoder().encode(text));
const keyHeader = () => recall('key') ? {'X-API-Key': octets(recall('key'))} : {};
'''

PAGE_JS = BASE_JS + r'''
const STATES = {
  '': 'All', failed: 'Failed', queued: 'Waiting', downloading: 'Active', completed: 'Done'};
const CHUNK = 20;         // rows drawn together
const MOST_ROWS = 200;    // the server's limit for one answer
const FRAME = 1;          // seconds between two answers: live enough, and light on a Pi
const PATIENCE = 40000;   // ms: the long poll's 25 s and a slow network
const ROUND = 30000;      // ms between looks at health and outbox, a tenth of it in trouble
const PART = 250000;      // characters sent at once: below 1 MB in UTF-8
const MOST_SHARED = 100 << 20;  // bytes; an iPhone's share sheet fails on much more
const FEW = 5;            // from so many videos on there is something to filter and to search
const PASSING = [0, 401, 408, 429, 500, 502, 503, 504];  // send it later (0: no answer)

const part = (node, selector) => node.querySelector(selector);
// The one that is there, or a new one.
const nodeOf = (id, template) =>
  $(id) ?? Object.assign($(template).content.firstElementChild.cloneNode(true), {id});
const filled = list => list.filter(Boolean);
function element(name, props, ...children) {
  const node = Object.assign(document.createElement(name), props);
  node.append(...children);
  return node;
}
function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
function size(bytes) {
  const power = Math.min(4, Math.floor(Math.log2(Math.max(1, bytes)) / 10));
  const number = bytes / 1024 ** power, digits = power && number < 100 ? 1 : 0;
  return `${number.toFixed(digits)} ${['bytes', 'KB', 'MB', 'GB', 'TB'][power]}`;
}
const length = seconds => seconds &&
  `${Math.floor(seconds / 60)}:${String(Math.round(seconds % 60)).padStart(2, '0')}`;
const duration = time => time < 60 ? Math.ceil(time) + ' s' : Math.ceil(time / 60) + ' min';
function moment(time) {
  const style = Date.now() / 1000 - time < 72000 ? {timeStyle: 'short'} : {dateStyle: 'medium'};
  return new Date(1000 * time).toLocaleString([], style);
}

const clientId = () => recall('client') ??
  remember('client', 'web-' + Math.random().toString(36).slice(2));

// ---- news at the bottom: one with a button stays in front of others until it is used ----
let noteTimer, ended = null;  // what to do once the note is gone
function note(text, label = '', action = null, end = null) {
  if (!label && !$('offer').hidden) return;
  if (ended !== end) ended?.();
  ended = end;
  write($('note'), text);
  write($('offer'), label);
  $('offer').hidden = !label;
  $('offer').onclick = () => { ended = null; action(); hush(); };
  clearTimeout(noteTimer);
  noteTimer = setTimeout(hush, label ? 8000 : 6000);
}
function hush() {
  $('offer').hidden = true;
  note('');
}

// ---- talking to the server ----
let online = null, locked = false;  // locked: a key is wanted and not known

async function api(method, path, body, signal) {
  const patience = AbortSignal.timeout(body?.size > PART ? 100 * PATIENCE : PATIENCE);
  const headers = keyHeader();
  if (body && !(body instanceof Blob)) {
    headers['Content-Type'] = 'application/json';
    body = JSON.stringify(body);
  }
  let response, answer;
  try {
    response = await fetch(path, {
      method, headers, body, cache: 'no-store', signal: signal ?? patience,
      keepalive: method === 'DELETE'});
    answer = await response.json();
  } catch (error) {
    if (signal?.aborted) throw error;
    connected(false);
    throw Object.assign(Error('The server does not answer.'), {status: 0});
  }
  connected(true);
  if (response.status === 401) askForKey();
  if (!response.ok) throw Object.assign(Error(), answer, {status: response.status});
  return answer;
}
// The same, and shows the server's sentence, good or bad.
const told = (...request) => api(...request)
  .then(answer => note(answer.message), error => note(error.message)).finally(makeRound);

function connected(now) {
  if (now === online) return;
  online = now;
  document.body.classList.toggle('lost', !now);
  paintHealth();
  changeOutbox(outbox());
}
function askForKey() {
  locked = true;
  write($('key-text'), recall('key') ? 'The server does not know this key. Please try another.'
    : 'Use one of those in VIDEOSERVER_API_KEYS. It stays in this browser.');
  if (!$('door').open) $('door').showModal();
}
function useKey(key) {
  remember('key', key);
  $('key').value = '';
  $('forget').hidden = !key;
  locked = false;
  makeRound().then(refresh);
}

// ---- health; each check also tries to send what is in the outbox ----
let health = {}, looked = 0;
async function makeRound() {
  if (locked || document.hidden) return;
  looked = Date.now();
  const answer = await api('GET', 'api/v1/health').catch(error => error);
  if ('problems' in answer) health = answer;
  else if ('uptime' in answer) askForKey();  // the short form is for those without a key
  paintHealth();
  if (online) flush();
  if (online && !locked) lookAtImports();
}
function watchHealth() {
  const trouble = health.problems?.length || health.preparing || !online;
  if (Date.now() - looked > (trouble ? ROUND / 10 : ROUND)) makeRound();
}
function paintHealth() {
  const {problems = [], free_disk: free, ytdlp_version: version, cookies, preparing} = health;
  const lost = online === false && 'What you add is kept here, and sent when the server is back.';
  const faults = filled([lost, ...problems]);
  write($('pulse'), filled([lost ? 'No connection' : 'Live', free && size(free) + ' free',
    version && 'yt-dlp ' + version]).join(' · '));
  $('health').hidden = !preparing && !faults.length;
  write($('health').firstChild, preparing ? 'Getting ready…' : 'Needs your attention');
  $('problems').replaceChildren(...faults.map(text => element('li', {}, ...withCommands(text))));
  part($('health'), 'progress').hidden = !preparing;
  $('update').hidden = !faults.some(text => / update`/.test(text));
  write($('cookies'), cookies?.join('\n') || 'There are no cookies.');
  $('forget-cookies').hidden = !cookies?.length;
}
// `commands` in a sentence are set as code.
const withCommands = text =>
  text.split('`').map((piece, i) => i % 2 ? element('code', {}, piece) : piece);

// ---- sending links: what is in the outbox has had no answer yet ----
let flushing = false, delay = '';  // why they stay here, if the server has said so
const outbox = () => recall('outbox', []);
function changeOutbox(entries) {
  remember('outbox', entries);
  $('outbox').hidden = !entries.length;
  const state = online ? delay || 'Sending' : 'Kept here, sent when the server answers';
  $('outbox').replaceChildren(...entries.map(({text, timestamp}) => element('li', {},
    element('span', {}, text.slice(0, 300), element('small', {}, state)),
    element('button', {onclick: () => replace(timestamp)}, 'Cancel'))));
}
// Sets the links left in that entry; with none it is removed.
const replace = (timestamp, text) => changeOutbox(filled(outbox().map(
  entry => entry.timestamp === timestamp ? text && {text, timestamp} : entry)));

async function flush() {
  if (flushing || locked) return;
  flushing = true;
  try {
    while (outbox().length) await post(outbox()[0]);
  } catch ({status}) {
    delay = (status === 503 ? 'The server cannot store it at the moment. ' : '')
      + 'Kept here, and sent again';
  }
  changeOutbox(outbox());
  flushing = false;
}
// Always with the entry's original timestamp, by which the server recognises a repeat. A long list
// goes in parts. Throws to try later.
async function post({text, timestamp}) {
  const many = text.split(/https?:/i).length > 2 || text.includes('\n');
  const end = text.length > PART ? text.slice(0, PART).search(/\s\S*$/) : text.length;
  const now = text.slice(0, end), body = {client_id: clientId(), timestamp};
  let rest = [text.slice(end).trim()];
  body[many ? 'text' : 'url'] = now;
  try {
    const answer = await api('POST', many ? 'api/v1/downloads' : 'api/v1/download', body);
    const refused = (answer.downloads ?? []).filter(row => row.error);
    if (refused.length) write($('refusal'), [...new Set(refused.map(row => row.error))].join('\n'));
    putIntoBox(refused.map(row => row.url).join('\n'));
    rest = [answer.keep, ...rest];
    note(answer.message);
  } catch (error) {
    if (error.status) write($('refusal'), error.message);
    if (PASSING.includes(error.status)) throw error;
    putIntoBox(now);
  }
  delay = '';
  replace(timestamp, filled(rest).join('\n'));
  refresh();
}
const putIntoBox = text => fill(filled([$('box').value, text]).join('\n'));

// ---- imports: what somebody saved in years ----
async function lookAtImports() {
  const {imports} = await api('GET', 'api/v1/imports').catch(() => ({}));
  if (imports) $('imports').replaceChildren(...imports.map(importCard));
}
function importCard(row) {
  const card = nodeOf(row.import_id, 'import');
  const state = {paused: 'Paused: ', done: 'Done: '}[row.state] ?? '';
  if (!card.dataset.state) part(card, '.acts').before(...row.groups.map(importGroup));
  card.dataset.state = row.state;
  write(part(card, 'h2'), row.name);
  write(part(card, '.meta'), state + row.message);
  for (const node of card.querySelectorAll('button')) node.hidden = !node.matches('.' + row.state);
  return card;
}
function importGroup({group, name, posts, here}) {
  const box = element('input', {type: 'checkbox', value: group, checked: group !== 'history'});
  const count = posts.toLocaleString() + (here ? `, ${here.toLocaleString()} are here` : '');
  return element('label', {}, box, `${name}: ${count}`);
}
async function changeImport({target}) {
  const card = target.closest('section'), name = target.closest('button')?.value;
  if (!name) return;
  const only = [...card.querySelectorAll(':checked')].map(box => box.value);
  if (name === 'start' && !only.length) return note('Tick what you want first.');
  const stops = name === 'cancel' && card.matches('[data-state=running], [data-state=paused]');
  if (stops && !confirm('Stop this import? What has arrived stays.')) return;
  await told('POST', `api/v1/imports/${card.id}/${name}`, name === 'start' && {only});
}
async function bring(file) {
  if (!file) return;
  note(`Reading ${file.name}…`);
  const query = new URLSearchParams({name: file.name, client_id: clientId()});
  await told('POST', 'api/v1/imports?' + query, file);
}

// ---- the list: as tall as all rows together, but only the chunks in view are filled ----
const chunks = $('list').children, doomed = new Set(), picked = new Set();
const view = {status: '', q: ''};
let polling = new AbortController(), nextPoll, version = 0;

function plan(pause, gap = FRAME) {
  clearTimeout(nextPoll);
  nextPoll = setTimeout(poll, 1000 * pause, gap);
}
function refresh() {
  version = 0;
  polling.abort();
  plan(0);
}
const sight = new IntersectionObserver(entries => {
  for (const {target, isIntersecting} of entries) {
    if (isIntersecting && (target.near === false || !target.firstChild)) refresh();  // news missed
    target.near = isIntersecting;
  }
}, {rootMargin: '600px'});

function stretch(total) {
  const wanted = Math.ceil(total / CHUNK) || 1;
  while (chunks.length > wanted) $('list').lastChild.remove();
  while (chunks.length < wanted) {
    const chunk = element('div', {className: 'chunk'});
    $('list').append(chunk);
    sight.observe(chunk);
  }
}
const asked = more => 'api/v1/history?' + new URLSearchParams(
  Object.entries({...view, ...more}).filter(([, value]) => value !== ''));

async function look(signal) {
  const seen = [...chunks].flatMap((chunk, i) => chunk.near ? i : []);
  const first = seen[0] ?? 0, count = (seen.at(-1) ?? 0) - first + 1;
  const place = {offset: first * CHUNK, limit: Math.min(MOST_ROWS, count * CHUNK)};
  if (version) Object.assign(place, {since: version, wait: 25});
  const answer = await api('GET', asked(place), null, signal);
  if (version !== answer.version) looked = Math.min(looked, Date.now() - 0.9 * ROUND);
  version = answer.version;
  paintList(answer, place.offset);
  return answer.poll_after || FRAME;
}
// Looks, then plans the next look, after an error at a growing gap.
async function poll(gap) {
  polling.abort();
  polling = new AbortController();
  if (locked || document.hidden) return;
  const {signal} = polling;
  let pause = gap;
  plan(PATIENCE / 1000);
  try {
    pause = await look(signal);
    gap = FRAME;
  } catch {
    gap = Math.min(2 * gap, 15);
  }
  if (!signal.aborted) plan(pause, gap);
}
function paintList({downloads, total, counts}, offset) {
  stretch(total);
  const wanted = downloads.map(row => nodeOf(row.download_id, 'row'));
  for (let at = 0; at < Math.max(1, wanted.length); at += CHUNK) {
    const chunk = chunks[(offset + at) / CHUNK];
    if (chunk) arrange(chunk, wanted.slice(at, at + CHUNK));
  }
  wanted.forEach((node, i) => paintRow(node, downloads[i]));
  $('list').ariaBusy = false;
  $('list').hidden = !total;
  $('empty').hidden = total || view.status || view.q;
  $('nothing').hidden = total || !$('empty').hidden;
  paintStates(counts);
}
// Rows are moved and repainted, never rebuilt, to keep focus and scroll position.
function arrange(chunk, wanted) {
  for (const node of [...chunk.children]) {
    if (wanted.includes(node)) continue;
    if (node.contains(document.activeElement)) focusBeside(node);
    node.remove();
  }
  wanted.forEach((node, i) => {
    if (chunk.children[i] !== node) chunk.insertBefore(node, chunk.children[i] ?? null);
  });
}
const visible = () => [...document.querySelectorAll('article:not([hidden])')];
function focusBeside(node) {
  const rows = visible(), at = rows.indexOf(node);
  (rows[at + 1] ?? rows[at - 1] ?? $('box')).focus({preventScroll: true});
}
const heading = row => row.title || row.filename || row.url.replace(/^https?:\/\/(www\.)?/, '');
const stateOf = row => row.error_message === 'Cancelled' ? 'cancelled' : row.status;

function paintRow(node, row) {
  if (node.row && node.row.status !== row.status) announce(row);
  node.row = row;
  node.hidden = doomed.has(row.download_id);
  node.dataset.status = stateOf(row);
  node.ariaLabel = heading(row);
  write(part(node, '.title'), heading(row));
  part(node, 'input').checked = picked.has(row.download_id);
  paintMeta(part(node, '.meta'), row);
  paintProgress(node, row);
  const frame = part(node, '.thumb'), can = actsOf(row);
  frame.path = row.thumbnail;
  if (frame.path) pictures.observe(frame);
  for (const button of node.querySelectorAll('button')) {
    button.hidden = !can.includes(button.value);
    button.ariaLabel = `${button.textContent}: ${heading(row)}`;
  }
}
function repaint() {
  for (const node of document.querySelectorAll('article')) paintRow(node, node.row);
}
function actsOf(row) {
  if (row.status === 'downloading') return ['cancel'];
  if (row.status === 'queued') return ['cancel', 'delete', row.next_attempt_at && 'retry'];
  if (row.status === 'failed') return ['retry', 'delete'];
  const star = row.starred ? 'unstar' : 'star', s3 = row.s3?.state === 'stored' && 's3';
  const files = row.files.length ? ['play', canShare ? 'share' : 'save', 'copy', s3] : [];
  return [...files, 'more', star, 'again', 'delete'];
}
function paintMeta(node, row) {
  const files = row.files.length, link = {href: row.url, target: '_blank'};
  const facts = filled([
    row.starred && '★', row.uploader && element('bdi', {}, row.uploader), length(row.duration),
    element('a', link, row.site), files > 1 && files + ' files',
    row.file_size && size(row.file_size),
    row.created_at && moment(row.completed_at ?? row.created_at)]);
  const line = element('p', {}, ...facts.flatMap(fact => ['\xa0· ', fact]).slice(1));
  if (node.textContent !== line.textContent) node.replaceChildren(...line.childNodes);
}
function paintProgress(node, row) {
  const bar = part(node, 'progress');
  const paused = row.status === 'queued' && !row.next_attempt_at && health.paused;
  Object.assign(bar, {hidden: row.status !== 'downloading', value: row.progress});
  if (row.phase === 'page') bar.removeAttribute('value');  // nobody knows how long
  bar.ariaLabel = 'Progress of ' + heading(row);
  write(part(node, '.word'), paused ? 'Paused' : words(row).join(' · '));
  write(part(node, '.reason'), filled([
    stateOf(row) !== 'cancelled' && row.error_message, row.note, paused,
    row.s3?.state === 'waiting' && 'Copy to the bucket: waiting', row.s3?.error]).join(' '));
}
function words(row) {
  const {next_attempt_at: next, retry_count: tried, speed, eta} = row;
  if (next) {
    const left = Math.max(1, next - Date.now() / 1000);
    return ['Next try in ' + duration(left), tried + ' failed so far'];
  }
  if (row.status !== 'downloading') return [STATES[stateOf(row)] ?? 'Cancelled'];
  const phase = {
    page: 'Reading the page', merge: 'Joining picture and sound', file: 'Saving the file'};
  return filled([phase[row.phase], row.progress + '%', speed && size(speed) + '/s',
    eta && duration(eta) + ' left']);
}
// Fetched when they come into view; lazy images would come long before.
const pictures = new IntersectionObserver(entries => {
  for (const {target: frame, isIntersecting} of entries) {
    const img = {alt: '', src: frame.path, onerror() { this.remove(); }};
    if (isIntersecting && !frame.firstChild) frame.append(element('img', img));
  }
});
function announce(row) {
  const state = stateOf(row);
  if (state === 'completed') note('Done: ' + heading(row));
  if (state === 'failed') note(`Failed: ${heading(row)}. ${row.error_message}`);
}
function paintStates(counts) {
  const all = Object.values(counts).reduce((sum, n) => sum + n);
  const busy = counts.queued + counts.downloading;
  document.title = (busy ? `(${busy}) ` : '') + 'Video inbox';
  $('filters').hidden = all < FEW && !view.status && !view.q;
  for (const button of $('states').children) {
    const number = counts[button.value] ?? all, on = button.value === view.status;
    write(button.lastChild, String(number));
    button.ariaPressed = on;
    button.hidden = !number && !on;
  }
  paintBulk();
}
function narrow(change) {
  Object.assign(view, change);
  scrollTo({top: Math.min(scrollY, $('add').offsetTop)});
  refresh();
}

// ---- actions on a row with its files, or on the one in the player; others are the server's ----
const DO = {
  play: (files, row) => show(row, 0), share, save, copy: ([file]) => copy(file.url),
  s3: (files, row) => copy(
    api('GET', `getVideoDownloadPublicURL?videoDownloadUUID=${row.download_id}&URLTypeEnum=S3`)
      .then(answer => answer.publicURL)),
  again: (files, {url}) => told('POST', 'api/v1/download', {
    url, client_id: clientId(), timestamp: Date.now(), again: true}).then(refresh),
  delete: (files, row) => doom(row),
  more: (files, row, button) => {
    button.ariaExpanded = $(row.download_id).classList.toggle('open');
  },
  prev: () => step(-1), next: () => step(1), close: () => $('player').close(),
};
function tap({target}) {
  const node = target.closest('article, dialog'), button = target.closest('button');
  if (!node) return;
  const {row, files = row.files} = node, name = button?.value;
  if (name in DO) DO[name](files, row, button);
  else if (name) order('POST', `${row.download_id}/${name}`);
  else if (target === $('player')) target.close();
  else if (target.closest('.thumb') && files.length) show(row, 0);
  else if (target.type === 'checkbox') {
    picked[target.checked ? 'add' : 'delete'](row.download_id);
    paintBulk();
  }
}
const order = (method, path) =>
  api(method, 'api/v1/download/' + path).catch(error => note(error.message)).finally(refresh);

// ---- the player ----
const MISSING = 'The file is missing. Is its disk plugged in?';
function show(row, at) {
  const file = row.files[at];
  const kind = {audio: 'audio', image: 'img'}[file.type.split('/')[0]] ?? 'video';
  const media = element(kind, {
    src: file.path, controls: true, playsInline: true, alt: heading(row)});
  media.onerror = () => explain(file, media);
  Object.assign($('player'), {row, at, files: [file]});
  write($('player-title'), heading(row));
  write($('place'), row.files.length > 1 ? `${at + 1} of ${row.files.length}` : '');
  $('screen').replaceChildren(media);
  $('prev').disabled = !beside(-1);
  $('next').disabled = !beside(1);
  if (!$('player').open) {
    history.pushState('player', '');  // so that Back closes it
    $('player').append($('notes'));   // outside the dialog it could not be tapped
    $('player').showModal();
  }
  media.play?.().catch(() => null);  // here, within the tap
}
async function explain(file, media) {
  const there = await fetch(file.path, {method: 'HEAD'}).catch(() => null);
  media.replaceWith(element('p', {},
    there?.ok ? 'This browser cannot play it. Save it instead.' : MISSING));
}
// The [row, number of its file] so many files further on.
function beside(way) {
  const all = visible().flatMap(({row}) => row.files.map((_, at) => [row, at]));
  const here = all.findIndex(([row, at]) =>
    row.download_id === $('player').row.download_id && at === $('player').at);
  return here < 0 ? null : all[here + way];
}
const step = way => show(...beside(way));
function closed() {
  $('screen').replaceChildren();
  document.body.append($('notes'));
  if (history.state === 'player') history.back();
}

// ---- sharing: the file itself, fetched first, as a browser only shares during a tap ----
const canShare = Boolean(
  navigator.canShare?.({files: [new File([''], 'a.mp4', {type: 'video/mp4'})]}));
async function share(files) {
  const bytes = files.reduce((sum, file) => sum + file.size, 0), end = new AbortController();
  if (bytes > MOST_SHARED) {
    return note(`${size(bytes)} is too big to share. Save it instead.`, 'Save', () => save(files));
  }
  const parcel = await load(files, end.signal, done => note(
    `Loading ${Math.floor(100 * done / bytes)}%`, 'Stop', () => end.abort())).catch(() => null);
  const give = () => navigator.share({files: parcel}).catch(({name}) =>
    name === 'NotAllowedError' && note('Ready. Save Video puts it into Photos.', 'Share', give));
  hush();
  if (parcel) give();
  else if (!end.signal.aborted) note(MISSING);
}
async function load(files, signal, progress) {
  const loaded = [];
  let done = 0;
  for (const {path, name, type} of files) {
    const answer = await fetch(path, {signal}), pieces = [];
    if (!answer.ok) throw Error(answer.status);
    for (const reader = answer.body.getReader(); ;) {
      const {value} = await reader.read();
      if (!value) break;
      pieces.push(value);
      progress(done += value.length);
    }
    loaded.push(new File(pieces, name, {type}));
  }
  return loaded;
}
async function save(files) {
  for (const {path} of files) {
    element('a', {href: path, download: ''}).click();
    await new Promise(done => setTimeout(done, 500));  // of two at once, the second is dropped
  }
}
// Gives the clipboard a promise, as Safari only allows writing during the tap.
async function copy(link) {
  try {
    const blob = Promise.resolve(link).then(text => new Blob([text], {type: 'text/plain'}));
    await navigator.clipboard.write([new ClipboardItem({'text/plain': blob})]);
    note('Link copied');
  } catch {
    note('Copy it from here: ' + await link);
  }
}
function doom(row) {
  const files = row.files.length ? ', with its files' : '';
  doomed.add(row.download_id);
  focusBeside($(row.download_id));
  repaint();
  note(doomed.size > 1 ? doomed.size + ' deleted, with their files'
    : `Deleted${files}: ${heading(row)}`, 'Undo', () => { doomed.clear(); repaint(); }, bury);
}
async function bury() {
  const ids = [...doomed];
  await Promise.all(ids.map(id => order('DELETE', id)));
  for (const id of ids) doomed.delete(id);
}

// ---- several at once: those selected, else all that the filter shows ----
function paintBulk() {
  const {status} = view;
  $('bulk').hidden = !picked.size && status !== 'failed' && status !== 'completed';
  write($('bulk').firstChild, picked.size ? picked.size + ' selected' : 'All ' + STATES[status]);
}
function pick() {
  $('pick').ariaPressed = $('list').classList.toggle('picking');
  picked.clear();
  repaint();
  paintBulk();
}
async function everyId() {
  const ids = [...picked];
  for (let total = ids.length || 1; ids.length < total;) {
    const answer = await api('GET', asked({offset: ids.length, limit: MOST_ROWS}));
    total = answer.downloads.length && answer.total;
    ids.push(...answer.downloads.map(row => row.download_id));
  }
  return ids;
}
async function several({target: {value: name}}) {
  const ids = name ? await everyId() : [], all = ids.length;
  const [method, end, question] = {
    retry: ['POST', '/retry', `Try ${all} again?`],
    clear: ['DELETE', '?files=keep', `Remove ${all} from this list? Their files stay.`],
    delete: ['DELETE', '', `Delete ${all}, with their files?`]}[name] ?? [];
  if (!all || !confirm(question)) return;
  let good = 0;
  const work = async () => {
    for (let id; (id = ids.pop());) {
      good += await api(method, 'api/v1/download/' + id + end).then(() => 1, () => 0);
    }
  };
  await Promise.all([work(), work(), work(), work()]);
  note(`${good} of ${all} done`);
  if (picked.size) pick();
  refresh();
}

// ---- the start ----
function fill(text) {
  $('box').value = text;
  if (text.length < PART) remember('draft', text);
  $('box').rows = Math.min(8, text.split('\n', 9).length);  // for browsers without field-sizing
}
// A link in the page's address only fills the box; the user sends it.
function prefill() {
  const shared = new URLSearchParams(location.search);
  const text = filled(['url', 'text'].map(name => shared.get(name))).join('\n')
    || shared.get('title');
  fill(filled([...new Set([recall('draft', ''), text])]).join('\n'));  // a draft stays
  if (!text) return;
  history.replaceState(null, '', location.pathname);
  $('send').focus();
}
function submit(event) {
  event.preventDefault();
  const text = $('box').value.trim();
  write($('refusal'), text ? '' : 'Paste a link into the box first.');
  if (!text) return;
  changeOutbox([...outbox(), {text, timestamp: Date.now()}]);
  fill('');
  flush();
}
async function paste() {
  putIntoBox((await navigator.clipboard.readText().catch(() => '')).trim());
  $($('box').value ? 'send' : 'box').focus();
}
function typed(event) {
  const plain = event.key === 'Enter' && !event.shiftKey && !event.isComposing;
  if (plain && (event.ctrlKey || event.metaKey || !$('box').value.includes('\n'))) submit(event);
}
let typing;
$('search').oninput = () => {  // once the typing pauses
  clearTimeout(typing);
  typing = setTimeout(() => narrow({q: $('search').value.trim()}), 250);
};
for (const [value, text] of Object.entries(STATES)) {
  const props = {value, onclick: () => narrow({status: value})};
  $('states').append(element('button', props, text + ' ', element('b')));
}
$('share').hidden = !canShare;
$('paste').hidden = !navigator.clipboard?.readText;
$('forget').hidden = !recall('key');
const taps = {
  paste, pick, hush, bulk: several, list: tap, player: tap, imports: changeImport,
  'show-all': () => { $('search').value = ''; narrow({status: '', q: ''}); },
  update: () => told('POST', 'api/v1/update'),
  'forget-cookies': () => told('DELETE', 'api/v1/cookies'),
  forget: () => useKey(''),
};
for (const [id, action] of Object.entries(taps)) $(id).onclick = action;
$('add').onsubmit = submit;
$('box').oninput = () => fill($('box').value);
$('box').onkeydown = typed;
$('player').onclose = closed;
$('key-form').onsubmit = () => useKey($('key').value.trim());
$('door').onclose = () => { if (locked) askForKey(); };
$('cookie-file').onchange = ({target}) =>
  told('PUT', 'api/v1/cookies', new Blob(target.files, {type: 'text/plain'}));
$('import-file').onchange = ({target}) => bring(target.files[0]);
window.ondragover = event => event.preventDefault();
window.ondrop = event => {
  event.preventDefault();
  bring(event.dataTransfer.files[0]);
};
window.onpopstate = () => $('player').close();
window.onpagehide = hush;
window.ononline = refresh;
document.onvisibilitychange = () => { plan(0); makeRound(); };
setInterval(watchHealth, 1000);
setInterval(repaint, 20000);  // waits shrink
navigator.serviceWorker?.register('sw.js').catch(() => null);  // opens this page away from home

prefill();
$('old').remove();
await makeRound();
plan(0);
'''

SW_JS = r'''
// Caches the page itself, so that it opens from the Home Screen without the server.
const KEPT = ['./', 'page.css', 'page.js', 'icon.png', 'manifest.webmanifest'];
const places = KEPT.map(path => new URL(path, location).href);

async function newest(request, place) {
  const cache = await caches.open('page');
  try {
    const answer = await fetch(request, {signal: AbortSignal.timeout(4000)});
    if (answer.ok) await cache.put(place, answer.clone());
    return answer;
  } catch {
    return await cache.match(place) ?? Response.error();
  }
}
addEventListener('install', event => event.waitUntil(
  caches.open('page').then(cache => cache.addAll(places)).then(() => skipWaiting())));
addEventListener('activate', event => event.waitUntil(clients.claim()));
addEventListener('fetch', event => {
  const place = event.request.url.replace(/[?#].*/, '');
  if (places.includes(place)) event.respondWith(newest(event.request, place));
});
'''

# {{name}} is a fact, escaped; <!--name-->…<!--/name--> stays only where that fact is not empty.
SETUP_HTML = HEAD + r'''<title>Set up an iPhone</title>
<script type="module" src="setup.js"></script>
</head>
<body class="setup" data-check="{{check}}">
<main>
<div class="lead">
  <h1>Tap Share on your iPhone, and the video is saved on {{host}}.</h1>
  <p>Set it up once, at home, in about five minutes.</p>
  <!--qr_svg--><div class="desk"><p>On a computer? Point the phone’s camera at this, or open
    <b>{{base_url}}/setup</b> in Safari.</p>
    <div class="qr" role="img" aria-label="QR code for it">{{qr_svg}}</div></div><!--/qr_svg-->
</div>
<!--fingerprint-->
<nav aria-label="Steps"><ol id="way">
  <li><a href="#profile">Profile</a></li> <li><a href="#install">Install</a></li>
  <li><a href="#trust">Trust</a></li> <li><a href="#share">Share</a></li></ol></nav>

<section class="step" id="profile">
  <h2 tabindex="-1">Get the profile</h2>
  <div class="shot" role="img" aria-label="Safari asks. Tap Allow."><div>
    <p>This website is trying to download a configuration profile.</p>
    <p>Ignore <b class="tap">Allow</b></p></div></div>
  <p>Tap the button, then <b>Allow</b>, then <b>Close</b>. Your iPhone can then trust this server.
    The profile is good for your home network only.</p>
  <p class="go"><a id="get" class="button" href="ca.mobileconfig">Get the profile</a>
    <a href="#install">Next</a></p>
</section>

<section class="step" id="install">
  <h2 tabindex="-1">Install it</h2>
  <div class="shot" role="img"
    aria-label="Settings shows Profile Downloaded near the top. Then tap Install.">
    <div class="tap"><p><b>Profile Downloaded</b> ›</p></div>
    <div><p>Install Profile <b class="tap">Install</b></p></div></div>
  <p>Open <b>Settings</b>. Tap <b>Profile Downloaded</b>, near the top, then <b>Install</b>. Enter
    your passcode, and tap <b>Install</b> until it says <b>Done</b>.</p>
  <p class="hint">Not shown? <b>General</b> → <b>VPN &amp; Device Management</b> (iOS 18, 26
    and 27).</p>
  <details><summary>Is it really from your server?</summary><p>Tap <b>More Details</b> before you
    install. The SHA-256 fingerprint of the certificate must be the one in the server’s terminal:
    <code class="print">{{fingerprint}}</code></p></details>
  <p class="go"><a class="button" href="#trust">Next</a></p>
</section>

<section class="step" id="trust">
  <h2 tabindex="-1">Turn on trust</h2>
  <div class="shot" role="img"
    aria-label="Certificate Trust Settings, with the switch turned on.">
    <b>Certificate Trust Settings</b>
    <div><p>videoserverd on {{host}} <b class="on"></b></p></div></div>
  <p>In <b>Settings</b>: <b>General</b> → <b>About</b> → at the very bottom <b>Certificate Trust
    Settings</b>. Turn on the switch and tap <b>Continue</b>. Then come back here.</p>
  <p id="trusted" role="status">This page moves on by itself as soon as your iPhone trusts the
    server.</p>
  <p class="go"><a id="next" href="{{base_url}}/setup#share">Continue without waiting</a></p>
</section>
<!--/fingerprint--><!--secure-->
<!--has_keys--><form class="step" id="unlock">
  <h2 tabindex="-1">Enter the key</h2>
  <p id="why" role="alert">This server asks for a key, once.</p>
  <label>Key <input id="key" type="password" required autocomplete="off"></label>
  <p class="go"><button class="button">Next</button></p>
</form><!--/has_keys-->

<section class="step" id="share">
  <h2 tabindex="-1">Make the Shortcut</h2>
  <label>Name of this phone <input id="name" value="My iPhone" maxlength="64"></label>
  <p class="field"><input id="address" readonly value="{{address}}" aria-label="Address">
    <button id="copy" class="button" hidden>Copy</button></p>
  <p id="ready" hidden><a id="signed" class="button">Get the Shortcut</a> Then tap <b>Add
    Shortcut</b>. Or make it yourself:</p>
  <!--shortcut_url--><a class="button" href="{{shortcut_url}}">Get the Shortcut</a>
  <p>Tap <b>Add Shortcut</b>. If it asks for the address, paste it. Or make it yourself:</p
  ><!--/shortcut_url-->
  <div class="shot" role="img" aria-label="The Shortcut has two actions.">
    <div><p>Get contents of <b class="tap">address</b></p>
      <p>Method <b>POST</b></p><p>Request Body <b>JSON</b></p>
      <p>text <b>Shortcut Input</b></p></div>
    <div><p>Show notification <b class="tap">Contents of URL</b></p></div></div>
  <ol><li>Copy the address. <a href="shortcuts://create-shortcut">Open a new Shortcut</a>.</li>
    <li>Add <b>Get Contents of URL</b> and paste the address. Tap <b>›</b>. <b>Method</b>:
      <b>POST</b>. <b>Add new field</b> → <b>Text</b>: <b>text</b> is <b>Shortcut Input</b>.</li>
    <li>Add <b>Show Notification</b>. Its text is <b>Contents of URL</b>.</li>
    <li>Tap <b>ⓘ</b>, turn on <b>Show in Share Sheet</b>, tap <b>Done</b>. Rename it
      <b>Save video</b>.</li></ol>
  <p>Now share a video: <b>Share</b> → <b>Save video</b> → <b>Always Allow</b>.</p>
  <p id="works" role="status">Waiting for the first link from this phone…</p>
  <p class="go"><a class="button" href="./">Go to the videos</a></p>
</section>
<!--/secure-->
<details><summary>Something is not working</summary><dl>
  <!--fingerprint--><dt>Safari does not offer the profile</dt>
  <dd>Open <b>{{base_url}}/ca.mobileconfig</b> on a computer, and send the file to the iPhone by
    AirDrop. Or save it to iCloud Drive and tap it in <b>Files</b>. (iOS 27 may take a profile only
    this way, or over https.)</dd>
  <dt>Profile Downloaded is not shown</dt>
  <dd>It disappears after 8 minutes. Get the profile again.</dd>
  <dt>It is never trusted</dt>
  <dd>Is the switch in step 3 on? Is the phone on the same Wi-Fi? Is the server running?</dd>
  <dt>Safari warned about this page</dt>
  <dd>“Visit this website” counts in Safari only. Do steps 1 to 3.</dd><!--/fingerprint-->
  <dt>“Could not connect to the server”</dt>
  <dd><b>Settings</b> → <b>Privacy &amp; Security</b> → <b>Local Network</b>: turn on
    <b>Safari</b> and <b>Shortcuts</b>. Turn off the VPN, or let it reach the local network.</dd>
  <dt>The name is not found</dt>
  <dd>Some networks cannot find names that end in <b>.local</b>. Use a numeric address:
    {{addresses}}</dd></dl></details>
<!--secure--><details><summary>Photos, away from home, other devices</summary><dl>
  <dt>The video straight into Photos</dt>
  <dd>Add <b>/video</b> to the address, and use <b>Save to Photo Album</b> (Recents) instead of
    <b>Show Notification</b>.</dd>
  <dt>Away from home</dt>
  <dd>Open <a href="./">the videos</a> in Safari: <b>Share</b> → <b>Add to Home Screen</b>. That
    page opens without the server too. Links that you paste there wait on the phone until you are
    home and open it again.</dd>
  <dt>A browser on a computer</dt>
  <dd>Drag this into its bookmarks: <a id="bookmarklet"
    href="javascript:void(open('{{base_url}}/?url='+encodeURIComponent(location.href)))">Save
    video</a></dd>
  <dt>Android, Macs and PCs</dt>
  <dd><!--fingerprint-->Install <a href="ca.crt">the certificate</a> (Android: Settings → Security →
    CA certificate) and trust it for websites. <!--/fingerprint-->Open {{base_url}}. In Chrome on
    Android, menu → <b>Add to Home screen</b> puts it into the share sheet.</dd>
  <!--fingerprint-->  <dt>Remove it all</dt>
  <dd><b>Settings</b> → <b>General</b> → <b>VPN &amp; Device Management</b> → <b>videoserverd on
    {{host}}</b> → <b>Remove Profile</b>. Delete the Shortcut and the Home Screen page.</dd
  ><!--/fingerprint--></dl></details><!--/secure-->
</main>
</body>
</html>
'''

SETUP_JS = BASE_JS + r'''
// Shows one step at a time, and moves on by itself. Without JavaScript all steps are shown.
const steps = [...document.querySelectorAll('.step')], {check: places} = document.body.dataset;
const plain = location.protocol === 'http:';
// Safari may have been told to trust this host name anyway, so ask for another name of the server.
const check = places.split(' ').find(place => new URL(place).host !== location.host);
const opened = Date.now() - 5000;
let known = '', trusted = !$('trust'), heard = false;  // known: the path of the address

function go(id) {
  if (id === 'share' && $('unlock') && !known) id = 'unlock';
  const at = steps.findIndex(step => step.id === id);
  if (at < 0) return;
  for (const step of steps) step.hidden = step.id !== id;
  document.body.dataset.at = id;
  [...document.querySelectorAll('#way li')].forEach((item, i) => {
    item.classList.toggle('done', i < at || (trusted && i < 3));
    item.ariaCurrent = i === Math.min(at, 3) ? 'step' : null;
  });
  steps[at].querySelector('h2').focus();
  scrollTo(0, 0);
  if (id === 'share') tryAddress();
}
const start = () => go(location.hash.slice(1) || (trusted ? 'share' : 'profile'));

// Only an iPhone that trusts the CA can load the picture. No CORS, so nothing can be read.
function probe() {
  if (trusted || !check || document.hidden) return;
  const picture = new Image();
  picture.onload = arrive;
  picture.src = `${check}?${Date.now()}`;
}
async function arrive() {
  if (trusted) return;
  trusted = true;
  $('trusted').textContent = '✓ Your iPhone trusts the server.';
  if (plain) await fetch('seen/trusted').catch(() => null);
  if (document.body.dataset.at !== 'profile') await new Promise(done => setTimeout(done, 1200));
  if (plain) $('next').click();
  else go('share');
}

// ---- the last screen ----
async function showAddress() {
  const answer = await fetch('api/v1/share-address', {
    method: 'POST', body: JSON.stringify({name: $('name').value}),
    headers: {'Content-Type': 'application/json', ...keyHeader()},
  });
  const {address, message, signs} = await answer.json();
  if (!answer.ok) throw Error(message);
  $('address').value = address;
  known = new URL(address).pathname;
  $('signed').href = known + '/shortcut';
  $('ready').hidden = !signs || !(await fetch($('signed').href, {method: 'HEAD'})).ok;
}
const tryAddress = () => showAddress().catch(() => null);
function unlock(event) {
  event.preventDefault();
  remember('key', $('key').value.trim());
  showAddress().then(() => go('share'), error => { $('why').textContent = error.message; });
}
async function listen() {
  if (heard || document.hidden || document.body.dataset.at !== 'share' || !known) return;
  const within = Math.ceil((Date.now() - opened) / 1000);
  const answer = await fetch(`${known}?within=${within}`);
  if (answer.status !== 200) return;
  heard = true;
  $('works').textContent = await answer.text();
  $('works').className = 'good';
}
async function copy() {
  await navigator.clipboard.writeText($('address').value);
  $('copy').textContent = 'Copied ✓';
  setTimeout(() => { $('copy').textContent = 'Copy'; }, 2000);
}
$('copy')?.toggleAttribute('hidden', !navigator.clipboard);
$('copy')?.addEventListener('click', copy);
$('get')?.addEventListener('click', () => setTimeout(go, 3000, 'install'));
$('bookmarklet')?.addEventListener('click', event => event.preventDefault());  // to be dragged
$('unlock')?.addEventListener('submit', unlock);
$('name')?.addEventListener('change', tryAddress);
addEventListener('hashchange', start);
document.addEventListener('visibilitychange', probe);
setInterval(() => { probe(); listen().catch(() => null); }, 2000);
if (recall('key') && $('unlock')) await tryAddress();
start();
probe();
'''


def setup_page(facts):
    """The set-up page, filled in.

    `facts`: base_url; addresses (by number); fingerprint ('' where the certificate is the owner's
    own); host; has_keys; shortcut_url; qr_svg (markup from qrencode); secure ('' over plain HTTP,
    which has no last screen)."""
    base = facts['base_url']
    places = facts['addresses'].split() * bool(facts['secure']) + [base]
    facts = {**facts, 'check': ' '.join(f'{place}/icon.png' for place in places),
             'address': f'{base}/share/My%20iPhone'}
    page = SETUP_HTML
    for name, fact in facts.items():
        kept = r'\1' if fact else ''
        page = re.sub(f'<!--{name}-->(.*?)<!--/{name}-->', kept, page, flags=re.S)
    shown = {name: html.escape(str(fact)) for name, fact in facts.items()}
    shown['qr_svg'] = facts['qr_svg']
    return re.sub(r'{{(\w+)}}', lambda mark: shown[mark[1]], page)


# Served as they are; the set-up page is generated for each request.
ASSETS = {
    '/': ('text/html; charset=utf-8', PAGE_HTML),
    '/page.css': ('text/css; charset=utf-8', PAGE_CSS),
    '/page.js': ('text/javascript; charset=utf-8', PAGE_JS),
    '/sw.js': ('text/javascript; charset=utf-8', SW_JS),
    '/setup.js': ('text/javascript; charset=utf-8', SETUP_JS),
    '/manifest.webmanifest': ('application/manifest+json', MANIFEST),
    '/icon.png': ('image/png', ICON_PNG),
}
# Those that the `phone` command serves.
PHONE_ASSETS = ('/page.css', '/setup.js', '/icon.png')

# ---------- daemon ------------------------------------------------------------------------
# Owns three classes: Daemon (wiring, start and stop, signals, sd_notify, re-execution), Care (the
# thread `care`) and Health (what pauses the queue, problems, metrics). No lock: main waits for
# signals. Called by commands only.

INSTALLED = '/opt/videoserver/videoserverd.py'  # where install.sh puts this file
AS_SERVICE = '/usr/local/bin/videoserverd'  # its command: that file, as its user, with its config
LAUNCHD = 'system/com.videoserver.download'  # the service on a Mac
CARE_SECONDS = 60.0  # between looks at what is due
DRAIN_SECONDS = 5.0  # for requests under way when the server stops
INHERIT = 'VIDEOSERVERD_INHERIT'  # '<listening socket> <lock>': kept across a re-execution
FREEZE_SECONDS = 60.0  # after which the watchdog ends a frozen interpreter
# SIGUSR1: restart, also at a terminal; SIGALRM: our own pulse. Blocked in all threads and across
# a re-execution, so each one stays pending until main waits for it.
OUR_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM)
LOG_NAP = 0.05  # seconds that a log line may be late
LONGEST_MESSAGE = 3000  # characters in a log line: a link has 2048
STALE_SECONDS = 120.0  # a thread without a beat for this long is stuck
CERTIFICATE_WARNING_DAYS = 14


@functools.lru_cache(maxsize=1)
def log_time(now):
    """'2026-11-27 09:16:04' for epoch seconds, in local time; many lines share a second."""
    return time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))


class LogWriter(logging.Handler):
    """The log file, rotated when full, and stderr under systemd, on a terminal or without a file.

    The thread `log` writes lines in batches, at most LOG_NAP late: a request makes no system call
    for its line. A warning is written at once, with all before it."""

    def __init__(self, settings):
        super().__init__()
        self.settings, self.file, self.fd = settings, settings.file, -1
        self.lines = deque(maxlen=10000)  # if stderr blocks, the oldest are dropped
        self.wake = threading.Event()
        self.writing = threading.Lock()  # guards fd and the order of lines
        self.by_systemd = 'INVOCATION_ID' in os.environ  # the journal has its own clock
        if self.file:
            self._open()
        self.to_stderr = self.fd < 0 or self.by_systemd or sys.stderr.isatty()
        spawn(self._loop, name='log')

    def format(self, record):
        """One line of limited length, whatever a client sent."""
        message = record.getMessage()[:LONGEST_MESSAGE]
        if not message.isprintable():
            message = ''.join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        text = f'{record.levelname} {message}\n'
        if not self.by_systemd:
            text = f'{log_time(int(record.created))},{int(record.msecs):03d} {text}'
        if record.exc_info:
            text += f'{logging.Formatter().formatException(record.exc_info)}\n'
        return text

    def handle(self, record):
        """Without a Handler's lock: waiting for it would release the GIL."""
        self.lines.append(self.format(record))
        if record.levelno >= logging.WARNING:
            self.flush()
        elif not self.wake.is_set():
            self.wake.set()
        return True

    def flush(self):
        """Write what waits. Errors of disk or terminal must not fail a request."""
        with self.writing:
            text = ''.join([self.lines.popleft() for _ in range(len(self.lines))])
            data = text.encode('utf-8', 'backslashreplace')
            if self.to_stderr:
                with suppress(OSError):
                    os.write(2, data)
            with suppress(OSError):
                if self.fd < 0 < len(data) and self.file:
                    self._open()
                if self.fd >= 0:
                    os.write(self.fd, data)
                    if 0 < self.settings.max_size <= os.fstat(self.fd).st_size:
                        self._move_aside()

    def _loop(self):
        while True:
            self.wake.wait()
            time.sleep(LOG_NAP)
            self.wake.clear()
            self.flush()

    def _open(self):
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self.fd = os.open(self.file, flags, 0o600)  # it says who shared which link
        except OSError as error:
            os.write(2, f'{self.file}: cannot be written ({error.strerror})\n'.encode())

    def _move_aside(self):
        """server.log becomes server.log.1 and so on; the next batch opens a new one."""
        os.close(self.fd)
        self.fd = -1
        names = [self.file, *(f'{self.file}.{n + 1}' for n in range(self.settings.backup_count))]
        for at in range(len(names) - 1, 0, -1):
            with suppress(FileNotFoundError):
                os.replace(names[at - 1], names[at])
        if len(names) == 1:
            os.unlink(self.file)


def set_up_logging(config):
    """Log everything through one LogWriter; records omit what no line shows."""
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # docs.python.org/3/howto/logging.html#optimization
    log.setLevel(config.logging.level)
    log.propagate = False
    log.addHandler(LogWriter(config.logging))


def sd_notify(text):
    """Notify systemd (sd_notify(3)) if it started us."""
    address = os.environ.get('NOTIFY_SOCKET')
    if not address:
        return
    if address[0] == '@':
        address = '\0' + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(address)
            sock.send(text.encode())
        except OSError as error:
            log.warning('cannot notify systemd: %s', error)


def listen(host, port):
    """A listening socket; on :: for IPv4 too. Raises Trouble."""
    family = (socket.AF_INET, socket.AF_INET6)[':' in host]
    try:
        return socket.create_server((host, port), family=family, backlog=128,
                                    dualstack_ipv6=host == '::')
    except OSError as error:
        raise Trouble(f'port {port} on {host}: {os.strerror(error.errno)}; stop what uses it or '
                      'set [server] port.') from None


SERVE = 'sys.exit(v.act(sys.argv[3], v.cmd_run))'  # the server, imported: parsing costs 15 MB

# The parent of a server without a service manager: it forwards signals, and restarts the server
# when the watchdog has ended it (exit code 1, and a dump in the file $0).
KEEPER = '''
exec 3<&0
trap 'told=1 ended=1; kill -TERM $server' TERM INT
trap 'told=1; kill -HUP $server' HUP
while :; do
    "$@" <&3 3<&- &
    server=$!
    [ -z "$ended" ] || kill -TERM $server
    while told=; wait $server; code=$?; [ "$told" ]; do :; done
    [ $code = 1 ] && [ -s "$0" ] && [ -z "$ended" ] || exit $code
    mv -f "$0" "$0.last"
done
'''


def dump_file(config):
    return Path(f'{config.database.path}.freeze')


def compile_program():
    """Write the compiled program beside it, if possible."""
    from importlib.machinery import SourceFileLoader
    sys.dont_write_bytecode = False  # the environment's setting does not reach the server
    SourceFileLoader(PROGRAM.stem, str(PROGRAM)).get_code(PROGRAM.stem)


def user_name():
    return os.environ.get('USER') or str(os.getuid())


def known_output(config):
    """Where this database's videos were last, '' if it is new."""
    return find_line(Path(f'{config.database.path}.output'), '(?s)(.+)')


def usable_output(config, make=True):
    """Why the output folder cannot be used, or None. One new to this database is created and marked
    (if `make`); where the mark is missing later, its disk is not mounted."""
    folder = config.downloads.output_directory
    partial, named = folder / '.incomplete', f'The output folder {folder}'
    quoted = shlex.quote(str(folder))
    try:
        expected = known_output(config) == str(folder)
        if expected and not (folder / MARKER).exists():
            return (f'{named} is not the usual one: is its disk plugged in? Fix: mount it, or '
                    f'start over: `mkdir -p {quoted} && touch {quoted}/{MARKER}`')
        if make and not expected:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MARKER).touch()
            write_whole(Path(f'{config.database.path}.output'), str(folder))
        if make:
            partial.mkdir(exist_ok=True)
    except OSError as error:
        fix = f'ls -ld {quoted}'
        if error.errno == errno.EROFS:  # the service's sandbox
            fix = f'sudo ./install.sh --output {quoted}'
        return f'{named} cannot be used ({error.strerror}). Fix: `{fix}`'
    if not partial.exists():
        return f'{named} does not exist. Fix: start the server, which makes it'
    if all(os.access(place, os.W_OK | os.X_OK) for place in (folder, partial)):
        return None
    return (f'{named} is read-only for this user. '
            f'Fix: `sudo chown {user_name()} {quoted} {quoted}/.incomplete`')


def program(config):
    """How people run this program."""
    if str(PROGRAM) == INSTALLED:
        return 'sudo videoserverd'
    where = ('--config', str(config.file)) if config.file else ()
    return shlex.join(('python3', str(PROGRAM), *where))


def ca_assets(config):
    """The CA for the iPhone and for others, if it is ours."""
    if not config.server.tls or not config.server.ca_file.exists():
        return {}
    return {'/ca.mobileconfig': ('application/x-apple-aspen-config',
                                 lambda _: mobileconfig(config)),
            '/ca.crt': ('application/x-x509-ca-cert',
                        lambda _: read_ca(config.server.ca_file)[0])}


@functools.lru_cache(maxsize=4)  # anybody may ask for the set-up page
def qr_code(text, kind):
    """A QR code by qrencode, SVG or ANSIUTF8; '' where it is not installed."""
    return output_of(['qrencode', '-t', kind, '-m', '2', '-o', '-', text], 10).decode()


def shortcut_text(kind, **more):
    """A text of a Shortcut that is nothing but a variable."""
    return {'WFSerializationType': 'WFTextTokenString', 'Value': {
        'string': '\ufffc', 'attachmentsByRange': {'{0, 1}': {'Type': kind, **more}}}}


@functools.lru_cache(maxsize=4)
def signed_shortcut(address):
    """A Shortcut that sends what is shared to `address`, signed by a Mac's `shortcuts sign`; b''
    where there is none, or it fails. Not tried on a Mac."""
    import plistlib
    import tempfile
    body = {'WFSerializationType': 'WFDictionaryFieldValue', 'Value': {
        'WFDictionaryFieldValueItems': [{
            'WFItemType': 0, 'WFValue': shortcut_text('ExtensionInput'), 'WFKey': {
                'WFSerializationType': 'WFTextTokenString', 'Value': {'string': 'text'}}}]}}
    actions = {
        'downloadurl': {'UUID': 'ANSWER', 'WFURL': address, 'WFHTTPMethod': 'POST',
                        'WFHTTPBodyType': 'JSON', 'WFJSONValues': body},
        'notification': {'WFNotificationActionBody': shortcut_text(
            'ActionOutput', OutputUUID='ANSWER', OutputName='Contents of URL')}}
    workflow = {
        'WFWorkflowMinimumClientVersion': 900, 'WFWorkflowMinimumClientVersionString': '900',
        'WFWorkflowTypes': ['ActionExtension'],
        'WFWorkflowInputContentItemClasses': ['WFURLContentItem', 'WFStringContentItem'],
        'WFWorkflowActions': [
            {'WFWorkflowActionIdentifier': f'is.workflow.actions.{name}',
             'WFWorkflowActionParameters': parameters} for name, parameters in actions.items()]}
    with tempfile.TemporaryDirectory() as folder, suppress(OSError):
        plain, signed = Path(folder, 'Save video.shortcut'), Path(folder, 'signed.shortcut')
        plain.write_bytes(plistlib.dumps(workflow, fmt=plistlib.FMT_BINARY))
        output_of(['shortcuts', 'sign', '--mode', 'anyone', '--input', plain,
                   '--output', signed], 20)
        return signed.read_bytes()
    return b''


def addresses_at_home():
    """Our IPv4 addresses: a Content-Security-Policy does not take IPv6."""
    return [ip for ip in host_addresses() if ':' not in ip and not ip.startswith('127.')]


def bases_by_number(port):
    return ' '.join(f'https://{ip}:{port}' for ip in addresses_at_home())


def setup_facts(config, port, secure, at_home):
    """What the set-up page tells; our addresses only to clients `at_home`."""
    base, fingerprint, picture = public_base(config, port), '', ''
    if ca_assets(config):
        fingerprint = ca_fingerprint(config)
    if secure:
        picture = re.sub(r'^.*?(?=<svg)', '', qr_code(f'{base}/setup', 'SVG'), flags=re.S)
    return {
        'base_url': base, 'addresses': bases_by_number(port) * at_home, 'qr_svg': picture,
        'fingerprint': fingerprint, 'has_keys': 'yes' * bool(config.api_keys),
        'secure': 'yes' * secure, 'shortcut_url': config.phone.shortcut_url,
        'host': socket.gethostname().split('.')[0]}


def welcome(config, port, ytdlp):
    """One screen: where it listens, what to open on the phone."""
    base, told = public_base(config, port), ''
    if sys.stdout.isatty() and ca_assets(config):  # hashing costs 0.6 MB for good
        told = f'  CA        SHA-256 {ca_fingerprint(config)}\n'
    return f'''videoserverd {VERSION} is running.

  page      {base}/
  iPhone    {base}/setup   (first time: {program(config)} phone)
  videos    {config.downloads.output_directory}
  links     {config.database.path}
  yt-dlp    {ytdlp or "being fetched; links are accepted meanwhile"}
{told}
Ctrl-C stops it; nothing is lost.'''


def free_output(config):
    """Bytes, None if the folder is missing."""
    with suppress(OSError):
        return free_space(config.downloads.output_directory)


def days_left(certificate):
    return int((certificate.not_after - time.time()) // DAY)


class Care:
    """The thread `care`: minutely and daily chores. `problems` has what goes wrong there."""

    def __init__(self, config, store, board, restart):
        self.config, self.store, self.board, self.restart = config, store, board, restart
        self.vendor = own_vendor(config)
        self.freshness = Freshness(self.vendor, config.downloader)
        self.ytdlp = None  # the folder new attempts import from
        self.certificate = self.scheduler = self.server = None
        self.thumbs = config.database.path.parent / 'thumbs'
        self.problems = {}
        self.restart_when_idle = False
        self._due = threading.Event()  # something may be due now
        self._certificate_seen = (0, 0)  # when it was written, the day it was read
        self._room_made = -math.inf
        self.imports = Imports(config, store, lambda: self.scheduler.wake_imports())
        self._unpictured = deque(maxlen=1000)  # (id, file name) of videos without picture

    def start(self, server):
        self.server = server
        spawn(self._loop, name='care')

    def heard(self, job, outcome):
        """A download ended: a finished one needs a thumbnail, a changed site a newer yt-dlp."""
        if outcome.kind == 'done':
            self._unpictured.append((job.id, outcome.files[0].name))
        self.freshness.heard(site_of(job.url), outcome)
        self._due.set()

    def _loop(self):
        tasks = {'leftovers': self.remove_leftovers, 'certificate': self.renew_certificate,
                 'backup': self.copy_database, 'pictures': self.make_pictures,
                 'ytdlp': self.update_ytdlp, 'room': self.make_room, 'imports': self.imports.tidy}
        while True:
            for name, task in tasks.items():
                try:
                    task(time.time())
                    self.problems.pop(name, None)
                except (Trouble, StoreDown, OSError) as error:
                    if self.problems.get(name) != str(error):
                        log.warning('%s: %s', name, error)
                    self.problems[name] = str(error)
                except Exception as error:
                    log.exception('care: %s failed unexpectedly', name)
                    self.problems[name] = f'{name}: {error}; see the log'
            self._due.wait(CARE_SECONDS)
            self._due.clear()

    def remove_leftovers(self, now):
        """Remove partial downloads not in the queue, listed before asking it."""
        if not self.scheduler.ready or usable_output(self.config):
            return
        folders = os.scandir(self.config.downloads.output_directory / '.incomplete')
        for entry in [one for one in folders if UUID_PATTERN.fullmatch(one.name)]:
            found = self.store.records('id = ?', entry.name)
            if found and found[0]['status'] not in ('queued', 'downloading'):
                forget_files(self.config, entry.name, (), found[0]['files'])
            elif not found and now - entry.stat().st_mtime > DAY:  # else another server's, perhaps
                forget_files(self.config, entry.name, (), None)

    def renew_certificate(self, now):
        """Each day by the clock, so also when that was set: a new leaf if names, addresses or time
        require it. New connections get it, whoever changed the file."""
        config, file, day = self.config, self.config.server.cert_file, now // DAY
        if config.server.tls and (file.stat().st_mtime_ns, day) != self._certificate_seen:
            self.certificate, _ = ensure_certificate(config, now)
            self.server.context = server_context(config)
            self.server.app.hosts = known_hosts(config)
            self._certificate_seen = file.stat().st_mtime_ns, day

    def copy_database(self, now):
        """One copy a day; keep the newest `backups`. A bad copy never replaces a good one."""
        path, keep = self.config.database.path, self.config.database.backups
        folder = path.parent / 'backups'
        target = folder / f'{path.stem}-{time.strftime("%Y-%m-%d", time.localtime(now))}.db'
        if not keep or target.exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.store.backup(target)
        found = folder.glob(f'{path.stem}-????-??-??.db')
        for old in sorted(found, key=lambda copy: (copy <= target, copy))[:-keep]:
            old.unlink()  # first those from when the clock was ahead

    def make_pictures(self, now):
        """One at a time, outside the workers: a Pi needs seconds for each."""
        while self._unpictured and which('ffmpeg'):
            download_id, name = self._unpictured.popleft()
            self.thumbs.mkdir(exist_ok=True)
            picture = self.thumbs / f'{download_id}.jpg'
            if make_thumbnail(self.config.downloads.output_directory / name, picture):
                self.board.post(download_id)
            if not self.store.ids(download_id):  # deleted meanwhile
                picture.unlink(missing_ok=True)

    def make_room(self, now):
        """Hourly, delete what exceeds [downloads] keep, a hundred at a time, oldest first; the
        first time for a setting is announced a day ahead. Raises Trouble, OSError."""
        setting, now = self.config.downloads.keep, int(now)
        if not setting or 0 <= now - self._room_made < 3600:
            return
        ids = self.store.beyond_keep(*setting, now)
        file = Path(f'{self.config.database.path}.keep')  # the setting, and since when it counts
        known, _, since = file.read_text().partition('\n') if file.exists() else ('', '', now)
        if ids and known != str(setting):
            since = now
            write_whole(file, f'{setting}\n{now}')
        begin = int(since) + DAY
        if ids and now < begin:
            day = time.strftime('%d %B, %H:%M', time.localtime(begin))
            raise Trouble(f'From {day} the oldest videos are deleted to make room '
                          '([downloads] keep). Those with a star stay.')
        done = self.store.make_room(ids, now)  # also what a kill left half done
        for download_id, files in done:
            forget_files(self.config, download_id, [file.name for file in files])
            self.board.post(download_id)
        if done:  # there may be more
            log.info('%d downloads deleted to make room', len(done))
            self.store.room_made([download_id for download_id, _ in done])
        else:
            self._room_made = now

    def update_now(self):
        self.freshness.wanted = True
        self._due.set()

    def update_ytdlp(self, now):
        """Fetch yt-dlp if missing or due. An imported one is replaced by a restart."""
        changed = self.freshness.step(now)
        self.restart_when_idle = changed and 'restart' not in self.problems
        if not changed:
            self.ytdlp = self.vendor.current()
        elif self.restart_when_idle and not self.scheduler.running():
            self.restart()
        if self.freshness.trouble:
            raise Trouble(self.freshness.trouble)


GETTING_READY = 'Getting ready: yt-dlp is being fetched.'  # the first minute; no fault


class Health:
    """What pauses the queue, what is wrong, and the figures for /metrics."""

    def __init__(self, config, store, board, care):
        self.config, self.store, self.board, self.care = config, store, board, care
        self.started = time.time()

    def preflight(self, make=True):
        """Why no download may start, or None; `make`: create the output folder if it is new."""
        message, free = usable_output(self.config, make), free_output(self.config)
        least = self.config.downloads.min_free_space
        if message:
            return message
        if free is not None and free < least:
            return (f'The disk is full: {format_size(free)} free, {format_size(least)} needed. '
                    'Fix: delete videos, or lower [downloads] min_free_space.')
        if self.care.restart_when_idle:
            return 'The server is about to switch to a new yt-dlp.'
        if self.care.ytdlp:
            return None
        if 'ytdlp' in self.care.problems:
            return f'yt-dlp is missing. Fix: `{program(self.config)} update`'
        return GETTING_READY

    def queue_size(self):
        counts = self.store.counts()
        return counts['queued'] + counts['downloading']

    def certificate_days(self):
        """None without one."""
        return self.care.certificate and days_left(self.care.certificate)

    def problems(self, paused):
        """What is wrong: sentences, each with its fix."""
        days = self.certificate_days()
        found = [paused, *self.care.problems.values(), self.care.vendor.held_back()]
        if self.store.error:
            found.append(f'Links cannot be stored: {self.store.error}. '
                         f'Fix: check the disk of {self.config.database.path}')
        if days is not None and days < CERTIFICATE_WARNING_DAYS:
            found.append(f'The certificate expires in {days} days. '
                         f'Fix: `{program(self.config)} cert`')
        found += [f'{courier.fails}: {courier.error}' for courier in self.store.couriers
                  if courier.error]
        found += [f'Cookies: {told}' for fine, told in Cookies(self.config).report(time.time())
                  if not fine]
        return [message for message in found if message not in (None, '', GETTING_READY)]

    def report(self):
        """What /api/v1/health tells; `storing`: whether links can be stored."""
        with suppress(StoreDown):
            self.store.check_room()
            if self.store.error:
                self.store.probe()
        try:
            size = self.queue_size()
        except StoreDown as error:
            self.store.error, size = str(error), 0
        paused = self.preflight()
        problems = self.problems(paused)
        return {
            'status': 'degraded' if problems else 'healthy', 'version': VERSION,
            'uptime': max(0, int(time.time() - self.started)), 'queue_size': size,
            'problems': problems, 'paused': paused, 'preparing': paused == GETTING_READY,
            'free_disk': free_output(self.config),
            'ytdlp_version': self.care.vendor.version(),
            'certificate_days': self.certificate_days(), 's3': bool(self.config.s3.endpoint),
            'keys': bool(self.config.api_keys), 'storing': not self.store.error,
            'cookies': [told for _, told in Cookies(self.config).report(time.time())]}

    def gauges(self, paused):
        """(name, value) of each figure of /metrics."""
        figures = [
            *((f'downloads{{status="{status}"}}', n) for status, n in self.store.counts().items()),
            ('free_disk_bytes', free_output(self.config)), ('paused', float(paused)),
            ('certificate_days', self.certificate_days()),
            ('uptime_seconds', time.time() - self.started),
            (f'ytdlp_info{{version="{self.care.vendor.version() or ""}"}}', 1.0),
            *self.board.counters()]
        return [(f'videoserverd_{name}', value) for name, value in figures if value is not None]


class Daemon:
    """The running server: wiring, start, signals, stop."""

    def __init__(self, config):
        self.config = config
        self.store = Store(config.database.path, config.security.requests_per_hour)
        self.board = Board(int(time.time()) % 10 ** 8)
        restart = functools.partial(os.kill, os.getpid(), signal.SIGUSR1)
        self.care = Care(config, self.store, self.board, restart)
        self.health = Health(config, self.store, self.board, self.care)
        self.scheduler = Scheduler(
            config, self.store, self.board,
            lambda job, *hooks: Attempt(job, config, self.care.ytdlp, *hooks),
            self.health.preflight, self._on_outcome, restart)
        self.care.scheduler = self.scheduler
        self.bucket = Bucket(config) if config.s3.endpoint else None
        self.lock = Lock(config.database.path)
        self.server = None
        self._set_back = lambda: None  # the watchdog
        self.ends = {signal.SIGTERM, signal.SIGINT}  # the signals that stop it

    # -- start

    def run(self):
        """Start, serve, stop: the exit code, unless it re-executes. Raises Trouble."""
        inherited = [int(word) for word in os.environ.pop(INHERIT, '').split()]
        if inherited:
            self.lock.fd = inherited[1]
        self.lock.take()
        self.store.open()
        output = self.config.downloads.output_directory
        if known_output(self.config) not in ('', str(output)):
            self.store.move_files(output)
        self._set_watchdog()
        if sys.stdin.isatty():  # SIGHUP: the terminal is gone
            self.ends.add(signal.SIGHUP)
        context = self._make_context()
        if self._told_to_stop():
            return self._end()
        sock = self._listening(inherited[:1])
        self._start_threads(sock, context)
        self._announce()
        return self._stop(self._wait())

    def _set_watchdog(self):
        """Log the dump of the previous watchdog; start a file for ours."""
        file, found = dump_file(self.config), ''
        for old in (file, Path(f'{file}.last')):
            with suppress(OSError):
                found += old.read_text(errors='replace')
                old.unlink()
        if found:
            log.error('the server froze and its watchdog stopped it: %s', found[:4000])
        vendor = str(self.config.downloader.ytdlp_directory)
        self.scheduler.frozen = vendor.encode('ascii', 'backslashreplace').decode() in found
        with suppress(OSError):  # a full disk; systemd's watchdog is left
            dump = open(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), 'w')
            self._set_back = lambda: faulthandler.dump_traceback_later(
                FREEZE_SECONDS, exit=True, file=dump)

    def _make_context(self):
        if not self.config.server.tls:
            return None
        turns = 0
        while not self._told_to_stop():
            try:
                self.care.certificate, _ = ensure_certificate(self.config, time.time())
                return server_context(self.config)
            except ClockWrong as error:  # a Pi without a network at boot: wait for the time
                if turns % 1800 == 0:
                    log.warning('%s', error)
                turns += 1
                sd_notify(f'STATUS={error}\nEXTEND_TIMEOUT_USEC=30000000')
                time.sleep(2)

    def _listening(self, inherited):
        """The inherited socket if it listens where it should, else a new one."""
        server = self.config.server
        for fd in inherited:
            sock = socket.socket(fileno=fd)
            os.set_inheritable(fd, False)
            host, port = sock.getsockname()[:2]
            if host == server.host and server.port in (0, port):
                return sock
            sock.close()
        return listen(server.host, server.port)

    def _start_threads(self, sock, context):
        self.care.ytdlp = self.care.vendor.current()
        app = self.make_app(sock.getsockname()[1])
        self._start_couriers(app)
        self.server = Server(sock, app, context)
        self.scheduler.start()
        spawn(self.server.serve_forever, name='accept')
        self.care.start(self.server)

    def _start_couriers(self, app):
        """The threads that empty the outbox, and what fills it."""
        notify, outgoing = self.config.notify, self.store.outgoing
        if self.bucket:
            outgoing['upload'] = ['finish']
            self.store.couriers.append(Uploader(self.config, self.bucket, self.store))
        if notify.url:
            verbs = {'completed': 'finish', 'failed': 'give_up', 'attention': 'import'}
            outgoing['notify'] = [verbs[event] for event in notify.events]
            self.store.couriers.append(Notifier(
                self.config, self.store, app.describe, public_base(self.config, app.port),
                lambda: self.health.problems(
                    not self.care.restart_when_idle and self.health.preflight() or None)))
        for courier in self.store.couriers:
            courier.thread.start()

    def make_app(self, port):
        config = self.config
        assets = {**ASSETS, **ca_assets(config), '/setup': (
            'text/html; charset=utf-8', lambda request: setup_page(
                setup_facts(config, port, True, is_at_home(request))))}
        routes = [Route('GET', path, get_asset, kind.split(';')[0], access='open')
                  for path, (kind, _) in assets.items()]
        # Of the picture by which the set-up page sees that it is trusted.
        origins = f' {public_base(config, port)} {bases_by_number(port)}'
        app = App(config, store=self.store, board=self.board, scheduler=self.scheduler,
                  assets=assets, routes=(*ROUTES, *routes), health=self.health.report,
                  forget=self._forget,
                  bucket=self.bucket, thumbs=self.care.thumbs, image_origin=origins,
                  update=self.care.update_now, imports=self.care.imports, shortcut=signed_shortcut,
                  gauges=lambda: self.health.gauges(bool(self.scheduler.paused)),
                  link_secret=link_secret(config.database.path.parent / 'link.key'))
        app.port, app.hosts = port, known_hosts(config)
        return app

    def _announce(self):
        port, server = self.server.app.port, self.config.server
        self.lock.tell({'pid': os.getpid(), 'port': port, 'host': server.host, 'tls': server.tls,
                        'output': str(self.config.downloads.output_directory)})
        sd_notify(f'READY=1\nSTATUS=Listening on port {port}\nMAINPID={os.getpid()}')
        log.info('videoserverd %s: listening on %s port %d, %d in the queue', VERSION,
                 server.host, port, self.health.queue_size())
        print(welcome(self.config, port, self.care.vendor.version()), flush=True)

    # -- signals, waiting, stopping

    def _told_to_stop(self):
        return self.ends & signal.sigpending()

    def _wait(self):
        """Wait for a stop or restart; whether to restart. systemd's watchdog is fed while all
        threads are alive; faulthandler's by this thread, which never waits for a disk: it needs no
        interpreter, which a single regular expression of yt-dlp can block for minutes."""
        pulse = min((int(os.environ.get('WATCHDOG_USEC', 0)) or 1e9) / 2e6, FREEZE_SECONDS / 4)
        signal.setitimer(signal.ITIMER_REAL, pulse, pulse)
        while True:
            self._set_back()
            number = signal.sigwait(OUR_SIGNALS)
            if number in self.ends:
                return False
            if number != signal.SIGALRM:
                if self._may_restart():
                    return True
            elif self.alive():
                sd_notify('WATCHDOG=1')

    def alive(self):
        """Whether commit thread, scheduler and listener all do their work."""
        oldest = min(self.scheduler.beat, self.server.beat)
        return self.store.thread.is_alive() and time.monotonic() - oldest < STALE_SECONDS

    def _may_restart(self):
        """Whether a re-execution would succeed; if not, this process runs on."""
        try:
            config = load_config(self.config.file, dict(os.environ))
            compile(PROGRAM.read_bytes(), str(PROGRAM), 'exec')  # not what was compiled before
            if config.server.tls and config.server.cert_file.exists():
                server_context(config)
            path, place = config.database.path, (config.server.host, config.server.port)
            if path != self.config.database.path and Lock(path).running():
                raise Trouble(f'{path}: another server uses this database')
            if place != (self.config.server.host, self.config.server.port):
                listen(*place).close()
            return True
        except (Trouble, OSError, SyntaxError, ValueError) as error:
            log.error('restart refused, running on as before: %s', error)
            self.care.problems['restart'] = (
                f'A restart was refused: {error}. Fix that, then restart by hand.')
            return False

    def _stop(self, restart):
        """Requests end, downloads go back into the queue, the database is closed."""
        log.info('stopping%s', ' to restart in place' * restart)
        sd_notify(f'RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}' if restart
                  else 'STOPPING=1')
        self.board.release()
        stopper = spawn(self.scheduler.stop)
        self.server.drain(DRAIN_SECONDS if restart else 2.0)
        if not restart:
            self.server.server_close()
        stopper.join(5)
        for courier in self.store.couriers:
            courier.stop()
        self.care.freshness.stop()
        self._set_back()  # the disk may be slow
        self.store.close()
        if restart:
            compile_program()
            if not self._told_to_stop():
                self._re_execute()
        return self._end()

    def _end(self):
        self.store.close()
        self.lock.release()
        log.info('stopped')
        return 0

    def _re_execute(self):
        """The newest program and configuration in this process. Socket and lock stay open: a phone
        only waits a moment."""
        kept = self.server.socket.fileno(), self.lock.fd
        for fd in kept:
            os.set_inheritable(fd, True)
        os.environ[INHERIT] = f'{kept[0]} {kept[1]}'
        for handler in log.handlers:
            handler.flush()
        for number in {signal.SIGHUP, signal.SIGUSR1} & signal.sigpending():
            signal.sigwait({number})  # what it asks for is done now
        os.execv(sys.executable, bare_python(SERVE, str(self.config.file or '')))

    # -- what the scheduler and http ask for

    def _on_outcome(self, job, outcome, over):
        """Count it, remove partial files if it is over."""
        site, count = site_of(job.url), self.board.count
        if site not in SITES:
            site = 'other'
        count(f'attempts_total{{outcome="{outcome.kind}",reason="{outcome.reason}"}}')
        count(f'ways_total{{site="{site}",way="{way_of(job, self.config)}",'
              f'outcome="{outcome.kind}"}}')
        if over:  # a carousel tells its files with each attempt
            count('downloaded_bytes_total', sum(file.size for file in outcome.files))
            forget_files(self.config, job.id, (), outcome.files or job.files)
        self.care.heard(job, outcome)

    def _forget(self, record, keep):
        """Delete a download and, unless `keep`, its copies and the files that no other one has;
        whether that was possible."""
        download_id, copies = record['id'], []
        if self.bucket and not keep:
            copies = [self.bucket.key(download_id, file.name) for file in record['files']]
        files = self.store.forget(download_id, copies)
        if files is None:
            return False
        doomed = [file.name for file in files if not keep]
        forget_files(self.config, download_id, doomed, record['files'])
        with suppress(OSError):
            (self.care.thumbs / f'{download_id}.jpg').unlink()
        self.board.post(download_id)
        return True


# ---------- commands ----------------------------------------------------------------------
# Owns the command line: one function per command, each returns its exit code. Trouble becomes
# one line on stderr in `main` only. No lock. Called by the shell.


def cmd_run(config, options):
    """run the server in the foreground"""
    signal.pthread_sigmask(signal.SIG_BLOCK, OUR_SIGNALS)
    for number in OUR_SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # ignored, as by nohup, it need not become pending
    set_up_logging(config)
    return Daemon(config).run()


@contextmanager
def server_at_hand(config):
    """The running server; else one of our own, which stores links and downloads nothing. Raises
    Trouble."""
    if Lock(config.database.path).running():
        yield
        return
    config.security.allowed_clients = LOOPBACK
    config.security.requests_per_hour = 0  # no limit for the owner
    daemon = Daemon(config)
    daemon.lock.take()
    try:
        daemon.store.open()
        sock = listen('127.0.0.1', 0)
        port = sock.getsockname()[1]
        server = Server(sock, daemon.make_app(port), None)
        spawn(server.serve_forever)
        daemon.lock.tell({'pid': os.getpid(), 'host': '127.0.0.1', 'port': port, 'tls': False})
        yield
    finally:
        daemon.store.close()
        daemon.lock.release()


def cmd_setup(config, options):
    """make directories, database, certificate and yt-dlp, then exit"""
    vendor = own_vendor(config)
    with server_at_hand(config):
        print(f'database     {config.database.path}')
    if config.server.tls:
        certificate, changed = ensure_certificate(config, time.time())
        done = 'made' if changed else 'kept'
        print(f'certificate  {config.server.cert_file} ({done}; {days_left(certificate)} days)')
    fault = usable_output(config)
    print(f'videos       {fault or config.downloads.output_directory}')
    if vendor.current() is None or vendor.lacks_curl():
        print('yt-dlp       being fetched …', flush=True)
        vendor.install()
    print(f'yt-dlp       {vendor.version()} in {vendor.folder}')
    return int(bool(fault))


def cmd_cert(config, options):
    """make or renew the certificate"""
    names = (*(options.host or ()), *(options.ip or ()))
    certificate, changed = ensure_certificate(
        config, time.time(), names, options.force, options.new_ca)
    if certificate.own:
        print(f'{config.server.cert_file} is your own certificate; it is left alone.')
        return 0
    done = 'made' if changed else 'still good'
    print(f'{config.server.cert_file}: {done}, for {days_left(certificate)} days and these names:')
    print(' ', *certificate.names)
    print(f'CA SHA-256: {ca_fingerprint(config)}')
    if changed and Lock(config.database.path).running():
        print('The running server will use it within a minute.')
    return 0


def cmd_update(config, options):
    """fetch the newest yt-dlp that this Python can run"""
    vendor = own_vendor(config)
    before = vendor.version()
    after = vendor.install(config.downloader.channel.replace('auto', 'stable'))
    print(f'yt-dlp is now {after}; it was {before or "missing"} before.')
    if vendor.held_back():
        print(vendor.held_back())
    if before != after and Lock(config.database.path).running():
        print('The running server will use it as soon as no download is running.')
    return 0


def cure(linux, mac):
    return mac if sys.platform == 'darwin' else linux


# -- asking the running server

def call_server(config, method, path, body=None, file=None):
    """The running server's answer to JSON, an open file or nothing."""
    facts = Lock(config.database.path).running()
    host = facts.get('host', config.server.host)
    host = {'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host)
    if ':' in host:
        host = f'[{host}]'
    headers = {'Content-Type': 'application/json'}
    data = body and json.dumps(body).encode()
    if file:
        headers = {'Content-Type': 'application/octet-stream',
                   'Content-Length': str(os.fstat(file.fileno()).st_size)}
        data = iter(lambda: file.read(BLOCK), b'')
    if config.api_keys:
        headers['X-API-Key'] = config.api_keys[0]
    scheme, context = 'http', None
    try:
        if facts.get('tls', config.server.tls):
            scheme, context = 'https', client_context(config.server.cert_file)
        answer = http_call(
            method, f'{scheme}://{host}:{facts.get("port", config.server.port)}{path}', headers,
            data, 600.0 if file else 60.0, context=context)
        return json.loads(answer[2])
    except (OSError, ValueError) as error:
        raise Trouble(f'The server does not answer ({error}). Fix: start it.') from None


def post_text(config, fields):
    """Each link in a text with its result, and the links to send again."""
    answer = call_server(config, 'POST', '/api/v1/downloads',
                         {**fields, 'timestamp': time.time_ns()})
    rows, rest = answer.get('downloads', []), answer.get('keep', '')
    if not any('download_id' in row for row in rows):  # as when the hour's links are used up
        return [{'url': fields['text'], 'error': answer.get('message', 'no answer')}], ''
    return [row for row in rows if 'download_id' in row or row['url'] not in rest.split()], rest


def cmd_add(config, options):
    """queue links: through the running server, or else into the database"""
    failed, fields = False, {'client_id': 'command-line', 'again': options.again}
    with server_at_hand(config):
        for text in options.url:
            while text:
                rows, text = post_text(config, {**fields, 'text': text})
                for row in rows:
                    failed |= 'error' in row
                    print(row.get('download_id', 'refused'), row['url'], row.get('error', ''))
    return int(failed)


def ask_to_start(row):
    """Show what is in an export; on a terminal ask whether to queue it."""
    known = sum(group['here'] for group in row['groups'])
    print(f'{row["name"]}: {row["message"]}' + f'; {known:,} are here already' * bool(known))
    history = ', all but the watch history' * any(
        group['group'] == 'history' for group in row['groups'])
    return not sys.stdin.isatty() or input(f'Queue them{history}? [y/n] ').lower() == 'y'


def cmd_import(config, options):
    """queue a data export of TikTok or Instagram, or a file of links"""
    only = list(filter(None, options.only.split(',')))
    if not set(only) <= GROUP_NAMES.keys():
        raise Trouble(f'--only takes some of {",".join(GROUP_NAMES)}')
    place = f'/api/v1/imports?name={quote(options.file.name)}&client_id={quote(options.client)}'
    with open(options.file, 'rb') as file, server_at_hand(config):
        row = call_server(config, 'POST', place, file=file)
        if 'groups' not in row:
            raise Trouble(row.get('message', 'The server gave no answer.'))
        verb = 'start' if options.only or ask_to_start(row) else 'cancel'
        row = call_server(config, 'POST', f'/api/v1/imports/{row["import_id"]}/{verb}',
                          {'only': only})
    if verb == 'start':
        print(row['message'])
    return int(verb == 'cancel')


# -- the page's actions, from a terminal

COLOURS = {'completed': 32, 'failed': 31, 'downloading': 36, 'queued': 33}
SHOWN = 20  # downloads that `list` shows


def opened_store(config):
    """The database, for reading while the server may run."""
    if not config.database.path.exists():
        raise Trouble(f'{config.database.path}: no database yet; start the server once.')
    return Store(config.database.path)


def describe_state(config, record):
    """A download's state in a few words, and its title if known."""
    state, title = record['status'], record['title'] or record['url']
    if state == 'downloading':
        with suppress(Trouble):
            live = call_server(config, 'GET', f'/api/v1/status/{record["id"]}')
            return f'{live["progress"]:.0f}% done', live['title'] or title
    if record['reason'] == 'cancelled':
        state = 'cancelled'
    elif (record['next_attempt_at'] or 0) > time.time():
        state = time.strftime('again %H:%M', time.localtime(record['next_attempt_at']))
    return state, title


def cmd_list(config, options):
    """show the queue at a glance"""
    store, columns, colour = opened_store(config), 10000, '{1}'
    if sys.stdout.isatty():
        columns = os.get_terminal_size().columns
        if 'NO_COLOR' not in os.environ:
            colour = '\33[{0}m{1}\33[0m'
    limit = 1 << 30 if options.all else SHOWN
    total, records = store.page(limit, status=options.status)
    print('   '.join(f'{n} {status}' for status, n in store.counts().items()))
    for row in Imports(config, store).all():
        print(f'import {row["name"]}, {row["state"]}: {row["message"]}')
    for record in records:
        state, title = describe_state(config, record)
        state = colour.format(COLOURS[record['status']], f'{state:<12}')
        when = ' ' * 16  # of an import, not begun
        if record['created_at']:
            when = time.strftime('%Y-%m-%d %H:%M', time.localtime(record['created_at']))
        print(f'{record["id"][:8]}  {when}  {state} {title[:columns - 41]}')
        if record['error_message']:
            print(f'{"":28}{record["error_message"][:columns - 28]}')
    if total > len(records):
        print(f'… and {total - len(records)} older ones: list --all')
    return 0


CHANGES = {  # what the server can do to a download: help, method, tail of the path
    'retry': ('queue downloads again, at once: those named, or all that failed', 'POST', '/retry'),
    'cancel': ('stop downloads, or take them out of the queue', 'POST', '/cancel'),
    'delete': ('forget downloads and delete their files', 'DELETE', ''),
}


def cmd_change(config, options):
    """retry, cancel or delete each of the downloads"""
    store, ids, failed = opened_store(config), [], False
    if not options.id and not options.failed:
        raise Trouble('name downloads by their ID, as `list` shows it, or use --failed')
    for word in options.id:
        found = store.ids(word.lower())
        if len(found) != 1:
            raise Trouble(f'{word}: {len(found) or "no"} downloads have an id starting with this')
        ids += found
    if options.failed:
        records = store.page(1 << 30, status='failed')[1]
        ids += [record['id'] for record in records if record['reason'] != 'cancelled']
    _, method, tail = CHANGES[options.command]
    for download_id in ids:
        answer = call_server(config, method, f'/api/v1/download/{download_id}{tail}')
        failed |= answer.get('status') == 'error'
        print(download_id[:8], answer['message'])
    return int(failed)


def cmd_log(config, options):
    """show the end of the log; with -f follow it"""
    file, stream = config.logging.file, None
    if not file:
        raise Trouble("[logging] file is empty: look at the server's terminal, or: " + cure(
            'journalctl -u videoserver', 'tail /var/lib/videoserver/logs/launchd.log'))
    while True:
        with suppress(FileNotFoundError):  # moved aside, and the next one not begun yet
            if not stream or not os.path.samestat(os.fstat(stream.fileno()), os.stat(file)):
                stream = open(file, encoding='utf-8', errors='replace')
        print(''.join(deque(stream or (), 100)), end='', flush=True)
        if not options.follow:
            return 0
        time.sleep(0.5)


# -- doctor

# Each check yields what is wrong, and the command that fixes it.

def check_server(config):
    """Whether it runs, and its problems."""
    if Lock(config.database.path).running():
        try:
            health = call_server(config, 'GET', '/api/v1/health')
            problems = health.get('problems', [str(health.get('message'))])
        except Trouble as error:
            problems = [str(error)]
    else:
        fix, port = program(config), config.server.port
        if str(PROGRAM) == INSTALLED:
            fix = cure('sudo systemctl start videoserver', f'sudo launchctl kickstart {LAUNCHD}')
        yield 'server: not running on this database', fix
        try:
            listen(config.server.host, port).close()
        except Trouble as error:
            yield str(error), cure(f'sudo ss -ltnp "sport = :{port}"',
                                   f'sudo lsof -nP -iTCP:{port} -sTCP:LISTEN')
        daemon = Daemon(config)
        daemon.care.ytdlp = daemon.care.vendor.current()
        problems = daemon.health.problems(daemon.health.preflight(make=False))
    for problem in problems:
        fault, _, fix = problem.partition(' Fix: ')
        yield fault, fix or 'see the log for details'


def check_database(config):
    """The database and its copies; who may read what is private."""
    path = config.database.path
    if not path.exists():
        yield f'database: {path} is missing', f'{program(config)} setup'
        return
    try:
        with closing(sqlite3.connect(f'{path.as_uri()}?mode=ro', uri=True)) as db:
            quick_check(db)
    except sqlite3.Error as error:
        yield (f'database: {path}: {error}', 'stop the server, then copy the newest good file in '
               f'{path.parent / "backups"} to {path}')
    if not os.access(path, os.W_OK):
        yield (f'database: this user cannot write to {path}',
               f'sudo chown {user_name()} {shlex.quote(str(path))}')
    keys = [file for name, file in certificate_files(config).items() if name.endswith('.key')]
    for file in (path, *keys, Cookies(config).file):  # a group may be let in on purpose
        with suppress(OSError):  # it is missing, or this user may not look
            if file.stat().st_mode & 0o007:
                yield (f'permissions: everybody on this machine can access {file}',
                       f'sudo chmod o= {shlex.quote(str(file))}')


def check_certificate(config):
    """Days, names and key of the certificate."""
    if not config.server.tls:
        return
    if time.time() < BUILT:
        yield f'clock: {time.strftime("%Y-%m-%d %H:%M")} is wrong', cure(
            'sudo timedatectl set-ntp true', 'sudo sntp -sS time.apple.com')
    if not which('openssl'):
        yield 'openssl is missing: no certificate can be made', cure(
            'sudo apt-get install openssl', 'brew install openssl')
    fix = f'{program(config)} cert'
    try:
        server_context(config)
        leaf = look_at_certificate(config)
    except (Trouble, OSError) as error:
        aside = [shlex.join(('mv', str(file), f'{file}.old'))
                 for file in (config.server.cert_file, config.server.key_file)
                 if os.path.exists(file)]  # Path.exists() raises for some
        yield f'certificate: {error}', ' && '.join([*aside, fix])
        return
    if days_left(leaf) < CERTIFICATE_WARNING_DAYS:
        yield f'certificate: {days_left(leaf)} days left', fix
    missing = {*known_hosts(config)} - {*leaf.names}
    permitted = remembered_names(config)[1]
    missing = ', '.join(name for name in sorted(missing) if may_sign(name, permitted))
    if missing and not leaf.own:
        yield f'certificate: does not cover {missing}', fix


def check_downloads(config):
    """ffmpeg, and the age of yt-dlp."""
    if not which('ffmpeg'):
        yield ('ffmpeg is missing: the best video cannot be merged with its sound',
               cure('sudo apt-get install ffmpeg', 'brew install ffmpeg'))
    if not has_ca_store():
        yield ('CA certificates are missing: no site can be verified', cure(
            'sudo apt-get install ca-certificates',
            'open "/Applications/Python 3.*/Install Certificates.command"'))
    ignored = ', '.join(name for name in os.environ if name.lower() in
                        ('http_proxy', 'https_proxy', 'all_proxy'))
    if ignored and not config.downloader.proxy:
        yield (f'proxy: downloads ignore {ignored} in the environment',
               'set [downloader] proxy if they should use one, else unset it')
    with suppress(StoreDown):
        turned_away = Store(config.database.path).read(
            "SELECT count(*) FROM downloads WHERE reason IN ('login', 'blocked') "
            'AND last_updated > ?', (time.time() - 7 * DAY,))[0][0]
        if turned_away and not config.downloader.impersonate:
            yield (f'downloads that the sites turned away this week: {turned_away}',
                   'set [downloader] impersonate=on, or add cookies')
    if time.time() - own_vendor(config).last_checked() > 30 * DAY:
        yield 'yt-dlp: no check for a newer one in a month', f'{program(config)} update'


def cmd_doctor(config, options):
    """say what is wrong with this installation and how to fix it"""
    count = 0
    print(f'configuration: {config.file or "built-in values"}')
    for check in (check_server, check_database, check_certificate, check_downloads):
        faults = list(check(config))
        for fault, fix in faults:
            print(f'BAD  {fault}\n       fix: {fix}')
        if not faults:
            print(f' ok  {check.__name__[6:]}: {check.__doc__}')
        count += len(faults)
    print(f'{count} to fix.' if count else 'Nothing is wrong.')
    return int(count > 0)


# -- first contact

PHONE_NEWS = {  # printed when the phone first requests a path
    '/': 'The phone has opened the page.', '/ca.mobileconfig': 'It has downloaded the profile.',
    '/seen/trusted': 'It trusts the server. Next: make the Shortcut.'}


def print_news(news):
    print(f'{time.strftime("%H:%M:%S")}  {news}', flush=True)


def tell_first_link(config, since):
    """Print when the first link created at `since` or later arrives."""
    store, records = Store(config.database.path), []
    while not records or records[0]['created_at'] < since:
        time.sleep(1)
        with suppress(StoreDown):
            records = store.page(1)[1]
    print_news(f'It works: {records[0]["url"]} from {records[0]["client_id"]}.')


def cmd_phone(config, options):
    """set up a new iPhone: serve the profile and the steps for some minutes"""
    if not config.server.tls:
        raise Trouble('[server] tls is off: the phone has to trust the certificate of the proxy in '
                      'front, not ours')
    if not ca_assets(config):
        ensure_certificate(config, time.time())
    running = Lock(config.database.path).running()
    port = running.get('port', config.server.port)
    facts = setup_facts(config, port, False, True)
    assets = {**{path: ASSETS[path] for path in PHONE_ASSETS}, **ca_assets(config),
              '/': ('text/html; charset=utf-8', lambda _: setup_page(facts)),
              '/seen/trusted': ('text/plain', '')}
    assets['/setup'] = assets['/']
    untold = dict(PHONE_NEWS)

    def answer(app, request):
        news = untold.pop(request.path.replace('/setup', '/'), '')
        if news:
            print_news(news)
        return get_asset(app, request)
    routes = tuple(Route('GET', path, answer, access='open') for path in assets)
    app = App(config, assets=assets, routes=routes, image_origin=f' {public_base(config, port)}')
    app.hosts = known_hosts(config)
    server = Server(listen('0.0.0.0', options.port), app, None)
    url = f'http://{[*addresses_at_home(), "127.0.0.1"][0]}:{server.server_address[1]}/'
    print(qr_code(url, 'ANSIUTF8'))
    print(f'Open this on the iPhone (in Safari, on the same Wi-Fi):  {url}\n')
    print(f'The fingerprint of the certificate it offers:\n  {ca_fingerprint(config)}\n')
    if not running:
        print(f'The server is not running yet: start it with  {program(config)}')
    print(f'This page stays up for {options.minutes} minutes; Ctrl-C ends it now.', flush=True)
    spawn(server.serve_forever)
    spawn(tell_first_link, config, int(time.time()))
    with suppress(KeyboardInterrupt):
        time.sleep(60 * options.minutes)
    return 0


def cmd_backup(config, options):
    """write a consistent copy of the database, while the server runs"""
    opened_store(config).backup(options.file.absolute())
    print(f'{options.file}: {format_size(options.file.stat().st_size)}')
    return 0


# -- another disk

DROP_IN = Path('/etc/systemd/system/videoserver.service.d/10-install.conf')
OUTPUT_NAMES = ('VIDEOSERVER_DOWNLOADS_OUTPUT_DIRECTORY', 'PRT_VIDEODOWNLOADER_VIDEODATAPATH')


def copy_videos(old, new, since):
    """Copy the files that appeared after `since`, epoch seconds; each is synced and compared before
    it gets its name. Raises Trouble, OSError."""
    import filecmp
    import shutil
    for folder, folders, names in os.walk(old):
        folders[:] = [name for name in folders if name != '.incomplete']
        place = new / os.path.relpath(folder, old)
        place.mkdir(parents=True, exist_ok=True)
        for name in names:
            file, part = Path(folder, name), place / '.copy'
            with suppress(FileNotFoundError):  # deleted just now
                if name == MARKER or file.is_symlink() or not file.is_file() \
                        or file.stat().st_ctime < since:
                    continue
                shutil.copy2(file, part)
                sync(part)
                if not filecmp.cmp(file, part, shallow=False):
                    raise Trouble(f'{file}: its copy differs; is the new disk sound?')
                part.rename(place / name)
                print(f'copied {name}', flush=True)
        sync(place)


def rewrite(file, change):
    """Replace a file that another user may own by change(its text). Raises OSError."""
    old = file.stat()
    write_whole(file, change(file.read_text(encoding='utf-8')))
    os.chmod(file, stat.S_IMODE(old.st_mode))
    os.chown(file, old.st_uid, old.st_gid)


def with_output(text, folder):
    """The text of a config.ini with this output_directory."""
    line = f'output_directory = {folder}\n'
    text, found = re.subn(r'^output_directory\s*[=:].*\n?', lambda _: line, text, flags=re.M)
    if found:
        return text
    if '[downloads]' not in text:
        text += '\n[downloads]\n'
    return text.replace('[downloads]\n', f'[downloads]\n{line}', 1)


def run_command(*words):
    """Run a command that says by itself what goes wrong. Raises Trouble if something does."""
    import subprocess
    if subprocess.run(words).returncode:
        raise Trouble(f'{shlex.join(words)}: failed; all videos are still in their folder')


def switch_service(new):
    """As root: let the service write to the folder, and start it anew."""
    commands = [f'launchctl kickstart -k {LAUNCHD}']
    if DROP_IN.exists():
        kind = 'BindPaths' if str(new).startswith(('/home/', '/root/')) else 'ReadWritePaths'
        rewrite(DROP_IN, lambda text: re.sub(r'(BindPaths|ReadWritePaths)=.*\n', '', text)
                + f'{kind}="-{new}"\n')
        commands = ['systemctl daemon-reload', 'systemctl restart videoserver']
    for command in commands:
        run_command(*command.split())


def switch_server(lock, new):
    """Wait until a server that was started by hand uses the folder."""
    facts = lock.running()
    if 'output' in facts:  # else a command has the database for a moment
        os.kill(facts['pid'], signal.SIGUSR1)
    while lock.running().get('output', str(new)) != str(new):
        time.sleep(0.2)


def check_relocation(config, new, old):
    """Raise Trouble if the videos cannot move."""
    for name in OUTPUT_NAMES:
        if name in os.environ:
            raise Trouble(f'{name} in the environment sets the folder: change it there')
    nested = new == old or old in new.parents or new in old.parents
    if nested or re.search(r'[\n"\\%:#;]', str(new)):
        raise Trouble(f'{new}: choose a folder outside {old}, without " \\ % : # ; in its path')
    needed = sum(file.stat().st_size for file in old.rglob('*') if file.is_file())
    needed += config.downloads.min_free_space
    if free_space(next(folder for folder in (new, *new.parents) if folder.exists())) < needed:
        raise Trouble(f'{new}: {format_size(needed)} must be free there')


def cmd_relocate(config, options):
    """move the videos to another disk, while links are taken"""
    new, old = Path(os.path.abspath(options.dir)), config.downloads.output_directory
    if options.source:  # the copying for root, by the service's user
        copy_videos(options.source, new, options.since)
        return 0
    check_relocation(config, new, old)
    file, service = config.file or PROGRAM.parent / 'config.ini', str(PROGRAM) == INSTALLED

    def copy(since):
        if not service:
            return copy_videos(old, new, since)
        run_command(AS_SERVICE, 'relocate', f'--from={old}', f'--since={since}', str(new))
    began = time.time() - 1
    if service and not new.exists():
        new.mkdir(parents=True)
        owner = config.database.path.stat()
        os.chown(new, owner.st_uid, owner.st_gid, follow_symlinks=False)
    copy(0.0)
    file.touch()
    rewrite(file, lambda text: with_output(text, new))
    if service:
        switch_service(new)
    else:
        switch_server(Lock(config.database.path), new)
    copy(began)  # what arrived meanwhile
    remove_folder(old / '.incomplete')
    print(f'The videos are in {new} now. Look at them, then delete {old}.')
    return 0


# -- main

COMMANDS = {
    'setup': cmd_setup, 'cert': cmd_cert, 'update': cmd_update, 'add': cmd_add,
    'import': cmd_import, 'list': cmd_list,
    'retry': cmd_change, 'cancel': cmd_change, 'delete': cmd_change, 'log': cmd_log,
    'doctor': cmd_doctor, 'phone': cmd_phone, 'backup': cmd_backup,
    'relocate': cmd_relocate,
}
HELP = {name: CHANGES.get(name, [run.__doc__])[0] for name, run in COMMANDS.items()}


def help_text(topic):
    """One screen of commands, or all settings if that is the topic."""
    if topic == 'settings':
        return 'Each can be set in the environment as VIDEOSERVER_<SECTION>_<KEY>.\n' + ''.join(
            f'\n[{section}] {key} = {default}\n    {told}\n'
            for section, rows in SETTINGS.items() for key, (default, _, told) in rows.items())
    return '\n'.join([
        'usage: videoserverd.py [--config FILE] [COMMAND]', '',
        'The video inbox people trust. Without a command: run the server.', '',
        *(f'  {name:<9}{told}' for name, told in HELP.items()),
        '  help     explain a command, or all settings: help COMMAND, help settings', '',
        '  --config FILE  config.ini (default: the one beside this program)',
        '  --version      show the version', ''])


def make_parser():
    """The command line; --config may come before or after the command."""
    import argparse  # the daemon itself has no use for it
    where = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    where.add_argument('--config', type=Path, metavar='FILE',
                       help='config.ini (default: the one beside this program)')
    parser = argparse.ArgumentParser(prog='videoserverd.py', parents=[where])
    parser.format_help = lambda: help_text('')
    parser.add_argument('--version', action='version', version=f'videoserverd {VERSION}')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND')
    add = {name: commands.add_parser(name, parents=[where], description=told).add_argument
           for name, told in HELP.items()}
    commands.add_parser('help').add_argument('topic', nargs='?', default='')
    add['add']('url', nargs='+', metavar='URL', help='a link, or any text with links in it')
    add['add']('--again', action='store_true', help='download a video again that is already here')
    add['backup']('file', type=Path, metavar='FILE', help='where the copy goes')
    add['cert']('--force', action='store_true', help='a new certificate even if it is still good')
    add['cert']('--new-ca', action='store_true', help='a new CA; every phone must trust it again')
    add['cert']('--host', action='append', metavar='NAME', help='another name')
    add['cert']('--ip', action='append', metavar='ADDR', help='another address')
    add['import']('file', type=Path, metavar='FILE', help='zip, json, html or text')
    add['import']('--only', default='', metavar='GROUPS', help=','.join(GROUP_NAMES))
    add['import']('--client', default='import', metavar='NAME', help='whose they are (import)')
    add['list']('--status', choices=tuple(STATES), default='', help='only those with this status')
    add['list']('--all', action='store_true', help=f'not only the newest {SHOWN}')
    for name in CHANGES:
        add[name]('id', nargs='*', metavar='ID', help='as `list` shows it')
        add[name]('--failed', action='store_true', help='all that failed')
    add['log']('-f', dest='follow', action='store_true', help='follow the log')
    add['relocate']('dir', metavar='DIR', help='the new folder')
    add['relocate']('--from', dest='source', type=Path, help=argparse.SUPPRESS)
    add['relocate']('--since', type=float, help=argparse.SUPPRESS)
    add['phone']('--minutes', type=whole(1, 1440), default=15, help='how long it runs (15)')
    add['phone']('--port', type=whole(0, 65535), default=8080, help='port of the page (8080)')
    return parser


def act(file, command, options=None):
    """Run a command: its exit code. Trouble becomes one line."""
    with suppress(AttributeError):  # None where it is closed
        sys.stdout.reconfigure(errors='backslashreplace')  # a terminal of Latin-1 lacks letters
    try:
        return command(load_config(Path(file) if file else None, dict(os.environ)), options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
    except (Trouble, StoreDown, OSError) as error:  # a full disk, a folder of somebody else
        print(f'videoserverd: {error}', file=sys.stderr)
        return getattr(error, 'exit_code', 1)


def go_on(config, options):
    """Become the server; in the foreground, as the child of a small parent."""
    compile_program()
    fd = 0
    while fd < 3:  # a closed one would be a file of ours
        fd = os.open(os.devnull, os.O_RDWR)
        os.set_inheritable(fd, fd < 3)
    os.environ.setdefault('MALLOC_ARENA_MAX', '1')  # else glibc keeps a heap per thread
    line = bare_python(SERVE, str(config.file or ''))
    if 'NOTIFY_SOCKET' not in os.environ and os.getppid() != 1:
        line = ('/bin/sh', '-c', KEEPER, str(dump_file(config)), *line)
    os.execv(line[0], line)


HOMEBREW = ('/opt/homebrew/bin', '/usr/local/bin')  # not in launchd's PATH, nor in ssh's


def main(arguments=None):
    if sys.platform == 'darwin':
        os.environ['PATH'] = os.pathsep.join((*os.get_exec_path(), *HOMEBREW))
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command == 'help':
        if options.topic in COMMANDS:
            parser.parse_args([options.topic, '--help'])
        print(help_text(options.topic), end='')
        return 0
    file = getattr(options, 'config', None)
    if file is None and os.path.exists(INSTALLED) and os.path.exists(AS_SERVICE):
        os.execv(AS_SERVICE, [AS_SERVICE, *sys.argv[1:]])  # else a second CA and database
    beside = PROGRAM.parent / 'config.ini'
    if file is None and beside.exists():
        file = beside
    return act(file, COMMANDS.get(options.command, go_on), options)


if __name__ == '__main__':
    sys.exit(main())
