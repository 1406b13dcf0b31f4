"""EchoRL in NVIDIA NeMo-Aligner 0.7: a GRPO actor, its trainer, and verifiers in place of a reward model server."""
