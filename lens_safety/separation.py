"""Where the concept is: how far the classes lie apart at each layer, and along which dimensions."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .directions import ContentVectors, class_means, is_zero, median_norm, unit_vectors
from .files import Result
from .intervals import group_weights
from .metrics import auroc_by_layer, cohens_d, weighted_auroc
from .residuals import ResidualCache
from .show import card, pick
from .types import EMBED, Labels, OptionError


@dataclass(frozen=True)
class LayerTable(Result):
    """A row a layer (the embedding first, as layer -1), of how far safe and dangerous prompts lie apart.

    Columns: `layer`, `name`; `separation` = 1 - cos(safe mean, dangerous mean) (the persona-vector
    study's score); `magnitude` = L2 norm of the content vector; `relative_magnitude` = that over the
    median residual norm; `cohens_d` and `auroc` (with `auroc_low`, `auroc_high`, a 95% interval
    bootstrapped by group) of cross-validated projections on the content vector; `auroc_shuffled` =
    the 97.5% quantile of the same AUROC after the labels are shuffled (the control);
    `split_half_cosine` = mean cosine of the vectors of two halves of the prompts; `is_zero` = the
    class means are equal, so that there is no direction (AUROC 0.5, cosine 0).
    """

    frame: pd.DataFrame
    n_safe: int
    n_dangerous: int
    folds: int
    seed: int
    source: str
    position: str
    model: str

    @property
    def best_layer(self) -> int:
        """The layer with the highest cross-validated AUROC (the embedding left out; the first of equals)."""
        blocks = self.frame.loc[self.frame["layer"] != EMBED]
        return int(blocks["layer"].to_numpy()[blocks["auroc"].to_numpy().argmax()])

    def _repr_html_(self) -> str:
        names = ("name", "auroc", "auroc_shuffled", "cohens_d", "separation", "relative_magnitude")
        return card(
            f"Layers of {self.model}: {self.source} ({self.n_safe} safe, {self.n_dangerous} dangerous), "
            f"read at {self.position}; best layer {self.best_layer}",
            pick(self.frame.sort_values("auroc", ascending=False, kind="stable"), *names),
            "ls.plots.layer_curve(table)",
            note="highest AUROC first; auroc_shuffled: what shuffled labels reach in 97.5% of draws",
        )


def layer_table(
    cache: ResidualCache,
    *,
    folds: int = 5,
    n_resamples: int = 500,
    n_shuffles: int = 40,
    seed: int = 0,
) -> LayerTable:
    """How far the classes lie apart at the embedding and at each cached layer, with intervals and a control.

    The AUROC and Cohen's d are those of s = (h - (safe mean + dangerous mean) / 2) . v / norm(v),
    where the means and v come from the other folds (grouped and stratified). Fewer folds are taken
    where a class has fewer groups.

    Raises:
        PromptError: a prompt without a label, or fewer than two groups of a class.
    """
    labels, groups = cache.prompts.labels, cache.prompts.groups
    folds = max(2, min(folds, cache.prompts.groups_of_rarer_class))
    held_out = cache.prompts.folds(folds, seed=seed)
    resid = torch.cat([cache.embed[None], cache.resid])
    scores = cross_validated_scores(resid, labels, held_out)
    weights = group_weights(groups, n_resamples=n_resamples, seed=seed)
    draws = np.array([weighted_auroc(row, labels, weights) for row in scores])
    low, high = np.nanpercentile(draws, [2.5, 97.5], axis=1)
    safe_mean, dangerous_mean = class_means(resid, labels)
    vectors = dangerous_mean - safe_mean
    magnitude, resid_norm = vectors.norm(dim=1), median_norm(resid)
    layers = [EMBED, *cache.layers]
    frame = pd.DataFrame(
        {
            "layer": layers,
            "name": ["embed" if layer == EMBED else f"layer {layer}" for layer in layers],
            "separation": 1 - torch.cosine_similarity(safe_mean, dangerous_mean).numpy(),
            "magnitude": magnitude.numpy(),
            "relative_magnitude": (magnitude / resid_norm.clamp_min(1e-12)).numpy(),
            "cohens_d": [cohens_d(row, labels) for row in scores],
            "auroc": auroc_by_layer(scores, labels),
            "auroc_low": low,
            "auroc_high": high,
            "auroc_shuffled": _shuffled_auroc(resid, labels, held_out, n_shuffles, seed),
            "split_half_cosine": _split_half_cosine(resid, labels, cache, seed),
            "is_zero": is_zero(vectors, resid_norm).numpy(),
        }
    )
    return LayerTable(
        frame=frame,
        n_safe=int((~labels).sum()),
        n_dangerous=int(labels.sum()),
        folds=folds,
        seed=seed,
        source=cache.prompts.name,
        position=cache.position,
        model=cache.model.name,
    )


def top_dimensions(vectors: ContentVectors, layer: int, k: int = 20) -> pd.DataFrame:
    """The k dimensions in which a layer's vector is largest, by absolute value.

    Columns: `dimension`, `value` (positive = higher for dangerous prompts), `share` = value^2 /
    norm^2 (how much of the difference it carries), `cumulative_share`, `safe_mean`, `dangerous_mean`.
    """
    vector = vectors.layer(layer)
    if not 1 <= k <= len(vector):
        raise OptionError(f"k={k} given, expected 1 to {len(vector)} dimensions")
    order = vector.abs().argsort(descending=True, stable=True)[:k]
    share = (vector[order] ** 2 / (vector**2).sum().clamp_min(1e-30)).numpy()
    row = vectors.row(layer)
    return pd.DataFrame(
        {
            "dimension": order.numpy(),
            "value": vector[order].numpy(),
            "share": share,
            "cumulative_share": share.cumsum(),
            "safe_mean": vectors.safe_mean[row, order].numpy(),
            "dangerous_mean": vectors.dangerous_mean[row, order].numpy(),
        }
    )


def linear_cka(
    first: Float[Tensor, "layer prompt d_model"],
    second: Float[Tensor, "other prompt width"],
    *,
    debiased: bool = True,
) -> Float[np.ndarray, "layer other"]:
    """How alike the same prompts lie in two sets of layers, of any two widths: linear CKA of each pair.

    CKA = <K, L> / (norm(K) norm(L)) of the centred Gram matrices K and L of the prompts (Kornblith et al.
    2019, 1905.00414): 1 for layers that are equal but for rotation, scale and shift. The plain form
    is far above 0 for unrelated layers that are wider than the prompts are many, so by default K and L
    are centred without bias (Song et al. 2012; Nguyen et al. 2020, 2010.15327): unrelated layers then
    lie around 0. Layers without variation give 0.

    Raises `OptionError` for fewer than 4 prompts.
    """
    n = first.shape[1]
    if n < 4:
        raise OptionError(f"{n} prompts given: expected at least 4 to compare how prompts lie")
    rows, columns = (
        torch.stack([_centred_gram(layer.double(), debiased) for layer in side]) for side in (first, second)
    )
    return (rows @ columns.T).numpy()


def _centred_gram(features: Float[Tensor, "prompt d_model"], debiased: bool) -> Float[Tensor, " pair"]:
    """The centred Gram matrix of the prompts, flat and of norm 1; zeros where there is no variation."""
    n = len(features)
    centred = features - features.mean(dim=0)
    gram = centred @ centred.T
    if debiased:
        gram.fill_diagonal_(0.0)
        sums = gram.sum(dim=1) / (n - 2)
        gram = gram - sums[:, None] - sums[None] + sums.sum() / (n - 1)
        gram.fill_diagonal_(0.0)
    size = gram.norm()
    # What rounding leaves of equal rows is no variation.
    noise = size <= 1e-12 * (features.norm() ** 2).clamp_min(1e-300)
    return torch.zeros(n * n, dtype=gram.dtype) if noise else (gram / size).flatten()


def cross_validated_scores(
    resid: Float[Tensor, "layer prompt d_model"],
    labels: Labels,
    held_out: list[Int[np.ndarray, " _"]],
) -> Float[np.ndarray, "layer prompt"]:
    """Each prompt's projection on the unit content vector of the other folds, 0 at the midpoint."""
    scores = np.zeros(tuple(resid.shape[:2]), dtype=np.float64)
    for held in held_out:
        fitting = np.ones(len(labels), dtype=bool)
        fitting[held] = False
        scores[:, held] = _project(resid, labels, fitting, held)
    return scores


def _project(
    resid: Float[Tensor, "layer prompt d_model"],
    labels: Labels,
    fitting: Bool[np.ndarray, " prompt"],
    held: Int[np.ndarray, " row"],
) -> np.ndarray:
    unit, middle = _unit_and_middle(resid, labels, fitting)
    centred = resid[:, torch.from_numpy(held)] - middle[:, None]
    return torch.einsum("lpd,ld->lp", centred, unit).double().numpy()


def _unit_and_middle(
    resid: Float[Tensor, "layer prompt d_model"], labels: Labels, rows: Bool[np.ndarray, " prompt"]
) -> tuple[Float[Tensor, "layer d_model"], Float[Tensor, "layer d_model"]]:
    """The unit content vector of some rows (0 where it is rounding noise), and the midpoint."""
    safe, dangerous = class_means(resid[:, torch.from_numpy(rows)], labels[rows])
    return unit_vectors(dangerous - safe, median_norm(resid)), (safe + dangerous) / 2


def _shuffled_auroc(
    resid: Tensor,
    labels: Labels,
    held_out: list[np.ndarray],
    n_shuffles: int,
    seed: int,
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(n_shuffles):
        shuffled = labels.copy()
        for held in held_out:
            # Inside each fold, so that both classes stay outside of it however few the prompts.
            shuffled[held] = rng.permutation(labels[held])
        draws.append(auroc_by_layer(cross_validated_scores(resid, shuffled, held_out), shuffled))
    return np.nanpercentile(np.array(draws), 97.5, axis=0)


def _split_half_cosine(
    resid: Tensor, labels: Labels, cache: ResidualCache, seed: int, n_splits: int = 10
) -> np.ndarray:
    cosines = []
    for split in range(n_splits):
        half = np.zeros(len(labels), dtype=bool)
        half[cache.prompts.folds(2, seed=seed + split)[0]] = True
        first, second = (_unit_and_middle(resid, labels, rows)[0] for rows in (half, ~half))
        cosines.append((first * second).sum(dim=1).numpy())
    return np.mean(cosines, axis=0)
