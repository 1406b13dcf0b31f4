"""The dataclasses of a run's configuration. `engines/*/overrides.py` translate them into the keys of a host."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from operator import attrgetter
from typing import Any

from omegaconf import MISSING

from echorl_nemo.data.config import DataConfig
from echorl_nemo.echo import EchoRLConfig
from echorl_nemo.echo.config import STEP_REDUCTIONS, boundary_problems
from echorl_nemo.errors import UserError
from echorl_nemo.grpo import AlgoConfig
from echorl_nemo.ops.ranges import check_fields, choice, number
from echorl_nemo.report.config import LoggerConfig
from echorl_nemo.resilience.config import CheckpointConfig, ResilienceConfig
from echorl_nemo.rollout.config import RolloutConfig

ENGINES = ("megatron", "nemo_aligner", "nemo_rl")
RECOMPUTE = ("none", "selective", "full")
VERIFY = ("auto", "off")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(kw_only=True)
class LayoutConfig:
    """A model's default layout on a number of GPUs. Data-parallel replicas use the remaining GPUs."""

    tensor: int = number(1, "[1, 65536]")
    """The value of `parallel.tensor`."""

    pipeline: int = number(1, "[1, 65536]")
    """The value of `parallel.pipeline`."""

    expert: int = number(1, "[1, 65536]")
    """The value of `parallel.expert`."""

    def __post_init__(self) -> None:
        check_fields(self, "model.layouts", error=UserError)


@dataclass(kw_only=True)
class ModelConfig:
    """The policy."""

    path: str = MISSING
    """A Hugging Face folder or hub id: config, safetensors and tokenizer."""

    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""

    nemo_path: str | None = None
    """The same model as a .nemo file or folder, for NeMo-Aligner; see docs/nemo_aligner.md."""

    chat_template: str = "none"
    """Chat template of prompts: `none`; `tokenizer`, the tokenizer's own; or the text of a Jinja template over
    `messages`. `data.chat_template` overrides whether it is used."""

    stop_tokens: list[str] = field(default_factory=list)
    """Texts of tokens that end a response, in addition to those that tokenizer and generation_config.json name."""

    keep_special_tokens: bool = False
    """Whether verifiers see the special tokens of a response, except for the stop token at its end."""

    verify: str = choice("auto", VERIFY)
    """`auto` compares the tokenizer with its tokenizer.json, and at load the policy with transformers' own forward:
    whole where the model has at most 2e9 parameters, else its first two layers and the settings of every layer. `off`
    trusts both."""

    boundary: Any = "newline"
    """Tokens that end a step; the shipped configs set `echorl.boundary` to it."""

    layouts: dict[int, LayoutConfig] = field(default_factory=dict)
    """Default layouts by number of GPUs. A run uses the one with the largest number that it has. See
    `parallel.tensor`."""

    architecture: dict[str, Any] = field(default_factory=dict)
    """The keys of the model's config.json that a plan needs, so that it can be made without the model."""

    def __post_init__(self) -> None:
        check_fields(self, "model", error=UserError)


@dataclass(kw_only=True)
class ClusterConfig:
    """The machines of a run, for plans and the hosts' launchers."""

    nodes: int = number(1, "[1, 1000000]")
    """Number of machines."""

    gpus_per_node: int = number(0, "[0, 1024]")
    """GPUs of each machine. 0: on the native engine those that the ranks find; in a plan those that the layout
    needs."""

    gpu_memory_gib: float = number(80.0, "(0, 1000000]")
    """Memory of a GPU, GiB."""

    gpu_tflops: float = number(989.0, "(0, 1000000000]")
    """Peak of a GPU in dense bf16, TFLOP/s."""

    gpu_bandwidth: float = number(3350.0, "(0, 1000000000]")
    """Memory bandwidth of a GPU, GB/s."""

    nvlink_bandwidth: float = number(450.0, "(0, 1000000000]")
    """Bandwidth of a GPU to the others of its node, GB/s in each direction."""

    network_bandwidth: float = number(50.0, "(0, 1000000000]")
    """Bandwidth of a GPU to those of other nodes, GB/s in each direction."""

    mfu: float = number(0.3, "(0, 1]")
    """Share of `gpu_tflops` that scoring and training reach, for estimates. This, `bandwidth_share` and
    `layer_latency_us` are fitted on published runs, see docs/plan.md."""

    bandwidth_share: float = number(0.4, "(0, 1]")
    """Share of `gpu_bandwidth` that generation reaches, for estimates."""

    layer_latency_us: float = number(250.0, "[0, 1000000]")
    """Microseconds that a layer takes for one generated token of all rollouts besides reading weights and KV cache, for
    estimates: kernels that wait for one another, reductions."""

    def __post_init__(self) -> None:
        check_fields(self, "cluster", error=UserError)


