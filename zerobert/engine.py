"""DeepSpeed behind one small class: what it names differently at each stage and precision has one
name here, and what it gets wrong in silence is put right; `served` refuses the rest.

What was run so far: gloo on CPU, in fp32, bf16 and fp16, which a CPU computes slowly. CUDA and nccl
are written after DeepSpeed's source and have not run on a device yet.
"""

import dataclasses
import math
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import cuda_accelerator
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from torch import Tensor, nn

from zerobert import distributed, served, zero
from zerobert.errors import (
    CheckpointError,
    ConfigError,
    ConnectionLostError,
    TrainingDivergedError,
)
from zerobert.kernels.lamb import square
from zerobert.optim import Lamb
from zerobert.training_state import MOMENTS, WEIGHTS, Piece, Snapshot, StateReader

_HYSTERESIS = 2  # DeepSpeed's, where fp16 names none
_MOST_SKIPPED = 10  # steps in a row that may be left out where no loss scale falls meanwhile
# What DeepSpeed's dynamic loss scale consists of.
_LOSS_SCALE_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
# What DeepSpeed raises at a configuration that it does not take.
_REFUSALS = (
    AssertionError,
    ValueError,
    NotImplementedError,
    DeepSpeedConfigError,
    ZeRORuntimeException,
)


def init_distributed() -> None:
    """Join the process group that the launcher described, or make one of one process.

    Called before anything else that is collective; a second call does nothing.
    """
    if distributed.is_initialized():
        return
    if "RANK" not in os.environ:  # plain `python`: DeepSpeed would look for MPI
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    # Without this, the first collective on CPU compiles a shared-memory extension for half a
    # minute, or crashes where there is no C++ compiler; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo",
            verbose=False,
            auto_mpi_discovery=False,
        )
    except dist.DistError as error:
        rank, ranks = os.environ["RANK"], os.environ["WORLD_SIZE"]
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConnectionLostError(
            f"rank {rank} of {ranks} did not find the others at {where}: have all machines "
            "started, can they reach that address and port, and is nothing else listening there?"
        ) from error
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def time_all_reduce(num_bytes: int) -> float:
    """The seconds of one sum over all ranks, on the device and group that training uses."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensor = torch.zeros(max(1, num_bytes // 4), device=device)
    distributed.barrier()
    return _timed(lambda: dist.all_reduce(tensor), device)


def time_product() -> float:
    """The seconds of a matrix product on this rank's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrix = torch.ones(1024, 256, device=device)
    return _timed(lambda: matrix @ matrix.T, device)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def leave_distributed() -> None:
    """Leave the process group; at the end of a script.

    gloo's threads let go of the last collective's tensors when they come to it. Where Python ends
    meanwhile, they end the process by SIGABRT; this waits for them.
    """
    if distributed.is_initialized():
        dist.destroy_process_group()


def why_not_here(ds_config: Mapping[str, Any]) -> str | None:
    """Why this machine can't compute in a configuration's precision, and what to ask for; None
    where it can.
    """
    low = served.precision(ds_config)
    accelerator = deepspeed.accelerator.get_accelerator()
    if low == "fp16" and not accelerator.is_fp16_supported():
        return "this device can't train in fp16; pass --precision bf16 or fp32"
    if low == "bf16" and not accelerator.is_bf16_supported():
        return "this device can't train in bf16; pass --precision fp16 or fp32"
    return None


def check_device(ds_config: Mapping[str, Any]) -> None:
    """Refuse a precision that this machine can't compute in.

    Raises:
        ConfigError: names the flag that chooses another.
    """
    if (reason := why_not_here(ds_config)) is not None:
        raise ConfigError(reason)


