"""Sentences, tokenizers, batches: everything between a file and a tensor."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_core.policy import first_line, quiet_transformers, require_model_source
from rlhf_core.seeding import permutation

EOS, PAD, UNKNOWN = "<eos>", "<pad>", "<unk>"

Part = Literal["reward", "evaluator", "held_out"]


@dataclass(frozen=True)
class Labelled:
    """A sentence and whether it is positive."""

    text: str
    positive: bool


def read_sentences(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file that hold something, stripped; a byte-order mark is no part of them.

    Raises:
        ValueError: the file is not UTF-8, or holds no sentence.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
    sentences = [line.strip() for line in text.split("\n") if line.strip()]
    if not sentences:
        raise ValueError(f"{path} holds no sentence; it must have one a line")
    return sentences


def read_labelled(folder: Path) -> list[Labelled]:
    """Return the sentences of every ``*.pos`` and ``*.neg`` file of a folder, in the order of the files' names.

    A sentence that occurs twice is kept once, so that no split can see it from both sides; one that stands under both
    labels is kept under the first.

    Raises:
        FileNotFoundError: the folder, or one of the two kinds of file, is missing.
        ValueError: a file is empty or not UTF-8.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no data folder {str(folder)!r}; give a folder with a *.pos and a *.neg file")
    found: dict[str, Labelled] = {}
    for suffix, positive in (("pos", True), ("neg", False)):
        paths = sorted(folder.glob(f"*.{suffix}"))
        if not paths:
            label = "positive" if positive else "negative"
            raise FileNotFoundError(f"{folder} has no *.{suffix} file; put the {label} sentences there, one a line")
        for path in paths:
            for text in read_sentences(path):
                found.setdefault(text, Labelled(text, positive))
    return list(found.values())


def part_of(text: str) -> Part:
    """Return which part of the data a sentence belongs to: a stable function of its content.

    A tenth is held out of everything; the rest is halved between the reward model and the evaluator.
    """
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 20
    if bucket < 2:
        return "held_out"
    return "reward" if bucket % 2 == 0 else "evaluator"


def split(sentences: Iterable[Labelled]) -> dict[Part, list[Labelled]]:
    """Return the sentences by part.

    Raises:
        ValueError: a part has no sentence of one of the labels.
    """
    parts: dict[Part, list[Labelled]] = {"reward": [], "evaluator": [], "held_out": []}
    for sentence in sentences:
        parts[part_of(sentence.text)].append(sentence)
    for name, members in parts.items():
        if len({member.positive for member in members}) < 2:
            raise ValueError(
                f"the part {name!r} of the data has {len(members)} sentences and not both labels; "
                "give more sentences (a few hundred of each label at the least)"
            )
    return parts


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
    return _as_fast(tokenizer)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; one without a padding token pads with its end-of-sequence token.

    Raises:
        FileNotFoundError: there is none at that name or folder.
        ValueError: it has no end-of-sequence token, so that no response could end.
    """
    require_model_source(path)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(path)
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


def encode_sentences(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int) -> list[list[int]]:
    """Return each text's tokens with the end-of-sequence token behind; longer texts are cut and have none."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id][:longest] for ids in encoded]


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


def right_pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [B, L] ids and attention mask, padded on the right."""
    width = max(map(len, sequences))
    ids = [[*sequence, *([pad_id] * (width - len(sequence)))] for sequence in sequences]
    mask = [[1] * len(sequence) + [0] * (width - len(sequence)) for sequence in sequences]
    return torch.tensor(ids), torch.tensor(mask)


def batches(lengths: Sequence[int], batch_size: int, seed: int, purpose: str) -> Iterator[list[int]]:
    """Yield batches of row numbers for ever: each epoch is shuffled, and batches hold rows of similar length.

    Within an epoch, pools of 16 batches are sorted by length and their batches shuffled again, which leaves little
    padding and keeps batches random. What an epoch leaves over is dropped; fewer rows than a batch give one batch.
    """
    n = len(lengths)
    size = min(batch_size, n)
    epoch = 0
    while True:
        order = permutation(seed, purpose, n, epoch)
        pool_size = 16 * size
        pooled: list[list[int]] = []
        for start in range(0, n, pool_size):
            pool = sorted(order[start : start + pool_size].tolist(), key=lambda row: lengths[row])
            pooled += [pool[at : at + size] for at in range(0, len(pool) - size + 1, size)]
        for place in permutation(seed, f"{purpose}/batches", len(pooled), epoch):
            yield pooled[place]
        epoch += 1


def prompt_rows(n_prompts: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the rows of step ``step`` (from 1): successive places of one shuffled epoch after the other."""
    first = (step - 1) * batch_size
    rows = []
    for place in range(first, first + batch_size):
        epoch, within = divmod(place, n_prompts)
        rows.append((epoch, within))
    orders = {epoch: permutation(seed, "prompts", n_prompts, epoch) for epoch in sorted({epoch for epoch, _ in rows})}
    return [int(orders[epoch][within]) for epoch, within in rows]
