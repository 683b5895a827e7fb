"""Tensors of a checkpoint, read whole or in part."""

import pytest
import torch

from unified_lm.checkpoint.tensor_shards import ShardReader, shard_name, write_shard


@pytest.mark.parametrize("shape", [(7,), (5, 3), (4, 3, 2)], ids=str)
def test_a_part_of_a_tensor_is_that_of_the_flattened_whole(tmp_path, shape):
    value = torch.randn(shape)
    write_shard([("w", value)], tmp_path)
    with ShardReader(tmp_path, {shard_name(0, 1): ["w"]}) as read:
        assert read.shape("w") == shape
        for start, stop in ((0, value.numel()), (0, 1), (2, 6), (value.numel() - 1, value.numel())):
            assert torch.equal(read.part("w", start, stop), value.reshape(-1)[start:stop])
