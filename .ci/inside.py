"""Runs as root inside the booted container of .ci/nspawn, after the first ./install.sh.

    python3 .ci/inside.py 1        the service at work, kill -9, upgrade; then the power is cut
    python3 .ci/inside.py 2        what the next boot finds; other folders, removal

The stand-in and the client are those of the tests (harness.py); what is tested is the installed
service, in its sandbox, under a systemd that booted this system.
"""
import contextlib
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))
import harness as t  # noqa: E402

CONFIG, SECRETS = Path('/etc/videoserver/config.ini'), Path('/etc/videoserver/environment')
STATE, PROGRAM = Path('/var/lib/videoserver'), Path('/opt/videoserver/videoserverd.py')
CA = STATE / 'certs/ca.crt'
SITE_CA = Path('/etc/videoserver/stand-in.pem')  # /tmp is another one inside the service
LEFT = Path('/root/left.json')  # what the first boot leaves for the second
NOT_OURS = ('/proc', '/sys', '/dev', '/run', '/tmp', '/var/tmp', '/root', '/var/log', '/var/cache', '/var/lib/systemd',
        '/var/lib/apt', '/var/lib/dpkg', '/etc/.pwd.lock',  # change by themselves
        '/srv', '/home', '/media')  # the owner's folders, which stay


def say(text):
    print(text, flush=True)


