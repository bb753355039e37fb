"""Heads of real PyTorch updates, as their observer has them: what may be said of each, and nothing else.

The files are those of the folder that SOFTINV_CASES_DIR names; `true_classes` is read by the tests alone.
"""

import os
from pathlib import Path

import numpy as np
import pytest

import softinv_jax
from softinv_jax import Assumption, Loss

FOLDER = os.environ.get("SOFTINV_CASES_DIR", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="SOFTINV_CASES_DIR does not name the folder of recorded updates")


def load(name: str) -> tuple[softinv_jax.Observation, np.ndarray]:
    held = np.load(Path(FOLDER) / f"{name}.npz")
    arrays = (held[key] for key in ("weight", "weight_gradient", "bias", "bias_gradient"))
    return softinv_jax.observe(*arrays), held["true_classes"].ravel()


def recovered(name: str) -> softinv_jax.Recovery:
    return softinv_jax.recover(load(name)[0])


def test_one_example_is_unique() -> None:
    found = recovered("one")
    assert found.verdict_name == "unique"
    np.testing.assert_allclose(found.label, 0.01 + 0.9 * np.eye(10)[7], atol=1e-5)
    assert found.assumptions.refuted == 0


def test_parameters_in_half_precision_leave_the_class() -> None:
    found = recovered("bfloat16")
    assert found.verdict >= softinv_jax.Verdict.AMBIGUOUS
    off = np.abs(found.label - 0.01 - 0.9 * np.eye(10)[7])
    assert np.all(off <= 6 * found.evidence.label_deviation + 1e-6)
    assert np.argmax(found.label) == 7


@pytest.mark.parametrize(("name", "examples"), [("batch4", 4), ("batch8", 7), ("batch32", 8), ("batch4_norm", 4)])
def test_several_examples_are_not_one(name: str, examples: int) -> None:
    observation, classes = load(name)
    found = softinv_jax.recover(observation)
    assert found.verdict_name == "refuted"
    assert found.assumptions.refuted & Assumption.ONE_EXAMPLE
    assert found.assumptions.examples >= examples
    truth = 0.01 + 0.9 * np.bincount(classes, minlength=10) / classes.size
    assert np.all(np.abs(found.mean.label - truth) <= 6 * found.mean.deviation)
    assert np.max(found.mean.deviation) < 0.1 / classes.size


@pytest.mark.parametrize("name", ["steps3", "steps10_batch8"])
def test_several_steps_are_not_one_example(name: str) -> None:
    found = recovered(name)
    assert found.verdict_name == "refuted"
    assert np.isnan(found.label).all()


def test_sigmoids_are_found() -> None:
    found = recovered("bce")
    assert found.verdict_name == "unique"
    assert found.assumptions.loss == Loss.BINARY_CROSS_ENTROPY
    assert found.assumptions.refuted & Assumption.SOFTMAX
    np.testing.assert_array_equal(found.label, np.eye(10)[7])


@pytest.mark.parametrize("name", ["focal", "weighted"])
def test_a_factor_is_found(name: str) -> None:
    found = recovered(name)
    assert found.verdict_name == "unique"
    assert found.assumptions.loss == Loss.WEIGHTED_CROSS_ENTROPY
    assert found.assumptions.refuted & Assumption.SCALE
    np.testing.assert_allclose(found.label, np.eye(10)[7], atol=1e-6)


def test_a_temperature_is_found() -> None:
    found = recovered("temperature")
    assert found.verdict_name == "unique"
    assert found.assumptions.loss == Loss.TEMPERED_CROSS_ENTROPY
    np.testing.assert_allclose(found.assumptions.temperature, 2, rtol=1e-4)
    np.testing.assert_allclose(found.label, np.eye(10)[7], atol=1e-6)


def test_squared_error_is_never_unique() -> None:
    assert recovered("squared").verdict_name != "unique"


def test_signs_tell_the_class_alone() -> None:
    found = recovered("adam")
    assert found.verdict_name == "refuted"
    assert found.assumptions.refuted & Assumption.GRADIENT
    assert found.format.classes[0] == 7
    assert np.isnan(found.label).all()


@pytest.mark.parametrize("name", ["batch4", "batch4_norm"])
@pytest.mark.parametrize("told", [4, 3, 6])
def test_a_batch_is_found_whatever_size_is_told(name: str, told: int) -> None:
    observation, classes = load(name)
    found = softinv_jax.recover(observation, batch_size=told)
    assert softinv_jax.verdict_names(found.verdict).tolist() == ["unique"] * 4
    assert sorted(np.argmax(found.label, axis=1)) == sorted(classes)
    assert bool(found.refuted & Assumption.BATCH_SIZE) == (told != 4)


def test_a_batch_with_class_weights_is_found_with_each_factor() -> None:
    observation, classes = load("weighted4")
    assert softinv_jax.recover(observation).assumptions.refuted & Assumption.ONE_EXAMPLE
    found = softinv_jax.recover(observation, batch_size=4)
    assert softinv_jax.verdict_names(found.verdict).tolist() == ["unique"] * 4
    assert found.loss == Loss.WEIGHTED_CROSS_ENTROPY
    order = np.argmax(found.label, axis=1)
    assert sorted(order) == sorted(classes)
    np.testing.assert_allclose(found.factor, np.linspace(0.5, 2, 10)[order], rtol=1e-2)
