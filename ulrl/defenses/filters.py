"""Ranking the filters of convolutions by how far unlearning moved them, which TSBD and OTBR begin with."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch


class Ranking:
    """The filters of all layers in one order: the largest L1 change of its weights (NWC, of TSBD) first.

    nwc: float [O] by the layer's dotted name. It is not divided by the weights' number, so wide layers come first.
    """

    def __init__(self, nwc: Mapping[str, torch.Tensor]) -> None:
        places = torch.cat(list(nwc.values())).argsort(descending=True, stable=True).argsort()
        self._nwc = nwc
        self._places = dict(zip(nwc, places.split([len(changes) for changes in nwc.values()]), strict=True))

    def __len__(self) -> int:
        return sum(map(len, self._nwc.values()))

    def first(self, count: float) -> dict[str, torch.Tensor]:
        """Which filters have a place below `count`: bool [O] by layer."""
        return {path: places < count for path, places in self._places.items()}

    def table(self, zeroed: Mapping[str, torch.Tensor]) -> pd.DataFrame:
        """One row per filter, the most changed first: index layer, filter; columns nwc, zeroed (as of `first`)."""
        layers = {
            path: pd.DataFrame({"nwc": changes.cpu().numpy(), "zeroed": zeroed[path].cpu().numpy()})
            for path, changes in self._nwc.items()
        }
        table = pd.concat(layers, names=["layer", "filter"])
        return table.sort_values("nwc", ascending=False, kind="stable")