def run(*words, fails=False):
    """What the command says; AssertionError unless it succeeds (or fails, where it should)."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                          encoding='utf-8', cwd=TOP)
    assert (done.returncode != 0) == fails, f'{words} ended with {done.returncode}:\n{done.stdout}'
    return done.stdout


def install(*words):
    """install.sh; what it said."""
    return run('./install.sh', *words)


def show(name):
    """A property of the service."""
    return run('systemctl', 'show', '--value', '-p', name, 'videoserver').strip()


def client(port=8443, **options):
    """A phone that trusts our CA and nothing else."""
    return t.Client(port, CA, **options)


def health():
    status, _, body = client().get('/api/v1/health')
    assert status == 200, (status, body)
    return body


def post(url):
    """The id of a link that the service has acknowledged."""
    status, _, body = client().post('/api/v1/download', {'url': str(url), 'client_id': 'phone'})
    assert status == 202, (status, body)
    return body['download_id']


def row(id):
    status, _, body = client().get(f'/api/v1/status/{id}')
    assert status == 200, (status, body)
    return body


def completed(*ids, seconds=60):
    """Their rows, once all are completed."""
    def done():
        rows = [row(id) for id in ids]
        assert not [r for r in rows if r['status'] == 'failed'], rows
        return rows if all(r['status'] == 'completed' for r in rows) else None
    return t.wait_until(done, seconds, lambda: [row(id) for id in ids])


def answers(seconds=30):
    """Waits until the service answers again."""
    def asked():
        with contextlib.suppress(OSError):
            return health()
    return t.wait_until(asked, seconds, 'the service answers')


def configure(**sections):
    """Changes config.ini as its owner would, line by line."""
    text = CONFIG.read_text()
    for section, keys in sections.items():
        for key, value in keys.items():
            head, mark, rest = text.partition(f'[{section}]')
            text = head + mark + re.sub(rf'(?m)^{key} *=.*$', f'{key} = {value}', rest, count=1)
    CONFIG.write_text(text)


def let_in(site):
    """Downloads come from the stand-in from now on; a restart, since the environment changes too."""
    SITE_CA.write_bytes(Path(site.ca_bundle).read_bytes())
    SECRETS.write_text(f'SSL_CERT_FILE={SITE_CA}\n')
    configure(downloader={'proxy': site.proxy, 'auto_update': 'off'}, downloads={'retry_delays': '1'})
    run('systemctl', 'restart', 'videoserver')
    answers()


def check_film(file):
    """It has picture and sound, as ffprobe sees it."""
    kinds = run('ffprobe', '-v', 'error', '-show_entries', 'stream=codec_type', '-of', 'csv=p=0', str(file)).split()
    assert {'audio', 'video'} <= set(kinds), (file, kinds)  # libgcrypt may have a word to say too


def files():
    """Every file and folder of the system but those that any system changes by itself."""
    found = set()
    for folder, folders, names in os.walk('/'):
        folders[:] = [name for name in folders if os.path.join(folder, name) not in NOT_OURS]
        found.update(os.path.join(folder, name) for name in folders + names)
    return {path for path in found if path not in NOT_OURS and '__pycache__' not in path}


# -- the first boot


def check_fresh_install():
    """The service that ./install.sh left: enabled, answering by each name, hardened, not root."""
    said = Path('/root/install.log').read_text()
    say(said.strip())
    assert 'healthy' in said, said
    assert run('systemctl', 'is-enabled', 'videoserver').strip() == 'enabled'
    assert show('ActiveState') == 'active' and show('NRestarts') == '0'
    owner = Path(f'/proc/{show("MainPID")}').owner()
    assert owner == 'videoserver', owner
    for name in ('localhost', '127.0.0.1', socket.gethostname() + '.local'):
        with socket.create_connection(('127.0.0.1', 8443)) as sock:
            ssl.create_default_context(cafile=str(CA)).wrap_socket(sock, server_hostname=name).close()
    for secret in (CA.parent / 'ca.key', CA.parent / 'server.key', SECRETS):
        assert secret.stat().st_mode & 0o077 == 0, secret
    exposure = float(re.search(r'Overall exposure level for videoserver.service: ([\d.]+)',
                               run('systemd-analyze', 'security', '--no-pager', 'videoserver'))[1])
    assert exposure <= 1.5, exposure
    process = Path(f'/proc/{show("MainPID")}')
    assert list((PROGRAM.parent / '__pycache__').glob('videoserverd.*.pyc')), 'install.sh leaves the compiled form'
    idle = int(re.search(r'VmRSS:\s+(\d+)', (process / 'status').read_text())[1]) / 1024
    say(f'ok: runs as videoserver, exposure {exposure}, {idle:.1f} MB, answers by every name with only our CA trusted')


def check_command():
    """`videoserverd` does what it says, as root and as anybody who may."""
    assert 'queued' in run('videoserverd', 'list')
    said = run('videoserverd', 'doctor')
    assert 'Nothing is wrong.' in said, said
    run('videoserverd', 'backup', str(STATE / 'copy.db'))
    assert (STATE / 'copy.db').stat().st_uid == STATE.stat().st_uid
    say('ok: videoserverd list, doctor (nothing is wrong), backup')


def check_impersonation():
    """impersonate=on and a restart: curl_cffi is fetched, tried and put beside yt-dlp."""
    configure(downloader={'impersonate': 'on'})
    run('systemctl', 'restart', 'videoserver')
    answers()
    t.wait_until(lambda: list((STATE / 'vendor').glob('2*/curl-*')) or health()['problems'], 180)
    assert not health()['problems'], health()
    say('ok: impersonate=on fetches curl_cffi')


def check_downloads(site):
    """A post, asked for as a browser does, and a film whose halves ffmpeg has to merge, inside the sandbox."""
    post_row, = completed(post(site.tiktok(title='First light')))
    assert any('Sec-Ch-Ua' in request.headers for request in site.requests)
    check_film(STATE / 'videos' / post_row['filename'])
    configure(security={'allowed_domains': '*', 'allow_private_targets': 'on'})
    before = show('MainPID')
    run('systemctl', 'reload', 'videoserver')
    answers()
    merged, = completed(post(site.direct('dash')))
    check_film(STATE / 'videos' / merged['filename'])
    assert show('MainPID') == before and show('NRestarts') == '0'
    say('ok: a post, and a film merged by ffmpeg, after a reload that kept the process')


def check_kill(site):
    """kill -9: systemd brings it back, the queue is as it was."""
    held = site.tiktok(size=400_000, hold_at=100_000)
    ids = [post(held), post(site.tiktok()), post(site.tiktok())]
    held.media[0].wait_held()
    os.kill(int(show('MainPID')), 9)
    t.wait_until(lambda: show('NRestarts') == '1' and show('ActiveState') == 'active', 30, 'systemd restarts it')
    answers()
    assert {row(id)['status'] for id in ids} <= {'queued', 'downloading', 'completed'}
    held.media[0].release()
    completed(*ids)
    say('ok: kill -9 in a download: back by systemd, the queue intact, all of it completed')


def check_watchdog():
    """A process that no longer moves is killed and started anew."""
    folder = Path('/run/systemd/system/videoserver.service.d')
    folder.mkdir(parents=True)
    (folder / '90-test.conf').write_text('[Service]\nWatchdogSec=3\n')
    run('systemctl', 'daemon-reload')
    run('systemctl', 'restart', 'videoserver')
    time.sleep(5)  # it outlives its watchdog while it is well
    assert show('NRestarts') == '0'
    os.kill(int(show('MainPID')), 19)
    t.wait_until(lambda: show('NRestarts') == '1' and show('ActiveState') == 'active', 60, 'the watchdog strikes')
    (folder / '90-test.conf').unlink()
    folder.rmdir()
    run('systemctl', 'daemon-reload')
    run('systemctl', 'restart', 'videoserver')
    answers()
    say('ok: a process that is stopped is killed by the watchdog and comes back')


def check_upgrade():
    """The second run: a new program, and nothing else."""
    source = TOP / 'videoserverd.py'
    source.write_text(source.read_text().replace(f"VERSION = '{t.v.VERSION}'", "VERSION = '99.0.0'"))
    kept = {path: path.read_bytes() for path in (CONFIG, SECRETS, CA, CA.parent / 'server.crt')}
    total = client().get('/api/v1/history').json['total']
    said = install()
    assert f'keeps {CONFIG}' in said and '99.0.0' in said, said
    assert health()['version'] == '99.0.0'
    assert kept == {path: path.read_bytes() for path in kept}
    history = client().get('/api/v1/history').json
    assert history['total'] == total > 4, (total, history)
    say('ok: the second run upgrades, and keeps config, keys, certificates and downloads')


def first_boot():
    check_fresh_install()
    check_command()
    check_impersonation()
    with t.Standin() as site:
        let_in(site)
        check_downloads(site)
        check_kill(site)
        check_watchdog()
        check_upgrade()
        held = site.tiktok(size=400_000, hold_at=100_000)
        ids = [post(held), post(site.tiktok())]
        held.media[0].wait_held()
        posts = [(str(post), post.id) for post in (held, site.tiktok())]
        ids.append(post(posts[1][0]))
        LEFT.write_text(json.dumps({'ids': ids, 'posts': posts}))
        configure(downloads={'retry_delays': '600'})  # the next boot has no stand-in at first: no try may be wasted
    say('cuts the power')


# -- the second boot


def check_after_power_cut():
    """It is there after the boot, with every link that was acknowledged."""
    answers(60)
    for id in json.loads(LEFT.read_text())['ids']:
        assert row(id)['status'] in ('queued', 'downloading'), row(id)
    say('ok: after the power cut it starts with the system, with all that was acknowledged')


def check_folder(site, folder, *words):
    """Videos land in the chosen folder; the rest of the disk stays closed."""
    install('--output', folder, *words)
    answers()
    done, = completed(post(site.direct('dash')))
    check_film(Path(folder) / done['filename'])
    say(f'ok: --output {folder} {" ".join(words)}')


def check_unplugged(site):
    """A disk that is taken away pauses the queue; put back, while the service runs, it goes on."""
    disk = Path('/media/disk')
    disk.mkdir()
    run('mount', '-t', 'tmpfs', 'none', str(disk))
    check_folder(site, f'{disk}/videos')
    run('umount', '--lazy', str(disk))
    run('systemctl', 'restart', 'videoserver')
    answers()
    id = post(site.direct('mp4'))
    t.wait_until(lambda: health()['paused'], 30, 'it pauses')
    run('mount', '-t', 'tmpfs', 'none', str(disk))
    run('install', '-d', '-o', STATE.owner(), f'{disk}/videos')
    (disk / 'videos' / t.v.MARKER).touch()
    completed(id, seconds=120)
    say('ok: an output disk that is unplugged pauses the queue; plugged in, it goes on by itself')


def check_relocate(site):
    """The videos move to another disk: copied as the service's user, and its sandbox lets it write there."""
    done, = completed(post(site.tiktok()))
    disk = Path('/media/new disk')
    disk.mkdir()
    run('mount', '-t', 'tmpfs', 'none', str(disk))
    run('videoserverd', 'relocate', f'{disk}/videos')
    answers()
    assert (disk / 'videos' / done['filename']).owner() == STATE.owner() != 'root'
    assert not health()['paused'], health()
    again, = completed(post(site.tiktok()))
    assert (disk / 'videos' / again['filename']).exists()
    status, _, body = client().get('/' + row(done['download_id'])['files'][0]['path'])
    assert status == 200 and body == (disk / 'videos' / done['filename']).read_bytes()
    say('ok: relocate to another disk; old and new files are served from there')


