"""What a run is told: options, presets, and config.json, from which it goes on."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import cluster
import data
import jax
import model
import tyro

Preset = Literal["paper", "accelerator"]
PRESETS: dict[Preset, dict[str, Any]] = {
    "paper": {},
    # The width of Zagoruyko & Komodakis 2016, "Wide Residual Networks"; batch, rate and square of Page 2018, "How to
    # train your ResNet".
    "accelerator": {
        "width": 64,
        "epochs": 40,
        "batch": 512,
        "peak_rate": 0.4,
        "cutout": 8,
        "dtype": "bfloat16",
        "mirror": True,
    },
}


def preset_help() -> str:
    values = PRESETS["accelerator"].items()
    options = " ".join(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in values)
    return f"What is not given otherwise: as below, or for accelerators {options}, which nobody has timed yet."


@dataclasses.dataclass(frozen=True)
class Config:
    data: Path | None = None
    """Folder with CIFAR-10 in the official binary layout. Without it: the cache, the network, the embedded set."""
    cache: Path = Path("~/.cache/jbn")
    """Where a download is kept."""
    run: Path | None = None
    """Folder for config.json, metrics.csv, curves.png and checkpoints. Without it: runs/ and the time."""
    resume: Path | None = None
    """Go on with the run in this folder from its last whole checkpoint. All else, epochs too, is as it was."""
    preset: Annotated[Preset, tyro.conf.arg(help=preset_help())] = "paper"
    depth: model.Depth = 20
    """Layers of the network."""
    width: int = 16
    """Features of its first stage; the second has twice as many, the third four times."""
    zero_last_scale: bool = False
    """Start the last scale of every block at 0, so that each block starts as its shortcut."""
    epochs: int = 5
    """Times each image is seen."""
    batch: int = 64
    """Images per step, over all devices together."""
    train_images: int | None = None
    """Use only so many training images, the first ones."""
    peak_rate: float = 0.1
    """Highest learning rate of the one-cycle schedule."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """On the kernels, not on scale and bias."""
    smoothing: float = 0.1
    """Label smoothing."""
    cutout: int = 0
    """Side of a square that is cut out of every training image. 0: none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in. Params and statistics are float32."""
    remat: bool = False
    """Keep only the convolutions' outputs and the moments for the backward pass, and make the rest again."""
    steps_per_call: int | None = None
    """Steps in one compiled loop. By default 1 on a CPU, where a loop gains nothing, and 50 elsewhere."""
    seed: int = 0
    """Of the initialization, the order of the images and their augmentation."""
    evaluate_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    mirror: bool = False
    """Evaluate by the mean of the logits of each image and of its mirror image."""
    ema: float = 0.0
    """Average the params with this decay, in [0, 1), and evaluate the average too, at the end. 0: do not."""
    recalibrate: bool = False
    """At the end, evaluate with the exact statistics of the training images in the place of the running ones, too."""
    drift: bool = False
    """At the end, show how far each layer's running statistics are from those of the images; also of a --resume."""
    profile: Path | None = None
    """Folder for a trace of three calls after the first two, for XProf, TensorBoard or Perfetto."""
    require_accuracy: float = 0.0
    """End with an error if the last test accuracy is below this, in [0, 1]."""
    launch: tyro.conf.OmitArgPrefixes[cluster.Cluster] = dataclasses.field(default_factory=cluster.Cluster)


def resolve(cli: Callable[..., Config], started_at: str) -> tuple[Config, Path]:
    """The config that the command line asks for, for a resumed run the one it was started with; and the run folder."""
    config = cli()
    if config.resume is None:
        config = cli(default=Config(**PRESETS[config.preset]))
        run = config.run or Path("runs") / started_at
        if (run / "config.json").exists():
            raise ValueError(f"{run} holds a run already; go on with it by --resume {run}, or name another --run.")
        return config, run
    path = config.resume / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {config.resume} is not the folder of a run.")
    saved = json.loads(path.read_text())["config"] | {"run": config.resume, "resume": config.resume}
    paths = {name: Path(saved[name]) for name in ("data", "cache") if saved[name] is not None}
    looking = {
        name: getattr(config, name) for name in ("drift", "profile", "launch")
    }  # what changes nothing in the run
    started = Config(**{**saved, **paths, **looking})
    given = cli(default=started)
    for name in (field.name for field in dataclasses.fields(Config)):
        value, was = getattr(given, name), getattr(started, name)
        if value != was:
            raise ValueError(f"--resume takes {name} from {path}: it is {was}, and {value} was given. Leave it out.")
    return started, config.resume


def write_config(config: Config, run: Path, dataset: data.Dataset) -> None:
    """Write config.json where there is none; the first process does."""
    path = run / "config.json"
    if path.exists() or jax.process_index() > 0:
        return
    settings = dataclasses.asdict(config)
    del settings["launch"], settings["profile"]  # any number of processes may go on with a run
    content = {"config": settings, "dataset": dataset.name, "jax": jax.__version__}
    run.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=2, default=str) + "\n")
    scratch.replace(path)


def check(config: Config) -> None:
    """Every number is in its range."""
    for name in ("epochs", "batch", "evaluate_every", "width", "steps_per_call"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1.")
    if not 0 <= config.ema < 1:
        raise ValueError(f"ema is {config.ema}; expected a decay in [0, 1), such as 0.99.")
    if not 0 <= config.cutout <= 32:
        raise ValueError(
            f"cutout is {config.cutout}; expected the side of a square in an image of 32 x 32, 0 for none."
        )
