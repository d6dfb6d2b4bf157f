"""The files of a run directory, and the version of their format."""

FORMAT = 2  # of config.json; 1 has the names of settings of version 0.1
CONFIG = "config.json"  # all settings and the class names
WEIGHTS = "model.safetensors"  # averaged weights and projectors after the last step
BEST = "best.safetensors"  # the weights that were best on the validation split, where `train.keep` asks for them
PLAN = "decoding.json"  # how it is decoded fastest, see `sampling.calibrate`
METRICS = "metrics.jsonl"  # the reports of the training
SCORES = "scores.csv"  # the table of `rl.evaluate`
CARD = "card.md"
SAMPLES = "samples.png"  # a picture of samples for the card, where one was drawn
DESCRIPTION = "Description"  # the text of a PNG file that says what it shows (a keyword of the format)
ENCODER = "encoder"  # a folder with a copy of the teacher, of a run on the Hub whose teacher the kit has trained
SPACE = "space"  # a folder with a copy of the autoencoder, where the run models its latents

# what others need of a run; neither the state for resuming nor the card, whose place on the Hub README.md takes
PUBLISHED = (
    CONFIG, WEIGHTS, BEST, PLAN, METRICS, SCORES, f"{SPACE}/{CONFIG}", f"{SPACE}/{WEIGHTS}", f"{SPACE}/{CARD}",
)  # fmt: skip
