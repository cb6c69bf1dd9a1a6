"""The tests of videoserverd: the real daemon over real TLS, real yt-dlp, a stand-in for the sites.

    python3 -m unittest                       all of them, in two to three minutes
    python3 test_videoserverd.py -v TestX     what unittest takes
    python3 .ci/proofs.py bench               speed and memory as a table, and other long proofs

What runs them is in .ci/harness.py. Nothing here leaves this machine: the sites are a stand-in on
127.0.0.1 (see `Standin`), reached through [downloader] proxy, in the shapes that yt-dlp's own
extractors parse. Only a missing vendored yt-dlp is fetched once, from PyPI.
"""
import _thread
import ast
import base64
import collections
import contextlib
import ctypes
import email.header
import errno
import fcntl
import functools
import gc
import gzip
import hashlib
import hmac
import http.client
import io
import ipaddress
import itertools
import json
import logging
import os
import plistlib
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import symtable
import sys
import tempfile
import threading
import time
import tokenize
import unicodedata
import unittest
import unittest.mock
import urllib.request
import uuid
import warnings
import xml.etree.ElementTree
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Tuple
from urllib.parse import parse_qs, quote, urlsplit

import videoserverd as v

sys.path.insert(0, str(Path(__file__).absolute().parent / '.ci'))
from harness import (  # noqa: E402, I001
    ANYWHERE, ANY_PLACE, ANY_SITE, Answer, BROKEN, Browser, CHROMIUM, CONNECTED, COOKIE_ROWS, CareTest, Classes,
    CookiesTest, CopiesTest, Daemon, DaemonTest, DownloadTest, ENTER, FILES_KEY, FilesTest, FreezeTest,
    FreshDaemonTest, FreshnessTest, GuardTest, HARD_NAMES, HERE, HTML, IN_THE_CLEAR, Impersonated, ImportTest,
    InstallTest, KeepTest, KillTally, LARGEST, LIBRESSL, LISTED, Listener, LocalServer, LogTest, MakerTest, NOW,
    Nginx, NginxTest, ONE_ROW, OpenBucket, OtherSite, PART, PageTest, QuietHandler, REAL_TRY_OUT, ROWS, RUN, S3_DOCS,
    S3_DOCS_CASES, S3_DOCS_NOW, S3_DOCS_PRESIGNED, SAME_AS_YTDLP, SHARED, STUB, SUITE, SUITE_CASES, SUITE_NOW,
    SchedulerTest, ServerTest, ShareTest, Standin, Strace, TINY_MP4, TINY_TS, TRAPS, ThumbnailTest, USE_YTDLP,
    WithBucket, WithIndex, WithUploader, YEAR, banners, browser_host, certificates, change_database, contents,
    cookie_files, fair, fetch, fields_of, files_below,
    first_definitions, full_disk, functions, global_uses, handshake, imported, in_time, judge, largest_fall, last_of,
    make_wheel, movie, new_config, new_folder, new_program, no_pip, open_store, openssl, own_config, parsed, patched,
    path_without_ffmpeg, picture, probe, publish_config, ran, real_files, reserved, run_maker, run_openssl,
    same_bytes, security, self_signed, serve_blocks, shared_links, sign_by_hand, slowest, some_files, sound, starts,
    streams, tiktok_export, tiktok_link, trusting, unpack_compiled, vendored, vendored_curl, verdict, wait_until,
    with_pattern, ytdlp_folder, ytdlp_says, zipped,
)

# ---------- law ---------------------------------------------------------------------------
# What the source itself has to keep: the law of the map, Python 3.9, nothing but the standard
# library, small functions, and documents that say what the code does.

SOURCE = (HERE / 'videoserverd.py').read_text(encoding='utf-8')
TREE = ast.parse(SOURCE)


@functools.lru_cache(maxsize=None)
def sources() -> Dict[Path, Tuple[str, ast.Module]]:
    """Text and tree of the program, of its tests and of their harness."""
    found = {HERE / 'videoserverd.py': (SOURCE, TREE)}
    for file in (Path(__file__), HERE / '.ci/harness.py'):
        text = file.read_text(encoding='utf-8')
        found[file] = text, ast.parse(text, feature_version=(3, 9))
    return found


LONGEST_FUNCTION = 40  # lines
LONGEST_LINE = 120
MOST_BYTES = 481_900  # of the program, and to fall to 420,000: when it is reached, two things are made one


def bound(node):
    """The names that a statement binds."""
    names = {getattr(node, 'name', '')} | {alias.asname or alias.name for alias in getattr(node, 'names', ())}
    for target in getattr(node, 'targets', [getattr(node, 'target', ast.Pass())]):
        names |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names - {''}


class TestLaw(unittest.TestCase):
    """The source keeps its own law."""

    def test_a_name_is_used_only_below_the_line_that_defines_it(self):
        defined = first_definitions(TREE)
        wrong = sorted({f'line {line} ({where}): {name} is defined in line {defined[name]}'
                        for name, line, where in global_uses(compile(SOURCE, 'videoserverd.py', 'exec'))
                        if name in defined and line < defined[name]})
        self.assertEqual(wrong, [])

    def test_only_the_standard_library_and_yt_dlp_are_imported(self):
        known = getattr(sys, 'stdlib_module_names', None)
        if not known:
            self.skipTest('Python 3.9 cannot tell')
        self.assertEqual([where for where in imported(TREE) if where[0] not in known | {'yt_dlp', 'curl_cffi'}], [])

    def test_yt_dlp_is_imported_only_inside_functions_of_section_download(self):
        begin, lines = banners(SOURCE), sorted(banners(SOURCE).values()) + [SOURCE.count('\n') + 1]
        end = lines[lines.index(begin['download']) + 1] if 'download' in begin else 0
        inside = {node.lineno for function in functions(TREE) for node in ast.walk(function) if hasattr(node, 'lineno')}
        wrong = [line for name, line in imported(TREE) if name == 'yt_dlp'
                 and not (begin.get('download', 0) < line < end and line in inside)]
        self.assertEqual(wrong, [])

    def test_an_old_or_reduced_python_gets_one_sentence(self):
        ast.parse(SOURCE, feature_version=(3, 7))  # so that one of 3.7 gets as far as reading its own version
        for script, said in (('sys.version_info = (3, 8, 1)', 'needs Python 3.9 or newer, and this is 3.8. Fix: '),
                             ('sys.modules["_sqlite3"] = None', 'this one has no _sqlite3 .*Fix: '),
                             ('sys.modules["_ssl"] = None', 'this one has no _ssl .*Fix: '),
                             ('sys.modules["json"] = None', 'this one has no json .*Fix: ')):
            script = f'import runpy, sys\n{script}\nrunpy.run_path(sys.argv[1], run_name="__main__")'
            done = ran([sys.executable, '-c', script, str(HERE / 'videoserverd.py')])
            self.assertEqual((done.returncode, done.stdout.count('\n')), (1, 1), done.stdout)
            self.assertRegex(done.stdout, said)

    def test_files_beside_the_program_are_not_taken_for_pythons_own(self):
        folder = new_folder()
        for name in ('email', 'calendar', 'http', 'json', 'ssl', 'argparse', 'configparser'):
            (folder / f'{name}.py').write_text('raise SystemExit("taken")')
        shutil.copy(HERE / 'videoserverd.py', folder)
        program = folder / 'videoserverd.py'
        with unittest.mock.patch.object(v, 'PROGRAM', program):
            imported = v.bare_python('print(v.VERSION)')
        for line in ([sys.executable, str(program), '--version'], imported):
            done = subprocess.check_output(line, cwd=str(folder), encoding='utf-8')
            self.assertIn(v.VERSION, done)

    def test_syntax_of_python_3_9(self):
        for text, _ in sources().values():
            ast.parse(text, feature_version=(3, 9))

    def test_no_function_is_longer_than_40_lines(self):
        long = [f'{node.name}: {node.end_lineno - node.lineno + 1}' for node in functions(TREE)
                if node.end_lineno - node.lineno >= LONGEST_FUNCTION]
        self.assertEqual(long, [])

    def test_lines_are_short_and_statements_are_not_packed(self):
        for (file, (text, _)), longest in zip(sources().items(), (100, LONGEST_LINE, LONGEST_LINE)):
            wide = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > longest]
            tokens = tokenize.generate_tokens(io.StringIO(text).readline)
            packed = [token.start[0] for token in tokens if token.type == tokenize.OP and token.string == ';']
            self.assertEqual((file.name, wide, packed), (file.name, [], []))

    def test_few_conditional_expressions_and_none_inside_another(self):
        found = [node for node in ast.walk(TREE) if isinstance(node, ast.IfExp)]
        nested = [node.lineno for node in found for inner in ast.walk(node)
                  if isinstance(inner, ast.IfExp) and inner is not node]
        lines = sum(bool(line.strip()) for line in SOURCE.splitlines())
        self.assertEqual((nested, len(found) * 1000 > 12 * lines), ([], False))

    def test_no_local_name_hides_one_of_the_module(self):
        tables, ours, hidden = [symtable.symtable(SOURCE, 'videoserverd.py', 'exec')], set(), []
        for node in TREE.body:  # from Python 3.12 on, symtable takes what a comprehension binds for the module's
            ours |= bound(node)
        for table in tables:  # it grows
            tables += table.get_children()
            if table.get_type() == 'function':
                hidden += [(table.get_lineno(), symbol.get_name()) for symbol in table.get_symbols()
                           if symbol.is_local() and not symbol.is_imported() and symbol.get_name() in ours]
        self.assertEqual(hidden, [])

    def test_plain_words(self):
        self.assertEqual(re.findall(r'(?i)\bmend\w*', SOURCE), [])

    def test_the_program_is_small(self):
        self.assertLessEqual(len(SOURCE.encode()), MOST_BYTES)

    def test_the_docstring_maps_every_section_in_order(self):
        told = re.findall(r'^    (\w+) {2,}\S', ast.get_docstring(TREE, clean=False), re.M)
        self.assertEqual(told, list(banners(SOURCE)))

    def test_the_docstring_names_every_lock_and_thread(self):
        found = set()
        for owner in TREE.body:
            prefix = f'{owner.name}.' if isinstance(owner, ast.ClassDef) else ''
            for node in ast.walk(owner):
                makes = ast.unparse(node.value) if isinstance(node, ast.Assign) else ''
                if re.search(r'threading\.(Lock|Condition)\(', makes):
                    names = re.findall(r'\b(?!self\b)\w+', ast.unparse(node.targets[0]))
                    found.add(prefix + next((name for name in names if name.endswith('lock')), names[0]))
                if isinstance(node, ast.Call) and ast.unparse(node.func) == 'threading.Thread':
                    found |= {f'`{word.value.value}`' for word in node.keywords
                              if word.arg == 'name' and isinstance(word.value, ast.Constant)}
        found.discard('Store.ticket')  # an answer that is waited for
        self.assertEqual([name for name in found if name not in ast.get_docstring(TREE)], [])

    def test_no_name_is_defined_twice(self):
        for file, (_, tree) in sources().items():
            names = collections.Counter(
                (getattr(scope, 'name', file.name), name)
                for scope in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
                for node in scope.body for name in bound(node))
            self.assertEqual([name for name, times in names.items() if times > 1], [])  # the second would hide it

    def test_the_settings_table_of_the_readme_is_the_one_of_the_code(self):
        rows = ['| section | key | default | meaning |', '| --- | --- | --- | --- |']
        rows += [f'| {section} | `{key}` | {f"`{default}`" if default else "(empty)"} | {told} |'
                 for section, keys in v.SETTINGS.items() for key, (default, _, told) in keys.items()]
        self.assertIn('\n'.join(rows), (HERE / 'README.md').read_text(encoding='utf-8'))

    def test_the_idle_daemon_does_not_bring_what_it_has_no_use_for(self):
        heavy = {'pickle', 'hmac', 'plistlib', 'zipfile', 'argparse', 'urllib.request', 'logging.handlers', 'yt_dlp'}
        script = 'import sys; sys.path.insert(0, sys.argv[1]); import videoserverd; print(*sys.modules)'
        found = subprocess.check_output([sys.executable, '-I', '-S', '-c', script, str(HERE)], encoding='utf-8')
        self.assertEqual(heavy & set(found.split()), set())


# ---------- the main job ------------------------------------------------------------------
# From a phone's POST to a playable file on disk: the real daemon, the real yt-dlp, the stand-in.

class TestMainJob(DaemonTest):
    """A shared link is stored, acknowledged, downloaded."""
    settings = {'downloads': {'max_concurrent': 2, 'max_retries': 2}}

    def test_tiktok_post(self):
        post = self.site.tiktok(title='Katze springt 🐈', size=300_000)
        row = self.daemon.download(post)
        self.assertEqual(row['filename'], f'Katze springt 🐈_{post.id}.mp4')
        self.assertEqual([file['name'] for file in row['files']], [row['filename']])
        self.assertEqual((row['title'], row['file_size'], row['progress']), ('Katze springt 🐈', 300_000, 100))
        self.assertEqual((row['retry_count'], row['error_message'], row['next_attempt_at']), (0, None, None))
        self.assertIsNotNone(row['completed_at'])
        same_bytes(self.daemon, row, post.media[0])
        self.assertIn(row['filename'], self.daemon.files())

    def test_what_came_of_a_carousel_is_served_while_the_rest_is_tried_again(self):
        post = self.site.instagram('video', 'photo', 'video', kind='p')
        post.media[1].set(hold_at=9)
        post.media[2].set(status=404)
        id = self.daemon.submit(post)
        post.media[1].wait_held()
        self.assertFalse(self.daemon.status(id)['files'])
        post.media[1].release()
        row = self.daemon.wait_for(id, lambda row: row['files'])
        self.assertEqual((row['filename'], row['file_size']),
                         (row['files'][0]['name'], sum(file['size'] for file in row['files'])))
        same_bytes(self.daemon, row, *post.media[:2])
        row = self.daemon.wait_status(id, 'completed')
        self.assertRegex(row['note'], '^2 of 3: video 3 is missing. The site answered with an error: HTTP 404')
        self.assertEqual([file['type'] for file in row['files']], ['video/mp4', 'image/jpeg'])
        date = '20251113' if sys.version_info >= (3, 10) else None  # the yt-dlp of Python 3.9 does not tell
        self.assertEqual((post.media[0].hits, row['uploader'], row['upload_date']), (1, 'tester', date))
        status, _, _ = self.daemon.client.delete(f'/api/v1/download/{id}')
        self.assertEqual((status, set(self.daemon.files()) & {file['name'] for file in row['files']}), (200, set()))

    def test_passing_failure_of_the_page_is_tried_again(self):
        posts = [self.site.tiktok(page={'fail': [503, 'reset']}), self.site.instagram(page={'fail': [429, 502]})]
        for post, id in [(post, self.daemon.submit(post)) for post in posts]:
            with self.subTest(post):
                row = self.daemon.wait_status(id, 'completed')
                same_bytes(self.daemon, row, post.media[0])
                self.assertIn(row['retry_count'], (1, 2) if LIBRESSL else (2,))  # there a reset is an early end
                self.assertIsNone(row['error_message'])

    def test_retries_end_and_say_why(self):
        post = self.site.tiktok(page={'fail': [503] * 99})
        row = self.daemon.fails(post)
        self.assertEqual((row['retry_count'], post.page.hits), (2, 3))
        self.assertRegex(row['error_message'], r'503|again|not answer')

    def test_one_that_can_never_work_fails_at_once_and_says_why(self):
        cases = [(self.site.tiktok(state='gone'), 'deleted|not exist|gone|removed|not there'),
                 (self.site.tiktok(state='private'), 'private|permission|log'),
                 (self.site.instagram(state='deleted'), 'deleted|not exist|gone|removed|not there'),
                 (self.site.instagram(state='geo'), 'country'),
                 (self.site.tiktok(state='sound'), 'photo post')]
        for (post, words), id in [(case, self.daemon.submit(case[0])) for case in cases]:
            with self.subTest(post):
                row = self.daemon.wait_status(id, 'failed')
                self.assertRegex(row['error_message'].lower(), words)
                self.assertNotRegex(row['error_message'], r'--cookies|yt-dlp -U|issues\?q|caused by|Traceback')
                self.assertLessEqual(post.page.hits, 2)

    def test_only_whole_files_are_visible(self):
        post = self.site.tiktok(title='half', size=400_000, hold_at=200_000)
        id = self.daemon.submit(post)
        post.media[0].wait_held()
        self.assertEqual(self.daemon.status(id)['phase'], 'media')
        self.assertEqual([name for name in self.daemon.files() if post.id in name], [])
        post.media[0].release()
        self.assertIn(self.daemon.wait_status(id, 'completed')['filename'], self.daemon.files())
        wait_until(lambda: not self.daemon.partials(id), 5, 'nothing is left')

    def test_progress_is_monotone_and_visible_within_a_second(self):
        post = self.site.instagram('video', 'video', kind='p', size=1_400_000, speed=700_000)
        id = self.daemon.submit(post)
        with in_time(2):
            self.daemon.wait_for(id, lambda row: 0 < row['progress'] < 100, 5)
        rows = self.daemon.watch(id)
        self.assertTrue(all(row['title'] for row in rows), 'the title is known before the end')
        seen = [row['progress'] for row in rows]
        self.assertEqual(seen, sorted(seen))
        self.assertGreater(len(set(seen)), 3)
        self.assertEqual(seen[-1], 100)


class TestSamePost(DaemonTest):
    """A post is fetched once, whatever its link looks like; its files are there until its last download goes."""
    settings = {'downloads': {'max_concurrent': 2}}

    def get(self, link: Any, **fields: Any) -> Answer:
        told = self.daemon.client.post('/api/v1/download', {'url': str(link), **fields})
        self.daemon.wait_status(told.json['download_id'], 'completed')
        return told

    def test_by_four_links_one_file(self):
        for post, others in ((self.site.tiktok(), ['vm', 'vt', 't']), (self.site.instagram(), [])):
            links = [post, *(self.site.short(post, form) for form in others)]
            links.append(f'https://www.tiktokv.com/share/video/{post.id}/')
            if not others:
                links[-1] = str(post).replace('/reel/', '/p/')
            answers = [self.get(link) for link in links]
            rows = [self.daemon.status(told.json['download_id']) for told in answers]
            self.assertEqual({row['files'][0]['name'] for row in rows}, {rows[0]['filename']})
            self.assertEqual(sum(len(media.requests) for media in post.media), 1)
            last = answers[-1]
            self.assertEqual((last.status, last.json['status'], last.json['message'], last.json['download_id']),
                             (200, 'completed', 'You already have this video', rows[-1]['download_id']))
            self.assertEqual(len({row['download_id'] for row in rows}), 1 + len(others))
            self.assertEqual([row['title'] for row in rows], [rows[0]['title']] * len(rows))

    def twins(self) -> Tuple[Any, List[str]]:
        """A post in the middle of being fetched, and the ids of two links to it."""
        post = self.site.tiktok(size=2_000_000, hold_at=1_000_000)
        links = [self.site.short(post), self.site.short(post, 'vt')]
        ids = [self.daemon.client.post('/api/v1/download', {'url': link}).json['download_id'] for link in links]
        wait_until(lambda: post.page.hits >= 2 and post.media[0].held, 10, 'both have read the page')
        return post, ids

    def test_two_links_that_run_at_the_same_moment_bring_one_file(self):
        post, ids = self.twins()
        self.assertEqual([self.daemon.status(id)['status'] for id in ids], ['downloading'] * 2)
        post.media[0].release()
        rows = [self.daemon.wait_status(id, 'completed') for id in ids]
        self.assertEqual(rows[0]['files'][0]['name'], rows[1]['files'][0]['name'])
        self.assertEqual(post.media[0].hits, 1)

    def test_a_twin_goes_on_by_itself_once_the_first_is_cancelled(self):
        post, ids = self.twins()
        holder, other = ids if self.daemon.partials(ids[0]) else reversed(ids)
        self.assertEqual(self.daemon.client.post(f'/api/v1/download/{holder}/cancel').status, 200)
        post.media[0].wait_held(2)
        post.media[0].release()
        self.daemon.wait_status(other, 'completed')

    def test_files_go_with_the_last_download(self):
        post = self.site.tiktok()
        first, second = [self.get(link).json['download_id'] for link in (post, self.site.short(post))]
        file = self.daemon.output / self.daemon.status(first)['filename']
        self.assertEqual(self.daemon.client.delete(f'/api/v1/download/{first}').status, 200)
        self.assertTrue(file.exists())
        same_bytes(self.daemon, self.daemon.status(second), *post.media)
        self.assertEqual(self.daemon.client.delete(f'/api/v1/download/{second}?files=keep').status, 200)
        self.assertTrue(file.exists())
        third = self.get(post).json['download_id']
        self.assertEqual(len(post.media[0].requests), 2, 'nobody knows of the file that was kept')
        self.assertEqual(self.daemon.client.delete(f'/api/v1/download/{third}').status, 200)

    def test_half_a_carousel_keeps_what_came_of_it_when_another_link_brings_it_all(self):
        daemon = self.new_daemon(downloads={'retry_delays': '900'})
        post = self.site.instagram('video', 'video', 'video')
        post.media[2].set(status=404)
        first = daemon.submit(post, again=False)
        half = daemon.wait_for(first, lambda row: row['next_attempt_at'])
        self.assertEqual(len(half['files']), 2)
        post.media[2].set(status=200)
        second = daemon.wait_status(daemon.submit(self.site.share(post), again=False), 'completed')
        daemon.client.post(f'/api/v1/download/{first}/retry')
        row = daemon.wait_status(first, 'completed')
        same_bytes(daemon, row, *post.media)
        owned = {file['name'] for files in (row['files'], second['files']) for file in files}
        self.assertEqual(set(daemon.files()), owned)
        self.assertEqual(row['files'][:2], half['files'])

    def test_a_deleted_file_is_fetched_again_and_so_is_what_is_wanted_again(self):
        post = self.site.tiktok()
        first = self.get(post)
        (self.daemon.output / self.daemon.status(first.json['download_id'])['filename']).unlink()
        for link, fields, status in ((post, {}, 202), (self.site.short(post), {}, 202), (post, {'again': True}, 202),
                                     (self.site.short(post), {'again': True}, 202)):
            self.assertEqual(self.get(link, **fields).status, status)
        self.assertEqual(len(post.media[0].requests), 4, 'the first short link had the files of the second try')


class TestCancel(DaemonTest):
    """Direct links, loopback allowed; cancel works in under a second (TestStop has every phase)."""
    settings = {'downloader': {'proxy': ''}, 'security': ANYWHERE,
                'downloads': {'filename': '%(site)s/%(id)s/%(title)s'}}

    def cancel(self, id: str) -> None:
        """Cancels; under a second later it has failed, nothing is left and the worker is free."""
        with in_time(1):
            status = self.daemon.client.post(f'/api/v1/download/{id}/cancel').status
            row = self.daemon.wait_status(id, 'failed')
        self.assertEqual((status, row['error_message']), (200, 'Cancelled'))
        self.assertEqual(self.daemon.partials(id), {})
        self.daemon.download(self.site.direct())
        self.assertEqual(self.daemon.status(id)['status'], 'failed')  # it does not rise from the dead
        self.assertEqual(self.daemon.partials(id), {})

    def test_cancel_while_queued_and_while_the_media_stalls(self):
        self.cancel(self.daemon.half_way(self.site.direct(size=300_000, hold_at=100_000)))
        first = self.site.direct(hold_at=1)
        running = self.daemon.submit(first)
        first.page.wait_hits(2)
        waiting = self.daemon.submit(self.site.direct())
        status, _, body = self.daemon.client.post(f'/api/v1/download/{waiting}/cancel')
        self.assertEqual((status, body['status'], body['error_message']), (200, 'failed', 'Cancelled'))
        self.cancel(running)

    def test_direct_links_of_any_site_go_into_folders(self):
        for https in (False, True):
            post = self.site.direct(https=https, size=250_000)
            row = self.daemon.download(post)
            same_bytes(self.daemon, row, post.page)
            folder = self.daemon.output / os.path.dirname(row['filename'])
            self.assertEqual(folder.parent, self.daemon.output / '127.0.0.1')
            self.assertEqual(self.daemon.client.delete(f'/api/v1/download/{row["download_id"]}')[0], 200)
            self.assertFalse(folder.exists())
            self.assertIn(post.id, row['filename'])

    def test_missing_segment_is_no_success(self):
        post = self.site.direct('hls')
        post.media[2].status = 404
        id = self.daemon.submit(post)
        row = self.daemon.wait_for(id, lambda row: row['retry_count'] or row['status'] == 'failed')
        self.assertNotEqual(row['status'], 'completed')

    def test_cancel_while_it_waits_for_another_try(self):
        daemon = self.new_daemon(hurry={'CARE_SECONDS': 0.2}, **{**self.settings, 'downloads': {'retry_delays': '900'}})
        post = self.site.direct(size=3_000_000, hold_at=2_000_000)
        id = daemon.half_way(post)
        post.media[0].set(status=500)
        daemon.kill()
        post.media[0].release()
        daemon.start()
        daemon.wait_for(id, lambda row: row['next_attempt_at'])
        self.assertTrue(daemon.partials(id), 'to go on with')
        self.assertEqual(daemon.client.post(f'/api/v1/download/{id}/cancel').status, 200)
        wait_until(lambda: not daemon.partials(id))


class TestEndAndResume(DaemonTest):
    """Stopped, killed, stalled: what a download that did not finish goes through."""
    settings = None

    def test_however_a_life_ends_the_next_resumes_from_the_partial_file_and_no_attempt_is_counted(self):
        daemon = self.new_daemon()
        for number, end in enumerate((signal.SIGTERM, signal.SIGKILL, signal.SIGHUP), 1):
            with self.subTest(end):
                post = self.site.tiktok(size=3_000_000, hold_at=2_000_000)
                id, began = daemon.half_way(post), time.monotonic()
                daemon.signal(end)
                if end == signal.SIGHUP:  # the same process goes on
                    wait_until(lambda number=number: starts(daemon) == number + 1, 20)
                    post.media[0].wait_held(2)
                else:
                    daemon.wait_exit()
                    self.assertLess(time.monotonic() - began, fair(5))
                    self.assertEqual(daemon.row(id)['status'], 'queued' if end == signal.SIGTERM else 'downloading')
                post.media[0].release()
                if end != signal.SIGHUP:
                    daemon.start()
                row = daemon.wait_status(id, 'completed')
                same_bytes(daemon, row, post.media[0])
                there = [file for file in daemon.files() if post.id in file]
                self.assertEqual((row['retry_count'], len(there)), (0, 1))
                self.assertRegex(post.media[0].ranges_asked[-1], r'^bytes=\d{6,}-')

    def test_timeout_ends_an_attempt_without_progress(self):
        daemon = self.new_daemon(downloader={'timeout': 5}, downloads={'max_concurrent': 3, 'max_retries': 0})
        posts = [self.site.tiktok(hold_at=10_000), self.site.tiktok(drip=0.2),
                 self.site.tiktok(page={'fail': ['hang'] * 9})]
        ids = [daemon.submit(post) for post in posts]
        for route in (posts[0].media[0], posts[1].media[0], posts[2].page):
            route.wait_hits()
        with in_time(9):
            for id in ids:
                row = daemon.wait_status(id, 'failed')
                self.assertRegex(row['error_message'], 'stopped sending')


# ---------- jobs --------------------------------------------------------------------------
# Pure functions, judged by others: a browser's idea of a URL (WHATWG), yt-dlp's own parser.

def refusal(function: Callable[..., Any], *args: Any) -> str:
    """The code of the Refused that function(*args) raises; '' if it raises none."""
    try:
        function(*args)
    except v.Refused as error:
        assert str(error) and not v.UNSAFE.search(str(error)), error
        return error.code
    return ''


class TestOneUrl(unittest.TestCase):
    """The URL that is judged is the URL that is stored and fetched, and no browser reads it otherwise."""

    def test_a_label_of_thousands_of_characters_is_refused_at_once(self):
        label = ''.join(map(chr, range(0x4e00, 0x4e00 + 2030)))
        began = time.thread_time()
        with self.assertRaises(v.Refused):
            v.check_url(f'https://{label}.com/', security('*'))
        self.assertLess(time.thread_time() - began, 0.2)  # its punycode takes more than a second

    def test_never_accepts_what_a_browser_would_send_elsewhere(self):
        for text in TRAPS:
            for settings in (LISTED, ANY_SITE, ANY_PLACE):
                with self.subTest(text=text):
                    self.judge(text, settings)

    def judge(self, text: str, settings: Any) -> None:
        """Accepted: it is its own canonical form, on the list, and a browser goes to the same host with either."""
        try:
            url = v.check_url(text, settings)
        except v.Refused as error:
            self.assertFalse(v.UNSAFE.search(str(error)))
            return
        self.assertTrue(url.isascii() and url.isprintable() and ' ' not in url and '\\' not in url and '#' not in url)
        self.assertEqual(v.check_url(url, settings), url)
        self.assertTrue(browser_host(url))
        self.assertEqual(browser_host(text), browser_host(url))
        if settings is LISTED:
            self.assertRegex(url, r'^https://([a-z0-9_-]+\.)*(tiktok|instagram)\.com/')
        self.assertEqual(urlsplit(url).hostname.strip('[]'), re.match(r'https?://\[?([^]/]*?)\]?(:\d+)?/', url)[1])

    def test_nothing_is_taken_out_of_a_link_silently(self):
        for text in ('https://tiktok.com/a b', 'https://tiktok.com/a\\b', 'https://tiktok.com/a\tb',
                     'https://tiktok.com/\n', ' https://tiktok.com/', 'https://tiktok.com/?\xa0',
                     'https://tiktok.com/\0', 'https://tiktok.com/\u202e', 'https://u@tiktok.com/',
                     'https://%74iktok.com/', 'https://xn--tiktok-.com/', 'https://xn--BCHER.de/', 'http://a.b:0/',
                     'http://a.b:65536/', 'http://a.b:1e3/', 'http://0x7f.1/', 'http://0177.0.0.1/'):
            for settings in (LISTED, ANY_PLACE):
                self.assertEqual(refusal(v.check_url, text, settings), 'bad_url', text)

    @unittest.skipUnless(shutil.which('node'), 'node is not installed')
    def test_a_real_url_parser_agrees(self):
        odd = [chr(code) for code in (*range(128), 0xa0, 0xad, 0xdf, 0x130, 0x131, 0x17f, 0x3c2, 0x200b, 0x200c, 0x200d,
                                      0x2044, 0x2100, 0x212a, 0x2260, 0x2488, 0x3002, 0xfe0f, 0xfeff, 0xff0e, 0xff0f,
                                      0xff1a, 0xff20, 0xfffd, 0x1f600)]
        texts = TRAPS + [shape.replace('*', character) for character in odd for shape in (
            'https://tiktok.com*evil.com/', 'https://evil.com*tiktok.com/', 'https://tiktok.com*',
            'https://*tiktok.com/', 'https://tik*tok.com/x', 'https*://tiktok.com/', 'https:*//tiktok.com/',
            'https://tiktok.com:4*43/', 'https://evil.com*.tiktok.com/', 'https://tiktok.com/*@evil.com')]
        accepted = [(text, v.check_url(text, settings)) for text in texts for settings in (LISTED, ANY_PLACE)
                    if not refusal(v.check_url, text, settings)]
        script = ('const host = t => { try { return new URL(t).hostname.replace(/\\.$/, "") } catch { return null } };'
                  'const pairs = JSON.parse(require("fs").readFileSync(0));'
                  'console.log(JSON.stringify(pairs.map(pair => pair.map(host))))')
        found = subprocess.run(['node', '-e', script], input=json.dumps(accepted), capture_output=True, text=True,
                               check=True, timeout=60)
        self.assertGreater(len(accepted), 100)
        for (text, url), (there, here) in zip(accepted, json.loads(found.stdout)):
            self.assertEqual(there, here, (text, url))

    def test_canonical_form(self):
        for text, settings, url in [
                ('HTTP://WWW.TikTok.COM:80/@u/video/1?a=1&b=%20#frag', LISTED,
                 'https://www.tiktok.com/@u/video/1?a=1&b=%20'),
                ('https://tiktok.com.', LISTED, 'https://tiktok.com/'),
                ('https://tiktok.com?x', LISTED, 'https://tiktok.com/?x'),
                ('https://www.tiktok.com/ü/"|', LISTED, 'https://www.tiktok.com/%C3%BC/%22%7C'),
                ('http://Example.org:8080/a', ANY_SITE, 'http://example.org:8080/a'),
                ('http://example.org:80', ANY_SITE, 'http://example.org/'),
                ('http://[2606:4700:0:0::1111]:8080/', ANY_SITE, 'http://[2606:4700::1111]:8080/'),
                ('http://127.0.0.1:5000/v.mp4', ANY_PLACE, 'http://127.0.0.1:5000/v.mp4'),
                ('http://nas/v', ANY_PLACE, 'http://nas/v')]:
            self.assertEqual(v.check_url(text, settings), url, text)

    def test_refusals_have_stable_codes(self):
        for text, settings, code in [
                ('https://evil.com/', LISTED, 'domain_not_allowed'),
                ('https://xtiktok.com/', LISTED, 'domain_not_allowed'), ('https://tiktok.com:8443/', LISTED, 'bad_url'),
                ('http://tiktok.com:443/', LISTED, 'bad_url'), ('https://u@tiktok.com/', LISTED, 'bad_url'),
                ('ftp://tiktok.com/', LISTED, 'bad_url'), ('https://tiktok.com/' + 'a' * 2030, LISTED, 'url_too_long'),
                ('https://tiktok.com/' + 'ü' * 1000, LISTED, 'url_too_long'),
                ('https://tiktok.com/' + 'a' * (2048 - 19), LISTED, ''),
                ('https://tiktok.com/' + 'a' * (2048 - 18), LISTED, 'url_too_long'),
                ('http://localhost/', ANY_SITE, 'private_address'),
                ('http://x.localhost/', ANY_SITE, 'private_address'), ('http://pi.local/', ANY_SITE, 'private_address'),
                ('http://router/', ANY_SITE, 'private_address'), ('http://192.168.1.1/', ANY_SITE, 'private_address'),
                ('http://169.254.169.254/', ANY_SITE, 'private_address'),
                ('http://[::ffff:10.0.0.1]/', ANY_SITE, 'private_address'),
                ('http://127.0.0.1/', security(['127.0.0.1']), 'private_address'),
                ('http://192.168.1.1/', ANY_PLACE, ''), ('http://2130706433/', ANY_PLACE, 'bad_url'),
                ('http://127.1/', ANY_PLACE, 'bad_url')]:
            self.assertEqual(refusal(v.check_url, text, settings), code, text[:80])

    def test_addresses_of_no_public_place(self):
        for address in ('127.0.0.1', '10.1.2.3', '172.16.0.1', '192.168.0.1', '169.254.1.1', '100.64.0.1', '0.0.0.0',
                        '224.0.0.1', '255.255.255.255', '240.0.0.1', '192.0.2.1', '198.18.0.1', '::1', '::', 'fe80::1',
                        'fe80::1%eth0', 'fc00::1', 'fec0::1', 'ff02::1', '2001:db8::1', '::ffff:127.0.0.1',
                        '::ffff:a00:1', '::127.0.0.1', '64:ff9b::7f00:1', '64:ff9b:1::1', '2002:7f00:1::', '2001::1',
                        '100::1'):
            self.assertFalse(v.is_public(address), address)
        for address in ('8.8.8.8', '2606:4700::1111', '::ffff:8.8.8.8', '64:ff9b::808:808', '2002:808:808::1',
                        '192.0.3.1'):
            self.assertTrue(v.is_public(address), address)


class TestSharedText(unittest.TestCase):
    """`url` may be a URL or shared text with one in it: every form of link and sentence."""

    def test_every_form_of_link_and_sentence(self):
        for text, urls in SHARED:
            with self.subTest(text=text):
                found = []
                if v.find_urls(text):
                    found = [item for _, item in v.parse_links({'url': text}, 'url', LISTED)[0].values()]
                self.assertEqual([item for item in found if isinstance(item, str)], urls)
                if urls:
                    self.assertEqual(parsed({'url': text}, LISTED).url, urls[0])
                else:
                    self.assertIn(refusal(parsed, {'url': text}, LISTED),
                                  ('no_url', 'bad_url', 'domain_not_allowed'))

    def test_the_first_link_that_can_be_taken_and_listed_domains_need_no_scheme(self):
        for text, settings, url in (('see youtu.be/abc', security(['youtu.be']), 'https://youtu.be/abc'),
                                    ('https://evil.com/ https://vm.tiktok.com/1', LISTED, 'https://vm.tiktok.com/1')):
            self.assertEqual(parsed({'url': text}, settings).url, url)
        self.assertEqual(refusal(parsed, {'url': 'https://evil.com/ https://u@tiktok.com/1'}, LISTED),
                         'domain_not_allowed')

    def test_control_characters_end_a_link_and_are_never_taken_out_of_a_host(self):
        self.assertEqual(refusal(parsed, {'url': 'https://www.tik\ttok.com/@a'}, LISTED), 'bad_url')
        for mark in '\t\x0b\x0c\0\x1b\r\n':
            text = f'{mark}Look!{mark}https://vm.tiktok.com/1{mark}'
            self.assertEqual(parsed({'url': text}, LISTED).url, 'https://vm.tiktok.com/1', repr(mark))
            self.assertEqual(v.parse_batch({'text': text}, LISTED)[0][0][1].url, 'https://vm.tiktok.com/1', repr(mark))

    def test_every_link_in_order_and_once(self):
        text = ('https://vm.tiktok.com/2 vm.tiktok.com/1 https://evil.com/ http://vm.tiktok.com/2#x '
                'https://evil.com/ https://vm.tiktok.com/3')
        rows, rest = v.parse_batch({'text': text, 'client_id': 'c', 'timestamp': 5}, LISTED)
        self.assertEqual(rest, [])
        self.assertEqual([written for written, _ in rows],
                         ['https://vm.tiktok.com/2', 'https://vm.tiktok.com/1', 'https://evil.com/',
                          'https://vm.tiktok.com/3'])
        self.assertEqual(rows[0][1], v.Submission('https://vm.tiktok.com/2', 'c', 5, ()))
        self.assertEqual(rows[2][1].code, 'domain_not_allowed')
        self.assertEqual(refusal(v.parse_batch, {'text': 'nothing'}, LISTED), 'no_url')
        self.assertEqual(refusal(v.parse_batch, {'text': ['x']}, LISTED), 'bad_field')

    def test_long_texts_take_linear_time(self):
        for piece in ('http://', 'https://a', 'a.', 'a.b/', 'tiktok.com/', '((((', 'https://tiktok.com/(', ')',
                      'https://x\n', 'https://x/)', '\u0301', 'xn--'):
            started = time.thread_time()
            refusal(parsed, {'url': 'https://x/' + piece * (60000 // len(piece))}, LISTED)
            refusal(parsed, {'url': piece * (60000 // len(piece))}, LISTED)
            self.assertLess(time.thread_time() - started, 2, piece)


class TestSubmission(unittest.TestCase):
    """A submission: types are checked, the field is named, nothing odd gets through to SQLite, JSON or the log."""
    good = {'url': 'https://vm.tiktok.com/1'}

    def test_defaults(self):
        self.assertEqual(parsed(self.good, LISTED),
                         v.Submission('https://vm.tiktok.com/1', 'unknown', None, ()))
        self.assertEqual(parsed({**self.good, 'client_id': None, 'timestamp': None,
                                             'ytdlp_cli_parameters': None, 'x': 1}, LISTED),
                         v.Submission('https://vm.tiktok.com/1', 'unknown', None, ()))

    def test_any_non_negative_integer_is_a_timestamp(self):
        for value in (0, 1, 1700000000, 10 ** 30, 10 ** 3900, 1.7e9):
            self.assertEqual(parsed({**self.good, 'timestamp': value}, LISTED).timestamp, value)
        for value in (-1, True, False, 1.5, float('inf'), float('nan'), '5', [], {}, 10 ** 5000, -1e300):
            self.assertEqual(refusal(parsed, {**self.good, 'timestamp': value}, LISTED), 'bad_field',
                             str(value)[:20] if value != 10 ** 5000 else '')

    def test_client_id_can_be_stored_and_shown(self):
        for value in ('iPhone von Jörg', '👨\u200d👩\u200d👧 iPad', 'a' * 128, 'x'):
            self.assertEqual(parsed({**self.good, 'client_id': value}, LISTED).client_id, value)
        self.assertEqual(parsed({**self.good, 'client_id': ' x\n'}, LISTED).client_id, 'x')
        for value in ('a\nb', 'a\0', '\ud800', 'a\u202eb', 'a\u2028b', 'a' * 129, 5, ['x'], {}, True, '\x9b1m'):
            self.assertEqual(refusal(parsed, {**self.good, 'client_id': value}, LISTED), 'bad_field',
                             repr(value))

    def test_wrong_types_are_refused_with_the_fields_name(self):
        for name, values in {'url': (5, [], {}, True), 'client_id': (5,), 'timestamp': ('x',),
                             'ytdlp_cli_parameters': (5, {}, [1], [None], True, 1.5)}.items():
            for value in values:
                with self.subTest(name=name, value=value), self.assertRaisesRegex(v.Refused, name):
                    parsed({**self.good, name: value}, LISTED)
        for fields in ({}, {'url': None}, {'url': ''}, {'url': '  '}):
            self.assertEqual(refusal(parsed, fields, LISTED), 'no_url')

    def test_half_characters_never_get_through(self):
        item = parsed({'url': 'a \ud83d https://vm.tiktok.com/1\udc00 \udfff'}, LISTED)
        self.assertEqual(item.url, 'https://vm.tiktok.com/1')
        json.dumps(item).encode('utf-8')


class TestPatterns(unittest.TestCase):
    """No text from outside, however long it may be, makes a pattern take more than linear time."""

    def test_every_pattern_is_linear_or_bounded(self):
        limits = {name: size for size, names in LARGEST.items() for name in names.split()}
        found = with_pattern(ast.parse(Path(v.__file__).read_text(encoding='utf-8')))
        self.assertEqual({name for name, _, _ in found} - set(limits), set(), 'add these to LARGEST, with their size')
        for name, method, pattern in found:
            if limits[name]:
                self.assertLess(slowest(pattern, method, limits[name]), (30, ''), (name, pattern.pattern[:60]))

    def test_the_test_itself_sees_what_is_slow(self):
        double = r'(?:\[ ?\w+ ?(?:=|<=) ?\?? ?\w+ ?\])+'
        for text, method, size in ((double, 'fullmatch', 300), ('(a+)+b', 'search', 100),
                                   (r'<meta .*?x', 'search', 16384), (r'^\s+|\s+$', 'sub', 16384),
                                   (r'\s*;', 'search', 16384)):
            self.assertGreater(slowest(re.compile(text, re.S), method, size), (30, ''), text)


class TestOptions(unittest.TestCase):
    """Options that can neither run a program, nor read or write a path, nor change where the network goes."""

    def test_options_mean_what_ytdlp_makes_of_them(self):
        said = ytdlp_says()['params']
        self.assertEqual(said[len(SAME_AS_YTDLP):], said[:len(SAME_AS_YTDLP)])
        used = {spelling for words in SAME_AS_YTDLP for spelling in v.OPTIONS for word in words
                if v.split_option(word)[0] == spelling}
        self.assertEqual(used, set(v.OPTIONS), 'each option has an example')

    def test_every_option_of_ytdlp_is_in_the_table_or_refused(self):
        known = ytdlp_says()['options']
        self.assertGreater(len(known), 250)
        self.assertLessEqual(set(v.OPTIONS), set(known), 'the table knows nothing that yt-dlp does not')
        for spelling in known:
            if spelling not in v.OPTIONS:
                for words in ([spelling], [spelling, 'x'], [spelling + '=x'], ['-x', spelling + 'x']):
                    with self.subTest(words=words), self.assertRaises(v.Refused) as caught:
                        v.parse_options(words)
                    self.assertEqual(caught.exception.code, 'option_not_allowed')
                    self.assertIn(spelling[:40], str(caught.exception))

    def test_anything_else_is_refused_by_name(self):
        for words, name in [(['--exec', 'rm'], '--exec'), (['--exec=rm'], '--exec'), (['-o', '/etc/x'], '-o'),
                            (['-oX'], '-o'), (['--form', 'b'], '--form'), (['--forma=b'], '--forma'), (['--'], '--'),
                            (['-'], '-'), (['x'], 'x'), ([''], "''"), (['http://a/'], 'http://a/'),
                            (['-f', 'b', 'http://a/'], 'http://a/'), (['--Format', 'b'], '--Format'),
                            (['–f', 'b'], '–f'), ([' -f', 'b'], ' -f'), (['--format\0', 'b'], '--format'),
                            (['--password=secret'], '--password'), (['-psecret'], '-p')]:
            with self.subTest(words=words), self.assertRaises(v.Refused) as caught:
                v.parse_options(words)
            self.assertEqual(caught.exception.code, 'option_not_allowed')
            self.assertIn(name, str(caught.exception))
            self.assertNotIn('secret', str(caught.exception))

    def test_values_are_checked(self):
        for words in (['-f'], ['-f', ''], ['-f', '-'], ['-f', ' - '], ['-f', 'b[title~=(a+)+$]'], ['-f', 'all'],
                      ['-f', 'mergeall'], ['-f', 'b,w'], ['-f', 'b\n'], ['-f', 'b' * 301],
                      ['-f', '(' * 11 + 'b' + ')' * 11], ['-f', 'b  [a=b]'], ['-f', '['], ['-f', 'b[a]'],
                      ['-f', 'b(w)'], ['-f', '(b'], ['-f', 'b+'], ['-f', '/b'], ['-f', 'b[height<x]'], ['-f', 'b w'],
                      ['-f', 'ü'], ['-S', ''], ['-S', 'a b'], ['-S', 'x' * 31], ['-S', 'res:' + 'a' * 31],
                      ['-S', ','.join(['res'] * 31)], ['--merge-output-format', 'exe'],
                      ['--merge-output-format', '../x'], ['-r', '0'], ['-r', '1'], ['-r', '-5M'], ['-r', 'inf'],
                      ['-r', 'nan'], ['-r', '1e9'], ['-r', '٣M'], ['-R', 'infinite'], ['-R', '-1'], ['-R', '1.5'],
                      ['-R', '٣'], ['--socket-timeout', '0'], ['--socket-timeout', '0.001'],
                      ['--socket-timeout', 'inf'], ['--socket-timeout', 'nan'], ['-N', '0'], ['-N', '-1'],
                      ['--user-agent', ''], ['--user-agent', 'a\r\nX: y'], ['--user-agent', 'ü'],
                      ['--user-agent', 'a' * 257], ['--user-agent', ' a'], ['--referer', 'x'],
                      ['--referer', 'file:///etc/passwd'], ['--referer', 'http://a\nb'], ['--referer', 'http://a b'],
                      ['-I', ''], ['-I', '1,'], ['-I', '::0'], ['-I', '1:2:00'], ['-I', '99999'], ['-I', 'x'],
                      ['-I', '٣'], ['-I', '1,' * 40 + '1'], ['--audio-format', 'exe'], ['--audio-format', 'm4a>mp3'],
                      ['--sub-langs', 'en.*'], ['--sub-langs', '(a+)+$'], ['--sub-langs', ''], ['-xy'],
                      ['--embed-subs=yes'], ['--mtime=']):
            self.assertEqual(refusal(v.parse_options, words), 'bad_option', words)

    def test_numbers_are_held_to_a_limit(self):
        words = '-N 99 -R 999 --socket-timeout 9999 --fragment-retries 100 --extractor-retries 50'
        self.assertEqual(dict(v.parse_options(words)),
                         {'--concurrent-fragments': '4', '--retries': '20', '--socket-timeout': '120',
                          '--fragment-retries': '20', '--extractor-retries': '10'})

    def test_a_list_or_a_shell_like_string(self):
        self.assertEqual(v.parse_options('-f "bv* + ba" --referer \'http://a/\''),
                         v.parse_options(['-f', 'bv* + ba', '--referer', 'http://a/']))
        self.assertEqual(v.parse_options(''), ())
        self.assertEqual(v.parse_options([]), ())
        for value in ("-f 'b", '-f b\\', 'x' * 5000, ' ' * 4096 + '-x', ['-x'] * 65, '-x ' * 65, ['-f', 'b' * 5000], 5,
                      {}, [5], [['-f']], b'-x'):
            self.assertEqual(refusal(v.parse_options, value), 'bad_field', str(value)[:20])

    def test_what_is_accepted_does_no_harm_inside_ytdlp(self):
        names = 'hasvid lang quality source proto hdr id res height fps br size fs_approx codec ext vext acodec other'
        fields = [plus + field + limit for plus in ('', '+') for field in names.split()
                  for limit in ('', ':1', '~9', ':999999999', ':x', ':mp4', ':1k')]
        numbers, steps = ('', '1', '-1', '+9999', '-9999', '9999'), ('', ':1', ':-1', ':9999', ':-9999')
        items = [f'{start}{end}{step}' for start in numbers for step in steps
                 for end in ('', *(f':{number}' for number in numbers), ':inf', '-infinite')]
        given = {'sort': [[field] for field in fields], 'items': [*items, ','.join(['-9999:9999:-1'] * 30)],
                 'langs': [['all'], ['-all', 'en'], ['en-US'] * 30],
                 'formats': ['+'.join(['bv*[height>1]'] * 17), '/'.join(['(b/w)+ba'] * 30), '((((b+ba)+ba)+ba)+ba)+ba',
                             '[a= b]' * 45 + '!', 'b' * 300]}
        for name, option in (('sort', '-S'), ('items', '-I'), ('langs', '--sub-langs'), ('formats', '-f')):
            kept = []
            for value in given[name]:
                with contextlib.suppress(v.Refused):
                    v.parse_options([option, ','.join(value) if isinstance(value, list) else value])
                    kept.append(value)
            given[name] = kept
        self.assertGreater(min(map(len, given.values())), 2)
        done = subprocess.run([sys.executable, '-I', '-c', USE_YTDLP, str(ytdlp_folder())], input=json.dumps(given),
                              capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        said = json.loads(done.stdout)
        self.assertTrue(said['same'], 'FormatSorter.settings is as before')
        self.assertLess(said['worst'][0], fair(1), said)


class TestFileNames(unittest.TestCase):
    """`%(title)s_%(id)s.%(ext)s`, any title: at most 255 bytes, id and extension kept."""
    titles = ['Hello', '', ' ', '...', '-rf', '.hidden', '../../etc/passwd', 'a/b\\c:d*e?f"g<h>i|j', 'con',
              'a\0b\x1bc\nd', '\u202egnp.exe', '\ud800', '\u200f\u200e',
              'x' * 500, 'ü' * 300, '漢' * 300, '😀' * 300, '👨\u200d👩\u200d👧\u200d👦' * 40, 'e\u0301' * 200,
              '\u0301' * 300, 'a\u00ad\u200bb', '\u3000wide\u3000', '~x', '%(id)s', '$(rm)',
              'a' * 226 + '😀', 'CON', '\ufeffx', '\U000e0041x', '~' * 300, 'مرحبا\u200cبالعالم']
    ids = ['7123456789012345678', 'C1_-x', '-abc', '_abc', '.abc', 'a/b', 'a.b', 'é', 'e\u0301', 'x' * 99, 'x' * 100,
           'x' * 101, 'x' * 300, 'x' * 299 + 'y', '😀' * 80, '', '..', '\ud800', '\ud801', ' a', 'a ']

    def test_a_title_of_endless_marks_takes_no_time(self):
        title = 'a' + '\u0301\u0323' * 30_000
        began = time.thread_time()
        names = {v.file_name(title, 'id', 'mp4'), v.file_name(title, title, 'mp4'),
                 v.file_name(title, title + 'x', 'mp4')}
        self.assertLess(time.thread_time() - began, 0.5)  # all of them put in order: six seconds, for all threads
        self.assertEqual(len(names), 3)
        self.assertLessEqual(max(len(name.encode()) for name in names), 255)

    def test_never_over_255_bytes_and_never_without_id_or_extension(self):
        for title in self.titles:
            for media_id in self.ids:
                for ext, part in (('mp4', ''), ('mp4', '2'), ('vtt', 'zh-Hans'), ('srt', 'x' * 50), ('../sh', '../x'),
                                  ('', '.'), ('x' * 40, '\n')):
                    name = v.file_name(title, media_id, ext, part)
                    with self.subTest(name=name):
                        self.assertLessEqual(len(name.encode('utf-8')), 255)
                        self.assertNotRegex(name, r'^[-. ~]|[\0-\x1f\x7f-\x9f/\\:*?"<>|]|\.$')
                        self.assertNotRegex(name, r'[\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]')
                        self.assertEqual(name, unicodedata.normalize('NFC', name))
                        self.assertRegex(name, r'\.[A-Za-z0-9]{1,10}$')
                        self.assertEqual(name, Path(name).name)
                        if re.fullmatch(r'[\w-]{1,99}', media_id, re.A):
                            self.assertRegex(name, f'(^_?|_){re.escape(media_id)}(\\.[^.]+)?\\.[^.]+$')

    def test_two_ids_never_share_a_name_by_trimming(self):
        for title in self.titles:
            names = {v.file_name(title, media_id, 'mp4').lower() for media_id in self.ids}
            self.assertEqual(len(names), len(self.ids), title)
        self.assertEqual(len({v.file_name('t', 'i', 'vtt', part) for part in
                              ('en', 'de', 'x' * 17, 'x' * 18, '/', ':')}), 6)

    def test_names_are_pleasant(self):
        for args, name in [(('Hello World', '7123', 'mp4'), 'Hello World_7123.mp4'), (('', '7123', 'mp4'), '7123.mp4'),
                           (('What?', '1', 'mp4'), 'What__1.mp4'), (('Café ☕️', '1', 'mp4'), 'Café ☕️_1.mp4'),
                           (('a\n  b', '1', 'MP4'), 'a b_1.MP4'), (('A/B', '1', 'vtt', 'en'), 'A_B_1.en.vtt'),
                           (('', '-x', 'mp4'), '_-x.mp4'), (('.a', 'b', 'mp4'), 'a_b.mp4'),
                           (('👨\u200d👩', '1', 'mp4'), '👨\u200d👩_1.mp4')]:
            self.assertEqual(v.file_name(*args), name)

    def test_a_subtitle_begins_like_its_video(self):
        for title in self.titles:
            stem = v.file_name(title, 'id', 'mp4')[:-len('.mp4')]
            self.assertEqual(v.file_name(title, 'id', 'ttml', 'zh-Hans'), stem + '.zh-Hans.ttml')

    def test_media_by_extension(self):
        self.assertEqual([v.media_type(name) for name in ('a.MP4', 'a.srt', 'a', 'a.exe')],
                         ['video/mp4', 'application/x-subrip'] + ['application/octet-stream'] * 2)


class TestStates(unittest.TestCase):
    """Statuses, what may follow what, and when."""

    def test_every_state_is_reached_and_left(self):
        self.assertEqual({after for _, after, _ in v.TRANSITIONS.values()}, {*v.STATES, ''})  # '': forgotten
        self.assertEqual({state for before, after, _ in v.TRANSITIONS.values() if after for state in before},
                         set(v.STATES) - {'completed'})
        sources = [before for before, after, _ in v.TRANSITIONS.values() if after == 'downloading']
        self.assertEqual(sources, [('queued',)])

    def test_tried_again_after_1_5_and_15_minutes_and_the_last_delay_repeats(self):
        self.assertEqual([v.backoff(attempt, (1, 2)) for attempt in (1, 2, 3, 50)], [1, 2, 2, 2])
        delays = (60, 300, 900)
        self.assertEqual([v.next_step(v.Outcome('retry'), attempt, 3, delays) for attempt in (1, 2, 3, 4)],
                         [('retry_later', 60), ('retry_later', 300), ('retry_later', 900),
                          ('give_up', 0)])

    def test_what_follows_an_outcome(self):
        for kind, step in {'done': 'finish', 'give_up': 'give_up', 'cancelled': 'give_up', 'stopped': 'requeue',
                           'pause': 'requeue'}.items():
            self.assertEqual(v.next_step(v.Outcome(kind), 1, 3, (60,)), (step, 0))
        login = v.Outcome('retry', 'login', 'Log in.', tries=2)
        self.assertEqual([v.next_step(login, attempt, 3, (60,))[0] for attempt in (1, 2)],
                         ['retry_later', 'give_up'])
        self.assertEqual(v.next_step(v.Outcome('retry', tries=9), 1, 0, (60,)), ('give_up', 0))

    def test_site_for_display(self):
        self.assertEqual([v.site_of(url) for url in ('https://vm.tiktok.com/x', 'https://www.example.org:8080/',
                                                     'http://[::1]:80/x')],
                         ['tiktok.com', 'example.org', '[::1]'])
        self.assertEqual([v.site_of(url) for url in ('http://[bad', 'x', '', 'http://a.b:1?c')],
                         ['[bad', 'x', '', 'a.b'])


# ---------- promises ----------------------------------------------------------------------
# Acknowledged is stored: what reaches the disk and when, kill -9, the phone's repeats, limits, bad
# starts, commands. Each test bears the words of the promise it holds.

@unittest.skipUnless(shutil.which('strace'), 'strace is not installed')
class TestStoredBeforeAcknowledged(DaemonTest):
    """Store before ack, group commit."""
    settings = {**IN_THE_CLEAR, 'downloads': {'min_free_space': '9000GB'}}  # paused: only links are taken

    def test_every_202_comes_after_wal_write_and_sync(self):
        with Strace(self.daemon) as trace:
            for number in range(20):
                self.daemon.submit(tiktok_link(number))
        kinds = []
        for line in trace.lines():
            if re.match(r'pwrite64\(\d+<[^>]*-wal>', line):
                kinds.append('w')
            elif re.match(r'f(data)?sync\(\d+<[^>]*-wal>\)\s+= 0', line):
                kinds.append('s')
            elif 'HTTP/1.1 202' in line:
                kinds.append('A')
        self.assertRegex(''.join(kinds), r'^(w+sA){20}$')  # alone, each pays one sync and waits for nobody

    def test_requests_that_arrive_during_a_commit_share_the_next(self):
        with Strace(self.daemon, 'fdatasync:delay_enter=500000') as trace:
            with ThreadPoolExecutor(24) as pool:
                list(pool.map(self.daemon.submit, map(tiktok_link, range(1000, 1024))))
        syncs = sum(bool(re.match(r'fdatasync\(\d+<[^>]*-wal>', line)) for line in trace.lines())
        self.assertEqual(sum('HTTP/1.1 202' in line for line in trace.lines()), 24)
        self.assertLessEqual(syncs, 6)

    def test_an_error_at_commit_gives_503_and_the_daemon_works_again_when_the_disk_does(self):
        for rule in ('fdatasync:error=EIO', 'pwrite64:error=ENOSPC', 'pwrite64:error=EIO'):
            with self.subTest(rule):
                with Strace(self.daemon, rule):
                    status, headers, body = self.daemon.client.post('/api/v1/download', {'url': tiktok_link(5)})
                    self.assertEqual((status, body['code']), (503, 'cannot_store'), body)
                    self.assertTrue(int(headers['Retry-After']))
                    self.assertEqual(self.daemon.client.get('/api/v1/health').status, 503)
                self.assertEqual(self.daemon.client.get('/api/v1/health').status, 200)  # it looks by itself
                self.daemon.submit(tiktok_link(6), timestamp=time.monotonic_ns())

    def test_a_commit_of_nothing_does_not_say_that_the_disk_works_again(self):
        store = open_store(self)
        store.error = 'disk I/O error'
        store.write(lambda db: db.execute('DELETE FROM downloads'))
        self.assertEqual(store.error, 'disk I/O error')
        store.probe()
        self.assertIsNone(store.error)

    def test_completed_comes_after_the_syncs_of_the_file_and_of_its_folder(self):
        daemon = self.new_daemon()
        with Strace(daemon, calls='fsync,fdatasync,rename,renameat,renameat2,link,linkat') as trace:
            daemon.download(self.site.tiktok())
        kinds = ''
        for line in trace.lines():
            if re.match(r'fdatasync\(\d+<[^>]*-wal>', line):
                kinds += 'c'
            elif re.match(rf'fsync\(\d+<{daemon.output}/.incomplete/[^>]*mp4>', line):
                kinds += 'f'
            elif re.match(rf'fsync\(\d+<{daemon.output}>', line):
                kinds += 'd'
            elif re.match(r'(rename|link)', line) and f'"{daemon.output}/A cat' in line:
                kinds += 'r'
        self.assertRegex(kinds, r'^c+f+rd+c+$')


class TestKill9(DaemonTest):
    """kill -9 at any moment: every acknowledged link is there, one row and one set of files each."""
    settings = None

    def test_acknowledged_url_survives_kill_9(self):
        tally = KillTally(self.new_daemon(downloads={'max_concurrent': 2}), self.site)
        tally.rounds(4)
        while len(tally.acknowledged) < 4:  # a slow machine answers few in a life
            tally.rounds(1)
        self.assertEqual(tally.wrong(), [])

    def test_a_link_that_takes_the_process_down_three_times_costs_an_attempt(self):
        daemon = self.new_daemon(downloads={'max_retries': 0})
        post = self.site.tiktok(hold_at=20_000)
        id = daemon.submit(post)
        for crash in range(1, 4):
            post.page.wait_hits(crash)
            self.assertEqual((daemon.status(id)['status'], daemon.status(id)['retry_count']), ('downloading', 0))
            daemon.kill()
            daemon.start()
        row = daemon.wait_status(id, 'failed')
        self.assertIn('The server crashed 3 times', row['error_message'])


    def test_no_file_stays_of_one_that_is_given_up_after_three_kills_before_its_commit(self):
        daemon = self.new_daemon(start=False, downloads={'max_retries': 0, 'filename': '%(uploader)s/%(id)s'},
                                 hurry={'STORE_NAP': 2.5})  # a copy of its own
        text, place = daemon.program.read_text(encoding='utf-8'), '        over = self.store.end('
        self.assertEqual(text.count(place), 1)
        kill = '        outcome.files and os.kill(os.getpid(), 9)\n'
        daemon.program.write_text(text.replace(place, kill + place), encoding='utf-8')
        done = daemon.run('add', str(self.site.tiktok()))
        self.assertEqual(done.returncode, 0, done.stdout)
        for _ in range(3):
            daemon.launch()
            self.assertEqual(daemon.wait_exit(30), -signal.SIGKILL)
            self.assertEqual(daemon.files(), ['tester'])
        daemon.start()
        row = daemon.wait_status(daemon.rows()[0]['id'], 'failed')
        self.assertIn('The server crashed 3 times', row['error_message'])
        wait_until(lambda: not files_below(daemon.output).keys() - {daemon.output / v.MARKER},
                   what=lambda: files_below(daemon.output))
        self.assertEqual(daemon.files(), [])

    def test_no_file_stays_of_one_that_is_cancelled_after_a_kill_before_its_commit(self):
        daemon = self.new_daemon(hurry={'CARE_SECONDS': 0.2})
        id = daemon.half_way(self.site.tiktok(size=3_000_000, hold_at=2_000_000))
        daemon.kill()
        folder = daemon.output / '.incomplete' / id
        note = json.loads((folder / 'job.json').read_text())
        results = [{'item': at, 'part': '', 'ext': 'mp4', 'names': {}, 'size': 1, 'note': '', 'source': f'{at}.mp4',
                    'name': name} for at, name in ((1, 'moved.mp4'), (2, 'not-yet.mp4'))]
        (folder / 'job.json').write_text(json.dumps({**note, 'results': results}))
        (folder / '2.mp4').write_text('2')
        for name in ('moved.mp4', 'not-yet.mp4'):  # that name is another's by now
            (daemon.output / name).write_text('1')
        change_database(daemon.database, "UPDATE downloads SET status = 'failed'")
        daemon.start()
        wait_until(lambda: not folder.exists())
        self.assertEqual(daemon.files(), ['not-yet.mp4'])


class TestFreeze(FreezeTest):
    """What holds the interpreter is ended by the watchdog, and costs nobody else anything."""

    def test_a_page_that_freezes_yt_dlp_costs_one_freeze_and_no_link(self):
        daemon = self.new_daemon(start=False, hurry={'FREEZE_SECONDS': 5.0}, security=ANYWHERE, site=None)
        daemon.launch(from_source=True)  # with its parent
        for number, page in enumerate(self.PAGES, 1):
            wait_until(daemon.listens, 20)
            daemon.client = daemon.poller = daemon.new_client()
            links = [self.freezing(page), *(self.site.direct() for _ in range(3))]
            answer, pid = daemon.client.post('/api/v1/downloads', {'text': '\n'.join(links)}).json, daemon.pid
            bad, *good = [row['download_id'] for row in answer['downloads']]
            wait_until(lambda pid=pid: not os.path.exists(f'/proc/{pid}'), 30, 'the watchdog ends it')
            wait_until(daemon.listens, 20)
            daemon.client = daemon.poller = daemon.new_client()
            self.assertIn('server for a minute', daemon.wait_status(bad, 'failed')['error_message'])
            for id in good:
                daemon.wait_status(id, 'completed')
            self.assertEqual(len(re.findall('its watchdog stopped it: Timeout .*yt_dlp', daemon.log())), number)
        for number in (signal.SIGHUP, signal.SIGTERM):  # passed on
            os.kill(daemon.process.pid, number)
            wait_until(lambda: daemon.log().count('stopping to restart') == 1)
        self.assertEqual(daemon.wait_exit(), 0)
        self.assertFalse(list(daemon.database.parent.glob('*.freeze.last')))

    def test_of_several_that_ran_each_is_tried_again_alone(self):
        daemon = self.new_daemon(hurry={'FREEZE_SECONDS': 2.0}, security=ANYWHERE, site=None,
                                 downloads={'max_concurrent': 3, 'max_retries': 0})
        post = self.site.direct(size=300_000, hold_at=200_000)
        held = daemon.half_way(post)
        bad = daemon.submit(self.freezing())
        for wanted in (2, 1):  # together, then alone
            self.assertEqual(daemon.wait_exit(30), 1)
            running = daemon.rows("SELECT id FROM downloads WHERE status = 'downloading'")
            self.assertEqual(len(running), wanted)
            post.media[0].release()
            daemon.start()
        self.assertIn('froze', daemon.wait_status(bad, 'failed')['error_message'])
        self.assertEqual(daemon.wait_status(held, 'completed')['retry_count'], 0)

    def test_a_slow_disk_at_the_end_is_no_freeze(self):
        daemon = self.new_daemon(hurry={'FREEZE_SECONDS': 4.0})
        text, place = daemon.program.read_text(encoding='utf-8'), '        self.store.close()\n        if restart:\n'
        self.assertEqual(text.count(place), 1)
        slow = '        time.sleep(3)\n'
        daemon.program.write_text(text.replace(place, slow + place), encoding='utf-8')
        daemon.restart()
        with socket.create_connection(('127.0.0.1', daemon.port)) as phone:  # it is waited for
            phone.sendall(b'x')
            daemon.signal(signal.SIGTERM)
            self.assertEqual(daemon.wait_exit(20), 0)
        self.assertFalse(v.dump_file(daemon.config).read_text())

    def test_a_freeze_that_is_not_yt_dlps_counts_as_a_crash(self):
        daemon = self.new_daemon(security=ANYWHERE, site=None)
        post = self.site.direct(size=300_000, hold_at=200_000)
        id = daemon.half_way(post)
        daemon.kill()
        v.dump_file(daemon.config).write_text('Timeout (0:01:00)!\nThread 0x1 (most recent call first):\n  File "x"')
        daemon.start()
        wait_until(lambda: daemon.row(id)['crashes'] == 1, 10)
        self.assertRegex(daemon.log(), 'watchdog stopped it: Timeout')


class TestLog(LogTest):
    """One writer: lines cost a request no system call, and what matters is on disk before anything may end."""

    def test_lines_are_written_in_batches_and_in_order(self):
        began = time.monotonic()
        for number in range(500):
            self.say(f'line {number}')
        batches = (time.monotonic() - began) / v.LOG_NAP + 2
        self.assertLessEqual(len(self.writes), batches)
        wait_until(lambda: b'line 499\n' in b''.join(self.writes))
        lines = self.file.read_text().splitlines()
        self.assertEqual([line.partition('INFO ')[2] for line in lines], [f'line {number}' for number in range(500)])
        self.assertRegex(lines[0], r'^20\d\d-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO ')

    def test_a_warning_is_on_disk_at_once_with_all_before_it(self):
        self.say('before')
        self.say('trouble', logging.WARNING)
        self.assertRegex(self.file.read_text(), r'(?s)before\n.*WARNING trouble\n$')

    def test_a_line_is_bounded_whatever_was_sent(self):
        self.say('\u2028\0' * 100_000, logging.WARNING)
        self.assertLess(len(self.file.read_text()), 10 * v.LONGEST_MESSAGE)
        self.assertEqual(len(self.file.read_text().splitlines()), 1)

    def test_a_full_disk_is_nobodys_fault_and_is_got_over(self):
        with unittest.mock.patch.object(os, 'write', side_effect=OSError(errno.ENOSPC, 'full')):
            self.say('lost', logging.ERROR)
        self.say('back', logging.ERROR)
        self.assertRegex(self.file.read_text(), 'ERROR back\n$')


class TestPhone(DaemonTest):
    """What a phone sends, sends again, sends in one go."""
    settings = {'downloads': {'min_free_space': '9000GB'}}

    def post(self, **fields: Any) -> Answer:
        return self.daemon.client.post('/api/v1/download', fields)

    def post_bytes(self, body: bytes, content_type: str) -> Answer:
        return self.daemon.client.post('/api/v1/download', body, Content_Type=content_type)

    def test_same_client_url_timestamp_gets_the_same_id(self):
        link = 'https://vm.tiktok.com/ZM1/'  # which tells nothing of the post
        first = self.post(url=link, client_id='a', timestamp=10 ** 60)  # any number, only ever compared
        again = self.post(url=link, client_id='a', timestamp=10 ** 60)
        self.assertEqual((first.status, again.status), (202, 200))
        self.assertEqual(first.json['download_id'], again.json['download_id'])
        for client_id, timestamp in (('b', 10 ** 60), ('a', 9), ('a', None)):
            self.assertEqual(self.post(url=link, client_id=client_id, timestamp=timestamp).status, 202, timestamp)
        self.daemon.restart()
        self.assertEqual(self.post(url=link, client_id='a', timestamp=10 ** 60).json['download_id'],
                         first.json['download_id'])

    def test_a_post_that_is_on_its_way_by_any_of_its_links(self):
        for forms in (('tiktok.com/@somebody/video/77', 'www.tiktok.com/@other/photo/77?x=1', 'm.tiktok.com/v/77.html',
                       'www.tiktokv.com/share/video/77/', 'www.tiktok.com/embed/v2/77'),
                      ('instagram.com/p/C0DE_-12345/?img_index=2', 'www.instagram.com/reel/C0DE_-12345',
                       'www.instagram.com/some.body/reel/C0DE_-12345/', 'www.instagram.com/tv/C0DE_-12345/?igsh=x')):
            first = self.post(URL=f'https://{forms[0]}', client_id='a', timestamp=1)
            self.assertEqual(first.status, 202, first.json)
            for link in forms:
                told = self.post(Url=link, client_id='b')
                self.assertEqual((told.status, told.json['status'], told.json['message'], told.json['download_id']),
                                 (200, 'queued', 'It is on its way', first.json['download_id']), link)
                self.assertEqual(self.post(url=link, ytdlp_cli_parameters=['-R', '3', '-N2']).status, 200)
            ids = {first.json['download_id']}
            for fields in ({'again': True}, {'ytdlp_cli_parameters': '-x'}):
                told = self.post(url=forms[0], client_id='c', **fields)
                self.assertEqual(told.status, 202, fields)
                ids.add(told.json['download_id'])
            told = self.daemon.client.post('/initiateDownload', {'videoUrl': forms[1]}).json
            self.assertIn(told['downloadUUID'], ids)
            for path, body in (('/api/v1/download?again=1', {'url': forms[0]}),
                               ('/api/v1/downloads?again=1', {'text': forms[0]}),
                               ('/share/x?again=1', {'text': forms[0]})):
                self.assertEqual(self.daemon.client.post(path, body).status, 202, path)
            again = self.daemon.client.post('/initiateDownload?again=1', {'videoURL': forms[1]}).json
            self.assertNotIn(again['downloadUUID'], ids)

    def test_same_one_when_both_arrive_at_once(self):
        wanted = {'url': tiktok_link(2), 'client_id': 'a', 'timestamp': 1}
        with ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(self.daemon.new_client().post, '/api/v1/download', wanted) for _ in range(12)]
        self.assertEqual(len({answer.result().json['download_id'] for answer in answers}), 1)

    def test_a_whole_offline_list_in_one_commit_each_link_answered_for(self):
        before = self.daemon.rows('SELECT count(*) AS n FROM downloads')[0]['n']
        text = f'first {tiktok_link(11)}\nthen {tiktok_link(12)} and https://example.com/x\n{tiktok_link(13)}'
        wanted = {'text': text, 'client_id': 'list', 'timestamp': 5}
        status, _, body = self.daemon.client.post('/api/v1/downloads', wanted)
        self.assertEqual((status, body['message'].split('.')[0], body['keep']), (202, '3 queued, 1 refused', ''))
        self.assertEqual([sorted(row) for row in body['downloads']],
                         [['download_id', 'url']] * 2 + [['error', 'url']] + [['download_id', 'url']])
        self.assertEqual(self.daemon.rows('SELECT count(*) AS n FROM downloads')[0]['n'], before + 3)
        again = self.daemon.client.post('/api/v1/downloads', {'text': text, 'client_id': 'list', 'timestamp': 5}).json
        self.assertEqual(again['downloads'], body['downloads'])

    def test_every_link_in_a_text_given_as_url_the_first_good_one_is_answered(self):
        wanted = {'url': f'https://example.com/x {tiktok_link(14)} {tiktok_link(15)}', 'client_id': 'two'}
        status, _, body = self.daemon.client.post('/api/v1/download', wanted)
        found = self.daemon.rows("SELECT id, url FROM downloads WHERE client_id = 'two' ORDER BY rowid")
        self.assertEqual((status, [row['url'] for row in found]), (202, [tiktok_link(14), tiktok_link(15)]))
        self.assertEqual(body['download_id'], found[0]['id'])

    def test_a_list_of_any_length_comes_back_in_parts(self):
        def links(first, last):
            return [f'https://vm.tiktok.com/ZL{number}/' for number in range(first, last)]
        every = links(0, 1203)
        text = '🎬'.join(every[:600]) + ' \t, '.join(['', *every[600:], 'https://example.com/x', every[3]])
        found, parts = [], 0
        while text:
            answer = self.daemon.client.post('/api/v1/downloads', {'text': text + ' ' * 400_000 * (parts == 0)})
            self.assertEqual(answer.status, 202, answer.json)
            self.assertLessEqual(len(answer.json['downloads']), 500)
            found += [row['url'] for row in answer.json['downloads'] if 'download_id' in row]
            text, parts = answer.json['keep'], parts + 1
        self.assertEqual((found, parts), (every, 3))
        self.assertEqual(self.daemon.client.post('/api/v1/downloads', {'text': ' ' * (1 << 20)}).status, 413)
        for body, status, code in (({'text': 'https://example.com/'}, 403, 'domain_not_allowed'),
                                   ({'text': 'none'}, 400, 'no_url'), ({'Text': ''}, 400, 'no_url')):
            answer = self.daemon.client.post('/api/v1/downloads', body)
            self.assertEqual((answer.status, answer.json['code']), (status, code))
        self.assertIn('"url"', self.post(link=every[0]).json['message'])
        self.assertIn('"text"', answer.json['message'])
        share = self.daemon.client.post('/share/lite', {
            'text': 'https://vt.tiktok.com/ZSLite/ This post is shared via TikTok Lite. Download TikTok Lite to enjoy '
                    'more posts: https://www.tiktok.com/tiktoklite'})
        self.assertEqual((share.status, share.json[:16]), (202, b'Saved. The queue'))

    def test_while_the_queue_is_paused_the_message_says_so(self):
        links = map(tiktok_link, itertools.count(21_000))  # it has only just started
        wait_until(lambda: 'paused: The disk is full' in self.post(url=next(links)).json['message'])
        health = self.daemon.client.get('/api/v1/health').json
        self.assertEqual(health['status'], 'degraded')
        self.assertIn('The disk is full', health['paused'])

    def test_every_answer_is_json_with_a_message(self):
        for answer, status in ((self.post(url=''), 400), (self.post(), 400), (self.post(url='no link here'), 400),
                               (self.post(url='https://example.com/'), 403),
                               (self.post(url=tiktok_link(1) + 'x' * 3000), 400),
                               (self.daemon.client.get('/api/v1/status/nonsense'), 404),
                               (self.daemon.client.get('/api/v1/history?limit=0'), 400),
                               (self.daemon.client.get('/api/v1/history?limit=201'), 400),
                               (self.daemon.client.get('/nowhere'), 404),
                               (self.daemon.client.delete('/api/v1/history'), 405),
                               (self.post_bytes(b'{"url": 1}', 'text/plain'), 415),
                               (self.post_bytes(b'{', 'application/json'), 400),
                               (self.post(url='x' * 17000), 413)):
            self.assertEqual(answer.status, status, answer.json)
            self.assertEqual((answer.json['status'], answer.json['error']), ('error', answer.json['message']))
            self.assertRegex(answer.json['message'], r'^[A-Za-z].*[.]$')
            self.assertLessEqual({'code', 'timestamp'}, set(answer.json))

    def test_history_newest_first_paged_filtered_searched(self):
        ids = [self.post(url=tiktok_link(300 + number)).json['download_id'] for number in range(5)]
        body = self.daemon.client.get('/api/v1/history?limit=3').json
        self.assertEqual([row['download_id'] for row in body['downloads']], ids[:1:-1])
        body = self.daemon.client.get('/api/v1/history?limit=2&offset=3').json
        self.assertEqual([row['download_id'] for row in body['downloads']], ids[1::-1])
        self.assertEqual(self.daemon.client.get('/api/v1/history?q=video/30').json['total'], 5)
        self.assertEqual(self.daemon.client.get('/api/v1/history?q=%25').json['total'], 0)
        self.assertEqual(self.daemon.client.get('/api/v1/history?status=completed').json['total'], 0)

    def test_every_request_is_logged_with_control_characters_escaped(self):
        self.post(url=tiktok_link(77), client_id='line\u2028break')
        self.post(url=tiktok_link(78), client_id='phone-77')
        wait_until(lambda: 'client_id=phone-77' in self.daemon.log(), 5)
        self.assertRegex(self.daemon.log(),
                         r'\d\d:\d\d:\d\d.* "POST /api/v1/download" 202 .*client_id=phone-77 url=https://www')
        self.assertTrue(all(line.isprintable() for line in self.daemon.log().split('\n')))


class TestWhoIsAnswered(DaemonTest):
    """Rate limit per client_id, keys, allowed clients."""
    settings = {'security': {'requests_per_hour': '3'}, 'downloads': {'min_free_space': '9000GB'}}
    env = {'VIDEOSERVER_API_KEYS': 'first-key,zweiter-schlüssel'}

    def test_rate_limit_per_client_id_survives_a_restart(self):
        self.daemon.client.key = 'first-key'
        post = lambda client: self.daemon.client.post(  # noqa: E731
            '/api/v1/download', {'url': tiktok_link(time.monotonic_ns()), 'client_id': client})
        self.assertEqual([post('a').status for _ in range(4)], [202, 202, 202, 429])
        answer = post('a')
        self.assertTrue(3500 < int(answer.headers['Retry-After']) <= 3600)
        self.assertEqual(post('b').status, 202)
        wanted = {'url': f'https://example.com/x {tiktok_link(9)}', 'client_id': 'a'}
        self.assertEqual(self.daemon.client.post('/api/v1/download', wanted).status, 429)  # the refusal that passes
        self.daemon.restart()
        self.daemon.client.key = 'first-key'
        self.assertEqual(post('a').status, 429)
        body = self.daemon.client.post('/api/v1/downloads', {
            'text': ' '.join(tiktok_link(number) for number in range(4)), 'client_id': 'b'}).json
        self.assertEqual(body['message'].split('.')[0], '2 queued, 2 refused')
        self.assertEqual(body['keep'].split(), [tiktok_link(2), tiktok_link(3)])

    def test_keys_are_asked_for_everywhere_but_on_the_page_and_a_bare_health(self):
        client = self.daemon.new_client()
        for path in ('/api/v1/history', '/metrics', f'/api/v1/status/{uuid.uuid4()}', '/listDownloads'):
            self.assertIn(client.get(path).status, (401, 418), path)
        self.assertEqual(client.post('/api/v1/download', {'url': tiktok_link(1)}).status, 401)
        self.assertEqual(client.get('/listDownloads').json['errorCode'], 'key_wanted')
        self.assertEqual(set(client.get('/api/v1/health').json),
                         {'status', 'version', 'uptime', 'queue_size', 'message'})
        for path in ('/', '/setup', '/ca.crt', '/ca.mobileconfig', '/page.css', '/page.js'):
            self.assertEqual(client.get(path).status, 200, path)
        for key in ('first-key', 'zweiter-schlüssel'.encode().decode('latin-1')):
            client.key = key
            self.assertEqual(client.get('/api/v1/history').status, 200, key)
        client.key = 'first-ke'
        self.assertEqual(client.get('/api/v1/history').status, 401)
        self.assertNotIn('first-key', self.daemon.log())

    def test_only_allowed_clients_are_answered(self):
        daemon = self.new_daemon(security={'allowed_clients': '192.168.77.0/24'})
        self.assertEqual(daemon.client.get('/api/v1/health').status, 403)

    def test_repeats_are_limited_and_hold_up_nobody(self):
        link = {'url': 'https://vm.tiktok.com/ZRepeat/', 'client_id': 'again', 'timestamp': 1}
        near = self.daemon.new_client(key='first-key')
        id, ends = near.post('/api/v1/download', link).json['download_id'], []

        def send():
            client = self.daemon.new_client(key='first-key', keep_alive=True)
            self.addCleanup(client.close)
            for _ in range(500):
                answer = client.post('/api/v1/download', link)
                ends.append(answer.status)
                if answer.status == 429:
                    self.assertTrue(0 < int(answer.headers['Retry-After']) <= 3600)
                else:
                    self.assertEqual(answer.json['download_id'], id)
        threads = [threading.Thread(target=send) for _ in range(8)]
        for thread in threads:
            thread.start()
        waits = []
        while any(thread.is_alive() for thread in threads):
            began = time.monotonic()
            self.assertEqual(near.post('/api/v1/download', {
                'url': tiktok_link(time.monotonic_ns()), 'client_id': f'other {len(waits)}'}).status, 202)
            waits.append(time.monotonic() - began)
            time.sleep(0.2)
        self.assertEqual((len(ends), ends.count(200), ends.count(429)), (4000, 3, 3997))
        self.assertLess(max(waits), fair(1))
        cpu = self.daemon.cpu()
        time.sleep(1)
        self.assertLess(self.daemon.cpu() - cpu, 0.1, 'no stale entry keeps the processor busy')


class TestTriedKeys(DaemonTest):
    """Behind a trusted proxy, who tries keys is slowed down, and nobody else; strangers learn little."""
    settings = {'server': {'trusted_proxies': '127.0.0.1'}, 'security': {'allowed_clients': 'any'}}
    env = {'VIDEOSERVER_API_KEYS': 'right'}
    hurry = {'WRONG_KEY_DELAY': 0.02}

    def seconds(self, address: str, key: str, path: str = '/metrics', status: int = 401) -> float:
        began = time.monotonic()
        answer = self.daemon.new_client(key=key).get(path, X_Forwarded_For=address)
        self.assertEqual(answer.status, status)
        return time.monotonic() - began

    def test_wrong_ones_wait_longer_each_time_the_right_one_never(self):
        paths = ('/metrics', '/api/v1/history', '/api/v1/health', f'/files/{uuid.uuid4()}/a.mp4', *['/metrics'] * 2)
        took = [self.seconds('192.168.1.5', f'wrong{number}', path, 200 if 'health' in path else 401)
                for number, path in enumerate(paths)]
        self.assertGreater(sum(took), sum(0.02 * 2 ** number for number in range(6)))
        self.assertGreater(self.seconds('192.168.1.5', ''), 0)
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(self.seconds, '192.168.1.5', 'wrong')
            fast = [self.seconds(address, 'right', '/metrics', 200) for address in ('192.168.1.5', '192.168.1.6')]
        self.assertLess(max(fast), slow.result())  # 1.28 s
        self.assertGreater(self.seconds('fd00::1', 'wrong') + self.seconds('fd00::2', 'wrong'), 0.06)
        self.assertLess(self.seconds('192.168.1.7', 'wrong'), fair(0.2))

    def test_clients_of_private_networks_alone_learn_the_addresses_of_the_machine(self):
        own = [ip for ip in v.host_addresses() if not v.ipaddress.ip_address(ip).is_loopback]
        if not own:
            self.skipTest('this machine has no address but its loopback')
        for client, shown in (('192.168.7.7', True), ('8.8.8.8', False), ('2001:db8::1', False)):
            answer = self.daemon.client.get('/setup', X_Forwarded_For=client)
            told = str(answer.headers) + answer.json.decode()
            self.assertEqual((client, any(f'//{ip}:' in told for ip in own)), (client, shown))


class TestBadStarts(DaemonTest):
    """One clear line each, exit codes as in the contract, nothing destroyed."""
    settings = None

    def ends(self, daemon: Daemon, code: int, *words: str) -> str:
        done = daemon.run(seconds=20)
        self.assertEqual(done.returncode, code, done.stdout)
        lines = [line for line in done.stdout.splitlines() if line.startswith('videoserverd: ')]
        self.assertEqual(len(lines), 1, done.stdout)
        self.assertNotIn('Traceback', done.stdout)
        for word in words:
            self.assertIn(word, lines[0])
        return lines[0]

    def test_bad_configuration_names_file_section_key_and_what_is_accepted(self):
        for settings, words in (({'server': {'port': 'http'}}, ('config.ini', '[server]', 'port', 'whole number')),
                                ({'server': {'prot': '1'}}, ('[server]', 'prot', 'accepted: host, port')),
                                ({'sever': {'port': '1'}}, ('[sever]', 'accepted: server, database')),
                                ({'downloads': {'retry_delays': '1,x'}}, ('retry_delays', '60,300,900')),
                                ({'s3': {'endpoint': 'https://s3.test'}}, ('[s3]', 'bucket'))):
            with self.subTest(settings):
                daemon = self.new_daemon(start=False)
                daemon.configure(**settings)
                self.ends(daemon, 2, *words)
        self.ends(self.new_daemon(start=False, env={'VIDEOSERVER_SERVER_PORTS': '1'}), 2, 'VIDEOSERVER_SERVER_PORTS')

    def test_port_in_use(self):
        with socket.socket() as taken:
            taken.bind(('127.0.0.1', 0))
            taken.listen()
            self.ends(self.new_daemon(start=False, server={'port': str(taken.getsockname()[1])}), 1, 'port', 'in use')

    def test_second_daemon_on_one_database_refuses_naming_the_first(self):
        daemon = self.new_daemon()
        self.ends(daemon, 1, f'process {daemon.pid}', f'port {daemon.port}')
        daemon.submit(tiktok_link(1))

    def test_unreadable_key_and_corrupt_certificate(self):
        daemon = self.new_daemon(start=False)
        (daemon.folder / 'certs/server.key').write_text('nonsense')
        (daemon.folder / 'certs/ca.key').unlink()
        self.ends(daemon, 1, 'server.key')
        self.assertEqual((daemon.folder / 'certs/server.key').read_text(), 'nonsense')

    def test_corrupt_database_destroys_nothing_and_says_how_to_restore(self):
        daemon = self.new_daemon()
        daemon.client.post('/api/v1/downloads', {'text': ' '.join(tiktok_link(number) for number in range(200))})
        daemon.terminate()
        whole = daemon.database.read_bytes()
        flipped = bytearray(whole)
        flipped[4096 * 3:4096 * 3 + 64] = os.urandom(64)
        for damaged in (whole[:len(whole) // 2], b'not a database' * 1000, bytes(flipped)):
            daemon.database.write_bytes(damaged)
            self.ends(daemon, 1, 'damaged', 'backups')
            self.assertEqual(daemon.database.read_bytes(), damaged)

    def test_a_database_of_document_a_alone_is_taken_over(self):
        daemon = self.new_daemon(start=False)
        daemon.database.parent.mkdir()
        with contextlib.closing(sqlite3.connect(str(daemon.database))) as db:
            db.executescript(v.DOCUMENT_A_SCHEMA)
            db.execute("INSERT INTO downloads (id, url, client_id, status, created_at, last_updated) "
                       "VALUES (?, ?, 'old', 'queued', 1, 1)", (str(uuid.uuid4()), str(self.site.tiktok())))
            db.commit()
        daemon.start()
        wait_until(lambda: daemon.rows("SELECT 1 FROM downloads WHERE status = 'completed'"), 20)
        self.assertEqual(daemon.client.get('/api/v1/history').json['total'], 1)

    def test_read_only_or_missing_output_folder_is_told_and_got_over(self):
        daemon = self.new_daemon(start=False)
        daemon.output.write_text('a file where the folder should be')
        daemon.start()
        id = daemon.submit(self.site.tiktok())
        wait_until(lambda: 'cannot be used' in (daemon.client.get('/api/v1/health').json['paused'] or ''))
        daemon.output.unlink()
        daemon.wait_status(id, 'completed')
        self.assertEqual(daemon.client.get('/api/v1/health').json['paused'], None)

    def test_an_unplugged_disk_is_not_an_empty_folder(self):
        daemon = self.new_daemon()
        daemon.download(self.site.tiktok())
        away = daemon.output.with_name('unplugged')
        daemon.output.rename(away)
        daemon.output.mkdir()  # the mount point
        wait_until(lambda: 'disk plugged in' in (daemon.client.get('/api/v1/health').json['paused'] or ''), 20)
        id = daemon.submit(self.site.tiktok())
        self.assertEqual(daemon.files(), [])
        daemon.output.rmdir()
        away.rename(daemon.output)
        daemon.wait_status(id, 'completed')

    def test_sigterm_while_waiting_for_the_clock(self):
        daemon = self.new_daemon(start=False, hurry={'BUILT': 1 << 40})
        shutil.rmtree(daemon.folder / 'certs')
        process = subprocess.Popen([sys.executable, str(daemon.program), '--config', str(daemon.file)], env=daemon.env,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        wait_until(lambda: 'the clock shows' in daemon.log(), 20)
        process.terminate()
        self.assertEqual(process.wait(fair(5)), 0)
        self.assertIn('stopped', daemon.log())


class TestCommands(DaemonTest):
    """add, list, doctor, backup beside a running daemon and without one."""
    settings = None

    def test_add_and_list_with_and_without_a_daemon(self):
        daemon = self.new_daemon(start=False, downloads={'min_free_space': '9000GB'})
        self.assertEqual(daemon.run('add', tiktok_link(1)).returncode, 0)
        daemon.start()
        done = daemon.run('add', f'look: {tiktok_link(2)}', 'https://example.com/')
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertIn('refused', done.stdout)
        self.assertEqual(len(daemon.rows()), 2)
        self.assertIn('2 queued', daemon.run('list').stdout)
        for rows, again in ((4, ()), (4, ()), (6, ('--again',))):
            self.assertEqual(daemon.run('add', *again, f'{tiktok_link(3)} {tiktok_link(4)}').stdout.count('\n'), 2)
            self.assertEqual(len(daemon.rows()), rows)
        daemon.terminate()
        for rows, again in ((8, ()), (10, ('--again',))):
            daemon.run('add', *again, f'{tiktok_link(5)} {tiktok_link(6)}')
            self.assertEqual(len(daemon.rows()), rows)
        self.assertIn(tiktok_link(2), daemon.run('list').stdout)

    def test_what_the_page_can_do_from_a_terminal(self):
        daemon = self.new_daemon(downloads={'max_retries': '0', 'retry_delays': '900'})
        held = self.site.tiktok(title='Katze am Klavier', size=900_000, hold_at=600_000)
        running = daemon.half_way(held)
        waiting, dead = daemon.submit(self.site.tiktok()), self.site.tiktok(page={'fail': [500] * 9})
        self.assertRegex(daemon.run('list').stdout, fr'{running[:8]}  \S+ \S+  \d+% done +Katze am Klavier\n')
        self.assertRegex(daemon.run('cancel', waiting[:8]).stdout, waiting[:8] + ' .*ancel')
        self.assertIn('cancelled', daemon.run('list', '--status', 'failed').stdout)
        held.media[0].release()
        daemon.wait_status(running, 'completed')
        failed = daemon.fails(dead)['download_id']
        done = daemon.run('retry', '--failed')
        self.assertEqual((done.returncode, done.stdout[:8], done.stdout.count('\n')), (0, failed[:8], 1), done.stdout)
        daemon.wait_for(failed, lambda row: row['status'] == 'failed')
        for words, said, code in ((['delete', running], running[:8], 0),
                                  (['delete', running[:8]], 'no downloads have an id', 1),
                                  (['retry', 'f' * 30], 'no downloads have an id', 1),
                                  (['delete'], 'by their ID', 1),
                                  (['cancel', failed[:8]], failed[:8], 1)):
            done = daemon.run(*words)
            self.assertEqual((done.returncode, said in done.stdout), (code, True), done.stdout)
        self.assertEqual((daemon.files(), daemon.rows('SELECT 1 FROM downloads WHERE id = ?', running)), ([], []))

    def test_list_knows_the_terminal(self):
        daemon = self.new_daemon(start=False)
        daemon.run('add', *map(tiktok_link, range(230)))
        self.assertEqual(daemon.run('list').stdout.count('\n'), v.SHOWN + 2)
        self.assertEqual(daemon.run('list', '--all').stdout.count('\n'), 231)
        shown = subprocess.check_output(['script', '-qec', 'stty cols 60; ' + shlex.join(daemon.command_line('list')),
                                         '/dev/null'], env={**daemon.env, 'TERM': 'xterm'}, encoding='utf-8')
        rows = [row for row in shown.splitlines() if 'https' in row]
        self.assertEqual({len(re.sub('\33.*?m', '', row)) for row in rows}, {60})
        self.assertIn('\33[33mqueued', shown)
        daemon.change_env({'PYTHONIOENCODING': 'latin-1'})  # which lacks letters
        self.assertIn('\\u2026 and 210 older ones: list --all', daemon.run('list').stdout)

    def test_log_is_empty_at_first_then_shows_its_end_and_goes_on(self):
        daemon = self.new_daemon(start=False)
        done = daemon.run('log')
        self.assertEqual((done.returncode, done.stdout), (0, ''))
        daemon.start()
        with subprocess.Popen(daemon.command_line('log', '-f'), env=daemon.env, stdout=subprocess.PIPE,
                              encoding='utf-8') as shown:
            try:
                self.assertIn('listening on', shown.stdout.readline())
                for _ in range(2):
                    id = daemon.submit(self.site.tiktok())
                    self.assertTrue(any(id in line for line in iter(shown.stdout.readline, '')))
                    file = daemon.folder / 'logs/server.log'
                    file.rename(f'{file}.1')
                    daemon.restart()
            finally:
                shown.kill()

    def test_help_fits_a_screen_and_explains_everything(self):
        screen = subprocess.check_output([sys.executable, str(HERE / 'videoserverd.py'), '--help'], encoding='utf-8')
        self.assertLessEqual(len(screen.splitlines()), 24)
        self.assertLessEqual(max(map(len, screen.splitlines())), 80)
        self.assertEqual(re.findall(r'(?m)^  ([a-z]+) ', screen), [*v.COMMANDS, 'help'])
        for parser in next(action.choices for action in v.make_parser()._actions if action.choices).values():
            self.assertEqual({action.dest for action in parser._actions if not action.help} - {'topic'}, set())
        settings = v.help_text('settings')
        for section, keys in v.SETTINGS.items():
            for key, (default, _, told) in keys.items():
                self.assertIn(f'[{section}] {key} = {default}\n    {told}', settings)

    def test_where_a_service_is_installed_commands_by_hand_are_the_services(self):
        command = new_program(new_folder() / 'videoserverd', 'echo "the service: $*"')
        daemon = self.new_daemon(start=False, hurry={'INSTALLED': str(command), 'AS_SERVICE': str(command)})
        for words in (['phone', '--port', '0'], ['list'], ['setup'], []):
            shown = subprocess.check_output([sys.executable, str(daemon.program), *words], encoding='utf-8')
            self.assertEqual(shown, f'the service: {" ".join(words)}\n')
        self.assertEqual(sorted(os.listdir(daemon.program.parent)), ['__pycache__', 'videoserverd.py'])
        self.assertIn('no database yet', daemon.run('list').stdout)  # --config is another one's

    def test_doctor_names_each_fault_and_what_fixes_it(self):
        daemon = self.new_daemon()
        done = daemon.run('doctor')
        self.assertIn(' ok  server: ' if v.runs_here(v.NEEDS) else 'needs Python', done.stdout)
        self.assertNotIn('Traceback', done.stdout)
        self.assertNotIn('permissions', done.stdout)
        (daemon.database.parent / 'cookies.txt').write_text('')
        open_to_all = [daemon.database, daemon.folder / 'certs/ca.key', daemon.database.parent / 'cookies.txt']
        for file in open_to_all:
            file.chmod(0o644)
        self.assertEqual(re.findall(r'BAD +permissions: .*\n +fix: sudo chmod o= (.*)', daemon.run('doctor').stdout),
                         [str(file) for file in open_to_all])
        self.assertRegex(daemon.run('doctor').stdout, r'BAD +Cookies: \S+ has no cookies for .*\n +fix: log in')
        self.assertIn('has no cookies for', str(daemon.client.get('/api/v1/health').json['problems']))
        daemon.terminate()
        daemon.output.rename(daemon.output.with_name('elsewhere'))
        done = daemon.run('doctor')
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, r'BAD +The output folder .* plugged in.\n +fix: mount it')
        daemon.change_env({'https_proxy': 'http://127.0.0.1:1', 'VIDEOSERVER_DOWNLOADER_PROXY': '',
                           'SSL_CERT_FILE': '/nowhere', 'SSL_CERT_DIR': '/nowhere'})
        done = daemon.run('doctor')
        self.assertIn('BAD  proxy: downloads ignore https_proxy in the environment', done.stdout)
        self.assertIn('BAD  CA certificates are missing: no site can be verified', done.stdout)
        self.assertRegex(done.stdout, r'BAD +server: not running')

    def test_backup_while_running_and_restoring_it(self):
        daemon = self.new_daemon(downloads={'min_free_space': '9000GB'})
        daemon.client.post('/api/v1/downloads', {'text': ' '.join(tiktok_link(number) for number in range(30))})
        copy = daemon.folder / 'copy.db'
        self.assertEqual(daemon.run('backup', str(copy)).returncode, 0)
        self.assertEqual(stat.S_IMODE(copy.stat().st_mode), 0o600)
        daemon.terminate()
        for name in ('', '-wal', '-shm'):
            with contextlib.suppress(OSError):
                Path(f'{daemon.database}{name}').rename(f'{daemon.database}{name}.old')
        shutil.copy(copy, daemon.database)
        daemon.start()
        self.assertEqual(daemon.client.get('/api/v1/history').json['total'], 30)

    def test_daily_copies_beside_the_database(self):
        daemon = self.new_daemon(database={'backups': '2'}, start=False)
        folder = daemon.database.parent / 'backups'
        folder.mkdir(parents=True)
        for day in ('2020-01-01', '2020-01-02', '2020-01-03'):
            (folder / f'downloads-{day}.db').write_text('old')
        daemon.start()
        wait_until(lambda: sorted(file.name for file in folder.iterdir()) == [
            'downloads-2020-01-03.db', f'downloads-{time.strftime("%Y-%m-%d")}.db'], 10)

    def test_setup_only_provisions_with_a_config_named_before_or_after_it(self):
        daemon = self.new_daemon(start=False)
        shutil.rmtree(daemon.folder / 'certs')
        for said, words in (('made', ['--config', daemon.file, 'setup']), ('kept', ['setup', '--config', daemon.file])):
            done = ran([sys.executable, str(daemon.program), *map(str, words)], env=daemon.env)
            self.assertEqual((done.returncode, said in done.stdout), (0, True), done.stdout)
        self.assertEqual(stat.S_IMODE((daemon.folder / 'certs/server.key').stat().st_mode), 0o600)

    def test_doctor_goes_on_where_certificate_or_key_cannot_be_read(self):
        daemon = self.new_daemon()
        (daemon.folder / 'certs/server.crt').write_text('rubbish')
        done = daemon.run('doctor')
        self.assertRegex(done.stdout, r'BAD +The server does not answer .*\n +fix: [^\0]*\d+ to fix\.')
        daemon = self.new_daemon(start=False, server={'key_file': 'k' * 300})
        self.assertRegex(daemon.run('doctor').stdout, r'BAD +certificate: [^\0]*\d+ to fix\.')

    def test_doctor_has_one_command_for_each_kind_of_installation(self):
        config = v.load_config(None, {'VIDEOSERVER_DATABASE_PATH': f'{RUN}/none/d.db', 'VIDEOSERVER_SERVER_PORT': '0'})
        for program, fix in ((v.PROGRAM, f'python3 {v.PROGRAM}'),
                             (Path(v.INSTALLED), 'sudo systemctl start videoserver')):
            with unittest.mock.patch.object(v, 'PROGRAM', program):
                self.assertEqual(next(v.check_server(config))[1], fix)
                with unittest.mock.patch.object(v.sys, 'platform', 'darwin'):
                    cures = ' '.join(cure for check in (v.check_server, v.check_certificate, v.check_downloads)
                                     for _, cure in check(config))
        self.assertIn('sudo launchctl kickstart system/com.videoserver.download', cures)
        self.assertNotRegex(cures, 'systemctl|timedatectl|apt-get|sudo ss ')
        config = v.load_config(None, {'VIDEOSERVER_LOGGING_FILE': ''})
        for platform, tool in (('linux', 'journalctl -u'), ('darwin', 'tail /.*launchd.log')):
            with unittest.mock.patch.object(v.sys, 'platform', platform), self.assertRaisesRegex(v.Trouble, tool):
                v.cmd_log(config, None)

    def test_the_cure_of_each_fault_that_doctor_names_cures_it(self):
        def lose(daemon, *names):
            for name in names:
                (daemon.folder / name).unlink()

        def other_disk(daemon):
            daemon.output.rename(daemon.output.with_name('elsewhere'))

        def other_key(daemon):
            v.make_key(daemon.config.server.key_file, Path('/none'), True)

        def nearly_over(daemon):
            with unittest.mock.patch.object(v, 'BUILT', 0):
                v.ensure_certificate(daemon.config, time.time() - (v.LEAF_DAYS - 5) * v.DAY, force=True)
        faults = {
            'database: .* is missing': lambda daemon: lose(daemon, 'data/downloads.db'),
            'permissions: ': lambda daemon: daemon.database.chmod(0o644),
            'certificate: .*server.crt': lambda daemon: lose(daemon, 'certs/server.crt'),
            'certificate: .*server.key': lambda daemon: lose(daemon, 'certs/server.key'),
            'certificate: does not cover': lambda daemon: daemon.configure(server={'names': 'elsewhere.local'}),
            'is its disk plugged in': other_disk,
            'does not exist': lambda daemon: (shutil.rmtree(daemon.output), Path(f'{daemon.database}.output').unlink()),
            'certificate: .*(?:MISMATCH|mismatch)': other_key,
            'certificate: [^/]*days left': nearly_over,
            'server: not running': lambda daemon: None}
        for fault, make in faults.items():
            with self.subTest(fault):
                daemon = self.new_daemon(start=False, folder=Path(tempfile.mkdtemp(prefix='my folder-', dir=RUN)))
                self.assertEqual(daemon.run('setup').returncode, 0)
                before = files_below(daemon.folder)
                make(daemon)
                shown = daemon.run('doctor').stdout
                cure = re.search(rf'BAD  .*{fault}.*\n +fix: (?:mount it, or start over: )?(.*)', shown)
                self.assertTrue(cure, shown)
                words = cure[1].strip('`').replace('sudo ', '').replace('start the server, which makes it', '')
                if words in ('', shlex.join(('python3', str(daemon.program), '--config', str(daemon.file)))):
                    daemon.start()
                else:
                    done = ran(words, shell=True, env=daemon.env, cwd=daemon.folder)
                    self.assertEqual(done.returncode, 0, (words, done.stdout))
                self.assertNotRegex(daemon.run('doctor').stdout, f'BAD .*{fault}')
                lost = {path for path in before if not path.exists() and daemon.output not in path.parents}
                self.assertEqual({path for path in lost if 'lock' not in path.name}, set())
                daemon.close()

    def test_more_links_than_one_request_takes_are_all_added(self):
        daemon = self.new_daemon(start=False, downloads={'min_free_space': '9000GB'})
        for first in (0, 1000):
            done = daemon.run('add', '\n'.join(map(tiktok_link, range(first, first + 501))))
            self.assertEqual((done.returncode, done.stdout.count('\n')), (0, 501), done.stdout[-500:])
            if not first:
                daemon.start()
        self.assertEqual(len(daemon.rows('SELECT id FROM downloads')), 1002)

    def test_without_a_server_the_owner_adds_any_number_whoever_may_connect(self):
        daemon = self.new_daemon(start=False, security={'allowed_clients': '10.0.0.0/8', 'requests_per_hour': '1'},
                                 env={'VIDEOSERVER_API_KEYS': 'a-long-random-word'})
        done = daemon.run('add', *map(tiktok_link, range(3)))
        self.assertEqual((done.returncode, len(daemon.rows('SELECT id FROM downloads'))), (0, 3), done.stdout)
        self.assertEqual(v.Lock(daemon.database).running(), {})

    def test_phone_has_nothing_to_hand_out_behind_a_proxy(self):
        daemon = self.new_daemon(start=False, **IN_THE_CLEAR)
        done = daemon.run('phone', '--port', '0', seconds=10)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, 'tls is off: .* proxy in front')

    def test_the_server_is_reached_though_its_certificate_is_out_of_date_or_of_old_make(self):
        for days in (-1, 9):
            daemon = self.new_daemon(start=False)
            certs = daemon.folder / 'certs'
            shutil.rmtree(certs)
            certs.mkdir()
            key = v.make_key(certs / 'server.key', Path(), fresh=True)
            nameless = v.OPENSSL_CONFIG.replace('subjectAltName = @listed', '')
            with unittest.mock.patch.object(v, 'OPENSSL_CONFIG', nameless):
                v.sign_certificate(certs / 'server.crt', key, 'pi', (), time.time() - 9 * v.DAY,
                                   time.time() + days * v.DAY, '-selfsign', '-keyfile', key)
            daemon.launch()
            wait_until(daemon.listens, 20)
            done = daemon.run('add', tiktok_link(1))
            self.assertEqual(done.returncode, 0, done.stdout)


class TestSignals(DaemonTest):
    """SIGTERM stops, SIGHUP starts anew in place."""
    settings = None

    def test_a_restart_in_place_loses_no_line_of_the_log(self):
        daemon = self.new_daemon(hurry={'LOG_NAP': 3.0})
        os.kill(daemon.pid, signal.SIGHUP)
        wait_until(lambda: daemon.log().count('listening on') == 2, 30)
        self.assertIn('stopping to restart in place', daemon.log())

    def test_it_starts_with_stdin_stdout_and_stderr_closed(self):
        daemon = self.new_daemon(start=False)
        daemon.prefix = ['sh', '-c', 'exec "$@" <&- >&- 2>&-', 'sh']
        daemon.launch(from_source=True)
        wait_until(daemon.listens, 20)

    @unittest.skipUnless(Path('/proc/self/environ').exists(), 'only Linux tells')
    def test_started_from_source_it_goes_on_as_the_tests_start_it(self):
        def life(daemon: Daemon, from_source: bool) -> List[Any]:
            daemon.launch(from_source)
            wait_until(daemon.listens, 20, daemon.tail)
            words, environment = (Path(f'/proc/{daemon.pid}/{name}').read_bytes().split(b'\0')
                                  for name in ('cmdline', 'environ'))
            daemon.kill()
            return [words, sorted(environment)]
        daemon = self.new_daemon(start=False)
        daemon.change_env({'PWD': str(daemon.folder)})  # as a shell has it
        whole, short = life(daemon, True), life(daemon, False)
        self.assertEqual(whole[0][:-1], [os.fsencode(word) for word in daemon.line_behind()])
        self.assertEqual(whole, short)

    def test_sighup_takes_up_a_new_configuration_and_port_in_the_same_process(self):
        daemon = self.new_daemon()
        pid = daemon.pid
        daemon.configure(security={'requests_per_hour': '1'})
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: daemon.log().count('listening on') == 2, 10)
        self.assertTrue(daemon.running())
        self.assertEqual(json.loads(Path(f'{daemon.database}.lock').read_text())['pid'], pid)
        answers = [daemon.client.post('/api/v1/download', {'url': tiktok_link(number)}) for number in (1, 2)]
        self.assertEqual([answer.status for answer in answers], [202, 429])

    def test_with_a_wrong_new_configuration_the_old_one_runs_on_and_nothing_is_in_the_way_of_the_next_restart(self):
        daemon = self.new_daemon()
        daemon.configure(downloads={'max_retries': 'many'})
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: 'restart refused' in daemon.log(), 10)
        daemon.download(self.site.tiktok())
        daemon.configure(downloads={'max_retries': '3'})
        fine = (daemon.folder / 'certs/server.crt').read_bytes()
        place = reserved()
        self.addCleanup(place.close)
        port = place.getsockname()[1]
        daemon.configure(server={'port': str(port)})
        (daemon.folder / 'certs/server.crt').write_text('rubbish')
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: daemon.log().count('restart refused') == 2, 10)
        (daemon.folder / 'certs/server.crt').write_bytes(fine)
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: f'listening on 127.0.0.1 port {port}' in daemon.log(), 10)
        self.assertNotIn('Traceback', daemon.log())

    def test_a_server_that_does_not_answer_us_holds_up_neither_restart_nor_stop_and_costs_no_try(self):
        silent = socket.create_server(('127.0.0.1', 0))
        silent.settimeout(60)
        self.addCleanup(silent.close)
        daemon = self.new_daemon(env={'VIDEOSERVER_NOTIFY_URL': f'http://127.0.0.1:{silent.getsockname()[1]}/'})
        daemon.fails(str(self.site.tiktok(state='private')))

        def under_way():
            link, _ = silent.accept()  # held open, unanswered
            self.addCleanup(link.close)
            self.assertTrue(link.recv(1))
        under_way()
        began = time.monotonic()
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: daemon.log().count('listening on') == 2, 10)
        self.assertLess(time.monotonic() - began, fair(4))
        under_way()
        self.assertLess(daemon.terminate(), fair(4))
        self.assertEqual(daemon.rows('SELECT attempts FROM outbox ORDER BY id')[0]['attempts'], 0)

    def test_a_program_with_holes_is_not_taken_up(self):
        daemon = self.new_daemon(hurry={'VERSION': '1.0.0'})  # a copy of its own
        text = daemon.program.read_bytes()
        self.addCleanup(daemon.program.write_bytes, text)
        daemon.program.write_bytes(text[:5000] + bytes(4096) + text[9096:])  # as a power cut leaves it
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: 'restart refused' in daemon.log(), 10)
        self.assertEqual(daemon.client.get('/api/v1/health').status, 200)

    def test_a_signal_that_was_ignored_at_the_start_counts(self):
        daemon = self.new_daemon(start=False)
        daemon.prefix = ['sh', '-c', 'trap "" HUP INT TERM; exec "$@"', 'sh']  # nohup, and more
        daemon.start()
        for life in (2, 3):
            daemon.signal(signal.SIGHUP)
            wait_until(lambda life=life: daemon.log().count('listening on') == life, 20)
        daemon.signal(signal.SIGTERM)
        self.assertEqual(daemon.wait_exit(), 0)

    def test_at_a_terminal_relocate_restarts_it_and_sighup_ends_it(self):
        daemon = self.new_daemon(start=False)
        daemon.prefix = [sys.executable, '-c', 'import os, pty, sys\nmaster, terminal = pty.openpty()\n'
                         'os.set_inheritable(master, True)\nos.dup2(terminal, 0)\nos.execv(sys.argv[1], sys.argv[1:])']
        daemon.start()
        self.assertEqual(daemon.run('relocate', str(daemon.folder / 'new')).returncode, 0)
        wait_until(lambda: daemon.log().count('listening on') == 2, 20)
        self.assertTrue(daemon.running())
        daemon.signal(signal.SIGHUP)
        self.assertEqual(daemon.wait_exit(), 0)
        self.assertEqual(daemon.log().count('stopping to restart'), 1)

    def test_log_rotates_by_size(self):
        daemon = self.new_daemon(logging={'max_size': '4k', 'backup_count': '2'})

        def rotated() -> bool:
            for _ in range(50):
                daemon.poller.get(f'/api/v1/status/{uuid.uuid4()}')
            full = set(os.listdir(daemon.folder / 'logs')) - {'server.log'}  # which the next line may have to make
            return full == {'server.log.1', 'server.log.2'}
        wait_until(rotated)


# ---------- accidents ---------------------------------------------------------------------
# What happens between two lines: a commit that is told to have failed and has not, a cancel that comes as
# the attempt ends, a signal between two lives, half an emoji from a site.

class TestAccidents(SchedulerTest):
    """Whatever goes wrong, a link is stored and gets its turn."""

    def test_half_an_emoji_in_a_title_is_stored(self):
        outcome = v.Outcome('done', title='a\n\ud83d', files=(v.MediaFile('a.mp4', 1, 'video/mp4'),))
        self.assertTrue(self.store.end('finish', self.store.claim(self.download_id, 2), outcome, 3, Path('/tmp')))
        self.assertEqual(self.store.get(self.download_id)['title'], 'a \ufffd')

    def test_search_finds_captions_and_authors_and_takes_no_sign_for_another(self):
        outcome = v.Outcome('done', title='a', files=(v.MediaFile('a.mp4', 1, 'video/mp4'),),
                            post={'uploader': 'Zoë_k', 'description': 'a\nTen 50% \\ hills'})
        self.store.end('finish', self.store.claim(self.download_id, 2), outcome, 3, Path('/tmp'))
        for indexed in (self.store.searches, False):
            self.store.searches = indexed
            for q, found in (('zoë_', 1), ('HILLS', 1), ('50%', 1), ('% \\', 1), ('o_k', 0), ('Te%s', 0), ('"', 0),
                             ('"Ten', 0), ('NEAR(a b)', 0), ('video/1', 1), ('k', 1)):
                self.assertEqual(self.store.page(9, q=q)[0], found, (indexed, q))

    def searched(self, q: str) -> int:
        self.assertTrue(self.store.searches)
        return self.store.page(9, q=q)[0]

    def test_the_index_follows_every_change_and_takes_in_what_was_there_before(self):
        self.assertEqual(self.searched('video/1'), 1, 'while it waits')
        self.store.claim(self.download_id, 2)
        self.store.move('give_up', self.download_id, 3, error_message='x')
        self.assertEqual(self.searched('video/1'), 1)
        self.store.write(lambda db: [db.execute(f'DROP TRIGGER {name}') for name in (
            'search_new', 'search_in')])  # as a version leaves it that indexed in pieces
        self.store.move('retry', self.download_id, 4)
        file = v.MediaFile('a.mp4', 1, 'video/mp4')
        self.store.end('finish', self.store.claim(self.download_id, 5),
                       v.Outcome('done', title='Larks', files=(file,)), 6, Path('/tmp'))
        self.store.close()
        self.store = open_store(self, self.config.database.path)
        self.assertEqual(self.searched('lark'), 1)
        self.store.write(lambda db: db.execute(
            'INSERT INTO downloads (id, url, client_id, status, created_at, last_updated) '
            "VALUES ('x', 'https://wren', '', 'failed', 1, 1)"))
        self.assertEqual(self.searched('wren'), 1, 'whoever wrote it')
        self.store.write(lambda db: db.execute("INSERT INTO search (search) VALUES ('integrity-check')"))
        self.assertEqual(self.store.forget('x'), ())
        self.store.forget(self.download_id)
        self.assertEqual((self.searched('lark'), self.searched('wren')), (0, 0))
        self.assertEqual(self.store.read('SELECT count(*) FROM search')[0][0], 0)

    def test_an_sqlite_without_fts5_stores_and_searches_all_the_same(self):
        self.store.close()
        with contextlib.closing(sqlite3.connect(str(self.config.database.path))) as db, db:
            db.execute('PRAGMA writable_schema = ON')
            db.execute("UPDATE sqlite_master SET sql = replace(sql, 'fts5', 'nofts') WHERE name = 'search'")
        self.store = open_store(self, self.config.database.path)
        self.assertFalse(self.store.searches)
        self.store.claim(self.download_id, 2)
        self.store.move('give_up', self.download_id, 3, error_message='x')
        self.assertEqual(self.store.page(9, q='video/1')[0], 1)

    def test_what_cannot_lock_or_sync_is_not_called_damaged(self):
        for said, word in (('disk I/O error', 'local disk'), ('database is locked', 'local disk'),
                           ('database disk image is malformed', 'damaged')):
            store = v.Store(new_folder() / 'new.db')
            store._writer = unittest.mock.Mock()
            store._writer.execute.side_effect = sqlite3.OperationalError(said)
            with unittest.mock.patch.object(store, '_connect_writer'), self.assertRaisesRegex(v.Trouble, word):
                store.open()

    def test_a_row_that_cannot_be_read_is_not_claimed(self):
        self.store.write(lambda db: db.execute('UPDATE downloads SET options = ?', ('[',)))
        with self.assertRaises(ValueError):
            self.store.claim(self.download_id, 2)
        self.assertEqual(self.store.read('SELECT status FROM downloads')[0]['status'], 'queued')

    def test_one_at_a_time_however_often_it_is_pushed(self):
        link = parsed({'url': 'https://www.tiktok.com/@a/video/2'}, self.config.security)
        ids = [self.download_id, self.store.add_many([link], 2)[0].id]
        started: List[str] = []
        self.scheduler._spawn = lambda name, target: started.append(name)
        for workers in (1, 2, 3):
            self.scheduler.config.downloads.max_concurrent = workers
            self.scheduler.push(self.download_id)
            self.scheduler.step(5, 5)
            self.assertEqual(started, [f'worker-{id[:8]}' for id in ids[:workers]])

    def test_those_that_were_stored_first_start_first_and_a_retry_when_it_is_due(self):
        job = self.store.claim(self.download_id, 2)
        self.store.end('retry_later', job, v.Outcome('retry'), 3, Path(), 50)
        links = [parsed({'url': f'https://www.tiktok.com/@a/video/{n}'}, self.config.security)
                 for n in (2, 3)]
        ids = [self.store.add_many([link], 4)[0].id for link in links]
        self.assertEqual([(row['id'], row['due'], row['alone']) for row in self.store.waiting()],
                         [(ids[0], 0, False), (ids[1], 0, False), (self.download_id, 50, False)])

    def test_a_retry_is_awaited_to_the_second_and_other_news_at_once(self):
        self.scheduler.config.downloads.max_concurrent = 2
        self.scheduler._import_due = v.math.inf
        job = self.store.claim(self.download_id, 2)
        self.store.end('retry_later', job, v.Outcome('retry'), 3, Path(), 8)
        self.scheduler.step(5, 5)
        self.assertEqual((self.scheduler._nap(5), self.scheduler._nap(9)), (3, 0))
        self.assertFalse(self.scheduler._news)
        self.scheduler.push('x')
        self.assertTrue(self.scheduler._news)

    def test_what_comes_in_a_pause_starts_after_it(self):
        started: List[str] = []
        self.scheduler._employ = lambda id, alone: started.append(id)
        self.scheduler.preflight = unittest.mock.Mock(side_effect=['The disk is full.', None])
        for monotonic, ids in ((5, []), (6, [self.download_id])):
            self.scheduler.step(monotonic, monotonic)
            self.assertEqual(started, ids)
            self.scheduler.push(self.download_id)

    def test_what_is_due_later_starts_in_its_turn_and_imports_behind_it(self):
        started: List[str] = []
        self.scheduler.config.downloads.max_concurrent = 9
        self.scheduler._employ = lambda id, alone: started.append(id)
        def row(due, id):
            return {'due': due, 'id': id, 'alone': False, 'paced': id.isupper()}
        with unittest.mock.patch.multiple(
                self.store, waiting=lambda: [row(0, 'a'), row(9, 'd'), row(7, 'b'), row(7, 'c')],
                next_of_imports=lambda now: [row(now, 'I')]):
            for now, ids in ((5, 'aI'), (6, 'a'), (7, 'abc'), (20, 'abcd'), (44, 'abcdI')):
                self.scheduler.step(now, now)
                self.assertEqual(''.join(started), ids)
                started.clear()

    def test_what_ran_when_yt_dlp_froze_runs_alone(self):
        self.scheduler.config.downloads.max_concurrent = 3
        links = [parsed({'url': f'https://www.tiktok.com/@a/video/{n}'}, self.config.security)
                 for n in (2, 3, 4)]
        ids = [self.download_id, *(stored.id for stored in self.store.add_many(links, 2))]
        for id in ids[1:3]:
            self.store.claim(id, 3)
        self.assertEqual(self.store.recover(4, frozen=True), [])
        started: List[str] = []
        self.scheduler._spawn = lambda name, target: started.append(name)
        self.scheduler.ready = True
        for id in ids:
            self.scheduler.step(5, 5)
            self.assertEqual(started, [f'worker-{id[:8]}'])
            started.clear()
            self.scheduler._running.clear()
            self.store.move('cancel', id, 6)

    def test_a_clock_that_was_ahead_holds_up_nothing_for_longer_than_the_longest_delay(self):
        job = self.store.claim(self.download_id, 2)
        self.store.end('retry_later', job, v.Outcome('retry'), 3, Path(), 1 << 40)
        due = lambda: self.store.get(self.download_id)['next_attempt_at']  # noqa: E731
        self.scheduler.paused, self.scheduler.preflight = 'x', lambda: 'x'
        self.scheduler.step(5, 5)
        self.assertEqual(due(), 905)
        for now, monotonic, longest in ((9000, 10, 905), (9010, 20, 905), (400, 30, 905), (4, 40, 904)):
            self.scheduler.step(now, monotonic)
            self.assertEqual(due(), longest)

    def test_one_whose_row_cannot_be_read_fails_and_does_not_hold_up_others(self):
        self.store.write(lambda db: db.execute('UPDATE downloads SET options = ?', ('[',)))
        self.scheduler._running[self.download_id] = run = v.Run()
        with self.assertLogs(v.log, 'ERROR'):
            self.scheduler._work(self.download_id, run)
        self.assertFalse(self.is_waiting())
        row = self.store.get(self.download_id)
        self.assertEqual((row['status'], row['reason'], row['error_message']),
                         ('failed', 'internal', v.INTERNAL.message))

    def test_a_cancel_before_its_attempt_is_made_stops_it(self):
        stops: List[str] = []
        self.scheduler.new_attempt = lambda *_: SimpleNamespace(stop=stops.append, run=lambda: v.CANCELLED)
        self.scheduler._running[self.download_id] = run = v.Run()
        self.scheduler._halt([self.download_id], 'cancelled')
        self.scheduler._attempt(self.download_id, run)
        self.assertEqual(stops, ['cancelled'])

    def test_what_is_said_of_one_that_failed(self):
        job = self.store.claim(self.download_id, 2)
        login = v.Outcome('retry', 'login', 'Log in.', tries=2)
        for outcome, attempt, said in ((login, 1, 'Log in.'), (login, 2, 'Log in. Tried 2 times.'),
                                       (login._replace(tries=1), 1, 'Log in.'),
                                       (v.Outcome('give_up', 'gone', 'Gone.'), 2, 'Gone.')):
            self.scheduler._store_outcome(job._replace(attempt=attempt), outcome, 3)
            self.assertEqual(self.store.get(self.download_id)['error_message'], said)
            self.store.move('retry', self.download_id, 4)
            self.store.claim(self.download_id, 5)

    def test_a_full_disk_told_by_an_attempt_pauses_the_queue(self):
        job = self.store.claim(self.download_id, 2)
        self.scheduler._store_outcome(job, v.Outcome('pause', 'disk', 'The disk is full.'), 3)
        for later, paused in ((0, 'The disk is full.'), (v.PAUSE_SECONDS + 1, None)):
            self.scheduler._refresh_pause(time.monotonic() + later)
            self.assertEqual(self.scheduler.paused, paused)

    def test_the_figures_of_a_full_disk_are_no_news(self):
        news = []
        for message in ('The disk is full: 3 MB free.', 'The disk is full: 2 MB free.', 'The folder is gone: x.', None):
            before, self.scheduler.preflight = self.scheduler.board.version, lambda message=message: message
            self.scheduler._refresh_pause(time.monotonic())
            self.assertEqual(self.scheduler.paused, message)
            news.append(self.scheduler.board.version - before)
        self.assertEqual(news, [1, 0, 1, 1])

    def test_an_attempt_that_does_not_stop_is_settled_and_ends_the_process(self):
        hangs: List[int] = []
        self.scheduler.on_hang = lambda: hangs.append(1)
        self.scheduler._running[self.download_id] = run = v.Run()
        run.job = self.store.claim(self.download_id, 2)
        run.attempt = SimpleNamespace(check=lambda now: None, reach=SimpleNamespace(stopped_at=100.0))
        for now, count in ((110.0, 0), (101.0 + v.HANG_SECONDS, 1), (200.0, 1)):
            self.scheduler._watch(now)
            self.assertEqual(len(hangs), count)
        self.assertEqual(self.store.get(self.download_id)['reason'], 'timeout')
        done = v.Outcome('done', files=(v.MediaFile('a.mp4', 1, 'video/mp4'),))
        over = self.scheduler._store_outcome(run.job, done, 3)
        self.assertEqual((over, self.store.get(self.download_id)['status']), (False, 'queued'), 'its note has to stay')

    def test_a_claim_that_was_stored_though_told_to_have_failed_is_taken_back(self):
        self.store.claim(self.download_id, 2)
        self.assertTrue(self.is_waiting())
        self.scheduler._attempt(self.download_id, v.Run())
        self.assertEqual(self.store.get(self.download_id)['status'], 'queued')
        self.assertTrue(self.is_waiting())
        self.store.write(lambda db: db.execute("UPDATE downloads SET import_id = 'i', status = 'downloading'"))
        self.assertTrue(self.is_waiting())

    def test_one_that_is_not_due_after_all_keeps_its_place(self):
        job = self.store.claim(self.download_id, 2)
        self.store.end('retry_later', job, v.Outcome('retry'), 3, Path(), 1 << 40)
        self.scheduler._attempt(self.download_id, v.Run())
        self.assertTrue(self.is_waiting())

    def test_a_retry_that_was_stored_before_waits_all_the_same(self):
        job = self.store.claim(self.download_id, 2)
        self.store.end('retry_later', job, v.Outcome('retry'), 3, Path(), 99)
        self.scheduler._store_outcome(job, v.Outcome('retry', 'network', 'x'), 4)
        self.assertTrue(self.is_waiting())

    def test_a_cancel_as_the_attempt_ends_holds(self):
        job = self.store.claim(self.download_id, 2)
        self.scheduler._running[self.download_id] = run = v.Run()

        def end(reason):
            self.scheduler._store_outcome(job, v.Outcome('retry', 'network', 'x'), 4)
            self.scheduler._running.clear()
        run.attempt = type('Attempt', (), {'stop': staticmethod(end)})
        self.assertTrue(self.scheduler.cancel(self.download_id))
        self.assertEqual(self.store.get(self.download_id)['error_message'], 'Cancelled')

    def test_a_cancel_just_after_the_attempt_ended_holds(self):
        job = self.store.claim(self.download_id, 2)
        move = self.store.move

        def ends_first(verb, download_id, now):
            self.store.move = move
            refused = move(verb, download_id, now)  # it is downloading
            self.scheduler._store_outcome(job, v.Outcome('retry', 'network', 'x'), 4)
            return refused
        self.store.move = ends_first
        self.assertTrue(self.scheduler.cancel(self.download_id))
        self.assertEqual(self.store.get(self.download_id)['error_message'], 'Cancelled')
        self.assertFalse(self.scheduler.cancel(self.download_id))

    def test_a_lock_kept_for_another_database_is_not_taken_for_this_one(self):
        first = v.Lock(self.config.database.path)
        first.take()
        second = v.Lock(self.config.database.path.with_name('e.db'), first.fd)
        second.take()
        self.addCleanup(second.release)
        self.assertTrue(v.Lock(second.path.with_name('e.db')).running())
        self.assertFalse(v.Lock(self.config.database.path).running())

    def test_a_command_that_looks_for_a_server_does_not_keep_one_from_starting(self):
        path, done = self.config.database.path.with_name('f.db'), threading.Event()
        Path(f'{path}.lock').touch()

        def look():
            while not done.is_set():
                v.Lock(path).running()
        with ThreadPoolExecutor(2) as pool:
            self.addCleanup(done.set)
            looking = [pool.submit(look) for _ in range(2)]
            try:
                for _ in range(50):
                    lock = v.Lock(path)
                    lock.take()
                    lock.release()
            finally:
                done.set()
        self.assertEqual([look.result() for look in looking], [None] * 2)


class TestLeftovers(CareTest):
    """What nobody waits for any more goes; nothing else does."""

    def test_only_folders_of_downloads_are_removed(self):
        elsewhere = self.output.parent / 'elsewhere'
        (elsewhere / 'certs').mkdir(parents=True)
        (elsewhere / v.new_id()).mkdir()
        self.assertIsNone(v.usable_output(self.config))
        (self.output / '.incomplete').rmdir()
        (self.output / '.incomplete').symlink_to(elsewhere)
        self.daemon.care.remove_leftovers(time.time())
        self.assertEqual(len(os.listdir(elsewhere)), 2, "another server's download, perhaps")
        self.daemon.care.remove_leftovers(time.time() + 2 * v.DAY)
        self.assertEqual(os.listdir(elsewhere), ['certs'])

    def test_an_unplugged_disk_is_one_problem_in_words_and_known_in_any_locale(self):
        self.assertIsNone(v.usable_output(self.config))
        shutil.rmtree(self.output)
        self.daemon.care.remove_leftovers(time.time())
        left = self.output / '.incomplete' / v.new_id()
        left.mkdir(parents=True)
        (self.output / v.MARKER).touch()
        self.daemon.care.remove_leftovers(time.time() + 2 * v.DAY)
        self.assertFalse(left.exists(), 'it is plugged in again')
        shutil.rmtree(self.output)
        read = Path.read_text

        def latin(file, encoding='latin-1'):  # as Python reads where the locale is de_DE.ISO-8859-1
            return read(file, encoding)
        with unittest.mock.patch.object(v.Path, 'read_text', latin):
            self.assertRegex(v.usable_output(self.config), 'is its disk plugged in')

    def test_copies_of_a_clock_that_was_ahead_do_not_push_out_todays(self):
        now = time.time()
        for moment in (now + 400 * v.DAY, now + 401 * v.DAY, now):
            self.daemon.care.copy_database(moment)
        names = sorted(os.listdir(self.config.database.path.parent / 'backups'))
        self.assertEqual(names, [f'd-{time.strftime("%Y-%m-%d", time.localtime(moment))}.db'
                                 for moment in (now, now + 401 * v.DAY)])


class TestSignalsBetweenTwoLives(DaemonTest):
    """The running daemon re-executes itself, its listening socket kept open; a signal while that is under way."""
    settings = None

    def test_posts_through_re_executions_see_no_refused_connection_and_lose_no_link(self) -> None:
        daemon = self.new_daemon(downloads={'min_free_space': '9000GB'})  # paused: only links are taken
        pid, wanted = daemon.pid, 4
        ids: List[str] = []
        failed: List[str] = []

        def post() -> None:
            client, url = daemon.new_client(timeout=30), 'https://www.tiktok.com/@a/video/'
            while not failed and (len(ids) < 120 or starts(daemon) < wanted):
                try:
                    answer = client.post('/api/v1/download', {'url': f'{url}{uuid.uuid4().int}'})
                    assert answer.status == 202, answer
                    ids.append(answer.json['download_id'])
                except Exception as error:
                    failed.append(f'after {len(ids)} posts, in life {starts(daemon)}: {error!r}')
        threads = [threading.Thread(target=post) for _ in range(3)]
        for thread in threads:
            thread.start()
        for life in range(1, wanted):
            before = len(ids)
            wait_until(lambda before=before: failed or len(ids) >= before + 20, 30)
            daemon.signal(signal.SIGHUP)
            wait_until(lambda life=life: failed or starts(daemon) > life, 30)
        for thread in threads:
            thread.join(60)
        self.assertEqual(failed, [])
        self.assertEqual((daemon.pid, daemon.running()), (pid, True))
        self.assertEqual({row['id'] for row in daemon.rows()}, set(ids))
        self.assertGreaterEqual(len(ids), 120)
    def test_a_sigterm_just_before_the_next_life_stops_that(self):
        daemon = self.new_daemon(hurry={'DRAIN_SECONDS': 5.0})
        text = daemon.program.read_text(encoding='utf-8')
        begin = '        os.execv(sys.executable'
        self.assertEqual(text.count(begin), 1)
        daemon.program.write_text(text.replace(begin, f'        os.kill(os.getpid(), signal.SIGTERM)\n{begin}'),
                                  encoding='utf-8')
        daemon.signal(signal.SIGHUP)  # takes up that program
        wait_until(lambda: daemon.log().count('listening on') == 2, 20)
        daemon.signal(signal.SIGHUP)
        self.assertEqual(daemon.process.wait(fair(15)), 0)

    def test_sighups_one_after_the_other_never_end_it(self):
        daemon = self.new_daemon()
        for _ in range(12):
            daemon.signal(signal.SIGHUP)
            time.sleep(0.1)
        wait_until(lambda: daemon.log().count('listening on') >= 2, 20)
        self.assertTrue(daemon.running())
        self.assertEqual(stat.S_IMODE((daemon.folder / 'logs/server.log').stat().st_mode), 0o600)


# ---------- download ----------------------------------------------------------------------
# Real yt-dlp in this very process against the stand-in; what has to die, grow or start afresh
# runs in a process of its own (DownloadTest.driver).

class TestPosts(DownloadTest):
    """Links to posts become files."""

    def test_a_tiktok_becomes_a_whole_playable_file_under_its_final_name(self):
        post = self.site.tiktok(title='Ein Häschen / 🐇', size=300_000)
        with unittest.mock.patch('os.fsync', side_effect=os.fsync) as sync, self.assertLogs(v.log, 'INFO') as logs:
            outcome = self.fetch(post, 'an-id')
        names = self.assert_done(outcome, post.media[0])
        self.assertEqual(names, [v.file_name('Ein Häschen / 🐇', post.id, 'mp4')])
        self.assertEqual(outcome.files[0][1:], (300_000, 'video/mp4'))
        self.assertEqual(outcome.title, 'Ein Häschen / 🐇')
        self.assertLessEqual(sync.call_count, 2)
        self.assertEqual(os.stat(self.output / names[0]).st_mode & 0o444, 0o444)
        self.assertIn('download an-id: yt-dlp return code 0', '\n'.join(logs.output))
        v.forget_files(self.config(), 'an-id', ())
        self.assertEqual(os.listdir(self.output / '.incomplete'), [])

    def test_photo_posts_give_their_pictures_in_full_size_and_tiktok_the_sound(self):
        post = self.site.tiktok(pictures=3, title='Three\nof them')
        for url in (post, post.replace('/photo/', '/video/'), self.site.short(post)):
            outcome = self.fetch(url)
            names = self.assert_done(outcome, *post.media)
            if url == post:
                self.assertEqual(names, self.names(post, 'jpg', 'jpg', 'jpg', 'm4a', title='Three'))
            self.assertEqual((outcome.title, outcome.note, outcome.files[0].type), ('Three', '', 'image/jpeg'))
        for items in (('photo', 'photo'), ('photo',)):
            post = self.site.instagram(*items)
            names = self.assert_done(self.fetch(post), *post.media)
            self.assertEqual(names, self.names(post, *['jpg'] * 2) if items[1:] else [f'A caption_{post.id}.jpg'])
        sound = self.fetch(self.site.tiktok(pictures=2), options=['-f', 'ba'])
        self.assertEqual([file.type for file in sound.files], ['audio/mp4'], sound)

    def test_music_alone_is_no_post(self):
        outcome = self.fetch(self.site.tiktok(state='sound'))
        self.assert_ends(outcome, 'give_up', 'unsupported')
        self.assertIn('photo post', outcome.message)
        self.assertEqual(self.finished(), {})
        self.assertEqual(self.fetch(self.site.tiktok(state='sound'), options=['-f', 'ba']).kind, 'done')

    def test_what_is_no_picture_or_only_half_of_one_is_missing(self):
        whole = {'png': b'\x89PNG\r\n\x1a\n data IEND\xaeB`\x82', 'jpg': picture(1), 'gif': b'GIF89a data;',
                 'webp': b'RIFF' + struct.pack('<I', 12) + b'WEBPVP8 data',
                 'heic': struct.pack('>I', 16) + b'ftypheic' + b'mif1' + struct.pack('>I', 12) + b'mdatdata'}
        file = self.folder / 'x'
        for ext, body in whole.items():
            for cut in (body, body[:-3]):
                file.write_bytes(cut)
                self.assertEqual((v.media_extension(file), v.is_picture(file)), (ext, cut == body))
        for body in (HTML, picture(1)[:-3], b'', movie(2000)):
            post = self.site.tiktok(pictures=2)
            post.media[1].set(body=body)
            outcome = self.fetch(post, options=['-R', '0'])
            self.assertEqual((outcome.kind, len(outcome.files)), ('retry', 2), outcome)
            self.assertRegex(outcome.note, '^2 of 3: picture 2 is missing. The ')

    def test_of_a_carousel_with_one_bad_item_the_others_come_at_once_and_only_that_one_again(self):
        troubles = ({'status': 404}, {'status': 500}, {'body': HTML}, {'body': b''})
        for trouble in troubles:
            with self.subTest(trouble=trouble):
                post = self.site.instagram('video', 'photo', 'video')
                fine = dict(vars(post.media[2]))
                post.media[2].set(**trouble)
                first = self.fetch(post, post.id, ['-R', '0'])
                self.assertEqual((first.kind, [file.name for file in first.files]),
                                 ('retry', self.names(post, 'mp4', 'jpg')), first)
                self.assertRegex(first.note, '^2 of 3: video 3 is missing. The (site|connection) .*[.]$')
                post.page.set(fail=[404] * 9)
                later = self.fetch(post, post.id)
                self.assertEqual((later.kind, later.files), ('done', first.files), later)
                self.assertRegex(later.note, '^2 of 3: video 3 is missing. This post is ')
                post.page.set(fail=[])
                post.media[2].set(status=200, body=fine['body'])
                names = self.assert_done(self.fetch(post, post.id, ['-R', '0']), *post.media)
                self.assertEqual((names, post.media[0].hits), (self.names(post, 'mp4', 'jpg', 'mp4'), 1))

    def test_an_item_without_formats_is_named_and_one_that_comes_twice_comes_twice(self):
        post = self.site.instagram('video', 'photo', 'video')
        items = self.site.instagram_posts[post.id]['product']['carousel_media']
        del items[2]['video_versions']
        outcome = self.fetch(post)
        self.assertEqual((outcome.kind, outcome.files[1:]), ('done', outcome.files[1:2]), outcome)
        self.assertRegex(outcome.note, '^2 of 3: video 3 is missing. This link has no video ')
        items[2] = items[0]
        self.assert_done(self.fetch(post), post.media[0], post.media[1], post.media[0])

    def test_what_was_delivered_is_replaced_only_by_a_whole_set(self):
        post = self.site.instagram('video', 'video')
        post.media[1].set(status=500)
        first = self.fetch(post, 'c', ['-R', '0'])
        v.forget_files(self.config(), 'c', ())  # as after a cancel
        attempt = self.attempt(post, 'c', ['-R', '0'])
        attempt.job = attempt.job._replace(files=first.files)
        post.media[1].set(status=200)
        self.assert_done(attempt.run(), *post.media)
        self.assertEqual(len(self.finished()), 2)

    def test_every_form_of_link_leads_to_the_post(self):
        post, reel, photos = self.site.tiktok(), self.site.instagram(), self.site.tiktok(pictures=2)
        self.site.add('lite.tiktok.com', '/t/ZSlite', redirect=str(post))
        tiktok = [*(self.site.short(post, form) for form in ('vm', 'vt', 't', 'm')), post.replace('www.', ''),
                  'https://lite.tiktok.com/t/ZSlite/', f'https://www.tiktok.com/embed/v2/{post.id}',
                  f'https://www.tiktokv.com/share/video/{post.id}/', f'https://m.tiktok.com/v/{post.id}.html']
        instagram = [*(self.site.share(reel, form) for form in ('', 'reel/', 'p/')), reel + '?igsh=abc',
                     *(reel.replace('/reel/', f'/{form}/') for form in ('p', 'reels', 'tv', 'tester/p', 'tester/reel')),
                     'https://l.instagram.com/?u=' + quote(reel, safe='') + '&e=AT0']
        for of, forms in ((post, tiktok), (reel, instagram), (photos, (photos, photos.replace('photo', 'video')))):
            for url in forms:
                with self.subTest(url=url):
                    self.assert_done(self.fetch(url), *of.media)

    def test_what_is_no_post_says_what_to_share_instead(self):
        for host, paths in {
                'www.tiktok.com': ('/@anna', '/music/song-1', '/tag/cats', '/@anna/live'),
                'www.instagram.com': ('/anna/', '/anna/reels/', '/reels/audio/1/', '/explore/tags/a/', '/anna/live/'),
        }.items():
            for path in paths:
                with self.subTest(host + path):
                    self.site.add(host, path)
                    self.assert_ends(self.fetch(f'https://{host}{path}'), 'give_up', 'no_post')
        anna = self.site.short('https://www.tiktok.com/@anna')
        for config in (None, self.config(security={'allowed_domains': '*'})):
            self.assert_ends(self.fetch(anna, config=config), 'give_up', 'no_post')

    def test_a_link_leads_nowhere_but_to_allowed_domains(self):
        elsewhere = self.site.direct(host='www.example.com')
        for url in (self.site.short(elsewhere), self.site.share(elsewhere)):
            self.assert_ends(self.fetch(url), 'give_up', 'unsupported')
        self.assertEqual(self.finished(), {})
        post = self.site.tiktok()
        config = self.config(security={'allowed_domains': 'instagram.com'})
        self.assert_ends(self.fetch(self.site.share(post), config=config), 'give_up', 'unsupported')
        self.assertEqual(post.media[0].hits, 0)

    def test_the_generic_extractor_only_where_any_site_is_allowed(self):
        post = self.site.direct(host='www.example.com')
        named = self.config(security={'allowed_domains': 'example.com'})
        self.assert_ends(self.fetch(post, config=named), 'give_up', 'unsupported')
        self.assert_done(self.fetch(post, config=self.config(security={'allowed_domains': '*'})), post.media[0])

    def test_a_post_downloaded_twice_never_overwrites_the_first(self):
        post = self.site.tiktok(title='Twice')
        first = self.assert_done(self.fetch(post), post.media[0])
        old = self.finished()
        post.media[0].set(body=movie(120_000, 'other'))
        second = self.assert_done(self.fetch(post), post.media[0])
        self.assertNotEqual(first, second)
        self.assertEqual(self.finished()[first[0]], old[first[0]])

    def test_a_part_that_nobody_asked_for_is_asked_for_once_more(self):
        attempt = self.attempt(self.site.tiktok())
        attempt.folder.current, attempt.folder.parts = 'x', {'x': {'total': 5}}
        answer = SimpleNamespace(status=206, headers={'Content-Range': 'bytes 0-8/9'}, close=lambda: None)
        request = SimpleNamespace(url='https://a.example.com/', method='GET', headers={}, extensions={})
        urlopen = unittest.mock.Mock(return_value=answer)
        self.assertIs(attempt.fetch(urlopen, request), answer)
        self.assertEqual(urlopen.call_count, 2)

    def test_one_browser_name_for_a_whole_download_and_another_for_the_next_try(self):
        families = []
        for number in (1, 2, 3):
            self.number, post = number, self.site.tiktok()
            attempt = self.attempt(post)
            with self.assertLogs(v.log, 'INFO') as logs:
                self.assertEqual(attempt.run().kind, 'done')
            agents = {request.headers['User-Agent'] for request in post.page.requests + post.media[0].requests}
            self.assertEqual(len(agents), 1)
            families.append(re.findall('Chrome|Firefox|Version', agents.pop())[0])
            self.assertIn(f'asks as {list(v.WAYS)[number - 1]}', '\n'.join(logs.output))
        self.assertEqual(families, ['Chrome', 'Firefox', 'Version'])
        chosen = self.attempt(post, options=['--user-agent', 'Me'])
        self.assertEqual((chosen._params()['http_headers'], v.way_of(chosen.job, chosen.config)),
                         ({'User-Agent': 'Me'}, 'own'))

    def test_pages_of_a_site_have_their_pace_and_media_do_not(self):
        pace = v.Pace()
        self.assertEqual([pace.turn(site, 2, 10) for site in ('a', 'a', 'b', 'a')], [0, 2, 0, 4])
        self.assertEqual([pace.turn('a', 2, now) for now in (13, 18, 21)], [3, 0, 0])
        config = self.config(downloader={'page_pace': 'tiktok.com 0.5, instagram.com 0.5'})
        posts = [self.site.tiktok() for _ in range(3)] + [self.site.instagram()]
        real, granted = v.Pace.turn, []  # what arrives may have been held up on its way

        def turn(pace, site, gap, now):
            wait = real(pace, site, gap, now)
            if site == 'tiktok.com':
                granted.append(now + wait)
            return wait
        with unittest.mock.patch.object(v.Pace, 'turn', turn):
            runs = [self.in_background(self.attempt(post, config=config)) for post in posts]
            self.assertEqual([run.wait().kind for run in runs], ['done'] * 4)
        granted.sort()
        self.assertGreater(min(b - a for a, b in zip(granted, granted[1:])), 0.48)
        asked = sorted(request.time for post in posts[:3] for request in post.page.requests)
        self.assertEqual([a >= b for a, b in itertools.zip_longest(asked, granted)], [True] * 3)
        for bad in ('tiktok.com', 'tiktok.com x', '2', 'tiktok.com -1'):
            with self.assertRaises(v.ConfigError):
                self.config(downloader={'page_pace': bad})

    def test_cookies_go_to_their_own_site_only_not_to_its_cdn_and_their_file_is_never_written(self):
        jar = self.folder / 'cookies.txt'
        jar.write_text('# Netscape HTTP Cookie File\n'
                       '#HttpOnly_.instagram.com\tTRUE\t/\tTRUE\t4000000000\tsessionid\tsecret\n'
                       '.tiktok.com\tTRUE\t/\tTRUE\t4000000000\tsid_tt\tother\nbroken line\n')
        jar.chmod(0o400)
        before = jar.read_bytes()
        config = self.config(downloader={'proxy': self.site.proxy, 'cookies_file': str(jar)})
        given = v.Cookies(config).jar('https://www.instagram.com/p/x').read()
        self.assertEqual((given.count('secret'), given.count('other')), (1, 0))
        story = self.site.story()
        self.assert_ends(self.fetch(story), 'retry', 'login', 2)
        seen = len(self.site.requests)
        self.assert_done(self.fetch(story, config=config), story.media[0])
        asked = self.site.requests[seen:]
        carried = ['secret' in request.headers.get('Cookie', '') for request in asked
                   if request.host == 'www.instagram.com']
        self.assertEqual((carried[0], carried[-1]), (False, True))  # anonymous first, then at once
        self.assertIn('cdninstagram.com', {'.'.join(request.host.split('.')[-2:]) for request in asked})
        self.assertEqual(len({request.headers['User-Agent'] for request in asked}), 1)
        self.assert_done(self.fetch(self.site.tiktok(), config=config), self.site.routes[
            'v16-webapp-prime.us.tiktok.com', self.site.asked('us.tiktok.com', '/video')[-1].path.rstrip('/')])
        self.assertEqual(jar.read_bytes(), before)
        for request in self.site.requests:
            cookies = request.headers.get('Cookie', '')
            self.assertFalse('secret' in cookies and not request.host.endswith('.instagram.com'), request)
            self.assertFalse('other' in cookies and not request.host.endswith('.tiktok.com'), request)

    def test_a_login_that_is_no_longer_taken_is_a_reason_of_its_own(self):
        jar, story, reel = self.folder / 'cookies.txt', self.site.story(), self.site.instagram('reel')
        jar.write_text('.instagram.com\tTRUE\t/\tTRUE\t0\tcsrftoken\tsecret\n')  # not what the site asks for
        config = self.config(downloader={'proxy': self.site.proxy, 'cookies_file': str(jar)})
        config.database.path.parent.mkdir()
        self.assert_ends(self.fetch(story, config=config), 'retry', 'session', 2)
        self.assertEqual(list(v.Cookies(config).refused()), ['instagram.com'])
        asked = len(self.site.requests)
        self.assert_ends(self.fetch(story, config=config), 'retry', 'login', 2)  # it rests
        self.assert_done(self.fetch(reel, config=config), reel.media[0])
        self.assertNotIn('secret', str([request.headers.get('Cookie') for request in self.site.requests[asked:]]))


class TestCookies(CookiesTest):
    """cookies.txt as people have it; what is said of it; nothing of its values is ever said."""

    def test_every_usual_form_is_read_and_odd_rows_are_left_out(self):
        wanted = [('csrftoken', 'secret2', 'instagram.com', None), ('mid', 'secret3', 'instagram.com', None),
                  ('sessionid', 'secret', 'instagram.com', 4000000000)]
        for form, data in cookie_files():
            with self.subTest(form):
                self.file.write_bytes(data)
                self.assertEqual(self.loaded(self.cookies), wanted)
                self.assertEqual(self.cookies.report(time.time()),
                                 [(True, '3 cookies for instagram.com, valid until 2 October 2096')])

    def test_what_is_wrong_with_the_file_is_said(self):
        row = '.instagram.com\tTRUE\t/\tTRUE\t{}\t{}\tsecret\n'
        other = row.replace('instagram', 'youtube')
        for text, said in ((None, 'cannot be read .No such file'), ('', 'has no cookies for tiktok.com, inst'),
                           (other.format(0, 'SID'), 'has no cookies for'), ('{"a": 1', 'has no cookies for'),
                           (row.format(99, 'sessionid'), 'expired on . January 1970'),
                           (row.format(4000000000, 'mid'), 'no login .sessionid.')):
            if text is not None:
                self.file.write_text(text)
            (fine, told), = self.cookies.report(time.time())
            self.assertFalse(fine)
            self.assertRegex(told, f'{said}.* Fix: ')
            self.assertNotIn('secret', told)

    def test_a_login_that_is_refused_rests_until_the_file_changes(self):
        self.file.write_text('\n'.join('\t'.join(row) for row in COOKIE_ROWS) + '\n.tiktok.com\tTRUE\t/\tTRUE\t0\t'
                             'sessionid\tsecret')
        self.cookies.judge('https://www.instagram.com/p/x', False)
        again = v.Cookies(self.config)
        self.assertIsNone(again.jar('https://www.instagram.com/p/x'))
        self.assertIsNotNone(again.jar('https://www.tiktok.com/@a/video/1'))
        self.assertRegex(again.report(time.time())[0][1], 'instagram.com no longer accepts the login')
        with unittest.mock.patch.object(v, 'REST_SECONDS', 0):  # an hour later
            self.assertIsNotNone(again.jar('https://www.instagram.com/p/x'))
        again.judge('https://www.instagram.com/p/x', True)
        self.assertEqual(again.refused(), {})
        again.judge('https://www.instagram.com/p/x', False)
        self.file.write_text(self.file.read_text() + '\n')
        self.assertEqual(len(self.loaded(v.Cookies(self.config))), 3)
        self.assertEqual([fine for fine, _ in again.report(time.time())], [True, True])

    def test_the_page_may_keep_them_where_no_file_is_configured(self):
        with self.assertRaises(v.Refused):
            self.cookies.save(b'')
        kept = v.Cookies(own_config())
        self.assertEqual(kept.report(time.time()), [])
        with self.assertRaises(v.Refused):
            kept.save(b'rubbish')
        for _, data in cookie_files():
            kept.save(data)
            self.assertEqual([len(kept.read()['instagram.com']), *kept.read()], [3, 'instagram.com'])
            self.assertEqual(stat.S_IMODE(kept.file.stat().st_mode), 0o600)
        kept.remove()
        self.assertIsNone(kept.jar('https://www.instagram.com/p/x'))


class TestFormats(DownloadTest):
    """The best that an iPhone plays, as mp4."""

    def test_the_best_quality_is_taken_whether_h264_or_hevc_before_a_better_vp9_or_av1(self):
        post = self.site.tiktok(formats=('h264_540p', 'bytevc1_1080p', 'h264_720p'))
        self.assert_done(self.fetch(post), post.media[1])
        post = self.site.tiktok(formats=('h264_540p', 'bytevc1_540p', 'bytevc2_1080p', 'h264_720p'))
        self.assert_done(self.fetch(post), post.media[3])
        for codec in ('vp9', 'av1'):
            post = self.site.instagram(dash=codec)
            self.assert_done(self.fetch(post), post.media[0])

    @unittest.skipUnless(shutil.which('ffmpeg'), 'ffmpeg is not installed')
    def test_a_better_h264_without_sound_is_merged_with_the_sound_and_sound_is_extracted(self):
        post = self.site.instagram(dash='h264', size=300_000)
        outcome = self.fetch(post)
        self.assertEqual((outcome.kind, post.media[0].hits), ('done', 0), outcome)
        self.assertEqual(streams(self.output / outcome.files[0].name), ['aac', 'h264'])
        self.assertIn('merge', [told.phase for told in self.told])
        outcome = self.fetch(self.site.tiktok(), options=['-x', '--audio-format', 'm4a'])
        self.assertEqual([(file.name[-4:], file.type) for file in outcome.files], [('.m4a', 'audio/mp4')], outcome)

    def test_without_ffmpeg_it_takes_what_comes_in_one_piece(self):
        with unittest.mock.patch.dict(os.environ, {'PATH': path_without_ffmpeg()}):
            for dash in ('h264', 'av1'):
                post = self.site.instagram(dash=dash)
                self.assert_done(self.fetch(post), post.media[0])
            self.assert_ends(self.fetch(self.site.direct('dash'), config=self.direct_config()), 'give_up', 'ffmpeg')
            for options in (['-f', 'bv+ba'], ['-x', '--audio-format', 'mp3']):
                self.assert_ends(self.fetch(self.site.instagram(dash='h264'), options=options), 'give_up', 'ffmpeg')

    def test_the_owner_or_the_caller_may_choose(self):
        post = self.site.tiktok(formats=('h264_540p', 'h264_720p'))
        config = self.config(downloader={'proxy': self.site.proxy, 'format': 'w'})
        self.assert_done(self.fetch(post, config=config), post.media[0])
        self.assert_done(self.fetch(post, options=['-f', 'b[height<1100]'], config=config), post.media[0])
        self.assert_done(self.fetch(post, options=['-f', 'b'], config=config), post.media[1])
        for nonsense in ('nonsense', 'b[', 'b[height<x]'):
            attempt = self.attempt(post)
            attempt.job = attempt.job._replace(options=(('--format', nonsense),))
            self.assert_ends(attempt.run(), 'give_up', 'unsupported')

    @unittest.skipUnless(shutil.which('ffmpeg'), 'ffmpeg is not installed')
    def test_the_order_that_one_asks_for_is_not_that_of_another_who_asks_meanwhile(self):
        v.import_ytdlp(ytdlp_folder())
        from yt_dlp.utils import FormatSorter
        real, turn, over = FormatSorter.calculate_preference, threading.Event(), threading.Event()

        def between(sorter, part):
            if sorter.ydl.params.get('format_sort') and not turn.is_set():
                turn.set()
                over.wait(20)
            return real(sorter, part)

        def other():
            turn.wait(20)
            self.assert_done(self.fetch(best), best.media[1])
            over.set()
        forms = ('h264_540p', 'h264_1080p')
        small, best = self.site.tiktok(formats=forms), self.site.tiktok(formats=forms)
        thread = threading.Thread(target=other)
        thread.start()
        with unittest.mock.patch.object(FormatSorter, 'calculate_preference', between):
            outcome = self.fetch(small, options=['-S', 'res:540'])
        thread.join()
        self.assert_done(outcome, small.media[0])
        self.assertTrue(over.is_set())

    def test_hls_encrypted_hls_and_dash_stay_with_yt_dlp_and_become_whole_files(self):
        for kind in ('hls', 'hls_aes') + ('dash',) * bool(shutil.which('ffmpeg')):
            with self.subTest(kind=kind):
                self.told.clear()
                post = self.site.direct(kind, size=400_000)
                outcome = self.fetch(post, config=self.direct_config())
                self.assertEqual(outcome.kind, 'done', outcome)
                self.assertEqual([route.hits for route in post.media], [1] * len(post.media))
                if shutil.which('ffmpeg'):
                    self.assertEqual(streams(self.output / outcome.files[0].name), ['aac', 'h264'])
                self.assertFalse([request for request in self.site.requests
                                  if 'Lavf' in request.headers.get('User-Agent', '')])  # ffmpeg's name
                self.assertLess(largest_fall(self.told), 1e-9)

    def test_aes_is_left_to_openssl(self):
        v.import_ytdlp(ytdlp_folder())
        key, iv, text = os.urandom(16), os.urandom(16), os.urandom(4096)
        data = run_openssl('enc', '-aes-128-cbc', '-nopad', '-K', key.hex(), '-iv', iv.hex(), data=text)
        reach, slow = self.attempt('https://www.tiktok.com/@a/video/1').reach, unittest.mock.Mock()
        with v.within(reach):
            self.assertEqual(v.openssl_decrypt(reach, slow, data, key, iv), text)
            self.assertEqual(v.openssl_decrypt(reach, slow, data[:-1], key, iv)[:4000], text[:4000])
        with self.assertRaises(v.Ending):  # yt-dlp's own would take half a minute to find out
            v.openssl_decrypt(reach, slow, data, b'no key', iv)
        reach.stop('stopped')  # it kills openssl
        with self.assertRaises(v.Ending):
            v.openssl_decrypt(reach, slow, data, key, iv)
        self.assertEqual(slow.call_count, 0)

    def test_an_estimate_that_grows_does_not_make_progress_fall(self):
        meter = v.Meter(self.told.append)
        meter.PAUSE = 0
        meter.plan({'n_entries': 2, 'playlist_autonumber': 1}, 2)
        for figures in (((50, 100), (60, 200), (200, 200)), ((1, 10), (10, 10))):
            meter.begin()
            for done, total in figures:
                meter.hear({'status': 'downloading', 'downloaded_bytes': done, 'total_bytes_estimate': total})
        self.assertLessEqual(largest_fall(self.told), 0)
        self.assertAlmostEqual(self.told[-1].percent, 97 / 2)
        self.assertEqual(self.told[-1].downloaded, 210)

    def test_progress_never_falls_is_told_at_most_twice_a_second_and_ends_near_100(self):
        post = self.site.direct('dash' if shutil.which('ffmpeg') else 'hls', size=900_000, parts=6, speed=900_000)
        began = time.monotonic()
        self.assertEqual(self.fetch(post, config=self.direct_config()).kind, 'done')
        took = time.monotonic() - began
        self.assertLess(largest_fall(self.told), 1e-9)
        self.assertLessEqual(len(self.told), 2 * took + 8)
        self.assertGreaterEqual(len([told for told in self.told if 0 < told.percent < 97 and told.speed]), 1)
        self.assertGreaterEqual(self.told[-1].percent, 90)
        self.assertLess(self.told[-1].percent, 100)

    def test_a_format_that_comes_without_its_sound_is_struck_off_and_the_next_best_fetched(self):
        forms = ('h264_540p', 'bytevc1_1080p', 'bytevc1_720p')
        silent = [movie(100_000, at).replace(b'soun', b'hint') for at in range(3)]
        post = self.site.tiktok(formats=forms)
        for at in (1, 2):
            post.media[at].set(body=silent[at])
        outcome = self.fetch(post)
        self.assert_done(outcome, post.media[0])
        self.assertEqual((outcome.note, [route.hits for route in post.media[1:]]), ('', [1, 1]))
        post.media[0].set(body=silent[0])
        outcome = self.fetch(post)
        self.assert_done(outcome, silent[1])
        self.assertEqual((outcome.note, len(self.finished())), ('The site sent it without sound.', 2))
        renamed = [{'url': '//a', 'format_id': 'a b', 'acodec': 'aac'}], {'url': 'http://a', 'acodec': 'aac'}
        self.assertEqual(v.without_formats(*renamed, 'audio'), [], 'the same again and again')
        blind = movie(100_000, 'blind').replace(b'vide', b'hint')
        post = self.site.tiktok(formats=('h264_540p', 'h264_720p'))
        post.media[1].set(body=blind)
        self.assert_done(self.fetch(post), post.media[0])
        if shutil.which('ffmpeg'):  # the sound of what is merged
            post = self.site.instagram(dash='h264')
            route = self.site.routes['scontent.cdninstagram.com', f'/o1/{post.id}-a.mp4']
            route.set(body=route.body.replace(b'soun', b'hint'))
            self.assertEqual(self.fetch(post, options=['-R', '0']).kind, 'done')

    @unittest.skipUnless(shutil.which('ffmpeg'), 'ffmpeg is not installed')
    def test_a_photo_post_with_sound_also_becomes_a_video(self):
        config = self.config(downloads={'slideshow': 'on'})
        post = self.site.tiktok(pictures=3, title='Three')
        outcome = self.fetch(post, config=config)
        self.assertEqual([file.name for file in outcome.files][4:], [f'Three_{post.id}.mp4'], outcome)
        words = '-show_entries', 'stream=codec_name,width,height,pix_fmt:format=duration', '-of', 'csv=p=0'
        *found, seconds = probe(self.output / outcome.files[4].name, *words).split()
        self.assertEqual(found, ['h264,1080,1920,yuv420p', 'aac'])
        self.assertAlmostEqual(float(seconds), 3 * 2.5, delta=0.3)
        with unittest.mock.patch.object(v, 'make_slideshow', side_effect=subprocess.CalledProcessError(1, 'x')):
            self.assertEqual(len(self.fetch(post, config=config).files), 4)
        post.media[1].set(status=404)
        self.assertEqual(len(self.fetch(post, config=config).files), 3)

    def test_the_time_of_a_file_and_what_is_inside_tell_of_the_post(self):
        post = self.site.tiktok(title='The caption\nand more')
        outcome = self.fetch(post, config=self.config(downloads={'metadata': 'on'}))
        facts = {**outcome.post, 'id': '', 'media_id': '', 'duration': 0}
        self.assertEqual(facts, {
            'id': '', 'media_id': '', 'duration': 0, 'site': 'tiktok.com', 'title': 'The caption', 'uploader': 'tester',
            'description': 'The caption\nand more', 'upload_date': '20251113', 'timestamp': 1763000000})
        file = self.output / outcome.files[0].name
        self.assertEqual(file.stat().st_mtime, 1763000000)
        if shutil.which('ffmpeg'):
            told = probe(file, '-show_entries', 'format_tags', '-of', 'default=nk=1:nw=1')
            for word in ('The caption', 'tester', '20251113', str(post)):
                self.assertIn(word, told)
        off = self.fetch(post, config=self.config(downloads={'mtime': 'off'}))
        self.assertLess(time.time() - (self.output / off.files[0].name).stat().st_mtime, 60)

    def test_names_are_the_owners_choice_and_lead_nowhere_else(self):
        config = self.config(downloads={'filename': '%(site)s/%(uploader)s/%(date)s %(title)s'})
        names = [self.fetch(self.site.tiktok(title='../x', user='a..b'), config=config).files[0].name
                 for _ in range(2)]
        self.assertEqual(names, [f'tiktok.com/a..b/2025-11-13 x{end}.mp4' for end in ('', '.2')])
        v.forget_files(config, 'one', [names[0], '../../outside', '/etc/passwd'])
        self.assertTrue((self.output / names[1]).exists())
        v.forget_files(config, 'one', names[1:])
        self.assertEqual(self.finished(), {})
        for bad in ('%(title)s/', '../%(id)s', '/tmp/%(id)s', 'a/.b/%(id)s', '%(foo)s%(id)s', 'x', '%(id)s/x',
                    'a:%(id)s', '%(id)s%%', 'x' * 201 + '%(id)s'):
            with self.assertRaises(v.ConfigError, msg=bad):
                self.config(downloads={'filename': bad})


class TestFailures(DownloadTest):
    """What goes wrong is told in words, and tried again only where that can help."""

    def test_words_of_a_site_do_not_pause_the_queue(self):
        error = type('YoutubeDLError', (Exception,), {'orig_msg': 'No space left on device', 'expected': True})()
        self.assert_ends(v.judge_error(error, self.output, True).outcome, 'give_up', 'unsupported')

    def test_no_connection_pauses_the_queue_whatever_number_its_error_has(self):
        def answer(client, status, reply, linger):
            with client:
                client.recv(9999)
                client.sendall(status + b'\r\n\r\n')
                client.recv(9999)  # ClientHello
                client.sendall(reply)
                if linger:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        close_notify, fine, words = b'\x15\x03\x03\x00\x02\x01\x00', b'HTTP/1.1 200 OK', b'No space left on device'
        for how in ((fine, close_notify, False), (fine, b'', True), (fine, b'', False), (words, b'', False),
                    (b'HTTP/1.1 600 ' + words, b'', False)):
            with socket.create_server(('127.0.0.1', 0)) as server:
                def serve(server=server, how=how):
                    with contextlib.suppress(OSError):
                        while True:
                            answer(server.accept()[0], *how)
                threading.Thread(target=serve, daemon=True).start()
                proxy = 'http://127.0.0.1:%d' % server.getsockname()[1]
                with self.subTest(how=how):
                    self.assert_ends(self.fetch(tiktok_link(1), config=self.config(downloader={'proxy': proxy})),
                                     'retry', 'network')
                server.shutdown(socket.SHUT_RDWR)
        for number in ('EHOSTDOWN', 'ENETUNREACH', 'EIO', 'ENXIO', 'ENODEV', 'ESTALE', 'EROFS', 'ENOSPC', 'EDQUOT'):
            error = OSError(getattr(errno, number), number)
            with self.subTest(number=number), unittest.mock.patch('socket.socket.connect', side_effect=error):
                self.assert_ends(self.fetch(tiktok_link(1)), 'retry', 'network')
        for error in (ssl.SSLSyscallError(5, 'SSL SYSCALL'), ssl.SSLZeroReturnError(6, 'closed'),
                      OSError(errno.EIO, 'of something else', '/dev/tty')):
            self.assertIsNone(v.system_reason(error, self.output))

    def test_numbers_of_any_length_are_no_mistake_of_ours(self):
        playlist = '#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:%s\n#EXTINF:1,\nx.ts\n#EXT-X-ENDLIST\n'
        self.site.add('127.0.0.1', '/9.m3u8', (playlist % ('9' * 5000)).encode(), 'application/vnd.apple.mpegurl')
        self.site.add('127.0.0.1', '/9.mp4', movie(), 'video/mp4', headers={'Content-Length': '9' * 5000})
        for path, reason in (('/9.m3u8', 'site_changed'), ('/9.mp4', 'http')):
            outcome = self.fetch(self.site.http + path, config=self.direct_config())
            self.assert_ends(outcome, 'retry', reason)

    def test_without_any_ca_it_says_so_and_goes_on_when_there_is_one(self):
        nowhere = {'SSL_CERT_FILE': '/nowhere', 'SSL_CERT_DIR': '/nowhere'}
        post = self.site.tiktok()
        with unittest.mock.patch.dict(os.environ, nowhere):
            self.assert_ends(self.fetch(post), 'pause', 'ca_store')
        self.assert_done(self.fetch(post), post.media[0])

    def test_each_kind_of_failure_ends_as_it_should(self):
        tiktok = {'private': ('give_up', 'private'), 'private_post': ('give_up', 'private'),
                  'blocked': ('retry', 'blocked', 2), 'unavailable': ('give_up', 'gone'),
                  'server_error': ('retry', 'http'), 'gone': ('give_up', 'gone'), 'login': ('retry', 'login', 2),
                  'classified': ('retry', 'login', 2), 'changed': ('retry', 'site_changed')}
        instagram = {'private': ('retry', 'login', 2), 'login': ('retry', 'login', 2),
                     'restricted': ('retry', 'login', 2), 'deleted': ('give_up', 'gone'), 'geo': ('give_up', 'geo')}
        for make, cases in ((self.site.tiktok, tiktok), (self.site.instagram, instagram)):
            for state, expected in cases.items():
                with self.subTest(site=make.__name__, state=state):
                    self.assert_ends(self.fetch(make(state=state)), *expected)

    def test_a_page_that_fails_for_now_is_tried_again(self):
        for trouble, reason in ((503, 'http'), (429, 'http'), ('reset', 'network'), ('half', 'network')):
            with self.subTest(trouble=trouble):
                post = self.site.tiktok(page={'fail': [trouble] * 9})
                self.assert_ends(self.fetch(post), 'retry', reason)
        self.assert_ends(self.fetch(self.site.tiktok(page={'fail': [403] * 9})), 'retry', 'blocked', 2)

    def test_media_that_fail_for_now_are_tried_again(self):
        for trouble, expected in ((503, ('http',)), (403, ('http', 2)), (404, ('http', 2)), ('reset', ('network',))):
            with self.subTest(trouble=trouble):
                post = self.site.tiktok(fail=[trouble] * 9)
                self.assert_ends(self.fetch(post, options=['-R', '0']), 'retry', *expected)
        self.assertEqual(self.finished(), {})
        post = self.site.tiktok(fail=['half', 503])  # a short stumble
        self.assert_done(self.fetch(post), post.media[0])

    def test_what_is_no_video_never_appears(self):
        for path in {os.environ['PATH'], path_without_ffmpeg()}:
            with unittest.mock.patch.dict(os.environ, {'PATH': path}):
                for body in (HTML, b'', b'#EXTM3U\nfile:///etc/passwd\n', b'\xff\xd8\xff\xe0JFIF'):
                    post = self.site.tiktok()
                    post.media[0].set(body=body)
                    self.assert_ends(self.fetch(post, options=['-R', '0']), 'retry', 'bad_media' if body else 'network')
        self.assertEqual(self.finished(), {})

    def test_an_mp4_tells_by_itself_and_ffprobe_tells_of_the_others(self):
        v.import_ytdlp(ytdlp_folder())
        file = self.folder / 'x.mp4'
        kinds = {'plain': movie(300_000), 'sound': sound(100_000, 'x'), 'cut': movie(300_000)[:-1], 'text': b'x' * 500,
                 'no track': TINY_MP4.replace(b'vide', b'hint').replace(b'soun', b'hint'), 'longer': TINY_MP4 + b'1234',
                 'to the end': TINY_MP4 + struct.pack('>I4s', 0, b'free') + b'x' * 999, 'empty': b'',
                 'no samples': re.sub(rb'(stsz.{8}).{4}', rb'\g<1>\0\0\0\0', TINY_MP4, flags=re.S),
                 'long': TINY_MP4 + struct.pack('>I4sQ', 1, b'free', 20) + b'1234',
                 'never ending': TINY_MP4 + struct.pack('>I4sQ', 1, b'free', 0) + b'1234'}
        told = {'plain': {'video', 'audio'}, 'sound': {'audio'}, 'to the end': {'video', 'audio'},
                'long': {'video', 'audio'}, 'no track': set(), 'no samples': set(), 'empty': set()}
        for kind, body in kinds.items():
            with self.subTest(kind=kind):
                file.write_bytes(body)
                if kind not in told:
                    self.assertRaises(ValueError, v.mp4_tracks, file)
                elif kind != 'sound' or shutil.which('ffmpeg'):
                    self.assertEqual(v.mp4_tracks(file), told[kind])
        no = subprocess.CalledProcessError(1, 'ffprobe')
        with unittest.mock.patch('subprocess.run', side_effect=no) as asked, \
                unittest.mock.patch.object(v, 'which', lambda name: name):
            for body, calls in ((kinds['plain'], 0), (TINY_TS, 1)):
                file.write_bytes(body)
                self.assertEqual((bool(v.tracks(file)), asked.call_count), (not calls, calls))

    def test_half_a_file_is_no_video(self):
        body = movie(43_646)
        length = {'Content-Type': 'video/mp4', 'Content-Length': '20000'}
        answers = {'agrees': (200, length, body[:20_000]), 'tells none': (200, {'Content-Length': None}, body[:20_000]),
                   'ends between two boxes': (200, {**length, 'Content-Length': str(len(TINY_MP4))}, TINY_MP4)}
        for name, answer in answers.items():
            with self.subTest(answer=name):
                post = self.site.tiktok(body=body)
                post.media[0].set(body=lambda request, answer=answer: answer)
                self.assert_ends(self.fetch(post), 'retry', 'bad_media')
        if shutil.which('ffmpeg'):
            post = self.site.instagram(dash='h264', size=300_000)
            route = self.site.routes['scontent.cdninstagram.com', f'/o1/{post.id}-v.mp4']
            route.set(body=route.body[:-20_000])
            self.assert_ends(self.fetch(post), 'retry', 'bad_media')
            self.assert_ends(self.fetch(self.site.tiktok(body=TINY_MP4[:40] + b'junk' * 500)), 'retry', 'bad_media')
        self.assertEqual(self.finished(), {})

    def test_what_yt_dlp_says_is_for_the_log_and_not_for_a_person(self):
        post = self.site.tiktok(fail=['half'] * 9)
        with self.assertLogs(v.log, 'WARNING') as logs:
            outcome = self.fetch(post, options=['-R', '1'])
        self.assert_ends(outcome, 'retry', 'network')
        self.assertEqual(outcome.message, f'{v.ENDINGS["network"][1]}.')
        self.assertIn('Got error', '\n'.join(logs.output))
        errors = [type(name, (Exception,), {'orig_msg': '\r[x] foo --bar', 'expected': expected})
                  for name in ('DownloadError', 'PostProcessingError', 'TransportError', 'YoutubeDLError', 'Other')
                  for expected in (True, False)]
        for error in [kind('\r[download] Got error: foo') for kind in errors]:
            self.assertNotIn('foo', v.judge_error(error, self.output, True).outcome.message)

    def test_what_costs_time_or_memory_is_had_once_and_in_small_pieces(self):
        v.import_ytdlp(ytdlp_folder())
        from yt_dlp.networking import common
        self.assertIs(common.make_ssl_context(verify=True), common.make_ssl_context(verify=True))
        real, sizes = http.client.HTTPResponse.read, []

        def read(answer, size=None):
            sizes.append(size)
            return real(answer, size)
        with unittest.mock.patch.object(http.client.HTTPResponse, 'read', read):
            self.assertEqual(self.fetch(self.site.tiktok(size=9_000_000)).kind, 'done')
        self.assertLessEqual(max(filter(None, sizes)), 1 << 16)

    def test_a_subtitle_is_named_after_its_video(self):
        attempt = self.attempt('https://www.tiktok.com/@a/video/1')
        attempt.folder.open()
        v.import_ytdlp(ytdlp_folder())
        for name, body in (('0-x.mp4', TINY_MP4), ('0-x.en.vtt', b'WEBVTT')):
            (attempt.folder.path / name).write_bytes(body)
        path = str(attempt.folder.path)
        attempt.folder.post = v.post_facts({'title': 'Cat', 'id': 'x'}, attempt.job.url)
        attempt._keep({'requested_downloads': [{'filepath': path + '/0-x.mp4'}],
                       'requested_subtitles': {'en': {'filepath': path + '/0-x.en.vtt'}}}, 1)
        files = attempt.folder.move(self.output)
        self.assertEqual([file.name for file in files], ['Cat_x.mp4', 'Cat_x.en.vtt'])
        self.assertEqual(sorted(self.finished()), sorted(file.name for file in files))

    def test_a_bug_is_an_outcome_and_a_traceback_with_the_id(self):
        attempt = self.attempt(self.site.tiktok(), 'the-id')
        with unittest.mock.patch.object(attempt, 'choose', side_effect=ZeroDivisionError), \
                self.assertLogs(v.log, 'ERROR') as logs:
            outcome = attempt.run()
        self.assert_ends(outcome, 'retry', 'internal')
        self.assertIn('the-id', logs.output[0])
        self.assertIn('ZeroDivisionError', logs.output[0])

    def test_errors_of_disk_and_output_folder_pause_the_queue(self):
        for number, reason in ((errno.ENOSPC, 'disk'), (errno.EDQUOT, 'disk'), (errno.EIO, 'output'),
                               (errno.EROFS, 'read_only')):
            wheres = ('videoserverd.JobFolder.finished', 'os.rename', 'os.fsync', 'os.replace', 'pathlib.Path.mkdir')
            for where in wheres[:5 if reason == 'disk' else 2]:
                error = OSError(number, 'no', *[str(self.output / 'x')] * where.startswith('videoserverd'))
                with self.subTest(number=number, where=where), unittest.mock.patch(where, side_effect=error):
                    self.assert_ends(self.fetch(self.site.tiktok()), 'pause', reason)

    def test_a_folder_that_takes_only_short_or_plain_names_gets_them(self):
        real, title = os.rename, 'Häschen 漢 ' + 'x' * 300

        def refuses(number, too_much):
            def rename(source, target):
                if Path(target).parent == self.output and too_much(Path(target).name):
                    raise OSError(number, 'no')
                real(source, target)
            return unittest.mock.patch('os.rename', rename)
        for number, too_much, name in (
                (errno.ENAMETOOLONG, lambda name: len(name.encode()) > 143, '^Häschen 漢 x+_{}.mp4$'),
                (errno.EINVAL, lambda name: not name.isascii(), '^Haschen x+_{}.mp4$'),
                (errno.EILSEQ, lambda name: 'x' in name, '^{}.mp4$')):
            post = self.site.tiktok(title=title)
            with refuses(number, too_much):
                names = self.assert_done(self.fetch(post), post.media[0])
            self.assertRegex(names[0], name.format(post.id))
            self.assertLessEqual(len(names[0].encode()), 143)
        with refuses(errno.EINVAL, lambda name: True):
            self.assert_ends(self.fetch(post), 'pause', 'output')

    def test_an_output_folder_that_is_not_there_yet_is_not_called_read_only(self):
        config = self.config(downloads={'output_directory': 'new'}, database={'path': 'new.db'})
        self.assertIn('does not exist', v.usable_output(config, make=False))
        with unittest.mock.patch('pathlib.Path.mkdir', side_effect=OSError(errno.EROFS, 'Read-only file system')):
            self.assertIn(f'install.sh --output {self.folder / "new"}', v.usable_output(config))
        self.assertIsNone(v.usable_output(config))

    def test_a_share_that_syncs_only_what_is_open_for_writing_is_synced(self):
        real, synced = os.fsync, []

        def fsync(fd):
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, 'read-only handle')
            synced.append(fd)
            real(fd)
        with unittest.mock.patch('os.fsync', fsync):
            self.assertEqual(self.fetch(self.site.tiktok()).kind, 'done')
        self.assertEqual(len(synced), 1)
        with unittest.mock.patch('os.statvfs', return_value=SimpleNamespace(f_blocks=0, f_bavail=0, f_frsize=4096)):
            self.assertGreater(v.free_space(self.output), 1 << 40)

    def test_an_output_folder_that_vanishes_meanwhile_pauses_the_queue_and_is_not_made(self):
        post = self.site.tiktok(size=3_000_000, hold_at=1_000_000)
        run = self.in_background(self.attempt(post))
        post.media[0].wait_held()
        self.output.rename(self.folder / 'unplugged')
        post.media[0].release()
        self.assert_ends(run.wait(), 'pause', 'output')
        self.assert_ends(self.fetch(self.site.tiktok()), 'pause', 'output')
        self.assertFalse(self.output.exists())


class TestResume(DownloadTest):
    """A partial file is continued if it is the same format and size, and never spliced with another."""
    together = 'attempts'

    def test_a_stopped_download_goes_on_from_its_partial_file(self):
        for post in (self.site.tiktok(size=1_000_000), self.site.instagram(size=1_000_000)):
            self.begin(post)  # the second site does not tell the size
            self.assert_done(self.fetch(post, 'resumed'), post.media[0])
            self.assertRegex(post.media[0].ranges_asked[-1], r'bytes=[1-9]\d+-')
            self.assertLess(post.media[0].sent, 1_300_000)  # of 1,000,000, stopped before 500,000
            v.forget_files(self.config(), 'resumed', ())

    def test_of_a_carousel_that_was_stopped_every_item_comes_or_is_named(self):
        for number, (boot, page) in enumerate((('', []), ('another', []), ('', [404] * 9))):
            post = self.site.instagram('video', 'photo', 'video')
            post.media[2].set(hold_at=50_000)
            attempt = self.attempt(post, f'carousel{number}')
            run = self.in_background(attempt)
            post.media[2].wait_held()
            attempt.stop('stopped')
            run.wait()
            post.media[2].release()
            post.page.set(fail=page)
            with unittest.mock.patch.object(v, 'BOOT_ID', boot or v.BOOT_ID):
                outcome = self.fetch(post, f'carousel{number}')
            if page:
                self.assertRegex(outcome.note, '^2 of 3: video 3 is missing. ')
            else:
                self.assert_done(outcome, *post.media)
                self.assertEqual(post.media[0].hits, 1 + bool(boot))

    def test_a_file_or_folder_in_the_way_does_not_pause_the_queue(self):
        (self.output / '.incomplete/x/@eaDir').mkdir(parents=True)
        (self.output / 'tester').touch()
        post = self.site.tiktok()
        config = self.config(downloads={'filename': '%(uploader)s/%(title)s_%(id)s'})
        self.assertEqual(self.assert_done(self.fetch(post, 'x', config=config), post.media[0]), [f'{post.id}.mp4'])

    def test_what_fills_the_disk_without_an_end_gives_its_room_back(self):
        post = self.site.direct('hls', size=4_000_000, host='cdn.example.com')
        post.media[2].set(hold_at=500_000)
        attempt = self.attempt(post, 'x', config=self.config(security={'allowed_domains': '*'}))
        run = self.in_background(attempt)
        post.media[2].wait_held()
        with full_disk(1000):
            attempt.check(0)
            self.assert_ends(run.wait(), 'retry', 'disk')
        post.media[2].release()
        self.assertEqual(os.listdir(self.output / '.incomplete'), [])

    def test_what_was_broken_is_fetched_anew(self):
        for post in (self.site.tiktok(known_size=False), self.site.instagram('photo')):
            whole = post.media[0].body
            post.media[0].set(body=whole[:len(whole) // 2])
            self.assertEqual(self.fetch(post, post.id, ['-R', '0']).kind, 'retry')
            post.media[0].set(body=whole)
            self.assert_done(self.fetch(post, post.id, ['-R', '0']), post.media[0])

    def test_another_file_is_fetched_from_its_beginning(self):
        for make, sizes in ((self.site.tiktok, (900_000, 999_950, 1_200_000, 400_000)),
                            (self.site.instagram, (900_000, 1_000_050))):
            for size in sizes:
                with self.subTest(size=size, site=make.__name__):
                    post = make(size=1_000_000, **({'known_size': False} if make == self.site.tiktok else {}))
                    self.begin(post)
                    post.media[0].set(body=movie(size, 'another'))
                    self.assert_done(self.fetch(post, 'resumed'), post.media[0])
                    v.forget_files(self.config(), 'resumed', ())

    def test_another_format_is_fetched_from_its_beginning(self):
        post = self.site.tiktok(size=1_000_000, formats=('h264_540p', 'h264_720p'))
        self.begin(post, options=['-f', 'w'])
        self.assert_done(self.fetch(post, 'resumed', ['-f', 'b']), post.media[1])
        self.assertEqual(post.media[1].ranges_asked, [''])

    def test_where_the_server_ignores_ranges_it_starts_over(self):
        post = self.site.tiktok(size=1_000_000, ranges=False)
        self.begin(post)
        self.assert_done(self.fetch(post, 'resumed'), post.media[0])

    def test_where_the_size_is_never_told_nothing_is_continued(self):
        post = self.site.tiktok(size=1_000_000, known_size=False)
        body = post.media[0].body
        post.media[0].set(body=lambda request: (200, {'Content-Type': 'video/mp4', 'Content-Length': '1000000'}, body))
        folder = v.JobFolder(self.output / '.incomplete' / 'resumed')
        folder.open()
        (folder.path / f'0-{post.id}.mp4.part').write_bytes(b'x' * 500)
        (folder.path / f'0-{post.id}.mp4').write_bytes(b'x' * 500)
        self.assert_done(self.fetch(post, 'resumed'), body)

    def test_after_another_boot_nothing_is_believed(self):
        post = self.site.tiktok(size=1_000_000)
        self.begin(post)
        with unittest.mock.patch.object(v, 'BOOT_ID', 'another'):
            self.assert_done(self.fetch(post, 'resumed'), post.media[0])
        self.assertEqual(post.media[0].ranges_asked, ['', ''])

    # What may happen to the folder of a download that was stopped, and to its partial file.
    CHANGES = {
        'append': lambda folder, part: part.write_bytes(part.read_bytes() + b'x' * 3000),
        'shorten': lambda folder, part: part.write_bytes(part.read_bytes()[:-3000]),
        'lose index': lambda folder, part: next(folder.glob('*.ytdl')).unlink(),
        'spoil index': lambda folder, part: next(folder.glob('*.ytdl')).write_text('{"downl'),
        'spoil fragment': lambda folder, part: (folder / (part.name + '-Frag7.part')).write_bytes(b'x' * 3000),
        'too long': lambda folder, part: part.write_bytes(part.read_bytes() + b'x' * 900_000),
        'half of a finished file': lambda folder, part: part.rename(folder / part.name[:-len('.part')]),
        'spoil note': lambda folder, part: (folder / 'job.json').write_text('[')}

    def broken_off(self, kind: str, change: str) -> None:
        """A download is stopped in the middle, `change` happens to its folder, and it becomes whole all the same."""
        config, post = self.direct_config(), self.site.direct(kind, size=1_000_000, parts=10)
        held = post.media[6 if kind == 'hls' else 0].set(hold_at=50_000 if kind == 'hls' else 500_000)
        attempt = self.attempt(post, 'broken', config=config)
        run = self.in_background(attempt)
        held.wait_held()
        wait_until(lambda: attempt.folder.size()[0] > 250_000)
        attempt.stop('stopped')
        run.wait()
        held.release()
        self.CHANGES[change](attempt.folder.path, next(attempt.folder.path.glob('0-*[4s].part')))
        outcome = self.fetch(post, 'broken', config=config)
        v.forget_files(config, 'broken', ())
        self.assert_done(outcome, b''.join(route.body for route in post.media))
        if kind == 'hls' and change in ('append', 'spoil fragment'):
            self.assertEqual(post.media[0].hits, 1)  # the rest was continued

    def test_whatever_a_kill_leaves_behind_no_byte_comes_twice_or_is_missing(self):
        with unittest.mock.patch.dict(os.environ, {'PATH': path_without_ffmpeg()}):  # ffmpeg would change the bytes
            for kind, left_out in (('hls', {'too long', 'half of a finished file'}),
                                   ('mp4', {'append', 'lose index', 'spoil index', 'spoil fragment'})):
                for change in self.CHANGES.keys() - left_out:
                    with self.subTest(kind=kind, change=change):
                        self.broken_off(kind, change)

    def test_kill_9_at_any_moment_never_leads_to_a_wrong_file(self):
        patched(self, unittest.mock.patch.dict(os.environ, {'PATH': path_without_ffmpeg()}))  # it changes bytes
        plain = self.site.tiktok(size=2_000_000, speed=2_000_000)
        pieces = self.site.direct('hls', size=2_000_000, parts=50, speed=2_000_000)
        for make_config, post in ((self.config, plain), (self.direct_config, pieces)):
            with self.subTest(post=post):
                config, routes = make_config(), set(post.media)
                whole = b''.join(route.body for route in post.media)
                last = post.media[-1].set(hold_at=len(post.media[-1].body) - 1000)  # however slow this machine is
                for _ in range(2):
                    process = self.driver(f'attempt({str(post)!r}, {post.id!r}).run()', config)
                    # Far from the end: a block that reaches into what is held back is not on disk for 20 s.
                    goal = self.on_disk(post) + len(whole) // 10 + random.randrange(len(whole) // 20)
                    wait_until(lambda post=post, goal=goal: self.on_disk(post) > goal, 20)
                    process.kill()
                    process.wait()
                last.release()
                before = self.on_disk(post) - sum(route.sent for route in routes)
                self.assert_done(self.fetch(post, post.id, [], config), whole)
                again = before + sum(route.sent for route in routes) - len(whole)  # what was there and came once more
                self.assertLess(again, len(whole) // 10)

    def test_a_kill_between_rename_and_commit_makes_no_second_set(self):
        post = self.site.instagram('video', 'video', title='Set')
        attempt = self.attempt(post, 'crashed')
        real, renamed = os.rename, []

        def rename_once(source, target):
            if Path(target).parent == self.output:
                if renamed:
                    raise KeyboardInterrupt
                renamed.append(target)
            real(source, target)
        with unittest.mock.patch('os.rename', rename_once):
            self.assertEqual(attempt.run().kind, 'retry')
        self.assertEqual(len(self.finished()), 1)
        hits = [route.hits for route in post.media]
        for _ in range(2):  # before the commit, and before the note of it is removed
            self.assertEqual(len(set(self.assert_done(self.fetch(post, 'crashed'), *post.media))), 2)
        self.assertEqual([route.hits for route in post.media], hits)
        self.assertEqual(len(self.finished()), 2)

    def test_a_folder_that_is_emptied_while_a_file_is_moved_into_it_is_there(self):
        config, threads = self.config(downloads={'filename': '%(uploader)s/%(id)s'}), []
        (self.output / 'tester').mkdir()
        old, save = self.output / 'tester/old.mp4', v.JobFolder.save
        old.write_text('x')

        def save_and_delete(folder):
            save(folder)
            if old.exists() and folder.results and 'name' in folder.results[0]:
                threads.append(threading.Thread(target=v.forget_files, args=(config, '', ['tester/old.mp4'])))
                threads[0].start()
                wait_until(lambda: not old.exists())
                threads[0].join(0.3)  # only a thread that has to wait takes that long
        post = self.site.tiktok()
        with unittest.mock.patch.object(v.JobFolder, 'save', save_and_delete):
            self.assert_done(self.fetch(post, config=config), post.media[0])
        threads[0].join()

    def test_results_that_somebody_took_away_are_fetched_again(self):
        post = self.site.tiktok()
        for name in self.assert_done(self.fetch(post, 'taken'), post.media[0]):
            (self.output / name).unlink()
        self.assert_done(self.fetch(post, 'taken'), post.media[0])

    def test_forget_removes_partial_and_finished_files_and_nothing_else(self):
        config = self.config()
        (self.folder / 'outside').write_text('x')
        names = self.assert_done(self.fetch(self.site.tiktok(), 'one'), self.site.routes[
            'v16-webapp-prime.us.tiktok.com', self.site.asked('us.tiktok.com', '/video')[-1].path.rstrip('/')])
        (self.output / 'other.mp4').write_text('x')
        v.forget_files(config, 'one', [*names, '../outside', 'never-was.mp4'])
        v.forget_files(config, '..', [])
        self.assertEqual(sorted(self.finished()), ['other.mp4'])
        self.assertEqual(os.listdir(self.output / '.incomplete'), [])
        self.assertTrue((self.folder / 'outside').exists())


class TestStop(DownloadTest):
    """Cancel works in under a second in every phase; what was started ends with it."""
    together = 'attempts'

    @unittest.skipUnless(shutil.which('ffmpeg'), 'ffmpeg is not installed')
    def test_while_a_slideshow_is_made(self):
        attempt = self.attempt(self.site.tiktok(pictures=20), config=self.config(downloads={'slideshow': 'on'}))
        self.assert_stops(attempt, lambda: list(attempt.folder.path.glob('*.ts')))

    def test_before_it_starts(self):
        attempt = self.attempt(self.site.tiktok())
        attempt.stop('stopped')
        attempt.stop('cancelled')  # the first reason stays
        self.assert_ends(attempt.run(), 'stopped', 'stopped')

    def test_in_page_and_media_even_if_the_server_drips_a_byte_a_second(self):
        for trouble in ({'fail': ['hang']}, {'drip': 0.5}):
            post = self.site.tiktok(page=trouble)
            self.assert_stops(self.attempt(post), lambda post=post: post.page.hits)
        for trouble in ({'drip': 1.0}, {'fail': ['hang']}, {'hold_at': 50_000}, {'speed': 30_000}):
            post = self.site.tiktok(size=3_000_000, **trouble)
            self.assert_stops(self.attempt(post), lambda post=post: post.media[0].hits)

    def test_in_hls_with_one_thread_or_four(self):
        for options in ([], ['-N', '4']):
            post = self.site.direct('hls', size=3_000_000, parts=12, drip=0.3)
            self.assert_stops(self.attempt(post, options=options, config=self.direct_config()),
                       lambda post=post, options=options: sum(route.hits for route in post.media) > len(options))

    def test_while_names_are_looked_up_or_a_host_does_not_answer(self):
        asked, never = threading.Event(), threading.Event()

        def nobody(*args, **more):
            asked.set()
            never.wait(30)  # longer than any load excuses
            raise OSError('no answer')
        with unittest.mock.patch('_socket.getaddrinfo', nobody):
            self.assert_stops(self.attempt(self.site.tiktok()), asked.is_set)
        with socket.socket() as full, socket.socket() as first, socket.socket() as second:
            full.bind(('127.0.0.1', 0))
            full.listen(0)
            for client in (first, second):
                client.setblocking(False)
                client.connect_ex(full.getsockname())
            CONNECTED.clear()
            config = self.config(downloader={'proxy': 'http://127.0.0.1:%d' % full.getsockname()[1]})
            self.assert_stops(self.attempt(self.site.tiktok(), config=config), lambda: CONNECTED)

    def test_between_two_tries_and_under_a_rate_limit(self):
        nap, naps = v.Stopper.nap, []

        def long_nap(stopper, seconds):  # longer than any load excuses
            naps.append(seconds)
            nap(stopper, 60)
        for post, options in ((self.site.tiktok(fail=[503] * 9), ['-R', '20']),
                              (self.site.tiktok(size=3_000_000), ['-r', '10K'])):
            with unittest.mock.patch.object(v.Stopper, 'nap', long_nap):
                self.assert_stops(self.attempt(post, options=options), lambda: naps)
            del naps[:]

    def test_what_a_stop_cut_off_is_not_taken_for_whole(self):
        attempt = self.attempt(self.site.tiktok())
        attempt.folder.open()
        attempt.folder.begin('x.mp4', {'protocol': 'https'})
        (attempt.folder.path / 'x.mp4').write_bytes(b'half of it')
        attempt.stop('stopped')
        with self.assertRaises(v.Ending):
            attempt._on_media({'status': 'finished', 'filename': str(attempt.folder.path / 'x.mp4')})
        self.assertNotIn('size', attempt.folder.parts['x.mp4'])

    def test_in_a_merge_and_nothing_outlives_it(self):
        fake = self.fake_ffmpeg()
        post = self.site.direct('dash')
        attempt = self.attempt(post, config=self.direct_config())
        with unittest.mock.patch.dict(os.environ, {'PATH': f'{fake.parent}:{os.environ["PATH"]}'}):
            self.assert_stops(attempt, lambda: files_below(fake.parent).get(fake.parent / 'ffmpeg.args'))
        said = (fake.parent / 'ffmpeg.args').read_text()
        self.assertGreater(said.count('-i file:'), 0)
        self.assertEqual(said.count('-i '), said.count(' '.join(v.LOCAL_FILES) + ' -i file:'))
        self.assertEqual([child.poll() for child in attempt.reach.children], [-9] * len(attempt.reach.children))

    def test_no_socket_is_added_while_the_others_are_shut_down(self):
        stopper, taken = v.Stopper(), []

        class Sockets:
            def __iter__(self) -> Any:
                with ThreadPoolExecutor(1) as pool:
                    taken.append(pool.submit(stopper._changed.acquire, False).result())
                return iter(())
        stopper._sockets = Sockets()
        stopper.hang_up()
        self.assertEqual(taken, [False])

    @unittest.skipUnless(sys.platform.startswith('linux'), 'elsewhere the next attempt does it')
    def test_kill_9_takes_ffmpeg_along(self):
        fake = self.fake_ffmpeg()
        post = self.site.direct('dash')
        process = self.driver(f'attempt({str(post)!r}).run()', self.direct_config(),
                              env={'PATH': f'{fake.parent}:{os.environ["PATH"]}'})
        wait_until((fake.parent / 'ffmpeg.args').exists, 20)
        children = ran(['ps', '-o', 'pid=', '--ppid', str(process.pid)]).stdout.split()
        self.assertEqual(len(children), 1)
        process.kill()
        wait_until(lambda: not Path(f'/proc/{int(children[0])}').exists(), what='ffmpeg gone')

    @unittest.skipUnless(shutil.which('ps'), 'ps is not installed')
    def test_an_ffmpeg_left_over_by_an_earlier_life_is_ended_before_its_files_are_used(self):
        folder = v.JobFolder(self.output / '.incomplete' / 'left')
        folder.open()
        fake = self.folder / 'ffmpeg'
        fake.symlink_to(shutil.which('tail'))
        quiet = subprocess.DEVNULL
        mine = subprocess.Popen([str(fake), '-f', '/dev/null', f'{folder.path}/x.mp4'], stdout=quiet, stderr=quiet)
        other = subprocess.Popen([str(fake), '-f', '/dev/null', f'{folder.path}2/x.mp4'], stdout=quiet, stderr=quiet)
        self.addCleanup(other.wait)
        self.addCleanup(other.kill)
        folder.open()
        self.assertEqual(mine.wait(fair(10)), -9)
        self.assertIsNone(other.poll())

    def test_while_the_disk_takes_its_time(self):
        syncing = threading.Event()

        def slow(fd):
            syncing.set()
            threading.Event().wait(30)
        with unittest.mock.patch('os.fsync', slow):
            self.assert_stops(self.attempt(self.site.tiktok()), syncing.is_set)


class TestLimits(DownloadTest):
    """An attempt that gains nothing, or finds no room, ends by itself."""
    together = 'attempts'

    def test_timeout_ends_an_attempt_that_gains_less_than_64_kb(self):
        post = self.site.tiktok(size=3_000_000, speed=5_000)
        attempt = self.attempt(post)
        run = self.in_background(attempt)
        post.media[0].wait_hits()
        now = time.monotonic()
        attempt.check(now)
        attempt.check(now + 299)
        self.assertIsNone(attempt.reach.stopped_at)
        attempt.check(now + 301)
        self.assert_ends(run.wait(), 'retry', 'timeout')
        self.assertTrue(attempt.folder.path.exists())

    def test_timeout_starts_anew_with_each_64_kb_and_each_phase(self):
        attempt = self.attempt('https://www.tiktok.com/@a/video/1')
        attempt.folder.open()
        file = attempt.folder.path / 'x.part'
        clock = 1000.0
        for size in range(0, 10):
            file.write_bytes(b'x' * (size * 65536))
            attempt.check(clock)
            clock += 290
        for phase in ('page', 'media', 'merge', 'media'):
            attempt.meter.enter(phase)
            attempt.check(clock)
            clock += 290
        self.assertIsNone(attempt.reach.stopped_at)
        attempt.meter.enter('merge')
        attempt.check(clock)
        for changed in range(3):  # a merge that only moves its bytes around
            os.utime(file, (changed, changed))
            attempt.check(clock + 290)
            clock += 290
        self.assertIsNone(attempt.reach.stopped_at)
        attempt.check(clock + 301)
        self.assertIsNotNone(attempt.reach.stopped_at)

    def test_less_than_64_kb_in_that_time_are_no_gain(self):
        attempt = self.attempt('https://www.tiktok.com/@a/video/1')
        attempt.folder.open()
        file = attempt.folder.path / 'x.part'
        for clock, size, stopped in ((1000, 500_000, False), (1200, 530_000, False), (1290, 200_000, False),
                                     (1295, 262_000, False), (1301, 263_000, True)):
            file.write_bytes(b'x' * size)
            attempt.check(clock)
            self.assertEqual(attempt.reach.stopped_at is not None, stopped, clock)

    def test_a_full_disk_pauses_before_the_start_and_while_running(self):
        with full_disk(1000):
            self.assert_ends(self.fetch(self.site.tiktok()), 'pause', 'disk')
        post = self.site.tiktok(size=3_000_000, hold_at=500_000)
        attempt = self.attempt(post)
        run = self.in_background(attempt)
        post.media[0].wait_held()
        with full_disk(1000):
            attempt.check(time.monotonic())
        self.assert_ends(run.wait(), 'pause', 'disk')
        post.media[0].release()
        self.assert_done(self.fetch(post, attempt.job.id), post.media[0])
        self.assertRegex(post.media[0].ranges_asked[-1], r'bytes=[1-9]')

    def test_what_is_larger_than_the_room_does_not_stop_the_queue(self):
        post = self.site.tiktok(size=5_000_000)
        with full_disk(4_000_000):
            self.assert_ends(self.fetch(post), 'retry', 'disk')
        self.assertEqual(post.media[0].hits, 0)

    def test_the_rate_limit_of_the_owner_holds(self):
        config = self.config(downloader={'proxy': self.site.proxy, 'rate_limit': '200K'})
        post = self.site.tiktok(size=400_000)
        began = time.monotonic()
        self.assert_done(self.fetch(post, options=['-r', '100M'], config=config), post.media[0])
        self.assertGreater(time.monotonic() - began, 1.2)


class TestHostileSites(DownloadTest):
    """What a site sends to use up memory or time ends this one download."""

    def test_a_page_without_end_is_not_read_into_memory(self):
        page = b'<html><title>x</title>' + b'x' * (v.LARGEST_PAGE + 1000)
        bare = zlib.compressobj(wbits=-15)
        packings = {'identity': page, 'gzip': gzip.compress(page), 'deflate': zlib.compress(page),
                    'gzip, gzip': gzip.compress(gzip.compress(page)), 'raw': bare.compress(page) + bare.flush()}
        for packing, body in packings.items():
            with self.subTest(packing=packing):
                outcome = self.direct('/endless', body, headers={'Content-Encoding': packing.replace('raw', 'deflate')})
                self.assert_ends(outcome, 'give_up', 'unsupported')
                self.assertIn('8.0 MB', outcome.message)
        playlist = b'#EXTM3U\n' + (b'a' * 999 + b'\n') * (v.LARGEST_PAGE // 1000 + 2)
        self.assert_ends(self.direct('/endless.m3u8', playlist, 'application/vnd.apple.mpegurl'),
                         'give_up', 'unsupported')

    def test_what_a_site_says_of_a_post_can_be_stored_and_shown(self):
        for wild in (float('inf'), float('nan'), -1e18, 10 ** 30, 1e20, 'x', []):
            facts = v.post_facts({'id': '\ud800', 'timestamp': wild, 'duration': wild}, 'https://a.test/')
            self.assertEqual([facts[name] for name in ('id', 'timestamp', 'duration', 'upload_date')],
                             ['\ufffd', None, None, ''])

    def test_a_page_up_to_there_is_read_packed_or_not(self):
        self.site.add('127.0.0.1', '/d/large.mp4', movie(), 'video/mp4')
        page = b'<html><title>x</title><video src="/d/large.mp4"></video>' + b' ' * 1_500_000
        for packing, body in (('identity', page), ('gzip', gzip.compress(page)), ('deflate', zlib.compress(page))):
            self.assertEqual(self.direct('/large', body, headers={'Content-Encoding': packing}).kind, 'done', packing)

    def test_a_key_that_is_none_ends_it_at_once(self):
        for key in (b'', b'x' * 15, b'x' * 17, b'x' * 100_000):
            post = self.site.direct('hls_aes', size=4_000_000)
            self.site.add('127.0.0.1', urlsplit(post).path[:-5] + '.key', key, 'application/octet-stream')
            began = time.thread_time()
            self.assert_ends(self.fetch(post, config=self.direct_config()), 'retry', 'bad_media')
            self.assertLess(time.thread_time() - began, 5)  # in Python: half a minute, and deaf to a stop

    def test_a_fragment_without_end_is_not_read_into_memory(self):
        post = self.site.direct('hls', size=4_000_000)
        with unittest.mock.patch.object(v, 'LARGEST_FRAGMENT', 100_000):
            self.assert_ends(self.fetch(post, config=self.direct_config()), 'give_up', 'unsupported')
        self.assertEqual(self.fetch(post, config=self.direct_config()).kind, 'done')

    def test_a_title_of_endless_marks_delays_nothing(self):
        info = {'title': 'a' + '\u0301\u0323' * 30_000, 'id': 'x'}
        file = self.folder / 'x.mp4'
        file.write_bytes(movie())
        v.import_ytdlp(ytdlp_folder())
        for options in ([], ['--restrict-filenames']):
            attempt = self.attempt('https://www.tiktok.com/@a/video/1', options=options)
            began = time.thread_time()
            attempt.folder.post = v.post_facts(info, attempt.job.url)
            attempt._keep({'requested_downloads': [{'filepath': str(file)}]}, 1)
            self.assertLessEqual(len(attempt.folder.results[0]['names']['title']), v.LONGEST_TITLE)
            self.assertLess(time.thread_time() - began, 0.5, options)


class TestGuard(GuardTest):
    """No connection to anything that is not on the Internet, at any hop."""
    PRIVATE = (
        '127.0.0.1', '192.168.1.1', '169.254.169.254', '0.0.0.0', '::1', 'fe80::1', '::ffff:10.0.0.1', '2002:7f00:1::')

    def test_addresses_that_are_not_public_are_never_connected_to(self):
        for address in self.PRIVATE:
            url = 'http://%s/x.mp4' % (f'[{address}]' if ':' in address else address)
            with self.subTest(url=url):
                self.assert_ends(self.fetch(url, config=self.open_config), 'give_up', 'refused_address')
        self.assertEqual(self.connected, [])

    def test_it_is_the_address_connected_to_that_counts_not_the_name(self):
        for address in ('127.0.0.1', '10.0.0.1', '::1'):
            with self.resolve(address):
                outcome = self.fetch('http://cdn.example.com/x.mp4', config=self.open_config)
                self.assert_ends(outcome, 'give_up', 'refused_address')
        self.assertEqual(self.connected, [])

    def test_an_attempt_may_ask_the_database(self):
        attempt = self.attempt(self.site.tiktok())
        attempt.on_identity = lambda *_: sqlite3.connect(self.folder / 'x.db').close()
        self.assertEqual(attempt.run().kind, 'done')

    def test_a_channel_that_grows_is_no_post_that_is_here_already(self):
        asked = []
        for info in ({}, {'entries': []}):
            attempt = self.attempt('https://example.com/c')
            attempt.on_identity = lambda *post: asked.append(post)
            attempt._describe({'id': 'c', 'extractor_key': 'Some', **info})
        self.assertEqual(asked, [('example.com', 'c')])

    def test_redirects_segments_and_keys_are_checked_too(self):
        inside = 'http://127.0.0.2/x.ts'
        playlist = '#EXTM3U\n#EXT-X-TARGETDURATION:1\n%s#EXTINF:1,\n%s\n#EXT-X-ENDLIST\n'
        key = '#EXT-X-KEY:METHOD=AES-128,URI="http://127.0.0.2/key"\n'
        self.site.add('site.example.com', '/redirect.mp4', redirect=inside)
        for name, text in (('segment', playlist % ('', inside)), ('key', playlist % (key, 'seg.ts'))):
            self.site.add('site.example.com', f'/{name}.m3u8', text.encode(), 'application/vnd.apple.mpegurl')
        self.site.add('site.example.com', '/seg.ts', TINY_TS + b'\0' * (-len(TINY_TS) % 16), 'video/mp2t')
        with self.resolve('127.0.0.1'), self.trust('127.0.0.1'):
            for name in ('redirect.mp4', 'segment.m3u8', 'key.m3u8'):
                for options in ([], ['-N', '2']):
                    with self.subTest(name=name, options=options):
                        outcome = self.fetch(f'{self.named("site.example.com")}/{name}', '', options, self.open_config)
                        self.assert_ends(outcome, 'give_up', 'refused_address')
        self.assertEqual({host for host, _ in self.connected}, {'127.0.0.1'})
        self.assertEqual(self.finished(), {})

    def test_a_public_address_beside_a_private_one_may_be_used(self):
        self.site.add('both.example.com', '/x.mp4', movie(), 'video/mp4')
        with self.resolve('10.0.0.1', '127.0.0.1'), self.trust('127.0.0.1'):
            outcome = self.fetch(self.named('both.example.com') + '/x.mp4', config=self.open_config)
        self.assertEqual(outcome.kind, 'done', outcome)
        self.assertEqual({host for host, _ in self.connected}, {'127.0.0.1'})

    def test_what_a_dns_filter_hides_is_passing_and_never_connected_to(self):
        for address, host, reason in (
                ('0.0.0.0', 'www.tiktok.com', 'filtered'), ('::', 'www.tiktok.com', 'filtered'),
                ('198.18.0.7', 'cdn.example.com', 'filtered'), ('192.168.1.1', 'www.instagram.com', 'filtered'),
                ('192.168.1.1', 'cdn.example.com', 'refused_address')):
            with self.subTest(address=address, host=host), self.resolve(address):
                outcome = self.fetch(f'http://{host}/x.mp4', config=self.open_config)
                self.assert_ends(outcome, 'give_up' if reason == 'refused_address' else 'retry', reason)
                self.assertIn(f'{host} is {address}', outcome.message)
        self.assertEqual(self.connected, [])

    def test_this_machine_and_its_neighbours_are_refused_by_their_global_addresses_too(self):
        self.assertIn(ipaddress.ip_network('127.0.0.0/8'), v.own_networks())
        own = [ipaddress.ip_network('11.22.33.0/24'), ipaddress.ip_network('2a01:4f8:1:2::/64')]
        for address, refused in (
                ('11.22.33.44', True), ('11.22.34.1', False), ('::ffff:11.22.33.1', True), ('64:ff9b::b16:2101', True),
                ('2a01:4f8:1:2::9', True), ('2a01:4f8:1:3::9', False)):
            reach = self.attempt(tiktok_link(1), config=self.open_config).reach
            with unittest.mock.patch.object(v, 'own_networks', lambda: own):
                self.assertEqual(reach.allows(address, 443), not refused, address)
                self.assertEqual(v.is_on_link(address), address == '2a01:4f8:1:2::9', address)

    def test_the_proxy_is_the_one_of_the_configuration_and_nothing_beside_it(self):
        post = self.site.direct()
        environment = {name: 'http://127.0.0.1:1' for name in ('http_proxy', 'https_proxy', 'ALL_PROXY')}
        with unittest.mock.patch.dict(os.environ, environment):
            self.assertEqual(self.fetch(post, config=self.direct_config()).kind, 'done')
        port = int(self.site.proxy.rpartition(':')[2])
        attempt = self.attempt(tiktok_link(1), config=self.config(downloader={'proxy': f'http://localhost:{port}'}))
        with socket.create_server(('127.0.0.1', 0)) as other, v.within(attempt.reach):
            socket.create_connection(('localhost', port)).close()
            for address in (other.getsockname(), ('127.0.0.1', 22), ('8.8.8.8', port), ('127.0.0.2', port)):
                with self.assertRaises((v.Ending, OSError)), socket.socket() as plain:
                    plain.connect(address)
                with self.assertRaises((v.Ending, OSError)):
                    socket.create_connection(address)
        self.assertEqual({port for _, port in self.connected}, {port, int(self.site.http.rpartition(':')[2])})

    def test_with_a_proxy_address_literals_and_bare_names_are_refused_at_each_hop(self):
        config = self.config(security={'allowed_domains': '*'})
        self.site.requests.clear()
        for target in ('127.0.0.1', '8.8.8.8', '[::ffff:7f00:1]', '2130706433', '127.1', '0177.0.0.1', 'localhost.',
                       'router', 'nas.local', 'x@127.0.0.1', '10.0.0.1', '169.254.169.254', '[::1]', 'localhost'):
            post = self.site.direct(host='www.example.com', page={'redirect': f'http://{target}/x.mp4'})
            with self.subTest(target=target):
                self.assert_ends(self.fetch(post, config=config), 'give_up', 'refused_address')
        self.assertEqual(len(set(self.connected)), 1)  # the proxy, which is the owner's choice
        self.assertFalse(self.site.asked('', '/x.mp4'))

    def test_ftp_and_files_are_out_of_reach(self):
        for target in ('ftp://127.0.0.1/x.mp4', 'file:///etc/passwd', 'ftp://ftp.example.com/x.mp4'):
            post = self.site.direct(page={'redirect': target})
            with self.trust('127.0.0.1'):
                outcome = self.fetch(post, options=['-R', '0'], config=self.open_config)
            if target.startswith('ftp') or self.number == 3:
                self.assertEqual((outcome.kind, outcome.reason), ('give_up', 'unsupported'), outcome)
            else:  # urllib takes it for an answer that leads nowhere
                self.assertEqual((outcome.reason, outcome.tries), ('http', 2))
        self.assertNotIn(21, [port for _, port in self.connected])

    def test_ffmpeg_and_others_are_never_given_a_url(self):
        v.import_ytdlp(ytdlp_folder())
        from yt_dlp.utils import Popen
        for args in (['ffmpeg', '-i', 'http://127.0.0.1/x'], ['ffprobe', 'tcp://127.0.0.1:1'], ['rtmpdump', '-r', 'x'],
                     ['phantomjs', 'x.js'], ['/usr/bin/curl', 'x'], ['sh', '-c', 'true'],
                     ['ffmpeg', '-i', 'concat:a|b'], [f'{self.output}/.incomplete/job1/ffmpeg']):
            with self.subTest(args=args), self.assertRaises(FileNotFoundError):
                with v.within(self.attempt('https://www.tiktok.com/@a/video/1', 'job1').reach):
                    Popen(args)

    @unittest.skipUnless(shutil.which('ffmpeg'), 'ffmpeg is not installed')
    def test_a_playlist_that_calls_itself_a_video_is_not_followed(self):
        (self.folder / 'secret.ts').write_bytes(TINY_TS)
        file, followed = self.folder / 'video.mp4', []
        for text in ('#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n',
                     'ffconcat version 1.0\nfile secret.ts\n'):
            file.write_text(text)
            for command in (['ffprobe', '-v', 'error', f'file:{file}'],
                            ['ffmpeg', '-v', 'error', '-i', f'file:{file}', '-c', 'copy', '-f', 'null', '-']):
                codes = [subprocess.run(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
                         for words in (command, v.local_only(command))]
                self.assertTrue(codes[1], (text, command))
                followed.append(codes[0] == 0)
        self.assertEqual(followed[2:], [True] * 2)  # ffmpeg 9 refuses the first kind on its own
        post = self.site.instagram(dash='h264')
        parts = [route for (_, path), route in self.site.routes.items() if post.id in path and path.endswith('.mp4')]
        for route in parts:
            route.set(body=f'#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{self.folder}/secret.ts\n'.encode())
        self.assert_ends(self.fetch(post), 'retry', 'crash')
        self.assertEqual([route.hits for route in parts], [0, 1, 1])
        self.assertEqual(self.finished(), {})

    def test_what_no_download_needs_is_refused_in_each_of_its_threads(self):
        attempt = self.attempt('https://www.tiktok.com/@a/video/1', config=self.open_config)
        attempt.folder.open()
        inside, outside = attempt.folder.path, self.folder / 'kept'
        outside.write_text('kept')
        (inside / 'there').write_text('')
        (inside / 'folder').mkdir()
        link, plain = inside / 'link', socket.socket()
        self.addCleanup(plain.close)
        refused = {
            'open': lambda: open(outside, 'w'), 'append': lambda: open(outside, 'a'),
            'os.open': lambda: os.open(outside, os.O_RDWR), 'relative': lambda: open(inside / '../../../kept', 'w'),
            'rename': lambda: os.rename(outside, inside / 'x'),
            'replace': lambda: os.replace(inside / 'there', outside), 'remove': lambda: os.remove(outside),
            'rmtree': lambda: shutil.rmtree(self.output), 'mkdir': lambda: (self.folder / 'new').mkdir(),
            'rmdir': lambda: os.rmdir(self.output), 'link': lambda: os.link(outside, link),
            'symlink': lambda: os.symlink(outside, link), 'truncate': lambda: os.truncate(outside, 0),
            'chmod': lambda: os.chmod(outside, 0), 'utime': lambda: os.utime(outside),
            'chdir': lambda: os.chdir(inside), 'sqlite': lambda: sqlite3.connect(str(self.folder / 'db')),
            'run': lambda: subprocess.run(['true']), 'shell': lambda: subprocess.run('ffmpeg -version', shell=True),
            'other name': lambda: subprocess.run(['ffmpeg', '-version'], executable='/bin/sh'),
            'system': lambda: os.system('true'), 'fork': lambda: os.fork() or os._exit(1),
            'spawn': lambda: os.posix_spawn('/bin/true', ['true'], {}),
            'exec': lambda: os.execv('/bin/false', ['false']), 'library': lambda: ctypes.CDLL('libm.so.6'),
            'bind': lambda: plain.bind(('127.0.0.1', 0)), 'datagram': lambda: plain.sendto(b'', ('192.0.2.1', 9)),
            'connect': lambda: plain.connect(('127.0.0.1', 9)), 'by name': lambda: plain.connect(('localhost', 9)),
            'mapped': lambda: plain.connect_ex(('::ffff:127.0.0.1', 9)),
            'unix': lambda: socket.socket(socket.AF_UNIX).connect('/run/x'),
            'ftp': lambda: urllib.request.urlopen('ftp://8.8.8.8/'),
            'file': lambda: urllib.request.urlopen('file:///etc/passwd'),
            'http': lambda: http.client.HTTPConnection('127.0.0.1').request('GET', '/')}

        def try_all(allowed):
            for name, call in refused.items():
                try:
                    call()
                    found.append(name)
                except (OSError, v.Ending):
                    pass
            try:
                open(inside / 'there', 'w').close()
                os.replace(inside / 'there', inside / 'folder' / 'new')
                os.replace(inside / 'folder' / 'new', inside / 'there')
            except OSError:
                allowed or found.append('')

        def raw_thread(allowed):
            done = threading.Event()
            _thread.start_new_thread(lambda: (try_all(allowed), done.set()), ())
            done.wait(20)
        for run, allowed in (
                (try_all, True), (lambda yes: ThreadPoolExecutor(1).submit(try_all, yes).result(), True),
                (raw_thread, False)):
            found: List[str] = []
            with v.within(attempt.reach):
                run(allowed)
            self.assertEqual(found, [''] * (not allowed))
        with v.within(self.attempt(tiktok_link(1), config=self.direct_config()).reach):  # private targets allowed
            self.assertRaises(PermissionError, refused['unix'])
        self.assertEqual((outside.read_text(), outside.stat().st_mode & 0o777, link.exists(), self.connected),
                         ('kept', 0o644, False, []))

    def test_a_live_stream_is_not_handed_to_ffmpeg(self):
        post = self.site.direct('hls')
        live = post.page.body.replace(b'#EXT-X-ENDLIST\n', b'')
        post.page.set(body=live)
        self.assert_ends(self.fetch(post, config=self.direct_config()), 'give_up', 'unsupported')
        self.assertEqual([route.hits for route in post.media], [0] * len(post.media))


class TestGuardImpersonated(Impersonated, TestGuard):
    """The same with impersonate=on, where curl_cffi asks for all pages: nothing is reached but by the door."""

    def test_pages_are_asked_for_as_a_browser_does_and_files_as_ever(self):
        for post in (self.site.tiktok(), self.site.instagram()):
            for number in (1, 2, 3):
                with self.subTest(post=post, number=number):
                    self.number = number
                    self.site.requests.clear()
                    self.assertEqual(self.fetch(post).kind, 'done')
                    found = self.by_curl()
                    self.assertEqual(any(found), number != 2)
                    self.assertFalse(found[-1])
                    agents = {request.headers['User-Agent'] for request in self.site.requests}
                    self.assertEqual(any('Firefox' in agent for agent in agents), number == 2)

    def test_each_proxy_is_passed_through(self):
        post = self.site.tiktok()
        self.site.requests.clear()
        self.assertEqual(self.fetch(post).kind, 'done')
        self.assertTrue(self.by_curl()[0])
        self.assertIn('www.tiktok.com:443', self.site.connects)
        self.assertEqual({port for _, port in self.connected}, {int(self.site.proxy.rpartition(':')[2])})

    def test_the_door_speaks_to_each_kind_of_proxy(self):
        host = b'www.example.com'
        for scheme, talk, login in (
                ('http', ((b'Proxy-Authorization: Basic dTpwQHM=\r\n', b'HTTP/1.1 200 OK\r\n\r\n'),), 'u:p%40s@'),
                ('socks5h', ((b'\5\1\0', b'\5\0'), (host + b'\1\xbb', b'\5\0\0\1\0\0\0\0\0\0')), ''),
                ('socks4a', ((b'\0\0\0\xff\0' + host, b'\0\x5a\0\0\0\0\0\0'),), '')):
            with self.subTest(scheme), socket.create_server(('127.0.0.1', 0)) as proxy:
                proxy.settimeout(20)
                url = f'{scheme}://{login}127.0.0.1:{proxy.getsockname()[1]}'
                reach = self.attempt(tiktok_link(1), config=self.config(downloader={'proxy': url})).reach

                def answer(talk=talk, proxy=proxy):
                    sock = proxy.accept()[0]
                    heard = []
                    for _, reply in talk:
                        heard.append(sock.recv(4096))
                        sock.sendall(reply)
                    with sock:
                        sock.sendall(sock.recv(7))
                        return heard
                heard = ThreadPoolExecutor(1).submit(answer)
                with v.within(reach), v.tunnel(reach, host.decode(), 443) as link:
                    link.sendall(b'through')
                    self.assertEqual(link.recv(7), b'through')
                for said, (wanted, _) in zip(heard.result(20), talk):
                    self.assertIn(wanted, said)
                with v.within(reach), self.assertRaises(v.Ending):
                    v.tunnel(reach, '127.0.0.1', 443)

    def test_a_stop_ends_what_curl_waits_for(self):
        for where in ({'fail': ['hang'] * 9}, {'body': HTML * 100, 'drip': 1},
                      {'body': b'6\r\n<html>\r\n' + b'2\r\nxy\r\n' * 1_000_000, 'headers': {
                          'Content-Length': None, 'Transfer-Encoding': 'chunked'}}):
            post = self.site.direct(host='www.example.com', page=where)
            attempt = self.attempt(post, config=self.config(security={'allowed_domains': '*'}))
            run = self.in_background(attempt)
            post.page.wait_hits()
            with in_time(1):
                attempt.stop('cancelled')
                self.assertEqual(run.wait().reason, 'cancelled')

    def test_a_large_page_does_not_fill_the_memory(self):
        page = b'<html>' * (v.LARGEST_PAGE // 5)
        config = self.config(security={'allowed_domains': '*'})
        for body, headers in ((page, {}), (gzip.compress(page * 8), {'Content-Encoding': 'gzip'})):
            self.site.add('www.example.com', '/large', body, headers=headers)
            outcome = self.fetch('https://www.example.com/large', config=config)
            self.assert_ends(outcome, 'give_up', 'unsupported')
            self.assertIn('a page has more than 8', outcome.message)
        for coding in ('zstd', 'gzip, br', 'gzip, gzip', ' ' * 200 + 'ZSTD', '\r\n zstd'):
            # libcurl would take 128 MB for each zstd
            self.site.add('www.example.com', '/coded', HTML, headers={'Content-Encoding': coding})
            self.assert_ends(self.fetch('https://www.example.com/coded', config=config), 'retry', 'network')
        self.assertNotIn('zstd', self.site.requests[-1].headers['Accept-Encoding'])

    def test_an_answer_that_nobody_reads_is_not_waited_for(self):
        self.site.add('www.example.com', '/never', HTML * 9, status=403, hold_at=5)
        with in_time(5):
            outcome = self.fetch('https://www.example.com/never', config=self.config(security={'allowed_domains': '*'}))
            self.assert_ends(outcome, 'retry', 'blocked', 3)
            gc.collect()

    def test_the_door_opens_only_to_an_attempt_that_runs(self):
        port, reach = v.open_door(), self.attempt(tiktok_link(1), config=self.open_config).reach
        secret = base64.b64encode(f'x:{reach.secret}'.encode()).decode()
        with self.resolve('127.0.0.1'), self.trust('127.0.0.1'), socket.create_server(('127.0.0.1', 0)) as site:
            here = f'a.example.com:{site.getsockname()[1]}'
            for line, login, opened in (
                    (f'CONNECT {here}', f'Basic {secret}', True), (f'CONNECT {here}', 'Basic', False),
                    (f'CONNECT {here}', 'Basic eDp5', False), (f'CONNECT {here}', 'Basic \xe9', False),
                    (f'CONNECT {here}/x', f'Basic {secret}', False), (f'GET http://{here}/', f'Basic {secret}', False)):
                with self.subTest(line=line, login=login), socket.create_connection(('127.0.0.1', port), 20) as link:
                    link.sendall(f'{line} HTTP/1.1\r\nHost: x\r\nProxy-Authorization: {login}\r\n\r\n'.encode())
                    with contextlib.suppress(ConnectionResetError):
                        self.assertEqual(link.recv(99), b'HTTP/1.1 200 OK\r\n\r\n' if opened else b'')
            idle = [socket.create_connection(('127.0.0.1', port), 20) for _ in range(80)]
            with socket.create_connection(('127.0.0.1', port), 20) as link:  # they cannot hold it for long
                link.sendall(f'CONNECT {here} HTTP/1.1\r\nProxy-Authorization: Basic {secret}\r\n\r\n'.encode())
                self.assertEqual(link.recv(12), b'HTTP/1.1 200')
            for link in idle:
                link.close()
            reach.stop('cancelled')
            with socket.create_connection(('127.0.0.1', port), 20) as link, contextlib.suppress(ConnectionResetError):
                link.sendall(f'CONNECT {here} HTTP/1.1\r\nProxy-Authorization: Basic {secret}\r\n\r\n'.encode())
                self.assertEqual(link.recv(12), b'')


class TestImpersonate(DaemonTest):
    """A page that answers only to a browser's fingerprint; curl_cffi has one."""
    settings = {'downloader': {'impersonate': 'on'}, 'security': {'allowed_domains': '*'}}

    @classmethod
    def setUpClass(cls) -> None:
        vendored_curl()
        super().setUpClass()

    def test_with_it_the_third_attempt_is_a_browsers_and_completes(self):
        post = self.site.direct(host='www.example.com')
        video, fine = post.page.body, (200, {'Content-Type': 'video/mp4'})
        page = self.site.add('www.example.com', '/post', lambda request: (
            (*fine, HTML.replace(b'Something', f'<video src="{post}"></video>'.encode()))
            if 'Sec-Ch-Ua' in request.headers else (403, {}, HTML)))
        fine[1]['Content-Type'] = 'text/html'
        row = self.daemon.download('https://www.example.com/post')
        self.assertEqual((row['retry_count'], page.hits), (2, 3))
        self.assertEqual([file['size'] for file in row['files']], [len(video)])
        self.assertIn(b'way="impersonated",outcome="done"', self.daemon.client.get('/metrics').json)

    def test_without_it_the_sentence_and_doctor_name_it(self):
        daemon = self.new_daemon()
        row = daemon.fails(self.site.tiktok(state='login'))
        self.assertIn(' Or set impersonate=on. Tried 2 times.', row['error_message'])
        self.assertRegex(daemon.run('doctor').stdout, 'BAD .* turned away this week: 1\n.*impersonate=on')


class TestAlone(DownloadTest):
    """yt-dlp in a process of its own: what is imported, and what it costs."""

    def test_only_the_vendored_copy_and_python_itself_are_used(self):
        program, extra = self.folder / 'beside' / 'videoserverd.py', self.folder / 'site-packages'
        for folder in (program.parent, extra):
            folder.mkdir()
            (folder / 'requests.py').write_text('raise SystemExit("used")')
        shutil.copy(v.PROGRAM, program)
        with unittest.mock.patch.object(v, 'PROGRAM', program):
            found = self.said('''
                v.import_ytdlp(Path(sys.argv[4]))
                import yt_dlp, yt_dlp.networking._urllib, yt_dlp.dependencies
                say(yt_dlp.__file__)
                say([path for path in sys.path[1:] if 'packages' in path or path in ('', sys.argv[1])])
                say([name for name in sys.modules if 'packages' in str(getattr(sys.modules[name], '__file__', ''))])
                say(os.environ['YTDLP_NO_PLUGINS'], yt_dlp.dependencies.certifi, yt_dlp.dependencies.requests)
                ''', env={'PYTHONPATH': str(extra)})
        self.assertEqual(Path(found[0]).parent.parent, ytdlp_folder())
        self.assertEqual(found[1:], ['[]', '[]', '1 None None'])

    def test_a_damaged_copy_pauses_the_queue_and_the_next_one_is_used(self):
        post = self.site.tiktok()
        bad = self.folder / 'bad'
        shutil.copytree(ytdlp_folder() / 'yt_dlp', bad / 'yt_dlp', ignore=shutil.ignore_patterns('extractor', '*.pyc'))
        found = self.said(f'''
            good = sys.argv[4]
            sys.argv[4] = {str(bad)!r}
            logging.disable()
            say(*attempt({str(post)!r}).run()[:2])
            sys.argv[4] = good
            say(attempt({str(post)!r}).run().kind)
            say([name for name in sys.modules if {str(bad)!r} in str(getattr(sys.modules[name], '__file__', ''))])
            ''')
        self.assertEqual(found, ['pause ytdlp', 'done', '[]'])

    def test_yt_dlp_costs_little_memory_and_no_more_with_each_download(self):
        posts = [str(self.site.tiktok(size=2_000_000, pictures=at % 2 * 5)) for at in range(8)]
        found = self.said(f'''
            say(rss())
            for number, url in enumerate({posts!r}):
                assert attempt(url, f'job{{number}}').run().kind == 'done'
                say(rss())
            ''')
        figures = list(map(float, found))
        # Importing yt_dlp alone takes 12.3 MB on Python 3.11, 16.1 on 3.14, 16.3 on 3.15: larger code objects.
        self.assertLess(figures[-1] - figures[0], 18 if sys.version_info < (3, 14) else 21.5)
        self.assertLess(figures[-1] - figures[3], 2)


# ---------- vendor ------------------------------------------------------------------------

class TestVendor(WithIndex):
    """yt-dlp stays fresh: fetched, checked, tried out, switched, rolled back; against a fake index."""

    def test_newest_release_that_this_python_can_run_is_taken(self) -> None:
        self.index.add('9999.1.1')
        self.index.add('9999.1.10')
        self.index.add('9999.1.9')
        self.index.add('9999.2.2.232701.dev0')
        self.index.add('9999.3.3', yanked=True)
        self.index.add('9999.4.4', requires='>=99')
        self.assertIsNone(self.vendor.current())
        self.assertEqual(self.vendor.last_checked(), 0)
        began = time.time()
        self.assertEqual(self.vendor.install(), '9999.1.10')
        self.assertEqual(self.vendor.current(), self.folder / '9999.1.10')
        self.assertEqual(self.leftovers(), ['9999.1.10'])
        self.assertTrue(began - 1 <= self.vendor.last_checked() <= time.time() + 1)
        self.assertRegex(self.vendor.held_back(), r'yt-dlp 9999\.4\.4 needs Python >=99, and this is Python 3')

    def test_a_python_left_behind_is_held_back_without_any_network(self) -> None:
        told = v.Vendor(self.folder).held_back()
        if sys.version_info >= (3, 11):
            self.assertIsNone(told)
        else:
            self.assertIn(f'yt-dlp now needs Python >=3.11, and this is Python {v.PYTHON}', told)

    def test_pip_fetches_where_there_is_one_and_the_program_itself_where_there_is_none(self) -> None:
        self.install('9999.1.1')
        self.assertEqual(self.index.fetched('9999.1.1'), ['videoserverd'])
        self.with_pip()
        self.install('9999.1.2')
        self.assertEqual(self.index.fetched('9999.1.2'), ['pip'])

    def test_a_pip_that_lies_where_somebody_called_us_is_not_run(self) -> None:
        folder = new_folder()
        for name in ('pip', 'compileall'):
            (folder / f'{name}.py').write_text(f'open({str(folder / "ran")!r}, "a").write({name!r})')
        self.with_pip()
        self.index.add('9999.1.1')
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder)
        self.assertEqual(self.vendor.install(), '9999.1.1')
        self.assertFalse((folder / 'ran').exists())

    def test_a_wheel_that_was_published_damaged_is_a_broken_release(self) -> None:
        wheel = self.folder / 'a.whl'
        with zipfile.ZipFile(wheel, 'w', zipfile.ZIP_DEFLATED) as archive:
            archive.writestr('yt_dlp/__init__.py', os.urandom(2000).hex())
        whole = wheel.read_bytes()
        for at in range(40, 2000, 7):
            wheel.write_bytes(whole[:at] + b'\xff' * 9 + whole[at + 9:])
            with self.assertRaises(v.BrokenRelease):
                v.unpack(wheel, self.folder / 'tree', v.YTDLP)

    def test_a_wrong_hash_is_refused_and_nothing_changes(self) -> None:
        self.install('9999.1.1')
        self.index.add('9999.2.2', wrong_hash=True)
        for prepare in (lambda: None, self.with_pip):
            prepare()
            with self.assertRaisesRegex(v.Trouble, r'9999\.2\.2 does not have the SHA-256'):
                self.vendor.install()
            self.assertEqual(self.vendor.version(), '9999.1.1')

    def test_a_broken_release_is_not_used_and_not_fetched_again(self) -> None:
        self.install('9999.1.1')
        self.index.add('9999.2.2', BROKEN)
        with self.assertLogs('videoserverd', 'WARNING') as logs:
            self.assertEqual(self.vendor.install(), '9999.1.1')
        self.assertIn('9999.2.2 does not work here', logs.output[0])
        self.assertIn('a_module_that_is_not_there', logs.output[0])
        self.assertEqual(self.vendor.install(), '9999.1.1')
        self.assertEqual(len(self.index.fetched('9999.2.2')), 1)
        self.install('9999.3.3')
        self.assertEqual(self.leftovers(), ['9999.1.1', '9999.3.3'])

    def test_where_the_newest_is_broken_the_one_before_is_taken(self) -> None:
        self.index.add('9999.1.1')
        self.index.add('9999.2.2', BROKEN)
        with self.assertLogs('videoserverd', 'WARNING'):
            self.assertEqual(self.vendor.install(), '9999.1.1')

    def test_an_index_that_has_fallen_behind_takes_nothing_back(self) -> None:
        self.install('9999.2.2')
        del self.index.files['9999.2.2']
        self.index.add('9999.1.1')
        self.assertEqual(self.vendor.install(), '9999.2.2')
        self.vendor.pointer.unlink()
        self.assertEqual(self.vendor.install(), '9999.2.2')

    def test_roll_back_to_the_last_good_one(self) -> None:
        for version in ('9999.1.1', '9999.2.2'):
            self.install(version)
        self.assertIsNone(self.vendor.roll_back('9999.1.1'))  # `update` has replaced it while we waited for the lock
        self.assertEqual(self.vendor.roll_back('9999.2.2'), '9999.1.1')
        self.assertEqual(self.vendor.install(), '9999.1.1')  # the broken one is remembered …
        self.assertIsNone(self.vendor.roll_back('9999.1.1'))  # … and there is nothing further back
        self.index.add('9999.3.3')
        self.assertEqual(self.vendor.install(), '9999.3.3')  # … until a newer one comes

    def test_the_last_good_one_is_kept_and_so_is_what_another_python_uses(self) -> None:
        for version in ('9999.1.1', '9999.1.2', '9999.1.3', '9999.1.4'):
            self.install(version)
            if version == '9999.1.1':
                shutil.copy(self.folder / f'current-{v.PYTHON}', self.folder / 'current-2.7')
        self.assertEqual(self.leftovers(), ['9999.1.1', '9999.1.3', '9999.1.4', 'current-2.7'])

    def test_an_installation_killed_at_any_moment_leaves_the_old_one(self) -> None:
        self.install('9999.1.1')
        self.index.add('9999.2.2')
        self.index.stall.clear()
        child = self.child()
        wait_until(lambda: self.index.fetched('9999.2.2'))
        child.kill()
        child.wait()
        self.assertEqual(self.vendor.version(), '9999.1.1')
        self.assertEqual(self.leftovers(), ['.new', '9999.1.1'])
        self.index.stall.set()
        for delay in (0.1, 0.2, 0.3):
            child = self.child()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(delay)
            child.kill()
            child.wait()
            self.assertIn(self.vendor.version(), ('9999.1.1', '9999.2.2'))
            self.assertEqual(v.try_out(self.vendor.current(), self.vendor.version()), '')
        self.assertEqual(self.vendor.install(), '9999.2.2')
        self.assertEqual(self.leftovers(), ['9999.1.1', '9999.2.2'])

    def test_two_processes_install_once(self) -> None:
        self.index.add('9999.1.1')
        children = [self.child(), self.child()]
        self.assertEqual([child.wait(fair(20)) for child in children], [0, 0])
        self.assertEqual(stat.S_IMODE((self.folder / '.lock').stat().st_mode), 0o600)  # nobody else can hold it
        self.assertEqual(len(self.index.fetched('9999.1.1')), 1)
        self.assertEqual(self.vendor.version(), '9999.1.1')

    def test_a_damaged_release_is_fetched_again(self) -> None:
        self.install('9999.1.1')
        (self.folder / '9999.1.1/yt_dlp/__init__.py').write_bytes(b'\0' * 300)
        self.assertEqual(self.vendor.install(), '9999.1.1')
        self.assertEqual(len(self.index.fetched('9999.1.1')), 2)
        self.assertEqual(v.try_out(self.folder / '9999.1.1', '9999.1.1'), '')

    def test_a_wheel_puts_nothing_outside_its_folder(self) -> None:
        link = zipfile.ZipInfo('yt_dlp/link.py')
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        evil = ['../evil.py', '/evil.py', 'yt_dlp/../evil.py', 'yt_dlp/../../../evil.py', 'yt_dlp/a//evil.py',
                'evil.py', 'os/evil.py', 'evil.pth', 'yt_dlp-1.data/data/evil.py', 'yt_dlp\\evil.py', 'yt_dlp/.evil.py']
        self.index.add('9999.1.1', more=[(link, '/etc/passwd')] + [(name, 'evil = 1\n') for name in evil])
        self.vendor.install()
        self.assertEqual(sorted(path.name for path in (self.folder / '9999.1.1').iterdir()),
                         ['yt_dlp', 'yt_dlp-9999.1.1.dist-info'])
        self.assertEqual([path for path in self.folder.rglob('*') if 'evil' in path.name or path.is_symlink()], [])
        self.assertEqual([path for path in self.folder.parent.glob('evil*')], [])

    def test_a_copied_in_yt_dlp_is_used_unless_it_is_unsafe(self) -> None:
        make = io.BytesIO(make_wheel('9999.1.1', STUB))
        zipfile.ZipFile(make).extractall(self.folder)
        self.assertEqual((self.vendor.current(), self.vendor.version()), (self.folder, '9999.1.1'))
        self.install('9999.2.2')
        self.assertEqual((self.vendor.roll_back(self.vendor.state()['version']), self.vendor.current()),
                         ('9999.1.1', self.folder))
        (self.folder / 'yt_dlp/version.py').write_text("__version__ = '2026.07.03'\n")
        self.assertEqual(self.vendor.current() is None, sys.version_info >= (3, 10))

    def test_a_pointer_of_rubbish_costs_nothing(self) -> None:
        self.install('9999.1.1')
        for rubbish in (b'', b'\0' * 99, b'[]', b'{"version": "9999.7.7"}', b'{"version": "..'):
            (self.folder / f'current-{v.PYTHON}').write_bytes(rubbish)
            self.assertEqual(self.vendor.version(), '9999.1.1', rubbish)
            self.assertEqual(self.vendor.install(), '9999.1.1')

    def test_requires_python(self) -> None:
        fits = ['', '>=3.9', '>=3.11', '>=3.11.7', '>= 3.9, < 3.12', '<4', '!=3.10.*,>=3.9']
        not_so = ['>=3.11.8', '<3.11', '<3.11.7', '>=99', '>=3.9,<3.11.7', '>=3.12,<4', '<3']
        self.assertEqual([spec for spec in fits + not_so if v.runs_here(spec, (3, 11, 7))], fits)

    def test_a_power_cut_leaves_no_half_release_under_the_pointer(self) -> None:
        self.index.add('9999.1.1')
        calls: List[str] = []

        def noted(name: str) -> Any:
            call = getattr(os, name)

            def wrapper(*args: Any) -> Any:
                named = name == 'replace' and Path(args[0]).is_file() and '9999' in json.loads(
                    Path(args[0]).read_text()).get('version', '')
                calls.append('names it' if named else f'{name} {Path(args[-1]).name}' if name == 'replace' else name)
                return call(*args)
            return unittest.mock.patch.object(os, name, wrapper)
        with noted('sync'), noted('fsync'), noted('replace'):
            self.vendor.install()
        self.assertIn(['sync', 'replace 9999.1.1', 'fsync', 'names it'], [calls[at:at + 4] for at in range(len(calls))])
        self.assertEqual(calls.index('names it') - calls.index('replace 9999.1.1'), 2)

    def test_the_real_yt_dlp_relabelled_is_whole_compiled_and_works(self) -> None:
        self.with_pip()
        files = real_files()
        self.index.add('9999.1.1', files)
        with unittest.mock.patch.object(v, 'TRY_OUT', REAL_TRY_OUT):
            self.assertEqual(self.vendor.install(), '9999.1.1')
        self.assertEqual(self.index.fetched('9999.1.1'), ['pip'])
        compiled = list((self.folder / '9999.1.1/yt_dlp').rglob(f'*.{sys.implementation.cache_tag}.pyc'))
        self.assertEqual(len(compiled), len(files))

    def test_a_release_with_which_a_guard_does_not_hold_is_broken(self) -> None:
        root, version = self.folder / 'copy', '9999.1.1'
        unpack_compiled(version, some_files(), root)
        urllib, fragment = 'networking/_urllib.py', 'downloader/fragment.py'
        for name, changes, why in (
                (urllib, {  # three imports by other names: the hook sees what they do all the same
                    r'(\n    )(FTPHandler|create_connection),': r'\1\2 as other_\2,',
                    r'([ =])(create_connection|FTPHandler)\(': r'\1other_\2(',
                    '(= )(create_connection)\n': r'\1other_\2\n', r'\bselect_proxy\b(?!,)': 'choose',
                    'normalize_url, choose': 'normalize_url, select_proxy as choose'}, ''),
                (urllib, {r'zlib\.decompress\(data, wbits=(.*)\)':
                          r'zlib.decompressobj(wbits=\1).decompress(data)'}, '/packed ends with'),
                (urllib, {r'self\.fp\.read\(amt\)':
                          'b"".join(iter(lambda: self.fp.read(9999), b""))'}, '/page ends with'),
                (fragment, {'_write_ytdl_file': '_write_state'}, 'ends with ytdlp'),
                (fragment, {r'self\._write_ytdl_file': 'self._write_state',
                            r'def _write_ytdl_file': 'def _write_ytdl_file(self, ctx):\n        pass\n\n'
                                                     '    def _write_state'}, "{'write_index'}"),
                (fragment, {r'unpad_pkcs7\(aes_': 'unpad_pkcs7(__import__("yt_dlp.aes").aes.aes_'},
                 'openssl_decrypt'),
                ('downloader/http.py', {r'def real_download\(self, filename, info_dict\)':
                                        'def real_download(self, filename)'}, 'ends with site_changed'),
                ('downloader/hls.py', {'FFmpegFD(?=[.(])': '__import__("yt_dlp").downloader.FFmpegFD'},
                 'ends with crash'),
                ('utils/_utils.py', {r'time\.sleep\(delay\)': 'threading.Event().wait(delay)',
                                     '\nimport time\n': '\nimport time\nimport threading\n'},
                 "{'nap'}"),
                ('extractor/tiktok.py', {'class TikTokVMIE': 'class TikTokShortIE'},
                 'tiktok.com/@a/video/1 ends with')):
            file = root / 'yt_dlp' / name
            if 'nap' in why and sys.version_info < (3, 10):
                continue  # its last release, which no other one follows, never sleeps in the try-out
            before = text = file.read_text('utf-8')
            for there, then in changes.items():
                self.assertRegex(text, there)
                text = re.sub(there, then, text)
            file.write_text(text, 'utf-8')
            with self.subTest(name=name, why=why), unittest.mock.patch.object(v, 'TRY_OUT', REAL_TRY_OUT):
                found = v.try_out(root, version)
                self.assertTrue(why in found if why else not found, found)
            file.write_text(before, 'utf-8')

    def test_curl_cffi_is_fetched_where_it_is_wanted_and_only_what_belongs_to_it(self) -> None:
        self.index.add('9999.1.1')
        self.index.add_curl()
        self.vendor.install()
        self.assertFalse(self.vendor.lacks_curl())
        self.assertEqual([path for path, _ in self.index.asked if 'cffi' in path], [])
        self.vendor.impersonate = True
        self.assertTrue(self.vendor.lacks_curl())
        self.vendor.install()
        self.assertFalse(self.vendor.lacks_curl())
        self.assertIsNone(self.vendor.held_back())
        self.assertEqual(self.vendor.curl(), self.folder / '9999.1.1' / f'curl-{v.PYTHON}')
        files = [str(path.relative_to(self.vendor.curl())) for path in files_below(self.vendor.curl())
                 if '__pycache__' not in str(path)]
        self.assertEqual(sorted(files), ['_cffi_backend.so', 'curl_cffi-0.17.0.dist-info/METADATA',
                                         'curl_cffi/__init__.py'])
        self.assertEqual(self.leftovers(), ['9999.1.1'])

    def test_without_a_curl_cffi_for_this_machine_all_else_works_and_the_reason_is_told_once(self) -> None:
        self.vendor.impersonate = True
        elsewhere = {'tags': 'cp310-abi3-musllinux_1_2_x86_64'}
        for version, more, why in (('9999.1.1', elsewhere, 'there is no curl-cffi 0.17.0'),
                                   ('9999.1.2', {'text': 'broken'}, 'does not work here (the door is passed by)')):
            self.index.add(version)
            self.index.add_curl(**more)
            self.assertEqual(self.vendor.install(), version)
            self.assertIsNone(self.vendor.curl())
            self.assertIn(f'impersonate=on has no effect: {why}', self.vendor.held_back().replace(
                'curl-cffi 0.17.0 does', 'does'))
            self.index.asked.clear()
            self.vendor.install()
            self.assertEqual([path for path, _ in self.index.asked if 'cffi' in path], [])
        self.vendor.impersonate = False
        self.assertIsNone(self.vendor.held_back())

    def test_without_any_yt_dlp_nothing_is_asked_for_beside_it(self) -> None:
        self.vendor.impersonate = True
        self.assertFalse(self.vendor.lacks_curl())
        with self.assertRaisesRegex(v.Trouble, 'has no yt-dlp'):
            self.vendor.install()

    def test_a_curl_cffi_that_is_not_the_published_one_is_not_used(self) -> None:
        self.vendor.impersonate = True
        self.index.add('9999.1.1')
        self.index.add_curl(wrong_hash=True)
        with self.assertRaisesRegex(v.Trouble, 'curl-cffi 0.17.0 does not have the SHA-256'):
            self.vendor.install()
        self.assertEqual((self.vendor.version(), self.vendor.curl()), ('9999.1.1', None))
        self.assertTrue(self.vendor.lacks_curl())

    def test_which_wheels_this_machine_takes(self) -> None:
        minor = sys.version_info[1]
        for tags, machine, fits in (
                (f'cp3{minor}-cp3{minor}-manylinux1_i686.manylinux_2_5_i686', ('manylinux', 'i686'), True),
                ('cp39-abi3-manylinux_2_17_aarch64.manylinux2014_aarch64', ('manylinux', 'aarch64'), True),
                ('cp39-abi3-manylinux_2_28_armv7l.manylinux_2_31_armv7l', ('manylinux', 'armv7l'), True),
                ('cp39-abi3-manylinux_2_17_x86_64', ('manylinux', 'armv6l'), False),
                ('cp39-abi3-musllinux_1_2_x86_64', ('manylinux', 'x86_64'), False),
                ('cp39-abi3-manylinux_2_17_x86_64', ('macosx', 'x86_64'), False),
                ('cp39-abi3-macosx_11_0_arm64', ('macosx', 'arm64'), True),
                ('cp39-abi3-macosx_11_0_universal2', ('macosx', 'x86_64'), True),
                (f'cp3{minor + 1}-abi3-manylinux_2_17_x86_64', ('manylinux', 'x86_64'), False),
                (f'cp3{minor}-cp3{minor}t-manylinux_2_17_x86_64', ('manylinux', 'x86_64'), False),
                ('cp39-abi3-win_amd64', ('manylinux', 'x86_64'), False)):
            with self.subTest(tags=tags, machine=machine), unittest.mock.patch.object(
                    v, 'machine', unittest.mock.Mock(return_value=machine)):
                self.assertEqual(v.wheel_fits(f'curl_cffi-0.17.0-{tags}.whl'), fits)
        self.assertFalse(v.wheel_fits('curl_cffi-0.17.0.tar.gz'))

    def test_a_curl_cffi_with_which_the_door_does_not_hold_is_refused(self) -> None:
        real, root = vendored_curl(), self.folder / 'curl'
        shutil.copytree(real, root, ignore=shutil.ignore_patterns('*.so'))
        for library in real.rglob('*.so'):
            (root / library.relative_to(real)).symlink_to(library)
        with unittest.mock.patch.object(v, 'TRY_OUT', REAL_TRY_OUT):
            for name, there, then, why in (
                    ('session', 'c.perform()', 'type(c).perform.__wrapped__(c)', '/http.mp4 ends with network'),
                    ('utils', 'c.setopt(CurlOpt.WRITEFUNCTION, qput)',
                     'type(c).setopt.__wrapped__(c, CurlOpt.WRITEFUNCTION, qput)', 'video/1 ends with unsupported'),
                    ('utils', '', '', '')):
                file = root / 'curl_cffi/requests' / f'{name}.py'
                before = file.read_text('utf-8')
                self.assertIn(there, before)
                file.write_text(before.replace(there, then), 'utf-8')
                found = v.try_out(ytdlp_folder(), vendored(), root)
                self.assertTrue(why in found if why else not found, found)
                file.write_text(before, 'utf-8')

    def test_what_this_machine_lacks_is_no_fault_of_a_release(self) -> None:
        root, version = self.folder / 'copy', '9999.1.1'
        unpack_compiled(version, some_files(), root)
        with unittest.mock.patch.object(v, 'TRY_OUT', REAL_TRY_OUT), \
                unittest.mock.patch.dict(os.environ, PATH=str(self.folder)):
            self.assertEqual(v.try_out(root, version), '')  # no openssl
        full = REAL_TRY_OUT.replace('gzip,', 'gzip\nv.free_space = lambda folder: -1\nimport', 1)
        with unittest.mock.patch.object(v, 'TRY_OUT', full), self.assertRaisesRegex(v.Trouble, 'make room'):
            v.try_out(root, version)

    def test_what_stands_in_the_way_is_one_line_that_says_what_to_do(self) -> None:
        with reserved() as nobody:
            self.vendor.index = f'http://127.0.0.1:{nobody.getsockname()[1]}'
            with self.assertRaisesRegex(v.Trouble, r'^[^\n]*refused[^\n]*connect this machine[^\n]*py update$'):
                self.vendor.install()
        self.assertEqual(self.vendor.last_checked(), 0)
        self.vendor.index = self.index.url
        for releases in ([], {'9999.1.1': [{}]}, {'9999.1.1': 3}, None):
            self.index.files = releases
            with self.assertRaises(v.Trouble):
                self.vendor.install()
        (self.folder / 'file').write_text('')
        with self.assertRaisesRegex(v.Trouble, 'cannot be stored in .*/file/vendor'):
            v.Vendor(self.folder / 'file/vendor', self.index.url).install()
        with Standin() as site, self.assertRaisesRegex(v.Trouble, '404'):
            v.fetch_url(site.http + '/nowhere')


class TestFreshness(FreshnessTest):
    """What the daemon's thread `care` does about yt-dlp; no daemon needed."""

    def test_curl_cffi_is_fetched_soon_where_it_is_switched_on_and_then_loaded(self) -> None:
        fresh, now = self.installed('9999.1.1'), time.time()
        self.assertFalse(fresh.step(now))
        self.index.add_curl()
        self.vendor.impersonate = True
        self.assertTrue(fresh.step(now))
        self.assertIsNotNone(self.vendor.curl())
        with unittest.mock.patch.dict(v.IMPORTED, curl=True):
            self.assertFalse(fresh.step(now))

    def test_hourly_when_a_site_changed_weekly_otherwise_and_ever_later_after_failures(self) -> None:
        hour, now = 3600, 1.8e9
        for age, site_changed, due in ((hour - 1, True, False), (hour, True, True), (25 * hour, False, False),
                                       (167 * hour, False, False), (169 * hour, False, True), (-23 * hour, True, False),
                                       (-25 * hour, False, True), (now, False, True)):
            self.assertEqual(v.update_due(now, now - age, site_changed), due, (age, site_changed))
        for failures, gap in ((1, 60), (2, 300), (3, 900), (4, 3600), (99, 3600)):
            self.assertFalse(v.update_due(now, 0, False, failures, now - gap + 1))
            self.assertTrue(v.update_due(now, 0, False, failures, now - gap))
        self.assertTrue(v.update_due(now, 0, False, 1, now + 5))  # the clock was set back

    def test_a_missing_one_is_fetched_even_with_auto_update_off(self) -> None:
        self.index.add('9999.1.1')
        self.assertFalse(self.freshness(automatic=False).step(time.time()))
        self.assertEqual(self.vendor.version(), '9999.1.1')
        self.index.add('9999.2.2')
        self.freshness(automatic=False).step(time.time() + 8 * v.DAY)
        self.assertEqual(self.vendor.version(), '9999.1.1')

    def test_site_changed_brings_the_new_one_within_the_day_and_asks_for_a_re_execution(self) -> None:
        fresh, now = self.installed('9999.1.1'), time.time()
        self.index.add('9999.2.2')
        fresh.heard('tiktok.com', v.Outcome('retry', 'site_changed'))
        self.assertFalse(fresh.step(now))
        self.assertTrue(fresh.step(now + v.HOUR + 9))
        self.assertEqual(self.vendor.version(), '9999.2.2')
        self.assertFalse(fresh.site_changed)
        v.IMPORTED['folder'] = self.vendor.current()
        self.assertFalse(fresh.step(now + v.DAY + 9))

    def test_only_what_fails_on_several_sites_that_worked_before_is_rolled_back(self) -> None:
        changed, internal, done = v.Outcome('retry', 'site_changed'), v.Outcome('retry', 'internal'), v.Outcome('done')
        two, others = ('tiktok.com', 'instagram.com'), ('evil.example', 'worse.example', 'tiktok.com')
        self.installed('9999.1.1', '9999.2.2')
        as_installed = shutil.copytree(self.vendor.folder, new_folder() / 'vendor')
        for heard, rolled_back in (
                ([(site, changed) for site in two], True), ([(site, internal) for site in two] * 9, False),
                ([(two[0], changed)] * 9, False), ([(site, changed) for site in others], False),
                ([(two[0], v.Outcome('retry', 'bad_media')), (two[1], v.Outcome('retry', 'crash'))], True),
                ([(two[0], done), (two[0], changed), (two[1], changed)], False),
                ([(site, v.Outcome('retry', 'network')) for site in two], False)):
            shutil.rmtree(self.vendor.folder)
            shutil.copytree(as_installed, self.vendor.folder)
            v.IMPORTED['folder'] = self.vendor.current()
            fresh = self.freshness()
            for site, outcome in heard:
                fresh.heard(site, outcome)
            with self.subTest(heard=heard):
                self.assertEqual(fresh.step(self.vendor.last_checked()), rolled_back)
                self.assertEqual(self.vendor.version(), '9999.1.1' if rolled_back else '9999.2.2')
                self.assertEqual(self.vendor.state().get('sites', []), sorted(two) if rolled_back else
                                 ['tiktok.com'] if done in dict(heard).values() or heard[0][1] is done else [])

    def test_what_fails_with_the_older_release_as_well_is_not_the_newer_ones_fault(self) -> None:
        changed, now = v.Outcome('retry', 'site_changed'), time.time()
        self.installed('9999.1.1', '9999.2.2')

        def both_fail(*worked: str) -> str:
            """What is in use after both sites have failed in a new process, and an hour."""
            v.IMPORTED['folder'], fresh = self.vendor.current(), self.freshness()
            for site in ('tiktok.com', 'instagram.com'):
                fresh.heard(site, changed)
            for site in worked:
                fresh.heard(site, v.Outcome('done'))
            before = self.vendor.version()
            self.assertEqual(fresh.step(now + v.HOUR + 9), self.vendor.version() != before)
            return self.vendor.version()
        self.assertEqual([both_fail() for _ in range(4)], ['9999.1.1', '9999.2.2'] * 2, 'neither works')
        self.assertEqual([both_fail(), both_fail('tiktok.com')], ['9999.1.1'] * 2, 'the older one works')
        self.assertEqual(self.vendor.state()['bad'], ['9999.2.2'])

    def test_a_bad_mark_ends_with_the_next_release(self) -> None:
        self.installed('9999.1.1', '9999.2.2')
        self.assertEqual(self.vendor.roll_back('9999.2.2'), '9999.1.1')
        self.assertEqual(self.vendor.install(), '9999.1.1')
        self.index.add('9999.3.3', BROKEN)
        with self.assertLogs('videoserverd', 'WARNING'):
            self.assertEqual(self.vendor.install(), '9999.2.2')
        self.assertEqual(self.vendor.state()['bad'], ['9999.3.3'])

    def test_a_pre_release_is_taken_where_the_owner_wants_it(self) -> None:
        changed, now = v.Outcome('retry', 'site_changed'), time.time()
        for channel, site_changed, newer, taken in (
                ('stable', True, '', '9999.1.1'), ('auto', False, '', '9999.1.1'), ('nightly', False, '', '9999.5.5.7'),
                ('auto', True, '', '9999.5.5.7'), ('auto', True, '9999.3.3', '9999.3.3')):
            shutil.rmtree(self.vendor.folder)
            self.index.files.clear()
            fresh = self.installed('9999.1.1', channel=channel)
            self.index.add('9999.5.5.7.dev0')
            if newer:
                self.index.add(newer)
            if site_changed:
                fresh.heard('tiktok.com', changed)
            with self.subTest(channel=channel, site_changed=site_changed, newer=newer):
                fresh.step(now + (8 * v.DAY if channel == 'nightly' else 1))
                self.assertEqual(self.vendor.version(), taken)
        self.index.add('9999.5.6')  # final ones again, once there is a newer one
        self.vendor.install('auto')
        self.index.add('9999.5.7.1.dev0')
        self.assertEqual(self.vendor.install(), '9999.5.6')

    def test_one_that_cannot_be_imported_is_tried_out_and_fetched_again(self) -> None:
        fresh, now = self.installed('9999.1.1'), time.time()
        (self.vendor.folder / '9999.1.1/yt_dlp/__init__.py').write_text('raise ImportError')
        fresh.heard('tiktok.com', v.Outcome('pause', 'ytdlp'))
        fresh.step(now)
        self.assertEqual((v.try_out(self.vendor.current(), '9999.1.1'), fresh.unusable), ('', False))

    def test_what_an_old_import_does_is_not_blamed_on_the_new_release(self) -> None:
        fresh = self.installed('9999.1.1')
        v.IMPORTED['folder'] = self.installed('9999.2.2') and self.vendor.folder / '9999.1.1'
        for site in ('tiktok.com', 'instagram.com'):
            fresh.heard(site, v.Outcome('retry', 'crash'))
        self.assertTrue(fresh.step(time.time()))
        self.assertEqual(self.vendor.version(), '9999.2.2')

    def test_an_installation_that_hangs_is_ended(self) -> None:
        self.index.add('9999.1.1')
        fresh = self.freshness()
        with self.vendor.locked(), unittest.mock.patch.object(v, 'HELPER_TIMEOUT', 1):
            thread = threading.Thread(target=fresh.step, args=(time.time(),))
            thread.start()
            thread.join(fair(10))
            self.addCleanup(fresh.stop)
            self.assertFalse(thread.is_alive())
        self.assertEqual(fresh.trouble, 'the update of yt-dlp was stopped')

    def test_stop_ends_an_installation_with_all_its_processes(self) -> None:
        self.index.add('9999.1.1', {**STUB, '__init__.py': 'import time\ntime.sleep(60)\n'})
        fresh = self.freshness()
        thread = threading.Thread(target=fresh.step, args=(time.time(),))
        thread.start()
        wait_until(lambda: list(self.vendor.folder.glob('.new/tree/yt_dlp/__pycache__')))
        with in_time(1):
            fresh.stop()
            thread.join(fair(10))
        self.assertEqual(fresh.trouble, 'the update of yt-dlp was stopped')


# ---------- new releases ------------------------------------------------------------------
# New releases of yt-dlp on the real daemon: nobody is refused, nothing is lost.

class TestFreshDaemon(FreshDaemonTest):
    """A new yt-dlp comes into use by itself, a broken one goes out of use by itself."""

    def test_a_new_release_is_taken_up_when_idle(self) -> None:
        self.index.add('9999.2.2', some_files(utils__networking=("'Accept-Language': 'en-us,en;q=0.5'",
                                                                 "'Accept-Language': 'en-us,en;q=0.2'")))
        self.index.stall.clear()
        daemon, post = self.fresh_daemon(some_files()), self.site.tiktok(size=900_000, hold_at=500_000)
        id = daemon.submit(post)
        post.media[0].wait_held()
        self.index.stall.set()
        wait_until(lambda: daemon.vendor.version() == '9999.2.2', 40)
        self.assertEqual((daemon.status(id)['status'], starts(daemon)), ('downloading', 1))
        post.media[0].release()
        daemon.wait_status(id, 'completed')
        wait_until(lambda: starts(daemon) == 2, 20)
        after = self.site.tiktok()
        daemon.download(after)
        self.assertEqual([post.page.requests[-1].headers['Accept-Language'][-3:],
                          after.page.requests[-1].headers['Accept-Language'][-3:]], ['0.5', '0.2'])
        self.assertEqual((daemon.health()['ytdlp_version'], starts(daemon)), ('9999.2.2', 2))

    def test_who_asks_for_an_update_need_not_wait_until_it_is_due(self) -> None:
        daemon = self.fresh_daemon(some_files(), checked=time.time(), env={'VIDEOSERVER_DOWNLOADER_AUTO_UPDATE': 'off'})
        self.index.add('9999.2.2', some_files())
        status, _, body = daemon.client.post('/api/v1/update')
        self.assertEqual((status, body['status']), (202, 'updating'))
        wait_until(lambda: daemon.vendor.version() == '9999.2.2', 40)

    def test_with_a_wrong_configuration_the_old_release_goes_on_downloading(self) -> None:
        daemon = self.fresh_daemon(some_files(), checked=time.time())
        daemon.download(self.site.tiktok())
        daemon.configure(server={'port': 'rubbish'})
        daemon.put('9999.2.2', some_files())
        wait_until(lambda: 'restart refused' in daemon.log(), 20)
        self.assertEqual((daemon.download(self.site.tiktok())['status'], starts(daemon)), ('completed', 1))
        self.assertRegex('\n'.join(daemon.health()['problems']), 'A restart was refused: .*rubbish')

    def test_without_a_network_it_runs_says_so_and_fetches_yt_dlp_when_it_can(self) -> None:
        self.index.json_is_there = False
        self.index.add('9999.1.1', some_files())
        daemon = self.fresh_daemon()
        id = daemon.submit(self.site.tiktok())
        problems = wait_until(lambda: [text for text in daemon.health()['problems'] if 'internet' in text], 10)
        self.assertRegex(problems[0], 'yt-dlp cannot be fetched: .* connect this machine to the internet.* update')
        self.assertEqual((daemon.health()['status'], daemon.status(id)['status']), ('degraded', 'queued'))
        self.index.json_is_there = True
        self.assertEqual(daemon.wait_status(id, 'completed', 60)['retry_count'], 0)
        wait_until(lambda: 'internet' not in str(daemon.health()['problems']), 10)

    def test_a_worker_that_hangs_beyond_cancel_is_ended_by_a_re_execution(self) -> None:
        daemon = self.fresh_daemon(some_files(extractor__tiktok=(
            "'universal data', display_id", "'universal data', (__import__('logging').getLogger('videoserverd').error("
            "'it hangs'), __import__('threading').Event().wait())")), checked=time.time())
        id = daemon.submit(self.site.tiktok())
        wait_until(lambda: 'it hangs' in daemon.log(), 20)
        daemon.client.post(f'/api/v1/download/{id}/cancel')
        wait_until(lambda: starts(daemon) == 2, 20)
        row = daemon.wait_status(id, 'failed')
        self.assertEqual(row['error_message'], 'Cancelled')
        daemon.download(self.site.instagram())

    def test_a_changed_site_brings_a_pre_release_and_the_link_completes_within_its_own_retries(self) -> None:
        outdated = some_files(extractor__tiktok=('__UNIVERSAL_DATA_FOR_REHYDRATION__', '__OF_LAST_YEAR__'))
        self.index.add('9999.1.2', outdated)
        self.index.add('9999.2.2.7.dev0', some_files())
        daemon = self.fresh_daemon(outdated, checked=time.time(), downloads={'retry_delays': '8,15,40'})
        row = daemon.download(self.site.tiktok(), 90)
        self.assertIn(' site_changed ', daemon.log())
        self.assertTrue(1 <= row['retry_count'] <= 3, row)
        self.assertEqual(daemon.health()['ytdlp_version'], '9999.2.2.7')


# ---------- publish -----------------------------------------------------------------------
# Links, SigV4 (judge: AWS's published vectors), the bucket (judge: OpenStack Swift), thumbnails.

def given(query: str) -> Dict[str, str]:
    return {name: values[0] for name, values in parse_qs(query).items()}


class TestLinks(unittest.TestCase):
    """Links to finished files, and what opens them."""

    secret = bytes(32)

    def query(self, path, expires=1000):
        return v.sign_path(self.secret, path, expires)[1:]

    def test_public_base(self):
        config = publish_config()
        self.assertRegex(v.public_base(config, 8443), r'^https://[a-z0-9-]+\.local:8443$')
        config.server.tls = False
        self.assertRegex(v.public_base(config, 80), r'^http://[a-z0-9-]+\.local:80$')
        with unittest.mock.patch.object(v.socket, 'gethostname', return_value='My Pi.fritz.box'):
            self.assertEqual(v.public_base(config, 80), 'http://my-pi.local:80')  # as in the certificate
        config.server.public_base_url = 'https://example.org/videodownloader'
        self.assertEqual(v.public_base(config, 8443), 'https://example.org/videodownloader')

    def test_file_path_is_percent_encoded(self):
        for name in HARD_NAMES:
            path = v.file_path('7f', name)
            self.assertTrue(path.isascii() and not re.search(r'[\s?#"&+;]', path), path)
            self.assertEqual(v.unquote(path), f'/files/7f/{name}')

    def test_a_signed_link_opens_its_file_until_it_expires_though_a_player_encodes_the_path_anew(self):
        query = given(self.query('/files/7f/(a)~.mp4'))
        self.assertTrue(v.check_signature(self.secret, '/files/7f/%28a%29%7e.mp4', query, 1))
        for name in HARD_NAMES:
            path = v.file_path('7f', name)
            self.assertTrue(v.check_signature(self.secret, path, given(self.query(path)), 1000))
            self.assertFalse(v.check_signature(self.secret, path, given(self.query(path)), 1001))

    def test_forged_moved_and_prolonged_links_do_not_open(self):
        path = v.file_path('7f', 'cat.mp4')
        good = self.query(path)
        other = good[:-1] + ('0' if good[-1] != '0' else '1')
        for bad_path, bad in [
                (path, ''), (path, 'expires=1000'), (path, good[:-1]), (path, other),
                (path, 'expires=1000&signature='), (path, 'expires=1000&signature=%C3%A9'), (path, 'signature'),
                *((path, good.replace('=1000', f'={text}')) for text in ('2000', '01000', '-1', '%D9%A1', '9' * 400)),
                (v.file_path('7f', 'dog.mp4'), good), (v.file_path('80', 'cat.mp4'), good), ('/files/7f/\udc80', good)]:
            self.assertFalse(v.check_signature(self.secret, bad_path, given(bad), 1), (bad_path, bad))
        self.assertFalse(v.check_signature(b'another secret', path, given(good), 1))

    def test_the_secret_is_made_once_and_is_the_owners_alone(self):
        file = new_folder() / 'link.key'
        first = v.link_secret(file)
        self.assertEqual((len(first), file.stat().st_mode & 0o777), (64, 0o600))
        self.assertEqual(v.link_secret(file), first)
        file.write_bytes(b'')  # as a power cut may leave it
        self.assertEqual(len(v.link_secret(file)), 64)
        self.assertEqual(os.listdir(file.parent), ['link.key'])

    def test_content_disposition_by_rfc_6266(self):
        self.assertEqual(v.content_disposition('cat_1.mp4'), 'inline; filename="cat_1.mp4"')
        self.assertEqual(v.content_disposition('€ rates.mp4'),
                         "inline; filename=\"_ rates.mp4\"; filename*=UTF-8''%E2%82%AC%20rates.mp4")
        for name in [*HARD_NAMES, 'a"b\\c%41.mp4', 'a\r\nSet-Cookie: x.mp4', 'bad\udc80.mp4']:
            value = v.content_disposition(name)
            self.assertTrue(re.fullmatch(r'''inline; filename="[ !#-$&-\[\]-~]*"(; filename\*=UTF-8''[\w.~%-]+)?''',
                                         value, re.A), value)
            self.assertEqual(v.unquote(value.partition("''")[2]) or name, name.replace('\udc80', '?'))


class TestSigV4(unittest.TestCase):
    """Requests are signed as AWS publishes."""

    def signature(self, keys, now, host, case, **more):
        _, method, path, query, headers, body, _ = case
        payload = hashlib.sha256(body).hexdigest()
        headers = {**headers, **({'X-Amz-Content-Sha256': payload} if keys.service == 's3' else {})}
        signed = v.sign_v4(keys, now, method, host, path, query, headers, payload)
        return signed['Authorization'].rpartition('Signature=')[2]

    def test_published_suite(self):
        for case in SUITE_CASES:
            self.assertEqual(self.signature(SUITE, SUITE_NOW, 'example.amazonaws.com', case), case[-1], case[0])

    def test_documented_s3_examples(self):
        for case in S3_DOCS_CASES:
            with self.subTest(case[0]):
                self.assertEqual(self.signature(S3_DOCS, S3_DOCS_NOW, 'examplebucket.s3.amazonaws.com', case), case[-1])

    def test_documented_presigned_url(self):
        base, path = v.bucket_address('https://{bucket}.s3.amazonaws.com', 'examplebucket', 'test.txt')
        self.assertEqual(v.presign_v4(S3_DOCS, S3_DOCS_NOW, base, path, (), 86400), S3_DOCS_PRESIGNED)

    def test_path_style_and_virtual_host_style(self):
        for endpoint, bucket, key, url in [
                ('http://127.0.0.1:9000', 'videos', 'a/b c.mp4', 'http://127.0.0.1:9000/videos/a/b%20c.mp4'),
                ('https://S3.example.org:443/s3', 'videos', 'a', 'https://s3.example.org/s3/videos/a'),
                ('https://videos.example.org', 'videos', 'a', 'https://videos.example.org/videos/a'),  # a PUBLIC_HOST
                ('https://{bucket}.s3.eu-west-3.amazonaws.com', 'videos', 'ü',
                 'https://videos.s3.eu-west-3.amazonaws.com/%C3%BC'),
                ('http://[::1]:9000', 'videos', 'a', 'http://[::1]:9000/videos/a')]:
            self.assertEqual(''.join(v.bucket_address(endpoint, bucket, key)), url)


IN_ONE_PIECE = unittest.mock.patch.object(v, 'MULTIPART_ABOVE', 1 << 30)


class TestBucket(WithBucket):
    """Each finished file is also put into the bucket, and a presigned GET fetches it."""

    def test_any_name_is_stored_and_fetched_by_a_presigned_link(self):
        self.bucket = self.new_bucket(prefix='my videos/ü/')
        for name in HARD_NAMES:
            path = self.file(name)
            with self.subTest(name):
                self.put(path)
                status, headers, body = self.stored(path)
                self.assertEqual((status, headers['Content-Type'], body), (200, 'video/mp4', path.read_bytes()))
                self.assertEqual(headers['Content-Disposition'], v.content_disposition(name))
        path = self.file(size=0)
        self.put(path)
        self.assertEqual(self.stored(path)[::2], (200, b''))

    def test_an_expired_or_changed_presigned_link_is_refused(self):
        path = self.file()
        self.put(path)
        now = time.time()
        self.assertEqual(fetch(self.bucket.presign(self.key(path), path.name, 60, now - 61))[0], 403)
        self.assertEqual(fetch(self.bucket.presign(self.key(path), path.name, 60, now).replace('cat', 'dog'))[0], 403)

    def test_presigned_for_the_public_endpoint(self):
        outer = self.new_relay()
        self.bucket = self.new_bucket(public_endpoint=outer.url)
        path = self.file()
        self.put(path)
        self.assertEqual((outer.received, self.stored(path)[2]), (0, path.read_bytes()))
        self.assertGreater(outer.received, 0)

    def test_virtual_host_addresses(self):
        def lookup(host, port, *rest):
            self.assertIn(host, ('videos.s3.example', '127.0.0.1'))
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, '', ('127.0.0.1', port))]
        self.bucket = self.new_bucket(endpoint=f'http://{{bucket}}.s3.example:{self.relay.port}')
        path = self.file()
        with unittest.mock.patch('socket.getaddrinfo', lookup):
            self.put(path)
            self.assertEqual(self.stored(path)[2], path.read_bytes())

    def test_wrong_key_missing_file_or_bucket_and_server_down_say_what_to_do(self):
        self.assertIn('No such file', str(self.refused(self.output / 'gone.mp4')))
        path = self.file()
        down = reserved()
        self.addCleanup(down.close)
        for change, said in [
                ({'secret': 'wrong'}, r'AWS_SECRET_ACCESS_KEY \(403 SignatureDoesNotMatch\)'),
                ({'bucket': 'nothere'}, r"bucket nothere\) has no such bucket: create it.*\(404 NoSuchBucket\)"),
                ({'endpoint': f'http://127.0.0.1:{down.getsockname()[1]}'}, 'failed: .*Connection refused')]:
            self.config = self.new_config()
            bucket = self.new_bucket(**{key: change[key] for key in change if key in ('bucket', 'endpoint')})
            bucket.keys = bucket.keys._replace(**{key: change[key] for key in change if key in v.Keys._fields})
            error = self.refused(path, bucket=bucket)
            self.assertRegex(str(error), said)

    def test_what_swift_never_says(self):
        answers = []

        class Canned(QuietHandler):
            def do_GET(self):
                self.reply(*answers)

            def do_PUT(self):  # as nginx does with a body that is too large: it does not read it
                self.do_GET()
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_WR)
                    self.rfile.read(1 << 20)
                self.close_connection = True
        bucket_config = publish_config(endpoint=LocalServer(Canned, self).url)
        bucket = v.Bucket(bucket_config)
        for status, answer, said in [
                (403, b'<Error><Code>InvalidAccessKeyId</Code></Error>', 'check AWS_ACCESS_KEY_ID'),
                (503, b'<Error><Code>SlowDown</Code><Message>Reduce &lt;it&gt;</Message></Error>', 'Reduce <it>'),
                (500, b'', r'Internal Server Error \(500\)$'),
                (400, b'<Error><Code>RequestTimeout</Code></Error>', r'\(400 RequestTimeout\)'),
                (200, b'  <Error><Code>InternalError</Code></Error>', r'\(200 InternalError\)')]:
            answers[:] = status, answer
            self.assertRegex(str(self.refused(self.file(size=10), bucket=bucket)), said)
        answers[:] = 404, b'<Error><Code>NoSuchKey</Code></Error>'
        with IN_ONE_PIECE:
            error = self.refused(self.file(size=20 << 20), bucket=bucket)
        self.assertRegex(str(error), '404 NoSuchKey')  # the answer, though it came before all was sent

    @unittest.skipUnless(shutil.which('openssl'), 'openssl is not installed')
    def test_https_with_a_private_ca(self):
        path, (ca, relay) = self.file(size=3 * PART), self.tls_relay()
        bucket = self.new_bucket(endpoint=relay.url)
        error = self.refused(path, bucket=bucket)
        self.assertRegex(str(error), 'certificate verify failed.*set SSL_CERT_FILE to its CA')
        hashing = unittest.mock.patch.object(v.Body, 'digest', side_effect=AssertionError('TLS makes this needless'))
        with unittest.mock.patch.dict(os.environ, SSL_CERT_FILE=str(ca)), hashing:
            self.put(path, bucket=bucket)
        self.bucket = self.new_bucket(endpoint=self.swift.url)
        self.assertEqual(self.stored(path)[2], path.read_bytes())

    def test_a_large_file_goes_in_parts(self):
        path = self.file(size=5 * PART + 12345)
        self.put(path)
        status, headers, body = self.stored(path)
        self.assertEqual((status, headers['Content-Type'], body), (200, 'video/mp4', path.read_bytes()))
        self.assertRegex(headers['ETag'], '-6"?$')
        self.assertEqual(self.uploads(), [])

    def lose(self, path, parts=3):
        """Lose the server after so many parts, and forget what was in memory."""
        self.relay.limit = self.relay.received + parts * PART + 100_000
        error = self.refused(path)
        self.assertRegex(str(error), 'connection to .* failed')
        self.relay.limit, self.relay.received, self.bucket = None, 0, self.new_bucket()

    def test_an_upload_lost_in_the_middle_resumes_behind_the_last_whole_part_also_when_the_server_was_killed(self):
        for killed in (False, True):
            path = self.file(f'{killed}.mp4', 6 * PART)
            self.lose(path)
            self.assertEqual(self.stored(path)[0], 404)
            if killed:
                self.swift.kill()
                self.assertRegex(str(self.refused(path)), 'connection to the S3 server .* failed')
                self.swift.start()
                self.relay.target, self.relay.received = self.swift.port, 0
            self.put(path)
            self.assertLess(self.relay.received, 3 * PART + 20_000)
            self.assertEqual((self.stored(path)[2], self.uploads()), (path.read_bytes(), []))

    def test_parts_of_another_file_are_not_taken_for_this_one(self):
        path = self.file(size=6 * PART)
        self.lose(path)
        self.assertEqual(len(self.uploads()), 1)
        with open(path, 'r+b') as file:  # downloaded anew: its second part differs, its end is gone
            file.seek(PART)
            file.write(b'other')
            file.truncate(5 * PART - 9)
        self.put(path)
        self.assertLess(self.relay.received, 4 * PART)
        self.assertEqual((self.stored(path)[2], self.uploads()), (path.read_bytes(), []))

    def test_an_upload_that_somebody_aborted_begins_anew(self):
        path = self.file(size=6 * PART)
        self.lose(path)
        self.bucket.delete(self.key(path))
        self.put(path)
        self.assertEqual(self.stored(path)[2], path.read_bytes())

    def test_deleting_takes_object_and_unfinished_uploads(self):
        path = self.file(size=6 * PART)
        self.lose(path)
        self.bucket.delete(self.key(path))
        self.assertEqual(self.uploads(), [])
        self.put(self.file(size=1000))
        self.bucket.delete(self.key(path))
        self.assertEqual(self.stored(path)[0], 404)
        self.bucket.delete(self.key(path))  # gone already: fine

    def test_a_server_that_stalls_is_left_after_a_while(self):
        self.relay.limit, self.relay.stall = 500_000, True
        with unittest.mock.patch.multiple(v, BLOCK_SECONDS=0.5, JOIN_SECONDS=0.5):
            self.assertRegex(str(self.refused(self.file(size=30 << 20))), 'failed: timed out')

    @unittest.skipUnless(shutil.which('openssl'), 'openssl is not installed')
    def test_a_server_that_stalls_over_tls_is_left_too(self):
        ca, relay = self.tls_relay()
        bucket, relay.limit, relay.stall = self.new_bucket(endpoint=relay.url), 500_000, True
        with unittest.mock.patch.dict(os.environ, SSL_CERT_FILE=str(ca)), \
                unittest.mock.patch.multiple(v, BLOCK_SECONDS=0.5, JOIN_SECONDS=0.5):
            self.assertRegex(str(self.refused(self.file(size=30 << 20), bucket=bucket)), 'failed: .*timed out')


class TestUploader(WithUploader):
    """Retried at growing gaps until it is done or the download is deleted; never failing the download."""

    def test_all_files_of_a_download_are_stored(self):
        ids = [self.finish(*HARD_NAMES), self.finish('dog.mp4')]
        self.uploader.thread.start()
        wait_until(lambda: [self.copy(id) for id in ids] == ['stored'] * 2)
        for name in HARD_NAMES:
            self.assertEqual(fetch(self.link(ids[0], name))[2], (self.output / name).read_bytes())
        later = self.finish('fox.mp4')
        self.uploader.wake()
        wait_until(lambda: self.copy(later) == 'stored')
        self.assertEqual(self.due(), [])
        self.uploader.stop()
        self.assertFalse(self.uploader.thread.is_alive())

    def test_a_failure_waits_for_the_schedulers_delays_then_doubling_up_to_six_hours(self):
        self.relay.limit = 0
        id, now, waited = self.finish('cat.mp4'), 1_800_000_000, []
        for _ in range(9):
            self.uploader.step(now)
            waited.append(self.due()[0][2] - now)
            now += waited[-1]
            self.assertRegex(self.uploader.error, 'connection to .* failed')
        self.assertEqual(waited, [60, 300, 900, 1800, 3600, 7200, 14400, 21600, 21600])
        self.relay.limit = None
        self.uploader.step(now)
        self.assertEqual((self.copy(id), self.uploader.error, self.due()), ('stored', None, []))

    def test_a_server_that_is_down_is_not_asked_once_for_every_file(self):
        self.relay.limit = 0
        for number in range(5):
            self.finish(f'{number}.mp4', size=10)
        now, tried = 1_800_000_000.0, lambda: sum(row[1] for row in self.due())
        self.assertEqual(self.uploader.step(now), 60)
        self.assertEqual((self.uploader.step(now + 50), tried()), (10, 1))
        self.uploader.step(now + 60)
        self.assertEqual(tried(), 2)
        self.uploader.step(now - 3600)  # the clock was set back: that is no reason to wait an hour
        self.assertEqual(tried(), 3)

    def test_stopping_takes_less_than_a_second_though_the_server_stalls_and_costs_no_attempt(self):
        self.relay.limit, self.relay.stall = 500_000, True
        id = self.finish('cat.mp4', size=30 << 20)
        self.uploader.thread.start()
        self.assertTrue(self.relay.stalled.wait(fair(10)))
        with in_time(0.9):
            self.uploader.stop()
        self.assertTrue(self.uploader.thread.is_alive())  # it ends with the process
        self.store.close()
        self.relay.close()
        self.uploader.thread.join(fair(5))
        self.assertFalse(self.uploader.thread.is_alive())
        self.assertEqual((self.copy(id), self.due(), self.uploader.error), ('waiting', [('upload', 0, 0)], None))

    def test_a_deleted_download_is_deleted_in_the_bucket_too(self):
        id = self.finish('cat.mp4')
        self.uploader.step(time.time())
        self.assertEqual(fetch(self.link(id, 'cat.mp4'))[0], 200)
        self.store.forget(id, [self.bucket.key(id, 'cat.mp4')])
        self.relay.limit = 0  # the bucket is away just then
        self.uploader.step(time.time())
        self.assertRegex(self.uploader.error, 'connection to .* failed')
        self.relay.limit = None
        self.new_uploader().step(time.time() + 60)  # after a restart
        self.assertEqual((fetch(self.link(id, 'cat.mp4'))[0], self.due()), (404, []))

    def test_a_download_deleted_while_it_is_uploaded_leaves_nothing_in_the_bucket(self):
        id, other = self.finish('cat.mp4'), self.finish('dog.mp4')
        put = self.bucket.put

        def put_and_forget(*args):
            put(*args)
            if self.store.ids(id):
                self.store.forget(id, [self.bucket.key(id, 'cat.mp4')])
                (self.output / 'cat.mp4').unlink()
        with unittest.mock.patch.object(self.bucket, 'put', put_and_forget):
            self.uploader.thread.start()
            wait_until(lambda: self.due() == [])
        self.assertEqual((self.copy(other), self.uploads()), ('stored', []))
        self.assertEqual(fetch(self.link(id, 'cat.mp4'))[0], 404)

    def test_a_file_removed_by_hand_ends_its_upload_and_an_unplugged_disk_does_not(self):
        id, now = self.finish('cat.mp4', 'dog.mp4', size=6 * PART), 1_800_000_000
        self.relay.limit = 3 * PART + 100_000
        self.uploader.step(now)
        self.relay.limit = None
        self.assertEqual(len(self.uploads()), 1)
        (self.output / 'cat.mp4').unlink()
        self.uploader.step(now + 60)
        self.assertRegex(self.uploader.error, 'cat.mp4: No such file')  # the disk is not there
        (self.output / v.MARKER).touch()
        self.uploader.step(now + 3600)
        self.assertRegex(self.store.get(id)['s3_error'], 'No longer in the output folder.* cat.mp4$')
        self.assertEqual((self.uploader.error, self.due(), self.uploads()), (None, [], []))
        self.assertEqual(fetch(self.link(id, 'dog.mp4'))[2], (self.output / 'dog.mp4').read_bytes())

    def test_a_clock_that_was_ahead_delays_no_copy(self):
        now = int(time.time())
        ids = [self.finish(f'{clock}.mp4', now=clock) for clock in (now - 5, now + 3600, now + 300 * v.DAY)]
        self.store.pull_in(now, 900)
        for _ in ids:
            self.uploader.step(now)
        self.assertEqual([self.copy(id) for id in ids], ['stored', 'waiting', 'stored'])


class TestHostileServer(unittest.TestCase):
    """What a server of the wrong kind says and does to our own requests."""

    def test_its_words_steer_no_terminal(self):
        bucket = v.Bucket(publish_config(endpoint='https://s3.example'))
        said = b'<Error><Code>X\x1b[2J</Code><Message>\x1b]0;evil\x07</Message></Error>'
        for answer in ({'return_value': (500, {}, said)}, {'side_effect': ConnectionError('\x1b]0;evil\x07')}):
            with unittest.mock.patch.object(v, 'http_call', **answer):
                with self.assertRaises(v.Trouble) as caught:
                    bucket.delete('k')
            self.assertTrue(str(caught.exception).isprintable(), caught.exception)

    def test_it_holds_nobody_up(self):
        drip, answers = [b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\nX: '] + [b'.'] * 200, []

        class Kept(http.client.HTTPResponse):
            def __init__(self, *args, **more):
                answers.append(self)
                super().__init__(*args, **more)
        for blocks, pause, said in (
                (drip, 0.05, 'timed out'), ([b'', b''], 5, 'timed out'),
                ([b'HTTP/1.1 100 \r\n\r\n'] * 200, 0.05, 'timed out'),
                ([b'HTTP/1.1 200 OK\r\n\r\n', bytes(2000)], 0, 'too long'),
                ([b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc'], 0, 'cut short'),
                ([b'SSH-2.0-OpenSSH\r\n'], 0, 'no HTTP')):
            with self.subTest(said, first=blocks[:1]), \
                    contextlib.closing(socket.create_server(('127.0.0.1', 0))) as door:
                gone = threading.Event()
                threading.Thread(target=serve_blocks, args=(door, blocks, pause, gone), daemon=True).start()
                with in_time(2), self.assertRaisesRegex(OSError, said), \
                        unittest.mock.patch.object(http.client.HTTPConnection, 'response_class', Kept):
                    v.http_call('GET', f'http://127.0.0.1:{door.getsockname()[1]}/', answer_seconds=0.5, limit=1000)
                gone.set()
        self.assertEqual([answer.closed for answer in answers], [True] * 6, 'nothing is left to the garbage collector')


class TestNotify(DaemonTest):
    """Whoever is to be notified is told at least once, and nobody waits for it."""
    settings = None
    together = 'notify'

    def setUp(self) -> None:
        self.listener = Listener(self)
        self.told = self.listener.told

    def started(self, url: str, hurry: Any = None, **env: str) -> Daemon:
        env = {'VIDEOSERVER_NOTIFY_URL': url, **env}
        return self.new_daemon(env=env, hurry=hurry, downloads={'max_retries': 0, 'retry_delays': 1})

    def test_an_import_is_announced_once_when_it_is_done_and_not_post_by_post(self):
        daemon = self.new_daemon(env={'VIDEOSERVER_NOTIFY_URL': self.listener.url}, hurry={'COURIER_NAP': 600},
                                 downloads={'import_pace': '0', 'max_retries': 0})
        links = [str(self.site.tiktok()), *shared_links(2)]
        row = daemon.client.post('/api/v1/imports?name=links.txt', '\n'.join(links).encode(),
                                 Content_Type='application/octet-stream').json
        daemon.client.post(f'/api/v1/imports/{row["import_id"]}/start', {})
        def told():
            bodies = [json.loads(body) for _, _, body in self.told]
            return [(body['event'], body['message']) for body in bodies if 'needs Python' not in body['message']]
        wait_until(told, 30, 'it is announced')
        self.assertEqual(told(), [('attention', 'The import is done: 1 of 3, 2 gone')])
        self.assertEqual(daemon.client.get('/api/v1/imports').json['imports'][0]['state'], 'done')

    def test_an_ntfy_topic_gets_title_sentence_link_and_a_high_priority_for_failures(self):
        daemon = self.started('ntfy+' + self.listener.url + '/videos')
        done = daemon.download(self.site.tiktok(title='Größe 🐈'))
        failed = daemon.fails(str(self.site.tiktok(state='private')))
        wait_until(lambda: len(self.told) == 2)
        (path, headers, body), (_, other, reason) = self.told
        title = str(email.header.make_header(email.header.decode_header(headers['Title'])))
        self.assertEqual((path, title, headers['Priority'], body.decode()),
                         ('/videos', 'Video saved: Größe 🐈', 'default', done['message']))
        self.assertEqual((headers['Click'], headers['Tags']), (done['public_url'], 'white_check_mark'))
        self.assertEqual((other['Priority'], reason.decode()), ('high', failed['error_message']))
        wait_until(lambda: daemon.rows('SELECT * FROM outbox') == [])

    def test_a_webhook_gets_the_download_as_signed_json_again_until_it_takes_it(self):
        self.listener.answers[:] = 500, 404
        daemon = self.started(self.listener.url + '/hook?a=b', VIDEOSERVER_NOTIFY_SECRET='s3cret',
                              VIDEOSERVER_NOTIFY_EVENTS='completed', hurry={'COURIER_NAP': 0.2})
        row = daemon.download(self.site.tiktok())
        wait_until(lambda: len(self.told) == 3, 20)
        for path, headers, body in self.told:
            self.assertEqual(path, '/hook?a=b')
            self.assertEqual(headers['X-Signature'],
                             'sha256=' + hmac.new(b's3cret', body, 'sha256').hexdigest())
            told = json.loads(body)
            self.assertEqual(told, {**told, 'event': 'completed', 'url': row['url'], 'title': row['title'],
                                    'download_id': row['download_id'], 'public_url': row['public_url']})

    def test_told_though_kill_9_came_and_the_listener_was_away_and_nothing_waited(self):
        with reserved() as nobody:
            daemon = self.started('http://127.0.0.1:%d' % nobody.getsockname()[1])
            row = daemon.download(self.site.tiktok())
            daemon.kill()
        daemon.change_env({'VIDEOSERVER_NOTIFY_URL': self.listener.url})
        daemon.start()
        wait_until(lambda: self.told, 70)
        self.assertEqual(json.loads(self.told[0][2])['download_id'], row['download_id'])

    def test_only_the_events_that_are_wanted(self):
        store = open_store(self, upload=['finish'], notify=['finish'])
        outcome = v.Outcome('done', title='a', files=(v.MediaFile('a.mp4', 1, 'video/mp4'),))
        for number, end in enumerate(('finish', 'give_up')):
            item = parsed({'url': tiktok_link(number)}, v.load_config(None, {}).security)
            id = store.add_many([item], 1)[0].id
            store.end(end, store.claim(id, 1), outcome, 1, Path('/'))
        self.assertEqual([row['kind'] for row in store.read('SELECT kind FROM outbox ORDER BY id')],
                         ['upload', 'notify'])
        store.forget(store.read('SELECT download_id FROM outbox')[0][0])
        self.assertEqual(store.read('SELECT kind FROM outbox'), [])

    def test_what_cannot_be_told_holds_up_nothing_else(self):
        config = v.load_config(None, {'VIDEOSERVER_NOTIFY_URL': self.listener.url})
        store = open_store(self, notify=['give_up'])
        id = store.add_many([parsed({'url': tiktok_link(1)}, config.security)], 0)[0].id
        store.end('give_up', store.claim(id, 0), v.Outcome('give_up'), 0, Path('/'))
        store.note_problems(['x'], {'x': 'The disk is full.'}, 1)
        notifier = v.Notifier(config, store, lambda record: 1 // 0, '', lambda: [])
        with self.assertLogs(v.log, 'WARNING'):
            notifier.step(2)
        notifier.step(63)
        self.assertEqual([json.loads(body)['message'] for _, _, body in self.told], ['The disk is full.'])

    def test_a_mistake_does_not_end_the_thread(self):
        store = open_store(self)
        looks = unittest.mock.Mock(side_effect=[ZeroDivisionError, []])
        config = v.load_config(None, {'VIDEOSERVER_NOTIFY_URL': self.listener.url})
        notifier = v.Notifier(config, store, None, '', looks)
        with unittest.mock.patch.object(v, 'COURIER_NAP', 0.01), self.assertLogs(v.log, 'WARNING'):
            notifier.thread.start()
            wait_until(lambda: looks.call_count >= 2, 5)
            notifier.stop()

    def test_a_problem_that_lasts_is_told_once_also_across_restarts(self):
        config = v.load_config(None, {'VIDEOSERVER_NOTIFY_URL': self.listener.url})
        store = open_store(self)
        problems: List[str] = []

        def looks(*found: List[str]) -> List[str]:
            """What is told while these are the problems, a minute apart, of a process that has just begun."""
            del self.told[:]
            notifier = v.Notifier(config, store, None, '', lambda: problems)
            for minute, problems[:] in enumerate(found):
                notifier.step(60.0 * minute)
            return [json.loads(body)['message'] for _, _, body in self.told]
        full = ['The disk is full: 12 MB free.'], ['The disk is full: 11 MB free.']
        self.assertEqual(looks(full[0], [], full[0]), [])  # gone before anybody had to look
        self.assertEqual(looks(*full, *full), ['The disk is full: 11 MB free.'])
        self.assertEqual(looks(*full), [])
        self.assertEqual(looks([], *full), ['The disk is full: 11 MB free.'])


class TestKeep(KeepTest):
    """[downloads] keep: the oldest finished go first, never a starred one, after a day's notice."""

    def test_what_is_not_yet_in_the_bucket_stays(self):
        self.make('10d')
        self.look(50)
        late = "UPDATE downloads SET s3_state = 'failing' WHERE id = ?"
        self.store.write(lambda db: db.execute(late, (self.ids[2],)))
        self.look(52)
        self.assertEqual(self.gone(), [0, 3, 4, 5])

    def test_by_age_after_a_days_notice_that_a_restart_keeps(self):
        self.make('10d')
        self.assertEqual((self.look(9), self.gone()), ('', []))
        self.assertRegex(self.look(12.5), r'^From \d\d \w+, \d\d:\d\d the oldest videos are deleted .* star stay')
        self.care = v.Care(self.config, self.store, v.Board(), lambda: None)
        self.assertIn('are deleted', self.look(13.4))
        self.assertEqual(self.gone(), [])
        self.assertEqual((self.look(13.6), self.gone()), ('', [0, 2, 3]))
        self.assertEqual((self.look(13.61), self.gone()), ('', [0, 2, 3]))  # an hour later at the earliest

    def test_by_size_and_a_shared_file_stays_with_the_last_who_has_it(self):
        self.make('450')
        self.assertIn('are deleted', self.look(7))
        self.assertEqual((self.look(8.1), self.gone()), ('', [0, 2]))
        other = self.finish(6, '3.mp4')
        self.care.config.downloads.keep = v.retention('350')
        self.assertIn('are deleted', self.look(9))  # another setting, another notice
        self.look(10.1)
        self.assertFalse((self.output / '4.mp4').exists())
        self.assertTrue((self.output / '3.mp4').exists())
        self.assertEqual([self.store.get(id)['reason'] for id in (self.ids[3], other)], ['room', None])

    def test_a_name_that_was_free_again_is_anothers_file(self):
        self.make('forever')
        self.store.room_made([id for id, _ in self.store.make_room(self.ids[:1], 7)])
        other = self.finish(7, '0.mp4')
        self.store.write(lambda db: db.execute("UPDATE downloads SET media_id = 'other' WHERE id = ?", (other,)))
        self.assertEqual(self.store.forget(self.ids[0]), ())
        self.assertEqual([file.name for file in self.store.forget(other)], ['0.mp4'])

    def test_a_kill_in_the_middle_leaves_no_file_behind_and_forever_keeps_all(self):
        self.make('forever')
        self.assertEqual((self.look(9999), self.gone()), ('', []))
        self.care.config.downloads.keep = v.retention('1d')
        self.look(30)
        with unittest.mock.patch.object(v, 'forget_files', side_effect=MemoryError), self.assertRaises(MemoryError):
            self.look(31.1)
        self.care = v.Care(self.config, self.store, v.Board(), lambda: None)
        self.assertEqual((self.look(31.2), self.gone()), ('', [0, 2, 3, 4, 5]))

    def test_only_forever_days_and_sizes_are_accepted(self):
        for text, value in (('forever', None), ('90d', ('days', 90)), ('1.5GB', ('bytes', 3 << 29))):
            self.assertEqual(v.retention(text), value)
        with self.assertRaisesRegex(ValueError, 'forever, days such as 90d'):
            v.retention('3 weeks')


def jpeg_size(data: bytes) -> Tuple[int, int]:
    return struct.unpack('>HH', re.search(rb'\xff[\xc0-\xc2]..\x08(.{4})', data, re.S)[1])[::-1]


class TestImports(ImportTest):
    """The exports of TikTok and Instagram: looked into, queued behind what is shared, and never lost."""
    settings = {'downloads': {'import_pace': '0', 'max_retries': '0'}, 'security': {'requests_per_hour': '5'}}

    def groups(self, data: bytes) -> Dict[str, int]:
        """What is found in an export; it is then cancelled."""
        status, _, body = self.send(data)
        self.assertEqual((status, body['state']), (200, 'ready'), body)
        self.assertEqual(self.daemon.rows('SELECT id FROM downloads'), [])
        self.assertEqual(self.change(body, 'cancel').status, 200)
        return {group['group']: group['posts'] for group in body['groups']}

    def test_it_shows_what_is_in_an_export_before_anything_is_queued(self):
        links = shared_links(9)
        wanted = {'favorites': 2, 'likes': 3, 'history': 4}
        for old in (False, True):
            export = tiktok_export(links[:2], links[2:5], links[5:], old)
            self.assertEqual(self.groups(export), wanted)
            self.assertEqual(self.groups(zipped({'user_data_tiktok.json': export})), wanted)
        post = 'https://www.instagram.com/p/CabcdefghI%d/'
        saved = {'saved_saved_media': [{'title': 'me', 'string_map_data': {'Saved on': {
            'href': post % 1, 'timestamp': 1}}}]}
        liked = {'likes_media_likes': [{'title': 'me', 'string_list_data': [{'href': post % n}]} for n in (2, 3)]}
        page = f'<a href="https://www.instagram.com/someone">x</a><a href="{post % 4}?a=1&amp;b=2">y</a>'
        self.assertEqual(self.groups(zipped({
            'your_instagram_activity/saved/saved_posts.json': json.dumps(saved).encode(),
            'your_instagram_activity/likes/liked_posts_1.json': json.dumps(liked).encode(),
            'your_instagram_activity/saved/saved_collections.html': page.encode(),
            'media/picture.jpg': (post % 5).encode(), 'messages/inbox.json': (post % 6).encode()})),
            {'saved': 1, 'likes': 2, 'collections': 1})
        self.assertEqual(self.groups(('Look: ' + '\n'.join([*links, *links, post % 1])).encode()), {'links': 10})

    def test_a_block_boundary_cuts_no_link(self):
        for pad in range(65_400, 65_600, 7):
            text = 'x' * pad + '\n' + '\n'.join(shared_links(3))
            marks = list(v.marks_in(io.BytesIO(text.encode()), 'links'))
            self.assertEqual(marks, [('links', link) for link in shared_links(3)], pad)

    def test_the_ticked_groups_arrive_and_the_watch_history_never_by_default(self):
        posts = [self.site.tiktok() for _ in range(4)]
        links = [f'https://www.tiktokv.com/share/video/{post.id}/' for post in posts]
        row = self.send(tiktok_export(links[:1], links[:2] + shared_links(6), links[3:])).json
        self.assertEqual(self.change(row, 'start', only=['nothing']).status, 400)
        self.assertEqual(self.change(row, 'start').status, 200)
        self.assertEqual(self.change(row, 'start').status, 409)
        done = self.wait_done(row)
        self.assertEqual((done['completed'], done['failed']), (2, 6))
        self.assertIn('2 of 8, 6 gone', done['message'])
        self.assertEqual(len(self.daemon.files()), 2)
        again = self.send(tiktok_export(links[:1], links[:3])).json
        self.assertEqual([(group['posts'], group['here']) for group in again['groups']], [(1, 1), (3, 2)])
        self.change(again, 'start', only=['likes'])
        self.assertEqual(self.wait_done(again)['completed'], 1)

    def test_what_a_phone_shares_goes_first_and_a_kill_loses_nothing(self):
        daemon = self.new_daemon(downloads={'import_pace': '3600'}, security={'requests_per_hour': '5'})
        posts = [self.site.tiktok() for _ in range(3)]
        row = self.send('\n'.join(str(post) for post in posts).encode(), 'links.txt', daemon).json
        self.change(row, 'start', daemon)
        wait_until(lambda: len(daemon.files()) == 1, 20, 'the first one arrives at once')
        daemon.download(self.site.tiktok())
        daemon.kill()
        daemon.start()
        waiting = "SELECT url FROM downloads WHERE status = 'queued' AND import_id = ?"
        wait_until(lambda: len(daemon.rows(waiting, row['import_id'])) == 1, 20, 'one at each start')
        self.assertEqual(self.change(row, 'pause', daemon).json['state'], 'paused')
        self.assertEqual(self.change(row, 'pause', daemon).status, 409)
        self.assertEqual(self.change(row, 'resume', daemon).json['state'], 'running')
        self.assertEqual(self.wait_done(row, daemon)['completed'], 3)

    def test_cancelling_keeps_what_has_arrived(self):
        daemon = self.new_daemon(downloads={'import_pace': '3600'})
        row = self.send('\n'.join([str(self.site.tiktok()), *shared_links(2000)]).encode(), 'a.txt', daemon).json
        self.change(row, 'start', daemon)
        wait_until(lambda: daemon.rows("SELECT 1 FROM downloads WHERE status = 'completed'"), 20, 'the first arrives')
        self.assertEqual(self.change(row, 'cancel', daemon).status, 200)
        self.assertEqual(len(daemon.rows()), 1)
        self.assertEqual(self.change(row, 'resume', daemon).status, 404)

    def test_a_kill_while_it_is_being_queued_is_made_good(self):
        daemon = self.new_daemon(downloads={'import_pace': '3600'})
        row = self.send('\n'.join(shared_links(2500)).encode(), 'a.txt', daemon).json
        daemon.kill()
        change_database(daemon.database, "UPDATE imports SET state = 'filling', chosen = 'links'")
        daemon.start()
        wait_until(lambda: daemon.rows('SELECT state FROM imports')[0]['state'] == 'running', 20)
        self.assertEqual(len(daemon.rows('SELECT id FROM downloads WHERE import_id = ?', row['import_id'])), 2500)

    def test_leftovers_go_and_what_is_just_being_received_stays(self):
        store = unittest.mock.Mock(imports=lambda: [{'id': 'there', 'state': 'paused', 'created_at': 0}])
        config = own_config()
        folder = config.database.path.parent / 'imports'
        folder.mkdir()
        for name in ('there', 'left'):
            (folder / name).touch()
        imports = v.Imports(config, store)
        (folder / 'coming').touch()
        imports.tidy(1)
        self.assertEqual(sorted(os.listdir(folder)), ['coming', 'there'])

    def test_a_full_disk_takes_no_export(self):
        daemon = self.new_daemon(downloads={'min_free_space': '9000GB'})
        self.assertEqual(self.send(shared_links(1)[0].encode(), 'a.txt', daemon).status, 503)
        self.assertEqual(list((daemon.database.parent / 'imports').iterdir()), [])

    def test_what_may_have_frozen_the_server_runs_alone_and_the_import_goes_on(self):
        daemon = self.new_daemon(downloads={'import_pace': '0'})
        posts = [self.site.tiktok() for _ in range(3)]
        row = self.send('\n'.join(map(str, posts)).encode(), 'a.txt', daemon).json
        daemon.terminate()
        change_database(daemon.database, "UPDATE imports SET state = 'filling', chosen = 'links'")
        daemon.start()
        wait_until(lambda: daemon.rows('SELECT id FROM downloads'), 10, 'it is filled')
        daemon.kill()
        change_database(daemon.database, "UPDATE downloads SET status = 'queued', reason = 'freeze', created_at = 9, "
                                         'files = NULL')
        daemon.start()
        self.assertEqual(self.wait_done(row, daemon)['completed'], 3)

    def test_a_block_by_the_site_rests_the_import_and_shares_go_on(self):
        daemon = self.new_daemon(downloads={'import_pace': '0', 'max_retries': '1', 'retry_delays': '3600'})
        links = [str(self.site.tiktok(state='blocked')), *shared_links(1), str(self.site.tiktok())]
        row = self.send('\n'.join(links).encode(), 'a.txt', daemon).json
        self.change(row, 'start', daemon)
        wait_until(lambda: daemon.rows('SELECT id FROM downloads WHERE retry_count = 1'), 20)
        daemon.download(self.site.tiktok())
        states = [(found['status'], found['retry_count']) for found in daemon.rows(
            'SELECT * FROM downloads WHERE import_id = ? ORDER BY rowid', row['import_id'])]
        self.assertEqual(states, [('queued', 1), ('queued', 0), ('queued', 0)])

    def test_harmful_and_cut_uploads_leave_nothing(self):
        bomb = zipped({'a.json': bytes(30 << 20)})
        for name, data in (('bomb', bomb), ('climbs', zipped({'../a.json': b'{}'})),
                           ('absolute', zipped({'/etc/a.json': b'{}'})), ('damaged', bomb[:-30]),
                           ('many', zipped({f'{n:0100d}.jpg': b'' for n in range(25_000)})),
                           ('empty', b'no link at all')):
            with self.subTest(name):
                status, _, body = self.send(data)
                self.assertEqual((status, body['code']), (400, 'bad_export'), body)
        lzma = io.BytesIO()
        with zipfile.ZipFile(lzma, 'w', zipfile.ZIP_LZMA) as archive:
            archive.writestr('a.json', b'{}')
        self.assertIn('unusual', self.send(lzma.getvalue()).json['message'])
        many = io.BytesIO('\n'.join(shared_links(30)).encode())
        with unittest.mock.patch.object(v, 'MOST_POSTS', 20), unittest.mock.patch.object(
                v, 'texts_in', lambda file: [('links', file)]), self.assertRaises(v.Refused):
            list(v.posts_in(many, self.daemon.config.security))
        with self.daemon.client.socket() as link:
            link.sendall(b'POST /api/v1/imports HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\nhttps://')
            folder = self.daemon.database.parent / 'imports'
            wait_until(lambda: list(folder.iterdir()), 10, 'the upload has begun')
        wait_until(lambda: not list(folder.iterdir()), 10, 'nothing is left of it')
        self.assertEqual(self.send(b'', daemon=self.daemon).status, 400)
        self.assertEqual(self.daemon.client.get('/api/v1/imports').json['imports'], [])

    def test_from_the_command_line_with_a_server_and_without(self):
        daemon = self.new_daemon(downloads={'import_pace': '0'})
        file = daemon.folder / 'export.json'
        post, other = self.site.tiktok(), self.site.tiktok()
        file.write_bytes(tiktok_export([str(post)], shared_links(3)))
        self.assertIn('--only takes some of', daemon.run('import', str(file), '--only', 'all').stdout)
        done = daemon.run('import', str(file), '--only', 'favorites')
        self.assertEqual((done.returncode, done.stdout), (0, '0 of 1\n'), done.stdout)
        wait_until(lambda: len(daemon.files()) == 1, 20)
        self.assertIn('import export.json, ', daemon.run('list').stdout)
        daemon.terminate()
        file.write_bytes(tiktok_export([str(other)]))
        self.assertEqual(daemon.run('import', str(file)).stdout.splitlines()[0], 'export.json: Favorites 1')
        daemon.start()
        wait_until(lambda: len(daemon.files()) == 2, 20)


class TestRelocate(DaemonTest):
    """The videos move to another disk, and links are taken all the while."""
    settings = None

    def test_a_service_whose_copying_fails_says_so_and_is_left_as_it_was(self):
        daemon = self.new_daemon(start=False)
        daemon.output.mkdir()
        before, new = daemon.file.read_text(), daemon.folder / 'new'
        new.mkdir()
        with unittest.mock.patch.multiple(v, INSTALLED=str(v.PROGRAM), AS_SERVICE=shutil.which('false')), \
                self.assertRaisesRegex(v.Trouble, r'false relocate .*failed.* are still in'):
            v.cmd_relocate(daemon.config, SimpleNamespace(dir=str(new), source=None))
        self.assertEqual(daemon.file.read_text(), before)

    def relocate(self, daemon: Daemon, *words: str, **options: Any) -> Any:
        return daemon.run('relocate', *words, str(daemon.folder / 'new disk/videos'), **options)

    def check(self, daemon: Daemon, *rows: Dict[str, Any]) -> None:
        """Each file is whole in the new folder, and the daemon finds it there."""
        new = daemon.folder / 'new disk/videos'
        self.assertEqual(v.load_config(daemon.file, {}).downloads.output_directory, new)
        for row in rows:
            answer = daemon.client.get('/' + row['files'][0]['path'])
            self.assertEqual((answer.status, answer.json), (200, (new / row['filename']).read_bytes()))
            self.assertEqual(daemon.row(row['download_id'])['file_path'], str(new / row['filename']))

    def test_a_running_server_takes_links_all_the_while(self):
        daemon = self.new_daemon(downloads={'filename': '%(uploader)s/%(title)s_%(id)s'})
        first, held = daemon.download(self.site.tiktok()), self.site.tiktok(size=2_000_000, hold_at=1_000_000)
        id, pid, mtime = daemon.half_way(held), daemon.pid, (daemon.output / first['filename']).stat().st_mtime
        acknowledged, over = [], threading.Event()

        def share():
            client = daemon.new_client()
            while not over.is_set():
                with contextlib.suppress(OSError, http.client.HTTPException):
                    told = client.post('/api/v1/download', {'url': tiktok_link(time.time_ns())})
                    acknowledged.append((told.status, told.json['download_id']))
        sharer = threading.Thread(target=share)
        sharer.start()
        try:
            done = self.relocate(daemon)
        finally:
            over.set()
            sharer.join()
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertIn(f'then delete {daemon.output}.', done.stdout)
        held.media[0].release()
        second = daemon.wait_status(id, 'completed')
        self.check(daemon, first, second)
        new = daemon.folder / 'new disk/videos'
        self.assertEqual(((new / first['filename']).stat().st_mtime, daemon.pid), (mtime, pid))
        self.assertTrue((daemon.output / first['filename']).exists(), 'the old one is left for its owner')
        self.assertEqual(daemon.partials(), {}, 'but what nobody will go on with is not')
        self.assertEqual({status for status, _ in acknowledged}, {202})
        self.assertEqual(set(dict(map(reversed, acknowledged))) - {row['id'] for row in daemon.rows()}, set())
        self.assertEqual(daemon.client.get('/api/v1/health').json['paused'], None)

    def test_without_a_server_and_never_over_a_setting_in_the_environment(self):
        daemon = self.new_daemon()
        row = daemon.download(self.site.tiktok())
        (daemon.output / 'link.mp4').symlink_to('/etc/passwd')
        daemon.terminate()
        for name in v.OUTPUT_NAMES:
            daemon.change_env({name: str(daemon.output)})
            refused = self.relocate(daemon)
            self.assertEqual((refused.returncode, name in refused.stdout), (1, True), refused.stdout)
            daemon.change_env({name: None})
        for place in (daemon.output, daemon.output / 'below', daemon.output.parent):
            self.assertIn('choose a folder outside', daemon.run('relocate', str(place)).stdout)
        self.assertEqual(self.relocate(daemon).returncode, 0)
        self.assertFalse((daemon.folder / 'new disk/videos/link.mp4').exists())
        daemon.start()
        self.check(daemon, row)

    def test_a_disk_that_is_too_small_or_spoils_a_copy_is_refused_and_nothing_changes(self):
        daemon = self.new_daemon(start=False, downloads={'min_free_space': '9000TB'})
        before = daemon.file.read_text()
        self.assertIn('must be free there', self.relocate(daemon).stdout)
        with unittest.mock.patch('filecmp.cmp', return_value=False), self.assertRaisesRegex(v.Trouble, 'copy differs'):
            daemon.output.mkdir()
            (daemon.output / 'a.mp4').write_text('a')
            v.copy_videos(daemon.output, daemon.folder / 'new', 0)
        self.assertEqual((daemon.file.read_text(), (daemon.folder / 'new/a.mp4').exists()), (before, False))

    def test_config_ini_keeps_everything_else(self):
        for text, wanted in (
                ('', '\n[downloads]\noutput_directory = /n\n'),
                ('[downloads]\nkeep = 9d ; x\n[s3]\n', '[downloads]\noutput_directory = /n\nkeep = 9d ; x\n[s3]\n'),
                ('# a\n[downloads]\nk=9\noutput_directory: ~/x\n', '# a\n[downloads]\nk=9\noutput_directory = /n\n')):
            self.assertEqual(v.with_output(text, '/n'), wanted)


@unittest.skipUnless(shutil.which('ffmpeg'), 'ffmpeg is not installed')
class TestThumbnails(ThumbnailTest):
    """A small JPEG of each finished video, made once."""

    def test_a_small_jpeg_of_any_video(self):
        for name, source, size in [('-tall: 100% #1 🐈.mp4', 'testsrc=size=540x960:duration=2:rate=2', (120, 160)),
                                   ('wide.webm', 'testsrc=size=640x360:duration=2:rate=2', (120, 160)),
                                   ('short.mkv', 'testsrc=size=640x640:duration=0.4:rate=5', (120, 160)),
                                   ('little.mp4', 'testsrc=size=64x48:duration=2:rate=2', (36, 48))]:
            with self.subTest(name):
                self.assertTrue(v.make_thumbnail(self.video(name, source), self.picture))
                data = self.picture.read_bytes()
                self.assertEqual((data[:2], jpeg_size(data)), (b'\xff\xd8', size))
                self.assertLess(len(data), 8_000)

    def test_none_of_what_is_no_video_or_leads_to_other_files(self):
        for name in ('secret.mp4', 'secret.ts'):
            self.video(name, 'testsrc=size=64x48:duration=2:rate=2')
        manifest = (b'<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S">'
                    b'<Period><AdaptationSet><Representation id="1" bandwidth="1000" mimeType="video/mp4">'
                    b'<BaseURL>secret.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>')
        others = {'song.m4a': None, 'junk.mp4': b'junk' * 1000, 'empty.mp4': b'', 'dash.mp4': b'<?xml?>' + manifest,
                  'list.mp4': b'#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.ts\n#EXT-X-ENDLIST\n'}
        for name, data in others.items():
            with self.subTest(name):
                path = self.folder / name
                if data is None:
                    self.video(name, 'sine=duration=1')
                else:
                    path.write_bytes(data)
                self.assertFalse(v.make_thumbnail(path, self.picture))
        self.assertFalse(v.make_thumbnail(self.folder / 'gone.mp4', self.picture))
        self.assertEqual(sorted(os.listdir(self.folder)), sorted(['secret.mp4', 'secret.ts', *others]))

    @unittest.skipUnless(sys.platform.startswith('linux'), 'only Linux ends children with their parent')
    def test_ffmpeg_dies_with_us(self):
        pipe = self.folder / 'pipe.mp4'
        os.mkfifo(pipe)
        code = f'import videoserverd as v; v.make_thumbnail(v.Path({str(pipe)!r}), v.Path({str(self.picture)!r}))'

        def running():
            listed = ran(['ps', '-axww', '-o', 'args='], errors='replace').stdout
            return [line for line in listed.splitlines() if re.match(r'\S*ffmpeg ', line) and str(pipe) in line]
        with subprocess.Popen([sys.executable, '-c', code], cwd=HERE) as parent:
            wait_until(running)
            parent.kill()
        wait_until(lambda: not running())

    def test_it_takes_a_limited_time(self):
        pipe = self.folder / 'pipe.mp4'
        os.mkfifo(pipe)
        with unittest.mock.patch.object(v, 'THUMBNAIL_SECONDS', 0.3):
            with in_time(3):
                self.assertFalse(v.make_thumbnail(pipe, self.picture))


# ---------- finished files, metrics, OpenAPI ----------------------------------------------
# GET and HEAD of finished files by RFC 9110, links that expire, what must not come out; /metrics and
# /openapi.json as other people's programs read them.

try:
    import openapi_spec_validator
except ImportError:
    openapi_spec_validator = None
try:
    import prometheus_client.parser
except ImportError:
    prometheus_client = None


class TestFiles(FilesTest):
    """GET and HEAD of finished files: ETag, Last-Modified, Range, If-Range, If-None-Match."""

    def test_a_whole_file_with_all_that_a_player_wants_to_know(self):
        status, headers, body = self.get()
        self.assertEqual((status, body), (200, self.data()))
        info = (self.daemon.output / 'cat_1.mp4').stat()
        wanted = {'Content-Type': 'video/mp4', 'Content-Length': '50000', 'Accept-Ranges': 'bytes',
                  'X-Content-Type-Options': 'nosniff', 'Content-Disposition': 'inline; filename="cat_1.mp4"',
                  'Last-Modified': time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime(info.st_mtime))}
        self.assertEqual({name: headers[name] for name in wanted}, wanted)
        self.assertRegex(headers['ETag'], r'^"[\w.-]+"$')
        self.assertIsNone(headers['Content-Range'])

    def test_head_tells_the_same_and_sends_nothing(self):
        for more in ({}, {'If_None_Match': '*'}):
            whole, head = self.get(**more), self.daemon.client.request('HEAD', self.path(), **more)
            self.assertEqual((head.status, head.json), (whole.status, b''))
            self.assertEqual([pair for pair in head.headers.items() if pair[0] != 'Date'],
                             [pair for pair in whole.headers.items() if pair[0] != 'Date'])
        for text in ('0-9', '50000-'):  # GET is the only method that has ranges (RFC 9110, 14.2)
            head = self.daemon.client.request('HEAD', self.path(), Range=f'bytes={text}')
            self.assertEqual((head.status, head.headers['Content-Length']), (200, '50000'))

    def test_any_single_range(self):
        data = self.data()
        for text, start, end in [('0-0', 0, 1), ('0-1', 0, 2), ('0-', 0, 50000), ('49999-', 49999, 50000),
                                 ('100-199', 100, 200), ('100-999999', 100, 50000), ('-1', 49999, 50000),
                                 ('-60000', 0, 50000), ('0-49999', 0, 50000), ('007-008', 7, 9)]:
            with self.subTest(text):
                status, headers, body = self.get(Range=f'bytes={text}')
                self.assertEqual((status, headers['Content-Range']), (206, f'bytes {start}-{end - 1}/50000'))
                self.assertEqual((body, headers['Content-Length']), (data[start:end], str(end - start)))
                self.assertEqual(headers['Content-Type'], 'video/mp4')

    def test_416_when_out_of_reach(self):
        for text in ('50000-', '50000-60000', '-0'):
            with self.subTest(text):
                status, headers, body = self.get(Range=f'bytes={text}')
                self.assertEqual((status, headers['Content-Range']), (416, 'bytes */50000'))
                self.assertIn('message', body)
        self.assertEqual(self.get(self.path('empty'), Range='bytes=0-').status, 416)
        status, headers, body = self.get(self.path('empty'))
        self.assertEqual((status, headers['Content-Length'], body), (200, '0', b''))

    def test_what_is_no_single_range_gets_the_whole_file(self):
        for text in ('bytes=0-1,5-6', 'bytes=', 'bytes=-', 'bytes=5-4', 'bytes=a-b', 'lines=0-1', 'bytes=0x0-1',
                     'bytes=1_0-20', 'bytes=+1-2', 'bytes=٠-١'.encode().decode('latin-1'), ''):
            with self.subTest(text):
                status, _, body = self.get(Range=text)
                self.assertEqual((status, len(body)), (200, 50000))

    def test_if_range(self):
        _, headers, _ = self.get()
        for validator, status in [
                (headers['ETag'], 206), (headers['Last-Modified'], 206), ('"other"', 200), ('nonsense', 200),
                ('W/' + headers['ETag'], 200), ('Sat, 01 Jan 2000 00:00:00 GMT', 200)]:
            self.assertEqual(self.get(Range='bytes=0-9', If_Range=validator).status, status, validator)
        self.assertEqual(self.get(Range='bytes=50000-', If_Range='"other"').status, 200)

    def test_if_none_match_and_if_modified_since(self):
        _, headers, _ = self.get()
        etag, modified = headers['ETag'], headers['Last-Modified']
        for more, status in [({'If_None_Match': etag}, 304), ({'If_None_Match': 'W/' + etag}, 304),
                             ({'If_None_Match': f'"a", {etag}'}, 304), ({'If_None_Match': '*'}, 304),
                             ({'If_None_Match': '"a"'}, 200), ({'If_Modified_Since': modified}, 304),
                             ({'If_Modified_Since': 'Sat, 01 Jan 2000 00:00:00 GMT'}, 200),
                             ({'If_Modified_Since': modified, 'If_None_Match': '"a"'}, 200),
                             ({'If_None_Match': etag, 'Range': 'bytes=0-9'}, 304)]:
            with self.subTest(more):
                status_, answer, body = self.get(**more)
                self.assertEqual(status_, status)
                if status == 304:
                    self.assertEqual((body, answer['ETag'], answer['Last-Modified']), (b'', etag, modified))

    def test_another_file_has_another_etag(self):
        etag, path = self.get().headers['ETag'], self.daemon.output / 'cat_1.mp4'
        self.addCleanup(os.utime, path, ns=(path.stat().st_mtime_ns,) * 2)
        os.utime(path, (1, 1))
        self.assertNotEqual(self.get().headers['ETag'], etag)

    def test_any_name(self):
        for name in HARD_NAMES[1:]:
            with self.subTest(name):
                status, headers, body = self.get(v.file_path(self.names, name))
                self.assertEqual((status, len(body), headers['Content-Type']), (200, 1000, 'video/mp4'))
                self.assertEqual(headers['Content-Disposition'], v.content_disposition(name))

    def test_html_is_harmless(self):
        _, headers, _ = self.get(self.path('html'))
        self.assertEqual(headers['X-Content-Type-Options'], 'nosniff')
        self.assertRegex(headers['Content-Security-Policy'], r"default-src 'none'.*sandbox(;|$)")
        self.assertNotIn('html', headers['Content-Type'])

    def test_only_files_the_database_knows_inside_the_output_folder_no_symlink_out(self):
        id = self.ids['clip']
        for path in [f'/files/{id}/unknown.mp4', f'/files/{id}/', f'/files/{id}', '/files/', f'/files/{id}/CAT_1.mp4',
                     v.file_path(self.ids['empty'], 'cat_1.mp4'), v.file_path(str(uuid.uuid4()), 'cat_1.mp4'),
                     f'/files/{id}/..%2f..%2fconfig.ini', f'/files/{id}/../{id}/cat_1.mp4',
                     f'/files/{id}/%2e/cat_1.mp4', f'/files/{id}/cat_1.mp4%00', f'/files/{id}//cat_1.mp4',
                     f'/files/{id}/cat_1.mp4/',
                     f'/files/{id}/.incomplete', f'/files/{id.upper()}/cat_1.mp4', f'/files/{id}/%63at_1.mp4%2f..',
                     *(self.path(kind) for kind in ('gone', 'link', 'pipe', 'folder'))]:
            with self.subTest(path):
                status, headers, body = self.get(path)
                self.assertIn(status, (400, 404))
                self.assertEqual(headers['Content-Type'], 'application/json')
                self.assertIn('message', body)

    def test_far_ranges_of_a_file_over_4_gb(self):
        size = self.sizes['huge']
        self.assertEqual(self.daemon.client.request('HEAD', self.path('huge')).headers['Content-Length'], str(size))
        status, headers, body = self.get(self.path('huge'), Range='bytes=-10')
        self.assertEqual((status, body), (206, bytes(10)))
        self.assertEqual(headers['Content-Range'], f'bytes {size - 10}-{size - 1}/{size}')
        self.assertEqual(self.get(self.path('huge'), Range=f'bytes={1 << 32}-{(1 << 32) + 4}').json, bytes(5))

    def test_streaming_in_bounded_memory_and_a_file_that_shrinks_is_never_padded(self):
        path, before = self.daemon.output / 'huge_1.mkv', self.daemon.rss()
        self.addCleanup(os.truncate, path, self.sizes['huge'])
        link = self.daemon.client.connection()
        link.request('GET', self.path('huge'))
        answer = link.getresponse()
        for _ in range(100):
            self.assertEqual(len(answer.read(1 << 20)), 1 << 20)
        self.assertLess(self.daemon.rss() - before, 4)
        os.truncate(path, 200 << 20)
        with self.assertRaises((http.client.IncompleteRead, OSError)):
            answer.read()
        link.close()


class TestDeleted(FilesTest):
    """What goes with a download that is deleted."""

    def test_its_picture_goes_too(self):
        picture = self.daemon.database.parent / 'thumbs' / f'{self.ids["clip"]}.jpg'
        picture.parent.mkdir()
        picture.write_bytes(b'a picture')
        path = f'/api/v1/thumbnail/{self.ids["clip"]}'
        self.assertEqual(self.get(path).json, b'a picture')
        self.assertEqual(self.daemon.client.delete(f'/api/v1/download/{self.ids["clip"]}').status, 200)
        self.assertEqual((picture.exists(), self.get(path).status), (False, 404))

    def test_a_file_in_a_folder_is_served_by_the_link_that_is_told(self):
        (self.daemon.output / 'cats').mkdir()
        self.daemon.output.joinpath(self.kinds['empty']).rename(self.daemon.output / 'cats/a.mp4')
        change_database(self.daemon.database, 'UPDATE downloads SET files = ? WHERE id = ?',
                        [(json.dumps([['cats/a.mp4', 0, 'video/mp4']]), self.ids['empty'])])
        file, = self.get(f'/api/v1/status/{self.ids["empty"]}').json['files']
        self.assertEqual(self.get('/' + file['path']).status, 200)

    def test_document_b_is_told_that_a_file_was_deleted_to_make_room(self):
        change_database(self.daemon.database, "UPDATE downloads SET reason = 'room', note = 'Deleted to make room.' "
                                              'WHERE id = ?', [(self.ids['html'],)])
        path = f'/getVideoDownloadPublicURL?URLTypeEnum=HTTPS&videoDownloadUUID={self.ids["html"]}'
        self.assertEqual((self.get(path).status, self.get(path).json), (
            418, {'errorCode': 'downloadFailed', 'errorMessage': 'Deleted to make room.'}))


class TestFeed(FilesTest):
    """The inbox as an Atom feed (RFC 4287), for programs that can send no key."""
    env = {'VIDEOSERVER_API_KEYS': FILES_KEY}
    atom = '{http://www.w3.org/2005/Atom}'

    def feed(self, path: str = '/feed.xml', **headers: str) -> Any:
        status, fields, body = self.get(path, **headers)
        self.assertEqual((status, fields['Content-Type']), (200, 'application/atom+xml; charset=utf-8'))
        return xml.etree.ElementTree.fromstring(body)

    def test_each_file_is_an_enclosure_that_a_player_can_get(self):
        feed = self.feed(X_API_Key=FILES_KEY)
        links = {link.get('rel'): link.get('href') for link in feed.findall(self.atom + 'link')}
        address = urlsplit(links['self'])
        self.assertEqual(len(self.feed(f'{address.path}?{address.query}')), len(feed))
        for wrong in ('/feed.xml', f'{address.path}?{address.query[:-1]}x', '/feed.xml?signature=%C3%BC'):
            self.assertEqual(self.get(wrong).status, 401)
        self.assertEqual(self.get(f'/api/v1/history?{address.query}').status, 401)
        for name in ('id', 'title', 'updated', 'author'):
            self.assertIsNotNone(feed.find(self.atom + name), name)
        entries = feed.findall(self.atom + 'entry')
        self.assertEqual(len(entries), len(self.ids) + 1)
        enclosures = []
        for entry in entries:
            for name in ('id', 'title', 'updated'):
                self.assertTrue(entry.find(self.atom + name).text, name)
            self.assertRegex(entry.find(self.atom + 'updated').text, r'^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ$')
            enclosures += [link for link in entry.findall(self.atom + 'link') if link.get('rel') == 'enclosure']
        clip, = (link for link in enclosures if 'cat_1' in link.get('href'))
        self.assertEqual((clip.get('type'), clip.get('length')), ('video/mp4', '50000'))
        address = urlsplit(clip.get('href'))
        self.assertEqual(self.get(f'{address.path}?{address.query}').json, self.data())


class TestSmallRoutes(DaemonTest):
    """Stars, cookies, the update of yt-dlp; and that every object of /api/v1 can be shown."""
    settings = {'downloads': {'min_free_space': '9000GB'}}
    env = {'VIDEOSERVER_API_KEYS': 'key'}

    def setUp(self):
        super().setUp()
        self.client = self.daemon.new_client(key='key')

    def test_a_star_stays_until_it_is_taken_away(self):
        id = self.client.post('/api/v1/download', {'url': tiktok_link(1)}).json['download_id']
        for verb, starred in (('star', True), ('star', True), ('unstar', False)):
            answer = self.client.post(f'/api/v1/download/{id}/{verb}')
            self.assertEqual((answer.status, answer.json['starred']), (200, starred))
            self.assertEqual(self.client.get('/api/v1/history').json['downloads'][0]['starred'], starred)
        self.assertEqual(self.client.post(f'/api/v1/download/{uuid.uuid4()}/star').status, 404)

    def test_cookies_of_allowed_sites_are_kept_privately_and_told_of(self):
        rows = [('.instagram.com', 'sessionid', 'secret-1'), ('.example.com', 'other', 'secret-2')]
        text = '# Netscape HTTP Cookie File\n' + ''.join(
            f'{domain}\tTRUE\t/\tTRUE\t2147483647\t{name}\t{value}\n' for domain, name, value in rows)
        file = self.daemon.database.parent / 'cookies.txt'
        self.assertEqual(self.daemon.client.request('PUT', '/api/v1/cookies', text.encode()).status, 401)
        self.assertEqual(self.client.request('PUT', '/api/v1/cookies', b'x' * (1 << 20 | 1)).status, 413)
        answer = self.client.request('PUT', '/api/v1/cookies', text.encode(), Origin='https://a.example')
        self.assertEqual(answer.status, 403)
        self.assertEqual(self.client.request('PUT', '/api/v1/cookies', b'no cookies').status, 400)
        self.assertFalse(file.exists())
        answer = self.client.request('PUT', '/api/v1/cookies', text.encode() + b'#' * 500_000)
        self.assertEqual((answer.status, answer.json['message'].partition(',')[0]),
                         (200, '1 cookies for instagram.com'))
        self.assertEqual(stat.S_IMODE(file.stat().st_mode), 0o600)
        self.assertIn('secret-1', file.read_text())
        self.assertNotIn('secret-2', file.read_text())
        self.assertEqual(len(self.client.get('/api/v1/health').json['cookies']), 1)
        self.assertEqual(self.client.delete('/api/v1/cookies').status, 200)
        self.assertEqual((file.exists(), self.client.get('/api/v1/health').json['cookies']), (False, []))
        self.assertNotIn('secret', self.daemon.log())

    def test_every_json_object_of_the_api_has_a_message(self):
        self.daemon.client.post('/api/v1/update')  # refused: no key
        seen, changes = set(), {route.path for route in v.ROUTES if route.path.startswith(v.IMPORT)}  # takes none here
        for route in v.ROUTES:
            if not route.path.startswith('/api/v1/') or 'update' in route.path:
                continue
            id = self.client.post('/api/v1/download', {'url': tiktok_link(2), 'again': True}).json['download_id']
            path = route.path.replace('{id}', id)
            for body in (None, {'url': tiktok_link(3), 'text': tiktok_link(4), 'name': 'phone'}, b'{'):
                answer = self.client.request(route.method, path, body)
                if isinstance(answer.json, dict):
                    self.assertTrue(answer.json['message'], (route.path, answer))
                    seen.add((route.path, answer.status < 300))
        fine = {path for path, good in seen if good}
        self.assertEqual({route.path for route in v.ROUTES if route.path.startswith('/api/v1/')} - fine,
                         {'/api/v1/update', '/api/v1/cookies', '/api/v1/thumbnail/{id}', *changes} - fine)
        self.assertTrue(all(row['message'] for row in self.client.get('/api/v1/history').json['downloads']))
        self.assertEqual(self.client.get('/api/v1/status/' + id).status, 200)


class TestSignedLinks(FilesTest):
    """With API keys on, links carry an expiring signature; a forged, expired or moved one gets 403."""
    env = {'VIDEOSERVER_API_KEYS': FILES_KEY}

    def row(self):
        return self.daemon.new_client(key=FILES_KEY).get(f'/api/v1/status/{self.ids["clip"]}').json

    def signed(self, expires, path=None):
        secret = (self.daemon.database.parent / 'link.key').read_bytes()
        return self.path() + v.sign_path(secret, path or self.path(), int(expires))

    def test_a_player_can_follow_the_links_of_the_api(self):
        row = self.row()
        self.assertEqual(row['public_url'], row['files'][0]['url'])
        address = urlsplit(row['public_url'])
        path = f'{address.path}?{address.query}'
        self.assertEqual(self.get(path).json, self.data())
        self.assertEqual(self.get(path, Range='bytes=0-1').status, 206)
        self.assertEqual(self.daemon.client.request('HEAD', path).status, 200)
        expires = int(parse_qs(address.query)['expires'][0])
        self.assertAlmostEqual(expires, time.time() + self.daemon.config.s3.url_expiry, delta=60)

    def test_forged_expired_and_moved_links_get_403(self):
        good = self.signed(time.time() + 100)
        self.daemon.restart()  # which it outlives
        self.assertEqual(self.get(good).status, 200)
        for path in [self.signed(time.time() - 1), good[:-1], good + '0',
                     good.replace('expires=1', 'expires=2'), self.signed(time.time() + 100, self.path('empty')),
                     good.replace('cat_1', 'dog_1'), good.replace(self.ids['clip'], self.ids['empty'])]:
            with self.subTest(path):
                status, _, body = self.get(path)
                self.assertEqual(status, 403)
                self.assertIn('link', body['message'])

    def test_a_thumbnail_needs_the_key_or_its_own_signature(self):
        picture = self.daemon.database.parent / 'thumbs' / f'{self.ids["clip"]}.jpg'
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(b'a picture')
        self.addCleanup(picture.unlink)
        good, (path, _, query) = '/' + self.row()['thumbnail'], self.row()['thumbnail'].partition('?')
        self.assertEqual(self.get(good).json, b'a picture')
        self.assertEqual(self.get('/' + path, X_API_Key=FILES_KEY).json, b'a picture')
        of_file = self.signed(time.time() + 100).partition('?')[2]
        for wrong, status in (('', 401), ('?' + query.partition('&')[0], 401), ('?' + of_file, 403),
                              ('?' + query[:-1], 403), ('?' + query.replace('expires=1', 'expires=2'), 403)):
            self.assertEqual(self.get(f'/{path}{wrong}').status, status, wrong)
        self.assertEqual(self.get(f'/{path}'.replace(self.ids['clip'], self.ids['empty']) + '?' + query).status, 403)
        self.assertEqual(self.get(f'{self.path()}?{query}').status, 403)

    def test_a_key_opens_files_too_a_signature_nothing_but_its_file_and_without_either_the_key_is_asked_for(self):
        query = self.signed(time.time() + 100).partition('?')[2]
        for path in (f'/api/v1/status/{self.ids["clip"]}', '/api/v1/history', '/metrics'):
            self.assertEqual(self.get(f'{path}?{query}').status, 401)
        self.assertEqual(self.get(X_API_Key=FILES_KEY).status, 200)
        for path, headers in ((self.path(), {}), (self.path() + '?', {}), (self.path(), {'X_API_Key': 'wrong'})):
            self.assertEqual(self.get(path, **headers).status, 401)


class TestCopies(CopiesTest):
    """With [s3] set each finished file is put into the bucket; trouble with it shows, and nothing is lost."""

    def problems(self):
        """What health says of the bucket; it may have other troubles, such as an old Python."""
        status, _, body = self.daemon.client.get('/api/v1/health')
        self.assertEqual((status, body['status']), (200, 'degraded' if body['problems'] else 'healthy'))
        return ' '.join(problem for problem in body['problems'] if 'S3' in problem)

    def test_a_finished_file_is_copied_and_url_type_s3_gives_a_presigned_get(self):
        self.daemon.start()
        row = self.daemon.download(self.site.tiktok(title='Größe 🐈', size=300_000))
        id = row['download_id']
        self.copied(id)
        status, _, body = self.public_url(id)
        self.assertEqual(status, 200, body)
        status, headers, data = fetch(body['publicURL'])
        self.assertEqual((status, headers['Content-Type']), (200, 'video/mp4'))
        self.assertEqual(data, (self.daemon.output / row['filename']).read_bytes())
        self.assertEqual(headers['Content-Disposition'], v.content_disposition(row['filename']))
        wait_until(lambda: not self.problems())
        self.assertEqual(self.daemon.client.delete(f'/api/v1/download/{id}').status, 200)
        wait_until(lambda: fetch(body['publicURL'])[0] == 404)

    def test_trouble_with_the_bucket_shows_in_status_and_health_and_is_got_over(self):
        self.daemon.change_env({'AWS_SECRET_ACCESS_KEY': 'wrong'})
        self.daemon.start()
        row = self.daemon.download(self.site.tiktok(size=300_000))
        id = row['download_id']
        row = self.copied(id, 'failing')
        self.assertEqual((row['status'], row['error_message']), ('completed', None))
        self.assertIn('AWS_SECRET_ACCESS_KEY', row['s3']['error'])
        wait_until(lambda: 'AWS_SECRET_ACCESS_KEY' in self.problems())  # which is told after the row
        status, _, body = self.public_url(id)
        self.assertEqual((status, body['errorCode']), (418, 'downloadNotReady'))
        self.daemon.change_env({'AWS_SECRET_ACCESS_KEY': 'testing'})
        self.daemon.restart()
        self.copied(id)
        wait_until(lambda: not self.problems())

    def test_a_copy_lost_in_the_middle_is_finished_after_kill_9_and_delays_no_sigterm(self):
        self.relay.limit, self.relay.stall = 200_000, True
        self.daemon.start()
        id = self.daemon.download(self.site.tiktok(size=3_000_000))['download_id']
        self.assertTrue(self.relay.stalled.wait(fair(20)))
        self.daemon.kill()
        self.relay.stalled.clear()
        self.daemon.start()
        self.assertTrue(self.relay.stalled.wait(fair(20)))
        self.assertLess(self.daemon.terminate(), fair(4))
        self.relay.limit = None
        self.daemon.start()
        self.copied(id)
        self.assertEqual(len(fetch(self.public_url(id).json['publicURL'])[2]), 3_000_000)


class TestMetrics(DaemonTest):
    """/metrics in Prometheus text."""

    def figures(self):
        status, headers, body = self.daemon.client.get('/metrics')
        self.assertEqual((status, headers['Content-Type']), (200, 'text/plain; version=0.0.4; charset=utf-8'))
        self.assertTrue(body.endswith(b'\n'))
        families = list(prometheus_client.parser.text_string_to_metric_families(body.decode()))
        self.assertEqual(len(families), len({family.name for family in families}), 'a family in two pieces')
        return families

    def test_the_histogram_is_whole_before_the_first_link(self):
        self.assertLessEqual({('ack_seconds_count', 0), ('ack_seconds_sum', 0)}, {*v.Board(1).counters()})

    def test_the_files_of_a_carousel_are_counted_when_its_row_is_over(self):
        daemon = unittest.mock.MagicMock()
        outcome = unittest.mock.Mock(files=[unittest.mock.Mock(size=7)])
        with unittest.mock.patch.multiple(v, site_of=unittest.mock.DEFAULT, way_of=unittest.mock.DEFAULT,
                                          forget_files=unittest.mock.DEFAULT):
            for over in (False, True):
                v.Daemon._on_outcome(daemon, unittest.mock.Mock(), outcome, over)
        counted = [call.args[1:] for call in daemon.board.count.call_args_list if 'bytes' in call.args[0]]
        self.assertEqual(counted, [(7,)])

    @unittest.skipUnless(prometheus_client, 'prometheus_client is not installed')
    def test_valid_by_the_parser_of_prometheus_client(self):
        self.daemon.download(self.site.tiktok(size=1_234_567))
        self.daemon.fails(self.site.tiktok(state='gone'))
        wait_until(lambda: b'give_up' in self.daemon.client.get('/metrics').json)
        families = {family.name: family for family in self.figures()}
        value = {(sample.name, *sample.labels.values()): sample.value
                 for family in families.values() for sample in family.samples}
        by_status = [value['videoserverd_downloads', status] for status in ('completed', 'failed', 'queued')]
        self.assertEqual(by_status, [1, 1, 0])
        self.assertEqual(value['videoserverd_downloaded_bytes_total',], 1_234_567)
        self.assertGreaterEqual(value['videoserverd_attempts_total', 'done', ''], 1)
        self.assertEqual(value['videoserverd_ways_total', 'tiktok.com', 'chrome', 'done'], 1)
        self.assertTrue(any(key[:2] == ('videoserverd_attempts_total', 'give_up') and key[2] for key in value), value)
        free = os.statvfs(self.daemon.output)
        self.assertAlmostEqual(value['videoserverd_free_disk_bytes',], free.f_bavail * free.f_frsize, delta=1 << 30)
        self.assertTrue(300 < value['videoserverd_certificate_days',] < 400)
        self.assertEqual(value['videoserverd_ytdlp_info', vendored()], 1)
        self.check_histogram(families['videoserverd_ack_seconds'])

    def check_histogram(self, family):
        self.assertEqual(family.type, 'histogram')
        buckets = [(float(sample.labels['le']), sample.value) for sample in family.samples
                   if sample.name.endswith('_bucket')]
        self.assertEqual(buckets, sorted(buckets))
        self.assertEqual([count for _, count in buckets], sorted(count for _, count in buckets))
        self.assertEqual(buckets[-1], (float('inf'), 2))
        rest = {sample.name: sample.value for sample in family.samples if not sample.name.endswith('_bucket')}
        self.assertEqual(rest['videoserverd_ack_seconds_count'], 2)
        self.assertGreater(rest['videoserverd_ack_seconds_sum'], 0)


class TestOpenAPI(unittest.TestCase):
    """/openapi.json: OpenAPI 3.1 of everything here, both dialects; true to the last status code (.ci/api-check)."""

    @unittest.skipUnless(openapi_spec_validator, 'openapi-spec-validator is not installed')
    def test_valid_by_openapi_spec_validator(self):
        for keys in (False, True):
            description = v.describe_api(v.ROUTES, keys, 'https://pi.local:8443/videodownloader')
            openapi_spec_validator.validate(json.loads(json.dumps(description)))
            self.assertEqual(description['openapi'], '3.1.0')
            self.assertEqual(description['servers'], [{'url': 'https://pi.local:8443/videodownloader'}])

    def test_security_is_declared_only_while_keys_are_on(self):
        off, on = (json.dumps(v.describe_api(v.ROUTES, keys, 'https://h')) for keys in (False, True))
        self.assertNotIn('securit', off)
        self.assertNotIn('"401"', off)
        self.assertIn('"X-API-Key"', on)

    def test_every_route_is_described(self):
        paths = v.describe_api(v.ROUTES, True, 'https://h')['paths']
        self.assertEqual({(route.path, route.method.lower()) for route in v.ROUTES},
                         {(path, method) for path, methods in paths.items() for method in methods})
        for path in ('/initiateDownload', '/listDownloads', '/getVideoDownloadPublicURL'):
            for operation in paths[path].values():
                self.assertEqual(set(operation['responses']), {'200', '418'})


# ---------- certificate -------------------------------------------------------------------
# The openssl command is the judge of what an iPhone would say; kills and full disks are real.

class TestCertificateForAnIPhone(unittest.TestCase):
    """Every point of what an iPhone asks for, by the openssl command's word."""

    @classmethod
    def setUpClass(cls):
        cls.config = new_config(names='Pi.Lan, fd00::77, 192.168.77.7', public_base_url='https://videos.lan:8443')
        cls.made, cls.changed = v.ensure_certificate(cls.config, NOW, names=['nas.home.arpa', '10.9.8.7'])
        cls.leaf, cls.ca = fields_of(cls.config.server.cert_file), fields_of(cls.config.server.ca_file)

    def test_passes_openssl_verify_by_each_name_and_address(self):
        host = socket.gethostname().split('.')[0].lower()
        self.assertLessEqual({'pi.lan', 'fd00::77', '192.168.77.7', 'videos.lan', 'nas.home.arpa', '10.9.8.7',
                              'localhost', '127.0.0.1', '::1', f'{host}.local'}, {*self.made.names})
        for each in self.made.names:
            option = '-verify_ip' if v.as_address(each) else '-verify_hostname'
            self.assertRegex(verdict(self.config, self.config.server.cert_file, option, each), r'\bOK\n$')
        self.assertIn('mismatch', verdict(self.config, self.config.server.cert_file, '-verify_hostname', 'else.local'))
        self.assertEqual((self.changed, self.made.own), (True, False))

    def test_fails_for_apple_and_8_8_8_8_signed_by_the_same_ca(self):
        good = sign_by_hand(self.config, 'x.local', 'DNS:x.local,IP:10.1.2.3')
        self.assertRegex(verdict(self.config, good, '-verify_hostname', 'x.local'), r'\bOK\n$')
        for subject, names in (('www.apple.com', 'DNS:www.apple.com'), ('x.local', 'DNS:x.local,IP:8.8.8.8'),
                               ('x.local', 'DNS:x.local,IP:2001:4860::8'), ('x.local', 'DNS:locals')):
            leaf = sign_by_hand(self.config, subject, names)
            self.assertIn('permitted subtree violation', verdict(self.config, leaf))

    def test_the_leaf_is_as_ios_wants_it(self):
        leaf, host = self.leaf, self.made.names[0]
        self.assertEqual(leaf['Subject'], f'CN={host}')
        self.assertTrue(host.endswith('.local'))
        self.assertEqual((leaf['Version'][:1], leaf['Signature Algorithm']), ('3', 'ecdsa-with-SHA256'))
        self.assertEqual((leaf['Public-Key'], leaf['ASN1 OID']), ('(256 bit)', 'prime256v1'))
        self.assertEqual(leaf['X509v3 Basic Constraints'], ('critical', 'CA:FALSE'))
        self.assertEqual(leaf['X509v3 Key Usage'], ('critical', 'Digital Signature'))
        self.assertEqual(leaf['X509v3 Extended Key Usage'], ('', 'TLS Web Server Authentication'))
        self.assertEqual(leaf['X509v3 Authority Key Identifier'][1].replace('keyid:', ''),
                         self.ca['X509v3 Subject Key Identifier'][1])
        alternatives = re.findall(r'(DNS|IP Address):([^ ,]+)', leaf['X509v3 Subject Alternative Name'][1])
        self.assertEqual([v.host_words([name])[0] for _, name in alternatives], list(self.made.names))
        self.assertEqual([name for kind, name in alternatives if kind == 'DNS'],
                         [name for name in self.made.names if not v.as_address(name)])

    def test_the_ca_is_as_ios_wants_it(self):
        ca = self.ca
        self.assertEqual(ca['Subject'], 'CN=videoserverd on ' + self.made.names[0][:-len('.local')])
        self.assertEqual((ca['Issuer'], self.leaf['Issuer']), (ca['Subject'], ca['Subject']))
        self.assertEqual(ca['X509v3 Basic Constraints'], ('critical', 'CA:TRUE, pathlen:0'))
        self.assertEqual(ca['X509v3 Key Usage'], ('critical', 'Certificate Sign, CRL Sign'))
        self.assertEqual((ca['Signature Algorithm'], ca['ASN1 OID']), ('ecdsa-with-SHA256', 'prime256v1'))
        critical, tree = ca['X509v3 Name Constraints']
        self.assertEqual(critical, 'critical')
        for permitted in ('DNS:local', 'DNS:lan', 'DNS:home.arpa', 'DNS:localhost', f'DNS:{v.machine_names()[1]}',
                          'IP:10.0.0.0/255.0.0.0', 'IP:172.16.0.0/255.240.0.0', 'IP:192.168.0.0/255.255.0.0',
                          'IP:100.64.0.0/255.192.0.0', 'IP:169.254.0.0/255.255.0.0', 'IP:127.0.0.0/255.0.0.0',
                          'IP:FC00:0:0:0:0:0:0:0/FE00:0:0:0:0:0:0:0', 'IP:FE80:0:0:0:0:0:0:0/FFC0:0:0:0:0:0:0:0',
                          'IP:0:0:0:0:0:0:0:1/FFFF:FFFF:FFFF:FFFF:FFFF:FFFF:FFFF:FFFF'):
            self.assertIn(f' {permitted} ', f' {tree} ')
        self.assertNotIn('Excluded', tree)

    def test_dates_and_fingerprint(self):
        shown = openssl('x509', '-in', self.config.server.ca_file, '-noout', '-fingerprint', '-sha256')
        self.assertEqual(shown.strip().partition('=')[2], v.ca_fingerprint(self.config))
        for found, days in ((self.leaf, 397), (self.ca, 3652)):
            first, last = (ssl.cert_time_to_seconds(found[name]) for name in ('Not Before', 'Not After'))
            self.assertEqual(first, int(NOW - 86400))  # a Pi has no clock at boot
            self.assertEqual(last - first, days * 86400)
        self.assertEqual(self.made.not_after, last_of(self.leaf))

    def test_the_profile_is_as_ios_wants_it(self):
        profile = plistlib.loads(v.mobileconfig(self.config))
        root, = profile.pop('PayloadContent')
        der = ssl.PEM_cert_to_DER_cert(self.config.server.ca_file.read_text())
        self.assertEqual((root['PayloadContent'], v.read_ca(self.config.server.ca_file)[0]), (der, der))
        self.assertEqual((profile['PayloadType'], profile['PayloadVersion'], profile['TargetDeviceType']),
                         ('Configuration', 1, 1))
        self.assertEqual((root['PayloadType'], root['PayloadVersion']), ('com.apple.security.root', 1))
        self.assertNotEqual(root['PayloadIdentifier'], profile['PayloadIdentifier'])
        self.assertEqual(profile['PayloadDisplayName'], self.ca['Subject'][len('CN='):])
        identities = {str(uuid.UUID(part['PayloadUUID'])).upper() for part in (profile, root)}
        self.assertEqual(identities, {profile['PayloadUUID'], root['PayloadUUID']})
        self.assertEqual(plistlib.loads(v.mobileconfig(self.config)), {**profile, 'PayloadContent': [root]})

    def test_a_new_ca_replaces_the_profile(self):
        config = new_config(Path(shutil.copytree(self.config.folder, tempfile.mkdtemp(dir=RUN) + '/copy')))
        v.ensure_certificate(config, NOW, new_ca=True)
        old, new = (plistlib.loads(v.mobileconfig(each)) for each in (self.config, config))
        self.assertEqual(old['PayloadIdentifier'], new['PayloadIdentifier'])
        self.assertNotEqual(old['PayloadUUID'], new['PayloadUUID'])
        self.assertNotEqual(*(openssl('pkey', '-in', each.server.ca_file.with_name('ca.key'), '-pubout')
                              for each in (self.config, config)))


class TestRenewal(unittest.TestCase):
    """A leaf is renewed from the same CA, with no phone touched."""

    @classmethod
    def setUpClass(cls):
        cls.template = new_config()
        cls.first, _ = v.ensure_certificate(cls.template, NOW)

    def setUp(self):
        self.config = new_config(Path(shutil.copytree(self.template.folder, tempfile.mkdtemp(dir=RUN) + '/copy')))
        self.before = contents(self.config)

    def changed(self) -> set:
        """Names of the files that are not as they were."""
        now = contents(self.config)
        return {name for name in {*now, *self.before} if now.get(name) != self.before.get(name)}

    def test_a_start_with_a_good_certificate_runs_no_program_and_writes_nothing(self):
        with unittest.mock.patch.object(subprocess, 'run', side_effect=AssertionError):
            for now in (NOW, NOW + 366 * v.DAY - 60, 0):
                self.assertEqual(v.ensure_certificate(self.config, now), (self.first, False))
        self.assertEqual(self.changed(), set())

    def test_under_30_days_left_gives_a_new_leaf_from_the_same_ca(self):
        later = NOW + 366 * v.DAY + 60
        made, changed = v.ensure_certificate(self.config, later)
        self.assertEqual((changed, made.not_after), (True, int(later) + 396 * v.DAY))
        self.assertEqual(self.changed(), {'server.crt'})  # the key stays: one file, one rename
        self.assertRegex(verdict(self.config, self.config.server.cert_file, '-attime', str(int(later))), r'\bOK\n$')

    def test_a_certificate_from_a_clock_that_was_ahead_is_renewed(self):
        v.ensure_certificate(self.config, NOW + YEAR, force=True)
        made, changed = v.ensure_certificate(self.config, NOW)
        self.assertEqual((changed, made.not_after), (True, self.first.not_after))

    def test_new_names_and_addresses_give_a_new_leaf(self):
        config = new_config(self.config.folder, public_base_url='https://192.168.77.9:8443/videos')
        self.assertIn('192.168.77.9', v.ensure_certificate(config, NOW)[0].names)
        with unittest.mock.patch.object(v.socket, 'gethostname', return_value='renamed'):
            made, changed = v.ensure_certificate(self.config, NOW)
            self.assertEqual((changed, made.names[0]), (True, 'renamed.local'))
            self.assertNotIn('renamed', made.names)  # outside what this CA may sign for
            self.assertFalse(v.ensure_certificate(self.config, NOW)[1])
        here = ('127.0.0.1', '10.6.6.6', '2001:db8::1', '8.8.8.8')
        with unittest.mock.patch.object(v, 'host_addresses', return_value=here):
            made, changed = v.ensure_certificate(self.config, NOW)
            self.assertEqual((changed, made.names[-2:]), (True, ('127.0.0.1', '10.6.6.6')))
        self.assertEqual(self.changed(), {'server.crt'})

    def test_names_given_are_remembered_for_renewals(self):
        for _ in range(2):
            made, _ = v.ensure_certificate(self.config, NOW, ['NAS.lan.', '192.168.5.5', 'fe80::1%eth0'])
        later, _ = v.ensure_certificate(self.config, NOW + 380 * v.DAY)
        for certificate in (made, later):
            self.assertLessEqual({'nas.lan', '192.168.5.5', 'fe80::1'}, {*certificate.names})
        self.assertNotIn('ca.crt', self.changed())

    def test_a_name_outside_needs_a_new_ca_and_the_message_says_so(self):
        for word in ('videos.example.org', '8.8.8.8', '2001:db8::1', 'com'):
            with self.assertRaisesRegex(v.Trouble, rf'^{re.escape(word)}: .*--new-ca'):
                v.ensure_certificate(self.config, NOW, [word])
        for word in ('no host', '10.0.0.0/8', '-x', '', 'a..b', 'x' * 64, '*.lan'):
            with self.assertRaisesRegex(v.Trouble, 'is neither a host name'):
                v.ensure_certificate(self.config, NOW, [word])
        self.assertEqual(self.changed(), set())
        v.ensure_certificate(self.config, NOW, ['videos.example.org', '8.8.8.8'], new_ca=True)
        self.assertEqual(self.changed(), {'ca.crt', 'ca.key', 'server.crt', 'server.key', 'names.json'})
        made, _ = v.ensure_certificate(self.config, NOW + 380 * v.DAY)
        self.assertIn('8.8.8.8', made.names)
        self.assertRegex(verdict(self.config, self.config.server.cert_file, '-attime', str(int(NOW + 380 * v.DAY)),
                                 '-verify_hostname', 'videos.example.org'), r'\bOK\n$')
        self.assertIn('permitted', verdict(self.config, sign_by_hand(self.config, 'x', 'DNS:www.apple.com')))

    def test_a_configured_name_outside_is_left_out_and_logged(self):
        config = new_config(self.config.folder, public_base_url='https://b.example',
                            names='nas.lan, videos.example.org')
        with self.assertLogs(v.log, 'WARNING') as logs:
            made, _ = v.ensure_certificate(config, NOW)
        self.assertRegex(logs.output[0], r'names: .*videos\.example\.org.*--new-ca')
        self.assertEqual({'nas.lan', 'videos.example.org', 'b.example'} & {*made.names}, {'nas.lan'})
        permitted = v.remembered_names(config)[1]
        words = {'nas.lan': True, 'b.example': False, '10.1.1.1': True, '9.9.9.9': False}
        self.assertEqual({word: v.may_sign(word, permitted) for word in words}, words)
        made, _ = v.ensure_certificate(config, NOW, new_ca=True)
        self.assertIn('videos.example.org', made.names)

    def test_a_host_called_tv_gets_no_ca_for_all_of_tv(self):
        with unittest.mock.patch.object(v.socket, 'gethostname', return_value='TV'):
            made, _ = v.ensure_certificate(self.config, NOW, new_ca=True)
        self.assertEqual(made.names[:3], ('tv.local', 'localhost', '127.0.0.1'))
        self.assertIn('permitted', verdict(self.config, sign_by_hand(self.config, 'x', 'DNS:arte.tv')))

    def test_odd_host_names(self):
        for host, names in {
                'My Pi.fritz.box': ('my-pi.local', 'my-pi', 'my-pi.fritz.box', 'localhost'),
                'localhost': ('localhost.local', 'localhost'), '': ('localhost.local', 'localhost'),
                'x' * 64: ('x' * 63 + '.local', 'x' * 63, 'localhost'), 'ü': ('localhost.local', 'localhost')}.items():
            with unittest.mock.patch.object(v.socket, 'gethostname', return_value=host):
                self.assertEqual(v.machine_names(), names)
                made, _ = v.ensure_certificate(new_config(), NOW)
                self.assertLessEqual({*names}, {*made.names})

    def test_addresses_that_come_and_go_are_left_out(self):
        flags = {'1': '80', '2': '01', '3': '20', '4': '80'}  # permanent, temporary, deprecated, a container's
        tables = {'/proc/net/fib_trie': '  |-- 10.9.0.0\n     /16 link UNICAST\n  |-- 10.9.0.7\n     /32 host LOCAL\n',
                  '/proc/net/if_inet6': '\n'.join(f'fd{at:0>30} 02 40 00 {bits} {"veth4" if at == "4" else "eth0"}'
                                                  for at, bits in flags.items())}
        with unittest.mock.patch.object(v.Path, 'read_text', lambda path, **_: tables[str(path)]), \
                unittest.mock.patch.object(v.socket, 'socket', side_effect=OSError):
            self.assertEqual(v.host_addresses(), ('127.0.0.1', '::1', '10.9.0.7', 'fd00::1'))

    def test_a_lost_ca_key_keeps_the_leaf_and_says_so(self):
        (self.config.server.ca_file.with_name('ca.key')).unlink()
        self.before = contents(self.config)
        with self.assertLogs(v.log, 'WARNING') as logs:
            self.assertEqual(v.ensure_certificate(self.config, NOW + 380 * v.DAY), (self.first, False))
        self.assertRegex(logs.output[0], r'ca\.key is missing.*move .*ca\.crt and .*server\.crt away')
        for asked in ({'force': True}, {'names': ['x.lan']}):
            with self.assertRaisesRegex(v.Trouble, r'ca\.key is missing.*move .*ca\.crt and .*server\.crt away'):
                v.ensure_certificate(self.config, NOW, **asked)
        with self.assertRaisesRegex(v.Trouble, r'ca\.key is missing'):
            v.ensure_certificate(self.config, NOW + 400 * v.DAY)  # expired by now: nothing usable left
        with self.assertRaisesRegex(v.Trouble, r'ca\.crt is left alone.*ca\.key is missing'):
            v.ensure_certificate(self.config, NOW, new_ca=True)  # whose key we lack may be somebody's CA
        v.make_key(self.config.server.ca_file.with_name('ca.key'), Path('/none'), True)
        before = self.config.server.ca_file.read_bytes()
        with self.assertRaisesRegex(v.Trouble, 'is left alone, for .* is missing or of another CA'):
            v.ensure_certificate(self.config, NOW, new_ca=True)
        self.assertEqual(self.config.server.ca_file.read_bytes(), before)
        self.config.server.ca_file.with_name('ca.key').unlink()
        self.assertEqual(self.changed(), set())
        for path in (self.config.server.ca_file, self.config.server.cert_file):
            path.rename(f'{path}.away')
        self.assertTrue(v.ensure_certificate(self.config, NOW)[1])

    def test_a_lost_leaf_is_made_anew_with_its_key(self):
        self.config.server.cert_file.unlink()
        self.assertTrue(v.ensure_certificate(self.config, NOW)[1])
        self.assertEqual(self.changed(), {'server.crt'})

    def test_broken_files_are_named_with_what_to_do(self):
        other, locked = (openssl('genpkey', '-algorithm', 'EC', '-pkeyopt', 'ec_paramgen_curve:P-256', *more)
                         for more in ((), ('-aes128', '-pass', 'pass:secret')))
        for name, text in (('server.key', 'garbage'), ('server.key', None), ('server.key', other),
                           ('server.key', locked), ('server.crt', ''), ('server.crt', 'garbage')):
            self.setUp()
            file = self.config.server.ca_file.with_name(name)
            file.unlink()
            if text is not None:
                file.write_text(text)
            with self.assertRaisesRegex(v.Trouble, rf'^[^\n]*{name}[^\n]*move both away[^\n]*$'):
                v.ensure_certificate(self.config, NOW)

    def test_the_leaf_never_outlives_its_ca(self):
        end = last_of(fields_of(self.config.server.ca_file))
        with self.assertLogs(v.log, 'WARNING') as logs:
            made, _ = v.ensure_certificate(self.config, end - 20 * v.DAY)
        self.assertEqual(made.not_after, end)
        self.assertIn('--new-ca', logs.output[0])

    def test_broken_names_json_does_not_matter_much(self):
        self.config.server.ca_file.with_name('names.json').write_text('{"given": 7')
        with self.assertLogs(v.log, 'WARNING'):
            made, _ = v.ensure_certificate(self.config, NOW + 380 * v.DAY)
        self.assertIn('localhost', made.names)


class TestOwnCertificate(unittest.TestCase):
    """The owner's certificate is left alone; only its expiry is reported."""

    def test_own_certificate_is_left_alone(self):
        for with_ca in (False, True):
            config = new_config()
            if with_ca:
                v.ensure_certificate(config, NOW)
            self_signed(config.server.cert_file, config.server.key_file, 'DNS:nas.example.org', 'DNS:*.nas.example.org')
            before = contents(config)
            end = last_of(fields_of(config.server.cert_file))
            with unittest.mock.patch.object(subprocess, 'run', side_effect=AssertionError):
                for now in (NOW, NOW + YEAR, 0):
                    made, changed = v.ensure_certificate(config, now)
                self.assertEqual((made.own, changed), (True, False))
                self.assertEqual(made.names, ('nas.example.org', '*.nas.example.org'))
                self.assertEqual(made.not_after, end)
                for asked in ({'force': True}, {'new_ca': True}, {'names': ['x.lan']}):
                    with self.assertRaisesRegex(v.Trouble, 'your own certificate.*left alone'):
                        v.ensure_certificate(config, NOW, **asked)
            self.assertEqual(contents(config), before)
            v.server_context(config)

    def test_an_own_certificate_needs_no_folder_for_the_ca(self):
        config = new_config(ca_file='/proc/1/nothing/ca.crt')
        self_signed(config.server.cert_file, config.server.key_file, 'DNS:nas.example.org', 'DNS:*.nas.example.org')
        with unittest.mock.patch.object(v.fcntl, 'flock', side_effect=AssertionError):  # and no lock
            self.assertTrue(v.ensure_certificate(config, NOW)[0].own)
        with self.assertRaisesRegex(v.Trouble, 'ca.crt is missing'):
            v.mobileconfig(config)

    def test_our_leaf_without_its_ca_counts_as_own(self):
        config = new_config()
        v.ensure_certificate(config, NOW)
        config.server.ca_file.unlink()
        self.assertTrue(v.ensure_certificate(config, NOW)[0].own)


class TestClock(unittest.TestCase):
    """A clock before the build date waits or says so instead of making a certificate nobody accepts."""

    def test_a_clock_before_the_build_date_makes_no_certificate(self):
        config = new_config()
        with self.assertRaisesRegex(v.ClockWrong, 'the clock shows 1970-01-01.*timedatectl'):
            v.ensure_certificate(config, 60)
        self.assertEqual(contents(config), {})
        made, _ = v.ensure_certificate(config, NOW)
        with unittest.mock.patch.object(v.socket, 'gethostname', return_value='renamed'):
            with self.assertLogs(v.log, 'WARNING') as logs:
                self.assertEqual(v.ensure_certificate(config, 60), (made, False))
        self.assertIn('the clock shows 1970', logs.output[0])
        with self.assertRaises(v.ClockWrong):
            v.ensure_certificate(config, 60, force=True)

    def test_a_start_with_a_wrong_clock_waits_and_says_so_once_an_hour(self):
        naps: List[float] = []
        clock = SimpleNamespace(**{**vars(time), 'monotonic': lambda: 5000 + sum(naps), 'sleep': naps.append})
        wrong = [v.ClockWrong('the clock shows 1970')] * 2000
        with unittest.mock.patch.multiple(v, time=clock, server_context=lambda config: 'it', ensure_certificate=(
                unittest.mock.Mock(side_effect=[*wrong, ('certificate', True)]))):
            with self.assertLogs(v.log, 'WARNING') as logs:
                self.assertEqual(v.Daemon(new_config())._make_context(), 'it')
        self.assertEqual((len(naps), len(logs.output)), (2000, 2))


class TestDailyCare(unittest.TestCase):
    """What is wrong with the certificate stays in health until it is fixed."""

    def test_a_certificate_that_cannot_be_used_is_told_each_time(self):
        config = new_config()
        v.ensure_certificate(config, time.time())
        care = v.Daemon(config).care
        care.server = SimpleNamespace(app=SimpleNamespace())
        morning = time.time() // v.DAY * v.DAY
        care.renew_certificate(morning)
        key = config.server.key_file.read_bytes()
        config.server.key_file.unlink()
        care.renew_certificate(morning + 80_000)  # not looked at before the next day
        for _ in range(2):
            with self.assertRaises(v.Trouble):
                care.renew_certificate(morning + v.DAY)
        config.server.key_file.write_bytes(key)
        for moment in (morning + v.DAY, morning + 500 * v.DAY):  # it expired meanwhile: renewed once the clock is right
            care.renew_certificate(moment)
            self.assertGreater(care.certificate.not_after, moment + 300 * v.DAY)

    def test_the_first_minute_without_yt_dlp_is_no_fault(self):
        daemon = v.Daemon(new_config())
        daemon.store.open()
        self.addCleanup(daemon.store.close)
        fine = 'healthy' if sys.version_info >= (3, 11) else 'degraded'  # an older Python holds yt-dlp back
        for problems, status in (({}, fine), ({'ytdlp': 'It cannot be fetched.'}, 'degraded')):
            daemon.care.problems = problems
            report = daemon.health.report()
            self.assertEqual((report['preparing'], report['status']), (not problems, status), report)
            self.assertIn('yt-dlp is', report['paused'])

    def test_the_watchdog_is_fed_only_while_every_thread_comes_round(self):
        daemon = v.Daemon(new_config())
        daemon.server, daemon.store.thread = SimpleNamespace(), threading.current_thread()
        late = time.monotonic() - v.STALE_SECONDS - 1
        for scheduler, server, alive in ((0, 0, True), (late, 0, False), (0, late, False)):
            daemon.scheduler.beat, daemon.server.beat = (beat or time.monotonic() for beat in (scheduler, server))
            self.assertEqual(daemon.alive(), alive)

    def test_a_certificate_that_ends_soon_is_a_problem(self):
        daemon = v.Daemon(new_config())
        for days, count in ((13.5, 1), (15.5, 0)):
            daemon.care.certificate = SimpleNamespace(not_after=time.time() + days * v.DAY)
            self.assertEqual(str(daemon.health.problems(None)).count('certificate expires in 13 days. Fix: '), count)


class TestKillAndFullDisk(MakerTest):
    """A kill or a full disk leaves the old pair whole."""

    def test_kill_at_each_step_of_a_renewal(self):
        config = new_config()
        v.ensure_certificate(config, NOW)
        steps = run_maker(config, '''
step = 0
while wait(fork(lambda: doomed(step), force=True)):
    assert not pair().own            # whole as it lies there, with nothing repaired
    step += 1
print(step)
''')
        self.assertGreater(int(steps), 12)
        self.check_whole(config)

    def test_kill_at_each_step_of_a_new_ca_and_of_the_first(self):
        for first, least in ((False, 15), (True, 6)):
            config = new_config()
            if not first:
                v.ensure_certificate(config, NOW)
            steps = run_maker(config, f'''
step, first = 0, {first}
def empty():
    if first:
        shutil.rmtree(config.server.ca_file.parent, ignore_errors=True)
    doomed(step, ('replace', 'unlink', 'rmtree') if first else ('replace', 'unlink', 'rmtree', 'fsync'))
while wait(fork(empty, new_ca=not first)):
    found, _ = v.ensure_certificate(config, now)
    assert not found.own and pair() == found
    step += 1
print(step)
''')
            self.assertGreater(int(steps), least)
            self.check_whole(config)

    def test_makers_at_the_same_time_take_turns(self):
        config = new_config()
        run_maker(config, '''
children = [fork(lambda: None, new_ca=True) for _ in range(4)]
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
''')
        self.check_whole(config)

    def test_keys_are_private_whatever_the_umask(self):
        config = new_config()
        run_maker(config, '''
def watch():
    """Looks at each file when openssl has made it."""
    real = subprocess.run
    def run(*words, **more):
        done = real(*words, **more)
        assert os.stat(more['cwd']).st_mode & 0o777 == 0o700
        assert not [name for name in os.listdir(more['cwd']) if name.endswith('.key')
                    and os.stat(os.path.join(more['cwd'], name)).st_mode & 0o077]
        return done
    subprocess.run = run
assert not wait(fork(watch))
''')
        self.check_whole(config)
        self.assertEqual(config.server.ca_file.parent.stat().st_mode & 0o066, 0)  # nobody else can hold its lock

    def test_a_locked_ca_key_is_not_asked_for_on_the_terminal(self):
        config = new_config()
        v.ensure_certificate(config, NOW)
        key = config.server.ca_file.with_name('ca.key')
        key.write_text(openssl('pkey', '-in', key, '-aes128', '-passout', 'pass:secret'))
        run_maker(config, '''
import pty
child, terminal = pty.fork()
if not child:
    try:
        v.ensure_certificate(config, now, force=True)
    except v.Trouble:
        os._exit(7)
began = time.monotonic()
while not os.waitpid(child, os.WNOHANG)[0]:
    assert time.monotonic() - began < 40, os.read(terminal, 999)
    time.sleep(0.01)
''')

    @unittest.skipUnless(os.geteuid() == 0, 'only root can mount a small disk')
    def test_a_full_disk_leaves_the_old_pair(self):
        folder = new_folder()
        mount = ['mount', '-t', 'tmpfs', '-o', 'size=120k', 'tmpfs', str(folder)]
        if subprocess.run(mount, stderr=subprocess.PIPE).returncode:
            self.skipTest('no mounting here')
        self.addCleanup(subprocess.run, ['umount', str(folder)], check=True)
        config, filler = new_config(folder), folder / 'filler'
        v.ensure_certificate(config, NOW)
        outcomes = collections.Counter()
        for pages in range(0, 24, 2):
            before = contents(config)
            with filler.open('wb', buffering=0) as file:
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(4096))
                file.truncate(max(0, file.tell() - pages * 4096))
            try:
                v.ensure_certificate(config, NOW, new_ca=True)
                outcomes['made'] += 1
            except v.Trouble as error:
                outcomes['full'] += 1
                self.assertNotIn('\n', str(error))
                self.assertEqual(contents(config), before)
            filler.unlink()
            self.check_whole(config)
        self.assertGreater(min(outcomes['made'], outcomes['full']), 2, outcomes)

    @unittest.skipUnless(os.geteuid() == 0, 'only root can give files away')
    def test_root_makes_files_of_the_folders_owner(self):
        config = new_config()
        config.server.ca_file.parent.mkdir()
        os.chown(config.server.ca_file.parent, 12345, 12345)
        v.ensure_certificate(config, NOW)
        self.assertEqual({file.stat().st_uid for file in config.server.ca_file.parent.iterdir()}, {12345})

    def test_a_mac_finds_what_homebrew_has_though_launchds_path_lacks_it(self):
        config, folder = new_config(), tempfile.mkdtemp(dir=RUN)
        Path(folder, 'openssl').symlink_to(judge())
        with unittest.mock.patch.object(v.sys, 'platform', 'darwin'), \
                unittest.mock.patch.dict(os.environ, PATH='/no'), \
                unittest.mock.patch.object(v, 'HOMEBREW', (folder,)), contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(v.main(['--config', str(config.file), 'cert']), 0)

    def test_no_openssl_says_how_to_get_it_and_a_folder_that_cannot_be_made_is_named(self):
        with unittest.mock.patch.dict(os.environ, PATH='/nowhere'):
            with self.assertRaisesRegex(v.Trouble, 'apt-get install openssl'):
                v.ensure_certificate(new_config(), NOW)
        with self.assertRaisesRegex(v.Trouble, r'^the certificate cannot be made: /proc/1/x'):
            v.ensure_certificate(new_config(ca_file='/proc/1/x/ca.crt'), NOW)

    def test_gen_cert_sh_passes_its_arguments(self):
        config = new_config()
        command_line = [str(HERE / 'gen_cert.sh'), '--config', str(config.file), '--host', 'pi.lan', '--ip', '10.4.4.4']
        done = ran(command_line)
        self.assertEqual(done.returncode, 0, done.stdout)
        made = v.look_at_certificate(config)
        self.assertLessEqual({'pi.lan', '10.4.4.4'}, {*made.names})


class TestServerContext(unittest.TestCase):
    """TLS 1.2 with ECDHE and 1.3 only."""

    @classmethod
    def setUpClass(cls):
        cls.config = new_config()
        v.ensure_certificate(cls.config, NOW)
        cls.context = v.server_context(cls.config)
        cls.ca = cls.config.server.ca_file

    def test_speaks_tls_1_3_and_1_2_with_forward_secrecy(self):
        found = handshake(self.context, self.ca)
        newest = 'TLSv1.2' if LIBRESSL and LIBRESSL[1] < '3' else 'TLSv1.3'
        self.assertEqual((found[0], found[2:]), (newest, ('http/1.1', None)))
        for cipher in ('ECDHE-ECDSA-AES128-GCM-SHA256', 'ECDHE-ECDSA-AES256-GCM-SHA384',
                       'ECDHE-ECDSA-CHACHA20-POLY1305'):
            found = handshake(self.context, self.ca, maximum_version=ssl.TLSVersion.TLSv1_2, ciphers=cipher)
            self.assertEqual(found, ('TLSv1.2', cipher, 'http/1.1', None))
        for cipher in self.context.get_ciphers():  # AEAD- is LibreSSL's name for those of 1.3
            self.assertRegex(cipher['name'], r'^(TLS_|AEAD-|ECDHE-)(\w+-)*\w*(GCM|POLY1305)')

    def test_refuses_what_is_older_or_weaker(self):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', DeprecationWarning)
            with self.assertRaises(ssl.SSLError):
                handshake(self.context, self.ca, minimum_version=ssl.TLSVersion.TLSv1,
                          maximum_version=ssl.TLSVersion.TLSv1_1, ciphers='ALL:@SECLEVEL=0')
        for cipher in ('ECDHE-ECDSA-AES128-SHA256', 'AES128-GCM-SHA256', 'DHE-RSA-AES128-GCM-SHA256'):
            with self.assertRaises(ssl.SSLError):
                handshake(self.context, self.ca, maximum_version=ssl.TLSVersion.TLSv1_2, ciphers=cipher)

    def test_options(self):
        wanted = ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE | getattr(ssl, 'OP_NO_RENEGOTIATION', 0)
        self.assertEqual(self.context.options & wanted, wanted)
        self.assertEqual(self.context.num_tickets, 0)
        self.assertGreaterEqual(self.context.minimum_version, ssl.TLSVersion.TLSv1_2)

    def test_sessions_are_not_kept_in_memory(self):
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            for _ in range(3):
                handshake(self.context, self.ca, maximum_version=version)
        self.assertEqual(self.context.session_stats()['number'], 0)


# ---------- installation ------------------------------------------------------------------
# config.ini, install.sh, the unit, the plist and the container files as they are delivered. What
# install.sh does on a real system is proved by .ci/nspawn, on systems that it boots.

SHELL_FILES = ('install.sh', 'gen_cert.sh', '.ci/run', '.ci/nspawn', '.ci/sid', '.ci/arm')


def values_of(config: Any) -> Dict[str, Any]:
    return {section: vars(getattr(config, section)) for section in v.SETTINGS}


class TestConfigFile(unittest.TestCase):
    """config.ini: every key, its comment, its default."""

    def test_every_key_with_its_help_and_its_default(self):
        text = (HERE / 'config.ini').read_text(encoding='utf-8')
        for section, keys in v.SETTINGS.items():
            body = text.partition(f'\n[{section}]\n')[2].partition('\n[')[0] + '\n'
            for key, (default, _, told) in keys.items():
                self.assertIn(f'# {told}\n{key} = {default}'.rstrip() + '\n', body)

    def test_what_is_accepted(self):
        for name, fine, values, bad in (
                ('SERVER_HOST', ['::', '127.0.0.1'], ['::', '127.0.0.1'], ['224.0.0.1', 'pi.local', '']),
                ('SERVER_ACCEL_REDIRECT', ['', '/a/b-c/'], ['', '/a/b-c/'], ['/a', 'a/', '/ /']),
                ('SERVER_PUBLIC_BASE_URL', ['', 'https://pi.local:8443/'], [None, 'https://pi.local:8443'],
                 ['pi.local', 'ftp://a', 'https://a:99999', 'https://u@a', 'https://a?b', 'https://a/#b']),
                ('SERVER_KEY_FILE', ['"/a b"', '/c'], [Path('/a b'), Path('/c')], ['a\0b']),
                ('DOWNLOADS_RETRY_DELAYS', ['1, 2'], [(1, 2)], ['', '-1', '1.5']),
                ('DOWNLOADS_FILENAME', ['%(uploader)s/%(date)s_%(title)s'], None,
                 ['', 'a', '../%(id)s', '/%(id)s', '%(id)s/a', '%(foo)s%(id)s', '.%(id)s', '%(id)s\ta', 'a/-%(id)s']),
                ('DOWNLOADER_PROXY', ['', 'socks5h://127.0.0.1:1'], [None, 'socks5h://127.0.0.1:1'], ['127.0.0.1:1']),
                ('SECURITY_ALLOWED_DOMAINS', ['TikTok.com., a.b', 'a.b,*'], [('tiktok.com', 'a.b'), ('*',)],
                 ['', 'tiktok', 'https://a.b', 'a b.c']),
                ('SECURITY_ALLOWED_CLIENTS', ['ANY'], [v.networks('0.0.0.0/0,::/0')], ['', 'me', '192.168.1.1/8']),
                ('NOTIFY_URL', ['ntfy+http://1.2.3.4/t?auth=x'], None, ['ntfy.sh/t', 'https://u:p@a/', 'https:///a']),
                ('NOTIFY_EVENTS', ['failed, attention'], [('failed', 'attention')], ['', 'all']),
                ('S3_REGION', ['eu'], ['eu'], ['']), ('LOGGING_LEVEL', ['info'], ['INFO'], ['loud'])):
            section, _, key = name.lower().partition('_')
            for text, value in zip(fine, values or fine):
                config = v.load_config(None, {f'VIDEOSERVER_{name}': text})
                self.assertEqual(getattr(getattr(config, section), key), value)
            for text in bad:
                told = fr'{name}: \[{section}\] {key} = .* cannot be used. Set it to '
                with self.assertRaisesRegex(v.ConfigError, told):
                    v.load_config(None, {f'VIDEOSERVER_{name}': text})

    def test_means_the_same_as_no_file(self):
        self.assertEqual(values_of(v.load_config(HERE / 'config.ini', {})), values_of(v.load_config(None, {})))


class TestInstallScript(InstallTest):
    """install.sh as far as it can be seen without installing."""

    def test_shell_scripts_are_executable_and_shellcheck_clean(self):
        for name in SHELL_FILES:
            self.assertTrue(os.access(HERE / name, os.X_OK), name)
        self.assertEqual((HERE / 'install.sh').read_text().rstrip().splitlines()[-1], 'main "$@"')
        if shutil.which('shellcheck'):
            self.assertEqual(ran(['shellcheck', '-x', *SHELL_FILES], cwd=str(HERE)).stdout, '')

    @unittest.skipUnless(sys.platform == 'linux', 'Linux')
    def test_dry_run_names_what_it_would_write_and_writes_nothing(self):
        paths = '/opt/videoserver', '/etc/videoserver', '/var/lib/videoserver'
        before = {path: Path(path).exists() for path in paths}
        done = self.install('--dry-run', '--output', 'clips', '--port', '9443')
        self.assertEqual(done.returncode, 0, done.stdout)
        named = set(re.findall(r'^would write (/\S+)', done.stdout, re.M))
        self.assertLessEqual({'/opt/videoserver/videoserverd.py', '/usr/local/bin/videoserverd'}, named)
        if os.path.isdir('/run/systemd/system'):
            self.assertIn('/etc/systemd/system/videoserver.service', named)
        else:
            self.assertIn('systemd is not running here', done.stdout)
        self.assertIn('would set port = 9443 in /etc/videoserver/config.ini', done.stdout)
        self.assertRegex(done.stdout, r'would set output_directory = /\S+/clips in ')
        self.assertEqual(before, {path: Path(path).exists() for path in before})

    @unittest.skipUnless(sys.platform == 'linux', 'Linux')
    def test_a_reduced_python_is_no_python(self):
        folder = new_folder()
        new_program(folder / 'python3', 'case $* in *shlex*) exit 1;; esac')  # as python3-minimal
        env = {**os.environ, 'PATH': f'{folder}:{os.environ["PATH"]}'}
        for step, said in (('missing_packages', 'python3 '), ('python=python3 dry=y; python_serves 9 || say no', 'no')):
            found = subprocess.check_output(['sh', '-c', self.functions + step], env=env, encoding='utf-8')
            self.assertTrue(found.startswith(said), found)

    def test_dry_run_on_a_mac(self):
        done = self.install('--dry-run', system='Darwin')
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertIn('would write /Library/LaunchDaemons/com.videoserver.download.plist\n', done.stdout)
        self.assertIn('would run launchctl bootstrap system /Library/LaunchDaemons/', done.stdout)
        self.assertRegex(done.stdout, r'would write /\S+/Movies/VideoServer\n')
        self.assertNotIn('apt-get', done.stdout)
        self.assertNotIn('systemctl', done.stdout)

    def test_refuses_in_one_line_what_it_does_not_understand(self):
        for words, said in ((['--purge'], 'needs --uninstall'), (['--port', '70000'], '1 to 65535'),
                            (['--port', '0x50'], '1 to 65535'), (['--user', 'root'], 'must not run as root'),
                            (['--user', '$(id)'], 'not the name of a user'), (['--output', '/a"b'], 'a path without'),
                            (['--output', '/a%b'], 'a path without'), (['--user'], 'needs a value'),
                            (['--frobnicate'], 'unknown; see --help')):
            with self.subTest(words):
                done = self.install('--dry-run', *words)
                self.assertEqual((done.returncode, done.stdout.count('\n')), (1, 1), done.stdout)
                self.assertIn(said, done.stdout)

    def test_any_output_folder_of_config_ini_is_what_systemd_reads(self):
        script = self.functions + 'output=$1 python=/p user=u dry=yes; drop_in'
        done = ran(['sh', '-c', script, 'sh', '/m/5%b "\\o'], check=True)
        self.assertIn('\nReadWritePaths="-/m/5%%b \\"\\\\o"\n', done.stdout)

    @unittest.skipUnless(os.geteuid() == 0 and shutil.which('runuser'), 'takes root and runuser')
    def test_run_again_root_makes_nothing_where_the_service_user_says(self):
        with tempfile.TemporaryDirectory() as name:  # not below RUN, which is closed to others
            folder = Path(name)
            folder.chmod(0o755)
            (folder / 'roots').mkdir()
            (folder / 'state').mkdir()
            shutil.chown(folder / 'state', 'nobody')
            (folder / 'state/link').symlink_to(folder / 'roots')
            (folder / 'config.ini').write_text('[server]\n')
            shutil.chown(folder / 'config.ini', 'nobody')

            def run(step: str, output: str = '') -> Any:
                script = (f'{self.functions} here="$1" user=nobody state="$1/state" config="$1/config.ini" '
                          f'secrets="$1/env" python=x output="$3"; set -- "$1" "$2"; '
                          f'ask_config() {{ say "{folder}/$WANTED"; }}; {step}')
                return ran(['sh', '-c', script, 'sh', name, '', output],
                           env={**os.environ, 'WANTED': output or 'state/link/new'})
            self.assertIn('nobody cannot make', run('ensure_output').stdout)
            self.assertEqual(os.listdir(folder / 'roots'), [])
            done = run('ensure_output', 'roots/videos')  # --output: root's own word
            self.assertEqual((done.returncode, (folder / 'roots/videos').owner()), (0, 'nobody'), done.stdout)
            self.assertEqual(run('ensure_config').returncode, 0)
            facts = (folder / 'config.ini').stat()
            self.assertEqual((facts.st_uid, stat.S_IMODE(facts.st_mode)), (0, 0o640))

    def test_other_systems_are_told_to_run_the_file(self):
        done = self.install('--dry-run', system='FreeBSD')
        self.assertEqual(done.returncode, 1)
        self.assertIn('python3 videoserverd.py', done.stdout)


class TestServiceFiles(InstallTest):
    """What systemd and launchd are handed."""

    @unittest.skipUnless(shutil.which('systemd-analyze'), 'systemd-analyze is not installed')
    def test_unit_is_valid_and_hardened_to_an_exposure_of_1_5_or_less(self):
        done = ran(['systemd-analyze', 'verify', '--man=no', str(self.unit())])
        self.assertEqual((done.returncode, done.stdout), (0, ''))
        done = ran(['systemd-analyze', 'security', '--offline=yes', '--no-pager', str(self.unit())])
        self.assertLessEqual(float(re.search(r'Overall exposure level for \S+: ([\d.]+)', done.stdout)[1]), 1.5)

    def test_unit_never_gives_up_and_tells_when_it_is_ready(self):
        lines = (HERE / 'videoserver.service').read_text().splitlines()
        for line in ('Type=notify', 'Restart=always', 'StartLimitIntervalSec=0', 'WatchdogSec=120',
                     'After=network-online.target time-sync.target', "ExecReload=/bin/sh -c 'kill -HUP $MAINPID'",
                     'ProtectSystem=strict', 'WantedBy=multi-user.target'):
            self.assertIn(line, lines)

    def test_plist_is_valid_and_keeps_it_alive(self):
        job = plistlib.loads((HERE / 'com.videoserver.download.plist').read_bytes())
        self.assertEqual((job['Label'], job['KeepAlive'], job['RunAtLoad']), ('com.videoserver.download', True, True))
        self.assertGreaterEqual(job['ThrottleInterval'], 5)
        self.assertGreaterEqual(job['SoftResourceLimits']['NumberOfFiles'], 1024)
        self.assertEqual(job['ProgramArguments'], ['/usr/local/bin/videoserverd'])
        self.assertTrue(job['StandardErrorPath'].startswith('/var/lib/videoserver/'))


class TestContainerFiles(unittest.TestCase):
    """deploy/, as far as it can be judged where no image can be built."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.compose = (HERE / 'deploy/docker-compose.yml').read_text()
        cls.dockerfile = (HERE / 'deploy/Dockerfile').read_text()

    @unittest.skipUnless(shutil.which('check-jsonschema'), 'check-jsonschema is not installed')
    def test_compose_file_is_valid_by_the_compose_schema(self):
        done = ran(['check-jsonschema', '--builtin-schema', 'vendor.compose-spec', 'deploy/docker-compose.yml'],
                   cwd=str(HERE))
        self.assertEqual(done.returncode, 0, done.stdout)

    def test_compose_file_has_document_b_names(self):
        for name in ('api', 'nginx', 'rustfs'):
            self.assertIn(f'\n  prt-videodownloader-{name}:\n', self.compose)
        self.assertIn('\n  prt-videodownloader-net:\n    name: prt-videodownloader-net\n', self.compose)
        self.assertEqual(self.compose.count('healthcheck:'), 3)

    def test_environment_of_the_image_and_of_compose_is_accepted(self):
        image = dict(re.findall(r'^(?:ENV)? +([A-Z0-9_]+)=(\S*?)(?: \\)?$', self.dockerfile, re.M))
        service = self.compose.partition('prt-videodownloader-api:\n')[2].partition('\n  prt-videodownloader-nginx:')[0]
        values = {name: re.sub(r'\$\{\w+:-?([^}]*)\}', r'\1', text).strip("'\"")
                  for name, text in re.findall(r'^      ([A-Z0-9_]{6,}): (.*)$', service, re.M)}
        self.assertEqual(image['VIDEOSERVER_SERVER_TLS'], 'off')
        config = v.load_config(None, {**image, **values})
        self.assertEqual(str(config.database.path), '/opt/prt/prt-videodownloader/db/prt-videodownloader.sqlite')
        self.assertEqual(str(config.downloads.output_directory), '/opt/prt/prt-videodownloader/data')
        self.assertEqual(config.server.public_base_url, 'https://prt.teevity.com/videodownloader')
        self.assertIsNone(config.logging.file)
        nginx = re.search(r'prt-videodownloader-nginx:\n.*?ipv4_address: (\S+)', self.compose, re.S)[1]
        self.assertEqual([str(network) for network in config.server.trusted_proxies], [f'{nginx}/32'])
        self.assertIn(f'location {config.server.accel_redirect} ', (HERE / 'deploy/nginx.conf').read_text())
        self.assertFalse(any(client.num_addresses < 2 ** 32 for client in config.security.allowed_clients))

    def test_image_is_slim_and_does_not_run_as_root(self):
        self.assertRegex(self.dockerfile, r'(?m)^FROM python:3\.\d+-slim')
        self.assertRegex(self.dockerfile, r'(?m)^USER (?!root)')
        for source in re.findall(r'(?m)^COPY (?:--\S+ )*(\S+) ', self.dockerfile):
            self.assertTrue((HERE / source).exists(), source)
            self.assertIn(f'!{source}\n', (HERE / 'deploy/Dockerfile.dockerignore').read_text())


# ---------- behind nginx ------------------------------------------------------------------
# deploy/nginx.conf itself, run by the real nginx with only names, ports and folders replaced, in
# front of a real daemon with tls = off.

@unittest.skipUnless(shutil.which('nginx'), 'nginx is not installed')
class TestBehindNginx(NginxTest):
    """Page, both APIs and files under https://…/videodownloader, files served by nginx itself."""

    def test_page_and_all_it_refers_to_and_the_description_of_the_api(self):
        self.assertEqual(self.stranger.get('/videodownloader').headers['Location'].partition('//')[2].partition('/')[2],
                         'videodownloader/')
        status, headers, body = self.stranger.get('/videodownloader/')
        self.assertEqual((status, headers.get_content_type()), (200, 'text/html'))
        references = set(re.findall(rb'(?:src|href)="([^"#]+)"', body))
        self.assertTrue(references)
        for reference in references:
            with self.subTest(reference):
                self.assertFalse(reference.startswith((b'/', b'http')), 'only relative addresses')
                self.assertEqual(self.stranger.get(f'/videodownloader/{reference.decode()}').status, 200)
        description = self.client.get('/videodownloader/openapi.json').json
        self.assertEqual([server['url'] for server in description['servers']], [self.base])

    def test_a_link_is_taken_and_its_download_seen(self):
        status, _, body = self.client.post('/videodownloader/api/v1/download', {'url': str(self.site.tiktok())})
        self.assertEqual(status, 202, body)
        self.daemon.wait_status(body['download_id'], 'completed')
        status, _, body = self.client.get('/videodownloader/api/v1/history')
        self.assertEqual(status, 200)
        self.assertTrue(all(row['public_url'].startswith(self.base + '/files/') for row in body['downloads']))
        self.assertEqual(self.stranger.get('/videodownloader/api/v1/history').status, 401)

    def test_document_b(self):
        status, _, body = self.client.post('/videodownloader/initiateDownload', {'videoURL': str(self.site.tiktok())})
        self.assertEqual(status, 200, body)
        self.daemon.wait_status(body['downloadUUID'], 'completed')
        status, _, body = self.client.get('/videodownloader/getVideoDownloadPublicURL?URLTypeEnum=HTTPS'
                                          f'&videoDownloadUUID={body["downloadUUID"]}')
        self.assertTrue(body['publicURL'].startswith(self.base + '/files/'), body)
        status, _, body = self.client.get('/videodownloader/getVideoDownloadPublicURL')
        self.assertEqual((status, sorted(body)), (418, ['errorCode', 'errorMessage']))

    def test_refused_before_the_body_is_read(self):
        status, _, body = self.client.post('/videodownloader/api/v1/download', b'x' * 100_000,
                                           Content_Type='application/json')
        self.assertEqual((status, body['code']), (413, 'too_large'))

    def test_finished_file_is_served_by_nginx_itself(self):
        status, headers, body = self.stranger.get(self.path)
        self.assertEqual((status, len(body)), (200, 300_000))
        self.assertEqual(hashlib.sha256(body).digest(), hashlib.sha256(self.post.media[0].body).digest())
        self.assertEqual((headers.get_content_type(), headers['Server']), ('video/mp4', 'nginx'))
        self.assertEqual(headers['X-Content-Type-Options'], 'nosniff')
        self.assertIn('sandbox', headers['Content-Security-Policy'])
        self.assertIn("filename*=UTF-8''Ein%20Tag%20am%20Meer%20%E2%98%80_", headers['Content-Disposition'])
        self.assertNotIn('X-Accel-Redirect', headers)

    def test_range_through_x_accel_redirect(self):
        whole = self.post.media[0].body
        first = self.stranger.get(self.path, Range='bytes=1000-1999')
        self.assertEqual((first.status, first.headers['Content-Range']), (206, 'bytes 1000-1999/300000'))
        self.assertEqual(self.stranger.get(self.path).headers.get_all('Accept-Ranges'), ['bytes'])
        self.assertEqual(first.json, whole[1000:2000])
        tag = first.headers['ETag']
        self.assertEqual(self.stranger.get(self.path, Range='bytes=-500', If_Range=tag).json, whole[-500:])
        self.assertEqual(self.stranger.get(self.path, Range='bytes=-500', If_Range='"other"').status, 200)
        self.assertEqual(self.stranger.get(self.path, If_None_Match=tag).status, 304)
        self.assertEqual(self.stranger.get(self.path, Range='bytes=300000-').status, 416)
        head = self.stranger.request('HEAD', self.path)
        self.assertEqual((head.status, head.headers['Content-Length'], head.json), (200, '300000', b''))

    def test_file_needs_its_signed_link(self):
        self.assertEqual(self.stranger.get(self.path.partition('?')[0]).status, 401)
        self.assertEqual(self.stranger.get(self.path[:-1] + ('0' if self.path[-1] != '0' else '1')).status, 403)
        self.assertEqual(self.client.get(self.path.partition('?')[0]).status, 200)
        for path in ('/protected/', f'/protected/{quote(self.row["filename"])}', '/protected/../data/downloads.db'):
            self.assertIn(self.client.get(path).status, (400, 404), path)

    def test_link_out_of_the_folder_is_not_followed(self):
        row = self.daemon.download(self.site.tiktok())
        file = self.daemon.output / row['filename']
        file.unlink()
        file.symlink_to(self.daemon.database)
        path = row['public_url'][len(self.base) - len('/videodownloader'):]
        self.assertIn(self.stranger.get(path).status, (403, 404))

    def test_client_address_comes_from_a_trusted_proxy_only(self):
        health = '/videodownloader/api/v1/health'
        self.assertEqual(self.nginx.client('127.0.0.2').post(health).status, 405)
        wait_until(lambda: '127.0.0.2 "POST /videodownloader/api/v1/health"' in self.daemon.log())
        refused = self.nginx.client('127.0.0.3')
        self.assertEqual(refused.get(health).json['code'], 'client_not_allowed')
        self.assertEqual(refused.get(health, X_Forwarded_For='127.0.0.2').status, 403)  # nginx does not pass that on

    def test_past_the_proxy_a_file_comes_from_the_daemon_and_what_a_client_claims_does_not_count(self):
        status, headers, body = self.daemon.new_client(source='127.0.0.2').get(self.path)
        self.assertEqual((status, len(body), headers['X-Accel-Redirect']), (200, 300_000, None))
        for source, claim, wanted in (('127.0.0.1', '127.0.0.2', 200), ('127.0.0.1', '127.0.0.3', 403),
                                      ('127.0.0.3', '127.0.0.2', 403), ('127.0.0.2', '127.0.0.3', 200)):
            with self.subTest((source, claim)):
                client = self.daemon.new_client(source=source)
                self.assertEqual(client.get('/api/v1/health', X_Forwarded_For=claim).status, wanted)

    def test_each_dialect_says_that_the_server_is_not_running(self):
        with reserved() as nobody, socket.create_server(('127.0.0.1', 0)) as sock:
            nginx = Nginx(sock, nobody.getsockname()[1], RUN)
            self.addCleanup(nginx.close)
            status, headers, body = nginx.client().post('/videodownloader/api/v1/download', {'url': 'x'})
            self.assertEqual((status, body['message'], body['code']), (503, 'The server is not running.', 'down'))
            self.assertLess(abs(body['timestamp'] - time.time()), 60)
            self.assertEqual(headers['Retry-After'], '10')
            status, _, body = nginx.client().get('/videodownloader/listDownloads')
            self.assertEqual((status, body['errorCode']), (418, 'down'))
            self.assertEqual(nginx.client().get('/alive').status, 204)


# ---------- a hostile network -------------------------------------------------------------
# What a phone never sends, but a television, a guest or a web page might.

WHOLE_REQUEST = b'GET /api/v1/health HTTP/1.1\r\nHost: localhost\r\n\r\n'
WAITS_AFTER = ('G', 'GET ', 'GET /api', 'GET /api/v1/health ', 'HTTP', 'HTTP/1.1', 'HTTP/1.1\r', 'HTTP/1.1\r\n', 'Hos',
               'Host:', 'Host: ', 'localhost', 'localhost\r', 'localhost\r\n',
               'localhost\r\n\r')  # 15 places where a request may be cut


def http_answers(data: bytes) -> List[int]:
    return [int(code) for code in re.findall(rb'(?:^|\r\n\r\n|[}>\n])HTTP/1\.1 (\d{3}) ', data)]


class TestRequests(DaemonTest):
    """A strict reader: what could be understood in two ways is refused, and the connection closed; and browsers of
    others: no CORS, nothing changes for a foreign page, nothing runs."""
    settings = {'downloads': {'min_free_space': '9000GB'}}

    def get(self, line: str = 'GET /api/v1/health HTTP/1.1', *fields: str, body: str = '',
            host: str = 'Host: localhost') -> bytes:
        head = '\r\n'.join([line, *([host] if host else []), *fields, '', ''])
        return self.daemon.client.raw((head + body).encode('latin-1'), 3)

    def refused(self, status: int, data: bytes) -> None:
        """Exactly one answer, JSON, and the end of the connection."""
        self.assertEqual(http_answers(data), [status], data[:300])
        self.assertIn(b'\r\nConnection: close', data)
        body = json.loads(data.partition(b'\r\n\r\n')[2])
        self.assertEqual(body['status'], 'error')
        self.assertTrue(body['message'])

    def test_exactly_one_host_that_is_ours(self):
        self.refused(400, self.get(host=''))
        self.refused(400, self.get('GET / HTTP/1.1', 'Host: localhost'))
        self.refused(400, self.get(host='Host: a b'))
        self.refused(400, self.get(host='Host: localhost/x'))
        self.refused(400, self.get(host='Host:'))
        for foreign in ('evil.example', 'localhost.evil.example', '1.2.3.4', '127.0.0.1.nip.io', '[::2]'):
            self.refused(421, self.get(host=f'Host: {foreign}'))
        own_name = f'{socket.gethostname().split(".")[0]}.local'
        for ours in ('localhost', 'LOCALHOST:8443', '\t127.0.0.1', '[::1]:99', own_name):
            data = self.get('GET /api/v1/health HTTP/1.1', 'Connection: close', host=f'hoSt:{ours}')
            self.assertEqual(http_answers(data), [200], ours)

    def test_content_length_is_digits_and_only_once(self):
        post, json_type = 'POST /api/v1/download HTTP/1.1', 'Content-Type: application/json'
        for bad in ('-1', '+3', '1_0', '0x3', '3, 3', ' ', '3 3', '\xb2', '9' * 30, '-' + '9' * 27, 'abc'):
            self.refused(400, self.get(post, json_type, f'Content-Length: {bad}', body='{}x'))
        self.refused(400, self.get(post, json_type, 'Content-Length: 2', 'Content-Length: 3', body='{}x'))
        self.refused(400, self.get(post, json_type))
        self.refused(411, self.get(post, json_type, 'Transfer-Encoding: chunked', body='2\r\n{}\r\n0\r\n\r\n'))
        self.refused(400, self.get(post, json_type, 'Transfer-Encoding: chunked', 'Content-Length: 2', body='{}'))
        for coding in ('gzip', 'gzip, chunked', 'xchunked', 'chunked, chunked'):
            self.refused(501, self.get(post, json_type, f'Transfer-Encoding: {coding}', body='{}'))
        self.refused(413, self.get(post, json_type, 'Content-Length: 999999', body='{}'))

    def test_a_client_that_leaves_in_mid_body_is_no_fault_of_ours(self):
        for end in (lambda link: link.close(), lambda link: socket.socket.close(link.unwrap())):
            with self.daemon.client.socket() as link:
                link.sendall(b'POST /api/v1/download HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n'
                             b'Content-Type: application/json\r\n\r\n{')
                end(link)
        self.get('GET /api/v1/left HTTP/1.1', 'Connection: close')
        wait_until(lambda: '/api/v1/left" 404' in self.daemon.log(), 5)
        self.assertNotRegex(self.daemon.log(), 'Traceback| 500 ')

    def test_a_line_of_the_log_is_bounded_whatever_the_path(self):
        for path in ('/' + 'a' * 8000, '/' + '%E2%80%A8' * 800, '/api/v1/status/' + '~' * 8000):
            self.get(f'GET {path} HTTP/1.1', 'Connection: close')
        wait_until(lambda: re.search(r'status/~+… ?" 404 ', self.daemon.log()), 5, self.daemon.tail)
        self.assertLess(max(map(len, self.daemon.log().splitlines())), 400)

    def test_no_smuggled_second_request_ever_runs(self):
        before = len(self.daemon.rows())
        link = json.dumps({'url': tiktok_link(1)})
        hidden = (f'POST /api/v1/download HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                  f'Content-Length: {len(link)}\r\n\r\n{link}')
        for fields in (('Content-Length: 0', f'Content-Length: {len(hidden)}'), ('Transfer-Encoding: chunked',),
                       ('Transfer-Encoding: chunked', f'Content-Length: {len(hidden)}'), ('Content-Length: +0',),
                       ('Transfer-Encoding : chunked',), ('Content-Length: 99999999',), (' folded: x',),
                       ('Expect: 200-ok', f'Content-Length: {len(hidden)}')):
            answers = http_answers(self.get('POST /api/v1/downloads HTTP/1.1', 'Content-Type: application/json',
                                            *fields, body=hidden))
            self.assertEqual(len(answers), 1, fields)
            self.assertGreaterEqual(answers[0], 400, fields)
        self.assertEqual(len(self.daemon.rows()), before)

    def test_a_fragment_is_waited_for_and_the_rest_of_it_answered(self):
        with contextlib.ExitStack() as stack:
            links = []
            for end in WAITS_AFTER:
                cut = WHOLE_REQUEST.index(end.encode()) + len(end)
                link = stack.enter_context(self.daemon.client.socket())
                link.sendall(WHOLE_REQUEST[:cut])
                links.append((link, WHOLE_REQUEST[cut:]))
            self.assertEqual(select.select([link for link, _ in links], [], [], 0.6)[0], [])
            for link, rest in links:
                link.sendall(rest)
                self.assertEqual(link.recv(12), b'HTTP/1.1 200', rest)

    def test_odd_first_lines_and_headers_are_refused(self):
        for line in ('GET  / HTTP/1.1', 'GET / HTTP/1.1 x', 'GET /', 'GET / HTTP/2.0', 'GET / HTTP/0.9',
                     'GET / http/1.1', 'get\t/ HTTP/1.1', '(GET) / HTTP/1.1', 'GET http://localhost/ HTTP/1.1',
                     'GET * HTTP/1.1', 'CONNECT localhost:1 HTTP/1.1', 'GET /a#b HTTP/1.1', 'GET /\\..\\x HTTP/1.1',
                     'GET /\xe4 HTTP/1.1', 'GET /a|b HTTP/1.1', 'GET / ', 'GET / HTTP/9.9', 'Extra lineGET / HTTP/1.1',
                     'GET HTTPZ://localhost/ HTTP/1.1'):
            self.refused(400, self.get(line))
        for path in ('/../etc/passwd', '/files/%2e%2e/x', '/%2E%2E/', '/files/a%2fb', '/a%5cb', '//localhost/', '/a//b',
                     '/%', '/%zz', '/%00', '/./x', '/%ff'):
            self.refused(400, self.get(f'GET {path} HTTP/1.1'))
        for field in ('no colon', ': empty', 'sp ace: x', 'tab\t: x', ' folded: x', 'ctl: a\x01b', 'n\x00l: x',
                      'b\xe4d: x', 'x: \x7f', 'brackets[]: x', 'bell: a\x07', '\rbare-cr: x'):
            self.refused(400, self.get('GET / HTTP/1.1', field))
        self.refused(400, self.daemon.client.raw(b'GET / HTTP/1.1\nHost: localhost\n\n', 3))
        self.refused(400, self.daemon.client.raw(b'GET / HTTP/1.1\r\nHost: localhost\n\n', 3))
        self.refused(400, self.daemon.client.raw(b'GET / HTTP/1.1\r\nHost: localhost\r\nx: a\rb\r\n\r\n', 3))
        self.refused(405, self.get('BREW /api/v1/health HTTP/1.1', 'Connection: close'))
        self.refused(404, self.get('BREW /nowhere HTTP/1.1', 'Connection: close'))
        self.refused(404, self.get('POST /hello HTTP/1.1', 'Connection: close', 'Content-Length: 5', body='hello'))
        self.refused(417, self.get('POST /api/v1/download HTTP/1.1', 'Expect: tea', 'Content-Length: 2', body='{}'))

    def test_long_lines_and_headers_over_16_kb_are_refused(self):
        self.refused(414, self.get(f'GET /{"a" * 9000} HTTP/1.1'))
        self.refused(414, self.get(f'GET /{"a" * 40000} HTTP/1.1'))
        self.refused(431, self.get('GET / HTTP/1.1', *(f'x{number}: {"y" * 1000}' for number in range(20))))
        self.refused(431, self.get('GET / HTTP/1.1', f'x: {"y" * 17000}'))
        self.refused(431, self.get('GET / HTTP/1.1', *(f'x{number}: y' for number in range(150))))

    def test_fine_requests_are_answered(self):
        close = 'Connection: close'
        for line, fields, body in (('GET /api/v1/health HTTP/1.0', (), ''), ('HEAD / HTTP/1.1', (close,), ''),
                                   ('GET / HTTP/1.1', (close, 'With-Space: '), ''),
                                   ('GET /api/v1/health?x=%41+b HTTP/1.1', (close, 'Empty:', 'Odd!#$: \xfc'), ''),
                                   ('GET /api/v1/health HTTP/1.1', ('Content-Length: 3', close), 'abc')):
            data = self.get(line, *fields, body=body)
            self.assertEqual((http_answers(data), data.endswith(b'\r\n\r\n')), ([200], line.startswith('HEAD')), line)
        two = b'GET /api/v1/health HTTP/1.1\r\nHost: localhost\r\n\r\n'
        data = self.daemon.client.raw(b'\r\n' + two + two[:-2] + b'Connection: close\r\n\r\n')
        self.assertEqual(data.count(b'HTTP/1.1 200'), 2)
        data = self.get('POST /api/v1/download HTTP/1.1', 'Content-Type: application/json', close,
                        'Expect: 100-continue', 'Content-Length: 2', body='{}')
        self.assertTrue(data.startswith(b'HTTP/1.1 100 Continue\r\n'))
        self.assertEqual(http_answers(self.get('GET / HTTP/1.1', close, 'Expect: 100-continue'))[-1], 200)
        data = self.get('POST /api/v1/download HTTP/1.0', 'Content-Type: application/json',  # it knows no 100
                        'Expect: 100-continue', 'Content-Length: 2', body='{}')
        self.assertEqual(http_answers(data), [400])

    def test_json_that_is_none_is_refused(self):
        for body in ('', '[]', '"x"', '{"url": NaN}', '{"url": "\\ud800"}', '[' * 8000,
                     '{"timestamp": ' + '9' * 5000 + '}', '\x00', '{"a":1}x'):
            status, _, answer = self.daemon.client.post('/api/v1/download', body.encode(),
                                                        Content_Type='application/json')
            self.assertEqual((status, answer['status']), (400, 'error'), body[:40])

    def test_tls_ends_with_close_notify(self):
        with self.daemon.client.socket() as link:
            link.sendall(b'GET /api/v1/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n')
            link.suppress_ragged_eofs = False
            while link.recv(4096):  # without close_notify this raises SSLEOFError
                pass

    def test_plain_http_to_the_tls_port_gets_a_quick_close_and_no_traceback(self):
        with in_time(2):
            with socket.create_connection(('127.0.0.1', self.daemon.port), 5) as link:
                link.sendall(b'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n')
                while link.recv(4096):
                    pass
        self.assertNotIn('Traceback', self.daemon.log())

    def test_foreign_origins_change_nothing(self):
        id = self.daemon.submit(tiktok_link(1))
        own = f'https://127.0.0.1:{self.daemon.port}'
        for headers, status in (({'Origin': 'https://evil.example'}, 403), ({'Origin': 'null'}, 403),
                                ({'Sec_Fetch_Site': 'cross-site'}, 403),
                                ({'Sec_Fetch_Site': 'same-site'}, 403), ({'Origin': 'https://127.0.0.1'}, 403),
                                ({'Origin': own}, 200), ({'Origin': own, 'Sec_Fetch_Site': 'same-origin'}, 409)):
            answer = self.daemon.client.post(f'/api/v1/download/{id}/cancel', **headers)
            self.assertEqual(answer.status, status, headers)
        self.assertEqual(self.daemon.client.delete(f'/api/v1/download/{id}', Origin='https://evil.example').status, 403)
        answer = self.daemon.client.post(f'/api/v1/download/{id}/cancel', Origin='https://videos.example')
        self.assertIn('set [server] public_base_url', answer.json['message'])  # its own page, the proxy sets no Host
        answer = self.daemon.client.post('/initiateDownload', {'videoURL': tiktok_link(2)}, Origin='null')
        self.assertEqual(answer.status, 418)

    def test_security_headers_on_everything_no_cors_no_cookie(self):
        for path in ('/', '/setup', '/page.js', '/api/v1/health', '/nowhere', '/metrics', '/openapi.json', '/ca.crt'):
            headers = self.daemon.client.get(path, Origin='https://evil.example').headers
            names = 'X-Content-Type-Options', 'X-Frame-Options', 'Referrer-Policy'
            self.assertEqual([headers[name] for name in names], ['nosniff', 'DENY', 'no-referrer'], path)
            policy = headers['Content-Security-Policy']
            self.assertIn("default-src 'none'", policy, path)
            self.assertNotIn('unsafe', policy.replace("style-src 'unsafe-inline'; sandbox", ''), path)
            self.assertIsNone(headers['Access-Control-Allow-Origin'])
            self.assertIsNone(headers['Set-Cookie'])
        self.assertEqual(self.daemon.client.request('OPTIONS', '/api/v1/download').status, 405)

    def test_a_method_that_is_unknown_ends_the_connection(self):
        for method, path, status, ends in (('GET', '/nowhere', 404, 'keep-alive'), ('BREW', '/nowhere', 404, 'close'),
                                           ('BREW', '/initiateDownload', 418, 'close')):
            answer = self.daemon.client.request(method, path)
            self.assertEqual((answer.status, answer.headers['Connection']), (status, ends), (method, path))


class TestCrowd(DaemonTest):
    """A stalled, hostile or noisy client never holds up another."""
    settings = {'downloads': {'min_free_space': '9000GB'}}

    def answered_in(self, seconds: float) -> None:
        """A normal client, a few times; the median counts, as this machine is noisy."""
        times = []
        for number in range(7):
            began = time.monotonic()
            self.daemon.submit(tiktok_link(number))
            times.append(time.monotonic() - began)
        self.assertLess(sorted(times)[3], fair(seconds), times)

    def test_stalled_handshakes_slow_headers_and_slow_readers(self):
        for number, connect, data in (
                (300, lambda: socket.create_connection(('127.0.0.1', self.daemon.port), 10), b''),
                (300, self.daemon.client.socket, b'GET / HTTP/1.1\r\nHost: loc'),
                (150, self.daemon.client.socket, b'GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n' * 40)):
            with self.subTest(data[:25]), contextlib.ExitStack() as stack:
                for _ in range(number):
                    with contextlib.suppress(OSError):  # the oldest are sent home
                        stack.enter_context(connect()).sendall(data)
                self.answered_in(0.1)
                self.assertLess(self.daemon.threads(), 150)

    def test_eight_pages_wait_for_news_the_ninth_is_told_when_to_come_again(self):
        daemon = self.new_daemon()
        version = daemon.client.get('/api/v1/history').json['version']
        path = f'/api/v1/history?since={version}&wait='
        with ThreadPoolExecutor(v.WATCHERS) as pool:
            answers = [pool.submit(daemon.new_client().get, path + '20') for _ in range(v.WATCHERS)]
            wait_until(lambda: daemon.client.get(path + '0').json['poll_after'] == 3)
            self.assertFalse(any(answer.done() for answer in answers))
            began = time.monotonic()
            daemon.submit(self.site.tiktok())
        self.assertLess(time.monotonic() - began, fair(5))
        self.assertEqual([answer.result().json['poll_after'] for answer in answers], [0] * v.WATCHERS)

    def test_a_head_that_drips_ends_after_its_deadline(self):
        with self.daemon.client.socket() as link:
            began = time.monotonic()
            link.settimeout(1)
            data = b''
            link.sendall(b'GET / HTTP/1.1\r\n')
            with contextlib.suppress(OSError):
                while time.monotonic() - began < fair(15) and not data:
                    link.sendall(b'x')
                    with contextlib.suppress(socket.timeout):
                        data = link.recv(4096)
            self.assertIn(b' 408 ', data)
            self.assertLess(time.monotonic() - began, fair(12))

    @unittest.skipUnless(hasattr(resource, 'prlimit'), 'only Linux changes the limits of a running process')
    def test_at_the_file_descriptor_limit_no_spinning_and_full_recovery(self):
        daemon = self.new_daemon(downloads={'min_free_space': '9000GB'})
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (40, 40))
        with contextlib.ExitStack() as stack:
            for _ in range(120):
                with contextlib.suppress(OSError):
                    stack.enter_context(socket.create_connection(('127.0.0.1', daemon.port), 2))
            before = os.times()
            used = daemon.cpu()
            time.sleep(1.0)
            self.assertLess(daemon.cpu() - used, 0.4, before)
        wait_until(lambda: self.works(daemon), 15)
        self.assertNotIn('Traceback', daemon.log())

    @staticmethod
    def works(daemon: Daemon) -> bool:
        try:
            return daemon.client.post('/api/v1/download', {'url': tiktok_link(1)}).status in (200, 202)
        except OSError:
            return False


class TestConnections(ServerTest):
    """The server alone, in this process: what only shows with a hand on both ends of a connection."""

    def test_a_client_for_whom_reading_would_have_to_write_does_not_hold_its_thread(self):
        """OpenSSL answers a broken record with an alert, which blocks where the client reads nothing."""
        self.server.context = v.tls_context(certificates() / 'server.crt', certificates() / 'server.key')
        client = trusting(certificates() / 'ca.crt')
        client.check_hostname = False
        link = client.wrap_socket(self.connect())
        self.addCleanup(link.close)
        peer = wait_until(lambda: next(iter(self.peers)), 5)
        with socket.socket(fileno=os.dup(peer.sock.fileno())) as same:
            for _ in range(5):  # its buffer is full for good once the client's has taken what it takes
                time.sleep(0.05)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        same.send(bytes(1 << 16), socket.MSG_DONTWAIT)
        socket.socket.send(link, b'\x17\x03\x03\x00\x20' + bytes(32))
        wait_until(lambda: not self.peers, 10)

    def test_sixteen_connections_of_one_address_the_next_takes_the_place_of_the_longest_idle(self):
        patient = unittest.mock.patch.dict(v.PEER_STATES, new=(60.0, 0.0))
        with unittest.mock.patch.object(v, 'LOOPBACK', ()), patient:
            links = [self.connect() for _ in range(v.PER_ADDRESS)]
            wait_until(lambda: len(self.peers) == 16, 5)
            links.append(self.connect())
            self.assertEqual(links[0].recv(1), b'')
            wait_until(lambda: len(self.peers) == 16, 5)
            for peer in list(self.peers):
                peer.enter('working')
            self.assertEqual(self.connect().recv(1), b'')  # none is idle
            links.append(socket.create_connection(self.server.server_address[:2], 5, ('127.0.0.2', 0)))
            self.addCleanup(links[-1].close)
            wait_until(lambda: len(self.peers) == 17, 5)

    def test_nothing_in_the_value_of_a_header_ends_its_line(self):
        reply = v.Reply(200, headers=(('X-Name', 'a\r\nSet-Cookie: b\n\0c\td'),))
        self.assertIn(b'\r\nX-Name: aSet-Cookie: bc\td\r\n', v.format_head(reply, True))

    def test_who_is_still_sending_after_a_refusal_counts_until_it_is_gone(self):
        links = [self.connect() for _ in range(20)]
        for link in links:
            link.sendall(b'BAD\r\n\r\nx')
        for link in links:
            self.assertIn(b' 400 ', link.recv(4096))
        self.assertEqual(len(self.peers), 20)
        wait_until(lambda: not self.peers, 10)


# ---------- disk, clock, memory -----------------------------------------------------------
# Full and failing disks at every step of a download, clocks that jump, little of everything.

FAKETIME = next(iter(Path('/usr/lib').glob('*/faketime/libfaketime.so.1')), None)


class TestAlmostFull(DaemonTest):
    """Links are refused, with a sentence, before the database's disk is full; health says so."""
    hurry = {'LAST_ROOM': 1 << 60}

    def test_refused_by_every_intake(self):
        for path, name in (('/api/v1/download', 'url'), ('/api/v1/downloads', 'text'), ('/share/x', 'text')):
            answer = self.daemon.client.post(path, {name: tiktok_link(1)})
            self.assertEqual((answer.status, 'almost full' in str(answer.json)), (503, True), answer)
            self.assertIn('Retry-After', answer.headers)
        self.assertEqual(self.daemon.client.get('/api/v1/health').status, 503)
        self.assertEqual(self.daemon.rows('SELECT count(*) AS n FROM downloads')[0]['n'], 0)

    def test_the_probe_writes_as_much_as_a_link(self):
        store = open_store(self)

        def written(work, *args):
            before = Path(f'{store.path}-wal').stat().st_size
            work(*args)
            return Path(f'{store.path}-wal').stat().st_size - before
        link = v.Submission('https://vm.tiktok.com/' + 'x' * 2000, 'phone', 1, ())
        self.assertGreaterEqual(written(store.probe), written(store.add_many, [link], 1))


@unittest.skipUnless(shutil.which('strace'), 'strace is not installed')
class TestFailingDisk(DaemonTest):
    """ENOSPC and EIO at any write: 503 or pause, never a false ack, never a dead thread, recovery without a restart."""
    settings = {'downloads': {'max_retries': 9}, 'logging': {'level': 'WARNING'}}
    hurry = {'PAUSE_SECONDS': 2}

    def test_a_download_that_met_a_fault_ends_well_once_the_disk_works(self):
        for calls, error, path in (('write', 'ENOSPC', str(self.daemon.output / '.incomplete')), ('fsync', 'EIO', ''),
                                   ('fdatasync', 'EIO', ''), ('rename,renameat,renameat2,link,linkat', 'EIO', '')):
            with self.subTest(calls):
                post = self.site.tiktok(size=1_500_000, hold_at=1_000_000)
                id = self.daemon.half_way(post)
                with Strace(self.daemon, f'{calls}:error={error}', calls=calls, paths=path) as trace:
                    post.media[0].release()
                    wait_until(trace.met, 20, 'the fault is met')
                    self.assertNotEqual(self.daemon.row(id)['status'], 'completed')
                same_bytes(self.daemon, self.daemon.wait_status(id, 'completed', 60), post.media[0])
                self.assertEqual(self.daemon.client.get('/api/v1/health').status, 200)

    def test_no_room_for_the_log(self):
        log = str(self.daemon.folder / 'logs/server.log')
        with Strace(self.daemon, 'write:error=ENOSPC', calls='write', paths=log):
            for number in range(20):
                self.daemon.submit(tiktok_link(number))
                self.assertEqual(self.daemon.client.get('/nowhere').status, 404)
        self.daemon.download(self.site.tiktok())


@unittest.skipUnless(FAKETIME, 'libfaketime is not installed')
class TestWallClock(DaemonTest):
    """Wall clock jumping a day either way: no retry lost, none early by more than the jump, no busy loop."""
    settings = None

    def test_a_jump_either_way(self):
        control = RUN / 'clock'
        control.write_text('+0')
        faked = {'LD_PRELOAD': str(FAKETIME), 'FAKETIME_TIMESTAMP_FILE': str(control),
                 'FAKETIME_CACHE_DURATION': '1', 'FAKETIME_DONT_FAKE_MONOTONIC': '1', 'DONT_FAKE_MONOTONIC': '1',
                 'PATH': path_without_ffmpeg()}  # its waits for children do not work under faketime
        daemon = self.new_daemon(site=None, downloads={'retry_delays': '3', 'max_retries': '9'}, security=ANYWHERE,
                                 env=faked)
        for jump in ('-1d', '+1d'):
            with self.subTest(jump):
                post = self.site.direct(page={'fail': [503]})  # without TLS: certificates have dates, too
                id = daemon.submit(post)
                daemon.wait_for(id, lambda row: row['next_attempt_at'])
                used = daemon.cpu()
                control.write_text(jump)
                daemon.wait_status(id, 'completed')
                if jump == '-1d':
                    self.assertGreater(post.page.requests[1].time - post.page.requests[0].time, 2)
                self.assertLess(daemon.cpu() - used, 4)


class TestLittleOfEverything(DaemonTest):
    """Open-file limit 40; 10,000 queued links."""
    settings = None

    def test_open_file_limit_40(self):
        daemon = self.new_daemon(prefix=['prlimit', '--nofile=40:40'] if shutil.which('prlimit') else [])
        for _ in range(3):
            daemon.download(self.site.tiktok())
        daemon.download(self.site.instagram())

    def test_ten_thousand_queued_links(self):
        daemon = self.new_daemon(downloads={'min_free_space': '9000GB'})
        daemon.terminate()
        change_database(daemon.database, "INSERT INTO downloads (id, url, client_id, status, created_at, last_updated) "
                                         "VALUES (?, ?, 'many', 'queued', 5, 5)",
                        [(str(uuid.uuid4()), tiktok_link(number)) for number in range(10_000)])
        daemon.start()
        self.assertEqual(daemon.client.get('/api/v1/health').json['queue_size'], 10_000)
        daemon.submit(tiktok_link(77))
        self.assertLess(daemon.rss(), 45)
        used = daemon.cpu()
        time.sleep(1)
        self.assertLess(daemon.cpu() - used, 0.3)


# ---------- page --------------------------------------------------------------------------
# The page in a real Chromium, against the real daemon. AXE_CORE: the path of axe.min.js; without it
# axe is skipped.

AXE_CORE = Path(os.environ.get('AXE_CORE') or HERE / 'axe.min.js')
AXE_RULES = ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']
FIRST_PAINT_BYTES = 100 * 1024
FINGER = 44  # CSS pixels (Apple's Human Interface Guidelines)


@unittest.skipUnless(CHROMIUM and shutil.which('chromedriver'), 'chromium and chromedriver are not installed')
class TestPage(PageTest):
    """Every action of the page."""

    def test_a_mac_offers_its_signed_shortcut_on_the_setup_page(self):
        tools = new_program(new_folder() / 'shortcuts', 'cat "$5" >"$7"').parent
        daemon = self.new_daemon(env={'PATH': f'{tools}:{os.environ["PATH"]}'})
        self.visit('/setup#share', daemon)
        self.browser.until('#signed', 'checkVisibility()')
        self.assertTrue(self.browser.get('#signed', 'href').endswith('/share/My%20iPhone/shortcut'))
        self.visit('/setup#share')
        self.browser.until('#address', 'value.endsWith("/share/My%20iPhone")')
        self.assertTrue(self.browser.get('#ready', 'hidden'))

    def test_an_export_is_looked_into_and_what_is_ticked_is_queued(self):
        post, file = self.site.tiktok(hold_at=50_000), self.daemon.folder / 'export.zip'
        export = tiktok_export([str(post)], shared_links(5), shared_links(7))
        file.write_bytes(zipped({'user_data_tiktok.json': export}))
        self.browser.run('document.querySelector("#import-file").closest("details").open = true')
        self.browser.type('#import-file', str(file))
        seen = 'Favorites 1 · Likes 5 · Watch history 7, about 3 minutes'
        self.browser.until('#imports .meta', f'innerText === "{seen}"')
        ticked = 'return [...document.querySelectorAll("#imports :checked")].map(box => box.value)'
        self.assertEqual(self.browser.run(ticked), ['favorites', 'likes'])
        self.browser.click('#imports [value=likes]')
        self.browser.click('#imports [value=start]')
        self.browser.until('#imports [data-state=running] .meta', 'innerText.startsWith("0 of 1")')
        post.media[0].release()
        self.browser.until('article', 'row.status === "completed"')
        self.assertEqual(len(self.daemon.rows("SELECT id FROM downloads WHERE import_id IS NOT NULL")), 1)
        self.browser.run('window.confirm = () => true')
        self.browser.until('#imports .meta', 'innerText === "Done: 1 of 1"')
        self.browser.click('#imports .done')
        self.browser.wait('return !imports.children.length')

    def test_a_link_is_at_once_on_top_and_becomes_a_video_that_plays_and_seeks(self):
        post = self.site.tiktok(title='A cat jumps over the moon', size=300_000)
        self.browser.type('#box', str(post) + ENTER)
        id = self.browser.wait(ONE_ROW, f'row.url === "{post}"')['download_id']
        self.assertEqual(self.browser.run(ROWS)[0]['download_id'], id)
        self.row(id)
        self.assertIn('A cat jumps over the moon', self.browser.get('article'))
        self.press(id, 'play')
        self.browser.until('video', 'readyState >= 2')
        self.browser.run('const video = document.querySelector("video"); video.pause(); video.currentTime = 0.6')
        self.browser.wait('const video = document.querySelector("video");'
                          'return !video.seeking && video.currentTime === 0.6')
        media = [request['headers'] for request in self.browser.requests() if '/files/' in request['url']]
        self.assertTrue(media and all('Range' in headers for headers in media))
        self.browser.run('history.back()')
        self.browser.wait('return !document.querySelector("video")')

    def test_save_and_copy_link(self):
        id = self.daemon.download(str(self.site.tiktok(title='Kept')))['download_id']
        self.row(id)
        self.browser.run('HTMLAnchorElement.prototype.click = function() {'
                         '  window.saved = [this.href, this.hasAttribute("download")] }')
        self.press(id, 'save')
        link, download = self.browser.run('return window.saved')
        self.assertTrue(download)
        self.assertEqual(self.browser.run('return fetch(arguments[0]).then(({status}) => status)', link), 200)
        self.press(id, 'copy')
        self.browser.until('#note', 'textContent === "Link copied"')
        self.assertEqual(self.clipboard(), self.daemon.status(id)['public_url'])

    def test_copy_link_to_the_bucket_where_there_is_one(self):
        endpoint = LocalServer(OpenBucket, self).url
        stored = self.new_daemon(env={'VIDEOSERVER_S3_ENDPOINT': endpoint, 'VIDEOSERVER_S3_BUCKET': 'videos',
                                      'AWS_ACCESS_KEY_ID': 'a', 'AWS_SECRET_ACCESS_KEY': 'b'})
        stored.submit(str(self.site.tiktok()))
        self.visit(daemon=stored)
        self.browser.click('article [value=more]')
        self.browser.click('article [value=s3]')
        self.browser.until('#note', 'textContent === "Link copied"')
        self.assertTrue(self.clipboard().startswith(f'{endpoint}/videos/'))

    def test_the_clipboard_button_fills_the_box(self):
        self.browser.run('return navigator.clipboard.writeText("https://vm.tiktok.com/ZMabc/")')
        self.browser.click('#paste')
        self.browser.until('#box', 'value === "https://vm.tiktok.com/ZMabc/"')

    def test_a_long_list_on_one_line_is_sent_in_parts(self):
        many = self.new_daemon(downloads={'min_free_space': '900TB'})
        self.visit(daemon=many)
        self.send(' '.join(map(tiktok_link, range(700))))
        self.browser.wait('return document.querySelector("#outbox").hidden && box.value === ""')
        self.assertEqual(len({row['url'] for row in many.rows()}), 700)

    def test_of_several_links_one_a_line_what_is_refused_is_back_in_the_box_with_the_servers_own_sentence(self):
        self.expected = '403'
        self.send('https://example.org/clip')
        self.browser.until('#refusal', 'textContent.includes("example.org")')
        self.assertEqual(self.browser.get('#box', 'value'), 'https://example.org/clip')
        self.browser.run('document.querySelector("#box").value = ""')
        posts = [str(self.site.tiktok()), str(self.site.tiktok())]
        self.send(f'{posts[0]}\n\nhttps://example.org/clip\n  {posts[1]}  ')
        self.browser.until('#box', 'value === "https://example.org/clip"')
        for post in posts:
            self.browser.wait(ONE_ROW, f'row.url === "{post}"')

    def test_cancel_try_again_delete_and_undo(self):
        post = self.site.tiktok(title='Slow', size=3_000_000, speed=600_000, hold_at=2_500_000)
        id = self.daemon.submit(str(post))
        self.row(id, 'row.progress >= 10 && row.speed')
        self.press(id, 'cancel')
        self.assertEqual(self.row(id)['error_message'], 'Cancelled')
        post.media[0].set(speed=None).release()
        self.press(id, 'retry')
        self.row(id, 'row.files.length')
        self.press(id, 'delete')
        self.browser.until('.pressed', 'hidden')
        self.browser.click('#offer')
        leave = 'dispatchEvent(new Event("pagehide"))'  # leaving the page is the end of the grace
        self.browser.run(leave)
        self.row(id)
        self.assertFalse([request for request in self.browser.requests() if request['method'] == 'DELETE'])
        self.press(id, 'delete')
        self.browser.run(leave)
        wait_until(lambda: self.daemon.client.get(f'/api/v1/status/{id}').status == 404)
        self.browser.wait('return !document.querySelector(".pressed")')

    def test_cookies_a_star_and_once_more(self):
        file = self.daemon.folder / 'cookies of a browser.txt'
        file.write_text(f'# Netscape\n.instagram.com\tTRUE\t/\tTRUE\t{int(time.time()) + 9999}\tsessionid\tx\n')
        self.browser.run('document.querySelector("summary").click(); scrollTo(0, 1e6)')
        self.browser.type('#cookie-file', str(file))
        self.browser.until('#cookies', 'textContent.includes("instagram.com")')
        self.browser.click('#forget-cookies')
        self.browser.until('#cookies', 'textContent === "There are no cookies."')
        id = self.daemon.download(str(self.site.tiktok()))['download_id']
        self.row(id)
        for act, starred in (('star', True), ('unstar', False)):
            self.press(id, act)
            self.row(id, f'row.starred === {str(starred).lower()}')
        self.assertNotIn('★', self.browser.get('.pressed .meta'))
        self.press(id, 'again')
        self.browser.wait(ONE_ROW, f'row.download_id !== "{id}" && row.files?.length && row.status === "completed"')

    def test_why_it_failed_and_when_the_next_attempt_is(self):
        gone = self.daemon.fails(str(self.site.tiktok(state='private')))
        self.row(gone['download_id'])
        self.assertIn(gone['error_message'], self.browser.get('article .reason'))
        post = self.site.tiktok(page={'fail': [503] * 9})
        id = self.daemon.submit(str(post))
        self.row(id, 'row.next_attempt_at')
        self.assertRegex(self.browser.get('article .word'), r'^Next\stry\sin\s4\smin.*1\sfailed')
        post.page.set(fail=[])
        self.press(id, 'retry')
        self.row(id, 'row.files.length')

    def test_a_carousel_is_browsed_and_closes_by_a_tap_beside_it(self):
        first = self.daemon.download(str(self.site.tiktok(title='Older')))['download_id']
        post = self.site.instagram('video', 'photo', 'video', title='Two of them')
        id = self.daemon.download(str(post))['download_id']
        self.row(id)
        buttons = self.browser.run('return document.querySelectorAll("article:first-child [value=delete]").length')
        self.assertEqual(buttons, 1)
        self.press(id, 'play')
        files = [file['path'] for row in (id, first) for file in self.daemon.status(row)['files']]
        for number, path in enumerate(files):
            self.browser.until('#screen > *', f'src.endsWith("{path}")')
            if number + 1 < len(files):
                self.browser.click('#player [value=next]')
        self.browser.run('player.dispatchEvent(new MouseEvent("click", {bubbles: true}))')
        self.browser.wait('return !player.open && history.state === null')

    def test_a_file_that_is_not_there_is_explained(self):
        self.expected = '404|503'
        row = self.daemon.download(str(self.site.tiktok()))
        self.row(row['download_id'])
        for file in self.daemon.output.iterdir():
            if file.is_file() and not file.name.startswith('.'):
                file.unlink()
        self.press(row['download_id'], 'play')
        self.browser.until('#screen', 'innerText.includes("Is its disk plugged in?")')

    def test_titles_made_of_markup_are_text(self):
        title = '<img src=x onerror=document.title=1><b>bold</b> {{HOST}} &amp;'
        self.row(self.daemon.download(str(self.site.tiktok(title=title)))['download_id'])
        self.assertEqual(self.browser.get('article .title'), title)

    def test_a_page_that_is_left_open_gathers_no_listeners(self):
        self.browser.run("""
            const add = EventTarget.prototype.addEventListener, ask = window.fetch;
            window.added = window.rounds = 0;
            EventTarget.prototype.addEventListener = function(...listener) {
              window.added++;
              return add.apply(this, listener);
            };
            window.fetch = (path, options) => {
              window.rounds += path.includes('since=');
              return ask(path, options);
            }""")
        for number in range(4):  # news, so that the page looks again
            self.daemon.submit(str(self.site.tiktok()))
            self.browser.wait('return window.rounds > arguments[0]', number)
        self.assertEqual(self.browser.run('return window.added'), 0)


@unittest.skipUnless(CHROMIUM and shutil.which('chromedriver'), 'chromium and chromedriver are not installed')
class TestPageAtLarge(PageTest):
    """The page with many videos, of every width, without a server, without a key, before there is anything."""

    def test_search_filter_and_several_at_once(self):
        failed = "SELECT * FROM downloads WHERE status = 'failed'"
        for row in self.daemon.rows(failed):  # of other tests
            self.daemon.client.delete(f'/api/v1/download/{row["id"]}')
        self.daemon.download(str(self.site.tiktok(title='Needle in the hay')))
        private = self.site.tiktok(state='private')
        self.daemon.fails(str(private))
        for _ in range(5):  # from the fifth video on there is something to search
            self.daemon.download(str(self.site.tiktok(title='Hay')))
        self.browser.run('window.confirm = question => { window.asked = question; return true; }')
        self.browser.type('#search', 'needle')
        self.browser.wait(f'{ROWS}.length === 1')
        self.browser.click('#states [value=failed]')
        self.browser.until('#nothing', 'checkVisibility()')
        self.browser.click('#show-all')
        self.browser.screen(390, 844)
        top = 230 if v.runs_here(v.NEEDS) else 999  # below what is said of an old Python
        self.browser.wait(f'{ROWS}.length > 4 && document.querySelector("article").getBoundingClientRect().top < {top}')
        self.browser.click('#states [value=failed]')
        self.browser.wait(f'{ROWS}.length && {ROWS[7:]}.every(row => row.status === "failed")')
        asked = len(private.page.requests)
        self.browser.click('#bulk [value=retry]')
        wait_until(lambda: len(private.page.requests) > asked and self.daemon.rows(failed), 60)
        self.browser.wait(f'{ROWS}.length')
        self.browser.click('#bulk [value=clear]')
        self.browser.wait('return !document.querySelector("article")')
        self.assertEqual(self.daemon.rows(failed), [])
        self.assertRegex(self.browser.run('return window.asked'), r'Remove \d+ from this list. Their files stay')
        self.browser.click('#states [value=""]')
        self.browser.click('#pick')
        chosen = self.browser.wait(f'{ROWS}[0]?.download_id')
        self.browser.click('article input')
        self.browser.until('#bulk b', 'textContent === "1 selected"')
        self.browser.click('#bulk [value=delete]')
        self.browser.wait(f'{ROWS}.every(row => row.download_id !== "{chosen}")')
        self.assertEqual(self.daemon.client.get(f'/api/v1/status/{chosen}').status, 404)
        files = self.daemon.files()
        self.visit()
        self.browser.run('window.confirm = () => true')
        self.browser.click('#states [value=completed]')
        self.browser.click('#bulk [value=clear]')
        self.browser.wait('return !document.querySelector("article")')
        self.assertEqual((self.daemon.files(), self.daemon.rows(failed.replace('failed', 'completed'))), (files, []))

    def test_ytdlp_is_updated_from_the_banner(self):
        daemon = self.new_daemon(vendor=False, hurry={'INDEX': 'http://127.0.0.1:1'}, env={'PYTHONPATH': str(no_pip())},
                                 downloader={'ytdlp_directory': 'none'})
        self.visit(daemon=daemon)
        self.browser.click('#update')
        self.browser.until('#note', 'textContent === "The newest yt-dlp is being fetched."')
        self.assertEqual([request['method'] for request in self.browser.requests()
                          if request['url'].endswith('/api/v1/update')], ['POST'])

    def test_health_follows_the_list_at_once(self):
        daemon = self.new_daemon()
        self.visit(daemon=daemon)
        self.browser.until('#pulse', 'textContent.includes("yt-dlp")')
        daemon.output.rename(daemon.output.with_name('elsewhere'))
        began = time.monotonic()
        daemon.client.post('/api/v1/download', {'url': str(self.site.tiktok())})
        self.browser.until('#health', 'innerText.includes("is its disk plugged in")')
        self.assertLess(time.monotonic() - began, 15)  # by itself the page looks every 30 s

    def test_share_hands_over_the_file_itself_also_without_what_ios_16_lacks(self):
        self.before_each_page("""
            delete AbortSignal.any;
            Object.assign(navigator, {canShare: () => true, share: async ({files}) => {
              window.tries = (window.tries ?? 0) + 1;
              if (window.tries === 1) throw new DOMException('too late', 'NotAllowedError');
              window.shared = files.map(file => [file.name, file.type, file.size]);
            }})""")
        row = self.daemon.download(str(self.site.instagram('video', 'video')))
        self.visit()
        self.row(row['download_id'])
        self.press(row['download_id'], 'share')
        self.browser.until('#offer', 'textContent === "Share"')  # it took longer than a tap lasts
        self.browser.click('#offer')
        self.assertEqual(self.browser.wait('return window.shared'),
                         [[file['name'], file['type'], file['size']] for file in row['files']])
        self.press(row['download_id'], 'play')
        self.browser.click('#player [value=share]')
        self.browser.wait('return window.tries === 3 && window.shared.length === 1')

    def test_it_opens_while_the_server_is_gone_and_sends_what_was_added_once(self):
        self.expected = 'ERR_CONNECTION_REFUSED|ERR_FAILED|icon from the Manifest'
        daemon = self.new_daemon()
        self.visit(daemon=daemon)
        self.browser.wait('return navigator.serviceWorker.ready'
                          '.then(() => Boolean(navigator.serviceWorker.controller))')
        daemon.configure(server={'port': daemon.port})
        daemon.terminate()
        self.addCleanup(reserved(daemon.port).close)
        self.browser.open(f'https://127.0.0.1:{daemon.port}/')
        self.browser.until('#pulse', 'textContent.startsWith("No connection")')
        link = tiktok_link(8)
        self.send(link)
        self.browser.until('.lost #outbox', 'innerText.includes("Kept here")')
        self.browser.open(f'https://127.0.0.1:{daemon.port}/')
        self.browser.until('.lost #outbox', f'innerText.includes("{link}")')
        daemon.start()
        self.browser.until('body:not(.lost) #outbox', 'hidden')
        self.assertEqual([row['url'] for row in daemon.rows()], [link])

    def test_a_deep_link_and_the_share_target_only_fill_the_box(self):
        before, link = self.newest(), 'https://vm.tiktok.com/ZM1/'
        for query, text in (('url=https%3A%2F%2Fvm.tiktok.com%2FZM1%2F', link),
                            ('url=https%3A%2F%2Fvm.tiktok.com%2FZM1%2F', link),  # again: what waits there stays, once
                            ('title=A+cat&text=Look%21+https%3A%2F%2Fvm.tiktok.com%2FZM1%2F', f'{link}\nLook! {link}')):
            self.visit('/?' + query)
            self.assertEqual(self.browser.get('#box', 'value'), text)
            self.assertEqual(self.browser.run('return [document.activeElement.id, location.search]'), ['send', ''])
        self.assertEqual(self.newest(), before)
        self.assertEqual(self.browser.devtools('Page.getAppManifest')['errors'], [])

    def test_a_link_sent_without_connection_is_kept_and_sent_with_the_same_timestamp(self):
        self.expected = 'ERR_INTERNET_DISCONNECTED|ERR_FAILED|icon from the Manifest'
        self.browser.offline(True)
        self.send(str(self.site.tiktok(title='From the train')))
        self.browser.until('.lost #outbox', 'innerText.includes("Kept here")')
        entry, = self.browser.run('return JSON.parse(localStorage.getItem("videoserverd.outbox"))')
        self.browser.offline(False)
        self.browser.run('dispatchEvent(new Event("online"))')
        self.browser.until('body:not(.lost) #outbox', 'hidden')
        row = self.newest()
        self.assertEqual((row['url'], row['timestamp']), (entry['text'], str(entry['timestamp'])))
        self.assertRegex(row['client_id'], '^web-')
        self.browser.run('localStorage.setItem("videoserverd.outbox", JSON.stringify([arguments[0]]))', entry)
        self.visit()  # as if the answer had been lost: sent again, queued once
        self.browser.until('#outbox', 'hidden')
        self.assertEqual(self.newest()['id'], row['id'])

    def test_the_key_is_asked_for_once_and_stays_in_the_browser_also_with_letters_that_no_header_has(self):
        locked = self.new_daemon(env={'VIDEOSERVER_API_KEYS': 'sésame'})
        locked.new_client(key='sésame'.encode().decode('latin-1')).post('/api/v1/download', {'url': self.site.tiktok()})
        self.visit(daemon=locked)
        for wrong in ('wrong', 'sésame\u200b'):
            self.browser.type('#key', wrong + ENTER)
            self.browser.until('[open] #key-text', 'textContent.includes("does not know")')
        self.browser.type('#key', 'sésame' + ENTER)
        self.browser.click('article [value=play]')
        self.browser.until('video', 'readyState >= 2')
        if shutil.which('ffmpeg'):
            self.browser.until('.thumb img', 'naturalWidth')
        self.visit(daemon=locked)
        self.browser.until('article [value=play]', 'checkVisibility()')
        self.assertFalse([request['url'] for request in self.browser.requests() if 'same' in request['url']])
        self.browser.click('summary')
        self.browser.click('#forget')
        self.browser.until('#door', 'open')

    def test_a_page_opened_while_links_cannot_be_stored_says_so_and_asks_for_no_key(self):
        self.expected = '503'
        daemon = self.new_daemon()
        with contextlib.closing(sqlite3.connect(str(daemon.database), isolation_level=None)) as db:
            db.execute('BEGIN EXCLUSIVE')
            self.assertEqual(daemon.client.post('/api/v1/download', {'url': tiktok_link(1)}).status, 503)
            self.visit(daemon=daemon)
            self.browser.until('#health', 'innerText.includes("Links cannot be stored: database is locked")')
            self.assertFalse(self.browser.get('#door', 'open'))
            self.send(tiktok_link(2))
            self.browser.until('#outbox', 'innerText.includes("cannot store it at the moment. Kept here, and sent")')
        self.browser.until('#outbox', 'hidden')
        self.assertEqual([row['url'] for row in daemon.rows()], [tiktok_link(2)])

    @unittest.skipUnless(shutil.which('ffmpeg'), 'ffmpeg is not installed')
    def test_first_paint_of_a_full_list_is_small_and_takes_few_requests(self):
        full = self.full_daemon()
        for width, height in ((390, 844), (1280, 800)):
            self.browser.screen(width, height)
            self.browser.devtools('Network.clearBrowserCache')
            self.browser.events()
            self.visit(daemon=full)
            self.browser.wait('return [...document.querySelectorAll(".thumb")].every(frame =>'
                              '  frame.getBoundingClientRect().top > innerHeight || frame.querySelector("img"))')
            time.sleep(0.5)  # for whatever else it would fetch
            events = self.browser.events()
            asked = collections.Counter(urlsplit(event['request']['url']).path for event in events['requestWillBeSent']
                                        if not re.search('/api/|^blob:', event['request']['url']))
            self.assertEqual(set(asked) - {'/sw.js'},
                             {'/', '/icon.png', '/manifest.webmanifest', '/page.css', '/page.js'})
            self.assertEqual((asked['/page.css'], asked['/page.js']), (1, 1))
            self.assertLessEqual(len(self.browser.run(ROWS)), 40)
            self.assertLess(sum(event['encodedDataLength'] for event in events['loadingFinished']), FIRST_PAINT_BYTES)

    def test_10000_rows_scroll_smoothly_and_health_in_words(self):
        many = self.new_daemon(start=False, downloads={'min_free_space': '900TB'})
        store = v.Store(many.database)
        store.open()
        store.close()
        change_database(
            many.database,
            'INSERT INTO downloads (id, url, client_id, status, title, error_message, created_at, last_updated) '
            "VALUES (?, 'https://www.tiktok.com/@a/video/1', 'x', 'failed', ?, 'It is gone.', ?, 0)",
            [(str(uuid.UUID(int=n)), f'Number {n}', 1_700_000_000 + n) for n in range(10_000)])
        self.visit(daemon=many.start())
        problems = many.client.get('/api/v1/health').json['problems']
        said, told = (re.sub(r'[\d.]+ GB free|`', '', text)  # others write to the disk meanwhile
                      for text in (self.browser.get('#problems'), '\n'.join(problems)))
        self.assertEqual(said, told)
        self.assertRegex(self.browser.get('#pulse'), r'^Live · .* free · yt-dlp 20\d\d\.')
        for step in (*range(0, 10, 2), 9, 0):
            self.browser.run('scrollTo(0, arguments[0] / 9 * document.body.scrollHeight)', step)
            self.browser.wait(ONE_ROW, f'Math.abs(parseInt(row.title.slice(7)) - {9999 - 1111 * step}) < 100')

    def test_every_width_fits_with_large_letters_too_and_fingers_hit(self):
        self.row(self.daemon.download(str(self.site.tiktok(title='Wide ' * 60)))['download_id'])
        for path in ('/', '/setup#profile', '/setup#share'):
            for width, height, letters in ((320, 640, 1), (320, 640, 2), (390, 844, 1), (430, 932, 2), (844, 390, 2),
                                           (768, 1024, 1), (1440, 900, 1), (2560, 1440, 1)):
                self.browser.screen(width, height)
                if (width, letters) in ((320, 1), (844, 2)):  # of a phone, of a desk; others are turned or pulled
                    self.browser.open('about:blank')
                    self.visit(path)
                self.browser.run('document.documentElement.style.fontSize = arguments[0] + "%"', 100 * letters)
                beyond, small = self.browser.run("""
                    const nodes = [...document.querySelectorAll('body *')].filter(node => node.checkVisibility());
                    const name = node => node.tagName + node.id + node.className;
                    const wide = node => node.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
                    return [nodes.filter(wide).map(name),
                      nodes.filter(node => node.matches('button, input:not([type]), textarea, a.button, summary')
                        && Math.min(node.offsetWidth, node.offsetHeight) < arguments[0]).map(name)]""", FINGER)
                self.assertEqual((path, width, letters, beyond, small), (path, width, letters, [], []))

    def test_news_has_a_place_of_its_own_and_lies_over_no_button(self):
        self.row(self.daemon.download(str(self.site.tiktok(title='Long words ' * 9)))['download_id'])
        self.browser.screen(390, 500)
        height = self.browser.get('#notes', 'offsetHeight')
        self.browser.run('document.querySelector("article [value=delete]").click()')
        self.browser.until('#note', 'textContent')
        self.assertEqual(self.browser.get('#notes', 'offsetHeight'), height)
        self.assertEqual(self.browser.run("""scrollTo(0, 1e6);
            return [...document.querySelectorAll('article button, footer summary')].filter(node =>
              node.getBoundingClientRect().bottom > innerHeight - document.querySelector('#notes').offsetHeight)
              .map(node => node.textContent)"""), [])
        self.browser.click('#hush')
        self.browser.until('#note', 'textContent === ""')

    @unittest.skipUnless(AXE_CORE.exists(), 'axe-core is not there; AXE_CORE names axe.min.js')
    def test_axe_finds_no_violation(self):
        self.daemon.submit(str(self.site.tiktok(hold_at=50_000)))
        self.daemon.fails(str(self.site.tiktok(state='private')))
        self.row(self.daemon.download(str(self.site.tiktok()))['download_id'])
        for path, dark, before in (('/', False, ''), ('/', True, 'document.querySelector("[value=play]").click()'),
                                   ('/', False, 'document.querySelector("[value=more]:not([hidden])").click()'),
                                   ('/', True, 'document.querySelector("article [value=delete]").click()'),
                                   ('/setup', False, '')):
            self.browser.screen(390, 844, dark)
            self.visit(path)
            self.browser.run(f'{before}; {AXE_CORE.read_text()}')
            found = self.browser.run('return axe.run({runOnly: arguments[0]}).then(found => found.violations.map('
                                     '({id, nodes}) => [id, nodes.map(node => node.html.slice(0, 200))]))', AXE_RULES)
            self.assertEqual((path, dark, before, found), (path, dark, before, []))

    def test_setup_works_without_javascript_and_copies_with_it(self):
        self.visit('/setup#share')
        self.browser.click('#copy')
        self.browser.until('#copy', 'textContent.includes("✓")')
        self.assertTrue(self.clipboard().endswith('/share/My%20iPhone'))
        self.assertEqual(self.clipboard(), self.browser.get('#address', 'value'))
        self.assertRegex(self.browser.get('#bookmarklet', 'getAttribute("href")'),
                         r"^javascript:void\(open\('https://")
        self.browser.devtools('Emulation.setScriptExecutionDisabled', value=True)
        self.addCleanup(self.browser.devtools, 'Emulation.setScriptExecutionDisabled', value=False)
        self.browser.open(f'https://127.0.0.1:{self.daemon.port}/')
        self.browser.until('#old', 'innerText.includes("iOS 16")')
        self.visit('/setup')
        text = self.browser.get('main', 'textContent')
        for words in (v.ca_fingerprint(self.daemon.config), 'Certificate Trust Settings', 'Local Network',
                      'VPN & Device Management', 'Show in Share Sheet', 'Get Contents of URL', 'AirDrop'):
            self.assertIn(words, text)

    def test_setup_moves_on_by_itself_and_the_console_tells_how_far_the_phone_is(self):
        self.expected = 'icon.png'
        phone = subprocess.Popen(self.daemon.command_line('phone', '--port', '0'), env=self.daemon.env,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8')
        self.addCleanup(lambda: (phone.terminate(), phone.wait(), phone.stdout.close()))
        said = (words for line in phone.stdout for words in re.findall(r'http://\S+|(?<=:\d\d  ).*', line))
        address = re.sub('//[^:]*', '//127.0.0.1', next(said))
        self.browser.devtools('Network.setBlockedURLs', urls=['*/icon.png?*'])  # as if it were not trusted
        self.browser.open(address)
        self.assertRegex(next(said), 'opened the page')
        shown = 'return [...document.querySelectorAll(".step")].map(step => step.checkVisibility() && step.id)'
        self.assertEqual(self.browser.run(shown), ['profile', False, False])
        self.assertEqual(fetch(address + 'ca.mobileconfig')[1]['Content-Type'], 'application/x-apple-aspen-config')
        self.assertRegex(next(said), 'downloaded the profile')
        for step in ('install', 'trust'):
            self.browser.run('scrollTo(0, 1000)')
            self.browser.click(f'.go [href="#{step}"]')
            self.assertEqual(self.browser.run('return [document.body.dataset.at, scrollY]'), [step, 0])
        self.browser.devtools('Network.setBlockedURLs', urls=[])
        self.browser.until('#trusted', 'textContent.startsWith("✓")')
        self.assertRegex(next(said), 'trusts the server')
        self.browser.wait('return location.protocol === "https:" && document.body.dataset.at === "share"')
        self.daemon.submit(tiktok_link(5))
        self.assertRegex(next(said), f'It works: {tiktok_link(5)}')

    def test_setup_asks_for_the_key_once_and_waits_for_the_first_link(self):
        self.expected = '401'
        locked = self.new_daemon(env={'VIDEOSERVER_API_KEYS': 'sesame'})
        self.visit('/setup#share', locked)
        self.browser.type('#key', 'wrong' + ENTER)
        self.browser.until('#why', 'textContent !== "This server asks for a key, once."')
        self.browser.run('key.value = ""')
        self.browser.type('#key', 'sesame' + ENTER)
        self.browser.until('#share', 'checkVisibility()')
        self.browser.run('document.querySelector("#name").value = "Anna’s phone";'
                         'document.querySelector("#name").dispatchEvent(new Event("change"))')
        address = self.browser.wait('const {value} = address; return value.includes("Anna%E2%80%99s") && value')
        self.assertIn('Waiting', self.browser.get('#works'))
        link = locked.client.connection()
        with contextlib.closing(link):
            link.request('POST', urlsplit(address).path, json.dumps({'text': tiktok_link(9)}),
                         {'Content-Type': 'application/json'})
            self.assertEqual(link.getresponse().status, 202)
        self.browser.until('#works', 'textContent.startsWith("It works: a link to tiktok.com")')

    def test_the_four_screens_have_fewer_than_350_words(self):
        self.visit('/setup')
        words = self.browser.run(
            'const words = [...document.querySelectorAll(".lead, .step")].map(step => step.cloneNode(true));'
            'for (const step of words) for (const node of step.querySelectorAll("details, .desk")) node.remove();'
            'return words.map(step => step.textContent.trim().split(/\\s+/).length)')
        self.assertEqual(len(words), 5)
        self.assertLess(sum(words), 350)


class TestShare(ShareTest):
    """The Shortcut of two actions: one sentence as text/plain, always, and only once the link is stored."""
    settings = {'downloads': {'min_free_space': '9000GB'}}
    env = {'VIDEOSERVER_API_KEYS': 'erster-schlüssel,second'}

    def test_a_mac_gives_a_signed_shortcut_with_the_address_in_it_and_only_where_the_signing_works(self):
        tools = new_folder()
        daemon = self.new_daemon(env={**self.env, 'PATH': f'{tools}:{os.environ["PATH"]}'}, **self.settings)
        body = {'name': 'Mia’s iPhone'}

        def ask():
            answer = daemon.client.post('/api/v1/share-address', body, X_API_Key='second').json
            path = urlsplit(answer['address']).path + '/shortcut'
            return answer, daemon.client.get(path)
        for script, signs in ((None, False), ('exit 1', True)):
            if script:
                new_program(tools / 'shortcuts', script)
            answer, (status, fields, said) = ask()
            self.assertEqual((answer['signs'], status, fields.get_content_type()), (signs, 404, 'text/plain'))
        new_program(tools / 'shortcuts', '(printf signed:; cat "$5") >"$7"')
        body['name'] = 'another'
        answer, (status, fields, said) = ask()
        self.assertEqual((status, said[:7]), (200, b'signed:'))
        self.assertIn('Save video.shortcut', fields['Content-Disposition'])
        first, second = plistlib.loads(said[7:])['WFWorkflowActions']
        self.assertEqual(first['WFWorkflowActionParameters']['WFURL'], answer['address'])
        self.assertEqual(second['WFWorkflowActionIdentifier'], 'is.workflow.actions.notification')
        self.assertEqual(daemon.client.get('/share/another/shortcut').status, 401)

    def test_each_form_in_which_a_phone_sends_is_stored(self):
        form = '--b\r\nContent-Disposition: form-data; name="{}"\r\n\r\n{}\r\n--b--\r\n'
        for number, (kind, body) in enumerate([
                ('application/json', '{{"text": "{}"}}'), ('application/json; charset=utf-8', '{{"URL": "Look! {}"}}'),
                ('application/x-www-form-urlencoded', 'Text=a+b%20{}'),
                ('application/x-www-form-urlencoded', 'title=a+b&link={}'), ('text/plain', 'Größe 🐈 {}'),
                ('multipart/form-data; boundary=b', form), ('multipart/form-data; boundary="b"', form),
                ('', '{}'), ('application/octet-stream', '{}')]):
            link, name = tiktok_link(number), f'Zoe\u0301s {number} %/'.rstrip('/')
            text = body.format('uRl', link) if body is form else body.format(quote(link) if '%20' in body else link)
            with self.subTest(kind):
                status, said = self.share(text, kind, name)
                self.assertEqual(status, 202, said)
                self.assertRegex(said, r'^Saved. The queue is paused: .*\.$')
                rows = self.daemon.rows('SELECT * FROM downloads WHERE client_id = ?', f'Zoés {number} %')
                self.assertEqual([row['url'] for row in rows], [link])

    def test_every_error_is_a_sentence(self):
        json_type = {'Content_Type': 'application/json'}
        for method, path, body, headers, status in (
                ('POST', self.address('a'), b'no link', {}, 400), ('POST', self.address('a'), b'', {}, 400),
                ('POST', self.address('a'), b'https://example.com/', {}, 403),
                ('POST', self.address('a'), b'{"txt": "https://vm.tiktok.com/Z"}', json_type, 400),
                ('POST', self.address('a'), b'{', json_type, 400), ('POST', self.address('a'), b'x' * 20000, {}, 413),
                ('POST', self.address('x' * 65), b'', {}, 400), ('POST', self.address('a\u2028b'), b'', {}, 400),
                ('POST', '/share/a', b'', {}, 401), ('POST', self.address('a')[:-1], b'', {}, 401),
                ('POST', self.address('a') + '/file', b'', {}, 404), ('GET', '/share', None, {}, 404),
                ('GET', '/%73hare/', None, {}, 400), ('PUT', self.address('a'), b'', {}, 405),
                ('GET', '/share/%zz', None, {}, 400), ('POST', self.address('a'), b'', {'Host': 'evil.example'}, 421),
                ('POST', self.address('a') + '/video', b'no link', {}, 400),
                ('GET', self.address('a') + '?within=x', None, {}, 400)):
            with self.subTest(f'{method} {path} {body and body[:20]}'):
                answer = self.daemon.client.request(method, path, body, **headers)
                self.assertEqual((answer.status, answer.headers['Content-Type']), (status, 'text/plain; charset=utf-8'))
                self.assertRegex(answer.json.decode(), r'^[A-Za-z][^{}<>]*\.$')

    def test_the_address_is_good_for_sharing_only_and_under_any_current_key(self):
        client = self.daemon.new_client(key='second')
        status, _, body = client.post('/api/v1/share-address', {'name': 'My iPhone'})
        self.assertEqual((status, urlsplit(body['address']).path), (200, self.address('My iPhone')))
        self.assertTrue(body['message'])
        self.assertEqual(self.daemon.client.post('/api/v1/share-address', {'name': 'a'}).status, 401)
        for name in ('', 'a/b', '.', 'x' * 65, None, 5):
            self.assertEqual(client.post('/api/v1/share-address', {'name': name}).status, 400, name)
        link, path = tiktok_link(50).encode(), urlsplit(body['address']).path
        statuses = []
        for address in (path, self.address('My iPhone', 'second'), self.address('My iPhone', 'third'),
                        path.replace('My', 'Your'), path.swapcase().replace('SHARE', 'share'), '/share/My%20iPhone.'):
            statuses.append(self.daemon.client.post(address, link).status)
        self.assertEqual(statuses, [202, 200, 401, 401, 401, 401])
        signature = path.rpartition('.')[2]
        for other in ('/api/v1/history', '/metrics', f'/api/v1/status/{self.daemon.rows()[-1]["id"]}'):
            self.assertEqual(self.daemon.client.get(other, X_API_Key=signature).status, 401)
        for odd in (f'/nowhere/a.{signature}', f'/share/a%2E{signature}', f'/share/a.{signature}/x',
                    '/share/a.' + ''.join(f'%{ord(letter):02x}' for letter in signature)):
            self.daemon.client.get(odd)
        wait_until(lambda: '"GET /share/a.…' in self.daemon.log(), 5)
        self.assertNotIn(signature, self.daemon.log())
        self.assertNotIn(f'%{ord(signature[0]):02x}%', self.daemon.log())

    def test_whether_the_first_link_of_this_name_has_come(self):
        address, ask = self.address('asks'), self.daemon.client.get
        self.assertEqual(ask(address).status, 202)
        self.share(tiktok_link(60), name='asks')
        self.assertEqual((ask(address).status, ask(address).json.decode()),
                         (200, 'It works: a link to tiktok.com arrived from asks.'))
        self.assertEqual(ask(self.address('asks too')).status, 202)
        self.assertEqual(ask('/share/asks').status, 401)

    def test_the_same_link_within_ten_minutes_is_the_phone_trying_again(self):
        short, count = 'https://vm.tiktok.com/ZMagain/', lambda: len(self.daemon.rows())
        daemon, client = self.daemon, self.daemon.new_client(key='second')
        before = count()
        self.assertEqual([self.share(text)[0] for text in (short, f'Look: {short}')], [202, 200])
        self.assertEqual(self.share(short, name='another')[0], 202)
        daemon.restart()
        client.port = daemon.port
        self.assertEqual((self.share(short)[0], count()), (200, before + 2))
        first = daemon.rows("SELECT id FROM downloads WHERE client_id = 'phone' AND url = ?", short)[0]['id']
        client.post(f'/api/v1/download/{first}/cancel')
        self.assertEqual(daemon.row(first)['status'], 'failed')
        self.assertEqual((self.share(short)[0], daemon.row(first)['status']), (200, 'queued'))
        daemon.terminate()
        change_database(daemon.database, 'UPDATE downloads SET created_at = created_at - 601')
        daemon.start()
        asked = [daemon.client.get(self.address('another') + f'?within={seconds}').status for seconds in (600, 900)]
        self.assertEqual(asked, [202, 200])
        self.assertEqual((self.share(short)[0], count()), (202, before + 3))

    def test_several_links_are_all_saved(self):
        text = ' '.join(map(tiktok_link, (70, 71, 72)))
        self.assertRegex(self.share(text)[1], '^3 videos saved')
        self.assertEqual(self.share(text + ' https://example.com/x'), (200, '3 videos saved, 1 refused.'))
        self.assertEqual(len(self.daemon.rows("SELECT 1 FROM downloads WHERE url LIKE '%/video/7_'")), 3)

    def test_pages_of_other_sites_share_nothing(self):
        for headers in ({'Origin': 'https://evil.example'}, {'Origin': 'null'}, {'Sec_Fetch_Site': 'cross-site'}):
            for kind in ('text/plain', 'application/json', 'multipart/form-data; boundary=b'):
                self.assertEqual(self.share(tiktok_link(80), kind, **headers)[0], 403)

    @unittest.skipUnless(CHROMIUM and shutil.which('chromedriver'), 'chromium and chromedriver are not installed')
    def test_a_browser_on_another_site_shares_nothing(self):
        here, before = f'https://127.0.0.1:{self.daemon.port}', len(self.daemon.rows())
        other, browser = LocalServer(OtherSite, self), Browser()
        self.addCleanup(browser.close)
        target = here + self.address('browser')
        form = ('const form = document.createElement("form"); form.method = "POST"; form.enctype = arguments[1];'
                'form.action = arguments[0]; form.innerHTML = `<input name=text value="${arguments[2]}">`;'
                'document.body.append(form); form.submit()')
        fetch = ('return fetch(arguments[0], {method: "POST", mode: "no-cors", credentials: "include",'
                 'headers: {"Content-Type": arguments[1]}, body: arguments[2]}).then(() => 1, () => 0)')
        for host in ('127.0.0.1', 'localhost'):
            for script, kind in ((fetch, 'text/plain'), (form, 'text/plain'), (form, 'multipart/form-data')):
                browser.open(f'http://{host}:{other.server_port}/')
                browser.run(script, target, kind, tiktok_link(90))
        wait_until(lambda: self.daemon.log().count('"POST /share/browser.…" 403') == 6, 10, self.daemon.tail)
        self.assertEqual(len(self.daemon.rows()), before)
        browser.open(here + '/setup')
        browser.run(fetch, target, 'text/plain', tiktok_link(90))
        wait_until(lambda: len(self.daemon.rows()) == before + 1, 5)


class TestShareVideo(DaemonTest):
    """The finished file itself is the answer; or a sentence, when it takes too long."""
    hurry = {'VIDEO_SECONDS': 4.0}

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.daemon.download(cls.site.tiktok())  # yt-dlp is imported then

    def video(self, post: str, name: str = 'phone') -> Answer:
        return self.daemon.new_client().post(f'/share/{name}/video', post.encode())

    def test_the_file_itself_with_its_type_and_name(self):
        post = self.site.tiktok(title='Ein Kätzchen', size=70_000)
        answer = self.video(post)
        self.assertEqual((answer.status, answer.headers['Content-Type'], len(answer.json)), (200, 'video/mp4', 70_000))
        name = self.daemon.rows()[-1]['filename']
        self.assertEqual(answer.headers['Content-Disposition'], v.content_disposition(name))
        self.assertEqual(answer.json, (self.daemon.output / name).read_bytes())
        again = self.daemon.client.post('/share/phone', post.encode())
        self.assertEqual((again.status, again.json), (200, b'You already have this video.'))

    def test_a_failed_one_is_502_with_its_sentence(self):
        answer = self.video(self.site.tiktok(state='gone'))
        self.assertEqual((answer.status, answer.headers['Content-Type']), (502, 'text/plain; charset=utf-8'))
        self.assertEqual(answer.json.decode(), self.daemon.rows()[-1]['error_message'])

    def test_one_that_is_deleted_meanwhile_is_404(self):
        busy, answers = self.site.tiktok(hold_at=20_000), []
        self.daemon.submit(busy)
        busy.media[0].wait_held()
        thread = threading.Thread(target=lambda: answers.append(self.video(self.site.tiktok())))
        thread.start()
        wait_until(lambda: self.daemon.rows()[-1]['status'] == 'queued')
        id = self.daemon.rows()[-1]['id']
        self.assertEqual(self.daemon.client.delete(f'/api/v1/download/{id}').status, 200)
        thread.join()
        busy.media[0].release()
        self.assertEqual((answers[0].status, answers[0].json), (404, b'There is no such download.'))

    def test_eight_wait_and_the_ninth_is_told_at_once(self):
        post = self.site.tiktok(hold_at=20_000)

        def ask(_) -> float:
            began = time.monotonic()
            self.assertEqual(self.video(post).status, 202)
            return time.monotonic() - began
        with ThreadPoolExecutor(9) as pool:
            ninth, *eight = sorted(pool.map(ask, range(9)))
        self.assertLess(ninth, 3)
        self.assertTrue(all(3.9 < took < fair(6) for took in eight), eight)
        post.media[0].release()
        self.assertEqual(self.video(post).status, 200)


class TestSetupPage(unittest.TestCase):
    """The set-up page for each way to come to it."""
    facts = {'base_url': 'https://pi.local:8443', 'addresses': 'https://192.168.1.5:8443', 'has_keys': 'yes',
             'fingerprint': 'AB:CD', 'host': '<pi>', 'qr_svg': '<svg/>', 'secure': 'yes',
             'shortcut_url': 'https://www.icloud.com/shortcuts/1'}

    def test_facts_are_escaped_and_every_mark_is_filled_in(self):
        for change in ({}, {'secure': ''}, {'fingerprint': ''}, {'has_keys': ''}):
            page = v.setup_page({**self.facts, **change})
            self.assertNotRegex(page, '{{|<!--|<pi>')
            self.assertIn('&lt;pi&gt;', page)

    def test_never_a_key_over_plain_http(self):
        page = v.setup_page({**self.facts, 'secure': ''})
        self.assertNotRegex(page, 'id="(key|share)"')
        self.assertIn('"https://pi.local:8443/icon.png"', page)
        self.assertIn('ca.mobileconfig', page)

    def test_an_owners_own_certificate_needs_no_profile(self):
        self.assertNotRegex(v.setup_page({**self.facts, 'fingerprint': ''}), r'ca\.mobileconfig|ca\.crt')

    def test_nothing_is_inline_and_data_never_becomes_markup(self):
        for page in (v.PAGE_HTML, v.setup_page(self.facts)):
            self.assertNotRegex(page, r'(?i)<style|\sstyle=|\son\w+=|<script(?! type="module" src="\w+\.js"></script>)')
        self.assertNotRegex(v.PAGE_JS, r'innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(')


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: Optional[str]) -> unittest.TestSuite:
    return Classes(tests)


if __name__ == '__main__':
    unittest.main()
