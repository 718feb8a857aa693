"""The command line: `python -m app train`, `infer`, `evaluate`, `data` and the others."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

from safetensors import SafetensorError
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from app import signals
from app.console import Formatter, log_to_stdout, show_problems, write_to_nowhere
from app.errors import UserError
from app.model.upstream.pin import prove_pin

# A command X is in app/cli/X.py, which is imported only where X is called.
COMMANDS = {
    "train": "Fine-tune SAM 3 on labelled images, or score weights on them (--eval-only).",
    "infer": "Find what the prompts name in images, and follow it in films; again: what a stop "
    "left.",
    "collect": "Merge what shards have found, if all are done and each image is there once.",
    "serve": "Answer requests over HTTP: an API, and a page for people. Ctrl-C or SIGTERM ends it.",
    "label": "Make a dataset of images without labels: what weights find in them are its "
    "proposals.",
    "rank": "Say which images to label next: of most doubt, and each unlike the others.",
    "ring": "Propose, take what was corrected, train on from the champion, keep what is better.",
    "concept": "Encode example boxes, so that a class is found in other images by them, without "
    "training.",
    "evaluate": "Score weights on a dataset or films, or results from elsewhere; write a report.",
    "report": "Write a run's report.html anew, from what its folder holds.",
    "curve": "Train on few and on more of the images, to see what further labels would bring.",
    "sweep": "Train over settings, datasets and seeds; again: what is left.",
    "compare": "Print two runs' figures side by side, and what of their difference chance could "
    "explain.",
    "track": "Send to MLflow what it has not of a run: after a server was down, or for the first "
    "time.",
    "compact": "Cut weights down to smaller ones, and say what each step removes, leaves and "
    "costs.",
    "retrack": "Teach the tracker of films to see through a tuned trunk, on images without labels.",
    "export": "Write weights for other runtimes, each file compared with the model it came from.",
    "inspect": "Tell what a checkpoint is, what loads it, and what is missing or unexpected.",
    "pack": "Write weights as float16: half as large, with their SHA-256 beside.",
    "merge": "Join a LoRA with its base into plain weights.",
    "data": "Check a dataset, build a checked copy of it, or draw films.",
}
AGAIN = "Mend that, as by freeing space on the disk, and run the same command again"
LESS = "Free it (nvidia-smi names who holds it), or take less of it, as by --device cpu"
# typer has no options whose value may be left out.
DEFAULTS = {"--resume": "--resume=all", "--plan": "--plan=show", "--mlflow": "--mlflow=auto"}


class Commands(TyperGroup):
    """The commands of the table, each of them imported when it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """Return the name of the command that is called, the command, and its own words."""
        name, _, words = super().resolve_command(ctx, args)
        module = importlib.import_module(f"app.cli.{name}")
        return name, get_command(module.cli), words


cli = Commands(
    commands={name: TyperCommand(name, help=text) for name, text in COMMANDS.items()},
    help="Teach SAM 3 (Segment Anything with Concepts) to find your things.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run a command; end with 2 where the user must mend something, as each UserError says."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(Formatter())
    log_to_stdout()
    try:
        prove_pin()
        cli([DEFAULTS.get(word, word) for word in sys.argv[1:]])
    except UserError as error:
        show_problems(error)
        sys.exit(2)
    except BrokenPipeError:  # whoever read our output has ended, as `head` does
        write_to_nowhere(sys.stdout)
        sys.exit(1)
    except OSError as error:  # a full disk, a read-only folder, a file that went while it was read
        where = "a file" if error.filename is None else error.filename
        show_problems(UserError(f"{where}: {error.strerror or error}. {AGAIN}"))
        sys.exit(2)
    except SafetensorError as error:  # what it says of a full disk is no OSError
        show_problems(UserError(f"weights: {error}. {AGAIN}"))
        sys.exit(2)
    except RuntimeError as error:
        if "CUDA" not in str(error) or "out of memory" not in str(error):
            raise
        from app.model.device import told

        show_problems(UserError(f"{told(error)} {LESS}"))
        sys.exit(2)
    except FloatingPointError as error:  # a loss that is not finite
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except signals.Stopped:
        sys.exit(signals.EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
