import dataclasses
import re

import pytest
import torch

from rlhf_core.config import ModelConfig, TrainConfig
from rlhf_core.data.tokenization import word_tokenizer
from rlhf_core.memory_advice import largest_micro_batch, parse_size, remedy
from rlhf_core.memory_inputs import planned, shape_of
from rlhf_core.memory_plan import (
    ACTIVATIONS,
    ATTENTION,
    EVALUATION,
    GRADIENTS,
    KEPT,
    LOGITS,
    MOMENTS,
    NARROW_WEIGHTS,
    POLICY,
    PRETRAINING,
    PROCESS,
    REFERENCE,
    REWARD_MODELS,
    ROLLOUT,
    TEXTS,
    VALUE,
    Costs,
    ModelShape,
    Workload,
    cache_floats,
    plan_memory,
    saved_floats,
    saved_packed_floats,
    trained_weights,
)
from rlhf_core.packing import packable
from rlhf_core.policy import ForwardArguments, build_model
from rlhf_core.testing.command import TINY_RUN, run_command

COSTS = Costs(
    logits_in_update=3.0, logits_in_scoring=2.0, logits_in_evaluation=2.0, head_part=(5, 7), logits_in_supervised=4.0,
    logits_in_sampling=4.0, scores_kept=1.0, scores_in_passing=3.0, passing_widths=24.0, first_use=100,
    token_in_text=7, texts_left=0.5, rollout_token=100, kept_share=0.5,
    left_share=0.75,
)  # fmt: skip
SHAPE = ModelShape(
    family="gpt2", layers=2, width=4, inner=16, heads=2, key_value_width=4, vocabulary=10, weights=500, embeddings=40,
    head=0,
)  # fmt: skip
LLAMA = dataclasses.replace(SHAPE, family="llama", inner=12)
WORK = Workload(
    process=1000, prompt=2, response=3, batch=4, minibatch=4, micro_batch=2, workers=1, value="separate"
)  # fmt: skip


def parts_of(stage, shape=SHAPE, work=WORK, costs=COSTS):
    found = next(one for one in plan_memory(shape, work, costs).stages if one.name == stage)
    return {name: size for name, size in found.parts.items() if size}


def new_model(architecture):
    sizes = ModelConfig(architecture=architecture, layers=2, hidden_size=64, heads=4, context=32)
    return build_model(sizes, word_tokenizer(["a", "film"]))


def bytes_saved(model, forward):
    """What torch keeps of a forward pass for the backward pass, but for the model's own weights."""
    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(size for size, _ in saved.values())


