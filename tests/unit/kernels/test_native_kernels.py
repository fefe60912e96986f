"""The kernels in C against their plain twins, and on machines that can't build them."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from zerobert import compiled
from zerobert.kernels import attention, dropout, gelu, layer_norm, layer_norm_native, native
from zerobert.kernels.attention import Layout
from zerobert.packing import pack

needs_native = pytest.mark.skipif(native.refusal() is not None, reason=str(native.refusal()))
# Head widths below, at and beside a whole number of vectors; rows of one token, of all, longer than
# the queries that are worked on at a time.
SHAPES = [(2, 64, 128, [128, 70, 1, 99]), (3, 8, 16, [16, 9, 1, 12]), (1, 33, 200, [200, 65, 64])]


def make_tokens(
    heads: int, width: int, longest: int, lengths: list[int], dtype: torch.dtype
) -> tuple[list[Tensor], Layout, Tensor]:
    """Queries, keys, values TND; where they lie; a gradient of the output, zero for padding."""
    torch.manual_seed(0)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    packing = pack(mask)
    shape = (len(packing.places_T), heads, width)
    tokens = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    grad = torch.randn(shape).to(dtype)
    grad[sum(lengths) :] = 0
    return tokens, Layout(mask.bool(), packing), grad


@needs_native
@pytest.mark.parametrize(("heads", "width", "longest", "lengths"), SHAPES)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_attention_agrees_in_value_and_gradient(
    heads: int, width: int, longest: int, lengths: list[int], dtype: torch.dtype, error: float
) -> None:
    tokens, layout, grad = make_tokens(heads, width, longest, lengths, dtype)
    exact = [token.detach().double().requires_grad_() for token in tokens]
    wanted = attention.plain(*exact, layout, 0.0)
    got = attention.native(*tokens, layout, 0.0)
    num_tokens = sum(lengths)
    assert not got[num_tokens:].any()
    torch.testing.assert_close(
        got[:num_tokens].double(), wanted[:num_tokens], atol=error, rtol=error
    )
    wanted_grads = torch.autograd.grad(wanted, exact, grad.double())
    got_grads = torch.autograd.grad(got, tokens, grad)
    for got_grad, wanted_grad in zip(got_grads, wanted_grads, strict=True):
        torch.testing.assert_close(got_grad.double(), wanted_grad, atol=error, rtol=error)


@needs_native
def test_attention_in_parts_of_a_wider_product() -> None:
    """As queries, keys and values come where their projections are fused; and other strides."""
    tokens, layout, grad = make_tokens(2, 8, 16, [16, 9, 1, 12], torch.float32)
    wanted = attention.native(*tokens, layout, 0.0)
    wanted_grads = torch.autograd.grad(wanted, tokens, grad)
    parts = torch.stack([token.detach() for token in tokens], dim=1).unbind(1)
    uneven = (tokens[0].detach(), *parts[1:])
    heads_first = [token.detach().transpose(0, 1).contiguous().transpose(0, 1) for token in tokens]
    for strided in (parts, uneven, heads_first):
        inputs = [part.requires_grad_() for part in strided]
        got = attention.native(*inputs, layout, 0.0)
        assert torch.equal(got, wanted)
        for pair in zip(torch.autograd.grad(got, inputs, grad), wanted_grads, strict=True):
            assert torch.equal(*pair)


def both_gradients(
    tokens: list[Tensor], layout: Layout, grad: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Those of queries, keys and values by the kernel, and by its plain twin in fp64."""
    exact = [token.detach().double().requires_grad_() for token in tokens]
    wanted = torch.autograd.grad(attention.plain(*exact, layout, 0.0), exact, grad.double())
    return torch.autograd.grad(attention.native(*tokens, layout, 0.0), tokens, grad), wanted


@needs_native
def test_attention_is_as_right_where_scores_are_large() -> None:
    """The weights of a diverging model, too, are no more than 1."""
    tokens, layout, grad = make_tokens(1, 33, 32, [20], torch.float32)
    with torch.no_grad():
        for token in tokens[:2]:
            token.mul_(1e3)
    got, wanted = both_gradients(tokens, layout, grad)
    assert (got[2].double() - wanted[2]).abs().max() < 1e-6 * wanted[2].abs().max()


@needs_native
def test_what_all_keys_have_in_common_does_no_harm_in_bf16() -> None:
    tokens, layout, grad = make_tokens(2, 64, 128, [128], torch.bfloat16)
    with torch.no_grad():
        for token in tokens[1:]:
            token.add_(4 * torch.randn(2, 64).bfloat16())
    got, wanted = both_gradients(tokens, layout, grad)
    for got_grad, wanted_grad in zip(got, wanted, strict=True):
        assert (got_grad.double() - wanted_grad).norm() < 1e-2 * wanted_grad.norm()


