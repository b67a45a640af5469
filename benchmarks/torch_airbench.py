"""The network of examples/cifar10/airbench.py and its training in PyTorch, as a peer: same start, order and crops."""

import os
from functools import partial
from typing import NamedTuple

import airbench
import config
import data
import jax
import numpy as np
import recipes
import steps
import torch
from jax import numpy as jnp
from torch import nn
from torch.nn import functional

gelu = partial(functional.gelu, approximate="tanh")  # as jax.nn.gelu; Jordan's is by erf


class Network(nn.Module):
    """Logits [batch, 10] in float32 for images [batch, 3, 32, 32]."""

    def __init__(self, width: int):
        super().__init__()
        layers = airbench.layers(width)
        self.whitening = nn.Conv2d(3, airbench.WHITENING, 2, bias=False).requires_grad_(False)
        self.convolutions = nn.ModuleDict(
            {name: nn.Conv2d(inputs, outputs, 3, padding=1, bias=False) for name, inputs, outputs in layers}
        )
        momentum = 1 - airbench.DECAY
        self.norms = nn.ModuleDict(
            {name: nn.BatchNorm2d(outputs, airbench.EPSILON, momentum) for name, _, outputs in layers}
        )
        self.head = nn.Linear(4 * width, 10, bias=False)
        for norm in self.norms.values():
            norm.get_parameter("weight").requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = gelu(self.whitening(images))
        for name, convolution in self.convolutions.items():
            x = convolution(x)
            if name.endswith("conv0"):
                x = functional.max_pool2d(x, 2)
            x = gelu(self.norms[name](x))
        x = functional.max_pool2d(x, 3).flatten(1)
        with torch.autocast("cpu", enabled=False):
            return self.head(x.float()) / 9


def convert(params: dict, state: dict) -> dict[str, torch.Tensor]:
    """The `state_dict` of `Network` from params and state of airbench.py."""

    def of(array, *order):
        return torch.from_numpy(np.array(array, np.float32).transpose(order or None).copy())

    outputs_first = 3, 2, 0, 1
    found = {
        "whitening.weight": of(params["whitening"]["kernel"], *outputs_first),
        "head.weight": of(params["head"]["kernel"], 1, 0),
    }
    for name, statistics in state.items():
        found[f"convolutions.{name}.weight"] = of(params[name]["kernel"], *outputs_first)
        bias = of(params[name]["norm"].bias, 0)
        found |= {f"norms.{name}.weight": torch.ones_like(bias), f"norms.{name}.bias": bias}
        found[f"norms.{name}.running_mean"] = of(statistics.mean, 0)
        found[f"norms.{name}.running_var"] = of(statistics.var, 0)
        found[f"norms.{name}.num_batches_tracked"] = torch.tensor(0)
    return found


class Drawn(NamedTuple):
    """What steps.py draws for one step."""

    rows: np.ndarray  # [batch], which images
    starts: np.ndarray  # [batch, 2], the first row and column of the window in the image padded by 2
    flipped: np.ndarray  # [batch], bool


@partial(jax.jit, static_argnames=("images", "batch"))
def draw(key: jax.Array, epoch: jax.Array | int, *, images: int, batch: int) -> tuple[jax.Array, ...]:
    """The fields of `Drawn`, [steps, ...], for `epoch`, from 0, over so many `images` in a training with this `key`."""
    count = images // batch
    order = jax.random.permutation(jax.random.fold_in(key, epoch + 1), images)  # train.py counts from 1
    rows = order[: count * batch].reshape(count, batch)

    def starts(step):
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, step)))(jnp.arange(batch))
        return jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 5))(keys)

    half = jax.random.bernoulli(jax.random.fold_in(key, np.iinfo(np.uint32).max), shape=order.shape)[rows]
    return rows, jax.vmap(starts)(epoch * count + jnp.arange(count)), (epoch + half) % 2 == 1


class Lookahead:
    """Jordan's, of the tensors `fast`. The last step goes to their average, which moves before if it is its turn."""

    def __init__(self, fast: list[torch.Tensor], total: int):
        self.fast, self.slow = fast, [each.clone() for each in fast]
        self.count, self.total = 0, total

    @torch.no_grad()
    def step(self) -> None:
        """After each step of training."""
        self.count += 1
        if self.count % airbench.SYNCHRONIZE == 0:
            self.pull(airbench.PULL * (self.count / self.total) ** 3)
        if self.count == self.total:
            self.pull(1.0)

    def pull(self, decay: float) -> None:
        for slow, fast in zip(self.slow, self.fast, strict=True):
            fast.copy_(slow.lerp_(fast, 1 - decay))


