#!/usr/bin/env bash
# bash scripts/check_code.sh: ruff, mypy (libra/) and vulture on the checkout, by the settings in pyproject.toml. mypy and vulture are not in
# requirements.txt: they come from uv's cache or the package index and see the packages of the active environment.
set -euo pipefail
cd "$(dirname "$0")/.."
site="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
ruff check .
ruff format --check .
PYTHONPATH="$site" uv tool run --from vulture==2.14 vulture
uv tool run --from mypy==1.18.2 mypy --python-executable "$(command -v python)"
