"""Steps against closed forms and against torch."""

import json

import numpy as np
import pytest
import torch
from kd_exporter_onnx.errors import InputError
from kd_exporter_onnx.preprocess import Preprocessing
from pydantic import ValidationError


def run(steps: list[dict], **inputs: object) -> dict[str, np.ndarray]:
    return Preprocessing(steps=steps)(inputs)


def test_scale_and_normalise_in_closed_form() -> None:
    image = np.array([[[[0, 128], [255, 64]]]], np.uint8).transpose(0, 2, 3, 1)  # [1, 2, 2, 1]
    steps = [
        {"step": "scale", "factor": 1 / 255},
        {"step": "normalise", "mean": [0.5], "std": [0.25]},
        {"step": "transpose", "order": [0, 3, 1, 2]},
    ]
    out = run(steps, image=image)["image"]
    expected = (np.array([[0, 128], [255, 64]]) / 255 - 0.5) / 0.25
    assert out.dtype == np.float32
    assert out.shape == (1, 1, 2, 2)
    np.testing.assert_allclose(out[0, 0], expected, atol=1e-6)


def test_scale_adds_its_offset() -> None:
    np.testing.assert_array_equal(
        run([{"step": "scale", "factor": 2, "offset": -1}], x=np.array([[3]]))["x"], [[5.0]]
    )


def test_normalise_has_one_value_a_channel() -> None:
    x = np.ones((1, 3, 2, 2), np.float32)
    out = run([{"step": "normalise", "mean": [0, 1, 2], "std": [1, 1, 0.5], "axis": 1}], x=x)["x"]
    np.testing.assert_array_equal(out[0, :, 0, 0], [1, 0, -2])


@pytest.mark.parametrize("size", [(5, 9), (16, 3), (8, 8)])
@pytest.mark.parametrize("layout", ["hwc", "chw"])
def test_resize_equals_torch(size: tuple[int, int], layout: str) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 7)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x), size=size, mode="bilinear", align_corners=False
    ).numpy()
    given = x if layout == "chw" else x.transpose(0, 2, 3, 1)
    out = run([{"step": "resize", "height": size[0], "width": size[1], "layout": layout}], x=given)["x"]
    np.testing.assert_allclose(out if layout == "chw" else out.transpose(0, 3, 1, 2), expected, atol=2e-6)


def test_pad_ids_right_left_and_mask() -> None:
    rows = [[5, 6, 7], [8]]
    right = run([{"step": "pad_ids", "value": 9, "multiple_of": 4, "mask": "mask"}], ids=rows)
    np.testing.assert_array_equal(right["ids"], [[5, 6, 7, 9], [8, 9, 9, 9]])
    np.testing.assert_array_equal(right["mask"], [[1, 1, 1, 0], [1, 0, 0, 0]])
    left = run([{"step": "pad_ids", "value": 0, "side": "left", "mask": "mask"}], ids=rows)
    np.testing.assert_array_equal(left["ids"], [[5, 6, 7], [0, 0, 8]])
    np.testing.assert_array_equal(left["mask"], [[1, 1, 1], [0, 0, 1]])
    assert left["ids"].dtype == left["mask"].dtype == np.int64


def test_pad_ids_never_cuts() -> None:
    with pytest.raises(InputError, match="5 tokens is longer than 4"):
        run([{"step": "pad_ids", "value": 0, "max_length": 4}], ids=[[1] * 5])


def test_cast_and_add_axis() -> None:
    out = run(
        [{"step": "add_axis", "axis": 1}, {"step": "cast", "dtype": "int64"}], x=np.array([[1.0, 2.0]])
    )["x"]
    assert out.shape == (1, 1, 2)
    assert out.dtype == np.int64


def test_the_input_is_not_changed() -> None:
    x = np.ones((1, 2), np.float32)
    run([{"step": "scale", "factor": 3}, {"step": "normalise", "mean": [1], "std": [2]}], x=x)
    np.testing.assert_array_equal(x, [[1, 1]])


def test_steps_work_on_named_inputs() -> None:
    out = run([{"step": "scale", "factor": 2, "on": "b"}], a=np.ones(2), b=np.ones(2))
    np.testing.assert_array_equal(out["a"], [1, 1])
    np.testing.assert_array_equal(out["b"], [2, 2])
    with pytest.raises(InputError, match=r"None, but the inputs are \['a', 'b'\]"):
        run([{"step": "scale", "factor": 2}], a=np.ones(2), b=np.ones(2))


@pytest.mark.parametrize(
    "step, words",
    [
        ({"step": "transpose", "order": [0, 2, 1]}, "does not fit an array of shape"),
        ({"step": "normalise", "mean": [0, 0], "std": [1, 1]}, "2 values for axis -1"),
        ({"step": "resize", "height": 2, "width": 2}, "preprocessing step 0"),
    ],
)
def test_a_step_that_does_not_fit_says_which(step: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        run([step], x=np.ones((2, 3), np.float32)[:, 0] if step["step"] == "resize" else np.ones((2, 3)))


@pytest.mark.parametrize(
    "step", [{"step": "blur"}, {"step": "scale"}, {"step": "scale", "factor": 1, "f": 2}]
)
def test_the_list_of_steps_is_closed(step: dict) -> None:
    with pytest.raises(ValidationError):
        Preprocessing(steps=[step])


def test_it_survives_json_and_a_plain_list() -> None:
    steps = [{"step": "scale", "factor": 0.5}, {"step": "pad_ids", "value": 1, "on": "ids"}]
    whole = Preprocessing.model_validate(steps)
    assert Preprocessing.model_validate_json(json.dumps({"steps": steps})) == whole
    assert Preprocessing.model_validate_json(whole.model_dump_json()) == whole
    assert not Preprocessing()
