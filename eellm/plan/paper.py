"""Table 1 of EE-LLM (arXiv 2312.04916), predicted: what early exits cost in time and memory, and what deferral and
moving an exit to the next stage save.

    two models, five setups → ten rows, each with the prediction beside the paper's figure

Four stages under 1F1B, 64 microbatches of 2 · 2048 tokens, minimalistic exits behind the first and the second stage's
last layer. One number is fitted per model: the share of the peak that its layers reach, so that the standard model's
iteration comes out right. All else follows from the cost model, and from what is assumed of the authors' program,
which is named below, once for all rows. `docs/concepts/prediction.md` says why the table comes out as it does.
"""

from dataclasses import dataclass, replace

from eellm.config.model import ExitConfig, ModelConfig
from eellm.config.parallel import ParallelConfig
from eellm.plan.hardware import Hardware, find_hardware
from eellm.plan.memory import Microbatch
from eellm.plan.parameters import head_parameters, layer_parameters
from eellm.plan.simulate import simulate
from eellm.plan.times import Traffic, stage_cost
from eellm.schedule.generate import make_schedule
from eellm.schedule.partition import Stage, partition

NUM_STAGES = 4
NUM_MICROBATCHES = 64
MICROBATCH = Microbatch(num_rows=2, seq_len=2048, dtype="bfloat16")

STATE_BYTES = 18
"""Per parameter: in bfloat16, its gradient in float32, and in float32 the optimizer's own copy and two moments."""
HIDDEN_BYTES = 32
"""Kept per layer, token and unit of the hidden state. Each of two norms: the input cast to float32 4, normed 2, scaled
2. Attention: q, k and v as the product puts them out 6 (v is a view of it), all three laid out for the kernel 6, the
result 2, laid out for the next product 2."""
INNER_BYTES = 8
"""Kept per layer, token and unit of the MLP's inside: gate 2, up 2, gate activated 2, product 2."""
BACKWARD_HIDDEN_BYTES = 8
"""In the backward of a layer, per token and unit of the hidden state: gradients of the residual and of the branch 4, of
the norm's float32 input 4."""
BACKWARD_INNER_BYTES = 8
"""There, per token and unit of the MLP's inside: the gradients of what `INNER_BYTES` lists."""
EXIT_INPUT_BYTES = 2
"""Kept per token, unit of the hidden state and exit: what its matrix reads."""
KEPT_LOGIT_BYTES = 4
"""Per logit and microbatch in flight, of an exit that runs in the forward: the softmax, in float32."""
WORKING_LOGIT_BYTES = 16
"""Per logit while a loss is computed: bfloat16 from the product 2, in float32 4, softmax 4, gradient 4, cast back 2."""
FIXED_BYTES = 4 * 2**30
"""On each device, whatever it holds: the driver's context, communication buffers, workspaces, unused parts of the
allocator's blocks. The one number here that is fitted, to what both standard models hold beyond the rest."""
TRAFFIC = Traffic(logit_bytes=52, matrix_bytes=0, embedding_bytes=12)
"""A loss reads logits in 2 bytes, writes 4; takes the maximum (4), subtracts it (8), exponentiates (8), sums (4),
divides (8), makes the gradient in place (8), casts it (6). Gradients of matrices are added up by the product itself;
the embedding's is zeroed (2), then read (2) and added to the float32 one (8)."""

MODELS = {
    "1.3B": ModelConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5504, num_layers=24, num_heads=32, tie_embeddings=True
    ),
    "7B": ModelConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32),
}
SETUPS = {
    "standard": ParallelConfig(pp=NUM_STAGES),
    "naive": ParallelConfig(pp=NUM_STAGES, exit_mode="eager"),
    "deferral": ParallelConfig(pp=NUM_STAGES, exit_mode="deferred"),
    "moved": ParallelConfig(pp=NUM_STAGES, exit_mode="eager", exit_placement="next_stage"),
    "both": ParallelConfig(pp=NUM_STAGES, exit_mode="deferred", exit_placement="next_stage"),
}
PAPER = {
    ("1.3B", "standard"): (5.23, 19.85),
    ("1.3B", "naive"): (5.31, 24.05),
    ("1.3B", "deferral"): (5.29, 22.56),
    ("1.3B", "moved"): (5.28, 20.23),
    ("1.3B", "both"): (5.24, 19.85),
    ("7B", "standard"): (17.75, 62.27),
    ("7B", "naive"): (17.93, 67.42),
    ("7B", "deferral"): (17.91, 65.79),
    ("7B", "moved"): (17.81, 62.27),
    ("7B", "both"): (17.79, 62.27),
}
"""Seconds per iteration and peak memory in GiB, by model and setup."""


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """A row of the table; seconds to a tenth of a millisecond and GiB to a thousandth, which sums of floats keep."""

    model: str
    setup: str
    iteration_s: float
    memory_gb: float
    """The largest among the stages, in GiB."""
    paper_iteration_s: float
    paper_memory_gb: float


