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

Network = Literal["resnet", "airbench"]
# What is not given, where it is not as in Config.
NETWORKS: dict[Network, dict[str, Any]] = {
    "resnet": {},
    "airbench": {
        "width": 64,
        "epochs": 20,
        "batch": 1000,
        "peak_rate": 1.5,
        "momentum": 0.85,
        "weight_decay": 0.0013,
        "moves": 2,
        "smoothing": 0.2,
        "dtype": "bfloat16",
        "evaluate_every": 20,
        "views": 6,
    },
}
Preset = Literal["paper", "accelerator"]
PRESETS: dict[Preset, dict[str, Any]] = {
    "paper": {},
    "accelerator": {"network": "airbench", "epochs": 10, "batch": 1024, "evaluate_every": 1},
}


def defaults(network: Network, preset: Preset) -> dict[str, Any]:
    """What is not given with these two, where it is not as in `Config`."""
    return NETWORKS[network] | PRESETS[preset] | {"network": network}


def in_words(values: dict[str, Any]) -> str:
    """Options as they are given on a command line."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())


NETWORK_HELP = f"He et al.'s ResNet, or Jordan's for speed: {in_words(NETWORKS['airbench'])}, where not given."
PRESET_HELP = f"accelerator: {in_words(PRESETS['accelerator'])}, where not given. Nobody has timed it yet."


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
    network: Annotated[Network, tyro.conf.arg(help=NETWORK_HELP)] = "resnet"
    preset: Annotated[Preset, tyro.conf.arg(help=PRESET_HELP)] = "paper"
    depth: model.Depth = 20
    """Layers of the ResNet."""
    width: int = 16
    """Features of the first stage."""
    zero_last_scale: bool = False
    """Start the last scale of every block of the ResNet at 0, so that each block starts as its shortcut."""
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
    moves: int = 4
    """Pixels by which training images are moved, at most, up to 31."""
    cutout: int = 0
    """Side of a square of pixels that training images lose."""
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
    views: Literal[1, 2, 6] = 1
    """Evaluate by the mean logits of each image; of 2, with its mirror image; of 6, with both moved by a pixel, too."""
    ema: float = 0.0
    """Average the ResNet's params with this decay, in [0, 1), and evaluate the average too, at the end. 0: do not."""
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
        config = cli(default=Config(**defaults(config.network, config.preset)))
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
    for name in ("moves", "cutout"):
        value = getattr(config, name)
        if not 0 <= value < 32:
            raise ValueError(f"{name} is {value}; expected pixels of an image of 32, from 0 to 31.")
    if not 0 <= config.ema < 1:
        raise ValueError(f"ema is {config.ema}; expected a decay in [0, 1), such as 0.99.")
    if config.network != "resnet":
        for name in ("depth", "zero_last_scale", "ema"):
            if getattr(config, name) != getattr(Config, name):
                raise ValueError(f"{name} is {getattr(config, name)}, which goes with --network resnet alone.")
