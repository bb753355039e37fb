"""More gradients than memory holds: recovered part by part into a folder, which a later run takes up again.

Each part is read, recovered and written by itself, so that a run that is killed loses the part it was at. Several
processes (`jax.distributed`) that share the folder take turns with the parts; every process shares each of its parts
out among its own devices. Examples know nothing of each other: how they are divided changes roundings at most.
"""

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from softinv_jax.atomic_file import write_atomically
from softinv_jax.labels.many import recover_many
from softinv_jax.labels.verdicts import Recovery
from softinv_jax.observation.head import Observation, observe

__all__ = ["read_recovery", "recover_stream"]

PART_BYTES = 256 * 2**20
FINGERPRINTS = 64
SETTINGS = "settings.json"


def recover_stream(
    weight: ArrayLike,
    weight_gradient: Any,
    folder: str | os.PathLike[str],
    *,
    bias: ArrayLike | None = None,
    bias_gradient: Any = None,
    chunk: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> None:
    """Recover N gradients into `folder`, leaving out the parts that are there already.

    With several processes each does every so-many-th part (`jax.process_index()`), on all of its own devices.

    Args:
      weight: (C, d). bias: (C,), or None for a head without.
      weight_gradient: (N, C, d), whatever has a shape, a dtype and slices: an array, `np.load(path, mmap_mode='r')`.
        bias_gradient: (N, C) alike, where there is a bias.
      folder: made if it does not exist; holds `settings.json` and one file for each finished part.
      chunk: gradients in one part, of which one or two are in memory; by default 256 MiB.
      progress: called with (gradients done, N), counting those of all processes found in the folder.
      options: `method`, `unknown_scale`, `label_format`, `loss`, `approximate`, `thorough` and `devices` of
        `recover_many`; by default all
        local devices.

    Raises:
      ValueError: as `recover_many`, and where the folder holds parts of other gradients or of other settings: of
        the arrays, 64 gradients spread evenly are compared.
    """
    shape = tuple(np.shape(weight_gradient))
    if len(shape) != 3 or shape[0] == 0:
        raise ValueError(f"weight_gradient must have shape (N, C, d) with N >= 1, not {shape}")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk must be a positive number of gradients, not {chunk!r}")
    head = observe(weight, weight_gradient[:1], bias, None if bias_gradient is None else bias_gradient[:1])
    if bias_gradient is not None and tuple(np.shape(bias_gradient)) != shape[:2]:
        raise ValueError(f"bias_gradient must have shape {shape[:2]}, not {tuple(np.shape(bias_gradient))}")
    size = chunk or max(PART_BYTES // head.weight_gradient.nbytes, 1)
    devices = options.pop("devices", None) or jax.local_devices()
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    _claim(root, _settings(head, weight_gradient, bias_gradient, size, options))

    report = progress or (lambda done, total: None)
    starts = range(0, shape[0], size)
    for index in range(jax.process_index(), len(starts), jax.process_count()):
        path, chosen = root / _part(index), slice(starts[index], min(starts[index] + size, shape[0]))
        if not path.exists():
            own_bias = None if bias_gradient is None else np.asarray(bias_gradient[chosen])
            part = Observation(head.weight, np.asarray(weight_gradient[chosen]), head.bias, own_bias)  # type: ignore[arg-type]
            try:
                recovery = recover_many(part, devices=devices if len(devices) > 1 else None, **options)
            except ValueError as error:
                _name_not_finite(part, chosen.start)
                raise ValueError(f"gradients {chosen.start} to {chosen.stop - 1}: {error}") from error
            arrays: dict[str, Any] = _arrays(recovery)
            write_atomically(path, partial(np.savez, **arrays))
        report(_done(root, starts, shape[0]), shape[0])


def read_recovery(folder: str | os.PathLike[str]) -> Recovery:
    """What `recover_stream` wrote, once every part is there.

    Returns:
      A `Recovery` of NumPy arrays with a leading axis N.

    Raises:
      ValueError: if the folder is none of `recover_stream`, or parts are missing; the message says how many.
    """
    root = Path(folder)
    if not (root / SETTINGS).is_file():
        raise ValueError(f"{root} holds no {SETTINGS}; give the folder that recover_stream wrote to")
    settings = json.loads((root / SETTINGS).read_text(encoding="utf-8"))
    parts = [root / _part(index) for index in range(-(-settings["examples"] // settings["chunk"]))]
    missing = [path.name for path in parts if not path.exists()]
    if missing:
        raise ValueError(
            f"{root} lacks {len(missing)} of {len(parts)} parts ({missing[0]}, ...); run recover_stream again"
        )
    loaded = []
    for path in parts:
        try:
            # Opened here, because np.load leaves a file open that it cannot read.
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                loaded.append(dict(file))
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it and run recover_stream again") from error
    return _build(Recovery, {name: _concatenate([part[name] for part in loaded]) for name in loaded[0]})


def _name_not_finite(part: Observation, start: int) -> None:
    """Raise ValueError for NaN or infinite entries, counted from the first gradient of all and not of the part."""
    for name in ("weight_gradient", "bias_gradient"):
        array = getattr(part, name)
        finite = np.ones(0, bool) if array is None else np.isfinite(array)
        if not finite.all():
            index = tuple(int(i) for i in np.argwhere(~finite)[0])
            whole = (index[0] + start, *index[1:])
            raise ValueError(
                f"{name} holds {int((~finite).sum())} entries that are not finite in gradients {start} to"
                f" {start + len(array) - 1}, the first {array[index]} at index {whole}; leave out the samples concerned"
            )


def _part(index: int) -> str:
    return f"part-{index:08d}.npz"


def _done(root: Path, starts: range, examples: int) -> int:
    return sum(min(starts.step, examples - start) for i, start in enumerate(starts) if (root / _part(i)).exists())


def _settings(
    head: Observation, weight_gradient: Any, bias_gradient: Any, chunk: int, options: dict[str, Any]
) -> dict[str, Any]:
    examples, number_of_classes, features = weight_gradient.shape
    rows = np.unique(np.linspace(0, examples - 1, min(FINGERPRINTS, examples)).astype(np.int64))
    sampled = [
        np.asarray(array[int(row)]) for array in (weight_gradient, bias_gradient) if array is not None for row in rows
    ]
    known = [np.asarray(array) for array in (head.weight, head.bias) if array is not None]
    return {
        "examples": examples,
        "classes": number_of_classes,
        "features": features,
        "dtype": str(weight_gradient.dtype),
        "chunk": chunk,
        "options": {name: str(value) for name, value in sorted(options.items())},
        "head": _digest(known),
        "gradients": _digest(sampled),
        "softinv_jax": _own_version(),
    }


def _own_version() -> str:
    try:
        return version("softinv_jax")
    except PackageNotFoundError:  # Run from a checkout.
        return "unknown"


def _digest(arrays: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _claim(root: Path, settings: dict[str, Any]) -> None:
    """Write the settings down, or compare them with those that the folder's parts were made with."""
    path = root / SETTINGS
    if not path.exists():
        strangers = sorted(one.name for one in root.glob("part-*.npz"))
        if strangers:
            raise ValueError(f"{root} holds {strangers[0]} but no {SETTINGS} that says of what; choose another folder")
        write_atomically(path, lambda file: file.write(json.dumps(settings, indent=1).encode()))
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = {}
    if not isinstance(found, dict):
        found = {}
    different = [
        f"{name} {found.get(name)!r}, not {settings[name]!r}" for name in settings if found.get(name) != settings[name]
    ]
    if different:
        raise ValueError(
            f"{root} holds parts with {'; '.join(different)}; choose another folder, or remove this one to start anew"
        )


def _arrays(value: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """The leaves of nested dataclasses by their dotted names."""
    found: dict[str, np.ndarray] = {}
    for field in fields(value):
        own = field.metadata.get("name", field.name)
        member, name = getattr(value, own), f"{prefix}{own}"
        found |= _arrays(member, f"{name}.") if is_dataclass(member) else {name: np.asarray(member)}
    return found


def _build(kind: Any, arrays: dict[str, np.ndarray], prefix: str = "") -> Any:
    """The dataclass whose `_arrays` these are."""
    members = {}
    for field in fields(kind):
        name = f"{prefix}{field.metadata.get('name', field.name)}"
        members[field.name] = _build(field.type, arrays, f"{name}.") if is_dataclass(field.type) else arrays[name]
    return kind(**members)


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    # The thorough search lists more candidates; a part that needed none of it has fewer.
    widest = tuple(max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True))
    padded = []
    for part in parts:
        extra = [(0, 0)] + [(0, want - have) for want, have in zip(widest, part.shape[1:], strict=True)]
        padded.append(np.pad(part, extra, constant_values=np.nan) if any(after for _, after in extra) else part)
    return np.concatenate(padded)
