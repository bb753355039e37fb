"""From a model's parameters and the gradients clients sent to their images, each with a verdict."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.batches.batch_recovery import BatchRecovery
from softinv_jax.images.dense_batches import DenseImages, dense_end, invert_dense
from softinv_jax.images.determinacy import count_equations, determined_together
from softinv_jax.images.groups import group_size, invert_groups
from softinv_jax.images.joint import JointInversion, from_head, invert_jointly, judge_joint, largest_noise_share
from softinv_jax.images.layer_chain import Chain, Convolution, Dense, can_be_undone, layer_parameters
from softinv_jax.images.matching import match_gradients
from softinv_jax.images.objective import ApplyFunction, MatchingSettings, Model
from softinv_jax.images.verdicts import ImageRecovery, ImageVerdict, judge_image
from softinv_jax.labels.scalar_equation import TOLERANCE
from softinv_jax.labels.verdicts import Recovery, Verdict
from softinv_jax.observation.head import Observation, check_finite, observe, observe_head
from softinv_jax.recoveries import recover_many

__all__ = ["invert", "match"]


def invert(
    chain: Chain,
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    image_shape: tuple[int, int, int],
    *,
    batch_size: int | Literal["auto"] = 1,
    unknown_scale: bool = False,
    heads: Recovery | None = None,
    noise: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageRecovery:
    """Recover labels and images, layer by layer, from the head or from whichever dense layer tells the examples apart.

    The label format is not told. `determinacy.count_equations` says beforehand whether the images are determined.
    Batches of a chain with several dense layers are told apart by those before the head, also where there are fewer
    classes than examples; else by the head. Where one layer has too few equations, or an activation cannot be undone,
    and all of them together have enough, the images are solved for as a whole (`joint`).

    Args:
      chain: the network, see `layer_chain`; also for other networks than the two there.
      parameters: by layer, `kernel` and `bias` as flax linen names and shapes them.
      gradients: the same names, each array with a leading axis of N gradients; float32 or float64.
      image_shape: (H, W, channels).
      batch_size: B examples behind each gradient, which is their mean; `auto`, for several dense layers: as many as the
        gradient's rank shows.
      unknown_scale: the gradients carry an unknown factor (learning rate, sign).
      heads: what `recover_many` made of the heads of the N gradients, if that has been done, for batch_size 1 only.
      noise: the gradients' tree, (N,) root mean square of each array's error beyond rounding, where that is known: for
        gradients made of parameters, which were rounded. None where there is none.
      progress: called with (gradients done, N).

    Returns:
      An `ImageRecovery`.

    Raises:
      ValueError: naming the layer or option, where chain, parameters, gradients and image_shape do not fit each other,
        or a gradient is not finite.
    """
    end = dense_end(chain)
    if batch_size != "auto" and batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer or 'auto', not {batch_size}")
    if batch_size == "auto" and end is None:
        raise ValueError("batch_size='auto' needs a chain with a dense layer before the head; give the number")
    counts = count_equations(chain, parameters, image_shape, 1 if batch_size == "auto" else batch_size)
    total = _check_gradients(chain, parameters, gradients)
    names = tuple(count.layer for count in counts)
    told = _Told(chain, parameters, gradients, image_shape, unknown_scale, names, noise)
    report = progress or (lambda done, total: None)
    if end is not None and batch_size != 1:
        found = _invert_batches(told, batch_size, total, report)
        if batch_size == "auto" or np.all(found.verdict == ImageVerdict.EXACT) or not _head_can(told, batch_size):
            return found
        other = _invert_by_heads(told, int(batch_size), None, total, report)
        return _better(found, other, int(batch_size))
    single = _invert_by_heads(told, int(batch_size), heads, total, report)
    left = np.flatnonzero(np.any(single.label_verdict < Verdict.AMBIGUOUS, axis=1))
    return single if end is None or batch_size != 1 or not left.size else _with_dense(told, single, left)


def _with_dense(told: "_Told", single: ImageRecovery, rows: np.ndarray) -> ImageRecovery:
    """Single examples that the head leaves open, by the layer before it: its bias fixes the length of the feature."""
    own, noise = jax.tree.map(lambda leaf: leaf[rows], (dict(told.gradients), told.noise))
    other = _invert_batches(told._replace(gradients=own, noise=noise), 1, len(rows), lambda done, total: None)
    better = np.flatnonzero(np.all(other.label_verdict >= Verdict.AMBIGUOUS, axis=1))
    arrays = {name: np.array(value) for name, value in vars(single).items() if name != "layers"}
    for name, array in arrays.items():
        array[rows[better]] = getattr(other, name)[better]
    return ImageRecovery(**arrays, layers=single.layers)


def _better(first: ImageRecovery, second: ImageRecovery, examples: int) -> ImageRecovery:
    """Of each gradient the recovery that claims more; the first where they claim as much."""
    arrays = {name: np.array(value) for name, value in vars(first).items() if name != "layers"}
    if first.verdict.shape[1] != examples:
        return first  # Other examples than were told.
    for index in range(len(first.verdict)):
        if np.sum(second.verdict[index]) > np.sum(first.verdict[index]):
            for name, array in arrays.items():
                array[index] = getattr(second, name)[index]
    return ImageRecovery(**arrays, layers=first.layers)


class _Told(NamedTuple):
    """What `invert` was told."""

    chain: Chain
    parameters: Mapping[str, Any]
    gradients: Mapping[str, Any]
    image_shape: tuple[int, int, int]
    unknown_scale: bool
    layers: tuple[str, ...]
    noise: Mapping[str, Any] | None

    def one(self, index: int) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
        """One of the gradients, and its noise."""
        gradient = jax.tree.map(lambda leaf: np.asarray(leaf[index]), dict(self.gradients))
        if self.noise is None:
            return gradient, None
        return gradient, jax.tree.map(lambda leaf: float(leaf[index]), dict(self.noise))


def _head_can(told: _Told, batch_size: int) -> bool:
    """Whether the head alone could tell so many apart."""
    kernel = layer_parameters(told.parameters, _kernel_layers(told.chain)[-1])["kernel"]
    return bool(batch_size < kernel.shape[1] and batch_size <= kernel.shape[0])


def _invert_batches(
    told: _Told, batch_size: int | Literal["auto"], total: int, report: Callable[[int, int], None]
) -> ImageRecovery:
    """Each gradient's examples by its dense layers; rows of NaN where one gradient shows fewer than another."""
    found = []
    for index in range(total):
        own, noise = told.one(index)
        found.append(
            invert_dense(
                told.chain,
                told.parameters,
                own,
                told.image_shape,
                batch_size,
                unknown_scale=told.unknown_scale,
                noise=noise,
            )
        )
        report(index + 1, total)
    roundoff = float(np.finfo(_dtype(told.gradients, told.chain)).eps)
    examples = max(len(one.images) for one in found)

    def stacked(arrays: list[np.ndarray], nothing: float = np.nan) -> np.ndarray:
        rows = np.full((total, examples, *arrays[0].shape[1:]), nothing, arrays[0].dtype)
        for row, array in zip(rows, arrays, strict=True):
            row[: len(array)] = array
        return rows

    verdict = np.full((total, examples), ImageVerdict.NOT_FOUND, np.int32)
    condition, misfit = (np.full((total, len(told.layers)), np.nan) for _ in range(2))
    for index, one in enumerate(found):
        counts = count_equations(told.chain, told.parameters, told.image_shape, len(one.images))
        undone = len(one.condition)
        determined = all(count.determined for count in counts[len(counts) - undone :])
        for row in np.flatnonzero(np.all(np.isfinite(one.recovery.inputs), axis=1)).tolist():
            verdict[index, row] = _judge_dense(determined, one, row, roundoff)
        condition[index, len(counts) - undone :], misfit[index, len(counts) - undone :] = one.condition, one.misfit
        if one.joint is not None:
            misfit[index] = one.joint.misfit
    return ImageRecovery(
        images=stacked([one.images for one in found]),
        labels=stacked([one.recovery.label for one in found]),
        features=stacked([one.recovery.feature for one in found]),
        label_verdict=stacked([one.recovery.verdict for one in found], Verdict.NOT_FOUND),
        verdict=verdict,
        residual=np.array([one.residual for one in found]),
        expected_error=stacked([one.deviation for one in found]),
        condition=condition,
        misfit=misfit,
        layers=told.layers,
    )


