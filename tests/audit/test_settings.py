"""Settings from Python and from TOML: what they accept, and what they say of what they do not."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softinv_jax.audit import AuditSettings, Sweep, default_sweeps, quick_settings, settings_from_toml
from softinv_jax.audit.catalogue import DEFENCES
from softinv_jax.audit.models import MODELS
from softinv_jax.client.soft_labels import FAMILIES


def test_toml_is_the_settings() -> None:
    text = """
    title = "Ours"
    network = "fcn4"
    label_format = "mixup"
    scale_known = false
    samples = 40
    images = 0
    [[sweep]]
    defence = "gaussian_noise"
    strengths = [1e-4, 1e-2]
    with = [{defence = "clipping", strength = 1.0}, {defence = "sign"}]
    [[sweep]]
    defence = "sign"
    """
    noise = Sweep("gaussian_noise", (1e-4, 1e-2), (("clipping", 1.0), ("sign", 1.0)))
    assert settings_from_toml(text) == AuditSettings(
        title="Ours",
        network="fcn4",
        label_format="mixup",
        scale_known=False,
        samples=40,
        images=0,
        sweeps=(noise, Sweep("sign", (1.0,))),
    )
    assert noise.title == "Gaussian noise + Clipping 1 + Sign 1"


def test_the_page_shows_legal_settings() -> None:
    page = (Path(__file__).parents[2] / "docs" / "audit.md").read_text()
    (text,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    settings = settings_from_toml(text)
    assert [sweep.title for sweep in settings.sweeps] == ["Gaussian noise", "Pruning (top-k) + Clipping 1"]
    for name in (*DEFENCES, *MODELS, *FAMILIES):
        assert re.search(rf"\b{name}\b", page), name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("samples =", "not TOML"),
        ("sample = 3", "unknown: sample; known are .*samples"),
        ("samples = 0", "samples = 0: give 1 or more"),
        ("samples = 2.5", "samples = 2.5 must be of type int"),
        ("samples = true", "samples = True must be of type int"),
        ("network = 'vgg'", "network = 'vgg' is unknown; choose among lenet"),
        ("label_format = 'soft'", "label_format = 'soft' is unknown; choose among hard"),
        ("images = 200", "images = 200, but there are only samples = 100"),
        ("delta = 0", "delta = 0"),
        ("data_dir = '/x'", "data_dir = '/x' is for a TFDS data set"),
        ("sweep = 3", "must be given as tables"),
        ("[[sweep]]\nstrengths = [1]", "names no defence"),
        ("[[sweep]]\ndefence = 'prune'", "defence 'prune' is unknown; choose among gaussian_noise"),
        (
            "[[sweep]]\ndefence = 'pruning'\nstrengths = [2]",
            "pruning has the strength 2, but needs a number from 0 to 1",
        ),
        ("[[sweep]]\ndefence = 'pruning'\nstrengths = []", "give one or more"),
        ("[[sweep]]\ndefence = 'pruning'\nstrengths = 0.5", "give a list of numbers"),
        ("[[sweep]]\ndefence = 'pruning'\nlevel = [0.5]", "unknown: level"),
        ("[[sweep]]\ndefence = 'mixup'\nwith = [{defence = 'smoothing', strength = 0.1}]", "both make the label"),
        ("[[sweep]]\ndefence = 'sign'\n[[sweep]]\ndefence = 'sign'", "swept twice"),
    ],
)
def test_what_is_wrong_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings_from_toml(text)


def test_quick_settings_are_smaller_and_legal() -> None:
    quick = quick_settings(AuditSettings(images=3))
    assert quick.samples == 24
    assert quick.images == 2
    assert (
        0 < sum(len(one.strengths) for one in quick.sweeps) < sum(len(one.strengths) for one in AuditSettings().sweeps)
    )
    own = AuditSettings(samples=1, images=1, sweeps=default_sweeps(("sign",)))
    assert quick_settings(own) == own


def test_catalogue_is_legal() -> None:
    for name, kind in DEFENCES.items():
        assert Sweep(name, kind.strengths).title == kind.title
    assert AuditSettings().network in MODELS


KEYS = ("title", "network", "epochs", "dataset", "data_dir", "label_format", "scale_known", "samples", "images", "seed")
SWEEP_KEYS = ("defence", "strengths", "with", "other")
values = st.recursive(
    st.booleans() | st.integers(-(2**62), 2**62) | st.floats() | st.text(max_size=5) | st.sampled_from(list(DEFENCES)),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


def toml(value: object) -> str:
    """JSON's strings, lists and Booleans are TOML's; infinities and NaN are named otherwise."""
    return json.dumps(value).replace("Infinity", "inf").replace("NaN", "nan")


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    st.text()
    | st.tuples(
        st.dictionaries(st.sampled_from((*KEYS, "steps", "delta", "sampling_rate")), values),
        st.lists(st.dictionaries(st.sampled_from(SWEEP_KEYS), values), max_size=2),
    )
)
def test_anything_is_settings_or_a_value_error(given_settings: str | tuple[dict, list]) -> None:
    text = given_settings
    if isinstance(given_settings, tuple):
        table, sweeps = given_settings
        text = "".join(f"{name} = {toml(value)}\n" for name, value in table.items())
        for sweep in sweeps:
            text += "[[sweep]]\n" + "".join(f"{name} = {toml(value)}\n" for name, value in sweep.items())
    try:
        found = settings_from_toml(text)
    except ValueError as error:
        assert str(error)
    else:
        assert isinstance(found, AuditSettings)
