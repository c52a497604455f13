"""UPerNet: the arithmetic, rates and checkpoints of mmsegmentation's own models."""

from pathlib import Path

import pytest
import torch

from engine.checkpoint import read_torch_file
from engine.vit import VIT_SIZES, VitSize
from segmenter.config import OptimisationConfig, recipe_values
from segmenter.dataset import quiet_imports
from segmenter.encoder import Encoder, EncoderShape, depths_of
from segmenter.evaluate import window_logits
from segmenter.finetune import make_optimizer
from segmenter.loading import load_segmenter, our_name
from segmenter.model import Segmenter, SegmenterShape, segmentation_loss
from tests.segmenter.boxes import CLASSES

with quiet_imports():
    import mmseg.datasets
    import mmseg.models  # noqa: F401
    from mmengine.config import ConfigDict
    from mmengine.logging import MMLogger
    from mmengine.runner import Runner
    from mmengine.structures import PixelData
    from mmseg.engine.optimizers import LearningRateDecayOptimizerConstructor
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

DEPTH, WIDTH, HEADS, PATCH, GRID, SIDE = 4, 8, 2, 8, 4, 32
NANO = VitSize(width=WIDTH, depth=DEPTH, heads=HEADS, patch_size=PATCH)


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    monkeypatch.setitem(VIT_SIZES, "nano", NANO)


