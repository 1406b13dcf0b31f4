"""Every shipped config parses, and what is not known is fatal."""

import ast
import inspect
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path

import pytest
import yaml

from echorl_nemo import echo, grpo
from echorl_nemo.config import known_keys, load_config, to_yaml
from echorl_nemo.data.config import DataConfig
from echorl_nemo.errors import UserError
from echorl_nemo.report.config import LoggerConfig
from echorl_nemo.rollout.config import RolloutConfig, TrtllmConfig, VllmConfig
from echorl_nemo.schema import (
    AnalysisConfig,
    ClusterConfig,
    EvaluateConfig,
    EvaluationConfig,
    LayoutConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainerConfig,
)
from echorl_nemo.shipped import CONFIG_DIR

FOLDERS = sorted(str(path.relative_to(CONFIG_DIR)) for path in CONFIG_DIR.rglob("*") if path.is_dir())
HOSTS = ("nemo_aligner", "nemo_rl")
"""Folders of hosts that compose configurations of their own, tested with their engines."""
GROUPS = sorted(spec.name for spec in fields(RunConfig) if is_dataclass(spec.type))
BENCHMARKS = sorted(path.stem for path in (CONFIG_DIR / "benchmark").glob("*.yaml"))
load = partial(load_config, schema=RunConfig)

REQUIRED = ["model.path=some/model", "data.train=some/file.jsonl"]


def test_the_groups_are_the_sections_of_the_schema() -> None:
    own = [folder for folder in FOLDERS if folder.split("/")[0] not in HOSTS]
    assert [folder for folder in own if folder != "benchmark"] == GROUPS


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIG_DIR.glob("*.yaml")))
def test_every_primary_config_parses(name: str) -> None:
    if name == "evaluate":
        assert isinstance(load_config(name, REQUIRED[:1], schema=EvaluateConfig), EvaluateConfig)
    else:
        assert isinstance(load(name, REQUIRED), RunConfig)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_benchmark_parses(benchmark: str) -> None:
    config = load_config("evaluate", [REQUIRED[0], f"benchmark={benchmark}"], schema=EvaluateConfig)
    assert (config.data.eval is None) == (benchmark == "none")


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, path.stem) for group in GROUPS for path in sorted((CONFIG_DIR / group).glob("*.yaml"))],
)
def test_every_option_of_every_group_parses(group: str, option: str) -> None:
    config = load("train", [f"{group}={option}", *REQUIRED])
    text = (CONFIG_DIR / group / f"{option}.yaml").read_text()
    for key, value in (yaml.safe_load(text) or {}).items():
        if key == "layouts":
            value = {gpus: LayoutConfig(**layout) for gpus, layout in value.items()}
        if key != "defaults" and not isinstance(value, str):
            assert getattr(getattr(config, group), key) == value
    assert text.startswith("#") or len(text) < 120  # says what it is for


def test_overrides_reach_their_fields() -> None:
    config = load("quickstart", ["algo=dapo", "echorl.coef=0.25", "parallel.tensor=2", "echorl.boundary=[3,4]"])
    assert (config.algo.clip_high, config.echorl.coef, config.parallel.tensor) == (0.28, 0.25, 2)
    assert list(config.echorl.boundary) == [3, 4]


def test_the_papers_settings() -> None:
    config = load("train", REQUIRED)
    assert (config.algo.estimator, config.algo.aggregation, config.algo.constant_length) == (
        "dr_grpo",
        "constant",
        8192,
    )
    assert (config.algo.entropy_coef, config.echorl.coef, config.echorl.scope) == (1e-3, 1e-3, "success")
    assert (config.trainer.lr, config.trainer.prompts_per_step, config.trainer.minibatch_prompts) == (1e-6, 128, 64)
    assert (config.rollout.group_size, config.rollout.temperature) == (8, 1.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("echorl.coeff=1", r"echorl.coeff=1: no such key; did you mean echorl.coef\?"),
        ("+echorl.coeff=1", r"\+echorl.coeff=1: no such key; did you mean echorl.coef\?"),
        ("++trainer.step=1", r"did you mean trainer.steps\?"),
        ("+traner.steps=1", r"did you mean trainer.steps\?"),
        ("algo=dappo", r"algo=dappo: no such choice; did you mean dapo\? There are avspo, cispo, dapo, dr_grpo"),
        ("+trainer.steps=3", r"\+trainer.steps=3: the key is there already; leave out the \+"),
        ("~trainer.steps", "~trainer.steps: a key is not deleted"),
        ("trainer.steps=1,2", "trainer.steps=1,2: several values for one key; start one run for each"),
        ("quickstart", "quickstart: an argument is key=value; to choose a configuration use --config-name quickstart"),
        ("echorl.coef 0.3", "echorl.coef 0.3: an argument is key=value; use echorl.coef=0.3"),
        ("trainer.steps=null", "trainer.steps=null: null is not allowed; give a value"),
        ("model.path=${oops}", "config quickstart: model.path: Interpolation key 'oops' not found"),
        ("data.extra_rewards=[{name: a}]", r"data.extra_rewards\[0\].weight must be given"),
        ("echorl.coef=much", "echorl.coef=much: 'much' is not a number"),
        (
            "echorl.coef=-1",
            r"echorl.coef=-1.0 must lie in \[0, 1000000\]; it is the weight of a loss that is minimised",
        ),
        ("echorl.scope=everything", "echorl.scope='everything' is not known; use one of success, degenerate"),
        ("parallel.tensor=-1", r"parallel.tensor=-1 must lie in \[0, 65536\]"),
        (
            "rollout.temperature=0",
            r"=0.0 must lie in \(0, 100\]; at 0 the rollouts of a group would be alike",
        ),
        ("engine=verl", "engine='verl' is not known; use one of megatron, nemo_aligner, nemo_rl"),
        ("trainer.recompute=some", "trainer.recompute='some' is not known; use one of none, selective, full"),
        ("cluster.mfu=40", r"cluster.mfu=40.0 must lie in \(0, 1\]"),
        ("parallel.device=tpu", "parallel.device='tpu' is not known; use one of auto, cpu, cuda"),
        ("rollout.top_p=2", r"rollout.top_p=2.0 must lie in \(0, 1\]"),
        ("rollout.engine=sglang", "rollout.engine='sglang' is not known; use one of megatron, trtllm, vllm"),
        ("trainer.lr", "trainer.lr"),
    ],
)
def test_what_is_not_known_is_fatal(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("quickstart", [override])


def test_missing_values_are_named() -> None:
    with pytest.raises(UserError) as caught:
        load("train")
    assert str(caught.value).splitlines() == [
        f"config train: {key} must be given, as {key}=... or in the file" for key in ("model.path", "data.train")
    ]


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        load("quickstart", ["ehcorl.coef=1", "trainr.steps=3", "echorl.coef 0.3"])
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "echorl.coef 0.3", "ehcorl.coef=1", "trainr.steps=3",
    ]  # fmt: skip
    wrong = [
        "trainer.lr=nan",
        "trainer.steps=-1",
        "echorl.coef=much",
        "trainer.seed=abc",
        "echorl.scope=x",
        "rollout.trtllm.replicas=0",
        "rollout.top_p=2",
    ]
    with pytest.raises(UserError) as caught:
        load("quickstart", wrong)
    assert {line.split("=")[0] for line in str(caught.value).splitlines()} == {key.split("=")[0] for key in wrong}


