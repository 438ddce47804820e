"""Replicas of a server on Ray: `eellm serve` behind Ray Serve's proxy, on one machine or a cluster.

    pip install 'eellm[serve]' 'ray[serve]>=2.60'
    python examples/ray_serve.py MODEL [--replicas 2] [--threads N] [the options of `eellm serve`]
    python examples/ray_serve.py serve.toml [...]

Each replica is a process with the whole application: engines, threads, queue, keys. Every answer says in `x-replica`
who gave it. A replica that dies, or has lost its engine, is started anew; one that is to go ends what it runs. See
docs/how-to/ray.md.
"""

import argparse
import os
import signal
import sys
import threading
from dataclasses import dataclass

from ray import serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eellm.cli.options import CACHE_DIR
from eellm.cli.serve import read
from eellm.config.serve import ServeConfig
from eellm.errors import EellmError
from eellm.log import log_to_stderr
from eellm.serve.app import load_app

SPARE = 16
"""Requests beyond those that run and wait which a replica gets to see, so that it is the one that refuses them."""
END_S = 10.0
"""After the drain, until a replica that hasn't ended is killed."""


@serve.deployment(name="eellm")
@serve.ingress()
class Replica:
    """One server. Ray calls what has no caller here."""

    def __init__(self, config: ServeConfig) -> None:
        log_to_stderr()
        self.server, app = load_app(config, cache_dir=CACHE_DIR)
        self.asgi = Named(app, serve.get_replica_context().replica_id.unique_id)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self.asgi

    def check_health(self) -> None:
        """Raises where no answer will come any more: the replica is then replaced."""
        if self.server.failure is not None:
            raise self.server.failure.again()


class Named:
    """Says in each answer which replica gave it."""

    def __init__(self, app: ASGIApp, replica: str) -> None:
        self.app, self.header = app, (b"x-replica", replica.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), self.header]
            await send(message)

        await self.app(scope, receive, named)


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """How many, and what each gets."""

    number: int
    threads: int
    """Of each engine: processor cores that the replica counts for."""


def deploy(config: ServeConfig, replicas: Replicas) -> None:
    """Runs the application on the Ray that this process is connected to; returns when every replica answers."""
    serve.start(http_options={"host": config.host, "port": config.port})
    num_models = len(config.served())
    places = num_models * (config.max_batch + config.max_waiting)
    deployment = Replica.options(
        num_replicas=replicas.number,
        max_ongoing_requests=places + SPARE,
        max_queued_requests=places,
        graceful_shutdown_timeout_s=config.drain_s + END_S,
        health_check_period_s=2,
        ray_actor_options={
            "num_cpus": replicas.threads,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(replicas.threads)}},
        },
    )
    serve.run(deployment.bind(config), name="eellm", route_prefix="/")


def end() -> None:
    """New requests are refused, running ones have `drain_s`."""
    serve.delete("eellm")  # NOTE waits for its replicas; `shutdown` alone cuts off what they run
    serve.shutdown()


def main(args: list[str]) -> None:
    options, rest = parse(args)
    try:
        config = read(rest)
        config.check_open()
        names = ", ".join(model.name for model in config.served())
    except EellmError as error:
        sys.exit(f"ray_serve: {error}")
    ended = threading.Event()
    deploy(config, options)
    for number in (signal.SIGTERM, signal.SIGINT):  # NOTE after Ray, whose own would end us without a drain
        signal.signal(number, lambda *_: ended.set())
    print(f"serving {names} with {options.number} replicas at http://{config.host}:{config.port}", flush=True)
    ended.wait()
    end()


def parse(args: list[str]) -> tuple[Replicas, list[str]]:
    """Our own options, and those of `eellm serve`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of each replica's engine; default: the machine's cores, shared")
    options, rest = parser.parse_known_args(args)
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.replicas)
    return Replicas(number=options.replicas, threads=threads), rest


if __name__ == "__main__":
    main(sys.argv[1:])
