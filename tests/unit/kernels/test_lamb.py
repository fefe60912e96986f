"""LAMB's implementations against the formula in float64 and against each other.

Triton decides on its interpreter when it is imported, so that a process of its own runs this file
once more with `TRITON_INTERPRET=1`, and then the Triton kernel alone, on CPU.
"""

import importlib.util
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import CUDA_HOME

from tests.optimizer_references import DeepSpeedLamb
from zerobert.errors import ConfigError, MissingDependencyError
from zerobert.kernels import lamb, lamb_apex
from zerobert.kernels.lamb import Pieces, Rates, Scaling
from zerobert.optim import Lamb, parameter_groups

HAS_TRITON = importlib.util.find_spec("triton") is not None
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

LENGTHS = (1, 3, 127, 128, 768, 2048, 5000)
STEP_3 = {"correction1": 1 - 0.9**3, "correction2": 1 - 0.999**3}
RATES = {
    "step 3": Rates(0.9, 0.999, 1e-6, 0.01, **STEP_3),
    "no bias correction": Rates(0.9, 0.999, 1e-6, 0.01, 1.0, 1.0, corrects=False),
    "no weight decay": Rates(0.9, 0.999, 1e-6, 0.0, **STEP_3),
    "no memory": Rates(0.0, 0.0, 1e-3, 0.1, 1.0, 1.0),
}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

on_a_gpu = pytest.mark.gpu
RUNS = (
    [("triton", "cpu")]
    if IS_INTERPRETED
    else [
        ("plain", "cpu"),
        ("blocked", "cpu"),
        pytest.param(("plain", "cuda"), marks=on_a_gpu),
        pytest.param(("triton", "cuda"), marks=on_a_gpu),
    ]
)


@pytest.fixture(params=RUNS, ids=lambda run: "-".join(run))
def run(request: pytest.FixtureRequest) -> tuple[lamb.Implementation, str]:
    """An implementation, and the device that it is tried on."""
    name, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device; Triton's interpreter has its own test")
    if name == "triton" and not HAS_TRITON:
        pytest.skip("triton is not installed")
    return lamb.implementation(name), device


def make_pieces(lengths: tuple[int, ...] = LENGTHS, *, offset: int = 0) -> Pieces:
    """Pieces of four flat tensors, the first of them `offset` elements after an aligned address."""
    generator = torch.Generator().manual_seed(sum(lengths))

    def flat(scale: float) -> list[Tensor]:
        total = offset + sum(lengths)
        return list((torch.randn(total, generator=generator) * scale)[offset:].split(lengths))

    squares = [piece.square() for piece in flat(0.1)]
    return Pieces(flat(0.05), flat(1.0), flat(0.3), squares)


def on(device: str, pieces: Pieces) -> Pieces:
    """A copy in which each piece lies as it did in its flat tensor."""
    copies = []
    for tensors in pieces:
        first = tensors[0].storage_offset()
        flat = torch.cat([torch.zeros(first), *tensors]).to(device)
        copies.append(list(flat[first:].split([len(tensor) for tensor in tensors])))
    return Pieces(*copies)


