"""One example of a batch: the equation that its feature satisfies by itself, and its solution.

With g = p - y in the column space of U, and P the projector off it,

    P (softmax(W V a) - y) = 0,        y = c 1 + sum_t w_t e_t

over the few classes t that the label singles out. c and the weights w_t enter linearly and are eliminated (variable
projection, Golub and Pereyra 1973); a in R^B remains. a = 0 and |a| -> infinity solve it too (p uniform, p one-hot);
what they violate is that the outer products of a matrix of rank B are dual to each other,

    x^T G^+ g = a^T S^-1 U^T g = D            (Wedderburn 1934)

with D what the sum of the outer products was divided by, B for a mean: one more equation, if D is known. If it is not,
every example tells it by itself.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from softinv_jax.batches.elimination import Eliminator, eliminate_linear, singled_out
from softinv_jax.batches.lanes import over_lanes
from softinv_jax.batches.least_squares import minimise
from softinv_jax.batches.subspace import BatchSubspace
from softinv_jax.labels.scalar_equation import TOLERANCE
from softinv_jax.linear_algebra import inverse_and_log_determinant, orthonormal_columns

__all__ = [
    "ITERATIONS",
    "Component",
    "Divisor",
    "prediction_error",
    "solve_components",
    "starting_weights",
    "strongest_residual",
]

ITERATIONS = 40
SETTLING = 12  # Steps in the end, with every equation weighed by its own deviation.
DUALITY_WEIGHT = 0.3
CONSTANT_DEVIATION = 1e-7  # Of the constant feature of a head with a bias.
ROUNDED_OPERATIONS = 3


class Divisor(NamedTuple):
    """D, what the sum of the outer products was divided by, and its relative standard deviation.

    0 for a known one. Infinite for one that is a guess: then it only says how large the starts are.
    """

    value: float
    deviation: float = 0.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Component:
    """One example, or with a leading axis several. All float64 but for the classes.

    Attributes:
      coordinates: (B,) a. dual: (B,) beta = U^T g, so that g = U beta.
      label: (C,) p - U beta, unstructured. level: () c. level_deviation: () standard deviation of c.
      targets: (TARGETS,) int32 classes singled out, -1 for none.
      deviation: (C,) standard deviation of p - U beta at the true a and beta, from the noise on G.
      label_deviation: (C,) of the label, with the errors of a and beta that the noise causes.
      misfit: () root mean square of (label - c) / deviation over the classes not singled out, with the degrees of
        freedom that the unknowns leave. freedom: () how many, at least 1.
      decrement: () what one more step would take off the sum of those squares: below 1, the coordinates are within one
        of their own deviations of where the iteration ends.
      logit_deviation: () largest standard deviation of a logit whose softmax entry stands out of its own: where six of
        these come near 1, deviations to first order say little.
      divisor: () x^T G^+ g. divisor_deviation: () relative, what noise makes of it.
      duality: () that over D, less 1. duality_deviation: () what noise, and not knowing D, make of it.
      constant_error: () what the constant feature of a head with a bias misses 1 by.
    """

    coordinates: jax.Array
    dual: jax.Array
    label: jax.Array
    level: jax.Array
    level_deviation: jax.Array
    targets: jax.Array
    deviation: jax.Array
    label_deviation: jax.Array
    misfit: jax.Array
    freedom: jax.Array
    decrement: jax.Array
    logit_deviation: jax.Array
    divisor: jax.Array
    divisor_deviation: jax.Array
    duality: jax.Array
    duality_deviation: jax.Array
    constant_error: jax.Array


def _residual(
    subspace: BatchSubspace,
    eliminator: Eliminator,
    coordinates: jax.Array,
    divisor: Divisor,
    duality_weight: float | jax.Array,
) -> jax.Array:
    """(C + 2,) of every class, weighted, of duality, and of the constant feature of a head with a bias."""
    prediction = jax.nn.softmax(subspace.directions @ coordinates)
    dual = eliminator.solution(prediction[:, None])[: coordinates.size, 0]
    duality = coordinates @ subspace.coupling @ dual / divisor.value - 1
    constant = subspace.constant @ coordinates - jnp.any(subspace.constant != 0)
    residual = eliminator.residual(prediction[:, None])[:, 0]
    return jnp.concatenate([residual, jnp.stack([duality_weight * duality, constant])])


def _solve(matrix: jax.Array, right: jax.Array) -> jax.Array:
    return inverse_and_log_determinant(matrix)[0] @ right


def _search(
    subspace: BatchSubspace,
    start: jax.Array,
    eliminator: Eliminator,
    divisor: Divisor,
    iterations: int | jax.Array,
    thorough: bool,
) -> jax.Array:
    """Coordinates (B,) near a solution, if there is one near the start."""
    weights = eliminator.weights
    # Residuals count relative to how far the start's own softmax is from uniform, fixed once: relative to the current
    # one, running off to a uniform softmax would pay.
    prediction = jax.nn.softmax(subspace.directions @ start)
    spread = jnp.sqrt(jnp.sum((weights * (prediction - jnp.mean(prediction))) ** 2))
    number_of_classes = subspace.left.shape[0]
    units = jnp.concatenate([jnp.full((number_of_classes,), 1 / jnp.maximum(spread, 1e-300)), jnp.ones((2,))])

    def residuals(coordinates: jax.Array) -> jax.Array:
        return _residual(subspace, eliminator, coordinates, divisor, DUALITY_WEIGHT) * units

    return minimise(residuals, None, start, iterations, 1e-2, _solve, thorough=thorough)[0]


def _settle(
    subspace: BatchSubspace,
    start: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    divisor: Divisor,
    iterations: jax.Array,
    thorough: bool,
) -> jax.Array:
    """Coordinates (B,) of the likeliest solution near one: every equation in its own standard deviations."""
    eliminator = eliminate_linear(subspace, targets, weights)
    values = subspace.singular_values
    prediction = jax.nn.softmax(subspace.directions @ start)
    dual = eliminator.solution(prediction[:, None])[: values.size, 0]
    deviation = jnp.hypot(_divisor_deviation(subspace, eliminator, start, dual), divisor.deviation)
    constant = jnp.concatenate([jnp.ones((weights.size + 1,)), 1 / CONSTANT_DEVIATION * jnp.ones((1,))])

    def residuals(coordinates: jax.Array) -> jax.Array:
        return _residual(subspace, eliminator, coordinates, divisor, 1 / deviation) * constant

    return minimise(residuals, None, start, iterations, 1e-4, _solve, thorough=thorough)[0]


def _divisor_deviation(
    subspace: BatchSubspace, eliminator: Eliminator, coordinates: jax.Array, dual: jax.Array
) -> jax.Array:
    """() relative standard deviation of x^T G^+ g: of the noise on G itself, and of beta from its own equations."""
    values = subspace.singular_values
    scaled = coordinates @ subspace.coupling
    # To first order noise E changes x^T G^+ g by x^T G^+ E G^+ g (Golub and Pereyra 1973), and E has deviation 1 here.
    noise = jnp.sqrt(jnp.sum(scaled**2) * jnp.sum((dual / values) ** 2))
    own = jnp.sqrt(jnp.sum((scaled @ eliminator.inverse[: values.size]) ** 2))
    return jnp.maximum(jnp.hypot(noise, own) / jnp.maximum(jnp.abs(scaled @ dual), 1e-300), 1e-15)


@partial(jax.jit, static_argnames="thorough")
def solve_components(
    subspace: BatchSubspace,
    starts: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    divisor: Divisor,
    iterations: int | jax.Array = ITERATIONS,
    bases: jax.Array | None = None,
    *,
    thorough: bool = False,
) -> Component:
    """Solve from every start.

    Args:
      subspace: of the batch.
      starts: (n, B) coordinates. targets: (n, TARGETS) classes assumed to be singled out, -1 for none.
      weights: (n, C) of the residuals, one over the deviations (`starting_weights`).
      divisor: D.
      iterations: at most, for all or (n,); with 0 the starts themselves are described.
      bases: (n, B, B), or (B, B) for all, orthonormal columns, or zeros in the last places: each a is confined to what
        they span; all of it as it is.
      thorough: as for `minimise`.

    Returns:
      A `Component` with a leading axis n.
    """

    rank = starts.shape[1]
    bases = jnp.broadcast_to(jnp.eye(rank) if bases is None else bases, (len(starts), rank, rank))

    steps = jnp.broadcast_to(jnp.asarray(iterations, jnp.int32), (len(starts),))

    def one(inputs: tuple[jax.Array, ...]) -> Component:
        start, chosen, own, basis, steps = inputs
        confined = subspace.confined(basis)
        eliminator = eliminate_linear(confined, chosen, own)
        found = _search(confined, start @ basis, eliminator, divisor, steps, thorough)
        settling = jnp.minimum(steps, SETTLING)
        found = _settle(confined, found, chosen, _weights(confined, found, eliminator), divisor, settling, thorough)
        solution = _describe(confined, found, chosen, _weights(confined, found, eliminator), divisor)
        return replace(solution, coordinates=basis @ found)

    return over_lanes(one, (starts, targets, weights, bases, steps))


def _describe(
    subspace: BatchSubspace, coordinates: jax.Array, targets: jax.Array, weights: jax.Array, divisor: Divisor
) -> Component:
    """The label at given coordinates, with how exactly the gradient's noise lets it be known."""
    number_of_classes, rank = subspace.left.shape
    used = targets >= 0
    singled = singled_out(targets, number_of_classes)
    prediction = jax.nn.softmax(subspace.directions @ coordinates)
    deviation = 1 / weights
    # Everything from here on in units of those deviations.
    eliminator = eliminate_linear(subspace, targets, weights)
    standardised = partial(_residual, subspace, eliminator, divisor=divisor, duality_weight=1.0)
    residuals, jacobian = standardised(coordinates), jax.jacfwd(standardised)(coordinates)
    slope = prediction[:, None] * (subspace.directions - (prediction @ subspace.directions)[None, :])
    solution = eliminator.solution(jnp.concatenate([prediction[:, None], slope], axis=1))
    dual, level = solution[:rank, 0], solution[rank, 0]
    label = prediction - subspace.left @ dual
    residual = residuals[:number_of_classes]
    # Of a, beta and c, duality takes one, if D is known.
    unknowns = rank + jnp.sum(jnp.any(subspace.directions != 0, axis=0)) + 1 - jnp.isfinite(divisor.deviation)
    freedom = jnp.maximum(number_of_classes - jnp.sum(used) - unknowns, 1)
    misfit = jnp.sqrt(jnp.sum(residual**2) / freedom)
    own_divisor = coordinates @ subspace.coupling @ dual
    divisor_deviation = _divisor_deviation(subspace, eliminator, coordinates, dual)
    duality = own_divisor / divisor.value - 1
    duality_deviation = jnp.hypot(divisor_deviation, divisor.deviation)
    # Errors of beta and c at given a, then those of a, which duality pins in one direction.
    design = jnp.concatenate([subspace.left, jnp.ones((number_of_classes, 1))], axis=1)
    leverage = jnp.sum((design @ eliminator.inverse) ** 2, axis=1)
    extra = jacobian[number_of_classes:]
    scales = jnp.stack([duality_deviation, jnp.asarray(CONSTANT_DEVIATION)])
    slopes = jnp.concatenate([jacobian[:number_of_classes], extra / scales[:, None]])
    columns, inverse = orthonormal_columns(slopes)
    errors = jnp.concatenate([residual, residuals[number_of_classes:] / scales])
    decrement = jnp.sum((columns.T @ errors) ** 2)
    # Where duality does not pin a, its errors move D as well.
    moved = jnp.sqrt(jnp.sum((extra[0] @ inverse) ** 2)) / jnp.maximum(jnp.abs(1 + duality), 1e-300)
    divisor_deviation = jnp.hypot(divisor_deviation, jnp.where(jnp.isinf(divisor.deviation), moved, 0.0))
    label_slope = slope - subspace.left @ solution[:rank, 1:]
    spread = jnp.sqrt(deviation**2 + leverage + jnp.sum((label_slope @ inverse) ** 2, axis=1))
    level_deviation = jnp.sqrt(jnp.sum(eliminator.inverse[rank] ** 2) + jnp.sum((solution[rank, 1:] @ inverse) ** 2))
    logit_slope = subspace.directions - (prediction @ subspace.directions)[None, :]
    visible = prediction > TOLERANCE * deviation
    logit_deviation = jnp.max(jnp.where(visible, jnp.sqrt(jnp.sum((logit_slope @ inverse) ** 2, axis=1)), 0.0))
    return Component(
        coordinates=coordinates,
        dual=dual,
        label=label,
        level=level,
        level_deviation=level_deviation,
        targets=targets,
        deviation=deviation,
        label_deviation=jnp.where(singled, spread, jnp.minimum(spread, deviation)),
        misfit=misfit,
        freedom=freedom,
        decrement=decrement,
        logit_deviation=logit_deviation,
        divisor=own_divisor,
        divisor_deviation=divisor_deviation,
        duality=duality,
        duality_deviation=duality_deviation,
        constant_error=residuals[-1],
    )


