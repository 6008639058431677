from __future__ import annotations

import pytest
import torch

from rankadaptor_optuna.pruning.selection import Costs, chunk_sizes, select_kept


def select(heads, channels, ratio, *, head=100, channel=10, total=1000, multiple_of=1):
    return select_kept(
        {layer: torch.tensor(values) for layer, values in enumerate(heads)},
        {layer: torch.tensor(values) for layer, values in enumerate(channels)},
        ratio=ratio,
        costs=Costs(head=head, channel=channel, total=total),
        multiple_of=multiple_of,
    )


def test_the_least_important_units_of_all_layers_go_first():
    # 2 layers x (2 heads + 10 channels); half of 600 parameters is 2 heads and 10 channels
    heads, channels = select(
        [[1.0, 9.0], [8.0, 2.0]],
        [[1.0] * 9 + [50.0], [20.0, 30.0, 2.0, *[40.0] * 7]],
        ratio=0.5,
        total=600,
    )
    assert heads == {0: [1], 1: [0]}
    assert channels == {0: [9], 1: [0, 1, 3, 4, 5, 6, 7, 8, 9]}


def test_each_layer_keeps_a_head_and_a_portion_of_channels_however_unimportant():
    heads, channels = select([[0.0, 0.1, 0.2], [5.0, 6.0, 7.0]], [[0.0] * 8, [1.0] * 8], ratio=0.48, multiple_of=4)
    assert heads == {0: [2], 1: [2]}
    assert [len(kept) for kept in channels.values()] == [4, 4]


def test_channels_make_up_what_heads_are_too_coarse_for():
    for percent in range(1, 40):
        heads, channels = select([[1.0, 2.0]] * 4, [[1.0] * 40] * 4, ratio=percent / 100, total=2400)
        removed = 100 * (8 - sum(map(len, heads.values()))) + 10 * (160 - sum(map(len, channels.values())))
        assert removed == pytest.approx(percent * 24, abs=5)


def test_heads_make_up_what_channels_cannot():
    heads, channels = select([[1.0] * 4] * 2, [[1.0] * 4] * 2, ratio=0.5, total=1000, multiple_of=4)
    assert [len(kept) for kept in channels.values()] == [4, 4]
    assert sum(map(len, heads.values())) == 3


def test_a_ratio_out_of_reach_names_the_largest_which_is_then_met():
    shape = ([[1.0, 2.0]] * 3, [[1.0] * 8] * 3)
    with pytest.raises(ValueError, match=r"3 prunable layers.*largest possible ratio is 0\.42;"):
        select(*shape, ratio=0.43, multiple_of=4)
    heads, channels = select(*shape, ratio=0.42, multiple_of=4)
    assert [len(kept) for kept in heads.values()] == [1, 1, 1]
    assert [len(kept) for kept in channels.values()] == [4, 4, 4]


def test_local_ranking_takes_the_same_share_of_each_layer_to_within_a_unit():
    heads, channels = select_kept(
        {layer: torch.rand(4) * 10**layer for layer in range(3)},
        {layer: torch.rand(64) * 10**layer for layer in range(3)},
        ratio=0.3,
        costs=Costs(head=100, channel=10, total=3120),
        multiple_of=8,
        local=True,
    )
    assert {len(kept) for kept in heads.values()} <= {2, 3}
    assert {len(kept) for kept in channels.values()} <= {40, 48}
    removed = 100 * (12 - sum(map(len, heads.values()))) + 10 * (192 - sum(map(len, channels.values())))
    assert removed == pytest.approx(0.3 * 3120, abs=40)


@pytest.mark.parametrize(
    ("channels", "multiple_of", "widths"),
    [
        (64, 16, [64, 48, 32, 16]),
        (70, 32, [70, 64, 32]),
        (32, 32, [32]),
        (16, 32, [16, 8]),
        (7, 32, [7, 6, 5, 4, 3, 2, 1]),
        (1, 32, [1]),
    ],
)
def test_widths_stay_multiples(channels, multiple_of, widths):
    left = [channels]
    for size in chunk_sizes(channels, multiple_of):
        left.append(left[-1] - size)
    assert left == widths
