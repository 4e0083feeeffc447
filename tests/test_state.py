"""State on its way through files, copies, the meta device, other versions and optimizers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsoftmax import LambdaSchedule, LSoftmaxLinear, LSoftmaxLoss

LAYERS = (LSoftmaxLoss, LSoftmaxLinear)


def curve() -> LambdaSchedule:
    return LambdaSchedule(base=10.0, gamma=0.5, power=2.0, minimum=0.3)


def held() -> LambdaSchedule:
    return LambdaSchedule(base=10.0, gamma=0.5, power=2.0, minimum=0.3, keep=0.6)


def constant() -> LambdaSchedule:
    return LambdaSchedule.constant(0.5)


def batch(head: nn.Module) -> tuple[Tensor, Tensor]:
    """Features about their class vectors: of so few classes the nearest may be 90 degrees away, and
    then there is no angle to anneal by.
    """
    y = torch.randint(5, (8,))
    weight = getattr(head, "linear", head).weight.detach().float()
    return F.normalize(weight[y], dim=1) + 0.2 * torch.randn(8, 6), y


def trained(layer: type, lam: LambdaSchedule, steps: int = 3) -> nn.Module:
    head = layer(6, 5, margin=3, lam=lam)
    for _ in range(steps):
        head(*batch(head))
    assert lam.keep is None or lam.share > 0
    return head


def saved(value: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


# ---- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [curve, held, constant])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "copied",
    [
        lambda head: pickle.loads(pickle.dumps(head)),
        lambda head: saved(head, weights_only=False),
        copy.deepcopy,
    ],
    ids=["pickle", "save", "deepcopy"],
)
def test_a_copy_goes_on_alike_and_apart(copied, layer: type, schedule) -> None:
    head = trained(layer, schedule())
    other = copied(head)
    assert repr(other) == repr(head)
    for _ in range(2):
        x, y = batch(head)
        assert torch.equal(head(x, y), other(x, y))
    assert torch.equal(head.lam, other.lam)
    head(*batch(head))
    assert head.schedule.is_constant or other.schedule.steps == 5


@pytest.mark.parametrize("schedule", [curve, held])
def test_a_schedule_alone(schedule) -> None:
    one = schedule()
    one.step()
    other = pickle.loads(pickle.dumps(one))
    one.step()
    other.step()
    assert repr(one) == repr(other)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize("schedule", [curve, held, constant])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_file_of_tensors_alone(layer: type, schedule) -> None:
    """weights_only=True refuses whatever is no tensor."""
    head, other = trained(layer, schedule()), layer(6, 5, margin=3, lam=schedule())
    other.load_state_dict(saved(head.state_dict(), weights_only=True))
    x, y = batch(head)
    assert torch.equal(head(x, y), other(x, y))
    assert torch.equal(head.lam, other.lam)


# ---- checkpoints of another schedule -------------------------------------------------------------


def test_a_checkpoint_from_before_keep_goes_on_at_its_lam() -> None:
    """Red where the share starts from nothing, which is lam = 1000 again. Older ones have none."""
    head = trained(LSoftmaxLoss, curve(), steps=40)
    state = head.state_dict()
    names = {"linear.weight", "schedule.steps", "schedule.lam"}
    assert set(state) == {*names, "schedule.share"}
    for saved in (state, {name: state[name] for name in names}):
        other = LSoftmaxLoss(6, 5, margin=3, lam=held())
        other.load_state_dict(saved)
        assert other.schedule.steps == 40
        torch.testing.assert_close(other.schedule.upcoming(), head.lam, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match=r"Missing key.*schedule\.lam"):
        other.load_state_dict({name: state[name] for name in names - {"schedule.lam"}})


def test_a_checkpoint_of_keep_goes_on_along_the_curve() -> None:
    head = trained(LSoftmaxLoss, held())
    other = LSoftmaxLoss(6, 5, margin=3, lam=curve())
    other.load_state_dict(head.state_dict())
    assert other.schedule.steps == 3
    assert other.schedule.upcoming() == pytest.approx(curve().value(4))


@pytest.mark.parametrize("schedule", [curve, held])
@pytest.mark.parametrize("layer", LAYERS)
def test_class_vectors_without_annealing_begin_it(layer: type, schedule) -> None:
    """However far the layer was: a full margin on others' class vectors would lose them."""
    fresh, linear = schedule(), nn.Linear(6, 5, bias=False)
    plain = linear if layer is LSoftmaxLinear else nn.ModuleDict({"linear": linear})
    for before in (layer(6, 5, lam=0.5), plain):
        model = nn.ModuleDict({"head": trained(layer, schedule())})
        model.load_state_dict({f"head.{name}": w for name, w in before.state_dict().items()})
        for name in ("steps", "lam", "share"):
            assert torch.equal(getattr(model["head"].schedule, name), getattr(fresh, name))