@needs_native
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_drops_weights_and_their_gradients_alike(
    dtype: torch.dtype, error: float
) -> None:
    """Values that are unit vectors show the weights themselves, and so the mask."""
    length, p = 64, 0.25
    layout = Layout(torch.ones(1, length, dtype=torch.bool), pack(torch.ones(1, length)))
    torch.manual_seed(0)
    q, k, grad = torch.randn(3, length, 1, length).to(dtype)
    inputs = [q, k, torch.eye(length, dtype=dtype)[:, None]]
    exact = [part.double().requires_grad_() for part in inputs]
    inputs = [part.requires_grad_() for part in inputs]
    dropped = attention.native(*inputs, layout, p)
    weights = torch.softmax(exact[0][:, 0] @ exact[1][:, 0].T / length**0.5, dim=-1)
    mask = (dropped[:, 0] != 0).double() / (1 - p)
    torch.testing.assert_close(dropped[:, 0].double(), weights * mask, atol=error, rtol=error)
    kept = (mask > 0).double().mean().item()
    assert abs(kept - (1 - p)) < 4 * (p * (1 - p) / length**2) ** 0.5
    got = torch.autograd.grad(dropped, inputs, grad)
    wanted = torch.autograd.grad((weights * mask) @ exact[2][:, 0], exact, grad[:, 0].double())
    for pair in zip(got, wanted, strict=True):
        torch.testing.assert_close(pair[0].double(), pair[1], atol=error, rtol=error)


@needs_native
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("width", [48, 768])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_layer_norm_agrees_in_value_and_gradient(
    has_residual: bool, width: int, dtype: torch.dtype, error: float
) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(width, eps=1e-12).to(dtype)
    with torch.no_grad():
        norm.weight.add_(torch.randn(width).to(dtype))
        norm.bias.add_(torch.randn(width).to(dtype))
    x, residual, grad = torch.randn(3, 5, 7, width).to(dtype)
    inputs = [x.requires_grad_(), norm.weight, norm.bias]
    inputs += [residual.requires_grad_()] if has_residual else []
    results = []
    for normalize, like in ((layer_norm.native, dtype), (layer_norm.plain, torch.float64)):
        norm.to(like)
        out = normalize(x.to(like), norm, residual.to(like) if has_residual else None)
        results.append([out, *torch.autograd.grad(out, inputs, grad.to(like))])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), atol=error, rtol=error)


@needs_native
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 5e-6), (torch.bfloat16, 3e-2)])
def test_gelu_agrees_in_value_and_gradient(dtype: torch.dtype, error: float) -> None:
    torch.manual_seed(0)
    dense, x = nn.Linear(48, 300).to(dtype), (6 * torch.randn(3, 20, 48)).to(dtype).requires_grad_()
    grad, leaves = torch.randn(3, 20, 300).to(dtype), (x, dense.weight, dense.bias)
    results = []
    for activate, like in ((gelu.native, dtype), (gelu.torch_native, torch.float64)):
        dense.to(like)
        out = activate(x.to(like), dense)
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(like))])
    for got, wanted in zip(*results, strict=True):
        apart = (got.double() - wanted.double()).abs().max()
        assert apart <= error * wanted.abs().max()


@needs_native
def test_gelu_is_right_everywhere() -> None:
    x = torch.linspace(-8, 8, 100_001)[:, None]
    exact = x.double().requires_grad_()
    wanted = torch.nn.functional.gelu(exact)
    (slopes,) = torch.autograd.grad(wanted.sum(), exact)
    got = native.gelu_forward(x, torch.zeros(1))
    got_slopes, _ = native.gelu_backward(x, torch.zeros(1), torch.ones_like(x))
    assert (got - wanted).abs().max() < 1e-6
    assert (got_slopes - slopes).abs().max() < 1e-6


@needs_native
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_layer_norm_adds_the_bias_of_a_dense_layer(dropout_p: float) -> None:
    torch.manual_seed(0)
    norm, dense = nn.LayerNorm(48), nn.Linear(32, 48)
    x, residual = torch.randn(50, 32).requires_grad_(), torch.randn(50, 48)
    results = []
    for inside in (True, False):
        torch.manual_seed(1)
        arguments = (x, dense) if inside else (dense(x), None)
        out = layer_norm.native(arguments[0], norm, residual, dropout_p, arguments[1])
        results.append([out, *torch.autograd.grad(out.square().sum(), (x, *dense.parameters()))])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-5)
    with torch.no_grad():
        got = layer_norm.native(x.bfloat16(), norm, None, 0.0, dense.bfloat16())
        wanted = layer_norm.plain(x.bfloat16(), norm, None, 0.0, dense)
    torch.testing.assert_close(got, wanted, atol=3e-2, rtol=3e-2)  # a norm in another precision


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al.'s Philox4x32-10, word by word."""
    for _ in range(10):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            *((right >> 32) ^ counter[1] ^ key[0], right % 2**32),
            *((left >> 32) ^ counter[3] ^ key[1], left % 2**32),
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def xoshiro(state: list[int]) -> tuple[int, list[int]]:
    """Blackman and Vigna's xoshiro128++: a number, and the next state."""

    def rotated(word: int, left: int) -> int:
        return (word << left | word >> (32 - left)) % 2**32

    a, b, c, d = state
    number = (rotated((a + d) % 2**32, 7) + a) % 2**32
    return number, [a ^ d ^ b, b ^ c ^ a, c ^ a ^ (b << 9) % 2**32, rotated(d ^ b, 11)]


