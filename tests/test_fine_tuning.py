"""Fine-tuning on (Super)GLUE: reading, encoding, quantized classifiers, resuming, the table."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import real_data, real_model, tiny_model
from squat.checkpoints import load_model, load_tokenizer, save_model
from squat.data import train_tokenizer
from squat.errors import ConfigError, DataError
from squat.evaluate.fine_tuning import (
    TASKS,
    FineTuning,
    classifier_of,
    encode,
    evaluate_fine_tuned,
    fine_tune,
    read_examples,
    training_file,
    write_fine_tuning,
)
from squat.quantization import SquatConfig, quantize
from squat.report.sections import read_section

WORDS = ["dog", "cat", "sees", "hears", "good", "old", "tree", "house", "runs"]
QUICK = FineTuning(epochs=2, batch_size=8, learning_rate=1e-3, max_length=24, precision="fp32")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter([" ".join(WORDS)] * 50 + ["right wrong"] * 50), vocab_size=300)


def write(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def sentences(count, seed):
    """A task that can be learned: the label stands in the sentence's last word."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        words = [WORDS[int(i)] for i in torch.randint(len(WORDS), (3,), generator=draw)]
        label = int(torch.randint(2, (1,), generator=draw))
        yield {"sentence": " ".join([*words, ["wrong", "right"][label]]), "label": label}


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "glue"
    write(folder / "cola.train.jsonl", sentences(160, 0))
    write(folder / "cola.valid.jsonl", sentences(40, 1))
    pairs = [{"question": "dog", "passage": "cat sees", "label": i % 2} for i in range(8)]
    write(folder / "boolq.train_from_elsewhere.jsonl", pairs)
    write(folder / "boolq.valid.jsonl", pairs)
    return folder


@pytest.fixture
def model(tmp_path, tokenizer):
    quantized = quantize(tiny_model(vocab_size=len(tokenizer)), SquatConfig(activation_bits=8))
    save_model(quantized, tokenizer, tmp_path / "quantized")
    return str(tmp_path / "quantized")


def test_a_quantized_model_learns_a_task_with_its_quantizers(model, data):
    result = fine_tune(model, "cola", data, QUICK, seed=0)
    scores = result["scores"]["CoLA"]
    assert scores["accuracy"] > 0.9 > scores["majority_accuracy"]
    assert scores["mcc"] > 0.8
    assert result["train"] == {"file": "cola.train.jsonl", "examples": 160}


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_classifier_is_the_quantized_backbone(tokenizer, adaptive):
    config = SquatConfig(activation_bits="4:8" if adaptive else 4)
    quantized = quantize(tiny_model(vocab_size=len(tokenizer)), config)
    ids = torch.randint(3, 250, (2, 9))
    with torch.no_grad():
        hidden = quantized(ids, output_hidden_states=True).hidden_states[-1]
    classifier = classifier_of(quantized, tokenizer, 3).eval()
    with torch.no_grad():
        logits = classifier(ids).logits
        assert torch.equal(logits, classifier.score(hidden)[:, -1])
    classifier.train()(ids, labels=torch.tensor([0, 2])).loss.backward()
    steps = [p for name, p in classifier.named_parameters() if name.endswith("log_step")]
    assert len(steps) > 20
    assert sum(p.grad is not None and bool((p.grad != 0).any()) for p in steps) > 20


def test_padding_changes_no_answer(tokenizer):
    quantized = quantize(tiny_model(vocab_size=len(tokenizer)), SquatConfig())
    classifier = classifier_of(quantized, tokenizer, 2).eval()
    short, long = torch.randint(3, 250, (1, 5)), torch.randint(3, 250, (1, 9))
    padded = torch.zeros(2, 9, dtype=torch.long)
    padded[0, :5], padded[1] = short, long
    with torch.no_grad():
        together = classifier(padded, attention_mask=(padded != 0).long()).logits
        alone = torch.cat([classifier(short).logits, classifier(long).logits])
    assert torch.allclose(together, alone, atol=1e-5)


def test_what_is_done_is_not_done_again_and_models_share_a_table(model, data, tmp_path, tokenizer):
    output = tmp_path / "results"
    quick = FineTuning(1, 8, 1e-3, 24, "fp32", limit=16)
    evaluate_fine_tuned(model, "first", data, output, ["cola"], seeds=1, recipe=quick)
    done = (output / "first/cola-0.json").stat().st_mtime_ns
    both = evaluate_fine_tuned(model, "first", data, output, ["cola", "boolq"], 2, quick)
    assert (output / "first/cola-0.json").stat().st_mtime_ns == done
    assert both["columns"]["CoLA"]["seeds"] == 2
    assert both["columns"]["CoLA"]["deviation"] is not None
    assert both["average"] == pytest.approx(
        (both["columns"]["CoLA"]["mean"] + both["columns"]["BoolQ"]["mean"]) / 2
    )
    evaluate_fine_tuned(model, "second", data, output, ["cola"], seeds=1, recipe=quick)
    table = write_fine_tuning(output, "squat eval ...")
    assert table.head == ["model", "CoLA", "BoolQ", "average", "CoLA (MCC)"]
    assert [row[0] for row in table.rows] == ["most frequent label", "first", "second"]
    assert table.rows[2][3] == ""  # no average of an incomplete row
    section = read_section(output)
    assert section.tables == [table]
    assert "boolq.train_from_elsewhere.jsonl" in section.text
    with pytest.raises(ConfigError, match="another recipe"):
        evaluate_fine_tuned(model, "first", data, output, ["cola"], 1, QUICK)
    with pytest.raises(ConfigError, match="is a result of"):
        evaluate_fine_tuned("elsewhere", "first", data, output, ["cola"], 1, quick)


