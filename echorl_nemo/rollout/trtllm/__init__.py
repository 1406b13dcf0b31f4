"""Rollouts from TensorRT-LLM, with exact entropies that a probe in its GPU workers computes."""
