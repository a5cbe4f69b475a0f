"""Train a tiny student from scratch: `python examples/student/pretrain.py --output_dir DIR [--task word_problems]`.

The student learns two things from generated text (see `arithmetic.py`, of the demo, and `word_problems.py`):

- to *solve*: the next token of demonstrations that carry a misconception and random slips;
- to *proofread*: behind a `<proofread>` token at the very start, each newline of a solution is labelled `<right>` as
  long as all lines so far are right, and `<wrong>` from the first error on.

Proofreading stands for what a large model knows from pretraining: a step-critic that starts from the student can then
find "is this right?" in the hidden state at the end of a step. Ordinary prompts have no `<proofread>` token, so they
get ordinary solutions.

Everything follows from `--seed`. On one CPU core the default settings take about ten minutes, word problems longer.
"""

import argparse
import importlib
import itertools
import math
import random
import time

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


# Proofread solutions have more slips than demonstrations, so that right and wrong lines are about as frequent.
PROOFREAD_SLIP_RATE = 0.15
IGNORED = -100
TASKS = ("arithmetic", "word_problems", "programs")  # modules beside this one


def make_tokenizer(task) -> PreTrainedTokenizerFast:
    """
    Tokenizer with one token per digit, word, operator (its spaces included), newline and `#### `.

    Nothing is put in front of a prompt; `<eos>` ends a solution. Encoding and decoding are exact inverses.
    """
    special_tokens = ["<pad>", "<eos>", "<unk>", "<proofread>", "<right>", "<wrong>"]
    vocab = {token: i for i, token in enumerate(special_tokens + task.PIECES)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(task.PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<proofread>", "<right>", "<wrong>"],
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=task.MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(tokenizer: PreTrainedTokenizerFast, width: int, n_layers: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Token ids of shape `(len(texts), length)`, padded at their ends."""
    return tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids


def solving_batch(task, problems, rng, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Demonstrations and their next-token labels.

    Returns:
        `input_ids` and `labels`, both of shape `(len(problems), length)`. `labels[:, t]` is the token after
        `input_ids[:, t]`, or -100 within the prompt and behind the end.
    """
    texts = [problem["prompt"] + task.demonstration(problem, rng) + tokenizer.eos_token for problem in problems]
    input_ids = tokenize(texts, tokenizer)
    lengths = torch.tensor([len(ids) for ids in tokenizer([problem["prompt"] for problem in problems]).input_ids])
    labels = input_ids.roll(-1, dims=1)
    labels[torch.arange(labels.shape[1]) < lengths[:, None] - 1] = IGNORED
    labels[labels == tokenizer.pad_token_id] = IGNORED
    labels[:, -1] = IGNORED
    return input_ids, labels


def proofreading_batch(task, problems, rng, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Solutions behind a `<proofread>` token, labelled at their newlines.

    Returns:
        `input_ids` and `labels`, both of shape `(len(problems), length)`. `labels` is `<right>` or `<wrong>` at each
        newline of the solution and -100 elsewhere; the verdicts are never part of the input.
    """
    solutions = [task.demonstration(problem, rng, slip_rate=PROOFREAD_SLIP_RATE) for problem in problems]
    texts = ["<proofread>" + p["prompt"] + s + tokenizer.eos_token for p, s in zip(problems, solutions, strict=True)]
    input_ids = tokenize(texts, tokenizer)
    ends_line = input_ids == tokenizer.convert_tokens_to_ids("\n")
    ends_line &= ends_line.cumsum(dim=1) > 1  # the first newline ends the prompt
    # The closing line has no newline, hence no verdict.
    verdicts = [is_right for p, s in zip(problems, solutions, strict=True) for is_right in task.proofread(p, s)[:-1]]
    right, wrong = tokenizer.convert_tokens_to_ids(["<right>", "<wrong>"])
    labels = torch.full_like(input_ids, IGNORED)
    labels[ends_line] = torch.where(torch.tensor(verdicts), right, wrong)
    return input_ids, labels


def pretrain(task, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    """Train on `args.steps` batches of solving and proofreading sequences, with new demonstrations each time."""
    rng = random.Random(args.seed)
    problems = task.make_problems("pretrain", args.n_problems, seed=args.seed)
    n_proofreading = round(args.batch_size * args.proofreading_share)
    n_solving = args.batch_size - n_proofreading
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, args))
    stream = (problem for _ in itertools.count() for problem in rng.sample(problems, len(problems)))
    start = time.time()
    model.train()
    for step in range(1, args.steps + 1):
        losses = {}
        for name, n, make_batch in (
            ("solving", n_solving, solving_batch),
            ("proofreading", n_proofreading, proofreading_batch),
        ):
            if n:
                input_ids, labels = make_batch(task, list(itertools.islice(stream, n)), rng, tokenizer)
                logits = model(input_ids=input_ids, use_cache=False).logits
                losses[name] = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % args.logging_steps == 0 or step == args.steps:
            report = "  ".join(f"{name} {loss.item():.4f}" for name, loss in losses.items())
            print(f"step {step:5d}  {report}  {time.time() - start:.0f} s", flush=True)
        if args.save_steps and step % args.save_steps == 0:
            save(task, model, tokenizer, args.output_dir)


def learning_rate_factor(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up over the first 5% of the steps, then a cosine to zero."""
    warmup = max(1, args.steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (args.steps - warmup)))


def save(task, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output_dir: str) -> None:
    """Write the files that `from_pretrained` reads."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=task.MAX_SOLUTION_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(output_dir)
    tokenizer.backend_tokenizer.no_padding()  # batches of training were padded; who loads it decides for himself
    tokenizer.save_pretrained(output_dir)


@torch.no_grad()
def accuracy(task, model, tokenizer, problems, do_sample: bool, seed: int) -> tuple[float, float]:
    """
    Share of problems answered right with one solution each.

    Returns:
        The accuracy and its standard error over problems.
    """
    model.eval()
    torch.manual_seed(seed)
    inputs = tokenizer([problem["prompt"] for problem in problems], padding=True, return_tensors="pt")
    output_ids = model.generate(**inputs, do_sample=do_sample)
    solutions = tokenizer.batch_decode(output_ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    mean = sum(task.is_correct(p, s) for p, s in zip(problems, solutions, strict=True)) / len(problems)
    return mean, math.sqrt(mean * (1 - mean) / len(problems))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--task", choices=TASKS, default=TASKS[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--proofreading_share", type=float, default=0.5)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--n_problems", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--n_layers", type=int, default=6)
    parser.add_argument("--n_eval_problems", type=int, default=1024)
    parser.add_argument("--logging_steps", type=int, default=50)
    parser.add_argument("--save_steps", type=int, default=0)
    args = parser.parse_args()

    task = importlib.import_module(args.task)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(task)
    model = make_model(tokenizer, args.width, args.n_layers)
    print(f"{model.num_parameters():,} parameters")
    pretrain(task, model, tokenizer, args)
    save(task, model, tokenizer, args.output_dir)
    problems = task.make_problems("validation", args.n_eval_problems, seed=args.seed)
    for name, do_sample in (("sampled", True), ("greedy", False)):
        mean, standard_error = accuracy(task, model, tokenizer, problems, do_sample, args.seed)
        print(f"{name}: {mean:.3f} ± {standard_error:.3f} on {len(problems)} validation problems")


if __name__ == "__main__":
    main()