def _leave_names_of_gpus_alone() -> None:
    """Let DeepSpeed ask torch for a GPU's free memory where `CUDA_VISIBLE_DEVICES` has names, as
    `GPU-8932...` or `MIG-...`: with pynvml it takes each for a number.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not all(entry.strip().isdigit() for entry in visible.split(",") if visible):
        cuda_accelerator.pynvml = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shard:
    """An fp32 tensor that the optimizer steps, and where parameters lie in it.

    Attributes:
        is_shared: whether other ranks hold the rest; else all hold the same.
    """

    tensor: Tensor
    places: tuple[tuple[str, zero.Segment], ...]
    is_shared: bool

    def parts(self, tensor: Tensor) -> Iterator[tuple[str, zero.Segment, Tensor]]:
        """The parameters' parts as views of the tensor, or of one of its moments."""
        flat = tensor.detach().view(-1)
        for name, place in self.places:
            yield name, place, flat[place.start : place.start + place.length]


class Engine:
    """A model in training: micro-steps, optimizer steps, and its state on disk.

    Args:
        model: built alike on every rank (from one seed).
        optimizer: on the model's own parameters.
        ds_config: DeepSpeed's keys alone, with the batch sizes.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, ds_config: Mapping[str, Any]
    ) -> None:
        served.check(ds_config)
        check_device(ds_config)
        config = _completed(ds_config, optimizer)
        self._stage = config["zero_optimization"]["stage"]
        self._precision = served.precision(config)
        self._is_autocast = served.computes_in(config) != self._precision
        # At stage 3 a parameter's shape is gone once DeepSpeed has it. What the state dict leaves
        # out at the end of a tensor is padding.
        self._rows = {name: len(tensor) for name, tensor in model.state_dict().items()}
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._optimizer = optimizer
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        exact = (
            {name: p.detach().clone() for name, p in model.named_parameters()}
            if self._is_16_bit
            else {}
        )
        _leave_names_of_gpus_alone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # chatter of the libraries' start, none of it ours
            try:
                self._engine, *_ = deepspeed.initialize(
                    model=model, optimizer=optimizer, config=config
                )
            except _REFUSALS as error:
                raise ConfigError(
                    f"DeepSpeed refuses the configuration: {_in_one_line(error)}"
                ) from error
        self._scale_of_step = 1.0
        self._norm_before_step: float | None = None
        # DeepSpeed's wrapper for 16 bits at stage 0, which holds whole fp32 masters.
        self._wrapper = self._engine.optimizer if self._is_16_bit and self._stage == 0 else None
        if self._wrapper is not None:
            self._undo_hidden_step()
            self._wrapper.overflow_checker.has_overflow_serial = _is_any_infinite
            self._accumulate_in(served.grad_accum_dtype(ds_config))
        if self._stage == 0 and not self._is_16_bit:
            self._engine.clip_fp32_gradients = self._clip_by_known_norm
        if distributed.world_size() == 1:
            # One process has nothing to add up, but would copy all gradients to a buffer and back
            # at stage 0, and in bf16 at stage 1.
            self._engine._reduce_non_expert_gradients = lambda grads, elements_per_buffer: None
        self._skipped_in_a_row = 0
        self._is_scale_spent = False
        if self._precision == "fp16":
            self._grow_scale_after_step(config["fp16"])
        if self._is_16_bit:
            self._set_masters(exact)

    @property
    def _is_16_bit(self) -> bool:
        return self._precision != "fp32"

    def _undo_hidden_step(self) -> None:
        """Forget the step with gradients of zero that the wrapper takes as it starts: it counts,
        and it decays the masters.
        """
        wrapper: Any = self._wrapper
        wrapper.optimizer.state.clear()
        wrapper.refresh_fp32_params()

    def _accumulate_in(self, dtype: str | None) -> None:
        """Add up the gradients of a step's micro-steps in fp32, where that is asked for."""
        if dtype != "fp32" or self.accumulation_steps == 1:
            return
        for parameter in self.module.parameters():
            if not hasattr(parameter, "grad_dtype"):
                raise ConfigError(
                    "ZeRO stage 0 in 16 bits adds up gradients in fp32 with torch 2.10 or newer "
                    "only; set zero_optimization.stage to 1"
                )
            parameter.grad_dtype = torch.float32
        self._clip_by_exact_norm()

    def _clip_by_exact_norm(self) -> None:
        """Take the norm of the gradients as they were added up: the wrapper rounds them to 16 bits
        for it.
        """
        wrapper: Any = self._wrapper
        unscale_and_clip = wrapper.unscale_and_clip_grads

        def by_exact_norm(_: float, apply_scale: bool = True) -> Any:
            gradients = [p.grad for group in wrapper.fp32_groups for p in group]
            wrapper._global_grad_norm = _norm(gradients)
            return unscale_and_clip(wrapper._global_grad_norm, apply_scale)

        wrapper.unscale_and_clip_grads = by_exact_norm

    def _grow_scale_after_step(self, fp16: Mapping[str, Any]) -> None:
        """Let the loss scale grow after the update: DeepSpeed lets it grow first, and then divides
        the gradients by a scale that the loss was not multiplied by.
        """
        optimizer = self._engine.optimizer
        self._update_scale = optimizer._update_scale
        if self._wrapper is not None and self._is_scale_dynamic:
            self._update_scale = self._patient(self._update_scale, fp16)

        def at_once_if_overflow(has_overflow: bool) -> None:
            self._is_scale_spent = has_overflow and self._is_scale_at_least()
            if has_overflow and not self._is_scale_spent:
                self._update_scale(True)

        optimizer._update_scale = at_once_if_overflow

    def _patient(
        self, update_scale: Callable[[bool], None], fp16: Mapping[str, Any]
    ) -> Callable[[bool], None]:
        """The wrapper's change of the loss scale with the hysteresis that the other stages have:
        only the last of so many overflows lowers the scale.
        """
        scaler = self._loss_scaler
        scaler.cur_hysteresis = patience = fp16.get("hysteresis", _HYSTERESIS)

        def update(has_overflow: bool) -> None:
            if has_overflow and scaler.cur_hysteresis > 1:
                scaler.cur_hysteresis -= 1
                scaler.last_overflow_iter = scaler.cur_iter
                scaler.cur_iter += 1
                return
            before = scaler.cur_scale
            update_scale(has_overflow)
            if scaler.cur_scale > before or (
                not has_overflow and fp16.get("consecutive_hysteresis", False)
            ):
                scaler.cur_hysteresis = patience

        return update

    @property
    def _is_scale_dynamic(self) -> bool:
        scaler = self._loss_scaler
        return bool(getattr(scaler, "dynamic_loss_scale", getattr(scaler, "dynamic", False)))

    def _is_scale_at_least(self) -> bool:
        """Whether no overflow can lower the loss scale any more."""
        scaler = self._loss_scaler
        least = getattr(scaler, "min_scale", getattr(scaler, "min_loss_scale", None))
        patience = getattr(scaler, "cur_hysteresis", 1)
        return bool(self._is_scale_dynamic and scaler.cur_scale <= least and patience <= 1)

    @torch.no_grad()
    def _set_masters(self, exact: Mapping[str, Tensor]) -> None:
        """Start the fp32 masters from the model's own weights: DeepSpeed's are rounded to 16 bits
        first.
        """
        for shard in self._shards():
            for name, place, values in shard.parts(shard.tensor):
                values.copy_(exact[name].flatten()[place.offset :][: place.length])

    def _shards(self) -> Iterator["_Shard"]:
        """The fp32 tensors that this rank's optimizer steps, and the parameters inside them."""
        if self._stage == 3:
            wrapper: Any = self._engine.optimizer
            flat = ([tensor] for tensor in wrapper.fp32_partitioned_groups_flat)
            pairs = zip(wrapper.fp16_groups, flat, strict=True)
        else:
            steps = (group["params"] for group in self._optimizer.param_groups)
            pairs = zip(self._groups, steps, strict=True)
        for parameters, tensors in pairs:
            layout = zero.locate(parameters, tensors)
            for tensor, segments in zip(tensors, layout.segments, strict=True):
                yield _Shard(
                    tensor=tensor,
                    places=tuple((self._names[parameters[s.index]], s) for s in segments),
                    is_shared=layout.is_shared,
                )

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return torch.device(self._engine.device)

    @property
    def module(self) -> nn.Module:
        """The model inside."""
        module: nn.Module = self._engine.module
        return module

    @property
    def accumulation_steps(self) -> int:
        """Micro-steps an optimizer step, on each rank."""
        return int(self._engine.gradient_accumulation_steps())

    @property
    def micro_batch_samples(self) -> int:
        """Sequences of a micro-step, on each rank."""
        return int(self._engine.train_micro_batch_size_per_gpu())

    @property
    def global_batch_samples(self) -> int:
        """Sequences an optimizer step, on all ranks together."""
        return int(self._engine.train_batch_size())

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before backward; 1 except in fp16."""
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0))

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps left out since the start of the run: a gradient was no finite number."""
        return int(self._engine.skipped_steps)

    def train(self, mode: bool = True) -> None:
        """Switch dropout and the like on or off."""
        self._engine.train(mode)

    def forward(self, **batch: Tensor) -> Any:
        """The model's own forward."""
        return self._engine(**batch)

    def evaluate(self, **batch: Tensor) -> Any:
        """The model's forward outside of training, in the precision that it trains in."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._is_autocast):
            return self.module(**batch)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of this rank's share of the step's loss.

        The shares of all micro-steps and ranks add up: DeepSpeed's division by their number is
        undone here, because the loss is already a part of the global batch's mean.
        """
        shares = self.accumulation_steps * distributed.world_size()
        # The wrapper divides by a scale that DeepSpeed's backward never multiplies by.
        scale = self.loss_scale if self._wrapper is not None else 1.0
        self._engine.backward(loss * (shares * scale))

    @property
    def at_boundary(self) -> bool:
        """Whether the next `step` updates the weights."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    def step(self, lr: float) -> None:
        """End a micro-step; after the last of a batch, update the weights at this learning rate,
        times its own `lr_factor` in a parameter group that has one. Where a gradient is no finite
        number the update is left out.

        Raises:
            TrainingDivergedError: gradients overflow at the least loss scale there is, or are no
                finite numbers again and again where no loss scale falls.
        """
        is_update = self.at_boundary
        if is_update:
            for group in self._engine.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_factor", 1.0)
            self._note_grad_norm()
            skipped_before = self.skipped_steps
            self._scale_of_step = self.loss_scale if self._wrapper is not None else 1.0
        self._engine.step()
        if not is_update:
            return
        if self.skipped_steps == skipped_before:
            self._skipped_in_a_row = 0
            if self._precision == "fp16":
                self._update_scale(False)
            return
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= _MOST_SKIPPED and not self._is_scale_dynamic:
            remedy = (
                f"lower the static fp16.loss_scale of {self.loss_scale:g}, or remove it for a "
                "dynamic one"
                if self._precision == "fp16"
                else "lower the learning rate or lengthen the warm-up"
            )
            raise TrainingDivergedError(
                f"gradients were no finite numbers in the last {self._skipped_in_a_row} steps, "
                f"none of which trained anything; {remedy}"
            )
        if self._is_scale_spent:
            raise TrainingDivergedError(
                f"gradients overflow in fp16 at {self.loss_scale:g} too, the least loss scale: the "
                "training has diverged; lower the learning rate, lengthen the warm-up, or use bf16"
            )

    def _note_grad_norm(self) -> None:
        """Where DeepSpeed keeps no gradient norm, fp32 at stage 0, it does not look for gradients
        that are no finite numbers either.
        """
        if self._stage > 0 or self._is_16_bit:
            return
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        self._norm_before_step = _norm(gradients)
        optimizer: Any = self._optimizer
        optimizer.overflow = not math.isfinite(self._norm_before_step)  # DeepSpeed counts by it
        if optimizer.overflow:
            optimizer.zero_grad(set_to_none=True)  # so that no weight moves

    def _clip_by_known_norm(self) -> None:
        """Clip with the norm that is there already: DeepSpeed would take it anew."""
        norm, most = self._norm_before_step, self._engine.gradient_clipping()
        assert norm is not None
        if norm > most:
            nn.utils.clip_grads_with_norm_(self.module.parameters(), most, torch.tensor(norm))

    @property
    def grad_norm(self) -> float:
        """The last step's global gradient norm before clipping, without the loss scale."""
        if self._norm_before_step is not None:
            return self._norm_before_step
        return float(self._engine.get_global_grad_norm()) / self._scale_of_step

    def snapshot(self) -> Snapshot:
        """Copies of all that this rank has to save, taken between two steps."""
        pieces: list[Piece] = []
        steps: set[int] = set()
        for shard in self._shards():
            state = self._optimizer.state.get(shard.tensor, {})
            if "step" in state:
                steps.add(int(state["step"]))
            if not shard.is_shared and not distributed.is_main():
                continue  # every rank has the same
            kinds = {WEIGHTS: shard.tensor, **{k: state[k] for k in MOMENTS if k in state}}
            values: dict[str, dict[str, Tensor]] = {}
            for kind, tensor in kinds.items():
                for name, _, part in shard.parts(tensor):
                    values.setdefault(name, {})[kind] = part.detach().to("cpu", copy=True)
            pieces += [
                Piece(name=name, offset=place.offset, values=values[name])
                for name, place in shard.places
            ]
        assert len(steps) <= 1, steps
        counters = {
            "steps": self._engine.global_steps,
            "skipped_steps": self.skipped_steps,
            "optimizer_steps": max(steps, default=0),
            "loss_scale": {
                name: getattr(self._loss_scaler, name)
                for name in _LOSS_SCALE_STATE
                if hasattr(self._loss_scaler, name)
            },
        }
        return Snapshot(
            pieces=tuple(pieces), counters=counters, shapes=self._shapes, rows=self._rows
        )

    @torch.no_grad()
    def restore(self, source: StateReader) -> None:
        """Go back to a snapshot, of any number of ranks and any stage; collective.

        Raises:
            CheckpointError: it is of another model.
        """
        counters = source.counters
        self._copy(source, source.kinds, counters["optimizer_steps"])
        if not counters["optimizer_steps"]:
            for shard in self._shards():
                self._optimizer.state.pop(shard.tensor, None)
        self._round_weights()
        self._skipped_in_a_row = 0
        engine: Any = self._engine
        engine.global_steps = counters["steps"]
        engine.global_samples = counters["steps"] * self.global_batch_samples
        engine.micro_steps = counters["steps"] * self.accumulation_steps
        engine.skipped_steps = counters["skipped_steps"]
        for name, value in counters["loss_scale"].items():
            if hasattr(self._loss_scaler, name):
                setattr(self._loss_scaler, name, value)

    def restore_moments(self, source: StateReader) -> None:
        """Begin with the moments of a snapshot, as if the optimizer had taken no step; collective.

        Raises:
            CheckpointError: it is of another model, or was saved before the first step.
        """
        if not set(MOMENTS) <= set(source.kinds):
            raise CheckpointError(f"{source.folder} has no moments: it was saved before a step")
        self._copy(source, MOMENTS, steps=0)

    @torch.no_grad()
    def _copy(self, source: StateReader, kinds: Sequence[str], steps: int) -> None:
        source.check_shapes(self._shapes)
        for shard in self._shards():
            for kind in kinds:
                for name, place, part in shard.parts(self._kept(shard.tensor, kind)):
                    part.copy_(source.read(kind, name, place.offset, place.length))
            self._set_steps(shard.tensor, steps)

    @property
    def _loss_scaler(self) -> Any:
        """What keeps the loss scale; None where there is none."""
        if self._precision != "fp16":
            return None
        optimizer: Any = self._engine.optimizer
        return optimizer.loss_scaler if self._wrapper is None else optimizer.loss_scale_config

    def _kept(self, tensor: Tensor, kind: str) -> Tensor:
        """A tensor that the optimizer steps, or one of its moments, made where it is missing."""
        if kind == WEIGHTS:
            return tensor
        state = self._optimizer.state[tensor]
        if kind not in state:
            state[kind] = torch.zeros_like(tensor, requires_grad=False)
        moment: Tensor = state[kind]
        return moment

    def _set_steps(self, tensor: Tensor, steps: int) -> None:
        """Say how many steps an optimizer has taken on a tensor."""
        count = torch.tensor(float(steps))
        if self._optimizer.defaults.get("fused"):  # torch keeps it where the tensor is
            count = count.to(tensor.device)
        self._optimizer.state[tensor]["step"] = count

    def _round_weights(self) -> None:
        """Make the model's weights from the fp32 masters, as at the end of a step."""
        optimizer: Any = self._engine.optimizer
        if self._wrapper is not None:
            for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                torch._foreach_copy_(weights, masters)
        elif self._stage == 3:
            optimizer.checkpoint_event_prologue()
            for number in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
            optimizer.checkpoint_event_epilogue()
        elif self._stage > 0:
            optimizer.update_lp_params()

    def close(self) -> None:
        """Let go of the model and the optimizer's state."""
        self._engine.destroy()


