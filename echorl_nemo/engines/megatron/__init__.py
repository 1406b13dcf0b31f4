"""The native engine: policy, rollouts, trainer and checkpoints on Megatron-Core."""