def paper_table() -> list[PaperRow]:
    """The ten rows: 1.3B and then 7B, each standard, naive, deferral, moved, both."""
    rows = []
    for name in MODELS:
        hardware = fitted_hardware(name)
        for setup in SETUPS:
            paper_s, paper_gb = PAPER[name, setup]
            rows.append(
                PaperRow(
                    model=name,
                    setup=setup,
                    iteration_s=round(iteration_s(name, setup, hardware), 4),
                    memory_gb=round(max(stage_bytes(name, setup)) / 2**30, 3),
                    paper_iteration_s=paper_s,
                    paper_memory_gb=paper_gb,
                )
            )
    return rows


def fitted_hardware(name: str) -> Hardware:
    """An A100 whose efficiency makes the standard model's iteration last what the paper measured; by bisection."""
    hardware, (target_s, _) = find_hardware("a100-80"), PAPER[name, "standard"]
    low, high = 0.01, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        too_slow = iteration_s(name, "standard", replace(hardware, efficiency=middle)) > target_s
        low, high = (middle, high) if too_slow else (low, middle)
    return replace(hardware, efficiency=high)


def iteration_s(name: str, setup: str, hardware: Hardware) -> float:
    """Seconds of all forwards and backwards; the optimizer's step is in the fitted number."""
    model, parallel = _model(name, setup), SETUPS[setup]
    costs = [stage_cost(model, stage, parallel, MICROBATCH, hardware, TRAFFIC) for stage in _stages(name, setup)]
    hidden_bytes = 2 * MICROBATCH.num_tokens * model.hidden_size
    schedule = make_schedule("1f1b", NUM_STAGES, NUM_MICROBATCHES)
    return simulate(schedule, costs, hardware.node_link.seconds(hidden_bytes)).end_s


def stage_bytes(name: str, setup: str) -> list[float]:
    """Peak memory of each stage."""
    return [_stage_bytes(MODELS[name], stage, setup) for stage in _stages(name, setup)]


def _stage_bytes(model: ModelConfig, stage: Stage, setup: str) -> float:
    """NOTE every head has a matrix of its own to itself, even a tied one on the stage of the embedding: the paper's
    naive 1.3B is by one more than logits account for."""
    hidden, inner, vocabulary = model.hidden_size, model.intermediate_size, model.vocab_size
    num_heads, in_flight = len(stage.exits) + stage.is_last, NUM_STAGES - stage.index
    matrices = (num_heads + stage.is_first) * head_parameters(model)
    states = STATE_BYTES * (stage.num_layers * layer_parameters(model) + matrices)
    layers = stage.num_layers * (HIDDEN_BYTES * hidden + INNER_BYTES * inner)
    kept = in_flight * (layers + num_heads * EXIT_INPUT_BYTES * hidden)
    if SETUPS[setup].exit_mode == "eager":  # beside the one being worked on
        kept += (in_flight - 1) * num_heads * KEPT_LOGIT_BYTES * vocabulary
    in_layer = BACKWARD_HIDDEN_BYTES * hidden + BACKWARD_INNER_BYTES * inner
    in_head = WORKING_LOGIT_BYTES * vocabulary if num_heads else 0
    return FIXED_BYTES + states + MICROBATCH.num_tokens * (kept + max(in_layer, in_head))


def _model(name: str, setup: str) -> ModelConfig:
    """With exits after a quarter and a half of the layers, but for the standard setup."""
    model = MODELS[name]
    if setup == "standard":
        return model
    head = "tied" if model.tie_embeddings else "own"
    layers = (model.num_layers // 4, model.num_layers // 2)
    return model.with_exits(tuple(ExitConfig(layer=layer, kind="embed", head=head) for layer in layers))


def _stages(name: str, setup: str) -> tuple[Stage, ...]:
    """As many layers on each."""
    model = _model(name, setup)
    return partition(
        model.num_layers,
        NUM_STAGES,
        model.exit_layers,
        layers_per_stage=[model.num_layers // NUM_STAGES] * NUM_STAGES,
        placement=SETUPS[setup].exit_placement,
    )
