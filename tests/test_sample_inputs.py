import pytest
import torch

from lightning_compress.sample_inputs import as_inputs, take_rows


def test_rows_are_cut_or_repeated_in_turn_for_every_input():
    x, tokens = torch.randn(3, 2), torch.tensor([7, 8, 9])
    cut, long = take_rows((x, tokens), 1), take_rows((x, tokens), 5)
    assert torch.equal(cut[0], x[:1])
    assert long[1].tolist() == [7, 8, 9, 7, 8]
    assert torch.equal(long[0], torch.cat([x, x[:2]]))


@pytest.mark.parametrize(
    "inputs",
    [(), (torch.tensor(1.0),), (torch.zeros(2, 1), torch.zeros(3, 1)), torch.zeros(0, 4)],
    ids=["none", "scalar", "mixed", "empty"],
)
def test_inputs_without_one_common_batch_are_refused(inputs):
    with pytest.raises(ValueError, match=r"inputs need"):
        as_inputs(inputs)
