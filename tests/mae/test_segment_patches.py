"""Whole segments are removed, and nothing else differs from `patches`."""

import numpy as np
import pytest
import torch

from mae.config import MethodConfig, ModelConfig, make_method
from mae.masking import remove_segments

MODEL = ModelConfig(model="vit_tiny", image_size=224, patch_size=16)


def make(name, **options):
    return make_method(MethodConfig(mask_method=name, **options), MODEL)


def random_segments(rng, number=12):
    """[M, 196] bool: boxes of patches that overlap."""
    segments = np.zeros((number, 14, 14), bool)
    for patches in segments:
        top, left, height, width = rng.integers((0, 0, 1, 1), (12, 12, 9, 9))
        patches[top : top + height, left : left + width] = True
    return segments.reshape(number, 196)


def as_stack(segments, side):
    """The same, as the method gets them."""
    points = side // 14
    return np.kron(segments.reshape(-1, 14, 14), np.ones((1, points, points))).astype(np.uint8)


def removed_by_definition(noise, segments, count):
    """Sets of patches: segments in order while they fit, then the largest noise."""
    removed = set()
    for patches in segments:
        fresh = set(np.flatnonzero(patches)) - removed
        if len(removed) + len(fresh) <= count:
            removed |= fresh
    rest = sorted(set(range(len(noise))) - removed, key=lambda patch: -noise[patch])
    return removed | set(rest[: count - len(removed)])


def largest(pattern, count):
    return set(np.argsort(pattern, kind="stable")[len(pattern) - count :])


@pytest.mark.parametrize("count", [0, 1, 49, 147, 196])
def test_whole_segments_go_first_and_single_patches_make_up_the_number(count):
    rng = np.random.default_rng(count)
    for _ in range(50):
        noise, segments = rng.random(196, dtype=np.float32), random_segments(rng)
        pattern = remove_segments(noise, segments, count)
        assert pattern.dtype == np.float32
        assert largest(pattern, count) == removed_by_definition(noise, segments, count)


def test_single_patches_in_the_order_of_the_noise_are_what_patches_removes():
    rng = np.random.default_rng(0)
    for _ in range(50):
        noise = rng.random(196, dtype=np.float32)
        singles = np.eye(196, dtype=bool)[np.argsort(-noise, kind="stable")]
        assert largest(remove_segments(noise, singles, 147), 147) == largest(noise, 147)


def test_without_a_segment_that_owns_a_patch_it_is_patches():
    method, patches = make("segment_patches"), make("patches")
    nothing = np.zeros((3, method.segment_side, method.segment_side), np.uint8)
    pattern = method.pattern(np.random.default_rng(5), nothing)
    assert np.array_equal(pattern, patches.pattern(np.random.default_rng(5), None))


@pytest.mark.parametrize(("mask_ratio", "kept"), [(0.75, 49), (0.9, 19), (0.6, 78)])
def test_the_number_of_kept_patches_is_rounded_down_as_mae_does(mask_ratio, kept):
    """Of 196 patches 49, 19.6 and 78.4 would be kept."""
    assert make("patches", mask_ratio=mask_ratio).num_kept == kept


@pytest.mark.parametrize("mask_ratio", [0.5, 0.75, 0.9])
def test_exactly_as_many_tokens_are_encoded_as_by_patches(mask_ratio):
    method, patches = (make(n, mask_ratio=mask_ratio) for n in ("segment_patches", "patches"))
    rng = np.random.default_rng(0)
    stacks = [as_stack(random_segments(rng, m), method.segment_side) for m in (1, 4, 40)]
    pattern = torch.from_numpy(np.stack([method.pattern(rng, stack) for stack in stacks]))
    view = method.view(torch.zeros(3, 3, 224, 224), pattern)
    assert view.ids_keep.shape == (3, patches.num_kept)
    assert view.hidden.sum(dim=(1, 2)).tolist() == [196 - patches.num_kept] * 3
    assert method.hidden_pixels(pattern[0].numpy()) == (1 - method.visible_map(pattern)[0]).sum()


def test_segments_that_fit_are_hidden_completely_and_the_order_is_random():
    method, rng = make("segment_patches"), np.random.default_rng(0)
    halves = np.zeros((2, 196), bool)
    halves[0, :98] = halves[1, 98:] = True  # only one of them fits into 147
    hidden_first = []
    for _ in range(40):
        pattern = method.pattern(rng, as_stack(halves, method.segment_side))
        removed = largest(pattern, 147)
        whole = [set(np.flatnonzero(half)) <= removed for half in halves]
        assert sum(whole) == 1
        hidden_first.append(whole[0])
    assert 10 < sum(hidden_first) < 30


@pytest.mark.parametrize(("inside", "belongs"), [(10, False), (12, False), (13, True), (15, True)])
def test_a_patch_belongs_to_a_segment_with_more_than_half_of_its_points(inside, belongs):
    method = make("segment_patches", mask_ratio=1 / 196)
    stack = np.zeros((1, method.segment_side, method.segment_side), np.uint8)
    assert method.POINTS == 5
    for point in range(inside):
        stack[0, 5 * 5 + point // 5, 5 * 5 + point % 5] = 1
    patch, rng = 5 * 14 + 5, np.random.default_rng(1)
    for _ in range(20):
        pattern = method.pattern(rng, stack)
        assert (pattern[patch] >= 1) == belongs
        assert (np.delete(pattern, patch) < 1).all()
