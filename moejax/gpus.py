"""What kind of GPU this process computes on."""

import jax


def cuda_capability() -> tuple[int, int]:
    """NVIDIA's number of its generation, (8, 0) for Ampere and (9, 0) for Hopper; (0, 0) on other backends and makers."""
    if jax.default_backend() != "gpu":
        return 0, 0
    major, _, minor = str(getattr(jax.local_devices()[0], "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else (0, 0)
