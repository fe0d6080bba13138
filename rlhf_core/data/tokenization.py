"""Tokenizers, and texts as tokens."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_core.policy import first_line, model_source, quiet_transformers, require_model_source

EOS, PAD, UNKNOWN = "<eos>", "<pad>", "<unk>"
HUMAN_AND_ASSISTANT = (
    r"{% for message in messages %}"
    r"{{ '\n\n' ~ {'user': 'Human'}.get(message.role, message.role | capitalize) ~ ': ' ~ message.content }}"
    r"{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    r"{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
"""The chat template of tokenizers that are trained here: dialogues in the form of HH-RLHF."""


def _as_fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # "<eos>" in a sentence is text, and does not end it
    )


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerBase:
    """Return a tokenizer with one token a word, words being what single spaces separate."""
    vocabulary = {word: index for index, word in enumerate((EOS, PAD, UNKNOWN, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([EOS, PAD, UNKNOWN])
    return _as_fast(tokenizer)


def byte_pair_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """Train a byte-level byte-pair tokenizer; every string has an encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocabulary < len(alphabet) + 3:
        raise ValueError(f"vocabulary is {vocabulary}; a byte-pair vocabulary has at least {len(alphabet) + 3} tokens")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[EOS, PAD, UNKNOWN], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = _as_fast(tokenizer)
    fast.chat_template = HUMAN_AND_ASSISTANT
    return fast


def untrained_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer of single bytes, which renders messages as one will that is trained on the texts."""
    return byte_pair_tokenizer((), len(pre_tokenizers.ByteLevel.alphabet()) + 3)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; one without a padding token pads with its end-of-sequence token.

    Raises:
        FileNotFoundError: there is none at that name or folder.
        ValueError: it has no end-of-sequence token, so that no response could end.
    """
    require_model_source(path)
    try:
        with quiet_transformers():
            # Without the last one transformers asks on the terminal whether it may run code of the folder.
            tokenizer = AutoTokenizer.from_pretrained(model_source(path), trust_remote_code=False)
    except Exception as error:  # a damaged file shows as OSError, ValueError, KeyError, TypeError, or plain Exception
        raise FileNotFoundError(
            f"cannot load the tokenizer of {str(path)!r} ({type(error).__name__}: {first_line(error)}); "
            "it takes tokenizer.json and tokenizer_config.json as save_pretrained writes them"
        ) from None
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {str(path)!r} has no end-of-sequence token, so no response could end; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def saved_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return a tokenizer that a run has saved for itself."""
    with quiet_transformers():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_sentences(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int) -> list[list[int]]:
    """Return each text's tokens with the end-of-sequence token behind; longer texts are cut and have none."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id][:longest] for ids in encoded]


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, rendered: bool = False, begins: bool = False
) -> list[int]:
    """Return a text's tokens.

    Args:
        tokenizer: the tokenizer.
        text: a prompt or a completion.
        rendered: a chat template wrote it: its special tokens are meant, and an end-of-sequence token that stands last
            but for white space is the last token.
        begins: it begins the sequence: a tokenizer that puts a beginning-of-sequence token there by itself does so.
    """
    if not rendered:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*_beginning(tokenizer), *ids] if begins else ids
    # A template writes the beginning-of-sequence token itself, where there is one.
    stripped = text.rstrip()
    ends = bool(tokenizer.eos_token) and stripped.endswith(tokenizer.eos_token)
    return tokenizer(stripped if ends else text, add_special_tokens=False, split_special_tokens=False)["input_ids"]


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Return each prompt's tokens.

    Raises:
        ValueError: there is no prompt, or one has no token in this vocabulary.
    """
    if not prompts:
        raise ValueError("the sentences give no prompt: none has more than a few words; give longer ones")
    encoded = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ValueError(f"the tokenizer has no token for the prompt {prompt!r}; take one that covers the data")
    return encoded


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Raise ValueError when the tokenizer has more tokens than the model."""
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {vocabulary}; "
            "take the model's own tokenizer, or enlarge the model with resize_token_embeddings"
        )
