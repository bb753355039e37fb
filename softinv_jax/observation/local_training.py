"""What a client does between the parameters it was sent and those it sends back, as far as it was told to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["LocalTraining"]


@dataclass(frozen=True)
class LocalTraining:
    """K steps of stochastic gradient descent from a fresh optimiser, as `torch.optim.SGD` takes them.

    Attributes:
      steps: K, 1 or more.
      learning_rate: positive, or one for each step. 1 stands for a rate that is not known.
      momentum, dampening, nesterov: of the optimiser, which starts from zero.
      weight_decay: added to the gradient, times the parameters, before momentum.
      proximal: FedProx's mu: mu (parameters - parameters sent) is added to the gradient (Li et al., MLSys 2020).
      minibatch_size: examples in each step, in an order that is not known; None where each step is on all of them.

    Raises:
      ValueError: naming the option that is out of range.
    """

    steps: int = 1
    learning_rate: float | tuple[float, ...] = 1.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    proximal: float = 0.0
    minibatch_size: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int | np.integer) or self.steps < 1:
            raise ValueError(f"local_steps must be a positive integer, not {self.steps!r}")
        size = self.minibatch_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1):
            raise ValueError(f"minibatch_size must be a positive integer, or None for all examples, not {size!r}")
        if isinstance(self.learning_rate, Sequence | np.ndarray):
            object.__setattr__(self, "learning_rate", tuple(float(rate) for rate in self.learning_rate))
        if len(self.rates) != self.steps:
            raise ValueError(f"learning_rate holds {len(self.rates)} rates for {self.steps} local_steps")
        for rate in self.rates:
            if not 0 < rate < np.inf:
                raise ValueError(f"learning_rate must be positive, or None where it is not known, not {rate!r}")
        for option in ("momentum", "dampening"):
            value = getattr(self, option)
            if not 0 <= value < 1:
                raise ValueError(f"{option} must lie in [0, 1), not {value!r}")
        for option in ("weight_decay", "proximal"):
            value = getattr(self, option)
            if not 0 <= value < np.inf:
                raise ValueError(f"{option} must be zero or positive, not {value!r}")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(f"nesterov needs momentum > 0 and dampening 0, not {self.momentum} and {self.dampening}")

    @property
    def rates(self) -> tuple[float, ...]:
        """(K,) the learning rate of each step."""
        rate = self.learning_rate
        return rate if isinstance(rate, tuple) else (float(rate),) * int(self.steps)

    def weights(self) -> np.ndarray:
        """(K,) how far a unit gradient at each step has moved the parameters in the end; without decay or pull.

        The optimiser is linear: what comes back is `sent - sum_k weights[k] gradient_k`.
        """
        weights = np.zeros(self.steps)
        for first in range(self.steps):
            velocity = 0.0
            for step in range(first, self.steps):
                gradient = 1.0 if step == first else 0.0
                entering = gradient if step == 0 else (1.0 - self.dampening) * gradient
                velocity = self.momentum * velocity + entering if self.momentum else gradient
                change = gradient + self.momentum * velocity if self.nesterov else velocity
                weights[first] += self.rates[step] * change
        return weights

    def total_weight(self) -> float:
        """How far a unit gradient that stays the same has moved the parameters in the end."""
        return float(np.sum(self.weights()))

    def shrinkage(self) -> float:
        """What the parameters sent are multiplied by, where every gradient is zero: 1 without weight decay."""
        value, velocity = 1.0, 0.0
        for step, rate in enumerate(self.rates):
            slope = self.weight_decay * value + self.proximal * (value - 1.0)
            velocity = self.momentum * velocity + (slope if step == 0 else (1.0 - self.dampening) * slope)
            if self.momentum:
                slope = slope + self.momentum * velocity if self.nesterov else velocity
            value -= rate * slope
        return value
