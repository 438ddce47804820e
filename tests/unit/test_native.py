"""Compiled kernels: torch's values, and the same bits whatever runs beside a row."""

import ctypes
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import eellm
from eellm.errors import ConfigError
from eellm.exits.policy import SCORES
from eellm.infer.attention import Span
from eellm.infer.native import build, structs
from eellm.infer.native.network import KERNELS_DIR, NativeNetwork
from eellm.infer.network import Leg, Network
from eellm.infer.packed import PackedNetwork
from eellm.infer.prepare import make_network
from eellm.infer.quantize import round_weight
from tests.models import EXITS, needs_compiler, tiny_config, tiny_model

pytestmark = needs_compiler

SIZES = {"hidden_size": 72, "intermediate_size": 100, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


def native_model(*, dtype="float32", seed=0, **changes):
    return tiny_model(seed=seed, dtype=dtype, **(SIZES | changes))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 7, 13])
@pytest.mark.parametrize("shape", [(24, 40), (96, 64), (31, 7), (200, 96), (16, 17), (144, 32)])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_is_torchs_with_the_rounded_values(shape, num_rows, quantize, with_bias):
    weight_OI, bias_O = random(*shape), random(shape[0], seed=1) if with_bias else None
    matrix = structs.make_matrix(weight_OI, bias_O, structs.in_turn(shape[0]), quantize, None)
    matrix.num_outputs = shape[0]
    values_OI = weight_OI
    if quantize == "int8" or (quantize == "int4" and shape[1] % 32 == 0):
        values_OI = round_weight(weight_OI, quantize).values()
        assert matrix.num_bytes < weight_OI.nbytes, "fewer bits"
    x_NI, y_NO = random(num_rows, shape[1], seed=2), torch.full((num_rows + 1, shape[0]), 7.0)
    build.library(KERNELS_DIR).eellm_head(
        *(None, ctypes.c_double(0), ctypes.byref(matrix), ctypes.c_int64(num_rows)),
        *(*_pointers(x_NI, y_NO), None, ctypes.c_int64(2)),
    )
    torch.testing.assert_close(y_NO[:-1], F.linear(x_NI, values_OI, bias_O), atol=1e-4, rtol=1e-4)
    assert (y_NO[-1] == 7).all(), "nothing behind the last row is written"


def _pointers(*tensors):
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def final_logits(network, tokens, chunks, slot=0, num_slots=1):
    """Of every position, the text going through in chunks; at each exit and at the end."""
    memory = network.new_memory()
    memory.reserve(num_slots, len(tokens))
    out = {exit_config.layer: [] for exit_config in network.exits} | {network.config.num_layers: []}
    start = 0
    for count in chunks:
        rows, done = network.rows([Span(slot, start, count)]), 0
        h_ND = network.embed(tokens[start : start + count])
        for layer in out:
            h_ND = network.run(h_ND, done + 1, layer, rows, memory)
            z_ND = network.normed(layer, network.attended(layer, h_ND, rows, memory))
            out[layer].append(network.logits(layer, z_ND))
            done = layer
        start += count
    return {layer: torch.cat(parts) for layer, parts in out.items()}


