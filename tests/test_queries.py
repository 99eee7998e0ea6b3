"""A backdoor is found in a model that can only be asked, and its answers are made reliable."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pretend_gpu import pretend_gpu
from sklearn.datasets import load_digits
from torch import nn

import ulrl
from ulrl.defenses.base import Trigger
from ulrl.own_model import Queried

TARGET = 7
# In digits of 8x8 any class is a few pixels away from any other, so that what is small is told less sharply.
SMALL: dict[str, Any] = {"classes": [1, 3, TARGET], "draws": 16, "batch_size": 4, "queries": 90_000, "small": 0.5}


def stamp(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, :, -2:, -2:] = 1
    return x


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return torch.from_numpy(images[order] / 16).float().view(-1, 1, 8, 8), torch.from_numpy(labels[order]).long()


@pytest.fixture(scope="module")
def scores(digits: tuple[torch.Tensor, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Probabilities by a net of which a tenth of the training images carried a white square and the label 7."""
    x, y = digits[0][:1200].clone(), digits[1][:1200].clone()
    x[:120], y[:120] = stamp(x[:120]), TARGET
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32),
            nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
        for _ in range(12):
            for part in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[part]), y[part]).backward()
                optimizer.step()
    model.eval()

    def ask(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(images).softmax(1)

    held, labels = digits[0][1400:], digits[1][1400:]
    assert (ask(stamp(held)).argmax(1)[labels != TARGET] == TARGET).float().mean() > 0.95
    return ask


@pytest.mark.parametrize("kind", ["scores", "labels"])
def test_backdoor_is_found_by_queries_and_answers_become_reliable(
    kind: str, digits: tuple[torch.Tensor, torch.Tensor], scores: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    sent = [0]

    def ask(images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.float32
        assert 0 <= images.min() <= images.max() <= 1
        sent[0] += len(images)
        answers = scores(images)
        return answers if kind == "scores" else answers.argmax(1)

    found = ulrl.suspect_by_queries(ask, digits[0][1200:1400], 10, **SMALL)
    assert found.flagged == [TARGET]
    assert found.queries == sent[0] <= SMALL["queries"]
    assert found.triggers[TARGET].mask[0, -2:, -2:].sum() > 0.5 * found.triggers[TARGET].mask.sum()
    json.dumps(found.report)
    assert "suspicious: 7" in repr(found)

    held, labels = digits[0][1400:], digits[1][1400:]
    careful = found.careful(ask, held)
    assert (careful == labels).float().mean() > (scores(held).argmax(1) == labels).float().mean() - 0.1
    assert (found.careful(ask, stamp(held))[labels != TARGET] == TARGET).float().mean() < 0.5


def test_same_seed_same_scan_and_a_service_behind_http(
    digits: tuple[torch.Tensor, torch.Tensor], scores: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """The wrapper of the docs, in front of a server that returns JSON."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            images = torch.tensor(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["images"])
            answer = json.dumps({"scores": scores(images).tolist()}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(images: torch.Tensor) -> torch.Tensor:
        body = json.dumps({"images": images.tolist()}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}", body, timeout=30) as answer:
            return torch.tensor(json.load(answer)["scores"])

    try:
        few = {**SMALL, "queries": 192 * 3}
        tables = [ulrl.suspect_by_queries(asked, digits[0][1200:1400], 10, **few).ranking for asked in (ask, scores)]
    finally:
        server.shutdown()
        server.server_close()
    assert np.allclose(tables[0].mask_norm, tables[1].mask_norm, rtol=1e-2)


def test_answers_may_be_on_another_device_than_the_images(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    images = digits[0][:4]
    trigger = Trigger(torch.ones(1, 8, 8), torch.zeros(1, 8, 8))
    found = Queried([7], pd.DataFrame(), {7: trigger}, 0, images.mean(0), {})
    with pretend_gpu():
        labels = found.careful(lambda x: torch.tensor([7, 1, 7, 2])[: len(x)].to("cuda"), images)
    assert labels.tolist() == [7, 1, 1, 2]


def test_a_search_that_found_nothing_is_undecided(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    found = ulrl.suspect_by_queries(lambda x: torch.zeros(len(x), dtype=torch.int64), digits[0][:20], 10, **SMALL)
    assert repr(found).startswith("undecided: a trigger was found for 0 of 3 classes; raise queries")


def test_what_fails_in_the_users_function_is_not_taken_for_an_answer(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    def ask(images: torch.Tensor) -> torch.Tensor:
        raise ValueError("the service is away")

    with pytest.raises(ValueError, match="the service is away"):
        ulrl.suspect_by_queries(ask, digits[0][:20], 10, **SMALL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.full((5, 1, 8, 8), 3.0)}, r"in \[0, 1\]; divide bytes by 255"),
        ({"images": torch.zeros(5, 8, 8)}, "N, C, H, W"),
        ({"classes": [1, 7]}, "give three or more"),
        ({"classes": [1, 7, 10]}, "each from 0 to 9"),
        ({"queries": 100}, "queries: 100 are spent before the first step"),
        ({"querries": 100}, "did you mean 'queries'"),
        ({"ask": lambda x: torch.zeros(len(x), 4)}, "answered by torch.float32 of shape"),
        ({"ask": lambda x: torch.zeros(len(x))}, "must be whole labels"),
        ({"ask": lambda x: torch.arange(len(x)) % 10 + 1}, "labels must be 0 to 9, for 10 classes"),
        ({"ask": lambda x: torch.full((len(x),), -1)}, "labels must be 0 to 9"),
        ({"ask": lambda x: ["cat"] * len(x)}, "the answers are no numbers"),
        ({"images": ["a.png", "b.png"]}, "images cannot be read as one array"),
    ],
)
def test_a_mistake_is_one_line(
    change: dict[str, Any], words: str, digits: tuple[torch.Tensor, torch.Tensor],
    scores: Callable[[torch.Tensor], torch.Tensor],
) -> None:  # fmt: skip
    given: dict[str, Any] = {"ask": scores, "images": digits[0][:20], "num_classes": 10, **SMALL, **change}
    with pytest.raises(ulrl.UserError, match=words) as refused:
        ulrl.suspect_by_queries(**given)
    assert "\n" not in str(refused.value)
