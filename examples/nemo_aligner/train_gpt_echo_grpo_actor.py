"""GRPO with EchoRL in NeMo-Aligner: configured by conf/nemo_aligner/echo_grpo_actor.yaml, see docs/nemo_aligner.md."""

from omegaconf import DictConfig


def main(cfg: DictConfig) -> None:
    from echorl_nemo.engines.nemo_aligner.run import train

    train(cfg)


if __name__ == "__main__":
    # all of NeMo is imported here and no earlier: each process that verifies rewards imports this file again
    from echorl_nemo.engines.nemo_aligner import cpu

    cpu.install_stand_ins()  # where there is no GPU; before anything of NeMo is imported

    from nemo.core.config import hydra_runner

    hydra_runner(config_path="../../conf/nemo_aligner", config_name="echo_grpo_actor")(main)()