def _is_any_infinite(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether a gradient is no finite number: DeepSpeed asks a GPU about each by itself, and waits
    for each answer.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients, dtype=torch.float32)
    return not bool(torch.stack(norms).isfinite().all())


def _norm(tensors: list[Tensor]) -> float:
    """Waits for a GPU."""
    if tensors[0].is_cuda:
        return float(torch.stack(torch._foreach_norm(tensors)).norm())
    # On CPU torch's adds up one after another in fp32 (1e-3 off at BERT's sizes).
    return math.sqrt(sum(square(tensor.flatten()) for tensor in tensors))


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _completed(ds_config: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The configuration as DeepSpeed is to see it: with what the served combinations need."""
    config = {key: value for key, value in ds_config.items() if key != "optimizer"}
    # The training loop has its own log line; DeepSpeed's timers would wait for the GPU at both ends
    # of each micro-step.
    config.setdefault("steps_per_print", 2**31)
    config.setdefault("timers", {"throughput": {"enabled": False}})
    # Offloaded, an optimizer other than DeepSpeed's own (whose build takes a compiler and a minute)
    # is refused by default for its speed; torch's fused AdamW has the same.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    if isinstance(optimizer, Lamb):
        # DeepSpeed doubts every optimizer but its own, with reason: a trust ratio of a flat shard
        # is wrong. Ours knows the parameters inside the shard.
        config["zero_allow_untested_optimizer"] = True
    stage = served.stage(config, distributed.world_size())
    if stage == 1 and served.precision(config) == "bf16":
        # Add each gradient to its fp32 sum when it is there, and let go of it: the same sum, for a
        # third less memory traffic than after the backward pass.
        config["bf16"] = {"immediate_grad_update": True, **config["bf16"]}
    num_parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    config["zero_optimization"] = {
        "reduce_bucket_size": served.bucket_values(num_parameters),
        **config.get("zero_optimization", {}),
        "stage": stage,
    }
    dtype = served.grad_accum_dtype(config)
    if dtype == "fp32" and stage <= 1 and config.get("communication_data_type") is None:
        # In 16 bits the sum over ranks would round what the micro-steps' sum has kept. Here it is
        # made once a step; stages 2 and 3 make it in every micro-step, where it costs more.
        config["communication_data_type"] = "fp32"
    if stage == 0:
        config.pop("data_types", None)  # DeepSpeed knows one there: that of the weights
    elif dtype is not None:
        config["data_types"] = {**config.get("data_types", {}), "grad_accum_dtype": dtype}
    return config
