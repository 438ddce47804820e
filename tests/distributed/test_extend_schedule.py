"""The example of a schedule in one file trains: its gradients are those of a single process."""

from dataclasses import dataclass

from eellm.schedule.action import Schedule
from examples.extend_schedule import eager_1f1b
from tests.distributed.filled_step import FilledStep, found_differences, run_filled_steps
from tests.distributed.test_filled import filled_step
from tests.ranks import run_on_ranks


@dataclass(frozen=True)
class EagerStep(FilledStep):
    """A step under the example's schedule, which fills nothing."""

    @property
    def filled(self) -> Schedule:
        return eager_1f1b(self.parallel.pp, self.parallel.num_microbatches)


def test_a_schedule_of_one_s_own_trains_with_the_gradients_of_one_process():
    plain = filled_step([2, 4], pp=2, num_microbatches=4)
    step = EagerStep(plain.model, plain.parallel)
    ranks = run_on_ranks(2, run_filled_steps, [step], timeout_s=280)
    assert found_differences(step, [outcome for (outcome,) in ranks]) == []
