"""Published image attacks, rendered in PyTorch: peers of gradient matching. One image, LeNet, the whole gradient.

Sources: Zhu, Liu and Han, "Deep Leakage from Gradients", NeurIPS 2019 (`deep_leakage`); Geiping, Bauermeister, Droege
and Moeller, "Inverting Gradients", NeurIPS 2020 (`inverting_gradients`). Only the procedures are theirs: the code is
our own and copies none of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

try:
    import torch
    from torch.nn import functional
except ImportError as error:
    raise ImportError("PyTorch is missing: pip install 'softinv_jax[peers]'") from error

STRIDES = {"conv1": 2, "conv2": 2, "conv3": 1}
DECAY_AT = (3 / 8, 5 / 8, 7 / 8)


def torch_arrays(tree: Mapping[str, Any], device: str | torch.device | None = None) -> dict[str, torch.Tensor]:
    """A flax LeNet's parameters or gradients as PyTorch lays them out: (out, in, height, width) and (C, d).

    On `device`, by default CUDA where there is one; the attacks then run where these arrays are.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for layer, arrays in tree.items():
        for name, array in arrays.items():
            value = np.asarray(array)
            if name == "kernel":
                value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
            found[f"{layer}/{name}"] = torch.as_tensor(np.array(value, order="C"), device=device)
    return found


def lenet(parameters: Mapping[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Logits (N, C) of images (N, channels, H, W)."""
    for layer, stride in STRIDES.items():
        kernel, bias = parameters[f"{layer}/kernel"], parameters[f"{layer}/bias"]
        images = torch.sigmoid(functional.conv2d(images, kernel, bias, stride=stride, padding=2))
    # Flattened in the order row, column, channel, as flax does.
    return images.permute(0, 2, 3, 1).flatten(1) @ parameters["head/kernel"].T


def gradient(
    parameters: Mapping[str, torch.Tensor], image: torch.Tensor, label: torch.Tensor, *, differentiable: bool = True
) -> list[torch.Tensor]:
    """Gradient of the cross-entropy of one image (1, channels, H, W) and label (1, C), by name in sorted order."""
    leaves = {name: parameters[name].detach().requires_grad_() for name in sorted(parameters)}
    loss = -(label * functional.log_softmax(lenet(leaves, image), dim=1)).sum()
    return list(torch.autograd.grad(loss, list(leaves.values()), create_graph=differentiable))


def deep_leakage(
    parameters: Mapping[str, torch.Tensor],
    observed: list[torch.Tensor],
    shape: tuple[int, ...],
    classes: int,
    *,
    steps: int = 300,
) -> np.ndarray:
    """DLG: image and label from noise, squared distance of gradients, L-BFGS; the image (H, W, channels) at the end."""
    device = observed[0].device
    image = torch.randn(shape, device=device, requires_grad=True)
    logits = torch.randn((1, classes), device=device, requires_grad=True)
    optimiser = torch.optim.LBFGS([image, logits], lr=1.0)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        dummy = gradient(parameters, image, torch.softmax(logits, dim=1))
        loss = torch.stack([((a - b) ** 2).sum() for a, b in zip(dummy, observed, strict=True)]).sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimiser.step(closure)
    return image.detach()[0].permute(1, 2, 0).cpu().numpy()


def inverting_gradients(
    parameters: Mapping[str, torch.Tensor],
    observed: list[torch.Tensor],
    shape: tuple[int, ...],
    label: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    steps: int,
    variation: float = 1e-2,
    gradient_of: Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]] | None = None,
) -> np.ndarray:
    """Cosine distance over all layers, total variation, Adam on the gradient's sign, pixels kept in their box.

    Label (C,), or (B, C) for a batch; low and high (channels,). Returns the image (H, W, channels), or images, of the
    lowest loss. `gradient_of` (images, labels) is that of another network than LeNet, which then needs no parameters.
    """
    gradient_of = gradient_of or partial(gradient, parameters)
    device = observed[0].device
    image = torch.randn(shape, device=device, requires_grad=True)
    target = torch.as_tensor(np.atleast_2d(np.asarray(label, np.float32)), device=device)
    box = [torch.as_tensor(np.asarray(end, np.float32), device=device).reshape(1, -1, 1, 1) for end in (low, high)]
    optimiser = torch.optim.Adam([image], lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [int(share * steps) for share in DECAY_AT], gamma=0.1)
    norm = torch.sqrt(torch.stack([(part**2).sum() for part in observed]).sum())
    best, best_loss = image.detach().clone(), float("inf")
    for _ in range(steps):
        optimiser.zero_grad()
        dummy = gradient_of(image, target)
        product = torch.stack([(a * b).sum() for a, b in zip(dummy, observed, strict=True)]).sum()
        own = torch.sqrt(torch.stack([(part**2).sum() for part in dummy]).sum())
        across = (image[..., 1:] - image[..., :-1]).abs().mean() + (image[..., 1:, :] - image[..., :-1, :]).abs().mean()
        loss = 1 - product / (own * norm) + variation * across
        if loss.item() < best_loss:
            best, best_loss = image.detach().clone(), loss.item()
        loss.backward()
        assert image.grad is not None
        image.grad.sign_()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            image.copy_(torch.minimum(torch.maximum(image, box[0]), box[1]))
    images = best.permute(0, 2, 3, 1).cpu().numpy()
    return images if np.ndim(label) == 2 else images[0]
