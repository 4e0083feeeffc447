"""The forward pass in one kernel for Hopper, emulated: tensor cores, copy engine and barriers too.

Here its three launches are called as the host code calls them. What only a GPU can tell is whether
the assembly in csrc/hopper.cuh does what tests/emulation/hopper_*.cpp say the manual says.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from emulation import build
from lsoftmax import reference
from problems import relative_error

pytestmark = pytest.mark.skipif(
    build.compiler() is None, reason="no C++ compiler: the CUDA emulator cannot be built"
)

IGNORED = -100
TILE_CLASSES = 256

Pointer, Count = ctypes.c_void_p, ctypes.c_int64


def structure(name: str, pointers: str, counts: str, *more: tuple[str, type]) -> type:
    fields = [(field, Pointer) for field in pointers.split()]
    fields += [(field, Count) for field in counts.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [*fields, *more]})


# As in csrc/hopper.h.
RowReference = structure(
    "RowReference",
    "x w target lam pilot reference margin_terms row_cosine",
    "n d c p ignore_index",
    ("margin", ctypes.c_int),
)
GemmExponentials = structure(
    "GemmExponentials",
    "x w target reference e partial",
    "n d c e_stride ignore_index first_class",
)
ExponentialRows = structure(
    "ExponentialRows",
    "x w target class_weight margin_terms partial reference e row_loss rows",
    "n d c e_stride ignore_index",
)


def launch(name: str, kind: type, **values: Tensor | int | None) -> str:
    """Call a launcher; a tensor stands for its address. Returns what it complains of."""
    params = kind(**{k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in values.items()})
    message = getattr(build.load_hopper(), f"hopper_{name}")(ctypes.byref(params))
    return message.decode()


@contextmanager
def late_copies() -> Iterator[None]:
    """Within, the copy engine works only when somebody waits for it, and not at once."""
    build.load_hopper().emulation_set_late_copies(1)
    try:
        yield
    finally:
        build.load_hopper().emulation_set_late_copies(0)


class Case:
    """Features, class vectors and targets in bfloat16, some rows ignored; and memory for results.

    E has a row and 8 columns too many, filled with 7: nobody may touch those.
    """

    def __init__(self, n: int, d: int, c: int, norm: float = 4.0) -> None:
        self.n, self.d, self.c = n, d, c
        self.x = (torch.randn(n, d) * norm / d**0.5).bfloat16()
        self.w = torch.randn(c, d).bfloat16()
        self.y = torch.randint(c, (n,))
        self.y[torch.rand(n) < 0.1] = IGNORED
        self.kept = self.y != IGNORED
        self.reference = torch.rand(n) * 10 - 2
        self.width = (c + 7) // 8 * 8
        self.e = torch.full((n + 1, self.width + 8), 7.0, dtype=torch.bfloat16)
        self.partial = torch.full((n + 1, -(-c // TILE_CLASSES)), 7.0)

    def exponentials(self, **changes: Tensor | int | None) -> str:
        values = {
            "x": self.x,
            "w": self.w,
            "target": self.y,
            "reference": self.reference,
            "e": self.e,
            "partial": self.partial,
            "n": self.n,
            "d": self.d,
            "c": self.c,
            "e_stride": self.e.shape[1],
            "ignore_index": IGNORED,
            "first_class": 0,
        }
        return launch("gemm_exponentials", GemmExponentials, **(values | changes))

    def true_z(self) -> Tensor:
        """Logits in float64, (N, C), the target's plain."""
        return self.x.double() @ self.w.double().T

    def true_e(self) -> Tensor:
        """E in float64, (N, C)."""
        e = torch.exp(self.true_z() - self.reference.double()[:, None])
        e[self.kept, self.y[self.kept]] = 0
        e[~self.kept] = 0
        return e

    def error(self) -> Tensor:
        """Of an exponential before it is stored, relative, (N, 1): float32's roundings of the
        row's largest logit, and some of the exponential and of sums of it.
        """
        return 2**-22 * (8 + self.true_z().abs().amax(1, keepdim=True))

    def check_e(self) -> None:
        truth = self.true_e()
        e = self.e[: self.n, : self.c].double()
        # Half a unit in the last place of bfloat16, the product's rounding; and underflow.
        assert ((e - truth).abs() <= truth * (2**-8 + self.error()) + 2e-38).all()
        assert (self.e[: self.n, self.c : self.width] == 0).all()
        assert (self.e[self.n] == 7).all()
        assert (self.e[:, self.width :] == 7).all()

    def check_partial(self) -> None:
        tiles = self.true_e().split(TILE_CLASSES, dim=1)
        truth = torch.stack([tile.sum(1) for tile in tiles], 1)
        assert ((self.partial[:-1].double() - truth).abs() <= truth * self.error()).all()
        assert (self.partial[-1] == 7).all()


