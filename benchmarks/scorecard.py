"""Are the bundled weights what weights/scorecard.json says? Scores them as evaluate.py does, about a minute.

python benchmarks/scorecard.py            # compare, with tolerances for other processors; exit status 1 if they differ
python benchmarks/scorecard.py --write    # write the file
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "weights" / "scorecard.json"
TOLERANCE = {"agreement": 0.002, "cas": 0.01}  # shares; other processors train CAS otherwise
RELATIVE = 0.02  # of the other scores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the file (default: compare with it)")
    opt = parser.parse_args()
    command = [sys.executable, ROOT / "evaluate.py", "--json", "--device", "cpu"]
    card = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    card["weights"] = Path(card["weights"]).relative_to(ROOT).as_posix()
    if opt.write:
        COMMITTED.write_text(json.dumps(card, indent=2) + "\n")
        return 0
    committed, differing = json.loads(COMMITTED.read_text()), 0
    for name, pair in card["scores"].items():
        for who, value in pair.items():
            wanted = committed["scores"][name][who]
            fits = abs(value - wanted) <= TOLERANCE.get(name, RELATIVE * abs(wanted))
            differing += not fits
            print(f"{name:12}{who:12}{wanted:10.4f}{value:10.4f}  {'' if fits else 'DIFFERS'}")
    print(f"{differing} scores differ; warnings: {card['warnings']}")
    return int(differing > 0 or card["warnings"] != committed["warnings"])


if __name__ == "__main__":
    sys.exit(main())
