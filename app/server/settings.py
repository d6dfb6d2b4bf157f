"""What the page was started with, and settings that all events share."""

from typing import Any

MODEL_QUEUE = "model"  # concurrency group of the events that compute; the model lock admits one of them at a time
LARGEST_SEED = 2**31 - 1
# of events that belong to the page alone, and of those among them that compute
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
PRIVATE_MODEL: dict[str, Any] = {"concurrency_id": MODEL_QUEUE, **PRIVATE}


class ServerSettings:
    """What the page was started with."""

    device = "cpu"
    may_train = True  # off where strangers could reach the page


server_settings = ServerSettings()
