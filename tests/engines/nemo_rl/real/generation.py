"""Generation by a Hugging Face model on the driver, in the place of vLLM: NeMo-RL's `GenerationInterface`."""

from collections.abc import Callable
from typing import Any

import torch
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.generation.interfaces import GenerationInterface
from torch import Tensor
from transformers import AutoModelForCausalLM


class HuggingFaceGeneration(GenerationInterface):
    """Samples token by token. The same prompts give the same responses for the same weights, whatever came before."""

    fetch_weights: Callable[[], dict[str, Tensor]]
    """The policy's whole weights by their Hugging Face names; set before training."""
    latest: "HuggingFaceGeneration"
    """The one that the trainer made."""

    def __init__(self, cluster: Any = None, config: Any = None, **kwargs: Any) -> None:
        self.cfg = config
        self.model = AutoModelForCausalLM.from_pretrained(config["model_name"], dtype=torch.float32).eval()
        self.weight_synchronizer = Synchronizer(self)
        HuggingFaceGeneration.latest = self

    def generate(self, data: Any, greedy: bool = False) -> Any:
        """See `GenerationInterface.generate`."""
        ids, lengths = data["input_ids"], data["input_lengths"]
        draws = torch.Generator().manual_seed(int(ids.sum()))
        rows = [self._respond(ids[row, : lengths[row]].tolist(), draws, greedy) for row in range(len(ids))]
        width = ids.shape[1] + self.cfg["max_new_tokens"]
        made = torch.tensor([len(logprobs) for _, logprobs, _ in rows])
        output = torch.full((len(rows), width), self.cfg.get("_pad_token_id", 0))
        logprobs = torch.zeros(len(rows), width)
        for row, (tokens, values, _) in enumerate(rows):
            output[row, : len(tokens)] = torch.tensor(tokens)
            logprobs[row, len(tokens) - len(values) : len(tokens)] = torch.tensor(values)
        return BatchedDataDict(
            {
                "output_ids": output,
                "logprobs": logprobs,
                "generation_lengths": made,
                "unpadded_sequence_lengths": lengths + made,
                "truncated": torch.tensor([not stopped for _, _, stopped in rows]),
            }
        )

    def _respond(self, tokens: list[int], draws: torch.Generator, greedy: bool) -> tuple[list[int], list[float], bool]:
        """(prompt and response, log-probs of the response, whether it stopped by itself)."""
        stops = set(self.cfg["stop_token_ids"] or [self.model.config.eos_token_id])
        room = self.model.config.max_position_embeddings - len(tokens)
        logprobs: list[float] = []
        for _ in range(min(self.cfg["max_new_tokens"], room)):
            with torch.no_grad():
                logs = self.model(torch.tensor([tokens])).logits[0, -1].float().log_softmax(dim=-1)
            chosen = int(logs.argmax() if greedy else torch.multinomial(logs.exp(), 1, generator=draws))
            tokens = [*tokens, chosen]
            logprobs.append(float(logs[chosen]))
            if chosen in stops:
                return tokens, logprobs, True
        return tokens, logprobs, False

    def init_collective(self, *args: Any, **kwargs: Any) -> list[Any]:
        return []

    def prepare_for_generation(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def finish_generation(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def prepare_refit_info(self, *args: Any, **kwargs: Any) -> None: ...

    def update_weights_via_ipc_zmq(self) -> list[Any]:
        return []

    def update_weights_from_collective(self) -> list[Any]:
        return []

    def shutdown(self) -> bool:
        return True

    def clear_logger_metrics(self) -> None: ...

    def get_logger_metrics(self) -> dict[str, Any]:
        return {}

    def snapshot_step_metrics(self) -> None: ...

    def get_step_metrics(self) -> dict[str, Any]:
        return {}


class Synchronizer:
    """Upstream's hook for the transfer of weights (`weight_synchronizer`, `nemo_rl.algorithms.grpo.refit`)."""

    is_stale = True

    def __init__(self, generation: HuggingFaceGeneration) -> None:
        self.generation = generation

    def init_communicator(self) -> None: ...

    def sync_weights(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.generation.model.load_state_dict(HuggingFaceGeneration.fetch_weights(), strict=True)
        return {}

    def shutdown(self) -> None: ...
