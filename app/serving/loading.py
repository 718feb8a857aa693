"""Weights, or an exported folder, as a finder and what a server says of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from app.console import counted
from app.deploy.runtime.manifest import FILE as MANIFEST
from app.deploy.runtime.manifest import read_manifest
from app.errors import UserError
from app.inference.concepts import read_all
from app.inference.finder import StagedFinder
from app.model.weight_files import find_file
from app.serving.model_thread import About

FORM = re.compile(r"(?:models:/)?(?P<name>[\w.-]{1,100})(?:@(?P<alias>[\w.-]+)|/(?P<version>\d+))")
GENERIC = ("model", "adapter_model", "best", "last", "weights")  # parts of paths that name no model


@dataclass(frozen=True)
class Source:
    """Hold where a version's weights are, and how they are to be loaded.

    Attributes:
        path: a weights folder or file, or a folder that `export` has written.
        name, version: that the server calls it by.
        device, precision, size, resolution: as of `infer`; an exported folder has its own.
        concepts: files of concepts, which are asked for by their names.
        checked: whether weights must answer about their golden image as they did when they were
            saved.
    """

    path: Path
    name: str
    version: str = "1"
    device: str = "auto"
    precision: str = "auto"
    size: str | None = None
    resolution: int | None = None
    concepts: tuple[str, ...] = ()
    checked: bool = False

    def load(self) -> tuple[StagedFinder, About]:
        """Load it, and ask it once; an exported folder needs no torch.

        Raises:
            UserError: it is neither, or does not fit this machine.
        """
        load = self._load_exported if is_exported(self.path) else self._load_weights
        finder, about = load()
        if self.concepts:
            finder.learn(read_all(self.concepts))
            about = about.with_prompts(tuple(finder.concepts))
        # Its first answer takes seconds, for what is made ready at the first call.
        side = about.resolution
        finder.predict(
            Image.new("RGB", (side, side)), (*about.prompts, *(about.vocabulary or ()), "a")[:1]
        )
        return finder, about

    def _load_exported(self) -> tuple[StagedFinder, About]:
        from app.deploy.runtime.runtime import Runtime

        precision = None if self.precision == "auto" else self.precision
        runtime = Runtime.load(self.path, precision=precision)
        manifest = read_manifest(self.path)
        about = About(
            name=self.name,
            version=self.version,
            prompts=manifest.classes,
            vocabulary=manifest.prompts,
            threshold=manifest.threshold,
            size=manifest.size,
            resolution=manifest.resolution,
            pin=manifest.source.get("pin", ""),
            masks=manifest.masks,
        )
        return runtime, about

    def _load_weights(self) -> tuple[StagedFinder, About]:
        from app.inference import golden
        from app.inference.settings import Settings
        from app.inference.worker import load_predictor
        from app.model.weights import read_header

        predictor = load_predictor(
            Settings(
                checkpoint=str(self.path),
                size=self.size,
                resolution=self.resolution,
                device=self.device,
                precision=self.precision,
            )
        )
        header, config = read_header(self.path), predictor.config
        told = header.golden if self.checked and header is not None else None
        if told is not None and (difference := golden.check(predictor, told)):
            raise UserError(
                f"{self.path}: answers about the drawn image otherwise than when it was saved: "
                f"{difference}"
            )
        about = About(
            name=self.name,
            version=self.version,
            prompts=predictor.prompts,
            vocabulary=None if config.vocabulary is None else tuple(config.vocabulary),
            threshold=predictor.threshold,
            size=config.name,
            resolution=config.resolution,
            pin="" if header is None else header.pin,
            masks=config.segmentation,
        )
        return predictor, about


def is_exported(path: Path) -> bool:
    """Return whether a path is a folder that `export` has written for runtimes."""
    return (path / MANIFEST).is_file()


def name_of(path: Path) -> str:
    """Return what a model is called unless it is told: its folder, or that of its run."""
    whole = path.absolute().with_suffix("") if path.is_file() else path.absolute()
    named = [part for part in whole.parts if part not in GENERIC]
    return named[-1] if len(named) > 1 else "model"


def name_all(paths: Sequence[Path], names: Sequence[str]) -> list[tuple[Path, str]]:
    """Return the weights to serve, each with its name; without any, those of nano.

    Raises:
        UserError: no such weights, another number of names, or one name for two.
    """
    if not paths:
        from app.model.bundled import bundled_nano

        nano = bundled_nano()
        if nano is None:
            raise UserError("This copy has no weights of nano: give --checkpoint")
        paths = [nano]
    problems = []
    for path in paths:
        if not is_exported(path):
            try:
                find_file(path)
            except UserError as error:
                problems += error.problems
    if names and len(names) != len(paths):
        problems.append(
            f"--name: {len(names)} for {counted(len(paths), 'model')}; give one for each"
        )
    called = [*names] if names else [name_of(path) for path in paths]
    problems += [
        f"--name {name}: may have letters, digits, '-', '_' and '.', and be one model's; give "
        "--name for each"
        for name in dict.fromkeys(called)
        if not re.fullmatch(r"[\w.-]{1,100}", name) or called.count(name) > 1
    ]
    if problems:
        raise UserError(problems)
    return list(zip(paths, called, strict=True))


@dataclass(frozen=True)
class Registered:
    """Hold which version of a registered model is meant: one by number, or whichever an alias has.

    Attributes:
        name: of the model.
        alias, version: one of them; the other is None.
    """

    name: str
    alias: str | None
    version: str | None

    def __str__(self) -> str:
        return f"models:/{self.name}" + (f"@{self.alias}" if self.alias else f"/{self.version}")


def parse(text: str) -> Registered:
    """Return what models:/NAME@ALIAS or models:/NAME/VERSION means.

    Raises:
        UserError: it is neither.
    """
    if (match := FORM.fullmatch(text)) is None:
        raise UserError(f"--model {text}: give models:/NAME@ALIAS or models:/NAME/VERSION")
    return Registered(match["name"], match["alias"], match["version"])


def split_share(text: str) -> tuple[str, float]:
    """Return the model and the share of `--canary NAME=SHARE`.

    Raises:
        UserError: it is no such text, or no share.
    """
    name, _, share = text.rpartition("=")
    if re.fullmatch(r"[\w.@:-]+", name) and re.fullmatch(r"0?\.\d+|0|1|1\.0+", share):
        return name, float(share)
    raise UserError(f"--canary {text}: give NAME=SHARE, as in potholes@challenger=0.1")
