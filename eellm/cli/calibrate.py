"""`eellm calibrate MODEL --text FILE --risk 0.02`."""

import dataclasses
import json
from pathlib import Path

import tyro
from rich.console import Console

from eellm.checkpoint.exits import store_certificate
from eellm.checkpoint.hf import exits_directory, load
from eellm.cli.options import CACHE_DIR, Layers, parse
from eellm.config.calibrate import CalibrateConfig, Certificate
from eellm.config.infer import Metric, PolicyName
from eellm.config.load import to_dict
from eellm.data.units import read_units
from eellm.evaluate.calibrate import calibrate
from eellm.evaluate.path import OFF
from eellm.log import log


@dataclasses.dataclass(frozen=True)
class Options:
    """Learns thresholds whose risk is shown to stay below a bound, and stores them with the exits as a certificate."""

    model: tyro.conf.Positional[str]
    """A model directory or an adapter directory."""
    text: Path
    """Units: .jsonl with one a line (`text`, `messages`, or `prompt` and `reference`), or blank lines between them."""
    risk: float
    """The bound on a unit's mean loss, as 0.02."""
    adapter: Path | None = None
    """A directory with exits for this model."""
    confidence: float = 0.95
    """How sure the bound is to be."""
    metric: Metric = "disagreement"
    """A unit's loss: its share of tokens in `disagreement` with the final exit; the rise in `perplexity`; what its
    answer loses of `rouge_l`."""
    policy: PolicyName = "max_prob"
    """The score in [0, 1] that says how sure an exit is."""
    exits: Layers = None
    """Layers of the exits in use. Default: all."""
    clip: float = 1.0
    """Under `perplexity`: the largest rise that counts, in nats a token; the loss is the rise over this."""
    path_share: float = 0.2
    """Share of the units that choose the path of thresholds; the others are tested."""
    num_levels: int = 100
    """Steps of the path. Under `rouge_l` each answers all prompts anew."""
    max_new_tokens: int = 64
    """Under `rouge_l`: the answers' length."""
    seq_len: int = 512
    """Longer documents are read in pieces of so many tokens."""
    batch_size: int = 8
    """Units that are read side by side."""
    seed: int = 0
    """Decides which units choose the path."""
    dtype: str = "float32"
    """Of the computation: float32, bfloat16, float16 or float64. The certificate is for this one."""
    device: str = "cpu"
    """Where to compute."""
    json: bool = False
    """Print the certificate as a JSON object."""


def main(args: list[str]) -> None:
    options = parse(Options, args, verb="calibrate")
    names = [field.name for field in dataclasses.fields(CalibrateConfig)]
    config = CalibrateConfig(**{name: getattr(options, name) for name in names})
    directory = exits_directory(options.model, options.adapter)
    units = read_units(options.text)
    model = load(options.model, options.adapter, dtype=options.dtype, device=options.device)
    certificate = calibrate(model, units, config, cache_dir=CACHE_DIR)
    store_certificate(directory, certificate)
    if options.json:
        print(json.dumps(to_dict(certificate)))
    else:
        _show(certificate, model.config.num_layers)
    log.info(f"{directory}: the certificate is stored; ask with --risk {config.risk:g}")


def _show(certificate: Certificate, num_layers: int) -> None:
    out = Console(soft_wrap=True, highlight=False)
    out.print(
        f"{certificate.metric} is at most {certificate.risk:g}, with a confidence of {certificate.confidence:g}: "
        f"{certificate.measured_risk:.4f} over {certificate.num_units} units, p = {certificate.p_value:.3g}"
    )
    for layer, threshold in certificate.thresholds:
        rule = "off" if threshold >= OFF else f"{certificate.policy} from {threshold:g}"
        out.print(f"  exit {layer}: {rule}")
    out.print(f"  tokens leave after layer {certificate.mean_exit_layer:.2f} of {num_layers} on average")
