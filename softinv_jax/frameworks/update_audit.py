"""What each client's update gives away, round after round, for a server that sends parameters and gets them back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from softinv_jax.batches.batch_recovery import BatchRecovery
from softinv_jax.batches.class_counts import ClassCounts
from softinv_jax.frameworks.parameter_files import Tree, name_arrays, trained_layers
from softinv_jax.labels.verdicts import Recovery
from softinv_jax.observation.updates import ObservedUpdate, observe_update
from softinv_jax.recoveries import BatchSize
from softinv_jax.whole_models import recover_update

__all__ = ["ClientAudit", "UpdateAuditor"]


@dataclass(frozen=True)
class ClientAudit:
    """What one client's update of one round gives away.

    Attributes:
      server_round: from 1. client: the framework's name for it.
      recovery: a `Recovery` of one example, or a `BatchRecovery`; None where there is a problem.
      update: of the whole model, for the images, where the auditor keeps updates; else None.
      statement: what the observation rests on, see `ObservedUpdate`.
      problem: why this update could not be audited, or None.
    """

    server_round: int
    client: int | str
    recovery: Recovery | BatchRecovery | ClassCounts | None
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
        self._to_tree, self._keep_updates, self._training = to_tree or trained_layers, keep_updates, training

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
        recovery, update, problem = None, None, None
        try:
            update = observe_update(self._tree(before), self._tree(after), **self._training)
            recovery = recover_update(update, batch_size=self._batch_size, head=self._head)
        except ValueError as error:
            problem = str(error)
        statement = "" if update is None else update.statement
        kept = update if self._keep_updates else None
        self.audits.append(ClientAudit(server_round, client, recovery, kept, statement, problem))
        return self.audits[-1]

    def _tree(self, arrays: Mapping[str, np.ndarray] | Sequence[np.ndarray]) -> Tree:
        if isinstance(arrays, Mapping):
            return self._to_tree(arrays)
        if self._names is None:
            raise ValueError(f"a list of {len(arrays)} arrays needs names, such as list(model.state_dict())")
        return self._to_tree(name_arrays(arrays, self._names))
