#!/usr/bin/env bash
# bash scripts/check_code.sh: ruff, vulture and mypy (on libra/) by the settings in pyproject.toml. vulture and mypy are not in requirements.txt;
# uv gets them from its cache or the package index, and mypy reads the packages of the active environment.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
uv tool run --from vulture==2.16 vulture
uv tool run --from mypy==2.4.1 mypy --python-executable "$(command -v python)"
