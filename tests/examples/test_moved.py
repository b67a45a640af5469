"""When the data moves: corruptions, adaptation, places and privacy against NumPy; the pages."""

import importlib
import inspect
import json
import re
import runpy
from functools import partial
from pathlib import Path

import adapting
import claim
import corruptions
import domains
import jax
import jax.numpy as jnp
import networks
import numpy as np
import places
import private
import pytest
import showing
import sizes
import sources

import jbn

ROOT = Path(__file__).parents[2]
moved = runpy.run_path(str(ROOT / "benchmarks" / "moved"), run_name="moved")
RANDOM = np.random.default_rng(0)
PIXELS = np.uint8(RANDOM.integers(60, 190, (64, 12, 12, 3)))
pytestmark = pytest.mark.usefixtures("small")


def test_corruptions_are_what_they_are_called():
    clean = PIXELS / 255.0
    found = {kind: corruptions.corrupt(PIXELS, kind, seed=1) / 255.0 for kind in corruptions.KINDS}
    assert all(np.array_equal(corruptions.corrupt(PIXELS, kind, 1) / 255.0, found[kind]) for kind in found)
    assert all(found[kind].shape == clean.shape for kind in found)
    strengths = {kind: strength for kind, (strength, _) in corruptions.STRENGTHS.items()}
    # 27,648 draws; a twelfth is clipped at a side or the other
    assert 0.9 < (found["noise"] - clean).std() / strengths["noise"] < 1.01
    np.testing.assert_allclose(found["contrast"].std((1, 2)), strengths["contrast"] * clean.std((1, 2)), rtol=0.05)
    np.testing.assert_allclose(found["contrast"].mean((1, 2)), clean.mean((1, 2)), atol=1 / 255)
    share = (found["haze"] - clean) / (1 - clean)
    assert share.min() > 0.5 * strengths["haze"] - 0.01 and share.max() < strengths["haze"] + 0.01
    # the corner pixels of one quadrant come from another, and are those of a shifted image
    moves = [(row, column) for row in (0, 2 * 5) for column in (0, 2 * 5)]
    padded = np.pad(clean, ((0, 0), (5, 5), (5, 5), (0, 0)), "edge")
    for image, whole in zip(found["shift"], padded, strict=True):
        assert any(np.array_equal(image, whole[r : r + 12, c : c + 12]) for r, c in moves)
    point = np.zeros((1, 9, 9, 1), np.uint8)
    point[0, 4, 4] = 255
    bell = np.exp(-((np.arange(9) - 4) ** 2) / (2 * corruptions.STRENGTHS["blur"][1] ** 2))
    bell[np.abs(np.arange(9) - 4) > 6] = 0
    blurred = corruptions.corrupt(point, "blur")[0, :, :, 0]
    expected = 255 * np.outer(bell, bell) / np.exp(-(np.arange(-6, 7) ** 2) / (2 * 2.0**2)).sum() ** 2
    np.testing.assert_allclose(blurred, expected, atol=0.51)
    assert 0.01 < np.abs(found["jpeg"] - clean).mean() < 0.3


def linear(params, states, x, normalize):
    training = {"train": True, "decay": 0.9, "axis_name": None}  # as the example's network passes them
    y, state = normalize(x @ params["kernel"], params["norm"], states[0], **training)
    return y, [state]


X = np.float32(RANDOM.normal(1, 2, (32, 4)))
KERNEL = np.float32(RANDOM.normal(size=(4, 10)))
STATE = jbn.State(jnp.linspace(-1, 1, 10), jnp.linspace(0.5, 2, 10), jnp.ones(10))
SOURCE = sources.Source(linear, {"kernel": KERNEL, "norm": jbn.init(10)[0]}, [STATE], X, X, np.zeros(32))


def by(x, mean, var):
    return (np.float64(x) @ np.float64(KERNEL) - mean) / np.sqrt(var + 1e-5)


def test_statistics_of_a_stream():
    """Each batch by a state that has gone a step towards it; slow ones are handed on."""
    slow, states = adapting.METHODS["slow"], SOURCE.states
    mean, var = np.float64(STATE.mean), np.float64(STATE.var)
    carry = slow.start(SOURCE)
    for part in X.reshape(4, 8, 4):
        hidden = np.float64(part) @ np.float64(KERNEL)
        kept = 16 / (16 + 8)
        mixture = [
            kept * old + (1 - kept) * new for old, new in zip(STATE[:2], (hidden.mean(0), hidden.var(0)), strict=True)
        ]
        _, logits = adapting.METHODS["mixed"].step(linear, (SOURCE.params, states), part)
        np.testing.assert_allclose(logits, by(part, *mixture), rtol=1e-4, atol=1e-4)
        kept = 0.9 ** (8 / 64)
        mean, var = kept * mean + (1 - kept) * hidden.mean(0), kept * var + (1 - kept) * hidden.var(0)
        carry, logits = slow.step(linear, carry, part)
        np.testing.assert_allclose(logits, by(part, mean, var), rtol=1e-4, atol=1e-4)
    own = adapting.answers(adapting.METHODS["own statistics"], SOURCE, X, 16)
    hidden = np.float64(X).reshape(2, 16, 4) @ np.float64(KERNEL)
    expected = (hidden - hidden.mean(1, keepdims=True)) / hidden.std(1, keepdims=True)
    assert np.array_equal(own, np.argmax(expected, -1).ravel())


