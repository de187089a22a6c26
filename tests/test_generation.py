"""`squat generate`: checkpoint and file say the same, in full, as it is; what cannot be said is refused."""

import io
import json
import shutil
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers

from models import tiny_model
from squat.checkpoints import load_model, load_tokenizer, save_model
from squat.cli import main
from squat.data import wrap_tokenizer
from squat.engine import Engine
from squat.errors import EngineError
from squat.evaluate.tasks import label_of

PIECES = ["▁The", "▁girl", "▁sees", "▁a", "▁cat", ":heart:", "[bold]", "\t", "\x1b[1m", "日"]


def strip_first_blank(pieces):
    """A tokenizer as Llama 2 has it: a blank in front of the text, which decoding takes away again."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "▁", *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="▁"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap_tokenizer(tokenizer)


def says(folder, token, architecture="llama"):
    """A model folder whose model says one token, over and over, whatever it reads."""
    tokenizer = strip_first_blank(PIECES)
    network = tiny_model(architecture, vocab_size=len(tokenizer), tie_word_embeddings=False)
    last = {"llama": "model.norm", "gpt2": "transformer.ln_f"}[architecture]
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.fill_(name.startswith(last))
        network.get_input_embeddings().weight.fill_(1.0)
        network.get_output_embeddings().weight[tokenizer.get_vocab()[token]] = 1.0
    save_model(network, tokenizer, folder)
    return folder


@pytest.mark.parametrize("token", PIECES)
def test_what_a_model_says_arrives_as_it_is(shell, tmp_path, token):
    model = says(tmp_path / "model", token)
    said = shell.succeed("generate", model, "▁The", "--max-new-tokens", 2)
    assert said == "▁The" + 2 * token.replace("▁", " ") + "\n"


def test_a_folder_says_what_its_file_says_sampled_too(shell, tmp_path, model, corpus):
    quantized, file = tmp_path / "quantized", tmp_path / "quantized.gguf"
    shell.succeed("quantize", model, quantized, "--data", corpus / "train")
    shell.succeed("export", quantized, file)
    options = ("The girl", "--max-new-tokens", 12, "--temperature", 1.5, "--seed", 7)
    said = shell.succeed("generate", quantized, *options)
    assert said == shell.succeed("generate", file, *options)
    assert said != shell.succeed("generate", quantized, *options[:-1], 8)
    expected = load_model(str(quantized)).generate(
        torch.tensor([load_tokenizer(str(quantized))("The girl")["input_ids"]]),
        max_new_tokens=6,
        do_sample=False,
    )
    greedy = shell.succeed("generate", quantized, "The girl", "--max-new-tokens", 6)
    assert load_tokenizer(str(quantized)).decode(expected[0], skip_special_tokens=True) in (
        greedy.rstrip("\n"),
        " " + greedy.rstrip("\n"),
    )
    renamed = shutil.copy(file, tmp_path / "quantized.bin")
    assert shell.succeed("generate", renamed, *options) == said
    assert "is no GGUF file" in shell.refuse("generate", corpus / "dev" / "grammar.dev", "The")
    for source in (quantized, file, renamed):
        message = shell.refuse("generate", source, "The girl", "--max-new-tokens", 70)
        assert "give at most" in message
        room = int(message.split("give at most ")[1].split(",")[0])
        shell.succeed("generate", source, "The girl", "--max-new-tokens", room)
        message = shell.refuse("generate", source, "The girl", "--max-new-tokens", room + 1)
        assert f"max_new_tokens: {room + 1} new tokens" in message
        message = shell.refuse("generate", source, "The girl " * 60)
        assert "exceed the model's context of 64" in message
        message = shell.refuse("generate", source, "caf\udce9")
        assert "prompt: character 4 is the byte 0xe9, which is no UTF-8" in message
        message = shell.refuse("generate", source, "\ud83d")
        assert "prompt: character 1 is U+D83D, half of a character" in message
    with pytest.raises(EngineError, match="byte 0xe9"):
        Engine(file).score(["caf\udce9"])


def test_learned_positions_end_where_the_table_does(shell, tmp_path):
    model = says(tmp_path / "gpt2", "▁cat", "gpt2")
    said = shell.succeed("generate", model, "▁The", "--max-new-tokens", 64)
    assert said == "▁The" + 64 * " cat" + "\n"
    assert "give at most 64" in shell.refuse("generate", model, "▁The", "--max-new-tokens", 65)


def test_every_end_token_ends_an_answer(shell, tmp_path):
    model = says(tmp_path / "model", "▁cat")
    file = model / "generation_config.json"
    ends = [2, load_tokenizer(str(model)).get_vocab()["▁cat"]]
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": ends}))
    assert shell.succeed("generate", model, "▁The") == "▁The\n"


def test_without_a_number_of_tokens_an_answer_ends_with_the_context(shell, tmp_path):
    model = says(tmp_path / "model", "▁cat")
    assert shell.succeed("generate", model, "▁The") == "▁The" + 64 * " cat" + "\n"


def test_a_terminal_that_lacks_the_characters_gets_their_numbers(shell, tmp_path, monkeypatch):
    model = says(tmp_path / "model", "日")
    for errors, expected in (("strict", b"\\u65e5"), ("replace", b"?")):
        out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", errors=errors)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(
            sys, "argv", ["squat", "generate", str(model), "é", "--max-new-tokens", "1"]
        )
        with pytest.raises(SystemExit) as exit:
            main()
        out.flush()
        assert not exit.value.code
        assert out.buffer.getvalue() == b"\xe9" + expected + b"\n"


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "seven").mkdir()
    monkeypatch.chdir(tmp_path / "seven")
    assert label_of(".") == "seven"
    assert label_of("model.gguf") == "seven"
