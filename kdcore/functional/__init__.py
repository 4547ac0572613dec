"""Pure functions that losses share: divergences, chunked over large vocabularies too; masked means."""

from .chunked import chunked as chunked
from .divergences import DIVERGENCES as DIVERGENCES
from .divergences import adaptive_kl as adaptive_kl
from .divergences import alpha_divergence as alpha_divergence
from .divergences import decoupled_kl as decoupled_kl
from .divergences import forward_kl as forward_kl
from .divergences import generalized_js as generalized_js
from .divergences import hellinger as hellinger
from .divergences import interpolated_kl as interpolated_kl
from .divergences import jeffreys as jeffreys
from .divergences import js as js
from .divergences import kl_divergence as kl_divergence
from .divergences import reverse_kl as reverse_kl
from .divergences import skew_forward_kl as skew_forward_kl
from .divergences import skew_reverse_kl as skew_reverse_kl
from .divergences import total_variation as total_variation
from .rows import Unembed as Unembed
from .rows import align_vocabularies as align_vocabularies
from .rows import at_least_float32 as at_least_float32
from .rows import masked_mean as masked_mean
from .topk import from_topk as from_topk
from .topk import topk_rows as topk_rows
