"""Rounding to 8 and 4 bits, and the directory that keeps what was rounded."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eellm.infer import quantize
from eellm.infer.quantize import GROUP_SIZE, QuantizeCache, Rounded, round_weight


def random_weight(num_outputs=48, num_inputs=96, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_outputs, num_inputs, generator=generator, dtype=torch.float64).to(dtype)


def groups(weight_OI):
    return weight_OI.unflatten(1, (-1, GROUP_SIZE))


def plain_int4(weight_OI):
    """A group's range in 15 equal steps, in float64: what the fit must be better than."""
    low, high = groups(weight_OI.double()).aminmax(dim=-1, keepdim=True)
    step = (high - low) / 15
    return (((groups(weight_OI) - low) / step).round() * step + low).flatten(1)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 99), st.floats(1e-6, 1e6))
def test_int8_is_off_by_half_a_step_of_its_row_at_most(num_outputs, num_inputs, seed, size):
    weight_OI = random_weight(num_outputs, num_inputs, seed=seed) * size
    rounded = round_weight(weight_OI, "int8")
    half_step_O1 = weight_OI.abs().amax(1, keepdim=True) / 127 / 2
    assert ((rounded.values() - weight_OI).abs() <= half_step_O1 * 1.0001).all()
    assert rounded.codes.dtype == torch.int8
    assert int(rounded.codes.min()) >= -127


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 99), st.floats(1e-6, 1e6), st.floats(-3, 3))
def test_int4_groups_have_no_more_squared_error_than_their_range_in_equal_steps(outs, num_groups, seed, size, shift):
    weight_OI = (random_weight(outs, num_groups * GROUP_SIZE, seed=seed) + shift) * size
    found = groups(round_weight(weight_OI, "int4").values() - weight_OI).square().sum(-1).sqrt()
    plain = groups(plain_int4(weight_OI) - weight_OI).square().sum(-1).sqrt()
    in_bfloat16 = groups(weight_OI).abs().amax(-1) * GROUP_SIZE**0.5 / 256
    assert (found <= plain + in_bfloat16).all()


def test_int4_of_normal_weights_beats_equal_steps_clearly():
    weight_OI = random_weight(256, 256)
    found = (round_weight(weight_OI, "int4").values() - weight_OI).square().mean()
    assert found < 0.9 * (plain_int4(weight_OI) - weight_OI).square().mean()


def test_weights_of_16_levels_a_group_are_kept_but_for_the_precision_of_their_scale():
    codes = torch.stack([torch.randperm(GROUP_SIZE) % 16 for _ in range(12)]).view(4, 96)
    weight_OI = (codes - 5) * 0.25  # powers of two: bfloat16 holds the scale, and a multiple of it
    assert torch.equal(round_weight(weight_OI, "int4").values(), weight_OI)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_zeros_and_equal_values_come_back(scheme):
    weight_OI = torch.zeros(3, 64)
    weight_OI[1] = 0.5
    assert torch.equal(round_weight(weight_OI, scheme).values(), weight_OI)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_blocks_make_no_difference(scheme, monkeypatch):
    weight_OI = random_weight(50, 64)
    whole = round_weight(weight_OI, scheme)
    monkeypatch.setattr(quantize, "_BLOCK", 7 * 64)
    assert same(round_weight(weight_OI, scheme), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_floating_dtype_is_rounded_as_its_float32(dtype):
    weight_OI = random_weight(dtype=dtype)
    assert same(round_weight(weight_OI, "int4"), round_weight(weight_OI.float(), "int4"))


def test_bytes_a_weight_takes():
    rounded = {scheme: round_weight(random_weight(32, 64), scheme) for scheme in ("int8", "int4")}
    sizes = {scheme: value.codes.nbytes + value.scales.nbytes for scheme, value in rounded.items()}
    assert sizes == {"int8": 32 * 64 + 32 * 4, "int4": 32 * 64 // 2 + 32 * 2 * 4}


def same(a: Rounded, b: Rounded) -> bool:
    return a.quantize == b.quantize and torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)


@pytest.fixture
def count(monkeypatch):
    """How often something was rounded."""
    calls = []

    def counted(weight_OI, scheme):
        calls.append(scheme)
        return round_weight(weight_OI, scheme)

    monkeypatch.setattr(quantize, "round_weight", counted)
    return calls


def test_a_weight_is_rounded_once_and_then_read(tmp_path, count):
    weight_OI, expected = random_weight(), round_weight(random_weight(), "int4")
    for _ in range(3):
        assert same(QuantizeCache(tmp_path / "new").rounded(weight_OI, "int4"), expected)
    assert count == ["int4"]
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".safetensors"]


