"""Which options a resumed run keeps."""

import argparse

import departures

# Options that change what is computed: a resumed run must have the checkpoint's.
MATHEMATICS = ("seed", "batch_size", "lr", "b1", "b2", "latent_dim", "n_classes", "img_size", "channels", "amp",
               "dataset", *departures.FLAGS)  # fmt: skip
# Options that a resumed run takes from the checkpoint unless they are given.
CONTINUED = ("n_epochs", "sample_interval", "log_interval", "checkpoint_interval", "eval_interval", "judge", "ema",
             "compile", "n_cpu", "bad_images")  # fmt: skip


def with_saved_options(parser: argparse.ArgumentParser, argv: list[str], saved: dict) -> list[str]:
    """Return the words of a command line that resumes a run: the checkpoint's options, then those typed.

    A switch that is younger than the checkpoint has its default. Options that contradict the checkpoint end the program
    with one line and exit status 2.
    """
    saved = {name: parser.get_default(name) for name in departures.FLAGS} | saved
    nothing_typed = argparse.Namespace(**dict.fromkeys(MATHEMATICS))  # in place of the defaults
    given = parser.parse_args(argv, nothing_typed)
    if given.init_from and given.resume is not None:  # torchrun's restart is typed as the run was begun
        parser.error("argument --init_from: a run that continues has begun already: drop it")
    typed = {name: getattr(given, name) for name in MATHEMATICS if getattr(given, name) is not None}
    wrong = [f"--{name} {saved.get(name)}, not {new}" for name, new in typed.items() if new != saved.get(name)]
    if wrong:
        parser.error(f"argument --resume: the checkpoint has {'; '.join(wrong)}: drop these flags to continue")
    parser.set_defaults(init_from=saved.get("init_from"))  # for the record
    kept = {name: saved.get(name) for name in MATHEMATICS + CONTINUED}
    if None in [kept[name] for name in MATHEMATICS]:
        parser.error("argument --resume: the checkpoint is corrupt, as it lacks options: name another run")
    return [f"--{name}={value}" for name, value in kept.items() if value is not None] + argv