class TestWhatIsCounted:
    def test_what_a_forward_pass_keeps_for_the_backward_pass(self):
        # (2·4 norms + 6·4 + 2·16 of the MLP + 2·5 scores) · 2 layers + 2·4 outside, for 15 tokens.
        assert saved_floats(SHAPE, 3, 5, COSTS) == 2340
        # (5·4 norms + 3·4 + 4·12 of the MLP + 2·5 scores) · 2 layers + 2·4 outside.
        assert saved_floats(LLAMA, 3, 5, COSTS) == 2820

    def test_bfloat16_halves_products_and_keeps_scores_in_both(self):
        assert saved_floats(SHAPE, 3, 5, COSTS, bfloat16=True) == 1650  # (8 + 56/2 + 1.5·10) · 2 + 8, for 15 tokens

    def test_attention_that_is_not_eager_keeps_a_sum_a_head_and_no_scores(self):
        assert saved_floats(dataclasses.replace(SHAPE, eager=False), 3, 5, COSTS) == 15 * (2 * (64 + 2) + 8)

    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_it_is_what_torch_saves(self, architecture):
        model = new_model(architecture)
        ids = torch.zeros(16, 24, dtype=torch.long)
        mask = torch.ones_like(ids)
        positions = ForwardArguments(model).positions(mask)
        total = bytes_saved(
            model, lambda: model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **positions)
        )
        assert 4 * saved_floats(shape_of(model, "eager"), 16, 24, COSTS) == pytest.approx(total, rel=0.03)

    def test_tokens_side_by_side_keep_two_numbers_a_head_and_no_scores(self):
        # (6·4 + 16 of the MLP + 4 of the heads) · 2 layers + 2·4 + 2·16 outside + 2·4 read, for 15 tokens.
        assert saved_packed_floats(SHAPE, 15) == 15 * (2 * 44 + 48)
        assert saved_packed_floats(LLAMA, 15) == 15 * (2 * (40 + 36 + 4) + 40)
        assert saved_packed_floats(SHAPE, 15, bfloat16=True) == 15 * (2 * (8 + 28 + 8 + 4) + 8)

    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_side_by_side_it_is_the_arena_of_a_program(self, architecture):
        blocks = packable(new_model(architecture))
        shape = shape_of(new_model(architecture), "eager")
        assert shape.packed
        assert saved_packed_floats(shape, 1) == pytest.approx(blocks.program.floats_a_token(), rel=0.1)

    def test_the_cache_holds_keys_and_values_of_every_layer(self):
        assert cache_floats(SHAPE, rows=3, length=5) == 2 * 2 * 3 * 5 * 4

    def test_a_value_model_learns_all_but_its_token_embeddings(self):
        assert trained_weights(SHAPE, None) == (500, 0)
        assert trained_weights(SHAPE, "shared") == (505, 0)
        assert trained_weights(SHAPE, "separate") == (500, 465)

    def test_a_head_of_its_own_is_no_part_of_the_value_model(self):
        assert trained_weights(dataclasses.replace(SHAPE, weights=540, head=40), "separate") == (540, 465)


