"""What `eellm/pipeline/filled.py` takes from inside torch is still there, and nothing else touches torch's inside but
`eellm/infer/weights.py` (see test_weights_packed.py)."""

import inspect
import re
from pathlib import Path

from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.stage import PipelineStage

ROOT = Path(__file__).parents[2] / "eellm"


def test_the_runtime_still_has_what_the_adapter_uses():
    runtime = schedules._PipelineScheduleRuntime
    stepping = inspect.getsource(runtime._step_microbatches)
    for name in ("self.pipeline_order_with_comms", "stage.forward_one_chunk", "stage.get_bwd_recv_ops"):
        assert name in stepping, f"torch's runtime no longer uses {name}: see eellm/pipeline/filled.py"
    assert "self._n_microbatches" in inspect.getsource(schedules._PipelineSchedule)
    kinds = {kind.value for kind in schedules._ComputationType}
    assert {"F", "B", "SEND_F", "RECV_F", "SEND_B", "RECV_B", "UNSHARD", "RESHARD", "REDUCE_GRAD"} <= kinds
    assert schedules._Action._fields[:3] == ("stage_index", "computation_type", "microbatch_index")
    assert "grad_recv_info" in inspect.getsource(PipelineStage.get_bwd_recv_ops)


def test_no_other_module_imports_private_names_of_torch():
    private = re.compile(r"from torch[\w.]* import (?:\(?[^)\n]*\b_\w+|_)|\btorch\.(?:\w+\.)*_(?!_)\w+\(")
    found = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if private.search(path.read_text())}
    assert found == {"pipeline/filled.py", "infer/weights.py"}
