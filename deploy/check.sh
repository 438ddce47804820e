#!/usr/bin/env bash
# What the image does, without Docker: installs the server into an empty place, starts it with a key, asks, stops it.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; rm -rf "$place"' EXIT

bash "$here/deploy/install.sh" "$here" "$place/venv"
key=$(python3 -c "import secrets; print(secrets.token_hex(16))")
echo "check = \"$key\"" > "$place/keys.toml"
cd "$place" # the package that was installed is to answer, not the checkout
"$place/venv/bin/eellm" serve "$here/models/english" --port 0 --api-keys "$place/keys.toml" > out 2> log &
server=$!
for _ in $(seq 240); do
    grep -q "^serving" out && break
    kill -0 "$server" 2>/dev/null || { cat log >&2; exit 1; }
    sleep 0.5
done
url=$(sed -n 's/^serving .* at //p' out)

ask() { python3 - "$url$1" "$2" "${3:-}" <<'PYTHON'
import sys
import urllib.error
import urllib.request

url, key, body = sys.argv[1:]
headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
try:
    with urllib.request.urlopen(urllib.request.Request(url, body.encode() or None, headers), timeout=60) as answer:
        print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.code)
PYTHON
}

body='{"model": "english", "prompt": "The Congress of", "max_tokens": 8, "temperature": 0}'
[[ $(ask /health "") == 200* ]]
[[ $(ask /ready "$key") == 200* ]]
[[ $(ask / "") == 200*"<title>"* ]]
[[ $(ask /playground/app.js "") == 200* ]]
[[ $(ask /v1/completions "" "$body") == 401 ]]
[[ $(ask /v1/completions "$key" "$body") == 200*'"completion_tokens":8'* ]]
[[ $(ask /metrics "$key") == 200*eellm_generation_tokens_total* ]]
kill -TERM "$server"
wait "$server"
echo "the server was installed, answered and stopped"
