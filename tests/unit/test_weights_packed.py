"""Matrices as decoding multiplies with them: the plain product's values, for any number of rows."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import eellm
from eellm.errors import ConfigError
from eellm.infer.packing import Packed
from eellm.infer.quantize import round_weight
from eellm.infer.weights import Int4, Int8, Int8Simple, OneDNN, Plain, _multiplies_bytes, pack
from tests.models import tiny_model

ROWS = (1, 2, 3, 5, 16, 17, 70)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(24, 40), (96, 64), (576, 192), (31, 7), (1200, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_packed_weight_gives_the_plain_product(shape, dtype, with_bias):
    weight_OI, bias_O = random(*shape, dtype=dtype), random(shape[0], seed=1, dtype=dtype) if with_bias else None
    matrix = pack(torch.nn.Parameter(weight_OI), bias_O)
    assert isinstance(matrix, OneDNN if dtype == torch.float32 else Plain)
    assert matrix.num_bytes == weight_OI.nbytes
    with torch.inference_mode():
        for num in ROWS:
            x_NI = random(num, shape[1], seed=2, dtype=dtype)
            y_NO = matrix(x_NI)
            assert y_NO.dtype == dtype
            exact = {torch.float32: 2e-4, torch.float64: 1e-10, torch.bfloat16: 0.5}[dtype]
            torch.testing.assert_close(y_NO, F.linear(x_NI, weight_OI, bias_O), atol=exact, rtol=0.02)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(48, 64), (576, 192), (1200, 1024), (1040, 1056)])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantised_weight_gives_the_product_with_its_rounded_values(quantize, shape, with_bias):
    weight_OI, bias_O = random(*shape), random(shape[0], seed=1) if with_bias else None
    matrix = pack(weight_OI, bias_O, quantize=quantize)
    assert isinstance(matrix, Int8 | Int8Simple | Int4)
    assert matrix.num_bytes < weight_OI.nbytes / (3.5 if quantize == "int8" else 6)
    rounded_OI = round_weight(weight_OI, quantize).values()
    for num in ROWS:
        x_NI = random(num, shape[1], seed=2)
        expected_NO = F.linear(x_NI, rounded_OI, bias_O)
        error_NO = (matrix(x_NI) - expected_NO).abs()
        assert error_NO.max() < 0.012 * expected_NO.abs().max(), "rows are rounded to bfloat16"
        assert error_NO.mean() < 0.003 * expected_NO.abs().max()


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(96, 64), (1200, 1024)])
def test_what_quantised_products_make_of_a_row_does_not_depend_on_the_rows_beside_it_to_the_last_bit(shape, quantize):
    matrix, x_NI = pack(random(*shape), quantize=quantize), random(16, shape[1], seed=2)
    alone_NO = torch.cat([matrix(x_1I) for x_1I in x_NI.split(1)])
    for num in (1, 2, 3, 4, 5, 8, 15, 16):
        assert torch.equal(matrix(x_NI[:num]), alone_NO[:num])


@pytest.mark.parametrize("kind", [Int8, Int8Simple, Int4])
def test_quantised_products_take_any_leading_dims_and_give_their_input_s_dtype(kind):
    matrix = kind(round_weight(random(48, 64), "int4" if kind is Int4 else "int8"), random(48, seed=1))
    x_BTI = random(2, 3, 64, seed=2)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        y_BTO = matrix(x_BTI.to(dtype))
        assert (y_BTO.shape, y_BTO.dtype) == ((2, 3, 48), dtype)
        torch.testing.assert_close(y_BTO.float(), matrix(x_BTI), atol=0.3, rtol=0.02)


@pytest.mark.skipif(
    not _multiplies_bytes(), reason="this processor's 8-bit products overflow, so `pack` never takes Int8"
)
def test_products_of_integers_are_nearly_exact_whatever_the_size_of_a_row():
    rounded = round_weight(random(64, 1024), "int8")
    x_NI = random(5, 1024, seed=2) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6])[:, None]
    expected_NO = x_NI.double() @ rounded.values().double().T
    error_NO = (Int8(rounded, None)(x_NI) - expected_NO).abs()
    assert (error_NO.amax(1) < 1e-4 * expected_NO.abs().amax(1)).all()
    sums = Int8(round_weight(torch.ones(16, 1024), "int8"), None)(x_NI.abs())
    torch.testing.assert_close(sums, x_NI.abs().sum(1, keepdim=True).expand(-1, 16), rtol=5e-6, atol=0)


def test_rows_of_zeros_give_zeros():
    for quantize in (None, "int8", "int4"):
        for shape in ((96, 64), (1200, 1024)):
            matrix = pack(random(*shape), quantize=quantize)
            assert matrix(torch.zeros(3, shape[1])).abs().max() == 0


def test_weights_that_the_four_bit_kernel_can_not_take_stay_as_they_are():
    for shape in ((10, 64), (32, 40)):
        assert isinstance(pack(random(*shape), quantize="int4"), OneDNN | Plain)


def test_large_weights_of_8_bits_are_multiplied_as_integers_where_the_processor_can(monkeypatch):
    shapes = {"small": (96, 64), "odd": (96, 72), "large": (1200, 1024)}

    def kinds(**capabilities):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        return {name: type(pack(random(*shape), quantize="int8")) for name, shape in shapes.items()}

    assert kinds(avx512_vnni=True) == kinds(avx_vnni=True) == {"small": Int8Simple, "odd": Int8, "large": Int8}
    assert kinds(avx2=True) == {"small": Int8Simple, "odd": OneDNN, "large": Int8Simple}


@pytest.mark.skipif(not _multiplies_bytes(), reason="the processor has no products of bytes")
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_head_keeps_8_bits_and_logits_that_do_not_tie(quantize):
    weight_OI, x_NI = random(2000, 96), random(4, 96, seed=2)
    head, other = (pack(weight_OI, quantize=quantize, is_head=is_head) for is_head in (True, False))
    assert isinstance(head, Int8)
    assert isinstance(other, Int4 if quantize == "int4" else Int8Simple)
    num_values = [len(matrix(x_NI).unique()) for matrix in (head, other)]
    assert num_values[0] > 0.99 * 4 * 2000 > 4 * num_values[1], "bfloat16 has few values"


def test_a_head_that_is_not_quantised_is_as_any_other_weight():
    assert isinstance(pack(random(96, 64), is_head=True), OneDNN)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_weights_stay_as_they_are_where_torch_has_lost_an_operator(quantize, monkeypatch):
    for place in ("mkldnn", "aten", "onednn"):
        monkeypatch.setattr(torch.ops, place, SimpleNamespace())
    weight_OI, x_NI = random(96, 64), random(3, 64, seed=2)
    matrix = pack(weight_OI, quantize=quantize)
    assert isinstance(matrix, Plain)
    assert torch.equal(matrix(x_NI), F.linear(x_NI, weight_OI))


def test_quantising_on_another_device_is_refused():
    with pytest.raises(ConfigError, match="only on the CPU"):
        pack(torch.empty(32, 32, device="meta"), quantize="int8")


def test_an_engine_of_fewer_bits_is_nearly_the_model():
    model = tiny_model(dtype="float32", hidden_size=64, intermediate_size=96, vocab_size=64)
    text = [(5 * i + i * i) % 64 for i in range(60)]
    with eellm.Engine(model) as engine:
        exact = engine.score([text])[0].logprobs
        full_bytes = engine.stats().weight_bytes
    mean_errors = []
    for quantize in ("int8", "int4"):
        with eellm.Engine(model, quantize=quantize) as engine:
            found = engine.score([text])[0].logprobs
            assert engine.stats().weight_bytes < full_bytes / 2
        errors = [abs(a - b) for a, b in zip(exact, found, strict=True)]
        mean_errors.append(sum(errors) / len(errors))
    assert 0 < mean_errors[0] < mean_errors[1] / 3
    assert mean_errors[0] < 0.1 * abs(sum(exact)) / len(exact)


def test_torch_s_private_names_that_products_need_are_where_they_were():
    names = {
        torch.ops.mkldnn: ("_reorder_linear_weight", "_linear_pointwise"),
        torch.ops.aten: ("_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu"),
        torch.ops.onednn: ("qlinear_prepack", "qlinear_pointwise"),
    }
    for place, needed in names.items():
        for name in needed:
            assert hasattr(place, name), f"torch {torch.__version__} has moved {name}: see eellm/infer/weights.py"


def test_a_matrix_is_made_once_for_a_way_and_its_parameters_as_they_are():
    packed, first, second = Packed(), torch.nn.Linear(4, 8), torch.nn.Linear(4, 8)
    other = torch.nn.Linear(4, 8)
    other.weight, other.bias = first.weight, first.bias  # another module of the same parameters
    made = [packed.matrix("way", [linear], object) for linear in (first, other, second)]
    assert made[0] is made[1] is not made[2]
    assert packed.matrix("another way", [first], object) is not made[0]
    assert packed.matrix("way", [first, second], object) is not packed.matrix("way", [second, first], object)
    with torch.no_grad():
        first.weight += 1
    assert packed.matrix("way", [first], object) is not made[0]
    assert packed.matrix("way", [second], object) is made[2]


def test_a_parameter_that_took_the_place_of_another_gets_a_matrix_of_its_own():
    packed, linear = Packed(), torch.nn.Linear(4, 8, bias=False)
    made = set()
    for size in range(40):  # freed ones would leave their ids to the next
        linear.weight = torch.nn.Parameter(torch.zeros(8 + size, 4))
        made.add(packed.matrix("way", [linear], lambda size=size: size))
    assert made == set(range(40))
