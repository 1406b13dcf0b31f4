"""Lets NeMo-RL's GRPO trainer use our policy, our loss, and advantage estimators that record rewards."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from echorl_nemo.engines.nemo_rl.step import EchoStep


@contextmanager
def installed(step: EchoStep) -> Iterator[None]:
    """Meanwhile `nemo_rl.algorithms.grpo` uses our policy, our loss, and advantage estimators that show ``step`` the
    rewards."""
    from echorl_nemo.engines.nemo_rl.loss import EchoClippedPGLossFn
    from echorl_nemo.engines.nemo_rl.policy import EchoPolicy

    grpo = importlib.import_module("nemo_rl.algorithms.grpo")
    policy = type("EchoPolicy", (EchoPolicy,), {"step": step})
    with ExitStack() as stack:
        for name, ours in (
            ("Policy", policy),
            ("ClippedPGLossFn", EchoClippedPGLossFn),
            ("_create_advantage_estimator", recording_rewards(grpo._create_advantage_estimator, step)),
        ):
            stack.enter_context(mock.patch.object(grpo, name, ours))
        yield


def recording_rewards(create: Callable[..., Any], step: EchoStep) -> Callable[..., Any]:
    """Wrap ``create``, upstream's factory of advantage estimators: each estimator that it makes also stores the rewards
    that it is given in ``step``."""

    def create_recording(*args: Any, **kwargs: Any) -> Any:
        estimator = create(*args, **kwargs)
        compute = estimator.compute_advantage

        def compute_advantage(**given: Any) -> Any:
            step.record_rewards(given["prompt_ids"], given["rewards"], given.get("repeated_batch"))
            return compute(**given)

        estimator.compute_advantage = compute_advantage
        return estimator

    return create_recording
