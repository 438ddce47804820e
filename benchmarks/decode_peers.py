"""The decoders that `decode.py` compares with, all greedy, none of which ever stops early.

transformers  `generate`, with no end-of-text token to look for.
llama.cpp     the server of xllamacpp, called without HTTP, its prompt cache off. The wheel on PyPI uses AVX2 at most.
economize     early-exit drafts by the model's own first layers, verified losslessly.
ctranslate2   the model converted, in float32 or int8.

transformers and economize read an inner layer through the final norm, which is what a model is given here that has no
norms of its own for its exits. Models whose exits have them don't expect that; with `exit_norms` both get those norms,
which neither offers: transformers in place of the final one while it drafts, economize by a factor in front of it that
leaves every choice as it would be.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(kw_only=True)
class Answer:
    """One group of prompts, generated."""

    tokens: list[list[int]]
    """New ones, by prompt; empty where nothing is generated."""
    decode_s: float | None = None
    """From the first new token of the group to the last."""
    detail: dict[str, float | str] = field(default_factory=dict)


Generate = Callable[[list[list[int]], int], Answer]
"""Prompts, new tokens for each → what came out."""


class Decoder(Protocol):
    """Made of a model's path, a number of threads and options of its own. ImportError: it isn't installed."""

    versions: dict[str, str]

    def prepare(self, settings: dict[str, Any], batch: int) -> Generate:
        """Does beforehand what isn't generation."""

    def close(self) -> None:
        """Ends what it started."""


class Transformers(Decoder):
    """`exit` among the settings: assistant_early_exit. `prompt_lookup`: as many tokens at most from the text so far."""

    def __init__(self, model: str, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        self.model = load_transformers(model)
        self.norms = exit_norms(Path(model))

    def prepare(self, settings: dict[str, Any], batch: int) -> Generate:
        import torch

        options = {"pad_token_id": 0, "do_sample": False}
        if "exit" in settings:
            options["assistant_early_exit"] = settings["exit"]
            config = self.model.generation_config
            config.num_assistant_tokens = settings["num_drafts"]
            config.num_assistant_tokens_schedule = "constant"
            config.assistant_confidence_threshold = settings["confidence"]
        if "prompt_lookup" in settings:
            options["prompt_lookup_num_tokens"] = settings["prompt_lookup"]
        _norm_by_depth(self.model, self.norms if settings.get("exit_norms") else {})

        def generate(prompts: list[list[int]], num_tokens: int) -> Answer:
            ids = torch.tensor(prompts)
            with torch.inference_mode():
                out = self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, **options
                )
            return Answer(tokens=out[:, ids.shape[1] :].tolist())

        return generate