def label_deviation(
    subspace: BatchSubspace, coordinates: jax.Array, dual: jax.Array, prediction: jax.Array, label: jax.Array
) -> jax.Array:
    """(C,) standard deviation of p - U beta at given a and beta.

    U beta = G V S^-1 beta carries the noise of its row of G times |S^-1 beta|; x = V a misses what noise took out of
    the row space, G^T U S^-1 a, which moves the logits by |W_j| times |S^-1 a|; and the client rounds its logits, p and
    p - y, as in one example.
    """
    row = subspace.noise * jnp.sqrt(jnp.sum((dual / subspace.singular_values) ** 2))
    carried = prediction_error(subspace, coordinates, prediction)
    return jnp.sqrt(row**2 + carried**2 + (subspace.roundoff * label) ** 2)


def _weights(subspace: BatchSubspace, coordinates: jax.Array, eliminator: Eliminator) -> jax.Array:
    """(C,) one over the deviations at given a, and at the beta that is best for it with other weights."""
    prediction = jax.nn.softmax(subspace.directions @ coordinates)
    dual = eliminator.solution(prediction[:, None])[:-1, 0]
    return 1 / label_deviation(subspace, coordinates, dual, prediction, prediction - subspace.left @ dual)


@jax.jit
def starting_weights(subspace: BatchSubspace, starts: jax.Array, targets: jax.Array) -> jax.Array:
    """(n, C) weights of the residuals, one over their deviations at the starts (n, B)."""

    def one(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        start, chosen = inputs
        return _weights(subspace, start, eliminate_linear(subspace, chosen, 1 / subspace.noise))

    return over_lanes(one, (starts, targets))


def prediction_error(subspace: BatchSubspace, coordinates: jax.Array, prediction: jax.Array) -> jax.Array:
    """(C,) standard deviation of the softmax at given a: from the noise on V, and the client's own rounding."""
    feature = jnp.sqrt(jnp.sum((coordinates @ subspace.coupling) ** 2))
    logits = jnp.abs(subspace.directions @ coordinates)
    summed = subspace.summation * jnp.sqrt(jnp.sum(coordinates**2))
    logit = jnp.hypot(subspace.weight_norm * feature, subspace.roundoff * (logits + summed))
    # Independent errors of the logits, to first order: dp_j = p_j (dz_j - sum_k p_k dz_k). An entry near 1 is known
    # much better than its logit.
    shares = (prediction * logit) ** 2
    others = jnp.maximum(jnp.sum(shares) - shares, 0.0)
    carried = prediction * jnp.sqrt(((1 - prediction) * logit) ** 2 + others)
    return jnp.hypot(carried, ROUNDED_OPERATIONS * subspace.roundoff * prediction)


@jax.jit
def strongest_residual(subspace: BatchSubspace, components: Component) -> jax.Array:
    """(n, 2) int32 the classes, not yet singled out, that would explain most of each component's residual."""

    def one(component: Component) -> jax.Array:
        standardised = jnp.abs(component.label - component.level) / component.deviation
        taken = singled_out(component.targets, subspace.left.shape[0])
        # Leaving one class aside removes all of its own residual, and none of what it dragged along: the larger its
        # leverage, the more of the whole it stands for.
        eliminator = eliminate_linear(subspace, component.targets, 1 / component.deviation)
        return jax.lax.top_k(jnp.where(taken, -jnp.inf, standardised / jnp.sqrt(eliminator.share())), 2)[1].astype(
            jnp.int32
        )

    return jax.vmap(one)(components)
