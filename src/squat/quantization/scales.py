"""Channel scales: what a matrix reads and the matrix itself, brought into balance channel by channel.

A channel may be divided by a number where it is made, in a norm's gain or in the rows of the matrix in front,
if the columns that read it are multiplied by the same number: the model computes what it did. What changes is
what rounding does. Behind a Hadamard transform the rounding error of a token is spread evenly over its
channels, and meets all columns: its square in the product grows with

    (sum of a_c^2 / s_c^2) * (sum of s_c^2 b_c^2)

with a_c the root mean square of channel c, b_c the length of column c and s_c the scale. That of the weights,
spread evenly over their rows, meets all channels, and is the same product. By Cauchy and Schwarz it is least
where s_c^2 = a_c / b_c: both sides then have the energy a_c * b_c.

Where activations have 8 bits the weights' error is what counts. Descent makes it small where a_c is large
(module `descent`): what is left of it grows with the sum of s_c^2 b_c^2 alone, which scales like these raise.
So such a site stays as it is, unless weights are rounded to the nearest.

SmoothQuant (arXiv 2211.10438, eq. 4) has this form with largest magnitudes in place of root mean squares;
OmniQuant and OSTQuant learn scales in the same places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from squat.architectures import Architecture, architecture_of
from squat.exact import ExactCenteredRMSNorm
from squat.quantization.config import ADAPTIVE, SITES, SquatConfig
from squat.quantization.modules import WIDE, stored_rows

_TOKENS = 1 << 13
"""Tokens that tell how large channels are."""
_LIMIT = 64.0
"""The largest scale, and one over the smallest: channels that are silent on some text may speak elsewhere."""
_SILENT = 1e-12


@torch.no_grad()
def balance_channels(
    model: PreTrainedModel,
    config: SquatConfig,
    batches: Sequence[Tensor],
    weights: str = "nearest",
) -> None:
    """Balance the channels of sites with the columns that read them, in place, where rounding hurts.

    Args:
        model: float, of transformers; it computes the same afterwards.
        config: which sites have less than 8 bits, for some tokens at least; they are balanced.
        batches: token ids, [batch, tokens] each; none: nothing is done.
        weights: how they will be rounded; if "nearest", to less than 8 bits, all sites are balanced.
    """
    balanced = set(SITES)
    if weights != "nearest" or config.weight_bits >= WIDE:
        balanced = {site for site in SITES if config.bits_of(site) in (ADAPTIVE, *range(WIDE))}
    if not balanced or not batches:
        return
    row = architecture_of(model.config.model_type)
    layers = list(model.get_submodule(row.layers).children())
    energies = _energies(model, row, layers, batches)
    for index, layer in enumerate(layers):
        own = row.of(layer)
        for site, path in own.makers.items():
            if site not in balanced:
                continue
            energy = energies[index, site]
            scales = _scales(energy, _columns(layer, own, site, energy))
            _divide(layer.get_submodule(path), scales, own.exact.get(path) is ExactCenteredRMSNorm)
            _multiply(layer, own, site, scales)
        if row.attends(layer) and "attn_out" in balanced:
            _balance_values(layer, row, model.config.get_text_config(), energies[index, "attn_out"])


def _energies(
    model: PreTrainedModel,
    row: Architecture,
    layers: Sequence[nn.Module],
    batches: Sequence[Tensor],
) -> dict[tuple[int, str], Tensor]:
    """Each channel's mean square, of tokens of length 1, by layer and site: [channels] each."""
    energies: dict[tuple[int, str], Tensor] = {}

    def looker(key: tuple[int, str]) -> Any:
        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = (args[0] if args else kwargs["hidden_states"]).float().flatten(0, -2)
            squares = x.square()
            # A few tokens are hundreds of times larger than all others, and have steps of their own.
            relative = squares / squares.sum(dim=1, keepdim=True).clamp_min(_SILENT)
            energies[key] = energies.get(key, 0.0) + relative.sum(dim=0)

        return look

    hooks = [
        layer.get_submodule(path).register_forward_pre_hook(looker((index, site)), with_kwargs=True)
        for index, layer in enumerate(layers)
        for site, path in row.of(layer).inputs.items()
    ]
    was_training, seen = model.training, 0
    model.eval()
    try:
        for batch in batches:
            model(input_ids=batch.to(model.device), use_cache=False, logits_to_keep=1)
            seen += batch.numel()
            if seen >= _TOKENS:
                break
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return energies


def _columns(layer: nn.Module, row: Architecture, site: str, energy: Tensor) -> Tensor:
    """The squared length of each column that reads a site, matrices counting alike: [channels]."""
    total = torch.zeros_like(energy)
    for path in row.readers[site]:
        squares = stored_rows(layer.get_submodule(path)).float().square().sum(dim=0)
        total += squares / (squares @ energy).clamp_min(_SILENT)
    return total


def _scales(energy: Tensor, columns: Tensor) -> Tensor:
    """The scales of channels, whose geometric mean is 1: [channels]."""
    ratio = (energy.clamp_min(_SILENT) / columns.clamp_min(_SILENT)).log() / 4
    return (ratio - ratio.mean()).exp().clamp(1 / _LIMIT, _LIMIT)


def _divide(maker: nn.Module, scales: Tensor, centered: bool) -> None:
    """Let a norm or a linear layer put out its channels divided by the scales."""
    weight = maker.get_parameter("weight")
    if centered:  # the gain is 1 + weight
        weight.copy_((weight + 1) / scales - 1)
    elif weight.dim() == 1:
        weight.div_(scales)
    else:
        stored_rows(maker).div_(scales[:, None])
    if getattr(maker, "bias", None) is not None:
        maker.get_parameter("bias").div_(scales)


def _multiply(layer: nn.Module, row: Architecture, site: str, scales: Tensor) -> None:
    """Let what reads a site expect its channels divided by the scales."""
    for path in row.readers[site]:
        stored_rows(layer.get_submodule(path)).mul_(scales)


def _balance_values(layer: nn.Module, row: Architecture, shape: Any, energy: Tensor) -> None:
    """Attention mixes tokens, not channels: the values' are divided, which several heads may share."""
    heads = shape.num_attention_heads
    key_heads = getattr(shape, "num_key_value_heads", None) or heads
    columns = _columns(layer, row, "attn_out", energy)
    shared = [x.view(key_heads, heads // key_heads, -1).sum(dim=1) for x in (energy, columns)]
    scales = _scales(shared[0].flatten(), shared[1].flatten()).view(key_heads, -1)
    maker = layer.get_submodule(row.value)
    for made in (stored_rows(maker), getattr(maker, "bias", None)):
        if made is not None:
            part = row.value_rows(made, *scales.shape)
            part.div_(scales.view(*scales.shape, *[1] * (part.dim() - 2)))
    every = scales[:, None].expand(-1, heads // key_heads, -1).reshape(-1)
    _multiply(layer, row, "attn_out", every)
