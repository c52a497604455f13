"""Whole command lines that cannot be meant."""

from pathlib import Path

import pytest

from tests.wrong.world import Case, benchmark_words, check, pretrain_words, train_words

BOMB = "".join(f"{b}: &{b} [{','.join([f'*{a}' if a else 'x'] * 9)}]\n"
               for a, b in zip(["", *"abcdefgh"], "abcdefghi", strict=True))  # fmt: skip


def plugin(text):
    return lambda world: (world / "nano.py").write_text(text)


def yaml_file(text):
    return lambda world: (world / "own.yml").write_text(text)


def plan_of(text):
    def prepare(world):
        (world / "new").mkdir()
        (world / "new/preregistration.yml").write_text(text)

    return prepare


BARE = [
    Case("pretrain with nothing", "mae pretrain", "--in1k-dir is missing"),
    Case("train with nothing", "segmenter train", "is missing"),
    Case("a run with nothing", "benchmark run", "--in1k-dir is missing"),
    Case("evaluate with nothing", "segmenter evaluate --dataset {w}/data/dataset.yml",
         "give either a CHECKPOINT or --predictions"),
    Case("evaluate with too much", "segmenter evaluate {w}/fine/best.pth --predictions {w} "
         "--dataset {w}/data/dataset.yml", "give either"),
    Case("probe nothing", "segmenter probe --dataset {w}/data/dataset.yml", "Missing argument"),
    Case("probe with an option of training", "segmenter probe random --lr 1", "No such option"),
    Case("probe of no image folder", ["segmenter", "probe", "random", "--plugin", "{w}/nano.py",
         "--model", "vit_speck", "--dataset", "{w}/data/dataset.yml", "--output-dir", "{w}/new",
         "--image-folder", "{w}/data/nosuch"], "nosuch is not a folder"),
    Case("probe of a photograph", "segmenter probe {w}/photos/photo_0.png --plugin {w}/nano.py "
         "--model vit_speck --dataset {w}/data/dataset.yml --output-dir {w}/new", "photo_0.png"),
    Case("probe of a finetuning", "segmenter probe {w}/fine/best.pth --plugin {w}/nano.py "
         "--model vit_speck --dataset {w}/data/dataset.yml --output-dir {w}/new", "best.pth"),
    Case("probe into the images", "segmenter probe random --plugin {w}/nano.py --model vit_speck "
         "--dataset {w}/data/dataset.yml --output-dir {w}/data/images/training/x", "which is read"),
    Case("predict nothing", "segmenter predict {w}/fine/best.pth --out {w}/o", "Missing argument"),
    Case("merge nothing", "segments merge --out {w}/o.sqlite", "Missing argument"),
    Case("an unknown command", "mae pretain", "No such command"),
    Case("an unknown option", "mae pretrain --epoch 3", "Did you mean|No such option"),
    Case("an option without its value", "mae pretrain --epochs", "requires an argument"),
    Case("a digest of nothing", "segmenter prepare ade20k {w}/x --digest abc", "give md5:"),
    Case("a model without a file", "mae fetch --model vit_tiny --out {w}/x.pth", "choose one of"),
    *[Case(f"an effect of {text}", f"benchmark power --effect={text}", says)
      for text, says in (("0", "above 0"), ("nan", "above 0"), ("-1", "above 0"), ("1e9", "at most 100"),
                         ("big", "not a valid float"))],
    Case("power without an effect", "benchmark power", "Missing option '--effect'"),
    Case("power of images", "benchmark power {w}/photos --effect 1", "not the output directory"),
    Case("power of a pretraining alone", "benchmark power {w}/pre --effect 1", "not the output directory"),
    Case("lines of no pilot", "benchmark power --effect 1 --primary a-b", "give its FOLDER, too"),
    *[Case(f"a plan of {text[:9]!r}", [*benchmark_words(Path("{w}")), "--dry-run"],
           ("preregistration.yml", says), prepare=plan_of(text))
      for text, says in (("", "is damaged"), ("written: now\ndigest: 0\n", "Field required"),
                         ("a: [\ndigest: 0\n", "is not YAML"), ("- 1\ndigest: 0\n", "is damaged"))],
    Case("a question about no line", ["benchmark", "freeze", *benchmark_words(Path("{w}"))[1:],
         "--primary", "patches-green_patches"], "give A-B, two different of scratch, four_channels"),
    Case("freeze without its question", "benchmark freeze --in1k-dir {w}/in1k", "Missing option '--primary'"),
    Case("a seed below 0", "benchmark sample {w}/s --seed -1", "-1 is not in the range"),
    *[Case(f"shard {text}", "segments generate felzenszwalb --images {w}/photos --out "
           f"{{w}}/o.sqlite --shard={text}", "write it as 0/4")
      for text in ("1/1", "a/b", "-1/2", "1", "0/0", "/", "1.5/2")],
    *[Case(f"export as {name}", f"mae export {{w}}/pre/checkpoint-1.pth --out {{w}}/{name}",
           "safetensors or .pth") for name in ("x", "x.txt", "x.pt")],
    Case("the status of nothing", "benchmark status {w}/nowhere", "not the output directory"),
    Case("the status of a file", "benchmark status {w}/nano.py", "not the output directory"),
    Case("the report of data", "benchmark report {w}/data", "not the output directory"),
    Case("the report of nothing", "benchmark report {w}/nowhere", "nowhere is not the output directory"),
    Case("inspect images", "segments inspect {w}/photos --out {w}/o", "no folder of segments"),
    Case("pack images", "segments pack {w}/photos", "no folder of segments"),
    Case("check without masks", "segments check {w}/data", "not a folder"),
    Case("merge what is no store", "segments merge {w}/nano.py --out {w}/o.sqlite",
         "not a packed store"),
    Case("merge one of many shards", "segments merge {w}/m-0-of-99999999999.sqlite --out {w}/o.sqlite",
         "of the 99999999999 shards 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 ... are missing"),
    Case("a recipe of 300 letters", "segmenter train --recipe {w}/" + "x" * 300 + ".yml", "name too long"),
    Case("prepare check of a picture", "segmenter prepare check {w}/photos/photo_0.png",
         "photo_0.png is no text"),
    Case("predictions that are missing", "segmenter evaluate --predictions {w}/photos --dataset "
         "{w}/data/dataset.yml", "100.png cannot be read"),
]  # fmt: skip
PRETRAIN = [
    ("a plugin that ends", [], "SystemExit", plugin("import sys; sys.exit(0)")),
    ("a plugin that fails", [], "ZeroDivisionError", plugin("1 / 0")),
    ("a plugin that cannot be read", [], "SyntaxError", plugin("def (")),
    ("a plugin of bytes", [], "nano.py", lambda w: (w / "nano.py").write_bytes(b"\xff\0")),
    ("a bomb of aliases", ["--config", "{w}/own.yml"], "instead of \\*alias", yaml_file(BOMB)),
    ("a deep file", ["--config", "{w}/own.yml"], "nested too deeply",
     yaml_file("a: " + "[" * 5000)),
    ("a key twice", ["--config", "{w}/own.yml"], "given twice", yaml_file("epochs: 1\nepochs: 2")),
    ("both spellings", ["--config", "{w}/own.yml"], "given twice",
     yaml_file("base-lr: 1\nbase_lr: 2")),
    ("a tab", ["--config", "{w}/own.yml"], "own.yml is not YAML", yaml_file("epochs:\t- 1\n\t2")),
    ("another program's file", ["--config", "{w}/data/dataset.yml"], "there is no", None),
    ("a method without segments", ["--masks-dir", "{w}/photos"], "no folder of segments", None),
    ("segments that are not packed", ["--masks-dir", "{w}/loose"], "segments pack", None),
    ("a tracker that is not there", ["--log-with", "wandb"], "pip install wandb", None),
    ("a device that is not there", ["--device", "cuda"], "has no GPU", None),
]  # fmt: skip
PLAN = [
    *[(f"--pretrain {text}", ["--pretrain", text], "--pretrain: there is no")
      for text in ("help=true", "check=true", "nosuch=1")],
    *[(f"--finetune {text}", ["--finetune", text], "--finetune: there is no")
      for text in ("base_lr=1",)],
    *[(f"--pretrain {text}", ["--pretrain", text], "would contradict the plan")
      for text in ("output_dir=/tmp/x", "seed=1")],
    *[(f"--pretrain {text}", ["--pretrain", text], "base-lr")
      for text in ("base_lr=nan", "base_lr=[1]")],
    *[(f"a budget of {text}", ["--budget", text], says) for text, says in (
        ("lots", "give flops=METHOD@EPOCHS, gpu-hours=N or epochs=N"),
        ("flops=patches", "give flops=METHOD@EPOCHS"), ("flops=patches@0", "give 1 to 100000 epochs"),
        ("flops=nothing@2", "choose a method of patches"), ("gpu-hours=0", "give hours above 0"),
        ("gpu-hours=-2", "give flops=METHOD@EPOCHS"), ("epochs=9999999", "give 1 to 100000 epochs"),
        ("flops=patches@1e3", "give flops=METHOD@EPOCHS"), ("epochs=٣", "give flops=METHOD@EPOCHS"))],
    ("a budget beside epochs", ["--budget", "epochs=3"], "--pretrain-epochs 2 contradicts --budget epochs=3"),
    ("segments in FLOPs", ["--budget", "flops=patches@2", "--count-segments"], "their FLOPs are not known"),
    ("hours of segments that are there", ["--budget", "gpu-hours=1", "--count-segments", "--pretrain-epochs",
     "50"], "nobody knows what the segments cost"),
    ("a last epoch of one's own", ["--pretrain", "last_epoch=0.5"], "contradict the plan; use --budget"),
    ("no processes", ["--num-processes", "0"], "--num-processes is '0'; it should be greater"),
    ("a stack without a file", ["--stack"], "vit_speck has no official checkpoint"),
    ("mae without a file", ["--eval", "mae"], "vit_speck has no official checkpoint"),
    ("a line without a file", ["--baselines", "mae"], "vit_speck has no official checkpoint"),
    ("a checkpoint that is not there", ["--stack", "--mae-checkpoint", "{w}/no.pth"],
     "is not a file"),
    ("a damaged official checkpoint", ["--stack", "--mae-checkpoint", "{w}/nano.py"], "nano.py"),
    ("no images", ["--in1k-dir", "/nowhere"], "/nowhere/train is not a folder"),
    ("no segments", ["--masks-dir", "/nowhere"], "/nowhere is no folder of segments"),
    ("no dataset", ["--eval-dataset", "/nowhere.yml"], "/nowhere.yml"),
    ("a ratio below 0", ["--coverage-ratio", "-3"], "greater than or equal to 0"),
    ("a patch that does not fit", ["--pretrain", "patch_size=5"], "multiple of the patch size 5"),
    ("a decoder that is not there", ["--finetune", "decoder=deep"], "decoder"),
    ("an unknown launcher", ["--launcher", "cloud"], "slurm"),
    ("a pretraining for no 3 processes", ["--num-processes", "3"],
     "cannot be split over 3 processes"),
    ("a finetuning for no 4", ["--num-processes", "4", "--finetune", "batch_size=2"],
     "cannot be spread over 4 processes"),
    ("an epoch of words", ["--eval", "last"], "last, which does not exist"),
    ("an epoch that was not", ["--eval", "7"], "which does not exist"),
    ("an unknown method", ["--mask-method", "segment"], "choose one of patches"),
    ("an unknown model", ["--model", "vit_giant"], "vit_giant"),
    ("an unknown recipe", ["--recipe", "slow"], "choose one of"),
    ("a ratio twice", ["--coverage-ratio", "15,15"], "names one twice"),
    ("two datasets", ["--ade20k-dir", "{w}/data"], "not both"),
    ("GPUs that are not there", ["--num-gpus", "3"], "--num-gpus 3"),
    ("a time of words", ["--launcher", "slurm", "--gpus-per-node", "0", "--time", "soon"],
     "give minutes or"),
    ("a cluster without its GPUs", ["--launcher", "slurm"], "--gpus-per-node"),
]  # fmt: skip


@pytest.mark.parametrize("case", BARE, ids=lambda case: case.name)
def test_a_command_that_cannot_be_meant(case, world, capsys):
    check(case, world, capsys)


@pytest.mark.parametrize(("name", "more", "says", "prepare"), PRETRAIN, ids=[row[0] for row in PRETRAIN])
def test_a_pretraining_that_cannot_be_meant(name, more, says, prepare, world, capsys):
    check(Case(name, [*pretrain_words(world), *more], says, prepare=prepare), world, capsys)


@pytest.mark.parametrize(("name", "more", "says"), PLAN, ids=[row[0] for row in PLAN])
def test_a_plan_that_cannot_be_meant(name, more, says, world, capsys):
    words = [*benchmark_words(world), *more, "--dry-run"]
    if name == "a cluster without its GPUs":
        del words[words.index("--num_gpus") : words.index("--num_gpus") + 2]
    check(Case(name, words, says), world, capsys)


def test_ranks_that_are_no_numbers_do_not_hide_the_error(world, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "all")
    words = [*train_words(world), "--epochs", "0"]
    check(Case("ranks", words, "--epochs is .0"), world, capsys)
