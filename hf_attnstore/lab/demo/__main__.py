"""`python -m hf_attnstore.lab.demo`: forks a process for each turn that it is asked for.

It has imported what every one of them would import for seconds, and has neither model, nor store, nor a second thread.
What it reads are lines of JSON: the files of a task, of its result, and for what the process prints. It answers with
exit codes.
"""

import json
import os
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401 for the turns

from .turn import main


def serve() -> None:
    """Returns in each process of a turn, when that is done, and when nobody asks any more."""
    for line in sys.stdin:
        task, result, printed = map(Path, json.loads(line))
        pid = os.fork()
        if not pid:
            with printed.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            main(task, result)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)  # noqa: T201 who asked reads it


if __name__ == "__main__":
    serve()
