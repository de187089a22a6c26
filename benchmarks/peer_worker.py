"""One peer in a process of its own, inside the peers' environment: prepares a model, or measures it.

    peer_worker.py prepare KIND SOURCE FOLDER
    peer_worker.py measure KIND FOLDER THREADS PROMPT GENERATE REPEATS

SOURCE is the folder of a model, or a transformers config as JSON, for a model of random weights.

`measure` prints one line of JSON: tokens per second of prefill and of decoding, the median of the repeats.
Every peer computes logits for the last prompt token only. Prompts differ from repeat to repeat, so that no
peer finds one in a cache.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

Times = tuple[float, float]
"""Seconds of prefill, seconds of decoding."""


def folder_of(source: str, folder: Path) -> Path:
    """The folder of a model in float32; of a config one beside `folder`, with random weights."""
    if not source.startswith("{"):
        return Path(source)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    beside = folder.with_name(f"{folder.name}.transformers")
    config = AutoConfig.for_model(**json.loads(source))
    AutoModelForCausalLM.from_config(config).save_pretrained(beside)
    return beside


def prepare_pytorch(source: Path, folder: Path, bits: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, bits)).save_pretrained(folder)


def prepare_openvino(source: Path, folder: Path, bits: str) -> None:
    from optimum.intel.openvino import OVModelForCausalLM, OVWeightQuantizationConfig

    sizes = json.loads((source / "config.json").read_text())
    group = math.gcd(128, sizes.get("hidden_size", 128), sizes.get("intermediate_size", 128))
    four = {"sym": True, "group_size": group, "ratio": 1.0}
    how = OVWeightQuantizationConfig(bits=int(bits), **(four if bits == "4" else {"sym": False}))
    OVModelForCausalLM.from_pretrained(
        source, export=True, compile=False, quantization_config=how
    ).save_pretrained(folder)


def prepare_onnxruntime(source: Path, folder: Path, bits: str) -> None:
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu"]
    builder += ["-i", str(source), "-o", str(folder), "-p", "int4" if bits == "4" else "fp32"]
    if bits == "4":
        subprocess.run([*builder, "--extra_options", "int4_accuracy_level=4"], check=True)
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic

    subprocess.run(builder, check=True)
    quantize_dynamic(
        folder / "model.onnx",
        folder / "int8.onnx",
        op_types_to_quantize=["MatMul"],
        weight_type=QuantType.QInt8,
    )
    (folder / "model.onnx.data").unlink(missing_ok=True)
    (folder / "int8.onnx").rename(folder / "model.onnx")


def measure_pytorch(
    folder: Path, threads: int, prompts: Iterator[np.ndarray], generate: int
) -> Iterator[Times]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    for prompt in prompts:
        ids = torch.from_numpy(prompt)[None]
        with torch.inference_mode():
            begin = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            middle = time.perf_counter()
            for _ in range(generate):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
            yield middle - begin, time.perf_counter() - middle


def measure_openvino(
    folder: Path, threads: int, prompts: Iterator[np.ndarray], generate: int
) -> Iterator[Times]:
    import openvino
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(
        str(folder),
        "CPU",
        INFERENCE_NUM_THREADS=threads,
        DYNAMIC_QUANTIZATION_GROUP_SIZE="128",
        ATTENTION_BACKEND="PA",
    )
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = generate + 1, True, False
    for prompt in prompts:
        ids = prompt[None]
        tokens = openvino_genai.TokenizedInputs(
            openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))
        )
        raw = pipeline.generate(tokens, config).perf_metrics.raw_metrics
        first, *rest = (1e-6 * us for us in raw.token_infer_durations)
        assert len(rest) == generate
        yield first, sum(rest)


def measure_onnxruntime(
    folder: Path, threads: int, prompts: Iterator[np.ndarray], generate: int
) -> Iterator[Times]:
    import onnxruntime_genai

    file = folder / "genai_config.json"
    settings = json.loads(file.read_text())
    settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    file.write_text(json.dumps(settings))
    model = onnxruntime_genai.Model(str(folder))
    for prompt in prompts:
        parameters = onnxruntime_genai.GeneratorParams(model)
        total = len(prompt) + generate + 2
        parameters.set_search_options(
            max_length=total, min_length=total, do_sample=False, batch_size=1
        )
        generator = onnxruntime_genai.Generator(model, parameters)
        begin = time.perf_counter()
        generator.append_tokens(prompt.astype(np.int32))
        middle = time.perf_counter()
        generator.generate_next_token()  # the first one: the prompt's logits are there already
        start = time.perf_counter()
        for _ in range(generate):
            generator.generate_next_token()
        yield middle - begin, time.perf_counter() - start


def main() -> None:
    what, kind, *rest = sys.argv[1:]
    name, _, bits = kind.partition("-")
    if what == "prepare":
        folder = Path(rest[1])
        globals()[f"prepare_{name}"](folder_of(rest[0], folder), folder, bits)
        return
    folder = Path(rest[0])
    threads, prompt, generate, repeats = (int(value) for value in rest[1:])
    rng = np.random.default_rng(1)
    prompts = (rng.integers(3, 6000, prompt, dtype=np.int64) for _ in range(repeats + 1))
    _, *times = globals()[f"measure_{name}"](folder, threads, prompts, generate)
    prefill, decode = (statistics.median(column) for column in zip(*times, strict=True))
    print(json.dumps({"prefill": prompt / prefill, "decode": generate / decode}))


if __name__ == "__main__":
    main()
