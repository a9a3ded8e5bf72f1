"""The node itself, in a plain loop: no Lightning is needed."""

import pytest
import torch
from torch import nn

from lightning_compress import EMATeacher, Pair, Ramp
from lightning_compress.distillation.inject import Injector, Term
from lightning_compress.distillation.session import Session


def squares(call, output, features):
    return [Term("square", 2.0, output.square().mean() + sum(f.sum() for f in features.values()))]


def grafted(module, evaluate=squares, **arguments):
    injector = Injector(module, evaluate, path="net", **arguments)
    injector.begin_batch(active=True)
    return injector


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_factors_are_float32_and_only_the_sum_is_rounded(dtype):
    layer = nn.Identity()
    injector = grafted(layer)
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    y = layer(x)
    injector.begin_backward(scale=128.0, share=1.0)
    arriving = torch.full_like(y, 0.5)
    y.backward(arriving)
    exact = 0.5 + 128.0 * 2.0 * 2 * x.detach().float() / x.numel()
    one_rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(x.grad.float(), exact, rtol=one_rounding, atol=1e-6)


def test_features_are_edges_of_their_own():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    injector = grafted(net, taps=["1"])
    x = torch.randn(4, 2)
    plain = net[2](net[1](net[0](x)))
    hidden = net[1](net[0](x))
    expected = torch.autograd.grad(
        plain.sum() + 2 * (plain.square().mean() + hidden.sum()), list(net.parameters())
    )
    y = net(x)
    injector.begin_backward(scale=1.0, share=1.0)
    y.sum().backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_call_that_lightning_redirects_is_no_call_of_the_student():
    net, inner = nn.Linear(2, 1), []
    injector = grafted(net)
    forward = net.forward

    def redirected(x):
        net.forward = forward
        inner.append(net(x))
        return inner[0].sum()

    net.forward = redirected
    loss = net(torch.ones(1, 2))
    injector.begin_backward(scale=1.0, share=1.0)
    loss.backward()
    assert injector.calls == injector.injections == 1


def test_values_pass_unchanged_and_without_gradients_nothing_is_carried():
    net = nn.LSTM(2, 3)
    x = torch.randn(5, 1, 2)
    expected = net(x)
    injector = grafted(net)
    found = net(x)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1][1], expected[1][1])
    assert injector.calls == 1
    with torch.no_grad():
        net(x)
    net.requires_grad_(False)
    net(x)
    assert injector.calls == 1


def test_after_remove_a_module_is_as_it_was():
    net = nn.Linear(2, 1)
    injector = grafted(net)
    injector.remove()
    assert net(torch.ones(1, 2)).grad_fn.name() == "AddmmBackward0"
    assert not net._forward_hooks
    assert injector.calls == 0


def test_a_session_serves_a_plain_loop():
    torch.manual_seed(0)
    student, teacher = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False).eval()
    session = Session([Pair("")], student, teacher)
    optimizer = torch.optim.SGD(student.parameters(), 0.5)
    session.attach([optimizer], adapter_lr=1e-3)
    for _ in range(300):
        session.begin_batch(None, 0)
        loss = 0 * student(torch.randn(16, 3)).sum()
        optimizer.zero_grad()
        session.begin_backward(scale=1.0, share=1.0)
        loss.backward()
        session.end_backward()
        optimizer.step()
    session.remove()
    torch.testing.assert_close(student.weight, teacher.weight, rtol=0, atol=1e-3)
    assert session.steps == [300]


@pytest.mark.parametrize(
    ("ramp", "values"),
    [
        (Ramp(initial=0.2, final=1.0, begin=10, end=20), {0: 0.2, 10: 0.2, 15: 0.6, 20: 1, 99: 1}),
        (Ramp(initial=1.0, final=0.0, begin=0.5, end=1.0), {0.0: 1, 0.5: 1, 0.75: 0.5, 1.0: 0}),
        (Ramp(begin=0, end=4, shape="cosine"), {0: 0, 1: 0.1464466, 2: 0.5, 4: 1}),
    ],
)
def test_ramps(ramp, values):
    for position, value in values.items():
        assert ramp(position) == pytest.approx(value)


def test_an_average_moves_by_one_minus_its_decay():
    student = nn.BatchNorm1d(2)
    teacher = EMATeacher(0.75).start(student)
    with torch.no_grad():
        student.weight.fill_(5.0)
        student.running_mean.fill_(3.0)
    EMATeacher(0.75).on_step([(student, teacher)])
    assert teacher.weight.tolist() == [2.0, 2.0]
    assert teacher.running_mean.tolist() == [3.0, 3.0]
