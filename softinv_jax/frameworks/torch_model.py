"""Any PyTorch module, for an observer: as a chain of layers where it is one, else as a function of JAX arrays.

Needs torch, and for what is no chain torchax: pip install 'softinv_jax[torch-models]'.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.frameworks.npz_file import first_line
from softinv_jax.frameworks.parameter_files import Tree, flat, nested
from softinv_jax.frameworks.torch_chain import NotAChainError, read_chain
from softinv_jax.frameworks.torch_layout import linen_from_torch_chain
from softinv_jax.images.dense_batches import dense_end
from softinv_jax.images.layer_chain import Chain
from softinv_jax.images.objective import Model, WholeBatch, mean_loss_gradient
from softinv_jax.inversions import Inversion, Network, invert_observed
from softinv_jax.observation.updates import ObservedUpdate, observe_update

try:
    import torch
except ImportError as error:
    raise ImportError("needs torch; pip install 'softinv_jax[torch-models]'") from error

__all__ = ["TorchModel", "to_numpy", "torch_model"]

# In float64 torch and JAX differ by far less; single precision somewhere inside is no fault.
AGREEMENT = math.sqrt(np.finfo(np.float32).eps)
PROBES = 2


class TorchModel:
    """A module, for an observer; made by `torch_model`.

    Attributes:
      image_shape: (H, W, channels).
      chain: the module as a chain of layers, or None. not_a_chain: why it is none; empty where it is one.
      parameters: what is trained, float arrays by the module's own names: {"conv1": {"weight": (out, in, h, w), ...}}.
    """

    def __init__(self, module: "torch.nn.Module", probe: "_Probe") -> None:
        self.image_shape = probe.image_shape
        self._module, self._probe = module, probe
        self._trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.parameters = nested({name: to_numpy(value) for name, value in self._trained.items()}, ".")
        self.chain: Chain | None = None
        self.not_a_chain = ""
        try:
            self.chain = read_chain(module, self.image_shape)
        except NotAChainError as error:
            self.not_a_chain = str(error)

    @property
    def dense_activation(self) -> str:
        """Between the dense layers at the end of a chain, for `recover_update`; `auto` where it is not one."""
        end = None if self.chain is None else dense_end(self.chain)
        functions = set(end[1]) if end is not None else set()
        return functions.pop() if len(functions) == 1 else "auto"

    @cached_property
    def apply_fn(self) -> Model:
        """(parameters, image (H, W, channels)) -> logits (C,), a `WholeBatch` where examples act on each other.

        By torchax; buffers are those of the module. One function object, so that what is compiled for it compiles once.

        Raises:
          ValueError: for an operation that torchax does not have (named), or one that it computes otherwise than torch.
          ImportError: without torchax.
        """
        from softinv_jax.frameworks.torch_bridge import bridge  # noqa: PLC0415 - chains need no torchax

        # Also where it is first asked for inside a function that is being compiled.
        with jax.ensure_compile_time_eval():
            function = bridge(self._module, self._trained, self._probe.seed)
            together = self._probe.examples_act_on_each_other()
            apply_fn = WholeBatch(function) if together else partial(_of_one, function)
            self._probe.compare(apply_fn, self.parameters, lambda gradients: flat(gradients, "."))
        return apply_fn

    @cached_property
    def network(self) -> Network:
        """For `inversions.invert_observed`: the chain, or else the function.

        Raises:
          ValueError: where what is computed is not what torch computes; see `apply_fn`.
        """
        if self.chain is None:
            return Network(self.image_shape, None, self.apply_fn)
        network = Network(self.image_shape, self.chain)

        def in_layers(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return flat(self.tree(arrays))

        self._probe.compare(network.apply_fn, self.network_parameters, flat, in_layers)
        return network

    @property
    def network_parameters(self) -> Tree:
        """What the module holds, as `network` takes it."""
        return self.tree({name: to_numpy(value) for name, value in self._trained.items()})

    def tree(self, arrays: Mapping[str, np.ndarray]) -> Tree:
        """A `state_dict`, gradients or updates named like one, as `network` takes them; only what is trained.

        Raises:
          ValueError: naming an array that is missing, or of another shape than the module's.
        """
        trained = {}
        for name, value in self._trained.items():
            if name not in arrays:
                held = ", ".join(list(arrays)[:6]) or "nothing"
                raise ValueError(f"{name} of the module is not among the arrays, which are {held}, ...")
            trained[name] = np.asarray(arrays[name])
            if trained[name].shape != tuple(value.shape):
                raise ValueError(
                    f"{name} has shape {trained[name].shape}, but {tuple(value.shape)} in the module; is it the same"
                    " model?"
                )
        if self.chain is None:
            return nested(trained, ".")
        return linen_from_torch_chain(trained, self.chain, self.image_shape)

    def observe(
        self, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], **training: Any
    ) -> ObservedUpdate:
        """What a client's update says; see `observe_update` for the options and errors."""
        return observe_update(self.tree(before), self.tree(after), **training)

    def invert(self, updates: Sequence[ObservedUpdate], **options: Any) -> Inversion:
        """Labels and images behind updates from `observe`; see `inversions.invert_observed` for options and errors."""
        return invert_observed(self.network, updates, **options)


