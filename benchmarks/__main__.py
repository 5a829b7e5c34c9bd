"""What `make rehearse`, `make bench`, `make bench-peers`, `make train` and `make organisms` run: mistakes and Ctrl-C are answered in a
sentence, also while torch is loaded.

    python benchmarks rehearse --model llava-onevision-7b
"""

import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NAMES = {"rehearse": ("rehearse", "A rehearsal is short and keeps nothing: start it again."),
         "bench": ("run", "The figures of the benches that are finished are kept."),
         "peers": ("peers", "Start it again."),
         "profile": ("profile_notebooks", "Start it again."),
         "train": ("recipe.train", "The same command goes on from the last checkpoint."),
         "organisms": ("recipe.organisms", "The same command goes on from the last checkpoint."),
         "export": ("recipe.export", "The same command does it again.")}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run one of `NAMES` with the rest of the command line; returns the exit code."""
    sys.path[:0] = [str(FOLDER.parent), str(FOLDER), str(FOLDER.parent / "data" / "pocket")]
    from kvutils.checkpoints import find_model
    from kvutils.errors import KVUtilsError, one_of
    kept = ""
    try:
        one_of("name", arguments[0] if arguments else "", NAMES)
        module, kept = NAMES[arguments[0]]
        if "--model" in arguments[:-1]:
            find_model(arguments[arguments.index("--model") + 1])
        sys.argv = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except KVUtilsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nStopped. {kept}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
