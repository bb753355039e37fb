"""Gradient matching end to end on a small network, and what it refuses."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_client import CLASSES, SHAPE, Client, apply_fn, features_fn, gradient_of, make_client

from softinv_jax.images import matching
from softinv_jax.images.descent import best_guess, descend, make_optimiser, start_descent
from softinv_jax.images.matching import Matching, match_gradient, match_gradients
from softinv_jax.images.objective import (
    DEEP_LEAKAGE,
    Guess,
    MatchingSettings,
    Target,
    kept_leaves,
    mean_loss_gradient,
    objective,
)


@pytest.fixture(scope="module")
def client_data() -> Client:
    return make_client()


@pytest.fixture(scope="module", autouse=True)
def quick_programs() -> Iterator[None]:
    """Programs that take half the time to compile, and only a few steps to run."""
    static = {"_start": ("problem", "draws_label"), "_advance": "problem", "_finish": "problem"}
    with pytest.MonkeyPatch.context() as patch:
        for name, names in static.items():
            function = getattr(matching, name).__wrapped__
            options = {"xla_backend_optimization_level": 0}
            patch.setattr(matching, name, jax.jit(function, static_argnames=names, compiler_options=options))
        yield


ADAM = MatchingSettings(optimiser="adam", steps=600, total_variation=0.0)
QUICK = replace(ADAM, steps=20)


def match_first(client: Client, settings: MatchingSettings, *, seed: int = 0, **options: Any) -> Matching:
    gradient = jax.tree.map(lambda leaf: leaf[0], client.gradients)
    if not settings.optimise_label:
        options.setdefault("label", client.labels[0])
    if settings.matches_feature:
        options |= {"feature": client.features[0], "features_fn": features_fn}
    return match_gradient(
        apply_fn, client.parameters, gradient, SHAPE, jax.random.key(seed), settings=settings, **options
    )


def error(image: jax.Array, truth: np.ndarray) -> float:
    return float(np.sqrt(np.mean((np.asarray(image) - truth) ** 2)))


@pytest.mark.parametrize(
    ("distance", "method"), [("l2", "g"), ("cosine", "g"), ("layerwise_cosine", "g"), ("l2", "gf"), ("cosine", "f")]
)
def test_a_photograph_comes_back(client_data: Client, distance: Any, method: Any) -> None:
    found = match_first(client_data, replace(ADAM, distance=distance, method=method))
    assert error(found.image, client_data.images[0]) < 0.1
    assert found.gradient_residual < 0.02
    np.testing.assert_array_equal(found.label, client_data.labels[0])


@pytest.mark.parametrize(
    "changes", [{"optimiser": "signed_adam"}, {"optimiser": "lbfgs", "learning_rate": 1.0, "steps": 100}]
)
def test_other_optimisers(client_data: Client, changes: dict) -> None:
    found = match_first(client_data, replace(ADAM, **changes))
    assert error(found.image, client_data.images[0]) < 0.1


def test_examples_at_once_are_examples_alone(client_data: Client) -> None:
    key = jax.random.key(3)
    several = match_gradients(
        apply_fn,
        client_data.parameters,
        client_data.gradients,
        SHAPE,
        key,
        labels=client_data.labels,
        starts=np.zeros_like(client_data.images),
        settings=QUICK,
    )
    for index, label in enumerate(client_data.labels):
        gradient = jax.tree.map(lambda leaf, index=index: leaf[index], client_data.gradients)
        start = np.zeros(SHAPE, np.float32)
        alone = match_gradient(
            apply_fn, client_data.parameters, gradient, SHAPE, key, label=label, start=start, settings=QUICK
        )
        np.testing.assert_allclose(alone.image, several.image[index], atol=1e-4)
        np.testing.assert_allclose(alone.loss_trace, several.loss_trace[index], rtol=1e-3)


def test_examples_may_bring_their_models_along(client_data: Client) -> None:
    """Two models with a gradient each: as each by itself."""
    models = [client_data.parameters, jax.tree.map(lambda leaf: 0.9 * leaf, client_data.parameters)]
    labels, starts = client_data.labels[:2], client_data.images[1:3]
    gradients = [
        gradient_of(model, client_data.images[:1], label[None]) for model, label in zip(models, labels, strict=True)
    ]
    stack = partial(jax.tree.map, lambda *leaves: np.stack(leaves))
    settings = replace(QUICK, steps=4)
    several = match_gradients(
        apply_fn,
        stack(*models),
        stack(*gradients),
        SHAPE,
        jax.random.key(0),
        labels=labels,
        starts=starts,
        settings=settings,
        own_parameters=True,
    )
    for index, (model, gradient) in enumerate(zip(models, gradients, strict=True)):
        alone = match_gradient(
            apply_fn,
            model,
            gradient,
            SHAPE,
            jax.random.key(0),
            label=labels[index],
            start=starts[index],
            settings=settings,
        )
        np.testing.assert_allclose(several.image[index], alone.image, atol=1e-4)
        np.testing.assert_allclose(several.gradient_residual[index], alone.gradient_residual, rtol=1e-3)
    with pytest.raises(ValueError, match="leading axis of 2"):
        match_gradients(
            apply_fn,
            stack(*models, models[0]),
            stack(*gradients),
            SHAPE,
            jax.random.key(0),
            labels=labels,
            own_parameters=True,
        )


def test_the_loop_is_its_steps(client_data: Client, quick_jit: Any) -> None:
    """`match_gradient` against the pure one-example functions, step by step; the last loss without any compilation."""
    gradient = jax.tree.map(lambda leaf: leaf[0], client_data.gradients)
    # Not a constant: at a kink of the total variation, rounding decides where to go.
    start = client_data.images[1]
    settings = replace(QUICK, steps=4, total_variation=0.01)
    target = Target(
        gradient, jnp.asarray(client_data.labels[0]), None, jnp.asarray(client_data.low), jnp.asarray(client_data.high)
    )
    kept = kept_leaves(client_data.parameters, "g", None)
    loss_of = partial(
        objective,
        target=target,
        parameters=client_data.parameters,
        apply_fn=apply_fn,
        features_fn=None,
        settings=settings,
        kept=kept,
    )
    optimiser = make_optimiser(settings)
    step = quick_jit(lambda descent: descend(descent, target, loss_of, optimiser))
    descent, losses = start_descent(Guess(jnp.asarray(start), None), optimiser), []
    for _ in range(4):
        descent, loss = step(descent)
        losses.append(float(loss))
    best, best_loss = best_guess(descent, loss_of(descent.guess))
    box = {"low": client_data.low, "high": client_data.high}
    found = match_first(client_data, settings, start=start, **box)
    np.testing.assert_allclose(found.loss_trace, losses, rtol=1e-4)
    np.testing.assert_allclose(found.loss, best_loss, rtol=1e-4)
    np.testing.assert_allclose(found.image, best.image, atol=1e-4)


def test_gradient_of_a_batch_is_that_of_the_mean(client_data: Client) -> None:
    expected = gradient_of(client_data.parameters, client_data.images, client_data.labels)
    found = mean_loss_gradient(
        apply_fn, client_data.parameters, jnp.asarray(client_data.images), jnp.asarray(client_data.labels)
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_batch_comes_back(client_data: Client) -> None:
    gradient = gradient_of(client_data.parameters, client_data.images, client_data.labels)
    found = match_gradient(
        apply_fn,
        client_data.parameters,
        gradient,
        (3, *SHAPE),
        jax.random.key(0),
        label=client_data.labels,
        feature=client_data.features,
        features_fn=features_fn,
        settings=replace(ADAM, method="gf", steps=1500),
    )
    assert found.image.shape == (3, *SHAPE)
    assert found.gradient_residual < 0.02
    assert error(found.image, client_data.images) < 0.2


def test_restarts_are_chosen_by_their_own_loss(client_data: Client) -> None:
    found = match_first(client_data, QUICK, restarts=4)
    assert found.restart_losses.shape == (4,)
    assert found.restart == np.argmin(found.restart_losses)
    assert found.loss == np.min(found.restart_losses)
    assert len(np.unique(np.asarray(found.restart_losses))) == 4
    # The loss is that of the image returned: with no other term it follows from the image alone.
    gradient = jax.tree.map(lambda leaf: leaf[0], client_data.gradients)
    dummy = gradient_of(client_data.parameters, found.image[None], client_data.labels[:1])
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (dummy, gradient)]
    naive = 1 - flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    np.testing.assert_allclose(found.loss, naive, atol=1e-6)
    residual = np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])
    np.testing.assert_allclose(found.gradient_residual, residual, rtol=1e-3)


def test_the_best_iterate_is_kept(client_data: Client) -> None:
    """Steps far too long lose the start, which is the answer."""
    wild = replace(QUICK, learning_rate=10.0)
    found = match_first(client_data, wild, start=client_data.images[0])
    assert found.loss_trace[-1] > 100 * found.loss
    np.testing.assert_array_equal(found.image, client_data.images[0])


def test_only_the_first_restart_takes_the_start(client_data: Client) -> None:
    found = match_first(client_data, QUICK, start=client_data.images[0], restarts=3)
    assert found.restart == 0
    assert np.all(found.restart_losses[1:] > 1e3 * found.restart_losses[0])


@pytest.mark.parametrize("optimiser", ["signed_adam", "lbfgs"])
def test_the_box_holds(client_data: Client, optimiser: Any) -> None:
    low, high = np.float32([-0.5, -0.2, -0.1]), np.float32([0.5, 0.4, 0.3])
    found = match_first(client_data, replace(QUICK, optimiser=optimiser), low=low, high=high)
    image = np.asarray(found.image)
    assert np.all(image >= low)
    assert np.all(image <= high)
    assert np.any(image == low)


def test_label_and_image_together(client_data: Client) -> None:
    found = match_first(client_data, replace(DEEP_LEAKAGE, steps=150), restarts=3)
    np.testing.assert_allclose(np.sum(found.label), 1, atol=1e-5)
    assert np.all(found.label >= 0)
    np.testing.assert_allclose(found.label, client_data.labels[0], atol=0.01)
    assert error(found.image, client_data.images[0]) < 0.1
    started = match_first(client_data, replace(QUICK, optimise_label=True), label=client_data.labels[0])
    np.testing.assert_allclose(np.sum(started.label), 1, atol=1e-5)


def test_signed_adam_moves_every_pixel_alike(client_data: Client) -> None:
    gradient = jax.tree.map(lambda leaf: leaf[0], client_data.gradients)
    target = Target(gradient, jnp.asarray(client_data.labels[0]), None, jnp.full(3, -jnp.inf), jnp.full(3, jnp.inf))
    settings = MatchingSettings(steps=8)
    optimiser = make_optimiser(settings)
    image = jnp.zeros(SHAPE)

    def loss_of(guess: Guess) -> jax.Array:
        return jnp.sum(jnp.arange(1.0, 109.0).reshape(SHAPE) * guess.image)

    sizes = []
    descent = start_descent(Guess(image, None), optimiser)
    for _ in range(8):
        before = descent.guess.image
        descent, _ = descend(descent, target, loss_of, optimiser)
        sizes.append(before - descent.guess.image)
    # Rate 0.1, a tenth of it from steps 3, 5 and 7 on.
    rates = 0.1 * np.array([1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.001])
    np.testing.assert_allclose(sizes, np.broadcast_to(rates[:, None, None, None], (8, *SHAPE)), rtol=1e-2)


def test_adam_is_that_of_optax(client_data: Client) -> None:
    settings = MatchingSettings(optimiser="adam", steps=80)
    ours, plain = make_optimiser(settings), optax.adam(0.1)
    guess = Guess(jnp.ones(SHAPE), None)
    slope = Guess(jnp.linspace(-1.0, 1.0, 108).reshape(SHAPE), None)
    update, _ = ours.update(slope, ours.init(guess), guess, value=0.0, grad=slope, value_fn=None)
    expected, _ = plain.update(slope, plain.init(guess), guess)
    np.testing.assert_allclose(update.image, expected.image)


def test_one_compilation_for_all_chunks_and_calls(client_data: Client) -> None:
    traces = []

    def counted(parameters: Any, image: jax.Array) -> jax.Array:
        traces.append(image.shape)
        return apply_fn(parameters, image)

    calls: list[tuple[int, int]] = []
    settings = replace(QUICK, steps=2 * matching.CHUNK + 7)
    for seed in range(2):
        gradient = jax.tree.map(lambda leaf, seed=seed: leaf[seed], client_data.gradients)
        match_gradient(
            counted,
            client_data.parameters,
            gradient,
            SHAPE,
            jax.random.key(seed),
            label=client_data.labels[seed],
            settings=settings,
            progress=lambda done, total: calls.append((done, total)),
        )
        if seed == 0:
            once = len(traces)
    # Only the check of the model's output shape is traced anew in each call.
    assert len(traces) <= once + 1
    total = 2 * matching.CHUNK + 7
    assert calls == 2 * [(matching.CHUNK, total), (2 * matching.CHUNK, total), (total, total)]


def test_nan_is_never_the_best(client_data: Client) -> None:
    def undefined(parameters: Any, image: jax.Array) -> jax.Array:
        return apply_fn(parameters, image) * jnp.nan

    gradient = jax.tree.map(lambda leaf: leaf[0], client_data.gradients)
    found = match_gradient(
        undefined,
        client_data.parameters,
        gradient,
        SHAPE,
        jax.random.key(0),
        label=client_data.labels[0],
        settings=replace(QUICK, steps=2),
    )
    assert found.loss == np.inf
    assert np.isfinite(found.image).all()


def broken(tree: Any, change: Any) -> Any:
    copy = {layer: dict(leaves) for layer, leaves in tree.items()}
    change(copy)
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop("conv"), "structure of the parameters"),
        (lambda tree: tree["head"].update(kernel=tree["head"]["kernel"].T), r"\['head'\]\['kernel'\].* \(24, 5\)"),
        (lambda tree: tree["head"].update(kernel=tree["head"]["kernel"] * np.nan), "not finite"),
        (lambda tree: tree.update(jax.tree.map(np.zeros_like, tree)), "zero everywhere"),
    ],
)
def test_gradients_that_are_refused(client_data: Client, change: Any, message: str) -> None:
    gradient = broken(jax.tree.map(lambda leaf: leaf[0], client_data.gradients), change)
    with pytest.raises(ValueError, match=message):
        match_gradient(
            apply_fn, client_data.parameters, gradient, SHAPE, jax.random.key(0), label=client_data.labels[0]
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": None}, "labels are needed"),
        ({"label": np.ones(4)}, r"labels must have shape \(1, 5\)"),
        ({"label": np.full(CLASSES, np.nan)}, "labels holds 5 entries that are not finite"),
        ({"start": np.zeros((6, 6))}, r"starts must have shape \(1, 6, 6, 3\)"),
        ({"settings": MatchingSettings(method="f")}, "method='f' .* features_fn is not given"),
        ({"settings": MatchingSettings(method="gf"), "features_fn": features_fn}, "features is not given"),
        (
            {"settings": MatchingSettings(method="gf"), "features_fn": features_fn, "feature": np.ones(7)},
            r"features must have shape \(1, 24\)",
        ),
        ({"restarts": 0}, "restarts must be a positive integer, not 0"),
        ({"low": 1.0, "high": 0.0}, "low must be below high"),
        ({"low": np.zeros(2)}, r"low must have shape .*\(3,\)"),
    ],
)
def test_input_that_is_refused(client_data: Client, options: dict, message: str) -> None:
    gradient = jax.tree.map(lambda leaf: leaf[0], client_data.gradients)
    given = {"label": client_data.labels[0]} | options
    with pytest.raises(ValueError, match=message):
        match_gradient(apply_fn, client_data.parameters, gradient, SHAPE, jax.random.key(0), **given)


def test_image_shape_that_is_refused(client_data: Client) -> None:
    gradient = jax.tree.map(lambda leaf: leaf[0], client_data.gradients)
    with pytest.raises(ValueError, match=r"image_shape must be .* not \(6, 6\)"):
        match_gradient(apply_fn, client_data.parameters, gradient, (6, 6), jax.random.key(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "h"}, "method must be one of g, f, gf, not 'h'"),
        ({"distance": "l1"}, "distance must be one of .*'l1'"),
        ({"optimiser": "sgd"}, "optimiser must be one of .*'sgd'"),
        ({"steps": 0}, "steps must be a positive integer, not 0"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"total_variation": float("nan")}, "total_variation must be a finite weight"),
    ],
)
def test_settings_that_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatchingSettings(**settings)


def test_the_head_is_what_method_f_leaves_out(client_data: Client) -> None:
    assert kept_leaves(client_data.parameters, "f", None) == (True, True, True, True, False)
    assert all(kept_leaves(client_data.parameters, "gf", None))
    with pytest.raises(ValueError, match="nested mappings"):
        kept_leaves([np.ones((3, 3))], "f", None)
    with pytest.raises(ValueError, match="no other"):
        kept_leaves({"head": {"kernel": np.ones((3, 3))}}, "f", None)
