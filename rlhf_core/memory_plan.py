"""The memory that a training will take, by part and by stage: pure functions of shapes and sizes, in bytes.

A run's stages follow each other, so its peak is that of its largest stage, and a stage's is the sum of what lives in
it. What can be counted is counted: weights, gradients, moments, and what a forward pass saves for the backward pass.
What cannot, because it depends on how a pass is computed or on the allocator, stands in :class:`Costs` alone.
"""

from dataclasses import dataclass, field
from typing import Literal

FLOAT = 4
MIB = 2**20
Parts = dict[str, int]

PROCESS = "process with libraries"
POLICY, REFERENCE, VALUE = "policy", "reference", "value model"
REWARD_MODELS = "reward models"
GRADIENTS, MOMENTS = "gradients", "Adam's moments"
ACTIVATIONS, LOGITS = "activations", "logits"
ATTENTION = "attention in passing"
ROLLOUT = "cache and rollout"
TEXTS = "texts in tokens"
NARROW_WEIGHTS = "weights in bfloat16"
KEPT = "kept by the allocator"


@dataclass(frozen=True)
class Costs:
    """What was measured, not counted; ``python verification/benchmarks/memory_runs.py`` sets predictions beside runs.

    All that depends on how ``updates.py``, ``scoring.py``, ``layers.py`` and ``evaluation.py`` compute stands here.
    """

    logits_in_update: float = 3.0
    """[B, T, V] arrays of a micro-batch at the peak of an update: logits, their gradient, and a copy."""
    logits_in_scoring: float = 2.0
    """[B, T, V] arrays of a micro-batch while a rollout is scored."""
    head_part: tuple[int, int] = (1024, 2048)
    """Rows and columns of the part of them that a head holds for tokens side by side, instead of all."""
    logits_in_evaluation: float = 2.0
    """[B, T, V] arrays of a batch of the evaluation: the policy's and the reference's."""
    logits_in_supervised: float = 4.0
    """[B, L, V] arrays of a batch in pre-training."""
    logits_in_sampling: float = 4.0
    """[B, V] arrays while a token is drawn."""
    scores_kept: float = 1.0
    """[B, H, L, L] arrays that eager attention saves for the backward pass, a layer."""
    scores_in_passing: float = 3.0
    """[B, H, L, L] arrays that live while one layer's attention is computed."""
    passing_widths: float = 24.0
    """[B, L, D] arrays that live while one layer is computed without a gradient."""
    first_use: int = 30 * MIB
    """What libraries take when they first compute: code made for the processor, buffers of threads."""
    token_in_text: int = 250
    """Bytes of a token of a text that is read, with its tokenizer's notes."""
    texts_left: float = 0.6
    """Share of that which stays when the texts are read no more."""
    rollout_token: int = 200
    """Bytes of a position of a rollout: ids, masks, log-probs, values, targets, with the copies made of them."""
    kept_share: float = 0.1
    """What the C library's allocator holds beside a minibatch's activations, because freed pieces lie between: a
    share of them."""
    left_share: float = 0.8
    """What of both stays with the process afterwards."""


FITTED = Costs()


@dataclass(frozen=True)
class ModelShape:
    """What decides the memory of a causal language model."""

    family: Literal["gpt2", "llama"]
    """Whose blocks it has: norms, biases and gates as in GPT-2, or as in Llama."""
    layers: int
    width: int
    inner: int
    """Width of the MLP."""
    heads: int
    key_value_width: int
    """Key-value heads times head width."""
    vocabulary: int
    weights: int
    """All of them; those that head and token embeddings share count once."""
    embeddings: int
    """Of the token embeddings."""
    head: int
    """Of the head beside the token embeddings: 0 where they are shared."""
    eager: bool = True
    """Whether attention holds its scores where the model's own forward pass is used."""
    packed: bool = False
    """Whether rollouts are read by their real tokens side by side: no scores and no whole logits are held."""

    @property
    def trunk(self) -> int:
        """Weights without the head."""
        return self.weights - self.head