def entropy(logits):
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -(p * np.log(p)).sum(-1)


def test_a_step_of_entropy():
    """The loss of EATA has the gradient that differences of it have, by weights that are held."""
    norm = jbn.Params(jnp.full(10, 3.0), jnp.zeros(10))  # some answers are certain
    step, start = adapting.METHODS["EATA"].step, adapting.METHODS["EATA"].start
    carry, logits = step(linear, start(SOURCE._replace(params={"kernel": KERNEL, "norm": norm})), X)
    hidden = np.float64(X) @ np.float64(KERNEL)
    xhat = 3 * (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
    np.testing.assert_allclose(logits, xhat, rtol=1e-4, atol=1e-4)  # answered before the step
    bound = 0.4 * np.log(10)
    weights = np.where(entropy(xhat) < bound, np.exp(bound - entropy(xhat)), 0)
    assert 0 < np.count_nonzero(weights) < 32

    def loss(bias):
        return np.sum(weights * entropy(xhat + bias)) / np.count_nonzero(weights)

    slopes = np.array([loss(1e-4 * row) - loss(-1e-4 * row) for row in np.eye(10)]) / 2e-4
    clear = np.abs(slopes) > 1e-4  # of the first step Adam keeps the sign
    np.testing.assert_allclose(carry[0]["norm"].bias[clear], -1e-3 * np.sign(slopes[clear]), rtol=1e-2)
    assert clear.sum() > 5
    again, _ = step(linear, carry, X)  # the same images again are nothing new
    p = np.exp(xhat) / np.exp(xhat).sum(-1, keepdims=True)
    np.testing.assert_allclose(carry[3], p[weights > 0].mean(0), rtol=1e-3)
    assert again[3].shape == (10,)


def test_what_fisher_measures():
    """Of one linear layer, frozen: the gradient of the bias is p - one_hot."""
    logits = by(X[:8], STATE.mean, STATE.var)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    slope = (p - np.eye(10)[logits.argmax(-1)]).mean(0)
    (measured,) = adapting.fisher(linear, SOURCE.params, SOURCE.states, X[:8], batches=1).values()
    np.testing.assert_allclose(measured.bias, slope**2, rtol=1e-2, atol=1e-8)


def test_rows_by_the_state_of_their_domain():
    domain = RANDOM.integers(0, 3, 32)
    states = jax.tree.map(lambda field: jnp.stack([field, 2 * field, field + 1]), STATE)._replace(
        weight=jnp.ones((3, 10))
    )
    y, after = domains.by_domain(X @ KERNEL, SOURCE.params["norm"], states, domain=domain)
    for one in range(3):
        mine = np.float64(X[domain == one]) @ np.float64(KERNEL)
        kept = 0.9 ** (len(mine) / 64)
        for field, new in (("mean", mine.mean(0)), ("var", mine.var(0))):
            expected = kept * np.float64(getattr(states, field)[one]) + (1 - kept) * new
            np.testing.assert_allclose(getattr(after, field)[one], expected, rtol=1e-4, atol=1e-4)
        normalized = by(X[domain == one], after.mean[one], after.var[one])
        np.testing.assert_allclose(y[domain == one], normalized, rtol=1e-3, atol=1e-3)


def few_places():
    x = RANDOM.normal(size=(5, 60, 6)).astype(np.float32) + np.arange(5, dtype=np.float32)[:, None, None]
    labels = np.int32(2 * np.arange(5)[:, None] + RANDOM.integers(0, 2, (5, 60)))
    counts = np.array([60, 50, 40, 30, 20])
    return places.Places(*map(jnp.asarray, (x, labels, counts, x.reshape(-1, 6), labels.ravel())))


def test_pooled_steps_are_those_of_one_place():
    """Gradients and states of clients that send sums; what the clients hold differs by five standard deviations."""
    where = few_places()
    params, states = networks.init(jax.random.key(0), 6, 8, 3, 10)
    for step in range(3):
        key = jax.random.key(step)
        together = places.centralized(where, params, states, key, 0.1)
        apart = places.pooled(where, params, states, key, 0.1)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), apart, together)
        params, states = together
    rows, counted = places.draw_rows(jax.random.key(0), where.counts)
    assert counted.sum(1).tolist() == list(places.ROWS)
    x = np.concatenate([where.x[client][rows[client][counted[client]]] for client in range(5)])
    params, states = networks.init(jax.random.key(0), 6, 8, 3, 10)
    _, states = places.pooled(where, params, states, jax.random.key(0), 0.1)
    hidden = np.float64(x) @ np.float64(params["first"]["kernel"])
    np.testing.assert_allclose(states["first"].mean, hidden.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(states["first"].var, hidden.var(0, ddof=1), rtol=1e-4)


def test_states_of_clients_merged_averaged_and_measured_again():
    where = few_places()
    x, counts = np.float64(where.x), np.array(where.counts)
    parts = [part[:count] for part, count in zip(x, counts, strict=True)]
    each = [jbn.State(jnp.float32(part.mean(0)), jnp.float32(part.var(0)), jnp.ones(6)) for part in parts]
    states = domains.stacked(each)
    together, everything = places.merged(states, where.counts), np.concatenate(parts)
    np.testing.assert_allclose(together.mean, everything.mean(0), rtol=1e-5)
    np.testing.assert_allclose(together.var, everything.var(0), rtol=1e-5)
    within = np.average([part.var(0) for part in parts], 0, counts)
    np.testing.assert_allclose(places.average(states, where.counts).var, within, rtol=1e-5)
    assert (within < 0.5 * everything.var(0)).all()  # the trap
    params, fresh = networks.init(jax.random.key(0), 6, 8, 3, 10)
    exact = places.measured_again(where, params, fresh)
    hidden = everything @ np.float64(params["first"]["kernel"])
    np.testing.assert_allclose(exact["first"].var, hidden.var(0, ddof=1), rtol=1e-4)
    hidden = np.maximum((hidden - hidden.mean(0)) / np.sqrt(hidden.var(0, ddof=1) + 1e-5), 0)
    hidden = hidden @ np.float64(params["rest"]["kernel"][0])
    np.testing.assert_allclose(exact["rest"].mean[0], hidden.mean(0), rtol=1e-3, atol=1e-4)


def test_a_client_keeps_its_norms_alone():
    params, _ = networks.init(jax.random.key(0), 6, 8, 3, 10)
    old = places.to_all(params)
    kept = places.keep_own(jax.tree.map(lambda leaf: leaf + 1, old), old)
    assert np.array_equal(kept["first"]["norm"].scale, old["first"]["norm"].scale)
    assert np.array_equal(kept["first"]["kernel"], old["first"]["kernel"] + 1)
    assert np.array_equal(kept["head"]["bias"], old["head"]["bias"] + 1)


PAGES = {"corrupted": "test-time", "domains": "domains", "places": "federated", "private": "federated"}


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "moved").glob("*.json")), ids=lambda path: path.stem)
def test_the_page_holds_the_tables_of_the_record(path):
    """What the page says is what `--markdown` prints, and `--pages` writes."""
    page = (ROOT / "docs" / f"{PAGES[path.stem]}.md").read_text()
    told = importlib.import_module(path.stem).tell(claim.read(path))
    start, end = f"<!-- {path.stem} -->", f"<!-- end of {path.stem} -->"
    assert page.split(start)[1].split(end)[0].strip().splitlines() == told
    assert json.loads(path.read_text())["facts"]["size"] == json.loads(json.dumps(sizes.FULL._asdict()))
    assert f"](moved/{path.stem}.png)" in page


def test_tables_are_written_where_a_page_has_a_place_for_them(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    page.write_text("before\n<!-- private -->\nold\n<!-- end of private -->\nafter\n")
    other.write_text("nothing of it\n")
    showing.into_pages("private", ["| a |", "| b |"], [page, other])
    assert page.read_text() == "before\n<!-- private -->\n\n| a |\n| b |\n\n<!-- end of private -->\nafter\n"
    assert other.read_text() == "nothing of it\n"


def test_the_page_shows_what_was_measured():
    page = (ROOT / "docs" / "test-time.md").read_text()
    for function in (adapting.leaning, adapting.entropies, adapting.parted, adapting.trustworthy):
        assert inspect.getsource(function) in page, function
    assert re.search(r"16 / \(16 \+ len\(x\)\)", page) and adapting.PRIOR == 16
    assert "0.9 ** (len(x) / 64)" in page and adapting.DECAY == 0.9
    assert f"optax.adam({adapting.RATE:g})".replace("0.001", "1e-3") in page
    assert private.CLIP == private.NOISE == 1
