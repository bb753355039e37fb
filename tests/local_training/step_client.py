"""A small chain, crops of a photograph, and clients that train on them for several steps, written with optax."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from skimage import data

from softinv_jax.images.layer_chain import Activation, Chain, Convolution, Dense, Flatten, apply_chain

SHAPE, CLASSES = (8, 8, 2), 5


def chain_of(activation: str) -> Chain:
    return (
        Convolution("conv1", (2, 2), ((1, 1), (1, 1))),
        Activation(activation),
        Convolution("conv2", (1, 1), ((1, 1), (1, 1))),
        Activation(activation),
        Flatten(),
        Dense("head"),
    )


CHAIN = chain_of("sigmoid")


@dataclass(frozen=True)
class Client:
    """A client's model and its example, or examples; float32."""

    parameters: Any
    image: np.ndarray
    label: np.ndarray
    chain: Chain = CHAIN

    def train(self, steps: int, rate: float, transform: optax.GradientTransformation | None = None) -> Any:
        """The parameters it sends back."""
        optimiser = transform or optax.sgd(rate)

        def loss(held: Any) -> jax.Array:
            logits = apply_chain(self.chain, held, self.image)
            return -jnp.mean(jnp.sum(self.label * jax.nn.log_softmax(logits), axis=-1))

        def step(state: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
            held, memory = state
            change, memory = optimiser.update(jax.grad(loss)(held), memory, held)
            return (optax.apply_updates(held, change), memory), None

        start = jax.tree.map(jnp.asarray, self.parameters)
        (end, _), _ = jax.jit(lambda: jax.lax.scan(step, (start, optimiser.init(start)), None, length=steps))()
        return jax.device_get(end)


def make_client(label: list[float], head_bias: bool = False) -> Client:
    rng = np.random.default_rng(1)

    def draw(*shape: int, reach: float = 0.5) -> np.ndarray:
        return rng.uniform(-reach, reach, shape).astype(np.float32)

    parameters: dict[str, Any] = {
        "conv1": {"kernel": draw(3, 3, 2, 12), "bias": draw(12)},
        "conv2": {"kernel": draw(3, 3, 12, 12), "bias": draw(12)},
        "head": {"kernel": draw(4 * 4 * 12, CLASSES)},
    }
    if head_bias:
        parameters["head"]["bias"] = draw(CLASSES)
    crop = data.astronaut()[60:140:10, 200:280:10, :2] / 255.0
    image = ((crop - crop.mean()) / crop.std()).astype(np.float32)
    return Client(parameters, image, np.array(label, np.float32))
