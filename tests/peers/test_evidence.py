"""The evidence, tiny: every claim is computed, kept, drawn and told; what is there is not computed again."""

import importlib
import json
import re
import runpy
from pathlib import Path

import claim
import compiling
import figures
import images
import jax
import networks
import numpy as np
import pytest
import residual
from jax import lax

ROOT = Path(__file__).parents[2]
evidence = runpy.run_path(str(ROOT / "benchmarks" / "evidence"), run_name="evidence")
PAGE = ROOT / "docs" / "evidence.md"


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly():
    compiling.quickly(True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evidence")


@pytest.mark.parametrize("name", evidence["CLAIMS"])
def test_a_tiny_claim(name, folder, capsys):
    config = evidence["Config"](folder=folder, claims=(name,), tiny=True)
    evidence["main"](config)
    told = capsys.readouterr().out
    assert "| --- |" in told and "embedded shapes" in told
    assert figures.footnotes == ["images: embedded shapes"]
    assert all(figure.stat().st_size > 5000 for figure in folder.glob(f"{name}*.png"))
    jobs = claim.read(folder / f"{name}.json")
    assert all(f"{name}: {job}," in told for job in jobs)
    evidence["main"](config)  # as after an interruption
    assert f"{name}: " not in capsys.readouterr().out


def test_the_network_is_what_it_says():
    """Against NumPy in float64: dense layers, each normalized, and a relu."""
    x = np.random.default_rng(0).normal(size=(32, 5)).astype(np.float32)
    params, states = networks.init(jax.random.key(0), 5, 7, 3, 4)
    for name in networks.NORMS:
        logits, _, _ = networks.apply(params, states, x, networks.NORMS[name], train=True)
        kernels = [params["first"]["kernel"], *params["rest"]["kernel"]]
        hidden = np.float64(x)
        for kernel in kernels:
            hidden = hidden @ np.float64(kernel)
            if name == "with":
                hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
            hidden = np.maximum(hidden, 0)
        np.testing.assert_allclose(logits, hidden @ np.float64(params["head"]["kernel"]), rtol=1e-3, atol=1e-4)


def test_the_residual_network_is_what_it_says():
    """Against NumPy in float64: twice a norm, a relu and a kernel, added to the shortcut; and each branch's share."""
    x = np.random.default_rng(0).normal(size=(32, 5)).astype(np.float32)
    for name, norm in residual.NORMS.items():
        params, states = residual.init(jax.random.key(0), 5, 7, 8, 4, skip=name == "skip")
        if name == "skip":
            params["blocks"][0]["factor"] = np.float32([0.5, -1, 2])
        logits, _, shares = residual.apply(params, states, x, norm, train=True)

        def normalized(x, name=name):
            return np.maximum((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) if name == "with" else x, 0)

        hidden, expected = np.float64(x) @ np.float64(params["first"]), []
        for block in range(3):
            branch = hidden
            for kernels in params["blocks"][0]["kernels"]:
                branch = normalized(branch) @ np.float64(kernels[block])
            branch *= params["blocks"][0]["factor"][block] if name == "skip" else 1
            hidden = hidden + branch
            expected.append(branch.var() / hidden.var())
        np.testing.assert_allclose(
            logits, normalized(hidden) @ np.float64(params["head"]["kernel"]), rtol=1e-3, atol=1e-3
        )
        np.testing.assert_allclose(shares, expected, rtol=1e-4)


def test_a_product_with_windows_is_the_convolution():
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(2, 6, 5, 3)), random.normal(size=(3, 3, 3, 4))
    expected = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(residual.linear(x, kernel), expected, rtol=1e-4, atol=1e-5)


def test_a_network_among_others_is_the_network_alone():
    data = images.mnist(None).rows.first(64, 32)
    shape = {"depth": 2, "width": 8, "batch": 16, "steps": 3}
    setting = networks.settings(seed=np.arange(3), rate=np.array([0.01, 0.1, 1.0]))
    together = networks.train(setting, data, networks.batch_norm, **shape)
    alone = networks.train(networks.settings(seed=np.array([1]), rate=0.1), data, networks.batch_norm, **shape)
    np.testing.assert_allclose(together.loss[1], alone.loss[0], rtol=1e-4)


def test_the_adding_task():
    x, target = images.adding(jax.random.key(0), 6, 10)
    values, marks = np.asarray(x[..., 0]), np.asarray(x[..., 1])
    assert (marks[:5].sum(0) == 1).all() and (marks[5:].sum(0) == 1).all()
    np.testing.assert_allclose(target, (values * marks).sum(0), rtol=1e-6)


@pytest.mark.parametrize("name", evidence["CLAIMS"])
def test_the_page_holds_the_tables_of_the_record(name):
    """What the page says is what `--markdown` prints."""
    module = importlib.import_module(name)
    for line in module.tell(claim.read(ROOT / "docs" / "evidence" / f"{name}.json")):
        assert line in PAGE.read_text(), line
    facts = json.loads((ROOT / "docs" / "evidence" / f"{name}.json").read_text())["facts"]
    assert facts["size"] == claim.FULL._asdict() and facts["size"]["seeds"] >= 5
    assert re.search(rf"evidence/{name}\w*\.png", PAGE.read_text())