class TestTheStages:
    def test_an_update(self):
        assert parts_of("update") == {
            PROCESS: 1100,
            POLICY: 2000,
            REFERENCE: 2000,
            VALUE: 1860,
            MOMENTS: 7720,
            GRADIENTS: 3860 + 2000,  # of the first micro-batch, and the policy's of the second
            ACTIVATIONS: 4 * 1560,  # 10 tokens of 156 values; one trunk follows the other
            ATTENTION: 4 * 3 * 2 * 2 * 25,
            LOGITS: 4 * 3 * 2 * 3 * 10,
            KEPT: 6240,  # half the activations of both micro-batches
        }

    def test_gradients_are_those_of_the_pieces_in_flight_and_the_sum_of_the_earlier(self):
        def sets(workers, micro_batch):
            work = dataclasses.replace(WORK, minibatch=8, workers=workers, micro_batch=micro_batch)
            return parts_of("update", work=work)[GRADIENTS] / 4

        policy, value = 500, 465
        assert sets(1, 8) == sets(2, 8) == policy + value
        assert sets(1, 4) == policy + value + policy
        assert sets(2, 4) == policy + 2 * value
        assert sets(2, 2) == policy + value + 2 * policy

    def test_one_pass_in_several_micro_batches_leaves_as_many_holes_as_two_passes_in_one(self):
        separate, alone = WORK, dataclasses.replace(WORK, value=None)
        whole = [parts_of("update", work=dataclasses.replace(work, micro_batch=4))[KEPT] for work in (separate, alone)]
        halves = [parts_of("update", work=work)[KEPT] for work in (separate, alone)]
        assert whole == [12480, 6240]
        assert halves == [6240, 6240]

    def test_micro_batches_in_parallel_hold_activations_of_their_own(self):
        one, two = parts_of("update"), parts_of("update", work=dataclasses.replace(WORK, workers=2))
        for part in (ACTIVATIONS, ATTENTION, LOGITS, KEPT):
            assert two[part] == 2 * one[part]

    def test_both_passes_at_once_hold_activations_of_both_and_leave_no_holes_for_each_other(self):
        work = dataclasses.replace(WORK, micro_batch=4)
        one, both = parts_of("update", work=work), parts_of("update", work=dataclasses.replace(work, workers=2))
        assert both[ACTIVATIONS] == 2 * one[ACTIVATIONS]
        assert both[KEPT] == one[KEPT]
        large = dataclasses.replace(SHAPE, layers=2**20)
        assert parts_of("update", large, work) == parts_of("update", large, dataclasses.replace(work, workers=2))

    def test_tokens_side_by_side_hold_no_scores_and_a_part_of_the_logits(self):
        found = parts_of("update", dataclasses.replace(SHAPE, packed=True))
        assert found[ACTIVATIONS] == 4 * 10 * (2 * 44 + 48)
        assert ATTENTION not in found
        assert found[LOGITS] == 4 * 3 * 5 * 7  # of 6 rows and 10 columns

    def test_tokens_side_by_side_hold_that_part_in_pretraining_and_evaluation_too(self):
        packed = dataclasses.replace(SHAPE, packed=True)
        work = dataclasses.replace(WORK, pretrain_rows=3, longest_text=4, evaluation_rows=5)
        pretraining, evaluation = (parts_of(stage, packed, work) for stage in (PRETRAINING, EVALUATION))
        assert pretraining[ACTIVATIONS] == 4 * 3 * 4 * (2 * 44 + 48)
        assert pretraining[LOGITS] == 4 * 3 * 5 * 7
        assert evaluation[LOGITS] == 4 * 2 * 5 * 7
        assert ATTENTION not in pretraining | evaluation

    def test_bfloat16_keeps_a_narrow_copy_of_the_weights(self):
        assert parts_of("update", work=dataclasses.replace(WORK, bfloat16=True))[NARROW_WEIGHTS] == 1000  # the policy's

    def test_a_rollout(self):
        found = parts_of("rollout")
        assert found[ROLLOUT] == 4 * (2 * 2 * 4 * 5 * 4 + 2 * 2 * 4 * 2 * 4) + 100 * 4 * 5
        assert found[LOGITS] == 4 * 4 * 4 * 10
        assert found[KEPT] == 9360  # 0.75 of 6240 activations and as much kept
        assert GRADIENTS not in found

    def test_scoring(self):
        assert parts_of("reference and value")[LOGITS] == 4 * 2 * 2 * 3 * 10

    def test_an_evaluation_holds_the_logits_of_two_models(self):
        assert parts_of(EVALUATION, work=dataclasses.replace(WORK, evaluation_rows=6))[LOGITS] == 4 * 2 * 6 * 3 * 10
        assert EVALUATION not in [stage.name for stage in plan_memory(SHAPE, WORK, COSTS).stages]

    def test_pre_training_and_judges(self):
        work = dataclasses.replace(WORK, pretrain_rows=3, classifier_rows=3, longest_text=5, text_tokens=20)
        assert parts_of("pre-training", work=work) == {
            PROCESS: 1100,
            TEXTS: 140,
            POLICY: 2000,
            GRADIENTS: 2000,
            MOMENTS: 4000,
            ACTIVATIONS: 4 * 2340,
            ATTENTION: 4 * 3 * 3 * 2 * 25,
            LOGITS: 4 * 4 * 3 * 5 * 10,
            KEPT: 4680,
        }
        judges = parts_of("reward model and evaluator", work=work)
        assert judges[REWARD_MODELS] == 4000
        assert LOGITS not in judges
        assert parts_of("update", work=work)[TEXTS] == 70

    def test_what_pre_training_freed_stays(self):
        work = dataclasses.replace(WORK, pretrain_rows=9, longest_text=5)
        # 4 · 156 · 45 activations and half of them kept; three quarters of both stay: 31590.
        assert parts_of("rollout", work=work)[KEPT] == 31590
        assert parts_of("update", work=work)[KEPT] == 31590 - 6240  # which the update's activations lie in

    def test_the_training_peak_leaves_the_evaluation_out(self):
        plan = plan_memory(SHAPE, dataclasses.replace(WORK, evaluation_rows=1000), COSTS)
        assert plan.peak.name == EVALUATION
        assert plan.training_peak == sum(parts_of("update").values())


