"""Scores, minimal pairs and perplexity: against their definitions, transformers and lm-eval."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from chat_models import chat_file
from lm_eval_tasks import lm_eval_scores
from squat.engine import Engine
from squat.errors import CheckpointError, DataError, EngineError
from squat.evaluate import (
    MinimalPairsResult,
    Paradigm,
    ParadigmResult,
    evaluate_minimal_pairs,
    minimal_pairs_table,
    perplexity,
    perplexity_table,
    read_minimal_pairs,
)
from squat.evaluate.huggingface import HuggingFaceScorer
from squat.quantization import SquatConfig, quantize

NOUNS = ["dog", "cat", "teacher", "river", "old house"]
VERBS = ["sleeps", "runs away", "barks at the moon", "falls"]
SENTENCES = [f"The {noun} {verb}." for noun in NOUNS for verb in VERBS]
PAIRS = [(s, s.replace("The", "These").replace("s ", " s ")) for s in SENTENCES]

DATA = Path(os.environ["SQUAT_DATA"]) if "SQUAT_DATA" in os.environ else None
needs_data = pytest.mark.skipif(DATA is None, reason="SQUAT_DATA is not set")


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, without a prefix space: " The" and "The" are different tokens, as in GPT-2."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def make_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def make_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3
    )
    return GPT2LMHeadModel(config)


@pytest.fixture
def llama():
    return make_llama()


def ids_of(tokenizer, text):
    return [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]


def rows(table):
    """The words of each row below the heading, as printed."""
    console = Console(width=100, file=io.StringIO())
    console.print(table)
    printed = console.file.getvalue().splitlines()
    return [line.replace("│", " ").split() for line in printed if "│" in line]


# --- HuggingFaceScorer ---------------------------------------------------------------------------


def test_score_is_the_sum_of_log_probabilities_after_bos(llama, tokenizer):
    llama.eval()
    scores = HuggingFaceScorer(llama, tokenizer).score(SENTENCES)
    for text, score in zip(SENTENCES, scores, strict=True):
        ids = torch.tensor([ids_of(tokenizer, text)])
        with torch.no_grad():
            predicted = llama(ids).logits[0, :-1].double().log_softmax(-1)
        expected = predicted.gather(-1, ids[0, 1:, None]).sum().item()
        assert score == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_batching_changes_nothing(make, tokenizer):
    model = make()
    one = HuggingFaceScorer(model, tokenizer, batch_size=1).score(SENTENCES)
    many = HuggingFaceScorer(model, tokenizer, batch_size=64).score(SENTENCES)
    assert many == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("policy", ["threshold", "topk"])
def test_batching_changes_nothing_for_token_adaptive_bits(policy, llama, tokenizer):
    model = quantize(llama, SquatConfig(policy=policy))
    batch = torch.tensor([(ids_of(tokenizer, text) * 9)[:32] for text in SENTENCES])
    model.train()
    model(input_ids=batch)  # the first batch sets the steps and the thresholds
    # Float noise may carry a value over a rounding boundary, which moves a score by far more than
    # the noise; in float64 it is too small for that, and what remains would be padding's doing.
    model.double()
    one = HuggingFaceScorer(model, tokenizer, batch_size=1).score(SENTENCES)
    many = HuggingFaceScorer(model, tokenizer, batch_size=64).score(SENTENCES)
    assert many == pytest.approx(one, rel=1e-5)


def test_context_token(llama, tokenizer):
    with_bos = HuggingFaceScorer(llama, tokenizer)
    assert with_bos.score([]) == []
    assert with_bos.score([""]) == [0.0]
    plain, marked = with_bos.score(["The dog", "<s>The dog"])
    assert marked == plain  # not preceded by a second <s>

    tokenizer.bos_token = None
    try:
        assert HuggingFaceScorer(llama, tokenizer).score(["The dog"]) == [
            with_eos := pytest.approx(
                HuggingFaceScorer(llama, tokenizer).score(["</s>The dog"])[0], rel=1e-6
            )
        ]
        assert plain != with_eos
    finally:
        tokenizer.bos_token = "<s>"


def test_scorer_needs_a_context_token(llama, tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="neither bos_token nor eos_token"):
        HuggingFaceScorer(llama, bare)


def test_scorer_names_what_does_not_fit(llama, tokenizer):
    with pytest.raises(DataError, match=r"max_position_embeddings 64"):
        HuggingFaceScorer(llama, tokenizer).score(["dog, " * 80])
    llama.resize_token_embeddings(100)
    with pytest.raises(DataError, match=r"token id \d+: outside .*vocab_size 100"):
        HuggingFaceScorer(llama, tokenizer).score(SENTENCES)


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_mode_as_it_was(training, llama, tokenizer):
    llama.train(training)
    HuggingFaceScorer(llama, tokenizer).score(["The dog"])
    assert llama.training is training


def test_importing_evaluate_does_not_load_torch():
    code = "import sys, squat.evaluate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Minimal pairs -------------------------------------------------------------------------------


class TableScorer:
    """Scores looked up by text; the text arrives with lm-eval's delimiter in front."""

    def __init__(self, scores):
        self.scores = scores

    def score(self, texts):
        return [self.scores[text] for text in texts]