def theirs(num_classes=3):
    """mmsegmentation's MAE with UPerNet, after its config for ViT-B, no two weights alike."""
    norm = {"type": "BN", "requires_grad": True}
    head = {
        "num_classes": num_classes, "norm_cfg": norm, "align_corners": False, "dropout_ratio": 0.0,
    }  # fmt: skip
    config = {
        "type": "EncoderDecoder",
        "backbone": {
            "type": "MAE", "img_size": (SIDE, SIDE), "patch_size": PATCH, "embed_dims": WIDTH,
            "num_layers": DEPTH, "num_heads": HEADS, "mlp_ratio": 4, "init_values": 1.0,
            "out_indices": depths_of(DEPTH), "norm_cfg": {"type": "LN", "eps": 1e-6},
        },
        "neck": {
            "type": "Feature2Pyramid", "embed_dim": WIDTH, "rescales": [4, 2, 1, 0.5],
            "norm_cfg": norm,
        },
        "decode_head": {
            "type": "UPerHead", "in_channels": [WIDTH] * 4, "in_index": [0, 1, 2, 3],
            "pool_scales": (1, 2, 3, 6), "channels": WIDTH, **head,
        },
        "auxiliary_head": {
            "type": "FCNHead", "in_channels": WIDTH, "in_index": 2, "channels": 256,
            "num_convs": 1, "concat_input": False,
            "loss_decode": {"type": "CrossEntropyLoss", "loss_weight": 0.4}, **head,
        },
        "test_cfg": ConfigDict(
            mode="slide", crop_size=(SIDE, SIDE), stride=(SIDE * 341 // 512,) * 2
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    with quiet_imports():
        model = MODELS.build(config)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point():
            spread = torch.randn_like(value) * 0.1
            value.data.add_(spread.abs() if "running_var" in name else spread)
    return model


def store(model, path, **meta):
    torch.save({"meta": meta, "state_dict": model.state_dict()}, path)
    return path


@pytest.fixture
def both(tmp_path):
    model = theirs()
    path = store(model, tmp_path / "theirs.pth", dataset_meta={"classes": tuple(CLASSES)})
    return model, load_segmenter(path)


def shape_of_nano(decoder="upernet", num_classes=3, grid=GRID):
    return SegmenterShape(
        encoder=EncoderShape(model="nano", patch_size=PATCH, in_channels=3, grid=grid),
        decoder=decoder, decoder_layers=1, num_classes=num_classes, normalization="imagenet",
    )  # fmt: skip


def test_the_four_depths_are_those_of_mmsegmentations_configs():
    assert depths_of(12) == [3, 5, 7, 11]
    assert depths_of(24) == [7, 11, 15, 23]
    assert depths_of(2) == [0, 0, 0, 1]


def test_logits_equal_those_of_mmsegmentation_from_its_own_checkpoint(both):
    model, loaded = both
    pixels = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = model.eval()(pixels, mode="tensor")
        actual = loaded.model.patch_logits(pixels)
    assert actual.shape == expected.shape == (2, 3, 4 * GRID, 4 * GRID)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_windows_over_an_image_equal_those_of_mmsegmentation(both):
    model, loaded = both
    assert loaded.protocol.window_size == loaded.protocol.image_size == SIDE
    assert loaded.protocol.window_stride == SIDE * 341 // 512
    image = torch.randint(0, 256, (3, SIDE, 50), dtype=torch.uint8)
    metas = [{"ori_shape": image.shape[1:], "img_shape": image.shape[1:]}]
    with torch.no_grad():
        expected = model.eval().inference(loaded.model.normalise(image)[None], metas)[0]
        actual = window_logits(loaded.model, [image], loaded.protocol)[0]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_loss_and_gradients_equal_those_of_mmsegmentation(both):
    """Every parameter has a gradient, so none is left over for several processes to wait for."""
    model, loaded = both
    ours = loaded.model.train()
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    labels = torch.randint(0, 3, (2, SIDE, SIDE))
    samples = [SegDataSample(gt_sem_seg=PixelData(data=one[None])) for one in labels]
    losses = model.train().loss(ours.normalise(images), samples)
    assert set(losses) >= {"decode.loss_ce", "aux.loss_ce"}
    expected = losses["decode.loss_ce"] + losses["aux.loss_ce"]
    actual = segmentation_loss(ours(images), labels, 255) / labels.numel()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    actual.backward()
    gradients = {our_name(name): p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=0, msg=name)
    statistics = {our_name(name): value for name, value in model.named_buffers()}
    for name, value in ours.named_buffers():
        if "running" in name:
            torch.testing.assert_close(value, statistics[name], atol=1e-5, rtol=0, msg=name)


def test_the_auxiliary_head_trains_only_and_pixels_without_a_label_count_in_neither():
    model = Segmenter(shape_of_nano())
    images = torch.randint(0, 256, (2, 3, 14, 15), dtype=torch.uint8)  # no multiple of a patch
    main, auxiliary = model(images)
    assert main.shape == auxiliary.shape == (2, 3, 14, 15)
    assert model.eval()(images).shape == (2, 3, 14, 15)
    labels = torch.zeros(2, 14, 15, dtype=torch.uint8)
    labels[:, 7:] = 9
    parts = [segmentation_loss(one[..., :7, :], labels[:, :7], 9) for one in (main, auxiliary)]
    loss = segmentation_loss((main, auxiliary), labels, 9)
    torch.testing.assert_close(loss, parts[0] + 0.4 * parts[1])


def test_rates_and_decay_equal_those_of_mmsegmentations_constructor():
    model = theirs()
    constructor = LearningRateDecayOptimizerConstructor(
        {"optimizer": {"type": "AdamW", "lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.05}},
        {"num_layers": DEPTH, "decay_rate": 0.65, "decay_type": "layer_wise"},
    )
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel("ERROR")  # it prints every parameter
    wrapped = constructor(model).optimizer
    logger.setLevel(level)
    names = {parameter: our_name(name) for name, parameter in model.named_parameters()}
    expected = rates(wrapped, names)
    recipe = recipe_values("upernet")
    ours = Segmenter(shape_of_nano())
    config = OptimisationConfig(
        **{n: recipe[n] for n in OptimisationConfig.__dataclass_fields__ if n in recipe}
    )
    optimizer = make_optimizer(ours, config)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * group["lr_scale"]
    assert rates(optimizer, {p: name for name, p in ours.named_parameters()}) == expected
    assert optimizer.param_groups[0]["betas"] == wrapped.param_groups[0]["betas"]
    assert expected["encoder.pos_embed"] == (pytest.approx(1e-4 * 0.65 ** (DEPTH + 1)), 0.05)


def rates(optimizer, names):
    return {
        names[parameter]: (pytest.approx(group["lr"]), group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_the_recipe_is_the_published_protocol():
    """mmsegmentation's mae-base_upernet_8xb2-amp-160k_ade20k-512x512."""
    recipe = recipe_values("upernet")
    config = OptimisationConfig(
        **{n: recipe[n] for n in OptimisationConfig.__dataclass_fields__ if n in recipe}
    )
    steps = 20210 // config.batch_size
    updates = config.epochs * steps
    assert abs(updates - 160_000) < steps
    assert config.warmup_fraction * updates == pytest.approx(1500, abs=1)
    for update in (1500, 40_000, 120_000):  # poly of power 1 from 1e-4 to 0
        expected = 1e-4 * (1 - (update - 1500) / (updates - 1500))
        assert config.rate_at(update / updates) == pytest.approx(expected, rel=1e-3)
    assert config.rate_at(750 / updates) == pytest.approx(5e-5, rel=1e-3)
    assert config.rate_at(1.0) == 0
    assert (recipe["drop_path"], recipe["window_size"], recipe["window_stride"]) == (0.1, 512, 341)


def test_pretrained_weights_give_the_same_features_before_training(tmp_path):
    """Relative positions and scales start without effect; the final norm stays behind."""
    from engine.weights import read_vit_weights
    from segmenter.encoder import start_encoder

    shape = shape_of_nano().encoder
    plain = Encoder(shape).eval()
    torch.save({"model": plain.state_dict()}, tmp_path / "mae.pth")
    pyramid = Encoder(shape, pyramid=True).eval()
    weights = read_vit_weights(tmp_path / "mae.pth")
    assert start_encoder(pyramid, weights) == []
    pixels = torch.randn(2, 3, 48, 24)  # of another grid, too
    with torch.no_grad():
        last = pyramid(pixels)[-1].flatten(2).transpose(1, 2)
        torch.testing.assert_close(plain.norm(last), plain(pixels))


NAMES, COLOURS = ("ground", "tree", "lake"), [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


class Scenes(torch.utils.data.Dataset):
    """What mmengine's runner asks of a dataset."""

    @property
    def metainfo(self):
        return {"classes": NAMES, "palette": COLOURS}

    def __len__(self):
        return 2

    def __getitem__(self, index):
        labels = torch.randint(0, 3, (1, SIDE, SIDE))
        return {
            "inputs": torch.randn(3, SIDE, SIDE),
            "data_samples": SegDataSample(gt_sem_seg=PixelData(data=labels)),
        }


def together(samples):
    return {
        "inputs": torch.stack([sample["inputs"] for sample in samples]),
        "data_samples": [sample["data_samples"] for sample in samples],
    }


def test_what_mmengines_runner_saved_is_scored(tmp_path):
    """With message hub and optimizer, as it saves during training."""
    model = theirs()
    runner = Runner(
        model, str(tmp_path / "work"), log_level="ERROR", default_scope="mmseg",
        train_dataloader=torch.utils.data.DataLoader(Scenes(), 2, collate_fn=together),
        train_cfg={"by_epoch": False, "max_iters": 2},
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 1e-4}},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 2, "by_epoch": False}},
    )  # fmt: skip
    runner.train()
    path = tmp_path / "work" / "iter_2.pth"
    with pytest.raises(ValueError, match="more than tensors"):
        read_torch_file(path)
    loaded = load_segmenter(path)
    assert loaded.classes.names == NAMES
    assert loaded.classes.palette.tolist() == COLOURS
    pixels = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = model.eval()(pixels, mode="tensor")
        torch.testing.assert_close(loaded.model.patch_logits(pixels), expected, atol=1e-5, rtol=1e-5)


def test_relative_positions_of_another_grid_are_resampled(both):
    """A table that says one thing for all distances says it at every size."""
    encoder = both[1].model.encoder
    with torch.no_grad():
        for block in encoder.blocks:
            block.attn.relative_position_bias_table.fill_(0.7)
        pixels = torch.randn(1, 3, 48, 24)
        with_bias = encoder(pixels)
        for block in encoder.blocks:
            block.attn.relative_position_bias_table.zero_()
        for one, other in zip(with_bias, encoder(pixels), strict=True):
            torch.testing.assert_close(one, other)  # softmax does not see a constant


def test_released_checkpoints_without_names_are_known_by_the_number_of_classes(tmp_path):
    loaded = load_segmenter(store(theirs(150), tmp_path / "ade20k.pth"))
    assert len(loaded.classes.names) == 150
    assert loaded.classes.names[0] == "wall"
    assert loaded.reduce_zero_label
    old = store(theirs(2), tmp_path / "old.pth", CLASSES=("a", "b"))  # before mmsegmentation 1.0
    assert load_segmenter(old).classes.names == ("a", "b")


def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path):
    weights = theirs().state_dict()
    path = tmp_path / "file.pth"
    beit = {name: weight for name, weight in weights.items() if name != "backbone.pos_embed"}
    small = {**weights, "decode_head.bottleneck.conv.weight": torch.zeros(1, 40, 3, 3)}
    broken = {**weights, "neck.upsample_2x.0.bias": torch.full((WIDTH,), torch.nan)}
    for state, meta, problem in (
        (weights, {}, "it has 3 classes, but not their names in its meta"),
        (weights, [1], "'list' object has no attribute 'get'"),
        (beit, {"CLASSES": NAMES}, "it has no pos_embed"),
        (small, {"CLASSES": NAMES}, r"bottleneck\.conv\.weight is \(1, 40, 3, 3\) instead"),
        (broken, {"CLASSES": NAMES}, "neck.upsample_2x.0.bias is not finite"),
    ):
        torch.save({"state_dict": state, "meta": meta}, path)
        with pytest.raises(ValueError, match=problem) as raised:
            load_segmenter(path)
        assert str(raised.value).startswith(str(path))
        assert "\n" not in str(raised.value)


class Touch:
    """Pickled as a call that would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return leave_file, (self.path,)


def leave_file(path):
    Path(path).touch()


def test_nothing_of_a_checkpoint_runs(tmp_path):
    left = tmp_path / "left"
    path = store(theirs(), tmp_path / "evil.pth", CLASSES=NAMES, hook=Touch(str(left)))
    load_segmenter(path)
    torch.save({"model": Touch(str(left))}, path)
    with pytest.raises(ValueError, match="more than tensors"):
        load_segmenter(path)
    assert not left.exists()
