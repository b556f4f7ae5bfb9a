from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.graph.layout import Layout


def test_transposing_twice_is_the_identity() -> None:
    there = Layout.identity((3, 5)).swapped()
    assert there != Layout.identity((3, 5))
    assert there.swapped() == Layout.identity((3, 5))


def test_axes_of_length_one_do_not_matter() -> None:
    squeezed_late = Layout.identity((1, 3, 5)).transposed((0, 2, 1)).reshaped((5, 3))
    squeezed_early = Layout.identity((1, 3, 5)).reshaped((3, 5)).transposed((1, 0))
    assert squeezed_late == squeezed_early
    assert Layout.identity((3, 1, 5)).transposed((1, 0, 2)).steps == ()


def test_reshapes_in_a_row_are_one() -> None:
    assert Layout.identity((4, 6)).reshaped((2, 12)).reshaped((24,)).reshaped((4, 6)).steps == ()
    assert len(Layout.identity((4, 6)).reshaped((2, 12)).reshaped((3, 8)).steps) == 1


def test_a_transpose_is_not_a_reshape() -> None:
    assert Layout.identity((4, 6)).swapped() != Layout.identity((4, 6)).reshaped((6, 4))


@pytest.mark.parametrize("change", [lambda x: x.reshaped((5, 5)), lambda x: x.transposed((0, 0))])
def test_impossible_views_are_refused(change) -> None:
    with pytest.raises(ValueError, match=r"cannot reshape|does not permute"):
        change(Layout.identity((4, 6)))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_apply_does_what_numpy_does(data: st.DataObject) -> None:
    shapes = [(24,), (4, 6), (6, 4), (1, 2, 12), (2, 3, 4), (2, 1, 3, 4), (3, 1, 8, 1)]
    array = np.arange(24).reshape(data.draw(st.sampled_from(shapes)))
    layout, expected = Layout.identity(array.shape), array
    for _ in range(data.draw(st.integers(0, 6))):
        if data.draw(st.booleans()):
            shape = data.draw(st.sampled_from(shapes))
            layout, expected = layout.reshaped(shape), expected.reshape(shape)
        else:
            perm = tuple(data.draw(st.permutations(range(expected.ndim))))
            layout, expected = layout.transposed(perm), expected.transpose(perm)
        assert layout.shape == expected.shape
        np.testing.assert_array_equal(layout.apply(array), expected)


def test_undo_brings_the_stored_tensor_back() -> None:
    stored = np.arange(120).reshape(4, 1, 6, 5)
    layout = Layout.identity((4, 1, 6, 5)).transposed((2, 1, 0, 3)).reshaped((6, 20)).transposed((1, 0))
    layout = layout.reshaped((4, 5, 6)).swapped()
    np.testing.assert_array_equal(layout.undo(layout.apply(stored)), stored)
