"""Calibration: each number of a profile from seconds that a clock of ours says, and its file read back."""

import itertools
from dataclasses import replace

import pytest
import torch

from eellm.errors import ConfigError
from eellm.plan.cost import layer_flops
from eellm.plan.hardware import Hardware, Link, PeakFlops, find_hardware
from eellm.train import calibrate as calibration
from eellm.train.calibrate import ETHERNET, Sizes, calibrate, write_hardware
from eellm.train.timing import Timer
from tests.models import tiny_config

SIZES = Sizes(
    matrix=32,
    model=tiny_config(num_layers=2, exits=(), sliding_window=3, sliding_layers=(2,)),
    num_rows=2,
    seq_len=8,
    copied_bytes=4096,
    optimizer_parameters=100,
    message_bytes=10,
)
LINK = Link(bytes_per_s=5e8, latency_s=1e-3)


class Clock:
    """Says so many more seconds with each look, in turn. Runs that aren't timed look at it too."""

    def __init__(self, *steps_s):
        self.now_s, self.steps_s = 0.0, itertools.cycle(steps_s)

    def __call__(self):
        self.now_s += next(self.steps_s)
        return self.now_s


def measured(*, clock=None, **changes):
    return calibrate(name="mine", sizes=SIZES, link=LINK, clock=clock or Clock(1.0), **changes)


def flops_of_layers():
    model = SIZES.model
    per_token = layer_flops(model, 8, model.window(1)) + layer_flops(model, 8, model.window(2))
    return per_token * 2 * 8


def test_rates_are_what_was_done_by_the_seconds_that_it_took():
    half_a_second = measured(clock=Clock(0.5))
    assert half_a_second.peak_flops.float64 == 2 * 32**3 / 0.5
    assert half_a_second.flops_per_s("float32") == pytest.approx(flops_of_layers() / 0.5)
    assert half_a_second.memory_bytes_per_s == 2 * 4096 / 0.5
    assert half_a_second.optimizer_bytes_per_s == 10 * 4 * 100 / 0.5
    assert half_a_second.backward_ratio == 1


def test_a_backward_is_set_against_its_forward():
    """The clock is looked at twice for a product and three times for a layer; products: 6 runs of 4 dtypes."""
    found = []
    for backward_s in (1.0, 3.0):
        looks = [1.0] * (2 * 6 * 4) + [1.0, 1.0, backward_s] * 6 + [1.0] * 100
        found.append(measured(clock=Clock(*looks)).backward_ratio)
    assert found == [1, 3]


def test_the_median_counts_and_the_first_run_does_not():
    timer = Timer(torch.device("cpu"), Clock(0.0, 100.0, 0.0, 1.0, 0.0, 2.0, 0.0, 9.0, 0.0, 3.0, 0.0, 1.5))
    assert timer.seconds(lambda: None) == 2.0


def test_a_layer_never_reaches_more_than_the_peak():
    """Tiny products take as long by this clock as whole layers, which do more."""
    hardware = measured()
    assert flops_of_layers() > hardware.peak_flops.float64
    assert hardware.efficiency == 1
    assert hardware.peak_flops.float32 == flops_of_layers()
    slow_layers = measured(clock=Clock(*[1.0] * (2 * 6 * 4), *[50.0] * 200))
    assert slow_layers.peak_flops.float32 == 2 * 32**3
    assert slow_layers.efficiency == pytest.approx(flops_of_layers() / 50 / (2 * 32**3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_layers_compute_in_the_dtype_that_was_asked_for(monkeypatch, dtype):
    product, seen = torch.nn.functional.linear, []

    def watched(*args):
        seen.append(product(*args))
        return seen[-1]

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    hardware = measured(dtype=dtype)
    assert {y.dtype for y in seen} == {getattr(torch, dtype)}
    assert getattr(hardware.peak_flops, dtype) == flops_of_layers()
    assert hardware.efficiency == 1


def test_a_dtype_without_products_is_left_out_and_refused_where_it_is_asked_for(monkeypatch):
    product = calibration._products_per_s
    monkeypatch.setattr(
        calibration, "_products_per_s", lambda n, dtype, t: None if dtype == torch.float16 else product(n, dtype, t)
    )
    assert measured().peak_flops.float16 is None
    with pytest.raises(ConfigError, match="'float16': cpu has no matrix products of it here; use one of float32, "):
        measured(dtype="float16")


def test_products_that_torch_refuses_are_none():
    timer = Timer(torch.device("cpu"), Clock(1.0))
    assert calibration._products_per_s(8, torch.bool, timer) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "gpu"}, "device = 'gpu': must be one of cpu, cuda"),
        ({"dtype": "float23"}, "dtype = 'float23': must be one of .*did you mean 'float32'"),
    ],
)
def test_wrong_words_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        measured(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="device = 'cuda'"):
        measured(device="cuda")