def test_eight_bits_are_rounded_each_time_and_leave_no_file(tmp_path, count):
    for _ in range(2):
        QuantizeCache(tmp_path).rounded(random_weight(), "int8")
    assert count == ["int8", "int8"]
    assert not list(tmp_path.iterdir())


def test_another_weight_shape_or_dtype_is_another_file(tmp_path, count):
    cache, weight_OI = QuantizeCache(tmp_path), random_weight(dtype=torch.bfloat16)
    tuned_OI = weight_OI.clone()
    tuned_OI[3, 5] *= 1.01
    others = [tuned_OI, weight_OI.view(24, 192), weight_OI.view(torch.float16)]
    for other_OI in [weight_OI, *others]:
        assert same(cache.rounded(other_OI, "int4"), round_weight(other_OI, "int4"))
    assert len(count) == len(list(tmp_path.iterdir())) == 4


def test_equal_weights_share_a_file_whatever_their_strides_and_whoever_trains_them(tmp_path, count):
    weight_OI = random_weight()
    strided_OI = weight_OI.T.contiguous().T
    for other_OI in (weight_OI, strided_OI, torch.nn.Parameter(weight_OI.clone())):
        QuantizeCache(tmp_path).rounded(other_OI, "int4")
    assert len(count) == 1


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)


def other_values(path):
    """A whole file with the same metadata, and other codes."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["codes"] = tensors["codes"].flip(0).contiguous()
    save_file(tensors, path, metadata=metadata)


DAMAGE = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a tensor in sight, but longer than eight bytes"),
    "one bit": flip_a_bit,
    "other values": other_values,
    "other tensors": lambda path: save_file({"weight": torch.zeros(3)}, path),
    "no metadata": lambda path: save_file(load_file(path), path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_noticed_and_made_anew(damage, tmp_path, count, caplog):
    cache, weight_OI = QuantizeCache(tmp_path), random_weight()
    expected = cache.rounded(weight_OI, "int4")
    (path,) = tmp_path.iterdir()
    DAMAGE[damage](path)
    with caplog.at_level(logging.WARNING, "eellm"):
        assert same(cache.rounded(weight_OI, "int4"), expected)
    assert str(path) in caplog.text
    assert len(count) == 2
    assert list(tmp_path.iterdir()) == [path]
    assert same(cache.rounded(weight_OI, "int4"), expected)
    assert len(count) == 2, "the file is whole again"


def test_a_file_under_another_weights_name_is_not_trusted(tmp_path, count):
    cache, first_OI, second_OI = QuantizeCache(tmp_path), random_weight(seed=1), random_weight(seed=2)
    cache.rounded(first_OI, "int4")
    (first,) = tmp_path.iterdir()
    cache.rounded(second_OI, "int4")
    (second,) = set(tmp_path.iterdir()) - {first}
    second.write_bytes(first.read_bytes())
    assert same(cache.rounded(second_OI, "int4"), round_weight(second_OI, "int4"))
    assert len(count) == 3


def test_a_directory_that_cannot_be_made_costs_a_warning_and_nothing_else(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    weight_OI = random_weight()
    with caplog.at_level(logging.WARNING, "eellm"):
        found = QuantizeCache(tmp_path / "file").rounded(weight_OI, "int4")
    assert same(found, round_weight(weight_OI, "int4"))
    assert "can't be written" in caplog.text


def test_a_write_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(quantize, "save_file", fail)
    QuantizeCache(tmp_path).rounded(random_weight(), "int4")
    assert not list(tmp_path.iterdir())
