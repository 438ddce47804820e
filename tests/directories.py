"""Model and adapter directories for tests: made, compared, edited and spoilt."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

import eellm
from tests.models import EXITS, tiny_model

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])


def content(directory: Path) -> dict[str, bytes]:
    """Every file below `directory`, by its path there; directories too, with no content."""
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else b"" for p in directory.rglob("*")}


def filled(config: eellm.ModelConfig) -> eellm.ModelConfig:
    """The config with the numbers that stand for what is unset: config.json always has them."""
    return replace(config, head_dim=config.head_size, num_kv_heads=config.kv_heads)


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@torch.inference_mode()
def assert_same_model(found, expected):
    """Equal in every weight, and bit for bit in the logits and the gate of every exit."""
    assert filled(found.config) == filled(expected.config)
    assert_same_weights(found.state_dict(), expected.state_dict())
    found = deepcopy(found)  # a file's tensors lie where they lie: rounding in float64 depends on their alignment
    logits = [model(TOKENS) for model in (found, expected)]
    assert logits[0].keys() == logits[1].keys()
    assert all(torch.equal(logits[0][layer], logits[1][layer]) for layer in logits[0])
    rows = expected.decoder.rows(TOKENS.shape[1])
    for layer, hidden in expected.hiddens(TOKENS, rows):
        if layer in expected.config.exit_layers and expected.exit(layer).gate is not None:
            z = expected.normed(layer, hidden, rows)
            assert torch.equal(found.exit(layer).gate(z), expected.exit(layer).gate(z))


def with_adapter(directory: Path, *, base="base", adapter="adapter", seed=0):
    """A saved base without exits and a saved adapter with four; the model that both together are."""
    model = tiny_model(dtype="float32", exits=(), seed=seed)
    eellm.save(model, directory / base)
    eellm.add_exits(model, EXITS, init="random", seed=7)
    eellm.save_adapter(model, directory / adapter, base=directory / base)
    return model


def edit_json(file: Path, **changes):
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def spoil(file: Path, damage: str):
    if damage == "missing":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "cut in its header":
        file.write_bytes(file.read_bytes()[:50])
    else:
        file.write_bytes(b"<html>404 Not Found</html>" * 10)
