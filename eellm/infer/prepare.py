"""From a model to the network that decodes it here, made once and found again as long as the weights are the same."""

from pathlib import Path
from weakref import WeakKeyDictionary

from eellm.errors import ConfigError
from eellm.exits.lm import EarlyExitLM
from eellm.infer.fixed import FixedNetwork
from eellm.infer.native.network import NativeNetwork, why_not
from eellm.infer.network import Network
from eellm.infer.packed import PackedNetwork
from eellm.infer.packing import Packed
from eellm.infer.quantize import Quantize
from eellm.model.fingerprint import states

# a memo: what is in it follows from the model's weights, and goes when the model goes
_NETWORKS: WeakKeyDictionary[EarlyExitLM, dict[object, tuple[object, Network]]] = WeakKeyDictionary()


def make_network(
    model: EarlyExitLM,
    *,
    quantize: Quantize | None = None,
    layers: range | None = None,
    cache_dir: Path | None = None,
    compile: bool | None = None,
    packed: Packed | None = None,
) -> Network:
    """quantize: matrices of so many bits. layers: unset, all. cache_dir: where rounded weights and kernels are kept.
    packed: matrices that others have made.

    compile: on CUDA, whether passes are recorded as graphs. Elsewhere whether to run kernels of our own, built for this
    processor; unset, where they can be; ConfigError, with the reason, where they are asked for and can't.
    """
    first = 1 if layers is None else layers[0]
    weight = model.decoder.layer(first).attn_norm.weight
    if weight.device.type == "cuda" and compile is not False:
        return FixedNetwork(model, quantize, layers, cache_dir, packed)
    reason = None if compile is False else why_not(model, weight, cache_dir)
    if compile and reason is not None:
        raise ConfigError(f"compile = True: {reason}")
    if compile is False or reason is not None:
        return PackedNetwork(model, quantize, layers, cache_dir, packed)
    return NativeNetwork(model, quantize, layers, cache_dir, packed)


def network_of(
    model: EarlyExitLM,
    quantize: Quantize | None = None,
    cache_dir: Path | None = None,
    compile: bool | None = None,
    packed: Packed | None = None,
) -> Network:
    """The model's network; made anew when its weights have changed since."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    state = names, states(parameters)
    made = _NETWORKS.setdefault(model, {})
    key = (quantize, compile)
    if key not in made or made[key][0] != state:
        made[key] = (state, make_network(model, quantize=quantize, cache_dir=cache_dir, compile=compile, packed=packed))
    return made[key][1]
