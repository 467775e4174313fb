"""The fast kernels against loops in float64 that anybody can follow, and against the plain ones through layers."""

from __future__ import annotations

import os
import platform
import stat
import sys
import threading
from itertools import product

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.sparse import SparseTensor, backend, compiled, fast
from geo_pretrain.sparse.maps import KernelMap, kernel_offsets
from tests.forked import Forked, import_anew

CHANNELS = [(3, 5), (32, 32), (5, 96), (96, 100), (100, 3), (48, 80)]
SHAPES = [(1, 40, 70), (8, 257, 600), (27, 700, 700), (125, 300, 300)]  # offsets, inputs, outputs


def random_map(offsets: int, inputs: int, outputs: int) -> KernelMap:
    """A third of the entries present; one row and, where there are several, one offset without any."""
    generator = torch.Generator().manual_seed(offsets)
    table = torch.stack([torch.randperm(max(inputs, outputs), generator=generator) for _ in range(offsets)], dim=1)
    table = table[:outputs].int()
    table[(torch.rand(table.shape, generator=generator) > 0.33) | (table >= inputs)] = -1
    table[outputs // 2] = -1
    if offsets > 1:
        table[:, offsets // 3] = -1
    return KernelMap(table, inputs)


def slow_forward(rows: Tensor, kernel: Tensor, table: Tensor) -> Tensor:
    out = torch.zeros(len(table), kernel.shape[2], dtype=torch.float64)
    for row, k in (table >= 0).nonzero().tolist():
        out[row] += rows[table[row, k]].double() @ kernel[k].double()
    return out


def slow_wgrad(rows: Tensor, grad: Tensor, table: Tensor) -> Tensor:
    out = torch.zeros(table.shape[1], rows.shape[1], grad.shape[1], dtype=torch.float64)
    for row, k in (table >= 0).nonzero().tolist():
        out[k] += torch.outer(rows[table[row, k]].double(), grad[row].double())
    return out


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-5 * float(expected.abs().max() + 1e-9))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_products_equal_a_loop_in_double_precision(shape, channels):
    kernel_map = random_map(*shape)
    rows, kernel = torch.randn(shape[1], channels[0]), torch.randn(shape[0], *channels)
    expected = slow_forward(rows, kernel, kernel_map.table)
    assert_close(fast.sparse_conv_forward(rows, kernel, kernel_map), expected)
    flipped = kernel.transpose(1, 2).contiguous().transpose(1, 2)  # the same numbers as a transposed view
    assert_close(fast.sparse_conv_forward(rows, flipped, kernel_map), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_kernel_gradients_equal_a_loop_in_double_precision(shape, channels):
    kernel_map = random_map(*shape)
    rows, grad = torch.randn(shape[1], channels[0]), torch.randn(shape[2], channels[1])
    expected = slow_wgrad(rows, grad, kernel_map.table)
    assert_close(fast.sparse_conv_wgrad(rows, grad, kernel_map), expected)


def test_rows_and_grads_that_are_views_are_read_right():
    kernel_map = random_map(27, 300, 300)
    rows, grad, kernel = torch.randn(64, 300).t(), torch.randn(300, 96)[:, 32:64], torch.randn(27, 64, 64)[:, :, 1:33]
    assert_close(fast.sparse_conv_forward(rows, kernel, kernel_map), slow_forward(rows, kernel, kernel_map.table))
    assert_close(fast.sparse_conv_wgrad(rows, grad, kernel_map), slow_wgrad(rows, grad, kernel_map.table))


@pytest.mark.parametrize("openmp", [True, False])
def test_results_are_the_same_to_the_last_bit_on_any_number_of_threads(openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(compiled, "_openmp", lambda: None)
    rows, kernel, grad = torch.randn(5000, 96), torch.randn(27, 96, 64), torch.randn(5000, 64)
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            kernel_map = random_map(27, 5000, 5000)
            products = fast.sparse_conv_forward(rows, kernel, kernel_map)
            results.append((products, fast.sparse_conv_wgrad(rows, grad, kernel_map)))
    finally:
        torch.set_num_threads(1)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def random_coords(stride: int, low: int) -> Tensor:
    generator = torch.Generator().manual_seed(stride)
    cells = torch.cat(
        [torch.randint(0, 2, (900, 1), generator=generator), torch.randint(0, 9, (900, 3), generator=generator)], 1
    )
    cells[:, 1:] += low // stride
    coords = torch.unique(cells, dim=0)[torch.randperm(len(torch.unique(cells, dim=0)), generator=generator)]
    coords[:, 1:] *= stride
    return coords.int()


@pytest.mark.parametrize("stride,low", [(1, -4), (4, -20), (3, 1 << 20), (1, (1 << 31) - 9), (2, -(1 << 31))])
@pytest.mark.parametrize("kernel_size,dilation", [(3, 1), (3, 2), (2, 1), (5, 1)])
def test_neighbors_equal_a_dictionary(stride, low, kernel_size, dilation):
    coords = random_coords(stride, low)
    offsets = [tuple(dilation * d for d in offset) for offset in kernel_offsets(kernel_size)]
    rows = {tuple(c): row for row, c in enumerate(coords.tolist())}
    expected = [
        [rows.get((b, x + stride * dx, y + stride * dy, z + stride * dz), -1) for dx, dy, dz in offsets]
        for b, x, y, z in coords.tolist()
    ]
    assert sum(row >= 0 for line in expected for row in line) > 2 * len(coords)
    for symmetric in {False, kernel_size % 2 == 1}:
        table = fast.neighbors(coords, stride, offsets, symmetric=symmetric)
        assert table.dtype == torch.int32
        assert table.tolist() == expected


def network_results(choice: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of a narrow SR-UNet on two rooms' corners."""
    plane = torch.tensor(list(product(range(20), range(20))))
    zeros = torch.zeros(400, 1, dtype=torch.long)
    corner = torch.cat([torch.cat([plane, zeros], 1), torch.cat([zeros, plane], 1)]).unique(dim=0) - 7
    coords = torch.cat([torch.nn.functional.pad(corner + 5 * b, (1, 0), value=b) for b in range(2)]).int()
    torch.manual_seed(0)
    network, feats = SRUNet("18A", in_chans=3, out_chans=7, width=8), torch.randn(len(coords), 3)
    with backend.use(choice):
        out = network(SparseTensor(coords, feats)).feats
        out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def test_a_network_gives_the_same_output_and_gradients_on_both_backends(monkeypatch):
    calls = []
    original = fast.sparse_conv_forward
    monkeypatch.setattr(fast, "sparse_conv_forward", lambda *args: calls.append(1) or original(*args))
    plain, plain_gradients = network_results("plain")
    assert not calls
    out, gradients = network_results("fast")
    assert len(calls) > 50  # forward and backward went through it
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        scale = float(plain_gradients[name].abs().max())
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-3, atol=2e-3 * scale + 1e-7, msg=name)


def test_double_precision_and_foreign_rows_are_refused():
    kernel_map = random_map(8, 30, 30)
    with pytest.raises(ValueError, match=r"got torch.float32 on cpu and torch.float64 on cpu; accepted: torch.float32"):
        fast.sparse_conv_forward(torch.randn(30, 4), torch.randn(8, 4, 4).double(), kernel_map)
    with pytest.raises(ValueError, match="The kernel map is for 30 rows; got 31"):
        fast.sparse_conv_forward(torch.randn(31, 4), torch.randn(8, 4, 4), kernel_map)


def run_anew(script: str, settings: dict[str, str]) -> None:
    """Run a script in a fork that imports the package and numba anew, as in a process that has just begun."""

    def work() -> None:
        import_anew("geo_pretrain", "llvmlite", "numba", "tests")
        exec(script, {})

    process = Forked(work, settings)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed


OTHER_PROCESSOR = """
import torch
from geo_pretrain.sparse import fast
from tests.sparse.test_fast import *
assert fast.LANES == {lanes}, fast.LANES
for channels in ((32, 48), (5, 12)):
    kernel_map = random_map(27, 300, 300)
    rows, kernel, grad = torch.randn(300, channels[0]), torch.randn(27, *channels), torch.randn(300, channels[1])
    assert_close(fast.sparse_conv_forward(rows, kernel, kernel_map), slow_forward(rows, kernel, kernel_map.table))
    assert_close(fast.sparse_conv_forward(grad, kernel.transpose(1, 2), kernel_map),
                 slow_forward(grad, kernel.transpose(1, 2), kernel_map.table))
    assert_close(fast.sparse_conv_wgrad(rows, grad, kernel_map), slow_wgrad(rows, grad, kernel_map.table))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 processors")
@pytest.mark.parametrize("name,features,lanes", [("haswell", "+avx,+avx2,+fma", 8), ("x86-64", "+sse2", 4)])
def test_processors_with_narrower_vectors_get_the_same_results(name, features, lanes):
    """What numba compiles is kept where it keeps all, by the processor's name: later runs need not compile it."""
    if lanes == fast.LANES:
        pytest.skip(f"vectors of {lanes} are this processor's own: all tests here run them")
    settings = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    script = OTHER_PROCESSOR.format(lanes=lanes)
    run_anew(script, settings)


WARM = """
import sys
import torch
from geo_pretrain.sparse import compiled, fast
from tests.sparse.twins import random_cloud
from geo_pretrain.sparse import SparseTensor, layers
assert {compiles} == (compiled._kept() is None)
if {compiles}:
    from geo_pretrain.sparse import kernels, processor
    if processor.BF16:
        from geo_pretrain.sparse import kernels_bf16
    for name in kernels.TASKS.keys() - {{"product", "list_pairs", "insert", "find"}}:
        del kernels.TASKS[name]  # are not called below
coords, feats = random_cloud(0)
layers.Conv3d(3, 8)(SparseTensor(coords, feats.float()))
assert {compiles} == ("numba" in sys.modules), "numba"
"""


def test_machine_code_is_compiled_once_and_then_runs_without_numba(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("GEO_PRETRAIN_SPARSE", "fast")
    assert compiled._kept() is None
    (path,) = compiled._paths()
    path.write_bytes(b"damaged" * 10_000)  # is as good as none
    for compiles in (True, False):
        run_anew(WARM.format(compiles=compiles), {})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:-100])  # cut off
    assert compiled._kept() is None


def test_the_processor_and_the_sources_name_the_file_of_machine_code(monkeypatch, tmp_path):
    paths = list(compiled._paths())
    monkeypatch.setattr(compiled.processor, "FEATURES", "+sse2")
    assert not {path.name for path in paths} & {path.name for path in compiled._paths()}
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert [path.parent for path in compiled._paths()] == [tmp_path]


def test_where_python_writes_no_bytecode_nothing_is_written_beside_the_sources(monkeypatch, tmp_path):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "bytecode"))
    beside, of_user = compiled._paths()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    compiled._keep(b"code")
    assert (beside.exists(), of_user.exists()) == (False, True)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    compiled._keep(b"code")
    assert beside.is_relative_to(tmp_path / "bytecode")
    assert beside.exists()


