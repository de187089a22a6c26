"""`squat export` gives no file out that computes something else than its checkpoint."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models import ARCHITECTURES, quantized_model, some_ids
from squat.data import train_tokenizer
from squat.deploy import verify
from squat.deploy.gguf import write_gguf
from squat.engine import Engine
from squat.errors import ParityError


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(["the cat sat on the mat, and the dog ran away."] * 50), 300)


def quantized(name, tokenizer):
    return quantized_model(name, vocab_size=len(tokenizer))


def export_damaged(monkeypatch, model, tokenizer, file, damage):
    """Export as if the writer had a fault: it writes what `damage` makes of a description."""

    def write(path, described):
        write_gguf(path, damage(described))

    monkeypatch.setattr(verify, "write_gguf", write)
    with pytest.raises(ParityError) as refused:
        verify.export_verified(model, tokenizer, "tiny", file)
    assert not list(file.parent.iterdir())
    return str(refused.value)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_computes_the_same_is_written(name, tokenizer, tmp_path):
    model = quantized(name, tokenizer)
    verify.export_verified(model, tokenizer, "tiny", tmp_path / "new/m.gguf")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["m.gguf"]
    ids = some_ids(1, 20)[0]
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    assert np.array_equal(Engine(tmp_path / "new/m.gguf").logits(ids), expected)


@pytest.mark.parametrize(
    ("name", "layer", "where"),
    [
        ("llama", 1, "layer 1"),
        ("gemma3_text", 2, "layer 2"),
        ("lfm2", 1, "layers 0 to 1"),  # its first layer with attention
        ("lfm2", 2, "layer 2"),
    ],
)
def test_the_layer_that_computes_otherwise_is_named(
    name, layer, where, tokenizer, tmp_path, monkeypatch
):
    def damage(described):
        site = described.sites["mlp_in"]
        factors = [4 if i == layer else 1 for i in range(described.layers)]
        wide, narrow = (
            [step * factor for step, factor in zip(steps, factors, strict=True)]
            for steps in (site.step8, site.step4 or [0] * described.layers)
        )
        other = replace(site, step8=wide, step4=narrow if site.step4 else None)
        return replace(described, sites={**described.sites, "mlp_in": other})

    model = quantized(name, tokenizer)
    said = export_damaged(monkeypatch, model, tokenizer, tmp_path / "m.gguf", damage)
    assert f"the engine computes otherwise in {where};" in said


def test_the_tensor_that_differs_is_named(tokenizer, tmp_path, monkeypatch):
    def damage(described):
        matrix = described.matrices["blk.1.ffn_up"]
        other = replace(matrix, codes=np.roll(matrix.codes, 1, axis=0))
        return replace(described, matrices={**described.matrices, "blk.1.ffn_up": other})

    said = export_damaged(
        monkeypatch, quantized("llama", tokenizer), tokenizer, tmp_path / "m.gguf", damage
    )
    assert "codes differ in blk.1.ffn_up;" in said
