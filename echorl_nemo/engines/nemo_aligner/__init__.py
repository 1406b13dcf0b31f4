"""EchoRL in NVIDIA NeMo-Aligner 0.7: a GRPO actor, its trainer, rewards in process."""
