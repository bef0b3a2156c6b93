"""Files that other tools read: safetensors weights and diffusers pipeline folders."""
