"""Servers that a benchmark started end with it, however it is ended."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines import wait_until_ended

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CLIENT = """
import sys, time
import httpx
from processes import leave_on_sigterm
from serve_clients import serving
leave_on_sigterm()
with serving([sys.executable, sys.argv[1], "{port}"], "/pids") as url:
    print(httpx.get(url + "/pids").text, flush=True)
    time.sleep(600)
"""
SERVER = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"{os.getpid()} {child.pid}".encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.timeout(90)
@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_ends_a_server_and_what_it_started(times, tmp_path):
    (tmp_path / "server.py").write_text(SERVER)
    command = [sys.executable, "-c", CLIENT, str(tmp_path / "server.py")]
    environ = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as client:
        pids = [int(word) for word in client.stdout.readline().split()]
        assert len(pids) == 2
        for _ in range(times):
            client.send_signal(signal.SIGTERM)
        assert client.wait() == 1
    wait_until_ended(pids)
