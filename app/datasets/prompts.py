"""The prompts of each class, and the extra prompts that an image is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.config.yaml_data import read_yaml
from app.datasets.coco import Category, Dataset
from app.errors import UserError, nearest

# Things that a photograph made for another purpose hardly ever shows: negatives for any dataset.
# fmt: off
NOUNS = (
    "accordion", "aircraft carrier", "albatross", "anvil", "aquarium", "armadillo", "astronaut",
    "bagpipes", "balloon animal", "banjo", "beehive", "birthday cake", "bobsled", "bonsai",
    "bowling pin", "bust of a composer", "cactus", "camel", "candelabra", "cannon", "carousel",
    "castle", "cello", "chameleon", "chandelier", "cheese fondue", "chess board", "clown",
    "coral reef", "cowboy hat", "crocodile", "croissant", "cruise ship", "crystal ball",
    "dinosaur skeleton", "dolphin", "dragon costume", "drum kit", "easel", "elephant", "espresso",
    "ferris wheel", "fire eater", "flamingo", "fortune cookie", "galaxy", "geyser", "giraffe",
    "globe", "gondola", "gramophone", "hammock", "harp", "hedgehog", "hot air balloon",
    "hourglass", "igloo", "jellyfish", "jukebox", "kangaroo", "kimono", "lava lamp", "lemur",
    "lighthouse", "llama", "lobster", "mammoth", "mermaid", "microscope", "moose", "mummy",
    "narwhal", "octopus", "opera singer", "orangutan", "origami crane", "ostrich", "owl", "pagoda",
    "panda", "parachute", "parrot", "peacock", "penguin", "pinball machine", "pineapple", "pirate",
    "polar bear", "pyramid", "rhinoceros", "roller coaster", "sarcophagus", "saxophone",
    "scarecrow", "sea lion", "sled dog", "sloth", "snow globe", "space shuttle", "sphinx",
    "starfish", "submarine", "suit of armor", "sumo wrestler", "sundial", "sushi", "telescope",
    "totem pole", "treasure chest", "trombone", "tuba", "typewriter", "unicycle", "viking helmet",
    "violin", "volcano", "walrus", "wedding dress", "windmill", "wine glass", "xylophone", "yak",
    "yurt", "zebra",
)
# fmt: on


def nouns_beside(classes: Iterable[str]) -> list[str]:
    """Return the nouns that share no word with any class: prompts that no image answers."""
    words = {word for name in classes for word in _words(name)}
    return [noun for noun in NOUNS if not words & _words(noun)]


def _words(name: str) -> set[str]:
    """Return the lower-case words, without a plural's s."""
    spaced = "".join(c if c.isalnum() else " " for c in name.casefold())
    return {word.removesuffix("s") for word in spaced.split()}


def name_classes(dataset: Dataset, prompts: Mapping[str, tuple[str, ...]]) -> Dataset:
    """Return the dataset with each class named by its first prompt; the others are its synonyms.

    Args:
        prompts: of some of the classes, as `read_prompts` gives them.
    """
    categories = tuple(
        replace(category, name=words[0], synonyms=words[1:])
        if (words := prompts.get(category.name))
        else category
        for category in dataset.categories
    )
    return replace(dataset, categories=categories)


def read_prompts(file: Path, categories: Iterable[Category]) -> dict[str, tuple[str, ...]]:
    """Read prompts by class from YAML or JSON: `class: prompt` or `class: [prompt, synonym, …]`.

    Raises:
        UserError: every class that is not there, prompt that is no text, prompt for two classes.
    """
    try:
        content = read_yaml(file)
    except UserError as error:
        raise UserError(f"--prompts {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--prompts {file}: must be a mapping of classes to prompts")
    names = [category.name for category in categories]
    prompts = {str(name): _clean(value) for name, value in content.items()}
    problems = [
        f"--prompts {file}: the dataset has no class '{name}'.{nearest(name, names)}"
        for name in prompts
        if name not in names
    ]
    problems += [
        f"--prompts {file}: '{name}': must be a prompt, or a list of them: words, as text"
        for name, words in prompts.items()
        if not words
    ]
    problems += _shared(file, {name: prompts.get(name) or (name,) for name in names})
    if problems:
        raise UserError(problems)
    return prompts


def _clean(value: Any) -> tuple[str, ...]:
    """Return prompts without outer blanks, each once; none where one is no text of words."""
    words = value if isinstance(value, list) else [value]
    if not all(isinstance(word, str) and any(c.isalnum() for c in word) for word in words):
        return ()
    return tuple(dict.fromkeys(" ".join(word.split()) for word in words))


def _shared(file: Path, prompts: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Report prompts of two classes: each would be trained as present and as absent at once."""
    owners: dict[str, list[str]] = {}
    for name, words in prompts.items():
        for word in words:
            owners.setdefault(word.casefold(), []).append(name)
    return [
        f"--prompts {file}: '{word}' is asked for {' and '.join(map(repr, classes))}: "
        "name each class by its own words, or give the objects one class"
        for word, classes in owners.items()
        if len(classes) > 1
    ]
