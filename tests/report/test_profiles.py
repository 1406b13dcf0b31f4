from pathlib import Path

import pytest
import torch

from echorl_nemo.report.profiles import draw_profiles, entropy_profile


def test_a_profile_by_example(tmp_path: Path) -> None:
    # two responses of two steps, one of ten steps, and one without a response
    step_ids = torch.full((4, 10), -1)
    step_ids[0, :4] = torch.tensor([0, 0, 1, 1])
    step_ids[1, :2] = torch.tensor([0, 1])
    step_ids[2] = torch.arange(10)
    entropies = torch.zeros(4, 10)
    entropies[0, :4] = torch.tensor([0.2, 0.4, 1.0, 2.0])
    entropies[1, :2] = torch.tensor([0.9, 0.1])
    entropies[2] = torch.arange(10) / 10
    values = entropy_profile(entropies, step_ids, reduction="mean")
    assert values["responses"] == 3 and values["steps"] == pytest.approx(14 / 3)
    # the steps of a two-step response lie at 0.25 and 0.75
    assert values["by_position"][2] == pytest.approx((0.3 + 0.9 + 0.2) / 3)
    assert values["by_position"][7] == pytest.approx((1.5 + 0.1 + 0.7) / 3)
    assert values["by_position"][0] == pytest.approx(0.0)
    assert values["peak_position"] == pytest.approx([0, 0, 1 / 3, 0, 0, 0, 0, 1 / 3, 0, 1 / 3])
    assert values["peak_height"]["50%"] == pytest.approx(0.9)
    draw_profiles(
        {"right": values, "none": entropy_profile(entropies[3:], step_ids[3:], reduction="mean")}, tmp_path / "x.png"
    )
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_no_response_at_all() -> None:
    assert entropy_profile(torch.zeros(1, 3), torch.full((1, 3), -1), reduction="mean") == {"responses": 0}
