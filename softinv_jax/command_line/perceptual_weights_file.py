"""Reading the weights of the perceptual distance (LPIPS) from a file of the user's; nothing is downloaded."""

import os
import zipfile
from pathlib import Path

import numpy as np

from softinv_jax.measures.perceptual import WEIGHT_SHAPES, check_weights

__all__ = ["WEIGHTS_VARIABLE", "load_perceptual_weights"]

WEIGHTS_VARIABLE = "SOFTINV_LPIPS_WEIGHTS"

_HOW_TO_MAKE = """It is a NumPy .npz file, made once where torch is installed from two published files:
torchvision's alexnet-owt-7be5be79.pth (download.pytorch.org/models) and lpips/weights/v0.1/alex.pth
(github.com/richzhang/PerceptualSimilarity):
  import numpy, torch
  files = [torch.load(name, map_location="cpu") for name in ("alexnet-owt-7be5be79.pth", "alex.pth")]
  numpy.savez("lpips_alexnet.npz", **{key: value.numpy() for file in files for key, value in file.items()})"""


def load_perceptual_weights(path: str | os.PathLike[str] | None = None) -> dict[str, np.ndarray]:
    """Return the weights for `measures.perceptual.perceptual_distance`.

    Args:
      path: an .npz file with the arrays of `WEIGHT_SHAPES`, and possibly others; None for the one that the environment
        variable SOFTINV_LPIPS_WEIGHTS names.

    Raises:
      FileNotFoundError: if there is no such file; the message says how to make one.
      ValueError: if it is no .npz file, or a weight is missing or has another shape.
    """
    named = path or os.environ.get(WEIGHTS_VARIABLE)
    if not named:
        raise FileNotFoundError(f"No LPIPS weights: give a path, or set {WEIGHTS_VARIABLE}. {_HOW_TO_MAKE}")
    file = Path(named).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"No LPIPS weights at {file}. {_HOW_TO_MAKE}")
    if file.suffix != ".npz":
        raise ValueError(f"Expected LPIPS weights as .npz, got {file}. {_HOW_TO_MAKE}")
    try:
        with np.load(file, allow_pickle=False) as archive:
            weights = {name: archive[name] for name in WEIGHT_SHAPES if name in archive}
        check_weights(weights)
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: {error}. {_HOW_TO_MAKE}") from error
    return weights
