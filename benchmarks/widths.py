"""How good the smaller models inside a model are, which use only a share of each feed-forward layer.

    python benchmarks/widths.py MODEL --data TEXT [--steps 100] [--json FILE]

Of a model whose down projections are called `down_proj` (as Llama has them), in float: codes would come
on top. A layer's units are ordered by what they bring to its output on 16 windows of 256 tokens of the text,
the mean square of a unit's activation times the squared norm of its column. Three quarters are taken of every
layer, or mixed: half of the layers that suffer least from it alone, and all of the others. Then `--steps` of
distillation from the original, on batches of 4 other windows, train the feed-forward layers at all widths at
once (MatFormer, arXiv 2310.07707). KL(original || width) on the last 16 windows, nats a token.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from squat.checkpoints import load_model, load_tokenizer
from squat.data.files import writing
from squat.hardware import bfloat16_pays
from squat.runs import BATCH, distance, text_windows
from squat.terminal import progress, show

WINDOWS, TOGETHER, LEARNING_RATE = 16, 4, 2e-5


class Units:
    """Lets through what the first units of each layer compute, the most important ones first.

    Attributes:
        shares: of its units that each layer uses; all of them where it is 1.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor) -> None:
        self.downs = [m for name, m in model.named_modules() if name.endswith("down_proj")]
        self.squares = [torch.zeros(down.in_features) for down in self.downs]
        self.ranks: list[Tensor] = []
        self.shares = [1.0] * len(self.downs)
        for layer, down in enumerate(self.downs):
            down.register_forward_pre_hook(lambda _, args, layer=layer: self._pass(args[0], layer))
        with torch.no_grad():
            for batch in windows.split(BATCH):
                model(batch, use_cache=False, logits_to_keep=1)
        for squares, down in zip(self.squares, self.downs, strict=True):
            brought = squares * down.weight.detach().square().sum(dim=0)
            self.ranks.append(brought.argsort(descending=True).argsort())

    def _pass(self, x: Tensor, layer: int) -> Tensor:
        if not self.ranks:
            self.squares[layer] += x.square().sum(dim=(0, 1))
            return x
        return x * (self.ranks[layer] < self.shares[layer] * x.shape[-1])

    def mixed(
        self, original: PreTrainedModel, model: PreTrainedModel, windows: Tensor
    ) -> list[float]:
        """Half of those layers, one in two, that suffer least from it alone."""
        harm = []
        for layer in range(len(self.downs)):
            self.shares = [0.5 if other == layer else 1.0 for other in range(len(self.downs))]
            harm.append(distance(original, model, [windows]).kl)
        ranks = torch.tensor(harm).argsort().argsort()
        return [0.5 if rank < len(harm) // 2 else 1.0 for rank in ranks.tolist()]


def train(
    original: PreTrainedModel,
    model: PreTrainedModel,
    units: Units,
    widths: list[list[float]],
    windows: Tensor,
) -> None:
    """One pass over the windows: each batch at every width, against the original's probabilities."""
    batches = windows.split(TOGETHER)
    learned = [p for name, p in model.named_parameters() if ".mlp." in name]
    optimizer = torch.optim.AdamW(learned, LEARNING_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    with progress("training") as tell, torch.autocast("cpu", enabled=bfloat16_pays()):
        for done, batch in enumerate(batches):
            with torch.no_grad():
                expected = original(batch, use_cache=False).logits.float().softmax(-1)
            for units.shares in widths:
                logits = model(batch, use_cache=False).logits.float()
                nn.functional.cross_entropy(logits.flatten(0, 1), expected.flatten(0, 1)).backward()
            nn.utils.clip_grad_norm_(learned, len(widths))
            optimizer.step()
            model.zero_grad()
            schedule.step()
            tell(done + 1, len(batches))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="a float model: a folder, a name on the Hub, a .gguf file")
    parser.add_argument("--data", type=Path, required=True, help="a text")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    original = load_model(arguments.model).eval()
    tokenizer = load_tokenizer(arguments.model)
    count = 2 * WINDOWS + TOGETHER * arguments.steps
    windows = text_windows(original, tokenizer, arguments.data, True, count)
    seen, trained, others = windows[:WINDOWS], windows[WINDOWS:-WINDOWS], windows[-WINDOWS:]
    model = copy.deepcopy(original)
    units = Units(model, seen)
    layers = len(units.downs)
    widths = {
        "everything": [1.0] * layers,
        "three quarters": [0.75] * layers,
        "mixed": units.mixed(original, model, seen[:TOGETHER]),
        "half": [0.5] * layers,
    }
    found: dict[str, list[float]] = {name: [] for name in widths}
    for trains in (False, True):
        if trains:
            train(original, model.train(), units, list(widths.values()), trained)
        for name, units.shares in widths.items():
            found[name].append(distance(original, model, others.split(BATCH)).kl)
    table = Table("feed-forward units", "KL", f"after {arguments.steps} steps")
    for name, kls in found.items():
        table.add_row(name, *(f"{kl:.3f}" for kl in kls))
    show(table)
    if arguments.json is not None:
        with writing(arguments.json) as out:
            out.write(json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    main()
