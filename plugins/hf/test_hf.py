"""Wrapped models against transformers itself: alignment, losses, hidden states, export, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kd_plugin_hf.models import HFStudent, HFTeacher
from torch import Tensor

from kdcore.errors import KDError
from kdcore.functional import chunked, forward_kl
from kdcore.kinds import Deployed
from kdcore.tables import TaskTable
from kdcore.taps import Taps
from kdcore.task import Task
from kdcore.types import Batch, Outputs

V = 61
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA = {"model_type": "llama", **SIZES}
QWEN = {"model_type": "qwen2", "tie_word_embeddings": True, **SIZES}
GPT2 = {"model_type": "gpt2", "vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
BERT = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"} | {"model_type": "bert"}
VIT = {"model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 5}
VIT |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def student(config: dict[str, Any], **options: Any) -> HFStudent:
    torch.manual_seed(0)
    return HFStudent(config=config, **options).eval()


def padded(seed: int = 0, rows: int = 3, length: int = 9, left: bool = False) -> Batch:
    """Tokens with padding at one end, and some labels left out."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (rows, length), generator=rng)
    real = torch.arange(length) < torch.tensor([length, length - 2, 4])[:, None]
    real = real.flip(1) if left else real
    ids = ids.masked_fill(~real, 0)
    target = ids.masked_fill(~real | (torch.rand(ids.shape, generator=rng) < 0.2), -100)
    return Batch(
        {"id": torch.arange(rows), "input_ids": ids, "attention_mask": real.long(), "target": target}
    )


def mean_over_tokens(term: Tensor, outputs: Outputs) -> Tensor:
    assert outputs.mask is not None
    return term[outputs.mask].mean()


@pytest.mark.parametrize("config", [LLAMA, QWEN, GPT2], ids=lambda c: str(c["model_type"]))
def test_the_task_loss_is_what_transformers_computes_from_labels(config: dict[str, Any]) -> None:
    model, batch = student(config), padded()
    outputs = model(batch)
    values = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    own = model.module(**values, labels=batch["target"])
    term = Task(TaskTable(use="language"), None).terms(outputs, batch)
    assert term is not None
    assert mean_over_tokens(term, outputs).item() == pytest.approx(own.loss.item(), abs=1e-6)
    torch.testing.assert_close(outputs.logits, own.logits, rtol=0, atol=0)


def test_logits_at_a_position_predict_the_target_there() -> None:
    batch = padded()
    outputs = student(LLAMA)(batch)
    labels = batch["target"]
    for row in range(3):
        for i in range(8):
            judged = batch["attention_mask"][row, i] and batch["attention_mask"][row, i + 1]
            expected = labels[row, i + 1].item() if judged else -100
            assert outputs.target[row, i].item() == expected
    assert (outputs.target[:, -1] == -100).all()
    assert torch.equal(outputs.mask, outputs.target != -100)
    assert 0 < outputs.mask.sum() < outputs.mask.numel()


def test_the_mask_is_known_before_any_forward() -> None:
    model, batch = student(LLAMA), padded()
    assert torch.equal(model.supervised(batch), model(batch).mask)
    assert student(VIT).supervised(Batch({"input": torch.zeros(2, 1, 8, 8)})) is None