@dataclass(kw_only=True)
class ParallelConfig:
    """How ranks share the work; their number is tensor x pipeline x context x data."""

    tensor: int = number(1, "[0, 65536]")
    """Ranks that share each layer. If this and `pipeline` are 0: the layout of `model.layouts` for the run's GPUs, or
    1."""

    pipeline: int = number(1, "[0, 65536]")
    """Ranks that hold consecutive parts of the layers; 0 as in `tensor`."""

    first_stage_layers: int | None = number(None, "[1, 65536]", "null is an equal share")
    """Layers of the first pipeline stage, where they do not divide equally; only in NeMo-RL. Null: an equal share."""

    last_stage_layers: int | None = number(None, "[1, 65536]", "null is an equal share")
    """Layers of the last pipeline stage; as `first_stage_layers`."""

    context: int = number(1, "[1, 65536]")
    """Ranks that share each sequence."""

    expert: int = number(1, "[1, 65536]")
    """Ranks, of those that hold replicas, over which the experts of a mixture are spread."""

    sequence: bool = False
    """Sequence parallelism: outside the matrix products, positions are split over the tensor-parallel ranks."""

    device: str = choice("auto", DEVICES)
    """`auto`: GPUs if torch finds one, otherwise the CPU; `cpu` or `cuda`: only that."""

    data: int | None = number(None, "[1, 1000000]")
    """Replicas that share the groups of a step. Null: as many as the ranks that torchrun or srun started allow, or
    1."""

    def __post_init__(self) -> None:
        check_fields(self, "parallel", error=UserError)


@dataclass(kw_only=True)
class TrainerConfig:
    """Settings of the training loop."""

    run_dir: str = "runs/${now:%Y%m%d-%H%M%S}"
    """Folder of the run: config, metrics, rollouts, checkpoints, report."""

    resume: bool = False
    """Go on from the newest undamaged checkpoint of `run_dir`, or start if it has none. False refuses a folder that
    holds a run."""

    steps: int = number(100, "[1, 1000000000]")
    """Training steps: each generates, verifies, scores and updates."""

    prompts_per_step: int = number(128, "[1, 10000000]")
    """Prompts of a step; each gives one group of rollouts."""

    minibatch_prompts: int = number(64, "[1, 10000000]")
    """Groups of one optimizer step; a step has prompts_per_step / minibatch_prompts of them."""

    micro_batch_size: int = number(1, "[1, 1000000]")
    """Rollouts in one forward-backward of a rank, padded to the longest of them (with a pipeline, of the step)."""

    recompute: str = choice("none", RECOMPUTE)
    """Activations that are computed again in the backward pass instead of being kept: `none`; `selective`, those of the
    attention product; `full`, all but each layer's input, for about a third more arithmetic."""

    pack_tokens: int = number(0, "[0, 1000000000]", "0 pads")
    """Length of packed rows, tokens: rollouts are concatenated without padding, with one row in each forward-backward,
    and `micro_batch_size` is not used. At least the longest prompt + `rollout.max_new_tokens`. 0 pads instead."""

    lr: float = number(1e-6, "[0, 10]")
    """Peak learning rate."""

    warmup_steps: int = number(0, "[0, 1000000000]")
    """Optimizer steps over which the learning rate rises linearly: the n-th has n / warmup_steps of it. Then it is
    constant."""

    weight_decay: float = number(0.0, "[0, 1000]")
    """AdamW's weight decay."""

    adam_beta1: float = number(0.9, "[0, 1)")
    """AdamW's decay rate of the gradient's mean."""

    adam_beta2: float = number(0.95, "[0, 1)")
    """AdamW's decay rate of the gradient's second moment."""

    adam_eps: float = number(1e-8, "(0, 1]")
    """AdamW's epsilon, which is added to the root of the second moment."""

    clip_grad: float = number(1.0, "(0, 1000000000]", "a large value does not clip")
    """Largest norm of the whole gradient."""

    seed: int = number(0, "[0, 9007199254740992]")
    """Fixes the order of prompts and the sampling of rollouts."""

    save_every: int = number(0, "[0, 1000000000]", "0 is off")
    """Steps between checkpoints; 0 saves only at the end."""

    eval_every: int = number(0, "[0, 1000000000]", "0 is off")
    """Steps between evaluations on `data.eval`; 0 evaluates only before the first and after the last step."""

    eval_group_size: int = number(1, "[1, 65536]")
    """Rollouts of each evaluation prompt."""

    eval_temperature: float | None = number(None, "[0, 100]", "0 takes the likeliest token")
    """Temperature of the evaluation's rollouts; 0 takes the likeliest token, null is `rollout.temperature`."""

    export: bool = True
    """Write the trained policy as a Hugging Face folder, `run_dir`/export, at the end."""

    timeout_minutes: int = number(30, "[1, 100000]")
    """Time limit of a collective. If a rank does not take part in time the run ends."""

    def __post_init__(self) -> None:
        check_fields(self, "trainer", error=UserError)


