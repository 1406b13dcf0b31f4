"""Which settings make a selection predictable: the weight of a token depends only on what came before the token.

Without a reward the expected gradient of a predictable clip loss is 0, so that it teaches no drift (docs/method.md). It
is a property of the span, the weights, the denominator and the threshold together. Standard library only.
"""

from echorl_nemo.echo.config import NORMALIZERS, EchoRLConfig

PREDICTABLE_SPANS = ("full", "fork_tokens", "survival")


def unpredictable_settings(config: EchoRLConfig) -> list[str]:
    """The settings by which the weight of a token depends on the token itself or on what follows it, as `key=value`;
    empty if the selection is predictable.

    A part of order 1/N in what the N rollouts of a step determine together is not listed: a denominator that is
    counted, the step's own threshold, a coefficient by the step's own entropy (the table in docs/method.md). A function
    of the user's is listed, since nothing is known of it.
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
