#!/bin/sh
# install.sh: installs videoserverd as a service, upgrades it when run again, or removes it.
#
#   sudo ./install.sh                         install, or upgrade and restart
#   sudo ./install.sh --output /media/disk/videos --user pi
#   sudo ./install.sh --uninstall             remove the program, keep configuration and data
#   ./install.sh --dry-run                    only say what would be done
#
# For Debian, Raspberry Pi OS and the like (systemd), and for Macs (launchd). It touches
#
#   /opt/videoserver                   the program, one file
#   /etc/videoserver                   config.ini and environment (API keys); yours once written
#   /var/lib/videoserver               database, certificates, yt-dlp, log, and the videos
#   /usr/local/bin/videoserverd        the command: that file, as its user, with that config
#   /etc/systemd/system/videoserver.service and videoserver.service.d/10-install.conf, or
#   /Library/LaunchDaemons/com.videoserver.download.plist
#   the user videoserver (not on a Mac), and Debian's packages python3, openssl, ffmpeg,
#   qrencode, avahi-daemon and ca-certificates where they are missing.
#
# It prints each path that it writes.

set -eu
umask 022
PATH=$PATH:/usr/sbin:/sbin:/usr/local/bin:/opt/homebrew/bin  # su and sudo may leave these out

name=videoserver
label=com.videoserver.download
program=/opt/$name/videoserverd.py
config=/etc/$name/config.ini
secrets=/etc/$name/environment
state=/var/lib/$name
command=/usr/local/bin/videoserverd
unit=/etc/systemd/system/$name.service
dropin=$unit.d/10-install.conf
plist=/Library/LaunchDaemons/$label.plist
here=$(cd "$(dirname "$0")" && pwd)
system=$(uname -s)

action=install service=yes dry='' purge='' user='' output='' port='' python=''

say() { printf '%s\n' "$*"; }

die() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

# doing VERB WHAT…: "writes /opt/…", or with --dry-run "would write /opt/…".
doing() {
    verb=$1 && shift
    if [ "$dry" ]; then say "would $verb $*"; else say "${verb}s $*"; fi
}

# need COMMAND WHAT-FOR
need() { command -v "$1" >/dev/null 2>&1 || die "$1 is missing: $2"; }

# ensure STEP…: runs it or fails; --dry-run only prints it.
ensure() {
    if [ "$dry" ]; then say "would run $*"; else "$@" || die "this step failed: $*"; fi
}

# put PATH MODE: writes standard input beside PATH and renames it, so that a power cut leaves old or new.
put() {
    doing write "$1"
    if [ "$dry" ]; then cat >/dev/null && return; fi
    mkdir -p "$(dirname "$1")"
    cat >"$1.new"
    chmod "$2" "$1.new"
    mv -f "$1.new" "$1"
}

# drop PATH…: removes what exists.
drop() {
    for path in "$@"; do
        if [ -e "$path" ]; then
            doing remove "$path"
            [ "$dry" ] || rm -rf "$path"
        fi
    done
}

as_user() {
    if command -v runuser >/dev/null 2>&1; then
        (unset HOME && exec runuser -u "$user" -- "$@")
    else
        sudo -u "$user" -- "$@"
    fi
}

usage() {
    cat <<END
usage: ./install.sh [--user NAME] [--output DIR] [--port N] [--no-service] [--dry-run]
       ./install.sh --uninstall [--purge] [--dry-run]

  --user NAME     run as NAME (default: $name; on a Mac: you)
  --output DIR    folder for the videos (default: $state/videos; on a Mac: ~/Movies/VideoServer)
  --port N        TCP port (default: 8443)
  --no-service    install, but start nothing
  --dry-run       say what would be done, change nothing
  --uninstall     remove the program; configuration, database, certificates and videos stay
  --purge         with --uninstall: remove those too
END
}

