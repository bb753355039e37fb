"""What options take, as argparse reads it."""

import argparse

__all__ = ["ACTIVATION_NAMES", "DATASET_HELP", "batch_size"]

# The parser must not load jax; that these are the names of `activations.ACTIVATIONS` is tested.
ACTIVATION_NAMES = (
    *("relu", "leaky_relu", "relu6", "hard_tanh"),
    *("sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "softplus", "elu", "identity"),
)


DATASET_HELP = (
    "photographs: crops of ten photographs, always at hand, one class each (default); folder:PATH with a folder of"
    " pictures for each class; FILE.npz with images and labels; or a prepared TFDS data set such as cifar10"
)


def batch_size(text: str) -> int | str:
    """A positive integer, or `auto`."""
    if text == "auto":
        return text
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive integer nor auto")
    return value
