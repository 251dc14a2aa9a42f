"Runs that end their process, each in one of its own that needs no time to start."
import json
import os
import sys
import traceback
from collections.abc import Callable


def forked(main: Callable[[dict], None], path: str) -> int:
    "The exit status of one run in a process of its own."
    if (child := os.fork()) == 0:
        try: main(json.loads(open(path).read()))
        except BaseException:  # noqa: BLE001 - the child must never return into the test
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_files(main: Callable[[dict], None]) -> None:
    """Run the settings in the files that the command line names: one here, several in turn, with
    their exit statuses printed."""
    paths = sys.argv[1:]
    if len(paths) == 1: main(json.loads(open(paths[0]).read()))
    else: print(json.dumps([forked(main, path) for path in paths]))
