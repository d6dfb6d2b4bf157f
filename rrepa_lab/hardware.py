"""The machine in words that name no host."""

import platform

import torch


def machine(device: str | torch.device) -> str:
    """The model of the processor, or of the GPU."""
    if torch.device(device).type != "cpu":
        return torch.cuda.get_device_name(device)
    model = ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            model = next((line.split(":")[1].strip() for line in stream if line.startswith("model name")), "")
    except OSError:
        pass
    return model or platform.processor() or platform.machine()


def hardware_words(device: str | torch.device, processes: int = 1) -> str:
    """Model and number: "AMD EPYC, 2 threads", "2 x NVIDIA H200".

    Args:
        device: of this process.
        processes: that share the work, on devices of one kind.
    """
    name = machine(device)
    if torch.device(device).type == "cpu":
        count = torch.get_num_threads()
        name = f"{name}, {count} {'thread' if count == 1 else 'threads'}"
    return name if processes == 1 else f"{processes} x {name}"
