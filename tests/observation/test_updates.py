"""From parameters before and after local training to gradients: against optimisers, by bounds, and honest verdicts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softinv_jax import ObservedUpdate, Verdict, observe_update, observe_update_head, recover_update

CLASSES, FEATURES = 6, 16
RNG = np.random.default_rng(0)
BEFORE = {
    "body": {"kernel": RNG.normal(size=(5, FEATURES)).astype(np.float32)},
    "head": {
        "kernel": RNG.normal(size=(FEATURES, CLASSES)).astype(np.float32),
        "bias": RNG.normal(size=CLASSES).astype(np.float32),
    },
}
GRADIENT = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32), BEFORE)


def assert_within_rounding(update: Any, expected: Any) -> None:
    """Every entry within sqrt(3) deviations, the bound of a uniform error, and the optimiser's own roundings."""

    def check(gradient: np.ndarray, deviation: np.ndarray, truth: np.ndarray) -> None:
        assert np.all(np.abs(gradient - truth) <= 1.74 * deviation + 4e-7 * np.abs(truth))

    jax.tree.map(check, update.gradients, update.rounding, expected)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_one_step_of_optax(options: dict[str, Any]) -> None:
    optimiser = optax.sgd(0.1, momentum=options.get("momentum"), nesterov=options.get("nesterov", False))
    changes, _ = optimiser.update(GRADIENT, optimiser.init(BEFORE), BEFORE)
    update = observe_update(BEFORE, optax.apply_updates(BEFORE, changes), learning_rate=0.1, **options)
    assert update.exact
    assert update.scale_known
    assert_within_rounding(update, GRADIENT)


@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.8, "nesterov": True},
        {"momentum": 0.9, "weight_decay": 0.01},
    ],
)
def test_steps_of_torch_with_one_and_the_same_gradient(options: dict[str, Any], local_steps: int) -> None:
    torch = pytest.importorskip("torch")
    values = torch.nn.Parameter(torch.from_numpy(BEFORE["body"]["kernel"].copy()))
    gradient = GRADIENT["body"]["kernel"]
    optimiser = torch.optim.SGD([values], lr=0.01, **options)
    for _ in range(local_steps):
        values.grad = torch.from_numpy(gradient.copy())
        optimiser.step()
    before, after = {"x": BEFORE["body"]["kernel"]}, {"x": values.detach().numpy()}
    update = observe_update(before, after, learning_rate=0.01, local_steps=local_steps, **options)
    assert update.exact == (local_steps == 1)
    error = np.abs(update.gradients["x"] - gradient)
    # Weight decay at parameters that move by 0.01 a step is not quite that at the first.
    moved = 0.01 * 0.01 * 4 * local_steps * np.abs(gradient).max() if "weight_decay" in options else 0.0
    slack = moved if local_steps > 1 else 0.0
    assert np.all(error <= 1.74 * np.sqrt(local_steps) * update.rounding["x"] + 1e-6 * np.abs(gradient) + slack)