SHAPES = [
    (1, 8, 1),  # one of everything: all but 8 columns of a stage are outside the matrices
    (3, 16, 9),
    (128, 64, 256),  # exactly one tile, one stage
    (129, 72, 257),  # one row, one class, 8 features over
    (64, 264, 300),  # five stages: the ring goes round within a tile; half of the tile has no rows
    (400, 64, 700),  # one stage a tile, 12 tiles in two blocks: the leader is a tile ahead
    (260, 200, 1000),  # four stages, as many as the ring has
    (2180, 16, 300),  # more rows of tiles than a group has
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exponentials(shape):
    case = Case(*shape)
    assert case.exponentials() == ""
    case.check_e()
    case.check_partial()


def test_repeats_bit_for_bit_in_any_order():
    case = Case(300, 136, 600)
    assert case.exponentials() == ""
    results = [(case.e.clone(), case.partial.clone())]
    with late_copies():
        assert case.exponentials() == ""
        results.append((case.e.clone(), case.partial.clone()))
        with build.reversed_order(build.load_hopper()):
            assert case.exponentials() == ""
            results.append((case.e.clone(), case.partial.clone()))
    for e, partial in results[1:]:
        assert torch.equal(e, results[0][0])
        assert torch.equal(partial, results[0][1])


def test_only_sums_or_only_exponentials():
    case = Case(140, 40, 300)
    assert case.exponentials(e=None, e_stride=0) == ""
    case.check_partial()
    assert (case.e == 7).all()
    case.partial.fill_(7)
    assert case.exponentials(partial=None) == ""
    case.check_e()
    assert (case.partial == 7).all()


def test_slices_of_classes():
    """A slice of w, into a slice of E: the target is where its class is, or in another slice."""
    case = Case(70, 24, 640)
    for first, last in ((0, 304), (304, 640)):
        assert (
            case.exponentials(
                w=case.w[first:last],
                e=case.e[:, first:],
                c=last - first,
                first_class=first,
                partial=None,
            )
            == ""
        )
    case.check_e()


def test_rows_of_e_beyond_32_bits():
    """Offsets of 2^31 elements: 4 GB of addresses, of which a few pages are touched."""
    case = Case(2, 8, 5)
    stride = 2**31 + 8
    try:
        e = torch.empty(stride + 16, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no address space of 4 GB")
    assert case.exponentials(e=e, e_stride=stride) == ""
    case.e[0, : case.width], case.e[1, : case.width] = e[:8], e[stride : stride + 8]
    case.check_e()


def test_not_a_number_stays_in_its_row():
    case = Case(150, 64, 280)
    case.kept[:] = True
    case.y[:] = torch.randint(case.c, (case.n,))
    case.y[77], case.kept[77] = IGNORED, False
    case.x[77] = torch.nan
    assert case.exponentials() == ""
    case.x[77] = 0  # what the truth makes of it is 0 * NaN
    case.check_e()
    case.check_partial()


def test_what_is_not_supported():
    case = Case(8, 16, 16)
    unsupported = "error 801"
    assert case.exponentials(d=12) == unsupported
    assert case.exponentials(e_stride=20) == unsupported
    for name in ("x", "w", "e"):
        address = getattr(case, name).data_ptr()
        assert case.exponentials(**{name: address + 2}) == unsupported
    assert case.exponentials(n=0) == ""
    assert (case.e == 7).all()


def forward(
    case: Case, pilot: int, margin: int = 4, lam: float = 0.5, weight: Tensor | None = None
):
    """All three launches. Returns row losses, rows (5, N) as of LossRows and E (N, C)."""
    n, d, c = case.n, case.d, case.c
    logits = (case.x.float() @ case.w[:pilot].float().T).contiguous()
    terms, rows = torch.empty(4, n, dtype=torch.float64), torch.full((5, n), 7.0)
    loss, lam_ = torch.full((n,), 7.0), torch.tensor(lam)
    common = {"x": case.x, "w": case.w, "target": case.y, "reference": case.reference}
    common |= {"n": n, "d": d, "c": c, "ignore_index": IGNORED, "margin_terms": terms}
    more = {"lam": lam_, "pilot": logits, "p": pilot, "margin": margin}
    assert launch("row_reference", RowReference, **common, **more) == ""
    assert case.exponentials() == ""
    more = {"class_weight": weight, "partial": case.partial, "e": case.e, "row_loss": loss}
    more |= {"rows": rows, "e_stride": case.e.shape[1]}
    assert launch("exponential_rows", ExponentialRows, **common, **more) == ""
    return loss, rows, case.e[:n, :c]


def check_forward(case: Case, pilot: int, **options) -> None:
    """Losses, and the gradients that backward makes of E and the rows, against float64."""
    loss, rows, e = forward(case, pilot, **options)
    x, w = (v.double().requires_grad_() for v in (case.x, case.w))
    weight = options.pop("weight", None)
    truth = reference.lsoftmax_loss(
        x,
        w,
        case.y,
        **{"margin": 4, "lam": 0.5} | options,
        reduction="none",
        weight=None if weight is None else weight.double(),
    )
    assert relative_error(loss, truth.detach()) <= 2e-6
    true_dx, true_dw = torch.autograd.grad(truth.sum(), (x, w))
    scale, input_share, weight_share, target_share, r = rows.double()[:, :, None]
    x, w, kept = x.detach(), w.detach(), case.kept
    dx = scale * (e.double() @ w) + input_share * x
    dx[kept] += target_share[kept] * w[case.y[kept]]
    dw = e.double().T @ (scale * x)
    dw.index_add_(0, case.y[kept], (target_share * x)[kept])
    dw.index_add_(0, case.y[kept], (weight_share[kept] * w[case.y[kept]]))
    assert torch.equal(r[kept, 0].float(), case.reference[kept])
    assert relative_error(dx, true_dx) <= 4e-3
    assert relative_error(dw, true_dw) <= 4e-3


@pytest.mark.parametrize("pilot", [0, 1, 200])
def test_forward(pilot):
    check_forward(Case(90, 32, 400), pilot)


def test_forward_with_class_weights():
    check_forward(Case(90, 32, 400), 256, weight=torch.rand(400) + 0.5, margin=3, lam=0.0)


def test_forward_of_one_class():
    check_forward(Case(5, 8, 1), 1)


def test_rows_far_from_their_reference_are_done_anew():
    """Logits of up to 1000 outside the pilot: exponentials overflow, and nothing else is lost."""
    case = Case(100, 32, 300, norm=8.0)
    outside = torch.arange(0, 100, 7)
    for k, row in enumerate(outside.tolist()):
        case.w[20 + k] = case.x[row] * float(5 + k)
    case.y[outside] = case.y[outside].clamp(max=19)  # their target is another class
    check_forward(case, pilot=16)
    z = case.true_z()
    z[case.kept, case.y[case.kept]] = -torch.inf
    redone = case.reference >= z.amax(1) - 0.1
    assert redone[outside][case.kept[outside]].all()
    case.check_e()


@pytest.mark.parametrize("pilot", [0, 60])
def test_plain_logit_of_the_target_is_no_reference(pilot):
    """At 45 degrees f is -170 where the target's plain logit is 120, and the others' are near 0."""
    case = Case(8, 16, 60)
    case.y[:], case.kept[:] = torch.arange(8), True
    case.x[:] = 13 * torch.eye(8, 16)
    case.w *= 0.1
    case.w[:8] = 9.2 * (torch.eye(8, 16) + torch.eye(8, 16).roll(8, 1))
    check_forward(case, pilot, lam=0.0)
