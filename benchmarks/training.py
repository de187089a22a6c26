"""What quantization-aware training costs, beside plain distillation of the same model.

    python benchmarks/training.py                     # eager
    python benchmarks/training.py --compile           # torch.compile on the students and the teacher
    python benchmarks/training.py --threads 2 --batch 32 --rounds 9
    python benchmarks/training.py --teacher-layers 24 --only 'qat w4a4' 'kept w4a4'   # a larger teacher

Every variant is a process of its own with the same random Llama as student and as teacher (the shape of
babylm-6m unless told otherwise) and the same batches; they are asked for one step at a time, in turn, so
that what else the machine does meets them all alike. A step is forward, loss, backward and AdamW. Printed
are the median seconds of a step, its ratio to plain distillation (the median of the rounds' ratios), and the
peak of resident memory in a step, beyond what importing the libraries needs. That is measured in a step
before the timed ones, in which freed memory goes back at once: what an allocator keeps for later depends on
its history.

* distillation: cross-entropy and KL to the teacher as one writes them in PyTorch, nothing quantized.
* lean distillation: the same with the losses of this project, which hold less memory.
* qat w4a4, qat 4:8: the same losses and Squat's quantizers.
* kept w4a4: as qat, with the teacher's answers read from a teacher cache instead of asked for.
* squat w4a4, squat 4:8: the paper's losses on top, which need the attention maps of both models.
* naive w4a4, naive 4:8: as squat, with every quantizer written down straight from the formulas (arXiv
  2402.10787, eq. 1-7): a chain of elementwise operations, and at 4:8 both widths of every token. Never
  compiled.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import ctypes
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VARIANTS = (
    "distillation",
    "lean distillation",
    "qat w4a4",
    "qat 4:8",
    "kept w4a4",
    "squat w4a4",
    "squat 4:8",
    "naive w4a4",
    "naive 4:8",
)


class NaiveQuantizer(nn.Module):
    """alpha * round(clip(x / alpha)), straight-through, LSQ's gradient to alpha."""

    def __init__(self, step: Tensor, qmin: int, qmax: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(step.clone())
        self.qmin, self.qmax = qmin, qmax

    def forward(self, x: Tensor, whole: Tensor | None = None) -> Tensor:
        scale = 1 / (x.numel() * self.qmax) ** 0.5
        alpha = self.alpha * scale + (self.alpha - self.alpha * scale).detach()
        clipped = torch.clamp(x.float() / alpha, self.qmin, self.qmax)
        rounded = clipped + (clipped.round() - clipped).detach()
        return (rounded * alpha).to(x.dtype)


class NaiveSite(nn.Module):
    """An activation site: every width quantizes all tokens, and each token takes its own."""

    def __init__(self, site: Any) -> None:
        super().__init__()
        self.site, self.layer = site.site, site.layer
        self.adaptive, self.follows = site.adaptive, site.follows
        self.by_width = nn.ModuleDict({b: naive(q) for b, q in site.by_width.items()})

    def forward(self, x: Tensor, wide: Tensor | None = None) -> Tensor:
        if not self.adaptive:
            return next(iter(self.by_width.values()))(x)
        return torch.where(wide, self.by_width["8"](x), self.by_width["4"](x))


def naive(quantizer: Any) -> NaiveQuantizer:
    return NaiveQuantizer(quantizer.step, quantizer.qmin, quantizer.qmax)


def make_naive(model: nn.Module) -> None:
    """Put the straightforward quantizers in the place of Squat's."""
    from squat.quantization.modules import SiteQuantizer

    for name, module in list(model.named_modules()):
        if isinstance(module, SiteQuantizer):
            model.set_submodule(name, NaiveSite(module))
        elif name.endswith("weight_quantizer"):
            model.set_submodule(name, naive(module))


def memory(which: str) -> float:
    """Resident memory of this process in MB: VmRSS now, VmHWM at its peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[which].split()[0]) / 1e3


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
GIVE_BACK, KEEP, NEVER_TRIM = 1 << 16, 1 << 25, 1 << 30
"""Bytes from which on freed memory goes back to the system; KEEP is the most that glibc takes."""


def start_of_peak() -> None:
    """From here on VmHWM is measured, and memory that is freed does not count."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, GIVE_BACK)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def end_of_peak() -> None:
    """From here on freed memory is kept for the next step, as it is without these functions."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, KEEP)
    libc.mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)


def work(variant: str, options: argparse.Namespace) -> None:
    """The process of a variant: a line in, one step; seconds and peak memory out."""
    torch.set_num_threads(options.threads)
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

    from squat.data import PackedDataset
    from squat.distill import LossConfig, SquatTrainer
    from squat.distill.losses import cross_entropy, distillation
    from squat.distill.teacher_cache import TeacherCache
    from squat.quantization import SquatConfig, quantize

    before = memory("VmRSS")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.ffn,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        tie_word_embeddings=True,
    )
    larger = copy.deepcopy(shape)
    larger.num_hidden_layers = options.teacher_layers or options.layers
    teacher, student = LlamaForCausalLM(larger), LlamaForCausalLM(shape)
    student.load_state_dict(teacher.state_dict(), strict=False)  # the layers that it has
    tokens = torch.randint(3, options.vocab, (options.batch * options.length * 64,)).numpy()
    keeps = variant.startswith("kept")
    dataset = PackedDataset(tokens, options.length, options.batch * 64, seed=0, same_windows=keeps)
    batches = [
        {
            key: torch.stack([dataset[i][key] for i in range(first, first + options.batch)])
            for key in dataset[0]
        }
        for first in range(0, options.batch * 8, options.batch)
    ]

    def compiled(module: nn.Module) -> Any:
        return torch.compile(module) if options.compile and "naive" not in variant else module

    if variant.endswith("distillation"):
        optimizer = torch.optim.AdamW(student.parameters(), lr=2.5e-4)
        student, teacher = compiled(student.train()), compiled(teacher.eval())

        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            targets = batch["labels"][:, 1:].flatten()
            logits = student(input_ids=batch["input_ids"], use_cache=False).logits
            with torch.no_grad():
                answer = teacher(input_ids=batch["input_ids"], use_cache=False).logits
            logits, answer = logits[:, :-1].flatten(0, 1), answer[:, :-1].flatten(0, 1)
            if variant.startswith("lean"):
                kl = distillation(logits, answer, 2.0, targets != -100)
                return 0.5 * cross_entropy(logits, targets) + 0.5 * kl
            log_p, log_q = (F.log_softmax(x.float() / 2, dim=-1) for x in (answer, logits))
            kl = 4 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
            return 0.5 * F.cross_entropy(logits.float(), targets) + 0.5 * kl

    else:
        kind, bits = variant.split()
        config = SquatConfig(activation_bits=4 if bits == "w4a4" else "4:8")
        quantize(student, config, calibration=[batches[0]["input_ids"]])
        if kind == "naive":
            make_naive(student)
        loss = LossConfig() if kind in ("squat", "naive") else LossConfig(entropy=0, distribution=0)
        args = TrainingArguments(output_dir="/tmp", use_cpu=True, bf16=True, report_to=[])
        trainer = SquatTrainer(student, [teacher], args, dataset, loss=loss)
        if keeps:
            folder = tempfile.mkdtemp()
            atexit.register(shutil.rmtree, folder)
            trainer.cache = TeacherCache(folder, [teacher], dataset, loss.temperature, draws=64)
            for batch in batches:
                with torch.no_grad():
                    trainer.cache.write(batch["window"], teacher(batch["input_ids"]).logits)
        optimizer = torch.optim.AdamW(student.parameters(), lr=2.5e-4)
        student.train()
        model = compiled(student)
        trainer.teachers = [compiled(t) for t in trainer.teachers]

        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            return trainer.compute_loss(model, batch)

    for number, _ in enumerate(sys.stdin):
        if number == options.warmup:
            start_of_peak()
        start = perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss_value = loss_of(batches[number % len(batches)])
        loss_value.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps([perf_counter() - start, memory("VmHWM") - before]), flush=True)
        if number == options.warmup:
            end_of_peak()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"hidden": 256, "ffn": 704, "layers": 6, "heads": 4, "vocab": 6000}
    sizes |= {"batch": 16, "length": 128, "threads": 1, "rounds": 5, "warmup": 1}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"default: {size}")
    parser.add_argument("--teacher-layers", type=int, help="default: as many as the student")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options)
        return

    workers = {
        name: subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--work", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in options.only
    }

    def step(name: str) -> list[float]:
        worker = workers[name]
        worker.stdin.write("\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:
            sys.exit(f"{name}: its process ended")
        return json.loads(line)

    for _ in range(options.warmup):
        for name in workers:
            step(name)
    peaks = {name: step(name)[1] for name in workers}
    rounds = [{name: step(name) for name in workers} for _ in range(options.rounds)]
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()

    first = next(iter(workers))
    print(f"{'':14} {'s/step':>8} {'ratio':>7} {'peak MB':>9} {'ratio':>7}")
    for name in workers:
        seconds = statistics.median(r[name][0] for r in rounds)
        ratio = statistics.median(r[name][0] / r[first][0] for r in rounds)
        print(
            f"{name:14} {seconds:8.3f} {ratio:7.2f} {peaks[name]:9.0f} {peaks[name] / peaks[first]:7.2f}"
        )


if __name__ == "__main__":
    main()
