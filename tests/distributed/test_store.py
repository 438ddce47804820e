"""The checkpoint store: any layout reads what any other wrote, nothing disturbs a save, errors reach every rank."""

import errno
import json
import resource
import shutil
import threading
from concurrent.futures import Future

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from eellm.checkpoint import store as store_module
from eellm.checkpoint.store import Store, load_tensors
from eellm.errors import CheckpointError, UnsupportedError
from tests.distributed.layouts import (
    LAYOUTS,
    SHAPES,
    assert_equal,
    blank,
    data_and_tensor_parallel,
    single,
    staged,
    tensor_parallel,
    whole,
)
from tests.ranks import run_on_ranks

STATE = {"step": 3, "recipe": {"model": {"num_layers": 2}}, "stream": {"rows": [1, 2]}, "text": "é"}
FILES = {"tokenizer.json": b'{"model": 1}'}


def save_all(directory, num_ranks):
    for layout in LAYOUTS[num_ranks]:
        store = Store(directory / layout.__name__, keep=2)
        store.save(3, layout(whole()), STATE, FILES)
        store.wait()


def load_all(directory, num_ranks):
    """Every saved checkpoint under every layout of `num_ranks`; gives the number of pairs."""
    pairs = [(path, layout) for path in sorted(directory.iterdir()) for layout in LAYOUTS[num_ranks]]
    for path, layout in pairs:
        store = Store(path, keep=2)
        into = layout(blank(whole()))
        assert store.latest() == 3
        assert store.load(3, into) == STATE
        assert_equal(into, whole())
    return len(pairs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with a checkpoint of every layout."""
    directory = tmp_path_factory.mktemp("saved")
    save_all(directory, 1)
    for num_ranks in (2, 4):
        run_on_ranks(num_ranks, save_all, directory, num_ranks)
    return directory


def test_any_layout_is_read_by_one_process(saved):
    assert load_all(saved, 1) == 6
    for path in saved.iterdir():
        into = single(blank(whole()))
        assert load_tensors(path / "step-00000003", into) == STATE
        assert_equal(into, whole())


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_any_layout_is_read_by_any_other(saved, num_ranks):
    assert run_on_ranks(num_ranks, load_all, saved, num_ranks) == [6 * len(LAYOUTS[num_ranks])] * num_ranks


def test_a_checkpoint_is_a_directory_with_a_marker_and_the_files_that_it_lists(saved):
    for path in saved.iterdir():
        assert [child.name for child in path.iterdir()] == ["step-00000003"]
        step = path / "step-00000003"
        marker = json.loads((step / "checkpoint.json").read_text())
        assert marker["format_version"] == 1
        assert marker["step"] == 3
        assert marker["state"] == STATE
        assert set(marker["files"]) == {file.name for file in step.iterdir()} - {"checkpoint.json"}
        assert {".metadata", "tokenizer.json", "__0_0.distcp"} <= set(marker["files"])
        assert (step / "tokenizer.json").read_bytes() == FILES["tokenizer.json"]
        assert Store(path, keep=1).read_state(3) == STATE


def save_random_shapes(directory, layout_number):
    """Sizes that no number of processes divides, also smaller than it.

    What FSDP cuts once more is a multiple of tp, as `check_tensor_parallel` demands: of others torch loses track.
    """
    layout = LAYOUTS[dist.get_world_size()][layout_number]
    multiple = 2 if layout is data_and_tensor_parallel else 1
    store = Store(directory, keep=1)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        sizes = {name: torch.randint(1, 9, (len(SHAPES[name]),), generator=generator) for name in SHAPES}
        values = whole(seed, {name: (multiple * size).tolist() for name, size in sizes.items()})
        store.save(seed, layout(values), {})
        into = layout(blank(values))
        store.load(seed, into)
        assert_equal(into, values)
        plain = single(blank(values))
        store.load(seed, plain)
        assert_equal(plain, values)


@pytest.mark.parametrize(("num_ranks", "layout"), [(2, 0), (2, 1), (4, 0), (4, 1)])
def test_shards_may_be_uneven_or_empty(tmp_path, num_ranks, layout):
    run_on_ranks(num_ranks, save_random_shapes, tmp_path, layout)


def save_tied(directory):
    """A matrix that both stages hold, plain and cut over each stage's own mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    tied, norm = torch.arange(200_000.0).view(1000, 200), torch.arange(200.0)
    cut = {
        "tied": distribute_tensor(tied.clone(), mesh["tp"], [Shard(0)]),
        "norm": distribute_tensor(norm.clone(), mesh["tp"], [Replicate()]),
    }
    for name, held in (("plain", {"tied": tied, "norm": norm}), ("cut", cut)):
        store = Store(directory / name, keep=1)
        store.save(1, held, {})
        into = blank(held)
        store.load(1, into)
        assert_equal(into, {"tied": tied, "norm": norm})
    return tied.nbytes


def test_what_several_ranks_hold_is_written_once_and_read_by_all(tmp_path):
    num_bytes = run_on_ranks(4, save_tied, tmp_path)[0]
    for name in ("plain", "cut"):
        files = (tmp_path / name / "step-00000001").glob("*.distcp")
        assert num_bytes < sum(file.stat().st_size for file in files) < 1.1 * num_bytes


# --- in the background ---


def hold_writing(monkeypatch):
    """An event without which no save writes its tensors."""
    go, write_data = threading.Event(), store_module._Writer.write_data

    def held(self, plan, planner):
        assert go.wait(60)
        return write_data(self, plan, planner)

    monkeypatch.setattr(store_module._Writer, "write_data", held)
    return go


def train_on_while_saving(directory, num_ranks):
    with pytest.MonkeyPatch.context() as monkeypatch:
        _train_on_while_saving(directory, num_ranks, hold_writing(monkeypatch))


def _train_on_while_saving(directory, num_ranks, go):
    for layout in LAYOUTS[num_ranks]:
        go.clear()
        tensors, state = layout(whole()), {"rows": [1]}
        store = Store(directory / layout.__name__, keep=1)
        store.save(1, tensors, state)
        for tensor in tensors.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().fill_(-1)
        state["rows"].append(2)
        if num_ranks > 1:
            dist.all_reduce(torch.ones(3))  # the run's own collectives go on meanwhile
        assert not (store.directory / "step-00000001").exists()
        go.set()
        into = layout(blank(whole(seed=1)))
        assert store.load(1, into) == {"rows": [1]}
        assert_equal(into, whole())


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_save_returns_before_it_writes_and_holds_what_was_there_when_it_was_called(tmp_path, num_ranks):
    run_on_ranks(num_ranks, train_on_while_saving, tmp_path, num_ranks)


def test_the_same_in_a_single_process(tmp_path):
    train_on_while_saving(tmp_path, 1)


class Finishing(Future):
    """A save that ends when it is waited for."""

    def exception(self, timeout=None):
        assert not self.done()
        self.set_result(None)
        return super().exception(timeout)


def test_a_save_waits_for_the_one_before(tmp_path, monkeypatch):
    store, before, stage = Store(tmp_path, keep=5), Finishing(), store_module._Writer.stage

    def copy(self, tensors):
        assert before.done()
        return stage(self, tensors)

    monkeypatch.setattr(store_module._Writer, "stage", copy)
    store._saving = (1, before)
    store.save(2, single(whole()), {})
    assert store.steps() == [2]
    assert before.done()


def test_a_single_process_is_not_warned_that_it_is_one(tmp_path, recwarn):
    store = Store(tmp_path, keep=1)
    store.save(1, single(whole()), {})
    store.load(1, single(whole()))
    assert [str(warning.message) for warning in recwarn] == []


# --- which are kept ---


def test_the_last_ones_are_kept(tmp_path):
    store = Store(tmp_path, keep=2)
    seen = []
    for step in (5, 10, 15, 20):
        store.save(step, single(whole(seed=step)), {})
        seen.append(store.steps())
    assert seen == [[5], [5, 10], [10, 15], [15, 20]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000015", "step-00000020"]
    assert [store.latest(), store.latest(before=20), store.latest(before=15)] == [20, 15, None]


def test_older_ones_go_only_when_the_new_one_is_in_place(tmp_path, monkeypatch):
    go, store = hold_writing(monkeypatch), Store(tmp_path, keep=1)
    go.set()
    store.save(1, single(whole()), {})
    store.wait()
    go.clear()
    store.save(2, single(whole()), {})
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]
    go.set()
    assert store.steps() == [2]


def test_a_run_that_went_back_drops_the_checkpoints_that_it_left_and_replaces_one_of_the_same_step(tmp_path):
    store = Store(tmp_path, keep=2)
    for step, seed in ((10, 0), (20, 1), (10, 2)):
        store.save(step, single(whole(seed)), {"seed": seed})
    assert store.steps() == [10]
    into = single(blank(whole()))
    assert store.load(10, into) == {"seed": 2}
    assert_equal(into, whole(seed=2))


def test_a_directory_that_is_not_there_has_no_checkpoints(tmp_path):
    assert Store(tmp_path / "none", keep=1).latest() is None
    (tmp_path / "some" / "step-00000007").mkdir(parents=True)
    assert Store(tmp_path / "some", keep=1).steps() == []


# --- damage ---


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "first byte": lambda file: flip(file, 0),
    "middle": lambda file: flip(file, file.stat().st_size // 2),
    "last byte": lambda file: flip(file, -2),
}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Steps 80 and 100, written by two stages."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    run_on_ranks(2, save_two, directory)
    return directory


def save_two(directory):
    store = Store(directory, keep=2)
    for step in (80, 100):
        store.save(step, staged(whole(step)), {"step": step}, FILES)
    store.wait()


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata", "tokenizer.json", "checkpoint.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_nothing_is_filled_and_there_is_a_way_back(two_steps, tmp_path, name, damage):
    shutil.copytree(two_steps, tmp_path / "run")
    store, file = Store(tmp_path / "run", keep=2), tmp_path / "run" / "step-00000100" / name
    DAMAGES[damage](file)
    into = single(blank(whole()))
    with pytest.raises(CheckpointError) as caught:
        store.load(100, into)
    assert name in str(caught.value)
    if (name, damage) != ("checkpoint.json", "missing"):
        assert f"the one before it is step 80: remove {file.parent} to go on from there" in str(caught.value)
    assert_equal(into, blank(whole()))
    step = store.latest(before=100)
    assert store.load(step, into) == {"step": 80}
    assert_equal(into, whole(80))


def load_damaged(directory):
    """What each rank is told of a damaged file, of a tensor that only rank 1 wants, of one that only rank 0 shapes."""
    store, rank, told = Store(directory, keep=2), dist.get_rank(), []
    changed = {"model.norm": torch.zeros(5)} if rank == 0 else {}
    more = {"model.other": torch.zeros(2)} if rank == 1 else {}
    for step, into in ((100, {}), (80, more), (80, changed)):
        with pytest.raises(CheckpointError) as caught:
            store.load(step, staged(whole()) | into)
        told.append(str(caught.value))
    into = staged(blank(whole()))
    store.load(store.latest(before=100), into)
    assert_equal(into, whole(80))
    return told


def test_every_rank_is_told_what_one_of_them_found(two_steps, tmp_path):
    for name in ("__0_0.distcp", "__1_0.distcp"):
        shutil.copytree(two_steps, tmp_path / name)
        flip(tmp_path / name / "step-00000100" / name, 2000)
        told = run_on_ranks(2, load_damaged, tmp_path / name)
        assert told[0] == told[1]
        damaged, missing, shape = told[0]
        assert f"{name} is damaged: its SHA-256 is another" in damaged
        assert "tensor 'model.other' is missing (1 in all)" in missing
        assert "tensor 'model.norm' has shape (6,), the model's is (5,)" in shape


def test_a_step_that_is_not_there_and_a_newer_format_are_refused(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    store = Store(tmp_path / "run", keep=2)
    with pytest.raises(CheckpointError, match=r"step-00000090: not a checkpoint: it has no checkpoint\.json"):
        store.load(90, {})
    marker = tmp_path / "run" / "step-00000100" / "checkpoint.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format_version": 2}))
    with pytest.raises(UnsupportedError, match="format_version = 2: written by a newer eellm"):
        store.read_state(100)


