"""A model that people use stays itself: SmolLM2-135M from its .gguf to a file that the engine runs."""

import numpy as np
import pytest
import torch

from models import real_data
from real_models import smollm2
from squat.checkpoints import load_model, load_tokenizer
from squat.deploy.export import export
from squat.deploy.parity import compare
from squat.engine import Engine
from squat.quantization import SquatConfig, quantize
from squat.runs import distance

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smol():
    file = str(smollm2())
    return load_model(file), load_tokenizer(file)


@pytest.fixture(scope="module")
def windows(smol):
    """Sixteen windows of an encyclopedia, each behind the first token."""
    _, tokenizer = smol
    text = (real_data() / "babylm" / "train" / "simple_wiki.train").read_text()[:60_000]
    ids = tokenizer(text, add_special_tokens=False).input_ids[: 16 * 127]
    rows = torch.tensor(ids).view(16, 127)
    return torch.cat([torch.full((16, 1), tokenizer.bos_token_id), rows], dim=1)


@pytest.mark.parametrize(("weight_bits", "most"), [(8, 0.03), (4, 0.8)])
def test_it_stays_itself_and_the_engine_computes_the_same_bits(
    smol, windows, weight_bits, most, tmp_path
):
    original, tokenizer = smol
    config = SquatConfig(weight_bits=weight_bits, activation_bits=8)
    quantized = quantize(load_model(str(smollm2())), config, windows[:12].split(4)).eval()
    assert distance(original, quantized, windows[12:].split(4)).kl < most
    file = tmp_path / "smol.gguf"
    export(quantized, tokenizer, "smol", file)
    parity = compare(quantized, tokenizer, str(file), windows[:1, :40].tolist())
    assert parity.holds
    assert parity.largest == 0
    if weight_bits == 8:
        engine = Engine(str(file))
        assert "Paris" in engine.generate("The capital of France is", max_new_tokens=8)
        assert np.isfinite(engine.score(["The capital of France is Paris."])).all()
        # Of every token of its answer the original is sure by more than a nat. The question alone it
        # answers in French as nearly as in English.
        question = (
            "What is the capital of France? Answer with one sentence: The capital of France is ..."
        )
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert engine.chat_tokens(messages) == prompt
        answer = engine.chat(messages, stream=True)
        said = "".join(answer)
        assert said == "The capital of France is Paris."
        assert answer.finish_reason == "stop"
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "Why?"}]
        again = engine.chat(messages, 16, stream=True)
        assert "".join(again) == Engine(str(file)).chat(messages, 16)
        assert again.reused_tokens >= answer.prompt_tokens
