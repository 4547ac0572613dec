"""What is wrong with a config or a checkpoint is said in words, with the place and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_hf.models import HFStudent, HFTeacher

from kdcore.errors import InputError
from kdcore.types import Batch

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LLAMA = {"model_type": "llama", **SMALL}


@pytest.mark.parametrize(
    "options, place, said",
    [
        ({}, "student", "needs a config or a checkpoint"),
        ({"checkpoint": "gpt2"}, "student.checkpoint", "nothing is downloaded"),
        ({"config": "no/such/config.json"}, "student.config", "nothing is downloaded"),
        ({"config": SMALL}, "student.config", "needs model_type"),
        ({"config": {"model_type": "lama"}}, "student.config.model_type", "did you mean 'llama'"),
        ({"config": {**LLAMA, "hiden_size": 8}}, "student.config.hiden_size", "did you mean 'hidden_size'"),
        ({"config": {**LLAMA, "hidden_size": "wide"}}, "student.config", "hidden_size"),
        ({"config": {**LLAMA, "hidden_size": 15}}, "student.config", "15"),
        (
            {"config": {**LLAMA, "attn_implementation": "someone/kernel"}},
            "student.config.attn_impl",
            "downloaded",
        ),
        ({"config": LLAMA, "head": "image-classification"}, "student.head", "causal-lm, text-classification"),
        ({"config": {**SMALL, "model_type": "bert"}}, "student.head", "causal-lm, text-classification"),
        (
            {"config": {**SMALL, "model_type": "bert"}, "head": "causal-lm"},
            "student.head",
            "sees later tokens",
        ),
        ({"config": {"model_type": "vit"}, "unembed": True}, "student.unembed", "causal language"),
    ],
)
def test_in_words(options: dict[str, Any], place: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        HFStudent(**options)
    assert caught.value.place.startswith(place)
    assert said in str(caught.value)


def test_an_output_layer_that_is_not_understood_is_refused() -> None:
    """BERT's decoder transforms its hidden states before the last matrix product."""
    with pytest.raises(InputError, match="more between its hidden states and its logits"):
        HFStudent(config={**SMALL, "model_type": "bert", "is_decoder": True}, head="causal-lm", unembed=True)


def test_a_nested_config_is_checked_too() -> None:
    with pytest.raises(InputError) as caught:
        HFStudent(config={"model_type": "siglip", "vision_config": {"hiden_size": 8}})
    assert caught.value.place == "student.config.vision_config.hiden_size"


def saved(folder: Path) -> Path:
    HFStudent(config=LLAMA).module.save_pretrained(folder)
    return folder


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"weights are not in this checkpoint, first model\.layers\.1"
    ) as caught:
        HFTeacher(checkpoint=str(saved(tmp_path)), config={"num_hidden_layers": 2})
    assert caught.value.place == "teacher.checkpoint"


def test_weights_of_another_shape(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not in this checkpoint"):
        HFTeacher(checkpoint=str(saved(tmp_path)), config={"vocab_size": 62})


def test_a_damaged_file(tmp_path: Path) -> None:
    file = saved(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match="cannot be loaded"):
        HFTeacher(checkpoint=str(tmp_path))


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    file = saved(tmp_path) / "model.safetensors"
    file.unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no \.safetensors file"):
        HFTeacher(checkpoint=str(tmp_path))


def test_a_model_of_somebodys_own_code(tmp_path: Path) -> None:
    tree = {"model_type": "theirs", "auto_map": {"AutoConfig": "configuration_theirs.TheirsConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(tree), "utf-8")
    with pytest.raises(InputError, match="is never run"):
        HFTeacher(checkpoint=str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_file_that_is_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"JSON|no table"):
        HFStudent(config=str(file))


def test_a_config_file_is_read(tmp_path: Path) -> None:
    file = saved(tmp_path) / "config.json"
    for given in (file, tmp_path):
        assert HFStudent(config=str(given)).module.config.hidden_size == 16


def test_a_batch_without_tokens() -> None:
    with pytest.raises(InputError, match="no 'input_ids'") as caught:
        HFStudent(config=LLAMA)(Batch({"input": torch.zeros(1, 4)}))
    assert caught.value.allowed == "input"


def test_labels_of_another_length() -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(InputError, match="one label for each token"):
        HFStudent(config=LLAMA)(Batch({"input_ids": ids, "target": ids[:, 1:]}))
