"""A compressed run that begins with the dense run's weights: `start=dense`."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress.lab.models import VQVAE
from lightning_compress.lab.workflow.experiment import run_experiment
from lightning_compress.lab.workflow.training import take_weights
from tests.lab.workflow.test_every_config import composed


def model(**changes: Any):
    return VQVAE(image_size=16, channels=3, num_codes=16, **({"width": 16} | changes))


def test_every_child_that_fits_is_taken_and_others_are_named(caplog):
    dense, narrow = model(), model(width_multiplier=0.5, train_part="decoder")
    own = {name: value.clone() for name, value in narrow.decoder.state_dict().items()}
    with caplog.at_level(logging.INFO):
        take_weights(narrow, dense)
    assert "['decoder'] differ in size and keep weights of their own" in caplog.text
    for name, value in narrow.encoder.state_dict().items():
        assert torch.equal(value, dense.encoder.state_dict()[name])
    assert all(torch.equal(value, own[name]) for name, value in narrow.decoder.state_dict().items())
    take_weights(whole := model(train_part="decoder"), dense)
    assert all(torch.equal(value, dense.state_dict()[k]) for k, value in whole.state_dict().items())


def test_a_frozen_child_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\['encoder'\] .* differ in size .* frozen"):
        take_weights(model(width=8, width_multiplier=2.0, train_part="decoder"), model())


def test_models_with_nothing_in_common_are_refused():
    with pytest.raises(ValueError, match=r"no part fits the dense model's: \['0'\]"):
        take_weights(nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 4)))


@pytest.mark.parametrize(
    ("word", "message"), [("start=teacher", r"start='teacher': valid are \['seed', 'dense'\]")]
)
def test_another_start_is_refused_before_any_training(tmp_path, word, message):
    with pytest.raises(ValueError, match=message):
        run_experiment(composed(word), tmp_path / "run")
    assert not (tmp_path / "run" / "dense").exists()


def test_clients_that_train_together_begin_with_the_seed(tmp_path):
    def second(*_: object) -> Any:
        raise AssertionError("trained all the same")

    with pytest.raises(ValueError, match="start=dense: clients"):
        run_experiment(composed("start=dense"), tmp_path / "run", second=second)
