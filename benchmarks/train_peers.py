"""Tokens per second of a training step against plain PyTorch loops over other people's models, fp32, on this machine.

    python benchmarks/train_peers.py [--quick] [--threads 2] [--seq-len 256] [--out bench-out/train_peers.json]

All train the same Llama-shaped model without exits on the same batches, with the same fused AdamW, learning rates and
clipping. `eellm` is its trainer's whole step; `transformers` a loop over LlamaForCausalLM with SDPA attention and its
own loss, from the same weights: its losses must equal ours; `torchtitan`, where it can be imported (0.3 also wants
triton), a loop over its model and its loss, from weights of its own: its trainer needs a GPU. They take turns
(A B C A B C …) in one process. Reported are medians, the median of the ratios round by round, and the load. The text is
one document, so that no row has a boundary in it that only ours would respect.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from torch import Tensor, nn

import eellm
from eellm.config.model import ModelConfig
from eellm.config.optim import OptimConfig
from eellm.config.train import TextConfig, TrainConfig, TrainLoopConfig
from eellm.data.stream import open_data
from eellm.parallel.mesh import World
from eellm.pipeline.watched import unwatched
from eellm.train.check import resolve
from eellm.train.optim import learning_rate, make_optimizer
from eellm.train.trainer import Trainer

TOKENS_PER_STEP = 2048
Step = Callable[[int], float]
"""Number of the step, from 1 → its loss."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--quick", action="store_true", help="two rounds: does it run?")
    parser.add_argument("--out", type=Path, default=Path("bench-out/train_peers.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as directory:
        config = recipe(Path(directory), options.seq_len)
        trainer = Trainer(config, World(), unwatched)
        loops = {"eellm": lambda step: trainer.step(step)[0]["loss"]}
        loops |= {"transformers": plain_loop(config, *transformers_model(trainer, Path(directory)))}
        titan = torchtitan_model(config.model)
        loops |= {} if titan is None else {"torchtitan": plain_loop(config, *titan)}
        seconds = take_turns(loops, rounds=2 if options.quick else options.rounds)
    result = {
        "seq_len": options.seq_len,
        "batch_size": config.train.global_batch_size,
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": seconds,
        "load_average": [load, os.getloadavg()],
    }
    print(table(result))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


def recipe(directory: Path, seq_len: int) -> TrainConfig:
    text = directory / "text.txt"
    text.write_text("\n".join(topics.values()), encoding="utf-8")
    return resolve(
        TrainConfig(
            model=ModelConfig(
                vocab_size=4096,
                hidden_size=256,
                intermediate_size=768,
                num_layers=8,
                num_heads=8,
                max_seq_len=seq_len,
            ),
            data=TextConfig(train=(str(text),), seq_len=seq_len),
            optim=OptimConfig(),
            train=TrainLoopConfig(out_dir=directory, global_batch_size=TOKENS_PER_STEP // seq_len),
        )
    )


def transformers_model(trainer: Trainer, directory: Path) -> tuple[nn.Module, Callable[..., Tensor]]:
    """LlamaForCausalLM with the trainer's weights, and what makes its loss of tokens and labels."""
    eellm.save(trainer.placed.modules[0].model, directory / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory / "model", dtype=torch.float32, attn_implementation="sdpa"
    ).train()

    def loss(tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        return model(input_ids=tokens_BT, labels=labels_BT, shift_labels=labels_BT, use_cache=False).loss

    return model, loss


def torchtitan_model(config: ModelConfig) -> tuple[nn.Module, Callable[..., Tensor]] | None:
    """torchtitan's Llama 3 of the same sizes, with SDPA, which is its one attention that trains on a CPU."""
    try:
        from torchtitan.components.loss import cross_entropy_loss
        from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
        from torchtitan.models.common.attention import ScaledDotProductAttention
        from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
        from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
    except ImportError as error:
        print(f"without torchtitan: {error}")
        return None
    D, V, H = config.hidden_size, config.vocab_size, config.num_heads
    matrix = {"weight": partial(nn.init.normal_, std=config.init_std)}
    norm = RMSNorm.Config(normalized_shape=D, param_init={"weight": nn.init.ones_})
    attention = make_gqa_config(
        dim=D,
        n_heads=H,
        wqkv_param_init=matrix,
        wo_param_init=matrix,
        inner_attention=ScaledDotProductAttention.Config(),
        fuse_qkv=True,
        rope=ComplexRoPE.Config(dim=D // H, max_seq_len=config.max_seq_len, theta=config.rope.rope_theta),
    )
    mlp = make_ffn_config(dim=D, hidden_dim=config.intermediate_size, w1_param_init=matrix, w2w3_param_init=matrix)
    layer = Llama3TransformerBlock.Config(attention_norm=norm, ffn_norm=norm, attention=attention, feed_forward=mlp)
    model = Llama3Model.Config(
        dim=D,
        vocab_size=V,
        tok_embeddings=Embedding.Config(num_embeddings=V, embedding_dim=D, param_init=matrix),
        norm=norm,
        lm_head=Linear.Config(in_features=D, out_features=V, param_init=matrix),
        layers=[layer] * config.num_layers,
    ).build()
    model.init_weights(buffer_device=torch.device("cpu"))

    def loss(tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        return cross_entropy_loss(model(tokens_BT), labels_BT) / labels_BT.numel()

    return model, loss


def plain_loop(config: TrainConfig, model: nn.Module, loss_of: Callable[..., Tensor]) -> Step:
    """Forward, backward, clip, step; batches from a stream of its own."""
    stream, _, _ = open_data(config.data, vocab_size=config.model.vocab_size, seed=config.train.seed)
    optimizer = make_optimizer(model.parameters(), config.optim)

    def step(number: int) -> float:
        batch = stream.take(config.train.global_batch_size)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(batch.tokens_BT, batch.labels_BT)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, config.train.steps, config.optim)
        optimizer.step()
        return loss.item()

    return step


def take_turns(loops: dict[str, Step], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each loop's steps; the first one, which makes the optimizer's state, isn't among them."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(1, rounds + 2):
        losses = {}
        for name, step in loops.items():
            start = time.perf_counter()
            losses[name] = step(number)
            seconds[name].append(time.perf_counter() - start)
        ours, theirs = losses["eellm"], losses["transformers"]
        assert abs(ours - theirs) < 1e-3 * ours, f"step {number}: loss {ours}, transformers {theirs}"
    return {name: values[1:] for name, values in seconds.items()}


def table(result: dict) -> str:
    seconds, load = result["seconds"], result["load_average"]
    rows = [f"{'':>14} {'tokens/s':>9} {'ours is':>8} {'range':>14}"]
    for name, values in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(values, seconds["eellm"], strict=True)]
        rows.append(
            f"{name:>14} {TOKENS_PER_STEP / statistics.median(values):9.0f} {statistics.median(ratios):7.2f}× "
            f"{min(ratios):6.2f} to {max(ratios):.2f}"
        )
    rows.append(f"{result['threads']} threads; load average {load[0][0]:.2f} before, {load[1][0]:.2f} after")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
