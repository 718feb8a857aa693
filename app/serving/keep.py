"""Keep a sample of the images that a server was least sure of, as a dataset to correct.

`DIR/train` is COCO, as `python -m app label` writes it. A file's name begins with the doubt.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from app.console import counted
from app.datasets import coco
from app.datasets.build import JSON_NAMES
from app.datasets.coco import Annotation, Category, Dataset, Image
from app.datasets.images import open_image
from app.errors import UserError
from app.files import atomic_path, check_no_links, claim, read_json, write_json
from app.inference.detections import Detections
from app.inference.doubt import doubt_of
from app.inference.finder import Finder, Query
from app.inference.labelling import to_annotations
from app.serving.uploads import Uploaded

log = logging.getLogger("app")
KEEPER = "kept by python -m app serve"
MOST = 200  # images
LEAST_DOUBT = 0.5
NAME = re.compile(r"[01]\.\d{4}_[0-9a-f]{16}\.(jpg|png)")  # doubt, hash
JPEG = b"\xff\xd8"  # its first bytes


@dataclass(frozen=True)
class Kept:
    """Hold a file of the sample, and its objects with their classes."""

    image: Image
    objects: tuple[tuple[str, Annotation], ...]


class Keeper:
    """Keeps the MOST images of the most doubt; one at a time, and those that come meanwhile not.

    A folder that is moved away, to be labelled, is begun anew. One that somebody else has written
    to is left as it is.

    Args:
        folder: of the dataset; continued where it is one of ours.

    Raises:
        UserError: it holds something else, or another process writes to it.
    """

    def __init__(self, folder: Path, most: int = MOST) -> None:
        self._folder, self._most = folder / "train", most
        self._file = self._folder / JSON_NAMES[0]
        claim(folder)
        self._kept = self._read()
        self._written = self._stamp()
        self._busy = threading.Lock()
        log.warning("--keep %s: images that clients send are kept, %d at most", folder, most)
        self._told = False

    def offer(
        self, finder: Finder, image: Uploaded, queries: Sequence[Query], found: Detections
    ) -> None:
        """Keep an image, in another thread, where it is of more doubt than those that are kept.

        It must have been asked for each class of the weights and for nothing else: what was not
        asked for is not labelled, and what clients type is no class. Weights without classes are
        asked for anything.
        """
        if any(query.boxes_xywh or query.negative_boxes_xywh for query in queries):
            return
        if finder.prompts and set(found.prompts) != set(finder.prompts):
            return
        name = f"{doubt_of(finder, found):.4f}_{image.digest[:16]}"
        if name < f"{LEAST_DOUBT:.4f}" or not self._busy.acquire(blocking=False):
            return
        work = threading.Thread(target=self._work, args=(finder, image, found, name), daemon=True)
        work.start()

    def _work(self, finder: Finder, image: Uploaded, found: Detections, name: str) -> None:
        try:
            self._keep(finder, image, found, name)
        except (OSError, UserError) as error:  # no request fails by this
            if not self._told:
                log.warning("--keep %s: %s", self._folder.parent, error)
            self._told = True
        finally:
            self._busy.release()

    def _keep(self, finder: Finder, image: Uploaded, found: Detections, name: str) -> None:
        if not self._file.exists():
            self._kept = {}
        elif self._stamp() != self._written:
            raise UserError(f"{self._file}: was changed; move the folder away to go on")
        least = min(self._kept, default="")
        is_full = len(self._kept) >= self._most
        if (is_full and name <= least) or any(image.digest[:16] in each for each in self._kept):
            return
        is_jpeg = image.data.startswith(JPEG)
        path = self._folder / "images" / f"{name}{'.jpg' if is_jpeg else '.png'}"
        check_no_links(self._folder.parent, [str(path.relative_to(self._folder.parent))])
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            if is_jpeg:
                temporary.write_bytes(image.data)
            else:
                open_image(Path("image"), finder.levels, image.data).save(temporary, "PNG")
        objects = tuple(
            (found.prompts[annotation.category_id - 1], annotation)
            for annotation in to_annotations(found, 0, 1)
        )
        self._kept[path.name] = Kept(Image(0, path, found.width, found.height), objects)
        if is_full:
            del self._kept[least]
        self._write(finder.prompts)
        if is_full:
            (self._folder / "images" / least).unlink(missing_ok=True)

    def _write(self, classes: Sequence[str]) -> None:
        """Write the JSON anew; classes that objects have besides come after these."""
        used = [name for kept in self._kept.values() for name, _ in kept.objects]
        ids = {name: id for id, name in enumerate(dict.fromkeys([*classes, *used]), start=1)}
        images, annotations = [], []
        for number, name in enumerate(sorted(self._kept, reverse=True), start=1):
            images.append(replace(self._kept[name].image, id=number))
            annotations += [
                replace(annotation, image_id=number, category_id=ids[label])
                for label, annotation in self._kept[name].objects
            ]
        annotations = [replace(each, id=id) for id, each in enumerate(annotations, start=1)]
        categories = tuple(Category(id, name) for name, id in ids.items())
        document = Dataset(tuple(images), tuple(annotations), categories).to_json()
        for entry in document["images"]:
            entry["file_name"] = f"images/{Path(entry['file_name']).name}"
        write_json(self._file, {"info": {"description": KEEPER}, **document})
        self._written = self._stamp()

    def _read(self) -> dict[str, Kept]:
        """Return what an earlier server has kept here; its files that no JSON names are removed."""
        kept: dict[str, Kept] = {}
        if self._file.exists():
            info = read_json(self._file).get("info")
            if not isinstance(info, dict) or info.get("description") != KEEPER:
                raise UserError(f"--keep {self._folder}: is there already; name another folder")
            dataset = coco.examine(self._file, None).sound()
            names = {category.id: category.name for category in dataset.categories}
            for image in dataset.images:
                objects = dataset.annotations_by_image[image.id]
                labelled = tuple((names[each.category_id], each) for each in objects)
                kept[image.path.name] = Kept(image, labelled)
            log.info("--keep %s: %s from before", self._folder.parent, counted(len(kept), "image"))
        for path in self._folder.glob("images/*"):
            if NAME.fullmatch(path.name) and path.name not in kept:
                path.unlink()
        return kept

    def _stamp(self) -> tuple[int, int] | None:
        if not self._file.exists():
            return None
        state = self._file.stat()
        return state.st_mtime_ns, state.st_size
