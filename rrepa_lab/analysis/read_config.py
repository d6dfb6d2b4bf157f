"""Under which noise a run's images are read by the instruments: a choice that belongs to the run."""

from pydantic import Field

from rrepa_lab.config import Config


class ReadConfig(Config):
    """The noise of a reading; chosen on validation data by `rl.choose_read_noise`."""

    draws: int = Field(0, ge=0, description="noise draws a reading is averaged over; 0 reads clean images")
    noise_std: float | None = Field(None, ge=0, description="sigma of these draws; null for the training noise")
