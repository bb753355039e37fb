"""The programs for single examples as jax makes them for a TPU, which emulates float64: nothing in them it cannot.

XLA for TPUs rewrites float64 arithmetic to pairs of float32. It has no rule for reading a 64-bit number's bits, and so
none for sorting them (jax-ml/jax#11831), and no LAPACK. Nothing runs here: there need not be a TPU.
"""

import re

import jax
import numpy as np
import pytest

import softinv_jax
from softinv_jax.float64 import in_float64
from softinv_jax.labels import recovery

FORBIDDEN = re.compile(r"bitcast_convert.*[fi]64|custom_call")


def program_for_tpu(function: object, *arguments: object) -> str:
    traced = jax.jit(function).trace(*arguments)  # type: ignore[arg-type]
    return traced.lower(lowering_platforms=("tpu",)).as_text()


def sorted_keys(program: str) -> list[str]:
    """Types of what the comparators of all sorts are given: two of each operand."""
    return re.findall(r"stablehlo\.sort.*?\n\s*\^bb0\((.*?)\):", program, re.DOTALL)


@pytest.mark.parametrize("thorough", [False, True], ids=["fast", "thorough"])
@pytest.mark.parametrize("unknown_scale", [False, True], ids=["known", "unknown"])
@pytest.mark.parametrize("number_of_classes", [10, 100])
@in_float64
def test_recovery(number_of_classes: int, unknown_scale: bool, thorough: bool) -> None:
    rng = np.random.default_rng(0)
    weight, gradient = rng.normal(size=(2, number_of_classes, 16)).astype(np.float32)
    observation = softinv_jax.observe(weight, gradient)
    stages = recovery.stages_for(observation, "exact", unknown_scale, None, thorough)
    programs = [program_for_tpu(lambda seen: recovery.read(seen, stages), observation)]
    reading = jax.eval_shape(lambda seen: recovery.read(seen, stages), observation)
    programs.append(program_for_tpu(lambda reading: recovery.search(reading, stages), reading))
    found = jax.eval_shape(lambda reading: recovery.search(reading, stages), reading)
    programs.append(program_for_tpu(lambda seen, found: recovery.complete(seen, found, stages), observation, found))
    for program in programs:
        assert "f64" in program
        assert not FORBIDDEN.findall(program)
    keys = sorted_keys(programs[1])
    assert keys
    assert not any("f64" in key for key in keys)


@pytest.mark.parametrize("thorough", [False, True], ids=["fast", "thorough"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["bias-free", "bias"])
@in_float64
def test_many_at_once(has_bias: bool, thorough: bool) -> None:
    """Under `vmap`, where every branch runs and every loop takes all lanes along."""
    rng = np.random.default_rng(0)
    weight, gradients = rng.normal(size=(10, 16)), rng.normal(size=(4, 10, 16))
    bias = (rng.normal(size=10), rng.normal(size=(4, 10))) if has_bias else (None, None)
    arrays = [None if one is None else one.astype(np.float32) for one in (weight, gradients, *bias)]

    def recovered(weight: object, gradient: object, bias: object, bias_gradient: object) -> softinv_jax.Recovery:
        return recovery.recover(softinv_jax.Observation(weight, gradient, bias, bias_gradient), thorough=thorough)

    axes = (None, 0, None, 0 if has_bias else None)
    program = program_for_tpu(jax.vmap(recovered, in_axes=axes), *arrays)
    assert "f64" in program
    assert not FORBIDDEN.findall(program)
    assert not any("f64" in key for key in sorted_keys(program))


@in_float64
def test_a_sort_of_float64_would_be_seen() -> None:
    program = program_for_tpu(jax.numpy.sort, np.arange(4.0))
    assert any("f64" in key for key in sorted_keys(program))
