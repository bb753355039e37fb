# %% [markdown]
# # What one gradient gives away
#
# A client of federated learning computes a gradient on one private image with a private soft label, and sends it. From
# that gradient and the model alone we compute the label, the feature before the last layer, and the image. Five
# minutes.

# %%
# Parameters. FAST: the smallest run, for tests.
import os

FAST = os.environ.get("SOFTINV_FAST") == "1"
LABEL_FORMAT = "mixup"  # hard, smoothing, mixup, smoothed_mixup, k_way_mixup, cutmix or dense: the attack is not told
CLIENTS = 2 if FAST else 8
SEED = 0

# %% [markdown]
# ## The client
#
# LeNet without training, as in the paper; photographs that come with scikit-image.

# %%
import jax
import numpy as np

from softinv_jax.client import (
    LeNet,
    apply_function,
    initialise,
    load_photographs,
    per_sample_model_gradients,
    sample_batch,
)

data = load_photographs(per_class=4)
classes = data.number_of_classes
network = LeNet(classes)
parameters = initialise(network, jax.random.key(SEED), (32, 32, 3))
private = sample_batch(jax.random.key(SEED + 1), LABEL_FORMAT, data.normalised(), data.classes, classes, CLIENTS)
gradients = jax.device_get(
    per_sample_model_gradients(apply_function(network), parameters, private.images, private.labels)
)
print({name: layer["kernel"].shape for name, layer in gradients.items()})

# %% [markdown]
# ## The observer: labels
#
# It knows the parameters and sees the gradients. It knows neither the label's format nor anything about the images.

# %%
import softinv_jax

observation = softinv_jax.observe_head(parameters, gradients)
recovery = softinv_jax.recover_many(observation)
for number in range(min(CLIENTS, 4)):
    entries = [int(c) for c in recovery.format.classes[number] if c >= 0]
    shares = recovery.format.weights[number][: len(entries)]
    named = ", ".join(f"{data.class_names[c]} {share:.4f}" for c, share in zip(entries, shares, strict=True))
    print(f"client {number}: {recovery.verdict_name[number]}: {named}")

# %% [markdown]
# The verdict `unique` says that no other label that singles out as few classes explains the gradient. Now we may look
# at the truth:

# %%
error = np.abs(recovery.label - np.asarray(private.labels)).max(axis=1)
print("largest error of each label:", error)

# %% [markdown]
# ## When something that was told is not so
#
# Here the observer believes that it sees gradients, but every one of them was multiplied by 0.1. The gradient
# contradicts that scale, and says which one it is at. Where nothing confirms what was told (a dense label of a head
# with a bias, for one) the verdict is `conditional`, and `assumptions.rests_on` names what the label rests on.

# %%
one = jax.tree.map(lambda array: 0.1 * array[0], gradients)
misled = softinv_jax.recover(softinv_jax.observe_head(parameters, one))
print(misled.verdict_name, "at a scale of", misled.scale)
for refuted in softinv_jax.explain_assumptions(misled.assumptions.refuted):
    print(f"{refuted.code}: {refuted.sentence} {refuted.remedy}")

# %% [markdown]
# ## The observer: images
#
# LeNet is a chain of invertible layers, so the image follows layer by layer.

# %%
from softinv_jax.images.inversion import invert
from softinv_jax.images.layer_chain import lenet_chain
from softinv_jax.measures.image_quality import peak_signal_to_noise_ratio
from softinv_jax.report.image_figures import ImageExample, images_figure

inverted = invert(lenet_chain(), parameters, gradients, (32, 32, 3), heads=recovery)
original = np.asarray(data.denormalise(private.images))
recovered = np.asarray(data.denormalise(inverted.images[:, 0]))
quality = peak_signal_to_noise_ratio(recovered, original)
print("PSNR in decibels:", np.round(quality, 1))
images_figure(
    [
        ImageExample(f"client {number}", original[number], recovered[number], "recovered", f"{quality[number]:.0f} dB")
        for number in range(min(CLIENTS, 4))
    ],
    "Private images, and what one gradient gives away of them",
)

# %%
# What this notebook claims.
structured = LABEL_FORMAT != "dense"
assert not structured or (recovery.verdict == softinv_jax.Verdict.UNIQUE).all()
assert not structured or error.max() < 1e-4
assert not structured or misled.verdict >= softinv_jax.Verdict.AMBIGUOUS
assert not structured or abs(misled.scale - 0.1) < 1e-3
assert not structured or quality.min() > 60
