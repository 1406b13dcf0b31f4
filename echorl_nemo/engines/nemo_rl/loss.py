"""The loss: NeMo-RL's clipped policy-gradient loss plus the clip loss.

It is pickled by reference to the training workers, so that it imports only torch and NeMo-RL.

Shapes: B rollouts of a micro-batch, S positions.
"""

from typing import Any

import torch
from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossFn
from torch import Tensor

WEIGHT = "echo_weight"
"""Key of the data's weights [B, S] float32: the weight of each token in the clip loss, see `EchoStep.weights`."""


class EchoClippedPGLossFn(ClippedPGLossFn):
    """`ClippedPGLossFn` + `coef` x clip loss, in the same forward and backward.

    NeMo-RL divides the loss by the global count of valid tokens (or sequences, by its type). `echo_weight` is scaled so
    that this division gives the clip loss's own denominator. So the loss does not depend on replicas, micro-batch size
    or packing.
    """

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(cfg, *args, **kwargs)
        section = cfg["echorl"] if isinstance(cfg, dict) else cfg.echorl
        self.echorl_coef = float(section.get("coef", 1e-3)) if section.get("enabled", True) else 0.0
        self.echorl_token_weight = section.get("token_weight", "one")
        normalizations = getattr(self, "metric_normalizations", None)
        if normalizations is not None:  # since v0.8 upstream records how each metric was divided
            normalizations["echorl/clip_loss"] = normalizations["loss"]

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Any,
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """``next_token_logprobs`` [B, S - 1]; see `ClippedPGLossFn.__call__`. The metric `loss` holds the whole loss,
        and `echorl/clip_loss` the clip loss without its coefficient, nats.

        Raises KeyError if the data has no `echo_weight`.
        """
        loss, metrics = super().__call__(next_token_logprobs, data, global_valid_seqs, global_valid_toks, **kwargs)
        if not self.echorl_coef:
            return loss, metrics
        weight = data[WEIGHT][:, 1:].to(next_token_logprobs.dtype)
        logprobs = torch.where(weight > 0, next_token_logprobs, 0.0)
        if self.echorl_token_weight == "probability":
            weight = weight * logprobs.detach().exp()
        total = -(weight * logprobs).sum()
        count = global_valid_toks if self.loss_type.value == "token_level" else global_valid_seqs
        clip = total / torch.as_tensor(count, dtype=total.dtype, device=total.device).clamp(min=1.0)
        whole = loss + self.echorl_coef * clip
        return whole, {**metrics, "loss": whole.item(), "echorl/clip_loss": clip.item()}
