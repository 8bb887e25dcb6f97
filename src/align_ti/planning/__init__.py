"""What a run will take before it is started: memory of a device, bytes sent, time of a step."""
