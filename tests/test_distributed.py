"""Training on several processes, started as users start it: torchrun (DDP) and accelerate launch (FSDP).

Real models and real text; on CPUs, through gloo.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import PUBLISHED, real_data, real_model
from squat.checkpoints import load_model

pytestmark = pytest.mark.slow

TERMS = ("ce", "kl", "entropy", "distribution")
SQUAT = ("-m", "squat")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def recipe(folder, batch_size, steps=20, **changes):
    data = real_data()
    content = {
        "output": str(folder / "run"),
        "model": real_model("stories260k"),
        "data": {
            "train": str(data / "babylm/train/children_stories.train"),
            "sequence_length": 64,
            "cache": str(folder.parent / "cache"),
        },
        "training": {
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "precision": "fp32",
            "log_every": 1,
        },
        **changes,
    }
    folder.mkdir()
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return folder


def run(folder, *program):
    command = [sys.executable, *program, "train", str(folder / "recipe.yaml")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "run/log.json").read_text())["log"]


@pytest.mark.parametrize("bits", [4, "4:8"])
def test_two_processes_have_the_losses_of_one_on_the_same_batches(tmp_path, bits):
    # A float sum in another order moves an importance or a token's largest element by a last bit, and a
    # token that lies on the threshold of its width or exponent to that bit changes sides. That happens the
    # sooner the more steps are taken, and on one CPU sooner than on another: few steps.
    config = {**PUBLISHED, "activation_bits": bits, "importance": "relative_first_token"}
    one = run(recipe(tmp_path / "one", 8, steps=10, quantize=config), *SQUAT)
    two = run(recipe(tmp_path / "two", 4, steps=10, quantize=config), *TORCHRUN, *SQUAT)
    assert len(one) == len(two) == 10
    for before, after in zip(one, two, strict=True):
        for term in TERMS:
            assert after[term] == pytest.approx(before[term], abs=1e-4), before["step"]
    # And the models are the same up to float sums: every step size and threshold among them.
    states = [load_model(str(tmp_path / n / "run/model")).state_dict() for n in ("one", "two")]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-3, rtol=1e-2, msg=name)


FSDP = (
    *("-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2"),
    *("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_state_dict_type", "FULL_STATE_DICT"),
    *("--fsdp_cpu_ram_efficient_loading", "false"),
    *("--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)


def test_a_sharded_model_trains_and_is_saved_whole(tmp_path):
    script = str(Path(__file__).with_name("fsdp_on_cpu.py"))
    config = {**PUBLISHED, "importance": "relative_first_token"}  # as above
    one = run(recipe(tmp_path / "one", 8, steps=4, quantize=config), *SQUAT)
    two = run(recipe(tmp_path / "two", 4, steps=4, quantize=config), *FSDP, script)
    assert [entry["ce"] for entry in two] == pytest.approx([e["ce"] for e in one], abs=1e-4)
    states = [load_model(str(tmp_path / n / "run/model")).state_dict() for n in ("one", "two")]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-3, rtol=1e-2, msg=name)
