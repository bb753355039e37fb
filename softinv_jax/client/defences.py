"""What a client can do to its gradient before it uploads it; composable, on any pytree of arrays.

A defence maps a key and a gradient to a gradient of the same structure. All are dataclasses whose numbers may be
traced, so that one compiled program serves every strength: `jax.vmap` over a defence works as over any pytree.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

__all__ = [
    "Clipping",
    "Defence",
    "DifferentialPrivacy",
    "GaussianNoise",
    "HeadNoise",
    "HeadWithheld",
    "LaplaceNoise",
    "Pruning",
    "Quantisation",
    "Sign",
    "apply_defences",
    "differential_privacy_epsilon",
    "global_norm",
]


class Defence(Protocol):
    """(key, gradient) -> gradient, a pytree of the same structure, shapes and dtypes."""

    def __call__(self, key: jax.Array, gradient: Any) -> Any: ...


def apply_defences(key: jax.Array, gradient: Any, defences: Sequence[Defence]) -> Any:
    """Apply defences one after the other, each with a key of its own; pure, may be vmapped and jitted."""
    for place, defence in enumerate(defences):
        gradient = defence(jax.random.fold_in(key, place), gradient)
    return gradient


def global_norm(gradient: Any) -> jax.Array:
    """Euclidean norm () over all entries of all arrays."""
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Clipping:
    """Scale the gradient down to a global norm of at most `norm` (> 0)."""

    norm: jax.Array | float

    def __post_init__(self) -> None:
        _check("norm", self.norm, above=0.0)

    def __call__(self, key: jax.Array, gradient: Any) -> Any:
        size = global_norm(gradient)
        factor = jnp.where(size > self.norm, self.norm / jnp.where(size > 0, size, 1.0), 1.0)
        return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), gradient)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GaussianNoise:
    """Add N(0, deviation^2) to every entry; deviation >= 0, in the gradient's unit."""

    deviation: jax.Array | float

    def __post_init__(self) -> None:
        _check("deviation", self.deviation, least=0.0)

    def __call__(self, key: jax.Array, gradient: Any) -> Any:
        return _add_noise(key, gradient, self.deviation, jax.random.normal)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LaplaceNoise:
    """Add Laplace noise of scale `scale` (>= 0) to every entry; its standard deviation is sqrt(2) scale."""

    scale: jax.Array | float

    def __post_init__(self) -> None:
        _check("scale", self.scale, least=0.0)

    def __call__(self, key: jax.Array, gradient: Any) -> Any:
        return _add_noise(key, gradient, self.scale, jax.random.laplace)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DifferentialPrivacy:
    """The Gaussian mechanism of DP-SGD: clip to `norm`, then add noise of deviation noise_multiplier * norm.

    Source: Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1, for one example.
    """

    norm: jax.Array | float
    noise_multiplier: jax.Array | float

    def __post_init__(self) -> None:
        _check("norm", self.norm, above=0.0)
        _check("noise_multiplier", self.noise_multiplier, least=0.0)

    def __call__(self, key: jax.Array, gradient: Any) -> Any:
        clipped = Clipping(self.norm)(key, gradient)
        return GaussianNoise(self.norm * self.noise_multiplier)(key, clipped)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pruning:
    """Set the `share` (in [0, 1]) of smallest magnitudes in each array to zero: top-k, as gradient compression does.

    Entries as large as the smallest one kept are kept. Source: Lin et al., "Deep gradient compression", ICLR 2018.
    """

    share: jax.Array | float

    def __post_init__(self) -> None:
        _check("share", self.share, least=0.0, most=1.0)

    def __call__(self, key: jax.Array, gradient: Any) -> Any:
        def prune(leaf: jax.Array) -> jax.Array:
            size = jnp.abs(leaf)
            # float32 resolves the count of entries only up to 2^24: rounded, a share of 0.9 of ten is nine.
            dropped = jnp.round(jnp.asarray(self.share, jnp.float32) * leaf.size).astype(jnp.int32)
            smallest_kept = jnp.sort(size.ravel())[jnp.minimum(dropped, leaf.size - 1)]
            return jnp.where((size >= smallest_kept) & (dropped < leaf.size), leaf, 0)

        return jax.tree.map(prune, gradient)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantisation:
    """Round each array to 2^bits - 1 evenly spaced levels from minus its largest magnitude to plus it; bits >= 2."""

    bits: jax.Array | float

    def __post_init__(self) -> None:
        _check("bits", self.bits, least=2.0)

    def __call__(self, key: jax.Array, gradient: Any) -> Any:
        def quantise(leaf: jax.Array) -> jax.Array:
            positive_levels = 2.0 ** (jnp.asarray(self.bits, leaf.dtype) - 1) - 1
            largest = jnp.max(jnp.abs(leaf))
            step = jnp.where(largest > 0, largest, 1.0) / positive_levels
            return jnp.round(leaf / step) * step

        return jax.tree.map(quantise, gradient)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sign:
    """Keep the sign of each entry alone: -1, 0 or 1. Source: Bernstein et al., "signSGD", ICML 2018."""

    def __call__(self, key: jax.Array, gradient: Any) -> Any:
        return jax.tree.map(jnp.sign, gradient)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadWithheld:
    """Send zeros for every array of the layer `head`, a path as `find_head` gives it, e.g. "head"."""

    head: str = field(metadata={"static": True})

    def __call__(self, key: jax.Array, gradient: Any) -> Any:
        return _at(self.head, gradient, partial(jax.tree.map, jnp.zeros_like))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadNoise:
    """Add N(0, deviation^2) to every entry of the layer `head` alone; see `HeadWithheld` and `GaussianNoise`."""

    deviation: jax.Array | float
    head: str = field(metadata={"static": True})

    def __post_init__(self) -> None:
        _check("deviation", self.deviation, least=0.0)

    def __call__(self, key: jax.Array, gradient: Any) -> Any:
        return _at(self.head, gradient, lambda layer: GaussianNoise(self.deviation)(key, layer))


