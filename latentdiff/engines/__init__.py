"""What computes a pipeline's networks: torch, or OpenVINO in its place on a CPU."""

ENGINES = ("torch", "openvino")
