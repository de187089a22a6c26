"""A model from another program's .gguf file: `squat import`, and wherever a float model is named.

Many models are at hand only as such a file, often quantized in blocks (Q4_0, Q6_K, ...). What is
read is a plain float32 model of transformers and a fast tokenizer, which train, save and load as any
other: `file` opens and checks the file, `model` makes config and weights of it, `tokenizer` the
tokenizer. `squat.checkpoints.load_model` and `load_tokenizer` call them for such a file, whatever its name.

**Weights** are what the gguf package dequantizes, as float32 whatever the file's types are: training wants
that, and float32 holds F16, BF16 and the usual block types without rounding again. Names are those of
`squat.architectures`; llama.cpp's order of the rows of q and k is undone. Every tensor of the model must be
in the file, with the right shape and finite values, and every tensor of the file in the model: nothing is
initialized at random or left out in silence. A head that is missing, or is the embedding once more,
is tied.

**The config** is made from the file's keys, and what it cannot express is refused: another scaling of RoPE
than linear, yarn and llama3's, layers that differ, experts.

**The tokenizer** is what llama.cpp makes of the file, so that the same text has the same ids in both. How
text is split before the merges stands in the file only as a name (`tokenizer.ggml.pre`); the table of names
is `squat.deploy.splits.SPLITS`, and a name that it lacks is refused. bos, eos, and what is put around a
text are those of the file's keys.

transformers can read such files itself (`from_pretrained(..., gguf_file=...)`), but fills what is missing
with random numbers, drops what it does not expect (biases of a Llama, scaling of RoPE), splits some
vocabularies (`smollm`) as GPT-2's, and cannot save the result: so it is not used here.
"""
