"""``gpurnn.quantization``: rows in 8 bits."""

import numpy as np
import pytest

import gpurnn
from gpurnn import ShapeError
from gpurnn.quantization import Quantized, dequantize_rows, quantize_rows


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_no_number_is_off_by_more_than_half_a_scale(dtype):
    array = (np.random.default_rng(0).normal(size=(40, 33)) * 10.0 ** np.arange(-20, 20)[:, None]).astype("float32")
    array = array[16:24].astype(dtype) if dtype == "float16" else array.astype(dtype)
    values, scales = stored = quantize_rows(array)
    assert values.dtype == np.int8 and scales.dtype == np.float32
    assert (np.abs(values.astype(int)).max(axis=1) == 127).all()
    off = np.abs(values * scales.astype(np.float64)[:, None] - array.astype(np.float64))
    rounding = np.finfo(np.float32).eps * np.abs(array.astype(np.float64)).max(axis=1, keepdims=True)  # of the scale
    assert (off <= scales[:, None].astype(np.float64) / 2 + rounding).all()
    np.testing.assert_array_equal(dequantize_rows(stored), values.astype("float32") * scales[:, None])


def test_what_is_stored():
    values, scales = quantize_rows(np.array([[127.0, -127, 0.5, 1.5, -63.49], [0, -0.0, 0, 0, 0], [-1, 0, 0, 0, 0]]))
    assert values.tolist() == [[127, -127, 0, 2, -63], [0] * 5, [-127, 0, 0, 0, 0]]  # halves go to the even number
    assert scales.tolist() == [1.0, 0.0, np.float32(1 / 127)]


def test_opposite_weights_are_opposite():
    array = np.random.default_rng(1).normal(size=(7, 5))
    values, scales = quantize_rows(array)
    opposite = quantize_rows(-array)
    np.testing.assert_array_equal(opposite.values, -values)
    np.testing.assert_array_equal(opposite.scales, scales)


def test_rows_so_small_that_float32_has_few_bits_for_their_scale():
    array = np.array([[1e-44, -5e-45], [1e-50, 0]])
    stored = quantize_rows(array)
    assert stored.scales[1] == 0
    assert np.abs(dequantize_rows(stored) - array).max() <= 1.4e-45 * 127  # the smallest scale, times each number


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_matrices(shape):
    values, scales = quantize_rows(np.zeros(shape))
    assert values.shape == shape and scales.tolist() == [0.0] * shape[0]
    assert dequantize_rows(Quantized(values, scales)).shape == shape


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_numbers_without_a_scale(bad):
    with pytest.raises(ValueError, match="array: expected finite numbers within the range of float32"):
        quantize_rows(np.array([[1.0, 2.0], [bad, 0.0]]))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_no_matrix(shape):
    with pytest.raises(ShapeError, match=r"array: expected a matrix \(N, K\)"):
        quantize_rows(np.zeros(shape))


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_a_model_that_loaded_weights_is_saved(backend, tmp_path):
    small = gpurnn.LSTM(3, 5, backend=backend, seed=0).quantize()
    small.load_state_dict(gpurnn.LSTM(3, 5, backend=backend, seed=1).quantize().state_dict())
    path = tmp_path / "small.safetensors"
    gpurnn.save(small, path)
    x = np.ones((2, 1, 3), "float32")
    np.testing.assert_array_equal(gpurnn.load(path, backend=backend)(x)[0], small(x)[0])