def test_padding_changes_nothing_that_counts() -> None:
    model, batch = student(LLAMA), padded()
    task = Task(TaskTable(use="language"), None)
    other = batch.copy()
    other["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)
    other["target"] = torch.where(batch["attention_mask"] == 0, 7, batch["target"])
    one, two = (task.terms(model(b), b) for b in (batch, other))
    torch.testing.assert_close(one, two)
    short = Batch({"input_ids": batch["input_ids"][2:, :4], "target": batch["target"][2:, :4]})
    torch.testing.assert_close(task.terms(model(short), short)[0, :3], one[2, :3])


def test_padding_on_the_left_is_no_context_for_the_first_token() -> None:
    model, batch = student(LLAMA), padded(left=True)
    outputs = model(batch)
    labels = batch["target"].clone()
    labels[2, 5], labels[1, 2] = -100, -100  # the first real token: predicted from padding alone
    own = model.module(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    term = Task(TaskTable(use="language"), None).terms(outputs, batch)
    assert mean_over_tokens(term, outputs).item() == pytest.approx(own.loss.item(), abs=1e-6)


def test_without_labels_the_tokens_are_the_labels() -> None:
    model, ids = student(LLAMA), padded()["input_ids"]
    outputs = model(Batch({"input_ids": ids}))
    own = model.module(ids, labels=ids)
    loss = F.cross_entropy(outputs.logits.flatten(0, 1), outputs.target.flatten())
    assert loss.item() == pytest.approx(own.loss.item(), abs=1e-6)
    assert torch.equal(outputs.target[:, :-1], ids[:, 1:])


def test_taps_are_aligned_with_logits_and_mask() -> None:
    model, batch = student(LLAMA), padded()
    taps = Taps(model.model, {"middle": "model.layers.0"})
    with taps.reading() as seen:
        outputs = model(batch)
    values = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    own = model.module(**values, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(seen["middle"], own)
    assert seen["middle"].shape[:2] == outputs.mask.shape


HEADS = [
    LLAMA,
    QWEN,
    GPT2,
    {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 0.1, **SIZES},
    {"model_type": "cohere", "logit_scale": 0.25, **SIZES},
    {"model_type": "granite", "logits_scaling": 4.0, **SIZES},
    {"model_type": "hyperclovax", "logits_scaling": 4.0, **SIZES},
]


@pytest.mark.parametrize("config", HEADS, ids=lambda c: str(c["model_type"]))
def test_hidden_states_and_output_layer_give_the_models_own_logits(config: dict[str, Any]) -> None:
    batch = padded()
    dense, apart = student(config), student(config, unembed=True)
    outputs = apart(batch)
    assert outputs.logits is None
    logits = dense.module(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(apart.infer(outputs)["logits"], logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(outputs.target, dense(batch).target)


@pytest.mark.parametrize("config", [LLAMA, HEADS[3], HEADS[5]], ids=lambda c: str(c["model_type"]))
def test_losses_in_chunks_are_the_dense_ones_and_so_are_their_gradients(config: dict[str, Any]) -> None:
    batch, task = padded(), Task(TaskTable(use="language", label_smoothing=0.1), None)
    teacher = student({**config, "initializer_range": 0.3})(batch).logits.detach()
    theirs = student({**config, "initializer_range": 0.3}, unembed=True)(batch).unembed
    dense, apart = student(config), student(config, unembed=True)
    outputs = dense(batch)
    sums = [forward_kl(outputs.logits, teacher)[outputs.mask].sum(), task.terms(outputs, batch).sum()]
    chunks = apart(batch)
    kl = chunked(forward_kl, chunks.unembed, theirs, chunks.mask)
    for one, two in zip(sums, [kl.sum(), task.terms(chunks, batch).sum()], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
        dense.zero_grad()
        apart.zero_grad()
        one.backward(retain_graph=True)
        two.backward(retain_graph=True)
        for mine, other in zip(dense.parameters(), apart.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_generate_is_transformers_own() -> None:
    model, ids = student(LLAMA), padded()["input_ids"][:1]
    found = model.generate(Batch({"input_ids": ids}), max_new_tokens=3, do_sample=False)
    assert found.shape[0] == 1
    assert torch.equal(found[:, :9], ids)
    assert found[0, 9] == model(Batch({"input_ids": ids})).logits[0, -1].argmax()
    with pytest.raises(KDError, match="does not generate"):
        student(VIT).generate(Batch({"input": torch.zeros(1, 1, 8, 8)}))


@pytest.mark.parametrize("name", ["input", "pixel_values"])
def test_images(name: str) -> None:
    model, images = student(VIT), torch.rand(4, 1, 8, 8)
    batch = Batch({name: images, "target": torch.tensor([0, 4, 1, 2])})
    outputs = model(batch)
    own = model.module(images, labels=batch["target"])
    torch.testing.assert_close(outputs.logits, own.logits)
    assert outputs.mask is None
    term = Task(TaskTable(), 5).terms(outputs, batch)
    assert term.mean().item() == pytest.approx(own.loss.item(), abs=1e-6)
    assert list(model.inputs(batch)) == [name]


def test_text_classification() -> None:
    model, batch = student({**BERT, "num_labels": 3}, head="text-classification"), padded()
    batch["target"] = torch.tensor([0, 2, 1])
    own = model.module(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["target"])
    outputs = model(batch)
    assert outputs.logits.shape == (3, 3)
    assert Task(TaskTable(), 3).terms(outputs, batch).mean().item() == pytest.approx(
        own.loss.item(), abs=1e-6
    )


@pytest.mark.parametrize("unembed", [False, True])
def test_what_is_deployed_answers_as_the_student_at_any_size(unembed: bool) -> None:
    model, batch = student(LLAMA, unembed=unembed), padded()
    module, inputs = model.deploy(), model.inputs(batch)
    assert isinstance(module, Deployed)
    shapes, axes = model.shapes(inputs)
    assert shapes == dict.fromkeys(("input_ids", "attention_mask"), ("batch", "length"))
    assert axes["length"] == (1, 9)
    dims = tuple({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for _ in inputs)
    graph = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=(dims,)).module()
    for rows, length in ((3, 9), (2, 5)):
        part = Batch({k: v[:rows, :length] for k, v in batch.items() if k != "id"})
        torch.testing.assert_close(
            graph(*model.inputs(part).values())["logits"],
            model.infer(model(part))["logits"],
            rtol=1e-5,
            atol=1e-5,
        )


def test_a_checkpoint_folder_gives_the_same_model_back(tmp_path: Path) -> None:
    model, batch = student(LLAMA), padded()
    model.module.save_pretrained(tmp_path)
    teacher = HFTeacher(checkpoint=str(tmp_path)).eval()
    torch.testing.assert_close(teacher(batch).logits, model(batch).logits, rtol=0, atol=0)
    shallow = HFStudent(checkpoint=str(tmp_path), config={"num_hidden_layers": 1})
    assert len(shallow.module.model.layers) == 1
    assert torch.equal(shallow.module.lm_head.weight, model.module.lm_head.weight)
    half = HFTeacher(checkpoint=str(tmp_path), dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_shipped_student_is_a_checkpoint_of_its_config(tmp_path: Path) -> None:
    from kdcore.checkpoint import save_tensors

    model, batch = student(QWEN), padded()
    save_tensors(tmp_path / "student.safetensors", model.parameters_to_ship())
    torch.manual_seed(1)
    again = HFTeacher(config=QWEN, checkpoint=str(tmp_path / "student.safetensors")).eval()
    torch.testing.assert_close(again(batch).logits, model(batch).logits, rtol=0, atol=0)


def test_a_new_head_on_a_checkpoint_must_be_asked_for(tmp_path: Path) -> None:
    model = student(VIT)
    model.module.save_pretrained(tmp_path)
    wider = HFStudent(checkpoint=str(tmp_path), config={"num_labels": 7}, fresh=["classifier.*"])
    assert wider.module.classifier.weight.shape == (7, 16)
    ours, theirs = wider.module.vit.state_dict(), model.module.vit.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_teacher_is_trained_as_a_student_of_its_own_module() -> None:
    teacher = HFTeacher(config=LLAMA)
    trainee = teacher.trainee()
    assert trainee.model is teacher.model
    assert {id(p) for p in trainee.parameters()} == {id(p) for p in teacher.parameters()}
    teacher.eval()
    trainee.eval()
    torch.testing.assert_close(trainee(padded()).logits, teacher(padded()).logits)
