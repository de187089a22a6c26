"""On real text a token has the same bits in one piece, in chunks, in decoding, in batches and in beams."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import real_data, real_model
from squat.quantization import SquatConfig, quantize

TEXTS = {
    "babylm-6m": "babylm/dev/simple_wiki.dev",
    "stories260k": "babylm/dev/children_stories.dev",
}


@pytest.fixture(
    scope="module", params=[pytest.param("babylm-6m", marks=pytest.mark.slow), "stories260k"]
)
def real(request):
    """A real model with 4:8 tokens, its tokenizer, and windows of real text [6, 96]."""
    folder = real_model(request.param)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    text = (real_data() / TEXTS[request.param]).read_text()[:20_000]
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    ids = ids[: 38 * 96].view(38, 96)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return quantize(model, SquatConfig(), calibration=[ids[6:]]).eval(), tokenizer, ids[:6]


@torch.no_grad()
def run(model, ids, **kwargs):
    """Logits, widths by layer [layers, batch, tokens] and the cache of one forward pass."""
    out = model(input_ids=ids, **kwargs)
    wide = torch.stack([w for _, w in sorted(model.token_state.wide.items())])
    return out.logits, wide, out.past_key_values


def remembered(model, cache):
    """Widths in the cache: of values by layer, and of keys, which follow the layer before."""
    layers = cache.layers[model.config.num_hidden_layers :]
    keys = torch.stack([layer.keys[:, 0, :, 0] for layer in layers])
    return keys, torch.stack([layer.values[:, 0, :, 0] for layer in layers])


def test_both_widths_occur_in_every_layer(real):
    model, _, ids = real
    share = run(model, ids)[1].float().mean(dim=(1, 2))
    assert (share > 0.2).all()
    assert (share < 0.8).all()


@pytest.mark.parametrize("size", [1, 7, 32])
def test_chunked_prefill_and_decoding(real, size):
    model, _, ids = real
    logits, wide, _ = run(model, ids)
    cache, pieces = None, []
    for chunk in ids.split(size, dim=1):
        *piece, cache = run(model, chunk, past_key_values=cache, use_cache=True)
        pieces.append(piece)
    assert torch.equal(torch.cat([w for _, w in pieces], dim=2), wide)
    assert torch.equal(torch.cat([x for x, _ in pieces], dim=1), logits)
    keys, values = remembered(model, cache)
    assert torch.equal(values, wide)
    assert keys[0].all()
    assert torch.equal(keys[1:], wide[:-1])


def test_left_padded_batches(real):
    model, _, ids = real
    lengths = [96, 70, 41, 17, 5, 1]
    batch, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        batch[row, 96 - length :] = ids[row, :length]
        mask[row, 96 - length :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits, wide, _ = run(model, batch, attention_mask=mask, position_ids=positions)
    for row, length in enumerate(lengths):
        alone_logits, alone_wide, _ = run(model, ids[row : row + 1, :length])
        assert torch.equal(wide[:, row, 96 - length :], alone_wide[:, 0])
        assert torch.equal(logits[row, 96 - length :], alone_logits[0])


def test_batched_generation(real):
    model, tokenizer, ids = real
    prompts = [row[:length].tolist() for row, length in zip(ids, [60, 9, 23], strict=False)]
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    found = model.generate(**batch, **options, return_dict_in_generate=True)
    _, values = remembered(model, found.past_key_values)
    for row, prompt in enumerate(prompts):
        start = 60 - len(prompt)
        alone = model.generate(torch.tensor([prompt]), **options)
        assert torch.equal(found.sequences[row, start:], alone[0])
        wide = run(model, alone[:, :-1])[1]
        assert torch.equal(values[:, row, start:], wide[:, 0])


@pytest.fixture(scope="module")
def narrow(real):
    """The same model where the first token of a text has 8 bits and all others 4."""
    adaptive, tokenizer, ids = real
    model = AutoModelForCausalLM.from_pretrained(adaptive.name_or_path)
    return quantize(model, SquatConfig(activation_bits=4), calibration=[ids]).eval(), tokenizer, ids


def test_the_first_token_is_known_in_chunks_batches_and_decoding(narrow):
    model, tokenizer, ids = narrow
    with torch.no_grad():
        expected, cache, pieces = model(ids).logits, None, []
        for chunk in ids.split(7, dim=1):
            out = model(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
        assert torch.equal(torch.cat(pieces, dim=1), expected)
        prompts = [row[:length].tolist() for row, length in zip(ids, [60, 9, 1], strict=False)]
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
        assert torch.equal(model(**batch, position_ids=positions).logits[1, 51:], expected[1, :9])
        # Several texts in a row say by their positions where each begins.
        row, positions = (
            torch.cat([ids[0, :50], ids[1, :30]]),
            torch.cat([torch.arange(50), torch.arange(30)]),
        )
        model(row[None], position_ids=positions[None])
    assert model.token_state.first[0].nonzero().flatten().tolist() == [0, 50]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    found = model.generate(**batch, **options)
    for i, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), **options)
        assert torch.equal(found[i, 60 - len(prompt) :], alone[0])


def test_beam_search(real):
    """The score of a beam that changed places in the cache is that of its text in one piece."""
    model, _, ids = real
    found = model.generate(
        ids[:2, :24],
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    texts = found.sequences
    log_probs = run(model, texts[:, :-1])[0][:, 23:].log_softmax(-1)
    scores = log_probs.gather(2, texts[:, 24:, None]).sum(dim=(1, 2))
    torch.testing.assert_close(found.sequences_scores, scores, atol=1e-4, rtol=1e-5)
    moved = (found.beam_indices[:, 1:24] % 4).diff(dim=1) != 0
    assert moved.any()
