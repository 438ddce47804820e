"""Matrices as decoding multiplies with them: the plain product's values, for any number of rows."""

import pytest
import torch
import torch.nn.functional as F

import eellm
from eellm.errors import ConfigError
from eellm.infer.quantize import round_weight
from eellm.infer.weights import Int4, Int8, Int8Simple, OneDNN, Plain, pack
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
def test_what_quantised_products_make_of_a_row_does_not_depend_on_the_rows_beside_it(quantize):
    for shape in ((96, 64), (1200, 1024)):
        matrix = pack(random(*shape), quantize=quantize)
        x_NI = random(16, shape[1], seed=2)
        together = matrix(x_NI)
        for row in (0, 7, 15):
            torch.testing.assert_close(matrix(x_NI[row : row + 1])[0], together[row], rtol=1e-6, atol=1e-6)


def test_rows_of_zeros_give_zeros():
    for quantize in (None, "int8", "int4"):
        for shape in ((96, 64), (1200, 1024)):
            matrix = pack(random(*shape), quantize=quantize)
            assert matrix(torch.zeros(3, shape[1])).abs().max() == 0


def test_weights_that_the_four_bit_kernel_can_not_take_stay_as_they_are():
    for shape in ((10, 64), (32, 40)):
        assert isinstance(pack(random(*shape), quantize="int4"), OneDNN | Plain)


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
