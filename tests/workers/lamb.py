"""Train a small model with Lamb under DeepSpeed and hold every step against a float64 LAMB.

argv: a JSON with `ds` (DeepSpeed's keys), `lamb` (options) and `tolerance`.
"""

import json
import sys

import torch
from deepspeed.utils import safe_get_full_grad

from tests.lamb_reference import ReferenceLamb
from zerobert import distributed
from zerobert.config import BertConfig
from zerobert.engine import Engine, init_distributed
from zerobert.model import BertForPreTraining
from zerobert.optim import Lamb, parameter_groups

# Sizes that share no factor with the number of ranks: tensors are cut in odd places.
CONFIG = BertConfig(
    vocab_size=53,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=21,
    max_position_embeddings=17,
)
LR = 2e-2


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The step's gradient, averaged over ranks and micro-steps, whole on every rank."""
    whole = safe_get_full_grad(parameter) if hasattr(parameter, "_dp_group") else parameter.grad
    assert whole is not None
    return whole.double().clone()


def main() -> None:
    case = json.loads(sys.argv[1])
    init_distributed()
    torch.manual_seed(0)
    model = BertForPreTraining(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        model.bert.embeddings.word_embeddings.weight[CONFIG.vocab_size :] = 0  # padding
    optimizer = Lamb(parameter_groups(model, 0.01), lr=LR, **case["lamb"])
    rank, ranks = distributed.rank(), distributed.world_size()
    micro = 2
    ds = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 2,
        "train_batch_size": micro * 2 * ranks,
        "gradient_clipping": 0.0,  # the gradients that are read below are those before clipping
        **case["ds"],
    }
    engine = Engine(model, optimizer, ds)
    reference = ReferenceLamb(engine.full_state(), weight_decay=0.01, lr=LR, **case["lamb"])
    gradients: dict[str, torch.Tensor] = {}

    def capture(*_: object) -> None:
        if not gradients:
            for name, parameter in engine.module.named_parameters():
                whole, size = gradient(parameter), len(reference.start[name])
                assert not whole[size:].any()  # rows that pad the vocabulary
                gradients[name] = whole[:size]

    # BF16_Optimizer reduces the gradients no earlier than in step(); the others let go of them.
    reads_late = case["ds"].get("bf16") and case["ds"]["zero_optimization"]["stage"] == 1
    if reads_late:
        optimizer.register_step_pre_hook(capture)
    engine.train()
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for _ in range(engine.accumulation_steps):
            ids = torch.randint(1, 53, (ranks * micro, 16), generator=generator)
            ids = ids[rank * micro : (rank + 1) * micro]
            losses = engine.forward(
                input_ids=ids,
                input_mask=torch.ones_like(ids),
                segment_ids=torch.zeros_like(ids),
                masked_lm_positions=torch.tensor([[1, 5], [2, 0]]),
                masked_lm_ids=torch.tensor([[7, 8], [9, 0]]),
                next_sentence_labels=torch.tensor([0, 1]),
            )
            engine.backward((losses.mlm_loss_sum + losses.nsp_loss_sum) / 24)
            if not reads_late and engine.at_boundary:
                capture()
            engine.step(LR)
        reference.step(gradients)
        gradients.clear()
        for name, weight in engine.full_state().items():
            wanted = reference.weights[name]
            error = (weight.double() - wanted).norm() / wanted.norm().clamp(min=1e-3)
            assert error < case["tolerance"], f"step {step}, {name}: relative error {error:.2e}"
    assert any(
        (weight - reference.start[name]).norm() > 1e-2 for name, weight in reference.weights.items()
    )
    engine.close()


main()