@dataclass(frozen=True)
class Workload:
    """What a run does, in the sizes that memory depends on."""

    process: int
    """Bytes of the process with its libraries before anything is made."""
    prompt: int
    """Tokens of the longest prompt."""
    response: int
    """Longest response in tokens."""
    batch: int
    minibatch: int
    micro_batch: int
    workers: int
    """Micro-batches that are computed at once, where a minibatch has so many."""
    value: Literal["shared", "separate"] | None
    bfloat16: bool = False
    evaluation_rows: int = 0
    """Prompts that are evaluated at a time; 0 evaluates none."""
    pretrain_rows: int = 0
    """Texts of a step of pre-training; 0 where there is none."""
    classifier_rows: int = 0
    """Texts of a step of the reward model and the evaluator; 0 where none is trained."""
    longest_text: int = 0
    text_tokens: int = 0
    """Tokens of all texts that are read."""
    reward_weights: int = 0
    """Weights of loaded reward models."""

    @property
    def length(self) -> int:
        """Prompt and response together."""
        return self.prompt + self.response


@dataclass(frozen=True)
class Stage:
    """A part of a run and what lives in it."""

    name: str
    parts: Parts = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """The stages of a run, in their order."""

    stages: list[Stage]

    @property
    def peak(self) -> Stage:
        """The largest stage; of equal ones the first."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def training_peak(self) -> int:
        """The largest of the stages up to the last step: what ``peak_mem_bytes`` of its row in timings.jsonl says."""
        return max(stage.total for stage in self.stages if stage.name != EVALUATION)


PRETRAINING, CLASSIFIERS = "pre-training", "reward model and evaluator"
SAMPLING, SCORING, UPDATE, EVALUATION = "rollout", "reference and value", "update", "evaluation"


def saved_floats(shape: ModelShape, rows: int, length: int, costs: Costs, *, bfloat16: bool = False) -> float:
    """Return the float32 values that a trunk's own forward pass keeps for its backward pass.

    Eager attention keeps a row of scores a head and token, under bfloat16 in both precisions.
    """
    scores = costs.scores_kept * shape.heads * length if shape.eager else float(shape.heads)
    token = _block_floats(shape, bfloat16) + (1.5 if bfloat16 and shape.eager else 1.0) * scores
    return rows * length * (shape.layers * token + 2 * shape.width)


def saved_packed_floats(shape: ModelShape, tokens: int, *, bfloat16: bool = False) -> float:
    """Return what :func:`saved_floats` is for tokens side by side, of rows of unequal length.

    Of the scores two numbers a head are kept. In float32 it is the arena of a program (:mod:`rlhf_kernels.program`),
    with room for two matrices of the MLP's width in passing: what norms and activations make of a token is computed
    again. GPT-2 keeps query, key and value, what attention mixed, two sums and one of the MLP's widths; Llama also two
    norms, unturned queries and keys, and three; in the last block, what it reads of two matrices. Under bfloat16 query,
    key and value are float32 all the same.
    """
    around, heads = 2 * shape.width, 2 * shape.heads
    if bfloat16:
        block = _block_floats(shape, bfloat16) + 2 * shape.width
    else:
        around += 2 * (shape.width + shape.inner)
        block = 6 * shape.width + shape.inner
        if shape.family != "gpt2":
            block += shape.width + 3 * shape.key_value_width + 2 * shape.inner
    return tokens * (shape.layers * (block + heads) + around)


def _block_floats(shape: ModelShape, bfloat16: bool) -> float:
    """Return what a block keeps of a token, but for scores.

    GPT-2: 8 arrays of the width (two norms' input and output, query, key, value, what attention mixed) and 2 of the
    MLP's; Llama: 8 and 4. Under bfloat16 the products' inputs take half and norms stay float32.
    """
    if shape.family == "gpt2":
        of_norms, of_products = 2 * shape.width, 6 * shape.width + 2 * shape.inner
    else:
        of_norms, of_products = 5 * shape.width, 3 * shape.width + 4 * shape.inner
    return of_norms + of_products / (2 if bfloat16 else 1)


def keeps_little(tokens: int, layers: int, width: int) -> bool:
    """Whether a pass keeps little for its backward pass: some 50 MiB at most."""
    return tokens * layers * width <= 2**20


def scores_in_passing(shape: ModelShape, rows: int, length: int, costs: Costs) -> float:
    """Return the values that live only while one layer's eager attention is computed."""
    return costs.scores_in_passing * rows * shape.heads * length**2 if shape.eager else 0.0


def cache_floats(shape: ModelShape, rows: int, length: int) -> int:
    """Return the values of a key-value cache."""
    return 2 * shape.layers * rows * length * shape.key_value_width


def trained_weights(shape: ModelShape, value: Literal["shared", "separate"] | None) -> tuple[int, int]:
    """Return the weights that PPO learns in one pass of the model and in the next.

    The policy's with what shares its trunk; then those of a separate value model, all but its token embeddings.
    """
    head = shape.width + 1
    if value == "separate":
        return shape.weights, shape.trunk - shape.embeddings + head
    return shape.weights + (head if value else 0), 0


def plan_memory(shape: ModelShape, work: Workload, costs: Costs = FITTED) -> MemoryPlan:
    """Return what each stage of a run will hold."""
    policy = FLOAT * shape.weights
    trained = FLOAT * sum(trained_weights(shape, work.value))
    process = {PROCESS: work.process + costs.first_use}
    texts = {TEXTS: costs.token_in_text * work.text_tokens}
    stages = []
    if work.pretrain_rows:
        held = process | texts | {POLICY: policy}
        stages.append(_supervised(PRETRAINING, shape, work, costs, held, work.pretrain_rows, shape.weights, head=True))
    judges = work.reward_weights
    if work.classifier_rows:
        judges += 2 * shape.trunk
        held = process | texts | {POLICY: policy, REWARD_MODELS: FLOAT * judges}
        stages.append(_supervised(CLASSIFIERS, shape, work, costs, held, work.classifier_rows, shape.trunk, head=False))
    models = {POLICY: policy, REFERENCE: policy, VALUE: trained - policy, REWARD_MODELS: FLOAT * judges}
    between = process | models | {MOMENTS: 2 * trained, TEXTS: int(costs.texts_left * texts[TEXTS])}
    update = _update(shape, work, costs)
    # Pieces that earlier stages freed stay with the process, and later ones take theirs from them.
    earlier = max((_left(stage.parts, costs) for stage in stages), default=0)
    update[KEPT] = max(update[KEPT], earlier - update[ACTIVATIONS])
    left = {KEPT: max(_left(update, costs), earlier)}
    stages.append(Stage(SAMPLING, between | left | _sampling(shape, work, costs, work.batch)))
    stages.append(Stage(SCORING, between | left | _scoring(shape, work, costs)))
    stages.append(Stage(UPDATE, between | update))
    if work.evaluation_rows:
        own = _largest(_sampling(shape, work, costs, work.evaluation_rows), _judging(shape, work, costs))
        stages.append(Stage(EVALUATION, between | left | own))
    return MemoryPlan(stages)


def _supervised(
    name: str,
    shape: ModelShape,
    work: Workload,
    costs: Costs,
    held: Parts,
    rows: int,
    weights: int,
    *,
    head: bool,
) -> Stage:
    """Return a stage that trains ``weights`` of one model on rows of texts."""
    length = work.longest_text
    packed = shape.packed
    saved = saved_packed_floats(shape, rows * length) if packed else saved_floats(shape, rows, length, costs)
    arrays = costs.logits_in_update if packed else costs.logits_in_supervised
    own = {
        GRADIENTS: FLOAT * weights,
        MOMENTS: 2 * FLOAT * weights,
        ACTIVATIONS: int(FLOAT * saved),
        ATTENTION: 0 if packed else int(FLOAT * scores_in_passing(shape, rows, length, costs)),
        LOGITS: _logits(shape, rows * length, costs, arrays) if head else 0,
    }
    own[KEPT] = int(costs.kept_share * own[ACTIVATIONS])
    return Stage(name, held | own)


def _update(shape: ModelShape, work: Workload, costs: Costs) -> Parts:
    """Return what an optimizer step holds beside models and moments."""
    pieces = work.minibatch // work.micro_batch
    at_once = min(work.workers, pieces)
    rows = at_once * work.micro_batch
    tokens = rows * work.length
    saved = (
        saved_packed_floats(shape, tokens, bfloat16=work.bfloat16)
        if shape.packed
        else saved_floats(shape, rows, work.length, costs, bfloat16=work.bfloat16)
    )
    first, second = trained_weights(shape, work.value)
    # Policy and value model follow one another, unless they keep little and would leave threads idle.
    both = bool(second) and pieces < work.workers and keeps_little(tokens, shape.layers, shape.width)
    activations = int(FLOAT * saved) * (2 if both else 1)
    together = first + second + at_once * max(first, second) if pieces > at_once else 0
    return {
        # A set of each piece in flight, the sum of the pieces before, and the other pass's.
        GRADIENTS: FLOAT * max(at_once * first, first + at_once * second, together),
        ACTIVATIONS: activations,
        ATTENTION: 0 if shape.packed else int(FLOAT * scores_in_passing(shape, rows, work.length, costs)),
        LOGITS: at_once * _logits(shape, work.micro_batch * work.response, costs, costs.logits_in_update),
        NARROW_WEIGHTS: FLOAT * at_once * max(first, second) // 2 if work.bfloat16 else 0,
        # Micro-batches of unequal length leave holes for each other, the policy for the value model: as much is kept as
        # if they came at once.
        KEPT: int(costs.kept_share * activations * max(pieces / at_once, 2 if second and not both else 1)),
    }


def _logits(shape: ModelShape, rows: int, costs: Costs, arrays: float) -> int:
    """Return ``arrays`` times the logits of some tokens: whole, or the part that a head holds."""
    columns = shape.vocabulary
    if shape.packed:
        rows, columns = min(rows, costs.head_part[0]), min(columns, costs.head_part[1])
    return int(FLOAT * arrays * rows * columns)


def _sampling(shape: ModelShape, work: Workload, costs: Costs, rows: int) -> Parts:
    """Return what drawing completions for ``rows`` prompts holds."""
    cached = cache_floats(shape, rows, work.length) + cache_floats(shape, rows, work.prompt)
    return {
        ROLLOUT: FLOAT * cached + costs.rollout_token * rows * work.length,
        ACTIVATIONS: int(FLOAT * costs.passing_widths * rows * work.prompt * shape.width),
        ATTENTION: int(FLOAT * scores_in_passing(shape, rows, work.prompt, costs)),
        LOGITS: int(FLOAT * costs.logits_in_sampling * rows * shape.vocabulary),
    }


def _scoring(shape: ModelShape, work: Workload, costs: Costs) -> Parts:
    """Return what the log-probs of a rollout take."""
    at_once = min(work.workers, work.batch // work.micro_batch)
    passing = 0 if shape.packed else scores_in_passing(shape, work.micro_batch, work.length, costs)
    return {
        ROLLOUT: costs.rollout_token * work.batch * work.length,
        ACTIVATIONS: int(FLOAT * at_once * costs.passing_widths * work.micro_batch * work.length * shape.width),
        ATTENTION: int(FLOAT * at_once * passing),
        LOGITS: at_once * _logits(shape, work.micro_batch * work.response, costs, costs.logits_in_scoring),
    }


def _judging(shape: ModelShape, work: Workload, costs: Costs) -> Parts:
    """Return what the log-probs of the evaluation's completions take."""
    rows = work.evaluation_rows
    return {
        ROLLOUT: costs.rollout_token * rows * work.length,
        ACTIVATIONS: int(FLOAT * costs.passing_widths * rows * work.length * shape.width),
        ATTENTION: 0 if shape.packed else int(FLOAT * scores_in_passing(shape, rows, work.length, costs)),
        LOGITS: _logits(shape, rows * work.response, costs, costs.logits_in_evaluation),
    }


def _left(parts: Parts, costs: Costs) -> int:
    """Return what stays with the process when a stage with activations is over."""
    return int(costs.left_share * (parts[ACTIVATIONS] + parts[KEPT]))


def _largest(*alternatives: Parts) -> Parts:
    return max(alternatives, key=lambda parts: sum(parts.values()))
