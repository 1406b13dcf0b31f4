"""Prints docs/metrics.md, the list of a run's metrics: `python -m echorl_nemo.report.metrics_reference`."""

ROLLOUTS = "mean over the step's rollouts"
TOKENS = "mean over all response tokens of a mini-batch"
COUNTED = "mean over the response tokens of rollouts that take part in the loss (`algo.denominator`)"

METRICS: dict[str, tuple[str, str]] = {
    "reward": ("reward", f"Of the deciding verifier, before shaping; {ROLLOUTS}."),
    "reward.NAME": ("reward", f"Of the verifier NAME; {ROLLOUTS}."),
    "all_one": ("share", "Groups whose rollouts are all rewarded with `echorl.success_reward` or more, of all groups."),
    "all_zero": ("share", "Groups none of whose rollouts is, of all groups."),
    "truncated": ("share", "Rollouts without a stop token, of all rollouts."),
    "response_length": ("tokens", f"{ROLLOUTS.capitalize()}."),
    "sampling.rounds": ("count", "Rounds of prompts that dynamic sampling asked."),
    "sampling.effective_groups": ("count", "Groups with different rewards that it kept."),
    "rollout.logprob_gap": ("nats", "Of the engine's log-probs to the policy's; mean absolute, over response tokens."),
    "rollout.entropy_gap": ("nats", "Of the engine's entropies to the policy's; the largest, absolute."),
    "rollout.restarts": ("count", "Restarts of a rollout engine of its own, in this attempt at the run."),
    "echorl.clips": ("count", "EchoClips of the step."),
    "echorl.clip_tokens": ("tokens", "Tokens with a weight in the clip loss, in all clips of the step."),
    "echorl.clip_share": ("share", "Clip tokens, of the response tokens of rollouts with a clip."),
    "echorl.relative_peak": ("share", "Where the peak lies among its response's steps, from 0 to 1; mean over clips."),
    "echorl.stop_coverage": ("share", "Clips that hold the response's last token, of all clips."),
    "echorl.peak_entropy": ("nats", "Entropy of the peak step; mean over clips."),
    "echorl.eligible": ("count", "Rollouts that may give a clip, before `echorl.per_group` chooses."),
    "echorl.predictable": (
        "0 or 1",
        "Whether the weight of a token depends only on what came before it (docs/method.md).",
    ),
    "echorl.fork_threshold": ("nats", "Entropy from which a token is a fork, with `echorl.span=fork_tokens`."),
    "echorl.coef": ("", "Weight of the clip loss in this step, by `echorl.coef_schedule`."),
    "echorl.unsegmented": ("share", "Responses without a boundary, of those that are not empty."),
    "loss": ("", "The objective; mean over the step's optimizer steps, like all below to `optimizer_steps`."),
    "policy_loss": ("", "The surrogate, by `algo.aggregation`."),
    "clip_loss": ("nats", "Negative log-likelihood of the clips, by `echorl.normalizer`, before `echorl.coef`."),
    "anchor_loss": ("nats", "The term of `algo.anchor`, before `algo.anchor_coef`; 0 without one."),
    "hint_loss": ("nats", "NLL of the hints, with `algo.demonstrations=uft`; mean over their tokens, else 0."),
    "entropy": ("nats", f"Of the policy; {TOKENS}."),
    "ratio_clipped": ("share", f"Tokens whose loss the clip changed; {COUNTED}."),
    "kl_old": ("nats", f"k3 estimate of the KL to the policy that the step started with; {COUNTED}."),
    "kl_reference": ("nats", f"`algo.kl_estimator` of the KL to the reference policy; {COUNTED}."),
    "mismatch_dropped": ("share", f"Tokens that IcePop took out; {COUNTED}."),
    "grad_norm": ("", "Of the whole gradient, before clipping."),
    "lr": ("", "Learning rate."),
    "optimizer_steps": ("count", "Steps that were taken; none where the gradient is 0 or not finite."),
    "skipped": ("0 or 1", "Whether something was not finite, so that the step, or a part of it, was not learnt from."),
    "verify.failures": ("count", "Verdicts that could not be reached."),
    "verify.timeouts": ("count", "Those of them that ran out of `data.reward_timeout`."),
    "time.PHASE": ("seconds", "Wall time of the phase: `generate`, `verify`, `score`, `update`; `step` is the whole."),
    "tokens_per_second": ("tokens/s", "Generated response tokens, of dropped groups too, over `time.step`."),
    "memory.peak": ("GiB", "Most memory that torch held on the main rank's GPU since the start; only on a GPU."),
    "eval.accuracy": ("share", "Finished and right rollouts on `data.eval`, of all of its rollouts."),
    "eval.response_length": ("tokens", "Mean over those rollouts."),
    "eval.truncated": ("share", "Of those rollouts."),
}  # fmt: skip
"""Unit and meaning, with the denominator, by metric. NAME and PHASE stand for one word."""

HEADER = """# Every metric of a run

What a line of `metrics.jsonl`, TensorBoard, W&B and MLflow holds. Made by
`python -m echorl_nemo.report.metrics_reference`; a test compares it with what a run writes.

| metric | unit | meaning |
|---|---|---|
"""


def is_described(name: str) -> bool:
    """Whether docs/metrics.md describes the metric ``name``."""
    first = name.split(".")[0]
    return name in METRICS or f"{first}.NAME" in METRICS or f"{first}.PHASE" in METRICS


def page() -> str:
    """The text of docs/metrics.md."""
    return HEADER + "".join(f"| `{name}` | {unit} | {text} |\n" for name, (unit, text) in METRICS.items())


if __name__ == "__main__":
    print(page(), end="")
