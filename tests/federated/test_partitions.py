"""Every row belongs to one client, and the parts are as unlike as asked."""

import pytest
import torch

from lightning_compress.federated.partitions import partition_rows

LABELS = torch.arange(1000) % 10


@pytest.mark.parametrize("how", ["iid", "dirichlet(0.1)", "dirichlet(100)", "by_label"])
@pytest.mark.parametrize("clients", [1, 3, 10, 100])
def test_each_row_has_one_owner_and_no_client_is_empty(how, clients):
    parts = partition_rows(LABELS, clients, how, seed=3)
    assert len(parts) == clients
    assert min(map(len, parts)) > 0
    assert torch.cat(parts).sort().values.equal(torch.arange(1000))
    again = partition_rows(LABELS, clients, how, seed=3)
    assert all(one.equal(other) for one, other in zip(parts, again, strict=True))


def skew(how):
    """Mean share of a client's commonest class: 0.1 where classes are even, 1 for one alone."""
    parts = partition_rows(LABELS, 10, how)
    shares = [torch.bincount(LABELS[part], minlength=10) / len(part) for part in parts]
    return torch.stack(shares).max(1).values.mean().item()


def test_they_are_as_unlike_as_asked():
    assert skew("iid") < 0.25
    assert skew("dirichlet(100)") < 0.25
    assert skew("dirichlet(0.1)") > 0.5
    assert skew("by_label") == 1.0


@pytest.mark.parametrize(
    ("clients", "how", "message"),
    [
        (0, "iid", "clients=0"),
        (2000, "iid", "clients=2000.*1000"),
        (3, "random", "partition='random'.*dirichlet"),
        (3, "dirichlet(0)", r"dirichlet\(0\).*above 0"),
        (3, "dirichlet(1e)", "above 0"),
    ],
)
def test_bad_arguments_are_named(clients, how, message):
    with pytest.raises(ValueError, match=message):
        partition_rows(LABELS, clients, how)
