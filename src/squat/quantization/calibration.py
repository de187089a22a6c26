"""Calibration: every step of a converted model, from its weights and from some text.

Layers come one after another, and the sites of a layer in the order of computation. Each site sees what the
quantized network in front of it computes. Weights are rounded to the nearest code, or each matrix as a whole
("descent"): its input is then what the quantized network has there, and its product is compared with that of
the float model on the same text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from squat.architectures import architecture_of
from squat.errors import ConfigError
from squat.exact import approximately
from squat.quantization.attention import AttentionSites
from squat.quantization.config import FLOAT, SquatConfig
from squat.quantization.convert import site_of
from squat.quantization.descent import Evidence, best_damping, descend
from squat.quantization.modules import WIDE, QuantizedWeight, SiteQuantizer, stored_rows
from squat.quantization.numerics import Snap
from squat.quantization.quantizers import DorefaQuantizer, method_of
from squat.quantization.tokens import ThresholdPolicy, follow_importance
from squat.quantization.walk import Walk

ROUNDINGS = ("nearest", "descent")
"""How weights find their codes."""
SWEEPS = 4
_ROWS = 1 << 14
"""Rows of a matrix that are rounded at once: an embedding has many."""
_HEAD_BATCHES = 4
"""Every such batch tells what the head's inputs are like."""
_ATTENTION_BATCHES = 2
"""Batches that the sites inside of an attention are calibrated on: they keep a sample only."""
_LAST_SITES = ("attn_out", "mlp_mid")
"""Their products are what an attention or an MLP makes."""
_SILENT = 1e-12

Progress = Callable[[int, int], None]
"""Called with the number of layers that are done, and of all."""


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    config: SquatConfig,
    batches: Sequence[Tensor],
    weights: str = "nearest",
    progress: Progress | None = None,
) -> None:
    """Set every step size, level and token threshold, and with "descent" the weights, in place.

    Args:
        model: converted, with float weights that expect transformed inputs.
        batches: token ids, [batch, tokens] each, all of one shape; "descent" wants some ten thousand tokens.
        weights: a row of `ROUNDINGS`.

    Raises:
        ConfigError: a rounding that does not exist, or does not go with the method.
    """
    if weights not in ROUNDINGS:
        raise ConfigError(
            f"weights: {weights!r} does not exist; choose one of {', '.join(ROUNDINGS)}"
        )
    descent = weights == "descent" and config.weight_bits != FLOAT
    if descent and issubclass(method_of(config.method).weights, DorefaQuantizer):
        raise ConfigError(
            f"weights: method {config.method!r} quantizes tanh(w), for which there is no descent; "
            "choose nearest"
        )
    if descent:
        _check_enough(model, batches)
    was_training = model.training
    model.eval()
    with approximately():
        _Calibration(model, config, batches, descent).run(progress)
    model.train(was_training)


def _check_enough(model: PreTrainedModel, batches: Sequence[Tensor]) -> None:
    """As many tokens as a layer has inputs: with fewer, some of what a weight does is never seen."""
    row = architecture_of(model.config.model_type)
    inputs = max(
        stored_rows(layer.get_submodule(name)).shape[1]
        for layer in model.get_submodule(row.layers).children()
        for name in row.of(layer).weights
    )
    tokens = sum(batch.numel() for batch in batches)
    if tokens < inputs:
        raise ConfigError(
            f"calibration: {tokens} tokens are too few for descent where a layer has {inputs} inputs; give "
            f"at least {inputs} ({10 * inputs} are better), or choose weights nearest"
        )


