"""Temporary."""
from __future__ import annotations

import torch


def grouped_training(query, far_query, key, far_key, value, positions, groups, segments, bias, leading, neighbours, scale):  # type: ignore
    shared = query.shape[1] // key.shape[1]
    key, far_key, value = (x.repeat_interleave(shared, 1) for x in (key, far_key, value))
    distance = positions[:, None, :, None] - positions[:, None, None, :]
    is_far = (distance >= neighbours) & (groups > 1)[:, None, None, None]
    scores = torch.where(is_far, far_query @ far_key.transpose(-1, -2), query @ key.transpose(-1, -2)) * scale
    same = segments[:, :, None] == segments[:, None, :]
    same = same | (torch.arange(same.shape[-1], device=same.device) < leading)
    scores = scores - (bias[:, :, None] * same)[:, None]
    return scores.masked_fill(distance < 0, float("-inf")).softmax(-1).to(value.dtype) @ value
