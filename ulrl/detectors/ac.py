"""Activation clustering: the features of a poisoned class fall in two (Chen et al., arXiv 1811.03728)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.detectors.base import Detector, Scored, register
from ulrl.detectors.features import features_by_class
from ulrl.models.head import find_head
from ulrl.options import option
from ulrl.training import Monitor


@register("ac")
@dataclass(frozen=True)
class ActivationClustering(Detector):
    """Per label, the head's features are reduced by ICA and split by k-means; the smaller cluster is suspicious.

    An image's score is how much nearer it is to the smaller cluster's centre than to the other's, from -1 to 1, times
    the silhouette of the split, by which the paper tells the classes that do fall in two from those that do not.
    """

    ignored: ClassVar[tuple[str, ...]] = (*Detector.ignored, "nb_clusters", "cluster_analysis")  # 2, the smaller

    nb_dims: int = option(10, "dimensions that ICA leaves", source="paper", low=1)

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        find_head(model, clean.spec.num_classes)

    def score(self, model: nn.Module, suspects: ImageSet, clean: ImageSet, monitor: Monitor) -> Scored:
        scores = torch.zeros(len(suspects), device=suspects.device)
        silhouettes, shares = {}, {}
        with monitor.stage("cluster", suspects.spec.num_classes) as progress:
            for k, at, features in features_by_class(model, suspects, self.amp):
                nearness, silhouettes[str(k)], shares[str(k)] = self._split(features.double().cpu())
                scores[at] = (nearness * silhouettes[str(k)]).to(scores)
                progress.step()
        return Scored(scores, {"silhouettes": silhouettes, "smaller_shares": shares})

    def _split(self, features: torch.Tensor) -> tuple[torch.Tensor, float, float]:
        """For the features of a class, [n, D]: nearness to the smaller cluster [n], silhouette, and its share."""
        from sklearn.cluster import KMeans
        from sklearn.decomposition import FastICA
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.metrics import silhouette_score

        rank = int(torch.linalg.matrix_rank(features - features.mean(0)))  # ICA finds no more directions than there are
        if not rank:  # one image again and again, or a dead layer: nothing to split
            return torch.zeros(len(features)), 0.0, 0.5
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # what ICA has by then is good enough for two clusters
            reduced = FastICA(
                min(self.nb_dims, rank), whiten="unit-variance",
                random_state=self.random_seed,
            ).fit_transform(features.numpy())  # fmt: skip
        kmeans = KMeans(2, n_init=10, random_state=self.random_seed).fit(reduced)
        smaller = int((kmeans.labels_ == 1).sum() < (kmeans.labels_ == 0).sum())
        distances = kmeans.transform(reduced)
        nearness = (distances[:, 1 - smaller] - distances[:, smaller]) / distances.sum(1).clip(1e-12)
        share = float((kmeans.labels_ == smaller).mean())
        return torch.from_numpy(nearness), float(silhouette_score(reduced, kmeans.labels_)), share
