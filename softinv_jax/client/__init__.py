"""The client's side of federated learning: private images, soft labels, networks, and the gradients uploaded.

Images come from `datasets`, soft labels from `soft_labels`, the paper's networks from `networks` (trained by
`training`), and `gradients` computes what the client sends. The attack imports none of it.
"""

from softinv_jax.client.datasets import PHOTOGRAPHS, ImageDataset, load_photographs, load_tfds
from softinv_jax.client.gradients import (
    ApplyFunction,
    LastLayerGradient,
    cross_entropy,
    last_layer_gradient,
    model_gradient,
    per_sample_last_layer_gradients,
    per_sample_model_gradients,
)
from softinv_jax.client.networks import (
    FCN4,
    AlexNet,
    LeNet,
    PatchConvolution,
    ResNet,
    ResNet18,
    ResNet50,
    apply_function,
    initial_batch_statistics,
    initialise,
    initialise_fan_in,
    initialise_uniform,
)
from softinv_jax.client.soft_labels import (
    FAMILIES,
    SoftLabelBatch,
    compose,
    cutmix,
    hard_label,
    images_per_example,
    mix,
    sample_batch,
    smooth,
)
from softinv_jax.client.training import TrainingResult, evaluate, train

__all__ = [
    "FAMILIES",
    "FCN4",
    "PHOTOGRAPHS",
    "AlexNet",
    "ApplyFunction",
    "ImageDataset",
    "LastLayerGradient",
    "LeNet",
    "PatchConvolution",
    "ResNet",
    "ResNet18",
    "ResNet50",
    "SoftLabelBatch",
    "TrainingResult",
    "apply_function",
    "compose",
    "cross_entropy",
    "cutmix",
    "evaluate",
    "hard_label",
    "images_per_example",
    "initial_batch_statistics",
    "initialise",
    "initialise_fan_in",
    "initialise_uniform",
    "last_layer_gradient",
    "load_photographs",
    "load_tfds",
    "mix",
    "model_gradient",
    "per_sample_last_layer_gradients",
    "per_sample_model_gradients",
    "sample_batch",
    "smooth",
    "train",
]
