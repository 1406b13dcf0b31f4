"""A run in NeMo-Aligner's words: every setting arrives."""

from pathlib import Path

from echorl_nemo.checks.nemo_aligner import batch_problems
from echorl_nemo.config import load_config
from echorl_nemo.engines.nemo_aligner.config import method_config
from echorl_nemo.engines.nemo_aligner.overrides import overrides
from echorl_nemo.schema import RunConfig
from tests.engines.nemo_aligner.test_config import load


def test_every_setting_arrives() -> None:
    config = load_config(
        "echo_grpo_70b",
        ["model.nemo_path=/models/l.nemo", "parallel.tensor=8", "parallel.pipeline=4", "parallel.data=2",
         "echorl.coef=0.25", "echorl.boundary=[198,271]", "algo=dapo", "algo.dynamic_sampling=false",
         "trainer.lr=3e-6", "rollout.batch_size=64", "trainer.eval_every=5"],
        schema=RunConfig,
    )  # fmt: skip
    settings = overrides(
        config, "llama", train=Path("/run/t=1.jsonl"), evaluate=Path("/run/e.jsonl"), eval_prompts=500,
        eos=["<|eot_id|>", "a 'quoted' {token}, \\n"],
    )  # fmt: skip
    ours = load("echo_grpo_actor", *settings)
    algo, echorl = method_config(ours.model)
    assert (echorl.coef, list(echorl.boundary), algo.clip_high) == (0.25, [198, 271], 0.28)
    assert (ours.trainer.num_nodes, ours.trainer.devices, ours.trainer.precision) == (8, 8, "bf16")
    assert ours.data == {"train": "/run/t=1.jsonl", "validation": "/run/e.jsonl"}
    assert list(ours.model.grpo.sampling_params.end_strings) == ["<|eot_id|>", "a 'quoted' {token}, \\n"]
    assert (ours.model.optim.name, ours.model.optim.lr) == ("distributed_fused_adam", 3e-6)
    assert (ours.model.encoder_seq_length, ours.model.grpo.length_params.max_length) == (9216, 8192)
    assert (ours.model.tensor_model_parallel_size, ours.model.pipeline_model_parallel_size) == (8, 4)
    assert ours.model.sequence_parallel and ours.model.activations_checkpoint_granularity == "full"
    assert ours.trainer.grpo.trt_llm.enable and ours.trainer.grpo.trt_llm.reshard
    assert (ours.model.global_batch_size, ours.model.micro_batch_size) == (512, 1)
    assert (ours.model.grpo.num_rollout_samples, ours.model.grpo.rollout_micro_batch_size) == (128, 8)
    assert (ours.model.grpo.num_val_samples, ours.trainer.grpo.val_check_interval) == (448, 5)
    assert batch_problems(ours.trainer.grpo, ours.model, 2) == []
