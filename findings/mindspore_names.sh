#!/usr/bin/env bash
# MindSpore 2.10.0: a BatchNorm1d has other names alone than in a network: its running statistics are `mean` and
# `variance`, and become `moving_mean` and `moving_variance` the moment it is made part of one.
#
# Guess before: gamma, beta, moving_mean, moving_variance, with the layer's name before them in a network; a file of
# the lone layer loads into such a layer of a network by cutting that name off.
# Seen: alone a checkpoint says mean and variance. Loaded into a network's layer gamma and beta are taken, the
# statistics are not, without an error: load_param_into_net returns them in a list, and the network evaluates by 0 and
# 1.
#
#   findings/mindspore_names.sh [PYTHON]             a Python 3.11
set -euo pipefail
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet mindspore==2.10.0 numpy==1.26.4
cd "$folder"
"$folder/venv/bin/python" - << 'END'
import mindspore
import numpy as np
from mindspore import Tensor, nn

x = Tensor(np.random.default_rng(0).normal(5, 2, (8, 3)).astype("f4"))
alone = nn.BatchNorm1d(3)
alone.set_train()
alone(x)
mindspore.save_checkpoint(alone, "alone.ckpt")
stored = mindspore.load_checkpoint("alone.ckpt")
network = nn.SequentialCell(nn.BatchNorm1d(3))
missing, unused = mindspore.load_param_into_net(network, {f"0.{name}": value for name, value in stored.items()})
names = list(stored)
print(f"mindspore {mindspore.__version__}: alone {names}; missing {missing}, unused {unused}")
print("running mean", stored["mean"].asnumpy(), "is", network[0].moving_mean.asnumpy(), "in the network")
nn.SequentialCell(alone)
after = [each.name for each in alone.get_parameters()]
print("the same layer, made part of a network:", after)
assert sorted(names) == ["beta", "gamma", "mean", "variance"]
assert missing == ["0.moving_mean", "0.moving_variance"] and sorted(unused) == ["0.mean", "0.variance"]
assert not network[0].moving_mean.asnumpy().any() and stored["mean"].asnumpy().all()
assert sorted(after) == ["0.beta", "0.gamma", "0.moving_mean", "0.moving_variance"]
END
