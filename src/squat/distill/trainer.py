"""`SquatTrainer`: a transformers Trainer whose student is quantized and whose teachers are not.

Everything a Trainer does stays as it is (gradient accumulation, autocast, checkpoints, DDP, FSDP); this
class supplies the loss, gives step sizes a learning rate of their own, and logs every loss term and the
share of tokens that really got 8 bits.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments

from squat import replicas
from squat.checkpoints import quiet, write_sums
from squat.distill.losses import (
    LossConfig,
    cross_entropy,
    distillation,
    distillation_from_draws,
    distribution,
    entropy,
)
from squat.distill.teacher_cache import TeacherCache
from squat.errors import CheckpointError, ConfigError, DataError
from squat.finite import check_step, check_weights
from squat.quantization.attention import TokenState
from squat.quantization.frozen import freeze_codes, write_frozen
from squat.quantization.hf import saving
from squat.quantization.modules import QuantizedWeight
from squat.quantization.tokens import follow_importance


class FiniteTrainer(Trainer):
    """A Trainer that stops at the first loss or gradient that is NaN or infinite.

    transformers' own counts such a loss as 0 in its log, and goes on.
    """

    terms: Mapping[str, Tensor] = MappingProxyType({})
    """The terms of the last loss, named in the message."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward pass of a micro-batch; raises DivergedError."""
        loss = super().training_step(model, *args, **kwargs)
        if (
            self.accelerator.scaler is None
        ):  # which tries scales out, and skips a step that overflows
            losses = {f"the loss term {name}": value for name, value in self.terms.items()}
            unwrapped = self.accelerator.unwrap_model(model)
            check_step(unwrapped, {**losses, "the loss": loss}, self._step(1))
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        check_weights(self.accelerator.unwrap_model(model), self._step(0))
        super()._save_checkpoint(model, trial)

    def _step(self, ahead: int) -> str:
        step = self.state.global_step + ahead
        return f"{self.args.output_dir}: training stopped at step {step}, earlier checkpoints are intact"


