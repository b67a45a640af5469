"""What the command line of the example makes of its options, its presets and a run that goes on."""

import dataclasses
import json

import config
import pytest
import tyro


def parsed(*arguments):
    """The config and the folder of a run that is started with these arguments."""

    def cli(default=None):
        return tyro.cli(config.Config, default=default, args=[str(argument) for argument in arguments])

    return config.resolve(cli, "now")


def test_without_a_preset_all_is_as_in_the_help():
    assert parsed()[0] == config.Config()


def test_a_network_gives_what_is_not_given():
    """Options go before it, also where they name what is the default without it."""
    found, _ = parsed("--network", "airbench", "--batch", 64, "--views", 1)
    wanted = config.NETWORKS["airbench"] | {"network": "airbench", "batch": 64, "views": 1}
    assert found == config.Config(**wanted)
    assert config.Config().batch == 64 and found.width == 64 and found.dtype == "bfloat16"


def test_a_preset_goes_before_its_network_and_options_before_both():
    found, _ = parsed("--preset", "accelerator", "--epochs", 3)
    both = config.NETWORKS["airbench"] | config.PRESETS["accelerator"]
    assert found == config.Config(**both | {"preset": "accelerator", "epochs": 3})
    assert parsed("--preset", "accelerator", "--network", "resnet")[0].width == config.Config().width


def test_the_help_says_all_of_networks_and_presets():
    for values, text in (
        (config.NETWORKS["airbench"], config.NETWORK_HELP),
        (config.PRESETS["accelerator"], config.PRESET_HELP),
    ):
        for name, value in values.items():
            assert f"--{name.replace('_', '-')} {value}" in text


def test_a_run_with_a_preset_goes_on_as_it_was(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    started, _ = parsed("--preset", "accelerator", "--width", 8, "--run", run)
    settings = dataclasses.asdict(started)
    del settings["launch"], settings["profile"]
    (run / "config.json").write_text(json.dumps({"config": settings}, default=str))
    found, folder = parsed("--resume", run, "--profile", tmp_path)
    assert folder == run and found == dataclasses.replace(started, resume=run, profile=tmp_path)
    for other in (["--width", 16], ["--preset", "paper"], ["--batch", 64], ["--network", "resnet"]):
        with pytest.raises(ValueError, match=f"--resume takes {other[0].removeprefix('--')} from"):
            parsed("--resume", run, *other)


def test_a_run_from_before_these_options_goes_on(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    settings = dataclasses.asdict(config.Config(run=run, depth=8))
    for name in ("launch", "profile", "network", "preset", "width", "views", "remat", "steps_per_call"):
        del settings[name]
    (run / "config.json").write_text(json.dumps({"config": settings}, default=str))
    assert parsed("--resume", run)[0].depth == 8
    with pytest.raises(ValueError, match=r"takes width from .*: it is 16, and 8 was given"):
        parsed("--resume", run, "--width", 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width is 0; expected at least 1"),
        ({"steps_per_call": 0}, "steps_per_call is 0; expected at least 1"),
        ({"network": "airbench", "depth": 56}, "depth is 56, which goes with --network resnet alone"),
        ({"moves": 32}, "moves is 32; expected pixels of an image of 32, from 0 to 31"),
        ({"cutout": -1}, "cutout is -1; expected pixels of an image of 32, from 0 to 31"),
        ({"network": "airbench", "ema": 0.9}, "ema is 0.9, which goes with --network resnet alone"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        config.check(config.Config(**options))
