"""How fast the engine is: models of random weights in named shapes, and a stopwatch.

Speed does not depend on what a model has learned, only on its shape and its widths; so a random model of the
right shape measures as well as a trained one and needs no training. Neither torch nor transformers is
imported.
"""

from squat.bench.measure import (
    ROUNDS,
    Measurement,
    Settings,
    measurements_table,
    profile,
    profile_table,
    run,
    spread,
    write_random_file,
)
from squat.bench.shapes import SHAPES, Shape, find_shape

__all__ = [
    "ROUNDS",
    "SHAPES",
    "Measurement",
    "Settings",
    "Shape",
    "find_shape",
    "measurements_table",
    "profile",
    "profile_table",
    "run",
    "spread",
    "write_random_file",
]
