#!/usr/bin/env bash
# A stranger's path: a fresh clone of HEAD in a directory of its own, README's two commands, the tutorial and three how-tos
# with an environment that was just made; then a wheel in an empty environment, and how long an import takes.
#
#   examples/stranger.sh [--wheel-only] [--tests]
#
# --wheel-only: only the wheel. --tests: `make test` too, which takes longer than all else.
set -euo pipefail
cd "$(dirname "$0")/.."
wheel_only= tests=
for word in "$@"; do
    case $word in
        --wheel-only) wheel_only=1 ;;
        --tests) tests=1 ;;
        *) echo "unknown option $word; see the head of $0" >&2; exit 2 ;;
    esac
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH VIRTUAL_ENV
if [[ -z $wheel_only ]]; then
    git clone --quiet --no-hardlinks . "$work/eellm"
else
    mkdir "$work/eellm"
    cp -r pyproject.toml README.md LICENSE eellm models "$work/eellm"
fi
cd "$work/eellm"
say() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

if [[ -z $wheel_only ]]; then
    say "README: make quickstart"
    make quickstart TUNE_STEPS=20
    if [[ -n $tests ]]; then
        say "README: make test"
        make test
    fi
    say "the tutorial and three how-tos"
    .venv/bin/python examples/run_docs.py docs/tutorial.md docs/how-to/{tune,thresholds,serve}.md
fi

say "a wheel in an empty environment"
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet "torch==2.13.0" # the one that every environment here computes with
"$work/venv/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$work/wheels" .
"$work/venv/bin/python" -m pip install --quiet "$work"/wheels/eellm-*.whl
cp -r models/english "$work/model"
cd "$work"
"$work/venv/bin/eellm" --version
"$work/venv/bin/eellm" generate model --prompt "The Congress of the" --max-new-tokens 16

say "seconds, medians of seven"
"$work/venv/bin/python" - "$work/venv/bin" <<'END'
import statistics, subprocess, sys, time

for words in (["python", "-c", "pass"], ["python", "-c", "import eellm"], ["eellm", "--help"]):
    times = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run([f"{sys.argv[1]}/{words[0]}", *words[1:]], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    print(f"{statistics.median(times):.3f}  {' '.join(words)}")
END
say "done"