def load_transformers(model: str) -> Any:
    """In float32, and with no token that ends the text: all go on for as long as they are told to."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    loaded.generation_config.eos_token_id = None
    return loaded


def exit_norms(model: Path) -> dict[int, Any]:
    """By layer, the norm weights (D,) of exits that have norms of their own, float32."""
    from safetensors.torch import load_file

    file = model / "exits.safetensors"
    weights = load_file(file) if file.exists() else {}
    return {int(name.split(".")[0]): w.float() for name, w in weights.items() if name.endswith(".norm.weight")}


def _norm_by_depth(model: Any, weights: dict[int, Any]) -> None:
    """While transformers runs only the layers up to an exit, that exit's weight stands in for the final norm's."""
    import torch

    norm = model.model.norm
    final = norm.weight

    def forward(h: Any) -> Any:
        weight = weights.get(model.config.num_hidden_layers, final)
        return torch.nn.functional.rms_norm(h, weight.shape, weight, norm.variance_epsilon)

    if weights:
        norm.forward = forward
    else:
        norm.__dict__.pop("forward", None)


class Economize(Decoder):
    def __init__(self, model: str, threads: int) -> None:
        import economize
        import torch

        torch.set_num_threads(threads)
        self.versions = {"economize": economize.__version__, "torch": torch.__version__}
        self.model = load_transformers(model)
        self.norms = exit_norms(Path(model))
        self.last: Any = None

    def prepare(self, settings: dict[str, Any], batch: int) -> Generate:
        import economize
        import torch
        from economize.techniques.early_exit import EarlyExitConfig

        if self.last is not None:
            self.last.detach()
        layer = settings["exit"]
        self.last = model = economize.apply(self.model, EarlyExitConfig(exit_layer=layer, head="shared"))
        if settings.get("exit_norms"):
            model.techniques["early_exit"].readout = _times(self.norms[layer] / self.model.model.norm.weight)
        decoding = economize.DecodeConfig(
            cycle_length=settings["num_drafts"] + 1, min_confidence=settings["confidence"] or None
        )

        def generate(prompts: list[list[int]], num_tokens: int) -> Answer:
            out = model.decode_batch([torch.tensor(ids) for ids in prompts], num_tokens, decoding=decoding)
            return Answer(tokens=[result.tokens.tolist() for result in out])

        return generate


def _times(factor_D: Any) -> Any:
    """A module that multiplies by `factor_D`."""
    import torch

    class Times(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor_D = torch.nn.Parameter(factor_D.detach(), requires_grad=False)

        def forward(self, h: Any) -> Any:
            return h * self.factor_D

    return Times()


class LlamaCpp(Decoder):
    """model: a GGUF file."""

    def __init__(self, model: str, threads: int) -> None:
        import xllamacpp

        if not Path(model).is_file():
            raise ImportError(f"{model}: no such file; `make quickstart` fetches it, --gguf names another place")
        params = xllamacpp.CommonParams()
        params.model.path = model
        params.n_ctx, params.n_parallel, params.verbosity = 2048, 1, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(params)
        self.versions = {"xllamacpp": xllamacpp.__version__, "built for": xllamacpp.get_system_info().strip(" |\n")}

    def prepare(self, settings: dict[str, Any], batch: int) -> Generate:
        assert batch == 1, "this server has one slot"
        options = {
            "temperature": 0,
            "samplers": ["temperature"],
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "verbose": True,  # or the tokens aren't in the answer
        }

        def generate(prompts: list[list[int]], num_tokens: int) -> Answer:
            out = self.server.handle_completions({"prompt": prompts[0], "max_tokens": num_tokens, **options})
            if "error" in out:
                raise RuntimeError(out["error"]["message"])
            timings = out["timings"]
            decode_s = timings["predicted_ms"] / 1000 * (num_tokens - 1) / num_tokens
            return Answer(tokens=[out["__verbose"]["tokens"]], decode_s=decode_s)

        return generate


class CTranslate2(Decoder):
    """compute_type: float32 or int8, which the weights are converted to."""

    def __init__(self, model: str, threads: int, compute_type: str) -> None:
        import ctranslate2
        import transformers
        from ctranslate2.converters import TransformersConverter

        self.versions = {"ctranslate2": ctranslate2.__version__, "transformers": transformers.__version__}
        with tempfile.TemporaryDirectory() as directory:
            converted = Path(directory) / "model"
            TransformersConverter(model).convert(str(converted), quantization=compute_type)
            self.vocabulary: list[str] = json.loads((converted / "vocabulary.json").read_text(encoding="utf-8"))
            _name_special_tokens(converted / "config.json", self.vocabulary[0])
            self.generator = ctranslate2.Generator(
                str(converted), device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=threads
            )

    def prepare(self, settings: dict[str, Any], batch: int) -> Generate:
        def generate(prompts: list[list[int]], num_tokens: int) -> Answer:
            out = self.generator.generate_batch(
                [[self.vocabulary[token] for token in prompt] for prompt in prompts],
                beam_size=1,
                sampling_topk=1,
                max_length=num_tokens,
                end_token=[],  # nothing ends the text
                include_prompt_in_result=False,
            )
            return Answer(tokens=[result.sequences_ids[0] for result in out])

        return generate


def _name_special_tokens(file: Path, token: str) -> None:
    """Where a tokenizer has no such token, the converter writes null, which the generator can't read. None is used."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config = {key: token if value is None and key.endswith("_token") else value for key, value in config.items()}
    file.write_text(json.dumps(config), encoding="utf-8")
