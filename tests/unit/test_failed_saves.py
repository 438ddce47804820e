"""Saving that fails or is killed: the old directory stays byte for byte, or what is there is refused."""

import contextlib
import errno
import resource
from functools import partial
from pathlib import Path

import pytest
import torch

import eellm
from eellm.checkpoint import files
from eellm.errors import CheckpointError
from tests.directories import assert_same_model, content, filled, with_adapter
from tests.models import EXITS, tiny_model

MORE_EXITS = (
    eellm.ExitConfig(layer=3, kind="layer", head="own", gate_size=4),
    eellm.ExitConfig(layer=4, kind="mlp"),
)


def fail_writer(monkeypatch, number: int, error: Exception):
    """The tensor writer leaves half a file and raises at its `number`th call."""
    calls, save_file = [], files.save_file

    def failing(tensors, path, **options):
        calls.append(path)
        save_file(tensors, path, **options)
        if len(calls) == number:
            path.write_bytes(path.read_bytes()[:64])
            raise error

    monkeypatch.setattr(files, "save_file", failing)


@pytest.mark.parametrize("number", [1, 3, 7])
@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_leaves_the_old_directory_byte_identical_and_nothing_else(tmp_path, monkeypatch, number, there):
    if there:
        eellm.save(tiny_model(dtype="float32", seed=1), tmp_path / "model")
    before = content(tmp_path)
    fail_writer(monkeypatch, number, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(CheckpointError, match="the disk is full; nothing was changed"):
        eellm.save(tiny_model(dtype="float32"), tmp_path / "model", max_shard_bytes=30_000)
    assert content(tmp_path) == before
    monkeypatch.undo()
    eellm.save(tiny_model(dtype="float32"), tmp_path / "model")
    assert_same_model(eellm.load(tmp_path / "model"), tiny_model(dtype="float32"))


def test_a_full_disk_leaves_an_old_adapter_byte_identical(tmp_path, monkeypatch):
    model = with_adapter(tmp_path)
    before = content(tmp_path)
    fail_writer(monkeypatch, 1, OSError(errno.ENOSPC, "No space left on device"))
    with torch.no_grad():
        model.exit(3).norm.weight.add_(1)
    with pytest.raises(CheckpointError, match="the disk is full"):
        eellm.save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    assert content(tmp_path) == before


def test_a_limit_that_the_kernel_sets_on_files_leaves_the_old_directory_byte_identical(tmp_path):
    eellm.save(tiny_model(dtype="float32", seed=1), tmp_path / "model")
    before = content(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = tiny_model(dtype="float32")
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"can't write .*model: .*nothing was changed"):
            eellm.save(model, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(tmp_path) == before


def test_an_interrupt_while_writing_leaves_the_old_directory_byte_identical(tmp_path, monkeypatch):
    eellm.save(tiny_model(dtype="float32", seed=1), tmp_path / "model")
    before = content(tmp_path)
    fail_writer(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        eellm.save(tiny_model(dtype="float32"), tmp_path / "model")
    assert content(tmp_path) == before


def test_a_directory_can_not_replace_a_file(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(CheckpointError, match=r"can't write .*Not a directory; nothing was changed"):
        eellm.save(tiny_model(dtype="float32"), tmp_path / "model")
    assert content(tmp_path) == {"model": b"mine"}


def test_what_a_killed_process_left_is_no_hindrance(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "getpid", lambda: 7)  # in a container every run has the same number
    (tmp_path / ".model.tmp-7").mkdir()
    (tmp_path / ".model.tmp-7" / "model.safetensors").write_bytes(b"half")
    eellm.save(tiny_model(dtype="float32"), tmp_path / "model")
    assert_same_model(eellm.load(tmp_path / "model"), tiny_model(dtype="float32"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class Killed(BaseException):
    """Stands for the process's end: nothing may catch it."""


def kill_at(monkeypatch, step: int):
    """Ends the process at its `step`th change of a directory, from 1. Returns the changes made, as a growing list."""
    changes = []

    def counted(change):
        def call(self, *args, **options):
            changes.append((change.__name__, self.name))
            if len(changes) == step:
                raise Killed
            return change(self, *args, **options)

        return call

    for name in ("replace", "rename", "unlink"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    return changes


def refused_or(load, *models):
    """`load` raises CheckpointError, or gives exactly one of `models`. Returns whether it was refused."""
    try:
        found = load()
    except CheckpointError:
        return True
    assert any(
        filled(found.config) == filled(model.config)
        and all(torch.equal(t, model.state_dict()[n]) for n, t in found.state_dict().items())
        for model in models
    ), "neither the old model nor the new one"
    return False


@pytest.mark.parametrize(
    ("old_shard", "new_shard"), [(10**9, 10**9), (30_000, 10**9), (10**9, 60_000), (30_000, 60_000)]
)
def test_a_process_killed_between_the_moves_leaves_a_model_that_is_refused_or_whole(
    tmp_path, monkeypatch, old_shard, new_shard
):
    old = tiny_model(dtype="float32", seed=1, exits=EXITS[:2])
    new = tiny_model(dtype="float32", seed=2, exits=(EXITS[1],))
    outcomes, step = [], 0
    while True:
        step += 1
        directory = tmp_path / str(step)
        eellm.save(old, directory, max_shard_bytes=old_shard)
        with monkeypatch.context() as patch:
            changes = kill_at(patch, step)
            try:
                eellm.save(new, directory, max_shard_bytes=new_shard)
                break
            except Killed:
                pass
        outcomes.append(refused_or(partial(eellm.load, directory), old, new))
    assert step - 1 == len(changes) >= 5
    assert not outcomes[0], "killed before the first change: the old model"
    assert all(outcomes[1:]), "from then on the directory is refused"
    assert_same_model(eellm.load(directory), new)


def test_a_process_killed_between_the_moves_leaves_an_adapter_that_is_refused_or_whole(tmp_path, monkeypatch):
    for step in range(1, 5):
        (tmp_path / str(step)).mkdir()
        old = with_adapter(tmp_path / str(step))
        new = eellm.load(tmp_path / str(step) / "base")
        eellm.add_exits(new, MORE_EXITS, init="random")
        adapter, base = tmp_path / str(step) / "adapter", tmp_path / str(step) / "base"
        with monkeypatch.context() as patch:
            changes = kill_at(patch, step)
            with contextlib.suppress(Killed):
                eellm.save_adapter(new, adapter, base=base)
        assert refused_or(partial(eellm.load, adapter), old, new) == (step in (2, 3))
        assert refused_or(partial(eellm.load, base, adapter), old, new) == (step in (2, 3))
    assert len(changes) == 3
    assert_same_model(eellm.load(adapter), new)


def test_a_new_directory_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        changes = kill_at(patch, 1)
        with pytest.raises(Killed):
            eellm.save(tiny_model(dtype="float32"), tmp_path / "model")
    assert len(changes) == 1
    assert not (tmp_path / "model").exists()


def test_an_error_between_the_moves_does_not_say_that_nothing_was_changed(tmp_path, monkeypatch):
    eellm.save(tiny_model(dtype="float32"), tmp_path / "model")

    def failing(self, target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(CheckpointError, match=r"Input/output error; .*model is incomplete now.*save it again"):
        eellm.save(tiny_model(dtype="float32"), tmp_path / "model")
    monkeypatch.undo()
    with pytest.raises(CheckpointError):
        eellm.load(tmp_path / "model")
