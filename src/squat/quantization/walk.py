"""A decoder, one layer at a time: what comes into a layer, and what reaches a module inside of it.

Calibration and reconstruction treat layers one after another, and each sees what the quantized layers before
it really hand on. So only one layer's activations are in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from squat.quantization.attention import TokenState


class _Reached(Exception):  # noqa: N818 - not an error
    """The forward pass has come as far as anybody wants to know."""


class Walk:
    """Some text on its way through a model's layers.

    Args:
        model: in eval mode.
        layers: its decoder layers.
        batches: token ids, [batch, tokens] each, all of one shape.
    """

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[nn.Module], batches: Sequence[Tensor]
    ) -> None:
        self.state: TokenState | None = getattr(model, "token_state", None)
        self.first: Tensor | None = None
        self.ranks: list[Tensor | None] = []
        self.widths: list[dict[int, Tensor]] = [{} for _ in batches]
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.hidden: list[Tensor] = []
        self.batch = 0
        self._enter(model, layers, batches)

    def _enter(
        self, model: PreTrainedModel, layers: Sequence[nn.Module], batches: Sequence[Tensor]
    ) -> None:
        """Everything that layers are called with beside the hidden states, and those of the first layer.

        No layer but the first is computed.
        """
        in_tuples = False

        def first(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.hidden.append(args[0] if args else kwargs["hidden_states"])
            if self.arguments:
                raise _Reached

        def form(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal in_tuples
            in_tuples = isinstance(output, tuple)

        def every(module: nn.Module, args: Any, kwargs: Any) -> None:
            others = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            self.arguments.append((args[1:], others))
            if len(self.arguments) == len(layers):
                raise _Reached

        def pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states,) if in_tuples else hidden_states

        hooks = [
            layers[0].register_forward_pre_hook(first, with_kwargs=True),
            layers[0].register_forward_hook(form),
            *(layer.register_forward_pre_hook(every, with_kwargs=True) for layer in layers),
        ]
        for layer in layers[1:]:
            layer.forward = pass_on
        try:
            for batch in batches:
                with contextlib.suppress(_Reached):
                    model(input_ids=batch, use_cache=False)
                self.ranks.append(None if self.state is None else self.state.ranks)
        finally:
            for hook in hooks:
                hook.remove()
            for layer in layers[1:]:
                del layer.forward
        if self.state is not None:
            self.first = self.state.first

    def outputs(self, layer: nn.Module, index: int) -> list[Tensor]:
        """What layer `index` makes of the hidden states."""
        return [self.output(layer, index, batch) for batch in range(len(self.hidden))]

    def step(self, layer: nn.Module, index: int) -> None:
        """Hand the hidden states on to the next layer."""
        self.hidden = self.outputs(layer, index)

    def inputs(
        self, layer: nn.Module, index: int, module: nn.Module, only: int | None = None
    ) -> list[Tensor]:
        """What reaches a module of a layer, before the module's own hooks see it; of all batches or one."""
        seen: list[Tensor] = []

        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        hook = module.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
        try:
            for batch in range(len(self.hidden)) if only is None else [only]:
                with contextlib.suppress(_Reached):
                    self.output(layer, index, batch)
        finally:
            hook.remove()
        return seen

    def watch(
        self, layer: nn.Module, index: int, modules: Sequence[nn.Module]
    ) -> tuple[list[list[Tensor]], list[Tensor]]:
        """In one pass over the whole layer: what each of the modules computes with, and what the layer makes.

        That is what their own hooks make of what reaches them.
        """
        seen: list[list[Tensor]] = [[] for _ in modules]

        def looker(at: int) -> Callable[..., None]:
            def look(module: nn.Module, args: Any, kwargs: Any) -> None:
                seen[at].append(args[0] if args else kwargs["hidden_states"])

            return look

        hooks = [
            module.register_forward_pre_hook(looker(at), with_kwargs=True)
            for at, module in enumerate(modules)
        ]
        try:
            return seen, self.outputs(layer, index)
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def answering(self, layer: nn.Module, path: str, answers: Sequence[Any]) -> Iterator[None]:
        """Inside, a module of a layer is not computed but answers, by batch, what it is told to."""
        module = layer.get_submodule(path)
        layer.set_submodule(path, _Answers(self, answers))
        try:
            yield
        finally:
            layer.set_submodule(path, module)

    def products(self, module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What a module of a layer makes of each batch's inputs, as `inputs` has seen them."""
        made = []
        for batch, x in enumerate(inputs):
            self.with_widths(batch)
            made.append(module(x))
        return made

    def with_widths(self, batch: int) -> TokenState | None:
        """The model's token state, with the widths that a batch's tokens have so far."""
        if self.state is not None:
            self.state.wide, self.state.first = self.widths[batch], self.first
            self.state.ranks = self.ranks[batch]
        return self.state

    def output(self, layer: nn.Module, index: int, batch: int) -> Tensor:
        """What layer `index` makes of one batch's hidden states."""
        self.with_widths(batch)
        self.batch = batch
        args, kwargs = self.arguments[index]
        answer = layer(self.hidden[batch], *args, **kwargs)
        output: Tensor = answer[0] if isinstance(answer, tuple) else answer
        return output


class _Answers(nn.Module):
    """Stands where a module stood, hooks and all, and knows what it says of each batch."""

    def __init__(self, walk: Walk, answers: Sequence[Any]) -> None:
        super().__init__()
        self.walk, self.answers = walk, answers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answers[self.walk.batch]
