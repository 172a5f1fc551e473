"""The plain form's passes compiled for this processor: each against torch's, and a run with them.

The dense layer and every loss in this form are in test_paths.py.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import tempfile
import time

import pytest
import torch

from recognition.head import PartialFC
from recognition.head.chunked_softmax import plain_kernel
from recognition.head.kernels import autotune, cpu_library
from recognition.head.kernels.cpu_library import CpuLibrary, NotBuilt
from recognition.head.kernels.native import native_kernel
from recognition.head.partial_fc import MemoryLimits
from recognition.losses import MARGINS
from recognition.optim import RowAdamW, RowSGD
from tests import ranks, reference
from tests.recognition import runs
from tests.recognition.head import test_paths

try:
    PASSES = {dtype: CpuLibrary(dtype) for dtype in (torch.float32, torch.float64)}
except NotBuilt as error:
    pytest.skip(f"no program for this machine: {error}", allow_module_level=True)

dtypes = pytest.mark.parametrize("dtype", PASSES, ids=str)
ROUNDING = {dtype: torch.finfo(dtype).eps / 2 for dtype in PASSES}


@pytest.fixture(params=[1, 3], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def drawn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


@dtypes
def test_exponentials_are_right_to_two_roundings(dtype):
    """Of the whole range that logits have; e^x is as exact as x is."""
    x = torch.linspace(-87, 87, 100_001, dtype=dtype)[:, None]
    found = PASSES[dtype].sum_exp(x, torch.ones(1, dtype=dtype))
    assert float((found.double() / x[:, 0].double().exp() - 1).abs().max()) < 4 * ROUNDING[dtype]


def test_exponentials_beyond_the_range_are_infinite_or_zero():
    x = torch.tensor([[88.5], [200.0], [torch.inf], [-88.0], [-torch.inf]])
    found = PASSES[torch.float32].sum_exp(x, torch.ones(1))
    assert found.tolist() == [math.inf] * 3 + [0.0] * 2


@dtypes
def test_what_is_no_number_stays_none_and_minus_infinity_counts_for_nothing(dtype):
    z = torch.tensor([[0.0, -torch.inf], [torch.nan, -torch.inf]], dtype=dtype)
    inverse, along = torch.tensor([2.0, 0.5], dtype=dtype), torch.ones(2, dtype=dtype)
    mass = PASSES[dtype].sum_exp(z, inverse)
    assert mass[0] == 1 and mass[1].isnan()
    radial = PASSES[dtype].slopes(z, inverse, along)
    assert z[0].tolist() == [2.0, 0.0] and z[1, 0].isnan() and z[1, 1] == 0 and radial[1] == 0


@dtypes
@pytest.mark.parametrize("num_rows, num, size", [(1, 1, 1), (3, 17, 5), (32, 259, 512)])
def test_passes_are_torchs(threads, dtype, num_rows, num, size):
    ours, table = PASSES[dtype], drawn(num + 9, size, dtype=dtype)
    table[4] = 0.0
    index = torch.randperm(num + 9, generator=torch.Generator().manual_seed(1))[:num]
    index[0] = 4
    out, inverse = torch.empty(num, size, dtype=dtype), torch.empty(num, dtype=dtype)
    near = {"rtol": (size + 4) * ROUNDING[dtype], "atol": 0}  # sums of `size` squares
    ours.read_rows(table, index, out, inverse)
    assert torch.equal(out, table[index]) and inverse[0] == 1
    norm = out.norm(dim=1)
    torch.testing.assert_close(inverse, torch.where(norm > 0, norm, 1).reciprocal(), **near)
    in_place = torch.empty_like(inverse)
    ours.read_rows(out, None, None, in_place)
    torch.testing.assert_close(in_place, inverse, **near)

    z, along = 3 * drawn(num_rows, num, dtype=dtype), drawn(num_rows, dtype=dtype)
    inverse = inverse.clamp(max=4)
    cos = (z * inverse).double()
    e = cos.exp()
    # A product's rounding moves e^c by |c| of them.
    near = {"rtol": (num + 4 + float(cos.abs().max())) * ROUNDING[dtype], "atol": 0}
    torch.testing.assert_close(ours.sum_exp(z, inverse).double(), e.sum(1), **near)
    terms = along[:, None].double() * cos * e
    radial = ours.slopes(z, inverse, along)
    torch.testing.assert_close(z.double(), e * inverse.double(), **near)
    allowed = (num_rows + 8 + float(cos.abs().max())) * ROUNDING[dtype] * terms.abs().sum(0)
    assert ((radial.double() - terms.sum(0)).abs() <= allowed).all()


@dtypes
@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("centres", [1, 3])
@pytest.mark.parametrize("has_index, has_radial", [(True, True), (False, False), (True, False)])
def test_the_update_is_sgds(threads, dtype, momentum, centres, has_index, has_radial):
    num, size, lr, decay = 41, 7, 0.1, 5e-2
    tables = {name: drawn(50, centres * size + i, dtype=dtype)[:, i:].contiguous()
              for i, name in enumerate(("weight", "momentum"))}  # fmt: skip
    before = {name: table.clone() for name, table in tables.items()}
    grad = drawn(num, centres, size, dtype=dtype)
    radial = drawn(num * centres, dtype=dtype) if has_radial else None
    index = torch.randperm(50)[:num] if has_index else None
    PASSES[dtype].sgd(tables, index, grad, radial, lr, momentum, decay)
    rows = torch.arange(num) if index is None else index
    g, w = grad.flatten(1).double(), before["weight"][rows].double()
    if radial is not None:
        pull = radial.double().view(num, centres, 1)
        g = g - (pull * w.view(num, centres, size)).flatten(1)
    v = momentum * before["momentum"][rows].double() + g + decay * w
    near = {"rtol": 0, "atol": 8 * ROUNDING[dtype] * float(g.abs().max() + 4)}
    torch.testing.assert_close(tables["weight"][rows].double(), w - lr * v, **near)
    kept = v if momentum else before["momentum"][rows].double()
    torch.testing.assert_close(tables["momentum"][rows].double(), kept, **near)
    others = torch.ones(50, dtype=torch.bool)
    others[rows] = False
    for name, table in tables.items():
        assert torch.equal(table[others], before[name][others])


def trained(native_too, *arguments):
    limits = MemoryLimits(1500, chunk_size=7)
    if native_too:
        limits = MemoryLimits(1500, 7, None, test_paths.native, test_paths.passes)
    return test_paths.trained(*arguments, limits)


@pytest.mark.parametrize("optimizer, margin, sample_rate, num_subcenters", [
    (RowSGD, "arcface", 1.0, 1), (RowSGD, "arcface", 0.3, 2),
    (RowSGD, "curricularface", 1.0, 2), (RowSGD, "curricularface", 0.3, 1),
    (RowAdamW, "arcface", 1.0, 2), (RowAdamW, "arcface", 0.3, 1),
    *(pytest.param(*case, marks=pytest.mark.long) for case in [
        (RowSGD, "arcface", 1.0, 2), (RowSGD, "arcface", 0.3, 1),
        (RowSGD, "curricularface", 1.0, 1), (RowSGD, "curricularface", 0.3, 2),
        (RowAdamW, "arcface", 1.0, 1), (RowAdamW, "arcface", 0.3, 2),
    ]),
])  # fmt: skip
def test_three_steps_are_torchs(optimizer, margin, sample_rate, num_subcenters):
    """In the backward and after it; rows on the device and, to the bit the same, on the host."""
    options = margin, sample_rate, num_subcenters
    plain = ranks.run(2, trained, False, optimizer, True, *options, "device")
    for early in (True, False):
        ours = ranks.run(2, trained, True, optimizer, early, *options, "device")
        hosted = ranks.run(2, trained, True, optimizer, early, *options, "host")
        for mine, theirs, third in zip(ours, plain, hosted, strict=True):
            for one, other, held in zip(mine, theirs, third, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
                assert torch.equal(one, held)


def test_fp32_gradients_are_as_near_to_the_truth_as_torchs():
    x, weight, labels = drawn(64, 96), drawn(900, 96), torch.arange(64) * 14
    truth = reference.partial_fc(
        x, weight, labels, torch.arange(900), lambda *a: reference.cosface(*a, m=0.35)
    )
    form = functools.partial(native_kernel, PASSES[torch.float32])
    off = {}
    for name, limits in (
        ("plain", MemoryLimits(0, 130)),
        ("native", MemoryLimits(0, 130, kernel=form)),
    ):
        head = PartialFC(MARGINS["cosface"](margin=0.35), 96, 900, limits=limits)
        head.weight.data.copy_(weight)
        own = x.float().requires_grad_()
        loss = head(own, labels)
        loss.backward()
        ours = loss.detach(), own.grad, head.sampled_grad
        off[name] = [
            float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, truth, strict=True)
        ]
    for mine, theirs in zip(off["native"], off["plain"], strict=True):
        assert mine < max(2 * theirs, 64 * 2**-24), off


def test_a_change_of_the_rows_between_forward_and_backward_is_found():
    limits = MemoryLimits(cpu_library=PASSES[torch.float32])
    head = PartialFC(MARGINS["arcface"](), 8, 30, 0.5, limits=limits)
    rows, batch = RowSGD(head), (torch.randn(4, 8, requires_grad=True), torch.arange(4))
    head(*batch).backward()
    late = head(*batch)
    head._micro_steps.open.pop()  # as if it were of the next step
    rows.step(0.1)
    with pytest.raises(RuntimeError, match="changed between a forward and its backward"):
        late.backward()


def test_a_row_whose_norm_overflows_is_torchs():
    losses = []
    for limits in (
        MemoryLimits(),
        MemoryLimits(kernel=functools.partial(native_kernel, PASSES[torch.float32])),
    ):
        head = PartialFC(MARGINS["cosface"](), 16, 40, limits=limits)
        head.weight.data[0] = 1e19  # a target's
        losses.append(head(drawn(8, 16, dtype=torch.float32), torch.arange(8)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and math.isfinite(losses[0])


def test_rows_that_are_not_dense_are_refused():
    head = PartialFC(
        MARGINS["arcface"](), 8, 30,
        limits=MemoryLimits(kernel=functools.partial(native_kernel, PASSES[torch.float32])),
    )  # fmt: skip
    head.weight.data = torch.randn(8, 30).T
    with pytest.raises(ValueError, match="make it contiguous"):
        head(torch.randn(4, 8), torch.arange(4))


def test_rows_of_another_dtype_are_refused():
    limits = MemoryLimits(kernel=functools.partial(native_kernel, PASSES[torch.float32]))
    head = PartialFC(MARGINS["arcface"](), 8, 30, limits=limits).double()
    with pytest.raises(TypeError, match="choose after moving the head"):
        head(torch.randn(4, 8), torch.arange(4))


# --- The choice -----------------------------------------------------------------------------------


def chosen(wanted, known="", worth=None, broken=(), compiler=None, dtype=torch.float32):
    rank = torch.distributed.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        if worth is not None:
            patch.setattr(autotune, "_WORTH_BUILDING", worth)
        if rank in broken:
            patch.setattr(cpu_library, "_built", cpu_library._built.__wrapped__)
            patch.setenv("CC", compiler)
        head = PartialFC(MARGINS["arcface"](), 8, 300).to(dtype)
        found = autotune.choose(wanted, head, 8, known)
    assert (head.limits.cpu_library is not None) is (found.form == "native")
    head(torch.randn(8, 8, dtype=dtype), torch.arange(8)).backward()
    return found


@pytest.mark.parametrize(
    "wanted, options, form, words",
    [
        ("native", {}, "native", "head_kernel=native: native is taken"),
        ("auto", {}, "plain", ""),
        ("auto", {"worth": 100}, "native", "head_kernel=auto: native is taken"),
        ("auto", {"worth": 100, "known": "plain"}, "plain", ""),
        ("auto", {"known": "native"}, "native", "native is taken"),
        ("native", {"dtype": torch.bfloat16}, "plain", "class rows are torch.bfloat16, not"),
        ("native", {"broken": (0, 1), "compiler": "false"}, "plain", "false ended with 1"),
        (
            "native",
            {"broken": (0, 1), "compiler": "'/no such/cc' -O0"},
            "plain",
            "'/no such/cc' -O0 (CC names another): [Errno 2]",
        ),
        ("native", {"broken": (0, 1), "compiler": "true"}, "plain", "cannot open shared object"),
        ("native", {"broken": (0, 1), "compiler": "cc -Dsgd=other"}, "plain", "cannot be used"),
        ("native", {"broken": (0, 1), "compiler": " "}, "native", "native is taken"),
    ],
)
def test_a_form_is_taken_or_what_hinders_is_said(wanted, options, form, words):
    for found in ranks.run(2, functools.partial(chosen, wanted, **options)):
        assert found.form == form and words in found.message and bool(found.message) is bool(words)


def test_what_hangs_or_stammers_is_ended_and_leaves_nothing(tmp_path, monkeypatch):
    """With the programs that the compiler has started."""
    monkeypatch.setattr(cpu_library, "_SECONDS", 1)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    compiler, pid = tmp_path / "cc", tmp_path / "pid"
    compiler.write_text(f"#!/bin/sh\nsleep 300 &\necho $! > {pid}\nwait\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert "took more than 1 s" in cpu_library._built.__wrapped__("float")
    while not has_ended(int(pid.read_text())):  # SIGKILL is sent, and takes effect a little later
        time.sleep(0.01)
    compiler.write_text("#!/bin/sh\nprintf 'a\\377b' >&2\nexit 3\n")
    assert "ended with 3: a" in cpu_library._built.__wrapped__("float")
    assert not [*tmp_path.glob("arcline-passes-*")]
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nonexistent"])
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert "TMPDIR names" in cpu_library._built.__wrapped__("float")


def has_ended(pid):
    """Whether a process is gone, or a zombie that nobody has waited for yet."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_ranks_take_one_form():
    call = functools.partial(chosen, "native", broken=(1,), compiler="false")
    first, second = ranks.run(2, call)
    assert first.form == second.form == "plain"
    assert "another rank cannot" in first.message and "false ended with 1" in second.message


