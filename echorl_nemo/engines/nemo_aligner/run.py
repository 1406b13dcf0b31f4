"""Runs a training in NeMo-Aligner from its configuration: creates model, data, rewards and trainer."""

from functools import partial
from typing import Any

import torch

from echorl_nemo.engines.nemo_aligner import cpu

cpu.install_stand_ins()  # does nothing if there is a GPU; must come before NeMo is imported

import torch.multiprocessing as mp  # noqa: E402
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

from echorl_nemo.checks.nemo_aligner import batch_problems, method_problems  # noqa: E402
from echorl_nemo.engines.nemo_aligner.actor import MegatronGPTEchoGRPOActorModel  # noqa: E402
from echorl_nemo.engines.nemo_aligner.batch import PromptDataset, collate_prompts  # noqa: E402
from echorl_nemo.engines.nemo_aligner.config import VerifierConfig, method_config, parse_section  # noqa: E402
from echorl_nemo.engines.nemo_aligner.rewards import InProcessRewards  # noqa: E402
from echorl_nemo.engines.nemo_aligner.trainer import EchoGRPOTrainer  # noqa: E402
from echorl_nemo.errors import UserError, raise_problems  # noqa: E402

for name, function in {
    "multiply": lambda x, y: x * y,
    "int_div": lambda x, y: x // y,
    "subtract": lambda x, y: x - y,
}.items():
    OmegaConf.register_new_resolver(name, function, replace=True)


def train(cfg: DictConfig) -> None:
    """Run the training that ``cfg`` (of conf/nemo_aligner) describes.

    Raises UserError for wrong settings before anything is generated.
    """
    if torch.cuda.is_available():
        mp.set_start_method("spawn", force=True)
    trainer = make_trainer(cfg)
    trainer.fit()
    trainer.rm.close()


def make_trainer(cfg: DictConfig) -> EchoGRPOTrainer:
    """Create the trainer with everything that ``cfg`` names. It is restored if `exp_manager` finds a checkpoint."""
    cfg.model = load_and_override_model_config(cfg.pretrained_checkpoint.restore_from_path, cfg.model)
    raise_problems(method_problems(*method_config(cfg.model)))  # before a model is built
    verifier = parse_section(cfg.get("verifier"), VerifierConfig, "verifier")
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

    train, validation = datasets(cfg, model.tokenizer)
    # NeMo's learning-rate schedule reads it, and counts optimizer steps
    ptl_trainer.fit_loop.epoch_loop.max_steps = optimizer_steps(cfg, len(train))
    init_using_ptl(ptl_trainer, model, torch.utils.data.DataLoader(train), train)
    del model._train_dl
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
    checkpoints = add_custom_checkpoint_callback(ptl_trainer, model)
    logger.log_hyperparams(OmegaConf.to_container(cfg))

    replicas = parallel_state.get_data_parallel_world_size()
    raise_problems(batch_problems(cfg.trainer.grpo, model.cfg, replicas))
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


def datasets(cfg: DictConfig, tokenizer: Any) -> tuple[PromptDataset, PromptDataset]:
    """The prompts for training, as many as fill whole steps, and those for validation.

    Raises UserError if there are fewer than one step, or one validation, needs.
    """
    longest = cfg.model.encoder_seq_length - cfg.model.grpo.length_params.max_length
    train, validation = (
        PromptDataset(cfg.data[name], tokenizer, longest=longest, field=f"data.{name}")
        for name in ("train", "validation")
    )
    for name, prompts, size in (("train", train, "num_rollout_samples"), ("validation", validation, "num_val_samples")):
        if len(prompts) < cfg.model.grpo[size]:
            raise UserError(
                f"data.{name}: {len(prompts)} prompts are fewer than model.grpo.{size}={cfg.model.grpo[size]}; lower it"
            )
    # otherwise the sampler's epoch is longer than the trainer's, and the next one begins with a step of another size
    if left_out := train.drop_incomplete_step(cfg.model.grpo.num_rollout_samples):
        logging.warning(f"data.train: the last {left_out} of its prompts fill no step and are left out")
    return train, validation


def optimizer_steps(cfg: DictConfig, prompts: int) -> int:
    """Number of optimizer steps of the whole run if `data.train` has ``prompts`` prompts."""
    grpo, asked = cfg.trainer.grpo, cfg.model.grpo.num_rollout_samples
    steps = prompts // asked * grpo.max_epochs
    if grpo.max_steps >= 0:
        steps = min(steps, grpo.max_steps)
    return int(steps * asked * grpo.num_rollouts_per_prompt // cfg.model.global_batch_size)


def dataloaders(cfg: DictConfig, train: PromptDataset, validation: PromptDataset, eos_id: int) -> dict[str, Any]:
    """Keyword arguments of the trainer: the functions that build its training and validation loaders, and the one that
    collates prompts, padded with ``eos_id``."""
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
    """The verifiers in process, or upstream's client of a reward model server."""
    if verifier.name is not None:
        return InProcessRewards(verifier, tokenizer)
    from nemo_aligner.models.nlp.gpt.reward_critic_clients import RemoteGPTRMClient  # needs pytriton

    client = RemoteGPTRMClient(cfg.remote_rm)
    client.close = client.communicator.close
    return client
