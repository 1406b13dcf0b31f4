"""The plan of every shipped run and model, and every way in which a run can be wrong."""

import json
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from echorl_nemo.checks.files_and_folders import run_dir_problems, space_problems
from echorl_nemo.checks.hf_config import described_config
from echorl_nemo.cli import main
from echorl_nemo.config import load_config
from echorl_nemo.engines.megatron.platform import detect_platform
from echorl_nemo.engines.megatron.run import silence_library_warnings
from echorl_nemo.plan.plan import Plan, make_plan
from echorl_nemo.schema import ParallelConfig, RunConfig

silence_library_warnings()
PLATFORM = detect_platform("cpu")

from echorl_nemo.plan.parameters import stage_parameters, total_parameters  # noqa: E402
from echorl_nemo.shipped import CONFIG_DIR  # noqa: E402

MODELS = sorted(path.stem for path in (CONFIG_DIR / "model").glob("*.yaml") if path.stem not in ("hf", "tiny-chain"))
LLAMA_70B = 70_553_706_496
LLAMA = "model.nemo_path=/models/llama.nemo"


def plan(*overrides: str, name: str = "echo_grpo_70b", elsewhere: bool = True) -> Plan:
    return make_plan(load_config(name, overrides, schema=RunConfig), elsewhere=elsewhere)


@pytest.mark.parametrize(
    ("overrides", "layout", "layers"),
    [
        ([LLAMA], (8, 4, 1, 2), 20),
        (
            ["engine=nemo_rl", "algo=nemo_rl", "rollout=vllm", "parallel.tensor=4", "parallel.pipeline=8",
             "parallel.context=2", "trainer.pack_tokens=16384"],
            (4, 8, 2, 1), 10,
        ),
    ],
)  # fmt: skip
def test_llama_70b_is_right_to_the_last_parameter(
    overrides: list[str], layout: tuple[int, int, int, int], layers: int
) -> None:
    start = time.process_time()
    made = plan(*overrides)
    parallel = made.config.parallel
    assert made.ok, made.problems
    assert (parallel.tensor, parallel.pipeline, parallel.context, parallel.data) == layout
    assert made.parameters == LLAMA_70B
    # a rank's share: its part of the products and embeddings, and the norms, which every rank has
    tensor, stages = parallel.tensor, len(made.stages)
    norms = [2 * layers * 8192 + (8192 if number == stages - 1 else 0) for number in range(stages)]
    for stage, own in zip(made.stages, norms, strict=True):
        assert stage.layers == layers and (stage.rank - own) * tensor + own == stage.whole
    assert sum(stage.whole for stage in made.stages) == LLAMA_70B
    assert time.process_time() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8e6  # kB


