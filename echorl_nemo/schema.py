"""The configuration of a run. `engines/*/overrides.py` put it in the words of a host."""

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
from echorl_nemo.ops.ranges import check_fields, number, word
from echorl_nemo.report.config import LoggerConfig
from echorl_nemo.resilience.config import CheckpointConfig, ResilienceConfig
from echorl_nemo.rollout.config import RolloutConfig

ENGINES = ("megatron", "nemo_aligner", "nemo_rl")
RECOMPUTE = ("none", "selective", "full")
VERIFY = ("auto", "off")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(kw_only=True)
class LayoutConfig:
    """A model's default layout on a number of GPUs; replicas take what is left of them."""

    tensor: int = number(1, "[1, 65536]")
    """As `parallel.tensor`."""

    pipeline: int = number(1, "[1, 65536]")
    """As `parallel.pipeline`."""

    expert: int = number(1, "[1, 65536]")
    """As `parallel.expert`."""

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
    """The same model as a .nemo file or folder, which NeMo-Aligner trains; see docs/nemo_aligner.md."""

    chat_template: str = "none"
    """What prompts are wrapped in: `none`; `tokenizer`, the tokenizer's own chat template; or the text of a Jinja
    template over `messages`. `data.chat_template` decides otherwise for a data set."""

    stop_tokens: list[str] = field(default_factory=list)
    """Tokens that end a response beside those that tokenizer and generation_config.json name, by their text."""

    keep_special_tokens: bool = False
    """Whether verifiers see the special tokens of a response, but for the stop token at its end."""

    verify: str = word("auto", VERIFY)
    """`auto` compares the tokenizer with its tokenizer.json, and at load the policy with transformers' own forward:
    whole where the model has at most 2e9 parameters, else its first two layers and the settings of every layer. `off`
    trusts both."""

    boundary: Any = "newline"
    """Tokens that end a step; the shipped configs set `echorl.boundary` to it."""

    layouts: dict[int, LayoutConfig] = field(default_factory=dict)
    """Default layouts by number of GPUs; a run on more takes the largest that is not above. See `parallel.tensor`."""

    architecture: dict[str, Any] = field(default_factory=dict)
    """The model's config.json as far as a plan needs it, so that it can be made without the model."""

    def __post_init__(self) -> None:
        check_fields(self, "model", error=UserError)


@dataclass(kw_only=True)
class ClusterConfig:
    """The machines, as a plan and the hosts' launchers need them."""

    nodes: int = number(1, "[1, 1000000]")
    """Machines of the run."""

    gpus_per_node: int = number(0, "[0, 1024]")
    """GPUs of each. 0: on the native engine those that the ranks find; in a plan as many as the layout asks for."""

    gpu_memory_gib: float = number(80.0, "(0, 1000000]")
    """Memory of a GPU, GiB."""

    gpu_tflops: float = number(989.0, "(0, 1000000000]")
    """Peak of a GPU in dense bf16, TFLOP/s."""

    gpu_bandwidth: float = number(3350.0, "(0, 1000000000]")
    """Memory bandwidth of a GPU, GB/s."""

    nvlink_bandwidth: float = number(450.0, "(0, 1000000000]")
    """Of a GPU to the others of its node, GB/s in each direction."""

    network_bandwidth: float = number(50.0, "(0, 1000000000]")
    """Of a GPU to those of other nodes, GB/s in each direction."""

    mfu: float = number(0.4, "(0, 1]")
    """Share of the peak that training is expected to reach."""

    def __post_init__(self) -> None:
        check_fields(self, "cluster", error=UserError)


@dataclass(kw_only=True)
class ParallelConfig:
    """How ranks share the work; their number is tensor x pipeline x context x data."""

    tensor: int = number(1, "[0, 65536]")
    """Ranks that share each layer. 0, with `pipeline` 0 too: what `model.layouts` has for the run's GPUs, else 1."""

    pipeline: int = number(1, "[0, 65536]")
    """Ranks that each hold a stretch of layers; 0 as in `tensor`."""

    context: int = number(1, "[1, 65536]")
    """Ranks that share each sequence."""

    expert: int = number(1, "[1, 65536]")
    """Ranks, of those that hold replicas, over which the experts of a mixture are spread."""

    sequence: bool = False
    """Sequence parallelism: between the layers' products, positions are spread over the tensor-parallel ranks."""

    device: str = word("auto", DEVICES)
    """`auto`: GPUs where torch finds one, else the CPU; `cpu` or `cuda` to insist."""

    data: int | None = number(None, "[1, 1000000]")
    """Replicas that share the groups of a step. Null: what the ranks that torchrun or srun started leave, else 1."""

    def __post_init__(self) -> None:
        check_fields(self, "parallel", error=UserError)