class _Calibration:
    """One model on its way through its layers; `reference` is the float model on the same text."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: SquatConfig,
        batches: Sequence[Tensor],
        descent: bool,
    ) -> None:
        # A walk calls every layer with the arguments of the first batch.
        batches = [b.to(model.device) for b in batches if b.shape == batches[0].shape]
        self.model, self.config, self.descent = model, config, descent
        self.row = architecture_of(model.config.model_type)
        self.layers = list(model.get_submodule(self.row.layers).children())
        for module in model.modules():
            if isinstance(module, SiteQuantizer):
                module.start_collecting(keep=False)
        if config.ranks_tokens:
            _rank_tokens(model, batches)
        if descent:
            with _unquantized(model):
                self.reference = Walk(model, self.layers, batches)
            self.reference.state = None
        outer = [model.get_submodule(name) for name in (*self.row.embeddings, self.row.head)]
        for module in outer[:-1] if _tied(outer) else outer:
            self._round_to_nearest(module)
        if descent and config.embedding_bits < WIDE:
            self._head(batches[::_HEAD_BATCHES])
        self.stream = Walk(model, self.layers, batches)

    def run(self, progress: Progress | None) -> None:
        """All layers, then the head."""
        for index, layer in enumerate(self.layers):
            self._layer(index, layer)
            if progress is not None:
                progress(index + 1, len(self.layers))
        norm = self.model.get_submodule(self.row.norm)
        site = site_of(self.model.get_submodule(self.row.head))
        site.start_collecting()
        for hidden in self.stream.hidden:
            site(norm(hidden))
        site.initialize(self.config.init)

    def _head(self, batches: Sequence[Tensor]) -> None:
        """A head of few bits is rounded as a whole, for the inputs that the float model has there.

        At the beginning: a tied head is the embedding, too, and everything behind that is calibrated on it.
        """
        head = self.model.get_submodule(self.row.head)
        site = site_of(head)
        evidence = Evidence(stored_rows(head).shape[1])

        def look(module: nn.Module, args: Any, output: Tensor) -> None:
            inputs = site.transformed(output)
            evidence.add(inputs, inputs)

        hook = self.model.get_submodule(self.row.norm).register_forward_hook(look)
        try:
            with _unquantized(self.model):
                for batch in batches:
                    self.model(input_ids=batch, use_cache=False, logits_to_keep=1)
        finally:
            hook.remove()
        _round_as_a_whole([head], evidence)

    def _layer(self, index: int, layer: nn.Module) -> None:
        stream, row = self.stream, self.row.of(layer)
        names = row.inputs
        originals: dict[str, list[Tensor]] = {}
        if self.descent:
            twin = _original(layer)
            modules = [twin.get_submodule(name) for name in names.values()]
            seen, after = self.reference.watch(twin, index, modules)
            originals = dict(zip(names, seen, strict=True))
            del twin
        with ExitStack() as stack:
            for site_name, name in names.items():
                if site_name == "attn_out" and self.row.attends(layer):
                    self._attention(index, layer)
                inputs = self._site(index, layer, site_name, name, originals.get(site_name))
                if site_name in _LAST_SITES:  # of a module, which need not be computed again
                    answers: list[Any] = stream.products(layer.get_submodule(name), inputs)
                    if site_name == "attn_out" and self.row.attends(layer):
                        answers = [(answer, None) for answer in answers]
                    whole = name.rpartition(".")[0]
                    stack.enter_context(stream.answering(layer, whole, answers))
            stream.step(layer, index)
        if self.descent:
            self.reference.hidden = after

    def _site(
        self,
        index: int,
        layer: nn.Module,
        site_name: str,
        name: str,
        originals: list[Tensor] | None,
    ) -> list[Tensor]:
        """One input of matrices, which is returned: its steps, then the matrices."""
        module = layer.get_submodule(name)
        site = site_of(module)
        inputs = self.stream.inputs(layer, index, module)
        site.start_collecting()
        for batch, x in enumerate(inputs):
            site(x, self._wide(site, batch))
        site.initialize(self.config.init)
        readers = [layer.get_submodule(reader) for reader in self.row.of(layer).readers[site_name]]
        for reader in readers:
            self._round_to_nearest(reader)
        if originals is not None:
            evidence = self._evidence(site, inputs, originals)
            _round_as_a_whole(readers, evidence)
        return inputs

    def _attention(self, index: int, layer: nn.Module) -> None:
        """The threshold of a layer's tokens, then the sites inside of its attention."""
        attention = layer.get_submodule(self.row.attention)
        squat: AttentionSites = attention.squat  # type: ignore[assignment]
        output = layer.get_submodule(self.row.inputs["attn_out"])
        if isinstance(squat.policy, ThresholdPolicy):
            squat.policy.train()
            for batch in range(len(self.stream.hidden)):
                self.stream.inputs(layer, index, output, only=batch)
                follow_importance(attention)
            squat.policy.eval()

        def attend() -> None:
            for batch in range(min(_ATTENTION_BATCHES, len(self.stream.hidden))):
                self.stream.inputs(layer, index, output, only=batch)

        _center(squat.sites["k"], attend)
        for site in squat.sites.values():
            site.start_collecting()  # type: ignore[operator]
        attend()
        for site in squat.sites.values():
            site.initialize(self.config.init)  # type: ignore[operator]

    def _wide(self, site: SiteQuantizer, batch: int) -> Tensor | None:
        state = self.stream.with_widths(batch)
        wide = None if state is None else state.width_for(site)
        return None if wide is None else wide[..., None]

    def _evidence(
        self, site: SiteQuantizer, inputs: list[Tensor], originals: list[Tensor]
    ) -> Evidence:
        evidence = Evidence(inputs[0].shape[-1])
        for batch, (x, original) in enumerate(zip(inputs, originals, strict=True)):
            evidence.add(site(x, self._wide(site, batch)), original)
        return evidence

    def _round_to_nearest(self, module: nn.Module) -> None:
        if isinstance(module, QuantizedWeight):
            module.weight_quantizer.initialize(module.get_parameter("weight"), self.config.init)