def _judge_dense(determined: bool, found: DenseImages, row: int, roundoff: float) -> ImageVerdict:
    image, error = found.images[row], float(found.deviation[row])
    scale_unknown = found.recovery.verdict[row] == Verdict.UNIDENTIFIABLE
    if not determined or scale_unknown or not np.all(np.isfinite(image)):
        return ImageVerdict.UNDETERMINED
    if found.joint is not None:
        return judge_joint(found.joint, error, image, roundoff)
    if np.isnan(found.residual):
        # Its own rows of the gradient hold it; that the rest of the gradient agrees could not be seen.
        return ImageVerdict.APPROXIMATE
    # Noise on the gradient is no contradiction.
    distance = 0.0 if found.residual <= found.tolerated else found.residual
    return judge_image(determined, distance, error, image, roundoff)


def _invert_by_heads(
    told: _Told, batch_size: int, heads: Recovery | None, total: int, report: Callable[[int, int], None]
) -> ImageRecovery:
    chain, parameters, gradients, image_shape, unknown_scale, names, _ = told
    counts = count_equations(chain, parameters, image_shape, batch_size)
    if heads is None:
        labels, features, label_verdict = _recover_heads(_head(chain, parameters, gradients), batch_size, unknown_scale)
    else:
        labels, features, label_verdict = _single(heads)
        if batch_size > 1 or len(labels) != total:
            raise ValueError(f"heads hold {len(labels)} recoveries of single examples for {total} gradients")
    complete = np.all(label_verdict >= Verdict.AMBIGUOUS, axis=1)
    images = np.full((total, batch_size, *image_shape), np.nan, np.float32)
    verdict = np.full((total, batch_size), ImageVerdict.NOT_FOUND, np.int32)
    residual, expected = np.full(total, np.nan), np.full((total, batch_size), np.nan)
    condition, misfit = np.full((total, len(names)), np.nan), np.full((total, len(names)), np.nan)
    determined = all(count.determined for count in counts)
    roundoff = float(np.finfo(_dtype(gradients, chain)).eps)
    platform = _platform(gradients)
    size = group_size(chain, parameters, image_shape, batch_size, platform)
    together = not (determined and can_be_undone(chain)) and determined_together(
        chain, parameters, image_shape, batch_size, len(chain) - 1
    )
    share, tolerated = _noise_shares(told, roundoff / 2)
    singly = not together and can_be_undone(chain)
    if not (together or singly):
        verdict[complete] = ImageVerdict.UNDETERMINED
    groups = invert_groups(
        chain,
        parameters,
        gradients,
        features,
        np.flatnonzero(complete).tolist() if singly else [],
        image_shape,
        unit_roundoff=share,
        size=size,
        together=platform != "cpu",
    )
    done = 0
    for rows, found in groups:
        images[rows], residual[rows] = found.images, found.residual
        condition[rows], misfit[rows] = found.condition, found.misfit
        # Where the equations fit worse than their deviations say, these are too small.
        expected[rows] = np.maximum(np.max(found.misfit, axis=1, initial=1.0), 1.0)[:, None] * found.deviation
        for index in rows:
            distance = 0.0 if residual[index] <= tolerated[index] else residual[index]
            verdict[index] = [
                judge_image(determined, distance, error, image, roundoff)
                for error, image in zip(expected[index], images[index], strict=True)
            ]
        done += len(rows)
        report(done, total)
    for index in np.flatnonzero(complete).tolist():
        # Of a single one that its layers give nearly exactly, more would cost a thousand times as much as they did.
        nearly = batch_size > 1 and np.min(verdict[index]) == ImageVerdict.APPROXIMATE
        if together or nearly:
            joint, judged = _jointly(told, index, features[index], images[index] if nearly else None, roundoff)
            if np.sum(judged) >= np.sum(verdict[index]):
                images[index], expected[index], verdict[index] = joint.images, joint.error, judged
                misfit[index], residual[index] = joint.misfit, joint.residual
            report(index + 1, total)
    report(total, total)
    return ImageRecovery(images, labels, features, label_verdict, verdict, residual, expected, condition, misfit, names)


