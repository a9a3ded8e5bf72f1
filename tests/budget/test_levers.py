"""Levers of callbacks, by kind and of their own."""

from types import SimpleNamespace

import pytest

from lightning_compress.budget.levers import KINDS, Limits, SparsityLever, Steerable, lever_of


def callback(steered_by, **more):
    return SimpleNamespace(
        name="own", state_key="Own[own]", steered_by=steered_by, snapshot=dict,
        roll_back_to=lambda _: None, paths=list, **more,
    )  # fmt: skip


def test_a_kind_makes_its_lever():
    lever = lever_of(callback("sparsity"), Limits(max_sparsity=0.5))
    assert isinstance(lever, SparsityLever)
    assert lever.most == 0.5


def test_a_callback_may_bring_a_lever_of_its_own():
    own = SimpleNamespace(name="own")
    assert lever_of(callback(lambda limits: (own, limits)[0]), Limits()) is own


def test_nothing_to_steer_is_no_lever():
    assert lever_of(callback(None), Limits()) is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_belongs_to_a_steerable(kind):
    assert isinstance(callback(kind), Steerable)
