"""The commands of `rrepa-lab`, in the order of its help.

A new command is a file with `register(commands)`, which adds its parser by `arguments.add_command`, and `run(args)`, which
returns the exit status, and one entry here. Files of commands import torch, pandas and what needs them inside functions, so
that `rrepa-lab --help` starts at once.
"""

from rrepa_lab.cli import (
    app,
    batch,
    bench,
    classify,
    compare,
    data,
    describe,
    doctor,
    encoder,
    evaluate,
    import_tarflow,
    probe,
    push,
    read_noise,
    sample,
    sweep,
    trace,
    train,
    vae,
)

COMMANDS = (
    train, import_tarflow, sample, encoder, vae, trace, classify, probe, evaluate, sweep, read_noise, bench, batch, compare,
    data, push, describe, doctor, app,
)  # fmt: skip
