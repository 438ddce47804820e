"""`eellm generate MODEL --prompt TEXT`."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console

from eellm.cli.options import CACHE_DIR, Layers, Thresholds, parse
from eellm.cli.show import legend, show_token, summary
from eellm.config.infer import GenerateConfig, Method, Metric, PolicyName, Sampling
from eellm.errors import RequestError

if TYPE_CHECKING:
    from eellm.infer.handle import Handle
    from eellm.infer.result import Token


TOKEN_FIELDS = ("id", "text", "exit", "confidence", "logprob")
"""Of a token, in `--json`."""


@dataclass(frozen=True)
class Options:
    """Continues a prompt. The text goes to stdout as it is made, the exits and what they saved to stderr."""

    model: tyro.conf.Positional[str]
    """A model directory, an adapter directory, a .gguf file or a hub id."""
    prompt: str
    """The text to continue; `-` reads it from stdin."""
    adapter: Path | None = None
    """A directory with exits for this model."""
    chat: bool = False
    """Take the prompt as a user's message and render it with the model's chat template."""
    max_new_tokens: int = 64
    """Upper bound on the tokens generated."""
    method: Method = "early"
    """`full`: every token through every layer. `early`: each leaves at the first exit that is sure enough.
    `speculative`: exits draft, the last one judges; `full`'s tokens. `pipelined`: `early` over several workers.
    `auto`: what pays here."""
    policy: PolicyName | None = None
    """The score in [0, 1] that says how sure an exit is. Default: max_prob."""
    threshold: Thresholds = None
    """An exit is taken at a score of at least this; 1 or more turns exits off. Default: 0.8, and 0.4 for drafts."""
    exits: Layers = None
    """Layers of the exits in use. Default: all."""
    risk: float | None = None
    """Instead of policy, threshold and exits: those of the certificate with the largest risk up to this one."""
    risk_metric: Metric = "disagreement"
    """What the risk is measured in."""
    max_deferred: int = 16
    """Most rows that may wait for their deeper layers."""
    max_draft: int = 8
    """Most tokens drafted at a time under `speculative`."""
    lookup: bool = True
    """Under `speculative`, draft what followed the same words earlier."""
    always_draft: bool = False
    """Under `speculative`, draft also where plain decoding is measured to be faster."""
    typical: float = 0.0
    """Above 0, `speculative` also takes drafts with this share of the likeliest token's probability: not lossless."""
    quantize: Literal["int8", "int4"] | None = None
    """Weights of 8 or 4 bits (CPU only)."""
    compile: bool = True
    """Run kernels that the machine's C++ compiler builds once for its processor, where they can run the model; on CUDA,
    record passes as graphs."""
    workers: int = 1
    """Processes that share the layers; `pipelined` needs two or more."""
    tp: int = 1
    """So many of the workers share each matrix of a stage (tensor parallel)."""
    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together hold this probability."""
    min_p: float = 0.0
    """Only tokens with this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens seen before become less likely."""
    seed: int | None = None
    """Makes the draws repeatable."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A string that ends the text; may be given several times."""
    ignore_eos: bool = False
    """Go on after an end-of-text token."""
    dtype: str = "float32"
    """Of the computation: float32, bfloat16, float16 or float64."""
    device: str = "cpu"
    """Where to compute."""
    json: bool = False
    """Print one JSON object instead of text."""


def main(args: list[str]) -> None:
    options = parse(Options, args, verb="generate")
    config, text = _config(options), _prompt(options)
    from eellm.checkpoint.hf import load  # here: help and mistakes cost no torch import
    from eellm.infer.engine import Engine

    model = load(options.model, options.adapter, dtype=options.dtype, device=options.device)
    prompt = [{"role": "user", "content": text}] if options.chat else text
    limit = model.config.max_seq_len
    settings = {
        "quantize": options.quantize,
        "compile": None if options.compile else False,
        "cache_dir": CACHE_DIR,
        "workers": options.workers,
        "tp": options.tp,
    }
    with Engine(model, max_batch=1, max_tokens=limit, **settings) as engine:
        run = engine.submit(prompt, config)
        if options.json:
            print(json.dumps(as_json(run, list(run)), ensure_ascii=False))
        else:
            _show(run, model.config.num_layers)


def _show(run: "Handle", num_layers: int) -> None:
    """Text as it is made, then where it left."""
    out, err = Console(), Console(stderr=True, soft_wrap=True)
    for token in run:
        show_token(out, token.text, token.exit, num_layers)
    out.print()
    err.print(legend(run.exits, num_layers), summary(run.stats()), sep="\n", highlight=False)


def as_json(run: "Handle", tokens: list["Token"]) -> dict[str, Any]:
    """The contract of `--json`: text, tokens, stats."""
    return {
        "text": "".join(token.text for token in tokens),
        "tokens": [{name: getattr(token, name) for name in TOKEN_FIELDS} for token in tokens],
        "stats": asdict(run.stats()),
        "finish_reason": run.finish_reason,
    }


def _prompt(options: Options) -> str:
    try:
        text = sys.stdin.read() if options.prompt == "-" else options.prompt
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt on stdin is not UTF-8: {error}") from None
    if not text:
        raise RequestError("the prompt is empty")
    return text


def _config(options: Options) -> GenerateConfig:
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    return GenerateConfig(
        max_new_tokens=options.max_new_tokens,
        method=options.method,
        policy=options.policy,
        threshold=options.threshold,
        exits=options.exits,
        risk=options.risk,
        risk_metric=options.risk_metric,
        max_deferred=options.max_deferred,
        max_draft=options.max_draft,
        lookup=options.lookup,
        always_draft=options.always_draft,
        typical=options.typical,
        sampling=sampling,
        stop=options.stop,
        ignore_eos=options.ignore_eos,
    )