def check_low_port():
    """--port 443 is served, without root."""
    install('--port', '443')
    status, _, body = client(443).get('/api/v1/health')
    assert status == 200, body
    assert Path(f'/proc/{show("MainPID")}').owner() == STATE.owner() != 'root'
    install('--port', '8443')
    assert health()
    say('ok: --port 443, and back')


def check_keys():
    """API keys from the environment file: asked for by the service, known to the command."""
    with SECRETS.open('a') as file:
        file.write('VIDEOSERVER_API_KEYS="top secret"\n')
    run('systemctl', 'restart', 'videoserver')
    answers()
    assert client().get('/api/v1/history').status == 401
    assert client(key='top secret').get('/api/v1/history').status == 200
    run('videoserverd', 'add', 'https://www.tiktok.com/@a/video/7000000000000000001')
    assert 'top secret' not in run('journalctl', '--no-pager', '-u', 'videoserver')
    say('ok: API keys, and the command line knows them')


def check_uninstall():
    """What stays is what it says, and a new installation takes it up."""
    id = client(key='top secret').get('/api/v1/history').json['downloads'][0]['download_id']
    said = install('--uninstall')
    assert f'keeps /etc/videoserver, {STATE}' in said, said
    assert not PROGRAM.exists() and CONFIG.exists() and (STATE / 'data/downloads.db').exists()
    assert 'videoserver.service' not in run('systemctl', 'list-unit-files', '--no-pager')
    install()
    assert client(key='top secret').get(f'/api/v1/status/{id}').status == 200
    say('ok: --uninstall keeps configuration and data; the next installation takes them up')


