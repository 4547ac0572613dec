"""What a transformers model says of a batch, with target and mask aligned; and what it must be for that."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcore.errors import InputError
from kdcore.types import Batch, Outputs, Unembed

IGNORE = -100


class OutputLayer(NamedTuple):
    """What a model does between its last matrix product and its logits (``kdcore.types.Unembed``)."""

    softcap: float | None = None
    scale: float = 1.0


def next_tokens(batch: Batch) -> Tensor:
    """int64 [B, L]: at position i the label of token i + 1, which the logits of position i predict.

    Labels are ``target``, one for each token and not shifted, or else the tokens themselves. IGNORE stands
    at the last position, where the label is IGNORE, and where token i or i + 1 is padding (mask 0).
    """
    ids, real = batch["input_ids"], batch.get("attention_mask")
    labels = batch.get("target", ids)
    if labels.shape != ids.shape:
        raise InputError(
            "data.source",
            "target needs one label for each token",
            given=tuple(labels.shape),
            allowed=str(tuple(ids.shape)),
        )
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if real is None:
        return target
    both = real.bool() & F.pad(real[:, 1:].bool(), (0, 1))
    return target.masked_fill(~both, IGNORE)


def answer(
    module: PreTrainedModel, values: Mapping[str, Any], target: Tensor | None, apart: OutputLayer | None
) -> Outputs:
    """What the model says of ``values``: logits [B, C] or [B, L, V], with ``apart`` hidden states instead."""
    outputs = Outputs(target=target, mask=None if target is None else target != IGNORE)
    if apart is None:
        outputs.logits = module(**values).logits
    else:
        outputs.unembed = _unembed(module, values, apart)
    return outputs


def output_layer(module: PreTrainedModel, place: str) -> OutputLayer:
    """Soft cap and scale of a causal language model's logits: from its config, tried on a few tokens.

    Raises InputError where hidden states and output layer do not give the model's own logits.
    """
    layer, config = module.get_output_embeddings(), module.config.get_text_config()
    if isinstance(layer, nn.Linear) and module.base_model is not module:
        softcap, scaling = (
            getattr(config, "final_logit_softcapping", None),
            getattr(config, "logits_scaling", None),
        )
        factors = [getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier")]
        # Granite divides by logits_scaling, HyperCLOVA X multiplies
        scales = [1.0, *factors, scaling, 1 / scaling if scaling else None]
        with _probing(module, place) as ids:
            own = module(ids, **no_cache(module)).logits
            for apart in (OutputLayer(softcap, float(scale)) for scale in scales if scale):
                made = _unembed(module, {"input_ids": ids, **no_cache(module)}, apart)
                if _close(made.logits(), own, single=1e-3, half=5e-2):
                    return apart
    raise InputError(
        f"{place}.unembed",
        f"{module.config.model_type} does more between its hidden states and its logits than is known here",
        hint="take unembed out: losses then read its logits",
    )


def check_causal(module: PreTrainedModel, place: str) -> None:
    """Raise InputError where a token changes logits before it: such a model sees what it should predict."""
    with _probing(module, place) as ids:
        other = ids.clone()
        other[:, -1] = (other[:, -1] + 1) % module.get_input_embeddings().num_embeddings
        before, after = (module(x, **no_cache(module)).logits[:, :-1] for x in (ids, other))
    # causal models differ by rounding at most, untrained encoders by little more than that
    if not _close(before, after, single=1e-5, half=1e-2):
        raise InputError(
            f"{place}.head",
            f"this {module.config.model_type} is no causal language model: its attention sees later tokens",
            hint="is_decoder = true in its config makes it one",
        )


def no_cache(module: PreTrainedModel) -> dict[str, bool]:
    """Keyword arguments of a plain forward: nothing is generated, so no keys and values are kept."""
    return {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}


def outputs_of(module: PreTrainedModel, head: str) -> int:
    """The size of the logits' last axis: labels, or rows of the vocabulary."""
    return int(
        module.get_input_embeddings().num_embeddings if head == "causal-lm" else module.config.num_labels
    )


def _unembed(module: PreTrainedModel, values: Mapping[str, Any], apart: OutputLayer) -> Unembed:
    layer = module.get_output_embeddings()
    hidden = module.base_model(**values).last_hidden_state
    return Unembed(hidden, layer.weight, layer.bias, apart.softcap, apart.scale)


@contextmanager
def _probing(module: PreTrainedModel, place: str) -> Iterator[Tensor]:
    """A few token ids [1, <= 8] to try the model on, in eval mode and without gradient."""
    rows = module.get_input_embeddings().num_embeddings
    length = min(8, getattr(module.config.get_text_config(), "max_position_embeddings", None) or 8)
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield torch.arange(length)[None] % rows
    except Exception as error:  # a config that was accepted may still fail in any layer
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"{place}.config", f"the model fails on {length} tokens: {said}") from error
    finally:
        module.train(training)


def _close(one: Tensor, other: Tensor, single: float, half: float) -> bool:
    """Equal up to a share of the largest: ``single`` for float32 and wider, ``half`` below."""
    share = single if other.dtype in (torch.float32, torch.float64) else half
    return bool((one.float() - other.float()).abs().max() <= share * other.float().abs().max())
