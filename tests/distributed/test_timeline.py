"""A run's measured timeline: what ran on each rank, in the order of the schedule, and the same losses as unrecorded."""

import json
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path

import pytest

from eellm.config.load import from_toml
from eellm.config.parallel import ParallelConfig
from eellm.config.train import TrainConfig
from eellm.errors import ConfigError
from eellm.parallel.mesh import World, join
from eellm.pipeline.record import Recorder
from eellm.pipeline.watched import unwatched
from eellm.schedule.action import Action
from eellm.schedule.generate import make_schedule
from eellm.schedule.timeline import Timeline
from eellm.train.check import resolve
from eellm.train.loop import train
from eellm.train.trainer import Trainer
from tests.ranks import run_on_ranks

RECIPE = Path(__file__).parents[2] / "recipes" / "debug.toml"
ONE = ParallelConfig(num_microbatches=4)
PIPELINES = {
    "1f1b": ParallelConfig(pp=2, num_microbatches=4, exit_placement="next_stage"),
    "eager": ParallelConfig(pp=2, num_microbatches=4, exit_mode="eager"),
    "zbv": ParallelConfig(pp=2, num_microbatches=4, schedule="zbv", exit_placement="next_stage"),
}
SHARDED = ParallelConfig(dp_shard=2, num_microbatches=4)
RECORDED = 1


def recipe(layout: ParallelConfig) -> TrainConfig:
    """Exits behind layers 2, 4 and 6 of 8."""
    config = from_toml(TrainConfig, RECIPE)
    return resolve(
        replace(
            config,
            data=replace(config.data, seq_len=16, validation_rows=5),
            train=replace(config.train, global_batch_size=8, steps=RECORDED),
            parallel=layout,
        )
    )


def run_steps(layout: ParallelConfig, world: World, *, is_recorded: bool):
    """Every row's numbers, the validation losses after the recorded step, and on rank 0 that step's timeline."""
    config = recipe(layout)
    trainer = Trainer(config, world, unwatched)
    recorder = Recorder(world, num_microbatches=layout.num_microbatches)
    rows = []
    for step in range(1, config.train.steps + 1):
        row, _ = trainer.step(step, recorder if is_recorded and step == RECORDED else None)
        row |= trainer.evaluate() if step == RECORDED else {}
        rows.append({key: x for key, x in row.items() if "loss" in key or key == "grad_norm"})
    return rows, recorder.timeline() if is_recorded else None


def run_all(out_dir: Path):
    """On two ranks: each layout with and without a recorder, and a whole run that draws its timeline."""
    runs = {}
    for name, layout in ({"dp_shard": SHARDED} | PIPELINES).items():
        world = join(layout)
        runs[name] = [run_steps(layout, world, is_recorded=is_recorded) for is_recorded in (True, False)]
    config = recipe(PIPELINES["1f1b"])
    options = replace(config.train, out_dir=out_dir / "run", steps=2, timeline=out_dir / "step.json", timeline_step=9)
    train(replace(config, train=options), world)
    return runs


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("timeline")


@pytest.fixture(scope="module")
def runs(out_dir):
    return run_on_ranks(2, run_all, out_dir, timeout_s=280)


def actions_of(timeline: Timeline, rank: int) -> list[Action]:
    """What the rank computed, without the heads that cut it."""
    spans = [span for span in timeline.spans if span.rank == rank and span.letter in ("F", "B", "I", "W")]
    return [action for action, _ in groupby(Action(span.stage, span.letter, span.microbatch) for span in spans)]


def heads_of(timeline: Timeline) -> dict[str, set[int]]:
    """The stages on which each kind of head ran."""
    heads = [span for span in timeline.spans if span.letter not in ("F", "B", "I", "W")]
    return {letter: {span.stage for span in heads if span.letter == letter} for letter in {s.letter for s in heads}}


def times_run(timeline: Timeline, letter: str, stage: int) -> list[int]:
    """How often each microbatch's head ran there."""
    found = [s.microbatch for s in timeline.spans if (s.letter, s.stage) == (letter, stage)]
    return [found.count(microbatch) for microbatch in range(4)]