ARCHITECTURES = {
    "llama": {},
    "one head of keys": {"num_kv_heads": 1},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "biases": {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "window": {"sliding_window": 5, "sliding_layers": (1, 3)},
    "wide heads": {"head_dim": 64, "num_heads": 2},
    "widest heads": {"head_dim": 256, "num_heads": 2},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_logits_are_as_near_float64_s_as_torch_s_in_float32(name):
    tokens = [int(t) for t in random(40, seed=3).abs().mul(1000).long() % 29]
    exact = native_model(dtype="float64", **ARCHITECTURES[name])
    model = native_model(**ARCHITECTURES[name])
    model.load_state_dict(exact.state_dict())
    network = make_network(model, compile=True)
    assert isinstance(network, NativeNetwork)
    expected = final_logits(PackedNetwork(exact), tokens, [40])
    by_torch = final_logits(PackedNetwork(model), tokens, [40])
    for layer, logits in final_logits(network, tokens, [25, 1, 14]).items():
        error, torch_error = ((x.double() - expected[layer]).abs().max() for x in (logits, by_torch[layer]))
        assert error < 2.5 * torch_error


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@torch.inference_mode()
def test_what_a_row_gives_depends_on_nothing_beside_it_to_the_last_bit(quantize):
    tokens = [int(t) for t in random(60, seed=4).abs().mul(1000).long() % 29]
    network = make_network(native_model(), quantize=quantize, compile=True)
    expected = final_logits(network, tokens, [60])
    for chunks in ([1] * 60, [7] * 8 + [4], [33, 27], [59, 1]):
        for layer, logits in final_logits(network, tokens, chunks, slot=2, num_slots=3).items():
            assert torch.equal(logits, expected[layer]), f"chunks of {chunks[0]}, layer {layer}"
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(x, expected[layer]) for layer, x in final_logits(network, tokens, [60]).items())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("policy", ["max_prob", "margin", "entropy"])
@pytest.mark.parametrize("quantize", [None, "int8"])
@torch.inference_mode()
def test_a_walk_in_one_call_is_leg_after_leg_to_the_last_bit(quantize, policy):
    network = make_network(native_model(sureness=0.5), quantize=quantize, compile=True)
    tokens = [int(t) for t in random(30, seed=4).abs().mul(1000).long() % 29]
    memories = [network.new_memory() for _ in range(2)]
    num_gone = set()
    for memory in memories:
        memory.reserve(3, 30)
        network.run(network.embed(tokens[:20]), 1, 6, network.rows([Span(1, 0, 20)]), memory)
    for case in range(24):
        legs = [
            Leg(last=1, start=5, num_asked=case % 2, threshold=0.3),
            Leg(last=3, start=5, num_asked=1, threshold=case / 24),
            Leg(last=5, start=2, num_asked=(case + 1) % 2, threshold=0.5),
            Leg(last=6, start=0, num_asked=case % 4, threshold=math.inf),
        ]
        h_ND, way = random(7, 72, seed=case), (0, legs, Span(1, 20, 7))
        ours, theirs = (
            network.walk(h_ND, *way, memories[0], policy),
            Network.walk(network, h_ND, *way, memories[1], policy),
        )
        assert torch.equal(ours[0], theirs[0])
        for one, other in zip(ours[1], theirs[1], strict=True):
            assert (one.heard is None) == (other.heard is None)
            if one.heard is not None:
                assert one.heard.answers == other.heard.answers
                assert torch.equal(one.heard.logits_NV, other.heard.logits_NV)
            assert (one.layers_s > 0, one.head_s > 0) == (True, one.heard is not None)
        for layer in range(1, 7):
            assert torch.equal(memories[0].layers[layer], memories[1].layers[layer])
        num_gone.add(len(ours[1]))
    assert num_gone >= {2, 4}, "some end at an exit"


@torch.inference_mode()
def test_rows_of_several_sequences_in_one_pass_are_those_of_each_alone():
    network = make_network(native_model(), compile=True)
    texts = [[int(t) for t in random(20, seed=seed).abs().mul(1000).long() % 29] for seed in range(3)]
    expected = [final_logits(network, text, [20]) for text in texts]
    memory = network.new_memory()
    memory.reserve(3, 20)
    for start, end in ((0, 11), (11, 12), (12, 20)):
        rows = network.rows([Span(slot, start, end - start) for slot in range(3)])
        h_ND = network.run(network.embed([t for text in texts for t in text[start:end]]), 1, 6, rows, memory)
        for got, one in zip(network.logits(6, network.normed(6, h_ND)).split(end - start), expected, strict=True):
            assert torch.equal(got, one[6][start:end])


@pytest.mark.parametrize("vocab_size", [2, 15, 16, 17, 29, 40000])
@torch.inference_mode()
def test_answers_are_those_of_the_policies(vocab_size):
    network = make_network(native_model(vocab_size=vocab_size, sureness=3.0), compile=True)
    h_ND = random(7, network.config.hidden_size)
    h_ND[3] = 0  # every token is as likely
    for layer in (1, 3, 5, 6):
        logits_NV, answers = network.answers(layer, h_ND, [*SCORES])
        torch.testing.assert_close(logits_NV, network.logits(layer, network.normed(layer, h_ND)))
        for row, (token, logprob, scores) in zip(logits_NV, answers, strict=True):
            assert row[token] == row.max()
            assert logprob == pytest.approx(float(row.double().log_softmax(-1).max()), abs=2e-6)
            assert scores == pytest.approx([float(score(row.double())) for score in SCORES.values()], abs=2e-5)


@pytest.mark.parametrize(
    "fields", [{"method": "early"}, {"method": "speculative", "always_draft": True}, {"method": "full"}]
)
def test_an_engines_answers_are_the_same_to_the_last_bit_alone_and_beside_others(fields):
    model = native_model(seed=6)
    prompts = [[int(t) for t in random(n, seed=n).abs().mul(1000).long() % 29] for n in (3, 17, 40, 5, 9)]
    options = {"max_new_tokens": 30, "ignore_eos": True, **fields}
    with eellm.Engine(model, compile=True) as engine:
        together = engine.generate(prompts, **options)
        alone = [engine.generate([prompt], **options)[0] for prompt in prompts]
        full = engine.generate(prompts, **options | {"method": "full"})
    for one, other, exact in zip(together, alone, full, strict=True):
        assert (one.tokens, one.logprobs) == (other.tokens, other.logprobs)
        if fields["method"] == "early":
            assert (one.exits, one.confidences) == (other.exits, other.confidences)
            assert len(set(one.exits)) > 1, "some leave early"
        else:
            assert (one.tokens, one.logprobs) == (exact.tokens, exact.logprobs), "lossless"


def test_without_kernels_torch_computes():
    assert isinstance(make_network(native_model(), compile=False), PackedNetwork)
    assert isinstance(make_network(native_model(dtype="float64")), PackedNetwork)
    with pytest.raises(ConfigError, match=r"compile = True: the kernels run float32 .* torch\.float64"):
        make_network(native_model(dtype="float64"), compile=True)
    with pytest.raises(ConfigError, match="the model's have 8"):
        make_network(native_model(head_dim=8), compile=True)


def test_a_machine_without_a_compiler_computes_with_torch_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    assert isinstance(make_network(native_model(), cache_dir=tmp_path), PackedNetwork)
    assert "no C++ compiler is installed" in caplog.text
    with pytest.raises(ConfigError, match=r"compile = True: no C\+\+ compiler"):
        make_network(native_model(), cache_dir=tmp_path, compile=True)


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "OPTIONS", ("-fno-such-option",))
    with pytest.raises(build.BuildError, match="no-such-option"):
        build.library(tmp_path / "kernels")
    assert list((tmp_path / "kernels").iterdir()) == []


def test_kernels_are_built_once_and_a_damaged_library_is_named(tmp_path):
    library = build.library(tmp_path)
    (path,) = tmp_path.iterdir()
    assert build.library(tmp_path) is library
    other = tmp_path / "other"
    other.mkdir()
    (other / path.name).write_bytes(b"not a library")
    with pytest.raises(build.BuildError, match="delete it"):
        build.library(other)


def test_every_exit_kind_and_a_stage_of_some_layers():
    assert {exit_config.kind for exit_config in EXITS} == {"embed", "layer", "mlp", "norm"}
    model = native_model()
    whole, part = make_network(model, compile=True), make_network(model, layers=range(3, 6), compile=True)
    assert part.embedding_VD is None
    assert 0 < part.num_bytes < whole.num_bytes
    assert part.own_layer == ()
    assert whole.own_layer == (2,)
    assert tiny_config(**SIZES) == replace(model.config, init_std=tiny_config().init_std)
