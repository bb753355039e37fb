"""How unlikely it is that an accident explains as much as a recovered example of a batch does."""

import math

import numpy as np

from softinv_jax.batches.component import Component
from softinv_jax.batches.subspace import BatchSubspace
from softinv_jax.labels.scalar_equation import TOLERANCE

__all__ = ["example_surprise", "joint_surprise"]


def _nats(subspace: BatchSubspace, one: Component) -> np.ndarray:
    """(C,) minus the logarithm of the chance that an entry of a dense label agrees to within its margin.

    Entries of a dense label are of the order 1 / C, and those of U beta no larger than |U_j| |beta|: a class that no
    example of the batch says anything about agrees with everything.
    """
    size = np.linalg.norm(np.asarray(subspace.left), axis=1) * np.linalg.norm(one.dual)
    room = np.minimum(1 / one.label.size, size)
    return np.log(np.maximum(room / (2 * TOLERANCE * one.deviation), 1.0))


def example_surprise(subspace: BatchSubspace, one: Component, *, known_divisor: bool) -> float:
    """Nats by which the agreement beyond what the unknowns account for would surprise in a dense label.

    As for one example (`labels/consensus.py`): each class that agrees to within its margin does so by accident with a
    chance of the margin over the room it has. a, beta and c, less one for duality if D is known, absorb the sharpest
    agreements; every choice of classes is one more chance.
    """
    return _surplus(subspace, [one], unknowns=2 * one.coordinates.size + (not known_divisor))


def joint_surprise(
    subspace: BatchSubspace, found: list[Component], *, known_divisor: bool, own_divisors: bool = False
) -> float:
    """Nats of the agreement of all equations together, as `example_surprise` counts them for one."""
    rank = subspace.singular_values.size
    divisors = rank if own_divisors else int(not known_divisor)
    # B^2 coordinates, which leave the duals no freedom, and a level each.
    return _surplus(subspace, found, unknowns=rank * rank + rank + divisors)


def _surplus(subspace: BatchSubspace, examples: list[Component], unknowns: int) -> float:
    """Nats of all classes not singled out but the `unknowns` sharpest, less the choices of those singled out."""
    number_of_classes = subspace.left.shape[0]
    singled = [one.targets[one.targets >= 0] for one in examples]
    nats = [np.delete(_nats(subspace, one), classes) for one, classes in zip(examples, singled, strict=True)]
    every = np.sort(np.concatenate(nats))
    kept = every[: max(len(every) - unknowns, 0)]
    choices = sum(math.log(math.comb(number_of_classes, len(classes))) for classes in singled)
    return float(kept.sum() - choices)
