"""Which of a model's certificates holds for a request, and for these very weights.

A certificate names the weights that it was made for by a hash over the backbone and the exits it uses, as they are in
memory: other exits, another base, another dtype or further training make it void, and it is refused.
"""

import hashlib
from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from eellm.config.calibrate import Certificate
from eellm.config.infer import Metric
from eellm.errors import CertificateError
from eellm.exits.lm import EarlyExitLM
from eellm.model.fingerprint import State, states

# a memo: what is in it follows from the model's weights, and goes when the model goes
_DIGESTS: WeakKeyDictionary[EarlyExitLM, dict[str, tuple[State, str]]] = WeakKeyDictionary()


def certified(model: EarlyExitLM, risk: float, metric: Metric) -> Certificate:
    """The model's certificate of this metric with the largest risk up to `risk`; of several the surest.

    Raises CertificateError where there is none, or those there are were made for other weights.
    """
    fitting = [c for c in model.certificates if c.metric == metric and c.risk <= risk]
    valid = [c for c in fitting if _is_for(c, model)]
    if valid:
        return max(valid, key=lambda c: (c.risk, c.confidence))
    if fitting:
        raise CertificateError(_other_weights(fitting[-1], model))
    have = ", ".join(f"{c.metric} {c.risk:g}" for c in model.certificates) or "none"
    raise CertificateError(
        f"risk = {risk:g}: the model has no certificate of {metric} up to that (it has: {have}); make one with "
        f"'eellm calibrate MODEL --text FILE --risk {risk:g} --metric {metric}'"
    )


def weights_sha256(model: EarlyExitLM, layers: Iterable[int]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the backbone and of the exits at `layers`, as they are in
    memory."""
    parts = [(f"decoder.{name}", tensor) for name, tensor in model.decoder.named_parameters()]
    for layer in layers:
        parts += [(f"exits.{layer}.{name}", tensor) for name, tensor in model.exit(layer).named_parameters()]
    known = _DIGESTS.setdefault(model, {})
    lines = []
    for (name, tensor), state in zip(parts, states(tensor for _, tensor in parts), strict=True):
        if name not in known or known[name][0] != state:
            known[name] = (state, _digest(tensor))
        lines.append(f"{name} {known[name][1]}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def dtype_of(model: EarlyExitLM) -> str:
    """That the model's weights have, as `eellm.load` takes it."""
    return str(model.decoder.embed.weight.dtype).removeprefix("torch.")


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data.data).hexdigest()}"


def _is_for(certificate: Certificate, model: EarlyExitLM) -> bool:
    layers = certificate.by_layer
    has_exits = layers.keys() <= set(model.config.exit_layers)
    return has_exits and weights_sha256(model, layers) == certificate.weights_sha256


def _other_weights(certificate: Certificate, model: EarlyExitLM) -> str:
    named = f"the certificate of {certificate.metric} {certificate.risk:g}"
    dtype = dtype_of(model)
    if dtype != certificate.dtype:
        return (
            f"{named} was made in {certificate.dtype}, and the model is loaded in {dtype}; load it in "
            f"{certificate.dtype}, or calibrate in {dtype}"
        )
    return (
        f"{named} was made for other weights than the model's (its exits or its base have changed since); run 'eellm "
        "calibrate' again"
    )