@pytest.mark.parametrize("name", ["dp_shard", *PIPELINES])
def test_recording_changes_no_number(runs, name):
    for recorded, plain in (rank[name] for rank in runs):
        assert recorded[0] == plain[0]


@pytest.mark.parametrize("name", PIPELINES)
def test_each_rank_does_what_the_schedule_says_one_thing_at_a_time(runs, name):
    (_, timeline), _ = runs[0][name]
    layout = PIPELINES[name]
    schedule = make_schedule(layout.schedule, 2, 4)
    for rank in range(2):
        spans = [span for span in timeline.spans if span.rank == rank]
        assert tuple(actions_of(timeline, rank)) == schedule.orders[rank]
        assert all(before.end_s <= after.start_s for before, after in pairwise(spans))
        assert all(span.start_s <= span.end_s for span in spans)
    assert timeline.spans[0].start_s == 0
    assert not any(span.is_extra for span in timeline.spans)
    assert runs[1][name][0][1] is None, "rank 0 has all"


def test_heads_are_where_their_exits_are(runs):
    timelines = {name: runs[0][name][0][1] for name in PIPELINES}
    assert heads_of(timelines["1f1b"]) == {"D": {0, 1}, "H": {1}}
    assert times_run(timelines["1f1b"], "D", 0) == [1] * 4, "the exit behind layer 4 has moved on"
    assert times_run(timelines["1f1b"], "D", 1) == [2] * 4
    eager = {"E": {0, 1}, "e": {0, 1}, "H": {1}, "h": {1}}
    assert heads_of(timelines["eager"]) == eager
    assert times_run(timelines["eager"], "E", 0) == times_run(timelines["eager"], "e", 0) == [2] * 4
    assert heads_of(timelines["zbv"]) == {"D": {1, 2, 3}, "H": {3}}
    for stage in (1, 2, 3):
        assert times_run(timelines["zbv"], "D", stage) == [1] * 4


def test_a_run_draws_the_last_step_where_it_is_shorter(runs, out_dir):
    assert runs
    trace = json.loads((out_dir / "step.json").read_text())
    found = {(event["tid"], event["name"].split()[0]) for event in trace["traceEvents"] if event["ph"] == "X"}
    assert found == {(rank, letter) for rank in (0, 1) for letter in "FBD"} | {(1, "H")}


def test_of_ranks_that_do_the_same_the_first_is_drawn(runs):
    (_, timeline), _ = runs[0]["dp_shard"]
    assert timeline.num_ranks == 1
    assert actions_of(timeline, 0) == [Action(0, kind, m) for m in range(4) for kind in "FB"]
    assert times_run(timeline, "D", 0) == [3] * 4
    assert times_run(timeline, "H", 0) == [1] * 4


def test_one_process_has_a_timeline_too():
    (rows, timeline), (plain, _) = (run_steps(ONE, World(), is_recorded=x) for x in (True, False))
    assert rows == plain
    assert actions_of(timeline, 0) == [Action(0, kind, m) for m in range(4) for kind in "FB"]
    assert times_run(timeline, "D", 0) == [3] * 4
    assert times_run(timeline, "H", 0) == [1] * 4


def run_with(tmp_path, *, steps=2, **options):
    config = recipe(ParallelConfig())
    options = {"out_dir": tmp_path / "run", "steps": steps, **options}
    train(replace(config, train=replace(config.train, **options)), World())


def test_a_run_refuses_a_picture_that_it_cannot_draw_before_it_starts(tmp_path):
    with pytest.raises(ConfigError, match=r"\.svg.*\.json.*\.txt"):
        run_with(tmp_path, timeline=tmp_path / "step.png")
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_where_its_picture_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").touch()
    run_with(tmp_path, timeline=tmp_path / "file" / "step.svg", timeline_step=1)
    assert "the run goes on" in caplog.text
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2


def test_the_step_is_counted_from_where_a_run_is_taken_up(tmp_path):
    run_with(tmp_path)
    run_with(tmp_path, steps=5, timeline=tmp_path / "step.txt", timeline_step=2)
    assert "step 4, measured" in (tmp_path / "step.txt").read_text()
