#!/bin/sh
# Makes or renews the server's certificate; a front to `videoserverd.py cert`, which writes
# ca.crt, ca.key, names.json, server.crt and server.key where config.ini says (default: certs/).
#
#   ./gen_cert.sh                                   renew if it is time
#   ./gen_cert.sh --force                           renew now
#   ./gen_cert.sh --host nas.lan --ip 192.168.1.9   name these too, now and in later renewals
#   ./gen_cert.sh --new-ca                          a new CA: install it on each phone again
set -eu

die() {
    printf 'gen_cert.sh: %s\n' "$*" >&2
    exit 1
}

main() {
    here=$(cd -- "$(dirname -- "$0")" && pwd)
    [ -f "$here/videoserverd.py" ] || die "videoserverd.py is not beside this script, in $here"
    command -v python3 >/dev/null || die 'python3 is missing: sudo apt-get install python3 (Mac: xcode-select --install)'
    exec python3 "$here/videoserverd.py" cert "$@"
}

main "$@"
