# %% [markdown]
# # Throughput on this device
#
# Labels a second, with the results left on the device, fetched, and with the features made as well; beside one plain
# sum over the same gradients, because reading them once is the floor. Choose a GPU or TPU under Runtime, Change
# runtime type. `benchmarks/accelerator.py` measures more: the thorough search, batches, images, published attacks.

# %%
# Parameters. FAST: the smallest run, for tests.
import os

import jax

FAST = os.environ.get("SOFTINV_FAST") == "1"
SHAPES = [(10, 64)] if FAST else [(10, 768), (100, 512), (1000, 2048)]  # classes, features
ON_CPU = jax.default_backend() == "cpu"
MEGABYTES = 1 if FAST else 128 if ON_CPU else 1024  # of gradients
RUNS = 3
SEED = 0

# %% [markdown]
# ## Clients
#
# Mixup labels and sigmoid features; float32, made on the device. The product is in full float32: on a TPU or a GPU the
# default is coarser, and the logits would then not be those of the gradient.

# %%
from functools import partial

import jax.numpy as jnp


@partial(jax.jit, static_argnums=(1, 2, 3))
def clients(key, count, classes, features):
    keys = jax.random.split(key, 4)
    weight = jax.random.uniform(keys[0], (classes, features), minval=-0.5, maxval=0.5)
    inputs = jax.nn.sigmoid(jax.random.normal(keys[1], (count, features)))
    first = jax.random.randint(keys[2], (count,), 0, classes)
    share = jax.random.uniform(keys[3], (count, 1), minval=0.1, maxval=0.9)
    labels = share * jax.nn.one_hot(first, classes) + (1 - share) * jax.nn.one_hot((first + 1) % classes, classes)
    error = jax.nn.softmax(jnp.matmul(inputs, weight.T, precision="highest")) - labels
    return weight, labels, error[:, :, None] * inputs[:, None, :]


# %% [markdown]
# ## Measure
#
# Compilation apart; the best of several runs; every timing waits for the result. What is on a device stays there;
# features are made when asked for.

# %%
import time

import numpy as np

import softinv_jax


def best_time(function):
    jax.block_until_ready(function())
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return min(times)


def fetched(observation):
    recovery = softinv_jax.recover_many(observation)
    return np.asarray(recovery.label), np.asarray(recovery.verdict)


def with_features(observation):
    recovery = softinv_jax.recover_many(observation)
    return recovery.verdict, recovery.feature


plain_sum = jax.jit(jnp.sum)
outcomes = []
for classes, features in SHAPES:
    count = max(MEGABYTES * 2**20 // (4 * classes * features), 16)
    weight, labels, gradients = clients(jax.random.key(SEED), count, classes, features)
    observation = softinv_jax.observe(weight, gradients)
    seconds = {
        "plain sum": best_time(partial(plain_sum, gradients)),
        "left on the device": best_time(partial(softinv_jax.recover_many, observation)),
        "label and verdict fetched": best_time(partial(fetched, observation)),
        "features too": best_time(partial(with_features, observation)),
    }
    label, verdict = fetched(observation)
    unique = verdict == softinv_jax.Verdict.UNIQUE
    error = np.abs(label - np.asarray(labels)).max(axis=1)[unique].max()
    rates = {name: count / each for name, each in seconds.items()}
    outcomes.append((rates, unique.mean(), error))
    print(f"({classes}, {features}): {unique.sum():,} of {count:,} unique, largest label error {error:.0e}")
    for name, rate in rates.items():
        times = seconds[name] / seconds["plain sum"]
        print(f"  {name:26} {rate:14,.0f} a second, {times:.1f} times a sum")

# %% [markdown]
# ## Picture

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
width = 0.8 / len(rates)
for place, name in enumerate(rates):
    at = np.arange(len(SHAPES)) + (place - 1.5) * width
    axes.bar(at, [outcome[0][name] for outcome in outcomes], width, label=name)
axes.set_xticks(range(len(SHAPES)), [f"C = {classes}, d = {features}" for classes, features in SHAPES])
axes.set(yscale="log", ylabel="gradients a second", title=jax.devices()[0].device_kind)
axes.legend(fontsize=8)
plt.show()

# %%
# What this notebook claims.
assert all(share > 0.95 and error < 1e-3 for _, share, error in outcomes)
