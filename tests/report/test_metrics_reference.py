from pathlib import Path

import torch

from echorl_nemo.echo import EchoRLConfig, select_clips
from echorl_nemo.report.metrics_reference import METRICS, is_described, page
from tests.engines.megatron.helpers import PLATFORM


def test_the_page_is_made_from_the_table() -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
    assert path.read_text() == page(), "make it again: python -m echorl_nemo.report.metrics_reference"


def test_what_the_update_and_the_clips_report_is_described() -> None:
    stats = select_clips(
        torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.long), rewards=torch.ones(1), finished=torch.ones(1) > 0,
        group_ids=torch.zeros(1, dtype=torch.long), config=EchoRLConfig(span="fork_tokens"),
    ).stats  # fmt: skip
    assert {"echorl.coef", *(f"echorl.{name}" for name in stats)} == {
        name for name in METRICS if name.startswith("echorl.")
    }
    from echorl_nemo.engines.megatron import policy  # imports only with the stand-ins of the platform in place

    assert PLATFORM.backend == "gloo" and all(is_described(name) for name in policy.METRICS)
    assert not is_described("rewards") and is_described("reward.math") and is_described("time.step")