@pytest.mark.parametrize(
    "part",
    [
        lambda model: model["body"].state_dict(prefix="body."),
        lambda model: {"module.head.linear.weight": torch.zeros(5, 6)},  # fits nothing
    ],
    ids=["another module's", "nobody's"],
)
def test_parts_that_are_loaded_change_no_annealing(part) -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 6), "head": trained(LSoftmaxLoss, held())})
    before = copy.deepcopy(model.state_dict())
    model.load_state_dict(part(model), strict=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model["head"].load_state_dict({"other": torch.zeros(1)}, strict=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("before", [curve, held])
def test_a_constant_refuses_an_annealing(before) -> None:
    """Strictly; without it, the class vectors are loaded."""
    state = trained(LSoftmaxLoss, before()).state_dict()
    head = LSoftmaxLoss(6, 5, margin=3, lam=constant())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*schedule\."):
        head.load_state_dict(state)
    result = head.load_state_dict(state, strict=False)
    assert result.missing_keys == []
    assert set(result.unexpected_keys) == {"schedule.steps", "schedule.lam", "schedule.share"}
    assert torch.equal(head.linear.weight, state["linear.weight"])
    assert head.schedule.steps == 0


# ---- the meta device -----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [curve, held, constant])
@pytest.mark.parametrize("layer", LAYERS)
def test_loaded_by_assignment(layer: type, schedule) -> None:
    """A model made on the meta device takes the checkpoint's tensors as they are; what is in no
    checkpoint must not stay behind.
    """
    head = trained(layer, schedule())
    with torch.device("meta"):
        other = layer(6, 5, margin=3, lam=schedule())
    other.load_state_dict(head.state_dict(), assign=True)
    assert not [name for name, each in other.named_buffers() if each.is_meta]
    other = other.to("cpu")
    x, y = batch(head)
    assert torch.equal(copy.deepcopy(head)(x, y), other(x, y))


def test_a_16_bit_checkpoint_loaded_by_assignment() -> None:
    """The schedule's numbers stay float32, which the ops expect and a running mean needs."""
    state = trained(LSoftmaxLoss, held()).state_dict()
    halves = {key: v.bfloat16() if v.is_floating_point() else v for key, v in state.items()}
    with torch.device("meta"):
        head = LSoftmaxLoss(6, 5, margin=3, lam=held())
    head.load_state_dict(halves, assign=True)
    assert head.linear.weight.dtype == torch.bfloat16
    assert {head.lam.dtype, head.schedule.share.dtype} == {torch.float32}
    x, y = batch(head)
    head(x.bfloat16(), y).backward()
    assert head.schedule.steps == 4


@pytest.mark.parametrize("layer", LAYERS)
def test_a_device_of_its_own_among_others_on_meta(layer: type) -> None:
    """What is given counts, as for nn.Linear; the schedule has its first values there."""
    with torch.device("meta"):
        head = layer(6, 5, lam=held(), device="cpu")
    assert not any(each.is_meta for each in (*head.parameters(), *head.buffers()))
    assert head.lam == held().lam
    head(*batch(head))
    assert head.schedule.steps == 1


def test_a_type_for_all_leaves_the_count_an_integer() -> None:
    """float16 would count to 2048."""
    head = trained(LSoftmaxLoss, held()).type(torch.float16)
    assert head.linear.weight.dtype == torch.float16
    assert (head.schedule.steps.dtype, head.lam.dtype) == (torch.int64, torch.float32)
    assert head.schedule.steps == 3


def assigned(head: nn.Module, state: dict[str, Tensor], junk: float = 77) -> nn.Module:
    """As transformers' from_pretrained fills a model made on the meta device: by setattr, with junk
    in what is in no checkpoint.
    """
    for module, own in ((head.linear, "linear."), (head.schedule, "schedule.")):
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            memory = torch.full((), junk, dtype=tensor.dtype).expand(tensor.shape).clone()
            value = state.get(own + name, memory)
            setattr(module, name, nn.Parameter(value) if own == "linear." else value)
    return head


@pytest.mark.parametrize("schedule", [curve, held, constant])
@pytest.mark.parametrize("steps", [1, 40])
def test_filled_by_assignment_of_attributes(schedule, steps: int) -> None:
    """A schedule that was in the checkpoint goes on; of a constant there is nothing to load."""
    head = trained(LSoftmaxLoss, schedule(), steps=steps)
    x, y = batch(head)
    state = head.state_dict()
    with torch.device("meta"):
        empty = LSoftmaxLoss(6, 5, margin=3, lam=schedule())
    for again in (empty, copy.deepcopy(empty).eval()):
        other = assigned(again, copy.deepcopy(state))
        expected = copy.deepcopy(head).train(other.training)
        assert torch.equal(other(x, y), expected(x, y))
        assert torch.equal(other.schedule.steps, expected.schedule.steps)


@pytest.mark.parametrize("now", [lambda: LambdaSchedule.for_steps(10_000), held])
def test_numbers_of_another_schedule_are_numbers(now) -> None:
    """However far below the curve of the new one, or set by hand; and the end of the authors'."""
    steep, by_hand = LambdaSchedule(1000.0, 0.1, 45.0), LambdaSchedule(9.0, 0.1, 1.0)
    by_hand.commit(5.0)
    for schedule, steps in ((curve(), 40), (steep, 200), (by_hand, 0)):
        state = trained(LSoftmaxLoss, schedule, steps).state_dict()
        with torch.device("meta"):
            empty = LSoftmaxLoss(6, 5, margin=3, lam=now())
        loaded = copy.deepcopy(empty)
        loaded.load_state_dict(copy.deepcopy(state), assign=True)
        for other in (loaded, assigned(empty, copy.deepcopy(state))):
            other(*batch(other))
            assert other.schedule.steps == state["schedule.steps"] + 1


def test_a_compiled_layer_looks_at_its_numbers() -> None:
    """Red if one from the meta device trains with junk because its first call is compiled."""
    state = {"linear.weight": torch.randn(5, 6)}
    x, y = torch.randn(4, 6), torch.arange(4)
    for schedule in (constant, held):
        with torch.device("meta"):
            head = LSoftmaxLoss(6, 5, margin=3, lam=schedule())
        compiled = torch.compile(assigned(head, state), backend="eager")
        if schedule is held:
            with pytest.raises(RuntimeError, match="are of no schedule"):
                compiled(x, y)
            head.schedule.reset_parameters()
        expected = LSoftmaxLoss(6, 5, margin=3, lam=schedule())
        expected.load_state_dict(state)
        assert compiled(x, y) == expected(x, y)


def test_a_skeleton_on_the_meta_device_is_called_with_others_numbers() -> None:
    """As an ensemble is, by functional_call under vmap, where nothing can be looked at."""
    heads = [trained(LSoftmaxLoss, curve()).eval() for _ in range(3)]
    with torch.device("meta"):
        skeleton = LSoftmaxLoss(6, 5, margin=3, lam=curve()).eval()
    x, y = torch.randn(4, 6), torch.arange(4)
    state = torch.func.stack_module_state(heads)
    call = torch.func.vmap(lambda p, b: torch.func.functional_call(skeleton, (p, b), (x, y)))
    torch.testing.assert_close(call(*state), torch.stack([head(x, y) for head in heads]))


@pytest.mark.parametrize("schedule", [curve, held])
def test_junk_for_numbers_is_refused(schedule) -> None:
    """Where the layer is used, in training and out of it, until it is reset."""
    state = {"linear.weight": torch.randn(5, 6)}
    with torch.device("meta"):
        head = LSoftmaxLoss(6, 5, margin=3, lam=schedule())
    x, y = torch.randn(4, 6), torch.arange(4)
    for training, junk in ((True, 77), (False, 77), (True, 0)):
        other = assigned(copy.deepcopy(head), state, junk).train(training)
        for _ in range(2):
            message = rf"steps = {junk}, lam = {junk}.*reset_parameters\(\)"
            with pytest.raises(RuntimeError, match=message):
                other(x, y)
        other.schedule.reset_parameters()
        other(x, y)
        assert other.schedule.steps == int(training)


@pytest.mark.parametrize("schedule", [curve, held, constant])
@pytest.mark.parametrize("layer", LAYERS)
def test_made_empty_and_reset(layer: type, schedule) -> None:
    """As sharded training does it: every module of its own numbers has reset_parameters()."""
    with torch.device("meta"):
        head = layer(6, 5, margin=3, lam=schedule())
    head.to_empty(device="cpu")
    for buffer in head.buffers():
        buffer.fill_(7)  # what an uninitialised one may hold
    for parameter in head.parameters():
        nn.init.constant_(parameter, torch.nan)
    for module in head.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = schedule()
    for name in ("steps", "lam", "share"):
        assert torch.equal(getattr(head.schedule, name), getattr(fresh, name))
    assert all(parameter.isfinite().all() for parameter in head.parameters())


# ---- optimizers ----------------------------------------------------------------------------------


def test_no_weight_decay_on_the_head() -> None:
    """Groups by name; the schedule is no parameter."""
    model = nn.ModuleDict({"body": nn.Linear(4, 6), "head": LSoftmaxLoss(6, 5)})
    names = [name for name, _ in model.named_parameters()]
    assert names == ["body.weight", "body.bias", "head.linear.weight"]
    groups: dict[bool, list] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[not name.startswith("head.")].append((name, parameter))
    optimizer = torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": 0.1},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=0.5,
    )
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model["body"].weight, before["body"].weight * 0.95)
    assert torch.equal(model["head"].linear.weight, before["head"].linear.weight)


def test_scaled_gradients(device: str) -> None:
    """float16 with a GradScaler: the gradients of the training without one; a step whose gradients
    overflow is left out, and training goes on.
    """
    head = LSoftmaxLoss(16, 5, margin=4, lam=curve()).to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
    x, y = torch.randn(32, 16).to(device), torch.randint(5, (32,)).to(device)
    x.requires_grad_()
    twin = copy.deepcopy(head)
    with torch.autocast(device, torch.float16):
        scaler.scale(head(x, y)).backward()
        loss = twin(x.detach(), y)
    loss.backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(
        head.linear.weight.grad, twin.linear.weight.grad, rtol=1e-3, atol=1e-5
    )
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(head.linear.weight, twin.linear.weight)

    before = head.linear.weight.clone()
    scaler.update(2.0**40)
    for expected in (2.0**39, 2.0**38):
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = head(x, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(head.linear.weight, before)
        assert scaler.get_scale() == expected
    assert head.lam.isfinite()
