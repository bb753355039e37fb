"""The published label recovery, rendered in PyTorch: the peer of the speed benchmark.

Source of the procedure: Wang, Liang and He, "Towards Eliminating Hard Label Constraints in Gradient
Inversion Attacks", ICLR 2024 (arXiv 2402.03124), with the settings of the authors' notebooks
(``ybwang119/label_recovery``). Only the procedure is theirs: the code is our own and copies none of theirs.

One sample; a bias-free last layer ``z = W x`` with gradient ``G = (softmax(z) - y) x^T``, both (C, d).
The row of G with the largest absolute sum is the feature x up to one unknown scalar. For a trial scalar,

    x = scalar * row / coefficient,        y = softmax(W x) - G[:, j] / x[j],

with j the largest entry of x. The loss is 1000 times the variance of all but the ``excluded`` largest entries
of y: one for smoothed labels, two for mixup; the format must be told. L-BFGS searches from +start, then from
-start, leaving plateaus by doubling jumps; particle swarms over widening windows of both signs come last.

One deliberate difference: the authors accept a root only if it lies near the *true* scalar, an oracle that no
observer has. Here a loss under the threshold is enough, so an accepted root may be wrong; compare the label
with the truth to count those. Where theirs stops at a false root and counts a failure, this returns it.

This runs faster than theirs, which loops over classes and features in Python; both loop over particles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

try:
    import torch
except ImportError as error:
    raise ImportError("PyTorch is missing: pip install 'softinv_jax[peers]'") from error

LOSS_SCALE = 1000.0
PLATEAU_SPREAD = 1e-3  # of the mean of the last three losses
FIRST_JUMP = 0.5
WINDOW_OVERLAP = 0.3
Stage = Literal["lbfgs+", "lbfgs-", "pso", "failed"]
Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PublishedSettings:
    """The authors' settings, by default those of their label-smoothing notebooks.

    ``iterations`` counts the L-BFGS steps and jumps of both signs together. The swarm's windows begin at
    ``swarm_start``, are ``first_window``, ``window / 5``, then ``window`` wide, ending below ``swarm_bound``.
    """

    coefficient: float = 4.0
    start: float = 1.0
    learning_rate: float = 0.5
    iterations: int = 200
    bound: float = 100.0
    loss_threshold: float = 1e-9
    swarm_size: int = 500
    swarm_iterations: int = 40
    swarm_start: float = 1.0
    first_window: float = 5.0
    window: float = 20.0
    swarm_bound: float = 70.0


SMOOTHING_SETTINGS = PublishedSettings()
MIXUP_SETTINGS = PublishedSettings(coefficient=2.0, window=50.0)


@dataclass(frozen=True)
class PublishedRecovery:
    """Label (C,), feature (d,), the scalar from row to feature, its loss, and the stage that found it.

    At stage ``failed`` these are the trial of lowest loss, not an answer; for a zero gradient they are NaN.
    """

    label: np.ndarray
    feature: np.ndarray
    scalar: float
    loss: float
    stage: Stage


def recover_published(
    weight: np.ndarray,
    weight_gradient: np.ndarray,
    *,
    excluded: int,
    settings: PublishedSettings = SMOOTHING_SETTINGS,
    swarm: bool = True,
    device: str | torch.device | None = None,
) -> PublishedRecovery:
    """Recover one label from ``weight`` and ``weight_gradient``, both (C, d), in float32.

    ``excluded`` entries of the label are free: 1 for hard or smoothed labels, 2 for mixup. ``swarm=False``
    omits the fallback, which draws from numpy's global generator, the only one scikit-opt uses. It runs on
    ``device``, by default CUDA where there is one.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    W, G = (torch.as_tensor(np.array(array, dtype=np.float32), device=device) for array in (weight, weight_gradient))
    if excluded not in (1, 2) or W.ndim != 2 or W.shape != G.shape:
        raise ValueError(f"excluded must be 1 or 2, both arrays (C, d): {excluded}, {W.shape}, {G.shape}")
    if not G.any():
        label, feature = (np.full(size, math.nan, np.float32) for size in W.shape)
        return PublishedRecovery(label, feature, math.nan, math.nan, "failed")
    direction = G[G.sum(dim=1).abs().argmax()] / settings.coefficient

    def label_at(scalar: torch.Tensor) -> torch.Tensor:
        x = scalar * direction
        j = x.argmax() if x.max() != 0 else x.argmin()
        return torch.softmax(W @ x, dim=0) - G[:, j] / x[j]

    def loss_at(scalar: torch.Tensor) -> torch.Tensor:
        constant = label_at(scalar).topk(len(W) - excluded, largest=False, sorted=False).values
        return LOSS_SCALE * constant.var(unbiased=False)

    def result(scalar: float, stage: Stage) -> PublishedRecovery:
        at = torch.tensor(scalar, device=device)
        label, feature = label_at(at).cpu().numpy(), (at * direction).cpu().numpy()
        return PublishedRecovery(label, feature, scalar, loss_at(at).item(), stage)

    trials = []
    stages: dict[Stage, float] = {"lbfgs+": 1.0, "lbfgs-": -1.0}
    for stage, sign in stages.items():
        scalar, accepted = _descend(loss_at, sign, settings, device)
        if accepted:
            return result(scalar, stage)
        trials.append(scalar)
    for low, high in _windows(settings) if swarm else ():
        scalar, accepted = _swarm(loss_at, low, high, settings, device)
        if accepted:
            return result(scalar, "pso")
        trials.append(scalar)
    failures = (result(scalar, "failed") for scalar in trials)
    return min(failures, key=lambda trial: math.inf if math.isnan(trial.loss) else trial.loss)


