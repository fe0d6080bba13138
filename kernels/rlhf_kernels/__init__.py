"""Native kernels for RLHF: GAE, token log-probabilities, sampling and whitening.

Each function has one signature and several backends; `reference` is obvious torch code and defines the meaning, the
others are fast and give the same bits on every x86-64 processor and for any number of threads.
"""

from rlhf_kernels.api import SampledTokens, gae, linear_token_logprobs, sample_tokens, token_logprobs, whiten
from rlhf_kernels.dense import gelu, layer_norm, rms_norm, silu, sum_of_squares, sums_of_squares
from rlhf_kernels.dispatch import BackendUnavailableError, KernelFallbackWarning, available_backends
from rlhf_kernels.products import linear

__all__ = [
    "BackendUnavailableError",
    "KernelFallbackWarning",
    "SampledTokens",
    "available_backends",
    "gae",
    "gelu",
    "layer_norm",
    "linear",
    "linear_token_logprobs",
    "rms_norm",
    "sample_tokens",
    "silu",
    "sum_of_squares",
    "sums_of_squares",
    "token_logprobs",
    "whiten",
]