def test_the_seed_decides(model, data):
    quick = FineTuning(1, 8, 1e-3, 24, "fp32", limit=40)
    first, again = (fine_tune(model, "cola", data, quick, seed=3) for _ in range(2))
    assert first == again


@given(st.lists(st.integers(1, 60), min_size=1, max_size=3), st.integers(8, 40))
def test_long_inputs_lose_the_ends_of_their_longest_fields(tokenizer, lengths, max_length):
    texts = [" ".join(["dog"] * length) for length in lengths]
    (row,) = encode([{"texts": texts, "label": 1}], tokenizer, max_length)
    whole = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert len(row["input_ids"]) == min(max_length, sum(len(ids) + 1 for ids in whole))
    parts, start = [], tokenizer.bos_token_id
    for token in row["input_ids"]:
        parts.append([]) if token == start else parts[-1].append(token)
    assert all(ids[: len(part)] == part for ids, part in zip(whole, parts, strict=True))
    cut = [len(p) for p, w in zip(parts, whole, strict=True) if len(p) < len(w)]
    assert all(len(part) <= min(cut, default=100) + 1 for part in parts)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "no JSON object"),
        ('{"sentence": 3, "label": 0}', "'sentence' is 3"),
        ('{"sentence": "\\ud83d", "label": 0}', r"'sentence': character 1 is U\+D83D"),
        ('{"label": 0}', "'sentence' is missing"),
        ('{"sentence": "a", "label": 2}', "'label' is 2"),
        ('{"sentence": "a"}', "'label' is null"),
        ("", "holds no example"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    file = tmp_path / "cola.valid.jsonl"
    file.write_text(line)
    with pytest.raises(DataError, match=message):
        read_examples(file, TASKS["cola"])


def test_training_files(tmp_path):
    with pytest.raises(DataError, match="no training file"):
        training_file(tmp_path, "cola")
    for name in ("cola.train_a.jsonl", "cola.train_b.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="2 training files"):
        training_file(tmp_path, "cola")
    (tmp_path / "cola.train.jsonl").touch()
    assert training_file(tmp_path, "cola").name == "cola.train.jsonl"


@pytest.mark.parametrize("task", TASKS)
def test_every_real_file_can_be_read(task):
    folder = real_data() / "glue"
    row = TASKS[task]
    for file in (
        training_file(folder, task),
        *(folder / f"{stem}.valid.jsonl" for stem in row.measured_on.values()),
    ):
        assert len(read_examples(file, row, limit=2000)) > 50


@pytest.mark.slow
def test_a_real_quantized_model_learns_sentiment(tmp_path):
    model = load_model(real_model("babylm-6m"))

    tokenizer = load_tokenizer(real_model("babylm-6m"))
    save_model(quantize(model, SquatConfig(activation_bits=8)), tokenizer, tmp_path / "w4a8")
    recipe = FineTuning(epochs=1, learning_rate=3e-4, max_length=48, limit=4000)
    scores = fine_tune(str(tmp_path / "w4a8"), "sst2", real_data() / "glue", recipe, seed=0)
    assert scores["scores"]["SST-2"]["accuracy"] > 0.6


def test_on_the_command_line(shell, model, data, tmp_path):
    common = ("--task", "glue", "--data", data, "--output", tmp_path / "out", "--epochs", 1)
    few = ("--limit", 8, "--seeds", 1, "--sequence-length", 16)
    printed = shell.succeed("eval", model, *common, *few, "--tasks", "cola,boolq", "--json", "-")
    assert set(json.loads(printed)["columns"]) == {"CoLA", "BoolQ"}
    assert "'glu' does not exist" in shell.refuse("eval", model, *common, "--tasks", "cola,glu")
    assert "no training file" in shell.refuse("eval", model, *common, *few, "--tasks", "rte")
    assert "another recipe" in shell.refuse("eval", model, *common, "--tasks", "cola")
    assert "cannot be fine-tuned" in shell.refuse("eval", "a.gguf", *common)
    short = ("--sequence-length", 4, "--output", tmp_path / "other")
    assert "below 8" in shell.refuse("eval", model, *common, *short)
