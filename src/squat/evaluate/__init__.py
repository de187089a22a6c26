"""How good is a model? Minimal pairs (BLiMP) and perplexity, for any model that can score text.

The tasks know models only through two small protocols (`scorer.py`), so a Hugging Face model
(`huggingface.py`, the one module here that needs torch) and the C++ engine run through the same
code and their numbers can be put side by side.
"""

from squat.evaluate.minimal_pairs import (
    MinimalPairsResult,
    Paradigm,
    ParadigmResult,
    evaluate_minimal_pairs,
    minimal_pairs_table,
    read_minimal_pairs,
)
from squat.evaluate.perplexity import PerplexityResult, perplexity, perplexity_table
from squat.evaluate.scorer import LogitsModel, Scorer

__all__ = [
    "LogitsModel",
    "MinimalPairsResult",
    "Paradigm",
    "ParadigmResult",
    "PerplexityResult",
    "Scorer",
    "evaluate_minimal_pairs",
    "minimal_pairs_table",
    "perplexity",
    "perplexity_table",
    "read_minimal_pairs",
]
