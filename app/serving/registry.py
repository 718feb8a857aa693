"""Versions of registered models: fetched from MLflow, and followed as their aliases move.

A moved alias is loaded beside the version that answers, asked about the drawn image of its header,
and takes its place between two requests. Where any of that fails, the version in place goes on, and
the other is not tried again until the alias has moved.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mlflow import MlflowClient, artifacts

from app.errors import UserError
from app.model.weight_files import find_file
from app.serving.engine import Engine
from app.serving.loading import Registered, Source
from app.serving.versions import Models
from app.tracking.mlflow import RETRIES, explain
from app.tracking.state import without_password

log = logging.getLogger("app")


class Registry:
    """The registry of an MLflow server or store.

    Args:
        uri: its address.
    """

    def __init__(self, uri: str) -> None:
        os.environ.setdefault(RETRIES, "1")  # MLflow's own seven take minutes
        os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
        self.uri = uri
        self._client = MlflowClient(uri, uri)

    def version_of(self, wanted: Registered) -> str:
        """Return the number of the version that is meant now.

        Raises:
            UserError: there is none, or the registry does not answer.
        """
        if wanted.version is not None:
            return wanted.version
        try:
            found = self._client.get_model_version_by_alias(wanted.name, str(wanted.alias))
        except Exception as error:  # MLflow's own, and those of its stores and of HTTP
            raise self._problem(wanted, error) from None
        return str(found.version)

    def fetch(self, wanted: Registered, version: str, folder: Path) -> Path:
        """Download a version's weights into a folder; return where they are.

        Raises:
            UserError: there are none, or the registry does not answer.
        """
        try:
            # Asked for by models:/NAME/VERSION, the registry of the whole process would answer.
            source = self._client.get_model_version_download_uri(wanted.name, version)
            model = artifacts.download_artifacts(
                artifact_uri=source, dst_path=str(folder), tracking_uri=self.uri
            )
        except Exception as error:  # as above
            raise self._problem(wanted, error) from None
        for weights in sorted(Path(model, "artifacts").glob("*")):
            try:
                find_file(weights)
            except UserError:
                continue
            return weights
        raise UserError(
            f"models:/{wanted.name}/{version}: holds no weights of this tool "
            "(./train.sh --register)"
        )

    def _problem(self, wanted: Registered, error: Exception) -> UserError:
        shown = without_password(self.uri)
        return UserError(f"{wanted} at {shown}: {explain(error, self.uri)}")


class Follower:
    """Lets whichever version answer that an alias stands for.

    Args:
        registry: is asked.
        wanted: what is followed.
        source: how weights are loaded; its path, name and version are replaced.
        engine: a loaded source → what answers.
    """

    def __init__(
        self,
        registry: Registry,
        wanted: Sequence[Registered],
        source: Source,
        engine: Callable[[Source], Engine],
    ) -> None:
        self._registry, self._wanted = registry, wanted
        self._source, self._engine = source, engine
        self._failed: dict[Registered, str] = {}  # versions that are not tried again
        self._silent = False  # the registry, when it was last asked

    def load_all(self) -> tuple[list[Engine], Mapping[tuple[str, str], str]]:
        """Return an engine of each version that is wanted, and the versions of the aliases.

        Raises:
            UserError: what cannot be had, all of it.
        """
        engines: dict[tuple[str, str], Engine] = {}
        aliases, problems = {}, []
        for wanted in self._wanted:
            try:
                version = self._registry.version_of(wanted)
                if (wanted.name, version) not in engines:
                    engines[wanted.name, version] = self._load(wanted, version)
            except UserError as error:
                problems += error.problems
                continue
            if wanted.alias is not None:
                aliases[wanted.name, wanted.alias] = version
        if problems:
            for engine in engines.values():
                engine.close()
            raise UserError(problems)
        return list(engines.values()), aliases

    def follow(self, models: Models, seconds: float) -> None:
        """Look in a thread every so many seconds, as long as the process lives."""

        def run() -> None:
            while True:
                time.sleep(seconds)
                self.look(models)

        threading.Thread(target=run, name="registry", daemon=True).start()

    def look(self, models: Models) -> None:
        """Exchange what has moved."""
        for wanted in self._wanted:
            if wanted.alias is None:
                continue
            try:
                version = self._registry.version_of(wanted)
            except UserError as error:
                if not self._silent:
                    log.warning("%s; the version that is here goes on", error)
                self._silent = True
                continue
            self._silent = False
            if version not in (models.version(wanted.name, wanted.alias), self._failed.get(wanted)):
                self._exchange(models, wanted, version)

    def _exchange(self, models: Models, wanted: Registered, version: str) -> None:
        try:
            if models.has(wanted.name, version):
                models.move(wanted.name, str(wanted.alias), version)
            else:
                models.add(self._load(wanted, version), str(wanted.alias))
        except Exception as error:  # whatever is in that version: the one that is here goes on
            self._failed[wanted] = version
            said = error if isinstance(error, UserError) else repr(error)
            log.error("%s, version %s, is not taken: %s", wanted, version, said)
            return
        self._failed.pop(wanted, None)
        log.info("%s is version %s from now on", wanted, version)

    def _load(self, wanted: Registered, version: str) -> Engine:
        with tempfile.TemporaryDirectory(prefix="sam3-") as folder:
            path = self._registry.fetch(wanted, version, Path(folder))
            own = replace(self._source, path=path, name=wanted.name, version=version, checked=True)
            engine = self._engine(own)
        log.info("model: %s, version %s (%s)", wanted, version, engine.about.size)
        return engine
