"""Orbax folders whose chunks are not those of their arrays: a part of an array takes the memory of a whole chunk."""

import json
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxmodels
from jaxmodels.io import checkpoint
from jaxmodels.io.atomic import atomic_folder
from jaxmodels.io.checkpoint import chunked_shapes, load_arrays, read_arrays, save_arrays, stored_types
from jaxmodels.io.formats import ocdbt
from jaxmodels.weights.names import flat_arrays
from tests.jaxmodels.mlp import mlp

ARRAYS = {
    "layers.0.a": np.arange(35.0, dtype=np.float32).reshape(7, 5),
    "b": np.zeros((), np.int32),
}


@pytest.fixture
def folder(tmp_path):
    from orbax.checkpoint import v1 as ocp

    ocp.save(tmp_path / "params", {name: jax.numpy.asarray(array) for name, array in ARRAYS.items()})
    return tmp_path / "params"


def store(folder):
    """Keys and values of a folder, as TensorStore has them."""
    import tensorstore

    place = {"driver": "file", "path": f"{folder / 'state'}/"}
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": place}).result()


def change(folder, name, edit):
    """Write another zarr.json of an array."""
    key = f"{name}/zarr.json"
    about = json.loads(store(folder).read(key).result().value)
    edit(about)
    store(folder).write(key, json.dumps(about).encode()).result()


def test_arrays_of_every_shape_are_read(folder):
    assert chunked_shapes(folder, 10_000) == {name: array.shape for name, array in ARRAYS.items()}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = read_arrays(
        folder, {name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place) for name, array in ARRAYS.items()}
    )
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)


def grid(shape):
    return lambda about: about["chunk_grid"]["configuration"].update(chunk_shape=shape)


def inner(shape):
    return lambda about: about["codecs"][0]["configuration"].update(chunk_shape=shape)


