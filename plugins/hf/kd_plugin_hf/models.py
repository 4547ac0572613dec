"""The components: a transformers model as a teacher and as a student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from kd_plugin_hf.configs import Head
from kd_plugin_hf.heads import (
    OutputLayer,
    answer,
    check_causal,
    next_tokens,
    no_cache,
    output_layer,
    outputs_of,
)
from kd_plugin_hf.load import load_model
from kdcore.errors import InputError, KDError
from kdcore.kinds import Kind, Student, Teacher
from kdcore.types import Batch, Outputs

Dtype = Literal["float32", "bfloat16", "float16"]


class Wrapped(Kind):
    """A transformers model behind the core's contract.

    Batch: ``input_ids`` int64 [B, L] and, where there is padding, ``attention_mask`` [B, L]; for images
    ``pixel_values`` (or ``input``) [B, C, H, W]. A causal language model's outputs have length L, as its
    hidden states do: logits at i predict ``target[:, i]``, the token at i + 1, and the last position has no
    target. So logits, mask, target and taps are all aligned.
    """

    module: PreTrainedModel
    head: str
    input_names: tuple[str, ...]
    apart: OutputLayer | None = None
    options: dict[str, bool]

    def wrap(
        self, module: PreTrainedModel, head: str, inputs: list[str] | None, unembed: bool, place: str
    ) -> None:
        self.module, self.head, self.options = module, head, no_cache(module)
        own = ["pixel_values"] if head == "image-classification" else ["input_ids", "attention_mask"]
        self.input_names = tuple(own if inputs is None else inputs)
        if head == "causal-lm":
            check_causal(module, place)
        if unembed and head != "causal-lm":
            raise InputError(f"{place}.unembed", "is for causal language models", given=head)
        self.apart = output_layer(module, place) if unembed else None

    @property
    def model(self) -> Module:
        module: Module = self.module
        return module

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the exported graph takes, under the batch's names; with ``attention_mask`` in any case."""
        return {_key(batch, name): value for name, value in self._values(batch).items()}

    def _values(self, batch: Batch) -> dict[str, Tensor]:
        return {name: _value(batch, name) for name in self.input_names}

    def forward(self, batch: Batch) -> Outputs:
        values = {n: v for n, v in self._values(batch).items() if n != "attention_mask" or n in batch}
        target = next_tokens(batch) if self.head == "causal-lm" else None
        return answer(self.module, {**values, **self.options}, target, self.apart)

    def infer(self, outputs: Outputs) -> dict[str, Tensor]:
        if outputs.logits is None and outputs.unembed is not None:
            return {"logits": outputs.unembed.logits()}
        return {"logits": outputs["logits"]}

    def supervised(self, batch: Batch) -> Tensor | None:
        """Bool [B, L], the mask that ``forward`` will give, from the batch alone; None for classifiers."""
        return next_tokens(batch) != -100 if self.head == "causal-lm" else None

    def generate(self, batch: Batch, **options: Any) -> Tensor:
        """transformers' own generate on the batch's inputs, in the model's mode: tokens [B, L + new]."""
        if self.head != "causal-lm":
            raise KDError(f"a model with the head {self.head!r} does not generate")
        found: Tensor = self.module.generate(**self._values(batch), **options)
        return found


class HFTeacher(Wrapped, Teacher):
    """A transformers model as a teacher.

    ``config``: a table of ``model_type`` and that config's fields, or a local config.json; with a checkpoint
    folder, the fields that differ from its own. ``checkpoint``: a folder written by ``save_pretrained``, or a
    file of weights for ``config``. ``head``: what it predicts, where config or checkpoint do not tell.
    ``fresh``: patterns of weights that the folder may lack. ``unembed``: give hidden states and output layer
    instead of logits, for losses that read ``unembed``. ``inputs``: the batch keys that the model takes.
    """

    def __init__(
        self,
        *,
        config: dict[str, Any] | str | None = None,
        checkpoint: str | None = None,
        head: Head | None = None,
        dtype: Dtype = "float32",
        unembed: bool = False,
        fresh: list[str] | None = None,
        inputs: list[str] | None = None,
    ) -> None:
        super().__init__()
        found = load_model(config, checkpoint, head, dtype, fresh or (), "teacher")
        self.wrap(found.module, found.head, inputs, unembed, "teacher")

    def trainee(self) -> Student:
        return _Trainee(self)


class HFStudent(Wrapped, Student):
    """A transformers model as a student; the parameters are the teacher's."""

    def __init__(
        self,
        *,
        config: dict[str, Any] | str | None = None,
        checkpoint: str | None = None,
        head: Head | None = None,
        dtype: Dtype = "float32",
        unembed: bool = False,
        fresh: list[str] | None = None,
        inputs: list[str] | None = None,
    ) -> None:
        super().__init__()
        found = load_model(config, checkpoint, head, dtype, fresh or (), "student")
        self.wrap(found.module, found.head, inputs, unembed, "student")

    def setup(self) -> None:
        """The data's classes (or tokens) must have their place in the model, before any of them is met."""
        count, have = self.run.source.data.classes, outputs_of(self.module, self.head)
        language = self.head == "causal-lm"
        if count and (have < count if language else have != count):
            what, field = ("tokens", "vocab_size") if language else ("classes", "num_labels")
            said = f"the data has {count} {what}, the model {have}"
            raise InputError("data.source", said, hint=f"{field} = {count}")

    def shapes(
        self, inputs: Mapping[str, Tensor]
    ) -> tuple[dict[str, tuple[int | str, ...]], dict[str, tuple[int, int]]]:
        """Batch and, for text, length may vary; the length up to that of the data."""
        if self.head == "image-classification":
            return super().shapes(inputs)
        longest = max(value.shape[1] for value in inputs.values())
        return dict.fromkeys(inputs, ("batch", "length")), {
            "batch": self.export_batch,
            "length": (1, longest),
        }

    def parameters_to_ship(self) -> dict[str, Tensor]:
        """The weights under transformers' names."""
        return dict(self.module.state_dict())


class _Trainee(HFStudent):
    """A teacher's own module, trained on the task."""

    def __init__(self, teacher: HFTeacher) -> None:
        Student.__init__(self)
        self.module, self.head, self.input_names = teacher.module, teacher.head, teacher.input_names
        self.apart, self.options = teacher.apart, teacher.options


def _key(batch: Batch, name: str) -> str:
    """The batch's name for a model's input: images may be called ``input``."""
    return "input" if name == "pixel_values" and name not in batch else name


def _value(batch: Batch, name: str) -> Tensor:
    """A batch's value for a model's input; where there is no mask, every token counts."""
    key = _key(batch, name)
    if key == "attention_mask" and key not in batch:
        return _value(batch, "input_ids").new_ones(batch["input_ids"].shape)
    if key not in batch:
        raise InputError("data.source", f"the batch has no {name!r}", allowed=sorted(batch))
    value: Tensor = batch[key]
    return value
