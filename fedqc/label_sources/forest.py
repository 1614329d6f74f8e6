"""Labels from one random forest that is read at several depths (Robinson et al. 2018, section 2).

A forest is grown once to the largest depth. At a smaller depth d, each tree answers with the node at which a
voxel's path is after d splits, as if the tree had been cut there: near the root it knows little more than
where the organ lies, near its leaves it follows the organ's edges, and the quality of the labels rises with
the depth. All depths are read from one pass of the voxels through the trees.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedqc.cases.volumes import Case, bounding_box
from fedqc.errors import TrainingError
from fedqc.label_sources.folds import learned_from, out_of_fold
from fedqc.label_sources.store import LEARNED_FROM, LabelStore
from fedqc.seeding import derive_seed, generator

SEGMENTER = "random-forest"
SCALES = (1.0, 3.0)
"""Standard deviations in voxels of the Gaussians that smooth the images."""
_VOXELS_AT_ONCE = 2**16  # that are segmented: each tree and each class at each depth takes some bytes a voxel


@dataclass(frozen=True)
class ForestSettings:
    """How forests are grown and read."""

    trees: int = 50
    """The paper grows 350. On 30 hippocampi (30,000 voxels) their mean DSC at each depth was within 0.02 of
    that of 50 trees, which took a seventh of the time (13 s)."""
    depths: tuple[int, ...] = (2, 4, 6, 8, 10, 15, 20, 24, 36, 40)
    """What the forest is read at, as in the paper; it is grown to the largest."""
    folds: int = 2
    """Each fold of patients is segmented by a forest that learned from the other ones."""
    voxels: int = 100_000
    """Most voxels that a forest learns from, however many cases there are. On the same hippocampi 30,000,
    100,000 and 200,000 gave a mean DSC of 0.78, 0.80 and 0.81 at depth 40; to grow two forests took 3, 15 and
    43 s."""


@dataclass(frozen=True, eq=False)
class TrainingVoxels:
    """Voxels drawn from cases to train on."""

    features: NDArray[np.float32]
    """[voxels, F], see `features`."""
    classes: NDArray[np.uint8]
    """[voxels], class index."""
    weights: NDArray[np.float64]
    """[voxels], how many voxels of its class each stands for: a forest that took the classes to be equally
    frequent would mark too much (mean DSC of hippocampi 0.67 instead of 0.80 at depth 40)."""
    counts: NDArray[np.int64]
    """[256], voxels of each class index in all cases, drawn or not."""


@dataclass(frozen=True, eq=False)
class _Tree:
    """What a tree answers at each depth."""

    ancestors: NDArray[np.int32]
    """[nodes, D], where the path to a node is at each depth: the node itself from its own depth on."""
    votes: NDArray[np.float32]
    """[nodes, classes], they add up to 1."""


@dataclass(frozen=True, eq=False)
class Forest:
    """A trained forest."""

    classifier: Any
    """RandomForestClassifier of scikit-learn, which ships no types."""
    trees: tuple[_Tree, ...]
    classes: NDArray[np.uint8]
    """Class indices that it knows, in the order of its votes."""
    depths: tuple[int, ...]
    seed: int

    def segment(self, case: Case) -> Iterator[tuple[dict[str, Any], NDArray[np.uint8]]]:
        """Segment a case at each depth; whatever is outside of the body is background.

        Yields:
            Recipe and `[X, Y, Z]` class indices, in the order of `depths`.
        """
        inside = body(case)
        rows = features(case)
        found = np.empty((len(self.depths), len(rows)), dtype=np.uint8)
        for start in range(0, len(rows), _VOXELS_AT_ONCE):
            part = slice(start, start + _VOXELS_AT_ONCE)
            found[:, part] = self.classes[self._votes(rows[part]).argmax(axis=2)].T
        for depth, classes in zip(self.depths, found, strict=True):
            label = np.zeros(inside.shape, dtype=np.uint8)
            label[inside] = classes
            yield {"segmenter": SEGMENTER, "depth": depth, "seed": self.seed}, label

    def _votes(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """[voxels, D, classes], the sum over the trees."""
        leaves = self.classifier.apply(rows)
        votes = np.zeros((len(rows), len(self.depths), len(self.classes)), dtype=np.float32)
        for tree, leaf in zip(self.trees, leaves.T, strict=True):
            votes += tree.votes[tree.ancestors][leaf]
        return votes


def body(case: Case) -> NDArray[np.bool_]:
    """[X, Y, Z], where some modality is not 0."""
    inside = np.zeros(case.image.shape[1:], dtype=np.bool_)
    for modality in case.image:
        inside |= modality != 0
    return inside


def features(case: Case) -> NDArray[np.float32]:
    """What a forest sees of each voxel of the body.

    Of each modality its intensity, and at each scale its smoothed intensity and the magnitude of the gradient
    of that; and the place along each axis of the body's bounding box, from 0 to 1.

    Returns:
        [voxels, F], voxels in the order of `image[0][body(case)]`; F is 3 + 5 times the modalities.
    """
    inside = body(case)
    box = bounding_box(inside)
    n_modalities = len(case.image)
    per_modality = 1 + 2 * len(SCALES)
    rows = np.empty((np.count_nonzero(inside), n_modalities * per_modality + 3), dtype=np.float32)
    if box is None:
        return rows
    # One column after the other: all of them as whole volumes would take the memory twice.
    for position, modality in enumerate(case.image):
        column = position * per_modality
        rows[:, column] = modality[inside]
        for scale in SCALES:
            smooth = ndimage.gaussian_filter(modality, scale)
            gradient = np.sqrt(sum(along**2 for along in np.gradient(smooth)))
            rows[:, column + 1] = smooth[inside]
            rows[:, column + 2] = gradient[inside]
            column += 2
    for axis, side in enumerate(box):
        length = max(1, side.stop - 1 - side.start)
        place = (np.arange(inside.shape[axis], dtype=np.float32) - side.start) / length
        along_axis = place.reshape([-1 if other == axis else 1 for other in range(3)])
        rows[:, n_modalities * per_modality + axis] = np.broadcast_to(along_axis, inside.shape)[inside]
    return rows


def draw_voxels(cases: Sequence[Case], voxels: int, rng: np.random.Generator) -> TrainingVoxels:
    """At most `voxels` voxels of the bodies of all cases, as many of each class as far as there are.

    Each class is drawn evenly from its voxels in all cases. One case after the other is read.

    Raises:
        TrainingError: no case has a body.
    """
    counts = np.array([_classes(case.label[body(case)]) for case in cases]).reshape(-1, 256)
    totals = counts.sum(axis=0)
    if not totals.any():
        raise TrainingError(
            f"the images of all {len(cases)} cases to train a forest on are 0 everywhere; check the images"
        )
    shares = equal_shares(totals, voxels)
    # Rounded down cumulatively, so that the cases' parts add up, and none is asked for more than it has.
    parts = np.diff(shares * counts.cumsum(axis=0) // np.maximum(totals, 1), axis=0, prepend=0)
    rows, classes = [], []
    for case, part in zip(cases, parts, strict=True):
        if not part.any():
            continue
        label = case.label[body(case)]
        chosen = np.concatenate(
            [
                rng.choice(np.flatnonzero(label == index), part[index], replace=False, shuffle=False)
                for index in np.flatnonzero(part)
            ]
        )
        rows.append(features(case)[chosen])
        classes.append(label[chosen])
    drawn = np.concatenate(classes)
    return TrainingVoxels(np.concatenate(rows), drawn, (totals / np.maximum(shares, 1))[drawn], totals)


def train_forest(cases: Sequence[Case], settings: ForestSettings, seed: int) -> Forest:
    """Grow a forest on the labels of cases, the same for the same seed.

    Raises:
        TrainingError: no case has a body.
    """
    from sklearn.ensemble import RandomForestClassifier  # noqa: PLC0415 - takes a second, only where used

    drawn = draw_voxels(cases, settings.voxels, generator(seed, "forest", "voxels"))
    classifier = RandomForestClassifier(
        n_estimators=settings.trees,
        max_depth=max(settings.depths),
        random_state=derive_seed(seed, "forest", "trees") % 2**32,
    ).fit(drawn.features, drawn.classes, drawn.weights)
    classes = classifier.classes_
    trees = tuple(_tree(one.tree_, settings.depths, drawn.counts[classes]) for one in classifier.estimators_)
    return Forest(classifier, trees, classes, settings.depths, seed)


def make_forest_labels(
    cases: Sequence[Case],
    store: LabelStore,
    regions: Sequence[Sequence[int]],
    settings: ForestSettings,
    seed: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Segment each case at all depths by a forest that never saw its patient, and store the labels.

    What was stored when a run was cut off is not made again; what a forest made that learned from other cases
    is, or from other labels of theirs.

    Args:
        cases: With their reference labels.
        store: Where the labels go, of these settings and this seed.
        regions: Class indices of each region, see `Task.region_indices`.
        settings: How forests are grown and read.
        seed: Of folds and forests.
        progress: Called with (cases done, all cases) after each case that was segmented.

    Raises:
        TrainingError: all cases are of one patient, or a fold has nothing to train on.
        DataError: the store's folder cannot be written.
    """
    parts = [out_of_fold(cases, fold, seed, settings.folds) for fold in range(settings.folds)]
    of = [learned_from(train_on) for train_on, _ in parts]
    missing = {
        case.id
        for fold, (_, to_segment) in enumerate(parts)
        for case in to_segment
        if not _is_complete(case, store, settings, of[fold])
    }
    n_done = len(cases) - len(missing)
    for fold, (train_on, to_segment) in enumerate(parts):
        if not any(case.id in missing for case in to_segment):
            continue
        forest = train_forest(train_on, settings, derive_seed(seed, "forest", fold))
        common = {"fold": fold, LEARNED_FROM: of[fold]}
        for case in to_segment:
            if case.id not in missing:
                continue
            labels = (({**recipe, **common}, label) for recipe, label in forest.segment(case))
            store.add(case, labels, regions)
            n_done += 1
            if progress is not None:
                progress(n_done, len(cases))


