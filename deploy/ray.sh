#!/usr/bin/env bash
# Installs Ray beside the server, in an environment of its own, and runs the test of examples/ray_serve.py: two replicas on
# a local Ray. Takes two to three minutes.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

bash "$here/deploy/install.sh" "$here" "$place/venv"
"$place/venv/bin/python" -m pip install --quiet "ray[serve]>=2.60" "openai>=2" "httpx>=0.28" \
    "pytest>=8" "pytest-timeout>=2.3" "hypothesis>=6"
cd "$here"
"$place/venv/bin/python" -m pytest tests/serve/test_ray.py
