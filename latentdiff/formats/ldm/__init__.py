"""Single files of LDM, A1111 and ComfyUI: names, shapes, YAML configs, what they leave unsaid."""