def _rank_tokens(model: PreTrainedModel, batches: Sequence[Tensor]) -> None:
    """Number the vocabulary's tokens by how often they stand in the text, the most frequent first.

    Tokens as frequent as each other stay in the tokenizer's order, which has frequent ones first, too.
    """
    ranks = model.base_model.get_buffer("token_ranks")
    tokens = torch.cat([batch.flatten() for batch in batches])
    counts = torch.bincount(tokens, minlength=len(ranks))
    ranks.copy_(counts.argsort(descending=True, stable=True).argsort())


def _center(keys: nn.Module, attend: Callable[[], None]) -> None:
    """Set the center of a site of keys, if it has one: their mean while `attend` runs.

    Weighted by one over their squared length, as errors count: the keys of a few tokens are much longer.
    """
    assert isinstance(keys, SiteQuantizer)
    if keys.center is None:
        return
    total, count = torch.zeros_like(keys.center), torch.zeros_like(keys.center[..., :1])

    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        share = 1 / output.square().sum(dim=-1, keepdim=True).clamp_min(_SILENT)
        total.add_((output * share).sum(dim=(0, 2))[:, None])
        count.add_(share.sum(dim=(0, 2))[:, None])

    keys.start_collecting(keep=False)  # what it passes on is transformed and no more
    hook = keys.register_forward_hook(look)
    try:
        attend()
    finally:
        hook.remove()
    keys.center.copy_(total / count)


def _tied(modules: Sequence[nn.Module]) -> bool:
    """Whether the last of them has the first one's weight."""
    return modules[-1].weight is modules[0].weight


def _round_as_a_whole(modules: Sequence[nn.Module], evidence: Evidence) -> None:
    """All matrices that read one site; the first one says for all how hard they are held."""
    readers = [module for module in modules if isinstance(module, QuantizedWeight)]
    weights = [stored_rows(reader) for reader in readers]
    steps = [reader.weight_quantizer.step.view(-1, 1) for reader in readers]
    rounded = _codes_next_to(readers[0].weight_quantizer, weights[0].device)
    damping = best_damping(weights[0], steps[0], rounded, evidence)
    moments, parts = evidence.all, (weights, steps)
    if len(steps[0]) > 1:  # rows with steps of their own do not ask whose they are
        parts = (torch.cat(weights).split(_ROWS), torch.cat(steps).split(_ROWS))
    found = [
        descend(part, of_part, rounded, moments, SWEEPS, damping)
        for part, of_part in zip(*parts, strict=True)
    ]
    rows = torch.cat([part for part, _ in found]).split([len(weight) for weight in weights])
    fitted = torch.cat([of_part for _, of_part in found]).split([len(part) for part in steps])
    for reader, weight, part, of_part in zip(readers, weights, rows, fitted, strict=True):
        reader.weight_quantizer.start_at(of_part)
        weight.copy_(part)


def _codes_next_to(quantizer: Any, device: torch.device) -> Snap:
    low, high, snap = quantizer.qmin, quantizer.qmax, quantizer.snap(device)

    def rounded(quotients: Tensor) -> Tensor:
        codes = quotients.round_().clamp_(low, high)
        return codes if snap is None else snap(codes)

    return rounded


def _original(layer: nn.Module) -> nn.Module:
    """A copy of a layer of a converted model that computes as the float layer did."""
    twin = copy.deepcopy(layer)
    for module in twin.modules():
        if isinstance(module, QuantizedWeight):
            module.weight_quantizer.bypassed = True
        elif isinstance(module, SiteQuantizer):
            module.start_collecting(keep=False)
            module.adaptive = False
        elif isinstance(module, AttentionSites):
            module.policy = None
    return twin


@contextmanager
def _unquantized(model: nn.Module) -> Iterator[None]:
    """Inside, weights are what they were before they were quantized."""
    quantizers = [m.weight_quantizer for m in model.modules() if isinstance(m, QuantizedWeight)]
    for quantizer in quantizers:
        quantizer.bypassed = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.bypassed = False
