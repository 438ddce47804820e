"""Tiny seeded models, and the decoder that every cached one is held against."""

import shutil

import pytest
import torch

import eellm
from eellm.exits.policy import SCORES
from eellm.infer.native.build import COMPILERS
from eellm.infer.sampling import Sampler

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="no C++ compiler is installed; torch computes then"
)

EXITS = (
    eellm.ExitConfig(layer=1, kind="embed", head="own", gate_size=8),
    eellm.ExitConfig(layer=2, kind="layer", head="own", gate_size=8),
    eellm.ExitConfig(layer=3, kind="mlp", head="tied", gate_size=8),
    eellm.ExitConfig(layer=5, kind="norm", head="tied", gate_size=8),
)


def tiny_config(*, exits=EXITS, **changes) -> eellm.ModelConfig:
    sizes = {"vocab_size": 29, "hidden_size": 32, "intermediate_size": 48, "num_layers": 6, "num_heads": 4}
    return eellm.ModelConfig(**({"num_kv_heads": 2, "max_seq_len": 128, "exits": exits, **sizes} | changes))


@torch.no_grad()
def tiny_model(*, seed=0, dtype="float64", sureness=1.0, **changes) -> eellm.EarlyExitLM:
    """A random model whose logits are spread, deeper exits' more: every exit is sure now and then, none always."""
    model = eellm.build(tiny_config(init_std=0.3, **changes), seed=seed, dtype=dtype)
    deepest = model.config.num_layers
    model.decoder.norm.weight.mul_(2.2 * sureness)
    for name, exit in model.exits.items():
        if exit.norm is not None:
            exit.norm.weight.mul_(sureness * (1 + int(name) / deepest))
        elif exit.output is not None:  # the hidden state that an `embed` exit reads is about 4 times larger
            exit.output.weight.mul_(sureness / 4)
        if exit.gate is not None:
            exit.gate.out.weight.mul_(4)
    return model


@torch.no_grad()
def biased_model():
    """Everything can be halved, and every bias counts."""
    model = tiny_model(seed=0, vocab_size=30, qkv_bias=True, attention_out_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(torch.linspace(-0.2, 0.3, parameter.numel()).view_as(parameter))
    return model


@torch.inference_mode()
def oracle(model, prompt, *, num_tokens, thresholds, policy="max_prob"):
    """Greedy early-exit decoding without any cache: `model(tokens)` anew for each token.

    Returns one (token, exit layer, log-probability, score) per new token.
    """
    tokens, out = list(prompt), []
    last = model.config.num_layers
    for _ in range(num_tokens):
        context = torch.tensor([tokens])
        logits = {layer: value[0, -1].float() for layer, value in model(context).items()}
        for layer in sorted(logits):
            score = _score(model, context, layer, logits[layer], policy)
            if layer == last or (thresholds.get(layer, 1.0) < 1 and score >= thresholds[layer]):
                break
        token = int(logits[layer].argmax())
        out.append((token, layer, float(logits[layer].log_softmax(-1)[token]), score))
        tokens.append(token)
    return out


@torch.inference_mode()
def drawn_oracle(model, prompt, num_tokens, sampling):
    """What a sampler draws from `model(tokens)` at full depth without any cache, one token at a time.

    Returns one (token, log-probability under the raw logits) per new token.
    """
    sampler, tokens, rows = Sampler(sampling, prompt, torch.device("cpu")), list(prompt), []
    for _ in range(num_tokens):
        logits = model(torch.tensor([tokens]))[model.config.num_layers][0, -1].float()
        tokens.append(sampler.draw(logits))
        rows.append((tokens[-1], float(logits.log_softmax(-1)[tokens[-1]])))
    return rows


def _score(model, context, layer, logits, policy):
    if policy != "gate":
        return float(SCORES[policy](logits))
    if layer == model.config.num_layers:
        return 1.0
    rows = model.decoder.rows(context.shape[1])
    hidden = dict(model.hiddens(context, rows))[layer]
    return float(model.exit(layer).gate(model.normed(layer, hidden, rows)[0, -1]).float().sigmoid())


@torch.no_grad()
def agreeing_model(*, seed=0, change=0.15, **changes) -> eellm.EarlyExitLM:
    """A random model whose layers after the second change little, so that its exits at 2 and 4 mostly agree with its
    end, the more often the surer they are. change: how much of what random layers do these do."""
    exits = tuple(eellm.ExitConfig(layer=n, kind="norm", head="tied", gate_size=8) for n in (2, 4))
    model = eellm.build(tiny_config(**({"init_std": 0.3, "exits": exits, "vocab_size": 512} | changes)), seed=seed)
    model.decoder.norm.weight.mul_(2.2)
    for layer in range(3, model.config.num_layers + 1):
        model.decoder.layer(layer).attn.out.weight.mul_(change)
        model.decoder.layer(layer).mlp.down.weight.mul_(change)
    for name in model.exits:
        model.exit(int(name)).norm.weight.copy_(model.decoder.norm.weight)
    return model


@torch.no_grad()
def afraid_of(model, token):
    """The same model, which makes no numbers of texts with that token, and never says it itself."""
    model.decoder.embed.weight[token] = torch.nan
    for matrix in (model.decoder.output, *(exit.output for exit in model.exits.values())):
        if matrix is not None:
            matrix.weight[token] = matrix.weight[0]  # of two that are as likely the first is said
    return model