@needs_native
def test_masks_are_those_of_the_published_generators() -> None:
    # The first known answers of Random123's kat_vectors; xoshiro128++ from 1, 2, 3, 4 gives these
    # in the crate rand_xoshiro, whose numbers come from the authors' program.
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    state, first = [1, 2, 3, 4], []
    for _ in range(4):
        number, state = xoshiro(state)
        first.append(number)
    assert first == [641, 1573767, 3222811527, 3517856514]
    seed, width, num_rows = 0x0123456789ABCDEF, 200, 3
    threshold = dropout.threshold(0.25)
    ones, weight, bias = torch.ones(num_rows, width), torch.ones(width), torch.zeros(width)
    _, dropped, *_ = native.layer_norm_forward(
        ones, None, None, weight, bias, 1e-5, (threshold, seed)
    )
    for row in range(num_rows):
        key = [seed % 2**32, seed >> 32]
        lanes = [philox([lane, row, 0, 0], key) for lane in range(16)]
        numbers: list[int] = []
        while len(numbers) < width:
            for lane, state in enumerate(lanes):
                number, lanes[lane] = xoshiro(state)
                numbers += [number % 2**16, number >> 16]
        is_kept = torch.tensor(numbers[:width]) >= threshold
        torch.testing.assert_close(dropped[row], is_kept / (1 - 0.25))


@needs_native
def test_layer_norm_drops_the_branch_and_its_gradient_alike() -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(128)
    branch, residual = torch.randn(2, 50, 128).unbind()
    branch, residual = branch.requires_grad_(), residual.requires_grad_()
    torch.manual_seed(1)
    got = layer_norm.native(branch, norm, residual, 0.3)
    torch.manual_seed(1)
    drop = dropout.new_mask(0.3)
    _, sums, *_ = native.layer_norm_forward(
        torch.ones(50, 128), None, torch.zeros(50, 128), norm.weight, norm.bias, 1e-5, drop
    )
    wanted = layer_norm.plain(branch * sums, norm, residual)
    torch.testing.assert_close(got, wanted)
    grad, inputs = torch.randn(50, 128), (branch, residual, norm.weight, norm.bias)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, grad),
        torch.autograd.grad(wanted, inputs, grad),
        atol=1e-5,
        rtol=1e-5,
    )
    assert abs((sums == 0).float().mean().item() - 0.3) < 4 * (0.3 * 0.7 / sums.numel()) ** 0.5


@needs_native
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_the_number_of_threads_does_not_matter(dtype: torch.dtype) -> None:
    tokens, layout, grad = make_tokens(2, 64, 128, [128, 70, 1, 99], dtype)
    norm, x = nn.LayerNorm(64), torch.randn(100, 64).to(dtype).requires_grad_()
    dense = nn.Linear(64, 300).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(5)
            out = attention.native(*tokens, layout, 0.1)
            normal = layer_norm.native(x, norm, None, 0.1)
            active = gelu.native(x, dense)
            grads = torch.autograd.grad(out, tokens, grad)
            norm_grads = torch.autograd.grad(normal.square().sum(), (x, norm.weight, norm.bias))
            gelu_grads = torch.autograd.grad(active.square().sum(), (x, dense.bias))
            results.append([out, normal, active, *grads, *norm_grads, *gelu_grads])
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