def test_a_run_takes_it_says_so_and_keeps_it(shards_dir, tmp_path):
    common = {"rec": str(shards_dir), "precision": "fp64", "max_steps": 2}
    ends = {}
    for form in ("plain", "native"):
        keys = common | {"head_kernel": form, "output": str(tmp_path / form)}
        if form == "native":
            ranks.run(2, runs.run, keys, 1)
            keys["head_kernel"] = "auto"
        ends[form] = ranks.run(2, runs.run, keys)[0]
    for name, value in ends["plain"].items():
        torch.testing.assert_close(ends["native"][name], value, rtol=1e-7, atol=1e-9)
    said = json.loads((tmp_path / "native" / "config.json").read_text())
    assert said["head_forms"] == ["native"]


def test_a_head_that_nobody_chose_a_form_for_takes_it_where_it_pays(monkeypatch):
    """As in the loop of PartialFC's docstring; a form that the limits name stays."""
    monkeypatch.setattr(autotune, "_WORTH_BUILDING", 300)
    taken = {}
    for num_classes, limits in ((300, MemoryLimits()), (299, MemoryLimits()),
                                (300, MemoryLimits(kernel=plain_kernel))):  # fmt: skip
        head = PartialFC(MARGINS["cosface"](), 16, num_classes, limits=limits)
        head(torch.randn(8, 16), torch.arange(8)).backward()
        taken[num_classes, limits.kernel] = head.limits.cpu_library is not None
        assert head.limits.kernel is not None
    assert taken == {(300, None): True, (299, None): False, (300, plain_kernel): False}
