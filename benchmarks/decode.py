"""Full-depth decoding of one sequence, fp32, against transformers' `generate`, on this machine.

    python benchmarks/decode.py [MODEL] [--tokens 128] [--pairs 5] [--out FILE.json]

MODEL is a Hugging Face directory; by default the one that `make quickstart` made. The two decoders take turns
(A B A B …) in one process with the same threads, prompt and number of tokens, and must give the same tokens. Reported
are medians of each, the median of the ratios pair by pair, and the load. The limit is the bytes of the weights that a
token needs over the rate at which this machine sums memory of that size.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import eellm

TEXT = "The history of the Roman empire begins with a small town on the river Tiber. In the early days"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="quickstart/SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours, theirs = decoders(options.model, options.tokens)
    assert ours() == theirs(), "both decoders must give the same tokens"
    pairs = [(rate(ours, options.tokens), rate(theirs, options.tokens)) for _ in range(options.pairs)]
    result = {
        "model": options.model,
        "tokens": options.tokens,
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "eellm_tokens_per_s": [a for a, _ in pairs],
        "transformers_tokens_per_s": [b for _, b in pairs],
        "median_ratio": statistics.median(a / b for a, b in pairs),
        "limit_tokens_per_s": limit(options.model),
        "load_average": os.getloadavg(),
    }
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def decoders(path: str, num_tokens: int) -> tuple[Callable[[], list[int]], Callable[[], list[int]]]:
    """Ours and transformers', each from the same prompt to its list of new tokens."""
    mine = eellm.load(path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = mine.tokenizer.encode(TEXT)
    ids = torch.tensor([prompt])

    def ours() -> list[int]:
        (out,) = eellm.generate(mine, [prompt], max_new_tokens=num_tokens, method="full", ignore_eos=True)
        return out.tokens

    @torch.inference_mode()
    def theirs() -> list[int]:
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return out[0, len(prompt) :].tolist()

    return ours, theirs


def rate(decode: Callable[[], list[int]], num_tokens: int) -> float:
    """Tokens per second of one whole call, prompt included."""
    start = time.perf_counter()
    decode()
    return num_tokens / (time.perf_counter() - start)


def limit(path: str) -> float:
    """Tokens per second if each token only read its weights once, at the rate of a plain sum."""
    model = eellm.load(path)
    num_bytes = sum(p.nbytes for p in model.decoder.parameters())
    memory = torch.zeros(num_bytes // 4)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        memory.sum()
        times.append(time.perf_counter() - start)
    return 1 / min(times)


def table(result: dict) -> str:
    mine, theirs = result["eellm_tokens_per_s"], result["transformers_tokens_per_s"]
    rows = [f"{'eellm':>14} {'transformers':>14} {'ratio':>7}"]
    rows += [f"{a:14.1f} {b:14.1f} {a / b:7.2f}" for a, b in zip(mine, theirs, strict=True)]
    load = " ".join(f"{x:.2f}" for x in result["load_average"])
    rows.append(
        f"{statistics.median(mine):14.1f} {statistics.median(theirs):14.1f} {result['median_ratio']:7.2f}  (medians)"
    )
    rows.append(f"limit by memory: {result['limit_tokens_per_s']:.1f} tokens/s; load average {load}")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