class TestALimit:
    def total(self, micro_batch):
        return plan_memory(SHAPE, dataclasses.replace(WORK, micro_batch=micro_batch), COSTS).peak.total

    @pytest.mark.parametrize("rows", [1, 2, 4])
    def test_the_largest_micro_batch_that_fits(self, rows):
        assert largest_micro_batch(SHAPE, WORK, self.total(rows), COSTS) == rows
        assert largest_micro_batch(SHAPE, WORK, self.total(rows) - 1, COSTS) == {1: None, 2: 1, 4: 2}[rows]

    @pytest.mark.parametrize(
        ("changes", "limit", "said"),
        [
            ({}, 1000, "the process alone takes"),
            ({"response": 50}, 5000, "update.*lower --sampling.max-new-tokens"),
            ({"batch": 400}, 5000, "rollout.*lower --ppo.batch-size"),
            ({"evaluation_rows": 1000}, 5000, "lower --log.evaluation-prompts"),
            ({"pretrain_rows": 1000, "longest_text": 9}, 5000, "lower --pretrain.batch-size"),
            ({"classifier_rows": 1000, "longest_text": 9}, 5000, "lower --classifier.batch-size"),
            ({"prompt": 1, "response": 1}, 5000, "--model.value shared"),
            ({"prompt": 1, "response": 1, "value": None}, 5000, "a smaller model"),
        ],
    )
    def test_what_to_change_where_none_fits(self, changes, limit, said):
        work = dataclasses.replace(WORK, **changes)
        assert largest_micro_batch(SHAPE, work, limit, COSTS) is None
        assert re.search(said, remedy(SHAPE, work, limit, COSTS))

    @pytest.mark.parametrize(
        ("text", "size"),
        [("2GiB", 2**31), ("1500MiB", 1500 * 2**20), ("1.5GB", 1_500_000_000), (" 3 kb", 3000), ("1Ti", 2**40)],
    )
    def test_sizes(self, text, size):
        assert parse_size(text) == size

    @pytest.mark.parametrize("text", ["", "2", "much", "-1GiB", "0GiB", "2 GiB 3"])
    def test_what_is_no_size_is_named(self, text):
        with pytest.raises(ValueError, match=re.escape(f"--memory-limit {text!r} is no size; write it as in 2GiB")):
            parse_size(text)


class TestTheCommand:
    def test_it_says_what_a_run_takes_and_makes_none(self, tmp_path, reviews_drawn_once):
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path / "runs", "--explain-memory")
        assert outcome.code == 0, outcome.err
        assert re.search(r"peak: [\d,]+ MiB during \S.*, with micro-batches of 2, prompts of \d+ tokens", outcome.out)
        assert re.search(r"Adam's moments", outcome.out)
        assert not (tmp_path / "runs").exists()

    def test_a_limit_that_is_far_away(self, tmp_path, reviews_drawn_once):
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path, "--memory-limit", "1TiB")
        assert outcome.code == 0, outcome.err
        assert (
            "this run fits into 1,048,576 MiB; the largest micro-batch that fits: --ppo.micro-batch-size 2"
            in outcome.out
        )

    def test_a_limit_below_the_process(self, tmp_path, reviews_drawn_once):
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path, "--memory-limit=10MiB")
        assert outcome.code == 1
        assert re.search(r"no micro-batch fits into 10 MiB: the process alone takes [\d,]+ MiB", outcome.out)

    def test_a_limit_that_cannot_be_read(self):
        outcome = run_command("train", "--memory-limit", "much")
        assert outcome.code == 2
        assert outcome.complaint == "rlhf: --memory-limit 'much' is no size; write it as in 2GiB or 1500MiB"

    def test_the_model_that_is_planned_is_the_model_that_is_built(self, tmp_path, reviews_drawn_once):
        config = TrainConfig(device="cpu", model=ModelConfig(layers=3, hidden_size=96, heads=4))
        shape, work = planned(config, 7, tmp_path)
        # 168 words · 96, and a block: 4 · 96² of attention, 3 · 96 · 256 of the MLP, 2 · 96 of norms; 96 of the last.
        assert (shape.vocabulary, shape.weights, shape.embeddings) == (168, 168 * 96 + 3 * 110_784 + 96, 168 * 96)
        assert (work.process, work.response, work.evaluation_rows, work.pretrain_rows) == (7, 20, 64, 32)
