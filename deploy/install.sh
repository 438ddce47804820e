#!/usr/bin/env bash
# Installs the server: install.sh SOURCE PREFIX. The image runs it, and so does check.sh, which needs no Docker.
set -euo pipefail
source=$1 prefix=$2
python3 -m venv "$prefix"
"$prefix/bin/python" -m pip install --quiet "torch==2.13.0"
"$prefix/bin/python" -m pip install --quiet "$source[serve]"
