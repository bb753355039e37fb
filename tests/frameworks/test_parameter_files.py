"""Files that are not trusted: what is whole comes back, anything else is one ValueError and takes no memory."""

import io
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from softinv_jax.frameworks import npz_file
from softinv_jax.frameworks.parameter_files import flat, name_arrays, nested, read_parameter_file, trained_layers

CASES = settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ARRAYS = {"head/kernel": np.arange(12, dtype=np.float32).reshape(3, 4), "head/bias": np.ones(4)}


def npy(array: np.ndarray, shape: str | None = None, descr: str | None = None) -> bytes:
    """An .npy file, with another shape or type in its header than it has."""
    header = f"{{'descr': '{descr or array.dtype.str}', 'fortran_order': False, 'shape': {shape or array.shape}, }}"
    header = header.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + array.tobytes()


def archive(path: Path, members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> str:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as file:
        warnings.simplefilter("ignore")  # Duplicate names are the point.
        for name, content in members:
            file.writestr(name, content)
    return str(path)


class Bomb:
    def __reduce__(self) -> tuple:
        raise AssertionError("a pickle was loaded")


def pickled_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], object), allow_pickle=True)
    return buffer.getvalue()


ONE = np.ones(3, np.float32)
HOSTILE: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "pickle": ([("x.npy", pickled_array())], "x holds Python objects"),
    "not an array": ([("x.npy", b"text")], "x is no array"),
    "huge shape": (
        [("x.npy", npy(ONE, "(1000000000000,)"))],
        r"x declares shape \(1000000000000,\) .* 12 bytes follow",
    ),
    "shape beyond integers": ([("x.npy", npy(ONE, "(10**40,)"))], "cannot be read"),
    "product beyond integers": ([("x.npy", npy(ONE, f"({2**40}, {2**40})"))], "x declares shape"),
    "huge shape with a zero": ([("x.npy", npy(ONE[:0], f"({2**62}, 0, {2**62})"))], "cannot be read"),
    "negative shape": ([("x.npy", npy(ONE, "(-3, -1)"))], "x declares shape"),
    "text for a shape": ([("x.npy", npy(ONE, "'abc'"))], "cannot be read"),
    "short": ([("x.npy", npy(ONE)[:-1])], "11 bytes follow"),
    "long": ([("x.npy", npy(ONE) + b"0")], "13 bytes follow"),
    "integers": ([("x.npy", npy(np.ones(3, np.int64)))], r"no floating arrays \(x is int64\)"),
    "complex": ([("x.npy", npy(np.ones(3, complex)))], "x must be float16, float32 or float64, but is complex128"),
    "long double": ([("x.npy", npy(np.ones(3, np.longdouble)))], "x must be float16"),
    "structured": ([("x.npy", npy(ONE).replace(b"'<f4'", b"[('a','<f4')]"))], "cannot be read|x must be"),
    "code in the header": ([("x.npy", npy(ONE, "__import__('os').getpid()"))], "cannot be read"),
    "twice": ([("x.npy", npy(ONE)), ("x.npy", npy(2 * ONE))], "holds 'x' more than once"),
    "twice, without .npy": ([("x.npy", npy(ONE)), ("x", npy(2 * ONE))], "holds 'x' more than once"),
    "version 3": ([("x.npy", npy(ONE).replace(b"NUMPY\x01", b"NUMPY\x03"))], "version"),
    "empty member": ([("x.npy", b"")], "x is no array"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_npz_is_refused(case: str, tmp_path: Path) -> None:
    members, said = HOSTILE[case]
    path = archive(tmp_path / "hostile.npz", members)
    with pytest.raises(ValueError, match=said) as caught:
        read_parameter_file(path)
    message = str(caught.value)
    assert message.startswith(path)
    assert "\n" not in message


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = np.zeros(2**20, np.float32)
    path = archive(tmp_path / "bomb.npz", [("x.npy", npy(zeros))], zipfile.ZIP_DEFLATED)
    assert read_parameter_file(path)["x"].shape == zeros.shape  # Four megabytes surprise nobody.
    monkeypatch.setattr(npz_file, "LARGEST_SURPRISE", 2**20)

    def refuse(*_: object) -> None:
        raise AssertionError("a member was opened")

    monkeypatch.setattr(zipfile.ZipFile, "open", refuse)
    with pytest.raises(ValueError, match=r"would unpack from \d+ to \d+ bytes"):
        read_parameter_file(path)


def test_a_member_that_holds_more_than_it_declares_is_refused(tmp_path: Path) -> None:
    """The directory says 140 bytes, the deflated stream unpacks to 8 megabytes."""
    long = npy(np.zeros(2**21, np.float32), "(3,)")
    path = Path(archive(tmp_path / "liar.npz", [("x.npy", long)], zipfile.ZIP_DEFLATED))
    honest, lie = struct.pack("<I", len(long)), struct.pack("<I", 140)
    content = path.read_bytes()
    assert content.count(honest) == 2
    path.write_bytes(content.replace(honest, lie))
    with pytest.raises(ValueError, match="cannot be read"):
        read_parameter_file(str(path))


finite = {"allow_nan": False, "allow_infinity": False}
names = st.text(st.characters(codec="utf-8", exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: not name.endswith((".npy", "/", "."))
)
arrays = st.sampled_from([np.float16, np.float32, np.float64, np.dtype(">f4")]).flatmap(
    lambda dtype: hypothesis_numpy.arrays(dtype, hypothesis_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0))
)


@CASES
@given(st.dictionaries(names, arrays, max_size=4), st.booleans())
def test_npz_round_trip(tmp_path: Path, content: dict[str, np.ndarray], compressed: bool) -> None:
    members = []
    for name, array in content.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        members.append((f"{name}.npy", buffer.getvalue()))
    path = archive(tmp_path / "x.npz", members, zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED)
    try:
        read = read_parameter_file(path)
    except ValueError:
        # Zip archives know no difference between some names, such as with "\\" where that separates folders.
        assert any(name != zipfile.ZipInfo(name).filename for name in content)
        return
    assert set(read) == {zipfile.ZipInfo(name).filename for name in content}
    for name, array in content.items():
        np.testing.assert_array_equal(read[zipfile.ZipInfo(name).filename], array)


def valid_npz(path: Path) -> None:
    np.savez_compressed(path, **ARRAYS)


def valid_safetensors(path: Path) -> None:
    pytest.importorskip("safetensors.numpy").save_file(ARRAYS, path)


def valid_torch(path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({name: torch.from_numpy(array) for name, array in ARRAYS.items()}, path)


FORMATS: dict[str, Callable[[Path], None]] = {
    "x.npz": valid_npz,
    "x.safetensors": valid_safetensors,
    "x.pt": valid_torch,
}


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_whole_comes_back(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name)
    read = read_parameter_file(str(tmp_path / name))
    assert set(read) == set(ARRAYS)
    for key, array in read.items():
        np.testing.assert_array_equal(array, ARRAYS[key])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_give_arrays_or_one_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FORMATS[name](path)
    whole = path.read_bytes()

    @CASES
    @given(
        st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=6),
        st.integers(0, len(whole)) | st.just(len(whole)),
    )
    def check(changes: list[tuple[int, int]], length: int) -> None:
        content = bytearray(whole)
        for position, value in changes:
            content[position] = value
        path.write_bytes(content[:length])
        assert_arrays_or_one_error(path)

    check()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_random_bytes_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FORMATS[name](path)  # skips where the library is missing

    @CASES
    @given(st.binary(max_size=200))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=path.name):
            read_parameter_file(str(path))

    check()


