"""The model card: README.md of a quantized model's folder, as the Hugging Face Hub shows it.

It says what the folder is, how it was made and what was measured, and nothing that was not. A card that
somebody wrote or changed is theirs: only one that still holds the line MARK is written anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCardData

from squat.data.files import writing
from squat.quantization.config import SquatConfig

NAME = "README.md"
MARK = "<!-- Written by squat, which replaces the file as long as this line is in it. -->"
_FILE_SECTION = "## In one file\n"


@dataclass(frozen=True)
class ModelCard:
    """What a card says.

    Attributes:
        config: how the model is quantized.
        base: the full-precision model, as the user named it.
        training: what was trained and for how long, in a phrase.
        measured: what was measured -> how much, and on what. May be empty.
        made: how the model was made, in Markdown.
    """

    config: SquatConfig
    base: str
    training: str
    made: str
    measured: Mapping[str, str] = field(default_factory=dict)

    def text(self, name: str) -> str:
        """The card of the model in a folder of this name."""
        config = self.config
        each = {"row": "row", "tensor": "matrix"}[config.weight_steps]
        weights = f"{config.weight_bits} bits, a step for each {each}"
        if config.weight_bits == 4 and config.weight_levels != "uniform":
            weights += f", levels {config.weight_levels}"
        facts = {
            "weights": weights,
            "activations": f"{config.activation_bits} bits, steps by token: {config.token_steps}",
            "keys and values": " and ".join(
                dict.fromkeys(f"{config.bits_of(s)} bits" for s in "kv")
            ),
            "embeddings and head": f"{config.embedding_bits} bits",
            "method": config.method,
            "transforms": f"Hadamard at {', '.join(config.hadamard)}"
            if config.hadamard
            else "none",
            "training": self.training,
        }
        parts = [
            f"---\n{self._front_matter()}\n---\n{MARK}\n",
            f"# {name}\n",
            f"`{self.base}`, quantized by Squat for CPUs.\n",
            _table(facts),
            f"## How it was made\n\n{self.made}\n",
        ]
        if self.measured:
            parts.append(f"## What was measured\n\n{_table(self.measured)}")
        parts.append(_USE.format(name=name))
        parts.append(f"{_FILE_SECTION}\n{_EXPORT.format(name=name)}")
        return "\n".join(parts)

    def _front_matter(self) -> str:
        data = ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["squat", f"{self.config.weight_bits}-bit", "quantized"],
        )
        if self.base.count("/") == 1 and not Path(self.base).exists():  # a name on the Hub
            data.base_model, data.base_model_relation = self.base, "quantized"  # type: ignore[attr-defined]
        return data.to_yaml()


_USE = """\
## In PyTorch

```python
from squat import SquatConfig  # registers the format; pip install 'squat[train]'
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
```
"""

_EXPORT = """\
```sh
squat export {name} model.gguf            # codes, steps and tokenizer, for Squat's engine
squat generate model.gguf "Once upon a time"
```
"""

_EXPORTED = """\
`{file}`, {megabytes:.1f} MB, holds codes, steps and tokenizer, for Squat's engine:

```sh
squat generate {file} "Once upon a time"
```
"""


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def write_card(card: ModelCard | None, name: str, partial: Path, there: Path) -> None:
    """Put the card into a folder that is being written; a user's own, in the folder it replaces, stays.

    Args:
        card: None: the folder has one only if the user wrote it.
        name: of the model.
        partial: the folder that is being written.
        there: the folder that it will replace, if there is one.
    """
    if (there / NAME).is_file() and MARK not in (there / NAME).read_text(errors="replace"):
        shutil.copyfile(there / NAME, partial / NAME)
    elif card is not None:
        (partial / NAME).write_text(card.text(name))


def tell_of_file(folder: Path, file: Path) -> None:
    """Let a folder's card speak of the file that was exported into the folder, if the card is ours."""
    if file.parent.resolve() != folder.resolve() or not (folder / NAME).is_file():
        return
    text = (folder / NAME).read_text(errors="replace")
    if MARK not in text or _FILE_SECTION not in text:
        return
    told = _EXPORTED.format(file=file.name, megabytes=file.stat().st_size / 1e6)
    with writing(folder / NAME) as out:
        out.write(f"{text.partition(_FILE_SECTION)[0]}{_FILE_SECTION}\n{told}".encode())
