"""Rollouts: the batch that holds them, the protocol of rollout engines, sampling, packing, TensorRT-LLM."""
