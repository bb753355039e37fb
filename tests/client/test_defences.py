"""Defences against naive NumPy, one entry at a time, and against what their sources promise."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.client.defences import (
    Clipping,
    DifferentialPrivacy,
    GaussianNoise,
    HeadNoise,
    HeadWithheld,
    LaplaceNoise,
    Pruning,
    Quantisation,
    Sign,
    apply_defences,
    differential_privacy_epsilon,
)

KEY = jax.random.key(0)


@pytest.fixture
def gradient() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "body": {"kernel": rng.normal(size=(40, 30)).astype(np.float32), "bias": np.zeros(30, np.float32)},
        "head": {"kernel": (10 * rng.normal(size=(30, 10))).astype(np.float32)},
    }


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def norm(tree: Any) -> float:
    return math.sqrt(sum(float(np.sum(leaf.astype(np.float64) ** 2)) for leaf in leaves(tree)))


def test_clipping_shortens_long_gradients_only(gradient: dict[str, Any]) -> None:
    size = norm(gradient)
    assert norm(Clipping(0.25 * size)(KEY, gradient)) == pytest.approx(0.25 * size, rel=1e-5)
    for kept, given in zip(leaves(Clipping(2 * size)(KEY, gradient)), leaves(gradient), strict=True):
        np.testing.assert_array_equal(kept, given)
    zero = jax.tree.map(np.zeros_like, gradient)
    assert norm(Clipping(1.0)(KEY, zero)) == 0


@pytest.mark.parametrize(
    ("defence", "deviation", "kurtosis"),
    [(GaussianNoise(0.3), 0.3, 3.0), (LaplaceNoise(0.3), 0.3 * math.sqrt(2), 6.0)],
)
def test_noise_has_the_moments_it_claims(defence: Any, deviation: float, kurtosis: float) -> None:
    zero = {"a": np.zeros((300, 300), np.float32), "b": np.zeros(90_000, np.float32)}
    first, second = (leaf.ravel() for leaf in leaves(defence(KEY, zero)))
    assert first.std() == pytest.approx(deviation, rel=0.02)
    assert np.mean(first**4) / np.mean(first**2) ** 2 == pytest.approx(kurtosis, rel=0.1)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    np.testing.assert_array_equal(leaves(defence(KEY, zero))[0].ravel(), first)
    assert not np.array_equal(leaves(defence(jax.random.key(1), zero))[0].ravel(), first)


def test_differential_privacy_is_clipping_and_noise_in_proportion(gradient: dict[str, Any]) -> None:
    clipped = Clipping(2.0)(KEY, gradient)
    noisy = DifferentialPrivacy(2.0, 0.5)(KEY, gradient)
    noise = np.concatenate([(a - b).ravel() for a, b in zip(leaves(noisy), leaves(clipped), strict=True)])
    assert noise.std() == pytest.approx(1.0, rel=0.06)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9, 1.0])
def test_pruning_keeps_the_largest_entries_of_each_array(gradient: dict[str, Any], share: float) -> None:
    for pruned, given in zip(leaves(Pruning(share)(KEY, gradient)), leaves(gradient), strict=True):
        if not given.any():
            continue
        kept = sorted(range(given.size), key=lambda index, g=given: -abs(g.flat[index]))[
            : round((1 - share) * given.size)
        ]
        expected = np.zeros_like(given)
        expected.flat[kept] = given.flat[kept]
        np.testing.assert_array_equal(pruned, expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantisation_rounds_to_the_nearest_of_its_levels(gradient: dict[str, Any], bits: int) -> None:
    for rounded, given in zip(leaves(Quantisation(bits)(KEY, gradient)), leaves(gradient), strict=True):
        levels = np.linspace(-np.abs(given).max(), np.abs(given).max(), 2**bits - 1)
        nearest = levels[np.argmin(np.abs(given.reshape(-1, 1) - levels[None]), axis=1)].reshape(given.shape)
        np.testing.assert_allclose(rounded, nearest, atol=1e-5 * np.abs(given).max())


def test_sign(gradient: dict[str, Any]) -> None:
    for signs, given in zip(leaves(Sign()(KEY, gradient)), leaves(gradient), strict=True):
        np.testing.assert_array_equal(signs, np.sign(given))


def test_head_alone(gradient: dict[str, Any]) -> None:
    withheld, noisy = HeadWithheld("head")(KEY, gradient), HeadNoise(0.1, "head")(KEY, gradient)
    for changed in (withheld, noisy):
        np.testing.assert_array_equal(changed["body"]["kernel"], gradient["body"]["kernel"])
    assert not np.any(withheld["head"]["kernel"])
    assert np.std(noisy["head"]["kernel"] - gradient["head"]["kernel"]) == pytest.approx(0.1, rel=0.2)
    nested = {"model": gradient}
    assert not np.any(HeadWithheld("model/head")(KEY, nested)["model"]["head"]["kernel"])
    with pytest.raises(ValueError, match="no layer 'other'"):
        HeadWithheld("other")(KEY, gradient)


def test_composition_is_one_after_the_other_and_traces_its_strengths(gradient: dict[str, Any]) -> None:
    def both(strength: jax.Array) -> Any:
        return apply_defences(KEY, gradient, [Pruning(strength), Clipping(strength), GaussianNoise(1e-3 * strength)])

    strengths = jnp.array([0.2, 0.7], jnp.float32)
    together = jax.jit(jax.vmap(both))(strengths)
    for row, strength in enumerate(strengths):
        alone = both(strength)
        for many, one in zip(leaves(together), leaves(alone), strict=True):
            np.testing.assert_allclose(many[row], one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Clipping(0.0), "norm=0.0 > 0"),
        (lambda: GaussianNoise(-1.0), "deviation=-1.0 >= 0"),
        (lambda: LaplaceNoise(math.nan), "scale=nan"),
        (lambda: Pruning(1.5), "share=1.5"),
        (lambda: Quantisation(1), "bits=1 >= 2"),
        (lambda: differential_privacy_epsilon(1.0, sampling_rate=0.0), "sampling_rate=0.0"),
        (lambda: differential_privacy_epsilon(1.0, delta=1.0), "delta=1.0"),
    ],
)
def test_numbers_out_of_range_are_named(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_epsilon_of_one_unsampled_step_is_near_the_analytic_gaussian_mechanism() -> None:
    """Balle and Wang (2018): the exact epsilon, of which Renyi accounting is an upper bound."""
    pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
    from scipy import optimize, stats  # noqa: PLC0415

    noise, delta = 2.0, 1e-5

    def exact_delta(epsilon: float) -> float:
        first = stats.norm.cdf(0.5 / noise - epsilon * noise)
        return float(first - math.exp(epsilon) * stats.norm.cdf(-0.5 / noise - epsilon * noise))

    exact = optimize.brentq(lambda epsilon: exact_delta(epsilon) - delta, 0.01, 20)
    bound = differential_privacy_epsilon(noise, delta=delta)
    assert exact <= bound <= 1.3 * exact
    assert differential_privacy_epsilon(0.0) == math.inf
    assert differential_privacy_epsilon(noise, sampling_rate=0.01, steps=1000, delta=delta) < 1000 * bound


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(ModuleNotFoundError, match=r"softinv_jax\[privacy\]"):
        differential_privacy_epsilon(1.0)