@pytest.mark.parametrize("value", ["/x/gpt--val_loss=1.2.nemo", "é", "a~b", "a#b", "a(b", "a[b", "a b", 'a"b=', "{a"])
def test_the_advice_on_quoting_works(value: str) -> None:
    """Where Hydra's grammar does not take the value as it is, the message says what it takes."""
    override = f"model.path={value}"
    try:
        config = load("quickstart", [override])
    except UserError as error:
        advice = str(error).partition("quote it twice: '")[2].removesuffix("'")
        config = load("quickstart", [advice])
    assert config.model.path == value


def test_an_unknown_primary_config_names_those_that_exist() -> None:
    with pytest.raises(UserError, match="--config-name=quick: no quick.yaml; there are .*, quickstart, train"):
        load("quick")


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [run_schema, quickstart, _self_]\nechorl: {coef: 0.125}\n")
    assert load("mine", config_dir=tmp_path).echorl.coef == 0.125
    (tmp_path / "mine.yaml").write_text("defaults: [run_schema, quickstart, _self_]\nechorl: {coeff: 0.125}\n")
    with pytest.raises(UserError, match=r"echorl.coeff: no such key; did you mean echorl.coef\?"):
        load("mine", config_dir=tmp_path)
    (tmp_path / "mine.yaml").write_text("defaults: [run_schema, quickstart, _self_]\nechorl: {coef: much}\n")
    with pytest.raises(UserError, match="config mine: echorl.coef: 'much' is not a number"):
        load("mine", config_dir=tmp_path)
    (tmp_path / "mine.yaml").write_text("echorl: {coef: [\n")
    with pytest.raises(UserError, match="config mine: not YAML in UTF-8: "):
        load("mine", config_dir=tmp_path)
    (tmp_path / "echorl").mkdir()
    (tmp_path / "echorl" / "strong.yaml").write_text("coef: 7\n")
    assert load("quickstart", ["echorl=strong"], config_dir=tmp_path).echorl.coef == 7
    (tmp_path / "mine.yaml").write_text("defaults: [quickstart, _self_]\nnew_section: {x: 1}\n")
    with pytest.raises(UserError, match="new_section: no such key"):
        load("mine", config_dir=tmp_path)


@pytest.mark.parametrize(
    "overrides", [[], [r"data.prompt_template='Price: \${{ price }} {{ q }}'", "echorl.boundary=[3]"]]
)
def test_the_run_folders_copy_reads_back(tmp_path: Path, overrides: list[str]) -> None:
    config = load("quickstart", overrides)
    assert config.data.prompt_template in (None, "Price: ${{ price }} {{ q }}")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load("config", config_dir=tmp_path) == config


@pytest.mark.parametrize(
    "section",
    [
        echo.EchoRLConfig, grpo.AlgoConfig, RolloutConfig, DataConfig, ModelConfig, ParallelConfig, TrainerConfig,
        LoggerConfig, EvaluationConfig, AnalysisConfig, TrtllmConfig, ClusterConfig, LayoutConfig, VllmConfig,
    ],
)  # fmt: skip
def test_every_field_has_its_docstring(section: type) -> None:
    assert is_dataclass(section)
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    body = definition.body
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign):
            assert isinstance(following, ast.Expr), f"{section.__name__}.{ast.unparse(statement.target)}"
    assert [key for key in known_keys(section) if "." not in key] == [spec.name for spec in fields(section)]


def test_entries_of_a_free_dictionary_are_added_one_by_one() -> None:
    config = load(
        "train", [*REQUIRED, "+rollout.trtllm.extra.dtype=bfloat16", "+rollout.trtllm.extra.max_beam_width=1"]
    )
    assert config.rollout.trtllm.extra == {"dtype": "bfloat16", "max_beam_width": 1}
    for override in ("rollout.trtllm.extra={dtype: bfloat16}", "rollout.trtllm.extra.dtype=bfloat16"):
        with pytest.raises(UserError, match=r"is a dictionary; add its entries: \+rollout.trtllm.extra.key=value"):
            load("train", [*REQUIRED, override])
