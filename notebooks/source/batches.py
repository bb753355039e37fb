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

# %% [markdown]
# ## More examples than classes
#
# The head tells fewer examples apart than there are classes. A dense layer before it tells nearly as many apart as it
# has units. Here: one ReLU layer, 10 classes, photographs as inputs. Labels are mixed of two classes, which
# the observer is not told. The network begins with dense layers, so the inputs that come back are the client's images.

# %%
from softinv_jax.client import load_photographs

BATCH, UNITS = (12, 100) if FAST else (32, 400)
photographs = load_photographs(split="test", per_class=10, image_size=32)
pixels = np.asarray(photographs.normalised())
chosen = rng.choice(len(pixels), BATCH, replace=False)
inputs = pixels[chosen].reshape(BATCH, -1).astype(np.float32)
share = rng.uniform(0.5, 1, (BATCH, 1))
soft = (share * np.eye(10)[rng.integers(0, 10, BATCH)] + (1 - share) * np.eye(10)[rng.integers(0, 10, BATCH)]).astype(
    np.float32
)


def layer(inputs, outputs):
    """PyTorch's initial weights."""
    values = (rng.uniform(-1, 1, (inputs + 1, outputs)) / np.sqrt(inputs)).astype(np.float32)
    return {"kernel": values[:-1], "bias": values[-1]}


parameters = {"dense1": layer(inputs.shape[1], UNITS), "head": layer(UNITS, 10)}


def network_loss(parameters):
    hidden = jax.nn.relu(inputs @ parameters["dense1"]["kernel"] + parameters["dense1"]["bias"][None])
    logits = hidden @ parameters["head"]["kernel"] + parameters["head"]["bias"][None]
    return -(soft * jax.nn.log_softmax(logits)).sum(axis=1).mean()


gradients = jax.tree.map(np.asarray, jax.grad(network_loss)(parameters))

# %%
from softinv_jax.whole_models import recover_model

whole = recover_model(parameters, gradients, batch_size="auto", activation="relu")
names, counts = np.unique(softinv_jax.verdict_names(whole.verdict), return_counts=True)
print("rank:", whole.rank, " verdicts:", dict(zip(names.tolist(), counts.tolist(), strict=True)))

# %%
import matplotlib.pyplot as plt
from scipy.spatial.distance import cdist

nearest = cdist(inputs, np.nan_to_num(whole.inputs)).argmin(axis=1)
figure, axes = plt.subplots(2, 8, figsize=(12, 3.2))
for column in range(8):
    for row, array in enumerate((inputs[column], whole.inputs[nearest[column]])):
        image = np.asarray(photographs.denormalise(array.reshape(32, 32, 3)))
        axes[row, column].imshow(np.clip(image, 0, 1))
        axes[row, column].axis("off")
axes[0, 0].set_title("the client's", loc="left")
axes[1, 0].set_title("from the gradient", loc="left")
plt.show()

# %%
# What this notebook claims.
assert whole.rank == BATCH
assert np.abs(whole.label[nearest] - soft).max() < 1e-5
assert np.abs(whole.inputs[nearest] - inputs).max() < 1e-3
