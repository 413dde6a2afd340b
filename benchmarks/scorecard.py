"""Are the bundled weights what weights/scorecard.json says? Scores them, and real digits, as evaluate.py does.

python -m benchmarks.scorecard            # compare, with tolerances for other processors; exit status 1 if they differ
python -m benchmarks.scorecard --write    # write the file
python -m benchmarks.scorecard --table    # the tables of docs/results.md, from the file
python -m benchmarks.scorecard --noises   # means over the seeds 0, 1 and 2, with intervals: six scorecards
"""

import argparse
import json
import sys

import torch

import fast
from benchmarks.cells import ROOT, mean_and_interval
from data import load_train_and_test
from evaluation.judge import load_judge
from evaluation.scorecard import COMMITTED, QUICK, ROWS, committed_real_scores, scorecard
from fast.process import keep_memory, tune_process
from run.weights import load_network

WEIGHTS = ("weights/best.pth", "weights/acgan_gen.pth")
SEEDS = (0, 1, 2)  # of the noise
TOLERANCE = {"agreement": 0.002, "cas": 0.01}  # shares; other processors train CAS otherwise
RELATIVE = 0.02  # of the other scores


def score(weights: str, seed: int = 0, real_scores: tuple | None = None) -> dict:
    """Return the scorecard of evaluate.py, with the real digits' half computed too if it is not given."""
    tune_process(torch.device("cpu"))
    keep_memory(torch.device("cpu"))
    generator = load_network(ROOT / weights).eval()
    fast.use_fast_layers(generator)
    train_set, test_set = load_train_and_test("mnist", None, None, 32)
    return dict(weights=weights, **scorecard(generator, train_set[:2], test_set[:2], load_judge(None), QUICK,
                                           seed, real_scores=real_scores))  # fmt: skip


def compare(card: dict, committed: dict) -> int:
    """Print each score beside the committed one; return how many differ."""
    differing = 0
    for name, pair in card["scores"].items():
        for who, value in pair.items():
            wanted = committed["scores"][name][who]
            fits = abs(value - wanted) <= TOLERANCE.get(name, RELATIVE * abs(wanted))
            differing += not fits
            print(f"{name:20}{who:12}{wanted:10.4f}{value:10.4f}  {'' if fits else 'DIFFERS'}")
    return differing + (card["warnings"] != committed["warnings"])


def table(cards: dict[str, dict]) -> str:
    """Return the weights beside real digits, and coverage and MS-SSIM by class, as Markdown."""
    ours = list(cards.values())
    lines = [f"| | good | {' | '.join(cards)} | real digits |", "| --- " * (len(cards) + 3) + "|"]
    for key, name, good, form in ROWS:
        values = [card["scores"][key]["generated"] for card in ours] + [ours[0]["scores"][key]["real"]]
        lines.append(f"| {name.strip()} | {good} | {' | '.join(form.format(value) for value in values)} |")
    lines += ["", f"| class | {' | '.join(ours[0]['by_class'])} |", "| --- " * (len(ours[0]["by_class"]) + 1) + "|"]
    for key in ("coverage", "ms_ssim"):
        for who, rows in [*((name, card["by_class"]) for name, card in cards.items()), ("real", ours[0]["by_class"])]:
            whose = "real" if who == "real" else "generated"
            cells = [f"{row[key][whose]:.3f}" for row in rows.values()]
            lines.append(f"| {key.replace('ms_ssim', 'MS-SSIM')}, {who} | {' | '.join(cells)} |")
    return "\n".join(lines)


def noises() -> str:
    """Return the mean of each score over three seeds of noise, pairs and CAS classifier, and its 95 % interval."""
    lines = [f"| | {' | '.join(WEIGHTS)} |", "| --- " * (len(WEIGHTS) + 1) + "|"]
    real = committed_real_scores()  # not shown, so not computed
    cards = [[score(weights, seed, real)["scores"] for seed in SEEDS] for weights in WEIGHTS]
    for key, name, _, form in ROWS:
        cells = [mean_and_interval([scores[key]["generated"] for scores in own]) for own in cards]
        lines.append(f"| {name.strip()} | {' | '.join(f'{form} ± {form}'.format(*cell) for cell in cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the file (default: compare with it)")
    parser.add_argument("--table", action="store_true", help="print the file as Markdown, and score nothing")
    parser.add_argument("--noises", action="store_true", help="print means over three noises, with intervals")
    opt = parser.parse_args()
    if opt.noises:
        print(noises())
        return 0
    if opt.table:
        print(table(json.loads(COMMITTED.read_text())))
        return 0
    cards = {weights: score(weights) for weights in WEIGHTS}
    if opt.write:
        COMMITTED.write_text(json.dumps(cards, indent=2) + "\n")
        return 0
    committed = json.loads(COMMITTED.read_text())
    differing = sum(compare(card, committed[weights]) for weights, card in cards.items())
    print(f"{differing} scores differ")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
