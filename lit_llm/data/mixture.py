"""Weighted mixing of sources into one endless order of samples that can be read from any point.

The order depends on the seed, the weights and the sizes of the sources only: not on ranks, workers
or what was read before. So a run resumes anywhere, with another number of ranks too.

Legend: K sources, n_k samples of source k, m_k its draws an epoch, L = sum of n_k = sum of m_k
samples an epoch.
"""

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lit_llm.errors import UserError


class Mixture:
    """The sample stream ``s(0), s(1), ...`` over K sources laid end to end.

    An epoch has L samples, as many as the sources together. Every epoch interleaves the sources in
    the same even
    pattern: after any number of samples each source's count is less than one away from its exact
        share. Source k is read in random order without repetition: its draws ``j * n_k ... (j + 1)
        * n_k - 1`` are its pass j, a permutation of all its samples drawn from ``(seed, k, j)``.

    Args:
        sizes: n_k, the samples of each source.
        weights: Relative share of each source; None draws in proportion to the sizes, each sample
            once an epoch.
        seed: Seed of the permutations.
        names: Names of the sources, for messages.

    Raises:
        UserError: When a source is empty, a weight is not positive, or a share is below one sample
            an epoch.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        seed: int = 0,
        names: Sequence[str] | None = None,
    ) -> None:
        names = names or [f"number {k}" for k in range(len(sizes))]
        shares = [float(weight) for weight in (sizes if weights is None else weights)]
        for name, size, share in zip(names, sizes, shares, strict=True):
            if size < 1:
                raise UserError(f"source {name} has no samples: give it more text or leave it out.")
            if not (0 < share < float("inf")):
                raise UserError(
                    f"the weight of source {name} is {share}: it must be a number above 0."
                )
        self.sizes = [int(size) for size in sizes]
        self.seed = seed
        self.epoch_length = sum(self.sizes)
        self.draws = _apportion(self.epoch_length, shares)
        for name, draws in zip(names, self.draws, strict=True):
            if draws == 0:
                raise UserError(
                    f"the weight of source {name} gives it none of the {self.epoch_length} "
                    "samples of an epoch: raise the weight or leave the source out."
                )
        self._source = _interleave(self.draws)
        # How many draws of the same source precede each position of the epoch.
        self._earlier = np.empty(self.epoch_length, dtype=np.int64)
        for k in range(len(self.sizes)):
            own = np.flatnonzero(self._source == k)
            self._earlier[own] = np.arange(len(own))
        self._offset = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        self._passes: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        """L, the samples of an epoch."""
        return self.epoch_length

    def indices(self, start: int, stop: int) -> NDArray[np.int64]:
        """The samples ``s(start) ... s(stop - 1)``, as indices into the sources laid end to end.

        Args:
            start: First position in the stream, from 0.
            stop: Position after the last.
        """
        epoch, position = np.divmod(np.arange(start, stop, dtype=np.int64), self.epoch_length)
        source = self._source[position]
        result = np.empty(len(position), dtype=np.int64)
        for k in np.unique(source):
            own = np.flatnonzero(source == k)
            draw = epoch[own] * self.draws[k] + self._earlier[position[own]]
            which, item = np.divmod(draw, self.sizes[k])
            for pass_number in np.unique(which):
                now = which == pass_number
                permutation = self._permutation(int(k), int(pass_number))
                result[own[now]] = self._offset[k] + permutation[item[now]]
        return result

    def counts(self, consumed: int) -> list[int]:
        """How many of the first ``consumed`` samples of the stream came from each source."""
        epochs, rest = divmod(consumed, self.epoch_length)
        part = np.bincount(self._source[:rest], minlength=len(self.sizes))
        return [epochs * m + int(n) for m, n in zip(self.draws, part, strict=True)]

    def _permutation(self, source: int, pass_number: int) -> NDArray[np.int64]:
        number, permutation = self._passes.get(source, (-1, np.empty(0, np.int64)))
        if number != pass_number:
            # Sorted raw bits, not Generator.permutation: only the bits are promised to be the same
            # in every version of NumPy.
            bits = np.random.PCG64(np.random.SeedSequence([self.seed, source, pass_number]))
            permutation = np.argsort(bits.random_raw(self.sizes[source]), kind="stable")
            self._passes[source] = (pass_number, permutation)
        return permutation


def _apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Split ``total`` into whole numbers in proportion to ``shares`` (largest remainder)."""
    exact = np.asarray(shares, dtype=np.float64) / np.sum(shares) * total
    parts = np.floor(exact + 1e-9).astype(np.int64)  # 2.9999999996 is 3
    order = np.argsort(parts - exact, kind="stable")
    parts[order[: total - int(parts.sum())]] += 1
    return [int(part) for part in parts]


def _interleave(draws: Sequence[int]) -> NDArray[np.int16]:
    """Order m_k draws of each source so that every prefix is close to the exact shares.

    No count is ever a whole draw away from its share. Draw j of source k may stand at positions
    ``floor(j L / m_k) ... ceil((j + 1) L / m_k) - 1``; taking the open draw with the earliest
    deadline always fits (Steiner and Yeomans, 1993, "Level schedules for mixed-model, just-in-time
    processes").
    """
    length = sum(draws)
    if len(draws) == 1:
        return np.zeros(length, dtype=np.int16)
    order = np.empty(length, dtype=np.int16)
    upcoming = [(0, k, 0) for k in range(len(draws))]  # release, source, draw
    heapq.heapify(upcoming)
    open_draws: list[tuple[int, int, int]] = []  # deadline, source, draw
    for position in range(length):
        while upcoming and upcoming[0][0] <= position:
            _, k, j = heapq.heappop(upcoming)
            heapq.heappush(open_draws, (-(-(j + 1) * length // draws[k]), k, j))
        _, k, j = heapq.heappop(open_draws)
        order[position] = k
        if j + 1 < draws[k]:
            heapq.heappush(upcoming, ((j + 1) * length // draws[k], k, j + 1))
    return order
