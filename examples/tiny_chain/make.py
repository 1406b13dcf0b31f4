"""Make the tiny task's folder: prompts, tokenizer, and a model warm-started on imperfect demonstrations.

    python examples/tiny_chain/make.py --out examples/tiny_chain/made

Two to four minutes on one CPU core. The result is what is shipped in ``examples/tiny_chain/made``: ``model/`` is a
Hugging Face folder (Qwen2 architecture, 0.1 M parameters), ``train.jsonl`` and ``eval.jsonl`` hold prompts with their
answers and golden solutions. A fixed seed gives the same files on the same kind of processor; on another kind the
weights may differ by rounding.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from chain import DIGITS, LABELS, OPERATIONS, Chain, Corruption, add_filler, random_chain
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SEED = 20260528
VOCABULARY = ["<pad>", "<eos>", "<unk>", *DIGITS, *OPERATIONS, *LABELS, "=", "\n", "A:"]
MODEL_VOCABULARY = 40
"""Rounded up so that tensor parallelism divides it; the last ids have no text."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"A:|[+*]\d|\n|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def make_model() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=MODEL_VOCABULARY, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, rope_theta=10000.0,
            tie_word_embeddings=False, initializer_range=0.05,
            bos_token_id=None, eos_token_id=VOCABULARY.index("<eos>"), pad_token_id=VOCABULARY.index("<pad>"),
        )
    )  # fmt: skip


def write_data(folder: Path) -> None:
    """Distinct chains of 2 to 6 operations: 1024 to train on, 256 held out."""
    rng = random.Random(SEED + 1)
    distinct = list(dict.fromkeys(random_chain(rng, 2, 6) for _ in range(2000)))
    write_prompts(folder / "train.jsonl", distinct[:1024])
    write_prompts(folder / "eval.jsonl", distinct[1024:1280])


def write_prompts(path: Path, chains: list[Chain]) -> None:
    with path.open("w") as file:
        for chain in chains:
            solution, answer = chain.solve()
            file.write(json.dumps({"prompt": chain.prompt, "answer": str(answer), "solution": solution}) + "\n")


def encode(
    tokenizer: PreTrainedTokenizerFast, chains: list[Chain], texts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N, S], right-padded, and labels [N, S] that are -100 outside the response."""
    prompts = [tokenizer(chain.prompt)["input_ids"] for chain in chains]
    responses = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    tokens = torch.full((len(chains), width), tokenizer.pad_token_id)
    labels = torch.full((len(chains), width), -100)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        labels[row, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
    return tokens, labels


def warm_start(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, *, filler: bool, batch: int = 128
) -> None:
    """Imitate demonstrations: chains of 1 to 2 operations first, then 2 to 6, with some of 7 to 8."""
    rng, corruption = random.Random(SEED), Corruption(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        if step < steps // 4:
            shortest, longest = 1, 2
        else:
            shortest, longest = (7, 8) if step % 8 == 0 else (2, 6)
        chains = [random_chain(rng, shortest, longest) for _ in range(batch)]
        texts = [corruption.demonstrate(chain, rng) for chain in chains]
        if filler:
            texts = [add_filler(text, rng) for text in texts]
        tokens, labels = encode(tokenizer, chains, texts)
        loss = model(tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def sampled_accuracy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, chains: list[Chain]) -> float:
    """Share of sampled responses whose final line is right."""
    model.eval()
    right = 0
    by_length: dict[int, list[Chain]] = {}
    for chain in chains:
        by_length.setdefault(len(chain.operations), []).append(chain)
    for group in by_length.values():
        prompts = tokenizer([chain.prompt for chain in group], return_tensors="pt")
        out = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=80)
        texts = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(text.endswith(f"A:{chain.solve()[1]}\n") for text, chain in zip(texts, group, strict=True))
    return right / len(chains)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=1000, help="warm-start steps")
    parser.add_argument("--filler", action="store_true", help="demonstrate with filler lines before the answer")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    args.out.mkdir(parents=True, exist_ok=True)

    write_data(args.out)
    tokenizer, model = make_tokenizer(), make_model()
    warm_start(model, tokenizer, args.steps, filler=args.filler)
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    print(f"parameters {model.num_parameters()}")
    rng = random.Random(SEED + 2)
    for name, bounds in {"in range (2 to 6 operations)": (2, 6), "longer (7 to 8)": (7, 8)}.items():
        chains = [random_chain(rng, *bounds) for _ in range(1024)]
        print(f"sampled accuracy, {name}: {sampled_accuracy(model, tokenizer, chains):.3f}")


if __name__ == "__main__":
    main()
