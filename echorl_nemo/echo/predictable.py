"""Which settings make a selection predictable: the weight of a token depends only on what came before the token.

Without a reward the expected gradient of a predictable clip loss is 0, so that it teaches no drift (docs/method.md). It
is a property of the span, the weights, the denominator and the threshold together. Standard library only.
"""

from echorl_nemo.echo.config import NORMALIZERS, EchoRLConfig

PREDICTABLE_SPANS = ("full", "fork_tokens", "survival")


def unpredictable_settings(config: EchoRLConfig) -> list[str]:
    """The settings by which the weight of a token depends on the token itself or on what follows it, as `key=value`;
    empty if the selection is predictable, exactly or up to `approximate_settings`.

    A function of the user's is listed, since nothing is known of it.
    """
    return [
        f"echorl.{key}={getattr(config, key)}"
        for key, predictable in (
            ("span", PREDICTABLE_SPANS),
            # the rollout is chosen by its whole course
            ("per_group", ("all",)),
            # 1 / L of a clip knows the length of the response
            ("normalizer", tuple(name for name in NORMALIZERS if name != "clip_mean")),
            # the probability of the token that was sampled
            ("token_weight", ("one",)),
        )
        if getattr(config, key) not in predictable
    ]


def approximate_settings(config: EchoRLConfig) -> list[str]:
    """The settings by which a token has a part of order 1/N in what the N rollouts of a step determine together: a
    denominator that is counted, or the step's own threshold. As `key=value`."""
    found = []
    if config.normalizer in ("clip_tokens", "response_tokens"):
        found.append(f"echorl.normalizer={config.normalizer}")
    if config.span == "fork_tokens" and config.fork_threshold == "step":
        found.append("echorl.fork_threshold=step")
    return found
