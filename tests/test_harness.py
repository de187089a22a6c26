"""Squat's models in lm-evaluation-harness: as lm-eval's own `hf` model, and as `squat eval`."""

import copy

import pytest
from tokenizers import processors

from lm_eval_tasks import lm_eval_scores
from models import real_data, real_model, tiny_model
from squat.checkpoints import load_model, load_tokenizer, save_model
from squat.data import train_tokenizer, wrap_tokenizer
from squat.deploy.export import export
from squat.engine import Engine
from squat.errors import ConfigError
from squat.evaluate import evaluate_minimal_pairs, read_minimal_pairs
from squat.evaluate.huggingface import HuggingFaceScorer
from squat.quantization import SquatConfig, quantize

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from squat.evaluate.harness import SquatLM

TEXT = "The dog sees the cat. The cat hears the old dog near the tree, and the tree is good."
PAIRS = [
    ("The dog", " sees the cat."),
    ("", " The old tree"),
    ("The cat hears ", "the"),
    (TEXT, " yes"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = train_tokenizer(iter([TEXT] * 20), vocab_size=300)
    model = tiny_model(vocab_size=len(tokenizer))
    save_model(quantize(model, SquatConfig()), tokenizer, folder / "model")
    export(load_model(str(folder / "model")), tokenizer, "tiny", folder / "tiny.gguf")
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder):
    return SquatLM(path=str(folder / "model"))


@pytest.fixture(scope="module")
def file(folder):
    return SquatLM(path=str(folder / "tiny.gguf"), threads=1)


@pytest.fixture(scope="module")
def theirs(folder):
    """lm-eval's model, whose tokenizer puts <s> in front."""
    tokenizer = load_tokenizer(str(folder / "model"))
    return HFLM(pretrained=load_model(str(folder / "model")), tokenizer=tokenizer, batch_size=4)


def requests(kind, arguments):
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def test_continuations_are_scored_as_by_lm_evals_own_model(checkpoint, file, theirs):
    scored = [
        lm.loglikelihood(requests("loglikelihood", PAIRS)) for lm in (checkpoint, file, theirs)
    ]
    for ours, engine, expected in zip(*scored, strict=True):
        assert ours == pytest.approx(expected, abs=1e-4)
        assert engine == pytest.approx(ours, abs=1e-5)


def test_greedy_continuations_are_known_as_such(checkpoint, file, folder):
    given = checkpoint.tok_encode("The dog")
    best = int(Engine(folder / "tiny.gguf").logits(given)[-1].argmax())
    for lm in (checkpoint, file):
        answers = lm._loglikelihood_tokens([(None, given, [best]), (None, given, [best + 1])])
        assert [greedy for _, greedy in answers] == [True, False]


@pytest.mark.parametrize("length", [64, 7])
def test_texts_are_scored_in_windows_of_the_context(folder, theirs, length, monkeypatch):
    monkeypatch.setattr(theirs, "_max_length", length)
    backend = copy.deepcopy(theirs.tokenizer.backend_tokenizer)
    backend.post_processor = processors.ByteLevel()
    tokenizer = wrap_tokenizer(backend)
    monkeypatch.setattr(theirs, "tokenizer", tokenizer)  # one <s>, as the prefix
    texts = requests("loglikelihood_rolling", [(TEXT,), ("The cat",)])
    expected = theirs.loglikelihood_rolling(texts)
    for path in ("model", "tiny.gguf"):
        lm = SquatLM(path=str(folder / path), max_length=length)
        assert lm.loglikelihood_rolling(texts) == pytest.approx(expected, abs=1e-3)


def test_generation_stops_where_it_is_told(checkpoint, file):
    long = {"until": [], "max_gen_toks": 12}
    for prompt in ("The dog sees", TEXT * 3):  # the second one is longer than the context
        (whole,) = checkpoint.generate_until(requests("generate_until", [(prompt, long)]))
        assert whole
        assert file.generate_until(requests("generate_until", [(prompt, long)])) == [whole]
        stop = whole[len(whole) // 2]
        for lm in (checkpoint, file):
            cut = {"until": [stop], "max_gen_toks": 12}
            (short,) = lm.generate_until(requests("generate_until", [(prompt, cut)]))
            assert short == whole[: whole.index(stop)]


def test_sampling_is_passed_on(checkpoint, file):
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5, "top_p": 0.9}
    for lm in (checkpoint, file):
        (text,) = lm.generate_until(requests("generate_until", [("The dog", settings)]))
        assert isinstance(text, str)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, "path is missing"), ({"path": "x", "pth": 1}, "'pth' does not exist")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        SquatLM(**arguments)


@pytest.mark.slow
def test_on_the_command_line(shell, folder):
    example = ("--include_path", "examples/lm-eval", "--tasks", "local_agreement,local_story")
    for path in (folder / "model", folder / "tiny.gguf"):
        printed = shell.succeed(
            "lm-eval", "--model", "squat", "--model_args", f"path={path}", *example, "--limit", 2
        )
        assert "local_agreement" in printed
        assert "word_perplexity" in printed
    missing = ("lm-eval", "--model", "squat", "--model_args", "path=none", *example)
    assert "no model could be loaded" in shell.refuse(*missing)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["float", 8, "4:8"])
def test_blimp_is_the_same_everywhere(bits, tmp_path):
    """lm-eval's own tasks through SquatLM, folder and file, and through HFLM; and `squat eval`."""
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for paradigm in ("anaphor_number_agreement", "only_npi_scope", "wh_island", "causative"):
        with (real_data() / "blimp" / f"{paradigm}.jsonl").open() as lines:
            (pairs / f"{paradigm}.jsonl").write_text("".join(next(lines) for _ in range(100)))
    name = real_model("babylm-6m")
    tokenizer = load_tokenizer(name)
    if bits == "float":
        scorers = {name: HuggingFaceScorer(load_model(name), tokenizer)}
    else:
        save_model(
            quantize(load_model(name), SquatConfig(activation_bits=bits)), tokenizer, tmp_path / "q"
        )
        model = load_model(str(tmp_path / "q"))
        export(model, tokenizer, "q", tmp_path / "q.gguf")
        scorers = {
            str(tmp_path / "q"): HuggingFaceScorer(model, tokenizer),
            str(tmp_path / "q.gguf"): Engine(tmp_path / "q.gguf"),
        }
    files = sorted(pairs.glob("*.jsonl"))
    paradigms = read_minimal_pairs(pairs)
    harness = {path: SquatLM(path=path) for path in scorers}
    first = next(iter(scorers))
    harness["hf"] = HFLM(pretrained=load_model(first), tokenizer=tokenizer, batch_size=16)
    scorers["hf"] = scorers[first]
    for path, lm in harness.items():
        theirs = lm_eval_scores(lm, files, tmp_path)
        for result in evaluate_minimal_pairs(scorers[path], paradigms).paradigms:
            assert theirs[result.name][1] == result.accuracy
