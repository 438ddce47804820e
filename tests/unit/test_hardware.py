"""Hardware profiles: those of the package, files of one's own, and what is refused."""

import fnmatch
import tomllib
from pathlib import Path

import pytest

from eellm.errors import ConfigError
from eellm.plan.hardware import PROFILES, find_hardware, profile_names

ROOT = Path(__file__).parents[2]
OWN = """
name = "mine"
device = "cpu"
efficiency = 0.5
memory_bytes = 1000
memory_bytes_per_s = 10
devices_per_node = 4
peak_flops = { float32 = 8.0 }
node_link = { bytes_per_s = 100.0, latency_s = 1.0 }
network_link = { bytes_per_s = 10.0, latency_s = 2.0 }
"""


def own(tmp_path, text=OWN):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def test_the_package_s_profiles_are_these_and_each_is_called_as_its_file():
    assert profile_names() == ["a100-40", "a100-80", "cpu", "h100"]
    assert [find_hardware(name).name for name in profile_names()] == profile_names()


def test_the_two_a100_differ_in_memory_only_and_the_h100_is_faster():
    small, large, newer = (find_hardware(name) for name in ("a100-40", "a100-80", "h100"))
    assert small.peak_flops == large.peak_flops
    assert 2 * small.memory_bytes == large.memory_bytes
    assert small.memory_bytes_per_s < large.memory_bytes_per_s < newer.memory_bytes_per_s
    assert large.flops_per_s("bfloat16") < newer.flops_per_s("bfloat16")


def test_profiles_are_packaged():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    patterns = tool["setuptools"]["package-data"]["eellm"]
    for path in PROFILES.iterdir():
        name = path.relative_to(ROOT / "eellm").as_posix()
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name


@pytest.mark.parametrize(("name", "nearest"), [("a100-8", "a100-80"), ("H100", "h100"), ("cpus", "cpu")])
def test_an_unknown_name_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(ConfigError, match=f"'{name}' is not known .did you mean '{nearest}'"):
        find_hardware(name)


def test_a_file_of_one_s_own_is_read(tmp_path):
    hardware = find_hardware(own(tmp_path))
    assert hardware.flops_per_s("float32") == 4
    assert hardware.link(4).seconds(200) == 3
    assert hardware.link(5).seconds(200) == 22, "five devices don't fit a node of four"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("efficiency = 0.5", "eficiency = 0.5", "unknown key 'eficiency' .did you mean 'efficiency'"),
        ("efficiency = 0.5", "efficiency = 1.5", "efficiency = 1.5: must lie between 0 and 1"),
        ("efficiency = 0.5", "efficiency = 0", "efficiency = 0.*: must be above 0"),
        ("memory_bytes = 1000", "memory_bytes = '80 GB'", "memory_bytes = '80 GB': must be a whole number"),
        ("latency_s = 2.0", "latency_s = -2.0", "network_link.latency_s = -2.0: must be at least 0"),
        ("bytes_per_s = 100.0", "bytes_per_s = 0.0", "node_link.bytes_per_s = 0.0: must be at least 1"),
    ],
)
def test_a_wrong_file_is_refused_by_the_field(tmp_path, before, after, message):
    path = own(tmp_path, OWN.replace(before, after))
    with pytest.raises(ConfigError, match=f"{path}: {message}"):
        find_hardware(path)


def test_a_dtype_that_the_hardware_does_not_compute_in_is_refused_with_those_that_it_does(tmp_path):
    with pytest.raises(ConfigError, match=r"mine has no peak_flops.bfloat16; train in float32, or add it"):
        find_hardware(own(tmp_path)).flops_per_s("bfloat16")


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"no-such\.toml: no such"):
        find_hardware("no-such.toml")
