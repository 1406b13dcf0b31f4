"""NeMo-RL's policy on the driver, which keeps the entropies of the log-prob pass and adds the clips' weights to the
data."""

from typing import Any

from nemo_rl.models.policy.lm_policy import Policy

from echorl_nemo.echo import boundary_ids
from echorl_nemo.engines.nemo_rl.loss import WEIGHT, EchoClippedPGLossFn
from echorl_nemo.engines.nemo_rl.step import EchoStep
from echorl_nemo.engines.nemo_rl.upstream import register_worker


class EchoPolicy(Policy):
    """NeMo-RL's `Policy` with workers that return entropies. `step` is the record of the run's current step."""

    step: EchoStep

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        tokenizer = kwargs["tokenizer"] if "tokenizer" in kwargs else args[2]
        self.step.boundary_ids = boundary_ids(tokenizer, self.step.config.boundary)
        super().__init__(*args, **{**kwargs, "worker_extension_cls_fqn": register_worker()})

    def get_logprobs(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Upstream's `get_logprobs`. The entropies that the workers return are kept for `train`."""
        result = super().get_logprobs(data, *args, **kwargs)
        self.step.record_entropies(result["entropies"])
        return result

    def train(self, data: Any, loss_fn: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Upstream's `train` on data with `echo_weight`. The statistics of the clips are added to the metrics under
        `echorl/`."""
        if not isinstance(loss_fn, EchoClippedPGLossFn) or not loss_fn.echorl_coef:
            return super().train(data, loss_fn, *args, **kwargs)
        size = kwargs.get("gbs") or self.cfg["train_global_batch_size"]
        weights, statistics = self.step.weights(data, size, token_level=loss_fn.loss_type.value == "token_level")
        data[WEIGHT] = weights
        results: dict[str, Any] = super().train(data, loss_fn, *args, **kwargs)
        # the trainer sums lists over micro-batches
        results["all_mb_metrics"] |= {f"echorl/{name}": [value] for name, value in statistics.items()}
        return results