def torch_model(
    module: "torch.nn.Module", image_shape: tuple[int, int, int], *, dropout_seed: int | None = None
) -> TorchModel:
    """Take a module as it is: its mode (training or evaluation), its buffers, what of it is trained.

    What is computed in JAX is compared with torch's gradient of random images before it is used, in float64.

    Args:
      module: takes images (N, channels, H, W) and returns logits (N, C). In training mode batch normalisation uses the
        batch's own statistics, as clients do.
      image_shape: (H, W, channels).
      dropout_seed: given to torch.manual_seed just before the client's step, where dropout is on.

    Raises:
      ValueError: if the module cannot take such images, gives no logits, or is random and no seed was told.
    """
    if not any(value.requires_grad for value in module.parameters()):
        raise ValueError("nothing of the module is trained: no parameter has requires_grad")
    module = copy.deepcopy(module).to("cpu")
    return TorchModel(module, _Probe(module, image_shape, dropout_seed))


def _of_one(function: Callable[[Any, jax.Array], jax.Array], parameters: Any, image: jax.Array) -> jax.Array:
    return function(parameters, image[None])[0]


def to_numpy(tensor: "torch.Tensor") -> np.ndarray:
    """Of a parameter; bfloat16 as float32."""
    return tensor.detach().float().numpy() if tensor.dtype == torch.bfloat16 else tensor.detach().numpy()


class _Probe:
    """Random images through the module in torch."""

    def __init__(self, module: "torch.nn.Module", image_shape: tuple[int, int, int], seed: int | None) -> None:
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape must be (H, W, channels), not {image_shape}")
        height, width, channels = image_shape
        self.image_shape, self.seed = (height, width, channels), seed
        self._module = module
        rng = np.random.default_rng(0)
        self._images = rng.normal(size=(PROBES, *image_shape)).astype(np.float32)
        self._logits = self._run(module, self._images, 0 if seed is None else seed)
        shape = tuple(self._logits.shape)
        if len(shape) != 2 or shape[0] != PROBES:
            raise ValueError(f"the module must give logits (N, C) for N = {PROBES} images, but gives {shape}")
        self._label = np.eye(shape[1], dtype=np.float32)[rng.integers(shape[1], size=PROBES)]
        if seed is None and not torch.equal(self._logits, self._run(module, self._images, 1)):
            raise ValueError(
                "the module is random: dropout in training mode, or the like; tell dropout_seed, or take it in"
                " evaluation mode, module.eval(), if clients trained so"
            )

    def _run(self, module: "torch.nn.Module", images: np.ndarray, seed: int) -> "torch.Tensor":
        kind = next(module.parameters()).dtype
        given = torch.from_numpy(np.moveaxis(images, -1, 1).copy()).to(kind)
        # A copy: in training mode batch normalisation moves its running statistics.
        own = copy.deepcopy(module)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            try:
                found = own(given)
            except Exception as error:
                raise ValueError(f"the module cannot take images {tuple(given.shape)}: {first_line(error)}") from error
        if not isinstance(found, torch.Tensor):
            raise ValueError(
                f"the module must give logits (N, C), not a {type(found).__name__}; wrap it in one that does"
            )
        return found

    def examples_act_on_each_other(self) -> bool:
        """Whether a batch's logits are other than those of its images one by one."""
        if self.seed is not None:
            return True
        try:
            single = torch.cat([self._run(self._module, image[None], 0) for image in self._images])
        except ValueError:  # Batch normalisation refuses to take one value a channel for a batch.
            return True
        return not torch.allclose(single, self._logits, rtol=0, atol=AGREEMENT * float(self._logits.abs().max()))

    def compare(
        self,
        apply_fn: Model,
        parameters: Tree,
        names: Callable[[Tree], dict[str, np.ndarray]],
        layout: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = dict,
    ) -> None:
        """Raise ValueError unless the gradient of the mean cross-entropy is torch's.

        names: of the gradient's arrays. layout: makes arrays by the same names of the module's own.
        """
        wide = True
        try:
            own = self._gradients(copy.deepcopy(self._module).double(), torch.float64)
        except RuntimeError:  # Something inside is float32, whatever the parameters are.
            wide, own = False, self._gradients(self._module, torch.float32)
        expected = layout(own)
        with jax.enable_x64(wide):
            kind = jnp.float64 if wide else jnp.float32
            held = jax.tree.map(lambda leaf: jnp.asarray(leaf, kind), parameters)
            given = jnp.asarray(self._images, kind), jnp.asarray(self._label, kind)
            try:
                found = jax.jit(lambda held: mean_loss_gradient(apply_fn, held, *given))(held)
            except Exception as error:
                raise ValueError(f"this module cannot be computed in JAX: {first_line(error)}") from error
            gradients = {name: np.asarray(value) for name, value in names(found).items()}
        total = math.sqrt(sum(float(np.sum(value**2)) for value in expected.values()))
        for name, value in expected.items():
            differ = float(np.linalg.norm(gradients[name] - value))
            # Some gradients are zero but for rounding, as of a bias before batch normalisation.
            if not differ <= AGREEMENT * float(np.linalg.norm(value)) + AGREEMENT**2 * total:
                raise ValueError(
                    f"the gradient of {name} is not torch's: it differs by {differ:.2g} of {np.linalg.norm(value):.2g};"
                    " an operation of this module is computed otherwise there, or its forward is random"
                )

    def _gradients(self, module: "torch.nn.Module", kind: "torch.dtype") -> dict[str, np.ndarray]:
        module = copy.deepcopy(module)
        images = torch.from_numpy(np.moveaxis(self._images, -1, 1).copy()).to(kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0 if self.seed is None else self.seed)
            logits = module(images)
        loss = -(torch.from_numpy(self._label) * torch.log_softmax(logits, 1)).sum(1).mean()
        trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        zeros = (torch.zeros_like(value) for value in trained.values())
        kept = (zero if one is None else one for one, zero in zip(found, zeros, strict=True))
        return {name: value.numpy() for name, value in zip(trained, kept, strict=True)}
