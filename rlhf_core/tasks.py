"""The tasks of ``rlhf train``: what the language model reads, and the prompts that it completes."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlhf_core.config import TrainConfig
from rlhf_core.data import reviews
from rlhf_core.data.dataset import DataReport, read_examples
from rlhf_core.data.dialogues import Chat
from rlhf_core.data.labelled import Labelled, Part, read_labelled, split
from rlhf_core.data.tokenization import byte_pair_tokenizer, load_tokenizer, word_tokenizer
from rlhf_core.seeding import raw_uniforms

EMBEDDED_SENTENCES = 20_000
EMBEDDED_PROMPTS = 2_048
EMBEDDED_PRETRAIN_STEPS = 900
SENTENCES_PRETRAIN_STEPS = 2_000


@dataclass(frozen=True)
class Task:
    """What a run works on."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    texts: Callable[[], Sequence[str]]
    """Gives what the language model is pre-trained on."""
    prompts: Sequence[str] | None
    """None where the run's folder keeps them in tokens."""
    held_out_prompts: Sequence[str] | None
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
    if config.data is None:
        return _embedded(config)
    folder = Path(config.data)
    if folder.is_dir() and (any(folder.glob("*.pos")) or any(folder.glob("*.neg"))):
        return _sentences(config, folder.resolve().name, read_labelled(folder))
    if not config.reward and (labelled := _labelled_rows(config, config.data)):
        return _sentences(config, folder.resolve().name, labelled)
    return _prompts(config, config.data)


def _labelled_rows(config: TrainConfig, source: str) -> list[Labelled]:
    """Return the rows of a source of labelled texts, without repetitions; nothing when its first row is none."""
    rows = read_examples(source, "prompt", _NoChat(), config.data_errors, DataReport(source))
    try:
        first = next(rows, None)
    except _HasMessages:
        return []
    if first is None or first[1].label is None:
        return []
    found: dict[str, Labelled] = {}
    for where, example in itertools.chain([first], rows):
        if example.label is None or example.completion is None:
            raise ValueError(f"{where}: a row without text and label in a source of labelled texts; give it both")
        found.setdefault(example.completion, Labelled(example.completion, example.label))
    return list(found.values())


class _HasMessages(Exception):
    """The source holds dialogues, and so no labelled texts."""


class _NoChat(Chat):
    def __init__(self) -> None:
        super().__init__(None)

    def prompt(self, messages: object) -> str:
        raise _HasMessages


def _prompts(config: TrainConfig, source: str) -> Task:
    if not config.reward:
        raise ValueError(
            f"--data {source!r} gives prompts, and nothing scores their completions; give --reward with the folder of "
            "a reward model (rlhf reward trains one on preferences) or module:function"
        )
    if not config.model.path:
        raise ValueError(
            f"--data {source!r} gives prompts, and no policy completes them; give --model.path (rlhf sft trains one)"
        )
    return Task(
        name=source,
        tokenizer=load_tokenizer(config.model.path),
        texts=list,
        prompts=None,
        held_out_prompts=None,
        labelled=None,
        pretrain_steps=0,
    )


def _embedded(config: TrainConfig) -> Task:
    tokenizer = load_tokenizer(config.model.path) if config.model.path else word_tokenizer(reviews.VOCABULARY)
    held_out = reviews.prompts(config.seed, EMBEDDED_PROMPTS, "held_out")
    return Task(
        name="embedded",
        tokenizer=tokenizer,
        texts=lambda: [one.text for one in reviews.generate(config.seed, EMBEDDED_SENTENCES, "train")],
        prompts=distinct(reviews.prompts(config.seed, EMBEDDED_PROMPTS, "train")),
        held_out_prompts=distinct(held_out)[: max(1, config.log.evaluation_prompts)],
        labelled=None,
        pretrain_steps=EMBEDDED_PRETRAIN_STEPS,
    )


def distinct(texts: Sequence[str]) -> list[str]:
    """Return the texts without repetitions, in order."""
    return list(dict.fromkeys(texts))


def _sentences(config: TrainConfig, name: str, sentences: list[Labelled]) -> Task:
    labelled = split(sentences)
    seen = [sentence.text for part in ("reward", "evaluator") for sentence in labelled[part]]
    held_out = [sentence.text for sentence in labelled["held_out"]]
    path = config.model.path
    tokenizer = load_tokenizer(path) if path else byte_pair_tokenizer(seen, config.model.vocabulary)
    return Task(
        name=name,
        tokenizer=tokenizer,
        texts=lambda: seen,
        prompts=cut_prompts(seen, config.seed),
        held_out_prompts=cut_prompts(held_out, config.seed)[: max(1, config.log.evaluation_prompts)],
        labelled=labelled,
        pretrain_steps=SENTENCES_PRETRAIN_STEPS,
    )


def cut_prompts(sentences: Sequence[str], seed: int) -> list[str]:
    """Return the first two to five words of each sentence that has more than that, without repetitions.

    They end in the middle of a sentence and before a space, so that what follows is a word of its own.
    """
    prompts = (cut_prompt(sentence, seed, row) for row, sentence in enumerate(sentences))
    return distinct([prompt for prompt in prompts if prompt])


def cut_prompt(sentence: str, seed: int, row: int) -> str:
    """Return the first two to five words of a sentence, drawn by (seed, row); nothing when it has no more than that."""
    words = sentence.split(" ")
    length = 2 + int(4 * raw_uniforms(seed, "cut", 0, row, 1)[0])
    return " ".join(words[:length]) if len(words) > length else ""
