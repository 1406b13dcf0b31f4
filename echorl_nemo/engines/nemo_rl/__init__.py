"""EchoRL as a plug-in for NVIDIA NeMo-RL: `python -m echorl_nemo.engines.nemo_rl.run --config ...`."""
