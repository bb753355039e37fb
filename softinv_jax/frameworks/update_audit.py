"""What each client's update gives away, round after round, for a server that sends parameters and gets them back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from softinv_jax.batches.batch_recovery import BatchRecovery
from softinv_jax.batches.class_counts import ClassCounts
from softinv_jax.frameworks.parameter_files import Tree, name_arrays, trained_layers
from softinv_jax.images.objective import MatchingSettings
from softinv_jax.inversions import Inversion, Network, invert_observed
from softinv_jax.labels.verdicts import Recovery
from softinv_jax.observation.updates import ObservedUpdate, observe_update
from softinv_jax.recoveries import BatchSize
from softinv_jax.whole_models import recover_update

if TYPE_CHECKING:
    from softinv_jax.frameworks.torch_model import TorchModel

__all__ = ["ClientAudit", "UpdateAuditor"]


@dataclass(frozen=True)
class ClientAudit:
    """What one client's update of one round gives away.

    Attributes:
      server_round: from 1. client: the framework's name for it.
      recovery: a `Recovery` of one example, or a `BatchRecovery`; None where there is a problem.
      images: what `invert_observed` finds, where the auditor was given a model; None where nothing tells the
        examples apart.
      update: of the whole model, for the images, where the auditor keeps updates; else None.
      statement: what the observation rests on, see `ObservedUpdate`.
      problem: why this update could not be audited, or None.
    """

    server_round: int
    client: int | str
    recovery: Recovery | BatchRecovery | ClassCounts | None
    images: Inversion | None
    update: ObservedUpdate | None
    statement: str
    problem: str | None


class UpdateAuditor:
    """Audits updates one by one and collects the results in `audits`, in the order of arrival."""

    def __init__(
        self,
        *,
        batch_size: BatchSize = 1,
        head: str | None = None,
        names: Sequence[str] | None = None,
        to_tree: Callable[[Mapping[str, np.ndarray]], Tree] | None = None,
        model: "TorchModel | None" = None,
        matching: MatchingSettings | None = None,
        keep_updates: bool = False,
        **training: Any,
    ) -> None:
        """Say how clients train and name their arrays.

        Args:
          batch_size: examples behind each update, or `auto`.
          head: name of the last dense layer, where shapes and names do not tell it; see `find_head`.
          names: of the arrays, in their order, where clients send a list: `list(model.state_dict())`.
          to_tree: makes a tree of layers of the arrays by name, such as a function that calls `linen_from_torch`;
            `trained_layers` by default.
          model: from `torch_model`; then images are recovered as well, where its layers determine them.
          matching: where they do not, match the gradient with these settings, which takes a while; None does not.
          keep_updates: keep each whole update, not only what its head gives away.
          training: `learning_rate`, `local_steps`, `momentum`, ... of `observe_update`. Without `learning_rate` that is
            recovered too, as `recovery.scale`.

        Raises:
          ValueError: for an option out of range.
        """
        # Bad options fail now, and not in the first round.
        observe_update({"x": np.ones(1)}, {"x": np.ones(1)}, **training)
        self.audits: list[ClientAudit] = []
        self._batch_size, self._head, self._names = batch_size, head, names
        if model is not None and to_tree is not None:
            raise ValueError("a model names and turns the arrays itself; leave to_tree out")
        self._to_tree = to_tree or (trained_layers if model is None else model.tree)
        self._model, self._matching = model, matching
        self._network: Network | None = None
        self._keep_updates, self._training = keep_updates, training

    def audit(
        self,
        server_round: int,
        client: int | str,
        before: Mapping[str, np.ndarray] | Sequence[np.ndarray],
        after: Mapping[str, np.ndarray] | Sequence[np.ndarray],
    ) -> ClientAudit:
        """Audit one update and append it to `audits`. What is wrong with it becomes its `problem`; nothing is raised.

        Args:
          server_round, client: for the record.
          before, after: parameters by name, or lists in the order of `names`.
        """
        recovery, images, update, problem = None, None, None, None
        try:
            update = observe_update(self._tree(before), self._tree(after), **self._training)
            activation = "auto" if self._model is None else self._model.dense_activation
            recovery = recover_update(update, batch_size=self._batch_size, head=self._head, activation=activation)
            images = self._images(update, recovery)
        except ValueError as error:
            problem = str(error)
        statement = "" if update is None else update.statement
        kept = update if self._keep_updates else None
        self.audits.append(ClientAudit(server_round, client, recovery, images, kept, statement, problem))
        return self.audits[-1]

    def _images(self, update: ObservedUpdate, recovery: Recovery | BatchRecovery | ClassCounts) -> Inversion | None:
        if self._model is None or isinstance(recovery, ClassCounts):
            return None
        if self._matching is None and self._model.chain is None:
            return None  # Nothing more than the labels.
        if self._network is None:
            network = self._model.network
            self._network = network if self._head is None else replace(network, head=self._head)
        return invert_observed(self._network, [update], batch_size=self._batch_size, matching=self._matching)

    def _tree(self, arrays: Mapping[str, np.ndarray] | Sequence[np.ndarray]) -> Tree:
        if isinstance(arrays, Mapping):
            return self._to_tree(arrays)
        if self._names is None:
            raise ValueError(f"a list of {len(arrays)} arrays needs names, such as list(model.state_dict())")
        return self._to_tree(name_arrays(arrays, self._names))
