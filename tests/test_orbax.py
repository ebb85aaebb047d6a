"""Orbax checkpoints, ours and others': the arrays that Orbax saved, of every layout, by their paths and in pieces."""

import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from jaxinfer.errors import CheckpointMismatch, CorruptFile, UnsupportedModel
from jaxinfer.frontend.checkpoint import open_checkpoint
from jaxinfer.frontend.orbax import find_orbax, open_orbax, write_orbax
from jaxinfer.frontend.saved import Saved
from jaxinfer.frontend.weights import load_params
from jaxinfer.graph import Graph, Leaf

pytestmark = pytest.mark.usefixtures("in_haste")

TREE = {"params": {"dense": {"kernel": np.arange(256 * 8, dtype=np.float32).reshape(256, 8), "bias": np.zeros(8)},
                   "layers": [{"w": np.full((4, 6), i, np.int8)} for i in range(2)]},
        "half": np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16), "step": 7, "note": "of a training run"}
NAMES = ["half", "params.dense.bias", "params.dense.kernel", "params.layers.0.w", "params.layers.1.w", "step"]


def written(folder, **options):
    context = ocp.Context()
    for name, value in options.items():
        setattr(context.array.saving, name, value)
    with context:
        ocp.save(folder / "checkpoint", TREE)
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return written(tmp_path_factory.mktemp("orbax"))


@pytest.mark.parametrize("options", [{}, {"use_zarr3": False}, {"use_ocdbt": False, "use_zarr3": False}],
                         ids=["as it is by default", "Zarr 2", "in folders"])
def test_every_layout_that_orbax_writes_is_read(tmp_path, options):
    tensors, saved = open_orbax(find_orbax(written(tmp_path, **options)))
    assert saved is None and sorted(tensors) == NAMES
    kernel = tensors["params.dense.kernel"]
    assert (kernel.shape, kernel.dtype, kernel.nbytes) == ((256, 8), np.float32, 8192)
    np.testing.assert_array_equal(kernel.read(), TREE["params"]["dense"]["kernel"])
    np.testing.assert_array_equal(kernel.rows(3, 9, slice(2, 5)), TREE["params"]["dense"]["kernel"][3:9, 2:5])
    assert tensors["half"].read().tobytes() == TREE["half"].tobytes()
    assert not tensors["params.dense.bias"].read().any()  # which Orbax may leave out: it is zeros
    assert [tensors[f"params.layers.{i}.w"].read().tolist() for i in (0, 1)] == [[[i] * 6] * 4 for i in (0, 1)]


def graph(ignore=("half", "step", "params.layers.*")) -> Graph:
    spec = {"w": Leaf((8, 256), ("a", "b"), "params.dense.kernel", transpose=True),
            "b": Leaf((8,), ("a",), "params.dense.bias")}
    return Graph("test", spec, (), lambda *_: None, (), lambda *_: None, 1, 1, ignore=ignore)


def test_leaves_that_are_named_by_paths_are_restored_and_cast_and_what_is_ignored_is_not_read(checkpoint):
    opened = open_checkpoint(checkpoint.parent)
    assert (opened.config, opened.directory) == ({}, checkpoint.parent)
    params = load_params(graph(), opened.tensors, dtype="bfloat16", source="here")
    assert params["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["w"], TREE["params"]["dense"]["kernel"].T.astype(jnp.bfloat16))
    with pytest.raises(CheckpointMismatch, match=r"surplus: params\.layers\.0\.w"):
        load_params(graph(ignore=("half", "step")), opened.tensors, dtype="bfloat16", source="here")


def test_several_trees_are_refused_with_their_names(checkpoint, tmp_path):
    for step in ("10", "20"):
        shutil.copytree(checkpoint, tmp_path / step)
    with pytest.raises(UnsupportedModel, match=r"holds 2 trees of arrays, .*10.*, .*20.*; give the folder of one"):
        find_orbax(tmp_path)
    assert find_orbax(tmp_path / "10").is_relative_to(tmp_path / "10")
    assert find_orbax(tmp_path / "nowhere") is None


def test_what_we_save_orbax_restores_and_rows_of_it_are_stored_apart(tmp_path):
    arrays = {"w": jnp.arange(2**21, dtype=jnp.float32).reshape(1024, 2048), "n": [jnp.ones(3, jnp.int8)]}
    write_orbax(tmp_path / "orbax", arrays, Saved("float32", "int8"))
    tensors, saved = open_orbax(find_orbax(tmp_path))
    assert (saved, list(tensors)) == (Saved("float32", "int8"), ["n.0", "w"])
    assert tensors["w"].together < 1024
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)
    restored = ocp.load(tmp_path / "orbax", like)
    for theirs, ours in zip(jax.tree.leaves(restored), jax.tree.leaves(arrays), strict=True):
        np.testing.assert_array_equal(theirs, ours)


def damaged(checkpoint, tmp_path, damage):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    tree = find_orbax(copy)
    tensors, _ = open_orbax(tree)
    damage(tree)
    return tensors["params.dense.kernel"]


def cut_short(tree):
    for file in tree.glob("**/d/*"):
        with file.open("r+b") as data:
            data.truncate(16)


def rewritten(tree):
    (tree / "manifest.ocdbt").touch()


@pytest.mark.parametrize("damage, message", [
    (cut_short, r"copy.*tensor 'params\.dense\.kernel' cannot be read"),
    (rewritten, r"manifest\.ocdbt: has changed since it was opened.*'params\.dense\.kernel'"),
    (shutil.rmtree, r"manifest\.ocdbt: is gone since it was opened.*'params\.dense\.kernel'")])
def test_a_checkpoint_that_ends_or_changes_while_it_is_read_is_an_error_with_its_name_and_the_tensor_s(
        checkpoint, tmp_path, damage, message):
    tensor = damaged(checkpoint, tmp_path, damage)
    with pytest.raises(CorruptFile, match=message):
        tensor.rows(0, 4)


@pytest.mark.parametrize("text", ["[]", "{}", '{"tree_metadata": {"a": 1}}', "{"])
def test_a_description_that_is_none_is_corrupt(tmp_path, text):
    (tmp_path / "_METADATA").write_text(text)
    with pytest.raises(CorruptFile, match="_METADATA"):
        open_orbax(tmp_path)