def write_pairs(file, pairs, **extra):
    lines = [json.dumps({"sentence_good": a, "sentence_bad": b, **extra}) for a, b in pairs]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def result_of(accuracies):
    return MinimalPairsResult(
        tuple(
            ParadigmResult(name, field, pairs=10, correct=correct, ties=0)
            for name, field, correct in accuracies
        )
    )


def test_read_groups_by_linguistics_term(tmp_path):
    write_pairs(tmp_path / "b.jsonl", [("x", "y"), ("z", "w")], linguistics_term="s-selection")
    write_pairs(tmp_path / "a.jsonl", [("é", "ü")], linguistics_term="anaphor_agreement")
    write_pairs(tmp_path / "c.jsonl", [("x", "y")], linguistics_term="my_own_term")
    write_pairs(tmp_path / "d.jsonl", [("x", "y")])
    (tmp_path / "notes.txt").write_text("not a paradigm")
    assert read_minimal_pairs(tmp_path) == [
        Paradigm("a", "anaphor agreement (AA)", (("é", "ü"),)),
        Paradigm("b", "argument structure (AS)", (("x", "y"), ("z", "w"))),
        Paradigm("c", "my own term", (("x", "y"),)),
        Paradigm("d", None, (("x", "y"),)),
    ]
    assert len(read_minimal_pairs(tmp_path, limit=1)[1].pairs) == 1


def test_evaluation_counts_like_lm_eval():
    scores = {" a": -1.0, " b": -2.0, " c": -3.0, " d": -math.inf}
    pairs = (("a", "b"), ("b", "a"), ("c", "c"), ("c", "d"))
    result = evaluate_minimal_pairs(TableScorer(scores), [Paradigm("p", None, pairs)])
    assert result.paradigms == (ParadigmResult("p", None, pairs=4, correct=3, ties=1),)
    assert result.paradigms[0].accuracy == 0.75


def test_pairs_in_the_engine_say_which_sentence_is_too_long(tmp_path):
    engine = Engine(chat_file(tmp_path / "tiny.gguf"), threads=1)
    pairs = (("The dog runs.", "Dog the runs."), ("It is a cat.", "It are a cat."))
    good, bad = (engine.score([f" {pair[i]}" for pair in pairs]) for i in (0, 1))
    result = evaluate_minimal_pairs(engine, [Paradigm("p", None, pairs)])
    assert result.paradigms[0].correct == sum(a >= b for a, b in zip(good, bad, strict=True))
    long = (("word " * 600, "a"),)
    with pytest.raises(EngineError, match=r"^' word word .*: tokens: "):
        evaluate_minimal_pairs(engine, [Paradigm("p", None, long)])


def test_evaluation_refuses_nan():
    with pytest.raises(CheckpointError, match="' a' is nan"):
        evaluate_minimal_pairs(
            TableScorer({" a": math.nan, " b": 0.0}), [Paradigm("p", None, (("a", "b"),))]
        )


def test_averages():
    blimp = [("q", "quantifiers", 2), ("i", "own field", 6), ("b1", "binding", 4)]
    blimp.append(("b2", "binding", 10))
    result = result_of([*blimp, ("hypernym", None, 9)])
    assert result.fields == pytest.approx({"binding": 0.7, "quantifiers": 0.2, "own field": 0.6})
    assert list(result.fields) == ["binding", "quantifiers", "own field"]
    assert result.supplement == {"hypernym": 0.9}
    assert result.average_fields == pytest.approx(0.5)
    assert result.average_with_supplement == pytest.approx(0.6)
    assert result.average_paradigms == pytest.approx(0.55)
    assert result_of(blimp).average_with_supplement is None
    assert result_of([("hypernym", None, 9)]).average_fields is None


