"""The network that processes share, with two threads in their place: it computes what the whole one does."""

import threading
import weakref

import pytest
import torch
import torch.distributed as dist

from eellm.infer.attention import Span
from eellm.infer.packed import PackedNetwork
from eellm.infer.pipelined.team import meet
from eellm.infer.pipelined.tensor import Follower, Lead, TensorParallelNetwork, part_config, part_weights
from eellm.infer.pipelined.worker import stage_model
from eellm.infer.score import Scoring
from tests.models import biased_model, tiny_model
from tests.traffic import LONG

MODEL = biased_model()


class Pair:
    """Two processes' parts of a model, in two threads of this one."""

    def __init__(self, model, quantize=None):
        store, config = dist.HashStore(), model.config
        layers, met = range(1, config.num_layers + 1), {}
        threads = [threading.Thread(target=lambda r=r: met.update({r: meet(store, r, 2, 2)})) for r in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        cpu, weights = torch.device("cpu"), model.state_dict()
        weights = {name: tensor for name, tensor in weights.items() if "embed" not in name}
        parts = [stage_model(part_config(config, 2), part_weights(weights, place, 2), cpu) for place in range(2)]
        self.lead = Lead(met[0][1])
        self.network = TensorParallelNetwork(
            parts[0],
            layers,
            config,
            self.lead,
            embedding_VD=model.decoder.embed.weight.detach(),
            quantize=quantize,
        )
        self.follower = Follower(PackedNetwork(parts[1], quantize, team=met[1][1]), met[1][1])
        self.thread = threading.Thread(target=self.follower.run, daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lead.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()


@torch.inference_mode()
def test_hidden_states_and_logits_are_the_whole_network_s_to_fp64():
    whole = PackedNetwork(MODEL)
    with Pair(MODEL) as pair:
        networks = (whole, pair.network)
        memories = [network.new_memory() for network in networks]
        for memory in memories:
            memory.reserve(3, 40)
        for spans in ([Span(0, 0, 9), Span(2, 0, 3)], [Span(0, 9, 1), Span(2, 3, 2)]):
            tokens = LONG[: sum(span.count for span in spans)]
            states = [network.embed(tokens) for network in networks]
            done = 0
            for stop in (*MODEL.config.exit_layers, MODEL.config.num_layers):
                seen = []
                for i, (network, memory) in enumerate(zip(networks, memories, strict=True)):
                    rows = network.rows(spans)
                    states[i] = network.run(states[i], done + 1, stop, rows, memory)
                    z_ND = network.normed(stop, network.attended(stop, states[i], rows, memory))
                    seen.append((states[i], z_ND, network.logits(stop, z_ND)))
                done = stop
                for (ours, theirs), within in zip(zip(*seen, strict=True), (1e-9, 1e-9, 1e-5), strict=True):
                    assert ours.shape == theirs.shape
                    assert (ours - theirs).abs().max() < within


def scored(network, thresholds=None):
    if thresholds is None:
        thresholds = dict.fromkeys(network.config.exit_layers, 0.4)
    scoring = Scoring(network, [(LONG, 1)], thresholds, "max_prob")
    while scoring.advance():
        pass
    return scoring.result()[0]


def test_windows_norms_of_heads_and_tied_matrices_in_float32():
    changes = {"sliding_window": 5, "sliding_layers": (2, 5, 6), "qk_norm": True, "tie_embeddings": True}
    model = tiny_model(seed=3, vocab_size=30, dtype="float32", **changes)
    expected = scored(PackedNetwork(model))
    assert len(set(expected.exits)) > 2
    with Pair(model) as pair:
        out = scored(pair.network)
    assert out.exits == expected.exits
    assert out.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


@pytest.mark.parametrize(("dtype", "quantize"), [("bfloat16", None), ("float32", "int8")])
def test_coarser_numbers_lose_little_more_than_in_one_process(dtype, quantize):
    """Each process rounds its part by itself."""
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64}
    model, exact = (tiny_model(seed=2, dtype=name, **sizes) for name in (dtype, "float64"))
    whole = PackedNetwork(model, quantize)
    with Pair(model, quantize) as pair:
        logprobs = [scored(network, thresholds={}).logprobs for network in (PackedNetwork(exact), whole, pair.network)]
        assert 2 * pair.network.num_bytes == pytest.approx(whole.num_bytes, rel=0.1)  # scales are of parts of rows
    errors = [sum(abs(a - b) for a, b in zip(logprobs[0], each, strict=True)) for each in logprobs[1:]]
    assert 0 < errors[1] < 2 * errors[0]


def test_memories_that_are_gone_here_are_gone_on_the_other_processes():
    with Pair(MODEL) as pair:
        kept, passing = pair.network.new_memory(), pair.network.new_memory()
        for memory in (kept, passing):
            memory.reserve(1, 8)
        gone = weakref.ref(passing)
        del passing, memory
        assert gone() is None
        kept.reserve(2, 8)
        with torch.inference_mode():  # its sums come after all that was told before
            pair.network.logits(MODEL.config.num_layers, pair.network.embed([1]))
        assert [*pair.follower.memories] == [0]
        assert pair.follower.memories[0].num_slots == 2