def formula(pieces: Pieces, rates: Rates) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Both moments after a step, and the updates, in float64."""
    beta1, beta2, eps, weight_decay, correction1, correction2, *_ = rates
    found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for weight, gradient, exp_avg, exp_avg_sq in zip(*pieces, strict=True):
        w, g = weight.double(), gradient.double()
        m = beta1 * exp_avg.double() + (1 - beta1) * g
        v = beta2 * exp_avg_sq.double() + (1 - beta2) * g**2
        u = (m / correction1) / ((v / correction2).sqrt() + eps) + weight_decay * w
        for values, value in zip(found, (m, v, u), strict=True):
            values.append(value)
    return found


def assert_near(got: list[Tensor], wanted: list[Tensor], *, scale: float = 1.0) -> None:
    """Within 1e-6 of the values, or of `scale` where values cancel each other."""
    for mine, true in zip(got, wanted, strict=True):
        torch.testing.assert_close(
            mine.double().cpu(), true.double().cpu(), rtol=1e-6, atol=1e-6 * scale
        )


def squares_of(weights: list[Tensor], updates: list[Tensor]) -> Tensor:
    return torch.tensor(
        [
            [w.double().square().sum(), u.square().sum()]
            for w, u in zip(weights, updates, strict=True)
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
@pytest.mark.parametrize("offset", [0, 1])
def test_each_pass_is_the_formula(
    run: tuple[lamb.Implementation, str], rates: Rates, offset: int
) -> None:
    implementation, device = run
    before = make_pieces(offset=offset)
    m, v, u = formula(before, rates)
    pieces = on(device, before)
    squares = implementation.update_moments(pieces, rates)
    assert (squares.shape, squares.dtype) == ((len(LENGTHS), 2), torch.float32)
    assert squares.device.type == device
    torch.testing.assert_close(
        squares.double().cpu(), squares_of(before.weights, u), rtol=1e-6, atol=0
    )
    assert_near(pieces.exp_avgs, m)
    assert_near(pieces.exp_avg_sqs, v, scale=1e-3)
    assert all(map(torch.equal, on("cpu", pieces).weights, before.weights))
    assert all(map(torch.equal, on("cpu", pieces).gradients, before.gradients))

    moments = on("cpu", pieces)
    lengths = torch.linspace(-0.01, 0.02, len(LENGTHS))  # a scale may have either sign
    implementation.apply(pieces, rates, lengths.to(device))
    wanted = [
        weight.double() - scale.double() * update
        for weight, scale, update in zip(before.weights, lengths, u, strict=True)
    ]
    assert_near(pieces.weights, wanted, scale=0.1)
    for now, then in zip(on("cpu", pieces)[1:], moments[1:], strict=True):
        assert all(map(torch.equal, now, then))


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
@pytest.mark.parametrize(
    "scaling",
    [
        Scaling(0.01),
        Scaling(0.01, adapts=False),
        Scaling(0.01, min_coeff=0.01, max_coeff=0.05),
        Scaling(0.01, max_coeff=0.03),
    ],
    ids=str,
)
def test_a_local_step_is_both_passes(
    run: tuple[lamb.Implementation, str], rates: Rates, scaling: Scaling
) -> None:
    implementation, device = run
    local, split = on(device, make_pieces()), on(device, make_pieces())
    implementation.step_local(local, rates, scaling)
    squares = implementation.update_moments(split, rates)
    implementation.apply(split, rates, lamb.scales(squares, scaling))
    for mine, true in zip(local, split, strict=True):
        assert_near(mine, true, scale=0.1)


def test_a_million_and_three(
    run: tuple[lamb.Implementation, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    implementation, device = run
    if IS_INTERPRETED:  # it takes as long for a large chunk as for a small one
        monkeypatch.setattr("zerobert.kernels.lamb_triton.CHUNK", 1 << 15)
    before = make_pieces((1_000_003, 3))
    rates, scaling = RATES["step 3"], Scaling(0.01)
    m, v, u = formula(before, rates)
    pieces = on(device, before)
    implementation.step_local(pieces, rates, scaling)
    scales = lamb.scales(squares_of(before.weights, u), scaling)
    wanted = [
        weight.double() - scale * update
        for weight, scale, update in zip(before.weights, scales, u, strict=True)
    ]
    assert_near(pieces.weights, wanted, scale=0.1)
    assert_near(pieces.exp_avgs, m)
    assert_near(pieces.exp_avg_sqs, v, scale=1e-3)


@pytest.mark.skipif(not IS_INTERPRETED, reason="the constants are compiled into the kernel")
def test_triton_adds_up_more_sums_than_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl

    from zerobert.kernels import lamb_triton

    monkeypatch.setattr(lamb_triton, "_PARTIALS", tl.constexpr(2))
    pieces, rates = make_pieces((5 * lamb_triton.CHUNK + 7, 3)), RATES["step 3"]
    wanted = squares_of(pieces.weights, formula(pieces, rates)[2])
    squares = lamb_triton.update_moments(pieces, rates)
    torch.testing.assert_close(squares.double(), wanted, rtol=1e-6, atol=0)


def test_norms_of_ten_million_values_keep_their_digits() -> None:
    if IS_INTERPRETED:
        pytest.skip("the interpreter is slow")
    weight = torch.full((10_000_001,), 0.3)
    zeros = [torch.zeros_like(weight) for _ in range(3)]
    for name in lamb.IMPLEMENTATIONS:
        pieces = Pieces([weight], *([zero] for zero in zeros))
        squares = lamb.implementation(name).update_moments(pieces, RATES["step 3"])
        true = weight[0].double().item() ** 2 * len(weight)
        assert squares[0].tolist() == pytest.approx([true, true * 1e-4], rel=1e-6)


def test_ratios_of_zeros_are_one(run: tuple[lamb.Implementation, str]) -> None:
    implementation, device = run
    rates = RATES["no weight decay"]
    zeros = torch.zeros(3, 5)
    weights = list(torch.tensor([[0.0] * 5, [2.0] * 5, [0.0] * 5]))
    gradients = list(torch.tensor([[3.0] * 5, [0.0] * 5, [0.0] * 5]))
    still = Pieces(weights, gradients, list(zeros.clone()), list(zeros.clone()))
    u = formula(still, rates)[2]
    pieces = on(device, still)
    implementation.step_local(pieces, rates, Scaling(0.1))
    assert_near(pieces.weights, [-0.1 * u[0], weights[1], weights[2]])


def test_equal_inputs_give_equal_bits(run: tuple[lamb.Implementation, str]) -> None:
    implementation, device = run
    rates = RATES["step 3"]
    runs = [on(device, make_pieces((20_000, 5, 3000))) for _ in range(2)]
    for pieces in runs:
        implementation.step_local(pieces, rates, Scaling(0.01))
        implementation.step_local(pieces, rates, Scaling(0.01, adapts=False))
        squares = implementation.update_moments(pieces, rates)
        implementation.apply(pieces, rates, lamb.scales(squares, Scaling(0.01)))
    for one, two in zip(*runs, strict=True):
        assert all(map(torch.equal, one, two))


def test_gradients_may_move_between_steps(run: tuple[lamb.Implementation, str]) -> None:
    implementation, device = run
    rates = RATES["no memory"]
    pieces = on(device, make_pieces())
    for factor in (1.0, 2.0, 3.0):
        moved = [gradient * factor for gradient in on(device, make_pieces()).gradients]
        pieces = pieces._replace(gradients=moved)
        implementation.update_moments(pieces, rates)
        assert_near(pieces.exp_avgs, moved)  # without memory the first moment is the gradient


def test_moments_far_apart_stay_where_they_are() -> None:
    # A first moment whose square is beyond the second's digits, as after gradients that vanished.
    pieces = Pieces(
        [torch.ones(3)],
        [torch.full((3,), math.nan)],  # not read
        [torch.tensor([1.0, 1e10, 0.0])],
        [torch.tensor([1e-24, 1e-38, 0.0])],
    )
    moments = on("cpu", pieces)
    lamb.implementation("blocked").apply(pieces, RATES["step 3"], torch.ones(1))
    assert torch.equal(pieces.exp_avgs[0], moments.exp_avgs[0])
    assert torch.equal(pieces.exp_avg_sqs[0], moments.exp_avg_sqs[0])
    assert pieces.weights[0].isfinite().all()


def test_scales() -> None:
    squares = torch.tensor([[4.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 16.0]])

    def of(scaling: Scaling) -> list[float]:
        return lamb.scales(squares, scaling).tolist()

    assert of(Scaling(0.5)) == [1.0, 0.5, 0.5, 0.125]
    assert of(Scaling(0.5, min_coeff=0.5)) == [1.0, 0.5, 0.5, 0.25]
    assert of(Scaling(0.5, max_coeff=1.5)) == [0.75, 0.5, 0.5, 0.125]
    # 1 for want of a ratio is not a ratio: no bound moves it.
    assert of(Scaling(0.5, min_coeff=1.5, max_coeff=3.0)) == [1.0, 0.5, 0.5, 0.75]
    assert of(Scaling(0.5, adapts=False)) == [0.5] * 4


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
class TestTritonsList:
    """The order in which the Triton kernel works."""

    @pytest.fixture
    def items(self) -> Callable[..., list[list[int]]]:
        from zerobert.kernels import lamb_triton

        def of(numels: tuple[int, ...], updates: bool, applies: bool, lag: int) -> list[list[int]]:
            lengths = tuple(length * lamb_triton.CHUNK - 1 for length in numels)
            found: list[list[int]] = lamb_triton._items(
                lengths, updates, applies, lag, CPU
            ).tolist()
            return found

        return of

    def test_a_piece_is_applied_from_its_end_some_updates_later(
        self, items: Callable[..., list[list[int]]]
    ) -> None:
        updates, applies = [[0, 0], [0, 1], [1, 0], [2, 0]], [[-1, 1], [-1, 0], [-2, 0], [-3, 0]]
        assert items((2, 1, 1), True, False, 1) == updates
        assert items((2, 1, 1), False, True, 1) == applies
        assert items((2, 1, 1), True, True, 1) == [
            *([0, 0], [0, 1], [1, 0], [-1, 1], [-1, 0], [2, 0], [-2, 0], [-3, 0]),
        ]

    @pytest.mark.parametrize("lag", [0, 1, 7, 1000])
    def test_nothing_waits_for_what_comes_later(
        self, items: Callable[..., list[list[int]]], lag: int
    ) -> None:
        numels = (3, 1, 50, 2, 1, 1, 9)
        order = items(numels, True, True, lag)
        places = {tuple(item): place for place, item in enumerate(order)}
        assert len(places) == len(order) == 2 * sum(numels)
        for piece, number in enumerate(numels):
            updated = [places[piece, chunk] for chunk in range(number)]
            applied = [places[-1 - piece, chunk] for chunk in range(number)]
            assert max(updated) < min(applied)


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert lamb.choose(CPU)[0] == "blocked"
    assert lamb.choose(CUDA) == (
        "plain",
        "torch's foreach kernels; 'triton' is one kernel, but not measured yet",
    )
    assert lamb.choose(CPU, "plain") == ("plain", "asked for in the configuration")
    with pytest.raises(ConfigError, match="'blocked' runs on CPU only"):
        lamb.choose(CUDA, "blocked")
    with pytest.raises(
        ConfigError, match="wanted auto, plain, blocked, triton or apex, got 'quick'"
    ):
        lamb.choose(CPU, "quick")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert lamb.choose(CUDA, "triton")[0] == "triton"
    with pytest.raises(ConfigError, match="CUDA only, or with TRITON_INTERPRET=1"):
        lamb.choose(CPU, "triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install triton"):
        lamb.choose(CUDA, "triton")


@pytest.mark.skipif(IS_INTERPRETED or not HAS_TRITON, reason="is it, or triton is not installed")
def test_triton_in_its_interpreter(repository: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=repository,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-2000:]


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("adapts", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_tritons_kernel_compiles_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, adapts: bool, aligned: bool, waits: bool
) -> None:
    """The interpreter takes what the compiler refuses."""
    if IS_INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from zerobert.kernels import lamb_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = lamb_triton._work
    settings = {"ADAPTS": adapts, "WAITS": waits, "ALIGNED": aligned, "CHUNK": lamb_triton.CHUNK}
    signature = dict.fromkeys(function.arg_names, "fp32")
    signature |= dict.fromkeys(("partials", "squares", "scales"), "*fp32")
    signature |= dict.fromkeys(("items", "drawn", "finished"), "*i32")
    signature |= {"num_items": "i32", "table": "*i64"} | dict.fromkeys(settings, "constexpr")
    constants: dict[Any, Any] = {
        (function.arg_names.index(name),): value for name, value in settings.items()
    }
    compiled = triton.compile(
        ASTSource(function, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": lamb_triton.NUM_WARPS},
    )
    assert "sm_90" in compiled.asm["ptx"]


def steps_of(optimizer: Any, weight: torch.nn.Parameter, number: int = 5) -> list[Tensor]:
    """The weights after each of some steps."""
    generator = torch.Generator().manual_seed(7)
    after = []
    for _ in range(number):
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.device)
        optimizer.step()
        after.append(weight.detach().double().cpu().clone())
    return after


def test_deepspeeds_lamb_corrects_after_the_ratio() -> None:
    start = torch.linspace(-1.0, 1.2, 50)
    weight = torch.nn.Parameter(start.clone())
    group = {"name": "decay", "params": [weight], "weight_decay": 0.01}
    ours = steps_of(Lamb([group], lr=0.01, eps=1e-6), weight, 1)[0] - start
    theirs = DeepSpeedLamb(start, lr=0.01, weight_decay=0.01, eps=1e-6)
    generator = torch.Generator().manual_seed(7)
    theirs.step(torch.randn(start.shape, generator=generator))
    share = float((theirs.weight - start).norm() / ours.norm())
    assert share == pytest.approx(0.316, abs=5e-4)  # docs/reproduce.md


@on_a_gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_apexs_own_lamb_takes_the_same_steps(weight_decay: float) -> None:
    optimizers = pytest.importorskip("apex.optimizers", exc_type=ImportError)
    start = torch.linspace(-1.0, 1.2, 5000, device=CUDA)
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    group = {"name": "group", "params": [weights[0]], "weight_decay": weight_decay}
    theirs = optimizers.FusedLAMB(
        [weights[1]], lr=0.01, eps=1e-6, weight_decay=weight_decay, max_grad_norm=1e9
    )
    ours = steps_of(Lamb([group], lr=0.01, eps=1e-6), weights[0])
    for mine, other in zip(ours, steps_of(theirs, weights[1]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@on_a_gpu
@pytest.mark.slow  # it is built first
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(CUDA_HOME is None or not shutil.which("ninja"), reason="needs nvcc and ninja")
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_deepspeeds_own_lamb_is_its_stand_in(weight_decay: float) -> None:
    from deepspeed.ops.lamb import FusedLamb

    start = torch.linspace(-1.0, 1.2, 5000)
    weight = torch.nn.Parameter(start.to(CUDA))
    found = steps_of(FusedLamb([weight], lr=0.01, weight_decay=weight_decay), weight)
    stand_in = DeepSpeedLamb(start, lr=0.01, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(7)
    for mine in found:
        stand_in.step(torch.randn(start.shape, generator=generator))
        torch.testing.assert_close(mine, stand_in.weight, rtol=1e-5, atol=1e-6)


class StandInApplier:
    """What apex's kernel computes, after its documentation, in float64."""

    def __call__(self, kernel, noop, lists, lr, beta1, beta2, eps, step, *rest) -> None:
        corrects, weight_decay, averages, decays_in_update, norm, max_norm, always = rest
        assert (kernel, int(noop), averages, decays_in_update) == ("kernel", 0, True, 1)
        assert float(norm) <= max_norm  # nothing is clipped
        for gradient, weight, m, v in zip(*lists, strict=True):
            m.copy_(m.double() * beta1 + (1 - beta1) * gradient.double())
            v.copy_(v.double() * beta2 + (1 - beta2) * gradient.double().square())
            c1, c2 = (1 - beta1**step, 1 - beta2**step) if corrects else (1.0, 1.0)
            w = weight.double()
            update = (m.double() / c1) / ((v.double() / c2).sqrt() + eps) + weight_decay * w
            ratio = 1.0
            if (always or weight_decay != 0) and w.norm() > 0 and update.norm() > 0:
                ratio = float(w.norm() / update.norm())
            weight.copy_(w - lr * ratio * update)
            gradient.copy_(update)  # it is written over