WRONG = {
    "large chunks": (grid([2**30, 5]), r"'layers\.0\.a' has chunks of \[1073741824, 5\] in shape \[7, 5\]"),
    "large chunks in them": (inner([7, 2**30]), r"'layers\.0\.a' has chunks of \[7, 1073741824\]"),
    "chunks in chunks": (inner([1, 1]), r"'layers\.0\.a' has chunks of \[1, 1\] in chunks of \[7, 5\]"),
    "chunks of nothing": (grid([0, 5]), r"'layers\.0\.a' has chunks of \[0, 5\] in shape \[7, 5\]"),
    "chunks that are not stored": (
        lambda about: (about.update(shape=[10**9, 5]), grid([1, 5])(about), inner([1, 5])(about)),
        r"1,000,000,001 chunks, of which 2 are stored",
    ),
    "chunks of other axes": (grid([7]), r"has chunks of \[7\] in shape \[7, 5\]"),
    "chunks of a fraction": (grid([7.0, 5]), r"zarr\.json of 'layers\.0\.a' is damaged"),
    "chunks of True": (grid([True, 5]), r"zarr\.json of 'layers\.0\.a' is damaged"),
    "no chunks": (lambda about: about.pop("chunk_grid"), r"zarr\.json of 'layers\.0\.a' is damaged: .*chunk_grid"),
    "a large shape": (lambda about: about.update(shape=[10**9, 5]), r"params is not a complete Orbax checkpoint"),
    "a large text": (lambda about: about.update(attributes={"a": "a" * 70_000}), "at most 65,536 are read"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_chunks_are_compared_with_their_array(folder, wrong):
    edit, said = WRONG[wrong]
    change(folder, "layers.0.a", edit)
    with pytest.raises(ValueError, match=said) as refused:
        stored_types(folder)
    assert str(refused.value).startswith(str(folder))
    assert str(refused.value).isprintable()


ZSTD = {"name": "zstd", "configuration": {"level": 3}}
BLOSC = {"name": "blosc", "configuration": {"cname": "zstd", "clevel": 9, "shuffle": "noshuffle", "blocksize": 0}}


def codecs(edit, where="codecs"):
    return lambda about: edit(about["codecs"][0]["configuration"][where])


OTHER_CODECS = {
    "compressed twice": (codecs(lambda found: found.append(ZSTD)), "'bytes', 'zstd', 'zstd'"),
    "blosc": (codecs(lambda found: found.__setitem__(1, BLOSC)), "'bytes', 'blosc'"),
    "not compressed": (codecs(lambda found: found.pop()), "'bytes'"),
    "transposed": (
        codecs(lambda found: found.insert(0, {"name": "transpose", "configuration": {"order": [1, 0]}})),
        "'transpose', 'bytes', 'zstd'",
    ),
    "shards in shards": (
        lambda about: codecs(lambda found: found.__setitem__(slice(None), json.loads(json.dumps(about["codecs"]))))(
            about
        ),
        "'sharding_indexed'",
    ),
    "a compressed shard": (lambda about: about["codecs"].append(ZSTD), "'sharding_indexed', 'zstd'"),
    "no shards": (lambda about: about.update(codecs=about["codecs"][0]["configuration"]["codecs"]), "'bytes', 'zstd'"),
    "a compressed index": (codecs(lambda found: found.insert(1, ZSTD), "index_codecs"), "'bytes', 'zstd', 'crc32c'"),
}


@pytest.mark.parametrize("other", OTHER_CODECS)
def test_codecs_are_those_that_orbax_writes(folder, other):
    edit, found = OTHER_CODECS[other]
    change(folder, "layers.0.a", edit)
    with pytest.raises(ValueError, match=rf"'layers\.0\.a' has codecs=\[{found}\]"):
        stored_types(folder)


DTYPES = ["bool", "int8", "uint32", "int64", "float16", "bfloat16", "float32", "float8_e4m3fn"]


def test_arrays_of_every_dtype_are_read(tmp_path):
    from orbax.checkpoint import v1 as ocp

    arrays = {dtype: np.zeros((7, 5), dtype) for dtype in DTYPES}
    ocp.save(tmp_path / "params", arrays)
    assert {name: found.dtype for name, found in stored_types(tmp_path / "params").items()} == {
        name: array.dtype for name, array in arrays.items()
    }


def test_more_keys_than_files_have_chunks_are_not_read(folder, monkeypatch):
    monkeypatch.setattr("jaxmodels.io.formats.ocdbt.CHUNKS", 100)
    shapes = ocdbt.operations()["shapes"]
    shapes(str(folder / "state"), 0)
    for written in [store(folder).write(f"layers.0.a/c/{i}", b"").result for i in range(100)]:
        written()
    with pytest.raises(ValueError, match="104 keys in files of 100 bytes; at most 100 are"):
        shapes(str(folder / "state"), 100)
    shapes(str(folder / "state"), 2_000)


def test_values_are_no_larger_than_the_files(folder, monkeypatch):
    """Two keys of the store may have the same bytes of a file."""
    monkeypatch.setattr("jaxmodels.io.formats.ocdbt.INLINE_BYTES", 0)
    shapes = ocdbt.operations()["shapes"]
    store(folder).write("layers.0.a/c/1", np.random.default_rng(0).bytes(5_000)).result()  # Orbax's have 38
    shapes(str(folder / "state"), 10_000)
    with pytest.raises(ValueError, match=r"values have \d,\d+ bytes in files of 5,000"):
        shapes(str(folder / "state"), 5_000)


def test_zeros_are_read_where_their_size_is_known(tmp_path, monkeypatch):
    """An optimizer's moments before its first step have thousands of times the bytes of their files."""
    from orbax.checkpoint import v1 as ocp

    monkeypatch.setattr(checkpoint, "FREE_BYTES", 2**20)
    zeros = jax.numpy.zeros((2_000, 1_000))
    ocp.save(tmp_path / "state", {"mu": zeros})
    with pytest.raises(ValueError, match=r"state is not a complete Orbax checkpoint: 8,000,000 bytes of arrays in"):
        stored_types(tmp_path / "state")
    targets = {"mu": jax.ShapeDtypeStruct(zeros.shape, zeros.dtype, sharding=zeros.sharding)}
    with pytest.raises(ValueError, match="8,000,000 bytes of arrays in"):
        read_arrays(tmp_path / "state", targets)
    np.testing.assert_array_equal(read_arrays(tmp_path / "state", targets, zeros=True)["mu"], zeros)
    smaller = {"mu": jax.ShapeDtypeStruct((20, 10), zeros.dtype, sharding=zeros.sharding)}
    with pytest.raises(ValueError, match="8,000,000 bytes of arrays in"):
        read_arrays(tmp_path / "state", smaller, zeros=True)


def test_a_description_that_is_nested_a_thousand_deep_does_not_end_the_process(folder):
    store(folder).write("layers.0.a/zarr.json", b"[" * 50_000).result()
    with pytest.raises(ValueError, match=r"zarr\.json of 'layers\.0\.a'"):
        stored_types(folder)


def test_another_version_of_zarr_is_refused(folder):
    store(folder).write("c/.zarray", b"{}").result()
    with pytest.raises(ValueError, match=r"'c/\.zarray' is of zarr's second version"):
        stored_types(folder)


def named(about, name="layers.0.a"):
    """Entry of an array in the content of a _METADATA."""
    return about["tree_metadata"][str((name,))]["value_metadata"]


ELSEWHERE = {
    "plain files": (lambda about: about.update(use_ocdbt=False), "use_ocdbt=False"),
    "nothing said": (lambda about: about.pop("use_ocdbt"), "use_ocdbt=None"),
    "an older zarr": (lambda about: about.update(use_zarr3=False), "use_zarr3=False"),
    "absent chunks": (
        lambda about: about.update(store_array_data_equal_to_fill_value=False),
        "store_array_data_equal_to_fill_value=False",
    ),
    "strings": (lambda about: named(about).update(value_type="string"), r"value_type='string' of .*layers\.0\.a"),
    "another kind": (lambda about: named(about).update(value_type="foo"), r"value_type='foo' of .*layers\.0\.a"),
}


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_arrays_are_read_from_the_store_whose_chunks_were_looked_at(folder, elsewhere):
    """Orbax reads plain zarr files beside the store if its _METADATA says so; nobody has looked at their chunks."""
    edit, said = ELSEWHERE[elsewhere]
    file = folder / "state" / "_METADATA"
    about = json.loads(file.read_text())
    edit(about)
    file.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=rf"^\S+params is not a complete Orbax checkpoint: \S+/_METADATA has {said}"):
        stored_types(folder)


def test_another_item_of_an_orbax_folder_is_not_read(folder):
    """Without `orbax.checkpoint`, Orbax prefers arrays in the folder itself, of its first format."""
    (folder / "orbax.checkpoint").unlink()
    about = json.loads((folder / "state" / "_METADATA").read_text()) | {"use_ocdbt": False}
    (folder / "_METADATA").write_text(json.dumps(about))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = {name: jax.ShapeDtypeStruct(*found, sharding=place) for name, found in stored_types(folder).items()}
    np.testing.assert_array_equal(read_arrays(folder, targets)["layers.0.a"], ARRAYS["layers.0.a"])


INSPECT = """
import sys
from pathlib import Path
from jaxmodels.io.checkpoint import stored_types
try:
    stored_types(Path(sys.argv[1]))
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_names_that_cannot_be_read_are_reported_in_one_line(folder):
    for name in ARRAYS:
        change(folder, name, lambda about: about.update(data_type="foo"))
    run = subprocess.run([sys.executable, "-c", INSPECT, str(folder)], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"{folder} is not a complete Orbax checkpoint")
    assert (run.stdout.count("\n"), run.stderr) == (1, "")


def test_nodes_that_grow_a_thousandfold_are_not_read(folder, tmp_path, monkeypatch):
    """Values of a node are compressed with it: 100 kilobytes stand for 100 megabytes."""
    import tensorstore

    assert set(stored_types(folder)) == set(ARRAYS)  # starts the process that reads
    place = {"driver": "file", "path": f"{tmp_path / 'grows' / 'state'}/"}
    config = {"max_inline_value_bytes": 2**20, "max_decoded_node_bytes": 2**27}
    grows = tensorstore.KvStore.open({"driver": "ocdbt", "base": place, "config": config}).result()
    for written in [grows.write(f"{i}/zarr.json", bytes(2**20)) for i in range(100)]:
        written.result()
    monkeypatch.setattr(checkpoint, "MEGABYTES", 50.0)
    with pytest.raises(ValueError, match=r"^\S+grows is not a complete Orbax checkpoint: it takes more than 50 MB"):
        stored_types(tmp_path / "grows")
    assert set(stored_types(folder)) == set(ARRAYS)


def test_a_sparse_file_of_numbers_is_refused(folder):
    file = folder / "state" / "d" / ("0" * 32)
    file.parent.mkdir(exist_ok=True)
    with file.open("wb") as opened:
        opened.truncate(2**40)
    with pytest.raises(ValueError, match=r"0{32} has 1,099,511,627,776 bytes, of which 0 were ever written"):
        stored_types(folder)


def crc32c(data):
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


READ = """
import sys, resource
from pathlib import Path
from jaxmodels.io.checkpoint import read_arrays, stored_types
import jax
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
folder = Path(sys.argv[1])
try:
    stored = stored_types(folder).items()
    read_arrays(folder, {name: jax.ShapeDtypeStruct(*found, sharding=place) for name, found in stored})
except ValueError as error:
    print(str(error).startswith(f"{folder} is damaged"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_chunk_that_grows_beyond_its_shape_takes_no_memory(folder):
    """Blocks of zstandard have 4 bytes for 131,072 zeros. TensorStore reads what the shape needs."""
    block = (131_072 << 3) | 2
    frame = b"\x28\xb5\x2f\xfd\x00\x38" + (struct.pack("<I", block)[:3] + b"\0") * 20_000
    frame += struct.pack("<I", block | 1)[:3] + b"\0"
    index = struct.pack("<QQ", 0, len(frame))
    value = store(folder).read("layers.0.a/c/0/0").result().value
    assert struct.unpack("<I", value[-4:])[0] == crc32c(value[-20:-4])
    store(folder).write("layers.0.a/c/0/0", frame + index + struct.pack("<I", crc32c(index))).result()
    run = subprocess.run([sys.executable, "-c", READ, str(folder)], capture_output=True, text=True, check=True)
    refused, kilobytes = run.stdout.split()
    assert refused == "True"
    assert int(kilobytes) < 500_000


def test_an_interrupt_is_raised_once_orbax_has_ended(tmp_path, monkeypatch):
    """Its threads would write again what is removed after an interrupt, without the manifest that tells whose it is."""
    from orbax.checkpoint import v1 as ocp

    done, save = [], ocp.save

    def slow(folder, arrays):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.5)
        save(folder, arrays)
        done.append(folder)

    monkeypatch.setattr(ocp, "save", slow)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model") as new:
        save_arrays(new / "params", mlp(2, 3, 5))
    assert len(done) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["run[v1]", "a*", "why?", "a\\b", "gs:", "x.__lock"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_path_that_orbax_takes_for_another_one_is_refused_before_anything_is_written(name, inside, tmp_path):
    place = tmp_path / name / "model" if inside else tmp_path / name
    with pytest.raises(ValueError, match=rf"folder=.*{re.escape(repr(name))} is in its path"):
        jaxmodels.save(mlp(2, 3, 5), place)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() or path.name.startswith(".")]


@pytest.mark.parametrize("name", ["a b", "é", "~", "run (1)", "a'b", "a%20b", "#1", "a=b,c"])
def test_any_other_path_is_read_and_written_also_through_a_folder_above_and_a_link(name, tmp_path, monkeypatch):
    model = mlp(2, 3, 5)
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    place = Path("..", name)
    save_arrays(place / "params", model)
    (tmp_path / "link").symlink_to(tmp_path / name)
    for folder in (place, tmp_path / "here" / "below" / ".." / ".." / name, Path("../link")):
        loaded = load_arrays(folder / "params", model)
        for path, array in flat_arrays(model).items():
            np.testing.assert_array_equal(flat_arrays(loaded)[path], array)


def test_arrays_that_were_moved_to_a_folder_with_brackets_are_read(folder, tmp_path):
    (tmp_path / "run[v1]").mkdir()
    folder.rename(tmp_path / "run[v1]" / "params")
    assert stored_types(tmp_path / "run[v1]" / "params").keys() == ARRAYS.keys()
