"""TRL 1.12's PPO trainer on the workload of `bench_ppo_step.py`; it is started from there."""

import argparse
import gc
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import ppo_workload as workload  # noqa: E402 - a script: its folder is no package


def main() -> None:
    """Run the steps and print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=sorted(workload.SHAPES), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--trl", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path.insert(0, str(arguments.trl))

    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    torch.set_num_threads(arguments.threads)
    configuration = workload.SHAPES[arguments.model].configuration()
    configuration.num_labels = 1
    vocabulary = {f"<{number}>": number for number in range(workload.EOS)} | {
        "<eos>": workload.EOS,
        "<pad>": workload.PAD,
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<0>")),
        eos_token="<eos>", pad_token="<pad>", padding_side="left",
    )  # fmt: skip
    collecting, spent, steps = gc.collect, [0.0], []

    def timed_collect(*given: object) -> int:
        start = time.perf_counter()
        found = collecting(*given)
        spent[0] += time.perf_counter() - start
        return found

    ppo_trainer.gc = types.SimpleNamespace(collect=timed_collect)

    class Clock(TrainerCallback):
        start = 0.0

        def on_train_begin(self, *_: object, **__: object) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            now = time.perf_counter()
            steps.append((now - self.start, spent[0]))
            self.start, spent[0] = now, 0.0

    with tempfile.TemporaryDirectory() as folder:
        options = PPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=workload.BATCH, gradient_accumulation_steps=1,
            num_mini_batches=workload.BATCH // workload.MINIBATCH, num_ppo_epochs=workload.EPOCHS,
            total_episodes=(arguments.steps + 1) * workload.BATCH, response_length=workload.NEW_TOKENS, temperature=1.0,
            stop_token=None, learning_rate=workload.RATE, lr_scheduler_type="constant",
            local_rollout_forward_batch_size=workload.BATCH, num_sample_generations=0, save_strategy="no",
            report_to="none", disable_tqdm=True, seed=0, weight_decay=0.0,
        )  # fmt: skip
        PPOTrainer(
            args=options, processing_class=tokenizer, model=GPT2LMHeadModel(configuration), ref_model=None,
            reward_model=GPT2ForSequenceClassification(configuration),
            value_model=GPT2ForSequenceClassification(configuration),
            train_dataset=Dataset.from_dict({"input_ids": workload.prompts()}), callbacks=[Clock()],
        ).train()  # fmt: skip
    kept = steps[1:]
    print(
        json.dumps(
            {
                "trainer": "trl",
                "seconds": statistics.median(total for total, _ in kept),
                "seconds_without_gc": statistics.median(total - collected for total, collected in kept),
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
