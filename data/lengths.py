"""How long the rows of a padded batch are: one of few lengths, so that what is compiled for a shape is compiled seldom.

torch.compile makes a graph for every shape that it meets, at seconds each, and Triton a kernel for every way in which
16 divides the sizes. Attention sees real tokens alone, so padding changes no number.
"""

from __future__ import annotations

import numpy as np

SHORTEST = 16  # rows that tensor cores like; no batch is narrower, where the context has room for that
STEPS = 4  # lengths from one power of two up to the next
# The order of a stream of padded rows depends on them.
PADDING = {"shortest": SHORTEST, "lengths_to_an_octave": STEPS}


def padded_length(longest: int, most: int) -> int:
    """The least of 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, … (four to an octave) that is at least
    `longest`, or `most` if that is less. Of `most` = 16,384 there are 36 such lengths, and padding makes the longest
    row of more than 64 tokens less than a quarter longer."""
    return int(padded_lengths(np.array([longest]), most)[0])


def padded_lengths(longest_N: np.ndarray, most: int) -> np.ndarray:
    """`padded_length` of each, int64."""
    octave_N = np.maximum(longest_N - 1, 1).astype(np.float64)
    step_N = np.maximum(SHORTEST, 2 ** np.floor(np.log2(octave_N)).astype(np.int64) // STEPS)
    return np.maximum(longest_N, np.minimum(most, -(-longest_N // step_N) * step_N))
