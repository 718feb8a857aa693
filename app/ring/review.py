"""What a person made of proposals: left as they were, moved, taken away, or added to."""

from __future__ import annotations

from dataclasses import dataclass

from app.datasets.coco import Dataset, overlap
from app.files import hash_file

SAME = 0.99  # IoU from which a label is the proposal, as another tool's pixels may round
MEANT = 0.5  # IoU from which a label corrects a proposal


@dataclass(frozen=True)
class Review:
    """Hold counts of proposals in images that were labelled since, and of labels without one."""

    images: int = 0
    unchanged: int = 0
    moved: int = 0
    removed: int = 0
    added: int = 0

    @property
    def accepted(self) -> float | None:
        """Return the share of proposals that stayed as they were, 0..1; None without proposals."""
        total = self.unchanged + self.moved + self.removed
        return self.unchanged / total if total else None


def review(proposals: Dataset, labels: Dataset) -> Review:
    """Compare proposals with the labels that their images have now, by the images' bytes."""
    labelled = {hash_file(image.path): image.id for image in labels.images}
    names = [{c.id: c.name for c in each.categories} for each in (proposals, labels)]
    images = unchanged = moved = removed = added = 0
    for image in proposals.images:
        own = labelled.get(hash_file(image.path))
        if own is None:
            continue
        images += 1
        left = [(names[1][a.category_id], a) for a in labels.annotations_by_image[own]]
        for proposal in proposals.annotations_by_image[image.id]:
            name = names[0][proposal.category_id]
            overlaps = [
                overlap(proposal, label) if called == name else 0.0 for called, label in left
            ]
            best = max(overlaps, default=0.0)
            unchanged += best >= SAME
            moved += MEANT <= best < SAME
            removed += best < MEANT
            if best >= MEANT:
                del left[overlaps.index(best)]
        added += len(left)
    return Review(images, unchanged, moved, removed, added)
