"""The code in README and docs runs as it stands there, and does what the text around it says."""

import contextlib
import io
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import libraries
import numpy as np
import pytest

import jbn
import jbn.convert

ROOT = Path(__file__).parents[1]


def snippets(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def run(page, found=None):
    """What the snippets of a page define, run one after the other as in a user's program."""
    found = {} if found is None else found
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for code in snippets(page):
            exec(code, found)
    return found


def assert_same(values, state, expected_values, expected_state):
    # float32, another order of summation, about the running mean rather than the batch's
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), values, expected_values)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state, expected_state)


@pytest.fixture(scope="module")
def readme():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        return run("README.md") | {"printed": printed.getvalue()}


def test_the_training_step_learns_and_prints_what_the_readme_says(readme):
    assert readme["evaluated"] < 0.1 * jnp.var(readme["target"])
    assert f"# {readme['printed']}```" in (ROOT / "README.md").read_text()


def test_on_eight_devices_the_result_is_that_of_one(readme):
    assert readme["mesh"].size == 8
    y, state = jbn.batch_norm(readme["x"], readme["params"]["norm"], readme["state"], train=True)
    assert_same(readme["y"], readme["new_state"], y, state)


def test_every_way_of_the_page_on_parallelism_gives_the_gradients_of_one_device():
    whole_step, *codes = snippets("docs/parallel.md")
    found, ways = {}, 0
    exec(whole_step, found)
    operands = found["params"], found["state"], found["x"], found["target"]
    gradients, state = expected = found["gradient"](*operands)
    after = jax.tree.map(lambda p, g: p - 0.1 * g, found["params"], gradients), state
    assert found["mesh"].size == 8
    assert_same(*found["after"], *after)
    for code in codes:
        exec(code, found)
        if "gradients" in found:
            assert_same(found.pop("gradients"), found.pop("new_state"), *expected)
            ways += 1
    assert ways == 5
    np.testing.assert_allclose(found["means"], found["x"].reshape(4, 16, 8).mean(1), rtol=1e-6)

    explicit = whole_step.replace("AxisType.Auto", "AxisType.Explicit")
    assert explicit != whole_step
    exec(explicit, found := {})
    assert_same(*found["after"], *after)


MOVED = [f"docs/{page}.md" for page in ("test-time", "federated", "domains")]


