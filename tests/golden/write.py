"""Store the outputs of today as the golden values: `python tests/golden/write.py [CASE ...]`.

Run it only for a change of results that is meant, and say in the commit which values moved and why: what it writes is what
every later test is held against.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden.store import CASES, FOLDER, path, write

if __name__ == "__main__":
    chosen = sys.argv[1:] or list(CASES)
    unknown = [case for case in chosen if case not in CASES]
    if unknown:
        sys.exit(f"no case {unknown[0]!r}; there are: {', '.join(CASES)}")
    for case in chosen:
        write(case)
        print(case, flush=True)
    if not sys.argv[1:]:
        for left in set(FOLDER.glob("*.json")) - {path(case) for case in CASES}:
            left.unlink()
