"""Prints the plan of a run as tables."""

from rich.console import Console
from rich.table import Table

from echorl_nemo.plan.estimate import Estimate
from echorl_nemo.plan.plan import Plan


def print_plan(plan: Plan, console: Console) -> None:
    """Print layout, parameters and estimates. `echorl_nemo.plan.plan.print_problems` prints the problems."""
    config, layout, trainer = plan.config, plan.config.parallel, plan.config.trainer
    console.print(
        f"engine {config.engine}, rollouts by {config.rollout.engine}; {config.cluster.nodes} nodes x "
        f"{config.cluster.gpus_per_node or 'any'} GPUs: tensor {layout.tensor}"
        f"{' + sequence' if layout.sequence else ''} x pipeline {layout.pipeline} x context {layout.context} x data "
        f"{layout.data}{f', experts over {layout.expert}' if layout.expert > 1 else ''}"
    )
    console.print(
        f"a step: {trainer.prompts_per_step} prompts x {config.rollout.group_size} rollouts of up to "
        f"{config.data.max_prompt_tokens} + {config.rollout.max_new_tokens} tokens, "
        f"{trainer.prompts_per_step // trainer.minibatch_prompts} optimizer steps, micro-batches of "
        f"{f'{trainer.pack_tokens} tokens' if trainer.pack_tokens else trainer.micro_batch_size}"
    )
    if plan.parameters is None:
        return
    console.print(_stages(plan))
    console.print(_memory(plan))
    mean = config.rollout.mean_new_tokens
    lengths = f"responses of {mean} tokens on average" if mean else "every response of full length"
    console.print(_items(f"Seconds of a step, with {lengths}", "s", plan.seconds, shares=True))
    console.print(_items("GB that a GPU sends in a step", "GB", plan.network, shares=False))


def _stages(plan: Plan) -> Table:
    table = Table(
        "stage", "layers", "parameters of a rank", "parameters of the stage", title=f"{plan.parameters:,} parameters"
    )
    for number, stage in enumerate(plan.stages):
        table.add_row(str(number), str(stage.layers), f"{stage.rank:,}", f"{stage.whole:,}")
    return table


def _memory(plan: Plan) -> Table:
    limit = plan.config.cluster.gpu_memory_gib
    table = Table(
        "", *(f"stage {each.stage}" for each in plan.memory), "formula, bytes", title=f"GiB of a GPU, of {limit:.0f}"
    )
    names = list(dict.fromkeys(item.name for each in plan.memory for item in each.items))
    for name in names:
        items = [next((item for item in each.items if item.name == name), None) for each in plan.memory]
        formula = next(item.formula for item in items if item is not None)
        table.add_row(name, *(f"{item.value:.1f}" if item else "" for item in items), formula)
    table.add_section()
    table.add_row("update", *(f"{each.update:.1f}" for each in plan.memory), "all but KV cache and engine")
    table.add_row("generate", *(f"{each.generate:.1f}" for each in plan.memory), "all but activations and logits")
    return table


def _items(title: str, unit: str, items: list[Estimate], *, shares: bool) -> Table:
    total = sum(item.value for item in items)
    table = Table("", unit, *(["share"] if shares else []), "formula", title=title)
    for item in items:
        share = [f"{item.value / total:.0%}"] if shares and total else []
        table.add_row(item.name, f"{item.value:.1f}", *share, item.formula)
    return table