@dataclass(kw_only=True)
class EvaluationConfig:
    """Settings of `echorl-nemo evaluate`."""

    samples: int = number(8, "[1, 65536]")
    """Rollouts of each problem."""

    k: list[int] = number(lambda: [1, 8], "[1, 65536]")  # noqa: RUF009  it makes a field
    """Values of k for which pass@k is reported; each at most `samples`."""

    temperature: float | None = number(None, "[0, 100]", "0 takes the likeliest token")
    """Temperature of the rollouts; 0 takes the likeliest token, null is `rollout.temperature`."""

    checkpoint: str | None = None
    """A checkpoint (`run_dir`/checkpoints/step-NNNNNN) of the model at `model.path`; null evaluates `model.path`."""

    micro_batch_size: int = number(1, "[1, 1000000]")
    """Rollouts in one forward of `echorl-nemo analyze`."""

    resamples: int = number(2000, "[1, 10000000]")
    """Number of draws of the bootstrap over problems."""

    seed: int = number(0, "[0, 9007199254740992]")
    """Fixes rollouts and bootstrap."""

    out: str = "evaluation.json"
    """File of the scores, with the verdicts on each problem."""

    top: int = number(0, "[0, 1000000]", "0 shows none")
    """Number of wrong responses to print, one of each problem. All responses are in a .responses.jsonl beside `out`."""

    timeout_minutes: int = number(60, "[1, 100000]")
    """Time limit of a collective."""

    def __post_init__(self) -> None:
        beyond = [k for k in self.k if k > self.samples >= 1]
        more = [f"evaluation.k={list(self.k)}: {beyond} is above evaluation.samples={self.samples}"] if beyond else []
        check_fields(self, "evaluation", more, error=UserError)


@dataclass(kw_only=True)
class AnalysisConfig:
    """Settings of `echorl-nemo analyze`, which writes step-entropy profiles."""

    boundary: Any = "newline"
    """Tokens that end a step, as `echorl.boundary`."""

    step_reduction: str = choice("mean", STEP_REDUCTIONS)
    """How the entropies of a step's tokens are combined: `mean`, `max` or `sum`."""

    out: str = "analysis"
    """Path of the profiles without suffix: .json and .png are added."""

    def __post_init__(self) -> None:
        problems = boundary_problems(self.boundary, "analysis.boundary")
        check_fields(self, "analysis", problems, error=UserError)


@dataclass(kw_only=True)
class EvaluateConfig:
    """The configuration of `echorl-nemo evaluate` and `echorl-nemo analyze`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)


def changed(config: "RunConfig", keys: Sequence[str]) -> list[tuple[str, Any]]:
    """The dotted ``keys`` whose values differ from the defaults, with the values. A section stands for all its keys."""
    found: list[tuple[str, Any]] = []
    for key in keys:
        value, default = (attrgetter(key)(each) for each in (config, RunConfig()))
        if is_dataclass(value):
            found += changed(config, [f"{key}.{spec.name}" for spec in fields(value)])
        elif value != default:
            found.append((key, value))
    return found


@dataclass(kw_only=True)
class RunConfig:
    """The configuration of a training run. Each section is a Hydra group in `conf/`."""

    engine: str = choice("megatron", ENGINES)
    """The engine that trains: `megatron`, the native engine; `nemo_aligner` or `nemo_rl`, hosts that are started with
    the command that `echorl-nemo plan --launch` writes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    echorl: EchoRLConfig = field(default_factory=EchoRLConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UserError(f"engine={self.engine!r} is not known; use one of {', '.join(ENGINES)}")
