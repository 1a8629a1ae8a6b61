"""What is measured: acceptance, speed and losslessness, over the prompts that ship with it."""
