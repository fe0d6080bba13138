"""Language models as policies: building, loading, and the forward pass over response positions.

Shape suffixes: B sequences, L positions of prompt and response together, T response positions, V vocabulary, D width.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.config import ModelConfig
from rlhf_core.hub import require_hub_model
from rlhf_core.layers import exchange_layers
from rlhf_core.numerics import is_portable


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Build a causal language model of the configured shape, with weights drawn from torch's global generator."""
    common = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    if config.architecture == "llama":
        shape = AutoConfig.for_model(
            "llama",
            hidden_size=config.hidden_size,
            intermediate_size=round_up(config.hidden_size * 8 // 3, 32),
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.context,
            **common,
        )
    else:
        shape = AutoConfig.for_model(
            "gpt2",
            n_embd=config.hidden_size,
            n_layer=config.layers,
            n_head=config.heads,
            n_positions=config.context,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
    model = AutoModelForCausalLM.from_config(shape, attn_implementation=config.attention, dtype=torch.float32)
    return as_computed_here(model)


def as_computed_here(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model in evaluation mode and, unless numerics are portable, with this kit's layers."""
    if not is_portable():
        exchange_layers(model)
    return model.eval()


def round_up(value: int, multiple: int) -> int:
    """Return the least multiple that is not below ``value``."""
    return -(-value // multiple) * multiple


def load_model(path: str | Path, attention: str) -> PreTrainedModel:
    """Load a causal language model from a folder or by hub name, in float32, from safetensors.

    Raises:
        FileNotFoundError: it is neither a folder here nor to be had from the hub, or has no safetensors weights.
        ValueError: it is not a causal language model that transformers can load, or is a reward model or quantized; or
            its weights are damaged, missing or of other shapes than its configuration says: transformers would draw
            those at random.
    """
    model = load_pretrained(AutoModelForCausalLM, path, attention)
    names = [] if model.config.architectures is None else model.config.architectures
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"cannot load model {str(path)!r}: architectures in its config.json is {names!r}; it must be a list of "
            "names; correct it or save it again"
        )
    classifiers = [name for name in names if name.endswith("ForSequenceClassification")]
    if classifiers:  # with tied embeddings no weight of a language model is missing in it
        raise ValueError(
            f"model {str(path)!r} is a {classifiers[0]}, a reward model; give a language model, as rlhf sft makes one"
        )
    return model


def load_pretrained(kind: Any, path: str | Path, attention: str, **options: Any) -> PreTrainedModel:
    """Load a model of a transformers class, as :func:`load_model` does a causal language model."""
    require_model_source(path)
    problem = f"cannot load model {str(path)!r}"
    try:
        with quiet_transformers():
            result: Any = kind.from_pretrained(
                model_source(path),
                dtype=torch.float32,
                attn_implementation=attention,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,  # without it transformers asks on the terminal
                **options,
            )
    except SafetensorError as error:
        raise ValueError(f"{problem}: its weights are damaged ({first_line(error)}); copy or save it again") from None
    except OSError as error:
        remedy = "it takes config.json and *.safetensors as save_pretrained writes them"
        raise FileNotFoundError(f"{problem}: {first_line(error)} ({remedy})") from None
    except ImportError as error:
        remedy = "a quantized model cannot be trained; give the one that it was made from"
        raise ValueError(f"{problem}: {first_line(error)} ({remedy})") from None
    except ValueError as error:
        raise ValueError(f"{problem}: {first_line(error)}") from None
    except Exception as error:  # a value in config.json that makes no sense shows as anything
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{problem}: its config.json makes no model ({why}); correct it or save it again") from None
    model, loaded = result
    if loaded["missing_keys"]:
        raise ValueError(f"{problem}: it has no weights for {min(loaded['missing_keys'])}; copy or save it again")
    if loaded["mismatched_keys"]:
        name, stored, wanted = min(loaded["mismatched_keys"])
        raise ValueError(f"{problem}: {name} is {tuple(stored)}, but {tuple(wanted)} by its config.json; save it again")
    return as_computed_here(model)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' report on a load off the terminal: what matters of it becomes an error."""
    logging = transformers.utils.logging
    level, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shows_bars:
            logging.enable_progress_bar()


def require_model_source(path: str | Path) -> None:
    """Raise FileNotFoundError unless ``path`` is a folder with a model's ``config.json`` or a model of the hub."""
    folder = Path(path)
    if folder.is_dir():
        folder = model_folder(folder)
        if (folder / "environment.json").is_file():
            raise FileNotFoundError(f"run {str(path)!r} has made no model yet; continue it with --resume")
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"model folder {str(path)!r} has no config.json; is it a transformers model?")
        return
    parts = str(path).split("/")
    if folder.is_absolute() or len(parts) > 2 or parts[0] in ("", ".", "..", "~"):
        raise FileNotFoundError(
            f"no model folder {str(path)!r}; give a folder written by save_pretrained or a hub name"
        )
    require_hub_model(str(path))


def model_folder(path: str | Path) -> Path:
    """Return where the model of a folder lies: in a run's folder its ``model``, or its newest checkpoint's policy.

    A pipeline's is that of its PPO stage.
    """
    folder = Path(path)
    if (folder / "ppo" / "config.json").is_file():
        folder /= "ppo"
    checkpoints = sorted(folder.glob("checkpoints/step_*/policy"), key=lambda one: (len(one.parent.name), one))
    inside = [folder / "model", *reversed(checkpoints)]
    return next((one for one in inside if (one / "config.json").is_file()), folder)


def model_source(path: str | Path) -> str | Path:
    """Return what transformers loads a model from: a folder, or a hub name as it is."""
    return model_folder(path) if Path(path).is_dir() else path


def first_line(error: Exception) -> str:
    """Return the first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def context_length(model: PreTrainedModel) -> int | None:
    """Return the longest sequence the model can take, or None when its configuration sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[None]:
    """Return the context in which the models run: bfloat16 products under ``bfloat16``, else as they are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def position_ids(attention_mask_BL: torch.Tensor) -> torch.Tensor:
    """Return [B, L] positions that count real tokens, so that left padding does not shift a sequence."""
    return (attention_mask_BL.cumsum(dim=1) - 1).clamp(min=0)


class ForwardArguments:
    """What a model's ``forward`` understands, looked up once."""

    def __init__(self, model: nn.Module) -> None:
        self._names = frozenset(inspect.signature(model.forward).parameters)

    def positions(self, attention_mask_BL: torch.Tensor, last: int | None = None) -> dict[str, torch.Tensor]:
        """Return ``position_ids``, for the last ``last`` columns; nothing for a model that derives its own."""
        if "position_ids" not in self._names:
            return {}
        ids = position_ids(attention_mask_BL)
        return {"position_ids": ids if last is None else ids[:, -last:]}

    def keep(self, positions: int | slice) -> dict[str, int | slice]:
        """Return the argument that limits the head to its last positions, or a slice; nothing where there is none."""
        return {"logits_to_keep": positions} if "logits_to_keep" in self._names else {}


def value_trunk(lm: PreTrainedModel) -> Any:
    """Return a copy of a language model's trunk, its token embeddings frozen."""
    trunk: Any = copy.deepcopy(lm.base_model)
    trunk.get_input_embeddings().requires_grad_(False)
    return trunk


Outputs = tuple[Literal["logits", "values"], ...]
"""What a pass through an :class:`ActorCritic` gives."""


class ActorCritic(nn.Module):
    """A policy and its value model, where there is one.

    ``shared`` puts a linear head on the policy's last hidden state; ``separate`` gives the head a copy of the trunk,
    which learns but for its token embeddings: those of a large vocabulary would be most of the copy's weights, and
    hardly any of them stand in a batch. None has no values. The head starts at zero: before any update every value
    is 0.
    """

    def __init__(self, lm: PreTrainedModel, value: Literal["shared", "separate"] | None) -> None:
        super().__init__()
        self.lm = as_computed_here(lm)
        self.value_trunk = value_trunk(lm) if value == "separate" else None
        self.value_head = nn.Linear(lm.config.get_text_config().hidden_size, 1) if value else None
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        if not is_portable():
            exchange_layers(self)
        self._arguments = ForwardArguments(lm)
        self.eval()  # dropout stays off: the ratio compares two passes of one function

    @property
    def has_value(self) -> bool:
        """Whether there is a value model."""
        return self.value_head is not None

    @property
    def outputs(self) -> Outputs:
        """All that a forward pass gives."""
        return ("logits", "values") if self.has_value else ("logits",)

    @property
    def passes(self) -> tuple[Outputs, ...]:
        """The outputs that share no weights that learn, each of which can have a forward and a backward pass alone."""
        return (self.outputs,) if self.value_trunk is None else (("logits",), ("values",))

    def forward(
        self,
        input_ids_BL: torch.Tensor,
        attention_mask_BL: torch.Tensor,
        response_length: int,
        outputs: Outputs | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the logits that predict the response tokens and the values of the states they are drawn in.

        Args:
            input_ids_BL: [B, L] left-padded prompts followed by right-padded responses.
            attention_mask_BL: [B, L] 1 on real tokens.
            response_length: T; the response takes the last T columns.
            outputs: one of :attr:`passes`, the other output being None; by default all.

        Returns:
            logits [B, T, V], and values [B, T] in the head's own precision, under autocast too; None without a head.
        """
        outputs = self.outputs if outputs is None else outputs
        tokens = {"input_ids": input_ids_BL, "attention_mask": attention_mask_BL, "use_cache": False}
        tokens |= self._arguments.positions(attention_mask_BL)
        logits_BTV = values_BT = hidden_BLD = None
        if "logits" in outputs:
            keep = self._arguments.keep(response_slice(response_length))
            shared = self.has_value and self.value_trunk is None
            output = self.lm(output_hidden_states=shared, **tokens, **keep)
            logits_BTV = predicting(output.logits, response_length)
            hidden_BLD = output.hidden_states[-1] if shared else None
        if "values" in outputs:
            if self.value_trunk is not None:
                hidden_BLD = self.value_trunk(**tokens).last_hidden_state
            assert hidden_BLD is not None
            values_BT = self.values(predicting(hidden_BLD, response_length))
        return logits_BTV, values_BT

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [...] the values of hidden states [..., D], in the head's own precision, under autocast too."""
        assert self.value_head is not None
        with torch.autocast(hidden.device.type, enabled=False):
            values: torch.Tensor = self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1)
        return values


def response_slice(response_length: int) -> slice:
    """Return the T positions before the last: what stands at position t predicts token t + 1."""
    return slice(-(response_length + 1), -1)


def predicting(x: torch.Tensor, response_length: int) -> torch.Tensor:
    """Return the positions of :func:`response_slice`, unless nothing else is there."""
    return x if x.shape[1] == response_length else x[:, response_slice(response_length)]


def response_logits(
    lm: PreTrainedModel,
    arguments: ForwardArguments,
    input_ids_BL: torch.Tensor,
    attention_mask_BL: torch.Tensor,
    response_length: int,
) -> torch.Tensor:
    """Return [B, T, V] the logits that predict the response tokens."""
    output = lm(
        input_ids=input_ids_BL,
        attention_mask=attention_mask_BL,
        use_cache=False,
        **arguments.positions(attention_mask_BL),
        **arguments.keep(response_slice(response_length)),
    )
    return predicting(output.logits, response_length)


class Reference(nn.Module):
    """The frozen policy that the KL penalty is measured against."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = as_computed_here(lm).requires_grad_(False)
        self._arguments = ForwardArguments(lm)

    def forward(
        self, input_ids_BL: torch.Tensor, attention_mask_BL: torch.Tensor, response_length: int
    ) -> torch.Tensor:
        """Return [B, T, V] the logits that predict the response tokens."""
        return response_logits(self.lm, self._arguments, input_ids_BL, attention_mask_BL, response_length)
