"""The order of samples, and the seeds of their randomness, as pure functions of position.

Nothing here has state: the n-th sample of a run is computed from (key, n), in constant memory, so a resume seeks
instead of replaying, and every process, however many there are, computes the same order.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Int = npt.NDArray[np.int64]
_ROUNDS = 6


def key_of(*parts: object) -> int:
    """Hash anything printable to 63 bits: the key of a permutation or the seed of a generator."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64 bits (the finaliser of SplitMix64; Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: Int, size: int, key: int) -> Int:
    """Apply a pseudo-random permutation of 0..size-1 to each of `index`, in O(1) memory for any size.

    A balanced Feistel network over the next power of four, walked along its cycle until it lands inside (Black and
    Rogaway, 2002, "Ciphers with arbitrary finite domains").
    """
    bits = max(3, ((size - 1).bit_length() + 1) // 2)  # fewer than 3 reach too few permutations
    half, mask = np.uint64(bits), np.uint64((1 << bits) - 1)
    with np.errstate(over="ignore"):
        rounds = _mix(np.uint64(key) + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        out = index.astype(np.uint64)
        todo = np.arange(index.size)
        while todo.size:
            left, right = out[todo] >> half, out[todo] & mask
            for salt in rounds:
                left, right = right, left ^ (_mix(right + salt) & mask)
            out[todo] = left << half | right
            todo = todo[out[todo] >= size]
    return out.astype(np.int64)


def permutation(size: int, key: int) -> Int:
    """Return the whole permutation of 0..size-1 under `key`."""
    return permute(np.arange(size), size, key)


def seeds(position: Int, key: int) -> npt.NDArray[np.uint64]:
    """Return a seed for the randomness of the sample at each position (augmentation, corruption)."""
    with np.errstate(over="ignore"):
        return _mix(_mix(position.astype(np.uint64) + np.uint64(1)) ^ np.uint64(key))


class Order:
    """The endless sequence of a data set's examples, each epoch in an order of its own.

    size: examples in an epoch. seed: anything printable, such as (seed, stage).
    """

    _TABLE = 1 << 20
    """An epoch of up to so many examples is permuted once and kept (8 MiB at most): a look-up instead of arithmetic."""

    def __init__(self, size: int, *seed: object):
        self.size = size
        self._seed = seed
        self._epoch, self._table = -1, np.empty(0, np.int64)

    def __call__(self, position: Int) -> Int:
        """Return the example number at each position of the endless sequence (0-based)."""
        epoch, place = np.divmod(position, self.size)
        out = np.empty_like(place)
        for number in np.unique(epoch).tolist():
            chosen = epoch == number
            out[chosen] = self._in_epoch(number, place[chosen])
        return out

    def _in_epoch(self, epoch: int, place: Int) -> Int:
        key = key_of(*self._seed, "order", epoch)
        if self.size > self._TABLE:
            return permute(place, self.size, key)
        if self._epoch != epoch:
            self._epoch, self._table = epoch, permutation(self.size, key)
        return self._table[place]
