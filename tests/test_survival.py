"""Training runs that are killed, damaged, crowded or fed another text: nothing is lost, nothing differs."""

import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from filelock import FileLock

from squat.checkpoints import load_model
from squat.data import write_corpus
from squat.recipes import TrainRecipe, read_recipe
from squat.runs import train
from test_cli import log_of, recipe


def same_results(one, other):
    first, second = (load_model(str(folder / "run/model")).state_dict() for folder in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert log_of(one) == log_of(other)


def cut(file):
    os.truncate(file, file.stat().st_size - 100)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(shell, model, corpus, tmp_path):
    file = recipe(tmp_path, model, corpus)
    shell.succeed("train", file)
    whole = shutil.copytree(tmp_path, tmp_path / "kept")
    newest = tmp_path / "run/checkpoints/checkpoint-4"
    damages = {
        "model.safetensors": cut,
        "optimizer.pt": flip_a_bit,
        "trainer_state.json": os.unlink,
    }
    for name, damage in damages.items():
        shutil.rmtree(tmp_path / "run/model")
        damage(newest / name)
        status, _, error = shell.run("train", file)
        assert status == 0
        said = " ".join(error.split())
        assert f"checkpoint-4/{name}: is damaged or gone; it is not used" in said
        same_results(whole, tmp_path)


@pytest.mark.slow
def test_a_damaged_layer_of_a_reconstruction_is_trained_again(shell, model, corpus, tmp_path):
    settings = {"sequences": 4, "epochs": 1}
    file = recipe(tmp_path, model, corpus, reconstruction=settings)
    shell.succeed("train", file)
    whole = shutil.copytree(tmp_path, tmp_path / "kept")
    for part in ("model", "checkpoints"):
        shutil.rmtree(tmp_path / "run" / part)
    cut(tmp_path / "run/layers/layer-0.safetensors")
    shell.succeed("train", file)
    same_results(whole, tmp_path)


def test_another_text_is_refused(shell, tmp_path, model):
    corpus = tmp_path / "text"
    write_corpus(corpus, 100, seed=0)
    file = recipe(tmp_path, model, corpus)
    assert shell.run("train", file, "--max-minutes", 0)[0] == 3
    (text,) = (corpus / "train").iterdir()
    original = text.read_text()
    text.write_text(original.replace("the", "a", 1))
    message = shell.refuse("train", file)
    assert f"data: the text has changed since the run in {tmp_path / 'run'} began" in message
    text.write_text(original)
    shell.succeed("train", file)


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(
    shell, tmp_path, model, corpus
):
    file = recipe(tmp_path, model, corpus)
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run/.lock"):
        message = shell.refuse("train", file)
    assert f"output: another process works in {tmp_path / 'run'}" in message
    assert shell.run("train", file, "--max-minutes", 0)[0] == 3


KILLED = """
import os, random, signal, sys, time
from squat.recipes import TrainRecipe, read_recipe
from squat.runs import train

recipe, kills, longest = read_recipe(sys.argv[1], TrainRecipe), int(sys.argv[2]), float(sys.argv[3])
moments = random.Random(0)
lives = 0
while True:
    pid = os.fork()
    if pid == 0:
        train(recipe)
        os._exit(0)
    if lives < kills:
        time.sleep(moments.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if status == 0:
        break
    assert os.WIFSIGNALED(status), status
    lives += 1
print("lives", lives)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_the_same(tmp_path, model, corpus):
    """At random moments: while it calibrates, trains layers, takes steps, writes checkpoints or the model."""
    settings = {
        "weights": "descent",
        "reconstruction": {"sequences": 32, "epochs": 2},
        "training": {"steps": 40, "batch_size": 4, "save_every": 2, "log_every": 1},
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    began = time.monotonic()
    train(read_recipe(recipe(whole, model, corpus, **settings), TrainRecipe))
    takes = time.monotonic() - began

    file = recipe(killed, model, corpus, **settings)
    script = [sys.executable, "-c", KILLED, file, "20", str(takes / 4)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a fork has no other threads
    out = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=900)
    assert out.returncode == 0, out.stderr
    assert "lives 20" in out.stdout
    same_results(whole, killed)
