"""What a server gives under load: tokens per second, how long clients wait, and whether every answer is right.

    python benchmarks/serve_load.py [MODEL] [--clients 1 8 32] [--seconds 60] [--tokens 64] [--threads N]
                                    [--cost-rounds 9] [--cost-seconds 6] [--method auto]
                                    [--transformers PYTHON] [--vllm PYTHON] [--out FILE.json]

`eellm serve` runs in a process of its own, its clients in this one (`serve_clients`). Every answer is compared with
what full depth says. --threads: that each server computes with; unset, what it takes by itself.

Then, at 8 clients, the server takes turns with its bare engine: what it costs (`serve_cost`). --cost-rounds 0 leaves
that out; `--clients` without numbers leaves out all else.

--transformers names an interpreter that has transformers with its extra `serving`, --vllm one that has vLLM
(`peers.py` makes both). Their servers then get the same load on the same prompts; their answers aren't checked. One
that can't be started is reported as missing, with the reason. They get the model without its exits: vLLM takes every
`*.safetensors` of a directory for the model's own.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from processes import leave_on_sigterm
from rich.console import Console
from rich.table import Table
from serve_clients import PROMPTS, ROOT, Load, MissingError, Place, load, serving
from serve_cost import Cost, cost

import eellm

COST_CLIENTS = 8


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another server of the same model."""

    name: str
    model: str
    """The directory; requests call it so too."""
    command: list[str]
    """With `{port}`."""


def main() -> None:
    options = parse()
    leave_on_sigterm()
    model = eellm.load(options.model)
    expected = [answer(model, prompt, options.tokens) for prompt in PROMPTS]
    results: list[Load] = []
    base = without_exits(Path(options.model))
    for clients in options.clients:
        results.append(ours(clients, options, expected))
        results += [theirs(peer, clients, options) for peer in peers(options, base)]
        write(options.out, results, None)
    price = costs(model, options, expected) if options.cost_rounds else None
    write(options.out, results, price)
    console = Console(width=150)
    if results:
        console.print(table(results, options))
    if price is not None:
        console.print(str(price))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(ROOT / "models/english"))
    parser.add_argument("--clients", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--threads", type=int, help="of each server under load")
    parser.add_argument("--cost-rounds", type=int, default=9)
    parser.add_argument("--cost-seconds", type=float, default=6, help="of each turn")
    parser.add_argument("--method", default="auto", help="of our server and its engine")
    parser.add_argument("--transformers", metavar="PYTHON", help="interpreter that has transformers[serving]")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter that has vllm")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out/serve_load.json")
    return parser.parse_args()


def answer(model: Any, prompt: str, num_tokens: int) -> str:
    (out,) = eellm.generate(model, [prompt], method="full", max_new_tokens=num_tokens)
    return out.text or ""


def command(options: argparse.Namespace) -> list[str]:
    serve = [sys.executable, "-m", "eellm", "serve", options.model]
    return [*serve, "--port", "{port}", "--method", options.method, "--recall", "0"]


def ours(clients: int, options: argparse.Namespace, expected: Sequence[str]) -> Load:
    with serving(command(options), "/ready", threads=options.threads) as url:
        place = Place(url=url, model=Path(options.model).name, num_tokens=options.tokens, expected=expected)
        return asyncio.run(load("eellm", place, clients, options.seconds))


def without_exits(model: Path) -> str:
    """A directory of links to all else."""
    base = ROOT / "bench-out" / f"{model.name}-base"
    base.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        link = base / path.name
        if not path.name.startswith("exits.") and not link.exists():
            link.symlink_to(path.resolve())
    return str(base)


def peers(options: argparse.Namespace, base: str) -> Iterator[Peer]:
    if options.transformers:
        program = str(Path(options.transformers).with_name("transformers"))
        serve = [program, "serve", base, "--port", "{port}", "--dtype", "float32", "--device", "cpu"]
        yield Peer(name="transformers serve", model=base, command=serve)
        yield Peer(name="transformers serve, batching", model=base, command=[*serve, "--continuous-batching"])
    if options.vllm:
        serve = [options.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--port", "{port}"]
        # on a CPU that is a share of the whole memory, 0.92 if unset, which is seldom free
        serve += ["--gpu-memory-utilization", "0.25"]
        yield Peer(name="vLLM", model=base, command=[*serve, "--dtype", "float32", "--max-num-seqs", "32"])


def theirs(peer: Peer, clients: int, options: argparse.Namespace) -> Load:
    try:
        with serving(peer.command, "/health", threads=options.threads) as url:
            place = Place(url=url, model=peer.model, num_tokens=options.tokens)
            return asyncio.run(load(peer.name, place, clients, options.seconds))
    except MissingError as error:
        return Load(server=peer.name, clients=clients, missing=str(error))


def costs(model: Any, options: argparse.Namespace, expected: Sequence[str]) -> Cost:
    with serving(command(options), "/ready", threads=1) as url:
        place = Place(url=url, model=Path(options.model).name, num_tokens=options.tokens, expected=expected)
        return cost(
            model,
            place,
            clients=COST_CLIENTS,
            rounds=options.cost_rounds,
            seconds=options.cost_seconds,
            method=options.method,
        )


def write(path: Path, results: Sequence[Load], price: Cost | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {"load": [summary(result) for result in results], "cost": None if price is None else asdict(price)}
    path.write_text(json.dumps(made, indent=2) + "\n")


def summary(result: Load) -> dict[str, Any]:
    made = asdict(result)
    for name in ("first_token_s", "between_events_s"):
        made[name] = dict(zip(("p50", "p95", "p99"), quantiles(made[name]), strict=True))
    return made


def quantiles(seconds: Sequence[float]) -> list[float]:
    return np.quantile(seconds, (0.5, 0.95, 0.99)).tolist() if seconds else [0.0] * 3


def table(results: Sequence[Load], options: argparse.Namespace) -> Table:
    found = Table(title=f"{Path(options.model).name}: {options.seconds:.0f} s, answers of {options.tokens} tokens")
    names = ("server", "clients", "tokens/s", "first token, ms p50/95/99", "between events, ms", "answers", "wrong")
    for name in (*names, "errors", "load"):
        found.add_column(name, justify="left" if name == "server" else "right")
    for result in results:
        if result.missing:
            found.add_row(result.server, str(result.clients), "missing", result.missing)
            continue
        times = (quantiles(result.first_token_s), quantiles(result.between_events_s))
        found.add_row(
            result.server,
            str(result.clients),
            f"{result.tokens_per_s:.0f}",
            *(" / ".join(f"{1e3 * second:.1f}" for second in seconds) for seconds in times),
            *(str(result.answers), str(result.wrong), str(len(result.errors)), f"{result.load_average:.1f}"),
        )
    return found


if __name__ == "__main__":
    main()
