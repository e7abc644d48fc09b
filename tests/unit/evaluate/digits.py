"""Real pictures to judge by: scikit-learn's digits in two halves."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from scaletrain.evaluate.judges import Real


def real_digits() -> tuple[Real, Real]:
    """Return 898 digits, and the 899 others."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.tensor(images[order] / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(labels[order])
    return Real(x[:898], y[:898]), Real(x[898:], y[898:])