def test_several_steps_give_the_average_gradient() -> None:
    gradients = [jax.tree.map(lambda leaf, k=k: (k + 1) * leaf, GRADIENT) for k in range(4)]
    after = BEFORE
    for gradient in gradients:
        after = jax.tree.map(lambda leaf, g: (leaf - np.float32(0.1) * g).astype(np.float32), after, gradient)
    update = observe_update(BEFORE, after, learning_rate=0.1, local_steps=4)
    assert not update.exact
    assert update.statement.startswith("Approximate: the average gradient of 4 local steps")
    expected = jax.tree.map(lambda leaf: 2.5 * leaf, GRADIENT)
    jax.tree.map(lambda ours, truth: np.testing.assert_allclose(ours, truth, atol=1e-5), update.gradients, expected)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_rounding_is_what_it_is_said_to_be(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    before = rng.normal(size=20000).astype(dtype)
    gradient = rng.normal(size=before.shape)
    rate = 0.3
    after = (before.astype(np.float64) - rate * gradient).astype(dtype)
    update = observe_update({"x": before}, {"x": after}, learning_rate=rate)
    exact = (before.astype(np.float64) - after.astype(np.float64)) / rate
    ratio = (exact - gradient) / update.rounding["x"]
    assert np.abs(ratio).max() < np.sqrt(3) * 1.001
    # The mean square of 20,000 uniform errors: 1 within 5 deviations.
    assert abs(np.mean(ratio**2) - 1) < 5 * np.sqrt(0.8 / 20000)
    assert update.gradients["x"].dtype == dtype


def test_an_unknown_rate_leaves_a_factor() -> None:
    after = jax.tree.map(lambda leaf, g: (leaf - np.float32(0.1) * g).astype(np.float32), BEFORE, GRADIENT)
    update = observe_update(BEFORE, after, momentum=0.5, nesterov=True)
    assert not update.scale_known
    # Nesterov's first step is 1 + momentum times the gradient; here it was none, so that the factor is 0.1 / 1.5.
    expected = jax.tree.map(lambda leaf: leaf * (0.1 / 1.5), GRADIENT)
    jax.tree.map(lambda ours, truth: np.testing.assert_allclose(ours, truth, atol=2e-7), update.gradients, expected)


def changed(tree: dict, path: tuple[str, str], value: Any) -> dict:
    layer, name = path
    return tree | {layer: tree[layer] | {name: value}}


KERNEL = BEFORE["head"]["kernel"]
REFUSED = {
    "no arrays": (({}, {}), {}, "before holds no arrays"),
    "missing": ((BEFORE, {"body": BEFORE["body"]}), {}, "differ in head/bias, head/kernel"),
    "shape": ((BEFORE, changed(BEFORE, ("head", "kernel"), KERNEL.T)), {}, r"head/kernel has shape \(16, 6\) before"),
    "integer": ((BEFORE, changed(BEFORE, ("head", "kernel"), KERNEL.astype(int))), {}, "head/kernel of after must be"),
    "NaN": ((changed(BEFORE, ("head", "kernel"), KERNEL * np.nan), BEFORE), {}, "head/kernel of before holds entries"),
    "rate zero": ((BEFORE, BEFORE), {"learning_rate": 0.0}, "learning_rate must be positive, .* not 0.0"),
    "rate NaN": ((BEFORE, BEFORE), {"learning_rate": float("nan")}, "learning_rate must be positive"),
    "rate tiny": (
        (BEFORE, changed(BEFORE, ("head", "kernel"), KERNEL + 1)),
        {"learning_rate": 1e-39},
        "the gradient of head/kernel exceeds the range of float32",
    ),
    "no steps": ((BEFORE, BEFORE), {"local_steps": 0}, "local_steps must be a positive integer, not 0"),
    "half a step": ((BEFORE, BEFORE), {"local_steps": 1.5}, "local_steps must be a positive integer, not 1.5"),
    "momentum 1": ((BEFORE, BEFORE), {"momentum": 1.0}, r"momentum must lie in \[0, 1\), not 1.0"),
    "dampening": ((BEFORE, BEFORE), {"dampening": -0.1}, r"dampening must lie in \[0, 1\)"),
    "nesterov": ((BEFORE, BEFORE), {"nesterov": True}, "nesterov needs momentum > 0"),
    "decay": ((BEFORE, BEFORE), {"weight_decay": 0.1}, "weight_decay needs learning_rate"),
    "negative decay": ((BEFORE, BEFORE), {"weight_decay": -0.1}, "weight_decay must be zero or positive"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named(case: str) -> None:
    trees, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        observe_update(*trees, **options)


def test_the_noise_of_a_row_is_that_of_its_entries_and_of_the_bias() -> None:
    """Weights below 1/2 are rounded on a finer grid than biases of 100; rows that hardly move lose what is common."""
    rng = np.random.default_rng(2)
    weight = rng.uniform(0.25, 0.5, (CLASSES, FEATURES)).astype(np.float32)
    bias = np.array([0.3, 0.3, 100, 0.3, 0.3, 0.3], np.float32)
    step = np.float32(1e-3) * rng.normal(size=weight.shape).astype(np.float32)
    step[5] *= 1e-6
    after = {"head": {"weight": weight - step, "bias": bias}}
    update = observe_update({"head": {"weight": weight, "bias": bias}}, after, learning_rate=1.0)
    noise = observe_update_head(update).noise
    spacing = 2.0**-25
    np.testing.assert_allclose(noise[[0, 1, 3, 4]], spacing / np.sqrt(12), rtol=1e-6)
    np.testing.assert_allclose(noise[2], 2.0**-17 / np.sqrt(12), rtol=1e-6)
    # Steps of a thirtieth of the spacing are all lost: errors as large as one rounding, in every column.
    assert 3 * noise[0] < noise[5] < 6 * noise[0]


def rounded_update(sample: Any, bias_size: float, rate: float) -> Any:
    """One float32 step of a head alone, its bias `bias_size` times the sample's."""
    bias = (bias_size * sample.bias).astype(np.float32)
    logits = sample.weight.astype(np.float64) @ sample.feature + bias
    error = np.exp(logits - logits.max())
    error = error / error.sum() - sample.label
    before = {"head": {"weight": sample.weight, "bias": bias}}
    gradient = {"head": {"weight": np.outer(error, sample.feature), "bias": error}}
    after = jax.tree.map(lambda leaf, g: (leaf - rate * g).astype(np.float32), before, gradient)
    return observe_update(before, after, learning_rate=rate)


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["hard", "smoothing", "mixup", "smoothed_mixup", "dirichlet"]),
    st.integers(0, 10**6),
    st.floats(-7, 1),
    st.floats(-2, 2),
)
def test_rounded_updates_never_get_a_wrong_unique_label(
    draw: Callable, assert_honest: Callable, family: str, seed: int, rate: float, bias_size: float
) -> None:
    sample = draw(family, seed, number_of_classes=CLASSES, features=FEATURES, has_bias=True, dtype=np.float64)
    assert_honest(recover_update(rounded_update(sample, 10.0**bias_size, 10.0**rate)), sample.label)


def test_a_rate_that_leaves_nothing_unclear(draw: Callable) -> None:
    for seed, family in enumerate(("hard", "smoothing", "mixup", "dirichlet")):
        sample = draw(family, seed, number_of_classes=CLASSES, features=FEATURES, has_bias=True, dtype=np.float64)
        found = recover_update(rounded_update(sample, 1.0, 0.1))
        assert found.verdict_name == ("conditional" if family == "dirichlet" else "unique")
        np.testing.assert_allclose(found.label, sample.label, atol=1e-5)
        np.testing.assert_allclose(found.feature, sample.feature, atol=1e-4)


def test_several_steps_are_never_unique(draw: Callable) -> None:
    sample = draw("smoothing", 0, number_of_classes=CLASSES, features=FEATURES, has_bias=True, dtype=np.float64)
    exact = rounded_update(sample, 1.0, 0.1)
    after = jax.tree.map(lambda leaf, g: leaf - np.float32(0.1) * g, exact.parameters, exact.gradients)
    found = recover_update(observe_update(exact.parameters, after, learning_rate=0.05, local_steps=2))
    assert found.verdict_name == "ambiguous"


def test_noise_on_the_bias_moves_the_length_of_the_feature(draw: Callable, assert_honest: Callable) -> None:
    """Gaussian noise on all entries alike: with long features, the error of 1 / |x| is most of the label's error."""
    for seed in range(10):
        family = ("smoothing", "mixup")[seed % 2]
        sample = draw(family, seed, number_of_classes=CLASSES, features=FEATURES, has_bias=True, dtype=np.float64)
        feature = 8 * sample.feature
        logits = sample.weight.astype(np.float64) @ feature + sample.bias
        error = np.exp(logits - logits.max())
        error = error / error.sum() - sample.label
        noise = 1e-4 * np.random.default_rng(seed).normal(size=(CLASSES, FEATURES + 1))
        gradient = {"head": {"weight": np.outer(error, feature) + noise[:, :-1], "bias": error + noise[:, -1]}}
        gradient = jax.tree.map(lambda leaf: leaf.astype(np.float32), gradient)
        parameters = {"head": {"weight": sample.weight, "bias": sample.bias}}
        # Next to nothing is said about the noise: it has to be measured.
        rounding = jax.tree.map(lambda leaf: np.full(leaf.shape, 1e-12), gradient)
        found = recover_update(ObservedUpdate(parameters, gradient, rounding, True, True, ""))
        assert_honest(found, sample.label)


def test_batch_behind_an_update_of_unknown_rate() -> None:
    """One float32 step of a head from the mean loss of four examples: labels to the noise of rounding, and the rate."""
    rng = np.random.default_rng(3)
    weight = rng.uniform(-0.5, 0.5, (40, 64)).astype(np.float32)
    features = rng.uniform(0, 1, (4, 64))
    labels = np.full((4, 40), 0.2 / 40)
    labels[np.arange(4), [4, 17, 25, 33]] += 0.8
    powers = np.exp(features @ weight.T.astype(np.float64))
    error = powers / powers.sum(axis=1, keepdims=True) - labels
    after = (weight - 0.3 * error.T @ features / 4).astype(np.float32)
    update = observe_update({"head": {"weight": weight}}, {"head": {"weight": after}})
    found = recover_update(update, batch_size=4)
    assert np.all(found.verdict == Verdict.UNIQUE)
    order = np.argsort(found.label.argmax(axis=1))
    deviation = found.label_deviation[order].max(axis=1, keepdims=True)
    assert np.all(np.abs(found.label[order] - labels) < 6 * deviation + 1e-6)
    assert deviation.max() < 1e-3
    assert abs(found.scale - 0.3) < 6 * found.scale_deviation


def test_counts_of_several_steps_are_never_sure() -> None:
    """Counted exactly from one step; the same update, said to be of two, gives no more than the likeliest."""
    rng = np.random.default_rng(0)
    weight, features = rng.uniform(-0.1, 0.1, (5, 16)), 1 + 0.001 * rng.normal(size=(9, 16))
    classes = np.array([0, 0, 0, 1, 1, 3, 3, 3, 4])
    powers = np.exp(features @ weight.T)
    error = (powers / powers.sum(axis=1, keepdims=True) - np.eye(5)[classes]) / 9
    before = {"head": {"weight": weight.astype(np.float32), "bias": np.zeros(5, np.float32)}}
    gradients = {"weight": error.T @ features, "bias": error.sum(axis=0)}
    after = {"head": {part: (before["head"][part] - 0.5 * gradients[part]).astype(np.float32) for part in gradients}}
    one = recover_update(observe_update(before, after, learning_rate=0.5), batch_size=9)
    assert one.count.tolist() == np.bincount(classes, minlength=5).tolist()
    two = recover_update(observe_update(before, after, learning_rate=0.25, local_steps=2), batch_size=9)
    assert two.likeliest.tolist() == one.likeliest.tolist()
    assert np.all(two.count == -1)
    assert np.all(np.isnan(two.certainty))
    assert not two.is_whole
    assert two.interval.tolist() == [[0, 1]] * 5
