from echorl_nemo.report.console import step_line

VALUES = {
    "reward": 0.5, "all_one": 0.25, "all_zero": 0.125, "truncated": 0.0, "response_length": 27.4, "entropy": 0.04,
    "grad_norm": 0.21, "clip_loss": 0.02, "tokens_per_second": 3100.2, "time.generate": 1.24, "time.verify": 0.01,
    "time.score": 0.2, "time.update": 0.9,
}  # fmt: skip


def test_the_line_without_and_with_clips() -> None:
    assert step_line(11, 30, VALUES) == (
        "step 12/30 | reward 0.500 | all-one 0.25 all-zero 0.12 | truncated 0.00 length 27 | "
        "entropy 0.0400 grad 0.21 | 3100 tok/s, generate 1.2 verify 0.0 score 0.2 update 0.9 s"
    )
    clips = {"echorl.clips": 38.0, "echorl.clip_share": 0.52, "echorl.stop_coverage": 0.21, "echorl.relative_peak": 0.4}
    assert "| clips 38 share 0.52 stop 0.21 peak 0.40 loss 0.020 |" in step_line(0, 1, VALUES | clips)
