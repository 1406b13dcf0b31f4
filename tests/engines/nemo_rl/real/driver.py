"""NeMo-RL's run through our launcher on Ray workers without a GPU, checked in each step by transformers and autograd.

python -m tests.engines.nemo_rl.real.driver --config CONFIG.yaml OVERRIDES...   (test_grpo.py sets what it needs)

A line of JSON for each log-prob pass and each update goes to the file in CHECKS.
"""

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.engines.nemo_rl.real import shims

shims.install()  # before anything imports Megatron

import ray  # noqa: E402
import torch  # noqa: E402
from nemo_rl.algorithms import grpo  # noqa: E402
from torch import Tensor  # noqa: E402

from echorl_nemo.engines.nemo_rl import policy as echo_policy  # noqa: E402
from echorl_nemo.engines.nemo_rl import run, upstream  # noqa: E402
from tests.engines.nemo_rl.real.generation import HuggingFaceGeneration  # noqa: E402
from tests.paper import Row, paper  # noqa: E402

WORKER = "tests.engines.nemo_rl.real.worker.CpuEchoWorker"
make, train, get_logprobs = (
    echo_policy.EchoPolicy.__init__,
    echo_policy.EchoPolicy.train,
    echo_policy.EchoPolicy.get_logprobs,
)
REFERENCE: list[Any] = []
"""The model before training, for the KL."""


def write(**values: Any) -> None:
    with Path(os.environ["CHECKS"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def make_and_remember(self: Any, *args: Any, **kwargs: Any) -> None:
    """Upstream's policy, whose weights the generation fetches."""
    make(self, *args, **kwargs)

    def fetch() -> dict[str, Tensor]:
        return ray.get(self.worker_group.run_all_workers_single_data("hugging_face_weights"))[0]

    HuggingFaceGeneration.fetch_weights = staticmethod(fetch)


def logs_of(model: Any, ids: Tensor) -> Tensor:
    """[N, S - 1, V]: the log-probs of the next token."""
    return model(ids).logits.float().log_softmax(dim=-1)[:, :-1]


def token_logprobs(logs: Tensor, ids: Tensor) -> Tensor:
    return logs.gather(-1, ids[:, 1:, None]).squeeze(-1)


def get_logprobs_checked(self: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
    result = get_logprobs(self, data, *args, **kwargs)
    ids, model = data["input_ids"].cpu(), HuggingFaceGeneration.latest.model
    if not REFERENCE:
        REFERENCE.append(copy.deepcopy(model))
    with torch.no_grad():
        logs = logs_of(model, ids)
    seen = torch.arange(1, ids.shape[1]) < data["input_lengths"].cpu()[:, None]
    entropies = -(logs.exp() * logs).sum(dim=-1)
    write(
        kind="score",
        logprobs=float((result["logprobs"][:, 1:] - token_logprobs(logs, ids))[seen].abs().max()),
        entropies=float((result["entropies"][:, 1:] - entropies)[seen].abs().max()),
    )
    return result


def train_checked(self: Any, data: Any, loss_fn: Any, *args: Any, **kwargs: Any) -> Any:
    step = self.step
    rewards, finished, groups = step._rewards.clone(), step._finished.clone(), step._group_ids.clone()
    boundaries = set(step.boundary_ids)
    result = train(self, data, loss_fn, *args, **kwargs)
    ids, model = data["input_ids"].cpu(), HuggingFaceGeneration.latest.model
    mask = data["token_mask"].cpu().float() * data["sample_mask"].cpu().float()[:, None]
    model.zero_grad()
    logs = logs_of(model, ids)
    logprobs = token_logprobs(logs, ids)
    entropies = torch.nn.functional.pad(-(logs.exp() * logs).sum(dim=-1), (1, 0)).detach()
    rows = [
        Row(
            ids[i].tolist(), (mask[i] > 0).tolist(), entropies[i].tolist(), [0.0, *logprobs[i].tolist()],
            bool(rewards[i] >= 1 and finished[i]), int(groups[i]),
        )
        for i in range(len(ids))
    ]  # fmt: skip
    weights, clip_loss = paper(rows, boundaries)
    prompts = len({row.prompt for row, weight in zip(rows, weights, strict=True) if any(weight)}) or 1
    expected = torch.tensor(weights)
    tokens = mask[:, 1:].sum()
    loss = -(data["advantages"].cpu()[:, 1:] * (logprobs - logprobs.detach()).exp() * mask[:, 1:]).sum() / tokens
    if loss_fn.reference_policy_kl_penalty:
        with torch.no_grad():
            gap = token_logprobs(logs_of(REFERENCE[0], ids), ids)
        gap = gap - logprobs
        loss = loss + loss_fn.reference_policy_kl_penalty * ((gap.exp() - gap - 1) * mask[:, 1:]).sum() / tokens
    (loss - loss_fn.echorl_coef * (expected[:, 1:] * logprobs).sum() / prompts).backward()
    gradients = [parameter.grad.double().norm() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    metrics = result["all_mb_metrics"]
    write(
        kind="update",
        reward=float(rewards.mean()),
        clips=metrics["echorl/clips"][0],
        clip_tokens=int((expected > 0).sum()),
        weights=float((data["echo_weight"].cpu() - expected * tokens / prompts).abs().max() / tokens),
        clip_loss=[sum(metrics["echorl/clip_loss"]), clip_loss],
        loss=[sum(metrics["loss"]), float(loss) + loss_fn.echorl_coef * clip_loss],
        grad_norm=[float(result["grad_norm"]), float(torch.stack(gradients).norm())],
    )
    return result


def main() -> int:
    upstream.WORKER = WORKER
    echo_policy.EchoPolicy.__init__ = make_and_remember  # type: ignore[method-assign]
    echo_policy.EchoPolicy.train = train_checked  # type: ignore[method-assign]
    echo_policy.EchoPolicy.get_logprobs = get_logprobs_checked  # type: ignore[method-assign]
    grpo.VllmGeneration = HuggingFaceGeneration
    return run.main()


if __name__ == "__main__":
    sys.exit(main())