def test_result_as_json_and_as_table():
    first = result_of([("b1", "binding", 4), ("hypernym", None, 9)])
    second = result_of([("b1", "binding", 7)])
    written = json.loads(json.dumps(first.to_dict()))
    assert written["paradigms"]["b1"] == {
        "field": "binding",
        "accuracy": 0.4,
        "pairs": 10,
        "ties": 0,
    }
    assert written["average_with_supplement"] == pytest.approx(0.65)

    assert rows(minimal_pairs_table({"W4A4": first, "W8A8": second})) == [
        ["binding", "40.0", "70.0"],
        ["hypernym", "90.0"],
        ["average", "of", "fields", "40.0", "70.0"],
        ["average", "with", "supplement", "65.0"],
        ["average", "of", "paradigms", "40.0", "70.0"],
        ["pairs", "20", "10"],
        ["of", "them", "ties", "0", "0"],
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sentence_good": "a", ', r"p.jsonl, line 2: not JSON \(.*\); correct"),
        ('["a", "b"]', "line 2: a JSON list, not an object"),
        ('{"sentence_good": "a"}', "line 2: 'sentence_bad' is missing; give it a sentence"),
        ('{"sentence_good": " ", "sentence_bad": "b"}', """line 2: 'sentence_good' is " ";"""),
        (
            '{"sentence_good": "a", "sentence_bad": "b\\ud83d"}',
            r"line 2: 'sentence_bad': character 2 is U\+D83D",
        ),
        ('{"sentence_good": "a", "sentence_bad": 7}', "line 2: 'sentence_bad' is 7;"),
        (
            '{"sentence_good": "a", "sentence_bad": "b", "linguistics_term": 3}',
            "line 2: 'linguistics_term' is 3;",
        ),
        (
            '{"sentence_good": "a", "sentence_bad": "b", "linguistics_term": "binding"}',
            "line 2: 'linguistics_term' is 'binding' after None;",
        ),
    ],
)
def test_bad_lines_are_named(line, message, tmp_path):
    good = '{"sentence_good": "a", "sentence_bad": "b"}\n'
    (tmp_path / "p.jsonl").write_text(good + line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        read_minimal_pairs(tmp_path)
    assert "\n" not in str(caught.value)


def test_bad_folders_and_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no folder with \*.jsonl files"):
        read_minimal_pairs(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no folder with \*.jsonl files"):
        read_minimal_pairs(tmp_path)
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"p.jsonl: holds no pair"):
        read_minimal_pairs(tmp_path)
    (tmp_path / "p.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"p.jsonl: not readable as UTF-8"):
        read_minimal_pairs(tmp_path)
    write_pairs(tmp_path / "p.jsonl", PAIRS)
    with pytest.raises(DataError, match=r"p.jsonl: a second paradigm of this name"):
        read_minimal_pairs(tmp_path, tmp_path)
    with pytest.raises(DataError, match="limit 0"):
        read_minimal_pairs(tmp_path, limit=0)


@needs_data
def test_blimp_has_the_papers_fields():
    paradigms = read_minimal_pairs(DATA / "blimp", DATA / "blimp_supplement_sample", limit=2)
    result = result_of((p.name, p.field, 5) for p in paradigms)
    counts = {field: sum(p.field == field for p in paradigms) for field in result.fields}
    assert counts == {
        "anaphor agreement (AA)": 2,
        "argument structure (AS)": 9,
        "binding": 7,
        "control/raising": 5,
        "determiner-noun agreement": 8,
        "ellipsis": 2,
        "filler-gap": 7,
        "irregular forms": 2,
        "island effects": 8,
        "NPI licensing": 7,
        "quantifiers": 4,
        "subject-verb agreement": 6,
    }
    assert set(result.supplement) == {
        "hypernym",
        "qa_congruence_easy",
        "qa_congruence_tricky",
        "subject_aux_inversion",
        "turn_taking",
    }


# --- The same numbers as lm-eval -----------------------------------------------------------------


def assert_same_as_lm_eval(model, tokenizer, folder, monkeypatch):
    files = sorted(folder.glob("*.jsonl"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    theirs = lm_eval_scores(lm, files, folder)
    scorer = HuggingFaceScorer(model, tokenizer)
    paradigms = read_minimal_pairs(folder)
    for paradigm, ours in zip(
        paradigms, evaluate_minimal_pairs(scorer, paradigms).paradigms, strict=True
    ):
        scores, accuracy = theirs[paradigm.name]
        # One by one: in a batch two rows that are alike may differ in their last bits.
        alone = [
            [*scorer.score([" " + good]), *scorer.score([" " + bad])]
            for good, bad in paradigm.pairs
        ]
        assert np.array(alone) == pytest.approx(np.array(scores), rel=1e-5)
        assert [good >= bad for good, bad in alone] == [good >= bad for good, bad in scores]
        assert ours.accuracy == accuracy


def test_equals_lm_eval(llama, tokenizer, tmp_path, monkeypatch):
    write_pairs(tmp_path / "first.jsonl", PAIRS)
    write_pairs(tmp_path / "turned.jsonl", [(bad, good) for good, bad in PAIRS])
    write_pairs(tmp_path / "ties.jsonl", [(good, good) for good, _ in PAIRS])
    assert_same_as_lm_eval(llama, tokenizer, tmp_path, monkeypatch)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["babylm-6m", "stories260k"])
def test_equals_lm_eval_on_blimp(name, tmp_path, monkeypatch):
    for paradigm in ("anaphor_number_agreement", "only_npi_scope", "wh_island", "causative"):
        with (DATA / "blimp" / f"{paradigm}.jsonl").open() as lines:
            (tmp_path / f"{paradigm}.jsonl").write_text("".join(next(lines) for _ in range(100)))
    folder = DATA.parent / "models" / name
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_as_lm_eval(model, AutoTokenizer.from_pretrained(folder), tmp_path, monkeypatch)


# --- Perplexity ----------------------------------------------------------------------------------


class Logits:
    """A `LogitsModel` around a Hugging Face model, as the engine is one."""

    def __init__(self, model):
        self.model = model.eval()

    def logits(self, ids):
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].numpy()


class Uniform:
    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    def logits(self, ids):
        return np.full((len(ids), self.vocabulary), 3.0, dtype=np.float32)


def random_tokens(count):
    return np.random.default_rng(0).integers(0, 400, count).astype(np.uint16)


@pytest.mark.parametrize("count", [160, 171, 161, 7])
def test_perplexity_is_transformers_loss_weighted_by_tokens(count, llama, tmp_path):
    random_tokens(count).tofile(tmp_path / "tokens")
    tokens = np.memmap(tmp_path / "tokens", dtype=np.uint16, mode="r")
    llama.eval()
    total = predicted = 0.0
    for start in range(0, count, 16):
        ids = torch.tensor(tokens[start : start + 16].astype(np.int64))[None]
        if ids.shape[1] > 1:
            with torch.no_grad():
                total += llama(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            predicted += ids.shape[1] - 1
    result = perplexity(llama, tokens, 16, batch_size=3)
    assert result.tokens == predicted
    assert result.loss == pytest.approx(total / predicted, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_perplexity_from_logits_equals_perplexity_of_the_model(llama):
    tokens = random_tokens(75)
    from_logits = perplexity(Logits(llama), tokens, 16)
    assert from_logits.tokens == 70
    assert from_logits.loss == pytest.approx(perplexity(llama, tokens, 16).loss, rel=1e-6)


@given(
    st.integers(1, 500), st.integers(2, 20), st.integers(2, 100), st.randoms(use_true_random=False)
)
def test_perplexity_of_uniform_predictions_is_the_vocabulary(vocabulary, length, count, random):
    tokens = [random.randrange(vocabulary) for _ in range(count)]
    result = perplexity(Uniform(vocabulary), tokens, length)
    assert result.perplexity == pytest.approx(vocabulary)
    assert result.tokens == count - math.ceil(count / length)


def test_perplexity_as_json_and_as_table():
    result = perplexity(Uniform(8), [1] * 9, 4)
    assert json.loads(json.dumps(result.to_dict()))["tokens"] == 6
    assert rows(perplexity_table({"uniform": result})) == [["uniform", "2.0794", "8.00", "6"]]


def test_perplexity_names_what_is_wrong(llama):
    with pytest.raises(DataError, match="1 tokens hold nothing to predict"):
        perplexity(llama, [5], 16)
    with pytest.raises(DataError, match="sequence_length 1:"):
        perplexity(llama, [5, 6, 7], 1)
    with pytest.raises(DataError, match="token id 400: outside"):
        perplexity(llama, [5, 400], 16)
    with pytest.raises(DataError, match="max_position_embeddings 64"):
        perplexity(llama, random_tokens(100), 100)


@needs_data
@pytest.mark.slow
def test_babylm_6m_scores_as_its_card_says():
    """Card: BLiMP 65.2 averaged over the 67 paradigms, first 150 pairs of each."""
    folder = DATA.parent / "models" / "babylm-6m"
    model = AutoModelForCausalLM.from_pretrained(folder)
    scorer = HuggingFaceScorer(model, AutoTokenizer.from_pretrained(folder))
    result = evaluate_minimal_pairs(scorer, read_minimal_pairs(DATA / "blimp", limit=150))
    assert result.average_paradigms == pytest.approx(0.652, abs=0.001)
