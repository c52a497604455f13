"""Against what NVIDIA's tables say, card by card."""

import pytest

from common.environment import least_driver, peak_flops


@pytest.mark.parametrize(
    ("name", "fp16", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 989, 495),
        ("NVIDIA H100 PCIe", 756, 756, 378),
        ("NVIDIA H100 NVL", 835, 835, 418),
        ("NVIDIA H200", 989, 989, 495),
        ("NVIDIA H800", 989, 989, 495),
        ("NVIDIA H20", 148, 148, 74),
        ("NVIDIA B200", 2250, 2250, 1125),
        ("NVIDIA A100-SXM4-40GB", 312, 312, 156),
        ("A100-SXM4-80GB", 312, 312, 156),  # as older drivers name it
        ("NVIDIA A100 80GB PCIe", 312, 312, 156),
        ("NVIDIA A100-PCIE-40GB", 312, 312, 156),
        ("NVIDIA A800-SXM4-80GB", 312, 312, 156),
        ("NVIDIA A10", 125, 125, 62.5),
        ("NVIDIA A10G", 70, 70, 35),
        ("NVIDIA A40", 149.7, 149.7, 74.8),
        ("NVIDIA RTX A6000", 154.8, 154.8, 77.4),
        ("NVIDIA L4", 121, 121, 60),
        ("NVIDIA L40", 181, 181, 90.5),
        ("NVIDIA L40S", 362, 362, 183),
        ("NVIDIA GeForce RTX 3090", 71, 71, 35.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 165.2, 82.6),
        ("NVIDIA GeForce RTX 5090", 209.5, 209.5, 104.8),
        ("Tesla V100-SXM2-32GB", 125, None, 15.7),
        ("Tesla V100-PCIE-16GB", 112, None, 14),
        ("Tesla T4", 65, None, 8.1),
        # Slices, and cards that only begin alike.
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None, None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None, None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None, None),
        ("NVIDIA A1000", None, None, None),
        ("cpu", None, None, None),
    ],
)
def test_a_cards_peak_is_that_of_its_data_sheet(name, fp16, bf16, fp32):
    expected = {"fp16": fp16, "bf16": bf16, "no": fp32, "fp32": fp32}
    for precision, tflops in expected.items():
        assert peak_flops(name, precision) == (None if tflops is None else tflops * 1e12)


@pytest.mark.parametrize(("cuda", "driver"), [("13.0", 580), ("12.6", 525), ("14.1", 0)])
def test_any_driver_of_a_major_version_will_do(cuda, driver):
    assert least_driver(cuda) == driver
