"""What picoGPT's readers look for."""

import numpy as np
import pytest
from checkpoint_files import TINY, make_tensors, nested

from gpt_xp.errors import SettingError
from gpt_xp.picogpt import shape_tree


def test_the_shapes_of_a_model():
    linear = {"c_attn": {"w": [3, 9], "b": [9]}, "c_proj": {"w": [3, 3], "b": [3]}}
    norm = {"g": [3], "b": [3]}
    mlp = {"c_fc": {"w": [3, 12], "b": [12]}, "c_proj": {"w": [12, 3], "b": [3]}}
    blocks = [{"ln_1": norm, "attn": linear, "ln_2": norm, "mlp": mlp}]
    tree = shape_tree(nested(make_tensors(TINY)))
    assert tree == {"wte": [7, 3], "wpe": [5, 3], "blocks": blocks, "ln_f": norm}


def test_arrays_of_any_library_and_of_any_rank():
    strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    assert shape_tree((strict.ones((2, 0, 5)), {"a": np.float32(1)})) == [[2, 0, 5], {"a": []}]
    assert shape_tree({}) == {}


@pytest.mark.parametrize("leaf", [3, None, "abc" * 100])
def test_what_is_no_array_is_named(leaf):
    with pytest.raises(SettingError, match="a tree of arrays was expected") as caught:
        shape_tree({"blocks": [leaf]})
    assert len(str(caught.value)) < 200