def assert_arrays_or_one_error(path: Path) -> None:
    try:
        read = read_parameter_file(str(path))
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert sum(array.nbytes for array in read.values()) < 1e6


class TestTorchFiles:
    @pytest.fixture(autouse=True)
    def torch(self) -> object:
        return pytest.importorskip("torch")

    def test_pickled_code_is_not_run(self, tmp_path: Path, torch: object) -> None:
        torch.save({"x": Bomb}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match="cannot be loaded as weights only"):
            read_parameter_file(str(tmp_path / "x.pt"))

    def test_an_old_pickle_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "x.pt").write_bytes(pickle.dumps({"x": 1}))
        with pytest.raises(ValueError, match=r"not a file of PyTorch 1\.6 or newer"):
            read_parameter_file(str(tmp_path / "x.pt"))

    def test_a_number_repeated_a_billion_times_is_refused(self, tmp_path: Path, torch: object) -> None:
        torch.save({"x": torch.ones(1).expand(2**30)}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match="would unpack from"):
            read_parameter_file(str(tmp_path / "x.pt"))

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("kind", ["model", "sparse", "scalars", "integer", "list"])
    def test_what_is_no_state_dict_is_refused(self, tmp_path: Path, torch: object, kind: str) -> None:
        value = {
            "model": torch.nn.Linear(2, 2),
            "sparse": {"x": torch.eye(3).to_sparse()},
            "scalars": {"state_dict": {"x": torch.ones(2)}},
            "integer": {"x": torch.ones(2, dtype=torch.int64)},
            "list": [torch.ones(2)],
        }[kind]
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=r"x\.pt: "):
            read_parameter_file(str(tmp_path / "x.pt"))


def test_safetensors_with_a_huge_shape_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match="no safetensors file that can be read"):
        read_parameter_file(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("name", ["none.npz", "none.pt", "none.safetensors"])
def test_missing_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_parameter_file(str(tmp_path / name))
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="not a file"):
        read_parameter_file(str(tmp_path / name))


def test_trees_and_names() -> None:
    tree = nested(ARRAYS)
    assert set(tree) == {"head"}
    assert flat(tree) == ARRAYS
    state = {"0.weight": np.ones((4, 3)), "1.running_mean": np.ones(4), "1.num_batches_tracked": np.ones(())}
    assert list(flat(trained_layers(state))) == ["0/weight"]
    assert list(name_arrays([np.ones(1), np.ones(2)], ["a", "b"])) == ["a", "b"]
    for wrong in (["a"], ["a", "a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="different names for 2 arrays"):
            name_arrays([np.ones(1), np.ones(2)], wrong)
    with pytest.raises(ValueError, match="lies inside another array"):
        nested({"a": np.ones(1), "a/b": np.ones(1)})
    with pytest.raises(ValueError, match="a/b holds entries that are not finite"):
        nested({"a/b": np.array([np.inf])})
