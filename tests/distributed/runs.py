"""Training runs as processes of their own: started, watched through their metrics, killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "debug.toml"
CLOCK = ("tokens_per_s", "tflops_per_s", "peak_memory_mb")
"""What depends on the clock or the machine; `time/…` does too."""


class Run:
    """`eellm train recipes/debug.toml` with options, under torchrun where there is more than one process."""

    def __init__(self, out_dir: Path, *options: str, processes: int = 1, max_restarts: int = 0) -> None:
        self.out_dir = out_dir
        launcher = [sys.executable, "-m"]
        if processes > 1:
            launcher += ["torch.distributed.run", f"--nproc_per_node={processes}", f"--max-restarts={max_restarts}"]
            launcher += ["--standalone", "-m"]
        command = [*launcher, "eellm", "train", str(RECIPE), "--train.out_dir", str(out_dir), *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.log = out_dir.with_suffix(".log").open("a+")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def wait(self, timeout_s: float = 240) -> int:
        """The exit code."""
        return self.process.wait(timeout=timeout_s)

    def until(self, condition, timeout_s: float = 180) -> bool:
        """Polls until `condition()` holds; False where the run ended before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, f"nothing happened; the run printed:\n{self.printed()}"
            time.sleep(0.005)
        return True

    def until_step(self, step: int) -> bool:
        return self.until(lambda: last_step(self.out_dir) >= step)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """The launcher and all its workers, at once."""
        os.killpg(self.process.pid, number)
        self.process.wait()

    def workers(self) -> list[int]:
        """Process ids of the ranks, in their order."""
        found = {}
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                parent = int(status.read_text().partition("PPid:")[2].split()[0])
                if parent == self.process.pid:
                    environment = status.with_name("environ").read_bytes().split(b"\0")
                    ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
                    found |= dict.fromkeys(ranks, int(status.parent.name))
            except (OSError, IndexError):
                continue  # it ended while we looked
        return [found[rank] for rank in sorted(found)]

    def printed(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()


def finish(out_dir: Path, *options: str, processes: int = 1) -> list[dict]:
    """Runs to the end; returns the rows."""
    run = Run(out_dir, *options, processes=processes)
    assert run.wait() == 0, run.printed()
    return rows_of(out_dir)


def last_step(out_dir: Path) -> int:
    """The newest step with a row; a last line may be half written."""
    metrics = out_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def rows_of(out_dir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK and not k.startswith("time/")} for row in rows]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
