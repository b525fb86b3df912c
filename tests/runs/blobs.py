"""A small classification file: three kinds of 8 x 8 images that a linear model tells apart, as bytes or as floats."""

import numpy as np

CLASSES, SIDE = 3, 8


def write(path, *, train=120, test=40, floats=False):
    """Every image differs from every other, so that rows can be recognised."""
    random = np.random.default_rng(0)
    shapes = random.uniform(0, 200, (CLASSES, SIDE, SIDE))
    arrays = {}
    for part, rows in (("train", train), ("test", test)):
        y = random.integers(0, CLASSES, rows)
        x = (shapes[y] + random.uniform(0, 55, (rows, SIDE, SIDE))).astype(np.uint8)
        arrays |= {f"x_{part}": x / np.float32(255) if floats else x, f"y_{part}": y}
    np.savez(path, **arrays)
    return path


CONFIG = """
data: {{train: ['{path}']}}
arrays: {{train_examples: 60, validation_examples: 24, test_examples: 30}}
optimizer: {{name: momentum, learning_rate: 0.3, schedule: constant, warmup_steps: 0}}
train: {{max_steps: 6, global_batch_size: 20}}
outer:
  {{weighting: sigmoid, learning_rate: 1.0, schedule: linear, proximal: 0.01, window: 2, max_iterations: 3,
   curvature_batches: 3}}
single_loop: {{eval_steps: 20}}
compare: {{budget: 120, seeds: 2}}
output: {{progress: false}}
mesh: {{data: 1}}
"""