@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_the_parameters_that_transformers_gives_it(model: str) -> None:
    config = load_config("train", [f"model={model}", "data.train=x"], schema=RunConfig)
    hf_config = described_config(config.model)
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(hf_config)
    expected = sum(parameter.numel() for parameter in reference.parameters())
    expert = 2 if "moe" in hf_config.model_type else 1
    pipeline = 4 if hf_config.num_hidden_layers % 4 == 0 else 2
    for layout in (
        ParallelConfig(data=1),
        ParallelConfig(tensor=2, pipeline=pipeline, data=2, sequence=True, expert=expert),
    ):
        stages = stage_parameters(hf_config, layout, PLATFORM)
        assert total_parameters(stages, hf_config) == expected
    for gpus, default in config.model.layouts.items():
        layout = replace(ParallelConfig(sequence=True), tensor=default.tensor, pipeline=default.pipeline)
        assert gpus % (default.tensor * default.pipeline) == 0
        assert total_parameters(stage_parameters(hf_config, layout, PLATFORM), hf_config) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tensor=3", "parallel.pipeline=4"], "cluster.nodes=8 x cluster.gpus_per_node=8 are 64 GPUs, but"),
        (["parallel.tensor=3", "parallel.pipeline=4"], "parallel.tensor=3: the model's 64 attention heads are not"),
        (["parallel.tensor=8", "parallel.pipeline=3"], "parallel.pipeline=3: the model's 80 layers are not divisible"),
        (["trainer.minibatch_prompts=48"], "prompts_per_step=128 is not divisible by trainer.minibatch_prompts=48"),
        (["trainer.minibatch_prompts=1"], "minibatch_prompts=1 groups are not divisible by parallel.data=2"),
        (["rollout.group_size=1"], "rollout.group_size=1: algo.estimator=dr_grpo compares the rollouts of a group"),
        (["trainer.recompute=none", "trainer.micro_batch_size=4"], "memory: a GPU of stage 0 needs about"),
        (["model=qwen3-30b-a3b", LLAMA], "engine=nemo_aligner: NeMo 2.1 converts llama, qwen2, not the qwen3_moe"),
        (["model.nemo_path=null"], "model.nemo_path=null: NeMo-Aligner trains a .nemo file; convert model.path as"),
        (["rollout=vllm"], "rollout.engine=vllm: only NeMo-RL has it"),
        (["algo=dapo"], "dynamic_sampling=true: NeMo-Aligner generates once in a step; use false"),
        (["echorl.entropy_source=rollout"], "TensorRT-LLM returns only tokens; use policy"),
        (["parallel.context=2", "parallel.tensor=8", "parallel.pipeline=4"], "parallel.context=2: NeMo-Aligner"),
        (["trainer.pack_tokens=16384"], "trainer.pack_tokens=16384: NeMo-Aligner does not support it; use 0"),
        (["engine=nemo_rl"], "algo.aggregation=constant: NeMo-RL divides by tokens or rollouts"),
        (["engine=nemo_rl", "algo=mcpo"], "algo.anchor=mcpo: NeMo-RL does not support it; use none"),
        (["engine=nemo_rl", "algo=zvp"], "algo.degenerate=zvp: NeMo-RL does not support it; use zero"),
        (["engine=nemo_rl", "algo=top_entropy"], "algo.policy_tokens=top_entropy: NeMo-RL does not support it; use"),
        (["algo=luffy"], "algo.demonstrations=luffy: NeMo-Aligner does not have it; use none, or engine=megatron"),
        (["engine=nemo_rl", "algo=uft"], "algo.demonstrations=uft: NeMo-RL does not support it; use none"),
        (["algo=avspo"], "algo.degenerate=avspo: NeMo-Aligner does not have it; use zero"),
        (["engine=nemo_rl"], "algo.entropy_coef=0.001: NeMo-RL does not support it; use 0.0"),
        (["engine=nemo_rl", "algo=dapo"], "algo.dynamic_sampling=true: it drops the all-correct groups"),
        (["model=qwen3-30b-a3b", "parallel.sequence=false"], "parallel.sequence=false: Megatron trains a mixture of"),
        (["model=qwen3-30b-a3b", "parallel.expert=3", "parallel.tensor=1"], "parallel.expert=3: the model's 128"),
        (["parallel.expert=2"], "parallel.expert=2: the model has no experts; use 1"),
        (["trainer.save_every=15", "trainer.eval_every=10"], "save_every=15: NeMo-Aligner saves where it evaluates"),
        (["checkpoint.keep_last=5"], "checkpoint.keep_last=5: NeMo-Aligner does not read it"),
        (["engine=nemo_rl", "parallel.context=2"], "parallel.context=2: NeMo-RL splits only packed rows"),
        (["engine=nemo_rl", "algo.tis_cap=2", "algo.icepop_low=0.5", "algo.icepop_high=5"], "NeMo-RL does one of them"),
        (["engine=nemo_rl", "algo.icepop_high=5"], "algo.icepop_high=5.0: NeMo-RL needs both bounds"),
        (["engine=nemo_rl"], "rollout.engine=trtllm: NeMo-RL v0.7.0 does not have it; use rollout=vllm"),
        (["engine=nemo_rl", "data.reward_timeout=3"], "data.reward_timeout=3.0: NeMo-RL does not read it"),
        (["rollout.max_new_tokens=131000"], "are 132024 tokens, the model has 131072 positions; lower one"),
    ],
)  # fmt: skip
def test_each_wrong_run_has_its_message(overrides: list[str], message: str) -> None:
    made = plan(LLAMA, *overrides)
    assert not made.ok
    assert any(message in problem for problem in made.problems), made.problems


def test_all_problems_are_reported_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    overrides = ["parallel.tensor=3", "rollout.group_size=1", "algo.dynamic_sampling=true", "data.train=nowhere.jsonl"]
    code = main(
        ["plan", "--config-name", "echo_grpo_70b", *overrides, f"trainer.run_dir={tmp_path}", "model.path=/none"]
    )
    printed = capsys.readouterr().err.splitlines()
    assert code == 1 and all(line.startswith("error: ") for line in printed)
    for message in (
        "are 64 GPUs, but parallel.tensor=3", "rollout.group_size=1", "64 attention heads", "8 key-value heads",
        "model.nemo_path=null", "dynamic_sampling=true", "model.path=/none: no tokenizer can be read",
        "model.path=/none: no Hugging Face model",
    ):  # fmt: skip
        assert sum(message in line for line in printed) == 1, (message, printed)


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [([LLAMA], 8), (["engine=nemo_rl", "algo=nemo_rl", "rollout=vllm", "parallel.tensor=4", "parallel.pipeline=8"], 4)],
)
def test_memory_is_what_the_formulas_say(overrides: list[str], gpus: int) -> None:
    """Counted here from the model's own sizes: 80 layers of 8192 x 28672, 8 key-value heads of 128."""
    made = plan(*overrides)
    tensor, layers = made.config.parallel.tensor, 80 // made.config.parallel.pipeline
    first = {item.name: item.value * 2**30 for item in made.memory[0].items}
    assert first["weights"] == 2 * made.stages[0].rank
    assert first["engine's weights"] == 2 * LLAMA_70B / gpus
    assert first["optimizer"] == 12 * made.stages[0].rank / (made.config.parallel.data or 1)
    tokens = 1024 + 8192
    layer = tokens * (8 * 8192 + 4 * 8192 + 4 * 1024 + 6 * 28672) / tensor
    in_flight = made.config.parallel.pipeline
    assert first["activations"] == in_flight * layers * tokens * 2 * 8192 / tensor + layer


