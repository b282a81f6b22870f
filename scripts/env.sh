# Source me: `. scripts/env.sh [EXTRA]` puts a Python that has the packages first on PATH, and this checkout on PYTHONPATH.
# EXTRA is one of setup.py's extras (default: test). A script that sources this must name it, or its own $1 is taken.

libra_root="$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd)"
libra_python="$(bash "$libra_root/scripts/install.sh" "${1:-test}")" || return 2
if [ "$libra_python" = "$libra_root/.venv/bin/python" ]; then
    export VIRTUAL_ENV="$libra_root/.venv"
fi
export PATH="$(dirname "$libra_python"):$PATH"
export PYTHONPATH="$libra_root${PYTHONPATH:+:$PYTHONPATH}"