def _noise_shares(told: _Told, unit_roundoff: float) -> tuple[float, np.ndarray]:
    """Of all gradients the largest share of noise, see `joint`; and (N,) what residual it explains."""
    total = len(jax.tree.leaves(told.gradients)[0])
    if told.noise is None:
        return unit_roundoff, np.zeros(total)
    shares, tolerated = np.empty(total), np.empty(total)
    for index in range(total):
        gradient, noise = told.one(index)
        assert noise is not None
        shares[index] = largest_noise_share(gradient, noise, unit_roundoff)
        explained = jax.tree.map(
            lambda leaf, error: TOLERANCE * error * np.sqrt(leaf.size) / max(np.linalg.norm(leaf), 1e-300),
            gradient,
            noise,
        )
        tolerated[index] = max(jax.tree.leaves(explained))
    # Rounded up: one program serves many updates.
    return float(2.0 ** np.ceil(np.log2(shares.max()))), tolerated


def _jointly(
    told: _Told, index: int, features: np.ndarray, start: np.ndarray | None, roundoff: float
) -> tuple[JointInversion, list[ImageVerdict]]:
    """One gradient's images from all layers together, and the verdicts on them."""
    own, noise = told.one(index)
    joint = invert_jointly(from_head(told.chain, told.parameters, own, features, told.image_shape, noise), start)
    examples = zip(joint.error, joint.images, strict=True)
    return joint, [judge_joint(joint, float(error), image, roundoff) for error, image in examples]


