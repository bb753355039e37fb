"""Anderson's acceleration of a fixed point."""

import numpy as np

__all__ = ["Anderson"]

MEMORY = 8
LEAST = 1e-3  # Singular values of the changes below this share of the largest say nothing.


class Anderson:
    """Mix the last guesses so that what is left to go, were it linear, would be least (Walker and Ni, SINUM 2011)."""

    def __init__(self) -> None:
        self._points: list[np.ndarray] = []
        self._gaps: list[np.ndarray] = []

    def next(self, point: np.ndarray, gap: np.ndarray) -> np.ndarray:
        """The next point (n,), where the map leads from `point` to `point + gap`."""
        self._points = [*self._points, point][-MEMORY - 1 :]
        self._gaps = [*self._gaps, gap][-MEMORY - 1 :]
        if len(self._points) == 1:
            return point + gap
        changes, moves = np.diff(self._gaps, axis=0).T, np.diff(self._points, axis=0).T
        lengths = np.linalg.norm(changes, axis=0)
        lengths = np.where(lengths > 0, lengths, 1.0)
        shares = np.linalg.lstsq(changes / lengths, gap, rcond=LEAST)[0] / lengths
        return point + gap - (moves + changes) @ shares