def test_of_old_machine_code_the_newest_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    old = [tmp_path / f"kernels-{number:016x}.o" for number in range(20)]
    for number, path in enumerate(old):
        path.touch()
        os.utime(path, (number, number))
    others = [tmp_path / "kernels-mine.o", tmp_path / "renderer-0123456789abcdef.o"]
    for path in others:
        path.touch()
    compiled._keep(b"code")
    (written,) = compiled._paths()
    assert set(tmp_path.iterdir()) == {written, *others, *old[-compiled.FILES + 1 :]}
    assert compiled._kept() == b"code"


def test_threads_that_begin_together_make_one_engine(monkeypatch):
    """Of two engines one would be freed while its code runs. The first thread waits for the second, which may not."""
    read, begun, second = compiled._kept, [], threading.Thread(target=compiled._task, args=("insert",))

    def kept() -> bytes | None:
        begun.append(threading.current_thread())
        if not second.ident:
            second.start()
            second.join(timeout=0.5)
        return read()

    monkeypatch.setattr(compiled, "_kept", kept)
    compiled._task.cache_clear()
    compiled._engine.cache_clear()
    compiled._task("find")
    second.join()
    assert begun == [threading.current_thread()]


def test_machine_code_of_strangers_is_not_run(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    (path,) = compiled._paths()
    compiled._keep(b"code")
    assert compiled._kept() == b"code"
    path.chmod(0o666)
    assert compiled._kept() is None
    status = os.stat(__file__)
    stranger = os.stat_result((stat.S_IFREG | 0o644, *status[1:4], status.st_uid + 4711, *status[5:]))
    assert not compiled._is_trusted(stranger)
    assert compiled._is_trusted(os.stat_result((stat.S_IFREG | 0o664, *status[1:])))


def test_a_user_without_a_home_compiles(monkeypatch, tmp_path):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(compiled.Path, "expanduser", no_home)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    assert [path.parent.name for path in compiled._paths()] == ["__pycache__"]