def _kernel_layers(chain: Chain) -> list[str]:
    return [layer.name for layer in chain if isinstance(layer, Convolution | Dense)]


def _dtype(gradients: Mapping[str, Any], chain: Chain) -> np.dtype:
    return np.dtype(layer_parameters(gradients, _kernel_layers(chain)[-1])["kernel"].dtype)


def _platform(gradients: Mapping[str, Any]) -> str:
    """Of the device that the gradients are on, or will be."""
    for leaf in jax.tree.leaves(gradients):
        if isinstance(leaf, jax.Array):
            return str(next(iter(leaf.devices())).platform)
    return jax.default_backend()


def _check_gradients(chain: Chain, parameters: Mapping[str, Any], gradients: Mapping[str, Any]) -> int:
    """The number of gradients, N."""
    total = 0
    for name in _kernel_layers(chain):
        held = layer_parameters(parameters, name)
        for part, array in held.items():
            check_finite(f"parameters {name}/{part}", array)
        try:
            given = layer_parameters(gradients, name)
        except ValueError as error:
            raise ValueError(f"gradients: {error}") from error
        for part, array in given.items():
            expected = tuple(held[part].shape) if part in held else None
            shape = tuple(array.shape)
            if expected is None:
                raise ValueError(f"gradients have {name}/{part}, but the parameters do not; leave it out")
            if shape[1:] != expected or not shape or shape[0] < 1:
                raise ValueError(
                    f"gradients of {name}/{part} have shape {shape}, but (N, *{expected}) is needed, as the parameters'"
                )
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise ValueError(f"gradients of {name}/{part} must be floating, not {array.dtype}")
            total = total or shape[0]
            if shape[0] != total:
                raise ValueError(
                    f"gradients of {name}/{part} are {shape[0]}, but others are {total}; give one an example"
                )
            check_finite(f"gradients of {name}/{part}", array)
    return total


def _head(chain: Chain, parameters: Mapping[str, Any], gradients: Mapping[str, Any]) -> Observation:
    name = _kernel_layers(chain)[-1]
    held, given = layer_parameters(parameters, name), layer_parameters(gradients, name)
    gradient = given["kernel"]
    rows: jax.Array | np.ndarray
    if isinstance(gradient, jax.Array):  # Which stays on its device.
        with jax.enable_x64(True):
            rows = jnp.swapaxes(gradient, 1, 2)
    else:
        rows = np.ascontiguousarray(np.swapaxes(np.asarray(gradient), 1, 2))
    return observe(np.asarray(held["kernel"]).T, rows, held.get("bias"), given.get("bias"))


