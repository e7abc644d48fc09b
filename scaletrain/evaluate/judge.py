"""A classifier of real pictures that judges made ones: how sure it is of each, and what it takes them for."""

from __future__ import annotations

from typing import final

import numpy as np
import numpy.typing as npt
from torch import Tensor


@final
class Judge:
    """Multinomial logistic regression on the pixels of real pictures, strongly shrunk (C = 0.1), fitted by L-BFGS.

    It is meant to be hard to please: on scikit-learn's digits it is right on 95% of held-out ones but more than 90%
    sure of only about half, so that blurred or mixed pictures show. Compare samples with what it says of real ones.
    The fit draws nothing at random.

    images: real ones, (N, C, H, W) in [-1, 1]. labels: their classes (N,). Raises ValueError for fewer than 2 classes.
    """

    def __init__(self, images: Tensor, labels: Tensor):
        from sklearn.linear_model import LogisticRegression

        self._model = LogisticRegression(C=0.1, max_iter=2000)
        self._model.fit(_rows(images), labels.cpu().numpy())

    def probabilities(self, images: Tensor) -> npt.NDArray[np.float64]:
        """Return (N, classes) for pictures (N, C, H, W) in [-1, 1]; classes are those of the real pictures."""
        probabilities: npt.NDArray[np.float64] = self._model.predict_proba(_rows(images))
        return probabilities

    def confident(self, images: Tensor, threshold: float = 0.9) -> float:
        """Return the share of pictures whose most likely class has a probability above `threshold`."""
        return float((self.probabilities(images).max(1) > threshold).mean())

    def smallest_class(self, images: Tensor) -> float:
        """Return the share of the class that the fewest pictures are taken for; 0 when one is missing."""
        probabilities = self.probabilities(images)
        counts = np.bincount(probabilities.argmax(1), minlength=probabilities.shape[1])
        return float(counts.min() / len(probabilities))


def _rows(images: Tensor) -> npt.NDArray[np.float64]:
    rows: npt.NDArray[np.float64] = images.flatten(1).double().cpu().numpy()
    return rows