@pytest.mark.parametrize("use_nvlamb", [False, True])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_apex_is_given_its_arguments_in_its_order(
    monkeypatch: pytest.MonkeyPatch, use_nvlamb: bool, bias_correction: bool
) -> None:
    monkeypatch.setattr(lamb_apex, "LAMB", "kernel")
    monkeypatch.setattr(lamb_apex, "APPLIER", StandInApplier())
    monkeypatch.setattr(lamb, "_check_apex", lambda device: None)
    weights = {}
    for kernel in ("plain", "apex"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 1))
        groups = parameter_groups(model, 0.01)
        options = {"use_nvlamb": use_nvlamb, "bias_correction": bias_correction}
        optimizer = Lamb(groups, lr=0.01, kernel=kernel, **options)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 7)).square().sum().backward()
            optimizer.step()
        weights[kernel] = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights["apex"], weights["plain"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999)])
def test_apex_corrects_moments_where_the_first_correction_is_one(
    monkeypatch: pytest.MonkeyPatch, betas: tuple[float, float]
) -> None:
    monkeypatch.setattr(lamb_apex, "LAMB", "kernel")
    monkeypatch.setattr(lamb_apex, "APPLIER", StandInApplier())
    monkeypatch.setattr(lamb, "_check_apex", lambda device: None)
    weights = {}
    for kernel in ("plain", "apex"):
        weight = torch.nn.Parameter(torch.linspace(0.1, 1.0, 5))
        groups = [{"name": "no_decay", "params": [weight], "weight_decay": 0.0}]
        optimizer = Lamb(groups, lr=0.01, betas=betas, kernel=kernel)
        weight.grad = torch.linspace(-1.0, 1.0, 5)
        optimizer.step()
        optimizer.state[weight]["step"].fill_(399)
        weight.grad = torch.linspace(-1.0, 1.0, 5)
        optimizer.step()
        weights[kernel] = weight.detach()
    assert 1 - betas[0] ** 400 == 1
    torch.testing.assert_close(weights["apex"], weights["plain"], atol=1e-6, rtol=1e-5)


def test_apex_refuses_what_it_can_t(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, rates = make_pieces((3,)), RATES["step 3"]
    apex = lamb_apex.IMPLEMENTATION
    with pytest.raises(ConfigError, match="knows no min_coeff and max_coeff"):
        apex.step_local(pieces, rates, Scaling(0.1, max_coeff=10.0))
    with pytest.raises(ConfigError, match="takes whole parameters, ZeRO stage 1 and above"):
        apex.update_moments(pieces, rates)
    monkeypatch.setattr(lamb_apex, "LAMB", None)
    with pytest.raises(MissingDependencyError, match="needs NVIDIA's apex"):
        lamb.choose(CUDA, "apex")
    monkeypatch.setattr(lamb_apex, "LAMB", "kernel")
    with pytest.raises(ConfigError, match="'apex' runs on CUDA only"):
        lamb.choose(CPU, "apex")
