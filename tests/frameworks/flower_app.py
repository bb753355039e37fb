"""A federation in Flower: NumPy clients that train a small network by one step on one example each.

Run as a program, it simulates that federation with an auditing server, and prints what the audit found as JSON.
"""

import json

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

CLASSES, HIDDEN, PIXELS = 6, 16, 10
CLIENTS, ROUNDS = 3, 2
RATE = 0.1

Parameters = dict[str, np.ndarray]


def initial_parameters() -> Parameters:
    """By names as PyTorch gives them."""
    rng = np.random.default_rng(0)
    shapes = {
        "body.weight": (HIDDEN, PIXELS),
        "body.bias": (HIDDEN,),
        "fc.weight": (CLASSES, HIDDEN),
        "fc.bias": (CLASSES,),
    }
    return {name: rng.uniform(-0.5, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def private_example(client: int, server_round: int) -> tuple[np.ndarray, np.ndarray]:
    """(PIXELS,) and the soft label (CLASSES,) of a client in a round: a mixture of two classes, smoothed."""
    rng = np.random.default_rng([client, server_round])
    first, second = rng.permutation(CLASSES)[:2]
    label = np.full(CLASSES, 0.1 / CLASSES)
    label[[first, second]] += 0.9 * np.array([0.7, 0.3])
    return rng.normal(size=PIXELS), label


def local_step(parameters: Parameters, client: int, server_round: int) -> Parameters:
    """One step of gradient descent on the client's example, in float64, and back in float32."""
    pixels, label = private_example(client, server_round)
    hidden = 1 / (1 + np.exp(-(parameters["body.weight"] @ pixels + parameters["body.bias"])))
    powers = np.exp(parameters["fc.weight"] @ hidden + parameters["fc.bias"])
    error = powers / powers.sum() - label
    below = parameters["fc.weight"].T @ error * hidden * (1 - hidden)
    gradients = {
        "body.weight": np.outer(below, pixels),
        "body.bias": below,
        "fc.weight": np.outer(error, hidden),
        "fc.bias": error,
    }
    return {name: (value - RATE * gradients[name]).astype(np.float32) for name, value in parameters.items()}


def record(parameters: Parameters) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in parameters.items()})


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """What Flower calls on each client."""
    parameters = {name: array.numpy() for name, array in message.content["arrays"].items()}
    client = int(context.node_config["partition-id"])
    trained = local_step(parameters, client, int(message.content["config"]["server-round"]))
    metrics = MetricRecord({"num-examples": 1})
    return Message(content=RecordDict({"arrays": record(trained), "metrics": metrics}), reply_to=message)


def main() -> None:
    from flwr.simulation import run_simulation  # noqa: PLC0415

    from softinv_jax.frameworks.flower import AuditingStrategy  # noqa: PLC0415

    averaging = FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    strategy = AuditingStrategy(averaging, learning_rate=RATE)
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy.start(grid, record(initial_parameters()), num_rounds=ROUNDS)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0}}
    run_simulation(server_app, client_app, num_supernodes=CLIENTS, backend_config=resources)
    found = [(audit.server_round, audit.recovery) for audit in strategy.audits]
    print(json.dumps([(number, str(one.verdict_name), one.label.tolist()) for number, one in found]))


if __name__ == "__main__":
    main()
