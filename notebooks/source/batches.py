# %% [markdown]
# # A whole batch behind one gradient
#
# The gradient of the mean loss over B images has rank B. Every label and every feature in it can be told apart, formats
# mixed and not told, as long as B stays well below the number of classes.

# %%
# Parameters. FAST: the smallest run, for tests.
import os

FAST = os.environ.get("SOFTINV_FAST") == "1"
CLASSES = 40 if FAST else 100
FORMATS = ["hard", "mixup"] if FAST else ["hard", "smoothing", "mixup", "smoothed_mixup"] * 2
FEATURES = 96 if FAST else 512
SEED = 0

# %% [markdown]
# ## The client
#
# A head with random weights, features as a sigmoid layer gives them, one label of each format.

# %%
import jax
import numpy as np

rng = np.random.default_rng(SEED)
batch_size = len(FORMATS)
weight = rng.uniform(-0.5, 0.5, (CLASSES, FEATURES)).astype(np.float32)
features = (1 / (1 + np.exp(-rng.normal(size=(batch_size, FEATURES))))).astype(np.float32)
labels = np.zeros((batch_size, CLASSES), np.float32)
for row, name in enumerate(FORMATS):
    first, second = rng.choice(CLASSES, 2, replace=False)
    share = rng.uniform(0.2, 0.8) if "mixup" in name else 0.0
    strength = rng.uniform(0.1, 0.4) if "smooth" in name else 0.0
    labels[row] = strength / CLASSES
    labels[row, first] += (1 - strength) * (1 - share)
    labels[row, second] += (1 - strength) * share


def loss(head):
    return -(labels * jax.nn.log_softmax(features @ head.T)).sum(axis=1).mean()


gradient = np.asarray(jax.grad(loss)(weight))

# %% [markdown]
# ## The observer
#
# `auto` reads B off the numerical rank.

# %%
import softinv_jax

found = softinv_jax.recover(softinv_jax.observe(weight, gradient), batch_size="auto")
print("rank:", found.rank, " misfit of all together, 1 is expected:", round(float(found.joint_misfit), 2))
for verdict, label in zip(softinv_jax.verdict_names(found.verdict), found.label, strict=True):
    top = np.argsort(-label)[:2]
    print(f"{verdict}: class {top[0]}: {label[top[0]]:.4f}, class {top[1]}: {label[top[1]]:.4f}")

# %%
from scipy.optimize import linear_sum_assignment

distance = np.nan_to_num(np.abs(found.label[:, None] - labels[None]).max(axis=2), nan=1.0)
order = linear_sum_assignment(distance)
print("largest error of each label:", distance[order])

# %%
# What this notebook claims.
assert found.rank == batch_size
claimed = np.isin(found.verdict[order[0]], [softinv_jax.Verdict.UNIQUE, softinv_jax.Verdict.AMBIGUOUS])
assert distance[order][claimed].max() < 1e-4
assert claimed.mean() > 0.8
