"""Teachers' answers on disk: asked once, read back as they were, asked again where they were damaged."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import some_ids, tiny_model
from squat.checkpoints import save_model
from squat.data import PackedDataset, train_tokenizer
from squat.distill.losses import distillation, distillation_from_draws
from squat.distill.teacher_cache import TeacherCache
from squat.errors import DataError
from test_cli import recipe

WINDOWS, LENGTH, VOCABULARY = 12, 8, 97


def dataset(samples=24, seed=0):
    tokens = some_ids(1, WINDOWS * LENGTH)[0].numpy().astype("uint16")
    return PackedDataset(tokens, LENGTH, samples, seed, same_windows=True)


def cache(folder, draws=16, temperature=2.0, teachers=None):
    teachers = [tiny_model()] if teachers is None else teachers
    return TeacherCache(folder, teachers, dataset(), temperature, draws)


def answers(rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(rows, LENGTH, VOCABULARY, generator=generator)


def test_epochs_see_the_same_windows_in_another_order_whatever_the_seed():
    first, second = dataset(), dataset(seed=1)
    per_epoch = first.windows_per_epoch
    seen = {int(first[i]["window"]): first[i]["input_ids"] for i in range(per_epoch)}
    assert sorted(seen) == list(range(per_epoch))
    for other in (first, second):
        for i in range(per_epoch, 2 * per_epoch):
            sample = other[i]
            assert torch.equal(sample["input_ids"], seen[int(sample["window"])])
    assert [int(first[i]["window"]) for i in range(per_epoch)] != [
        int(first[per_epoch + i]["window"]) for i in range(per_epoch)
    ]


@settings(max_examples=20)
@given(draws=st.integers(1, 200), temperature=st.sampled_from([1.0, 2.0, 5.0]))
def test_what_is_read_is_what_was_written(tmp_path_factory, draws, temperature):
    kept = cache(tmp_path_factory.mktemp("c"), draws, temperature)
    windows = torch.tensor([7, 0, 3])
    assert kept.read(windows) is None
    written = kept.write(windows, answers())
    assert written.shape == (3, LENGTH, draws)
    assert torch.equal(kept.read(windows), written)
    other = cache(tmp_path_factory.mktemp("c"), draws, temperature)
    assert torch.equal(other.write(windows[:1], answers()[:1]), written[:1])  # the same draws


@settings(max_examples=20)
@given(draws=st.integers(1, 200), temperature=st.sampled_from([1.0, 2.0, 5.0]))
def test_the_loss_is_that_of_the_frequencies(draws, temperature):
    generator = torch.Generator().manual_seed(draws)
    ids = torch.randint(0, 20, (LENGTH, draws), generator=generator)  # many of them several times
    frequencies = torch.nn.functional.one_hot(ids, VOCABULARY).double().mean(dim=1)
    counted = torch.arange(LENGTH) != 3
    student = answers()[0].double()
    log_q = (student / temperature).log_softmax(dim=-1)
    divergence = torch.special.xlogy(frequencies, frequencies) - frequencies * log_q
    expected = temperature**2 * divergence.sum(dim=-1)[counted].mean()
    found = distillation_from_draws(student, ids, temperature, counted)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_the_teachers_on_average(tmp_path):
    counted = torch.ones(3 * LENGTH, dtype=torch.bool)

    def gradient(loss, teacher):
        student = answers(seed=1).requires_grad_()
        loss(student.flatten(0, 1), teacher.flatten(0, 1), 2.0, counted).backward()
        return student.grad

    exact = gradient(distillation, answers())
    errors = []
    for draws in (20, 2000):
        ids = cache(tmp_path, draws).write(torch.arange(3), answers())
        errors.append((gradient(distillation_from_draws, ids) - exact).norm())
    assert errors[1] < 0.15 * errors[0]  # a tenth: the noise falls with the root of the draws
    assert errors[1] < 0.1 * exact.norm()


def test_another_process_reads_it_and_a_damaged_window_is_asked_for_again(tmp_path):
    windows = torch.tensor([1, 2])
    first = cache(tmp_path)
    written = first.write(windows, answers(2))
    assert torch.equal(cache(tmp_path).read(windows), written)
    row = first.file.stat().st_size // WINDOWS
    damaged = np.memmap(first.file, np.uint8, "r+")
    damaged[2 * row + row // 2] ^= 1
    damaged.flush()
    assert cache(tmp_path).read(torch.tensor([2])) is None
    assert cache(tmp_path).read(torch.tensor([1])) is not None


def test_other_teachers_temperatures_and_sizes_have_files_of_their_own(tmp_path):
    files = {
        cache(tmp_path).file,
        cache(tmp_path, draws=8).file,
        cache(tmp_path, temperature=1.0).file,
        cache(tmp_path, teachers=[tiny_model(seed=1)]).file,
        cache(tmp_path, teachers=[tiny_model(), tiny_model(seed=1)]).file,
    }
    assert len(files) == 5


def test_a_file_that_does_not_fit_on_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(DataError, match=r"0\.0 GB are free; draw less"):
        cache(tmp_path)
    assert not list(tmp_path.glob("teachers-*"))


def test_a_second_run_does_not_ask_the_teacher(shell, tmp_path, model, corpus, monkeypatch):
    settings = {
        "loss": {"distribution": 0, "entropy": 0},
        "teacher_cache": {"folder": str(tmp_path / "answers"), "draws": 32},
    }
    asked = []
    read = TeacherCache.read
    monkeypatch.setattr(
        TeacherCache, "read", lambda self, w: asked.append(read(self, w) is None) or read(self, w)
    )
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        shell.succeed("train", recipe(tmp_path / name, model, corpus, **settings))
    assert asked == [True] * 4 + [False] * 4
    logs = [(tmp_path / f"{name}/run/log.json").read_text() for name in ("first", "second")]
    assert logs[0].split('"log"')[1] == logs[1].split('"log"')[1]


def test_what_makes_no_sense_is_refused(shell, tmp_path, model, corpus):
    kept = {"teacher_cache": {"folder": str(tmp_path)}}
    message = shell.refuse("train", recipe(tmp_path, model, corpus, **kept))
    assert "teacher_cache: the attention-map loss needs the only teacher in every step" in message
    kept["loss"] = {"gamma": 0, "distribution": 0}
    message = shell.refuse("train", recipe(tmp_path, model, corpus, **kept))
    assert "no teacher's logits are asked for" in message
    kept["loss"] = {"top_k": 100, "distribution": 0}
    message = shell.refuse("train", recipe(tmp_path, model, corpus, **kept))
    assert "it keeps draws from all entries, which loss.top_k would leave out" in message


def test_a_teacher_with_another_tokenizer_is_refused(shell, tmp_path, model, corpus):
    lines = ["other words than those of the student's text"] * 9
    tokenizer = train_tokenizer(iter(lines), vocab_size=400)
    save_model(tiny_model(vocab_size=400), tokenizer, tmp_path / "other")
    teachers = [str(model), str(tmp_path / "other")]
    message = shell.refuse("train", recipe(tmp_path, model, corpus, teachers=teachers))
    assert "other: another tokenizer than the student's: token" in message
