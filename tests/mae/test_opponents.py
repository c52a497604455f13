"""Methods that know nothing of the image, at the cost of `patches`."""

import numpy as np
import pytest
import torch

from mae.config import MethodConfig, ModelConfig, make_method


def make(name, side=14, **options):
    model = ModelConfig(image_size=16 * side)
    return make_method(MethodConfig(mask_method=name, **options), model)


def removed(method, seed):
    """[side, side] bool, by what the encoder gets."""
    pattern = method.pattern(np.random.default_rng(seed), None)
    view = method.view(torch.zeros(1, 3, method.image_size, method.image_size), torch.tensor(pattern[None]))
    there = np.ones(method.num_patches, bool)
    there[view.ids_keep[0].numpy()] = False
    assert np.array_equal(there, view.hidden[0, :, 0].numpy() == 1)
    side = method.image_size // method.patch_size
    return there.reshape(side, side)


@pytest.mark.parametrize("name", ["block_patches", "green_patches"])
@pytest.mark.parametrize("side", [1, 2, 5, 14])
@pytest.mark.parametrize("ratio", [0, 0.1, 0.5, 0.75, 0.99])
def test_as_many_patches_are_removed_as_by_patches(name, side, ratio):
    method, patches = make(name, side, mask_ratio=ratio), make("patches", side, mask_ratio=ratio)
    assert method.num_kept == patches.num_kept
    for seed in range(20):
        assert np.count_nonzero(removed(method, seed)) == np.count_nonzero(removed(patches, seed))
    same = [method.pattern(np.random.default_rng(3), None) for _ in range(2)]
    assert np.array_equal(*same) and same[0].dtype == np.float32


def largest_block(mask):
    """Patches of the largest rectangle that is removed, by looking at all."""
    sums = np.pad(mask.astype(int).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    side, best = len(mask), 0
    for top in range(side):
        for left in range(side):
            for bottom in range(top + 1, side + 1):
                for right in range(left + 1, side + 1):
                    area = (bottom - top) * (right - left)
                    count = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
                    best = max(best, area if count == area else 0)
    return best


def test_blocks_are_blocks_of_beits_sizes_and_lie_everywhere():
    method = make("block_patches", mask_ratio=0.4)  # BEiT's
    masks = [removed(method, seed) for seed in range(300)]
    largest = [largest_block(mask) for mask in masks[:40]]
    # At least 16 patches are asked for; sides are whole patches, so that some of them are lost.
    assert min(largest) >= 12
    assert max(largest) > 50
    rows, columns = np.mean(masks, axis=(0, 2)), np.mean(masks, axis=(0, 1))
    assert rows == pytest.approx(rows[::-1], abs=0.08) and columns == pytest.approx(rows, abs=0.08)
    assert rows[7] > rows[0] > 0.1  # a block is inside the image: its middle is covered more often


def test_blocks_are_as_high_as_wide_within_beits_bounds():
    method, found = make("block_patches", mask_ratio=0.4), []
    for seed in range(200):
        mask = removed(method, seed)
        if largest_block(mask) > 60:  # then it is most of the mask
            found.append(mask.any(1).sum() / mask.any(0).sum())
    assert min(found) < 0.75 and max(found) > 1.33
    assert np.exp(np.mean(np.log(found))) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("noise", ["red", "green", "blue", "purple"])
def test_noise_has_the_spectrum_of_its_colour(noise):
    """The transform of a Gaussian is one: exp(-2 (pi f sigma)^2), f in cycles per patch."""
    side = 64
    method = make("green_patches", side, noise=noise)
    patterns = [method.pattern(np.random.default_rng(seed), None).reshape(side, side) for seed in range(60)]
    window = np.outer(np.hanning(side), np.hanning(side))  # what is cut out of a field has edges
    power = np.mean([np.abs(np.fft.fft2(window * pattern)) ** 2 for pattern in patterns], axis=0)
    across = np.fft.fftfreq(side)
    frequency = np.hypot(across[:, None], across)
    weak, strong = (np.exp(-2 * (np.pi * frequency * sigma) ** 2) for sigma in (0.75, 1.5))
    response = {"red": weak, "blue": 1 - weak, "green": weak - strong, "purple": 1 - (weak - strong)}[noise]
    rings = [(frequency >= low) & (frequency < low + 0.05) for low in np.arange(0, 0.5, 0.05)]
    found, expected = ([field[ring].mean() for ring in rings] for field in (power, response**2))
    found, expected = found / np.sum(found), expected / np.sum(expected)
    # The kernels are sampled and cut at four deviations.
    assert found == pytest.approx(expected, abs=0.02)


def test_green_masks_have_most_of_their_power_in_a_band():
    method = make("green_patches")
    masks = np.array([removed(method, seed) for seed in range(300)], float)
    power = (np.abs(np.fft.fft2(masks - masks.mean(0))) ** 2).mean(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(14), np.fft.fftfreq(14)))
    low, band, high = (
        power[(frequency > a) & (frequency <= b)].mean() for a, b in ((0, 0.08), (0.1, 0.25), (0.4, 1))
    )
    assert band > 1.5 * low and band > 3 * high
