"""Who judges samples: figures of made ones, and the same of real ones as their floor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from scaletrain.evaluate.distances import energy_distance, frechet_distance
from scaletrain.networks.mixture import Mixture

Figures = dict[str, float]


class Judging(Protocol):
    """Judges samples (N, ...): figures by name, each with a title and a format in `columns`."""

    columns: Mapping[str, tuple[str, str]]
    about: str
    """What the table says of the figures, in a line."""

    def figures(self, made: Tensor, told: Mapping[str, Tensor]) -> Figures:
        """Return the figures of samples (N, ...), which were told these things."""
        ...

    def floor(self) -> Figures:
        """Return what real samples score."""
        ...


@dataclass(frozen=True)
class Real:
    """Samples (N, ...), pictures in [-1, 1], and their classes (N,) where they are known."""

    samples: Tensor
    labels: Tensor | None = None

    def halves(self) -> tuple[Real, Real]:
        """Return every other sample, and the rest."""
        labels = (None, None) if self.labels is None else (self.labels[::2], self.labels[1::2])
        return Real(self.samples[::2], labels[0]), Real(self.samples[1::2], labels[1])


@final
class ModesJudge:
    """Judges points by the mixture that they should come from.

    energy_distance: unbiased, the mean over draws of 4,000 samples against as many fresh ones each. on_mode: share of
    samples within 4 σ of a mode. modes: how many are the nearest to at least one hundredth of their share.
    """

    columns: Mapping[str, tuple[str, str]] = {
        "energy_distance": ("energy distance", "{:.4f}"),
        "on_mode": ("on a mode", "{:.3f}"),
        "modes": ("modes", "{:.0f}"),
    }
    draw = 4000

    def __init__(self, mixture: Mixture, seed: int):
        self._mixture, self._seed = mixture, seed
        self.about = f"energy distance to fresh samples of all {len(mixture.means)} modes; on a mode: within 4 sigma."

    def figures(self, made: Tensor, told: Mapping[str, Tensor]) -> Figures:
        """Return the figures of points (N, D)."""
        parts = [made] if len(made) < 2 * self.draw else [p for p in made.split(self.draw) if len(p) == self.draw]
        fresh = self._fresh(sum(map(len, parts))).split([len(part) for part in parts])
        found = [energy_distance(part, own) for part, own in zip(parts, fresh, strict=True)]
        distance, mode = self._mixture.nearest(made)
        on = distance <= 4 * self._mixture.sigma
        count = len(self._mixture.means)
        reached = torch.bincount(mode[on], minlength=count) >= max(1, len(made) / count / 100)
        return {
            "energy_distance": float(np.mean(found)),
            "on_mode": float(on.float().mean()),
            "modes": int(reached.sum()),
        }

    def floor(self) -> Figures:
        """Judge samples of the mixture itself."""
        return self.figures(self._fresh(3 * self.draw, 1), {})

    def _fresh(self, count: int, number: int = 0) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(self._seed + 7919 * (number + 1))
            return self._mixture.draw(count)


@final
class PictureJudge:
    """Judges pictures, or what else is one array, by held-out ones.

    energy_distance: to the held-out samples, unbiased, on values in [-1, 1]; its floor is what the training samples
    score. By a classifier, or, where there is none and the training samples have labels, by a `Judge` of those:
    confident, the share of pictures that it is more than 90% sure of; entropy, of the classes that it takes them for,
    in nats. frechet: of what the classifier sees in them; its floor is what `count` training samples score, since it is
    the greater the fewer there are.
    """

    about = "real: held-out samples, and the distance of training ones to them."

    def __init__(self, train: Real, held: Real, classifier: Classifier | None = None, count: int = 2048):
        self._train, self._held, self._classifier = train, held, classifier
        self._some = train.samples[:: max(1, len(train.samples) // count)][:count]
        self._judge = classifier or (None if train.labels is None else Judge(train.samples, train.labels))
        self._seen = classifier.features(held.samples) if classifier else None
        self.columns: Mapping[str, tuple[str, str]] = {"energy_distance": ("energy distance", "{:.4f}")}
        if classifier:
            self.columns |= {"frechet": ("Fréchet distance", "{:.2f}")}
        if self._judge:
            self.columns |= {"confident": ("over 90% sure", "{:.1%}"), "entropy": ("class entropy", "{:.3f}")}

    def figures(self, made: Tensor, told: Mapping[str, Tensor]) -> Figures:
        """Return the figures of samples (N, ...)."""
        return self._distances(made) | self._classes(made)

    def floor(self) -> Figures:
        """Judge the held-out samples, and the training ones by them."""
        energy = energy_distance(self._train.samples, self._held.samples)
        return self._distances(self._some) | {"energy_distance": energy} | self._classes(self._held.samples)

    def _distances(self, made: Tensor) -> Figures:
        found = {"energy_distance": energy_distance(made, self._held.samples)}
        if self._classifier and self._seen is not None:
            found |= {"frechet": frechet_distance(self._classifier.features(made), self._seen)}
        return found

    def _classes(self, made: Tensor) -> Figures:
        if self._judge is None:
            return {}
        likely = self._judge.probabilities(made)
        shares = np.bincount(likely.argmax(1), minlength=likely.shape[1]) / len(likely)
        entropy = -float(np.sum(shares[shares > 0] * np.log(shares[shares > 0])))
        return {"confident": float((likely.max(1) > 0.9).mean()), "entropy": entropy}


@final
class Classifier:
    """A trained network (N, C, H, W) in [-1, 1] -> logits (N, classes): what it says, and what its last linear layer
    is given. Raises ValueError for a network without one.
    """

    def __init__(self, network: nn.Module):
        linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(f"{type(network).__name__} has no linear layer")
        self._network, self._last = network, linear[-1]

    def probabilities(self, images: Tensor) -> npt.NDArray[np.float64]:
        """Return (N, classes) for pictures (N, C, H, W)."""
        found: npt.NDArray[np.float64] = self._run(images)[0].softmax(1).cpu().numpy()
        return found

    def features(self, images: Tensor) -> Tensor:
        """Return (N, D), fp64, for pictures (N, C, H, W)."""
        return self._run(images)[1]

    @torch.no_grad()
    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        hook = self._last.register_forward_pre_hook(lambda _, given: seen.append(given[0].double()))
        try:
            logits = torch.cat([self._network(part).double() for part in images.split(1000)])
        finally:
            hook.remove()
        return logits, torch.cat(seen)


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


def _rows(images: Tensor) -> npt.NDArray[np.float64]:
    rows: npt.NDArray[np.float64] = images.flatten(1).double().cpu().numpy()
    return rows
