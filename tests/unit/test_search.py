"""The best layout: nothing that is possible is better, memory is kept to, reasons are given."""

from dataclasses import replace

import pytest

from eellm.errors import ConfigError
from eellm.plan.forecast import forecast
from eellm.plan.hardware import find_hardware
from eellm.plan.search import layouts, search
from tests.unit.test_forecast import recipe

HARDWARE = find_hardware("a100-80")


@pytest.fixture(scope="module")
def config():
    return recipe((4, 8), rows=32)


def all_of(config, num_devices, limit=float("inf")):
    """Every layout that can be, run whole."""
    found = []
    for parallel in layouts(config, HARDWARE, num_devices):
        try:
            each = forecast(replace(config, parallel=parallel), HARDWARE)
        except ConfigError:
            continue
        if max(each.memory_bytes) <= limit:
            found.append(each)
    return found


def test_no_layout_is_faster_than_the_one_found(config):
    result = search(config, HARDWARE, 4)
    everything = all_of(config, 4)
    assert result.num_tried == len(everything) > 50
    assert result.num_run < result.num_tried
    assert result.best.iteration_s == pytest.approx(min(each.iteration_s for each in everything), rel=2e-3)
    assert result.best.config.parallel.world_size == 4


def test_runners_up_are_of_other_meshes_and_say_why_they_lose(config):
    result = search(config, HARDWARE, 4)
    meshes = [(each.config.parallel.pp, each.config.parallel.dp, each.config.parallel.tp) for each in _all(result)]
    assert len(set(meshes)) == len(meshes) > 2
    for other in result.runners_up:
        assert other.forecast.iteration_s >= result.best.iteration_s
        assert any(word in other.reason for word in ("idles", "compute", "optimizer"))


def test_a_memory_limit_is_kept_and_what_it_rules_out_is_named(config):
    free = search(config, HARDWARE, 4)
    limit = max(free.best.memory_bytes) * 0.95
    tight = search(config, HARDWARE, 4, memory_limit_bytes=limit)
    assert max(tight.best.memory_bytes) <= limit
    assert tight.best.iteration_s >= free.best.iteration_s
    fitting = all_of(config, 4, limit)
    assert tight.best.iteration_s == pytest.approx(min(each.iteration_s for each in fitting), rel=2e-3)
    assert any("GiB" in other.reason for other in tight.too_large)


def test_where_nothing_fits_the_smallest_layout_is_named(config):
    with pytest.raises(ConfigError, match=r"no layout fits into 0\.5 GiB of a100-80; the smallest \(pp"):
        search(config, HARDWARE, 4, memory_limit_bytes=2**29)


def test_a_number_of_devices_that_divides_nothing_is_refused(config):
    with pytest.raises(ConfigError, match="--devices 37"):
        search(config, HARDWARE, 37)


def _all(result):
    return [result.best, *(other.forecast for other in result.runners_up)]