def check_purge():
    """--purge leaves nothing; everything that install.sh writes lies below a path that it names."""
    kept = install('--uninstall', '--purge')
    assert '/media/new disk/videos' in kept, kept
    bare = files()
    assert not [path for path in bare if 'videoserver' in path], [path for path in bare if 'videoserver' in path]
    assert 'videoserver' not in Path('/etc/passwd').read_text()
    said = install()
    named = re.findall(r'^writes (/.+)', said, re.M)
    links = {'/etc/systemd/system/multi-user.target.wants/videoserver.service'}  # systemctl enable
    unnamed = [path for path in files() - bare - links if not any(
        path == name or path.startswith(name + '/') or name.startswith(path + '/') for name in named)]
    assert not unnamed, unnamed
    install('--uninstall', '--purge')
    assert files() == bare, files() ^ bare
    say('ok: every path that is written is named; --uninstall --purge leaves nothing')


LAUNCHCTL = """#!/usr/bin/python3
# As much of launchctl as install.sh asks for: one job, which is a process group.
import os, plistlib, signal, subprocess, sys
state, verb = '/root/mac/job', sys.argv[1]
group = int(open(state).read()) if os.path.exists(state) else None
if verb == 'bootstrap':
    job = plistlib.load(open(sys.argv[3], 'rb'))
    log = open(job['StandardOutPath'], 'ab')
    child = subprocess.Popen(['runuser', '-u', job['UserName'], '--', *job['ProgramArguments']], stdout=log, stderr=log,
                             stdin=subprocess.DEVNULL, cwd=job['WorkingDirectory'], start_new_session=True,
                             env={'PATH': '/usr/bin:/bin:/usr/sbin:/sbin'})
    open(state, 'w').write(str(child.pid))
elif verb in ('bootout', 'print'):
    try:
        os.killpg(group, signal.SIGTERM if verb == 'bootout' else 0)
    except (TypeError, ProcessLookupError):
        sys.exit(1)
"""


def check_mac():
    """The ways of a Mac, as far as they can be gone without one: uname and launchctl are stand-ins."""
    folder = Path('/root/mac')
    folder.mkdir()
    for name, text in (('uname', '#!/bin/sh\necho Darwin\n'), ('xcode-select', '#!/bin/sh\n'),
                       ('launchctl', LAUNCHCTL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    os.environ.update(PATH=f'{folder}:{os.environ["PATH"]}', SUDO_USER='pi')
    for _ in range(2):  # an installation, an upgrade
        said = install()
        assert 'writes /Library/LaunchDaemons/com.videoserver.download.plist' in said and 'healthy' in said, said
        owners = [path.owner() for path in (CONFIG, STATE, Path('/home/pi/Movies/VideoServer'))]
        assert owners == ['root', 'pi', 'pi'], said
        assert ' ok  server' in run('videoserverd', 'doctor')
    said = install('--uninstall', '--purge')
    assert not Path('/Library/LaunchDaemons/com.videoserver.download.plist').exists() and not STATE.exists(), said
    run(str(folder / 'launchctl'), 'print', fails=True)
    say('ok: the ways of a Mac, with stand-ins for uname and launchctl')


def second_boot():
    check_after_power_cut()
    left = json.loads(LEFT.read_text())
    with t.Standin() as site:
        for _, id in left['posts']:
            site.tiktok(id=id)
        let_in(site)
        completed(left['ids'][0], left['ids'][2])
        say('ok: what was cut off is completed')
        check_folder(site, '/srv/clips')
        run('useradd', '--create-home', 'pi')
        check_folder(site, '/home/pi/Videos', '--user', 'pi')
        check_unplugged(site)
        check_relocate(site)
    check_low_port()
    check_keys()
    check_uninstall()
    check_purge()
    check_mac()


if __name__ == '__main__':
    {'1': first_boot, '2': second_boot}[sys.argv[1]]()
