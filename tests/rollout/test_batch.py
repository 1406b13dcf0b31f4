import torch

from echorl_nemo.rollout.batch import RolloutBatch, concatenate


def batch_of(*lengths: int, group: int = 0) -> RolloutBatch:
    """Rollouts of a 1-token prompt and ``length - 1`` response tokens."""
    width = max(lengths)
    positions = torch.arange(width).expand(len(lengths), -1)
    ends = torch.tensor(lengths)[:, None]
    return RolloutBatch(
        tokens=(positions + 10) * (positions < ends),
        response_mask=(positions >= 1) & (positions < ends),
        lengths=torch.tensor(lengths),
        finished=torch.ones(len(lengths), dtype=torch.bool),
        group_ids=torch.full((len(lengths),), group),
        responses=[f"response of {length}" for length in lengths],
        rewards=torch.tensor([float(length) for length in lengths]),
    )


def test_select_takes_rows_of_every_field_and_cuts_the_padding() -> None:
    batch = batch_of(5, 2, 3).select([2, 1])
    assert batch.tokens.tolist() == [[10, 11, 12], [10, 11, 0]]
    assert batch.rewards is not None and batch.rewards.tolist() == [3.0, 2.0]
    assert batch.responses == ["response of 3", "response of 2"]
    assert batch.response_lengths.tolist() == [2, 1]
    assert batch.entropies is None


def test_concatenate_pads_to_the_longest() -> None:
    joined = concatenate([batch_of(2, 3), batch_of(5, group=1)])
    assert joined.tokens.shape == (3, 5)
    assert joined.response_mask.dtype == torch.bool
    assert joined.tokens[0].tolist() == [10, 11, 0, 0, 0]
    assert joined.group_ids.tolist() == [0, 0, 1]
    assert len(joined) == len(joined.responses) == 3
