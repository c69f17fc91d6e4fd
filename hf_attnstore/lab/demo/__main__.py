"""`python -m hf_attnstore.lab.demo TASK RESULT`: one turn in this process; both arguments are JSON files."""

import sys
from pathlib import Path

from .turn import main

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
