"""Flower: server strategies that audit every update clients send, and otherwise do as the strategy they wrap.

The observer they play is the server: it knows the parameters it sent to each client, and sees those sent back.
Needs flwr: pip install 'softinv_jax[flower]'.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from softinv_jax.frameworks.update_audit import ClientAudit, UpdateAuditor

try:
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
    from flwr.common import EvaluateIns, EvaluateRes, FitIns, FitRes, Parameters, Scalar, parameters_to_ndarrays
    from flwr.server import strategy as fit_strategies
    from flwr.server.client_manager import ClientManager
    from flwr.server.client_proxy import ClientProxy
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Strategy
except ImportError as error:
    raise ImportError("needs flwr 1.22 or newer; pip install 'softinv_jax[flower]'") from error

__all__ = ["AuditingFitStrategy", "AuditingStrategy"]


class AuditingStrategy(Strategy):
    """For strategies of `flwr.serverapp`, which exchange messages."""

    def __init__(self, strategy: Strategy, **options: Any) -> None:
        """Wrap `strategy`, which goes on deciding on everything.

        Args:
          strategy: any strategy.
          options: of `UpdateAuditor`: how clients train, and the size of their batches.

        Raises:
          ValueError: as `UpdateAuditor`.
        """
        self.strategy, self._auditor = strategy, UpdateAuditor(**options)
        self._sent: dict[int, ArrayRecord | None] = {}

    @property
    def audits(self) -> list[ClientAudit]:
        """One for each reply that brought parameters back."""
        return self._auditor.audits

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The wrapped strategy's messages; what each client is sent is remembered until it replies."""
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self._sent = {message.metadata.dst_node_id: _arrays_of(message) for message in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Audit every reply, then let the wrapped strategy aggregate them."""
        replies = list(replies)
        for reply in replies:
            client = reply.metadata.src_node_id
            before, after = self._sent.pop(client, None), None if reply.has_error() else _arrays_of(reply)
            if before is not None and after is not None:
                self._auditor.audit(server_round, client, _by_name(before), _by_name(after))
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the wrapped strategy does."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As the wrapped strategy does."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """As the wrapped strategy does."""
        self.strategy.summary()


def _arrays_of(message: Message) -> ArrayRecord | None:
    """The parameters in a message: its only record of arrays; None where it has none or several."""
    records = list(message.content.array_records.values())
    return records[0] if len(records) == 1 else None


def _by_name(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in record.items()}


class AuditingFitStrategy(fit_strategies.Strategy):
    """For strategies of `flwr.server`, whose clients send lists of arrays in `fit`: give the arrays' `names`."""

    def __init__(self, strategy: fit_strategies.Strategy, **options: Any) -> None:
        """Wrap `strategy`; see `AuditingStrategy`."""
        self.strategy, self._auditor = strategy, UpdateAuditor(**options)
        self._sent: dict[str, Parameters] = {}

    @property
    def audits(self) -> list[ClientAudit]:
        """One for each result of `fit`."""
        return self._auditor.audits

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """As the wrapped strategy does."""
        return self.strategy.initialize_parameters(client_manager)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """The wrapped strategy's instructions; what each client is sent is remembered until it answers."""
        instructions = self.strategy.configure_fit(server_round, parameters, client_manager)
        self._sent = {client.cid: instruction.parameters for client, instruction in instructions}
        return instructions

    def aggregate_fit(
        self, server_round: int, results: list[tuple[ClientProxy, FitRes]], failures: list[Any]
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Audit every result, then let the wrapped strategy aggregate them."""
        for client, result in results:
            before = self._sent.pop(client.cid, None)
            if before is not None:
                arrays = (parameters_to_ndarrays(parameters) for parameters in (before, result.parameters))
                self._auditor.audit(server_round, client.cid, *arrays)
        return self.strategy.aggregate_fit(server_round, results, failures)

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """As the wrapped strategy does."""
        return self.strategy.configure_evaluate(server_round, parameters, client_manager)

    def aggregate_evaluate(
        self, server_round: int, results: list[tuple[ClientProxy, EvaluateRes]], failures: list[Any]
    ) -> tuple[float | None, dict[str, Scalar]]:
        """As the wrapped strategy does."""
        return self.strategy.aggregate_evaluate(server_round, results, failures)

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, dict[str, Scalar]] | None:
        """As the wrapped strategy does."""
        return self.strategy.evaluate(server_round, parameters)
