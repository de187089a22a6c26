"""Which part of a model does quantization hurt most? (paper, Figure 1)

Each group of quantizers (MLP, attention, q and k, every site, every layer) is switched on alone, in a model
that is quantized without training, and compared with full precision on the same text: the loss it adds, and
what explains it, the mean squared error and the KL divergence at the logits. All groups see the same steps,
those of a calibration of the whole model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from squat.architectures import architecture_of
from squat.modes import evaluating
from squat.quantization.config import SITES
from squat.quantization.modules import QuantizedWeight, SiteQuantizer
from squat.quantization.quantizers import LearnedStepQuantizer
from squat.terminal import track


@dataclass(frozen=True)
class Group:
    """Some quantizers: the names of the weight modules and of the sites they belong to."""

    kind: str
    name: str
    members: frozenset[str]


@dataclass(frozen=True)
class Effect:
    """What one group does, compared with full precision.

    loss: nats per predicted token; added: above full precision's; mse: mean squared error of a logit;
    kl: mean KL(full precision || quantized) per position, nats.
    """

    kind: str
    name: str
    loss: float
    added: float
    mse: float
    kl: float


@contextmanager
def only(model: nn.Module, members: Collection[str]) -> Iterator[None]:
    """Inside, only these quantizers of the model are on."""
    off: list[LearnedStepQuantizer | SiteQuantizer] = []
    for name, module in list(model.named_modules()):
        if name in members:
            continue
        if isinstance(module, QuantizedWeight):
            off.append(module.weight_quantizer)
        elif isinstance(module, SiteQuantizer):
            off.append(module)
    for quantizer in off:
        quantizer.bypassed = True
    try:
        yield
    finally:
        for quantizer in off:
            quantizer.bypassed = False


def groups_of(model: PreTrainedModel) -> list[Group]:
    """The groups of a quantized model, from the whole down to single sites and layers."""
    row = architecture_of(model.config.model_type)
    weights = {n for n, m in model.named_modules() if isinstance(m, QuantizedWeight)}
    sites = {n: m.site for n, m in model.named_modules() if isinstance(m, SiteQuantizer)}
    in_layers = {n for n in weights | set(sites) if n.startswith(row.layers + ".")}

    def rest(name: str) -> str:
        """The part of a name behind the number of its layer."""
        return name[len(row.layers) + 1 :].partition(".")[2]

    kinds = (row, row.convolution or row)
    mixers = tuple(f"{kind.attention}." for kind in kinds)
    attention = {n for n in in_layers if rest(n).startswith(mixers)}
    wholes = {
        "everything": weights | set(sites),
        "all weights": weights,
        "all activations": set(sites),
        "attention": attention,
        "MLP": in_layers - attention,
        "q and k": {n for n, site in sites.items() if site in ("q", "k")},
        "embeddings and head": (weights | set(sites)) - in_layers,
    }
    found = [Group("module", name, frozenset(members)) for name, members in wholes.items()]
    for site in SITES:
        members = frozenset(n for n, s in sites.items() if s == site)
        found.append(Group("site", site, members))
    for index in range(len(list(model.get_submodule(row.layers).children()))):
        prefix = f"{row.layers}.{index}."
        members = frozenset(n for n in in_layers if n.startswith(prefix))
        found.append(Group("layer", f"layer {index}", members))
    return [group for group in found if group.members]


@torch.no_grad()
def sensitivity(
    model: PreTrainedModel, windows: Tensor, batch_size: int = 16
) -> tuple[float, list[Effect]]:
    """The full-precision loss in nats per token, and the effect of every group.

    Args:
        model: a quantized model, calibrated and not trained.
        windows: token ids [windows, tokens].
        batch_size: windows in one forward pass.
    """
    groups = groups_of(model)
    sums = torch.zeros(len(groups), 3, dtype=torch.float64)
    full = 0.0
    batches = windows.split(batch_size)
    steps = [(batch, index) for batch in batches for index in range(len(groups))]
    reference = torch.zeros(0)
    with evaluating(model), track(steps, "Sensitivity") as bar:
        for batch, index in bar:
            if index == 0:
                with only(model, ()):
                    reference = model(batch.to(model.device), use_cache=False).logits.float()
                full += _loss(reference, batch)
            with only(model, groups[index].members):
                logits = model(batch.to(model.device), use_cache=False).logits.float()
            sums[index] += torch.tensor(_compare(reference, logits, batch), dtype=torch.float64)
    predicted, positions = windows[:, 1:].numel(), windows.numel()
    full /= predicted
    effects = []
    for group, (loss, squares, kl) in zip(groups, sums.tolist(), strict=True):
        mean = loss / predicted
        mse = squares / positions / reference.shape[-1]
        effects.append(Effect(group.kind, group.name, mean, mean - full, mse, kl / positions))
    return full, effects


def _loss(logits: Tensor, ids: Tensor) -> float:
    """Summed over the predicted tokens."""
    targets = ids[:, 1:].to(logits.device).flatten()
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum"))


def _compare(reference: Tensor, logits: Tensor, ids: Tensor) -> Sequence[float]:
    """Sums over a batch: loss, squared error of the logits, KL divergence."""
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    kl = F.kl_div(q, p, log_target=True, reduction="sum")
    return _loss(logits, ids), float((reference - logits).square().sum()), float(kl)