parse_arguments() {
    while [ $# -gt 0 ]; do
        case $1 in
            --user | --output | --port) [ "${2:-}" ] || die "$1 needs a value; see --help" ;;
        esac
        case $1 in
            --user) user=$2 && shift ;;
            --output) output=$2 && shift ;;
            --port) port=$2 && shift ;;
            --no-service) service='' ;;
            --dry-run) dry=yes ;;
            --uninstall) action=uninstall ;;
            --purge) purge=yes ;;
            -h | --help) usage && exit 0 ;;
            *) die "$1 is unknown; see --help" ;;
        esac
        shift
    done
}

check_arguments() {
    [ ! "$purge" ] || [ "$action" = uninstall ] || die '--purge needs --uninstall'
    case $user in
        root) die '--user root: a program that opens files from the internet must not run as root' ;;
        -* | *[!A-Za-z0-9._-]*) die "--user $user: not the name of a user" ;;
    esac
    case $port in
        '') ;;
        *[!0-9]* | 0* | ??????* | 6553[6-9] | 655[4-9]? | 65[6-9]?? | 6[6-9]??? | [7-9]????)
            die "--port $port: a number from 1 to 65535" ;;
    esac
    line_break='
'
    case $output in
        *[\"\\%:\;\#]* | *"$line_break"*) die "--output $output: a path without \" \\ % : ; # and line breaks" ;;
        '' | /*) ;;
        *) output=$PWD/$output ;;
    esac
    [ "$output" = / ] || output=${output%/}
}

# ---------- requirements ----------

check_system() {
    for file in videoserverd.py config.ini "$name.service" "$label.plist"; do
        [ -f "$here/$file" ] || die "$here/$file is missing: copy the whole folder, not this script alone"
    done
    case $system in
        Linux | Darwin) ;;
        *) die "this is $system: here, run the program itself: python3 videoserverd.py" ;;
    esac
    if [ "$system" = Linux ] && [ "$service" ] && [ ! -d /run/systemd/system ]; then
        say 'systemd is not running here: continuing as with --no-service'
        service=''
    fi
}

# The Debian packages whose commands are missing; python3-minimal has the command, but not the library.
missing_packages() {
    python3 -c 'import shlex, sqlite3, ssl' 2>/dev/null || printf 'python3 '
    while read -r tool package; do
        command -v "$tool" >/dev/null 2>&1 || printf '%s ' "$package"
    done <<END
openssl openssl
ffmpeg ffmpeg
qrencode qrencode
avahi-daemon avahi-daemon
update-ca-certificates ca-certificates
END
}

ensure_packages() {
    if [ "$system" = Darwin ]; then
        for tool in ffmpeg qrencode; do
            command -v $tool >/dev/null || say "continuing without $tool; to get it:  brew install $tool"
        done
        return
    fi
    packages=$(missing_packages)
    [ "$packages" ] || return 0
    command -v apt-get >/dev/null 2>&1 || { say "missing, and there is no apt-get to install it: $packages" && return; }
    doing install "the packages $packages"
    [ "$dry" ] || apt_get update || say 'the list of packages could not be updated; trying the old one'
    # shellcheck disable=SC2086 # each word is a package
    [ "$dry" ] || apt_get install $packages || say "apt-get failed; still missing: $(missing_packages)"
}

apt_get() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
        --no-install-recommends -y "$@" </dev/null >/dev/null
}

# The first Python that the service's user can run: 3.11 or newer, as yt-dlp now needs, else 3.9 or newer.
ensure_python() {
    for least in 11 9; do
        for python in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9; do
            python=$(command -v "$python") && python_serves "$least" && return
        done
    done
    python=/usr/bin/python3
    [ "$dry" ] || die "no Python 3.9 or newer that $user can run; Debian: apt-get install python3, Mac: brew install python"
}

# python_serves MINOR: is $python 3.MINOR or newer, with what the program needs?
python_serves() {
    # On a Mac without the command line tools, this file only opens a dialog.
    [ "$system $python" != 'Darwin /usr/bin/python3' ] || xcode-select -p >/dev/null 2>&1 || return 1
    set -- "$python" -I -c "import shlex, sqlite3, ssl, sys; sys.exit(sys.version_info < (3, $1))"
    if [ "$dry" ]; then "$@" 2>/dev/null; else as_user "$@" 2>/dev/null; fi
}

# ---------- user, folders, configuration ----------

owner_of() { stat -c %U "$1" 2>/dev/null || stat -f %Su "$1"; }  # GNU's, BSD's

# An upgrade keeps the user: whoever owns the data.
choose_user() {
    [ "$user" ] || [ ! -d "$state" ] || user=$(owner_of "$state")
    [ "$user" ] && [ "$user" != root ] && return
    user=$name
    [ "$system" != Darwin ] || user=${SUDO_USER:-$(id -un)}
    [ "$user" != root ] || die 'choose the user to run as: --user NAME'
}

ensure_user() {
    id "$user" >/dev/null 2>&1 && return
    [ "$system" = Linux ] || die "there is no user $user"
    doing add "the user $user"
    ensure useradd --system --user-group --home-dir "$state" --no-create-home --shell /usr/sbin/nologin \
        --comment 'videoserverd, added by install.sh' "$user"
}

# Creates the data folder, owned by the user. Root makes nothing below it: a link there may lead anywhere.
ensure_state() {
    [ -d "$state" ] || doing write "$state"
    [ "$dry" ] || mkdir -p "$state"
    [ "$dry" ] || [ "$(owner_of "$state")" = "$user" ] || chown -R "$user:$(id -gn "$user")" "$state"
}

ensure_config() {
    if [ -f "$config" ]; then
        doing keep "$config"
    else
        sed -E "s#^(cert_file|key_file|ca_file|path|ytdlp_directory|file) = #&$state/#" "$here/config.ini" |
            with_setting downloads output_directory "$(default_output)" |
            with_setting logging file "$(default_log)" | put "$config" 640
    fi
    [ ! "$output" ] || change_config downloads output_directory "$output"
    [ ! "$port" ] || change_config server port "$port"
    [ -f "$secrets" ] || put "$secrets" 600 <<'END'
# Secrets of videoserverd, one per line, in effect after  sudo systemctl restart videoserver
# Without an API key, anyone on your network may use it.
#VIDEOSERVER_API_KEYS=a-long-random-word
#AWS_ACCESS_KEY_ID=
#AWS_SECRET_ACCESS_KEY=
END
    [ "$dry" ] && return
    chown "$user" "$secrets"
    chown "root:$(id -gn "$user")" "$config"  # the user must not change what root acts on
    chmod 640 "$config"
}

# On a Mac ~/Movies: a background service may not use ~/Downloads, ~/Documents or ~/Desktop.
default_output() {
    if [ "$system" = Darwin ]; then eval "echo ~$user/Movies/VideoServer"; else say "$state/videos"; fi
}

# With systemd the log is in the journal, so an SD card is written once; elsewhere it is a file.
default_log() { [ "$system$service" = Linuxyes ] || say "$state/logs/server.log"; }

# change_config SECTION KEY VALUE: changes one line, as the command line asks.
change_config() {
    doing set "$2 = $3 in $config"
    [ "$dry" ] && return
    with_setting "$@" <"$config" >"$config.new"
    mv -f "$config.new" "$config"
}

# with_setting SECTION KEY VALUE: standard input with that key changed or added.
with_setting() {
    section=$1 key=$2 value=$3 awk '
        function finish() { if (here && !done) print line; done = done || here }
        BEGIN { key = ENVIRON["key"]; line = key " = " ENVIRON["value"]; head = "[" ENVIRON["section"] "]" }
        /^\[/ { finish(); here = index($0, head) == 1 }
        here && $0 ~ "^" key "[ \t]*[=:]" { finish(); next }
        { print }
        END { if (!done && !here) print head; here = 1; finish() }'
}

# ask_config PYTHON: runs it with `config`, as the installed program reads file and environment.
ask_config() {
    as_user "$python" -IBc "
import json, os, ssl, sys, time, urllib.request
from pathlib import Path
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import videoserverd
lines = [line.strip().partition('=') for line in open(sys.argv[3]) if line.strip()[:1] not in ('', '#')]
try:
    config = videoserverd.load_config(Path(sys.argv[2]), {name: value.strip('\"') for name, _, value in lines})
except videoserverd.Trouble as trouble:
    sys.exit(f'install.sh: {trouble}')
$1" "$program" "$config" "$secrets" </dev/null
}

# The folder for the videos: made by the user if it is new, and by root only where --output says so.
ensure_output() {
    asked=$output
    if [ "$dry" ]; then
        output=${output:-$(default_output)}
    else
        output=$(ask_config 'print(config.downloads.output_directory)') || exit 1
    fi
    [ -d "$output" ] || doing write "$output"
    [ "$dry" ] || [ -d "$output" ] || as_user mkdir -p "$output" 2>/dev/null || {
        [ "$asked" ] && mkdir -p "$output" && chown -h "$user:$(id -gn "$user")" "$output"
    } || die "$user cannot make $output: run  sudo install -d -o $user '$output'"
    [ "$dry" ] || as_user test -w "$output" || die "$user cannot write to $output: \
choose another --output or --user, or run  sudo chown $user '$output'"
}

# ---------- program and service ----------

install_program() {
    [ "$dry" ] || "$python" -IB "$here/videoserverd.py" --version >/dev/null ||
        die "$here/videoserverd.py does not run: copy it again"
    put "$program" 755 <"$here/videoserverd.py"
    # Compiled here, as the service may not write there; saves it 15 MB and a second.
    doing write "$(dirname "$program")/__pycache__"
    ensure "$python" -I -m py_compile "$program"
    wrapper | put "$command" 755
}

wrapper() {
    cat <<END
#!/bin/sh
# videoserverd: runs the installed program as its user with its configuration. Written by install.sh.
set -eu
user='$user'
PATH=\$PATH:/usr/local/bin:/opt/homebrew/bin
if [ "\${1:-}" = relocate ] && [ "\$(id -u)" = 0 ]; then
    case \${2:-} in
        --from=*) ;;
        *) user=root ;;  # it changes the configuration and the service
    esac
fi
if [ "\$(id -un)" != "\$user" ]; then
    [ "\$(id -u)" = 0 ] || exec sudo -- "\$0" "\$@"
    if command -v runuser >/dev/null 2>&1; then exec runuser -u "\$user" -- "\$0" "\$@"; fi
    exec sudo -u "\$user" -- "\$0" "\$@"
fi
unset HOME
export USER="\$user" LOGNAME="\$user"
while IFS= read -r line || [ "\$line" ]; do
    case \$line in
        [A-Z]*=\\"*\\") value=\${line#*=\\"} && export "\${line%%=*}=\${value%\\"}" ;;
        [A-Z]*=*) export "\$line" ;;
    esac
done <$secrets
exec '$python' -I $program --config $config "\$@"
END
}

running() {
    case $system in
        Linux) [ "$service" ] && systemctl --quiet is-active "$name" ;;
        Darwin) launchctl print "system/$label" >/dev/null 2>&1 ;;
    esac
}

# Makes certificate, database and yt-dlp before the first start, so that problems show.
ensure_provisioned() {
    running && return
    [ ! "$dry" ] || doing run "videoserverd setup as $user"
    [ "$dry" ] || "$command" setup ||
        say 'continuing anyway: the server tries again by itself what can wait'
}

install_service() {
    case $system in
        Linux) install_systemd ;;
        Darwin) install_launchd ;;
    esac
}

install_systemd() {
    put "$unit" 644 <"$here/$name.service"
    drop_in | put "$dropin" 644
    ensure systemctl daemon-reload
    ensure systemctl --quiet enable "$name"
    doing restart "$name"
    [ "$dry" ] || systemctl restart "$name" || {
        journalctl -n 20 --no-pager -u "$name" >&2
        die 'the service does not start; the end of its log is above'
    }
}

# What differs here from the unit file.
drop_in() {
    cat <<END
# Written by install.sh at each run. For your own changes: sudo systemctl edit $name
[Service]
User=$user
ExecStart=
ExecStart=$python -I $program --config $config
END
    quoted=$(say "$output" | sed 's/[\\"]/\\&/g; s/%/%%/g')  # as systemd.syntax(7) wants; config.ini may name any path
    case $output in
        "$state"/*) ;;
        /home/* | /root/*) say "BindPaths=\"-$quoted\"" ;;  # the rest of the home folders stays hidden
        *) say "ReadWritePaths=\"-$quoted\"" ;;
    esac
    [ "$dry" ] || ask_config 'sys.exit(0 < config.server.port < 1024)' || cat <<END
# A port below 1024 needs this capability.
AmbientCapabilities=CAP_NET_BIND_SERVICE
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
PrivateUsers=no
END
}

# launchd returns before the old process is gone, and accepts no new one until then.
stop_launchd() {
    running || return 0
    doing stop "$label"
    [ "$dry" ] && return
    launchctl bootout "system/$label" || true
    tries=40
    while running && [ "$tries" -gt 0 ]; do
        tries=$((tries - 1))
        sleep 1
    done
}

install_launchd() {
    [ "$dry" ] || as_user mkdir -p "$state/logs"
    sed "/<key>UserName</{n;s#>.*<#>$user<#;}" "$here/$label.plist" | put "$plist" 644
    stop_launchd
    ensure launchctl enable "system/$label"
    ensure launchctl bootstrap system "$plist"
}

# Waits a minute: a Pi starts Python slowly, and launchd does not say when it listens.
wait_for_answer() {
    ask_config "
server = config.server
host = {'0.0.0.0': '127.0.0.1', '::': '[::1]'}.get(server.host, server.host)
url = f'http{\"s\" if server.tls else \"\"}://{host}:{server.port}/api/v1/health'
context = ssl._create_unverified_context()  # it asks itself; an own certificate need not name the loopback
deadline = time.monotonic() + 60
while True:
    try:
        health = json.load(urllib.request.urlopen(url, timeout=5, context=context))
        sys.exit(print('videoserverd', health['version'], 'answers at', url + ':', health['status']))
    except OSError as error:
        time.sleep(0.5) if time.monotonic() < deadline else sys.exit(f'{url}: {error}')
" || die 'it does not answer; to find out why:  sudo videoserverd doctor'
}

last_words() {
    cat <<END

Set up an iPhone:     sudo videoserverd phone      and open the address it shows on the iPhone
Add a link by hand:   videoserverd add URL
Check on it:          videoserverd list, videoserverd doctor
Settings, API keys:   $config, $secrets
END
}

do_install() {
    choose_user
    ensure_packages
    [ "$dry" ] || need openssl 'it makes the certificate'
    ensure_user
    ensure_python
    ensure_state
    install_program
    ensure_config
    ensure_output
    ensure_provisioned
    [ ! "$service" ] || install_service
    [ ! "$service" ] || [ "$dry" ] || wait_for_answer
    last_words
}

# ---------- removal ----------

stop_service() {
    case $system in
        Linux) [ ! -f "$unit" ] || [ ! "$service" ] || ensure systemctl disable --quiet --now "$name" ;;
        Darwin) stop_launchd ;;
    esac
}

do_uninstall() {
    videos=$(sed -n 's/^output_directory *= *//p' "$config" 2>/dev/null) || true
    stop_service
    drop "$unit" "$dropin" "$plist" "$command" "$(dirname "$program")"
    [ "$dry" ] || rmdir "$(dirname "$dropin")" 2>/dev/null || true
    [ "$dry" ] || [ ! "$service" ] || [ "$system" != Linux ] || systemctl daemon-reload
    if [ "$purge" ]; then purge_data; else
        say "keeps $(dirname "$config"), $state and the user; --uninstall --purge removes them"
    fi
    case $videos in
        '' | "$state"/*) ;;
        *) doing keep "$videos with your videos" ;;
    esac
    say 'keeps the Debian packages it installed'
}

purge_data() {
    drop "$(dirname "$config")" "$state" "$(dirname "$dropin")"
    case $(getent passwd "$name" 2>/dev/null) in
        *'added by install.sh'*) doing remove "the user $name" && ensure userdel "$name" ;;
    esac
}

main() {
    parse_arguments "$@"
    check_arguments
    check_system
    [ "$dry" ] || [ "$(id -u)" = 0 ] || { need sudo 'run this as root' && exec sudo sh "$0" "$@"; }
    "do_$action"
}

main "$@"
