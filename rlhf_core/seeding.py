"""Seeds, and random numbers that depend on what they are for and not on when they are drawn."""

import random
import zlib
from typing import Protocol

import numpy as np
import torch


def set_all_seeds(seed: int) -> None:
    """Seed Python, NumPy, torch and CUDA, and make torch refuse what is not deterministic; TF32 off."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - a user's reward may draw from the legacy generator
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    # Not a part of determinism but a check for it: writing NaN into all new memory took a tenth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False


def stream(seed: int, purpose: str, *counter: int) -> np.random.Generator:
    """Return a generator that belongs to (seed, purpose, counter) alone.

    Philox 4x64-10 is keyed by the seed and the purpose, and the counter selects a place in its 2**256 draws (Salmon et
    al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so no draw depends on any other draw: there is no
    state to save, to share between workers or to get out of step on resume.

    Args:
        seed: the run's seed, in [0, 2**63).
        purpose: what the numbers are for, as in ``"shuffle"``.
        counter: up to three whole numbers from 0, such as (step, sample).

    Raises:
        ValueError: there are more counters.
        OverflowError: the seed or a counter is negative.
    """
    if len(counter) > 3:
        raise ValueError(f"a stream has at most three counters, and {counter} are {len(counter)}")
    # The lowest word counts the draws within the stream; the caller's counters take the words above it.
    words = [0, *counter, *([0] * (3 - len(counter)))]
    key = np.array([seed, zlib.crc32(purpose.encode())], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array(words, dtype=np.uint64)))


class UniformSource(Protocol):
    """Gives the sampler its uniforms."""

    def uniforms(self, position: int) -> torch.Tensor:
        """Return float64 uniforms in [0, 1), one a row, for the token at ``position`` of each response."""
        ...


class CounterUniforms:
    """Uniforms keyed by (seed, step, sample, position).

    A completion is a function of its own key: not of the other rows of its batch, their order or their number.
    """

    def __init__(self, seed: int, purpose: str, step: int, samples: np.ndarray, length: int) -> None:
        """Draw the uniforms of every position beforehand.

        Args:
            seed: the run's seed.
            purpose: the stream's name, as in ``"rollout"``.
            step: the PPO step.
            samples: [B] whole numbers that identify the rows.
            length: number of positions.
        """
        rows = [raw_uniforms(seed, purpose, step, int(sample), length) for sample in samples]
        self._uniforms_BT = torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, length, dtype=torch.float64)

    def uniforms(self, position: int) -> torch.Tensor:
        """Return [B] float64 uniforms for ``position``."""
        return self._uniforms_BT[:, position]


def raw_uniforms(seed: int, purpose: str, step: int, sample: int, length: int) -> np.ndarray:
    """Return the first ``length`` uniforms of a stream, made from raw bits so that NumPy's version cannot matter."""
    raw = stream(seed, purpose, step, sample).bit_generator.random_raw(length)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


class GeneratorUniforms:
    """Uniforms drawn one position after the other from a ``torch.Generator``."""

    def __init__(self, generator: torch.Generator, batch_size: int) -> None:
        self._generator = generator
        self._batch_size = batch_size

    def uniforms(self, position: int) -> torch.Tensor:
        """Return [B] float64 uniforms; ``position`` is where the generator stands already."""
        device = self._generator.device
        return torch.rand(self._batch_size, generator=self._generator, dtype=torch.float64, device=device)


def permutation(seed: int, purpose: str, n: int, *counter: int) -> np.ndarray:
    """Return a shuffled ``arange(n)`` that belongs to (seed, purpose, counter).

    It sorts 64-bit draws rather than calling ``Generator.permutation``, whose stream NumPy may change.
    """
    draws = stream(seed, purpose, *counter).bit_generator.random_raw(n)
    return np.argsort(draws, kind="stable")


def rng_state() -> dict[str, torch.Tensor]:
    """Return the state of the global generators of torch (CPU and current GPU), NumPy and Python, as tensors.

    The trainer draws from streams alone; a reward function or a model of somebody else may draw from these.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    version, words, python_gauss = random.getstate()
    assert (kind, version) == ("MT19937", 3)
    state = {
        "torch": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_position": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "python_words": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if python_gauss is None else [python_gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restore what :func:`rng_state` returned."""
    torch.set_rng_state(state["torch"])
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))  # noqa: NPY002
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python_words"].tolist()), gauss[0] if gauss else None))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
