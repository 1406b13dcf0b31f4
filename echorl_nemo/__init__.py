"""EchoRL (arXiv 2605.31228) as an RL post-training stack on NVIDIA NeMo and Megatron-Core."""

__version__ = "0.1.0"
