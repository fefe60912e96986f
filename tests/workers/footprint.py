"""What is alive near the end of a backward pass and after it, at its most; rank 0 writes bytes a
parameter.

Arguments: where to, and pairs of a precision and a ZeRO stage, as "bf16 1".
"""

import gc
import json
import sys
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from pretrain.memory import full_batch
from zerobert import distributed, engine
from zerobert.config import BertConfig
from zerobert.engine import Engine
from zerobert.model import BertForPreTraining
from zerobert.optim import build_optimizer, optimizer_config

VOCAB_SIZE, LENGTH, PREDICTIONS, MICRO_STEPS = 200, 16, 3, 2
# Many layers: at stage 3 the weights of the one that is computed are there, and are not counted.
MODEL = BertConfig.from_size(
    {"size": "tiny", "num_hidden_layers": 10, "vocab_size": VOCAB_SIZE}, "test"
)


def main(output: Path, cases: list[str]) -> None:
    get_accelerator().is_fp16_supported = lambda: True
    engine.init_distributed()
    found = {}
    for case in cases:
        precision, stage = case.split()
        found[case] = bytes_a_parameter(precision, int(stage))
    if distributed.is_main():
        output.write_text(json.dumps(found))
    distributed.barrier()
    engine.leave_distributed()


def bytes_a_parameter(precision: str, stage: int) -> float:
    before = live_storages()  # an engine that is done with is not quite gone; held, for its places
    model = BertForPreTraining(MODEL)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    optimizer = build_optimizer(
        model, optimizer_config({"type": "AdamW", "params": {"lr": 1e-3}}, "test"), "auto"
    )
    training = Engine(model, optimizer, ds_config(precision, stage))
    batch = full_batch(1, LENGTH, PREDICTIONS, VOCAB_SIZE)
    alive = []

    def note(_: object = None) -> None:
        new = [v for k, v in live_storages().items() if k not in before]
        alive.append(sum(storage.nbytes() for storage in new))

    def on_the_way_back(_module: object, _inputs: object, out: torch.Tensor) -> None:
        out.register_hook(note)

    model.bert.embeddings.register_forward_hook(on_the_way_back)
    for micro_step in range(2 * MICRO_STEPS):  # the moments come with the first step
        losses = training.forward(**batch)
        loss = (losses.mlm_loss_sum + losses.nsp_loss_sum) / 1000
        del losses
        training.backward(loss)
        del loss
        if micro_step >= MICRO_STEPS:
            note()
        training.step(1e-4)
    training.close()
    return max(alive) / num_parameters


def ds_config(precision: str, stage: int) -> dict:
    zero = {
        "stage": stage,
        "allgather_bucket_size": 1000,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    low = {"fp16": {"enabled": True, "initial_scale_power": 4}, "bf16": {"enabled": True}}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_STEPS,
        "gradient_clipping": 1.0,
        "zero_optimization": zero if stage else {"stage": 0},
        **({} if precision == "fp32" else {precision: low[precision]}),
    }


def live_storages() -> dict[int, torch.UntypedStorage]:
    """Those of all tensors, by their place in memory."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if not isinstance(found, torch.Tensor):
            continue
        gradient = found.grad if found.is_leaf else None
        for tensor in (found, *([] if gradient is None else [gradient])):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
    return storages


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
