import math
from typing import Any

import pytest

from echorl_nemo.echo import EchoRLConfig, clip_coefficient


def test_each_schedule_by_its_definition() -> None:
    def at(step: int, **options: Any) -> float:
        return clip_coefficient(EchoRLConfig(coef=0.1, **options), step=step, entropy=0.5)

    assert at(0) == at(1000) == 0.1
    assert at(5, coef_schedule="entropy") == pytest.approx(0.1 * math.exp(0.5))
    linear: dict[str, Any] = {"coef_schedule": "linear", "coef_warmup_steps": 4, "coef_decay_steps": 10}
    found = [at(step, **linear) for step in (0, 3, 4, 9, 14, 99)]
    assert found == pytest.approx([0.025, 0.1, 0.1, 0.05, 0.0, 0.0])
    assert at(7, coef_schedule="linear", coef_warmup_steps=2) == 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coef_schedule": "linear"}, "echorl.coef_schedule=linear with no steps to rise or fall in is constant"),
        ({"coef_warmup_steps": 5}, "echorl.coef_warmup_steps=5 with echorl.coef_schedule=constant: only linear uses"),
        ({"coef_decay_steps": 5, "coef_schedule": "entropy"}, "echorl.coef_decay_steps=5 with echorl.coef_schedule=en"),
    ],
)
def test_steps_that_no_schedule_uses_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        EchoRLConfig(**settings)
