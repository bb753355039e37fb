"""A federation in Flower whose server audits: every client's label comes back, and training goes on as without."""

import contextlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # flwr's own imports are deprecated here and there
    pytest.importorskip("flwr")
    import flower_app as federation
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.server import Server, SimpleClientManager
    from flwr.server import strategy as fit_strategies
    from flwr.server.client_proxy import ClientProxy
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg

    from softinv_jax.frameworks.flower import AuditingFitStrategy, AuditingStrategy

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = list(federation.initial_parameters())


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer versions of flwr make messages only inside a task, which has a number."""
    with contextlib.suppress(ImportError):
        from flwr.supercore.task_identity import TaskIdentity  # noqa: PLC0415

        for name in ("_run_id", "_node_id", "_task_id"):
            monkeypatch.setattr(TaskIdentity, name, 1)


class InProcessGrid(Grid):
    """Delivers messages to the ClientApp in this process; node i + 1 is partition i."""

    run = property(lambda self: None)

    def set_run(self, *_: Any) -> None: ...

    def create_message(self, *arguments: Any, **_: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return range(1, federation.CLIENTS + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            context = Context(1, node, {"partition-id": node - 1}, RecordDict(), {})
            replies.append(federation.client_app(message, context))
        return replies


def averaging() -> FedAvg:
    clients = federation.CLIENTS
    return FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)


def federate(strategy: Any) -> ArrayRecord:
    initial = federation.record(federation.initial_parameters())
    random.seed(0)  # FedAvg draws the order of the clients, and with it that of its sum.
    return strategy.start(InProcessGrid(), initial, num_rounds=federation.ROUNDS).arrays


def check_labels(audits: list) -> None:
    assert [audit.server_round for audit in audits] == [1, 1, 1, 2, 2, 2]
    for audit in audits:
        assert audit.problem is None
        assert audit.recovery.verdict_name == "unique"
        assert audit.statement.startswith("Exact")
        _, label = federation.private_example(int(audit.client) - 1, audit.server_round)
        np.testing.assert_allclose(audit.recovery.label, label, atol=1e-5)


def test_every_update_is_audited_and_training_is_the_same() -> None:
    strategy = AuditingStrategy(averaging(), learning_rate=federation.RATE, keep_updates=True)
    audited, plain = federate(strategy), federate(averaging())
    for name, array in plain.items():
        np.testing.assert_array_equal(audited[name].numpy(), array.numpy())
    check_labels(strategy.audits)
    # The whole update was kept: the body's gradient is the one the client computed.
    pixels, _ = federation.private_example(0, 1)
    kept = next(audit for audit in strategy.audits if audit.client == 1)
    body = kept.update.gradients["body"]
    np.testing.assert_allclose(body["weight"], np.outer(body["bias"], pixels), atol=1e-6)


class InProcessClient(ClientProxy):
    """A client of the older API: lists of arrays in `fit`."""

    def fit(self, ins: Any, timeout: float | None, group_id: int | None) -> FitRes:
        arrays = dict(zip(NAMES, parameters_to_ndarrays(ins.parameters), strict=True))
        trained = federation.local_step(arrays, int(self.cid) - 1, group_id)
        parameters = ndarrays_to_parameters([trained[name] for name in NAMES])
        return FitRes(Status(Code.OK, ""), parameters, 1, {})

    def get_properties(self, *_: Any) -> Any: ...

    def get_parameters(self, *_: Any) -> Any: ...

    def evaluate(self, *_: Any) -> Any: ...

    def reconnect(self, *_: Any) -> Any: ...


def test_strategies_that_fit_lists_of_arrays() -> None:
    manager = SimpleClientManager()
    for client in range(1, federation.CLIENTS + 1):
        manager.register(InProcessClient(str(client)))
    initial = ndarrays_to_parameters([federation.initial_parameters()[name] for name in NAMES])
    averaging = fit_strategies.FedAvg(fraction_evaluate=0.0, min_fit_clients=3, initial_parameters=initial)
    strategy = AuditingFitStrategy(averaging, learning_rate=federation.RATE, names=NAMES)
    server = Server(client_manager=manager, strategy=strategy)
    server.fit(federation.ROUNDS, timeout=None)
    # Answers come in any order.
    check_labels(sorted(strategy.audits, key=lambda audit: audit.server_round))


def test_a_client_that_sends_rubbish_is_reported_and_nothing_else() -> None:
    strategy = AuditingStrategy(averaging(), learning_rate=federation.RATE)
    grid = InProcessGrid()
    initial = federation.record(federation.initial_parameters())
    messages = list(strategy.configure_train(1, initial, ConfigRecord(), grid))
    replies = list(grid.send_and_receive(messages))
    rubbish = federation.initial_parameters() | {"fc.weight": np.full((6, 16), np.nan, np.float32)}
    replies[1].content["arrays"] = federation.record(rubbish)
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert [audit.problem is None for audit in strategy.audits] == [True, False, True]
    assert "fc.weight holds entries that are not finite" in strategy.audits[1].problem


def test_bad_options_fail_before_the_first_round() -> None:
    with pytest.raises(ValueError, match="local_steps must be a positive integer, not 0"):
        AuditingStrategy(averaging(), local_steps=0)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="simulations need flwr[simulation]")
def test_a_real_simulation() -> None:
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "FLWR_TELEMETRY_ENABLED": "0"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(jax.config.jax_compilation_cache_dir)
    command = [sys.executable, str(Path(federation.__file__))]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(finished.stdout.splitlines()[-1])
    for server_round in (1, 2):
        labels = [federation.private_example(client, server_round)[1] for client in range(federation.CLIENTS)]
        audits = [(verdict, label) for number, verdict, label in found if number == server_round]
        assert [verdict for verdict, _ in audits] == ["unique"] * federation.CLIENTS
        # Which node holds which client's data is Flower's secret.
        for label in labels:
            assert min(np.abs(np.subtract(recovered, label)).max() for _, recovered in audits) < 1e-5
