"""Whether examples explain the gradient of a batch together."""

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.batches.candidates import largest_misfit
from softinv_jax.batches.component import Component, Divisor
from softinv_jax.batches.elimination import TARGETS
from softinv_jax.batches.joint import JointFit, fit_jointly
from softinv_jax.batches.subspace import BatchSubspace
from softinv_jax.labels.scalar_equation import TOLERANCE

__all__ = ["explains", "fit_found", "is_fitted"]

SMALLEST_EXPECTED = 0.01  # Of a client that rounds far less than it is given credit for.
# With more unknowns than this, whose normal matrix alone has 288 MiB, the joint fit is left out.
LARGEST_JOINT = 6144


def fit_found(
    subspace: BatchSubspace, found: list[Component], divisor: Divisor, divisors: np.ndarray | None = None
) -> JointFit | None:
    """The joint fit of all examples, from where they were found; NumPy. None where it would be too large.

    Args:
      divisors: (n,) D of each example, where they have their own.
    """
    if not is_fitted(subspace.singular_values.size):
        return None
    coordinates = jnp.asarray([one.coordinates for one in found])
    targets = np.array([one.targets for one in found], np.int32)
    weights = jnp.asarray([np.where(one.targets >= 0, one.label[one.targets] - one.level, 0.0) for one in found])
    own = {} if divisors is None else {"divisors": jnp.asarray(divisors), "own_divisors": True}
    fit = fit_jointly(subspace, coordinates, weights, jnp.asarray(targets), divisor, **own)
    return jax.tree.map(np.asarray, fit)


def is_fitted(rank: int) -> bool:
    """Whether the joint fit of so many examples is no larger than it may be."""
    return rank * (rank + TARGETS) <= LARGEST_JOINT


def explains(joint: JointFit) -> bool:
    """Converged, with residuals no larger than noise may make them, however few degrees of freedom.

    And not next to nothing: then it is the noise that is too large, of an example that ran off to infinity.
    """
    smallest = 0.0 if joint.freedom <= 1 else SMALLEST_EXPECTED
    largest = min(TOLERANCE / 2, largest_misfit(np.float64(joint.freedom)))
    return bool(joint.decrement <= 1 and smallest <= joint.misfit <= largest)
