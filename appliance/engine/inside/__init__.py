"""What runs in vLLM's own processes: which sessions keep their blocks on the device, and how long."""