def test_this_machine_s_numbers_are_plausible():
    hardware = calibrate(name="mine", sizes=replace(SIZES, matrix=128, copied_bytes=2**20), link=LINK)
    assert 1e6 < hardware.peak_flops.float32 < 1e13
    assert 0 < hardware.efficiency <= 1
    assert hardware.backward_ratio > 0
    assert 1e6 < hardware.memory_bytes_per_s < 1e13
    assert 1e2 < hardware.optimizer_bytes_per_s < 1e13
    assert 2**24 < hardware.reserved_bytes < hardware.memory_bytes * hardware.devices_per_node
    assert hardware.devices_per_node >= 1


def test_a_cpu_s_memory_is_shared_by_the_processes_that_its_cores_have_threads_for(monkeypatch):
    monkeypatch.setattr(calibration.os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(calibration, "_memory_bytes", lambda _: 12_000)
    found = {}
    for num_threads in (1, 4, 24):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=num_threads: n)
        hardware = measured()
        found[num_threads] = (hardware.devices_per_node, hardware.memory_bytes)
    assert found == {1: (12, 1000), 4: (3, 4000), 24: (1, 12_000)}


def test_machines_are_connected_by_ethernet_or_by_what_is_slower_within_one():
    assert measured().node_link == LINK
    assert measured().network_link == LINK
    fast = Link(bytes_per_s=1e12, latency_s=0.0)
    assert calibrate(name="mine", sizes=SIZES, link=fast, clock=Clock(1.0)).network_link == ETHERNET


def test_a_link_that_is_not_known_is_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(calibration, "measure_link", lambda device, **sizes: asked.append((device, sizes)) or LINK)
    assert calibrate(name="mine", sizes=SIZES, clock=Clock(1.0)).node_link == LINK
    assert asked == [("cpu", {"message_bytes": 10})]


def odd():
    return Hardware(
        name='a "name" with \\ and é\n',
        device="cuda",
        peak_flops=PeakFlops(bfloat16=1e30),
        efficiency=1 / 3,
        backward_ratio=2.0,
        memory_bytes=10**12,
        memory_bytes_per_s=1.5e12,
        devices_per_node=8,
        node_link=Link(bytes_per_s=1e16, latency_s=5e-6),
        network_link=Link(bytes_per_s=1 / 3 * 1e9, latency_s=0.0),
    )


@pytest.mark.parametrize("make", [measured, odd])
def test_a_profile_s_file_is_read_back_equal(tmp_path, make):
    hardware = make()
    path = tmp_path / "new" / "mine.toml"
    write_hardware(replace(hardware, efficiency=0.25), path)
    write_hardware(hardware, path)
    assert find_hardware(str(path)) == hardware
    assert [file.name for file in path.parent.iterdir()] == ["mine.toml"], "nothing temporary is left"


def test_a_file_that_can_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "mine.toml"
    write_hardware(measured(), path)
    before = path.read_text()

    def refuse(self, target):
        raise OSError("no space")

    monkeypatch.setattr(type(path), "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        write_hardware(replace(measured(), name="other"), path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["mine.toml"]


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"mine.json: a hardware profile is a .toml file; name it mine.toml"):
        write_hardware(measured(), tmp_path / "mine.json")
