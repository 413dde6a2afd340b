"""acgan.py on few digits, for torchrun: notes what each process did. watched.py N NOTES_DIR FLAGS...

NOTES_DIR/RANK.jsonl gets for each batch the indices it took, the sum of its noise, and a hash of all parameters after
it. With KILL_AT="RANK B" in the environment, the process of that rank kills itself when B batches are done, unless
torchrun has restarted it.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import few_digits

import acgan
from batches import ShuffledBatches

if __name__ == "__main__":
    n, notes, *flags = sys.argv[1:]
    file = open(Path(notes) / f"{os.environ['RANK']}.jsonl", "a")  # noqa: SIM115
    train_step, gather = acgan.train_step, ShuffledBatches.gather
    seen = []

    def watched_gather(self, indices):
        seen.append(indices.tolist())
        return gather(self, indices)

    doomed = os.environ.get("KILL_AT", "").split() if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else []

    def watched_step(generator, discriminator, optimizer_G, optimizer_D, *inputs):
        if doomed == [os.environ["RANK"], str(len(seen) - 1)]:
            os.kill(os.getpid(), signal.SIGKILL)
        metrics = train_step(generator, discriminator, optimizer_G, optimizer_D, *inputs)
        digest = hashlib.sha256()
        for optimizer in (optimizer_G, optimizer_D):
            for parameter in optimizer.param_groups[0]["params"]:
                digest.update(parameter.detach().numpy().tobytes())
        note = {"indices": seen[-1], "z": inputs[2].sum().item(), "parameters": digest.hexdigest()}
        print(json.dumps(note), file=file, flush=True)
        return metrics

    acgan.train_step, ShuffledBatches.gather = watched_step, watched_gather
    acgan.load_dataset = few_digits.first(int(n))
    sys.exit(acgan.main(flags))
