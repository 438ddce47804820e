"""The public surface is small and listed; what only thinks loads no torch; files stay short."""

import dataclasses
import inspect
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest

import eellm
from eellm.cli.main import VERBS
from eellm.config.plan import PlanConfig
from eellm.config.serve import ServeConfig
from eellm.config.train import TrainConfig
from eellm.config.tune import TuneConfig

ROOT = Path(__file__).parents[2]

PUBLIC = """
    EarlyExitLM Engine EellmError ExitConfig GenerateConfig Generation ModelConfig RopeConfig Sampling Token
    add_exits build generate load save save_adapter stream
"""

OPTIONS = {
    "prepare": "input out tokenizer train-tokenizer workers",
    "import": "source out dtype",
    "export": "checkpoint out dtype",
    "add-exits": "base out exits kind head norm gate-size init seed",
    "generate": """
        model prompt adapter chat max-new-tokens method policy threshold exits max-deferred
        temperature top-k top-p min-p repetition-penalty seed stop ignore-eos dtype device json
        max-draft lookup always-draft typical quantize compile workers tp risk risk-metric
    """,
    "calibrate": """
        model text risk adapter confidence metric policy exits clip path-share num-levels max-new-tokens seq-len
        batch-size seed dtype device json
    """,
    "bench": "model adapter tokens rounds batch threshold quantized out dtype device",
    "evaluate": """
        model text adapter curve out policy exits new-tokens seq-len max-tokens batch-size dtype device json
    """,
    "suit": "model text adapter out tune-steps tune-lr precision seq-len max-tokens batch-size dtype device json",
    "tasks": """
        model tasks data include adapter exit threshold policy exits limit fewshot chat batch-size out dtype device json
    """,
    "serve": """
        model adapter name models host port api-keys open-to-all allowed-hosts cors-origins max-batch max-waiting
        max-tokens max-body-bytes max-stops max-stop-chars method quantize compile workers tp shadow recall dtype
        device warm-up stream-s deadline-s body-s drain-s log-prompts
    """,
    "tune": """
        model.base model.adapter model.exits model.init model.fit-scale model.dtype model.device
        data.train data.validation data.validation-rows data.seq-len
        train.out-dir train.steps train.batch-size train.accumulate train.seed train.evaluate-every train.save-every
        train.resume
        objective.beta objective.temperature objective.gate objective.chunk-size
        {optim}
        {parallel}
    """,
    "train": """
        model.vocab-size model.hidden-size model.intermediate-size model.num-layers model.num-heads model.num-kv-heads
        model.head-dim model.max-seq-len model.rms-norm-eps model.activation model.qkv-bias model.attention-out-bias
        model.mlp-bias model.qk-norm model.sliding-window model.sliding-layers model.tie-embeddings model.init-std
        model.bos-token-id model.eos-token-ids model.exits
        model.rope.rope-type model.rope.rope-theta model.rope.factor model.rope.original-max-position-embeddings
        model.rope.low-freq-factor model.rope.high-freq-factor model.rope.beta-fast model.rope.beta-slow
        model.rope.attention-factor model.rope.mscale model.rope.mscale-all-dim model.rope.truncate
        data.train data.weights data.validation data.validation-fraction data.validation-rows data.tokenizer
        data.seq-len
        train.out-dir train.steps train.global-batch-size train.seed train.dtype train.device train.deterministic
        train.peak-tflops train.log-every train.evaluate-every train.resume train.max-bad-steps train.tensorboard
        train.timeline train.timeline-step train.wandb
        init-from
        objective.exit-weights objective.weight-schedule objective.initial-weights objective.weight-warmup-steps
        objective.curriculum objective.curriculum-period objective.temperature objective.confidence-weighting
        objective.layer-dropout objective.dropout-schedule objective.chunk-size
        {optim}
        {parallel}
        checkpoint.every checkpoint.keep
    """,
    "plan": """
        hardware search devices memory-limit-gb timeline json paper-table calibrate
        decode.exits decode.pp decode.tp decode.batch-size decode.context decode.seed
    """,
}
OPTIM = """
    optim.lr optim.min-lr optim.schedule optim.decay-fraction optim.warmup-steps optim.beta1 optim.beta2
    optim.weight-decay optim.clip
"""
PARALLEL = """
    parallel.dp-replicate parallel.dp-shard parallel.tp parallel.pp parallel.schedule parallel.num-microbatches
    parallel.stages-per-rank parallel.layers-per-stage parallel.exit-placement parallel.exit-mode parallel.recompute
    parallel.compile parallel.timeout-s
"""
RECIPES = {"tune": TuneConfig, "train": TrainConfig, "plan": PlanConfig, "serve": ServeConfig}