# --- saves that fail ---


def fail_on_rank(directory, rank):
    """One save that fails because `rank` may not write files that large, another because its disk is full."""
    store, told = Store(directory, keep=2), []
    big = single(whole()) | {f"rank {dist.get_rank()}": torch.zeros(100_000)}
    store.save(1, big, {})
    store.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    store.save(2, big, {})
    with pytest.raises(CheckpointError) as caught:
        store.wait()
    told.append(str(caught.value))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.MonkeyPatch.context() as monkeypatch:
        if dist.get_rank() == rank:
            monkeypatch.setattr(store_module._Writer, "write_data", full_disk)
        store.save(3, big, {})
        with pytest.raises(CheckpointError) as caught:
            store.save(4, big, {})
        told.append(str(caught.value))

    assert store.steps() == [1]
    store.save(5, big, {})
    into = blank(big)
    store.load(5, into)
    assert_equal(into, big)
    return told


def full_disk(self, plan, planner):
    raise OSError(errno.ENOSPC, "No space left on device", str(self.temporary))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_can_not_write_fails_the_save_on_all_and_the_next_one_works(tmp_path, rank):
    told = run_on_ranks(2, fail_on_rank, tmp_path, rank)
    assert told[0] == told[1]
    for step, text in zip((2, 3), told[0], strict=True):
        assert text.startswith(f"can't write {tmp_path}/step-0000000{step}: rank {rank}: ")
        assert text.endswith("; checkpoints before it are as they were")
    assert "the disk is full" in told[0][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000005"]


def save_into_a_file(directory):
    store = Store(directory, keep=1)
    store.save(1, tensor_parallel(whole()), {})
    with pytest.raises(CheckpointError) as caught:
        store.wait()
    return str(caught.value)


def test_a_file_where_the_directory_should_be_is_told_to_every_rank(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    told = run_on_ranks(2, save_into_a_file, tmp_path / "checkpoints")
    assert told[0] == told[1]
    assert str(tmp_path / "checkpoints") in told[0]


def disagree_on_what_is_there(directory):
    """Rank 1 is shown a directory of its own."""
    rank = dist.get_rank()
    return Store(directory / str(rank), keep=2).latest()


def test_rank_0_decides_which_checkpoint_is_the_latest(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "0")
    shutil.copytree(two_steps / "step-00000080", tmp_path / "1" / "step-00000080")
    assert run_on_ranks(2, disagree_on_what_is_there, tmp_path) == [100, 100]
