#!/bin/sh
# Installs this bundle for the user who runs it: no network, no root.
#
#   ./install.sh                  install, or update to this version
#   ./install.sh --key KEY.pub    refuse what was not signed with this key
#   ./install.sh --help           everything else
#
# Checking, copying and the switch are done by edgeft itself, which runs straight out of its wheel.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "error: $python is not installed; set PYTHON to one that is" >&2; exit 3; }
path=
for wheel in "$here"/wheels/*-none-any.whl; do
    [ -f "$wheel" ] && path="$path${path:+:}$wheel"
done
[ -z "$path" ] || export PYTHONPATH="$path"
exec "$python" -s -m edgeft install "$here" "$@"