def test_the_folded_network_exported_is_the_network():
    found = run("docs/inference.md")
    expected = found["network"](found["params"], found["state"], found["x"])
    np.testing.assert_allclose(found["y"], expected[:3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["restored"].call(found["x"]), expected, rtol=1e-4, atol=1e-5)
    assert "rsqrt" not in found["program"].mlir_module()


@pytest.mark.parametrize("page", ["docs/variant.md", "docs/faq.md", "docs/libraries.md", "docs/streams.md", *MOVED])
def test_what_a_page_asserts(page):
    assert "assert" in "".join(snippets(page))
    run(page)


def test_the_table_of_dtypes():
    """Mixed precision, docs/faq.md: dtypes of x; of statistics; of running values; of y and dx; of other gradients."""
    section = (ROOT / "docs/faq.md").read_text().split("## Mixed precision")[1].split("```")[0]
    assert section.count("\n| float") == 3
    for dtype, statistics in {
        "float16": "float32",
        "bfloat16": "float32",
        "float32": "float32",
        "float64": "float64",
    }.items():
        (row,) = re.findall(rf"^\| (?:float16, )?{dtype}(?:, bfloat16)? \| (\w+) ", section, re.MULTILINE)
        assert row == statistics
        with jax.enable_x64(dtype == "float64"):
            params, state = jbn.init(3, dtype=dtype if dtype == "float64" else "float32")
            x = jnp.arange(12.0).reshape(4, 3).astype(dtype)

            def loss(params, x, state=state):
                y, new = jbn.batch_norm(x, params, state, train=True)
                return jnp.sum(y.astype("float32")), (y, new)

            (gradients, dx), (y, new) = jax.eval_shape(jax.grad(loss, (0, 1), has_aux=True), params, x)
            assert y.dtype == dx.dtype == dtype and new.mean.dtype == new.var.dtype == state.mean.dtype == statistics
            assert jax.eval_shape(jbn.moments, x).var.dtype == statistics
            y, new = jax.eval_shape(partial(jbn.batch_norm, train=True), x, params, jbn.init(3)[1])
            assert y.dtype == dtype and new.mean.dtype == new.var.dtype == "float32"
            assert gradients.scale.dtype == gradients.bias.dtype == params.scale.dtype


@pytest.mark.parametrize(("mean", "near", "exact"), [(0, 1e-6, 1e-12), (1e6, 0.1, 1e-3)])
def test_float64_data_is_evaluated_as_its_state_is(mean, near, exact):
    """Float32 numbers near 1e6 are 0.06 apart; of the variance, a step so far away counts by what it knew: to 1e-3."""
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(mean, 1, (64, 4))
        right = (x - x.mean(0)) / np.sqrt(x.var(0, ddof=1) + 1e-5)
        for dtype, bound in (("float32", near), ("float64", exact)):
            params, state = jbn.init(4, dtype=dtype)
            for _ in range(2):  # the second measures about the mean
                _, state = jbn.batch_norm(x, params, state, train=True)
            y, _ = jbn.batch_norm(x, params, state, train=False)
            assert state.mean.dtype == dtype and y.dtype == "float64"
            error = np.abs(y - right).max()
            assert error < bound and (error > bound / 100 or dtype == "float64")


def test_every_public_name_is_on_a_page_of_the_api():
    pages = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    named = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    assert {f"jbn.{name}" for name in jbn.__all__} <= named
    converters = {name for name in vars(jbn.convert) if name.startswith(("from_", "to_", "find"))}
    assert {f"jbn.convert.{name}" for name in converters} <= named
    functions = [name for name in jbn.__all__ if name[0].islower()]
    assert all(f"`{name}`" in (jbn.__doc__ or "") for name in functions)


def recipes():
    """Heading and code of every recipe; under the title stands what all of them start with."""
    title, *sections = (ROOT / "docs/recipes.md").read_text().split("\n## ")
    codes = {section.splitlines()[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL) for section in sections}
    return re.findall(r"```python\n(.*?)```", title, re.DOTALL), codes


IMPORTS, RECIPES = recipes()


@pytest.fixture(scope="module")
def imported():
    found = {}
    (code,) = IMPORTS
    exec(code, found)
    return found


@pytest.mark.parametrize("codes", RECIPES.values(), ids=RECIPES)
def test_recipe(codes, imported):
    """What one copies, and what checks it, which is folded in the page."""
    _, check = codes
    assert "assert" in check
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec("\n".join(codes), dict(imported))


def test_the_tables_of_other_libraries():
    page = (ROOT / "docs/libraries.md").read_text()
    for part in libraries.parts():  # as `make bench ARGS=libraries` prints them
        assert part in page
    columns = re.findall(r"^\| (library \| evaluation .*) \|$", page, re.MULTILINE)
    assert columns == [" | ".join(("library", *libraries.Differences._fields))]


def test_the_version_is_that_of_the_changelog():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1].rstrip(",") == jbn.__version__


def bench(*arguments):
    command = [sys.executable, ROOT / "benchmarks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_benchmarks_are_listed_and_reached_by_name():
    listed = {line.split()[0] for line in bench().stdout.splitlines()}
    parts = {"competitors", "example", "figures", "flax_resnet", "hlo", "remedies", "resnet50", "six_layers"}
    parts |= {"flax_norm", "jax_airbench", "tables", "torch_airbench", "training"}
    files = {path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py")}
    assert listed == (files - parts - {"small_batch_record"}) | {"evidence", "moved", "speed"}
    assert bench("operation", "--markdown").stdout.startswith("| case | way | peer |")
    wrong = bench("nothing")
    assert wrong.returncode and "no benchmark 'nothing'" in wrong.stderr and "operation" in wrong.stdout


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(page):
    """Those of the site are checked where it is built, strictly."""
    links = re.findall(r"\]\(([^)#:]+)", (ROOT / page).read_text())
    assert all((ROOT / link).exists() for link in links), links