LIGHT = """
    eellm eellm.errors eellm.log eellm.config.calibrate eellm.config.check eellm.config.infer eellm.config.load
    eellm.config.model eellm.config.optim eellm.config.parallel eellm.config.train eellm.config.tune
    eellm.text.bytes eellm.text.chat eellm.text.stream eellm.text.tokenizer
    eellm.data.prepare eellm.data.sources eellm.cli.main eellm.cli.options
    eellm.train.check eellm.train.weights eellm.train.dropout eellm.cli.plan eellm.config.plan
    eellm.cli.serve eellm.config.serve eellm.evaluate.risk eellm.evaluate.path eellm.evaluate.rouge eellm.infer.shadow
    eellm.evaluate.advice eellm.evaluate.answers eellm.evaluate.rule eellm.infer.costs eellm.infer.guard
"""
LIGHT += " ".join(
    f"eellm.{layer}.{path.stem}" for layer in ("schedule", "plan") for path in (ROOT / "eellm" / layer).glob("[!_]*.py")
)


def options_of(cls, prefix=""):
    """The names of a verb's options, nested ones with dots."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            yield from options_of(hints[field.name], f"{name}.")
        else:
            yield name


def test_the_public_names_are_these_and_each_is_there():
    assert eellm.__all__ == PUBLIC.split()
    for name in PUBLIC.split():
        assert getattr(eellm, name).__doc__, f"{name} has no docstring"
        assert getattr(eellm, name).__name__ == name
    assert set(dir(eellm)) == {*PUBLIC.split(), "__version__"}


def test_a_name_that_is_not_public_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'eellm' has no attribute 'lod'"):
        eellm.lod  # noqa: B018


def test_the_version_is_the_project_s():
    assert eellm.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_verbs_and_their_options_are_these():
    found = {}
    for verb, (module, _) in VERBS.items():
        options = RECIPES[verb] if verb in RECIPES else import_module(module).Options
        found[verb] = set(options_of(options))
    expected = {
        verb: names.replace("{optim}", OPTIM).replace("{parallel}", PARALLEL) for verb, names in OPTIONS.items()
    }
    assert found == {verb: set(names.split()) for verb, names in expected.items()}


def dataclasses_of(cls):
    """`cls` and the dataclasses that are its fields, and theirs."""
    yield cls
    for hint in get_type_hints(cls).values():
        if dataclasses.is_dataclass(hint):
            yield from dataclasses_of(hint)


def test_every_option_says_what_it_is():
    for verb, (module, _) in VERBS.items():
        for cls in dataclasses_of(RECIPES[verb] if verb in RECIPES else import_module(module).Options):
            lines = inspect.getsource(cls).splitlines()
            for field in dataclasses.fields(cls):
                if dataclasses.is_dataclass(get_type_hints(cls)[field.name]):
                    continue  # a table, which says it itself
                (at,) = [i for i, line in enumerate(lines) if line.startswith(f"    {field.name}:")]
                assert lines[at + 1].startswith('    """'), f"{verb}: {cls.__name__}.{field.name} has no docstring"


def modules_after(code: str) -> set[str]:
    """What a fresh process has loaded after `code`, by the first part of its name."""
    code += "\nimport sys; print('|', *sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.rpartition("|")[2].split())


def test_what_only_thinks_loads_no_torch():
    code = "\n".join(f"import {module}" for module in LIGHT.split())
    code += "\neellm.ModelConfig; eellm.ExitConfig; eellm.GenerateConfig; eellm.Sampling; eellm.EellmError; dir(eellm)"
    loaded = modules_after(code)
    assert "eellm" in loaded
    assert not loaded & {"torch", "safetensors", "transformers"}


def test_every_module_of_config_and_text_is_in_the_list_of_the_light_ones():
    files = [*ROOT.glob("eellm/config/*.py"), *ROOT.glob("eellm/text/*.py")]
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files if file.stem != "__init__"}
    assert modules <= set(LIGHT.split())


def test_no_file_of_the_package_is_longer_than_400_lines():
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in ROOT.glob("eellm/**/*.py")}
    assert len(lengths) > 40
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_package_inits_are_empty_but_the_root_s():
    inits = [file for file in ROOT.glob("eellm/*/**/__init__.py") if file.read_text()]
    assert inits == []


def test_every_module_opens_with_its_story():
    for file in ROOT.glob("eellm/**/*.py"):
        if file.name != "__init__.py" or file.parent == ROOT / "eellm":
            assert file.read_text().startswith('"""'), file