def _descend(loss_at: Loss, sign: float, settings: PublishedSettings, device: torch.device) -> tuple[float, bool]:
    """L-BFGS from ``sign * start`` with the plateau rule: the last scalar and whether it is accepted."""
    scalar = torch.tensor(sign * settings.start, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS([scalar], lr=settings.learning_rate)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_at(scalar)
        loss.backward()
        return loss

    recent, jump = [0.0] * 3, sign * FIRST_JUMP
    for _ in range(settings.iterations // 2):
        recent = [*recent[1:], loss := closure().item()]
        if abs(scalar.item()) > settings.bound:
            break
        if loss < settings.loss_threshold:
            return scalar.item(), True
        if max(recent) - min(recent) < PLATEAU_SPREAD * sum(recent) / 3:
            scalar.data += jump
            jump *= 2
        else:
            optimizer.step(closure)
    return scalar.item(), False


def _windows(settings: PublishedSettings) -> Iterator[tuple[float, float]]:
    """The swarm's search intervals, ever farther from zero, each followed by its negative."""
    inner, widths = settings.swarm_start, [settings.first_window, settings.window / 5]
    while (outer := inner + (widths.pop(0) if widths else settings.window)) < settings.swarm_bound:
        yield inner - WINDOW_OVERLAP, outer
        yield -outer - WINDOW_OVERLAP, -inner
        inner = outer


def check_swarms() -> None:
    """Raise ImportError where what the particle swarms need is missing."""
    try:
        import sko.PSO  # noqa: F401, PLC0415
    except ImportError as error:
        raise ImportError("scikit-opt is missing: pip install 'softinv_jax[peers]'") from error


def _swarm(
    loss_at: Loss, low: float, high: float, settings: PublishedSettings, device: torch.device
) -> tuple[float, bool]:
    """One particle swarm over [low, high]: its best scalar and whether it is accepted."""
    check_swarms()
    from sko.PSO import PSO  # noqa: PLC0415 - only swarms need it

    def objective(position: np.ndarray) -> float:  # (1,), one particle
        return loss_at(torch.tensor(position[0].item(), device=device)).item()

    best, loss = PSO(objective, 1, settings.swarm_size, settings.swarm_iterations, lb=[low], ub=[high]).run()
    return np.ravel(best)[0].item(), np.min(loss).item() < settings.loss_threshold