@needs_native
def test_what_is_no_number_stays_none() -> None:
    tokens, layout, grad = make_tokens(2, 8, 16, [16, 9, 1, 12], torch.bfloat16)
    with torch.no_grad():
        tokens[2][3, 1, 2] = float("nan")
        tokens[2][20, 0, 0] = float("inf")
    out = attention.native(*tokens, layout, 0.0)
    assert out[:16, 1, 2].isnan().all()
    assert out[16:25, 0, 0].isinf().all()
    tokens[0].data[0] = float("nan")
    q_grad, *_ = torch.autograd.grad(attention.native(*tokens, layout, 0.0), tokens, grad)
    assert q_grad[0].isnan().all()
    x = torch.ones(2, 64)
    x[0, 5] = float("inf")
    normal = layer_norm_native.normalize(x, nn.LayerNorm(64), None, 0.0, None)
    assert normal[0].isnan().any()
    assert not normal[1].isnan().any()
    for dtype in native.DTYPES:
        wide = torch.tensor([[float("nan"), float("inf"), -1e30, 1e30, 0.0]], dtype=dtype)
        bias, ones = torch.zeros(5, dtype=dtype), torch.ones(1, 5, dtype=dtype)
        (active,), (slopes,) = (
            native.gelu_forward(wide, bias),
            native.gelu_backward(wide, bias, ones)[0],
        )
        assert active[0].isnan()
        assert slopes[0].isnan()
        assert active[1].isinf()
        assert active[2:].tolist() == pytest.approx([0, wide[0, 3].item(), 0], abs=1e-6)
        assert slopes[1:].tolist() == pytest.approx([1, 0, 1, 0.5], abs=2e-6)


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_strict_compilers_have_nothing_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if not shutil.which(name):
        pytest.skip(f"there is no {name} here")
    monkeypatch.setenv("CC", name)
    strict = ("-Wall", "-Wextra", "-Wconversion", "-Wpedantic", "-Wshadow", "-Werror")
    strict += ("-Wno-pass-failed",)  # clang's, of loops that it can't make vectors of
    compiled.compile_to(tmp_path / "strict.so", native.LIBRARY, *strict)
    assert (tmp_path / "strict.so").is_file()


def test_without_a_compiler_torch_serves_and_the_table_says_why(tmp_path: Path) -> None:
    code = """
import torch
from zerobert.kernels import Kernels, choose
found = choose(Kernels(), torch.device("cpu"), torch.float32, dropout_p=0.1)
for op in ("attention", "layer norm", "GELU"):
    print(found[op].chosen, "|", found[op].reason)
"""
    variables = {"PATH": "", "CC": "", "XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = finished.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["plain", "torch", "torch"]
    for line in lines:
        assert "can't be built (there is no C compiler)" in line
        assert "apt-get install gcc" in line


# With a library that was built in another way.
ALL_CHECKS = """
import sys
from pathlib import Path
from zerobert import compiled
compiled.built = lambda library: Path(sys.argv[1])
import pytest
from tests.unit.kernels import test_native_kernels as tests
assert tests.native.refusal() is None, tests.native.refusal()
for shape in tests.SHAPES:
    tests.test_attention_agrees_in_value_and_gradient(*shape, tests.torch.float32, 2e-6)
    tests.test_attention_agrees_in_value_and_gradient(*shape, tests.torch.bfloat16, 2e-2)
tests.test_attention_drops_weights_and_their_gradients_alike(tests.torch.float32, 1e-5)
tests.test_attention_drops_weights_and_their_gradients_alike(tests.torch.bfloat16, 2e-2)
for residual in (True, False):
    for dtype, error in ((tests.torch.float32, 2e-5), (tests.torch.bfloat16, 3e-2)):
        tests.test_layer_norm_agrees_in_value_and_gradient(residual, 48, dtype, error)
tests.test_gelu_agrees_in_value_and_gradient(tests.torch.float32, 5e-6)
tests.test_gelu_agrees_in_value_and_gradient(tests.torch.bfloat16, 3e-2)
tests.test_layer_norm_adds_the_bias_of_a_dense_layer(0.3)
tests.test_attention_is_as_right_where_scores_are_large()
tests.test_what_all_keys_have_in_common_does_no_harm_in_bf16()
tests.test_masks_are_those_of_the_published_generators()
tests.test_the_number_of_threads_does_not_matter(tests.torch.bfloat16)
"""


def run_all_checks(library: Path, settings: dict[str, str]) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", ALL_CHECKS, str(library)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr


@needs_native
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.parametrize("flags", [["-mno-avx512bf16"], ["-mno-avx512bf16", "-mno-avx512f"]])
def test_processors_that_lack_instructions_compute_the_same(
    tmp_path: Path, flags: list[str]
) -> None:
    library = tmp_path / "lacking.so"
    compiled.compile_to(library, native.LIBRARY, *flags)
    run_all_checks(library, {})


def runtime(name: str) -> str:
    """The path of a library of gcc's, to be loaded ahead of Python's own."""
    command = ["gcc", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc's sanitizers are not here")
def test_sanitizers_find_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AddressSanitizer and UBSan, with the standard library's own checks of memory it gives out."""
    monkeypatch.setenv("CC", "gcc")
    library = tmp_path / "sanitized.so"
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
    compiled.compile_to(library, native.LIBRARY, *checks)
    settings = {
        # Python's own allocator would hide from ASan where its blocks end.
        "PYTHONMALLOC": "malloc",
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    run_all_checks(library, settings)