@dataclass(kw_only=True)
class TrainerConfig:
    """The training loop."""

    run_dir: str = "runs/${now:%Y%m%d-%H%M%S}"
    """Folder of the run: config, metrics, rollouts, checkpoints, report."""

    resume: bool = False
    """Go on from the newest sound checkpoint of `run_dir`, from the start where it has none. False refuses a folder
    that holds a run."""

    steps: int = number(100, "[1, 1000000000]")
    """Training steps: each generates, verifies, scores and updates."""

    prompts_per_step: int = number(128, "[1, 10000000]")
    """Prompts, and so groups, of a step."""

    minibatch_prompts: int = number(64, "[1, 10000000]")
    """Groups of one optimizer step; a step has prompts_per_step / minibatch_prompts of them."""

    micro_batch_size: int = number(1, "[1, 1000000]")
    """Rollouts in one forward-backward of a rank, padded to the longest of them; under a pipeline, of the step."""

    recompute: str = word("none", RECOMPUTE)
    """Activations that are computed again in the backward pass instead of kept: `none`; `selective`, those of the
    attention product; `full`, all but each layer's input, for about a third more arithmetic."""

    pack_tokens: int = number(0, "[0, 1000000000]", "0 pads")
    """Pack rollouts without padding into rows of at most so many tokens, one row in each forward-backward; then
    `micro_batch_size` is not used. At least the longest prompt + `rollout.max_new_tokens`. 0 pads instead."""

    lr: float = number(1e-6, "[0, 10]")
    """Peak learning rate."""

    warmup_steps: int = number(0, "[0, 1000000000]")
    """Optimizer steps over which the learning rate rises: the n-th of them has n / warmup_steps of it. Constant after
    that."""

    weight_decay: float = number(0.0, "[0, 1000]")
    """AdamW's weight decay."""

    adam_beta1: float = number(0.9, "[0, 1)")
    """AdamW's decay of the gradient's mean."""

    adam_beta2: float = number(0.95, "[0, 1)")
    """AdamW's decay of the gradient's second moment."""

    adam_eps: float = number(1e-8, "(0, 1]")
    """AdamW's term that keeps the division by the second moment finite."""

    clip_grad: float = number(1.0, "(0, 1000000000]", "a large value does not clip")
    """Largest norm of the whole gradient."""

    seed: int = number(0, "[0, 9007199254740992]")
    """Fixes the order of prompts and the sampling of rollouts."""

    save_every: int = number(0, "[0, 1000000000]", "0 is off")
    """Steps between checkpoints; 0 saves at the end alone."""

    eval_every: int = number(0, "[0, 1000000000]", "0 is off")
    """Steps between evaluations on `data.eval`; 0 evaluates before the first and after the last step alone."""

    eval_group_size: int = number(1, "[1, 65536]")
    """Rollouts of each evaluation prompt."""

    eval_temperature: float | None = number(None, "[0, 100]", "0 takes the likeliest token")
    """Of the evaluation's rollouts; 0 takes the likeliest token, null is `rollout.temperature`."""

    export: bool = True
    """Write the trained policy as a Hugging Face folder, `run_dir`/export, at the end."""

    timeout_minutes: int = number(30, "[1, 100000]")
    """How long a collective may wait for a rank before the run is given up."""

    def __post_init__(self) -> None:
        check_fields(self, "trainer", error=UserError)


@dataclass(kw_only=True)
class EvaluationConfig:
    """How a model is evaluated on `data.eval`."""

    samples: int = number(8, "[1, 65536]")
    """Rollouts of each problem."""

    k: list[int] = number(lambda: [1, 8], "[1, 65536]")  # noqa: RUF009  it makes a field
    """pass@k is reported for these; each at most `samples`."""

    temperature: float | None = number(None, "[0, 100]", "0 takes the likeliest token")
    """Of the rollouts; 0 takes the likeliest token, null is `rollout.temperature`."""

    checkpoint: str | None = None
    """A checkpoint folder (`run_dir`/checkpoints/step-NNNNNN) of the model at `model.path`; null evaluates that one."""

    micro_batch_size: int = number(1, "[1, 1000000]")
    """Rollouts in one forward of `echorl-nemo analyze`."""

    resamples: int = number(2000, "[1, 10000000]")
    """Draws of the bootstrap over problems."""

    seed: int = number(0, "[0, 9007199254740992]")
    """Fixes rollouts and bootstrap."""

    out: str = "evaluation.json"
    """File of the scores, with the verdicts on each problem."""

    top: int = number(0, "[0, 1000000]", "0 shows none")
    """Wrong responses that are printed, one of each problem; all responses are in a .responses.jsonl beside `out`."""

    timeout_minutes: int = number(60, "[1, 100000]")
    """How long a collective may wait for a rank."""

    def __post_init__(self) -> None:
        beyond = [k for k in self.k if k > self.samples >= 1]
        more = [f"evaluation.k={list(self.k)}: {beyond} is above evaluation.samples={self.samples}"] if beyond else []
        check_fields(self, "evaluation", more, error=UserError)


@dataclass(kw_only=True)
class AnalysisConfig:
    """Step-entropy profiles, `echorl-nemo analyze`."""

    boundary: Any = "newline"
    """Tokens that end a step, as `echorl.boundary`."""

    step_reduction: str = word("mean", STEP_REDUCTIONS)
    """How token entropies make a step's entropy: `mean`, `max` or `sum`."""

    out: str = "analysis"
    """Files of the profiles: this with .json and .png."""

    def __post_init__(self) -> None:
        problems = boundary_problems(self.boundary, "analysis.boundary")
        check_fields(self, "analysis", problems, error=UserError)


@dataclass(kw_only=True)
class EvaluateConfig:
    """Everything an evaluation is made of."""

    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)


def changed(config: "RunConfig", keys: Sequence[str]) -> list[tuple[str, Any]]:
    """Those of the dotted ``keys`` whose values are not the defaults, with the values; of a section, each of its
    keys."""
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
    """Everything a run is made of; one Hydra group of `conf/` for each section."""

    engine: str = word("megatron", ENGINES)
    """Who trains: `megatron`, the native engine; `nemo_aligner` or `nemo_rl`, hosts with launchers of their own that
    `echorl-nemo plan --launch` writes the command for."""

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
