"""The peers' update rules, against what their papers say of them."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

HOME = Path(__file__).parents[2] / "experiments" / "benchmarks" / "shared"


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("federated_peers", HOME / "federated_peers.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["federated_peers"] = module
    spec.loader.exec_module(module)
    return module


def delta():
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(40, 50, generator=generator),
        "b": torch.randn(50, generator=generator),
    }


def generator():
    return torch.Generator().manual_seed(1)


def test_fp16_is_half_of_fp32(peers):
    _, full, _ = peers.FP32(delta(), {}, generator())
    decoded, half, _ = peers.FP16(delta(), {}, generator())
    assert (full, half) == (4 * 2050, 2 * 2050)
    torch.testing.assert_close(decoded, delta(), atol=2e-3, rtol=1e-3)


def test_qsgd_is_unbiased_and_lies_on_its_levels(peers):
    rule, draws = peers.qsgd(4), generator()
    found = [rule(delta(), {}, draws)[0]["w"] for _ in range(400)]
    step = delta()["w"].norm() / 7
    levels = (found[0] / step).round()
    torch.testing.assert_close(found[0], levels * step)
    error = (torch.stack(found).mean(0) - delta()["w"]).abs().mean()
    assert error < 0.1 * step


def test_stc_is_ternary_with_the_mean_size_of_the_largest(peers):
    decoded, _, left = peers.stc(0.1)(delta(), {}, generator())
    flat = torch.cat([one.flatten() for one in delta().values()])
    top = flat.abs().sort(descending=True).values[:205]
    kept = torch.cat([one.flatten() for one in decoded.values()])
    assert int(kept.count_nonzero()) == 205
    assert kept.abs().max() == pytest.approx(float(top.mean()), rel=1e-5)
    torch.testing.assert_close(decoded["w"] + left["w"], delta()["w"])


def test_top_k_keeps_its_values_and_what_is_left(peers):
    decoded, size, left = peers.top_k(0.1)(delta(), {"w": torch.ones(40, 50)}, generator())
    whole = delta()["w"] + 1
    kept = decoded["w"] != 0
    assert decoded["w"][kept].equal(whole[kept])
    torch.testing.assert_close(decoded["w"] + left["w"], whole)
    assert size < 0.2 * 4 * 2050


def test_the_table_of_scale_counts_the_coding_of_every_client():
    from show_federated_scale import table

    one = {"seconds": 20.0, "codec_seconds": 1.0, "client_codec_seconds": 0.1}
    rounds = [{**one, "memory": {"server": size, "all": 2 * size}} for size in (500, 510, 520, 530)]
    rounds[0]["seconds"] = 90.0
    row = {"clients": 1000, "kept_bytes": 4e6, "machine": "this", "rounds": rounds}
    cells = [cell.strip() for cell in table([row]).splitlines()[-1].strip("|").split("|")]
    assert cells == ["1,000", "90", "20", "10%", "500", "520", "1,040", "4"]


def test_memory_is_of_one_group_of_processes_alone():
    from bench_federated_scale import memory, memory_of

    group = os.getpgrp()
    assert memory_of(os.getpid(), group) > 10  # MiB, with PyTorch in it
    assert memory_of(os.getpid(), group + 1) == 0 == memory_of(1 << 30, group)
    assert memory(group)["all"] >= round(memory_of(os.getpid(), group)) * 0.9
