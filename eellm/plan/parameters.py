"""How many parameters a part of a model has, from its config alone.

A stage holds its layers and exits, the embedding if it is the first, and the final norm and output matrix where the
final head is, or an exit that shares them. So a matrix that several stages use is on each of them, and is counted for
each; on one stage it is counted once, an embedding that is the output matrix too.
"""

from eellm.config.model import ExitConfig, ModelConfig
from eellm.schedule.partition import Stage


def layer_parameters(model: ModelConfig) -> int:
    """Of one layer: two norms, attention, MLP."""
    return model.hidden_size + attention_parameters(model) + mlp_block_parameters(model)


def attention_parameters(model: ModelConfig) -> int:
    """Of q, k, v and the output projection, with biases and the norms of q and k where there are any."""
    D, E = model.hidden_size, model.head_size
    query, key_value = model.num_heads * E, model.kv_heads * E
    biases = (query + 2 * key_value) * model.qkv_bias + D * model.attention_out_bias
    return D * (2 * query + 2 * key_value) + biases + 2 * E * model.qk_norm


def mlp_block_parameters(model: ModelConfig) -> int:
    """Of gate, up and down, with the norm before them."""
    D, width = model.hidden_size, model.intermediate_size
    return D + 3 * D * width + (2 * width + D) * model.mlp_bias


def head_parameters(model: ModelConfig) -> int:
    """Of an output matrix, or of the embedding."""
    return model.hidden_size * model.vocab_size


def exit_parameters(model: ModelConfig, exit: ExitConfig) -> int:
    """What an early exit doesn't share: its body, its norm, its output matrix, its gate."""
    D = model.hidden_size
    body = {"mlp": mlp_block_parameters(model), "layer": layer_parameters(model)}.get(exit.kind, 0)
    norm = D if exit.kind != "embed" and exit.norm == "own" else 0
    head = head_parameters(model) if exit.head == "own" else 0
    gate = (D + 2) * exit.gate_size + 1 if exit.gate_size else 0
    return body + norm + head + gate


def stage_parameters(model: ModelConfig, stage: Stage) -> int:
    """Of all that the stage holds."""
    return stage.num_layers * layer_parameters(model) + root_parameters(model, stage)


def root_parameters(model: ModelConfig, stage: Stage) -> int:
    """Of what the stage holds beside its layers: embedding, exits, final norm and output matrix."""
    exits = [exit for exit in model.exits if exit.layer in stage.exits]
    has_output = stage.is_last or any(exit.head == "tied" for exit in exits)
    has_norm = stage.is_last or any(exit.norm == "final" for exit in exits)
    is_embedding = model.tie_embeddings and stage.is_first
    num_matrices = stage.is_first + (has_output and not is_embedding)
    own = sum(exit_parameters(model, exit) for exit in exits)
    return num_matrices * head_parameters(model) + model.hidden_size * has_norm + own


def model_parameters(model: ModelConfig) -> int:
    """Of the whole model, each once."""
    whole = Stage(index=0, num_stages=1, first=1, last=model.num_layers, exits=model.exit_layers)
    return stage_parameters(model, whole)
