"""Single files of LDM, A1111 and ComfyUI, in parts: names, shapes, description, conventions."""