def _add_noise(key: jax.Array, gradient: Any, size: jax.Array | float, draw: Any) -> Any:
    leaves, structure = jax.tree.flatten(gradient)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        leaf + jnp.asarray(size, leaf.dtype) * draw(leaf_key, leaf.shape, leaf.dtype)
        for leaf_key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


def _at(path: str, gradient: Any, change: Any) -> Any:
    first, _, rest = path.partition("/")
    if not hasattr(gradient, "keys") or first not in gradient:
        raise ValueError(f"The gradient has no layer {path!r}. `find_head` gives the path of the head.")
    return {**gradient, first: _at(rest, gradient[first], change) if rest else change(gradient[first])}


def _check(
    name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> None:
    # Traced numbers, and the placeholders jax puts into pytrees, have no value to check.
    if not isinstance(value, int | float):
        return
    if not (math.isfinite(value) and value > above and least <= value <= most):
        bounds = f"> {above:g}" if above > -math.inf else f">= {least:g}"
        raise ValueError(f"Expected {name}={value} {bounds}{f' and <= {most:g}' if most < math.inf else ''}.")


def differential_privacy_epsilon(
    noise_multiplier: float, *, sampling_rate: float = 1.0, steps: int = 1, delta: float = 1e-5
) -> float:
    """Return the epsilon of (epsilon, delta)-differential privacy that DP-SGD with this noise guarantees.

    An upper bound by Renyi accounting (Mironov 2017) of the Poisson-sampled Gaussian mechanism, computed by Google's
    dp-accounting; neighbouring data sets differ by one example added or removed.

    Args:
        noise_multiplier: deviation of the noise over the clipping norm, >= 0; 0 gives infinity.
        sampling_rate: probability, in (0, 1], with which an example takes part in a step.
        steps: how many gradients are sent, >= 1.
        delta: in (0, 1).

    Raises:
        ModuleNotFoundError: without the extra `privacy`; the message says how to install it.
        ValueError: on numbers outside these ranges.
    """
    _check("noise_multiplier", noise_multiplier, least=0.0)
    _check("sampling_rate", sampling_rate, above=0.0, most=1.0)
    _check("steps", steps, least=1.0)
    if not 0 < delta < 1:
        raise ValueError(f"Expected delta={delta} in (0, 1). It should be well below one over the number of examples.")
    try:
        import dp_accounting  # noqa: PLC0415 - optional
        from dp_accounting import rdp  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The epsilon is computed by dp-accounting. Install it with: pip install 'softinv_jax[privacy]'"
        ) from error
    if noise_multiplier == 0:
        return math.inf
    accountant = rdp.RdpAccountant()
    event = dp_accounting.PoissonSampledDpEvent(sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    accountant.compose(event, int(steps))
    return float(accountant.get_epsilon(delta))
