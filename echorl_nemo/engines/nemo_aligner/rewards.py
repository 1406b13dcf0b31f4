"""Verifiers in place of NeMo-Aligner's reward model server, with the interface of its client."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from nemo.utils import logging
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.distributed import broadcast_2d_tensor_within_mp, run_if_model_parallel_src
from torch import Tensor

from echorl_nemo.engines.nemo_aligner.config import VerifierConfig
from echorl_nemo.errors import UserError
from echorl_nemo.rewards import Verdict, VerifierPool, find_verifier, takes_row


class InProcessRewards:
    """Verifies rollouts on one rank of each replica while the replica goes on generating."""

    def __init__(self, config: VerifierConfig, tokenizer: Any) -> None:
        """Raises UserError for a verifier that does not exist, or that takes the row of the data."""
        assert config.name is not None
        names = [config.name, *config.extra]
        for name in names:
            if takes_row(find_verifier(name)):
                raise UserError(
                    f"verifier.name={name}: it takes the row of the data, which NeMo-Aligner's batches do not carry; "
                    "use a function of (response, answer), or engine=megatron"
                )
        self.tokenizer, self.failures = tokenizer, 0
        """Number of verdicts that were not reached on this rank so far."""
        self._pool = VerifierPool(names, workers=config.workers, timeout_seconds=config.timeout)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="verifiers")

    def infer_rm(self, rollout_batch: Mapping[str, Any]) -> "PendingRewards":
        """Start to verify a micro-batch, which holds `response_tokens`, `prompt_lengths`, `response_lengths` and
        `answers`."""
        pending = run_if_model_parallel_src(self._submit, rollout_batch)
        return PendingRewards(self, pending)

    def close(self) -> None:
        """End the verifiers' processes."""
        self._thread.shutdown(cancel_futures=True)
        self._pool.close()

    def _submit(self, rollout_batch: Mapping[str, Any]) -> "Future[dict[str, list[Verdict]]]":
        pairs = [
            (self.tokenizer.ids_to_text(tokens[start:end].tolist()), answer)
            for tokens, start, end, answer in zip(
                rollout_batch["response_tokens"].cpu(),
                rollout_batch["prompt_lengths"].tolist(),
                rollout_batch["response_lengths"].tolist(),
                rollout_batch["answers"],
                strict=True,
            )
        ]
        return self._thread.submit(self._pool.score, pairs)

    def _table(self, verdicts: Mapping[str, Sequence[Verdict]]) -> Tensor:
        """[b, verifiers] float32: the rewards, those of the deciding verifier first."""
        for name, given in verdicts.items():
            failed = [verdict.failure for verdict in given if verdict.failure]
            self.failures += len(failed)
            if failed:
                logging.warning(f"verifier {name}: {len(failed)} of {len(given)} responses got no verdict: {failed[0]}")
        return torch.tensor([[verdict.reward for verdict in verdicts[name]] for name in self._pool.names]).t()


class PendingRewards:
    """Rewards that are being computed. Upstream's client returns a future with the same method."""

    def __init__(self, rewards: InProcessRewards, pending: "Future[dict[str, list[Verdict]]] | None") -> None:
        self._rewards, self._pending = rewards, pending

    def result(self) -> Tensor:
        """Wait for the rewards: [b, verifiers] on every rank of the replica."""
        table = None
        if self._pending is not None:
            table = self._rewards._table(self._pending.result()).contiguous().to(torch.cuda.current_device())
        assert table is not None or parallel_state.get_model_parallel_src_rank() != torch.distributed.get_rank()
        return broadcast_2d_tensor_within_mp(table)