def _recover_heads(
    observation: Observation, batch_size: int, unknown_scale: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (N, B, C), features (N, B, d) and verdicts (N, B) from the head's gradients."""
    if batch_size == 1:
        return _single(recover_many(observation, unknown_scale=unknown_scale))
    classes, features = observation.weight.shape
    if batch_size >= min(classes, features + 1):
        raise ValueError(
            f"batch_size = {batch_size}, but only batches smaller than the number of classes, C = {classes}, and not"
            f" larger than the number of features, d = {features}, can be separated into images"
        )
    recoveries = recover_many(observation, batch_size=batch_size, unknown_scale=unknown_scale)
    kind = recoveries[0].label.dtype
    label = np.full((len(recoveries), batch_size, classes), np.nan, kind)
    feature = np.full((len(recoveries), batch_size, features), np.nan, kind)
    verdict = np.full((len(recoveries), batch_size), Verdict.NOT_FOUND, np.int32)
    for index, one in enumerate(recoveries):
        assert isinstance(one, BatchRecovery)
        # Fewer examples, or more, than were told: those there is room for.
        found = min(len(one.verdict), batch_size)
        label[index, :found], feature[index, :found] = one.label[:found], one.feature[:found]
        verdict[index, :found] = one.verdict[:found]
    return label, feature, verdict


def _single(result: Recovery) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    arrays = (result.label, result.feature, result.verdict)
    label, feature, verdict = (np.asarray(array)[:, None] for array in arrays)
    return label, feature, verdict


def match(
    apply_fn: Model,
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    image_shape: tuple[int, int, int],
    *,
    batch_size: int = 1,
    known: ImageRecovery | None = None,
    features_fn: ApplyFunction | None = None,
    settings: MatchingSettings | None = None,
    restarts: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ImageRecovery:
    """Recover labels from the head, and match the gradient with them: for networks that are no chain of layers.

    Args:
      apply_fn: (parameters, image (H, W, channels)) -> logits (C,), or a `WholeBatch`.
      parameters, gradients, image_shape, batch_size, progress: as in `invert`; the head is found by shape and name.
      known: labels, features and their verdicts, if they have been recovered; its images are not used.
      features_fn: as of `matching.match_gradients`; the features are matched too, by method `gf` of the settings.
      settings, restarts: see `matching.match_gradients`.
      seed: of the noise the restarts begin with.

    Returns:
      An `ImageRecovery`; the expected error of a matched image is not known: NaN.

    Raises:
      ValueError: as `invert`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, not {batch_size}")
    if known is None:
        labels, features, label_verdict = _recover_heads(observe_head(parameters, gradients), batch_size, False)
    else:
        labels, features, label_verdict = known.labels, known.features, known.label_verdict
        batch_size = labels.shape[1]
    total = len(labels)
    images = np.full((total, batch_size, *image_shape), np.nan, np.float32)
    verdict = np.full((total, batch_size), ImageVerdict.NOT_FOUND, np.int32)
    residual = np.full(total, np.nan)
    chosen = np.flatnonzero(np.all(label_verdict >= Verdict.AMBIGUOUS, axis=1))
    if chosen.size:
        found = match_gradients(
            apply_fn,
            parameters,
            jax.tree.map(lambda leaf: leaf[chosen], gradients),
            image_shape if batch_size == 1 else (batch_size, *image_shape),
            jax.random.key(seed),
            labels=labels[chosen, 0] if batch_size == 1 else labels[chosen],
            features=None if features_fn is None else features[chosen, 0] if batch_size == 1 else features[chosen],
            features_fn=features_fn,
            settings=settings,
            restarts=restarts,
            progress=progress,
        )
        images[chosen] = np.asarray(found.image).reshape(chosen.size, batch_size, *image_shape)
        residual[chosen] = np.asarray(found.gradient_residual)
        agrees = residual[chosen] <= np.sqrt(np.finfo(labels.dtype).eps)
        outcome = np.where(agrees, ImageVerdict.APPROXIMATE, ImageVerdict.INCONSISTENT)
        verdict[chosen] = outcome[:, None]
    unknown = np.full((total, batch_size), np.nan)
    empty = np.empty((total, 0))
    return ImageRecovery(images, labels, features, label_verdict, verdict, residual, unknown, empty, empty, ())