def _is_complete(case: Case, store: LabelStore, settings: ForestSettings, of: str) -> bool:
    recipes = (stored.recipe for stored in store.of(case))
    depths = [recipe.get("depth") for recipe in recipes if recipe.get(LEARNED_FROM) == of]
    return all(depth in depths for depth in settings.depths)


def _classes(label: NDArray[np.uint8]) -> NDArray[np.intp]:
    """[256], voxels of each class index."""
    return np.bincount(label, minlength=256)


def equal_shares(totals: NDArray[np.int64], voxels: int) -> NDArray[np.int64]:
    """[256], how many voxels to draw of each class: as equally as there are enough."""
    shares = np.zeros_like(totals)
    present = np.flatnonzero(totals)
    for position, index in enumerate(present[np.argsort(totals[present], kind="stable")]):
        shares[index] = min(totals[index], (voxels - shares.sum()) // (len(present) - position))
    return shares


def _tree(tree: Any, depths: Sequence[int], counts: NDArray[np.int64]) -> _Tree:
    """Where each path of a scikit-learn tree is at each depth, and what its nodes vote.

    The classes' shares in a node count relative to `counts`, their voxels in all cases. By the shares alone,
    background wins everywhere until deep into the trees: in hippocampi every label down to depth 6 was empty.
    In a node of a single class, as most leaves are, both are the same.
    """
    ancestors = np.zeros((tree.node_count, len(depths)), dtype=np.int32)
    level, depth = np.array([0]), 0
    while level.size:
        depth += 1
        parents = level[tree.children_left[level] >= 0]
        sides = (tree.children_left[parents], tree.children_right[parents])
        for children in sides:
            ancestors[children] = np.where(depth <= np.array(depths), children[:, None], ancestors[parents])
        level = np.concatenate(sides)
    relative = tree.value[:, 0] / counts
    return _Tree(ancestors, (relative / relative.sum(axis=1, keepdims=True)).astype(np.float32))
