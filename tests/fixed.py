"""Networks of fixed shapes, and what their tests share: engines on them, walks, what a memory holds."""

import math
from contextlib import contextmanager

import pytest
import torch

import eellm
from eellm.infer.attention import Span
from eellm.infer.fixed import FixedNetwork
from eellm.infer.graphs import Graphs
from eellm.infer.network import Leg
from tests.models import tiny_model
from tests.played import Played
from tests.step_costs import step_costs

MODEL = tiny_model(seed=0)
WINDOWED = tiny_model(seed=3, sliding_window=5, sliding_layers=(2, 5, 6), qk_norm=True)
STOPS = (1, 2, 3, 5, 6)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def played(model, **fields) -> FixedNetwork:
    """A network whose passes are recorded and played."""
    network = FixedNetwork(model, **fields)
    network.graphs = Graphs(Played())
    return network


@contextmanager
def engine_on(network, model, **fields):
    """An engine that computes with the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eellm.infer.backend.network_of", lambda *_: network)
        engine = eellm.Engine(model, **fields)
    with engine:
        yield engine


def parts(memory):
    """What is kept by layer, and by minus the layer of the exits; the spare rows left out: (S, C, 2K, E)."""
    every = memory.layers | {-layer: kv for layer, kv in memory.exits.items()}
    return [(part, kv[:, :, : memory.capacity].transpose(1, 2)) for part, kv in every.items()]


def reorder(name, layers, h_ND):
    """The first arguments of a network's `run` or `attended`."""
    return (h_ND, *layers) if name == "run" else (*layers, h_ND)


def a_walk(network, *, thresholds=(math.inf,) * 5, asked=(1, 0, 1, 1, 2), start=(3, 2, 2, 0, 0), likely=0.5):
    """Of rows 10 .. 15 behind a prompt in slot 1: what comes of it, and the memory."""
    memory = network.new_memory()
    memory.reserve(3, 30)
    network.run(random(10, 32, seed=1), 1, 6, network.rows([Span(1, 0, 10)]), memory)
    legs = [
        Leg(last=stop, start=first, num_asked=num, threshold=threshold, likely=likely)
        for stop, first, num, threshold in zip(STOPS, start, asked, thresholds, strict=True)
    ]
    h_ND, gone = network.walk(random(6, 32, seed=2), 0, legs, Span(1, 10, 6), memory, "max_prob")
    return h_ND, gone, memory


def ahead(model, look_s=math.inf) -> FixedNetwork:
    """A network that starts each next leg before it looks."""
    network = played(model, look_s=look_s)
    network.costs = step_costs(STOPS)
    return network
