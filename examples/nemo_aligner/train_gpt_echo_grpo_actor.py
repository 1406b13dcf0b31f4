"""GRPO with EchoRL in NeMo-Aligner: configured by conf/nemo_aligner/echo_grpo_actor.yaml, see docs/nemo_aligner.md."""

from functools import partial
from typing import Any

import torch

from echorl_nemo.engines.nemo_aligner import cpu

cpu.install()  # where there is no GPU; before anything of NeMo is imported

import torch.multiprocessing as mp  # noqa: E402
from megatron.core.utils import divide  # noqa: E402
from nemo.core.config import hydra_runner  # noqa: E402
from nemo.utils import logging  # noqa: E402
from nemo.utils.exp_manager import exp_manager  # noqa: E402
from nemo_aligner.data.nlp.builders import build_dataloader  # noqa: E402
from nemo_aligner.utils import parallel_state  # noqa: E402
from nemo_aligner.utils.batch_iterators import get_batch_iterator_cls  # noqa: E402
from nemo_aligner.utils.distributed import Timer  # noqa: E402
from nemo_aligner.utils.train_script_utils import (  # noqa: E402
    CustomLoggerWrapper,
    add_custom_checkpoint_callback,
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_peft,
    init_using_ptl,
    resolve_and_create_trainer,
    retrieve_custom_trainer_state_dict,
)
from nemo_aligner.utils.utils import (  # noqa: E402
    load_and_override_model_config,
    load_from_nemo,
    retrieve_model_state_dict_in_cpu,
)
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from echorl_nemo.engines.nemo_aligner.actor import MegatronGPTEchoGRPOActorModel  # noqa: E402
from echorl_nemo.engines.nemo_aligner.batch import PromptDataset, collate_prompts  # noqa: E402
from echorl_nemo.engines.nemo_aligner.config import VerifierConfig, algorithm, section  # noqa: E402
from echorl_nemo.engines.nemo_aligner.rewards import InProcessRewards  # noqa: E402
from echorl_nemo.engines.nemo_aligner.trainer import EchoGRPOTrainer  # noqa: E402

for name, function in {
    "multiply": lambda x, y: x * y,
    "int_div": lambda x, y: x // y,
    "subtract": lambda x, y: x - y,
}.items():
    OmegaConf.register_new_resolver(name, function, replace=True)


@hydra_runner(config_path="../../conf/nemo_aligner", config_name="echo_grpo_actor")
def main(cfg: DictConfig) -> None:
    if torch.cuda.is_available():
        mp.set_start_method("spawn", force=True)
    trainer = make_trainer(cfg)
    trainer.fit()
    trainer.rm.close()


def make_trainer(cfg: DictConfig) -> EchoGRPOTrainer:
    """Everything that `cfg` names, tied together; restored where `exp_manager` finds a checkpoint."""
    cfg.model = load_and_override_model_config(cfg.pretrained_checkpoint.restore_from_path, cfg.model)
    algorithm(cfg.model)  # what is wrong is told before a model is built
    verifier = section(cfg.get("verifier"), VerifierConfig, "verifier")
    logging.info(f"\n{OmegaConf.to_yaml(cfg)}")

    ptl_trainer = resolve_and_create_trainer(cfg, "grpo")
    exp_manager(ptl_trainer, cfg.exp_manager)
    logger = CustomLoggerWrapper(ptl_trainer.loggers)
    model = load_from_nemo(
        MegatronGPTEchoGRPOActorModel,
        cfg.model,
        ptl_trainer,
        strict=True,
        restore_path=cfg.pretrained_checkpoint.restore_from_path,
    )
    init_peft(model, cfg.model)
    if model.algo.kl_coef > 0 and cfg.model.peft.peft_scheme == "none":
        model.init_policy_state_dict = retrieve_model_state_dict_in_cpu(
            model, megatron_amp_O2=cfg.model.get("megatron_amp_O2", False)
        )
    progress = retrieve_custom_trainer_state_dict(ptl_trainer) if ptl_trainer.ckpt_path is not None else None
    init_distributed(ptl_trainer, model, cfg.model.get("transformer_engine", False))

    train, validation = (dataset(cfg, name, model.tokenizer) for name in ("train", "validation"))
    # NeMo plans the learning rate by a dataloader whose batches are a replica's share of an optimizer step
    share = divide(cfg.model.global_batch_size, parallel_state.get_data_parallel_world_size())
    init_using_ptl(ptl_trainer, model, torch.utils.data.DataLoader(train, batch_size=share), train)
    del model._train_dl
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
    checkpoints = add_custom_checkpoint_callback(ptl_trainer, model)
    logger.log_hyperparams(OmegaConf.to_container(cfg))

    trainer = EchoGRPOTrainer(
        cfg=cfg.trainer.grpo,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        **dataloaders(cfg, train, validation, model.tokenizer.eos_id),
        rm=reward_model(cfg, verifier, model.tokenizer),
        batch_iterator_cls=get_batch_iterator_cls(cfg.trainer.grpo.get("batch_iterator", {})),
        logger=logger,
        ckpt_callback=checkpoints,
        run_timer=Timer(cfg.exp_manager.get("max_time_per_run")),
        reward_weights=tuple(verifier.extra.values()),
    )
    if progress is not None:
        trainer.load_state_dict(progress)
    return trainer


def dataset(cfg: DictConfig, name: str, tokenizer: Any) -> PromptDataset:
    longest = cfg.model.encoder_seq_length - cfg.model.grpo.length_params.max_length
    return PromptDataset(cfg.data[name], tokenizer, longest=longest, field=f"data.{name}")


def dataloaders(cfg: DictConfig, train: PromptDataset, validation: PromptDataset, eos_id: int) -> dict[str, Any]:
    """What the trainer makes its batches of prompts with."""
    grpo = cfg.model.grpo
    collate = partial(collate_prompts, response_length=grpo.length_params.max_length, eos_id=eos_id)
    loader = partial(build_dataloader, cfg=cfg, collate_fn=collate, load_gbs=False)
    return {
        "train_dataloader_builder": partial(
            loader, dataset=train, mbs=grpo.rollout_micro_batch_size, gbs=grpo.num_rollout_samples
        ),
        "val_dataloader_builder": partial(
            loader,
            dataset=validation,
            mbs=grpo.val_rollout_micro_batch_size,
            gbs=grpo.num_val_samples,
            use_random_sampler=False,
        ),
        "collate_fn": collate,
    }


def reward_model(cfg: DictConfig, verifier: VerifierConfig, tokenizer: Any) -> Any:
    """Verifiers in process, or upstream's client of a reward model server."""
    if verifier.name is not None:
        return InProcessRewards(verifier, tokenizer)
    from nemo_aligner.models.nlp.gpt.reward_critic_clients import RemoteGPTRMClient  # needs pytriton

    client = RemoteGPTRMClient(cfg.remote_rm)
    client.close = client.communicator.close
    return client


if __name__ == "__main__":
    main()
