"""The two tasks of ``rlhf train``: what the language model reads, and the prompts that it completes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlhf_core import reviews
from rlhf_core.config import TrainConfig
from rlhf_core.labelled import Labelled, Part, read_labelled, split
from rlhf_core.seeding import raw_uniforms
from rlhf_core.tokenization import byte_pair_tokenizer, load_tokenizer, word_tokenizer

EMBEDDED_SENTENCES = 20_000
EMBEDDED_PROMPTS = 2_048
EMBEDDED_PRETRAIN_STEPS = 900
SENTENCES_PRETRAIN_STEPS = 2_000


@dataclass(frozen=True)
class Task:
    """What a run works on."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    texts: Sequence[str]
    """What the language model is pre-trained on."""
    prompts: Sequence[str]
    held_out_prompts: Sequence[str]
    """Cut from sentences that no model has seen."""
    labelled: dict[Part, list[Labelled]] | None
    """The labelled sentences by part; None where the reward needs no training."""
    pretrain_steps: int
    """Enough to write the task's language."""


def load_task(config: TrainConfig) -> Task:
    """Return the embedded task, or the one made from ``config.data``.

    Raises:
        FileNotFoundError, ValueError: the data or the tokenizer cannot be used; the message says why.
    """
    return _embedded(config) if config.data is None else _sentences(config, Path(config.data))


def _embedded(config: TrainConfig) -> Task:
    generated = reviews.generate(config.seed, EMBEDDED_SENTENCES, "train")
    tokenizer = load_tokenizer(config.model.path) if config.model.path else word_tokenizer(reviews.VOCABULARY)
    held_out = reviews.prompts(config.seed, EMBEDDED_PROMPTS, "held_out")
    return Task(
        name="embedded",
        tokenizer=tokenizer,
        texts=[review.text for review in generated],
        prompts=distinct(reviews.prompts(config.seed, EMBEDDED_PROMPTS, "train")),
        held_out_prompts=distinct(held_out)[: max(1, config.log.evaluation_prompts)],
        labelled=None,
        pretrain_steps=EMBEDDED_PRETRAIN_STEPS,
    )


def distinct(texts: Sequence[str]) -> list[str]:
    """Return the texts without repetitions, in order."""
    return list(dict.fromkeys(texts))


def _sentences(config: TrainConfig, folder: Path) -> Task:
    labelled = split(read_labelled(folder))
    seen = [sentence.text for part in ("reward", "evaluator") for sentence in labelled[part]]
    held_out = [sentence.text for sentence in labelled["held_out"]]
    path = config.model.path
    tokenizer = load_tokenizer(path) if path else byte_pair_tokenizer(seen, config.model.vocabulary)
    return Task(
        name=folder.resolve().name,
        tokenizer=tokenizer,
        texts=seen,
        prompts=cut_prompts(seen, config.seed),
        held_out_prompts=cut_prompts(held_out, config.seed)[: max(1, config.log.evaluation_prompts)],
        labelled=labelled,
        pretrain_steps=SENTENCES_PRETRAIN_STEPS,
    )


def cut_prompts(sentences: Sequence[str], seed: int) -> list[str]:
    """Return the first two to five words of each sentence that has more than that, without repetitions.

    They end in the middle of a sentence and before a space, so that what follows is a word of its own.
    """
    prompts = []
    for row, sentence in enumerate(sentences):
        words = sentence.split(" ")
        length = 2 + int(4 * raw_uniforms(seed, "cut", 0, row, 1)[0])
        if len(words) > length:
            prompts.append(" ".join(words[:length]))
    return distinct(prompts)
