"""One cell of a sweep: clients with one defence at one strength, the attack on what they send, and the score."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.audit.catalogue import DEFENCES, make_defence
from softinv_jax.audit.settings import AuditSettings
from softinv_jax.audit.system import KEYS, System
from softinv_jax.client.defences import apply_defences, global_norm
from softinv_jax.client.gradients import ApplyFunction, model_gradient
from softinv_jax.client.soft_labels import SoftLabelBatch, sample_batch
from softinv_jax.images.inversion import invert
from softinv_jax.images.verdicts import ImageVerdict
from softinv_jax.labels.verdicts import Recovery
from softinv_jax.measures.image_quality import peak_signal_to_noise_ratio
from softinv_jax.measures.label_error import feature_error, label_error
from softinv_jax.observation.head import Observation, observe, observe_head
from softinv_jax.recoveries import recover_many

__all__ = ["Cell", "Composition", "draw_examples", "median_gradient_norm", "run_cells"]

Composition = tuple[tuple[str, float], ...]
"""(defence, strength) in the order applied; the first is the one swept; () is no defence."""

Cell = dict[str, np.ndarray]
"""What was measured of N clients, by name; see `run_cells`."""

# Bytes of gradients held at once.
CHUNK_BYTES = 2**28


@dataclass(frozen=True)
class _Sent:
    """What N clients send: of the head, and, of the first few, everything.

    Attributes:
      observation: the observer's. whole: pytree of the first `images` gradients.
      cosine: (N,) between what is sent and the gradient. feature: (N, d) the truth, for the score only.
    """

    observation: Observation
    whole: Any
    cosine: np.ndarray
    feature: np.ndarray


def draw_examples(settings: AuditSettings, system: System, composition: Composition) -> SoftLabelBatch:
    """The clients' images and labels; the same draws for every strength of a defence of the label."""
    key = jax.random.fold_in(jax.random.key(settings.seed, impl=KEYS), 10)
    of_label = [(name, strength) for name, strength in composition if DEFENCES[name].make is None]
    name, strength = of_label[0] if of_label else ("", 0.0)
    pool = system.data.normalised()

    def draw(family: str, **ranges: Any) -> SoftLabelBatch:
        classes = system.data.number_of_classes
        return sample_batch(key, family, pool, system.data.classes, classes, settings.samples, **ranges)

    if name == "smoothing":
        return draw("smoothing", smoothing_range=(strength, strength))
    if name == "mixup":
        return draw("mixup", mixup_range=(strength, strength))
    if name == "distillation":
        hard, dense = draw("hard"), draw("dense")
        return SoftLabelBatch(hard.images, (1 - strength) * hard.labels + strength * dense.labels)
    return draw(name or settings.label_format)


def median_gradient_norm(system: System, examples: SoftLabelBatch) -> float:
    """The clipping norm that Abadi et al. (2016, section 5) suggest, and the unit of every noise here."""
    norms = _norms(system.apply_fn, system.parameters, examples.images, examples.labels)
    return float(np.median(np.asarray(norms)))


@partial(jax.jit, static_argnames="apply_fn")
def _norms(apply_fn: ApplyFunction, parameters: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    def norm(example: tuple[jax.Array, jax.Array]) -> jax.Array:
        return global_norm(model_gradient(apply_fn, parameters, *example))

    return jax.lax.map(norm, (images, labels))


def run_cells(settings: AuditSettings, system: System, compositions: Sequence[Composition], norm: float) -> list[Cell]:
    """Measure cells that differ in their strengths only: all their gradients are one vmapped computation.

    Args:
      compositions: the same names in each. norm: see `median_gradient_norm`.

    Returns:
      One cell for each composition: verdict (N,), label (N, C), true_label (N, C),
      label_error (N,) the largest of the entries, class_found (N,) the heaviest class is the true one,
      feature_error (N,) relative, cosine (N,); of the first `images` clients original and recovered images
      (I, H, W, channels) in [0, 1], image_tried (I,), image_verdict (I,) and psnr (I,). NaN where nothing is recovered.
    """
    examples = [draw_examples(settings, system, composition) for composition in compositions]
    sent = _send(settings, system, compositions, examples, norm)
    return [
        _attack(settings, system, composition, example, one)
        for composition, example, one in zip(compositions, examples, sent, strict=True)
    ]


def _send(
    settings: AuditSettings,
    system: System,
    compositions: Sequence[Composition],
    examples: Sequence[SoftLabelBatch],
    norm: float,
) -> list[_Sent]:
    names = tuple(name for name, _ in compositions[0])
    count = settings.samples
    strengths = np.array([[strength for _, strength in composition] for composition in compositions], np.float32)
    rows = [(cell, client) for cell in range(len(compositions)) for client in range(count)]
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(system.parameters))
    chunk = min(len(rows), max(1, CHUNK_BYTES // (3 * size)))
    images, labels = (np.stack([np.asarray(getattr(one, part)) for one in examples]) for part in ("images", "labels"))
    keys = jnp.stack([_key(settings.seed, composition) for composition in compositions])
    heads, cosines, features = [], [], []
    kept: list[list[Any]] = [[] for _ in compositions]
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        padded = part + [part[-1]] * (chunk - len(part))
        cell, client = (np.array(column, np.int32) for column in zip(*padded, strict=True))
        defended, cosine, feature = _defended(
            system.apply_fn,
            names,
            system.head,
            system.parameters,
            images[cell, client],
            labels[cell, client],
            strengths[cell],
            jax.vmap(jax.random.fold_in)(keys[cell], client),
            jnp.float32(norm),
        )
        seen = observe_head(system.parameters, defended, name=system.head)
        heads.append(_rows((seen.weight_gradient, seen.bias_gradient), slice(len(part))))
        cosines.append(np.asarray(cosine)[: len(part)])
        features.append(np.asarray(feature)[: len(part)])
        for place, (index, number) in enumerate(part):
            if number < settings.images:
                kept[index].append(_rows(defended, place))
    weight_gradient, bias_gradient = jax.tree.map(lambda *leaves: np.concatenate(leaves), *heads)
    cosine, feature = np.concatenate(cosines), np.concatenate(features)
    whole = observe_head(system.parameters, defended, name=system.head)
    result = []
    for index, images_sent in enumerate(kept):
        own = slice(index * count, (index + 1) * count)
        bias = None if bias_gradient is None else bias_gradient[own]
        observation = observe(np.asarray(whole.weight), weight_gradient[own], whole.bias, bias)
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *images_sent) if images_sent else None
        result.append(_Sent(observation, stacked, cosine[own], feature[own]))
    return result


def _rows(tree: Any, rows: slice | int) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf[rows]), tree)


