"""The launch module, with a script in the place of NeMo-RL's own."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from echorl_nemo.echo import EchoRLConfig
from echorl_nemo.engines.nemo_rl import run, upstream
from echorl_nemo.engines.nemo_rl.install import installed, recording_rewards
from echorl_nemo.engines.nemo_rl.step import EchoStep
from echorl_nemo.errors import UserError
from tests.engines.nemo_rl.conftest import REAL
from tests.engines.nemo_rl.test_config import GOOD

pytestmark = pytest.mark.skipif(REAL, reason="its own script starts Ray and GPUs")

SCRIPT = """
import argparse, json
import torch
from nemo_rl.algorithms import grpo
from nemo_rl.utils.config import load_config, parse_hydra_overrides
from tests.engines.nemo_rl.helpers import Bigram, ToyPolicy, rollouts
from unittest import mock

parser = argparse.ArgumentParser()
parser.add_argument("--config")
args, overrides = parser.parse_known_args()
config = parse_hydra_overrides(load_config(args.config), overrides)


class Tokenizer:
    def __len__(self):
        return 12

    def batch_decode(self, sequences, **kwargs):
        return ["\\n" if ids == [1] else "x" for ids in sequences]


toy = dict(get_logprobs=ToyPolicy.get_logprobs, train=ToyPolicy.train)
with mock.patch.multiple(grpo.Policy.__mro__[2], create=True, **toy):
    policy, loss_fn, estimator = grpo.setup(config, Tokenizer())
    policy.model = Bigram()
    policy.cfg = {"train_global_batch_size": 8, "train_micro_batch_size": 4}
    data, batch = rollouts([[1.0] * 4] * 2)
    results = grpo.grpo_train(policy, loss_fn, estimator, data, batch)
print(json.dumps({"grad": float(results["grad_norm"]), "clips": results["all_mb_metrics"].get("echorl/clips"),
                  "worker": policy.worker}))
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a script, and the files in which names of upstream are looked for."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "run_grpo.py").write_text(SCRIPT)
    for file, texts in upstream.WORKER_FILES.items():
        (tmp_path / "nemo_rl" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nemo_rl" / file).write_text("\n".join(texts))
    monkeypatch.setenv("NEMO_RL_HOME", str(tmp_path))
    monkeypatch.setattr(sys.modules["nemo_rl"], "__path__", [str(tmp_path / "nemo_rl")])
    monkeypatch.setattr(sys, "argv", ["run"])
    return tmp_path


def config_file(folder: Path, **settings: Any) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **settings}))
    return str(path)


def test_an_all_correct_step_learns(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(home)
    assert run.main(["--config", path, "loss_fn.echorl.coef=0.1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["grad"] > 0 and result["clips"] == [2.0] and result["worker"] == upstream.WORKER
    registry = sys.modules["nemo_rl.distributed.ray_actor_environment_registry"].ACTOR_ENVIRONMENT_REGISTRY
    assert registry[upstream.WORKER] == f"/venvs/{upstream.UPSTREAM_WORKER}/bin/python"
    assert run.main(["--config", path, "loss_fn.echorl.enabled=false"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["grad"] == 0 and result["clips"] is None


def test_nothing_of_ours_stays(home: Path) -> None:
    grpo = sys.modules["nemo_rl.algorithms.grpo"]
    before = grpo.Policy, grpo.ClippedPGLossFn
    with installed(EchoStep(EchoRLConfig())):
        assert grpo.Policy is not before[0] and grpo.ClippedPGLossFn is not before[1]
    assert (grpo.Policy, grpo.ClippedPGLossFn) == before


def test_problems_are_reported_at_once(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(home)
    assert run.main(["--config", path, "grpo.use_dynamic_sampling=true", "policy.megatron_cfg.enabled=false"]) == 1
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 2 and all(line.startswith("error: ") for line in printed)


def test_a_nemo_rl_without_the_names_that_are_used(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "nemo_rl" / "models/megatron/train.py").write_text("class Something")
    assert run.main(["--config", config_file(home)]) == 1
    printed = capsys.readouterr().err
    assert (
        "this NeMo-RL has no models/megatron/train.py: class LogprobsPostProcessor; use v0.6.0, v0.7.0 or main"
        in printed
    )


def test_without_the_script(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "examples" / "run_grpo.py").unlink()
    with pytest.raises(UserError, match="examples/run_grpo.py is in none of .* set NEMO_RL_HOME"):
        upstream.run_script()


def test_estimators_are_watched() -> None:
    step = EchoStep(EchoRLConfig())
    create = sys.modules["nemo_rl.algorithms.grpo"]._create_advantage_estimator
    estimator = recording_rewards(create, step)({})
    rewards = torch.tensor([1.0, 0.0])
    ids = torch.tensor([[3, 4], [3, 4]])
    advantages = estimator.compute_advantage(prompt_ids=ids, rewards=rewards, mask=torch.ones(2, 3))
    assert advantages[:, 0].tolist() == [0.5, -0.5]
    assert step._rewards is not None and step._rewards.tolist() == [1, 0]
    assert step._group_ids is not None and step._group_ids.tolist() == [0, 0]
