"""Recipes: YAML files that say what to train, checked before anything runs.

A recipe is a pydantic model. Whatever is wrong with one (an unknown key, a value out of range, a file
that is not there) is reported with the file, the line, the field, the value and what is possible.
Environment variables in paths (`${SQUAT_DATA}/babylm/train`) are expanded.

A sweep is a recipe that all its runs share, and what each of them has of its own.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic import model_validator as validates_model

from squat.data.corpus import FIELD
from squat.distill.losses import LossConfig
from squat.errors import ConfigError
from squat.model_names import is_gguf
from squat.quantization import SquatConfig
from squat.reconstruction import Reconstruction

_MOST_NODES = 20_000
"""Of a file. A few aliases of aliases stand for more than there is memory."""


def _expand(path: str) -> str:
    expanded = os.path.expanduser(os.path.expandvars(path))
    if missing := re.search(r"\$\{?(\w+)", expanded):
        raise ValueError(f"the environment variable {missing[1]} is not set")
    if expanded.startswith("~"):
        raise ValueError(f"{expanded}: no home folder is known; write the path without ~")
    return expanded


def _existing(path: str) -> str:
    expanded = _expand(path)
    if not Path(expanded).exists():
        raise ValueError(f"{expanded} does not exist")
    return expanded


def _model_reference(name: str) -> str:
    """A folder, a .gguf file, or something that can be a name on the Hugging Face Hub."""
    expanded = _expand(name)
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", expanded) and not is_gguf(expanded)
    if Path(expanded).exists() or hub:
        return expanded
    raise ValueError(
        f"{expanded} is neither a folder nor a .gguf file nor a model's name on the Hub (owner/name)"
    )


NewPath = Annotated[str, AfterValidator(_expand)]
ExistingPath = Annotated[str, AfterValidator(_existing)]
ModelReference = Annotated[str, AfterValidator(_model_reference)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Generate(_Section):
    """Data-free training text, sampled by the full-precision model itself."""

    tokens: int = Field(gt=0)


class Data(_Section):
    """Where training text comes from: a corpus, or the model itself."""

    train: ExistingPath | None = Field(
        None, description="a folder or file of text, or a file that squat tokenize wrote"
    )
    generate: Generate | None = None
    by_source: bool = Field(True, description="clean BabyLM's files by source")
    sequence_length: int = Field(128, ge=2)
    field: str = Field(FIELD, description="holds the text in .jsonl, .parquet and .arrow files")
    cache: NewPath | None = Field(
        None, description="where tokenized text is kept; default: see squat.data.cache"
    )

    @validates_model(mode="after")
    def _one_source(self) -> Data:
        if (self.train is None) == (self.generate is None):
            raise ValueError("give either train (a folder or file of text) or generate (data-free)")
        return self


class Training(_Section):
    """The optimization; defaults are the paper's for LLaMA-58M."""

    steps: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(32, gt=0, description="sequences in one forward pass")
    accumulate: int = Field(1, gt=0, description="forward passes per step")
    learning_rate: float = Field(2.5e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_steps: int = Field(200, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="of gradients and teachers; auto: bf16 where that is faster"
    )
    compile: bool = Field(False, description="torch.compile: minutes at the start, faster steps")
    save_every: int = Field(100, gt=0, description="steps between checkpoints")
    log_every: int = Field(10, gt=0)
    seed: int = 0

    @validates_model(mode="after")
    def _one_length(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self


class Distillation(Training):
    """Training of a quantized student."""

    step_learning_rate: float = Field(1e-2, gt=0, description="of the logarithms of the step sizes")
    codes: Literal["trained", "frozen"] = Field(
        "trained",
        description="frozen: train steps, norms and biases, and leave the weights' codes as they are",
    )


class ModelShape(_Section):
    """A model to train from scratch: transformers' `model_type` and its config's fields."""

    model_config = ConfigDict(extra="allow")
    model_type: str


class TokenizerTraining(_Section):
    """A byte-level BPE tokenizer to train on the training text."""

    vocab_size: int = Field(16_000, ge=259)
    min_frequency: int = Field(2, ge=1)


class PretrainRecipe(_Section):
    """`squat pretrain`: a full-precision model from scratch."""

    output: NewPath
    model: ModelShape
    tokenizer: TokenizerTraining | ExistingPath = TokenizerTraining()
    data: Data
    training: Training


class KeptAnswers(_Section):
    """A cache of the teachers' logits: epochs and runs after the first need not ask them.

    Windows are then the same in every epoch, in another order, rather than cut anew. The attention-map loss
    needs the first teacher's maps, which are not kept: with it, the first teacher runs in every step.
    """

    folder: NewPath
    draws: int = Field(64, gt=0, description="entries drawn from each distribution, 2 bytes each")


class TrainRecipe(_Section):
    """`squat train`: quantization-aware training of an existing model."""

    output: NewPath
    model: ModelReference = Field(description="the full-precision model to start from")
    teachers: list[ModelReference] | None = Field(None, description="default: the model itself")
    teacher_cache: KeptAnswers | None = None
    data: Data
    quantized: ExistingPath | None = Field(
        None,
        description="where training starts: a folder that squat quantize made of the model; bits and all "
        "else that quantize, weights and reconstruction would say are its own",
    )
    quantize: SquatConfig = Field(default_factory=SquatConfig)
    weights: Literal["nearest", "descent"] = Field(
        "descent",
        description="where training starts: each weight rounded by itself, or each matrix as a whole",
    )
    reconstruction: Reconstruction | None = Field(
        None, description="train each layer by itself before the whole"
    )
    loss: LossConfig = LossConfig()
    training: Distillation

    @validates_model(mode="after")
    def _cache_saves_something(self) -> TrainRecipe:
        if self.teacher_cache and self.loss.distribution > 0 and len(self.teachers or [""]) == 1:
            raise ValueError(
                "teacher_cache: the attention-map loss needs the only teacher in every step, whose logits "
                "then cost nothing; set loss.distribution to 0, or leave the cache out"
            )
        if self.teacher_cache and self.loss.top_k is not None:
            raise ValueError(
                "teacher_cache: it keeps draws from all entries, which loss.top_k would leave out; choose one"
            )
        if self.teacher_cache and self.loss.gamma == 0:
            raise ValueError("teacher_cache: with loss.gamma 0 no teacher's logits are asked for")
        return self

    @property
    def unsaid(self) -> set[str]:
        """The fields that mean nothing here, as a quantized model has its own."""
        return set() if self.quantized is None else {"quantize", "weights", "reconstruction"}

    @validates_model(mode="after")
    def _starts_in_one_place(self) -> TrainRecipe:
        for name in sorted(self.unsaid & self.model_fields_set):
            raise ValueError(
                f"quantized: {name} is given, too, but {self.quantized} is quantized already; leave one "
                "of them out"
            )
        return self

    @field_validator("quantize", mode="before")
    @classmethod
    def _checked_config(cls, value: Any) -> SquatConfig:
        if isinstance(value, SquatConfig):
            return value
        if not isinstance(value, dict):
            raise ValueError("a mapping of SquatConfig's fields is needed")
        known = [field.name for field in dataclasses.fields(SquatConfig)]
        for key in value:
            if key not in known:
                raise ValueError(f"{key}: no such field; known are {', '.join(known)}")
        try:
            return SquatConfig(**value)
        except ConfigError as error:
            raise ValueError(str(error)) from None


class Evaluation(_Section):
    """What every model of a sweep is measured on, through the engine wherever it can run the model."""

    text: ExistingPath | None = Field(None, description="loss in nats per token on this text")
    sequence_length: int = Field(128, ge=2, description="tokens per window of the text")
    by_source: bool = Field(True, description="clean BabyLM's files by source")
    pairs: list[ExistingPath] = Field([], description="folders of minimal pairs, such as BLiMP")
    limit: int | None = Field(None, ge=1, description="pairs per paradigm; default: all")

    @validates_model(mode="after")
    def _something(self) -> Evaluation:
        if self.text is None and not self.pairs:
            raise ValueError("give text, or pairs, or both")
        return self


RunName = Annotated[str, Field(pattern=r"^[\w.+-]+$")]


class Sweep(_Section):
    """`squat sweep`: what all runs share, what each has of its own, and what they are measured on."""

    output: NewPath = Field(description="each run has the folder OUTPUT/NAME/seed-SEED")
    base: dict[str, Any] = Field(description="a training recipe without its output")
    runs: dict[RunName, dict[str, Any] | None] = Field(
        min_length=1, description="name -> what departs from the base"
    )
    seeds: list[int] = Field([0], min_length=1, description="each run is trained with each")
    full_precision: bool = Field(True, description="measure the first run's own model as well")
    evaluate: Evaluation

    @field_validator("base")
    @classmethod
    def _without_output(cls, base: dict[str, Any]) -> dict[str, Any]:
        if "output" in base:
            raise ValueError("output: the sweep names the folder of every run; leave it out here")
        return base


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One training run of a sweep."""

    name: str
    seed: int
    recipe: TrainRecipe


Recipe = TypeVar("Recipe", PretrainRecipe, TrainRecipe, Sweep)


def read_recipe(file: str | Path, kind: type[Recipe]) -> Recipe:
    """A recipe of the given kind from a YAML file.

    Raises:
        ConfigError: no such file, no YAML, or anything in it that is not possible; with its line.
    """
    root, content = _parse(file)
    return _checked(kind, content, file, root)


def read_sweep(file: str | Path) -> tuple[Sweep, list[SweepRun]]:
    """A sweep and its runs in the order of the file, the seeds of a run one after the other.

    Raises:
        ConfigError: as in `read_recipe`, for the sweep and for the recipe of every run.
    """
    root, content = _parse(file)
    sweep = _checked(Sweep, content, file, root)
    runs = []
    for name, own in sweep.runs.items():
        for seed in sweep.seeds:
            place = {"output": f"{sweep.output}/{name}/seed-{seed}", "training": {"seed": seed}}
            merged = _merged(_merged(sweep.base, own or {}), place)
            recipe = _checked(TrainRecipe, merged, file, root, (("runs", name), ("base",)))
            runs.append(SweepRun(name, seed, recipe))
    return sweep, runs


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `own`; mappings in both are merged in turn."""
    result = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = _merged(base[key], value) if both else value
    return result


def _parse(file: str | Path) -> tuple[yaml.Node | None, dict[str, Any]]:
    """The nodes of a YAML file, which know their lines, and its content."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        root = yaml.compose(text)
        _check_nodes(file, root)
        content = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise ConfigError(
            f"{file}: not a recipe: lists or mappings in each other without end"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{file}: not a YAML file ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: a recipe is a mapping with keys like model, data, training")
    return root, content


def _check_nodes(file: str | Path, root: yaml.Node | None) -> None:
    """Few enough, and no key twice: YAML's reader takes the last of two equal ones in silence."""
    for number, node in enumerate(_nodes(root)):
        if number == _MOST_NODES:
            raise ConfigError(
                f"{file}: has more than {_MOST_NODES} values, each alias (*name) counted with all that it "
                "stands for; leave some out"
            )
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen and key.value != "<<":
                line = key.start_mark.line + 1
                raise ConfigError(f"{file}:{line}: {key.value}: given twice; remove one")
            seen.add(key.value)


def _nodes(node: yaml.Node | None) -> Iterator[yaml.Node]:
    """All of a file, once for each place where it stands."""
    if node is None:
        return
    yield node
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    for child in children:
        yield from _nodes(child)


Places = tuple[tuple[str, ...], ...]
"""Where in a file a recipe may have its values from: the paths of mappings, the first one first."""


def _checked(
    kind: type[Recipe],
    content: dict[str, Any],
    file: str | Path,
    root: yaml.Node | None,
    places: Places = ((),),
) -> Recipe:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_describe(error, file, root, kind, places)) from None


def _describe(
    error: ValidationError,
    file: str | Path,
    root: yaml.Node | None,
    kind: type[BaseModel],
    places: Places,
) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    location = [str(part) for part in first["loc"]]
    # Our own validators name the field at the head of the message.
    if found := re.match(r"([\w.]+): (.*)", message):
        location, message = [*location, *found[1].split(".")], found[2]
    if first["type"] == "extra_forbidden":
        message = f"no such key; known here are {', '.join(_known_keys(kind, location[:-1]))}"
    elif first["type"] != "missing" and not isinstance(first["input"], (dict, SquatConfig)):
        message = f"{message} (it is {first['input']!r})"
    found_keys = {place: len(_keys(root, [*place, *location])) - len(place) for place in places}
    path = [*max(places, key=lambda place: found_keys[place]), *location]
    innermost = [root, *_keys(root, path)][-1]
    line = 1 if innermost is None else innermost.start_mark.line + 1
    return f"{file}:{line}: {'.'.join(path) or 'recipe'}: {message}"


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    for key in path:
        annotation = model.model_fields[key].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)


def _keys(node: yaml.Node | None, path: list[str]) -> list[yaml.Node]:
    """The nodes of the keys on the way along `path`, as far as they are there."""
    keys = []
    for name in path:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        match = next(((key, value) for key, value in pairs if key.value == name), None)
        if match is None:
            break
        keys.append(match[0])
        node = match[1]
    return keys
