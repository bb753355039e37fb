"""Where to start from one row of a batch's gradient: the one scalar that the row leaves unknown.

The row of a class that only example b singles out is nearly -(w/D) x_b. On the ray along it, the equation of one
example (`component`) is evaluated at many sizes at once, without a step of any solver; the size is read off where it
fits best, and a second class off what does not fit there.
"""

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.batches.elimination import TARGETS, eliminate_linear
from softinv_jax.batches.lanes import over_lanes
from softinv_jax.batches.subspace import BatchSubspace

__all__ = ["scan_rays"]

# Sizes tried, in units of the feature that a weight of 1 would mean: weights of 1/50 to 1, and a class that has some of
# its weight from elsewhere.
SIZES = np.geomspace(0.5, 50.0, 96)
OUTLIERS = 2  # The class of the row is left out; so many more may be singled out, or of another example.
POINTS = 2  # Local minima of the misfit along a ray.


@jax.jit
def scan_rays(subspace: BatchSubspace, rays: jax.Array, classes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The points on each ray that fit better than those next to them, and the classes that fit worst there.

    Args:
      subspace: of the batch.
      rays: (n, B) rows of the gradient, in coordinates, times -D. classes: (n,) int32, each row's own.

    Returns:
      Coordinates (n, POINTS, B), (n, POINTS, OUTLIERS) int32 classes, and whether there is such a point, (n, POINTS).
    """

    def one(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        ray, own = inputs
        targets = jnp.stack([own, *[jnp.int32(-1)] * (TARGETS - 1)])
        eliminate = eliminate_linear(subspace, targets, 1 / subspace.noise)
        logits = (subspace.directions @ ray)[:, None] * SIZES[None, :]
        prediction = jax.nn.softmax(logits, axis=0)
        residual = eliminate.residual(prediction)
        # Relative to how far the softmax is from uniform, in the same weights: at size 0 it is uniform.
        uniform = eliminate.weights / jnp.sqrt(jnp.sum(eliminate.weights**2))
        weighted = eliminate.weights[:, None] * prediction
        spread = jnp.sqrt(jnp.sum((weighted - uniform[:, None] * (uniform @ weighted)[None, :]) ** 2, axis=0))
        # A residual that the eliminated unknowns have absorbed in part stands for more.
        relative = jnp.abs(residual) / jnp.sqrt(eliminate.share())[:, None] / jnp.maximum(spread, 1e-300)[None, :]
        loss = jnp.sqrt(jnp.maximum(jnp.sum(_without_largest(relative**2), axis=0), 0.0))
        padded = jnp.pad(loss, 1, constant_values=jnp.inf)
        minima = (loss < padded[:-2]) & (loss <= padded[2:])
        # The smallest first: at large sizes a softmax of one class alone fits any gradient.
        score = jnp.where(minima, -jnp.arange(loss.size), -loss.size)
        best = jax.lax.top_k(score, POINTS)[1]
        worst = jax.lax.top_k(relative[:, best].T, OUTLIERS)[1].astype(jnp.int32)
        return jnp.asarray(SIZES)[best, None] * ray[None, :], worst, score[best] > -loss.size

    return over_lanes(one, (rays, classes))


def _without_largest(values: jax.Array) -> jax.Array:
    """(C, n) with the OUTLIERS largest of each column at 0. A maximum each: sorting costs a CPU ten times as much."""
    for _ in range(OUTLIERS):
        values = jnp.where(values == jnp.max(values, axis=0, keepdims=True), 0.0, values)
    return values