class SequentialTrainer(FiniteTrainer):
    """A Trainer that takes samples in the order of their index and never leaves half a checkpoint.

    The dataset is shuffled already (its sample is a pure function of the index), so that resuming is
    exact.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        return SequentialSampler(dataset)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        with quiet(), saving(self.model, state_dict):
            super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A weight that is another's is in a checkpoint under one name, and not missing under the other."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            replicas.wait()
            if self.is_world_process_zero():
                write_sums(folder)
        except (OSError, RuntimeError, SafetensorError, DataError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise CheckpointError(
                f"{folder}: could not be saved ({error}); earlier checkpoints are intact: "
                "make room and run again to resume"
            ) from error


class StepSizeTrainer(FiniteTrainer):
    """A Trainer of quantized models: step sizes have a learning rate of their own, token thresholds follow.

    `step_learning_rate` is that of the logarithms of the step sizes: how far a step can move, as a ratio,
    in one update. It follows the same schedule as the weights'.
    """

    step_learning_rate: float = 1e-2

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with three groups: matrices (weight decay), norms and biases, step sizes."""
        if self.optimizer is None:
            trained: Any = model if model is not None else self.model
            decayed = set(self.get_decay_parameter_names(trained))
            matrices, vectors, steps = [], [], []
            for name, parameter in trained.named_parameters():
                if not parameter.requires_grad:
                    continue
                if name.endswith("log_step"):
                    steps.append(parameter)
                elif name in decayed:
                    matrices.append(parameter)
                else:
                    vectors.append(parameter)
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = [
                {"params": matrices, "weight_decay": self.args.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
                {"params": steps, "weight_decay": 0.0, "lr": self.step_learning_rate},
            ]
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward pass of a micro-batch; then the token thresholds follow it."""
        loss = super().training_step(model, *args, **kwargs)
        follow_importance(model)
        return loss


class SquatTrainer(SequentialTrainer, StepSizeTrainer):
    """Quantization-aware training by distillation (paper IV-B and IV-D).

    Args:
        model: a model from `squat.quantize`, or a checkpoint of one.
        teachers: full-precision models with the same vocabulary; their logits are averaged. The first
            must have the student's layers and heads if the attention-map loss is used.
        args: transformers' TrainingArguments.
        train_dataset: samples with `input_ids` and `labels`, taken in the order of their index, so that
            a dataset whose sample is a function of the index makes resuming exact.
        loss: weights of the loss terms.
        step_learning_rate: see StepSizeTrainer.
        freeze: train steps, norms and biases, and not the codes of weights.
        cache: keeps the teachers' logits, for a dataset whose samples have the number of their `window`.

    Raises:
        ConfigError: a student that is not quantized, or that has adapters beside its layers, or a teacher
            that does not match it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teachers: Sequence[PreTrainedModel],
        args: TrainingArguments,
        train_dataset: Dataset[dict[str, Tensor]],
        loss: LossConfig | None = None,
        step_learning_rate: float = 1e-2,
        cache: TeacherCache | None = None,
        freeze: bool = False,
        **kwargs: Any,
    ) -> None:
        self.token_state: TokenState = _state_of(model)
        _check_adapters(model)
        if freeze and args.fsdp:
            raise ConfigError(
                "codes: frozen ones are not sharded; choose trained, or leave fsdp out"
            )
        if freeze:
            freeze_codes(model)
        self.loss_config = loss or LossConfig()
        self.teachers = [
            teacher.eval().requires_grad_(False).to(args.device) for teacher in teachers
        ]
        self.cache = cache
        self.step_learning_rate = step_learning_rate
        self._check_teachers(model)
        if self.loss_config.distribution > 0:  # maps are returned by the eager implementation only
            for teacher in self.teachers[:1]:
                teacher.set_attn_implementation("eager")
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        # The loss is a mean over the micro-batch, whatever the model's own loss would accept.
        self.model_accepts_loss_kwargs = False

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        assert self.model is not None
        write_frozen(self.model)
        super()._save(output_dir, state_dict)

    def _check_teachers(self, model: PreTrainedModel) -> None:
        student = model.config.get_text_config()
        for index, teacher in enumerate(self.teachers):
            config = teacher.config.get_text_config()
            if config is student:
                raise ConfigError(
                    f"teachers[{index}]: shares its config object with the student, and would compute "
                    "attention as the student does; make one of them from a copy of the config"
                )
            if config.vocab_size != student.vocab_size:
                raise ConfigError(
                    f"teachers[{index}]: vocabulary of {config.vocab_size} entries, the student's has "
                    f"{student.vocab_size}; teacher and student must share a tokenizer"
                )
        if self.loss_config.gamma > 0 and not self.teachers:
            raise ConfigError("teachers: none given; name one, or set the loss's gamma to 0")
        if self.loss_config.distribution > 0:
            shapes = [
                (c.num_hidden_layers, c.num_attention_heads)
                for c in (student, *(t.config.get_text_config() for t in self.teachers[:1]))
            ]
            if len(shapes) == 1 or shapes[0] != shapes[1]:
                raise ConfigError(
                    "teachers[0]: the attention-map loss needs a first teacher with the student's layers "
                    f"and heads {shapes[0]}; put the original model first, or set distribution to 0"
                )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The total loss of a micro-batch (module `losses`); logs its terms."""
        config = self.loss_config
        labels, windows = inputs["labels"], inputs.get("window")
        fed = {name: value for name, value in inputs.items() if name not in ("labels", "window")}
        needs_taps = config.entropy > 0 or config.distribution > 0
        self.token_state.record = needs_taps and model.training
        outputs = model(**fed, use_cache=False)
        self.token_state.record = False
        taps = [tap for _, tap in sorted(self.token_state.taps.items())]
        self.token_state.taps.clear()
        if taps and torch.is_grad_enabled() and not any(tap.probs.requires_grad for tap in taps):
            raise ConfigError(
                "use_reentrant: reentrant checkpointing hides the attention maps from their losses; set "
                "it to False in activation_checkpointing_kwargs, or loss.entropy and loss.distribution to 0"
            )

        targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        logits = outputs.logits.flatten(0, 1)
        terms = {"ce": cross_entropy(logits, targets)}
        loss = (1 - config.gamma) * terms["ce"]
        answer, teacher_maps = self._ask_teachers(fed, windows)
        if config.gamma > 0:
            counted, tau = targets != -100, config.temperature
            answer = answer.flatten(0, 1)
            if answer.is_floating_point():
                terms["kl"] = distillation(logits, answer, tau, counted, config.top_k)
            else:
                terms["kl"] = distillation_from_draws(logits, answer, tau, counted)
            loss = loss + config.gamma * terms["kl"]
        if taps and config.entropy > 0:
            terms["entropy"] = entropy([t.query for t in taps], [t.key for t in taps])
            loss = loss + config.entropy * terms["entropy"]
        if taps and config.distribution > 0:
            maps = [t.probs for t in taps]
            terms["distribution"] = distribution(maps, teacher_maps, config.published_sign)
            loss = loss + config.distribution * terms["distribution"]
        self.terms = {name: value.detach() for name, value in terms.items()}
        self._remember(self.terms)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _ask_teachers(
        self, fed: dict[str, Tensor], windows: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Averaged logits of all teachers, or ids drawn from them by the cache; maps of the first."""
        kept = self.cache.read(windows) if self.cache and windows is not None else None
        total, maps = torch.empty(0), []
        with self.accelerator.autocast():
            for index, teacher in enumerate(self.teachers):
                wants_maps = index == 0 and self.loss_config.distribution > 0
                if kept is not None and not wants_maps:
                    continue
                answer = teacher(**fed, use_cache=False, output_attentions=wants_maps)
                total = total.float().add_(answer.logits) if index else answer.logits
                if wants_maps:
                    maps = list(answer.attentions)
        if kept is not None:
            return kept, maps
        if len(self.teachers) > 1:
            total /= len(self.teachers)
        if self.cache and windows is not None:
            total = self.cache.write(windows, total)
        return total, maps

    def _remember(self, terms: Mapping[str, Tensor]) -> None:
        for name, value in terms.items():
            self._sums[name].append(value)
        if self.token_state.wide:
            self._sums["wide_share"].append(self.token_state.realised_share().mean())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every loss term, and of the realised 8-bit share, since the last log."""
        if "loss" in logs:
            means = {name: torch.stack(values).mean() for name, values in self._sums.items()}
            logs |= {name: replicas.mean(value).item() for name, value in means.items()}
            self._sums.clear()
        super().log(logs, start_time)


def _state_of(model: PreTrainedModel) -> TokenState:
    state = getattr(model, "token_state", None)
    if not isinstance(state, TokenState):
        raise ConfigError("model: it is not quantized; pass it through squat.quantize first")
    return state


def _check_adapters(model: nn.Module) -> None:
    """Refuse adapters beside a quantized layer: they compute in float, and merging would round them away.

    peft's adapters of parameters stand in front of the quantizer, and what was trained is what is merged.
    """
    for name, module in model.named_modules():
        beside = isinstance(getattr(module, "base_layer", None), QuantizedWeight)
        if beside and not hasattr(module, "parameter_name"):
            raise ConfigError(
                f"{name}: an adapter beside a quantized layer computes in float and cannot be merged; name "
                'parameters in its config: LoraConfig(target_modules=[], target_parameters=["'
                f'{name.rpartition(".")[2]}.weight", ...])'
            )