def _key(seed: int, composition: Composition) -> jax.Array:
    """A key of the cell's own, so that a cell has the same noise whichever others are computed with it."""
    key = jax.random.key(seed, impl=KEYS)
    return jax.random.fold_in(key, zlib.crc32(repr(composition).encode()))


@partial(jax.jit, static_argnames=("apply_fn", "names", "head"))
def _defended(
    apply_fn: ApplyFunction,
    names: tuple[str, ...],
    head: str,
    parameters: Any,
    images: jax.Array,
    labels: jax.Array,
    strengths: jax.Array,
    keys: jax.Array,
    norm: jax.Array,
) -> tuple[Any, jax.Array, jax.Array]:
    """Defended gradients, their cosines with the undefended ones, and the true features; rows in, rows out."""

    def one(
        image: jax.Array, label: jax.Array, strength: jax.Array, key: jax.Array
    ) -> tuple[Any, jax.Array, jax.Array]:
        gradient = model_gradient(apply_fn, parameters, image, label)
        made = [make_defence(name, strength[place], norm, head) for place, name in enumerate(names)]
        defended = apply_defences(key, gradient, [defence for defence in made if defence is not None])
        product = sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(defended), strict=True))
        lengths = global_norm(gradient) * global_norm(defended)
        cosine = jnp.where(lengths > 0, product / jnp.where(lengths > 0, lengths, 1.0), 0.0)
        # dL/dW = (p - y) x^T: the feature is exact where p - y is the true one.
        weight_gradient = observe_head(parameters, gradient, name=head).weight_gradient
        error = jax.nn.softmax(apply_fn(parameters, image)) - label
        return defended, cosine, error @ weight_gradient / jnp.sum(error**2)

    return jax.vmap(one)(images, labels, strengths, keys)


def _attack(
    settings: AuditSettings, system: System, composition: Composition, examples: SoftLabelBatch, sent: _Sent
) -> Cell:
    unknown_scale = not settings.scale_known or any(DEFENCES[name].rescales for name, _ in composition)
    recovery = recover_many(sent.observation, unknown_scale=unknown_scale)
    true = np.asarray(examples.labels)
    candidates = np.asarray(recovery.candidates.label)[:, 0]
    given = np.all(np.isfinite(recovery.label), axis=1)
    label = np.where(given[:, None], recovery.label, np.nan)
    error = label_error(label, true).largest
    cell = {
        "verdict": np.asarray(recovery.verdict),
        "label": label,
        "true_label": true,
        "label_error": error,
        "class_found": _guess_class(np.where(given[:, None], label, candidates), sent) == np.argmax(true, axis=1),
        "feature_error": feature_error(recovery.feature, sent.feature),
        "cosine": sent.cosine,
    }
    return cell | _attack_images(settings, system, examples, sent, recovery)


def _guess_class(label: np.ndarray, sent: _Sent) -> np.ndarray:
    """(N,) heaviest class of the label, or, where there is none, the row of the gradient with the smallest sum.

    With non-negative features only the rows of classes in the label can be negative (Zhao, Mopuri and Bilen 2020).
    """
    row_sums = np.asarray(sent.observation.weight_gradient, np.float64).sum(axis=2)
    recovered = np.all(np.isfinite(label), axis=1)
    return np.where(recovered, np.argmax(np.nan_to_num(label), axis=1), np.argmin(row_sums, axis=1))


def _attack_images(
    settings: AuditSettings, system: System, examples: SoftLabelBatch, sent: _Sent, recovery: Recovery
) -> Cell:
    count = settings.images if system.chain is not None else 0
    original = np.clip(np.asarray(system.data.denormalise(examples.images[: settings.images])), 0, 1)
    recovered = np.full_like(original, np.nan)
    verdict = np.full(len(original), ImageVerdict.NOT_FOUND, np.int32)
    quality = np.full(len(original), np.nan)
    if count:
        assert system.chain is not None
        heads = jax.tree.map(lambda leaf: np.asarray(leaf)[:count], recovery)
        parameters = jax.tree.map(np.asarray, dict(system.parameters))
        result = invert(system.chain, parameters, sent.whole, original.shape[1:], heads=heads)
        verdict = result.verdict[:, 0]
        recovered = np.asarray(system.data.denormalise(result.images[:, 0]))
        finite = np.isfinite(recovered).all(axis=(1, 2, 3))
        if finite.any():
            quality[finite] = peak_signal_to_noise_ratio(recovered[finite], original[finite])
    tried = np.full(len(original), count > 0)
    return {
        "original": original,
        "recovered": recovered,
        "image_tried": tried,
        "image_verdict": verdict,
        "psnr": quality,
    }