def test_another_architecture_is_planned_without_its_sizes() -> None:
    gpt2 = {"model_type": "gpt2", "n_layer": 8, "n_head": 8, "n_embd": 64, "vocab_size": 512}
    made = plan(
        *(f"+model.architecture.{name}={value}" for name, value in gpt2.items()), "model=hf", "model.path=/none",
        "data.train=/none", "engine=megatron", "rollout.max_new_tokens=100", "data.max_prompt_tokens=100",
        name="train",
    )  # fmt: skip
    assert made.problems == [] and made.parameters is None
    assert "a gpt2 is not counted" in made.warnings[0]


def test_the_network_of_experts_and_split_sequences() -> None:
    made = plan(
        "engine=nemo_rl", "algo=nemo_rl", "rollout=vllm", "model=qwen3-30b-a3b", "parallel.expert=8",
        "parallel.context=2", "parallel.tensor=4", "parallel.pipeline=1", "trainer.pack_tokens=16384",
    )  # fmt: skip
    assert made.ok, made.problems
    sent = {item.name: item.value for item in made.network}
    tokens = 1024 * (1024 + 8192) / (2 * 8)
    assert sent["context"] == pytest.approx(5 * 48 * tokens * 4 * 512 / 4 / 1e9)
    assert sent["experts"] == pytest.approx(2 * 5 * 48 * tokens * 8 * 2 * 2048 / 4 * 7 / 8 / 1e9)


def test_tensor_parallelism_over_nodes_is_a_warning() -> None:
    made = plan(LLAMA, "cluster.gpus_per_node=4", "cluster.nodes=16")
    assert made.ok and "parallel.tensor=8 spans nodes of 4 GPUs" in made.warnings[0]


def test_a_plan_of_what_is_here(
    in_repository: Path, tiny_chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = sum(weight.numel() for weight in load_file(tiny_chain / "model" / "model.safetensors").values())
    norms = 5 * 64
    assert main(["plan", "--json", "--config-name", "quickstart", f"trainer.run_dir={tmp_path / 'run'}"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] and printed["parameters"] == parameters and printed["layout"]["tensor"] == 2
    assert [stage["rank"] for stage in printed["stages"]] == [(parameters - norms) // 2 + norms]
    assert main(["plan", "--config-name", "quickstart", f"trainer.run_dir={tmp_path / 'run'}"]) == 0
    assert f"{parameters:,} parameters" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_another(in_repository: Path, tiny_chain: Path) -> None:
    made = plan(
        "model=qwen2.5-7b-instruct", f"model.path={tiny_chain / 'model'}", "data=tiny-chain", "engine=megatron",
        "rollout=tiny-chain", elsewhere=False,
    )  # fmt: skip
    assert any(
        "its config.json has hidden_size=64, model.architecture 3584; choose the model=" in p for p in made.problems
    )
    assert any("model.stop_tokens=['<|im_end|>', '<|endoftext|>']: the tokenizer of" in p for p in made.problems)


def test_a_disk_without_space_for_a_checkpoint(tmp_path: Path) -> None:
    (problem,) = space_problems(tmp_path / "run", 10**15)
    assert "a checkpoint has 14000000 GB; free space" in problem
    assert space_problems(tmp_path / "run", 1) == []


@pytest.mark.parametrize("engine", ["megatron", "nemo_rl"])
def test_a_run_folder_below_a_file(tmp_path: Path, engine: str) -> None:
    (tmp_path / "file").touch()
    config = load_config(
        "quickstart", [f"engine={engine}", f"trainer.run_dir={tmp_path / 'file' / 'run'}"], schema=RunConfig
    )
    assert run_dir_problems(config) == [
        f"trainer.run_dir={tmp_path}/file/run: {tmp_path}/file is a file; name a folder"
    ]


QWEN3_30B = [
    "engine=nemo_rl", "algo=nemo_rl", "model=qwen3-30b-a3b", "rollout=vllm", "parallel.tensor=1", "parallel.expert=8",
    "parallel.pipeline=1", "cluster=h100", "cluster.nodes=4", "cluster.gpus_per_node=8", "trainer.prompts_per_step=64",
    "trainer.minibatch_prompts=32", "rollout.group_size=32", "data.max_prompt_tokens=1024",
    "rollout.max_new_tokens=3072", "data.train=x.jsonl",
]  # fmt: skip


def test_a_layout_that_is_published_as_running_is_not_refused() -> None:
    """NVIDIA's NeMo-RL runs Qwen3-30B-A3B so on 32 H100, with vLLM at TP2."""

    def problems(*overrides: str) -> list[str]:
        config = load_config("train", [*QWEN3_30B, *overrides], schema=RunConfig)
        return [problem for problem in make_plan(config, elsewhere=True).problems if problem.startswith("memory")]

    assert problems("rollout.vllm.tensor_parallel=2") == []
    (problem,) = problems("rollout.vllm.tensor_parallel=1", "cluster.gpu_memory_gib=60")
    assert "use a larger rollout.vllm.tensor_parallel" in problem