class Training:
    """As `airbench_peer.Training`, on all cores. `compiled`: by torch.compile."""

    def __init__(self, dataset: data.Dataset, settings: config.Config, *, compiled: bool = False):
        torch.set_num_threads(os.cpu_count() or 1)
        self.dataset, self.settings, self.batch = dataset, settings, settings.batch
        self.total = settings.epochs * (len(dataset.train_labels) // self.batch)
        self.init = recipes.make(settings, dataset, self.total).init
        self.autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=settings.dtype == "bfloat16")
        self.mean, self.std = (torch.from_numpy(each) for each in steps.channel_statistics(dataset.train_images))
        parts = (dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)
        self.train_set, self.test_set = (
            (torch.from_numpy(pixels), torch.from_numpy(labels).long()) for pixels, labels in parts
        )
        self.network = Network(settings.width).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.call = torch.compile(self.network) if compiled else self.network

    def start(self, seed: int) -> None:
        self.key = jax.random.key(seed)
        # Statistics start at 0 and 1 as if these were data; jbn's have no evidence. After 10 steps that is 0.6 %.
        self.begin(convert(*self.init(self.key)))

    def begin(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Start from a `state_dict` of `Network`."""
        self.network.load_state_dict(state_dict)
        peak, decay = self.settings.peak_rate, self.settings.weight_decay
        learned = {name: each for name, each in self.network.named_parameters() if each.requires_grad}
        biases = [each for name, each in learned.items() if name.startswith("norms")]
        kernels = [each for name, each in learned.items() if not name.startswith("norms")]
        faster = airbench.BIAS_RATE
        groups = [
            {"params": kernels, "lr": peak, "weight_decay": decay},
            {"params": biases, "lr": faster * peak, "weight_decay": decay / faster},
        ]
        self.optimizer = torch.optim.SGD(groups, peak, self.settings.momentum, nesterov=True)
        times = [0, max(1, round(0.23 * self.total)), self.total]
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: float(np.interp(step, times, [0.2, 1, 0.07]))
        )
        held = self.network.state_dict().values()  # statistics too
        self.lookahead = Lookahead([each for each in held if each.is_floating_point()], self.total)

    def draw(self, epoch: int) -> list[Drawn]:
        drawn = draw(self.key, epoch, images=len(self.dataset.train_labels), batch=self.batch)
        return list(map(Drawn, *map(np.array, drawn)))

    def step(self, given: Drawn) -> float:
        pixels, labels = self.train_set
        images, chosen = self.augmented(pixels, given), labels[torch.from_numpy(given.rows)]
        self.network.train()
        self.optimizer.zero_grad()
        with self.autocast():
            logits = self.call(images)
        loss = functional.cross_entropy(logits, chosen, label_smoothing=self.settings.smoothing)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.lookahead.step()
        return loss.item()

    def augmented(self, pixels: torch.Tensor, given: Drawn) -> torch.Tensor:
        """Images [batch, 3, 32, 32], channels last: the window and its mirror image are one look-up of pixels."""
        rows, starts, flipped = (torch.from_numpy(each) for each in given)
        # From a place in the padded image to that in the image: 2 1 0 1 2 ... 31 30 29.
        reflected = torch.from_numpy(np.pad(np.arange(32), 2, mode="reflect"))
        places = torch.arange(32)
        columns = torch.where(flipped[:, None], places.flip(0), places)
        down, right = reflected[starts[:, :1] + places], reflected[starts[:, 1:] + columns]
        return self.inputs(pixels[rows[:, None, None], down[:, :, None], right[:, None, :]])

    def inputs(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the network is given [batch, 3, 32, 32] of uint8 pixels [batch, 32, 32, 3]."""
        return ((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def evaluate(self) -> tuple[float, float]:
        """Accuracy and loss on the test images by the mean logits of 6 views."""
        self.network.eval()
        correct, loss = 0, 0.0
        for pixels, labels in zip(*(part.split(self.batch) for part in self.test_set), strict=True):
            images = self.inputs(pixels)
            padded = functional.pad(images, (1, 1, 1, 1), "reflect")
            moved = padded[..., :-2, :-2], padded[..., 2:, 2:]
            with self.autocast():
                both = [self.call(view) + self.call(view.flip(3)) for view in (images, *moved)]
            logits = both[0] / 4 + (both[1] + both[2]) / 8
            correct += int((logits.argmax(1) == labels).sum())
            loss += functional.cross_entropy(logits, labels, reduction="sum").item()
        count = len(self.test_set[1])
        return correct / count, loss / count
